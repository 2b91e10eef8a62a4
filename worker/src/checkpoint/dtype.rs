//! Decodes stored bytes to tensors: from every supported format directly to the dtype of the
//! forward pass.
//!
//! The modules `plain`, `fp8`, `int4`, `mxfp4` and `nvfp4` define the values of their format;
//! `convert` defines the dtypes of a pass. This module checks sizes, distributes the work over
//! threads, and reports values that are not finite. Each value is computed in f32 by the format's
//! definition and rounded once, so that results are bit-identical on every machine.
//!
//! Low-bit formats are decoded by tables of the rounded products of code and scale. Values are
//! checked only where a table cannot exclude overflow.

mod convert;
mod fp8;
mod int4;
mod mxfp4;
mod nvfp4;
mod plain;
#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::checkpoint::safetensors::StoredDtype;
use crate::error::{Result, WorkerError};
pub use convert::Compute;

/// Default number of values per task of the thread pool, a multiple of every block length.
const TASK: usize = 1 << 16;

/// A matrix, or the leading part of a tensor (one expert of a stack, some rows of a table), as
/// stored. Numbers are little-endian, rows contiguous.
#[derive(Clone, Copy, Debug)]
pub enum Encoded<'a> {
    /// One number after another.
    Plain {
        /// F32, F16 or BF16.
        dtype: &'a StoredDtype,
        /// The numbers.
        bytes: &'a [u8],
    },
    /// FP8 (e4m3fn) with a grid of scales: a value is its code times the scale of its tile
    /// (DeepSeek's `weight_scale_inv`, which is a factor despite its name). Tiles start at the
    /// origin; the last one in each direction may be shorter.
    Fp8Blocks {
        /// `rows * columns` codes.
        bytes: &'a [u8],
        /// `ceil(rows / block rows) * ceil(columns / block columns)` scales.
        scales: &'a [u8],
        /// F32 or BF16.
        scale_dtype: &'a StoredDtype,
        /// Rows and columns of the matrix.
        shape: [usize; 2],
        /// Rows and columns of a tile.
        block: [usize; 2],
    },
    /// MXFP4: blocks of 32 e2m1 values (4 bits, low half of a byte first) with a power of two as
    /// scale.
    Mxfp4 {
        /// 16 bytes per block.
        blocks: &'a [u8],
        /// One byte per block: 2^(scale - 127); 255 is NaN.
        scales: &'a [u8],
    },
    /// 4-bit integers (low half of a byte first) in groups with one scale each: a value is (code -
    /// 8) times the scale. compressed-tensors packs eight codes into a little-endian word.
    Int4 {
        /// Two codes per byte.
        codes: &'a [u8],
        /// One scale per group.
        scales: &'a [u8],
        /// F32, F16 or BF16.
        scale_dtype: &'a StoredDtype,
        /// Values per group, an even number.
        group: usize,
    },
    /// NVFP4: blocks of 16 e2m1 values (4 bits, low half of a byte first) with an e4m3 scale each,
    /// which is multiplied by one number per tensor.
    Nvfp4 {
        /// 8 bytes per block.
        blocks: &'a [u8],
        /// One code per block.
        scales: &'a [u8],
        /// Factor of all scales.
        whole: f32,
    },
}

/// Whether scales of FP8 tiles in this dtype can be decoded.
pub fn can_scale(stored: &StoredDtype) -> bool {
    fp8::scale_size(stored).is_some()
}

/// Whether numbers in this dtype, without scales, can be decoded.
pub fn can_decode(stored: &StoredDtype) -> bool {
    matches!(stored, StoredDtype::F32 | StoredDtype::F16 | StoredDtype::BF16)
}

