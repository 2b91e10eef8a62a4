//! Reads a JSON array of rows from a file held in memory.

use serde_json::{Deserializer, Value};

use super::documents::Document;
use super::file::{MAX_HELD_BYTES, RangedFile, bom, head, line_after, read_whole};
use super::non_text;
use super::rows::{Fault, Rows};
use super::text::decode;
use crate::error::Result;

/// Bytes within which a file's first character is expected.
const BEGINNING: u64 = 64 << 10;

/// Whether a `.json` file is an array. Otherwise it can only be JSON Lines.
pub(super) fn is_array(file: &dyn RangedFile) -> Result<bool> {
    let bytes = head(file, BEGINNING)?;
    non_text::refuse(file.name(), &bytes)?;
    match bytes[bom(&bytes)..].iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'[') => Ok(true),
        Some(b'{' | b'"') | None => Ok(false),
        Some(_) => Err(Fault::layout("is neither a JSON array nor JSON Lines").at(file.name())),
    }
}

/// The texts of an array.
pub(super) fn read(file: &dyn RangedFile, field: &str) -> Result<Vec<Document>> {
    let text = decode(file.name(), read_whole(file, MAX_HELD_BYTES)?)?;
    let (mut elements, mut rows, mut documents) = (Elements::of(&text), Rows::new(field), Vec::new());
    loop {
        let row = elements.next();
        let place = |number: usize, at: usize| {
            format!("element {number} (line {}) of {}", line_after(&text.as_bytes()[..at]), file.name())
        };
        let wrong = |fault: Fault| fault.at(place(elements.number, elements.begin));
        match row.and_then(|row| row.map(|row| rows.text(row)).transpose()).map_err(wrong)? {
            None => break,
            Some(None) => {}
            Some(Some(text)) => {
                let name = format!("element {} of {}", elements.number, file.name());
                documents.push(Document { name, text: text.into() });
            }
        }
    }
    rows.check(file.name())?;
    Ok(documents)
}

/// Iterates over the elements of an array.
struct Elements<'a> {
    bytes: &'a [u8],
    /// Number of bytes read.
    at: usize,
    /// Number of the last element, from 1, and its first byte.
    number: usize,
    begin: usize,
}

impl<'a> Elements<'a> {
    /// Elements of a text that begins with a bracket.
    fn of(text: &'a str) -> Self {
        let bytes = text.as_bytes();
        let at = text.find('[').map_or(bytes.len(), |at| at + 1);
        Self { bytes, at, number: 0, begin: at }
    }

    fn next(&mut self) -> Result<Option<Value>, Fault> {
        match self.peek() {
            Some(b']') => return self.end(),
            Some(b',') if self.number > 0 => self.at += 1,
            Some(_) if self.number > 0 => {
                return Err(Fault::layout("is not followed by a comma or the end of the array"));
            }
            _ => {}
        }
        self.peek();
        (self.number, self.begin) = (self.number + 1, self.at);
        let rest = &self.bytes[self.at..];
        let mut values = Deserializer::from_slice(rest).into_iter::<Value>();
        let value = values.next().ok_or_else(|| Fault::layout("is missing: the file ends inside its array"))?;
        self.at += values.byte_offset();
        value.map(Some).map_err(|error| Fault::syntax(rest, &error))
    }

    /// The next byte that is not white space.
    fn peek(&mut self) -> Option<u8> {
        let blank = self.bytes[self.at..].iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        self.at += blank;
        self.bytes.get(self.at).copied()
    }

    /// Checks that nothing follows the array.
    fn end(&mut self) -> Result<Option<Value>, Fault> {
        self.at += 1;
        match self.peek() {
            None => Ok(None),
            Some(_) => Err(Fault::layout("is the last of an array, but more follows")),
        }
    }
}
