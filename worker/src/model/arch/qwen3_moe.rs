//! Qwen3 mixtures (2025): q/k norm per head, softmax top-k routing, renormalised. Hugging Face
//! `Qwen3MoeForCausalLM`.

use super::*;

pub(super) const FAMILY: Family = Family {
    unused: &[("of a mixture, all layers have the window: it has no such attribute", &["max_window_layers"])],
    ..Family::new("Qwen3MoeForCausalLM", &["qwen3_moe"], "Qwen3MoeConfig", spec, &NAMES)
};

const NAMES: Names = Names::new(&[LIKE_LLAMA, SEPARATE_EXPERTS], &["model.", ""]);

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_silu()?;
    let norm = NormSpec::rms(config.number("rms_norm_eps")?);
    let expert = MlpSpec::swiglu(config.count("moe_intermediate_size")?);
    let router = RouterSpec::SoftmaxTopK { normalise: config.flag("norm_topk_prob")? };
    let moe = MoeSpec::plain(config.count("num_experts")?, config.count("num_experts_per_tok")?, expert, router);
    let attention = AttentionSpec {
        qk_norm: QkNorm::PerHead(norm),
        window: qwen_window(config)?.unwrap_or(Window::Full),
        ..attention_like_llama(config)?
    };
    let dense = MlpSpec::swiglu(config.count("intermediate_size")?);
    let layer = |sparse| {
        let ffn = if sparse { FfnSpec::Moe(moe.clone()) } else { FfnSpec::Dense(dense) };
        pre_norm(norm, MixerSpec::Attention(attention.clone()), ffn)
    };
    decoder_like_llama(config, sparse_layers(config)?.into_iter().map(layer).collect())
}