/// Decodes to a tensor of `shape` and dtype `compute` (f32, bf16 or f16) on `device`, on all
/// threads. `tensor` is its name in errors.
///
/// # Errors
/// Checkpoint: lengths that do not match `shape`; a scale that is not finite; a value that is NaN,
/// infinite, or too large for `compute` (which would change the model). The message names the
/// tensor and the index of the first such element of `stored`. Unsupported: the stored dtype.
pub fn decode(stored: &Encoded<'_>, shape: &[usize], compute: DType, device: &Device, tensor: &str) -> Result<Tensor> {
    stored.check(shape, tensor)?;
    let tensor_of = match compute {
        DType::F32 => fresh::<f32>,
        DType::BF16 => fresh::<bf16>,
        DType::F16 => fresh::<f16>,
        other => return Err(WorkerError::internal(format!("no forward pass in {other:?}"))),
    };
    tensor_of(stored, shape, device, tensor)
}

/// Decodes into the memory of `into`, a contiguous tensor on the CPU, on all threads. This saves
/// the clearing and mapping of pages for a new tensor, which takes longer than decoding. Clones of
/// `into` share its memory, so none may be in use. After an error the content of `into` is
/// unspecified.
///
/// # Errors
/// As [`decode`]. Internal: `into` is on another device, not contiguous, or of a dtype without a
/// forward pass.
pub fn decode_into(stored: &Encoded<'_>, into: &Tensor, tensor: &str) -> Result<()> {
    stored.check(into.dims(), tensor)?;
    if into.elem_count() == 0 {
        return Ok(());
    }
    let op = DecodeInto { stored, tensor, outcome: std::cell::RefCell::new(Ok(())) };
    into.inplace_op1(&op)?;
    op.outcome.into_inner()
}

/// Checks the lengths and scales of a stored tensor, without its values, before it is decoded
/// elsewhere.
///
/// # Errors
/// As [`decode`], except those for values.
pub fn check(stored: &Encoded<'_>, shape: &[usize], tensor: &str) -> Result<()> {
    stored.check(shape, tensor)?;
    match *stored {
        Encoded::Plain { .. } | Encoded::Nvfp4 { .. } => Ok(()),
        Encoded::Fp8Blocks { bytes, scales, scale_dtype, shape, block } => {
            fp8::Fp8Tiles::new(bytes, scales, scale_dtype, shape, block, tensor).map(drop)
        }
        Encoded::Mxfp4 { blocks, scales } => mxfp4::Mxfp4Blocks::<f32>::new(blocks, scales, tensor).map(drop),
        Encoded::Int4 { codes, scales, scale_dtype, group } => {
            int4::Groups::new(codes, scales, scale_dtype, group, tensor).map(drop)
        }
    }
}

/// Checks the dtype and the number of bytes of plain floats before they are read.
///
/// # Errors
/// As [`check`].
pub fn check_plain(dtype: &StoredDtype, bytes: usize, shape: &[usize], tensor: &str) -> Result<()> {
    if !can_decode(dtype) {
        return Err(undecodable(dtype, tensor));
    }
    let size = dtype.size().and_then(|size| usize::try_from(size).ok());
    let expected = product(shape).zip(size).and_then(|(n, size)| n.checked_mul(size));
    check_length("values", bytes, expected, shape, tensor)
}

fn check_length(what: &str, found: usize, expected: Option<usize>, shape: &[usize], tensor: &str) -> Result<()> {
    if Some(found) == expected {
        return Ok(());
    }
    let expected = expected.map_or_else(|| "more than this machine can hold".to_owned(), |n| n.to_string());
    Err(WorkerError::checkpoint(format!(
        "tensor {tensor}: {found} bytes of {what} for shape {shape:?}, which needs {expected}"
    )))
}

/// The error for the value at index `at`, the first of a tensor that the dtype cannot represent.
pub fn misfit(tensor: &str, at: usize, value: f32, dtype: &str) -> WorkerError {
    if value.is_finite() {
        return WorkerError::checkpoint(format!("tensor {tensor}: {value} at element {at} does not fit {dtype}"))
            .hint("use --precision bf16 or f32");
    }
    WorkerError::checkpoint(format!("tensor {tensor} holds {value} at element {at}"))
        .hint("the checkpoint is damaged: fetch it again, or report it to its authors")
}

