//! The worker's hub client against a hub with faults.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use outliers_protocol::FailureKind;
use outliers_tests::hub::{Fault, MockHub, Repo};
use outliers_worker::checkpoint::hub::{Hub, HubOptions, Timeouts, Token};
use outliers_worker::checkpoint::source::Checkpoint;
use outliers_worker::commands::demo;
use outliers_worker::error::WorkerError;

pub(crate) const ID: &str = "owner/demo-model";
const SHARD: &str = "model-00001-of-00002.safetensors";
const OTHER_SHARD: &str = "model-00002-of-00002.safetensors";

/// A hub with the demo model, and an empty cache.
pub(crate) struct Setup {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) hub: MockHub,
    pub(crate) timeouts: Timeouts,
}

impl Setup {
    pub(crate) fn new() -> Self {
        Self::with(|repo| repo)
    }

    pub(crate) fn with(change: impl FnOnce(Repo) -> Repo) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("repo");
        demo::make(&folder, 0).unwrap();
        fs::write(folder.join("pytorch_model.bin"), "not wanted").unwrap();
        let hub = MockHub::start([change(Repo::new(ID, &folder))]).unwrap();
        let timeouts = Timeouts {
            response: Duration::from_secs(5),
            silence: Duration::from_millis(1500),
            tries: 3,
            pause: Duration::from_millis(10),
            longest_pause: Duration::from_secs(3),
            ..Timeouts::default()
        };
        Self { dir, hub, timeouts }
    }

    pub(crate) fn repo(&self) -> std::path::PathBuf {
        self.dir.path().join("repo")
    }

    fn cache(&self) -> std::path::PathBuf {
        self.dir.path().join("cache")
    }

    pub(crate) fn options(&self) -> HubOptions {
        HubOptions { endpoint: self.hub.url(), timeouts: self.timeouts, ..HubOptions::new(self.cache()) }
    }

    fn client(&self) -> Hub {
        Hub::new(self.options()).unwrap()
    }

    fn with_token(&self, token: &str) -> Hub {
        Hub::new(HubOptions { token: Token::new(token), ..self.options() }).unwrap()
    }

    fn fetch(&self) -> Result<Checkpoint, WorkerError> {
        self.client().fetch_all(ID, "main", &|_| ())
    }

    fn refused(&self) -> WorkerError {
        self.fetch().map(|_| ()).unwrap_err()
    }

    /// Every file of the snapshot is the repository's, and no temporary file is left.
    fn assert_whole(&self, checkpoint: &Checkpoint) {
        for name in ["config.json", "tokenizer.json", "model.safetensors.index.json", SHARD, OTHER_SHARD] {
            let (ours, theirs) = (fs::read(checkpoint.folder.join(name)), fs::read(self.repo().join(name)));
            assert!(ours.unwrap() == theirs.unwrap(), "{name}");
        }
        assert_eq!(self.parts(), 0);
    }

    fn blobs(&self) -> std::path::PathBuf {
        self.cache().join("models--owner--demo-model/blobs")
    }

    fn parts(&self) -> usize {
        let names = fs::read_dir(self.blobs()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().ends_with(".part")).count()
    }
}

fn status(code: u16) -> Fault {
    Fault::Status(code, Vec::new())
}

#[test]
fn model_is_fetched_verified_and_stored_in_the_hub_cache_layout() {
    let setup = Setup::new();
    let told = Mutex::new(Vec::new());
    let checkpoint = setup.client().fetch_all(ID, "main", &|p| told.lock().unwrap().push(p)).unwrap();
    setup.assert_whole(&checkpoint);

    let commit = Repo::new(ID, Path::new("")).commit();
    assert_eq!(checkpoint.revision.as_ref(), Some(&commit));
    let root = setup.cache().join("models--owner--demo-model");
    assert_eq!(fs::read_to_string(root.join("refs/main")).unwrap(), commit);
    let link = fs::read_link(root.join("snapshots").join(&commit).join(SHARD)).unwrap();
    let hash = {
        use sha2::Digest as _;
        format!("{:x}", sha2::Sha256::digest(fs::read(setup.repo().join(SHARD)).unwrap()))
    };
    assert_eq!(link, Path::new("../../blobs").join(hash));
    // hf-hub's own reader finds the file.
    let cache = hf_hub::Cache::new(setup.cache()).model(ID.to_owned());
    assert!(cache.get(SHARD).is_some() && cache.get("config.json").is_some());
    assert!(cache.get("pytorch_model.bin").is_none(), "only what the index names");

    let told = told.into_inner().unwrap();
    let last = told.last().unwrap();
    assert_eq!(last.bytes_done, last.bytes_total);
    assert_eq!(told[0].bytes_done, 0);

    // Again: only the list is requested.
    let before = setup.hub.requests().len();
    setup.assert_whole(&setup.fetch().unwrap());
    assert_eq!(setup.hub.requests().len(), before + 1);
}

