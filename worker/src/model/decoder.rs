//! Descriptions of decoders: shapes and switches of every block, and the tensors they need.
//!
//! Blocks read these records, never `config.json` or a tensor's published name. An architecture
//! that these records cannot describe gets a new field here, not an `if` in a block.

use std::fmt;
use std::ops::Range;

use candle_core::DType;
use outliers_protocol::Point;
use serde::{Deserialize, Serialize};

use crate::model::rope::RopeSpec;

mod needs;

pub(crate) use needs::MlpRoles;
pub use needs::{Need, Role};

/// A decoder-only model.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderSpec {
    /// Width of the residual stream: the number of features.
    pub hidden: usize,
    /// Rows of the embedding, columns of the logits.
    pub vocab: usize,
    /// Maximum sequence length by the configuration.
    pub max_positions: Option<usize>,
    /// Number of keys that a sparse indexer selects per query. The indexer is not computed:
    /// sequences of up to this many tokens attend to all keys.
    pub selected_keys: Option<usize>,
    /// Embedding of token ids.
    pub embedding: EmbeddingSpec,
    /// Layers, from the input on.
    pub layers: Vec<LayerSpec>,
    /// Norm after the last layer; `None` in post-norm decoders.
    pub final_norm: Option<NormSpec>,
    /// Projection to the logits.
    pub head: HeadSpec,
}

/// The maximum supported sequence length, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaxSequenceLength {
    /// Limited by the model's positions.
    Positions(usize),
    /// Limited by the selection of keys, which is not computed.
    SelectedKeys(usize),
}

impl MaxSequenceLength {
    /// The limit in tokens.
    pub fn tokens(self) -> usize {
        match self {
            Self::Positions(tokens) | Self::SelectedKeys(tokens) => tokens,
        }
    }
}

/// The embedding of token ids.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmbeddingSpec {
    /// Columns of the table. If this is not the hidden size, matrices without bias project to it
    /// after the table and from it before the head (OPT-350m).
    pub width: usize,
    /// Learned vectors added by position, if the model has them.
    pub positions: Option<LearnedPositions>,
    /// Factor of the table's rows.
    pub scale: Option<EmbeddingScale>,
}

/// A factor of embeddings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmbeddingScale {
    /// Value in the configuration.
    pub factor: f64,
    /// Whether the factor is rounded to the dtype of the pass (Gemma).
    pub rounded: bool,
}

impl EmbeddingScale {
    /// The factor in a pass in `compute`.
    pub fn in_dtype(self, compute: DType) -> f32 {
        let factor = self.factor as f32;
        match compute {
            DType::BF16 if self.rounded => half::bf16::from_f32(factor).to_f32(),
            DType::F16 if self.rounded => half::f16::from_f32(factor).to_f32(),
            _ => factor,
        }
    }
}

/// A table of learned positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LearnedPositions {
    /// Rows of the table.
    pub rows: usize,
    /// Position p reads row p + offset (OPT: 2).
    pub offset: usize,
}

/// The projection to logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadSpec {
    /// Whether the head's matrix is the embedding.
    pub tied: bool,
    /// Whether a tied head is stored separately and read from there. It does not count as
    /// parameters.
    pub stored: bool,
    /// Whether a bias per token id is added (GPT-J).
    pub bias: bool,
    /// Logits become `cap * tanh(logits / cap)` (Gemma).
    pub softcap: Option<f64>,
}

/// One layer: a mixer over tokens and a feed-forward on each token, both added to the residual
/// stream.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Kind of both norms.
    pub norm: NormSpec,
    /// Position of the norms.
    pub order: NormOrder,
    /// Mixer of tokens.
    pub mixer: MixerSpec,
    /// Feed-forward of each token.
    pub ffn: FfnSpec,
    /// Whether a stored scalar multiplies the residual stream after the layer (Gemma 4).
    pub scalar: bool,
}

