//! GPU kernels of [`crate::kernels::fused`] over the tensor library's storages.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, CudaViewMut};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaStorage, DType, Layout, Result, Storage, Tensor, bail};
use half::{bf16, f16};
use outliers_cuda::fused as kernels;
pub(crate) use outliers_cuda::fused::{Convolution, Gate, Rotation, Scores};
pub(crate) use outliers_cuda::recurrence::Recurrence;
use outliers_cuda::recurrence::{self as recurrences, MOST_ROWS};

use super::MAX_VALUES;

/// A tensor that is read.
pub(crate) type Read<'a> = (&'a CudaStorage, &'a Layout);

/// Evaluates an expression in which the named type is that of the storage's dtype.
macro_rules! in_dtype {
    ($storage:expr, $name:ident => $run:expr) => {
        match $storage.dtype() {
            DType::F32 => {
                type $name = f32;
                $run
            }
            DType::BF16 => {
                type $name = bf16;
                $run
            }
            DType::F16 => {
                type $name = f16;
                $run
            }
            dtype => bail!("there is no kernel for {dtype:?}"),
        }
    };
}
pub(super) use in_dtype;

fn offsets(layout: &Layout) -> Result<(usize, usize)> {
    let values = layout.shape().elem_count();
    if values > MAX_VALUES {
        bail!(
            "{values} values of shape {:?} in one tensor, of which a GPU takes {MAX_VALUES}: \
             use a smaller --micro-batch-tokens, or shorter sequences",
            layout.shape()
        );
    }
    match layout.contiguous_offsets() {
        Some(offsets) => Ok(offsets),
        None => bail!("a kernel on a non-contiguous tensor {:?}", layout.shape()),
    }
}

fn view<T: CudaDType>((storage, layout): Read<'_>) -> Result<CudaView<'_, T>> {
    let (start, end) = offsets(layout)?;
    Ok(storage.as_cuda_slice::<T>()?.slice(start..end))
}

fn view_mut<'a, T: CudaDType>(storage: &'a mut CudaStorage, layout: &Layout) -> Result<CudaViewMut<'a, T>> {
    let (start, end) = offsets(layout)?;
    Ok(storage.as_cuda_slice_mut::<T>()?.slice_mut(start..end))
}

/// Size of the last dimension; 1 for a scalar.
fn width(layout: &Layout) -> usize {
    layout.dims().last().copied().unwrap_or(1)
}

/// Passes an optional tensor's storage to `see`, beside the storages of an operation.
fn reading<R>(tensor: Option<&Tensor>, see: impl FnOnce(Option<Read<'_>>) -> Result<R>) -> Result<R> {
    let Some(tensor) = tensor else { return see(None) };
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) => see(Some((storage, layout))),
        _ => bail!("a kernel on tensors of several devices"),
    }
}

/// What a kernel made of `x`, on the same device.
fn made<T: CudaDType>(x: Read<'_>, out: CudaSlice<T>) -> CudaStorage {
    CudaStorage::wrap_cuda_slice(out, x.0.device.clone())
}

/// As [`crate::kernels::fused::rms_norm`].
pub(crate) fn rms_norm(x: Read<'_>, gain: Read<'_>, residual: Option<&Tensor>, eps: f32) -> Result<CudaStorage> {
    let stream = x.0.device.cuda_stream();
    reading(residual, |residual| {
        in_dtype!(x.0, T => {
            let residual = residual.map(view::<T>).transpose()?;
            Ok(made(x, kernels::rms_norm(&stream, &view::<T>(x)?, &view::<T>(gain)?, residual.as_ref(), eps).w()?))
        })
    })
}

/// As [`crate::kernels::fused::layer_norm`].
pub(crate) fn layer_norm(x: Read<'_>, gain: Read<'_>, bias: &Tensor, eps: f32) -> Result<CudaStorage> {
    let stream = x.0.device.cuda_stream();
    reading(Some(bias), |bias| {
        let bias = bias.expect("given");
        in_dtype!(x.0, T => {
            let out = kernels::layer_norm(&stream, &view::<T>(x)?, &view::<T>(gain)?, &view::<T>(bias)?, eps).w()?;
            Ok(made(x, out))
        })
    })
}

/// As [`crate::kernels::fused::rope`].
pub(crate) fn rope(x: &mut CudaStorage, layout: &Layout, table: Read<'_>, rotation: Rotation) -> Result<()> {
    let stream = x.device.cuda_stream();
    in_dtype!(x, T => kernels::rope(&stream, &mut view_mut::<T>(x, layout)?, &view::<f32>(table)?, rotation).w())
}

