//! Elementwise work that a tensor library does in many passes, done in one on a CPU.
//!
//! Each operation has a fused CPU form and a form composed of tensor operations for other devices; tests hold them together.
//! Arithmetic is f32 inside; results are rounded to the tensors' dtype where the reference implementation rounds.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, D, DType, Device, InplaceOp1, InplaceOp2, Layout, Result, Shape,
    Tensor, bail,
};
use half::{bf16, f16};
use outliers_scan::simd::vectorized;
use rayon::prelude::*;

use crate::decoder::Window;
use crate::dtype::Compute;
use crate::rope::{Pairing, RopeTable};

static COMPOSED: AtomicBool = AtomicBool::new(false);

/// From now on this process computes everything by the tensor library's operations, as it does on GPUs: slower, to be compared.
pub fn compose_all() {
    COMPOSED.store(true, Ordering::Relaxed);
}

/// Whether work on `x` is done by our own loops.
pub(crate) fn has_loops(x: &Tensor) -> bool {
    has_loops_on(x.device())
}

/// Whether work on this device is.
pub(crate) fn has_loops_on(device: &Device) -> bool {
    device.is_cpu() && !COMPOSED.load(Ordering::Relaxed)
}

/// A stored float that computes as f32.
trait Real: Copy + Send + Sync {
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

/// Without branches, so that loops vectorise.
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

fn part<'a, T>(data: &'a [T], layout: &Layout) -> Result<&'a [T]> {
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

/// An operation that puts its result in the place of its first argument.
trait Overwrite {
    const NAME: &'static str;

    fn run<T: Real>(&self, x: &mut [T], y: &[T]);
}

/// The same, over tensors of any float.
struct InPlace<O>(O);

impl<O: Overwrite> InplaceOp2 for InPlace<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<()> {
        match (s1, s2) {
            (CpuStorage::F32(x), CpuStorage::F32(y)) => self.0.run(part_mut(x, l1)?, part(y, l2)?),
            (CpuStorage::BF16(x), CpuStorage::BF16(y)) => self.0.run(part_mut(x, l1)?, part(y, l2)?),
            (CpuStorage::F16(x), CpuStorage::F16(y)) => self.0.run(part_mut(x, l1)?, part(y, l2)?),
            _ => bail!("{}: not floats of one dtype", O::NAME),
        }
        Ok(())
    }
}

/// Rows handed to one task: enough work to pay for the hand-over.
fn rows_per_task(width: usize) -> usize {
    (16_384 / width.max(1)).max(1)
}

