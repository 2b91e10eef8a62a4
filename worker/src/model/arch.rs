//! The registry of architectures, by Hugging Face's names, and how to read their `config.json`.
//!
//! A family is one data file in `arch/`: it maps configuration keys to a [`DecoderSpec`], and
//! lists the published tensor names.

use outliers_protocol::{ConfigReading, FailureKind};
use serde_json::{Map, Value};

// Each file of a family begins with `use super::*`, so that these are theirs, too.
use crate::error::{Result, WorkerError};
use crate::model::decoder::*;
use crate::model::rope::{Pairing, RopeScaling, RopeSpec};

mod config;

pub use config::Config;
use config::class::Class;
use config::rope::{RopeKind, yarn_magnitude};
use config::unused::Unused;
use config::{PER_LAYER, ill_typed, unsupported};

/// A family of models.
pub struct Family {
    /// `architectures[0]` of config.json.
    pub architecture: &'static str,
    /// `model_type` of config.json; the first is that of the transformers class.
    pub model_types: &'static [&'static str],
    /// The configuration class of transformers with the defaults of absent keys.
    pub class: &'static str,
    /// The class of the whole file, if the text model's settings are in `text_config`.
    pub wrapper: Option<&'static str>,
    /// Reads the configuration.
    pub spec: fn(&Config<'_>) -> Result<DecoderSpec>,
    /// Keys without effect, beside those of every family.
    pub unused: &'static [Unused],
    /// Published tensor names.
    pub names: &'static Names,
    /// Names in checkpoints with a tensor per expert, if `names` has stacked ones.
    pub unstacked: Option<&'static Names>,
}

impl Family {
    /// A family whose settings lie at the top of the file, are all used, and whose experts are
    /// stored in one way.
    const fn new(
        architecture: &'static str,
        model_types: &'static [&'static str],
        class: &'static str,
        spec: fn(&Config<'_>) -> Result<DecoderSpec>,
        names: &'static Names,
    ) -> Self {
        Self { architecture, model_types, class, wrapper: None, spec, unused: &[], names, unstacked: None }
    }
}

/// Declares the files below `arch/` and lists their families.
macro_rules! families {
    ($($file:ident,)*) => {
        $(mod $file;)*
        const FAMILIES: &[Family] = &[$($file::FAMILY),*];
    };
}

// One line per module.
families! {
    afmoe,
    bailing_moe_v2,
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    gemma3,
    gemma3_text,
    gemma4,
    glm4_moe,
    glm4_moe_lite,
    glm_moe_dsa,
    gpt2,
    gpt_oss,
    gptj,
    kimi_k25,
    kimi_linear,
    llama,
    llama4,
    minimax_m2,
    mixtral,
    nemotron_h,
    olmoe,
    opt,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
}

