//! Fused elementwise operations: one pass over memory instead of several.
//!
//! Each operation has a loop for CPUs and a kernel for GPUs (`cuda/kernels/fused.cu`) with the
//! same order of arithmetic, so that results are bit-identical. Arithmetic is in f32. Results are
//! rounded to the tensors' dtype where the reference implementation rounds.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, D, Device, InplaceOp1, InplaceOp2, Layout, Result, Shape, Storage, Tensor, bail,
};
use half::{bf16, f16};
use outliers_scan::vectorize;
use rayon::prelude::*;

use crate::checkpoint::dtype::Compute;
#[cfg(feature = "cuda")]
use crate::device::gpu::fused as kernels;
use crate::model::decoder::Window;
use crate::model::rope::{Pairing, RopeTable};

static COMPOSED: AtomicBool = AtomicBool::new(false);

/// Disables what only CPUs do (rows of experts, chunks of DeltaNets and Mamba): this process then
/// uses the tensor library's operations and the recurrence by its definition, as on GPUs. Slower;
/// for comparison.
pub fn compose_all() {
    COMPOSED.store(true, Ordering::Relaxed);
}

/// Whether operations on `x` take the CPU's own form, where there is one.
pub(crate) fn has_loops(x: &Tensor) -> bool {
    has_loops_on(x.device())
}

/// Whether operations on this device take the CPU's own form, where there is one.
pub(crate) fn has_loops_on(device: &Device) -> bool {
    device.is_cpu() && !COMPOSED.load(Ordering::Relaxed)
}

/// A stored float type that is computed in f32.
pub(crate) trait Real: Copy + Send + Sync {
    fn wide(self) -> f32;
    fn narrow(value: f32) -> Self;
}

impl Real for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

/// Branch-free, so that loops vectorise.
impl Real for bf16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        // NaN is preserved.
        let quiet = (value.to_bits() >> 16) as u16 | 0x40;
        Self::from_bits(if value.is_nan() { quiet } else { <Self as Compute>::narrow(value) })
    }
}

impl Real for f16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// The slice of a storage that a layout covers.
pub(crate) fn part<'a, T>(data: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("fused operation on a non-contiguous tensor {:?}", layout.shape()),
    }
}

fn part_mut<'a, T>(data: &'a mut [T], layout: &Layout) -> Result<&'a mut [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&mut data[start..end]),
        None => bail!("fused operation on a non-contiguous tensor {:?}", layout.shape()),
    }
}

/// Evaluates an expression over the values of storages of one float dtype. After `made` it gives
/// values, which are put into a storage of the same dtype.
macro_rules! floats {
    (made $name:expr, |$($x:ident),+| $run:expr) => {
        match ($($x,)+) {
            ($(CpuStorage::F32($x),)+) => CpuStorage::F32($run),
            ($(CpuStorage::BF16($x),)+) => CpuStorage::BF16($run),
            ($(CpuStorage::F16($x),)+) => CpuStorage::F16($run),
            _ => bail!("{}: not floats of one dtype", $name),
        }
    };
    ($name:expr, |$($x:ident),+| $run:expr) => {
        match ($($x,)+) {
            ($(CpuStorage::F32($x),)+) => $run,
            ($(CpuStorage::BF16($x),)+) => $run,
            ($(CpuStorage::F16($x),)+) => $run,
            _ => bail!("{}: not floats of one dtype", $name),
        }
    };
}

/// An operation that overwrites its first argument with its result.
trait Overwrite {
    const NAME: &'static str;

    fn run<T: Real>(&self, x: &mut [T], y: &[T]);

    /// Runs the GPU kernel, if the operation has one.
    #[cfg(feature = "cuda")]
    fn launch(&self, _: &mut CudaStorage, _: &Layout, _: kernels::Read<'_>) -> Result<()> {
        bail!("{}: there is no kernel", Self::NAME)
    }
}

/// Applies the operation to tensors of any float dtype.
struct InPlace<O>(O);

impl<O: Overwrite> InplaceOp2 for InPlace<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        floats!(O::NAME, |s1, s2| self.0.run(part_mut(s1, l1)?, part(s2, l2)?));
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &mut CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<()> {
        self.0.launch(s1, l1, (s2, l2))
    }
}

/// Passes an optional CPU tensor's storage to `see`, beside the storages of an operation.
pub(crate) fn reading<R>(
    tensor: Option<&Tensor>,
    see: impl FnOnce(Option<(&CpuStorage, &Layout)>) -> Result<R>,
) -> Result<R> {
    let Some(tensor) = tensor else { return see(None) };
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => see(Some((storage, layout))),
        _ => bail!("tensors of several devices"),
    }
}

/// Rows per parallel task: enough work to pay for the overhead.
fn rows_per_task(width: usize) -> usize {
    (16_384 / width.max(1)).max(1)
}

/// Sums in sixteen lanes: it vectorises, and its rounding error is a sixteenth of a running sum's.
#[inline(always)]
pub(crate) fn lane_sum<T: Copy>(x: &[T], term: impl Fn(T) -> f32) -> f32 {
    let mut lanes = [0f32; 16];
    let chunks = x.chunks_exact(16);
    let rest: f32 = chunks.remainder().iter().map(|&v| term(v)).sum();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane += term(v);
        }
    }
    lanes.iter().sum::<f32>() + rest
}

/// Maximum in sixteen lanes; minus infinity for no values. NaN is ignored.
#[inline(always)]
fn lane_max<T: Copy>(x: &[T], value: impl Fn(T) -> f32) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = x.chunks_exact(16);
    let rest = chunks.remainder().iter().fold(f32::NEG_INFINITY, |top, &v| larger(top, value(v)));
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, value(v));
        }
    }
    lanes.into_iter().fold(rest, larger)
}

/// e^x for x <= 0 to within 2 units in the last place, in a form that vectorises.
#[inline(always)]
fn exp_negative(x: f32) -> f32 {
    // Below -87 the true value is below the smallest normal f32, negligible in a softmax.
    let x = x.max(-87.0);
    const ROUND: f32 = 12_582_912.0;
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    y * f32::from_bits(((n as i32 + 127) << 23) as u32)
}

