//! What a checkpoint is and what a run over it needs: arithmetic over headers, no weight byte read.

use candle_core::DType;
use outliers_protocol::{Inspection, JobSpec, LayerInspection, PlanFigures, Point, SCHEMA, SiteInspection};
use serde_json::Value;

use crate::attention::{QUERY_BLOCK, SCORE_VALUES};
use crate::decoder::{DecoderSpec, FfnSpec, LayerSpec, Need, Part, Role, Unit};
use crate::model::Model;
use crate::run::disk_bytes;
use crate::source::Checkpoint;
use crate::stats::Site;
use crate::stream::VOCAB_BLOCK;

/// The run to plan for.
#[derive(Clone, Copy, Debug)]
pub struct PlannedRun {
    /// Sequences.
    pub sequences: usize,
    /// Tokens per sequence.
    pub tokens: usize,
    /// Copies of the tokens that pass: the whole ones, and those of an ablation.
    pub arms: usize,
    /// Dtype of the forward pass.
    pub compute: DType,
    /// Tokens computed together.
    pub micro_batch_tokens: usize,
    /// Values decoded per group of experts.
    pub group_elements: u64,
    /// Devices whose weights and workspaces are in one memory.
    pub devices: usize,
}

/// Describes the checked model of a job.
pub fn inspect(job: &JobSpec, checkpoint: &Checkpoint, model: &Model<'_>, run: PlannedRun) -> Inspection {
    let spec = &model.spec;
    let head = spec.head_needs();
    Inspection {
        schema: SCHEMA,
        model: job.model.name().to_owned(),
        revision: checkpoint.revision.clone(),
        architecture: model.family.architecture.to_owned(),
        model_type: string(&checkpoint.config, "model_type"),
        hidden: spec.hidden,
        vocab: spec.vocab,
        max_positions: spec.max_positions,
        tied_head: spec.head.tied,
        parameters: model.parameters(),
        active_parameters: active_parameters(spec),
        stored_bytes: model.stored_dtypes().values().sum(),
        stored_dtypes: model.stored_dtypes(),
        embedding_bytes: model.stored_bytes(0, [&spec.embedding_need()]),
        head_bytes: model.stored_bytes(0, &head),
        layers: spec.layers.iter().enumerate().map(|(i, layer)| layer_inspection(model, i, layer)).collect(),
        sites: spec.sites().into_iter().map(|site| site_inspection(model, site)).collect(),
        ignored: model.ignored.clone(),
        unexplained: model.unexplained.clone(),
        files: checkpoint.weights.files().to_vec(),
        tokenizer: checkpoint.tokenizer().map(|files| files.to_string()),
        plan: plan(model, run, disk_bytes(job, checkpoint.weights.files())),
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
        experts: layer.experts(),
        tensors: needs.len(),
        parameters: needs.iter().map(Need::elements).sum(),
        bytes: model.stored_bytes(index, &needs),
    }
}

fn site_inspection(model: &Model<'_>, site: Site) -> SiteInspection {
    let role = match site.point {
        Point::BeforeMlp | Point::AfterMlp => Role::FfnNorm,
        _ => Role::MixerNorm,
    };
    SiteInspection { layer: site.layer, point: site.point, tensor: model.name(site.layer, role) }
}

/// Parameters that are there for one token, as models are commonly described: all that are used, of routed experts the top-k of each layer.
/// The embedding counts whole, once where it is the head as well: of a dense model all parameters are active.
pub fn active_parameters(spec: &DecoderSpec) -> u64 {
    let outside = [spec.embedding_need()].into_iter().chain(spec.input_needs()).chain(spec.head_needs());
    let inside = spec.units(u64::MAX).iter().map(|unit| active_in(spec, unit)).sum::<u64>();
    outside.map(|need| need.elements()).sum::<u64>() + inside
}

