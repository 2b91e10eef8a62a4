//! Qwen3.5 and 3.6 (2026), dense, the text part: Qwen3-Next's layers with separate DeltaNet
//! projections. Hugging Face `Qwen3_5ForConditionalGeneration`.

use super::*;

pub(super) const FAMILY: Family = Family {
    wrapper: Some("Qwen3_5Config"),
    unused: UNUSED,
    ..Family::new("Qwen3_5ForConditionalGeneration", &["qwen3_5"], "Qwen3_5TextConfig", spec, &NAMES)
};

const NAMES: Names = Names {
    ignored: IGNORED,
    ..Names::new(&[PROJECTIONS, qwen3_next::DELTA_NET, LIKE_LLAMA], &["model.language_model."])
};

/// Names of DeltaNet's projections.
pub(super) const PROJECTIONS: &[(Role, &str)] = &[
    (Role::DeltaQkv, "{base}layers.{layer}.linear_attn.in_proj_qkv.weight"),
    (Role::DeltaGate, "{base}layers.{layer}.linear_attn.in_proj_z.weight"),
    (Role::DeltaStrength, "{base}layers.{layer}.linear_attn.in_proj_b.weight"),
    (Role::DeltaStep, "{base}layers.{layer}.linear_attn.in_proj_a.weight"),
];

pub(super) const IGNORED: &[Ignored] =
    &[qwen3_next::NEXT_TOKENS, Ignored { names: Pattern::Prefix("model.visual."), why: "vision tower" }];

pub(super) const UNUSED: &[Unused] = &[
    (
        "the text part alone is computed",
        &["image_token_id", "video_token_id", "vision_config", "vision_end_token_id", "vision_start_token_id"],
    ),
    (
        "layers that predict later tokens are not part of the main stack",
        &["mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"],
    ),
    ("transformers has no such attribute", &["mamba_ssm_dtype", "mlp_only_layers"]),
];

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_flag("attn_output_gate", true)?;
    let dense = FfnSpec::Dense(MlpSpec::swiglu(config.count("intermediate_size")?));
    qwen3_next::decoder(config, DeltaStored::ByKind, vec![dense; config.layers()?])
}
