//! Feed-forward blocks: MLPs, and routed experts over all tokens of a micro-batch.

use std::collections::VecDeque;
use std::ops::Range;

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use crate::blocks::norm::Norm;
use crate::kernels::fused::{self, Activation, Gate};
use crate::kernels::product::Linear;
use crate::model::decoder::{GateUp, MlpKind, RouterSpec};

/// A feed-forward's tensors on one device.
pub struct MlpWeights {
    /// What happens at the inner width.
    pub kind: MlpKind,
    /// `hidden` to `intermediate`.
    pub gate_up: GateUpProj,
    /// `[hidden, intermediate]`.
    pub down: Linear,
}

/// The matrices that lead to the inner width.
pub enum GateUpProj {
    /// `[intermediate, hidden]`.
    Up(Linear),
    /// Two of `[intermediate, hidden]`.
    Separate {
        /// The gate projection.
        gate: Linear,
        /// The up projection.
        up: Linear,
    },
    /// `[2 * intermediate, hidden]`.
    Joined(Linear),
}

impl MlpWeights {
    /// `x` `[rows, hidden]` to the same shape.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let inner = match &self.gate_up {
            GateUpProj::Up(up) => {
                let how = match self.kind {
                    MlpKind::Relu => Activation::Relu,
                    MlpKind::ReluSquared => Activation::ReluSquared,
                    _ => Activation::GeluTanh,
                };
                fused::activated(up.apply(x)?, how)?
            }
            GateUpProj::Separate { gate, up } => fused::gated(gate.apply(x)?, &up.apply(x)?, self.gate())?,
            GateUpProj::Joined(both) => fused::gated_joined(&both.apply(x)?, self.is_interleaved(), self.gate())?,
        };
        self.down.apply(&inner)
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
    /// `[1, hidden]`: what opens it, where it is not always open.
    pub gate: Option<Linear>,
}

impl SharedWeights {
    /// `x` `[rows, hidden]` to the same shape.
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
    /// Normalises and scales its input, in f32.
    pub input: Option<Norm>,
    /// `[experts]`: added to the scores for the choice alone, or what multiplies the weights.
    pub per_expert: Option<Vec<f32>>,
}

/// A dense MLP beside a mixture, and the norms around both.
pub struct Beside {
    /// The MLP.
    pub mlp: MlpWeights,
    /// Of its output.
    pub norm: Norm,
    /// Of the experts' input.
    pub experts: Norm,
}

/// Which experts each token goes to, and with what weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    /// Experts per token.
    pub top_k: usize,
    /// `[rows, top_k]`, ascending expert number within a row.
    pub experts: Vec<u32>,
    /// `[rows, top_k]`, in the same order: what multiplies the expert's output, or its input.
    pub weights: Vec<f32>,
    /// The weights multiply the experts' inputs (Llama 4) instead of their outputs.
    pub scales_input: bool,
}

impl Routing {
    /// The same by expert, of which there are `experts`.
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

/// Pairs of token and expert, sorted once by expert.
#[derive(Clone, Debug, PartialEq)]
pub struct ByExpert {
    /// Where each expert's pairs begin, and after the last expert where they end.
    firsts: Vec<usize>,
    /// Tokens, ascending within an expert.
    rows: Vec<u32>,
    /// In the same order.
    weights: Vec<f32>,
    /// As of [`Routing`].
    scales_input: bool,
}

impl ByExpert {
    /// Rows sent to one expert, ascending, with their weights.
    pub fn of(&self, expert: usize) -> (&[u32], &[f32]) {
        let range = self.range(&(expert..expert + 1));
        (&self.rows[range.clone()], &self.weights[range])
    }

