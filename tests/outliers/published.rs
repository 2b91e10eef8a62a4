//! Every published checkpoint of the surveys, planned from its configuration and its tensors'
//! names, shapes and dtypes (`tests/published`), without weight data.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::DType;
use outliers_protocol::{Export, FailureKind, FileBytes, JobSpec, ModelSource, files};
use outliers_worker::checkpoint::Model;
use outliers_worker::checkpoint::safetensors::{HeaderTensor, StoredDtype};
use outliers_worker::checkpoint::source::{SyntheticSource, TensorEntry, TensorIndex, WeightSource};
use outliers_worker::error::Result;
use outliers_worker::kernels::product::Arithmetic;
use outliers_worker::pass::budget::StreamBudget;
use outliers_worker::run::export;
use outliers_worker::run::inspect::{PlannedRun, active_parameters, host_memory, resident_memory, streamed_memory};
use serde::Deserialize;
use serde_json::{Value, json};

/// A source with headers only: reading a weight byte fails the test.
struct Headers(TensorIndex);

impl WeightSource for Headers {
    fn index(&self) -> &TensorIndex {
        &self.0
    }

    fn read(&self, entry: &TensorEntry, range: Range<u64>, _into: &mut [u8]) -> Result<()> {
        panic!("bytes {range:?} of {} were read", entry.name)
    }

    fn bytes_read(&self) -> u64 {
        0
    }
}

/// The expected figures of a `tensors.json`.
#[derive(Deserialize)]
struct Manifest {
    totals: Totals,
    tensors: BTreeMap<String, Listed>,
}

#[derive(Deserialize)]
struct Totals {
    tensors: usize,
    stored_bytes: u64,
    model_parameters: u64,
    active_parameters_per_token: u64,
}

/// Tensors with the same name except for layer and expert.
#[derive(Clone, Deserialize)]
struct Listed {
    shape: Vec<u64>,
    dtype: String,
    /// Inclusive ranges, separated by commas.
    layers: Option<String>,
    experts: Option<usize>,
    /// Why a text-only pass of the main stack does not read it.
    ignore: Option<String>,
}

/// A published checkpoint: its tensors by name.
struct Published {
    name: String,
    config: Value,
    totals: Totals,
    tensors: BTreeMap<String, Listed>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("published")
}

impl Published {
    fn read(name: &str) -> Self {
        let file = |file: &str| std::fs::read(folder().join(name).join(file)).unwrap();
        let manifest: Manifest = serde_json::from_slice(&file("tensors.json")).unwrap();
        let tensors = manifest.tensors.iter().flat_map(|(pattern, listed)| listed.expand(pattern)).collect();
        let config = serde_json::from_slice(&file("config.json")).unwrap();
        Self { name: name.to_owned(), config, totals: manifest.totals, tensors }
    }

