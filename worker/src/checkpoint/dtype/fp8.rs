//! FP8 e4m3fn with a grid of scales.

use super::convert::Compute;
use super::{Format, mxfp4};
use crate::checkpoint::safetensors::StoredDtype;
use crate::error::{Result, WorkerError};

/// Largest finite code.
const MAX: f32 = 448.0;

/// Values of the codes: sign, 4 exponent bits with bias 7, 3 mantissa bits; no infinities, all
/// ones is NaN.
pub(super) static CODES: [f32; 256] = {
    let mut codes = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        codes[code] = value(code as u8);
        code += 1;
    }
    codes
};

const fn value(code: u8) -> f32 {
    let exponent = ((code >> 3) & 15) as u32;
    let mantissa = (code & 7) as f32 / 8.0;
    let magnitude = match code & 0x7f {
        0x7f => f32::NAN,
        0..8 => mantissa / 64.0,
        _ => (1.0 + mantissa) * f32::from_bits((exponent + 127 - 7) << 23),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Tile columns decoded together, row by row. Long runs of memory matter more than tables in the
/// nearest cache (64 is twice as fast as 8). The number is limited, since a file determines how
/// many columns there are.
const TABLES: usize = 64;

/// Minimum values of a tile for a table of its 256 products to pay.
const TABLE_PAYS: usize = 1024;

/// Bytes of a scale in this dtype.
pub(super) fn scale_size(dtype: &StoredDtype) -> Option<usize> {
    match dtype {
        StoredDtype::F32 => Some(4),
        StoredDtype::BF16 => Some(2),
        StoredDtype::F8E8M0 => Some(1),
        _ => None,
    }
}

/// Decodes scales in E8M0: `2^(byte - 127)`; 255 is NaN (OCP Microscaling Formats 1.0, section
/// 5.4.1).
fn powers(bytes: &[u8], tensor: &str) -> Result<Vec<f32>> {
    if let Some(at) = bytes.iter().position(|byte| *byte == u8::MAX) {
        return Err(WorkerError::checkpoint(format!("tensor {tensor}: scale {at} is NaN")));
    }
    Ok(bytes.iter().map(|byte| mxfp4::power(*byte)).collect())
}

/// A matrix of codes. A task is one row of tiles.
pub(super) struct Fp8Tiles<'a> {
    codes: &'a [u8],
    scales: Vec<f32>,
    columns: usize,
    block: [usize; 2],
}

impl<'a> Fp8Tiles<'a> {
    /// # Errors
    /// Checkpoint: a scale is not finite.
    pub(super) fn new(
        codes: &'a [u8],
        scales: &[u8],
        scale_dtype: &StoredDtype,
        shape: [usize; 2],
        block: [usize; 2],
        tensor: &str,
    ) -> Result<Self> {
        let scales = match scale_dtype {
            StoredDtype::F8E8M0 => powers(scales, tensor)?,
            _ => super::to_f32(scales, scale_dtype, &format!("of scales of {tensor}"))?,
        };
        if codes.is_empty() {
            return Ok(Self { codes, scales, columns: 1, block: [1, 1] });
        }
        // Tiles are clipped to the matrix, so that products of sizes do not overflow below.
        let block = [block[0].min(shape[0]), block[1].min(shape[1])];
        Ok(Self { codes, scales, columns: shape[1], block })
    }

    fn tile_columns(&self) -> usize {
        self.columns.div_ceil(self.block[1])
    }
}

impl<T: Compute> Format<T> for Fp8Tiles<'_> {
    fn task(&self) -> usize {
        self.block[0] * self.columns
    }

    fn fill(&self, start: usize, out: &mut [T::Bits]) -> bool {
        let codes = &self.codes[start..][..out.len()];
        let rows = out.len() / self.columns;
        let tile_row = start / (self.block[0] * self.columns);
        let scales = &self.scales[tile_row * self.tile_columns()..][..self.tile_columns()];
        let width = self.block[1];
        let mut fits = true;
        for (group, scales) in scales.chunks(TABLES).enumerate() {
            let tiles: Vec<Tile<T>> = scales.iter().map(|&scale| Tile::new(scale, rows * width)).collect();
            let from = group * TABLES * width;
            let to = self.columns.min(from + TABLES * width);
            for (codes, out) in codes.chunks_exact(self.columns).zip(out.chunks_exact_mut(self.columns)) {
                let runs = codes[from..to].chunks(width).zip(out[from..to].chunks_mut(width));
                for (tile, (codes, out)) in tiles.iter().zip(runs) {
                    fits &= tile.decode(codes, out);
                }
            }
        }
        fits
    }

    fn value(&self, index: usize) -> f32 {
        let (row, column) = (index / self.columns, index % self.columns);
        let tile = row / self.block[0] * self.tile_columns() + column / self.block[1];
        CODES[usize::from(self.codes[index])] * self.scales[tile]
    }
}

