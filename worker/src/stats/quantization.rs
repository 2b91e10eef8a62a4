//! Quantisation errors with outliers (arXiv 2509.23202, 2603.08713, 2604.17789), as defined by
//! [`QuantizationErrors`].

use std::collections::BTreeMap;

use outliers_protocol::{
    NumberFormat, PooledQuantization, QUANTIZED_ROWS, QuantizationError, QuantizationErrors, SiteQuantization,
};
use outliers_scan::vectorize;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Site;
use super::exact::ExactSum;
use crate::noise;

/// Dimensions per rotated block; 0: no rotation.
const ROTATIONS: [usize; 4] = [0, 16, 32, 128];
/// Combinations of rotations and formats.
const WAYS: usize = ROTATIONS.len() * NumberFormat::ALL.len();
/// Largest magnitudes of E4M3 and E2M1.
const E4M3_MAX: f32 = 448.0;
const E2M1_MAX: f32 = 6.0;

/// All combinations, in the order of costs.
fn ways() -> impl Iterator<Item = (usize, NumberFormat)> {
    ROTATIONS.into_iter().flat_map(|rotation| NumberFormat::ALL.into_iter().map(move |format| (rotation, format)))
}

/// Error of one row in one combination.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Loss {
    /// Relative squared error.
    error: f64,
    /// Part of the error in outlier blocks.
    in_outlier_blocks: f64,
    blocks: u64,
    outlier_blocks: u64,
}

/// Sum of errors over rows in one combination.
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

/// Errors at every studied site. Memory: about 5 KiB per site and per sequence.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Quantization {
    threshold: f32,
    sequences: usize,
    tokens: usize,
    sites: BTreeMap<Site, Vec<Cost>>,
    /// Sums over all norm outputs, per sequence.
    norm_outputs: BTreeMap<usize, Vec<Cost>>,
}

impl Quantization {
    /// Empty, for sequences of `tokens` tokens. An outlier block contains a value with |x| >=
    /// `threshold`.
    pub fn new(sequences: usize, tokens: usize, threshold: f32) -> Self {
        Self { threshold, sequences, tokens, sites: BTreeMap::new(), norm_outputs: BTreeMap::new() }
    }

    /// Whether a token's rows are quantised: all tokens of a short corpus, else a pseudo-random
    /// sample that is the same at every site and on every machine.
    fn is_sampled(&self, token: usize) -> bool {
        let all = (self.sequences * self.tokens) as u64;
        all <= QUANTIZED_ROWS as u64 || noise::mix(token as u64) < u64::MAX / all * QUANTIZED_ROWS as u64
    }

    /// Quantises the sampled rows of `x` `[rows, hidden]`. `token` gives the token of a row.
    pub fn add(&mut self, site: Site, x: &[f32], hidden: usize, token: impl Fn(usize) -> usize) {
        let rows = x.chunks_exact(hidden).enumerate().map(|(row, x)| (token(row), x));
        let sampled: Vec<(usize, &[f32])> = rows.filter(|(token, _)| self.is_sampled(*token)).collect();
        let threshold = self.threshold;
        let losses = |row: &mut QuantizedRow, (token, x): (usize, &[f32])| Some((token, row.losses(x, threshold)?));
        let losses: Vec<_> = sampled.into_par_iter().map_init(QuantizedRow::default, losses).collect();
        let at_site = self.sites.entry(site).or_insert_with(none);
        for (token, losses) in losses.into_iter().flatten() {
            at_site.iter_mut().zip(&losses).for_each(|(cost, loss)| cost.add(loss));
            if site.point.is_norm_output() {
                let sequence = self.norm_outputs.entry(token / self.tokens).or_insert_with(none);
                sequence.iter_mut().zip(&losses).for_each(|(cost, loss)| cost.add(loss));
            }
        }
    }

