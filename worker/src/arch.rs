//! The registry of architectures: Hugging Face's name for each, and how to read its `config.json`.
//!
//! A family is one file of data below `arch/`: configuration keys to [`DecoderSpec`], and published tensor names. It computes nothing.

use outliers_protocol::FailureKind;
use serde_json::Value;

use crate::decoder::{AttentionSpec, DecoderSpec, LayerSpec, Need, QkNorm, Role};
use crate::error::{Result, WorkerError};
use crate::rope::{RopeScaling, RopeSpec};

mod llama;
mod olmoe;

/// A family of models.
pub struct Family {
    /// `architectures[0]` of config.json.
    pub architecture: &'static str,
    /// Reads the configuration.
    pub spec: fn(&Config<'_>) -> Result<DecoderSpec>,
    /// Published tensor names.
    pub names: &'static Names,
}

/// Every family, one line each.
const FAMILIES: &[Family] = &[llama::FAMILY, olmoe::FAMILY];

/// Published names of a family's tensors; `{layer}` and `{expert}` stand for numbers.
pub struct Names {
    /// Template per role, in tables of which several families share the first.
    pub tensors: &'static [&'static [(Role, &'static str)]],
    /// Endings of tensors on disk that a text-only pass does not use.
    pub ignored_suffixes: &'static [&'static str],
}

impl Names {
    /// The published name of a needed tensor.
    pub fn of(&self, layer: usize, need: &Need) -> String {
        let (_, template) = self
            .tensors
            .iter()
            .copied()
            .flatten()
            .find(|(role, _)| *role == need.role)
            .expect("a family names every tensor its spec needs: tested for each");
        let name = template.replace("{layer}", &layer.to_string());
        need.expert.map_or(name.clone(), |e| name.replace("{expert}", &e.to_string()))
    }