/// As [`crate::kernels::fused::causal_softmax`].
pub(crate) fn softmax(x: &mut CudaStorage, layout: &Layout, scores: Scores, sinks: Option<&Tensor>) -> Result<()> {
    let stream = x.device.cuda_stream();
    reading(sinks, |sinks| {
        let sinks = sinks.map(view::<f32>).transpose()?;
        in_dtype!(x, T => kernels::softmax(&stream, &mut view_mut::<T>(x, layout)?, scores, sinks.as_ref()).w())
    })
}

/// As [`crate::kernels::fused::logit_parts`].
pub(crate) fn logit_parts(x: Read<'_>, targets: Read<'_>, first: u32) -> Result<CudaStorage> {
    let (stream, targets) = (x.0.device.cuda_stream(), view::<u32>(targets)?);
    in_dtype!(x.0, T => Ok(made(x, kernels::logit_parts(&stream, &view::<T>(x)?, &targets, first).w()?)))
}

/// As `crate::blocks::delta_net::Convolution`.
pub(crate) fn convolution(
    x: Read<'_>,
    taps: Read<'_>,
    bias: Option<&Tensor>,
    convolution: Convolution,
) -> Result<CudaStorage> {
    let (stream, taps) = (x.0.device.cuda_stream(), view::<f32>(taps)?);
    reading(bias, |bias| {
        let bias = bias.map(view::<f32>).transpose()?;
        in_dtype!(x.0, T => {
            Ok(made(x, kernels::convolution(&stream, &view::<T>(x)?, &taps, bias.as_ref(), convolution).w()?))
        })
    })
}

/// As [`crate::kernels::recurrence::Recurrence`].
pub(crate) fn recurrence(
    [query, key, value]: [Read<'_>; 3],
    decay: &Tensor,
    strength: Option<&Tensor>,
    of: Recurrence,
) -> Result<CudaStorage> {
    if of.rows > MOST_ROWS {
        bail!("a state of {} rows, of which a GPU takes {MOST_ROWS}", of.rows);
    }
    let (decay, decay_layout) = decay.storage_and_layout();
    let Storage::Cuda(decay) = &*decay else { bail!("a kernel on tensors of several devices") };
    let (queries, keys) = (view::<f32>(query)?, view::<f32>(key)?);
    let (values, decay) = (view::<f32>(value)?, view::<f32>((decay, decay_layout))?);
    reading(strength, |strength| {
        let strength = strength.map(view::<f32>).transpose()?;
        let (stream, inputs) = (value.0.device.cuda_stream(), [&queries, &keys, &values, &decay]);
        Ok(made(value, recurrences::recurrence(&stream, inputs, strength.as_ref(), of).w()?))
    })
}

/// As [`crate::kernels::fused::gated`].
pub(crate) fn gated(gates: &mut CudaStorage, layout: &Layout, up: Read<'_>, how: Gate) -> Result<()> {
    let (stream, width) = (gates.device.cuda_stream(), width(layout));
    in_dtype!(gates, T => {
        kernels::gated(&stream, &mut view_mut::<T>(gates, layout)?, &view::<T>(up)?, width, how).w()
    })
}

/// As [`crate::kernels::fused::gated_joined`].
pub(crate) fn gated_joined(joined: Read<'_>, inner: usize, interleaved: bool, how: Gate) -> Result<CudaStorage> {
    let stream = joined.0.device.cuda_stream();
    in_dtype!(joined.0, T => {
        Ok(made(joined, kernels::gated_joined(&stream, &view::<T>(joined)?, inner, interleaved, how).w()?))
    })
}

/// As [`crate::kernels::fused::activated`].
pub(crate) fn activate(x: &mut CudaStorage, layout: &Layout, kind: u32) -> Result<()> {
    let stream = x.device.cuda_stream();
    in_dtype!(x, T => kernels::activate(&stream, &mut view_mut::<T>(x, layout)?, width(layout), kind).w())
}

/// As [`crate::kernels::fused::sum`].
pub(crate) fn sum(x: &mut CudaStorage, layout: &Layout, y: Read<'_>) -> Result<()> {
    let (stream, width) = (x.device.cuda_stream(), width(layout));
    in_dtype!(x, T => kernels::sum(&stream, &mut view_mut::<T>(x, layout)?, &view::<T>(y)?, width).w())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensor_that_kernels_cannot_count_is_refused_by_its_size() {
        assert_eq!(offsets(&Layout::contiguous((1 << 15, (1 << 16) - 1))).unwrap(), (0, (1 << 31) - (1 << 15)));
        let refused = offsets(&Layout::contiguous((1 << 15, 1 << 16))).unwrap_err().to_string();
        assert!(refused.contains("2147483648 values of shape [32768, 65536]"), "{refused}");
        assert!(refused.contains("--micro-batch-tokens"), "{refused}");
    }
}
