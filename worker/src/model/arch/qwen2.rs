//! Qwen2 and Qwen2.5 (2024), dense: biases on queries, keys and values only. Hugging Face
//! `Qwen2ForCausalLM`.

use super::*;

pub(super) const FAMILY: Family = Family::new("Qwen2ForCausalLM", &["qwen2"], "Qwen2Config", spec, &NAMES);

const NAMES: Names = Names::new(&[LIKE_LLAMA], &["model.", ""]);

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_silu()?;
    let norm = NormSpec::rms(config.number("rms_norm_eps")?);
    let mlp = MlpSpec::swiglu(config.count("intermediate_size")?);
    let layer = |window| {
        let attention = AttentionSpec { qkv_bias: true, output_bias: false, window, ..attention_like_llama(config)? };
        Ok(pre_norm(norm, MixerSpec::Attention(attention), FfnSpec::Dense(mlp)))
    };
    decoder_like_llama(config, qwen_windows(config)?.into_iter().map(layer).collect::<Result<_>>()?)
}
