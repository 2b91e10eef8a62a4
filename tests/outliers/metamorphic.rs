//! Transformations that must change no number, or exactly one: every family, on its fixture.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use outliers_protocol::{
    CorpusSource, CorpusSpec, JobSpec, Measurement, Metadata, ModelSource, Point, Results, SiteKind, files,
};
use outliers_tests::golden::TOLERANCE;
use outliers_tests::programs::{golden, goldens, run_worker, worker};
use outliers_worker::checkpoint::Model;
use outliers_worker::checkpoint::hub::{Hub, HubOptions};
use outliers_worker::checkpoint::source::Checkpoint;
use outliers_worker::model::decoder::{FfnSpec, Need, NormOrder, Role};
use outliers_worker::pass::ablation::Arms;
use outliers_worker::pass::meter::Meter;
use outliers_worker::pass::progress::ProgressSink;
use outliers_worker::pass::stream::Pass;
use outliers_worker::stats::{Scope, Study};
use outliers_worker::{corpus, device};
use safetensors::SafeTensors;

use crate::rewrite::{rewrite, spec_of};

/// Results, and every activation by name.
type Outcome = (Results, HashMap<String, Vec<f32>>);

/// Runs a checkpoint on a fixture's token ids.
fn run(model: &Path, ids: &Path) -> Outcome {
    let output = tempfile::tempdir().unwrap();
    let arguments =
        ["run", "--model", model.to_str().unwrap(), "--token-ids", ids.to_str().unwrap(), "--precision", "f32"];
    let save = ["--save-activations", "activations.safetensors", "--output", output.path().to_str().unwrap()];
    let run = run_worker(arguments.into_iter().chain(save));
    assert!(run.status.success(), "{}: {}", model.display(), String::from_utf8_lossy(&run.stderr));
    let results = serde_json::from_slice(&std::fs::read(output.path().join(files::RESULTS)).unwrap()).unwrap();
    let bytes = std::fs::read(output.path().join("activations.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = file.iter().filter(|(_, tensor)| tensor.dtype() == safetensors::Dtype::F32);
    let values = |data: &[u8]| data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    (results, floats.map(|(name, tensor)| (name.to_owned(), values(tensor.data()))).collect())
}

/// The same of a fixture as it is, once for all tests.
fn own_run(name: &str) -> &'static Outcome {
    static RUNS: Mutex<BTreeMap<String, &'static OnceLock<Outcome>>> = Mutex::new(BTreeMap::new());
    let cell = *RUNS.lock().unwrap().entry(name.to_owned()).or_insert_with(|| Box::leak(Box::new(OnceLock::new())));
    cell.get_or_init(|| run(&golden(name).join("model"), &ids_of(name)))
}

fn ids_of(name: &str) -> std::path::PathBuf {
    golden(name).join("golden.safetensors")
}

#[test]
fn a_quantised_or_transposed_checkpoint_equals_its_decoded_copy() {
    for name in goldens() {
        let copy = tempfile::tempdir().unwrap();
        let model = golden(&name).join("model");
        rewrite(&model, copy.path(), |_, _, _| {});
        let ((_, own), (_, decoded)) = (own_run(&name), run(copy.path(), &ids_of(&name)));
        assert_eq!(own.len(), decoded.len());
        for (tensor, values) in own {
            assert!(*values == decoded[tensor], "{name}: {tensor} differs");
        }
    }
}

/// Factor of a planted feature: a power of two, so that nothing is rounded.
const FACTOR: f32 = 4.0;

/// Matrices that read the mixer's norm, and those that read the feed-forward's.
const MIXER_INPUTS: &[Role] = &[
    Role::QProj,
    Role::KProj,
    Role::VProj,
    Role::QkvProj,
    Role::QAProj,
    Role::KvAProj,
    Role::DeltaQkvz,
    Role::DeltaBa,
    Role::DeltaQkv,
    Role::DeltaGate,
    Role::DeltaStrength,
    Role::DeltaStep,
    Role::DeltaGateDown,
    Role::DeltaStepDown,
    Role::MambaInput,
    Role::OutputGate,
];
const FFN_INPUTS: &[Role] = &[
    Role::GateProj,
    Role::UpProj,
    Role::GateUpProj,
    Role::Router,
    Role::SharedGate,
    Role::SharedUp,
    Role::SharedGateUp,
    Role::SharedExpertGate,
    Role::ExpertGate,
    Role::ExpertUp,
    Role::ExpertGateUp,
];

/// Scales feature `dim` up at every norm and the columns that read it down: the function is
/// unchanged, the feature's values grow.
fn plant(need: &Need, values: &mut [f32], dim: usize, zero_centred: bool, ffn_inputs: &[Role]) {
    match need.role {
        Role::MixerNorm | Role::FfnNorm if zero_centred => values[dim] = (values[dim] + 1.0) * FACTOR - 1.0,
        Role::MixerNorm | Role::FfnNorm | Role::MixerNormBias | Role::FfnNormBias => values[dim] *= FACTOR,
        role if MIXER_INPUTS.contains(&role) || ffn_inputs.contains(&role) => {
            values.chunks_mut(need.shape[1]).for_each(|row| row[dim] /= FACTOR);
        }
        _ => {}
    }
}

#[test]
fn planted_feature_changes_only_its_own_statistics() {
    for name in goldens() {
        let model = golden(&name).join("model");
        let spec = spec_of(&model);
        // After a post-norm the residual stream has the feature: the function would change there.
        if spec.layers[0].order == NormOrder::After {
            continue;
        }
        let zero_centred = spec.layers[0].norm.kind == outliers_worker::model::decoder::NormKind::RmsZeroCentred;
        let (before, old) = own_run(&name);
        // The feature that is nearest to the threshold of all: some families' values are small.
        let largest = |dim: usize| {
            let studied = old.iter().filter(|(tensor, _)| tensor.starts_with("layer."));
            let column =
                |values: &'_ Vec<f32>| values.iter().skip(dim).step_by(spec.hidden).fold(0f32, |m, v| m.max(v.abs()));
            studied.map(|(_, values)| column(values)).fold(0f32, f32::max)
        };
        let dim = (0..spec.hidden).max_by(|a, b| largest(*a).total_cmp(&largest(*b))).unwrap();
        let planted = tempfile::tempdir().unwrap();
        // If an MLP runs in parallel with the experts, router and experts read the residual
        // stream.
        let has_beside = |ffn: &FfnSpec| matches!(ffn, FfnSpec::Moe(moe) if moe.beside.is_some());
        let all_read = !spec.layers.iter().any(|layer| has_beside(&layer.ffn));
        // Experts in a latent space read no norm.
        let is_latent = |ffn: &FfnSpec| matches!(ffn, FfnSpec::Moe(moe) if moe.latent.is_some());
        let ffn_inputs: &[Role] = if spec.layers.iter().any(|layer| is_latent(&layer.ffn)) {
            &[Role::UpProj, Role::Router, Role::SharedUp, Role::LatentDown]
        } else if all_read {
            FFN_INPUTS
        } else {
            &[Role::GateProj, Role::UpProj]
        };
        rewrite(&model, planted.path(), |_, need, values| plant(need, values, dim, zero_centred, ffn_inputs));
        let (after, new) = run(planted.path(), &ids_of(&name));
        for (tensor, values) in old {
            let grows = tensor.starts_with("layer.");
            for (i, (was, is)) in values.iter().zip(&new[tensor]).enumerate() {
                let want = if grows && i % spec.hidden == dim { was * FACTOR } else { *was };
                assert!(*is == want, "{name}: {tensor}[{i}] is {is}, not {want}");
            }
        }
        let others =
            |results: &Results| -> Vec<_> { results.features.iter().filter(|f| f.dim != dim).cloned().collect() };
        assert_eq!(others(before), others(&after), "{name}");
        let occurrences =
            |results: &Results| results.features.iter().find(|f| f.dim == dim).map_or(0, |f| f.occurrences);
        let exceeding = |values: &HashMap<String, Vec<f32>>| {
            let sites = values.iter().filter(|(tensor, _)| tensor.starts_with("layer."));
            let column =
                |values: &Vec<f32>| values.iter().skip(dim).step_by(spec.hidden).filter(|v| v.abs() >= 6.0).count();
            sites.map(|(_, values)| column(values) as u64).sum::<u64>()
        };
        assert_eq!(occurrences(&after), exceeding(&new), "{name}");
        assert!(occurrences(&after) > occurrences(before), "{name}: nothing was planted");
        assert_eq!(before.perplexity, after.perplexity, "{name}");
    }
}

#[test]
fn sequence_order_changes_no_count() {
    for name in goldens() {
        let bytes = std::fs::read(ids_of(&name)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let ids = file.tensor("input_ids").unwrap();
        let rows: Vec<Vec<i64>> = ids
            .data()
            .chunks(8 * ids.shape()[1])
            .map(|row| row.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect())
            .collect();
        let reversed: Vec<_> = rows.iter().rev().collect();
        let shuffled = tempfile::Builder::new().suffix(".json").tempfile().unwrap();
        std::fs::write(shuffled.path(), serde_json::to_vec(&reversed).unwrap()).unwrap();
        let ((a, _), (b, _)) = (own_run(&name), run(&golden(&name).join("model"), shuffled.path()));
        let counts = |r: &Results| -> Vec<_> {
            let of = |f: &outliers_protocol::Feature| {
                (f.dim, f.n_layers, f.n_sites, f.n_positions, f.occurrences, f.positive)
            };
            r.features.iter().map(of).collect()
        };
        assert_eq!(counts(a), counts(&b), "{name}");
        let per_sequence = |r: &Results| -> Vec<_> {
            r.per_sequence.iter().map(|s| (s.features_any, s.systematic_by_layers, s.systematic_by_sites)).collect()
        };
        assert_eq!(per_sequence(a), per_sequence(&b).into_iter().rev().collect::<Vec<_>>(), "{name}");
        let nats = |r: &Results| r.perplexity.as_ref().unwrap().mean_nll;
        let (a, b) = (nats(a), nats(&b));
        assert!((a - b).abs() < TOLERANCE * a, "{name}: {a} and {b} nats");
    }
}

#[test]
fn streamed_experts_equal_resident_experts_bit_for_bit() {
    for name in goldens() {
        let model = golden(&name).join("model");
        if spec_of(&model).layers.iter().all(|layer| matches!(layer.ffn, FfnSpec::Dense(_))) {
            continue;
        }
        let path = model.to_str().unwrap().to_owned();
        let (sites, measure) = (SiteKind::ALL.into(), Measurement::ALL.into());
        let job = JobSpec { sites, measure, ..JobSpec::new(ModelSource::Folder { path }) };
        let hub = Hub::new(HubOptions::new("/nowhere")).unwrap();
        let source = CorpusSource::TokenIds(ids_of(&name).to_str().unwrap().to_owned());
        let checkpoint = Checkpoint::open_folder(&model).unwrap();
        let model = Model::open(&checkpoint.config, &*checkpoint.weights, None).unwrap();
        let tokens =
            corpus::load(&CorpusSpec { source, ..CorpusSpec::default() }, None, model.spec.vocab, None, &hub).unwrap();
        let pass = |group_elements| {
            let mut study = Study::new(Scope::new(&job, &model.spec, &tokens), job.thresholds.magnitude);
            let devices = device::open(&["cpu".to_owned()]).unwrap();
            let pass = Pass {
                model: &model,
                tokens: &tokens,
                arms: &Arms::whole(),
                compute: candle_core::DType::F32,
                devices: &devices,
                micro_batch_tokens: 4096,
                with_head: true,
                group_elements,
                hash_memory: 0,
                read_ahead: true,
                progress: &ProgressSink::silent(),
                meter: &Meter::default(),
            };
            let predicted = pass.run(&mut study, None).unwrap().predicted;
            (predicted, study.report(&job.thresholds, &tokens.ids))
        };
        assert_eq!(pass(1), pass(u64::MAX), "{name}");
    }
}

#[test]
fn number_of_devices_changes_no_bit() {
    for name in goldens() {
        let model = golden(&name).join("model");
        let on = |devices: &str| -> BTreeMap<String, serde_json::Value> {
            let output = tempfile::tempdir().unwrap();
            let ids = ids_of(&name);
            let job =
                ["run", "--model", model.to_str().unwrap(), "--token-ids", ids.to_str().unwrap(), "--devices", devices];
            let run = run_worker(job.into_iter().chain(["--output", output.path().to_str().unwrap()]));
            assert!(run.status.success(), "{name}: {}", String::from_utf8_lossy(&run.stderr));
            serde_json::from_slice(&std::fs::read(output.path().join(files::RESULTS)).unwrap()).unwrap()
        };
        let one = on("cpu");
        for devices in ["cpu:2", "cpu,cpu:4"] {
            assert_eq!(one, on(devices), "{name} on {devices}");
        }
    }
}

/// Runs with all sites, exports and a checkpoint after every layer, into a folder that may have an
/// earlier attempt's files.
fn saved_run(model: &Path, ids: &Path, output: &Path) -> Command {
    let mut command = Command::new(worker());
    command.args(["run", "--sites", "all", "--precision", "f32", "--save-every", "0", "--export", "act-scales,reap"]);
    command.args(["--measure", "quantization-error,residual-sinks,spike-life,attention-sinks", "--model"]).arg(model);
    command.arg("--token-ids").arg(ids).arg("--output").arg(output).stderr(Stdio::null()).stdout(Stdio::null());
    command
}

fn document<T: serde::de::DeserializeOwned>(output: &Path, name: &str) -> T {
    serde_json::from_slice(&std::fs::read(output.join(name)).unwrap()).unwrap()
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one_which_counts_every_row_once() {
    for name in goldens() {
        let (model, output) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let original = golden(&name).join("model");
        let last = spec_of(&original).layers.len() - 1;
        // An attempt that fails in the last layer, on a NaN weight.
        rewrite(&original, model.path(), |layer, need, values| {
            if layer == last && matches!(need.role, Role::MixerNorm | Role::FfnNorm) {
                values[0] = f32::NAN;
            }
        });
        assert!(!saved_run(model.path(), &ids_of(&name), output.path()).status().unwrap().success());
        assert!(output.path().join(files::SAVE_POINT).exists(), "{name}");
        rewrite(&original, model.path(), |_, _, _| {});
        assert!(saved_run(model.path(), &ids_of(&name), output.path()).status().unwrap().success(), "{name}");
        assert_eq!(document::<Metadata>(output.path(), files::METADATA).resumed_at_layer, Some(last), "{name}");
        assert!(!output.path().join(files::SAVE_POINT).exists());

        let whole = tempfile::tempdir().unwrap();
        assert!(saved_run(model.path(), &ids_of(&name), whole.path()).status().unwrap().success());
        assert_eq!(document::<Metadata>(whole.path(), files::METADATA).resumed_at_layer, None);
        for file in [files::RESULTS, files::STATISTICS, files::ACT_SCALES, files::INPUT_SCALES, files::REAP] {
            let read = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
            assert!(read(output.path()) == read(whole.path()), "{name}: {file} differs");
        }
        assert_rows_counted_once(&name, whole.path());
    }
}

/// Every row of every site is counted once.
fn assert_rows_counted_once(name: &str, output: &Path) {
    let (spec, results) = (spec_of(&golden(name).join("model")), document::<Results>(output, files::RESULTS));
    let tokens = (results.sequences * results.tokens_per_sequence) as u64;
    for site in &results.other_sites {
        let rows = match &spec.layers[site.layer].ffn {
            FfnSpec::Moe(moe) if site.point == Point::ExpertOut => tokens * moe.top_k as u64,
            _ => tokens,
        };
        assert_eq!(site.rows.rows, rows, "{name}: {:?} of layer {}", site.point, site.layer);
    }
}

#[test]
fn killed_worker_resumes_to_the_same_numbers() {
    let name = "qwen3-next";
    let model = golden(name).join("model");
    let whole = tempfile::tempdir().unwrap();
    assert!(saved_run(&model, &ids_of(name), whole.path()).status().unwrap().success());
    for attempt in 0..6 {
        let output = tempfile::tempdir().unwrap();
        for delay in [5, 15, 25, 40, 60] {
            let mut killed = saved_run(&model, &ids_of(name), output.path()).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(delay + 7 * attempt));
            killed.kill().unwrap();
            killed.wait().unwrap();
        }
        assert!(saved_run(&model, &ids_of(name), output.path()).status().unwrap().success());
        let results = |folder: &Path| std::fs::read(folder.join(files::RESULTS)).unwrap();
        assert!(results(output.path()) == results(whole.path()), "attempt {attempt}");
    }
}

#[test]
fn save_point_of_another_job_is_ignored() {
    let (name, output) = ("llama-f32", tempfile::tempdir().unwrap());
    let model = tempfile::tempdir().unwrap();
    rewrite(&golden(name).join("model"), model.path(), |layer, need, values| {
        if (layer, need.role) == (2, Role::MixerNorm) {
            values[0] = f32::NAN;
        }
    });
    assert!(!saved_run(model.path(), &ids_of(name), output.path()).status().unwrap().success());
    let original = golden(name).join("model");
    assert!(saved_run(&original, &ids_of(name), output.path()).status().unwrap().success());
    assert_eq!(document::<Metadata>(output.path(), files::METADATA).resumed_at_layer, None);
}
