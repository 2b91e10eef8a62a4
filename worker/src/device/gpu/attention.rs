//! Attention by one kernel, over the tensor library's tensors.

use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Result, Storage, Tensor, bail};
use half::bf16;
use outliers_cuda::attention::{self as kernels, Attention};

use super::FusedAttention;
use super::routing::{shown, tensor};
use crate::model::decoder::Window;

/// Whether there is a kernel for attention of queries and values like these.
pub fn attends(query: &Tensor, value: &Tensor) -> bool {
    let width = |t: &Tensor| t.dims().last().copied().unwrap_or_default();
    let widths = [width(query), width(value)];
    query.device().is_cuda() && query.dtype() == DType::BF16 && kernels::widths().any(|known| known == widths)
}

/// Attends, where [`attends`] says that there is a kernel: `query` `[sequences, n, heads, d]`,
/// `key` `[sequences * kv_heads, n, d]` and `value` `[sequences * kv_heads, n, v]`, both
/// contiguous, to `[sequences * n, heads * v]`. If they are wanted, also the largest share and that
/// of the first key, `[sequences * heads, n, 2]` in f32.
pub fn attend(
    by: FusedAttention<'_>,
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
) -> Result<(Tensor, Option<Tensor>)> {
    let (sequences, positions, heads, width) = query.dims4()?;
    let (all_kv_heads, _, value_width) = value.dims3()?;
    let query = in_rows(query)?;
    let device = query.device().as_cuda_device()?;
    let (window, chunk) = match by.window {
        Window::Full => (usize::MAX, None),
        Window::Sliding(keys) => (keys, None),
        Window::Chunked(keys) => (usize::MAX, Some(keys)),
    };
    let ((of_query, layout), (of_key, key_layout)) = (query.storage_and_layout(), key.storage_and_layout());
    let (of_value, value_layout) = value.storage_and_layout();
    let sinks = by.sinks.map(Tensor::storage_and_layout);
    let sinks = sinks.as_ref().map(|(storage, layout)| shown::<f32>(storage, layout)).transpose()?;
    let of = Attention {
        sequences,
        positions,
        heads,
        kv_heads: all_kv_heads / sequences,
        widths: [width, value_width],
        query_stride: layout.stride()[1],
        window,
        chunk,
        scale: by.scale as f32,
    };
    let Storage::Cuda(storage) = &*of_query else { bail!("attention by a kernel on tensors of several devices") };
    let (start, values) = (layout.start_offset(), (sequences * positions - 1) * of.query_stride + heads * width);
    let queries = storage.as_cuda_slice::<bf16>()?.slice(start..start + values);
    let (keys, values) = (shown::<bf16>(&of_key, key_layout)?, shown::<bf16>(&of_value, value_layout)?);
    let stream = device.cuda_stream();
    let (mixed, shares) = kernels::attend(&stream, [&queries, &keys, &values], of, sinks.as_ref(), by.recorded).w()?;
    let mixed = tensor(mixed, device, &[sequences * positions, heads * value_width]);
    Ok((mixed, shares.map(|shares| tensor(shares, device, &[sequences * heads, positions, 2]))))
}

/// Queries whose tokens are at equal distances, each with its heads one after another: as they are,
/// or a copy.
fn in_rows(query: &Tensor) -> Result<Tensor> {
    let (sequences, positions, heads, width) = query.dims4()?;
    let [of_sequence, of_token, of_head, of_value] = *query.stride() else { bail!("queries of four dimensions") };
    let is_in_rows = of_value == 1
        && (of_head == width || heads == 1)
        && (of_sequence == positions * of_token || sequences == 1)
        && of_token >= heads * width;
    if is_in_rows { Ok(query.clone()) } else { query.contiguous() }
}
