//! Weights streamed from the hub: the same bytes, each fetched once, none on disk; every network
//! fault is survived or reported.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use outliers_protocol::{FailureKind, Manifest, Metadata, Outcome, Results, files};
use outliers_tests::hub::{Fault, MockHub, ReceivedRequest, Repo, Wire};
use outliers_tests::programs::worker;
use outliers_worker::checkpoint::hub::{Hub, HubOptions, Timeouts, Token};
use outliers_worker::checkpoint::source::{Checkpoint, PlannedRead, TensorEntry, WeightSource};
use outliers_worker::error::WorkerError;

use crate::hub::{ID, Setup};

const SHARD: &str = "model-00001-of-00002.safetensors?";
const OTHER_SHARD: &str = "model-00002-of-00002.safetensors?";
/// Small enough that the demo's 8 MB come in many parts.
const READ_AHEAD: u64 = 4 << 20;
/// Enough for both files.
const HASH_MEMORY: u64 = 64 << 20;
/// Largest part with that little memory.
const PART: u64 = 1 << 20;

/// Timeout of range requests.
fn patient(setup: Setup) -> Setup {
    let timeouts = Timeouts {
        response: Duration::from_secs(20),
        silence: Duration::from_secs(2),
        late: Duration::from_millis(200),
        tries: 4,
        ..setup.timeouts
    };
    Setup { timeouts, ..setup }
}

impl Setup {
    fn stream(&self) -> Checkpoint {
        Hub::new(self.options()).unwrap().stream(ID, "main", READ_AHEAD, &|_| ()).unwrap()
    }

    /// All tensors of the model, read from the hub with `fault` injected into this many requests
    /// for weights.
    fn read_with(&self, fault: &Fault, times: usize) -> Result<Tensors, WorkerError> {
        let checkpoint = self.stream();
        self.hub.fail(SHARD, times, fault.clone());
        read_all(&*checkpoint.weights)
    }

    fn stored(&self) -> Tensors {
        read_all(&*Checkpoint::open_folder(&self.repo()).unwrap().weights).unwrap()
    }

    /// Requests for weights, without the request per file for its header.
    fn ranges(&self) -> Vec<ReceivedRequest> {
        let (mut ranges, mut files) = (Vec::new(), Vec::new());
        for seen in self.hub.requests().into_iter().filter(|seen| seen.path.contains(".safetensors") && !seen.cdn) {
            files.push(seen.path);
        }
        let mut headers: Vec<&String> = files.iter().collect();
        for seen in self.hub.requests().into_iter().filter(|seen| seen.cdn) {
            let of = headers.iter().position(|file| seen.path.starts_with(&file.replace(&commit(), "main")));
            match of {
                Some(at) => drop(headers.remove(at)),
                None => ranges.push(seen),
            }
        }
        ranges
    }
}

fn commit() -> String {
    Repo::new(ID, Path::new("")).commit()
}

type Tensors = BTreeMap<String, Vec<u8>>;

/// Announces all tensors, one unit each, and reads them in that order.
fn read_all(weights: &dyn WeightSource) -> Result<Tensors, WorkerError> {
    read_all_holding(weights, HASH_MEMORY)
}

/// The same with this much memory for bytes whose hash is pending.
fn read_all_holding(weights: &dyn WeightSource, hash_memory: u64) -> Result<Tensors, WorkerError> {
    let entries = in_order(weights);
    weights.announce(&announced(&entries), hash_memory);
    entries.into_iter().map(|entry| Ok((entry.name.clone(), read(weights, &entry, 0..entry.len)?))).collect()
}

/// Not in file order: like a pass, it returns to both files.
fn in_order(weights: &dyn WeightSource) -> Vec<TensorEntry> {
    weights.names().map(|name| weights.entry(name).unwrap().clone()).collect()
}

fn announced(entries: &[TensorEntry]) -> Vec<PlannedRead> {
    let wanted = |(unit, entry): (usize, &TensorEntry)| PlannedRead {
        file: entry.file,
        bytes: entry.offset..entry.offset + entry.len,
        layer: unit / 20,
        unit,
    };
    entries.iter().enumerate().map(wanted).collect()
}

