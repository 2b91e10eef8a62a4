//! NVFP4: blocks of 16 4-bit floats with an e4m3 scale each, and one scale per tensor.

use super::convert::Compute;
use super::mxfp4::{self, pair};
use super::{Format, fp8};

/// Values per scale.
pub(super) const BLOCK: usize = 16;

/// Blocks with their scales.
pub(super) struct Nvfp4Blocks<'a> {
    codes: &'a [[u8; BLOCK / 2]],
    scales: &'a [u8],
    whole: f32,
}

impl<'a> Nvfp4Blocks<'a> {
    pub(super) fn new(codes: &'a [u8], scales: &'a [u8], whole: f32) -> Self {
        Self { codes: codes.as_chunks().0, scales, whole }
    }

    /// Factor of a block's codes, rounded once; NaN if the stored scale is NaN.
    fn scale(&self, block: usize) -> f32 {
        fp8::CODES[usize::from(self.scales[block])] * self.whole
    }
}

impl<T: Compute> Format<T> for Nvfp4Blocks<'_> {
    fn fill(&self, start: usize, out: &mut [T::Bits]) -> bool {
        let first = start / BLOCK;
        let blocks = out.as_chunks_mut::<BLOCK>().0.iter_mut().zip(&self.codes[first..]);
        let mut fits = true;
        for (block, (out, codes)) in (first..).zip(blocks) {
            let scale = self.scale(block);
            let table = mxfp4::CODES.map(|code| T::narrow(code * scale));
            for (out, byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
                *out = [table[usize::from(byte & 15)], table[usize::from(byte >> 4)]];
            }
            // The codes are checked only if the largest would not fit.
            let all_fit = T::holds(mxfp4::CODES[7] * scale);
            fits &= all_fit || codes.iter().all(|&byte| pair(byte, scale).into_iter().all(T::holds));
        }
        fits
    }

    fn value(&self, index: usize) -> f32 {
        let block = index / BLOCK;
        pair(self.codes[block][index % BLOCK / 2], self.scale(block))[index % 2]
    }
}
