//! DeepSeek-V2 and V2-Lite (2024): latent attention, softmax routing without renormalisation, with
//! or without group limits. Hugging Face `DeepseekV2ForCausalLM`.

use super::*;

pub(super) const FAMILY: Family = Family {
    unused: &[
        ("the widths of a head's parts say it", &["head_dim", "qk_head_dim"]),
        ("transformers has no such attribute", &["ep_size"]),
    ],
    ..Family::new("DeepseekV2ForCausalLM", &["deepseek_v2"], "DeepseekV2Config", spec, &NAMES)
};

const NAMES: Names = Names { ignored: &[ROTARY_BUFFERS], ..Names::new(deepseek_v3::TENSORS, &["model.", ""]) };

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_silu()?;
    config.expect_flag("mlp_bias", false)?;
    config.expect_flag("norm_topk_prob", false)?;
    config.expect("scoring_func", &["softmax".into()])?;
    config.expect("moe_layer_freq", &[1.into()])?;
    let norm = NormSpec::rms(config.number("rms_norm_eps")?);
    let mixer = MixerSpec::Latent(deepseek_v3::latent(config, Pairing::Interleaved)?);
    let moe = MoeSpec::plain(
        config.count("n_routed_experts")?,
        config.count("num_experts_per_tok")?,
        MlpSpec::swiglu(config.count("moe_intermediate_size")?),
        router(config)?,
    )
    .sharing(config.count("n_shared_experts")?);
    let dense = MlpSpec::swiglu(config.count("intermediate_size")?);
    let layer = |sparse| {
        let ffn = if sparse { FfnSpec::Moe(moe.clone()) } else { FfnSpec::Dense(dense) };
        pre_norm(norm, mixer.clone(), ffn)
    };
    decoder_like_llama(config, sparse_after_first(config)?.into_iter().map(layer).collect())
}

fn router(config: &Config<'_>) -> Result<RouterSpec> {
    let (groups, top_groups) = (config.count_opt("n_group")?, config.count_opt("topk_group")?);
    let scale = config.number("routed_scaling_factor")?;
    match config.word("topk_method")? {
        "greedy" => Ok(RouterSpec::SoftmaxGroups { groups: 1, top_groups: 1, scale }),
        "group_limited_greedy" => {
            // 0 groups are refused later, with the numbers.
            let (groups, top_groups) = (groups.unwrap_or(0), top_groups.unwrap_or(0));
            Ok(RouterSpec::SoftmaxGroups { groups, top_groups, scale })
        }
        other => Err(unsupported(format!("topk_method {other:?} (known: greedy, group_limited_greedy)"))),
    }
}
