//! Decompresses whole files into memory, up to a limit.

use std::io::{self, Cursor, Read};
use std::ops::Range;

use flate2::read::MultiGzDecoder;
use outliers_protocol::CorpusCompression;

use super::file::{RangedFile, too_long};
use super::non_text;
use crate::checkpoint::safetensors::shown;
use crate::error::{Result, WorkerError};

/// Compressed bytes read at a time.
const PIECE: u64 = 16 << 20;

/// The content of a compressed file.
pub(super) struct Decompressed {
    name: String,
    bytes: Vec<u8>,
}

impl Decompressed {
    /// Decompresses a file of at most `limit` bytes.
    pub(super) fn of(file: &dyn RangedFile, compression: CorpusCompression, limit: u64) -> Result<Self> {
        let name = file.name().to_owned();
        let mut bytes = Vec::new();
        decompress(Pieces::of(file), compression, limit, &mut bytes)
            .map_err(|error| damaged(file, compression, error))?;
        if bytes.len() as u64 > limit {
            return Err(too_long(format!("{name} has more bytes when it is unpacked"), limit));
        }
        Ok(Self { name, bytes })
    }
}

/// The error of a damaged file, or of reading it.
fn damaged(file: &dyn RangedFile, compression: CorpusCompression, error: io::Error) -> WorkerError {
    let (said, wanted) = match compression {
        CorpusCompression::Gzip => ("gzip", &non_text::GZIP),
        CorpusCompression::Zstd => ("zstd", &non_text::ZSTD),
    };
    let error = match error.downcast::<WorkerError>() {
        Ok(error) => return error,
        Err(error) => error,
    };
    let why = non_text::other(file, Some(wanted))
        .map_or_else(|| shown(&error.to_string()), |found| format!("it is {}", found.name));
    let message = format!("{} cannot be unpacked with {said}: {why}", file.name());
    WorkerError::corpus(message).hint("the file is damaged, not all there, or has the ending of another format")
}

/// Decompresses at most one byte more than the limit.
fn decompress(from: Pieces<'_>, compression: CorpusCompression, limit: u64, into: &mut Vec<u8>) -> io::Result<usize> {
    match compression {
        CorpusCompression::Gzip => MultiGzDecoder::new(from).take(limit + 1).read_to_end(into),
        CorpusCompression::Zstd => zstd::Decoder::new(from)?.take(limit + 1).read_to_end(into),
    }
}

impl RangedFile for Decompressed {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        Ok(self.bytes[range.start as usize..range.end as usize].to_vec())
    }
}

/// A file from start to end.
struct Pieces<'a> {
    file: &'a dyn RangedFile,
    read: u64,
    piece: Cursor<Vec<u8>>,
}

impl<'a> Pieces<'a> {
    fn of(file: &'a dyn RangedFile) -> Self {
        Self { file, read: 0, piece: Cursor::default() }
    }
}

impl Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.piece.position() == self.piece.get_ref().len() as u64 {
            let end = self.file.size().min(self.read + PIECE);
            self.piece = Cursor::new(self.file.read(self.read..end).map_err(io::Error::other)?);
            self.read = end;
        }
        self.piece.read(into)
    }
}
