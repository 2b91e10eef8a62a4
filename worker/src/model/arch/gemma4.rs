//! Gemma 4 (Google 2026), the text part: Gemma 3 with wider heads and keys as values in global
//! layers, and a dense MLP beside the experts of mixtures. Hugging Face
//! `Gemma4ForConditionalGeneration`.

use super::*;

pub(super) const FAMILY: Family = Family {
    wrapper: Some("Gemma4Config"),
    unused: UNUSED,
    ..Family::new("Gemma4ForConditionalGeneration", &["gemma4"], "Gemma4TextConfig", spec, &NAMES)
};

const NAMES: Names = Names {
    tensors: &[
        gemma3_text::SANDWICH,
        &[
            (Role::LayerScalar, "{base}layers.{layer}.layer_scalar"),
            (Role::Router, "{base}layers.{layer}.router.proj.weight"),
            (Role::RouterScale, "{base}layers.{layer}.router.scale"),
            (Role::ExpertScale, "{base}layers.{layer}.router.per_expert_scale"),
            (Role::ExpertGateUp, "{base}layers.{layer}.experts.gate_up_proj"),
            (Role::ExpertDown, "{base}layers.{layer}.experts.down_proj"),
            (Role::BesidePostNorm, "{base}layers.{layer}.post_feedforward_layernorm_1.weight"),
            (Role::ExpertsNorm, "{base}layers.{layer}.pre_feedforward_layernorm_2.weight"),
            (Role::ExpertsPostNorm, "{base}layers.{layer}.post_feedforward_layernorm_2.weight"),
        ],
        LIKE_LLAMA,
    ],
    bases: &["model.language_model."],
    input_major: &[],
    ignored: &[
        Ignored { names: Pattern::Prefix("model.vision_tower."), why: "vision tower" },
        Ignored { names: Pattern::Prefix("model.embed_vision."), why: "vision tower" },
        Ignored { names: Pattern::Prefix("model.audio_tower."), why: "audio tower" },
        Ignored { names: Pattern::Prefix("model.embed_audio."), why: "audio tower" },
    ],
};

const UNUSED: &[Unused] = &[
    ("the text part alone is computed", &["audio_config", "vision_config", "vision_soft_tokens_per_image"]),
    (
        "the text part alone is computed",
        &["audio_token_id", "boa_token_id", "boi_token_id", "eoa_token_id", "eoa_token_index", "eoi_token_id"],
    ),
    ("the text part alone is computed", &["image_token_id", "video_token_id"]),
    ("only layers that share keys and values with others use it", &["use_double_wide_mlp"]),
    ("only layers with inputs of their own use it", &["vocab_size_per_layer_input"]),
];

/// Head width of global layers. Not an attribute of the class.
const GLOBAL_HEAD_DIM: usize = 512;

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect("hidden_activation", &["gelu_pytorch_tanh".into()])?;
    config.expect("use_bidirectional_attention", &["vision".into()])?;
    config.expect("hidden_size_per_layer_input", &[0.into()])?;
    config.expect("num_kv_shared_layers", &[0.into()])?;
    // This class has no older form of the rotations' settings.
    config.expect("rope_scaling", &[Value::Null])?;
    let eps = config.number("rms_norm_eps")?;
    let norm = NormSpec::rms(eps);
    let attention = AttentionSpec {
        qk_norm: QkNorm::PerHead(norm),
        scale: Some(1.0),
        value_norm: Some(eps),
        ..attention_without_positions(config)?
    };
    let mut windows = windows_but_every(config, 6)?;
    // The last layer is global whatever the configuration says.
    if let Some(last) = windows.last_mut() {
        *last = Window::Full;
    }
    let attentions = [full(config, &attention, &windows)?, sliding(config, &attention)?];
    let mlp = geglu(config.count("intermediate_size")?, GateUp::Separate);
    let ffn = if config.flag("enable_moe_block")? {
        FfnSpec::Moe(MoeSpec {
            experts: config.count("num_experts")?,
            top_k: config.count("top_k_experts")?,
            expert: geglu(config.count("moe_intermediate_size")?, GateUp::Halves),
            router: RouterSpec::NormedSoftmax { eps },
            shared: None,
            beside: Some(mlp),
            latent: None,
        })
    } else {
        for key in ["num_experts", "top_k_experts", "moe_intermediate_size"] {
            config.raw(key);
        }
        FfnSpec::Dense(mlp)
    };
    let layer = |window| {
        let attention = attentions[usize::from(window != Window::Full)].clone();
        let mixer = MixerSpec::Attention(AttentionSpec { window, ..attention });
        LayerSpec { norm, order: NormOrder::Sandwich, mixer, ffn: ffn.clone(), scalar: true }
    };
    gemma3_text::decoder(config, windows.into_iter().map(layer).collect())
}

