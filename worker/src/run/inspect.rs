//! Describes a checkpoint and estimates what a run needs. It reads headers and no weights.

use std::ops::Range;

use candle_core::DType;
use half::bf16;
use outliers_protocol::{
    FileBytes, GpuWork, Inspection, JobSpec, LayerInspection, MICRO_BATCH_TOKENS, Measurement, ModelSource,
    PlanFigures, Point, SCHEMA, SiteInspection, Weights,
};
use outliers_scan::{BINS, STRIP};
use serde_json::Value;

use crate::blocks::attention::{QUERY_BLOCK, SCORE_VALUES};
use crate::blocks::ffn::{gathered_rows, usual_rows};
use crate::blocks::{delta_net, mamba};
use crate::checkpoint::Model;
use crate::checkpoint::hub::held_for_hashes;
use crate::checkpoint::source::Checkpoint;
use crate::device::gpu;
use crate::device::{self, Placement};
use crate::kernels::product::Arithmetic;
use crate::model::decoder::{
    DecoderSpec, FfnSpec, GateUp, LayerSpec, MaxSequenceLength, MixerSpec, MlpSpec, MoeSpec, Need, NormOrder, Part,
    Role, StreamingUnit,
};
use crate::pass::budget::StreamBudget;
use crate::pass::stream::{self, VOCAB_BLOCK, WAVES};
use crate::run::disk_bytes;
use crate::run::export;
use crate::stats::{Site, study};

/// Parameters of the planned run.
#[derive(Clone, Copy, Debug)]
pub struct PlannedRun {
    /// Number of sequences.
    pub sequences: usize,
    /// Tokens per sequence.
    pub tokens: usize,
    /// Arms: copies of the tokens, 1 plus those of an ablation.
    pub arms: usize,
    /// Dtype of the forward pass.
    pub compute: DType,
    /// Tokens per micro-batch.
    pub micro_batch_tokens: usize,
    /// Values decoded per group of experts.
    pub group_elements: u64,
    /// Bytes of the optional measurements ([`study::measured_bytes`]).
    pub measured: u64,
    /// Arithmetic of its devices.
    pub arithmetic: Arithmetic,
    /// Whether the head follows the layers.
    pub with_head: bool,
    /// Devices that share one memory.
    pub devices: usize,
}

impl PlannedRun {
    /// A job over `[sequences, tokens]` on devices, with the micro-batch as asked for or the usual
    /// one.
    pub fn new(
        job: &JobSpec,
        spec: &DecoderSpec,
        [sequences, tokens]: [usize; 2],
        arms: usize,
        devices: &[Placement],
        budget: StreamBudget,
    ) -> Self {
        let (compute, sharing) = (device::compute_dtype(job.precision, devices), device::sharing_memory(devices));
        Self {
            sequences,
            tokens,
            arms,
            compute,
            micro_batch_tokens: job.micro_batch_tokens.unwrap_or(MICRO_BATCH_TOKENS),
            group_elements: budget.group_elements(compute, sharing),
            measured: study::measured_bytes(job, spec, sequences) + export::memory(job, spec),
            arithmetic: Arithmetic::of(devices, compute),
            with_head: job.layers.is_none(),
            devices: sharing,
        }
    }
}

/// Largest micro-batch that is chosen, in tokens. An assumption: a larger one gains little.
const LARGEST_MICRO_BATCH: usize = 16 * MICRO_BATCH_TOKENS;
/// Bytes of a GPU's memory that micro-batches leave free for workspaces of libraries and
/// fragmentation. An assumption.
const RESERVE: u64 = 512 << 20;

/// Tokens of a micro-batch: as asked for; else, on GPUs, as many as there is memory for on each, so
/// that a GPU computes long at a time. On GPUs no more than [`most_tokens`] in either case.
pub fn micro_batch_tokens(asked: Option<usize>, model: &Model<'_>, run: PlannedRun, devices: &[Placement]) -> usize {
    let free = devices.iter().map(|placement| gpu::free_memory(&placement.device)).min().flatten();
    let Some(free) = free else { return asked.unwrap_or(MICRO_BATCH_TOKENS) };
    let most = most_tokens(&model.spec);
    let fitting = || largest_that_fits(run, devices.len(), free, most, |run| streamed_memory(model, run));
    asked.map_or_else(fitting, |asked| asked.min(most))
}

/// Tokens of the largest micro-batch of which no tensor has more values than kernels count
/// ([`gpu::MAX_VALUES`]).
fn most_tokens(spec: &DecoderSpec) -> usize {
    let units = spec.units(u64::MAX);
    let matrices = units.iter().flat_map(|unit| &unit.needs).filter(|need| need.is_matrix());
    let projected = matrices.flat_map(|need| need.shape.iter().copied()).max();
    let widest = projected.into_iter().chain([spec.hidden, VOCAB_BLOCK.min(spec.vocab)]).max();
    gpu::MAX_VALUES / widest.unwrap_or(1).max(1)
}

