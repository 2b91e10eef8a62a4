//! One plot as SVG: axes that fit their values, marks that do not need colour to be told apart, a title and a description for those who do
//! not see it.
//!
//! Every colour here has a meaning and a value of its own, so that a page can give it another one ([`Colour::ALL`]). Text in a plot is ours
//! alone: models have numbers in it.

use std::ops::Range;

use maud::html;
use plotters::chart::{ChartBuilder, ChartContext};
use plotters::coord::Shift;
use plotters::coord::cartesian::Cartesian2d;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::drawing::{DrawingArea, DrawingAreaErrorKind, IntoDrawingArea};
use plotters::element::{Circle, PathElement, Rectangle, Text};
use plotters::prelude::SVGBackend;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, FontDesc, IntoFont, RGBColor, ShapeStyle, TextStyle};

use super::sheet::short;

/// A plot's width in its own units; twice what it is meant to be shown at, because marks stand on whole units.
const WIDTH: u32 = 840;
/// Height of a plot of points or lines.
const HEIGHT: u32 = 600;
/// A quarter more than the letters come out: at 360 px of screen they are 10 px high.
const FONT: i32 = 35;
/// Height of a line of the legend.
const LEGEND: i32 = 46;
/// What a character of the legend is about wide.
const CHARACTER: i32 = 15;
/// Half of a mark's width: of a point, and of one on a line.
const POINT: i32 = 8;
const DOT: i32 = 5;

/// A colour by what it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// What is drawn on.
    Surface,
    /// Text and axes.
    Ink,
    /// Labels of points.
    Muted,
    /// The grid.
    Grid,
    /// The first quantity, and so on.
    First,
    /// The second.
    Second,
    /// The third.
    Third,
    /// The fourth.
    Fourth,
    /// A step of a scale of magnitudes, from 0: nothing of note, to 7: the largest.
    Heat(u8),
}

/// Red, green, blue.
pub type Rgb = [u8; 3];

/// A colour with its value on paper and on a dark screen.
pub type Tint = (Colour, Rgb, Rgb);

impl Colour {
    /// Steps of [`Self::Heat`].
    pub const STEPS: u8 = 8;

    /// Each with its value on paper and on a dark screen.
    pub const ALL: [Tint; 16] = [
        (Self::Surface, [0xff, 0xff, 0xff], [0x14, 0x18, 0x1d]),
        (Self::Ink, [0x1b, 0x1f, 0x24], [0xe6, 0xea, 0xef]),
        (Self::Muted, [0x4f, 0x58, 0x63], [0xb3, 0xbc, 0xc7]),
        (Self::Grid, [0xd8, 0xde, 0xe4], [0x36, 0x3f, 0x4a]),
        (Self::First, [0x0b, 0x5c, 0xad], [0x6c, 0xb4, 0xff]),
        (Self::Second, [0xb0, 0x4a, 0x00], [0xff, 0xa6, 0x57]),
        (Self::Third, [0x1a, 0x70, 0x37], [0x6c, 0xd0, 0x8a]),
        (Self::Fourth, [0x7a, 0x3f, 0xb8], [0xcf, 0xa6, 0xff]),
        (Self::Heat(0), [0xef, 0xf2, 0xf5], [0x22, 0x28, 0x30]),
        (Self::Heat(1), [0xfd, 0xe0, 0xa6], [0x4a, 0x1f, 0x5e]),
        (Self::Heat(2), [0xfd, 0xbf, 0x6f], [0x71, 0x20, 0x6e]),
        (Self::Heat(3), [0xf9, 0x91, 0x4f], [0x98, 0x2d, 0x68]),
        (Self::Heat(4), [0xe6, 0x5f, 0x52], [0xc0, 0x42, 0x55]),
        (Self::Heat(5), [0xbf, 0x37, 0x68], [0xe1, 0x64, 0x3b]),
        (Self::Heat(6), [0x87, 0x22, 0x6f], [0xf7, 0x99, 0x26]),
        (Self::Heat(7), [0x45, 0x0d, 0x54], [0xfb, 0xe0, 0x6b]),
    ];

    fn rgb(self) -> RGBColor {
        let [r, g, b] = Self::ALL.iter().find(|(colour, ..)| *colour == self).map_or([0; 3], |(_, light, _)| *light);
        RGBColor(r, g, b)
    }
}

