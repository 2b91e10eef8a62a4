//! GLM-4.7-Flash (2026): DeepSeek-V3's layers under GLM's configuration, values wider than keys.
//! Hugging Face `Glm4MoeLiteForCausalLM`.

use super::{Config, Family, NEXT_TOKEN_LAYERS, Names, deepseek_v3, sparse_by_types};
use crate::error::Result;
use crate::model::decoder::DecoderSpec;
use crate::model::rope::Pairing;

pub(super) const FAMILY: Family = Family {
    architecture: "Glm4MoeLiteForCausalLM",
    model_types: &["glm4_moe_lite"],
    class: "Glm4MoeLiteConfig",
    wrapper: None,
    spec,
    unused: &[
        ("`mlp_layer_types` says it, and one layer is dense where that is absent", &["first_k_dense_replace"]),
        ("the widths of a head's parts say it", &["qk_head_dim"]),
    ],
    names: &NAMES,
    unstacked: None,
};

const NAMES: Names =
    Names { tensors: deepseek_v3::TENSORS, bases: &["model.", ""], input_major: &[], ignored: &[NEXT_TOKEN_LAYERS] };

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    let pairing = if config.flag("rope_interleave")? { Pairing::Interleaved } else { Pairing::Halves };
    let dense_first = (0..config.layers()?).map(|layer| layer > 0).collect();
    let sparse = sparse_by_types(config)?.unwrap_or(dense_first);
    deepseek_v3::decoder(config, pairing, sparse)
}
