//! Compares every format with a simple reference.

use candle_core::Tensor;
use outliers_protocol::FailureKind;
use proptest::prelude::*;

use super::*;

/// e4m3fn from its definition, in f64.
fn e4m3(code: u8) -> f64 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => sign * mantissa / 8.0 * 2f64.powi(-6),
        _ => sign * (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    }
}

/// e2m1 from its definition, in f64.
fn e2m1(code: u8) -> f64 {
    let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
    let mantissa = f64::from(code & 1);
    match code >> 1 & 3 {
        0 => sign * mantissa / 2.0,
        exponent => sign * (1.0 + mantissa / 2.0) * 2f64.powi(i32::from(exponent) - 1),
    }
}

/// The `i`th code of two per byte.
fn nibble(codes: &[u8], i: usize) -> u8 {
    if i.is_multiple_of(2) { codes[i / 2] & 15 } else { codes[i / 2] >> 4 }
}

/// The values by the format's definition, as f32.
fn reference(stored: &Encoded<'_>) -> Vec<f32> {
    match *stored {
        Encoded::Plain { dtype: StoredDtype::F32, bytes } => {
            bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        }
        Encoded::Plain { dtype: StoredDtype::F16, bytes } => {
            bytes.chunks(2).map(|b| f16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
        }
        Encoded::Plain { bytes, .. } => {
            bytes.chunks(2).map(|b| bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
        }
        Encoded::Fp8Blocks { bytes, scales, scale_dtype, shape, block } => {
            let scales = reference(&Encoded::Plain { dtype: scale_dtype, bytes: scales });
            let tile_columns = shape[1].div_ceil(block[1]);
            let value = |(i, &code): (usize, &u8)| {
                let (row, column) = (i / shape[1], i % shape[1]);
                let scale = scales[row / block[0] * tile_columns + column / block[1]];
                // A product of 4 and 24 bits is exact in f64, so this rounds once.
                (e4m3(code) * f64::from(scale)) as f32
            };
            bytes.iter().enumerate().map(value).collect()
        }
        Encoded::Mxfp4 { blocks, scales } => (0..2 * blocks.len())
            .map(|i| {
                let code = if i % 2 == 0 { blocks[i / 2] & 15 } else { blocks[i / 2] >> 4 };
                (e2m1(code) * 2f64.powi(i32::from(scales[i / 32]) - 127)) as f32
            })
            .collect(),
        Encoded::Int4 { codes, scales, scale_dtype, group } => {
            let scales = reference(&Encoded::Plain { dtype: scale_dtype, bytes: scales });
            let value = |i: usize| (f64::from(nibble(codes, i)) - 8.0) * f64::from(scales[i / group]);
            (0..2 * codes.len()).map(|i| value(i) as f32).collect()
        }
        Encoded::Nvfp4 { blocks, scales, whole } => {
            let scale = |i: usize| (e4m3(scales[i / 16]) * f64::from(whole)) as f32;
            (0..2 * blocks.len()).map(|i| (e2m1(nibble(blocks, i)) * f64::from(scale(i))) as f32).collect()
        }
    }
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().unwrap();
    match tensor.dtype() {
        DType::F32 => values.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect(),
        DType::BF16 => values.to_vec1::<bf16>().unwrap().into_iter().map(|v| v.to_bits().into()).collect(),
        _ => values.to_vec1::<f16>().unwrap().into_iter().map(|v| v.to_bits().into()).collect(),
    }
}

/// Decodes to every dtype, to new and existing tensors, and compares bits with the reference. If a
/// dtype cannot represent the reference, expects an error with the tensor's name and the first
/// such element.
fn agrees(stored: &Encoded<'_>, shape: &[usize]) {
    let wide = reference(stored);
    for compute in [DType::F32, DType::BF16, DType::F16] {
        let narrow = |v: &f32| match compute {
            DType::F32 => (v.is_finite(), v.to_bits()),
            DType::BF16 => (bf16::from_f32(*v).is_finite(), bf16::from_f32(*v).to_bits().into()),
            _ => (f16::from_f32(*v).is_finite(), f16::from_f32(*v).to_bits().into()),
        };
        let expected: Vec<(bool, u32)> = wide.iter().map(narrow).collect();
        let found = decode(stored, shape, compute, &Device::Cpu, "a.weight");
        let reused = Tensor::ones(shape, compute, &Device::Cpu).unwrap();
        let in_place = decode_into(stored, &reused, "a.weight");
        if let Some(at) = expected.iter().position(|(finite, _)| !finite) {
            let error = found.unwrap_err();
            assert_eq!(error.kind(), FailureKind::Checkpoint);
            let message = error.message();
            assert!(message.contains("a.weight") && message.contains(&format!("element {at}")), "{at}: {message}");
            assert_eq!(in_place.unwrap_err(), error);
            continue;
        }
        let found = found.unwrap();
        assert_eq!((found.dims(), found.dtype()), (shape, compute));
        in_place.unwrap();
        for values in [bits(&found), bits(&reused)] {
            let wrong = values.iter().zip(&expected).position(|(found, (_, expected))| found != expected);
            assert_eq!(wrong, None, "{compute:?} {shape:?}");
        }
    }
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Random bytes.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let byte = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(byte).take(len).collect()
}

/// Random FP8 codes without NaN.
fn codes(seed: u64, len: usize) -> Vec<u8> {
    noise(seed, len).into_iter().map(|code| if code & 0x7f == 0x7f { code ^ 1 } else { code }).collect()
}

fn fp8<'a>(bytes: &'a [u8], scales: &'a [u8], shape: [usize; 2], block: [usize; 2]) -> Encoded<'a> {
    Encoded::Fp8Blocks { bytes, scales, scale_dtype: &StoredDtype::F32, shape, block }
}

// ------------------------------------------------------------------------------------------- plain

#[test]
fn every_two_byte_float_decodes() {
    for code in 0..=u16::MAX {
        let bytes = code.to_le_bytes();
        for dtype in [StoredDtype::F16, StoredDtype::BF16] {
            // One in eight of the ordinary values, and all special ones.
            let exponent = if dtype == StoredDtype::F16 { code >> 10 & 31 } else { code >> 7 & 255 };
            if code.is_multiple_of(8) || exponent == 0 || code & 0x7f80 == 0x7f80 {
                agrees(&Encoded::Plain { dtype: &dtype, bytes: &bytes }, &[1]);
            }
        }
    }
}

#[test]
fn plain_floats_of_every_length_decode() {
    let finite: Vec<u8> = noise(1, 4 * (TASK + 77)).chunks(2).flat_map(|b| [b[0], b[1] & 0xbb]).collect();
    for dtype in [StoredDtype::F32, StoredDtype::F16, StoredDtype::BF16] {
        let size = dtype.size().unwrap() as usize;
        for n in [0, 1, 2, 15, 16, 17, 31, 33, 1000, TASK - 1, TASK, TASK + 77] {
            agrees(&Encoded::Plain { dtype: &dtype, bytes: &finite[..n * size] }, &[n]);
        }
    }
}

#[test]
fn unaligned_bytes_decode() {
    let bytes: Vec<u8> = std::iter::once(0).chain(f32_bytes(&[1.0, -2.5, 3e-40])).collect();
    agrees(&Encoded::Plain { dtype: &StoredDtype::F32, bytes: &bytes[1..] }, &[3, 1]);
}

#[test]
fn first_non_finite_value_is_named() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = vec![1.0f32; 3 * TASK + 7];
        values[3 * TASK + 1] = bad;
        values[TASK + 3] = bad;
        agrees(&Encoded::Plain { dtype: &StoredDtype::F32, bytes: &f32_bytes(&values) }, &[values.len()]);
        let error = to_f32(&f32_bytes(&values), &StoredDtype::F32, "model.norm.weight").unwrap_err();
        assert!(error.message().contains(&format!("model.norm.weight holds {bad} at element {}", TASK + 3)), "{error}");
    }
}

