//! Feed-forward blocks: the gated MLP, and routed experts over all tokens of a micro-batch.

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use crate::decoder::RouterSpec;
use crate::fused;
use crate::weights::Linear;

/// A gated MLP's tensors on one device.
pub struct GatedWeights {
    /// `[intermediate, hidden]`.
    pub gate: Linear,
    /// `[intermediate, hidden]`.
    pub up: Linear,
    /// `[hidden, intermediate]`.
    pub down: Linear,
}

impl GatedWeights {
    /// `down(silu(gate x) * up x)` for `x` `[rows, hidden]`.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        self.down.apply(&fused::silu_mul(&self.gate.apply(x)?, &self.up.apply(x)?)?)
    }
}

/// Which experts each token goes to, and with what weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    /// Experts per token.
    pub top_k: usize,
    /// `[rows, top_k]`, ascending expert number within a row.
    pub experts: Vec<u32>,
    /// `[rows, top_k]`, in the same order: what multiplies the expert's output.
    pub weights: Vec<f32>,
}

impl Routing {
    /// Rows sent to one expert, ascending, with their weights.
    pub fn of_expert(&self, expert: usize) -> (Vec<u32>, Vec<f32>) {
        let hits = self.experts.iter().zip(&self.weights).enumerate().filter(|(_, (e, _))| **e as usize == expert);
        hits.map(|(i, (_, weight))| ((i / self.top_k) as u32, *weight)).unzip()
    }
}

/// Routes `x` `[rows, hidden]` by the router's matrix `[experts, hidden]`. Choices are made on the host, in f32.
pub fn route(spec: RouterSpec, top_k: usize, router: &Linear, x: &Tensor) -> Result<Routing> {
    let logits = router.apply(x)?.to_dtype(DType::F32)?;
    let (rows, experts) = logits.dims2()?;
    let logits: Vec<f32> = logits.flatten_all()?.to_vec1()?;
    let mut routing = Routing { top_k, experts: vec![0; rows * top_k], weights: vec![0.0; rows * top_k] };
    let chosen = routing.experts.par_chunks_mut(top_k).zip(routing.weights.par_chunks_mut(top_k));
    chosen.zip(logits.par_chunks(experts)).for_each(|((experts, weights), logits)| match spec {
        RouterSpec::SoftmaxTopK { normalise } => softmax_top_k(logits, normalise, experts, weights),
    });
    Ok(routing)
}

fn softmax_top_k(logits: &[f32], normalise: bool, experts: &mut [u32], weights: &mut [f32]) {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shares: Vec<f32> = logits.iter().map(|l| (l - top).exp()).collect();
    let sum: f32 = shares.iter().sum();
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let best_first = |a: &u32, b: &u32| shares[*b as usize].total_cmp(&shares[*a as usize]).then(a.cmp(b));
    if experts.len() < order.len() {
        order.select_nth_unstable_by(experts.len() - 1, best_first);
    }
    experts.copy_from_slice(&order[..experts.len()]);
    experts.sort_unstable();
    for (weight, expert) in weights.iter_mut().zip(experts.iter()) {
        *weight = shares[*expert as usize] / sum;
    }
    if normalise {
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum);
    }
}

/// Adds one expert's share: gathers its rows of `x`, applies it, and scatters the weighted rows into `out` (both `[rows, hidden]`).
pub fn add_expert(out: Tensor, x: &Tensor, routing: &Routing, expert: usize, weights: &GatedWeights) -> Result<Tensor> {
    let (rows, shares) = routing.of_expert(expert);
    if rows.is_empty() {
        return Ok(out);
    }
    let index = Tensor::from_slice(&rows, rows.len(), x.device())?;
    let values = weights.apply(&x.index_select(&index, 0)?)?;
    fused::scatter_add(out, &values, &rows, &shares)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn routed(logits: &[f32], top_k: usize, normalise: bool) -> (Vec<u32>, Vec<f32>) {
        let (mut experts, mut weights) = (vec![0; top_k], vec![0.0; top_k]);
        softmax_top_k(logits, normalise, &mut experts, &mut weights);
        (experts, weights)
    }

    #[test]
    fn keeps_the_softmax_over_all_experts_unless_normalised() {
        let logits = [1.0, 3.0, 2.0, -1.0];
        let total: f32 = logits.iter().map(|l: &f32| l.exp()).sum();
        let (experts, weights) = routed(&logits, 2, false);
        assert_eq!(experts, [1, 2]);
        assert!((weights[0] - 3f32.exp() / total).abs() < 1e-6);
        let (_, weights) = routed(&logits, 2, true);
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn ties_go_to_the_lower_number_and_all_experts_may_be_chosen() {
        assert_eq!(routed(&[0.5; 6], 3, false).0, [0, 1, 2]);
        assert_eq!(routed(&[2.0, 1.0, 3.0], 3, true).0, [0, 1, 2]);
        assert_eq!(routed(&[7.0], 1, true), (vec![0], vec![1.0]));
    }

    #[test]
    fn an_expert_without_tokens_changes_nothing() {
        let x = Tensor::ones((2, 4), DType::F32, &Device::Cpu).unwrap();
        let linear = |o, i| Linear { weight: Tensor::ones((o, i), DType::F32, &Device::Cpu).unwrap(), bias: None };
        let weights = GatedWeights { gate: linear(3, 4), up: linear(3, 4), down: linear(4, 3) };
        let routing = Routing { top_k: 1, experts: vec![1, 1], weights: vec![0.5, 0.25] };
        let out = add_expert(x.zeros_like().unwrap(), &x, &routing, 0, &weights).unwrap();
        assert_eq!(out.sum_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
        let out = add_expert(out, &x, &routing, 1, &weights).unwrap().to_vec2::<f32>().unwrap();
        assert!((out[0][0] - 2.0 * out[1][0]).abs() < 1e-3 && out[0][0] > 0.0);
    }
}
