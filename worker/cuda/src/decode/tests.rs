//! Compares the decoding kernels with the CPU forms, on the fake GPU that runs on the CPU.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use cudarc::driver::{CudaContext, DevicePtrMut};
use outliers_worker::checkpoint::dtype::{self, Encoded};
use outliers_worker::checkpoint::safetensors::StoredDtype;

use super::*;
use crate::staging::{OutOfRangeValue, Staging};
use crate::tests::test_output;

/// A stream that computes, and the way there.
struct Gpu {
    compute: Arc<CudaStream>,
    staging: Staging,
}

/// Bytes without a pattern.
fn noise(seed: usize, len: usize) -> Vec<u8> {
    let mut state = seed as u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// FP8 E4M3 codes without NaN.
fn numbers(seed: usize, len: usize) -> Vec<u8> {
    noise(seed, len).into_iter().map(|code| if code & 0x7f == 0x7f { 0x3c } else { code }).collect()
}

/// Scales that are finite in every storage format.
fn scales(seed: usize, count: usize, stored: Number) -> Vec<u8> {
    let float = |byte: u8| (f32::from(byte) - 100.0) * 1e-3;
    let of = |byte: u8| match stored {
        Number::F32 => float(byte).to_le_bytes().to_vec(),
        Number::F16 => f16::from_f32(float(byte)).to_le_bytes().to_vec(),
        Number::Bf16 => bf16::from_f32(float(byte)).to_le_bytes().to_vec(),
        Number::E8m0 | Number::E4m3 => vec![110 + byte % 30],
    };
    noise(seed, count).into_iter().flat_map(of).collect()
}

fn dtype_of(number: Number) -> &'static StoredDtype {
    match number {
        Number::F32 => &StoredDtype::F32,
        Number::F16 => &StoredDtype::F16,
        Number::Bf16 => &StoredDtype::BF16,
        Number::E8m0 => &StoredDtype::F8E8M0,
        Number::E4m3 => &StoredDtype::F8E4M3,
    }
}

/// The CPU's values, little-endian.
fn bytes(tensor: &Tensor) -> Vec<u8> {
    let values = tensor.flatten_all().unwrap();
    match tensor.dtype() {
        DType::F32 => values.to_vec1::<f32>().unwrap().into_iter().flat_map(f32::to_le_bytes).collect(),
        DType::BF16 => values.to_vec1::<bf16>().unwrap().into_iter().flat_map(bf16::to_le_bytes).collect(),
        _ => values.to_vec1::<f16>().unwrap().into_iter().flat_map(f16::to_le_bytes).collect(),
    }
}

/// The GPU's values and the note about them, decoded in pieces of the given number of bytes.
fn in_pieces<T: Value>(gpu: &Gpu, stored: StoredTensor<'_>, count: usize, room: usize) -> (Vec<u8>, u64) {
    let stream = &gpu.compute;
    let mut values = stream.alloc_zeros::<u8>(count * size_of::<T>()).unwrap();
    let mut note = stream.alloc_zeros::<u64>(1).unwrap();
    for piece in stored.form.pieces(count, room) {
        let mut copied = vec![0; piece.bytes()];
        piece.copy(&stored, &mut copied);
        let mut copied = stream.clone_htod(&copied).unwrap();
        let first = (piece.values().start * size_of::<T>()) as CUdeviceptr;
        let places = DecodeAddresses {
            stored: copied.device_ptr_mut(stream).0,
            values: values.device_ptr_mut(stream).0 + first,
            note: note.device_ptr_mut(stream).0,
        };
        // SAFETY: as large as the piece is, and of this stream.
        unsafe { stored.form.launch::<T>(stream, &piece, places, piece.values().start) }.unwrap();
    }
    (stream.clone_dtoh(&values).unwrap(), stream.clone_dtoh(&note).unwrap()[0])
}

