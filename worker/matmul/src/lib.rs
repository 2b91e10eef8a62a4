//! Matrix products with a bf16 second matrix (the stored weights), on the matrix and vector units
//! of x86 processors:
//!
//! - AMX, the tile unit of Intel's server processors since Sapphire Rapids: sixteen rows of bf16
//!   times sixteen columns in one instruction. An f32 has 24 significant bits and a bf16 has 8, so
//!   an f32 is the exact sum of three bf16, and a product of f32 and bf16 is three tile products.
//! - AVX-512. With AVX512_BF16 (AMD since Zen 4), bf16 is multiplied in pairs, at twice the rate
//!   of f32. Otherwise, and for f32, weights are converted to f32 as they are packed, never a
//!   whole matrix.
//!
//! Only the sums are rounded; they are f32. Each value of a result is summed in the same order for
//! any other rows and columns and any number of threads. (With bf16 inputs, subnormal numbers,
//! below 1.2e-38, count as zero. A row with an infinity may become NaN.)

#[cfg_attr(all(target_arch = "x86_64", target_os = "linux"), path = "x86/unit.rs")]
#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), path = "none.rs")]
mod unit;

#[cfg(test)]
mod tests;

use half::bf16;

/// Storage order of a matrix `[rows, columns]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Row-major.
    Rows,
    /// Column-major.
    Columns,
}

/// Numbers that can be multiplied by bf16: [`f32`] and [`bf16`].
pub trait Real: unit::Real {}

impl Real for f32 {}
impl Real for bf16 {}

/// Most bytes that a product allocates in addition to its matrices, without 1 to 2 MiB per thread.
pub const MEMORY: usize = 16 << 20;

/// A unit of this processor that multiplies, usable by this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit(unit::Kind);

impl Unit {
    /// The fastest unit.
    pub fn find() -> Option<Self> {
        Self::all().next()
    }

    /// All units, the fastest first. They are detected once.
    pub fn all() -> impl Iterator<Item = Self> {
        unit::found().iter().copied().map(Self)
    }

    /// Adds `a b^T` `[m, n]` to a row-major result, with all threads of the pool. `a` is `[m, k]`,
    /// row-major; `b` is `[n, k]`, in the given order.
    ///
    /// # Panics
    /// If `a` is not whole rows of length `k`, or `b` is not `n` rows of length `k`.
    pub fn append_product<A: Real>(self, out: &mut Vec<A>, a: &[A], b: &[bf16], order: Order, n: usize, k: usize) {
        unit::append_product(self.0, out, a, b, order, n, k);
    }
}
