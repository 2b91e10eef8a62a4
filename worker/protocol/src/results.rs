//! Outlier counts of a run. Their size depends on hidden size, layers and sequences, not on the
//! number of occurrences.

use serde::{Deserialize, Serialize};

use crate::{
    AblationArm, AttentionSinks, FeaturePeak, GainSummary, IndexSet, MassiveActivations, OtherSite, QuantizationErrors,
    ResidualSinks, RouterSummary, RowStatistics, SpikeLife, SuperExperts, Thresholds, TopRecords,
};

/// `results.json`.
///
/// Definitions (T = magnitude threshold, x = output of a studied norm, gain included):
/// a feature *exceeds* at (site, sequence, position) when |x| >= T; *occurrences* counts those
/// triples;
/// *layers* are layers with an occurrence at either of their sites, *sites* are norm outputs with
/// an occurrence;
/// *positions* are distinct (sequence, position) pairs with an occurrence at any site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// Document version.
    pub schema: u32,
    /// Hub id or folder, as asked for.
    pub model: String,
    /// The thresholds that were applied.
    pub thresholds: Thresholds,
    /// Layers studied.
    pub n_layers: usize,
    /// Norm outputs studied (2 per layer in most families).
    pub n_sites: usize,
    /// Gain tensors of norms in the layers that are not studied, with `{layer}` for the layer
    /// number. No projection reads their output (norms of a sublayer's output), or only experts
    /// do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unstudied_norms: Vec<String>,
    /// Hidden size: the number of features.
    pub hidden: usize,
    /// Sequences run.
    pub sequences: usize,
    /// Tokens per sequence.
    pub tokens_per_sequence: usize,
    /// Counts of systematic features, one per reading and axis.
    pub verdicts: Vec<Verdict>,
    /// Features with at least one occurrence, ascending by dimension.
    pub features: Vec<Feature>,
    /// One entry per sequence.
    pub per_sequence: Vec<SequenceSummary>,
    /// One entry per studied norm output, in order of computation.
    pub sites: Vec<SiteSummary>,
    /// Occurrences of all features together.
    pub total_occurrences: u64,
    /// Largest |x| at any studied site.
    pub max_abs: f32,
    /// `None` when only some layers were run.
    pub perplexity: Option<Perplexity>,
    /// Studied sites that are not norm outputs, by layer; empty unless the job asks for them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other_sites: Vec<OtherSite>,
    /// Massive activations; `None` unless the job asks for the residual stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub massive_activations: Option<MassiveActivations>,
    /// The largest values per kind of studied site, norm outputs included.
    #[serde(default)]
    pub top_records: Vec<TopRecords>,
    /// One entry per mixture-of-experts layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routers: Vec<RouterSummary>,
    /// Super-expert candidates; `None` without experts or unless the job asks for their outputs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub super_experts: Option<SuperExperts>,
    /// Error of quantised activations. This and the next three fields are `None` unless the job
    /// asks for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization_error: Option<QuantizationErrors>,
    /// Dimensions of the residual stream that are large at most tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub residual_sinks: Option<ResidualSinks>,
    /// Layers in which the first token's spike starts and ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spike_life: Option<SpikeLife>,
    /// Attention on the first key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_sinks: Option<AttentionSinks>,
    /// The whole model, then the model with features set to 0; empty unless the job asks for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ablation: Vec<AblationArm>,
}

/// One way to count systematic outlier features.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// How sequences were pooled.
    pub reading: Reading,
    /// What the share of layers is taken of.
    pub axis: Axis,
    /// The label for tables.
    pub label: String,
    /// Number of systematic features; a mean over sequences need not be whole.
    pub count: f64,
    /// Mean layer (or site) percentage over the counted features; `None` without any.
    pub mean_layer_percent: Option<f64>,
    /// Mean percentage of sequence positions over the counted features; `None` without any.
    pub mean_sequence_percent: Option<f64>,
}

/// How sequences are pooled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reading {
    /// Distinct features over the whole corpus.
    Unique,
    /// Features judged within each sequence; the mean count per sequence. Percentages are means
    /// over (sequence, feature) records.
    MeanPerSequence,
    /// Features judged within each sequence; counts are added up, so a feature counts once per
    /// sequence. The predecessor project's published figures are this count, over sites.
    SumOverSequences,
}

/// What the share of layers is taken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// Layers; a layer counts if any of its sites has an occurrence (the paper).
    Layers,
    /// Norm outputs, two per layer in most families (the predecessor).
    Sites,
}

/// Where inside a layer values are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Point {
    /// Norm output, input of the attention projections (site 0). If the same norm feeds the MLP,
    /// also the MLP's input.
    BeforeAttention,
    /// Norm output, input of the MLP, or of router and experts (site 1).
    BeforeMlp,
    /// Output of the norm after attention's residual addition, input of the MLP (site 0 of a
    /// post-norm layer).
    AfterAttention,
    /// Output of the norm after the MLP's residual addition, input of the next layer (site 1 of a
    /// post-norm layer).
    AfterMlp,
    /// The residual stream after the layer.
    Residual,
    /// What the mixer (attention, linear attention or a state-space layer) adds to the residual
    /// stream.
    AttentionOut,
    /// What the feed-forward (MLP, or shared and routed experts together) adds to the residual
    /// stream.
    MlpOut,
    /// Output of a routed expert's down projection, before the gate weight.
    ExpertOut,
}

