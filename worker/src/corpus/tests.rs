use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use outliers_protocol::{BosPolicy, FailureKind};
use serde_json::{Value, json};

use super::*;
use crate::safetensors::{StoredDtype, TensorSpec, Writer};
use crate::source::{TOKENIZER_CONFIG_FILE, TOKENIZER_FILE};

/// A folder with a tokenizer of whole words `w0` to `w99` (ids 3 to 102), `<s>` 0, `</s>` 1, `<unk>` 2.
struct Model(tempfile::TempDir);

impl Model {
    fn new(template: &[&str], python: Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let specials = ["<s>", "</s>", "<unk>"];
        let words = specials.iter().map(|s| (*s).to_owned()).chain((0..100).map(|i| format!("w{i}")));
        let vocab: BTreeMap<String, usize> = words.enumerate().map(|(i, word)| (word, i)).collect();
        let added = |(id, content): (usize, &&str)| {
            json!({"id": id, "content": content, "special": true, "normalized": false,
                   "single_word": false, "lstrip": false, "rstrip": false})
        };
        let piece = |name: &&str| match *name {
            "A" => json!({"Sequence": {"id": "A", "type_id": 0}}),
            special => json!({"SpecialToken": {"id": special, "type_id": 0}}),
        };
        let special =
            |(id, name): (usize, &&str)| ((*name).to_owned(), json!({"id": name, "ids": [id], "tokens": [name]}));
        let template = json!({"type": "TemplateProcessing", "single": template.iter().map(piece).collect::<Vec<_>>(),
            "pair": [piece(&"A")], "special_tokens": specials.iter().enumerate().map(special).collect::<BTreeMap<_, _>>()});
        let tokenizer = json!({
            "version": "1.0",
            // Both must be ignored: they would cut and lengthen the text.
            "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null,
                        "pad_id": 2, "pad_type_id": 0, "pad_token": "<unk>"},
            "added_tokens": specials.iter().enumerate().map(added).collect::<Vec<_>>(),
            "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": template, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        });
        fs::write(dir.path().join(TOKENIZER_FILE), tokenizer.to_string()).unwrap();
        fs::write(dir.path().join(TOKENIZER_CONFIG_FILE), python.to_string()).unwrap();
        Self(dir)
    }

    fn plain() -> Self {
        Self::new(&["A"], json!({"bos_token": null}))
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path: PathBuf = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path.display().to_string()
    }

    /// A text file with the words `w{from}` to `w{to - 1}`.
    fn words(&self, name: &str, from: usize, to: usize) -> String {
        self.write(name, (from..to).map(|i| format!("w{i}\n")).collect::<String>())
    }

    fn load(&self, spec: &CorpusSpec) -> Result<Tokens> {
        load(spec, Some(self.0.path()), 103, Some(64))
    }

    fn refused(&self, spec: &CorpusSpec) -> (FailureKind, String) {
        let error = self.load(spec).unwrap_err();
        assert!(error.hint_text().is_some(), "{error}");
        (error.kind(), error.message().to_owned())
    }
}

fn files(paths: &[&str], sequences: Option<usize>, length: Option<usize>) -> CorpusSpec {
    let source = CorpusSource::Files(paths.iter().map(|p| (*p).to_owned()).collect());
    CorpusSpec { source, num_sequences: sequences, sequence_length: length, ..CorpusSpec::default() }
}

fn token_ids(path: &str) -> CorpusSpec {
    CorpusSpec { source: CorpusSource::TokenIds(path.to_owned()), ..CorpusSpec::default() }
}

