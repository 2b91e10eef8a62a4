use std::fs;
use std::path::PathBuf;

use outliers_protocol::FailureKind;
use serde_json::{Value, json};

use super::*;
use crate::checkpoint::source::{CONFIG_FILE, SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE};
use crate::corpus::SHAKESPEARE;

/// Path of tokenizers in two formats, see `README.md` there.
fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/corpus/testdata").join(name)
}

/// A folder with some of the fixture's files.
struct Folder(tempfile::TempDir);

impl Folder {
    fn of(family: &str, names: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in names.iter().chain([&TOKENIZER_CONFIG_FILE]) {
            fs::copy(testdata(family).join(name), dir.path().join(name)).unwrap();
        }
        Self(dir)
    }

    fn opt() -> Self {
        Self::of("opt", TokenizerFiles::VocabAndMerges.names())
    }

    fn kimi() -> Self {
        Self::of("kimi", TokenizerFiles::Tiktoken.names())
    }

    fn open(&self, bos: BosPolicy) -> Result<TextTokenizer> {
        TextTokenizer::open(Some(self.0.path()), bos)
    }

    fn refused(&self) -> WorkerError {
        let error = self.open(BosPolicy::Auto).map(|_| ()).unwrap_err();
        assert!(error.hint_text().is_some(), "{error}");
        error
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.0.path().join(name), content).unwrap();
    }

    /// Changes tokenizer.json.
    fn change(&self, key: &str, value: Value) {
        let path = self.0.path().join(TOKENIZER_FILE);
        let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        tokenizer[key] = value;
        fs::write(path, tokenizer.to_string()).unwrap();
    }

    /// Changes the settings.
    fn set(&self, key: &str, value: Value) {
        let path = self.0.path().join(TOKENIZER_CONFIG_FILE);
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        fs::write(path, config.to_string()).unwrap();
    }
}

fn ids(tokenizer: &TextTokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(&Document { name: "text".to_owned(), text: text.to_owned().into() }).unwrap()
}

/// Text on which tokenizers differ: all kinds of spaces, endings, digits, adjacent scripts, marks,
/// special tokens.
const AWKWARD: [&str; 14] = [
    "",
    " ",
    "a  b   c \t\n\n  d \r\n\r\n e   ",
    "\u{a0}\u{3000}x\u{2028}y",
    "I'll we've DON'T don't can'T 's'd",
    "1234567 3.14159 1,000,000 ٣٤٥ ½ Ⅻ",
    "中文English混合 北京市Pascal 々〇⺀ かなカナ漢字",
    "e\u{301}te\u{301} नमस्ते ไทย עִבְרִית",
    "🙂👩‍👩‍👧‍👦🇫🇷 ∑∫≠ ①②",
    "CamelCaseXMLHttpRequest snake_case kebab-case",
    "((([[[{{{!!!???...,,,;;;---===___",
    "<s></s><pad>[BOS]text[EOS]<|im_end|> </s> <|reserved_token_1025|>",
    "\u{0}\u{1}\u{7f}\u{fffd}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa                                      b",
];

/// Asserts that both formats of a tokenizer give the same ids.
fn assert_same(old: &TextTokenizer, new: &TextTokenizer) {
    let tail = fs::read_to_string(testdata("tail.txt")).unwrap();
    for text in [SHAKESPEARE, &tail].into_iter().chain(AWKWARD) {
        let (ours, reference) = (ids(old, text), ids(new, text));
        let differs = ours.iter().zip(&reference).position(|(a, b)| a != b);
        let shown: String = text.chars().take(60).collect();
        assert!(ours == reference, "{shown:?}: {} and {} ids, from {differs:?} on", ours.len(), reference.len());
    }
}

