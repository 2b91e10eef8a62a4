//! Softmax attention over whole sequences, blocked over queries and heads so that memory grows
//! with the sequence, not with its square, and over the keys that a window shows, so that work
//! grows with the window. On a GPU, blocks are of all sequences of a micro-batch, and long
//! sequences in bf16 are left to one kernel.

use std::cell::{Cell, RefCell};

use candle_core::{D, DType, Device, Result, Tensor};
use serde::{Deserialize, Serialize};

use crate::blocks::norm::Norm;
use crate::device::gpu::{self, FusedAttention};
use crate::kernels::fused::{self, Gate, RotatedPart, ScoreBlock, SinkLogits};
use crate::kernels::product::Linear;
use crate::kernels::product::product;
use crate::model::decoder::{AttentionSpec, NormSpec, OutputGate, QkNorm, Temperature, Window};
use crate::model::rope::RopeTable;

#[cfg(test)]
pub(crate) mod naive;

/// Maximum queries per block.
pub const QUERY_BLOCK: usize = 256;
/// Maximum scores held at a time. Heads are processed in groups if there are more.
pub const SCORE_VALUES: usize = 64 << 20;
/// Tokens of a sequence from which on attention on a GPU is one kernel: in bf16, for heads of
/// widths that have one. Otherwise each score crosses the GPU's memory four times, in 2 bytes. On
/// an H200 (4.3 TB/s, 760 TFLOP/s) that takes 1.9 ps; its 512 FLOP in both products, for heads of
/// 128, take 0.7 ps. At this length a token's scores take as long as a third of its projections
/// (2,048 wide). Below it attention is little of the work, and keeps the bits of the CPU's softmax.
pub const FUSED_FROM: usize = 1024;

/// An attention layer's tensors on one device.
pub struct AttentionWeights {
    /// Projections to queries, keys and values.
    pub projections: Projections,
    /// `[hidden, heads * head_dim]`.
    pub output: Linear,
    /// Norms of queries and keys, if they have gains.
    pub qk_norm: Option<(Norm, Norm)>,
    /// One attention sink logit per query head.
    pub sinks: Option<Tensor>,
    /// Projection to the output gate, if it has a separate matrix.
    pub gate: Option<Linear>,
}

/// Projections to queries (`heads * head_dim` rows, twice as many with an output gate), keys and
/// values (`kv_heads * head_dim` rows each).
pub enum Projections {
    /// Separate matrices.
    Separate {
        /// Projection to queries.
        query: Linear,
        /// Projection to keys.
        key: Linear,
        /// Projection to values.
        value: Linear,
    },
    /// One matrix with the rows of queries, keys and values, in this order.
    Fused(Linear),
    /// One matrix gives keys and values.
    KeyIsValue {
        /// Projection to queries.
        query: Linear,
        /// Projection to keys, which are also the values.
        key: Linear,
    },
}

impl Projections {
    /// Queries, keys and values of `x` `[rows, hidden]`, contiguous.
    fn apply(&self, spec: &AttentionSpec, x: &Tensor) -> Result<[Tensor; 3]> {
        match self {
            Self::Separate { query, key, value } => Ok([query.apply(x)?, key.apply(x)?, value.apply(x)?]),
            Self::KeyIsValue { query, key } => {
                let key = key.apply(x)?;
                // Copied, since a rotation overwrites its input.
                let value = key.copy()?;
                Ok([query.apply(x)?, key, value])
            }
            Self::Fused(all) => {
                let all = all.apply(x)?;
                let kv = spec.kv_heads * spec.head_dim;
                let queries = all.dim(1)? - 2 * kv;
                let part = |first, width| all.narrow(1, first, width)?.contiguous();
                Ok([part(0, queries)?, part(queries, kv)?, part(queries + kv, kv)?])
            }
        }
    }
}

/// Sum of the largest attention weight of each query in each head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TopShares {
    /// Sum of the weights.
    pub sum: f64,
    /// Number of weights: queries x heads.
    pub count: u64,
}

impl TopShares {
    /// Those of `top`, one for each query of each head.
    fn of(top: &[f32]) -> Self {
        Self { sum: top.iter().map(|share| f64::from(*share)).sum(), count: top.len() as u64 }
    }

    /// The sum of both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self { sum: self.sum + other.sum, count: self.count + other.count }
    }

    /// The mean; `None` for no weights.
    pub fn mean(self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

/// Sum of the attention weights that a head's queries give to the first key of their sequence.
/// Counts queries that see it, except the first query, which sees no other key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirstKey {
    /// Sum in units of 2^-32, independent of the order of addition.
    sum: u64,
    /// Number of queries.
    queries: u64,
}

