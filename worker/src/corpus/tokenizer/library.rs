//! Tokenizers of the `tokenizers` library. Their growth is bounded before use, and panics become
//! errors.

use tokenizers::{AddedToken, Tokenizer};

use super::growth::Growth;
use super::python::Added;
use crate::catch_panic::catch_panic;
use crate::checkpoint::safetensors::shown;
use crate::checkpoint::source::TokenizerFiles;
use crate::error::{Result, WorkerError};

/// Maximum bytes that a document may become in the tokenizer's steps. Each takes about 20 bytes of
/// memory there.
const MAX_GROWN: usize = 1 << 30;

/// A tokenizer of the library.
#[derive(Clone)]
pub(super) struct Library {
    pub(super) tokenizer: Tokenizer,
    growth: Growth,
    /// Files it was read from.
    files: TokenizerFiles,
}

impl Library {
    /// Reads a tokenizer.json, and adds tokens to it. Truncation and padding are disabled.
    ///
    /// # Errors
    /// Kind `Checkpoint`, naming `files`: it cannot be read, or may lengthen a text too much.
    pub(super) fn open(json: &[u8], files: TokenizerFiles, added: &[Added]) -> Result<Self> {
        guarded(files, || {
            // Checked first: reading the file applies its steps to its special tokens.
            let growth = Growth::of(json)?;
            let mut tokenizer = Tokenizer::from_bytes(json)?;
            tokenizer.with_padding(None).with_truncation(None)?;
            let there = tokenizer.get_added_vocabulary().get_vocab();
            let missing = added.iter().filter(|added| added.replaces || !there.contains_key(&added.token.content));
            let missing: Vec<AddedToken> = missing.map(|added| added.token.clone()).collect();
            tokenizer.add_tokens(missing)?;
            let added = tokenizer.get_added_vocabulary();
            let is_nothing = |id: &u32| added.simple_id_to_token(*id).is_some_and(|token| token.is_empty());
            if added.get_added_tokens_decoder().keys().any(is_nothing) {
                return Err("its steps leave nothing of one of its special tokens".into());
            }
            Ok(Self { tokenizer, growth, files })
        })
    }

    /// Token ids of a text, without special tokens added.
    pub(super) fn encode(&self, text: &str) -> tokenizers::Result<Vec<u32>> {
        let ids = catch_panic(|| -> tokenizers::Result<Vec<u32>> {
            self.growth.check(&self.tokenizer, text, MAX_GROWN)?;
            Ok(self.tokenizer.encode_fast(text, false)?.get_ids().to_vec())
        });
        ids.unwrap_or_else(|said| Err(failed_over(self.files, &said).into()))
    }

    /// Special tokens before the first token of a probe text.
    pub(super) fn template_prefix(&self) -> Result<Vec<u32>> {
        let probe = guarded(self.files, || self.tokenizer.encode("a", true))?;
        let special = probe.get_special_tokens_mask();
        let prefix = special.iter().take_while(|mask| **mask == 1).count();
        // A probe that yields only special tokens does not show which come before and after the
        // text.
        let prefix = if prefix == special.len() { 0 } else { prefix };
        Ok(probe.get_ids()[..prefix].to_vec())
    }
}

/// The result of the library, or an error that names `files`.
fn guarded<T>(files: TokenizerFiles, work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let message = match catch_panic(work) {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(error)) => format!("{files} cannot be read: {}", shown(&error.to_string())),
        Err(said) => failed_over(files, &shown(&said)),
    };
    Err(WorkerError::checkpoint(message).hint("fetch the tokenizer again, or use ready token ids (`--token-ids`)"))
}

fn failed_over(files: TokenizerFiles, said: &str) -> String {
    format!("{files} cannot be used: the tokenizer library fails over what it holds: {said}")
}
