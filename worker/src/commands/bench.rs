//! Measures the worker on this machine.
//!
//! [`memory()`] starts a process for each run, since peak memory is a process's; [`attention`],
//! [`decode`] and [`run`] measure within this one.

pub mod attention;
pub mod decode;
pub mod run;

use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use outliers_protocol::{Metadata, files};
use serde::Serialize;
use serde_json::{Value, json};

use crate::checkpoint::source::{CONFIG_FILE, MAX_JSON_BYTES};
use crate::error::{IoContext, Result, WorkerError};
use crate::files::read_small;

/// Rate in units of 10^9 per second.
fn giga(amount: usize, seconds: f64) -> f64 {
    amount as f64 / seconds / 1e9
}

/// Seconds of the fastest round, after one for warm-up.
fn fastest(rounds: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let mut best = f64::INFINITY;
    for _ in 0..rounds.max(1) {
        let start = Instant::now();
        work()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Result of [`memory`].
#[derive(Clone, Debug, Serialize)]
pub struct MemoryTable {
    /// One row per run.
    pub rows: Vec<MemoryRow>,
    /// Largest over smallest peak memory, among the runs that differ only in depth.
    pub peak_ratio_over_depth: f64,
    /// Weight bytes read with 16 times the tokens, over those with one time.
    pub bytes_ratio_over_tokens: f64,
}

/// One run.
#[derive(Clone, Debug, Serialize)]
pub struct MemoryRow {
    /// Layers of the model.
    pub layers: usize,
    /// Tokens run.
    pub tokens: usize,
    /// Weight bytes of the checkpoint.
    pub weight_bytes: u64,
    /// Weight bytes read.
    pub weight_bytes_read: u64,
    /// Peak resident memory, bytes.
    pub peak_memory_bytes: u64,
    /// Wall seconds.
    pub seconds: f64,
}

impl fmt::Display for MemoryTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
        writeln!(
            f,
            "{:>7} {:>8} {:>13} {:>11} {:>14} {:>8}",
            "layers", "tokens", "weights MiB", "read MiB", "peak RSS MiB", "seconds"
        )?;
        for r in &self.rows {
            let (weights, read, peak) = (mib(r.weight_bytes), mib(r.weight_bytes_read), mib(r.peak_memory_bytes));
            writeln!(
                f,
                "{:>7} {:>8} {weights:>13.1} {read:>11.1} {peak:>14.1} {:>8.2}",
                r.layers, r.tokens, r.seconds
            )?;
        }
        writeln!(f, "peak memory, deepest over shallowest run: {:.3}x", self.peak_ratio_over_depth)?;
        writeln!(f, "weight bytes read, 16x the tokens over 1x: {:.3}x", self.bytes_ratio_over_tokens)
    }
}

/// Runs Llama models of one width and several depths over made-up weights, then the shallowest with
/// 16 times the tokens.
///
/// # Errors
/// Storage: no room for token ids and results (which are removed again). Internal: a run failed, or
/// the system does not report peak memory.
pub fn memory(hidden: usize, layers: &[usize]) -> Result<MemoryTable> {
    let scratch = tempfile::tempdir().at("create", std::env::temp_dir())?;
    let mut rows = Vec::new();
    for &n in layers {
        rows.push(measure(scratch.path(), hidden, n, 4)?);
        if n == layers[0] {
            rows.push(measure(scratch.path(), hidden, n, 64)?);
        }
    }
    let many = rows.remove(1);
    let peaks = || rows.iter().map(|r| r.peak_memory_bytes as f64);
    let ratio = peaks().fold(0.0, f64::max) / peaks().fold(f64::INFINITY, f64::min);
    let bytes_ratio_over_tokens = many.weight_bytes_read as f64 / rows[0].weight_bytes_read as f64;
    rows.push(many);
    Ok(MemoryTable { rows, peak_ratio_over_depth: ratio, bytes_ratio_over_tokens })
}

fn measure(scratch: &Path, hidden: usize, layers: usize, sequences: usize) -> Result<MemoryRow> {
    const TOKENS: usize = 256;
    let (config, ids, output) = (scratch.join(CONFIG_FILE), scratch.join("ids.json"), scratch.join("out"));
    let rows: Vec<Vec<usize>> =
        (0..sequences).map(|s| (0..TOKENS).map(|t| (s * 31 + t * 17) % VOCAB).collect()).collect();
    std::fs::write(&config, llama(hidden, layers).to_string()).at("write", &config)?;
    std::fs::write(&ids, json!(rows).to_string()).at("write", &ids)?;
    let program = std::env::current_exe().map_err(|e| WorkerError::internal(format!("where is this program? {e}")))?;
    let mut command = Command::new(&program);
    command.arg("run").arg("--model").arg(scratch).arg("--token-ids").arg(&ids).arg("--output").arg(&output);
    command.args(["--weights", "synthetic:1", "--devices", "cpu", "--micro-batch-tokens", "1024"]);
    let run = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).output();
    let run = run.at("run", &program)?;
    if !run.status.success() {
        let log = String::from_utf8_lossy(&run.stderr).into_owned();
        return Err(WorkerError::internal(format!("a measured run failed: {}", log.trim())));
    }
    let path = output.join(files::METADATA);
    let text = read_small(&path, MAX_JSON_BYTES).at("read", &path)?;
    let metadata: Metadata =
        serde_json::from_slice(&text).map_err(|e| WorkerError::internal(format!("unreadable metadata: {e}")))?;
    let silent = || WorkerError::internal("this system does not tell a process's peak memory");
    Ok(MemoryRow {
        layers,
        tokens: sequences * TOKENS,
        weight_bytes: metadata.weight_bytes_expected,
        weight_bytes_read: metadata.weight_bytes_read,
        peak_memory_bytes: metadata.peak_memory_bytes.ok_or_else(silent)?,
        seconds: (metadata.finished_at_ms - metadata.started_at_ms) as f64 / 1e3,
    })
}

const VOCAB: usize = 4096;

/// The configuration of a Llama in bf16.
fn llama(hidden: usize, layers: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": hidden * 11 / 4, "num_hidden_layers": layers, "num_attention_heads": (hidden / 64).max(1),
        "num_key_value_heads": (hidden / 128).max(1), "rms_norm_eps": 1e-5, "vocab_size": VOCAB, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
    })
}
