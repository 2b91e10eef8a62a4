//! Fixed-point sums of numbers from -1 to 1, independent of order.

/// Units per 1.
const UNIT: f64 = (1u64 << 40) as f64;
/// Adjacent floats near it are 2^-40 apart.
const CENTRE: f64 = 6144.0;

/// Rounds a number to a multiple of 2^-40, ties to even. Sums of up to 2^22 of them fit into 64
/// bits.
///
/// The addition rounds without a call or a branch, so that loops vectorise.
#[inline(always)]
pub(super) fn from_f64(value: f64) -> i64 {
    (value + CENTRE).to_bits() as i64 - CENTRE.to_bits() as i64
}

/// Converts an integer of [`from_f64`], or a sum of them, to a number.
pub(super) fn to_f64(fixed: i64) -> f64 {
    fixed as f64 / UNIT
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_are_rounded_to_the_nearest(value in -1f64..=1.0) {
            prop_assert_eq!(from_f64(value), (value * UNIT).round_ties_even() as i64);
        }
    }

    #[test]
    fn ends_and_ties_are_exact() {
        let ends = [-1.0, 0.0, -0.0, 1.0, 1.0 / UNIT, f64::MIN_POSITIVE].map(from_f64);
        assert_eq!(ends, [-(1 << 40), 0, 0, 1 << 40, 1, 0]);
        assert_eq!([0.5, 1.5, -2.5].map(|units| from_f64(units / UNIT)), [0, 2, -2]);
        assert_eq!([0.25, -0.75].map(|value| to_f64(from_f64(value))), [0.25, -0.75]);
    }
}
