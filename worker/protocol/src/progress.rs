//! Progress of a running worker.

use serde::{Deserialize, Serialize};

/// One line of `progress.jsonl`. Each line is appended whole; a reader resumes after the last
/// newline that it read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Document version.
    pub schema: u32,
    /// Milliseconds since the Unix epoch, by the worker's clock.
    pub at_ms: u64,
    /// Current phase.
    pub phase: Phase,
    /// Number of finished layers.
    pub layer: usize,
    /// Number of layers to run.
    pub layers: usize,
    /// Weight bytes read so far.
    pub bytes_read: u64,
    /// Weight bytes the whole run will read.
    pub bytes_total: u64,
    /// Tokens of the corpus per second, estimated from the finished layers; 0 while unknown.
    pub tokens_per_second: f64,
    /// Estimated seconds to the end; `None` while unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<f64>,
    /// Text for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// The worker's phases, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Reading the job, opening devices.
    Starting,
    /// Downloads metadata and weights from the hub into the cache.
    Fetching,
    /// Compares the files' headers with the architecture.
    Checking,
    /// Encodes the text into token ids.
    Tokenizing,
    /// Computes the hidden states of token ids.
    Embedding,
    /// Runs the layers.
    Layers,
    /// Runs the final norm and the head; computes perplexity.
    Head,
    /// Computes verdicts and writes files.
    Writing,
    /// All files are in place.
    Done,
    /// The run ended with an error; the manifest has the error.
    Failed,
}