/// Sum in sixteen lanes: it vectorises, and its rounding error is a sixteenth of one running sum's.
#[inline(always)]
fn lane_sum<T: Copy>(x: &[T], term: impl Fn(T) -> f32) -> f32 {
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

/// The largest value, in sixteen lanes; minus infinity if there is none. NaNs are passed over.
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
    // Below -87 the true value is under the least normal f32: nothing in a softmax.
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

// ---------------------------------------------------------------------------------------------------------- RMSNorm

struct RmsNorm {
    eps: f32,
}

impl RmsNorm {
    fn run<T: Real>(&self, x: &[T], gain: &[T]) -> Vec<T> {
        let width = gain.len();
        let mut out = vec![T::narrow(0.0); x.len()];
        out.par_chunks_mut(width).zip(x.par_chunks(width)).with_min_len(rows_per_task(width)).for_each(|(out, x)| {
            vectorized(
                #[inline(always)]
                || self.row(out, x, gain),
            );
        });
        out
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

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = l1.shape().clone();
        let out = match (s1, s2) {
            (CpuStorage::F32(x), CpuStorage::F32(g)) => CpuStorage::F32(self.run(part(x, l1)?, part(g, l2)?)),
            (CpuStorage::BF16(x), CpuStorage::BF16(g)) => CpuStorage::BF16(self.run(part(x, l1)?, part(g, l2)?)),
            (CpuStorage::F16(x), CpuStorage::F16(g)) => CpuStorage::F16(self.run(part(x, l1)?, part(g, l2)?)),
            _ => bail!("rms-norm: value and gain differ in dtype"),
        };
        Ok((out, shape))
    }
}

/// `x / sqrt(mean(x^2) + eps) * gain` over the last dimension. `x` `[.., width]` contiguous, `gain` `[width]`.
pub fn rms_norm(x: &Tensor, gain: &Tensor, eps: f64) -> Result<Tensor> {
    if has_loops(x) { x.apply_op2_no_bwd(gain, &RmsNorm { eps: eps as f32 }) } else { rms_norm_composed(x, gain, eps) }
}

fn rms_norm_composed(x: &Tensor, gain: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let mean = wide.sqr()?.mean_keepdim(D::Minus1)?;
    let scaled = wide.broadcast_div(&(mean + eps)?.sqrt()?)?;
    scaled.to_dtype(x.dtype())?.broadcast_mul(gain)
}

// -------------------------------------------------------------------------------------------------------- LayerNorm

struct LayerNorm {
    eps: f32,
}

impl LayerNorm {
    fn run<T: Real>(&self, x: &[T], gain: &[T], bias: &[T]) -> Vec<T> {
        let width = gain.len();
        let mut out = vec![T::narrow(0.0); x.len()];
        out.par_chunks_mut(width).zip(x.par_chunks(width)).with_min_len(rows_per_task(width)).for_each(|(out, x)| {
            vectorized(
                #[inline(always)]
                || self.row(out, x, gain, bias),
            );
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

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use CpuStorage::{BF16, F16, F32};
        let out = match (s1, s2, s3) {
            (F32(x), F32(g), F32(b)) => F32(self.run(part(x, l1)?, part(g, l2)?, part(b, l3)?)),
            (BF16(x), BF16(g), BF16(b)) => BF16(self.run(part(x, l1)?, part(g, l2)?, part(b, l3)?)),
            (F16(x), F16(g), F16(b)) => F16(self.run(part(x, l1)?, part(g, l2)?, part(b, l3)?)),
            _ => bail!("layer-norm: value, gain and bias differ in dtype"),
        };
        Ok((out, l1.shape().clone()))
    }
}

/// `(x - mean) / sqrt(variance + eps) * gain + bias` over the last dimension. `x` `[.., width]` contiguous, `gain` and `bias` `[width]`.
pub fn layer_norm(x: &Tensor, gain: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    if has_loops(x) {
        x.apply_op3_no_bwd(gain, bias, &LayerNorm { eps: eps as f32 })
    } else {
        layer_norm_composed(x, gain, bias, eps)
    }
}

fn layer_norm_composed(x: &Tensor, gain: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    let scaled = centred.broadcast_div(&(centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?)?;
    let shifted = scaled.broadcast_mul(&gain.to_dtype(DType::F32)?)?.broadcast_add(&bias.to_dtype(DType::F32)?)?;
    shifted.to_dtype(x.dtype())
}

// ------------------------------------------------------------------------------------------------------------- rope

/// Where in a head the rotated dimensions lie; a [`RopeTable`] says how many they are.
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
    fn run<T: Real>(&self, x: &mut [T]) {
        let pairs = self.table.pairs;
        let rotated = self.part.first..self.part.first + 2 * pairs;
        x.par_chunks_mut(self.width).with_min_len(rows_per_task(self.width)).enumerate().for_each(|(row, x)| {
            let at = (row % self.positions) * pairs;
            let (cos, sin) = (&self.table.cos[at..at + pairs], &self.table.sin[at..at + pairs]);
            vectorized(
                #[inline(always)]
                || {
                    for head in x.chunks_exact_mut(self.part.head_dim) {
                        rotate_pairs(&mut head[rotated.clone()], self.table.pairing, cos, sin);
                    }
                },
            );
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

impl InplaceOp1 for Rope<'_> {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match storage {
            CpuStorage::F32(x) => self.run(part_mut(x, layout)?),
            CpuStorage::BF16(x) => self.run(part_mut(x, layout)?),
            CpuStorage::F16(x) => self.run(part_mut(x, layout)?),
            _ => bail!("rope: not a float"),
        }
        Ok(())
    }
}

/// Rotates a part of every head by its position. `x` `[sequences * positions, heads * head_dim]`, freshly computed
/// (its storage is overwritten on a CPU); the table covers `positions`.
pub fn rope(x: Tensor, table: &RopeTable, part: RotatedPart, positions: usize) -> Result<Tensor> {
    if has_loops(&x) {
        let x = x.contiguous()?;
        let width = x.dim(D::Minus1)?;
        x.inplace_op1(&Rope { table, part, width, positions })?;
        return Ok(x);
    }
    rope_composed(&x, table, part, positions)
}

fn rope_composed(x: &Tensor, table: &RopeTable, part: RotatedPart, positions: usize) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let (pairs, sequences, heads) = (table.pairs, rows / positions, width / part.head_dim);
    let side = |data: &[f32]| Tensor::from_slice(&data[..positions * pairs], (1, positions, 1, pairs), x.device());
    let (cos, sin) = (side(&table.cos)?, side(&table.sin)?);
    // Pairs lie in two rows or in two columns.
    let (pair_shape, within) = match table.pairing {
        Pairing::Halves => ((sequences, positions, heads, 2, pairs), 3),
        Pairing::Interleaved => ((sequences, positions, heads, pairs, 2), 4),
    };
    let whole = x.reshape((sequences, positions, heads, part.head_dim))?;
    let rotated = whole.narrow(3, part.first, 2 * pairs)?.to_dtype(DType::F32)?.reshape(pair_shape)?;
    let (a, b) = (rotated.narrow(within, 0, 1)?.squeeze(within)?, rotated.narrow(within, 1, 1)?.squeeze(within)?);
    let new_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let new_b = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let turned = Tensor::stack(&[new_a, new_b], within)?.reshape((sequences, positions, heads, 2 * pairs))?;
    let (before, after) = (part.first, part.first + 2 * pairs);
    let mut parts = vec![turned.to_dtype(x.dtype())?];
    if before > 0 {
        parts.insert(0, whole.narrow(3, 0, before)?);
    }
    if after < part.head_dim {
        parts.push(whole.narrow(3, after, part.head_dim - after)?);
    }
    Tensor::cat(&parts, 3)?.reshape((rows, width))
}

// ---------------------------------------------------------------------------------------------------- causal softmax

/// Which queries and keys a block of scores stands for.
#[derive(Clone, Copy, Debug)]
pub struct ScoreBlock {
    /// Position of the first query.
    pub first_query: usize,
    /// Queries, one position after another.
    pub queries: usize,
    /// Position of the first key.
    pub first_key: usize,
    /// Which of the keys up to its own position a query sees.
    pub window: Window,
}

impl ScoreBlock {
    /// Columns of the keys that a row's query sees.
    fn seen(&self, query: usize, keys: usize) -> Range<usize> {
        let position = self.first_query + query;
        let column = |key: usize| key.saturating_sub(self.first_key).min(keys);
        column(self.window.first_key(position))..column(position + 1)
    }

    /// `[queries, keys]`: minus infinity where a query does not see a key, else 0.
    fn mask(&self, keys: usize, device: &Device) -> Result<Tensor> {
        let (first, end): (Vec<u32>, Vec<u32>) =
            (0..self.queries).map(|q| self.seen(q, keys)).map(|seen| (seen.start as u32, seen.end as u32)).unzip();
        let column = Tensor::arange(0, keys as u32, device)?.unsqueeze(0)?;
        let bound = |columns| Tensor::from_vec(columns, (self.queries, 1), device);
        let hidden = (column.broadcast_lt(&bound(first)?)? + column.broadcast_ge(&bound(end)?)?)?;
        let all = |value: f32| Tensor::full(value, (self.queries, keys), device);
        hidden.where_cond(&all(f32::NEG_INFINITY)?, &all(0.0)?)
    }
}

struct CausalSoftmax<'a> {
    block: ScoreBlock,
    keys: usize,
    scale: f32,
    sinks: Option<&'a [f32]>,
}

impl CausalSoftmax<'_> {
    fn run<T: Real>(&self, scores: &mut [T]) {
        scores.par_chunks_mut(self.keys).with_min_len(rows_per_task(self.keys)).enumerate().for_each(
            |(row, scores)| {
                let (head, query) = (row / self.block.queries, row % self.block.queries);
                let range = self.block.seen(query, self.keys);
                let sink = self.sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[head]);
                let (seen, after) = scores.split_at_mut(range.end);
                let (before, seen) = seen.split_at_mut(range.start);
                vectorized(
                    #[inline(always)]
                    || softmax(seen, self.scale, sink),
                );
                before.fill(T::narrow(0.0));
                after.fill(T::narrow(0.0));
            },
        );
    }
}

