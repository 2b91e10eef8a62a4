//! Tables as text. On a terminal a table has at most its width: long names lose their middle,
//! sentences are wrapped, and words are broken last. Untrusted text is sanitised.

use std::fmt;

use comfy_table::{CellAlignment, ColumnConstraint, ContentLineStyle, LineStyle, TableStyle, Width};

use crate::text::{clean, columns, shorten, shorten_facts};

/// Minimum supported terminal width.
const NARROWEST: u16 = 20;
/// Maximum column width if the terminal's width is unknown. Longer cells are wrapped.
const WIDEST: u16 = 200;
/// Minimum columns of a shortened name: usually, and without space.
const MIN_NAME: u16 = 16;
const SHORTEST_NAME: u16 = 10;
/// Width to which sentences are wrapped before names are shortened.
const SENTENCE: u16 = 28;
/// Longer words, such as paths, are broken before numbers are wrapped.
const LONGEST_WORD: u16 = 28;
/// Minimum width of columns other than ids if words must be broken.
const MIN_WIDTH: u16 = 6;
/// Padding on both sides of a column, and without space.
const PADDING: (u16, u16) = (1, 1);
const SCARCE_PADDING: (u16, u16) = (0, 1);

/// Only a line below the header, which is readable in a log, too.
const STYLE: TableStyle = TableStyle::new()
    .header_lines(ContentLineStyle::none())
    .header_separator(LineStyle::none().fill('─'))
    .content_lines(ContentLineStyle::none());

/// Rows with a header.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    header: Vec<String>,
    rows: Vec<Vec<Cell>>,
}

#[derive(Clone, Debug)]
pub(crate) struct Cell {
    text: String,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Wrapped if space is short.
    Sentence,
    /// Loses its middle if space is short.
    Name,
    /// Loses some of its items if space is short.
    Facts,
    /// Kept whole, since users copy it.
    Id,
    /// Right-aligned.
    Number,
}

pub(crate) fn table(header: &[&str]) -> Table {
    Table { header: header.iter().map(|&name| name.to_owned()).collect(), rows: Vec::new() }
}

/// A cell of untrusted text.
pub(crate) fn text(text: &str) -> Cell {
    Cell::new(clean(text.as_bytes(), 200))
}

/// A cell with an untrusted name, which is shortened instead of wrapped.
pub(crate) fn name(name: &str) -> Cell {
    Cell { kind: Kind::Name, ..Cell::new(clean(name.as_bytes(), 100)) }
}

/// A cell of comma-separated items, the most important first and last.
pub(crate) fn facts(facts: &str) -> Cell {
    Cell { kind: Kind::Facts, ..text(facts) }
}

/// A cell with an id for the next command.
pub(crate) fn id(id: &str) -> Cell {
    Cell { kind: Kind::Id, ..Cell::new(clean(id.as_bytes(), 200)) }
}

/// A right-aligned cell.
pub(crate) fn number(text: impl fmt::Display) -> Cell {
    Cell { kind: Kind::Number, ..Cell::new(text) }
}

/// Wraps the lines of a text between words to the width of the terminal on standard output.
pub(crate) fn paragraphs(text: &str) -> String {
    folded(text, comfy_table::Table::new().width())
}

fn folded(text: &str, width: Option<u16>) -> String {
    let Some(width) = width.filter(|width| *width >= NARROWEST).map(usize::from) else { return text.to_owned() };
    let mut out = String::new();
    for line in text.split_inclusive('\n') {
        if columns(line.trim_end()) <= width {
            out += line;
            continue;
        }
        let mut used = 0;
        for word in line.split(' ') {
            let wide = columns(word.trim_end());
            if used > 0 {
                let fits = used + 1 + wide <= width;
                out.push(if fits { ' ' } else { '\n' });
                used = if fits { used + 1 } else { 0 };
            }
            out += word;
            used += wide;
        }
    }
    out
}

impl Cell {
    /// A cell of trusted text.
    pub(crate) fn new(text: impl fmt::Display) -> Self {
        Self { text: text.to_string(), kind: Kind::Sentence }
    }
}

