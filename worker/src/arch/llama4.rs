//! Llama 4 Scout and Maverick (Meta 2025), the text part: chunked attention with interleaved rotation, every fourth layer without
//! either, experts whose input is scaled by the router, a shared expert. Hugging Face `Llama4ForConditionalGeneration`.

use super::{Config, Family, Ignored, Names, Pattern, attention_like_llama, decoder_like_llama, pre_norm};
use crate::decoder::{
    AttentionSpec, DecoderSpec, FfnSpec, GateUp, MixerSpec, MlpKind, MlpSpec, MoeSpec, NormSpec, QkNorm, Role,
    RouterSpec, SharedSpec, Temperature, Window,
};
use crate::error::Result;
use crate::rope::{Pairing, RopeSpec};

pub(super) const FAMILY: Family = Family { architecture: "Llama4ForConditionalGeneration", spec, names: &NAMES };

const NAMES: Names = Names {
    tensors: &[
        &[
            (Role::Head, "language_model.lm_head.weight"),
            (Role::Gate, "{base}layers.{layer}.feed_forward.gate_proj.weight"),
            (Role::Up, "{base}layers.{layer}.feed_forward.up_proj.weight"),
            (Role::Down, "{base}layers.{layer}.feed_forward.down_proj.weight"),
            (Role::Router, "{base}layers.{layer}.feed_forward.router.weight"),
            (Role::ExpertGateUp, "{base}layers.{layer}.feed_forward.experts.gate_up_proj"),
            (Role::ExpertDown, "{base}layers.{layer}.feed_forward.experts.down_proj"),
            (Role::SharedGate, "{base}layers.{layer}.feed_forward.shared_expert.gate_proj.weight"),
            (Role::SharedUp, "{base}layers.{layer}.feed_forward.shared_expert.up_proj.weight"),
            (Role::SharedDown, "{base}layers.{layer}.feed_forward.shared_expert.down_proj.weight"),
        ],
        super::LIKE_LLAMA,
    ],
    bases: &["language_model.model."],
    input_major: &[Role::ExpertGateUp, Role::ExpertDown],
    ignored: &[
        Ignored { names: Pattern::Prefix("vision_model."), why: "vision tower" },
        Ignored { names: Pattern::Prefix("multi_modal_projector."), why: "vision tower" },
    ],
};

// What the published class assumes where the file is silent.
const CHUNK: usize = 8192;
const NO_ROPE_INTERVAL: usize = 4;
const TEMPERATURE: Temperature = Temperature { scale: 0.1, floor: 8192.0 };

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    let config = &config.nested("text_config")?;
    config.expect_word("hidden_act", "silu")?;
    let norm = NormSpec::rms(config.number_opt("rms_norm_eps")?.unwrap_or(1e-5));
    let count = config.layers()?;
    let interval = config.count_opt("no_rope_layer_interval")?.unwrap_or(NO_ROPE_INTERVAL).max(1);
    let rotated = match config.counts_opt("no_rope_layers")? {
        // 1 says that the layer HAS a rotation.
        Some(flags) => config.one_per_layer("no_rope_layers", flags.into_iter().map(|flag| flag == 1).collect())?,
        None => (1..=count).map(|layer| !layer.is_multiple_of(interval)).collect(),
    };
    let step = config.count_opt("interleave_moe_layer_step")?.unwrap_or(1).max(1);
    let moe_layers = config.counts_opt("moe_layers")?;
    let layer = |index: usize| {
        let attention = if rotated[index] { rotating(config, norm)? } else { unrotated(config)? };
        let by_step = (index + 1).is_multiple_of(step);
        let sparse = moe_layers.as_ref().map_or(by_step, |listed| listed.contains(&index));
        let ffn = if sparse { FfnSpec::Moe(mixture(config)?) } else { FfnSpec::Dense(dense(config)?) };
        Ok(pre_norm(norm, MixerSpec::Attention(attention), ffn))
    };
    decoder_like_llama(config, (0..count).map(layer).collect::<Result<_>>()?)
}

fn rotating(config: &Config<'_>, norm: NormSpec) -> Result<AttentionSpec> {
    let attention = attention_like_llama(config)?;
    let normed = config.flag("use_qk_norm", true)?;
    Ok(AttentionSpec {
        rope: Some(RopeSpec { pairing: Pairing::Interleaved, ..config.rope(attention.head_dim)? }),
        qk_norm: if normed { QkNorm::AfterRope { eps: norm.eps } } else { QkNorm::None },
        window: Window::Chunked(config.count_opt("attention_chunk_size")?.unwrap_or(CHUNK)),
        ..attention
    })
}

fn unrotated(config: &Config<'_>) -> Result<AttentionSpec> {
    let temperature = Temperature {
        scale: config.number_opt("attn_scale")?.unwrap_or(TEMPERATURE.scale),
        floor: config.number_opt("floor_scale")?.unwrap_or(TEMPERATURE.floor),
    };
    let tuned = config.flag("attn_temperature_tuning", true)?;
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
    })
}
