//! What a checkpoint is, before any weight is read.

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
    /// Longest sequence that is computed.
    pub max_positions: Option<usize>,
    /// The head is the embedding.
    pub tied_head: bool,
    /// Parameters of the tensors used.
    pub parameters: u64,
    /// Those of them that are there for one token, as in
    /// [`crate::ModelProvenance::active_parameters`].
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
    /// Gains of other norms of the layers, with `{layer}` for the layer: nothing is projected from
    /// their outputs (norms of a sublayer's output), or only experts read them. They act and are
    /// not studied.
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
    /// Files of a hub model beside those: configuration, tokenizer and index.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub description: Vec<FileBytes>,
    /// Tokenizer file; `None`: only ready token ids can be used.
    pub tokenizer: Option<String>,
    /// What a run over the given number of tokens needs.
    pub plan: PlanFigures,
}

/// Tensors on disk that are known and left unread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IgnoredTensors {
    /// What they are.
    pub why: String,
    /// How many.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: u64,
    /// The name of the first.
    pub example: String,
}

/// One layer on disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerInspection {
    /// Layer, from 0.
    pub layer: usize,
    /// In words: mixer and feed-forward.
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
    /// The tensor holding the norm's gain.
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

/// What a run needs: arithmetic over the headers and the job, nothing measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanFigures {
    /// Number of sequences.
    pub sequences: usize,
    /// Tokens per sequence.
    pub tokens_per_sequence: usize,
    /// Bytes per value of the forward pass (4 for f32, 2 for bf16).
    pub compute_bytes_per_value: u64,
    /// Floating-point operations of the whole run: 2 x parameters a token is multiplied with x
    /// tokens, plus causal attention.
    pub flops: f64,
    /// Tokens computed together: as asked for, or what the devices of this machine have memory
    /// for. `None`: as many as fit on the GPU that is rented.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batch_tokens: Option<usize>,
    /// Device memory when streamed: hidden states, the two largest streaming units, workspace.
    /// What a run needs at least: micro-batches that grow with the memory are not counted. Bytes.
    pub streamed_memory_bytes: u64,
    /// Device memory when every weight stays. Bytes.
    pub resident_memory_bytes: u64,
    /// Memory of the host that a run on GPUs needs at least, without what holds bytes for hashes;
    /// 0 for a run on CPUs, whose device memory it is. Bytes.
    #[serde(default)]
    pub host_memory_bytes: u64,
    /// Hidden states held between layers. Bytes.
    pub hidden_state_bytes: u64,
    /// Host memory that holds bytes until the hash of their file reaches them, where weights
    /// stream from the hub; with less, some files are not verified. Bytes.
    #[serde(default)]
    pub hash_memory_bytes: u64,
    /// Weights on the instance's disk: none where they stream from the hub. Bytes.
    pub disk_bytes: u64,
    /// Weight bytes the run reads.
    pub bytes_to_read: u64,
    /// What GPUs do beside the arithmetic.
    #[serde(default)]
    pub on_gpus: GpuWork,
    /// The files that are written for other programs, each with the most bytes that it can have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exports: Vec<FileBytes>,
}

/// What a run on GPUs moves and launches: counted, but for the launches of a layer, which are
/// assumed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuWork {
    /// Bytes from the host to GPUs: weights as they are stored, and the rows of the embedding that
    /// the text uses.
    pub host_to_device_bytes: u64,
    /// Bytes from GPUs to the host: summaries of statistics, values that are measured on the host
    /// as f32, and three numbers per token and block of logits.
    pub device_to_host_bytes: u64,
    /// Bytes of hidden states that go from GPU to GPU where there are several: all, after each
    /// layer.
    pub passed_on_bytes: u64,
    /// Bytes that statistics read from the GPUs' own memory.
    pub statistics_bytes: u64,
    /// Kernels that are launched.
    pub launches: u64,
}

/// Output of `outliers-worker version --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionInfo {
    /// Version of the worker.
    pub version: String,
    /// Version of the documents it speaks.
    pub schema: u32,
    /// Target triple's parts: `x86_64-linux`.
    pub target: String,
    /// Built with CUDA: it uses NVIDIA's GPUs where there are some.
    pub cuda: bool,
    /// If so, the oldest CUDA that a driver may serve: `11.8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_cuda: Option<String>,
    /// Architectures it knows.
    pub architectures: Vec<String>,
}
