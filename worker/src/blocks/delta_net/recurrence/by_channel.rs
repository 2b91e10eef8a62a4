//! The delta rule where each row of the state has a decay of its own.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use super::{Heads, Triangle, cut};
use crate::kernels::fused::has_loops;

/// Tokens whose writes are solved for together on a GPU. The decays between each two of them, for
/// each channel, are held at once.
const CHUNK: usize = 16;

/// What the queries read, `[heads, positions, value_dim]`.
pub(super) fn delta_rule(heads: &Heads) -> Result<Tensor> {
    if has_loops(&heads.value) { token_by_token(heads) } else { in_chunks(heads) }
}

/// By its definition: on a CPU the state of a head stays in the cache.
fn token_by_token(heads: &Heads) -> Result<Tensor> {
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

/// The same in operations on tensors, all heads together.
fn in_chunks(heads: &Heads) -> Result<Tensor> {
    let ((count, positions, width), key_dim) = (heads.value.dims3()?, heads.key.dim(2)?);
    let triangle = Triangle::new(heads.value.device())?;
    let mut state = Tensor::zeros((count, key_dim, width), DType::F32, heads.value.device())?;
    let mut out = Vec::with_capacity(positions.div_ceil(CHUNK));
    for first in (0..positions).step_by(CHUNK) {
        let n = CHUNK.min(positions - first);
        let part = |t: &Tensor| t.narrow(1, first, n)?.contiguous();
        let (query, key, strength) = (part(&heads.query)?, part(&heads.key)?, part(&heads.strength)?.unsqueeze(2)?);
        // Differences of running sums, in f64 so that strong decays do not hide weak ones.
        let log = part(&heads.decay)?.to_dtype(DType::F64)?.cumsum(1)?.contiguous()?;
        let between = log.unsqueeze(2)?.broadcast_sub(&log.unsqueeze(1)?)?.minimum(0.0)?.to_dtype(DType::F32)?.exp()?;
        let before = log.to_dtype(DType::F32)?.exp()?;
        // What is left at token i of the key of token j, `[heads * i, j, key_dim]`.
        let keys_left = between.broadcast_mul(&key.unsqueeze(1)?)?.reshape((count * n, n, key_dim))?;
        let scores = |of: &Tensor| keys_left.matmul(&of.reshape((count * n, key_dim, 1))?)?.reshape((count, n, n));
        let answers = |to: &Tensor| (to * &before)?.matmul(&state);
        let wanted = (part(&heads.value)? - answers(&key)?)?.broadcast_mul(&strength)?;
        let writes = triangle.inverse(&scores(&key)?.broadcast_mul(&strength)?, n)?.matmul(&wanted)?;
        let to_queries = scores(&query)?.broadcast_mul(&cut(&triangle.lower, n)?)?;
        out.push((answers(&query)? + to_queries.matmul(&writes)?)?);
        let last = between.narrow(1, n - 1, 1)?.squeeze(1)?;
        let written = (key * last)?.transpose(1, 2)?.matmul(&writes)?;
        let left = before.narrow(1, n - 1, 1)?.transpose(1, 2)?;
        state = (state.broadcast_mul(&left)? + written)?;
    }
    Tensor::cat(&out, 1)
}

#[cfg(test)]
mod tests {
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
                close(&delta_rule(&heads).unwrap(), &want, 1e-5);
                close(&in_chunks(&heads).unwrap(), &want, 1e-5);
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
