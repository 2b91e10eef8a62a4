//! Provenance of the results.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{IgnoredTensors, JobSpec};

/// `metadata.json`: provenance of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metadata {
    /// Document version.
    pub schema: u32,
    /// Version of the worker.
    pub worker_version: String,
    /// The job as it was run.
    pub job: JobSpec,
    /// The checkpoint.
    pub model: ModelProvenance,
    /// Arithmetic of the forward pass: `f32`, `bf16` or `f16`.
    pub compute_dtype: String,
    /// `None` when ready token ids were given.
    pub tokenizer: Option<TokenizerProvenance>,
    /// The text.
    pub corpus: CorpusProvenance,
    /// Devices, in the order of the layers that they hold.
    pub devices: Vec<DeviceInfo>,
    /// The machine.
    pub host: HostInfo,
    /// Weight bytes read from storage; bytes read twice count twice.
    pub weight_bytes_read: u64,
    /// Weight bytes of the tensors used.
    pub weight_bytes_expected: u64,
    /// First layer that this process ran, if it resumed an earlier pass. Bytes and seconds are
    /// those of the layers from there on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed_at_layer: Option<usize>,
    /// Peak resident memory of the worker process, bytes; `None` if the system does not report it.
    pub peak_memory_bytes: Option<u64>,
    /// Tokens per micro-batch, in whole sequences; `None` in older runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batch_tokens: Option<usize>,
    /// Bytes copied from the host to GPUs, weights included; `None` on CPUs, and in older runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_to_device_bytes: Option<u64>,
    /// Bytes copied from GPUs to the host; `None` on CPUs, and in older runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_to_host_bytes: Option<u64>,
    /// Wall seconds per phase.
    pub seconds: BTreeMap<String, f64>,
    /// Start, in milliseconds since the Unix epoch.
    pub started_at_ms: u64,
    /// End, in milliseconds since the Unix epoch.
    pub finished_at_ms: u64,
}

/// Provenance of the checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelProvenance {
    /// Hub id or folder.
    pub name: String,
    /// Commit hash on the hub; `None` for folders.
    pub revision: Option<String>,
    /// `architectures[0]` of config.json.
    pub architecture: String,
    /// SHA-256 of config.json.
    pub config_sha256: String,
    /// Parameters of the tensors used.
    pub parameters: u64,
    /// Parameters used for one token, in the common sense: all parameters, but of routed experts
    /// only the top-k of each layer. The embedding counts in full, and once if it is also the
    /// head; in a dense model all parameters are active. `None` in older runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_parameters: Option<u64>,
    /// Bytes per stored dtype of the tensors used.
    pub stored_dtypes: BTreeMap<String, u64>,
    /// Known tensors on disk that were not read, by reason.
    pub ignored: Vec<IgnoredTensors>,
    /// Tensors on disk that the architecture does not explain.
    pub unexplained: Vec<String>,
    /// How config.json was read. `None` in older runs, which used the same defaults for all
    /// families.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<ConfigReading>,
    /// Differences between the checkpoint and its config.json or weight index.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checkpoint_notes: Vec<String>,
    /// Which weight files were compared with the hashes on the hub. `None` in older runs and with
    /// synthetic weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_verification: Option<WeightVerification>,
}

/// Comparison of the weight files, as they were read, with the hashes on the hub. A file that
/// differs fails the run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightVerification {
    /// Number of files whose hash is equal.
    pub verified_files: usize,
    /// Files that were not compared, by reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unverified: Vec<UnverifiedWeights>,
}

/// Weight files that were read without a comparison of their hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnverifiedWeights {
    /// Reason.
    pub reason: String,
    /// File names.
    pub files: Vec<String>,
}

impl WeightVerification {
    /// Adds files that were not compared.
    pub fn leave_out(&mut self, reason: impl Into<String>, files: Vec<String>) {
        if !files.is_empty() {
            self.unverified.push(UnverifiedWeights { reason: reason.into(), files });
        }
    }

    /// One line for each reason: `weights unverified: 2 of 4 files (reason)`.
    pub fn warnings(&self) -> impl Iterator<Item = String> {
        let files = self.verified_files + self.unverified.iter().map(|left| left.files.len()).sum::<usize>();
        let noun = if files == 1 { "file" } else { "files" };
        self.unverified
            .iter()
            .map(move |left| format!("weights unverified: {} of {files} {noun} ({})", left.files.len(), left.reason))
    }
}

/// Version of the rules by which config.json is read. It is raised when a checkpoint may be read
/// differently.
pub const CONFIG_RULES: u32 = 3;

/// How config.json was read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConfigReading {
    /// [`CONFIG_RULES`] of the program that read it.
    pub rules: u32,
    /// Configuration class of transformers whose defaults apply to absent keys.
    pub class: String,
    /// Settings that config.json leaves out, with the class's defaults.
    pub defaults: BTreeMap<String, Value>,
    /// Settings that are null where the class allows it.
    pub nulls: Vec<String>,
    /// Keys that neither the class nor the worker knows. They have no effect.
    pub unknown: Vec<String>,
}

impl ConfigReading {
    /// One line for the absent settings with their defaults, and one for null settings.
    pub fn explain(&self) -> Option<String> {
        let defaults: Vec<String> = self.defaults.iter().map(|(key, value)| format!("{key} = {value}")).collect();
        let absent = (!defaults.is_empty())
            .then(|| format!("config.json leaves out keys that {} takes as {}", self.class, defaults.join(", ")));
        let null = (!self.nulls.is_empty()).then(|| format!("config.json says null for {}", self.nulls.join(", ")));
        let parts: Vec<String> = absent.into_iter().chain(null).collect();
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}

/// Provenance of the tokenizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenizerProvenance {
    /// File name; several are joined by ` + `.
    pub file: String,
    /// SHA-256 of that file, or of several concatenated.
    pub sha256: String,
    /// Number of entries.
    pub vocab: usize,
    /// Token id before each window; `None`: none.
    pub bos_token_id: Option<u32>,
}

/// Provenance of the text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CorpusProvenance {
    /// Name of the built-in text, file names, token-id file, or dataset with its commit; for
    /// documents, also which of them were read.
    pub source: String,
    /// SHA-256 of the text that was read, or of the token-id bytes, in order.
    pub sha256: String,
    /// SHA-256 of the token ids fed to the model: i64 little-endian, row by row.
    pub token_ids_sha256: String,
    /// Number of sequences.
    pub sequences: usize,
    /// Tokens per sequence.
    pub tokens_per_sequence: usize,
    /// Tokens of the text that was read.
    pub tokens_available: usize,
}

/// Provenance of a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// As in `--devices`.
    pub name: String,
    /// Model name of the CPU or GPU.
    pub description: String,
    /// Memory of the device, bytes.
    pub memory_bytes: Option<u64>,
}

/// Provenance of the machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Operating system and version.
    pub os: String,
    /// CPU model name.
    pub cpu: String,
    /// Threads the worker uses.
    pub threads: usize,
    /// Memory in bytes; `None` if the system does not report it.
    pub memory_bytes: Option<u64>,
}
