//! Converts the predecessor's result files to a result with its definition.
//!
//! Two documents are read: `final_analysis_results.json`, which lists every systematic feature of
//! every batch, and `perplexity_results.json`. Some published files of both kinds are truncated;
//! incomplete or inconsistent ones are refused.

use std::collections::BTreeSet;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use outliers_protocol::{Axis, Reading, SCHEMA, Verdict};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::bootstrap::SequenceTotals;
use crate::files::{digest, open_regular};

/// File name of the outlier features.
pub(crate) const OUTLIERS: &str = "final_analysis_results.json";
/// File name of the perplexity.
pub(crate) const PERPLEXITY: &str = "perplexity_results.json";

/// Definition of the predecessor's counts.
pub(crate) const DEFINITION: &str = "|x| >= 6 compared in bf16 (from 5.984375 up) at the outputs of both norms of every layer; a feature is \
    judged within each batch, in >= 25 % of the norm outputs and at >= 6 % of the positions, and counts once for every batch it is \
    systematic in; windows overlap by half and were decoded and encoded again, with the tokenizer's special tokens";

/// Maximum features of a model.
const MAX_FEATURES: usize = 1 << 24;

/// `imported.json`: a run of the predecessor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Imported {
    pub(crate) schema: u32,
    /// Hub id or folder, as in the run.
    pub(crate) model: String,
    /// Definition of the counts.
    pub(crate) definition: String,
    /// Time of the first import in milliseconds since 1970; 0 if unknown.
    #[serde(default)]
    pub(crate) imported_at_ms: u64,
    pub(crate) sources: Vec<ImportedFile>,
    /// The outlier features; `None` if only a perplexity was imported.
    pub(crate) outliers: Option<Outliers>,
    /// The perplexity; `None` if only outlier features were imported.
    pub(crate) perplexity: Option<OldPerplexity>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ImportedFile {
    /// Its path, as given.
    pub(crate) path: String,
    pub(crate) bytes: u64,
    /// Its SHA-256, lower-case hexadecimal.
    pub(crate) sha256: String,
}

/// Content of `final_analysis_results.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outliers {
    /// Name of the text in the run.
    pub(crate) dataset: String,
    pub(crate) sequences: usize,
    /// Requested tokens per sequence.
    pub(crate) tokens_per_sequence: usize,
    /// Sequences per batch. Features are classified within a batch.
    pub(crate) batch_size: usize,
    pub(crate) magnitude: f64,
    /// Totals per batch, in order; shares of layers are of norm outputs.
    pub(crate) batches: Vec<SequenceTotals>,
    /// Distinct features that are systematic in at least one batch.
    pub(crate) distinct_features: usize,
    /// Largest magnitude of a systematic feature.
    pub(crate) max_abs: f64,
}

/// Content of `perplexity_results.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct OldPerplexity {
    pub(crate) perplexity: f64,
    /// Mean negative log-likelihood.
    pub(crate) mean_nll: f64,
    /// Tokens in the mean: all, not only the predicted ones.
    pub(crate) tokens: u64,
    /// Mean negative log-likelihood of each batch.
    pub(crate) batches: Vec<f64>,
}

#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub(crate) struct ImportError {
    pub(crate) path: PathBuf,
    pub(crate) why: String,
}

