use std::fs;

use outliers_protocol::FailureKind;
use serde_json::json;

use super::*;
use crate::checkpoint::safetensors::{TensorSpec, Writer};
use crate::checkpoint::torch::tests::testdata;

/// A weight file with f32 vectors; each value is its index in the tensor.
fn shard(folder: &Path, name: &str, tensors: &[(&str, u64)]) {
    let specs: Vec<_> = tensors.iter().map(|(name, len)| TensorSpec::new(*name, StoredDtype::F32, &[*len])).collect();
    let writer = Writer::create(&folder.join(name), &specs, &BTreeMap::new()).unwrap();
    for (name, len) in tensors {
        let bytes: Vec<u8> = (0..*len).flat_map(|i| (i as f32).to_le_bytes()).collect();
        writer.write(name, 0, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

fn index(folder: &Path, map: &[(&str, &str)]) {
    let map: BTreeMap<_, _> = map.iter().copied().collect();
    fs::write(folder.join(INDEX_FILE), json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string()).unwrap();
}

/// A folder with two unusually named shards and a file that the index does not name.
fn two_shards() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(CONFIG_FILE), r#"{"model_type":"x"}"#).unwrap();
    shard(dir.path(), "model-1-of-61.safetensors", &[("a", 4), ("b", 6)]);
    shard(dir.path(), "model 00002-of-000163 é.safetensors", &[("c", 2)]);
    fs::write(dir.path().join("consolidated.safetensors"), "not safetensors at all").unwrap();
    let first = "model-1-of-61.safetensors";
    index(dir.path(), &[("a", first), ("b", first), ("c", "model 00002-of-000163 é.safetensors")]);
    dir
}

fn refused(folder: &Path) -> WorkerError {
    Checkpoint::open_folder(folder).map(|_| ()).unwrap_err()
}

#[test]
fn ranges_of_a_sharded_checkpoint_are_read_and_counted() {
    let dir = two_shards();
    let checkpoint = Checkpoint::open_folder(dir.path()).unwrap();
    let weights = &checkpoint.weights;
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(weights.files().len(), 2);
    let b = weights.entry("b").unwrap();
    let mut two = [0; 8];
    weights.read(b, 12..20, &mut two).unwrap();
    assert_eq!(two, [3.0_f32.to_le_bytes(), 4.0_f32.to_le_bytes()].concat()[..]);
    assert_eq!(weights.bytes_read(), 8);
    assert_eq!(checkpoint.config["model_type"], "x");
    assert_eq!(checkpoint.config_sha256, format!("{:x}", Sha256::digest(r#"{"model_type":"x"}"#)));
}

#[test]
fn long_ranges_are_read_in_parts_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(CONFIG_FILE), r#"{"model_type":"x"}"#).unwrap();
    let len = 5 * READ_AT_ONCE as u64 / 8 + 3;
    shard(dir.path(), SINGLE_FILE, &[("before", 3), ("long", len)]);
    let checkpoint = Checkpoint::open_folder(dir.path()).unwrap();
    let weights = &checkpoint.weights;
    let long = weights.entry("long").unwrap();
    let whole: Vec<u8> = (0..len).flat_map(|i| (i as f32).to_le_bytes()).collect();
    for range in [0..whole.len(), 5..whole.len() - 1, 7..8 + READ_AT_ONCE, 9..9 + READ_AT_ONCE] {
        let mut into = vec![0; range.len()];
        weights.read(long, range.start as u64..range.end as u64, &mut into).unwrap();
        assert!(into == whole[range.clone()], "{range:?}");
    }
    let file = fs::OpenOptions::new().write(true).open(dir.path().join(SINGLE_FILE)).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    let error = weights.read(long, 0..whole.len() as u64, &mut vec![0; whole.len()]).unwrap_err();
    assert!(error.message().contains("became shorter"), "{error}");
}

#[test]
fn ranges_outside_the_tensor_are_internal_errors() {
    let dir = two_shards();
    let weights = Checkpoint::open_folder(dir.path()).unwrap().weights;
    let a = weights.entry("a").unwrap();
    for (range, room) in [(12..20, 8), (0..8, 4), (20..24, 4), (u64::MAX - 1..u64::MAX, 1)] {
        assert_eq!(weights.read(a, range, &mut vec![0; room]).unwrap_err().kind(), FailureKind::Internal);
    }
    assert_eq!(weights.bytes_read(), 0);
}

#[test]
fn single_file_needs_no_index() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(CONFIG_FILE), "{}").unwrap();
    let error = refused(dir.path());
    assert!(
        error.message().contains("has no weights: neither model.safetensors nor model.safetensors.index.json"),
        "{error}"
    );
    shard(dir.path(), SINGLE_FILE, &[("a", 1)]);
    assert!(Checkpoint::open_folder(dir.path()).unwrap().weights.entry("a").is_some());
}

/// A folder like OPT's: no safetensors, and copies for TensorFlow and Flax.
fn pickled() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(CONFIG_FILE), "{}").unwrap();
    fs::copy(testdata("tensors.bin"), dir.path().join("pytorch_model.bin")).unwrap();
    fs::write(dir.path().join("tf_model.h5"), "not wanted").unwrap();
    fs::write(dir.path().join("flax_model.msgpack"), "not wanted").unwrap();
    dir
}