/// Softmax of `scores * scale`; `sink` is one more logit, whose share nobody gets.
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
        match storage {
            CpuStorage::F32(x) => self.run(part_mut(x, layout)?),
            CpuStorage::BF16(x) => self.run(part_mut(x, layout)?),
            CpuStorage::F16(x) => self.run(part_mut(x, layout)?),
            _ => bail!("causal-softmax: not a float"),
        }
        Ok(())
    }
}

/// Softmax of `scores * scale` over the keys a query sees. `scores` `[batch, groups * queries, keys]`, freshly computed
/// (its storage is overwritten on a CPU): row `g * queries + i` belongs to the block's query `i`. `sinks`: a logit for each of
/// the `batch * groups` heads that takes part unscaled in maximum and denominator and has no value.
pub fn causal_softmax(scores: Tensor, block: ScoreBlock, scale: f64, sinks: Option<&[f32]>) -> Result<Tensor> {
    if has_loops(&scores) {
        let keys = scores.dim(D::Minus1)?;
        scores.inplace_op1(&CausalSoftmax { block, keys, scale: scale as f32, sinks })?;
        return Ok(scores);
    }
    causal_softmax_composed(&scores, block, scale, sinks)
}

fn causal_softmax_composed(scores: &Tensor, block: ScoreBlock, scale: f64, sinks: Option<&[f32]>) -> Result<Tensor> {
    let (batch, rows, keys) = scores.dims3()?;
    let groups = rows / block.queries;
    let wide = (scores.to_dtype(DType::F32)? * scale)?.reshape((batch, groups, block.queries, keys))?;
    let wide = wide.broadcast_add(&block.mask(keys, scores.device())?)?;
    let sinks = sinks.map(|s| Tensor::from_slice(s, (batch, groups, 1, 1), scores.device())).transpose()?;
    let mut top = wide.max_keepdim(D::Minus1)?;
    if let Some(sinks) = &sinks {
        top = top.broadcast_maximum(sinks)?;
    }
    let e = wide.broadcast_sub(&top)?.exp()?;
    let mut sum = e.sum_keepdim(D::Minus1)?;
    if let Some(sinks) = &sinks {
        sum = (sum + sinks.broadcast_sub(&top)?.exp()?)?;
    }
    e.broadcast_div(&sum)?.reshape((batch, rows, keys))?.to_dtype(scores.dtype())
}

