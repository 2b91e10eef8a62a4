//! Reads the directory of an uncompressed single-part zip archive: names, sizes, offsets.
//!
//! Layout (APPNOTE 6.3): records, each a header and its bytes; the directory; and at the end the
//! directory's location, twice for archives over 4 GiB.

use std::collections::HashMap;
use std::ops::Range;

use super::bytes::Bytes;
use super::{ReadRange, damaged};
use crate::checkpoint::safetensors::shown;
use crate::error::{Result, WorkerError};

/// Maximum bytes of a directory. One of 100,000 tensors has about 8 MB.
const MAX_DIRECTORY_BYTES: u64 = 32 << 20;

const END: u32 = 0x0605_4b50;
const END_LEN: u64 = 22;
/// Maximum bytes of a comment, which may follow the end record.
const MAX_COMMENT: u64 = 0xffff;
const END64_LOCATOR: u32 = 0x0706_4b50;
const END64_LOCATOR_LEN: usize = 20;
const END64: u32 = 0x0606_4b50;
const END64_LEN: u64 = 56;
const DIRECTORY_ENTRY: u32 = 0x0201_4b50;
const RECORD: u32 = 0x0403_4b50;
const RECORD_LEN: u64 = 30;
/// Marks a number that is stored as 64 bits elsewhere.
const ELSEWHERE: u32 = u32::MAX;
/// Tag of the directory's field of 64-bit numbers.
const WIDE_NUMBERS: u16 = 1;
/// Flag of encrypted records.
const ENCRYPTED: u16 = 1;

/// A file in the archive by its directory entry.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ArchiveEntry {
    pub(super) name: String,
    /// Offset of the record's header from the start of the archive.
    pub(super) header: u64,
    /// Bytes of content, as stored.
    pub(super) len: u64,
    /// Whether it is neither compressed nor encrypted.
    stored: bool,
}

impl ArchiveEntry {
    /// Checks that the record is uncompressed, so that ranges can be read.
    pub(super) fn check_stored(&self) -> Result<()> {
        if self.stored {
            return Ok(());
        }
        let message = format!("record {} is compressed or encrypted, which PyTorch never does", shown(&self.name));
        Err(WorkerError::checkpoint(message).hint("save the checkpoint again with torch.save, or as safetensors"))
    }
}

/// The directory of an archive.
#[derive(Debug)]
pub(super) struct Archive {
    records: Vec<ArchiveEntry>,
    by_name: HashMap<String, usize>,
    /// Start of the directory, where records must end.
    end_of_records: u64,
}

impl Archive {
    pub(super) fn read(file_len: u64, read: ReadRange<'_>) -> Result<Self> {
        let place = find_directory(file_len, read)?;
        let end_of_records = place.bytes.start;
        let entries = read(place.bytes)?;
        let records = parse_directory(&entries, place.records, end_of_records)?;
        let mut by_name = HashMap::with_capacity(records.len());
        for (number, record) in records.iter().enumerate() {
            if by_name.insert(record.name.clone(), number).is_some() {
                return Err(damaged(format!("two records are called {}", shown(&record.name))));
            }
        }
        Ok(Self { records, by_name, end_of_records })
    }

    pub(super) fn records(&self) -> &[ArchiveEntry] {
        &self.records
    }

    /// The record with this name, and its index.
    pub(super) fn find(&self, name: &str) -> Option<(usize, &ArchiveEntry)> {
        self.by_name.get(name).map(|number| (*number, &self.records[*number]))
    }

    /// Offset of a record's content. Only the record's header has its length, which includes the
    /// name and padding.
    pub(super) fn data_start(&self, record: &ArchiveEntry, read: ReadRange<'_>) -> Result<u64> {
        let wrong = |what: &str| damaged(format!("record {} {what}", shown(&record.name)));
        // Checked with the directory: header and content end before it.
        let header = read(record.header..record.header + RECORD_LEN)?;
        let lengths = record_header(&header).ok_or_else(|| wrong("is not where the directory says"))?;
        let start = record.header + RECORD_LEN + lengths;
        if start + record.len > self.end_of_records {
            return Err(wrong("reaches into the directory"));
        }
        Ok(start)
    }

    /// The bytes of a record of at most `limit` bytes.
    pub(super) fn contents(&self, record: &ArchiveEntry, limit: u64, read: ReadRange<'_>) -> Result<Vec<u8>> {
        record.check_stored()?;
        if record.len > limit {
            let message = format!("{} has {} bytes, over the limit of {limit}", shown(&record.name), record.len);
            return Err(WorkerError::checkpoint(message).hint("do not use this checkpoint: no real one is like that"));
        }
        let start = self.data_start(record, read)?;
        read(start..start + record.len)
    }
}

/// Bytes of name and padding after a record's header; `None` if it is not a record header.
fn record_header(header: &[u8]) -> Option<u64> {
    let mut bytes = Bytes(header);
    let is_record = bytes.u32()? == RECORD;
    bytes.take(22)?;
    let lengths = u64::from(bytes.u16()?) + u64::from(bytes.u16()?);
    is_record.then_some(lengths)
}

/// Location of the directory.
struct DirectorySpan {
    bytes: Range<u64>,
    records: u64,
}

