//! A comparison as text: for a terminal, as Markdown, as CSV. Each format escapes names
//! differently.

use super::Comparison;
use super::bootstrap::Estimate;
use super::comparison::{Compared, Figure, ResultKind};
use super::table::{Column, Table, tables};
use crate::text::clean;
use crate::ui::report::tables::{Cell, name, number, paragraphs, table as text_table};

/// Maximum characters of a cell.
const CELL: usize = 600;

/// Formats for a terminal.
pub(crate) fn terminal(comparison: &Comparison) -> String {
    let mut out = String::new();
    for table in tables(comparison) {
        let mut rows = text_table(&table.columns.iter().map(|column| column.name).collect::<Vec<_>>());
        for row in &table.rows {
            rows.add_row(row.iter().zip(&table.columns).map(|(value, column)| cell(value, *column)));
        }
        out += &format!("{}\n\n{rows}\n\n", clean(table.title.as_bytes(), CELL));
        for note in &table.notes {
            out += &paragraphs(&format!("{}\n", clean(note.as_bytes(), CELL)));
        }
        if !table.notes.is_empty() {
            out += "\n";
        }
    }
    out
}

fn cell(value: &str, column: Column) -> Cell {
    match column {
        Column { numeric: true, .. } => number(clean(value.as_bytes(), CELL)),
        Column { name: "model", .. } => name(value),
        _ => Cell::new(clean(value.as_bytes(), CELL)),
    }
}

/// Formats as Markdown with tables.
pub(crate) fn markdown(comparison: &Comparison) -> String {
    tables(comparison).iter().map(markdown_table).collect::<Vec<_>>().join("\n")
}

fn markdown_table(table: &Table) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let mut out = format!("## {}\n\n", escaped(&table.title));
    out += &line(table.columns.iter().map(|column| escaped(column.name)).collect());
    let rules = table.columns.iter().map(|column| if column.numeric { "---:" } else { "---" }.to_owned());
    out += &line(rules.collect());
    for row in &table.rows {
        out += &line(row.iter().map(|cell| escaped(cell)).collect());
    }
    for note in &table.notes {
        out += &format!("\n{}\n", escaped(note));
    }
    out
}

fn escaped(text: &str) -> String {
    crate::text::markdown(text, CELL)
}

