//! What a decoder is, as data: shapes and switches of every block, and which tensors they need.
//!
//! Blocks read these records; they never see `config.json` nor a tensor's published name. An architecture that needs
//! something these records cannot say gets a new field here, not an `if` in a block.

use std::fmt;
use std::ops::Range;

use outliers_protocol::Point;

use crate::rope::RopeSpec;

/// A whole decoder-only model.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderSpec {
    /// Width of the residual stream: the number of features.
    pub hidden: usize,
    /// Rows of the embedding, columns of the logits.
    pub vocab: usize,
    /// Longest sequence the configuration allows.
    pub max_positions: Option<usize>,
    /// The head's matrix is the embedding.
    pub tied_head: bool,
    /// After the last layer.
    pub final_norm: NormSpec,
    /// From the input on.
    pub layers: Vec<LayerSpec>,
}

/// One pre-norm layer: `x += mixer(norm(x))`, then `x += ffn(norm(x))`.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Before the mixer; its output is the site [`Point::BeforeAttention`].
    pub mixer_norm: NormSpec,
    /// Mixes tokens.
    pub attention: AttentionSpec,
    /// Before the feed-forward; its output is the site [`Point::BeforeMlp`].
    pub ffn_norm: NormSpec,
    /// Works on each token alone.
    pub ffn: FfnSpec,
}

/// RMSNorm: `x / sqrt(mean(x^2) + eps) * gain`, in f32, over the last dimension.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// Added to the mean square.
    pub eps: f64,
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
    /// Norm of queries and keys before the rotation.
    pub qk_norm: QkNorm,
    /// q, k and v have a bias.
    pub qkv_bias: bool,
    /// The output projection has a bias.
    pub output_bias: bool,
    /// q, k, v clamped to [-c, c] after their norms (OLMoE's `clip_qkv`).
    pub clip_qkv: Option<f64>,
    /// Position encoding.
    pub rope: RopeSpec,
}

/// How queries and keys are normalised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum QkNorm {
    /// Not at all.
    None,
    /// RMSNorm over the whole projected vector, all heads together (OLMoE).
    WholeProjection(NormSpec),
}

/// A feed-forward block.
#[derive(Clone, Debug, PartialEq)]
pub enum FfnSpec {
    /// `down(silu(gate x) * up x)`.
    Dense(GatedSpec),
    /// Routed experts.
    Moe(MoeSpec),
}

/// A gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatedSpec {
    /// Inner width.
    pub intermediate: usize,
    /// All three projections have a bias.
    pub bias: bool,
}

/// A mixture of gated experts.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeSpec {
    /// Routed experts.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Shape of each expert.
    pub expert: GatedSpec,
    /// How tokens find their experts.
    pub router: RouterSpec,
}

/// How router logits become expert weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterSpec {
    /// Softmax over all experts in f32, then the top k; divided by their sum if `normalise`.
    SoftmaxTopK {
        /// Divide the chosen weights by their sum.
        normalise: bool,
    },
}

/// What a tensor is for. An architecture's name table maps each to a published name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Token embedding `[vocab, hidden]`.
    Embedding,
    /// Gain of the last norm `[hidden]`.
    FinalNorm,
    /// Head `[vocab, hidden]`.
    Head,
    /// Gain `[hidden]`.
    MixerNorm,
    /// Projection `[heads * head_dim, hidden]`.
    Query,
    /// Projection `[kv_heads * head_dim, hidden]`.
    Key,
    /// Projection `[kv_heads * head_dim, hidden]`.
    Value,
    /// Projection `[hidden, heads * head_dim]`.
    Output,
    /// Bias of `Query`.
    QueryBias,
    /// Bias of `Key`.
    KeyBias,
    /// Bias of `Value`.
    ValueBias,
    /// Bias of `Output`.
    OutputBias,
    /// Gain of the queries' norm.
    QueryNorm,
    /// Gain of the keys' norm.
    KeyNorm,
    /// Gain `[hidden]`.
    FfnNorm,
    /// Projection `[intermediate, hidden]`.
    Gate,
    /// Projection `[intermediate, hidden]`.
    Up,
    /// Projection `[hidden, intermediate]`.
    Down,
    /// Bias of `Gate`.
    GateBias,
    /// Bias of `Up`.
    UpBias,
    /// Bias of `Down`.
    DownBias,
    /// Router `[experts, hidden]`.
    Router,
    /// An expert's projection `[intermediate, hidden]`.
    ExpertGate,
    /// An expert's projection `[intermediate, hidden]`.
    ExpertUp,
    /// An expert's projection `[hidden, intermediate]`.
    ExpertDown,
}

/// One tensor a model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// What for.
    pub role: Role,
    /// Which expert, for the `Expert*` roles.
    pub expert: Option<usize>,
    /// Shape it must have.
    pub shape: Vec<usize>,
}

impl Need {
    fn new(role: Role, shape: &[usize]) -> Self {
        Self { role, expert: None, shape: shape.to_vec() }
    }

    fn of_expert(role: Role, expert: usize, shape: &[usize]) -> Self {
        Self { role, expert: Some(expert), shape: shape.to_vec() }
    }

    /// Values in the tensor.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

/// Tensors that are fetched together, used by all tokens, and dropped together: the grain of streaming.
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
    /// Norm and attention.
    Attention,
    /// Norm and dense MLP.
    Dense,
    /// Norm and router of a mixture.
    Router,
    /// A group of its experts; the last group ends the layer.
    Experts(Range<usize>),
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.part {
            Part::Attention => write!(f, "layer {} attention", self.layer),
            Part::Dense => write!(f, "layer {} MLP", self.layer),
            Part::Router => write!(f, "layer {} router", self.layer),
            Part::Experts(group) => write!(f, "layer {} experts {}..{}", self.layer, group.start, group.end),
        }
    }
}

