//! Tables of a comparison, for terminals, Markdown and HTML.

use outliers_protocol::Reading;

use super::Comparison;
use super::bootstrap::Estimate;
use super::comparison::{Compared, Figure, ResultKind};
use super::difference::Difference;
use super::measured;
use super::plots::letter;
use super::published::{PublishedRow, PublishedTable};
use crate::units::grouped;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    /// Identifier, the same in every report.
    pub(crate) name: String,
    pub(crate) title: String,
    pub(crate) columns: Vec<Column>,
    /// Rows, with a cell per column.
    pub(crate) rows: Vec<Vec<String>>,
    /// Notes below the table.
    pub(crate) notes: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Column {
    pub(crate) name: &'static str,
    /// Whether its cells are numbers.
    pub(crate) numeric: bool,
}

/// A column with what a row has in it.
pub(super) type Cells<'a, Row> = (Column, &'a dyn Fn(&Row) -> String);

impl Table {
    /// One of these columns, with its word and its heading.
    pub(super) fn of<Row>((name, title): (&str, &str), rows: &[Row], columns: &[Cells<'_, Row>]) -> Self {
        let row = |row: &Row| columns.iter().map(|(_, cell)| cell(row)).collect();
        Self {
            name: name.to_owned(),
            title: title.to_owned(),
            columns: columns.iter().map(|(column, _)| *column).collect(),
            rows: rows.iter().map(row).collect(),
            notes: Vec::new(),
        }
    }

    /// With one more thing to know about it.
    #[must_use]
    pub(super) fn noted(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }
}

pub(super) const fn words(name: &'static str) -> Column {
    Column { name, numeric: false }
}

pub(super) const fn numbers(name: &'static str) -> Column {
    Column { name, numeric: true }
}

/// Marks an empty cell.
pub(super) const NONE: &str = "-";

/// The tables of a comparison, in reading order.
pub(crate) fn tables(comparison: &Comparison) -> Vec<Table> {
    let mut tables = vec![models(comparison)];
    tables.extend(measured::across(comparison));
    tables.push(counts(comparison));
    tables.extend(catalogue(comparison));
    tables.push(differences(comparison));
    tables.extend(comparison.published.iter().map(published));
    tables
}

fn models(comparison: &Comparison) -> Table {
    Table::of(
        ("models", "Models"),
        &comparison.models,
        &[
            (numbers("#"), &|model| model.number.to_string()),
            (words("model"), &|model| model.label.clone()),
            (numbers("parameters"), &|model| optional(model.parameters, |n| short(n as f64))),
            (numbers("active"), &|model| optional(model.active_parameters, |n| short(n as f64))),
            (numbers("sparsity"), &|model| {
                optional(model.active_share(), |share| format!("{:.1} %", 100.0 * (1.0 - share)))
            }),
            (numbers("tokens"), &|model| {
                optional(model.sequences.zip(model.tokens_per_sequence), |(n, of)| {
                    format!("{n} x {}", grouped(of as u64))
                })
            }),
            (words("computed in"), &|model| {
                optional(model.provenance.as_ref(), |metadata| metadata.compute_dtype.clone())
            }),
            (numbers("perplexity (95 %)"), &|model| optional(model.perplexity, |perplexity| estimate(perplexity, 2))),
            (words("result"), &standing),
        ],
    )
    .noted(
        "parameters: of the catalogue, else of the tensors used as the run counted them; active: per token, embedding \
         included; sparsity: the share that is not active",
    )
}

/// Suspected causes of outliers by the catalogue; `None` without an entry.
fn catalogue(comparison: &Comparison) -> Option<Table> {
    let row = |model: &Compared| {
        let causes = model.catalogue?.causes().map(|(_, says)| says.unwrap_or("unknown").to_owned());
        let mut cells = vec![model.number.to_string(), model.label.clone()];
        cells.extend(causes);
        Some(cells)
    };
    let rows: Vec<Vec<String>> = comparison.models.iter().filter_map(row).collect();
    let first = comparison.models.iter().find_map(|model| model.catalogue)?;
    let mut columns = vec![numbers("#"), words("model")];
    columns.extend(first.causes().map(|(name, _)| words(name)));
    Some(Table {
        name: "catalogue".to_owned(),
        title: "What is suspected to make or unmake outliers, by the catalogue".to_owned(),
        columns,
        rows,
        notes: vec!["config/models.toml names the sources; what no report says is unknown".to_owned()],
    })
}

fn standing(model: &Compared) -> String {
    match &model.standing {
        ResultKind::Complete => "complete".to_owned(),
        ResultKind::Imported { .. } => "imported: the predecessor's definitions".to_owned(),
        ResultKind::Unusable(why) => format!("NO FIGURES, {why}"),
    }
}

fn counts(comparison: &Comparison) -> Table {
    let percent = |value: Option<Estimate>| optional(value, |value| estimate(value, 1));
    Table::of(
        ("counts", "Systematic outlier features, counted in every way"),
        &comparison.figures,
        &[
            (numbers("#"), &|figure| figure.number.to_string()),
            (words("model"), &|figure| figure.model.clone()),
            (words("whose figure"), &|figure| figure.source.name().to_owned()),
            (words("counted as"), &|figure| figure.counted_as.clone()),
            (numbers("count (95 %)"), &count),
            (numbers("mean L% (95 %)"), &|figure| percent(figure.layers)),
            (numbers("mean S% (95 %)"), &|figure| percent(figure.positions)),
        ],
    )
    .noted(
        "L%: share of layers (or norm outputs) in which a counted feature has outliers; S%: share of sequence positions. Rows of one model are \
         only comparable where they are counted as the same",
    )
}

/// A count: whole, unless it is a mean.
pub(super) fn count(figure: &Figure) -> String {
    estimate(figure.count, if figure.reading == Reading::MeanPerSequence { 2 } else { 0 })
}

fn differences(comparison: &Comparison) -> Table {
    let models = |difference: &Difference| {
        let numbers: Vec<String> = difference.models.iter().map(usize::to_string).collect();
        if numbers.is_empty() { "all".to_owned() } else { numbers.join(", ") }
    };
    Table::of(
        ("differences", "What differs by definition or provenance alone"),
        &comparison.differences,
        &[
            (words("about"), &|difference| difference.about.to_owned()),
            (words("what holds"), &|difference| difference.says.clone()),
            (words("models"), &models),
        ],
    )
}

/// A column of a published table: whether the table has it, and its cells.
type PublishedColumn = (bool, Column, fn(&PublishedRow) -> String);

fn published(table: &PublishedTable) -> Table {
    let has = |of: fn(&PublishedRow) -> bool| table.models.iter().any(of);
    let (active, perplexity) = (has(|row| row.active.is_some()), has(|row| row.perplexity.is_some()));
    let (quartiles, notes) = (has(|row| row.quartiles.is_some()), has(|row| row.note.is_some()));
    let all: [PublishedColumn; 10] = [
        (true, words("model"), |row| row.name.clone()),
        (true, numbers("parameters"), |row| short(row.parameters as f64)),
        (active, numbers("active"), |row| optional(row.active, |n| short(n as f64))),
        (perplexity, numbers("perplexity"), |row| optional(row.perplexity, |n| n.to_string())),
        (true, numbers("count"), |row| whole(row.count)),
        (quartiles, numbers("one-sided"), |row| optional(row.one_sided, |n| n.to_string())),
        (true, numbers("L%"), |row| row.layers.to_string()),
        (true, numbers("S%"), |row| row.positions.to_string()),
        (quartiles, numbers("quartiles"), |row| optional(row.quartiles, |[a, b, c]| format!("{a}, {b}, {c}"))),
        (notes, words("note"), |row| row.note.clone().unwrap_or_default()),
    ];
    let shown = || all.iter().filter(|(shown, ..)| *shown);
    let row = |(i, row): (usize, &PublishedRow)| {
        let mut cells = vec![letter(i)];
        cells.extend(shown().map(|(.., cell)| cell(row)));
        cells
    };
    let mut columns = vec![words("key")];
    columns.extend(shown().map(|(_, column, _)| *column));
    let mut about = vec![
        format!("source: {}", table.source),
        format!("counted as: {}", table.definition),
        format!("text: {}", table.corpus),
    ];
    if quartiles {
        about.push("quartiles: of the values of the most common outlier feature".to_owned());
    }
    Table {
        name: table.name.clone(),
        title: format!("Published: {}", table.title),
        columns,
        rows: table.models.iter().enumerate().map(row).collect(),
        notes: about,
    }
}

/// A count with separators; one that is a mean as it is.
fn whole(count: f64) -> String {
    if count.fract() == 0.0 { grouped(count as u64) } else { count.to_string() }
}

pub(super) fn optional<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| NONE.to_owned(), show)
}

