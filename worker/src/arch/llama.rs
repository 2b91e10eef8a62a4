//! Llama 2 and 3: pre-norm, GQA, rotary positions, gated MLP. Hugging Face `LlamaForCausalLM`.

use super::{Config, Family, LIKE_LLAMA, Names, attention_like_llama, decoder_like_llama};
use crate::decoder::{DecoderSpec, FfnSpec, GatedSpec, LayerSpec, NormSpec};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { architecture: "LlamaForCausalLM", spec, names: &NAMES };

const NAMES: Names = Names {
    tensors: &[LIKE_LLAMA],
    // Early conversions stored the rotary frequencies, which the configuration determines.
    ignored_suffixes: &[".rotary_emb.inv_freq"],
};

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_activation("silu")?;
    let norm = NormSpec { eps: config.number_opt("rms_norm_eps")?.unwrap_or(1e-6) };
    let mlp = GatedSpec { intermediate: config.count("intermediate_size")?, bias: config.flag("mlp_bias", false)? };
    let attention = attention_like_llama(config)?;
    decoder_like_llama(config, LayerSpec { mixer_norm: norm, attention, ffn_norm: norm, ffn: FfnSpec::Dense(mlp) })
}
