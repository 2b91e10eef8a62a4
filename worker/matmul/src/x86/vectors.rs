//! AVX-512: sixteen sums at a time per row of `b`.

use std::arch::x86_64::*;

use super::pack::{self, BlockRow, Matrix, Real, SIDE};
use super::product::{Method, Sums};

/// Pairs of bf16 (AVX512_BF16).
pub(crate) struct Pairs;

/// Single f32; bf16 is converted to f32.
pub(crate) struct Singles;

/// A block of `b` times a block of `a`: each line of `right` times one 32-bit value of every row
/// of `left`.
macro_rules! multiply {
    ($name:ident, $features:literal, $add:ident) => {
        /// # Safety
        /// AVX-512 of this kind; so many blocks of lines after each address.
        #[target_feature(enable = $features)]
        unsafe fn $name(left: [*const BlockRow; 2], right: *const BlockRow, blocks: usize, sums: &mut Sums) {
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

multiply!(multiply_pairs, "avx512f,avx512bf16", add_pairs);
multiply!(multiply_singles, "avx512f", add_singles);

// SAFETY: one block of lines per step, on either side.
unsafe impl<A: Real> Method<A> for Pairs {
    const LEFT: usize = SIDE;
    const RIGHT: usize = SIDE;

    unsafe fn pack_left(b: &Matrix<'_>, first_row: usize, into: &mut [BlockRow]) {
        // SAFETY: the caller's promise, as in all of these.
        unsafe { pack::pairs_of_left(b, first_row, into) };
    }

    unsafe fn pack_right(a: &[A], k: usize, into: &mut [BlockRow]) {
        assert!(A::PARTS == 1, "values of a pair are of one part each");
        // SAFETY: as above.
        unsafe { pack::pairs_of_right(a, k, into) };
    }

    unsafe fn get_ready() -> impl Sized {}

    unsafe fn multiply(left: [*const BlockRow; 2], right: *const BlockRow, steps: usize, sums: &mut Sums) {
        // SAFETY: as above.
        unsafe { multiply_pairs(left, right, steps, sums) };
    }
}

// SAFETY: two blocks of lines per step, on either side.
unsafe impl<A: Real> Method<A> for Singles {
    const LEFT: usize = 2 * SIDE;
    const RIGHT: usize = 2 * SIDE;

    unsafe fn pack_left(b: &Matrix<'_>, first_row: usize, into: &mut [BlockRow]) {
        // SAFETY: as above.
        unsafe { pack::singles_of_left(b, first_row, into) };
    }

    unsafe fn pack_right(a: &[A], k: usize, into: &mut [BlockRow]) {
        // SAFETY: as above.
        unsafe { pack::singles_of_right(a, k, into) };
    }

    unsafe fn get_ready() -> impl Sized {}

    unsafe fn multiply(left: [*const BlockRow; 2], right: *const BlockRow, steps: usize, sums: &mut Sums) {
        // SAFETY: as above.
        unsafe { multiply_singles(left, right, 2 * steps, sums) };
    }
}
