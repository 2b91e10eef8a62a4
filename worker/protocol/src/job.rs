//! The job: which model over which text, counted how.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Ablation, Export, Measurement, Point, SCHEMA};

/// Name of the English text that ships with the worker.
pub const BUILTIN_CORPUS: &str = "shakespeare";

/// Tokens computed together where a job does not say, on CPUs; what is planned for GPUs at least.
pub const MICRO_BATCH_TOKENS: usize = 4096;

/// One run of the worker. Everything that can change a number in the report is in here; where the
/// output goes is not. Names are also read as options are spelt, as in files that people write.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// Document version; absent means the current one.
    #[serde(default = "current_schema")]
    pub schema: u32,
    /// The checkpoint.
    pub model: ModelSource,
    /// What reports call the model, where its path on the instance is not what was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Where its weights come from. `None`: straight from the hub, or from the model's folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<Weights>,
    /// The text.
    #[serde(default)]
    pub corpus: CorpusSpec,
    /// Arithmetic of the forward pass.
    #[serde(default)]
    pub precision: Precision,
    /// Devices as typed: `cpu`, `cpu:2` (two logical devices), `cuda:0`. Empty: the GPUs if there
    /// are any, else `cpu`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<String>,
    /// Only the first N layers: a quick look, without perplexity. `None`: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
    /// When a feature counts.
    #[serde(default)]
    pub thresholds: Thresholds,
    /// What is studied. Norm outputs always are, whether named or not; every other kind costs a
    /// pass over its values.
    #[serde(default = "norms_alone", skip_serializing_if = "is_norms_alone")]
    pub sites: BTreeSet<SiteKind>,
    /// What is measured beside, from the same values.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub measure: BTreeSet<Measurement>,
    /// What is written for other programs, from the same pass.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub export: BTreeSet<Export>,
    /// File name inside the output folder for every studied activation, as safetensors. Large:
    /// tokens x hidden x sites x 4 bytes. Outputs of single experts are never saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(alias = "save-activations")]
    pub save_activations: Option<String>,
    /// File name inside the output folder for a time line of the pass, as JSON in Chrome's trace
    /// event format.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    /// Features to take away in copies of the tokens that pass beside them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ablation: Option<Ablation>,
    /// Tokens computed together; whole sequences, at least one. `None`: on GPUs as many as fit,
    /// else 4,096.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(alias = "micro-batch-tokens")]
    pub micro_batch_tokens: Option<usize>,
    /// Bytes of weights that may be in memory at a time, decoded and on their way together.
    /// `None`: by what is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(alias = "stream-budget-bytes")]
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

/// Kinds of sites that can be asked for.
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

impl SiteKind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Norms, Self::Residual, Self::AttentionOut, Self::MlpOut, Self::ExpertOut];
}

/// Kinds as people write them: one by its name (`expert-out`), or `all`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SiteKinds(pub Vec<SiteKind>);

impl FromStr for SiteKinds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        use SiteKind::{AttentionOut, ExpertOut, MlpOut, Norms, Residual};
        Ok(Self(match text {
            "norms" => vec![Norms],
            "residual" => vec![Residual],
            "attention-out" => vec![AttentionOut],
            "mlp-out" => vec![MlpOut],
            "expert-out" => vec![ExpertOut],
            "all" => SiteKind::ALL.to_vec(),
            _ => return Err("there are norms, residual, attention-out, mlp-out, expert-out, all".to_owned()),
        }))
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
    /// A job with the defaults of every option but the model.
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

    /// What is studied: what was asked for, and what measurements and exports need.
    pub fn kinds(&self) -> BTreeSet<SiteKind> {
        let measured = self.measure.iter().flat_map(|measurement| measurement.needs());
        let exported = self.export.iter().flat_map(|export| export.needs());
        self.sites.iter().chain(measured).chain(exported).copied().collect()
    }

    /// Whether values at this point of a layer are studied.
    pub fn studies(&self, point: Point) -> bool {
        point.is_norm_output() || self.kinds().contains(&point.into())
    }

    /// What reports call the model.
    pub fn model_name(&self) -> &str {
        self.label.as_deref().unwrap_or(self.model.name())
    }
}