// ----------------------------------------------------------------------------------------------------
// logits

/// The largest value and the sum of `exp(value - largest)`: the parts of a log-sum-exp.
fn exp_sum(values: &[f32]) -> (f32, f32) {
    vectorized(
        #[inline(always)]
        || {
            let top = lane_max(values, |v| v);
            (top, lane_sum(values, |v| exp_negative(v - top)))
        },
    )
}

struct LogitParts<'a> {
    targets: &'a [Option<u32>],
}

impl LogitParts<'_> {
    fn run(&self, logits: &[f32], width: usize) -> Vec<f32> {
        let mut parts = vec![0f32; 3 * self.targets.len()];
        let rows = parts.par_chunks_exact_mut(3).zip(logits.par_chunks_exact(width)).zip(self.targets);
        rows.for_each(|((parts, logits), target)| {
            let (top, sum) = exp_sum(logits);
            let at_target = target.map_or(0.0, |column| logits[column as usize]);
            parts.copy_from_slice(&[top, sum, at_target]);
        });
        parts
    }
}

impl CustomOp1 for LogitParts<'_> {
    fn name(&self) -> &'static str {
        "logit-parts"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout) -> Result<(CpuStorage, Shape)> {
        let CpuStorage::F32(logits) = s1 else { bail!("logit-parts: not f32") };
        let (rows, width) = l1.shape().dims2()?;
        if rows != self.targets.len() {
            bail!("logit-parts: {rows} rows and {} targets", self.targets.len());
        }
        Ok((CpuStorage::F32(self.run(part(logits, l1)?, width)), Shape::from((rows, 3))))
    }
}

/// What the likelihood of each row's target takes of a block of logits `[rows, block]`, as
/// `[rows, 3]` in f32 on the same device. Of each row the largest logit, the sum of
/// `exp(logit - largest)`, and the logit at its target's column, which means nothing without a
/// target in the block.
pub fn logit_parts(logits: &Tensor, targets: &[Option<u32>]) -> Result<Tensor> {
    let logits = logits.to_dtype(DType::F32)?.contiguous()?;
    if has_loops(&logits) {
        return logits.apply_op1_no_bwd(&LogitParts { targets });
    }
    logit_parts_composed(&logits, targets)
}

