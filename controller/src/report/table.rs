//! One table as text. On a terminal it is as wide as that at most: long names lose their middle,
//! sentences take several lines. Whatever comes from elsewhere is cleaned on its way in.

use std::fmt;

use comfy_table::{
    CellAlignment, ColumnConstraint, ContentArrangement, ContentLineStyle, LineStyle, TableStyle, Width,
};

use crate::text::{clean, shorten};

/// Terminals that are narrower, or say so, are not followed.
const NARROWEST: u16 = 20;
/// Widest column where the terminal's width is not known: longer cells take several lines.
const WIDEST: u16 = 200;
/// Names that are shortened keep so many columns.
const LEAST_NAME: u16 = 16;
/// Before a name is shortened, sentences are broken into lines of this width.
const SENTENCE: u16 = 28;
/// Spaces on both sides of a column.
const PADDING: usize = 2;

/// One line below the header, nothing else: what remains reads well in a log, too.
const STYLE: TableStyle = TableStyle::new()
    .header_lines(ContentLineStyle::none())
    .header_separator(LineStyle::none().fill('─'))
    .content_lines(ContentLineStyle::none());

/// Rows below a header.
#[derive(Clone, Debug)]
pub struct Table {
    header: Vec<String>,
    rows: Vec<Vec<Cell>>,
}

/// What stands in a column of a row.
#[derive(Clone, Debug)]
pub struct Cell {
    text: String,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Takes several lines where there is no room.
    Sentence,
    /// Loses its middle there.
    Name,
    /// Is typed again, so it stays whole.
    Id,
    /// Read from its right end.
    Number,
}

/// A table with a header.
pub fn table(header: &[&str]) -> Table {
    Table { header: header.iter().map(|&name| name.to_owned()).collect(), rows: Vec::new() }
}

/// Text from elsewhere, made fit for a terminal.
pub fn text(text: &str) -> Cell {
    Cell::new(clean(text.as_bytes(), 200))
}

/// A name from elsewhere, which is no sentence: one that is long would pad the lines of all
/// others.
pub fn name(name: &str) -> Cell {
    Cell { kind: Kind::Name, ..Cell::new(clean(name.as_bytes(), 100)) }
}

/// Facts in one line, the most telling ones first and last.
pub fn facts(facts: &str) -> Cell {
    Cell { kind: Kind::Name, ..text(facts) }
}

/// What is copied into the next command.
pub fn id(id: &str) -> Cell {
    Cell { kind: Kind::Id, ..Cell::new(clean(id.as_bytes(), 100)) }
}

/// A figure, or anything that is read from its right end.
pub fn number(text: impl fmt::Display) -> Cell {
    Cell { kind: Kind::Number, ..Cell::new(text) }
}

impl Cell {
    /// Words of ours, in one line or several.
    pub fn new(text: impl fmt::Display) -> Self {
        Self { text: text.to_string(), kind: Kind::Sentence }
    }
}

impl Table {
    /// Adds a row, with a cell per column.
    pub fn add_row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// As text that is at most so many columns wide, where there is room for all columns at all.
    pub fn within(&self, width: Option<u16>) -> String {
        let Some(width) = width.filter(|width| *width >= NARROWEST) else {
            return self.laid_out(&self.rows, &[], None).to_string();
        };
        let natural = self.laid_out(&self.rows, &[], None).column_max_content_widths();
        let whole = |widths: &[u16]| widths.iter().map(|width| usize::from(*width) + PADDING).sum::<usize>();
        let kinds: Vec<Kind> = (0..natural.len()).map(|column| self.kind(column)).collect();
        let least = |column: usize| {
            let header = self.header.get(column).map_or(0, |name| name.chars().count());
            LEAST_NAME.max(u16::try_from(header).unwrap_or(LEAST_NAME))
        };
        let mut widths: Vec<u16> = natural
            .iter()
            .zip(&kinds)
            .map(|(width, kind)| if *kind == Kind::Sentence { (*width).min(SENTENCE) } else { *width })
            .collect();
        while whole(&widths) > usize::from(width) {
            let longest = (0..widths.len())
                .filter(|&column| kinds[column] == Kind::Name && widths[column] > least(column))
                .max_by_key(|&column| widths[column]);
            let Some(column) = longest else { break };
            widths[column] -= 1;
        }
        let rows: Vec<Vec<Cell>> = self.rows.iter().map(|row| shortened(row, &widths, &natural)).collect();
        // Where even this has no room, every column takes several lines.
        let fits = whole(&widths) <= usize::from(width);
        let fixed: Vec<bool> = kinds.iter().map(|kind| fits && *kind != Kind::Sentence).collect();
        self.laid_out(&rows, &fixed, Some(width)).to_string()
    }

