//! What becomes of a model without some of its features: the paper's evidence that outlier features matter (LLM.int8(), section 4.2).

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::{fmt, io};

use serde::{Deserialize, Serialize};

use crate::{Perplexity, Results, files};

/// Features to take away: beside the whole tokens, a copy of them passes in which every norm's output has 0 there, and one in
/// which as many others, drawn at random, are 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ablation {
    /// Hidden dimensions, ascending, each once.
    pub features: Vec<usize>,
    /// What the others are drawn by.
    #[serde(default)]
    pub seed: u64,
}

impl Ablation {
    /// The features themselves.
    ///
    /// # Errors
    /// There are none.
    pub fn of(mut features: Vec<usize>) -> Result<Self, String> {
        features.sort_unstable();
        features.dedup();
        if features.is_empty() {
            return Err("there is no feature to take away".to_owned());
        }
        Ok(Self { features, seed: 0 })
    }

    /// What an earlier run found: the features that are systematic over its whole corpus, by layers, as the paper counts.
    fn found(results: &Results) -> Result<Self, String> {
        let systematic = results.features.iter().filter(|feature| feature.systematic_by_layers);
        Self::of(systematic.map(|feature| feature.dim).collect())
            .map_err(|_| format!("the results of {} have no systematic feature to take away", results.model))
    }
}

/// Which copy of the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Removed {
    /// As the model is.
    Nothing,
    /// The features asked for.
    Named,
    /// As many others, at random.
    Random,
}

impl Removed {
    /// For tables.
    pub fn label(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Named => "the features asked for",
            Self::Random => "as many others, at random",
        }
    }
}

/// What was measured with some features taken away.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AblationArm {
    /// What was taken away.
    pub removed: Removed,
    /// Which features, ascending.
    pub features: Vec<usize>,
    /// Taken away at every norm's output that feeds attention or MLP, with all that follows from it in later layers.
    pub perplexity: Perplexity,
    /// Largest probability in the distribution of the next token; mean over the predicted tokens, of the same pass as the perplexity.
    pub top_probability: f64,
    /// Largest share that softmax attention gives to one key; mean over the layers that have it of [`Self::attention_by_layer`]. `None` if no layer
    /// has.
    pub attention: Option<f64>,
    /// The same, layer by layer: mean over heads and queries. Each layer by itself: its input is that of the whole model, but for the features, so
    /// that nothing is handed on from layer to layer (as in the paper). `None` where a layer has no softmax.
    pub attention_by_layer: Vec<Option<f64>>,
}

/// Features as people name them: dimensions separated by commas (`1512,7,2070`), or the results of an earlier run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ablate {
    /// The features' dimensions.
    Features(Vec<usize>),
    /// A `results.json`.
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
    /// The features themselves; `read` reads a file of results.
    ///
    /// # Errors
    /// What is wrong with the file, or that there is no feature.
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
