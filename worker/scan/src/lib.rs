//! What one pass over activations finds.
//!
//! Each operation has one CPU form, here, and one kernel (`worker/cuda/kernels`) that gives the
//! same numbers bit by bit. Both take rows of whole sequences and answer for each sequence, so
//! that no number depends on how many sequences are looked at together, nor on the number of
//! threads.

mod columns;
mod histogram;
mod large;
mod rows;
pub mod simd;

pub use columns::{Column, Columns, Marks, STRIP};
pub use histogram::{BINS, Histogram};
pub use large::Large;
pub use rows::{Row, Scan};

/// Activations on the host.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// `[rows, width]`, row-major; rows of whole sequences.
    pub x: &'a [f32],
    /// Values of a row.
    pub width: usize,
    /// Rows of a sequence.
    pub tokens: usize,
}

impl<'a> Rows<'a> {
    /// `[tokens, width]` of each.
    fn sequences(self) -> impl Iterator<Item = &'a [f32]> {
        self.x.chunks((self.tokens * self.width).max(1))
    }

    /// Rows.
    pub fn rows(self) -> usize {
        self.x.len() / self.width
    }

    /// Rows and magnitudes of each sequence.
    pub fn scan(self) -> Vec<Scan> {
        self.sequences().map(|x| Scan::of(x, self.width)).collect()
    }

    /// Columns of each sequence; a value exceeds where |x| >= `threshold` > 0.
    pub fn columns(self, threshold: f32) -> Vec<Columns> {
        self.sequences().map(|x| Columns::of(x, self.width, threshold)).collect()
    }

    /// The exact median |x| of each sequence, the lower of the two middle ones; `scans` are
    /// theirs.
    pub fn medians(self, scans: &[Scan]) -> Vec<f32> {
        self.sequences().zip(scans).map(|(x, scan)| scan.median(x)).collect()
    }

    /// The values of some rows whose |x| has at least the bits that are asked of the row, in order
    /// of rows and columns.
    pub fn large(self, asked: &[(usize, u32)]) -> Vec<Large> {
        large::large(self.x, self.width, asked)
    }
}
