use candle_core::Device;
use proptest::prelude::*;

use super::*;
use crate::decoder::NormSpec;

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

/// Shapes are equal, and values within `tolerance` of the root mean square of `want`.
pub(super) fn close(got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), want.dims());
    assert_close(&floats(got), &floats(want), tolerance);
}

fn assert_close(got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    let rms = (want.iter().map(|v| v * v).sum::<f64>() / want.len() as f64).sqrt();
    // Not a maximum of differences: that would let NaN pass.
    let far = got.iter().zip(want).position(|(a, b)| !((a - b).abs() <= tolerance * rms.max(1e-12)));
    if let Some(at) = far {
        panic!("value {at}: {} instead of {} where the RMS is {rms:e}", got[at], want[at]);
    }
}

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
        let spec = DeltaNetSpec { key_heads, value_heads, key_dim, value_dim, kernel, norm };
        let linear =
            |rows: usize, columns: usize, seed| Linear { weight: values(&[rows, columns], 1.5, seed), bias: None };
        let (keys, all) = (key_heads * key_dim, value_heads * value_dim);
        let weights = DeltaNetWeights {
            qkvz: linear(2 * keys + 2 * all, hidden, 1),
            ba: linear(2 * value_heads, hidden, 2),
            convolution: values(&[2 * keys + all, 1, kernel], 2.0, 3),
            decay: (values(&[value_heads], 1.0, 4) + log_decay).unwrap(),
            step_bias: values(&[value_heads], 1.0, 5),
            norm: Norm::new(norm, (values(&[value_dim], 1.0, 6) + 1.0).unwrap(), None).unwrap(),
            output: linear(hidden, all, 7),
        };
        Self { spec, weights, hidden }
    }

    fn input(&self, sequences: usize, positions: usize) -> Tensor {
        values(&[sequences * positions, self.hidden], 4.0, 8)
    }

    fn run(&self, x: &Tensor, positions: usize) -> Tensor {
        delta_net(&self.spec, &self.weights, x, positions).unwrap()
    }

    /// The definition, token by token in f64.
    fn naive(&self, x: &Tensor, positions: usize) -> Vec<f64> {
        let width = self.hidden;
        floats(x).chunks(positions * width).flat_map(|sequence| self.naive_sequence(sequence)).collect()
    }

    fn naive_sequence(&self, x: &[f64]) -> Vec<f64> {
        let DeltaNetSpec { key_heads, value_heads, key_dim, value_dim, .. } = self.spec;
        let served = value_heads / key_heads;
        let rows = x.len() / self.hidden;
        let qkvz = product(x, &floats(&self.weights.qkvz.weight), self.hidden);
        let ba = product(x, &floats(&self.weights.ba.weight), self.hidden);
        let (a_log, bias) = (floats(&self.weights.decay), floats(&self.weights.step_bias));
        let gain = floats(self.weights.norm.gain());
        let group = 2 * key_dim + 2 * served * value_dim;
        let mut mixed = vec![0.0; rows * value_heads * value_dim];
        for head in 0..value_heads {
            let (key_head, member) = (head / served, head % served);
            let at = |t: usize, column: usize| qkvz[t * key_heads * group + key_head * group + column];
            let channel = |t: usize, column: usize, channel: usize| {
                let taps = floats(&self.weights.convolution);
                let kernel = self.spec.kernel;
                let sum: f64 = (0..kernel.min(t + 1))
                    .map(|back| taps[channel * kernel + kernel - 1 - back] * at(t - back, column))
                    .sum();
                silu(sum)
            };
            let keys = key_heads * key_dim;
            let mut state = vec![vec![0.0; value_dim]; key_dim];
            for t in 0..rows {
                let vector = |first: usize, first_channel: usize| -> Vec<f64> {
                    let raw: Vec<f64> =
                        (0..key_dim).map(|i| channel(t, first + i, first_channel + key_head * key_dim + i)).collect();
                    let norm = (raw.iter().map(|v| v * v).sum::<f64>() + 1e-6).sqrt();
                    raw.iter().map(|v| v / norm).collect()
                };
                let (q, k) = (vector(0, 0), vector(key_dim, keys));
                let first = 2 * key_dim + member * value_dim;
                let v: Vec<f64> =
                    (0..value_dim).map(|i| channel(t, first + i, 2 * keys + head * value_dim + i)).collect();
                let gates = &ba[t * 2 * value_heads + key_head * 2 * served..][..2 * served];
                let strength = 1.0 / (1.0 + (-gates[member]).exp());
                let step = (gates[served + member] + bias[head]).exp().ln_1p();
                let decay = (-a_log[head].exp() * step).exp();
                state.iter_mut().flatten().for_each(|s| *s *= decay);
                let read = |state: &[Vec<f64>], by: &[f64], c: usize| -> f64 {
                    state.iter().zip(by).map(|(row, b)| row[c] * b).sum()
                };
                let write: Vec<f64> = (0..value_dim).map(|c| strength * (v[c] - read(&state, &k, c))).collect();
                for (row, k) in state.iter_mut().zip(&k) {
                    row.iter_mut().zip(&write).for_each(|(s, u)| *s += k * u);
                }
                let out: Vec<f64> = (0..value_dim).map(|c| read(&state, &q, c) / (key_dim as f64).sqrt()).collect();
                let rms = (out.iter().map(|v| v * v).sum::<f64>() / value_dim as f64 + 1e-6).sqrt();
                for c in 0..value_dim {
                    let z = at(t, 2 * key_dim + (served + member) * value_dim + c);
                    mixed[(t * value_heads + head) * value_dim + c] = out[c] / rms * gain[c] * silu(z);
                }
            }
        }
        product(&mixed, &floats(&self.weights.output.weight), value_heads * value_dim)
    }
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
        assert_close(&floats(&block.run(&x, positions)), &block.naive(&x, positions), 1e-4);
    }
}

#[test]
fn sequences_neither_leak_into_each_other_nor_depend_on_their_order() {
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
fn tokens_do_not_see_the_future() {
    let block = Block::new(12, 1, 2, [8, 6, 4], -1.0);
    let x = block.input(1, 100);
    let short = block.run(&x.narrow(0, 0, 67).unwrap().contiguous().unwrap(), 67);
    close(&block.run(&x, 100).narrow(0, 0, 67).unwrap(), &short, 1e-6);
}

/// Qwen3-Next's block against its own recurrence run token by token, in tensor operations over all heads.
#[test]
#[ignore = "a measurement: run it optimised, alone and with --nocapture"]
fn speed_of_the_published_shape() {
    let (sequences, positions) = (2, 2048);
    let mut block = Block::new(2048, 16, 2, [128, 128, 4], -1.0);
    for linear in [&mut block.weights.qkvz, &mut block.weights.ba, &mut block.weights.output] {
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
    let qkvz = block.weights.qkvz.apply(&x).unwrap();
    let ba = block.weights.ba.apply(&x).unwrap();
    let inner = || heads(&block.spec, &block.weights, &qkvz, &ba, positions).unwrap();
    seconds("whole block", &|| drop(block.run(&x, positions)));
    seconds("convolutions and gates", &|| drop(inner()));
    let inner = inner();
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
