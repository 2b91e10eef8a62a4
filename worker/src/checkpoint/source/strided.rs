//! Reads tensors that are not contiguous: transposed matrices, every other column, a repeated row.

use std::ops::Range;

use super::TensorEntry;
use crate::checkpoint::safetensors::shown;
use crate::error::{Result, WorkerError};

/// Fills a buffer with bytes of a file from an offset.
pub(super) type ReadAt<'a> = &'a dyn Fn(u64, &mut [u8]) -> Result<()>;

/// Maximum bytes per read, those between the wanted values included.
const CHUNK: u64 = 1 << 20;

/// A dimension, in values.
#[derive(Clone, Copy)]
struct Dim {
    count: u64,
    /// Distance between indices in the file.
    stride: u64,
    /// Distance between indices in row-major order.
    step: u64,
}

/// Fills `into` with the bytes `range` of a tensor's values in row-major order.
///
/// # Errors
/// Kind `Internal`: the range splits a value; else errors of the reader.
pub(super) fn gather(
    entry: &TensorEntry,
    strides: &[u64],
    range: Range<u64>,
    into: &mut [u8],
    read: ReadAt<'_>,
) -> Result<()> {
    let whole = |size: &u64| range.start.is_multiple_of(*size) && range.end.is_multiple_of(*size);
    let Some(size) = entry.dtype.size().filter(whole) else {
        return Err(WorkerError::internal(format!("bytes {range:?} of {} cut a value", shown(&entry.name))));
    };
    let wanted = range.start / size..range.end / size;
    if wanted.is_empty() {
        return Ok(());
    }
    let (mut dims, start) = dims(&entry.shape, strides, &wanted);
    let inner = dims.remove(innermost(&dims));
    let mut chunk = Vec::new();
    for (ordinal, place) in starts(&dims) {
        // The wanted values along the innermost dimension.
        let (ordinal, place) = (start.step + ordinal, start.stride + place);
        let first = wanted.start.saturating_sub(ordinal).div_ceil(inner.step);
        let end = wanted.end.saturating_sub(ordinal).div_ceil(inner.step).min(inner.count);
        let most = (CHUNK / (inner.stride * size).max(1)).max(1);
        for first in (first..end).step_by(most as usize) {
            let count = most.min(end - first);
            chunk.resize((((count - 1) * inner.stride + 1) * size) as usize, 0);
            read(entry.offset + (place + first * inner.stride) * size, &mut chunk)?;
            for i in 0..count {
                let to = (ordinal + (first + i) * inner.step - wanted.start) * size;
                let value = &chunk[(i * inner.stride * size) as usize..][..size as usize];
                into[to as usize..][..size as usize].copy_from_slice(value);
            }
        }
    }
    Ok(())
}

/// The dimensions, the first limited to the rows with wanted values, and the index of the first
/// such row.
fn dims(shape: &[u64], strides: &[u64], wanted: &Range<u64>) -> (Vec<Dim>, Dim) {
    let mut step = 1;
    let dim = |(&count, &stride): (&u64, &u64)| {
        let dim = Dim { count, stride, step };
        step *= count;
        dim
    };
    let mut dims: Vec<Dim> = shape.iter().zip(strides).rev().map(dim).collect();
    dims.reverse();
    let Dim { stride, step, .. } = dims[0];
    let rows = wanted.start / step..wanted.end.div_ceil(step);
    dims[0].count = rows.end - rows.start;
    (dims, Dim { count: 1, stride: rows.start * stride, step: rows.start * step })
}

/// The dimension with the smallest distance in the file.
fn innermost(dims: &[Dim]) -> usize {
    let apart = (0..dims.len()).filter(|&i| dims[i].count > 1 && dims[i].stride > 0);
    apart.min_by_key(|&i| dims[i].stride).unwrap_or(dims.len() - 1)
}

/// Positions, in row-major order and in the file, of the first value of each run along the
/// innermost dimension.
fn starts(dims: &[Dim]) -> impl Iterator<Item = (u64, u64)> {
    let total: u64 = dims.iter().map(|dim| dim.count).product();
    (0..total).map(|number| {
        let mut left = number;
        dims.iter().rev().fold((0, 0), |(ordinal, place), dim| {
            let index = left % dim.count;
            left /= dim.count;
            (ordinal + index * dim.step, place + index * dim.stride)
        })
    })
}

#[cfg(test)]
mod tests;