impl FirstKey {
    /// Units per 1.
    const UNIT: f64 = (1u64 << 32) as f64;

    fn add(&mut self, share: f32) {
        self.sum += (f64::from(share) * Self::UNIT).round() as u64;
        self.queries += 1;
    }

    /// The sum of both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self { sum: self.sum + other.sum, queries: self.queries + other.queries }
    }

    /// The mean; `None` without queries.
    pub fn mean(self) -> Option<f64> {
        (self.queries > 0).then(|| self.sum as f64 / Self::UNIT / self.queries as f64)
    }
}

/// Measurements of attention weights.
#[derive(Debug, Default)]
pub struct AttentionRecorder {
    top: Option<Cell<TopShares>>,
    /// Per sequence and head.
    first_key: Option<RefCell<Vec<Vec<FirstKey>>>>,
    sequence: Cell<usize>,
}

impl AttentionRecorder {
    /// Measures the largest weights, those of the first key, or both.
    pub fn new(top: bool, first_key: bool) -> Self {
        Self { top: top.then(Cell::default), first_key: first_key.then(RefCell::default), sequence: Cell::default() }
    }

    /// Sets the index of the first sequence that is processed next, from 0.
    pub fn at_sequence(&self, sequence: usize) {
        self.sequence.set(sequence);
    }

    /// The largest weights; zero unless they are measured.
    pub fn top(&self) -> TopShares {
        self.top.as_ref().map(Cell::get).unwrap_or_default()
    }

    /// Weights of the first key per sequence and head; empty unless they are measured.
    pub fn first_key(&self) -> Vec<Vec<FirstKey>> {
        self.first_key.as_ref().map(|sequences| sequences.borrow().clone()).unwrap_or_default()
    }

    /// Adds a block of `shares` `[kv_heads, groups * queries, keys]`, rows head by head.
    fn record(&self, shares: &Tensor, block: ScoreBlock, heads: HeadLayout) -> Result<()> {
        let on_host = |shares: Tensor| shares.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        if self.top.is_some() {
            self.add_top(&on_host(shares.max(D::Minus1)?)?);
        }
        if self.first_key.is_some() && block.first_key == 0 {
            self.add_first_key(&on_host(shares.narrow(D::Minus1, 0, 1)?)?, block, heads);
        }
        Ok(())
    }

    /// Takes of each query `[.., queries, 2]` the largest share and the first key's, in f32.
    fn record_top_and_first(&self, shares: &Tensor, block: ScoreBlock, heads: HeadLayout) -> Result<()> {
        let shares = shares.flatten_all()?.to_vec1::<f32>()?;
        let (top, of_key): (Vec<f32>, Vec<f32>) = shares.as_chunks::<2>().0.iter().map(|[a, b]| (*a, *b)).unzip();
        self.add_top(&top);
        self.add_first_key(&of_key, block, heads);
        Ok(())
    }

    fn add_top(&self, shares: &[f32]) {
        if let Some(top) = &self.top {
            top.set(top.get().and(TopShares::of(shares)));
        }
    }

    /// Takes the first key's share of each query of a block, rows of one head after another.
    fn add_first_key(&self, of_key: &[f32], block: ScoreBlock, heads: HeadLayout) {
        let Some(first_key) = &self.first_key else { return };
        let mut sequences = first_key.borrow_mut();
        for (at, shares) in (heads.before..).zip(of_key.chunks_exact(block.queries)) {
            let sequence = self.sequence.get() + at / heads.per_sequence;
            let head = heads.first + at % heads.per_sequence;
            if sequences.len() <= sequence {
                sequences.resize(sequence + 1, Vec::new());
            }
            let of_heads = &mut sequences[sequence];
            if of_heads.len() <= head {
                of_heads.resize(head + 1, FirstKey::default());
            }
            for (position, share) in (block.first_query..).zip(shares) {
                if position > 0 && block.window.first_key(position) == 0 {
                    of_heads[head].add(*share);
                }
            }
        }
    }
}

/// The heads of a block of rows, sequence by sequence.
#[derive(Clone, Copy, Debug)]
struct HeadLayout {
    /// Heads before the block.
    before: usize,
    /// Heads per sequence.
    per_sequence: usize,
    /// Index of the first head in the measured sequence.
    first: usize,
}