/// The largest micro-batch of a run whose memory is free on each of its devices and that has no
/// more than `limit` tokens; one sequence if none fits. Steps are powers of two: GPUs of one kind
/// choose the same.
fn largest_that_fits(
    run: PlannedRun,
    devices: usize,
    free: u64,
    limit: usize,
    memory: impl Fn(PlannedRun) -> u64,
) -> usize {
    let all = run.sequences * run.tokens;
    // Several devices need several waves to work at the same time.
    let most = if devices > 1 { all.div_ceil(WAVES).max(MICRO_BATCH_TOKENS) } else { all };
    let halves = std::iter::successors(Some(LARGEST_MICRO_BATCH), |size| (*size > run.tokens).then_some(size / 2));
    let sizes: Vec<usize> = halves.filter(|size| *size < 2 * most || *size <= run.tokens).collect();
    let free = free.saturating_sub(RESERVE);
    let fits = |size: &&usize| **size <= limit && memory(PlannedRun { micro_batch_tokens: **size, ..run }) <= free;
    let chosen = sizes.iter().find(fits).or(sizes.last());
    chosen.map_or(MICRO_BATCH_TOKENS, |size| (*size).min(all.max(1)))
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
        max_positions: spec.longest().map(MaxSequenceLength::tokens),
        tied_head: spec.head.tied,
        parameters: model.parameters(),
        active_parameters: active_parameters(spec),
        stored_bytes: model.stored_dtypes().values().sum(),
        stored_dtypes: model.stored_dtypes(),
        embedding_bytes: model.stored_bytes(0, [&spec.embedding_need()]),
        head_bytes: model.stored_bytes(0, &head),
        layers: spec.layers.iter().enumerate().map(|(i, layer)| layer_inspection(model, i, layer)).collect(),
        sites: spec.sites().into_iter().map(|site| site_inspection(model, site)).collect(),
        unstudied_norms: model.unstudied_norms(),
        ignored: model.ignored.clone(),
        unexplained: model.unexplained.clone(),
        config: model.config.clone(),
        checkpoint_notes: model.checkpoint_notes(),
        files: checkpoint.weights.files().to_vec(),
        description: if checkpoint.revision.is_some() { checkpoint.description() } else { Vec::new() },
        tokenizer: checkpoint.tokenizer().map(|files| files.to_string()),
        plan: plan(model, run, job, checkpoint.weights.files()),
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

/// Parameters that are used for one token, as models are commonly described: all parameters, of
/// the routed experts of each layer the top-k. The embedding counts whole, once where it is tied
/// to the head. All parameters of a dense model are active.
pub fn active_parameters(spec: &DecoderSpec) -> u64 {
    let head = spec.head_needs().into_iter().filter(|need| need.role != Role::Head || !spec.head.stored);
    let outside = [spec.embedding_need()].into_iter().chain(spec.input_needs()).chain(head);
    let inside = spec.units(u64::MAX).iter().map(|unit| active_in(spec, unit)).sum::<u64>();
    outside.map(|need| need.elements()).sum::<u64>() + inside
}

/// Parameters outside the layers that each token is multiplied by. Tables of which a token reads
/// one row do not count (learned positions, an untied embedding).
fn multiplied_outside(spec: &DecoderSpec) -> u64 {
    let lead_in = spec.input_needs().into_iter().filter(|need| need.role != Role::Positions);
    let lead_out = spec.output_needs().into_iter().chain([spec.head_need()]).chain(spec.head_bias_need());
    lead_in.chain(lead_out).map(|need| need.elements()).sum()
}

/// Active parameters of a unit. All experts of a layer are one unit.
fn active_in(spec: &DecoderSpec, unit: &StreamingUnit) -> u64 {
    let whole: u64 = unit.needs.iter().map(Need::elements).sum();
    match (&unit.part, &spec.layers[unit.layer].ffn) {
        (Part::Experts(_), FfnSpec::Moe(moe)) => {
            let of_experts = unit.needs.iter().filter(|need| need.expert.is_some());
            let routed: u64 = of_experts.map(Need::elements).sum();
            whole - routed + routed / moe.experts as u64 * moe.top_k as u64
        }
        _ => whole,
    }
}

/// Floating-point operations: two per token and parameter of a product, four per head value and
/// visible key.
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
    /// Sum of all three.
    pub(crate) fn total(self) -> f64 {
        self.mixer + self.feed_forward + self.head
    }

    /// Operations of a run over a model.
    pub(crate) fn of(spec: &DecoderSpec, run: PlannedRun) -> Self {
        let tokens = (run.sequences * run.tokens) as f64;
        let pairs = run.sequences as f64 * run.tokens as f64 * (run.tokens as f64 + 1.0) / 2.0;
        // Per visible pair of tokens and head: the product of query and key, and the weighted
        // value.
        let attention: f64 = spec.layers.iter().map(|l| 2.0 * l.mixer.pair_values() as f64 * pairs).sum();
        let mut flops =
            Self { mixer: attention, feed_forward: 0.0, head: 2.0 * multiplied_outside(spec) as f64 * tokens };
        for unit in spec.units(u64::MAX) {
            let kind = if unit.part == Part::Mixer { &mut flops.mixer } else { &mut flops.feed_forward };
            *kind += 2.0 * active_in(spec, &unit) as f64 * tokens;
        }
        if !run.with_head {
            flops.head = 0.0;
        }
        // Each arm repeats attention to measure the effect.
        let arms = run.arms as f64;
        let (mixer, feed_forward, head) =
            ((2.0 * arms - 1.0) * flops.mixer, arms * flops.feed_forward, arms * flops.head);
        Self { mixer, feed_forward, head }
    }
}

