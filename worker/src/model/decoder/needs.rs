//! The tensors of a decoder with their shapes, grouped into streaming units.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{
    AttentionSpec, DecoderSpec, DeltaNetSpec, DeltaStored, FfnSpec, GateUp, LatentSpec, LayerSpec, MambaSpec,
    MixerSpec, MlpSpec, MoeSpec, NormKind, NormOrder, NormSpec, OutputGate, Part, QkNorm, StreamingUnit,
};

/// Role of a tensor. An architecture's name table maps each role to a published name.
///
/// Shapes of matrices are `[out, in]`, whatever their order on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Role {
    /// Token embedding `[vocab, width]`.
    Embedding,
    /// Learned positions `[rows, hidden]`.
    Positions,
    /// Projection of the embedding to the hidden size, `[hidden, width]`.
    ProjectIn,
    /// Projection to the embedding width before the head, `[width, hidden]`.
    ProjectOut,
    /// Gain of the last norm `[hidden]`.
    FinalNorm,
    /// Bias of the last norm.
    FinalNormBias,
    /// Head `[vocab, width]`.
    Head,
    /// Bias of the head `[vocab]`.
    HeadBias,

    /// Gain of the mixer's norm `[hidden]`.
    MixerNorm,
    /// Bias of the mixer's norm.
    MixerNormBias,
    /// Gain of the norm of the mixer's output `[hidden]`.
    MixerPostNorm,
    /// `q_proj` `[heads * head_dim, hidden]`, twice as many rows with an output gate.
    QProj,
    /// `k_proj` `[kv_heads * head_dim, hidden]`.
    KProj,
    /// `v_proj` `[kv_heads * head_dim, hidden]`.
    VProj,
    /// Queries, keys and values in one matrix.
    QkvProj,
    /// `o_proj` `[hidden, heads * value width]`.
    OProj,
    /// Bias of `QProj`.
    QProjBias,
    /// Bias of `KProj`.
    KProjBias,
    /// Bias of `VProj`.
    VProjBias,
    /// Bias of `QkvProj`.
    QkvProjBias,
    /// Bias of `OProj`.
    OProjBias,
    /// Gain of the queries' norm.
    QNorm,
    /// Gain of the keys' norm.
    KNorm,
    /// Attention sink logits `[heads]`.
    Sinks,
    /// Output gate `[heads * head_dim, hidden]`.
    OutputGate,

    /// Queries' down projection `[query_rank, hidden]`.
    QAProj,
    /// Gain of the norm of the low-rank queries.
    QANorm,
    /// Queries' up projection `[heads * (nope + rope), query_rank]`.
    QBProj,
    /// Down projection of keys and values, and the rotated key part `[kv_rank + rope, hidden]`.
    KvAProj,
    /// Gain of the norm of the low-rank keys and values.
    KvANorm,
    /// Up projection of keys and values, per head [key without position | value] `[heads * (nope +
    /// value), kv_rank]`.
    KvBProj,

    /// DeltaNet's projection, per key head [q | k | values | gates].
    DeltaQkvz,
    /// DeltaNet's projection, per key head [write strengths | steps].
    DeltaBa,
    /// DeltaNet's projection, all queries, all keys, all values `[channels, hidden]`.
    DeltaQkv,
    /// DeltaNet's projection to gates `[value_heads * value_dim, hidden]`.
    DeltaGate,
    /// DeltaNet's projection to write strengths `[value_heads, hidden]`.
    DeltaStrength,
    /// DeltaNet's projection to steps `[value_heads, hidden]`.
    DeltaStep,
    /// Gates' down projection `[value_dim, hidden]`.
    DeltaGateDown,
    /// Gates' up projection `[value_heads * value_dim, value_dim]`.
    DeltaGateUp,
    /// Steps' down projection `[value_dim, hidden]`.
    DeltaStepDown,
    /// Steps' up projection `[value_heads * key_dim, value_dim]`.
    DeltaStepUp,
    /// Convolution `[channels, 1, kernel]`.
    DeltaConvolution,
    /// Convolution of queries only.
    DeltaQueryConvolution,
    /// Convolution of keys only.
    DeltaKeyConvolution,
    /// Convolution of values only.
    DeltaValueConvolution,
    /// `A_log` `[value_heads]`, or `[1, 1, value_heads, 1]`.
    DeltaDecay,
    /// `dt_bias`, in the shape of a token's steps.
    DeltaStepBias,
    /// Gain of the gated norm `[value_dim]`.
    DeltaNorm,
    /// DeltaNet's output projection `[hidden, value_heads * value_dim]`.
    DeltaOutput,

    /// Mamba's projection [gates | values | writes | reads | steps].
    MambaInput,
    /// Convolution `[channels, 1, kernel]`.
    MambaConvolution,
    /// Bias of the convolution `[channels]`.
    MambaConvolutionBias,
    /// `A_log` `[heads]`.
    MambaDecay,
    /// `dt_bias` `[heads]`.
    MambaStepBias,
    /// `D` `[heads]`.
    MambaSkip,
    /// Gain of the norm of the gated values `[heads * head_dim]`.
    MambaNorm,
    /// Mamba's output projection `[hidden, heads * head_dim]`.
    MambaOutput,

    /// Gain of the feed-forward's norm `[hidden]`.
    FfnNorm,
    /// Bias of the feed-forward's norm.
    FfnNormBias,
    /// Gain of the norm of the feed-forward's output `[hidden]`.
    FfnPostNorm,
    /// Scalar of the residual stream after the layer `[1]`.
    LayerScalar,
    /// `gate_proj` `[intermediate, hidden]`.
    GateProj,
    /// `up_proj` `[intermediate, hidden]`.
    UpProj,
    /// Gate and up in one matrix `[2 * intermediate, hidden]`.
    GateUpProj,
    /// `down_proj` `[hidden, intermediate]`.
    DownProj,
    /// Bias of `GateProj`.
    GateProjBias,
    /// Bias of `UpProj`.
    UpProjBias,
    /// Bias of `GateUpProj`.
    GateUpProjBias,
    /// Bias of `DownProj`.
    DownProjBias,

    /// Router `[experts, hidden]`.
    Router,
    /// Bias of the logits `[experts]`.
    RouterBias,
    /// Correction bias of the scores for the choice `[experts]`.
    CorrectionBias,
    /// Gain of the norm of the router's input `[hidden]`.
    RouterScale,
    /// Factor of the weights `[experts]`.
    ExpertScale,
    /// Gain of the norm of the experts' input `[hidden]`, if it is not the feed-forward's.
    ExpertsNorm,
    /// Gain of the norm of the experts' sum `[hidden]`.
    ExpertsPostNorm,
    /// Gain of the norm of the output of the MLP beside the experts `[hidden]`.
    BesidePostNorm,
    /// An expert's `gate_proj` `[intermediate, hidden]`.
    ExpertGate,
    /// An expert's `up_proj` `[intermediate, hidden]`.
    ExpertUp,
    /// An expert's gate and up in one matrix `[2 * intermediate, hidden]`.
    ExpertGateUp,
    /// An expert's `down_proj` `[hidden, intermediate]`.
    ExpertDown,
    /// Bias of `ExpertGate`.
    ExpertGateBias,
    /// Bias of `ExpertUp`.
    ExpertUpBias,
    /// Bias of `ExpertGateUp`.
    ExpertGateUpBias,
    /// Bias of `ExpertDown`.
    ExpertDownBias,
    /// The shared expert's `gate_proj`.
    SharedGate,
    /// The shared expert's `up_proj`.
    SharedUp,
    /// The shared expert's gate and up in one matrix.
    SharedGateUp,
    /// The shared expert's `down_proj`.
    SharedDown,
    /// Bias of `SharedGate`.
    SharedGateBias,
    /// Bias of `SharedUp`.
    SharedUpBias,
    /// Bias of `SharedGateUp`.
    SharedGateUpBias,
    /// Bias of `SharedDown`.
    SharedDownBias,
    /// Gate of the shared expert `[1, hidden]`.
    SharedExpertGate,
    /// Projection to the experts' latent space `[latent, hidden]`.
    LatentDown,
    /// Projection from the experts' latent space `[hidden, latent]`.
    LatentUp,
}

