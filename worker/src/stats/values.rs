//! Activations on their device, and scans of them.

use candle_core::Tensor;
use outliers_scan::{Columns, Large, Rows, Scan};

use super::with_f32;
use crate::device::gpu::ScanSummary;
use crate::error::Result;

/// Activations `[rows, width]` of whole sequences. Each operation has a CPU and a GPU
/// implementation with the same results, and fails only with errors of the driver.
pub enum Values<'a> {
    /// On the host.
    Host(Rows<'a>),
    /// On a GPU, with their requested statistics.
    Gpu(&'a ScanSummary<'a>),
}

/// Passes a tensor's values `[rows, width]` to `see` on the host, as whole sequences of `tokens`
/// rows.
pub(super) fn on_the_host<T>(x: &Tensor, tokens: usize, see: impl FnOnce(&Values<'_>) -> Result<T>) -> Result<T> {
    let width = x.dim(1)?;
    with_f32(x, |x| see(&Values::Host(Rows { x, width, tokens })))
}

/// Activations that are copied to the host when they are read.
pub(super) struct HostValues<'a> {
    /// The tensor on its device.
    pub tensor: &'a Tensor,
    /// The same values on the host or a GPU.
    pub values: &'a Values<'a>,
}

impl HostValues<'_> {
    /// Passes the values to `see` as f32, without a copy if they are on the host.
    ///
    /// # Errors
    /// Errors of the device and of `see`.
    pub(super) fn see<T>(&self, see: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
        match self.values {
            Values::Host(rows) => see(rows.x),
            Values::Gpu(_) => with_f32(self.tensor, see),
        }
    }
}

impl Values<'_> {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        match self {
            Self::Host(x) => x.rows(),
            Self::Gpu(x) => x.rows(),
        }
    }

    /// Statistics per row and magnitude, for each sequence.
    pub fn scan(&self) -> Result<Vec<Scan>> {
        match self {
            Self::Host(x) => Ok(x.scan()),
            Self::Gpu(x) => Ok(x.scan()?),
        }
    }

    /// Statistics per column, for each sequence. A value exceeds if |x| >= `threshold` > 0.
    pub fn columns(&self, threshold: f32) -> Result<Vec<Columns>> {
        match self {
            Self::Host(x) => Ok(x.columns(threshold)),
            Self::Gpu(x) => Ok(x.columns(threshold)?),
        }
    }

    /// The exact median |x| of each sequence, the lower of the two middle values. `scans` are
    /// those of the sequences.
    pub fn medians(&self, scans: &[Scan]) -> Result<Vec<f32>> {
        match self {
            Self::Host(x) => Ok(x.medians(scans)),
            Self::Gpu(x) => Ok(x.medians()?),
        }
    }

    /// Values of some rows with |x| bits of at least the row's bound, in order of rows and
    /// columns.
    pub fn large(&self, asked: &[(usize, u32)]) -> Result<Vec<Large>> {
        match self {
            Self::Host(x) => Ok(x.large(asked)),
            Self::Gpu(x) => Ok(x.large(asked)?),
        }
    }
}
