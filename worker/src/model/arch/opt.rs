//! OPT (Zhang et al. 2022): learned positions from row 2 on, ReLU; the 350M model has its norms
//! after the residual additions and an embedding of half the width. Hugging Face `OPTForCausalLM`.

use super::*;

pub(super) const FAMILY: Family =
    Family { unused: UNUSED, ..Family::new("OPTForCausalLM", &["opt"], "OPTConfig", spec, &NAMES) };

const NAMES: Names = Names::new(
    &[&[
        (Role::Embedding, "{base}embed_tokens.weight"),
        (Role::Positions, "{base}embed_positions.weight"),
        (Role::ProjectIn, "{base}project_in.weight"),
        (Role::ProjectOut, "{base}project_out.weight"),
        (Role::FinalNorm, "{base}final_layer_norm.weight"),
        (Role::FinalNormBias, "{base}final_layer_norm.bias"),
        (Role::Head, "lm_head.weight"),
        (Role::MixerNorm, "{base}layers.{layer}.self_attn_layer_norm.weight"),
        (Role::MixerNormBias, "{base}layers.{layer}.self_attn_layer_norm.bias"),
        (Role::QProj, "{base}layers.{layer}.self_attn.q_proj.weight"),
        (Role::QProjBias, "{base}layers.{layer}.self_attn.q_proj.bias"),
        (Role::KProj, "{base}layers.{layer}.self_attn.k_proj.weight"),
        (Role::KProjBias, "{base}layers.{layer}.self_attn.k_proj.bias"),
        (Role::VProj, "{base}layers.{layer}.self_attn.v_proj.weight"),
        (Role::VProjBias, "{base}layers.{layer}.self_attn.v_proj.bias"),
        (Role::OProj, "{base}layers.{layer}.self_attn.out_proj.weight"),
        (Role::OProjBias, "{base}layers.{layer}.self_attn.out_proj.bias"),
        (Role::FfnNorm, "{base}layers.{layer}.final_layer_norm.weight"),
        (Role::FfnNormBias, "{base}layers.{layer}.final_layer_norm.bias"),
        (Role::UpProj, "{base}layers.{layer}.fc1.weight"),
        (Role::UpProjBias, "{base}layers.{layer}.fc1.bias"),
        (Role::DownProj, "{base}layers.{layer}.fc2.weight"),
        (Role::DownProjBias, "{base}layers.{layer}.fc2.bias"),
    ]],
    &["model.decoder.", "decoder.", ""],
);

/// Unused rows at the start of the position table.
const POSITION_OFFSET: usize = 2;
/// PyTorch's default; not in the configuration.
const NORM_EPS: f64 = 1e-5;

const UNUSED: &[Unused] = &[
    ("training alone uses it", &["activation_dropout", "dropout", "init_std", "layerdrop"]),
    ("transformers has no such attribute", &["output_projection"]),
];

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect("activation_function", &["relu".into()])?;
    config.expect_flag("enable_bias", true)?;
    config.expect_flag("layer_norm_elementwise_affine", true)?;
    let (hidden, heads) = (config.count("hidden_size")?, config.count("num_attention_heads")?);
    let positions = config.count("max_position_embeddings")?;
    let pre_norm = config.flag("do_layer_norm_before")?;
    let last_norm = !config.flag("_remove_final_layer_norm")? && pre_norm;
    let norm = NormSpec::layer(NORM_EPS);
    let attention = AttentionSpec {
        qkv_bias: true,
        output_bias: true,
        ..AttentionSpec::plain(heads, heads, hidden / heads.max(1))
    };
    let mlp = MlpSpec { intermediate: config.count("ffn_dim")?, kind: MlpKind::Relu, bias: true };
    let order = if pre_norm { NormOrder::Before } else { NormOrder::After };
    let mixer = MixerSpec::Attention(attention);
    let layer = LayerSpec { norm, order, mixer, ffn: FfnSpec::Dense(mlp), scalar: false };
    let embedding = EmbeddingSpec {
        width: config.count_or("word_embed_proj_dim", hidden)?,
        positions: Some(LearnedPositions { rows: positions + POSITION_OFFSET, offset: POSITION_OFFSET }),
        scale: None,
    };
    let decoder = decoder_like_llama(config, vec![layer; config.layers()?])?;
    Ok(DecoderSpec { embedding, final_norm: last_norm.then_some(norm), ..decoder })
}