fn find_directory(file_len: u64, read: ReadRange<'_>) -> Result<DirectorySpan> {
    let no_archive = || {
        WorkerError::checkpoint("it is no zip archive, or its end is missing")
            .hint("the file is damaged, incomplete, or not a PyTorch checkpoint: fetch it again")
    };
    let tail_len = file_len.min(END_LEN + MAX_COMMENT + END64_LOCATOR_LEN as u64);
    let tail_start = file_len - tail_len;
    let tail = read(tail_start..file_len)?;
    let at = find_end(&tail).ok_or_else(no_archive)?;
    let mut place = parse_end(&tail[at..]).ok_or_else(no_archive)?;
    let mut limit = tail_start + at as u64;
    if let Some(end64) = at.checked_sub(END64_LOCATOR_LEN).and_then(|before| locate_end64(&tail[before..at])) {
        limit = end64;
        let inside = end64.checked_add(END64_LEN).is_some_and(|end| end <= file_len);
        let bytes = if inside { read(end64..end64 + END64_LEN)? } else { Vec::new() };
        place = parse_end64(&bytes).ok_or_else(no_archive)?;
    }
    let len = place.bytes.end - place.bytes.start;
    if place.bytes.end > limit {
        return Err(damaged(format!("its directory ({:?}) does not fit its {file_len} bytes", place.bytes)));
    }
    if len > MAX_DIRECTORY_BYTES {
        return Err(damaged(format!("its directory has {len} bytes, over the limit of {MAX_DIRECTORY_BYTES}")));
    }
    Ok(place)
}

/// The last possible position of the end record: its signature, and a comment that fills the rest
/// of the file.
fn find_end(tail: &[u8]) -> Option<usize> {
    let fits = |at: &usize| {
        let mut bytes = Bytes(&tail[*at..]);
        let marked = bytes.u32() == Some(END);
        marked && bytes.take(16).is_some() && bytes.u16().is_some_and(|comment| usize::from(comment) == bytes.0.len())
    };
    (0..tail.len()).rev().find(fits)
}

fn parse_end(end: &[u8]) -> Option<DirectorySpan> {
    let mut bytes = Bytes(end);
    bytes.take(10)?;
    let (records, len, start) = (bytes.u16()?, bytes.u32()?, bytes.u32()?);
    // Both have 32 bits, so the sum does not overflow.
    Some(DirectorySpan { bytes: u64::from(start)..u64::from(start) + u64::from(len), records: records.into() })
}

fn locate_end64(locator: &[u8]) -> Option<u64> {
    let mut bytes = Bytes(locator);
    let marked = bytes.u32()? == END64_LOCATOR;
    bytes.u32()?;
    bytes.u64().filter(|_| marked)
}

fn parse_end64(end: &[u8]) -> Option<DirectorySpan> {
    let mut bytes = Bytes(end);
    let marked = bytes.u32()? == END64;
    bytes.take(28)?;
    let (records, len, start) = (bytes.u64()?, bytes.u64()?, bytes.u64()?);
    let end = start.checked_add(len)?;
    marked.then_some(DirectorySpan { bytes: start..end, records })
}

fn parse_directory(entries: &[u8], count: u64, end_of_records: u64) -> Result<Vec<ArchiveEntry>> {
    let mut bytes = Bytes(entries);
    let mut records = Vec::new();
    while !bytes.0.is_empty() {
        let number = records.len();
        let record =
            parse_entry(&mut bytes).ok_or_else(|| damaged(format!("entry {number} of its directory is none")))?;
        let end = record.header.checked_add(RECORD_LEN).and_then(|start| start.checked_add(record.len));
        if end.is_none_or(|end| end > end_of_records) {
            let what = format!("record {} of {} bytes", shown(&record.name), record.len);
            return Err(damaged(format!("{what} does not fit the archive: it is truncated")));
        }
        records.push(record);
    }
    if records.len() as u64 != count {
        return Err(damaged(format!("its directory has {} entries, not {count}", records.len())));
    }
    Ok(records)
}

fn parse_entry(bytes: &mut Bytes<'_>) -> Option<ArchiveEntry> {
    if bytes.u32()? != DIRECTORY_ENTRY {
        return None;
    }
    bytes.take(4)?;
    let (flags, method) = (bytes.u16()?, bytes.u16()?);
    bytes.take(8)?;
    let (stored_len, len) = (bytes.u32()?, bytes.u32()?);
    let (name_len, extra_len, comment_len) = (bytes.u16()?, bytes.u16()?, bytes.u16()?);
    bytes.take(8)?;
    let header = bytes.u32()?;
    let name = bytes.take(name_len.into())?;
    let mut wide = wide_numbers(bytes.take(extra_len.into())?);
    bytes.take(comment_len.into())?;
    // The 64-bit numbers are in this order, and only the needed ones are stored.
    let mut widened = |short: u32| if short == ELSEWHERE { wide.u64() } else { Some(short.into()) };
    let (len, stored_len, header) = (widened(len)?, widened(stored_len)?, widened(header)?);
    let stored = method == 0 && flags & ENCRYPTED == 0 && stored_len == len;
    Some(ArchiveEntry { name: std::str::from_utf8(name).ok()?.to_owned(), header, len, stored })
}

/// The field with 64-bit numbers among an entry's extra fields; empty if there is none.
fn wide_numbers(extra: &[u8]) -> Bytes<'_> {
    let mut bytes = Bytes(extra);
    while let (Some(tag), Some(len)) = (bytes.u16(), bytes.u16()) {
        match bytes.take(len.into()) {
            Some(field) if tag == WIDE_NUMBERS => return Bytes(field),
            Some(_) => {}
            None => break,
        }
    }
    Bytes(&[])
}