#[test]
fn trap_1_pickles_are_read_without_safetensors() {
    let dir = pickled();
    let weights = Checkpoint::open_folder(dir.path()).unwrap().weights;
    assert_eq!(weights.files().iter().map(|file| file.name.as_str()).collect::<Vec<_>>(), ["pytorch_model.bin"]);
    let rows = weights.entry("rows").unwrap();
    assert_eq!((&rows.dtype, &rows.shape[..]), (&StoredDtype::F32, &[2, 4][..]));
    let mut two = [0; 8];
    weights.read(rows, 4..12, &mut two).unwrap();
    assert_eq!(two, [5.0_f32 / 8.0, 6.0 / 8.0].map(f32::to_le_bytes).concat()[..]);
    assert_eq!(weights.bytes_read(), 8);
}

#[test]
fn views_of_pickled_tensors_are_read_in_row_major_order() {
    let dir = pickled();
    let weights = Checkpoint::open_folder(dir.path()).unwrap().weights;
    let read = |name: &str| {
        let entry = weights.entry(name).unwrap();
        let mut bytes = vec![0; entry.len as usize];
        weights.read(entry, 0..entry.len, &mut bytes).unwrap();
        let eighths = bytes.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value) * 8.0).collect::<Vec<_>>();
        (entry.shape.clone(), eighths)
    };
    let by_column = vec![0.0, 4.0, 8.0, 1.0, 5.0, 9.0, 2.0, 6.0, 10.0, 3.0, 7.0, 11.0];
    assert_eq!(read("strided.transposed"), (vec![4, 3], by_column));
    assert_eq!(read("strided.expanded"), (vec![2, 4], vec![0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0]));
    assert_eq!(read("strided.every_other"), (vec![3, 2], vec![0.0, 2.0, 4.0, 6.0, 8.0, 10.0]));
    assert_eq!(weights.bytes_read(), 48 + 32 + 24);
}

#[test]
fn trap_1_sharded_pickles_are_read() {
    let dir = pickled();
    let (first, second) = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin");
    fs::rename(dir.path().join("pytorch_model.bin"), dir.path().join(first)).unwrap();
    fs::copy(testdata("second.bin"), dir.path().join(second)).unwrap();
    let map = |second: &str| json!({"weight_map": {"f32": first, "second": second}}).to_string();
    let index = dir.path().join(Container::Torch.index_file());
    fs::write(&index, map(second)).unwrap();
    let weights = Checkpoint::open_folder(dir.path()).unwrap().weights;
    let mut all = [0; 6];
    weights.read(weights.entry("second").unwrap(), 0..6, &mut all).unwrap();
    assert_eq!(all, [0.0, 1.0, 2.0].map(half::f16::from_f32).map(half::f16::to_le_bytes).concat()[..]);
    fs::write(&index, map(first)).unwrap();
    assert!(
        refused(dir.path()).message().contains("pytorch_model.bin.index.json names tensors that its files do not hold")
    );
    fs::write(&index, map("model.safetensors")).unwrap();
    assert!(refused(dir.path()).message().contains("not a plain *.bin"));
    fs::write(&index, map(second)).unwrap();
    fs::remove_file(dir.path().join(second)).unwrap();
    assert!(refused(dir.path()).message().contains("pytorch_model.bin.index.json names files that"));
}