    /// Where the pairs of some experts are.
    fn range(&self, experts: &Range<usize>) -> Range<usize> {
        self.firsts[experts.start]..self.firsts[experts.end]
    }
}

/// Routes `x` `[rows, hidden]`. Logits are computed in f32 and choices made on the host.
pub fn route(spec: RouterSpec, top_k: usize, router: &Router, x: &Tensor) -> Result<Routing> {
    let wide = |t: &Tensor| t.to_dtype(DType::F32);
    let bias = router.logits.bias.as_ref().map(wide).transpose()?;
    let x = wide(x)?;
    let x = router.input.as_ref().map_or(Ok(x.clone()), |norm| norm.apply(&x))?;
    router.logits.see(&x)?;
    let logits = Linear::new(router.logits.weight.clone(), bias).apply(&x)?;
    let (rows, experts) = logits.dims2()?;
    let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
    let none = vec![0.0; experts];
    let per_expert = router.per_expert.as_deref().unwrap_or(&none);
    let mut routing = Routing {
        top_k,
        experts: vec![0; rows * top_k],
        weights: vec![0.0; rows * top_k],
        scales_input: spec == RouterSpec::SigmoidOfInput,
    };
    let chosen = routing.experts.par_chunks_mut(top_k).zip(routing.weights.par_chunks_mut(top_k));
    chosen.zip(logits.par_chunks(experts)).for_each(|((experts, weights), logits)| {
        choose(spec, logits, per_expert, experts, weights);
    });
    Ok(routing)
}

/// One row: `experts` and `weights` are filled, in ascending order of experts.
fn choose(spec: RouterSpec, logits: &[f32], per_expert: &[f32], experts: &mut [u32], weights: &mut [f32]) {
    let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
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
            fill(weights, experts, |e| (logits[e] - top).exp());
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

/// Shares of all experts.
fn softmax(logits: &[f32]) -> Vec<f32> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut shares: Vec<f32> = logits.iter().map(|l| (l - top).exp()).collect();
    let sum: f32 = shares.iter().sum();
    shares.iter_mut().for_each(|share| *share /= sum);
    shares
}

/// The experts of the best scores, ascending; ties go to the lower number.
fn top_k(scores: &[f32], experts: &mut [u32]) {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    let best_first = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
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

/// The sum of its two best.
fn best_two(group: &[f32]) -> f32 {
    let (first, second) = group
        .iter()
        .fold((f32::NEG_INFINITY, f32::NEG_INFINITY), |(a, b), &s| if s > a { (s, a) } else { (a, b.max(s)) });
    if group.len() > 1 { first + second } else { first }
}

/// Takes the experts outside the `top_groups` best groups out of the choice.
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

/// A micro-batch on its way through the experts of a layer.
///
/// By our own loops, each expert's rows are gathered and added on their own. By operations of the
/// tensor library, as on GPUs, starting one costs more than the rows of an expert do: all rows of
/// a group of experts are gathered at once, and outputs are held until there are as many as
/// tokens, then added together. Both add to a token in ascending order of its experts, and round
/// alike.
pub struct Routed {
    /// `[tokens, width]`.
    x: Tensor,
    pairs: ByExpert,
    /// `[tokens, width]`: what is beside the experts, and the sum of those that came so far.
    out: Tensor,
    /// Where there are no loops of our own.
    held: Option<Held>,
}

/// Inputs of a group of experts.
pub struct Inputs {
    /// Of all its pairs; `None` where each expert's are gathered on their own, and without any.
    all: Option<Tensor>,
    /// The first of its pairs.
    first: usize,
}

impl Routed {
    /// `x` `[tokens, width]` by its `pairs`, whose outputs are added to `out` `[tokens, width]`
    /// (its storage is overwritten on a CPU).
    pub fn new(x: Tensor, pairs: ByExpert, out: Tensor) -> Result<Self> {
        let held = if fused::has_loops(&x) { None } else { Some(Held::new(&x, &pairs)?) };
        Ok(Self { x, pairs, out, held })
    }

    /// For [`gather`](Self::gather), of each expert of the group.
    pub fn inputs(&self, group: &Range<usize>) -> Result<Inputs> {
        let range = self.pairs.range(group);
        let held = self.held.as_ref().filter(|_| !range.is_empty());
        let all = held.map(|held| {
            let x = self.x.index_select(&held.index.narrow(0, range.start, range.len())?, 0)?;
            if self.pairs.scales_input { x.broadcast_mul(&held.weights_of(&range)?) } else { Ok(x) }
        });
        Ok(Inputs { all: all.transpose()?, first: range.start })
    }

    /// What goes to an expert of the group; `None` if nothing does.
    pub fn gather(&self, inputs: &Inputs, expert: usize) -> Result<Option<Gathered>> {
        let Some(all) = &inputs.all else { return gather(&self.x, &self.pairs, expert) };
        let range = self.pairs.range(&(expert..expert + 1));
        if range.is_empty() {
            return Ok(None);
        }
        let x = all.narrow(0, range.start - inputs.first, range.len())?;
        let (rows, weights) = self.pairs.of(expert);
        Ok(Some(Gathered { x, rows: rows.to_vec(), weights: weights.to_vec() }))
    }

    /// Adds what an expert made of all that went to it. Experts come in ascending order.
    pub fn add(&mut self, expert: usize, of: &ExpertRows) -> Result<()> {
        let out = self.out.clone();
        self.out = match &mut self.held {
            None => add_expert(out, &self.pairs, of)?,
            Some(held) => held.add(out, &self.pairs, expert, of)?,
        };
        Ok(())
    }

    /// The sum, after the last expert.
    pub fn finish(self) -> Tensor {
        self.out
    }
}

/// Outputs of experts, by operations of the tensor library.
struct Held {
    /// Tokens by expert, then the slots of each sum.
    index: Tensor,
    /// `[pairs, 1]`, by expert.
    weights: Tensor,
    /// Of some experts, one after the other, already weighted.
    outputs: Vec<Tensor>,
    /// That are still to come.
    sums: VecDeque<Sum>,
}

/// Outputs that are added together. A slot holds one of them for each token, or one of zeros.
struct Sum {
    /// Of the pairs by expert: those of whole experts.
    pairs: Range<usize>,
    /// Where its slots begin in the index.
    first: usize,
    slots: usize,
}

impl Held {
    fn new(x: &Tensor, pairs: &ByExpert) -> Result<Self> {
        let mut index = pairs.rows.clone();
        let sums = sums(pairs, x.dim(0)?, &mut index);
        let weights = Tensor::from_slice(&pairs.weights, (pairs.weights.len(), 1), x.device())?;
        Ok(Self {
            index: Tensor::from_slice(&index, index.len(), x.device())?,
            weights: weights.to_dtype(x.dtype())?,
            outputs: Vec::new(),
            sums,
        })
    }

    fn weights_of(&self, pairs: &Range<usize>) -> Result<Tensor> {
        self.weights.narrow(0, pairs.start, pairs.len())
    }

    /// `out`, with all outputs that are held if this expert's are the last of a sum.
    fn add(&mut self, out: Tensor, pairs: &ByExpert, expert: usize, of: &ExpertRows) -> Result<Tensor> {
        let range = pairs.range(&(expert..expert + 1));
        let made = if pairs.scales_input { of.out.clone() } else { of.out.broadcast_mul(&self.weights_of(&range)?)? };
        self.outputs.push(made);
        match self.sums.pop_front_if(|sum| sum.pairs.end == range.end) {
            Some(sum) => self.sum(out, &sum),
            None => Ok(out),
        }
    }

    fn sum(&mut self, mut out: Tensor, sum: &Sum) -> Result<Tensor> {
        let (tokens, width) = out.dims2()?;
        // Nothing changes by adding it, not even the sign of a zero.
        let nothing = Tensor::full(-0.0f32, (1, width), out.device())?.to_dtype(out.dtype())?;
        let mut outputs = std::mem::take(&mut self.outputs);
        outputs.push(nothing);
        let outputs = Tensor::cat(&outputs, 0)?;
        for slot in 0..sum.slots {
            let slot = self.index.narrow(0, sum.first + slot * tokens, tokens)?;
            out = (out + outputs.index_select(&slot, 0)?)?;
        }
        Ok(out)
    }
}

/// Cuts the pairs behind experts, as soon as there are as many as tokens. What each token gets of
/// a sum is in as many slots, ascending by expert, which are written behind `index`.
fn sums(pairs: &ByExpert, tokens: usize, index: &mut Vec<u32>) -> VecDeque<Sum> {
    let mut sums = VecDeque::new();
    let mut start = 0;
    for end in pairs.firsts.iter().skip(1).copied() {
        let is_enough = end - start >= tokens || end == pairs.rows.len();
        if end == start || !is_enough {
            continue;
        }
        let (first, nothing) = (index.len(), (end - start) as u32);
        let mut taken = vec![0; tokens];
        for (output, token) in pairs.rows[start..end].iter().enumerate() {
            let slot: &mut usize = &mut taken[*token as usize];
            let at = first + *slot * tokens + *token as usize;
            if at >= index.len() {
                index.resize(index.len() + tokens, nothing);
            }
            index[at] = output as u32;
            *slot += 1;
        }
        sums.push_back(Sum { pairs: start..end, first, slots: (index.len() - first) / tokens });
        start = end;
    }
    sums
}

/// Rows of a micro-batch that go to an expert.
pub struct Gathered {
    /// The expert's input `[rows, hidden]`.
    pub x: Tensor,
    /// Rows of the micro-batch, ascending.
    pub rows: Vec<u32>,
    /// Their weights.
    pub weights: Vec<f32>,
}

/// Gathers the rows of `x` `[all rows, hidden]` that go to an expert, multiplied by their weights where those are of the input; `None`
/// if none do.
fn gather(x: &Tensor, pairs: &ByExpert, expert: usize) -> Result<Option<Gathered>> {
    let (rows, weights) = pairs.of(expert);
    if rows.is_empty() {
        return Ok(None);
    }
    let index = Tensor::from_slice(rows, rows.len(), x.device())?;
    let mut x = x.index_select(&index, 0)?;
    if pairs.scales_input {
        let scale = Tensor::from_slice(weights, (weights.len(), 1), x.device())?.to_dtype(x.dtype())?;
        x = x.broadcast_mul(&scale)?;
    }
    Ok(Some(Gathered { x, rows: rows.to_vec(), weights: weights.to_vec() }))
}

/// One expert over rows gathered from several micro-batches, in products over all of them: what it made of each micro-batch's.
pub fn apply_expert(weights: &MlpWeights, gathered: Vec<Gathered>) -> Result<Vec<ExpertRows>> {
    let inputs: Vec<&Tensor> = gathered.iter().map(|part| &part.x).collect();
    let out = weights.apply(&Tensor::cat(&inputs, 0)?)?;
    let mut first = 0;
    let part = |Gathered { rows, weights, .. }: Gathered| {
        let out = out.narrow(0, first, rows.len())?;
        first += rows.len();
        Ok(ExpertRows { out, rows, weights })
    };
    gathered.into_iter().map(part).collect()
}

/// What an expert made of its rows of a micro-batch.
pub struct ExpertRows {
    /// `[rows, hidden]`, before an output weight.
    pub out: Tensor,
    /// Rows of the micro-batch, ascending.
    pub rows: Vec<u32>,
    /// Their weights.
    pub weights: Vec<f32>,
}

/// Adds an expert's weighted rows to `out` `[all rows, hidden]`.
fn add_expert(out: Tensor, pairs: &ByExpert, of: &ExpertRows) -> Result<Tensor> {
    if pairs.scales_input {
        return fused::scatter_add(out, &of.out, &of.rows, &vec![1.0; of.rows.len()]);
    }
    fused::scatter_add(out, &of.out, &of.rows, &of.weights)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;

    fn routed(spec: RouterSpec, logits: &[f32], correction: &[f32], k: usize) -> (Vec<u32>, Vec<f32>) {
        let (mut experts, mut weights) = (vec![0; k], vec![0.0; k]);
        choose(spec, logits, correction, &mut experts, &mut weights);
        (experts, weights)
    }

    fn softmax_top(logits: &[f32], k: usize, normalise: bool) -> (Vec<u32>, Vec<f32>) {
        routed(RouterSpec::SoftmaxTopK { normalise }, logits, &[], k)
    }

    #[test]
    fn keeps_the_softmax_over_all_experts_unless_normalised() {
        let logits = [1.0, 3.0, 2.0, -1.0];
        let total: f32 = logits.iter().map(|l: &f32| l.exp()).sum();
        let (experts, weights) = softmax_top(&logits, 2, false);
        assert_eq!(experts, [1, 2]);
        assert!((weights[0] - 3f32.exp() / total).abs() < 1e-6);
        let (_, weights) = softmax_top(&logits, 2, true);
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn ties_go_to_the_lower_number_and_all_experts_may_be_chosen() {
        assert_eq!(softmax_top(&[0.5; 6], 3, false).0, [0, 1, 2]);
        assert_eq!(softmax_top(&[2.0, 1.0, 3.0], 3, true).0, [0, 1, 2]);
        assert_eq!(softmax_top(&[7.0], 1, true), (vec![0], vec![1.0]));
    }

    #[test]
    fn softmax_over_the_selected_is_the_normalised_softmax_over_all() {
        let logits = [0.3, -2.0, 1.7, 0.9, 1.1];
        let (a, b) = (routed(RouterSpec::TopKSoftmax, &logits, &[], 3), softmax_top(&logits, 3, true));
        assert_eq!(a.0, b.0);
        assert!(a.1.iter().zip(&b.1).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn the_correction_chooses_but_does_not_weigh() {
        let spec = RouterSpec::SigmoidGroups { groups: 1, top_groups: 1, normalise: true, scale: 2.0 };
        let (experts, weights) = routed(spec, &[0.0, 1.0, 2.0, 3.0], &[5.0, 0.0, 0.0, 0.0], 2);
        assert_eq!(experts, [0, 3]);
        let s = |x: f32| 1.0 / (1.0 + (-x).exp());
        assert!((weights[0] - 2.0 * s(0.0) / (s(0.0) + s(3.0))).abs() < 1e-6);
    }

    #[test]
    fn experts_outside_the_best_groups_are_out_even_if_they_score_best() {
        // Group 0 holds the best single expert, groups 1 and 2 the best pairs.
        let logits = [4.0, -9.0, 2.0, 2.0, 1.0, 3.0, -9.0, -9.0];
        let spec = |top_groups| RouterSpec::SigmoidGroups { groups: 4, top_groups, normalise: false, scale: 1.0 };
        assert_eq!(routed(spec(2), &logits, &[0.0; 8], 2).0, [2, 5]);
        assert_eq!(routed(spec(4), &logits, &[0.0; 8], 2).0, [0, 5]);
        // Negative scores of chosen groups still come before excluded ones.
        let (experts, _) = routed(spec(1), &logits, &[-3.0; 8], 2);
        assert_eq!(experts, [2, 3]);
    }

    #[test]
    fn shares_are_of_all_experts_also_where_groups_are_left_out() {
        let logits = [3.0f32, -1.0, 2.0, 2.0, 2.5, -2.0];
        let sum: f32 = logits.iter().map(|l| l.exp()).sum();
        let spec = |top_groups| RouterSpec::SoftmaxGroups { groups: 3, top_groups, scale: 4.0 };
        // By the sums of their shares the second group would come before the third.
        let (experts, weights) = routed(spec(2), &logits, &[], 2);
        assert_eq!(experts, [0, 4]);
        assert!((weights[1] - 4.0 * 2.5f32.exp() / sum).abs() < 1e-6);
        assert_eq!(routed(spec(1), &logits, &[], 2).0, [0, 1]);
        assert_eq!(routed(spec(3), &logits, &[], 3).0, [0, 2, 4]);
    }

    #[test]
    fn a_number_of_each_expert_multiplies_weights_that_add_up_to_one_before() {
        let spec = RouterSpec::NormedSoftmax { eps: 1e-6 };
        let (experts, weights) = routed(spec, &[1.0, 1.0, -9.0], &[2.0, 3.0, 9.0], 2);
        assert_eq!(experts, [0, 1]);
        assert!((weights[0] - 1.0).abs() < 1e-6 && (weights[1] - 1.5).abs() < 1e-6, "{weights:?}");
    }

    fn linear(out: usize, input: usize) -> Linear {
        Linear::new(Tensor::ones((out, input), DType::F32, &Device::Cpu).unwrap(), None)
    }

    fn only(mut parts: Vec<ExpertRows>) -> ExpertRows {
        assert_eq!(parts.len(), 1);
        parts.remove(0)
    }

    proptest! {
        #[test]
        fn pairs_by_expert_are_those_that_a_search_finds(
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
        fn experts_by_operations_add_up_to_the_same_bits_as_by_loops(
            rows in prop::collection::vec(prop::sample::subsequence((0..7u32).collect::<Vec<_>>(), 3), 1..40),
            scales_input in any::<bool>(),
            dtype in prop::sample::select(vec![DType::F32, DType::BF16]),
        ) {
            let (tokens, experts) = (rows.len(), rows.concat());
            let weights: Vec<f32> = (0..experts.len()).map(|i| (i as f32 * 0.7).sin()).collect();
            let pairs = Routing { top_k: 3, experts, weights, scales_input }.by_expert(7);
            let values = |factor: f64| {
                let values = Tensor::arange(0f32, (4 * tokens) as f32, &Device::Cpu).unwrap();
                let values = (values * factor).unwrap().sin().unwrap().reshape((tokens, 4)).unwrap();
                values.to_dtype(dtype).unwrap()
            };
            let (x, beside) = (values(0.9), values(1.3));
            let held = Held::new(&x, &pairs).unwrap();
            prop_assert_eq!(held.sums.iter().map(|sum| sum.pairs.len()).sum::<usize>(), 3 * tokens);
            let routed = |held| Routed { x: x.clone(), pairs: pairs.clone(), out: beside.copy().unwrap(), held };
            let through = |mut routed: Routed| {
                for group in [0..3, 3..4, 4..7] {
                    let inputs = routed.inputs(&group).unwrap();
                    for expert in group {
                        let Some(part) = routed.gather(&inputs, expert).unwrap() else { continue };
                        let weight = (linear(4, 3).weight * (expert as f64 - 2.5)).unwrap();
                        let (gate_up, down) = (GateUpProj::Up(linear(3, 4)), Linear::new(weight, None));
                        let mlp = MlpWeights { kind: MlpKind::GeluTanh, gate_up, down };
                        routed.add(expert, &only(apply_expert(&mlp, vec![part]).unwrap())).unwrap();
                    }
                }
                let out = routed.finish().to_dtype(DType::F32).unwrap().flatten_all().unwrap();
                out.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            prop_assert_eq!(through(routed(Some(held))), through(routed(None)));
        }
    }

    #[test]
    fn outputs_are_added_as_soon_as_there_is_one_for_each_token() {
        let experts = vec![0, 1, 0, 3, 1, 3, 0, 3];
        let pairs = Routing { top_k: 2, experts, weights: vec![1.0; 8], scales_input: false }.by_expert(5);
        let mut index = pairs.rows.clone();
        assert_eq!(index, [0, 1, 3, 0, 2, 1, 2, 3]);
        let sums = sums(&pairs, 4, &mut index);
        let told: Vec<_> = sums.iter().map(|sum| (sum.pairs.clone(), sum.first, sum.slots)).collect();
        // Expert 0 has three outputs, expert 1 makes it five; expert 3 has the last three.
        assert_eq!(told, [(0..5, 8, 2), (5..8, 16, 1)]);
        assert_eq!(index[8..], [0, 1, 4, 2, 3, 5, 5, 5, 3, 0, 1, 2]);
    }

    #[test]
    fn rows_of_several_micro_batches_come_back_to_their_own() {
        let x = |from: f32| Tensor::arange(from, from + 12.0, &Device::Cpu).unwrap().reshape((3, 4)).unwrap();
        let weights = MlpWeights { kind: MlpKind::Relu, gate_up: GateUpProj::Up(linear(3, 4)), down: linear(4, 3) };
        let routing = |experts: [u32; 3]| Routing {
            top_k: 1,
            experts: experts.into(),
            weights: vec![1.0; 3],
            scales_input: false,
        };
        let batches = [(x(0.0), routing([1, 0, 1]).by_expert(2)), (x(100.0), routing([0, 1, 0]).by_expert(2))];
        let gathered = batches.iter().map(|(x, pairs)| gather(x, pairs, 1).unwrap().unwrap()).collect();
        let parts = apply_expert(&weights, gathered).unwrap();
        for (part, (x, pairs)) in parts.iter().zip(&batches) {
            let alone = only(apply_expert(&weights, vec![gather(x, pairs, 1).unwrap().unwrap()]).unwrap());
            assert_eq!(part.rows, alone.rows);
            assert_eq!(part.out.to_vec2::<f32>().unwrap(), alone.out.to_vec2::<f32>().unwrap());
        }
        assert_eq!((parts[0].rows.as_slice(), parts[1].rows.as_slice()), (&[0, 2][..], &[1][..]));
    }

    #[test]
    fn an_expert_without_tokens_changes_nothing() {
        let x = Tensor::ones((2, 4), DType::F32, &Device::Cpu).unwrap();
        let gate_up = GateUpProj::Separate { gate: linear(3, 4), up: linear(3, 4) };
        let weights = MlpWeights { kind: MlpKind::Swiglu(GateUp::Separate), gate_up, down: linear(4, 3) };
        let routing = Routing { top_k: 1, experts: vec![1, 1], weights: vec![0.5, 0.25], scales_input: false };
        let pairs = routing.by_expert(3);
        assert!(gather(&x, &pairs, 0).unwrap().is_none() && gather(&x, &pairs, 2).unwrap().is_none());
        let of = only(apply_expert(&weights, vec![gather(&x, &pairs, 1).unwrap().unwrap()]).unwrap());
        let out = add_expert(x.zeros_like().unwrap(), &pairs, &of).unwrap().to_vec2::<f32>().unwrap();
        assert!((out[0][0] - 2.0 * out[1][0]).abs() < 1e-3 && out[0][0] > 0.0);
    }

    #[test]
    fn a_weight_on_the_input_is_not_a_weight_on_the_output() {
        let x = Tensor::ones((1, 4), DType::F32, &Device::Cpu).unwrap();
        let weights = MlpWeights { kind: MlpKind::Relu, gate_up: GateUpProj::Up(linear(3, 4)), down: linear(4, 3) };
        let routing = |scales_input| Routing { top_k: 1, experts: vec![0], weights: vec![-0.5], scales_input };
        let out = |scales_input| {
            let pairs = routing(scales_input).by_expert(1);
            let of = only(apply_expert(&weights, vec![gather(&x, &pairs, 0).unwrap().unwrap()]).unwrap());
            add_expert(x.zeros_like().unwrap(), &pairs, &of).unwrap().to_vec2::<f32>().unwrap()[0][0]
        };
        assert_eq!((out(false), out(true)), (-6.0, 0.0));
    }
}