impl Outliers {
    /// The counts that these files determine. There is none over the whole corpus, since layers
    /// and positions of a feature are known only per batch.
    pub(crate) fn verdicts(&self) -> Vec<Verdict> {
        let features: usize = self.batches.iter().map(|batch| batch.features).sum();
        let mean = |of: fn(&SequenceTotals) -> f64| {
            (features > 0).then(|| 100.0 * self.batches.iter().map(of).sum::<f64>() / features as f64)
        };
        let verdict = |reading, label: &str, divisor: usize| Verdict {
            reading,
            axis: Axis::Sites,
            label: label.to_owned(),
            count: features as f64 / divisor.max(1) as f64,
            mean_layer_percent: mean(|batch| batch.layer_share),
            mean_sequence_percent: mean(|batch| batch.position_share),
        };
        if self.batch_size == 1 {
            return vec![
                verdict(Reading::MeanPerSequence, "mean per sequence, by norm outputs", self.batches.len()),
                verdict(Reading::SumOverSequences, "sum over sequences, by norm outputs (the predecessor)", 1),
            ];
        }
        let label = format!("sum over batches of {} sequences, by norm outputs", self.batch_size);
        vec![verdict(Reading::SumOverSequences, &label, 1)]
    }
}

impl Imported {
    /// Checks the document for consistency.
    ///
    /// # Errors
    /// The inconsistency.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.outliers.is_none() && self.perplexity.is_none() {
            return Err("it holds neither outlier features nor a perplexity".to_owned());
        }
        if let Some(outliers) = &self.outliers
            && outliers.batches.len().saturating_mul(outliers.batch_size) < outliers.sequences
        {
            let (batches, of) = (outliers.batches.len(), outliers.batch_size);
            return Err(format!("{batches} batches of {of} cannot hold {} sequences", outliers.sequences));
        }
        let odd = |tally: &&SequenceTotals| {
            let most = 0.0..=tally.features as f64;
            tally.features > MAX_FEATURES || !most.contains(&tally.layer_share) || !most.contains(&tally.position_share)
        };
        if let Some(odd) = self.outliers.iter().flat_map(|outliers| &outliers.batches).find(odd) {
            return Err(format!("a batch of {} features has shares that cannot be", odd.features));
        }
        Ok(())
    }
}

/// Imports the predecessor's files of one model: `paths` are files, or folders with them.
///
/// # Errors
/// The unusable file, and the reason.
pub(crate) fn import(paths: &[PathBuf]) -> Result<Imported, ImportError> {
    let files = files_of(paths)?;
    let one = |name: &str| {
        let mut named = files.iter().filter(|path| path.file_name().is_some_and(|it| it == name));
        match (named.next(), named.next()) {
            (_, Some(second)) => Err(wrong(second, format!("a second {name}: import one run at a time"))),
            (first, None) => Ok(first),
        }
    };
    let (outliers, perplexity) = (one(OUTLIERS)?, one(PERPLEXITY)?);
    let old_outliers = outliers.map(|path| Ok((path, read::<OldAnalysis>(path)?))).transpose()?;
    let old_perplexity = perplexity.map(|path| Ok((path, read::<OldPerplexities>(path)?))).transpose()?;
    let model = model(old_outliers.as_ref(), old_perplexity.as_ref())
        .ok_or_else(|| wrong(&paths[0], format!("there is neither {OUTLIERS} nor {PERPLEXITY}")))??;
    let sources = files.iter().map(|path| source(path)).collect::<Result<_, _>>()?;
    let outliers = old_outliers.map(|(path, old)| old.outliers().map_err(|why| wrong(path, why))).transpose()?;
    let perplexity = old_perplexity.map(|(path, old)| old.perplexity().map_err(|why| wrong(path, why))).transpose()?;
    let definition = DEFINITION.to_owned();
    let imported = Imported { schema: SCHEMA, model, definition, imported_at_ms: 0, sources, outliers, perplexity };
    imported.check().map_err(|why| wrong(&paths[0], why))?;
    Ok(imported)
}

fn wrong(path: &Path, why: impl Into<String>) -> ImportError {
    ImportError { path: path.to_owned(), why: why.into() }
}

