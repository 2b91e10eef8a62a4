//! Gemma 3 (Google 2025), text only: norms before and after each sublayer, five windowed layers
//! per global one, a separate rotation for each kind, gated GELU. Hugging Face
//! `Gemma3ForCausalLM`.

use super::*;

pub(super) const FAMILY: Family =
    Family { unused: UNUSED, ..Family::new("Gemma3ForCausalLM", &["gemma3_text"], "Gemma3TextConfig", spec, &NAMES) };

const NAMES: Names = Names::new(&[SANDWICH, LIKE_LLAMA], &["model.", ""]);

/// Names of the norms around the sublayers.
pub(super) const SANDWICH: &[(Role, &str)] = &[
    (Role::MixerPostNorm, "{base}layers.{layer}.post_attention_layernorm.weight"),
    (Role::FfnNorm, "{base}layers.{layer}.pre_feedforward_layernorm.weight"),
    (Role::FfnPostNorm, "{base}layers.{layer}.post_feedforward_layernorm.weight"),
];

pub(super) const UNUSED: &[Unused] = &[("it says how Python runs the model", &["cache_implementation"])];

/// Rotations of global layers and of windowed layers.
pub(super) const FULL: RopeKind = RopeKind {
    kind: "full_attention",
    key: "rope_parameters.full_attention",
    theta: Some("rope_theta"),
    is_scaled: true,
};
pub(super) const SLIDING: RopeKind = RopeKind {
    kind: "sliding_attention",
    key: "rope_parameters.sliding_attention",
    theta: Some("rope_local_base_freq"),
    is_scaled: false,
};

pub(super) fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect("hidden_activation", &["gelu_pytorch_tanh".into()])?;
    config.expect_flag("use_bidirectional_attention", false)?;
    if let Some(cap) = config.number_opt("attn_logit_softcapping")? {
        return Err(unsupported(format!("attn_logit_softcapping {cap}")));
    }
    let norm = NormSpec { kind: NormKind::RmsZeroCentred, eps: config.number("rms_norm_eps")? };
    let attention = AttentionSpec {
        qk_norm: QkNorm::PerHead(norm),
        scale: Some((config.count("query_pre_attn_scalar")? as f64).powf(-0.5)),
        ..attention_without_positions(config)?
    };
    let ropes = [config.rope_of_kind(&FULL, attention.head_dim)?, config.rope_of_kind(&SLIDING, attention.head_dim)?];
    let mlp = MlpSpec {
        intermediate: config.count("intermediate_size")?,
        kind: MlpKind::Geglu(GateUp::Separate),
        bias: false,
    };
    let layer = |window| {
        let rope = Some(ropes[usize::from(window != Window::Full)].clone());
        let mixer = MixerSpec::Attention(AttentionSpec { window, rope, ..attention.clone() });
        LayerSpec { norm, order: NormOrder::Sandwich, mixer, ffn: FfnSpec::Dense(mlp), scalar: false }
    };
    const PATTERN: &str = "sliding_window_pattern";
    let every = if config.has(PATTERN) { config.divisor(PATTERN)? } else { 6 };
    decoder(config, windows_but_every(config, every)?.into_iter().map(layer).collect())
}

/// A decoder of these layers. The embedding is scaled by the root of its width, and logits may
/// have a softcap.
pub(super) fn decoder(config: &Config<'_>, layers: Vec<LayerSpec>) -> Result<DecoderSpec> {
    let decoder = decoder_like_llama(config, layers)?;
    let scale = Some(EmbeddingScale { factor: (decoder.hidden as f64).sqrt(), rounded: true });
    Ok(DecoderSpec {
        embedding: EmbeddingSpec { scale, ..decoder.embedding },
        head: HeadSpec { softcap: config.number_opt("final_logit_softcapping")?, ..decoder.head },
        ..decoder
    })
}
