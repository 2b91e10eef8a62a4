//! Products of matrices whose second one is of bf16, as weights are stored, with what x86 processors have for them:
//!
//! - AMX, the tile unit of Intel's server processors since Sapphire Rapids: sixteen rows of bf16 times sixteen columns in one instruction.
//!   An f32 has 24 significant bits and a bf16 has 8, so an f32 is the exact sum of three bf16, and a product of f32 and bf16 three tile
//!   products.
//! - AVX-512. Numbers of bf16 are multiplied in pairs, twice as many at once as of f32, where the processor can (AVX512_BF16: AMD since
//!   Zen 4); f32 is multiplied by what is made f32 of weights as they are laid out for it, never a whole matrix.
//!
//! Nothing is rounded but the sums, which are f32. Each value of a result is summed up in one order, whatever the other rows and columns
//! and the number of threads. (Where bf16 is multiplied as such, numbers below the least normal one, 1.2e-38, count as zero. A row with
//! an infinity may become NaN.)

#[cfg_attr(all(target_arch = "x86_64", target_os = "linux"), path = "x86/unit.rs")]
#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), path = "none.rs")]
mod unit;

#[cfg(test)]
mod tests;

use half::bf16;

/// How the values of a matrix `[rows, columns]` follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One row after the other.
    Rows,
    /// One column after the other.
    Columns,
}

/// Numbers that are multiplied by bf16: [`f32`] and [`bf16`].
pub trait Real: unit::Real {}

impl Real for f32 {}
impl Real for bf16 {}

/// Most bytes that a product takes beside its matrices; each thread that helps takes another MiB or two.
pub const MEMORY: usize = 16 << 20;

/// What this processor multiplies with, and this process may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit(unit::Kind);

impl Unit {
    /// The fastest there is.
    pub fn find() -> Option<Self> {
        Self::all().next()
    }

    /// All there are, the fastest first. Asks the system for them, once.
    pub fn all() -> impl Iterator<Item = Self> {
        unit::found().iter().copied().map(Self)
    }

    /// Adds `a b^T` to what there is of a result, row by row: `a` `[m, k]` row by row, `b` `[n, k]` in an order of its own, the product
    /// `[m, n]`. With all threads of the pool.
    ///
    /// # Panics
    /// If `a` is not a number of rows of length `k`, or `b` not `n` of them.
    pub fn append_product<A: Real>(self, out: &mut Vec<A>, a: &[A], b: &[bf16], order: Order, n: usize, k: usize) {
        unit::append_product(self.0, out, a, b, order, n, k);
    }
}