#[test]
fn overflow_of_a_narrow_dtype_is_refused_with_advice() {
    let tensor = |value: f32, compute| {
        let bytes = value.to_le_bytes();
        decode(&Encoded::Plain { dtype: &StoredDtype::F32, bytes: &bytes }, &[1], compute, &Device::Cpu, "t")
    };
    let error = tensor(70_000.0, DType::F16).unwrap_err();
    assert!(error.message().contains("70000") && error.message().contains("does not fit f16"), "{error}");
    assert!(error.hint_text().is_some_and(|hint| hint.contains("--precision")));
    assert!(tensor(70_000.0, DType::BF16).is_ok() && tensor(f32::MAX, DType::BF16).is_err());
    assert!(tensor(f32::MAX, DType::F32).is_ok());
}

// --------------------------------------------------------------------------------------------- FP8

#[test]
fn every_fp8_code_decodes_under_every_scale_kind() {
    // Powers of two over the whole range, the largest and smallest numbers, and ordinary ones.
    let powers = (-149..128).map(|e| 2f64.powi(e) as f32);
    let ordinary =
        noise(2, 400).chunks(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3] & 0xbb])).collect::<Vec<_>>();
    let others = [0.0, -0.0, -1.0, f32::MAX, f32::MIN_POSITIVE, 1.0 / 3.0, f32::MAX / 448.0, 65_504.0 / 448.0, 146.25];
    for scale in powers.chain(ordinary).chain(others) {
        let scales = f32_bytes(&[scale]);
        // With a table per tile, and code by code.
        let all: Vec<u8> = (0..=255u8).filter(|code| code & 0x7f != 0x7f).cycle().take(254 * 16).collect();
        agrees(&fp8(&all, &scales, [16, 254], [128, 254]), &[16, 254]);
        agrees(&fp8(&all[..254], &scales, [1, 254], [128, 254]), &[254]);
    }
}

