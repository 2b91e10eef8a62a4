//! The registry of architectures: Hugging Face's name for each, and how to read its `config.json`.
//!
//! A family is one file of data below `arch/`: configuration keys to [`DecoderSpec`], and published tensor names. It computes nothing.

use outliers_protocol::FailureKind;
use serde_json::Value;

use crate::decoder::{
    AttentionSpec, DecoderSpec, EmbeddingSpec, FfnSpec, HeadSpec, LayerSpec, MixerSpec, MlpSpec, MoeSpec, NormOrder,
    NormSpec, Role, RouterSpec, SharedSpec, Window,
};
use crate::error::{Result, WorkerError};
use crate::rope::{Pairing, RopeScaling, RopeSpec};

/// A family of models.
pub struct Family {
    /// `architectures[0]` of config.json.
    pub architecture: &'static str,
    /// Reads the configuration.
    pub spec: fn(&Config<'_>) -> Result<DecoderSpec>,
    /// Published tensor names.
    pub names: &'static Names,
}

/// Declares the files below `arch/` and lists their families.
macro_rules! families {
    ($($file:ident,)*) => {
        $(mod $file;)*
        const FAMILIES: &[Family] = &[$($file::FAMILY),*];
    };
}

// One line each.
families! {
    deepseek_v3,
    glm4_moe,
    gpt2,
    gpt_oss,
    gptj,
    llama,
    llama4,
    mixtral,
    olmoe,
    opt,
    qwen2,
    qwen3,
    qwen3_moe,
    qwen3_next,
}

/// Published names of a family's tensors.
///
/// Templates hold `{base}` (one of `bases`), `{layer}` and `{expert}`. A tensor that is needed per expert but whose name has no
/// `{expert}` is stored stacked, experts first.
pub struct Names {
    /// Template per role, in tables of which the first that knows a role counts.
    pub tensors: &'static [&'static [(Role, &'static str)]],
    /// What `{base}` may stand for; a checkpoint uses one of them.
    pub bases: &'static [&'static str],
    /// Matrices stored `[in, out]`; all others are `[out, in]`.
    pub input_major: &'static [Role],
    /// Tensors on disk that a text-only pass of the main stack does not use.
    pub ignored: &'static [Ignored],
}

/// Tensors known and deliberately left unread.
pub struct Ignored {
    /// Which.
    pub names: Pattern,
    /// What they are.
    pub why: &'static str,
}

/// Names of tensors.
pub enum Pattern {
    /// Those that start so.
    Prefix(&'static str),
    /// Those that end so.
    Suffix(&'static str),
    /// Those of layers past the configuration's last.
    LayersPastLast,
}

/// Rotary frequencies, which the configuration determines, stored by early conversions.
const ROTARY_BUFFERS: Ignored =
    Ignored { names: Pattern::Suffix(".rotary_emb.inv_freq"), why: "rotary frequencies (a buffer)" };
/// Layers that predict the token after next, stored behind the main stack.
const NEXT_TOKEN_LAYERS: Ignored = Ignored { names: Pattern::LayersPastLast, why: "multi-token prediction" };

/// How matrices are stored, where not as plain floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantisation {
    /// FP8 e4m3 with a scale per tile in `*_scale_inv` (DeepSeek). What is stored as plain floats stays so.
    Fp8Blocks {
        /// Rows and columns of a tile.
        block: [usize; 2],
    },
    /// The experts' matrices as e2m1 in `*_blocks` with a shared exponent per 32 inputs in `*_scales` (gpt-oss), `[out, in]`.
    Mxfp4,
}

impl Names {
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

    /// Whether the experts of a role lie in one tensor.
    pub fn is_stacked(&self, role: Role) -> bool {
        !self.template(role).contains("{expert}")
    }