fn plan(model: &Model<'_>, run: PlannedRun, job: &JobSpec, files: &[FileBytes]) -> PlanFigures {
    let disk_bytes = disk_bytes(job, files);
    let streams = matches!((&job.model, &job.weights), (ModelSource::Hub { .. }, None | Some(Weights::Hub)));
    let held = || {
        let order = stream::reading_order(model, run.group_elements, run.with_head, None);
        held_for_hashes(&order, files.iter().map(|file| file.bytes))
    };
    let spec = &model.spec;
    let value = run.compute.size_in_bytes() as u64;
    PlanFigures {
        sequences: run.sequences,
        tokens_per_sequence: run.tokens,
        compute_bytes_per_value: value,
        flops: Flops::of(spec, run).total(),
        micro_batch_tokens: job.micro_batch_tokens,
        streamed_memory_bytes: streamed_memory(model, run),
        resident_memory_bytes: resident_memory(model, run),
        host_memory_bytes: if run.arithmetic.in_place {
            0
        } else {
            let read_ahead = if streams { StreamBudget::least(job.stream_budget_bytes).read_ahead() } else { 0 };
            host_memory(model, run, job.devices.len().max(1), read_ahead)
        },
        hidden_state_bytes: hidden_states(spec, run),
        hash_memory_bytes: if streams && disk_bytes == 0 { held() } else { 0 },
        disk_bytes,
        bytes_to_read: model.stored_dtypes().values().sum(),
        on_gpus: on_gpus(model, run, job),
        exports: export::planned(job, spec),
    }
}

/// Kernels for the statistics of a norm output. Each reads all of its values. Other sites have one
/// fewer.
const NORM_KERNELS: u64 = 4;
/// Kernels of a layer's mixer or dense feed-forward per micro-batch, and of an expert per wave.
/// Assumed.
const MIXER_KERNELS: u64 = 40;
const FEED_FORWARD_KERNELS: u64 = 15;
const EXPERT_KERNELS: u64 = 8;

/// Bytes of a row's summary: the largest value, the median, two moments.
const OF_ROW: usize = 24;
/// Bytes of a column's summary per sequence: two counts, two extremes, four sums.
const OF_COLUMN: usize = 48;

/// GPU work besides arithmetic. The outputs of single experts count together as one site.
fn on_gpus(model: &Model<'_>, run: PlannedRun, job: &JobSpec) -> GpuWork {
    let spec = &model.spec;
    let (layers, norms) = (spec.layers.len() as u64, spec.sites().len() as u64);
    let seen = |points: &[Point]| layers * points.iter().filter(|point| job.studies(**point)).count() as u64;
    let others = seen(&[Point::Residual, Point::AttentionOut, Point::MlpOut, Point::ExpertOut]);
    let asked = |measurement| job.measure.contains(&measurement);
    // Sites whose values are copied to the host.
    let on_host = if asked(Measurement::QuantizationError) {
        norms + others
    } else if asked(Measurement::SpikeLife) {
        seen(&[Point::Residual, Point::AttentionOut, Point::MlpOut])
    } else if asked(Measurement::ResidualSinks) {
        seen(&[Point::Residual])
    } else {
        0
    };
    let (sequences, tokens) = (run.sequences as u64, (run.sequences * run.tokens) as u64);
    let hidden = spec.hidden as u64;
    let batches = tokens.div_ceil(batch_rows(run).max(1) as u64);
    let waves = batches.min(WAVES as u64);

    // A tied head is read with the embedding and uploaded as well.
    let after_layers = spec.output_needs().into_iter().chain([spec.head_need()]).chain(spec.head_bias_need());
    let head = if run.with_head { model.stored_bytes(0, &after_layers.collect::<Vec<_>>()) } else { 0 };
    // Each row once, and which one each token has.
    let rows_in_use = if spec.embedding.scale.is_some() { scaled_rows(spec, run) } else { stored_rows(model, run) };
    let embedded = rows_in_use + (run.sequences * run.tokens * size_of::<u32>()) as u64;
    let units = spec.units(run.group_elements);
    let weights: u64 = units.iter().map(|unit| model.stored_bytes(unit.layer, &unit.needs)).sum();
    let rows = tokens * OF_ROW as u64 + sequences * 8 * BINS as u64;
    let columns = norms * sequences * hidden * OF_COLUMN as u64;
    let values = on_host * tokens * hidden * size_of::<f32>() as u64;
    let logits = if run.with_head { tokens * 12 * spec.vocab.div_ceil(VOCAB_BLOCK) as u64 } else { 0 };
    let kernels = NORM_KERNELS * norms + (NORM_KERNELS - 1) * others;
    let of_layer = |layer: &LayerSpec| {
        let experts = EXPERT_KERNELS * layer.experts() as u64 * waves;
        batches * (MIXER_KERNELS + FEED_FORWARD_KERNELS) + experts
    };
    let arms = run.arms as u64;
    GpuWork {
        host_to_device_bytes: weights + head + embedded,
        device_to_host_bytes: (norms + others) * rows + columns + values + arms * logits,
        passed_on_bytes: layers * hidden_states(spec, run),
        statistics_bytes: kernels * tokens * hidden * run.compute.size_in_bytes() as u64,
        launches: arms * spec.layers.iter().map(of_layer).sum::<u64>() + batches * kernels,
    }
}

