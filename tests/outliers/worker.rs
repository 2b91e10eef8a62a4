//! The worker alone: exact against the reference for any split of the work, and clear errors for
//! bad input.

use std::path::Path;

use outliers_protocol::{FailureKind, Manifest, Metadata, Outcome, Results, files};
use outliers_tests::golden::{assert_activations_equal, assert_statistics_equal};
use outliers_tests::programs::{golden, goldens, run_worker};
use serde::de::DeserializeOwned;

use crate::rewrite::spec_of;

pub(crate) fn read<T: DeserializeOwned>(folder: &Path, name: &str) -> T {
    let text = std::fs::read(folder.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Runs a fixture; returns the output folder.
pub(crate) fn run_fixture(name: &str, more: &[&str]) -> tempfile::TempDir {
    run_like(name, &golden(name).join("model"), more)
}

/// Runs a model over the token ids of a fixture; returns the output folder.
pub(crate) fn run_like(name: &str, model: &Path, more: &[&str]) -> tempfile::TempDir {
    let output = tempfile::tempdir().unwrap();
    let ids = golden(name).join("golden.safetensors");
    let mut arguments = vec!["run", "--model", model.to_str().unwrap(), "--token-ids", ids.to_str().unwrap()];
    arguments.extend(["--output", output.path().to_str().unwrap(), "--precision", "f32"]);
    arguments.extend(more);
    let run = run_worker(arguments);
    assert!(run.status.success(), "{name}: {}", String::from_utf8_lossy(&run.stderr));
    output
}

#[test]
fn fixtures_equal_the_reference() {
    let names = goldens();
    assert!(names.len() >= 47, "{names:?}");
    // With the worker's loops, and with the tensor library's operations for which GPUs have no
    // kernel of the worker.
    for (name, how) in names.iter().flat_map(|name| [(name, None), (name, Some("--composed"))]) {
        let options = ["--save-activations", "activations.safetensors"].into_iter().chain(how);
        let output = run_fixture(name, &options.collect::<Vec<_>>());
        let fixture = golden(name);
        let compared = assert_activations_equal(
            &fixture.join("golden.safetensors"),
            &output.path().join("activations.safetensors"),
        );
        // Every studied site, token ids, logits and likelihoods; router choices and the last norm
        // where there are any.
        let least = spec_of(&fixture.join("model")).sites().len() + 3;
        assert!(compared >= least, "{name}: only {compared} of {least} tensors compared");
        assert_statistics_equal(&fixture.join("outliers.json"), &read(output.path(), files::RESULTS));
    }
}

#[test]
fn micro_batch_size_changes_no_count_and_no_weight_is_read_twice() {
    for name in goldens() {
        // A matrix product of other dimensions is summed in another order: counts are exact,
        // values equal up to rounding.
        let one_by_one = run_fixture(&name, &["--micro-batch-tokens", "1", "--save-activations", "a.safetensors"]);
        let fixture = golden(&name);
        assert_activations_equal(&fixture.join("golden.safetensors"), &one_by_one.path().join("a.safetensors"));
        assert_statistics_equal(&fixture.join("outliers.json"), &read(one_by_one.path(), files::RESULTS));
        // However many tokens there are.
        let few: Metadata = read(run_fixture(&name, &["--num-sequences", "1"]).path(), files::METADATA);
        let many: Metadata = read(one_by_one.path(), files::METADATA);
        assert_eq!(few.weight_bytes_read, few.weight_bytes_expected, "{name}");
        assert_eq!(many.weight_bytes_read, few.weight_bytes_read, "{name}");
        assert!(many.corpus.sequences > few.corpus.sequences);
    }
}

#[test]
fn manifest_lists_the_hash_of_every_file() {
    let output = run_fixture("olmoe-bf16", &[]);
    let manifest: Manifest = read(output.path(), files::MANIFEST);
    assert_eq!(manifest.outcome, Outcome::Complete);
    for name in [files::RESULTS, files::METADATA, files::STATISTICS, files::JOB] {
        let entry =
            manifest.files.iter().find(|f| f.name == name).unwrap_or_else(|| panic!("{name} is not in the manifest"));
        let bytes = std::fs::read(output.path().join(name)).unwrap();
        assert_eq!(entry.bytes, bytes.len() as u64);
        assert_eq!(entry.sha256, outliers_tests::sha256(&bytes));
    }
}

#[test]
fn first_layers_alone_equal_those_of_the_full_pass() {
    let whole: Results = read(run_fixture("olmoe-bf16", &[]).path(), files::RESULTS);
    let first: Results = read(run_fixture("olmoe-bf16", &["--layers", "2"]).path(), files::RESULTS);
    assert_eq!((first.n_layers, first.n_sites), (2, 4));
    assert_eq!(first.sites[..], whole.sites[..4]);
    assert_eq!(first.perplexity, None);
}

#[test]
fn text_run_is_repeatable() {
    let model = golden("llama-f32").join("model");
    let run = || {
        let output = tempfile::tempdir().unwrap();
        let arguments = ["run", "--model", model.to_str().unwrap(), "--num-sequences", "3", "--sequence-length", "64"];
        let run = run_worker(arguments.into_iter().chain(["--output", output.path().to_str().unwrap()]));
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let metadata: Metadata = read(output.path(), files::METADATA);
        assert_eq!((metadata.host_to_device_bytes, metadata.device_to_host_bytes), (None, None), "CPUs copy nothing");
        (read::<Results>(output.path(), files::RESULTS), metadata.corpus)
    };
    let ((a, a_corpus), (b, b_corpus)) = (run(), run());
    assert_eq!(a, b);
    assert_eq!(a_corpus, b_corpus);
    assert_eq!((a.sequences, a.tokens_per_sequence), (3, 64));
}

#[test]
fn toml_and_json_job_files_give_the_same_job() {
    let folder = tempfile::tempdir().unwrap();
    let (model, ids) = (golden("llama-f32").join("model"), golden("llama-f32").join("golden.safetensors"));
    let toml = format!(
        "precision = \"f32\"\ndevices = [\"cpu:2\"]\n[model.folder]\npath = {model:?}\n[corpus.source]\ntoken_ids = {ids:?}\n\
         [thresholds]\nmagnitude = 5.0\n"
    );
    let json = serde_json::json!({
        "precision": "f32", "devices": ["cpu:2"], "model": {"folder": {"path": model}},
        "corpus": {"source": {"token_ids": ids}}, "thresholds": {"magnitude": 5.0},
    });
    let results = [("job.toml", toml), ("job.json", json.to_string())].map(|(name, text)| {
        let (job, output) = (folder.path().join(name), folder.path().join(format!("{name}.out")));
        std::fs::write(&job, text).unwrap();
        let run = run_worker(["run".as_ref(), job.as_os_str(), "--output".as_ref(), output.as_os_str()]);
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        read::<Results>(&output, files::RESULTS)
    });
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0].thresholds.magnitude, 5.0);
}

