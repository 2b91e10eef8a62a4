//! The options of a job, from both command lines and from files. Any of them may
//! be missing.
//!
//! To add an option, add a field to [`JobOptions`] (its docstring is the help text) and a field to
//! [`JobSpec`], and connect them in [`JobOptions::job`].

use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, de};

#[cfg(feature = "clap")]
use crate::whole;
use crate::{
    Ablate, BosPolicy, ByteSize, CorpusSource, CorpusSpec, Dataset, Export, Fraction, JobSpec, Measurement,
    ModelSource, Packing, Positive, Precision, SiteKinds, Thresholds, Weights,
};

/// Headings of options in `--help`.
#[cfg(feature = "clap")]
pub mod headings {
    /// Heading of the options that choose the checkpoint.
    pub const MODEL: &str = "Model";
    /// Heading of the options that choose the text.
    pub const TEXT: &str = "Text";
    /// Heading of the options that choose what is counted and measured.
    pub const MEASURE: &str = "What to measure";
    /// Heading of the options for precision, devices and memory.
    pub const COMPUTE: &str = "How to compute";
    /// Heading of the options for the files that are written.
    pub const OUTPUT: &str = "Output";
}
#[cfg(feature = "clap")]
use headings::{COMPUTE, MEASURE, MODEL, OUTPUT, TEXT};

/// Merges options from two sources.
pub trait Merge {
    /// The value of `self` if given, else that of the other.
    #[must_use]
    fn merge(self, other: Self) -> Self;
}

impl<T> Merge for Option<T> {
    fn merge(self, other: Self) -> Self {
        self.or(other)
    }
}

/// A list replaces the other list as a whole.
impl<T> Merge for Vec<T> {
    fn merge(self, other: Self) -> Self {
        if self.is_empty() { other } else { self }
    }
}

/// A switch that is absent does not turn off one that is set.
impl Merge for bool {
    fn merge(self, other: Self) -> Self {
        self || other
    }
}