// ----------------------------------------------------------------------------------------- RMSNorm

struct RmsNorm<'a> {
    eps: f32,
    residual: Option<&'a Tensor>,
}

impl RmsNorm<'_> {
    fn run<T: Real>(&self, x: &[T], gain: &[T], residual: Option<&[T]>) -> Result<Vec<T>> {
        let width = gain.len();
        if residual.is_some_and(|residual| residual.len() != x.len()) {
            bail!("rms-norm: a residual of another shape");
        }
        let mut out = vec![T::narrow(0.0); x.len()];
        out.par_chunks_mut(width).zip(x.par_chunks(width)).with_min_len(rows_per_task(width)).enumerate().for_each(
            |(row, (out, x))| {
                vectorize!({
                    self.row(out, x, gain);
                    if let Some(residual) = residual {
                        add(out, &residual[row * width..][..width]);
                    }
                });
            },
        );
        Ok(out)
    }

    #[inline(always)]
    fn row<T: Real>(&self, out: &mut [T], x: &[T], gain: &[T]) {
        let mean = lane_sum(x, |v| v.wide() * v.wide()) / gain.len() as f32;
        let scale = 1.0 / (mean + self.eps).sqrt();
        for ((o, v), g) in out.iter_mut().zip(x).zip(gain) {
            *o = T::narrow(T::narrow(v.wide() * scale).wide() * g.wide());
        }
    }
}

impl CustomOp2 for RmsNorm<'_> {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = reading(self.residual, |residual| {
            Ok(floats!(made self.name(), |s1, s2| {
                let residual = residual.map(|(r, l3)| part(r.as_slice()?, l3)).transpose()?;
                self.run(part(s1, l1)?, part(s2, l2)?, residual)?
            }))
        })?;
        Ok((out, l1.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((kernels::rms_norm((s1, l1), (s2, l2), self.residual, self.eps)?, l1.shape().clone()))
    }
}

/// `x / sqrt(mean(x^2) + eps) * gain` over the last dimension. `x` `[.., width]` contiguous,
/// `gain` `[width]`.
pub fn rms_norm(x: &Tensor, gain: &Tensor, eps: f64) -> Result<Tensor> {
    x.apply_op2_no_bwd(gain, &RmsNorm { eps: eps as f32, residual: None })
}

/// As [`rms_norm`], then `+ residual` `[.., width]`, contiguous, as by [`sum`].
pub fn rms_norm_onto(residual: &Tensor, x: &Tensor, gain: &Tensor, eps: f64) -> Result<Tensor> {
    x.apply_op2_no_bwd(gain, &RmsNorm { eps: eps as f32, residual: Some(residual) })
}

// --------------------------------------------------------------------------------------- LayerNorm

struct LayerNorm<'a> {
    eps: f32,
    bias: &'a Tensor,
}

impl LayerNorm<'_> {
    fn run<T: Real>(&self, x: &[T], gain: &[T], bias: &[T]) -> Vec<T> {
        let width = gain.len();
        let mut out = vec![T::narrow(0.0); x.len()];
        out.par_chunks_mut(width).zip(x.par_chunks(width)).with_min_len(rows_per_task(width)).for_each(|(out, x)| {
            vectorize!(self.row(out, x, gain, bias));
        });
        out
    }

    #[inline(always)]
    fn row<T: Real>(&self, out: &mut [T], x: &[T], gain: &[T], bias: &[T]) {
        let width = gain.len() as f32;
        let mean = lane_sum(x, |v| v.wide()) / width;
        let variance = lane_sum(x, |v| (v.wide() - mean) * (v.wide() - mean)) / width;
        let scale = 1.0 / (variance + self.eps).sqrt();
        for (((o, v), g), b) in out.iter_mut().zip(x).zip(gain).zip(bias) {
            *o = T::narrow((v.wide() - mean) * scale * g.wide() + b.wide());
        }
    }
}

impl CustomOp2 for LayerNorm<'_> {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = reading(Some(self.bias), |bias| {
            let (bias, l3) = bias.expect("given");
            Ok(floats!(made self.name(), |s1, s2, bias| self.run(part(s1, l1)?, part(s2, l2)?, part(bias, l3)?)))
        })?;
        Ok((out, l1.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((kernels::layer_norm((s1, l1), (s2, l2), self.bias, self.eps)?, l1.shape().clone()))
    }
}

/// `(x - mean) / sqrt(variance + eps) * gain + bias` over the last dimension. `x` `[.., width]`
/// contiguous, `gain` and `bias` `[width]`.
pub fn layer_norm(x: &Tensor, gain: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    x.apply_op2_no_bwd(gain, &LayerNorm { eps: eps as f32, bias })
}

// -------------------------------------------------------------------------------------------- rope

/// Position of the rotated dimensions in a head. A [`RopeTable`] states their number.
#[derive(Clone, Copy, Debug)]
pub struct RotatedPart {
    /// Width of a head.
    pub head_dim: usize,
    /// The first dimension that rotates.
    pub first: usize,
}

struct Rope<'a> {
    table: &'a RopeTable,
    part: RotatedPart,
    width: usize,
    positions: usize,
}

impl Rope<'_> {
    fn run<T: Real>(&self, x: &mut [T], angles: &[f32]) {
        let pairs = self.table.pairs;
        let rotated = self.part.first..self.part.first + 2 * pairs;
        let (cos, sin) = angles.split_at(angles.len() / 2);
        x.par_chunks_mut(self.width).with_min_len(rows_per_task(self.width)).enumerate().for_each(|(row, x)| {
            let at = (row % self.positions) * pairs;
            let (cos, sin) = (&cos[at..at + pairs], &sin[at..at + pairs]);
            vectorize!({
                for head in x.chunks_exact_mut(self.part.head_dim) {
                    rotate_pairs(&mut head[rotated.clone()], self.table.pairing, cos, sin);
                }
            });
        });
    }
}