/// Parameters outside the layers that a token is multiplied with: not the tables of which it reads one row (learned positions, and the
/// embedding, unless that is the head as well).
fn multiplied_outside(spec: &DecoderSpec) -> u64 {
    let lead_in = spec.input_needs().into_iter().filter(|need| need.role != Role::Positions);
    let lead_out = spec.output_needs().into_iter().chain([spec.head_need()]).chain(spec.head_bias_need());
    lead_in.chain(lead_out).map(|need| need.elements()).sum()
}

/// Active parameters of a unit, all experts of a layer being one.
fn active_in(spec: &DecoderSpec, unit: &Unit) -> u64 {
    let whole: u64 = unit.needs.iter().map(Need::elements).sum();
    match (&unit.part, &spec.layers[unit.layer].ffn) {
        (Part::Experts(_), FfnSpec::Moe(moe)) => whole / moe.experts as u64 * moe.top_k as u64,
        _ => whole,
    }
}

/// Floating-point operations: two per token and parameter it is multiplied with, and four per head value and visible key.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Flops {
    /// Projections and attention.
    pub(crate) mixer: f64,
    /// MLPs, routers, experts.
    pub(crate) feed_forward: f64,
    /// Everything outside the layers.
    pub(crate) head: f64,
}

impl Flops {
    /// All of them.
    pub(crate) fn total(self) -> f64 {
        self.mixer + self.feed_forward + self.head
    }

    /// Of a run over a model.
    pub(crate) fn of(spec: &DecoderSpec, run: PlannedRun) -> Self {
        let tokens = (run.sequences * run.tokens) as f64;
        let pairs = run.sequences as f64 * run.tokens as f64 * (run.tokens as f64 + 1.0) / 2.0;
        // Per visible pair of tokens and head: the product of query and key, and the weighted value.
        let attention: f64 = spec.layers.iter().map(|l| 2.0 * l.mixer.pair_values() as f64 * pairs).sum();
        let mut flops =
            Self { mixer: attention, feed_forward: 0.0, head: 2.0 * multiplied_outside(spec) as f64 * tokens };
        for unit in spec.units(u64::MAX) {
            let kind = if unit.part == Part::Mixer { &mut flops.mixer } else { &mut flops.feed_forward };
            *kind += 2.0 * active_in(spec, &unit) as f64 * tokens;
        }
        // Attention is looked at once more per arm.
        let arms = run.arms as f64;
        let (mixer, feed_forward, head) =
            ((2.0 * arms - 1.0) * flops.mixer, arms * flops.feed_forward, arms * flops.head);
        Self { mixer, feed_forward, head }
    }
}

fn plan(model: &Model<'_>, run: PlannedRun, disk_bytes: u64) -> PlanFigures {
    let spec = &model.spec;
    let value = run.compute.size_in_bytes() as u64;
    PlanFigures {
        sequences: run.sequences,
        tokens_per_sequence: run.tokens,
        compute_bytes_per_value: value,
        flops: Flops::of(spec, run).total(),
        streamed_memory_bytes: streamed_memory(model, run),
        resident_memory_bytes: resident_memory(model, run),
        hidden_state_bytes: hidden_states(spec, run),
        disk_bytes,
        bytes_to_read: model.stored_dtypes().values().sum(),
    }
}

/// One hidden state per token and copy, bytes.
fn hidden_states(spec: &DecoderSpec, run: PlannedRun) -> u64 {
    (run.arms * run.sequences * run.tokens * spec.hidden * run.compute.size_in_bytes()) as u64
}

/// What is kept of all tokens. A mixture keeps the norm's output and the sum of its experts until its last group has passed.
fn states(spec: &DecoderSpec, run: PlannedRun) -> u64 {
    let mixture = spec.layers.iter().any(|l| matches!(l.ffn, FfnSpec::Moe(_)));
    hidden_states(spec, run) * if mixture { 3 } else { 1 }
}

