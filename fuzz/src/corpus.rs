//! Corpora that somebody else wrote.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use outliers_protocol::{CorpusSource, CorpusSpec};
use outliers_worker::corpus;
use outliers_worker::hub::{Hub, HubOptions};
use serde_json::json;
use tempfile::TempDir;

use crate::checkpoint::good;

/// Endings, from which the first byte of an input chooses: a digit, in seeds.
const ENDINGS: [&str; 10] =
    ["txt", "jsonl", "json", "csv", "tsv", "parquet", "txt.gz", "jsonl.gz", "json.zst", "csv.zst"];

/// A file of documents: if it is taken, it makes windows of what was asked for.
pub fn documents(input: &[u8]) {
    let Some((ending, bytes)) = input.split_first() else { return };
    let model = model();
    let path = model.join(format!("corpus.{}", ENDINGS[usize::from(ending.wrapping_sub(b'0')) % ENDINGS.len()]));
    fs::write(&path, bytes).expect("there is room for it");
    let source = CorpusSource::Files(vec![path.to_str().expect("it is plain").to_owned()]);
    let spec = CorpusSpec { source, sequence_length: Some(2), ..CorpusSpec::default() };
    let hub = Hub::new(HubOptions::new("/nowhere")).expect("it is asked for nothing");
    let Some(tokens) = good(corpus::load(&spec, Some(model), 3, None, &hub)) else { return };
    assert_eq!(tokens.ids.len(), tokens.sequences * tokens.tokens);
    assert!(tokens.sequences > 0 && tokens.tokens == 2 && tokens.provenance.tokens_available >= tokens.ids.len());
}

/// A folder with a tokenizer that knows one word.
fn model() -> &'static Path {
    static MODEL: OnceLock<TempDir> = OnceLock::new();
    let made = MODEL.get_or_init(|| {
        let folder = tempfile::tempdir().expect("there is a folder for such things");
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1}, "unk_token": "<unk>"}
        });
        fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).expect("there is room for it");
        folder
    });
    made.path()
}