#[inline(always)]
fn rotate_pairs<T: Real>(x: &mut [T], pairing: Pairing, cos: &[f32], sin: &[f32]) {
    match pairing {
        Pairing::Halves => {
            let (low, high) = x.split_at_mut(cos.len());
            for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                (*a, *b) = rotate(*a, *b, *c, *s);
            }
        }
        Pairing::Interleaved => {
            for ((pair, c), s) in x.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                *pair = rotate(pair[0], pair[1], *c, *s).into();
            }
        }
    }
}

#[inline(always)]
fn rotate<T: Real>(a: T, b: T, cos: f32, sin: f32) -> (T, T) {
    let (a, b) = (a.wide(), b.wide());
    (T::narrow(a * cos - b * sin), T::narrow(b * cos + a * sin))
}

impl InplaceOp2 for Rope<'_> {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        let CpuStorage::F32(angles) = s2 else { bail!("rope: angles are not f32") };
        let angles = part(angles, l2)?;
        floats!(self.name(), |s1| self.run(part_mut(s1, l1)?, angles));
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &mut CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<()> {
        let rotation = kernels::Rotation {
            width: self.width,
            positions: self.positions,
            head_dim: self.part.head_dim,
            first: self.part.first,
            pairs: self.table.pairs,
            interleaved: self.table.pairing == Pairing::Interleaved,
        };
        kernels::rope(s1, l1, (s2, l2), rotation)
    }
}

/// Rotates a part of every head by its position. `x` `[sequences * positions, heads * head_dim]`,
/// freshly computed (its storage is overwritten); the table, on the same device, covers
/// `positions`.
pub fn rope(x: Tensor, table: &RopeTable, part: RotatedPart, positions: usize) -> Result<Tensor> {
    let x = x.contiguous()?;
    let width = x.dim(D::Minus1)?;
    x.inplace_op2(&table.angles, &Rope { table, part, width, positions })?;
    Ok(x)
}

// ---------------------------------------------------------------------------------- causal softmax

/// Queries and keys of a block of scores.
#[derive(Clone, Copy, Debug)]
pub struct ScoreBlock {
    /// Position of the first query.
    pub first_query: usize,
    /// Number of queries, at consecutive positions.
    pub queries: usize,
    /// Position of the first key.
    pub first_key: usize,
    /// Which keys up to its position a query sees.
    pub window: Window,
}

impl ScoreBlock {
    /// Columns of the keys that a query sees.
    fn seen(&self, query: usize, keys: usize) -> Range<usize> {
        let position = self.first_query + query;
        let column = |key: usize| key.saturating_sub(self.first_key).min(keys);
        column(self.window.first_key(position))..column(position + 1)
    }
}

/// One logit per head that enters the maximum and the denominator unscaled and has no value.
#[derive(Clone, Copy, Debug)]
pub struct SinkLogits<'a> {
    /// `[heads]` in f32, on the device of the scores.
    pub logits: &'a Tensor,
    /// Head of the first row. The last head is followed by the first head of the next sequence.
    pub first_head: usize,
}

struct CausalSoftmax<'a> {
    block: ScoreBlock,
    keys: usize,
    scale: f32,
    sinks: Option<SinkLogits<'a>>,
}

impl CausalSoftmax<'_> {
    fn sinks(&self) -> Option<&Tensor> {
        self.sinks.map(|sinks| sinks.logits)
    }

    fn run<T: Real>(&self, scores: &mut [T], sinks: Option<&[f32]>) {
        let first_head = self.sinks.map_or(0, |sinks| sinks.first_head);
        scores.par_chunks_mut(self.keys).with_min_len(rows_per_task(self.keys)).enumerate().for_each(
            |(row, scores)| {
                let (head, query) = (row / self.block.queries, row % self.block.queries);
                let range = self.block.seen(query, self.keys);
                let sink = sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[(first_head + head) % sinks.len()]);
                let (seen, after) = scores.split_at_mut(range.end);
                let (before, seen) = seen.split_at_mut(range.start);
                vectorize!(softmax(seen, self.scale, sink));
                before.fill(T::narrow(0.0));
                after.fill(T::narrow(0.0));
            },
        );
    }
}

/// Softmax of `scores * scale`. `sink` is an additional logit that takes part in the denominator
/// only.
#[inline(always)]
fn softmax<T: Real>(scores: &mut [T], scale: f32, sink: f32) {
    let top = (lane_max(scores, |v| v.wide()) * scale).max(sink);
    let mut row = vec![0f32; scores.len()];
    for (out, v) in row.iter_mut().zip(&*scores) {
        *out = exp_negative(v.wide() * scale - top);
    }
    let of_sink = if sink == f32::NEG_INFINITY { 0.0 } else { exp_negative(sink - top) };
    let inverse = 1.0 / (lane_sum(&row, |v| v) + of_sink);
    row.iter_mut().for_each(|v| *v *= inverse);
    for (out, v) in scores.iter_mut().zip(&row) {
        *out = T::narrow(*v);
    }
}

impl InplaceOp1 for CausalSoftmax<'_> {
    fn name(&self) -> &'static str {
        "causal-softmax"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        reading(self.sinks(), |sinks| {
            let sinks = match sinks {
                None => None,
                Some((CpuStorage::F32(sinks), layout)) => Some(part(sinks, layout)?),
                Some(_) => bail!("causal-softmax: sinks are not f32"),
            };
            floats!(self.name(), |storage| self.run(part_mut(storage, layout)?, sinks));
            Ok(())
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let ScoreBlock { first_query, queries, first_key, window } = self.block;
        let (window, chunk) = match window {
            Window::Full => (usize::MAX, None),
            Window::Sliding(keys) => (keys, None),
            Window::Chunked(keys) => (usize::MAX, Some(keys)),
        };
        let first_head = self.sinks.map_or(0, |sinks| sinks.first_head);
        let (keys, scale) = (self.keys, self.scale);
        let scores = kernels::Scores { keys, queries, first_query, first_key, window, chunk, scale, first_head };
        kernels::softmax(storage, layout, scores, self.sinks())
    }
}

/// Softmax of `scores * scale` over the keys that a query sees. `scores` `[.., keys]` is freshly
/// computed (its storage is overwritten): rows of the block's queries, head by head.
pub fn causal_softmax(scores: Tensor, block: ScoreBlock, scale: f64, sinks: Option<SinkLogits<'_>>) -> Result<Tensor> {
    let keys = scores.dim(D::Minus1)?;
    scores.inplace_op1(&CausalSoftmax { block, keys, scale: scale as f32, sinks })?;
    Ok(scores)
}

