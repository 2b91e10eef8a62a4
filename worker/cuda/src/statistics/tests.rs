//! Compares the statistics kernels with the CPU forms, on the fake GPU that runs on the CPU.

use cudarc::driver::CudaContext;
use outliers_scan::Rows;

use super::*;
use crate::tests::test_output;

/// Pseudo-random numbers.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    fn below(&mut self, end: u32) -> u32 {
        self.next() % end
    }
}

/// Rows of many kinds: columns with large values, values equal to the threshold, zeros, tiny and
/// huge values, equal rows.
fn values(rng: &mut Rng, [width, tokens, sequences]: [usize; 3], dtype: &str) -> Vec<f32> {
    let wild: Vec<bool> = (0..width).map(|_| rng.below(4) == 0).collect();
    let mut x = Vec::new();
    for _ in 0..tokens * sequences {
        let kind = rng.below(8);
        x.extend(wild.iter().map(|wild| {
            let unit = rng.next() as f32 / 2f32.powi(31) - 1.0;
            match (kind, rng.below(16)) {
                (0, _) => -0.25,
                (1, 0..12) => 0.0,
                (_, 0) => [6.0, -6.0, 5.9, 0.0, -0.0, 1e-7, -6e4, 3e-5][rng.below(8) as usize],
                _ if *wild => unit * 14.0,
                _ => unit * 2.0,
            }
        }));
    }
    let rounded = |v: f32| match dtype {
        "bf16" => bf16::from_f32(v).to_f32(),
        "f16" => f16::from_f32(v).to_f32(),
        _ => v,
    };
    x.into_iter().map(rounded).collect()
}