#[test]
fn nan_codes_are_named() {
    for nan in [0x7f, 0xff] {
        for (shape, at) in [([1, 1], 0), ([576, 200], 0), ([576, 200], 576 * 200 - 1), ([576, 200], 300 * 200 + 130)] {
            let mut bytes = codes(3, shape[0] * shape[1]);
            bytes[at] = nan;
            let scales = f32_bytes(&vec![0.5; shape[0].div_ceil(128) * shape[1].div_ceil(128)]);
            agrees(&fp8(&bytes, &scales, shape, [128, 128]), &shape);
        }
    }
}

#[test]
fn ragged_scale_grids_decode() {
    let shapes: [[usize; 2]; 8] =
        [[576, 200], [1, 1], [1, 300], [300, 1], [128, 128], [129, 127], [127, 129], [257, 2_305]];
    let blocks = [[128, 128], [1, 128], [128, 1], [3, 5], [64, 256], [1_000, 1_000], [usize::MAX, usize::MAX]];
    for (shape, block) in shapes.iter().flat_map(|shape| blocks.map(|block| (*shape, block))) {
        let tiles = shape[0].div_ceil(block[0]) * shape[1].div_ceil(block[1]);
        let scales = f32_bytes(&(0..tiles).map(|i| (i as f32 + 0.3) * 1e-3).collect::<Vec<_>>());
        agrees(&fp8(&codes(4, shape[0] * shape[1]), &scales, shape, block), &shape);
    }
}

#[test]
fn bf16_scales_are_accepted() {
    let scales: Vec<u8> = [0.01f32, 3.0, -0.5, 7.0].iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
    let (bytes, shape, block) = (codes(5, 200 * 130), [200, 130], [128, 128]);
    agrees(
        &Encoded::Fp8Blocks { bytes: &bytes, scales: &scales, scale_dtype: &StoredDtype::BF16, shape, block },
        &shape,
    );
}

#[test]
fn tile_with_partial_overflow_is_checked_per_value() {
    // 448 * 200 overflows f16, 300 * 200 does not.
    let bytes = [0x70; 128 * 128].map(|code: u8| code ^ 0x07);
    assert!(e4m3(bytes[0]) * 200.0 < 65_504.0 && e4m3(0x7e) * 200.0 > 65_504.0);
    agrees(&fp8(&bytes, &f32_bytes(&[200.0]), [128, 128], [128, 128]), &[128, 128]);
}

#[test]
fn non_finite_scales_are_named() {
    for bad in [f32::NAN, f32::INFINITY] {
        let scales = f32_bytes(&[1.0, 1.0, bad, 1.0]);
        // Also if all codes are zero.
        let error =
            decode(&fp8(&[0; 200 * 130], &scales, [200, 130], [128, 128]), &[200, 130], DType::F32, &Device::Cpu, "w");
        let message = error.unwrap_err().message().to_owned();
        assert!(message.contains("scales of w") && message.contains("element 2"), "{message}");
    }
}

proptest! {
    #[test]
    fn any_scale_grid_decodes(
        rows in 0usize..40, columns in 0usize..90, height in 1usize..50, width in 1usize..50, seed: u64,
    ) {
        let tiles = rows.div_ceil(height) * columns.div_ceil(width);
        let scales: Vec<f32> = noise(seed, tiles).into_iter().map(|b| f32::from(b) / 100.0 - 1.0).collect();
        agrees(&fp8(&codes(seed, rows * columns), &f32_bytes(&scales), [rows, columns], [height, width]), &[rows, columns]);
    }
}

