//! Where the numbers come from.

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
    /// Devices, in the order layers are dealt to them.
    pub devices: Vec<DeviceInfo>,
    /// The machine.
    pub host: HostInfo,
    /// Weight bytes read from storage, each counted as often as it was read.
    pub weight_bytes_read: u64,
    /// Weight bytes of the tensors used.
    pub weight_bytes_expected: u64,
    /// The layer at which this process took up an earlier one's pass; what it read, and its
    /// seconds, are of the rest alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed_at_layer: Option<usize>,
    /// Peak resident memory of the worker process, bytes; `None` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
    /// Tokens that were computed together, in whole sequences; `None` in older runs.
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
    /// Milliseconds since the Unix epoch.
    pub started_at_ms: u64,
    /// Milliseconds since the Unix epoch.
    pub finished_at_ms: u64,
}

/// Which checkpoint.
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
    /// Those of them that are there for one token, as models are commonly described: all, but of
    /// routed experts the top-k of each layer. The embedding counts whole, once where it is the
    /// head as well: of a dense model all parameters are active. `None` in older runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_parameters: Option<u64>,
    /// Bytes per stored dtype of the tensors used.
    pub stored_dtypes: BTreeMap<String, u64>,
    /// Tensors on disk that were known and left unread, by reason.
    pub ignored: Vec<IgnoredTensors>,
    /// Tensors on disk that the architecture does not explain.
    pub unexplained: Vec<String>,
    /// How config.json was read. `None` in older runs, which gave absent keys one default for all
    /// families.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<ConfigReading>,
    /// What is not as config.json and the index of the weights say.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checkpoint_notes: Vec<String>,
    /// Which weight files were compared with the hashes that the hub lists. `None` in older runs,
    /// and where weights are made up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_verification: Option<WeightVerification>,
}

/// How the bytes of weight files, as they were read, compare with the hashes that the hub lists. A
/// file that differs fails the run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightVerification {
    /// Files whose hash is the one listed.
    pub verified_files: usize,
    /// Files that were not compared, by reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unverified: Vec<UnverifiedWeights>,
}

/// Weight files that were read without a comparison of their hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnverifiedWeights {
    /// Why not.
    pub reason: String,
    /// Their names.
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

/// Version of the rules by which config.json is read: it counts up whenever a checkpoint may come
/// to mean something else.
pub const CONFIG_RULES: u32 = 2;

/// How config.json was read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConfigReading {
    /// [`CONFIG_RULES`] of the program that read it.
    pub rules: u32,
    /// The configuration class of transformers that says what an absent key means.
    pub class: String,
    /// Settings that config.json leaves out, with the class's defaults.
    pub defaults: BTreeMap<String, Value>,
    /// Settings that are null where the class allows it.
    pub nulls: Vec<String>,
    /// Keys that neither the class nor the program knows; they changed nothing.
    pub unknown: Vec<String>,
}

impl ConfigReading {
    /// Which settings are not in the file, and what stood in for them.
    pub fn explain(&self) -> Option<String> {
        let defaults: Vec<String> = self.defaults.iter().map(|(key, value)| format!("{key} = {value}")).collect();
        let absent = (!defaults.is_empty())
            .then(|| format!("config.json leaves out keys that {} takes as {}", self.class, defaults.join(", ")));
        let null = (!self.nulls.is_empty()).then(|| format!("config.json says null for {}", self.nulls.join(", ")));
        let parts: Vec<String> = absent.into_iter().chain(null).collect();
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}

/// Which tokenizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenizerProvenance {
    /// File name; several with ` + ` between them.
    pub file: String,
    /// SHA-256 of that file, or of several one after another.
    pub sha256: String,
    /// Number of entries.
    pub vocab: usize,
    /// Token id put before each window; `None`: none.
    pub bos_token_id: Option<u32>,
}

/// Which text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CorpusProvenance {
    /// Built-in name, file names, token-id file, or a dataset with its commit; of documents, which
    /// were read.
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

/// One device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// As in `--devices`.
    pub name: String,
    /// Model name of the CPU or GPU.
    pub description: String,
    /// Its memory, bytes.
    pub memory_bytes: Option<u64>,
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Operating system and version.
    pub os: String,
    /// CPU model name.
    pub cpu: String,
    /// Threads the worker uses.
    pub threads: usize,
    /// Memory in bytes; `None` where the system does not tell.
    pub memory_bytes: Option<u64>,
}