/// Bytes of the hidden states of all tokens and arms.
fn hidden_states(spec: &DecoderSpec, run: PlannedRun) -> u64 {
    (run.arms * run.sequences * run.tokens * spec.hidden * run.compute.size_in_bytes()) as u64
}

/// Bytes kept of all tokens while a unit is computed: hidden states; the norm output that a mixer
/// leaves for the feed-forward; for a mixture of experts the norm output, the sum of its experts,
/// and the output of an MLP beside them.
fn states(spec: &DecoderSpec, unit: &StreamingUnit, run: PlannedRun) -> u64 {
    let layer = &spec.layers[unit.layer];
    let shared = u64::from(layer.order == NormOrder::Shared);
    let beside = u64::from(matches!(&layer.ffn, FfnSpec::Moe(moe) if moe.beside.is_some()));
    hidden_states(spec, run)
        * match unit.part {
            Part::Mixer | Part::Dense => 1 + shared,
            Part::Router | Part::Experts(_) => 3 + beside,
        }
}

/// Maximum memory over units besides weights, in bytes. Several devices may work on different
/// units.
fn busiest(spec: &DecoderSpec, units: &[StreamingUnit], run: PlannedRun) -> u64 {
    let states = |unit: &StreamingUnit| states(spec, unit, run);
    let work = |unit: &StreamingUnit| workspace(spec, unit, run) + widened(spec, unit, run);
    if run.devices > 1 {
        most(units, states) + run.devices as u64 * most(units, work)
    } else {
        most(units, |unit| states(unit) + work(unit))
    }
}

fn most(units: &[StreamingUnit], bytes: impl Fn(&StreamingUnit) -> u64) -> u64 {
    units.iter().map(bytes).max().unwrap_or(0)
}

/// Memory of the program before it loads a model, in bytes.
const OWN: u64 = 12 << 20;

/// Memory of a run with streamed weights, in bytes: the state of all tokens, and for each device
/// its two largest units, the stored bytes of one tensor being decoded, the rotation angles and
/// its workspace; or the same for the head, which follows.
pub fn streamed_memory(model: &Model<'_>, run: PlannedRun) -> u64 {
    let spec = &model.spec;
    let units = spec.units(run.group_elements);
    let mut sizes: Vec<u64> = units
        .iter()
        .map(|unit| model.kept_bytes(unit.layer, &unit.needs, run.compute, run.arithmetic.takes_bf16))
        .collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    let two_largest: u64 = sizes.iter().take(2).sum();
    let needs = units.iter().flat_map(|unit| unit.needs.iter().map(|need| model.stored(unit.layer, need).bytes()));
    // On the host. On a GPU stored bytes arrive in pieces of a buffer, no larger than a tensor.
    let being_decoded = needs.max().unwrap_or(0);
    let layers = run.devices as u64 * (two_largest + being_decoded) + busiest(spec, &units, run) + looked_at(spec, run);
    // A run on GPUs has this in another memory ([`host_memory`]).
    let of_host = |bytes: u64| if run.arithmetic.in_place { bytes } else { 0 };
    // A tied head is read once, before the layers.
    let tied = if run.with_head && spec.head.tied { model.stored_bytes(0, [&spec.embedding_need()]) } else { 0 };
    let head = if run.with_head { hidden_states(spec, run) + head_workspace(model, run) } else { 0 };
    let laid_out = run.devices as u64 * most(&units, |unit| laid_out(spec, unit, run));
    let angles = run.devices as u64 * angles(spec, run);
    let noted = study::bytes(spec.sites().len(), spec.hidden) + run.measured;
    let in_dtype = (used_values(spec, run) * run.compute.size_in_bytes()) as u64;
    // On the host. On a GPU these bytes arrive in pieces of pinned memory.
    let embedded = embedded(model, run);
    let embedded = in_dtype + if run.arithmetic.in_place { embedded } else { embedded.min(gpu::PINNED) };
    let peak = layers.max(head).max(hidden_states(spec, run) + embedded);
    OWN + of_host(noted + tied) + laid_out + angles + peak
}

/// What the driver and its libraries keep on the host for a GPU, bytes. An assumption.
const OF_DRIVER: u64 = 512 << 20;

