//! Packs rows of numbers into blocks, and unpacks blocks of sums into rows.

use std::arch::x86_64::*;

use half::bf16;

use crate::Order;

/// Rows and 32-bit columns of a block.
pub(crate) const SIDE: usize = 16;
/// Values per row that are packed in one step.
pub(crate) const DEPTH: usize = 2 * SIDE;

/// A row of a block, aligned for loads.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct BlockRow(pub(crate) [u16; DEPTH]);

/// Most bf16 parts of a number.
const MAX_PARTS: usize = 3;

/// A number that is a sum of bf16 parts.
///
/// # Safety
/// Implementations access no more than `count` numbers.
pub unsafe trait Real: Copy + Send + Sync {
    /// Number of parts.
    const PARTS: usize;

    /// The parts of `count` (at most 32) numbers, one after the other. Missing numbers and parts
    /// are 0.
    ///
    /// # Safety
    /// AVX-512 (F, BW); `count` numbers at `from`.
    unsafe fn parts(from: *const Self, count: usize) -> [__m512i; MAX_PARTS];

    /// At most 16 numbers as f32. Missing numbers are 0.
    ///
    /// # Safety
    /// AVX-512 (F, BW); `count` numbers at `from`.
    unsafe fn wide(from: *const Self, count: usize) -> __m512i;

    /// Writes `count` (at most 16) sums.
    ///
    /// # Safety
    /// AVX-512 (F, BW); room for `count` numbers at `to`.
    unsafe fn write(to: *mut Self, count: usize, sums: __m512i);
}

/// Mask of the lowest `count` bits.
fn mask(count: usize) -> u32 {
    if count >= DEPTH { !0 } else { (1 << count) - 1 }
}

// SAFETY: all loads and stores are masked to what there is.
unsafe impl Real for f32 {
    const PARTS: usize = 3;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn parts(from: *const Self, count: usize) -> [__m512i; MAX_PARTS] {
        let first = count.min(SIDE);
        // SAFETY: `count` numbers are there, so the second sixteen begin at the end of the first.
        let (low, high) = unsafe {
            let low = _mm512_maskz_loadu_ps(mask(first) as __mmask16, from);
            (low, _mm512_maskz_loadu_ps(mask(count - first) as __mmask16, from.add(first)))
        };
        let (low, high) = (split(low), split(high));
        let upper_halves: [u16; DEPTH] = std::array::from_fn(|i| 2 * i as u16 + 1);
        // SAFETY: as large as it has to be.
        let upper_halves = unsafe { _mm512_loadu_si512(upper_halves.as_ptr().cast()) };
        std::array::from_fn(|part| _mm512_permutex2var_epi16(low[part], upper_halves, high[part]))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn wide(from: *const Self, count: usize) -> __m512i {
        // SAFETY: `count` numbers are there.
        unsafe { _mm512_castps_si512(_mm512_maskz_loadu_ps(mask(count) as __mmask16, from)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn write(to: *mut Self, count: usize, sums: __m512i) {
        // SAFETY: there is room for `count`.
        unsafe { _mm512_mask_storeu_ps(to, mask(count) as __mmask16, _mm512_castsi512_ps(sums)) };
    }
}

// SAFETY: all loads and stores are masked to what there is.
unsafe impl Real for bf16 {
    const PARTS: usize = 1;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn parts(from: *const Self, count: usize) -> [__m512i; MAX_PARTS] {
        // SAFETY: `count` numbers are there.
        let x = unsafe { _mm512_maskz_loadu_epi16(mask(count), from.cast()) };
        [x, _mm512_setzero_si512(), _mm512_setzero_si512()]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn wide(from: *const Self, count: usize) -> __m512i {
        // SAFETY: `count` numbers are there.
        let x = unsafe { _mm512_maskz_loadu_epi16(mask(count), from.cast()) };
        _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn write(to: *mut Self, count: usize, sums: __m512i) {
        // To nearest, ties to even; NaN is preserved.
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(sums), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(sums, _mm512_set1_epi32(0x7fff)), odd);
        let value = _mm512_castsi512_ps(sums);
        let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
        let quiet = _mm512_or_si512(sums, _mm512_set1_epi32(0x0040_0000));
        let halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(_mm512_mask_blend_epi32(is_nan, rounded, quiet)));
        // SAFETY: there is room for `count`, at most 16.
        unsafe {
            _mm512_mask_storeu_epi16(to.cast(), mask(count), _mm512_castsi256_si512(halves));
        }
    }
}

/// The three parts of sixteen numbers, each in the upper half of 32 bits: the first eight
/// significant bits, the next eight, and the last.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn split(x: __m512) -> [__m512i; MAX_PARTS] {
    let first_bits = |x: __m512| {
        let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), upper))
    };
    let high = first_bits(x);
    let rest = _mm512_sub_ps(x, high);
    let middle = first_bits(rest);
    [high, middle, _mm512_sub_ps(rest, middle)].map(|part| _mm512_castps_si512(part))
}