impl Point {
    /// Whether it is a norm output, where outlier features are defined.
    pub fn is_norm_output(self) -> bool {
        matches!(self, Self::BeforeAttention | Self::BeforeMlp | Self::AfterAttention | Self::AfterMlp)
    }
}

/// Signs of a feature's occurrences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sided {
    /// All positive.
    Pos,
    /// All negative.
    Neg,
    /// Both signs.
    Both,
}

/// One feature (hidden dimension) with at least one occurrence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Feature {
    /// Index into the hidden dimension.
    pub dim: usize,
    /// Layers with an occurrence.
    pub n_layers: usize,
    /// Norm outputs with an occurrence.
    pub n_sites: usize,
    /// `n_layers` / layers.
    pub layer_fraction: f64,
    /// `n_sites` / sites.
    pub site_fraction: f64,
    /// Distinct (sequence, position) pairs.
    pub n_positions: u64,
    /// `n_positions` / tokens.
    pub position_fraction: f64,
    /// (site, sequence, position) triples.
    pub occurrences: u64,
    /// Occurrences with x > 0.
    pub positive: u64,
    /// Signs of the occurrences.
    pub sided: Sided,
    /// Largest value at any studied site, outlier or not.
    pub max: f32,
    /// Smallest value at any studied site.
    pub min: f32,
    /// Largest magnitude.
    pub max_abs: f32,
    /// Site of the largest magnitude, and the norm's gain there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak: Option<FeaturePeak>,
    /// Systematic over the whole corpus, share taken of layers.
    pub systematic_by_layers: bool,
    /// Systematic over the whole corpus, share taken of sites.
    pub systematic_by_sites: bool,
    /// Sequences within which it is systematic, share taken of layers.
    pub sequences_systematic_by_layers: usize,
    /// Sequences within which it is systematic, share taken of sites.
    pub sequences_systematic_by_sites: usize,
    /// Layers whose attention input has an occurrence.
    pub layers_before_attention: Vec<usize>,
    /// Layers whose MLP input has an occurrence.
    pub layers_before_mlp: Vec<usize>,
    /// Occurrences by sequence, without sequences that have none. Present for features that are
    /// systematic, by either axis, in some sample of the sequences drawn with replacement; empty
    /// in older runs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub within: Vec<WithinSequence>,
    /// Value of largest magnitude, signed, at each norm output with an occurrence, in the order of
    /// [`Results::sites`]. Quartiles are taken of these values. Present for the features that have
    /// `within`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peaks: Vec<f32>,
}

/// Occurrences of a feature within one sequence. They determine whether the feature is systematic
/// there, or over any set of sequences.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WithinSequence {
    /// Index of the sequence.
    pub sequence: usize,
    /// Distinct positions.
    pub positions: u64,
    /// Norm outputs, as indices into [`Results::sites`].
    pub sites: IndexSet,
}

/// Counts within one sequence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SequenceSummary {
    /// Index of the sequence.
    pub sequence: usize,
    /// Features with an occurrence.
    pub features_any: usize,
    /// Systematic features, share taken of layers.
    pub systematic_by_layers: usize,
    /// Systematic features, share taken of sites.
    pub systematic_by_sites: usize,
    /// Mean negative log-likelihood per predicted token, nats; `None` when only some layers were
    /// run.
    pub mean_nll: Option<f64>,
}

/// One studied norm output over the whole corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SiteSummary {
    /// Layer, from 0.
    pub layer: usize,
    /// Where in the layer.
    pub point: Point,
    /// Occurrences of all features.
    pub occurrences: u64,
    /// Features with an occurrence here.
    pub features: usize,
    /// Largest |x|.
    pub max_abs: f32,
    /// Root mean square of all values.
    pub rms: f64,
    /// Fourth central moment over the squared second one, all values pooled; 3 for a Gaussian. The
    /// pooled excess kurtosis of arXiv 2506.19697 is this value minus 3. `rows.kurtosis` has it by
    /// token.
    pub kurtosis: f64,
    /// Statistics by row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<RowStatistics>,
    /// The norm's gain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gain: Option<GainSummary>,
}

/// Perplexity of the same pass.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// exp of `mean_nll`.
    pub perplexity: f64,
    /// Mean negative log-likelihood, nats per predicted token.
    pub mean_nll: f64,
    /// Predicted tokens: sequences x (tokens - 1).
    pub predicted_tokens: u64,
}

/// `manifest.json`, the last file that a worker writes: outcome of the run, and all other files
/// with their sizes and hashes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Document version.
    pub schema: u32,
    /// Outcome of the run.
    pub outcome: Outcome,
    /// Files to fetch. Names are plain file names, without folders.
    pub files: Vec<FileEntry>,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The results are complete.
    Complete,
    /// The worker ended with an error.
    Failed(Failure),
}

/// Why a worker ended without results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// Kind of the failure, for programs.
    pub kind: FailureKind,
    /// Cause, with the file or device that it is about.
    pub message: String,
    /// What the user can do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The job or an option is wrong.
    Job,
    /// Unknown model or revision.
    ModelNotFound,
    /// The hub requires a token, or the token has no access.
    ModelGated,
    /// The architecture is not supported.
    Unsupported,
    /// Files are missing, damaged, or do not fit the architecture.
    Checkpoint,
    /// There is no text, or too little.
    Corpus,
    /// There is no such device, or it failed.
    Device,
    /// The disk is full or unreadable.
    Storage,
    /// The hub is unreachable or answered with errors.
    Network,
    /// Any other failure.
    Internal,
}

/// One file of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Plain file name.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256, lower-case hexadecimal.
    pub sha256: String,
}
