//! Plain floats.

use std::marker::PhantomData;

use half::{bf16, f16};
use outliers_scan::vectorize;

use super::Format;
use super::convert::{Compute, widen_f16};

/// A stored float of `N` bytes.
pub(super) trait Stored<const N: usize>: Sync {
    /// Its value.
    fn wide(bytes: [u8; N]) -> f32;
}

impl Stored<4> for f32 {
    #[inline(always)]
    fn wide(bytes: [u8; 4]) -> f32 {
        Self::from_le_bytes(bytes)
    }
}

impl Stored<2> for f16 {
    #[inline(always)]
    fn wide(bytes: [u8; 2]) -> f32 {
        widen_f16(u16::from_le_bytes(bytes))
    }
}

impl Stored<2> for bf16 {
    #[inline(always)]
    fn wide(bytes: [u8; 2]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
    }
}

/// Floats `S`. A conversion to the same dtype is rounded as well: it is exact, and as fast as
/// memory.
pub(super) struct Wide<'a, S, const N: usize> {
    stored: &'a [[u8; N]],
    dtype: PhantomData<S>,
}

impl<'a, S: Stored<N>, const N: usize> Wide<'a, S, N> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { stored: bytes.as_chunks().0, dtype: PhantomData }
    }
}

impl<T: Compute, S: Stored<N>, const N: usize> Format<T> for Wide<'_, S, N> {
    fn fill(&self, start: usize, out: &mut [T::Bits]) -> bool {
        let stored = &self.stored[start..][..out.len()];
        vectorize!({
            let mut fits = true;
            for (out, bytes) in out.iter_mut().zip(stored) {
                let value = S::wide(*bytes);
                *out = T::narrow(value);
                fits &= T::holds(value);
            }
            fits
        })
    }

    fn value(&self, index: usize) -> f32 {
        S::wide(self.stored[index])
    }
}