/// A tensor that a model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Its role.
    pub role: Role,
    /// Expert index, for the `Expert*` roles.
    pub expert: Option<usize>,
    /// Required shape.
    pub shape: Vec<usize>,
}

impl Need {
    fn new(role: Role, shape: &[usize]) -> Self {
        Self { role, expert: None, shape: shape.to_vec() }
    }

    /// Number of values.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }

    /// Whether the tensor is the matrix of a product.
    pub fn is_matrix(&self) -> bool {
        self.shape.len() == 2
    }
}

/// The roles of one feed-forward's matrices, each with that of its bias.
pub(crate) struct MlpRoles {
    pub(crate) gate: [Role; 2],
    pub(crate) up: [Role; 2],
    pub(crate) gate_up: [Role; 2],
    pub(crate) down: [Role; 2],
}

impl MlpRoles {
    pub(crate) const DENSE: Self = Self {
        gate: [Role::GateProj, Role::GateProjBias],
        up: [Role::UpProj, Role::UpProjBias],
        gate_up: [Role::GateUpProj, Role::GateUpProjBias],
        down: [Role::DownProj, Role::DownProjBias],
    };
    pub(crate) const EXPERT: Self = Self {
        gate: [Role::ExpertGate, Role::ExpertGateBias],
        up: [Role::ExpertUp, Role::ExpertUpBias],
        gate_up: [Role::ExpertGateUp, Role::ExpertGateUpBias],
        down: [Role::ExpertDown, Role::ExpertDownBias],
    };
    pub(crate) const SHARED: Self = Self {
        gate: [Role::SharedGate, Role::SharedGateBias],
        up: [Role::SharedUp, Role::SharedUpBias],
        gate_up: [Role::SharedGateUp, Role::SharedGateUpBias],
        down: [Role::SharedDown, Role::SharedDownBias],
    };
}