/// The operation behind [`decode_into`]. Its error is returned separately, since candle would
/// convert it to text.
struct DecodeInto<'a> {
    stored: &'a Encoded<'a>,
    tensor: &'a str,
    outcome: std::cell::RefCell<Result<()>>,
}

impl InplaceOp1 for DecodeInto<'_> {
    fn name(&self) -> &'static str {
        "decode-into"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("decoding into a tensor that is not contiguous: {:?}", layout.shape());
        };
        let outcome = match storage {
            CpuStorage::F32(out) => fill::<f32>(self.stored, &mut out[start..end], self.tensor),
            CpuStorage::BF16(out) => fill::<bf16>(self.stored, bf16::bits_mut(&mut out[start..end]), self.tensor),
            CpuStorage::F16(out) => fill::<f16>(self.stored, f16::bits_mut(&mut out[start..end]), self.tensor),
            _ => candle_core::bail!("decoding into a tensor of integers"),
        };
        *self.outcome.borrow_mut() = outcome;
        Ok(())
    }
}

impl Encoded<'_> {
    /// Checks that the lengths of all parts match `shape`.
    fn check(&self, shape: &[usize], tensor: &str) -> Result<()> {
        let values = product(shape);
        let fits =
            |what: &str, found: usize, expected: Option<usize>| check_length(what, found, expected, shape, tensor);
        let in_blocks = |values: Option<usize>, block: usize| {
            if values.is_some_and(|n| n.is_multiple_of(block)) {
                return Ok(());
            }
            let message = format!("tensor {tensor}: shape {shape:?} is not in blocks of {block} values");
            Err(WorkerError::checkpoint(message))
        };
        match self {
            Self::Plain { dtype, bytes } => check_plain(dtype, bytes.len(), shape, tensor),
            Self::Fp8Blocks { bytes, scales, scale_dtype, shape: matrix, block } => {
                let size = fp8::scale_size(scale_dtype).ok_or_else(|| {
                    WorkerError::unsupported(format!("tensor {tensor}: its scales are stored as {scale_dtype}"))
                        .hint("scales of FP8 blocks are F32, BF16 or F8_E8M0")
                })?;
                if block.contains(&0) || product(matrix) != values {
                    return Err(WorkerError::internal(format!(
                        "tensor {tensor}: a matrix {matrix:?} in blocks {block:?} for shape {shape:?}"
                    )));
                }
                fits("codes", bytes.len(), values)?;
                let tiles = matrix[0].div_ceil(block[0]).checked_mul(matrix[1].div_ceil(block[1]));
                fits("scales", scales.len(), tiles.and_then(|n| n.checked_mul(size)))
            }
            Self::Mxfp4 { blocks, scales } => {
                in_blocks(values, mxfp4::BLOCK)?;
                fits("codes", blocks.len(), values.map(|n| n / 2))?;
                fits("scales", scales.len(), values.map(|n| n / mxfp4::BLOCK))
            }
            Self::Int4 { codes, scales, scale_dtype, group } => {
                let size = scale_dtype.size().filter(|_| can_decode(scale_dtype));
                let size = size.ok_or_else(|| {
                    WorkerError::unsupported(format!("tensor {tensor}: its scales are stored as {scale_dtype}"))
                        .hint("scales of groups are F32, F16 or BF16")
                })?;
                if *group == 0 || !group.is_multiple_of(2) {
                    return Err(WorkerError::internal(format!("tensor {tensor}: groups of {group}")));
                }
                in_blocks(values, *group)?;
                fits("codes", codes.len(), values.map(|n| n / 2))?;
                fits("scales", scales.len(), values.and_then(|n| (n / group).checked_mul(size as usize)))
            }
            Self::Nvfp4 { blocks, scales, .. } => {
                in_blocks(values, nvfp4::BLOCK)?;
                fits("codes", blocks.len(), values.map(|n| n / 2))?;
                fits("scales", scales.len(), values.map(|n| n / nvfp4::BLOCK))
            }
        }
    }
}

fn product(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n))
}