impl Table {
    /// Adds a row with a cell per column.
    pub(crate) fn add_row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(cells.into_iter().collect());
    }

    #[must_use]
    pub(crate) fn without_empty_columns(mut self) -> Self {
        let says_something = |cell: &Cell| !matches!(cell.text.as_str(), "" | "-");
        let holds = |column: &usize| self.rows.iter().any(|row| row.get(*column).is_some_and(says_something));
        let kept: Vec<usize> = (0..self.header.len()).filter(holds).collect();
        self.header = kept.iter().map(|&column| self.header[column].clone()).collect();
        for row in &mut self.rows {
            *row = kept.iter().filter_map(|&column| row.get(column).cloned()).collect();
        }
        self
    }

    /// The table as text of at most this width, if possible.
    pub(crate) fn within(&self, width: Option<u16>) -> String {
        let whole = self.laid_out(&self.rows, None, PADDING);
        let Some(width) = width.filter(|width| *width >= NARROWEST) else { return whole.trim_fmt() };
        let natural = whole.column_max_content_widths();
        let (widths, padding) = self.widths(&natural, usize::from(width));
        let rows: Vec<Vec<Cell>> = self.rows.iter().map(|row| shortened(row, &widths, &natural)).collect();
        self.laid_out(&rows, Some(&widths), padding).trim_fmt()
    }

    /// Widths of the columns that fit `room` with their padding.
    fn widths(&self, natural: &[u16], room: usize) -> (Vec<u16>, (u16, u16)) {
        let columns: Vec<(Kind, u16)> =
            (0..natural.len()).map(|column| (self.kind(column), self.longest_word(column))).collect();
        let beside = |(left, right): (u16, u16)| usize::from(left + right) * natural.len();
        let mut widths = natural.to_vec();
        for padding in [PADDING, SCARCE_PADDING] {
            widths = natural.to_vec();
            let steps = [Step::Sentences, Step::Names, Step::Words];
            if give_way(&mut widths, &columns, &steps, room.saturating_sub(beside(padding))) {
                return (widths, padding);
            }
        }
        let steps = [Step::ShortNames, Step::BrokenSentences, Step::AllButIds, Step::All];
        give_way(&mut widths, &columns, &steps, room.saturating_sub(beside(SCARCE_PADDING)));
        (widths, SCARCE_PADDING)
    }

    /// The kind of a column: of its cells the one that is narrowed first.
    fn kind(&self, column: usize) -> Kind {
        let holds = |kind: &Kind| self.rows.iter().any(|row| row.get(column).is_some_and(|cell| cell.kind == *kind));
        [Kind::Sentence, Kind::Name, Kind::Facts, Kind::Id].into_iter().find(holds).unwrap_or(Kind::Number)
    }

    /// Width of the longest word of a column; for names, of their header.
    fn longest_word(&self, column: usize) -> u16 {
        let cells = self.rows.iter().filter_map(|row| row.get(column));
        let cells = cells.filter(|cell| !matches!(cell.kind, Kind::Name | Kind::Facts)).map(|cell| &cell.text);
        let words = self.header.get(column).into_iter().chain(cells).flat_map(|text| text.split_whitespace());
        words.map(|word| u16::try_from(columns(word)).unwrap_or(u16::MAX)).max().unwrap_or_default()
    }

    fn laid_out(&self, rows: &[Vec<Cell>], widths: Option<&[u16]>, padding: (u16, u16)) -> comfy_table::Table {
        let mut table = comfy_table::Table::new();
        table.force_no_tty().load_style(STYLE);
        table.set_header(self.header.iter().map(comfy_table::Cell::new));
        for row in rows {
            table.add_row(row.iter().map(|cell| {
                let shown = comfy_table::Cell::new(&cell.text);
                if cell.kind == Kind::Number { shown.set_alignment(CellAlignment::Right) } else { shown }
            }));
        }
        for (at, column) in table.column_iter_mut().enumerate() {
            let width = widths.and_then(|widths| widths.get(at));
            column.set_padding(padding).set_constraint(match width {
                Some(width) => ColumnConstraint::Absolute(Width::Fixed(width + padding.0 + padding.1)),
                None => ColumnConstraint::UpperBoundary(Width::Fixed(WIDEST)),
            });
        }
        table
    }
}

/// Narrows columns until they fit `room`, in each step the widest first. Each column has its kind
/// and its longest word. Returns whether they fit.
fn give_way(widths: &mut [u16], columns: &[(Kind, u16)], steps: &[Step], room: usize) -> bool {
    for step in steps {
        while together(widths) > room {
            let gives = |column: &usize| step.least(columns[*column]).is_some_and(|least| widths[*column] > least);
            let widest = (0..widths.len()).filter(gives).max_by_key(|column| widths[*column]);
            let Some(column) = widest else { break };
            widths[column] -= 1;
        }
    }
    together(widths) <= room
}

fn together(widths: &[u16]) -> usize {
    widths.iter().copied().map(usize::from).sum()
}

/// Steps of narrowing, from the least harmful on.
#[derive(Clone, Copy)]
enum Step {
    /// Wrap sentences.
    Sentences,
    /// Shorten names.
    Names,
    /// Wrap sentences and numbers to a line per word.
    Words,
    /// Shorten names to the minimum.
    ShortNames,
    /// Break words of sentences.
    BrokenSentences,
    /// Break words and numbers.
    AllButIds,
    /// Break ids as well.
    All,
}

