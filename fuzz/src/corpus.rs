//! Corpora from untrusted files.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use outliers_protocol::{CorpusSource, CorpusSpec};
use outliers_worker::checkpoint::hub::{Hub, HubOptions};
use outliers_worker::corpus::{self, Tokens};
use serde_json::json;
use tempfile::TempDir;

use crate::checkpoint::good;

/// Extensions, selected by the first byte of an input: a digit, in seeds.
const ENDINGS: [&str; 12] = [
    "txt",
    "jsonl",
    "json",
    "csv",
    "tsv",
    "parquet",
    "txt.gz",
    "jsonl.gz",
    "json.zst",
    "csv.zst",
    "parquet.gz",
    "ndjson.zst",
];

/// Files of a tokenizer, selected by the first byte of an input; the last is beside a good
/// tokenizer.json.
const TOKENIZERS: [&str; 4] = ["tokenizer.json", "merges.txt", "tiktoken.model", "tokenizer_config.json"];
/// A text with every kind of word boundary.
const TEXT: &str = "a b  ab\n<unk> it's 123 e\u{301} 漢字 <|x|> aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
/// Larger than any token id.
const VOCAB: usize = 1 << 32;

/// A file of documents. If it is accepted, it gives windows of the requested size.
pub fn documents(input: &[u8]) {
    let Some((ending, bytes)) = input.split_first() else { return };
    let model = model();
    let path = model.join(format!("corpus.{}", ENDINGS[usize::from(ending.wrapping_sub(b'0')) % ENDINGS.len()]));
    fs::write(&path, bytes).expect("there is room for it");
    let Some(tokens) = load(CorpusSource::Files(vec![name(&path)]), Some(2), model, 3) else { return };
    assert!(tokens.tokens == 2 && tokens.provenance.tokens_available >= tokens.ids.len());
}

/// Token ids. If they are accepted, they are valid for the model.
pub fn token_ids(bytes: &[u8]) {
    let model = model();
    let path = model.join("ids");
    fs::write(&path, bytes).expect("there is room for it");
    let Some(tokens) = load(CorpusSource::TokenIds(name(&path)), None, model, 3) else { return };
    assert!(tokens.ids.iter().all(|id| (0..3).contains(id)), "{:?}", tokens.ids);
}

/// A file of a tokenizer. If it is accepted, it gives windows of a text or an error, with bounded
/// size.
pub fn tokenizer(input: &[u8]) {
    let Some((which, bytes)) = input.split_first() else { return };
    let which = TOKENIZERS[usize::from(which.wrapping_sub(b'0')) % TOKENIZERS.len()];
    let folder = tempfile::tempdir().expect("there is a folder for such things");
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).expect("there is room for it");
        path
    };
    match which {
        "merges.txt" => drop(write("vocab.json", br#"{"a": 0, "b": 1, "ab": 2, "<unk>": 3}"#)),
        "tokenizer_config.json" => drop(write("tokenizer.json", words().as_bytes())),
        _ => {}
    }
    write(which, bytes);
    let text = write("text.txt", TEXT.as_bytes());
    load(CorpusSource::Files(vec![name(&text)]), Some(2), folder.path(), VOCAB);
}

fn name(path: &Path) -> String {
    path.to_str().expect("it is plain").to_owned()
}

/// The tokens of a source for a model with this vocabulary; `None` after an error that is safe for
/// a terminal.
fn load(source: CorpusSource, length: Option<usize>, model: &Path, vocab: usize) -> Option<Tokens> {
    let spec = CorpusSpec { source, sequence_length: length, ..CorpusSpec::default() };
    let hub = Hub::new(HubOptions::new("/nowhere")).expect("it is asked for nothing");
    let tokens = good(corpus::load(&spec, Some(model), vocab, None, &hub))?;
    assert!(tokens.sequences > 0 && tokens.ids.len() == tokens.sequences * tokens.tokens);
    Some(tokens)
}

/// A folder with a tokenizer of one word.
fn model() -> &'static Path {
    static MODEL: OnceLock<TempDir> = OnceLock::new();
    let made = MODEL.get_or_init(|| {
        let folder = tempfile::tempdir().expect("there is a folder for such things");
        fs::write(folder.path().join("tokenizer.json"), words()).expect("there is room for it");
        folder
    });
    made.path()
}

/// A tokenizer.json of whole words.
fn words() -> String {
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1}, "unk_token": "<unk>"}
    });
    tokenizer.to_string()
}
