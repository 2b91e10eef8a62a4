//! Massive activations of the residual stream (Sun et al. 2024), as defined by
//! [`MassiveActivations`].

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BTreeSet};

use outliers_protocol::{MASSIVE_DIMS, MASSIVE_RECORDS, MassiveActivations, MassiveDim, MassiveLayer, MassiveRecord};
use outliers_scan::{Large, Scan};

use serde::{Deserialize, Serialize};

use super::exact::ExactSum;
use super::top::{Top, TopValue};
use super::values::Values;
use crate::error::Result;

/// Exclusive lower bound of |x|.
const MAGNITUDE: f32 = 100.0;
/// Minimum ratio of abs(x) to the median magnitude.
const TIMES_MEDIAN: f64 = 1000.0;
/// The rule, for reports.
const RULE: &str =
    "|x| > 100 and |x| >= 1000 x median |x| of the sequence's hidden state after that layer (Sun et al. 2024)";
/// Number of largest magnitudes of a sequence that are averaged.
const TOP_MAGNITUDES: usize = 3;

/// Whether a magnitude is massive for the median `median`.
fn is_massive(magnitude: f32, median: f32) -> bool {
    magnitude > MAGNITUDE && f64::from(magnitude) >= TIMES_MEDIAN * f64::from(median)
}

/// Bits of a lower bound of massive magnitudes for the median `median`.
fn least_massive(median: f32) -> u32 {
    let least = (TIMES_MEDIAN * f64::from(median)) as f32;
    // The product may have been rounded up.
    MAGNITUDE.max(least.next_down()).to_bits()
}

/// A massive activation by either median, ordered as [`TopValue`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Hit {
    found: TopValue,
    sequence_median: f32,
    token_median: f32,
}

impl Eq for Hit {}

impl Ord for Hit {
    fn cmp(&self, other: &Self) -> Ordering {
        self.found.cmp(&other.found)
    }
}

