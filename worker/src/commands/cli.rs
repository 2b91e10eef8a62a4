//! Command-line arguments.

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use outliers_protocol::{ByteSize, JobOptions, JobSpec, ModelSource, headings, whole};

use crate::checkpoint::source::MAX_JSON_BYTES;
use crate::error::{IoContext, Result, WorkerError};
use crate::files::read_text;

/// Streams a language model layer by layer over text and counts its outlier features.
///
/// Example: outliers-worker run --model ./OLMoE-1B-7B-0125 --corpus book.txt --output out
#[derive(Parser, Debug)]
#[command(name = "outliers-worker", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// The Hugging Face hub.
    #[command(flatten)]
    pub hub: HubArgs,
    /// Compute with the tensor library's operations where no GPU kernel exists, as on GPUs. For
    /// comparison.
    #[arg(long, global = true, hide = true)]
    pub composed: bool,
    /// Print the result or the failure as JSON on standard output.
    #[arg(long, global = true)]
    pub json: bool,
    /// Print more to standard error.
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

/// Address of the hub and folders of its cache.
#[derive(Args, Debug)]
pub struct HubArgs {
    /// Address of the Hugging Face hub.
    #[arg(long, global = true, env = "HF_ENDPOINT", default_value = crate::checkpoint::hub::DEFAULT_ENDPOINT, hide = true)]
    pub hf_endpoint: String,
    /// Folder of Hugging Face's settings and cache.
    #[arg(long, global = true, env = "HF_HOME", hide = true)]
    pub hf_home: Option<PathBuf>,
    /// Folder of the Hugging Face model cache.
    #[arg(long, global = true, env = "HF_HUB_CACHE", hide = true)]
    pub hf_hub_cache: Option<PathBuf>,
    /// Maximum requests to the hub in five minutes: this run's share of the hub's limits.
    #[arg(long, global = true, env = outliers_protocol::HUB_REQUESTS, default_value_t = crate::checkpoint::hub::DEFAULT_REQUESTS, hide = true)]
    pub hub_requests: usize,
}

impl HubArgs {
    /// `HF_HOME`; default `~/.cache/huggingface`.
    pub fn home(&self) -> Option<PathBuf> {
        self.hf_home.clone().or_else(|| Some(std::env::home_dir()?.join(".cache/huggingface")))
    }

    /// `HF_HUB_CACHE`; default `hub` in [`Self::home`].
    ///
    /// # Errors
    /// Job: neither is set, and the user has no home folder.
    pub fn cache(&self) -> Result<PathBuf> {
        let below_home = || self.home().map(|home| home.join("hub"));
        self.hf_hub_cache.clone().or_else(below_home).ok_or_else(|| {
            WorkerError::job("there is no folder for the model cache: the user has no home folder").hint("set HF_HOME")
        })
    }
}

/// The worker's commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run a job and write its files to a folder.
    Run {
        /// Job file (JSON or TOML), instead of options.
        #[arg(value_name = "JOB", conflicts_with_all = ["model", "corpus", "token_ids"])]
        job: Option<PathBuf>,
        /// The job as options.
        #[command(flatten)]
        options: Box<JobArgs>,
        /// Folder for results, metadata, statistics and progress.
        #[arg(short, long, value_name = "DIR")]
        output: PathBuf,
        /// Save the pass at the end of a layer this often; the same job into the same folder goes
        /// on from there if it died.
        #[arg(
            long,
            value_name = "SECONDS",
            default_value_t = 60,
            value_parser = whole::<u64>,
            allow_negative_numbers = true
        )]
        save_every: u64,
    },
    /// Describe a checkpoint and what a run over it needs. Reads headers only.
    Inspect {
        /// The job to plan for.
        #[command(flatten)]
        options: Box<JobArgs>,
        /// Also cut the text into sequences, to find text that does not fit the model.
        #[arg(long)]
        check_text: bool,
        /// Memory limit. The process aborts if it exceeds it.
        #[arg(long, value_name = "BYTES")]
        memory_limit: Option<ByteSize>,
    },
    /// Write a small mixture-of-experts checkpoint with planted outlier features.
    DemoModel {
        /// Folder for the checkpoint and `planted.json`.
        #[arg(short, long, value_name = "DIR")]
        output: PathBuf,
        /// Seed of the weights.
        #[arg(long, default_value_t = 1, value_parser = whole::<u64>, allow_negative_numbers = true)]
        seed: u64,
    },
    /// Measure the worker on this machine.
    Bench {
        /// What to measure.
        #[command(subcommand)]
        what: Bench,
    },
    /// List this machine's devices, and why others cannot be used.
    Devices,
    /// Print version, protocol and known architectures.
    Version,
}

