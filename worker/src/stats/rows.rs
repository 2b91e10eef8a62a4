//! One pass over each token's vector: largest value, median, moments.

use outliers_protocol::{MagnitudeQuantiles, RowSpread, RowStatistics};
use rayon::prelude::*;

use serde::{Deserialize, Serialize};

use super::exact::ExactSum;
use super::histogram::Histogram;
use crate::simd::vectorized;

/// What one pass over a row finds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// Bits of the largest |x|: in the order of magnitudes.
    pub max_bits: u32,
    /// Median of |x|, the lower of the two middle ones.
    pub median: f32,
    /// Sum of x^2.
    pub squares: f64,
    /// Fourth central moment over the squared second; `None` if all coordinates are equal.
    pub kurtosis: Option<f64>,
}

impl Row {
    /// Largest |x|.
    pub fn max_abs(&self) -> f32 {
        f32::from_bits(self.max_bits)
    }

    /// Largest |x| over the median |x|; `None` if that is 0.
    pub fn max_over_median(&self) -> Option<f64> {
        (self.median > 0.0).then(|| f64::from(self.max_abs()) / f64::from(self.median))
    }

    /// Adds the magnitudes to the histogram. `scratch` is overwritten.
    fn of(x: &[f32], scratch: &mut Vec<u32>, magnitudes: &mut Histogram) -> Self {
        scratch.clear();
        scratch.extend(x.iter().map(|v| v.abs().to_bits()));
        scratch.iter().for_each(|bits| magnitudes.add_bits(*bits));
        let max_bits = scratch.iter().copied().fold(0, u32::max);
        let median = *scratch.select_nth_unstable((x.len() - 1) / 2).1;
        let n = x.len() as f64;
        let (mean, [second, fourth]) = vectorized(
            #[inline(always)]
            || moments(x),
        );
        Self {
            max_bits,
            median: f32::from_bits(median),
            squares: second + n * mean * mean,
            kurtosis: (second > 0.0).then(|| n * fourth / (second * second)),
        }
    }
}

/// Mean; sums of the second and fourth powers of what differs from it.
#[inline(always)]
fn moments(x: &[f32]) -> (f64, [f64; 2]) {
    let mean = sum(x, |v| [v, 0.0])[0] / x.len() as f64;
    let powers = sum(x, |v| {
        let square = (v - mean) * (v - mean);
        [square, square * square]
    });
    (mean, powers)
}

/// Two sums in eight lanes each: always in the same order, and in one that vectorises.
#[inline(always)]
fn sum(x: &[f32], terms: impl Fn(f64) -> [f64; 2]) -> [f64; 2] {
    let mut lanes = [[0f64; 8]; 2];
    let (chunks, rest) = x.as_chunks::<8>();
    for chunk in chunks {
        for (j, v) in chunk.iter().enumerate() {
            let [a, b] = terms(f64::from(*v));
            lanes[0][j] += a;
            lanes[1][j] += b;
        }
    }
    for (j, v) in rest.iter().enumerate() {
        let [a, b] = terms(f64::from(*v));
        lanes[0][j] += a;
        lanes[1][j] += b;
    }
    lanes.map(|lane| lane.iter().sum())
}

/// Rows per task.
const CHUNK: usize = 64;

/// Some rows of a site, looked at.
#[derive(Clone, Debug)]
pub struct Scan {
    /// One per row, in order.
    pub rows: Vec<Row>,
    /// |x| of all their values.
    pub magnitudes: Histogram,
}

impl Scan {
    /// Looks at `x` `[rows, hidden]`, in parallel over rows.
    pub fn of(x: &[f32], hidden: usize) -> Self {
        let chunks: Vec<Self> = x
            .par_chunks(CHUNK * hidden)
            .map_init(Vec::new, |scratch, chunk| {
                let mut magnitudes = Histogram::default();
                let rows = chunk.chunks_exact(hidden).map(|row| Row::of(row, scratch, &mut magnitudes)).collect();
                Self { rows, magnitudes }
            })
            .collect();
        let mut whole = Self { rows: Vec::with_capacity(x.len() / hidden), magnitudes: Histogram::default() };
        for chunk in chunks {
            whole.rows.extend(chunk.rows);
            whole.magnitudes.merge(&chunk.magnitudes);
        }
        whole
    }

