use outliers_protocol::FailureKind;
use serde_json::{Value, json};

use super::super::{Architecture, FAMILIES, read};
use super::class::Class;
use super::*;
use crate::model::decoder::{AttentionSpec, FfnSpec, MixerSpec, MlpKind, RouterSpec, Window};
use crate::model::rope::RopeSpec;
use crate::model::rope::{Pairing, RopeScaling};

/// A configuration of the architecture with only these settings.
fn with(architecture: &str, settings: Value) -> Value {
    let mut config = json!({"architectures": [architecture]});
    let nested = FAMILIES.iter().any(|family| family.architecture == architecture && family.wrapper.is_some());
    let settings = if nested { json!({"text_config": settings}) } else { settings };
    config.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    config
}

fn attention(architecture: &str, settings: Value, layer: usize) -> AttentionSpec {
    match &read(&with(architecture, settings)).unwrap().spec.layers[layer].mixer {
        MixerSpec::Attention(attention) => attention.clone(),
        other => panic!("{other:?}"),
    }
}

fn refused(architecture: &str, settings: Value) -> WorkerError {
    read(&with(architecture, settings.clone())).map(|_| panic!("{settings} was read")).unwrap_err()
}

/// Settings that classes leave open or default otherwise, as in all published models: the width of
/// GLM's heads, DeepSeek-V2's experts per token, Gemma 4's layers without inputs of their own.
fn published() -> Value {
    json!({"head_dim": 64, "num_experts_per_tok": 2, "hidden_size_per_layer_input": 0})
}

#[test]
fn empty_config_equals_the_class_defaults() {
    for family in FAMILIES {
        let Architecture { reading, .. } = read(&with(family.architecture, published())).unwrap();
        assert_eq!(reading.class, family.class);
        assert!(reading.defaults.len() > 5, "{}: {:?}", family.class, reading.defaults);
    }
    let theta = |architecture| attention(architecture, json!({}), 0).rope.unwrap().theta;
    assert_eq!(
        [theta("MixtralForCausalLM"), theta("GptOssForCausalLM"), theta("LlamaForCausalLM")],
        [1e6, 150_000.0, 1e4]
    );
    assert_eq!(theta("Llama4ForConditionalGeneration"), 500_000.0);
    let dims = |architecture, layer| attention(architecture, json!({"head_dim": 64}), layer).rope.unwrap().dims;
    assert_eq!(
        [dims("Glm4MoeForCausalLM", 0), dims("Qwen3NextForCausalLM", 3), dims("Qwen3ForCausalLM", 0)],
        [32, 16, 64]
    );
    let width = |architecture, layer| attention(architecture, json!({}), layer).head_dim;
    assert_eq!(
        [width("Qwen3ForCausalLM", 0), width("Qwen3NextForCausalLM", 3), width("GptOssForCausalLM", 0)],
        [128, 256, 64]
    );
    let oss = attention("GptOssForCausalLM", json!({}), 0);
    assert!(oss.qkv_bias && oss.output_bias);
    assert!(matches!(oss.rope.unwrap().scaling, RopeScaling::Yarn { factor: 32.0, truncate: false, .. }));
}

#[test]
fn every_class_attribute_is_read_or_known_irrelevant() {
    for family in FAMILIES {
        let values = published();
        let class = Class::of(family.class);
        let config = Config::new(values.as_object().unwrap(), class, "");
        (family.spec)(&config).unwrap();
        let read = config.read.borrow();
        let settled = |key: &str| {
            let is_read = class.names(key).any(|name| read.contains(name));
            // The last one is refused if true.
            let described = ["architectures", "model_type", "is_encoder_decoder"].contains(&key);
            is_read || described || unused::reason(key, family.unused).is_some()
        };
        let open: Vec<&str> = class.attributes().filter(|key| !settled(key)).collect();
        assert!(open.is_empty(), "{}: {open:?}", family.class);
    }
}

#[test]
fn published_configs_have_no_unknown_key() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/published");
    let mut read_ones = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let Ok(text) = std::fs::read(entry.as_ref().unwrap().path().join("config.json")) else { continue };
        let Architecture { reading, .. } = read(&serde_json::from_slice(&text).unwrap()).unwrap();
        assert!(reading.unknown.is_empty(), "{:?}: {:?}", entry.unwrap().path(), reading.unknown);
        read_ones += 1;
    }
    assert!(read_ones > 20, "{read_ones}");
}

