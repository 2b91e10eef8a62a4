//! Kimi-K2.5 and K2.6 (2026), the text part: Kimi-K2 under a prefix, with 4-bit integer experts.
//! Hugging Face `KimiK25ForConditionalGeneration`.

use super::*;

pub(super) const FAMILY: Family = Family {
    wrapper: Some("Kimi_K25Config"),
    unused: UNUSED,
    ..Family::new("KimiK25ForConditionalGeneration", &["kimi_k25"], "DeepseekV3Config", deepseek_v3::spec, &NAMES)
};

const NAMES: Names = Names {
    tensors: &[
        &[(Role::Head, "language_model.lm_head.weight")],
        LIKE_LLAMA,
        SEPARATE_EXPERTS,
        SHARED_EXPERTS,
        deepseek_v3::LATENT,
    ],
    bases: &["language_model.model."],
    input_major: &[],
    ignored: &[
        NEXT_TOKEN_LAYERS,
        ROTARY_BUFFERS,
        Ignored { names: Pattern::Prefix("vision_tower."), why: "vision tower" },
        Ignored { names: Pattern::Prefix("mm_projector."), why: "vision tower" },
    ],
};

const UNUSED: &[Unused] = &[
    ("the text part alone is computed", &["projection_hidden_size", "projection_layer_norm_eps", "vision_config"]),
    (
        "the text part alone is computed",
        &["image_token_id", "video_token_id", "vision_end_token_id", "vision_start_token_id"],
    ),
    ("the settings of the text part count", &["tie_word_embeddings"]),
    ("transformers has no such attribute", &["ep_size", "ignore_index", "media_placeholder_token_id"]),
];
