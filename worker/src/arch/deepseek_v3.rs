//! DeepSeek-V3 (2024), V3.1 and Kimi-K2 (2025): latent attention, sigmoid routing with a correction bias and group limits, FP8
//! tiles. Hugging Face `DeepseekV3ForCausalLM`; the code that `auto_map` names is not needed.

use super::{
    Config, Family, LIKE_LLAMA, NEXT_TOKEN_LAYERS, Names, ROTARY_BUFFERS, SEPARATE_EXPERTS, SHARED_EXPERTS,
    decoder_like_llama, ffn_like_deepseek, pre_norm, yarn_magnitude,
};
use crate::decoder::{DecoderSpec, LatentSpec, MixerSpec, NormSpec, Role};
use crate::error::Result;
use crate::rope::{Pairing, RopeSpec};

pub(super) const FAMILY: Family = Family { architecture: "DeepseekV3ForCausalLM", spec, names: &NAMES };

const NAMES: Names = Names {
    tensors: &[
        LIKE_LLAMA,
        SEPARATE_EXPERTS,
        SHARED_EXPERTS,
        &[
            (Role::QueryDown, "{base}layers.{layer}.self_attn.q_a_proj.weight"),
            (Role::QueryDownNorm, "{base}layers.{layer}.self_attn.q_a_layernorm.weight"),
            (Role::QueryUp, "{base}layers.{layer}.self_attn.q_b_proj.weight"),
            (Role::KeyValueDown, "{base}layers.{layer}.self_attn.kv_a_proj_with_mqa.weight"),
            (Role::KeyValueDownNorm, "{base}layers.{layer}.self_attn.kv_a_layernorm.weight"),
            (Role::KeyValueUp, "{base}layers.{layer}.self_attn.kv_b_proj.weight"),
        ],
    ],
    bases: &["model."],
    input_major: &[],
    ignored: &[NEXT_TOKEN_LAYERS, ROTARY_BUFFERS],
};

/// Of the norms inside the bottlenecks; not in the configuration.
const INNER_EPS: f64 = 1e-6;

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_word("hidden_act", "silu")?;
    config.expect_flag("attention_bias", false)?;
    config.expect_flag("rope_interleave", true)?;
    let norm = NormSpec::rms(config.number_opt("rms_norm_eps")?.unwrap_or(1e-6));
    let (nope_dim, rope_dim) = (config.count("qk_nope_head_dim")?, config.count("qk_rope_head_dim")?);
    let scaling = config.rope_settings();
    // YaRN's growth of queries and keys, here in the softmax.
    let magnitude = match (scaling.number_opt("factor")?, scaling.number_opt("mscale_all_dim")?) {
        (Some(factor), Some(all)) => yarn_magnitude(factor, all),
        _ => 1.0,
    };
    let latent = LatentSpec {
        heads: config.count("num_attention_heads")?,
        query_rank: config.count_opt("q_lora_rank")?,
        kv_rank: config.count("kv_lora_rank")?,
        nope_dim,
        rope_dim,
        value_dim: config.count("v_head_dim")?,
        norm: NormSpec::rms(INNER_EPS),
        scale: magnitude * magnitude / ((nope_dim + rope_dim) as f64).sqrt(),
        rope: RopeSpec { pairing: Pairing::Interleaved, ..config.rope(rope_dim)? },
    };
    let layer = |index| Ok(pre_norm(norm, MixerSpec::Latent(latent.clone()), ffn_like_deepseek(config, index)?));
    decoder_like_llama(config, (0..config.layers()?).map(layer).collect::<Result<_>>()?)
}