/// Published tensor names of a family.
///
/// Templates contain `{base}` (one of `bases`), `{layer}` and `{expert}`. A per-expert tensor
/// whose name has no `{expert}` is stored stacked, experts first.
pub struct Names {
    /// Template per role, in tables. The first table with the role counts.
    pub tensors: &'static [&'static [(Role, &'static str)]],
    /// Possible values of `{base}`. A checkpoint uses one of them.
    pub bases: &'static [&'static str],
    /// Matrices stored `[in, out]`; all others are `[out, in]`.
    pub input_major: &'static [Role],
    /// Stored tensors that a text-only pass of the main stack does not use.
    pub ignored: &'static [Ignored],
}

/// Known tensors that are not read.
pub struct Ignored {
    /// Names of the tensors.
    pub names: Pattern,
    /// Description of the tensors.
    pub why: &'static str,
}

/// A pattern of tensor names.
pub enum Pattern {
    /// Names with this prefix.
    Prefix(&'static str),
    /// Names with this suffix.
    Suffix(&'static str),
    /// Names that contain this.
    Within(&'static str),
    /// Tensors of layers past the configuration's last.
    LayersPastLast,
}

/// Rotary frequencies, stored by early conversions. The configuration determines them.
const ROTARY_BUFFERS: Ignored =
    Ignored { names: Pattern::Suffix(".rotary_emb.inv_freq"), why: "rotary frequencies (a buffer)" };
/// Layers for multi-token prediction, stored after the main stack.
const NEXT_TOKEN_LAYERS: Ignored = Ignored { names: Pattern::LayersPastLast, why: "multi-token prediction" };

/// The indexer of sparse attention, which selects keys.
const INDEXER: Ignored = Ignored {
    names: Pattern::Within(".self_attn.indexer."),
    why: "sparse indexer: it selects every key of sequences of up to index_topk tokens, and longer ones are refused",
};

/// Quantised storage of matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantisation {
    /// FP8 e4m3 with a scale per tile in `*_scale_inv` (DeepSeek). Tensors stored as plain floats
    /// are read as such.
    Fp8Blocks {
        /// Rows and columns of a tile.
        block: [usize; 2],
    },
    /// The experts' matrices as e2m1 in `*_blocks` with a shared exponent per 32 inputs in
    /// `*_scales` (gpt-oss), `[out, in]`.
    Mxfp4,
    /// Matrices as 4-bit integers in `*_packed`, a scale per group of inputs in `*_scale`, their
    /// shape in `*_shape` (compressed-tensors). Tensors stored as plain floats are read as such.
    Int4 {
        /// Inputs that share a scale, a multiple of 8.
        group: usize,
    },
    /// Matrices as e2m1, an e4m3 scale per 16 inputs in `*_scale`, and one scale per tensor.
    /// Tensors stored as plain floats are read as such.
    Nvfp4(Nvfp4Layout),
}

/// Names of the parts of an NVFP4 tensor, per publisher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nvfp4Layout {
    /// Codes under the plain name; the tensor's scale `*_scale_2` multiplies.
    ModelOpt,
    /// Codes in `*_packed`; the tensor's scale `*_global_scale` divides.
    CompressedTensors,
}

/// Tensors for programs that quantise activations.
const OF_ACTIVATIONS: &[Ignored] = &[
    Ignored { names: Pattern::Suffix(".input_scale"), why: "scales of activations" },
    Ignored { names: Pattern::Suffix(".input_global_scale"), why: "scales of activations" },
    Ignored { names: Pattern::Suffix(".k_scale"), why: "scales of activations" },
    Ignored { names: Pattern::Suffix(".v_scale"), why: "scales of activations" },
];

impl Names {
    /// Names of a family that stores matrices as `[out, in]` and nothing that is left unread.
    const fn new(tensors: &'static [&'static [(Role, &'static str)]], bases: &'static [&'static str]) -> Self {
        Self { tensors, bases, input_major: &[], ignored: &[] }
    }

    /// The template of a role's name.
    fn template(&self, role: Role) -> &'static str {
        let mut all = self.tensors.iter().copied().flatten();
        all.find(|(named, _)| *named == role).expect("a family names every tensor its spec needs: tested for each").1
    }

    /// The published name of a tensor.
    pub fn of(&self, base: &str, layer: usize, role: Role, expert: Option<usize>) -> String {
        let name = self.template(role).replace("{base}", base).replace("{layer}", &layer.to_string());
        expert.map_or(name.clone(), |e| name.replace("{expert}", &e.to_string()))
    }

    /// The published names of a role in all layers, with a `{layer}` placeholder.
    pub fn pattern(&self, base: &str, role: Role) -> String {
        self.template(role).replace("{base}", base)
    }

    /// Whether the experts of a role are stored in one tensor.
    pub fn is_stacked(&self, role: Role) -> bool {
        !self.template(role).contains("{expert}")
    }

    /// Why a stored tensor is not read; `None` if it is unknown.
    pub fn ignores(&self, name: &str, base: &str, layers: usize) -> Option<&'static str> {
        let past_last = || {
            let rest = name.strip_prefix(base)?.strip_prefix("layers.")?;
            let (layer, _) = rest.split_once('.')?;
            Some(layer.parse::<usize>().ok()? >= layers)
        };
        let is = |pattern: &Pattern| match pattern {
            Pattern::Prefix(prefix) => name.starts_with(prefix),
            Pattern::Suffix(suffix) => name.ends_with(suffix),
            Pattern::Within(part) => name.contains(part),
            Pattern::LayersPastLast => past_last() == Some(true),
        };
        let mut all = self.ignored.iter().chain(OF_ACTIVATIONS);
        all.find(|ignored| is(&ignored.names)).map(|ignored| ignored.why)
    }
}

/// Llama's tensor names, which most later families keep.
const LIKE_LLAMA: &[(Role, &str)] = &[
    (Role::Embedding, "{base}embed_tokens.weight"),
    (Role::FinalNorm, "{base}norm.weight"),
    (Role::Head, "lm_head.weight"),
    (Role::MixerNorm, "{base}layers.{layer}.input_layernorm.weight"),
    (Role::QProj, "{base}layers.{layer}.self_attn.q_proj.weight"),
    (Role::KProj, "{base}layers.{layer}.self_attn.k_proj.weight"),
    (Role::VProj, "{base}layers.{layer}.self_attn.v_proj.weight"),
    (Role::OProj, "{base}layers.{layer}.self_attn.o_proj.weight"),
    (Role::QProjBias, "{base}layers.{layer}.self_attn.q_proj.bias"),
    (Role::KProjBias, "{base}layers.{layer}.self_attn.k_proj.bias"),
    (Role::VProjBias, "{base}layers.{layer}.self_attn.v_proj.bias"),
    (Role::OProjBias, "{base}layers.{layer}.self_attn.o_proj.bias"),
    (Role::QNorm, "{base}layers.{layer}.self_attn.q_norm.weight"),
    (Role::KNorm, "{base}layers.{layer}.self_attn.k_norm.weight"),
    (Role::FfnNorm, "{base}layers.{layer}.post_attention_layernorm.weight"),
    (Role::GateProj, "{base}layers.{layer}.mlp.gate_proj.weight"),
    (Role::UpProj, "{base}layers.{layer}.mlp.up_proj.weight"),
    (Role::DownProj, "{base}layers.{layer}.mlp.down_proj.weight"),
    (Role::GateProjBias, "{base}layers.{layer}.mlp.gate_proj.bias"),
    (Role::UpProjBias, "{base}layers.{layer}.mlp.up_proj.bias"),
    (Role::DownProjBias, "{base}layers.{layer}.mlp.down_proj.bias"),
];

/// Names of router and experts in most mixtures with Llama's names.
const SEPARATE_EXPERTS: &[(Role, &str)] = &[
    (Role::Router, "{base}layers.{layer}.mlp.gate.weight"),
    (Role::ExpertGate, "{base}layers.{layer}.mlp.experts.{expert}.gate_proj.weight"),
    (Role::ExpertUp, "{base}layers.{layer}.mlp.experts.{expert}.up_proj.weight"),
    (Role::ExpertDown, "{base}layers.{layer}.mlp.experts.{expert}.down_proj.weight"),
];

/// Names of correction bias and shared expert as in DeepSeek-V3.
const SHARED_EXPERTS: &[(Role, &str)] = &[
    (Role::CorrectionBias, "{base}layers.{layer}.mlp.gate.e_score_correction_bias"),
    (Role::SharedGate, "{base}layers.{layer}.mlp.shared_experts.gate_proj.weight"),
    (Role::SharedUp, "{base}layers.{layer}.mlp.shared_experts.up_proj.weight"),
    (Role::SharedDown, "{base}layers.{layer}.mlp.shared_experts.down_proj.weight"),
];

/// Attention by Llama's keys: grouped heads with rotary positions, without norms of queries and
/// keys.
fn attention_like_llama(config: &Config<'_>) -> Result<AttentionSpec> {
    let attention = attention_without_positions(config)?;
    Ok(AttentionSpec { rope: Some(config.rope(attention.head_dim)?), ..attention })
}

/// As [`attention_like_llama`], without the rotation.
fn attention_without_positions(config: &Config<'_>) -> Result<AttentionSpec> {
    let heads = config.count("num_attention_heads")?;
    let hidden = config.count("hidden_size")?;
    let head_dim = config.count_or("head_dim", hidden / heads.max(1))?;
    let bias = config.knows("attention_bias") && config.flag("attention_bias")?;
    Ok(AttentionSpec {
        qkv_bias: bias,
        output_bias: bias,
        ..AttentionSpec::plain(heads, config.count_or("num_key_value_heads", heads)?, head_dim)
    })
}

/// The window of each layer by its kind: all keys for `full_attention`. `limited` layers have the
/// `window` of `key`; `None` if it is null or switched off.
fn windows(kinds: Vec<&str>, limited: &str, key: &str, window: Option<Window>) -> Result<Vec<Window>> {
    let of = |(index, kind): (usize, &str)| match kind {
        "full_attention" => Ok(Window::Full),
        kind if kind == limited => {
            window.ok_or_else(|| unsupported(format!("layer_types[{index}] {kind:?} without a {key} in use")))
        }
        _ => Err(unsupported(format!("layer_types[{index}] {kind:?}"))),
    };
    kinds.into_iter().enumerate().map(of).collect()
}

/// The window of each layer: by `layer_types`, else every n-th layer is global.
fn windows_but_every(config: &Config<'_>, every: usize) -> Result<Vec<Window>> {
    let by_interval = |layer: usize| if layer.is_multiple_of(every) { "full_attention" } else { "sliding_attention" };
    let kinds = match config.layer_types()? {
        Some(kinds) => kinds,
        None => (1..=config.layers()?).map(by_interval).collect(),
    };
    let window = config.count_opt("sliding_window")?.map(Window::Sliding);
    windows(kinds, "sliding_attention", "sliding_window", window)
}

/// The window of each layer of a dense Qwen: by `layer_types`, else from layer `max_window_layers`
/// on if switched on.
fn qwen_windows(config: &Config<'_>) -> Result<Vec<Window>> {
    let (first, sliding) = (config.count("max_window_layers")?, qwen_window(config)?);
    match config.layer_types()? {
        Some(kinds) => windows(kinds, "sliding_attention", "sliding_window", sliding),
        None => {
            let of = |layer| sliding.filter(|_| layer >= first).unwrap_or(Window::Full);
            Ok((0..config.layers()?).map(of).collect())
        }
    }
}

/// The window of a Qwen's windowed layers; `None` if it is switched off.
fn qwen_window(config: &Config<'_>) -> Result<Option<Window>> {
    let (used, size) = (config.flag("use_sliding_window")?, config.count_opt("sliding_window")?);
    Ok(size.filter(|_| used).map(Window::Sliding))
}

/// Layers of a Qwen mixture with experts: every `decoder_sparse_step`-th except those listed.
fn sparse_layers(config: &Config<'_>) -> Result<Vec<bool>> {
    let step = config.divisor("decoder_sparse_step")?;
    let dense = config.counts_opt("mlp_only_layers")?.unwrap_or_default();
    Ok((0..config.layers()?).map(|layer| (layer + 1).is_multiple_of(step) && !dense.contains(&layer)).collect())
}

/// Layers with experts: all but the first `first_k_dense_replace`.
fn sparse_after_first(config: &Config<'_>) -> Result<Vec<bool>> {
    let dense = config.count("first_k_dense_replace")?;
    Ok((0..config.layers()?).map(|layer| layer >= dense).collect())
}

/// Layers with experts: those that `mlp_layer_types` calls sparse; `None` if the class derives
/// them.
fn sparse_by_types(config: &Config<'_>) -> Result<Option<Vec<bool>>> {
    let is_sparse = |(index, kind): (usize, &str)| match kind {
        "sparse" => Ok(true),
        "dense" => Ok(false),
        _ => Err(unsupported(format!("mlp_layer_types[{index}] {kind:?}"))),
    };
    let kinds = config.words_opt("mlp_layer_types")?;
    kinds.map(|kinds| kinds.into_iter().enumerate().map(is_sparse).collect()).transpose()
}

/// The feed-forward of a layer by DeepSeek-V3's keys: dense, or sigmoid routing with group limits
/// and a shared expert with the width of `n_shared_experts` routed ones.
fn ffn_like_deepseek(config: &Config<'_>, sparse: bool) -> Result<FfnSpec> {
    config.expect("scoring_func", &["sigmoid".into()])?;
    config.expect("topk_method", &["noaux_tc".into()])?;
    config.expect("moe_layer_freq", &[1.into()])?;
    let dense = MlpSpec::swiglu(config.count("intermediate_size")?);
    let moe = MoeSpec::plain(
        config.count("n_routed_experts")?,
        config.count("num_experts_per_tok")?,
        MlpSpec::swiglu(config.count("moe_intermediate_size")?),
        sigmoid_groups(config, config.flag("norm_topk_prob")?)?,
    )
    .sharing(config.count("n_shared_experts")?);
    Ok(if sparse { FfnSpec::Moe(moe) } else { FfnSpec::Dense(dense) })
}

/// Sigmoid routing by the same keys.
fn sigmoid_groups(config: &Config<'_>, normalise: bool) -> Result<RouterSpec> {
    Ok(RouterSpec::SigmoidGroups {
        groups: config.count("n_group")?,
        top_groups: config.count("topk_group")?,
        normalise,
        scale: config.number("routed_scaling_factor")?,
    })
}

/// A pre-norm layer.
fn pre_norm(norm: NormSpec, mixer: MixerSpec, ffn: FfnSpec) -> LayerSpec {
    LayerSpec { norm, order: NormOrder::Before, mixer, ffn, scalar: false }
}

/// A decoder by Llama's keys: embedding and head as wide as the residual stream, a final norm like
/// the layers'.
fn decoder_like_llama(config: &Config<'_>, layers: Vec<LayerSpec>) -> Result<DecoderSpec> {
    decoder_of_width(config, config.count("hidden_size")?, config.count("max_position_embeddings")?, layers)
}

/// As [`decoder_like_llama`], with two numbers that are under other keys.
fn decoder_of_width(
    config: &Config<'_>,
    hidden: usize,
    max_positions: usize,
    layers: Vec<LayerSpec>,
) -> Result<DecoderSpec> {
    Ok(DecoderSpec {
        hidden,
        vocab: config.count("vocab_size")?,
        max_positions: Some(max_positions),
        selected_keys: None,
        embedding: EmbeddingSpec { width: hidden, positions: None, scale: None },
        final_norm: layers.first().map(|layer| layer.norm),
        layers,
        head: HeadSpec { tied: config.flag("tie_word_embeddings")?, stored: false, bias: false, softcap: None },
    })
}

/// Supported architectures.
pub fn known() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.architecture)
}

/// The model that a `config.json` describes.
pub struct Architecture {
    /// Its family.
    pub family: &'static Family,
    /// Names of its tensors.
    pub names: &'static Names,
    /// What to compute.
    pub spec: DecoderSpec,
    /// Quantised storage of its matrices.
    pub quantisation: Option<Quantisation>,
    /// Assumed defaults and unknown keys of the file.
    pub reading: ConfigReading,
}

impl Architecture {
    /// Selects the names of experts, per expert or stacked, by the tensors of a checkpoint, if the
    /// family has both.
    #[must_use]
    pub fn as_stored(self, holds: impl Fn(&str) -> bool) -> Self {
        let Some(unstacked) = self.family.unstacked else { return self };
        let layer = self.spec.layers.iter().position(|layer| layer.experts() > 0).unwrap_or(0);
        let name = |names: &Names, base: &str| names.of(base, layer, Role::ExpertDown, Some(0));
        let has = |names: &Names| names.bases.iter().any(|base| holds(&name(names, base)));
        let apart = has(unstacked);
        if apart || has(self.family.names) { self.with_experts(apart) } else { self }
    }

