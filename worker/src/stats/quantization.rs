//! What outliers cost in few bits (arXiv 2509.23202, 2603.08713, 2604.17789); the definitions are
//! [`QuantizationErrors`]'.

use std::collections::BTreeMap;

use outliers_protocol::{
    NumberFormat, PooledQuantization, QUANTIZED_ROWS, QuantizationError, QuantizationErrors, SiteQuantization,
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Site;
use super::exact::ExactSum;
use crate::noise;

/// Dimensions that are rotated together; 0: none are.
const ROTATIONS: [usize; 4] = [0, 16, 32, 128];
/// Largest magnitudes of E4M3 and E2M1.
const E4M3_MAX: f32 = 448.0;
const E2M1_MAX: f32 = 6.0;

/// Every rotation with every format, in the order in which costs are kept.
fn ways() -> impl Iterator<Item = (usize, NumberFormat)> {
    ROTATIONS.into_iter().flat_map(|rotation| NumberFormat::ALL.into_iter().map(move |format| (rotation, format)))
}

/// What one row loses in one way.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Loss {
    /// Relative squared error.
    error: f64,
    /// The part of it that is in outlier blocks.
    in_outlier_blocks: f64,
    blocks: u64,
    outlier_blocks: u64,
}

/// Losses of some rows in one way.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Cost {
    rows: u64,
    error: ExactSum,
    in_outlier_blocks: ExactSum,
    blocks: u64,
    outlier_blocks: u64,
}

impl Cost {
    fn add(&mut self, loss: &Loss) {
        self.rows += 1;
        self.error.add(loss.error);
        self.in_outlier_blocks.add(loss.in_outlier_blocks);
        self.blocks += loss.blocks;
        self.outlier_blocks += loss.outlier_blocks;
    }

    fn merge(&mut self, other: &Self) {
        self.rows += other.rows;
        self.error.merge(&other.error);
        self.in_outlier_blocks.merge(&other.in_outlier_blocks);
        self.blocks += other.blocks;
        self.outlier_blocks += other.outlier_blocks;
    }

    fn summary(&self, (rotation, format): (usize, NumberFormat)) -> QuantizationError {
        let (error, in_outlier_blocks) = (self.error.value(), self.in_outlier_blocks.value());
        QuantizationError {
            format,
            rotation,
            rows: self.rows,
            error: error / self.rows.max(1) as f64,
            share_in_outlier_blocks: if error > 0.0 { in_outlier_blocks / error } else { 0.0 },
            outlier_blocks: self.outlier_blocks as f64 / self.blocks.max(1) as f64,
        }
    }
}

fn none() -> Vec<Cost> {
    ways().map(|_| Cost::default()).collect()
}

fn merge(mine: &mut [Cost], theirs: &[Cost]) {
    mine.iter_mut().zip(theirs).for_each(|(mine, theirs)| mine.merge(theirs));
}

/// Costs at every studied site. Memory: about 5 KiB per site and per sequence.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Quantization {
    threshold: f32,
    sequences: usize,
    tokens: usize,
    sites: BTreeMap<Site, Vec<Cost>>,
    /// Of all norm outputs, by sequence.
    norm_outputs: BTreeMap<usize, Vec<Cost>>,
}

impl Quantization {
    /// Nothing quantised yet, over sequences of `tokens` tokens; a block is an outlier block with
    /// a value of |x| >= `threshold`.
    pub fn new(sequences: usize, tokens: usize, threshold: f32) -> Self {
        Self { threshold, sequences, tokens, sites: BTreeMap::new(), norm_outputs: BTreeMap::new() }
    }

    /// Whether a token's rows are quantised: all of a short corpus, else each by a draw of its
    /// own, the same at every site and on every machine.
    fn is_sampled(&self, token: usize) -> bool {
        let all = (self.sequences * self.tokens) as u64;
        all <= QUANTIZED_ROWS as u64 || noise::mix(token as u64) < u64::MAX / all * QUANTIZED_ROWS as u64
    }

    /// Quantises the sampled rows among `x` `[rows, hidden]`; `token` says whose a row is.
    pub fn add(&mut self, site: Site, x: &[f32], hidden: usize, token: impl Fn(usize) -> usize) {
        let rows = x.chunks_exact(hidden).enumerate().map(|(row, x)| (token(row), x));
        let sampled: Vec<(usize, &[f32])> = rows.filter(|(token, _)| self.is_sampled(*token)).collect();
        let threshold = self.threshold;
        let losses = |(token, x): (usize, &[f32])| Some((token, losses(x, threshold)?));
        let losses: Vec<(usize, Vec<Loss>)> = sampled.into_par_iter().filter_map(losses).collect();
        let at_site = self.sites.entry(site).or_insert_with(none);
        for (token, losses) in losses {
            at_site.iter_mut().zip(&losses).for_each(|(cost, loss)| cost.add(loss));
            if site.point.is_norm_output() {
                let sequence = self.norm_outputs.entry(token / self.tokens).or_insert_with(none);
                sequence.iter_mut().zip(&losses).for_each(|(cost, loss)| cost.add(loss));
            }
        }
    }