/// Memory of the host of a run on so many GPUs at least, bytes. All the time: what weights go
/// through, `read_ahead` bytes of them that arrive early, the stored bytes of one tensor per GPU, a
/// tied head as it is stored, token ids and statistics. Beside these either the embedding, or what
/// comes from GPUs: hidden states of a micro-batch, and summaries that have not been added.
pub fn host_memory(model: &Model<'_>, run: PlannedRun, gpus: usize, read_ahead: u64) -> u64 {
    let (spec, gpus) = (&model.spec, gpus as u64);
    let units = spec.units(run.group_elements);
    let needs = units.iter().flat_map(|unit| unit.needs.iter().map(|need| model.stored(unit.layer, need).bytes()));
    let of_gpu = OF_DRIVER + gpu::PINNED + needs.max().unwrap_or(0);
    let table = model.stored_bytes(0, [&spec.embedding_need()]);
    let tied = if run.with_head && spec.head.tied { table } else { 0 };
    // One in use and one on its way.
    let blocks = 2 * table.div_ceil(spec.vocab.div_ceil(VOCAB_BLOCK).max(1) as u64);
    let tokens = (run.sequences * run.tokens) as u64;
    let statistics = study::bytes(spec.sites().len(), spec.hidden) + run.measured;
    let (rows, sequences) = (batch_rows(run), batch_rows(run) / run.tokens.max(1));
    let summary = rows * OF_ROW + sequences * (spec.hidden * OF_COLUMN + BINS * size_of::<u64>());
    // In f32 where they are measured or saved.
    let hidden = rows * spec.hidden * size_of::<f32>();
    // Pinned buffers are of powers of two.
    let landed = gpus * ((study::HELD + 1) * summary.next_power_of_two() + hidden) as u64;
    // Of each token its place in the order of ids and in the rows that are used.
    let places = tokens * (size_of::<usize>() + size_of::<u32>()) as u64;
    let at_a_time = (embedded(model, run) + places + blocks).max(landed);
    OWN + gpus * of_gpu + read_ahead + tied + tokens * size_of::<i64>() as u64 + statistics + at_a_time
}

/// Memory of a run with all weights resident, in bytes.
pub fn resident_memory(model: &Model<'_>, run: PlannedRun) -> u64 {
    let weights = model.parameters() * run.compute.size_in_bytes() as u64;
    let units = model.spec.units(run.group_elements);
    let work = busiest(&model.spec, &units, run).max(hidden_states(&model.spec, run) + head_workspace(model, run));
    weights + angles(&model.spec, run) + work
}

/// Bytes of cosines and sines of all positions, per kind of rotation.
fn angles(spec: &DecoderSpec, run: PlannedRun) -> u64 {
    let mut kinds = Vec::new();
    for rope in spec.layers.iter().filter_map(|layer| layer.mixer.rope()) {
        if !kinds.contains(&rope) {
            kinds.push(rope);
        }
    }
    let dims: usize = kinds.iter().map(|rope| rope.dims).sum();
    (run.tokens * dims * size_of::<f32>()) as u64
}

/// Rows of a micro-batch, in whole sequences.
fn batch_rows(run: PlannedRun) -> usize {
    (run.micro_batch_tokens / run.tokens.max(1)).clamp(1, run.sequences.max(1)) * run.tokens
}

/// Bytes of activations held on a GPU until their statistics are read: values, masks of large
/// values, six numbers per strip of a column during the reduction, and the summaries.
fn looked_at(spec: &DecoderSpec, run: PlannedRun) -> u64 {
    if run.arithmetic.in_place {
        return 0;
    }
    let (rows, sequences) = (batch_rows(run), batch_rows(run) / run.tokens.max(1));
    let strips = sequences * run.tokens.div_ceil(STRIP);
    let held = rows * run.compute.size_in_bytes() + strips * 2 * size_of::<u32>();
    let of_columns = strips * 6 * size_of::<f32>() + sequences * OF_COLUMN;
    let of_rows = rows * OF_ROW + sequences * BINS * size_of::<u64>();
    (((study::HELD + 1) * held + of_columns) * spec.hidden + of_rows) as u64
}

/// Values of the embedding's rows that a text uses at most.
fn used_values(spec: &DecoderSpec, run: PlannedRun) -> usize {
    (run.sequences * run.tokens).min(spec.vocab) * spec.embedding.width
}

/// Bytes of the embedding's rows that a text uses, as they are stored.
fn stored_rows(model: &Model<'_>, run: PlannedRun) -> u64 {
    let spec = &model.spec;
    let row = model.stored_bytes(0, [&spec.embedding_need()]) / spec.vocab.max(1) as u64;
    used_values(spec, run) as u64 / spec.embedding.width.max(1) as u64 * row
}

/// Bytes of these rows in f32, as they are scaled; 0 without a scale.
fn scaled_rows(spec: &DecoderSpec, run: PlannedRun) -> u64 {
    if spec.embedding.scale.is_none() {
        return 0;
    }
    (used_values(spec, run) * size_of::<f32>()) as u64
}

