//! llama.cpp's names of a layer's matrices, from its `gguf` package and its conversion scripts.

use crate::model::decoder::Role;

/// Families that llama.cpp reads, with its names for them.
const FAMILIES: [(&str, &str); 27] = [
    ("AfmoeForCausalLM", "afmoe"),
    ("BailingMoeV2ForCausalLM", "bailingmoe2"),
    ("DeepseekV2ForCausalLM", "deepseek2"),
    ("DeepseekV32ForCausalLM", "deepseek32"),
    ("DeepseekV3ForCausalLM", "deepseek2"),
    ("GPT2LMHeadModel", "gpt2"),
    ("Gemma3ForCausalLM", "gemma3"),
    ("Gemma3ForConditionalGeneration", "gemma3"),
    ("Gemma4ForConditionalGeneration", "gemma4"),
    ("Glm4MoeForCausalLM", "glm4moe"),
    ("Glm4MoeLiteForCausalLM", "deepseek2"),
    ("GlmMoeDsaForCausalLM", "glm-dsa"),
    ("GptOssForCausalLM", "gpt-oss"),
    ("KimiK25ForConditionalGeneration", "deepseek2"),
    ("KimiLinearForCausalLM", "kimi-linear"),
    ("Llama4ForConditionalGeneration", "llama4"),
    ("LlamaForCausalLM", "llama"),
    ("MiniMaxM2ForCausalLM", "minimax-m2"),
    ("MixtralForCausalLM", "llama"),
    ("NemotronHForCausalLM", "nemotron_h_moe"),
    ("OlmoeForCausalLM", "olmoe"),
    ("Qwen2ForCausalLM", "qwen2"),
    ("Qwen3ForCausalLM", "qwen3"),
    ("Qwen3MoeForCausalLM", "qwen3moe"),
    ("Qwen3NextForCausalLM", "qwen3next"),
    ("Qwen3_5ForConditionalGeneration", "qwen35"),
    ("Qwen3_5MoeForConditionalGeneration", "qwen35moe"),
];

/// llama.cpp's name of the family of `architectures[0]`; `None` if it does not read it.
pub(super) fn of(architecture: &str) -> Option<&'static str> {
    FAMILIES.iter().find(|(ours, _)| *ours == architecture).map(|(_, theirs)| *theirs)
}

/// llama.cpp's names of a role's matrix, without layer and suffix. Several where a conversion, of
/// some version, splits the matrix; none if it is not a matrix of a layer. For latent attention's
/// [`Role::KvBProj`] the whole matrix; its halves have other inputs.
pub(super) fn tensors(family: &str, role: Role) -> &'static [&'static str] {
    match role {
        Role::QProj => &["attn_q"],
        Role::KProj => &["attn_k"],
        Role::VProj => &["attn_v"],
        Role::QkvProj | Role::DeltaQkv => &["attn_qkv"],
        Role::OProj => &["attn_output"],
        Role::OutputGate | Role::DeltaGate => &["attn_gate"],
        Role::QAProj => &["attn_q_a"],
        Role::QBProj => &["attn_q_b"],
        Role::KvAProj => &["attn_kv_a_mqa"],
        Role::KvBProj => &["attn_kv_b"],
        Role::DeltaQkvz => &["attn_gate", "attn_qkv", "ssm_in"],
        Role::DeltaBa => &["ssm_ba"],
        Role::DeltaStrength => &["ssm_beta"],
        Role::DeltaStep => &["ssm_alpha"],
        Role::DeltaGateDown => &["ssm_g_a"],
        Role::DeltaGateUp => &["ssm_g_b"],
        Role::DeltaStepDown => &["ssm_f_a"],
        Role::DeltaStepUp => &["ssm_f_b"],
        Role::DeltaOutput if family == "kimi-linear" => &["attn_output"],
        Role::DeltaOutput | Role::MambaOutput => &["ssm_out"],
        Role::MambaInput => &["ssm_in"],
        Role::GateProj => &["ffn_gate"],
        Role::UpProj => &["ffn_up"],
        Role::GateUpProj => &["ffn_gate", "ffn_up"],
        Role::DownProj => &["ffn_down"],
        Role::Router => &["ffn_gate_inp"],
        Role::ExpertGate => &["ffn_gate_exps"],
        Role::ExpertUp => &["ffn_up_exps"],
        Role::ExpertGateUp if family == "gemma4" => &["ffn_gate_up_exps"],
        Role::ExpertGateUp => &["ffn_gate_exps", "ffn_up_exps"],
        Role::ExpertDown => &["ffn_down_exps"],
        Role::SharedGate => &["ffn_gate_shexp"],
        Role::SharedUp => &["ffn_up_shexp"],
        Role::SharedGateUp => &["ffn_gate_shexp", "ffn_up_shexp"],
        Role::SharedDown => &["ffn_down_shexp"],
        Role::SharedExpertGate => &["ffn_gate_inp_shexp"],
        Role::LatentDown => &["ffn_latent_down"],
        Role::LatentUp => &["ffn_latent_up"],
        _ => &[],
    }
}

/// Whether a conversion reorders DeltaNet's value heads: the first of each key head, then the
/// second of each.
pub(super) fn reorders_value_heads(family: &str) -> bool {
    matches!(family, "qwen35" | "qwen35moe")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::arch;

    #[test]
    fn every_family_has_llama_cpp_names_or_is_listed_unsupported() {
        let unread: Vec<&str> = arch::known().filter(|architecture| of(architecture).is_none()).collect();
        assert_eq!(unread, ["GPTJForCausalLM", "OPTForCausalLM"]);
        assert!(FAMILIES.iter().all(|(ours, _)| arch::known().any(|known| known == *ours)));
    }
}