    /// Selects names per expert (`apart`) or stacked.
    fn with_experts(mut self, apart: bool) -> Self {
        let Some(unstacked) = self.family.unstacked else { return self };
        self.names = if apart { unstacked } else { self.family.names };
        for layer in &mut self.spec.layers {
            if let FfnSpec::Moe(moe) = &mut layer.ffn
                && let MlpKind::Swiglu(stored) = &mut moe.expert.kind
            {
                *stored = if apart { GateUp::Separate } else { GateUp::Halves };
            }
        }
        self
    }
}

/// Reads a `config.json`.
///
/// # Errors
/// [`FailureKind::Unsupported`]: an unknown architecture (the message lists the known ones), or an
/// unsupported setting. [`FailureKind::Checkpoint`]: a key is missing, null or of a wrong type.
pub fn read(config: &Value) -> Result<Architecture> {
    let values = config.as_object().ok_or_else(|| WorkerError::checkpoint("config.json is not a JSON object"))?;
    let family = family(values)?;
    let top = Config::new(values, Class::of(family.wrapper.unwrap_or(family.class)), "");
    let mut quantisation = top.quantisation()?;
    top.raw("architectures");
    top.raw("model_type");
    if family.wrapper.is_none() {
        let (spec, reading) = finish(&top, family)?;
        return Ok(Architecture { family, names: family.names, spec, quantisation, reading });
    }
    let text = Config::new(top.object(TEXT_CONFIG)?, Class::of(family.class), "text_config.");
    text.raw("architectures");
    text.raw("model_type");
    // Kimi-K2.5 has the key in `text_config`.
    quantisation = quantisation.or(text.quantisation()?);
    let (mut spec, mut reading) = finish(&text, family)?;
    // In transformers the outer class decides on tying, unless the family differs.
    const TIED: &str = "tie_word_embeddings";
    if top.knows(TIED) && config::unused::reason(TIED, family.unused).is_none() {
        spec.head.tied = top.flag(TIED)?;
    }
    reading.unknown.extend(top.finish(family.unused)?.unknown);
    // Quantised checkpoints store experts separately.
    let apart = quantisation.is_some();
    Ok(Architecture { family, names: family.names, spec, quantisation, reading }.with_experts(apart))
}

/// The key of the text model's settings in multimodal configurations.
const TEXT_CONFIG: &str = "text_config";

fn finish(config: &Config<'_>, family: &Family) -> Result<(DecoderSpec, ConfigReading)> {
    let spec = (family.spec)(config)?;
    // Masks of all classes depend on it, though no class has the attribute.
    const CAUSAL: &str = "is_causal";
    if config.has(CAUSAL) && !config.flag(CAUSAL)? {
        return Err(unsupported(format!("{CAUSAL} false")));
    }
    let reading = config.finish(family.unused)?;
    check(&spec).map_err(|error| match reading.explain() {
        Some(explained) => error.hint(explained),
        None => error,
    })?;
    Ok((spec, reading))
}

/// Unsupported architectures: prefix of the name, and what is not implemented.
const LACKING: &[(&str, &str)] = &[
    ("Dbrx", "LayerNorm without bias around experts that are stored as three tall matrices"),
    ("DeepseekV4", "four residual streams that are mixed between sublayers, and attention to compressed keys"),
    ("Grok", "capped attention scores, and norms around sublayers in its own scheme of names"),
    ("Jamba", "Mamba layers"),
    ("KimiK3", "experts in a latent space, attention to residuals of earlier layers, and another activation"),
    ("Longcat", "experts that do nothing, and two attentions in a layer"),
    ("Qwen4Exp", "a table of n-grams beside the embedding, and attention to selected keys"),
];

/// The family of `architectures[0]`, else of `model_type`. Both must agree.
fn family(values: &Map<String, Value>) -> Result<&'static Family> {
    let null = &Value::Null;
    let named = |key: &str| values.get(key).unwrap_or(null);
    let (architecture, model_type) = (&named("architectures")[0], named("model_type"));
    let unknown = |what: String| {
        let found = architecture.as_str().unwrap_or_default();
        let lacking = LACKING.iter().find(|(name, _)| found.starts_with(*name));
        let lacking = lacking.map_or_else(String::new, |(_, lacking)| format!(": it has {lacking}"));
        Err(WorkerError::new(FailureKind::Unsupported, format!("{what} is not supported{lacking}"))
            .hint(format!("supported: {}", known().collect::<Vec<_>>().join(", "))))
    };
    let found = match (architecture.as_str(), model_type.as_str()) {
        (Some(name), _) => FAMILIES.iter().find(|family| family.architecture == name),
        (None, Some(name)) => FAMILIES.iter().find(|family| family.model_types.contains(&name)),
        (None, None) => return Err(ill_typed("architectures[0]", "a string", architecture)),
    };
    match (found, architecture, model_type) {
        (None, Value::String(name), _) => unknown(format!("architecture {name:?}")),
        (None, _, name) => unknown(format!("model_type {name}")),
        (Some(family), _, Value::String(name)) if !family.model_types.contains(&name.as_str()) => {
            let message =
                format!("config.json says architecture {} and model_type {name:?}, which differ", family.architecture);
            Err(WorkerError::checkpoint(message).hint("transformers goes by model_type: correct the one that is wrong"))
        }
        (Some(family), ..) => Ok(family),
    }
}

