//! Statistics of activations in one pass.
//!
//! Each operation has a CPU form in this crate and a kernel (`worker/cuda/kernels`) with
//! bit-identical results. Both take rows of whole sequences and return results by sequence, so no
//! number depends on the number of sequences per call or of threads.

mod columns;
mod histogram;
mod large;
mod rows;
pub mod simd;

pub use columns::{Column, Columns, ExceedingPositions, STRIP};
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
    /// Shape of each sequence: `[tokens, width]`.
    fn sequences(self) -> impl Iterator<Item = &'a [f32]> {
        self.x.chunks((self.tokens * self.width).max(1))
    }

    /// Number of rows.
    pub fn rows(self) -> usize {
        self.x.len() / self.width
    }

    /// Statistics of rows and magnitudes by sequence.
    pub fn scan(self) -> Vec<Scan> {
        self.sequences().map(|x| Scan::of(x, self.width)).collect()
    }

    /// Statistics of columns by sequence; a value exceeds if |x| >= `threshold` > 0.
    pub fn columns(self, threshold: f32) -> Vec<Columns> {
        self.sequences().map(|x| Columns::of(x, self.width, threshold)).collect()
    }

    /// Exact median |x| of each sequence, the lower of the two middle values. `scans` are the
    /// sequences' [`rows`](Self::rows).
    pub fn medians(self, scans: &[Scan]) -> Vec<f32> {
        self.sequences().zip(scans).map(|(x, scan)| scan.median(x)).collect()
    }

    /// Values of the listed rows whose |x| has at least the given bits, in order of rows and
    /// columns.
    pub fn large(self, asked: &[(usize, u32)]) -> Vec<Large> {
        large::large(self.x, self.width, asked)
    }
}
