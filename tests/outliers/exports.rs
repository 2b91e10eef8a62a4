//! Files of `--export`, compared with numpy on the inputs of transformers' modules (numbers from
//! `tests/exports.py`) and with the names of llama.cpp's package, for any split of the work.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use outliers_protocol::{FailureKind, Manifest, Metadata, files};
use outliers_tests::context::TestContext;
use outliers_tests::golden::TOLERANCE;
use outliers_tests::programs::{golden, run_worker};
use outliers_worker::model::decoder::Role;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::rewrite::rewrite;
use crate::worker::{failure, read, run_like};

const ALL: [&str; 2] = ["--export", "imatrix,act-scales,reap"];
const FILES: [&str; 4] = [files::IMATRIX, files::ACT_SCALES, files::INPUT_SCALES, files::REAP];

/// A GGUF file of f32: its keys with values as text, and its tensors by name.
struct Gguf {
    metadata: BTreeMap<String, Vec<String>>,
    /// The contiguous dimension, the other one, values.
    tensors: BTreeMap<String, (usize, usize, Vec<f32>)>,
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let (taken, rest) = self.0.split_at(N);
        self.0 = rest;
        taken.try_into().unwrap()
    }

    fn number(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    fn long(&mut self) -> usize {
        u64::from_le_bytes(self.bytes()) as usize
    }

    fn text(&mut self) -> String {
        let length = self.long();
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        String::from_utf8(taken.to_vec()).unwrap()
    }

    fn value(&mut self, kind: u32) -> Vec<String> {
        match kind {
            4 => vec![self.number().to_string()],
            8 => vec![self.text()],
            9 => {
                let (kind, count) = (self.number(), self.long());
                (0..count).flat_map(|_| self.value(kind)).collect()
            }
            _ => panic!("type {kind}"),
        }
    }
}

fn gguf(folder: &Path) -> Gguf {
    let bytes = std::fs::read(folder.join(files::IMATRIX)).unwrap();
    let mut reader = Reader(&bytes);
    assert_eq!((&reader.bytes::<4>(), reader.number()), (b"GGUF", 3));
    let (count, pairs) = (reader.long(), reader.long());
    let mut metadata = BTreeMap::new();
    for _ in 0..pairs {
        let (key, kind) = (reader.text(), reader.number());
        metadata.insert(key, reader.value(kind));
    }
    let mut places = Vec::new();
    for _ in 0..count {
        let (name, dimensions) = (reader.text(), reader.number());
        let (width, rows, kind) = (reader.long(), reader.long(), reader.number());
        assert_eq!((dimensions, kind), (2, 0), "{name}");
        places.push((name, width, rows, reader.long()));
    }
    let start = (bytes.len() - reader.0.len()).next_multiple_of(32);
    let tensor = |(name, width, rows, offset): (String, usize, usize, usize)| {
        assert_eq!(offset % 32, 0, "{name}");
        let values = bytes[start + offset..][..4 * width * rows].as_chunks::<4>().0;
        (name, (width, rows, values.iter().map(|value| f32::from_le_bytes(*value)).collect()))
    };
    Gguf { metadata, tensors: places.into_iter().map(tensor).collect() }
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap_or_else(|_| panic!("no {name}"));
    tensor.data().as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect()
}

/// Each value is within [`TOLERANCE`] of the expected root mean square.
#[track_caller]
fn near(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let squares: f64 = want.iter().map(|value| f64::from(*value).powi(2)).sum();
    let rms = (squares / want.len() as f64).sqrt();
    let worst = got.iter().zip(want).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
    assert!(worst <= TOLERANCE * rms, "{what}: differs by {worst:e} where the RMS is {rms:e}");
}

fn run(name: &str, more: &[&str]) -> tempfile::TempDir {
    run_like(name, &golden(name).join("model"), &[&ALL[..], more].concat())
}

