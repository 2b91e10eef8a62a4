//! The same model with other configurations and files, as other programs save it. Activations must
//! equal those recorded from transformers.

use std::collections::BTreeMap;
use std::path::Path;

use outliers_protocol::{FailureKind, Metadata, files};
use outliers_tests::golden::assert_activations_equal;
use outliers_tests::programs::{golden, run_worker};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

use crate::worker::{copy, edit_config, failure, read, run_like};

/// Runs an altered fixture, compares with the original's reference, and returns the notes about
/// the checkpoint.
fn assert_same(name: &str, alter: impl Fn(&Path)) -> Metadata {
    let model = copy(name);
    alter(model.path());
    let output = run_like(name, model.path(), &["--save-activations", "activations.safetensors"]);
    let golden = golden(name).join("golden.safetensors");
    assert_activations_equal(&golden, &output.path().join("activations.safetensors"));
    read(output.path(), files::METADATA)
}

fn without(keys: &'static [&'static str]) -> impl Fn(&Path) {
    move |model| {
        edit_config(model, |config| {
            let nested = config.get("text_config").is_some();
            let settings = if nested { &mut config["text_config"] } else { config };
            keys.iter().for_each(|key| drop(settings.as_object_mut().unwrap().remove(*key).expect(key)));
        });
    }
}

