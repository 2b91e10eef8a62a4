//! One plot as SVG: fitted axes, marks that are distinguishable without colour, a title and a
//! description for screen readers.
//!
//! Every colour has a meaning and a unique value, so that a page can replace it ([`Colour::ALL`]).
//! Drawings contain no text from results: models are numbers, and their names are listed below
//! ([`Plot::keyed`]).

use maud::html;
use plotters::chart::{ChartBuilder, ChartContext};
use plotters::coord::Shift;
use plotters::coord::cartesian::Cartesian2d;
use plotters::drawing::{DrawingArea, DrawingAreaErrorKind, IntoDrawingArea};
use plotters::element::{Circle, PathElement, Rectangle, Text};
use plotters::prelude::SVGBackend;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, FontDesc, IntoFont, RGBColor, ShapeStyle, TextStyle};

use keys::{Area, Keyed};
use scale::Scale;

use crate::text::clean;

mod bars;
mod colour;
mod keys;
mod scale;

pub(crate) use bars::{Row, bars};
pub(crate) use colour::{Colour, Rgb, Tint};
pub(crate) use scale::AxisKind;

/// Width of a plot in its units, twice the display size, since marks are placed on whole units.
const WIDTH: u32 = 840;
/// Height of a plot of points or lines.
const HEIGHT: u32 = 600;
/// Font size: letters come out a quarter smaller, and are 10 px high on a screen of 360 px.
const FONT: i32 = 35;
/// Height of a line of the legend.
const LEGEND: i32 = 46;
/// Estimated width of a character of the legend.
const CHARACTER: i32 = 17;
/// Columns of the list of keys below a drawing, height of their lines, and maximum characters of a
/// key and its name in a column and on a full line.
const KEY_COLUMNS: usize = 2;
const KEY_LINE: u32 = 38;
const KEY_NAME: usize = 21;
const KEY_LONG_NAME: usize = 44;
/// Half the width of a mark: of a point, and of a point on a line.
const POINT: i32 = 8;
const DOT: i32 = 5;

/// Style of a point. Shape and fill distinguish it without colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) colour: Colour,
    /// Round instead of square.
    pub(crate) round: bool,
    /// Filled instead of outlined.
    pub(crate) filled: bool,
}

