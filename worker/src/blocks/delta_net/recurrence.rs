//! The gated delta rule.
//!
//! Per value head, the state `S` `[key_dim, value_dim]` is zero before a sequence. Each token has
//! a decay `a`, a write strength `b`, a unit key `k`, a value `v` and a query `q`:
//!
//! ```text
//! S <- a S      u = b (v - S^T k)      S <- S + k u^T      out = S^T q
//! ```
//!
//! Token by token this is a chain of products with one vector. On a GPU one kernel computes it, for
//! all heads at the same time ([`Recurrence`]). On a CPU a chunk of tokens at a time is faster. For
//! a chunk, let `S` be the state before it and `d(i, j) = a_(j+1) ... a_i` the factor that remains
//! at token i of token j's write (`d(i)`: of `S`). Then
//!
//! ```text
//! u_i   = b_i (v_i - d(i) S^T k_i - sum over j < i of d(i, j) (k_j . k_i) u_j)
//! out_i = d(i) S^T q_i + sum over j <= i of d(i, j) (k_j . q_i) u_j
//! S     <- d(n) S + sum over j of d(n, j) k_j u_j^T
//! ```
//!
//! Products with `S`, and of keys and queries with keys, are matrix products. What remains is a
//! system with a unit lower triangular matrix (the WY representation of Yang et al. 2024, arXiv
//! 2406.06484), solved for all writes at once.
//!
//! If each row of `S` has a separate decay (Kimi Delta Attention, arXiv 2510.26692), a is a
//! vector. Products of keys and queries with keys would be weighted per channel, so a CPU computes
//! token by token, too.

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use crate::kernels::fused::has_loops;
use crate::kernels::recurrence::Recurrence;

/// Tokens whose writes are solved for together.
const CHUNK: usize = 64;

/// Columns summed in registers. Rows of the solver are padded to a multiple.
const LANES: usize = 16;

/// Inputs of the recurrence, all f32 and contiguous, per head of each sequence.
#[derive(Clone)]
pub(super) struct Heads {
    /// Shape `[key heads, positions, key_dim]`. Each key head serves the same number of adjacent
    /// value heads.
    pub(super) query: Tensor,
    /// `[key heads, positions, key_dim]`.
    pub(super) key: Tensor,
    /// `[value heads, positions, value_dim]`.
    pub(super) value: Tensor,
    /// Logarithms of the decays, <= 0: `[value heads, positions]`, or `[value heads, positions,
    /// key_dim]` if each row of the state has a separate one. Then each value head has its own key
    /// head.
    pub(super) decay: Tensor,
    /// Write strengths `[value heads, positions]`.
    pub(super) strength: Tensor,
}

impl Heads {
    /// Results of the queries, `[value heads, positions, value_dim]`.
    pub(super) fn delta_rule(&self) -> Result<Tensor> {
        if self.decay.rank() == 3 || !has_loops(&self.value) {
            return self.token_by_token();
        }
        // The products of one head are too small to be shared among many cores, but heads are
        // independent.
        let heads = (0..self.value.dim(0)?).into_par_iter().map(|head| self.of(head)?.scan());
        Tensor::cat(&heads.collect::<Result<Vec<_>>>()?, 0)
    }

    /// By the definition.
    fn token_by_token(&self) -> Result<Tensor> {
        let decay = self.decay.exp()?;
        let rule = Recurrence { decay: &decay, strength: Some(&self.strength) };
        rule.apply(&self.query, &self.key, &self.value)
    }

    /// Value heads per key head.
    fn served(&self) -> Result<usize> {
        Ok(self.value.dim(0)? / self.key.dim(0)?)
    }

    /// One value head with its key head.
    fn of(&self, head: usize) -> Result<Self> {
        let key_head = head / self.served()?;
        Ok(Self {
            query: self.query.narrow(0, key_head, 1)?,
            key: self.key.narrow(0, key_head, 1)?,
            value: self.value.narrow(0, head, 1)?,
            decay: self.decay.narrow(0, head, 1)?,
            strength: self.strength.narrow(0, head, 1)?,
        })
    }

    /// Runs through a head on a CPU.
    fn scan(&self) -> Result<Tensor> {
        let ((heads, positions, value_dim), key_dim) = (self.value.dims3()?, self.key.dim(2)?);
        let mut state = Tensor::zeros((heads, key_dim, value_dim), DType::F32, self.value.device())?;
        let mut out = Vec::with_capacity(positions.div_ceil(CHUNK));
        for first in (0..positions).step_by(CHUNK) {
            let chunk = self.chunk(first, CHUNK.min(positions - first), &state)?;
            let solved = solve(&chunk)?;
            // A product with one number is much faster than one with a broadcast tensor.
            let left = state.affine(f64::from(solved.left), 0.0)?;
            state = (left + chunk.key.transpose(1, 2)?.matmul(&solved.writes)?)?;
            out.push(solved.out);
        }
        Tensor::cat(&out, 1)
    }

