//! Qwen2 and Qwen2.5 (2024), dense: biases on queries, keys and values alone. Hugging Face `Qwen2ForCausalLM`.

use super::{Config, Family, LIKE_LLAMA, Names, attention_like_llama, decoder_like_llama, pre_norm, windowed_from};
use crate::decoder::{AttentionSpec, DecoderSpec, FfnSpec, MixerSpec, MlpSpec, NormSpec};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { architecture: "Qwen2ForCausalLM", spec, names: &NAMES };

const NAMES: Names = Names { tensors: &[LIKE_LLAMA], bases: &["model."], input_major: &[], ignored: &[] };

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_word("hidden_act", "silu")?;
    let norm = NormSpec::rms(config.number_opt("rms_norm_eps")?.unwrap_or(1e-6));
    let mlp = MlpSpec::swiglu(config.count("intermediate_size")?);
    let layer = |index| {
        let window = windowed_from(config, index)?;
        let attention = AttentionSpec { qkv_bias: true, output_bias: false, window, ..attention_like_llama(config)? };
        Ok(pre_norm(norm, MixerSpec::Attention(attention), FfnSpec::Dense(mlp)))
    };
    decoder_like_llama(config, (0..config.layers()?).map(layer).collect::<Result<_>>()?)
}
