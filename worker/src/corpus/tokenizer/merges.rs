//! Converts `vocab.json` and `merges.txt`, GPT-2's format and the only one of OPT, to a
//! tokenizer.json.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::python::PythonConfig;
use crate::checkpoint::safetensors::shown;
use crate::checkpoint::source::bad_json;
use crate::error::{Result, WorkerError};

/// Classes that read such files by GPT-2's rule. Others (Qwen2's) use the same files but split
/// words differently.
const CLASSES: [&str; 2] = ["GPT2Tokenizer", "GPT2TokenizerFast"];

/// The tokenizer.json equivalent to GPT-2's Python class: byte-level BPE, special tokens
/// recognised in the text, and no template (the settings define the prefix).
pub(super) fn convert(vocab: &[u8], merges: &[u8], python: &PythonConfig) -> Result<Vec<u8>> {
    if !python.is_any_of(&CLASSES) {
        let class = shown(python.class.as_deref().unwrap_or_default());
        let message = format!("vocab.json and merges.txt are for a tokenizer of class {class}, which is not known");
        return Err(WorkerError::unsupported(message)
            .hint("put a converted tokenizer.json beside config.json, or use ready token ids (`--token-ids`)"));
    }
    let mut vocab: BTreeMap<String, u32> = serde_json::from_slice(vocab).map_err(|e| bad_json("vocab.json", &e))?;
    for (token, id) in &python.ids {
        vocab.entry(token.clone()).or_insert(*id);
    }
    let added = python.special.iter().filter_map(|(token, described)| {
        let mut described = described.clone();
        described["id"] = (*vocab.get(token)?).into();
        Some(described)
    });
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": python.add_prefix_space,
        "trim_offsets": true, "use_regex": true});
    let unknown = python.unk_token.as_ref().filter(|token| vocab.contains_key(*token));
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "vocab": vocab, "merges": parse_merges(merges)?},
    });
    Ok(tokenizer.to_string().into_bytes())
}

/// Parses one pair per line, best first. The first line is a version.
fn parse_merges(merges: &[u8]) -> Result<Vec<Value>> {
    let wrong = |line: usize| {
        let message = format!("merges.txt is not what it should be: line {line} is no pair of tokens");
        WorkerError::checkpoint(message).hint("the file is damaged: fetch it again")
    };
    let text = std::str::from_utf8(merges).map_err(|_| wrong(1))?;
    let lines = text.split('\n').map(|line| line.trim_end_matches('\r')).enumerate();
    let version = |at: usize, line: &str| at == 0 && line.starts_with("#version");
    let pairs = lines.filter(|(at, line)| !line.is_empty() && !version(*at, line));
    let pair = |(at, line): (usize, &str)| match line.split_once(' ') {
        Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => {
            Ok(json!([left, right]))
        }
        _ => Err(wrong(at + 1)),
    };
    pairs.map(pair).collect()
}
