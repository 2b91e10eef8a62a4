//! Replaces `activation` in builds without CUDA.

use std::convert::Infallible;
use std::marker::PhantomData;

use candle_core::Tensor;
use outliers_scan::{Columns, Large, Scan};

use crate::error::{Result, WorkerError};

/// Cannot exist without CUDA.
pub struct PendingCopy(Infallible);

impl PendingCopy {
    /// Always `None`.
    ///
    /// # Errors
    /// None.
    pub fn start(_: &Tensor) -> Result<Option<Self>> {
        Ok(None)
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn wait(self) -> Result<Vec<f32>> {
        match self.0 {}
    }
}

/// Cannot exist without CUDA.
pub struct PendingScan(Infallible);

impl PendingScan {
    /// Always fails.
    ///
    /// # Errors
    /// Internal: the tensor is on a GPU.
    pub fn at(_: &Tensor, _: usize, _: Option<f32>, _: bool) -> Result<Self> {
        Err(WorkerError::internal("a tensor is on a GPU, which this worker was built without"))
    }

    /// Never called.
    pub fn tensor(&self) -> &Tensor {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn show<T>(&self, _: impl FnOnce(&ScanSummary<'_>) -> Result<T>) -> Result<T> {
        match self.0 {}
    }
}

/// Cannot exist without CUDA.
pub struct ScanSummary<'a>(Infallible, PhantomData<&'a ()>);

impl ScanSummary<'_> {
    /// Never called.
    pub fn rows(&self) -> usize {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn scan(&self) -> candle_core::Result<Vec<Scan>> {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn columns(&self, _: f32) -> candle_core::Result<Vec<Columns>> {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn medians(&self) -> candle_core::Result<Vec<f32>> {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn large(&self, _: &[(usize, u32)]) -> candle_core::Result<Vec<Large>> {
        match self.0 {}
    }
}
