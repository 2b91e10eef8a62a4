//! MXFP4: blocks of 32 4-bit floats with a power of two as scale.

use rayon::prelude::*;

use super::Format;
use super::convert::Compute;
use crate::error::{Result, WorkerError};

/// Values per scale.
pub(super) const BLOCK: usize = 32;

/// Values of the codes: sign, 2 exponent bits with bias 1, 1 mantissa bit.
pub(super) const CODES: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The scale byte for NaN.
const NAN: u8 = 255;

/// 2^(scale - 127). The smallest is subnormal.
pub(super) fn power(scale: u8) -> f32 {
    match scale {
        0 => f32::MIN_POSITIVE / 2.0,
        _ => f32::from_bits(u32::from(scale) << 23),
    }
}

/// The two values of a byte, low half first.
pub(super) fn pair(byte: u8, scale: f32) -> [f32; 2] {
    [byte & 15, byte >> 4].map(|code| CODES[usize::from(code)] * scale)
}

/// The values of all bytes for one scale.
struct Table<T: Compute> {
    pairs: [[T::Bits; 2]; 256],
    /// The scale.
    scale: f32,
    /// Whether the largest code stays finite.
    fits: bool,
}

impl<T: Compute> Table<T> {
    fn new(scale: u8) -> Self {
        let scale = power(scale);
        let pairs = std::array::from_fn(|byte| pair(byte as u8, scale).map(T::narrow));
        Self { pairs, scale, fits: T::holds(CODES[7] * scale) }
    }

    /// Decodes a block. Returns whether all values are finite.
    #[inline(always)]
    fn decode(&self, codes: &[u8; BLOCK / 2], out: &mut [T::Bits; BLOCK]) -> bool {
        for (out, byte) in out.as_chunks_mut().0.iter_mut().zip(codes) {
            *out = self.pairs[usize::from(*byte)];
        }
        self.fits || codes.iter().all(|&byte| pair(byte, self.scale).into_iter().all(T::holds))
    }
}

/// Blocks with tables for the scales that occur: a few in a trained model, at most 255.
pub(super) struct Mxfp4Blocks<'a, T: Compute> {
    codes: &'a [[u8; BLOCK / 2]],
    scales: &'a [u8],
    tables: Vec<Table<T>>,
    /// Index into `tables` by scale.
    table_of: [u8; 256],
}

impl<'a, T: Compute> Mxfp4Blocks<'a, T> {
    /// # Errors
    /// Checkpoint: a scale is NaN.
    pub(super) fn new(blocks: &'a [u8], scales: &'a [u8], tensor: &str) -> Result<Self> {
        let used = used(scales);
        if used[usize::from(NAN)] {
            let at = scales.iter().position(|&scale| scale == NAN).expect("it is used");
            return Err(WorkerError::checkpoint(format!(
                "tensor {tensor}: scale {at}, of the elements from {} on, is NaN",
                at * BLOCK
            ))
            .hint("the checkpoint is damaged: fetch it again, or report it to its authors"));
        }
        let mut table_of = [0; 256];
        let mut tables = Vec::new();
        for scale in (0..NAN).filter(|&scale| used[usize::from(scale)]) {
            table_of[usize::from(scale)] = tables.len() as u8;
            tables.push(Table::new(scale));
        }
        Ok(Self { codes: blocks.as_chunks().0, scales, tables, table_of })
    }
}

/// Marks the scales that occur.
fn used(scales: &[u8]) -> [bool; 256] {
    let one = |scales: &[u8]| {
        let mut used = [false; 256];
        for &scale in scales {
            used[usize::from(scale)] = true;
        }
        used
    };
    scales.par_chunks(super::TASK).map(one).reduce(|| [false; 256], |a, b| std::array::from_fn(|i| a[i] | b[i]))
}

impl<T: Compute> Format<T> for Mxfp4Blocks<'_, T> {
    fn fill(&self, start: usize, out: &mut [T::Bits]) -> bool {
        let first = start / BLOCK;
        let blocks = self.codes[first..].iter().zip(&self.scales[first..]);
        let mut fits = true;
        for ((codes, scale), out) in blocks.zip(out.as_chunks_mut().0) {
            fits &= self.tables[usize::from(self.table_of[usize::from(*scale)])].decode(codes, out);
        }
        fits
    }

    fn value(&self, index: usize) -> f32 {
        let block = index / BLOCK;
        pair(self.codes[block][index % BLOCK / 2], power(self.scales[block]))[index % 2]
    }
}
