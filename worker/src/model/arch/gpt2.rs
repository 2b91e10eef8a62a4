//! GPT-2 (Radford et al. 2019): learned positions, LayerNorm, fused q/k/v, matrices stored `[in,
//! out]`. Hugging Face `GPT2LMHeadModel`.

use super::*;

pub(super) const FAMILY: Family =
    Family { unused: UNUSED, ..Family::new("GPT2LMHeadModel", &["gpt2"], "GPT2Config", spec, &NAMES) };

const NAMES: Names = Names {
    tensors: &[&[
        (Role::Embedding, "{base}wte.weight"),
        (Role::Positions, "{base}wpe.weight"),
        (Role::FinalNorm, "{base}ln_f.weight"),
        (Role::FinalNormBias, "{base}ln_f.bias"),
        (Role::Head, "lm_head.weight"),
        (Role::MixerNorm, "{base}h.{layer}.ln_1.weight"),
        (Role::MixerNormBias, "{base}h.{layer}.ln_1.bias"),
        (Role::QkvProj, "{base}h.{layer}.attn.c_attn.weight"),
        (Role::QkvProjBias, "{base}h.{layer}.attn.c_attn.bias"),
        (Role::OProj, "{base}h.{layer}.attn.c_proj.weight"),
        (Role::OProjBias, "{base}h.{layer}.attn.c_proj.bias"),
        (Role::FfnNorm, "{base}h.{layer}.ln_2.weight"),
        (Role::FfnNormBias, "{base}h.{layer}.ln_2.bias"),
        (Role::UpProj, "{base}h.{layer}.mlp.c_fc.weight"),
        (Role::UpProjBias, "{base}h.{layer}.mlp.c_fc.bias"),
        (Role::DownProj, "{base}h.{layer}.mlp.c_proj.weight"),
        (Role::DownProjBias, "{base}h.{layer}.mlp.c_proj.bias"),
    ]],
    bases: &["", "transformer."],
    input_major: &[Role::QkvProj, Role::OProj, Role::UpProj, Role::DownProj],
    ignored: CAUSAL_MASK,
};

pub(super) const CAUSAL_MASK: &[Ignored] = &[
    Ignored { names: Pattern::Suffix(".attn.bias"), why: "causal mask (a buffer)" },
    Ignored { names: Pattern::Suffix(".attn.masked_bias"), why: "causal mask (a buffer)" },
];

const UNUSED: &[Unused] = &[
    ("training alone uses it", &["attn_pdrop", "embd_pdrop", "resid_pdrop"]),
    ("classifiers alone use it", SUMMARY),
    ("what is rounded in half precision alone depends on it", &["reorder_and_upcast_attn"]),
    ("the length of the table of positions says it", &["n_ctx"]),
    ("transformers has no such attribute", &["n_special", "output_past", "predict_special_tokens"]),
];
/// Keys of a head that causal language models do not have.
pub(super) const SUMMARY: &[&str] =
    &["summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"];

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect("activation_function", &["gelu_new".into()])?;
    config.expect_flag("scale_attn_weights", true)?;
    config.expect_flag("scale_attn_by_inverse_layer_idx", false)?;
    config.expect_flag("add_cross_attention", false)?;
    let (hidden, heads, rows) = (config.count("n_embd")?, config.count("n_head")?, config.count("n_positions")?);
    let norm = NormSpec::layer(config.number("layer_norm_epsilon")?);
    let attention = AttentionSpec {
        fused_qkv: true,
        qkv_bias: true,
        output_bias: true,
        ..AttentionSpec::plain(heads, heads, hidden / heads.max(1))
    };
    let intermediate = config.count_or("n_inner", 4 * hidden)?;
    let mlp = MlpSpec { intermediate, kind: MlpKind::GeluTanh, bias: true };
    let mixer = MixerSpec::Attention(attention);
    let layer = LayerSpec { norm, order: NormOrder::Before, mixer, ffn: FfnSpec::Dense(mlp), scalar: false };
    let decoder = decoder_of_width(config, hidden, rows, vec![layer; config.layers_under("n_layer")?])?;
    let positions = Some(LearnedPositions { rows, offset: 0 });
    Ok(DecoderSpec { embedding: EmbeddingSpec { positions, ..decoder.embedding }, ..decoder })
}