// ------------------------------------------------------------------------------------------- MXFP4

#[test]
fn every_mxfp4_code_decodes_under_every_scale() {
    let blocks: Vec<u8> = (0..16).map(|i: u8| (i << 4) | (15 - i)).collect();
    for scale in 0..255u8 {
        agrees(&Encoded::Mxfp4 { blocks: &blocks, scales: &[scale] }, &[32]);
        // Each byte separately, so that every value that does not fit is found.
        for byte in [0x00, 0x11, 0x72, 0x27, 0x23, 0x34, 0xf0] {
            agrees(&Encoded::Mxfp4 { blocks: &[byte; 16], scales: &[scale] }, &[1, 32]);
        }
    }
}

#[test]
fn every_mxfp4_scale_in_one_tensor_decodes() {
    let scales: Vec<u8> = (0..=252u8).cycle().take(3 * TASK / 32 + 5).collect();
    let blocks = noise(6, scales.len() * 16);
    agrees(&Encoded::Mxfp4 { blocks: &blocks, scales: &scales }, &[scales.len(), 32]);
}

#[test]
fn slice_of_a_stack_equals_that_part_of_the_whole() {
    let (experts, rows, columns) = (3, 20, 96);
    let blocks = noise(7, experts * rows * columns / 2);
    let scales: Vec<u8> = noise(8, experts * rows * columns / 32).into_iter().map(|b| 110 + b % 20).collect();
    let tensor = |blocks, scales, shape: &[usize]| {
        decode(&Encoded::Mxfp4 { blocks, scales }, shape, DType::BF16, &Device::Cpu, "experts").unwrap()
    };
    let whole = tensor(&blocks, &scales, &[experts, rows, columns]);
    for expert in 0..experts {
        let part = tensor(
            &blocks[expert * rows * columns / 2..][..rows * columns / 2],
            &scales[expert * rows * columns / 32..][..rows * columns / 32],
            &[rows, columns],
        );
        assert_eq!(bits(&part), bits(&whole.get(expert).unwrap()));
    }
}

#[test]
fn nan_scale_is_named() {
    let error = decode(
        &Encoded::Mxfp4 { blocks: &[0; 48], scales: &[127, 255, 255] },
        &[3, 32],
        DType::BF16,
        &Device::Cpu,
        "mlp.experts.down_proj",
    );
    let message = error.unwrap_err().message().to_owned();
    assert!(message.contains("mlp.experts.down_proj") && message.contains("scale 1"), "{message}");
}

proptest! {
    #[test]
    fn any_blocks_decode(blocks in 0usize..70, seed: u64) {
        let scales: Vec<u8> = noise(seed, blocks).into_iter().map(|scale| scale.min(254)).collect();
        agrees(&Encoded::Mxfp4 { blocks: &noise(!seed, 16 * blocks), scales: &scales }, &[blocks, 32]);
    }
}

// ------------------------------------------------------------------------------ INT4

fn int4<'a>(codes: &'a [u8], scales: &'a [u8], group: usize) -> Encoded<'a> {
    Encoded::Int4 { codes, scales, scale_dtype: &StoredDtype::F32, group }
}

#[test]
fn every_int4_code_decodes_under_every_scale_kind() {
    let codes: Vec<u8> = (0..16).map(|i: u8| (i << 4) | (15 - i)).collect();
    let powers = (-149..128).map(|e| 2f64.powi(e) as f32);
    let others = [0.0, -1.0, 1.0 / 3.0, f32::MAX, f32::MAX / 8.0, 65_504.0 / 8.0, 8_189.0, 9_000.0];
    for scale in powers.chain(others) {
        let scales = f32_bytes(&[scale]);
        agrees(&int4(&codes, &scales, 32), &[1, 32]);
        // Zeros fit with any scale.
        agrees(&int4(&[0x88; 16], &scales, 32), &[32]);
    }
}