#[test]
fn metadata_is_fetched_without_weights() {
    let setup = Setup::new();
    let checkpoint = setup.client().fetch_metadata(ID, "main").unwrap();
    let local = Checkpoint::open_folder(&setup.repo()).unwrap();
    assert_eq!(checkpoint.weights.index(), local.weights.index());
    assert_eq!(checkpoint.config_sha256, local.config_sha256);
    assert!(checkpoint.tokenizer().is_some());
    let entry = checkpoint.weights.entry("lm_head.weight").unwrap();
    let error = checkpoint.weights.read(entry, 0..2, &mut [0; 2]).unwrap_err();
    assert_eq!(error.kind(), FailureKind::Internal);
    let fetched: u64 = fs::read_dir(setup.blobs()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    assert!(fetched < 200_000, "{fetched} bytes in the cache");
    for seen in setup.hub.requests().iter().filter(|seen| seen.path.contains(".safetensors?")) {
        assert_eq!(seen.range.as_deref(), Some("bytes=0-1048575"));
    }
}

/// A repository as of OPT's larger models: pickled shards, an older tokenizer, copies for other
/// programs.
fn pickled() -> Setup {
    let setup = Setup::new();
    let repo = setup.repo();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for entry in fs::read_dir(&repo).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    for (from, to) in [("tensors.bin", BIN), ("second.bin", OTHER_BIN)] {
        let stored = fs::read(root.join("worker/src/checkpoint/torch/testdata").join(from)).unwrap();
        fs::write(repo.join(to), stretched(stored)).unwrap();
    }
    for name in ["vocab.json", "merges.txt", "tokenizer_config.json"] {
        fs::copy(root.join("worker/src/corpus/testdata/opt").join(name), repo.join(name)).unwrap();
    }
    let map = serde_json::json!({"weight_map": {"f32": BIN, "second": OTHER_BIN}});
    fs::write(repo.join("pytorch_model.bin.index.json"), map.to_string()).unwrap();
    fs::write(repo.join("config.json"), "{}").unwrap();
    // A file `pytorch_model.bin` would take precedence, as in transformers.
    for extra in ["tf_model.h5", "flax_model.msgpack", "consolidated.00.pt", "tiktoken.model"] {
        fs::write(repo.join(extra), "not wanted").unwrap();
    }
    setup
}

/// The same archive with 3 MiB between its last record and its directory.
fn stretched(mut archive: Vec<u8>) -> Vec<u8> {
    const GAP: usize = 3 << 20;
    let len = archive.len();
    // Offset of the directory, and the field of the 64-bit end that has it.
    let [directory, _] = [len - 50, len - 34].map(|at| {
        let place: &mut [u8; 8] = (&mut archive[at..at + 8]).try_into().unwrap();
        let old = u64::from_le_bytes(*place) as usize;
        *place = ((old + GAP) as u64).to_le_bytes();
        old
    });
    archive.splice(directory..directory, std::iter::repeat_n(0, GAP));
    archive
}

const BIN: &str = "pytorch_model-00001-of-00002.bin";
const OTHER_BIN: &str = "pytorch_model-00002-of-00002.bin";

#[test]
fn trap_1_pickled_models_are_planned_without_weights_then_fetched() {
    let setup = pickled();
    let planned = setup.client().fetch_metadata(ID, "main").unwrap();
    let asked = setup.hub.requests().into_iter().filter(|seen| seen.cdn).count();
    assert_eq!(asked, 4, "for each file its end, and what lies at its beginning");
    assert!(!planned.folder.join(BIN).exists());
    let local = Checkpoint::open_folder(&setup.repo()).unwrap();
    assert_eq!(planned.weights.files(), local.weights.files());
    assert_eq!(planned.weights.names().collect::<Vec<_>>(), local.weights.names().collect::<Vec<_>>());
    for name in local.weights.names() {
        let (ours, theirs) = (planned.weights.entry(name).unwrap(), local.weights.entry(name).unwrap());
        assert_eq!((&ours.dtype, &ours.shape, ours.len), (&theirs.dtype, &theirs.shape, theirs.len), "{name}");
    }
    let fetched = setup.fetch().unwrap();
    assert_eq!(fetched.weights.index(), local.weights.index());
    assert_eq!(fetched.tokenizer().unwrap().to_string(), "vocab.json + merges.txt");
}

#[test]
fn trap_2_only_used_files_are_fetched() {
    let setup = pickled();
    let folder = setup.fetch().unwrap().folder;
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let index = "pytorch_model.bin.index.json";
    assert_eq!(names, ["config.json", "merges.txt", BIN, OTHER_BIN, index, "tokenizer_config.json", "vocab.json"]);
    // With safetensors present, pickles are not used.
    let setup = Setup::new();
    fs::write(setup.repo().join(index), "not wanted").unwrap();
    setup.assert_whole(&setup.fetch().unwrap());
    assert_eq!(setup.hub.count("pytorch_model"), 0);
}

/// The layouts of DeepSeek, Kimi and gpt-oss.
#[test]
fn trap_3_numbers_in_file_names_are_ignored() {
    for (first, second) in [
        ("model-00001-of-000163.safetensors", "model-00163-of-000163.safetensors"),
        ("model-1-of-61.safetensors", "model-61-of-61.safetensors"),
        ("model-00000-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    ] {
        let setup = Setup::new();
        let repo = setup.repo();
        let path = repo.join("model.safetensors.index.json");
        let index = fs::read_to_string(&path).unwrap().replace(OTHER_SHARD, "other").replace(SHARD, first);
        fs::write(path, index.replace("other", second)).unwrap();
        fs::rename(repo.join(SHARD), repo.join("first")).unwrap();
        fs::rename(repo.join(OTHER_SHARD), repo.join(second)).unwrap();
        fs::rename(repo.join("first"), repo.join(first)).unwrap();
        let planned = setup.client().fetch_metadata(ID, "main").unwrap();
        assert_eq!(planned.weights.files().iter().map(|file| file.name.as_str()).collect::<Vec<_>>(), [first, second]);
    }
}

#[test]
fn hostile_pickles_from_the_hub_are_refused() {
    let worker = Path::new(env!("CARGO_MANIFEST_DIR")).join("../worker/src/checkpoint/torch/testdata");
    for (file, says) in [("system.bin", "posix.system"), ("legacy.bin", "before 1.6")] {
        let setup = pickled();
        fs::copy(worker.join(file), setup.repo().join(OTHER_BIN)).unwrap();
        let error = setup.client().fetch_metadata(ID, "main").map(|_| ()).unwrap_err();
        assert!(error.message().contains(says), "{error}");
        assert!(error.message().contains(&format!("{OTHER_BIN} of {ID}")), "{error}");
    }
    let setup = pickled();
    setup.hub.fail(&format!("{OTHER_BIN}?"), 1000, Fault::Corrupt);
    assert_eq!(setup.refused().kind(), FailureKind::Network);
}

#[test]
fn missing_repository_revision_and_file_give_different_errors() {
    let setup = Setup::new();
    let client = setup.client();
    for (id, revision, kind, says) in [
        ("owner/other", "main", FailureKind::ModelNotFound, "there is no model owner/other"),
        (ID, "v9", FailureKind::ModelNotFound, "has no revision v9"),
        ("../etc", "main", FailureKind::Job, "not a model id"),
        (ID, "../main", FailureKind::Job, "not a revision"),
    ] {
        let error = client.fetch_metadata(id, revision).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.message().contains(says), "{error}");
        assert!(error.hint_text().is_some());
    }
    let commit = Repo::new(ID, Path::new("")).commit();
    client.fetch_metadata(ID, &commit).unwrap();
}

#[test]
fn gated_models_need_a_token_sent_only_to_the_hub() {
    let setup = Setup::with(|repo| repo.gated("hf_right"));
    let error = setup.refused();
    assert_eq!(error.kind(), FailureKind::ModelGated);
    assert!(error.hint_text().unwrap().contains("HF_TOKEN"));
    let error = setup.with_token("hf_wrong").fetch_metadata(ID, "main").map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), FailureKind::ModelGated);
    assert!(!format!("{error:?}").contains("hf_wrong"));
    let checkpoint = setup.with_token("hf_right").fetch_all(ID, "main", &|_| ()).unwrap();
    setup.assert_whole(&checkpoint);
    let seen = setup.hub.requests();
    let cdn: Vec<_> = seen.iter().filter(|seen| seen.cdn).collect();
    assert!(!cdn.is_empty());
    assert!(cdn.iter().all(|seen| seen.authorization.is_none()), "the token left for another origin");

    setup.hub.fail(
        "/api/models",
        1,
        Fault::Status(401, vec![("x-error-message", "Invalid\u{9b}31m token".to_owned())]),
    );
    let error = setup.with_token("hf_right").resolve(ID, "main").unwrap_err();
    assert_eq!(error.kind(), FailureKind::ModelGated);
    assert!(error.message().contains("refused the token"), "{error}");
}