/// Decoding with one scale.
enum Tile<T: Compute> {
    /// Rounded products of all codes; all are finite except NaN's.
    Table([T::Bits; 256]),
    /// The scale, for a small tile, or if products may overflow.
    Scale(f32),
}

impl<T: Compute> Tile<T> {
    fn new(scale: f32, values: usize) -> Self {
        if values >= TABLE_PAYS && T::holds(MAX * scale) {
            Self::Table(CODES.map(|value| T::narrow(value * scale)))
        } else {
            Self::Scale(scale)
        }
    }

    /// Decodes codes. Returns whether all values are finite.
    #[inline(always)]
    fn decode(&self, codes: &[u8], out: &mut [T::Bits]) -> bool {
        match self {
            Self::Table(table) => {
                for (out, code) in out.iter_mut().zip(codes) {
                    *out = table[usize::from(*code)];
                }
                codes.iter().fold(true, |numbers, code| numbers & (code & 0x7f != 0x7f))
            }
            Self::Scale(scale) => out.iter_mut().zip(codes).fold(true, |fits, (out, code)| {
                let value = CODES[usize::from(*code)] * scale;
                *out = T::narrow(value);
                fits & T::holds(value)
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    #[test]
    fn fp8_codes_decode_as_specified() {
        let named =
            [(0x00, 0.0), (0x01, 2f32.powi(-9)), (0x07, 7.0 * 2f32.powi(-9)), (0x08, 2f32.powi(-6)), (0x38, 1.0)];
        for (code, value) in named.into_iter().chain([(0x39, 1.125), (0x7e, MAX), (0xfe, -MAX), (0xb8, -1.0)]) {
            assert_eq!(CODES[code], value, "{code:#04x}");
        }
        assert!(CODES[0x7f].is_nan() && CODES[0xff].is_nan());
        assert_eq!(CODES[0x80].to_bits(), (-0f32).to_bits());
        // Values ascend with their codes, with a step per mantissa in each octave.
        assert!(CODES[..0x7f].windows(2).all(|pair| pair[0] < pair[1]));
        assert!((8..0x77).all(|code| CODES[code + 8] == 2.0 * CODES[code]));
    }

    #[test]
    fn scales_in_e8m0_are_powers_of_two() {
        let bytes = [0, 1, 126, 127, 128, 254];
        let want = [-127, -126, -1, 0, 1, 127].map(|exponent| 2f64.powi(exponent) as f32);
        assert_eq!(powers(&bytes, "w").unwrap(), want);
        assert!(powers(&[127, 255], "w").unwrap_err().message().contains("scale 1"));
    }

    #[test]
    fn fp8_codes_equal_the_tensor_library() {
        let numbers: Vec<u8> = (0..=255u8).filter(|code| code & 0x7f != 0x7f).collect();
        let theirs = candle_core::Tensor::from_raw_buffer(&numbers, DType::F8E4M3, &[254], &candle_core::Device::Cpu);
        let theirs = theirs.unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
        for (code, theirs) in numbers.into_iter().zip(theirs) {
            assert_eq!(CODES[usize::from(code)].to_bits(), theirs.to_bits(), "{code:#04x}");
        }
    }
}