#[test]
fn f16_group_scales_are_accepted_and_non_finite_ones_named() {
    for (scale_dtype, halves) in [(StoredDtype::BF16, 0x3f80_u16), (StoredDtype::F16, 0x3c01)] {
        let scales: Vec<u8> = (0..6).flat_map(|i| (halves + i).to_le_bytes()).collect();
        let codes = noise(9, 6 * 16);
        agrees(&Encoded::Int4 { codes: &codes, scales: &scales, scale_dtype: &scale_dtype, group: 32 }, &[3, 64]);
    }
    let scales = f32_bytes(&[1.0, f32::NAN]);
    let error = decode(&int4(&[0; 32], &scales, 32), &[64], DType::F32, &Device::Cpu, "w").unwrap_err();
    assert!(error.message().contains("scales of w") && error.message().contains("element 1"), "{error}");
}

#[test]
fn packed_words_are_little_endian_in_values() {
    // -8, -7 .. -1 and 0, 1 .. 7 as packed by compressed-tensors.
    let words = [0x7654_3210_u32, 0xfedc_ba98];
    let codes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let scales = f32_bytes(&[0.5, 2.0]);
    let found = decode(&int4(&codes, &scales, 8), &[2, 8], DType::F32, &Device::Cpu, "w").unwrap();
    let want = [[-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5], [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0f32]];
    assert_eq!(found.to_vec2::<f32>().unwrap(), want);
}

proptest! {
    #[test]
    fn any_groups_decode(groups in 0usize..90, half in 1usize..70, seed: u64) {
        let scales: Vec<f32> = noise(seed, groups).into_iter().map(|b| f32::from(b) / 100.0 - 1.0).collect();
        agrees(&int4(&noise(!seed, half * groups), &f32_bytes(&scales), 2 * half), &[groups, 2 * half]);
    }
}

// ------------------------------------------------------------------------------ NVFP4

#[test]
fn every_nvfp4_code_decodes_under_every_scale() {
    let blocks: Vec<u8> = (0..8).map(|i: u8| (i << 4) | (15 - i)).collect();
    for whole in [1.0, 1.0 / 3.0, 2f32.powi(-100), 40.0, 1e36, f32::MAX, 0.0, f32::NAN] {
        for scale in 0..=255u8 {
            agrees(&Encoded::Nvfp4 { blocks: &blocks, scales: &[scale], whole }, &[16]);
            for byte in [0x00, 0x72, 0x23] {
                agrees(&Encoded::Nvfp4 { blocks: &[byte; 8], scales: &[scale], whole }, &[1, 16]);
            }
        }
    }
}

proptest! {
    #[test]
    fn any_nvfp4_blocks_decode(blocks in 0usize..130, whole in -2f32..2.0, seed: u64) {
        let (nibbles, scales) = (noise(!seed, 8 * blocks), codes(seed, blocks));
        agrees(&Encoded::Nvfp4 { blocks: &nibbles, scales: &scales, whole }, &[blocks, 16]);
    }
}

// ---------------------------------------------------------------------------------------- refusals