fn compare_as<T: Value>(
    gpu: &mut Gpu,
    encoded: &Encoded<'_>,
    stored: StoredTensor<'_>,
    shape: &[usize],
    compute: DType,
) {
    let (name, count) = (format!("{:?} {shape:?} to {compute:?}", stored.form), shape.iter().product());
    let values = gpu.staging.decode::<T>(stored, count, "w").unwrap();
    let misfit = gpu.staging.upload_fence().unwrap().wait().unwrap();
    let (cut, note) = in_pieces::<T>(gpu, stored, count, 100);
    match dtype::decode(encoded, shape, compute, &Device::Cpu, "w") {
        Ok(want) => {
            assert_eq!((misfit, note), (None, 0), "{name}");
            // SAFETY: bytes may be anything.
            let found = unsafe { values.transmute::<u8>(count * size_of::<T>()) }.unwrap();
            let (found, want) = (gpu.compute.clone_dtoh(&found).unwrap(), bytes(&want));
            for found in [found, cut] {
                let wrong = found.iter().zip(&want).position(|(found, want)| found != want);
                assert_eq!((found.len(), wrong), (want.len(), None), "{name}");
            }
        }
        Err(error) => {
            let misfit = misfit.unwrap_or_else(|| panic!("{name}: the CPU says {error}"));
            assert_eq!((!note >> 32, f32::from_bits(!note as u32).is_nan()), (misfit.at as u64, misfit.value.is_nan()));
            let OutOfRangeValue { tensor, at, value, dtype } = misfit;
            assert_eq!(dtype::misfit(&tensor, at, value, dtype), error, "{name}");
        }
    }
}

/// Decodes with CPU and GPU to every dtype and compares.
fn compare(gpu: &mut Gpu, encoded: &Encoded<'_>, stored: StoredTensor<'_>, shape: &[usize]) {
    compare_as::<f32>(gpu, encoded, stored, shape, DType::F32);
    compare_as::<bf16>(gpu, encoded, stored, shape, DType::BF16);
    compare_as::<f16>(gpu, encoded, stored, shape, DType::F16);
}

fn plain(gpu: &mut Gpu, number: Number, codes: &[u8]) {
    let encoded = Encoded::Plain { dtype: dtype_of(number), bytes: codes };
    let stored = StoredTensor { form: Form::Plain(number), codes, scales: &[] };
    compare(gpu, &encoded, stored, &[codes.len() / number.size()]);
}

fn tiles(gpu: &mut Gpu, codes: &[u8], scales: &[u8], number: Number, shape: [usize; 2], block: [usize; 2]) {
    let encoded = Encoded::Fp8Blocks { bytes: codes, scales, scale_dtype: dtype_of(number), shape, block };
    let tile = [block[0].min(shape[0]), block[1].min(shape[1])];
    let form = Form::Tiles { scales: number, columns: shape[1], tile };
    compare(gpu, &encoded, StoredTensor { form, codes, scales }, &shape);
}

fn mxfp4(gpu: &mut Gpu, codes: &[u8], scales: &[u8]) {
    let form = Form::Pairs { codes: Codes::Floats, scales: Number::E8m0, whole: 1.0, group: 32 };
    let stored = StoredTensor { form, codes, scales };
    compare(gpu, &Encoded::Mxfp4 { blocks: codes, scales }, stored, &[scales.len(), 32]);
}

fn nvfp4(gpu: &mut Gpu, codes: &[u8], scales: &[u8], whole: f32) {
    let form = Form::Pairs { codes: Codes::Floats, scales: Number::E4m3, whole, group: 16 };
    let stored = StoredTensor { form, codes, scales };
    compare(gpu, &Encoded::Nvfp4 { blocks: codes, scales, whole }, stored, &[scales.len(), 16]);
}