impl Step {
    /// Width of a column after this step, if the step applies to it.
    fn least(self, (kind, word): (Kind, u16)) -> Option<u16> {
        match (self, kind) {
            (Self::Sentences, Kind::Sentence) => Some(SENTENCE.max(word.min(LONGEST_WORD))),
            (Self::Names, Kind::Name | Kind::Facts) => Some(MIN_NAME.max(word)),
            (Self::Words, Kind::Sentence) => Some(word.min(LONGEST_WORD)),
            (Self::Words, Kind::Number) => Some(word),
            (Self::ShortNames, Kind::Name | Kind::Facts) => Some(SHORTEST_NAME),
            (Self::BrokenSentences, Kind::Sentence) => Some(MIN_WIDTH),
            (Self::AllButIds, Kind::Sentence | Kind::Name | Kind::Facts | Kind::Number) => Some(MIN_WIDTH),
            (Self::All, _) => Some(1),
            _ => None,
        }
    }
}

/// Shortens names to columns narrower than their content.
fn shortened(row: &[Cell], widths: &[u16], natural: &[u16]) -> Vec<Cell> {
    let cells = row.iter().zip(widths.iter().zip(natural)).map(|(cell, (width, natural))| {
        let text = match cell.kind {
            Kind::Name if width < natural => shorten(&cell.text, usize::from(*width)),
            Kind::Facts if width < natural => shorten_facts(&cell.text, usize::from(*width)),
            _ => return cell.clone(),
        };
        Cell { text, ..cell.clone() }
    });
    cells.collect()
}

/// Limited to the terminal's width on standard output; unlimited in a file or pipe.
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
    fn table_uses_the_available_width() {
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
    fn words_and_ids_are_wrapped_last() {
        let header = ["#", "model", "parameters", "active", "sparsity", "computed in", "perplexity (95 %)", "result"];
        let mut narrow = table(&header);
        let cells = ["6.92 B", "1.28 B", "81.5 %", "f32", "1289.29 (1264.68 to 1313.50)"].map(number);
        let begin = [number(1), name("allenai/OLMoE-1B-7B-0125")];
        narrow.add_row(begin.into_iter().chain(cells).chain([text("complete")]));
        let shown = narrow.within(Some(80));
        assert!(widest(&shown) <= 80, "{shown}");
        for whole in ["parameters", "perplexity", "computed", "sparsity", "1289.29", "complete", "7B-0125"] {
            assert!(shown.contains(whole), "{whole} in\n{shown}");
        }
        let mut ids = table(&["instance", "state", "what it is"]);
        let long = "0920582c7ff041399e34823a0be62549";
        ids.add_row([id(long), text("ready at ubuntu@198.51.100.200:22"), text("of another ledger")]);
        let shown = ids.within(Some(60));
        assert!(shown.contains(long) && widest(&shown) <= 60, "{shown}");
        assert!(runs().within(None).lines().all(|line| line == line.trim_end()));
    }

    #[test]
    fn words_are_broken_before_numbers() {
        let mut table = table(&["run", "state", "cost"]);
        table.add_row([id("szk2qsk7"), text("tokenizing"), number("$0.000007")]);
        let shown = table.within(Some(27));
        assert!(shown.contains("szk2qsk7") && shown.contains("$0.000007"), "{shown}");
        assert!(widest(&shown) <= 27, "{shown}");
    }

    #[test]
    fn names_stay_on_one_line_and_sentences_wrap() {
        let mut names = table(&["a", "b"]);
        names.add_row([name(&"n".repeat(90)), number(1)]);
        assert_eq!(names.within(Some(60)).lines().count(), 3);
        let mut sentences = table(&["a", "b"]);
        sentences.add_row([text(&"some words ".repeat(12)), number(1)]);
        let shown = sentences.within(Some(60));
        assert!(shown.lines().count() > 4 && !shown.contains('…') && widest(&shown) <= 60, "{shown}");
    }

    #[test]
    fn empty_columns_are_omitted() {
        let mut table = table(&["run", "survey", "cost"]);
        table.add_row([id("a"), name("-"), number("$1.00")]);
        table.add_row([id("b"), name(""), number("-")]);
        let shown = table.without_empty_columns().within(None);
        assert!(!shown.contains("survey") && shown.contains("cost") && shown.lines().count() == 4, "{shown}");
    }

    #[test]
    fn long_lines_wrap_between_words() {
        let text = format!("a line\n{}\n\n{}\n", "some words ".repeat(4).trim_end(), "x".repeat(50));
        let shown = folded(&text, Some(24));
        let x = "x".repeat(50);
        assert_eq!(shown, format!("a line\nsome words some words\nsome words some words\n\n{x}\n"));
        assert_eq!(folded(&text, None), text);
    }

    #[test]
    fn wide_letters_and_narrow_terminals_do_not_panic() {
        let mut table = table(&["name", "count"]);
        table.add_row([name(&"漢".repeat(100)), number(12_345)]);
        let shown = table.within(Some(60));
        let wide = |line: &str| line.chars().map(|c| if c == '漢' { 2_usize } else { 1 }).sum::<usize>();
        assert!(shown.lines().all(|line| wide(line) <= 60), "{shown}");
        assert_eq!(runs().within(Some(0)), runs().within(None));
        assert!(widest(&runs().within(Some(40))) <= 40, "{}", runs().within(Some(40)));
    }
}
