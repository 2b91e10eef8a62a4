//! What a decoder is, as data: shapes and switches of every block, and which tensors they need.
//!
//! Blocks read these records; they never see `config.json` nor a tensor's published name. An
//! architecture that needs something these records cannot say gets a new field here, not an `if`
//! in a block.

use std::fmt;
use std::ops::Range;

use candle_core::DType;
use outliers_protocol::Point;
use serde::{Deserialize, Serialize};

use crate::model::rope::RopeSpec;

mod needs;

pub(crate) use needs::MlpRoles;
pub use needs::{Need, Role};

/// A whole decoder-only model.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderSpec {
    /// Width of the residual stream: the number of features.
    pub hidden: usize,
    /// Rows of the embedding, columns of the logits.
    pub vocab: usize,
    /// Longest sequence the configuration allows.
    pub max_positions: Option<usize>,
    /// Keys that an indexer selects for each query. It is not computed: up to as many tokens it
    /// selects all.
    pub selected_keys: Option<usize>,
    /// Token ids to the residual stream.
    pub embedding: EmbeddingSpec,
    /// From the input on.
    pub layers: Vec<LayerSpec>,
    /// After the last layer; post-norm decoders have none.
    pub final_norm: Option<NormSpec>,
    /// The residual stream to logits.
    pub head: HeadSpec,
}

/// The longest sequence that is computed, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Longest {
    /// There are no more positions.
    Positions(usize),
    /// Beyond, attention is to the keys that an indexer selects, which is not computed.
    SelectedKeys(usize),
}

impl Longest {
    /// The number of tokens.
    pub fn tokens(self) -> usize {
        match self {
            Self::Positions(tokens) | Self::SelectedKeys(tokens) => tokens,
        }
    }
}

/// How token ids enter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmbeddingSpec {
    /// Columns of the table. Where it is not the hidden size, a matrix without bias leads in, and
    /// one leads out before the head (OPT-350m).
    pub width: usize,
    /// Learned vectors added by position, where rotations do not say it.
    pub positions: Option<LearnedPositions>,
    /// What multiplies the rows of the table.
    pub scale: Option<EmbeddingScale>,
}

/// What multiplies embeddings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmbeddingScale {
    /// As the configuration says it.
    pub factor: f64,
    /// The factor itself is rounded to the dtype of the pass (Gemma).
    pub rounded: bool,
}

impl EmbeddingScale {
    /// What multiplies the embeddings of a pass in `compute`.
    pub fn in_dtype(self, compute: DType) -> f32 {
        let factor = self.factor as f32;
        match compute {
            DType::BF16 if self.rounded => half::bf16::from_f32(factor).to_f32(),
            DType::F16 if self.rounded => half::f16::from_f32(factor).to_f32(),
            _ => factor,
        }
    }
}

/// A table of position vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LearnedPositions {
    /// Rows of the table.
    pub rows: usize,
    /// Position p reads row p + offset (OPT: 2).
    pub offset: usize,
}

/// How logits leave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadSpec {
    /// The head's matrix is the embedding.
    pub tied: bool,
    /// The head is read from where it is stored, although the configuration ties it to the
    /// embedding: it counts as no parameters.
    pub stored: bool,
    /// One number per token id is added (GPT-J).
    pub bias: bool,
    /// Logits become `cap * tanh(logits / cap)` (Gemma).
    pub softcap: Option<f64>,
}

/// One layer: a mixer over tokens and a feed-forward on each token, both added to the residual
/// stream.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Both norms of the layer.
    pub norm: NormSpec,
    /// Where they stand.
    pub order: NormOrder,
    /// Mixes tokens.
    pub mixer: MixerSpec,
    /// Works on each token alone.
    pub ffn: FfnSpec,
    /// One stored number multiplies the residual stream after the layer (Gemma 4).
    pub scalar: bool,
}

