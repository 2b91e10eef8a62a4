//! The delta rule on a GPU, where starting an operation costs more than most of them take.
//!
//! What does not depend on the state is computed for all chunks of all heads at once. The state
//! passes from chunk to chunk, in all heads together. With `T` the inverse of the unit lower
//! triangle that [`super`] describes, and one row of `K`, `Q` and `V` per token of a chunk:
//!
//! ```text
//! alone = T b V      answered = T b d K      writes = alone - answered S
//! out = d Q S + scores writes      S <- d(n) S + (d(n, j) K)^T writes
//! ```

use candle_core::{DType, Result, Tensor};

use super::{CHUNK, Heads, by_channel};
use crate::blocks::delta_net::triangle::inverse;

/// Tokens of value heads that are computed together, which bounds the memory; more if one key head
/// has more. For 32 heads that is 4 sequences of 2,048 tokens.
const TOGETHER: usize = 1 << 18;

/// What the queries read, `[value heads, positions, value_dim]`.
pub(super) fn delta_rule(heads: &Heads) -> Result<Tensor> {
    let (key_heads, positions, _) = heads.key.dims3()?;
    by_key_heads(heads, together(key_heads, heads.served()?, positions))
}

/// Key heads that are computed together.
fn together(key_heads: usize, served: usize, positions: usize) -> usize {
    (TOGETHER / (served * positions).max(1)).clamp(1, key_heads.max(1))
}

/// Bytes that [`delta_rule`] takes at most beside its arguments and its result.
pub(crate) fn bytes(
    [key_heads, served, positions]: [usize; 3],
    key_dim: usize,
    value_dim: usize,
    by_channel: bool,
) -> usize {
    let n = if by_channel { by_channel::CHUNK } else { CHUNK };
    let heads = together(key_heads, served, positions) * served;
    let tokens = heads * positions.next_multiple_of(n.min(positions.max(1)));
    // Of a token of a head: a chunk that is filled up.
    let filled = 2 * key_dim + value_dim + if by_channel { 6 * key_dim } else { 0 };
    // Then decays between tokens, twice in f64 before they are f32.
    let between = tokens * 8 * n;
    // Or writes and answers with what they come from: while states pass, of which four are alive,
    // or twice while they are joined.
    let passing = tokens * 3 * value_dim + heads * 4 * key_dim * value_dim;
    let joining = tokens * 7 * value_dim;
    let after = tokens * (n + 3 * key_dim) + passing.max(joining);
    let pairs = if by_channel { by_channel::pair_bytes(tokens, n, key_dim) } else { 0 };
    (tokens * filled + between.max(after)) * size_of::<f32>() + pairs
}

/// As many key heads at once, with what each serves.
fn by_key_heads(heads: &Heads, most: usize) -> Result<Tensor> {
    let (key_heads, served) = (heads.key.dim(0)?, heads.served()?);
    let part = |first: usize| {
        let count = most.min(key_heads - first);
        let of = |t: &Tensor, each: usize| t.narrow(0, first * each, count * each);
        let part = Heads {
            query: of(&heads.query, 1)?,
            key: of(&heads.key, 1)?,
            value: of(&heads.value, served)?,
            decay: of(&heads.decay, served)?,
            strength: of(&heads.strength, served)?,
        };
        at_once(&part)
    };
    Tensor::cat(&(0..key_heads).step_by(most).map(part).collect::<Result<Vec<_>>>()?, 0)
}

/// What decays make of the chunks of heads.
pub(super) struct Decayed {
    /// Keys against the keys before them, `[value heads * chunks, n, n]`. Only what is below the
    /// diagonal counts.
    pub(super) to_keys: Tensor,
    /// Queries against the keys up to their own, in the same shape.
    pub(super) to_queries: Tensor,
    /// What is left at each token of the state before the chunk, `[key heads, served, chunks, n,
    /// 1]`, or of each row of the state, `[.., key_dim]`.
    pub(super) before: Tensor,
    /// What is left at the end of the chunk of what each token writes, in the same shape.
    pub(super) left: Tensor,
}