/// Points of one series.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Group {
    /// Name in the legend.
    pub(crate) name: String,
    pub(crate) mark: Mark,
    /// Whether a line joins them.
    pub(crate) joined: bool,
    pub(crate) points: Vec<Point>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Point {
    pub(crate) x: f64,
    pub(crate) y: f64,
    /// Interval of `y`.
    pub(crate) interval: Option<[f64; 2]>,
    /// Key beside it: a number or a letter.
    pub(crate) key: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Axis {
    pub(crate) label: &'static str,
    pub(crate) kind: AxisKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plot {
    /// Identifier and file name; unique in a report.
    pub(crate) name: String,
    pub(crate) title: String,
    /// What it shows, and how to read it.
    pub(crate) description: String,
    pub(crate) svg: String,
}

impl Plot {
    /// Adds title and description, escaped, since they contain names of models.
    fn new(name: &str, title: &str, description: &str, drawing: &str) -> Self {
        let (title_id, description_id) = (format!("{name}-title"), format!("{name}-description"));
        let head = html! { title id=(title_id) { (title) } desc id=(description_id) { (description) } }.into_string();
        let tag = drawing.trim_start().strip_prefix("<svg").and_then(|rest| rest.split_once('>'));
        let (attributes, body) = tag.expect("drawings begin with their tag");
        let role = format!("role=\"img\" aria-labelledby=\"{title_id} {description_id}\"");
        Self {
            name: name.to_owned(),
            title: title.to_owned(),
            description: description.to_owned(),
            svg: format!("<svg {role}{attributes}>{head}{body}"),
        }
    }

    /// Adds the names of its keys below the drawing, so that it is self-contained. Names are
    /// sanitised, shortened and escaped.
    #[must_use]
    pub(crate) fn keyed(mut self, names: &[(String, String)]) -> Self {
        let size = self.svg.split_once("viewBox=\"0 0 ").and_then(|(_, rest)| rest.split_once('"'));
        let numbers = size.and_then(|(numbers, _)| numbers.split_once(' '));
        let height = numbers.and_then(|(_, height)| height.parse::<u32>().ok()).expect("drawings have a size");
        if names.is_empty() {
            return self;
        }
        let names: Vec<(&str, String)> =
            names.iter().map(|(key, name)| (key.as_str(), clean(name.as_bytes(), KEY_LONG_NAME))).collect();
        // A name that is too long for a column gets a full line.
        let (mut column, mut line) = (0_usize, 0_usize);
        let mut places = Vec::new();
        for (key, name) in &names {
            let is_long = key.chars().count() + name.chars().count() > KEY_NAME;
            if is_long && column > 0 {
                (column, line) = (0, line + 1);
            }
            places.push((column, line));
            (column, line) = if is_long || column + 1 == KEY_COLUMNS { (0, line + 1) } else { (column + 1, line) };
        }
        let lines = u32::try_from(line + usize::from(column > 0)).unwrap_or(u32::MAX / KEY_LINE);
        let whole = height + lines * KEY_LINE + KEY_LINE / 2;
        let hex = |colour: Colour| {
            let RGBColor(r, g, b) = colour.rgb();
            format!("#{r:02X}{g:02X}{b:02X}")
        };
        let ground = whole - height;
        let keys = html! {
            rect x="0" y=(height) width=(WIDTH) height=(ground) fill=(hex(Colour::Surface)) stroke="none" {}
            @for ((key, name), (column, line)) in names.iter().zip(&places) {
                @let x = 20 + column * (WIDTH as usize / KEY_COLUMNS);
                @let y = height as usize + (line + 1) * KEY_LINE as usize - 8;
                text x=(x) y=(y) font-family="sans-serif" font-size="28" fill=(hex(Colour::Ink)) {
                    (key) " " (name)
                }
            }
        };
        let old = format!("height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\"");
        let new = format!("height=\"{whole}\" viewBox=\"0 0 {WIDTH} {whole}\"");
        let drawing = self.svg.replacen(&old, &new, 1);
        let body = drawing.trim_end().strip_suffix("</svg>").expect("drawings end with their tag");
        self.svg = format!("{body}{}</svg>\n", keys.into_string());
        self
    }
}

/// A scatter or line plot. `None` without points.
pub(crate) fn points(name: &str, title: &str, description: &str, [x, y]: [Axis; 2], groups: &[Group]) -> Option<Plot> {
    let groups: Vec<Group> = groups.iter().map(|group| group.drawable(x.kind, y.kind)).collect();
    let groups: Vec<&Group> = groups.iter().filter(|group| !group.points.is_empty()).collect();
    if groups.is_empty() {
        return None;
    }
    let all = || groups.iter().flat_map(|group| &group.points);
    let ends = |point: &Point| point.interval.unwrap_or([point.y; 2]);
    let across = Scale::of(x.kind, all().map(|point| point.x));
    let up = Scale::of(y.kind, all().flat_map(|point| [point.y, ends(point)[0], ends(point)[1]]));
    let drawing = draw((WIDTH, HEIGHT), |root| {
        let entries: Vec<(&str, Mark)> = groups.iter().map(|group| (group.name.as_str(), group.mark)).collect();
        let mut chart = chart(&legend(root, &entries)?, across, up)?;
        mesh(&mut chart, x.label, y.label, true)?;
        groups.iter().try_for_each(|group| group.draw(&mut chart, root, x.kind == AxisKind::Index))?;
        name_points(root, &chart, &groups)
    });
    Some(Plot::new(name, title, description, &drawing))
}

/// A heat map: `rows` from top to bottom, each with its label and its cells. `None` without rows.
pub(crate) fn heatmap(
    name: &str,
    title: &str,
    description: &str,
    [x, y]: [&str; 2],
    steps: &[String],
    rows: &[(String, Vec<u8>)],
) -> Option<Plot> {
    let columns = rows.iter().map(|(_, cells)| cells.len()).max().filter(|columns| *columns > 0)?;
    let height = u32::try_from(rows.len()).unwrap_or(u32::MAX).min(100) * 38 + 230;
    let across = Scale::of(AxisKind::Index, [0.0, (columns - 1) as f64].into_iter());
    let labels: Vec<&str> = rows.iter().rev().map(|(label, _)| label.as_str()).collect();
    let up = Scale::labels(&labels);
    let drawing = draw((WIDTH, height), |root| {
        let mark = |step: usize| Mark { colour: Colour::Heat(step as u8), round: false, filled: true };
        let entries: Vec<(&str, Mark)> = steps.iter().enumerate().map(|(i, step)| (step.as_str(), mark(i))).collect();
        let mut chart = chart(&legend(root, &entries)?, across, up)?;
        mesh(&mut chart, x, y, false)?;
        for (row, (_, cells)) in rows.iter().rev().enumerate() {
            chart.draw_series(cells.iter().enumerate().map(|(column, step)| {
                let (left, bottom) = (column as f64 - 0.5, row as f64 - 0.46);
                Rectangle::new([(left, bottom + 0.92), (left + 1.0, bottom)], Colour::Heat(*step).rgb().filled())
            }))?;
        }
        Ok(())
    });
    Some(Plot::new(name, title, description, &drawing))
}

type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Scale, Scale>>;
type PlotResult<T> = Result<T, DrawingAreaErrorKind<std::io::Error>>;

fn draw(size: (u32, u32), draw: impl FnOnce(&Canvas<'_>) -> PlotResult<()>) -> String {
    let mut svg = String::new();
    let drawn = {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let filled = root.fill(&Colour::Surface.rgb());
        filled.and_then(|()| draw(&root)).and_then(|()| root.present())
    };
    drawn.expect("a string takes every drawing");
    svg
}

fn text(colour: Colour) -> TextStyle<'static> {
    let font: FontDesc<'static> = ("sans-serif", FONT).into_font();
    TextStyle { color: colour.rgb().to_backend_color(), ..TextStyle::from(font) }
}

/// Positions of the legend's entries, in the necessary number of lines.
fn legend_places<'a>(names: impl Iterator<Item = &'a str>) -> Vec<(i32, i32)> {
    let margin = 20;
    let (mut x, mut y) = (margin, LEGEND / 2 + 6);
    let place = |name: &str| {
        let width = 54 + CHARACTER * i32::try_from(name.chars().count()).unwrap_or(i32::MAX / 100);
        if x > margin && x + width > WIDTH.cast_signed() {
            (x, y) = (margin, y + LEGEND);
        }
        let at = (x, y);
        x += width;
        at
    };
    names.map(place).collect()
}

/// Draws a legend. Returns the remaining area.
fn legend<'a>(root: &Canvas<'a>, entries: &[(&str, Mark)]) -> PlotResult<Canvas<'a>> {
    let places = legend_places(entries.iter().map(|(name, _)| *name));
    let style = text(Colour::Ink).pos(Pos::new(HPos::Left, VPos::Center));
    for ((name, mark), (x, y)) in entries.iter().zip(&places) {
        mark.draw(root, (x + 8, *y), POINT)?;
        root.draw(&Text::new((*name).to_owned(), (x + 26, *y), style.clone()))?;
    }
    let lowest = places.last().map_or(LEGEND / 2 + 6, |(_, y)| *y);
    Ok(root.split_vertically(lowest + LEGEND / 2 + 4).1)
}

