//! Kernels beside the loops for CPUs: the same bits, whatever the sizes. Attention in one pass,
//! which has no such loop, beside its definition. Needs a GPU, or the one that
//! `tests/gpu/install_fake_driver.sh` makes of the processor: `tests/gpu.sh` runs it there.
#![cfg(feature = "cuda")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use outliers_worker::blocks::attention::{AttentionRecorder, FUSED_FROM, SoftmaxAttention};
use outliers_worker::blocks::delta_net::Convolution;
use outliers_worker::device::gpu;
use outliers_worker::kernels::fused::{self, Activation, Gate, RotatedPart, ScoreBlock, SinkLogits};
use outliers_worker::kernels::recurrence::Recurrence;
use outliers_worker::model::decoder::Window;
use outliers_worker::model::rope::{Pairing, RopeScaling, RopeSpec};
use proptest::prelude::*;
use proptest::sample::select;

fn gpu() -> &'static Device {
    static GPU: OnceLock<Device> = OnceLock::new();
    GPU.get_or_init(|| {
        gpu::find().open(0).expect("LD_LIBRARY_PATH names a folder that tests/gpu/install_fake_driver.sh made")
    })
}

/// Pseudo-random numbers, and some special ones.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    fn value(&mut self) -> f32 {
        const SPECIAL: [f32; 9] = [0.0, -0.0, 1e-30, -3e-5, 700.0, -6e4, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        match self.next() % 300 {
            special @ 0..9 => SPECIAL[special as usize],
            9..40 => [0.0, 1.0, -1.0, 6.0][self.next() as usize % 4],
            _ => (self.next() as f32 / 2f32.powi(30) - 1.0) * 6.0,
        }
    }

    /// Of numbers up to `most`.
    fn even(&mut self, shape: &[usize], most: f32) -> Tensor {
        let mut value = || (self.next() as f32 / 2f32.powi(30) - 1.0) * most;
        let values: Vec<bf16> = (0..shape.iter().product::<usize>()).map(|_| bf16::from_f32(value())).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn tensor(&mut self, shape: &[usize], dtype: DType) -> Tensor {
        let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|_| self.value()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    }
}

fn on_gpu(x: &Tensor) -> Tensor {
    x.to_device(gpu()).unwrap()
}

/// The bits of all values as f64; all NaN are equal.
fn bits(x: &Tensor) -> Vec<u64> {
    let x = x.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_dtype(DType::F64).unwrap();
    let bits = |value: f64| if value.is_nan() { u64::MAX } else { value.to_bits() };
    x.to_vec1::<f64>().unwrap().into_iter().map(bits).collect()
}

/// Runs an operation on CPU and GPU with the same tensors. It may overwrite the first tensor.
fn same(tensors: &[&Tensor], operation: impl Fn(&[Tensor]) -> Tensor) -> Result<(), TestCaseError> {
    let copies: Vec<Tensor> = tensors.iter().map(|tensor| tensor.copy().unwrap()).collect();
    let there: Vec<Tensor> = tensors.iter().map(|tensor| on_gpu(tensor)).collect();
    let (here, there) = (operation(&copies), operation(&there));
    prop_assert_eq!((here.dims(), here.dtype()), (there.dims(), there.dtype()));
    prop_assert_eq!(bits(&here), bits(&there));
    Ok(())
}

/// Heads whose queries and keys, and whose values, are so wide.
const WIDTHS: [[usize; 2]; 6] = [[64, 64], [80, 80], [96, 96], [128, 128], [192, 128], [256, 256]];

/// What attends to what.
#[derive(Clone, Copy, Debug)]
struct Attention {
    widths: [usize; 2],
    sequences: usize,
    tokens: usize,
    kv_heads: usize,
    /// Heads of queries for each of keys.
    groups: usize,
    window: Window,
    sinks: bool,
    seed: u64,
}

