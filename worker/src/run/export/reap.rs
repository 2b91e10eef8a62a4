//! Saliency of routed experts (REAP, arXiv 2510.13999), with the super experts: shows whether
//! pruning by saliency would drop a super expert.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde_json::json;

use super::{FinishedPass, Layer, Saliency};
use crate::error::{Result, WorkerError};
use crate::files::write_atomic;

const RULE: &str = "saliency: mean over the tokens that were sent to an expert of gate weight x Euclidean norm of its \
                    output (of the norm alone where gate weights multiply inputs); the lowest are dropped first, those \
                    without a token before them";

#[derive(Debug, Serialize)]
struct OfLayer {
    layer: usize,
    experts: Vec<OfExpert>,
    /// Expert indices by ascending saliency.
    ascending: Vec<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct OfExpert {
    tokens: u64,
    /// Saliency, as the following fields `None` without a token.
    saliency: Option<f64>,
    mean_gate: Option<f64>,
    mean_norm: Option<f64>,
}

#[derive(Debug, PartialEq, Serialize)]
struct SuperExpert {
    layer: usize,
    expert: usize,
    saliency: Option<f64>,
    /// Experts of the layer with a lower saliency.
    dropped_before: usize,
    /// Experts of the layer.
    experts: usize,
}

impl OfExpert {
    fn of(sums: &Saliency) -> Self {
        let mean = |sum: f64| (sums.tokens > 0).then(|| sum / sums.tokens as f64);
        Self {
            tokens: sums.tokens,
            saliency: mean(sums.saliency),
            mean_gate: mean(sums.gate),
            mean_norm: mean(sums.norm),
        }
    }
}

impl OfLayer {
    fn new(layer: usize, experts: Vec<OfExpert>) -> Self {
        let mut ascending: Vec<usize> = (0..experts.len()).collect();
        let saliency = |expert: &usize| experts[*expert].saliency.unwrap_or(f64::NEG_INFINITY);
        ascending.sort_by(|a, b| saliency(a).total_cmp(&saliency(b)));
        Self { layer, experts, ascending }
    }

    fn super_expert(&self, expert: usize) -> Option<SuperExpert> {
        Some(SuperExpert {
            layer: self.layer,
            expert,
            saliency: self.experts.get(expert)?.saliency,
            dropped_before: self.ascending.iter().position(|at| *at == expert)?,
            experts: self.experts.len(),
        })
    }
}

/// Writes the file to `path`.
///
/// # Errors
/// Storage.
pub(super) fn write(path: &Path, layers: &BTreeMap<usize, Layer>, pass: &FinishedPass<'_>) -> Result<()> {
    let none = Saliency::default();
    let of_layer = |(layer, experts): (usize, usize)| {
        let seen = layers.get(&layer);
        let of = |expert| OfExpert::of(seen.and_then(|seen| seen.experts.get(&expert)).unwrap_or(&none));
        OfLayer::new(layer, (0..experts).map(of).collect())
    };
    let experts = pass.model.spec.layers.iter().map(|layer| layer.experts()).enumerate();
    let layers: Vec<OfLayer> = experts.filter(|(_, experts)| *experts > 0).map(of_layer).collect();
    let candidates = pass.results.super_experts.iter().flat_map(|found| &found.candidates);
    let super_experts: Vec<SuperExpert> = candidates
        .filter_map(|peak| layers.iter().find(|of| of.layer == peak.at.layer)?.super_expert(peak.at.expert?))
        .collect();
    let shares = super_experts.iter().map(|found| found.dropped_before as f64 / found.experts as f64);
    let document = json!({
        "schema": 1,
        "model": pass.results.model,
        "rule": RULE,
        "tokens": pass.tokens.ids.len(),
        // Those with routed experts.
        "layers": layers,
        // By the rule of `results.json`.
        "super_experts": super_experts,
        // Share of each layer's experts, 0 to 1, that can be dropped by saliency before the first
        // super expert is; null without a super expert.
        "share_before_a_super_expert": shares.min_by(f64::total_cmp),
    });
    let text = serde_json::to_vec_pretty(&document)
        .map_err(|error| WorkerError::internal(format!("saliencies cannot be written as JSON: {error}")))?;
    write_atomic(path, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saliency_is_the_mean_per_token_and_unused_experts_rank_last() {
        let sums = |tokens, saliency| Saliency { tokens, saliency, gate: 1.0, norm: 8.0 };
        let experts = [sums(4, 8.0), sums(0, 0.0), sums(2, 1.0), sums(1, 1.0)];
        let layer = OfLayer::new(7, experts.iter().map(OfExpert::of).collect());
        assert_eq!(layer.experts[0].saliency, Some(2.0));
        assert_eq!((layer.experts[0].mean_gate, layer.experts[0].mean_norm), (Some(0.25), Some(2.0)));
        assert_eq!(layer.experts[1], OfExpert { tokens: 0, saliency: None, mean_gate: None, mean_norm: None });
        assert_eq!(layer.ascending, [1, 2, 3, 0]);
        let found = layer.super_expert(3).unwrap();
        assert_eq!((found.layer, found.dropped_before, found.experts), (7, 2, 4));
        assert_eq!(layer.super_expert(4), None);
    }
}
