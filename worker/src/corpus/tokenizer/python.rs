//! Settings that a tokenizer's Python class reads besides its vocabulary.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use serde_json::{Value, json};
use tokenizers::AddedToken;

use super::Encoder;
use crate::checkpoint::safetensors::shown;
use crate::checkpoint::source::{
    ADDED_TOKENS_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE, bad_json, read_small,
};
use crate::error::{Result, WorkerError};

/// Keys that name one special token each.
const ROLES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The used settings. All are optional; missing ones have the defaults of the Python classes.
#[derive(Default)]
pub(super) struct PythonConfig {
    /// Name of the class.
    pub(super) class: Option<String>,
    pub(super) add_bos_token: bool,
    pub(super) add_prefix_space: bool,
    bos_token: Option<String>,
    bos_token_id: Option<u32>,
    /// Token for text outside the vocabulary.
    pub(super) unk_token: Option<String>,
    /// Tokens recognised in plain text, as described in tokenizer.json, without ids.
    pub(super) special: BTreeMap<String, Value>,
    /// Ids of tokens, in or outside the vocabulary.
    pub(super) ids: BTreeMap<String, u32>,
    /// Tokens that the class adds to those of a tokenizer.json, in this order.
    pub(super) added: Vec<Added>,
}

/// A token that a class adds.
pub(super) struct Added {
    pub(super) token: AddedToken,
    /// Whether it replaces an added token of tokenizer.json with the same content.
    pub(super) replaces: bool,
}

impl PythonConfig {
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let config = object(folder, TOKENIZER_CONFIG_FILE)?;
        let map = object(folder, SPECIAL_TOKENS_FILE)?;
        let role = |name: &str| content(&config[name]).or_else(|| content(&map[name])).map(str::to_owned);
        let mut python = Self {
            class: config["tokenizer_class"].as_str().map(str::to_owned),
            add_bos_token: config["add_bos_token"] == Value::Bool(true),
            add_prefix_space: config["add_prefix_space"] == Value::Bool(true),
            bos_token: role("bos_token"),
            bos_token_id: id(&object(folder, CONFIG_FILE)?["bos_token_id"]),
            unk_token: role("unk_token"),
            ..Self::default()
        };
        for source in [&config, &map] {
            let listed = source["additional_special_tokens"].as_array().into_iter().flatten();
            ROLES.iter().map(|role| &source[*role]).chain(listed).for_each(|token| python.add_special(token));
        }
        let added = object(folder, ADDED_TOKENS_FILE)?;
        for (token, id) in added.as_object().into_iter().flatten() {
            python.add_id(token, self::id(id));
        }
        python.added = added_tokens(&config, &map, &added);
        for (id, token) in config["added_tokens_decoder"].as_object().into_iter().flatten() {
            python.add_special(token);
            python.add_id(content(token).unwrap_or_default(), id.parse().ok());
        }
        Ok(python)
    }

    fn add_special(&mut self, token: &Value) {
        let Some(content) = content(token) else { return };
        let flag = |name: &str| token[name] == Value::Bool(true);
        let described = json!({"content": content, "special": true, "normalized": false,
            "single_word": flag("single_word"), "lstrip": flag("lstrip"), "rstrip": flag("rstrip")});
        self.special.entry(content.to_owned()).or_insert(described);
    }

    fn add_id(&mut self, token: &str, id: Option<u32>) {
        if let Some(id) = id.filter(|_| !token.is_empty()) {
            self.ids.insert(token.to_owned(), id);
        }
    }

    /// Whether the tokenizer's class is one of these, or not specified.
    pub(super) fn is_any_of(&self, classes: &[&str]) -> bool {
        self.class.as_ref().is_none_or(|class| classes.contains(&class.as_str()))
    }

    /// The beginning-of-sequence token: by name, else by the id in config.json.
    pub(super) fn bos(&self, encoder: &Encoder) -> Result<u32> {
        let Some(token) = &self.bos_token else {
            let message = "the model's tokenizer has no beginning-of-sequence token";
            let none = WorkerError::corpus(message).hint("use the BOS policy `auto` or `never`");
            return self.bos_token_id.ok_or(none);
        };
        encoder.id(token).ok_or_else(|| {
            let message = format!("the tokenizer's settings name the BOS token {}, which it lacks", shown(token));
            WorkerError::checkpoint(message).hint("use the BOS policy `never`, or fetch the tokenizer again")
        })
    }
}