    /// Adds what was quantised of other sites or other sequences.
    pub fn merge(&mut self, other: &Self) {
        for (site, theirs) in &other.sites {
            merge(self.sites.entry(*site).or_insert_with(none), theirs);
        }
        for (sequence, theirs) in &other.norm_outputs {
            merge(self.norm_outputs.entry(*sequence).or_insert_with(none), theirs);
        }
    }

    /// As reports have it.
    pub fn summary(&self) -> QuantizationErrors {
        let site = |(site, costs): (&Site, &Vec<Cost>)| SiteQuantization {
            layer: site.layer,
            point: site.point,
            errors: ways().zip(costs).map(|(way, cost)| cost.summary(way)).collect(),
        };
        let pooled = |(at, way): (usize, (usize, NumberFormat))| {
            let mut all = Cost::default();
            self.norm_outputs.values().for_each(|costs| all.merge(&costs[at]));
            let mean = |sequence: usize| {
                let cost = &self.norm_outputs.get(&sequence)?[at];
                Some(cost.error.value() / cost.rows as f64)
            };
            PooledQuantization { all: all.summary(way), per_sequence: (0..self.sequences).map(mean).collect() }
        };
        QuantizationErrors {
            rule: format!(
                "mean over about {QUANTIZED_ROWS} rows of |Q(x) - x|^2 / |x|^2; outlier blocks hold a value of |x| >= {}",
                self.threshold
            ),
            norm_outputs: ways().enumerate().map(pooled).collect(),
            sites: self.sites.iter().map(site).collect(),
        }
    }
}

/// Losses of one row in every way; `None` of zeros.
fn losses(x: &[f32], threshold: f32) -> Option<Vec<Loss>> {
    let squares: f64 = x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    if squares == 0.0 {
        return None;
    }
    let mut losses = Vec::with_capacity(ROTATIONS.len() * NumberFormat::ALL.len());
    for rotation in ROTATIONS {
        let rotated = rotated(x, rotation);
        for format in NumberFormat::ALL {
            let quantized = quantized(&rotated, format);
            let block = format.block().max(rotation);
            let mut loss = Loss { error: 0.0, in_outlier_blocks: 0.0, blocks: 0, outlier_blocks: 0 };
            let blocks = x.chunks(block).zip(rotated.chunks(block)).zip(quantized.chunks(block));
            for ((before, wanted), got) in blocks {
                let squared = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
                let error = got.iter().zip(wanted).map(squared).sum::<f64>() / squares;
                loss.blocks += 1;
                loss.error += error;
                if before.iter().any(|v| v.abs() >= threshold) {
                    loss.outlier_blocks += 1;
                    loss.in_outlier_blocks += error;
                }
            }
            losses.push(loss);
        }
    }
    Some(losses)
}

/// Each whole block of `size` values times the orthonormal Hadamard matrix.
fn rotated(x: &[f32], size: usize) -> Vec<f32> {
    let mut x = x.to_vec();
    if size > 0 {
        let scale = (size as f32).sqrt().recip();
        for block in x.chunks_exact_mut(size) {
            hadamard(block);
            block.iter_mut().for_each(|v| *v *= scale);
        }
    }
    x
}

/// Times Sylvester's matrix of ones and minus ones; the length is a power of two.
fn hadamard(block: &mut [f32]) {
    let mut half = 1;
    while half < block.len() {
        for pair in block.chunks_exact_mut(2 * half) {
            let (left, right) = pair.split_at_mut(half);
            for (a, b) in left.iter_mut().zip(right) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
}

/// What a row becomes in a format.
fn quantized(x: &[f32], format: NumberFormat) -> Vec<f32> {
    let e2m1 = |v: f32| rounded(v, 0, 1, E2M1_MAX);
    let e4m3 = |v: f32| rounded(v, -6, 3, E4M3_MAX);
    match format {
        NumberFormat::Int8PerToken => scaled(x, largest(x) / 127.0, |v| v.round_ties_even().clamp(-127.0, 127.0)),
        NumberFormat::Fp8Per128 => by_block(x, 128, |block| scaled(block, largest(block) / E4M3_MAX, e4m3)),
        NumberFormat::Mxfp4 => by_block(x, 32, |block| scaled(block, power_of_two(exponent(largest(block)) - 2), e2m1)),
        NumberFormat::Nvfp4 => {
            let of_row = largest(x) / (E4M3_MAX * E2M1_MAX);
            by_block(x, 16, |block| scaled(block, e4m3(largest(block) / E2M1_MAX / of_row) * of_row, e2m1))
        }
    }
}

fn by_block(x: &[f32], size: usize, quantized: impl Fn(&[f32]) -> Vec<f32>) -> Vec<f32> {
    x.chunks(size).flat_map(quantized).collect()
}

/// Values over a scale, rounded, times the scale; zeros where the scale is too small for a number.
fn scaled(x: &[f32], scale: f32, round: impl Fn(f32) -> f32) -> Vec<f32> {
    x.iter().map(|v| if scale > 0.0 { round(v / scale) * scale } else { 0.0 }).collect()
}

/// Largest |x|.
fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |largest, v| v.abs().max(largest))
}

