//! MoE routing on a GPU compared with the CPU form, bit by bit, at many sizes; nothing of the size
//! of the tokens is copied to the host. Needs a GPU, or the fake one of
//! `tests/gpu/install_fake_driver.sh`, which `tests/gpu.sh` uses.
#![cfg(feature = "cuda")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::{DType, Device, Tensor};
use outliers_worker::blocks::ffn::{self, Choices, ExpertBatch, GateUpProj, Inputs, MlpWeights, Routed, SortedChoices};
use outliers_worker::device::gpu::{self, Positions};
use outliers_worker::kernels::product::{self, Linear};
use outliers_worker::model::decoder::{GateUp, MlpKind, RouterSpec};
use outliers_worker::stats::mixture::RouterStats;
use proptest::prelude::*;

fn gpu() -> &'static Device {
    static GPU: OnceLock<Device> = OnceLock::new();
    GPU.get_or_init(|| {
        gpu::find().open(0).expect("LD_LIBRARY_PATH names a folder that tests/gpu/install_fake_driver.sh made")
    })
}

/// One test at a time: copied bytes are counted for the whole process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Pseudo-random numbers.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    fn unit(&mut self) -> f32 {
        self.next() as f32 / 2f32.powi(31)
    }

    /// Often equal to another number, sometimes NaN.
    fn logit(&mut self, all_numbers: bool) -> f32 {
        match self.next() % 400 {
            0 if !all_numbers => f32::NAN,
            1 if !all_numbers => -f32::NAN,
            2 if !all_numbers => f32::INFINITY,
            3 if !all_numbers => f32::NEG_INFINITY,
            4..100 => [0.0, -0.0, 1.5, -2.0, 70.0, -90.0][self.next() as usize % 6],
            _ => self.unit() * 12.0 - 6.0,
        }
    }
}

fn tensor(values: Vec<f32>, shape: &[usize], dtype: DType) -> Tensor {
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// The bits of all values; all NaN are equal.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { u32::MAX } else { value.to_bits() }).collect()
}