    /// Why a tensor on disk is deliberately left unread; `None` if it is not known.
    pub fn ignores(&self, name: &str, base: &str, layers: usize) -> Option<&'static str> {
        let past_last = || {
            let rest = name.strip_prefix(base)?.strip_prefix("layers.")?;
            let (layer, _) = rest.split_once('.')?;
            Some(layer.parse::<usize>().ok()? >= layers)
        };
        let is = |pattern: &Pattern| match pattern {
            Pattern::Prefix(prefix) => name.starts_with(prefix),
            Pattern::Suffix(suffix) => name.ends_with(suffix),
            Pattern::LayersPastLast => past_last() == Some(true),
        };
        self.ignored.iter().find(|ignored| is(&ignored.names)).map(|ignored| ignored.why)
    }
}

/// The names that Hugging Face gave Llama's parts, and most families after it kept.
const LIKE_LLAMA: &[(Role, &str)] = &[
    (Role::Embedding, "{base}embed_tokens.weight"),
    (Role::FinalNorm, "{base}norm.weight"),
    (Role::Head, "lm_head.weight"),
    (Role::MixerNorm, "{base}layers.{layer}.input_layernorm.weight"),
    (Role::Query, "{base}layers.{layer}.self_attn.q_proj.weight"),
    (Role::Key, "{base}layers.{layer}.self_attn.k_proj.weight"),
    (Role::Value, "{base}layers.{layer}.self_attn.v_proj.weight"),
    (Role::Output, "{base}layers.{layer}.self_attn.o_proj.weight"),
    (Role::QueryBias, "{base}layers.{layer}.self_attn.q_proj.bias"),
    (Role::KeyBias, "{base}layers.{layer}.self_attn.k_proj.bias"),
    (Role::ValueBias, "{base}layers.{layer}.self_attn.v_proj.bias"),
    (Role::OutputBias, "{base}layers.{layer}.self_attn.o_proj.bias"),
    (Role::QueryNorm, "{base}layers.{layer}.self_attn.q_norm.weight"),
    (Role::KeyNorm, "{base}layers.{layer}.self_attn.k_norm.weight"),
    (Role::FfnNorm, "{base}layers.{layer}.post_attention_layernorm.weight"),
    (Role::Gate, "{base}layers.{layer}.mlp.gate_proj.weight"),
    (Role::Up, "{base}layers.{layer}.mlp.up_proj.weight"),
    (Role::Down, "{base}layers.{layer}.mlp.down_proj.weight"),
    (Role::GateBias, "{base}layers.{layer}.mlp.gate_proj.bias"),
    (Role::UpBias, "{base}layers.{layer}.mlp.up_proj.bias"),
    (Role::DownBias, "{base}layers.{layer}.mlp.down_proj.bias"),
];

/// Names of router and experts in most mixtures that build on Llama's names.
const SEPARATE_EXPERTS: &[(Role, &str)] = &[
    (Role::Router, "{base}layers.{layer}.mlp.gate.weight"),
    (Role::ExpertGate, "{base}layers.{layer}.mlp.experts.{expert}.gate_proj.weight"),
    (Role::ExpertUp, "{base}layers.{layer}.mlp.experts.{expert}.up_proj.weight"),
    (Role::ExpertDown, "{base}layers.{layer}.mlp.experts.{expert}.down_proj.weight"),
];

/// Names of correction bias and shared expert after DeepSeek-V3.
const SHARED_EXPERTS: &[(Role, &str)] = &[
    (Role::CorrectionBias, "{base}layers.{layer}.mlp.gate.e_score_correction_bias"),
    (Role::SharedGate, "{base}layers.{layer}.mlp.shared_experts.gate_proj.weight"),
    (Role::SharedUp, "{base}layers.{layer}.mlp.shared_experts.up_proj.weight"),
    (Role::SharedDown, "{base}layers.{layer}.mlp.shared_experts.down_proj.weight"),
];

/// Keys that most families after Llama kept: grouped heads with rotary positions, without norms of queries and keys.
fn attention_like_llama(config: &Config<'_>) -> Result<AttentionSpec> {
    let heads = config.count("num_attention_heads")?;
    let head_dim = match config.count_opt("head_dim")? {
        Some(width) => width,
        None => config.count("hidden_size")? / heads.max(1),
    };
    let bias = config.flag("attention_bias", false)?;
    let rotated =
        config.rope_settings().number_opt("partial_rotary_factor")?.or(config.number_opt("partial_rotary_factor")?);
    let dims = (head_dim as f64 * rotated.unwrap_or(1.0)) as usize;
    Ok(AttentionSpec {
        qkv_bias: bias,
        output_bias: bias,
        rope: Some(config.rope(dims)?),
        ..AttentionSpec::plain(heads, config.count_opt("num_key_value_heads")?.unwrap_or(heads), head_dim)
    })
}

/// Qwen's windows: from layer `max_window_layers` on, where switched on.
fn windowed_from(config: &Config<'_>, layer: usize) -> Result<Window> {
    let first = config.count_opt("max_window_layers")?.unwrap_or(0);
    if !config.flag("use_sliding_window", false)? || layer < first {
        return Ok(Window::Full);
    }
    Ok(config.count_opt("sliding_window")?.map_or(Window::Full, Window::Sliding))
}

/// Which layers of a Qwen mixture have experts: every `decoder_sparse_step`-th but those listed.
fn sparse_layers(config: &Config<'_>) -> Result<Vec<bool>> {
    let step = config.count_opt("decoder_sparse_step")?.unwrap_or(1).max(1);
    let dense = config.counts_opt("mlp_only_layers")?.unwrap_or_default();
    Ok((0..config.layers()?).map(|layer| (layer + 1).is_multiple_of(step) && !dense.contains(&layer)).collect())
}

/// The feed-forward of a layer by DeepSeek-V3's keys: the first layers dense, then sigmoid routing with group limits, and a shared expert
/// as wide as `n_shared_experts` routed ones.
fn ffn_like_deepseek(config: &Config<'_>, layer: usize) -> Result<FfnSpec> {
    config.expect_word("scoring_func", "sigmoid")?;
    config.expect_word("topk_method", "noaux_tc")?;
    if config.count_opt("moe_layer_freq")?.unwrap_or(1) != 1 {
        return Err(unsupported("moe_layer_freq other than 1".to_owned()));
    }
    if layer < config.count_opt("first_k_dense_replace")?.unwrap_or(0) {
        return Ok(FfnSpec::Dense(MlpSpec::swiglu(config.count("intermediate_size")?)));
    }
    let intermediate = config.count("moe_intermediate_size")?;
    let shared = config.count_opt("n_shared_experts")?.filter(|n| *n > 0);
    Ok(FfnSpec::Moe(MoeSpec {
        experts: config.count("n_routed_experts")?,
        top_k: config.count("num_experts_per_tok")?,
        expert: MlpSpec::swiglu(intermediate),
        router: RouterSpec::SigmoidGroups {
            groups: config.count_opt("n_group")?.unwrap_or(1),
            top_groups: config.count_opt("topk_group")?.unwrap_or(1),
            normalise: config.flag("norm_topk_prob", true)?,
            scale: config.number_opt("routed_scaling_factor")?.unwrap_or(1.0),
        },
        shared: shared.map(|n| SharedSpec { mlp: MlpSpec::swiglu(n * intermediate), gate: false }),
    }))
}

/// A pre-norm layer.
fn pre_norm(norm: NormSpec, mixer: MixerSpec, ffn: FfnSpec) -> LayerSpec {
    LayerSpec { norm, order: NormOrder::Before, mixer, ffn }
}

/// A decoder by the same keys: embedding and head as wide as the residual stream, a last norm like the layers'.
fn decoder_like_llama(config: &Config<'_>, layers: Vec<LayerSpec>) -> Result<DecoderSpec> {
    let hidden = config.count("hidden_size")?;
    Ok(DecoderSpec {
        hidden,
        vocab: config.count("vocab_size")?,
        max_positions: config.count_opt("max_position_embeddings")?,
        embedding: EmbeddingSpec { width: hidden, positions: None },
        final_norm: layers.first().map(|layer| layer.norm),
        layers,
        head: HeadSpec { tied: config.flag("tie_word_embeddings", false)?, bias: false },
    })
}

/// Architectures the worker knows.
pub fn known() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.architecture)
}