/// Declares a struct of options that [merges](Merge) field by field.
#[macro_export]
macro_rules! mergeable {
    (
        $(#[$($attribute:tt)*])*
        $seen:vis struct $name:ident {
            $($(#[$($of_field:tt)*])* $field_seen:vis $field:ident: $type:ty,)*
        }
    ) => {
        $(#[$($attribute)*])*
        $seen struct $name {
            $($(#[$($of_field)*])* $field_seen $field: $type,)*
        }

        impl $crate::Merge for $name {
            fn merge(self, other: Self) -> Self {
                Self { $($field: $crate::Merge::merge(self.$field, other.$field),)* }
            }
        }
    };
}

mergeable! {
    /// Options of a job: the weights, the text, what is measured, how it is computed and what is
    /// written.
    #[derive(Clone, Debug, Default, PartialEq, Deserialize)]
    #[cfg_attr(feature = "clap", derive(clap::Args))]
    #[serde(default, rename_all = "kebab-case")]
    pub struct JobOptions {
        /// Where the weights come from: hub (over the network as they are used, none on disk),
        /// cache (fetched to disk first and kept), local:DIR (a folder of this machine or, on a
        /// Slurm cluster, of the cluster, whose jobs read configuration and tokenizer there, too),
        /// synthetic:SEED (made up, to try a model of any size) [default: hub, or the model's
        /// folder].
        #[cfg_attr(feature = "clap", arg(long, value_name = "WHERE", help_heading = MODEL))]
        #[serde(deserialize_with = "written")]
        pub weights: Option<Weights>,
        /// Memory for weights while they stream, such as 800MiB or 4GB [default: a quarter of the
        /// free memory, 4 GiB at most]. Bytes of files whose hash is not compared yet take at most
        /// another quarter of this; with the default, at most half of the memory left free.
        #[cfg_attr(feature = "clap", arg(long, value_name = "SIZE", allow_hyphen_values = true,
            help_heading = COMPUTE))]
        #[serde(alias = "stream_budget")]
        pub stream_budget: Option<ByteSize>,
        /// Sequences [default: 16, or all rows of the token ids].
        #[cfg_attr(feature = "clap", arg(long, value_name = "N", value_parser = whole::<usize>,
            allow_negative_numbers = true, help_heading = TEXT))]
        #[serde(alias = "num_sequences")]
        pub num_sequences: Option<usize>,
        /// Tokens per sequence, BOS included [default: 2048, or the model's limit if that is
        /// lower].
        #[cfg_attr(feature = "clap", arg(long, value_name = "N", value_parser = whole::<usize>,
            allow_negative_numbers = true, help_heading = TEXT))]
        #[serde(alias = "sequence_length")]
        pub sequence_length: Option<usize>,
        /// Text files, one document each, or .parquet, .jsonl, .ndjson, .json, .csv and .tsv files
        /// with many documents; .gz and .zst files are decompressed [default: the English text
        /// shipped with the worker].
        #[cfg_attr(feature = "clap", arg(long, value_name = "PATH", num_args = 1..,
            conflicts_with_all = ["token_ids", "dataset"], help_heading = TEXT))]
        pub corpus: Vec<PathBuf>,
        /// Dataset on the hub: owner/name[@REVISION][:FOLDER], or fineweb-edu (its sample of ten
        /// billion tokens, at one commit). Only the parts that the run needs are downloaded.
        #[cfg_attr(feature = "clap", arg(long, value_name = "ID", conflicts_with = "token_ids", help_heading = TEXT))]
        #[serde(deserialize_with = "written")]
        pub dataset: Option<Dataset>,
        /// Field or column of the documents that holds the text [default: text].
        #[cfg_attr(feature = "clap", arg(long, value_name = "NAME", help_heading = TEXT))]
        #[serde(alias = "text_field")]
        pub text_field: Option<String>,
        /// Skip the first N documents.
        #[cfg_attr(feature = "clap", arg(long, value_name = "N", value_parser = whole::<usize>,
            allow_negative_numbers = true, help_heading = TEXT))]
        #[serde(alias = "skip_documents")]
        pub skip_documents: Option<usize>,
        /// Shuffle the documents with this seed.
        #[cfg_attr(feature = "clap", arg(long, value_name = "SEED", value_parser = whole::<u64>,
            allow_negative_numbers = true, help_heading = TEXT))]
        pub shuffle: Option<u64>,
        /// Token ids instead of text: safetensors with `input_ids` i64 [sequences, tokens], or a
        /// JSON list of lists.
        #[cfg_attr(feature = "clap", arg(long, value_name = "FILE", help_heading = TEXT))]
        #[serde(alias = "token_ids")]
        pub token_ids: Option<PathBuf>,
        /// Whether each window starts with the BOS token. auto: as the model family's own
        /// tokenizer does [default: auto].
        #[cfg_attr(feature = "clap", arg(long, value_enum, help_heading = TEXT))]
        pub bos: Option<BosPolicy>,
        /// Cut each document into windows by itself. Without this option, documents are packed one
        /// after another.
        #[cfg_attr(feature = "clap", arg(long, help_heading = TEXT))]
        #[serde(alias = "separate_documents")]
        pub separate_documents: bool,
        /// Join all documents by spaces and begin each window in the middle of the window before
        /// it, as the predecessor project did. Use it to compare with the predecessor's figures.
        #[cfg_attr(feature = "clap", arg(long, conflicts_with = "separate_documents", help_heading = TEXT))]
        #[serde(alias = "overlapping_windows")]
        pub overlapping_windows: bool,
        /// Arithmetic. auto: f32 on a CPU, bf16 on a GPU. In bf16 every value from 5.984375 up
        /// rounds to 6 and counts as an outlier [default: auto].
        #[cfg_attr(feature = "clap", arg(long, value_enum, help_heading = COMPUTE))]
        pub precision: Option<Precision>,
        /// Run only the first N layers. The results then have no perplexity.
        #[cfg_attr(feature = "clap", arg(long, value_name = "N", value_parser = whole::<usize>,
            allow_negative_numbers = true, help_heading = MEASURE))]
        pub layers: Option<usize>,
        /// cpu, cpu:2 (two logical devices), cuda:0,cuda:1 [default: all GPUs, else the CPU].
        #[cfg_attr(feature = "clap", arg(long, value_name = "LIST", value_delimiter = ',', help_heading = COMPUTE))]
        pub devices: Vec<String>,
        /// Tokens per micro-batch, in whole sequences [default: on GPUs the most that fit, 65536
        /// at most; on CPUs 4096].
        #[cfg_attr(feature = "clap", arg(long, value_name = "N", value_parser = whole::<usize>,
            allow_negative_numbers = true, help_heading = COMPUTE))]
        #[serde(alias = "micro_batch_tokens")]
        pub micro_batch_tokens: Option<usize>,
        /// Sites to study in addition to the norm outputs, separated by commas: residual (massive
        /// activations), attention-out, mlp-out, expert-out (super experts), all. Each costs a
        /// pass over its values and changes no arithmetic of the model.
        #[cfg_attr(feature = "clap", arg(long, value_name = "KINDS", value_delimiter = ',', help_heading = MEASURE))]
        #[serde(deserialize_with = "all_written")]
        pub sites: Vec<SiteKinds>,
        /// What else to measure in the same pass, separated by commas: quantization-error (the
        /// error that outliers cause in 8 and 4 bits), residual-sinks, spike-life,
        /// attention-sinks.
        #[cfg_attr(feature = "clap", arg(long, value_name = "NAMES", value_delimiter = ',', help_heading = MEASURE))]
        #[serde(deserialize_with = "all_written")]
        pub measure: Vec<Measurement>,
        /// Files to write for other programs in the same pass, separated by commas: imatrix
        /// (llama.cpp's importance matrix), act-scales (SmoothQuant's scales; FP8 and NVFP4 input
        /// scales), reap (saliency of experts). Cannot be used with --ablate.
        #[cfg_attr(feature = "clap", arg(long, value_name = "NAMES", value_delimiter = ',', help_heading = OUTPUT))]
        #[serde(deserialize_with = "all_written")]
        pub export: Vec<Export>,
        /// Also write every studied activation to this file in the results folder. Its size is
        /// tokens x hidden x sites x 4 bytes.
        #[cfg_attr(feature = "clap", arg(long, value_name = "FILE.safetensors", help_heading = OUTPUT))]
        #[serde(alias = "save_activations")]
        pub save_activations: Option<String>,
        /// Also write a timeline of the pass to this file in the results folder, for Chrome's
        /// trace viewer or Perfetto.
        #[cfg_attr(feature = "clap", arg(long, value_name = "FILE.json", help_heading = OUTPUT))]
        pub trace: Option<String>,
        /// Also measure perplexity and the sharpness of attention with these features set to 0,
        /// and with equally many random features set to 0: dimensions (1512,7,2070), or the
        /// results folder of an earlier run, for its systematic features. Ablated copies of the
        /// tokens pass through each layer in the same run, so no weight is read twice.
        #[cfg_attr(feature = "clap", arg(long, value_name = "FEATURES", conflicts_with = "layers",
            help_heading = MEASURE))]
        #[serde(deserialize_with = "written")]
        pub ablate: Option<Ablate>,
        /// Seed of the random control features [default: 0].
        #[cfg_attr(feature = "clap", arg(long, value_name = "SEED", value_parser = whole::<u64>,
            allow_negative_numbers = true, requires = "ablate", help_heading = MEASURE))]
        #[serde(alias = "ablate_seed")]
        pub ablate_seed: Option<u64>,
        /// Name of the model in reports, and of its results folder [default: the value of
        /// --model].
        // Not read from a file: a file's options apply to many models.
        #[cfg_attr(feature = "clap", arg(long, value_name = "NAME", help_heading = OUTPUT))]
        #[serde(skip)]
        pub name: Option<String>,
        /// Thresholds of outlier features.
        #[cfg_attr(feature = "clap", command(flatten))]
        pub thresholds: ThresholdOptions,
    }
}

