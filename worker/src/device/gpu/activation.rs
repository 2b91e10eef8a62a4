//! Activations on a GPU as inputs of the statistics kernels, and values that the host needs later.

use std::ops::Range;

use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::{DType, Device, Storage, Tensor};
pub use outliers_cuda::ScanSummary;
use outliers_cuda::{Activation, Stored};

use super::routing::shown;
use crate::error::{Result, WorkerError};

/// Values of a GPU in transfer to the host.
#[must_use]
pub struct PendingCopy(outliers_cuda::PendingCopy);

impl PendingCopy {
    /// Starts the copy of a tensor as f32, and does not wait for it; `None` on the CPU.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn start(x: &Tensor) -> Result<Option<Self>> {
        let Device::Cuda(device) = x.device() else { return Ok(None) };
        let x = x.to_dtype(DType::F32)?.contiguous()?;
        let (storage, layout) = x.storage_and_layout();
        let values = shown::<f32>(&storage, layout)?;
        Ok(Some(Self(outliers_cuda::PendingCopy::start(&device.cuda_stream(), &values)?)))
    }

    /// Waits for the values.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn wait(self) -> Result<Vec<f32>> {
        Ok(self.0.wait()?)
    }
}

/// Pending statistics of an activation on a GPU.
pub struct PendingScan {
    pending: outliers_cuda::PendingScan,
    /// Shape `[rows, width]`, contiguous, in a dtype that the kernels support.
    x: Tensor,
    /// Rows per sequence.
    tokens: usize,
}

impl PendingScan {
    /// Starts the statistics of a tensor `[rows, width]` with whole sequences of `tokens` rows:
    /// per row and magnitude; with `threshold`, positions of |x| >= threshold for columns; with
    /// `medians`, medians. Returns without waiting. The tensor must not be overwritten before this
    /// value is dropped.
    pub fn at(x: &Tensor, tokens: usize, threshold: Option<f32>, medians: bool) -> Result<Self> {
        let x = match x.dtype() {
            DType::F32 | DType::BF16 | DType::F16 => x.contiguous()?,
            _ => x.to_dtype(DType::F32)?.contiguous()?,
        };
        let pending = with_activation(&x, tokens, |activation| Ok(activation.start_scan(threshold, medians)?))?;
        Ok(Self { pending, x, tokens })
    }

    /// The tensor, in the dtype in which it was read.
    pub fn tensor(&self) -> &Tensor {
        &self.x
    }

    /// Waits for the results and passes them to `see`.
    ///
    /// # Errors
    /// Errors of `see`.
    pub fn show<T>(&self, see: impl FnOnce(&ScanSummary<'_>) -> Result<T>) -> Result<T> {
        with_activation(&self.x, self.tokens, |activation| see(&self.pending.summary(activation)?))
    }
}

/// Some of the values; `None` for a dtype that no pass uses.
pub(super) fn stored(slice: &CudaStorageSlice, part: Range<usize>) -> Option<Stored<'_>> {
    Some(match slice {
        CudaStorageSlice::F32(x) => Stored::F32(x.slice(part)),
        CudaStorageSlice::BF16(x) => Stored::Bf16(x.slice(part)),
        CudaStorageSlice::F16(x) => Stored::F16(x.slice(part)),
        _ => return None,
    })
}

/// Passes the tensor's values to `see` without a copy.
fn with_activation<T>(x: &Tensor, tokens: usize, see: impl FnOnce(&Activation<'_>) -> Result<T>) -> Result<T> {
    let width = x.dim(1)?;
    let (storage, layout) = x.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().expect("made contiguous when it was looked at");
    let Storage::Cuda(storage) = &*storage else {
        return Err(WorkerError::internal("a tensor of a GPU is not there"));
    };
    let Some(stored) = stored(&storage.slice, start..end) else {
        return Err(WorkerError::internal("a tensor is of another dtype than it says"));
    };
    see(&Activation::new(storage.device.cuda_stream(), stored, width, tokens))
}
