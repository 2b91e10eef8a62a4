//! Reads a text file as one document.

use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::documents::Document;
use super::file::{CONVERT, MAX_TEXT_BYTES, RangedFile, bom, line_after, read_whole};
use super::non_text;
use crate::error::{Result, WorkerError};

/// Reads a text file.
pub(super) fn read(file: &dyn RangedFile) -> Result<Document> {
    let text = decode(file.name(), read_whole(file, MAX_TEXT_BYTES)?)?;
    if holds_json(&text) {
        let message = format!("{} holds JSON, but its name is that of a text", file.name());
        let hint = "let its name end in .jsonl (one object per line) or .json (an array) to read the documents in it; to measure \
                    JSON itself as a text, make it a string in an array: `jq -Rs '[.]' FILE > FILE.json`";
        return Err(WorkerError::corpus(message).hint(hint));
    }
    Ok(Document { name: file.name().to_owned(), text: text.into() })
}

/// Decodes a file's bytes as text, without a byte order mark.
pub(super) fn decode(name: &str, mut bytes: Vec<u8>) -> Result<String> {
    non_text::refuse(name, &bytes)?;
    if let Some(at) = bytes.iter().position(|byte| *byte == 0) {
        let line = line_after(&bytes[..at]);
        let message = format!("{name} is no text: byte {at} (line {line}) is zero");
        return Err(
            WorkerError::corpus(message).hint("if it is text in UTF-16, convert it: `iconv -f utf-16le -t utf-8`")
        );
    }
    bytes.drain(..bom(&bytes));
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = line_after(&error.as_bytes()[..at]);
        let message = format!("{name} is not UTF-8: the bytes from {at} on (line {line}) are not text");
        WorkerError::corpus(message).hint(CONVERT)
    })
}

/// Whether a text is JSON as a whole, or begins with a line that is an object.
fn holds_json(text: &str) -> bool {
    let text = text.trim();
    let first = text.lines().next().unwrap_or_default();
    let object = |line: &str| serde_json::from_str::<Map<String, Value>>(line).is_ok();
    let whole = |text: &str| text.starts_with(['{', '[']) && serde_json::from_str::<IgnoredAny>(text).is_ok();
    text.starts_with('{') && object(first) || whole(text)
}