/// Where a layer's norms stand. Their outputs are the studied sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormOrder {
    /// `x += mixer(norm(x))`, then `x += ffn(norm(x))`: [`Point::BeforeAttention`] and
    /// [`Point::BeforeMlp`].
    Before,
    /// `x = norm(x + mixer(x))`, then `x = norm(x + ffn(x))` (OPT-350m): [`Point::AfterAttention`]
    /// and [`Point::AfterMlp`].
    After,
    /// `n = norm(x)`, then `x += mixer(n) + ffn(n)` (GPT-J): [`Point::BeforeAttention`] alone.
    Shared,
    /// `x += norm(mixer(norm(x)))`, then `x += norm(ffn(norm(x)))` (Gemma, Trinity):
    /// [`Point::BeforeAttention`] and [`Point::BeforeMlp`]. The outer norms are not studied:
    /// nothing is projected from their outputs.
    Sandwich,
}

/// A norm over the last dimension, computed in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// Which formula it follows.
    pub kind: NormKind,
    /// Added to the mean square or variance.
    pub eps: f64,
}

/// Formulas of norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps) * gain` (Zhang and Sennrich 2019).
    Rms,
    /// The same with `gain = 1 + stored weight` (Qwen3-Next).
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

/// How tokens see each other.
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
    /// The layer is a feed-forward alone (Nemotron-H).
    None,
}

/// Softmax attention with grouped key/value heads.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head. Its own number: not always hidden / heads.
    pub head_dim: usize,
    /// q, k and v are one matrix, their rows one after another (GPT-2).
    pub fused_qkv: bool,
    /// Norm of queries and keys.
    pub qk_norm: QkNorm,
    /// q, k and v have a bias.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub output_bias: bool,
    /// q, k, v clamped to [-c, c] after their norms (OLMoE's `clip_qkv`).
    pub clip_qkv: Option<f64>,
    /// Rotary positions; `None` where positions are learned, or not told at all (NoPE).
    pub rope: Option<RopeSpec>,
    /// Which keys a query sees.
    pub window: Window,
    /// One learned logit per head joins the softmax's denominator and contributes no value
    /// (gpt-oss).
    pub sinks: bool,
    /// What opens the mixed values.
    pub output_gate: OutputGate,
    /// What multiplies the scores, where not the root of 1 / head_dim (Gemma).
    pub scale: Option<f64>,
    /// Values are normalised, each head by itself and without a gain (Gemma 4): added to the mean
    /// square.
    pub value_norm: Option<f64>,
    /// Keys are values too, before their norm and rotation (Gemma 4).
    pub key_is_value: bool,
    /// Queries grow with their position (Llama 4's layers without rotation).
    pub temperature: Option<Temperature>,
}

/// What the mixed values of each head are multiplied by before the output projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputGate {
    /// Nothing.
    None,
    /// sigmoid(gate). The query matrix has twice the rows, per head [query | gate] (Qwen3-Next).
    WithQuery,
    /// sigmoid(gate), under a matrix of its own (Trinity).
    Separate,
}

/// How queries and keys are normalised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum QkNorm {
    /// Not at all.
    None,
    /// Before the rotation, over the whole projected vector, all heads together (OLMoE).
    WholeProjection(NormSpec),
    /// Before the rotation, each head by itself, one gain for all heads (Qwen3).
    PerHead(NormSpec),
    /// After the rotation, each head by itself, without a gain (Llama 4).
    AfterRope {
        /// Added to the mean square.
        eps: f64,
    },
}

/// Which of the keys up to its own position a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// All keys up to the query.
    Full,
    /// The last N keys, its own included.
    Sliding(usize),
    /// Those in its own chunk: positions with the same `position / chunk`.
    Chunked(usize),
}