    fn all() -> impl Iterator<Item = Self> {
        let entries = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap());
        let folders = entries.filter(|entry| entry.path().is_dir());
        let names: BTreeSet<String> = folders.map(|entry| entry.file_name().into_string().unwrap()).collect();
        assert_eq!(names.len(), 51, "{names:?}");
        names.into_iter().map(|name| Self::read(&name))
    }

    fn source(&self) -> Headers {
        let mut offset = 0;
        let tensors = self.tensors.iter().map(|(name, listed)| {
            let (dtype, len) = (StoredDtype::from_name(&listed.dtype), listed.bytes());
            offset += len;
            let (name, shape) = (name.clone(), listed.shape.clone());
            HeaderTensor { name, dtype, shape, strides: None, offset: offset - len, len }
        });
        let file = FileBytes { name: "model.safetensors".to_owned(), bytes: self.totals.stored_bytes };
        Headers(TensorIndex::assemble(vec![(file, tensors.collect())], None).unwrap())
    }

    /// All differences from the manifest.
    fn differences(&self) -> Vec<String> {
        let source = self.source();
        match Model::open(&self.config, &source, None) {
            Ok(model) => self.differences_of(&model),
            Err(error) => vec![error.to_string()],
        }
    }

    fn differences_of(&self, model: &Model<'_>) -> Vec<String> {
        let needs = model.spec.needs();
        let stored = |(layer, need): &(usize, _)| {
            let stored = model.stored(*layer, need);
            stored.pieces().map(|piece| piece.entry.name.clone()).collect::<Vec<_>>()
        };
        let used: BTreeSet<String> = needs.iter().flat_map(stored).collect();
        let names = |ignored: bool| -> BTreeSet<String> {
            let chosen = self.tensors.iter().filter(|(_, listed)| listed.is_unread().is_some() == ignored);
            chosen.map(|(name, _)| name.clone()).collect()
        };
        let used_bytes: u64 = model.stored_dtypes().values().sum();
        let ignored_bytes: u64 = model.ignored.iter().map(|ignored| ignored.bytes).sum();
        let mut differences = Vec::new();
        let mut same = |what: &str, ours: String, theirs: String| {
            if ours != theirs {
                differences.push(format!("{what}: {ours}, the manifest says {theirs}"));
            }
        };
        let first = |names: &BTreeSet<String>| format!("{} such as {:?}", names.len(), names.first());
        same("tensors", self.tensors.len().to_string(), self.totals.tensors.to_string());
        same("unexplained", format!("{:?}", model.unexplained), "[]".to_owned());
        same("used but ignored there", first(&(&used & &names(true))), first(&BTreeSet::new()));
        same("unused but not ignored there", first(&(&names(false) - &used)), first(&BTreeSet::new()));
        same("ignored", format!("{:?}", reasons_of(model)), format!("{:?}", self.reasons()));
        same("parameters", model.parameters().to_string(), self.totals.model_parameters.to_string());
        same("bytes", (used_bytes + ignored_bytes).to_string(), self.totals.stored_bytes.to_string());
        same(
            "active parameters",
            active_parameters(&model.spec).to_string(),
            self.totals.active_parameters_per_token.to_string(),
        );
        differences
    }

    /// Tensors and bytes by reason for leaving them.
    fn reasons(&self) -> BTreeMap<&str, (usize, u64)> {
        let mut reasons = BTreeMap::new();
        for listed in self.tensors.values() {
            if let Some(why) = listed.is_unread() {
                let sum: &mut (usize, u64) = reasons.entry(why).or_default();
                *sum = (sum.0 + 1, sum.1 + listed.bytes());
            }
        }
        reasons
    }

    /// Opens it, which must fail. Returns kind and message.
    fn refusal(&self) -> (FailureKind, String) {
        let source = self.source();
        let error = Model::open(&self.config, &source, None).map(|_| ()).expect_err(&self.name);
        (error.kind(), error.to_string())
    }
}

/// The worker's reasons for unread tensors, and the manifests'.
const REASONS: [(&str, &str); 5] = [
    ("multi-token prediction", "mtp"),
    ("vision tower", "vision"),
    ("causal mask (a buffer)", "causal-mask-buffer"),
    ("rotary frequencies (a buffer)", "rotary-inv-freq-buffer"),
    (
        "sparse indexer: it selects every key of sequences of up to index_topk tokens, and longer ones are refused",
        "indexer",
    ),
];