impl DecoderSpec {
    /// The embedding table.
    pub fn embedding_need(&self) -> Need {
        Need::new(Role::Embedding, &[self.vocab, self.embedding.width])
    }

    /// The other tensors of the input: positions, and the input projection.
    pub fn input_needs(&self) -> Vec<Need> {
        let positions = self.embedding.positions.map(|p| Need::new(Role::Positions, &[p.rows, self.hidden]));
        let lead_in = self.is_projected().then(|| Need::new(Role::ProjectIn, &[self.hidden, self.embedding.width]));
        positions.into_iter().chain(lead_in).collect()
    }

    /// The tensors between the last layer and the head: final norm, and the output projection.
    pub fn output_needs(&self) -> Vec<Need> {
        let mut needs = Vec::new();
        if let Some(norm) = &self.final_norm {
            norm.needs(self.hidden, Role::FinalNorm, Role::FinalNormBias, &mut needs);
        }
        if self.is_projected() {
            needs.push(Need::new(Role::ProjectOut, &[self.embedding.width, self.hidden]));
        }
        needs
    }

    /// The head's matrix: the embedding, if it is tied.
    pub fn head_need(&self) -> Need {
        if self.head.tied { self.embedding_need() } else { Need::new(Role::Head, &[self.vocab, self.embedding.width]) }
    }

    /// The head's bias.
    pub fn head_bias_need(&self) -> Option<Need> {
        self.head.bias.then(|| Need::new(Role::HeadBias, &[self.vocab]))
    }

    /// The tensors that a pass reads after the last layer.
    pub fn head_needs(&self) -> Vec<Need> {
        let head = (!self.head.tied).then(|| self.head_need());
        self.output_needs().into_iter().chain(head).chain(self.head_bias_need()).collect()
    }

    /// Every tensor of the model with its layer (0 for those outside layers).
    pub fn needs(&self) -> Vec<(usize, Need)> {
        let outside = std::iter::once(self.embedding_need()).chain(self.input_needs()).chain(self.head_needs());
        let inside = self.units(u64::MAX).into_iter().flat_map(|u| u.needs.into_iter().map(move |n| (u.layer, n)));
        outside.map(|need| (0, need)).chain(inside).collect()
    }

    /// The units of all layers in order. A group of experts has at most `group_elements` values,
    /// or one expert.
    pub fn units(&self, group_elements: u64) -> Vec<StreamingUnit> {
        self.layers.iter().enumerate().flat_map(|(i, layer)| layer.units(i, self.hidden, group_elements)).collect()
    }