#[test]
fn windows_are_fresh_text_without_overlap() {
    let model = Model::plain();
    let text = model.words("t.txt", 0, 20);
    let tokens = model.load(&files(&[&text], Some(3), Some(6))).unwrap();
    assert_eq!((tokens.sequences, tokens.tokens), (3, 6));
    assert_eq!(tokens.ids, (3..21).collect::<Vec<i64>>());
    assert_eq!(tokens.sequence(2), [15, 16, 17, 18, 19, 20]);
    assert_eq!(tokens.provenance.tokens_available, 20);
    assert_eq!(tokens.provenance.sha256, format!("{:x}", Sha256::digest(fs::read(&text).unwrap())));
    let bytes: Vec<u8> = (3_i64..21).flat_map(i64::to_le_bytes).collect();
    assert_eq!(tokens.provenance.token_ids_sha256, format!("{:x}", Sha256::digest(bytes)));
    let tokenizer = tokens.tokenizer.unwrap();
    assert_eq!((tokenizer.vocab, tokenizer.bos_token_id), (103, None));
}

#[test]
fn every_window_starts_with_the_familys_own_prefix() {
    let python_adds = json!({"add_bos_token": true, "bos_token": {"content": "</s>"}});
    for (template, python, policy, prefix) in [
        (&["<s>", "A", "</s>"][..], json!({}), BosPolicy::Auto, &[0][..]),
        (&["<s>", "</s>", "A"], json!({}), BosPolicy::Auto, &[0, 1]),
        (&["A", "</s>"], json!({"bos_token": "<s>"}), BosPolicy::Auto, &[]),
        (&["A"], json!({"add_bos_token": false, "bos_token": "<s>"}), BosPolicy::Auto, &[]),
        (&["A"], python_adds.clone(), BosPolicy::Auto, &[1]),
        (&["<s>", "A"], python_adds.clone(), BosPolicy::Auto, &[0]),
        (&["<s>", "A"], python_adds, BosPolicy::Never, &[]),
        (&["A"], json!({"bos_token": "<s>"}), BosPolicy::Always, &[0]),
        (&["<s>", "A"], json!({}), BosPolicy::Always, &[0]),
    ] {
        let model = Model::new(template, python.clone());
        let text = model.words("t.txt", 0, 20);
        let spec = CorpusSpec { bos: policy, ..files(&[&text], Some(3), Some(6)) };
        let tokens = model.load(&spec).unwrap();
        let mut fresh = 3_i64..;
        for window in 0..3 {
            let mut expected: Vec<i64> = prefix.to_vec();
            expected.extend(fresh.by_ref().take(6 - prefix.len()));
            assert_eq!(tokens.sequence(window), expected, "{template:?} {python} {policy:?}");
        }
        assert_eq!(tokens.tokenizer.unwrap().bos_token_id, prefix.first().map(|id| *id as u32));
    }
}

#[test]
fn a_bos_that_is_not_there_is_an_error() {
    let model = Model::plain();
    let text = model.words("t.txt", 0, 20);
    let spec = CorpusSpec { bos: BosPolicy::Always, ..files(&[&text], None, Some(6)) };
    assert_eq!(model.refused(&spec).0, FailureKind::Corpus);
    let model = Model::new(&["A"], json!({"add_bos_token": true, "bos_token": "<start>"}));
    let (kind, message) = model.refused(&files(&[&model.words("t.txt", 0, 20)], None, Some(6)));
    assert_eq!(kind, FailureKind::Checkpoint);
    assert!(message.contains("\"<start>\""), "{message}");
}

#[test]
fn documents_are_packed_or_kept_apart() {
    let model = Model::plain();
    let (a, b) = (model.words("a.txt", 0, 5), model.words("b.txt", 10, 17));
    let packed = model.load(&files(&[&a, &b], None, Some(4))).unwrap();
    assert_eq!(packed.ids, [3, 4, 5, 6, 7, 13, 14, 15, 16, 17, 18, 19]);
    assert_eq!(packed.provenance.source, format!("{a}, {b}"));
    let apart = CorpusSpec { packing: Packing::Separate, ..files(&[&a, &b], None, Some(4)) };
    assert_eq!(model.load(&apart).unwrap().ids, [3, 4, 5, 6, 13, 14, 15, 16]);
}