    /// The first row with a value that is NaN or infinite.
    pub fn first_not_finite(&self) -> Option<usize> {
        self.rows.iter().position(|row| row.max_bits >= f32::INFINITY.to_bits())
    }

    /// The exact median |x| of the values `x` that were looked at, the lower of the two middle ones: the histogram says in which bin it is.
    pub fn median(&self, x: &[f32]) -> f32 {
        let rank = (x.len() as u64 - 1) / 2;
        let (bin, below) = self.magnitudes.bin_of_rank(rank);
        let within = x.par_iter().map(|v| v.abs().to_bits()).filter(|bits| Histogram::bin(*bits) == bin);
        let mut within: Vec<u32> = within.collect();
        f32::from_bits(*within.select_nth_unstable((rank - below) as usize).1)
    }
}

/// A number per row, over rows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Spread {
    rows: u64,
    sum: ExactSum,
    max: f64,
    histogram: Histogram,
}

impl Spread {
    fn add(&mut self, value: f64) {
        self.rows += 1;
        self.sum.add(value);
        self.max = self.max.max(value);
        self.histogram.add_bits((value as f32).to_bits());
    }

    fn merge(&mut self, other: &Self) {
        self.rows += other.rows;
        self.sum.merge(&other.sum);
        self.max = self.max.max(other.max);
        self.histogram.merge(&other.histogram);
    }

    fn summary(&self) -> Option<RowSpread> {
        (self.rows > 0).then(|| RowSpread {
            rows: self.rows,
            mean: self.sum.value() / self.rows as f64,
            p50: self.histogram.quantile(0.5).min(self.max),
            p99: self.histogram.quantile(0.99).min(self.max),
            max: self.max,
        })
    }
}

/// Statistics over the rows of one site: about 10 KiB, whatever the number of rows. Merging is exact, associative and commutative.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RowStats {
    rows: u64,
    max_bits: u32,
    squares: ExactSum,
    magnitudes: Histogram,
    kurtosis: Spread,
    max_over_median: Spread,
}

impl RowStats {
    /// Adds rows.
    pub fn add(&mut self, scan: &Scan) {
        self.magnitudes.merge(&scan.magnitudes);
        for row in &scan.rows {
            self.rows += 1;
            self.max_bits = self.max_bits.max(row.max_bits);
            self.squares.add(row.squares);
            row.kurtosis.into_iter().for_each(|kurtosis| self.kurtosis.add(kurtosis));
            row.max_over_median().into_iter().for_each(|ratio| self.max_over_median.add(ratio));
        }
    }

    /// Adds another's rows.
    pub fn merge(&mut self, other: &Self) {
        self.rows += other.rows;
        self.max_bits = self.max_bits.max(other.max_bits);
        self.squares.merge(&other.squares);
        self.magnitudes.merge(&other.magnitudes);
        self.kurtosis.merge(&other.kurtosis);
        self.max_over_median.merge(&other.max_over_median);
    }

    /// Largest |x|.
    pub fn max_abs(&self) -> f32 {
        f32::from_bits(self.max_bits)
    }

    /// Root mean square of all values of rows of `hidden` values.
    pub fn rms(&self, hidden: usize) -> f64 {
        (self.squares.value() / (self.rows.max(1) * hidden as u64) as f64).sqrt()
    }