/// Transposes sixteen by sixteen values of 32 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn transposed(r: [__m512i; SIDE]) -> [__m512i; SIDE] {
    let mut t = r;
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    // Of four rows, in each 128-bit part of a register: column 0, 1, 2, 3 of that part.
    let mut q = t;
    for i in 0..4 {
        let [a, b, c, d] = [t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]];
        q[4 * i] = _mm512_unpacklo_epi64(a, c);
        q[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
        q[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
        q[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    let mut out = q;
    for column in 0..4 {
        let [a, b, c, d] = [q[column], q[4 + column], q[8 + column], q[12 + column]];
        let (even_low, even_high) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d));
        let (odd_low, odd_high) = (_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d));
        out[column] = _mm512_shuffle_i32x4::<0x88>(even_low, even_high);
        out[8 + column] = _mm512_shuffle_i32x4::<0xdd>(even_low, even_high);
        out[4 + column] = _mm512_shuffle_i32x4::<0x88>(odd_low, odd_high);
        out[12 + column] = _mm512_shuffle_i32x4::<0xdd>(odd_low, odd_high);
    }
    out
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn store(block: [__m512i; SIDE], into: &mut [BlockRow]) {
    for (into, line) in into.iter_mut().zip(block) {
        // SAFETY: a line is as large.
        unsafe { _mm512_store_si512((&raw mut *into).cast(), line) };
    }
}

/// `count` values of each of sixteen rows, loaded by `load`; missing rows are 0. (Most blocks are
/// full and need no masks.)
///
/// # Safety
/// `load` accesses no more than `count` values.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn rows<T, R>(
    values: &[T],
    k: usize,
    first: usize,
    full: usize,
    load: impl Fn(*const T, usize) -> R,
) -> [R; SIDE] {
    let rows = values.len() / k;
    std::array::from_fn(|row| {
        let row = if row < rows { &values[row * k + first..][..(k - first).min(full)] } else { &[] };
        if row.len() == full { load(row.as_ptr(), full) } else { load(row.as_ptr(), row.len()) }
    })
}

/// Packs at most sixteen rows of `a` by step and part. Each line has two adjacent values of every
/// row.
///
/// # Safety
/// AVX-512 (F, BW).
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) unsafe fn pairs_of_right<A: Real>(a: &[A], k: usize, into: &mut [BlockRow]) {
    for (step, into) in into.chunks_exact_mut(A::PARTS * SIDE).enumerate() {
        // SAFETY: as many values as there are.
        let rows = unsafe { rows(a, k, step * DEPTH, DEPTH, |from, count| A::parts(from, count)) };
        for (part, into) in into.chunks_exact_mut(SIDE).enumerate() {
            store(transposed(std::array::from_fn(|row| rows[row][part])), into);
        }
    }
}

/// Packs at most sixteen rows of `a` by step. Each line has one value of every row, as f32.
///
/// # Safety
/// AVX-512 (F, BW).
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) unsafe fn singles_of_right<A: Real>(a: &[A], k: usize, into: &mut [BlockRow]) {
    for (half, into) in into.chunks_exact_mut(SIDE).enumerate() {
        let first = (half * SIDE).min(k);
        // SAFETY: as many values as there are.
        let rows = unsafe { rows(a, k, first, SIDE, |from, count| A::wide(from, count)) };
        store(transposed(rows), into);
    }
}