    /// Adds errors of other sites or other sequences.
    pub fn merge(&mut self, other: &Self) {
        for (site, theirs) in &other.sites {
            merge(self.sites.entry(*site).or_insert_with(none), theirs);
        }
        for (sequence, theirs) in &other.norm_outputs {
            merge(self.norm_outputs.entry(*sequence).or_insert_with(none), theirs);
        }
    }

    /// The result for reports.
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
                "mean over the rows of about {QUANTIZED_ROWS} tokens at each site of |Q(x) - x|^2 / |x|^2; outlier blocks hold a value of |x| >= {}",
                self.threshold
            ),
            norm_outputs: ways().enumerate().map(pooled).collect(),
            sites: self.sites.iter().map(site).collect(),
        }
    }
}

/// Values processed together: the shortest block.
const LANES: usize = 16;
type Lanes = [f32; LANES];

/// Buffers of one row, reused so that rows do not allocate.
///
/// Every block is a multiple of [`LANES`] values. Zeros pad the last block; they change neither
/// the maximum nor the error.
#[derive(Default)]
struct QuantizedRow {
    /// Number of values.
    len: usize,
    /// The original values.
    plain: Vec<Lanes>,
    /// Blocks multiplied by Sylvester's matrix of the current size.
    sums: Vec<Lanes>,
    /// The rotated values that are quantised.
    rotated: Vec<Lanes>,
    /// Largest |x| per element of `rotated`.
    largest: Vec<f32>,
    /// Whether each element of `plain` contains an outlier.
    outliers: Vec<bool>,
    /// Sum of x^2.
    squares: f64,
}

impl QuantizedRow {
    /// Errors of a row of finite values in all combinations; `None` for a row of zeros.
    fn losses(&mut self, x: &[f32], threshold: f32) -> Option<[Loss; WAYS]> {
        vectorize!(self.losses_in_every_way(x, threshold))
    }

    #[inline(always)]
    fn losses_in_every_way(&mut self, x: &[f32], threshold: f32) -> Option<[Loss; WAYS]> {
        self.load(x);
        if self.squares == 0.0 {
            return None;
        }
        let (mut losses, mut smaller) = ([Loss::default(); WAYS], 0);
        for (losses, rotation) in losses.chunks_exact_mut(NumberFormat::ALL.len()).zip(ROTATIONS) {
            self.rotate(smaller, rotation);
            smaller = rotation;
            if rotation == 0 {
                self.outliers.clear();
                self.outliers.extend(self.largest.iter().map(|largest| *largest >= threshold));
            }
            for (loss, format) in losses.iter_mut().zip(NumberFormat::ALL) {
                *loss = self.loss(rotation, format);
            }
        }
        Some(losses)
    }

    #[inline(always)]
    fn load(&mut self, x: &[f32]) {
        let (whole, rest) = x.as_chunks::<LANES>();
        self.len = x.len();
        self.plain.clear();
        self.plain.extend_from_slice(whole);
        if !rest.is_empty() {
            let mut last = [0.0; LANES];
            last[..rest.len()].copy_from_slice(rest);
            self.plain.push(last);
        }
        self.sums.clone_from(&self.plain);
        self.rotated.clone_from(&self.plain);
        self.largest.resize(self.plain.len(), 0.0);
        self.squares = sum_of_squares(&self.plain);
    }

    /// Multiplies each whole block of `size` values by the orthonormal Hadamard matrix; 0: no
    /// rotation. Sizes ascend: `smaller` is the previous one.
    #[inline(always)]
    fn rotate(&mut self, smaller: usize, size: usize) {
        let whole = self.len / size.max(1) * size / LANES;
        hadamard(&mut self.sums[..whole], smaller, size);
        let scale = (size as f32).sqrt().recip();
        for (rotated, sums) in self.rotated.iter_mut().zip(&self.sums[..whole]) {
            for (rotated, sum) in rotated.iter_mut().zip(sums) {
                *rotated = sum * scale;
            }
        }
        self.rotated[whole..].copy_from_slice(&self.plain[whole..]);
        for (largest, lanes) in self.largest.iter_mut().zip(&self.rotated) {
            *largest = folded(lanes, |a, b| larger(a.abs(), b.abs()));
        }
    }

