//! Documents.

use std::borrow::Cow;
use std::path::Path;

use super::read_corpus;
use crate::error::{Result, WorkerError};

/// A text under its name.
pub(super) struct Document {
    pub(super) name: String,
    pub(super) text: Cow<'static, str>,
}

impl Document {
    /// Reads a UTF-8 text file.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let text = String::from_utf8(read_corpus(path)?).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            let message = format!("{name} is not UTF-8: the bytes from {at} on are not text");
            WorkerError::corpus(message).hint("convert it, for example with `iconv -t utf-8`")
        })?;
        Ok(Self { name, text: text.into() })
    }
}