/// How a point is drawn. Shape and filling tell it apart where colour does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Its colour.
    pub colour: Colour,
    /// Round, else square.
    pub round: bool,
    /// Filled, else an outline.
    pub filled: bool,
}

/// Points of one kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// What the legend says.
    pub name: String,
    /// How they are drawn.
    pub mark: Mark,
    /// They are joined by a line.
    pub joined: bool,
    /// The points, in order.
    pub points: Vec<Point>,
}

/// A point.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Point {
    /// Along the horizontal axis.
    pub x: f64,
    /// Along the vertical axis.
    pub y: f64,
    /// From where to where it may lie.
    pub interval: Option<[f64; 2]>,
    /// What stands beside it; a number or a letter.
    pub key: String,
}

/// What an axis does with its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// From 0 to what is needed.
    Linear,
    /// Powers of ten are equally far apart; values must be positive.
    Log,
    /// From 0, and as far as it takes: powers of ten are almost equally far apart. For counts, which may be 0.
    Count,
    /// 0 to 100.
    Percent,
    /// Whole numbers from 0, as layers have.
    Index,
}

/// An axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    /// What it says.
    pub label: &'static str,
    /// What it does with its values.
    pub kind: Kind,
}

/// A finished plot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plot {
    /// One word for it; unique in a report, and a file name.
    pub name: String,
    /// Its heading.
    pub title: String,
    /// What it shows and how to read it.
    pub description: String,
    /// The drawing.
    pub svg: String,
}

impl Plot {
    /// Gives a drawing its title and description, escaped: names of models are in them.
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
}

/// Points (and lines) over two axes. `None` if there is no point to draw.
pub fn points(name: &str, title: &str, description: &str, [x, y]: [Axis; 2], groups: &[Group]) -> Option<Plot> {
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
        groups.iter().try_for_each(|group| group.draw(&mut chart, root))?;
        let area = chart.plotting_area();
        let placed: Vec<_> =
            all().map(|point| (area.map_coordinate(&(point.x, point.y)), point.key.as_str())).collect();
        keys(root, &placed)
    });
    Some(Plot::new(name, title, description, &drawing))
}