/// Position of a layer's norms. Their outputs are the studied sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormOrder {
    /// `x += mixer(norm(x))`, then `x += ffn(norm(x))`: [`Point::BeforeAttention`] and
    /// [`Point::BeforeMlp`].
    Before,
    /// `x = norm(x + mixer(x))`, then `x = norm(x + ffn(x))` (OPT-350m): [`Point::AfterAttention`]
    /// and [`Point::AfterMlp`].
    After,
    /// `n = norm(x)`, then `x += mixer(n) + ffn(n)` (GPT-J): [`Point::BeforeAttention`] only.
    Shared,
    /// `x += norm(mixer(norm(x)))`, then `x += norm(ffn(norm(x)))` (Gemma, Trinity):
    /// [`Point::BeforeAttention`] and [`Point::BeforeMlp`]. The outer norms are not studied, since
    /// no projection reads their outputs.
    Sandwich,
}

/// A norm over the last dimension, computed in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// Formula of the norm.
    pub kind: NormKind,
    /// Added to the mean square or variance.
    pub eps: f64,
}

/// Formulas of norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps) * gain` (Zhang and Sennrich 2019).
    Rms,
    /// As `Rms` with `gain = 1 + stored weight` (Qwen3-Next).
    RmsZeroCentred,
    /// `(x - mean) / sqrt(variance + eps) * gain + bias` (Ba et al. 2016).
    Layer,
}

impl NormSpec {
    /// An RMSNorm with this epsilon.
    pub fn rms(eps: f64) -> Self {
        Self { kind: NormKind::Rms, eps }
    }

    /// A LayerNorm with this epsilon.
    pub fn layer(eps: f64) -> Self {
        Self { kind: NormKind::Layer, eps }
    }
}

/// How tokens are mixed.
#[derive(Clone, Debug, PartialEq)]
pub enum MixerSpec {
    /// Softmax attention with grouped heads.
    Attention(AttentionSpec),
    /// Multi-head latent attention.
    Latent(LatentSpec),
    /// Gated DeltaNet.
    DeltaNet(DeltaNetSpec),
    /// Mamba-2.
    Mamba(MambaSpec),
    /// None: the layer is only a feed-forward (Nemotron-H).
    None,
}

/// Softmax attention with grouped key/value heads.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; not always hidden / heads.
    pub head_dim: usize,
    /// Whether q, k and v are one matrix, with their rows in this order (GPT-2).
    pub fused_qkv: bool,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub output_bias: bool,
    /// Clamps q, k, v to [-c, c] after their norms (OLMoE's `clip_qkv`).
    pub clip_qkv: Option<f64>,
    /// Rotary positions; `None` if positions are learned or absent (NoPE).
    pub rope: Option<RopeSpec>,
    /// Which keys a query sees.
    pub window: Window,
    /// Whether a learned logit per head is added to the softmax's denominator, without a value
    /// (gpt-oss).
    pub sinks: bool,
    /// Gate of the attention output.
    pub output_gate: OutputGate,
    /// Factor of the scores; `None`: `1 / sqrt(head_dim)`.
    pub scale: Option<f64>,
    /// Epsilon of a norm of each head's values without a gain (Gemma 4); `None`: no norm.
    pub value_norm: Option<f64>,
    /// Whether the values are the keys before norm and rotation (Gemma 4).
    pub key_is_value: bool,
    /// Scaling of queries by position (Llama 4's layers without rotation).
    pub temperature: Option<Temperature>,
}

/// The gate that multiplies each head's output before the output projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputGate {
    /// No gate.
    None,
    /// sigmoid(gate). The query matrix has twice as many rows, per head [query | gate]
    /// (Qwen3-Next).
    WithQuery,
    /// sigmoid(gate) from a separate matrix (Trinity).
    Separate,
}

/// Norms of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum QkNorm {
    /// None.
    None,
    /// Before the rotation, over the whole projection, all heads together (OLMoE).
    WholeProjection(NormSpec),
    /// Before the rotation, per head, one gain for all heads (Qwen3).
    PerHead(NormSpec),
    /// After the rotation, per head, without a gain (Llama 4).
    AfterRope {
        /// Added to the mean square.
        eps: f64,
    },
}