    #[inline(always)]
    fn loss(&self, rotation: usize, format: NumberFormat) -> Loss {
        let of_row = largest(&self.largest);
        match format {
            NumberFormat::Int8PerToken => self.loss_of_blocks(rotation, format, |_| of_row / 127.0, int8),
            NumberFormat::Fp8Per128 => self.loss_of_blocks(rotation, format, |largest| largest / E4M3_MAX, e4m3),
            NumberFormat::Mxfp4 => {
                self.loss_of_blocks(rotation, format, |largest| power_of_two(exponent(largest) - 2), e2m1)
            }
            NumberFormat::Nvfp4 => {
                let of_row = of_row / (E4M3_MAX * E2M1_MAX);
                self.loss_of_blocks(rotation, format, |largest| e4m3(largest / E2M1_MAX / of_row) * of_row, e2m1)
            }
        }
    }

    /// The error with one scale per block, from its largest |x|.
    #[inline(always)]
    fn loss_of_blocks(
        &self,
        rotation: usize,
        format: NumberFormat,
        scale: impl Fn(f32) -> f32,
        round: impl Fn(f32) -> f32,
    ) -> Loss {
        let (scaled, block) = (format.block() / LANES, format.block().max(rotation) / LANES);
        let mut loss = Loss::default();
        let blocks = self.rotated.chunks(block).zip(self.largest.chunks(block)).zip(self.outliers.chunks(block));
        for ((values, maxima), outliers) in blocks {
            let mut error = 0.0;
            for (values, maxima) in values.chunks(scaled).zip(maxima.chunks(scaled)) {
                error += squared_error(values, scale(largest(maxima)), &round);
            }
            error /= self.squares;
            loss.blocks += 1;
            loss.error += error;
            if outliers.contains(&true) {
                loss.outlier_blocks += 1;
                loss.in_outlier_blocks += error;
            }
        }
        loss
    }
}