/// Calls `see` with values copied to the GPU in their dtype.
fn with<T>(stream: &Arc<CudaStream>, x: &[f32], dtype: &str, see: impl FnOnce(Stored<'_>) -> T) -> T {
    let half = |bits: fn(f32) -> u16| stream.clone_htod(&x.iter().map(|v| bits(*v)).collect::<Vec<_>>()).unwrap();
    // SAFETY: these types are their 16 bits.
    unsafe {
        match dtype {
            "bf16" => see(Stored::Bf16(half(|v| bf16::from_f32(v).to_bits()).transmute(x.len()).unwrap())),
            "f16" => see(Stored::F16(half(|v| f16::from_f32(v).to_bits()).transmute(x.len()).unwrap())),
            _ => see(Stored::F32(stream.clone_htod(x).unwrap().as_view())),
        }
    }
}

/// Compares the statistics of both.
fn compare(stream: &Arc<CudaStream>, rng: &mut Rng, [width, tokens, sequences]: [usize; 3], dtype: &str) {
    let x = values(rng, [width, tokens, sequences], dtype);
    let cpu = Rows { x: &x, width, tokens };
    with(stream, &x, dtype, |stored| {
        let activation = Activation::new(Arc::clone(stream), stored, width, tokens);
        let pending = activation.start_scan(Some(6.0), true).unwrap();
        let gpu = pending.summary(&activation).unwrap();
        let name = format!("{dtype} [{sequences} x {tokens}, {width}]");
        let (scans, found) = (cpu.scan(), gpu.scan().unwrap());
        assert_eq!((found.len(), gpu.rows()), (sequences, cpu.rows()), "{name}");
        for (s, (got, want)) in found.iter().zip(&scans).enumerate() {
            assert_eq!(got.rows, want.rows, "{name}, sequence {s}");
            assert_eq!(got.magnitudes, want.magnitudes, "{name}, sequence {s}");
        }
        assert_eq!(gpu.medians().unwrap(), cpu.medians(&scans), "{name}");
        assert_eq!(gpu.columns(6.0).unwrap(), cpu.columns(6.0), "{name}");
        let floors = [0, 1f32.to_bits(), 6f32.to_bits(), f32::INFINITY.to_bits()];
        let asked: Vec<_> = (0..tokens * sequences).rev().step_by(2).map(|row| (row, floors[row / 2 % 4])).collect();
        assert_eq!(gpu.large(&asked).unwrap(), cpu.large(&asked), "{name}");
    });
}

/// Enqueues several looks before it reads the first, then reads them in the same order.
fn many_at_a_time(stream: &Arc<CudaStream>, rng: &mut Rng) {
    let (width, tokens) = (61, 33);
    let all: Vec<Vec<f32>> = (0..5).map(|_| values(rng, [width, tokens, 1], "f32")).collect();
    let slices: Vec<_> = all.iter().map(|x| stream.clone_htod(x).unwrap()).collect();
    let activation = |x| Activation::new(Arc::clone(stream), Stored::F32(x), width, tokens);
    let activations: Vec<_> = slices.iter().map(|slice| activation(slice.as_view())).collect();
    let scans: Vec<_> = activations.iter().map(|of| of.start_scan(Some(6.0), true).unwrap()).collect();
    // Later work on the stream does not delay the result.
    let later = stream.clone_dtod(&slices[0]).unwrap();
    for ((x, activation), pending) in all.iter().zip(&activations).zip(&scans) {
        let (cpu, gpu) = (Rows { x, width, tokens }, pending.summary(activation).unwrap());
        let scans = cpu.scan();
        assert_eq!(gpu.scan().unwrap()[0].rows, scans[0].rows);
        assert!(pending.is_complete().unwrap());
        assert_eq!(gpu.medians().unwrap(), cpu.medians(&scans));
        assert_eq!(gpu.columns(6.0).unwrap(), cpu.columns(6.0));
        let asked = [(2, 6f32.to_bits()), (7, 0)];
        assert_eq!(gpu.large(&asked).unwrap(), cpu.large(&asked));
    }
    assert_eq!(stream.clone_dtoh(&later).unwrap(), all[0]);
}

#[test]
#[ignore = "the process that the other starts"]
fn look_at_both() {
    crate::find().unwrap();
    let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
    let mut rng = Rng(1);
    let sizes = [[1, 1, 1], [7, 5, 2], [40, 33, 1], [61, 32, 2], [130, 65, 1], [257, 3, 3], [300, 4, 1], [2051, 2, 1]];
    for size in sizes {
        for dtype in ["f32", "bf16", "f16"] {
            compare(&stream, &mut rng, size, dtype);
        }
    }
    // More large values than the initial capacity, and non-finite values.
    let mut x = vec![1.0; 3 * ROOM];
    (x[5], x[ROOM + 3]) = (f32::NAN, f32::NEG_INFINITY);
    with(&stream, &x, "bf16", |stored| {
        let activation = Activation::new(Arc::clone(&stream), stored, ROOM / 2, 3);
        let pending = activation.start_scan(Some(6.0), false).unwrap();
        let gpu = pending.summary(&activation).unwrap();
        assert_eq!(gpu.large(&[(1, 0), (3, 0), (4, 0)]).unwrap().len(), 3 * ROOM / 2);
        let not_finite: Vec<_> = gpu.scan().unwrap().iter().map(Scan::first_not_finite).collect();
        assert_eq!(not_finite, [Some(0), None]);
        assert_eq!(gpu.columns(6.0).unwrap().iter().map(Columns::are_finite).collect::<Vec<_>>(), [false, true]);
        let bits = f32::INFINITY.to_bits();
        let places: Vec<_> = gpu.large(&[(0, bits), (2, bits)]).unwrap().iter().map(|at| (at.row, at.dim)).collect();
        assert_eq!(places, [(0, 5), (2, 3)]);
    });
    with(&stream, &[], "f32", |stored| {
        let activation = Activation::new(Arc::clone(&stream), stored, 4, 0);
        let pending = activation.start_scan(None, true).unwrap();
        let gpu = pending.summary(&activation).unwrap();
        assert!(gpu.scan().unwrap().is_empty() && gpu.medians().unwrap().is_empty());
    });
    many_at_a_time(&stream, &mut rng);
    println!("said: all equal");
}

#[test]
fn kernel_statistics_equal_those_of_the_cpu() {
    let gpu =
        std::env::var("OUTLIERS_GPU").expect("OUTLIERS_GPU names a folder that tests/gpu/install_fake_driver.sh made");
    for delay in ["0", "300"] {
        let environment = [("LD_LIBRARY_PATH", gpu.as_str()), ("OUTLIERS_GPU_DELAY_US", delay)];
        assert_eq!(test_output("statistics::tests::look_at_both", &environment), "all equal", "{delay} us");
    }
}
