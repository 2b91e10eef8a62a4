//! Text from a dataset on the hub: the same windows as from files, with few range requests, under
//! all faults.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use flate2::write::GzEncoder;
use outliers_protocol::{CorpusSource, CorpusSpec, FailureKind, Metadata, files};
use outliers_tests::context::TestContext;
use outliers_tests::hub::{Fault, MockHub, Repo};
use outliers_worker::checkpoint::hub::{Hub, HubOptions, Timeouts, Token};
use outliers_worker::commands::demo;
use outliers_worker::corpus::{self, Tokens};
use outliers_worker::error::WorkerError;
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use serde_json::{Value, json};

const ID: &str = "owner/texts";
const FOLDER: &str = "sample/10BT";
/// Documents per file, and per block.
const ROWS: usize = 2000;
const BLOCK: usize = 10;

/// A dataset of two files, a model, and the hub with the dataset.
struct Setup {
    dir: tempfile::TempDir,
    hub: MockHub,
}

impl Setup {
    fn with(change: impl FnOnce(Repo) -> Repo) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("texts").join(FOLDER);
        fs::create_dir_all(&folder).unwrap();
        for file in 0..2 {
            write(&folder.join(format!("00{file}_00000.parquet")), &texts(file));
        }
        fs::write(dir.path().join("texts/README.md"), "not text to be counted").unwrap();
        demo::make(&dir.path().join("model"), 0).unwrap();
        let hub = MockHub::start([change(Repo::new(ID, &dir.path().join("texts")).dataset())]).unwrap();
        Self { dir, hub }
    }

    fn new() -> Self {
        Self::with(|repo| repo)
    }

    fn load(&self, source: CorpusSource, token: Option<Token>) -> Result<Tokens, WorkerError> {
        let timeouts = Timeouts {
            response: Duration::from_secs(5),
            silence: Duration::from_secs(1),
            tries: 3,
            pause: Duration::from_millis(10),
            ..Timeouts::default()
        };
        let options = HubOptions { endpoint: self.hub.url(), token, timeouts, ..HubOptions::new("/nowhere") };
        let spec = CorpusSpec { source, num_sequences: Some(4), sequence_length: Some(128), ..CorpusSpec::default() };
        corpus::load(&spec, Some(&self.dir.path().join("model")), 1 << 20, None, &Hub::new(options).unwrap())
    }

    fn dataset(&self, name: &str) -> Result<Tokens, WorkerError> {
        self.load(CorpusSource::Dataset(name.parse().unwrap()), None)
    }

    /// The same texts as plain files.
    fn files(&self) -> CorpusSource {
        let place = |i: usize| -> PathBuf { self.dir.path().join(format!("{i}.txt")) };
        let write = |(i, text): (usize, String)| {
            fs::write(place(i), text).unwrap();
            place(i).to_str().unwrap().to_owned()
        };
        CorpusSource::Files(texts(0).into_iter().take(4 * BLOCK).enumerate().map(write).collect())
    }

    fn bytes(&self) -> u64 {
        let size = |file: usize| {
            let path = self.dir.path().join("texts").join(FOLDER).join(format!("00{file}_00000.parquet"));
            path.metadata().unwrap().len()
        };
        size(0) + size(1)
    }
}

/// Lines of the text that ships with the worker, several to a document.
fn texts(file: usize) -> Vec<String> {
    let lines: Vec<&str> = corpus::SHAKESPEARE.lines().collect();
    (0..ROWS).map(|row| lines[(file * ROWS + row) * 20 % (lines.len() - 60)..][..60].join("\n")).collect()
}

fn write(path: &Path, texts: &[String]) {
    let schema = parquet::schema::parser::parse_message_type("message m { required binary text (UTF8); }").unwrap();
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).set_dictionary_enabled(false);
    let to = fs::File::create(path).unwrap();
    let mut file = SerializedFileWriter::new(to, Arc::new(schema), Arc::new(properties.build())).unwrap();
    for block in texts.chunks(BLOCK) {
        let mut group = file.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> = block.iter().map(|text| text.as_str().into()).collect();
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    file.close().unwrap();
}

#[test]
fn dataset_windows_equal_local_text_with_few_bytes_fetched() {
    let setup = Setup::new();
    let expected = setup.load(setup.files(), None).unwrap();
    assert_eq!(setup.hub.requests().len(), 0);
    let tokens = setup.dataset("owner/texts@main:sample/10BT").unwrap();
    assert_eq!(tokens.ids, expected.ids);
    assert_eq!((tokens.sequences, tokens.tokens), (4, 128));
    let (fetched, all) = (setup.hub.carried(), setup.bytes());
    println!("{fetched} of {all} bytes fetched");
    assert!(fetched > 0 && fetched * 10 < all, "{fetched} of {all} bytes");
    let source = &tokens.provenance.source;
    let commit = Repo::new(ID, Path::new("")).commit();
    assert!(source.starts_with(&format!("owner/texts@{commit}:sample/10BT (field \"text\", ")), "{source}");
    assert_eq!(setup.hub.count("001_00000"), 0, "the second file is not needed");
}

