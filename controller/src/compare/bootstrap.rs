//! Systematic features within each sequence, and confidence intervals of figures over sequences.

use outliers_protocol::{Axis, Results, Thresholds};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::statistics::Statistics;

/// Number of samples for an interval.
const RESAMPLES: usize = 4000;

/// A constant seed, so that reports are reproducible.
const SEED: u64 = 0x6f75_746c;

/// Totals of the features that are systematic within one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct SequenceTotals {
    pub(crate) features: usize,
    /// Sum of their shares of layers (or norm outputs), each from 0 to 1.
    pub(crate) layer_share: f64,
    /// Sum of their shares of positions, each from 0 to 1.
    pub(crate) position_share: f64,
}

impl SequenceTotals {
    /// Totals of every sequence, by layers and by norm outputs.
    pub(crate) fn of_run(statistics: &Statistics, results: &Results) -> [Vec<Self>; 2] {
        [Axis::Layers, Axis::Sites].map(|axis| {
            let (spread, whole) = match axis {
                Axis::Layers => (&statistics.sequence_layers, results.n_layers),
                Axis::Sites => (&statistics.sequence_sites, results.n_sites),
            };
            let rows = spread.rows().zip(statistics.sequence_positions.rows());
            rows.map(|(parts, positions)| {
                let mut tally = Self::default();
                for (part, positions) in parts.iter().zip(positions) {
                    let share = *part as f64 / whole as f64;
                    let positions = *positions as f64 / results.tokens_per_sequence as f64;
                    tally.judge(*part, share, positions, &results.thresholds);
                }
                tally
            })
            .collect()
        })
    }

    /// Counts a feature if it is systematic: in `part` layers (or norm outputs), with its shares
    /// of layers and of positions.
    pub(crate) fn judge(&mut self, part: u64, layer_share: f64, position_share: f64, thresholds: &Thresholds) {
        if part > 0 && layer_share >= thresholds.layer_fraction && position_share >= thresholds.position_fraction {
            self.add(layer_share, position_share);
        }
    }

    /// The sum of all totals.
    pub(crate) fn sum<'a>(tallies: impl IntoIterator<Item = &'a Self>) -> Self {
        tallies.into_iter().fold(Self::default(), |sum, tally| Self {
            features: sum.features + tally.features,
            layer_share: sum.layer_share + tally.layer_share,
            position_share: sum.position_share + tally.position_share,
        })
    }

    /// Counts one systematic feature.
    pub(crate) fn add(&mut self, layer_share: f64, position_share: f64) {
        self.features += 1;
        self.layer_share += layer_share;
        self.position_share += position_share;
    }
}

/// A figure with the 95 % interval over samples of the same number of sequences.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Estimate {
    pub(crate) value: f64,
    /// Its interval; `None` if the sequences do not give one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) interval: Option<[f64; 2]>,
}

impl Estimate {
    pub(crate) fn without_interval(value: f64) -> Self {
        Self { value, interval: None }
    }

    /// The figure and its interval multiplied by `by`.
    pub(crate) fn scaled(self, by: f64) -> Self {
        Self { value: self.value * by, interval: self.interval.map(|ends| ends.map(|end| end * by)) }
    }
}

/// The percentile bootstrap (Efron 1979): the middle 95 % of a statistic over samples of `items`.
/// `None` for fewer than two items, or if the statistic is undefined for a sample.
pub(crate) fn interval<T>(items: &[T], statistic: impl Fn(&[&T]) -> Option<f64>) -> Option<[f64; 2]> {
    middle(samples(items, statistic))
}

/// A statistic over samples of `items` with replacement, each of the same size. Empty for fewer
/// than two items.
pub(crate) fn samples<T, S>(items: &[T], statistic: impl Fn(&[&T]) -> S) -> Vec<S> {
    if items.len() < 2 {
        return Vec::new();
    }
    let mut random = StdRng::seed_from_u64(SEED);
    let mut draw = || -> Vec<&T> { items.iter().map(|_| &items[random.random_range(0..items.len())]).collect() };
    (0..RESAMPLES).map(|_| statistic(&draw())).collect()
}

/// The middle 95 % of the samples' values; `None` if there are none, or one is missing.
pub(crate) fn middle(values: impl IntoIterator<Item = Option<f64>>) -> Option<[f64; 2]> {
    let mut values = values.into_iter().collect::<Option<Vec<f64>>>()?;
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    let at = |share: f64| values[(share * last as f64).round() as usize];
    Some([at(0.025), at(0.975)])
}

/// The mean; `None` for no numbers.
pub(crate) fn mean(numbers: impl ExactSizeIterator<Item = f64>) -> Option<f64> {
    let count = numbers.len();
    (count > 0).then(|| numbers.sum::<f64>() / count as f64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mean_of(items: &[&f64]) -> Option<f64> {
        mean(items.iter().map(|item| **item))
    }

    #[test]
    fn single_sequence_has_no_interval_and_equal_ones_zero_width() {
        assert_eq!(interval(&[3.0], mean_of), None);
        assert_eq!(interval(&[3.0; 9], mean_of), Some([3.0, 3.0]));
        assert_eq!(interval(&[3.0; 9], |_| None), None);
    }

    #[test]
    fn interval_of_a_mean_agrees_with_theory() {
        // The standard error of the mean of 0..100 is 28.87 / 10: 95 % lie within 1.96 of it.
        let items: Vec<f64> = (0..100).map(f64::from).collect();
        let [low, high] = interval(&items, mean_of).unwrap();
        assert!((low - (49.5 - 5.66)).abs() < 0.5 && (high - (49.5 + 5.66)).abs() < 0.5, "{low} {high}");
    }

    proptest! {
        #[test]
        fn interval_lies_within_the_range_of_its_items(items in proptest::collection::vec(-1e6..1e6, 2..20)) {
            let [low, high] = interval(&items, mean_of).unwrap();
            let (least, most) = items.iter().fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(*x), b.max(*x)));
            prop_assert!(least - 1e-6 <= low && low <= high && high <= most + 1e-6);
        }
    }
}
