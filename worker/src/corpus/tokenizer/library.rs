//! Tokenizers that the `tokenizers` library reads: bounded before they see a text, and an error
//! where the library panics.

use tokenizers::Tokenizer;

use super::growth::Growth;
use crate::caught::caught;
use crate::checkpoint::safetensors::shown;
use crate::checkpoint::source::TokenizerFiles;
use crate::error::{Result, WorkerError};

/// Bytes that a document may become on its way through the steps of a tokenizer; each takes some
/// 20 bytes of memory there.
const MOST_GROWN: usize = 1 << 30;

/// A tokenizer of the library.
#[derive(Clone)]
pub(super) struct Library {
    pub(super) tokenizer: Tokenizer,
    growth: Growth,
    /// What it was read from.
    files: TokenizerFiles,
}

impl Library {
    /// From a tokenizer.json. Switches off what would cut or lengthen a text.
    ///
    /// # Errors
    /// Kind `Checkpoint`, naming `files`: it cannot be read, or may lengthen a text out of all
    /// measure.
    pub(super) fn open(json: &[u8], files: TokenizerFiles) -> Result<Self> {
        guarded(files, || {
            // First: reading it takes its special tokens through its steps.
            let growth = Growth::of(json)?;
            let mut tokenizer = Tokenizer::from_bytes(json)?;
            tokenizer.with_padding(None).with_truncation(None)?;
            let added = tokenizer.get_added_vocabulary();
            let is_nothing = |id: &u32| added.simple_id_to_token(*id).is_some_and(|token| token.is_empty());
            if added.get_added_tokens_decoder().keys().any(is_nothing) {
                return Err("its steps leave nothing of one of its special tokens".into());
            }
            Ok(Self { tokenizer, growth, files })
        })
    }

    /// The ids of a text, nothing added.
    pub(super) fn encode(&self, text: &str) -> tokenizers::Result<Vec<u32>> {
        let ids = caught(|| -> tokenizers::Result<Vec<u32>> {
            self.growth.check(&self.tokenizer, text, MOST_GROWN)?;
            Ok(self.tokenizer.encode_fast(text, false)?.get_ids().to_vec())
        });
        ids.unwrap_or_else(|said| Err(failed_over(self.files, &said).into()))
    }

    /// Special tokens before the first one of a probe text.
    pub(super) fn template_prefix(&self) -> Result<Vec<u32>> {
        let probe = guarded(self.files, || self.tokenizer.encode("a", true))?;
        let special = probe.get_special_tokens_mask();
        let prefix = special.iter().take_while(|mask| **mask == 1).count();
        // A probe of special tokens only tells nothing about what stands before and what after the
        // text.
        let prefix = if prefix == special.len() { 0 } else { prefix };
        Ok(probe.get_ids()[..prefix].to_vec())
    }
}

/// What the library does with what `files` hold, or an error that names them.
fn guarded<T>(files: TokenizerFiles, work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let message = match caught(work) {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(error)) => format!("{files} cannot be read: {}", shown(&error.to_string())),
        Err(said) => failed_over(files, &shown(&said)),
    };
    Err(WorkerError::checkpoint(message).hint("fetch the tokenizer again, or use ready token ids (`--token-ids`)"))
}

fn failed_over(files: TokenizerFiles, said: &str) -> String {
    format!("{files} cannot be used: the tokenizer library fails over what it holds: {said}")
}