/// Multiplies each block of `size` values by Sylvester's matrix of ones and minus ones. Blocks of
/// `smaller` values are already multiplied, unless it is 0. Both sizes are powers of two.
#[inline(always)]
fn hadamard(blocks: &mut [Lanes], smaller: usize, size: usize) {
    if smaller < LANES {
        for lanes in blocks.iter_mut() {
            butterflies::<1>(lanes);
            butterflies::<2>(lanes);
            butterflies::<4>(lanes);
            butterflies::<8>(lanes);
        }
    }
    let mut half = smaller.max(LANES) / LANES;
    while half < size / LANES {
        for pair in blocks.chunks_exact_mut(2 * half) {
            let (left, right) = pair.split_at_mut(half);
            for (a, b) in left.as_flattened_mut().iter_mut().zip(right.as_flattened_mut()) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
}

/// Sums and differences of values at distance `HALF`.
#[inline(always)]
fn butterflies<const HALF: usize>(lanes: &mut Lanes) {
    let before = *lanes;
    for (at, v) in lanes.iter_mut().enumerate() {
        let other = before[at ^ HALF];
        *v = if at & HALF == 0 { *v + other } else { other - *v };
    }
}

/// Sum of (Q(x) - x)^2 with one scale. If the scale is too small for a number, Q(x) is 0.
#[inline(always)]
fn squared_error(values: &[Lanes], scale: f32, round: impl Fn(f32) -> f32) -> f64 {
    if scale > 0.0 {
        // In units of the scale, so that f32 neither overflows nor loses precision.
        let mut sums = [0f32; LANES];
        for lanes in values {
            for (sum, v) in sums.iter_mut().zip(lanes) {
                let magnitude = v.abs() / scale;
                let error = round(magnitude) - magnitude;
                *sum += error * error;
            }
        }
        f64::from(folded(&sums, |a, b| a + b)) * f64::from(scale) * f64::from(scale)
    } else {
        sum_of_squares(values)
    }
}

#[inline(always)]
fn sum_of_squares(values: &[Lanes]) -> f64 {
    let mut sums = [0f64; LANES];
    for lanes in values {
        for (sum, v) in sums.iter_mut().zip(lanes) {
            *sum += f64::from(*v) * f64::from(*v);
        }
    }
    sums.iter().sum()
}

/// Reduces the lanes and 0 to one value, always in the same order.
#[inline(always)]
fn folded(lanes: &Lanes, fold: impl Fn(f32, f32) -> f32) -> f32 {
    let mut four = [0f32; 4];
    for quarter in lanes.as_chunks::<4>().0 {
        for (a, b) in four.iter_mut().zip(quarter) {
            *a = fold(*a, *b);
        }
    }
    fold(fold(four[0], four[2]), fold(four[1], four[3]))
}

/// The maximum of two numbers, in one instruction.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// The maximum of numbers >= 0.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    let mut largest = 0.0;
    for v in x {
        largest = larger(*v, largest);
    }
    largest
}

/// The nearest integer to v >= 0, at most 127.
#[inline(always)]
fn int8(v: f32) -> f32 {
    // From 2^23 on f32 contains only integers: the addition rounds.
    const INTEGERS: f32 = (1 << 23) as f32;
    let nearest = (v + INTEGERS) - INTEGERS;
    if nearest < 127.0 { nearest } else { 127.0 }
}

/// The nearest number of E4M3 to v >= 0.
#[inline(always)]
fn e4m3(v: f32) -> f32 {
    rounded(v, 1.0 / 64.0, 3, E4M3_MAX)
}

/// The nearest number of E2M1 to v >= 0.
#[inline(always)]
fn e2m1(v: f32) -> f32 {
    rounded(v, 1.0, 1, E2M1_MAX)
}

/// Rounds v >= 0 to `mantissa_bits` of mantissa, ties to even. Below `least`, a power of two, the
/// step is constant. Values of at least `most` become `most`.
#[inline(always)]
fn rounded(v: f32, least: f32, mantissa_bits: u32, most: f32) -> f32 {
    const EXPONENT: u32 = 0xff << 23;
    let magnitude = if v < most { v } else { most };
    // From 2^23 steps on f32 contains only whole steps: the addition rounds.
    let power = larger(magnitude, least).to_bits() & EXPONENT;
    let steps = f32::from_bits(power + ((23 - mantissa_bits) << 23));
    (magnitude + steps) - steps
}

/// floor(log2 v) for normal v > 0.
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

    /// Implementation by the definitions.
    mod defined {
        use super::*;

        pub(super) fn losses(x: &[f32], threshold: f32) -> Option<Vec<Loss>> {
            let squares: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum();
            let loss = |(rotation, format): (usize, NumberFormat)| {
                let rotated = rotated(x, rotation);
                let quantized = quantized(&rotated, format);
                let block = format.block().max(rotation);
                let mut loss = Loss::default();
                let blocks = x.chunks(block).zip(rotated.chunks(block)).zip(quantized.chunks(block));
                for ((before, wanted), got) in blocks {
                    let squared = |(got, wanted): (&f64, &f32)| (got - f64::from(*wanted)).powi(2);
                    let error = got.iter().zip(wanted).map(squared).sum::<f64>() / squares;
                    loss.blocks += 1;
                    loss.error += error;
                    if before.iter().any(|v| v.abs() >= threshold) {
                        loss.outlier_blocks += 1;
                        loss.in_outlier_blocks += error;
                    }
                }
                loss
            };
            (squares > 0.0).then(|| ways().map(loss).collect())
        }

        pub(super) fn rotated(x: &[f32], size: usize) -> Vec<f32> {
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

        pub(super) fn quantized(x: &[f32], format: NumberFormat) -> Vec<f64> {
            let (e2m1, e4m3) = (|v: f32| rounded(v, 0, 1, E2M1_MAX), |v: f32| rounded(v, -6, 3, E4M3_MAX));
            let int8 = |v: f32| v.round_ties_even().clamp(-127.0, 127.0);
            let of_row = largest(x) / (E4M3_MAX * E2M1_MAX);
            let of_block = |block: &[f32]| match format {
                NumberFormat::Int8PerToken => scaled(block, largest(x) / 127.0, int8),
                NumberFormat::Fp8Per128 => scaled(block, largest(block) / E4M3_MAX, e4m3),
                NumberFormat::Mxfp4 => scaled(block, power_of_two(exponent(largest(block)) - 2), e2m1),
                NumberFormat::Nvfp4 => scaled(block, e4m3(largest(block) / E2M1_MAX / of_row) * of_row, e2m1),
            };
            x.chunks(format.block()).flat_map(of_block).collect()
        }

        fn scaled(x: &[f32], scale: f32, round: impl Fn(f32) -> f32) -> Vec<f64> {
            let becomes = |v: &f32| if scale > 0.0 { f64::from(round(v / scale)) * f64::from(scale) } else { 0.0 };
            x.iter().map(becomes).collect()
        }

        fn largest(x: &[f32]) -> f32 {
            x.iter().fold(0.0, |largest, v| v.abs().max(largest))
        }

        pub(super) fn rounded(v: f32, least: i32, mantissa_bits: i32, most: f32) -> f32 {
            let magnitude = v.abs().min(most);
            let step = power_of_two(exponent(magnitude).max(least) - mantissa_bits);
            ((magnitude / step).round_ties_even() * step).copysign(v)
        }

        /// All numbers >= 0 of a format, ascending.
        pub(super) fn numbers(mantissa_bits: i32, least: i32, most: f32) -> Vec<f32> {
            let (steps, mut power) = (1 << mantissa_bits, least);
            let mut numbers: Vec<f32> = (0..steps).map(|i| i as f32 * 2f32.powi(least - mantissa_bits)).collect();
            while numbers[numbers.len() - 1] < most {
                numbers.extend((0..steps).map(|i| 2f32.powi(power) * (1.0 + i as f32 / steps as f32)));
                power += 1;
            }
            numbers.retain(|number| *number <= most);
            numbers
        }

        /// Nearest number by search. Of two equally near, the one with an even mantissa, which has
        /// an even index.
        pub(super) fn nearest(v: f32, numbers: &[f32]) -> f32 {
            let distance = |number: f32| (f64::from(number) - f64::from(v)).abs();
            let better = |best: (usize, f32), (at, number): (usize, f32)| {
                let is_tie = distance(number) == distance(best.1) && at.is_multiple_of(2);
                if distance(number) < distance(best.1) || is_tie { (at, number) } else { best }
            };
            numbers.iter().copied().enumerate().reduce(better).unwrap().1
        }
    }

    /// Asserts that the fast implementation and the definition give the same errors.
    #[track_caller]
    fn losses_are_as_defined(row: &mut QuantizedRow, x: &[f32], threshold: f32) {
        let (got, want) = (row.losses(x, threshold), defined::losses(x, threshold));
        assert_eq!(got.is_some(), want.is_some(), "{x:?}");
        for ((got, want), way) in got.iter().flatten().zip(want.iter().flatten()).zip(ways()) {
            let near = |got: f64, want: f64| (got - want).abs() <= 1e-4 * want + 1e-9;
            let is_near = near(got.error, want.error) && near(got.in_outlier_blocks, want.in_outlier_blocks);
            let blocks = |loss: &Loss| (loss.blocks, loss.outlier_blocks);
            assert!(is_near && blocks(got) == blocks(want), "{way:?}: {got:?} instead of {want:?} of {x:?}");
        }
    }

    #[test]
    fn losses_of_odd_shapes_are_as_defined() {
        let mut row = QuantizedRow::default();
        for len in [577, 1, 2, 15, 16, 17, 31, 32, 33, 47, 127, 128, 129, 160, 255, 256, 300, 1000] {
            let value = |i: usize| noise::mix((1000 * len + i) as u64) as f32 / 2f32.powi(62) - 2.0;
            let values: Vec<f32> = (0..len).map(value).collect();
            losses_are_as_defined(&mut row, &values, 1.9);
            let mut spikes = values.clone();
            spikes.iter_mut().step_by(100).for_each(|v| *v *= 1e4);
            losses_are_as_defined(&mut row, &spikes, 6.0);
            let halves: Vec<f32> = values.iter().map(|v| (*v * 2.0).round() / 2.0).collect();
            losses_are_as_defined(&mut row, &halves, 2.0);
            let mut gaps = values.clone();
            gaps.chunks_mut(20).skip(1).step_by(2).for_each(|gap| gap.fill(0.0));
            losses_are_as_defined(&mut row, &gaps, 1.9);
            // Subnormal values, and only the smallest f32: no scale of it is representable.
            let subnormal: Vec<f32> = values.iter().map(|v| v * 1e-40).collect();
            losses_are_as_defined(&mut row, &subnormal, 1e-40);
            let mut smallest = vec![0.0; len];
            smallest[len / 2] = f32::from_bits(1);
            losses_are_as_defined(&mut row, &smallest, 6.0);
            losses_are_as_defined(&mut row, &vec![-0.0; len], 6.0);
        }
    }

    #[test]
    fn numbers_are_the_nearest() {
        let (of_e2m1, of_e4m3) = (defined::numbers(1, 0, E2M1_MAX), defined::numbers(3, -6, E4M3_MAX));
        assert_eq!(of_e2m1, [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
        assert_eq!(of_e4m3.len(), 127);
        let middle = |pair: &[f32]| (pair[0] + pair[1]) / 2.0;
        let middles = of_e2m1.windows(2).chain(of_e4m3.windows(2)).map(middle);
        let many = (0..1000f32.to_bits()).step_by(100_003).map(f32::from_bits);
        for v in many.chain(middles).chain([0.0, f32::MIN_POSITIVE, 1e6]) {
            assert_eq!((e2m1(v), e4m3(v)), (defined::nearest(v, &of_e2m1), defined::nearest(v, &of_e4m3)), "{v}");
            if v < 1000.0 {
                assert_eq!(int8(v), v.round_ties_even().min(127.0), "{v}");
            }
        }
        assert_eq!((e4m3(f32::INFINITY), e4m3(f32::NAN)), (E4M3_MAX, E4M3_MAX), "a scale of a row without one");
    }

    #[test]
    fn rounded_values_follow_the_formats() {
        let values = [0.2, 0.25, 0.26, 0.75, 1.25, 1.3, 2.5, 3.5, 5.0, 5.1, 9.0, -2.6];
        let defined_e2m1 = values.map(|v| defined::rounded(v, 0, 1, E2M1_MAX));
        assert_eq!(defined_e2m1, [0.0, 0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 4.0, 4.0, 6.0, 6.0, -3.0]);
        assert_eq!(values.map(|v| e2m1(v.abs())), defined_e2m1.map(f32::abs));
        let smallest = 2f32.powi(-9);
        let values = [447.0, 1000.0, 17.0, 18.9, smallest, 0.4 * smallest];
        assert_eq!(values.map(e4m3), [448.0, 448.0, 16.0, 18.0, smallest, 0.0]);
        assert_eq!(values.map(|v| defined::rounded(v, -6, 3, E4M3_MAX)), values.map(e4m3));
    }

    #[test]
    fn rounding_scales_follow_the_formats() {
        let mut x = vec![0.0; 32];
        (x[0], x[1], x[16], x[17]) = (7.9, 1.1, 0.1, 0.05);
        let mx = defined::quantized(&x, NumberFormat::Mxfp4);
        assert_eq!((mx[0], mx[1], mx[16]), (6.0, 1.0, 0.0), "scale 1: cut at 6");
        let nv = defined::quantized(&x, NumberFormat::Nvfp4);
        assert!((nv[0] - 7.9).abs() < 1e-5 && (nv[16] - 0.1).abs() < 0.004, "a scale for every 16: {nv:?}");
        let int8 = defined::quantized(&x, NumberFormat::Int8PerToken)[1] as f32;
        assert_eq!(int8, (1.1f32 / (7.9 / 127.0)).round() * (7.9 / 127.0));
        losses_are_as_defined(&mut QuantizedRow::default(), &x, 6.0);
    }

    #[test]
    fn rotation_spreads_outliers() {
        let rotated = |x: &[f32], size| {
            let mut row = QuantizedRow::default();
            row.load(x);
            ROTATIONS.windows(2).filter(|pair| pair[1] <= size).for_each(|pair| row.rotate(pair[0], pair[1]));
            let rotated = row.rotated.as_flattened()[..x.len()].to_vec();
            assert_eq!(rotated, defined::rotated(x, size));
            rotated
        };
        let mut x = vec![0.0; 40];
        x[3] = 8.0;
        let y = rotated(&x, 16);
        assert!(y[..16].iter().all(|v| v.abs() == 2.0) && y[16..].iter().all(|v| *v == 0.0), "{y:?}");
        let rest = rotated(&[vec![0.0; 32], vec![5.0; 8]].concat(), 16);
        assert_eq!(rest[32..], [5.0; 8], "what fills no block is left as it is");
        let long: Vec<f32> = (0..300).map(|i| (i * 37 % 101) as f32 / 7.0 - 7.0).collect();
        let [_, _, y] = [16, 32, 128].map(|size| rotated(&long, size));
        assert_eq!(y[256..], long[256..], "nor is what filled a smaller one");
    }

    #[test]
    fn number_of_sampled_rows_is_near_the_target() {
        let drawn = |sequences, tokens| {
            let quantization = Quantization::new(sequences, tokens, 6.0);
            (0..sequences * tokens).filter(|token| quantization.is_sampled(*token)).count()
        };
        assert_eq!(drawn(4, 96), 384);
        assert!((400..640).contains(&drawn(16, 2048)), "{}", drawn(16, 2048));
    }

    #[test]
    fn pooled_rows_are_those_of_every_norm_output_as_the_rule_says() {
        let mut all = Quantization::new(1, 2, 6.0);
        for layer in [0, 1] {
            all.add(Site { layer, point: Point::BeforeMlp }, &[1.0, 7.0, 3.0, 2.0], 2, |row| row);
        }
        let summary = all.summary();
        assert_eq!((summary.norm_outputs[0].all.rows, summary.sites[0].errors[0].rows), (4, 2));
        assert!(summary.rule.contains("512 tokens at each site"), "{}", summary.rule);
    }

    proptest! {
        #[test]
        fn losses_are_as_defined_whatever_the_values(
            x in prop::collection::vec(
                prop_oneof![6 => -9f32..9.0, 2 => Just(0.0), 1 => Just(1e-41), 1 => -3e4f32..3e4], 1..400
            ),
            times in prop_oneof![3 => Just(1f32), 1 => Just(1e-40), 1 => Just(1e-30), 1 => Just(1e25)],
        ) {
            let x: Vec<f32> = x.iter().map(|v| v * times).collect();
            losses_are_as_defined(&mut QuantizedRow::default(), &x, 6.0 * times);
        }

        #[test]
        fn batching_and_order_change_nothing(x in prop::collection::vec(-9f32..9.0, 6 * 20), cut in 0usize..=6) {
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