#[test]
fn trap_2_of_several_copies_exactly_one_is_used() {
    let dir = pickled();
    let used = || {
        let weights = Checkpoint::open_folder(dir.path()).unwrap().weights;
        weights.files().iter().map(|file| file.name.clone()).collect::<Vec<_>>()
    };
    for extra in ["original", "metal"] {
        fs::create_dir(dir.path().join(extra)).unwrap();
        shard(&dir.path().join(extra), SINGLE_FILE, &[("a", 9)]);
    }
    for extra in ["consolidated.00.pt", "consolidated.safetensors", "rust_model.ot", "model.fp16.safetensors"] {
        fs::write(dir.path().join(extra), "not wanted").unwrap();
    }
    assert_eq!(used(), ["pytorch_model.bin"]);
    fs::remove_file(dir.path().join("pytorch_model.bin")).unwrap();
    // Each of these has priority over those before it.
    fs::copy(testdata("second.bin"), dir.path().join("shard.bin")).unwrap();
    let map = json!({"weight_map": {"second": "shard.bin"}}).to_string();
    fs::write(dir.path().join(Container::Torch.index_file()), map).unwrap();
    assert_eq!(used(), ["shard.bin"]);
    fs::copy(testdata("second.bin"), dir.path().join("pytorch_model.bin")).unwrap();
    assert_eq!(used(), ["pytorch_model.bin"]);
    shard(dir.path(), "shard.safetensors", &[("b", 1)]);
    index(dir.path(), &[("b", "shard.safetensors")]);
    assert_eq!(used(), ["shard.safetensors"]);
    shard(dir.path(), SINGLE_FILE, &[("a", 1)]);
    assert_eq!(used(), [SINGLE_FILE]);
}

#[test]
fn slices_preferred_by_transformers_are_refused() {
    let dir = pickled();
    fs::write(dir.path().join("shard-0000-model-00001-of-00001.safetensors"), "").unwrap();
    Checkpoint::open_folder(dir.path()).unwrap();
    fs::write(dir.path().join("shard-00000-model-00001-of-00001.safetensors"), "").unwrap();
    let error = refused(dir.path());
    assert_eq!(error.kind(), FailureKind::Unsupported);
    assert!(
        error.message().contains("distributed checkpoint (shard-00000-model-00001-of-00001.safetensors)"),
        "{error}"
    );
}

/// The names of the used files, and the notes on the choice.
fn choice(folder: &Path) -> (Vec<String>, Vec<String>) {
    let weights = Checkpoint::open_folder(folder).unwrap().weights;
    (weights.files().iter().map(|file| file.name.clone()).collect(), weights.notes().to_vec())
}

