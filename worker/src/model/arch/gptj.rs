//! GPT-J (Wang and Komatsuzaki 2021): one norm feeds attention and MLP side by side, interleaved
//! rotation of a part of each head, a head with a bias. Hugging Face `GPTJForCausalLM`.

use super::*;

pub(super) const FAMILY: Family =
    Family { unused: UNUSED, ..Family::new("GPTJForCausalLM", &["gptj"], "GPTJConfig", spec, &NAMES) };

const NAMES: Names = Names {
    tensors: &[&[
        (Role::Embedding, "{base}wte.weight"),
        (Role::FinalNorm, "{base}ln_f.weight"),
        (Role::FinalNormBias, "{base}ln_f.bias"),
        (Role::Head, "lm_head.weight"),
        (Role::HeadBias, "lm_head.bias"),
        (Role::MixerNorm, "{base}h.{layer}.ln_1.weight"),
        (Role::MixerNormBias, "{base}h.{layer}.ln_1.bias"),
        (Role::QProj, "{base}h.{layer}.attn.q_proj.weight"),
        (Role::KProj, "{base}h.{layer}.attn.k_proj.weight"),
        (Role::VProj, "{base}h.{layer}.attn.v_proj.weight"),
        (Role::OProj, "{base}h.{layer}.attn.out_proj.weight"),
        (Role::UpProj, "{base}h.{layer}.mlp.fc_in.weight"),
        (Role::UpProjBias, "{base}h.{layer}.mlp.fc_in.bias"),
        (Role::DownProj, "{base}h.{layer}.mlp.fc_out.weight"),
        (Role::DownProjBias, "{base}h.{layer}.mlp.fc_out.bias"),
    ]],
    bases: &["transformer.", ""],
    input_major: &[],
    ignored: gpt2::CAUSAL_MASK,
};

const UNUSED: &[Unused] = &[
    ("training alone uses it", &["attn_pdrop", "embd_pdrop", "resid_pdrop"]),
    ("classifiers alone use it", gpt2::SUMMARY),
    ("rotations need no table of positions", &["n_ctx"]),
];
/// Base of the frequencies; not in the configuration.
const THETA: f64 = 10_000.0;

fn spec(config: &Config<'_>) -> Result<DecoderSpec> {
    config.expect("activation_function", &["gelu_new".into()])?;
    config.expect_flag("rotary", true)?;
    config.expect_flag("scale_attn_weights", true)?;
    let (hidden, heads) = (config.count("n_embd")?, config.count("n_head")?);
    let head_dim = hidden / heads.max(1);
    let norm = NormSpec::layer(config.number("layer_norm_epsilon")?);
    let rotary = config.count("rotary_dim")?;
    let rope = RopeSpec { theta: THETA, dims: rotary, pairing: Pairing::Interleaved, scaling: RopeScaling::None };
    let attention = AttentionSpec { rope: Some(rope), ..AttentionSpec::plain(heads, heads, head_dim) };
    let intermediate = config.count_or("n_inner", 4 * hidden)?;
    let mlp = MlpSpec { intermediate, kind: MlpKind::GeluTanh, bias: true };
    let mixer = MixerSpec::Attention(attention);
    let layer = LayerSpec { norm, order: NormOrder::Shared, mixer, ffn: FfnSpec::Dense(mlp), scalar: false };
    let layers = vec![layer; config.layers_under("n_layer")?];
    let decoder = decoder_of_width(config, hidden, config.count("n_positions")?, layers)?;
    Ok(DecoderSpec { head: HeadSpec { bias: true, ..decoder.head }, ..decoder })
}