/// The tokens that transformers 5 adds to a tokenizer.json: those of `added_tokens_decoder` in
/// tokenizer_config.json by their ids (without that key those of added_tokens.json), then special
/// tokens. special_tokens_map.json counts only without that key, and before tokenizer_config.json.
fn added_tokens(config: &Value, map: &Value, added: &Value) -> Vec<Added> {
    let decoder = config["added_tokens_decoder"].as_object();
    let map = map.as_object().filter(|_| decoder.is_none());
    let mut settings = config.as_object().cloned().unwrap_or_default();
    settings.extend(map.into_iter().flatten().map(|(key, value)| (key.clone(), value.clone())));
    let value = |key: &str| settings.get(key).unwrap_or(&Value::Null);

    let is_other = |key: &str| key.ends_with("_token") && !ROLES.contains(&key);
    let others = settings.iter().filter(|(key, _)| is_other(key)).map(|(_, token)| token);
    let extra = value("extra_special_tokens");
    let by_name = extra.as_object().into_iter().flatten().map(|(_, token)| token);
    let extra = extra.as_array().filter(|list| !list.is_empty()).or(value("additional_special_tokens").as_array());
    let special: Vec<AddedToken> = ROLES
        .iter()
        .map(|role| value(role))
        .chain(others)
        .chain(by_name)
        .chain(extra.into_iter().flatten())
        .filter_map(|token| Some(AddedToken { special: true, ..added_token(token)? }))
        .collect();

    let is_special = |token: &str| special.iter().any(|special| special.content == token);
    let mut listed: Vec<(u32, Added)> = match decoder {
        Some(decoder) => decoder
            .iter()
            .filter_map(|(id, token)| Some((id.parse().ok()?, Added { token: added_token(token)?, replaces: true })))
            .collect(),
        None => (added.as_object().into_iter().flatten())
            .filter_map(|(token, id)| {
                let token = AddedToken::from(token.as_str(), is_special(token));
                Some((self::id(id)?, Added { token, replaces: false }))
            })
            .collect(),
    };
    listed.sort_by_key(|(id, _)| *id);
    let special = special.into_iter().map(|token| Added { token, replaces: false });
    let mut seen = HashSet::new();
    let all = listed.into_iter().map(|(_, added)| added).chain(special);
    all.filter(|added| seen.insert(added.token.content.clone())).collect()
}

/// A token by its content, which is special, or by its description.
fn added_token(token: &Value) -> Option<AddedToken> {
    let flag = |name: &str, default| token[name].as_bool().unwrap_or(default);
    let special = token.is_string() || flag("special", false);
    let content = content(token).filter(|content| !content.is_empty())?;
    let added = AddedToken::from(content, special).normalized(flag("normalized", !special));
    Some(added.single_word(flag("single_word", false)).lstrip(flag("lstrip", false)).rstrip(flag("rstrip", false)))
}

/// Reads a file with a JSON object; empty if it does not exist.
fn object(folder: &Path, name: &str) -> Result<Value> {
    let Some(bytes) = read_small(&folder.join(name))? else { return Ok(json!({})) };
    let value: Value = serde_json::from_slice(&bytes).map_err(|e| bad_json(name, &e))?;
    if value.is_object() {
        return Ok(value);
    }
    Err(WorkerError::checkpoint(format!("{name} is not a JSON object")).hint("the file is damaged: fetch it again"))
}

/// A token is a string, or an object describing an added token.
fn content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

fn id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| id.try_into().ok())
}
