//! Mixtral (Jiang et al. 2024): softmax over the best two of eight experts. Hugging Face
//! `MixtralForCausalLM`.

use super::*;

pub(super) const FAMILY: Family = Family::new("MixtralForCausalLM", &["mixtral"], "MixtralConfig", spec, &NAMES);

const NAMES: Names = Names::new(&[LIKE_LLAMA, EXPERTS], &["model.", ""]);

/// Names of router and experts, also used by later families.
pub(super) const EXPERTS: &[(Role, &str)] = &[
    (Role::Router, "{base}layers.{layer}.block_sparse_moe.gate.weight"),
    (Role::ExpertGate, "{base}layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight"),
    (Role::ExpertUp, "{base}layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight"),
    (Role::ExpertDown, "{base}layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"),
];

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_silu()?;
    let norm = NormSpec::rms(config.number("rms_norm_eps")?);
    let attention = AttentionSpec {
        window: config.count_opt("sliding_window")?.map_or(Window::Full, Window::Sliding),
        ..attention_like_llama(config)?
    };
    let (experts, top_k) = (config.count("num_local_experts")?, config.count("num_experts_per_tok")?);
    let expert = MlpSpec::swiglu(config.count("intermediate_size")?);
    let router = RouterSpec::SoftmaxTopK { normalise: true };
    let moe = MoeSpec::plain(experts, top_k, expert, router);
    let layer = pre_norm(norm, MixerSpec::Attention(attention), FfnSpec::Moe(moe));
    decoder_like_llama(config, vec![layer; config.layers()?])
}