    fn is_projected(&self) -> bool {
        self.embedding.width != self.hidden
    }
}

impl LayerSpec {
    fn units(&self, layer: usize, hidden: usize, group_elements: u64) -> Vec<StreamingUnit> {
        let unit = |part, needs| StreamingUnit { layer, part, needs };
        let mut units = Vec::new();
        if self.has_mixer() {
            units.push(unit(Part::Mixer, self.mixer_needs(hidden)));
        }
        let mut ffn = Vec::new();
        if self.order != NormOrder::Shared {
            self.norm.needs(hidden, Role::FfnNorm, Role::FfnNormBias, &mut ffn);
        }
        match &self.ffn {
            FfnSpec::None => {}
            FfnSpec::Dense(mlp) => {
                mlp.needs(hidden, &MlpRoles::DENSE, &mut ffn);
                ffn.extend(self.closing_needs(hidden));
                units.push(unit(Part::Dense, ffn));
            }
            FfnSpec::Moe(moe) => {
                moe.router_needs(hidden, &mut ffn);
                units.push(unit(Part::Router, ffn));
                units.extend(moe.groups(hidden, group_elements).map(|group| {
                    let mut needs: Vec<Need> =
                        group.clone().flat_map(|expert| moe.expert_needs(expert, hidden)).collect();
                    if group.end == moe.experts {
                        needs.extend(self.closing_needs(hidden));
                    }
                    unit(Part::Experts(group), needs)
                }));
            }
        }
        units
    }

    /// Tensors of norm and mixer.
    fn mixer_needs(&self, hidden: usize) -> Vec<Need> {
        let mut mixer = Vec::new();
        self.norm.needs(hidden, Role::MixerNorm, Role::MixerNormBias, &mut mixer);
        self.mixer.needs(hidden, &mut mixer);
        mixer.extend((self.order == NormOrder::Sandwich).then(|| Need::new(Role::MixerPostNorm, &[hidden])));
        mixer
    }

    /// Tensors of the layer's end, after its feed-forward.
    fn closing_needs(&self, hidden: usize) -> Vec<Need> {
        let has_beside = matches!(&self.ffn, FfnSpec::Moe(moe) if moe.beside.is_some());
        let norms = [(has_beside, Role::ExpertsPostNorm), (self.order == NormOrder::Sandwich, Role::FfnPostNorm)];
        let norms = norms.into_iter().filter(|(is_there, _)| *is_there).map(|(_, role)| Need::new(role, &[hidden]));
        let latent = if let FfnSpec::Moe(moe) = &self.ffn { moe.latent } else { None };
        let latent = latent.map(|latent| Need::new(Role::LatentUp, &[hidden, latent]));
        let scalar = self.scalar.then(|| Need::new(Role::LayerScalar, &[1]));
        norms.chain(latent).chain(scalar).collect()
    }
}

impl NormSpec {
    fn needs(&self, width: usize, gain: Role, bias: Role, needs: &mut Vec<Need>) {
        needs.push(Need::new(gain, &[width]));
        if self.kind == NormKind::Layer {
            needs.push(Need::new(bias, &[width]));
        }
    }
}

impl MixerSpec {
    fn needs(&self, hidden: usize, needs: &mut Vec<Need>) {
        match self {
            Self::Attention(attention) => attention.needs(hidden, needs),
            Self::Latent(latent) => latent.needs(hidden, needs),
            Self::DeltaNet(delta) => delta.needs(hidden, needs),
            Self::Mamba(mamba) => mamba.needs(hidden, needs),
            Self::None => {}
        }
    }
}

