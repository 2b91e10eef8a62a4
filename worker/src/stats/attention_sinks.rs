//! Attention on the first key and the size of hidden states (arXiv 2505.06708); the definitions
//! are [`AttentionSinks`]'.

use std::collections::BTreeMap;

use outliers_protocol::{AttentionSinkLayer, AttentionSinks};
use serde::{Deserialize, Serialize};

use super::exact::ExactSum;
use super::rows::Scan;
use crate::attention::FirstKey;

/// The rule, for reports.
const RULE: &str = "share of attention on the first key of the sequence, over queries that see it but for the first; \
                    largest |x| of a token's residual stream";

/// Sums by layer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct FirstKeys {
    /// By head.
    shares: BTreeMap<usize, Vec<FirstKey>>,
    /// Tokens, and the sum of their largest |x|.
    largest: BTreeMap<usize, (u64, ExactSum)>,
}

impl FirstKeys {
    /// Takes what each head of a layer gave to the first key.
    pub fn add(&mut self, layer: usize, heads: &[FirstKey]) {
        let mine = self.shares.entry(layer).or_default();
        if mine.len() < heads.len() {
            mine.resize(heads.len(), FirstKey::default());
        }
        mine.iter_mut().zip(heads).for_each(|(mine, more)| *mine = mine.and(*more));
    }

    /// Takes the residual stream after a layer.
    pub fn add_residual(&mut self, layer: usize, scan: &Scan) {
        let (tokens, sum) = self.largest.entry(layer).or_default();
        *tokens += scan.rows.len() as u64;
        scan.rows.iter().for_each(|row| sum.add(f64::from(row.max_abs())));
    }

    /// Adds what was seen of other layers or other sequences.
    pub fn merge(&mut self, other: &Self) {
        for (layer, heads) in &other.shares {
            self.add(*layer, heads);
        }
        for (layer, (tokens, sum)) in &other.largest {
            let mine = self.largest.entry(*layer).or_default();
            mine.0 += tokens;
            mine.1.merge(sum);
        }
    }

    /// As reports have it.
    pub fn summary(&self) -> AttentionSinks {
        let layer = |(layer, (tokens, sum)): (&usize, &(u64, ExactSum))| {
            let shares = self.shares.get(layer).map_or(&[][..], Vec::as_slice);
            let heads: Vec<f64> = shares.iter().filter_map(|head| head.mean()).collect();
            let largest_hidden = sum.value() / (*tokens).max(1) as f64;
            AttentionSinkLayer { layer: *layer, first_key: mean(&heads), heads, largest_hidden }
        };
        let layers: Vec<AttentionSinkLayer> = self.largest.iter().map(layer).collect();
        let shares: Vec<f64> = layers.iter().filter_map(|layer| layer.first_key).collect();
        let largest: Vec<f64> = layers.iter().map(|layer| layer.largest_hidden).collect();
        AttentionSinks {
            rule: RULE.to_owned(),
            first_key: mean(&shares),
            largest_hidden: mean(&largest).unwrap_or(0.0),
            layers,
        }
    }
}

/// `None` of nothing.
fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}