/// What a `config.json` describes.
pub struct Architecture {
    /// Its family.
    pub family: &'static Family,
    /// What to compute.
    pub spec: DecoderSpec,
    /// How its matrices are stored.
    pub quantisation: Option<Quantisation>,
}

/// Reads a `config.json`.
///
/// # Errors
/// [`FailureKind::Unsupported`] for an unknown architecture (the known ones are listed) or an unknown switch of a known one;
/// [`FailureKind::Checkpoint`] for a missing or ill-typed key.
pub fn read(config: &Value) -> Result<Architecture> {
    let config = Config(config);
    let name = config.architecture()?;
    let family = FAMILIES.iter().find(|family| family.architecture == name).ok_or_else(|| {
        WorkerError::new(FailureKind::Unsupported, format!("architecture {name:?} is not supported"))
            .hint(format!("supported: {}", known().collect::<Vec<_>>().join(", ")))
    })?;
    let quantisation = config.quantisation()?;
    let spec = (family.spec)(&config)?;
    check(&spec)?;
    Ok(Architecture { family, spec, quantisation })
}

/// More than any model has; a damaged or hostile configuration must not make us allocate by its word.
const MOST_LAYERS: usize = 4096;
/// Of all layers together: Kimi-K2 has 23 thousand.
const MOST_EXPERTS: usize = 1 << 20;
const MOST: u64 = 1 << 31;

