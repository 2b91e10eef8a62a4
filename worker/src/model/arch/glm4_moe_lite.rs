//! GLM-4.7-Flash (2026): DeepSeek-V3's layers under GLM's configuration, values wider than keys.
//! Hugging Face `Glm4MoeLiteForCausalLM`.

use super::*;

pub(super) const FAMILY: Family = Family {
    unused: &[
        ("`mlp_layer_types` says it, and one layer is dense where that is absent", &["first_k_dense_replace"]),
        ("the widths of a head's parts say it", &["qk_head_dim"]),
    ],
    ..Family::new("Glm4MoeLiteForCausalLM", &["glm4_moe_lite"], "Glm4MoeLiteConfig", spec, &NAMES)
};

const NAMES: Names = Names { ignored: &[NEXT_TOKEN_LAYERS], ..Names::new(deepseek_v3::TENSORS, &["model.", ""]) };

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    let pairing = if config.flag("rope_interleave")? { Pairing::Interleaved } else { Pairing::Halves };
    let dense_first = (0..config.layers()?).map(|layer| layer > 0).collect();
    let sparse = sparse_by_types(config)?.unwrap_or(dense_first);
    deepseek_v3::decoder(config, pairing, sparse)
}
