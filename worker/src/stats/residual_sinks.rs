//! Dimensions of the residual stream that are large at most tokens (arXiv 2601.22966); the
//! definitions are [`ResidualSinks`]'.

use std::collections::BTreeMap;

use outliers_protocol::{RESIDUAL_SINKS, ResidualSink, ResidualSinkLayer, ResidualSinks};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::fixed_point;
use super::rows::Scan;

/// Share of the tokens from which on a dimension is a sink.
const MOST: f64 = 0.5;
/// Dimensions per task.
const CHUNK: usize = 256;

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Dim {
    /// Tokens at which it is large.
    tokens: u64,
    /// Sum over tokens of its share of the token's sum of x^2, in fixed point.
    squares: i64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Layer {
    tokens: u64,
    dims: Vec<Dim>,
}

/// Counts by layer. Memory: 16 bytes per layer and dimension.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sinks {
    threshold: f32,
    layers: BTreeMap<usize, Layer>,
}

impl Sinks {
    /// None yet; |x| is large from `threshold` x RMS on.
    pub fn new(threshold: f32) -> Self {
        Self { threshold, layers: BTreeMap::new() }
    }

    /// Takes the residual stream `x` `[rows, hidden]` after a layer.
    pub fn add(&mut self, layer: usize, x: &[f32], scan: &Scan) {
        let hidden = x.len() / scan.rows.len();
        let layer = self.layers.entry(layer).or_insert_with(|| Layer { tokens: 0, dims: vec![Dim::default(); hidden] });
        layer.tokens += scan.rows.len() as u64;
        let times = f64::from(self.threshold).powi(2) / hidden as f64;
        layer.dims.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, dims)| {
            for (row, x) in scan.rows.iter().zip(x.chunks_exact(hidden)).filter(|(row, _)| row.squares > 0.0) {
                for (dim, v) in dims.iter_mut().zip(&x[chunk * CHUNK..]) {
                    let square = f64::from(*v) * f64::from(*v);
                    dim.squares += fixed_point::from_f64(square / row.squares);
                    dim.tokens += u64::from(square >= times * row.squares);
                }
            }
        });
    }

    /// Adds what was counted of other layers or other sequences.
    pub fn merge(&mut self, other: &Self) {
        for (layer, theirs) in &other.layers {
            let none = || Layer { tokens: 0, dims: vec![Dim::default(); theirs.dims.len()] };
            let mine = self.layers.entry(*layer).or_insert_with(none);
            mine.tokens += theirs.tokens;
            for (mine, theirs) in mine.dims.iter_mut().zip(&theirs.dims) {
                mine.tokens += theirs.tokens;
                mine.squares += theirs.squares;
            }
        }
    }

    /// As reports have it. `gains` gives those of the norm that reads the stream after a layer.
    pub fn summary<'a>(&self, gains: impl Fn(usize) -> Option<&'a [f32]>) -> ResidualSinks {
        let layer = |(index, layer): (&usize, &Layer)| {
            let gains = gains(*index);
            let sink = |(dim, counted): (usize, &Dim)| ResidualSink {
                dim,
                share_of_tokens: counted.tokens as f64 / layer.tokens as f64,
                share_of_squares: fixed_point::to_f64(counted.squares) / layer.tokens as f64,
                gain: gains.map(|gains| gains[dim]),
            };
            let is_sink = |sink: &ResidualSink| sink.share_of_tokens >= MOST;
            let mut dims: Vec<ResidualSink> = layer.dims.iter().enumerate().map(sink).filter(is_sink).collect();
            dims.sort_by(|a, b| b.share_of_squares.total_cmp(&a.share_of_squares).then(a.dim.cmp(&b.dim)));
            let (n_dims, share_of_squares) = (dims.len(), dims.iter().map(|sink| sink.share_of_squares).sum());
            dims.truncate(RESIDUAL_SINKS);
            ResidualSinkLayer { layer: *index, n_dims, share_of_squares, dims }
        };
        ResidualSinks {
            rule: format!(
                "|x| >= {} x RMS of the token's residual stream at {:.0} % of the tokens or more",
                self.threshold,
                100.0 * MOST
            ),
            layers: self.layers.iter().map(layer).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dimension_that_is_large_at_most_tokens_is_a_sink_and_one_spike_is_none() {
        let mut x = vec![1.0f32; 4 * 100];
        (0..3).for_each(|token| x[token * 100 + 7] = -20.0);
        x[399] = 5000.0;
        let mut sinks = Sinks::new(6.0);
        for part in [&x[200..], &x[..200]] {
            let mut of_part = Sinks::new(6.0);
            of_part.add(3, part, &Scan::of(part, 100));
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
    }

    #[test]
    fn tokens_of_zeros_are_large_nowhere() {
        let mut sinks = Sinks::new(6.0);
        sinks.add(0, &[0.0; 12], &Scan::of(&[0.0; 12], 4));
        assert_eq!(sinks.summary(|_| None).layers[0].n_dims, 0);
    }
}