mergeable! {
    /// Thresholds: when a value is an outlier, and when a feature is systematic.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
    #[cfg_attr(feature = "clap", derive(clap::Args))]
    #[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
    pub struct ThresholdOptions {
        /// |x| from which a value is an outlier [default: 6, unless settings say otherwise].
        #[cfg_attr(feature = "clap", arg(long, value_name = "X", allow_negative_numbers = true,
            help_heading = MEASURE))]
        #[serde(rename = "magnitude")]
        pub threshold: Option<Positive>,
        /// Minimum share of layers of a systematic feature, up to 1 [default: 0.25, unless
        /// settings say otherwise].
        #[cfg_attr(feature = "clap", arg(long, value_name = "SHARE", allow_negative_numbers = true,
            help_heading = MEASURE))]
        #[serde(alias = "layer_fraction")]
        pub layer_fraction: Option<Fraction>,
        /// Minimum share of sequence positions of a systematic feature, up to 1 [default: 0.06,
        /// unless settings say otherwise].
        #[cfg_attr(feature = "clap", arg(long, value_name = "SHARE", allow_negative_numbers = true,
            help_heading = MEASURE))]
        #[serde(alias = "position_fraction")]
        pub position_fraction: Option<Fraction>,
    }
}

impl ThresholdOptions {
    /// These thresholds where given, else `others`.
    pub fn over(&self, others: Thresholds) -> Thresholds {
        Thresholds {
            magnitude: self.threshold.map_or(others.magnitude, |threshold| threshold.get() as f32),
            layer_fraction: self.layer_fraction.map_or(others.layer_fraction, Fraction::get),
            position_fraction: self.position_fraction.map_or(others.position_fraction, Fraction::get),
        }
    }
}