impl PartialOrd for Hit {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Layer {
    sequences: u64,
    values: u64,
    tokens: u64,
    values_by_token_median: u64,
    tokens_by_token_median: u64,
    top_magnitudes: [ExactSum; TOP_MAGNITUDES],
    medians: ExactSum,
    hits: Top<Hit>,
}

impl Layer {
    fn new() -> Self {
        Self {
            sequences: 0,
            values: 0,
            tokens: 0,
            values_by_token_median: 0,
            tokens_by_token_median: 0,
            top_magnitudes: Default::default(),
            medians: ExactSum::default(),
            hits: Top::new(MASSIVE_RECORDS),
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Dim {
    values: u64,
    values_at_position_0: u64,
    layers: BTreeSet<usize>,
    min: f32,
    max: f32,
}

/// Counts massive activations. Memory: one bit per token, [`MASSIVE_RECORDS`] records per layer,
/// one entry per dimension with one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Massive {
    tokens: usize,
    layers: BTreeMap<usize, Layer>,
    dims: BTreeMap<usize, Dim>,
    /// One bit per (sequence, position).
    marked: Vec<u64>,
}

impl Massive {
    /// Empty counts for sequences of `tokens` tokens.
    pub fn new(sequences: usize, tokens: usize) -> Self {
        let marked = vec![0; (sequences * tokens).div_ceil(64)];
        Self { tokens, layers: BTreeMap::new(), dims: BTreeMap::new(), marked }
    }

    /// Adds the residual stream `x` of whole sequences after a layer, with their `scans`. The
    /// first sequence begins at `first_token`.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn add(&mut self, layer: usize, first_token: usize, x: &Values<'_>, scans: &[Scan]) -> Result<()> {
        let medians = x.medians(scans)?;
        let mut asked = Vec::new();
        for (s, (scan, median)) in scans.iter().zip(&medians).enumerate() {
            let of_largest = scan.magnitudes.floor_of_largest(TOP_MAGNITUDES as u64);
            for (r, row) in scan.rows.iter().enumerate() {
                let floor = of_largest.min(least_massive(median.min(row.median)));
                if row.max_bits >= floor {
                    asked.push((s * self.tokens + r, floor));
                }
            }
        }
        let large = x.large(&asked)?;
        for (s, (scan, median)) in scans.iter().zip(&medians).enumerate() {
            let before = |row: usize| large.partition_point(|at| at.row < row);
            let large = &large[before(s * self.tokens)..before((s + 1) * self.tokens)];
            self.add_sequence(layer, large, *median);
            for values in large.chunk_by(|a, b| a.row == b.row) {
                let row = values[0].row;
                let token_median = scan.rows[row - s * self.tokens].median;
                self.add_row(layer, first_token + row, values, [*median, token_median]);
            }
        }
        Ok(())
    }

    /// Adds the medians and the largest magnitudes of a sequence, which are contained in `large`.
    fn add_sequence(&mut self, layer: usize, large: &[Large], median: f32) {
        let entry = self.layers.entry(layer).or_insert_with(Layer::new);
        entry.sequences += 1;
        entry.medians.add(f64::from(median));
        let mut magnitudes: Vec<f32> = large.iter().map(|at| at.value.abs()).collect();
        magnitudes.sort_unstable_by(|a, b| b.total_cmp(a));
        for (sum, magnitude) in entry.top_magnitudes.iter_mut().zip(magnitudes) {
            sum.add(f64::from(magnitude));
        }
    }

    /// Adds a row's massive activations by either median, which are contained in `values`.
    fn add_row(&mut self, layer: usize, token: usize, values: &[Large], [sequence_median, token_median]: [f32; 2]) {
        let entry = self.layers.get_mut(&layer).expect("made by the caller");
        let (values_before, by_token_before) = (entry.values, entry.values_by_token_median);
        for &Large { dim, value, .. } in values {
            entry.values_by_token_median += u64::from(is_massive(value.abs(), token_median));
            if !is_massive(value.abs(), sequence_median) {
                continue;
            }
            entry.values += 1;
            let found = TopValue { layer, token, expert: None, dim, value };
            entry.hits.offer(Hit { found, sequence_median, token_median });
            let one = Dim {
                values: 1,
                values_at_position_0: u64::from(token.is_multiple_of(self.tokens)),
                layers: BTreeSet::from([layer]),
                min: value,
                max: value,
            };
            self.dims.entry(dim).and_modify(|sum| sum.merge(&one)).or_insert(one);
        }
        entry.tokens_by_token_median += u64::from(entry.values_by_token_median > by_token_before);
        if entry.values > values_before {
            entry.tokens += 1;
            self.marked[token / 64] |= 1 << (token % 64);
        }
    }

    /// Adds counts of other sequences of the same corpus.
    pub fn merge(&mut self, other: &Self) {
        for (layer, theirs) in &other.layers {
            let mine = self.layers.entry(*layer).or_insert_with(Layer::new);
            mine.sequences += theirs.sequences;
            mine.values += theirs.values;
            mine.tokens += theirs.tokens;
            mine.values_by_token_median += theirs.values_by_token_median;
            mine.tokens_by_token_median += theirs.tokens_by_token_median;
            mine.top_magnitudes.iter_mut().zip(&theirs.top_magnitudes).for_each(|(a, b)| a.merge(b));
            mine.medians.merge(&theirs.medians);
            mine.hits.merge(&theirs.hits);
        }
        for (dim, theirs) in &other.dims {
            self.dims.entry(*dim).and_modify(|mine| mine.merge(theirs)).or_insert_with(|| theirs.clone());
        }
        self.marked.iter_mut().zip(&other.marked).for_each(|(a, b)| *a |= b);
    }

    /// The result for reports. `ids` are the token ids `[sequences, tokens]`.
    pub fn summary(&self, ids: &[i64]) -> MassiveActivations {
        let is_marked = |token: usize| self.marked[token / 64] >> (token % 64) & 1 == 1;
        let marked: Vec<usize> = (0..ids.len()).filter(|t| is_marked(*t)).collect();
        let with_one = || self.layers.iter().filter(|(_, layer)| layer.values > 0).map(|(index, _)| *index);
        let mut dims: Vec<MassiveDim> = self.dims.iter().map(|(dim, sum)| sum.summary(*dim)).collect();
        dims.sort_by_key(|dim| (Reverse(dim.values), dim.dim));
        dims.truncate(MASSIVE_DIMS);
        MassiveActivations {
            rule: RULE.to_owned(),
            onset_layer: with_one().next(),
            last_layer: with_one().next_back(),
            values: self.layers.values().map(|layer| layer.values).sum(),
            tokens: marked.len() as u64,
            tokens_at_position_0: marked.iter().filter(|t| t.is_multiple_of(self.tokens)).count() as u64,
            sequences: marked.iter().map(|t| t / self.tokens).collect::<BTreeSet<_>>().len() as u64,
            n_dims: self.dims.len(),
            dims,
            values_by_token_median: self.layers.values().map(|layer| layer.values_by_token_median).sum(),
            layers: self.layers.iter().map(|(index, layer)| layer.summary(*index, ids, self.tokens)).collect(),
        }
    }
}

impl Layer {
    fn summary(&self, layer: usize, ids: &[i64], tokens: usize) -> MassiveLayer {
        let mean = |sum: &ExactSum| sum.value() / self.sequences.max(1) as f64;
        let record = |hit: &Hit| {
            let magnitude = f64::from(hit.found.value.abs());
            let over = |median: f32| (median > 0.0).then(|| magnitude / f64::from(median));
            let (ratio, ratio_in_token) = (over(hit.sequence_median), over(hit.token_median));
            MassiveRecord { at: hit.found.record(ids, tokens), ratio, ratio_in_token }
        };
        let tops = self.top_magnitudes.iter().filter(|sum| **sum != ExactSum::default());
        MassiveLayer {
            layer,
            values: self.values,
            tokens: self.tokens,
            values_by_token_median: self.values_by_token_median,
            tokens_by_token_median: self.tokens_by_token_median,
            mean_top_magnitudes: tops.map(mean).collect(),
            mean_median: mean(&self.medians),
            records: self.hits.descending().iter().map(record).collect(),
        }
    }
}

impl Dim {
    fn merge(&mut self, other: &Self) {
        self.values += other.values;
        self.values_at_position_0 += other.values_at_position_0;
        self.layers.extend(&other.layers);
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    fn summary(&self, dim: usize) -> MassiveDim {
        MassiveDim {
            dim,
            values: self.values,
            values_at_position_0: self.values_at_position_0,
            n_layers: self.layers.len(),
            first_layer: *self.layers.first().expect("made with one"),
            last_layer: *self.layers.last().expect("made with one"),
            min: self.min,
            max: self.max,
        }
    }
}

#[cfg(test)]
mod tests {
    use outliers_scan::Rows;
    use proptest::prelude::*;

