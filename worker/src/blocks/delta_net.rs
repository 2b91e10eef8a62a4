//! Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464) in the form of Qwen3-Next, Qwen3.5 and Kimi
//! Linear. A short convolution mixes neighbouring tokens. Each value head then writes to and reads
//! from its state, a matrix, by a gated delta rule ([`recurrence`]).

use candle_core::{DType, Result, Tensor};

use crate::blocks::norm::Norm;
use crate::kernels::fused::{self, Gate};
use crate::kernels::product::Linear;
use crate::model::decoder::{DeltaNetSpec, DeltaStored};

mod convolution;
mod recurrence;

pub use convolution::Convolution;
use recurrence::Heads;

/// Added to the sum of squares of a query or key. The reference implementation fixes it.
const UNIT_EPS: f32 = 1e-6;

/// A DeltaNet's tensors on one device. Names of the published tensors in brackets.
pub struct DeltaNetWeights {
    /// Projections to queries, keys, values, gates, write strengths and steps.
    pub projections: DeltaProjections,
    /// `[channels, 1, kernel]` (`conv1d`, or `q_conv1d`, `k_conv1d` and `v_conv1d` one after
    /// another).
    pub convolution: Tensor,
    /// `[value_heads]` (`A_log`).
    pub decay: Tensor,
    /// Same shape as a token's steps (`dt_bias`).
    pub step_bias: Tensor,
    /// Over `value_dim`, before the gate.
    pub norm: Norm,
    /// `[hidden, value_heads * value_dim]`.
    pub output: Linear,
}

/// Input projections, as stored.
pub enum DeltaProjections {
    /// Rows grouped by key head.
    ByKeyHead {
        /// Per key head [q | k | values | gates] (`in_proj_qkvz`).
        qkvz: Linear,
        /// Per key head [write strengths | steps] (`in_proj_ba`).
        ba: Linear,
    },
    /// Rows grouped by kind, head by head.
    ByKind {
        /// Queries, keys, values (`in_proj_qkv`).
        qkv: Linear,
        /// Gates (`in_proj_z`).
        gates: Linear,
        /// Write strengths (`in_proj_b`).
        strengths: Linear,
        /// Steps (`in_proj_a`).
        steps: Linear,
    },
    /// A separate matrix per kind, two of the kinds through a bottleneck.
    Apart {
        /// Queries (`q_proj`).
        query: Linear,
        /// Keys (`k_proj`).
        key: Linear,
        /// Values (`v_proj`).
        value: Linear,
        /// Gates (`g_a_proj`, `g_b_proj`).
        gates: [Linear; 2],
        /// Write strengths (`b_proj`).
        strengths: Linear,
        /// Steps per channel of a key (`f_a_proj`, `f_b_proj`).
        steps: [Linear; 2],
    },
}

impl DeltaProjections {
    /// Projects `x` `[rows, hidden]`.
    fn apply(&self, x: &Tensor) -> Result<Projected> {
        Ok(match self {
            Self::ByKeyHead { qkvz, ba } => Projected::ByKeyHead { qkvz: qkvz.apply(x)?, ba: ba.apply(x)? },
            Self::ByKind { qkv, gates, strengths, steps } => Projected::ByKind {
                qkv: qkv.apply(x)?,
                gates: gates.apply(x)?,
                strengths: strengths.apply(x)?,
                steps: steps.apply(x)?,
            },
            Self::Apart { query, key, value, gates, strengths, steps } => {
                let through = |[down, up]: &[Linear; 2]| up.apply(&down.apply(x)?);
                Projected::Apart {
                    query: query.apply(x)?,
                    key: key.apply(x)?,
                    value: value.apply(x)?,
                    gates: through(gates)?,
                    strengths: strengths.apply(x)?,
                    steps: through(steps)?,
                }
            }
        })
    }
}

/// Projections of tokens. Columns are in the order of the matrices' rows.
enum Projected {
    ByKeyHead { qkvz: Tensor, ba: Tensor },
    ByKind { qkv: Tensor, gates: Tensor, strengths: Tensor, steps: Tensor },
    Apart { query: Tensor, key: Tensor, value: Tensor, gates: Tensor, strengths: Tensor, steps: Tensor },
}

/// Kinds of projections.
#[derive(Clone, Copy)]
enum Projection {
    Query,
    Key,
    Value,
    Gate,
    Strength,
    Step,
}

impl Projected {
    /// One kind, `[rows, heads * width]`, head by head.
    fn columns(&self, spec: &DeltaNetSpec, kind: Projection) -> Result<Tensor> {
        let DeltaNetSpec { key_heads, value_heads, key_dim, value_dim, .. } = *spec;
        let (keys, values, served) = (key_heads * key_dim, value_heads * value_dim, value_heads / key_heads);
        match self {
            Self::ByKeyHead { qkvz, ba } => {
                let (of_keys, of_values) = (2 * key_dim, served * value_dim);
                match kind {
                    Projection::Query => of_groups(qkvz, key_heads, 0, key_dim),
                    Projection::Key => of_groups(qkvz, key_heads, key_dim, key_dim),
                    Projection::Value => of_groups(qkvz, key_heads, of_keys, of_values),
                    Projection::Gate => of_groups(qkvz, key_heads, of_keys + of_values, of_values),
                    Projection::Strength => of_groups(ba, key_heads, 0, served),
                    Projection::Step => of_groups(ba, key_heads, served, served),
                }
            }
            Self::ByKind { qkv, gates, strengths, steps } => match kind {
                Projection::Query => qkv.narrow(1, 0, keys)?.contiguous(),
                Projection::Key => qkv.narrow(1, keys, keys)?.contiguous(),
                Projection::Value => qkv.narrow(1, 2 * keys, values)?.contiguous(),
                Projection::Gate => Ok(gates.clone()),
                Projection::Strength => Ok(strengths.clone()),
                Projection::Step => Ok(steps.clone()),
            },
            Self::Apart { query, key, value, gates, strengths, steps } => {
                let of_kind = match kind {
                    Projection::Query => query,
                    Projection::Key => key,
                    Projection::Value => value,
                    Projection::Gate => gates,
                    Projection::Strength => strengths,
                    Projection::Step => steps,
                };
                Ok(of_kind.clone())
            }
        }
    }
}