/// Which keys up to its own position a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// All keys up to the query.
    Full,
    /// The last N keys, including the query's own.
    Sliding(usize),
    /// Keys of the query's chunk: positions with the same `position / chunk`.
    Chunked(usize),
}

impl Window {
    /// The first key that the query at `position` sees. A width of 0 counts as 1, so that every
    /// query sees its own key.
    pub fn first_key(self, position: usize) -> usize {
        match self {
            Self::Full => 0,
            Self::Sliding(keys) => (position + 1).saturating_sub(keys.max(1)),
            Self::Chunked(keys) => position - position % keys.max(1),
        }
    }
}

/// Queries are multiplied by `1 + scale * ln(1 + floor((position + 1) / floor))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperature {
    /// Llama 4's `attn_scale`.
    pub scale: f64,
    /// Llama 4's `floor_scale`.
    pub floor: f64,
}

impl Temperature {
    /// The factor of the query at `position`. Every step is rounded to f32, as in the reference.
    pub fn factor(self, position: usize) -> f32 {
        let steps = ((position as f32 + 1.0) / self.floor as f32).floor();
        steps.ln_1p() * self.scale as f32 + 1.0
    }
}

/// Multi-head latent attention (DeepSeek-V2, 2024): low-rank queries and low-rank keys and values.
/// Positions are in a separate part of each head, and all heads share one rotated key part.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentSpec {
    /// Number of heads.
    pub heads: usize,
    /// Rank of the queries; `None`: one full matrix.
    pub query_rank: Option<usize>,
    /// Rank of the keys and values.
    pub kv_rank: usize,
    /// Width of a head's query and key without position.
    pub nope_dim: usize,
    /// Width of the rotated part, after the part without position.
    pub rope_dim: usize,
    /// Width of a head's value.
    pub value_dim: usize,
    /// Kind of the norms of both low-rank vectors.
    pub norm: NormSpec,
    /// Factor of the scores.
    pub scale: f64,
    /// Rotation of the `rope_dim` part; `None`: not rotated (Kimi Linear).
    pub rope: Option<RopeSpec>,
}

/// Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464) as in Qwen3-Next and Kimi Linear: a linear
/// recurrence over a matrix state per value head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeltaNetSpec {
    /// Query and key heads; divides `value_heads`: key head j serves value heads j*r .. j*r + r-1.
    pub key_heads: usize,
    /// Value heads.
    pub value_heads: usize,
    /// Width of a query or key.
    pub key_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
    /// Taps of the causal depthwise convolution, the last on the current token.
    pub kernel: usize,
    /// Storage of the input projections.
    pub stored: DeltaStored,
    /// Norm of the output per value head, before the gate.
    pub norm: NormSpec,
}

/// Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a linear recurrence over a matrix state per head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MambaSpec {
    /// Number of heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Groups of adjacent heads that share writes and reads; also the groups of the norm.
    pub groups: usize,
    /// Rows of a head's state.
    pub state: usize,
    /// Taps of the causal depthwise convolution, the last on the current token.
    pub kernel: usize,
    /// Whether the convolution has a bias.
    pub convolution_bias: bool,
    /// Minimum step.
    pub shortest_step: f64,
    /// Norm of the gated values, per group.
    pub norm: NormSpec,
}

/// Storage of a DeltaNet's input projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeltaStored {
    /// Two matrices with rows grouped by key head: [q | k | values | gates] and [write strengths |
    /// steps] (Qwen3-Next).
    ByKeyHead,
    /// One matrix for queries, keys and values, in this order, and one each for gates, write
    /// strengths and steps (Qwen3.5).
    ByKind,
    /// One matrix of each kind; gates and steps are low-rank with the width of a value. Each
    /// channel of a key has a step and so a decay, and gates use a sigmoid (Kimi Linear).
    Apart,
}

/// A feed-forward block.
#[derive(Clone, Debug, PartialEq)]
pub enum FfnSpec {
    /// A dense MLP.
    Dense(MlpSpec),
    /// A mixture of routed experts.
    Moe(MoeSpec),
    /// None: the layer is only a mixer (Nemotron-H).
    None,
}