    fn chunk(&self, first: usize, count: usize, state: &Tensor) -> Result<Chunk> {
        let part = |t: &Tensor| t.narrow(1, first, count)?.contiguous();
        let key = part(&self.key)?;
        let rows = Tensor::cat(&[&key, &part(&self.query)?], 1)?;
        Ok(Chunk {
            scores: rows.matmul(&key.transpose(1, 2)?)?,
            answers: rows.matmul(state)?,
            key,
            value: part(&self.value)?,
            decay: part(&self.decay)?,
            strength: part(&self.strength)?,
        })
    }
}

/// n tokens of a head, and the products they need. `heads` is 1.
struct Chunk {
    /// `[heads, n, key_dim]`.
    key: Tensor,
    /// `[heads, n, value_dim]`.
    value: Tensor,
    /// `[heads, n]`.
    decay: Tensor,
    /// `[heads, n]`.
    strength: Tensor,
    /// Products of keys, then queries, with keys: `[heads, 2 n, n]`.
    scores: Tensor,
    /// Products of keys, then queries, with the state: `[heads, 2 n, value_dim]`.
    answers: Tensor,
}

/// Result of a chunk.
struct Solved {
    /// Results of its queries, `[heads, n, value_dim]`.
    out: Tensor,
    /// Writes as they remain at its end, `[heads, n, value_dim]`.
    writes: Tensor,
    /// What is left of the state before.
    left: f32,
}

/// Solves a chunk of one head on a CPU by forward substitution. Decays between two tokens are
/// exponentials of sums, not quotients: after a strong decay, differences of running sums would
/// lose weak ones.
fn solve(chunk: &Chunk) -> Result<Solved> {
    let (_, n, width) = chunk.value.dims3()?;
    let host = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
    let (value, answers, scores) = (host(&chunk.value)?, host(&chunk.answers)?, host(&chunk.scores)?);
    let (decay, strength) = (host(&chunk.decay)?, host(&chunk.strength)?);
    let stride = width.next_multiple_of(LANES);
    let (mut writes, mut out) = (vec![0.0; n * stride], vec![0.0; n * stride]);
    // Logarithms of the remaining factors of each write and of the state before the chunk.
    let (mut left, mut left_before) = (vec![0_f32; n], 0_f32);
    let (mut to_key, mut to_query) = (vec![0_f32; n], vec![0_f32; n]);
    for i in 0..n {
        left_before += decay[i];
        left[..i].iter_mut().for_each(|left| *left += decay[i]);
        for (j, left) in left[..=i].iter().map(|left| left.exp()).enumerate() {
            to_key[j] = -strength[i] * left * scores[i * n + j];
            to_query[j] = left * scores[(n + i) * n + j];
        }
        let before = left_before.exp();
        let (earlier, write) = writes[..(i + 1) * stride].split_at_mut(i * stride);
        let read = &mut out[i * stride..][..stride];
        for c in 0..width {
            write[c] = strength[i] * (value[i * width + c] - before * answers[i * width + c]);
            read[c] = before * answers[(n + i) * width + c];
        }
        add_rows(earlier, &to_key, write);
        add_rows(&writes[..(i + 1) * stride], &to_query, read);
    }
    for (write, left) in writes.chunks_exact_mut(stride).zip(&left) {
        let left = left.exp();
        write.iter_mut().for_each(|v| *v *= left);
    }
    let rows = |data, height| Tensor::from_vec(data, (1, height, stride), &Device::Cpu)?.narrow(2, 0, width);
    Ok(Solved { out: rows(out, n)?, writes: rows(writes, n)?, left: left_before.exp() })
}

/// `sum += factors[j] * rows[j]` over all rows. The width of `sum` is a multiple of [`LANES`].
fn add_rows(rows: &[f32], factors: &[f32], sum: &mut [f32]) {
    let stride = sum.len();
    for (tile, sum) in sum.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let mut lanes = *sum;
        for (row, factor) in rows.chunks_exact(stride).zip(factors) {
            let row = row[tile * LANES..].first_chunk::<LANES>().expect("rows are whole tiles");
            for (lane, v) in lanes.iter_mut().zip(row) {
                *lane += factor * v;
            }
        }
        *sum = lanes;
    }
}

#[cfg(test)]
mod tests {
    use candle_core::D;

    use super::*;
    use crate::blocks::delta_net::tests::{Token, close, recurrence, values};

    fn unit(t: Tensor) -> Tensor {
        t.broadcast_div(&t.sqr().unwrap().sum_keepdim(D::Minus1).unwrap().sqrt().unwrap()).unwrap()
    }