impl DecoderSpec {
    /// The studied norm outputs in order of computation.
    pub fn sites(&self) -> Vec<crate::stats::Site> {
        let points = [Point::BeforeAttention, Point::BeforeMlp];
        (0..self.layers.len()).flat_map(|layer| points.map(|point| crate::stats::Site { layer, point })).collect()
    }

    /// The embedding table.
    pub fn embedding_need(&self) -> Need {
        Need::new(Role::Embedding, &[self.vocab, self.hidden])
    }

    /// Final norm, and the head unless it is the embedding.
    pub fn head_needs(&self) -> Vec<Need> {
        let mut needs = vec![Need::new(Role::FinalNorm, &[self.hidden])];
        if !self.tied_head {
            needs.push(Need::new(Role::Head, &[self.vocab, self.hidden]));
        }
        needs
    }

    /// Every tensor of the model with its layer (0 for those outside layers).
    pub fn needs(&self) -> Vec<(usize, Need)> {
        let outside = std::iter::once(self.embedding_need()).chain(self.head_needs()).map(|need| (0, need));
        let inside = self.units(u64::MAX).into_iter().flat_map(|u| u.needs.into_iter().map(move |n| (u.layer, n)));
        outside.chain(inside).collect()
    }

    /// The units of all layers in order. Experts are grouped so that a group stays within `group_elements` values, one expert at least.
    pub fn units(&self, group_elements: u64) -> Vec<Unit> {
        self.layers.iter().enumerate().flat_map(|(i, layer)| layer.units(i, self.hidden, group_elements)).collect()
    }
}

impl LayerSpec {
    fn units(&self, layer: usize, hidden: usize, group_elements: u64) -> Vec<Unit> {
        let mut attention = vec![Need::new(Role::MixerNorm, &[hidden])];
        attention.extend(self.attention.needs(hidden));
        let mut units = vec![Unit { layer, part: Part::Attention, needs: attention }];
        let norm = Need::new(Role::FfnNorm, &[hidden]);
        match &self.ffn {
            FfnSpec::Dense(gated) => {
                let mut needs = vec![norm];
                needs.extend(gated.needs(hidden));
                units.push(Unit { layer, part: Part::Dense, needs });
            }
            FfnSpec::Moe(moe) => {
                let router = Need::new(Role::Router, &[moe.experts, hidden]);
                units.push(Unit { layer, part: Part::Router, needs: vec![norm, router] });
                units.extend(moe.groups(hidden, group_elements).map(|group| Unit {
                    layer,
                    needs: group.clone().flat_map(|e| moe.expert_needs(e, hidden)).collect(),
                    part: Part::Experts(group),
                }));
            }
        }
        units
    }

    /// In words.
    pub fn describe(&self) -> String {
        let a = &self.attention;
        let ffn = match &self.ffn {
            FfnSpec::Dense(g) => format!("gated MLP {}", g.intermediate),
            FfnSpec::Moe(m) => format!("{} experts x {}, top {}", m.experts, m.expert.intermediate, m.top_k),
        };
        format!("attention {}/{} x {}; {ffn}", a.heads, a.kv_heads, a.head_dim)
    }
}

impl AttentionSpec {
    fn needs(&self, hidden: usize) -> Vec<Need> {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut needs = vec![
            Need::new(Role::Query, &[q, hidden]),
            Need::new(Role::Key, &[kv, hidden]),
            Need::new(Role::Value, &[kv, hidden]),
            Need::new(Role::Output, &[hidden, q]),
        ];
        if self.qkv_bias {
            needs.extend(
                [(Role::QueryBias, q), (Role::KeyBias, kv), (Role::ValueBias, kv)].map(|(r, n)| Need::new(r, &[n])),
            );
        }
        if self.output_bias {
            needs.push(Need::new(Role::OutputBias, &[hidden]));
        }
        if let QkNorm::WholeProjection(_) = self.qk_norm {
            needs.extend([Need::new(Role::QueryNorm, &[q]), Need::new(Role::KeyNorm, &[kv])]);
        }
        needs
    }
}

impl GatedSpec {
    fn needs(&self, hidden: usize) -> Vec<Need> {
        let inner = self.intermediate;
        let mut needs = vec![
            Need::new(Role::Gate, &[inner, hidden]),
            Need::new(Role::Up, &[inner, hidden]),
            Need::new(Role::Down, &[hidden, inner]),
        ];
        if self.bias {
            needs.extend(
                [(Role::GateBias, inner), (Role::UpBias, inner), (Role::DownBias, hidden)]
                    .map(|(r, n)| Need::new(r, &[n])),
            );
        }
        needs
    }
}

impl MoeSpec {
    fn expert_needs(&self, expert: usize, hidden: usize) -> [Need; 3] {
        let inner = self.expert.intermediate;
        [
            Need::of_expert(Role::ExpertGate, expert, &[inner, hidden]),
            Need::of_expert(Role::ExpertUp, expert, &[inner, hidden]),
            Need::of_expert(Role::ExpertDown, expert, &[hidden, inner]),
        ]
    }

    fn groups(&self, hidden: usize, group_elements: u64) -> impl Iterator<Item = Range<usize>> + use<> {
        let one = 3 * (self.expert.intermediate * hidden) as u64;
        let size = (group_elements / one.max(1)).clamp(1, self.experts.max(1) as u64) as usize;
        let experts = self.experts;
        (0..experts).step_by(size).map(move |first| first..(first + size).min(experts))
    }
}