#[test]
#[ignore = "the process that the other starts"]
fn decode_with_both() {
    crate::find().unwrap();
    let compute = CudaContext::new(0).unwrap().new_stream().unwrap();
    let gpu = &mut Gpu { staging: Staging::new(Arc::clone(&compute)).unwrap(), compute };
    for (number, count) in [Number::F32, Number::F16, Number::Bf16].into_iter().zip([1, 255, 1009]) {
        for count in [count, count + 1, 3 * count] {
            let mut codes = noise(count, count * number.size());
            // All are finite, some tiny.
            codes.iter_mut().skip(number.size() - 1).step_by(number.size()).for_each(|high| *high &= 0xbf);
            plain(gpu, number, &codes);
            // Some of these are NaN.
            plain(gpu, number, &noise(count, count * number.size()));
        }
    }
    // Values at both sides of the limit from which one dtype rounds to infinity.
    let edges = [65_519.996, 65_520.0, 3.39e38, f32::MAX, f32::INFINITY, f32::NAN];
    for edge in edges {
        let codes: Vec<u8> = [1.0, -edge, edge, 2.0].iter().flat_map(|value| value.to_le_bytes()).collect();
        plain(gpu, Number::F32, &codes);
    }

    let all: Vec<u8> = (0..=255).filter(|code| code & 0x7f != 0x7f).collect();
    tiles(gpu, &all, &1.0f32.to_le_bytes(), Number::F32, [2, 127], [2, 127]);
    for (shape, block) in [
        ([1, 1], [128, 128]),
        ([300, 1], [128, 128]),
        ([129, 127], [128, 128]),
        ([67, 70], [32, 32]),
        ([40, 33], [1, 33]),
        ([7, 130], [7, 130]),
        ([9, 41], [usize::MAX, 5]),
    ] {
        let count = shape[0] * shape[1];
        let of_rows = usize::div_ceil(shape[0], block[0].min(shape[0]));
        let tile_count = of_rows * usize::div_ceil(shape[1], block[1]);
        for number in [Number::F32, Number::Bf16, Number::E8m0] {
            let scales = scales(count, tile_count, number);
            tiles(gpu, &numbers(count, count), &scales, number, shape, block);
        }
        // Too large for one dtype, or for all dtypes.
        for scale in [200f32, 1e36] {
            let scales = scale.to_le_bytes().repeat(tile_count);
            tiles(gpu, &numbers(count, count), &scales, Number::F32, shape, block);
        }
        let mut codes = numbers(count, count);
        codes[count / 2] = 0xff;
        tiles(gpu, &codes, &1f32.to_le_bytes().repeat(tile_count), Number::F32, shape, block);
    }

    let nibbles: Vec<u8> = (0..16).map(|i: u8| i << 4 | (15 - i)).collect();
    for scale in [0, 1, 3, 100, 127, 140, 200, 252, 253, 254] {
        mxfp4(gpu, &nibbles, &[scale]);
    }
    for count in [1, 3, 71] {
        mxfp4(gpu, &noise(count, 16 * count), &scales(count, count, Number::E8m0));
        for whole in [1.0 / 3.0, -2f32.powi(-100), 0.0, 1e36, f32::NAN] {
            nvfp4(gpu, &noise(count, 8 * count), &numbers(count, count), whole);
        }
        nvfp4(gpu, &noise(count, 8 * count), &[0x7f_u8].repeat(count), 1.0);
        for (number, group) in [(Number::F32, 2), (Number::F16, 6), (Number::Bf16, 32), (Number::F32, 130)] {
            let (codes, scales) = (noise(count, count * group / 2), scales(count, count, number));
            let form = Form::Pairs { codes: Codes::Integers, scales: number, whole: 1.0, group };
            let encoded = Encoded::Int4 { codes: &codes, scales: &scales, scale_dtype: dtype_of(number), group };
            compare(gpu, &encoded, StoredTensor { form, codes: &codes, scales: &scales }, &[count, group]);
        }
    }
    println!("said: all equal");
}

#[test]
fn kernels_decode_as_the_cpu_does() {
    let gpu =
        std::env::var("OUTLIERS_GPU").expect("OUTLIERS_GPU names a folder that tests/gpu/install_fake_driver.sh made");
    for delay in ["0", "300"] {
        let environment = [("LD_LIBRARY_PATH", gpu.as_str()), ("OUTLIERS_GPU_DELAY_US", delay)];
        assert_eq!(test_output("decode::tests::decode_with_both", &environment), "all equal", "{delay} us");
    }
}

#[test]
fn tensors_are_split_at_scale_boundaries() {
    let (codes, scales) = (noise(1, 7 * 40), noise(2, 3 * 2));
    let form = Form::Tiles { scales: Number::E8m0, columns: 40, tile: [3, 20] };
    let pieces: Vec<_> = form.pieces(7 * 40, 100).collect();
    assert_eq!(pieces.iter().map(EncodedChunk::values).collect::<Vec<_>>(), [0..80, 80..160, 160..240, 240..280]);
    assert_eq!(pieces[1].scales, 0..4, "rows 2 and 3 are of two rows of tiles");
    let mut bytes = vec![0; pieces[3].bytes()];
    pieces[3].copy(&StoredTensor { form, codes: &codes, scales: &scales }, &mut bytes);
    assert_eq!((&bytes[..40], &bytes[48..]), (&codes[240..], &scales[4..]));
    let form = Form::Pairs { codes: Codes::Integers, scales: Number::E8m0, whole: 1.0, group: 64 };
    assert_eq!(
        form.pieces(192, 10).map(|piece| piece.values()).collect::<Vec<_>>(),
        [0..64, 64..128, 128..192],
        "groups are whole"
    );
}