/// The known files among `paths` and in folders among them.
fn files_of(paths: &[PathBuf]) -> Result<Vec<PathBuf>, ImportError> {
    let mut files = Vec::new();
    for path in paths {
        let inside = [OUTLIERS, PERPLEXITY].map(|name| path.join(name)).into_iter().filter(|file| file.is_file());
        let before = files.len();
        match path.is_dir() {
            true => files.extend(inside),
            false if path.file_name().is_some_and(|name| name == OUTLIERS || name == PERPLEXITY) => {
                files.push(path.clone())
            }
            false => {}
        }
        if files.len() == before {
            return Err(wrong(
                path,
                format!("it is neither {OUTLIERS} nor {PERPLEXITY}, nor a folder with one of them"),
            ));
        }
    }
    Ok(files)
}

fn source(path: &Path) -> Result<ImportedFile, ImportError> {
    let (bytes, sha256) = digest(path).map_err(|error| wrong(path, error.to_string()))?;
    Ok(ImportedFile { path: path.display().to_string(), bytes, sha256 })
}

fn model(
    outliers: Option<&(&PathBuf, OldAnalysis)>,
    perplexity: Option<&(&PathBuf, OldPerplexities)>,
) -> Option<Result<String, ImportError>> {
    let first = outliers.map(|(_, old)| &old.run_config.model);
    let second = perplexity.map(|(path, old)| (path, &old.model));
    match (first, second) {
        (Some(first), Some((path, second))) if first != second => {
            Some(Err(wrong(path, format!("it is of {second}, the outlier features are of {first}"))))
        }
        (first, second) => first.or(second.map(|(_, model)| model)).map(|model| Ok(model.clone())),
    }
}

/// Reads a document as a stream: documents contain every feature twice, and some have hundreds of
/// megabytes.
fn read<T: DeserializeOwned>(path: &Path) -> Result<T, ImportError> {
    let file = open_regular(path).map_err(|error: io::Error| wrong(path, error.to_string()))?;
    serde_json::from_reader(BufReader::new(file)).map_err(|error| match error.is_eof() {
        true => wrong(path, format!("it is cut off: {error}")),
        false => wrong(path, format!("it is not the predecessor's: {error}")),
    })
}

// --------------------------------------------------------------------- the predecessor's documents

#[derive(Deserialize)]
struct OldAnalysis {
    analysis_summary: OldSummary,
    run_config: OldConfig,
    batch_results: Vec<OldBatch>,
}

#[derive(Deserialize)]
struct OldSummary {
    total_batches: usize,
    total_sequences: usize,
    total_systematic_outliers: usize,
}

#[derive(Deserialize)]
struct OldConfig {
    model: String,
    #[serde(default)]
    dataset: String,
    sequence_length: usize,
    batch_size: usize,
    threshold: f64,
}

#[derive(Deserialize)]
struct OldBatch {
    sequences_processed: usize,
    systematic_outliers: Vec<OldFeature>,
}

#[derive(Deserialize)]
struct OldFeature {
    feature_dim: usize,
    layer_percentage: f64,
    seq_percentage: f64,
    max_magnitude: f64,
}

#[derive(Deserialize)]
struct OldPerplexities {
    model: String,
    perplexity: f64,
    avg_loss: f64,
    total_tokens: u64,
    batch_results: Vec<OldLoss>,
}

#[derive(Deserialize)]
struct OldLoss {
    avg_loss: f64,
    total_tokens: u64,
}

impl OldAnalysis {
    fn outliers(self) -> Result<Outliers, String> {
        let features = || self.batch_results.iter().flat_map(|batch| &batch.systematic_outliers);
        let summary = &self.analysis_summary;
        let sequences: usize = self.batch_results.iter().map(|batch| batch.sequences_processed).sum();
        for (what, is, said) in [
            ("batches", self.batch_results.len(), summary.total_batches),
            ("sequences", sequences, summary.total_sequences),
            ("systematic features", features().count(), summary.total_systematic_outliers),
        ] {
            if is != said {
                return Err(format!("it holds {is} {what}, and says that it holds {said}"));
            }
        }
        let share = |share: f64| (0.0..=1.0).contains(&share);
        if let Some(odd) = features().find(|f| !share(f.layer_percentage) || !share(f.seq_percentage)) {
            return Err(format!("feature {} has a share that is none", odd.feature_dim));
        }
        Ok(Outliers {
            dataset: self.run_config.dataset.clone(),
            sequences,
            tokens_per_sequence: self.run_config.sequence_length,
            batch_size: self.run_config.batch_size,
            magnitude: self.run_config.threshold,
            batches: self.batch_results.iter().map(OldBatch::tally).collect(),
            distinct_features: features().map(|f| f.feature_dim).collect::<BTreeSet<_>>().len(),
            max_abs: features().map(|f| f.max_magnitude).fold(0.0, f64::max),
        })
    }
}

