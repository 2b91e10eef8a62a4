//! Arguments, and what they mean.

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use outliers_protocol::{
    Ablate, BosPolicy, ByteSize, CorpusSource, CorpusSpec, Dataset, Export, JobSpec, Measurement, ModelSource, Packing,
    Precision, SiteKinds, Thresholds, Weights, whole,
};

use crate::error::{IoContext, Result, WorkerError};
use crate::files::read_text;
use crate::source::MAX_JSON_BYTES;

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
    /// Compute everything by the tensor library's operations, as on GPUs.
    #[arg(long, global = true, hide = true)]
    pub composed: bool,
    /// Print the result, or the failure, as JSON on standard output.
    #[arg(long, global = true)]
    pub json: bool,
    /// Say more on standard error.
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

/// Where the hub is and where its files are kept.
#[derive(Args, Debug)]
pub struct HubArgs {
    /// Address of the Hugging Face hub.
    #[arg(long, global = true, env = "HF_ENDPOINT", default_value = crate::hub::DEFAULT_ENDPOINT, hide = true)]
    pub hf_endpoint: String,
    /// Home of the Hugging Face cache.
    #[arg(long, global = true, env = "HF_HOME", hide = true)]
    pub hf_home: Option<PathBuf>,
    /// The Hugging Face cache itself.
    #[arg(long, global = true, env = "HF_HUB_CACHE", hide = true)]
    pub hf_hub_cache: Option<PathBuf>,
    /// Most requests to the hub in five minutes: this program's share of what its limits leave to all runs together.
    #[arg(long, global = true, env = outliers_protocol::HUB_REQUESTS, default_value_t = crate::hub::DEFAULT_REQUESTS, hide = true)]
    pub hub_requests: usize,
}

impl HubArgs {
    /// `HF_HOME`, by default `~/.cache/huggingface`.
    pub fn home(&self) -> Option<PathBuf> {
        self.hf_home.clone().or_else(|| Some(std::env::home_dir()?.join(".cache/huggingface")))
    }

    /// `HF_HUB_CACHE`, by default `hub` below the home.
    ///
    /// # Errors
    /// Job: neither is set and the user has no home folder.
    pub fn cache(&self) -> Result<PathBuf> {
        let below_home = || self.home().map(|home| home.join("hub"));
        self.hf_hub_cache.clone().or_else(below_home).ok_or_else(|| {
            WorkerError::job("no place for the model cache: there is no home folder").hint("set HF_HOME")
        })
    }
}

/// The worker's commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run a job into a folder.
    Run {
        /// The job as a JSON or TOML file, instead of options.
        #[arg(value_name = "JOB", conflicts_with_all = ["model", "corpus", "token_ids"])]
        job: Option<PathBuf>,
        /// The job as options.
        #[command(flatten)]
        options: Box<JobArgs>,
        /// Folder for results, metadata, statistics and progress.
        #[arg(short, long, value_name = "DIR")]
        output: PathBuf,
        /// Save the pass at the end of a layer this often; the same job into the same folder goes on from there if it died.
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
        /// Also cut the text into sequences, so that one that does not fit the model is refused now.
        #[arg(long)]
        check_text: bool,
        /// Memory limit; beyond it the process is ended.
        #[arg(long, value_name = "BYTES")]
        memory_limit: Option<ByteSize>,
    },
    /// Write a small mixture-of-experts checkpoint with planted outlier features.
    DemoModel {
        /// Folder for the checkpoint and `planted.json`.
        #[arg(short, long, value_name = "DIR")]
        output: PathBuf,
        /// Seed of its weights.
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
    /// Peak memory at 4, 16 and 64 layers of the same width, and weight bytes read at 1x and 16x the tokens.
    Memory {
        /// Width of the made-up models.
        #[arg(long, default_value_t = 1024, value_parser = whole::<usize>, allow_negative_numbers = true)]
        hidden: usize,
        /// Layers to compare.
        #[arg(long, value_delimiter = ',', default_values_t = [4, 16, 64])]
        layers: Vec<usize>,
    },
    /// A whole run over made-up token ids and, unless --weights says otherwise, made-up weights, beside what this machine can do at
    /// best in each kind of work. Needs nothing of the model but its config.json.
    Run {
        /// The job; of the text only --num-sequences [default: 4] and --sequence-length [default: 512].
        #[command(flatten)]
        options: Box<JobArgs>,
    },
    /// Decoding rate of each stored format, beside copying and reading the same memory.
    ///
    /// Decoding is done where it approaches the speed of a copy: no arithmetic can be faster than the memory it reads and
    /// writes. A new tensor costs more than a reused one because the system has to clear and map its pages. Measures the
    /// program as it was built: use a release build, and an idle machine.
    Decode {
        /// Values of the made-up tensor, rounded up to rows of 4096.
        #[arg(
            long,
            value_name = "N",
            default_value_t = 1 << 25,
            value_parser = whole::<usize>,
            allow_negative_numbers = true
        )]
        values: usize,
        /// Repetitions, of which the fastest counts.
        #[arg(
            long,
            value_name = "N",
            default_value_t = 5,
            value_parser = whole::<usize>,
            allow_negative_numbers = true
        )]
        rounds: usize,
        /// Where the values are wanted: cpu, or a GPU such as cuda:0, to which stored bytes are
        /// brought first.
        #[arg(long, value_name = "DEVICE", default_value = "cpu")]
        device: String,
    },
}

