//! Llama 4 Scout and Maverick (Meta 2025), the text part: chunked attention with interleaved
//! rotation, every fourth layer without either, experts with inputs scaled by the router, a shared
//! expert. Hugging Face `Llama4ForConditionalGeneration`.

use super::*;

pub(super) const FAMILY: Family = Family {
    wrapper: Some("Llama4Config"),
    unused: UNUSED,
    ..Family::new("Llama4ForConditionalGeneration", &["llama4"], "Llama4TextConfig", spec, &NAMES)
};

const NAMES: Names = Names {
    tensors: &[
        &[
            (Role::Head, "language_model.lm_head.weight"),
            (Role::GateProj, "{base}layers.{layer}.feed_forward.gate_proj.weight"),
            (Role::UpProj, "{base}layers.{layer}.feed_forward.up_proj.weight"),
            (Role::DownProj, "{base}layers.{layer}.feed_forward.down_proj.weight"),
            (Role::Router, "{base}layers.{layer}.feed_forward.router.weight"),
            (Role::ExpertGateUp, "{base}layers.{layer}.feed_forward.experts.gate_up_proj"),
            (Role::ExpertDown, "{base}layers.{layer}.feed_forward.experts.down_proj"),
            (Role::SharedGate, "{base}layers.{layer}.feed_forward.shared_expert.gate_proj.weight"),
            (Role::SharedUp, "{base}layers.{layer}.feed_forward.shared_expert.up_proj.weight"),
            (Role::SharedDown, "{base}layers.{layer}.feed_forward.shared_expert.down_proj.weight"),
        ],
        LIKE_LLAMA,
    ],
    bases: &["language_model.model."],
    input_major: &[Role::ExpertGateUp, Role::ExpertDown],
    ignored: &[
        Ignored { names: Pattern::Prefix("vision_model."), why: "vision tower" },
        Ignored { names: Pattern::Prefix("multi_modal_projector."), why: "vision tower" },
    ],
};

const UNUSED: &[Unused] = &[
    ("the text part alone is computed", &["boi_token_index", "eoi_token_index", "image_token_index", "vision_config"]),
    ("the text part alone is computed", &["boi_token_id", "eoi_token_id", "image_token_id"]),
    ("the settings of the text part count", &["tie_word_embeddings"]),
    ("transformers has no such attribute", &["for_llm_compressor"]),
];

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_silu()?;
    let norm = NormSpec::rms(config.number("rms_norm_eps")?);
    let rotated = rotated_layers(config)?;
    let window = config.count_opt("attention_chunk_size")?.map(Window::Chunked);
    let kinds = match config.layer_types()? {
        Some(kinds) => kinds,
        None => rotated.iter().map(|rotated| if *rotated { "chunked_attention" } else { "full_attention" }).collect(),
    };
    let attentions = [unrotated(config)?, rotating(config, norm)?];
    let (dense, mixture, sparse) = (dense(config)?, mixture(config)?, sparse_layers(config)?);
    let layer = |((window, rotated), sparse): ((Window, bool), bool)| {
        let attention = AttentionSpec { window, ..attentions[usize::from(rotated)].clone() };
        let ffn = if sparse { FfnSpec::Moe(mixture.clone()) } else { FfnSpec::Dense(dense) };
        pre_norm(norm, MixerSpec::Attention(attention), ffn)
    };
    let windows = windows(kinds, "chunked_attention", "attention_chunk_size", window)?;
    decoder_like_llama(config, windows.into_iter().zip(rotated).zip(sparse).map(layer).collect())
}

/// Layers with rotation: those with a 1 in `no_rope_layers` (despite its name), else all but every
/// `no_rope_layer_interval`-th.
fn rotated_layers(config: &Config<'_>) -> Result<Vec<bool>> {
    let interval = config.divisor("no_rope_layer_interval")?;
    match config.counts_opt("no_rope_layers")?.filter(|flags| !flags.is_empty()) {
        Some(flags) => config.one_per_layer("no_rope_layers", flags.into_iter().map(|flag| flag != 0).collect()),
        None => Ok((1..=config.layers()?).map(|layer| !layer.is_multiple_of(interval)).collect()),
    }
}

/// Layers with experts: by `moe_layers`, else every `interleave_moe_layer_step`-th.
fn sparse_layers(config: &Config<'_>) -> Result<Vec<bool>> {
    let step = config.divisor("interleave_moe_layer_step")?;
    let listed = config.counts_opt("moe_layers")?;
    let is_sparse = |layer: usize| match &listed {
        Some(listed) => listed.contains(&layer),
        None => (layer + 1).is_multiple_of(step),
    };
    Ok((0..config.layers()?).map(is_sparse).collect())
}

fn rotating(config: &Config<'_>, norm: NormSpec) -> Result<AttentionSpec> {
    let attention = attention_like_llama(config)?;
    Ok(AttentionSpec {
        rope: attention.rope.map(|rope| RopeSpec { pairing: Pairing::Interleaved, ..rope }),
        qk_norm: if config.flag("use_qk_norm")? { QkNorm::AfterRope { eps: norm.eps } } else { QkNorm::None },
        ..attention
    })
}

fn unrotated(config: &Config<'_>) -> Result<AttentionSpec> {
    let temperature = Temperature { scale: config.number("attn_scale")?, floor: config.number("floor_scale")? };
    let tuned = config.flag("attn_temperature_tuning")?;
    Ok(AttentionSpec { rope: None, temperature: tuned.then_some(temperature), ..attention_like_llama(config)? })
}

fn dense(config: &Config<'_>) -> Result<MlpSpec> {
    Ok(MlpSpec::swiglu(config.count("intermediate_size_mlp")?))
}

fn mixture(config: &Config<'_>) -> Result<MoeSpec> {
    let intermediate = config.count("intermediate_size")?;
    Ok(MoeSpec {
        experts: config.count("num_local_experts")?,
        top_k: config.count("num_experts_per_tok")?,
        expert: MlpSpec { intermediate, kind: MlpKind::Swiglu(GateUp::Halves), bias: false },
        router: RouterSpec::SigmoidOfInput,
        shared: Some(SharedSpec { mlp: MlpSpec::swiglu(intermediate), gate: false }),
        beside: None,
        latent: None,
    })
}
