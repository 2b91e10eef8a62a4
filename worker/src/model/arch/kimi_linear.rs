//! Kimi Linear (Moonshot 2025): three DeltaNet layers with a decay per key channel for each layer
//! of latent attention without rotation, and DeepSeek-V3's routing under Mixtral's names. Hugging
//! Face `KimiLinearForCausalLM`; the code of `auto_map` is not needed.

use serde_json::json;

use super::*;

pub(super) const FAMILY: Family = Family {
    unused: &[
        ("the widths of a head's parts say it", &["head_dim", "qk_head_dim"]),
        ("nothing is rotated", &["rope_parameters", "rope_scaling", "rope_theta"]),
        ("one group is no group", &["use_grouped_topk"]),
    ],
    ..Family::new("KimiLinearForCausalLM", &["kimi_linear"], "KimiLinearConfig", spec, &NAMES)
};

const NAMES: Names = Names::new(
    &[
        &[
            (Role::DeltaQueryConvolution, "{base}layers.{layer}.self_attn.q_conv1d.weight"),
            (Role::DeltaKeyConvolution, "{base}layers.{layer}.self_attn.k_conv1d.weight"),
            (Role::DeltaValueConvolution, "{base}layers.{layer}.self_attn.v_conv1d.weight"),
            (Role::DeltaGateDown, "{base}layers.{layer}.self_attn.g_a_proj.weight"),
            (Role::DeltaGateUp, "{base}layers.{layer}.self_attn.g_b_proj.weight"),
            (Role::DeltaStrength, "{base}layers.{layer}.self_attn.b_proj.weight"),
            (Role::DeltaStepDown, "{base}layers.{layer}.self_attn.f_a_proj.weight"),
            (Role::DeltaStepUp, "{base}layers.{layer}.self_attn.f_b_proj.weight"),
            (Role::DeltaDecay, "{base}layers.{layer}.self_attn.A_log"),
            (Role::DeltaStepBias, "{base}layers.{layer}.self_attn.dt_bias"),
            (Role::DeltaNorm, "{base}layers.{layer}.self_attn.o_norm.weight"),
            (Role::DeltaOutput, "{base}layers.{layer}.self_attn.o_proj.weight"),
            (Role::CorrectionBias, "{base}layers.{layer}.block_sparse_moe.gate.e_score_correction_bias"),
            (Role::SharedGate, "{base}layers.{layer}.block_sparse_moe.shared_experts.gate_proj.weight"),
            (Role::SharedUp, "{base}layers.{layer}.block_sparse_moe.shared_experts.up_proj.weight"),
            (Role::SharedDown, "{base}layers.{layer}.block_sparse_moe.shared_experts.down_proj.weight"),
        ],
        LIKE_LLAMA,
        mixtral::EXPERTS,
        deepseek_v3::LATENT,
    ],
    &["model.", ""],
);

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_silu()?;
    config.expect("moe_router_activation_func", &["sigmoid".into()])?;
    config.expect("moe_layer_freq", &[1.into()])?;
    config.expect_flag("mla_use_nope", true)?;
    let eps = config.number("rms_norm_eps")?;
    let norm = NormSpec::rms(eps);
    let (latent, delta) = (deepseek_v3::latent_without_rotation(config)?, delta_net(config, eps)?);
    let (dense, moe) = (MlpSpec::swiglu(config.count("intermediate_size")?), mixture(config)?);
    let layer = |(sees_all, sparse): (bool, bool)| {
        let mixer = if sees_all { MixerSpec::Latent(latent.clone()) } else { MixerSpec::DeltaNet(delta) };
        pre_norm(norm, mixer, if sparse { FfnSpec::Moe(moe.clone()) } else { FfnSpec::Dense(dense) })
    };
    let kinds = sees_all(config)?.into_iter().zip(sparse(config)?);
    decoder_like_llama(config, kinds.map(layer).collect())
}

/// The published code's settings of the DeltaNet, with priority over the class's.
const OF_DELTA_NET: &str = "linear_attn_config";