/// A job as options.
#[derive(Args, Debug)]
pub struct JobArgs {
    /// Hub id (owner/name), or a folder with config.json and safetensors files.
    #[arg(long)]
    pub model: Option<String>,
    /// Branch, tag or commit of a hub model.
    #[arg(long, default_value = "main")]
    pub revision: String,
    /// Where the weights come from: hub (over the network as they are used, none on disk), cache (fetched to disk first and kept),
    /// local:DIR (another folder), synthetic:SEED (made up) [default: hub, or the model's folder].
    #[arg(long, value_name = "WHERE")]
    pub weights: Option<Weights>,
    /// Text file, one document each, or a .parquet, .jsonl, .ndjson, .json, .csv or .tsv file
    /// with many; also packed (.gz, .zst); may be repeated [default: the English text shipped
    /// with the worker].
    #[arg(long, value_name = "FILE")]
    pub corpus: Vec<String>,
    /// Dataset on the hub, read as far as needed: owner/name[@REVISION][:FOLDER], or fineweb-edu.
    #[arg(long, value_name = "ID", conflicts_with = "corpus")]
    pub dataset: Option<Dataset>,
    /// Field or column of the documents that holds the text.
    #[arg(long, value_name = "NAME", default_value = "text")]
    pub text_field: String,
    /// Skip the first N documents.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub skip_documents: usize,
    /// Shuffle the documents with this seed.
    #[arg(long, value_name = "SEED", value_parser = whole::<u64>, allow_negative_numbers = true)]
    pub shuffle: Option<u64>,
    /// Ready token ids instead of text: safetensors with `input_ids` i64 [sequences, tokens], or a JSON list of lists.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["corpus", "dataset"])]
    pub token_ids: Option<String>,
    /// Sequences [default: 16, or all rows of the token ids].
    #[arg(long, value_name = "N", value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub num_sequences: Option<usize>,
    /// Tokens per sequence, BOS included [default: 2048, or the model's limit if that is lower].
    #[arg(long, value_name = "N", value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub sequence_length: Option<usize>,
    /// Whether each window starts with the BOS token.
    #[arg(long, value_enum, default_value = "auto")]
    pub bos: BosArg,
    /// Cut each document by itself instead of packing all of them.
    #[arg(long)]
    pub separate_documents: bool,
    /// Join all documents by spaces and begin each window in the middle of the one before it, as the predecessor did.
    #[arg(long, conflicts_with = "separate_documents")]
    pub overlapping_windows: bool,
    /// Arithmetic: auto is f32 on a CPU and bf16 on a GPU.
    #[arg(long, value_enum, default_value = "auto")]
    pub precision: PrecisionArg,
    /// cpu, cpu:2 (two logical devices), cuda:0,cuda:1 [default: all GPUs, else the CPU].
    #[arg(long, value_delimiter = ',')]
    pub devices: Vec<String>,
    /// Only the first N layers: a quick look, without perplexity.
    #[arg(long, value_name = "N", value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub layers: Option<usize>,
    /// |x| from which a value is an outlier.
    #[arg(
        long,
        default_value_t = Thresholds::default().magnitude,
        value_parser = magnitude,
        allow_negative_numbers = true
    )]
    pub threshold: f32,
    /// What to study, separated by commas: norms (always), residual, attention-out, mlp-out, expert-out, all.
    #[arg(long, value_name = "KINDS", value_delimiter = ',', default_value = "norms")]
    pub sites: Vec<SiteKinds>,
    /// What to measure beside, separated by commas: quantization-error, residual-sinks,
    /// spike-life, attention-sinks.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub measure: Vec<Measurement>,
    /// What to write for other programs, separated by commas: imatrix (llama.cpp), act-scales
    /// (SmoothQuant; FP8 and NVFP4 input scales), reap (saliency of experts).
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub export: Vec<Export>,
    /// Also write every studied activation to this file in the output folder. Large.
    #[arg(long, value_name = "FILE.safetensors")]
    pub save_activations: Option<String>,
    /// Also write a time line of the pass to this file in the output folder: what each device and each loader did when, for
    /// chrome://tracing or ui.perfetto.dev.
    #[arg(long, value_name = "FILE.json")]
    pub trace: Option<String>,
    /// Also measure perplexity and the sharpness of attention without some features, and without
    /// equally many random ones: their dimensions (1512,7,2070), or the folder of an earlier run's
    /// results, whose systematic features are meant. Copies of the tokens pass beside them; no
    /// weight is read again.
    #[arg(long, value_name = "FEATURES", conflicts_with = "layers")]
    pub ablate: Option<Ablate>,
    /// Seed for the random control features.
    #[arg(
        long,
        value_name = "SEED",
        default_value_t = 0,
        requires = "ablate",
        value_parser = whole::<u64>,
        allow_negative_numbers = true
    )]
    pub ablate_seed: u64,
    /// Tokens computed together, in whole sequences.
    #[arg(long, value_name = "N", value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub micro_batch_tokens: Option<usize>,
    /// Memory for weights while they stream, such as 800MiB or 4GB: a group of experts in use, one
    /// being decoded, the rest on its way [default: a quarter of what is free, 4 GiB at most]. A
    /// quarter as much again may hold bytes of files until their hash is compared; with the
    /// default, half of what is left free.
    #[arg(long, value_name = "SIZE")]
    pub stream_budget: Option<ByteSize>,
}