/// Numbers that would divide by zero or index out of range later.
fn check(spec: &DecoderSpec) -> Result<()> {
    let bad = |what: String| Err(WorkerError::new(FailureKind::Checkpoint, format!("config.json: {what}")));
    if spec.hidden == 0 || spec.vocab == 0 || spec.layers.is_empty() {
        return bad(format!("{} layers of width {} over {} tokens", spec.layers.len(), spec.hidden, spec.vocab));
    }
    let experts = |layer: &LayerSpec| if let FfnSpec::Moe(moe) = &layer.ffn { moe.experts } else { 0 };
    let experts: usize = spec.layers.iter().map(experts).sum();
    if experts > MOST_EXPERTS {
        return bad(format!("{experts} experts in {} layers, more than {MOST_EXPERTS}", spec.layers.len()));
    }
    let problem = |layer: &LayerSpec| unsound_mixer(&layer.mixer).or_else(|| unsound_ffn(&layer.ffn));
    match spec.layers.iter().enumerate().find_map(|(i, layer)| Some((i, problem(layer)?))) {
        Some((i, problem)) => bad(format!("layer {i}: {problem}")),
        None => Ok(()),
    }
}

/// What cannot be about a mixer.
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
            let sound = l.heads > 0 && l.value_dim > 0 && l.kv_rank > 0 && rotates(Some(&l.rope), l.rope_dim);
            let words = || {
                format!(
                    "{} heads of width {}+{}, values of {}, rank {}",
                    l.heads, l.nope_dim, l.rope_dim, l.value_dim, l.kv_rank
                )
            };
            (!sound).then(words)
        }
        MixerSpec::DeltaNet(d) => {
            let sound = evenly(d.value_heads, d.key_heads) && d.key_dim > 0 && d.value_dim > 0 && d.kernel > 0;
            (!sound).then(|| format!("{} value heads over {} key heads", d.value_heads, d.key_heads))
        }
    }
}

/// What cannot be about a feed-forward.
fn unsound_ffn(ffn: &FfnSpec) -> Option<String> {
    let FfnSpec::Moe(moe) = ffn else { return None };
    if let RouterSpec::SigmoidGroups { groups, top_groups, .. } = moe.router {
        let even = groups > 0 && moe.experts.is_multiple_of(groups) && (1..=groups).contains(&top_groups);
        if !even || moe.top_k > moe.experts / groups * top_groups {
            return Some(format!("top {} of {} experts in {top_groups} of {groups} groups", moe.top_k, moe.experts));
        }
    }
    let sound = (1..=moe.experts).contains(&moe.top_k);
    (!sound).then(|| format!("top {} of {} experts", moe.top_k, moe.experts))
}