impl Attention {
    /// By one kernel against the definition in f64.
    fn check(self) -> Result<(), TestCaseError> {
        let Self { widths: [width, value_width], sequences, tokens, kv_heads, groups, window, .. } = self;
        let heads = kv_heads * groups;
        let mut rng = Rng(self.seed);
        // One head more than there is: a token's heads do not follow those of the one before.
        let query = rng.even(&[sequences, tokens, heads + 1, width], 3.0);
        let key = rng.even(&[sequences * kv_heads, tokens, width], 2.0);
        let value = rng.even(&[sequences * kv_heads, tokens, value_width], 1.0);
        let logits = rng.even(&[heads], 3.0).to_dtype(DType::F32).unwrap();
        let scale = (width as f64).powf(-0.5);
        let (recorder, there) = (AttentionRecorder::new(true, true), on_gpu(&logits));
        let mixing = SoftmaxAttention::new(scale, window, self.sinks.then_some(&there)).fused_from(0);
        let queries = on_gpu(&query).narrow(2, 1, heads).unwrap();
        let mixed = mixing.recorder(Some(&recorder)).mix(&queries, &on_gpu(&key), &on_gpu(&value)).unwrap();
        prop_assert_eq!(mixed.dims2().unwrap(), (sequences * tokens, heads * value_width));
        if tokens < 64 {
            let unrecorded = mixing.mix(&queries, &on_gpu(&key), &on_gpu(&value)).unwrap();
            prop_assert_eq!(bits(&unrecorded), bits(&mixed));
        }

        let [query, key, value, logits, mixed] = [&query, &key, &value, &logits, &mixed].map(numbers);
        let row = |of: &[f64], row: usize, width: usize| of[row * width..][..width].to_vec();
        let (mut top, mut first) = (0.0, vec![vec![Vec::new(); heads]; sequences]);
        let of_token = move |token: usize| (0..heads).map(move |head| (token / tokens, token % tokens, head));
        for (sequence, position, head) in (0..sequences * tokens).flat_map(of_token) {
            let seen = window.first_key(position)..position + 1;
            let at = |key: usize| (sequence * kv_heads + head / groups) * tokens + key;
            let token = sequence * tokens + position;
            let of_query = row(&query, token * (heads + 1) + head + 1, width);
            let weight = |k: usize| {
                let score: f64 = row(&key, at(k), width).iter().zip(&of_query).map(|(a, b)| a * b).sum();
                (score * scale).exp()
            };
            let weights: Vec<f64> = seen.clone().map(weight).collect();
            let sink = if self.sinks { logits[head].exp() } else { 0.0 };
            let all = weights.iter().sum::<f64>() + sink;
            top += weights.iter().copied().fold(0.0, f64::max) / all;
            if position > 0 && seen.start == 0 {
                first[sequence][head].push(weights[0] / all);
            }
            let (mut wanted, mut sizes) = (vec![0.0; value_width], vec![0.0; value_width]);
            for (k, weight) in seen.zip(&weights) {
                for (i, value) in row(&value, at(k), value_width).into_iter().enumerate() {
                    wanted[i] += weight / all * value;
                    sizes[i] += weight / all * value.abs();
                }
            }
            let got = row(&mixed, token * heads + head, value_width);
            for (i, ((got, want), size)) in got.iter().zip(&wanted).zip(&sizes).enumerate() {
                // Shares are rounded to bf16, which has 8 bits, and so are sums; all else is of
                // f32.
                let is_close = (got - want).abs() <= (size + want.abs()) / 256.0 + 1e-5;
                let place = (sequence, position, head, i);
                prop_assert!(is_close, "{:?} at {:?}: {}, not {}", self, place, got, want);
            }
        }
        let count = (sequences * tokens * heads) as f64;
        let got = recorder.top();
        prop_assert_eq!(got.count as f64, count);
        prop_assert!((got.sum - top).abs() < 1e-5 * count, "{:?}: {}, not {}", self, got.sum, top);
        let of_first = recorder.first_key();
        prop_assert_eq!(of_first.len(), sequences);
        for (got, want) in of_first.iter().flatten().zip(first.iter().flatten()) {
            let want = (!want.is_empty()).then(|| want.iter().sum::<f64>() / want.len() as f64);
            let off = got.mean().zip(want).map_or(0.0, |(got, want)| (got - want).abs());
            let is_close = got.mean().is_some() == want.is_some() && off < 1e-5;
            prop_assert!(is_close, "{:?}: {:?}, not {:?}", self, got, want);
        }
        Ok(())
    }
}