/// A feed-forward's shape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MlpSpec {
    /// Inner width.
    pub intermediate: usize,
    /// Gating and activation.
    pub kind: MlpKind,
    /// Whether all projections have a bias.
    pub bias: bool,
}

/// Gating and activation of a feed-forward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MlpKind {
    /// `down(relu(up x))`.
    Relu,
    /// `down(relu(up x)^2)` (Nemotron-H).
    ReluSquared,
    /// `down(gelu(up x))`, GELU in its tanh form.
    GeluTanh,
    /// `down(silu(gate x) * up x)`.
    Swiglu(GateUp),
    /// `down(gelu(gate x) * up x)`, GELU in its tanh form (Gemma).
    Geglu(GateUp),
    /// gpt-oss: `gate = min(gate, limit)`, `up = clamp(up, -limit, limit)`, `down((up + 1) * gate
    /// * sigmoid(alpha * gate))`.
    ClampedSwiglu {
        /// Storage of gate and up.
        stored: GateUp,
        /// Limit of the magnitude.
        limit: f64,
        /// Slope inside the sigmoid.
        alpha: f64,
    },
}

/// Storage of the gate and up projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateUp {
    /// Two matrices.
    Separate,
    /// One matrix: all rows of gate, then all rows of up.
    Halves,
    /// One matrix: even rows gate, odd rows up.
    Interleaved,
}

impl MlpSpec {
    /// `down(silu(gate x) * up x)` from three matrices without bias, as in most families.
    pub fn swiglu(intermediate: usize) -> Self {
        Self { intermediate, kind: MlpKind::Swiglu(GateUp::Separate), bias: false }
    }

    /// Storage of gate and up, for gated kinds.
    pub fn gate_up(&self) -> Option<GateUp> {
        match self.kind {
            MlpKind::Relu | MlpKind::ReluSquared | MlpKind::GeluTanh => None,
            MlpKind::Swiglu(stored) | MlpKind::Geglu(stored) | MlpKind::ClampedSwiglu { stored, .. } => Some(stored),
        }
    }
}

/// A mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeSpec {
    /// Number of routed experts.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Shape of each expert.
    pub expert: MlpSpec,
    /// How experts are chosen and weighted.
    pub router: RouterSpec,
    /// An expert for every token, if there is one.
    pub shared: Option<SharedSpec>,
    /// A dense MLP beside the mixture (Gemma 4). It reads the layer's norm. Router and experts
    /// read the residual stream, the experts through a separate norm. Both outputs are normalised
    /// before they are added.
    pub beside: Option<MlpSpec>,
    /// Width of the latent space of the experts, between two matrices. Router and shared expert
    /// still read the layer's norm (Nemotron 3 Super).
    pub latent: Option<usize>,
}

impl MoeSpec {
    /// Experts alone, with nothing beside them.
    pub fn plain(experts: usize, top_k: usize, expert: MlpSpec, router: RouterSpec) -> Self {
        Self { experts, top_k, expert, router, shared: None, beside: None, latent: None }
    }

    /// With a shared expert as wide as so many of the routed ones; of 0, with none.
    pub fn sharing(mut self, experts: usize) -> Self {
        let mlp = MlpSpec { intermediate: experts * self.expert.intermediate, ..self.expert };
        self.shared = (experts > 0).then_some(SharedSpec { mlp, gate: false });
        self
    }
}

/// The shared expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SharedSpec {
    /// Its shape.
    pub mlp: MlpSpec,
    /// Whether its output is multiplied by sigmoid(w x) (Qwen3-Next).
    pub gate: bool,
}

