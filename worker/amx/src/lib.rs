//! Matrix products by AMX, the tile unit that Intel's server processors have since Sapphire Rapids: sixteen rows of bf16 times sixteen
//! columns in one instruction, summed up in f32.
//!
//! An f32 has 24 significant bits and a bf16 has 8, so an f32 is the exact sum of three bf16. A product of f32 and bf16 is then three
//! tile products, with nothing rounded but the sums. Each value of a result is summed up in one order, whatever the other rows and columns
//! and the number of threads. (Numbers below the least normal one, 1.2e-38, count as zero. A row with an infinity becomes NaN.)

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

/// Numbers that tiles multiply by bf16: [`f32`] and [`bf16`].
pub trait Real: unit::Real {}

impl Real for f32 {}
impl Real for bf16 {}

/// Most bytes that a product takes beside its matrices; each thread that helps takes another MiB or two.
pub const MEMORY: usize = 16 << 20;

/// The unit, of which this processor has one and which this process may use.
#[derive(Clone, Copy, Debug)]
pub struct Tiles(());

impl Tiles {
    /// The unit, if there is one. Asks the system for it, once.
    pub fn find() -> Option<Self> {
        unit::are_there().then_some(Self(()))
    }

    /// `a b^T`, row by row: `a` `[m, k]` row by row, `b` `[n, k]` in an order of its own, the result `[m, n]`. With all threads of the pool.
    ///
    /// # Panics
    /// If `a` is not a number of rows of length `k`, or `b` not `n` of them.
    pub fn product<A: Real>(self, a: &[A], b: &[bf16], order: Order, n: usize, k: usize) -> Vec<A> {
        unit::product(a, b, order, n, k)
    }
}
