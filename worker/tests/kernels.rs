//! Kernels beside the loops for CPUs: the same bits, whatever the sizes. Needs a GPU, or the one
//! that `tests/gpu/install_fake_driver.sh` makes of the processor: `tests/gpu.sh` runs it there.
#![cfg(feature = "cuda")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use outliers_worker::blocks::delta_net::{Convolution, inverse};
use outliers_worker::device::gpu;
use outliers_worker::kernels::fused::{self, Activation, Gate, RotatedPart, ScoreBlock, Sinks};
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

/// Numbers that look random, and some that are special.
struct Dice(u64);

impl Dice {
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

    fn tensor(&mut self, shape: &[usize], dtype: DType) -> Tensor {
        let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|_| self.value()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    }
}

fn on_gpu(x: &Tensor) -> Tensor {
    x.to_device(gpu()).unwrap()
}

/// The bits of all values in f64; what is no number is one number.
fn bits(x: &Tensor) -> Vec<u64> {
    let x = x.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_dtype(DType::F64).unwrap();
    let bits = |value: f64| if value.is_nan() { u64::MAX } else { value.to_bits() };
    x.to_vec1::<f64>().unwrap().into_iter().map(bits).collect()
}

/// Both do the same to the same tensors; an operation may overwrite the first.
fn same(tensors: &[&Tensor], operation: impl Fn(&[Tensor]) -> Tensor) -> Result<(), TestCaseError> {
    let copies: Vec<Tensor> = tensors.iter().map(|tensor| tensor.copy().unwrap()).collect();
    let there: Vec<Tensor> = tensors.iter().map(|tensor| on_gpu(tensor)).collect();
    let (here, there) = (operation(&copies), operation(&there));
    prop_assert_eq!((here.dims(), here.dtype()), (there.dims(), there.dtype()));
    prop_assert_eq!(bits(&here), bits(&there));
    Ok(())
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
    fn inverse_equals_the_cpu(seed: u64, count in 1_usize..4, n in select(vec![1_usize, 2, 15, 16, 33, 63, 64])) {
        same(&[&Dice(seed).tensor(&[count, n, n], DType::F32)], |tensors| inverse(&tensors[0]).unwrap())?;
    }

    #[test]
    fn norms(seed: u64, rows in 1..40usize, width in 1..200usize, dtype in dtypes()) {
        let mut dice = Dice(seed);
        let (x, residual) = (dice.tensor(&[rows, width], dtype), dice.tensor(&[rows, width], dtype));
        let (gain, bias) = (dice.tensor(&[width], dtype), dice.tensor(&[width], dtype));
        same(&[&x, &gain], |of| fused::rms_norm(&of[0], &of[1], 1e-5).unwrap())?;
        same(&[&x, &gain, &residual], |of| fused::rms_norm_onto(&of[2], &of[0], &of[1], 1e-5).unwrap())?;
        same(&[&x, &gain, &bias], |of| fused::layer_norm(&of[0], &of[1], &of[2], 1e-5).unwrap())?;
        // Of some rows the same as of all.
        let (first, x, gain) = (rows / 2, on_gpu(&x), on_gpu(&gain));
        let all = fused::rms_norm(&x, &gain, 1e-5).unwrap().narrow(0, first, rows - first).unwrap();
        let some = fused::rms_norm(&x.narrow(0, first, rows - first).unwrap(), &gain, 1e-5).unwrap();
        prop_assert_eq!(bits(&all), bits(&some));
    }

    #[test]
    fn gates_of_separate_and_of_joined_matrices(
        seed: u64, rows in 1..5usize, width in 1..1200usize, dtype in dtypes(), how in gates(), interleaved: bool,
    ) {
        let mut dice = Dice(seed);
        let (gate, up) = (dice.tensor(&[rows, width], dtype), dice.tensor(&[rows, width], dtype));
        same(&[&gate, &up], |of| fused::gated(of[0].clone(), &of[1], how).unwrap())?;
        let joined = dice.tensor(&[rows, 2 * width], dtype);
        same(&[&joined], |of| fused::gated_joined(&of[0], interleaved, how).unwrap())?;
    }

    #[test]
    fn activations_and_sums(seed: u64, rows in 1..5usize, width in 1..1200usize, dtype in dtypes()) {
        let mut dice = Dice(seed);
        let (x, y) = (dice.tensor(&[rows, width], dtype), dice.tensor(&[rows, width], dtype));
        for how in [Activation::Relu, Activation::ReluSquared, Activation::GeluTanh] {
            same(&[&x], |of| fused::activated(of[0].clone(), how).unwrap())?;
        }
        let row = dice.tensor(&[width], dtype);
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
        let x = Dice(seed).tensor(&[sequences * positions, heads * part.head_dim], dtype);
        // A table may cover more positions than there are.
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
        let mut dice = Dice(seed);
        let block = ScoreBlock { first_query, queries, first_key: window.first_key(first_query), window };
        let keys = first_query + queries - block.first_key;
        let scores = dice.tensor(&[heads, queries, keys], dtype);
        let Some((count, first)) = sinks else {
            same(&[&scores], |of| fused::causal_softmax(of[0].clone(), block, scale, None).unwrap())?;
            return Ok(());
        };
        let logits = dice.tensor(&[count], DType::F32);
        same(&[&scores, &logits], |of| {
            let sinks = Sinks { logits: &of[1], first_head: first % count };
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
        let mut dice = Dice(seed);
        let x = dice.tensor(&[sequences * positions, heads * width], dtype);
        let taps = dice.tensor(&[first_channel + heads * width, kernel], DType::F32);
        let bias = dice.tensor(&[first_channel + heads * width], DType::F32);
        same(&[&x, &taps, &bias], |of| {
            let bias = biased.then_some(&of[2]);
            Convolution { heads, positions, first_channel, length, bias }.apply(&of[0], &of[1]).unwrap()
        })?;
    }

    #[test]
    fn parts_of_logits(seed: u64, rows in 1..40usize, width in 1..300usize, dtype in dtypes()) {
        let mut dice = Dice(seed);
        let logits = dice.tensor(&[rows, width], dtype);
        let target = |row: usize| (row % 3 > 0).then(|| dice.next() % width as u32);
        let targets: Vec<Option<u32>> = (0..rows).map(target).collect();
        same(&[&logits], |of| fused::logit_parts(&of[0], &targets).unwrap())?;
    }
}