#[test]
fn error_pages_are_not_stored_as_files() {
    for code in [429, 503, 500] {
        let setup = Setup::new();
        setup.hub.fail("resolve/", 1000, status(code));
        let error = setup.refused();
        assert_eq!(error.kind(), FailureKind::Network);
        assert!(error.message().contains(&format!("answered {code}")), "{error}");
        assert!(error.message().contains("tried 3 times"), "{error}");
        let parts = setup.parts();
        let files = fs::read_dir(setup.blobs()).unwrap().count();
        assert_eq!(files, parts, "a blob was made of an error page");
    }
}

#[test]
fn transient_hub_errors_are_retried() {
    let setup = Setup::new();
    setup.hub.fail("/api/models", 2, status(503));
    setup.hub.fail(OTHER_SHARD, 2, status(500));
    // The file server's addresses expire.
    setup.hub.fail("signature=", 1, status(403));
    setup.assert_whole(&setup.fetch().unwrap());
}

#[test]
fn retry_after_of_the_hub_is_respected() {
    for header in [("retry-after", "1"), ("ratelimit", "\"resolvers\";r=0;t=1")] {
        let setup = Setup::new();
        setup.hub.fail("/api/models", 1, Fault::Status(429, vec![(header.0, header.1.to_owned())]));
        let start = Instant::now();
        setup.client().resolve(ID, "main").unwrap();
        assert!(start.elapsed() >= Duration::from_secs(1), "{header:?}");
    }
    let setup = Setup::new();
    setup.hub.fail("/api/models", 1, Fault::Status(429, vec![("retry-after", "86400".to_owned())]));
    let error = setup.client().resolve(ID, "main").unwrap_err();
    assert!(error.message().contains("wait 86400 seconds"), "{error}");
}

