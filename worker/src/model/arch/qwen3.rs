//! Qwen3 (2025), dense: q/k norm per head. Hugging Face `Qwen3ForCausalLM`.

use super::*;

pub(super) const FAMILY: Family = Family::new("Qwen3ForCausalLM", &["qwen3"], "Qwen3Config", spec, &NAMES);

const NAMES: Names = Names::new(&[LIKE_LLAMA], &["model.", ""]);

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_silu()?;
    let norm = NormSpec::rms(config.number("rms_norm_eps")?);
    let mlp = MlpSpec::swiglu(config.count("intermediate_size")?);
    let layer = |window| {
        let attention = AttentionSpec { qk_norm: QkNorm::PerHead(norm), window, ..attention_like_llama(config)? };
        Ok(pre_norm(norm, MixerSpec::Attention(attention), FfnSpec::Dense(mlp)))
    };
    decoder_like_llama(config, qwen_windows(config)?.into_iter().map(layer).collect::<Result<_>>()?)
}
