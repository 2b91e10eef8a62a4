//! Activations where they lie, and what one pass over them finds there.

use candle_core::Tensor;
use outliers_scan::{Columns, Large, Rows, Scan};

use super::with_f32;
use crate::device::gpu::Seen;
use crate::error::Result;

/// Activations `[rows, width]`, rows of whole sequences: each operation has a form for the CPU and
/// one for GPUs, of the same results.
pub enum Values<'a> {
    /// On the host.
    Host(Rows<'a>),
    /// On a GPU that has looked at them.
    Gpu(&'a Seen<'a>),
}

/// Shows a tensor's values `[rows, width]` on the host, rows of whole sequences of `tokens` each.
pub(super) fn on_the_host<T>(x: &Tensor, tokens: usize, see: impl FnOnce(&Values<'_>) -> Result<T>) -> Result<T> {
    let width = x.dim(1)?;
    with_f32(x, |x| see(&Values::Host(Rows { x, width, tokens })))
}

/// Activations that may have to be copied to the host before they can be read there.
pub(super) struct HostValues<'a> {
    /// Where they lie.
    pub tensor: &'a Tensor,
    /// The same, as the host or a GPU sees them.
    pub values: &'a Values<'a>,
}

impl HostValues<'_> {
    /// Shows them as f32: without a copy where they are on the host.
    ///
    /// # Errors
    /// The device's, and those of `see`.
    pub(super) fn see<T>(&self, see: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
        match self.values {
            Values::Host(rows) => see(rows.x),
            Values::Gpu(_) => with_f32(self.tensor, see),
        }
    }
}

impl Values<'_> {
    /// Rows.
    pub fn rows(&self) -> usize {
        match self {
            Self::Host(x) => x.rows(),
            Self::Gpu(x) => x.rows(),
        }
    }

    /// Rows and magnitudes of each sequence.
    ///
    /// # Errors
    /// Device: the driver's.
    pub fn scan(&self) -> Result<Vec<Scan>> {
        match self {
            Self::Host(x) => Ok(x.scan()),
            Self::Gpu(x) => Ok(x.scan()?),
        }
    }

    /// Columns of each sequence; a value exceeds where |x| >= `threshold` > 0.
    ///
    /// # Errors
    /// Device: the driver's.
    pub fn columns(&self, threshold: f32) -> Result<Vec<Columns>> {
        match self {
            Self::Host(x) => Ok(x.columns(threshold)),
            Self::Gpu(x) => Ok(x.columns(threshold)?),
        }
    }

    /// The exact median |x| of each sequence, the lower of the two middle ones; `scans` are
    /// theirs.
    ///
    /// # Errors
    /// Device: the driver's.
    pub fn medians(&self, scans: &[Scan]) -> Result<Vec<f32>> {
        match self {
            Self::Host(x) => Ok(x.medians(scans)),
            Self::Gpu(x) => Ok(x.medians()?),
        }
    }

    /// The values of some rows whose |x| has at least the bits that are asked of the row, in order
    /// of rows and columns.
    ///
    /// # Errors
    /// Device: the driver's.
    pub fn large(&self, asked: &[(usize, u32)]) -> Result<Vec<Large>> {
        match self {
            Self::Host(x) => Ok(x.large(asked)),
            Self::Gpu(x) => Ok(x.large(asked)?),
        }
    }
}
