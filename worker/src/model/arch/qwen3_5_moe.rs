//! Qwen3.5 and 3.6 mixtures (2026), the text part: Qwen3-Next with separate DeltaNet projections
//! and weights that are always renormalised. Experts are stacked, or separate in FP8. Hugging Face
//! `Qwen3_5MoeForConditionalGeneration`.

use super::*;

pub(super) const FAMILY: Family = Family {
    wrapper: Some("Qwen3_5MoeConfig"),
    unused: qwen3_5::UNUSED,
    unstacked: Some(&UNSTACKED),
    ..Family::new("Qwen3_5MoeForConditionalGeneration", &["qwen3_5_moe"], "Qwen3_5MoeTextConfig", spec, &NAMES)
};

const NAMES: Names = Names {
    tensors: &[
        qwen3_5::PROJECTIONS,
        qwen3_next::DELTA_NET,
        qwen3_next::SHARED_EXPERT,
        &[
            (Role::ExpertGateUp, "{base}layers.{layer}.mlp.experts.gate_up_proj"),
            (Role::ExpertDown, "{base}layers.{layer}.mlp.experts.down_proj"),
        ],
        LIKE_LLAMA,
        SEPARATE_EXPERTS,
    ],
    bases: &["model.language_model."],
    input_major: &[],
    ignored: qwen3_5::IGNORED,
};

const UNSTACKED: Names = Names {
    tensors: &[qwen3_5::PROJECTIONS, qwen3_next::DELTA_NET, qwen3_next::SHARED_EXPERT, LIKE_LLAMA, SEPARATE_EXPERTS],
    ..NAMES
};

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_flag("attn_output_gate", true)?;
    let moe = FfnSpec::Moe(qwen3_next::mixture(config, GateUp::Halves, true)?);
    qwen3_next::decoder(config, DeltaStored::ByKind, vec![moe; config.layers()?])
}
