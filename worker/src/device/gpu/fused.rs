//! GPU kernels of [`crate::kernels::fused`] over the tensor library's storages.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaView, CudaViewMut};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaStorage, DType, Layout, Result, Storage, Tensor, bail};
use half::{bf16, f16};
use outliers_cuda::fused::{self as kernels, Real};
pub(crate) use outliers_cuda::fused::{Convolution, Gate, Rotation, Scores};
pub(crate) use outliers_cuda::recurrence::Recurrence;
use outliers_cuda::recurrence::{self as recurrences, MOST_ROWS};

use super::MAX_VALUES;

/// A tensor that is read.
pub(crate) type Read<'a> = (&'a CudaStorage, &'a Layout);

/// Calls a function with the type of the storage's dtype.
macro_rules! in_dtype {
    ($storage:expr, $function:ident($($argument:expr),*)) => {
        match $storage.dtype() {
            DType::F32 => $function::<f32>($($argument),*),
            DType::BF16 => $function::<bf16>($($argument),*),
            DType::F16 => $function::<f16>($($argument),*),
            dtype => bail!("there is no kernel for {dtype:?}"),
        }
    };
}

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

/// As [`crate::kernels::fused::rms_norm`].
pub(crate) fn rms_norm(x: Read<'_>, gain: Read<'_>, residual: Option<&Tensor>, eps: f32) -> Result<CudaStorage> {
    fn of<T: CudaDType + Real>(
        x: Read<'_>,
        gain: Read<'_>,
        residual: Option<Read<'_>>,
        eps: f32,
    ) -> Result<CudaStorage> {
        let residual = residual.map(view::<T>).transpose()?;
        let stream = x.0.device.cuda_stream();
        let out = kernels::rms_norm(&stream, &view::<T>(x)?, &view::<T>(gain)?, residual.as_ref(), eps).w()?;
        Ok(CudaStorage::wrap_cuda_slice(out, x.0.device.clone()))
    }
    reading(residual, |residual| in_dtype!(x.0, of(x, gain, residual, eps)))
}

/// As [`crate::kernels::fused::layer_norm`].
pub(crate) fn layer_norm(x: Read<'_>, gain: Read<'_>, bias: Read<'_>, eps: f32) -> Result<CudaStorage> {
    fn of<T: CudaDType + Real>(x: Read<'_>, gain: Read<'_>, bias: Read<'_>, eps: f32) -> Result<CudaStorage> {
        let stream = x.0.device.cuda_stream();
        let out = kernels::layer_norm(&stream, &view::<T>(x)?, &view::<T>(gain)?, &view::<T>(bias)?, eps).w()?;
        Ok(CudaStorage::wrap_cuda_slice(out, x.0.device.clone()))
    }
    in_dtype!(x.0, of(x, gain, bias, eps))
}

/// As [`crate::kernels::fused::rope`].
pub(crate) fn rope(x: &mut CudaStorage, layout: &Layout, table: Read<'_>, rotation: Rotation) -> Result<()> {
    fn of<T: CudaDType + Real>(
        x: &mut CudaStorage,
        layout: &Layout,
        table: Read<'_>,
        rotation: Rotation,
    ) -> Result<()> {
        let stream = x.device.cuda_stream();
        kernels::rope(&stream, &mut view_mut::<T>(x, layout)?, &view::<f32>(table)?, rotation).w()
    }
    in_dtype!(x, of(x, layout, table, rotation))
}

/// As [`crate::kernels::fused::causal_softmax`].
pub(crate) fn softmax(x: &mut CudaStorage, layout: &Layout, scores: Scores, sinks: Option<&Tensor>) -> Result<()> {
    fn of<T: CudaDType + Real>(
        x: &mut CudaStorage,
        layout: &Layout,
        scores: Scores,
        sinks: Option<Read<'_>>,
    ) -> Result<()> {
        let sinks = sinks.map(view::<f32>).transpose()?;
        let stream = x.device.cuda_stream();
        kernels::softmax(&stream, &mut view_mut::<T>(x, layout)?, scores, sinks.as_ref()).w()
    }
    reading(sinks, |sinks| in_dtype!(x, of(x, layout, scores, sinks)))
}

/// As [`crate::kernels::fused::logit_parts`].
pub(crate) fn logit_parts(x: Read<'_>, targets: Read<'_>, first: u32) -> Result<CudaStorage> {
    fn of<T: CudaDType + Real>(x: Read<'_>, targets: Read<'_>, first: u32) -> Result<CudaStorage> {
        let stream = x.0.device.cuda_stream();
        let out = kernels::logit_parts(&stream, &view::<T>(x)?, &view::<u32>(targets)?, first).w()?;
        Ok(CudaStorage::wrap_cuda_slice(out, x.0.device.clone()))
    }
    in_dtype!(x.0, of(x, targets, first))
}