/// How router logits become expert weights, in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RouterSpec {
    /// Softmax over all experts, then the top k; divided by their sum if `normalise`.
    SoftmaxTopK {
        /// Divide the chosen weights by their sum.
        normalise: bool,
    },
    /// The top k logits, bias included, then softmax over those (gpt-oss).
    TopKSoftmax,
    /// Sigmoid scores; experts are chosen by score + correction bias among the best groups,
    /// weighted by the score alone (DeepSeek-V3).
    SigmoidGroups {
        /// Number of equal groups of adjacent experts. A group's score is the sum of its two best
        /// biased scores.
        groups: usize,
        /// Number of groups from which experts are chosen.
        top_groups: usize,
        /// Divide the chosen scores by their sum.
        normalise: bool,
        /// Final factor of the weights.
        scale: f64,
    },
    /// The top k logits; the sigmoid of each multiplies the expert's INPUT (Llama 4).
    SigmoidOfInput,
    /// Softmax over all experts, then the top k of the best groups, weighted by their softmax
    /// values (DeepSeek-V2).
    SoftmaxGroups {
        /// Number of equal groups of adjacent experts. A group's score is its best softmax value.
        groups: usize,
        /// Number of groups from which experts are chosen.
        top_groups: usize,
        /// Final factor of the weights.
        scale: f64,
    },
    /// Normalises and scales the input; softmax over all experts; the top k divided by their sum,
    /// times a factor per expert (Gemma 4).
    NormedSoftmax {
        /// Added to the mean square.
        eps: f64,
    },
}

impl RouterSpec {
    /// Whether logits have a bias.
    pub fn bias(&self) -> bool {
        matches!(self, Self::TopKSoftmax)
    }

    /// Whether scores have a correction bias, used for the choice only.
    pub fn correction(&self) -> bool {
        matches!(self, Self::SigmoidGroups { .. })
    }

    /// Whether its input and its weights have stored scales.
    pub fn scales(&self) -> bool {
        matches!(self, Self::NormedSoftmax { .. })
    }
}

/// A streaming unit: tensors that are loaded, used by all tokens, and dropped together.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamingUnit {
    /// Layer, from 0.
    pub layer: usize,
    /// Part of the layer.
    pub part: Part,
    /// Tensors of the unit.
    pub needs: Vec<Need>,
}

/// Parts of a layer, in order of computation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Norm and mixer.
    Mixer,
    /// Norm and dense MLP.
    Dense,
    /// Norm, router and shared expert of a mixture.
    Router,
    /// A group of experts; the last group ends the layer.
    Experts(Range<usize>),
}

impl fmt::Display for StreamingUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.part {
            Part::Mixer => write!(f, "layer {} mixer", self.layer),
            Part::Dense => write!(f, "layer {} MLP", self.layer),
            Part::Router => write!(f, "layer {} router", self.layer),
            Part::Experts(group) => write!(f, "layer {} experts {}..{}", self.layer, group.start, group.end),
        }
    }
}

/// Norms of the residual stream's width that are not studied: no projection reads their output, or
/// they are the experts' input.
const UNSTUDIED: [Role; 5] =
    [Role::MixerPostNorm, Role::FfnPostNorm, Role::BesidePostNorm, Role::ExpertsNorm, Role::ExpertsPostNorm];

/// A place in the model whose values are studied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Site {
    /// Layer, from 0.
    pub layer: usize,
    /// Point in the layer.
    pub point: Point,
}

impl Site {
    /// The consumer of a norm output: the layer, and [`Point::BeforeAttention`] or
    /// [`Point::BeforeMlp`]. In a post-norm layer the norm after attention feeds the MLP, and the
    /// norm after the MLP feeds the next layer's attention (or, after the last layer, the head).
    pub fn feeds(self) -> Option<(usize, Point)> {
        match self.point {
            Point::BeforeAttention | Point::BeforeMlp => Some((self.layer, self.point)),
            Point::AfterAttention => Some((self.layer, Point::BeforeMlp)),
            Point::AfterMlp => Some((self.layer + 1, Point::BeforeAttention)),
            Point::Residual | Point::AttentionOut | Point::MlpOut | Point::ExpertOut => None,
        }
    }
}

