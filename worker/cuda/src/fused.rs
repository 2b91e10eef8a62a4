//! Norms, rotary embeddings, attention softmax, convolutions, gates and sums on a GPU, each in one
//! kernel. Results are bit-identical to the worker's CPU loops.
//!
//! Values are row-major, contiguous and belong to the given stream.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, DriverError};
use half::{bf16, f16};

use crate::kernels::Argument::{Address, Float, Number};
use crate::kernels::{Argument, File, Grid, launch, number};

/// Threads per block.
const THREADS: usize = 256;
/// Threads per row in kernels that reduce rows.
const LANES: usize = 16;
/// Columns per block in elementwise kernels.
const COLUMNS: usize = 4 * THREADS;

/// A dtype that kernels read and write. They compute in f32.
pub trait Real: DeviceRepr {
    /// Its name in the kernels' names.
    const DTYPE: &'static str;
}

impl Real for f32 {
    const DTYPE: &'static str = "f32";
}

impl Real for bf16 {
    const DTYPE: &'static str = "bf16";
}

impl Real for f16 {
    const DTYPE: &'static str = "f16";
}

/// Launches a kernel that exists for each dtype, if there are values.
///
/// # Safety
/// As [`launch`].
unsafe fn run<T: Real>(stream: &CudaStream, name: &str, grid: Grid, arguments: &[Argument]) -> Result<(), DriverError> {
    if grid.blocks.contains(&0) {
        return Ok(());
    }
    // SAFETY: the caller's promise.
    unsafe { launch(stream, File::Fused, &format!("{name}_{}", T::DTYPE), grid, arguments) }
}

/// Launch of kernels that reduce rows.
fn by_row(rows: usize) -> Grid {
    Grid { blocks: [rows.div_ceil(THREADS / LANES), 1], threads: THREADS }
}

/// Launch of elementwise kernels.
fn by_value(rows: usize, columns: usize) -> Grid {
    Grid { blocks: [rows, columns.div_ceil(COLUMNS)], threads: THREADS }
}

/// Number of rows of `width` values.
fn rows(values: usize, width: usize) -> usize {
    assert!(width > 0 && values.is_multiple_of(width), "{values} values are not rows of {width}");
    values / width
}

/// `x / sqrt(mean(x^2) + eps) * gain`, and then `+ residual` if there is one, over rows as wide as
/// `gain`.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn rms_norm<T: Real>(
    stream: &Arc<CudaStream>,
    x: &CudaView<'_, T>,
    gain: &CudaView<'_, T>,
    residual: Option<&CudaView<'_, T>>,
    eps: f32,
) -> Result<CudaSlice<T>, DriverError> {
    let (width, rows) = (gain.len(), rows(x.len(), gain.len()));
    assert!(residual.is_none_or(|residual| residual.len() == x.len()), "a residual of another shape");
    // SAFETY: the kernel writes all of it.
    let mut out = unsafe { stream.alloc::<T>(x.len()) }?;
    let ((x, _x), (gain, _gain)) = (x.device_ptr(stream), gain.device_ptr(stream));
    let residual = residual.map(|residual| residual.device_ptr(stream));
    {
        let (to, _to) = out.device_ptr_mut(stream);
        let residual = Address(residual.as_ref().map_or(0, |(residual, _)| *residual));
        let arguments = [Address(x), Address(gain), residual, number(rows), number(width), Float(eps), Address(to)];
        // SAFETY: rows of the gain's width, as many read as written.
        unsafe { run::<T>(stream, "rms_norm", by_row(rows), &arguments) }?;
    }
    Ok(out)
}