/// The nearest number with so many bits of mantissa, ties to even; below 2^`least` all steps are
/// the same. Larger ones become `most`.
fn rounded(v: f32, least: i32, mantissa_bits: i32, most: f32) -> f32 {
    let magnitude = v.abs().min(most);
    let step = power_of_two(exponent(magnitude).max(least) - mantissa_bits);
    ((magnitude / step).round_ties_even() * step).copysign(v)
}

/// floor(log2 v) of v > 0 that is not subnormal.
fn exponent(v: f32) -> i32 {
    (v.to_bits() >> 23) as i32 - 127
}

fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent.clamp(-126, 127) + 127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use outliers_protocol::Point;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_are_those_of_the_formats() {
        let e2m1: Vec<f32> = [0.2, 0.25, 0.26, 0.75, 1.25, 1.3, 2.5, 3.5, 5.0, 5.1, 9.0, -2.6]
            .into_iter()
            .map(|v| rounded(v, 0, 1, E2M1_MAX))
            .collect();
        assert_eq!(e2m1, [0.0, 0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 4.0, 4.0, 6.0, 6.0, -3.0]);
        let e4m3 = |v| rounded(v, -6, 3, E4M3_MAX);
        let smallest = 2f32.powi(-9);
        let numbers = [447.0, 1000.0, 17.0, 18.9, smallest, 0.4 * smallest].map(e4m3);
        assert_eq!(numbers, [448.0, 448.0, 16.0, 18.0, smallest, 0.0]);
    }

    #[test]
    fn scales_are_those_of_the_formats() {
        let mut x = vec![0.0; 32];
        (x[0], x[1], x[16], x[17]) = (7.9, 1.1, 0.1, 0.05);
        let mx = quantized(&x, NumberFormat::Mxfp4);
        assert_eq!((mx[0], mx[1], mx[16]), (6.0, 1.0, 0.0), "scale 1: cut at 6");
        let nv = quantized(&x, NumberFormat::Nvfp4);
        assert!((nv[0] - 7.9).abs() < 1e-5 && (nv[16] - 0.1).abs() < 0.004, "a scale for every 16: {nv:?}");
        assert_eq!(quantized(&x, NumberFormat::Int8PerToken)[1], (1.1f32 / (7.9 / 127.0)).round() * (7.9 / 127.0));
    }

    #[test]
    fn a_rotation_spreads_what_stands_out() {
        let mut x = vec![0.0; 40];
        x[3] = 8.0;
        let y = rotated(&x, 16);
        assert!(y[..16].iter().all(|v| v.abs() == 2.0) && y[16..].iter().all(|v| *v == 0.0), "{y:?}");
        let rest = rotated(&[vec![0.0; 32], vec![5.0; 8]].concat(), 16);
        assert_eq!(rest[32..], [5.0; 8], "what fills no block is left as it is");
    }

    #[test]
    fn about_as_many_rows_are_drawn_as_are_wanted() {
        let drawn = |sequences, tokens| {
            let quantization = Quantization::new(sequences, tokens, 6.0);
            (0..sequences * tokens).filter(|token| quantization.is_sampled(*token)).count()
        };
        assert_eq!(drawn(4, 96), 384);
        assert!((400..640).contains(&drawn(16, 2048)), "{}", drawn(16, 2048));
    }

    proptest! {
        #[test]
        fn cuts_and_order_change_nothing(x in prop::collection::vec(-9f32..9.0, 6 * 20), cut in 0usize..=6) {
            let site = Site { layer: 0, point: Point::BeforeMlp };
            let of = |parts: &[(usize, &[f32])]| {
                let mut all = Quantization::new(2, 3, 6.0);
                for (first, part) in parts {
                    let mut quantization = Quantization::new(2, 3, 6.0);
                    quantization.add(site, part, 20, |row| first + row);
                    all.merge(&quantization);
                }
                all.summary()
            };
            let (left, right) = x.split_at(cut * 20);
            prop_assert_eq!(of(&[(cut, right), (0, left)]), of(&[(0, &x)]));
        }
    }
}
