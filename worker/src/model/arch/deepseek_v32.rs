//! DeepSeek-V3.2 (2025): DeepSeek-V3 with sparse attention beyond `index_topk` tokens. Up to that
//! length its indexer selects every key, which is DeepSeek-V3. Hugging Face
//! `DeepseekV32ForCausalLM`.

use super::*;

pub(super) const FAMILY: Family = Family {
    unused: &[
        NOT_OF_THE_HEADS,
        ("of the indexer: it selects every key", &["index_head_dim", "index_n_heads"]),
        ("transformers has no such attribute", &["ep_size"]),
    ],
    ..Family::new("DeepseekV32ForCausalLM", &["deepseek_v32"], "DeepseekV32Config", spec, &NAMES)
};

/// Names of this family and of those that build on it.
pub(super) const NAMES: Names = Names {
    // The first match gives the reason; a layer past the last has an indexer, too.
    ignored: &[NEXT_TOKEN_LAYERS, INDEXER],
    ..Names::new(deepseek_v3::TENSORS, &["model.", ""])
};

/// The class overwrites `head_dim`; `qk_head_dim` is a sum of two others.
pub(super) const NOT_OF_THE_HEADS: Unused = ("the widths of a head's parts say it", &["head_dim", "qk_head_dim"]);

pub(super) fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_flag("mlp_bias", false)?;
    config.expect_flag("rope_interleave", true)?;
    for (index, kind) in config.layer_types()?.into_iter().flatten().enumerate() {
        if kind != "indexed_attention" {
            return Err(unsupported(format!("layer_types[{index}] {kind:?}")));
        }
    }
    let dense_first = sparse_after_first(config)?;
    let sparse = sparse_by_types(config)?.unwrap_or(dense_first);
    let decoder = deepseek_v3::decoder(config, Pairing::Interleaved, sparse)?;
    Ok(DecoderSpec { selected_keys: Some(config.count("index_topk")?), ..decoder })
}
