//! Multi-head latent attention.

use candle_core::{Result, Tensor, bail};

use crate::decoder::LatentSpec;
use crate::norm::Norm;
use crate::rope::RopeTable;
use crate::weights::Linear;

/// A latent attention's tensors on one device.
pub struct LatentWeights {
    /// To the queries.
    pub query: LatentQuery,
    /// `[kv_rank + rope_dim, hidden]`: the bottleneck of keys and values, then the rotated key part.
    pub kv_down: Linear,
    /// Inside the bottleneck.
    pub kv_norm: Norm,
    /// `[heads * (nope_dim + value_dim), kv_rank]`, per head [key without position | value].
    pub kv_up: Linear,
    /// `[hidden, heads * value_dim]`.
    pub output: Linear,
}

/// The way to the queries `[rows, heads * (nope_dim + rope_dim)]`.
pub enum LatentQuery {
    /// One matrix.
    Direct(Linear),
    /// Through a bottleneck.
    LowRank {
        /// Into it.
        down: Linear,
        /// Inside it.
        norm: Norm,
        /// Out of it.
        up: Linear,
    },
}

/// `x` `[sequences * positions, hidden]` (whole sequences, one after another) to the same shape, before the residual addition.
pub fn latent_attention(
    _spec: &LatentSpec,
    _weights: &LatentWeights,
    _table: &RopeTable,
    _x: &Tensor,
    _positions: usize,
) -> Result<Tensor> {
    bail!("latent attention is being built")
}