/// A `config.json`, read with errors that name the key.
pub struct Config<'a>(&'a Value);

impl<'a> Config<'a> {
    /// `architectures[0]`.
    pub fn architecture(&self) -> Result<&'a str> {
        self.0["architectures"][0]
            .as_str()
            .ok_or_else(|| missing("architectures[0]", "a string", &self.0["architectures"]))
    }

    /// `model_type`, empty if absent.
    pub fn model_type(&self) -> &'a str {
        self.0["model_type"].as_str().unwrap_or_default()
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// The number of layers.
    pub fn layers(&self) -> Result<usize> {
        self.layers_under("num_hidden_layers")
    }

    /// The same under a family's own key.
    pub fn layers_under(&self, key: &str) -> Result<usize> {
        let layers = self.count(key)?;
        if layers <= MOST_LAYERS {
            Ok(layers)
        } else {
            Err(missing(key, "a plausible number of layers", &layers.into()))
        }
    }

    /// A list read from `key`, which must have one entry per layer.
    pub fn one_per_layer<T>(&self, key: &str, list: Vec<T>) -> Result<Vec<T>> {
        let layers = self.layers()?;
        let found = Value::from(format!("{} entries", list.len()));
        if list.len() == layers { Ok(list) } else { Err(missing(key, &format!("a list of {layers} entries"), &found)) }
    }

    /// A required non-negative whole number.
    pub fn count(&self, key: &str) -> Result<usize> {
        self.count_opt(key)?.ok_or_else(|| missing(key, "a whole number", &Value::Null))
    }

    /// An optional non-negative whole number; null is absent.
    pub fn count_opt(&self, key: &str) -> Result<Option<usize>> {
        self.get(key)
            .map(|v| {
                v.as_u64().filter(|n| *n < MOST).map(|n| n as usize).ok_or_else(|| missing(key, "a whole number", v))
            })
            .transpose()
    }

    /// An optional number; null is absent.
    pub fn number_opt(&self, key: &str) -> Result<Option<f64>> {
        self.get(key).map(|v| v.as_f64().ok_or_else(|| missing(key, "a number", v))).transpose()
    }

    /// A switch; absent or null means `default`.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key).map_or(Ok(default), |v| v.as_bool().ok_or_else(|| missing(key, "true or false", v)))
    }

    /// The settings below `key`, where a configuration nests them (`text_config`).
    ///
    /// # Errors
    /// There is no object of that name.
    pub fn nested(&self, key: &str) -> Result<Config<'a>> {
        let inner = self.get(key).filter(|value| value.is_object());
        inner.map(Config).ok_or_else(|| missing(key, "an object", &self.0[key]))
    }

    /// A list of whole numbers; absent, null or empty is `None`.
    pub fn counts_opt(&self, key: &str) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || missing(key, "a list of whole numbers", value);
        let list = value.as_array().ok_or_else(wrong)?;
        let numbers: Option<Vec<usize>> =
            list.iter().map(|v| v.as_u64().filter(|n| *n < MOST).map(|n| n as usize)).collect();
        Ok(Some(numbers.ok_or_else(wrong)?).filter(|numbers| !numbers.is_empty()))
    }

    /// A list with one word per layer; absent or null is `None`.
    pub fn words_opt(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let words: Option<Vec<&str>> = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        self.one_per_layer(key, words.ok_or_else(|| missing(key, "a list of words", value))?).map(Some)
    }

    /// Refuses a switch of another value than the one the family's blocks compute.
    pub fn expect_flag(&self, key: &str, wanted: bool) -> Result<()> {
        if self.flag(key, wanted)? == wanted { Ok(()) } else { Err(unsupported(format!("{key} {}", !wanted))) }
    }

    /// Refuses a word of another value than the one the family's blocks compute; absent is that one.
    pub fn expect_word(&self, key: &str, wanted: &str) -> Result<()> {
        match self.get(key) {
            Some(found) if found.as_str() != Some(wanted) => {
                Err(unsupported(format!("{key} {found} (only {wanted:?} is known for this family)")))
            }
            _ => Ok(()),
        }
    }

    /// How matrices are stored, by `quantization_config`.
    fn quantisation(&self) -> Result<Option<Quantisation>> {
        let Some(settings) = self.get("quantization_config").map(Config) else { return Ok(None) };
        let method = settings.0["quant_method"].as_str().unwrap_or("?");
        match method {
            "mxfp4" => Ok(Some(Quantisation::Mxfp4)),
            "fp8" => {
                settings.expect_word("fmt", "e4m3")?;
                match settings.counts_opt("weight_block_size")?.as_deref() {
                    Some([rows, columns]) if rows * columns > 0 => {
                        Ok(Some(Quantisation::Fp8Blocks { block: [*rows, *columns] }))
                    }
                    _ => Err(unsupported("fp8 quantisation without a weight_block_size of two numbers".to_owned())),
                }
            }
            _ => Err(unsupported(format!("quantization_config with quant_method {method:?} (known: fp8, mxfp4)"))),
        }
    }

    /// Rotary embedding of the first `dims` of each head, halves paired, from `rope_theta` and `rope_scaling` or transformers 5's
    /// `rope_parameters`.
    pub fn rope(&self, dims: usize) -> Result<RopeSpec> {
        let scaling = self.rope_settings();
        let theta = scaling.number_opt("rope_theta")?.or(self.number_opt("rope_theta")?).unwrap_or(10_000.0);
        let kind = scaling.0["rope_type"].as_str().or_else(|| scaling.0["type"].as_str()).unwrap_or("default");
        let number = |key: &str| {
            scaling.number_opt(key)?.ok_or_else(|| missing(&format!("rope_scaling.{key}"), "a number", &Value::Null))
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: number("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_positions: number("original_max_position_embeddings")?,
            },
            "yarn" => {
                let factor = number("factor")?;
                // Of the paper's section 3.4; DeepSeek's two keys divide it out again, for its softmax has it.
                let attention_factor = match (scaling.number_opt("mscale")?, scaling.number_opt("mscale_all_dim")?) {
                    (Some(own), Some(all)) => yarn_magnitude(factor, own) / yarn_magnitude(factor, all),
                    _ => yarn_magnitude(factor, 1.0),
                };
                RopeScaling::Yarn {
                    factor,
                    original_positions: number("original_max_position_embeddings")?,
                    beta_fast: scaling.number_opt("beta_fast")?.unwrap_or(32.0),
                    beta_slow: scaling.number_opt("beta_slow")?.unwrap_or(1.0),
                    truncate: scaling.flag("truncate", true)?,
                    attention_factor: scaling.number_opt("attention_factor")?.unwrap_or(attention_factor),
                }
            }
            other => return Err(unsupported(format!("rope type {other:?} (known: default, linear, llama3, yarn)"))),
        };
        Ok(RopeSpec { theta, dims, pairing: Pairing::Halves, scaling })
    }

    /// The object that stretches the rotation, empty where there is none.
    pub fn rope_settings(&self) -> Config<'a> {
        let settings = self.get("rope_parameters").or_else(|| self.get("rope_scaling"));
        settings.map_or(Config(&Value::Null), Config)
    }
}