/// Tensors of a file, to be changed and written.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn edit_tensors(model: &Path, edit: impl Fn(Tensors) -> Tensors) {
    let path = model.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let owned =
        |(name, view): (String, TensorView<'_>)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
    let edited = edit(tensors.tensors().into_iter().map(owned).collect());
    let views =
        edited.iter().map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn absent_config_keys_get_the_defaults_of_their_class() {
    // The last number: attributes with a default of their own, not derived from others.
    for (fixture, keys, defaults) in [
        ("mixtral", &["rope_theta"][..], 1),
        ("gpt-oss-mxfp4", &["rope_theta", "attention_bias", "swiglu_limit", "layer_types"], 3),
        ("glm4-moe", &["partial_rotary_factor", "first_k_dense_replace", "n_group", "topk_group", "norm_topk_prob"], 5),
        (
            "qwen3-next",
            &["partial_rotary_factor", "norm_topk_prob", "decoder_sparse_step", "full_attention_interval"],
            3,
        ),
        ("llama4-scout", &["attn_temperature_tuning", "attn_scale", "use_qk_norm", "rope_theta", "no_rope_layers"], 4),
        ("deepseek-v31-fp8", &["rope_theta", "routed_scaling_factor", "scoring_func"], 2),
    ] {
        let config = assert_same(fixture, without(keys)).model.config.unwrap();
        let noted = |key: &&&str| config.defaults.keys().any(|noted| noted.ends_with(**key));
        assert_eq!(keys.iter().filter(noted).count(), defaults, "{fixture}: {:?}", config.defaults);
    }
}

#[test]
fn config_aliases_give_the_same_model() {
    assert_same("llama4-scout", |model| {
        edit_config(model, |config| config["text_config"]["attn_temperature_tuning"] = json!(4));
    });
    assert_same("qwen3-moe", |model| {
        edit_config(model, |config| {
            let experts = config.as_object_mut().unwrap().remove("num_experts").unwrap();
            config["num_local_experts"] = experts;
        });
    });
    assert_same("llama-f32", |model| {
        edit_config(model, |config| {
            let mut rope = config.as_object_mut().unwrap().remove("rope_scaling").unwrap();
            rope["rope_theta"] = config.as_object_mut().unwrap().remove("rope_theta").unwrap();
            config["original_max_position_embeddings"] = rope["original_max_position_embeddings"].take();
            rope.as_object_mut().unwrap().remove("original_max_position_embeddings");
            config["rope_parameters"] = rope;
        });
    });
}

#[test]
fn tensors_without_the_model_prefix_are_found() {
    let bare = |tensors: Tensors| {
        tensors.into_iter().map(|(name, tensor)| (name.trim_start_matches("model.").to_owned(), tensor)).collect()
    };
    assert_same("qwen3", |model| edit_tensors(model, bare));
    assert_same("mixtral", |model| edit_tensors(model, bare));
}

#[test]
fn stored_lm_head_is_used_despite_tied_embeddings() {
    // Its reference was computed with a head that differs from the embedding.
    let metadata = assert_same("qwen2-stored-head", |_| {});
    assert!(metadata.model.checkpoint_notes[0].contains("a head of its own"), "{:?}", metadata.model.checkpoint_notes);
    let metadata = assert_same("qwen3", |model| {
        edit_tensors(model, |mut tensors| {
            let embedding = tensors.remove("model.embed_tokens.weight").unwrap();
            tensors.insert("lm_head.weight".to_owned(), embedding);
            tensors
        });
    });
    assert!(
        metadata.model.checkpoint_notes[0].contains("embedding is not stored"),
        "{:?}",
        metadata.model.checkpoint_notes
    );
}

#[test]
fn plain_weights_under_a_quantization_config_are_read() {
    assert_same("gpt-oss-plain", |model| {
        edit_config(model, |config| config["quantization_config"] = json!({"quant_method": "mxfp4"}));
    });
    assert_same("glm4-moe", |model| {
        edit_config(model, |config| config["quantization_config"] = json!({"quant_method": "fp8"}));
    });
}

#[test]
fn e8m0_scales_equal_f32_scales() {
    let powers = |(dtype, shape, data): (Dtype, Vec<usize>, Vec<u8>)| {
        assert_eq!(dtype, Dtype::F32);
        let exponents = data.chunks_exact(4).map(|bytes| {
            let bits = u32::from_le_bytes(bytes.try_into().unwrap());
            assert_eq!(bits & 0x807f_ffff, 0, "a positive power of two");
            (bits >> 23) as u8
        });
        (Dtype::F8_E8M0, shape, exponents.collect())
    };
    assert_same("deepseek-v31-fp8", |model| {
        edit_tensors(model, |tensors| {
            let convert = |(name, tensor): (String, _)| {
                let tensor = if name.ends_with("_scale_inv") { powers(tensor) } else { tensor };
                (name, tensor)
            };
            tensors.into_iter().map(convert).collect()
        });
    });
}

#[test]
fn int4_weights_unpack_by_their_stored_shape() {
    let with_shapes = |convert: fn(Vec<u8>) -> (Dtype, Vec<u8>)| {
        move |model: &Path| {
            edit_tensors(model, |tensors| {
                let edited = |(name, (dtype, shape, data)): (String, (Dtype, Vec<usize>, Vec<u8>))| {
                    let (dtype, data) = if name.ends_with("_shape") { convert(data) } else { (dtype, data) };
                    (name, (dtype, shape, data))
                };
                tensors.into_iter().map(edited).collect()
            });
        }
    };
    // As the library itself writes them.
    let long = |data: Vec<u8>| {
        let words = data.chunks_exact(4).flat_map(|word| [word, &[0; 4][..]].concat());
        (Dtype::I64, words.collect::<Vec<u8>>())
    };
    assert_same("kimi-k2-int4", with_shapes(long));
    let model = copy("kimi-k2-int4");
    with_shapes(|data| (Dtype::I32, data.chunks_exact(4).rev().flatten().copied().collect()))(model.path());
    let (kind, said) = failure(model.path(), &["--num-sequences", "1", "--sequence-length", "32"]);
    assert_eq!(kind, FailureKind::Checkpoint);
    assert!(said.contains("_packed is packed from shape [128, 32], expected [32, 128]"), "{said}");
}

#[test]
fn multimodal_class_decides_whether_the_head_is_tied() {
    let model = copy("qwen3-5");
    let tied = |tied: bool| {
        edit_config(model.path(), |config| {
            config["tie_word_embeddings"] = json!(tied);
            config["text_config"]["tie_word_embeddings"] = json!(!tied);
        });
        let said = run_worker(["inspect", "--json", "--model", model.path().to_str().unwrap()]);
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
        serde_json::from_slice::<Value>(&said.stdout).unwrap()
    };
    assert!(tied(false)["checkpoint_notes"].is_null());
    // The stored dtype applies all the same.
    assert!(tied(true)["checkpoint_notes"][0].as_str().unwrap().contains("a head of its own"));
}

#[test]
fn unstudied_norms_are_reported() {
    let templates = |fixture: &str| -> Vec<String> {
        let model = golden(fixture).join("model");
        let said = run_worker(["inspect", "--json", "--model", model.to_str().unwrap()]);
        let inspected = serde_json::from_slice::<Value>(&said.stdout).unwrap();
        let results: Value = read(run_like(fixture, &model, &[]).path(), files::RESULTS);
        assert_eq!(inspected["unstudied_norms"], results["unstudied_norms"], "{fixture}");
        serde_json::from_value(inspected["unstudied_norms"].clone()).unwrap_or_default()
    };
    let below = |base: &str, names: &[&str]| -> Vec<String> {
        names.iter().map(|name| format!("{base}layers.{{layer}}.{name}.weight")).collect()
    };
    assert_eq!(templates("afmoe"), below("model.", &["post_attention_layernorm", "post_mlp_layernorm"]));
    let dense = ["post_attention_layernorm", "post_feedforward_layernorm"];
    assert_eq!(templates("gemma3"), below("language_model.model.", &dense));
    let experts = ["post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"];
    assert_eq!(templates("gemma4"), below("model.language_model.", &[&dense[..], &experts[..]].concat()));
    assert!(templates("olmoe-bf16").is_empty());
}

#[test]
fn kimi_k2_5_is_read_as_kimi_k2_under_a_prefix() {
    let metadata = assert_same("kimi-k2-int4", |model| {
        edit_tensors(model, |tensors| {
            let below = |(name, tensor)| (format!("language_model.{name}"), tensor);
            let mut renamed: Tensors = tensors.into_iter().map(below).collect();
            renamed.insert("vision_tower.norm.weight".to_owned(), (Dtype::BF16, vec![1], vec![0, 0]));
            renamed
        });
        edit_config(model, |config| {
            let text = config.take();
            *config = json!({
                "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": text,
                "vision_config": {}, "tie_word_embeddings": false,
            });
        });
    });
    assert_eq!(metadata.model.ignored.iter().map(|ignored| ignored.why.as_str()).collect::<Vec<_>>(), ["vision tower"]);
}

#[test]
fn nvfp4_is_read_under_both_naming_schemes() {
    assert_same("qwen3-moe-nvfp4", |model| {
        edit_tensors(model, |tensors| {
            let renamed = |(name, (dtype, shape, data)): (String, (Dtype, Vec<usize>, Vec<u8>))| {
                if let Some(name) = name.strip_suffix("_scale_2") {
                    let number = f32::from_le_bytes(data[..].try_into().unwrap());
                    return (format!("{name}_global_scale"), (dtype, shape, number.recip().to_le_bytes().to_vec()));
                }
                let name = if dtype == Dtype::U8 { format!("{name}_packed") } else { name };
                (name, (dtype, shape, data))
            };
            let mut renamed: Tensors = tensors.into_iter().map(renamed).collect();
            let activations = "model.layers.0.self_attn.q_proj.input_global_scale";
            renamed.insert(activations.to_owned(), (Dtype::F32, vec![1], vec![0; 4]));
            renamed
        });
        let weights = json!({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16});
        edit_config(model, |config| {
            config["quantization_config"] = json!({
                "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
                "config_groups": {"group_0": {"weights": weights}},
            });
        });
    });
}

#[test]
fn sequences_longer_than_the_sparse_indexer_limit_are_refused() {
    for (name, indexers) in [("deepseek-v32-fp8", 2), ("glm-moe-dsa", 1)] {
        let model = copy(name);
        edit_config(model.path(), |config| config["index_topk"] = json!(31));
        let ids = golden(name).join("golden.safetensors");
        for text in [["--sequence-length", "32"], ["--token-ids", ids.to_str().unwrap()]] {
            let (kind, said) = failure(model.path(), &text);
            assert_eq!(kind, FailureKind::Job, "{said}");
            assert!(said.contains("32 tokens") && said.contains("at most 31") && said.contains("index_topk"), "{said}");
        }
        let inspect = ["inspect", "--model", model.path().to_str().unwrap(), "--sequence-length", "32"];
        let inspect = run_worker(inspect);
        assert_eq!(inspect.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&inspect.stderr).contains("at most 31"));
        // If it selects every key, it is noted and ignored.
        let ignored = assert_same(name, |model| edit_config(model, |config| config["index_topk"] = json!(32)));
        let ignored = ignored.model.ignored.into_iter().find(|ignored| ignored.why.contains("index_topk")).unwrap();
        assert!(ignored.tensors >= 5 * indexers && ignored.example.contains("indexer"), "{ignored:?}");
    }
}

