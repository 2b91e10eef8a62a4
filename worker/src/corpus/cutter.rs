//! Cuts documents into windows of token ids.

use outliers_protocol::Packing;

use super::documents::Document;
use super::tokenizer::TextTokenizer;
use crate::error::{Result, WorkerError};

/// Collects documents and returns windows of one length.
pub(super) struct Cutter<'a> {
    tokenizer: &'a TextTokenizer,
    /// Ids of a window without its prefix.
    body: usize,
    cut: Cut,
    /// Ids of all documents; an estimate for overlapping windows.
    pub(super) tokens: usize,
}

/// Collected input, by packing.
enum Cut {
    /// Concatenated ids.
    Packed(Vec<u32>),
    /// Ids of each document, in whole windows.
    Separate(Vec<Vec<u32>>),
    /// Text, joined by spaces.
    Overlapping(String),
}

impl<'a> Cutter<'a> {
    /// Windows of `length` ids, each with the tokenizer's prefix.
    pub(super) fn new(tokenizer: &'a TextTokenizer, length: usize, packing: Packing) -> Result<Self> {
        let body = length.checked_sub(tokenizer.prefix.len()).filter(|body| *body > 0);
        let Some(body) = body else {
            let special = tokenizer.prefix.len();
            let message = format!("sequences of {length} tokens leave no room after {special} special ones");
            return Err(WorkerError::job(message).hint("use a larger sequence length"));
        };
        let cut = match packing {
            Packing::Packed => Cut::Packed(Vec::new()),
            Packing::Separate => Cut::Separate(Vec::new()),
            Packing::Overlapping => Cut::Overlapping(String::new()),
        };
        Ok(Self { tokenizer, body, cut, tokens: 0 })
    }

    /// Adds a document.
    pub(super) fn add(&mut self, document: &Document) -> Result<()> {
        let ids = self.tokenizer.encode(document)?;
        self.tokens += ids.len();
        match &mut self.cut {
            Cut::Packed(all) => all.extend(ids),
            Cut::Separate(windows) => windows.extend(ids.chunks_exact(self.body).map(<[u32]>::to_vec)),
            Cut::Overlapping(text) => {
                if !text.is_empty() {
                    text.push(' ');
                }
                text.push_str(&document.text);
            }
        }
        Ok(())
    }

    /// Whether the documents give at least this many windows.
    pub(super) fn has(&self, windows: usize) -> bool {
        match &self.cut {
            Cut::Packed(ids) => ids.len() / self.body >= windows,
            Cut::Separate(cut) => cut.len() >= windows,
            Cut::Overlapping(_) => {
                let needed = self.body + windows.saturating_sub(1) * self.step();
                // Joined documents may have other ids at their boundaries.
                self.tokens >= needed + needed / 32 + 64
            }
        }
    }

    fn step(&self) -> usize {
        (self.body / 2).max(1)
    }

    /// All windows, and the number of ids they were cut from. An incomplete window is dropped.
    pub(super) fn finish(self) -> Result<(Vec<Vec<u32>>, usize)> {
        let (body, step, prefix) = (self.body, self.step(), &self.tokenizer.prefix);
        let window = |ids: &[u32]| [prefix, ids].concat();
        Ok(match self.cut {
            Cut::Packed(ids) => (ids.chunks_exact(body).map(window).collect(), self.tokens),
            Cut::Separate(cut) => (cut.iter().map(|ids| window(ids)).collect(), self.tokens),
            Cut::Overlapping(text) => {
                let joined = Document { name: "the joined documents".to_owned(), text: text.into() };
                let ids = self.tokenizer.encode(&joined)?;
                (ids.windows(body).step_by(step).map(window).collect(), ids.len())
            }
        })
    }
}
