//! Feed-forward blocks: MLPs, and mixtures of routed experts.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use crate::blocks::norm::Norm;
use crate::device::gpu::{self, Load, Positions, SortedPairs};
use crate::kernels::fused::{self, Activation, Gate};
use crate::kernels::product::{self, Linear};
use crate::model::decoder::{GateUp, MlpKind, MoeSpec, RouterSpec};

/// A feed-forward's tensors on one device.
pub struct MlpWeights {
    /// Gating and activation.
    pub kind: MlpKind,
    /// Projections from `hidden` to `intermediate`.
    pub gate_up: GateUpProj,
    /// `[hidden, intermediate]`.
    pub down: Linear,
}

/// Projections to the inner width.
pub enum GateUpProj {
    /// Only `up_proj`, `[intermediate, hidden]`.
    Up(Linear),
    /// `gate_proj` and `up_proj`, `[intermediate, hidden]` each.
    Separate {
        /// The gate projection.
        gate: Linear,
        /// The up projection.
        up: Linear,
    },
    /// Both in one matrix, `[2 * intermediate, hidden]`.
    Joined(Linear),
}

impl GateUpProj {
    /// The gate projection, the one without a gate or both in one; the up projection beside it.
    fn matrices(&self) -> (&Linear, Option<&Linear>) {
        match self {
            Self::Up(one) | Self::Joined(one) => (one, None),
            Self::Separate { gate, up } => (gate, Some(up)),
        }
    }
}

impl MlpWeights {
    /// Applies the MLP to `x` `[rows, hidden]`; same output shape.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        apply_each(&[self], x, &[x.dim(0)?])
    }

    /// From what both projections made to the inner width; without one beside the first, `up` is
    /// `None`.
    fn inner(&self, first: Tensor, up: Option<Tensor>) -> Result<Tensor> {
        match (&self.gate_up, up) {
            (GateUpProj::Joined(_), _) => fused::gated_joined(&first, self.is_interleaved(), self.gate()),
            (_, Some(up)) => fused::gated(first, &up, self.gate()),
            (_, None) => {
                let how = match self.kind {
                    MlpKind::Relu => Activation::Relu,
                    MlpKind::ReluSquared => Activation::ReluSquared,
                    _ => Activation::GeluTanh,
                };
                fused::activated(first, how)
            }
        }
    }

    /// All matrices.
    fn matrices(&self) -> impl Iterator<Item = &Linear> {
        let (first, up) = self.gate_up.matrices();
        [first, &self.down].into_iter().chain(up)
    }

    fn gate(&self) -> Gate {
        match self.kind {
            MlpKind::ClampedSwiglu { limit, alpha, .. } => Gate::Clamped { limit: limit as f32, alpha: alpha as f32 },
            MlpKind::Geglu(_) => Gate::GeluTanh,
            MlpKind::Relu | MlpKind::ReluSquared | MlpKind::GeluTanh | MlpKind::Swiglu(_) => Gate::Silu,
        }
    }

    fn is_interleaved(&self) -> bool {
        let stored = match self.kind {
            MlpKind::Swiglu(stored) | MlpKind::Geglu(stored) | MlpKind::ClampedSwiglu { stored, .. } => stored,
            MlpKind::Relu | MlpKind::ReluSquared | MlpKind::GeluTanh => return false,
        };
        stored == GateUp::Interleaved
    }
}

/// The shared expert's tensors.
pub struct SharedWeights {
    /// Its feed-forward.
    pub mlp: MlpWeights,
    /// Shape `[1, hidden]`: the expert's gate, if it has one.
    pub gate: Option<Linear>,
}

impl SharedWeights {
    /// Applies the expert to `x` `[rows, hidden]`; same output shape.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let out = self.mlp.apply(x)?;
        let Some(gate) = &self.gate else { return Ok(out) };
        let logit = gate.apply(x)?.to_dtype(DType::F32)?;
        let share = (logit.neg()?.exp()? + 1.0)?.recip()?;
        out.broadcast_mul(&share.to_dtype(out.dtype())?)
    }
}

/// A router's tensors.
pub struct Router {
    /// `[experts, hidden]`.
    pub logits: Linear,
    /// Norm of its input, in f32.
    pub input: Option<Norm>,
    /// Shape `[experts]` in f32: added to the scores for the choice, or a factor of the weights.
    pub per_expert: Option<Tensor>,
}

/// A dense MLP beside a mixture, and the norms around both.
pub struct ParallelMlp {
    /// The MLP.
    pub mlp: MlpWeights,
    /// Norm of its output.
    pub norm: Norm,
    /// Norm of the experts' input.
    pub experts: Norm,
}

/// Chosen experts of each token.
#[derive(Clone, Debug)]
pub enum Choices {
    /// On the host.
    Host(Routing),
    /// On a GPU.
    Gpu(GpuRouting),
}

/// Chosen experts of each token, on a GPU.
#[derive(Clone, Debug)]
pub struct GpuRouting {
    /// As in [`Routing`], `[rows, top_k]`.
    pub experts: Tensor,
    /// As in [`Routing`], `[rows, top_k]`.
    pub weights: Tensor,
    /// As in [`Routing`].
    pub scales_input: bool,
    /// Statistics per expert, if they are observed; filled by [`Routed::wait`].
    pub loads: Vec<Load>,
}

impl Choices {
    /// Whether the weights multiply the experts' inputs instead of their outputs.
    pub fn scales_input(&self) -> bool {
        match self {
            Self::Host(routing) => routing.scales_input,
            Self::Gpu(routing) => routing.scales_input,
        }
    }

    /// The choices on the host; a GPU's are copied.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn on_host(&self) -> Result<Cow<'_, Routing>> {
        let GpuRouting { experts, weights, scales_input, .. } = match self {
            Self::Host(routing) => return Ok(Cow::Borrowed(routing)),
            Self::Gpu(routing) => routing,
        };
        Ok(Cow::Owned(Routing {
            top_k: experts.dim(1)?,
            experts: experts.flatten_all()?.to_vec1()?,
            weights: weights.flatten_all()?.to_vec1()?,
            scales_input: *scales_input,
        }))
    }
}

