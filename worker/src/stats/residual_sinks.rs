//! Dimensions of the residual stream that are large at most tokens (arXiv 2601.22966), as defined
//! by [`ResidualSinks`].

use std::cmp::Reverse;
use std::collections::BTreeMap;

use outliers_protocol::{
    MAPPED_DIMS, MAPPED_POSITIONS, MappedDim, RESIDUAL_SINKS, ResidualMap, ResidualSink, ResidualSinkLayer,
    ResidualSinks,
};
use outliers_scan::vectorize;
use outliers_scan::{Row, Scan};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::fixed_point;

/// Minimum share of the tokens for a sink.
const MAJORITY: f64 = 0.5;
/// Dimensions per task.
const CHUNK: usize = 256;

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Dim {
    /// Number of tokens at which it is large.
    tokens: u64,
    /// Sum over tokens of its share of the token's sum of x^2, in fixed point.
    squares: i64,
}

impl Dim {
    fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.squares += other.squares;
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Layer {
    tokens: u64,
    dims: Vec<Dim>,
    /// Per sequence: the number of tokens, and the dimensions with the largest shares with their
    /// sums in fixed point.
    sequences: BTreeMap<usize, (u64, Vec<(u32, i64)>)>,
    /// Some dimensions of the first sequence with their values, as in [`ResidualMap`]; empty until
    /// it is observed.
    first: Vec<(usize, Vec<f32>)>,
}

impl Layer {
    fn new(hidden: usize) -> Self {
        Self { tokens: 0, dims: vec![Dim::default(); hidden], sequences: BTreeMap::new(), first: Vec::new() }
    }

    fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.dims.iter_mut().zip(&other.dims).for_each(|(mine, theirs)| mine.merge(theirs));
        self.sequences.extend(other.sequences.iter().map(|(sequence, seen)| (*sequence, seen.clone())));
        if !other.first.is_empty() {
            self.first.clone_from(&other.first);
        }
    }

    fn is_sink(&self, dim: usize) -> bool {
        self.dims[dim].tokens as f64 / self.tokens as f64 >= MAJORITY
    }

    /// The share of the sinks in each sequence.
    fn per_sequence(&self) -> Vec<f64> {
        let share = |(tokens, dims): &(u64, Vec<(u32, i64)>)| {
            let sinks = dims.iter().filter(|(dim, _)| self.is_sink(*dim as usize));
            sinks.map(|(_, squares)| fixed_point::to_f64(*squares)).sum::<f64>() / *tokens as f64
        };
        self.sequences.values().map(share).collect()
    }

    fn map(&self, layer: usize) -> ResidualMap {
        let dim = |(dim, values): &(usize, Vec<f32>)| MappedDim {
            dim: *dim,
            is_sink: self.is_sink(*dim),
            values: values.clone(),
        };
        ResidualMap { layer, dims: self.first.iter().map(dim).collect() }
    }
}

/// Values of the dimensions with the largest shares and of some others, divided by the RMS of
/// their rows.
fn excerpt(largest: &[(u32, i64)], x: &[f32], scan: &Scan) -> Vec<(usize, Vec<f32>)> {
    let hidden = x.len() / scan.rows.len();
    let mut dims: Vec<usize> = largest.iter().take(MAPPED_DIMS).map(|(dim, _)| *dim as usize).collect();
    for i in 0..MAPPED_DIMS {
        let other = (2 * i + 1) * hidden / (2 * MAPPED_DIMS);
        if !dims.contains(&other) {
            dims.push(other);
        }
    }
    let value = |(row, x): (&Row, &[f32]), dim: usize| {
        let rms = (row.squares / hidden as f64).sqrt();
        if rms > 0.0 { (f64::from(x[dim]) / rms) as f32 } else { 0.0 }
    };
    let rows = || scan.rows.iter().zip(x.chunks_exact(hidden)).take(MAPPED_POSITIONS);
    dims.into_iter().map(|dim| (dim, rows().map(|row| value(row, dim)).collect())).collect()
}