#[test]
fn tokens_that_only_the_settings_add_are_those_of_transformers() {
    let golden: Value = serde_json::from_slice(&fs::read(testdata("added_tokens.json")).unwrap()).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 8);
    for case in cases {
        let folder = Folder::of("opt", &[TOKENIZER_FILE]);
        for (name, content) in case["files"].as_object().unwrap() {
            folder.write(name, content.to_string());
        }
        let ids = ids(&folder.open(BosPolicy::Never).unwrap(), golden["text"].as_str().unwrap());
        assert_eq!(json!(ids), case["ids"], "{}", case["files"]);
    }
}

#[test]
fn trap_1_opt_vocab_and_merges_equal_its_tokenizer_json() {
    let old = Folder::opt().open(BosPolicy::Auto).unwrap();
    let new = Folder::of("opt", &[TOKENIZER_FILE]).open(BosPolicy::Auto).unwrap();
    assert_same(&old, &new);
    assert_eq!((&old.prefix[..], &new.prefix[..]), (&[2][..], &[2][..]));
    assert_eq!(old.provenance.file, "vocab.json + merges.txt");
    let both = ["vocab.json", "merges.txt"].map(|name| fs::read(testdata("opt").join(name)).unwrap()).concat();
    assert_eq!(old.provenance.sha256, format!("{:x}", Sha256::digest(both)));
    assert_eq!((old.provenance.vocab, old.provenance.bos_token_id), (1024, Some(2)));
}

#[test]
fn kimi_ranks_equal_the_converted_tokenizer_json() {
    let old = Folder::kimi().open(BosPolicy::Auto).unwrap();
    let new = Folder::of("kimi", &[TOKENIZER_FILE]).open(BosPolicy::Auto).unwrap();
    assert_same_but_reserved(&old, &new);
    assert_eq!((&old.prefix[..], &new.prefix[..]), (&[][..], &[][..]));
    assert_eq!(old.provenance.file, "tiktoken.model");
    // 1,020 ranks and 256 special tokens, of which the small tokenizer.json lists four.
    assert_eq!((old.provenance.vocab, new.provenance.vocab), (1276, 1024));
    assert_eq!(Folder::kimi().open(BosPolicy::Always).unwrap().prefix, [1020]);
}

/// The fixture's tokenizer.json does not list the unnamed special tokens.
fn assert_same_but_reserved(old: &TextTokenizer, new: &TextTokenizer) {
    assert_eq!(ids(old, "<|reserved_token_1025|>"), [1025]);
    let Encoder::Ranks(ranks) = &old.encoder else { panic!("not ranks") };
    let Encoder::Library(library) = &new.encoder else { panic!("not a tokenizer.json") };
    let mut library = library.clone();
    let reserved = (1024..1276).map(|id| {
        assert_eq!(ranks.special(&format!("<|reserved_token_{id}|>")), Some(id));
        tokenizers::AddedToken::from(format!("<|reserved_token_{id}|>"), true)
    });
    library.tokenizer.add_special_tokens(reserved).unwrap();
    let new = TextTokenizer {
        encoder: Encoder::Library(library),
        prefix: new.prefix.clone(),
        provenance: new.provenance.clone(),
    };
    assert_same(old, &new);
}