    /// As reports have it.
    pub fn summary(&self) -> RowStatistics {
        let quantile = |p| self.magnitudes.quantile(p).min(f64::from(self.max_abs()));
        RowStatistics {
            rows: self.rows,
            magnitude: MagnitudeQuantiles {
                p50: quantile(0.5),
                p90: quantile(0.9),
                p99: quantile(0.99),
                p99_9: quantile(0.999),
            },
            kurtosis: self.kurtosis.summary(),
            max_over_median: self.max_over_median.summary(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lower_median(x: &[f32]) -> f32 {
        let mut magnitudes: Vec<f32> = x.iter().map(|v| v.abs()).collect();
        magnitudes.sort_by(f32::total_cmp);
        magnitudes[(x.len() - 1) / 2]
    }

    /// By the definition.
    fn kurtosis(x: &[f32]) -> f64 {
        let mean_of = |f: &dyn Fn(f64) -> f64| x.iter().map(|v| f(f64::from(*v))).sum::<f64>() / x.len() as f64;
        let mean = mean_of(&|v| v);
        mean_of(&|v| (v - mean).powi(4)) / mean_of(&|v| (v - mean).powi(2)).powi(2)
    }

    proptest! {
        #[test]
        fn rows_follow_the_definitions(x in prop::collection::vec(-50f32..50.0, 1..200)) {
            let scan = Scan::of(&x, x.len());
            let row = scan.rows[0];
            let max = x.iter().map(|v| v.abs()).fold(0.0, f32::max);
            prop_assert_eq!((row.max_abs(), row.median), (max, lower_median(&x)));
            prop_assert_eq!(scan.median(&x), lower_median(&x));
            let squares: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum();
            prop_assert!((row.squares - squares).abs() <= 1e-9 * squares);
            if let (true, Some(got)) = (x.len() > 2, row.kurtosis) {
                prop_assert!((got / kurtosis(&x) - 1.0).abs() < 1e-9, "{} against {}", got, kurtosis(&x));
            }
        }

        #[test]
        fn statistics_do_not_depend_on_cutting_or_order(x in prop::collection::vec(-50f32..50.0, 7 * 150), cut in 0usize..=150) {
            let of = |x: &[f32]| {
                let mut stats = RowStats::default();
                stats.add(&Scan::of(x, 7));
                stats
            };
            let (left, right) = x.split_at(cut * 7);
            let mut merged = of(right);
            merged.merge(&of(left));
            prop_assert_eq!(&merged, &of(&x));
            let backwards: Vec<f32> = x.chunks(7).rev().flatten().copied().collect();
            prop_assert_eq!(&of(&backwards), &of(&x));
        }
    }

    #[test]
    fn the_median_of_many_values_is_exact() {
        let x: Vec<f32> = (0..100_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e5 - 60.0).collect();
        assert_eq!(Scan::of(&x, 100).median(&x), lower_median(&x));
        let zeros = vec![0.0; 640];
        assert_eq!(Scan::of(&zeros, 10).median(&zeros), 0.0);
    }

    #[test]
    fn rows_without_a_number_are_left_out() {
        let mut stats = RowStats::default();
        stats.add(&Scan::of(&[0.0, 0.0, 0.0, 0.0, /* */ 0.0, 0.0, 0.0, 5.0, /* */ 1.0, -1.0, 1.0, -1.0], 4));
        let summary = stats.summary();
        assert_eq!(summary.rows, 3);
        let (kurtosis, ratio) = (summary.kurtosis.unwrap(), summary.max_over_median.unwrap());
        assert_eq!((kurtosis.rows, kurtosis.max), (2, 7.0 / 3.0), "all equal: no kurtosis; one of four: 7/3");
        assert_eq!((ratio.rows, ratio.mean), (1, 1.0), "median 0: no ratio");
        assert_eq!((stats.max_abs(), stats.rms(4)), (5.0, (29f64 / 12.0).sqrt()));
    }

    #[test]
    fn values_that_are_not_finite_are_seen() {
        let mut x = vec![1.0; 12];
        assert_eq!(Scan::of(&x, 4).first_not_finite(), None);
        x[9] = f32::NAN;
        assert_eq!(Scan::of(&x, 4).first_not_finite(), Some(2));
        x[5] = f32::NEG_INFINITY;
        assert_eq!(Scan::of(&x, 4).first_not_finite(), Some(1));
    }
}