// -------------------------------------------------------------------------------------------------
// logits

/// The largest value and the sum of `exp(value - largest)`, the parts of a log-sum-exp.
fn exp_sum<T: Real>(values: &[T]) -> (f32, f32) {
    vectorize!({
        let top = lane_max(values, |v| v.wide());
        (top, lane_sum(values, |v| exp_negative(v.wide() - top)))
    })
}

struct LogitParts {
    /// Target of the first column.
    first: u32,
}

impl LogitParts {
    /// Number of rows.
    fn rows(logits: &Layout, targets: &Layout) -> Result<usize> {
        match (logits.dims(), targets.dims()) {
            ([rows, _], [targets]) if rows == targets => Ok(*rows),
            (logits, targets) => bail!("logit-parts: logits {logits:?} and targets {targets:?}"),
        }
    }

    fn run<T: Real>(&self, logits: &[T], targets: &[u32]) -> Vec<f32> {
        let mut parts = vec![0f32; 3 * targets.len()];
        let width = logits.len() / targets.len().max(1);
        let rows = parts.par_chunks_exact_mut(3).zip(logits.par_chunks_exact(width.max(1))).zip(targets);
        rows.for_each(|((parts, logits), target)| {
            let (top, sum) = exp_sum(logits);
            // Targets before the first column wrap around to beyond the last.
            let at_target = logits.get(target.wrapping_sub(self.first) as usize).map_or(0.0, |logit| logit.wide());
            parts.copy_from_slice(&[top, sum, at_target]);
        });
        parts
    }
}

impl CustomOp2 for LogitParts {
    fn name(&self) -> &'static str {
        "logit-parts"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let rows = Self::rows(l1, l2)?;
        let CpuStorage::U32(targets) = s2 else { bail!("logit-parts: targets are no u32") };
        let targets = part(targets, l2)?;
        let parts = floats!(self.name(), |s1| self.run(part(s1, l1)?, targets));
        Ok((CpuStorage::F32(parts), Shape::from((rows, 3))))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        let rows = Self::rows(l1, l2)?;
        Ok((kernels::logit_parts((s1, l1), (s2, l2), self.first)?, Shape::from((rows, 3))))
    }
}

/// Parts of the log-likelihood of each row's target over a block of logits `[rows, block]`:
/// `[rows, 3]` in f32 on the same device. The columns are the largest logit, the sum of `exp(logit
/// - largest)`, and the target's logit, which is 0 if the target is outside the block. `targets`
/// `[rows]` in u32; the first column is that of the target `first`.
pub fn logit_parts(logits: &Tensor, targets: &Tensor, first: u32) -> Result<Tensor> {
    logits.contiguous()?.apply_op2_no_bwd(targets, &LogitParts { first })
}

// ------------------------------------------------------------------------------------------- gates

/// How a gate is applied to `up`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate {
    /// `silu(gate) * up`.
    Silu,
    /// `sigmoid(gate) * up` (Qwen3-Next's attention).
    Sigmoid,
    /// `gelu(gate) * up`, GELU in its tanh form (Gemma).
    GeluTanh,
    /// `(clamp(up, -limit, limit) + 1) * g * sigmoid(alpha * g)` with `g = min(gate, limit)`
    /// (gpt-oss).
    Clamped {
        /// Limit of the magnitude.
        limit: f32,
        /// Slope inside the sigmoid.
        alpha: f32,
    },
}

/// `1 / (1 + exp(-x))`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    // Computed from -|x|, which never overflows and has one form for both signs.
    let e = exp_negative(-x.abs());
    (if x >= 0.0 { 1.0 } else { e }) / (1.0 + e)
}

/// GELU in its tanh form: `x * sigmoid(2 y)` with `y = sqrt(2 / pi) * (x + 0.044715 x^3)`.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const TWICE: f32 = 2.0 * 0.797_884_6;
    x * sigmoid(TWICE * (x + 0.044_715 * x * x * x))
}

/// The minimum of both; NaN is preserved.
#[inline(always)]
fn at_most(x: f32, limit: f32) -> f32 {
    if x > limit { limit } else { x }
}

impl Gate {
    /// The kernel's code for the gate.
    #[cfg(feature = "cuda")]
    fn told(self) -> kernels::Gate {
        let (kind, limit, alpha) = match self {
            Self::Silu => (0, 0.0, 0.0),
            Self::Sigmoid => (1, 0.0, 0.0),
            Self::GeluTanh => (2, 0.0, 0.0),
            Self::Clamped { limit, alpha } => (3, limit, alpha),
        };
        kernels::Gate { kind, limit, alpha }
    }

    /// Overwrites the gate with its product with `up`. Each kind has its own loop, since a loop
    /// with a choice inside does not vectorise.
    #[inline(always)]
    fn open<T: Real>(self, gate: &mut [T], up: &[T]) {
        match self {
            Self::Silu => replace_each(gate, up, |g, u| T::narrow(T::narrow(g * sigmoid(g)).wide() * u)),
            Self::Sigmoid => replace_each(gate, up, |g, u| T::narrow(T::narrow(sigmoid(g)).wide() * u)),
            Self::GeluTanh => replace_each(gate, up, |g, u| T::narrow(T::narrow(gelu_tanh(g)).wide() * u)),
            Self::Clamped { limit, alpha } => replace_each(gate, up, |g, u| {
                let (g, u) = (at_most(g, limit), -at_most(-at_most(u, limit), limit));
                T::narrow((u + 1.0) * (g * sigmoid(alpha * g)))
            }),
        }
    }
}

#[inline(always)]
fn replace_each<T: Real>(gate: &mut [T], up: &[T], through: impl Fn(f32, f32) -> T) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = through(g.wide(), u.wide());
    }
}

/// Values per task of the elementwise operations.
const ELEMENTS: usize = 16_384;

struct Gated(Gate);

impl Overwrite for Gated {
    const NAME: &'static str = "gated";

