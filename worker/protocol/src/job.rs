//! The job: which model, which text, and what is counted.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::named::named;
use crate::{Ablation, Export, Measurement, Point, SCHEMA};

/// Name of the English text that ships with the worker.
pub const BUILTIN_CORPUS: &str = "shakespeare";

/// Tokens per micro-batch on CPUs unless the job has another number; the least that is planned for
/// GPUs.
pub const MICRO_BATCH_TOKENS: usize = 4096;

/// One run of the worker. It holds everything that can change a number in the report; it does not
/// hold the output folder. Fields may also be spelt as the command line's options, for files that
/// people write.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// Document version; absent means the current one.
    #[serde(default = "current_schema")]
    pub schema: u32,
    /// The checkpoint.
    pub model: ModelSource,
    /// Name of the model in reports, if it differs from the model's path on the instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Source of the weights. `None`: the hub, or the model's folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<Weights>,
    /// The text.
    #[serde(default)]
    pub corpus: CorpusSpec,
    /// Arithmetic of the forward pass.
    #[serde(default)]
    pub precision: Precision,
    /// Devices as on the command line: `cpu`, `cpu:2` (two logical devices), `cuda:0`. Empty: all
    /// GPUs, or `cpu` without a GPU.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<String>,
    /// Number of layers to run, from the first; the results then have no perplexity. `None`: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
    /// Thresholds of outlier features.
    #[serde(default)]
    pub thresholds: Thresholds,
    /// Kinds of sites that are studied. Norm outputs are always studied; each other kind costs a
    /// pass over its values.
    #[serde(default = "norms_alone", skip_serializing_if = "is_norms_alone")]
    pub sites: BTreeSet<SiteKind>,
    /// What else is measured in the same pass.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub measure: BTreeSet<Measurement>,
    /// Files to write for other programs in the same pass.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub export: BTreeSet<Export>,
    /// Name of a safetensors file in the output folder for every studied activation: tokens x
    /// hidden x sites x 4 bytes. Outputs of single experts are not saved.
    #[serde(default, skip_serializing_if = "Option::is_none", alias = "save-activations")]
    pub save_activations: Option<String>,
    /// Name of a file in the output folder for a timeline of the pass, as JSON in Chrome's trace
    /// event format.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    /// Features to ablate. Ablated copies of the tokens pass through each layer beside the tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ablation: Option<Ablation>,
    /// Tokens per micro-batch, in whole sequences, at least one. `None`: on GPUs the most that
    /// fit, on CPUs 4,096.
    #[serde(default, skip_serializing_if = "Option::is_none", alias = "micro-batch-tokens")]
    pub micro_batch_tokens: Option<usize>,
    /// Most bytes of weights in memory at a time, decoded and in transfer together. `None`: a
    /// share of the free memory.
    #[serde(default, skip_serializing_if = "Option::is_none", alias = "stream-budget-bytes")]
    pub stream_budget_bytes: Option<u64>,
}

fn current_schema() -> u32 {
    SCHEMA
}

fn norms_alone() -> BTreeSet<SiteKind> {
    BTreeSet::from([SiteKind::Norms])
}

fn is_norms_alone(sites: &BTreeSet<SiteKind>) -> bool {
    sites.iter().all(|kind| *kind == SiteKind::Norms)
}

/// Kinds of sites that a job can study.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SiteKind {
    /// The outputs of the layers' norms, where outlier features are defined.
    Norms,
    /// The residual stream after each layer, where massive activations are.
    Residual,
    /// What attention adds to the residual stream.
    #[serde(alias = "attention-out")]
    AttentionOut,
    /// What the MLP, or the experts together, add to the residual stream.
    #[serde(alias = "mlp-out")]
    MlpOut,
    /// The output of each routed expert's down projection, where super experts show.
    #[serde(alias = "expert-out")]
    ExpertOut,
}

named! {
    SiteKind:
    Norms = "norms",
    Residual = "residual",
    AttentionOut = "attention-out",
    MlpOut = "mlp-out",
    ExpertOut = "expert-out"
}

/// Kinds of sites from the command line: one by its name (`expert-out`), or `all`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SiteKinds(pub Vec<SiteKind>);

impl FromStr for SiteKinds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self(SiteKind::ALL.to_vec()));
        }
        text.parse::<SiteKind>().map(|kind| Self(vec![kind])).map_err(|known| format!("{known}, all"))
    }
}

impl From<Point> for SiteKind {
    fn from(point: Point) -> Self {
        match point {
            Point::BeforeAttention | Point::BeforeMlp | Point::AfterAttention | Point::AfterMlp => Self::Norms,
            Point::Residual => Self::Residual,
            Point::AttentionOut => Self::AttentionOut,
            Point::MlpOut => Self::MlpOut,
            Point::ExpertOut => Self::ExpertOut,
        }
    }
}

