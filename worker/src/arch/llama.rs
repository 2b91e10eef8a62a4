//! Llama 2 and 3: pre-norm, GQA, rotary positions, gated MLP. Hugging Face `LlamaForCausalLM`.

use super::{Config, Family, LIKE_LLAMA, Names};
use crate::decoder::{AttentionSpec, DecoderSpec, FfnSpec, GatedSpec, LayerSpec, NormSpec, QkNorm};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { architecture: "LlamaForCausalLM", spec, names: &NAMES };

const NAMES: Names = Names {
    tensors: &[LIKE_LLAMA],
    // Early conversions stored the rotary frequencies, which the configuration determines.
    ignored_suffixes: &[".rotary_emb.inv_freq"],
};

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_activation("silu")?;
    let hidden = config.count("hidden_size")?;
    let heads = config.count("num_attention_heads")?;
    let head_dim = config.count_opt("head_dim")?.unwrap_or(hidden / heads.max(1));
    let norm = NormSpec { eps: config.number_opt("rms_norm_eps")?.unwrap_or(1e-6) };
    let bias = config.flag("attention_bias", false)?;
    let layer = LayerSpec {
        mixer_norm: norm,
        attention: AttentionSpec {
            heads,
            kv_heads: config.count_opt("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            qk_norm: QkNorm::None,
            qkv_bias: bias,
            output_bias: bias,
            clip_qkv: None,
            rope: config.rope(head_dim)?,
        },
        ffn_norm: norm,
        ffn: FfnSpec::Dense(GatedSpec {
            intermediate: config.count("intermediate_size")?,
            bias: config.flag("mlp_bias", false)?,
        }),
    };
    Ok(DecoderSpec {
        hidden,
        vocab: config.count("vocab_size")?,
        max_positions: config.count_opt("max_position_embeddings")?,
        tied_head: config.flag("tie_word_embeddings", false)?,
        final_norm: norm,
        layers: vec![layer; config.layers()?],
    })
}