/// By how much YaRN grows queries and keys together: `0.1 * mscale * ln(factor) + 1`.
pub fn yarn_magnitude(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

fn missing(key: &str, wanted: &str, found: &Value) -> WorkerError {
    let found = if found.is_null() { "nothing".to_owned() } else { found.to_string().chars().take(60).collect() };
    WorkerError::new(FailureKind::Checkpoint, format!("config.json: {key:?} should be {wanted}, found {found}"))
}

fn unsupported(what: String) -> WorkerError {
    WorkerError::new(FailureKind::Unsupported, format!("config.json asks for {what}, which is not supported"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::decoder::Need;

    /// Keys of all families, with switches that ask for as many tensors as a family knows.
    fn config(architecture: &str) -> Value {
        let mut config = json!({
            "architectures": [architecture], "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
            "num_hidden_layers": 4, "intermediate_size": 12, "vocab_size": 16, "num_experts": 3, "num_experts_per_tok": 2,
            "mlp_bias": true, "attention_bias": architecture != "DeepseekV3ForCausalLM", "use_qk_norm": true,
            // Mixtures.
            "num_local_experts": 3, "n_routed_experts": 3, "moe_intermediate_size": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "shared_expert_intermediate_size": 4, "intermediate_size_mlp": 12, "interleave_moe_layer_step": 2, "mlp_only_layers": [0],
            "sliding_window": 4,
            // Latent attention and DeltaNet.
            "q_lora_rank": 4, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4,
            "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
            "linear_conv_kernel_dim": 4,
            // GPT-2, GPT-J, OPT.
            "n_embd": 8, "n_head": 2, "n_layer": 4, "n_positions": 16, "rotary_dim": 2,
            "max_position_embeddings": 16, "ffn_dim": 12, "word_embed_proj_dim": 4,
        });
        config["text_config"] = config.clone();
        config
    }

    #[test]
    fn nothing_is_listed_by_the_word_of_a_hostile_configuration() {
        let mut config = config("OlmoeForCausalLM");
        for (layers, experts, fine) in [(64, 512, true), (4096, 256, true), (4096, 257, false), (5000, 2, false)] {
            (config["num_hidden_layers"], config["num_experts"]) = (json!(layers), json!(experts));
            assert_eq!(read(&config).is_ok(), fine, "{layers} layers of {experts} experts");
        }
    }

    #[test]
    fn every_family_names_every_tensor_it_needs_and_each_once() {
        for name in known() {
            let Architecture { family, spec, .. } = read(&config(name)).unwrap();
            let needs = spec.needs();
            let of =
                |(layer, need): &(usize, Need)| family.names.of(family.names.bases[0], *layer, need.role, need.expert);
            let mut names: Vec<String> = needs.iter().map(of).collect();
            assert!(names.iter().all(|name| !name.contains('{')), "{name}: {names:?}");
            names.sort();
            names.dedup();
            // Experts of a stacked tensor share its name.
            let stacked =
                |(_, need): &&(usize, Need)| need.expert.is_some_and(|e| e > 0) && family.names.is_stacked(need.role);
            assert_eq!(names.len(), needs.len() - needs.iter().filter(stacked).count(), "{name}");
            // A tied model still may store the head; its name is asked for.
            assert!(!family.names.of("", 0, Role::Head, None).is_empty());
        }
    }

    #[test]
    fn keys_that_are_missing_or_of_another_type_are_named() {
        for key in ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size"] {
            for bad in [Value::Null, json!("many"), json!(-3), json!(1.5)] {
                let mut config = config("LlamaForCausalLM");
                config[key] = bad;
                let error = read(&config).map(|_| ()).unwrap_err();
                assert_eq!(error.kind(), FailureKind::Checkpoint, "{error}");
                assert!(error.message().contains(key), "{error}");
            }
        }
    }

    #[test]
    fn numbers_that_cannot_be_are_refused() {
        for (key, bad) in
            [("num_attention_heads", 0), ("num_key_value_heads", 0), ("num_experts_per_tok", 4), ("hidden_size", 0)]
        {
            let mut config = config("OlmoeForCausalLM");
            config[key] = bad.into();
            assert!(read(&config).is_err(), "{key} = {bad}");
        }
    }

    #[test]
    fn rope_is_read_in_the_old_spelling_and_the_new() {
        let old = json!({"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}});
        let new = json!({"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}});
        let scaling = RopeScaling::Linear { factor: 2.0 };
        let want = RopeSpec { theta: 500.0, dims: 4, pairing: Pairing::Halves, scaling };
        assert_eq!(Config(&old).rope(4).unwrap(), want);
        assert_eq!(Config(&new).rope(4).unwrap(), want);
        assert!(Config(&json!({"rope_scaling": {"type": "linear"}})).rope(4).is_err(), "no factor");
    }
}