impl Window {
    /// The first key that the query at `position` sees. A width of 0 counts as 1: nothing is blind
    /// to itself.
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
    /// What multiplies the query at `position`; every step rounded to f32, as the reference rounds
    /// it.
    pub fn factor(self, position: usize) -> f32 {
        let steps = ((position as f32 + 1.0) / self.floor as f32).floor();
        steps.ln_1p() * self.scale as f32 + 1.0
    }
}

/// Multi-head latent attention (DeepSeek-V2, 2024): queries and keys/values through low-rank
/// bottlenecks, positions in a part of each head of their own; one rotated key part serves all
/// heads.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentSpec {
    /// Number of heads.
    pub heads: usize,
    /// Width of the queries' bottleneck; `None`: one full matrix.
    pub query_rank: Option<usize>,
    /// Width of the keys' and values' bottleneck.
    pub kv_rank: usize,
    /// Part of a head's query and key without position.
    pub nope_dim: usize,
    /// Part of a head's query and key that rotates; after the other.
    pub rope_dim: usize,
    /// Width of a head's value.
    pub value_dim: usize,
    /// Norm inside both bottlenecks.
    pub norm: NormSpec,
    /// What multiplies the scores.
    pub scale: f64,
    /// Rotation of the `rope_dim` part; `None` where it stays as it is (Kimi Linear).
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
    /// How the matrices that lead in are stored.
    pub stored: DeltaStored,
    /// Norm of the mixed values, per value head, before the gate.
    pub norm: NormSpec,
}

/// Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a linear recurrence over a matrix state per head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MambaSpec {
    /// Number of heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Groups of neighbouring heads that share what writes to and reads from their states; also of
    /// the norm.
    pub groups: usize,
    /// Rows of a head's state.
    pub state: usize,
    /// Taps of the causal depthwise convolution, the last on the current token.
    pub kernel: usize,
    /// The convolution has a bias.
    pub convolution_bias: bool,
    /// The shortest step.
    pub shortest_step: f64,
    /// Norm of the gated values, per group.
    pub norm: NormSpec,
}

/// How the matrices that lead into a DeltaNet are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeltaStored {
    /// Two, their rows grouped by key head: [q | k | values | gates] and [write strengths | steps]
    /// (Qwen3-Next).
    ByKeyHead,
    /// One for queries, keys and values, all rows of a kind one after another, and one each for
    /// gates, write strengths and steps (Qwen3.5).
    ByKind,
    /// One of each kind, gates and steps through a bottleneck as wide as a value. There is a step,
    /// and thereby a decay, for each channel of a key, and gates open by their sigmoid
    /// (Kimi Linear).
    Apart,
}

/// A feed-forward block.
#[derive(Clone, Debug, PartialEq)]
pub enum FfnSpec {
    /// One for all tokens.
    Dense(MlpSpec),
    /// Routed experts.
    Moe(MoeSpec),
    /// The layer is a mixer alone (Nemotron-H).
    None,
}

/// A feed-forward's shape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MlpSpec {
    /// Inner width.
    pub intermediate: usize,
    /// What happens at the inner width.
    pub kind: MlpKind,
    /// All projections have a bias.
    pub bias: bool,
}

/// What happens at a feed-forward's inner width.
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
        /// Where gate and up lie.
        stored: GateUp,
        /// Largest magnitude.
        limit: f64,
        /// Slope inside the sigmoid.
        alpha: f64,
    },
}

/// Where the gate's and the up projection's rows lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateUp {
    /// Two matrices.
    Separate,
    /// One matrix: all of gate, then all of up.
    Halves,
    /// One matrix: even rows gate, odd rows up.
    Interleaved,
}

impl MlpSpec {
    /// `down(silu(gate x) * up x)` from three matrices without bias: what most families have.
    pub fn swiglu(intermediate: usize) -> Self {
        Self { intermediate, kind: MlpKind::Swiglu(GateUp::Separate), bias: false }
    }

