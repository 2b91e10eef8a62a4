//! How full the wire from the hub is while weights stream, verified or not: a real HTTP server
//! behind a wire of known length and width, a model of several shards, and a reader that takes
//! every tensor as it comes.
//!
//! `cargo bench --workspace --bench hub -- [MEGABYTES]`
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed measurement")]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use outliers_tests::hub::{MockHub, Repo, Wire};
use outliers_worker::checkpoint::hub::{Hub, HubOptions};
use outliers_worker::checkpoint::safetensors::{StoredDtype, TensorSpec, Writer};
use outliers_worker::checkpoint::source::{Checkpoint, PlannedRead};

const ID: &str = "owner/model";
const SHARDS: usize = 6;
/// Rows of a tensor of 2 MiB each.
const ROWS: u64 = 1 << 10;
const COLUMNS: u64 = 1 << 10;
const READ_AHEAD: u64 = 512 << 20;

fn main() {
    let megabytes: usize = std::env::args().filter_map(|argument| argument.parse().ok()).next().unwrap_or(600);
    let dir = tempfile::tempdir().unwrap();
    let repo = dir.path().join("repo");
    make(&repo, megabytes / SHARDS / 2);
    println!(
        "{:>10} {:>12} {:>9} {:>9} {:>9} {:>9} {:>13} {:>10}",
        "latency", "wire MB/s", "verified", "MB", "seconds", "MB/s", "of the wire", "requests"
    );
    let wires = [(0, None), (0, Some(100)), (100, Some(50)), (100, Some(100)), (100, Some(200)), (100, Some(400))];
    for ((latency, width), hash_memory) in wires.into_iter().flat_map(|wire| [(wire, 0), (wire, READ_AHEAD)]) {
        let wire = Wire {
            latency: Duration::from_millis(latency),
            bytes_per_second: width.map(|width: u64| width * 1_000_000),
        };
        let hub = MockHub::behind(wire, [Repo::new(ID, &repo)]).unwrap();
        let options = HubOptions { endpoint: hub.url(), ..HubOptions::new(dir.path().join("cache")) };
        let checkpoint = Hub::new(options).unwrap().stream(ID, "main", READ_AHEAD, &|_| ()).unwrap();
        let before = hub.requests().len();
        let (bytes, seconds) = read(&checkpoint, hash_memory);
        let verified = checkpoint.weights.verified().len();
        let rate = bytes as f64 / seconds / 1e6;
        let of_wire = width.map_or_else(|| "-".to_owned(), |width| format!("{:.1} %", 100.0 * rate / width as f64));
        let shown = width.map_or_else(|| "unlimited".to_owned(), |width| width.to_string());
        let (megabytes, requests) = (bytes as f64 / 1e6, hub.requests().len() - before);
        println!(
            "{latency:>7} ms {shown:>12} {verified:>3} of {SHARDS} {megabytes:>9.0} {seconds:>9.2} {rate:>9.0} {of_wire:>13} {requests:>10}"
        );
    }
}

/// Reads all tensors in order, each a unit, and waits for the hashes; bytes and seconds.
fn read(checkpoint: &Checkpoint, hash_memory: u64) -> (u64, f64) {
    let weights = &*checkpoint.weights;
    let entries: Vec<_> = weights.names().map(|name| weights.entry(name).unwrap().clone()).collect();
    let wanted = entries.iter().enumerate().map(|(unit, entry)| PlannedRead {
        file: entry.file,
        bytes: entry.offset..entry.offset + entry.len,
        layer: unit / 4,
        unit: unit / 4,
    });
    let wanted: Vec<PlannedRead> = wanted.collect();
    let mut bytes = Vec::new();
    let start = Instant::now();
    weights.announce(&wanted, hash_memory);
    for entry in &entries {
        bytes.resize(entry.len as usize, 0);
        weights.read(entry, 0..entry.len, &mut bytes).unwrap();
    }
    weights.verify().unwrap();
    (weights.bytes_read(), start.elapsed().as_secs_f64())
}

fn make(folder: &Path, tensors: usize) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), "{}").unwrap();
    let mut map = BTreeMap::new();
    let bytes: Vec<u8> = (0..ROWS * COLUMNS * 2).map(|i| (i % 251) as u8).collect();
    for shard in 0..SHARDS {
        let file = format!("model-{shard}-of-{SHARDS}.safetensors");
        let name = |tensor: usize| format!("layers.{shard}.{tensor:04}");
        let specs: Vec<TensorSpec> =
            (0..tensors).map(|t| TensorSpec::new(name(t), StoredDtype::BF16, &[ROWS, COLUMNS])).collect();
        let writer = Writer::create(&folder.join(&file), &specs, &BTreeMap::new()).unwrap();
        for tensor in 0..tensors {
            writer.write(&name(tensor), 0, &bytes).unwrap();
            map.insert(name(tensor), file.clone());
        }
        writer.finish().unwrap();
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}
