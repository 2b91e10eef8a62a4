//! Llama 2 and 3: pre-norm, GQA, rotary positions, gated MLP. Hugging Face `LlamaForCausalLM`.

use super::*;

pub(super) const FAMILY: Family = Family::new("LlamaForCausalLM", &["llama"], "LlamaConfig", spec, &NAMES);

const NAMES: Names = Names { ignored: &[ROTARY_BUFFERS], ..Names::new(&[LIKE_LLAMA], &["model.", ""]) };

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_silu()?;
    let norm = NormSpec::rms(config.number("rms_norm_eps")?);
    let bias = config.flag("mlp_bias")?;
    let mlp = MlpSpec { bias, ..MlpSpec::swiglu(config.count("intermediate_size")?) };
    let attention = attention_like_llama(config)?;
    let layer = pre_norm(norm, MixerSpec::Attention(attention), FfnSpec::Dense(mlp));
    decoder_like_llama(config, vec![layer; config.layers()?])
}