/// Where the checkpoint is, seen from the machine that runs the worker.
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
    /// What was typed: hub id or path.
    pub fn name(&self) -> &str {
        match self {
            Self::Hub { id, .. } => id,
            Self::Folder { path } => path,
        }
    }
}

impl JobSpec {
    /// Whether the worker asks the hub for something: it needs the token, and the address where
    /// that is another one.
    pub fn asks_the_hub(&self) -> bool {
        matches!(self.model, ModelSource::Hub { .. }) || matches!(self.corpus.source, CorpusSource::Dataset(_))
    }
}

/// Where weights come from, where that is not where the model is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Weights {
    /// Over the network as they are used; none of them is written to disk.
    Hub,
    /// Fetched into the hub's cache folder first, and found there by the next run.
    Cache,
    /// The weight files of another folder.
    Local {
        /// Absolute, or relative to the worker's current folder.
        path: String,
    },
    /// Made-up numbers of the shapes and dtypes that the configuration asks for: for measurements,
    /// and for trying a model without having it.
    Synthetic {
        /// Equal seeds make equal weights.
        seed: u64,
    },
}

/// As people write them: `hub`, `cache`, `local:DIR`, `synthetic:SEED`.
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

/// As [`FromStr`] reads them.
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
    /// Sequences to run. With token ids: at most this many rows; `None` takes all rows (text: 16).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(alias = "num-sequences")]
    pub num_sequences: Option<usize>,
    /// Tokens per sequence, BOS included. With token ids: must equal the row length when given
    /// (text: 2048, or the model's limit if lower).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(alias = "sequence-length")]
    pub sequence_length: Option<usize>,
    /// Whether each window starts with the BOS token.
    pub bos: BosPolicy,
    /// How documents become windows.
    pub packing: Packing,
    /// The field or column that holds the text, where documents have several.
    #[serde(alias = "text-field")]
    pub text_field: String,
    /// Number of documents to skip first.
    #[serde(skip_serializing_if = "is_zero")]
    #[serde(alias = "skip-documents")]
    pub skip_documents: usize,
    /// Documents come in an order made from this seed, not as they are stored: files, the blocks
    /// of each file and the documents of each block are shuffled, so that only the blocks in use
    /// are read.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(alias = "shuffle-seed")]
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

/// Where the token ids come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CorpusSource {
    /// A text shipped with the worker.
    Builtin(String),
    /// UTF-8 text files, one document each, and files of many documents;
    /// [`CorpusFormat`](crate::CorpusFormat) tells them by their names.
    /// JSON Lines and Parquet files are read only as far as needed.
    Files(Vec<String>),
    /// A dataset on the hub, read in ranges: no more of it than is needed.
    Dataset(Dataset),
    /// Ready token ids, fed to the model as they are: a safetensors file with `input_ids` i64
    /// `[sequences, tokens]`, or a JSON list of lists. Never decoded nor encoded again.
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

/// FineWeb-Edu's sample of 10 billion tokens (Penedo et al. 2024), as it was when this was
/// written.
const FINEWEB_EDU: (&str, &str, &str, &str) =
    ("fineweb-edu", "HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", "sample/10BT");

/// As people write it: `owner/name[@REVISION][:PATH]`, or `fineweb-edu` for its sample of 10
/// billion tokens at one commit.
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

/// As [`FromStr`] reads it.
impl fmt::Display for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.id, self.revision)?;
        if self.path.is_empty() { Ok(()) } else { write!(f, ":{}", self.path) }
    }
}

/// Whether each window starts with the beginning-of-sequence token. Massive activations sit on it,
/// so it is never left to chance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "snake_case")]
pub enum BosPolicy {
    /// As the family's own tokenizer does on plain text.
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
    /// All documents one after another, then cut.
    #[default]
    Packed,
    /// Each document cut by itself; the rest that does not fill a window is dropped.
    Separate,
    /// The predecessor's way, to compare with its figures: all documents joined by spaces, and
    /// each window begins in the middle of the one before it, so that nearly every token is
    /// counted twice. (The predecessor also decoded and encoded every window again; here its ids
    /// stay.)
    Overlapping,
}

/// Arithmetic of the forward pass. Statistics are always taken on the values as computed, widened
/// to f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32 on a CPU, bf16 on a GPU.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16: values from 5.984375 up round to 6 and count.
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