/// Tensors and bytes that a model does not read, by the manifests' reasons.
fn reasons_of(model: &Model<'_>) -> BTreeMap<&'static str, (usize, u64)> {
    let word = |why: &str| REASONS.iter().find(|(ours, _)| *ours == why).map_or("?", |(_, theirs)| *theirs);
    model.ignored.iter().map(|group| (word(&group.why), (group.tensors, group.bytes))).collect()
}

impl Listed {
    fn expand(&self, pattern: &str) -> Vec<(String, Self)> {
        let layers = self.layers.as_deref().map_or(vec![0], |ranges| ranges.split(',').flat_map(numbers).collect());
        let named = |layer: &usize| pattern.replace("{layer}", &layer.to_string());
        let with_experts = |name: String| {
            (0..self.experts.unwrap_or(1)).map(move |expert| name.replace("{expert}", &expert.to_string()))
        };
        layers.iter().map(named).flat_map(with_experts).map(|name| (name, self.clone())).collect()
    }

    /// Why it is not read. A stored head is read even if it is tied, because it may differ from
    /// the embedding.
    fn is_unread(&self) -> Option<&str> {
        self.ignore.as_deref().filter(|why| *why != "tied-duplicate")
    }

    fn bytes(&self) -> u64 {
        let size = StoredDtype::from_name(&self.dtype).size().unwrap();
        self.shape.iter().product::<u64>() * size
    }
}

/// `3`, or `0-47` with both ends.
fn numbers(range: &str) -> std::ops::RangeInclusive<usize> {
    let (first, last) = range.trim().split_once('-').unwrap_or((range.trim(), range.trim()));
    first.parse().unwrap()..=last.parse().unwrap()
}

/// Synthetic weights have the names and shapes of the published ones, and the same bytes except
/// where dtypes differ.
#[test]
fn synthetic_weights_have_the_shapes_of_the_published_checkpoint() {
    for model in Published::all() {
        let name = &model.name;
        let made = SyntheticSource::new(&model.config, 1).unwrap_or_else(|e| panic!("{name}: {e}"));
        let opened = Model::open(&model.config, &made, None).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!((opened.unexplained.len(), opened.ignored.len()), (0, 0), "{name}");
        let (mut ours, mut theirs) = (0, 0);
        for tensor in made.names() {
            let entry = made.entry(tensor).unwrap();
            let listed = published(&model, tensor).unwrap_or_else(|| panic!("{name} has no {tensor}"));
            assert_eq!(entry.shape, listed.shape, "{name}: {tensor}");
            (ours, theirs) = (ours + entry.len, theirs + listed.bytes());
        }
        let used = model.tensors.values().filter(|listed| listed.ignore.is_none()).count();
        assert_eq!(made.names().count(), used, "{name}");
        let ratio = ours as f64 / theirs as f64;
        assert!((0.99..=1.01).contains(&ratio), "{name}: {ours} bytes for {theirs}");
    }
}

/// A tensor of a manifest, with any prefix of the publisher.
fn published<'a>(model: &'a Published, name: &str) -> Option<&'a Listed> {
    let same = |listed: &&String| listed.ends_with(name) || name.ends_with(listed.as_str());
    model.tensors.get(name).or_else(|| model.tensors.keys().find(same).map(|key| &model.tensors[key]))
}

