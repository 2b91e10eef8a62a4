//! JSON rows: objects with a text field, or strings.

use std::fmt;

use serde_json::Value;

use super::file::CONVERT;
use crate::checkpoint::safetensors::shown;
use crate::error::{Result, WorkerError};

/// Maximum names listed in a message.
const NAMES: usize = 20;
const LAYOUTS: &str = "a .jsonl or .ndjson file has one JSON object per line; a .json file has the same, or an array of \
                       objects or of strings";

/// Extracts the texts of a file's rows.
pub(super) struct Rows {
    field: String,
    read: usize,
    /// Whether some row has the field.
    found: bool,
    /// Fields of the rows, until one has the wanted field.
    others: Vec<String>,
}

/// An error in a row.
pub(super) struct Fault {
    what: String,
    hint: String,
}

impl Rows {
    pub(super) fn new(field: &str) -> Self {
        Self { field: field.to_owned(), read: 0, found: false, others: Vec::new() }
    }

    /// The text of a row; `None` if it is null or missing.
    pub(super) fn text(&mut self, row: Value) -> Result<Option<String>, Fault> {
        self.read += 1;
        let mut fields = match row {
            Value::String(text) => {
                self.found = true;
                return Ok(Some(text));
            }
            Value::Object(fields) => fields,
            Value::Array(_) => return Err(Fault::new("is an array, not an object", "token ids go to --token-ids")),
            other => return Err(Fault::new(format!("is {}, not an object", kind(&other)), LAYOUTS)),
        };
        let text = fields.remove(&self.field);
        self.found |= text.is_some();
        match text {
            Some(Value::String(text)) => Ok(Some(text)),
            Some(Value::Null) => Ok(None),
            Some(other) => {
                let texts = names(fields.iter().filter(|(_, value)| value.is_string()).map(|(name, _)| name));
                let what = format!("has no text in its field {}: it is {}", shown(&self.field), kind(&other));
                Err(Fault::new(
                    what,
                    format!("--text-field names the field that holds the text; it has text in {texts}"),
                ))
            }
            None => {
                self.note(fields.keys());
                Ok(None)
            }
        }
    }

    fn note<'a>(&mut self, fields: impl Iterator<Item = &'a String>) {
        for name in fields {
            if !self.found && self.others.len() < NAMES && !self.others.contains(name) {
                self.others.push(name.clone());
            }
        }
    }

    /// Refuses a file without a row that has the field.
    pub(super) fn check(&self, file: &str) -> Result<()> {
        if self.found || self.read == 0 {
            return Ok(());
        }
        let (field, read, others) = (shown(&self.field), self.read, names(self.others.iter()));
        let message = format!("{file} has no field {field} in any of {read} rows: they have {others}");
        Err(WorkerError::corpus(message).hint("name the field that holds the text with --text-field"))
    }
}

/// Quoted names for a message.
fn names<'a>(names: impl Iterator<Item = &'a String>) -> String {
    let names: Vec<String> = names.take(NAMES).map(|name| shown(name)).collect();
    if names.is_empty() { "no field".to_owned() } else { names.join(", ") }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

impl Fault {
    pub(super) fn new(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { what: what.into(), hint: hint.into() }
    }

    /// An error of layout: bytes that are not the expected JSON.
    pub(super) fn layout(what: impl Into<String>) -> Self {
        Self::new(what, LAYOUTS)
    }

    /// The error of a row that is not valid JSON.
    pub(super) fn syntax(row: &[u8], error: &serde_json::Error) -> Self {
        if let Err(error) = std::str::from_utf8(row) {
            return Self::new(format!("is not UTF-8 from its byte {} on", error.valid_up_to() + 1), CONVERT);
        }
        if error.is_eof() {
            return Self::layout("ends inside a JSON value");
        }
        let why = error.to_string();
        let why = why.split(" at line ").next().unwrap_or_default();
        let line = if error.line() > 1 { format!("line {} of it, ", error.line()) } else { String::new() };
        Self::layout(format!("is not JSON: {}, at {line}column {}", shown(why), error.column()))
    }

    /// Adds the location of the row.
    pub(super) fn at(self, place: impl fmt::Display) -> WorkerError {
        WorkerError::corpus(format!("{place} {}", self.what)).hint(self.hint)
    }
}