fn geglu(intermediate: usize, stored: GateUp) -> MlpSpec {
    MlpSpec { intermediate, kind: MlpKind::Geglu(stored), bias: false }
}

/// Windowed attention.
fn sliding(config: &Config<'_>, attention: &AttentionSpec) -> Result<AttentionSpec> {
    let rope = config.rope_of_kind(&RopeKind { theta: None, ..gemma3_text::SLIDING }, attention.head_dim)?;
    Ok(AttentionSpec { rope: Some(rope), ..attention.clone() })
}

/// Global attention: heads of another width, and keys as values.
fn full(config: &Config<'_>, attention: &AttentionSpec, windows: &[Window]) -> Result<AttentionSpec> {
    let key_is_value = config.flag("attention_k_eq_v")?;
    let (head_dim, kv_heads) = global_heads(config, attention.kv_heads, key_is_value, windows)?;
    let kind = RopeKind { theta: None, is_scaled: false, ..gemma3_text::FULL };
    let rope = Some(config.rope_of_kind(&kind, head_dim)?);
    Ok(AttentionSpec { head_dim, kv_heads, key_is_value, rope, ..attention.clone() })
}

/// Width and number of the key/value heads of global layers: by the settings of single layers that
/// transformers 5 saves, else by the published keys.
fn global_heads(config: &Config<'_>, usual: usize, key_is_value: bool, windows: &[Window]) -> Result<(usize, usize)> {
    const HEAD_DIM: &str = "global_head_dim";
    const KV_HEADS: &str = "num_global_key_value_heads";
    let told = config.raw(KV_HEADS).is_some_and(|heads| !heads.is_null());
    if !config.has(PER_LAYER) {
        let head_dim = config.count_or(HEAD_DIM, GLOBAL_HEAD_DIM)?;
        if key_is_value && told {
            return Ok((head_dim, config.count(KV_HEADS)?));
        }
        if key_is_value {
            config.assume(KV_HEADS, &usual.into());
        }
        return Ok((head_dim, usual));
    }
    // The class reads no published key then.
    config.raw(HEAD_DIM);
    let layers = config.object(PER_LAYER)?;
    let is_global = |layer: &String| layer.parse().is_ok_and(|layer: usize| windows.get(layer) == Some(&Window::Full));
    let heads = layers.values().next().filter(|first| {
        let of_all = layers.len() == windows.iter().filter(|window| **window == Window::Full).count();
        of_all && layers.iter().all(|(layer, heads)| is_global(layer) && heads == *first)
    });
    let heads = heads.and_then(Value::as_object).and_then(|heads| {
        let count = |value: &Value| value.as_u64().filter(|count| *count < 1 << 31).map(|count| count as usize);
        let kv_heads = heads.get("num_key_value_heads");
        let all = heads.len() == 1 + usize::from(kv_heads.is_some());
        let heads = (count(heads.get("head_dim")?)?, kv_heads.map_or(Some(usual), count)?);
        all.then_some(heads)
    });
    heads.ok_or_else(|| {
        let of = "that is not one head_dim and one num_key_value_heads for all global layers";
        unsupported(format!("{PER_LAYER} {of}"))
    })
}
