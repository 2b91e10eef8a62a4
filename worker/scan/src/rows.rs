//! Statistics of each token's vector in one pass: largest value, median, moments.

use rayon::prelude::*;

use crate::Histogram;
use crate::vectorize;

/// Statistics of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// Bits of the largest |x|; they order as the magnitudes do.
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
        let (mean, [second, fourth]) = vectorize!(moments(x));
        Self {
            max_bits,
            median: f32::from_bits(median),
            squares: second + n * mean * mean,
            kurtosis: (second > 0.0).then(|| n * fourth / (second * second)),
        }
    }
}

/// Mean, and sums of the second and fourth powers of the differences from it.
#[inline(always)]
fn moments(x: &[f32]) -> (f64, [f64; 2]) {
    let mean = sum(x, |v| [v, 0.0])[0] / x.len() as f64;
    let powers = sum(x, |v| {
        let square = (v - mean) * (v - mean);
        [square, square * square]
    });
    (mean, powers)
}

/// Two sums in eight lanes each, in a fixed order that can be vectorised.
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

/// Statistics of rows of a site.
#[derive(Clone, Debug)]
pub struct Scan {
    /// One entry per row, in order.
    pub rows: Vec<Row>,
    /// Histogram of |x| over all their values.
    pub magnitudes: Histogram,
}

impl Scan {
    /// Scans `x` `[rows, hidden]`, in parallel over rows.
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

    /// Exact median |x| of the scanned values `x`, the lower of the two middle values, from the
    /// histogram's bin.
    pub fn median(&self, x: &[f32]) -> f32 {
        let rank = (x.len() as u64 - 1) / 2;
        let (bin, below) = self.magnitudes.bin_of_rank(rank);
        let within = x.par_iter().map(|v| v.abs().to_bits()).filter(|bits| Histogram::bin(*bits) == bin);
        let mut within: Vec<u32> = within.collect();
        f32::from_bits(*within.select_nth_unstable((rank - below) as usize).1)
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

    /// The definition, computed directly.
    fn kurtosis(x: &[f32]) -> f64 {
        let mean_of = |f: &dyn Fn(f64) -> f64| x.iter().map(|v| f(f64::from(*v))).sum::<f64>() / x.len() as f64;
        let mean = mean_of(&|v| v);
        mean_of(&|v| (v - mean).powi(4)) / mean_of(&|v| (v - mean).powi(2)).powi(2)
    }

    proptest! {
        #[test]
        fn row_statistics_follow_the_definitions(x in prop::collection::vec(-50f32..50.0, 1..200)) {
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
    }

    #[test]
    fn the_median_of_many_values_is_exact() {
        let x: Vec<f32> = (0..100_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e5 - 60.0).collect();
        assert_eq!(Scan::of(&x, 100).median(&x), lower_median(&x));
        let zeros = vec![0.0; 640];
        assert_eq!(Scan::of(&zeros, 10).median(&zeros), 0.0);
    }

    #[test]
    fn non_finite_values_are_detected() {
        let mut x = vec![1.0; 12];
        assert_eq!(Scan::of(&x, 4).first_not_finite(), None);
        x[9] = f32::NAN;
        assert_eq!(Scan::of(&x, 4).first_not_finite(), Some(2));
        x[5] = f32::NEG_INFINITY;
        assert_eq!(Scan::of(&x, 4).first_not_finite(), Some(1));
    }
}