/// Packs at most sixteen rows of `b` by step. Each line has the values of one row.
///
/// # Safety
/// AVX-512 (F, BW).
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) unsafe fn pairs_of_left(b: &Matrix<'_>, first_row: usize, into: &mut [BlockRow]) {
    for (step, into) in into.chunks_exact_mut(SIDE).enumerate() {
        let first = step * DEPTH;
        let block = match b.order {
            // SAFETY: as many values as there are.
            Order::Rows => unsafe {
                rows(b.rows_from(first_row), b.k, first, DEPTH, |from, count| bf16::parts(from, count)[0])
            },
            Order::Columns => {
                let column = |at: usize| {
                    let values = b.column(first + at, first_row);
                    // SAFETY: as many values as the slice has.
                    let x = unsafe { _mm512_maskz_loadu_epi16(mask(values.len()), values.as_ptr().cast()) };
                    _mm512_cvtepu16_epi32(_mm512_castsi512_si256(x))
                };
                let pair = |pair| _mm512_or_si512(column(2 * pair), _mm512_slli_epi32::<16>(column(2 * pair + 1)));
                transposed(std::array::from_fn(pair))
            }
        };
        store(block, into);
    }
}

/// Packs at most sixteen rows of `b` by half step. Each line has the values of one row, as f32.
///
/// # Safety
/// AVX-512 (F, BW).
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) unsafe fn singles_of_left(b: &Matrix<'_>, first_row: usize, into: &mut [BlockRow]) {
    for (half, into) in into.chunks_exact_mut(SIDE).enumerate() {
        let first = (half * SIDE).min(b.k);
        // SAFETY: as many values as there are.
        let block = unsafe {
            match b.order {
                Order::Rows => rows(b.rows_from(first_row), b.k, first, SIDE, |from, count| bf16::wide(from, count)),
                Order::Columns => transposed(std::array::from_fn(|at| {
                    let values = b.column(first + at, first_row);
                    bf16::wide(values.as_ptr(), values.len())
                })),
            }
        };
        store(block, into);
    }
}

/// A matrix `[rows, k]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    values: &'a [bf16],
    order: Order,
    pub(crate) rows: usize,
    pub(crate) k: usize,
}

impl<'a> Matrix<'a> {
    /// # Panics
    /// If `values` does not have `rows * k` values.
    pub(crate) fn new(values: &'a [bf16], order: Order, rows: usize, k: usize) -> Self {
        assert!(rows * k == values.len(), "{} values in {rows} rows of {k}", values.len());
        Self { values, order, rows, k }
    }

    /// At most sixteen rows, from a row-major matrix.
    fn rows_from(&self, first: usize) -> &[bf16] {
        &self.values[first * self.k..(first + SIDE).min(self.rows) * self.k]
    }

    /// Values of at most sixteen rows from a column-major matrix. Missing columns are left out.
    fn column(&self, at: usize, first: usize) -> &[bf16] {
        if at < self.k { &self.values[at * self.rows..][first..(first + SIDE).min(self.rows)] } else { &[] }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Sums of the parts of sixteen numbers.
    #[target_feature(enable = "avx512f,avx512bw")]
    fn put_together(x: [f32; SIDE]) -> [f32; SIDE] {
        // SAFETY: sixteen numbers are there.
        let parts = unsafe { f32::parts(x.as_ptr(), SIDE) };
        let values = parts.map(|part| {
            let mut halves = [bf16::ZERO; DEPTH];
            // SAFETY: as large as it has to be.
            unsafe { _mm512_storeu_si512(halves.as_mut_ptr().cast(), part) };
            halves
        });
        std::array::from_fn(|i| values.iter().map(|part| part[i].to_f32()).sum())
    }

    fn check(x: f32) {
        if !(is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")) {
            return crate::tests::not_checked();
        }
        // SAFETY: it has.
        assert_eq!(unsafe { put_together([x; SIDE]) }, [x; SIDE]);
    }

    #[test]
    fn largest_f32_values_split_into_bf16_parts() {
        for x in [0.0, f32::MAX, f32::MIN, f32::from_bits(0x7f7f_8000), 1.0 + f32::EPSILON, 2.0 - f32::EPSILON] {
            check(x);
        }
    }

    proptest! {
        /// Numbers whose last part is normal; AMX treats subnormal parts as zero.
        #[test]
        fn three_bf16_parts_sum_to_the_f32(sign in any::<bool>(), exponent in 24..255u32, fraction in 0..1u32 << 23) {
            check(f32::from_bits(u32::from(sign) << 31 | exponent << 23 | fraction));
        }
    }
}
