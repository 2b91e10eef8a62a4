//! MiniMax-M2, M2.5 and M2.7 (2025-26): q/k norm over the whole projection, partial rotation under
//! a separate key, sigmoid routing with a correction bias, FP8 tiles under Mixtral's names.
//! Hugging Face `MiniMaxM2ForCausalLM`.

use super::*;

pub(super) const FAMILY: Family = Family {
    unused: &[(
        "layers that predict later tokens are not part of the main stack",
        &["mtp_transformer_layers", "num_mtp_modules", "use_mtp"],
    )],
    ..Family::new("MiniMaxM2ForCausalLM", &["minimax_m2"], "MiniMaxM2Config", spec, &NAMES)
};

const NAMES: Names = Names {
    tensors: &[
        LIKE_LLAMA,
        mixtral::EXPERTS,
        &[(Role::CorrectionBias, "{base}layers.{layer}.block_sparse_moe.e_score_correction_bias")],
    ],
    bases: &["model.", ""],
    input_major: &[],
    ignored: &[NEXT_TOKEN_LAYERS],
};

/// Checks settings of the published code that transformers' class does not have.
fn expect_published(config: &Config<'_>) -> Result<()> {
    config.expect("scoring_func", &["sigmoid".into()])?;
    config.expect("qk_norm_type", &["per_layer".into()])?;
    config.expect("shared_intermediate_size", &[0.into()])?;
    config.expect_flag("use_qk_norm", true)?;
    config.expect_flag("use_routing_bias", true)?;
    // 1 is softmax attention; 0 was linear attention in MiniMax-01.
    match config.raw("attn_type_list") {
        Some(Value::Array(kinds)) if kinds.iter().any(|kind| *kind != 1) => {
            Err(unsupported("attn_type_list with layers of another kind than 1".to_owned()))
        }
        _ => Ok(()),
    }
}

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_silu()?;
    expect_published(config)?;
    let norm = NormSpec::rms(config.number("rms_norm_eps")?);
    let attention = attention_without_positions(config)?;
    let head_dim = attention.head_dim;
    let rotary = config.count_opt("rotary_dim")?.unwrap_or(head_dim);
    let rope = config.rope_of_part(head_dim, Some(rotary as f64 / head_dim as f64))?;
    let attention = AttentionSpec { qk_norm: QkNorm::WholeProjection(norm), rope: Some(rope), ..attention };
    let (experts, top_k) = (config.count("num_local_experts")?, config.count("num_experts_per_tok")?);
    let expert = MlpSpec::swiglu(config.count("intermediate_size")?);
    let router = RouterSpec::SigmoidGroups { groups: 1, top_groups: 1, normalise: true, scale: 1.0 };
    let moe = MoeSpec::plain(experts, top_k, expert, router);
    let layer = pre_norm(norm, MixerSpec::Attention(attention), FfnSpec::Moe(moe));
    decoder_like_llama(config, vec![layer; config.layers()?])
}