#[test]
fn byte_lengths_must_match_the_shape() {
    let refused = |stored: &Encoded<'_>, shape: &[usize], kind: FailureKind| {
        let error = decode(stored, shape, DType::F32, &Device::Cpu, "w").unwrap_err();
        assert!(error.kind() == kind && error.message().contains("tensor w"), "{error}");
    };
    let zeros = vec![0; 4096];
    fn plain<'a>(dtype: &'a StoredDtype, bytes: &'a [u8]) -> Encoded<'a> {
        Encoded::Plain { dtype, bytes }
    }
    refused(&plain(&StoredDtype::F32, &zeros[..7]), &[2], FailureKind::Checkpoint);
    refused(&plain(&StoredDtype::BF16, &zeros[..8]), &[2, 3], FailureKind::Checkpoint);
    refused(&plain(&StoredDtype::BF16, &zeros[..8]), &[usize::MAX, 3], FailureKind::Checkpoint);
    for other in [StoredDtype::F64, StoredDtype::I32, StoredDtype::F8E4M3, StoredDtype::Other("F6".to_owned())] {
        refused(&plain(&other, &zeros[..8]), &[1], FailureKind::Unsupported);
        assert!(to_f32(&zeros[..8], &other, "w").is_err() && !can_decode(&other));
    }
    refused(&fp8(&zeros[..400], &zeros[..4], [200, 2], [128, 128]), &[200, 2], FailureKind::Checkpoint);
    refused(&fp8(&zeros[..400], &zeros[..12], [200, 2], [128, 128]), &[200, 2], FailureKind::Checkpoint);
    refused(&fp8(&zeros[..399], &zeros[..8], [200, 2], [128, 128]), &[200, 2], FailureKind::Checkpoint);
    refused(&fp8(&zeros[..400], &zeros[..8], [200, 2], [0, 128]), &[200, 2], FailureKind::Internal);
    refused(&fp8(&zeros[..400], &zeros[..8], [200, 2], [128, 128]), &[200, 3], FailureKind::Internal);
    let scale_dtype = &StoredDtype::F16;
    let exponents = Encoded::Fp8Blocks { bytes: &[0], scales: &[0, 0], scale_dtype, shape: [1, 1], block: [128, 128] };
    refused(&exponents, &[1, 1], FailureKind::Unsupported);
    refused(&Encoded::Mxfp4 { blocks: &zeros[..16], scales: &zeros[..2] }, &[32], FailureKind::Checkpoint);
    refused(&Encoded::Mxfp4 { blocks: &zeros[..15], scales: &zeros[..1] }, &[32], FailureKind::Checkpoint);
    refused(&Encoded::Mxfp4 { blocks: &zeros[..15], scales: &zeros[..1] }, &[30], FailureKind::Checkpoint);
    refused(&int4(&zeros[..16], &zeros[..8], 32), &[32], FailureKind::Checkpoint);
    refused(&int4(&zeros[..15], &zeros[..4], 32), &[32], FailureKind::Checkpoint);
    refused(&int4(&zeros[..15], &zeros[..4], 32), &[30], FailureKind::Checkpoint);
    refused(&int4(&zeros[..3], &zeros[..8], 3), &[6], FailureKind::Internal);
    let words = Encoded::Int4 { codes: &zeros[..16], scales: &zeros[..4], scale_dtype: &StoredDtype::I32, group: 32 };
    refused(&words, &[32], FailureKind::Unsupported);
    let sixteenths = |blocks, scales| Encoded::Nvfp4 { blocks, scales, whole: 1.0 };
    refused(&sixteenths(&zeros[..8], &zeros[..2]), &[16], FailureKind::Checkpoint);
    refused(&sixteenths(&zeros[..7], &zeros[..1]), &[16], FailureKind::Checkpoint);
    refused(&sixteenths(&zeros[..7], &zeros[..1]), &[14], FailureKind::Checkpoint);
}

#[test]
fn lengths_and_scales_are_checked_without_decoding() {
    let (zeros, infinite, nan) = (vec![0; 64], f32_bytes(&[1.0, f32::INFINITY]), f32_bytes(&[f32::NAN, 1.0]));
    let alike = |stored: &Encoded<'_>, shape: &[usize]| {
        let decoded = decode(stored, shape, DType::F32, &Device::Cpu, "w").unwrap_err();
        assert_eq!(check(stored, shape, "w").unwrap_err(), decoded);
    };
    alike(&fp8(&zeros, &infinite, [2, 32], [1, 32]), &[2, 32]);
    alike(&fp8(&zeros[1..], &infinite, [2, 32], [1, 32]), &[2, 32]);
    let powers = Encoded::Fp8Blocks {
        bytes: &zeros,
        scales: &[127, 255],
        scale_dtype: &StoredDtype::F8E8M0,
        shape: [2, 32],
        block: [1, 32],
    };
    alike(&powers, &[2, 32]);
    alike(&Encoded::Mxfp4 { blocks: &zeros[..32], scales: &[1, 255] }, &[64]);
    alike(&int4(&zeros[..32], &nan, 32), &[64]);
    let (codes, scales) = ([0xff; 64], f32_bytes(&[1.0, 2.0]));
    let no_numbers = fp8(&codes, &scales, [2, 32], [1, 32]);
    assert!(check(&no_numbers, &[64], "w").is_ok());
    assert!(decode(&no_numbers, &[64], DType::F32, &Device::Cpu, "w").is_err());
}

#[test]
fn decoding_requires_a_contiguous_target() {
    let square = Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap();
    let bytes = f32_bytes(&[1.0, 2.0, 3.0, 4.0]);
    let stored = Encoded::Plain { dtype: &StoredDtype::F32, bytes: &bytes };
    assert!(decode_into(&stored, &square.t().unwrap(), "w").is_err());
    let half = square.narrow(0, 1, 1).unwrap();
    decode_into(&Encoded::Plain { dtype: &StoredDtype::F32, bytes: &bytes[..8] }, &half, "w").unwrap();
    assert_eq!(square.to_vec2::<f32>().unwrap(), [[0.0, 0.0], [1.0, 2.0]]);
}
