use candle_core::Device;
use proptest::prelude::*;

use super::*;
use crate::model::decoder::{DeltaStored, NormSpec};

/// Reproducible values, uniform in [-size / 2, size / 2).
pub(super) fn values(shape: &[usize], size: f32, seed: u64) -> Tensor {
    let mut state = seed;
    let data: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * size
        })
        .collect();
    Tensor::from_vec(data, shape, &Device::Cpu).unwrap()
}

fn floats(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Asserts equal shapes, and values within `tolerance` times the root mean square of `want`.
pub(super) fn close(got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), want.dims());
    assert_close(&floats(got), &floats(want), tolerance);
}

fn assert_close(got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    let rms = (want.iter().map(|v| v * v).sum::<f64>() / want.len() as f64).sqrt();
    // A maximum of differences would ignore NaN.
    let near = |a: &f64, b: &f64| (a - b).abs() <= tolerance * rms.max(1e-12);
    let far = got.iter().zip(want).position(|(a, b)| !near(a, b));
    if let Some(at) = far {
        panic!("value {at}: {} instead of {} where the RMS is {rms:e}", got[at], want[at]);
    }
}

/// A block with reproducible weights.
struct Block {
    spec: DeltaNetSpec,
    weights: DeltaNetWeights,
    hidden: usize,
}

impl Block {
    /// `log_decay`: the mean of `A_log`.
    fn new(
        hidden: usize,
        key_heads: usize,
        served: usize,
        [key_dim, value_dim, kernel]: [usize; 3],
        log_decay: f64,
    ) -> Self {
        let value_heads = key_heads * served;
        let norm = NormSpec::rms(1e-6);
        let stored = DeltaStored::ByKeyHead;
        let spec = DeltaNetSpec { key_heads, value_heads, key_dim, value_dim, kernel, stored, norm };
        let linear = |rows: usize, columns: usize, seed| Linear::new(values(&[rows, columns], 1.5, seed), None);
        let (keys, all) = (key_heads * key_dim, value_heads * value_dim);
        let weights = DeltaNetWeights {
            projections: DeltaProjections::ByKeyHead {
                qkvz: linear(2 * keys + 2 * all, hidden, 1),
                ba: linear(2 * value_heads, hidden, 2),
            },
            convolution: values(&[2 * keys + all, 1, kernel], 2.0, 3),
            decay: (values(&[value_heads], 1.0, 4) + log_decay).unwrap(),
            step_bias: values(&[value_heads], 1.0, 5),
            norm: Norm::new(norm, (values(&[value_dim], 1.0, 6) + 1.0).unwrap(), None).unwrap(),
            output: linear(hidden, all, 7),
        };
        Self { spec, weights, hidden }
    }

    fn by_key_head(&self) -> (&Linear, &Linear) {
        let DeltaProjections::ByKeyHead { qkvz, ba } = &self.weights.projections else { panic!() };
        (qkvz, ba)
    }

    /// The same block with its rows grouped by kind.
    fn by_kind(mut self) -> Self {
        let (qkvz, ba) = self.by_key_head();
        let DeltaNetSpec { key_heads, value_heads, key_dim, value_dim, .. } = self.spec;
        let (served, width) = (value_heads / key_heads, value_heads / key_heads * value_dim);
        let rows = |of: &Linear, first: usize, width: usize| {
            let each = of.weight.dim(0).unwrap() / key_heads;
            let parts: Vec<Tensor> =
                (0..key_heads).map(|head| of.weight.narrow(0, head * each + first, width).unwrap()).collect();
            Tensor::cat(&parts, 0).unwrap()
        };
        let qkv = [rows(qkvz, 0, key_dim), rows(qkvz, key_dim, key_dim), rows(qkvz, 2 * key_dim, width)];
        let linear = |weight: Tensor| Linear::new(weight, None);
        let projections = DeltaProjections::ByKind {
            qkv: linear(Tensor::cat(&qkv, 0).unwrap()),
            gates: linear(rows(qkvz, 2 * key_dim + width, width)),
            strengths: linear(rows(ba, 0, served)),
            steps: linear(rows(ba, served, served)),
        };
        self.spec.stored = DeltaStored::ByKind;
        self.weights.projections = projections;
        self
    }

