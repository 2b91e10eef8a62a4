//! Model folders with unusual content: several sets of weights, views in pickles, files with a
//! wrong extension. Results must equal those of transformers, as recorded in the fixtures.

use std::fs;
use std::path::Path;

use outliers_protocol::{FailureKind, Inspection, Metadata, files};
use outliers_tests::context::TestContext;
use outliers_tests::golden::assert_activations_equal;
use outliers_tests::programs::{golden, run_worker};
use outliers_tests::torch::{self, Tensor};
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

use crate::worker::{copy, failure, read, run_like};

const FIXTURE: &str = "llama-f32";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Runs a model whose results must equal those of transformers for a fixture.
fn run_as(name: &str, model: &Path) -> Metadata {
    let output = run_like(name, model, &["--save-activations", "activations.safetensors"]);
    let compared = assert_activations_equal(
        &golden(name).join("golden.safetensors"),
        &output.path().join("activations.safetensors"),
    );
    assert!(compared > 8, "only {compared} tensors compared");
    read(output.path(), files::METADATA)
}

/// An index that puts all tensors of the only file into others.
fn index_to(model: &Path, shards: &[&str]) {
    let file = fs::read(golden(FIXTURE).join("model").join(SINGLE)).unwrap();
    let names = SafeTensors::deserialize(&file).unwrap().names().into_iter().map(str::to_owned).collect::<Vec<_>>();
    let map: serde_json::Map<_, _> =
        names.into_iter().enumerate().map(|(i, name)| (name, shards[i % shards.len()].into())).collect();
    fs::write(model.join(INDEX), json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
}

fn inspect(model: &Path) -> Inspection {
    let run = run_worker(["inspect", "--json", "--model", model.to_str().unwrap()]);
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    serde_json::from_slice(&run.stdout).unwrap()
}

#[test]
fn single_weight_file_wins_over_an_older_index_and_shard() {
    let model = copy(FIXTURE);
    let shard = "model-00001-of-00001.safetensors";
    index_to(model.path(), &[shard]);
    let mut old = fs::read(model.path().join(SINGLE)).unwrap();
    let end = old.len();
    old[end - 4000..].fill(0);
    fs::write(model.path().join(shard), old).unwrap();
    let notes = run_as(FIXTURE, model.path()).model.checkpoint_notes;
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(notes[0].contains("two sets of weights") && notes[0].contains(shard), "{notes:?}");
    assert_eq!(inspect(model.path()).checkpoint_notes, notes);
    let run = run_worker(["inspect", "--model", model.path().to_str().unwrap()]);
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(said.contains("WARN") && said.contains("two sets of weights"), "{said}");
    let said = TestContext::new().run(["inspect", "--model", model.path().to_str().unwrap()]).ok();
    assert!(said.stdout.contains("note: two sets of weights lie here: model.safetensors, which is read"), "{said:?}");
    let lines = |word: &str| said.stdout.lines().filter(|line| line.contains(word)).count();
    assert!(lines(".*.") > 0 && lines("layers.0.") == 0, "layers that are alike share a line: {said:?}");
}

#[test]
fn single_weight_file_is_used_when_indexed_shards_are_missing() {
    let model = copy(FIXTURE);
    index_to(model.path(), &["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
    let notes = run_as(FIXTURE, model.path()).model.checkpoint_notes;
    assert!(
        notes[0].contains("names files that are not there (model-00001-of-00002.safetensors, model-00002"),
        "{notes:?}"
    );
    fs::remove_file(model.path().join(SINGLE)).unwrap();
    let (kind, said) = failure(model.path(), &[]);
    assert_eq!(kind, FailureKind::Checkpoint);
    assert!(
        said.contains("does not have: model-00001-of-00002.safetensors, model-00002-of-00002.safetensors |"),
        "{said}"
    );
}

#[test]
fn ordinary_checkpoint_has_no_notes() {
    assert_eq!(inspect(&golden(FIXTURE).join("model")).checkpoint_notes, Vec::<String>::new());
}

/// The same weights as pickled views: matrices column-major, vectors with stride 2, and a buffer
/// of complex numbers.
fn as_views(model: &Path) {
    let file = fs::read(model.join(SINGLE)).unwrap();
    let view = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        assert_eq!(view.dtype(), Dtype::F32);
        let values = view.data().as_chunks::<4>().0;
        let shape: Vec<u64> = view.shape().iter().map(|n| *n as u64).collect();
        let (strides, stored): (_, Vec<[u8; 4]>) = match view.shape() {
            &[rows, columns] => {
                let by_column = (0..columns * rows).map(|i| values[i % rows * columns + i / rows]).collect();
                (vec![1, rows as u64], by_column)
            }
            _ => (vec![2], values.iter().flat_map(|value| [*value, [0xff; 4]]).collect()),
        };
        Tensor { name, storage: "FloatStorage", size: 4, shape, strides, bytes: stored.concat() }
    };
    let mut tensors: Vec<Tensor> = SafeTensors::deserialize(&file).unwrap().tensors().into_iter().map(view).collect();
    let (name, shape) = ("freqs_cis".to_owned(), vec![3]);
    tensors.push(Tensor { name, storage: "ComplexFloatStorage", size: 8, shape, strides: vec![1], bytes: vec![0; 24] });
    torch::save(&model.join("pytorch_model.bin"), &tensors).unwrap();
    fs::remove_file(model.join(SINGLE)).unwrap();
}

#[test]
fn pickled_views_equal_plain_tensors() {
    let model = copy(FIXTURE);
    as_views(model.path());
    let metadata = run_as(FIXTURE, model.path());
    assert_eq!(metadata.weight_bytes_read, metadata.weight_bytes_expected);
    assert_eq!(metadata.model.unexplained, ["freqs_cis"]);
    assert_eq!(metadata.model.stored_dtypes.keys().collect::<Vec<_>>(), ["F32"]);
}

#[test]
fn lfs_pointers_web_pages_and_empty_files_are_named() {
    let text: &[&str] = &["--sequence-length", "32", "--num-sequences", "1"];
    let files = [
        (FIXTURE, "config.json"),
        (FIXTURE, SINGLE),
        (FIXTURE, "tokenizer.json"),
        (FIXTURE, "tokenizer_config.json"),
        ("olmoe-f32-sharded", INDEX),
        ("olmoe-f32-sharded", "model-00002-of-00003.safetensors"),
        ("opt-bin", "pytorch_model.bin"),
        ("opt-bin", "vocab.json"),
        ("opt-bin", "merges.txt"),
        ("kimi-k2-fp8", "tiktoken.model"),
    ];
    let stand_ins: [(&[u8], &str, &str); 3] = [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 988097824\n",
            "Git LFS pointer",
            "`git lfs pull`",
        ),
        (b"<!DOCTYPE html>\n<html class=\"\"><title>Sign in</title></html>\n", "HTML page", "fetch the file again"),
        (b"", "it is empty", "fetch the file again"),
    ];
    for (name, file) in files {
        let model = copy(name);
        assert!(model.path().join(file).is_file(), "{name}: {file}");
        for (content, says, hint) in stand_ins {
            fs::write(model.path().join(file), content).unwrap();
            let (kind, said) = failure(model.path(), text);
            assert_eq!(kind, FailureKind::Checkpoint, "{said}");
            assert!(said.contains(says) && said.contains(hint) && said.contains(file), "{file}: {said}");
        }
    }
}

#[test]
fn tied_head_crosses_to_a_gpu_in_a_plan() {
    let inspected = inspect(&golden("llama-bf16-sharded-tied").join("model"));
    assert!(inspected.tied_head);
    let plan = &inspected.plan;
    // Rows of the embedding that are used, each once as it is stored, and which one each token has.
    let tokens = (plan.sequences * plan.tokens_per_sequence) as u64;
    let vocab = inspected.vocab as u64;
    let used = tokens.min(vocab) * (inspected.embedding_bytes / vocab);
    assert_eq!(plan.on_gpus.host_to_device_bytes, plan.bytes_to_read + used + 4 * tokens);
    // It is kept on the host, beside what the driver takes there.
    assert!(plan.host_memory_bytes > inspected.embedding_bytes + (512 << 20), "{}", plan.host_memory_bytes);
}
