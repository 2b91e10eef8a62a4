//! GLM-4.5 (2025): DeepSeek's routing over grouped-query attention with partial rotation. Hugging
//! Face `Glm4MoeForCausalLM`.

use super::*;

pub(super) const FAMILY: Family = Family::new("Glm4MoeForCausalLM", &["glm4_moe"], "Glm4MoeConfig", spec, &NAMES);

const NAMES: Names = Names {
    ignored: &[NEXT_TOKEN_LAYERS],
    ..Names::new(&[LIKE_LLAMA, SEPARATE_EXPERTS, SHARED_EXPERTS], &["model.", ""])
};

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_silu()?;
    let norm = NormSpec::rms(config.number("rms_norm_eps")?);
    let qk_norm = if config.flag("use_qk_norm")? { QkNorm::PerHead(norm) } else { QkNorm::None };
    let attention = attention_like_llama(config)?;
    // `attention_bias` applies to q, k and v only.
    let mixer = MixerSpec::Attention(AttentionSpec { qk_norm, output_bias: false, ..attention });
    let layer = |sparse| Ok(pre_norm(norm, mixer.clone(), ffn_like_deepseek(config, sparse)?));
    decoder_like_llama(config, sparse_after_first(config)?.into_iter().map(layer).collect::<Result<_>>()?)
}
