//! Qwen3 mixtures (2025): q/k norm per head, softmax top-k routing, renormalised. Hugging Face `Qwen3MoeForCausalLM`.

use super::{
    Config, Family, LIKE_LLAMA, Names, SEPARATE_EXPERTS, attention_like_llama, decoder_like_llama, pre_norm,
    sparse_layers, windowed_from,
};
use crate::decoder::{AttentionSpec, DecoderSpec, FfnSpec, MixerSpec, MlpSpec, MoeSpec, NormSpec, QkNorm, RouterSpec};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { architecture: "Qwen3MoeForCausalLM", spec, names: &NAMES };

const NAMES: Names =
    Names { tensors: &[LIKE_LLAMA, SEPARATE_EXPERTS], bases: &["model."], input_major: &[], ignored: &[] };

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_word("hidden_act", "silu")?;
    let norm = NormSpec::rms(config.number_opt("rms_norm_eps")?.unwrap_or(1e-6));
    let moe = MoeSpec {
        experts: config.count("num_experts")?,
        top_k: config.count("num_experts_per_tok")?,
        expert: MlpSpec::swiglu(config.count("moe_intermediate_size")?),
        router: RouterSpec::SoftmaxTopK { normalise: config.flag("norm_topk_prob", false)? },
        shared: None,
    };
    let layer = |(index, sparse)| {
        let attention = AttentionSpec {
            qk_norm: QkNorm::PerHead(norm),
            window: windowed_from(config, index)?,
            ..attention_like_llama(config)?
        };
        let ffn = if sparse {
            FfnSpec::Moe(moe.clone())
        } else {
            FfnSpec::Dense(MlpSpec::swiglu(config.count("intermediate_size")?))
        };
        Ok(pre_norm(norm, MixerSpec::Attention(attention), ffn))
    };
    decoder_like_llama(config, sparse_layers(config)?.into_iter().enumerate().map(layer).collect::<Result<_>>()?)
}
