//! JSON Lines: one row per line. A block contains the lines that begin in it, so that blocks can
//! be read independently.

use std::ops::Range;

use serde_json::Value;

use super::documents::Document;
use super::file::{RangedFile, bom, line_at};
use super::non_text;
use super::rows::{Fault, Rows};
use crate::error::{Result, WorkerError};

/// Bytes per block.
const BLOCK: u64 = 4 << 20;
/// Bytes read at a time to find the end of a block's last line.
const MORE: u64 = 1 << 20;
/// Maximum bytes of a line.
const LONGEST: u64 = 256 << 20;
/// Maximum blocks read without a row that has the field, before the file is refused.
const MAX_BLOCKS_WITHOUT: usize = 16;

/// The lines of a file.
pub(super) struct Lines {
    blocks: usize,
    /// Number of blocks read.
    read: usize,
    rows: Rows,
}

impl Lines {
    pub(super) fn new(file: &dyn RangedFile, field: &str) -> Self {
        Self { blocks: file.size().div_ceil(BLOCK) as usize, read: 0, rows: Rows::new(field) }
    }

    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    /// The texts of the lines that begin in a block. Each block is read once.
    pub(super) fn read(&mut self, file: &dyn RangedFile, block: usize) -> Result<Vec<Document>> {
        let start = block as u64 * BLOCK;
        let (mut at, lines) = lines_in(file, start..(start + BLOCK).min(file.size()))?;
        let mut documents = Vec::new();
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            let row = &line[if at == 0 { bom(line) } else { 0 }..];
            if !row.iter().all(u8::is_ascii_whitespace)
                && let Some(text) = self.text(row).map_err(|fault| wrong(file, at, fault))?
            {
                documents.push(Document { name: format!("{} at byte {at}", file.name()), text: text.into() });
            }
            at += line.len() as u64;
        }
        self.read += 1;
        if self.read >= self.blocks.min(MAX_BLOCKS_WITHOUT) {
            self.rows.check(file.name())?;
        }
        Ok(documents)
    }

    fn text(&mut self, row: &[u8]) -> Result<Option<String>, Fault> {
        let value = serde_json::from_slice::<Value>(row).map_err(|error| Fault::syntax(row, &error))?;
        self.rows.text(value)
    }
}

/// The error for the line that begins at a byte, or for the file.
fn wrong(file: &dyn RangedFile, at: u64, fault: Fault) -> WorkerError {
    non_text::explain(file, None, fault.at(line_at(file, at)))
}

/// Offset of the first line that begins in a range, and the bytes of all lines that do.
fn lines_in(file: &dyn RangedFile, range: Range<u64>) -> Result<(u64, Vec<u8>)> {
    let mut end = range.end;
    // A line begins here if the previous byte is a line feed.
    let from = range.start.saturating_sub(1);
    let mut bytes = file.read(from..end)?;
    let newline = bytes.iter().position(|byte| *byte == b'\n');
    let first = if range.start == 0 { 0 } else { newline.map_or(bytes.len(), |at| at + 1) };
    let mut lines = bytes.split_off(first);
    while !lines.is_empty() && lines.last() != Some(&b'\n') && end < file.size() {
        if lines.len() as u64 > LONGEST {
            let message = format!("{} has a line of more than {LONGEST} bytes", file.name());
            return Err(WorkerError::corpus(message).hint("JSON Lines files have one document per line"));
        }
        let more = file.read(end..(end + MORE).min(file.size()))?;
        end += more.len() as u64;
        let line_end = more.iter().position(|byte| *byte == b'\n').map_or(more.len(), |at| at + 1);
        lines.extend(&more[..line_end]);
    }
    Ok((from + first as u64, lines))
}
