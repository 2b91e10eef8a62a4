//! Replaces `host_to_device` in builds without CUDA.

use std::convert::Infallible;
use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use crate::checkpoint::dtype::Encoded;
use crate::checkpoint::safetensors::StoredDtype;
use crate::error::Result;

/// Cannot exist without CUDA.
pub struct HostToDevice(Infallible);

impl HostToDevice {
    /// Always `None`.
    ///
    /// # Errors
    /// None.
    pub fn to(_device: &Device) -> Result<Option<Self>> {
        Ok(None)
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn upload_fence(&mut self) -> Result<UploadFence> {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn decode(&mut self, _: &Encoded<'_>, _: &[usize], _: DType, _: &str) -> Result<Tensor> {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn decode_read(
        &mut self,
        _: (&StoredDtype, usize),
        _: &[usize],
        _: DType,
        _: &str,
        _: impl FnMut(Range<usize>, &mut [u8]) -> Result<()>,
    ) -> Result<Tensor> {
        match self.0 {}
    }
}

/// Cannot exist without CUDA.
pub struct UploadFence(Infallible);

impl UploadFence {
    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn wait(self) -> Result<()> {
        match self.0 {}
    }
}

/// Always `None`: memory of the CPU is free at once.
///
/// # Errors
/// None.
pub fn release_fence(_device: &Device) -> Result<Option<ReleaseFence>> {
    Ok(None)
}

/// Cannot exist without CUDA.
pub struct ReleaseFence(Infallible);

impl ReleaseFence {
    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn wait(self) -> Result<()> {
        match self.0 {}
    }
}
