//! Ablation: the model with some features set to 0 (LLM.int8(), section 4.2).

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::{fmt, io};

use serde::{Deserialize, Serialize};

use crate::{Perplexity, Results, files};

/// Features to ablate. In one copy of the tokens, these features are 0 in every norm's output; in
/// another copy, equally many random features are 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ablation {
    /// Hidden dimensions, ascending, each once.
    pub features: Vec<usize>,
    /// Seed of the random features.
    #[serde(default)]
    pub seed: u64,
}

impl Ablation {
    /// An ablation of `features`, in any order.
    ///
    /// # Errors
    /// `features` is empty.
    pub fn of(mut features: Vec<usize>) -> Result<Self, String> {
        features.sort_unstable();
        features.dedup();
        if features.is_empty() {
            return Err("there is no feature to ablate".to_owned());
        }
        Ok(Self { features, seed: 0 })
    }

    /// An ablation of the features that are systematic over the whole corpus of an earlier run, by
    /// layers as in the paper.
    fn found(results: &Results) -> Result<Self, String> {
        let systematic = results.features.iter().filter(|feature| feature.systematic_by_layers);
        Self::of(systematic.map(|feature| feature.dim).collect())
            .map_err(|_| format!("the results of {} have no systematic feature to ablate", results.model))
    }
}

/// Which features a copy of the tokens is without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Removed {
    /// None: the whole model.
    Nothing,
    /// The features of the job.
    Named,
    /// Equally many random features.
    Random,
}

impl Removed {
    /// The label in tables.
    pub fn label(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Named => "the features asked for",
            Self::Random => "as many others, at random",
        }
    }
}

/// What was measured with some features set to 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AblationArm {
    /// Which features: none, those of the job, or random ones.
    pub removed: Removed,
    /// The features that were 0, ascending.
    pub features: Vec<usize>,
    /// Perplexity with the features 0 at every norm output that feeds attention or MLP, in all
    /// layers.
    pub perplexity: Perplexity,
    /// Largest probability in the distribution of the next token: mean over the predicted tokens
    /// of the same pass as the perplexity.
    pub top_probability: f64,
    /// Largest share that softmax attention gives to one key: mean of [`Self::attention_by_layer`]
    /// over the layers with softmax attention. `None` without such a layer.
    pub attention: Option<f64>,
    /// Largest share that softmax attention gives to one key, by layer: mean over heads and
    /// queries. Each layer's input is the whole model's, with the features set to 0, so effects of
    /// earlier layers are not included (as in the paper). `None` for a layer without softmax.
    pub attention_by_layer: Vec<Option<f64>>,
}

/// Features from the command line: dimensions separated by commas (`1512,7,2070`), or the results
/// of an earlier run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ablate {
    /// The features' dimensions.
    Features(Vec<usize>),
    /// Path of a `results.json`.
    Results(PathBuf),
}

impl FromStr for Ablate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("name features (1512,7,2070), or the folder of an earlier run's results".to_owned());
        }
        if !text.chars().all(|c| c.is_ascii_digit() || c == ',') {
            let path = PathBuf::from(text);
            let is_file = path.extension().is_some_and(|extension| extension == "json");
            return Ok(Self::Results(if is_file { path } else { path.join(files::RESULTS) }));
        }
        let feature = |word: &str| word.parse().map_err(|_| format!("{word:?} is not a feature's number"));
        text.split(',').map(feature).collect::<Result<_, _>>().map(Self::Features)
    }
}

impl Ablate {
    /// The ablation of these features with `seed`; `read` reads a file of results.
    ///
    /// # Errors
    /// The file of results is unusable, or there is no feature to ablate.
    pub fn ablation(&self, seed: u64, read: impl Fn(&Path) -> io::Result<String>) -> Result<Ablation, String> {
        let ablation = match self {
            Self::Features(features) => Ablation::of(features.clone())?,
            Self::Results(file) => {
                let named = |why: &dyn fmt::Display| format!("{}: {why}", file.display());
                let text = read(file).map_err(|error| named(&error))?;
                let results = serde_json::from_str(&text).map_err(|error| named(&format!("no results: {error}")))?;
                Ablation::found(&results)?
            }
        };
        Ok(Ablation { seed, ..ablation })
    }
}