/// [`BosPolicy`] on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum BosArg {
    /// As the tokenizer does.
    Auto,
    /// BOS first; an error if the tokenizer has none.
    Always,
    /// No BOS.
    Never,
}

/// [`Precision`] on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PrecisionArg {
    /// By device.
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit floats.
    F16,
}

impl JobArgs {
    /// The job these options describe.
    ///
    /// # Errors
    /// Job: no model, or one that is neither a folder nor a hub id.
    pub fn job(self) -> Result<JobSpec> {
        let model = self.model.as_deref().ok_or_else(|| {
            WorkerError::job("no model given").hint("use --model owner/name, --model FOLDER, or a job file")
        })?;
        let mut job = JobSpec::new(model_source(model, &self.revision)?);
        job.corpus = CorpusSpec {
            source: match self.token_ids {
                Some(file) => CorpusSource::TokenIds(file),
                None if !self.corpus.is_empty() => CorpusSource::Files(self.corpus),
                None => self.dataset.map_or_else(|| CorpusSpec::default().source, CorpusSource::Dataset),
            },
            num_sequences: self.num_sequences,
            sequence_length: self.sequence_length,
            bos: match self.bos {
                BosArg::Auto => BosPolicy::Auto,
                BosArg::Always => BosPolicy::Always,
                BosArg::Never => BosPolicy::Never,
            },
            packing: match (self.separate_documents, self.overlapping_windows) {
                (true, _) => Packing::Separate,
                (_, true) => Packing::Overlapping,
                _ => Packing::Packed,
            },
            text_field: self.text_field,
            skip_documents: self.skip_documents,
            shuffle_seed: self.shuffle,
        };
        job.precision = match self.precision {
            PrecisionArg::Auto => Precision::Auto,
            PrecisionArg::F32 => Precision::F32,
            PrecisionArg::Bf16 => Precision::Bf16,
            PrecisionArg::F16 => Precision::F16,
        };
        job.devices = self.devices;
        job.layers = self.layers;
        job.thresholds.magnitude = self.threshold;
        job.sites = self.sites.into_iter().flat_map(|SiteKinds(kinds)| kinds).collect();
        job.measure = self.measure.into_iter().collect();
        job.export = self.export.into_iter().collect();
        job.save_activations = self.save_activations;
        job.trace = self.trace;
        let ablation = |ablate: Ablate| ablate.ablation(self.ablate_seed, |file| read_text(file, MAX_JSON_BYTES));
        job.ablation =
            self.ablate.map(ablation).transpose().map_err(|why| WorkerError::job(format!("--ablate: {why}")))?;
        job.micro_batch_tokens = self.micro_batch_tokens.unwrap_or(job.micro_batch_tokens);
        job.weights = self.weights;
        job.stream_budget_bytes = self.stream_budget.map(|ByteSize(bytes)| bytes);
        Ok(job)
    }
}

/// From which a value is an outlier.
fn magnitude(text: &str) -> Result<f32, String> {
    let magnitude = text.parse().ok().filter(|magnitude: &f32| magnitude.is_finite() && *magnitude > 0.0);
    magnitude.ok_or_else(|| "it must be a positive number".to_owned())
}

/// A folder that is there, or a path by its look, is a folder; `owner/name` is a hub id.
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

/// Reads a job file, TOML by its ending, else JSON.
///
/// # Errors
/// Storage: unreadable. Job: not a job; the message says where.
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
    fn a_negative_number_is_a_wrong_value_and_no_option() {
        let run = ["outliers-worker", "run", "--model", "m", "--output", "o"];
        for option in ["--num-sequences", "--sequence-length", "--layers", "--shuffle", "--threshold", "--save-every"] {
            let error = Cli::try_parse_from([&run[..], &[option, "-1"]].concat()).unwrap_err().to_string();
            assert!(error.contains("must be") && error.contains("positive") && error.contains(option), "{error}");
        }
    }
}