/// What the host keeps of the embedding until it is decoded, bytes.
fn embedded(model: &Model<'_>, run: PlannedRun) -> u64 {
    stored_rows(model, run) + scaled_rows(&model.spec, run)
}

/// Memory of a micro-batch in a unit, in bytes: projections and one block of scores, or a
/// feed-forward.
fn workspace(spec: &DecoderSpec, unit: &StreamingUnit, run: PlannedRun) -> u64 {
    let (rows, value) = (rows(spec, unit, run), run.compute.size_in_bytes());
    let LayerSpec { mixer, ffn, .. } = &spec.layers[unit.layer];
    let feed_forward = |mlp: &MlpSpec| {
        // Gate, up and their product, which may reuse the gate's buffer.
        let inner = match mlp.gate_up() {
            None | Some(GateUp::Separate) => 2,
            Some(GateUp::Halves | GateUp::Interleaved) => 3,
        };
        rows * (inner * mlp.intermediate + 2 * spec.hidden) * value
    };
    let bytes = match (&unit.part, ffn) {
        (Part::Mixer, _) => {
            // A CPU computes attention for one sequence at a time.
            let (sequences, mixed) = match run.arithmetic.in_place {
                true => (1, 0),
                false => (rows.div_ceil(run.tokens.max(1)), mixer.mixed_bytes(value)),
            };
            let scores = (sequences * mixer.score_heads() * QUERY_BLOCK * run.tokens).min(SCORE_VALUES) * value;
            let of_batch = rows.div_ceil(run.tokens.max(1));
            let recurrence = match mixer {
                MixerSpec::DeltaNet(delta) if !run.arithmetic.in_place => {
                    delta_net::rule_bytes(delta, of_batch, run.tokens)
                }
                MixerSpec::Mamba(of) => mamba::recurrence_bytes(of, of_batch, run.tokens, run.arithmetic.in_place),
                _ => 0,
            };
            // Input and output; both are kept while attention is looked at without what an arm
            // lacks.
            let states = if run.arms > 1 { 4 } else { 2 };
            rows * (mixer.projected_bytes(value) + mixed + states * spec.hidden * value) + scores + recurrence
        }
        (_, FfnSpec::None) => 0,
        (_, FfnSpec::Dense(mlp)) => feed_forward(mlp),
        (Part::Experts(group), FfnSpec::Moe(moe)) => feed_forward(&moe.expert) + dispatched(spec, moe, group, run),
        (_, FfnSpec::Moe(moe)) => {
            let shared = moe.shared.map(|shared| shared.mlp);
            // On a GPU, before the experts: logits, scores for choice and weight, and their order;
            // the input in f32, and a normalised copy where there is one.
            let wide = usize::from(run.compute != DType::F32) + usize::from(moe.router.scales());
            let routed = rows * (4 * moe.experts + wide * spec.hidden) * size_of::<f32>();
            let routed = if run.arithmetic.in_place { 0 } else { routed };
            shared.iter().chain(&moe.beside).map(feed_forward).max().unwrap_or(0).max(routed)
        }
    };
    bytes as u64
}

/// What experts take beside their products on a GPU, bytes: the inputs that are gathered at once,
/// those of an expert before they are weighted, and of all tokens the choices, with their weights,
/// in both orders.
fn dispatched(spec: &DecoderSpec, moe: &MoeSpec, group: &Range<usize>, run: PlannedRun) -> usize {
    if run.arithmetic.in_place {
        return 0;
    }
    let (tokens, batch_rows) = (run.sequences * run.tokens, batch_rows(run));
    let wave_rows = tokens.min(stream::batches_per_wave(tokens.div_ceil(batch_rows)) * batch_rows);
    let inputs = gathered_rows(moe, wave_rows, group.len());
    let choices = tokens * moe.top_k * 2 * (size_of::<u32>() + size_of::<f32>());
    (inputs + expert_rows(moe, run)) * spec.hidden * run.compute.size_in_bytes() + choices
}

/// Rows that a unit processes at once.
fn rows(spec: &DecoderSpec, unit: &StreamingUnit, run: PlannedRun) -> usize {
    match (&unit.part, &spec.layers[unit.layer].ffn) {
        (Part::Experts(_), FfnSpec::Moe(moe)) => expert_rows(moe, run),
        _ => batch_rows(run),
    }
}

/// Bytes of a unit's largest input as packed for a product with bf16 weights: an f32 becomes at
/// most three parts.
fn laid_out(spec: &DecoderSpec, unit: &StreamingUnit, run: PlannedRun) -> u64 {
    if !run.arithmetic.takes_bf16 {
        return 0;
    }
    let value = if run.compute == DType::F32 { 3 * size_of::<bf16>() } else { size_of::<bf16>() };
    let inputs = unit.needs.iter().filter(|need| need.is_matrix()).map(|need| need.shape[1]);
    let bytes = rows(spec, unit, run) * inputs.max().unwrap_or(0) * value;
    bytes.min(outliers_matmul::MEMORY) as u64
}