/// Maximum number of experts in all layers. Kimi-K2 has 23 thousand.
const MAX_EXPERTS: usize = 1 << 20;

/// Refuses numbers that would later divide by zero or index out of range.
fn check(spec: &DecoderSpec) -> Result<()> {
    let bad = |what: String| Err(WorkerError::new(FailureKind::Checkpoint, format!("config.json: {what}")));
    if spec.hidden == 0 || spec.vocab == 0 || spec.layers.is_empty() {
        return bad(format!("{} layers of width {} over {} tokens", spec.layers.len(), spec.hidden, spec.vocab));
    }
    if spec.longest().is_some_and(|longest| longest.tokens() == 0) {
        return bad("sequences of 0 tokens at most".to_owned());
    }
    let experts = |layer: &LayerSpec| if let FfnSpec::Moe(moe) = &layer.ffn { moe.experts } else { 0 };
    let experts: usize = spec.layers.iter().map(experts).sum();
    if experts > MAX_EXPERTS {
        return bad(format!("{experts} experts in {} layers, more than {MAX_EXPERTS}", spec.layers.len()));
    }
    let problem = |layer: &LayerSpec| unsound_mixer(&layer.mixer).or_else(|| unsound_ffn(&layer.ffn));
    match spec.layers.iter().enumerate().find_map(|(i, layer)| Some((i, problem(layer)?))) {
        Some((i, problem)) => bad(format!("layer {i}: {problem}")),
        None => Ok(()),
    }
}