    fn input(&self, sequences: usize, positions: usize) -> Tensor {
        values(&[sequences * positions, self.hidden], 4.0, 8)
    }

    fn run(&self, x: &Tensor, positions: usize) -> Tensor {
        delta_net(&self.spec, &self.weights, x, positions).unwrap()
    }

    /// The definition, token by token in f64, and an upper bound of how much each token's norms
    /// magnify rounding errors. Where a query reads almost nothing, the result is a difference of
    /// much larger numbers, and the norm scales it up.
    fn naive(&self, x: &Tensor, positions: usize) -> (Vec<f64>, Vec<f64>) {
        let width = self.hidden;
        let sequences = floats(x);
        let sequences = sequences.chunks(positions * width).map(|sequence| self.naive_sequence(sequence));
        let (values, magnified): (Vec<Vec<f64>>, Vec<Vec<f64>>) = sequences.unzip();
        (values.concat(), magnified.concat())
    }

    fn naive_sequence(&self, x: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let projected = |linear: &Linear| product(x, &floats(&linear.weight), self.hidden);
        let (qkvz, ba) = self.by_key_head();
        let (qkvz, ba) = (projected(qkvz), projected(ba));
        let rows = x.len() / self.hidden;
        let (heads, magnified): (Vec<Vec<f64>>, Vec<Vec<f64>>) =
            (0..self.spec.value_heads).map(|head| self.naive_head(head, &qkvz, &ba, rows)).unzip();
        let dim = self.spec.value_dim;
        let mixed: Vec<f64> =
            (0..rows).flat_map(|t| heads.iter().flat_map(move |head| head[t * dim..][..dim].to_vec())).collect();
        let values = product(&mixed, &floats(&self.weights.output.weight), heads.len() * dim);
        (values, (0..rows).map(|t| magnified.iter().map(|head| head[t]).fold(1.0, f64::max)).collect())
    }

    /// One value head of one sequence, `[rows, value_dim]`, ready for the output projection, with
    /// the magnification by its norm.
    fn naive_head(&self, head: usize, qkvz: &[f64], ba: &[f64], rows: usize) -> (Vec<f64>, Vec<f64>) {
        let DeltaNetSpec { key_heads, value_heads, key_dim, value_dim, kernel, .. } = self.spec;
        let served = value_heads / key_heads;
        let (key_head, member) = (head / served, head % served);
        let group = 2 * key_dim + 2 * served * value_dim;
        let at = |t: usize, column: usize| qkvz[(t * key_heads + key_head) * group + column];
        let taps = floats(&self.weights.convolution);
        let convolved = |t: usize, column: usize, channel: usize| {
            let tap = |back: usize| taps[channel * kernel + kernel - 1 - back] * at(t - back, column);
            silu((0..kernel.min(t + 1)).map(tap).sum())
        };
        let vector = |t, first, channel, width| (0..width).map(|i| convolved(t, first + i, channel + i)).collect();
        let unit = |v: Vec<f64>| {
            let norm = (v.iter().map(|v| v * v).sum::<f64>() + 1e-6).sqrt();
            v.iter().map(|v| v / norm).collect::<Vec<f64>>()
        };
        let (keys, own) = (key_heads * key_dim, key_head * key_dim);
        let (a_log, bias) = (floats(&self.weights.decay)[head], floats(&self.weights.step_bias)[head]);
        let tokens = (0..rows).map(|t| {
            let gates = &ba[(t * key_heads + key_head) * 2 * served..][..2 * served];
            let query = unit(vector(t, 0, own, key_dim));
            Token {
                query: query.iter().map(|q| q / (key_dim as f64).sqrt()).collect(),
                key: unit(vector(t, key_dim, keys + own, key_dim)),
                value: vector(t, 2 * key_dim + member * value_dim, 2 * keys + head * value_dim, value_dim),
                decay: vec![(-a_log.exp() * (gates[served + member] + bias).exp().ln_1p()).exp(); key_dim],
                strength: 1.0 / (1.0 + (-gates[member]).exp()),
            }
        });
        let read = recurrence(tokens);
        let gain = floats(self.weights.norm.gain());
        let rms = |values: &[f64]| (values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64 + 1e-6).sqrt();
        let usual = rms(&read);
        let gated = read.chunks(value_dim).enumerate().flat_map(|(t, read)| {
            let rms = rms(read);
            let z = |c: usize| at(t, 2 * key_dim + (served + member) * value_dim + c);
            (0..value_dim).map(|c| read[c] / rms * gain[c] * silu(z(c))).collect::<Vec<f64>>()
        });
        (gated.collect(), read.chunks(value_dim).map(|read| usual / rms(read)).collect())
    }
}

