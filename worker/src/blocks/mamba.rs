//! Mamba-2 (Dao and Gu 2024, arXiv 2405.21060) in the form of Nemotron-H. A short convolution
//! mixes neighbouring tokens. Each head then writes to and reads from its state, a matrix.
//!
//! Per head, the state `S` `[state, head_dim]` is zero before a sequence. Each token has a step
//! `d`, a decay `a = exp(-exp(A_log) d)`, a write `b`, a read `c` and a value `x`:
//!
//! ```text
//! S <- a S + d b x^T      out = S^T c + D x
//! ```
//!
//! Over a chunk of tokens this is attention without a softmax, weighted by the remaining decay of
//! each write, plus the remaining previous state. A CPU computes that. On a GPU one kernel goes
//! through the tokens of all heads ([`Recurrence`]).

use candle_core::{DType, Result, Tensor};

use crate::blocks::delta_net::{Convolution, softplus};
use crate::kernels::fused::{self, Gate, has_loops};
use crate::kernels::product::Linear;
use crate::kernels::recurrence::Recurrence;
use crate::model::decoder::MambaSpec;

/// Tokens per chunk.
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
    /// Gain of the norm, `[heads * head_dim]`.
    pub gain: Tensor,
    /// `[hidden, heads * head_dim]` (`out_proj`).
    pub output: Linear,
}

/// Mamba of `x` `[sequences * positions, hidden]` (whole sequences), with an output of the same
/// shape, before the residual addition. Between the projections all values are f32.
///
/// # Errors
/// Errors of the tensor library.
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

/// Convolution and SiLU of `x` `[rows, values | writes | reads]`, per head or group: values
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

/// Results of the heads, `[rows, heads * head_dim]`, from the [`convolved`] values and `step`
/// `[rows, heads]`.
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
    let rate = weights.decay.to_dtype(DType::F32)?.exp()?.neg()?;
    let decay = by_head(&step.broadcast_mul(&rate)?, heads, 1)?;
    let read = {
        let written = values.broadcast_mul(&by_head(step, heads, 1)?)?;
        if has_loops(values) {
            let of_groups = |t: &Tensor| {
                let shape = (sequences * groups, heads / groups, positions, state);
                t.unsqueeze(1)?.expand(shape)?.reshape((sequences * heads, positions, state))
            };
            in_chunks(&of_groups(reads)?, &of_groups(writes)?, &written, &decay)?
        } else {
            Recurrence { decay: &decay.exp()?, strength: None }.apply(reads, writes, &written)?
        }
    };
    let by_token = |t: &Tensor| {
        let t = t.reshape((sequences, heads, positions, head_dim))?.transpose(1, 2)?.contiguous()?;
        t.reshape((rows, heads, head_dim))
    };
    let skip = weights.skip.to_dtype(DType::F32)?.reshape((1, heads, 1))?;
    (by_token(&read)? + by_token(values)?.broadcast_mul(&skip)?)?.reshape((rows, inner))
}

/// Tokens of heads that are computed together, which a CPU's cache holds. A head that has more is
/// computed alone.
const TOGETHER: usize = 1 << 13;

/// Heads that are computed together.
fn heads_at_once(heads: usize, positions: usize) -> usize {
    (TOGETHER / positions.max(1)).clamp(1, heads.max(1))
}

/// Bytes that the recurrence of a micro-batch takes beside what is projected, over so many
/// sequences of so many positions; `in_place`: on a CPU, which repeats writes and reads for each
/// head.
pub fn recurrence_bytes(spec: &MambaSpec, sequences: usize, positions: usize, in_place: bool) -> usize {
    let MambaSpec { heads, head_dim, state, .. } = *spec;
    if !in_place {
        // Decays and their logarithms.
        return sequences * positions * heads * 2 * size_of::<f32>();
    }
    let n = CHUNK.min(positions.max(1));
    let tokens = heads_at_once(sequences * heads, positions) * positions.next_multiple_of(n);
    // Of a token of a head: a chunk that is filled up, weights between tokens, in f64 and twice
    // before they are f32, and what is read by them and of states.
    let values = (2 * state + head_dim) + 6 * n + 5 * head_dim;
    // What is added to states, and these, twice while they are joined.
    let states = tokens / n * 3 * state * head_dim;
    (tokens * values + states) * size_of::<f32>()
}

/// `reads` and `writes` `[heads, positions, state]`, `written` `[heads, positions, head_dim]`,
/// logarithms of decays `[heads, positions, 1]`: what is read, as `written`.
fn in_chunks(reads: &Tensor, writes: &Tensor, written: &Tensor, decay: &Tensor) -> Result<Tensor> {
    let (heads, positions, _) = written.dims3()?;
    by_heads([reads, writes, written, decay], heads_at_once(heads, positions))
}

/// As many heads at once.
fn by_heads(of: [&Tensor; 4], most: usize) -> Result<Tensor> {
    let heads = of[0].dim(0)?;
    let part = |first: usize| {
        let [reads, writes, written, decay] = of.map(|t| t.narrow(0, first, most.min(heads - first)));
        at_once(&reads?, &writes?, &written?, &decay?)
    };
    Tensor::cat(&(0..heads).step_by(most).map(part).collect::<Result<Vec<_>>>()?, 0)
}

