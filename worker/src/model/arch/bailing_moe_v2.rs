//! Ling 2.0 (inclusionAI 2025): DeepSeek's routing over grouped-query attention with a fused
//! matrix for queries, keys and values, norms of queries and keys, and partial rotation. Hugging
//! Face `BailingMoeV2ForCausalLM`, which is code of the model's repository, not of transformers.

use super::*;

pub(super) const FAMILY: Family = Family {
    unused: &[
        ("training alone uses it", &["embedding_dropout", "output_dropout", "mtp_loss_scaling_factor"]),
        ("windows are not switched on by it", &["max_window_layers"]),
        ("routers are computed in f32", &["router_dtype"]),
    ],
    ..Family::new("BailingMoeV2ForCausalLM", &["bailing_moe_v2", "bailing_moe"], "BailingMoeV2Config", spec, &NAMES)
};

const NAMES: Names = Names {
    tensors: &[
        &[
            (Role::Embedding, "{base}word_embeddings.weight"),
            (Role::QkvProj, "{base}layers.{layer}.attention.query_key_value.weight"),
            (Role::QkvProjBias, "{base}layers.{layer}.attention.query_key_value.bias"),
            (Role::QNorm, "{base}layers.{layer}.attention.query_layernorm.weight"),
            (Role::KNorm, "{base}layers.{layer}.attention.key_layernorm.weight"),
            (Role::OProj, "{base}layers.{layer}.attention.dense.weight"),
            (Role::OProjBias, "{base}layers.{layer}.attention.dense.bias"),
            (Role::CorrectionBias, "{base}layers.{layer}.mlp.gate.expert_bias"),
        ],
        LIKE_LLAMA,
        SEPARATE_EXPERTS,
        SHARED_EXPERTS,
    ],
    bases: &["model."],
    input_major: &[],
    ignored: &[NEXT_TOKEN_LAYERS],
};

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_silu()?;
    config.expect_flag("use_rmsnorm", true)?;
    let norm = NormSpec::rms(config.number("rms_norm_eps")?);
    let attention = attention_without_positions(config)?;
    let mixer = MixerSpec::Attention(AttentionSpec {
        fused_qkv: true,
        qk_norm: if config.flag("use_qk_norm")? { QkNorm::PerHead(norm) } else { QkNorm::None },
        qkv_bias: config.flag("use_qkv_bias")?,
        output_bias: config.flag("use_bias")?,
        rope: Some(config.rope_of_part(attention.head_dim, Some(1.0))?),
        ..attention
    });
    let (dense, moe) = (MlpSpec::swiglu(config.count("intermediate_size")?), mixture(config)?);
    let layer = |sparse| {
        let ffn = if sparse { FfnSpec::Moe(moe.clone()) } else { FfnSpec::Dense(dense) };
        pre_norm(norm, mixer.clone(), ffn)
    };
    decoder_like_llama(config, sparse_after_first(config)?.into_iter().map(layer).collect())
}

fn mixture(config: &Config<'_>) -> Result<MoeSpec> {
    config.expect("score_function", &["sigmoid".into()])?;
    config.expect_flag("norm_topk_prob", true)?;
    config.expect_flag("moe_router_enable_expert_bias", true)?;
    let intermediate = config.count("moe_intermediate_size")?;
    const OF_SHARED: &str = "moe_shared_expert_intermediate_size";
    if config.has(OF_SHARED) && config.count(OF_SHARED)? != intermediate {
        return Err(unsupported(format!("{OF_SHARED} beside moe_intermediate_size {intermediate}")));
    }
    let moe = MoeSpec::plain(
        config.count("num_experts")?,
        config.count("num_experts_per_tok")?,
        MlpSpec::swiglu(intermediate),
        sigmoid_groups(config, true)?,
    );
    Ok(moe.sharing(config.count("num_shared_experts")?))
}
