//! Decodes stored weights on a GPU, with the kernels of `decode.cu`. The worker's `dtype` is the
//! CPU form.

use std::ops::Range;

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaStream, DriverError};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::kernels::Argument::{Address, Float, Number as Word};
use crate::kernels::{File, Grid, launch, number};

/// Threads per block, as in `values.cuh`.
const THREADS: usize = 256;
/// Bytes that a thread copies at a time.
const COPIED_AT_ONCE: usize = 1 << 19;
/// Alignment of scales, bytes.
const ALIGNMENT: usize = 16;

/// Storage format of a number; the discriminants are those of `decode.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Number {
    /// IEEE single precision (f32).
    F32 = 0,
    /// IEEE half precision (f16).
    F16 = 1,
    /// bfloat16.
    Bf16 = 2,
    /// Powers of two (E8M0).
    E8m0 = 3,
    /// FP8 E4M3: 3 bits of mantissa, no infinities.
    E4m3 = 4,
}

impl Number {
    /// Bytes per number.
    fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::E8m0 | Self::E4m3 => 1,
        }
    }
}

/// A dtype that stored numbers are decoded to.
pub trait Value {
    /// Its name, also in the kernels' names.
    const NAME: &'static str;
    /// How it is stored.
    const STORED: Number;
}

impl Value for f32 {
    const NAME: &'static str = "f32";
    const STORED: Number = Number::F32;
}

impl Value for bf16 {
    const NAME: &'static str = "bf16";
    const STORED: Number = Number::Bf16;
}

impl Value for f16 {
    const NAME: &'static str = "f16";
    const STORED: Number = Number::F16;
}

/// Layout of stored bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// Consecutive floats.
    Plain(Number),
    /// A matrix of FP8 E4M3 codes with a scale per tile.
    Tiles {
        /// Storage format of the scales.
        scales: Number,
        /// Columns of the matrix.
        columns: usize,
        /// Rows and columns of a tile, at most those of the matrix.
        tile: [usize; 2],
    },
    /// Two codes of 4 bits per byte, low half first, with a scale per group.
    Pairs {
        /// Format of the codes.
        codes: Codes,
        /// Storage format of the scales.
        scales: Number,
        /// Factor of all scales.
        whole: f32,
        /// Values of a group; an even number.
        group: usize,
    },
}

/// Format of 4-bit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    /// Floats: E2M1.
    Floats,
    /// Integers, minus 8.
    Integers,
}

/// A tensor as a checkpoint stores it, in row-major order. The caller has checked that lengths fit
/// the form and the number of values, and that scales are finite.
#[derive(Clone, Copy, Debug)]
pub struct StoredTensor<'a> {
    /// Layout of the bytes.
    pub form: Form,
    /// One code per value.
    pub codes: &'a [u8],
    /// Scales, if the form has them.
    pub scales: &'a [u8],
}

/// A range of a stored tensor's values, and the ranges of its codes and scales in bytes.
#[derive(Debug)]
pub(crate) struct EncodedChunk {
    values: Range<usize>,
    codes: Range<usize>,
    scales: Range<usize>,
}

/// GPU addresses for decoding a piece.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DecodeAddresses {
    /// Input: the piece's bytes, as [`EncodedChunk::copy`] arranges them.
    pub(crate) stored: CUdeviceptr,
    /// Output: the values.
    pub(crate) values: CUdeviceptr,
    /// Output: the note about values that do not fit the dtype.
    pub(crate) note: CUdeviceptr,
}

impl Form {
    /// Splits `count` values into pieces of at most `room` bytes, where the form allows it.
    pub(crate) fn pieces(self, count: usize, room: usize) -> impl Iterator<Item = EncodedChunk> {
        let granule = match self {
            Self::Plain(_) => 1,
            Self::Tiles { columns, .. } => columns,
            Self::Pairs { group, .. } => group,
        };
        let granule = granule.clamp(1, count.max(1));
        let least = (count > 0).then(|| self.piece(0..granule));
        let bytes = least.map_or(1, |piece| piece.codes.len() + piece.scales.len());
        let at_once = (room / bytes).max(1) * granule;
        (0..count).step_by(at_once).map(move |start| self.piece(start..count.min(start + at_once)))
    }