#[test]
fn published_checkpoints_match_in_tensors_bytes_and_parameters() {
    let differences: Vec<String> = Published::all()
        .flat_map(|model| {
            model.differences().into_iter().map(move |difference| format!("{}: {difference}", model.name))
        })
        .collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// Opens the checkpoint after `damage`. It must be refused with a message that has all of `named`,
/// without reading a weight byte.
#[track_caller]
fn assert_refused(name: &str, damage: impl FnOnce(&mut Published), kind: FailureKind, named: &[&str]) {
    let mut model = Published::read(name);
    damage(&mut model);
    let (got, message) = model.refusal();
    let missing: Vec<_> = named.iter().filter(|word| !message.contains(**word)).collect();
    assert!(got == kind && missing.is_empty(), "{got:?}: {message}: {missing:?} is not in it");
}

#[test]
fn damaged_checkpoints_are_refused_by_name() {
    let reshaped = |name: &'static str, shape: &'static [u64]| {
        move |model: &mut Published| model.tensors.get_mut(name).expect(name).shape = shape.to_vec()
    };
    let of_dtype = |name: &'static str, dtype: &'static str| {
        move |model: &mut Published| model.tensors.get_mut(name).expect(name).dtype = dtype.to_owned()
    };
    let without = |name: &'static str| move |model: &mut Published| drop(model.tensors.remove(name).expect(name));
    let damaged = FailureKind::Checkpoint;

    let query = "model.layers.35.self_attn.q_proj.weight";
    assert_refused("Qwen3-8B", reshaped(query, &[4096, 4095]), damaged, &[query, "[4096, 4095]", "[4096, 4096]"]);
    let expert = "model.layers.7.mlp.experts.12.up_proj.weight";
    assert_refused("OLMoE-1B-7B-0125", without(expert), damaged, &[expert, "missing"]);
    let stack = "language_model.model.layers.1.feed_forward.experts.down_proj";
    let experts = reshaped(stack, &[127, 8192, 5120]);
    assert_refused("Llama-4-Maverick-17B-128E", experts, damaged, &[stack, "[127, 8192, 5120]", "[128, 8192, 5120]"]);
    let decay = "model.layers.4.linear_attn.A_log";
    assert_refused("Qwen3-Next-80B-A3B-Instruct", reshaped(decay, &[16]), damaged, &[decay, "[16]", "[32]"]);

    // 576 rows in tiles of 128 are 5 tiles, the last one partial.
    let tiles = "model.layers.60.self_attn.kv_a_proj_with_mqa.weight_scale_inv";
    assert_refused("DeepSeek-V3.1", reshaped(tiles, &[4, 56]), damaged, &[tiles, "[4, 56]", "[5, 56]"]);
    assert_refused("Kimi-K2-Instruct", without(tiles), damaged, &[tiles, "missing"]);
    let scales = "model.layers.0.mlp.experts.gate_up_proj_scales";
    assert_refused("gpt-oss-20b", reshaped(scales, &[32, 5760, 89]), damaged, &[scales, "[32, 5760, 89]"]);
    assert_refused("gpt-oss-20b", of_dtype(scales, "F8_E8M0"), FailureKind::Unsupported, &[scales, "F8_E8M0"]);
    let packed = "model.layers.1.mlp.experts.7.down_proj.weight_packed";
    assert_refused(
        "Kimi-K2-Thinking",
        reshaped(packed, &[7168, 255]),
        damaged,
        &[packed, "[7168, 255]", "[7168, 256]"],
    );
    assert_refused("Kimi-K2-Thinking", of_dtype(packed, "I64"), FailureKind::Unsupported, &[packed, "I64"]);
    let int4 = "model.layers.0.mlp.down_proj.weight";
    assert_refused("Qwen3-4B", of_dtype(int4, "I32"), FailureKind::Unsupported, &[int4, "I32"]);
}

#[test]
fn unsupported_config_settings_are_refused_by_name() {
    let set = |pointer: &'static str, value: Value| {
        move |model: &mut Published| {
            let (parent, key) = pointer.rsplit_once('/').expect("a path");
            let parent = model.config.pointer_mut(parent).expect(pointer);
            parent.as_object_mut().expect(pointer).insert(key.to_owned(), value);
        }
    };
    let unsupported = FailureKind::Unsupported;
    let ropes = [
        ("DeepSeek-V3-0324", "/rope_scaling/type"),
        ("gpt-oss-120b", "/rope_scaling/rope_type"),
        ("Llama-4-Scout-17B-16E-Instruct", "/text_config/rope_scaling/rope_type"),
    ];
    for (model, rope) in ropes {
        assert_refused(model, set(rope, json!("longrope")), unsupported, &["rope type", "longrope"]);
    }
    let eight = set("/quantization_config/config_groups/group_0/weights/num_bits", json!(8));
    assert_refused("Kimi-K2-Thinking", eight, unsupported, &["group_0", "num_bits", "8"]);
    let other = set("/quantization_config/format", json!("marlin-24"));
    assert_refused("Kimi-K2-Thinking", other, unsupported, &["format", "marlin-24", "pack-quantized"]);
    let gptq = json!({"quant_method": "gptq", "bits": 4});
    assert_refused("Qwen3-30B-A3B", set("/quantization_config", gptq), unsupported, &["quant_method", "gptq"]);
    let e5m2 = set("/quantization_config/fmt", json!("e5m2"));
    assert_refused("DeepSeek-V3.1", e5m2, unsupported, &["fmt", "e5m2"]);
    let unknown = set("/architectures", json!(["FalconForCausalLM"]));
    assert_refused("Mixtral-8x7B-v0.1", unknown, unsupported, &["FalconForCausalLM"]);
    for key in ["qk_norm_type", "scoring_func"] {
        let other = move |model: &mut Published| model.config[key] = json!("other");
        assert_refused("MiniMax-M2", other, unsupported, &[key, "other"]);
    }
    let linear = |model: &mut Published| model.config["attn_type_list"][3] = json!(0);
    assert_refused("MiniMax-M2", linear, unsupported, &["attn_type_list"]);
    let gelu = set("/hidden_act", json!("gelu"));
    assert_refused("GLM-4.5-Air", gelu, unsupported, &["hidden_act", "gelu"]);
}