/// `3.33 (3.00 to 3.67)`.
pub(super) fn estimate(estimate: Estimate, digits: usize) -> String {
    let value = format!("{:.digits$}", estimate.value);
    match estimate.interval {
        Some([low, high]) => format!("{value} ({low:.digits$} to {high:.digits$})"),
        None => value,
    }
}

/// A large number in three digits: `6.92 B`.
pub(crate) fn short(number: f64) -> String {
    let (scaled, unit) = match number.abs() {
        n if n >= 1e12 => (number / 1e12, " T"),
        n if n >= 1e9 => (number / 1e9, " B"),
        n if n >= 1e6 => (number / 1e6, " M"),
        n if n >= 1e4 => (number / 1e3, " k"),
        _ => (number, ""),
    };
    let digits = match scaled.abs() {
        n if n >= 100.0 => 0,
        n if n >= 10.0 => 1,
        _ => 2,
    };
    let text = format!("{scaled:.digits$}");
    let plain = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{plain}{unit}")
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{copy, rename};
    use super::super::folder::read_all;
    use super::*;

    #[test]
    fn long_counts_have_separators() {
        assert_eq!([7.0, 16_563.0, 2.5].map(whole), ["7", "16,563", "2.5"]);
        let shown = |table: &PublishedTable| published(table).rows.iter().flatten().any(|cell| cell == "16,563");
        assert!(super::super::published::tables().iter().any(shown));
    }

    #[test]
    fn catalogue_facts_are_table_columns() {
        let home = tempfile::tempdir().unwrap();
        rename(&copy("mixture", &home.path().join("a")), "allenai/OLMoE-1B-7B-0125");
        copy("dense", &home.path().join("b"));
        let compared = Comparison::of(read_all(&[home.path().to_owned()], false).unwrap());
        let table = tables(&compared).into_iter().find(|table| table.name == "catalogue").unwrap();
        let names: Vec<&str> = table.columns.iter().map(|column| column.name).collect();
        assert_eq!(
            names,
            ["#", "model", "optimiser", "gated attention", "learned sinks", "norms", "router", "published in"]
        );
        assert_eq!(table.rows.len(), 1, "the other is not in the catalogue");
        assert_eq!(table.rows[0][..4], ["1", "allenai/OLMoE-1B-7B-0125", "AdamW", "unknown"]);
    }

    #[test]
    fn numbers_are_shortened() {
        for (number, expected) in [
            (6_919_161_856.0, "6.92 B"),
            (596_049_920.0, "596 M"),
            (1_026_408_232_448.0, "1.03 T"),
            (100.0, "100"),
            (2500.0, "2500"),
            (46_702_792_704.0, "46.7 B"),
            (0.0, "0"),
            (0.5, "0.5"),
            (-12_500.0, "-12.5 k"),
        ] {
            assert_eq!(short(number), expected);
        }
    }

    #[test]
    fn intervals_are_beside_their_figure() {
        assert_eq!(estimate(Estimate { value: 10.0 / 3.0, interval: Some([3.0, 3.666]) }, 2), "3.33 (3.00 to 3.67)");
        assert_eq!(estimate(Estimate::without_interval(49.0), 0), "49");
    }
}