#[test]
fn broken_and_stalled_downloads_are_resumed() {
    for fault in [Fault::Truncate(1_500_000), Fault::Stall(1_500_000)] {
        let setup = Setup::new();
        setup.hub.fail(&format!("{SHARD}?"), 2, fault);
        setup.assert_whole(&setup.fetch().unwrap());
        let ranges: Vec<_> =
            setup.hub.requests().into_iter().filter(|s| s.path.contains(&format!("{SHARD}?"))).collect();
        let starts: Vec<_> =
            ranges.iter().map(|seen| seen.range.as_deref().unwrap().split('-').next().unwrap()).collect();
        assert_eq!(starts, ["bytes=0", "bytes=1500000", "bytes=3000000"]);
    }
}

#[test]
fn downloads_are_resumed_by_a_new_process() {
    let setup = Setup::new();
    setup.hub.fail(&format!("{SHARD}?"), 1, Fault::Truncate(1_000_000));
    setup.hub.fail(&format!("{SHARD}?"), 1000, Fault::Truncate(0));
    let error = setup.refused();
    assert_eq!(error.kind(), FailureKind::Network);
    assert_eq!(setup.parts(), 1);
    let again = MockHub::start([Repo::new(ID, &setup.repo())]).unwrap();
    let client = Hub::new(HubOptions { endpoint: again.url(), ..setup.options() }).unwrap();
    setup.assert_whole(&client.fetch_all(ID, "main", &|_| ()).unwrap());
    let resumed = again.requests().into_iter().find(|seen| seen.path.contains(&format!("{SHARD}?"))).unwrap();
    assert!(resumed.range.unwrap().starts_with("bytes=1000000-"));
}

#[test]
fn server_without_range_support_is_accepted() {
    let setup = Setup::new();
    setup.hub.fail(&format!("{SHARD}?"), 1, Fault::Truncate(1_000_000));
    setup.hub.fail(&format!("{SHARD}?"), 1, Fault::IgnoreRange);
    setup.assert_whole(&setup.fetch().unwrap());
    let setup = Setup::new();
    setup.hub.fail(".safetensors?", 2, Fault::IgnoreRange);
    setup.client().fetch_metadata(ID, "main").unwrap();
}