impl JobSpec {
    /// A job over `model` with the defaults of all other options.
    pub fn new(model: ModelSource) -> Self {
        Self {
            schema: SCHEMA,
            model,
            label: None,
            weights: None,
            corpus: CorpusSpec::default(),
            precision: Precision::default(),
            devices: Vec::new(),
            layers: None,
            thresholds: Thresholds::default(),
            sites: norms_alone(),
            measure: BTreeSet::new(),
            export: BTreeSet::new(),
            save_activations: None,
            trace: None,
            ablation: None,
            micro_batch_tokens: None,
            stream_budget_bytes: None,
        }
    }

    /// Kinds of sites that are studied: those of the job, and those that its measurements and
    /// exports need.
    pub fn kinds(&self) -> BTreeSet<SiteKind> {
        let measured = self.measure.iter().flat_map(|measurement| measurement.needs());
        let exported = self.export.iter().flat_map(|export| export.needs());
        self.sites.iter().chain(measured).chain(exported).copied().collect()
    }

    /// Whether values at this point of a layer are studied.
    pub fn studies(&self, point: Point) -> bool {
        point.is_norm_output() || self.kinds().contains(&point.into())
    }

    /// Name of the model in reports.
    pub fn model_name(&self) -> &str {
        self.label.as_deref().unwrap_or(self.model.name())
    }
}

/// Where the checkpoint is, as seen by the machine that runs the worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ModelSource {
    /// A repository on the Hugging Face hub.
    Hub {
        /// `owner/name`.
        id: String,
        /// Branch, tag or commit.
        #[serde(default = "main_branch")]
        revision: String,
    },
    /// A folder with `config.json` and safetensors files.
    Folder {
        /// Absolute, or relative to the worker's current folder.
        path: String,
    },
}

fn main_branch() -> String {
    "main".to_owned()
}

impl ModelSource {
    /// Hub id or path, as given.
    pub fn name(&self) -> &str {
        match self {
            Self::Hub { id, .. } => id,
            Self::Folder { path } => path,
        }
    }
}

impl JobSpec {
    /// Whether the worker sends requests to the hub. It then needs the token, and the hub's
    /// address if that is not the default.
    pub fn asks_the_hub(&self) -> bool {
        matches!(self.model, ModelSource::Hub { .. }) || matches!(self.corpus.source, CorpusSource::Dataset(_))
    }
}

/// Source of the weights, if it is not the model's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Weights {
    /// Streamed from the hub; no weight is written to disk.
    Hub,
    /// Downloaded into the Hugging Face cache first; the next run finds them there.
    Cache,
    /// The weight files of another folder.
    Local {
        /// Absolute, or relative to the worker's current folder.
        path: String,
    },
    /// Random weights in the shapes and dtypes of the configuration, for benchmarks and to try a
    /// model without a download.
    Synthetic {
        /// Seed. Equal seeds give equal weights.
        seed: u64,
    },
}

/// Reads `hub`, `cache`, `local:DIR` or `synthetic:SEED`.
impl FromStr for Weights {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "hub" => Ok(Self::Hub),
            None if text == "cache" => Ok(Self::Cache),
            Some(("local", path)) if !path.is_empty() => Ok(Self::Local { path: path.to_owned() }),
            Some(("synthetic", seed)) => {
                let seed = seed.parse().map_err(|_| format!("{seed:?} is not a seed: use a whole number"))?;
                Ok(Self::Synthetic { seed })
            }
            _ => Err("there are hub, cache, local:DIR and synthetic:SEED".to_owned()),
        }
    }
}

/// Writes what [`FromStr`] reads.
impl fmt::Display for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hub => f.write_str("hub"),
            Self::Cache => f.write_str("cache"),
            Self::Local { path } => write!(f, "local:{path}"),
            Self::Synthetic { seed } => write!(f, "synthetic:{seed}"),
        }
    }
}