#[test]
fn exports_equal_numpy_over_transformers_under_llama_cpp_names() {
    for (name, family) in [
        ("llama-f32", "llama"),
        ("olmoe-f32-sharded", "olmoe"),
        ("deepseek-v2-lite", "deepseek2"),
        ("qwen3-5-moe", "qwen35moe"),
    ] {
        let folder = run(name, &[]);
        let reference = std::fs::read(golden(name).join("exports.safetensors")).unwrap();
        let reference = SafeTensors::deserialize(&reference).unwrap();
        let named = |prefix: &str| -> BTreeSet<String> {
            let all = reference.names().into_iter().filter(|name| name.starts_with(prefix));
            all.map(str::to_owned).collect()
        };

        let imatrix = gguf(folder.path());
        let metadata: Metadata = read(folder.path(), files::METADATA);
        let of = |key: &str| imatrix.metadata[key].join(" ");
        assert_eq!((of("general.type"), of("outliers.llama_architecture")), ("imatrix".into(), family.into()));
        assert_eq!(of("imatrix.chunk_count"), metadata.corpus.sequences.to_string());
        assert_eq!(of("imatrix.chunk_size"), metadata.corpus.tokens_per_sequence.to_string());
        assert_eq!(imatrix.metadata["imatrix.datasets"].len(), 1);
        assert_eq!(imatrix.tensors.keys().cloned().collect::<BTreeSet<_>>(), named("blk."), "{name}");
        for (tensor, (width, rows, values)) in &imatrix.tensors {
            assert_eq!(reference.tensor(tensor).unwrap().shape(), [*rows, *width], "{name} {tensor}");
            near(&format!("{name} {tensor}"), values, &floats(&reference, tensor));
        }
        // The first layer's input is exact, except for the order of sums.
        let first = imatrix.tensors.keys().find(|tensor| tensor.starts_with("blk.0.attn_q")).unwrap();
        let exact = format!("{}.in_sum2", first.rsplit_once('.').unwrap().0);
        let (got, want) = (&imatrix.tensors[&exact].2, floats(&reference, &exact));
        assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 1e-6 * b), "{name} {exact}");

        let scales = std::fs::read(folder.path().join(files::ACT_SCALES)).unwrap();
        let scales = SafeTensors::deserialize(&scales).unwrap();
        let mut modules = 0;
        for key in named("act_scales.") {
            let module = key.strip_prefix("act_scales.").unwrap();
            let want = floats(&reference, &key);
            let stacked = scales.tensor(module).is_ok();
            if stacked {
                near(&format!("{name} {module}"), &floats(&scales, module), &want);
                modules += 1;
                continue;
            }
            // A tensor per expert, gate and up separate.
            let (prefix, part) = module.rsplit_once('.').unwrap();
            let parts = if part == "gate_up_proj" { vec!["gate_proj", "up_proj"] } else { vec![part] };
            let experts = reference.tensor(&key).unwrap().shape()[0];
            for (expert, want) in want.chunks(want.len() / experts).enumerate() {
                for part in &parts {
                    let module = format!("{prefix}.{expert}.{part}");
                    near(&format!("{name} {module}"), &floats(&scales, &module), want);
                    modules += 1;
                }
            }
        }
        assert_eq!(scales.names().len(), modules, "{name}");
        let inputs: Value = read(folder.path(), files::INPUT_SCALES);
        let module = scales.names().into_iter().find(|module| module.ends_with("o_proj")).unwrap();
        let largest = f64::from(floats(&scales, module).into_iter().fold(0.0, f32::max));
        let input = &inputs["tensors"][module];
        for (scale, want) in [("absmax", 1.0), ("fp8_input_scale", 448.0), ("nvfp4_input_scale", 448.0 * 6.0)] {
            let got = input[scale].as_f64().unwrap();
            assert!((got * want / largest - 1.0).abs() < 1e-12, "{name} {scale}: {got}");
        }
        assert_eq!(inputs["tensors"].as_object().unwrap().len(), modules);

        let reap: Value = read(folder.path(), files::REAP);
        let layers = reap["layers"].as_array().unwrap();
        assert_eq!(layers.len(), named("reap.").len(), "{name}");
        for layer in layers {
            let want = floats(&reference, &format!("reap.{}", layer["layer"]));
            let experts = layer["experts"].as_array().unwrap();
            assert_eq!(experts.len(), want.len() / 2);
            for (expert, want) in experts.iter().zip(want.chunks(2)) {
                assert_eq!(expert["tokens"].as_f64(), Some(f64::from(want[0])), "{name}");
                near(&format!("{name} saliency"), &[expert["saliency"].as_f64().unwrap() as f32], &want[1..]);
            }
            let saliency = |at: &Value| experts[at.as_u64().unwrap() as usize]["saliency"].as_f64().unwrap();
            let ascending = layer["ascending"].as_array().unwrap();
            assert!(ascending.windows(2).all(|pair| saliency(&pair[0]) <= saliency(&pair[1])));
        }
        let found = reap["super_experts"].as_array().unwrap();
        assert_eq!(found.is_empty(), reap["share_before_a_super_expert"].is_null(), "{name}");
        assert_eq!(found.is_empty(), layers.is_empty(), "the largest is a candidate, or there are no experts");
    }
}

#[test]
fn exports_are_identical_on_any_devices_and_hashed_in_the_manifest() {
    for name in ["llama-f32", "olmoe-bf16", "deepseek-v2-lite", "llama4-scout", "nemotron-h-latent"] {
        let one = run(name, &["--devices", "cpu"]);
        let several = run(name, &["--devices", "cpu:3"]);
        let manifest: Manifest = read(one.path(), files::MANIFEST);
        for file in FILES {
            let bytes = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
            assert!(bytes(one.path()) == bytes(several.path()), "{name}: {file} differs");
            let entry = manifest.files.iter().find(|entry| entry.name == file).unwrap();
            assert_eq!(entry.sha256, outliers_tests::sha256(&bytes(one.path())), "{name}: {file}");
        }
        // Products of other dimensions are rounded differently.
        let cut = run(name, &["--micro-batch-tokens", "1"]);
        let (whole, cut) = (gguf(one.path()).tensors, gguf(cut.path()).tensors);
        for (tensor, (.., values)) in &whole {
            near(&format!("{name} {tensor} in small micro-batches"), &cut[tensor].2, values);
        }
    }
}