/// `(x - mean) / sqrt(variance + eps) * gain + bias` over rows as wide as `gain`.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn layer_norm<T: Real>(
    stream: &Arc<CudaStream>,
    x: &CudaView<'_, T>,
    gain: &CudaView<'_, T>,
    bias: &CudaView<'_, T>,
    eps: f32,
) -> Result<CudaSlice<T>, DriverError> {
    let (width, rows) = (gain.len(), rows(x.len(), gain.len()));
    assert_eq!(bias.len(), width, "gain and bias");
    // SAFETY: the kernel writes all of it.
    let mut out = unsafe { stream.alloc::<T>(x.len()) }?;
    let ((x, _x), (gain, _gain), (bias, _bias)) =
        (x.device_ptr(stream), gain.device_ptr(stream), bias.device_ptr(stream));
    {
        let (to, _to) = out.device_ptr_mut(stream);
        let arguments =
            [Address(x), Address(gain), Address(bias), number(rows), number(width), Float(eps), Address(to)];
        // SAFETY: rows of the gain's width, as many read as written.
        unsafe { run::<T>(stream, "layer_norm", by_row(rows), &arguments) }?;
    }
    Ok(out)
}

/// Which part of a row is rotated, and by which angles.
#[derive(Clone, Copy, Debug)]
pub struct Rotation {
    /// Values of a row: whole heads.
    pub width: usize,
    /// Rows of a sequence.
    pub positions: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// First value of a head that is rotated.
    pub first: usize,
    /// Pairs of a head that are rotated.
    pub pairs: usize,
    /// Whether the two values of a pair are adjacent; otherwise they are `pairs` apart.
    pub interleaved: bool,
}

/// Rotates pairs of each head by the angles of their position. `table`: cosines of all positions
/// and pairs, then their sines.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn rope<T: Real>(
    stream: &CudaStream,
    x: &mut CudaViewMut<'_, T>,
    table: &CudaView<'_, f32>,
    of: Rotation,
) -> Result<(), DriverError> {
    let Rotation { width, positions, head_dim, first, pairs, interleaved } = of;
    let (rows, sines) = (rows(x.len(), width), table.len() / 2);
    assert!(head_dim > 0 && width.is_multiple_of(head_dim) && first + 2 * pairs <= head_dim, "{of:?}");
    assert!(positions > 0 && positions * pairs <= sines, "{of:?}: angles of {sines} pairs");
    let (step, distance) = if interleaved { (2, 1) } else { (1, pairs) };
    let ((table, _table), (x, _x)) = (table.device_ptr(stream), x.device_ptr_mut(stream));
    let numbers = [sines, width, positions, head_dim, first, pairs, step, distance].map(number);
    let arguments = [&[Address(x), Address(table)], &numbers[..]].concat();
    // SAFETY: pairs within heads, heads within rows, angles of all positions.
    unsafe { run::<T>(stream, "rope", by_value(rows, width / head_dim * pairs), &arguments) }
}

/// Shape, positions and mask of a block of attention scores.
#[derive(Clone, Copy, Debug)]
pub struct Scores {
    /// Columns.
    pub keys: usize,
    /// Rows per head: queries at consecutive positions.
    pub queries: usize,
    /// Position of the first query.
    pub first_query: usize,
    /// Position of the first key.
    pub first_key: usize,
    /// Sliding window: most keys that a query sees, up to its own position.
    pub window: usize,
    /// Chunked attention: keys per chunk. A query sees the keys of its own chunk only.
    pub chunk: Option<usize>,
    /// Factor of the scores.
    pub scale: f32,
    /// Head of the first rows, to index `sinks`.
    pub first_head: usize,
}

/// Softmax over the keys that each query sees, in place. `sinks`: one logit per head, unscaled,
/// without a value.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn softmax<T: Real>(
    stream: &CudaStream,
    x: &mut CudaViewMut<'_, T>,
    of: Scores,
    sinks: Option<&CudaView<'_, f32>>,
) -> Result<(), DriverError> {
    let rows = rows(x.len(), of.keys);
    assert!(of.queries > 0, "{of:?}");
    let heads = sinks.map_or(1, CudaView::len);
    let sinks = sinks.map(|sinks| sinks.device_ptr(stream));
    let (x, _x) = x.device_ptr_mut(stream);
    // A window larger than any position masks nothing.
    let limit = |keys: usize| Number(u32::try_from(keys.max(1)).unwrap_or(u32::MAX));
    let arguments = [
        Address(x),
        number(rows),
        number(of.keys),
        number(of.queries),
        number(of.first_query),
        number(of.first_key),
        limit(of.window),
        of.chunk.map_or(Number(0), limit),
        Float(of.scale),
        Address(sinks.as_ref().map_or(0, |(sinks, _)| *sinks)),
        number(of.first_head),
        number(heads),
    ];
    // SAFETY: rows of so many keys; a sink for each of the heads that are counted.
    unsafe { run::<T>(stream, "softmax", by_row(rows), &arguments) }
}