fn logit_parts_composed(logits: &Tensor, targets: &[Option<u32>]) -> Result<Tensor> {
    let top = logits.max_keepdim(D::Minus1)?;
    let sum = logits.broadcast_sub(&top)?.exp()?.sum_keepdim(D::Minus1)?;
    let columns: Vec<u32> = targets.iter().map(|target| target.unwrap_or(0)).collect();
    let columns = Tensor::from_vec(columns, (targets.len(), 1), logits.device())?;
    let at_target = logits.gather(&columns, 1)?;
    Tensor::cat(&[top, sum, at_target], 1)
}

// -------------------------------------------------------------------------------------------------------------- gates

/// How a gate opens the way for `up`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate {
    /// `silu(gate) * up`.
    Silu,
    /// `sigmoid(gate) * up` (Qwen3-Next's attention).
    Sigmoid,
    /// `gelu(gate) * up`, GELU in its tanh form (Gemma).
    GeluTanh,
    /// `(clamp(up, -limit, limit) + 1) * g * sigmoid(alpha * g)` with `g = min(gate, limit)` (gpt-oss).
    Clamped {
        /// Largest magnitude.
        limit: f32,
        /// Slope inside the sigmoid.
        alpha: f32,
    },
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    // By the exponential of -|x|: never overflows, and one form for both signs.
    let e = exp_negative(-x.abs());
    (if x >= 0.0 { 1.0 } else { e }) / (1.0 + e)
}

/// GELU in its tanh form: `x * sigmoid(2 y)` with `y = sqrt(2 / pi) * (x + 0.044715 x^3)`.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    const TWICE: f32 = 2.0 * 0.797_884_6;
    x * sigmoid(TWICE * (x + 0.044_715 * x * x * x))
}

/// The smaller one; NaN is preserved.
#[inline(always)]
fn at_most(x: f32, limit: f32) -> f32 {
    if x > limit { limit } else { x }
}

impl Gate {
    /// Puts what comes through in the gate's place. (One loop for each kind: where a loop has to choose it does not vectorise.)
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
        gate.par_chunks_mut(ELEMENTS).zip(up.par_chunks(ELEMENTS)).for_each(|(gate, up)| {
            vectorized(
                #[inline(always)]
                || self.0.open(gate, up),
            )
        });
    }
}

/// `gate` applied to `up`, elementwise. `gate` is freshly computed: its storage is overwritten on a CPU.
pub fn gated(gate: Tensor, up: &Tensor, how: Gate) -> Result<Tensor> {
    if has_loops(&gate) {
        let gate = gate.contiguous()?;
        gate.inplace_op2(up, &InPlace(Gated(how)))?;
        return Ok(gate);
    }
    gated_composed(&gate, up, how)
}

fn gated_composed(gate: &Tensor, up: &Tensor, how: Gate) -> Result<Tensor> {
    match how {
        Gate::Silu => gate.silu()? * up,
        Gate::Sigmoid => sigmoid_composed(&gate.to_dtype(DType::F32)?, 1.0)?.to_dtype(gate.dtype())? * up,
        Gate::GeluTanh => gate.gelu()? * up,
        Gate::Clamped { limit, alpha } => {
            let (limit, alpha) = (f64::from(limit), f64::from(alpha));
            let (g, u) = (gate.to_dtype(DType::F32)?.minimum(limit)?, up.to_dtype(DType::F32)?.clamp(-limit, limit)?);
            let sigmoid = sigmoid_composed(&g, alpha)?;
            ((u + 1.0)? * (g * sigmoid)?)?.to_dtype(gate.dtype())
        }
    }
}

/// `sigmoid(slope * x)`.
fn sigmoid_composed(x: &Tensor, slope: f64) -> Result<Tensor> {
    (x.affine(-slope, 0.0)?.exp()? + 1.0)?.recip()
}

struct GatedJoined {
    how: Gate,
    interleaved: bool,
    inner: usize,
}