fn at_once(heads: &Heads) -> Result<Tensor> {
    let ((key_heads, positions, key_dim), (count, _, value_dim)) = (heads.key.dims3()?, heads.value.dims3()?);
    let (served, by_channel) = (heads.served()?, heads.decay.rank() == 3);
    let n = positions.min(if by_channel { by_channel::CHUNK } else { CHUNK });
    let chunks = positions.div_ceil(n);
    let all = count * chunks;
    // The last chunk is filled up with tokens that write nothing and keep the state.
    let filled = |t: &Tensor| t.pad_with_zeros(1, 0, chunks * n - positions);
    // Keys are there once for all value heads that they serve.
    let of_keys = |t: &Tensor| filled(t)?.reshape((key_heads, 1, chunks, n, key_dim));
    let of_values = |t: &Tensor, width: usize| filled(t)?.reshape((key_heads, served, chunks, n, width));
    let (query, key) = (of_keys(&heads.query)?, of_keys(&heads.key)?);
    let strength = of_values(&heads.strength, 1)?;
    let decayed = if by_channel {
        by_channel::decayed(&query, &key, &of_values(&heads.decay, key_dim)?)?
    } else {
        by_head(&query, &key, &of_values(&heads.decay, 1)?)?
    };
    let Decayed { to_keys, to_queries, before, left } = decayed;
    let system = to_keys.broadcast_mul(&strength.reshape((all, n, 1))?)?;
    drop(to_keys);
    let inverse = inverse(&system)?;
    drop(system);
    let wanted = of_values(&heads.value, value_dim)?.broadcast_mul(&strength)?.reshape((all, n, value_dim))?;
    let alone = inverse.matmul(&wanted)?.reshape((count, chunks, n, value_dim))?;
    drop(wanted);
    let asked = key.broadcast_mul(&before)?.broadcast_mul(&strength)?.reshape((all, n, key_dim))?;
    let answered = inverse.matmul(&asked)?.reshape((count, chunks, n, key_dim))?;
    drop((asked, inverse));
    let by_chunk = |t: Tensor| t.reshape((count, chunks, n, key_dim));
    let (query, key) = (by_chunk(query.broadcast_mul(&before)?)?, by_chunk(key.broadcast_mul(&left)?)?);
    // Of the state, or of each of its rows.
    let kept = before.narrow(3, n - 1, 1)?.reshape((count, chunks, before.dim(4)?, 1))?;

    let mut state = Tensor::zeros((count, key_dim, value_dim), DType::F32, heads.value.device())?;
    let (mut reads, mut writes) = (Vec::with_capacity(chunks), Vec::with_capacity(chunks));
    for chunk in 0..chunks {
        let of = |t: &Tensor| t.narrow(1, chunk, 1)?.squeeze(1);
        let write = (of(&alone)? - of(&answered)?.matmul(&state)?)?;
        reads.push(of(&query)?.matmul(&state)?);
        state = (state.broadcast_mul(&of(&kept)?)? + of(&key)?.transpose(1, 2)?.matmul(&write)?)?;
        writes.push(write);
    }
    let joined = |parts: Vec<Tensor>| Tensor::stack(&parts, 1)?.reshape((all, n, value_dim));
    let out = (joined(reads)? + to_queries.matmul(&joined(writes)?)?)?;
    out.reshape((count, chunks * n, value_dim))?.narrow(1, 0, positions)
}

