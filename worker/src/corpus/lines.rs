//! JSON Lines: one object per line, one of whose fields is the text. Read in blocks, of which each holds the lines that begin in it, so that
//! any of them can be had without those before it.

use serde_json::Value;

use super::documents::{Document, RangedFile};
use crate::error::{Result, WorkerError};
use crate::safetensors::shown;

/// Bytes of a block.
const BLOCK: u64 = 4 << 20;
/// Read at a time for the end of a block's last line.
const MORE: u64 = 1 << 20;
/// Longest line, bytes.
const LONGEST: u64 = 256 << 20;

/// The lines of a file.
pub(super) struct Lines {
    blocks: usize,
    field: String,
}

impl Lines {
    pub(super) fn new(file: &dyn RangedFile, field: &str) -> Self {
        Self { blocks: file.size().div_ceil(BLOCK) as usize, field: field.to_owned() }
    }

    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    /// The texts of the lines that begin in a block.
    pub(super) fn read(&self, file: &dyn RangedFile, block: usize) -> Result<Vec<Document>> {
        let start = block as u64 * BLOCK;
        let mut end = (start + BLOCK).min(file.size());
        // A line begins here if the byte before it ends one.
        let from = start.saturating_sub(1);
        let mut bytes = file.read(from..end)?;
        let first = match (block, bytes.iter().position(|byte| *byte == b'\n')) {
            (0, _) => 0,
            (_, Some(at)) => at + 1,
            (_, None) => return Ok(Vec::new()),
        };
        if first == bytes.len() {
            return Ok(Vec::new());
        }
        while bytes.last() != Some(&b'\n') && end < file.size() {
            if bytes.len() as u64 > LONGEST {
                let message = format!("{} has a line of more than {LONGEST} bytes", file.name());
                return Err(WorkerError::corpus(message).hint("JSON Lines files have one document per line"));
            }
            let more = file.read(end..(end + MORE).min(file.size()))?;
            end += more.len() as u64;
            let line_end = more.iter().position(|byte| *byte == b'\n').map_or(more.len(), |at| at + 1);
            bytes.extend(&more[..line_end]);
        }
        let mut at = from + first as u64;
        let mut documents = Vec::new();
        for line in bytes[first..].split_inclusive(|byte| *byte == b'\n') {
            if !line.iter().all(u8::is_ascii_whitespace) {
                documents.push(self.document(file.name(), at, line)?);
            }
            at += line.len() as u64;
        }
        Ok(documents)
    }

    fn document(&self, file: &str, at: u64, line: &[u8]) -> Result<Document> {
        let wrong = |what: String| {
            let message = format!("the line of {file} that begins at byte {at} {what}");
            Err(WorkerError::corpus(message).hint("name the field that holds the text with --text-field"))
        };
        match serde_json::from_slice::<Value>(line) {
            Err(error) => wrong(format!("is not JSON: column {}", error.column())),
            Ok(Value::Object(mut fields)) => match fields.remove(&self.field) {
                Some(Value::String(text)) => Ok(Document { name: format!("{file} at byte {at}"), text: text.into() }),
                Some(_) => wrong(format!("has no text in its field {}", shown(&self.field))),
                None => wrong(format!("has no field {}", shown(&self.field))),
            },
            Ok(_) => wrong("is no JSON object".to_owned()),
        }
    }
}