fn values(x: &Tensor) -> Vec<f32> {
    let x = x.to_device(&Device::Cpu).unwrap().flatten_all().unwrap();
    x.to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

/// A router and its inputs.
#[derive(Clone, Debug)]
struct Case {
    spec: RouterSpec,
    experts: usize,
    top_k: usize,
    rows: usize,
    seed: u64,
}

prop_compose! {
    fn cases()(
        kind in 0..6,
        normalise in any::<bool>(),
        groups in 1usize..5,
        size in prop_oneof![3 => 1usize..12, 1 => Just(67)],
        top_groups in 1usize..5,
        top_k in 1usize..11,
        rows in 1usize..140,
        seed in any::<u64>(),
    ) -> Case {
        let top_groups = top_groups.min(groups);
        let spec = match kind {
            0 => RouterSpec::SoftmaxTopK { normalise },
            1 => RouterSpec::TopKSoftmax,
            2 => RouterSpec::SigmoidGroups { groups, top_groups, normalise, scale: 2.5 },
            3 => RouterSpec::SigmoidOfInput,
            4 => RouterSpec::SoftmaxGroups { groups, top_groups, scale: 16.0 },
            _ => RouterSpec::NormedSoftmax { eps: 1e-6 },
        };
        Case { spec, experts: groups * size, top_k: top_k.min(top_groups * size), rows, seed }
    }
}

impl Case {
    /// Chooses experts on CPU and GPU from the same logits.
    fn choose(&self, rng: &mut Rng, all_numbers: bool) -> [Choices; 2] {
        let logits: Vec<f32> = (0..self.rows * self.experts).map(|_| rng.logit(all_numbers)).collect();
        let logits = tensor(logits, &[self.rows, self.experts], DType::F32);
        let numbers = (0..self.experts).map(|expert| if expert % 7 == 3 { 1e-39 } else { rng.unit() }).collect();
        let has_numbers = self.spec.correction() || self.spec.scales();
        let numbers = has_numbers.then(|| tensor(numbers, &[self.experts], DType::F32));
        [&Device::Cpu, gpu()].map(|device| {
            let numbers = numbers.as_ref().map(|numbers| numbers.to_device(device).unwrap());
            ffn::choices(self.spec, self.top_k, &logits.to_device(device).unwrap(), numbers.as_ref()).unwrap()
        })
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_same_experts_are_chosen_with_the_same_weights(case in cases()) {
        let _alone = alone();
        let [here, there] = case.choose(&mut Rng(case.seed), false);
        let (here, there) = (here.on_host().unwrap(), there.on_host().unwrap());
        prop_assert_eq!(here.top_k, there.top_k);
        prop_assert_eq!(here.scales_input, there.scales_input);
        prop_assert_eq!(&here.experts, &there.experts);
        prop_assert_eq!(bits(&here.weights), bits(&there.weights));
    }

    #[test]
    fn pairs_loads_and_sums_are_the_same(
        case in cases(),
        tokens in 1usize..50,
        width in prop_oneof![1usize..20, Just(300)],
        dtype in prop::sample::select(vec![DType::F32, DType::BF16, DType::F16]),
    ) {
        let _alone = alone();
        let mut rng = Rng(case.seed);
        let (rows, experts) = (case.rows, case.experts);
        let first_token = 3 * tokens;
        let beside = tensor((0..rows * width).map(|_| rng.unit() - 0.5).collect(), &[rows, width], dtype);
        let routed = |choices, device: &Device| {
            // Its storage is overwritten.
            let out = beside.copy().unwrap().to_device(device).unwrap();
            let sorted = SortedChoices::new(choices, experts, Some(Positions { first_token, tokens })).unwrap();
            Routed::new(out.clone(), sorted, out)
        };
        let [of_cpu, of_gpu] = case.choose(&mut rng, true);
        let (mut here, mut there) = (routed(of_cpu, &Device::Cpu), routed(of_gpu, gpu()));

        let mut stats = [RouterStats::new(experts), RouterStats::new(experts)];
        for (routed, stats) in [&mut here, &mut there].into_iter().zip(&mut stats) {
            match routed.wait().unwrap() {
                Choices::Host(routing) => stats.add(first_token, tokens, routing),
                Choices::Gpu(routing) => stats.add_loads(first_token, tokens, routing).unwrap(),
            }
        }
        prop_assert_eq!(&stats[0], &stats[1]);

        let group = rng.next() as usize % experts..experts;
        let inputs = [&here, &there].map(|routed| Inputs::new(&[routed, routed], &group).unwrap());
        for expert in group.filter(|expert| here.sent(*expert) > 0) {
            let rows = here.sent(expert);
            let piece = |sent: &[(usize, usize)]| [ExpertBatch { expert, sent: sent.into() }];
            let [one, other] = [(&inputs[0], &here), (&inputs[1], &there)].map(|(inputs, routed)| {
                let alone = inputs.gather(&[routed, routed], &piece(&[(1, rows)])).unwrap();
                let both = inputs.gather(&[routed, routed], &piece(&[(0, rows), (1, rows)])).unwrap();
                [values(&alone), values(&both)].map(|values| bits(&values))
            });
            prop_assert_eq!(one, other);
        }

        for expert in 0..experts {
            let sent = here.rows(expert, &beside).unwrap();
            let same = there.rows(expert, &beside).unwrap();
            prop_assert_eq!(&sent.rows, &same.rows);
            prop_assert_eq!(bits(&sent.weights), bits(&same.weights));
            if sent.rows.is_empty() {
                continue;
            }
            let made = (0..sent.rows.len() * width).map(|_| rng.unit() * 3.0 - 1.0).collect();
            let made = tensor(made, &[sent.rows.len(), width], dtype);
            here.add(expert, &made).unwrap();
            there.add(expert, &made.to_device(gpu()).unwrap()).unwrap();
        }
        prop_assert_eq!(bits(&values(&here.finish())), bits(&values(&there.finish())));
    }
}

#[test]
fn what_comes_back_does_not_grow_with_tokens() {
    const EXPERTS: usize = 5;
    let _alone = alone();
    let spec = RouterSpec::SoftmaxTopK { normalise: true };
    for (rows, positions) in [(3, false), (300, false), (3, true), (300, true)] {
        let case = Case { spec, experts: EXPERTS, top_k: 2, rows, seed: 1 };
        let x = tensor(vec![0.0; rows], &[rows, 1], DType::F32).to_device(gpu()).unwrap();
        let before = gpu::traffic();
        let [_, choices] = case.choose(&mut Rng(case.seed), true);
        let positions = positions.then_some(Positions { first_token: 0, tokens: rows });
        let mut routed = Routed::new(x.clone(), SortedChoices::new(choices, EXPERTS, positions).unwrap(), x);
        routed.wait().unwrap();
        // First row of each expert, and 37 numbers per expert if `positions` is given.
        let numbers = EXPERTS + 1 + if positions.is_some() { 37 * EXPERTS } else { 0 };
        assert_eq!(gpu::traffic().since(before).from_gpus, 8 * numbers as u64, "{rows} rows, {positions:?}");
    }
}

/// A feed-forward that looks random, with biases: 0 without a gate, 1 and 2 with one beside, stored
/// as `[out, in]` or the other way around, 3 with both in one.
fn expert(rng: &mut Rng, form: usize, [width, inner]: [usize; 2], dtype: DType) -> MlpWeights {
    let mut linear = |out: usize, input: usize| {
        let mut values = |count: usize, shape: &[usize]| {
            tensor((0..count).map(|_| rng.unit() - 0.5).collect(), shape, dtype).to_device(gpu()).unwrap()
        };
        let bias = values(out, &[out]);
        let stored = if form == 2 { [input, out] } else { [out, input] };
        let weight = values(out * input, &stored);
        Linear::new(if form == 2 { weight.t().unwrap() } else { weight }, Some(bias))
    };
    let (kind, gate_up) = match form {
        0 => (MlpKind::ReluSquared, GateUpProj::Up(linear(inner, width))),
        3 => (MlpKind::Swiglu(GateUp::Interleaved), GateUpProj::Joined(linear(2 * inner, width))),
        _ => {
            let (gate, up) = (linear(inner, width), linear(inner, width));
            (MlpKind::Geglu(GateUp::Separate), GateUpProj::Separate { gate, up })
        }
    };
    MlpWeights { kind, gate_up, down: linear(width, inner) }
}

/// How a wave of one micro-batch, in which each expert gets so many rows, is put together.
fn rows_together(rows: &[usize], weights: &[MlpWeights], width: usize, dtype: DType) -> usize {
    let experts: Vec<u32> = rows.iter().enumerate().flat_map(|(expert, rows)| vec![expert as u32; *rows]).collect();
    let x = tensor(vec![0.0; experts.len() * width], &[experts.len(), width], dtype);
    let routing = ffn::Routing { top_k: 1, weights: vec![1.0; experts.len()], experts, scales_input: false };
    let sorted = SortedChoices::new(Choices::Host(routing), rows.len(), None).unwrap();
    let routed = Routed::new(x.clone(), sorted, x);
    ffn::rows_together(&[&routed], [rows.len(), 1], weights, 1000).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn experts_started_together_make_what_each_makes_alone(
        form in 0usize..4,
        rows in prop::collection::vec(prop_oneof![2 => 0usize..9, 1 => Just(0)], 2..8),
        sizes in (1usize..6, 1usize..6),
        dtype in prop::sample::select(vec![DType::F32, DType::BF16, DType::F16]),
        one_has_all in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let _alone = alone();
        let mut rng = Rng(seed);
        let rows: Vec<usize> = match one_has_all {
            true => (0..rows.len()).map(|expert| if expert == 1 { 13 } else { 0 }).collect(),
            false => rows,
        };
        let at_once = 16 / dtype.size_in_bytes();
        let (width, inner) = (sizes.0 * at_once, sizes.1 * at_once);
        let experts: Vec<MlpWeights> = rows.iter().map(|_| expert(&mut rng, form, [width, inner], dtype)).collect();
        let all: usize = rows.iter().sum();
        prop_assume!(all > 0);
        let x = tensor((0..all * width).map(|_| rng.unit() - 0.5).collect(), &[all, width], dtype);
        let x = x.to_device(gpu()).unwrap();
        let together = ffn::apply_each(&experts.iter().collect::<Vec<_>>(), &x, &rows).unwrap();
        prop_assert_eq!(together.dims(), &[all, width]);
        let mut first = 0;
        for (expert, rows) in experts.iter().zip(&rows).filter(|(_, rows)| **rows > 0) {
            let one = values(&expert.apply(&x.narrow(0, first, *rows).unwrap()).unwrap());
            let same = values(&together.narrow(0, first, *rows).unwrap());
            first += rows;
            // A GPU's library may add up in another order.
            let largest = one.iter().fold(0f32, |most, value| most.max(value.abs()));
            let off = if dtype == DType::F32 { 1e-5 } else { 0.02 };
            prop_assert!(one.iter().zip(&same).all(|(a, b)| (a - b).abs() <= off * largest), "{one:?}, {same:?}");
        }
    }
}

#[test]
fn experts_with_few_rows_are_started_together_where_the_library_takes_their_matrices() {
    let _alone = alone();
    let experts = |[width, inner]: [usize; 2], dtype| -> Vec<MlpWeights> {
        (0..3).map(|seed| expert(&mut Rng(seed), 1, [width, inner], dtype)).collect()
    };
    let put = |rows: &[usize], [width, inner]: [usize; 2], dtype| {
        rows_together(rows, &experts([width, inner], dtype), width, dtype)
    };
    // By the average, not by what one of them gets.
    for (rows, expected) in [([255, 256, 256], 1000), ([256, 256, 256], 0), ([767, 0, 0], 1000), ([0, 0, 768], 0)] {
        assert_eq!(put(&rows, [16, 8], DType::BF16), expected, "{rows:?}");
    }
    // Rows of 16 bytes, or several of them.
    for (sizes, dtype, expected) in
        [([4, 12], DType::F32, 1000), ([12, 8], DType::BF16, 0), ([8, 9], DType::F16, 0), ([8, 8], DType::F16, 1000)]
    {
        assert_eq!(put(&[1, 2, 3], sizes, dtype), expected, "{sizes:?} {dtype:?}");
    }
}

/// Where the emulated GPU writes what was launched.
const LAUNCHES: &str = "OUTLIERS_GPU_LAUNCHES";
/// With 0 its cuBLAS refuses to multiply with several matrices by one call.
const GROUPED: &str = "OUTLIERS_GPU_GROUPED";

#[test]
#[ignore = "the process that the other starts"]
fn multiply_five_experts() {
    if std::env::var_os(LAUNCHES).is_none() {
        return;
    }
    assert_eq!(product::get_ready(&Device::Cpu, DType::BF16, true).unwrap(), None);
    let ready = |dtype| product::get_ready(gpu(), dtype, true).unwrap();
    let refused: Vec<String> = [DType::F32, DType::BF16, DType::F16].into_iter().filter_map(ready).collect();
    // It is asked no more once it has refused.
    assert_eq!(refused.len(), usize::from(std::env::var_os(GROUPED).is_some()), "{refused:?}");
    let mut rng = Rng(1);
    let experts: Vec<MlpWeights> = (0..5).map(|_| expert(&mut rng, 1, [16, 8], DType::BF16)).collect();
    let x = tensor(vec![1.0; 9 * 16], &[9, 16], DType::BF16).to_device(gpu()).unwrap();
    let chosen = vec![0, 0, 2, 2, 2, 3, 4, 4, 4];
    let routing = ffn::Routing { top_k: 1, experts: chosen, weights: vec![1.0; 9], scales_input: false };
    let sorted = SortedChoices::new(Choices::Host(routing), 5, None).unwrap();
    let routed = Routed::new(x.clone(), sorted, x.clone());
    let pieces = ffn::pieces(&[&routed], &(0..5), 100);
    let most = ffn::rows_together(&[&routed], [5, 1], &experts, 8).unwrap();
    let mut first = 0;
    for pieces in ffn::together(&pieces, most) {
        let (rows, experts): (Vec<usize>, Vec<&MlpWeights>) =
            pieces.iter().map(|piece| (piece.rows(), &experts[piece.expert])).unzip();
        let all = rows.iter().sum();
        ffn::apply_each(&experts, &x.narrow(0, first, all).unwrap(), &rows).unwrap();
        first += all;
    }
    assert_eq!(first, 9);
}

/// How often a process that multiplies five experts starts products of several matrices, and of
/// one;
/// `None` where the GPU does not tell.
fn started(environment: &[(&str, &str)]) -> Option<[Option<u64>; 2]> {
    let folder = tempfile::tempdir().unwrap();
    let launches = folder.path().join("launches");
    let mut process = Command::new(std::env::current_exe().unwrap());
    process.args(["--exact", "multiply_five_experts", "--ignored"]).env(LAUNCHES, &launches);
    let output = process.envs(environment.iter().copied()).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
    let Ok(counts) = std::fs::read_to_string(&launches) else {
        eprintln!("NOT checked: this GPU does not tell what was launched on it");
        return None;
    };
    let count = |name: &str| counts.lines().find_map(|line| line.strip_suffix(name)?.trim().parse::<u64>().ok());
    Some([count(" grouped product"), count(" product")])
}

#[test]
fn one_call_multiplies_with_the_matrices_of_several_experts() {
    let Some(counts) = started(&[]) else { return };
    // Three matrices each: of the experts with 2, 3 and 1 rows, and of the one with 3 that would be
    // more than 8 with them. One by one they would be twelve products. Three of each get ready.
    assert_eq!(counts, [Some(3 + 3), Some(3 + 3)]);
}

#[test]
fn experts_are_multiplied_one_by_one_where_the_library_refuses_to_take_several() {
    let Some(counts) = started(&[(GROUPED, "0")]) else { return };
    assert_eq!(counts, [None, Some(12 + 3)]);
}
