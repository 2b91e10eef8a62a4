//! Softmax attention over whole sequences, blocked over queries so that memory grows with the sequence, not with its square.

use candle_core::{Result, Tensor};

use crate::decoder::{AttentionSpec, QkNorm};
use crate::fused;
use crate::rope::RopeTable;
use crate::weights::Linear;

/// Queries per block: scores of one block are `heads x QUERY_BLOCK x sequence` values.
const QUERY_BLOCK: usize = 256;

/// An attention layer's tensors on one device.
pub struct AttentionWeights {
    /// `[heads * head_dim, hidden]`.
    pub query: Linear,
    /// `[kv_heads * head_dim, hidden]`.
    pub key: Linear,
    /// `[kv_heads * head_dim, hidden]`.
    pub value: Linear,
    /// `[hidden, heads * head_dim]`.
    pub output: Linear,
    /// Gains of the queries' and keys' norms, where the spec has them.
    pub qk_norm: Option<(Tensor, Tensor)>,
}

/// `x` `[sequences * positions, hidden]` (whole sequences, one after another) to the same shape, before the residual addition.
pub fn attention(
    spec: &AttentionSpec,
    weights: &AttentionWeights,
    table: &RopeTable,
    x: &Tensor,
    positions: usize,
) -> Result<Tensor> {
    let (mut query, mut key, mut value) = (weights.query.apply(x)?, weights.key.apply(x)?, weights.value.apply(x)?);
    if let (QkNorm::WholeProjection(norm), Some((query_gain, key_gain))) = (spec.qk_norm, &weights.qk_norm) {
        query = fused::rms_norm(&query, query_gain, norm.eps)?;
        key = fused::rms_norm(&key, key_gain, norm.eps)?;
    }
    if let Some(limit) = spec.clip_qkv {
        (query, key, value) = (query.clamp(-limit, limit)?, key.clamp(-limit, limit)?, value.clamp(-limit, limit)?);
    }
    let query = fused::rope(query, table, spec.head_dim, positions)?;
    let key = fused::rope(key, table, spec.head_dim, positions)?;
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