    /// What a column holds: the kind of its cells that gives way first.
    fn kind(&self, column: usize) -> Kind {
        let holds = |kind: &Kind| self.rows.iter().any(|row| row.get(column).is_some_and(|cell| cell.kind == *kind));
        [Kind::Sentence, Kind::Name, Kind::Id].into_iter().find(holds).unwrap_or(Kind::Number)
    }

    fn laid_out(&self, rows: &[Vec<Cell>], fixed: &[bool], width: Option<u16>) -> comfy_table::Table {
        let mut table = comfy_table::Table::new();
        table.force_no_tty().load_style(STYLE);
        table.set_header(self.header.iter().map(comfy_table::Cell::new));
        for row in rows {
            table.add_row(row.iter().map(|cell| {
                let shown = comfy_table::Cell::new(&cell.text);
                if cell.kind == Kind::Number { shown.set_alignment(CellAlignment::Right) } else { shown }
            }));
        }
        if let Some(width) = width {
            table.set_width(width).set_content_arrangement(ContentArrangement::Dynamic);
        }
        for (at, column) in table.column_iter_mut().enumerate() {
            let constraint = match (fixed.get(at), width) {
                (Some(true), _) => ColumnConstraint::ContentWidth,
                (_, None) => ColumnConstraint::UpperBoundary(Width::Fixed(WIDEST)),
                (_, Some(_)) => continue,
            };
            column.set_constraint(constraint);
        }
        table
    }
}

/// Names as they fit columns that are narrower than all that stands in them.
fn shortened(row: &[Cell], widths: &[u16], natural: &[u16]) -> Vec<Cell> {
    let cells = row.iter().zip(widths.iter().zip(natural)).map(|(cell, (width, natural))| match cell.kind {
        Kind::Name if width < natural => Cell { text: shorten(&cell.text, usize::from(*width)), kind: Kind::Name },
        _ => cell.clone(),
    });
    cells.collect()
}

/// As wide as the terminal that is standard output; as wide as it has to be in a file or a pipe.
impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.within(comfy_table::Table::new().width()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn widest(text: &str) -> usize {
        text.lines().map(|line| line.chars().count()).max().unwrap_or_default()
    }

    fn runs() -> Table {
        let mut table = table(&["run", "model", "cost", "how it ended"]);
        let model = "/home/somebody/checkpoints/experiments/2026-11/olmoe-7b-long-context-step-12000";
        let ending = "the worker was ended by the system; ".repeat(3);
        table.add_row([id("vpn56jbg"), name(model), number("$12.34"), text(&ending)]);
        table.add_row([id("x"), name("gpt2"), number("$1.00"), text("completed")]);
        table
    }

    #[test]
    fn a_table_is_as_wide_as_it_may_be() {
        for width in [80, 100, 140, 200] {
            let shown = runs().within(Some(width));
            assert!(widest(&shown) <= usize::from(width), "{width}:\n{shown}");
            for whole in ["vpn56jbg", "$12.34", "completed", "step-12000", "/home/some"] {
                assert!(shown.contains(whole), "{width}: {whole} in\n{shown}");
            }
        }
        assert!(runs().within(Some(80)).contains('…'));
        let mut accents = table(&["model"]);
        accents.add_row([name("modèle-à-mélange")]);
        assert!(accents.within(Some(80)).contains("modèle-à-mélange"));
        let nowhere = runs().within(None);
        assert!(!nowhere.contains('…') && nowhere.lines().count() == 4, "{nowhere}");
    }

    #[test]
    fn a_name_takes_one_line_and_a_sentence_several() {
        let mut names = table(&["a", "b"]);
        names.add_row([name(&"n".repeat(90)), number(1)]);
        assert_eq!(names.within(Some(60)).lines().count(), 3);
        let mut sentences = table(&["a", "b"]);
        sentences.add_row([text(&"some words ".repeat(12)), number(1)]);
        let shown = sentences.within(Some(60));
        assert!(shown.lines().count() > 4 && !shown.contains('…') && widest(&shown) <= 60, "{shown}");
    }

    #[test]
    fn wide_letters_and_narrow_terminals_are_survived() {
        let mut table = table(&["name", "count"]);
        table.add_row([name(&"漢".repeat(100)), number(12_345)]);
        let shown = table.within(Some(60));
        let wide = |line: &str| line.chars().map(|c| if c == '漢' { 2_usize } else { 1 }).sum::<usize>();
        assert!(shown.lines().all(|line| wide(line) <= 60), "{shown}");
        assert_eq!(runs().within(Some(0)), runs().within(None));
        assert!(widest(&runs().within(Some(40))) <= 40, "{}", runs().within(Some(40)));
    }
}