fn read(weights: &dyn WeightSource, entry: &TensorEntry, range: Range<u64>) -> Result<Vec<u8>, WorkerError> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    weights.read(entry, range, &mut bytes)?;
    Ok(bytes)
}

fn length(seen: &ReceivedRequest) -> u64 {
    let (start, end) = seen.range.as_ref().unwrap().strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    end.parse::<u64>().unwrap() + 1 - start.parse::<u64>().unwrap()
}

fn size_of(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| match entry.file_type().unwrap() {
            kind if kind.is_dir() => size_of(&entry.path()),
            kind if kind.is_file() => entry.metadata().unwrap().len(),
            _ => 0,
        })
        .sum()
}

/// The worker's command for a run into a folder.
fn command(arguments: &[&str], hub: &MockHub, home: &Path, output: &Path) -> Command {
    let mut command = Command::new(worker());
    command.args(["run", "--num-sequences", "2", "--sequence-length", "64", "--precision", "f32"]).args(arguments);
    command.arg("--output").arg(output).env("HF_ENDPOINT", hub.url()).env("HF_HOME", home).env_remove("HF_TOKEN");
    command
}

/// Runs the worker; returns results and metadata.
fn run(arguments: &[&str], hub: &MockHub, home: &Path) -> (Results, Metadata) {
    let output = tempfile::tempdir().unwrap();
    let run = command(arguments, hub, home, output.path()).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let read = |name: &str| fs::read(output.path().join(name)).unwrap();
    let results = serde_json::from_slice(&read(files::RESULTS)).unwrap();
    (results, serde_json::from_slice(&read(files::METADATA)).unwrap())
}

#[test]
fn streamed_run_equals_a_disk_run_and_stores_no_weights() {
    let setup = patient(Setup::new());
    let home = setup.dir.path().join("home");
    let (streamed, metadata) = run(&["--model", ID], &setup.hub, &home);
    let repo = setup.repo();
    let (local, _) = run(&["--model", repo.to_str().unwrap()], &setup.hub, &home);
    assert_eq!(streamed, Results { model: ID.to_owned(), ..local });
    assert!(streamed.perplexity.is_some());

    let weights: u64 = setup.stored().values().map(|bytes| bytes.len() as u64).sum();
    assert_eq!((metadata.weight_bytes_read, metadata.weight_bytes_expected), (weights, weights));
    assert!(size_of(&home) < weights / 20, "{} bytes on disk for {weights} of weights", size_of(&home));
    let fetched: u64 = setup.ranges().iter().map(length).sum();
    assert!((weights..=weights * 101 / 100).contains(&fetched), "{fetched} bytes fetched for {weights}");
    for shard in [SHARD, OTHER_SHARD] {
        let asked =
            setup.hub.requests().into_iter().filter(|seen| !seen.cdn && seen.path.contains(&shard[..shard.len() - 1]));
        assert_eq!(asked.count(), 1, "each file's address is asked for once");
    }
}

#[test]
fn file_with_a_wrong_hash_fails_the_run_and_is_named() {
    let setup = patient(Setup::new());
    let home = setup.dir.path().join("home");
    for shard in [SHARD, OTHER_SHARD] {
        let name = &shard[..shard.len() - 1];
        let last = fs::metadata(setup.repo().join(name)).unwrap().len() as usize - 1;
        for at in [last / 2, last] {
            let setup = patient(Setup::new());
            setup.hub.fail(shard, 100_000, Fault::FlipBit(at));
            let output = tempfile::tempdir().unwrap();
            let arguments = ["--model", ID, "--save-every", "0"];
            let run = command(&arguments, &setup.hub, &home, output.path()).output().unwrap();
            let said = String::from_utf8_lossy(&run.stderr);
            assert!(!run.status.success() && said.contains(name), "{name}, byte {at}: {said}");
            assert!(said.contains("is not what the hub lists"), "{said}");
            let manifest: Manifest =
                serde_json::from_slice(&fs::read(output.path().join(files::MANIFEST)).unwrap()).unwrap();
            let Outcome::Failed(failure) = manifest.outcome else { panic!("{manifest:?}") };
            assert_eq!(failure.kind, FailureKind::Checkpoint);
            assert!(!output.path().join(files::SAVE_POINT).exists(), "it may hold what the damaged file made");
            assert!(!output.path().join(files::RESULTS).exists());
        }
    }
}

