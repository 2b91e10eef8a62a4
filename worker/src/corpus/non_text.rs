//! Detects files that are not text by their first bytes, to say what they are.

use super::file::{RangedFile, head};
use crate::error::{Result, WorkerError};

/// Bytes at the start of a file that are examined.
pub(super) const HEAD: u64 = 512;

/// A format that is not text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NonTextFormat {
    /// Offset of its signature.
    at: usize,
    mark: &'static [u8],
    /// Description of such a file.
    pub(super) name: &'static str,
    hint: &'static str,
}

impl NonTextFormat {
    fn refusal(&self, file: &str) -> WorkerError {
        WorkerError::corpus(format!("{file} is {}", self.name)).hint(self.hint)
    }
}

const fn format_at(at: usize, mark: &'static [u8], name: &'static str, hint: &'static str) -> NonTextFormat {
    NonTextFormat { at, mark, name, hint }
}

const UNPACK: &str = "unpack it; of packed files, those that end in .gz and .zst are read";
const SAVE: &str = "save its text as UTF-8, or its documents as JSON Lines or Parquet";
const FROM_UTF32: &str = "convert it to UTF-8, for example with `iconv -f utf-32 -t utf-8`";
const FROM_UTF16: &str = "convert it to UTF-8, for example with `iconv -f utf-16 -t utf-8`";

/// RFC 1952.
pub(super) static GZIP: NonTextFormat =
    format_at(0, b"\x1f\x8b", "a gzip file", "let its name end in .gz, as in book.txt.gz or rows.jsonl.gz");
/// RFC 8878.
pub(super) static ZSTD: NonTextFormat =
    format_at(0, b"\x28\xb5\x2f\xfd", "a zstd file", "let its name end in .zst, as in book.txt.zst or rows.jsonl.zst");

/// <https://parquet.apache.org/docs/file-format/>
pub(super) static PARQUET: NonTextFormat = format_at(0, b"PAR1", "a Parquet file", "let its name end in .parquet");

/// A signature that is a prefix of another comes after it.
static OTHERS: [NonTextFormat; 22] = [
    format_at(4, b"1AY&SY", "a bzip2 file", UNPACK),
    format_at(0, b"\xfd7zXZ\0", "an xz file", UNPACK),
    format_at(0, b"\x04\x22\x4d\x18", "an lz4 file", UNPACK),
    format_at(0, b"LZIP\x01", "an lzip file", UNPACK),
    format_at(0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    format_at(0, b"Rar!\x1a\x07", "a rar archive", UNPACK),
    format_at(0, b"PK\x03\x04", "a zip archive, or a document or checkpoint in one", UNPACK),
    format_at(257, b"ustar", "a tar archive", "unpack it, and name the files in it one by one"),
    format_at(0, b"ARROW1\0\0", "an Arrow file", SAVE),
    format_at(0, b"Obj\x01", "an Avro file", SAVE),
    format_at(0, b"\x93NUMPY", "a NumPy array", "ready token ids go to --token-ids, as safetensors or JSON"),
    format_at(0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", SAVE),
    format_at(0, b"SQLite format 3\0", "an SQLite database", SAVE),
    format_at(0, b"%PDF-", "a PDF document", SAVE),
    format_at(0, b"%!PS-", "a PostScript document", SAVE),
    format_at(0, b"{\\rtf", "an RTF document", SAVE),
    format_at(0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of an old office program", SAVE),
    format_at(
        0,
        b"version https://git-lfs.github.com/",
        "a Git LFS pointer, not the file itself",
        "fetch it: `git lfs pull`",
    ),
    format_at(0, b"\xff\xfe\0\0", "text in UTF-32", FROM_UTF32),
    format_at(0, b"\0\0\xfe\xff", "text in UTF-32", FROM_UTF32),
    format_at(0, b"\xff\xfe", "text in UTF-16", FROM_UTF16),
    format_at(0, b"\xfe\xff", "text in UTF-16", FROM_UTF16),
];

/// The high bytes of the header's length, which is far below 2^40, and the opening brace.
static SAFETENSORS: NonTextFormat =
    format_at(5, b"\0\0\0{", "a safetensors file", "ready token ids go to --token-ids, weights to --model");

/// The format of a file with these first bytes.
pub(super) fn of(head: &[u8]) -> Option<&'static NonTextFormat> {
    let is = |format: &&NonTextFormat| head.get(format.at..).is_some_and(|rest| rest.starts_with(format.mark));
    [&GZIP, &ZSTD, &PARQUET].into_iter().chain(&OTHERS).chain([&SAFETENSORS]).find(is)
}

/// Refuses a file that is not text.
pub(super) fn refuse(name: &str, head: &[u8]) -> Result<()> {
    of(head).map_or(Ok(()), |found| Err(found.refusal(name)))
}

/// The format of a file, if it differs from `taken_for`.
pub(super) fn other(file: &dyn RangedFile, taken_for: Option<&NonTextFormat>) -> Option<&'static NonTextFormat> {
    of(&head(file, HEAD).ok()?).filter(|found| Some(*found) != taken_for)
}

/// The error for a file that cannot be read, with its actual format if known.
pub(super) fn explain(file: &dyn RangedFile, taken_for: Option<&NonTextFormat>, error: WorkerError) -> WorkerError {
    other(file, taken_for).map_or(error, |found| found.refusal(file.name()))
}
