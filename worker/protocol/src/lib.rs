//! Documents that the controller and the worker exchange.
//!
//! Every document has a `schema` number; a reader refuses an unknown number. Field names are the
//! report's labels and say what is counted and in which unit.
//!
//! | document | file | written by |
//! |---|---|---|
//! | [`JobSpec`] | `job.json` | the controller, or a person (JSON or TOML) |
//! | [`Progress`] | `progress.jsonl` | the worker, one line per step; also its heartbeat |
//! | [`Results`] | `results.json` | the worker |
//! | [`Metadata`] | `metadata.json` | the worker |
//! | [`Manifest`] | `manifest.json` | the worker, last: its presence means that all other files are whole |
//! | [`Inspection`] | standard output of `outliers-worker inspect --json` | the worker |
//! | [`VersionInfo`] | standard output of `outliers-worker version --json` | the worker |

mod ablation;
mod corpus_format;
mod diagnostics;
mod export;
mod index_set;
mod inspection;
mod job;
mod measured;
mod metadata;
mod named;
mod number;
mod options;
mod progress;
mod results;
mod size;

pub use ablation::{Ablate, Ablation, AblationArm, Removed};
pub use corpus_format::{CorpusCompression, CorpusContent, CorpusFormat};
pub use diagnostics::{
    ExpertPeak, FeaturePeak, GainSummary, MASSIVE_DIMS, MASSIVE_RECORDS, MagnitudeQuantiles, MassiveActivations,
    MassiveDim, MassiveLayer, MassiveRecord, OtherSite, Record, RouterSummary, RowSpread, RowStatistics, SuperExperts,
    TOP_RECORDS, TopRecords,
};
pub use export::Export;
pub use index_set::IndexSet;
pub use inspection::{
    FileBytes, GpuWork, IgnoredTensors, Inspection, LayerInspection, PlanFigures, SiteInspection, VersionInfo,
};
pub use job::{
    BUILTIN_CORPUS, BosPolicy, CorpusSource, CorpusSpec, Dataset, JobSpec, MICRO_BATCH_TOKENS, ModelSource, Packing,
    Precision, SiteKind, SiteKinds, Thresholds, Weights,
};
pub use measured::{
    AttentionSinkLayer, AttentionSinks, MAPPED_DIMS, MAPPED_POSITIONS, MappedDim, Measurement, NumberFormat,
    PooledQuantization, QUANTIZED_ROWS, QuantizationError, QuantizationErrors, RESIDUAL_SINKS, ResidualMap,
    ResidualSink, ResidualSinkLayer, ResidualSinks, SiteQuantization, SpikeLayer, SpikeLife,
};
pub use metadata::{
    CONFIG_RULES, ConfigReading, CorpusProvenance, DeviceInfo, HostInfo, Metadata, ModelProvenance,
    TokenizerProvenance, UnverifiedWeights, WeightVerification,
};
pub use number::{Fraction, Positive, whole};
#[cfg(feature = "clap")]
pub use options::headings;
pub use options::{JobOptions, Merge, ThresholdOptions};
pub use progress::{Phase, Progress};
pub use results::{
    Axis, Failure, FailureKind, Feature, FileEntry, Manifest, Outcome, Perplexity, Point, Reading, Results,
    SequenceSummary, Sided, SiteSummary, Verdict, WithinSequence,
};
pub use size::ByteSize;

/// Version of all documents in this crate. It is raised when a reader of the old version would
/// misread the new one.
pub const SCHEMA: u32 = 1;

/// Environment variable of a worker: the most requests to the hub in five minutes, as this run's
/// share of the limit for all runs.
pub const HUB_REQUESTS: &str = "OUTLIERS_HUB_REQUESTS";

/// Names of the files in a run's output folder, on the instance and on the user's machine.
pub mod files {
    /// The job, as the worker read it.
    pub const JOB: &str = "job.json";
    /// One [`crate::Progress`] per line.
    pub const PROGRESS: &str = "progress.jsonl";
    /// The [`crate::Results`].
    pub const RESULTS: &str = "results.json";
    /// The [`crate::Metadata`].
    pub const METADATA: &str = "metadata.json";
    /// Per (site, feature) and per (sequence, feature) arrays, safetensors.
    pub const STATISTICS: &str = "statistics.safetensors";
    /// Sums over the inputs of every matrix, GGUF as llama.cpp's importance matrices
    /// ([`crate::Export::Imatrix`]).
    pub const IMATRIX: &str = "imatrix.gguf";
    /// Largest |x| of every input of every matrix, safetensors ([`crate::Export::ActScales`]).
    pub const ACT_SCALES: &str = "act_scales.safetensors";
    /// Input scales per matrix, JSON ([`crate::Export::ActScales`]).
    pub const INPUT_SCALES: &str = "input_scales.json";
    /// Saliency of every expert, JSON ([`crate::Export::Reap`]).
    pub const REAP: &str = "reap.json";
    /// Checkpoint of a pass. It is deleted when the run is complete and is not part of the
    /// results.
    pub const SAVE_POINT: &str = "savepoint";
    /// The [`crate::Manifest`].
    pub const MANIFEST: &str = "manifest.json";
    /// Standard output and standard error of the worker.
    pub const LOG: &str = "worker.log";
    /// Process id of the launched worker's wrapper.
    pub const PID: &str = "worker.pid";
    /// Exit status of the worker in decimal, written by its wrapper.
    pub const EXIT_CODE: &str = "exit_code";
}