    /// Where gate and up lie, for gated kinds.
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
    /// Routed experts.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Shape of each expert.
    pub expert: MlpSpec,
    /// How tokens find their experts.
    pub router: RouterSpec,
    /// An expert that every token visits.
    pub shared: Option<SharedSpec>,
    /// A dense MLP beside the mixture (Gemma 4). It reads the layer's norm; router and experts
    /// read the residual stream, the experts under a norm of their own. Both outputs have norms
    /// before they are added.
    pub beside: Option<MlpSpec>,
    /// Width of the space in which the experts work, between two matrices. Router and shared
    /// expert read the layer's norm all the same (Nemotron 3 Super).
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
    /// Its output is multiplied by sigmoid(w x) (Qwen3-Next); else it is added as it is.
    pub gate: bool,
}

/// How router logits become expert weights. All of it in f32.
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
        /// Equal groups of neighbouring experts, each judged by the sum of its two best biased
        /// scores.
        groups: usize,
        /// Groups an expert may be chosen from.
        top_groups: usize,
        /// Divide the chosen scores by their sum.
        normalise: bool,
        /// What multiplies the weights in the end.
        scale: f64,
    },
    /// The top k logits; the sigmoid of each multiplies the expert's INPUT (Llama 4).
    SigmoidOfInput,
    /// Softmax over all experts, then the top k of the best groups, weighted by their shares
    /// (DeepSeek-V2).
    SoftmaxGroups {
        /// Equal groups of neighbouring experts, each judged by its best share.
        groups: usize,
        /// Groups an expert may be chosen from.
        top_groups: usize,
        /// What multiplies the weights in the end.
        scale: f64,
    },
    /// The input is normalised and scaled; softmax over all experts, the top k divided by their
    /// sum, each times a number of its expert (Gemma 4).
    NormedSoftmax {
        /// Added to the mean square.
        eps: f64,
    },
}

impl RouterSpec {
    /// Logits have a bias.
    pub fn bias(&self) -> bool {
        matches!(self, Self::TopKSoftmax)
    }

    /// Scores have a correction bias that takes part in choosing only.
    pub fn correction(&self) -> bool {
        matches!(self, Self::SigmoidGroups { .. })
    }

    /// Its input and its weights have stored scales.
    pub fn scales(&self) -> bool {
        matches!(self, Self::NormedSoftmax { .. })
    }
}

/// Tensors that are fetched together, used by all tokens, and dropped together: the grain of
/// streaming.
#[derive(Clone, Debug, PartialEq)]
pub struct Unit {
    /// Layer, from 0.
    pub layer: usize,
    /// Which part of the layer.
    pub part: Part,
    /// What it needs.
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
    /// A group of its experts; the last group ends the layer.
    Experts(Range<usize>),
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.part {
            Part::Mixer => write!(f, "layer {} mixer", self.layer),
            Part::Dense => write!(f, "layer {} MLP", self.layer),
            Part::Router => write!(f, "layer {} router", self.layer),
            Part::Experts(group) => write!(f, "layer {} experts {}..{}", self.layer, group.start, group.end),
        }
    }
}

/// Norms over the residual stream's width whose outputs nothing is projected from, and of the
/// experts' own input.
const UNSTUDIED: [Role; 5] =
    [Role::MixerPostNorm, Role::FfnPostNorm, Role::BesidePostNorm, Role::ExpertsNorm, Role::ExpertsPostNorm];

/// A place in the model whose values are studied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Site {
    /// Layer, from 0.
    pub layer: usize,
    /// Where in the layer.
    pub point: Point,
}

impl Site {
    /// Whose input a norm output is: the layer, and [`Point::BeforeAttention`] or
    /// [`Point::BeforeMlp`]. In a post-norm layer the norm after attention feeds the MLP, and the
    /// norm after the MLP the next layer's attention (or, after the last layer, the head).
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

