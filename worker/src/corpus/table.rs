//! Reads tables with a header row: columns separated by commas (RFC 4180) or tabs.

use csv::{ErrorKind, ReaderBuilder, StringRecord};

use super::documents::Document;
use super::file::{MAX_HELD_BYTES, RangedFile, line_after, read_whole};
use super::text::decode;
use crate::checkpoint::safetensors::shown;
use crate::error::{Result, WorkerError};

/// Maximum columns listed in a message.
const NAMES: usize = 20;

/// The texts of a column. An empty cell is an empty text; blank lines are skipped.
pub(super) fn read(file: &dyn RangedFile, delimiter: u8, field: &str) -> Result<Vec<Document>> {
    let text = decode(file.name(), read_whole(file, MAX_HELD_BYTES)?)?;
    if let Some(at) = stray_quote(text.as_bytes(), delimiter) {
        let line = line_after(&text.as_bytes()[..at]);
        let message = format!("line {line} of {} has a cell whose quotes do not end with it", file.name());
        return Err(WorkerError::corpus(message).hint("put quotes around the cell, and double those inside it"));
    }
    let mut reader = ReaderBuilder::new().delimiter(delimiter).from_reader(text.as_bytes());
    let unequal = |error: csv::Error| unequal(file.name(), &text, &error);
    let header = reader.headers().map_err(unequal)?;
    let column = header.iter().position(|name| name == field).ok_or_else(|| missing(file.name(), header, field))?;
    let document = |(row, record): (usize, csv::Result<StringRecord>)| {
        let text = record.map_err(unequal)?.get(column).unwrap_or_default().to_owned();
        Ok(Document { name: format!("row {} of {}", row + 1, file.name()), text: text.into() })
    };
    reader.records().enumerate().map(document).collect()
}

/// The error for a missing column.
fn missing(file: &str, header: &StringRecord, field: &str) -> WorkerError {
    let names = header.iter().take(NAMES).map(shown).collect::<Vec<_>>().join(", ");
    let message = format!("{file} has no column {}: its first line names {names}", shown(field));
    WorkerError::corpus(message).hint(
        "name the column that holds the text with --text-field; commas separate the columns of a .csv file, tabs those \
         of a .tsv file",
    )
}

/// The error for a row with another number of cells than the header.
fn unequal(file: &str, text: &str, error: &csv::Error) -> WorkerError {
    // The row's position includes the preceding line end and blank lines.
    let begin = error.position().map_or(0, |position| position.byte() as usize).min(text.len());
    let blank = text.as_bytes()[begin..].iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
    let line = line_after(&text.as_bytes()[..begin + blank]);
    let what = match error.kind() {
        ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!("has {len} cells, the header has {expected_len}")
        }
        _ => shown(&error.to_string()),
    };
    WorkerError::corpus(format!("line {line} of {file} {what}"))
        .hint("put quotes around cells that hold the separator or line breaks")
}

/// Offset of a quoted cell that is not closed or has text after its closing quote. The CSV reader
/// accepts such cells silently, and merges cells and rows.
fn stray_quote(text: &[u8], delimiter: u8) -> Option<usize> {
    enum In {
        Start,
        Plain,
        Quoted,
        Closed,
    }
    let (mut state, mut begin) = (In::Start, 0);
    for (at, byte) in text.iter().enumerate() {
        let ends = *byte == delimiter || matches!(byte, b'\n' | b'\r');
        state = match state {
            In::Quoted if *byte == b'"' => In::Closed,
            In::Quoted => In::Quoted,
            In::Closed if *byte == b'"' => In::Quoted,
            _ if ends => In::Start,
            In::Closed => return Some(begin),
            In::Start if *byte == b'"' => {
                begin = at;
                In::Quoted
            }
            In::Start | In::Plain => In::Plain,
        };
    }
    matches!(state, In::Quoted).then_some(begin)
}
