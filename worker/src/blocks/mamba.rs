//! Mamba-2 (Dao and Gu 2024, arXiv 2405.21060) as Nemotron-H has it: a short convolution mixes
//! neighbouring tokens, then each head writes to and reads from a matrix of its own, its state.
//!
//! Per head, with state `S` `[state, head_dim]`, zero before a sequence, and per token a step `d`,
//! a decay `a = exp(-exp(A_log) d)`, a write `b`, a read `c` and a value `x`:
//!
//! ```text
//! S <- a S + d b x^T      out = S^T c + D x
//! ```
//!
//! Over a chunk of tokens that is attention without a softmax, weighted by what is left of each
//! write, and what is left of the state before.

use candle_core::{DType, Result, Tensor};

use crate::blocks::delta_net::{Convolution, softplus};
use crate::kernels::fused::{self, Gate};
use crate::kernels::product::Linear;
use crate::model::decoder::MambaSpec;

/// Tokens that are computed together.
const CHUNK: usize = 64;

/// A Mamba's tensors on one device. Names of the published tensors in brackets.
pub struct MambaWeights {
    /// Rows [gates | values | writes | reads | steps] (`in_proj`).
    pub input: Linear,
    /// `[channels, 1, kernel]` (`conv1d`).
    pub convolution: Tensor,
    /// `[channels]`.
    pub bias: Option<Tensor>,
    /// `[heads]` (`A_log`).
    pub decay: Tensor,
    /// `[heads]` (`dt_bias`).
    pub step_bias: Tensor,
    /// `[heads]` (`D`).
    pub skip: Tensor,
    /// Of the norm, `[heads * head_dim]`.
    pub gain: Tensor,
    /// `[hidden, heads * head_dim]` (`out_proj`).
    pub output: Linear,
}

/// `x` `[sequences * positions, hidden]` (whole sequences, one after another) to the same shape,
/// before the residual addition. Between the projections everything is f32.
///
/// # Errors
/// The tensor library's.
pub fn mamba(spec: &MambaSpec, weights: &MambaWeights, x: &Tensor, positions: usize) -> Result<Tensor> {
    let (rows, inner, channels) = (x.dim(0)?, spec.inner(), spec.channels());
    let projected = weights.input.apply(x)?;
    let part = |first, width| projected.narrow(1, first, width)?.to_dtype(DType::F32)?.contiguous();
    let mixed = convolved(spec, weights, &projected.narrow(1, inner, channels)?, positions)?;
    let step = part(inner + channels, spec.heads)?.broadcast_add(&weights.step_bias.to_dtype(DType::F32)?)?;
    let step = softplus(&step)?.maximum(spec.shortest_step)?;
    let read = scan(spec, weights, &mixed, &step, positions)?;
    let gated = fused::gated(part(0, inner)?, &read, Gate::Silu)?;
    let width = inner / spec.groups;
    let ones = Tensor::ones(width, DType::F32, x.device())?;
    let normed = fused::rms_norm(&gated.reshape((rows * spec.groups, width))?, &ones, spec.norm.eps)?;
    let normed = normed.reshape((rows, inner))?.broadcast_mul(&weights.gain.to_dtype(DType::F32)?)?;
    weights.output.apply(&normed.to_dtype(x.dtype())?)
}

/// The convolution and SiLU of `x` `[rows, values | writes | reads]`, of each head or group: values
/// `[sequences * heads, positions, head_dim]`, writes and reads `[sequences * groups, positions,
/// state]`, all f32.
fn convolved(spec: &MambaSpec, weights: &MambaWeights, x: &Tensor, positions: usize) -> Result<[Tensor; 3]> {
    let MambaSpec { heads, head_dim, groups, state, .. } = *spec;
    let taps = weights.convolution.to_dtype(DType::F32)?.squeeze(1)?.contiguous()?;
    let bias = weights.bias.as_ref().map(|bias| bias.to_dtype(DType::F32)).transpose()?;
    let part = |heads: usize, width: usize, first_channel: usize| {
        let x = x.narrow(1, first_channel, heads * width)?.contiguous()?;
        Convolution { heads, positions, first_channel, length: None, bias: bias.as_ref() }.apply(&x, &taps)
    };
    let writes = spec.inner();
    Ok([part(heads, head_dim, 0)?, part(groups, state, writes)?, part(groups, state, writes + groups * state)?])
}