/// Inputs of one token for one head.
pub(super) struct Token {
    pub(super) query: Vec<f64>,
    pub(super) key: Vec<f64>,
    pub(super) value: Vec<f64>,
    /// Decay of each row of the state.
    pub(super) decay: Vec<f64>,
    pub(super) strength: f64,
}

/// The gated delta rule by its definition, token by token.
pub(super) fn recurrence(tokens: impl Iterator<Item = Token>) -> Vec<f64> {
    let mut state: Vec<Vec<f64>> = Vec::new();
    let read = |state: &[Vec<f64>], by: &[f64], column: usize| -> f64 {
        state.iter().zip(by).map(|(row, b)| row[column] * b).sum()
    };
    let step = |token: Token| {
        let columns = 0..token.value.len();
        state.resize(token.key.len(), vec![0.0; columns.len()]);
        for (row, decay) in state.iter_mut().zip(&token.decay) {
            row.iter_mut().for_each(|s| *s *= decay);
        }
        let missing = |c: usize| token.strength * (token.value[c] - read(&state, &token.key, c));
        let write: Vec<f64> = columns.clone().map(missing).collect();
        for (row, k) in state.iter_mut().zip(&token.key) {
            row.iter_mut().zip(&write).for_each(|(s, u)| *s += k * u);
        }
        columns.map(|c| read(&state, &token.query, c)).collect::<Vec<f64>>()
    };
    tokens.flat_map(step).collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// `x W^T`, both of `width` columns.
fn product(x: &[f64], weight: &[f64], width: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum();
    x.chunks(width).flat_map(|x| weight.chunks(width).map(move |w| dot(x, w))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn chunks_equal_the_recurrence(
        positions in prop::sample::select(vec![1_usize, 2, 3, 31, 63, 64, 65, 127, 128, 130, 200]),
        sequences in 1_usize..3, key_heads in 1_usize..3, served in 1_usize..4,
        key_dim in 1_usize..20, value_dim in 1_usize..36, kernel in 1_usize..6, log_decay in -6.0..4.0_f64,
    ) {
        let block = Block::new(12, key_heads, served, [key_dim, value_dim, kernel], log_decay);
        let x = block.input(sequences, positions);
        let (got, (want, magnified)) = (floats(&block.run(&x, positions)), block.naive(&x, positions));
        let rms = (want.iter().map(|v| v * v).sum::<f64>() / want.len() as f64).sqrt();
        for ((got, want), magnified) in got.chunks(12).zip(want.chunks(12)).zip(magnified) {
            let off = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a });
            prop_assert!(off <= 1e-4 * magnified * rms, "{off:e} from {want:?} where the RMS is {rms:e}, magnified {magnified} times");
        }
    }
}

#[test]
fn sequences_are_independent_of_each_other_and_their_order() {
    let block = Block::new(12, 2, 2, [8, 6, 4], -1.0);
    let positions = 70;
    let x = block.input(3, positions);
    let sequence = |t: &Tensor, s: usize| t.narrow(0, s * positions, positions).unwrap().contiguous().unwrap();
    let together = block.run(&x, positions);
    let order = [2, 0, 1];
    let turned = Tensor::cat(&order.map(|s| sequence(&x, s)), 0).unwrap();
    let turned = block.run(&turned, positions);
    for (at, s) in order.into_iter().enumerate() {
        let alone = block.run(&sequence(&x, s), positions);
        close(&sequence(&together, s), &alone, 1e-6);
        close(&sequence(&turned, at), &alone, 1e-6);
    }
}

