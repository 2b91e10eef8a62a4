//! Files that are read by ranges, local or on the hub.

use std::fs::{File, Metadata};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::checkpoint::hub::RemoteFile;
use crate::error::{IoContext, Result, WorkerError};
use crate::files::open_regular;

/// Maximum bytes of a text. Tokenising needs about 50 times that in memory.
pub(super) const MAX_TEXT_BYTES: u64 = 256 << 20;
/// Maximum bytes of a file of documents held in memory, uncompressed.
pub(super) const MAX_HELD_BYTES: u64 = 1 << 30;
/// Maximum bytes that are searched to find a line's number.
const MAX_COUNTED: u64 = 1 << 30;
/// Bytes searched at a time.
const COUNTED: u64 = 16 << 20;
/// Byte order mark of UTF-8.
const BOM: &[u8] = b"\xef\xbb\xbf";

/// Hint for a text in another encoding.
pub(super) const CONVERT: &str = "convert it to UTF-8, for example with `iconv -t utf-8`";

/// A file that is read by ranges.
pub(super) trait RangedFile {
    /// Name in messages.
    fn name(&self) -> &str;
    /// Size in bytes.
    fn size(&self) -> u64;
    /// Reads a range of the file.
    fn read(&self, range: Range<u64>) -> Result<Vec<u8>>;
}

impl RangedFile for RemoteFile {
    fn name(&self) -> &str {
        self.name()
    }

    fn size(&self) -> u64 {
        self.size()
    }

    fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        self.read(range)
    }
}

/// A local file.
pub(super) struct LocalFile {
    name: String,
    file: File,
    size: u64,
}

impl LocalFile {
    pub(super) fn open(path: &str) -> Result<Self> {
        let size = look_at(Path::new(path))?.len();
        Ok(Self { name: path.to_owned(), file: open_regular(Path::new(path)).at("open", path)?, size })
    }
}

impl RangedFile for LocalFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.file.read_exact_at(&mut bytes, range.start).at("read", &self.name)?;
        Ok(bytes)
    }
}

/// Checks that a corpus file exists and is regular.
fn look_at(path: &Path) -> Result<Metadata> {
    let metadata = path.metadata().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            let message = format!("there is no corpus file {}", path.display());
            WorkerError::corpus(message).hint("corpus files are read on the machine that runs the worker")
        }
        _ => WorkerError::io("read", path, &error),
    })?;
    if metadata.is_file() {
        return Ok(metadata);
    }
    Err(WorkerError::corpus(format!("{} is not a regular file", path.display())).hint("name the text files one by one"))
}

/// Reads a file of at most `limit` bytes.
pub(super) fn read_whole(file: &dyn RangedFile, limit: u64) -> Result<Vec<u8>> {
    let (name, bytes) = (file.name(), file.size());
    if bytes > limit {
        return Err(too_long(format!("{name} has {bytes} bytes"), limit));
    }
    file.read(0..bytes)
}

/// The error for a file that is too long to hold in memory.
pub(super) fn too_long(what: String, limit: u64) -> WorkerError {
    let message = format!("{what}, over the limit of {limit}");
    WorkerError::corpus(message).hint("cut it into several files; .jsonl and .parquet files may have any length")
}

/// The first bytes of a file, at most `limit`.
pub(super) fn head(file: &dyn RangedFile, limit: u64) -> Result<Vec<u8>> {
    file.read(0..file.size().min(limit))
}

/// Bytes of a byte order mark before the text.
pub(super) fn bom(bytes: &[u8]) -> usize {
    if bytes.starts_with(BOM) { BOM.len() } else { 0 }
}

/// Number of the line that contains the byte after `bytes`, from 1.
pub(super) fn line_after(bytes: &[u8]) -> usize {
    1 + bytes.iter().filter(|byte| **byte == b'\n').count()
}

/// Description of the line that begins at a byte, for errors. Only here are the lines before it
/// counted.
pub(super) fn line_at(file: &dyn RangedFile, at: u64) -> String {
    match (at <= MAX_COUNTED).then(|| number_at(file, at)) {
        Some(Ok(number)) => format!("line {number} of {}", file.name()),
        _ => format!("the line of {} that begins at byte {at}", file.name()),
    }
}

fn number_at(file: &dyn RangedFile, at: u64) -> Result<usize> {
    let pieces = (0..at).step_by(COUNTED as usize);
    pieces
        .map(|from| file.read(from..at.min(from + COUNTED)))
        .try_fold(1, |number, piece| Ok(number + line_after(&piece?) - 1))
}
