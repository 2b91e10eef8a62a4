//! What a checkpoint contains, read without its weights.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{ConfigReading, Point};

/// Output of `outliers-worker inspect --json`: architecture, sites and exact bytes from the
/// safetensors headers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inspection {
    /// Document version.
    pub schema: u32,
    /// Hub id or folder.
    pub model: String,
    /// Commit hash on the hub; `None` for folders.
    pub revision: Option<String>,
    /// `architectures[0]` of config.json.
    pub architecture: String,
    /// `model_type` of config.json.
    pub model_type: String,
    /// Hidden size.
    pub hidden: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Most positions that the model computes.
    pub max_positions: Option<usize>,
    /// Whether the head is the embedding.
    pub tied_head: bool,
    /// Parameters of the tensors used.
    pub parameters: u64,
    /// Parameters used for one token, as in [`crate::ModelProvenance::active_parameters`].
    pub active_parameters: u64,
    /// Bytes of the tensors used, as stored.
    pub stored_bytes: u64,
    /// Bytes per stored dtype.
    pub stored_dtypes: BTreeMap<String, u64>,
    /// Bytes of the embedding, as stored.
    pub embedding_bytes: u64,
    /// Bytes of final norm and head, as stored.
    pub head_bytes: u64,
    /// One entry per layer.
    pub layers: Vec<LayerInspection>,
    /// The studied norm outputs, in order of computation.
    pub sites: Vec<SiteInspection>,
    /// Gain tensors of norms in the layers that are not studied, with `{layer}` for the layer
    /// number. No projection reads their output (norms of a sublayer's output), or only experts
    /// do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unstudied_norms: Vec<String>,
    /// Tensors on disk that a text-only pass of the main stack does not use, by reason.
    pub ignored: Vec<IgnoredTensors>,
    /// Tensors on disk that the architecture does not explain.
    pub unexplained: Vec<String>,
    /// How config.json was read.
    pub config: ConfigReading,
    /// As in [`crate::ModelProvenance::checkpoint_notes`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checkpoint_notes: Vec<String>,
    /// Files the run needs, with their sizes.
    pub files: Vec<FileBytes>,
    /// Other files of a hub model: configuration, tokenizer and index.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub description: Vec<FileBytes>,
    /// Tokenizer file. `None`: only token ids can be used.
    pub tokenizer: Option<String>,
    /// What a run over the given number of tokens needs.
    pub plan: PlanFigures,
}

/// Known tensors on disk that are not read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IgnoredTensors {
    /// What the tensors are.
    pub why: String,
    /// Number of tensors.
    pub tensors: usize,
    /// Size in bytes.
    pub bytes: u64,
    /// Name of the first tensor.
    pub example: String,
}

/// One layer on disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerInspection {
    /// Layer, from 0.
    pub layer: usize,
    /// Description: mixer and feed-forward.
    pub kind: String,
    /// Routed experts; 0 for a dense layer.
    pub experts: usize,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of parameters.
    pub parameters: u64,
    /// Bytes as stored.
    pub bytes: u64,
}

/// One studied norm output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SiteInspection {
    /// Layer, from 0.
    pub layer: usize,
    /// Where in the layer.
    pub point: Point,
    /// Tensor of the norm's gain.
    pub tensor: String,
}

/// A file and its size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileBytes {
    /// Name inside the repository or folder.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
}

/// What a run needs, computed from the headers and the job; nothing is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanFigures {
    /// Number of sequences.
    pub sequences: usize,
    /// Tokens per sequence.
    pub tokens_per_sequence: usize,
    /// Bytes per value of the forward pass (4 for f32, 2 for bf16).
    pub compute_bytes_per_value: u64,
    /// Floating-point operations of the whole run: 2 x parameters that a token is multiplied with
    /// x tokens, plus causal attention.
    pub flops: f64,
    /// Tokens per micro-batch: the job's number, or what fits on this machine's devices. `None`:
    /// the most that fit on the rented GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batch_tokens: Option<usize>,
    /// Device memory in bytes when weights are streamed: hidden states, the two largest streaming
    /// units, workspace. This is the minimum; larger micro-batches are not counted.
    pub streamed_memory_bytes: u64,
    /// Device memory in bytes when every weight stays on the device.
    pub resident_memory_bytes: u64,
    /// Memory of the host that a run on GPUs needs at least, without what holds bytes for hashes;
    /// 0 for a run on CPUs, whose device memory it is. Bytes.
    #[serde(default)]
    pub host_memory_bytes: u64,
    /// Hidden states held between layers. Bytes.
    pub hidden_state_bytes: u64,
    /// Bytes of host memory for parts of files that wait for their hash, if weights stream from
    /// the hub. With less memory, some files are not verified.
    #[serde(default)]
    pub hash_memory_bytes: u64,
    /// Bytes of weights on the instance's disk; 0 if they stream from the hub.
    pub disk_bytes: u64,
    /// Weight bytes the run reads.
    pub bytes_to_read: u64,
    /// Transfers and kernel launches of GPUs.
    #[serde(default)]
    pub on_gpus: GpuWork,
    /// Files for other programs, each with its largest size in bytes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exports: Vec<FileBytes>,
}

/// Transfers and kernel launches of a run on GPUs. All are counted, except the launches in a
/// layer, which are estimated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuWork {
    /// Bytes from the host to GPUs: weights as they are stored, and the rows of the embedding that
    /// the text uses.
    pub host_to_device_bytes: u64,
    /// Bytes from GPUs to the host: summaries of statistics, values measured on the host as f32,
    /// and three numbers per token and block of logits.
    pub device_to_host_bytes: u64,
    /// Bytes of hidden states from GPU to GPU: all of them after each layer, with several GPUs.
    pub passed_on_bytes: u64,
    /// Bytes that statistics read from the GPUs' memory.
    pub statistics_bytes: u64,
    /// Number of kernel launches.
    pub launches: u64,
}

/// Output of `outliers-worker version --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionInfo {
    /// Version of the worker.
    pub version: String,
    /// Version of the documents.
    pub schema: u32,
    /// Platform of the build: `x86_64-linux`.
    pub target: String,
    /// Whether the worker is built with CUDA.
    pub cuda: bool,
    /// The oldest CUDA version that the driver must support: `11.8`. `None` without CUDA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_cuda: Option<String>,
    /// Architectures that the worker supports.
    pub architectures: Vec<String>,
}