    use super::*;

    const HIDDEN: usize = 6;

    /// Residual streams of a corpus: `[layer][sequence]` of `[tokens, HIDDEN]`.
    type Streams = Vec<Vec<Vec<f32>>>;

    fn count(streams: &Streams, tokens: usize, order: &[usize]) -> Massive {
        let mut massive = Massive::new(streams[0].len(), tokens);
        for (layer, sequences) in streams.iter().enumerate() {
            for &s in order {
                let host = Rows { x: &sequences[s], width: HIDDEN, tokens };
                massive.add(layer, s * tokens, &Values::Host(host), &host.scan()).unwrap();
            }
        }
        massive
    }

    fn lower_median(x: &[f32]) -> f32 {
        let mut magnitudes: Vec<f32> = x.iter().map(|v| v.abs()).collect();
        magnitudes.sort_by(f32::total_cmp);
        magnitudes[(x.len() - 1) / 2]
    }

    /// (layer, token, dim) by the definition, with the median of the sequence or of the token.
    fn naive(streams: &Streams, tokens: usize, of_token: bool) -> Vec<(usize, usize, usize)> {
        let mut hits = Vec::new();
        for (layer, sequences) in streams.iter().enumerate() {
            for (s, x) in sequences.iter().enumerate() {
                for (t, row) in x.chunks(HIDDEN).enumerate() {
                    let median = lower_median(if of_token { row } else { x });
                    let massive = |v: &f32| v.abs() > 100.0 && f64::from(v.abs()) >= 1000.0 * f64::from(median);
                    let dims = row.iter().enumerate().filter(|(_, v)| massive(v)).map(|(dim, _)| dim);
                    hits.extend(dims.map(|dim| (layer, s * tokens + t, dim)));
                }
            }
        }
        hits
    }

    prop_compose! {
        /// Small values, some of them near the rule's bounds.
        fn streams(tokens: usize)(
            layers in 1usize..4, sequences in 1usize..4,
        )(
            values in prop::collection::vec(
                prop::collection::vec(prop::collection::vec(prop_oneof![
                    6 => -0.2f32..0.2,
                    1 => prop::sample::select(vec![100.0f32, -100.0, 100.5, -150.0, 200.0, 1000.0, 0.0]),
                ], tokens * HIDDEN), sequences), layers),
        ) -> Streams {
            values
        }
    }

