//! Quantiles in fixed memory.

use serde::{Deserialize, Serialize};

/// A histogram of magnitudes in bins of a 32nd of an octave between 2^-32 and 2^32. Smaller
/// magnitudes count as 0, larger ones as 2^32.
///
/// Quantiles are within 1.6 %: half the widest bin. Merging is addition, so it is exact,
/// associative and commutative. A histogram needs 256 bytes per octave between the smallest and
/// the largest magnitude, at most 16 KiB; there is one per site and layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// The first stored bin: the first bin of its octave.
    first: usize,
    /// Counts of whole octaves from `first` on. Bins outside are empty, so histograms of the same
    /// values are equal.
    counts: Vec<u64>,
    total: u64,
}

/// Bits of an f32's significand that select the bin within an octave.
const FRACTION_BITS: u32 = 5;
/// The bits below those.
const DROPPED_BITS: u32 = f32::MANTISSA_DIGITS - 1 - FRACTION_BITS;
/// Octaves on either side of 1.
const OCTAVES: u32 = 32;
/// Bins of an octave.
const OCTAVE: usize = 1 << FRACTION_BITS;
/// Bins.
pub const BINS: usize = ((2 * OCTAVES) << FRACTION_BITS) as usize;
/// Number of the first bin, counted by f32 exponent and leading fraction bits.
const FIRST: u32 = (f32::MAX_EXP as u32 - 1 - OCTAVES) << FRACTION_BITS;

impl Histogram {
    /// Bin of the magnitude with these bits (sign bit clear); monotone, because f32's order is
    /// that of its bits.
    pub fn bin(magnitude_bits: u32) -> usize {
        ((magnitude_bits >> DROPPED_BITS).saturating_sub(FIRST) as usize).min(BINS - 1)
    }

    /// Counts one magnitude, given by its bits (sign bit clear).
    pub fn add_bits(&mut self, magnitude_bits: u32) {
        let bin = Self::bin(magnitude_bits);
        if !(self.first..self.first + self.counts.len()).contains(&bin) {
            self.reach(bin, bin + 1);
        }
        self.counts[bin - self.first] += 1;
        self.total += 1;
    }

    /// From the counts of all [`BINS`].
    pub fn of_counts(counts: &[u64]) -> Self {
        let mut all = Self::default();
        for (bin, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            all.reach(bin, bin + 1);
            all.counts[bin - all.first] += count;
            all.total += count;
        }
        all
    }

    /// Extends the stored bins to include `low..high`.
    #[cold]
    fn reach(&mut self, low: usize, high: usize) {
        let (low, high) = (low / OCTAVE * OCTAVE, high.next_multiple_of(OCTAVE));
        if self.counts.is_empty() {
            self.first = low;
        }
        if low < self.first {
            self.counts.splice(..0, std::iter::repeat_n(0, self.first - low));
            self.first = low;
        }
        self.counts.resize(self.counts.len().max(high - self.first), 0);
    }

    /// Adds another histogram's counts.
    pub fn merge(&mut self, other: &Self) {
        if other.counts.is_empty() {
            return;
        }
        self.reach(other.first, other.first + other.counts.len());
        let ours = &mut self.counts[other.first - self.first..];
        ours.iter_mut().zip(&other.counts).for_each(|(a, b)| *a += b);
        self.total += other.total;
    }

    /// The bin of the value of this rank (from 0, ascending), and the number of values in lower
    /// bins.
    pub fn bin_of_rank(&self, rank: u64) -> (usize, u64) {
        let mut below = 0;
        for (bin, count) in (self.first..).zip(&self.counts) {
            if rank < below + count {
                return (bin, below);
            }
            below += count;
        }
        (BINS - 1, below)
    }

    /// Bits of the lower bound of the bin with the `count`-th largest value. All of the `count`
    /// largest values are at or above it, and few others.
    pub fn floor_of_largest(&self, count: u64) -> u32 {
        let bin = self.bin_of_rank(self.total.saturating_sub(count)).0;
        if count >= self.total || bin == 0 { 0 } else { (bin as u32 + FIRST) << DROPPED_BITS }
    }

    /// Quantile `p`: the middle of the bin that contains it. 0 if there are no values, or for the
    /// lowest bin.
    pub fn quantile(&self, p: f64) -> f64 {
        if self.total == 0 {
            return 0.0;
        }
        let rank = ((p * self.total as f64).ceil() as u64).clamp(1, self.total) - 1;
        match self.bin_of_rank(rank).0 {
            0 => 0.0,
            bin => {
                let low = f32::from_bits((bin as u32 + FIRST) << DROPPED_BITS);
                let high = f32::from_bits((bin as u32 + FIRST + 1) << DROPPED_BITS);
                (f64::from(low) + f64::from(high)) / 2.0
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn histogram(values: &[f32]) -> Histogram {
        let mut histogram = Histogram::default();
        values.iter().for_each(|v| histogram.add_bits(v.abs().to_bits()));
        histogram
    }

    proptest! {
        #[test]
        fn quantiles_are_within_their_resolution(
            mut values in prop::collection::vec(1e-6f32..1e6, 1..300), p in 0.0f64..=1.0,
        ) {
            let got = histogram(&values).quantile(p);
            values.sort_by(f32::total_cmp);
            let rank = ((p * values.len() as f64).ceil() as usize).max(1) - 1;
            let want = f64::from(values[rank]);
            prop_assert!((got / want - 1.0).abs() <= 0.016, "{} against {}", got, want);
        }

        #[test]
        fn merged_histograms_equal_a_joint_count(
            a in prop::collection::vec(any::<f32>(), 0..50), b in prop::collection::vec(any::<f32>(), 0..50),
        ) {
            let (mut left, mut right) = (histogram(&a), histogram(&b));
            left.merge(&histogram(&b));
            right.merge(&histogram(&a));
            prop_assert_eq!(&left, &histogram(&[a, b].concat()));
            prop_assert_eq!(left, right);
        }

        #[test]
        fn bins_of_other_code_are_the_same(values in prop::collection::vec(any::<f32>(), 0..50)) {
            let mut counts = vec![0; BINS];
            values.iter().for_each(|v| counts[Histogram::bin(v.abs().to_bits())] += 1);
            prop_assert_eq!(Histogram::of_counts(&counts), histogram(&values));
        }

        #[test]
        fn largest_values_are_not_below_their_floor(
            mut values in prop::collection::vec(any::<f32>(), 1..50), count in 1usize..60,
        ) {
            let floor = histogram(&values).floor_of_largest(count as u64);
            values.sort_by(|a, b| b.abs().total_cmp(&a.abs()));
            let least = values[count.min(values.len()) - 1].abs().to_bits();
            prop_assert!(floor <= least);
            prop_assert!(count >= values.len() || Histogram::bin(floor) == Histogram::bin(least));
        }
    }

    #[test]
    fn out_of_range_values_are_in_the_end_bins() {
        assert_eq!(histogram(&[0.0, 1e-30, 1e-12]).quantile(0.5), 0.0);
        let top = histogram(&[1e30]).quantile(0.5);
        assert!((top / 2f64.powi(32) - 1.0).abs() < 0.02, "{top}");
        assert_eq!(Histogram::default().quantile(0.5), 0.0);
        assert_eq!(histogram(&[3.0; 9]).quantile(1.0), histogram(&[-3.0]).quantile(0.0));
    }
}
