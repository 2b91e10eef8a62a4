//! Measures how fast stored bytes are decoded, compared with copying and reading memory.

use std::fmt;
use std::hint::black_box;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use serde::Serialize;

use super::{fastest, giga};
use crate::checkpoint::dtype::{self, Encoded};
use crate::checkpoint::safetensors::StoredDtype;
use crate::device::gpu::HostToDevice;
use crate::error::{Result, WorkerError};

/// Columns of the synthetic matrix.
const COLUMNS: usize = 4096;

/// Bytes that a thread copies or reads at a time.
const PIECE: usize = 1 << 18;

/// Result of [`decode`].
#[derive(Clone, Debug, Serialize)]
pub struct DecodeTable {
    /// Values decoded.
    pub values: usize,
    /// Threads that shared the work.
    pub threads: usize,
    /// GB/s read and written by copying memory with all threads.
    pub copy_gb_per_second: f64,
    /// GB/s read by adding up memory with all threads.
    pub read_gb_per_second: f64,
    /// One row per format and dtype.
    pub rows: Vec<DecodeRow>,
}

/// A format decoded to a dtype.
#[derive(Clone, Debug, Serialize)]
pub struct DecodeRow {
    /// Name of the format.
    pub stored: &'static str,
    /// Name of the dtype.
    pub into: &'static str,
    /// 10^9 values per second into an existing tensor; on a GPU into a new one, including the
    /// upload of the stored bytes.
    pub g_values_per_second: f64,
    /// GB/s of stored bytes.
    pub stored_gb_per_second: f64,
    /// Bytes read and written per second, over those of a copy.
    pub of_copy: f64,
    /// 10^9 values per second into a new tensor.
    pub new_tensor_g_values_per_second: f64,
}

impl fmt::Display for DecodeTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (copy, read) = (self.copy_gb_per_second, self.read_gb_per_second);
        writeln!(
            f,
            "{} values, {} threads; this machine copies at {copy:.1} GB/s (read and written) and reads at {read:.1} GB/s",
            self.values, self.threads
        )?;
        writeln!(
            f,
            "{:<16} {:<5} {:>11} {:>12} {:>8} {:>23}",
            "stored", "into", "G values/s", "stored GB/s", "of copy", "new tensor G values/s"
        )?;
        for r in &self.rows {
            let (values, stored, new) =
                (r.g_values_per_second, r.stored_gb_per_second, r.new_tensor_g_values_per_second);
            writeln!(
                f,
                "{:<16} {:<5} {values:>11.2} {stored:>12.2} {:>7.0}% {new:>23.2}",
                r.stored,
                r.into,
                100.0 * r.of_copy
            )?;
        }
        Ok(())
    }
}

/// Decodes a synthetic matrix of `values` (rounded up to whole rows) from every format to f32 and
/// bf16 on `device`. The fastest of `rounds` counts.
///
/// # Errors
/// Job: `values` exceeds memory. Internal: a decoder refused valid input. Errors of the driver.
pub fn decode(values: usize, rounds: usize, device: &Device) -> Result<DecodeTable> {
    decode_some(values, rounds, device, |_, _| true)
}

/// As [`decode`], for the named formats and dtypes only.
///
/// # Errors
/// As [`decode`].
pub fn decode_some(
    values: usize,
    rounds: usize,
    device: &Device,
    is_wanted: impl Fn(&str, DType) -> bool,
) -> Result<DecodeTable> {
    let shape = [values.div_ceil(COLUMNS).max(1), COLUMNS];
    let too_many = || WorkerError::job(format!("--values {values} is more than memory holds"));
    let values = shape[0].checked_mul(4 * COLUMNS).map(|bytes| bytes / 4).ok_or_else(too_many)?;
    let (copy_gb_per_second, read_gb_per_second) = ceilings(4 * values, rounds);
    let (mut rows, mut host_to_device) = (Vec::new(), HostToDevice::to(device)?);
    // One sample at a time, to fit small machines.
    for stored in STORED.into_iter().map(|kind| sample(kind, values)) {
        let dtypes = [("f32", DType::F32), ("bf16", DType::BF16)];
        for (into, compute) in dtypes.into_iter().filter(|(_, compute)| is_wanted(stored.name, *compute)) {
            let encoded = stored.encoded(shape);
            let (there, new) = match &mut host_to_device {
                None => on_cpu(&encoded, shape, compute, rounds)?,
                Some(way) => {
                    let seconds = fastest(rounds, || bring(way, &encoded, shape, compute))?;
                    (seconds, seconds)
                }
            };
            let moved = stored.len() + values * compute.size_in_bytes();
            rows.push(DecodeRow {
                stored: stored.name,
                into,
                g_values_per_second: giga(values, there),
                stored_gb_per_second: giga(stored.len(), there),
                of_copy: giga(moved, there) / copy_gb_per_second,
                new_tensor_g_values_per_second: giga(values, new),
            });
        }
    }
    let threads = rayon::current_num_threads();
    Ok(DecodeTable { values, threads, copy_gb_per_second, read_gb_per_second, rows })
}