    /// The longest sequence that is computed; `None`: any.
    pub fn longest(&self) -> Option<Longest> {
        let (positions, keys) = (self.max_positions.map(Longest::Positions), self.selected_keys);
        positions.into_iter().chain(keys.map(Longest::SelectedKeys)).min_by_key(|longest| longest.tokens())
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
    /// In words.
    pub fn describe(&self) -> String {
        match (self.has_mixer(), self.has_ffn()) {
            (true, false) => self.mixer.describe(),
            (false, true) => self.ffn.describe(),
            _ => format!("{}; {}", self.mixer.describe(), self.ffn.describe()),
        }
    }

    /// Tokens are mixed.
    pub fn has_mixer(&self) -> bool {
        self.mixer != MixerSpec::None
    }

    /// There is a feed-forward.
    pub fn has_ffn(&self) -> bool {
        self.ffn != FfnSpec::None
    }

    /// Routed experts, 0 in a dense layer.
    pub fn experts(&self) -> usize {
        match &self.ffn {
            FfnSpec::Dense(_) | FfnSpec::None => 0,
            FfnSpec::Moe(moe) => moe.experts,
        }
    }
}

impl AttentionSpec {
    /// Every token sees all before it, with nothing around it: no positions, norms, biases or
    /// gates.
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

    /// Multiply-adds per pair of a token and one it sees; a DeltaNet has none, its state does not
    /// grow.
    pub fn pair_values(&self) -> usize {
        match self {
            Self::Attention(a) => 2 * a.heads * a.head_dim,
            Self::Latent(l) => l.heads * (l.nope_dim + l.rope_dim + l.value_dim),
            Self::DeltaNet(_) | Self::Mamba(_) | Self::None => 0,
        }
    }

    /// Heads for which scores are held.
    pub fn score_heads(&self) -> usize {
        match self {
            Self::Attention(a) => a.heads,
            Self::Latent(l) => l.heads,
            Self::DeltaNet(_) | Self::Mamba(_) | Self::None => 0,
        }
    }

    /// Bytes per token that are alive between the projections in and out, in a pass whose values
    /// have `value` bytes.
    pub fn projected_bytes(&self, value: usize) -> usize {
        match self {
            Self::Attention(a) => {
                let gate = if a.output_gate == OutputGate::None { 0 } else { a.heads };
                (2 * a.heads + gate + 2 * a.kv_heads) * a.head_dim * value
            }
            Self::Latent(l) => l.heads * (3 * (l.nope_dim + l.rope_dim) + 2 * l.value_dim) * value,
            Self::None => 0,
            Self::Mamba(m) => {
                // f32 inside: convolved channels twice, and what writes and reads for each head.
                let repeated = 2 * m.heads * m.state;
                (2 * m.inner() + m.channels()) * value
                    + (2 * m.channels() + repeated + 4 * m.inner()) * size_of::<f32>()
            }
            Self::DeltaNet(d) => {
                // f32 inside: convolved channels, queries and keys repeated for each value head,
                // what was read twice.
                let (values, repeated) = (d.value_heads * d.value_dim, 2 * d.value_heads * d.key_dim);
                // Steps and decays.
                let steps = if d.decays_channels() { 2 * d.value_heads * d.key_dim } else { 0 };
                (d.channels() + values) * value + (d.channels() + repeated + 2 * values + steps) * size_of::<f32>()
            }
        }
    }

    /// Bytes per token that are alive beside those where all sequences of a micro-batch are mixed
    /// together: keys and values by head, and what comes out of each block of queries.
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

    use super::Longest;

    #[test]
    fn longest_sequence_is_the_minimum_of_positions_and_index_topk() {
        let longest = |positions: usize| {
            let config = json!({
                "architectures": ["DeepseekV32ForCausalLM"], "max_position_embeddings": positions, "index_topk": 100,
            });
            crate::model::arch::read(&config).unwrap().spec.longest()
        };
        assert_eq!((longest(99), longest(101)), (Some(Longest::Positions(99)), Some(Longest::SelectedKeys(100))));
    }
}
