//! Qwen3-Next (2025): three gated DeltaNet layers per gated attention layer, zero-centred norms, a
//! gated shared expert. Hugging Face `Qwen3NextForCausalLM`.

use super::*;

pub(super) const FAMILY: Family = Family {
    unused: &[("transformers has no such attribute", &["use_sliding_window"])],
    ..Family::new("Qwen3NextForCausalLM", &["qwen3_next"], "Qwen3NextConfig", spec, &NAMES)
};

const NAMES: Names = Names {
    tensors: &[
        &[
            (Role::DeltaQkvz, "{base}layers.{layer}.linear_attn.in_proj_qkvz.weight"),
            (Role::DeltaBa, "{base}layers.{layer}.linear_attn.in_proj_ba.weight"),
        ],
        DELTA_NET,
        SHARED_EXPERT,
        LIKE_LLAMA,
        SEPARATE_EXPERTS,
    ],
    bases: &["model.", ""],
    input_major: &[],
    ignored: &[NEXT_TOKENS],
};

/// Names of DeltaNet's tensors after its projections.
pub(super) const DELTA_NET: &[(Role, &str)] = &[
    (Role::DeltaConvolution, "{base}layers.{layer}.linear_attn.conv1d.weight"),
    (Role::DeltaDecay, "{base}layers.{layer}.linear_attn.A_log"),
    (Role::DeltaStepBias, "{base}layers.{layer}.linear_attn.dt_bias"),
    (Role::DeltaNorm, "{base}layers.{layer}.linear_attn.norm.weight"),
    (Role::DeltaOutput, "{base}layers.{layer}.linear_attn.out_proj.weight"),
];

/// Names of the shared expert and its gate.
pub(super) const SHARED_EXPERT: &[(Role, &str)] = &[
    (Role::SharedGate, "{base}layers.{layer}.mlp.shared_expert.gate_proj.weight"),
    (Role::SharedUp, "{base}layers.{layer}.mlp.shared_expert.up_proj.weight"),
    (Role::SharedDown, "{base}layers.{layer}.mlp.shared_expert.down_proj.weight"),
    (Role::SharedExpertGate, "{base}layers.{layer}.mlp.shared_expert_gate.weight"),
];

/// Layers for multi-token prediction.
pub(super) const NEXT_TOKENS: Ignored = Ignored { names: Pattern::Prefix("mtp."), why: "multi-token prediction" };

/// Every n-th layer has full attention if `layer_types` is absent. Not an attribute of the class.
fn full_attention_interval(config: &Config<'_>) -> Result<usize> {
    const KEY: &str = "full_attention_interval";
    Ok(if config.has(KEY) { config.divisor(KEY)? } else { 4 })
}

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    let moe = mixture(config, GateUp::Separate, config.flag("norm_topk_prob")?)?;
    let dense = MlpSpec::swiglu(config.count("intermediate_size")?);
    let ffn = |sparse| if sparse { FfnSpec::Moe(moe.clone()) } else { FfnSpec::Dense(dense) };
    decoder(config, DeltaStored::ByKeyHead, sparse_layers(config)?.into_iter().map(ffn).collect())
}

/// A decoder by this family's keys with the given feed-forwards.
pub(super) fn decoder(config: &Config<'_>, stored: DeltaStored, ffns: Vec<FfnSpec>) -> Result<DecoderSpec> {
    config.expect_silu()?;
    let eps = config.number("rms_norm_eps")?;
    let norm = NormSpec { kind: NormKind::RmsZeroCentred, eps };
    let attention = AttentionSpec {
        qk_norm: QkNorm::PerHead(norm),
        output_gate: OutputGate::WithQuery,
        ..attention_like_llama(config)?
    };
    let delta = DeltaNetSpec {
        key_heads: config.count("linear_num_key_heads")?,
        value_heads: config.count("linear_num_value_heads")?,
        key_dim: config.count("linear_key_head_dim")?,
        value_dim: config.count("linear_value_head_dim")?,
        kernel: config.count("linear_conv_kernel_dim")?,
        stored,
        norm: NormSpec::rms(eps),
    };
    let interval = full_attention_interval(config)?;
    let kinds = config.layer_types()?;
    let layer = |(index, ffn): (usize, FfnSpec)| {
        let by_interval = if (index + 1).is_multiple_of(interval) { "full_attention" } else { "linear_attention" };
        let mixer = match kinds.as_ref().map_or(by_interval, |kinds| kinds[index]) {
            "full_attention" => MixerSpec::Attention(attention.clone()),
            "linear_attention" => MixerSpec::DeltaNet(delta),
            other => return Err(unsupported(format!("layer_types[{index}] {other:?}"))),
        };
        Ok(pre_norm(norm, mixer, ffn))
    };
    decoder_like_llama(config, ffns.into_iter().enumerate().map(layer).collect::<Result<_>>()?)
}

/// A mixture by this family's keys.
pub(super) fn mixture(config: &Config<'_>, stored: GateUp, normalise: bool) -> Result<MoeSpec> {
    let intermediate = config.count("moe_intermediate_size")?;
    Ok(MoeSpec {
        experts: config.count("num_experts")?,
        top_k: config.count("num_experts_per_tok")?,
        expert: MlpSpec { intermediate, kind: MlpKind::Swiglu(stored), bias: false },
        router: RouterSpec::SoftmaxTopK { normalise },
        shared: Some(SharedSpec { mlp: MlpSpec::swiglu(config.count("shared_expert_intermediate_size")?), gate: true }),
        beside: None,
        latent: None,
    })
}