#[test]
fn null_or_mistyped_keys_are_named() {
    for key in ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size"] {
        for bad in [Value::Null, json!("many"), json!(-3), json!(1.5)] {
            let error = refused("LlamaForCausalLM", json!({key: bad}));
            assert_eq!(error.kind(), FailureKind::Checkpoint, "{error}");
            assert!(error.message().contains(key), "{error}");
        }
    }
    for (architecture, key) in
        [("Qwen3ForCausalLM", "head_dim"), ("LlamaForCausalLM", "use_cache"), ("MixtralForCausalLM", "rope_theta")]
    {
        assert!(refused(architecture, json!({key: null})).message().contains(key));
    }
    for key in ["layer_types", "time_step_limit"] {
        let settings = json!({"hybrid_override_pattern": "ME*-", key: null});
        assert!(refused("NemotronHForCausalLM", settings).message().contains(key));
    }
    // Null has the class's meaning if the class accepts it.
    let llama =
        attention("LlamaForCausalLM", json!({"num_key_value_heads": null, "head_dim": null, "hidden_size": 64}), 0);
    assert_eq!((llama.kv_heads, llama.head_dim), (32, 2));
}

#[test]
fn aliases_of_a_setting_must_agree() {
    let experts = |settings| match &read(&with("Qwen3MoeForCausalLM", settings)).unwrap().spec.layers[0].ffn {
        FfnSpec::Moe(moe) => moe.experts,
        other => panic!("{other:?}"),
    };
    assert_eq!(experts(json!({"num_local_experts": 16})), 16);
    assert_eq!(experts(json!({"num_local_experts": 16, "num_experts": 16})), 16);
    let error = refused("Qwen3MoeForCausalLM", json!({"num_local_experts": 16, "num_experts": 8}));
    assert!(error.message().contains("num_local_experts") && error.message().contains("num_experts"), "{error}");
}

#[test]
fn integers_are_accepted_as_booleans() {
    let tuned = |value: Value| {
        let settings = json!({"attn_temperature_tuning": value});
        attention("Llama4ForConditionalGeneration", settings, 3).temperature.is_some()
    };
    assert!(tuned(json!(4)) && tuned(json!(true)) && !tuned(json!(0)));
    assert!(refused("LlamaForCausalLM", json!({"mlp_bias": "yes"})).message().contains("mlp_bias"));
}

