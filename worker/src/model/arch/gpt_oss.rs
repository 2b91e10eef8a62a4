//! gpt-oss (OpenAI 2025): attention sinks, windows in every second layer, clamped SwiGLU experts
//! with biases in MXFP4, YaRN without rounding. Hugging Face `GptOssForCausalLM`.

use super::*;

pub(super) const FAMILY: Family = Family {
    unused: &[("transformers has no such attribute", &["experts_per_token", "initial_context_length"])],
    ..Family::new("GptOssForCausalLM", &["gpt_oss"], "GptOssConfig", spec, &NAMES)
};

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
    bases: &["model.", ""],
    // Applies to plain floats. MXFP4 tensors are output-major.
    input_major: &[Role::ExpertGateUp, Role::ExpertDown],
    ignored: &[],
};

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_silu()?;
    let norm = NormSpec::rms(config.number("rms_norm_eps")?);
    let (limit, alpha) = (config.number("swiglu_limit")?, config.number("swiglu_alpha")?);
    let expert = MlpSpec {
        intermediate: config.count("intermediate_size")?,
        kind: MlpKind::ClampedSwiglu { stored: GateUp::Interleaved, limit, alpha },
        bias: true,
    };
    let (experts, top_k) = (config.count("num_local_experts")?, config.count("num_experts_per_tok")?);
    let moe = MoeSpec::plain(experts, top_k, expert, RouterSpec::TopKSoftmax);
    let attention = AttentionSpec { sinks: true, ..attention_like_llama(config)? };
    let layer = |window| {
        let mixer = MixerSpec::Attention(AttentionSpec { window, ..attention.clone() });
        pre_norm(norm, mixer, FfnSpec::Moe(moe.clone()))
    };
    decoder_like_llama(config, windows_but_every(config, 2)?.into_iter().map(layer).collect())
}