/// Most sequences, and most tokens of one: bytes and operations of a plan stay countable.
const MAX_OF_EACH: usize = 100_000_000;
/// Most tokens of all sequences.
const MAX_TOKENS: usize = 100_000_000_000;

impl JobOptions {
    /// The job over `model` with these options. Paths are not changed. `read` reads a file of
    /// results.
    ///
    /// # Errors
    /// In words: there are no features to take away ([`Ablate::ablation`]), a path is not UTF-8, or
    /// there are more tokens than any run has.
    pub fn job(self, model: ModelSource, read: impl Fn(&Path) -> io::Result<String>) -> Result<JobSpec, String> {
        let (sequences, tokens) = (self.num_sequences.unwrap_or(1), self.sequence_length.unwrap_or(1));
        if sequences.max(tokens) > MAX_OF_EACH || sequences.saturating_mul(tokens) > MAX_TOKENS {
            return Err(format!(
                "--num-sequences and --sequence-length go up to {MAX_OF_EACH} each, and to {MAX_TOKENS} tokens \
                 together"
            ));
        }
        let usual = CorpusSpec::default();
        let seed = self.ablate_seed.unwrap_or_default();
        let ablation = self.ablate.map(|ablate| ablate.ablation(seed, read)).transpose();
        let mut job = JobSpec::new(model);
        job.sites.extend(self.sites.into_iter().flat_map(|SiteKinds(kinds)| kinds));
        Ok(JobSpec {
            label: self.name,
            weights: self.weights,
            corpus: CorpusSpec {
                source: source(self.token_ids, self.corpus, self.dataset)?.unwrap_or(usual.source),
                num_sequences: self.num_sequences,
                sequence_length: self.sequence_length,
                bos: self.bos.unwrap_or_default(),
                packing: match (self.separate_documents, self.overlapping_windows) {
                    (true, _) => Packing::Separate,
                    (_, true) => Packing::Overlapping,
                    _ => Packing::Packed,
                },
                text_field: self.text_field.unwrap_or(usual.text_field),
                skip_documents: self.skip_documents.unwrap_or_default(),
                shuffle_seed: self.shuffle,
            },
            precision: self.precision.unwrap_or_default(),
            devices: self.devices,
            layers: self.layers,
            thresholds: self.thresholds.over(Thresholds::default()),
            measure: self.measure.into_iter().collect(),
            export: self.export.into_iter().collect(),
            save_activations: self.save_activations,
            trace: self.trace,
            ablation: ablation.map_err(|why| format!("--ablate: {why}"))?,
            micro_batch_tokens: self.micro_batch_tokens,
            stream_budget_bytes: self.stream_budget.map(|ByteSize(bytes)| bytes),
            ..job
        })
    }
}

/// The source of the text, if given.
fn source(
    token_ids: Option<PathBuf>,
    files: Vec<PathBuf>,
    dataset: Option<Dataset>,
) -> Result<Option<CorpusSource>, String> {
    let text = |path: PathBuf| {
        path.into_os_string().into_string().map_err(|path| format!("{}: its name is not UTF-8", path.to_string_lossy()))
    };
    Ok(match token_ids {
        Some(file) => Some(CorpusSource::TokenIds(text(file)?)),
        None if !files.is_empty() => Some(CorpusSource::Files(files.into_iter().map(text).collect::<Result<_, _>>()?)),
        None => dataset.map(CorpusSource::Dataset),
    })
}

