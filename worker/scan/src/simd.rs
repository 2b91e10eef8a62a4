//! Loops with the vectors that this processor has.

/// Runs a loop with wider vectors than every processor of its kind has: its code is compiled
/// again, for AVX2 and for AVX-512. Elsewhere than on x86-64 the plain code has the best already.
/// Which of them ran cannot be told from the results: nothing is contracted or reordered.
///
/// A closure that is not `#[inline(always)]` may stay outside, and as it was.
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
