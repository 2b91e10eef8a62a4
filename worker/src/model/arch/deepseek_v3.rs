//! DeepSeek-V3 (2024), V3.1, Kimi-K2 and Moonlight (2025): latent attention, sigmoid routing with
//! a correction bias and group limits, FP8 tiles. Hugging Face `DeepseekV3ForCausalLM`; the code
//! of `auto_map` is not needed.

use super::*;

pub(super) const FAMILY: Family = Family {
    unused: &[("transformers has no such attribute", &["ep_size"])],
    ..Family::new("DeepseekV3ForCausalLM", &["deepseek_v3", "kimi_k2"], "DeepseekV3Config", spec, &NAMES)
};

const NAMES: Names = Names { ignored: &[NEXT_TOKEN_LAYERS, ROTARY_BUFFERS], ..Names::new(TENSORS, &["model.", ""]) };

/// Also used by the families that build on this one.
pub(super) const TENSORS: &[&[(Role, &str)]] = &[LIKE_LLAMA, SEPARATE_EXPERTS, SHARED_EXPERTS, LATENT];

/// Names of latent attention.
pub(super) const LATENT: &[(Role, &str)] = &[
    (Role::QAProj, "{base}layers.{layer}.self_attn.q_a_proj.weight"),
    (Role::QANorm, "{base}layers.{layer}.self_attn.q_a_layernorm.weight"),
    (Role::QBProj, "{base}layers.{layer}.self_attn.q_b_proj.weight"),
    (Role::KvAProj, "{base}layers.{layer}.self_attn.kv_a_proj_with_mqa.weight"),
    (Role::KvANorm, "{base}layers.{layer}.self_attn.kv_a_layernorm.weight"),
    (Role::KvBProj, "{base}layers.{layer}.self_attn.kv_b_proj.weight"),
];

/// Epsilon of the norms of the low-rank vectors; not in the configuration.
const INNER_EPS: f64 = 1e-6;

pub(super) fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    let rope_dim = config.count("qk_rope_head_dim")?;
    let head_dim = config.count_or("head_dim", rope_dim)?;
    if head_dim != rope_dim {
        return Err(unsupported(format!("head_dim {head_dim} beside qk_rope_head_dim {rope_dim}")));
    }
    let pairing = if config.flag("rope_interleave")? { Pairing::Interleaved } else { Pairing::Halves };
    decoder(config, pairing, sparse_after_first(config)?)
}

/// A decoder by this family's keys. `sparse` marks the layers with experts.
pub(super) fn decoder(config: &Config<'_>, pairing: Pairing, sparse: Vec<bool>) -> Result<DecoderSpec> {
    config.expect_silu()?;
    let norm = NormSpec::rms(config.number("rms_norm_eps")?);
    let latent = latent(config, pairing)?;
    let layer = |sparse| Ok(pre_norm(norm, MixerSpec::Latent(latent.clone()), ffn_like_deepseek(config, sparse)?));
    decoder_like_llama(config, sparse.into_iter().map(layer).collect::<Result<_>>()?)
}

/// Latent attention by this family's keys.
pub(super) fn latent(config: &Config<'_>, pairing: Pairing) -> Result<LatentSpec> {
    let latent = latent_without_rotation(config)?;
    // YaRN's factor of queries and keys, applied in the softmax.
    let rotation = config.rope_settings()?;
    let magnitude = match rotation.nonzero("mscale_all_dim")? {
        Some(all) if rotation.kind()? != "default" => yarn_magnitude(rotation.number("factor")?, all),
        _ => 1.0,
    };
    Ok(LatentSpec {
        scale: magnitude * magnitude / ((latent.nope_dim + latent.rope_dim) as f64).sqrt(),
        rope: Some(RopeSpec { pairing, ..config.rope(latent.rope_dim)? }),
        ..latent
    })
}

/// As [`latent`], without the rotation.
pub(super) fn latent_without_rotation(config: &Config<'_>) -> Result<LatentSpec> {
    config.expect_flag("attention_bias", false)?;
    let (nope_dim, rope_dim) = (config.count("qk_nope_head_dim")?, config.count("qk_rope_head_dim")?);
    let heads = config.count("num_attention_heads")?;
    let kv_heads = config.count_or("num_key_value_heads", heads)?;
    if kv_heads != heads {
        return Err(unsupported(format!("num_key_value_heads {kv_heads} beside num_attention_heads {heads}")));
    }
    Ok(LatentSpec {
        heads,
        query_rank: config.count_opt("q_lora_rank")?,
        kv_rank: config.count("kv_lora_rank")?,
        nope_dim,
        rope_dim,
        value_dim: config.count("v_head_dim")?,
        norm: NormSpec::rms(INNER_EPS),
        scale: 1.0 / ((nope_dim + rope_dim) as f64).sqrt(),
        rope: None,
    })
}