fn chart<'a, 'b>(root: &Canvas<'b>, across: Scale, up: Scale) -> PlotResult<Chart<'a, 'b>> {
    ChartBuilder::on(root)
        .margin(10)
        .margin_right(36)
        .x_label_area_size(104)
        .y_label_area_size(136)
        .build_cartesian_2d(across, up)
}

fn mesh(chart: &mut Chart<'_, '_>, x: &str, y: &str, grid: bool) -> PlotResult<()> {
    let mut mesh = chart.configure_mesh();
    if !grid {
        mesh.disable_mesh();
    }
    mesh.bold_line_style(Colour::Grid.rgb())
        .max_light_lines(0)
        .axis_style(Colour::Muted.rgb())
        .x_labels(100)
        .y_labels(1000)
        .label_style(text(Colour::Ink))
        .axis_desc_style(text(Colour::Ink))
        .x_desc(x)
        .y_desc(y)
        .draw()
}

/// Draws the keys of points without overlaps.
fn name_points(root: &Canvas<'_>, chart: &Chart<'_, '_>, groups: &[&Group]) -> PlotResult<()> {
    let area = chart.plotting_area();
    let (mut points, mut marks) = (Vec::new(), Vec::new());
    for (number, group) in groups.iter().enumerate() {
        let places: Vec<(i32, i32)> =
            group.points.iter().map(|point| area.map_coordinate(&(point.x, point.y))).collect();
        marks.extend(places.iter().map(|(x, y)| Area::around(*x, *y, POINT)));
        if group.joined {
            marks.extend(places.windows(2).flat_map(|pair| keys::along(pair[0], pair[1])));
        }
        for (point, at) in group.points.iter().zip(places) {
            if let Some(ends) = point.interval {
                let [low, high] = ends.map(|end| area.map_coordinate(&(point.x, end)));
                marks.extend(keys::along(low, high));
            }
            points.push(Keyed { group: number, at, key: &point.key });
        }
    }
    let (across, up) = area.get_pixel_range();
    let (right, bottom) = (WIDTH.cast_signed() - 4, up.end - 2);
    let room = Area { left: across.start + 2, top: up.start, right, bottom };
    for label in keys::labels(&points, room, &marks) {
        if let Some([from, to]) = label.line {
            root.draw(&PathElement::new(vec![from, to], Colour::Muted.rgb().stroke_width(2)))?;
        }
        root.draw(&Text::new(label.text, (label.area.left, label.area.top - 1), text(Colour::Muted)))?;
    }
    Ok(())
}

