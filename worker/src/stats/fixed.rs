//! Sums of numbers from -1 to 1 as integers: small, and the same in any order.

/// Units of 1.
const UNIT: f64 = (1u64 << 40) as f64;

/// A number as an integer. Sums of 2^22 of them fit.
pub(super) fn of(value: f64) -> i64 {
    (value * UNIT).round() as i64
}

/// The number that an integer stands for.
pub(super) fn value(fixed: i64) -> f64 {
    fixed as f64 / UNIT
}