#[test]
fn exports_change_no_other_result_and_are_absent_by_default() {
    let results = |folder: &tempfile::TempDir| read::<Value>(folder.path(), files::RESULTS);
    let plain = run_like("olmoe-bf16", &golden("olmoe-bf16").join("model"), &["--sites", "expert-out"]);
    assert_eq!(results(&plain), results(&run("olmoe-bf16", &[])));
    assert!(FILES.iter().all(|file| !plain.path().join(file).exists()));
}

#[test]
fn experts_without_tokens_are_reported() {
    let (model, output) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    rewrite(&golden("moonlight").join("model"), model.path(), |_, need, values| {
        if need.role == Role::CorrectionBias {
            values[2] = -1000.0;
        }
    });
    let ids = golden("moonlight").join("golden.safetensors");
    let job = ["run", "--model", model.path().to_str().unwrap(), "--token-ids", ids.to_str().unwrap()];
    let said = run_worker(job.into_iter().chain(ALL).chain(["--output", output.path().to_str().unwrap()]));
    let words = String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success(), "{words}");
    let told = "experts that no token was sent to: 1 (layer 1 expert 2). ";
    assert!(words.contains(told) && words.contains("llama-quantize takes all columns"), "{words}");
    let imatrix = gguf(output.path());
    assert_eq!(imatrix.metadata["outliers.experts_never_hit"], ["blk.1 expert 2"]);
    let counts = &imatrix.tensors["blk.1.ffn_down_exps.weight.counts"].2;
    assert!(counts.iter().enumerate().all(|(expert, count)| (*count == 0.0) == (expert == 2)), "{counts:?}");
    let inputs: Value = read(output.path(), files::INPUT_SCALES);
    assert_eq!(inputs["experts_never_hit"], serde_json::json!([{ "layer": 1, "expert": 2 }]));
    assert!(inputs["tensors"]["model.layers.1.mlp.experts.2.down_proj"].is_null());
    let reap: Value = read(output.path(), files::REAP);
    let layer = &reap["layers"][0];
    assert!(layer["ascending"][0] == 2 && layer["experts"][2]["saliency"].is_null(), "{layer}");
    // No message reports what did not happen.
    assert!(!gguf(run("moonlight", &[]).path()).metadata.contains_key("outliers.experts_never_hit"));
}

#[test]
fn impossible_exports_are_refused_before_computing() {
    let model = |name: &str| golden(name).join("model");
    for name in ["opt-350m", "gptj-bin"] {
        let (kind, said) = failure(&model(name), &["--export", "imatrix", "--num-sequences", "1"]);
        assert_eq!(kind, FailureKind::Unsupported);
        assert!(said.contains("llama.cpp does not read") && said.contains("act-scales"), "{said}");
        let folder = model(name);
        let inspected = run_worker(["inspect", "--model", folder.to_str().unwrap(), "--export", "imatrix"]);
        assert!(!inspected.status.success(), "the look before a rental refuses it too");
        drop(run_like(name, &model(name), &["--export", "act-scales,reap"]));
    }
    let (kind, said) = failure(&model("llama-f32"), &["--export", "reap", "--ablate", "1,3"]);
    assert!(kind == FailureKind::Job && said.contains("--export and --ablate do not go together"), "{said}");
    let (folder, output) = (model("llama-f32"), tempfile::tempdir().unwrap());
    let job = ["run", "--model", folder.to_str().unwrap(), "--output", output.path().to_str().unwrap()];
    let said = run_worker(job.into_iter().chain(["--export", "imatrices"]));
    assert_eq!(said.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&said.stderr).contains("imatrix, act-scales, reap"));
}

#[test]
fn exports_are_saved_and_plan_states_their_size() {
    let context = TestContext::new();
    let (model, ids) = (golden("olmoe-bf16").join("model"), golden("olmoe-bf16").join("golden.safetensors"));
    let job = ["--model", model.to_str().unwrap(), "--token-ids", ids.to_str().unwrap()].into_iter().chain(ALL);
    let job: Vec<&str> = job.collect();
    let planned = context.run(["plan"].into_iter().chain(job.iter().copied())).ok();
    assert!(FILES.iter().all(|file| planned.stdout.contains(&format!("{file}, at most"))), "{planned:?}");
    let plan: Value = context.json(&[&["plan"][..], &job].concat());
    let most = |file: &str| {
        let exports = plan["inspection"]["plan"]["exports"].as_array().unwrap();
        exports.iter().find(|export| export["name"] == file).unwrap()["bytes"].as_u64().unwrap()
    };
    let _ = context.run(["deploy", "-y"].into_iter().chain(job.iter().copied())).ok();
    let home = context.results_folder();
    for file in FILES {
        let bytes = std::fs::metadata(home.join(file)).unwrap().len();
        assert!(bytes > 0 && bytes <= most(file), "{file}: {bytes} of {}", most(file));
    }
    let refused = context.run(["deploy", "-y", "--ablate", "1"].into_iter().chain(job.iter().copied()));
    assert!(refused.code == Some(2) && refused.stderr.contains("--export and --ablate"), "{refused:?}");
    context.assert_nothing_left();
}
