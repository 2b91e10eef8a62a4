//! Trinity (Arcee 2025-26): norms before and after each sublayer, a separate gate on attention,
//! and three windowed layers with rotation per global layer without positions. Hugging Face
//! `AfmoeForCausalLM`.

use super::*;

pub(super) const FAMILY: Family = Family {
    unused: &[
        ("training alone uses it", &["load_balance_coeff"]),
        ("it says how Python runs the model", &["use_grouped_mm"]),
    ],
    ..Family::new("AfmoeForCausalLM", &["afmoe"], "AfmoeConfig", spec, &NAMES)
};

const NAMES: Names = Names::new(
    &[
        &[
            (Role::MixerPostNorm, "{base}layers.{layer}.post_attention_layernorm.weight"),
            (Role::FfnNorm, "{base}layers.{layer}.pre_mlp_layernorm.weight"),
            (Role::FfnPostNorm, "{base}layers.{layer}.post_mlp_layernorm.weight"),
            (Role::OutputGate, "{base}layers.{layer}.self_attn.gate_proj.weight"),
            (Role::Router, "{base}layers.{layer}.mlp.router.gate.weight"),
            (Role::CorrectionBias, "{base}layers.{layer}.mlp.expert_bias"),
        ],
        LIKE_LLAMA,
        SEPARATE_EXPERTS,
        SHARED_EXPERTS,
    ],
    &["model.", ""],
);

/// Checks settings of the published code that transformers' class does not have.
fn expect_published(config: &Config<'_>) -> Result<()> {
    config.expect("score_func", &["sigmoid".into()])?;
    config.expect_flag("route_norm", true)?;
    for key in ["n_group", "topk_group", "num_expert_groups", "num_limited_groups"] {
        config.expect(key, &[1.into()])?;
    }
    Ok(())
}

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_silu()?;
    expect_published(config)?;
    let norm = NormSpec::rms(config.number("rms_norm_eps")?);
    // The class takes null for it and then fails.
    config.count("head_dim")?;
    let attention = AttentionSpec {
        qk_norm: QkNorm::PerHead(norm),
        output_gate: OutputGate::Separate,
        ..attention_without_positions(config)?
    };
    let rope = config.rope(attention.head_dim)?;
    let windows = windows_but_every(config, config.divisor("global_attn_every_n_layers")?)?;
    let dense_layers = config.count("num_dense_layers")?;
    let (dense, moe) = (MlpSpec::swiglu(config.count("intermediate_size")?), mixture(config)?);
    let layer = |(index, window): (usize, Window)| LayerSpec {
        norm,
        order: NormOrder::Sandwich,
        mixer: MixerSpec::Attention(AttentionSpec {
            window,
            rope: (window != Window::Full).then(|| rope.clone()),
            ..attention.clone()
        }),
        ffn: if index < dense_layers { FfnSpec::Dense(dense) } else { FfnSpec::Moe(moe.clone()) },
        scalar: false,
    };
    let decoder = decoder_like_llama(config, windows.into_iter().enumerate().map(layer).collect())?;
    let scale = EmbeddingScale { factor: (decoder.hidden as f64).sqrt(), rounded: false };
    let scale = config.flag("mup_enabled")?.then_some(scale);
    Ok(DecoderSpec { embedding: EmbeddingSpec { scale, ..decoder.embedding }, ..decoder })
}

fn mixture(config: &Config<'_>) -> Result<MoeSpec> {
    let scale = config.number("route_scale")?;
    let moe = MoeSpec::plain(
        config.count("num_experts")?,
        config.count("num_experts_per_tok")?,
        MlpSpec::swiglu(config.count("moe_intermediate_size")?),
        RouterSpec::SigmoidGroups { groups: 1, top_groups: 1, normalise: true, scale },
    );
    Ok(moe.sharing(config.count("num_shared_experts")?))
}
