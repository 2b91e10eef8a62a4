//! Published figures of models, and the catalogue's sizes.

use std::sync::LazyLock;

use outliers_protocol::{Axis, Reading};
use serde::{Deserialize, Serialize};

/// `config/published.toml`.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Published {
    table: Vec<PublishedTable>,
    super_experts: Vec<SuperExpertsOf>,
}

/// `config/models.toml`.
#[derive(Deserialize)]
struct Catalogue {
    model: Vec<Known>,
}

static PUBLISHED: LazyLock<Published> =
    LazyLock::new(|| toml::from_str(include_str!("../../../config/published.toml")).expect("a test reads it"));

static CATALOGUE: LazyLock<Catalogue> =
    LazyLock::new(|| toml::from_str(include_str!("../../../config/models.toml")).expect("a test reads it"));

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PublishedTable {
    pub(crate) name: String,
    pub(crate) title: String,
    /// Where it was published.
    pub(crate) source: String,
    /// Definition of its counts.
    pub(crate) definition: String,
    /// How sequences are pooled.
    pub(crate) reading: Reading,
    /// The total of which the share of layers is taken.
    pub(crate) axis: Axis,
    /// The text.
    pub(crate) corpus: String,
    /// Number of sequences, if a count depends on it.
    pub(crate) sequences: Option<u32>,
    #[serde(rename = "model")]
    pub(crate) models: Vec<PublishedRow>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all(deserialize = "kebab-case"))]
pub(crate) struct PublishedRow {
    /// Name in the table.
    pub(crate) name: String,
    /// Hub ids of the model; empty if it is unavailable.
    #[serde(default)]
    pub(crate) ids: Vec<String>,
    pub(crate) parameters: u64,
    /// Active parameters per token; `None` for dense models.
    pub(crate) active: Option<u64>,
    pub(crate) perplexity: Option<f64>,
    pub(crate) count: f64,
    /// Number of features with values of one sign only.
    pub(crate) one_sided: Option<u32>,
    /// Mean percentage of layers (or norm outputs).
    pub(crate) layers: f64,
    /// Mean percentage of sequence positions.
    pub(crate) positions: f64,
    /// Quartiles of the values of the most common outlier feature.
    pub(crate) quartiles: Option<[f64; 3]>,
    pub(crate) note: Option<String>,
}

/// Published super experts of a model, for comparison.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SuperExpertsOf {
    pub(crate) id: String,
    /// Layer and expert index of each.
    pub(crate) experts: Vec<[usize; 2]>,
    /// Where it was published.
    pub(crate) source: String,
}

/// Facts on a model in the catalogue (`config/models.toml`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all(deserialize = "kebab-case"))]
pub(crate) struct Known {
    pub(crate) id: String,
    pub(crate) parameters: u64,
    /// Active parameters per token; `None` for dense models.
    pub(crate) active: Option<u64>,
    /// Whether the model is post-trained: instructions, reasoning, chat.
    pub(crate) post_trained: bool,
    /// Optimiser of its training; `None`: unknown.
    pub(crate) optimiser: Option<String>,
    /// Whether attention has an output gate; `None`: unknown.
    pub(crate) gated_attention: Option<bool>,
    /// Whether attention has learned sinks; `None`: unknown.
    pub(crate) learned_sinks: Option<bool>,
    /// Position of its norms.
    pub(crate) norms: Option<String>,
    /// Kind of its router.
    pub(crate) router: Option<String>,
    /// Dtypes of its published weights.
    pub(crate) stored: Option<String>,
}

impl Known {
    /// Suspected causes of outliers by name; `None`: unknown.
    pub(crate) fn causes(&self) -> [(&'static str, Option<&str>); 6] {
        let yes = |known: Option<bool>| known.map(|known| if known { "yes" } else { "no" });
        [
            ("optimiser", self.optimiser.as_deref()),
            ("gated attention", yes(self.gated_attention)),
            ("learned sinks", yes(self.learned_sinks)),
            ("norms", self.norms.as_deref()),
            ("router", self.router.as_deref()),
            ("published in", self.stored.as_deref()),
        ]
    }

    /// Active parameters per token.
    pub(crate) fn active(&self) -> u64 {
        self.active.unwrap_or(self.parameters)
    }
}

pub(crate) fn tables() -> &'static [PublishedTable] {
    &PUBLISHED.table
}

/// Published rows of a model, with their tables.
pub(crate) fn of_model(id: &str) -> impl Iterator<Item = (&'static PublishedTable, &'static PublishedRow)> {
    let rows = tables().iter().flat_map(|table| table.models.iter().map(move |row| (table, row)));
    rows.filter(move |(_, row)| row.ids.iter().any(|known| known.eq_ignore_ascii_case(id)))
}

/// The published super experts of a model.
pub(crate) fn super_experts_of(id: &str) -> Option<&'static SuperExpertsOf> {
    PUBLISHED.super_experts.iter().find(|model| model.id.eq_ignore_ascii_case(id))
}

/// The catalogue's entry of a model.
pub(crate) fn known(id: &str) -> Option<&'static Known> {
    CATALOGUE.model.iter().find(|model| model.id.eq_ignore_ascii_case(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_tables_match_their_source() {
        let [paper, predecessor] = tables() else { panic!("two tables") };
        assert_eq!((paper.models.len(), predecessor.models.len()), (10, 12));
        let sums = |table: &PublishedTable| {
            let of = |f: fn(&PublishedRow) -> f64| table.models.iter().map(f).sum::<f64>();
            (of(|row| row.count), of(|row| row.layers), of(|row| row.positions))
        };
        assert_eq!(sums(paper), (37.0, 529.0, 338.0));
        let (count, layers, positions) = sums(predecessor);
        assert_eq!((count, layers.round(), positions.round()), (37_496.0, 469.0, 636.0));
    }

    #[test]
    fn published_super_experts_are_of_catalogue_models() {
        for SuperExpertsOf { id, experts, source } in &PUBLISHED.super_experts {
            assert!(known(id).is_some() && !experts.is_empty() && !source.is_empty(), "{id}");
        }
        assert_eq!(super_experts_of("deepseek-ai/deepseek-v2-lite").unwrap().experts, [[2, 54], [3, 38]]);
        assert!(super_experts_of("nobody/nothing").is_none());
    }

    #[test]
    fn published_rows_are_of_catalogue_models() {
        for table in tables() {
            for row in &table.models {
                assert!((0.0..=100.0).contains(&row.layers) && (0.0..=100.0).contains(&row.positions), "{}", row.name);
                for id in &row.ids {
                    let known = known(id).unwrap_or_else(|| panic!("{id} is not in the catalogue"));
                    // Sources count embeddings differently, and round.
                    let ratio = row.parameters as f64 / known.parameters as f64;
                    assert!((0.9..1.1).contains(&ratio), "{id}: {ratio}");
                    assert_eq!(row.active.is_some(), known.active.is_some(), "{id}");
                }
            }
        }
        assert_eq!(of_model("qwen/qwen3-8b").count(), 1);
        assert_eq!(of_model("nobody/nothing").count(), 0);
    }
}
