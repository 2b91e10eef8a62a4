//! 4-bit integers in groups with one scale each, as packed by compressed-tensors.

use outliers_scan::vectorize;

use super::Format;
use super::convert::Compute;
use crate::checkpoint::safetensors::StoredDtype;
use crate::error::Result;

/// Value of code 0 before scaling.
const MIN_VALUE: f32 = -8.0;

/// The two values of a byte, low half first.
#[inline(always)]
fn pair(byte: u8, scale: f32) -> [f32; 2] {
    [byte & 15, byte >> 4].map(|code| (f32::from(code) + MIN_VALUE) * scale)
}

/// Groups with their scales.
pub(super) struct Groups<'a> {
    codes: &'a [u8],
    scales: Vec<f32>,
    group: usize,
}

impl<'a> Groups<'a> {
    /// Groups of `group` values, an even number.
    ///
    /// # Errors
    /// Checkpoint: a scale is not finite.
    pub(super) fn new(
        codes: &'a [u8],
        scales: &[u8],
        scale_dtype: &StoredDtype,
        group: usize,
        tensor: &str,
    ) -> Result<Self> {
        let scales = super::to_f32(scales, scale_dtype, &format!("of scales of {tensor}"))?;
        Ok(Self { codes, scales, group })
    }
}

impl<T: Compute> Format<T> for Groups<'_> {
    fn task(&self) -> usize {
        (super::TASK / self.group).max(1) * self.group
    }

    fn fill(&self, start: usize, out: &mut [T::Bits]) -> bool {
        let codes = self.codes[start / 2..].chunks(self.group / 2);
        let groups = out.chunks_mut(self.group).zip(codes).zip(&self.scales[start / self.group..]);
        vectorize!({
            let mut fits = true;
            for ((out, codes), &scale) in groups {
                for (out, byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
                    *out = pair(*byte, scale).map(T::narrow);
                }
                // The codes are checked only if the largest would not fit.
                let all_fit = T::holds(MIN_VALUE * scale);
                fits &= all_fit || codes.iter().all(|&byte| pair(byte, scale).into_iter().all(T::holds));
            }
            fits
        })
    }

    fn value(&self, index: usize) -> f32 {
        pair(self.codes[index / 2], self.scales[index / self.group])[index % 2]
    }
}
