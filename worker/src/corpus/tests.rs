use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ::parquet::basic::{Compression, GzipLevel, ZstdLevel};
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;

use outliers_protocol::{BosPolicy, FailureKind};
use serde_json::{Value, json};

use super::*;
use crate::checkpoint::hub::HubOptions;
use crate::checkpoint::safetensors::{StoredDtype, TensorSpec, Writer};
use crate::checkpoint::source::{TOKENIZER_CONFIG_FILE, TOKENIZER_FILE};

mod formats;

/// A hub that receives no requests.
fn nowhere() -> Hub {
    Hub::new(HubOptions::new("/nowhere")).unwrap()
}

/// A folder with a tokenizer of whole words `w0` to `w99` (ids 3 to 102), `<s>` 0, `</s>` 1,
/// `<unk>` 2.
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
            // Both must be ignored: they would truncate and pad the text.
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
        load(spec, Some(self.0.path()), 103, Some(MaxSequenceLength::Positions(64)), &nowhere())
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
fn windows_do_not_overlap() {
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
fn every_window_starts_with_the_prefix_of_its_family() {
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
fn missing_bos_is_an_error() {
    let model = Model::plain();
    let text = model.words("t.txt", 0, 20);
    let spec = CorpusSpec { bos: BosPolicy::Always, ..files(&[&text], None, Some(6)) };
    assert_eq!(model.refused(&spec).0, FailureKind::Corpus);
    let model = Model::new(&["A"], json!({"add_bos_token": true, "bos_token": "<start>"}));
    let (kind, message) = model.refused(&files(&[&model.words("t.txt", 0, 20)], None, Some(6)));
    // The settings add the token, after all that have embeddings.
    assert_eq!(kind, FailureKind::Corpus);
    assert!(message.contains("103 \"<start>\" (sequence 0, position 0)"), "{message}");
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
fn default_sequence_count_shrinks_and_a_requested_one_does_not() {
    let model = Model::plain();
    let text = model.write("t.txt", "w1 ".repeat(200));
    let tokens = model.load(&files(&[&text], None, None)).unwrap();
    // The model is limited to 64 positions; 200 tokens fill three windows.
    assert_eq!((tokens.sequences, tokens.tokens), (3, 64));
    let many = model.write("many.txt", "w1 ".repeat(2000));
    assert_eq!(model.load(&files(&[&many], None, None)).unwrap().sequences, 16);
    let (kind, message) = model.refused(&files(&[&text], Some(4), None));
    assert_eq!(kind, FailureKind::Corpus);
    assert!(message.contains("3 sequences of 64 tokens, 4 were asked for"), "{message}");
}

#[test]
fn unusable_texts_are_refused_with_a_reason() {
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
        (&folder, 4, FailureKind::Corpus, "is not a regular file"),
    ] {
        let (got, message) = model.refused(&files(&[path], None, Some(length)));
        assert_eq!(got, kind, "{message}");
        assert!(message.contains(says), "{message}");
    }
    let error = load(&files(&[&foreign], None, Some(4)), Some(model.0.path()), 102, None, &nowhere()).unwrap_err();
    assert!(error.message().contains("token id 102 \"w99\" (sequence 0, position 2)"), "{error}");
    assert_eq!(model.refused(&files(&[&short], Some(0), Some(4))).0, FailureKind::Job);
    let spec = CorpusSpec { source: CorpusSource::Builtin("bible".to_owned()), ..CorpusSpec::default() };
    assert_eq!(model.refused(&spec).0, FailureKind::Job);
}

#[test]
fn without_a_tokenizer_only_token_ids_are_accepted() {
    let dir = tempfile::tempdir().unwrap();
    let error = load(&CorpusSpec::default(), Some(dir.path()), 100, None, &nowhere()).unwrap_err();
    assert_eq!(error.kind(), FailureKind::Corpus);
    assert!(error.hint_text().unwrap().contains("--token-ids"));
    fs::write(dir.path().join(TOKENIZER_FILE), "{\"version\":\"1.0\"}").unwrap();
    assert_eq!(
        load(&CorpusSpec::default(), Some(dir.path()), 100, None, &nowhere()).unwrap_err().kind(),
        FailureKind::Checkpoint
    );
    let ids = dir.path().join("ids.json");
    fs::write(&ids, "[[1,2,3],[4,5,6]]").unwrap();
    let tokens = load(&token_ids(&ids.display().to_string()), None, 100, None, &nowhere()).unwrap();
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
fn token_ids_are_read_from_safetensors() {
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
fn token_ids_are_checked_against_the_vocabulary() {
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
fn shipped_text_has_its_recorded_hash() {
    let hash = format!("{:x}", Sha256::digest(SHAKESPEARE));
    assert_eq!(hash, "178a4e9397563009e36554fe7b304afdcf8b93d5ef00a6284262db82c1a5d3c2");
}

/// Documents of four words each, from `w{from}` on. The last word of one differs from the first of
/// the next.
fn documents(from: usize, to: usize) -> Vec<String> {
    (from..to).map(|i| (0..4).map(|j| format!("w{} ", (4 * i + j) % 100)).collect()).collect()
}

impl Model {
    fn lines(&self, name: &str, documents: &[String]) -> String {
        self.write(
            name,
            documents.iter().map(|text| json!({"id": 1, "text": text}).to_string() + "\n").collect::<String>(),
        )
    }

    /// A Parquet file with `rows` rows per row group, compressed by `codec`.
    fn parquet(&self, name: &str, documents: &[String], rows: usize, codec: Compression) -> String {
        use ::parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
        let schema = "message m { required int64 id; optional binary text (UTF8); }";
        let schema = Arc::new(::parquet::schema::parser::parse_message_type(schema).unwrap());
        let properties = WriterProperties::builder().set_compression(codec).build();
        let path = self.0.path().join(name);
        let mut file =
            SerializedFileWriter::new(fs::File::create(&path).unwrap(), schema, Arc::new(properties)).unwrap();
        for block in documents.chunks(rows) {
            let mut group = file.next_row_group().unwrap();
            let mut ids = group.next_column().unwrap().unwrap();
            let numbers: Vec<i64> = (0..block.len() as i64).collect();
            ids.typed::<Int64Type>().write_batch(&numbers, None, None).unwrap();
            ids.close().unwrap();
            let mut texts = group.next_column().unwrap().unwrap();
            // An empty text stands for a missing one.
            let levels: Vec<i16> = block.iter().map(|text| i16::from(!text.is_empty())).collect();
            let values: Vec<ByteArray> =
                block.iter().filter(|text| !text.is_empty()).map(|text| text.as_str().into()).collect();
            texts.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            texts.close().unwrap();
            group.close().unwrap();
        }
        file.close().unwrap();
        path.display().to_string()
    }
}

#[test]
fn windows_do_not_depend_on_the_file_format() {
    let model = Model::plain();
    let all = documents(0, 40);
    let texts: Vec<String> = all.iter().enumerate().map(|(i, text)| model.write(&format!("{i}.txt"), text)).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let mut with_gaps = all.clone();
    with_gaps.insert(7, String::new());
    let codecs = [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(ZstdLevel::default())];
    let mut stored = vec![model.lines("all.jsonl", &all), model.lines("all.none.jsonl", &with_gaps)];
    for (i, codec) in codecs.into_iter().chain([Compression::GZIP(GzipLevel::default())]).enumerate() {
        stored.push(model.parquet(&format!("{i}.parquet"), &with_gaps, 3, codec));
    }
    for packing in [Packing::Packed, Packing::Separate, Packing::Overlapping] {
        let length = if packing == Packing::Separate { 3 } else { 7 };
        let spec = CorpusSpec { packing, ..files(&texts, Some(9), Some(length)) };
        let expected = model.load(&spec).unwrap();
        assert_eq!(expected.sequences, 9);
        for file in &stored {
            let tokens = model.load(&CorpusSpec { packing, ..files(&[file], Some(9), Some(length)) }).unwrap();
            // An empty line of text is a document: joined, it adds a space.
            assert_eq!(tokens.ids, expected.ids, "{file} {packing:?}");
            assert!(tokens.provenance.source.contains("field \"text\""), "{}", tokens.provenance.source);
        }
    }
}

#[test]
fn overlapping_windows_start_half_a_window_apart() {
    let model = Model::plain();
    let text = model.words("t.txt", 0, 20);
    let spec = CorpusSpec { packing: Packing::Overlapping, ..files(&[&text], Some(3), Some(6)) };
    let tokens = model.load(&spec).unwrap();
    assert_eq!(tokens.ids, [3, 4, 5, 6, 7, 8, 6, 7, 8, 9, 10, 11, 9, 10, 11, 12, 13, 14]);
    assert_eq!(tokens.provenance.tokens_available, 20);
    let (_, message) = model.refused(&CorpusSpec { num_sequences: Some(6), ..spec });
    // Six would need 21, not six times six.
    let says = "the corpus gives 5 sequences of 6 tokens, 6 were asked for (it has 20 tokens)";
    assert!(message.contains(says), "{message}");
}

#[test]
fn documents_are_skipped_and_shuffled_by_number() {
    let model = Model::plain();
    let all = documents(0, 24);
    let first_words = |spec: CorpusSpec| -> Vec<i64> {
        let spec = CorpusSpec { packing: Packing::Separate, num_sequences: Some(20), ..spec };
        model.load(&spec).unwrap().ids.chunks(4).map(|window| (window[0] - 3) / 4).collect()
    };
    for file in [model.lines("a.jsonl", &all), model.parquet("a.parquet", &all, 5, Compression::SNAPPY)] {
        let spec = files(&[&file], None, Some(4));
        assert_eq!(first_words(spec.clone()), (0..20).collect::<Vec<i64>>());
        assert_eq!(first_words(CorpusSpec { skip_documents: 4, ..spec.clone() }), (4..24).collect::<Vec<i64>>());
        let (kind, message) = model.refused(&CorpusSpec { skip_documents: 24, ..spec.clone() });
        assert_eq!((kind, message.contains("after 24 skipped documents")), (FailureKind::Corpus, true), "{message}");
        let shuffled = |seed| first_words(CorpusSpec { shuffle_seed: Some(seed), ..spec.clone() });
        assert_eq!(shuffled(7), shuffled(7));
        assert_ne!(shuffled(7), shuffled(8));
        let distinct: std::collections::BTreeSet<i64> = shuffled(7).into_iter().collect();
        assert_eq!(distinct.len(), 20, "each once");
        assert!(!shuffled(7).is_sorted());
    }
    let ids = model.write("ids.json", "[[1,2]]");
    assert_eq!(model.refused(&CorpusSpec { skip_documents: 1, ..token_ids(&ids) }).0, FailureKind::Job);
}

#[test]
fn lines_across_block_boundaries_are_read_once() {
    let model = Model::plain();
    // About 12 MB: three blocks of lines with very different lengths.
    let long = |i: usize| format!("w{} ", i % 100) + &" ".repeat(if i.is_multiple_of(7) { 300_000 } else { i % 50 });
    let all: Vec<String> = (0..280).map(long).collect();
    let file = model.lines("a.jsonl", &all);
    assert!(fs::metadata(&file).unwrap().len() > 10 << 20);
    let tokens = model.load(&CorpusSpec { num_sequences: Some(140), ..files(&[&file], None, Some(2)) }).unwrap();
    let expected: Vec<i64> = (0..280).map(|i| 3 + i % 100).collect();
    assert_eq!(tokens.ids, expected);
}

#[test]
fn only_the_needed_text_is_read() {
    struct Counting(LocalFile, Arc<AtomicU64>);
    impl RangedFile for Counting {
        fn name(&self) -> &str {
            self.0.name()
        }
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn read(&self, range: std::ops::Range<u64>) -> Result<Vec<u8>> {
            self.1.fetch_add(range.end - range.start, Ordering::Relaxed);
            self.0.read(range)
        }
    }
    let model = Model::plain();
    let texts: Vec<String> = (0..200).map(|i| format!("w{} ", i % 100).repeat(20_000)).collect();
    let file = model.parquet("a.parquet", &texts, 2, Compression::UNCOMPRESSED);
    let read = Arc::new(AtomicU64::new(0));
    let counting = Box::new(Counting(LocalFile::open(&file).unwrap(), Arc::clone(&read)));
    let spec = files(&[&file], Some(5), Some(50));
    let text = Text { source: "a".into(), documents: Documents::new(vec![counting], &spec), lasts: true };
    from_text(&spec, text, Some(model.0.path()), TokenLimits { vocab: 103, longest: None }).unwrap();
    let (read, size) = (read.load(Ordering::Relaxed), fs::metadata(&file).unwrap().len());
    assert!(read * 10 < size, "{read} of {size} bytes");
}

#[test]
fn unreadable_documents_are_named() {
    let model = Model::plain();
    let good = documents(0, 8);
    let parquet = fs::read(model.parquet("good.parquet", &good, 4, Compression::SNAPPY)).unwrap();
    let mut footer = parquet.clone();
    let at = footer.len() - 20;
    footer[at..at + 8].fill(0xff);
    let mut length = parquet.clone();
    let at = length.len() - 8;
    length[at..at + 4].fill(0xff);
    let tail: [u8; 4] = parquet[parquet.len() - 8..][..4].try_into().unwrap();
    let mut pages = parquet.clone();
    let end = pages.len() - 8 - u32::from_le_bytes(tail) as usize;
    pages[4..end].fill(0xee);
    for (file, says) in [
        (model.write("a.jsonl", "{\"text\": \"w1\"}\nnot json\n"), "a.jsonl is not JSON"),
        (model.write("b.jsonl", "{\"body\": \"w1\"}\n"), "has no field \"text\""),
        (model.write("c.jsonl", "{\"text\": 7}\n"), "has no text in its field"),
        (model.write("d.jsonl", "[1]\n"), "is an array, not an object"),
        (model.write("e.parquet", b"PAR1"), "too short"),
        (model.write("f.parquet", b"not parquet at all"), "PAR1"),
        (model.write("g.parquet", footer), "cannot be read"),
        (model.write("h.parquet", length), "impossible length"),
        (model.write("i.parquet", pages), "i.parquet"),
    ] {
        let (kind, message) = model.refused(&files(&[&file], Some(2), Some(4)));
        assert_eq!(kind, FailureKind::Corpus, "{message}");
        assert!(message.contains(says), "{message}");
    }
    let other = CorpusSpec { text_field: "body".into(), ..files(&[&model.lines("j.jsonl", &good)], None, Some(4)) };
    assert!(model.refused(&other).1.contains("no field \"body\""));
    let file = model.0.path().join("good.parquet").display().to_string();
    let other = CorpusSpec { text_field: "id".into(), ..files(&[&file], None, Some(4)) };
    assert!(model.refused(&other).1.contains("holds no texts"));
    let other = CorpusSpec { text_field: "body".into(), ..files(&[&file], None, Some(4)) };
    assert!(model.refused(&other).1.contains("no column \"body\": it has \"id\", \"text\""));
}