    fn run<T: Real>(&self, gate: &mut [T], up: &[T]) {
        gate.par_chunks_mut(ELEMENTS)
            .zip(up.par_chunks(ELEMENTS))
            .for_each(|(gate, up)| vectorize!(self.0.open(gate, up)));
    }

    #[cfg(feature = "cuda")]
    fn launch(&self, x: &mut CudaStorage, layout: &Layout, y: kernels::Read<'_>) -> Result<()> {
        kernels::gated(x, layout, y, self.0.told())
    }
}

/// Applies `gate` to `up`, elementwise. `gate` is freshly computed: its storage is overwritten.
pub fn gated(gate: Tensor, up: &Tensor, how: Gate) -> Result<Tensor> {
    let gate = gate.contiguous()?;
    gate.inplace_op2(up, &InPlace(Gated(how)))?;
    Ok(gate)
}

struct GatedJoined {
    how: Gate,
    interleaved: bool,
    inner: usize,
}

impl GatedJoined {
    fn shape(&self, joined: &Layout) -> Shape {
        Shape::from((joined.shape().elem_count() / (2 * self.inner), self.inner))
    }

    fn run<T: Real>(&self, joined: &[T]) -> Vec<T> {
        let inner = self.inner;
        let mut out = vec![T::narrow(0.0); joined.len() / 2];
        let rows = out.par_chunks_mut(inner).zip(joined.par_chunks(2 * inner)).with_min_len(rows_per_task(2 * inner));
        rows.for_each(|(out, row)| {
            vectorize!({
                if self.interleaved {
                    self.open_pairs(out, row);
                } else {
                    let (gate, up) = row.split_at(inner);
                    out.copy_from_slice(gate);
                    self.how.open(out, up);
                }
            });
        });
        out
    }

    /// Gates interleaved values with their neighbours. They are separated first, since arithmetic
    /// on every other value does not vectorise.
    #[inline(always)]
    fn open_pairs<T: Real>(&self, out: &mut [T], pairs: &[T]) {
        const SOME: usize = 64;
        for (out, pairs) in out.chunks_mut(SOME).zip(pairs.chunks(2 * SOME)) {
            let mut up = [T::narrow(0.0); SOME];
            for ((g, u), pair) in out.iter_mut().zip(&mut up).zip(pairs.as_chunks::<2>().0) {
                [*g, *u] = *pair;
            }
            self.how.open(out, &up);
        }
    }
}

impl CustomOp1 for GatedJoined {
    fn name(&self) -> &'static str {
        "gated-joined"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((floats!(made self.name(), |s1| self.run(part(s1, l1)?)), self.shape(l1)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout) -> Result<(CudaStorage, Shape)> {
        let out = kernels::gated_joined((s1, l1), self.inner, self.interleaved, self.how.told())?;
        Ok((out, self.shape(l1)))
    }
}

/// As [`gated`] where gate and up come from one product: `joined` `[rows, 2 * inner]`, in halves
/// or interleaved (even columns gate).
pub fn gated_joined(joined: &Tensor, interleaved: bool, how: Gate) -> Result<Tensor> {
    let inner = joined.dim(D::Minus1)? / 2;
    joined.apply_op1_no_bwd(&GatedJoined { how, interleaved, inner })
}

// ------------------------------------------------------------------------------------- activations

/// The activation at the inner width of a feed-forward without a gate. NaN is preserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)^2` (Nemotron-H).
    ReluSquared,
    /// `gelu(x)` in its tanh form.
    GeluTanh,
}

impl Activation {
    /// Each kind has its own loop.
    #[inline(always)]
    fn run<T: Real>(self, x: &mut [T]) {
        match self {
            Self::Relu => change_each(x, positive),
            Self::ReluSquared => change_each(x, |v| positive(v) * positive(v)),
            Self::GeluTanh => change_each(x, gelu_tanh),
        }
    }

    fn run_all<T: Real>(self, x: &mut [T]) {
        x.par_chunks_mut(ELEMENTS).for_each(|x| {
            vectorize!(self.run(x));
        });
    }
}

#[inline(always)]
fn positive(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

#[inline(always)]
fn change_each<T: Real>(x: &mut [T], change: impl Fn(f32) -> f32) {
    for v in x {
        *v = T::narrow(change(v.wide()));
    }
}

impl InplaceOp1 for Activation {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        floats!(self.name(), |storage| self.run_all(part_mut(storage, layout)?));
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let kind = match self {
            Self::Relu => 0,
            Self::ReluSquared => 1,
            Self::GeluTanh => 2,
        };
        kernels::activate(storage, layout, kind)
    }
}

/// Applies an activation to `x`, elementwise. `x` is freshly computed: its storage is overwritten.
pub fn activated(x: Tensor, how: Activation) -> Result<Tensor> {
    let x = x.contiguous()?;
    x.inplace_op1(&how)?;
    Ok(x)
}

// --------------------------------------------------------------------------------------------- sum

struct Sum;

impl Overwrite for Sum {
    const NAME: &'static str = "sum";

    fn run<T: Real>(&self, x: &mut [T], y: &[T]) {
        let add = |x: &mut [T], y: &[T]| {
            vectorize!(add(x, y));
        };
        if x.len() == y.len() {
            x.par_chunks_mut(ELEMENTS).zip(y.par_chunks(ELEMENTS)).for_each(|(x, y)| add(x, y));
        } else {
            let rows = x.par_chunks_exact_mut(y.len().max(1)).with_min_len(rows_per_task(y.len()));
            rows.for_each(|row| add(row, y));
        }
    }

    #[cfg(feature = "cuda")]
    fn launch(&self, x: &mut CudaStorage, layout: &Layout, y: kernels::Read<'_>) -> Result<()> {
        kernels::sum(x, layout, y)
    }
}

#[inline(always)]
fn add<T: Real>(x: &mut [T], y: &[T]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x = T::narrow(x.wide() + y.wide());
    }
}