/// Per row of logits: the largest, the sum of `exp(logit - largest)`, and the logit at the
/// target's column, or 0 without such a column. The first column is the target `first`.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn logit_parts<T: Real>(
    stream: &Arc<CudaStream>,
    x: &CudaView<'_, T>,
    targets: &CudaView<'_, u32>,
    first: u32,
) -> Result<CudaSlice<f32>, DriverError> {
    let rows = targets.len();
    assert!(rows > 0 && x.len().is_multiple_of(rows), "{} logits of {rows} targets", x.len());
    // SAFETY: the kernel writes all of it.
    let mut parts = unsafe { stream.alloc::<f32>(3 * rows) }?;
    let ((at, _x), (targets, _targets)) = (x.device_ptr(stream), targets.device_ptr(stream));
    {
        let (to, _to) = parts.device_ptr_mut(stream);
        let numbers = [Number(first), number(rows), number(x.len() / rows)];
        let arguments = [&[Address(at), Address(targets)], &numbers[..], &[Address(to)]].concat();
        // SAFETY: a target for each row, three numbers written for each.
        unsafe { run::<T>(stream, "logit_parts", by_row(rows), &arguments) }?;
    }
    Ok(parts)
}

/// Shape and layout of a causal depthwise convolution.
#[derive(Clone, Copy, Debug)]
pub struct Convolution {
    /// Heads of a token.
    pub heads: usize,
    /// Tokens of a sequence.
    pub positions: usize,
    /// Channels of a head.
    pub width: usize,
    /// Taps of a channel.
    pub kernel: usize,
    /// Channel of the taps for the first head's first channel.
    pub first_channel: usize,
    /// Length to which each head's vector is scaled after the convolution, if any.
    pub length: Option<f32>,
}

/// Convolves `x` `[sequences * positions, heads * width]` with `taps` `[channels, kernel]`, adds
/// `bias` `[channels]` and applies SiLU, to `[sequences * heads, positions, width]`.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn convolution<T: Real>(
    stream: &Arc<CudaStream>,
    x: &CudaView<'_, T>,
    taps: &CudaView<'_, f32>,
    bias: Option<&CudaView<'_, f32>>,
    of: Convolution,
) -> Result<CudaSlice<f32>, DriverError> {
    let Convolution { heads, positions, width, kernel, first_channel, length } = of;
    let rows = rows(x.len(), positions * heads * width) * positions * heads;
    let channels = first_channel + heads * width;
    assert!(channels * kernel <= taps.len(), "{of:?}: {} taps", taps.len());
    assert!(bias.is_none_or(|bias| channels <= bias.len()), "{of:?}: too few biases");
    // SAFETY: the kernel writes all of it.
    let mut out = unsafe { stream.alloc::<f32>(x.len()) }?;
    let ((x, _x), (taps, _taps)) = (x.device_ptr(stream), taps.device_ptr(stream));
    let bias = bias.map(|bias| bias.device_ptr(stream));
    {
        let (to, _to) = out.device_ptr_mut(stream);
        let bias = Address(bias.as_ref().map_or(0, |(bias, _)| *bias));
        let numbers = [rows, positions, heads, width, kernel, first_channel].map(number);
        let ends = [Float(length.unwrap_or(0.0)), Address(to)];
        let arguments = [&[Address(x), Address(taps), bias], &numbers[..], &ends[..]].concat();
        // SAFETY: whole sequences, taps of all channels, as many values written as read.
        unsafe { run::<T>(stream, "convolution", by_row(rows), &arguments) }?;
    }
    Ok(out)
}

/// Activation of a gate: formula, clamp and slope, with the kernel's numbers.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    /// 0 SiLU, 1 sigmoid, 2 tanh GELU, 3 clamped.
    pub kind: u32,
    /// Largest magnitude of the clamped activation.
    pub limit: f32,
    /// Slope in the sigmoid of the clamped activation.
    pub alpha: f32,
}