impl GatedJoined {
    fn run<T: Real>(&self, joined: &[T]) -> Vec<T> {
        let inner = self.inner;
        let mut out = vec![T::narrow(0.0); joined.len() / 2];
        let rows = out.par_chunks_mut(inner).zip(joined.par_chunks(2 * inner)).with_min_len(rows_per_task(2 * inner));
        rows.for_each(|(out, row)| {
            vectorized(
                #[inline(always)]
                || {
                    if self.interleaved {
                        self.open_pairs(out, row);
                    } else {
                        let (gate, up) = row.split_at(inner);
                        out.copy_from_slice(gate);
                        self.how.open(out, up);
                    }
                },
            );
        });
        out
    }

    /// Of gates and what they open for beside each other. They are parted first: arithmetic on every other value does not vectorise.
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
        let out = match s1 {
            CpuStorage::F32(x) => CpuStorage::F32(self.run(part(x, l1)?)),
            CpuStorage::BF16(x) => CpuStorage::BF16(self.run(part(x, l1)?)),
            CpuStorage::F16(x) => CpuStorage::F16(self.run(part(x, l1)?)),
            _ => bail!("gated-joined: not a float"),
        };
        Ok((out, Shape::from((l1.shape().elem_count() / (2 * self.inner), self.inner))))
    }
}

/// The same where gate and up came from one product: `joined` `[rows, 2 * inner]`, in halves or interleaved (even columns gate).
pub fn gated_joined(joined: &Tensor, interleaved: bool, how: Gate) -> Result<Tensor> {
    let inner = joined.dim(D::Minus1)? / 2;
    if has_loops(joined) {
        joined.apply_op1_no_bwd(&GatedJoined { how, interleaved, inner })
    } else {
        gated_joined_composed(joined, interleaved, how)
    }
}

fn gated_joined_composed(joined: &Tensor, interleaved: bool, how: Gate) -> Result<Tensor> {
    let (rows, width) = joined.dims2()?;
    let inner = width / 2;
    let (gate, up) = if interleaved {
        let pairs = joined.reshape((rows, inner, 2))?;
        (pairs.narrow(2, 0, 1)?.squeeze(2)?, pairs.narrow(2, 1, 1)?.squeeze(2)?)
    } else {
        (joined.narrow(1, 0, inner)?, joined.narrow(1, inner, inner)?)
    };
    gated_composed(&gate.contiguous()?, &up.contiguous()?, how)
}

// ---------------------------------------------------------------------------------------------------------------- sum

struct Sum;

impl Overwrite for Sum {
    const NAME: &'static str = "sum";

    fn run<T: Real>(&self, x: &mut [T], y: &[T]) {
        let add = |x: &mut [T], y: &[T]| {
            vectorized(
                #[inline(always)]
                || {
                    for (x, y) in x.iter_mut().zip(y) {
                        *x = T::narrow(x.wide() + y.wide());
                    }
                },
            );
        };
        if x.len() == y.len() {
            x.par_chunks_mut(ELEMENTS).zip(y.par_chunks(ELEMENTS)).for_each(|(x, y)| add(x, y));
        } else {
            let rows = x.par_chunks_exact_mut(y.len().max(1)).with_min_len(rows_per_task(y.len()));
            rows.for_each(|row| add(row, y));
        }
    }
}

/// `x + y`: `x` `[.., width]`, freshly computed (its storage is overwritten on a CPU), and `y` of the same shape or `[width]`.
pub fn sum(x: Tensor, y: &Tensor) -> Result<Tensor> {
    if has_loops(&x) {
        if x.dims() != y.dims() && x.dims().last() != Some(&y.elem_count()) {
            bail!("sum: {:?} and {:?} are neither alike nor rows and one of them", x.shape(), y.shape());
        }
        let x = x.contiguous()?;
        x.inplace_op2(&y.contiguous()?, &InPlace(Sum))?;
        return Ok(x);
    }
    x.broadcast_add(y)
}

// -------------------------------------------------------------------------------------------------------- scatter-add

struct ScatterAdd<'a> {
    rows: &'a [u32],
    weights: &'a [f32],
    width: usize,
}