/// Receives attention weights; `None` if no measurement needs them.
pub type MaybeRecorder<'a> = Option<&'a AttentionRecorder>;

/// Attention of `x` `[sequences * positions, hidden]` (whole sequences), with an output of the
/// same shape, before the residual addition. `table` is required if the spec has a rotation.
pub fn attention(
    spec: &AttentionSpec,
    weights: &AttentionWeights,
    table: Option<&RopeTable>,
    x: &Tensor,
    positions: usize,
    recorder: MaybeRecorder<'_>,
) -> Result<Tensor> {
    let [query, mut key, mut value] = weights.projections.apply(spec, x)?;
    let (mut query, mut gate) = split_gate(spec, query)?;
    if let Some(separate) = &weights.gate {
        gate = Some(separate.apply(x)?);
    }
    if let Some((query_norm, key_norm)) = &weights.qk_norm {
        query = normalise(spec, query_norm, &query)?;
        key = normalise(spec, key_norm, &key)?;
    }
    if let Some(eps) = spec.value_norm {
        value = normalise_heads(spec, &without_gain(spec, eps, x)?, &value)?;
    }
    if let Some(limit) = spec.clip_qkv {
        (query, key, value) = (query.clamp(-limit, limit)?, key.clamp(-limit, limit)?, value.clamp(-limit, limit)?);
    }
    if let Some(table) = table {
        let part = RotatedPart { head_dim: spec.head_dim, first: 0 };
        query = fused::rope(query, table, part, positions)?;
        key = fused::rope(key, table, part, positions)?;
    }
    if let QkNorm::AfterRope { eps } = spec.qk_norm {
        let norm = without_gain(spec, eps, x)?;
        query = normalise(spec, &norm, &query)?;
        key = normalise(spec, &norm, &key)?;
    }
    if let Some(temperature) = &spec.temperature {
        query = temper(temperature, query, positions)?;
    }
    let mut mixed = mix_sequences(spec, weights, &[query, key, value], positions, recorder)?;
    if let Some(gate) = gate {
        mixed = fused::gated(gate, &mixed, Gate::Sigmoid)?;
    }
    weights.output.apply(&mixed)
}

/// Splits queries `[rows, heads * head_dim]` and gates of the same shape, if each head's rows are
/// [query | gate].
fn split_gate(spec: &AttentionSpec, query: Tensor) -> Result<(Tensor, Option<Tensor>)> {
    if spec.output_gate != OutputGate::WithQuery {
        return Ok((query, None));
    }
    let rows = query.dim(0)?;
    let both = query.reshape((rows, spec.heads, 2, spec.head_dim))?;
    let part = |i| both.narrow(2, i, 1)?.reshape((rows, spec.heads * spec.head_dim));
    Ok((part(0)?, Some(part(1)?)))
}

/// Normalises each row, or each head of a row.
fn normalise(spec: &AttentionSpec, norm: &Norm, x: &Tensor) -> Result<Tensor> {
    match spec.qk_norm {
        QkNorm::WholeProjection(_) => norm.apply(x),
        QkNorm::PerHead(_) | QkNorm::AfterRope { .. } => normalise_heads(spec, norm, x),
        QkNorm::None => Ok(x.clone()),
    }
}

/// Normalises each head.
fn normalise_heads(spec: &AttentionSpec, norm: &Norm, x: &Tensor) -> Result<Tensor> {
    norm.apply(&x.reshape((x.elem_count() / spec.head_dim, spec.head_dim))?)?.reshape(x.shape())
}

/// Normalises heads like `x` without a gain.
fn without_gain(spec: &AttentionSpec, eps: f64, x: &Tensor) -> Result<Norm> {
    Norm::new(NormSpec::rms(eps), Tensor::ones(spec.head_dim, x.dtype(), x.device())?, None)
}

/// Multiplies queries `[sequences * positions, width]` by the temperature of their position.
fn temper(temperature: &Temperature, query: Tensor, positions: usize) -> Result<Tensor> {
    let factors: Vec<f32> = (0..positions).map(|position| temperature.factor(position)).collect();
    // Below the floor, thousands of positions in published models, all factors are 1.
    if factors.iter().all(|&factor| factor == 1.0) {
        return Ok(query);
    }
    let (rows, width) = query.dims2()?;
    let factors = Tensor::from_vec(factors, (positions, 1), query.device())?;
    let wide = query.to_dtype(DType::F32)?.reshape((rows / positions, positions, width))?;
    wide.broadcast_mul(&factors)?.reshape((rows, width))?.to_dtype(query.dtype())
}