/// Chosen experts of each token, with their weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    /// Experts per token.
    pub top_k: usize,
    /// Shape `[rows, top_k]`: expert indices, ascending within a row.
    pub experts: Vec<u32>,
    /// Shape `[rows, top_k]`, in the same order: factors of the expert's output, or of its input.
    pub weights: Vec<f32>,
    /// Whether the weights multiply the experts' inputs (Llama 4) instead of their outputs.
    pub scales_input: bool,
}

impl Routing {
    /// The pairs of token and expert sorted by expert, of `experts` in total.
    pub fn by_expert(&self, experts: usize) -> ByExpert {
        let mut firsts = vec![0; experts + 1];
        for expert in &self.experts {
            firsts[*expert as usize + 1] += 1;
        }
        let mut before = 0;
        for first in &mut firsts {
            before += *first;
            *first = before;
        }
        let mut next = firsts.clone();
        let (mut rows, mut weights) = (vec![0; self.experts.len()], vec![0.0; self.experts.len()]);
        for (i, (expert, weight)) in self.experts.iter().zip(&self.weights).enumerate() {
            let at = &mut next[*expert as usize];
            (rows[*at], weights[*at]) = ((i / self.top_k) as u32, *weight);
            *at += 1;
        }
        ByExpert { firsts, rows, weights, scales_input: self.scales_input }
    }
}

/// Pairs of token and expert, sorted by expert.
#[derive(Clone, Debug, PartialEq)]
pub struct ByExpert {
    /// Index of each expert's first pair, then the number of pairs.
    firsts: Vec<usize>,
    /// Token indices, ascending within an expert.
    rows: Vec<u32>,
    /// Gate weights, in the same order.
    weights: Vec<f32>,
    /// As in [`Routing`].
    scales_input: bool,
}

impl ByExpert {
    /// Rows routed to one expert, ascending, with their weights.
    pub fn of(&self, expert: usize) -> (&[u32], &[f32]) {
        let range = self.range(&(expert..expert + 1));
        (&self.rows[range.clone()], &self.weights[range])
    }

    /// Indices of the pairs of some experts.
    fn range(&self, experts: &Range<usize>) -> Range<usize> {
        self.firsts[experts.start]..self.firsts[experts.end]
    }
}

/// Routes `x` `[rows, hidden]`. Logits are computed in f32.
pub fn route(spec: RouterSpec, top_k: usize, router: &Router, x: &Tensor) -> Result<Choices> {
    let wide = |t: &Tensor| t.to_dtype(DType::F32);
    let bias = router.logits.bias.as_ref().map(wide).transpose()?;
    let x = wide(x)?;
    let x = router.input.as_ref().map_or(Ok(x.clone()), |norm| norm.apply(&x))?;
    router.logits.observe_input(&x)?;
    let logits = Linear::new(router.logits.weight.clone(), bias).apply(&x)?;
    choices(spec, top_k, &logits, router.per_expert.as_ref())
}

/// Chooses experts by `logits` `[rows, experts]` in f32, on their device. `per_expert` as in
/// [`Router`].
pub fn choices(spec: RouterSpec, top_k: usize, logits: &Tensor, per_expert: Option<&Tensor>) -> Result<Choices> {
    let scales_input = spec == RouterSpec::SigmoidOfInput;
    if logits.device().is_cuda() {
        let (experts, weights) = gpu::choose_experts(spec, top_k, logits, per_expert)?;
        return Ok(Choices::Gpu(GpuRouting { experts, weights, scales_input, loads: Vec::new() }));
    }
    let (rows, experts) = logits.dims2()?;
    let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
    let per_expert: Vec<f32> = per_expert.map_or_else(|| Ok(vec![0.0; experts]), Tensor::to_vec1)?;
    let mut routing = Routing { top_k, experts: vec![0; rows * top_k], weights: vec![0.0; rows * top_k], scales_input };
    let chosen = routing.experts.par_chunks_mut(top_k).zip(routing.weights.par_chunks_mut(top_k));
    chosen.zip(logits.par_chunks(experts)).for_each(|((experts, weights), logits)| {
        choose(spec, logits, &per_expert, experts, weights);
    });
    Ok(Choices::Host(routing))
}

/// Chooses for one row: fills `experts` and `weights`, in ascending order of experts.
fn choose(spec: RouterSpec, logits: &[f32], per_expert: &[f32], experts: &mut [u32], weights: &mut [f32]) {
    let sigmoid = |x: f32| 1.0 / (1.0 + exp(-x));
    match spec {
        RouterSpec::SoftmaxTopK { normalise } => {
            let shares = softmax(logits);
            top_k(&shares, experts);
            fill(weights, experts, |e| shares[e]);
            if normalise {
                scale_to(weights, 1.0, 0.0);
            }
        }
        RouterSpec::TopKSoftmax => {
            top_k(logits, experts);
            let top = experts.iter().map(|e| logits[*e as usize]).fold(f32::NEG_INFINITY, f32::max);
            fill(weights, experts, |e| exp(logits[e] - top));
            scale_to(weights, 1.0, 0.0);
        }
        RouterSpec::SigmoidGroups { groups, top_groups, normalise, scale } => {
            let scores: Vec<f32> = logits.iter().map(|l| sigmoid(*l)).collect();
            let mut biased: Vec<f32> = scores.iter().zip(per_expert).map(|(s, b)| s + b).collect();
            if top_groups < groups {
                exclude_groups(&mut biased, groups, top_groups, best_two);
            }
            top_k(&biased, experts);
            fill(weights, experts, |e| scores[e]);
            if normalise {
                scale_to(weights, scale as f32, 1e-20);
            } else {
                weights.iter_mut().for_each(|w| *w *= scale as f32);
            }
        }
        RouterSpec::SigmoidOfInput => {
            top_k(logits, experts);
            fill(weights, experts, |e| sigmoid(logits[e]));
        }
        RouterSpec::SoftmaxGroups { groups, top_groups, scale } => {
            let shares = softmax(logits);
            let mut chosen_from = shares.clone();
            if top_groups < groups {
                exclude_groups(&mut chosen_from, groups, top_groups, best);
            }
            top_k(&chosen_from, experts);
            fill(weights, experts, |e| shares[e] * scale as f32);
        }
        RouterSpec::NormedSoftmax { .. } => {
            let shares = softmax(logits);
            top_k(&shares, experts);
            fill(weights, experts, |e| shares[e]);
            scale_to(weights, 1.0, 0.0);
            weights.iter_mut().zip(&*experts).for_each(|(w, e)| *w *= per_expert[*e as usize]);
        }
    }
}