#[test]
fn wrong_content_is_refetched_once_then_refused() {
    for file in [format!("{SHARD}?"), "config.json".to_owned()] {
        let setup = Setup::new();
        setup.hub.fail(&file, 1, Fault::Corrupt);
        setup.assert_whole(&setup.fetch().unwrap());

        let setup = Setup::new();
        setup.hub.fail(&file, 1000, Fault::Corrupt);
        let error = setup.refused();
        assert_eq!(error.kind(), FailureKind::Network);
        assert!(error.message().contains("its hash differs"), "{error}");
        assert_eq!(setup.hub.count(&file), 2);
        assert_eq!(setup.parts(), 0);
        // The next attempt starts clean.
        let again = MockHub::start([Repo::new(ID, &setup.repo())]).unwrap();
        let client = Hub::new(HubOptions { endpoint: again.url(), ..setup.options() }).unwrap();
        setup.assert_whole(&client.fetch_all(ID, "main", &|_| ()).unwrap());
    }
}

#[test]
fn damaged_cached_blobs_are_replaced() {
    let setup = Setup::new();
    let checkpoint = setup.fetch().unwrap();
    let blob = |name: &str| fs::canonicalize(checkpoint.folder.join(name)).unwrap();
    fs::write(blob("config.json"), "<html>error page</html>").unwrap();
    let shard = File::options().write(true).open(blob(SHARD)).unwrap();
    shard.set_len(1000).unwrap();
    let mut other = fs::read(blob(OTHER_SHARD)).unwrap();
    other[5000] ^= 1;
    fs::write(blob(OTHER_SHARD), other).unwrap();
    setup.assert_whole(&setup.fetch().unwrap());
}

#[test]
fn mirrors_without_sizes_and_hashes_are_accepted() {
    let setup = Setup::new();
    setup.hub.fail("/api/models", 1, Fault::BareListing);
    setup.assert_whole(&setup.fetch().unwrap());
}

#[test]
fn unusable_repositories_are_refused_with_the_reason() {
    type Case<'a> = (&'a dyn Fn(&Path), &'static str);
    let cases: [Case<'_>; 4] = [
        (&|repo| fs::remove_file(repo.join("config.json")).unwrap(), "has no config.json"),
        (
            &|repo| fs::remove_file(repo.join(SHARD)).unwrap(),
            "names files that model owner/demo-model does not have: model-00001-of-00002.safetensors",
        ),
        (
            &|repo| {
                fs::remove_file(repo.join("model.safetensors.index.json")).unwrap();
                fs::remove_file(repo.join("pytorch_model.bin")).unwrap();
            },
            "has no weights: neither",
        ),
        (&|repo| fs::write(repo.join(SHARD), "short").unwrap(), "model-00001-of-00002.safetensors of owner/demo-model"),
    ];
    for (damage, says) in cases {
        let setup = Setup::new();
        damage(&setup.repo());
        let error = setup.client().fetch_metadata(ID, "main").map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), FailureKind::Checkpoint, "{error}");
        assert!(error.message().contains(says), "{error}");
    }
}

/// As from a folder: the results of transformers, and the same notes.
#[test]
fn only_weight_file_is_used_despite_its_index() {
    let setup = Setup::new();
    fs::copy(setup.repo().join(SHARD), setup.repo().join("model.safetensors")).unwrap();
    let local = Checkpoint::open_folder(&setup.repo()).unwrap();
    let note = "two sets of weights lie here: model.safetensors, which is read";
    assert!(local.weights.notes()[0].starts_with(note), "{:?}", local.weights.notes());
    let client = setup.client();
    let planned = client.fetch_metadata(ID, "main").unwrap();
    let streamed = client.stream(ID, "main", 1 << 20, &|_| ()).unwrap();
    let fetched = setup.fetch().unwrap();
    for checkpoint in [planned, streamed, fetched] {
        assert_eq!(checkpoint.weights.index(), local.weights.index());
    }
}

#[test]
fn unreachable_hub_is_a_network_error_without_secrets() {
    let setup = Setup::new();
    let options =
        HubOptions { endpoint: "http://127.0.0.1:9".to_owned(), token: Token::new("hf_secret"), ..setup.options() };
    let error = Hub::new(options).unwrap().resolve(ID, "main").unwrap_err();
    assert_eq!(error.kind(), FailureKind::Network);
    setup.hub.fail("signature=", 1000, status(403));
    let error = setup.refused();
    assert!(error.message().contains("file server answered 403"), "{error}");
    assert!(!error.message().contains("SIGNED"), "{error}");
}

#[test]
fn concurrent_processes_do_not_write_the_same_file() {
    let setup = Setup::new();
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..3).map(|_| scope.spawn(|| setup.fetch().unwrap())).collect();
        runs.into_iter().for_each(|run| setup.assert_whole(&run.join().unwrap()));
    });
    assert_eq!(setup.hub.count(&format!("{SHARD}?")), 1);
}