/// Attention over whole sequences: queries, keys and values `[sequences * positions, heads of the
/// kind * head_dim]` to `[.., heads * head_dim]`.
fn mix_sequences(
    spec: &AttentionSpec,
    weights: &AttentionWeights,
    [query, key, value]: &[Tensor; 3],
    positions: usize,
    recorder: MaybeRecorder<'_>,
) -> Result<Tensor> {
    let sinks = weights.sinks.as_ref().map(|sinks| sinks.to_dtype(DType::F32)?.contiguous()).transpose()?;
    let scale = spec.scale.unwrap_or(1.0 / (spec.head_dim as f64).sqrt());
    let mixing = SoftmaxAttention::new(scale, spec.window, sinks.as_ref()).recorder(recorder);
    let sequences = query.dim(0)? / positions;
    let at_once = sequences_at_once(query.device(), sequences);
    let some = |first: usize| {
        recorder.iter().for_each(|recorder| recorder.at_sequence(first));
        let count = at_once.min(sequences - first);
        let heads = |t: &Tensor, heads: usize| {
            t.narrow(0, first * positions, count * positions)?.reshape((count, positions, heads, spec.head_dim))
        };
        let shape = (count * spec.kv_heads, positions, spec.head_dim);
        let by_head = |t| heads(t, spec.kv_heads)?.transpose(1, 2)?.reshape(shape);
        mixing.mix(&heads(query, spec.heads)?, &by_head(key)?, &by_head(value)?)
    };
    let mixed = (0..sequences).step_by(at_once).map(some).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&mixed, 0)
}

/// Number of sequences that attention processes together. On a GPU all, for few and large
/// products; on a CPU one, to save memory.
pub(crate) fn sequences_at_once(device: &Device, sequences: usize) -> usize {
    if device.is_cpu() { 1 } else { sequences.max(1) }
}

/// Parameters of softmax attention besides queries, keys and values.
#[derive(Clone, Copy)]
pub struct SoftmaxAttention<'a> {
    scale: f64,
    window: Window,
    sinks: Option<&'a Tensor>,
    query_block: usize,
    score_values: usize,
    fused_from: usize,
    recorder: MaybeRecorder<'a>,
    first_head: usize,
}

impl<'a> SoftmaxAttention<'a> {
    /// `scale` multiplies the scores. `sinks` are f32 logits, one per query head, that are added
    /// to the denominator.
    pub fn new(scale: f64, window: Window, sinks: Option<&'a Tensor>) -> Self {
        let (query_block, score_values, fused_from) = (QUERY_BLOCK, SCORE_VALUES, FUSED_FROM);
        Self { scale, window, sinks, query_block, score_values, fused_from, recorder: None, first_head: 0 }
    }

    /// The same, where sequences of so many tokens and longer ones are left to a GPU's kernel; see
    /// [`FUSED_FROM`].
    pub fn fused_from(self, fused_from: usize) -> Self {
        Self { fused_from, ..self }
    }

    /// Reports attention weights to `recorder`.
    pub fn recorder(self, recorder: MaybeRecorder<'a>) -> Self {
        Self { recorder, ..self }
    }

    /// Sets the index of the first head.
    pub fn at_head(self, first_head: usize) -> Self {
        Self { first_head, ..self }
    }

    /// Attends with `query` `[sequences, n, heads, d]`, `key` `[sequences * kv_heads, n, d]` and
    /// `value` `[sequences * kv_heads, n, v]`, the latter two contiguous. Returns `[sequences * n,
    /// heads * v]`. Key head j of a sequence serves its query heads `j * heads / kv_heads ..`.
    pub fn mix(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        let (sequences, n, heads, _) = query.dims4()?;
        if n >= self.fused_from && gpu::attends(query, value) {
            return self.mix_at_once(query, key, value);
        }
        let (all_kv_heads, _, v) = value.dims3()?;
        let groups = sequences * heads / all_kv_heads;
        let queries = self.query_block.min(self.score_values / (groups * n)).max(1);
        let blocks = (0..n)
            .step_by(queries)
            .map(|first| self.mix_queries(first, &query.narrow(1, first, queries.min(n - first))?, key, value))
            .collect::<Result<Vec<_>>>()?;
        let mixed = Tensor::cat(&blocks, 1)?.reshape((sequences, heads, n, v))?;
        drop(blocks);
        mixed.transpose(1, 2)?.reshape((sequences * n, heads * v))
    }

