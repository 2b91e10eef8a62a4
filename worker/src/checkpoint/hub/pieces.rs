//! Reads small pieces of a large file with few requests.

use std::cell::RefCell;
use std::ops::Range;

use super::LIKELY_HEADER;
use super::remote::RemoteFile;
use crate::error::Result;

/// Reads ranges of one file. Every request also reads what follows and keeps it, since
/// descriptions of tensors are adjacent.
pub(super) struct Pieces<'a> {
    file: &'a RemoteFile,
    /// First byte and content of each answer.
    kept: RefCell<Vec<(u64, Vec<u8>)>>,
}

impl<'a> Pieces<'a> {
    pub(super) fn new(file: &'a RemoteFile) -> Self {
        Self { file, kept: RefCell::default() }
    }

    /// Reads a range of the file.
    pub(super) fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        if let Some(bytes) = self.kept.borrow().iter().find_map(|(start, bytes)| part(*start, bytes, &range)) {
            return Ok(bytes.to_vec());
        }
        let end = range.end.max(range.start.saturating_add(LIKELY_HEADER)).min(self.file.size());
        let bytes = self.file.read(range.start..end)?;
        let wanted = bytes[..(range.end - range.start) as usize].to_vec();
        self.kept.borrow_mut().push((range.start, bytes));
        Ok(wanted)
    }
}

/// The bytes `range` of a file, if `bytes` from `start` contain them.
fn part<'b>(start: u64, bytes: &'b [u8], range: &Range<u64>) -> Option<&'b [u8]> {
    let (from, to) = (range.start.checked_sub(start)?, range.end.checked_sub(start)?);
    bytes.get(usize::try_from(from).ok()?..usize::try_from(to).ok()?)
}
