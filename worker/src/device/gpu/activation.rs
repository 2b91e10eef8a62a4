//! Activations on a GPU, as the kernels of statistics read them.

use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::{DType, Storage, Tensor};
pub use outliers_cuda::Activation;
use outliers_cuda::Stored;

use crate::error::{Result, WorkerError};

/// Shows a tensor's values `[rows, width]` where they lie, in their own dtype where kernels know
/// it, in f32 else; rows of whole sequences of `tokens` each.
pub fn with_activation<T>(x: &Tensor, tokens: usize, see: impl FnOnce(&Activation<'_>) -> Result<T>) -> Result<T> {
    let x = match x.dtype() {
        DType::F32 | DType::BF16 | DType::F16 => x.contiguous()?,
        _ => x.to_dtype(DType::F32)?.contiguous()?,
    };
    let width = x.dim(1)?;
    let (storage, layout) = x.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().expect("made contiguous above");
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
