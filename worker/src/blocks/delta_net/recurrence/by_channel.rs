//! The delta rule with a separate decay for each row of the state.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::Heads;
use super::batched::Decayed;

/// Tokens whose writes are solved for together on a GPU.
pub(super) const CHUNK: usize = 16;
/// Decays of a channel between two tokens that are held at once.
const PAIRS: usize = 1 << 24;

/// By its definition: on a CPU the state of a head stays in the cache.
pub(super) fn token_by_token(heads: &Heads) -> Result<Tensor> {
    let (count, positions, width) = heads.value.dims3()?;
    let key_dim = heads.key.dim(2)?;
    let host = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
    let (query, key, value) = (host(&heads.query)?, host(&heads.key)?, host(&heads.value)?);
    let (decay, strength) = (host(&heads.decay)?, host(&heads.strength)?);
    let mut out = vec![0_f32; value.len()];
    out.par_chunks_mut(positions * width).enumerate().for_each(|(head, out)| {
        let (mut state, mut write) = (vec![0_f32; key_dim * width], vec![0_f32; width]);
        for (position, read) in out.chunks_exact_mut(width).enumerate() {
            let token = head * positions + position;
            let of_keys = |all: &[f32]| all[token * key_dim..][..key_dim].to_vec();
            let (decay, key, query) = (of_keys(&decay), of_keys(&key), of_keys(&query));
            write.copy_from_slice(&value[token * width..][..width]);
            for ((row, decay), key) in state.chunks_exact_mut(width).zip(&decay).zip(&key) {
                let left = decay.exp();
                for (s, w) in row.iter_mut().zip(&mut write) {
                    *s *= left;
                    *w -= key * *s;
                }
            }
            write.iter_mut().for_each(|w| *w *= strength[token]);
            for ((row, key), query) in state.chunks_exact_mut(width).zip(&key).zip(&query) {
                for ((s, w), r) in row.iter_mut().zip(&write).zip(read.iter_mut()) {
                    *s += key * w;
                    *r += query * *s;
                }
            }
        }
    });
    Tensor::from_vec(out, (count, positions, width), &Device::Cpu)
}

/// Bytes of the decays between tokens of chunks of n: differences in f64 and their minima, what
/// these are in f32, and the keys that are left.
pub(super) fn pair_bytes(tokens: usize, n: usize, key_dim: usize) -> usize {
    let pairs = (tokens * n * key_dim).min(PAIRS.max(n * n * key_dim));
    pairs * (2 * size_of::<f64>() + 3 * size_of::<f32>())
}

/// `query` and `key` `[heads, 1, chunks, n, key_dim]`, logarithms of decays in the same shape.
pub(super) fn decayed(query: &Tensor, key: &Tensor, decay: &Tensor) -> Result<Decayed> {
    let (heads, _, chunks, n, key_dim) = decay.dims5()?;
    let all = heads * chunks;
    let by_chunk = |t: &Tensor| t.reshape((all, n, key_dim));
    // Differences of running sums, in f64 so that strong decays do not hide weak ones.
    let log = by_chunk(decay)?.to_dtype(DType::F64)?.cumsum(1)?.contiguous()?;
    let (query, key) = (by_chunk(query)?, by_chunk(key)?);
    let at_once = (PAIRS / (n * n * key_dim)).max(1);
    let (mut to_keys, mut to_queries) = (Vec::new(), Vec::new());
    for first in (0..all).step_by(at_once) {
        let count = at_once.min(all - first);
        let part = |t: &Tensor| t.narrow(0, first, count);
        let (query, key, log) = (part(&query)?, part(&key)?, part(&log)?);
        // What is left at token i of the key of token j, `[chunks * i, j, key_dim]`.
        let keys_left = {
            let between = log.unsqueeze(2)?.broadcast_sub(&log.unsqueeze(1)?)?;
            let between = between.minimum(0.0)?.to_dtype(DType::F32)?.exp()?;
            between.broadcast_mul(&key.unsqueeze(1)?)?.reshape((count * n, n, key_dim))?
        };
        let scores = |of: &Tensor| keys_left.matmul(&of.reshape((count * n, key_dim, 1))?)?.reshape((count, n, n));
        to_keys.push(scores(&key)?);
        to_queries.push(scores(&query)?);
    }
    let last = log.narrow(1, n - 1, 1)?;
    let left = last.broadcast_sub(&log)?.minimum(0.0)?.to_dtype(DType::F32)?.exp()?.reshape(decay.shape())?;
    let before = log.to_dtype(DType::F32)?.exp()?.reshape(decay.shape())?;
    let to_queries = Tensor::cat(&to_queries, 0)?.broadcast_mul(&Tensor::tril2(n, DType::F32, decay.device())?)?;
    Ok(Decayed { to_keys: Tensor::cat(&to_keys, 0)?, to_queries, before, left })
}

#[cfg(test)]
mod tests {
    use super::super::batched;
    use super::*;
    use crate::blocks::delta_net::tests::{Token, close, recurrence, values};

    /// 3 heads; decays down to `exp(-strongest)`.
    fn heads(positions: usize, strongest: f64) -> Heads {
        let unit = |t: Tensor| (t * 0.3).unwrap();
        let uniform = |shape: &[usize], seed| (values(shape, 1.0, seed) + 0.5).unwrap();
        Heads {
            query: unit(values(&[3, positions, 10], 2.0, 1)),
            key: unit(values(&[3, positions, 10], 2.0, 2)),
            value: values(&[3, positions, 7], 2.0, 3),
            decay: (uniform(&[3, positions, 10], 4) * -strongest).unwrap(),
            strength: uniform(&[3, positions], 5),
        }
    }

    /// The definition in f64.
    fn naive(heads: &Heads) -> Tensor {
        let vectors = |t: &Tensor| t.to_dtype(DType::F64).unwrap().to_vec3::<f64>().unwrap();
        let (query, key, value) = (vectors(&heads.query), vectors(&heads.key), vectors(&heads.value));
        let decay = vectors(&heads.decay);
        let strength = heads.strength.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
        let one = |h: usize| {
            let token = |t: usize| Token {
                query: query[h][t].clone(),
                key: key[h][t].clone(),
                value: value[h][t].clone(),
                decay: decay[h][t].iter().map(|decay| decay.exp()).collect(),
                strength: strength[h][t],
            };
            recurrence((0..value[h].len()).map(token))
        };
        let out: Vec<f64> = (0..value.len()).flat_map(one).collect();
        Tensor::from_vec(out, heads.value.shape(), &Device::Cpu).unwrap()
    }

    #[test]
    fn channel_decays_equal_the_definition_in_both_forms() {
        for positions in [1, 3, 15, 16, 17, 50, 130] {
            for strongest in [0.0, 0.02, 1.0, 30.0, 2000.0] {
                let heads = heads(positions, strongest);
                let want = naive(&heads);
                close(&token_by_token(&heads).unwrap(), &want, 1e-5);
                close(&batched::delta_rule(&heads).unwrap(), &want, 1e-5);
            }
        }
    }

    #[test]
    fn equal_channel_decays_equal_a_head_decay() {
        let each = heads(70, 0.5);
        let of_head = each.decay.narrow(2, 0, 1).unwrap();
        let alike = Heads { decay: of_head.broadcast_as((3, 70, 10)).unwrap().contiguous().unwrap(), ..each.clone() };
        let by_head = Heads { decay: of_head.squeeze(2).unwrap(), ..each };
        close(&alike.delta_rule().unwrap(), &by_head.delta_rule().unwrap(), 1e-5);
    }
}