/// All values in f64.
fn numbers(x: &Tensor) -> Vec<f64> {
    let x = x.to_device(&Device::Cpu).unwrap().flatten_all().unwrap();
    x.to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

#[test]
fn attention_in_one_pass_equals_the_definition_at_odd_lengths() {
    for widths in WIDTHS {
        for (i, tokens) in [1, 15, 16, 17, 63, 65, 130, 257].into_iter().enumerate() {
            let (sequences, kv_heads, groups) = (2 - i % 2, 1 + i / 2 % 2, 1 + i % 3);
            let (window, sinks) = (Window::Full, i.is_multiple_of(2));
            let case = Attention { widths, sequences, tokens, kv_heads, groups, window, sinks, seed: i as u64 };
            case.check().unwrap();
        }
    }
}

/// As where all keys have a large bias: what each adds is of one size, however many tiles follow.
#[test]
fn large_scores_that_are_alike_give_equal_shares() {
    let (tokens, width, seen) = (257_usize, 64, 64_usize);
    let all = |value: f32, tokens: usize| {
        Tensor::full(value, (1, tokens, width), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap()
    };
    let key = on_gpu(&all(200.0, tokens));
    let query = key.reshape((1, tokens, 1, width)).unwrap();
    let value = on_gpu(&Tensor::cat(&[all(1.0, seen), all(0.0, tokens - seen)], 1).unwrap());
    let recorder = AttentionRecorder::new(true, false);
    let mixing = SoftmaxAttention::new(0.7, Window::Full, None).fused_from(0).recorder(Some(&recorder));
    let mixed = numbers(&mixing.mix(&query, &key, &value).unwrap());
    for (position, got) in mixed.chunks(width).enumerate() {
        let want = (position + 1).min(seen) as f64 / (position + 1) as f64;
        assert!(got.iter().all(|got| (got - want).abs() <= want / 128.0), "{position}: {got:?}, not {want}");
    }
    let shares: f64 = (1..=tokens).map(|keys| 1.0 / keys as f64).sum();
    assert!((recorder.top().sum - shares).abs() < 1e-3 * shares, "{:?}, not {shares}", recorder.top());
}

/// The tensor library's kernels, by which scores would be computed, are empty here.
#[test]
fn long_sequences_in_bf16_are_left_to_one_kernel() {
    let mut rng = Rng(1);
    let (query, key) = (rng.even(&[1, FUSED_FROM, 1, 64], 1.0), rng.even(&[1, FUSED_FROM, 64], 1.0));
    let (query, key) = (on_gpu(&query), on_gpu(&key));
    let mixing = SoftmaxAttention::new(0.1, Window::Sliding(90), None);
    let mixed = mixing.mix(&query, &key, &key).unwrap();
    assert_eq!(bits(&mixed), bits(&mixing.fused_from(0).mix(&query, &key, &key).unwrap()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn attention_in_one_pass(
        seed: u64,
        widths in select(WIDTHS.to_vec()),
        (sequences, tokens) in (1..3usize, 1..200usize),
        (kv_heads, groups) in (1..3usize, 1..4usize),
        window in prop_oneof![
            Just(Window::Full),
            (0..150usize).prop_map(Window::Sliding),
            (0..150usize).prop_map(Window::Chunked)
        ],
        sinks: bool,
    ) {
        Attention { widths, sequences, tokens, kv_heads, groups, window, sinks, seed }.check()?;
    }
}

/// A recurrence on both devices, with factors of a state or of each row, with or without strengths.
fn recurrence_equals_the_cpu(
    seed: u64,
    [key_heads, served, positions, rows, width]: [usize; 5],
    by_row: bool,
    corrects: bool,
) -> Result<(), TestCaseError> {
    let (mut rng, heads) = (Rng(seed), key_heads * served);
    let mut even = |shape: &[usize]| rng.even(shape, 0.5).to_dtype(DType::F32).unwrap();
    let (query, key) = (even(&[key_heads, positions, rows]), even(&[key_heads, positions, rows]));
    let decay = (even(&[heads, positions, if by_row { rows } else { 1 }]) + 0.5).unwrap();
    let strength = (even(&[heads, positions]) + 0.5).unwrap();
    let value = even(&[heads, positions, width]);
    same(&[&query, &key, &value, &decay, &strength], |of| {
        let of_states = Recurrence { decay: &of[3], strength: corrects.then_some(&of[4]) };
        of_states.apply(&of[0], &of[1], &of[2]).unwrap()
    })
}

/// Those of published models, and the sizes at which the kernel for more rows begins.
#[test]
fn recurrences_of_many_rows() {
    let sizes = [[1, 2, 9, 128, 128], [2, 1, 3, 128, 64], [1, 1, 8, 64, 65], [1, 2, 7, 65, 3], [1, 1, 5, 256, 70]];
    for (seed, sizes) in (0..).zip(sizes) {
        for (by_row, corrects) in [(false, true), (true, true), (false, false)] {
            recurrence_equals_the_cpu(seed, sizes, by_row, corrects).unwrap();
        }
    }
}

#[test]
fn more_rows_than_a_kernel_has_are_refused() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, gpu()).unwrap();
    let (decay, keys) = (zeros(&[1, 2]), zeros(&[1, 2, 257]));
    let refused = Recurrence { decay: &decay, strength: None }.apply(&keys, &keys, &zeros(&[1, 2, 3]));
    assert!(refused.unwrap_err().to_string().contains("257 rows"));
}

fn dtypes() -> impl Strategy<Value = DType> {
    select(vec![DType::F32, DType::BF16, DType::F16])
}

fn gates() -> impl Strategy<Value = Gate> {
    select(vec![Gate::Silu, Gate::Sigmoid, Gate::GeluTanh, Gate::Clamped { limit: 2.5, alpha: 1.702 }])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn recurrences(
        seed: u64,
        (key_heads, served, positions) in (1..3usize, 1..4usize, 1..20usize),
        (rows, width) in (1..40usize, 1..80usize),
        by_row: bool,
        corrects: bool,
    ) {
        recurrence_equals_the_cpu(seed, [key_heads, served, positions, rows, width], by_row, corrects)?;
    }

    #[test]
    fn norms(seed: u64, rows in 1..40usize, width in 1..200usize, dtype in dtypes()) {
        let mut rng = Rng(seed);
        let (x, residual) = (rng.tensor(&[rows, width], dtype), rng.tensor(&[rows, width], dtype));
        let (gain, bias) = (rng.tensor(&[width], dtype), rng.tensor(&[width], dtype));
        same(&[&x, &gain], |of| fused::rms_norm(&of[0], &of[1], 1e-5).unwrap())?;
        same(&[&x, &gain, &residual], |of| fused::rms_norm_onto(&of[2], &of[0], &of[1], 1e-5).unwrap())?;
        same(&[&x, &gain, &bias], |of| fused::layer_norm(&of[0], &of[1], &of[2], 1e-5).unwrap())?;
        // Some rows give the same as all rows.
        let (first, x, gain) = (rows / 2, on_gpu(&x), on_gpu(&gain));
        let all = fused::rms_norm(&x, &gain, 1e-5).unwrap().narrow(0, first, rows - first).unwrap();
        let some = fused::rms_norm(&x.narrow(0, first, rows - first).unwrap(), &gain, 1e-5).unwrap();
        prop_assert_eq!(bits(&all), bits(&some));
    }

    #[test]
    fn gates_of_separate_and_of_joined_matrices(
        seed: u64, rows in 1..5usize, width in 1..1200usize, dtype in dtypes(), how in gates(), interleaved: bool,
    ) {
        let mut rng = Rng(seed);
        let (gate, up) = (rng.tensor(&[rows, width], dtype), rng.tensor(&[rows, width], dtype));
        same(&[&gate, &up], |of| fused::gated(of[0].clone(), &of[1], how).unwrap())?;
        let joined = rng.tensor(&[rows, 2 * width], dtype);
        same(&[&joined], |of| fused::gated_joined(&of[0], interleaved, how).unwrap())?;
    }

    #[test]
    fn activations_and_sums(seed: u64, rows in 1..5usize, width in 1..1200usize, dtype in dtypes()) {
        let mut rng = Rng(seed);
        let (x, y) = (rng.tensor(&[rows, width], dtype), rng.tensor(&[rows, width], dtype));
        for how in [Activation::Relu, Activation::ReluSquared, Activation::GeluTanh] {
            same(&[&x], |of| fused::activated(of[0].clone(), how).unwrap())?;
        }
        let row = rng.tensor(&[width], dtype);
        for y in [y, row] {
            same(&[&x, &y], |of| fused::sum(of[0].clone(), &of[1]).unwrap())?;
        }
    }

    #[test]
    fn rotations(
        seed: u64,
        (sequences, positions, heads) in (1..4usize, 1..9usize, 1..5usize),
        (pairs, first, after) in (1..20usize, 0..5usize, 0..5usize),
        pairing in select(vec![Pairing::Halves, Pairing::Interleaved]),
        dtype in dtypes(),
    ) {
        let spec = RopeSpec { theta: 50.0, dims: 2 * pairs, pairing, scaling: RopeScaling::None };
        let part = RotatedPart { head_dim: first + 2 * pairs + after, first };
        let x = Rng(seed).tensor(&[sequences * positions, heads * part.head_dim], dtype);
        // A table may cover more positions than needed.
        let table = |device: &Device| spec.table(positions + 3, device).unwrap();
        same(&[&x], |of| fused::rope(of[0].clone(), &table(of[0].device()), part, positions).unwrap())?;
    }

    #[test]
    fn softmaxes(
        seed: u64,
        (heads, first_query, queries) in (1..6usize, 0..60usize, 1..12usize),
        window in prop_oneof![
            Just(Window::Full),
            (0..70usize).prop_map(Window::Sliding),
            (0..70usize).prop_map(Window::Chunked)
        ],
        sinks in proptest::option::of((1..7usize, 0..7usize)),
        scale in 0.01..2.0f64,
        dtype in dtypes(),
    ) {
        let mut rng = Rng(seed);
        let block = ScoreBlock { first_query, queries, first_key: window.first_key(first_query), window };
        let keys = first_query + queries - block.first_key;
        let scores = rng.tensor(&[heads, queries, keys], dtype);
        let Some((count, first)) = sinks else {
            same(&[&scores], |of| fused::causal_softmax(of[0].clone(), block, scale, None).unwrap())?;
            return Ok(());
        };
        let logits = rng.tensor(&[count], DType::F32);
        same(&[&scores, &logits], |of| {
            let sinks = SinkLogits { logits: &of[1], first_head: first % count };
            fused::causal_softmax(of[0].clone(), block, scale, Some(sinks)).unwrap()
        })?;
    }

    #[test]
    fn convolutions(
        seed: u64,
        (sequences, positions, heads) in (1..3usize, 1..9usize, 1..4usize),
        (width, kernel, first_channel) in (1..70usize, 1..6usize, 0..4usize),
        length in proptest::option::of(0.1..2.0f32),
        biased: bool,
        dtype in dtypes(),
    ) {
        let mut rng = Rng(seed);
        let x = rng.tensor(&[sequences * positions, heads * width], dtype);
        let taps = rng.tensor(&[first_channel + heads * width, kernel], DType::F32);
        let bias = rng.tensor(&[first_channel + heads * width], DType::F32);
        same(&[&x, &taps, &bias], |of| {
            let bias = biased.then_some(&of[2]);
            Convolution { heads, positions, first_channel, length, bias }.apply(&of[0], &of[1]).unwrap()
        })?;
    }

    #[test]
    fn parts_of_logits(seed: u64, rows in 1..40usize, width in 1..300usize, dtype in dtypes()) {
        let mut rng = Rng(seed);
        let logits = rng.tensor(&[rows, width], dtype);
        // Two thirds of the targets are within the columns.
        let first = rng.next() % 1000;
        let target = |row: usize| if row.is_multiple_of(3) { rng.next() } else { first + rng.next() % width as u32 };
        let targets: Vec<u32> = (0..rows).map(target).collect();
        let targets = Tensor::from_vec(targets, rows, &Device::Cpu).unwrap();
        same(&[&logits, &targets], |of| fused::logit_parts(&of[0], &of[1], first).unwrap())?;
    }
}