/// e^x by f64 operations that give the same bits on a GPU (`route.cu`), rounded at the end: 2^(k /
/// 32) times a polynomial, as in C libraries.
fn exp(x: f32) -> f32 {
    const SHIFT: f64 = 6_755_399_441_055_744.0;
    /// 2^(1 / 32), and its squares.
    const ROOTS: [f64; 5] =
        [1.0218971486541166, 1.0442737824274138, 1.0905077326652577, 1.189207115002721, std::f64::consts::SQRT_2];
    if x.is_nan() {
        return x;
    }
    if x < -103.97208 {
        return 0.0;
    }
    if x > 88.72283 {
        return f32::INFINITY;
    }
    let z = f64::from(x) * 46.16624130844683;
    // Its last bits are those of the nearest integer.
    let shifted = z + SHIFT;
    let k = shifted.to_bits() as u32 as i32;
    let r = z - (shifted - SHIFT);
    let roots = ROOTS.iter().enumerate().filter(|(bit, _)| k >> bit & 1 == 1);
    let scale: f64 = roots.fold(1.0, |scale, (_, root)| scale * root);
    let scale = scale * f64::from_bits((i64::from((k >> 5) + 1023) as u64) << 52);
    let (high, low) = (1.6938359250920212e-6 * r + 0.00023459809789509004, 0.021660849396613134 * r + 1.0);
    ((high * (r * r) + low) * scale) as f32
}

/// Sort key of scores. NaN of either sign is larger than all numbers.
fn key(score: f32) -> u32 {
    let bits = score.to_bits();
    match score.is_nan() {
        true => u32::MAX,
        false if bits >> 31 == 1 => !bits,
        false => bits | 1 << 31,
    }
}

/// Softmax over all experts.
fn softmax(logits: &[f32]) -> Vec<f32> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut shares: Vec<f32> = logits.iter().map(|l| exp(l - top)).collect();
    let sum: f32 = shares.iter().sum();
    shares.iter_mut().for_each(|share| *share /= sum);
    shares
}

/// The experts with the best scores, ascending; ties go to the lower index. NaN is chosen first,
/// so that it shows in the output.
fn top_k(scores: &[f32], experts: &mut [u32]) {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    let best_first = |a: &u32, b: &u32| key(scores[*b as usize]).cmp(&key(scores[*a as usize])).then(a.cmp(b));
    if experts.len() < order.len() {
        order.select_nth_unstable_by(experts.len() - 1, best_first);
    }
    experts.copy_from_slice(&order[..experts.len()]);
    experts.sort_unstable();
}

fn fill(weights: &mut [f32], experts: &[u32], weight: impl Fn(usize) -> f32) {
    for (w, e) in weights.iter_mut().zip(experts) {
        *w = weight(*e as usize);
    }
}

/// Divides by the sum (plus `eps`) and multiplies by `scale`.
fn scale_to(weights: &mut [f32], scale: f32, eps: f32) {
    let sum: f32 = weights.iter().sum::<f32>() + eps;
    weights.iter_mut().for_each(|w| *w = *w / sum * scale);
}

/// The best score of a group.
fn best(group: &[f32]) -> f32 {
    group.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The sum of its two best scores.
fn best_two(group: &[f32]) -> f32 {
    let (first, second) = group
        .iter()
        .fold((f32::NEG_INFINITY, f32::NEG_INFINITY), |(a, b), &s| if s > a { (s, a) } else { (a, b.max(s)) });
    if group.len() > 1 { first + second } else { first }
}

/// Excludes the experts outside the `top_groups` best groups.
fn exclude_groups(biased: &mut [f32], groups: usize, top_groups: usize, judge: fn(&[f32]) -> f32) {
    let size = biased.len() / groups;
    let judged: Vec<f32> = biased.chunks(size).map(judge).collect();
    let mut kept = vec![0; top_groups];
    top_k(&judged, &mut kept);
    for (group, scores) in biased.chunks_mut(size).enumerate() {
        if !kept.contains(&(group as u32)) {
            scores.fill(f32::NEG_INFINITY);
        }
    }
}

/// Rows of an expert that is chosen 1.5 times as often as the average, of so many tokens.
pub fn usual_rows(moe: &MoeSpec, tokens: usize) -> usize {
    (3 * tokens * moe.top_k).div_ceil(2 * moe.experts)
}

/// Rows of neighbouring experts that are gathered at once on a GPU, of a group of so many in a wave
/// of so many tokens: what is usual, but no fewer than may go to a single expert.
pub fn gathered_rows(moe: &MoeSpec, tokens: usize, experts: usize) -> usize {
    (usual_rows(moe, tokens) * experts).max(tokens).min(tokens * moe.top_k.min(experts))
}

/// Cuts neighbours, each given by its number of rows, into runs of no more than `max_rows` rows.
/// One that has more is alone.
pub fn runs(rows: &[usize], max_rows: usize) -> Vec<Range<usize>> {
    let (mut runs, mut first, mut together) = (Vec::new(), 0, 0);
    for (at, rows) in rows.iter().enumerate() {
        if at > first && together + rows > max_rows {
            runs.push(first..at);
            (first, together) = (at, 0);
        }
        together += rows;
    }
    if first < rows.len() {
        runs.push(first..rows.len());
    }
    runs
}

/// A micro-batch on its way through the experts of a layer.
///
/// On a CPU the rows of each expert are gathered separately. On a GPU, where starting an operation
/// costs more than an expert's rows, all rows of a group of experts are gathered at once. Both add
/// to a token in ascending order of its experts, and round in the same way.
pub struct Routed {
    /// `[tokens, width]`.
    x: Tensor,
    choices: Choices,
    pairs: Pairs,
    /// Shape `[tokens, width]`: the output beside the experts plus the experts so far.
    out: Tensor,
}

/// Pairs of token and expert, sorted by expert.
enum Pairs {
    Host(ByExpert),
    Gpu(SortedPairs),
}

/// Choices of a micro-batch, sorted by expert. A GPU starts to copy the number of rows per expert
/// to the host. What is submitted between this and [`Routed::wait`] is computed during the copy.
pub struct SortedChoices {
    choices: Choices,
    pairs: Pairs,
}

impl SortedChoices {
    /// Sorts the choices among `experts`. Statistics per expert are collected if `positions` is
    /// given.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn new(choices: Choices, experts: usize, positions: Option<Positions>) -> Result<Self> {
        let pairs = match &choices {
            Choices::Host(routing) => Pairs::Host(routing.by_expert(experts)),
            Choices::Gpu(of) => Pairs::Gpu(gpu::sort_pairs(&of.experts, &of.weights, experts, positions)?),
        };
        Ok(Self { choices, pairs })
    }
}