/// Sums of x^2 and of x for every column of every matrix, by expert.
#[test]
fn export_size_follows_the_widths_of_the_matrices() {
    let hub = ModelSource::Hub { id: "a/b".into(), revision: "main".into() };
    let job = JobSpec { export: Export::ALL.into(), ..JobSpec::new(hub) };
    for (name, columns) in [
        // Gate, up and down of each expert; attention's four and the router.
        ("Qwen3-30B-A3B", 48 * (128 * (2 * 2048 + 768) + 4 * 2048 + 4096)),
        // Those of 384 experts in 60 layers; the rest is small in comparison.
        ("Kimi-K2-Instruct", 60 * 384 * (2 * 7168 + 2048)),
    ] {
        let published = Published::read(name);
        let source = published.source();
        let model = Model::open(&published.config, &source, None).unwrap();
        let planned = export::planned(&job, &model.spec);
        let bytes = |file: &str| planned.iter().find(|planned| planned.name == file).unwrap().bytes as f64;
        let (sums, largest) = (8.0 * columns as f64, 4.0 * columns as f64);
        assert!((sums..1.1 * sums).contains(&bytes(files::IMATRIX)), "{name}: {planned:?}");
        assert!((largest..1.1 * largest).contains(&bytes(files::ACT_SCALES)), "{name}: {planned:?}");
    }
}

/// The table of models in `docs/benchmarks.md` is what planning gives.
/// Sequences of 2,048 tokens on a GPU.
fn run(sequences: usize) -> PlannedRun {
    PlannedRun {
        sequences,
        tokens: 2048,
        arms: 1,
        compute: DType::BF16,
        micro_batch_tokens: 4096,
        group_elements: StreamBudget::planned(None).group_elements(DType::BF16, 1),
        measured: 0,
        arithmetic: Arithmetic::default(),
        with_head: true,
        devices: 1,
    }
}

#[test]
fn host_memory_of_a_gpu_run_is_planned() {
    let published = Published::read("OLMoE-1B-7B-0125");
    let source = published.source();
    let model = Model::open(&published.config, &source, None).unwrap();
    let of = |sequences: usize, gpus: usize, ahead: u64| host_memory(&model, run(sequences), gpus, ahead);
    let mib = |bytes: u64| bytes >> 20;
    // By hand: 12 MiB of its own; for a GPU 512 of the driver, 64 that are pinned and the 16 of a
    // projection, stored in f32; 256 of rows of the table, stored in f32, and 60 of its blocks; 6 of
    // ids and statistics.
    let one = of(16, 1, 0);
    assert!((912..942).contains(&mib(one)), "{} MiB", mib(one));
    assert_eq!(of(16, 1, 128 << 20) - one, 128 << 20, "what arrives early");
    assert!((584..600).contains(&mib(of(1000, 2, 0) - of(1000, 1, 0))), "another GPU");
    // Of a token its id and its places, once all rows of the table are in use.
    assert_eq!(of(1001, 1, 0) - of(1000, 1, 0), 2048 * (8 + 8 + 4));
}

#[test]
fn docs_benchmarks_match_computed_model_sizes() {
    let page = std::fs::read_to_string(folder().join("../../docs/benchmarks.md")).unwrap();
    let rows = Published::all().filter_map(|published| {
        let row = page.lines().find(|line| line.starts_with(&format!("| `{}` | ", published.name)))?;
        Some((published, row.to_owned()))
    });
    let rows: Vec<_> = rows.collect();
    assert_eq!(rows.len(), 26);
    let mut wrong = Vec::new();
    for (published, row) in rows {
        let source = published.source();
        let model = Model::open(&published.config, &source, None).unwrap();
        let run = run(16);
        let giga = |bytes: u64| bytes as f64 / 1e9;
        let read = giga(model.stored_dtypes().values().sum());
        let times = format!("{read:.0} / {:.0} / {:.0} s", read / 2.2, read / 5.0);
        let [streamed, resident] = [streamed_memory, resident_memory].map(|memory| giga(memory(&model, run)));
        let cost = read / 3600.0 * 1.64;
        let name = &published.name;
        let expected =
            format!("| `{name}` | {read:.1} GB | {times} | {streamed:.1} GB | {resident:.0} GB | ${cost:.3} |");
        if row != expected {
            wrong.push(expected);
        }
    }
    assert!(wrong.is_empty(), "rows should be\n{}", wrong.join("\n"));
}
