//! Writes a small OLMoE checkpoint with known outlier features, for the demo and for tests of the
//! results.
//!
//! The weights are noise from a counter, by integer arithmetic and correctly rounded float
//! operations only, so that every machine gets the same bytes. Outlier features are then *planted*
//! without changing what the model computes: the gain of feature d of a norm is multiplied by a
//! power of two, and the columns d of every matrix that reads this norm are divided by it. Both
//! are exact in bf16, so the logits are bit-identical.

mod plant;
mod tokenizer;
mod weights;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

pub use plant::{Decoy, Planted, PlantedFeature};

use crate::checkpoint::source::{CONFIG_FILE, INDEX_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE};
use crate::error::{IoContext, Result, WorkerError};
use crate::files::write_atomic;

/// Name of the file with the planted features, beside config.json.
pub const PLANTED_FILE: &str = "planted.json";

const HIDDEN: usize = 128;
const LAYERS: usize = 8;
const HEADS: usize = 4;
const EXPERTS: usize = 16;
const EXPERTS_PER_TOKEN: usize = 4;
const INTERMEDIATE: usize = 64;
const MAX_POSITIONS: usize = 4096;
/// Rows of the embedding: slightly more than the tokenizer's entries, as in the published model.
const VOCAB: usize = tokenizer::ENTRIES + 64;

/// Writes the checkpoint with planted features into `folder`: about 8 MB in two shards, with
/// tokenizer.
///
/// # Errors
/// Kind `Job` if the folder contains other files; `Storage` if it cannot be written.
pub fn make(folder: &Path, seed: u64) -> Result<Planted> {
    let planted = Planted::plan();
    write_checkpoint(folder, seed, &planted)?;
    Ok(planted)
}

fn write_checkpoint(folder: &Path, seed: u64, planted: &Planted) -> Result<()> {
    claim(folder)?;
    let write_json = |name: &str, value: &Value| write_atomic(&folder.join(name), format!("{value:#}\n").as_bytes());
    let tokenizer = tokenizer::train()?;
    write_atomic(&folder.join(TOKENIZER_FILE), tokenizer.as_bytes())?;
    write_json(TOKENIZER_CONFIG_FILE, &tokenizer::config(MAX_POSITIONS))?;
    write_json("special_tokens_map.json", &tokenizer::special_tokens())?;
    write_json("generation_config.json", &generation_config())?;
    write_json(INDEX_FILE, &weights::write(folder, seed, planted)?)?;
    write_json(PLANTED_FILE, &serde_json::to_value(planted).map_err(|e| WorkerError::internal(e.to_string()))?)?;
    // Written last, since a folder without config.json is not a model.
    write_json(CONFIG_FILE, &config())
}

/// Creates the folder. A folder with files other than an earlier demo's is refused.
fn claim(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).at("create", folder)?;
    let empty = fs::read_dir(folder).at("list", folder)?.next().is_none();
    if empty || folder.join(PLANTED_FILE).is_file() {
        return Ok(());
    }
    let message = format!("{} is not empty and holds no earlier demo", folder.display());
    Err(WorkerError::job(message).hint("name a new folder for the demo model"))
}

/// The published OLMoE configuration with smaller sizes.
fn config() -> Value {
    json!({
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "clip_qkv": null,
        "eos_token_id": tokenizer::END_OF_TEXT,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": MAX_POSITIONS,
        "model_type": "olmoe",
        "norm_topk_prob": false,
        "num_attention_heads": HEADS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "output_router_logits": false,
        "pad_token_id": tokenizer::PADDING,
        "rms_norm_eps": 1e-5,
        "rope_scaling": null,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
        "use_cache": true,
        "vocab_size": VOCAB
    })
}

fn generation_config() -> Value {
    json!({
        "_from_model_config": true,
        "eos_token_id": tokenizer::END_OF_TEXT,
        "pad_token_id": tokenizer::PADDING
    })
}

#[cfg(test)]
mod tests;