/// What does not depend on the state is computed for all chunks at once; the state passes from
/// chunk to chunk, in all heads together.
fn at_once(reads: &Tensor, writes: &Tensor, written: &Tensor, decay: &Tensor) -> Result<Tensor> {
    let ((heads, positions, width), rows) = (written.dims3()?, writes.dim(2)?);
    let n = CHUNK.min(positions);
    let (chunks, device) = (positions.div_ceil(n), written.device());
    // The last chunk is filled up with tokens that write nothing and keep the state.
    let by_chunk = |t: &Tensor| t.pad_with_zeros(1, 0, chunks * n - positions)?.reshape((heads * chunks, n, ()));
    let (reads, writes, written) = (by_chunk(reads)?, by_chunk(writes)?, by_chunk(written)?);
    // Differences of running sums, in f64 so that strong decays do not hide weak ones.
    let log = by_chunk(decay)?.squeeze(2)?.to_dtype(DType::F64)?.cumsum(1)?;
    let between = {
        let between = log.unsqueeze(2)?.broadcast_sub(&log.unsqueeze(1)?)?;
        let lower = Tensor::tril2(n, DType::F32, device)?;
        between.minimum(0.0)?.to_dtype(DType::F32)?.exp()?.broadcast_mul(&lower)?
    };
    let before = log.to_dtype(DType::F32)?.exp()?.unsqueeze(2)?;
    let left = between.narrow(1, n - 1, 1)?.reshape((heads * chunks, n, 1))?;
    let added = writes.transpose(1, 2)?.matmul(&written.broadcast_mul(&left)?)?;
    let added = added.reshape((heads, chunks, rows, width))?;
    let kept = before.narrow(1, n - 1, 1)?.reshape((heads, chunks, 1, 1))?;

    // Before each chunk.
    let mut states = vec![Tensor::zeros((heads, 1, rows, width), DType::F32, device)?];
    for chunk in 1..chunks {
        let of = |t: &Tensor| t.narrow(1, chunk - 1, 1);
        states.push((states[chunk - 1].broadcast_mul(&of(&kept)?)? + of(&added)?)?);
    }
    drop(added);
    let states = Tensor::cat(&states, 1)?.reshape((heads * chunks, rows, width))?;
    let scores = (reads.matmul(&writes.transpose(1, 2)?)? * between)?;
    let out = (scores.matmul(&written)? + reads.matmul(&states)?.broadcast_mul(&before)?)?;
    out.reshape((heads, chunks * n, width))?.narrow(1, 0, positions)
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
    fn both_forms_equal_the_definition_at_weak_and_strong_decay() {
        for positions in [1, 2, 63, 64, 65, 130] {
            for strongest in [0.0, 0.1, 3.0, 500.0] {
                let mut random = Random::new(positions as u64);
                let mut tensor = |width: usize| random.tensor(&[3, positions, width]);
                let (reads, writes, written) = (tensor(5), tensor(5), tensor(4));
                let decay = (tensor(1).abs().unwrap() * -strongest).unwrap();
                let got = in_chunks(&reads, &writes, &written, &decay).unwrap();
                let want = naive(&reads, &writes, &written, &decay);
                assert_close(&got.reshape((3 * positions, 4)).unwrap(), &want, 2e-5);
                let rule = Recurrence { decay: &decay.exp().unwrap(), strength: None };
                let got = rule.apply(&reads, &writes, &written).unwrap();
                assert_close(&got.reshape((3 * positions, 4)).unwrap(), &want, 2e-5);
            }
        }
    }

    #[test]
    fn heads_computed_together_change_no_bit() {
        let bits = |t: Tensor| -> Vec<u32> {
            t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
        };
        for positions in [1, 63, 64, 130] {
            let mut random = Random::new(positions as u64);
            let mut tensor = |width: usize| random.tensor(&[5, positions, width]);
            let (reads, writes, written) = (tensor(5), tensor(5), tensor(4));
            let decay = (tensor(1).abs().unwrap() * -0.2).unwrap();
            let by = |most| bits(by_heads([&reads, &writes, &written, &decay], most).unwrap());
            assert_eq!((by(1), by(2)), (by(5), by(5)), "{positions} positions");
        }
    }

    #[test]
    fn memory_of_chunks_is_bounded_whatever_the_number_of_sequences() {
        let spec = MambaSpec {
            heads: 128,
            head_dim: 64,
            groups: 8,
            state: 128,
            kernel: 4,
            convolution_bias: true,
            shortest_step: 0.0,
            norm: crate::model::decoder::NormSpec::rms(1e-5),
        };
        // By hand, of each token of a head: 1024 numbers, and 3 of each of a state's in 64 tokens.
        let of_token = (1024 + 3 * 128 * 64 / 64) * 4;
        let of = |sequences| recurrence_bytes(&spec, sequences, 1024, true);
        assert_eq!((of(1), of(999)), (8 * 1024 * of_token, 8 * 1024 * of_token), "what a CPU's cache holds");
        assert_eq!(recurrence_bytes(&spec, 3, 1024, false), 3 * 1024 * 128 * 2 * 4, "on a GPU");
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