/// What the heads read, `[rows, heads * head_dim]`: of what was [`convolved`] and of `step` `[rows,
/// heads]`.
fn scan(
    spec: &MambaSpec,
    weights: &MambaWeights,
    [values, writes, reads]: &[Tensor; 3],
    step: &Tensor,
    positions: usize,
) -> Result<Tensor> {
    let MambaSpec { heads, head_dim, groups, state, .. } = *spec;
    let (rows, inner) = (step.dim(0)?, spec.inner());
    let sequences = rows / positions;
    // `[sequences * count, positions, width]`.
    let by_head = |t: &Tensor, count: usize, width: usize| {
        let t = t.reshape((sequences, positions, count, width))?.transpose(1, 2)?.contiguous()?;
        t.reshape((sequences * count, positions, width))
    };
    let of_groups = |t: &Tensor| {
        let shape = (sequences * groups, heads / groups, positions, state);
        t.unsqueeze(1)?.expand(shape)?.reshape((sequences * heads, positions, state))
    };
    let (writes, reads) = (of_groups(writes)?, of_groups(reads)?);
    let rate = weights.decay.to_dtype(DType::F32)?.exp()?.neg()?;
    let decay = by_head(&step.broadcast_mul(&rate)?, heads, 1)?;
    let written = values.broadcast_mul(&by_head(step, heads, 1)?)?;
    let read = in_chunks(&reads, &writes, &written, &decay)?;
    let by_token = |t: &Tensor| {
        let t = t.reshape((sequences, heads, positions, head_dim))?.transpose(1, 2)?.contiguous()?;
        t.reshape((rows, heads, head_dim))
    };
    let skip = weights.skip.to_dtype(DType::F32)?.reshape((1, heads, 1))?;
    (by_token(&read)? + by_token(values)?.broadcast_mul(&skip)?)?.reshape((rows, inner))
}

