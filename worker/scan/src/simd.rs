//! Loops compiled for wider vectors.

/// Runs a loop compiled for AVX2 or AVX-512 if the processor has them. On other platforms the
/// plain code is already the best. Results are bit-identical: nothing is contracted or reordered.
///
/// The closure must be `#[inline(always)]`, or it may be compiled without the wider vectors.
#[inline(always)]
pub fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(avx512) = pulp::x86::V4::try_new() {
            return pulp::Simd::vectorize(avx512, work);
        }
        if let Some(avx2) = pulp::x86::V3::try_new() {
            return pulp::Simd::vectorize(avx2, work);
        }
    }
    work()
}

/// [`vectorized`](crate::simd::vectorized) of an expression.
#[macro_export]
macro_rules! vectorize {
    ($work:expr) => {
        $crate::simd::vectorized(
            #[inline(always)]
            || $work,
        )
    };
}