/// Memory of a run whose weights are streamed, bytes: hidden states, and for each device its two largest units and its workspace.
pub fn streamed_memory(model: &Model<'_>, run: PlannedRun) -> u64 {
    let spec = &model.spec;
    let value = run.compute.size_in_bytes() as u64;
    let weights = |needs: &[Need]| needs.iter().map(Need::elements).sum::<u64>() * value;
    let mut units: Vec<u64> =
        spec.units(run.group_elements).iter().map(|u| weights(&u.needs) + model.unit_bytes(u) / 4).collect();
    units.sort_unstable_by(|a, b| b.cmp(a));
    let two_largest: u64 = units.iter().take(2).sum();
    let block = (VOCAB_BLOCK.min(spec.vocab) * spec.hidden) as u64 * (value + 4);
    let workspace = workspace(spec, run);
    states(spec, run) + (run.devices as u64 * (two_largest + workspace)).max(block + workspace)
}

/// Memory of a run whose weights are all there at once, bytes.
pub fn resident_memory(model: &Model<'_>, run: PlannedRun) -> u64 {
    let weights = model.parameters() * run.compute.size_in_bytes() as u64;
    states(&model.spec, run) + weights + workspace(&model.spec, run)
}

/// Memory of one micro-batch on its way through the widest block: projections, one block of scores, one block of logits.
fn workspace(spec: &DecoderSpec, run: PlannedRun) -> u64 {
    let rows = ((run.micro_batch_tokens / run.tokens.max(1)).max(1) * run.tokens) as u64;
    let value = run.compute.size_in_bytes();
    let widest = spec.layers.iter().map(|l| {
        let projections = l.mixer.projected_bytes(value) + 2 * spec.hidden * value;
        let scores = (l.mixer.score_heads() * QUERY_BLOCK * run.tokens).min(SCORE_VALUES) * value;
        let mlp = match &l.ffn {
            FfnSpec::Dense(mlp) => 3 * mlp.intermediate,
            FfnSpec::Moe(m) => 3 * m.shared.map_or(0, |s| s.mlp.intermediate).max(m.expert.intermediate) + spec.hidden,
        };
        rows * projections.max(mlp * value) as u64 + scores as u64
    });
    let logits = rows * VOCAB_BLOCK.min(spec.vocab) as u64 * (value as u64 + 4);
    widest.max().unwrap_or(0).max(logits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch;

    fn spec(config: &str, change: impl FnOnce(&mut Value)) -> DecoderSpec {
        let mut config = serde_json::from_str(config).unwrap();
        change(&mut config);
        arch::read(&config).unwrap().spec
    }

    #[test]
    fn of_a_mixture_all_is_active_but_the_experts_not_chosen() {
        let text = include_str!("../../tests/golden/glm4-moe/model/config.json");
        let mixture = |top_k: u64| spec(text, |config| config["num_experts_per_tok"] = top_k.into());
        // By hand. Embedding, head, last norm; both norms, queries, keys, values with their biases, output; router with its correction.
        let outside = 2 * 332 * 64 + 64;
        let mixer = 2 * 64 + (96 + 2 * 32) * (64 + 1) + 64 * 96;
        let (dense, expert, router) = (3 * 96 * 64, 3 * 32 * 64, 4 * 64 + 4);
        let with = |experts: u64| outside + (mixer + dense) + 2 * (mixer + router + expert + experts * expert);
        for top_k in [1, 2, 4] {
            assert_eq!(active_parameters(&mixture(top_k)), with(top_k), "a shared expert is always active");
        }
        let all: u64 = mixture(2).needs().iter().map(|(_, need)| need.elements()).sum();
        assert_eq!(all, with(4));
    }

    #[test]
    fn of_a_dense_model_everything_is_active_and_an_embedding_that_is_the_head_is_one() {
        let dense = spec(include_str!("../../tests/golden/gpt2/model/config.json"), |_| ());
        // By hand. Tokens, positions, last norm; two norms, queries, keys and values, output, up, down, each with its bias.
        let layer = 2 * 128 + (64 + 1) * 192 + (64 + 1) * 64 + (64 + 1) * 256 + (256 + 1) * 64;
        assert_eq!(active_parameters(&dense), (300 + 96 + 2) * 64 + 2 * layer);
    }
}