#[test]
fn dataset_download_survives_transient_faults() {
    let expected = Setup::new().dataset(ID).unwrap().ids;
    let busy = |seconds: &str| Fault::Status(429, vec![("retry-after", seconds.to_owned())]);
    let faults = [busy("0"), Fault::Status(503, Vec::new()), Fault::Truncate(100), Fault::Stall(100), Fault::Page];
    for fault in faults {
        let setup = Setup::new();
        setup.hub.fail(".parquet", 2, fault.clone());
        assert_eq!(setup.dataset(ID).unwrap().ids, expected, "{fault:?}");
    }
    let setup = Setup::new();
    setup.hub.fail("api/datasets", 2, busy("0"));
    setup.hub.expire_after(1);
    assert_eq!(setup.dataset(ID).unwrap().ids, expected);
}

/// Each in its own folder: fields as in crawled sets, and tables, are published.
#[test]
fn dataset_formats_give_the_same_windows_and_parquet_is_preferred() {
    let lines: String = texts(0).iter().take(4 * BLOCK).map(|text| json!({"text": text}).to_string() + "\n").collect();
    let mut packed = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(lines.as_bytes()).unwrap();
    let cells: String =
        texts(0).iter().take(4 * BLOCK).map(|text| format!("\"{}\"\n", text.replace('"', "\"\""))).collect();
    let rows: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let files = [
        ("en/train.json.gz", packed.finish().unwrap()),
        ("tables/train.csv", format!("text\n{cells}").into_bytes()),
        ("upper/train.NDJSON", lines.into_bytes()),
        ("array/train.json", json!(rows).to_string().into_bytes()),
    ];
    let setup = Setup::new();
    let expected = setup.load(setup.files(), None).unwrap();
    let root = setup.dir.path().join("texts");
    for (name, bytes) in &files {
        fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        fs::write(root.join(name), bytes).unwrap();
        fs::write(root.join(name).parent().unwrap().join("dataset_infos.json"), "{\n}").unwrap();
    }
    for (name, _) in &files {
        for path in [name, name.split('/').next().unwrap()] {
            let tokens = setup.dataset(&format!("{ID}:{path}")).unwrap();
            assert_eq!(tokens.ids, expected.ids, "{path}");
        }
    }
    fs::remove_dir_all(root.join("upper")).unwrap();
    let whole = setup.hub.count("en/train.json.gz");
    assert_eq!(setup.dataset(ID).unwrap().ids, expected.ids);
    assert_eq!(
        setup.hub.count("en/train.json.gz"),
        whole,
        "it stands before the Parquet files, and is not read beside them"
    );
}

/// The model is a folder: the hub is used for the text only.
#[test]
fn deployed_worker_gets_the_token_for_a_gated_dataset() {
    let setup = Setup::with(|repo| repo.gated("hf_right"));
    let context = TestContext::new().with("HF_ENDPOINT", &setup.hub.url()).with("HF_TOKEN", "hf_right");
    let model = setup.dir.path().join("model");
    let text = ["--dataset", ID, "--num-sequences", "4", "--sequence-length", "128", "--shuffle", "3"];
    let _ = context.run(["deploy", "-y", "--model", model.to_str().unwrap()].iter().chain(&text)).ok();
    let metadata = fs::read_to_string(context.results_folder().join(files::METADATA)).unwrap();
    let metadata: Metadata = serde_json::from_str(&metadata).unwrap();
    assert!(metadata.corpus.source.contains("shuffled with seed 3"), "{}", metadata.corpus.source);
    assert_eq!((metadata.corpus.sequences, metadata.corpus.tokens_per_sequence), (4, 128));
    context.assert_nothing_left();
}

#[test]
fn unavailable_dataset_is_named_in_the_error() {
    let setup = Setup::new();
    for (name, kind, says) in [
        ("owner/other", FailureKind::ModelNotFound, "no dataset owner/other"),
        ("owner/texts@gone", FailureKind::ModelNotFound, "dataset owner/texts has no revision gone"),
        ("owner/texts:elsewhere", FailureKind::Corpus, "no .parquet, .jsonl, .ndjson, .json, .csv or .tsv files"),
    ] {
        let error = setup.dataset(name).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.message().contains(says) && error.hint_text().is_some(), "{error}");
    }
    let gated = Setup::with(|repo| repo.gated("hf_right"));
    let error = gated.dataset(ID).unwrap_err();
    assert_eq!(error.kind(), FailureKind::ModelGated);
    assert!(error.hint_text().unwrap().contains("/datasets/owner/texts"), "{error:?}");
    let source = CorpusSource::Dataset(ID.parse().unwrap());
    assert!(gated.load(source, Token::new("hf_right")).is_ok());
}