/// Replaces `up` by `activation(gates) * up`; both have rows of `width`.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn gated<T: Real>(
    stream: &CudaStream,
    gates: &mut CudaViewMut<'_, T>,
    up: &CudaView<'_, T>,
    width: usize,
    how: Gate,
) -> Result<(), DriverError> {
    let rows = rows(gates.len(), width);
    assert_eq!(gates.len(), up.len(), "gates and what they open for");
    let ((up, _up), (gates, _gates)) = (up.device_ptr(stream), gates.device_ptr_mut(stream));
    // SAFETY: as many of all three. The first and the last are in one place, where who writes a
    // value is who read it.
    unsafe { gate::<T>(stream, [gates, up, gates], [rows, width], [width, 1], how) }
}

/// As [`gated`], for gates and up values in one row `joined` `[rows, 2 * inner]`: in halves, or
/// interleaved.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn gated_joined<T: Real>(
    stream: &Arc<CudaStream>,
    joined: &CudaView<'_, T>,
    inner: usize,
    interleaved: bool,
    how: Gate,
) -> Result<CudaSlice<T>, DriverError> {
    let rows = rows(joined.len(), 2 * inner);
    // SAFETY: the kernel writes all of it.
    let mut out = unsafe { stream.alloc::<T>(rows * inner) }?;
    let (step, distance) = if interleaved { (2, 1) } else { (1, inner) };
    let (gates, _joined) = joined.device_ptr(stream);
    {
        let (to, _to) = out.device_ptr_mut(stream);
        let up = gates + (distance * size_of::<T>()) as u64;
        // SAFETY: both within each row of the one, whose half is a row of the other.
        unsafe { gate::<T>(stream, [gates, up, to], [rows, inner], [2 * inner, step], how) }?;
    }
    Ok(out)
}

/// `gates` and `up` are addresses of `rows` rows, `stride` values apart, with `width` columns,
/// `step` values apart. The output has room for `rows` times `width` values.
unsafe fn gate<T: Real>(
    stream: &CudaStream,
    addresses: [u64; 3],
    [rows, width]: [usize; 2],
    [stride, step]: [usize; 2],
    how: Gate,
) -> Result<(), DriverError> {
    let [gates, up, to] = addresses.map(Address);
    let (kind, limit, alpha) = (Number(how.kind), Float(how.limit), Float(how.alpha));
    let arguments = [gates, up, number(stride), number(step), number(width), kind, limit, alpha, to];
    // SAFETY: the caller's promise.
    unsafe { run::<T>(stream, "gate", by_value(rows, width), &arguments) }
}

/// Applies an activation in place to rows of `width`: 0 ReLU, 1 squared ReLU, 2 tanh GELU.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn activate<T: Real>(
    stream: &CudaStream,
    x: &mut CudaViewMut<'_, T>,
    width: usize,
    kind: u32,
) -> Result<(), DriverError> {
    let rows = rows(x.len(), width);
    let (x, _x) = x.device_ptr_mut(stream);
    // SAFETY: rows of the width.
    unsafe { run::<T>(stream, "activate", by_value(rows, width), &[Address(x), number(width), Number(kind)]) }
}

/// Adds `y` to `x` in place, in rows of `width`. `y` has the shape of `x`, or is one row for all
/// rows.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn sum<T: Real>(
    stream: &CudaStream,
    x: &mut CudaViewMut<'_, T>,
    y: &CudaView<'_, T>,
    width: usize,
) -> Result<(), DriverError> {
    let rows = rows(x.len(), width);
    assert!(y.len() == x.len() || y.len() == width, "{} values and {}", x.len(), y.len());
    let stride = if y.len() == x.len() { width } else { 0 };
    let ((y, _y), (x, _x)) = (y.device_ptr(stream), x.device_ptr_mut(stream));
    // SAFETY: rows of the width, as many of both or one.
    unsafe { run::<T>(stream, "sum", by_value(rows, width), &[Address(x), Address(y), number(width), number(stride)]) }
}