impl Mark {
    /// Draws the mark at a position of the drawing.
    fn draw(self, root: &Canvas<'_>, (x, y): (i32, i32), size: i32) -> PlotResult<()> {
        let style = ShapeStyle { color: self.colour.rgb().to_rgba(), filled: self.filled, stroke_width: 3 };
        let Area { left, top, right, bottom } = Area::around(x, y, size);
        match (self.round, self.filled) {
            (true, _) => root.draw(&Circle::new((x, y), size, style)),
            (false, true) => root.draw(&Rectangle::new([(left, top), (right, bottom)], style)),
            // A rectangle's outline would be too thin.
            (false, false) => {
                let outline = vec![(left, top), (right, top), (right, bottom), (left, bottom), (left, top)];
                root.draw(&PathElement::new(outline, style))
            }
        }
    }
}

impl Group {
    /// Removes points that are outside the axes.
    fn drawable(&self, x: AxisKind, y: AxisKind) -> Self {
        let fits = |value: f64, kind| match kind {
            AxisKind::Log => value.is_finite() && value > 0.0,
            AxisKind::Count => value.is_finite() && value >= 0.0,
            AxisKind::Linear | AxisKind::Percent | AxisKind::Index => value.is_finite(),
        };
        let mut group = self.clone();
        group.points.retain(|point| fits(point.x, x) && fits(point.y, y));
        for point in &mut group.points {
            point.interval = point.interval.filter(|ends| ends.iter().all(|end| fits(*end, y)));
        }
        group
    }

