//! OLMoE (Muennighoff et al. 2024): q/k norm over the whole projection, softmax top-k routing, not
//! renormalised. Hugging Face `OlmoeForCausalLM`.

use super::*;

pub(super) const FAMILY: Family = Family::new("OlmoeForCausalLM", &["olmoe"], "OlmoeConfig", spec, &NAMES);

const NAMES: Names = Names::new(&[LIKE_LLAMA, SEPARATE_EXPERTS], &["model.", ""]);

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect_silu()?;
    let norm = NormSpec::rms(config.number("rms_norm_eps")?);
    let attention = AttentionSpec {
        qk_norm: QkNorm::WholeProjection(norm),
        clip_qkv: config.number_opt("clip_qkv")?,
        ..attention_like_llama(config)?
    };
    let expert = MlpSpec::swiglu(config.count("intermediate_size")?);
    let router = RouterSpec::SoftmaxTopK { normalise: config.flag("norm_topk_prob")? };
    let moe = MoeSpec::plain(config.count("num_experts")?, config.count("num_experts_per_tok")?, expert, router);
    let layer = pre_norm(norm, MixerSpec::Attention(attention), FfnSpec::Moe(moe));
    decoder_like_llama(config, vec![layer; config.layers()?])
}