impl DecoderSpec {
    /// Norms of layers whose outputs are not studied, by role.
    pub fn unstudied_norms(&self) -> Vec<Role> {
        let needs = self.needs();
        let has = |role: &Role| needs.iter().any(|(_, need)| need.role == *role);
        UNSTUDIED.into_iter().filter(has).collect()
    }

    /// The maximum supported sequence length; `None`: unlimited.
    pub fn longest(&self) -> Option<MaxSequenceLength> {
        let (positions, keys) = (self.max_positions.map(MaxSequenceLength::Positions), self.selected_keys);
        positions.into_iter().chain(keys.map(MaxSequenceLength::SelectedKeys)).min_by_key(|longest| longest.tokens())
    }

    /// The studied norm outputs in order of computation.
    pub fn sites(&self) -> Vec<Site> {
        let mut sites = Vec::new();
        for (layer, spec) in self.layers.iter().enumerate() {
            for (norm, &point) in spec.order.points().iter().enumerate() {
                if [spec.has_mixer(), spec.has_ffn()][norm] {
                    sites.push(Site { layer, point });
                }
            }
        }
        sites
    }
}

impl NormOrder {
    /// The studied points of a layer, in order of computation.
    pub fn points(self) -> &'static [Point] {
        match self {
            Self::Before | Self::Sandwich => &[Point::BeforeAttention, Point::BeforeMlp],
            Self::After => &[Point::AfterAttention, Point::AfterMlp],
            Self::Shared => &[Point::BeforeAttention],
        }
    }
}

impl LayerSpec {
    /// A description for people.
    pub fn describe(&self) -> String {
        match (self.has_mixer(), self.has_ffn()) {
            (true, false) => self.mixer.describe(),
            (false, true) => self.ffn.describe(),
            _ => format!("{}; {}", self.mixer.describe(), self.ffn.describe()),
        }
    }

    /// Whether the layer has a mixer.
    pub fn has_mixer(&self) -> bool {
        self.mixer != MixerSpec::None
    }

    /// Whether the layer has a feed-forward.
    pub fn has_ffn(&self) -> bool {
        self.ffn != FfnSpec::None
    }

    /// Number of routed experts, 0 in a dense layer.
    pub fn experts(&self) -> usize {
        match &self.ffn {
            FfnSpec::Dense(_) | FfnSpec::None => 0,
            FfnSpec::Moe(moe) => moe.experts,
        }
    }
}

impl AttentionSpec {
    /// Full attention without positions, norms, biases and gates.
    pub fn plain(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        Self {
            heads,
            kv_heads,
            head_dim,
            fused_qkv: false,
            qk_norm: QkNorm::None,
            qkv_bias: false,
            output_bias: false,
            clip_qkv: None,
            rope: None,
            window: Window::Full,
            sinks: false,
            output_gate: OutputGate::None,
            scale: None,
            value_norm: None,
            key_is_value: false,
            temperature: None,
        }
    }
}

impl MixerSpec {
    /// The rotation, if there is one.
    pub fn rope(&self) -> Option<&RopeSpec> {
        match self {
            Self::Attention(attention) => attention.rope.as_ref(),
            Self::Latent(latent) => latent.rope.as_ref(),
            Self::DeltaNet(_) | Self::Mamba(_) | Self::None => None,
        }
    }

    /// Multiply-adds per pair of a token and a visible token; 0 for a DeltaNet, whose state has a
    /// fixed size.
    pub fn pair_values(&self) -> usize {
        match self {
            Self::Attention(a) => 2 * a.heads * a.head_dim,
            Self::Latent(l) => l.heads * (l.nope_dim + l.rope_dim + l.value_dim),
            Self::DeltaNet(_) | Self::Mamba(_) | Self::None => 0,
        }
    }

    /// Heads with attention scores.
    pub fn score_heads(&self) -> usize {
        match self {
            Self::Attention(a) => a.heads,
            Self::Latent(l) => l.heads,
            Self::DeltaNet(_) | Self::Mamba(_) | Self::None => 0,
        }
    }

