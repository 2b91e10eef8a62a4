//! AVX-512: sixteen sums at a time per row of `b`.

use std::arch::x86_64::*;

use super::pack::{self, BlockRow, Matrix, Real, SIDE};
use super::product::{Method, Sums};

/// Pairs of bf16 (AVX512_BF16).
pub(crate) struct Pairs;

/// Single f32; bf16 is converted to f32.
pub(crate) struct Singles;

/// Implements a method with so many blocks of lines per step, on either side. A block of `b` times
/// a block of `a`: each line of `right` times one 32-bit value of every row of `left`.
macro_rules! method {
    ($name:ident, $blocks:literal, $features:literal, $add:ident, $left:ident, $right:ident) => {
        impl $name {
            /// # Safety
            /// AVX-512 of this kind; so many blocks of lines after each address.
            #[target_feature(enable = $features)]
            unsafe fn multiply_blocks(
                left: [*const BlockRow; 2],
                right: *const BlockRow,
                blocks: usize,
                sums: &mut Sums,
            ) {
                for (left, sums) in left.into_iter().zip(&mut sums.0) {
                    let mut rows = [_mm512_setzero_ps(); SIDE];
                    let (mut left, mut right) = (left.cast::<i32>(), right);
                    for _ in 0..blocks {
                        for at in 0..SIDE {
                            // SAFETY: a block has as many lines, and a line as many values.
                            unsafe {
                                let x = _mm512_load_si512(right.add(at).cast());
                                for (row, sum) in rows.iter_mut().enumerate() {
                                    *sum = $add(*sum, x, _mm512_set1_epi32(*left.add(row * SIDE + at)));
                                }
                            }
                        }
                        (left, right) = (left.wrapping_add(SIDE * SIDE), right.wrapping_add(SIDE));
                    }
                    for (sums, row) in sums.iter_mut().zip(rows) {
                        // SAFETY: a row of sums is as large.
                        unsafe { _mm512_store_ps(sums.as_mut_ptr(), row) };
                    }
                }
            }
        }

        // SAFETY: so many blocks of lines per step, on either side.
        unsafe impl<A: Real> Method<A> for $name {
            const LEFT: usize = $blocks * SIDE;
            const RIGHT: usize = $blocks * SIDE;

            unsafe fn pack_left(b: &Matrix<'_>, first_row: usize, into: &mut [BlockRow]) {
                // SAFETY: the caller's promise, as in all of these.
                unsafe { pack::$left(b, first_row, into) };
            }

            unsafe fn pack_right(a: &[A], k: usize, into: &mut [BlockRow]) {
                assert!($blocks == 2 || A::PARTS == 1, "values of a pair are of one part each");
                // SAFETY: as above.
                unsafe { pack::$right(a, k, into) };
            }

            unsafe fn get_ready() -> impl Sized {}

            unsafe fn multiply(left: [*const BlockRow; 2], right: *const BlockRow, steps: usize, sums: &mut Sums) {
                // SAFETY: as above.
                unsafe { Self::multiply_blocks(left, right, $blocks * steps, sums) };
            }
        }
    };
}

/// Adds two products to each sum.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn add_pairs(sum: __m512, x: __m512i, y: __m512i) -> __m512 {
    // SAFETY: the same bits.
    let [x, y] = unsafe { [x, y].map(|pairs| std::mem::transmute::<__m512i, __m512bh>(pairs)) };
    _mm512_dpbf16_ps(sum, x, y)
}

/// Adds one product to each sum.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_singles(sum: __m512, x: __m512i, y: __m512i) -> __m512 {
    _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), sum)
}

method!(Pairs, 1, "avx512f,avx512bf16", add_pairs, pairs_of_left, pairs_of_right);
method!(Singles, 2, "avx512f", add_singles, singles_of_left, singles_of_right);