impl AttentionSpec {
    fn needs(&self, hidden: usize, needs: &mut Vec<Need>) {
        let (values, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let queries = if self.output_gate == OutputGate::WithQuery { 2 * values } else { values };
        let projections = if self.fused_qkv {
            vec![(Role::QkvProj, Role::QkvProjBias, queries + 2 * kv)]
        } else {
            let mut separate = vec![(Role::QProj, Role::QProjBias, queries), (Role::KProj, Role::KProjBias, kv)];
            separate.extend((!self.key_is_value).then_some((Role::VProj, Role::VProjBias, kv)));
            separate
        };
        for (weight, bias, rows) in projections {
            needs.push(Need::new(weight, &[rows, hidden]));
            needs.extend(self.qkv_bias.then(|| Need::new(bias, &[rows])));
        }
        needs.push(Need::new(Role::OProj, &[hidden, values]));
        needs.extend(self.output_bias.then(|| Need::new(Role::OProjBias, &[hidden])));
        let gains = match self.qk_norm {
            QkNorm::None | QkNorm::AfterRope { .. } => None,
            QkNorm::WholeProjection(_) => Some((values, kv)),
            QkNorm::PerHead(_) => Some((self.head_dim, self.head_dim)),
        };
        if let Some((query, key)) = gains {
            needs.extend([Need::new(Role::QNorm, &[query]), Need::new(Role::KNorm, &[key])]);
        }
        needs.extend(self.sinks.then(|| Need::new(Role::Sinks, &[self.heads])));
        let separate = self.output_gate == OutputGate::Separate;
        needs.extend(separate.then(|| Need::new(Role::OutputGate, &[values, hidden])));
    }
}

impl LatentSpec {
    fn needs(&self, hidden: usize, needs: &mut Vec<Need>) {
        let queries = self.heads * (self.nope_dim + self.rope_dim);
        match self.query_rank {
            None => needs.push(Need::new(Role::QProj, &[queries, hidden])),
            Some(rank) => needs.extend([
                Need::new(Role::QAProj, &[rank, hidden]),
                Need::new(Role::QANorm, &[rank]),
                Need::new(Role::QBProj, &[queries, rank]),
            ]),
        }
        needs.extend([
            Need::new(Role::KvAProj, &[self.kv_rank + self.rope_dim, hidden]),
            Need::new(Role::KvANorm, &[self.kv_rank]),
            Need::new(Role::KvBProj, &[self.heads * (self.nope_dim + self.value_dim), self.kv_rank]),
            Need::new(Role::OProj, &[hidden, self.heads * self.value_dim]),
        ]);
    }
}

impl DeltaNetSpec {
    /// Channels of the convolution: queries, keys, values.
    pub fn channels(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
    }

    /// Whether each channel of a key has a decay, instead of each head.
    pub fn decays_channels(&self) -> bool {
        self.stored == DeltaStored::Apart
    }

    fn needs(&self, hidden: usize, needs: &mut Vec<Need>) {
        let (keys, values) = (self.key_heads * self.key_dim, self.value_heads * self.value_dim);
        let steps = if self.decays_channels() { self.value_heads * self.key_dim } else { self.value_heads };
        match self.stored {
            DeltaStored::ByKeyHead => needs.extend([
                Need::new(Role::DeltaQkvz, &[self.channels() + values, hidden]),
                Need::new(Role::DeltaBa, &[2 * self.value_heads, hidden]),
            ]),
            DeltaStored::ByKind => needs.extend([
                Need::new(Role::DeltaQkv, &[self.channels(), hidden]),
                Need::new(Role::DeltaGate, &[values, hidden]),
                Need::new(Role::DeltaStrength, &[self.value_heads, hidden]),
                Need::new(Role::DeltaStep, &[self.value_heads, hidden]),
            ]),
            DeltaStored::Apart => needs.extend([
                Need::new(Role::QProj, &[keys, hidden]),
                Need::new(Role::KProj, &[keys, hidden]),
                Need::new(Role::VProj, &[values, hidden]),
                Need::new(Role::DeltaGateDown, &[self.value_dim, hidden]),
                Need::new(Role::DeltaGateUp, &[values, self.value_dim]),
                Need::new(Role::DeltaStrength, &[self.value_heads, hidden]),
                Need::new(Role::DeltaStepDown, &[self.value_dim, hidden]),
                Need::new(Role::DeltaStepUp, &[steps, self.value_dim]),
            ]),
        }
        if self.stored == DeltaStored::Apart {
            needs.extend([
                Need::new(Role::DeltaQueryConvolution, &[keys, 1, self.kernel]),
                Need::new(Role::DeltaKeyConvolution, &[keys, 1, self.kernel]),
                Need::new(Role::DeltaValueConvolution, &[values, 1, self.kernel]),
                Need::new(Role::DeltaDecay, &[1, 1, self.value_heads, 1]),
            ]);
        } else {
            needs.extend([
                Need::new(Role::DeltaConvolution, &[self.channels(), 1, self.kernel]),
                Need::new(Role::DeltaDecay, &[self.value_heads]),
            ]);
        }
        needs.extend([
            Need::new(Role::DeltaStepBias, &[steps]),
            Need::new(Role::DeltaNorm, &[self.value_dim]),
            Need::new(Role::DeltaOutput, &[hidden, values]),
        ]);
    }
}

impl MambaSpec {
    /// Width of all heads.
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Channels of the convolution: values, writes, reads.
    pub fn channels(&self) -> usize {
        self.inner() + 2 * self.groups * self.state
    }