impl Overwrite for ScatterAdd<'_> {
    const NAME: &'static str = "scatter-add";

    fn run<T: Real>(&self, out: &mut [T], values: &[T]) {
        // Rows of one expert are distinct and few; the memory is the limit, not the core.
        for ((row, weight), value) in self.rows.iter().zip(self.weights).zip(values.chunks_exact(self.width)) {
            let weight = T::narrow(*weight).wide();
            let at = *row as usize * self.width;
            let out = &mut out[at..at + self.width];
            vectorized(
                #[inline(always)]
                || {
                    for (o, v) in out.iter_mut().zip(value) {
                        *o = T::narrow(o.wide() + T::narrow(v.wide() * weight).wide());
                    }
                },
            );
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
    use candle_core::Device;

    use super::*;
    use crate::rope::{Pairing, RopeScaling, RopeSpec};

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

    #[test]
    fn exponential_is_exact_to_f32() {
        for i in 0..200_000 {
            let x = -(i as f32) * 4.3e-4;
            let (got, want) = (f64::from(exp_negative(x)), f64::from(x).exp());
            assert!((got / want - 1.0).abs() < 2.5e-7, "exp({x}) = {got}, want {want}");
        }
        assert_eq!(exp_negative(0.0), 1.0);
        assert!(exp_negative(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn halves_are_rounded_as_everywhere() {
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

    #[test]
    fn fused_forms_equal_composed_ones() {
        let (x, gain) = (values(&[12, 40], 1), values(&[40], 2));
        close(&rms_norm(&x, &gain, 1e-5).unwrap(), &rms_norm_composed(&x, &gain, 1e-5).unwrap(), 1e-5);
        let bias = values(&[40], 6);
        let composed = layer_norm_composed(&x, &gain, &bias, 1e-5).unwrap();
        close(&layer_norm(&x, &gain, &bias, 1e-5).unwrap(), &composed, 1e-5);
        let up = values(&[12, 40], 3);
        for how in [Gate::Silu, Gate::Sigmoid, Gate::GeluTanh, Gate::Clamped { limit: 2.5, alpha: 1.702 }] {
            let composed = gated_composed(&x, &up, how).unwrap();
            close(&gated(x.copy().unwrap(), &up, how).unwrap(), &composed, 1e-5);
            let halves = Tensor::cat(&[&x, &up], 1).unwrap();
            close(&gated_joined(&halves, false, how).unwrap(), &composed, 1e-5);
            let pairs = Tensor::stack(&[&x, &up], 2).unwrap().reshape((12, 80)).unwrap();
            close(&gated_joined(&pairs, true, how).unwrap(), &composed, 1e-5);
            close(&gated_joined_composed(&pairs, true, how).unwrap(), &composed, 1e-5);
        }
        let (rows, weights) = ([7u32, 0, 11], [0.5f32, -2.0, 1.0]);
        let added = values(&[3, 40], 5);
        let factors = Tensor::from_slice(&weights, (3, 1), &Device::Cpu).unwrap();
        let index = Tensor::from_slice(&rows, 3, &Device::Cpu).unwrap();
        let composed = x.index_add(&index, &added.broadcast_mul(&factors).unwrap(), 0).unwrap();
        close(&scatter_add(x.copy().unwrap(), &added, &rows, &weights).unwrap(), &composed, 1e-6);
    }

    #[test]
    fn sums_are_those_of_rows_and_of_alike() {
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
    fn a_clamped_gate_lets_through_what_is_no_number() {
        let opened = |gate: f32, up: f32| {
            let mut gate = [gate];
            Gate::Clamped { limit: 7.0, alpha: 1.702 }.open(&mut gate, &[up]);
            gate[0]
        };
        assert!(opened(f32::NAN, 1.0).is_nan() && opened(1.0, f32::NAN).is_nan());
        assert_eq!((opened(99.0, 99.0), opened(99.0, -99.0)), (opened(7.0, 7.0), opened(7.0, -7.0)));
    }

    #[test]
    fn rotations_equal_composed_ones() {
        // Two sequences of six positions, five heads of eight.
        let x = values(&[12, 40], 1);
        for pairing in [Pairing::Halves, Pairing::Interleaved] {
            for (dims, first) in [(8, 0), (4, 0), (4, 4), (2, 3), (6, 2)] {
                let table = RopeSpec { theta: 100.0, dims, pairing, scaling: RopeScaling::None }.table(6);
                let part = RotatedPart { head_dim: 8, first };
                let composed = rope_composed(&x, &table, part, 6).unwrap();
                close(&rope(x.copy().unwrap(), &table, part, 6).unwrap(), &composed, 1e-5);
            }
        }
    }

    #[test]
    fn a_rotation_turns_its_pairs_and_nothing_else() {
        let x = Tensor::from_vec(vec![1f32, 2.0, 3.0, 4.0, 5.0, 6.0], (1, 6), &Device::Cpu).unwrap();
        let rotated = |pairing| {
            // A quarter turn of the first pair, a half turn of the second.
            let table = RopeTable { cos: vec![0.0, -1.0], sin: vec![1.0, 0.0], pairs: 2, pairing };
            let part = RotatedPart { head_dim: 6, first: 1 };
            rope(x.copy().unwrap(), &table, part, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(rotated(Pairing::Halves), [1.0, -4.0, -3.0, 2.0, -5.0, 6.0]);
        assert_eq!(rotated(Pairing::Interleaved), [1.0, -3.0, 2.0, -4.0, -5.0, 6.0]);
    }

    #[test]
    fn softmax_equals_composed_one() {
        let sinks = [0.5f32, -3.0, 20.0, 1.0, 0.0, -1.0];
        for window in [Window::Full, Window::Sliding(3), Window::Sliding(90), Window::Chunked(3), Window::Chunked(90)] {
            for sinks in [None, Some(&sinks[..])] {
                let block = ScoreBlock { first_query: 5, queries: 4, first_key: window.first_key(5), window };
                let scores = values(&[2, 3 * 4, 9 - block.first_key], 4);
                let composed = causal_softmax_composed(&scores, block, 0.3, sinks).unwrap();
                close(&causal_softmax(scores.copy().unwrap(), block, 0.3, sinks).unwrap(), &composed, 1e-6);
            }
        }
    }

    #[test]
    fn softmax_shares_only_what_is_seen() {
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
    fn parts_of_logits_are_those_of_their_log_sum_exp() {
        let targets = [Some(0), None, Some(36), Some(7), None];
        for dtype in [DType::F32, DType::BF16] {
            let logits = values(&[5, 37], 1).to_dtype(dtype).unwrap();
            let parts = logit_parts(&logits, &targets).unwrap();
            let wide = logits.to_dtype(DType::F32).unwrap();
            let composed = logit_parts_composed(&wide, &targets).unwrap();
            assert_eq!((parts.dims(), composed.dims(), parts.dtype()), (&[5, 3][..], &[5, 3][..], DType::F32));
            let read = |parts: &Tensor| parts.to_vec2::<f32>().unwrap();
            let rows = wide.to_vec2::<f32>().unwrap();
            for (((a, b), row), target) in read(&parts).iter().zip(read(&composed)).zip(rows).zip(targets) {
                let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = row.iter().map(|logit| f64::from(logit - top).exp()).sum();
                for [got_top, got_sum, at_target] in [[a[0], a[1], a[2]], [b[0], b[1], b[2]]] {
                    assert_eq!(got_top, top);
                    assert!((f64::from(got_sum) / sum - 1.0).abs() < 1e-6, "{got_sum}, not {sum}");
                    assert!(target.is_none_or(|column| at_target == row[column as usize]));
                }
            }
        }
        assert!(logit_parts(&values(&[5, 37], 1), &targets[1..]).is_err());
    }

    #[test]
    fn a_sink_takes_its_share_unscaled() {
        let block = ScoreBlock { first_query: 1, queries: 1, first_key: 0, window: Window::Full };
        let scores = Tensor::zeros((1, 2, 2), DType::F32, &Device::Cpu).unwrap();
        let shares = causal_softmax(scores, block, 100.0, Some(&[2f32.ln(), 200.0])).unwrap();
        let shares = shares.squeeze(0).unwrap().to_vec2::<f32>().unwrap();
        assert!(shares[0].iter().all(|share| (share - 0.25).abs() < 1e-6));
        assert!(shares[1].iter().all(|&share| share < 1e-30));
    }

    #[test]
    fn low_precision_rounds_once_per_step() {
        let (x, gain) = (values(&[5, 16], 1), values(&[16], 2));
        let (x, gain) = (x.to_dtype(DType::BF16).unwrap(), gain.to_dtype(DType::BF16).unwrap());
        let fused = rms_norm(&x, &gain, 1e-5).unwrap().to_dtype(DType::F32).unwrap();
        let composed = rms_norm_composed(&x, &gain, 1e-5).unwrap().to_dtype(DType::F32).unwrap();
        // The order of the sum may move a tie by one unit of bf16.
        close(&fused, &composed, 0.13);
    }
}
