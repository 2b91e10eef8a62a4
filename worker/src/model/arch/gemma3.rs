//! Gemma 3 (Google 2025), the text part of a multimodal checkpoint. Hugging Face
//! `Gemma3ForConditionalGeneration`.

use super::*;

pub(super) const FAMILY: Family = Family {
    wrapper: Some("Gemma3Config"),
    unused: UNUSED,
    ..Family::new("Gemma3ForConditionalGeneration", &["gemma3"], "Gemma3TextConfig", spec, &NAMES)
};

const NAMES: Names = Names {
    tensors: &[&[(Role::Head, "language_model.lm_head.weight")], gemma3_text::SANDWICH, LIKE_LLAMA],
    bases: &["language_model.model."],
    input_major: &[],
    ignored: &[
        Ignored { names: Pattern::Prefix("vision_tower."), why: "vision tower" },
        Ignored { names: Pattern::Prefix("multi_modal_projector."), why: "vision tower" },
    ],
};

const UNUSED: &[Unused] = &[
    ("the text part alone is computed", &["image_token_index", "mm_tokens_per_image", "vision_config"]),
    ("the text part alone is computed", &["boi_token_index", "eoi_token_index"]),
    ("the text part alone is computed", &["boi_token_id", "eoi_token_id", "image_token_id"]),
    ("it says how Python runs the model", &["cache_implementation"]),
];

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    // The multimodal class of transformers does not cap logits, which the text class does.
    config.expect("final_logit_softcapping", &[Value::Null])?;
    gemma3_text::spec(config)
}
