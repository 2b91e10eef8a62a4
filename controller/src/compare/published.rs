//! What is known of models without running them: the figures others published, and the catalogue's
//! sizes.

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

/// A published table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublishedTable {
    /// One word for it.
    pub name: String,
    /// Its heading.
    pub title: String,
    /// Where it was published.
    pub source: String,
    /// What its counts are.
    pub definition: String,
    /// How sequences are pooled.
    pub reading: Reading,
    /// What the share of layers is taken of.
    pub axis: Axis,
    /// The text.
    pub corpus: String,
    /// Sequences, where a count depends on their number.
    pub sequences: Option<u32>,
    /// Its rows.
    #[serde(rename = "model")]
    pub models: Vec<PublishedRow>,
}

/// A row of a published table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all(deserialize = "kebab-case"))]
pub struct PublishedRow {
    /// As the table calls it.
    pub name: String,
    /// Hub ids of the model it is about; none: nothing that can be run here.
    #[serde(default)]
    pub ids: Vec<String>,
    /// Parameters, as published there.
    pub parameters: u64,
    /// Active parameters per token; `None` for dense models.
    pub active: Option<u64>,
    /// Perplexity, where one was published.
    pub perplexity: Option<f64>,
    /// The count.
    pub count: f64,
    /// How many of the features have values of one sign.
    pub one_sided: Option<u32>,
    /// Mean percentage of layers (or norm outputs).
    pub layers: f64,
    /// Mean percentage of sequence positions.
    pub positions: f64,
    /// Quartiles of the values of the most common outlier feature.
    pub quartiles: Option<[f64; 3]>,
    /// What is odd about it.
    pub note: Option<String>,
}

/// The super experts that others found in a model: what a run that looks for them must find.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SuperExpertsOf {
    /// Hub id.
    pub id: String,
    /// Layer and expert of each.
    pub experts: Vec<[usize; 2]>,
    /// Where it was published.
    pub source: String,
}

/// What the catalogue (`config/models.toml`) knows of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all(deserialize = "kebab-case"))]
pub struct Known {
    /// Hub id.
    pub id: String,
    /// Parameters.
    pub parameters: u64,
    /// Active parameters per token; `None` for dense models, of which all are.
    pub active: Option<u64>,
    /// Trained further than on plain text: to follow instructions, to reason, to chat.
    pub post_trained: bool,
    /// What it was trained with; `None`: unknown.
    pub optimiser: Option<String>,
    /// Whether attention's output passes a gate; `None`: unknown.
    pub gated_attention: Option<bool>,
    /// Whether softmax has a learned sink; `None`: unknown.
    pub learned_sinks: Option<bool>,
    /// Where its norms stand.
    pub norms: Option<String>,
    /// How its experts are chosen.
    pub router: Option<String>,
    /// In which dtypes its weights are published.
    pub stored: Option<String>,
}

impl Known {
    /// What is suspected to make or unmake outliers, each by its name; `None`: unknown.
    pub fn causes(&self) -> [(&'static str, Option<&str>); 6] {
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

    /// Parameters that work on one token.
    pub fn active(&self) -> u64 {
        self.active.unwrap_or(self.parameters)
    }
}

/// All published tables.
pub fn tables() -> &'static [PublishedTable] {
    &PUBLISHED.table
}

/// What the tables say of a model, each row with its table.
pub fn of_model(id: &str) -> impl Iterator<Item = (&'static PublishedTable, &'static PublishedRow)> {
    let rows = tables().iter().flat_map(|table| table.models.iter().map(move |row| (table, row)));
    rows.filter(move |(_, row)| row.ids.iter().any(|known| known.eq_ignore_ascii_case(id)))
}

/// The published super experts of a model.
pub fn super_experts_of(id: &str) -> Option<&'static SuperExpertsOf> {
    PUBLISHED.super_experts.iter().find(|model| model.id.eq_ignore_ascii_case(id))
}

/// What the catalogue says of a model.
pub fn known(id: &str) -> Option<&'static Known> {
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