/// Columns `first..first + width` of each of `groups` equal groups: `[rows, groups * width]`.
fn of_groups(projected: &Tensor, groups: usize, first: usize, width: usize) -> Result<Tensor> {
    let (rows, all) = projected.dims2()?;
    let grouped = projected.reshape((rows, groups, all / groups))?;
    grouped.narrow(2, first, width)?.contiguous()?.reshape((rows, groups * width))
}

/// DeltaNet of `x` `[sequences * positions, hidden]` (whole sequences), with an output of the same
/// shape, before the residual addition. Between the projections all values except the gated norm
/// are f32, whatever the dtype of `x`.
pub fn delta_net(spec: &DeltaNetSpec, weights: &DeltaNetWeights, x: &Tensor, positions: usize) -> Result<Tensor> {
    let (rows, values) = (x.dim(0)?, spec.value_heads * spec.value_dim);
    let projected = weights.projections.apply(x)?;
    let mixed = heads(spec, weights, &projected, positions)?.delta_rule()?;
    let mixed = mixed.reshape((rows / positions, spec.value_heads, positions, spec.value_dim))?.transpose(1, 2)?;
    let mixed = mixed.contiguous()?.to_dtype(x.dtype())?.reshape((rows * spec.value_heads, spec.value_dim))?;
    let normed = weights.norm.apply(&mixed)?.reshape((rows, values))?;
    let gates = projected.columns(spec, Projection::Gate)?;
    let gate = if spec.stored == DeltaStored::Apart { Gate::Sigmoid } else { Gate::Silu };
    weights.output.apply(&fused::gated(gates, &normed, gate)?)
}

/// Bytes that the delta rule takes on a GPU beside its arguments and its result, over so many
/// sequences of so many positions.
pub fn rule_bytes(spec: &DeltaNetSpec, sequences: usize, positions: usize) -> usize {
    // The decays, of which there were only logarithms.
    let decays = spec.value_heads * if spec.decays_channels() { spec.key_dim } else { 1 };
    sequences * positions * decays * size_of::<f32>()
}

/// What the recurrence runs over. Queries, keys and values are convolved and pass through SiLU;
/// queries and keys then become unit vectors, queries divided by the root of their width.
fn heads(spec: &DeltaNetSpec, weights: &DeltaNetWeights, projected: &Projected, positions: usize) -> Result<Heads> {
    let taps = weights.convolution.to_dtype(DType::F32)?.squeeze(1)?.contiguous()?;
    let part = |kind, convolution: Convolution<'_>| convolution.apply(&projected.columns(spec, kind)?, &taps);
    let DeltaNetSpec { key_heads, value_heads, key_dim, .. } = *spec;
    let keys = key_heads * key_dim;
    let length = Some((key_dim as f32).powf(-0.5));
    let query = Convolution { heads: key_heads, positions, first_channel: 0, length, bias: None };
    let key = Convolution { first_channel: keys, length: Some(1.0), ..query };
    let value = Convolution { heads: value_heads, first_channel: 2 * keys, length: None, ..query };
    let (decay, strength) = gates(spec, weights, projected, positions)?;
    Ok(Heads {
        query: part(Projection::Query, query)?,
        key: part(Projection::Key, key)?,
        value: part(Projection::Value, value)?,
        decay,
        strength,
    })
}

/// Log decays and write strengths per value head and token, each `[sequences * value_heads,
/// positions]`. Log decays are <= 0 (with an additional dimension `key_dim` if each row of the
/// state has a separate one); strengths are in (0, 1).
fn gates(
    spec: &DeltaNetSpec,
    weights: &DeltaNetWeights,
    projected: &Projected,
    positions: usize,
) -> Result<(Tensor, Tensor)> {
    let wide = |kind| projected.columns(spec, kind)?.to_dtype(DType::F32);
    let strength = (wide(Projection::Strength)?.neg()?.exp()? + 1.0)?.recip()?;
    let step = softplus(&wide(Projection::Step)?.broadcast_add(&weights.step_bias.to_dtype(DType::F32)?)?)?;
    let rate = weights.decay.to_dtype(DType::F32)?.exp()?.neg()?.reshape((1, spec.value_heads, 1))?;
    // One step per head, or per channel of its key.
    let by_head = |t: Tensor| {
        let (rows, columns) = t.dims2()?;
        t.reshape((rows, spec.value_heads, columns / spec.value_heads))
    };
    let decay = by_head(step)?.broadcast_mul(&rate)?;
    let heads_first = |t: Tensor| {
        let (rows, heads, width) = t.dims3()?;
        let t = t.reshape((rows / positions, positions, heads, width))?.transpose(1, 2)?.contiguous()?;
        t.reshape((rows / positions * heads, positions, width))
    };
    let decay = heads_first(decay)?;
    let decay = if spec.decays_channels() { decay } else { decay.squeeze(2)? };
    Ok((decay, heads_first(by_head(strength)?)?.squeeze(2)?))
}

/// `ln(1 + e^x)` as `max(x, 0) + ln(1 + e^-|x|)`, which never overflows.
pub(crate) fn softplus(x: &Tensor) -> Result<Tensor> {
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?
}

#[cfg(test)]
mod tests;