#[test]
fn only_weight_file_is_used_despite_an_index() {
    let single = vec![SINGLE_FILE.to_owned()];
    let dir = two_shards();
    shard(dir.path(), SINGLE_FILE, &[("a", 1)]);
    let others = "model 00002-of-000163 é.safetensors, model-1-of-61.safetensors";
    let two_sets = "two sets of weights lie here: model.safetensors, which is read, as transformers does, and the files that \
                    model.safetensors.index.json names";
    assert_eq!(choice(dir.path()), (single.clone(), vec![format!("{two_sets} ({others}), which are not")]));
    index(dir.path(), &[("a", SINGLE_FILE), ("c", "model-1-of-61.safetensors")]);
    let note = format!("{two_sets} (model-1-of-61.safetensors), which are not");
    assert_eq!(choice(dir.path()), (single.clone(), vec![note]));
    index(dir.path(), &[("a", "gone.safetensors")]);
    let gone = "model.safetensors is read, as transformers does; model.safetensors.index.json beside it names files that are not there \
                (gone.safetensors)";
    assert_eq!(choice(dir.path()), (single.clone(), vec![gone.to_owned()]));
    fs::write(dir.path().join(INDEX_FILE), "{").unwrap();
    let (used, notes) = choice(dir.path());
    assert_eq!((used, notes.len()), (single.clone(), 1));
    assert!(
        notes[0].starts_with("model.safetensors is read; model.safetensors.index.json beside it is not"),
        "{notes:?}"
    );
    index(dir.path(), &[("a", SINGLE_FILE), ("b", SINGLE_FILE)]);
    assert_eq!(choice(dir.path()), (single, Vec::new()), "nothing else is named");
}

#[test]
fn config_can_name_the_weight_file() {
    let dir = two_shards();
    shard(dir.path(), SINGLE_FILE, &[("a", 1)]);
    shard(dir.path(), "best.safetensors", &[("a", 3)]);
    fs::rename(dir.path().join(INDEX_FILE), dir.path().join("old.safetensors.index.json")).unwrap();
    let name = |value: serde_json::Value| {
        fs::write(dir.path().join(CONFIG_FILE), json!({ "transformers_weights": value }).to_string()).unwrap();
    };
    for (file, used) in [
        (json!("best.safetensors"), &["best.safetensors"][..]),
        (json!("old.safetensors.index.json"), &["model 00002-of-000163 é.safetensors", "model-1-of-61.safetensors"]),
        (json!(null), &[SINGLE_FILE]),
    ] {
        name(file);
        assert_eq!(choice(dir.path()), (used.iter().map(ToString::to_string).collect(), Vec::new()));
    }
    for (file, says) in [
        (json!("gone.safetensors"), "there is no file gone.safetensors"),
        (json!("../best.safetensors"), "\"\\\"../best.safetensors\\\"\" is no safetensors file"),
        (json!("pytorch_model.bin"), "is no safetensors file"),
        (json!("pytorch_model.bin.index.json"), "is no safetensors file"),
        (json!(7), "\"7\" is no safetensors file"),
    ] {
        name(file);
        let error = refused(dir.path());
        assert!(error.message().contains("names its weights (transformers_weights): "), "{error}");
        assert!(error.message().contains(says) && error.hint_text().is_some(), "{error}");
    }
}

/// DeepSeek, Kimi, gpt-oss, and a single shard with a misleading name: the index decides, not the
/// names.
#[test]
fn trap_3_numbers_in_file_names_are_ignored() {
    for names in [
        &["model-00001-of-000163.safetensors", "model-00163-of-000163.safetensors"][..],
        &["model-1-of-61.safetensors", "model-61-of-61.safetensors"],
        &["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        &["model-00007-of-00009.safetensors"],
        &["1.safetensors", "weights.safetensors"],
    ] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CONFIG_FILE), "{}").unwrap();
        let tensors: Vec<String> = (0..names.len()).map(|i| format!("t{i}")).collect();
        for (name, tensor) in names.iter().zip(&tensors) {
            shard(dir.path(), name, &[(tensor, 1)]);
        }
        let map: Vec<_> = tensors.iter().map(String::as_str).zip(names.iter().copied()).collect();
        index(dir.path(), &map);
        let weights = Checkpoint::open_folder(dir.path()).unwrap().weights;
        assert_eq!(weights.files().iter().map(|file| file.name.as_str()).collect::<Vec<_>>(), names);
        assert_eq!(weights.names().count(), names.len());
    }
}

