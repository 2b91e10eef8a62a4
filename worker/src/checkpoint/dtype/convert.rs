//! The dtypes of a forward pass, and rounding to them in loops that vectorise.

use candle_core::WithDType;
use half::slice::HalfFloatSliceExt;
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};

/// A dtype of the forward pass.
pub trait Compute: WithDType {
    /// The type that is written. The system provides its zeros without a write.
    type Bits: Copy + Default + Send + Sync + std::fmt::Debug + PartialEq;

    /// Name in messages.
    const NAME: &'static str;

    /// Magnitude bits of the largest f32 that rounds to a finite value.
    const LIMIT: u32;

    /// Rounds to nearest, ties to even. Unspecified for values that this type does not
    /// [hold](Self::holds).
    fn narrow(value: f32) -> Self::Bits;

    /// Whether `value` is finite in f32 and in this type.
    #[inline(always)]
    fn holds(value: f32) -> bool {
        // Without the sign, floats are ordered as their bits, with infinities and NaN last.
        value.to_bits() & 0x7fff_ffff <= Self::LIMIT
    }

    /// Values from their bits.
    fn from_bits(bits: Vec<Self::Bits>) -> Vec<Self>;

    /// Bits of these values.
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
    /// Just below the midpoint between the largest bf16 and the next power of two. The midpoint
    /// rounds up, to even.
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
    /// Just below 65,520, the midpoint between the largest f16 and the next power of two.
    const LIMIT: u32 = 65_520f32.to_bits() - 1;

    #[inline(always)]
    fn narrow(value: f32) -> u16 {
        const MIN_NORMAL: u32 = 113 << 23;
        /// The last place of an f32 at 0.5 is that of a subnormal f16, so the addition rounds to
        /// it.
        const HALF: u32 = 126 << 23;
        /// Difference of the exponent biases of f32 and f16.
        const REBIAS: u32 = 112 << 23;
        let magnitude = value.to_bits() & 0x7fff_ffff;
        let subnormal = (f32::from_bits(magnitude) + f32::from_bits(HALF)).to_bits().wrapping_sub(HALF);
        let odd = (magnitude >> 13) & 1;
        let normal = magnitude.wrapping_sub(REBIAS).wrapping_add(0xfff + odd) >> 13;
        let rounded = if magnitude < MIN_NORMAL { subnormal } else { normal };
        (rounded | (value.to_bits() >> 16) & 0x8000) as u16
    }

    fn from_bits(bits: Vec<u16>) -> Vec<Self> {
        bits.reinterpret_into()
    }

    fn bits_mut(values: &mut [Self]) -> &mut [u16] {
        values.reinterpret_cast_mut()
    }
}

/// Converts an f16 to f32 exactly. (`half` tests for processor instructions at every value, which
/// prevents vectorisation.)
#[inline(always)]
pub(super) fn widen_f16(bits: u16) -> f32 {
    const INFINITE: u32 = 0x7c00 << 13;
    const MIN_NORMAL: u32 = 0x0400 << 13;
    const REBIAS: u32 = 112 << 23;
    const SUBNORMAL_BIAS: f32 = f32::from_bits(113 << 23);
    let bits = u32::from(bits);
    let magnitude = (bits & 0x7fff) << 13;
    let normal = magnitude + REBIAS + if magnitude >= INFINITE { REBIAS } else { 0 };
    // Computed as the mantissa of the least normal number minus that number, which avoids
    // arithmetic on subnormals.
    let subnormal = (f32::from_bits(magnitude + SUBNORMAL_BIAS.to_bits()) - SUBNORMAL_BIAS).to_bits();
    f32::from_bits(if magnitude < MIN_NORMAL { subnormal } else { normal } | (bits & 0x8000) << 16)
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
        // All f16 and bf16, the midpoints to their neighbours, and one bit around both.
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