    /// `of_wholes`: on an axis of layers a missing value is a gap in the line.
    fn draw(&self, chart: &mut Chart<'_, '_>, root: &Canvas<'_>, of_wholes: bool) -> PlotResult<()> {
        let stroke = self.mark.colour.rgb().stroke_width(3);
        if self.joined {
            let path: Vec<(f64, f64)> = self.points.iter().map(|point| (point.x, point.y)).collect();
            let parts = path.chunk_by(|a, b| !of_wholes || b.0 - a.0 <= 1.0).filter(|part| part.len() > 1);
            chart.draw_series(parts.map(|part| PathElement::new(part.to_vec(), stroke)))?;
        }
        let bars = self.points.iter().filter_map(|point| Some((point.x, point.interval?)));
        chart.draw_series(bars.map(|(x, [low, high])| PathElement::new(vec![(x, low), (x, high)], stroke)))?;
        let place = |point: &Point| chart.plotting_area().map_coordinate(&(point.x, point.y));
        let size = if self.joined { DOT } else { POINT };
        self.points.iter().try_for_each(|point| self.mark.draw(root, place(point), size))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MARK: Mark = Mark { colour: Colour::First, round: true, filled: true };

    fn plot(kinds: [AxisKind; 2], values: &[(f64, f64)]) -> Option<Plot> {
        let points = values.iter().map(|(x, y)| Point { x: *x, y: *y, key: "1".into(), ..Point::default() }).collect();
        let group = Group { name: "ours".into(), mark: MARK, joined: false, points };
        let axes = kinds.map(|kind| Axis { label: "axis", kind });
        super::points("name", "a <title>", "says \"<script>\" & more", axes, &[group])
    }

    #[test]
    fn svg_has_title_and_description_and_escapes_names() {
        let svg = plot([AxisKind::Log, AxisKind::Percent], &[(1e9, 25.0), (1e12, 50.0)]).unwrap().svg;
        for expected in [
            "<svg role=\"img\" aria-labelledby=\"name-title name-description\"",
            "viewBox=\"0 0 840 600\"",
            "<title id=\"name-title\">a &lt;title&gt;</title>",
            "&lt;script&gt;",
            "1 T",
        ] {
            assert!(svg.contains(expected), "{expected} in {svg}");
        }
        assert!(!svg.contains("<script"));
        assert_eq!(svg.matches("<circle").count(), 3, "two points and the legend's");
    }

    #[test]
    fn layer_without_a_value_is_a_gap_in_the_line() {
        let lines = |layers: &[f64]| {
            let points = layers.iter().map(|x| Point { x: *x, y: 1.0 + x, ..Point::default() }).collect();
            let group = Group { name: "load".into(), mark: MARK, joined: true, points };
            let axes = [AxisKind::Index, AxisKind::Linear].map(|kind| Axis { label: "axis", kind });
            let svg = super::points("name", "title", "says", axes, &[group]).unwrap().svg;
            svg.matches("stroke-width=\"3\"").count()
        };
        let dots = lines(&[0.0, 2.0, 4.0]);
        assert_eq!(lines(&[0.0, 1.0, 2.0]), dots + 1, "every second layer has no router: no line at all");
        assert_eq!(lines(&[0.0, 1.0, 3.0, 4.0]), lines(&[0.0, 1.0, 2.0, 3.0]) + 1, "two lines for one");
    }

    #[test]
    fn legend_entries_do_not_overlap() {
        let names = ["plain", "Hadamard 16", "Hadamard 32", "Hadamard 128", ">= 9.54"];
        let places = legend_places(names.into_iter());
        // The average width in a wide font.
        let end = |i: usize| places[i].0 + 26 + 17 * names[i].chars().count() as i32;
        for (i, pair) in places.windows(2).enumerate() {
            let [(_, above), (x, y)] = [pair[0], pair[1]];
            assert!(y > above || x >= end(i) + 20, "{places:?}");
            assert!(end(i + 1) <= WIDTH.cast_signed(), "{places:?}");
        }
    }

    #[test]
    fn key_names_are_listed_below_the_plot() {
        let plain = plot([AxisKind::Log, AxisKind::Percent], &[(1e9, 25.0)]).unwrap();
        let keyed = plain.clone().keyed(&[("1".into(), "<script>".into()), ("a".into(), "n".repeat(19))]);
        assert!(keyed.svg.contains("viewBox=\"0 0 840 657\"") && keyed.svg.contains("height=\"657\""));
        assert!(keyed.svg.contains("1 &lt;script&gt;") && !keyed.svg.contains("<script"));
        assert!(keyed.svg.contains("<text x=\"440\"") && keyed.svg.trim_end().ends_with("</svg>"));
        let long = plain.clone().keyed(&[("1".into(), "a".into()), ("2".into(), "n".repeat(99))]);
        assert!(long.svg.contains("viewBox=\"0 0 840 695\"") && !long.svg.contains("<text x=\"440\""));
        assert!(long.svg.contains(&"n".repeat(44)) && !long.svg.contains(&"n".repeat(45)), "{}", long.svg);
        assert_eq!(plain.clone().keyed(&[]), plain);
    }

    #[test]
    fn values_outside_the_axis_are_not_drawn() {
        assert!(plot([AxisKind::Log, AxisKind::Linear], &[(0.0, 1.0), (-1.0, 1.0), (1.0, f64::INFINITY)]).is_none());
        assert!(plot([AxisKind::Linear, AxisKind::Linear], &[(f64::NAN, 1.0)]).is_none());
        assert!(plot([AxisKind::Index, AxisKind::Linear], &[]).is_none());
        assert!(heatmap("n", "t", "d", ["x", "y"], &[], &[]).is_none());
    }

    proptest! {
        #[test]
        fn any_values_are_plotted_without_panic(
            values in proptest::collection::vec((1e-30f64..1e30, 1e-30f64..1e30), 1..5),
        ) {
            for x in [AxisKind::Linear, AxisKind::Log] {
                let plot = plot([x, AxisKind::Log], &values).unwrap();
                prop_assert_eq!(plot.svg.matches("<circle").count(), values.len() + 1);
                prop_assert!(!plot.svg.contains("NaN") && plot.svg.len() < 100_000);
            }
        }
    }
}
