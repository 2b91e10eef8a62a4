//! Blocked products of whole matrices. Blocks fit into a core's cache.

use std::arch::x86_64::*;
use std::cell::RefCell;

use rayon::prelude::*;

use super::pack::{BlockRow, DEPTH, Matrix, Real, SIDE, transposed};
use crate::MEMORY;

/// Rows of `b` per [`Method::multiply`]; `a` has [`SIDE`] rows.
const BLOCK: usize = 2 * SIDE;

/// Bytes of packed `b` per core: about the size of its L2 cache.
const LEFT: usize = 1 << 20;

/// Sums of a block: rows are rows of `b`, columns are rows of `a`.
#[repr(C, align(64))]
pub(crate) struct Sums(pub(crate) [[[f32; SIDE]; SIDE]; 2]);

/// How [`SIDE`] rows of either matrix are packed, [`DEPTH`] values of each per step, and
/// multiplied.
///
/// # Safety
/// Implementations access steps x [`Self::LEFT`] and steps x [`Self::RIGHT`] lines. Callers must
/// check that the processor has the instructions.
pub(crate) unsafe trait Method<A> {
    /// Lines of rows of `b` per step.
    const LEFT: usize;
    /// Lines of rows of `a` per step.
    const RIGHT: usize;

    /// Packs rows of `b` from `row` on.
    unsafe fn pack_left(b: &Matrix<'_>, first_row: usize, into: &mut [BlockRow]);

    /// Packs rows of `a`, each of `k` values.
    unsafe fn pack_right(a: &[A], k: usize, into: &mut [BlockRow]);

    /// Configures this thread's unit until the returned value is dropped.
    unsafe fn get_ready() -> impl Sized;

    /// Multiplies twice [`SIDE`] rows of `b` by [`SIDE`] rows of `a`, on a configured thread.
    unsafe fn multiply(left: [*const BlockRow; 2], right: *const BlockRow, steps: usize, sums: &mut Sums);
}

/// A result whose columns are divided among tasks.
#[derive(Clone, Copy)]
struct Out<T> {
    values: *mut T,
    rows: usize,
    columns: usize,
}

// SAFETY: tasks write to columns of their own alone, as [`multiply_columns`] is called.
unsafe impl<T: Send> Sync for Out<T> {}

thread_local! {
    /// Buffers of a thread for packed `b` and `a`, reused by each product.
    static LINES: [RefCell<Vec<BlockRow>>; 2] = const { [RefCell::new(Vec::new()), RefCell::new(Vec::new())] };
}

/// `lines` lines of this thread's buffer, uninitialised.
fn with_memory<R>(which: usize, lines: usize, work: impl FnOnce(&mut [BlockRow]) -> R) -> R {
    // The buffer is taken out while in use: a thread that waits in the pool may run another
    // product.
    let mut memory = LINES.with(|memory| memory[which].take());
    if memory.len() < lines {
        // A new buffer, because growing would copy the old content and may need twice the memory.
        drop(memory);
        memory = vec![BlockRow([0; DEPTH]); lines];
    }
    let result = work(&mut memory[..lines]);
    LINES.with(|kept| kept[which].replace(memory));
    result
}

/// As [`Unit::append_product`](crate::Unit::append_product).
///
/// # Safety
/// This processor has what the method uses, and AVX-512 (F, BW).
pub(crate) unsafe fn append_by<A: Real, M: Method<A>>(out: &mut Vec<A>, a: &[A], b: &Matrix<'_>) {
    let (n, k) = (b.rows, b.k);
    let m = a.len().checked_div(k).unwrap_or_default();
    assert!(m * k == a.len(), "{} values in rows of {k}", a.len());
    if k == 0 || n == 0 {
        return;
    }
    out.reserve(m * n);
    let rows_at_once = SIDE * (MEMORY / (size_of::<BlockRow>() * steps(k) * M::RIGHT)).max(1);
    for (chunk, a) in a.chunks(rows_at_once * k).enumerate() {
        // SAFETY: within the capacity, rows of this chunk alone are written; the caller's promise.
        unsafe {
            let values = out.as_mut_ptr().add(out.len() + chunk * rows_at_once * n);
            multiply_rows::<A, M>(a, b, Out { values, rows: a.len() / k, columns: n });
        }
    }
    // SAFETY: all rows of all chunks were written.
    unsafe { out.set_len(out.len() + m * n) };
}

/// Number of steps of [`DEPTH`] values.
fn steps(k: usize) -> usize {
    k.div_ceil(DEPTH)
}

/// All of `b` times some rows of `a`.
///
/// # Safety
/// As [`append_by`]; nobody else writes to these rows.
unsafe fn multiply_rows<A: Real, M: Method<A>>(a: &[A], b: &Matrix<'_>, out: Out<A>) {
    let lines = steps(b.k) * M::RIGHT;
    with_memory(1, out.rows.div_ceil(SIDE) * lines, |right| {
        let chunks = right.par_chunks_exact_mut(lines).zip(a.par_chunks(SIDE * b.k));
        // SAFETY: this processor has what the method uses.
        chunks.with_min_len(2).for_each(|(right, a)| unsafe { M::pack_right(a, b.k, right) });
        let right: &[BlockRow] = right;
        let in_memory = (LEFT / (size_of::<BlockRow>() * steps(b.k) * M::LEFT) * SIDE / BLOCK * BLOCK).max(BLOCK);
        // The same number of rows for every thread, so that all finish together.
        let tasks = b.rows.div_ceil(in_memory).next_multiple_of(rayon::current_num_threads());
        let columns = b.rows.div_ceil(tasks).next_multiple_of(BLOCK);
        (0..b.rows.div_ceil(columns)).into_par_iter().for_each(|task| {
            let first = task * columns;
            // SAFETY: as above, and no other task has these columns.
            unsafe { multiply_columns::<A, M>(b, first, columns.min(b.rows - first), right, out) };
        });
    });
}

/// Some rows of `b`, the result's columns, times the packed `a`.
///
/// # Safety
/// As [`append_by`]; nobody else writes to these columns.
unsafe fn multiply_columns<A: Real, M: Method<A>>(
    b: &Matrix<'_>,
    first: usize,
    count: usize,
    right: &[BlockRow],
    out: Out<A>,
) {
    let steps = steps(b.k);
    let lines = steps * M::LEFT;
    // Whole blocks: the second half of the last one may have no rows and is multiplied all the
    // same.
    with_memory(0, count.div_ceil(BLOCK) * 2 * lines, |left| {
        for (row, left) in (first..first + count).step_by(SIDE).zip(left.chunks_exact_mut(lines)) {
            // SAFETY: this processor has what the method uses.
            unsafe { M::pack_left(b, row, left) };
        }
        // SAFETY: as above.
        let _ready = unsafe { M::get_ready() };
        let mut sums = Sums([[[0.0; SIDE]; SIDE]; 2]);
        for (chunk, right) in right.chunks_exact(steps * M::RIGHT).enumerate() {
            for (block, left) in left.chunks_exact(2 * lines).enumerate() {
                let left = [left.as_ptr(), left[lines..].as_ptr()];
                // SAFETY: this thread is ready, and both sides have as many lines as their
                // matrices take.
                unsafe {
                    M::multiply(left, right.as_ptr(), steps, &mut sums);
                    write(&sums, out, chunk * SIDE, first + block * BLOCK);
                }
            }
        }
    });
}

/// Adds a block of sums to the result's rows and columns.
///
/// # Safety
/// AVX-512 (F, BW); nobody else writes to these columns.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn write<A: Real>(sums: &Sums, out: Out<A>, row: usize, column: usize) {
    for (half, sums) in sums.0.iter().enumerate() {
        let column = column + half * SIDE;
        if column >= out.columns {
            break;
        }
        // SAFETY: a row of sums is as large.
        let lines = std::array::from_fn(|line| unsafe { _mm512_load_si512(sums[line].as_ptr().cast()) });
        let count = SIDE.min(out.columns - column);
        for (at, line) in transposed(lines).into_iter().enumerate().take(out.rows - row) {
            // SAFETY: that row has as many columns, and they are this task's.
            unsafe { A::write(out.values.add((row + at) * out.columns + column), count, line) };
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::pack::DEPTH;
    use super::super::tiles::Tiles;
    use super::*;
    use crate::Order;
    use crate::tests::{Number, check_by};

    /// Emulates the tile unit (Intel's manual, TDPBF16PS) for processors without AMX.
    struct ByHand;

    // SAFETY: reads and writes what tiles would.
    unsafe impl<A: Real> Method<A> for ByHand {
        const LEFT: usize = <Tiles as Method<A>>::LEFT;
        const RIGHT: usize = <Tiles as Method<A>>::RIGHT;

        unsafe fn pack_left(b: &Matrix<'_>, first_row: usize, into: &mut [BlockRow]) {
            // SAFETY: the caller's promise, as in all of these.
            unsafe { <Tiles as Method<A>>::pack_left(b, first_row, into) };
        }

        unsafe fn pack_right(a: &[A], k: usize, into: &mut [BlockRow]) {
            // SAFETY: as above.
            unsafe { <Tiles as Method<A>>::pack_right(a, k, into) };
        }

        unsafe fn get_ready() -> impl Sized {}

        unsafe fn multiply(left: [*const BlockRow; 2], right: *const BlockRow, steps: usize, sums: &mut Sums) {
            let value = |line: &BlockRow, at: usize| bf16::from_bits(line.0[at]).to_f32();
            for (left, sums) in left.into_iter().zip(&mut sums.0) {
                // SAFETY: as above.
                let left = unsafe { std::slice::from_raw_parts(left, steps * SIDE) };
                // SAFETY: as above.
                let right = unsafe { std::slice::from_raw_parts(right, steps * SIDE * A::PARTS) };
                for (row, column) in (0..SIDE).flat_map(|row| (0..SIDE).map(move |column| (row, column))) {
                    let blocks = left.chunks(SIDE).zip(right.chunks(SIDE * A::PARTS));
                    let products = blocks.flat_map(|(left, right)| {
                        let of_part = move |right: &[BlockRow], at: usize| {
                            value(&left[row], at) * value(&right[at / 2], 2 * column + at % 2)
                        };
                        right.chunks(SIDE).flat_map(move |part| (0..DEPTH).map(move |at| of_part(part, at)))
                    });
                    sums[row][column] = products.sum();
                }
            }
        }
    }

    fn check<A: Number>(shape: [usize; 3], order: Order) {
        check_by("tiles by hand", shape, order, |out: &mut Vec<A>, a, b| {
            let b = Matrix::new(b, order, shape[1], shape[2]);
            // SAFETY: the processor has vectors.
            unsafe { append_by::<A, ByHand>(out, a, &b) };
        });
    }

    #[test]
    fn tiles_have_the_layout_of_the_tile_unit() {
        if super::super::found().is_empty() {
            eprintln!("this processor has no AVX-512: nothing was tested");
            return;
        }
        for (shape, order) in [([32, 32, 32], Order::Rows), ([37, 41, 70], Order::Rows), ([19, 50, 33], Order::Columns)]
        {
            check::<f32>(shape, order);
            check::<bf16>(shape, order);
        }
    }
}
