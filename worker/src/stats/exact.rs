//! Sums that are independent of the order of terms.

use serde::{Deserialize, Serialize};

/// An exact sum of finite f64 values. The result is bit-identical for any order or grouping, so
/// that neither threads nor micro-batches affect a report.
///
/// A term is an integer times a power of two. Each window of 32 exponents has a 128-bit integer,
/// which can hold 2^42 terms.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ExactSum {
    /// `(window, integer)`, ascending; most sums touch two or three windows.
    windows: Vec<(u16, i128)>,
}

/// Exponents per window.
const WINDOW: u32 = 32;

impl ExactSum {
    /// Adds one term.
    pub fn add(&mut self, term: f64) {
        debug_assert!(term.is_finite(), "{term} cannot be summed");
        let bits = term.to_bits();
        let (stored, fraction) = ((bits >> 52 & 0x7ff) as u32, bits & ((1 << 52) - 1));
        // Subnormal numbers have the exponent of the smallest normal ones, and no implicit leading
        // one.
        let (exponent, integer) = (stored.max(1), fraction | u64::from(stored > 0) << 52);
        if integer == 0 {
            return;
        }
        let magnitude = i128::from(integer) << (exponent % WINDOW);
        self.add_integer((exponent / WINDOW) as u16, if term < 0.0 { -magnitude } else { magnitude });
    }

    fn add_integer(&mut self, window: u16, integer: i128) {
        match self.windows.binary_search_by_key(&window, |(w, _)| *w) {
            Ok(at) => self.windows[at].1 += integer,
            Err(at) => self.windows.insert(at, (window, integer)),
        }
    }

    /// Adds the terms of another sum.
    pub fn merge(&mut self, other: &Self) {
        self.add_windows(&other.windows);
    }

    /// Adds multiples of 2^(32 w - 1075), each with its window `w`.
    pub fn add_windows(&mut self, windows: &[(u16, i128)]) {
        windows.iter().for_each(|(window, integer)| self.add_integer(*window, *integer));
    }

    /// The sum, rounded once per window.
    pub fn value(&self) -> f64 {
        let part = |(window, integer): &(u16, i128)| {
            // The unit of window 0 is 2^-1075, below the range of f64, so it is applied in two
            // steps.
            *integer as f64 * 2f64.powi(-75) * 2f64.powi(i32::from(*window) * WINDOW as i32 - 1000)
        };
        self.windows.iter().map(part).sum()
    }
}

/// The exact mean of finite values.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    /// Number of values.
    pub count: u64,
    sum: ExactSum,
}

impl Mean {
    /// Adds one value.
    pub fn add(&mut self, value: f64) {
        self.count += 1;
        self.sum.add(value);
    }

    /// Adds the values of another.
    pub fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.sum.merge(&other.sum);
    }

    /// The mean; 0 for no values.
    pub fn value(&self) -> f64 {
        self.sum.value() / self.count.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sum(terms: &[f64]) -> ExactSum {
        let mut sum = ExactSum::default();
        terms.iter().for_each(|term| sum.add(*term));
        sum
    }

    proptest! {
        #[test]
        fn order_and_grouping_do_not_matter(
            terms in prop::collection::vec(prop::num::f32::NORMAL.prop_map(f64::from), 0..60), cut in 0usize..60,
        ) {
            let whole = sum(&terms);
            let (left, right) = terms.split_at(cut.min(terms.len()));
            let mut merged = sum(right);
            merged.merge(&sum(left));
            let backwards: Vec<f64> = terms.iter().rev().copied().collect();
            prop_assert_eq!(&merged, &whole);
            prop_assert_eq!(&sum(&backwards), &whole);
        }

        #[test]
        fn exact_sum_equals_the_true_sum(terms in prop::collection::vec(-1e6f64..1e6, 0..60)) {
            let plain: f64 = terms.iter().sum();
            let size: f64 = terms.iter().map(|t| t.abs()).sum();
            prop_assert!((sum(&terms).value() - plain).abs() <= 1e-13 * size);
        }
    }

    #[test]
    fn exact_sum_round_trips_without_loss() {
        assert_eq!(sum(&[1e300, 1.0, -1e300]).value(), 1.0, "f64 addition gives 0");
        assert_eq!(sum(&[f64::MIN_POSITIVE / 4.0, 3.0, -3.0]).value(), f64::MIN_POSITIVE / 4.0);
        assert_eq!(sum(&[0.1; 10]).value(), 1.0);
        assert_eq!(sum(&[]).value(), 0.0);
        assert_eq!(sum(&[0.0, -0.0]), sum(&[]));
    }
}
