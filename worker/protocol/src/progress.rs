//! What the worker says while it runs.

use serde::{Deserialize, Serialize};

/// One line of `progress.jsonl`. Lines are appended whole; a reader resumes at the byte after the last newline it saw.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Document version.
    pub schema: u32,
    /// Milliseconds since the Unix epoch, the worker's clock.
    pub at_ms: u64,
    /// What is going on.
    pub phase: Phase,
    /// Layers finished.
    pub layer: usize,
    /// Layers to do.
    pub layers: usize,
    /// Weight bytes read so far.
    pub bytes_read: u64,
    /// Weight bytes the whole run will read.
    pub bytes_total: u64,
    /// Tokens of the corpus per second, were every layer as fast as those finished; 0 while unknown.
    pub tokens_per_second: f64,
    /// Seconds to the end by the same measure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<f64>,
    /// A sentence for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// The worker's phases, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Reading the job, opening devices.
    Starting,
    /// Fetching metadata and weights from the hub into the cache.
    Fetching,
    /// Comparing the files' headers with what the architecture expects.
    Checking,
    /// Text to token ids.
    Tokenizing,
    /// Token ids to hidden states.
    Embedding,
    /// The layers.
    Layers,
    /// Final norm, head, perplexity.
    Head,
    /// Verdicts and files.
    Writing,
    /// All files are in place.
    Done,
    /// It ended with an error; the manifest has it.
    Failed,
}