impl Routed {
    /// Routes `x` `[tokens, width]` to experts by `sorted`. Outputs are added to `out`
    /// `[tokens, width]` (its storage is overwritten).
    pub fn new(x: Tensor, sorted: SortedChoices, out: Tensor) -> Self {
        let SortedChoices { choices, pairs } = sorted;
        Self { x, choices, pairs, out }
    }

    /// Waits until the number of rows per expert is known. Returns the choices. Call it before the
    /// first expert.
    pub fn wait(&mut self) -> Result<&Choices> {
        if let (Pairs::Gpu(pairs), Choices::Gpu(routing)) = (&mut self.pairs, &mut self.choices) {
            routing.loads = pairs.wait()?;
        }
        Ok(&self.choices)
    }

    /// Number of rows routed to an expert; after [`wait`](Self::wait).
    pub fn sent(&self, expert: usize) -> usize {
        let expert = expert..expert + 1;
        match &self.pairs {
            Pairs::Host(pairs) => pairs.range(&expert).len(),
            Pairs::Gpu(pairs) => pairs.range(&expert).len(),
        }
    }

    /// An expert's output for its rows, `[rows, width]`, with the rows, for the observer.
    pub fn rows(&self, expert: usize, out: &Tensor) -> Result<ExpertRows> {
        let (rows, weights) = match &self.pairs {
            Pairs::Host(pairs) => pairs.of(expert),
            Pairs::Gpu(pairs) => pairs.on_host(&pairs.range(&(expert..expert + 1)))?,
        };
        Ok(ExpertRows { out: out.clone(), rows: rows.to_vec(), weights: weights.to_vec() })
    }

    /// Adds an expert's output. Experts come in ascending order.
    pub fn add(&mut self, expert: usize, made: &Tensor) -> Result<()> {
        let scaled = !self.choices.scales_input();
        match &self.pairs {
            Pairs::Host(pairs) => self.out = add_expert(self.out.clone(), pairs, expert, made)?,
            Pairs::Gpu(pairs) => pairs.add(&self.out, made, &pairs.range(&(expert..expert + 1)), scaled)?,
        }
        Ok(())
    }

    /// The sum, after the last expert.
    pub fn finish(self) -> Tensor {
        self.out
    }
}

/// Inputs of a group of experts from the micro-batches of a wave.
pub struct Inputs {
    /// On a GPU, `[rows, width]`, expert by expert, and within an expert micro-batch by
    /// micro-batch.
    all: Option<Tensor>,
    /// Index of the first expert.
    first: usize,
    /// Per expert, the first row of each micro-batch.
    places: Vec<Vec<usize>>,
}

impl Inputs {
    /// Gathers the inputs on a GPU. On a CPU each expert's inputs are gathered separately.
    pub fn new(wave: &[&Routed], group: &Range<usize>) -> Result<Self> {
        let (mut places, mut rows) = (Vec::with_capacity(group.len()), 0);
        for expert in group.clone() {
            let mut of_expert = Vec::with_capacity(wave.len());
            for routed in wave {
                of_expert.push(rows);
                rows += routed.sent(expert);
            }
            places.push(of_expert);
        }
        let all = match wave.first() {
            Some(Routed { x, pairs: Pairs::Gpu(_), .. }) if rows > 0 => Some(gpu::gathered_like(x, rows)?),
            _ => None,
        };
        for (batch, routed) in wave.iter().enumerate() {
            if let (Some(all), Pairs::Gpu(pairs)) = (&all, &routed.pairs) {
                let places = places.iter().map(|of_expert| of_expert[batch]).collect();
                pairs.gather(all, &routed.x, group, places, routed.choices.scales_input())?;
            }
        }
        Ok(Self { all, first: group.start, places })
    }

    /// What goes to experts of the group, `[rows, width]`, in neighbouring pieces of a wave.
    pub fn gather(&self, wave: &[&Routed], pieces: &[ExpertBatch]) -> Result<Tensor> {
        if let (Some(all), [ExpertBatch { expert, sent }, ..]) = (&self.all, pieces)
            && let [(batch, _), ..] = sent[..]
        {
            let rows = pieces.iter().map(ExpertBatch::rows).sum();
            return all.narrow(0, self.places[expert - self.first][batch], rows);
        }
        let mut parts = Vec::new();
        for ExpertBatch { expert, sent } in pieces {
            for (batch, _) in sent {
                let Routed { x, pairs, .. } = wave[*batch];
                if let Pairs::Host(pairs) = pairs {
                    parts.push(gather(x, pairs, *expert)?);
                }
            }
        }
        Tensor::cat(&parts, 0)
    }
}