#[test]
fn verified_and_unverified_files_are_reported_with_reasons() {
    let setup = patient(Setup::new());
    let home = setup.dir.path().join("home");
    let of = |arguments: &[&str]| run(arguments, &setup.hub, &home).1.model.weight_verification.unwrap();
    let repo = setup.repo();
    let cache = of(&["--model", ID, "--weights", "cache"]);
    for verification in [of(&["--model", ID]), cache] {
        assert_eq!((verification.verified_files, verification.unverified.len()), (2, 0), "{verification:?}");
    }
    let folder = of(&["--model", repo.to_str().unwrap()]);
    assert_eq!((folder.verified_files, folder.unverified[0].files.len()), (0, 2));
    assert!(folder.unverified[0].reason.contains("a folder"), "{folder:?}");
    let little = of(&["--model", ID, "--stream-budget", "64KiB"]);
    assert!(little.unverified.iter().any(|left| left.reason.contains("memory")), "{little:?}");
    let output = tempfile::tempdir().unwrap();
    let arguments = ["--model", ID, "--stream-budget", "64KiB"];
    let said = command(&arguments, &setup.hub, &home, output.path()).output().unwrap().stderr;
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("weights unverified: "), "{said}");
}

#[test]
fn cached_run_keeps_and_reuses_the_weights() {
    let setup = patient(Setup::new());
    let home = setup.dir.path().join("home");
    let (first, _) = run(&["--model", ID, "--weights", "cache"], &setup.hub, &home);
    let (requests, carried) = (setup.hub.requests().len(), setup.hub.carried());
    let (second, _) = run(&["--model", ID, "--weights", "cache"], &setup.hub, &home);
    assert_eq!(first, second);
    assert_eq!((setup.hub.requests().len(), setup.hub.carried()), (requests + 1, carried), "only the listing");
    // Another folder's weights under the hub's configuration.
    let local = format!("local:{}", setup.repo().display());
    let (third, _) = run(&["--model", ID, "--weights", &local], &setup.hub, &home);
    assert_eq!((first, setup.hub.carried()), (third, carried));
}

#[test]
fn transient_faults_change_no_byte() {
    let limit = || vec![("ratelimit", "\"cdn\";r=0;t=1".to_owned())];
    let faults = [
        Fault::Status(403, Vec::new()),
        Fault::Status(429, limit()),
        Fault::Status(503, vec![("retry-after", "1".to_owned())]),
        Fault::Truncate(0),
        Fault::Truncate(100_000),
        Fault::Stall(0),
        Fault::Stall(50_000),
        Fault::Slow(10_000),
        Fault::Short(70_000),
        Fault::OtherPlace,
        Fault::Page,
        Fault::OtherVersion,
        Fault::IgnoreRange,
    ];
    let stored = patient(Setup::new()).stored();
    std::thread::scope(|scope| {
        for fault in &faults {
            let stored = &stored;
            scope.spawn(move || {
                let setup = patient(Setup::new());
                let read = setup.read_with(fault, 2).unwrap_or_else(|error| panic!("{fault:?}: {error}"));
                assert!(read == *stored, "{fault:?}");
            });
        }
    });
}

#[test]
fn permanent_faults_are_named() {
    let cases = [
        (Fault::Status(403, Vec::new()), "the hub's file server answered 403"),
        (Fault::Status(503, Vec::new()), "the hub's file server answered 503"),
        (Fault::Status(429, vec![("retry-after", "4000".to_owned())]), "wait 4000 seconds"),
        (Fault::Truncate(0), "broke off after 0 of"),
        (Fault::Stall(0), "timeout: per read"),
        (Fault::OtherPlace, "Content-Range"),
        (Fault::Page, "36 bytes came instead"),
        (Fault::OtherVersion, "changed while it was read"),
    ];
    std::thread::scope(|scope| {
        for (fault, says) in &cases {
            scope.spawn(move || {
                let setup = patient(Setup::new());
                let error = setup.read_with(fault, 100_000).unwrap_err();
                assert_eq!(error.kind(), FailureKind::Network, "{fault:?}: {error}");
                assert!(error.message().contains(says), "{fault:?}: {error}");
                assert!(error.message().contains(&format!("{} of {ID}", &SHARD[..SHARD.len() - 1])), "{error}");
                assert!(!error.message().contains("SIGNED"), "{error}");
                assert!(error.hint_text().is_some(), "{error}");
            });
        }
    });
}