/// `reads` and `writes` `[heads, positions, state]`, `written` `[heads, positions, head_dim]`,
/// logarithms of decays `[heads, positions, 1]`: what is read, as `written`.
fn in_chunks(reads: &Tensor, writes: &Tensor, written: &Tensor, decay: &Tensor) -> Result<Tensor> {
    let ((heads, positions, width), rows) = (written.dims3()?, writes.dim(2)?);
    let mut state = Tensor::zeros((heads, rows, width), DType::F32, written.device())?;
    let mut out = Vec::with_capacity(positions.div_ceil(CHUNK));
    for first in (0..positions).step_by(CHUNK) {
        let n = CHUNK.min(positions - first);
        let part = |t: &Tensor| t.narrow(1, first, n)?.contiguous();
        let (reads, writes, written) = (part(reads)?, part(writes)?, part(written)?);
        // Differences of running sums, in f64 so that strong decays do not hide weak ones.
        let log = part(decay)?.squeeze(2)?.to_dtype(DType::F64)?.cumsum(1)?;
        let between = log.unsqueeze(2)?.broadcast_sub(&log.unsqueeze(1)?)?.minimum(0.0)?.to_dtype(DType::F32)?.exp()?;
        let lower = Tensor::tril2(n, DType::F32, written.device())?;
        let before = log.to_dtype(DType::F32)?.exp()?.unsqueeze(2)?;
        let scores = (reads.matmul(&writes.transpose(1, 2)?)? * &between)?.broadcast_mul(&lower)?;
        out.push((scores.matmul(&written)? + reads.matmul(&state)?.broadcast_mul(&before)?)?);
        let left = between.narrow(1, n - 1, 1)?.reshape((heads, n, 1))?;
        let added = writes.transpose(1, 2)?.matmul(&written.broadcast_mul(&left)?)?;
        state = (state.broadcast_mul(&before.narrow(1, n - 1, 1)?)? + added)?;
    }
    Tensor::cat(&out, 1)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::blocks::attention::naive::{Random, assert_close};

    /// The definition, token by token.
    fn naive(reads: &Tensor, writes: &Tensor, written: &Tensor, decay: &Tensor) -> Vec<Vec<f64>> {
        let vectors = |t: &Tensor| t.to_dtype(DType::F64).unwrap().to_vec3::<f64>().unwrap();
        let (reads, writes, written, decay) = (vectors(reads), vectors(writes), vectors(written), vectors(decay));
        let of_head = |head: usize| {
            let mut state = vec![vec![0.0; written[head][0].len()]; writes[head][0].len()];
            let token = |t: usize| {
                for (row, b) in state.iter_mut().zip(&writes[head][t]) {
                    let left = decay[head][t][0].exp();
                    row.iter_mut().zip(&written[head][t]).for_each(|(s, x)| *s = left * *s + b * x);
                }
                let read =
                    |column: usize| -> f64 { state.iter().zip(&reads[head][t]).map(|(row, c)| row[column] * c).sum() };
                (0..written[head][t].len()).map(read).collect::<Vec<f64>>()
            };
            (0..written[head].len()).map(token).collect::<Vec<_>>()
        };
        (0..written.len()).flat_map(of_head).collect()
    }

    #[test]
    fn chunks_equal_the_recurrence_at_weak_and_strong_decay() {
        for positions in [1, 2, 63, 64, 65, 130] {
            for strongest in [0.0, 0.1, 3.0, 500.0] {
                let mut random = Random::new(positions as u64);
                let mut tensor = |width: usize| random.tensor(&[3, positions, width]);
                let (reads, writes, written) = (tensor(5), tensor(5), tensor(4));
                let decay = (tensor(1).abs().unwrap() * -strongest).unwrap();
                let got = in_chunks(&reads, &writes, &written, &decay).unwrap();
                let want = naive(&reads, &writes, &written, &decay);
                assert_close(&got.reshape((3 * positions, 4)).unwrap(), &want, 2e-5);
            }
        }
    }

    #[test]
    fn convolution_has_a_bias_and_its_last_tap_on_the_current_token() {
        let spec = MambaSpec {
            heads: 1,
            head_dim: 1,
            groups: 1,
            state: 1,
            kernel: 2,
            convolution_bias: true,
            shortest_step: 0.0,
            norm: crate::model::decoder::NormSpec::rms(1e-5),
        };
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
        let linear = || Linear::new(tensor(&[0.0]), None);
        let weights = MambaWeights {
            input: linear(),
            convolution: tensor(&[10.0, 1.0, 100.0, 1.0, 1000.0, 1.0]).reshape((3, 1, 2)).unwrap(),
            bias: Some(tensor(&[0.5, 0.0, 0.25])),
            decay: tensor(&[0.0]),
            step_bias: tensor(&[0.0]),
            skip: tensor(&[0.0]),
            gain: tensor(&[1.0]),
            output: linear(),
        };
        // Values, writes and reads of two sequences of two tokens.
        let x = tensor(&[1.0, 2.0, 3.0, 4.0]).reshape((4, 1)).unwrap().repeat((1, 3)).unwrap();
        let silu = |v: f64| vec![v / (1.0 + (-v).exp())];
        let want = [[1.5, 12.5, 3.5, 34.5], [1.0, 102.0, 3.0, 304.0], [1.25, 1002.25, 3.25, 3004.25]];
        for (got, want) in convolved(&spec, &weights, &x, 2).unwrap().iter().zip(want) {
            assert_eq!(got.dims(), [2, 2, 1]);
            assert_close(&got.reshape((4, 1)).unwrap(), &want.map(silu).to_vec(), 1e-6);
        }
    }
}
