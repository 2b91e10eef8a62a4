//! OLMoE (Muennighoff et al. 2024): q/k norm over the whole projection, softmax top-k routing, not renormalised.
//! Hugging Face `OlmoeForCausalLM`.

use super::{Config, Family, LIKE_LLAMA, Names, attention_like_llama, decoder_like_llama};
use crate::decoder::{
    AttentionSpec, DecoderSpec, FfnSpec, GatedSpec, LayerSpec, MoeSpec, NormSpec, QkNorm, Role, RouterSpec,
};
use crate::error::Result;

pub(super) const FAMILY: Family = Family { architecture: "OlmoeForCausalLM", spec, names: &NAMES };

const NAMES: Names = Names {
    tensors: &[
        LIKE_LLAMA,
        &[
            (Role::QueryNorm, "model.layers.{layer}.self_attn.q_norm.weight"),
            (Role::KeyNorm, "model.layers.{layer}.self_attn.k_norm.weight"),
            (Role::Router, "model.layers.{layer}.mlp.gate.weight"),
            (Role::ExpertGate, "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"),
            (Role::ExpertUp, "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"),
            (Role::ExpertDown, "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"),
        ],
    ],
    ignored_suffixes: &[],
};

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_activation("silu")?;
    let norm = NormSpec { eps: config.number_opt("rms_norm_eps")?.unwrap_or(1e-5) };
    let attention = AttentionSpec {
        qk_norm: QkNorm::WholeProjection(norm),
        clip_qkv: config.number_opt("clip_qkv")?,
        ..attention_like_llama(config)?
    };
    let ffn = FfnSpec::Moe(MoeSpec {
        experts: config.count_opt("num_experts")?.unwrap_or(64),
        top_k: config.count_opt("num_experts_per_tok")?.unwrap_or(8),
        expert: GatedSpec { intermediate: config.count("intermediate_size")?, bias: false },
        router: RouterSpec::SoftmaxTopK { normalise: config.flag("norm_topk_prob", false)? },
    });
    decoder_like_llama(config, LayerSpec { mixer_norm: norm, attention, ffn_norm: norm, ffn })
}
