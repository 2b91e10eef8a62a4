//! Gated DeltaNet in its chunked form.

use candle_core::{Result, Tensor, bail};

use crate::decoder::DeltaNetSpec;
use crate::norm::Norm;
use crate::weights::Linear;

/// A DeltaNet's tensors on one device. Names of the published tensors in brackets.
pub struct DeltaNetWeights {
    /// Per key head [q | k | values | gates] (`in_proj_qkvz`).
    pub qkvz: Linear,
    /// Per key head [write strengths | decays] (`in_proj_ba`).
    pub ba: Linear,
    /// `[channels, 1, kernel]` (`conv1d`).
    pub convolution: Tensor,
    /// `[value_heads]` (`A_log`).
    pub decay: Tensor,
    /// `[value_heads]` (`dt_bias`).
    pub step_bias: Tensor,
    /// Over `value_dim`, before the gate.
    pub norm: Norm,
    /// `[hidden, value_heads * value_dim]`.
    pub output: Linear,
}

/// `x` `[sequences * positions, hidden]` (whole sequences, one after another) to the same shape, before the residual addition.
pub fn delta_net(_spec: &DeltaNetSpec, _weights: &DeltaNetWeights, _x: &Tensor, _positions: usize) -> Result<Tensor> {
    bail!("DeltaNet is being built")
}
