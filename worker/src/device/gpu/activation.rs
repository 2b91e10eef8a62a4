//! Activations on a GPU, as the kernels of statistics read them.

use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::{DType, Storage, Tensor};
pub use outliers_cuda::Seen;
use outliers_cuda::{Activation, Stored};

use crate::error::{Result, WorkerError};

/// What was asked of activations on a GPU, on its way to the host.
pub struct Look {
    look: outliers_cuda::Look,
    /// `[rows, width]`, contiguous, in a dtype that kernels know.
    x: Tensor,
    /// Rows of a sequence.
    tokens: usize,
}

impl Look {
    /// Asks for rows and magnitudes of a tensor `[rows, width]`, rows of whole sequences of
    /// `tokens` each; for columns, where a value exceeds whose |x| >= `threshold`; and for
    /// medians. Nothing is waited for. The tensor must not be overwritten before the look is
    /// dropped.
    ///
    /// # Errors
    /// Device: the driver's.
    pub fn at(x: &Tensor, tokens: usize, threshold: Option<f32>, medians: bool) -> Result<Self> {
        let x = match x.dtype() {
            DType::F32 | DType::BF16 | DType::F16 => x.contiguous()?,
            _ => x.to_dtype(DType::F32)?.contiguous()?,
        };
        let look = with_activation(&x, tokens, |activation| Ok(activation.look(threshold, medians)?))?;
        Ok(Self { look, x, tokens })
    }

    /// Whether all of it is there, so that nobody would wait for it.
    ///
    /// # Errors
    /// Device: the driver's.
    pub fn is_there(&self) -> Result<bool> {
        Ok(self.look.is_there()?)
    }

    /// The tensor, in the dtype in which it was looked at.
    pub fn tensor(&self) -> &Tensor {
        &self.x
    }

    /// Shows what was found, for which whoever reads it waits.
    ///
    /// # Errors
    /// Device: the driver's. Those of `see`.
    pub fn show<T>(&self, see: impl FnOnce(&Seen<'_>) -> Result<T>) -> Result<T> {
        with_activation(&self.x, self.tokens, |activation| see(&self.look.seen(activation)?))
    }
}

/// Shows a tensor's values where they lie.
fn with_activation<T>(x: &Tensor, tokens: usize, see: impl FnOnce(&Activation<'_>) -> Result<T>) -> Result<T> {
    let width = x.dim(1)?;
    let (storage, layout) = x.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().expect("made contiguous when it was looked at");
    let Storage::Cuda(storage) = &*storage else {
        return Err(WorkerError::internal("a tensor of a GPU is not there"));
    };
    let stored = match &storage.slice {
        CudaStorageSlice::F32(x) => Stored::F32(x.slice(start..end)),
        CudaStorageSlice::BF16(x) => Stored::Bf16(x.slice(start..end)),
        CudaStorageSlice::F16(x) => Stored::F16(x.slice(start..end)),
        _ => return Err(WorkerError::internal("a tensor is of another dtype than it says")),
    };
    see(&Activation::new(storage.device.cuda_stream(), stored, width, tokens))
}