#[test]
fn unknown_config_keys_are_printed_and_recorded() {
    let model = copy("llama-f32");
    edit_config(model.path(), |config| config["embedding_multiplier"] = json!(12));
    let output = tempfile::tempdir().unwrap();
    let arguments =
        ["run", "--model", model.path().to_str().unwrap(), "--num-sequences", "1", "--sequence-length", "32"];
    let run = run_worker(arguments.into_iter().chain(["--output", output.path().to_str().unwrap()]));
    assert!(run.status.success());
    let metadata: Metadata = read(output.path(), files::METADATA);
    assert_eq!(metadata.model.config.unwrap().unknown, ["embedding_multiplier"]);
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(said.contains("WARN") && said.contains("embedding_multiplier"), "{said}");
}

#[test]
fn wrong_config_default_is_a_checkpoint_error() {
    // The default of the class is 128, the tensors have 32.
    let model = copy("qwen3");
    without(&["head_dim"])(model.path());
    let (kind, said) = failure(model.path(), &[]);
    assert_eq!(kind, FailureKind::Checkpoint);
    assert!(said.contains("config.json leaves out") && said.contains("head_dim = 128"), "{said}");
    let model = copy("deepseek-v3-fp8");
    edit_config(model.path(), |config| config["q_lora_rank"] = Value::Null);
    let said = failure(model.path(), &[]).1;
    assert!(said.contains("null for q_lora_rank"), "{said}");
}

#[test]
fn missing_tensors_are_listed_once_and_the_rest_counted() {
    let model = copy("gpt-oss-mxfp4");
    edit_tensors(model.path(), |tensors| tensors.into_iter().filter(|(name, _)| !name.contains("experts")).collect());
    let said = failure(model.path(), &[]).1;
    let names: Vec<&str> = said.split("tensor ").skip(1).map(|rest| rest.split(' ').next().unwrap()).collect();
    let mut once = names.clone();
    once.dedup();
    assert!(names.len() == 5 && once == names && said.contains("; and 3 more"), "{said}");
}