    proptest! {
        #[test]
        fn counts_follow_the_rule(streams in streams(5)) {
            let (tokens, sequences) = (5, streams[0].len());
            let ids: Vec<i64> = (0..sequences * tokens).map(|i| i as i64 * 3).collect();
            let forwards: Vec<usize> = (0..sequences).collect();
            let summary = count(&streams, tokens, &forwards).summary(&ids);
            let (hits, by_token) = (naive(&streams, tokens, false), naive(&streams, tokens, true));
            prop_assert_eq!(summary.values as usize, hits.len());
            prop_assert_eq!(summary.values_by_token_median as usize, by_token.len());
            prop_assert_eq!(summary.onset_layer, hits.iter().map(|h| h.0).min());
            prop_assert_eq!(summary.last_layer, hits.iter().map(|h| h.0).max());
            let distinct: BTreeSet<usize> = hits.iter().map(|h| h.1).collect();
            prop_assert_eq!(summary.tokens as usize, distinct.len());
            prop_assert_eq!(summary.tokens_at_position_0 as usize, distinct.iter().filter(|t| *t % tokens == 0).count());
            prop_assert_eq!(summary.sequences as usize, distinct.iter().map(|t| t / tokens).collect::<BTreeSet<_>>().len());
            prop_assert_eq!(summary.n_dims, hits.iter().map(|h| h.2).collect::<BTreeSet<_>>().len());
            for layer in &summary.layers {
                let tokens_of = |hits: &[(usize, usize, usize)]| {
                    hits.iter().filter(|h| h.0 == layer.layer).map(|h| h.1).collect::<BTreeSet<_>>().len()
                };
                prop_assert_eq!(layer.tokens as usize, tokens_of(&hits));
                prop_assert_eq!(layer.tokens_by_token_median as usize, tokens_of(&by_token));
                prop_assert_eq!(layer.records.len(), (layer.values as usize).min(MASSIVE_RECORDS));
                let mut tops = [0.0; 3];
                for x in &streams[layer.layer] {
                    let mut sorted: Vec<f32> = x.iter().map(|v| v.abs()).collect();
                    sorted.sort_by(|a, b| b.total_cmp(a));
                    tops.iter_mut().zip(&sorted).for_each(|(sum, v)| *sum += f64::from(*v) / sequences as f64);
                }
                for (got, want) in layer.mean_top_magnitudes.iter().zip(tops) {
                    prop_assert!((got - want).abs() <= 1e-12 * want);
                }
                for record in &layer.records {
                    let at = record.at;
                    let x = &streams[layer.layer][at.sequence];
                    prop_assert_eq!(x[at.position * HIDDEN + at.dim], at.value);
                    prop_assert_eq!(at.token_id, ids[at.sequence * tokens + at.position]);
                    let ratio = f64::from(at.value.abs()) / f64::from(lower_median(x));
                    prop_assert_eq!(record.ratio, ratio.is_finite().then_some(ratio));
                }
            }
            for dim in &summary.dims {
                prop_assert_eq!(dim.values as usize, hits.iter().filter(|h| h.2 == dim.dim).count());
                prop_assert_eq!(dim.n_layers, hits.iter().filter(|h| h.2 == dim.dim).map(|h| h.0).collect::<BTreeSet<_>>().len());
            }
        }

        #[test]
        fn order_and_grouping_of_sequences_do_not_matter(streams in streams(3)) {
            let ids = vec![7; streams[0].len() * 3];
            let forwards: Vec<usize> = (0..streams[0].len()).collect();
            let backwards: Vec<usize> = forwards.iter().rev().copied().collect();
            let whole = count(&streams, 3, &forwards).summary(&ids);
            prop_assert_eq!(&count(&streams, 3, &backwards).summary(&ids), &whole);
            let mut merged = count(&streams, 3, &forwards[1..]);
            merged.merge(&count(&streams, 3, &forwards[..1]));
            prop_assert_eq!(&merged.summary(&ids), &whole);
        }
    }

    #[test]
    fn first_token_spike_layers_are_found() {
        // Two sequences of three tokens. From layer 2 on, dimension 4 of each first token is
        // massive.
        let sequence = |value: f32| {
            let mut x = vec![0.1f32; 3 * HIDDEN];
            x[4] = value;
            x
        };
        let streams: Streams = [0.0, 99.0, -500.0, -510.0].map(|v| vec![sequence(v), sequence(v - 1.0)]).to_vec();
        let summary = count(&streams, 3, &[0, 1]).summary(&[11, 12, 13, 21, 22, 23]);
        assert_eq!((summary.onset_layer, summary.last_layer), (Some(2), Some(3)));
        assert_eq!((summary.values, summary.tokens, summary.tokens_at_position_0, summary.sequences), (4, 2, 2, 2));
        let [dim] = summary.dims[..] else { panic!("{:?}", summary.dims) };
        assert_eq!((dim.dim, dim.n_layers, dim.first_layer, dim.min, dim.max), (4, 2, 2, -511.0, -500.0));
        let first = summary.layers[3].records[0];
        assert_eq!((first.at.sequence, first.at.position, first.at.token_id, first.at.value), (1, 0, 21, -511.0));
        assert!((first.ratio.unwrap() - 5110.0).abs() < 1e-3);
        assert!((summary.layers[1].mean_top_magnitudes[0] - 98.5).abs() < 1e-9);
    }
}