#[test]
fn tokenizer_files_are_listed() {
    let dir = pickled();
    let found = || Checkpoint::open_folder(dir.path()).unwrap().tokenizer().map(|files| files.to_string());
    assert_eq!(found(), None);
    for (name, says) in [
        ("merges.txt", None),
        ("tiktoken.model", Some("tiktoken.model")),
        ("vocab.json", Some("vocab.json + merges.txt")),
        ("tokenizer.json", Some("tokenizer.json")),
    ] {
        fs::write(dir.path().join(name), "").unwrap();
        assert_eq!(found().as_deref(), says);
    }
}

#[test]
fn missing_shard_is_named_with_its_folder() {
    let dir = two_shards();
    fs::remove_file(dir.path().join("model-1-of-61.safetensors")).unwrap();
    let error = refused(dir.path());
    assert_eq!(error.kind(), FailureKind::Checkpoint);
    assert!(error.message().contains("model-1-of-61.safetensors"), "{error}");
    assert!(error.message().contains(&dir.path().display().to_string()), "{error}");
}

#[test]
fn missing_shards_are_named_and_counted_and_complete_formats_named() {
    let dir = two_shards();
    let names: Vec<String> = (1..=8).map(|i| format!("gone-{i}.safetensors")).collect();
    let tensors: Vec<String> = (0..24).map(|i| format!("t{i}")).collect();
    let map: Vec<_> = tensors.iter().enumerate().map(|(i, t)| (t.as_str(), names[i % 8].as_str())).collect();
    index(dir.path(), &map);
    let error = refused(dir.path());
    let gone =
        "gone-1.safetensors, gone-2.safetensors, gone-3.safetensors, gone-4.safetensors, gone-5.safetensors and 3 more";
    assert!(error.message().ends_with(&format!("does not have: {gone}")), "{error}");
    assert!(error.hint_text().unwrap().contains("choose another revision"));
    // A second index does not help if its shards are missing, too.
    let torch_index = dir.path().join(Container::Torch.index_file());
    fs::write(&torch_index, json!({"weight_map": {"second": "second.bin"}}).to_string()).unwrap();
    assert!(refused(dir.path()).hint_text().unwrap().contains("choose another revision"));
    fs::copy(testdata("second.bin"), dir.path().join("second.bin")).unwrap();
    let hint = |error: WorkerError| error.hint_text().unwrap().to_owned();
    assert!(hint(refused(dir.path())).contains("pytorch_model.bin.index.json beside it is whole"));
    fs::copy(testdata("second.bin"), dir.path().join("pytorch_model.bin")).unwrap();
    assert!(hint(refused(dir.path())).contains("pytorch_model.bin beside it is whole"));
}

#[test]
fn contradictory_index_is_refused() {
    let first = "model-1-of-61.safetensors";
    for (map, says) in [
        (
            vec![("a", first), ("z", first)],
            "names tensors that its files do not hold: \"z\" (model-1-of-61.safetensors)",
        ),
        (vec![("a", first), ("c", first)], "its files do not hold: \"c\""),
        (vec![("a", "../../etc/x.safetensors")], "not a plain"),
        (vec![("a", "sub/x.safetensors")], "not a plain"),
        (vec![("a", "/etc/x.safetensors")], "not a plain"),
        (vec![("a", "pytorch_model.bin")], "not a plain"),
        (vec![], "names no tensor"),
    ] {
        let dir = two_shards();
        index(dir.path(), &map);
        let error = refused(dir.path());
        assert_eq!(error.kind(), FailureKind::Checkpoint);
        assert!(error.message().contains(says), "{error}");
    }
}

#[test]
fn indexed_but_absent_tensors_are_counted() {
    let dir = two_shards();
    let names: Vec<String> = (1..=7).map(|i| format!("z{i}")).collect();
    let map: Vec<_> = names.iter().map(|name| (name.as_str(), "model-1-of-61.safetensors")).collect();
    index(dir.path(), &map);
    let error = refused(dir.path());
    assert!(error.message().ends_with("\"z5\" (model-1-of-61.safetensors) and 2 more"), "{error}");
    assert_eq!(error.message().matches("\"z1\"").count(), 1);
}