/// A table of steps as coloured cells: `rows` from top to bottom, each with its label and its cells. `None` if there is none.
pub fn heat(
    name: &str,
    title: &str,
    description: &str,
    [x, y]: [&str; 2],
    steps: &[String],
    rows: &[(String, Vec<u8>)],
) -> Option<Plot> {
    let columns = rows.iter().map(|(_, cells)| cells.len()).max().filter(|columns| *columns > 0)?;
    let height = u32::try_from(rows.len()).unwrap_or(u32::MAX).min(100) * 38 + 230;
    let across = Scale::of(Kind::Index, [0.0, (columns - 1) as f64].into_iter());
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
type Drawn<T> = Result<T, DrawingAreaErrorKind<std::io::Error>>;

fn draw(size: (u32, u32), draw: impl FnOnce(&Canvas<'_>) -> Drawn<()>) -> String {
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

/// Draws a legend in as many lines as it needs; gives what is left below.
fn legend<'a>(root: &Canvas<'a>, entries: &[(&str, Mark)]) -> Drawn<Canvas<'a>> {
    let margin = 20;
    let (mut x, mut y) = (margin, LEGEND / 2 + 6);
    let style = text(Colour::Ink).pos(Pos::new(HPos::Left, VPos::Center));
    for (name, mark) in entries {
        let width = 54 + CHARACTER * i32::try_from(name.chars().count()).unwrap_or(i32::MAX / 100);
        if x > margin && x + width > WIDTH.cast_signed() {
            (x, y) = (margin, y + LEGEND);
        }
        mark.draw(root, (x + 8, y), POINT)?;
        root.draw(&Text::new((*name).to_owned(), (x + 26, y), style.clone()))?;
        x += width;
    }
    Ok(root.split_vertically(y + LEGEND / 2 + 4).1)
}

fn chart<'a, 'b>(root: &Canvas<'b>, across: Scale, up: Scale) -> Drawn<Chart<'a, 'b>> {
    ChartBuilder::on(root)
        .margin(10)
        .margin_right(36)
        .x_label_area_size(104)
        .y_label_area_size(136)
        .build_cartesian_2d(across, up)
}

fn mesh(chart: &mut Chart<'_, '_>, x: &str, y: &str, grid: bool) -> Drawn<()> {
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

/// Writes the keys of points beside them, each where it hides least.
fn keys(root: &Canvas<'_>, points: &[((i32, i32), &str)]) -> Drawn<()> {
    let mut taken: Vec<Area> = points.iter().map(|((x, y), _)| Area::around(*x, *y, POINT)).collect();
    for ((x, y), key) in points.iter().filter(|(_, key)| !key.is_empty()) {
        let (width, height) = (CHARACTER * key.chars().count() as i32 + 2, FONT - 10);
        let (right, left, middle) = (x + POINT + 2, x - POINT - 2 - width, x - width / 2);
        let (above, below) = (y - POINT - height + 4, y + POINT - 4);
        let corners =
            [(right, above), (left, above), (right, below), (left, below), (middle, above - 6), (middle, below + 6)];
        let areas = corners.map(|(left, top)| Area { left, top, right: left + width, bottom: top + height });
        let hidden = |area: &Area| taken.iter().map(|other| area.common(other)).sum::<i32>();
        let best = areas.into_iter().min_by_key(hidden).expect("there are six");
        root.draw(&Text::new((*key).to_owned(), (best.left, best.top - 2), text(Colour::Muted)))?;
        taken.push(best);
    }
    Ok(())
}

/// A part of the drawing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Area {
    left: i32,
    top: i32,
    right: i32,
    bottom: i32,
}

impl Area {
    fn around(x: i32, y: i32, by: i32) -> Self {
        Self { left: x - by, top: y - by, right: x + by, bottom: y + by }
    }

    /// Size of what it shares with another.
    fn common(&self, other: &Self) -> i32 {
        let width = self.right.min(other.right) - self.left.max(other.left);
        let height = self.bottom.min(other.bottom) - self.top.max(other.top);
        width.max(0) * height.max(0)
    }
}

impl Mark {
    /// Draws it around a place of the whole drawing.
    fn draw(self, root: &Canvas<'_>, (x, y): (i32, i32), size: i32) -> Drawn<()> {
        let style = ShapeStyle { color: self.colour.rgb().to_rgba(), filled: self.filled, stroke_width: 3 };
        let Area { left, top, right, bottom } = Area::around(x, y, size);
        match (self.round, self.filled) {
            (true, _) => root.draw(&Circle::new((x, y), size, style)),
            (false, true) => root.draw(&Rectangle::new([(left, top), (right, bottom)], style)),
            // A rectangle's outline would be a hair.
            (false, false) => {
                let outline = vec![(left, top), (right, top), (right, bottom), (left, bottom), (left, top)];
                root.draw(&PathElement::new(outline, style))
            }
        }
    }
}

impl Group {
    /// Without the points that these axes cannot hold.
    fn drawable(&self, x: Kind, y: Kind) -> Self {
        let fits = |value: f64, kind| match kind {
            Kind::Log => value.is_finite() && value > 0.0,
            Kind::Count => value.is_finite() && value >= 0.0,
            Kind::Linear | Kind::Percent | Kind::Index => value.is_finite(),
        };
        let mut group = self.clone();
        group.points.retain(|point| fits(point.x, x) && fits(point.y, y));
        for point in &mut group.points {
            point.interval = point.interval.filter(|ends| ends.iter().all(|end| fits(*end, y)));
        }
        group
    }

    fn draw(&self, chart: &mut Chart<'_, '_>, root: &Canvas<'_>) -> Drawn<()> {
        let stroke = self.mark.colour.rgb().stroke_width(3);
        if self.joined {
            let path: Vec<(f64, f64)> = self.points.iter().map(|point| (point.x, point.y)).collect();
            chart.draw_series([PathElement::new(path, stroke)])?;
        }
        let bars = self.points.iter().filter_map(|point| Some((point.x, point.interval?)));
        chart.draw_series(bars.map(|(x, [low, high])| PathElement::new(vec![(x, low), (x, high)], stroke)))?;
        let place = |point: &Point| chart.plotting_area().map_coordinate(&(point.x, point.y));
        let size = if self.joined { DOT } else { POINT };
        self.points.iter().try_for_each(|point| self.mark.draw(root, place(point), size))
    }
}

// ------------------------------------------------------------------------------------------------------------- axes

/// An axis with the places that are named.
#[derive(Clone, Debug, PartialEq)]
struct Scale {
    low: f64,
    high: f64,
    shape: Shape,
    ticks: Vec<(f64, String)>,
}

/// What is evenly spread along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Values,
    Logarithms,
    /// Logarithms of the next number.
    Successors,
}