    /// Bytes per token between the input and output projections, in a pass whose values have
    /// `value` bytes.
    pub fn projected_bytes(&self, value: usize) -> usize {
        match self {
            Self::Attention(a) => {
                let gate = if a.output_gate == OutputGate::None { 0 } else { a.heads };
                (2 * a.heads + gate + 2 * a.kv_heads) * a.head_dim * value
            }
            Self::Latent(l) => l.heads * (3 * (l.nope_dim + l.rope_dim) + 2 * l.value_dim) * value,
            Self::None => 0,
            Self::Mamba(m) => {
                // f32 values: convolved channels twice, and writes and reads per head.
                let repeated = 2 * m.heads * m.state;
                (2 * m.inner() + m.channels()) * value
                    + (2 * m.channels() + repeated + 4 * m.inner()) * size_of::<f32>()
            }
            Self::DeltaNet(d) => {
                // f32 values: convolved channels, queries and keys repeated per value head, and
                // results twice.
                let (values, repeated) = (d.value_heads * d.value_dim, 2 * d.value_heads * d.key_dim);
                // Steps and decays.
                let steps = if d.decays_channels() { 2 * d.value_heads * d.key_dim } else { 0 };
                (d.channels() + values) * value + (d.channels() + repeated + 2 * values + steps) * size_of::<f32>()
            }
        }
    }

    /// Additional bytes per token if all sequences of a micro-batch are mixed together: keys and
    /// values by head, and the output of each block of queries.
    pub fn mixed_bytes(&self, value: usize) -> usize {
        match self {
            Self::Attention(a) => (a.heads + 2 * a.kv_heads) * a.head_dim * value,
            Self::Latent(l) => l.heads * (l.nope_dim + 2 * l.value_dim) * value,
            Self::DeltaNet(_) | Self::Mamba(_) | Self::None => 0,
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::None => String::new(),
            Self::Mamba(m) => format!("Mamba-2 {} x {}, states of {}", m.heads, m.head_dim, m.state),
            Self::Attention(a) => {
                let window = match a.window {
                    Window::Full => String::new(),
                    Window::Sliding(n) => format!(", window {n}"),
                    Window::Chunked(n) => format!(", chunks of {n}"),
                };
                format!("attention {}/{} x {}{window}", a.heads, a.kv_heads, a.head_dim)
            }
            Self::Latent(l) => {
                format!("latent attention {} x {}+{}, rank {}", l.heads, l.nope_dim, l.rope_dim, l.kv_rank)
            }
            Self::DeltaNet(d) => {
                let decays = if d.decays_channels() { ", a decay for each channel" } else { "" };
                format!("DeltaNet {}/{} x {}{decays}", d.value_heads, d.key_heads, d.value_dim)
            }
        }
    }
}

impl FfnSpec {
    fn describe(&self) -> String {
        match self {
            Self::None => String::new(),
            Self::Dense(mlp) => {
                format!("{} {}", if mlp.gate_up().is_some() { "gated MLP" } else { "MLP" }, mlp.intermediate)
            }
            Self::Moe(moe) => {
                let shared = if moe.shared.is_some() { " + 1 shared" } else { "" };
                let beside = |mlp: MlpSpec| format!(", beside a gated MLP {}", mlp.intermediate);
                let beside = moe.beside.map_or_else(String::new, beside);
                let latent = moe.latent.map_or_else(String::new, |width| format!(" in a space of {width}"));
                let (experts, inner) = (moe.experts, moe.expert.intermediate);
                format!("{experts} experts x {inner}{latent}, top {}{shared}{beside}", moe.top_k)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::MaxSequenceLength;

    #[test]
    fn longest_sequence_is_the_minimum_of_positions_and_index_topk() {
        let longest = |positions: usize| {
            let config = json!({
                "architectures": ["DeepseekV32ForCausalLM"], "max_position_embeddings": positions, "index_topk": 100,
            });
            crate::model::arch::read(&config).unwrap().spec.longest()
        };
        assert_eq!(
            (longest(99), longest(101)),
            (Some(MaxSequenceLength::Positions(99)), Some(MaxSequenceLength::SelectedKeys(100)))
        );
    }
}