fn undecodable(dtype: &StoredDtype, tensor: &str) -> WorkerError {
    let message = format!("tensor {tensor} is stored as {dtype}, which cannot be decoded");
    match dtype {
        StoredDtype::F8E4M3 => WorkerError::unsupported(message + " without scales"),
        _ => WorkerError::unsupported(message),
    }
}

fn fresh<T: Compute>(stored: &Encoded<'_>, shape: &[usize], device: &Device, tensor: &str) -> Result<Tensor> {
    let mut out = vec![T::Bits::default(); product(shape).expect("the shape was checked")];
    fill::<T>(stored, &mut out, tensor)?;
    Ok(Tensor::from_vec(T::from_bits(out), shape, device)?)
}

/// Decodes [checked](Encoded::check) bytes into `out`.
fn fill<T: Compute>(stored: &Encoded<'_>, out: &mut [T::Bits], tensor: &str) -> Result<()> {
    match *stored {
        Encoded::Plain { dtype, bytes } => match dtype {
            StoredDtype::F32 => all::<T>(&plain::Wide::<f32, 4>::new(bytes), out, tensor),
            StoredDtype::F16 => all::<T>(&plain::Wide::<f16, 2>::new(bytes), out, tensor),
            StoredDtype::BF16 => all::<T>(&plain::Wide::<bf16, 2>::new(bytes), out, tensor),
            other => Err(undecodable(other, tensor)),
        },
        Encoded::Fp8Blocks { bytes, scales, scale_dtype, shape, block } => {
            all::<T>(&fp8::Fp8Tiles::new(bytes, scales, scale_dtype, shape, block, tensor)?, out, tensor)
        }
        Encoded::Mxfp4 { blocks, scales } => {
            all::<T>(&mxfp4::Mxfp4Blocks::<T>::new(blocks, scales, tensor)?, out, tensor)
        }
        Encoded::Int4 { codes, scales, scale_dtype, group } => {
            all::<T>(&int4::Groups::new(codes, scales, scale_dtype, group, tensor)?, out, tensor)
        }
        Encoded::Nvfp4 { blocks, scales, whole } => {
            all::<T>(&nvfp4::Nvfp4Blocks::new(blocks, scales, whole), out, tensor)
        }
    }
}

/// Decoding of a stored format to a dtype.
trait Format<T: Compute>: Sync {
    /// Values per task of the thread pool.
    fn task(&self) -> usize {
        TASK
    }

    /// Decodes the values from `start`, a multiple of [`Self::task`]. Returns whether all of them
    /// are finite in `T`.
    fn fill(&self, start: usize, out: &mut [T::Bits]) -> bool;

    /// One value before it is rounded to `T`.
    fn value(&self, index: usize) -> f32;
}

/// Fills `out` in tasks. If a value does not fit, reports the first one, whatever the order of
/// threads.
fn all<T: Compute>(format: &impl Format<T>, out: &mut [T::Bits], tensor: &str) -> Result<()> {
    let task = format.task().max(1);
    let failed = out.par_chunks_mut(task).enumerate().filter_map(|(i, out)| {
        let start = i * task;
        (!format.fill(start, out)).then_some(start..start + out.len())
    });
    let Some(mut range) = failed.min_by_key(|range| range.start) else {
        return Ok(());
    };
    let at = range.find(|&i| !T::holds(format.value(i))).expect("some value of the task did not fit");
    Err(misfit(tensor, at, format.value(at), T::NAME))
}

/// Decodes `bytes` to f32.
///
/// # Errors
/// Checkpoint: a value is NaN or infinite; the message names `tensor` and the index. Unsupported:
/// the stored dtype.
pub fn to_f32(bytes: &[u8], stored: &StoredDtype, tensor: &str) -> Result<Vec<f32>> {
    let size = stored.size().filter(|_| can_decode(stored)).ok_or_else(|| undecodable(stored, tensor))?;
    let mut out = vec![0.0; bytes.len() / size as usize];
    fill::<f32>(&Encoded::Plain { dtype: stored, bytes }, &mut out, tensor)?;
    Ok(out)
}