/// Fills up to [`CHUNK`] adjacent dimensions. `x` begins with the first of them in the first row.
/// A value is large if its square is at least `times` the row's sum of squares.
#[inline(always)]
fn count(dims: &mut [Dim], rows: &[Row], x: &[f32], hidden: usize, times: f64) {
    let (mut tokens, mut squares) = ([0u64; CHUNK], [0i64; CHUNK]);
    for (row, x) in rows.iter().zip(x.chunks(hidden)) {
        if row.squares > 0.0 {
            let (least, inverse) = (times * row.squares, row.squares.recip());
            for ((tokens, squares), v) in tokens.iter_mut().zip(&mut squares).zip(&x[..dims.len()]) {
                let square = f64::from(*v) * f64::from(*v);
                *tokens += u64::from(square >= least);
                *squares += fixed_point::from_f64(square * inverse);
            }
        }
    }
    for ((dim, tokens), squares) in dims.iter_mut().zip(tokens).zip(squares) {
        *dim = Dim { tokens, squares };
    }
}

/// Counts per layer. Memory: 16 bytes per layer and dimension, the same per layer, sequence and
/// [`RESIDUAL_SINKS`], and 4 KiB per layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ResidualSinkCounts {
    threshold: f32,
    layers: BTreeMap<usize, Layer>,
}

impl ResidualSinkCounts {
    /// Empty counts. |x| is large from `threshold` x RMS on.
    pub fn new(threshold: f32) -> Self {
        Self { threshold, layers: BTreeMap::new() }
    }