/// Gathers the rows of `x` `[all rows, hidden]` that are routed to an expert, multiplied by their
/// weights if these are applied to the input.
fn gather(x: &Tensor, pairs: &ByExpert, expert: usize) -> Result<Tensor> {
    let (rows, weights) = pairs.of(expert);
    let index = Tensor::from_slice(rows, rows.len(), x.device())?;
    let mut x = x.index_select(&index, 0)?;
    if pairs.scales_input {
        let scale = Tensor::from_slice(weights, (weights.len(), 1), x.device())?.to_dtype(x.dtype())?;
        x = x.broadcast_mul(&scale)?;
    }
    Ok(x)
}

/// Feed-forwards of one kind and shape over rows of `x` `[rows, hidden]`: each takes so many,
/// behind those of the one before. Several have to [go together](rows_together).
pub fn apply_each(experts: &[&MlpWeights], x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let Some(one) = experts.first() else { return Ok(x.clone()) };
    let first: Vec<&Linear> = experts.iter().map(|mlp| mlp.gate_up.matrices().0).collect();
    let ups: Vec<&Linear> = experts.iter().filter_map(|mlp| mlp.gate_up.matrices().1).collect();
    let first = product::each(&first, x, rows)?;
    let up = if ups.is_empty() { None } else { Some(product::each(&ups, x, rows)?) };
    let inner = one.inner(first, up)?;
    let down: Vec<&Linear> = experts.iter().map(|mlp| &mlp.down).collect();
    product::each(&down, &inner, rows)
}

/// Rows of an average expert from which on each product is large enough to be started alone.
const ENOUGH_ROWS: usize = 256;

/// Whether a router that chooses `top_k` of `experts` sends so few of so many tokens to an average
/// expert that products of several are better started together.
fn are_few(tokens: usize, [experts, top_k]: [usize; 2]) -> bool {
    tokens * top_k < ENOUGH_ROWS * experts
}

/// How many rows experts may be given together, `max_rows` or none, as a wave has tokens. What is
/// sent to which expert does not matter, nor on which device that is, nor when: the library may
/// round sums of products that are started together in another way.
pub fn rows_together(
    wave: &[&Routed],
    experts_top_k: [usize; 2],
    weights: &[MlpWeights],
    max_rows: usize,
) -> Result<usize> {
    let mut tokens = 0;
    for routed in wave {
        tokens += routed.x.dim(0)?;
    }
    let dtype = wave.first().map_or(DType::F32, |routed| routed.x.dtype());
    let matrices = weights.iter().flat_map(MlpWeights::matrices);
    let together = are_few(tokens, experts_top_k) && product::goes_together(matrices, dtype);
    Ok(if together { max_rows } else { 0 })
}

/// Rows that go to one expert from neighbouring micro-batches of a wave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertBatch {
    /// The expert.
    pub expert: usize,
    /// Numbers of micro-batches in the wave, and how many rows come from each, never none.
    pub sent: Vec<(usize, usize)>,
}

impl ExpertBatch {
    /// Rows from all micro-batches.
    pub fn rows(&self) -> usize {
        self.sent.iter().map(|(_, rows)| rows).sum()
    }
}

/// What a group of experts is sent of a wave, expert by expert. Rows of an expert come together
/// from neighbouring micro-batches, no more than `max_rows` where one sends no more, so that its
/// products are large however few of a micro-batch go to it.
pub fn pieces(wave: &[&Routed], group: &Range<usize>, max_rows: usize) -> Vec<ExpertBatch> {
    let mut pieces = Vec::new();
    for expert in group.clone() {
        let rows: Vec<usize> = wave.iter().map(|routed| routed.sent(expert)).collect();
        for run in runs(&rows, max_rows) {
            let sent: Vec<_> = run.map(|batch| (batch, rows[batch])).filter(|(_, rows)| *rows > 0).collect();
            if !sent.is_empty() {
                pieces.push(ExpertBatch { expert, sent });
            }
        }
    }
    pieces
}

/// Neighbouring pieces that have no more than `max_rows` rows together, or one that has more
/// alone.
pub fn together(pieces: &[ExpertBatch], max_rows: usize) -> impl Iterator<Item = &[ExpertBatch]> {
    let mut rows = pieces.first().map_or(0, ExpertBatch::rows);
    pieces.chunk_by(move |_, next| {
        rows += next.rows();
        let fits = rows <= max_rows;
        if !fits {
            rows = next.rows();
        }
        fits
    })
}

/// An expert's output for its rows of a micro-batch.
pub struct ExpertRows {
    /// Shape `[rows, hidden]`, before multiplication by the output weight.
    pub out: Tensor,
    /// Row indices in the micro-batch, ascending.
    pub rows: Vec<u32>,
    /// Gate weights of the rows.
    pub weights: Vec<f32>,
}

