//! The dtypes a forward pass computes in: how an f32 is rounded to them, in forms that vectorise.

use candle_core::WithDType;
use half::slice::HalfFloatSliceExt;
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};

/// A dtype of the forward pass.
pub trait Compute: WithDType {
    /// What is written: a type whose zeros the system hands out without being asked to write them.
    type Bits: Copy + Default + Send + Sync + std::fmt::Debug + PartialEq;

    /// For messages.
    const NAME: &'static str;

    /// Magnitude bits of the largest f32 that does not round to infinity.
    const LIMIT: u32;

    /// Rounded to nearest, ties to even. Unspecified for what this type does not
    /// [hold](Self::holds).
    fn narrow(value: f32) -> Self::Bits;

    /// Whether `value` is finite, and finite in this type too.
    #[inline(always)]
    fn holds(value: f32) -> bool {
        // Without the sign, the order of floats is that of their bits, with infinities and NaN on
        // top.
        value.to_bits() & 0x7fff_ffff <= Self::LIMIT
    }

    /// The values whose bits these are.
    fn from_bits(bits: Vec<Self::Bits>) -> Vec<Self>;

    /// The bits of these values.
    fn bits_mut(values: &mut [Self]) -> &mut [Self::Bits];
}

impl Compute for f32 {
    type Bits = Self;
    const NAME: &str = "f32";
    const LIMIT: u32 = Self::MAX.to_bits();

    #[inline(always)]
    fn narrow(value: f32) -> f32 {
        value
    }

    fn from_bits(bits: Vec<f32>) -> Vec<f32> {
        bits
    }

    fn bits_mut(values: &mut [f32]) -> &mut [f32] {
        values
    }
}

impl Compute for bf16 {
    type Bits = u16;
    const NAME: &str = "bf16";
    /// Just below the middle between the largest bf16 and the power of two above it; the middle
    /// itself rounds up, to even.
    const LIMIT: u32 = 0x7f7f_7fff;

    #[inline(always)]
    fn narrow(value: f32) -> u16 {
        let bits = value.to_bits();
        let odd = (bits >> 16) & 1;
        (bits.wrapping_add(0x7fff + odd) >> 16) as u16
    }

    fn from_bits(bits: Vec<u16>) -> Vec<Self> {
        bits.reinterpret_into()
    }

    fn bits_mut(values: &mut [Self]) -> &mut [u16] {
        values.reinterpret_cast_mut()
    }
}

impl Compute for f16 {
    type Bits = u16;
    const NAME: &str = "f16";
    /// Just below 65,520, the middle between the largest f16 and the power of two above it.
    const LIMIT: u32 = 65_520f32.to_bits() - 1;

    #[inline(always)]
    fn narrow(value: f32) -> u16 {
        const LEAST_NORMAL: u32 = 113 << 23;
        /// At 0.5 the last place of an f32 is that of a subnormal f16: adding rounds to it.
        const HALF: u32 = 126 << 23;
        /// From the exponent bias of f32 to that of f16.
        const REBIAS: u32 = 112 << 23;
        let magnitude = value.to_bits() & 0x7fff_ffff;
        let subnormal = (f32::from_bits(magnitude) + f32::from_bits(HALF)).to_bits().wrapping_sub(HALF);
        let odd = (magnitude >> 13) & 1;
        let normal = magnitude.wrapping_sub(REBIAS).wrapping_add(0xfff + odd) >> 13;
        let rounded = if magnitude < LEAST_NORMAL { subnormal } else { normal };
        (rounded | (value.to_bits() >> 16) & 0x8000) as u16
    }

    fn from_bits(bits: Vec<u16>) -> Vec<Self> {
        bits.reinterpret_into()
    }

    fn bits_mut(values: &mut [Self]) -> &mut [u16] {
        values.reinterpret_cast_mut()
    }
}

/// An f16 as f32, exact. (`half` asks for the processor's instructions at every value, which keeps
/// loops from vectorising.)
#[inline(always)]
pub(super) fn widen_f16(bits: u16) -> f32 {
    const INFINITE: u32 = 0x7c00 << 13;
    const LEAST_NORMAL: u32 = 0x0400 << 13;
    const REBIAS: u32 = 112 << 23;
    const LEAST: f32 = f32::from_bits(113 << 23);
    let bits = u32::from(bits);
    let magnitude = (bits & 0x7fff) << 13;
    let normal = magnitude + REBIAS + if magnitude >= INFINITE { REBIAS } else { 0 };
    // As the mantissa of the least normal number, less that number: no subnormal is ever computed
    // with.
    let subnormal = (f32::from_bits(magnitude + LEAST.to_bits()) - LEAST).to_bits();
    f32::from_bits(if magnitude < LEAST_NORMAL { subnormal } else { normal } | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_f16_widens_exactly() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (widen_f16(bits), f16::from_bits(bits).to_f32());
            assert!(
                ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(),
                "{bits:#06x}: {ours} {theirs}"
            );
        }
    }

    fn rounds_as_half_does(value: f32) {
        assert_eq!(bf16::holds(value), bf16::from_f32(value).is_finite(), "{value:e}");
        assert_eq!(f16::holds(value), f16::from_f32(value).is_finite(), "{value:e}");
        if bf16::holds(value) {
            assert_eq!(<bf16 as Compute>::narrow(value), bf16::from_f32(value).to_bits(), "{value:e}");
        }
        if f16::holds(value) {
            assert_eq!(<f16 as Compute>::narrow(value), f16::from_f32(value).to_bits(), "{value:e}");
        }
    }

    #[test]
    fn rounding_is_to_nearest_even_at_every_boundary() {
        // Every f16 and bf16, the middle to its neighbour, and one bit around both.
        for bits in 0..=u16::MAX {
            let wide = f16::from_bits(bits).to_f32().to_bits();
            for base in [wide, wide.wrapping_add(1 << 12), u32::from(bits) << 16, u32::from(bits) << 16 | 1 << 15] {
                for bits in [base.wrapping_sub(1), base, base.wrapping_add(1)] {
                    rounds_as_half_does(f32::from_bits(bits));
                }
            }
        }
    }

    proptest! {
        #[test]
        fn rounding_is_to_nearest_even(bits: u32) {
            rounds_as_half_does(f32::from_bits(bits));
        }
    }

    #[test]
    fn limits_are_the_rounding_overflow_points() {
        assert!(f32::holds(f32::MAX) && !f32::holds(f32::INFINITY) && !f32::holds(f32::NAN) && !f32::holds(-f32::NAN));
        assert!(f16::holds(-65_519.996) && !f16::holds(65_520.0));
        assert!(bf16::holds(3.39e38) && !bf16::holds(f32::MAX));
    }
}