impl Shape {
    fn of(self, value: f64) -> f64 {
        match self {
            Self::Values => value,
            Self::Logarithms => value.log10(),
            Self::Successors => (value + 1.0).log10(),
        }
    }

    fn back(self, place: f64) -> f64 {
        match self {
            Self::Values => place,
            Self::Logarithms => 10f64.powf(place),
            Self::Successors => 10f64.powf(place) - 1.0,
        }
    }
}

impl Scale {
    /// One that holds all values, which are finite and, on a logarithmic axis, positive.
    fn of(kind: Kind, values: impl Iterator<Item = f64>) -> Self {
        let (least, most) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| (a.min(x), b.max(x)));
        match kind {
            Kind::Percent => Self::even(0.0, 100.0, 25.0, 4.0),
            Kind::Index => Self::even(0.0, most, nice(most / 8.0).max(1.0), 0.5),
            Kind::Linear => {
                let most = if most > 0.0 { most * 1.08 } else { 1.0 };
                Self::even(0.0, most, nice(most / 5.0), 0.0)
            }
            Kind::Log => Self::log(least, most),
            Kind::Count => Self::count(most.max(1.0)),
        }
    }

    /// Every `step` from `low` to `high`, with some space beside them.
    fn even(low: f64, high: f64, step: f64, space: f64) -> Self {
        let count = ((high - low) / step).floor() as usize;
        let ticks = (0..=count.min(1000)).map(|i| low + i as f64 * step).map(|at| (at, short(at))).collect();
        Self { low: low - space, high: high + space, shape: Shape::Values, ticks }
    }

    fn log(least: f64, most: f64) -> Self {
        // A tenth of the way on either side, and never less than a factor of two in all.
        let space = ((most / least).log10() * 0.1).max(0.15);
        let (low, high) = (least.log10() - space, most.log10() + space);
        let decades = (low.floor() as i32)..=(high.ceil() as i32);
        let steps: &[f64] = if high - low < 1.0 {
            &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0]
        } else if high - low < 2.5 {
            &[1.0, 2.0, 5.0]
        } else {
            &[1.0]
        };
        let at = decades.flat_map(|decade| steps.iter().map(move |step| step * 10f64.powi(decade)));
        let ticks = at.filter(|at| (low..=high).contains(&at.log10())).map(|at| (at, short(at))).collect();
        Self { low, high, shape: Shape::Logarithms, ticks }
    }

    fn count(most: f64) -> Self {
        let shape = Shape::Successors;
        let decades = (0..=most.log10().ceil() as i32).map(|decade| 10f64.powi(decade));
        let ticks =
            std::iter::once(0.0).chain(decades).filter(|at| *at <= most * 1.3).map(|at| (at, short(at))).collect();
        Self { low: -0.1, high: shape.of(most) + 0.15, shape, ticks }
    }

    /// One place per label, from 0.
    fn labels(labels: &[&str]) -> Self {
        let ticks = labels.iter().enumerate().map(|(i, label)| (i as f64, (*label).to_owned())).collect();
        Self { low: -0.5, high: labels.len() as f64 - 0.5, shape: Shape::Values, ticks }
    }
}

/// The next of 1, 2, 5, 10, 20, ... and their parts.
fn nice(step: f64) -> f64 {
    if step <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(step.log10().floor());
    let scaled = [1.0, 2.0, 5.0].into_iter().find(|nice| step / power <= *nice).unwrap_or(10.0);
    scaled * power
}

impl Ranged for Scale {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let share = (self.shape.of(*value) - self.low) / (self.high - self.low);
        from + (share * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        match hint.weight().allow_light_points() {
            true => Vec::new(),
            false => self.ticks.iter().map(|(at, _)| *at).collect(),
        }
    }