/// `x + y`. `x` `[.., width]` is freshly computed (its storage is overwritten); `y` has the same
/// shape or `[width]`.
pub fn sum(x: Tensor, y: &Tensor) -> Result<Tensor> {
    if x.dims() != y.dims() && x.dims().last() != Some(&y.elem_count()) {
        bail!("sum: {:?} and {:?} are neither alike nor rows and one of them", x.shape(), y.shape());
    }
    let x = x.contiguous()?;
    x.inplace_op2(&y.contiguous()?, &InPlace(Sum))?;
    Ok(x)
}

// ------------------------------------------------------------------------------------- scatter-add

struct ScatterAdd<'a> {
    rows: &'a [u32],
    weights: &'a [f32],
    width: usize,
}

impl Overwrite for ScatterAdd<'_> {
    const NAME: &'static str = "scatter-add";

    fn run<T: Real>(&self, out: &mut [T], values: &[T]) {
        // The rows of an expert are distinct and few. Memory is the limit, not the core.
        for ((row, weight), value) in self.rows.iter().zip(self.weights).zip(values.chunks_exact(self.width)) {
            let weight = T::narrow(*weight).wide();
            let at = *row as usize * self.width;
            let out = &mut out[at..at + self.width];
            vectorize!({
                for (o, v) in out.iter_mut().zip(value) {
                    *o = T::narrow(o.wide() + T::narrow(v.wide() * weight).wide());
                }
            });
        }
    }
}