impl OldBatch {
    fn tally(&self) -> SequenceTotals {
        let mut tally = SequenceTotals::default();
        self.systematic_outliers.iter().for_each(|f| tally.add(f.layer_percentage, f.seq_percentage));
        tally
    }
}

impl OldPerplexities {
    fn perplexity(self) -> Result<OldPerplexity, String> {
        let tokens: u64 = self.batch_results.iter().map(|batch| batch.total_tokens).sum();
        if tokens != self.total_tokens {
            return Err(format!("its batches hold {tokens} tokens, and it says {}", self.total_tokens));
        }
        if ((self.avg_loss.exp() / self.perplexity) - 1.0).abs() > 1e-6 {
            return Err(format!("its perplexity {} is not that of its loss {}", self.perplexity, self.avg_loss));
        }
        let batches = self.batch_results.iter().map(|batch| batch.avg_loss).collect();
        Ok(OldPerplexity { perplexity: self.perplexity, mean_nll: self.avg_loss, tokens, batches })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn feature(dim: usize, layers: f64, positions: f64) -> Value {
        json!({"feature_dim": dim, "layer_percentage": layers, "seq_percentage": positions, "max_magnitude": 10.0 + dim as f64,
               "total_occurrences": 5, "layers_affected": ["layer_0_ln_attn"], "example_values": [6.0, 7.0]})
    }

    fn analysis() -> Value {
        let batch = |features: &[Value]| {
            json!({"batch_id": 0, "run_dir": "r", "sequences_processed": 1, "systematic_outliers": features,
                   "outlier_summary": {"total_outlier_features": 3, "layer_stats": {}}, "threshold": 6.0, "timestamp": "t"})
        };
        let (a, b) = (feature(7, 0.5, 0.25), feature(9, 0.25, 0.75));
        json!({
            "analysis_summary": {"total_batches": 3, "total_sequences": 3, "total_systematic_outliers": 3, "completion_time": "t"},
            "run_config": {"model": "a/b", "dataset": "fineweb", "num_sequences": 3, "sequence_length": 2048, "batch_size": 1,
                           "threshold": 6.0, "layers": null, "shard_range_inclusive": [0, 2], "experiment_name": "e"},
            "top_features": [{"feature_dim": 9, "max_magnitude": 19.0, "occurrences": 1}],
            "all_systematic_outliers": [a, b, a],
            "batch_results": [batch(&[a.clone(), b]), batch(&[]), batch(&[a])],
        })
    }

    fn perplexity() -> Value {
        let batch =
            |loss: f64| json!({"perplexity": loss.exp(), "avg_loss": loss, "total_tokens": 2048, "num_sequences": 1});
        json!({"perplexity": 2.5f64.exp(), "avg_loss": 2.5, "total_tokens": 4096, "num_sequences": 2, "model": "a/b",
               "dataset": "fineweb", "sequence_length": 2048, "timestamp": "t", "batch_results": [batch(2.0), batch(3.0)]})
    }

    fn folder(files: &[(&str, &Value)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, value) in files {
            std::fs::write(folder.path().join(name), value.to_string()).unwrap();
        }
        folder
    }

    #[test]
    fn two_files_are_imported_as_one_labelled_result() {
        let folder = folder(&[(OUTLIERS, &analysis()), (PERPLEXITY, &perplexity())]);
        let imported = import(&[folder.path().to_owned()]).unwrap();
        let outliers = imported.outliers.as_ref().unwrap();
        assert_eq!((outliers.sequences, outliers.distinct_features, outliers.max_abs), (3, 2, 19.0));
        let verdicts = outliers.verdicts();
        let sum = verdicts.iter().find(|v| v.reading == Reading::SumOverSequences).unwrap();
        assert_eq!((sum.axis, sum.count), (Axis::Sites, 3.0), "a feature counts once per sequence");
        let percent = |percent: Option<f64>| (percent.unwrap() * 1e6).round() / 1e6;
        assert_eq!(percent(sum.mean_layer_percent), 41.666_667, "(50 + 25 + 50) / 3");
        assert_eq!(percent(sum.mean_sequence_percent), 41.666_667, "(25 + 75 + 25) / 3");
        let mean = verdicts.iter().find(|v| v.reading == Reading::MeanPerSequence).unwrap();
        assert_eq!(mean.count, 1.0);
        assert!(!verdicts.iter().any(|v| v.reading == Reading::Unique), "that cannot be had from these files");
        assert_eq!(imported.perplexity.unwrap().batches, [2.0, 3.0]);
        assert_eq!(imported.sources.len(), 2);
    }

    #[test]
    fn multi_sequence_batches_are_not_called_sequences() {
        let mut old = analysis();
        old["run_config"]["batch_size"] = json!(2);
        let folder = folder(&[(OUTLIERS, &old)]);
        let verdicts = import(&[folder.path().to_owned()]).unwrap().outliers.unwrap().verdicts();
        assert_eq!(verdicts.len(), 1);
        assert!(verdicts[0].label.contains("batches of 2"));
    }

    #[test]
    fn truncated_or_contradicting_files_are_refused() {
        let refused = |value: &Value| {
            let folder = folder(&[(OUTLIERS, value)]);
            import(&[folder.path().to_owned()]).unwrap_err().to_string()
        };
        for (path, value, expected) in [
            ("/analysis_summary/total_systematic_outliers", json!(4), "3 systematic features"),
            ("/analysis_summary/total_batches", json!(16), "3 batches"),
            ("/batch_results/0/systematic_outliers/0/layer_percentage", json!(50.0), "feature 7"),
            ("/batch_results/1/systematic_outliers", json!("?"), "not the predecessor's"),
        ] {
            let mut old = analysis();
            *old.pointer_mut(path).unwrap() = value;
            assert!(refused(&old).contains(expected), "{path}: {}", refused(&old));
        }
        let text = analysis().to_string();
        let cut = tempfile::tempdir().unwrap();
        std::fs::write(cut.path().join(OUTLIERS), &text[..text.len() / 2]).unwrap();
        assert!(import(&[cut.path().to_owned()]).unwrap_err().to_string().contains("cut off"));
        assert!(import(&[cut.path().join("other.json")]).is_err());
    }

    #[test]
    fn files_of_different_models_or_runs_are_refused() {
        let mut other = perplexity();
        other["model"] = json!("c/d");
        let mixed = folder(&[(OUTLIERS, &analysis()), (PERPLEXITY, &other)]);
        assert!(import(&[mixed.path().to_owned()]).unwrap_err().to_string().contains("c/d"));
        let (one, two) = (folder(&[(OUTLIERS, &analysis())]), folder(&[(OUTLIERS, &analysis())]));
        let both = [one.path().to_owned(), two.path().to_owned()];
        assert!(import(&both).unwrap_err().to_string().contains("second"));
        let mut wrong = perplexity();
        wrong["perplexity"] = json!(13.0);
        let wrong = folder(&[(PERPLEXITY, &wrong)]);
        assert!(import(&[wrong.path().to_owned()]).is_err());
    }
}