/// Describes an invalid mixer; `None` if it is valid.
fn unsound_mixer(mixer: &MixerSpec) -> Option<String> {
    let rotates = |rope: Option<&RopeSpec>, most: usize| {
        rope.is_none_or(|rope| rope.dims > 0 && rope.dims.is_multiple_of(2) && rope.dims <= most)
    };
    let evenly = |heads: usize, over: usize| heads > 0 && over > 0 && heads.is_multiple_of(over);
    match mixer {
        MixerSpec::Attention(a) => {
            let sees_itself = !matches!(a.window, Window::Sliding(0) | Window::Chunked(0));
            let sound = evenly(a.heads, a.kv_heads) && a.head_dim > 0 && sees_itself;
            let words = || {
                format!("{} heads over {} key/value heads of width {}, {:?}", a.heads, a.kv_heads, a.head_dim, a.window)
            };
            (!sound || !rotates(a.rope.as_ref(), a.head_dim)).then(words)
        }
        MixerSpec::Latent(l) => {
            let sound = l.heads > 0 && l.value_dim > 0 && l.kv_rank > 0 && rotates(l.rope.as_ref(), l.rope_dim);
            let words = || {
                format!(
                    "{} heads of width {}+{}, values of {}, rank {}",
                    l.heads, l.nope_dim, l.rope_dim, l.value_dim, l.kv_rank
                )
            };
            let no_queries = (l.query_rank == Some(0)).then(|| "queries of rank 0".to_owned());
            (!sound).then(words).or(no_queries)
        }
        MixerSpec::DeltaNet(d) => {
            let sound = evenly(d.value_heads, d.key_heads) && d.key_dim > 0 && d.value_dim > 0 && d.kernel > 0;
            let sound = sound && (!d.decays_channels() || d.value_heads == d.key_heads);
            (!sound).then(|| format!("{} value heads over {} key heads", d.value_heads, d.key_heads))
        }
        MixerSpec::Mamba(m) => {
            let sound = evenly(m.heads, m.groups) && m.head_dim > 0 && m.state > 0 && m.kernel > 0;
            (!sound).then(|| format!("{} Mamba heads in {} groups", m.heads, m.groups))
        }
        MixerSpec::None => None,
    }
}