/// `out[rows[i]] += weights[i] * values[i]`, on a CPU. `out` `[n, width]` (its storage is
/// overwritten), `values` `[rows, width]`; `rows` distinct.
pub fn scatter_add(out: Tensor, values: &Tensor, rows: &[u32], weights: &[f32]) -> Result<Tensor> {
    let width = out.dim(D::Minus1)?;
    out.inplace_op2(values, &InPlace(ScatterAdd { rows, weights, width }))?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::model::rope::{Pairing, RopeScaling, RopeSpec};

    fn values(shape: &[usize], seed: u64) -> Tensor {
        let n: usize = shape.iter().product();
        let mut state = seed;
        let data: Vec<f32> = (0..n)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 8.0
            })
            .collect();
        Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
    }

    fn close(a: &Tensor, b: &Tensor, tolerance: f32) {
        let worst = (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
        assert!(worst <= tolerance, "differ by {worst}");
    }

    /// Rows of a tensor in f64.
    fn rows(x: &Tensor) -> Vec<Vec<f64>> {
        x.flatten_to(D::Minus2).unwrap().to_dtype(DType::F64).unwrap().to_vec2().unwrap()
    }

    /// Compares every value with `want(row, column)`.
    fn assert_each(got: &Tensor, tolerance: f64, want: impl Fn(usize, usize) -> f64) {
        for (r, row) in rows(got).iter().enumerate() {
            for (c, value) in row.iter().enumerate() {
                let want = want(r, c);
                assert!((value - want).abs() <= tolerance, "row {r}, column {c}: {value}, not {want}");
            }
        }
    }

    fn bits(x: &Tensor) -> Vec<u32> {
        let x = x.flatten_all().unwrap().to_dtype(DType::F32).unwrap();
        x.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn exponential_is_accurate_to_f32() {
        for i in 0..200_000 {
            let x = -(i as f32) * 4.3e-4;
            let (got, want) = (f64::from(exp_negative(x)), f64::from(x).exp());
            assert!((got / want - 1.0).abs() < 2.5e-7, "exp({x}) = {got}, want {want}");
        }
        assert_eq!(exp_negative(0.0), 1.0);
        assert!(exp_negative(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn f16_rounding_equals_the_common_rounding() {
        for upper in 0..=u16::MAX {
            let value = bf16::from_bits(upper);
            assert_eq!(value.wide().is_nan(), value.is_nan());
            assert!(value.is_nan() || value.wide() == value.to_f32());
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(upper) << 16 | lower);
                assert_eq!(<bf16 as Real>::narrow(value).to_bits(), bf16::from_f32(value).to_bits(), "{value:e}");
            }
        }
    }

    fn sigmoid_of(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    fn gelu_of(x: f64) -> f64 {
        0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
    }

    #[test]
    fn norms_equal_the_definition() {
        for width in [1, 7, 40] {
            let (x, gain, bias) = (values(&[12, width], 1), values(&[width], 2), values(&[width], 6));
            let (of_x, gains, biases) = (rows(&x), vector(&gain), vector(&bias));
            let mean = |row: usize| of_x[row].iter().sum::<f64>() / width as f64;
            let square =
                |row: usize, from: f64| of_x[row].iter().map(|v| (v - from).powi(2)).sum::<f64>() / width as f64 + 1e-5;
            let rms = |r: usize, c: usize| of_x[r][c] / square(r, 0.0).sqrt() * gains[c];
            assert_each(&rms_norm(&x, &gain, 1e-5).unwrap(), 5e-5, rms);
            let layer = |r: usize, c: usize| (of_x[r][c] - mean(r)) / square(r, mean(r)).sqrt() * gains[c] + biases[c];
            assert_each(&layer_norm(&x, &gain, &bias, 1e-5).unwrap(), 1e-4, layer);
        }
    }

    fn vector(x: &Tensor) -> Vec<f64> {
        rows(&x.unsqueeze(0).unwrap()).remove(0)
    }

    #[test]
    fn fused_residual_norm_equals_norm_then_sum() {
        for dtype in [DType::F32, DType::BF16] {
            let of = |shape: &[usize], seed| values(shape, seed).to_dtype(dtype).unwrap();
            let (x, gain, residual) = (of(&[9, 37], 1), of(&[37], 2), of(&[9, 37], 3));
            let together = rms_norm_onto(&residual, &x, &gain, 1e-5).unwrap();
            assert_eq!(bits(&together), bits(&sum(rms_norm(&x, &gain, 1e-5).unwrap(), &residual).unwrap()));
            assert!(rms_norm_onto(&residual.narrow(0, 0, 8).unwrap(), &x, &gain, 1e-5).is_err());
        }
    }

    #[test]
    fn gates_and_activations_equal_the_definition() {
        let (x, up) = (values(&[12, 40], 1), values(&[12, 40], 3));
        let (gates, ups) = (rows(&x), rows(&up));
        for how in [Gate::Silu, Gate::Sigmoid, Gate::GeluTanh, Gate::Clamped { limit: 2.5, alpha: 1.702 }] {
            let want = |r: usize, c: usize| {
                let (g, u) = (gates[r][c], ups[r][c]);
                match how {
                    Gate::Silu => g * sigmoid_of(g) * u,
                    Gate::Sigmoid => sigmoid_of(g) * u,
                    Gate::GeluTanh => gelu_of(g) * u,
                    Gate::Clamped { .. } => {
                        let (g, u) = (g.min(2.5), u.clamp(-2.5, 2.5));
                        (u + 1.0) * g * sigmoid_of(1.702 * g)
                    }
                }
            };
            assert_each(&gated(x.copy().unwrap(), &up, how).unwrap(), 2e-5, want);
            let halves = Tensor::cat(&[&x, &up], 1).unwrap();
            assert_each(&gated_joined(&halves, false, how).unwrap(), 2e-5, want);
            let pairs = Tensor::stack(&[&x, &up], 2).unwrap().reshape((12, 80)).unwrap();
            assert_each(&gated_joined(&pairs, true, how).unwrap(), 2e-5, want);
        }
        let activated = |how| activated(x.copy().unwrap(), how).unwrap();
        assert_each(&activated(Activation::Relu), 0.0, |r, c| gates[r][c].max(0.0));
        assert_each(&activated(Activation::ReluSquared), 1e-5, |r, c| gates[r][c].max(0.0).powi(2));
        assert_each(&activated(Activation::GeluTanh), 1e-5, |r, c| gelu_of(gates[r][c]));
    }

    #[test]
    fn activation_preserves_nan_and_rounds_once() {
        for how in [Activation::Relu, Activation::ReluSquared, Activation::GeluTanh] {
            let x = Tensor::new(&[f32::NAN, 1.5, -1.5], &Device::Cpu).unwrap();
            let wide = activated(x.copy().unwrap(), how).unwrap().to_vec1::<f32>().unwrap();
            assert!(wide[0].is_nan(), "{how:?}");
            let half = activated(x.to_dtype(DType::BF16).unwrap(), how).unwrap().to_vec1::<bf16>().unwrap();
            assert_eq!(half[1..], [bf16::from_f32(wide[1]), bf16::from_f32(wide[2])], "{how:?}");
        }
    }

    #[test]
    fn expert_rows_are_added_to_their_tokens() {
        let x = values(&[12, 40], 1);
        let (rows, weights) = ([7u32, 0, 11], [0.5f32, -2.0, 1.0]);
        let added = values(&[3, 40], 5);
        let factors = Tensor::from_slice(&weights, (3, 1), &Device::Cpu).unwrap();
        let index = Tensor::from_slice(&rows, 3, &Device::Cpu).unwrap();
        let composed = x.index_add(&index, &added.broadcast_mul(&factors).unwrap(), 0).unwrap();
        close(&scatter_add(x.copy().unwrap(), &added, &rows, &weights).unwrap(), &composed, 1e-6);
    }

    #[test]
    fn sums_of_rows_and_of_equal_shapes_equal_the_reference() {
        for dtype in [DType::F32, DType::BF16] {
            let of = |shape: &[usize], seed| values(shape, seed).to_dtype(dtype).unwrap();
            let x = of(&[7, 33], 1);
            for y in [of(&[7, 33], 2), of(&[33], 3)] {
                let wide = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
                let expected = wide(&x).broadcast_add(&wide(&y)).unwrap().to_dtype(dtype).unwrap();
                let got = sum(x.copy().unwrap(), &y).unwrap();
                assert_eq!((got.dtype(), got.dims()), (dtype, x.dims()));
                close(&wide(&got), &wide(&expected), 0.0);
            }
            assert!(sum(x, &of(&[7], 4)).is_err());
        }
    }

    #[test]
    fn clamped_gate_preserves_nan() {
        let opened = |gate: f32, up: f32| {
            let mut gate = [gate];
            Gate::Clamped { limit: 7.0, alpha: 1.702 }.open(&mut gate, &[up]);
            gate[0]
        };
        assert!(opened(f32::NAN, 1.0).is_nan() && opened(1.0, f32::NAN).is_nan());
        assert_eq!((opened(99.0, 99.0), opened(99.0, -99.0)), (opened(7.0, 7.0), opened(7.0, -7.0)));
    }

    #[test]
    fn rotations_equal_the_definition() {
        // Two sequences of six positions, five heads of eight.
        let x = values(&[12, 40], 1);
        let of_x = rows(&x);
        for pairing in [Pairing::Halves, Pairing::Interleaved] {
            for (dims, first) in [(8, 0), (4, 0), (4, 4), (2, 3), (6, 2)] {
                let spec = RopeSpec { theta: 100.0, dims, pairing, scaling: RopeScaling::None };
                let table = spec.table(6, &Device::Cpu).unwrap();
                let part = RotatedPart { head_dim: 8, first };
                let want = |r: usize, c: usize| {
                    let (head, d) = (c / 8 * 8, c % 8);
                    if !(first..first + dims).contains(&d) {
                        return of_x[r][c];
                    }
                    let (d, pairs) = (d - first, dims / 2);
                    let (pair, is_second, distance) = match pairing {
                        Pairing::Halves => (d % pairs, d >= pairs, pairs),
                        Pairing::Interleaved => (d / 2, d % 2 == 1, 1),
                    };
                    let angle = (r % 6) as f64 * 100f64.powf(-(pair as f64) / pairs as f64);
                    let at = head + first + if is_second { d - distance } else { d };
                    let (a, b) = (of_x[r][at], of_x[r][at + distance]);
                    if is_second { b * angle.cos() + a * angle.sin() } else { a * angle.cos() - b * angle.sin() }
                };
                assert_each(&rope(x.copy().unwrap(), &table, part, 6).unwrap(), 1e-5, want);
            }
        }
    }

    #[test]
    fn rotation_changes_only_its_pairs() {
        let x = Tensor::from_vec(vec![1f32, 2.0, 3.0, 4.0, 5.0, 6.0], (1, 6), &Device::Cpu).unwrap();
        let rotated = |pairing| {
            // A quarter turn of the first pair, a half turn of the second.
            let angles = Tensor::new(&[[[0f32, -1.0]], [[1.0, 0.0]]], &Device::Cpu).unwrap();
            let table = RopeTable { angles, pairs: 2, pairing };
            let part = RotatedPart { head_dim: 6, first: 1 };
            rope(x.copy().unwrap(), &table, part, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(rotated(Pairing::Halves), [1.0, -4.0, -3.0, 2.0, -5.0, 6.0]);
        assert_eq!(rotated(Pairing::Interleaved), [1.0, -3.0, 2.0, -4.0, -5.0, 6.0]);
    }

    #[test]
    fn softmax_equals_the_definition() {
        let logits = Tensor::new(&[0.5f32, -3.0, 20.0, 1.0, 0.0, -1.0], &Device::Cpu).unwrap();
        for window in [Window::Full, Window::Sliding(3), Window::Sliding(90), Window::Chunked(3), Window::Chunked(90)] {
            for first_head in [None, Some(0), Some(4)] {
                let block = ScoreBlock { first_query: 5, queries: 4, first_key: window.first_key(5), window };
                // Eight heads, of sequences that have six each.
                let scores = values(&[2, 4 * 4, 9 - block.first_key], 4);
                let of_scores = rows(&scores);
                let sees = |query: usize, key: usize| {
                    key <= query
                        && match window {
                            Window::Full => true,
                            Window::Sliding(keys) => query - key < keys,
                            Window::Chunked(keys) => query / keys == key / keys,
                        }
                };
                let sink = |row: usize| {
                    let of_head = |first: usize| vector(&logits)[(first + row / 4) % 6].exp();
                    first_head.map_or(0.0, of_head)
                };
                let weight = |r: usize, c: usize| {
                    let is_seen = sees(5 + r % 4, block.first_key + c);
                    if is_seen { (0.3 * of_scores[r][c]).exp() } else { 0.0 }
                };
                let want = |r: usize, c: usize| {
                    let all: f64 = (0..of_scores[r].len()).map(|c| weight(r, c)).sum();
                    weight(r, c) / (all + sink(r))
                };
                let sinks = first_head.map(|first_head| SinkLogits { logits: &logits, first_head });
                assert_each(&causal_softmax(scores.copy().unwrap(), block, 0.3, sinks).unwrap(), 1e-6, want);
            }
        }
    }

    #[test]
    fn softmax_covers_only_visible_keys() {
        // Which keys each of queries 3..7 sees among keys 0..7.
        let cases = [
            (Window::Full, [0..4, 0..5, 0..6, 0..7]),
            (Window::Sliding(2), [2..4, 3..5, 4..6, 5..7]),
            (Window::Chunked(5), [0..4, 0..5, 5..6, 5..7]),
        ];
        for (window, seen) in cases {
            let block = ScoreBlock { first_query: 3, queries: 4, first_key: 0, window };
            let shares = causal_softmax(values(&[1, 4, 7], 9), block, 1.0, None).unwrap();
            for (row, seen) in shares.squeeze(0).unwrap().to_vec2::<f32>().unwrap().iter().zip(seen) {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
                assert!(row.iter().enumerate().all(|(key, &share)| (share > 0.0) == seen.contains(&key)), "{row:?}");
            }
        }
    }

    #[test]
    fn partial_logits_combine_by_log_sum_exp() {
        // Columns of some targets, of which the first column is the one of 1,000.
        let columns = [Some(0), None, Some(36), Some(7), None];
        let targets = Tensor::new(&[1000u32, 999, 1036, 1007, u32::MAX], &Device::Cpu).unwrap();
        for dtype in [DType::F32, DType::BF16] {
            let logits = values(&[5, 37], 1).to_dtype(dtype).unwrap();
            let parts = logit_parts(&logits, &targets, 1000).unwrap();
            assert_eq!((parts.dims(), parts.dtype()), (&[5, 3][..], DType::F32));
            let rows = logits.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
            for ((parts, row), column) in parts.to_vec2::<f32>().unwrap().iter().zip(rows).zip(columns) {
                let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = row.iter().map(|logit| f64::from(logit - top).exp()).sum();
                assert_eq!(parts[0], top);
                assert!((f64::from(parts[1]) / sum - 1.0).abs() < 1e-6, "{}, not {sum}", parts[1]);
                assert_eq!(parts[2], column.map_or(0.0, |column: usize| row[column]));
            }
        }
        assert!(logit_parts(&values(&[5, 37], 1), &targets.narrow(0, 1, 4).unwrap(), 0).is_err());
    }

    #[test]
    fn sink_logit_is_not_scaled() {
        let block = ScoreBlock { first_query: 1, queries: 1, first_key: 0, window: Window::Full };
        let scores = Tensor::zeros((1, 2, 2), DType::F32, &Device::Cpu).unwrap();
        let logits = Tensor::new(&[2f32.ln(), 200.0], &Device::Cpu).unwrap();
        let sinks = SinkLogits { logits: &logits, first_head: 0 };
        let shares = causal_softmax(scores, block, 100.0, Some(sinks)).unwrap();
        let shares = shares.squeeze(0).unwrap().to_vec2::<f32>().unwrap();
        assert!(shares[0].iter().all(|share| (share - 0.25).abs() < 1e-6));
        assert!(shares[1].iter().all(|&share| share < 1e-30));
    }

    #[test]
    fn low_precision_rounds_once_per_step() {
        let (x, gain) = (values(&[5, 16], 1), values(&[16], 2));
        let (x, gain) = (x.to_dtype(DType::BF16).unwrap(), gain.to_dtype(DType::BF16).unwrap());
        let (of_x, gains) = (rows(&x), vector(&gain));
        let rounded = |v: f64| f64::from(bf16::from_f64(v).to_f32());
        let want = |r: usize, c: usize| {
            let square = of_x[r].iter().map(|v| v * v).sum::<f64>() / 16.0 + 1e-5;
            rounded(rounded(of_x[r][c] / square.sqrt()) * gains[c])
        };
        // The order of the sum may move a tie by one unit of bf16.
        assert_each(&rms_norm(&x, &gain, 1e-5).unwrap(), 0.13, want);
    }
}