    /// Whether a tensor on disk is known and deliberately left unread.
    pub fn ignores(&self, name: &str) -> bool {
        self.ignored_suffixes.iter().any(|suffix| name.ends_with(suffix))
    }
}

/// The names that Hugging Face gave Llama's parts, and most families after it kept.
const LIKE_LLAMA: &[(Role, &str)] = &[
    (Role::Embedding, "model.embed_tokens.weight"),
    (Role::FinalNorm, "model.norm.weight"),
    (Role::Head, "lm_head.weight"),
    (Role::MixerNorm, "model.layers.{layer}.input_layernorm.weight"),
    (Role::Query, "model.layers.{layer}.self_attn.q_proj.weight"),
    (Role::Key, "model.layers.{layer}.self_attn.k_proj.weight"),
    (Role::Value, "model.layers.{layer}.self_attn.v_proj.weight"),
    (Role::Output, "model.layers.{layer}.self_attn.o_proj.weight"),
    (Role::QueryBias, "model.layers.{layer}.self_attn.q_proj.bias"),
    (Role::KeyBias, "model.layers.{layer}.self_attn.k_proj.bias"),
    (Role::ValueBias, "model.layers.{layer}.self_attn.v_proj.bias"),
    (Role::OutputBias, "model.layers.{layer}.self_attn.o_proj.bias"),
    (Role::FfnNorm, "model.layers.{layer}.post_attention_layernorm.weight"),
    (Role::Gate, "model.layers.{layer}.mlp.gate_proj.weight"),
    (Role::Up, "model.layers.{layer}.mlp.up_proj.weight"),
    (Role::Down, "model.layers.{layer}.mlp.down_proj.weight"),
    (Role::GateBias, "model.layers.{layer}.mlp.gate_proj.bias"),
    (Role::UpBias, "model.layers.{layer}.mlp.up_proj.bias"),
    (Role::DownBias, "model.layers.{layer}.mlp.down_proj.bias"),
];

/// Keys that most families after Llama kept: grouped heads with rotary positions, without norms of queries and keys.
fn attention_like_llama(config: &Config<'_>) -> Result<AttentionSpec> {
    let heads = config.count("num_attention_heads")?;
    let head_dim = match config.count_opt("head_dim")? {
        Some(width) => width,
        None => config.count("hidden_size")? / heads.max(1),
    };
    let bias = config.flag("attention_bias", false)?;
    Ok(AttentionSpec {
        heads,
        kv_heads: config.count_opt("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        qk_norm: QkNorm::None,
        qkv_bias: bias,
        output_bias: bias,
        clip_qkv: None,
        rope: config.rope(head_dim)?,
    })
}

/// A decoder of equal layers, by the same keys.
fn decoder_like_llama(config: &Config<'_>, layer: LayerSpec) -> Result<DecoderSpec> {
    Ok(DecoderSpec {
        hidden: config.count("hidden_size")?,
        vocab: config.count("vocab_size")?,
        max_positions: config.count_opt("max_position_embeddings")?,
        tied_head: config.flag("tie_word_embeddings", false)?,
        final_norm: layer.mixer_norm,
        layers: vec![layer; config.layers()?],
    })
}

/// Architectures the worker knows.
pub fn known() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.architecture)
}

/// The family and decoder of a `config.json`.
///
/// # Errors
/// [`FailureKind::Unsupported`] for an unknown architecture (the known ones are listed) or an unknown switch of a known one;
/// [`FailureKind::Checkpoint`] for a missing or ill-typed key.
pub fn read(config: &Value) -> Result<(&'static Family, DecoderSpec)> {
    let config = Config(config);
    let name = config.architecture()?;
    let family = FAMILIES.iter().find(|family| family.architecture == name).ok_or_else(|| {
        WorkerError::new(FailureKind::Unsupported, format!("architecture {name:?} is not supported"))
            .hint(format!("supported: {}", known().collect::<Vec<_>>().join(", ")))
    })?;
    config.refuse_quantisation()?;
    let spec = (family.spec)(&config)?;
    check(&spec)?;
    Ok((family, spec))
}

/// More than any model has; a damaged or hostile configuration must not make us allocate by its word.
const MOST_LAYERS: usize = 4096;
const MOST_EXPERTS: usize = 1 << 16;
const MOST: u64 = 1 << 31;

/// Numbers that would divide by zero or index out of range later.
fn check(spec: &DecoderSpec) -> Result<()> {
    let bad = |what: String| Err(WorkerError::new(FailureKind::Checkpoint, format!("config.json: {what}")));
    if spec.hidden == 0 || spec.vocab == 0 || spec.layers.is_empty() {
        return bad(format!("{} layers of width {} over {} tokens", spec.layers.len(), spec.hidden, spec.vocab));
    }
    for (i, layer) in spec.layers.iter().enumerate() {
        let a = &layer.attention;
        if a.kv_heads == 0 || a.heads == 0 || a.heads % a.kv_heads != 0 || a.head_dim == 0 || a.head_dim % 2 != 0 {
            return bad(format!(
                "layer {i}: {} heads over {} key/value heads of width {}",
                a.heads, a.kv_heads, a.head_dim
            ));
        }
        if let crate::decoder::FfnSpec::Moe(moe) = &layer.ffn
            && (moe.top_k == 0 || moe.top_k > moe.experts || moe.experts > MOST_EXPERTS)
        {
            return bad(format!("layer {i}: top {} of {} experts", moe.top_k, moe.experts));
        }
    }
    Ok(())
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
        let layers = self.count("num_hidden_layers")?;
        let value = Value::from(layers);
        if layers > MOST_LAYERS {
            Err(missing("num_hidden_layers", "a plausible number of layers", &value))
        } else {
            Ok(layers)
        }
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

    /// Refuses any activation but the one the family's blocks compute.
    pub fn expect_activation(&self, wanted: &str) -> Result<()> {
        match self.get("hidden_act").map(|v| v.as_str().unwrap_or("?")) {
            Some(found) if found != wanted => {
                Err(unsupported(format!("hidden_act {found:?} (only {wanted:?} is known for this family)")))
            }
            _ => Ok(()),
        }
    }

    fn refuse_quantisation(&self) -> Result<()> {
        match self.get("quantization_config") {
            None => Ok(()),
            Some(q) => Err(unsupported(format!("quantization_config with quant_method {}", q["quant_method"]))),
        }
    }

    /// Rotary embedding over `dims` of each head, from `rope_theta` and `rope_scaling` or transformers 5's `rope_parameters`.
    pub fn rope(&self, dims: usize) -> Result<RopeSpec> {
        let parameters = self.get("rope_parameters").or_else(|| self.get("rope_scaling"));
        let scaling = parameters.map_or(Config(&Value::Null), Config);
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
            other => return Err(unsupported(format!("rope type {other:?} (known: default, linear, llama3)"))),
        };
        Ok(RopeSpec { theta, dims, scaling })
    }
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

    /// Switches that ask for as many tensors as a family knows.
    fn config(architecture: &str) -> Value {
        json!({
            "architectures": [architecture], "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
            "num_hidden_layers": 2, "intermediate_size": 12, "vocab_size": 16, "num_experts": 3, "num_experts_per_tok": 2,
            "attention_bias": true, "mlp_bias": true,
        })
    }

    #[test]
    fn every_family_names_every_tensor_it_needs_and_each_once() {
        for name in known() {
            let (family, spec) = read(&config(name)).unwrap();
            let needs = spec.needs();
            let mut names: Vec<String> = needs.iter().map(|(layer, need)| family.names.of(*layer, need)).collect();
            assert!(names.iter().all(|name| !name.contains('{')), "{name}: {names:?}");
            names.sort();
            names.dedup();
            assert_eq!(names.len(), needs.len(), "{name}");
            // A tied model still may store the head; its name is asked for.
            assert!(!family.names.of(0, &Need { role: Role::Head, expert: None, shape: Vec::new() }).is_empty());
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
        let want = RopeSpec { theta: 500.0, dims: 4, scaling: RopeScaling::Linear { factor: 2.0 } };
        assert_eq!(Config(&old).rope(4).unwrap(), want);
        assert_eq!(Config(&new).rope(4).unwrap(), want);
        assert!(Config(&json!({"rope_scaling": {"type": "linear"}})).rope(4).is_err(), "no factor");
    }
}