#[test]
fn defaults_take_what_there_is_and_requests_do_not() {
    let model = Model::plain();
    let text = model.write("t.txt", "w1 ".repeat(200));
    let tokens = model.load(&files(&[&text], None, None)).unwrap();
    // 64 positions are the model's limit; 200 tokens fill three windows of it.
    assert_eq!((tokens.sequences, tokens.tokens), (3, 64));
    let many = model.write("many.txt", "w1 ".repeat(2000));
    assert_eq!(model.load(&files(&[&many], None, None)).unwrap().sequences, 16);
    let (kind, message) = model.refused(&files(&[&text], Some(4), None));
    assert_eq!(kind, FailureKind::Corpus);
    assert!(message.contains("3 sequences of 64 tokens, 4 were asked for"), "{message}");
}

#[test]
fn texts_that_cannot_be_used_say_why() {
    let model = Model::plain();
    let (empty, blank) = (model.write("empty.txt", ""), model.write("blank.txt", " \n\t\n"));
    let short = model.words("short.txt", 0, 5);
    let latin1 = model.write("latin1.txt", b"w1 w2 caf\xe9 w3");
    let foreign = model.write("foreign.txt", "w1 w2 w99 w3");
    let missing = model.0.path().join("missing.txt").display().to_string();
    let folder = model.0.path().display().to_string();
    for (path, length, kind, says) in [
        (&empty, 4, FailureKind::Corpus, "is empty"),
        (&blank, 4, FailureKind::Corpus, "is empty"),
        (&short, 6, FailureKind::Corpus, "it has 5 tokens in all, one sequence needs 6"),
        (&short, 65, FailureKind::Job, "exceed the model's limit of 64"),
        (&short, 1, FailureKind::Job, "nothing to predict"),
        (&latin1, 4, FailureKind::Corpus, "not UTF-8: the bytes from 9 on"),
        (&missing, 4, FailureKind::Corpus, "there is no corpus file"),
        (&folder, 4, FailureKind::Corpus, "is not a file"),
    ] {
        let (got, message) = model.refused(&files(&[path], None, Some(length)));
        assert_eq!(got, kind, "{message}");
        assert!(message.contains(says), "{message}");
    }
    let error = load(&files(&[&foreign], None, Some(4)), Some(model.0.path()), 102, None).unwrap_err();
    assert!(error.message().contains("token id 102 (sequence 0, position 2)"), "{error}");
    assert_eq!(model.refused(&files(&[&short], Some(0), Some(4))).0, FailureKind::Job);
    let spec = CorpusSpec { source: CorpusSource::Builtin("bible".to_owned()), ..CorpusSpec::default() };
    assert_eq!(model.refused(&spec).0, FailureKind::Job);
}

#[test]
fn without_a_tokenizer_only_ready_ids_will_do() {
    let dir = tempfile::tempdir().unwrap();
    let error = load(&CorpusSpec::default(), Some(dir.path()), 100, None).unwrap_err();
    assert_eq!(error.kind(), FailureKind::Corpus);
    assert!(error.hint_text().unwrap().contains("--token-ids"));
    fs::write(dir.path().join(TOKENIZER_FILE), "{\"version\":\"1.0\"}").unwrap();
    assert_eq!(load(&CorpusSpec::default(), Some(dir.path()), 100, None).unwrap_err().kind(), FailureKind::Checkpoint);
    let ids = dir.path().join("ids.json");
    fs::write(&ids, "[[1,2,3],[4,5,6]]").unwrap();
    let tokens = load(&token_ids(&ids.display().to_string()), None, 100, None).unwrap();
    assert_eq!((tokens.sequences, tokens.tokens, &tokens.ids[..]), (2, 3, &[1, 2, 3, 4, 5, 6][..]));
    assert_eq!(tokens.tokenizer, None);
}