    /// Whether the stored bytes of a value equal its decoded bytes.
    pub(crate) fn is_stored_as<T: Value>(self) -> bool {
        self == Self::Plain(T::STORED)
    }

    fn piece(self, values: Range<usize>) -> EncodedChunk {
        let (codes, scales) = match self {
            Self::Plain(number) => (values.start * number.size()..values.end * number.size(), 0..0),
            Self::Tiles { scales, columns, tile } => {
                let rows = values.start / columns..values.end / columns;
                let row_of_tiles = columns.div_ceil(tile[1]) * scales.size();
                let tiles = rows.start / tile[0]..rows.end.div_ceil(tile[0]);
                (values.clone(), tiles.start * row_of_tiles..tiles.end * row_of_tiles)
            }
            Self::Pairs { scales, group, .. } => {
                let groups = values.start / group..values.end / group;
                (values.start / 2..values.end / 2, groups.start * scales.size()..groups.end * scales.size())
            }
        };
        EncodedChunk { values, codes, scales }
    }

    /// Decodes a piece, in the order of the stream. `before`: values decoded earlier with the same
    /// note.
    ///
    /// # Safety
    /// The places are of as many bytes and values as the piece has, and of a note; all of that
    /// belongs to the stream.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub(crate) unsafe fn launch<T: Value>(
        self,
        stream: &CudaStream,
        piece: &EncodedChunk,
        places: DecodeAddresses,
        before: usize,
    ) -> Result<(), DriverError> {
        let codes = Address(places.stored);
        let scales = Address(places.stored + piece.scales_at() as CUdeviceptr);
        let (name, threads, mut arguments) = match self {
            Self::Plain(stored) => ("plain", piece.values.len(), vec![codes, Word(stored as u32)]),
            Self::Tiles { scales: stored, columns, tile } => {
                let (across, row) = (columns.div_ceil(tile[1]), piece.values.start / columns % tile[0]);
                let grid = [columns, tile[0], tile[1], across, row].map(number);
                ("tiles", piece.values.len(), [&[codes, scales, Word(stored as u32)], &grid[..]].concat())
            }
            Self::Pairs { codes: meaning, scales: stored, whole, group } => {
                let are_integers = Word((meaning == Codes::Integers).into());
                let arguments = vec![codes, are_integers, scales, Word(stored as u32), Float(whole), number(group)];
                ("pairs", piece.values.len() / 2, arguments)
            }
        };
        arguments.extend([number(piece.values.len()), number(before), Address(places.values), Address(places.note)]);
        let grid = Grid { blocks: [threads.div_ceil(THREADS), 1], threads: THREADS };
        // SAFETY: as `decode.cu` names them; the caller's promise.
        unsafe { launch(stream, File::Decode, &format!("{name}_{}", T::NAME), grid, &arguments) }
    }
}

impl EncodedChunk {
    /// Range of the tensor's values.
    pub(crate) fn values(&self) -> Range<usize> {
        self.values.clone()
    }

    /// Range of the tensor's codes in bytes.
    pub(crate) fn codes(&self) -> Range<usize> {
        self.codes.clone()
    }

    /// Bytes that [`copy`](Self::copy) writes.
    pub(crate) fn bytes(&self) -> usize {
        self.scales_at() + self.scales.len()
    }

    /// Offset of its scales.
    fn scales_at(&self) -> usize {
        if self.scales.is_empty() { self.codes.len() } else { self.codes.len().next_multiple_of(ALIGNMENT) }
    }

    /// Copies codes and scales of its tensor with all threads.
    pub(crate) fn copy(&self, of: &StoredTensor<'_>, bytes: &mut [u8]) {
        let copy = |to: &mut [u8], from: &[u8]| {
            let parts = to.par_chunks_mut(COPIED_AT_ONCE).zip(from.par_chunks(COPIED_AT_ONCE));
            parts.for_each(|(to, from)| to.copy_from_slice(from));
        };
        let (codes, scales) = bytes.split_at_mut(self.scales_at());
        copy(&mut codes[..self.codes.len()], &of.codes[self.codes.clone()]);
        copy(scales, &of.scales[self.scales.clone()]);
    }
}

#[cfg(test)]
mod tests;