/// One of these settings; `None` if it is missing.
fn of_delta_net<'a>(config: &Config<'a>, key: &str) -> Result<Option<&'a Value>> {
    if !config.has(OF_DELTA_NET) {
        config.assume(OF_DELTA_NET, &json!({}));
        return Ok(None);
    }
    Ok(config.object(OF_DELTA_NET)?.get(key))
}

fn wrong(key: &str, wanted: &str, found: &Value) -> WorkerError {
    ill_typed(&format!("{OF_DELTA_NET}.{key}"), wanted, found)
}

fn delta_net(config: &Config<'_>, eps: f64) -> Result<DeltaNetSpec> {
    let count = |published: &str, key: &str| -> Result<usize> {
        let of_class = config.count(key)?;
        let Some(value) = of_delta_net(config, published)? else { return Ok(of_class) };
        let number = value.as_u64().filter(|number| *number < 1 << 31).map(|number| number as usize);
        number.ok_or_else(|| wrong(published, "a whole number", value))
    };
    let (heads, width) = (count("num_heads", "linear_num_heads")?, count("head_dim", "linear_head_dim")?);
    Ok(DeltaNetSpec {
        key_heads: heads,
        value_heads: heads,
        key_dim: width,
        value_dim: width,
        kernel: count("short_conv_kernel_size", "linear_conv_kernel_dim")?,
        stored: DeltaStored::Apart,
        norm: NormSpec::rms(eps),
    })
}

/// Layers with latent attention: by `layer_types`, else by the published lists, which count from
/// 1.
fn sees_all(config: &Config<'_>) -> Result<Vec<bool>> {
    let layers = config.layers()?;
    if let Some(kinds) = config.layer_types()? {
        let of = |(index, kind): (usize, &str)| match kind {
            "full_attention" => Ok(true),
            "linear_attention" => Ok(false),
            _ => Err(unsupported(format!("layer_types[{index}] {kind:?}"))),
        };
        return kinds.into_iter().enumerate().map(of).collect();
    }
    const LISTS: [&str; 2] = ["full_attn_layers", "kda_layers"];
    let [full, linear] = LISTS.map(|key| of_delta_net(config, key));
    let (Some(full), Some(linear)) = (full?, linear?) else {
        return Ok((0..layers).map(|layer| layer > 0 && layer.is_multiple_of(4)).collect());
    };
    let mut kinds = vec![None; layers];
    for (key, list, sees_all) in [(LISTS[0], full, true), (LISTS[1], linear, false)] {
        let refuse = || wrong(key, &format!("a list of layers from 1 to {layers}"), list);
        for layer in list.as_array().ok_or_else(refuse)? {
            let layer = layer.as_u64().and_then(|layer| usize::try_from(layer).ok()?.checked_sub(1));
            *layer.and_then(|layer| kinds.get_mut(layer)).ok_or_else(refuse)? = Some(sees_all);
        }
    }
    let all: Option<Vec<bool>> = kinds.into_iter().collect();
    let wanted = || format!("a list that holds, with {}, each of the {layers} layers of num_hidden_layers", LISTS[0]);
    all.ok_or_else(|| wrong(LISTS[1], &wanted(), linear))
}

/// Layers with experts: by `mlp_layer_types`, else all but the first.
fn sparse(config: &Config<'_>) -> Result<Vec<bool>> {
    const DENSE: &str = "first_k_dense_replace";
    let dense = if config.has(DENSE) { config.count(DENSE)? } else { 1 };
    let after_dense = (0..config.layers()?).map(|layer| layer >= dense).collect();
    Ok(sparse_by_types(config)?.unwrap_or(after_dense))
}

fn mixture(config: &Config<'_>) -> Result<MoeSpec> {
    let router = RouterSpec::SigmoidGroups {
        groups: config.count("num_expert_group")?,
        top_groups: config.count("topk_group")?,
        normalise: config.flag("moe_renormalize")?,
        scale: config.number("routed_scaling_factor")?,
    };
    let moe = MoeSpec::plain(
        config.count("num_experts")?,
        config.count("num_experts_per_token")?,
        MlpSpec::swiglu(config.count("moe_intermediate_size")?),
        router,
    );
    Ok(moe.sharing(config.count("num_shared_experts")?))
}