/// The text and how it is cut into sequences.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CorpusSpec {
    /// Where the text or the token ids come from.
    pub source: CorpusSource,
    /// Sequences to run. With token ids: the most rows; `None` takes all rows (text: 16).
    #[serde(skip_serializing_if = "Option::is_none", alias = "num-sequences")]
    pub num_sequences: Option<usize>,
    /// Tokens per sequence, BOS included. With token ids: must equal the row length when given
    /// (text: 2048, or the model's limit if lower).
    #[serde(skip_serializing_if = "Option::is_none", alias = "sequence-length")]
    pub sequence_length: Option<usize>,
    /// Whether each window starts with the BOS token.
    pub bos: BosPolicy,
    /// How documents become windows.
    pub packing: Packing,
    /// Field or column that holds the text of a document.
    #[serde(alias = "text-field")]
    pub text_field: String,
    /// Number of documents to skip first.
    #[serde(skip_serializing_if = "is_zero", alias = "skip-documents")]
    pub skip_documents: usize,
    /// Seed by which documents are shuffled. `None`: documents come in stored order. Files, the
    /// blocks of each file and the documents of each block are shuffled, so only the blocks in use
    /// are read.
    #[serde(skip_serializing_if = "Option::is_none", alias = "shuffle-seed")]
    pub shuffle_seed: Option<u64>,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl Default for CorpusSpec {
    fn default() -> Self {
        Self {
            source: CorpusSource::Builtin(BUILTIN_CORPUS.to_owned()),
            num_sequences: None,
            sequence_length: None,
            bos: BosPolicy::Auto,
            packing: Packing::Packed,
            text_field: "text".to_owned(),
            skip_documents: 0,
            shuffle_seed: None,
        }
    }
}

/// Source of the text or the token ids.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CorpusSource {
    /// A text shipped with the worker.
    Builtin(String),
    /// UTF-8 text files, one document each, and files of many documents.
    /// [`CorpusFormat`](crate::CorpusFormat) has the formats by file name.
    /// JSON Lines and Parquet files are read only as far as needed.
    Files(Vec<String>),
    /// A dataset on the hub, read in byte ranges as far as needed.
    Dataset(Dataset),
    /// Token ids, used as they are: a safetensors file with `input_ids` i64 `[sequences, tokens]`,
    /// or a JSON list of lists.
    #[serde(alias = "token-ids")]
    TokenIds(String),
}

/// The files of a dataset repository that hold many documents each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dataset {
    /// `owner/name`.
    pub id: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// Folder in the repository whose files are read, in the order of their names, or one file.
    /// Empty: all.
    #[serde(default)]
    pub path: String,
}

/// FineWeb-Edu's sample of 10 billion tokens (Penedo et al. 2024), at a fixed commit.
const FINEWEB_EDU: (&str, &str, &str, &str) =
    ("fineweb-edu", "HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", "sample/10BT");

/// Reads `owner/name[@REVISION][:PATH]`, or `fineweb-edu` for its sample of 10 billion tokens at
/// one commit.
impl FromStr for Dataset {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (short, id, revision, path) = FINEWEB_EDU;
        if text == short {
            return Ok(Self { id: id.to_owned(), revision: revision.to_owned(), path: path.to_owned() });
        }
        let (repository, path) = text.split_once(':').unwrap_or((text, ""));
        let (id, revision) = repository.split_once('@').unwrap_or((repository, "main"));
        if id.split('/').count() != 2 || id.split('/').any(str::is_empty) || revision.is_empty() {
            return Err(format!("{text:?} is not a dataset: write owner/name, owner/name@revision:folder, or {short}"));
        }
        Ok(Self { id: id.to_owned(), revision: revision.to_owned(), path: path.trim_matches('/').to_owned() })
    }
}

/// Writes what [`FromStr`] reads.
impl fmt::Display for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.id, self.revision)?;
        if self.path.is_empty() { Ok(()) } else { write!(f, ":{}", self.path) }
    }
}

/// Whether each window starts with the beginning-of-sequence token. The choice is always recorded,
/// because massive activations are at this token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "snake_case")]
pub enum BosPolicy {
    /// As the model family's own tokenizer does on plain text.
    #[default]
    Auto,
    /// Always; an error if the tokenizer has none.
    Always,
    /// No BOS.
    Never,
}

/// How documents become windows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// All documents one after another, then cut into windows.
    #[default]
    Packed,
    /// Each document cut by itself. The rest that does not fill a window is dropped.
    Separate,
    /// The predecessor project's packing, to compare with its figures: all documents are joined by
    /// spaces and each window begins in the middle of the window before it, so nearly every token
    /// is counted twice. (The predecessor also decoded and encoded every window again; this
    /// packing keeps the token ids.)
    Overlapping,
}

/// Arithmetic of the forward pass. Statistics are taken on the computed values, widened to f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32 on a CPU, bf16 on a GPU.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16. Values from 5.984375 up round to 6 and count as outliers.
    Bf16,
    /// 16-bit floats. Several surveyed models overflow in them.
    F16,
}

/// When a feature is an outlier, and when it is systematic (LLM.int8(), section 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Thresholds {
    /// |x| >= this, inclusive.
    pub magnitude: f32,
    /// Least share of layers (or sites), inclusive.
    #[serde(alias = "layer-fraction")]
    pub layer_fraction: f64,
    /// Least share of sequence positions, inclusive.
    #[serde(alias = "position-fraction")]
    pub position_fraction: f64,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self { magnitude: 6.0, layer_fraction: 0.25, position_fraction: 0.06 }
    }
}
