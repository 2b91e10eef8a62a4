//! Products of several matrices by one call of a GPU's library, over the tensor library's tensors.

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::cuda_backend::CudaDType;
use candle_core::{DType, Layout, Result, Storage, Tensor, bail};
use half::{bf16, f16};
use outliers_cuda::grouped::{self as kernels, ALIGNMENT, Factor, Real};

use super::fused::in_dtype;
use super::routing::{shown, tensor};

/// The library refused when it was [tried](try_in_group).
static REFUSED: AtomicBool = AtomicBool::new(false);

/// Has the library multiply with a matrix twice by one call, for which it loads kernels. If it
/// refuses, it says why, and [`takes_in_group`] takes no matrix from then on.
pub fn try_in_group(matrix: &Tensor) -> Option<String> {
    if !takes_in_group(matrix) {
        return None;
    }
    let rows = matrix.dims().first().copied().unwrap_or_default();
    let refused = grouped_product(matrix, &[matrix, matrix], &[rows / 2, rows - rows / 2]).err()?;
    REFUSED.store(true, Ordering::Relaxed);
    Some(refused.to_string())
}

/// Whether the library for its device takes a matrix `[out, in]` in [`grouped_product`].
pub fn takes_in_group(matrix: &Tensor) -> bool {
    let bytes = matrix.dtype().size_in_bytes();
    let is_aligned = |values: &usize| (values * bytes).is_multiple_of(ALIGNMENT);
    matrix.device().is_cuda()
        && outliers_cuda::find().is_ok_and(|found| found.grouped_products)
        && !REFUSED.load(Ordering::Relaxed)
        && matrix.dims().iter().all(is_aligned)
        && is_aligned(&matrix.layout().start_offset())
}

/// Rows of `x` `[rows, in]` times the transposes of matrices `[out, in]`, each perhaps a transposed
/// view. Each takes so many rows, behind those of the one before.
pub fn grouped_product(x: &Tensor, matrices: &[&Tensor], rows: &[usize]) -> Result<Tensor> {
    in_dtype!(x, T => of::<T>(x, matrices, rows))
}

fn of<T: CudaDType + Real>(x: &Tensor, matrices: &[&Tensor], rows: &[usize]) -> Result<Tensor> {
    let Some(first) = matrices.first() else { bail!("grouped products without a matrix") };
    let ((out, input), (all, _)) = (first.dims2()?, x.dims2()?);
    let device = x.device().as_cuda_device()?;
    let (storage, layout) = x.storage_and_layout();
    let x = shown::<T>(&storage, layout)?;
    let stored: Vec<_> = matrices.iter().map(|matrix| matrix.storage_and_layout()).collect();
    let mut factors = Vec::with_capacity(matrices.len());
    for ((storage, layout), rows) in stored.iter().zip(rows) {
        factors.push(factor::<T>(storage, layout, *rows)?);
    }
    let made = kernels::products(&device.cublas_handle(), &device.cuda_stream(), &x, &factors, [out, input]);
    Ok(tensor(made.map_err(candle_core::Error::wrap)?, device, &[all, out]))
}

fn factor<'a, T: CudaDType>(storage: &'a Storage, layout: &Layout, rows: usize) -> Result<Factor<'a, T>> {
    let Storage::Cuda(storage) = storage else { bail!("grouped products with a matrix elsewhere than on the GPU") };
    let (out, input) = layout.shape().dims2()?;
    let input_major = match *layout.stride() {
        [row, 1] if row == input => false,
        [1, column] if column == out => true,
        _ => bail!("grouped products with a matrix {:?} of strides {:?}", layout.shape(), layout.stride()),
    };
    let start = layout.start_offset();
    let matrix = storage.as_cuda_slice::<T>()?.slice(start..start + out * input);
    Ok(Factor { matrix, input_major, rows })
}
