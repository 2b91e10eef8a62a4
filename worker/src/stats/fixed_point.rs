//! Sums of numbers from -1 to 1 as integers: the same in any order.

/// Units of 1.
const UNIT: f64 = (1u64 << 40) as f64;

/// Rounds a number to a multiple of 2^-40. Sums of up to 2^22 of them fit into 64 bits.
pub(super) fn from_f64(value: f64) -> i64 {
    (value * UNIT).round() as i64
}

/// The number that an integer of [`from_f64`] or a sum of them stands for.
pub(super) fn to_f64(fixed: i64) -> f64 {
    fixed as f64 / UNIT
}