    /// By a kernel, which keeps no scores.
    fn mix_at_once(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        let (_, queries, heads, _) = query.dims4()?;
        let recorded = self.recorder.is_some();
        let by = FusedAttention { scale: self.scale, window: self.window, sinks: self.sinks, recorded };
        let (mixed, shares) = gpu::attend(by, query, key, value)?;
        if let (Some(recorder), Some(shares)) = (self.recorder, shares) {
            let block = ScoreBlock { first_query: 0, queries, first_key: 0, window: self.window };
            recorder.record_top_and_first(
                &shares,
                block,
                HeadLayout { before: 0, per_sequence: heads, first: self.first_head },
            )?;
        }
        Ok(mixed)
    }

    /// A block of queries `[sequences, queries, heads, d]`, the first at position `first`, to
    /// `[sequences * heads, queries, v]`.
    fn mix_queries(&self, first: usize, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        let (sequences, queries, heads, d) = query.dims4()?;
        let (all_kv_heads, _, v) = value.dims3()?;
        let groups = sequences * heads / all_kv_heads;
        // The first key that any query of the block sees.
        let first_key = self.window.first_key(first);
        let keys = first + queries - first_key;
        let block = ScoreBlock { first_query: first, queries, first_key, window: self.window };
        let query = query.transpose(1, 2)?.reshape((all_kv_heads, groups * queries, d))?;
        let at_once = (self.score_values / (groups * queries * keys)).clamp(1, all_kv_heads);
        let some_heads = |kv: usize| {
            let count = at_once.min(all_kv_heads - kv);
            let of_heads = |t: &Tensor| t.narrow(0, kv, count)?.narrow(1, first_key, keys);
            let scores = product(&query.narrow(0, kv, count)?, &of_heads(key)?)?;
            let before = kv * groups;
            let sinks = self.sinks.map(|logits| SinkLogits { logits, first_head: before % heads });
            let shares = fused::causal_softmax(scores, block, self.scale, sinks)?;
            if let Some(recorder) = self.recorder {
                recorder.record(&shares, block, HeadLayout { before, per_sequence: heads, first: self.first_head })?;
            }
            product(&shares, &of_heads(value)?.t()?)?.reshape((count * groups, queries, v))
        };
        let mixed = (0..all_kv_heads).step_by(at_once).map(some_heads).collect::<Result<Vec<_>>>()?;
        // Memory plans do not include a copy of the queries.
        drop(query);
        Tensor::cat(&mixed, 0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::naive::{self, Random};
    use super::*;
    use crate::model::decoder::NormKind;
    use crate::model::rope::{Pairing, RopeScaling, RopeSpec};

    /// Attention without options: 3 query heads on 1 key head, 6 wide.
    fn plain() -> AttentionSpec {
        AttentionSpec::plain(3, 1, 6)
    }

    fn rope(dims: usize, pairing: Pairing) -> RopeSpec {
        RopeSpec { theta: 50.0, dims, pairing, scaling: RopeScaling::None }
    }

    const HIDDEN: usize = 10;

    fn weights(spec: &AttentionSpec, random: &mut Random) -> AttentionWeights {
        let (width, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let queries = if spec.output_gate == OutputGate::WithQuery { 2 * width } else { width };
        let mut linear = |rows: usize, columns: usize, bias: bool| {
            Linear::new(random.tensor(&[rows, columns]), bias.then(|| random.tensor(&[rows])))
        };
        let projections = if spec.fused_qkv {
            Projections::Fused(linear(queries + 2 * kv, HIDDEN, spec.qkv_bias))
        } else if spec.key_is_value {
            let query = linear(queries, HIDDEN, spec.qkv_bias);
            Projections::KeyIsValue { query, key: linear(kv, HIDDEN, spec.qkv_bias) }
        } else {
            Projections::Separate {
                query: linear(queries, HIDDEN, spec.qkv_bias),
                key: linear(kv, HIDDEN, spec.qkv_bias),
                value: linear(kv, HIDDEN, spec.qkv_bias),
            }
        };
        let output = linear(HIDDEN, width, spec.output_bias);
        let gate = (spec.output_gate == OutputGate::Separate).then(|| linear(width, HIDDEN, false));
        let mut norms = |spec, [query, key]: [usize; 2]| {
            let mut norm = |width| Norm::new(spec, random.tensor(&[width]), None).unwrap();
            (norm(query), norm(key))
        };
        let qk_norm = match spec.qk_norm {
            QkNorm::None | QkNorm::AfterRope { .. } => None,
            QkNorm::WholeProjection(norm) => Some(norms(norm, [width, kv])),
            QkNorm::PerHead(norm) => Some(norms(norm, [spec.head_dim; 2])),
        };
        let sinks = spec.sinks.then(|| random.tensor(&[spec.heads]));
        AttentionWeights { projections, output, qk_norm, sinks, gate }
    }

    fn check(spec: &AttentionSpec, sequences: usize, positions: usize) {
        let mut random = Random::new(7);
        let weights = weights(spec, &mut random);
        let x = random.tensor(&[sequences * positions, HIDDEN]);
        let table = spec.rope.as_ref().map(|rope| rope.table(positions, &Device::Cpu).unwrap());
        let got = attention(spec, &weights, table.as_ref(), &x, positions, None).unwrap();
        naive::assert_close(&got, &naive::attention(spec, &weights, &x, positions), 2e-5);
    }

    #[test]
    fn each_attention_feature_equals_its_definition() {
        check(&plain(), 2, 11);
        check(&AttentionSpec { fused_qkv: true, qkv_bias: true, output_bias: true, ..plain() }, 2, 5);
        check(&AttentionSpec { heads: 6, kv_heads: 2, clip_qkv: Some(0.8), ..plain() }, 1, 9);
        for norm in [NormSpec::rms(1e-5), NormSpec { kind: NormKind::RmsZeroCentred, eps: 0.1 }] {
            check(&AttentionSpec { qk_norm: QkNorm::WholeProjection(norm), ..plain() }, 2, 7);
            check(
                &AttentionSpec { qk_norm: QkNorm::PerHead(norm), rope: Some(rope(6, Pairing::Halves)), ..plain() },
                2,
                7,
            );
        }
        for pairing in [Pairing::Halves, Pairing::Interleaved] {
            for dims in [6, 4, 2] {
                check(&AttentionSpec { rope: Some(rope(dims, pairing)), ..plain() }, 2, 13);
            }
        }
        // Wide enough to show the order of norm and rotation: a rotation preserves the norm of a
        // whole head, not of a part.
        let after = QkNorm::AfterRope { eps: 0.5 };
        check(&AttentionSpec { qk_norm: after, rope: Some(rope(6, Pairing::Interleaved)), ..plain() }, 2, 13);
        for window in [1, 2, 5, 12, 13, 40].into_iter().flat_map(|n| [Window::Sliding(n), Window::Chunked(n)]) {
            check(&AttentionSpec { window, sinks: true, ..plain() }, 2, 13);
        }
        check(&AttentionSpec { sinks: true, kv_heads: 3, ..plain() }, 2, 13);
        check(&AttentionSpec { output_gate: OutputGate::WithQuery, kv_heads: 3, ..plain() }, 2, 6);
        check(&AttentionSpec { output_gate: OutputGate::WithQuery, fused_qkv: true, ..plain() }, 2, 6);
        check(&AttentionSpec { output_gate: OutputGate::Separate, kv_heads: 3, ..plain() }, 2, 6);
        check(&AttentionSpec { scale: Some(0.3), value_norm: Some(0.2), ..plain() }, 2, 6);
        let rotated = AttentionSpec { rope: Some(rope(6, Pairing::Halves)), key_is_value: true, ..plain() };
        check(&rotated, 2, 6);
        let qk_norm = QkNorm::PerHead(NormSpec::rms(1e-5));
        check(&AttentionSpec { qk_norm, value_norm: Some(1e-5), ..rotated }, 2, 6);
        check(&AttentionSpec { temperature: Some(Temperature { scale: 0.1, floor: 4.0 }), ..plain() }, 2, 13);
        check(&AttentionSpec { temperature: Some(Temperature { scale: 0.1, floor: 8192.0 }), ..plain() }, 2, 13);
    }

    #[test]
    fn attention_temperature_depends_on_the_position() {
        let temperature = Temperature { scale: 0.1, floor: 4.0 };
        assert_eq!([0, 1, 2].map(|position| temperature.factor(position)), [1.0; 3]);
        assert!((temperature.factor(3) - (1.0 + 0.1 * 2f32.ln())).abs() < 1e-7);
        assert_eq!(temperature.factor(3), temperature.factor(6));
        assert!((temperature.factor(7) - (1.0 + 0.1 * 3f32.ln())).abs() < 1e-7);
    }

    fn specs() -> impl Strategy<Value = AttentionSpec> {
        let norm = NormSpec::rms(1e-5);
        let qk_norm = prop_oneof![
            Just(QkNorm::None),
            Just(QkNorm::WholeProjection(norm)),
            Just(QkNorm::PerHead(norm)),
            Just(QkNorm::AfterRope { eps: 1e-5 }),
        ];
        let window = prop_oneof![
            Just(Window::Full),
            (1..50usize).prop_map(Window::Sliding),
            (1..50usize).prop_map(Window::Chunked)
        ];
        let pairing = prop_oneof![Just(Pairing::Halves), Just(Pairing::Interleaved)];
        let shape = (1..4usize, 1..6usize, 1..5usize);
        let rotation = proptest::option::of((pairing, any::<prop::sample::Index>()));
        let temperature = proptest::option::of((0.0..0.5f64, 1.0..20.0f64));
        let values = (proptest::option::of(0.1..2.0f64), proptest::option::of(Just(1e-5)), any::<[bool; 2]>());
        (shape, qk_norm, window, rotation, temperature, any::<[bool; 5]>(), values).prop_map(
            |((kv_heads, groups, half_dim), qk_norm, window, rotation, temperature, switches, values)| {
                let [fused_qkv, qkv_bias, output_bias, sinks, is_gated] = switches;
                let (scale, value_norm, [key_is_value, with_query]) = values;
                let output_gate = match (is_gated, with_query) {
                    (false, _) => OutputGate::None,
                    (true, true) => OutputGate::WithQuery,
                    (true, false) => OutputGate::Separate,
                };
                AttentionSpec {
                    heads: kv_heads * groups,
                    kv_heads,
                    head_dim: 2 * half_dim,
                    fused_qkv,
                    qk_norm,
                    qkv_bias,
                    output_bias,
                    rope: rotation.map(|(pairing, pairs)| rope(2 * (1 + pairs.index(half_dim)), pairing)),
                    window,
                    sinks,
                    output_gate,
                    scale,
                    value_norm,
                    key_is_value: key_is_value && !fused_qkv,
                    temperature: temperature.map(|(scale, floor)| Temperature { scale, floor }),
                    clip_qkv: None,
                }
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_combination_of_features_equals_the_definition(
            spec in specs(), sequences in 1..3usize, positions in 1..45usize,
        ) {
            check(&spec, sequences, positions);
        }

        #[test]
        fn block_size_changes_no_result(
            window in prop_oneof![
                Just(Window::Full),
                (1..70usize).prop_map(Window::Sliding),
                (1..70usize).prop_map(Window::Chunked)
            ],
            n in 1..60usize,
            sequences in 1..4usize,
            query_block in 1..20usize,
            score_values in 1..6000usize,
        ) {
            let mut random = Random::new(n as u64);
            // 15 query heads on 5 key heads; values are wider than keys.
            let (query, kv_heads) = (random.tensor(&[sequences, n, 15, 4]), 5 * sequences);
            let (key, value) = (random.tensor(&[kv_heads, n, 4]), random.tensor(&[kv_heads, n, 7]));
            let sinks = random.tensor(&[15]);
            let whole = SoftmaxAttention::new(0.7, window, Some(&sinks));
            let blocked = SoftmaxAttention { query_block, score_values, ..SoftmaxAttention::new(0.7, window, Some(&sinks)) };
            let expected = naive::rows(&whole.mix(&query, &key, &value).unwrap());
            // Products of one row are summed in another order than those of many: differences of
            // some 1e-7 for values near 1, and averages have an RMS of a tenth.
            naive::assert_close(&blocked.mix(&query, &key, &value).unwrap(), &expected, 4e-6);
        }

        #[test]
        fn batched_sequences_equal_single_ones(
            n in 1..40usize, sequences in 1..5usize, score_values in 1..9000usize, window in 1..50usize,
        ) {
            let mut random = Random::new(n as u64);
            let query = random.tensor(&[sequences, n, 6, 4]);
            let (key, value) = (random.tensor(&[2 * sequences, n, 4]), random.tensor(&[2 * sequences, n, 5]));
            let sinks = random.tensor(&[6]);
            let mixing = |recorder| {
                let mixing = SoftmaxAttention::new(0.7, Window::Sliding(window), Some(&sinks)).at_head(3).recorder(Some(recorder));
                SoftmaxAttention { query_block: 7, score_values, ..mixing }
            };
            let (together, alone) = (AttentionRecorder::new(true, true), AttentionRecorder::new(true, true));
            let mixed = naive::rows(&mixing(&together).mix(&query, &key, &value).unwrap());
            for sequence in 0..sequences {
                alone.at_sequence(sequence);
                let of_heads = |t: &Tensor| t.narrow(0, 2 * sequence, 2).unwrap();
                let query = query.narrow(0, sequence, 1).unwrap();
                let one = naive::rows(&mixing(&alone).mix(&query, &of_heads(&key), &of_heads(&value)).unwrap());
                prop_assert_eq!(&one[..], &mixed[sequence * n..][..n]);
            }
            prop_assert_eq!(together.first_key(), alone.first_key());
            prop_assert_eq!(together.top().count, alone.top().count);
            prop_assert!((together.top().sum - alone.top().sum).abs() < 1e-9 * (1.0 + alone.top().sum));
        }
    }

    #[test]
    fn shares_of_one_kernel_are_kept_like_those_of_blocks() {
        let block = ScoreBlock { first_query: 0, queries: 3, first_key: 0, window: Window::Sliding(2) };
        // Two sequences of two heads.
        let shares = Random::new(1).tensor(&[4, 3, 3]).abs().unwrap();
        let pairs = [shares.max_keepdim(2).unwrap(), shares.narrow(2, 0, 1).unwrap()];
        let heads = HeadLayout { before: 0, per_sequence: 2, first: 1 };
        let (blocks, kernel) = (AttentionRecorder::new(true, true), AttentionRecorder::new(true, true));
        blocks.record(&shares, block, heads).unwrap();
        kernel.record_top_and_first(&Tensor::cat(&pairs, 2).unwrap(), block, heads).unwrap();
        assert_eq!((kernel.top(), kernel.first_key()), (blocks.top(), blocks.first_key()));
        assert_eq!((kernel.top().count, kernel.first_key().len()), (12, 2));
    }

    #[test]
    fn keys_outside_the_window_are_not_read() {
        let mut random = Random::new(5);
        let (query, key, value) =
            (random.tensor(&[1, 12, 2, 3]), random.tensor(&[1, 12, 3]), random.tensor(&[1, 12, 3]));
        // Every value that is multiplied by a NaN becomes NaN, also if its weight is 0.
        let spoil = |t: Tensor| {
            let nan = Tensor::full(f32::NAN, (1, 2, 3), &Device::Cpu).unwrap();
            Tensor::cat(&[nan, t.narrow(1, 2, 10).unwrap()], 1).unwrap()
        };
        let (key, value) = (spoil(key), spoil(value));
        for window in [Window::Sliding(3), Window::Chunked(4)] {
            let mixing = SoftmaxAttention { query_block: 4, ..SoftmaxAttention::new(1.0, window, None) };
            let mixed = naive::rows(&mixing.mix(&query, &key, &value).unwrap());
            let spoilt: Vec<bool> = mixed.iter().map(|row| row.iter().any(|v| v.is_nan())).collect();
            assert_eq!(spoilt, [vec![true; 4], vec![false; 8]].concat());
        }
    }

    #[test]
    fn low_precision_is_close_to_f32() {
        let spec = AttentionSpec {
            qk_norm: QkNorm::PerHead(NormSpec::rms(1e-5)),
            rope: Some(rope(4, Pairing::Interleaved)),
            window: Window::Sliding(5),
            sinks: true,
            output_gate: OutputGate::WithQuery,
            temperature: Some(Temperature { scale: 0.1, floor: 2.0 }),
            ..plain()
        };
        let mut random = Random::new(3);
        let mut weights = weights(&spec, &mut random);
        let x = random.tensor(&[9, HIDDEN]);
        let expected = naive::attention(&spec, &weights, &x, 9);
        let bf16 = |t: &Tensor| t.to_dtype(DType::BF16).unwrap();
        let Projections::Separate { query, key, value } = &mut weights.projections else { unreachable!() };
        for linear in [query, key, value, &mut weights.output] {
            linear.weight = bf16(&linear.weight);
        }
        let norm = |norm: &Norm| Norm::new(NormSpec::rms(1e-5), bf16(norm.gain()), None).unwrap();
        weights.qk_norm = weights.qk_norm.map(|(query, key)| (norm(&query), norm(&key)));
        let table = spec.rope.as_ref().map(|rope| rope.table(9, &Device::Cpu).unwrap());
        let got = attention(&spec, &weights, table.as_ref(), &bf16(&x), 9, None).unwrap();
        assert_eq!(got.dtype(), DType::BF16);
        naive::assert_close(&got, &expected, 0.05);
    }
}