/// A safetensors file with one tensor.
fn tensor_file(dir: &Path, name: &str, dtype: StoredDtype, shape: &[u64], values: &[i64]) -> String {
    let path = dir.join("ids.safetensors");
    let writer = Writer::create(&path, &[TensorSpec::new(name, dtype.clone(), shape)], &BTreeMap::new()).unwrap();
    let size = dtype.size().unwrap() as usize;
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()[..size].to_vec()).collect();
    writer.write(name, 0, &bytes).unwrap();
    writer.finish().unwrap();
    path.display().to_string()
}

#[test]
fn ready_ids_come_as_safetensors_too() {
    let model = Model::plain();
    let dir = model.0.path();
    let path = tensor_file(dir, "input_ids", StoredDtype::I64, &[3, 2], &[1, 2, 3, 4, 5, 102]);
    let tokens = model.load(&token_ids(&path)).unwrap();
    assert_eq!((tokens.sequences, tokens.tokens, tokens.ids.len()), (3, 2, 6));
    let two = CorpusSpec { num_sequences: Some(2), sequence_length: Some(2), ..token_ids(&path) };
    let tokens = model.load(&two).unwrap();
    assert_eq!((&tokens.ids[..], tokens.provenance.tokens_available), (&[1, 2, 3, 4][..], 6));
    let many = CorpusSpec { num_sequences: Some(9), ..token_ids(&path) };
    assert_eq!(model.load(&many).unwrap().sequences, 3);
    let other = CorpusSpec { sequence_length: Some(3), ..token_ids(&path) };
    assert_eq!(model.refused(&other).0, FailureKind::Job);

    let wrong = tensor_file(dir, "input_ids", StoredDtype::I32, &[1, 2], &[1, 2]);
    assert!(model.refused(&token_ids(&wrong)).1.contains("stored as I32"));
    let wrong = tensor_file(dir, "tokens", StoredDtype::I64, &[1, 2], &[1, 2]);
    assert!(model.refused(&token_ids(&wrong)).1.contains("no tensor `input_ids`"));
    let wrong = tensor_file(dir, "input_ids", StoredDtype::I64, &[2], &[1, 2]);
    assert!(model.refused(&token_ids(&wrong)).1.contains("shape [2]"));
    let wrong = tensor_file(dir, "input_ids", StoredDtype::I64, &[0, 2], &[]);
    assert!(model.refused(&token_ids(&wrong)).1.contains("no token ids"));
}

#[test]
fn ready_ids_are_checked() {
    let model = Model::plain();
    let long = format!("[{:?}]", vec![1; 65]);
    for (json, kind, says) in [
        ("[[1,2],[3]]", FailureKind::Corpus, "row 1 has 1 token ids"),
        ("[[1,2],[3,103]]", FailureKind::Corpus, "token id 103 (sequence 1, position 1)"),
        ("[[1,2],[-1,3]]", FailureKind::Corpus, "token id -1"),
        ("[[1,2.5]]", FailureKind::Corpus, "list of lists"),
        ("[]", FailureKind::Corpus, "no token ids"),
        ("[[],[]]", FailureKind::Corpus, "no token ids"),
        ("  ", FailureKind::Corpus, "no token ids"),
        ("[[1]]", FailureKind::Job, "nothing to predict"),
        ("{\"a\":1}", FailureKind::Corpus, "neither safetensors nor"),
        ("[[1,2],{\"a\":1}]", FailureKind::Corpus, "list of lists"),
        (long.as_str(), FailureKind::Job, "limit of 64"),
    ] {
        let path = model.write("ids.json", json);
        let (got, message) = model.refused(&token_ids(&path));
        assert_eq!(got, kind, "{message}");
        assert!(message.contains(says) && message.contains("ids.json"), "{message}");
    }
}

#[test]
fn the_shipped_text_is_the_one_that_results_refer_to() {
    let hash = format!("{:x}", Sha256::digest(SHAKESPEARE));
    assert_eq!(hash, "178a4e9397563009e36554fe7b304afdcf8b93d5ef00a6284262db82c1a5d3c2");
}