/// Measurements.
#[derive(Subcommand, Debug)]
pub enum Bench {
    /// Peak memory at 4, 16 and 64 layers of the same width, and weight bytes read with 1x and 16x
    /// the tokens.
    Memory {
        /// Width of the synthetic models.
        #[arg(long, default_value_t = 1024, value_parser = whole::<usize>, allow_negative_numbers = true)]
        hidden: usize,
        /// Numbers of layers to compare.
        #[arg(long, value_delimiter = ',', default_values_t = [4, 16, 64])]
        layers: Vec<usize>,
    },
    /// Time a run over synthetic token ids and compare each kind of work with the best rate of
    /// this machine. Weights are synthetic unless --weights is given; of the model only
    /// config.json is needed.
    Run {
        /// The job. Of the text options only --num-sequences [default: 4] and --sequence-length
        /// [default: 512] apply.
        #[command(flatten)]
        options: Box<JobArgs>,
    },
    /// Attention on a GPU by products and a softmax, and by one kernel: TFLOP/s of both, and how
    /// far their results differ.
    Attention {
        /// Tokens of a sequence. There are as many sequences as have the tokens of the longest.
        #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1024, 4096, 16384, 32768])]
        lengths: Vec<usize>,
        /// Heads of queries; of keys and values a quarter.
        #[arg(
            long,
            value_name = "N",
            default_value_t = 16,
            value_parser = whole::<usize>,
            allow_negative_numbers = true
        )]
        heads: usize,
        /// How often each is measured.
        #[command(flatten)]
        repetitions: Repetitions,
        /// The GPU.
        #[arg(long, value_name = "DEVICE", default_value = "cuda:0")]
        device: String,
    },
    /// Decoding rate of each stored format, beside copying and reading the same memory.
    ///
    /// A decoder that is as fast as a copy is limited by memory. A new tensor costs more than a
    /// reused one, since the system clears and maps its pages. Use a release build on an idle
    /// machine.
    Decode {
        /// Values of the synthetic tensor, rounded up to rows of 4096.
        #[arg(
            long,
            value_name = "N",
            default_value_t = 1 << 25,
            value_parser = whole::<usize>,
            allow_negative_numbers = true
        )]
        values: usize,
        /// How often each is measured.
        #[command(flatten)]
        repetitions: Repetitions,
        /// Device of the decoded values: cpu, or a GPU such as cuda:0, including the upload.
        #[arg(long, value_name = "DEVICE", default_value = "cpu")]
        device: String,
    },
}

/// How often a measurement is repeated.
#[derive(Args, Debug)]
pub struct Repetitions {
    /// Repetitions. The fastest counts.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub rounds: usize,
}

/// A job as options.
#[derive(Args, Debug)]
pub struct JobArgs {
    /// Hub id (owner/name), or a folder with config.json and safetensors files.
    #[arg(long, help_heading = headings::MODEL)]
    pub model: Option<String>,
    /// Branch, tag or commit of a hub model.
    #[arg(long, default_value = "main", help_heading = headings::MODEL)]
    pub revision: String,
    /// The text and how it is run.
    #[command(flatten)]
    pub options: JobOptions,
}

impl JobArgs {
    /// The job that these options describe.
    ///
    /// # Errors
    /// Job: no model, or one that is neither a folder nor a hub id.
    pub fn job(self) -> Result<JobSpec> {
        let model = self.model.as_deref().ok_or_else(|| {
            WorkerError::job("no model given").hint("use --model owner/name, --model FOLDER, or a job file")
        })?;
        let source = model_source(model, &self.revision)?;
        self.options.job(source, |file| read_text(file, MAX_JSON_BYTES)).map_err(WorkerError::job)
    }
}

/// An existing folder, or a string that looks like a path, is a folder; `owner/name` is a hub id.
fn model_source(model: &str, revision: &str) -> Result<ModelSource> {
    let path_like = model.starts_with(['/', '.', '~']) || model.ends_with('/');
    if path_like || Path::new(model).is_dir() {
        return Ok(ModelSource::Folder { path: model.to_owned() });
    }
    match model.split('/').collect::<Vec<_>>()[..] {
        [owner, name] if !owner.is_empty() && !name.is_empty() => {
            Ok(ModelSource::Hub { id: model.to_owned(), revision: revision.to_owned() })
        }
        _ => Err(WorkerError::job(format!("--model {model:?} is neither a folder nor a hub id"))
            .hint("a hub id is written owner/name; a folder must exist")),
    }
}

/// Reads a job file: TOML by its extension, else JSON.
///
/// # Errors
/// Storage: the file cannot be read. Job: it is not a valid job; the message says where.
pub fn read_job(path: &Path) -> Result<JobSpec> {
    let text = read_text(path, MAX_JSON_BYTES).at("read", path)?;
    let toml = path.extension().is_some_and(|e| e == "toml");
    let parsed = if toml {
        toml::from_str(&text).map_err(|e| e.to_string())
    } else {
        serde_json::from_str(&text).map_err(|e| e.to_string())
    };
    parsed.map_err(|e| WorkerError::job(format!("{} is not a job: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn negative_number_is_a_wrong_value_and_not_an_option() {
        let run = ["outliers-worker", "run", "--model", "m", "--output", "o"];
        for option in ["--num-sequences", "--sequence-length", "--layers", "--shuffle", "--threshold", "--save-every"] {
            let error = Cli::try_parse_from([&run[..], &[option, "-1"]].concat()).unwrap_err().to_string();
            assert!(error.contains("must be") && error.contains("positive") && error.contains(option), "{error}");
        }
    }
}