/// Adds an expert's weighted rows to `out` `[all rows, hidden]`.
fn add_expert(out: Tensor, pairs: &ByExpert, expert: usize, made: &Tensor) -> Result<Tensor> {
    let (rows, weights) = pairs.of(expert);
    if pairs.scales_input {
        return fused::scatter_add(out, made, rows, &vec![1.0; rows.len()]);
    }
    fused::scatter_add(out, made, rows, weights)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;
    use crate::model::decoder::MlpSpec;

    fn routed(spec: RouterSpec, logits: &[f32], correction: &[f32], k: usize) -> (Vec<u32>, Vec<f32>) {
        let (mut experts, mut weights) = (vec![0; k], vec![0.0; k]);
        choose(spec, logits, correction, &mut experts, &mut weights);
        (experts, weights)
    }

    fn softmax_top(logits: &[f32], k: usize, normalise: bool) -> (Vec<u32>, Vec<f32>) {
        routed(RouterSpec::SoftmaxTopK { normalise }, logits, &[], k)
    }

    #[test]
    fn router_softmax_is_over_all_experts_unless_normalised() {
        let logits = [1.0, 3.0, 2.0, -1.0];
        let total: f32 = logits.iter().map(|l: &f32| l.exp()).sum();
        let (experts, weights) = softmax_top(&logits, 2, false);
        assert_eq!(experts, [1, 2]);
        assert!((weights[0] - 3f32.exp() / total).abs() < 1e-6);
        let (_, weights) = softmax_top(&logits, 2, true);
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn router_ties_go_to_the_lower_index() {
        assert_eq!(softmax_top(&[0.5; 6], 3, false).0, [0, 1, 2]);
        assert_eq!(softmax_top(&[2.0, 1.0, 3.0], 3, true).0, [0, 1, 2]);
        assert_eq!(softmax_top(&[7.0], 1, true), (vec![0], vec![1.0]));
    }

    #[test]
    fn softmax_over_selected_equals_normalised_softmax_over_all() {
        let logits = [0.3, -2.0, 1.7, 0.9, 1.1];
        let (a, b) = (routed(RouterSpec::TopKSoftmax, &logits, &[], 3), softmax_top(&logits, 3, true));
        assert_eq!(a.0, b.0);
        assert!(a.1.iter().zip(&b.1).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn router_bias_affects_selection_and_not_weights() {
        let spec = RouterSpec::SigmoidGroups { groups: 1, top_groups: 1, normalise: true, scale: 2.0 };
        let (experts, weights) = routed(spec, &[0.0, 1.0, 2.0, 3.0], &[5.0, 0.0, 0.0, 0.0], 2);
        assert_eq!(experts, [0, 3]);
        let s = |x: f32| 1.0 / (1.0 + (-x).exp());
        assert!((weights[0] - 2.0 * s(0.0) / (s(0.0) + s(3.0))).abs() < 1e-6);
    }

    #[test]
    fn experts_outside_the_best_groups_are_excluded() {
        // Group 0 has the best single expert, groups 1 and 2 the best pairs.
        let logits = [4.0, -9.0, 2.0, 2.0, 1.0, 3.0, -9.0, -9.0];
        let spec = |top_groups| RouterSpec::SigmoidGroups { groups: 4, top_groups, normalise: false, scale: 1.0 };
        assert_eq!(routed(spec(2), &logits, &[0.0; 8], 2).0, [2, 5]);
        assert_eq!(routed(spec(4), &logits, &[0.0; 8], 2).0, [0, 5]);
        // Negative scores of chosen groups still come before excluded ones.
        let (experts, _) = routed(spec(1), &logits, &[-3.0; 8], 2);
        assert_eq!(experts, [2, 3]);
    }

    #[test]
    fn softmax_includes_experts_of_excluded_groups() {
        let logits = [3.0f32, -1.0, 2.0, 2.0, 2.5, -2.0];
        let sum: f32 = logits.iter().map(|l| l.exp()).sum();
        let spec = |top_groups| RouterSpec::SoftmaxGroups { groups: 3, top_groups, scale: 4.0 };
        // By the sums of their softmax values the second group would come before the third.
        let (experts, weights) = routed(spec(2), &logits, &[], 2);
        assert_eq!(experts, [0, 4]);
        assert!((weights[1] - 4.0 * 2.5f32.exp() / sum).abs() < 1e-6);
        assert_eq!(routed(spec(1), &logits, &[], 2).0, [0, 1]);
        assert_eq!(routed(spec(3), &logits, &[], 3).0, [0, 2, 4]);
    }

    #[test]
    fn per_expert_scale_is_applied_after_normalisation() {
        let spec = RouterSpec::NormedSoftmax { eps: 1e-6 };
        let (experts, weights) = routed(spec, &[1.0, 1.0, -9.0], &[2.0, 3.0, 9.0], 2);
        assert_eq!(experts, [0, 1]);
        assert!((weights[0] - 1.0).abs() < 1e-6 && (weights[1] - 1.5).abs() < 1e-6, "{weights:?}");
    }

    fn linear(out: usize, input: usize) -> Linear {
        Linear::new(Tensor::ones((out, input), DType::F32, &Device::Cpu).unwrap(), None)
    }

    /// One expert over its rows.
    fn made(weights: &MlpWeights, x: &Tensor) -> Tensor {
        weights.apply(x).unwrap()
    }

    #[test]
    fn exp_is_correctly_rounded_to_f32() {
        for i in -1_000_000i32..1_000_000 {
            let x = i as f32 * 8.7e-5;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / want - 1.0).abs() < 6.02e-8, "exp({x}) = {got}, want {want}");
        }
        assert_eq!([exp(f32::NEG_INFINITY), exp(-0.0), exp(f32::INFINITY)], [0.0, 1.0, f32::INFINITY]);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn nan_logits_of_either_sign_are_chosen_first() {
        for nan in [f32::NAN, -f32::NAN] {
            let (experts, weights) = routed(RouterSpec::TopKSoftmax, &[1.0, nan, f32::INFINITY, 0.0], &[], 2);
            assert_eq!(experts, [1, 2]);
            assert!(weights.iter().all(|weight| weight.is_nan()));
        }
        let keys = [f32::NEG_INFINITY, -1.0, -0.0, 0.0, 1e-40, 1.0, f32::INFINITY, f32::NAN].map(key);
        assert!(keys.is_sorted() && keys[0] > 0);
    }

    proptest! {
        #[test]
        fn token_expert_pairs_equal_a_linear_search(
            rows in prop::collection::vec(prop::sample::subsequence((0..7u32).collect::<Vec<_>>(), 3), 0..40),
            scales_input in any::<bool>(),
        ) {
            let experts = rows.concat();
            let weights: Vec<f32> = (0..experts.len()).map(|i| i as f32).collect();
            let routing = Routing { top_k: 3, experts, weights, scales_input };
            let pairs = routing.by_expert(7);
            for expert in 0..7 {
                let found = routing.experts.iter().enumerate().filter(|(_, e)| **e == expert);
                let found: (Vec<u32>, Vec<f32>) = found.map(|(i, _)| (i as u32 / 3, routing.weights[i])).unzip();
                let (rows, weights) = pairs.of(expert as usize);
                prop_assert_eq!((rows, weights), (&found.0[..], &found.1[..]));
            }
        }
    }

    proptest! {
        #[test]
        fn outputs_sum_experts_in_ascending_order(
            rows in prop::collection::vec(prop::sample::subsequence((0..7u32).collect::<Vec<_>>(), 3), 1..40),
            scales_input in any::<bool>(),
            dtype in prop::sample::select(vec![DType::F32, DType::BF16]),
        ) {
            let (tokens, experts) = (rows.len(), rows.concat());
            let weights: Vec<f32> = (0..experts.len()).map(|i| (i as f32 * 0.7).sin()).collect();
            let routing = Routing { top_k: 3, experts, weights, scales_input };
            let values = |factor: f64| {
                let values = Tensor::arange(0f32, (4 * tokens) as f32, &Device::Cpu).unwrap();
                let values = (values * factor).unwrap().sin().unwrap().reshape((tokens, 4)).unwrap();
                values.to_dtype(dtype).unwrap()
            };
            let (x, beside) = (values(0.9), values(1.3));
            let mlp = |expert: usize| {
                let weight = (linear(4, 3).weight * (expert as f64 - 2.5)).unwrap();
                let (gate_up, down) = (GateUpProj::Up(linear(3, 4)), Linear::new(weight, None));
                MlpWeights { kind: MlpKind::GeluTanh, gate_up, down }
            };
            let bits = |x: &Tensor| {
                let x = x.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
                x.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let weighted = |x: &Tensor, weight: f32, is_weighted: bool| {
                let weight = if is_weighted { weight } else { 1.0 };
                let weight = Tensor::new(&[[weight]], &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                x.broadcast_mul(&weight).unwrap()
            };
            let choices = Choices::Host(routing.clone());
            let mut routed = Routed::new(x.clone(), SortedChoices::new(choices, 7, None).unwrap(), beside.copy().unwrap());
            routed.wait().unwrap();
            let mut seen = Vec::new();
            for group in [0..3, 3..4, 4..7] {
                let inputs = Inputs::new(&[&routed], &group).unwrap();
                for expert in group.filter(|expert| routing.experts.contains(&(*expert as u32))) {
                    let piece = ExpertBatch { expert, sent: vec![(0, routed.sent(expert))] };
                    let part = inputs.gather(&[&routed], &[piece]).unwrap();
                    let of = routed.rows(expert, &made(&mlp(expert), &part)).unwrap();
                    prop_assert_eq!(routed.sent(expert), of.rows.len());
                    for (i, (row, weight)) in of.rows.iter().zip(&of.weights).enumerate() {
                        let sent = weighted(&x.narrow(0, *row as usize, 1).unwrap(), *weight, scales_input);
                        prop_assert_eq!(bits(&part.narrow(0, i, 1).unwrap()), bits(&sent));
                        prop_assert!(routing.experts[3 * *row as usize..][..3].contains(&(expert as u32)));
                    }
                    routed.add(expert, &of.out).unwrap();
                    seen.push(of);
                }
            }
            prop_assert_eq!(seen.iter().map(|of| of.rows.len()).sum::<usize>(), 3 * tokens);
            let got = bits(&routed.finish());
            for token in 0..tokens {
                let mut sum = beside.narrow(0, token, 1).unwrap();
                for of in &seen {
                    let Some(at) = of.rows.iter().position(|row| *row as usize == token) else { continue };
                    let out = weighted(&of.out.narrow(0, at, 1).unwrap(), of.weights[at], !scales_input);
                    sum = (sum + out).unwrap();
                }
                prop_assert_eq!(bits(&sum), &got[4 * token..4 * token + 4]);
            }
        }
    }

    #[test]
    fn no_run_of_neighbours_has_more_rows_than_fit() {
        assert_eq!(runs(&[3, 0, 2, 5, 1, 9, 0, 4], 5), [0..3, 3..4, 4..5, 5..6, 6..8]);
        assert_eq!(runs(&[7, 7], 5), [0..1, 1..2], "one that has more is alone");
        assert_eq!(runs(&[0, 0], 5).len(), 1);
        assert!(runs(&[], 5).is_empty());
    }

    /// 128 experts, 8 of a token, in a wave of 4 micro-batches of 100 tokens, 4 experts at a time.
    #[test]
    fn all_tokens_to_one_expert_take_no_more_rows_than_planned() {
        let moe = MoeSpec {
            experts: 128,
            top_k: 8,
            expert: MlpSpec::swiglu(3),
            router: RouterSpec::SoftmaxTopK { normalise: true },
            shared: None,
            beside: None,
            latent: None,
        };
        let planned = gathered_rows(&moe, 400, 4);
        assert_eq!(planned, 400, "38 rows are usual for an expert, 152 for the group");
        for sent in [[400, 0, 0, 0], [400, 400, 400, 400], [30, 400, 0, 20], [38, 38, 38, 38]] {
            let most = runs(&sent, planned).into_iter().map(|run| sent[run].iter().sum::<usize>()).max();
            assert!(most <= Some(planned), "{sent:?}");
        }
        // What is multiplied at once, of one expert, is no more than a micro-batch has.
        let sent = [100, 100, 60, 40];
        assert_eq!(runs(&sent, 100), [0..1, 1..2, 2..4]);
        assert_eq!(gathered_rows(&moe, 400, 128), 8 * 400, "all that all are sent");
    }

    #[test]
    fn rows_return_to_their_own_micro_batch() {
        let x = |from: f32| Tensor::arange(from, from + 12.0, &Device::Cpu).unwrap().reshape((3, 4)).unwrap();
        let weights = MlpWeights { kind: MlpKind::Relu, gate_up: GateUpProj::Up(linear(3, 4)), down: linear(4, 3) };
        let routing = |experts: [u32; 3]| Routing {
            top_k: 1,
            experts: experts.into(),
            weights: vec![1.0; 3],
            scales_input: false,
        };
        let routed = |x: Tensor, experts| {
            let out = x.zeros_like().unwrap();
            Routed::new(x, SortedChoices::new(Choices::Host(routing(experts)), 2, None).unwrap(), out)
        };
        let wave = [routed(x(0.0), [1, 0, 1]), routed(x(100.0), [0, 1, 0])];
        let wave = [&wave[0], &wave[1]];
        let inputs = Inputs::new(&wave, &(0..2)).unwrap();
        let pieces = pieces(&wave, &(0..2), 100);
        assert_eq!(pieces[1], ExpertBatch { expert: 1, sent: vec![(0, 2), (1, 1)] });
        let both = made(&weights, &inputs.gather(&wave, &pieces[1..]).unwrap());
        let parts = [both.narrow(0, 0, 2).unwrap(), both.narrow(0, 2, 1).unwrap()];
        for (part, sent) in parts.iter().zip(&pieces[1].sent) {
            let piece = ExpertBatch { expert: 1, sent: vec![*sent] };
            let alone = made(&weights, &inputs.gather(&wave, &[piece]).unwrap());
            assert_eq!(part.to_vec2::<f32>().unwrap(), alone.to_vec2::<f32>().unwrap());
        }
        let rows = |number: usize| wave[number].rows(1, &parts[number]).unwrap().rows;
        assert_eq!((rows(0), rows(1)), (vec![0, 2], vec![1]));
    }

    #[test]
    fn rows_of_experts_are_cut_by_micro_batches_and_put_together_up_to_a_bound() {
        let routed = |experts: &[u32]| {
            let x = Tensor::zeros((experts.len(), 4), DType::F32, &Device::Cpu).unwrap();
            let weights = vec![1.0; experts.len()];
            let routing = Routing { top_k: 1, experts: experts.into(), weights, scales_input: false };
            Routed::new(x.clone(), SortedChoices::new(Choices::Host(routing), 4, None).unwrap(), x)
        };
        let wave = [routed(&[0, 0, 1]), routed(&[0, 0, 3]), routed(&[0, 1, 3])];
        let wave: Vec<&Routed> = wave.iter().collect();
        let piece = |expert, sent: &[(usize, usize)]| ExpertBatch { expert, sent: sent.into() };
        let all = [
            piece(0, &[(0, 2)]),
            piece(0, &[(1, 2), (2, 1)]),
            piece(1, &[(0, 1), (2, 1)]),
            piece(3, &[(1, 1), (2, 1)]),
        ];
        assert_eq!(pieces(&wave, &(0..4), 3), all);
        assert_eq!(pieces(&wave, &(1..3), 3), all[2..3], "expert 2 is sent nothing");
        let cut = |max_rows| together(&all, max_rows).map(<[ExpertBatch]>::len).collect::<Vec<_>>();
        assert_eq!([cut(0), cut(4), cut(5), cut(9)], [vec![1; 4], vec![1, 1, 2], vec![2, 2], vec![4]]);
        assert_eq!(together(&[], 3).count(), 0);
        // 256 rows per expert, and one token fewer. No experts are on a GPU here.
        assert_eq!([8192, 8191].map(|tokens| are_few(tokens, [256, 8])), [false, true]);
        assert_eq!(rows_together(&wave, [4, 1], &[], 3).unwrap(), 3);
        let weights = MlpWeights { kind: MlpKind::Relu, gate_up: GateUpProj::Up(linear(3, 4)), down: linear(4, 3) };
        assert_eq!(rows_together(&wave, [4, 1], &[weights], 3).unwrap(), 0);
    }

    #[test]
    fn expert_without_tokens_changes_nothing() {
        let x = Tensor::ones((2, 4), DType::F32, &Device::Cpu).unwrap();
        let gate_up = GateUpProj::Separate { gate: linear(3, 4), up: linear(3, 4) };
        let weights = MlpWeights { kind: MlpKind::Swiglu(GateUp::Separate), gate_up, down: linear(4, 3) };
        let routing = Routing { top_k: 1, experts: vec![1, 1], weights: vec![0.5, 0.25], scales_input: false };
        let pairs = routing.by_expert(3);
        assert!(pairs.of(0).0.is_empty() && pairs.of(2).0.is_empty());
        let of = made(&weights, &gather(&x, &pairs, 1).unwrap());
        let out = add_expert(x.zeros_like().unwrap(), &pairs, 1, &of).unwrap().to_vec2::<f32>().unwrap();
        assert!((out[0][0] - 2.0 * out[1][0]).abs() < 1e-3 && out[0][0] > 0.0);
    }

    #[test]
    fn input_weighting_differs_from_output_weighting() {
        let x = Tensor::ones((1, 4), DType::F32, &Device::Cpu).unwrap();
        let weights = MlpWeights { kind: MlpKind::Relu, gate_up: GateUpProj::Up(linear(3, 4)), down: linear(4, 3) };
        let routing = |scales_input| Routing { top_k: 1, experts: vec![0], weights: vec![-0.5], scales_input };
        let out = |scales_input| {
            let pairs = routing(scales_input).by_expert(1);
            let of = made(&weights, &gather(&x, &pairs, 0).unwrap());
            add_expert(x.zeros_like().unwrap(), &pairs, 0, &of).unwrap().to_vec2::<f32>().unwrap()[0][0]
        };
        assert_eq!((out(false), out(true)), (-6.0, 0.0));
    }
}
