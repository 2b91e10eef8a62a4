//! Attention to the first key and the size of hidden states (arXiv 2505.06708), as defined by
//! [`AttentionSinks`].

use std::collections::BTreeMap;

use outliers_protocol::{AttentionSinkLayer, AttentionSinks};
use outliers_scan::Scan;
use serde::{Deserialize, Serialize};

use super::exact::Mean;
use crate::blocks::attention::FirstKey;

/// The rule, for reports.
const RULE: &str = "share of attention on the first key of the sequence, over queries that see it but for the first; \
                    largest |x| of a token's residual stream";

/// Adds means of the same layers or sequences.
fn merge(mine: &mut BTreeMap<usize, Mean>, theirs: &BTreeMap<usize, Mean>) {
    theirs.iter().for_each(|(index, mean)| mine.entry(*index).or_default().merge(mean));
}

/// Sums per layer and per sequence.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct FirstKeys {
    /// Per layer and head.
    shares: BTreeMap<usize, Vec<FirstKey>>,
    /// Per sequence, over layers: a layer's mean over heads.
    shares_of_sequences: BTreeMap<usize, Mean>,
    /// Per layer: each token's largest |x|.
    largest: BTreeMap<usize, Mean>,
    /// Per sequence, over layers: each token's largest |x|.
    largest_of_sequences: BTreeMap<usize, Mean>,
}

impl FirstKeys {
    /// Adds each head's attention to the first key in a sequence.
    pub fn add(&mut self, layer: usize, sequence: usize, heads: &[FirstKey]) {
        self.add_heads(layer, heads);
        if let Some(share) = mean(&means(heads)) {
            self.shares_of_sequences.entry(sequence).or_default().add(share);
        }
    }

    fn add_heads(&mut self, layer: usize, heads: &[FirstKey]) {
        let mine = self.shares.entry(layer).or_default();
        if mine.len() < heads.len() {
            mine.resize(heads.len(), FirstKey::default());
        }
        mine.iter_mut().zip(heads).for_each(|(mine, more)| *mine = mine.and(*more));
    }

    /// Adds the residual stream of a sequence after a layer.
    pub fn add_residual(&mut self, layer: usize, sequence: usize, scan: &Scan) {
        let mut largest = Mean::default();
        scan.rows.iter().for_each(|row| largest.add(f64::from(row.max_abs())));
        self.largest.entry(layer).or_default().merge(&largest);
        self.largest_of_sequences.entry(sequence).or_default().merge(&largest);
    }

    /// Adds sums of other layers or other sequences.
    pub fn merge(&mut self, other: &Self) {
        for (layer, heads) in &other.shares {
            self.add_heads(*layer, heads);
        }
        merge(&mut self.shares_of_sequences, &other.shares_of_sequences);
        merge(&mut self.largest, &other.largest);
        merge(&mut self.largest_of_sequences, &other.largest_of_sequences);
    }

    /// The result for reports.
    pub fn summary(&self) -> AttentionSinks {
        let layer = |(layer, largest): (&usize, &Mean)| {
            let heads = self.shares.get(layer).map(|heads| means(heads)).unwrap_or_default();
            AttentionSinkLayer { layer: *layer, first_key: mean(&heads), heads, largest_hidden: largest.value() }
        };
        let layers: Vec<AttentionSinkLayer> = self.largest.iter().map(layer).collect();
        let shares: Vec<f64> = layers.iter().filter_map(|layer| layer.first_key).collect();
        let largest: Vec<f64> = layers.iter().map(|layer| layer.largest_hidden).collect();
        AttentionSinks {
            rule: RULE.to_owned(),
            first_key: mean(&shares),
            largest_hidden: mean(&largest).unwrap_or(0.0),
            first_key_per_sequence: self.shares_of_sequences.values().map(Mean::value).collect(),
            largest_hidden_per_sequence: self.largest_of_sequences.values().map(Mean::value).collect(),
            layers,
        }
    }
}

/// Means of the heads with queries.
fn means(heads: &[FirstKey]) -> Vec<f64> {
    heads.iter().filter_map(|head| head.mean()).collect()
}

/// The mean; `None` for no values.
fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sequence_means_over_layers_are_separate() {
        let mut all = FirstKeys::default();
        for (layer, sequence, value) in [(1, 1, 3u8), (0, 0, 1), (1, 0, 2), (0, 1, 4)] {
            let mut one = FirstKeys::default();
            // In eighths of 2^32.
            let head: FirstKey = serde_json::from_value(json!({"sum": u64::from(value) << 29, "queries": 1})).unwrap();
            one.add(layer, sequence, &[head, head]);
            let value = f32::from(value);
            one.add_residual(layer, sequence, &Scan::of(&[value, 0.5, -value, 0.25], 2));
            all.merge(&one);
        }
        let summary = all.summary();
        assert_eq!(summary.largest_hidden_per_sequence, [1.5, 3.5]);
        assert_eq!(summary.first_key_per_sequence, [1.5 / 8.0, 3.5 / 8.0]);
        let layers = summary.layers.iter().map(|layer| (layer.first_key, layer.largest_hidden));
        assert_eq!(layers.collect::<Vec<_>>(), [(Some(2.5 / 8.0), 2.5); 2]);
        assert_eq!((summary.first_key, summary.largest_hidden), (Some(2.5 / 8.0), 2.5));
    }
}