/// Memory of a unit's largest product in f32 where the pass uses another dtype and products do
/// not: a matrix, its input and its output.
fn widened(spec: &DecoderSpec, unit: &StreamingUnit, run: PlannedRun) -> u64 {
    if !run.arithmetic.widens {
        return 0;
    }
    let rows = rows(spec, unit, run);
    let values = |need: &Need| need.shape.iter().product::<usize>() + rows * need.shape.iter().sum::<usize>();
    let matrices = unit.needs.iter().filter(|need| need.is_matrix());
    (matrices.map(values).max().unwrap_or(0) * size_of::<f32>()) as u64
}

/// Rows that an expert is given at once, no more than a micro-batch has: on a CPU those that it
/// usually is sent of all tokens; on a GPU, whose memory ends, as many as there may be.
fn expert_rows(moe: &MoeSpec, run: PlannedRun) -> usize {
    let most = batch_rows(run);
    if run.arithmetic.in_place { usual_rows(moe, run.sequences * run.tokens).min(most) } else { most }
}

/// Memory of the head: one vocabulary block in use, one being loaded, on a GPU also the one before,
/// and the logits of a micro-batch, twice if a softcap applies.
fn head_workspace(model: &Model<'_>, run: PlannedRun) -> u64 {
    let (need, value) = (model.spec.head_need(), run.compute.size_in_bytes());
    let block = VOCAB_BLOCK.min(model.spec.vocab);
    let stored = model.stored(0, &need);
    let blocks = if run.arithmetic.in_place { 2 } else { 3 };
    let kept = blocks * stored.kept_as(run.compute, run.arithmetic.takes_bf16).size_in_bytes() * need.shape[1] * block;
    let widened = if run.arithmetic.widens { size_of::<f32>() * (block + batch_rows(run)) * need.shape[1] } else { 0 };
    let on_its_way = stored.bytes() as usize / need.shape[0] * block;
    let logits = if model.spec.head.softcap.is_some() { 2 * value } else { value };
    (kept + on_its_way + widened + batch_rows(run) * block * logits) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::arch;

    fn spec(config: &str, change: impl FnOnce(&mut Value)) -> DecoderSpec {
        let mut config = serde_json::from_str(config).unwrap();
        change(&mut config);
        arch::read(&config).unwrap().spec
    }

    /// The choice where a token takes a megabyte.
    fn chosen(sequences: usize, tokens: usize, devices: usize, free: u64) -> usize {
        chosen_within(usize::MAX, sequences, tokens, devices, free)
    }

    fn chosen_within(limit: usize, sequences: usize, tokens: usize, devices: usize, free: u64) -> usize {
        let run = PlannedRun {
            sequences,
            tokens,
            arms: 1,
            compute: DType::BF16,
            micro_batch_tokens: 0,
            group_elements: 1,
            measured: 0,
            arithmetic: Arithmetic::default(),
            with_head: true,
            devices: 1,
        };
        largest_that_fits(run, devices, free, limit, |run| (batch_rows(run) << 20) as u64)
    }

    #[test]
    fn no_tensor_of_a_micro_batch_has_more_values_than_kernels_count() {
        let all = 1000 << 30;
        assert_eq!(chosen_within(65_535, 512, 2048, 1, all), 32_768);
        assert_eq!(chosen_within(100, 512, 2048, 1, all), 2048, "one sequence");
        let text = include_str!("../../../tests/golden/mixtral/model/config.json");
        let wide = spec(text, |config| config["intermediate_size"] = (1 << 20).into());
        assert_eq!(most_tokens(&wide), 2047, "2,048 would make 2^31 values");
        assert!(most_tokens(&wide) * (1 << 20) < 1 << 31);
        // A block of the vocabulary, or all of it.
        let narrow = spec(text, |_| ());
        assert!(most_tokens(&narrow) >= gpu::MAX_VALUES / 4096);
    }

    #[test]
    fn micro_batch_is_the_largest_that_fits() {
        let gib = |n: u64| n << 30;
        assert_eq!(chosen(16, 2048, 1, gib(33)), 32_768, "all of them");
        assert_eq!(chosen(16, 2048, 1, gib(32)), 16_384, "what libraries take is left free");
        assert_eq!(chosen(16, 2048, 1, gib(9)), 8192);
        assert_eq!(chosen(512, 2048, 1, gib(1000)), LARGEST_MICRO_BATCH);
        assert_eq!(chosen(16, 2048, 1, gib(1)), 2048, "one sequence, if less fits");
        assert_eq!(chosen(2, 100_000, 1, gib(1)), 65_536, "which may be longer than any");
        assert_eq!(chosen(16, 2048, 4, gib(1000)), 8192, "each device has a wave of its own");
        assert_eq!(chosen(3, 24, 3, gib(1)), 72, "few tokens are not divided");
    }

    /// Sequences of 32 tokens on a GPU, all in one micro-batch.
    fn on_a_gpu(sequences: usize, compute: DType) -> PlannedRun {
        PlannedRun {
            sequences,
            tokens: 32,
            arms: 1,
            compute,
            micro_batch_tokens: 32 * sequences,
            group_elements: 1,
            measured: 0,
            arithmetic: Arithmetic::default(),
            with_head: true,
            devices: 1,
        }
    }

    #[test]
    fn router_takes_its_input_in_f32_on_a_gpu() {
        let of_router = |spec: &DecoderSpec, run: PlannedRun| {
            let unit = spec.units(1).into_iter().find(|unit| unit.part == Part::Router).unwrap();
            workspace(spec, &unit, run)
        };
        let (plain, rows) = (spec(include_str!("../../../tests/golden/mixtral/model/config.json"), |_| ()), 10 * 32);
        // By hand: four numbers per expert, of which there are four, and 64 features.
        assert_eq!(of_router(&plain, on_a_gpu(10, DType::BF16)), rows * 4 * (4 * 4 + 64));
        assert_eq!(of_router(&plain, on_a_gpu(10, DType::F32)), rows * 4 * 4 * 4, "it is there");
        let in_place = Arithmetic { in_place: true, ..Arithmetic::default() };
        assert_eq!(of_router(&plain, PlannedRun { arithmetic: in_place, ..on_a_gpu(10, DType::BF16) }), 0);
    }

    #[test]
    fn one_expert_for_all_tokens_is_planned_on_a_gpu() {
        let mixtral = spec(include_str!("../../../tests/golden/mixtral/model/config.json"), |_| ());
        let FfnSpec::Moe(moe) = &mixtral.layers[0].ffn else { panic!("Mixtral without experts") };
        let run = PlannedRun { micro_batch_tokens: 64, ..on_a_gpu(10, DType::BF16) };
        let in_place = Arithmetic { in_place: true, ..Arithmetic::default() };
        // Five micro-batches of 64 tokens, two of them in a wave.
        assert_eq!((expert_rows(moe, run), gathered_rows(moe, 128, 1)), (64, 128));
        let short = PlannedRun { sequences: 2, arithmetic: in_place, ..run };
        assert_eq!(expert_rows(moe, short), usual_rows(moe, 64), "what a CPU is usually given");
    }

    #[test]
    fn summaries_of_short_sequences_are_planned_on_a_gpu() {
        let mixtral = spec(include_str!("../../../tests/golden/mixtral/model/config.json"), |_| ());
        // By hand, of each sequence: 32 rows of 64 values and two words of marks, held five times;
        // six numbers of one strip, and the summaries of columns, of rows and of magnitudes.
        let held = 5 * (32 * 64 * 2 + 64 * 2 * 4);
        let made = 64 * 6 * 4 + 64 * (2 * 4 + 2 * 4 + 4 * 8) + 32 * (4 + 4 + 8 + 8) + 2048 * 8;
        assert_eq!(looked_at(&mixtral, on_a_gpu(10, DType::BF16)), 10 * (held + made));
    }

    #[test]
    fn ablation_keeps_input_and_output_of_attention_while_it_is_looked_at_again() {
        let mixtral = spec(include_str!("../../../tests/golden/mixtral/model/config.json"), |_| ());
        let units = mixtral.units(1);
        let of = |arms| workspace(&mixtral, &units[0], PlannedRun { arms, ..on_a_gpu(10, DType::BF16) });
        assert_eq!((of(2) - of(1), of(3) - of(1)), (2 * 320 * 64 * 2, 2 * 320 * 64 * 2));
    }

    #[test]
    fn active_parameters_of_a_mixture_exclude_unselected_experts() {
        let text = include_str!("../../../tests/golden/glm4-moe/model/config.json");
        let mixture = |top_k: u64| spec(text, |config| config["num_experts_per_tok"] = top_k.into());
        // By hand. Embedding, head, last norm; both norms, queries, keys, values with their
        // biases, output; router with its correction.
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
    fn angles_are_planned_once_for_each_kind_of_rotation() {
        let run = PlannedRun {
            sequences: 1,
            tokens: 1000,
            arms: 1,
            compute: DType::F32,
            micro_batch_tokens: 1000,
            group_elements: 1,
            measured: 0,
            arithmetic: Arithmetic::default(),
            with_head: true,
            devices: 1,
        };
        // Global layers and sliding-window layers use different rotary frequencies.
        let two = spec(include_str!("../../../tests/golden/gemma3-text/model/config.json"), |_| ());
        let dims = two.layers[0].mixer.rope().unwrap().dims;
        assert_eq!(angles(&two, run), 2 * 1000 * 4 * dims as u64);
        let none = spec(include_str!("../../../tests/golden/gpt2/model/config.json"), |_| ());
        assert_eq!(angles(&none, run), 0);
    }

    #[test]
    fn dense_model_is_fully_active_and_counts_a_tied_head_once() {
        let dense = spec(include_str!("../../../tests/golden/gpt2/model/config.json"), |_| ());
        // By hand. Tokens, positions, last norm; two norms, queries, keys and values, output, up,
        // down, each with its bias.
        let layer = 2 * 128 + (64 + 1) * 192 + (64 + 1) * 64 + (64 + 1) * 256 + (256 + 1) * 64;
        assert_eq!(active_parameters(&dense), (300 + 96 + 2) * 64 + 2 * layer);
    }
}