#[test]
fn opt_bos_is_found_in_any_of_three_files() {
    let folder = Folder::opt();
    folder.set("bos_token", Value::Null);
    assert_eq!(folder.refused().kind(), FailureKind::Corpus);
    folder.write(CONFIG_FILE, r#"{"bos_token_id": 2}"#);
    assert_eq!(folder.open(BosPolicy::Auto).unwrap().prefix, [2]);
    folder.write(SPECIAL_TOKENS_FILE, r#"{"bos_token": {"content": "<s>"}}"#);
    assert_eq!(folder.open(BosPolicy::Auto).unwrap().prefix, [0]);
    folder.set("bos_token", json!({"content": "</s>", "__type": "AddedToken"}));
    assert_eq!(folder.open(BosPolicy::Auto).unwrap().prefix, [2]);
    folder.set("add_bos_token", json!(false));
    assert_eq!(folder.open(BosPolicy::Auto).unwrap().prefix, [0_u32; 0]);
}

#[test]
fn added_tokens_have_ids_from_the_tokenizer_config() {
    let folder = Folder::opt();
    folder.write("added_tokens.json", r#"{"<image>": 1030, "<s>": 7}"#);
    folder.write(SPECIAL_TOKENS_FILE, r#"{"additional_special_tokens": ["<image>"]}"#);
    let tokenizer = folder.open(BosPolicy::Never).unwrap();
    assert_eq!(ids(&tokenizer, "<image><s>"), [1030, 0], "the vocabulary itself comes first");
    assert_eq!(tokenizer.provenance.vocab, 1025);
}

#[test]
fn tokenizer_json_is_preferred_and_incomplete_pairs_are_ignored() {
    let folder = Folder::of("opt", &["vocab.json", "merges.txt", TOKENIZER_FILE]);
    assert_eq!(folder.open(BosPolicy::Auto).unwrap().provenance.file, TOKENIZER_FILE);
    let folder = Folder::of("opt", &["vocab.json"]);
    assert_eq!(folder.refused().kind(), FailureKind::Corpus);
}

#[test]
fn legacy_files_of_unknown_classes_are_refused_by_name() {
    for folder in [Folder::opt(), Folder::kimi()] {
        folder.set("tokenizer_class", json!("Qwen2Tokenizer"));
        let error = folder.refused();
        assert_eq!(error.kind(), FailureKind::Unsupported);
        assert!(error.message().contains("\"Qwen2Tokenizer\""), "{error}");
    }
}

#[test]
fn damaged_tokenizers_are_named() {
    let merge = "Ġ t";
    for (name, content, says) in [
        ("vocab.json", "[]", "vocab.json"),
        ("vocab.json", r#"{"a": -1}"#, "vocab.json"),
        ("vocab.json", r#"{"a": 1}"#, "vocab.json + merges.txt cannot be read"),
        ("merges.txt", "#version: 0.2\nĠ t\nĠt", "line 3 is no pair"),
        ("merges.txt", &format!("{merge} h"), "line 1 is no pair"),
        ("merges.txt", "zz zz", "vocab.json + merges.txt cannot be read"),
        (TOKENIZER_CONFIG_FILE, "[]", "tokenizer_config.json is not a JSON object"),
        (SPECIAL_TOKENS_FILE, "{", SPECIAL_TOKENS_FILE),
    ] {
        let folder = Folder::opt();
        folder.write(name, content);
        let error = folder.refused();
        assert_eq!(error.kind(), FailureKind::Checkpoint, "{error}");
        assert!(error.message().contains(says), "{error}");
    }
    let whole = fs::read_to_string(testdata("kimi").join("tiktoken.model")).unwrap();
    let first = whole.lines().next().unwrap();
    for (content, says) in [
        (String::new(), "it is empty"),
        ("\n".to_owned(), "no token for byte 0"),
        (whole.lines().skip(1).collect::<Vec<_>>().join("\n"), "gaps"),
        (format!("{whole}{first}"), "appears twice"),
        (format!("{whole}YWFhYWFh 7"), "gaps"),
        (format!("{whole}!!! 1020"), "line 1021 is not a token"),
        (format!("{whole}YWFh"), "line 1021 is not a token"),
        (format!("{whole}YWFh -1"), "line 1021 is not a token"),
    ] {
        let folder = Folder::kimi();
        folder.write("tiktoken.model", content);
        let error = folder.refused();
        assert!(error.message().contains("tiktoken.model") && error.message().contains(says), "{error}");
    }
}

/// A sequence of `count` copies of a step.
fn steps(key: &str, step: &Value, count: usize) -> Value {
    json!({"type": "Sequence", key: vec![step.clone(); count]})
}

fn replace(pattern: &Value, content: &str) -> Value {
    json!({"type": "Replace", "pattern": pattern, "content": content})
}

fn template(single: &Value, ids: usize) -> Value {
    json!({"type": "TemplateProcessing", "single": single, "pair": [],
        "special_tokens": {"x": {"id": "x", "ids": vec![0; ids], "tokens": vec!["x"; ids]}}})
}

#[test]
fn tokenizers_with_unbounded_text_growth_are_refused_by_name() {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
    let doubled = replace(&json!({"String": "e"}), "ee");
    let untyped = json!({"normalizers": vec![json!({"pattern": {"Regex": "e"}, "content": "ee"}); 40]});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let special = json!({"SpecialToken": {"id": "x", "type_id": 0}});
    for (key, value, says) in [
        // The last step doubles each byte once more, which counts for the tokenizer.
        ("normalizer", steps("normalizers", &json!({"type": "ByteLevel"}), 20), "2097152 bytes of each byte"),
        ("pre_tokenizer", steps("pretokenizers", &byte_level, 20), "1048576 bytes of each byte"),
        ("normalizer", steps("normalizers", &doubled, 40), "2199023255552 bytes of each byte"),
        ("normalizer", steps("normalizers", &steps("normalizers", &doubled, 20), 2), "2199023255552 bytes"),
        ("normalizer", untyped, "bytes of each byte"),
        ("normalizer", replace(&json!({"Regex": "x*"}), &"e".repeat(1000)), "2002 bytes of each byte"),
        ("normalizer", json!({"type": "Prepend", "prepend": "e".repeat(1000)}), "2002 bytes of each byte"),
        ("post_processor", template(&json!([text, text]), 1), "repeats the text"),
        ("post_processor", template(&json!([special, text]), 1001), "1001 special tokens"),
    ] {
        let folder = Folder::of("opt", &[TOKENIZER_FILE]);
        folder.change(key, value);
        let error = folder.refused();
        assert_eq!(error.kind(), FailureKind::Checkpoint, "{error}");
        assert!(error.message().contains(TOKENIZER_FILE) && error.message().contains(says), "{says}: {error}");
    }
}

#[test]
fn empty_patterns_are_refused_naming_the_file() {
    let split = |pattern: Value| json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false});
    for (key, value) in [
        ("normalizer", replace(&json!({"String": ""}), "x")),
        ("normalizer", replace(&json!({"Regex": ""}), "x")),
        ("pre_tokenizer", split(json!({"String": ""}))),
        ("pre_tokenizer", steps("pretokenizers", &split(json!({"Regex": ""})), 1)),
    ] {
        let folder = Folder::of("opt", &[TOKENIZER_FILE]);
        folder.change(key, value);
        let error = folder.refused();
        assert!(error.message().contains(TOKENIZER_FILE) && error.message().contains("empty pattern"), "{error}");
    }
}

#[test]
fn tokenizer_library_panic_names_the_file() {
    let folder = Folder::of("opt", &[TOKENIZER_FILE]);
    folder.change("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"}));
    let error = folder.refused();
    assert!(error.message().contains("tokenizer.json cannot be used: the tokenizer library fails"), "{error}");
    // The second text of a pair, of which there is only one.
    let second = json!([{"Sequence": {"id": "B", "type_id": 0}}]);
    let folder = Folder::of("opt", &[TOKENIZER_FILE]);
    folder.change("post_processor", template(&second, 1));
    let error = folder.refused();
    assert!(error.message().contains("index out of bounds"), "{error}");
    let folder = Folder::of("opt", &[TOKENIZER_FILE]);
    folder.change("pre_tokenizer", json!({"type": "FixedLength", "length": 0}));
    let tokenizer = folder.open(BosPolicy::Never).unwrap();
    let error = tokenizer.encode(&Document { name: "book.txt".to_owned(), text: "a".into() }).unwrap_err();
    assert_eq!(error.kind(), FailureKind::Corpus);
    let named = error.message().contains("book.txt") && error.message().contains("tokenizer.json cannot be used");
    assert!(named && error.message().contains("chunk size must be non-zero"), "{error}");
}
