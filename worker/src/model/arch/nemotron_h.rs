//! Nemotron-H (NVIDIA 2025) in the form of Nemotron 3: a layer is one norm and one block (Mamba-2,
//! attention without positions, a mixture or an MLP). Hugging Face `NemotronHForCausalLM`.

use super::*;

pub(super) const FAMILY: Family = Family {
    unused: &[
        ("the kinds of the layers say it", &["num_hidden_layers"]),
        ("training alone uses it", &["hidden_dropout", "rescale_prenorm_residual", "time_step_floor", "time_step_max"]),
        ("it says how Python runs the model", &["chunk_size", "mamba_ssm_cache_dtype", "use_mamba_kernels"]),
        ("it says how Python runs the model", &["moe_shared_expert_overlap", "num_logits_to_keep"]),
        (
            "the class does not read it",
            &["expand", "mamba_proj_bias", "n_shared_experts", "norm_eps", "time_step_limit"],
        ),
        ("nothing is rotated", &["partial_rotary_factor", "rope_scaling", "rope_theta"]),
        (
            "layers that predict later tokens are not part of the main stack",
            &["mtp_hybrid_override_pattern", "mtp_layers_block_type"],
        ),
    ],
    ..Family::new("NemotronHForCausalLM", &["nemotron_h"], "NemotronHConfig", spec, &NAMES)
};

const NAMES: Names = Names {
    tensors: &[&[
        (Role::Embedding, "{base}embeddings.weight"),
        (Role::FinalNorm, "{base}norm_f.weight"),
        (Role::Head, "lm_head.weight"),
        (Role::MixerNorm, "{base}layers.{layer}.norm.weight"),
        (Role::FfnNorm, "{base}layers.{layer}.norm.weight"),
        (Role::QProj, "{base}layers.{layer}.mixer.q_proj.weight"),
        (Role::KProj, "{base}layers.{layer}.mixer.k_proj.weight"),
        (Role::VProj, "{base}layers.{layer}.mixer.v_proj.weight"),
        (Role::OProj, "{base}layers.{layer}.mixer.o_proj.weight"),
        (Role::MambaInput, "{base}layers.{layer}.mixer.in_proj.weight"),
        (Role::MambaConvolution, "{base}layers.{layer}.mixer.conv1d.weight"),
        (Role::MambaConvolutionBias, "{base}layers.{layer}.mixer.conv1d.bias"),
        (Role::MambaDecay, "{base}layers.{layer}.mixer.A_log"),
        (Role::MambaStepBias, "{base}layers.{layer}.mixer.dt_bias"),
        (Role::MambaSkip, "{base}layers.{layer}.mixer.D"),
        (Role::MambaNorm, "{base}layers.{layer}.mixer.norm.weight"),
        (Role::MambaOutput, "{base}layers.{layer}.mixer.out_proj.weight"),
        (Role::UpProj, "{base}layers.{layer}.mixer.up_proj.weight"),
        (Role::DownProj, "{base}layers.{layer}.mixer.down_proj.weight"),
        (Role::Router, "{base}layers.{layer}.mixer.gate.weight"),
        (Role::CorrectionBias, "{base}layers.{layer}.mixer.gate.e_score_correction_bias"),
        (Role::ExpertUp, "{base}layers.{layer}.mixer.experts.{expert}.up_proj.weight"),
        (Role::ExpertDown, "{base}layers.{layer}.mixer.experts.{expert}.down_proj.weight"),
        (Role::SharedUp, "{base}layers.{layer}.mixer.shared_experts.up_proj.weight"),
        (Role::SharedDown, "{base}layers.{layer}.mixer.shared_experts.down_proj.weight"),
        (Role::LatentDown, "{base}layers.{layer}.mixer.fc1_latent_proj.weight"),
        (Role::LatentUp, "{base}layers.{layer}.mixer.fc2_latent_proj.weight"),
    ]],
    bases: &["backbone."],
    input_major: &[],
    ignored: &[Ignored { names: Pattern::Prefix("mtp."), why: "multi-token prediction" }],
};

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect("mlp_hidden_act", &["relu2".into()])?;
    config.expect("mamba_hidden_act", &["silu".into()])?;
    config.expect("sliding_window", &[Value::Null])?;
    // Older names of settings that the class also reads.
    for key in ["mamba_n_groups", "mamba_d_conv", "mamba_dt_min", "mamba_conv_bias"] {
        if config.has(key) {
            return Err(unsupported(format!("a setting under its older name {key}")));
        }
    }
    for key in ["attention_bias", "mlp_bias", "residual_in_fp32", "use_bias"] {
        config.expect_flag(key, false)?;
    }
    let norm = NormSpec::rms(config.number("layer_norm_epsilon")?);
    let attention = MixerSpec::Attention(attention_without_positions(config)?);
    let mamba = MixerSpec::Mamba(MambaSpec {
        heads: config.count("mamba_num_heads")?,
        head_dim: config.count("mamba_head_dim")?,
        groups: config.count("n_groups")?,
        state: config.count("ssm_state_size")?,
        kernel: config.count("conv_kernel")?,
        convolution_bias: config.flag("use_conv_bias")?,
        shortest_step: config.number("time_step_min")?,
        norm,
    });
    let (dense, moe) = (FfnSpec::Dense(mlp(config.count("intermediate_size")?)), FfnSpec::Moe(mixture(config)?));
    let layer = |kind| match kind {
        LayerKind::Mamba => pre_norm(norm, mamba.clone(), FfnSpec::None),
        LayerKind::Attention => pre_norm(norm, attention.clone(), FfnSpec::None),
        LayerKind::Mixture => pre_norm(norm, MixerSpec::None, moe.clone()),
        LayerKind::Mlp => pre_norm(norm, MixerSpec::None, dense.clone()),
    };
    decoder_like_llama(config, kinds(config)?.into_iter().map(layer).collect())
}

