//! Statistics over the rows of a site: each token's largest value, median and moments.

use outliers_protocol::{MagnitudeQuantiles, RowSpread, RowStatistics};
use outliers_scan::{Histogram, Scan};
use rayon::prelude::*;

use serde::{Deserialize, Serialize};

use super::exact::{ExactSum, Mean};

/// Distribution of one number per row.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct RowDistribution {
    mean: Mean,
    max: f64,
    histogram: Histogram,
}

impl RowDistribution {
    fn add(&mut self, value: f64) {
        self.mean.add(value);
        self.max = self.max.max(value);
        self.histogram.add_bits((value as f32).to_bits());
    }

    fn merge(&mut self, other: &Self) {
        self.mean.merge(&other.mean);
        self.max = self.max.max(other.max);
        self.histogram.merge(&other.histogram);
    }

    fn summary(&self) -> Option<RowSpread> {
        (self.mean.count > 0).then(|| RowSpread {
            rows: self.mean.count,
            mean: self.mean.value(),
            p50: self.histogram.quantile(0.5).min(self.max),
            p99: self.histogram.quantile(0.99).min(self.max),
            max: self.max,
        })
    }
}

/// Statistics over the rows of one site, about 10 KiB for any number of rows. Merging is exact,
/// associative and commutative.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RowStats {
    rows: u64,
    max_bits: u32,
    squares: ExactSum,
    magnitudes: Histogram,
    kurtosis: RowDistribution,
    max_over_median: RowDistribution,
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

    /// Adds the rows of several sequences, in parallel.
    pub fn add_all(&mut self, scans: &[Scan]) {
        let with = |mut sum: Self, scan: &Scan| {
            sum.add(scan);
            sum
        };
        let joined = |mut sum: Self, other: Self| {
            sum.merge(&other);
            sum
        };
        self.merge(&scans.par_iter().fold(Self::default, with).reduce(Self::default, joined));
    }

    /// Adds the rows of another.
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

    /// The result for reports.
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

    proptest! {
        #[test]
        fn row_statistics_do_not_depend_on_batching_or_order(
            x in prop::collection::vec(-50f32..50.0, 7 * 150), cut in 0usize..=150,
        ) {
            let of = |x: &[f32]| {
                let mut stats = RowStats::default();
                stats.add(&Scan::of(x, 7));
                stats
            };
            let (left, right) = x.split_at(cut * 7);
            let mut merged = of(right);
            merged.merge(&of(left));
            prop_assert_eq!(&merged, &of(&x));
            let mut together = RowStats::default();
            together.add_all(&[Scan::of(left, 7), Scan::of(right, 7)]);
            prop_assert_eq!(&together, &of(&x));
            let backwards: Vec<f32> = x.chunks(7).rev().flatten().copied().collect();
            prop_assert_eq!(&of(&backwards), &of(&x));
        }
    }

    #[test]
    fn undefined_rows_are_excluded() {
        let mut stats = RowStats::default();
        stats.add(&Scan::of(&[0.0, 0.0, 0.0, 0.0, /* */ 0.0, 0.0, 0.0, 5.0, /* */ 1.0, -1.0, 1.0, -1.0], 4));
        let summary = stats.summary();
        assert_eq!(summary.rows, 3);
        let (kurtosis, ratio) = (summary.kurtosis.unwrap(), summary.max_over_median.unwrap());
        assert_eq!((kurtosis.rows, kurtosis.max), (2, 7.0 / 3.0), "all equal: no kurtosis; one of four: 7/3");
        assert_eq!((ratio.rows, ratio.mean), (1, 1.0), "median 0: no ratio");
        assert_eq!((stats.max_abs(), stats.rms(4)), (5.0, (29f64 / 12.0).sqrt()));
    }
}
