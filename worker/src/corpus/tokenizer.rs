//! The checkpoint's tokenizer in any published format, and the prefix of sequences.

mod growth;
mod library;
mod merges;
mod python;
mod ranks;

use std::path::Path;

use outliers_protocol::{BosPolicy, TokenizerProvenance};
use sha2::{Digest, Sha256};

use super::documents::Document;
use crate::checkpoint::safetensors::shown;
use crate::checkpoint::source::{TOKENIZER_FILE, TokenizerFiles, read_small};
use crate::error::{Result, WorkerError};
use library::Library;
use python::PythonConfig;
use ranks::RankTokenizer;

/// A checkpoint's tokenizer with the prefix of sequences.
pub(super) struct TextTokenizer {
    encoder: Encoder,
    /// Ids before each window: none, the BOS token, or two special tokens (GLM).
    pub(super) prefix: Vec<u32>,
    pub(super) provenance: TokenizerProvenance,
}

impl TextTokenizer {
    pub(super) fn open(folder: Option<&Path>, bos: BosPolicy) -> Result<Self> {
        let no_tokenizer = |place: String| {
            WorkerError::corpus(format!("{place} has no {TOKENIZER_FILE}, nor an older form of it"))
                .hint("use ready token ids (`--token-ids`), or put a converted tokenizer.json beside config.json")
        };
        let folder = folder.ok_or_else(|| no_tokenizer("the model".to_owned()))?;
        let files = TokenizerFiles::choose(|name| folder.join(name).exists());
        let files = files.ok_or_else(|| no_tokenizer(folder.display().to_string()))?;
        let read = |name: &&str| Ok(read_small(&folder.join(name))?.unwrap_or_default());
        let contents: Vec<Vec<u8>> = files.names().iter().map(read).collect::<Result<_>>()?;
        let python = PythonConfig::read(folder)?;
        let encoder = Encoder::new(files, &contents, &python)?;
        let prefix = prefix(&encoder, &python, bos)?;
        let hash = contents.iter().fold(Sha256::new(), |hash, content| hash.chain_update(content));
        let provenance = TokenizerProvenance {
            file: files.to_string(),
            sha256: format!("{:x}", hash.finalize()),
            vocab: encoder.vocab(),
            bos_token_id: prefix.first().copied(),
        };
        Ok(Self { encoder, prefix, provenance })
    }

    /// The content of a token.
    pub(super) fn token(&self, id: u32) -> Option<String> {
        match &self.encoder {
            Encoder::Library(library) => library.tokenizer.id_to_token(id),
            Encoder::Ranks(_) => None,
        }
    }

    /// Token ids of a text, without special tokens added.
    pub(super) fn encode(&self, document: &Document) -> Result<Vec<u32>> {
        self.encoder.encode(&document.text).map_err(|error| {
            let message = format!("{} cannot be tokenised: {}", document.name, shown(&error.to_string()));
            WorkerError::corpus(message)
        })
    }
}

/// Text to ids.
enum Encoder {
    /// The `tokenizers` library.
    Library(Box<Library>),
    /// Ranks without merges (tiktoken).
    Ranks(Box<RankTokenizer>),
}

impl Encoder {
    /// Creates an encoder from the contents of `files`, in their order.
    fn new(files: TokenizerFiles, contents: &[Vec<u8>], python: &PythonConfig) -> Result<Self> {
        let library = |json: &[u8], added: &[_]| Ok(Self::Library(Box::new(Library::open(json, files, added)?)));
        match (files, contents) {
            (TokenizerFiles::Json, [json]) => library(json, &python.added),
            // Special tokens are converted, too.
            (TokenizerFiles::VocabAndMerges, [vocab, merges]) => library(&merges::convert(vocab, merges, python)?, &[]),
            (TokenizerFiles::Tiktoken, [ranks]) => Ok(Self::Ranks(Box::new(RankTokenizer::parse(ranks, python)?))),
            _ => Err(WorkerError::internal(format!("{} contents of {files}", contents.len()))),
        }
    }

    fn encode(&self, text: &str) -> tokenizers::Result<Vec<u32>> {
        match self {
            Self::Library(library) => library.encode(text),
            Self::Ranks(tokenizer) => Ok(tokenizer.encode(text)?),
        }
    }

    fn id(&self, token: &str) -> Option<u32> {
        match self {
            Self::Library(library) => library.tokenizer.token_to_id(token),
            Self::Ranks(tokenizer) => tokenizer.special(token),
        }
    }

    /// Number of entries, special tokens included.
    fn vocab(&self) -> usize {
        match self {
            Self::Library(library) => library.tokenizer.get_vocab_size(true),
            Self::Ranks(tokenizer) => tokenizer.vocab(),
        }
    }

    /// Special tokens that the tokenizer's template puts before a text. Only `tokenizer.json` has
    /// templates.
    fn template_prefix(&self) -> Result<Vec<u32>> {
        match self {
            Self::Library(library) => library.template_prefix(),
            Self::Ranks(_) => Ok(Vec::new()),
        }
    }
}

/// Ids before each window. That of the family's tokenizer is by the template of tokenizer.json, or
/// by its Python class if the template lacks it (DeepSeek, OPT).
fn prefix(encoder: &Encoder, python: &PythonConfig, bos: BosPolicy) -> Result<Vec<u32>> {
    if bos == BosPolicy::Never {
        return Ok(Vec::new());
    }
    let template = encoder.template_prefix()?;
    let adds_bos = bos == BosPolicy::Always || python.add_bos_token;
    if template.is_empty() && adds_bos { Ok(vec![python.bos(encoder)?]) } else { Ok(template) }
}

#[cfg(test)]
mod tests;
