//! What a checkpoint is and what a run over it needs: arithmetic over headers, no weight byte read.

use candle_core::DType;
use outliers_protocol::{Inspection, LayerInspection, PlanFigures, SCHEMA, SiteInspection};
use serde_json::Value;

use crate::decoder::{DecoderSpec, FfnSpec, LayerSpec, Need, Role};
use crate::model::Model;
use crate::source::Checkpoint;
use crate::stats::Site;
use crate::stream::{GROUP_ELEMENTS, VOCAB_BLOCK};

/// The run to plan for.
#[derive(Clone, Copy, Debug)]
pub struct PlannedRun {
    /// Sequences.
    pub sequences: usize,
    /// Tokens per sequence.
    pub tokens: usize,
    /// Dtype of the forward pass.
    pub compute: DType,
    /// Tokens computed together.
    pub micro_batch_tokens: usize,
}

/// Describes a checked model.
pub fn inspect(name: &str, checkpoint: &Checkpoint, model: &Model<'_>, run: PlannedRun) -> Inspection {
    let spec = &model.spec;
    let head = spec.head_needs();
    Inspection {
        schema: SCHEMA,
        model: name.to_owned(),
        revision: checkpoint.revision.clone(),
        architecture: model.family.architecture.to_owned(),
        model_type: string(&checkpoint.config, "model_type"),
        hidden: spec.hidden,
        vocab: spec.vocab,
        max_positions: spec.max_positions,
        tied_head: spec.tied_head,
        parameters: model.parameters(),
        active_parameters: active_parameters(spec),
        stored_bytes: model.stored_dtypes().values().sum(),
        stored_dtypes: model.stored_dtypes(),
        embedding_bytes: model.stored_bytes(0, [&spec.embedding_need()]),
        head_bytes: model.stored_bytes(0, &head),
        layers: spec.layers.iter().enumerate().map(|(i, layer)| layer_inspection(model, i, layer)).collect(),
        sites: spec.sites().into_iter().map(|site| site_inspection(model, site)).collect(),
        ignored_tensors: model.ignored.iter().chain(&model.unexplained).cloned().collect(),
        files: checkpoint.weights.files().to_vec(),
        tokenizer: checkpoint.tokenizer().map(|files| files.to_string()),
        plan: plan(checkpoint, model, run),
    }
}

fn string(config: &Value, key: &str) -> String {
    config[key].as_str().unwrap_or_default().to_owned()
}

fn layer_needs(spec: &DecoderSpec, layer: usize) -> Vec<Need> {
    spec.units(u64::MAX).into_iter().filter(|unit| unit.layer == layer).flat_map(|unit| unit.needs).collect()
}

fn layer_inspection(model: &Model<'_>, index: usize, layer: &LayerSpec) -> LayerInspection {
    let needs = layer_needs(&model.spec, index);
    LayerInspection {
        layer: index,
        kind: layer.describe(),
        experts: match &layer.ffn {
            FfnSpec::Dense(_) => 0,
            FfnSpec::Moe(moe) => moe.experts,
        },
        tensors: needs.len(),
        parameters: needs.iter().map(Need::elements).sum(),
        bytes: model.stored_bytes(index, &needs),
    }
}

fn site_inspection(model: &Model<'_>, site: Site) -> SiteInspection {
    let role = match site.point {
        outliers_protocol::Point::BeforeAttention => Role::MixerNorm,
        outliers_protocol::Point::BeforeMlp => Role::FfnNorm,
    };
    let need = Need { role, expert: None, shape: vec![model.spec.hidden] };
    SiteInspection { layer: site.layer, point: site.point, tensor: model.family.names.of(site.layer, &need) }
}

/// Parameters one token passes through, the looked-up embedding left out.
fn active_parameters(spec: &DecoderSpec) -> u64 {
    let head = (spec.vocab * spec.hidden + spec.hidden) as u64;
    let layers = spec.units(u64::MAX).into_iter().map(|unit| {
        let whole: u64 = unit.needs.iter().map(Need::elements).sum();
        match (&unit.part, &spec.layers[unit.layer].ffn) {
            (crate::decoder::Part::Experts(_), FfnSpec::Moe(moe)) => whole / moe.experts as u64 * moe.top_k as u64,
            _ => whole,
        }
    });
    head + layers.sum::<u64>()
}

/// Floating-point operations: two per active parameter and token, and four per head value and visible key.
fn flops(spec: &DecoderSpec, run: PlannedRun) -> f64 {
    let tokens = (run.sequences * run.tokens) as f64;
    let pairs = run.sequences as f64 * run.tokens as f64 * (run.tokens as f64 + 1.0) / 2.0;
    let attention: f64 =
        spec.layers.iter().map(|l| 4.0 * (l.attention.heads * l.attention.head_dim) as f64 * pairs).sum();
    2.0 * active_parameters(spec) as f64 * tokens + attention
}

fn plan(checkpoint: &Checkpoint, model: &Model<'_>, run: PlannedRun) -> PlanFigures {
    let spec = &model.spec;
    let value = run.compute.size_in_bytes() as u64;
    let (tokens, width) = ((run.sequences * run.tokens) as u64, spec.hidden as u64);
    let hidden_states = tokens * width * value;
    let weights = |needs: &[Need]| needs.iter().map(Need::elements).sum::<u64>() * value;
    let stored: u64 = model.stored_dtypes().values().sum();
    // A mixture keeps the norm's output and the sum of its experts for all tokens until its last group has passed.
    let mixture = spec.layers.iter().any(|l| matches!(l.ffn, FfnSpec::Moe(_)));
    let states = hidden_states * if mixture { 3 } else { 1 };
    let mut units: Vec<u64> =
        spec.units(GROUP_ELEMENTS).iter().map(|u| weights(&u.needs) + model.unit_bytes(u) / 4).collect();
    units.sort_unstable_by(|a, b| b.cmp(a));
    let two_largest: u64 = units.iter().take(2).sum();
    let block = (VOCAB_BLOCK.min(spec.vocab) as u64) * width * (value + 4);
    let all: u64 = model.parameters() * value;
    let workspace = workspace(spec, run);
    PlanFigures {
        sequences: run.sequences,
        tokens_per_sequence: run.tokens,
        compute_bytes_per_value: value,
        flops: flops(spec, run),
        streamed_memory_bytes: states + two_largest.max(block) + workspace,
        resident_memory_bytes: states + all + workspace,
        hidden_state_bytes: hidden_states,
        disk_bytes: checkpoint.weights.files().iter().map(|f| f.bytes).sum(),
        bytes_to_read: stored,
    }
}

/// Memory of one micro-batch on its way through the widest block: projections, one block of scores, one block of logits.
fn workspace(spec: &DecoderSpec, run: PlannedRun) -> u64 {
    let rows = ((run.micro_batch_tokens / run.tokens.max(1)).max(1) * run.tokens) as u64;
    let value = run.compute.size_in_bytes() as u64;
    let widest = spec.layers.iter().map(|l| {
        let a = &l.attention;
        let projections = (2 * a.heads + 2 * a.kv_heads) * a.head_dim + 2 * spec.hidden;
        let scores = a.heads * 256 * run.tokens;
        let mlp = match &l.ffn {
            FfnSpec::Dense(g) => 3 * g.intermediate,
            FfnSpec::Moe(m) => 3 * m.expert.intermediate + spec.hidden,
        };
        (rows * projections.max(mlp) as u64 + scores as u64) * value
    });
    let logits = rows * VOCAB_BLOCK.min(spec.vocab) as u64 * (value + 4);
    widest.max().unwrap_or(0).max(logits)
}