const FIRST: &str = "model-1-of-61.safetensors";
const SECOND: &str = "model-2-of-61.safetensors";

/// Files that both contain `a`, with different lengths.
fn overlapping() -> tempfile::TempDir {
    let dir = two_shards();
    shard(dir.path(), SECOND, &[("a", 9), ("c", 1)]);
    dir
}

/// As in transformers: files are read in order of their names; the index only lists them.
#[test]
fn last_file_wins_for_a_tensor_in_two_files() {
    let dir = overlapping();
    let a = || Checkpoint::open_folder(dir.path()).unwrap().weights.entry("a").unwrap().shape.clone();
    index(dir.path(), &[("b", FIRST), ("c", SECOND), ("a", SECOND)]);
    assert_eq!((a(), choice(dir.path()).1), (vec![9], Vec::new()), "it is where the index says");
    index(dir.path(), &[("b", FIRST), ("c", SECOND), ("a", FIRST)]);
    let note = "tensors are read from other files than model.safetensors.index.json says, as transformers does: \
                \"a\" (model-2-of-61.safetensors, not model-1-of-61.safetensors)";
    assert_eq!((a(), choice(dir.path()).1), (vec![9], vec![note.to_owned()]));
    index(dir.path(), &[("a", FIRST), ("b", SECOND), ("c", SECOND)]);
    assert!(choice(dir.path()).1[0].contains("\"b\" (model-1-of-61.safetensors, not"), "only there");
}

#[test]
fn duplicate_tensor_without_an_index_is_refused() {
    let dir = overlapping();
    index(dir.path(), &[("b", FIRST), ("c", SECOND)]);
    let error = refused(dir.path());
    let says =
        "two files hold tensors of the same name: \"a\" (model-1-of-61.safetensors and model-2-of-61.safetensors)";
    assert!(error.message().ends_with(says), "{error}");
}

#[test]
fn damaged_files_are_named() {
    let truncate = |dir: &Path| {
        let file = File::options().write(true).open(dir.join("model-1-of-61.safetensors")).unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    };
    let bad_config = |dir: &Path| fs::write(dir.join(CONFIG_FILE), "{").unwrap();
    let list_config = |dir: &Path| fs::write(dir.join(CONFIG_FILE), "[]").unwrap();
    let bad_index = |dir: &Path| fs::write(dir.join(INDEX_FILE), r#"{"weight_map":[]}"#).unwrap();
    let no_config = |dir: &Path| fs::remove_file(dir.join(CONFIG_FILE)).unwrap();
    type Case<'a> = (&'a dyn Fn(&Path), &'static str);
    let cases: [Case<'_>; 5] = [
        (&truncate, "model-1-of-61.safetensors: tensor \"b\""),
        (&bad_config, "config.json"),
        (&list_config, "not a JSON object"),
        (&bad_index, INDEX_FILE),
        (&no_config, "has no config.json"),
    ];
    for (damage, says) in cases {
        let dir = two_shards();
        damage(dir.path());
        let error = refused(dir.path());
        assert_eq!(error.kind(), FailureKind::Checkpoint, "{error}");
        assert!(error.message().contains(says), "{error}");
    }
}

#[test]
fn file_truncated_while_in_use_is_an_error() {
    let dir = two_shards();
    let weights = Checkpoint::open_folder(dir.path()).unwrap().weights;
    let file = File::options().write(true).open(dir.path().join("model-1-of-61.safetensors")).unwrap();
    file.set_len(64).unwrap();
    let error = weights.read(weights.entry("b").unwrap(), 0..24, &mut [0; 24]).unwrap_err();
    assert!(error.message().contains("became shorter"), "{error}");
}

#[test]
fn missing_folder_is_a_job_error() {
    let error = refused(Path::new("/nonexistent/model"));
    assert_eq!(error.kind(), FailureKind::Job);
}