/// Kinds of layers.
#[derive(Clone, Copy)]
enum LayerKind {
    Mamba,
    Attention,
    Mixture,
    Mlp,
}

/// The kinds of all layers: a list of words, else a letter per layer.
fn kinds(config: &Config<'_>) -> Result<Vec<LayerKind>> {
    const PATTERN: &str = "hybrid_override_pattern";
    let listed = ["layers_block_type", "layer_types"].into_iter().find_map(|key| {
        // The class takes null for the first alone.
        let list = config.raw(key).filter(|list| key == "layer_types" || !list.is_null())?;
        Some((key, list))
    });
    let kinds: Vec<LayerKind> = match (listed, config.raw(PATTERN)) {
        (Some((key, list)), _) => {
            let words = list.as_array().ok_or_else(|| ill_typed(key, "a list of words", list))?;
            let of = |word: &Value| match word.as_str() {
                Some("linear_attention" | "mamba") => Ok(LayerKind::Mamba),
                Some("full_attention" | "attention") => Ok(LayerKind::Attention),
                Some("moe") => Ok(LayerKind::Mixture),
                Some("mlp") => Ok(LayerKind::Mlp),
                _ => Err(unsupported(format!("{key} {word}"))),
            };
            words.iter().map(of).collect::<Result<_>>()?
        }
        (None, Some(pattern)) => {
            let letters = pattern.as_str().ok_or_else(|| ill_typed(PATTERN, "a word", pattern))?;
            let of = |letter: char| match letter {
                'M' => Ok(LayerKind::Mamba),
                '*' => Ok(LayerKind::Attention),
                'E' => Ok(LayerKind::Mixture),
                '-' => Ok(LayerKind::Mlp),
                _ => Err(unsupported(format!("{PATTERN} with {letter:?}"))),
            };
            letters.chars().map(of).collect::<Result<_>>()?
        }
        (None, None) => {
            config.assume(PATTERN, &"ME*-".into());
            vec![LayerKind::Mamba, LayerKind::Mixture, LayerKind::Attention, LayerKind::Mlp]
        }
    };
    const MAX_LAYERS: usize = 4096;
    if kinds.len() > MAX_LAYERS {
        return Err(unsupported(format!("{} layers, more than {MAX_LAYERS}", kinds.len())));
    }
    Ok(kinds)
}

fn mlp(intermediate: usize) -> MlpSpec {
    MlpSpec { intermediate, kind: MlpKind::ReluSquared, bias: false }
}

fn mixture(config: &Config<'_>) -> Result<MoeSpec> {
    Ok(MoeSpec {
        experts: config.count("n_routed_experts")?,
        top_k: config.count("num_experts_per_tok")?,
        expert: mlp(config.count("moe_intermediate_size")?),
        router: sigmoid_groups(config, config.flag("norm_topk_prob")?)?,
        shared: Some(SharedSpec { mlp: mlp(config.count("moe_shared_expert_intermediate_size")?), gate: false }),
        beside: None,
        latent: config.count_opt("moe_latent_size")?,
    })
}