    /// Adds the residual stream `x` `[rows, hidden]` of a whole sequence after a layer.
    pub fn add(&mut self, layer: usize, sequence: usize, x: &[f32], scan: &Scan) {
        let hidden = x.len() / scan.rows.len();
        let mut seen = Layer::new(hidden);
        seen.tokens = scan.rows.len() as u64;
        let times = f64::from(self.threshold).powi(2) / hidden as f64;
        seen.dims.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, dims)| {
            vectorize!(count(dims, &scan.rows, &x[chunk * CHUNK..], hidden, times));
        });
        let mut largest: Vec<(u32, i64)> = (0..).zip(seen.dims.iter().map(|dim| dim.squares)).collect();
        largest.sort_unstable_by_key(|(dim, squares)| (Reverse(*squares), *dim));
        largest.truncate(RESIDUAL_SINKS);
        largest.shrink_to_fit();
        if sequence == 0 {
            seen.first = excerpt(&largest, x, scan);
        }
        seen.sequences.insert(sequence, (seen.tokens, largest));
        self.layers.entry(layer).or_insert_with(|| Layer::new(hidden)).merge(&seen);
    }

    /// Adds counts of other layers or other sequences.
    pub fn merge(&mut self, other: &Self) {
        for (layer, theirs) in &other.layers {
            self.layers.entry(*layer).or_insert_with(|| Layer::new(theirs.dims.len())).merge(theirs);
        }
    }

    /// The result for reports. `gains` returns the gains of the norm that reads the stream after a
    /// layer.
    pub fn summary<'a>(&self, gains: impl Fn(usize) -> Option<&'a [f32]>) -> ResidualSinks {
        let layer = |(index, layer): (&usize, &Layer)| {
            let gains = gains(*index);
            let sink = |(dim, counted): (usize, &Dim)| ResidualSink {
                dim,
                share_of_tokens: counted.tokens as f64 / layer.tokens as f64,
                share_of_squares: fixed_point::to_f64(counted.squares) / layer.tokens as f64,
                gain: gains.map(|gains| gains[dim]),
            };
            let counted = layer.dims.iter().enumerate().filter(|(dim, _)| layer.is_sink(*dim));
            let mut dims: Vec<ResidualSink> = counted.map(sink).collect();
            dims.sort_by(|a, b| b.share_of_squares.total_cmp(&a.share_of_squares).then(a.dim.cmp(&b.dim)));
            let (n_dims, share_of_squares) = (dims.len(), dims.iter().map(|sink| sink.share_of_squares).sum());
            dims.truncate(RESIDUAL_SINKS);
            ResidualSinkLayer { layer: *index, n_dims, share_of_squares, dims }
        };
        let layers: Vec<ResidualSinkLayer> = self.layers.iter().map(layer).collect();
        let most = layers.iter().max_by(|a, b| a.share_of_squares.total_cmp(&b.share_of_squares));
        let most = most.map(|most| (most.layer, most.n_dims, &self.layers[&most.layer]));
        let sinks = most.filter(|(_, n_dims, _)| *n_dims > 0);
        ResidualSinks {
            per_sequence: sinks.map(|(.., seen)| seen.per_sequence()).unwrap_or_default(),
            map: most.map(|(layer, _, seen)| seen.map(layer)),
            rule: format!(
                "|x| >= {} x RMS of the token's residual stream at {:.0} % of the tokens or more",
                self.threshold,
                100.0 * MAJORITY
            ),
            layers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimension_large_at_most_tokens_is_a_sink_and_one_spike_is_not() {
        let mut x = vec![1.0f32; 4 * 100];
        (0..3).for_each(|token| x[token * 100 + 7] = -20.0);
        x[399] = 5000.0;
        let mut sinks = ResidualSinkCounts::new(6.0);
        for (sequence, part) in [(1, &x[200..]), (0, &x[..200])] {
            let mut of_part = ResidualSinkCounts::new(6.0);
            of_part.add(3, sequence, part, &Scan::of(part, 100));
            sinks.merge(&of_part);
        }
        let gains = vec![0.5; 100];
        let summary = sinks.summary(|layer| (layer == 3).then_some(gains.as_slice()));
        let [layer] = &summary.layers[..] else { panic!("{summary:?}") };
        let [sink] = layer.dims[..] else { panic!("{layer:?}") };
        assert_eq!((layer.layer, layer.n_dims, sink.dim, sink.share_of_tokens), (3, 1, 7, 0.75));
        let share = (3.0 * 400.0 / 499.0 + 1.0 / (99.0 + 25e6)) / 4.0;
        assert!((sink.share_of_squares - share).abs() < 1e-9 && layer.share_of_squares == sink.share_of_squares);
        assert_eq!(sink.gain, Some(0.5));
        let map = summary.map.as_ref().unwrap();
        let dims: Vec<(usize, bool)> = map.dims.iter().map(|dim| (dim.dim, dim.is_sink)).collect();
        assert_eq!((map.layer, dims.len(), dims[0], dims[1]), (3, 15, (7, true), (0, false)));
        assert_eq!((dims[8], dims[14]), ((18, false), (93, false)), "others are evenly spread; 6 is among the largest");
        let values = &map.dims[0].values;
        assert!(values.len() == 2 && values.iter().all(|v| (v + 20.0 / 4.99f32.sqrt()).abs() < 1e-5), "{values:?}");
        let [first, second] = summary.per_sequence[..] else { panic!("{summary:?}") };
        assert!((first - 400.0 / 499.0).abs() < 1e-9 && ((first + second) / 2.0 - share).abs() < 1e-9);
    }

    #[test]
    fn every_dimension_of_a_wide_row_is_counted() {
        let (hidden, tokens) = (2 * CHUNK + 37, 5);
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) * if i.is_multiple_of(97) { 40.0 } else { 0.5 };
        let mut x: Vec<f32> = (0..tokens * hidden).map(value).collect();
        x[2 * hidden..3 * hidden].fill(0.0);
        let mut sinks = ResidualSinkCounts::new(2.0);
        sinks.add(0, 0, &x, &Scan::of(&x, hidden));
        let layer = &sinks.layers[&0];
        assert_eq!((layer.tokens, layer.dims.len()), (tokens as u64, hidden));
        for (dim, counted) in layer.dims.iter().enumerate() {
            let (mut large, mut share) = (0, 0.0);
            for row in x.chunks(hidden) {
                let squares: f64 = row.iter().map(|v| f64::from(*v).powi(2)).sum();
                if squares > 0.0 {
                    large += u64::from(f64::from(row[dim].abs()) >= 2.0 * (squares / hidden as f64).sqrt());
                    share += f64::from(row[dim]).powi(2) / squares;
                }
            }
            assert_eq!(counted.tokens, large, "dimension {dim}");
            assert!((fixed_point::to_f64(counted.squares) - share).abs() < 1e-11, "dimension {dim}");
        }
    }

    #[test]
    fn zero_tokens_have_no_large_dimension() {
        let mut sinks = ResidualSinkCounts::new(6.0);
        sinks.add(0, 0, &[0.0; 12], &Scan::of(&[0.0; 12], 4));
        let summary = sinks.summary(|_| None);
        assert_eq!((summary.layers[0].n_dims, summary.per_sequence.len()), (0, 0));
    }
}