/// Where a head has one decay. `query` and `key` `[key heads, 1, chunks, n, key_dim]`, logarithms
/// of decays `[key heads, served, chunks, n, 1]`.
fn by_head(query: &Tensor, key: &Tensor, decay: &Tensor) -> Result<Decayed> {
    let ((key_heads, served, chunks, n, _), key_dim) = (decay.dims5()?, key.dim(4)?);
    let all = key_heads * served * chunks;
    // Differences of running sums, in f64 so that strong decays do not hide weak ones.
    let log = decay.reshape((all, n))?.to_dtype(DType::F64)?.cumsum(1)?;
    let between = {
        let between = log.unsqueeze(2)?.broadcast_sub(&log.unsqueeze(1)?)?;
        let lower = Tensor::tril2(n, DType::F32, decay.device())?;
        between.minimum(0.0)?.to_dtype(DType::F32)?.exp()?.broadcast_mul(&lower)?
    };
    let left = between.narrow(1, n - 1, 1)?.reshape(decay.shape())?;
    let between = between.reshape((key_heads, served, chunks, n, n))?;
    let of_keys = |t: &Tensor| t.reshape((key_heads * chunks, n, key_dim));
    let keys = of_keys(key)?.transpose(1, 2)?;
    let scores = |of: &Tensor| {
        let scores = of_keys(of)?.matmul(&keys)?.reshape((key_heads, 1, chunks, n, n))?;
        scores.broadcast_mul(&between)?.reshape((all, n, n))
    };
    let before = log.to_dtype(DType::F32)?.exp()?.reshape(decay.shape())?;
    Ok(Decayed { to_keys: scores(key)?, to_queries: scores(query)?, before, left })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::delta_net::tests::values;

    /// 6 value heads on 3 key heads, or on as many where each channel decays.
    fn heads(positions: usize, by_channel: bool) -> Heads {
        let key_heads = if by_channel { 6 } else { 3 };
        let uniform = |shape: &[usize], seed| (values(shape, 1.0, seed) + 0.5).unwrap();
        let decay: &[usize] = if by_channel { &[6, positions, 5] } else { &[6, positions] };
        Heads {
            query: values(&[key_heads, positions, 5], 0.6, 1),
            key: values(&[key_heads, positions, 5], 0.6, 2),
            value: values(&[6, positions, 7], 2.0, 3),
            decay: (uniform(decay, 4) * -0.3).unwrap(),
            strength: uniform(&[6, positions], 5),
        }
    }

    fn bits(t: &Tensor) -> Vec<u32> {
        t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn heads_computed_together_change_no_bit() {
        for by_channel in [false, true] {
            for positions in [1, 17, 64, 150] {
                let heads = heads(positions, by_channel);
                let all = bits(&delta_rule(&heads).unwrap());
                for most in [1, 2] {
                    assert_eq!(bits(&by_key_heads(&heads, most).unwrap()), all, "{positions} positions, {most} heads");
                }
            }
        }
    }

    #[test]
    fn tokens_after_the_last_chunk_change_no_bit() {
        for by_channel in [false, true] {
            let long = heads(130, by_channel);
            let short = |t: &Tensor| t.narrow(1, 0, 100).unwrap().contiguous().unwrap();
            let cut = Heads {
                query: short(&long.query),
                key: short(&long.key),
                value: short(&long.value),
                decay: short(&long.decay),
                strength: short(&long.strength),
            };
            assert_eq!(bits(&delta_rule(&cut).unwrap()), bits(&short(&delta_rule(&long).unwrap())));
        }
    }

    #[test]
    fn memory_is_bounded_whatever_the_number_of_sequences() {
        let of = |sequences: usize| bytes([16 * sequences, 2, 2048], 128, 128, false);
        // By hand, of each token of 32 heads: 1728 numbers.
        assert_eq!(of(1), 2048 * 32 * 1728 * 4);
        assert_eq!((of(4), of(1000)), (4 * of(1), 4 * of(1)));
        assert_eq!(together(1, 2, 1 << 20), 1, "one key head, however long");
        // Of each token of 128 heads 1216 numbers, and of each head four states of short sequences.
        let short = bytes([16 * 4, 2, 32], 128, 128, false);
        assert_eq!(short, 128 * (32 * 1216 + 4 * 128 * 128) * 4);
    }
}
