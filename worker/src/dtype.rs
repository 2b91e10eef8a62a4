//! Stored bytes to values: widened or narrowed to the dtype of the forward pass, and checked to be finite on the way.

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::error::{Result, WorkerError};
use crate::safetensors::StoredDtype;

/// Values per task of the thread pool.
const TASK: usize = 1 << 16;

/// Whether values stored so can be decoded.
pub fn can_decode(stored: &StoredDtype) -> bool {
    matches!(stored, StoredDtype::F32 | StoredDtype::F16 | StoredDtype::BF16)
}

/// Decodes `bytes` (little-endian, row-major) to f32.
///
/// # Errors
/// Checkpoint: a value is NaN or infinite; the message names `tensor` and the index. Unsupported: the stored dtype.
pub fn to_f32(bytes: &[u8], stored: &StoredDtype, tensor: &str) -> Result<Vec<f32>> {
    match stored {
        StoredDtype::F32 => widen(bytes, tensor, f32::from_le_bytes),
        StoredDtype::F16 => widen(bytes, tensor, |b: [u8; 2]| f16::from_le_bytes(b).to_f32()),
        StoredDtype::BF16 => widen(bytes, tensor, |b: [u8; 2]| bf16::from_le_bytes(b).to_f32()),
        other => {
            Err(WorkerError::unsupported(format!("tensor {tensor} is stored as {other}, which cannot be decoded yet")))
        }
    }
}

fn widen<const N: usize>(bytes: &[u8], tensor: &str, value: impl Fn([u8; N]) -> f32 + Sync) -> Result<Vec<f32>> {
    let mut out = vec![0f32; bytes.len() / N];
    let (chunks, _) = bytes.as_chunks::<N>();
    let finite = out.par_chunks_mut(TASK).zip(chunks.par_chunks(TASK)).map(|(out, bytes)| {
        let mut finite = true;
        for (o, b) in out.iter_mut().zip(bytes) {
            *o = value(*b);
            finite &= o.is_finite();
        }
        finite
    });
    if finite.reduce(|| true, |a, b| a & b) {
        return Ok(out);
    }
    let at = out.iter().position(|v| !v.is_finite()).expect("some value was not finite");
    Err(WorkerError::checkpoint(format!("tensor {tensor} holds {} at element {at}", out[at]))
        .hint("the checkpoint is damaged: fetch it again, or report it to its authors"))
}

/// Bytes of one matrix, or of a part of one, as stored.
pub enum Encoded<'a> {
    /// Floats.
    Plain {
        /// Their type.
        dtype: &'a StoredDtype,
        /// Little-endian.
        bytes: &'a [u8],
    },
    /// FP8 e4m3 with a scale per tile.
    Fp8Blocks {
        /// One per value.
        bytes: &'a [u8],
        /// One per tile.
        scales: &'a [u8],
        /// Their type.
        scale_dtype: &'a StoredDtype,
        /// Rows and columns.
        shape: [usize; 2],
        /// Rows and columns of a tile.
        block: [usize; 2],
    },
    /// e2m1 with an exponent per 32 values.
    Mxfp4 {
        /// Two values per byte, the low nibble first.
        blocks: &'a [u8],
        /// Exponents, biased by 127.
        scales: &'a [u8],
    },
}

/// Decodes to a tensor of `shape` and `compute` dtype on `device`.
///
/// # Errors
/// Those of [`to_f32`] and [`from_f32`].
pub fn decode(stored: &Encoded<'_>, shape: &[usize], compute: DType, device: &Device, tensor: &str) -> Result<Tensor> {
    match stored {
        Encoded::Plain { dtype, bytes } => to_tensor(bytes, dtype, shape, compute, device, tensor),
        Encoded::Fp8Blocks { .. } | Encoded::Mxfp4 { .. } => {
            Err(WorkerError::unsupported(format!("tensor {tensor} is quantised")))
        }
    }
}

/// Decodes `bytes` to a tensor of `shape` and `compute` dtype on `device`.
///
/// # Errors
/// As [`to_f32`]; also when narrowing to f16 overflows, since that would silently change the model.
pub fn to_tensor(
    bytes: &[u8],
    stored: &StoredDtype,
    shape: &[usize],
    compute: DType,
    device: &Device,
    tensor: &str,
) -> Result<Tensor> {
    let values = to_f32(bytes, stored, tensor)?;
    from_f32(values, shape, compute, device).map_err(|e| e.context(format!("tensor {tensor}")))
}

/// A tensor of `compute` dtype from f32 values.
///
/// # Errors
/// Checkpoint: a value is too large for f16.
pub fn from_f32(values: Vec<f32>, shape: &[usize], compute: DType, device: &Device) -> Result<Tensor> {
    let tensor = match compute {
        DType::F32 => Tensor::from_vec(values, shape, device)?,
        DType::BF16 => {
            Tensor::from_vec(values.par_iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>(), shape, device)?
        }
        DType::F16 => {
            let narrow: Vec<f16> = values.par_iter().map(|v| f16::from_f32(*v)).collect();
            if let Some(at) = narrow.iter().position(|v| !v.is_finite()) {
                return Err(WorkerError::checkpoint(format!("{} at element {at} does not fit f16", values[at]))
                    .hint("use --precision bf16 or f32"));
            }
            Tensor::from_vec(narrow, shape, device)?
        }
        other => return Err(WorkerError::internal(format!("no forward pass in {other:?}"))),
    };
    Ok(tensor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_formats_widen_exactly() {
        let values = [0.0f32, -1.5, 3.25, 65_504.0, -0.007_812_5];
        let f32s: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let f16s: Vec<u8> = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        let bf16s: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        assert_eq!(to_f32(&f32s, &StoredDtype::F32, "t").unwrap(), values);
        assert_eq!(to_f32(&f16s, &StoredDtype::F16, "t").unwrap(), values);
        let rounded = values.map(|v| bf16::from_f32(v).to_f32());
        assert_eq!(to_f32(&bf16s, &StoredDtype::BF16, "t").unwrap(), rounded);
    }

    #[test]
    fn a_value_that_is_not_finite_is_named() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![1.0f32; TASK + 7];
            values[TASK + 3] = bad;
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let error = to_f32(&bytes, &StoredDtype::F32, "model.norm.weight").unwrap_err().to_string();
            assert!(error.contains("model.norm.weight") && error.contains(&format!("element {}", TASK + 3)), "{error}");
        }
    }

    #[test]
    fn f16_refuses_what_does_not_fit() {
        assert!(from_f32(vec![70_000.0], &[1], DType::F16, &Device::Cpu).is_err());
        assert!(from_f32(vec![70_000.0], &[1], DType::BF16, &Device::Cpu).is_ok());
    }
}