    /// 4 value heads on 2 key heads; decays down to `exp(-strongest)`.
    fn heads(positions: usize, strongest: f64) -> Heads {
        let (query, key) = (values(&[2, positions, 10], 2.0, 1), values(&[2, positions, 10], 2.0, 2));
        let uniform = |seed| (values(&[4, positions], 1.0, seed) + 0.5).unwrap();
        Heads {
            query: unit(query),
            key: unit(key),
            value: values(&[4, positions, 7], 2.0, 3),
            decay: (uniform(4) * -strongest).unwrap(),
            strength: uniform(5),
        }
    }

    /// The definition in f64.
    fn naive(heads: &Heads) -> Tensor {
        let vectors = |t: &Tensor| t.to_dtype(DType::F64).unwrap().to_vec3::<f64>().unwrap();
        let numbers = |t: &Tensor| t.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
        let (query, key, value) = (vectors(&heads.query), vectors(&heads.key), vectors(&heads.value));
        let of_channels = match heads.decay.rank() {
            3 => heads.decay.clone(),
            _ => heads.decay.unsqueeze(2).unwrap().repeat((1, 1, heads.key.dim(2).unwrap())).unwrap(),
        };
        let (decay, strength) = (vectors(&of_channels), numbers(&heads.strength));
        let served = heads.served().unwrap();
        let one = |h: usize| {
            let token = |t: usize| Token {
                query: query[h / served][t].clone(),
                key: key[h / served][t].clone(),
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
    fn both_forms_equal_the_definition_at_weak_and_strong_decay() {
        for positions in [1, 3, 63, 64, 65, 130, 200] {
            for strongest in [0.0, 0.02, 1.0, 30.0, 2000.0] {
                let heads = heads(positions, strongest);
                let want = naive(&heads);
                close(&heads.delta_rule().unwrap(), &want, 1e-5);
                close(&heads.token_by_token().unwrap(), &want, 1e-5);
            }
        }
    }

    /// One key repeated with full writes: powers of such a system grow like binomials, its inverse
    /// does not.
    #[test]
    fn both_forms_are_stable_on_a_repeated_token() {
        let varied = heads(150, 0.0);
        let key = unit(Tensor::ones((2, 150, 10), DType::F32, &Device::Cpu).unwrap());
        let strength = (Tensor::ones((4, 150), DType::F32, &Device::Cpu).unwrap() * 0.999).unwrap();
        let heads = Heads { key, strength, ..varied };
        let want = naive(&heads);
        close(&heads.delta_rule().unwrap(), &want, 1e-5);
        close(&heads.token_by_token().unwrap(), &want, 1e-5);
    }

    /// Differences of running sums in f32 would lose the weak decays after the strong one.
    #[test]
    fn weak_decay_is_exact_after_a_strong_one() {
        let mut heads = heads(100, 0.0);
        let decay: Vec<f32> = (0..400).map(|at| if at % 100 == 3 { -1e5 } else { -3e-3 }).collect();
        heads.decay = Tensor::from_vec(decay, (4, 100), &Device::Cpu).unwrap();
        let want = naive(&heads);
        close(&heads.delta_rule().unwrap(), &want, 1e-5);
        close(&heads.token_by_token().unwrap(), &want, 1e-5);
    }
    /// 3 heads whose channels decay, down to `exp(-strongest)`.
    fn channels(positions: usize, strongest: f64) -> Heads {
        let uniform = |shape: &[usize], seed| (values(shape, 1.0, seed) + 0.5).unwrap();
        Heads {
            query: (values(&[3, positions, 10], 2.0, 1) * 0.3).unwrap(),
            key: (values(&[3, positions, 10], 2.0, 2) * 0.3).unwrap(),
            value: values(&[3, positions, 7], 2.0, 3),
            decay: (uniform(&[3, positions, 10], 4) * -strongest).unwrap(),
            strength: uniform(&[3, positions], 5),
        }
    }

    #[test]
    fn channel_decays_equal_the_definition() {
        for positions in [1, 3, 15, 16, 17, 50, 130] {
            for strongest in [0.0, 0.02, 1.0, 30.0, 2000.0] {
                let heads = channels(positions, strongest);
                close(&heads.delta_rule().unwrap(), &naive(&heads), 1e-5);
            }
        }
    }

    #[test]
    fn equal_channel_decays_equal_a_head_decay() {
        let each = channels(70, 0.5);
        let of_head = each.decay.narrow(2, 0, 1).unwrap();
        let alike = Heads { decay: of_head.broadcast_as((3, 70, 10)).unwrap().contiguous().unwrap(), ..each.clone() };
        let by_head = Heads { decay: of_head.squeeze(2).unwrap().contiguous().unwrap(), ..each };
        close(&alike.delta_rule().unwrap(), &by_head.delta_rule().unwrap(), 1e-5);
        // The same operations.
        let bits = |t: Tensor| -> Vec<u32> {
            t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
        };
        assert_eq!(bits(alike.token_by_token().unwrap()), bits(by_head.token_by_token().unwrap()));
    }
}