// --------------------------------------------------------------------------------------- bad input

/// A copy of a fixture's model, to change.
pub(crate) fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(name).join("model")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    folder
}

/// Runs a job that must fail: manifest, exit code and standard error must agree.
pub(crate) fn failure(model: &Path, more: &[&str]) -> (FailureKind, String) {
    let output = tempfile::tempdir().unwrap();
    let mut arguments = vec!["run", "--model", model.to_str().unwrap(), "--output", output.path().to_str().unwrap()];
    arguments.extend(more);
    let run = run_worker(arguments);
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(!run.status.success(), "it should have failed");
    assert!(!said.contains("panicked"), "{said}");
    let manifest: Manifest = read(output.path(), files::MANIFEST);
    let Outcome::Failed(failure) = manifest.outcome else { panic!("the manifest says complete") };
    assert!(said.contains(&failure.message), "{said}");
    assert_eq!(run.status.code(), Some(if failure.kind == FailureKind::Job { 2 } else { 1 }));
    assert!(!output.path().join(files::RESULTS).exists());
    (failure.kind, failure.message + " | " + &failure.hint.unwrap_or_default())
}

pub(crate) fn edit_config(model: &Path, edit: impl Fn(&mut serde_json::Value)) {
    let path = model.join("config.json");
    let mut config = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    std::fs::write(path, config.to_string()).unwrap();
}