/// As `crate::blocks::delta_net::Convolution`.
pub(crate) fn convolution(
    x: Read<'_>,
    taps: Read<'_>,
    bias: Option<&Tensor>,
    convolution: Convolution,
) -> Result<CudaStorage> {
    fn of<T: CudaDType + Real>(
        x: Read<'_>,
        taps: Read<'_>,
        bias: Option<Read<'_>>,
        convolution: Convolution,
    ) -> Result<CudaStorage> {
        let bias = bias.map(view::<f32>).transpose()?;
        let stream = x.0.device.cuda_stream();
        let out = kernels::convolution(&stream, &view::<T>(x)?, &view::<f32>(taps)?, bias.as_ref(), convolution).w()?;
        Ok(CudaStorage::wrap_cuda_slice(out, x.0.device.clone()))
    }
    reading(bias, |bias| in_dtype!(x.0, of(x, taps, bias, convolution)))
}

/// As [`crate::kernels::recurrence::Recurrence`].
pub(crate) fn recurrence(
    [query, key, value]: [Read<'_>; 3],
    left: &Tensor,
    strength: Option<&Tensor>,
    of: Recurrence,
) -> Result<CudaStorage> {
    if of.rows > MOST_ROWS {
        bail!("a state of {} rows, of which a GPU takes {MOST_ROWS}", of.rows);
    }
    let (left, left_layout) = left.storage_and_layout();
    let Storage::Cuda(left) = &*left else { bail!("a kernel on tensors of several devices") };
    let (queries, keys) = (view::<f32>(query)?, view::<f32>(key)?);
    let (values, left) = (view::<f32>(value)?, view::<f32>((left, left_layout))?);
    reading(strength, |strength| {
        let strength = strength.map(view::<f32>).transpose()?;
        let (stream, inputs) = (value.0.device.cuda_stream(), [&queries, &keys, &values, &left]);
        let out = recurrences::recurrence(&stream, inputs, strength.as_ref(), of).w()?;
        Ok(CudaStorage::wrap_cuda_slice(out, value.0.device.clone()))
    })
}

/// As [`crate::kernels::fused::gated`].
pub(crate) fn gated(gates: &mut CudaStorage, layout: &Layout, up: Read<'_>, how: Gate) -> Result<()> {
    fn of<T: CudaDType + Real>(gates: &mut CudaStorage, layout: &Layout, up: Read<'_>, how: Gate) -> Result<()> {
        let stream = gates.device.cuda_stream();
        kernels::gated(&stream, &mut view_mut::<T>(gates, layout)?, &view::<T>(up)?, width(layout), how).w()
    }
    in_dtype!(gates, of(gates, layout, up, how))
}

/// As [`crate::kernels::fused::gated_joined`].
pub(crate) fn gated_joined(joined: Read<'_>, inner: usize, interleaved: bool, how: Gate) -> Result<CudaStorage> {
    fn of<T: CudaDType + Real>(joined: Read<'_>, inner: usize, interleaved: bool, how: Gate) -> Result<CudaStorage> {
        let stream = joined.0.device.cuda_stream();
        let out = kernels::gated_joined(&stream, &view::<T>(joined)?, inner, interleaved, how).w()?;
        Ok(CudaStorage::wrap_cuda_slice(out, joined.0.device.clone()))
    }
    in_dtype!(joined.0, of(joined, inner, interleaved, how))
}

/// As [`crate::kernels::fused::activated`].
pub(crate) fn activate(x: &mut CudaStorage, layout: &Layout, kind: u32) -> Result<()> {
    fn of<T: CudaDType + Real>(x: &mut CudaStorage, layout: &Layout, kind: u32) -> Result<()> {
        let stream = x.device.cuda_stream();
        kernels::activate(&stream, &mut view_mut::<T>(x, layout)?, width(layout), kind).w()
    }
    in_dtype!(x, of(x, layout, kind))
}

/// As [`crate::kernels::fused::sum`].
pub(crate) fn sum(x: &mut CudaStorage, layout: &Layout, y: Read<'_>) -> Result<()> {
    fn of<T: CudaDType + Real>(x: &mut CudaStorage, layout: &Layout, y: Read<'_>) -> Result<()> {
        let stream = x.device.cuda_stream();
        kernels::sum(&stream, &mut view_mut::<T>(x, layout)?, &view::<T>(y)?, width(layout)).w()
    }
    in_dtype!(x, of(x, layout, y))
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