    fn range(&self) -> Range<f64> {
        self.shape.back(self.low)..self.shape.back(self.high)
    }
}

impl ValueFormatter<f64> for Scale {
    fn format_ext(&self, value: &f64) -> String {
        self.ticks.iter().find(|(at, _)| at == value).map_or_else(String::new, |(_, label)| label.clone())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MARK: Mark = Mark { colour: Colour::First, round: true, filled: true };

    fn plot(kinds: [Kind; 2], values: &[(f64, f64)]) -> Option<Plot> {
        let points = values.iter().map(|(x, y)| Point { x: *x, y: *y, key: "1".into(), ..Point::default() }).collect();
        let group = Group { name: "ours".into(), mark: MARK, joined: false, points };
        let axes = kinds.map(|kind| Axis { label: "axis", kind });
        super::points("name", "a <title>", "says \"<script>\" & more", axes, &[group])
    }

    #[test]
    fn drawings_have_a_title_a_description_and_no_markup_of_others() {
        let svg = plot([Kind::Log, Kind::Percent], &[(1e9, 25.0), (1e12, 50.0)]).unwrap().svg;
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
    fn what_an_axis_cannot_hold_is_not_drawn() {
        assert!(plot([Kind::Log, Kind::Linear], &[(0.0, 1.0), (-1.0, 1.0), (1.0, f64::INFINITY)]).is_none());
        assert!(plot([Kind::Linear, Kind::Linear], &[(f64::NAN, 1.0)]).is_none());
        assert!(plot([Kind::Index, Kind::Linear], &[]).is_none());
        assert!(heat("n", "t", "d", ["x", "y"], &[], &[]).is_none());
    }

    #[test]
    fn every_colour_has_a_value_of_its_own_in_both_modes() {
        let distinct =
            |of: fn(&Tint) -> Rgb| Colour::ALL.iter().map(of).collect::<std::collections::BTreeSet<_>>().len();
        assert_eq!((distinct(|c| c.1), distinct(|c| c.2)), (Colour::ALL.len(), Colour::ALL.len()));
    }

    /// Relative luminance and contrast of WCAG 2.1.
    fn contrast(a: Rgb, b: Rgb) -> f64 {
        let luminance = |rgb: Rgb| {
            let linear = rgb.map(|c| {
                let c = f64::from(c) / 255.0;
                if c <= 0.040_45 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
            });
            0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        };
        let (a, b) = (luminance(a) + 0.05, luminance(b) + 0.05);
        a.max(b) / a.min(b)
    }

    #[test]
    fn text_and_marks_stand_out_in_both_modes() {
        let (_, light, dark) = Colour::ALL[0];
        for (colour, on_light, on_dark) in Colour::ALL {
            let least = match colour {
                Colour::Ink | Colour::Muted => 7.0,
                Colour::First | Colour::Second | Colour::Third | Colour::Fourth => 4.5,
                Colour::Surface | Colour::Grid | Colour::Heat(_) => 1.0,
            };
            let (a, b) = (contrast(on_light, light), contrast(on_dark, dark));
            assert!(a >= least && b >= least, "{colour:?}: {a} {b}");
        }
    }

    proptest! {
        #[test]
        fn any_values_find_their_place(values in proptest::collection::vec((1e-30f64..1e30, 1e-30f64..1e30), 1..5)) {
            for x in [Kind::Linear, Kind::Log] {
                let plot = plot([x, Kind::Log], &values).unwrap();
                prop_assert_eq!(plot.svg.matches("<circle").count(), values.len() + 1);
                prop_assert!(!plot.svg.contains("NaN") && plot.svg.len() < 100_000);
            }
        }

        #[test]
        fn scales_hold_their_values_and_name_some_places(least in 1e-12f64..1e12, factor in 1f64..1e12) {
            for kind in [Kind::Linear, Kind::Log, Kind::Count] {
                let scale = Scale::of(kind, [least, least * factor].into_iter());
                for value in [least, least * factor] {
                    prop_assert!((0..=1000).contains(&scale.map(&value, (0, 1000))));
                }
                prop_assert!((2..=40).contains(&scale.ticks.len()), "{:?}", scale);
            }
        }
    }
}
