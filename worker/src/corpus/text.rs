//! Documents, and the checkpoint's tokenizer over them.

use std::borrow::Cow;
use std::path::Path;

use outliers_protocol::{BosPolicy, TokenizerProvenance};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use super::read_corpus;
use crate::error::{Result, WorkerError};
use crate::safetensors::shown;
use crate::source::{TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, bad_json, read_small};

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

/// A checkpoint's tokenizer, and what it puts before a text.
pub(super) struct TextTokenizer {
    tokenizer: Tokenizer,
    /// Ids before each window: none, the BOS token, or (GLM) two special tokens.
    pub(super) prefix: Vec<u32>,
    pub(super) provenance: TokenizerProvenance,
}

impl TextTokenizer {
    pub(super) fn open(folder: Option<&Path>, bos: BosPolicy) -> Result<Self> {
        let no_tokenizer = |place: String| {
            WorkerError::corpus(format!("{place} has no {TOKENIZER_FILE}"))
                .hint("use ready token ids (`--token-ids`), or put a converted tokenizer.json beside config.json")
        };
        let folder = folder.ok_or_else(|| no_tokenizer("the model".to_owned()))?;
        let bytes = read_small(&folder.join(TOKENIZER_FILE))?;
        let bytes = bytes.ok_or_else(|| no_tokenizer(folder.display().to_string()))?;
        let tokenizer = parse(&bytes)?;
        let prefix = match bos {
            BosPolicy::Never => Vec::new(),
            BosPolicy::Auto => own_prefix(&tokenizer, &PythonConfig::read(folder)?)?,
            BosPolicy::Always => some_prefix(&tokenizer, &PythonConfig::read(folder)?)?,
        };
        let provenance = TokenizerProvenance {
            file: TOKENIZER_FILE.to_owned(),
            sha256: format!("{:x}", Sha256::digest(&bytes)),
            vocab: tokenizer.get_vocab_size(true),
            bos_token_id: prefix.first().copied(),
        };
        Ok(Self { tokenizer, prefix, provenance })
    }

    /// The ids of a text, nothing added.
    pub(super) fn encode(&self, document: &Document) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(document.text.as_ref(), false).map_err(|error| {
            let message = format!("{} cannot be tokenised: {}", document.name, shown(&error.to_string()));
            WorkerError::corpus(message)
        })?;
        Ok(encoding.get_ids().to_vec())
    }
}

/// Switches off what would cut or lengthen a text.
fn parse(bytes: &[u8]) -> Result<Tokenizer> {
    let unreadable = |error: tokenizers::Error| {
        let message = format!("{TOKENIZER_FILE} cannot be read: {}", shown(&error.to_string()));
        WorkerError::checkpoint(message).hint("fetch the tokenizer again, or use ready token ids (`--token-ids`)")
    };
    let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(unreadable)?;
    tokenizer.with_padding(None).with_truncation(None).map_err(unreadable)?;
    Ok(tokenizer)
}

/// What the family's own tokenizer puts before plain text: the template of tokenizer.json, or what its Python class adds
/// although the template does not (DeepSeek).
fn own_prefix(tokenizer: &Tokenizer, python: &PythonConfig) -> Result<Vec<u32>> {
    let template = template_prefix(tokenizer)?;
    if template.is_empty() && python.add_bos_token {
        return Ok(vec![python.bos(tokenizer)?]);
    }
    Ok(template)
}

/// A prefix in any case.
fn some_prefix(tokenizer: &Tokenizer, python: &PythonConfig) -> Result<Vec<u32>> {
    let template = template_prefix(tokenizer)?;
    if template.is_empty() { Ok(vec![python.bos(tokenizer)?]) } else { Ok(template) }
}

/// Special tokens before the first one of a probe text.
fn template_prefix(tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let probe = tokenizer.encode("a", true).map_err(|error| {
        WorkerError::checkpoint(format!("{TOKENIZER_FILE} cannot encode: {}", shown(&error.to_string())))
    })?;
    let special = probe.get_special_tokens_mask();
    let prefix = special.iter().take_while(|mask| **mask == 1).count();
    // A probe of special tokens only tells nothing about what stands before and what after the text.
    let prefix = if prefix == special.len() { 0 } else { prefix };
    Ok(probe.get_ids()[..prefix].to_vec())
}

/// The two entries of tokenizer_config.json that matter here.
#[derive(Default)]
struct PythonConfig {
    add_bos_token: bool,
    bos_token: Option<String>,
}

impl PythonConfig {
    fn read(folder: &Path) -> Result<Self> {
        let Some(bytes) = read_small(&folder.join(TOKENIZER_CONFIG_FILE))? else { return Ok(Self::default()) };
        let config: Value = serde_json::from_slice(&bytes).map_err(|e| bad_json(TOKENIZER_CONFIG_FILE, &e))?;
        let bos = &config["bos_token"];
        // A string, or an object describing an added token.
        let bos_token = bos.as_str().or_else(|| bos["content"].as_str()).map(str::to_owned);
        Ok(Self { add_bos_token: config["add_bos_token"] == Value::Bool(true), bos_token })
    }

    fn bos(&self, tokenizer: &Tokenizer) -> Result<u32> {
        let Some(token) = &self.bos_token else {
            let message = "the model's tokenizer has no beginning-of-sequence token";
            return Err(WorkerError::corpus(message).hint("use the BOS policy `auto` or `never`"));
        };
        tokenizer.token_to_id(token).ok_or_else(|| {
            let message =
                format!("{TOKENIZER_CONFIG_FILE} names the BOS token {}, which {TOKENIZER_FILE} lacks", shown(token));
            WorkerError::checkpoint(message).hint("use the BOS policy `never`, or fetch the tokenizer again")
        })
    }
}