#[test]
fn unknown_architectures_and_options_are_refused_by_name() {
    let model = copy("llama-f32");
    edit_config(model.path(), |c| c["architectures"][0] = "MambaForCausalLM".into());
    let (kind, said) = failure(model.path(), &[]);
    assert_eq!(kind, FailureKind::Unsupported);
    assert!(
        said.contains("MambaForCausalLM") && said.contains("OlmoeForCausalLM") && said.contains("LlamaForCausalLM"),
        "{said}"
    );
    for (key, value) in [
        ("hidden_act", serde_json::json!("relu")),
        ("quantization_config", serde_json::json!({"quant_method": "gptq"})),
        ("rope_scaling", serde_json::json!({"rope_type": "longrope", "factor": 4.0})),
    ] {
        let model = copy("llama-f32");
        edit_config(model.path(), |c| c[key] = value.clone());
        let (kind, said) = failure(model.path(), &[]);
        assert_eq!(kind, FailureKind::Unsupported, "{said}");
    }
}

#[test]
fn checkpoint_contradicting_its_config_is_refused_before_reading() {
    for (key, value, word) in [
        ("intermediate_size", 97, "has shape"),
        ("num_hidden_layers", 4, "model.layers.3."),
        ("num_attention_heads", 3, "heads"),
        ("vocab_size", 5, "model.embed_tokens.weight"),
    ] {
        let model = copy("llama-f32");
        edit_config(model.path(), |c| c[key] = value.into());
        let (kind, said) = failure(model.path(), &[]);
        assert_eq!(kind, FailureKind::Checkpoint, "{said}");
        assert!(said.contains(word), "{key}: {said}");
    }
}

#[test]
fn damaged_files_are_named() {
    let model = copy("olmoe-f32-sharded");
    let shard = model.path().join("model-00002-of-00003.safetensors");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 10]).unwrap();
    let (kind, said) = failure(model.path(), &[]);
    assert_eq!(kind, FailureKind::Checkpoint, "{said}");
    assert!(said.contains("model-00002-of-00003"), "{said}");
    std::fs::write(&shard, [&(1u64 << 60).to_le_bytes()[..], &bytes[8..]].concat()).unwrap();
    assert!(failure(model.path(), &[]).1.contains("model-00002-of-00003"));
    std::fs::remove_file(&shard).unwrap();
    assert!(failure(model.path(), &[]).1.contains("model-00002-of-00003"));
}

#[test]
fn nan_weights_are_named() {
    let model = copy("llama-f32");
    let path = model.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let (kind, said) = failure(model.path(), &["--sequence-length", "32", "--num-sequences", "1"]);
    assert_eq!(kind, FailureKind::Checkpoint);
    assert!(said.contains("NaN at element") && said.contains("tensor "), "{said}");
}

#[test]
fn texts_shorter_than_a_window_are_refused_with_token_counts() {
    let model = golden("llama-f32").join("model");
    let text = tempfile::NamedTempFile::new().unwrap();
    let path = text.path().to_str().unwrap();
    let (kind, said) = failure(&model, &["--corpus", path]);
    assert_eq!(kind, FailureKind::Corpus, "{said}");
    std::fs::write(text.path(), "Too short for a window.").unwrap();
    let (kind, said) = failure(&model, &["--corpus", path, "--sequence-length", "512"]);
    assert_eq!(kind, FailureKind::Corpus);
    assert!(said.contains("512"), "{said}");
    let olmoe = golden("olmoe-bf16").join("model");
    let (kind, said) = failure(&olmoe, &["--sequence-length", "5000"]);
    assert_eq!(kind, FailureKind::Job);
    assert!(said.contains("4096") && said.contains("5000"), "{said}");
}

#[test]
fn missing_inputs_are_job_errors() {
    let model = golden("llama-f32").join("model");
    assert_eq!(failure(Path::new("/no/such/folder"), &[]).0, FailureKind::Job);
    assert_eq!(failure(&model, &["--devices", "tpu:0"]).0, FailureKind::Job);
    assert_eq!(failure(&model, &["--layers", "0"]).0, FailureKind::Job);
    let (kind, said) = failure(&model, &["--devices", "cuda:0"]);
    assert_eq!(kind, FailureKind::Device, "{said}");
}