/// A value whose form in files is its form on the command line.
struct Written<T>(T);

impl<'de, T: FromStr<Err = String>> Deserialize<'de> for Written<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse::<T>().map(Self).map_err(|why| {
            // The message names the item of a list that is wrong.
            de::Error::custom(if why.contains(&text) { why } else { format!("{text:?}: {why}") })
        })
    }
}

fn written<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(deserializer: D) -> Result<Option<T>, D::Error> {
    Written::deserialize(deserializer).map(|Written(value)| Some(value))
}

fn all_written<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    let written = Vec::<Written<T>>::deserialize(deserializer)?;
    Ok(written.into_iter().map(|Written(value)| value).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: serde_json::Value) -> JobOptions {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn merge_prefers_the_first_and_fills_absent_options() {
        let typed = read(json!({"layers": 2, "sites": ["residual"], "thresholds": {"layer-fraction": 0.5}}));
        let file = read(json!({
            "layers": 9, "num-sequences": 4, "sites": ["all"], "export": ["reap"], "separate-documents": true,
            "thresholds": {"layer-fraction": 0.1, "magnitude": 5}
        }));
        let both = typed.clone().merge(file);
        assert_eq!((both.layers, both.num_sequences, both.separate_documents), (Some(2), Some(4), true));
        assert_eq!((&both.sites, both.export.len()), (&typed.sites, 1), "a list is taken as a whole");
        let thresholds = both.thresholds.over(Thresholds::default());
        assert_eq!(thresholds, Thresholds { magnitude: 5.0, layer_fraction: 0.5, position_fraction: 0.06 });
    }

    #[test]
    fn uncountable_numbers_of_tokens_are_refused() {
        for (sequences, tokens, is_refused) in [
            (Some(100_000_000), Some(1000), false),
            (Some(100_000_000), Some(1001), true),
            (Some(100_000_001), None, true),
            (None, Some(usize::MAX), true),
            (Some(usize::MAX), Some(usize::MAX), true),
        ] {
            let options = JobOptions { num_sequences: sequences, sequence_length: tokens, ..JobOptions::default() };
            let model = ModelSource::Folder { path: "m".into() };
            let job = options.job(model, |_| unreachable!("features are not asked for"));
            assert_eq!(job.is_err_and(|why| why.contains("--sequence-length")), is_refused, "{sequences:?} {tokens:?}");
        }
    }

    #[test]
    fn file_keys_are_spelt_as_cli_options() {
        let new = json!({
            "weights": "synthetic:3", "stream-budget": "1 GiB", "dataset": "fineweb-edu", "text-field": "t",
            "bos": "never", "precision": "bf16", "ablate": "7,3", "ablate-seed": 4, "micro-batch-tokens": 64
        });
        let old = new.to_string().replace('-', "_").replace("fineweb_edu", "fineweb-edu");
        let options = read(new);
        assert_eq!(options, serde_json::from_str::<JobOptions>(&old).unwrap());
        let model = ModelSource::Hub { id: "a/b".into(), revision: "main".into() };
        let job = options.job(model, |_| unreachable!("features are named")).unwrap();
        assert_eq!((job.weights, job.stream_budget_bytes), (Some(Weights::Synthetic { seed: 3 }), Some(1 << 30)));
        assert_eq!((job.precision, job.corpus.bos), (Precision::Bf16, BosPolicy::Never));
        assert!(matches!(job.corpus.source, CorpusSource::Dataset(_)) && job.micro_batch_tokens == Some(64));
        assert_eq!(job.ablation.map(|ablation| (ablation.features, ablation.seed)), Some((vec![3, 7], 4)));
        for (wrong, word) in [
            (json!({"sites": ["experts"]}), "\"experts\""),
            (json!({"weights": "web"}), "synthetic:SEED"),
            (json!({"thresholds": {"layers": 1}}), "layer-fraction"),
        ] {
            let error = serde_json::from_value::<JobOptions>(wrong).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
