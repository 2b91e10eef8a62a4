//! Stored bytes, as the kernels of `decode.cu` are told what they mean. Their CPU form is the
//! worker's `dtype`.

use std::ops::Range;

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaStream, DriverError};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::kernels::Argument::{Address, Float, Number as Word};
use crate::kernels::{File, Grid, launch, number};

/// Threads of a block, as in `values.cuh`.
const THREADS: usize = 256;
/// Bytes that a thread copies at a time.
const COPIED_AT_ONCE: usize = 1 << 19;
/// Alignment of scales, bytes.
const ALIGNMENT: usize = 16;

/// How a number is stored, by the numbers of `decode.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Number {
    /// Single precision.
    F32 = 0,
    /// IEEE's half precision.
    F16 = 1,
    /// Half of single precision, of the same range.
    Bf16 = 2,
    /// A power of two.
    E8m0 = 3,
    /// FP8 of 3 bits of mantissa, without infinities.
    E4m3 = 4,
}

impl Number {
    /// Bytes of one.
    fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::E8m0 | Self::E4m3 => 1,
        }
    }
}

/// A dtype that stored numbers become.
pub trait Value {
    /// Its name, in those of kernels too.
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

/// What stored bytes mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// Floats one after the other.
    Plain(Number),
    /// Codes in e4m3 of a matrix, under a scale for each tile.
    Tiles {
        /// How scales are stored.
        scales: Number,
        /// Columns of the matrix.
        columns: usize,
        /// Rows and columns of a tile, no more than the matrix has.
        tile: [usize; 2],
    },
    /// Two codes of 4 bits per byte, the low half first, under a scale for each group.
    Pairs {
        /// What they mean.
        codes: Codes,
        /// How scales are stored.
        scales: Number,
        /// What multiplies all scales.
        whole: f32,
        /// Values of a group, an even number.
        group: usize,
    },
}

/// What codes of 4 bits mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    /// Floats: e2m1.
    Floats,
    /// Integers, less 8.
    Integers,
}

/// A tensor as a checkpoint stores it, row after row. Lengths follow from the form and the number
/// of values, and scales are finite: whoever makes one has checked that.
#[derive(Clone, Copy, Debug)]
pub struct StoredTensor<'a> {
    /// What the bytes mean.
    pub form: Form,
    /// One code per value.
    pub codes: &'a [u8],
    /// Scales, where the form has some.
    pub scales: &'a [u8],
}

/// Some of a stored tensor's values.
#[derive(Debug)]
pub(crate) struct Piece<'a> {
    values: Range<usize>,
    codes: &'a [u8],
    scales: &'a [u8],
}

/// Addresses on the GPU that a piece is decoded with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places {
    /// Of the piece's bytes, as [`Piece::copy_to`] arranges them.
    pub(crate) stored: CUdeviceptr,
    /// Of its values.
    pub(crate) values: CUdeviceptr,
    /// Of the note about values that do not fit.
    pub(crate) note: CUdeviceptr,
}

impl<'a> StoredTensor<'a> {
    /// Its `count` values in pieces of at most `room` bytes, where that many can be cut off.
    pub(crate) fn pieces(self, count: usize, room: usize) -> impl Iterator<Item = Piece<'a>> {
        let granule = match self.form {
            Form::Plain(_) => 1,
            Form::Tiles { columns, .. } => columns,
            Form::Pairs { group, .. } => group,
        };
        let granule = granule.clamp(1, count.max(1));
        let least = (count > 0).then(|| self.piece(0..granule));
        let bytes = least.map_or(1, |piece| piece.codes.len() + piece.scales.len());
        let at_once = (room / bytes).max(1) * granule;
        (0..count).step_by(at_once).map(move |start| self.piece(start..count.min(start + at_once)))
    }

    /// Whether a value's bytes are those of the number that it becomes.
    pub(crate) fn is_stored_as<T: Value>(&self) -> bool {
        self.form == Form::Plain(T::STORED)
    }

    fn piece(&self, values: Range<usize>) -> Piece<'a> {
        let (codes, scales) = match self.form {
            Form::Plain(number) => (values.start * number.size()..values.end * number.size(), 0..0),
            Form::Tiles { scales, columns, tile } => {
                let rows = values.start / columns..values.end / columns;
                let row_of_tiles = columns.div_ceil(tile[1]) * scales.size();
                let tiles = rows.start / tile[0]..rows.end.div_ceil(tile[0]);
                (values.clone(), tiles.start * row_of_tiles..tiles.end * row_of_tiles)
            }
            Form::Pairs { scales, group, .. } => {
                let groups = values.start / group..values.end / group;
                (values.start / 2..values.end / 2, groups.start * scales.size()..groups.end * scales.size())
            }
        };
        Piece { values, codes: &self.codes[codes], scales: &self.scales[scales] }
    }

    /// Decodes a piece, in the order of the stream; `before` values of those that share its note
    /// were decoded before.
    ///
    /// # Safety
    /// The places are of as many bytes and values as the piece has, and of a note; all of that
    /// belongs to the stream.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) unsafe fn launch<T: Value>(
        &self,
        stream: &CudaStream,
        piece: &Piece<'_>,
        places: Places,
        before: usize,
    ) -> Result<(), DriverError> {
        let codes = Address(places.stored);
        let scales = Address(places.stored + piece.scales_at() as CUdeviceptr);
        let (name, threads, mut arguments) = match self.form {
            Form::Plain(stored) => ("plain", piece.values.len(), vec![codes, Word(stored as u32)]),
            Form::Tiles { scales: stored, columns, tile } => {
                let (across, row) = (columns.div_ceil(tile[1]), piece.values.start / columns % tile[0]);
                let grid = [columns, tile[0], tile[1], across, row].map(number);
                ("tiles", piece.values.len(), [&[codes, scales, Word(stored as u32)], &grid[..]].concat())
            }
            Form::Pairs { codes: meaning, scales: stored, whole, group } => {
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

impl Piece<'_> {
    /// Which values of the tensor these are.
    pub(crate) fn values(&self) -> Range<usize> {
        self.values.clone()
    }

    /// Bytes that [`copy_to`](Self::copy_to) writes.
    pub(crate) fn bytes(&self) -> usize {
        self.scales_at() + self.scales.len()
    }

    /// Where its scales begin.
    fn scales_at(&self) -> usize {
        if self.scales.is_empty() { self.codes.len() } else { self.codes.len().next_multiple_of(ALIGNMENT) }
    }

    /// Copies codes and scales, with all threads.
    pub(crate) fn copy_to(&self, bytes: &mut [u8]) {
        let copy = |to: &mut [u8], from: &[u8]| {
            let parts = to.par_chunks_mut(COPIED_AT_ONCE).zip(from.par_chunks(COPIED_AT_ONCE));
            parts.for_each(|(to, from)| to.copy_from_slice(from));
        };
        let (codes, scales) = bytes.split_at_mut(self.scales_at());
        copy(&mut codes[..self.codes.len()], self.codes);
        copy(scales, self.scales);
    }
}

#[cfg(test)]
mod tests;