/// Describes an invalid feed-forward; `None` if it is valid.
fn unsound_ffn(ffn: &FfnSpec) -> Option<String> {
    let widths = match ffn {
        FfnSpec::Dense(mlp) => [Some(mlp), None, None],
        FfnSpec::Moe(moe) => [Some(&moe.expert), moe.shared.as_ref().map(|shared| &shared.mlp), moe.beside.as_ref()],
        FfnSpec::None => [None; 3],
    };
    if widths.into_iter().flatten().any(|mlp| mlp.intermediate == 0) {
        return Some("a feed-forward of inner width 0".to_owned());
    }
    let FfnSpec::Moe(moe) = ffn else { return None };
    if let RouterSpec::SigmoidGroups { groups, top_groups, .. } | RouterSpec::SoftmaxGroups { groups, top_groups, .. } =
        moe.router
    {
        let even = groups > 0 && moe.experts.is_multiple_of(groups) && (1..=groups).contains(&top_groups);
        if !even || moe.top_k > moe.experts / groups * top_groups {
            return Some(format!(
                "top {} of {} experts in {top_groups} of {groups} groups (topk_group, n_group)",
                moe.top_k, moe.experts
            ));
        }
    }
    let sound = (1..=moe.experts).contains(&moe.top_k);
    (!sound).then(|| format!("top {} of {} experts", moe.top_k, moe.experts))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Families without biases, most of which have their own keys for head widths.
    const LATENT: [&str; 8] = [
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "DeepseekV32ForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "GlmMoeDsaForCausalLM",
        "KimiK25ForConditionalGeneration",
        "KimiLinearForCausalLM",
        "NemotronHForCausalLM",
    ];

    /// Keys of all families, with switches that require the maximum set of tensors.
    fn config(architecture: &str) -> Value {
        let latent = LATENT.contains(&architecture);
        let mut config = json!({
            "architectures": [architecture], "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2,
            "num_hidden_layers": 4, "intermediate_size": 12, "vocab_size": 16, "num_experts_per_tok": 2,
            "mlp_bias": !latent, "attention_bias": !latent, "use_qk_norm": true, "head_dim": if latent { 2 } else { 8 },
            // Mixtures.
            "num_local_experts": 3, "n_routed_experts": 3, "moe_intermediate_size": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "shared_expert_intermediate_size": 4, "intermediate_size_mlp": 12, "interleave_moe_layer_step": 2, "mlp_only_layers": [0], "n_group": 1, "topk_group": 1,
            "sliding_window": 4,
            // Gemma 4.
            "hidden_size_per_layer_input": 0, "enable_moe_block": true, "top_k_experts": 2, "global_head_dim": 8,
            // Latent attention and DeltaNet.
            "q_lora_rank": 4, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4,
            "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
            "linear_conv_kernel_dim": 4,
        });
        let older = json!({
            // GPT-2, GPT-J, OPT.
            "n_embd": 8, "n_head": 2, "n_layer": 4, "n_positions": 16, "rotary_dim": 2,
            "max_position_embeddings": 16, "ffn_dim": 12, "word_embed_proj_dim": 4,
        });
        config.as_object_mut().unwrap().extend(older.as_object().unwrap().clone());
        config["linear_attn_config"] =
            json!({"full_attn_layers": [2, 4], "kda_layers": [1, 3], "head_dim": 4, "num_heads": 2});
        if architecture.starts_with("Gemma4") {
            config["num_experts"] = json!(3);
        }
        if architecture.starts_with("Nemotron") {
            config["sliding_window"] = Value::Null;
        }
        config["text_config"] = config.clone();
        config
    }

    #[test]
    fn hostile_config_lists_no_huge_number_of_tensors() {
        let mut config = config("OlmoeForCausalLM");
        for (layers, experts, fine) in [(64, 512, true), (4096, 256, true), (4096, 257, false), (5000, 2, false)] {
            (config["num_hidden_layers"], config["num_local_experts"]) = (json!(layers), json!(experts));
            assert_eq!(read(&config).is_ok(), fine, "{layers} layers of {experts} experts");
        }
    }

    #[test]
    fn every_family_lists_each_required_tensor_once() {
        for name in known() {
            let Architecture { names: table, spec, .. } = read(&config(name)).unwrap();
            let needs = spec.needs();
            let of = |(layer, need): &(usize, Need)| table.of(table.bases[0], *layer, need.role, need.expert);
            let mut names: Vec<String> = needs.iter().map(of).collect();
            assert!(names.iter().all(|name| !name.contains('{')), "{name}: {names:?}");
            names.sort();
            names.dedup();
            // Experts of a stacked tensor share its name.
            let stacked =
                |(_, need): &&(usize, Need)| need.expert.is_some_and(|e| e > 0) && table.is_stacked(need.role);
            assert_eq!(names.len(), needs.len() - needs.iter().filter(stacked).count(), "{name}");
            // A tied model may still store the head, and its name is used.
            assert!(!table.of("", 0, Role::Head, None).is_empty());
        }
    }

    #[test]
    fn known_unsupported_architectures_state_what_is_missing() {
        for (name, lacking) in [
            ("DeepseekV4ForCausalLM", "four residual streams"),
            ("KimiK3ForConditionalGeneration", "latent space"),
            ("Qwen4ExpForCausalLM", "n-grams"),
            ("LongcatFlashForCausalLM", "do nothing"),
            ("DbrxForCausalLM", "LayerNorm"),
            ("JambaForCausalLM", "Mamba"),
            ("Grok1ModelForCausalLM", "capped"),
        ] {
            let error = read(&json!({"architectures": [name]})).map(|_| ()).unwrap_err();
            assert_eq!(error.kind(), FailureKind::Unsupported);
            assert!(error.message().contains(name) && error.message().contains(lacking), "{error}");
        }
        // An unknown architecture.
        let error = read(&json!({"architectures": ["FalconForCausalLM"]})).map(|_| ()).unwrap_err();
        assert!(error.message().ends_with("is not supported"), "{error}");
    }

    #[test]
    fn impossible_config_numbers_are_refused() {
        for (key, bad) in [
            ("num_attention_heads", 0),
            ("num_key_value_heads", 0),
            ("num_experts_per_tok", 4),
            ("hidden_size", 0),
            ("max_position_embeddings", 0),
        ] {
            let mut config = config("OlmoeForCausalLM");
            config[key] = bad.into();
            assert!(read(&config).is_err(), "{key} = {bad}");
        }
        for (architecture, key, said) in [
            ("OlmoeForCausalLM", "intermediate_size", "layer 0: a feed-forward of inner width 0"),
            ("LlamaForCausalLM", "intermediate_size", "layer 0: a feed-forward of inner width 0"),
            ("DeepseekV3ForCausalLM", "moe_intermediate_size", "layer 1: a feed-forward of inner width 0"),
            ("DeepseekV3ForCausalLM", "q_lora_rank", "layer 0: queries of rank 0"),
        ] {
            let mut config = config(architecture);
            config[key] = 0.into();
            let error = read(&config).map(|_| ()).unwrap_err();
            assert!(error.message().contains(said), "{architecture}: {error}");
        }
    }
}