/// A column of the CSV, and its value.
type CsvColumn = (&'static str, fn(&Compared, Option<&Figure>) -> Option<String>);

const CSV: [CsvColumn; 30] = [
    ("number", |model, _| Some(model.number.to_string())),
    ("model", |model, _| Some(model.label.clone())),
    ("source", |_, figure| Some(figure?.source.name().to_owned())),
    ("reading", |_, figure| word(figure?.reading)),
    ("axis", |_, figure| word(figure?.axis)),
    ("count", |_, figure| Some(figure?.count.value.to_string())),
    ("count_low", |_, figure| end(Some(figure?.count), 0)),
    ("count_high", |_, figure| end(Some(figure?.count), 1)),
    ("layers_percent", |_, figure| value(figure?.layers)),
    ("layers_percent_low", |_, figure| end(figure?.layers, 0)),
    ("layers_percent_high", |_, figure| end(figure?.layers, 1)),
    ("positions_percent", |_, figure| value(figure?.positions)),
    ("positions_percent_low", |_, figure| end(figure?.positions, 0)),
    ("positions_percent_high", |_, figure| end(figure?.positions, 1)),
    ("parameters", |model, _| model.parameters.map(|n| n.to_string())),
    ("active_parameters", |model, _| model.active_parameters.map(|n| n.to_string())),
    ("perplexity", |model, _| value(model.perplexity)),
    ("perplexity_low", |model, _| end(model.perplexity, 0)),
    ("perplexity_high", |model, _| end(model.perplexity, 1)),
    ("computed_in", |model, _| Some(model.provenance.as_ref()?.compute_dtype.clone())),
    ("token_ids_sha256", |model, _| Some(model.provenance.as_ref()?.corpus.token_ids_sha256.clone())),
    ("job_sha256", |model, _| model.job_sha256.clone()),
    ("optimiser", |model, _| cause(model, 0)),
    ("gated_attention", |model, _| cause(model, 1)),
    ("learned_sinks", |model, _| cause(model, 2)),
    ("norms", |model, _| cause(model, 3)),
    ("router", |model, _| cause(model, 4)),
    ("published_in", |model, _| cause(model, 5)),
    ("result", |model, _| {
        Some(match &model.standing {
            ResultKind::Complete => "complete".to_owned(),
            ResultKind::Imported { .. } => "imported".to_owned(),
            ResultKind::Unusable(why) => why.clone(),
        })
    }),
    ("folder", |model, _| Some(model.folder.clone())),
];

/// Formats as CSV (RFC 4180): one line per figure, and one without figures for every unusable
/// result.
pub(crate) fn csv(comparison: &Comparison) -> String {
    let mut out = CSV.map(|(name, _)| name).join(",") + "\r\n";
    for model in &comparison.models {
        let mut figures: Vec<Option<&Figure>> = comparison.figures_of(model).map(Some).collect();
        if figures.is_empty() {
            figures.push(None);
        }
        for figure in figures {
            let cells = CSV.map(|(_, of)| field(&of(model, figure).unwrap_or_default()));
            out += &(cells.join(",") + "\r\n");
        }
    }
    out
}

/// Escapes a field against separators and spreadsheet formulas.
fn field(text: &str) -> String {
    let text = clean(text.as_bytes(), CELL);
    let is_number = text.parse::<f64>().is_ok();
    let guard = if text.starts_with(['=', '+', '-', '@']) && !is_number { "'" } else { "" };
    match text.contains([',', '"', '\'']) || !guard.is_empty() {
        true => format!("\"{guard}{}\"", text.replace('"', "\"\"")),
        false => text,
    }
}

/// Suspected causes from the catalogue, in the order of the columns.
fn cause(model: &Compared, which: usize) -> Option<String> {
    model.catalogue?.causes()[which].1.map(str::to_owned)
}

fn value(estimate: Option<Estimate>) -> Option<String> {
    Some(estimate?.value.to_string())
}

fn end(estimate: Option<Estimate>, which: usize) -> Option<String> {
    Some(estimate?.interval?[which].to_string())
}

/// JSON text of an enum's value.
fn word(value: impl serde::Serialize) -> Option<String> {
    Some(serde_json::to_value(value).ok()?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{copy, rename};
    use super::super::folder::read_all;
    use super::*;

    const EVIL: &str = "=cmd|'/c x'!A1,\"q\"<b>*_`[x](y)\u{1b}[2J\n| z";

    fn compared(model: &str) -> Comparison {
        let home = tempfile::tempdir().unwrap();
        rename(&copy("mixture", &home.path().join("a")), model);
        std::fs::write(copy("dense", &home.path().join("b")).join("results.json"), "{}").unwrap();
        Comparison::of(read_all(&[home.path().to_owned()], true).unwrap())
    }

    #[test]
    fn terminal_shows_readings_published_values_and_gaps() {
        let shown = terminal(&compared("allenai/OLMoE-1B-7B-0125"));
        for expected in [
            "unique, by layers (the paper's)",
            "sum over sequences, by norm outputs (the predecessor's)",
            "published, the predecessor",
            "6.92 B",
            "81.5 %",
            "NO FIGURES, damaged: results.json",
            "FSEQ 13B",
            "GPT-OSS-120B",
            "arXiv 2208.07339",
            "5.984375",
        ] {
            assert!(shown.contains(expected), "{expected} in {shown}");
        }
        assert!(terminal(&compared(EVIL)).chars().all(|c| !c.is_control() || c == '\n'));
    }

    #[test]
    fn markdown_cells_are_escaped() {
        let text = markdown(&compared(EVIL));
        let columns = |line: &str| line.replace("\\|", "").matches('|').count();
        let mut lines = text.lines().filter(|line| line.starts_with('|'));
        let header = columns(lines.next().unwrap());
        assert_eq!(header, 10);
        assert!(lines.take(3).all(|line| columns(line) == header), "{text}");
        assert!(!text.contains("<b>") && !text.contains("[x]("), "{text}");
    }

    #[test]
    fn csv_has_a_row_per_figure_and_per_result_without_one() {
        let text = csv(&compared("allenai/OLMoE-1B-7B-0125"));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 1 + 7 + 1);
        assert!(lines[1].starts_with("1,allenai/OLMoE-1B-7B-0125,this run,unique,layers,4,4,4,"), "{}", lines[1]);
        assert!(lines[7].contains("\"published, the predecessor\",sum_over_sequences,sites,49,"), "{}", lines[7]);
        assert!(lines[8].contains("damaged"), "{}", lines[8]);
    }

    #[test]
    fn csv_fields_are_quoted_and_never_formulas() {
        assert_eq!(field("-1.5"), "-1.5");
        assert_eq!(field("a,b"), "\"a,b\"");
        assert_eq!(field("=1+2"), "\"'=1+2\"");
        assert_eq!(field("say \"x\"\r\n"), "\"say \"\"x\"\"\"");
        assert_eq!(csv(&compared(EVIL)).lines().count(), 1 + 6 + 1);
    }
}