#[test]
fn replaced_file_is_not_mixed_with_its_old_content() {
    let setup = patient(Setup::new());
    let checkpoint = setup.stream();
    let path = setup.repo().join(&SHARD[..SHARD.len() - 1]);
    let mut bytes = fs::read(&path).unwrap();
    bytes.reverse();
    fs::write(&path, &bytes).unwrap();
    let error = read_all(&*checkpoint.weights).unwrap_err();
    assert!(error.message().contains("changed while it was read"), "{error}");
    // Another length, or a server without versions, would be detected too.
    bytes.truncate(bytes.len() - 10);
    fs::write(&path, &bytes).unwrap();
    let error = read_all(&*checkpoint.weights).unwrap_err();
    assert!(error.message().contains("another version"), "{error}");
}

#[test]
fn late_range_is_requested_again_before_its_timeout() {
    let mut setup = patient(Setup::new());
    // Without this, the stall would not be detected.
    setup.timeouts.silence = Duration::from_secs(600);
    setup.timeouts.response = Duration::from_secs(600);
    for fault in [Fault::Stall(1000), Fault::Slow(1000)] {
        let asked = setup.hub.requests().len();
        assert!(setup.read_with(&fault, 1).unwrap() == setup.stored(), "{fault:?}");
        let seen = setup.hub.requests();
        let ranges: Vec<&String> = seen[asked..].iter().filter(|s| s.cdn).filter_map(|s| s.range.as_ref()).collect();
        let twice = ranges.iter().any(|range| ranges.iter().filter(|other| *other == range).count() == 2);
        assert!(twice, "{fault:?}: {ranges:?}");
    }
}

#[test]
fn broken_range_is_resumed_at_its_offset() {
    let mut setup = patient(Setup::new());
    setup.timeouts.late = Duration::from_secs(600);
    let checkpoint = setup.stream();
    setup.hub.fail(SHARD, 1, Fault::Truncate(65_536));
    // Without hashes the first range is as long as a part.
    assert!(read_all_holding(&*checkpoint.weights, 0).unwrap() == setup.stored());
    let ranges = setup.ranges();
    let start = |seen: &ReceivedRequest| -> u64 {
        let range = seen.range.as_ref().unwrap().strip_prefix("bytes=").unwrap();
        range.split_once('-').unwrap().0.parse().unwrap()
    };
    let resumed = |seen: &&ReceivedRequest| {
        ranges.iter().any(|first| start(first) + 65_536 == start(seen) && first.path == seen.path)
    };
    assert!(ranges.iter().any(|seen| resumed(&seen)), "{ranges:?}");
}

#[test]
fn expired_download_urls_are_renewed() {
    let mut setup = patient(Setup::new());
    // Several ranges may meet the same expiry, and some of them the next one too.
    setup.timeouts.tries = 20;
    let checkpoint = setup.stream();
    setup.hub.expire_after(5);
    assert!(read_all(&*checkpoint.weights).unwrap() == setup.stored());
    let resolves = setup.hub.requests().iter().filter(|seen| !seen.cdn && seen.path.contains(".safetensors")).count();
    let ranges = setup.hub.requests().iter().filter(|seen| seen.cdn).count();
    assert!((3..=2 + ranges).contains(&resolves), "{resolves} addresses for {ranges} ranges");
}