/// Name of the synthetic matrix.
const NAME: &str = "made up";

/// Seconds of decoding into an existing tensor, and into a new one.
fn on_cpu(encoded: &Encoded<'_>, shape: [usize; 2], compute: DType, rounds: usize) -> Result<(f64, f64)> {
    let reused = Tensor::ones(&shape, compute, &Device::Cpu)?;
    let there = fastest(rounds, || dtype::decode_into(encoded, &reused, NAME))?;
    let new = || dtype::decode(encoded, &shape, compute, &Device::Cpu, NAME).map(|tensor| drop(black_box(tensor)));
    Ok((there, fastest(rounds, new)?))
}

/// Decodes on a GPU and waits for the result.
fn bring(way: &mut HostToDevice, encoded: &Encoded<'_>, shape: [usize; 2], compute: DType) -> Result<()> {
    let tensor = way.decode(encoded, &shape, compute, NAME)?;
    way.upload_fence()?.wait()?;
    drop(tensor);
    Ok(())
}

/// GB/s of copying `bytes` (read and written) and of reading them, with all threads in allocated
/// memory.
fn ceilings(bytes: usize, rounds: usize) -> (f64, f64) {
    let from = vec![1u8; bytes];
    let mut to = vec![2u8; bytes];
    let copy = fastest(rounds, || {
        to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
        black_box(&mut to);
        Ok(())
    });
    let add = |sum: u64, word: &[u8; 8]| sum.wrapping_add(u64::from_le_bytes(*word));
    let read = fastest(rounds, || {
        let sums = from.par_chunks(PIECE).map(|piece| piece.as_chunks().0.iter().fold(0, add));
        let sum = sums.reduce(|| 0, u64::wrapping_add);
        black_box(sum);
        Ok(())
    });
    let seconds = |measured: Result<f64>| measured.expect("copying and adding cannot fail");
    (giga(2 * bytes, seconds(copy)), giga(bytes, seconds(read)))
}

/// A matrix in one format.
struct Sample {
    name: &'static str,
    kind: StoredAs,
    bytes: Vec<u8>,
    scales: Vec<u8>,
}

/// Stored format of a sample.
#[derive(Clone, Copy)]
enum StoredAs {
    F32,
    F16,
    Bf16,
    /// In tiles of these rows and columns, with F32 scales.
    Fp8,
    /// In tiles, with E8M0 scales.
    Fp8Powers,
    Mxfp4,
    Int4,
    Nvfp4,
}

impl Sample {
    fn len(&self) -> usize {
        self.bytes.len() + self.scales.len()
    }

    fn encoded(&self, shape: [usize; 2]) -> Encoded<'_> {
        let Self { kind, bytes, scales, .. } = self;
        let tiles = |scale_dtype, block| Encoded::Fp8Blocks { bytes, scales, scale_dtype, shape, block };
        match kind {
            StoredAs::F32 => Encoded::Plain { dtype: &StoredDtype::F32, bytes },
            StoredAs::F16 => Encoded::Plain { dtype: &StoredDtype::F16, bytes },
            StoredAs::Bf16 => Encoded::Plain { dtype: &StoredDtype::BF16, bytes },
            StoredAs::Fp8 => tiles(&StoredDtype::F32, BLOCK),
            StoredAs::Fp8Powers => tiles(&StoredDtype::F8E8M0, SMALL_BLOCK),
            StoredAs::Mxfp4 => Encoded::Mxfp4 { blocks: bytes, scales },
            StoredAs::Int4 => Encoded::Int4 { codes: bytes, scales, scale_dtype: &StoredDtype::BF16, group: 32 },
            StoredAs::Nvfp4 => Encoded::Nvfp4 { blocks: bytes, scales, whole: 1e-4 },
        }
    }
}

