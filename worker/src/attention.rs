//! Softmax attention over whole sequences, blocked over queries so that memory grows with the sequence, not with its square.

use candle_core::{Result, Tensor};

use crate::decoder::{AttentionSpec, QkNorm};
use crate::fused;
use crate::norm::Norm;
use crate::rope::RopeTable;
use crate::weights::Linear;

/// Queries per block: scores of one block are `heads x QUERY_BLOCK x sequence` values.
pub const QUERY_BLOCK: usize = 256;

/// An attention layer's tensors on one device.
pub struct AttentionWeights {
    /// To queries, keys and values.
    pub projections: Projections,
    /// `[hidden, heads * head_dim]`.
    pub output: Linear,
    /// Norms of queries and keys that have gains.
    pub qk_norm: Option<(Norm, Norm)>,
    /// One logit per query head.
    pub sinks: Option<Tensor>,
}

/// Matrices that lead to queries (`heads * head_dim` rows, twice as many with an output gate), keys and values (`kv_heads * head_dim`).
pub enum Projections {
    /// One each.
    Separate {
        /// Queries.
        query: Linear,
        /// Keys.
        key: Linear,
        /// Values.
        value: Linear,
    },
    /// All rows in one matrix, one kind after another.
    Fused(Linear),
}

impl Projections {
    /// Queries, keys and values of `x` `[rows, hidden]`, contiguous.
    fn apply(&self, spec: &AttentionSpec, x: &Tensor) -> Result<[Tensor; 3]> {
        match self {
            Self::Separate { query, key, value } => Ok([query.apply(x)?, key.apply(x)?, value.apply(x)?]),
            Self::Fused(all) => {
                let all = all.apply(x)?;
                let kv = spec.kv_heads * spec.head_dim;
                let queries = all.dim(1)? - 2 * kv;
                let part = |first, width| all.narrow(1, first, width)?.contiguous();
                Ok([part(0, queries)?, part(queries, kv)?, part(queries + kv, kv)?])
            }
        }
    }
}

/// `x` `[sequences * positions, hidden]` (whole sequences, one after another) to the same shape, before the residual addition.
/// `table` is there if the spec has a rotation.
pub fn attention(
    spec: &AttentionSpec,
    weights: &AttentionWeights,
    table: Option<&RopeTable>,
    x: &Tensor,
    positions: usize,
) -> Result<Tensor> {
    let [mut query, mut key, mut value] = weights.projections.apply(spec, x)?;
    if let (QkNorm::WholeProjection(_), Some((query_norm, key_norm))) = (spec.qk_norm, &weights.qk_norm) {
        query = query_norm.apply(&query)?;
        key = key_norm.apply(&key)?;
    }
    if let Some(limit) = spec.clip_qkv {
        (query, key, value) = (query.clamp(-limit, limit)?, key.clamp(-limit, limit)?, value.clamp(-limit, limit)?);
    }
    if let Some(table) = table {
        query = fused::rope(query, table, spec.head_dim, positions)?;
        key = fused::rope(key, table, spec.head_dim, positions)?;
    }
    let sequences = x.dim(0)? / positions;
    let mixed = (0..sequences)
        .map(|s| {
            let rows = |t: &Tensor| t.narrow(0, s * positions, positions);
            one_sequence(spec, &rows(&query)?, &rows(&key)?, &rows(&value)?)
        })
        .collect::<Result<Vec<_>>>()?;
    weights.output.apply(&Tensor::cat(&mixed, 0)?)
}

/// One sequence: query `[n, heads * d]`, key and value `[n, kv_heads * d]` to `[n, heads * d]`.
fn one_sequence(spec: &AttentionSpec, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
    let (n, d) = (query.dim(0)?, spec.head_dim);
    let groups = spec.heads / spec.kv_heads;
    let by_head = |t: &Tensor, heads: usize| t.reshape((t.dim(0)?, heads, d))?.transpose(0, 1)?.contiguous();
    let (key, value) = (by_head(key, spec.kv_heads)?, by_head(value, spec.kv_heads)?);
    let scale = 1.0 / (d as f64).sqrt();
    let mut blocks = Vec::with_capacity(n.div_ceil(QUERY_BLOCK));
    for first in (0..n).step_by(QUERY_BLOCK) {
        let queries = QUERY_BLOCK.min(n - first);
        let seen = first + queries;
        let block =
            by_head(&query.narrow(0, first, queries)?, spec.heads)?.reshape((spec.kv_heads, groups * queries, d))?;
        let scores = block.matmul(&key.narrow(1, 0, seen)?.transpose(1, 2)?)?;
        let shares = fused::causal_softmax(scores, first, queries, scale)?;
        let mixed = shares.matmul(&value.narrow(1, 0, seen)?)?.reshape((spec.heads, queries, d))?;
        blocks.push(mixed.transpose(0, 1)?.reshape((queries, spec.heads * d))?);
    }
    Tensor::cat(&blocks, 0)
}
