//! Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464) as Qwen3-Next has it: a short convolution mixes neighbouring tokens, then each
//! value head writes to and reads from a matrix of its own, its state, by a gated delta rule ([`recurrence`]).

use candle_core::{DType, Result, Tensor};

use crate::decoder::DeltaNetSpec;
use crate::fused::{self, Gate};
use crate::norm::Norm;
use crate::weights::Linear;

mod convolution;
mod recurrence;

use convolution::Convolution;
use recurrence::Heads;

/// Added to the sum of squares of a query or key; fixed in the reference implementation.
const UNIT_EPS: f32 = 1e-6;

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
/// Between the projections everything but the gated norm is f32, whatever the dtype of `x`.
pub fn delta_net(spec: &DeltaNetSpec, weights: &DeltaNetWeights, x: &Tensor, positions: usize) -> Result<Tensor> {
    let (rows, values) = (x.dim(0)?, spec.value_heads * spec.value_dim);
    let qkvz = weights.qkvz.apply(x)?;
    let mixed = heads(spec, weights, &qkvz, &weights.ba.apply(x)?, positions)?.delta_rule()?;
    let mixed = mixed.reshape((rows / positions, spec.value_heads, positions, spec.value_dim))?.transpose(1, 2)?;
    let mixed = mixed.contiguous()?.to_dtype(x.dtype())?.reshape((rows * spec.value_heads, spec.value_dim))?;
    let normed = weights.norm.apply(&mixed)?.reshape((rows, values))?;
    let served = values / spec.key_heads;
    let z = columns(spec, &qkvz, 2 * spec.key_dim + served, served)?;
    weights.output.apply(&fused::gated(z, &normed, Gate::Silu)?)
}

/// Columns `first..first + width` of each key head's group: `[rows, key_heads * width]`.
fn columns(spec: &DeltaNetSpec, projected: &Tensor, first: usize, width: usize) -> Result<Tensor> {
    let (rows, all) = projected.dims2()?;
    let groups = projected.reshape((rows, spec.key_heads, all / spec.key_heads))?;
    groups.narrow(2, first, width)?.contiguous()?.reshape((rows, spec.key_heads * width))
}

/// What the recurrence runs over. Queries, keys and values are convolved and pass through SiLU; queries and keys then become unit
/// vectors, queries divided by the root of their width.
fn heads(
    spec: &DeltaNetSpec,
    weights: &DeltaNetWeights,
    qkvz: &Tensor,
    ba: &Tensor,
    positions: usize,
) -> Result<Heads> {
    let taps = weights.convolution.to_dtype(DType::F32)?.squeeze(1)?.contiguous()?;
    let part = |first, width, convolution: Convolution| {
        convolution.apply(&columns(spec, qkvz, first, width)?.to_dtype(DType::F32)?, &taps)
    };
    let DeltaNetSpec { key_heads, value_heads, key_dim, value_dim, .. } = *spec;
    let (keys, served) = (key_heads * key_dim, value_heads / key_heads);
    let query =
        Convolution { heads: key_heads, positions, first_channel: 0, length: Some((key_dim as f32).powf(-0.5)) };
    let key = Convolution { first_channel: keys, length: Some(1.0), ..query };
    let value = Convolution { heads: value_heads, first_channel: 2 * keys, length: None, ..query };
    let (decay, strength) = gates(spec, weights, ba, positions)?;
    Ok(Heads {
        query: part(0, key_dim, query)?,
        key: part(key_dim, key_dim, key)?,
        value: part(2 * key_dim, served * value_dim, value)?,
        decay,
        strength,
    })
}

/// Per value head and token, each `[sequences * value_heads, positions]`: the logarithm of what the state is multiplied by, never
/// positive, and how much of a write is done, in (0, 1).
fn gates(spec: &DeltaNetSpec, weights: &DeltaNetWeights, ba: &Tensor, positions: usize) -> Result<(Tensor, Tensor)> {
    let served = spec.value_heads / spec.key_heads;
    let half = |first| columns(spec, ba, first, served)?.to_dtype(DType::F32);
    let strength = (half(0)?.neg()?.exp()? + 1.0)?.recip()?;
    let step = softplus(&half(served)?.broadcast_add(&weights.step_bias.to_dtype(DType::F32)?)?)?;
    let decay = step.broadcast_mul(&weights.decay.to_dtype(DType::F32)?.exp()?.neg()?)?;
    let by_head = |t: Tensor| {
        let sequences = t.dim(0)? / positions;
        let heads = t.reshape((sequences, positions, spec.value_heads))?.transpose(1, 2)?.contiguous()?;
        heads.reshape((sequences * spec.value_heads, positions))
    };
    Ok((by_head(decay)?, by_head(strength)?))
}

/// `ln(1 + e^x)`, as `max(x, 0) + ln(1 + e^-|x|)`: never overflows.
fn softplus(x: &Tensor) -> Result<Tensor> {
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?
}

#[cfg(test)]
mod tests;
