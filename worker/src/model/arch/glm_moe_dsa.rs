//! GLM-5, 5.2 and 5.3 (2026): DeepSeek-V3.2 in other widths; later ones share an indexer between
//! layers. Hugging Face `GlmMoeDsaForCausalLM`.

use super::*;

pub(super) const FAMILY: Family = Family {
    unused: &[
        deepseek_v32::NOT_OF_THE_HEADS,
        ("of the indexer: it selects every key", INDEXER_KEYS),
        ("routers are computed in f32", &["moe_router_dtype"]),
        ("transformers has no such attribute", &["ep_size"]),
    ],
    ..Family::new("GlmMoeDsaForCausalLM", &["glm_moe_dsa"], "GlmMoeDsaConfig", deepseek_v32::spec, &deepseek_v32::NAMES)
};

const INDEXER_KEYS: &[&str] = &[
    "index_head_dim",
    "index_n_heads",
    "index_share_for_mtp_iteration",
    "index_skip_topk_offset",
    "index_topk_freq",
    "index_topk_pattern",
    "indexer_rope_interleave",
    "indexer_types",
];