#[test]
fn token_is_sent_only_to_the_hub() {
    let setup = patient(Setup::with(|repo| repo.gated("hf_right")));
    let options = HubOptions { token: Token::new("hf_right"), ..setup.options() };
    let checkpoint = Hub::new(options).unwrap().stream(ID, "main", READ_AHEAD, &|_| ()).unwrap();
    setup.hub.expire_after(30);
    assert!(read_all(&*checkpoint.weights).unwrap() == setup.stored());
    let seen = setup.hub.requests();
    assert!(seen.iter().filter(|seen| seen.cdn).all(|seen| seen.authorization.is_none()));
    assert!(seen.iter().filter(|seen| !seen.cdn).all(|seen| seen.authorization.as_deref() == Some("Bearer hf_right")));
}

#[test]
fn bytes_in_flight_stay_within_the_budget() {
    let setup = patient(Setup::new());
    let checkpoint = setup.stream();
    let weights = &*checkpoint.weights;
    let entries = in_order(weights);
    weights.announce(&announced(&entries), 0);
    for entry in &entries {
        read(weights, entry, 0..entry.len).unwrap();
        let asked: u64 = setup.ranges().iter().map(length).sum();
        let most = weights.bytes_read() + READ_AHEAD + PART;
        assert!(asked <= most, "{asked} bytes asked for after {} were read", weights.bytes_read());
    }
}

#[test]
fn reader_ahead_waits_for_budget() {
    let setup = Setup::new();
    let checkpoint = setup.stream();
    let weights = &*checkpoint.weights;
    let entries = in_order(weights);
    weights.announce(&announced(&entries), 0);
    let (last, others) = entries.split_last().unwrap();
    std::thread::scope(|scope| {
        let further_on = scope.spawn(|| read(weights, last, 0..last.len).unwrap());
        for entry in others {
            let before = weights.bytes_read();
            let asked: u64 = setup.ranges().iter().map(length).sum();
            assert!(asked <= before + READ_AHEAD + 2 * PART, "{asked} bytes asked for after {before} were read");
            read(weights, entry, 0..entry.len).unwrap();
        }
        assert!(further_on.join().unwrap() == setup.stored()[&last.name]);
    });
}

#[test]
fn devices_sharing_a_small_stream_budget_do_not_deadlock() {
    let setup = Setup::new();
    let (home, repo) = (setup.dir.path().join("home"), setup.repo());
    let (local, _) = run(&["--model", repo.to_str().unwrap(), "--micro-batch-tokens", "64"], &setup.hub, &home);
    for devices in ["cpu:2", "cpu:4"] {
        let options = ["--model", ID, "--micro-batch-tokens", "64", "--devices", devices, "--stream-budget", "64KiB"];
        let (streamed, metadata) = run(&options, &setup.hub, &home);
        assert_eq!(streamed, Results { model: ID.to_owned(), ..local.clone() }, "{devices}");
        assert_eq!(metadata.weight_bytes_read, metadata.weight_bytes_expected, "{devices}");
    }
}

#[test]
fn unannounced_ranges_can_be_read() {
    let setup = patient(Setup::new());
    let checkpoint = setup.stream();
    let weights = &*checkpoint.weights;
    let entry = weights.entry("lm_head.weight").unwrap().clone();
    let stored = &setup.stored()["lm_head.weight"];
    assert!(read(weights, &entry, 0..entry.len).unwrap() == *stored);
    weights.announce(&announced(std::slice::from_ref(&entry)), 0);
    // In pieces, twice, and across the rest.
    for range in [10..20, 0..entry.len, 5..entry.len - 5, 0..entry.len] {
        let expected = &stored[range.start as usize..range.end as usize];
        assert!(read(weights, &entry, range.clone()).unwrap() == expected, "{range:?}");
    }
}

#[test]
fn high_latency_changes_no_byte() {
    let setup = patient(Setup::new());
    let wire = Wire { latency: Duration::from_millis(30), bytes_per_second: Some(40_000_000) };
    let hub = MockHub::behind(wire, [Repo::new(ID, &setup.repo())]).unwrap();
    let options = HubOptions { endpoint: hub.url(), ..setup.options() };
    let checkpoint = Hub::new(options).unwrap().stream(ID, "main", READ_AHEAD, &|_| ()).unwrap();
    assert!(read_all(&*checkpoint.weights).unwrap() == setup.stored());
}