#[test]
fn stored_row_order_changes_no_result() {
    for (key_heads, served) in [(1, 1), (2, 3), (3, 1)] {
        let block = || Block::new(12, key_heads, served, [8, 6, 4], -1.0);
        let x = block().input(2, 70);
        close(&block().by_kind().run(&x, 70), &block().run(&x, 70), 1e-5);
    }
}

#[test]
fn outputs_are_causal() {
    let block = Block::new(12, 1, 2, [8, 6, 4], -1.0);
    let x = block.input(1, 100);
    let short = block.run(&x.narrow(0, 0, 67).unwrap().contiguous().unwrap(), 67);
    close(&block.run(&x, 100).narrow(0, 0, 67).unwrap(), &short, 1e-6);
}

#[test]
fn rule_takes_the_memory_of_its_decays() {
    let mut spec = Block::new(12, 2, 2, [8, 6, 4], -1.0).spec;
    assert_eq!(rule_bytes(&spec, 3, 10), 3 * 10 * 4 * 4, "of 4 heads");
    spec.stored = DeltaStored::Apart;
    assert_eq!(rule_bytes(&spec, 3, 10), 3 * 10 * 4 * 8 * 4, "of 8 channels each");
}

/// Times Qwen3-Next's block against a token-by-token recurrence in tensor operations over all
/// heads.
#[test]
#[ignore = "a measurement: run it optimised, alone and with --nocapture"]
fn speed_at_the_published_shape() {
    let (sequences, positions) = (2, 2048);
    let mut block = Block::new(2048, 16, 2, [128, 128, 4], -1.0);
    let DeltaProjections::ByKeyHead { qkvz, ba } = &mut block.weights.projections else { panic!() };
    for linear in [qkvz, ba, &mut block.weights.output] {
        linear.weight = (&linear.weight * 0.03).unwrap();
    }
    let x = block.input(sequences, positions);
    let seconds = |what: &str, run: &dyn Fn()| {
        let best = (0..3).map(|_| {
            let start = std::time::Instant::now();
            run();
            start.elapsed().as_secs_f64()
        });
        let best = best.fold(f64::INFINITY, f64::min);
        println!("{what}: {best:.3} s, {:.0} tokens/s", (sequences * positions) as f64 / best);
        best
    };
    let projected = block.weights.projections.apply(&x).unwrap();
    let inner = || heads(&block.spec, &block.weights, &projected, positions).unwrap();
    seconds("whole block", &|| drop(block.run(&x, positions)));
    seconds("convolutions and gates", &|| drop(inner()));
    let inner = inner();
    close(&inner.delta_rule().unwrap(), &token_by_token(&inner), 1e-4);
    let chunked = seconds("delta rule in chunks", &|| drop(inner.delta_rule().unwrap()));
    let naive = seconds("delta rule token by token", &|| drop(token_by_token(&inner)));
    println!("{:.1} times as fast", naive / chunked);
}

fn token_by_token(heads: &Heads) -> Tensor {
    let ((all, positions, width), (keys, _, key_dim)) = (heads.value.dims3().unwrap(), heads.key.dims3().unwrap());
    let token = |t: &Tensor, at: usize| t.narrow(1, at, 1).unwrap().contiguous().unwrap();
    let repeated = |t: Tensor| t.repeat((1, all / keys, 1)).unwrap().reshape((all, 1, key_dim)).unwrap();
    let mut state = Tensor::zeros((all, key_dim, width), DType::F32, &Device::Cpu).unwrap();
    let step = |at: usize| {
        let (query, key) = (repeated(token(&heads.query, at)), repeated(token(&heads.key, at)));
        let gate = |t: &Tensor| token(t, at).unsqueeze(2).unwrap();
        state = state.broadcast_mul(&gate(&heads.decay).exp().unwrap()).unwrap();
        let expected = key.matmul(&state).unwrap();
        let write = (token(&heads.value, at) - expected).unwrap().broadcast_mul(&gate(&heads.strength)).unwrap();
        state = (&state + key.transpose(1, 2).unwrap().matmul(&write).unwrap()).unwrap();
        query.matmul(&state).unwrap()
    };
    let out: Vec<Tensor> = (0..positions).map(step).collect();
    Tensor::cat(&out, 1).unwrap()
}
