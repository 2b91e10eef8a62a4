//! Replaces `routing` in builds without CUDA.

use std::convert::Infallible;
use std::ops::Range;

use candle_core::{Result, Tensor, bail};

use super::{Load, Positions};
use crate::model::decoder::RouterSpec;

/// Always fails.
///
/// # Errors
/// The logits are on a GPU.
pub fn choose_experts(_: RouterSpec, _: usize, _: &Tensor, _: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    bail!("logits are on a GPU, which this worker was built without")
}

/// Cannot exist without CUDA.
pub struct SortedPairs(Infallible);

/// Always fails.
///
/// # Errors
/// The choices are on a GPU.
pub fn sort_pairs(_: &Tensor, _: &Tensor, _: usize, _: Option<Positions>) -> Result<SortedPairs> {
    bail!("choices are on a GPU, which this worker was built without")
}

/// Always fails.
///
/// # Errors
/// The rows are on a GPU.
pub fn gathered_like(_: &Tensor, _: usize) -> Result<Tensor> {
    bail!("rows are on a GPU, which this worker was built without")
}

impl SortedPairs {
    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn wait(&mut self) -> Result<Vec<Load>> {
        match self.0 {}
    }

    /// Never called.
    pub fn range(&self, _: &Range<usize>) -> Range<usize> {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn gather(&self, _: &Tensor, _: &Tensor, _: &Range<usize>, _: Vec<usize>, _: bool) -> Result<()> {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn add(&self, _: &Tensor, _: &Tensor, _: &Range<usize>, _: bool) -> Result<()> {
        match self.0 {}
    }

    /// Never called.
    ///
    /// # Errors
    /// None.
    pub fn on_host(&self, _: &Range<usize>) -> Result<(&[u32], &[f32])> {
        match self.0 {}
    }
}