#[test]
fn qwen_layer_types_and_windows_follow_their_classes() {
    let windows = |architecture: &str, settings: Value| -> Vec<Window> {
        let spec = read(&with(architecture, settings)).unwrap().spec;
        let window = |mixer: &MixerSpec| match mixer {
            MixerSpec::Attention(attention) => attention.window,
            other => panic!("{other:?}"),
        };
        spec.layers.iter().map(|layer| window(&layer.mixer)).collect()
    };
    let (full, four) = (Window::Full, Window::Sliding(4));
    let base = json!({"num_hidden_layers": 2, "use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1});
    let but = |key: &str, value: Value| {
        let mut changed = base.clone();
        changed[key] = value;
        changed
    };
    for architecture in ["Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        assert_eq!(windows(architecture, base.clone()), [full, four]);
        assert_eq!(windows(architecture, but("use_sliding_window", json!(false))), [full, full]);
        assert_eq!(
            windows(architecture, but("layer_types", json!(["sliding_attention", "full_attention"]))),
            [four, full]
        );
        let error = refused(architecture, but("layer_types", json!(["chunked_attention", "full_attention"])));
        assert!(error.message().contains("layer_types[0]"), "{error}");
    }
    // The mixture has no `max_window_layers`.
    assert_eq!(windows("Qwen3MoeForCausalLM", base.clone()), [four, four]);
}

#[test]
fn unsupported_settings_are_refused_by_name() {
    let oss = read(&with("GptOssForCausalLM", json!({"swiglu_alpha": 1.5, "swiglu_limit": 5.0}))).unwrap().spec;
    let FfnSpec::Moe(moe) = &oss.layers[0].ffn else { panic!() };
    assert!(matches!(moe.expert.kind, MlpKind::ClampedSwiglu { limit: 5.0, alpha: 1.5, .. }));
    let next = read(&with("Qwen3NextForCausalLM", json!({"norm_topk_prob": false}))).unwrap().spec;
    let FfnSpec::Moe(moe) = &next.layers[0].ffn else { panic!() };
    assert_eq!(moe.router, RouterSpec::SoftmaxTopK { normalise: false });
    for (architecture, key, value) in [
        ("LlamaForCausalLM", "hidden_act", json!("gelu")),
        ("LlamaForCausalLM", "partial_rotary_factor", json!(0.5)),
        ("GPT2LMHeadModel", "scale_attn_by_inverse_layer_idx", json!(true)),
        ("GPT2LMHeadModel", "is_encoder_decoder", json!(true)),
        ("DeepseekV3ForCausalLM", "scoring_func", json!("softmax")),
        ("OPTForCausalLM", "enable_bias", json!(false)),
        ("Qwen3NextForCausalLM", "decoder_sparse_step", json!(0)),
        ("LlamaForCausalLM", "per_layer_config", json!({"0": {"head_dim": 8}})),
        ("LlamaForCausalLM", "is_causal", json!(false)),
        ("Gemma3ForConditionalGeneration", "is_causal", json!(null)),
        ("Gemma3ForConditionalGeneration", "final_logit_softcapping", json!(30.0)),
    ] {
        let error = refused(architecture, json!({key: value}));
        assert!(error.message().contains(key), "{error}");
    }
}

#[test]
fn unknown_keys_are_listed() {
    let config =
        with("LlamaForCausalLM", json!({"scale_emb": 12, "rope_scaling": {"rope_type": "default", "mrope": [1]}}));
    assert_eq!(read(&config).unwrap().reading.unknown, ["rope_scaling.mrope", "scale_emb"]);
}

#[test]
fn model_type_replaces_or_must_match_the_architecture() {
    assert_eq!(read(&json!({"model_type": "qwen3"})).unwrap().family.architecture, "Qwen3ForCausalLM");
    let error =
        read(&json!({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3"})).map(|_| ()).unwrap_err();
    assert!(error.message().contains("model_type"), "{error}");
}

#[test]
fn rope_settings_are_read_in_old_and_new_form() {
    let rope = |settings: Value| attention("LlamaForCausalLM", settings, 0).rope.unwrap();
    let old = json!({"head_dim": 4, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}});
    let new = json!({"head_dim": 4, "rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}});
    let scaling = RopeScaling::Linear { factor: 2.0 };
    let want = RopeSpec { theta: 500.0, dims: 4, pairing: Pairing::Halves, scaling };
    assert_eq!(rope(old), want);
    assert_eq!(rope(new), want);
    let error = refused("LlamaForCausalLM", json!({"rope_scaling": {"type": "linear"}}));
    assert!(error.message().contains("rope_scaling.factor"), "{error}");
    let dynamic = |settings: Value| json!({"head_dim": 4, "rope_scaling": settings});
    assert_eq!(rope(dynamic(json!({"type": "dynamic", "factor": 2.0}))).scaling, RopeScaling::None);
    let error = refused("LlamaForCausalLM", dynamic(json!({"type": "dynamic"})));
    assert!(error.message().contains("rope_scaling.factor"), "{error}");
}

#[test]
fn yarn_treats_zero_as_absent_and_finds_its_context() {
    let yarn = |settings: Value| match attention("LlamaForCausalLM", settings, 0).rope.unwrap().scaling {
        RopeScaling::Yarn { original_positions, beta_fast, attention_factor, .. } => {
            (original_positions, beta_fast, attention_factor)
        }
        other => panic!("{other:?}"),
    };
    let scaling = json!({"rope_type": "yarn", "factor": 4.0, "mscale": 0, "mscale_all_dim": 0, "beta_fast": null});
    let by_paper = 0.1 * 4f64.ln() + 1.0;
    assert_eq!(yarn(json!({"max_position_embeddings": 640, "rope_scaling": scaling})), (640.0, 32.0, by_paper));
    let top = json!({"original_max_position_embeddings": 77, "rope_scaling": scaling});
    assert_eq!(yarn(top).0, 77.0);
}

#[test]
fn compressed_tensors_groups_must_share_a_supported_format() {
    let read_with = |quantisation: Value| {
        let mut config = with("DeepseekV3ForCausalLM", json!({}));
        config["quantization_config"] = quantisation;
        read(&config).map(|architecture| architecture.quantisation.unwrap())
    };
    let weights = json!({
        "num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 32, "actorder": null,
    });
    let groups = |groups: Value| json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups});
    let one = groups(json!({"group_0": {"weights": weights}}));
    assert_eq!(read_with(one.clone()).unwrap(), Quantisation::Int4 { group: 32 });
    for (key, value) in [
        ("num_bits", json!(8)),
        ("symmetric", json!(false)),
        ("strategy", json!("channel")),
        ("actorder", json!("group")),
        ("group_size", json!(12)),
    ] {
        let mut other = one.clone();
        other["config_groups"]["group_0"]["weights"][key] = value;
        let error = read_with(other).unwrap_err();
        assert!(error.message().contains(&format!("group_0.weights.{key}")), "{error}");
    }
    let mut wider = weights.clone();
    wider["group_size"] = json!(128);
    let mixed = groups(json!({"group_0": {"weights": weights}, "group_1": {"weights": wider}}));
    assert!(read_with(mixed).unwrap_err().message().contains("beside others"));
    assert!(read_with(groups(json!({}))).unwrap_err().message().contains("config_groups"));
    let mut transformed = one.clone();
    transformed["transform_config"] = json!({});
    assert!(read_with(transformed.clone()).is_ok());
    transformed["transform_config"] = json!({"config_groups": {"R1": {"type": "hadamard"}}});
    assert!(read_with(transformed).unwrap_err().message().contains("transform_config"));
    let algorithm = |algorithm: &str| json!({"quant_method": "modelopt", "quant_algo": algorithm});
    assert_eq!(read_with(algorithm("NVFP4")).unwrap(), Quantisation::Nvfp4(Nvfp4Layout::ModelOpt));
    assert!(read_with(algorithm("W4A8_AWQ")).unwrap_err().message().contains("W4A8_AWQ"));
}

#[test]
fn minimax_rotary_dim_sets_the_rotated_part_of_a_head() {
    let dims = |settings: Value| {
        let rope = attention("MiniMaxM2ForCausalLM", settings, 0).rope.unwrap();
        (rope.dims, rope.theta)
    };
    assert_eq!(dims(json!({})), (128, 5e6));
    assert_eq!(dims(json!({"rotary_dim": 64, "rope_theta": 1e4})), (64, 1e4));
    // As saved by transformers 5.
    let saved = json!({"rotary_dim": 64, "rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 0.25}});
    assert_eq!(dims(saved), (32, 7.0));
    assert!(refused("MiniMaxM2ForCausalLM", json!({"attn_type_list": [1, 0]})).message().contains("attn_type_list"));
}

#[test]
fn each_layer_type_has_the_rope_of_its_class() {
    let rope = |architecture: &str, settings: Value, layer: usize| {
        let rope = attention(architecture, settings, layer).rope.unwrap();
        (rope.theta, rope.dims, rope.scaling)
    };
    let gemma3 = "Gemma3ForCausalLM";
    // Windowed; the sixth layer is global.
    assert_eq!(rope(gemma3, json!({}), 0), (1e4, 256, RopeScaling::None));
    assert_eq!(rope(gemma3, json!({}), 5), (1e6, 256, RopeScaling::None));
    let old = json!({
        "rope_theta": 7.0, "rope_local_base_freq": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    });
    assert_eq!(rope(gemma3, old.clone(), 0), (5.0, 256, RopeScaling::None));
    assert_eq!(rope(gemma3, old, 5), (7.0, 256, RopeScaling::Linear { factor: 8.0 }));
    let new = json!({"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 9.0},
        "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3.0},
    }});
    assert_eq!(rope(gemma3, new.clone(), 0), (3.0, 256, RopeScaling::Linear { factor: 2.0 }));
    assert_eq!(rope(gemma3, new, 5), (9.0, 256, RopeScaling::None));
    // A base among the settings has priority over the older key.
    let within = json!({"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0, "rope_theta": 6.0}});
    assert_eq!(rope(gemma3, within, 5), (6.0, 256, RopeScaling::Linear { factor: 8.0 }));
    // Not counted for one kind of layers, unlike for all layers.
    let context = json!({
        "original_max_position_embeddings": 9, "max_position_embeddings": 64,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    });
    let (_, _, scaling) = rope(gemma3, context, 5);
    assert!(matches!(scaling, RopeScaling::Yarn { original_positions: 64.0, truncate: true, .. }), "{scaling:?}");
    let untruncated = json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": false}});
    let error = refused(gemma3, untruncated);
    assert!(error.message().contains("rope_parameters.full_attention.truncate"), "{error}");
    let flat = refused(gemma3, json!({"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}));
    assert!(flat.message().contains("rope_parameters."), "{flat}");
    let gemma4 = json!({"hidden_size_per_layer_input": 0});
    let proportional = RopeScaling::Proportional { part: 0.25 };
    assert_eq!(rope("Gemma4ForConditionalGeneration", gemma4.clone(), 5), (1e6, 512, proportional));
    assert_eq!(rope("Gemma4ForConditionalGeneration", gemma4.clone(), 0), (1e4, 256, RopeScaling::None));
    let reading = read(&with("Gemma4ForConditionalGeneration", gemma4)).unwrap().reading;
    assert_eq!(reading.defaults["text_config.global_head_dim"], 512);
    // Its class reads no older key.
    let old = json!({"hidden_size_per_layer_input": 0, "rope_theta": 7.0, "rope_local_base_freq": 5.0});
    assert_eq!(rope("Gemma4ForConditionalGeneration", old.clone(), 5).0, 1e6);
    assert_eq!(rope("Gemma4ForConditionalGeneration", old, 0).0, 1e4);
    for (key, settings) in [
        ("rope_scaling", json!({"rope_type": "linear", "factor": 8.0})),
        ("rope_parameters", json!({"full_attention": {"rope_type": "default"}})),
        ("hidden_size_per_layer_input", json!(256)),
    ] {
        let mut config = json!({"hidden_size_per_layer_input": 0});
        config[key] = settings;
        let error = refused("Gemma4ForConditionalGeneration", config);
        assert!(error.message().contains(key), "{error}");
    }
    let error = refused("Gemma4ForConditionalGeneration", json!({}));
    assert!(error.message().contains("hidden_size_per_layer_input"), "{error}");
    // Trinity's global layers are not rotated.
    assert!(attention("AfmoeForCausalLM", json!({}), 3).rope.is_none());
    assert!(attention("AfmoeForCausalLM", json!({}), 2).rope.is_some());
}

#[test]
fn assumed_kinds_of_nemotron_layers_are_listed() {
    let Architecture { reading, spec, .. } = read(&with("NemotronHForCausalLM", published())).unwrap();
    assert_eq!((reading.defaults["hybrid_override_pattern"].as_str(), spec.layers.len()), (Some("ME*-"), 4));
}

#[test]
fn kimi_linear_layer_lists_are_one_based_and_checked() {
    let kinds = |lists: Value| {
        let config = with("KimiLinearForCausalLM", json!({"num_hidden_layers": 3, "linear_attn_config": lists}));
        read(&config).map(|read| read.spec.layers.iter().map(|layer| layer.mixer.score_heads() > 0).collect::<Vec<_>>())
    };
    let lists = |full: Value, linear: Value| kinds(json!({"full_attn_layers": full, "kda_layers": linear}));
    assert_eq!(lists(json!([2]), json!([1, 3])).unwrap(), [false, true, false]);
    // Without both lists the class derives the kinds.
    assert_eq!(kinds(json!({"full_attn_layers": [1]})).unwrap(), [false; 3]);
    for (full, linear) in [(json!([0]), json!([1, 3])), (json!([4]), json!([1, 2, 3])), (json!([2]), json!([1]))] {
        let error = lists(full, linear).unwrap_err();
        assert!(error.message().contains("linear_attn_config."), "{error}");
    }
    let spec = |settings: Value| read(&with("KimiLinearForCausalLM", settings)).unwrap().spec;
    let sees_all = &spec(json!({})).layers[4].mixer;
    assert!(sees_all.score_heads() == 32 && sees_all.rope().is_none());
    let error = refused("KimiLinearForCausalLM", json!({"mla_use_nope": false}));
    assert!(error.message().contains("mla_use_nope"), "{error}");
}

#[test]
fn ling_settings_with_other_semantics_are_refused() {
    for (key, value) in [
        ("score_function", json!("softmax")),
        ("use_rmsnorm", json!(false)),
        ("norm_topk_prob", json!(false)),
        ("moe_shared_expert_intermediate_size", json!(513)),
    ] {
        let error = refused("BailingMoeV2ForCausalLM", json!({key: value}));
        assert!(error.message().contains(key), "{error}");
    }
    let rope = attention("BailingMoeV2ForCausalLM", json!({"partial_rotary_factor": 0.5}), 0).rope.unwrap();
    assert_eq!((rope.dims, rope.theta), (64, 600_000.0));
}

#[test]
fn expert_layers_follow_the_class() {
    let sparse = |architecture: &str, mut settings: Value| -> Vec<bool> {
        settings["num_hidden_layers"] = json!(4);
        let spec = read(&with(architecture, settings)).unwrap().spec;
        spec.layers.iter().map(|layer| layer.experts() > 0).collect()
    };
    let types = json!(["sparse", "dense", "sparse", "sparse"]);
    let first = json!({"first_k_dense_replace": 2});
    let both = json!({"first_k_dense_replace": 2, "mlp_layer_types": types});
    assert_eq!(sparse("Glm4MoeLiteForCausalLM", first.clone()), [false, true, true, true]);
    for architecture in ["DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"] {
        assert_eq!(sparse(architecture, json!({})), [false, false, false, true]);
        assert_eq!(sparse(architecture, first.clone()), [false, false, true, true]);
    }
    for architecture in ["Glm4MoeLiteForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"] {
        assert_eq!(sparse(architecture, both.clone()), [true, false, true, true]);
        let wrong = json!({"num_hidden_layers": 1, "mlp_layer_types": ["linear"]});
        assert!(refused(architecture, wrong).message().contains("mlp_layer_types[0]"));
    }
    let error = refused("DeepseekV32ForCausalLM", json!({"num_hidden_layers": 1, "layer_types": ["full_attention"]}));
    assert!(error.message().contains("layer_types[0]"), "{error}");
}

#[test]
fn fp8_block_size_defaults_to_that_of_the_class() {
    let config = |settings: Value| {
        let mut config = with("DeepseekV3ForCausalLM", json!({}));
        config["quantization_config"] = settings;
        config
    };
    let found = read(&config(json!({"quant_method": "fp8"}))).unwrap().quantisation;
    assert_eq!(found, Some(Quantisation::Fp8Blocks { block: [128, 128] }));
    let error = read(&config(json!({"quant_method": "fp8", "weight_block_size": null}))).map(|_| ()).unwrap_err();
    assert!(error.message().contains("weight_block_size"), "{error}");
}

#[test]
fn global_heads_of_gemma4_are_read_as_published_and_as_saved() {
    let kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"];
    let settings = |more: Value| {
        let mut all = json!({
            "hidden_size_per_layer_input": 0, "num_hidden_layers": 4, "layer_types": kinds, "attention_k_eq_v": true,
        });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    };
    let heads = |more: Value, layer| {
        let attention = attention("Gemma4ForConditionalGeneration", settings(more), layer);
        (attention.head_dim, attention.kv_heads)
    };
    let published = json!({"global_head_dim": 64, "num_global_key_value_heads": 1});
    let global = json!({"head_dim": 64, "num_key_value_heads": 1});
    let saved = json!({"per_layer_config": {"1": global, "3": global}});
    for layer in 0..4 {
        assert_eq!(heads(published.clone(), layer), heads(saved.clone(), layer), "layer {layer}");
    }
    assert_eq!(heads(saved, 1), (64, 1));
    // Without a number, that of the other layers.
    assert_eq!(heads(json!({"per_layer_config": {"1": {"head_dim": 64}, "3": {"head_dim": 64}}}), 3), (64, 4));
    let odd = [
        json!(null),
        json!({}),
        json!({"1": global}),
        json!({"1": global, "2": global}),
        json!({"1": global, "3": {"head_dim": 32, "num_key_value_heads": 1}}),
        json!({"1": {"num_key_value_heads": 1}, "3": {"num_key_value_heads": 1}}),
        json!({"1": {"head_dim": 64, "sliding_window": 8}, "3": {"head_dim": 64, "sliding_window": 8}}),
    ];
    for layers in odd {
        let error = refused("Gemma4ForConditionalGeneration", settings(json!({"per_layer_config": layers})));
        assert!(error.to_string().contains("per_layer_config"), "{error}");
    }
}