    fn needs(&self, hidden: usize, needs: &mut Vec<Need>) {
        let (inner, channels) = (self.inner(), self.channels());
        needs.extend([
            Need::new(Role::MambaInput, &[inner + channels + self.heads, hidden]),
            Need::new(Role::MambaConvolution, &[channels, 1, self.kernel]),
        ]);
        needs.extend(self.convolution_bias.then(|| Need::new(Role::MambaConvolutionBias, &[channels])));
        needs.extend([
            Need::new(Role::MambaDecay, &[self.heads]),
            Need::new(Role::MambaStepBias, &[self.heads]),
            Need::new(Role::MambaSkip, &[self.heads]),
            Need::new(Role::MambaNorm, &[inner]),
            Need::new(Role::MambaOutput, &[hidden, inner]),
        ]);
    }
}

impl MlpSpec {
    fn needs(&self, hidden: usize, roles: &MlpRoles, needs: &mut Vec<Need>) {
        let inner = self.intermediate;
        let widening = match self.gate_up() {
            None => vec![(roles.up, [inner, hidden])],
            Some(GateUp::Separate) => vec![(roles.gate, [inner, hidden]), (roles.up, [inner, hidden])],
            Some(GateUp::Halves | GateUp::Interleaved) => vec![(roles.gate_up, [2 * inner, hidden])],
        };
        for ([weight, bias], shape) in widening.into_iter().chain([(roles.down, [hidden, inner])]) {
            needs.push(Need::new(weight, &shape));
            needs.extend(self.bias.then(|| Need::new(bias, &shape[..1])));
        }
    }
}

impl MoeSpec {
    fn router_needs(&self, hidden: usize, needs: &mut Vec<Need>) {
        needs.push(Need::new(Role::Router, &[self.experts, hidden]));
        needs.extend(self.router.bias().then(|| Need::new(Role::RouterBias, &[self.experts])));
        needs.extend(self.router.correction().then(|| Need::new(Role::CorrectionBias, &[self.experts])));
        if self.router.scales() {
            needs.extend([Need::new(Role::RouterScale, &[hidden]), Need::new(Role::ExpertScale, &[self.experts])]);
        }
        if let Some(mlp) = &self.beside {
            mlp.needs(hidden, &MlpRoles::DENSE, needs);
            needs.extend([Need::new(Role::BesidePostNorm, &[hidden]), Need::new(Role::ExpertsNorm, &[hidden])]);
        }
        needs.extend(self.latent.map(|latent| Need::new(Role::LatentDown, &[latent, hidden])));
        if let Some(shared) = &self.shared {
            shared.mlp.needs(hidden, &MlpRoles::SHARED, needs);
            needs.extend(shared.gate.then(|| Need::new(Role::SharedExpertGate, &[1, hidden])));
        }
    }

    fn expert_needs(&self, expert: usize, hidden: usize) -> Vec<Need> {
        let mut needs = Vec::new();
        self.expert.needs(self.latent.unwrap_or(hidden), &MlpRoles::EXPERT, &mut needs);
        needs.iter_mut().for_each(|need| need.expert = Some(expert));
        needs
    }

    fn groups(&self, hidden: usize, group_elements: u64) -> impl Iterator<Item = Range<usize>> + use<> {
        let one: u64 = self.expert_needs(0, hidden).iter().map(Need::elements).sum();
        let size = (group_elements / one.max(1)).clamp(1, self.experts.max(1) as u64) as usize;
        let experts = self.experts;
        (0..experts).step_by(size).map(move |first| first..(first + size).min(experts))
    }
}
