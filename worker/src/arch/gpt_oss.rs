//! gpt-oss (OpenAI 2025): attention sinks, windows in every second layer, clamped SwiGLU experts with biases in MXFP4, YaRN without
//! rounding. Hugging Face `GptOssForCausalLM`.

use super::{Config, Family, LIKE_LLAMA, Names, attention_like_llama, decoder_like_llama, pre_norm, unsupported};
use crate::decoder::{
    AttentionSpec, DecoderSpec, FfnSpec, GateUp, MixerSpec, MlpKind, MlpSpec, MoeSpec, NormSpec, Role, RouterSpec,
    Window,
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { architecture: "GptOssForCausalLM", spec, names: &NAMES };

const NAMES: Names = Names {
    tensors: &[
        LIKE_LLAMA,
        &[
            (Role::Sinks, "{base}layers.{layer}.self_attn.sinks"),
            (Role::Router, "{base}layers.{layer}.mlp.router.weight"),
            (Role::RouterBias, "{base}layers.{layer}.mlp.router.bias"),
            (Role::ExpertGateUp, "{base}layers.{layer}.mlp.experts.gate_up_proj"),
            (Role::ExpertGateUpBias, "{base}layers.{layer}.mlp.experts.gate_up_proj_bias"),
            (Role::ExpertDown, "{base}layers.{layer}.mlp.experts.down_proj"),
            (Role::ExpertDownBias, "{base}layers.{layer}.mlp.experts.down_proj_bias"),
        ],
    ],
    bases: &["model."],
    // As plain floats. Their MXFP4 form is output-major.
    input_major: &[Role::ExpertGateUp, Role::ExpertDown],
    ignored: &[],
};

/// Slope inside the sigmoid; not in the configuration.
const ALPHA: f64 = 1.702;

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_word("hidden_act", "silu")?;
    let norm = NormSpec::rms(config.number_opt("rms_norm_eps")?.unwrap_or(1e-5));
    let limit = config.number_opt("swiglu_limit")?.unwrap_or(7.0);
    let moe = MoeSpec {
        experts: config.count("num_local_experts")?,
        top_k: config.count("num_experts_per_tok")?,
        expert: MlpSpec {
            intermediate: config.count("intermediate_size")?,
            kind: MlpKind::ClampedSwiglu { stored: GateUp::Interleaved, limit, alpha: ALPHA },
            bias: true,
        },
        router: RouterSpec::TopKSoftmax,
        shared: None,
    };
    let window = Window::Sliding(config.count("sliding_window")?);
    let kinds = config.words_opt("layer_types")?;
    let layer = |index: usize| {
        let kind = kinds.as_ref().map_or(["sliding_attention", "full_attention"][index % 2], |kinds| kinds[index]);
        let window = match kind {
            "sliding_attention" => window,
            "full_attention" => Window::Full,
            other => return Err(unsupported(format!("layer_types[{index}] {other:?}"))),
        };
        let attention = AttentionSpec { sinks: true, window, ..attention_like_llama(config)? };
        Ok(pre_norm(norm, MixerSpec::Attention(attention), FfnSpec::Moe(moe.clone())))
    };
    decoder_like_llama(config, (0..config.layers()?).map(layer).collect::<Result<_>>()?)
}