/// Tiles of an FP8 sample, as DeepSeek publishes.
const BLOCK: [usize; 2] = [128, 128];
/// Smaller ones, with scales in E8M0.
const SMALL_BLOCK: [usize; 2] = [32, 32];

/// The formats in the order of the table.
const STORED: [StoredAs; 8] = [
    StoredAs::F32,
    StoredAs::F16,
    StoredAs::Bf16,
    StoredAs::Fp8,
    StoredAs::Fp8Powers,
    StoredAs::Mxfp4,
    StoredAs::Int4,
    StoredAs::Nvfp4,
];

/// A sample of `values` values, rounded up to whole rows.
fn sample(kind: StoredAs, values: usize) -> Sample {
    // One row is repeated. The numbers do not affect a decoder's speed.
    let floats = |bytes: fn(f32) -> Vec<u8>| {
        let row: Vec<u8> = noise().take(COLUMNS).flat_map(|byte| bytes(f32::from(byte) / 64.0 - 1.9)).collect();
        (row.repeat(values / COLUMNS), Vec::new())
    };
    let tiles = |block: [usize; 2]| (values / COLUMNS).div_ceil(block[0]) * COLUMNS.div_ceil(block[1]);
    // The code of NaN has all bits set below the sign.
    let numbers = |count: usize| noise().take(count).map(|code| code & 0xbf).collect();
    let nibbles = || noise().take(values / 2).collect();
    let powers = |count: usize| noise().take(count).map(|byte| 118 + byte % 8).collect();
    let (name, (bytes, scales)) = match kind {
        StoredAs::F32 => ("F32", floats(|v| v.to_le_bytes().to_vec())),
        StoredAs::F16 => ("F16", floats(|v| f16::from_f32(v).to_le_bytes().to_vec())),
        StoredAs::Bf16 => ("BF16", floats(|v| bf16::from_f32(v).to_le_bytes().to_vec())),
        StoredAs::Fp8 => {
            let scale = |tile: usize| (1e-4 + 1e-9 * tile as f32).to_le_bytes();
            ("FP8 in blocks", (numbers(values), (0..tiles(BLOCK)).flat_map(scale).collect()))
        }
        StoredAs::Fp8Powers => ("FP8 32x32, E8M0", (numbers(values), powers(tiles(SMALL_BLOCK)))),
        StoredAs::Mxfp4 => ("MXFP4", (nibbles(), powers(values / 32))),
        StoredAs::Int4 => {
            let scale = |byte: u8| bf16::from_f32(1e-3 + 1e-5 * f32::from(byte)).to_le_bytes();
            ("INT4", (nibbles(), noise().take(values / 32).flat_map(scale).collect()))
        }
        StoredAs::Nvfp4 => ("NVFP4", (nibbles(), numbers(values / 16))),
    };
    Sample { name, kind, bytes, scales }
}

/// Bytes without a pattern.
fn noise() -> impl Iterator<Item = u8> {
    let mut state = 1u64;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_is_measured_into_both_dtypes() {
        let table = decode(3 * COLUMNS + 1, 1, &Device::Cpu).unwrap();
        assert_eq!((table.values, table.rows.len()), (4 * COLUMNS, 16));
        assert!(table.rows.iter().all(|row| row.g_values_per_second > 0.0 && row.of_copy > 0.0));
        let bytes_per_value = |i: usize| table.rows[i].stored_gb_per_second / table.rows[i].g_values_per_second;
        assert!((bytes_per_value(0) - 4.0).abs() < 1e-9 && (bytes_per_value(11) - 17.0 / 32.0).abs() < 1e-9);
        assert!((13..16).all(|i| (bytes_per_value(i) - 9.0 / 16.0).abs() < 1e-9));
        assert_eq!(table.to_string().lines().count(), 18);
        assert!(decode(usize::MAX, 1, &Device::Cpu).is_err());
        let is_wanted = |name: &str, dtype| name == "INT4" && dtype == DType::BF16;
        let rows = decode_some(COLUMNS, 1, &Device::Cpu, is_wanted).unwrap().rows;
        assert_eq!(rows.iter().map(|row| (row.stored, row.into)).collect::<Vec<_>>(), [("INT4", "bf16")]);
    }
}
