//! Horizontal bars from 0, in groups.

use plotters::element::{PathElement, Rectangle};
use plotters::style::Color;

use super::scale::{AxisKind, Scale};
use super::{Colour, LEGEND, Mark, Plot, WIDTH, chart, draw, legend, legend_places, mesh};
use crate::compare::bootstrap::Estimate;

/// Maximum rows.
const ROWS: usize = 48;
/// Height of a bar with its margin, and of the space between rows.
const BAR: u32 = 24;
const BETWEEN: u32 = 20;
/// Share of a row that its bars fill.
const SPAN: f64 = 0.84;

/// Bars of one group.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    pub(crate) label: String,
    /// One per series, from top to bottom; `None` without a value.
    pub(crate) bars: Vec<Option<Estimate>>,
}

/// Rows from top to bottom with bars in the colours of the series, and intervals as lines. `[x,
/// y]` are the axis labels. `None` without bars.
pub(crate) fn bars(
    name: &str,
    title: &str,
    description: &str,
    [x, y]: [&str; 2],
    series: &[(String, Colour)],
    rows: &[Row],
) -> Option<Plot> {
    let rows = &rows[..rows.len().min(ROWS)];
    let all = || rows.iter().flat_map(|row| row.bars.iter().take(series.len()).flatten()).filter(|bar| fits(bar));
    all().next()?;
    let end = |bar: &Estimate| bar.interval.map_or(bar.value, |[_, high]| high.max(bar.value));
    let across = Scale::of(AxisKind::Linear, all().map(end));
    let labels: Vec<&str> = rows.iter().rev().map(|row| row.label.as_str()).collect();
    let up = Scale::labels(&labels);
    let places = legend_places(series.iter().map(|(name, _)| name.as_str()));
    let more_lines = places.last().map_or(0_i32, |(_, y)| y / LEGEND).cast_unsigned();
    let height = rows.len() as u32 * (series.len() as u32 * BAR + BETWEEN) + 230 + more_lines * LEGEND.cast_unsigned();
    let drawing = draw((WIDTH, height), |root| {
        let mark = |colour: Colour| Mark { colour, round: false, filled: true };
        let entries: Vec<(&str, Mark)> = series.iter().map(|(name, colour)| (name.as_str(), mark(*colour))).collect();
        let mut chart = chart(&legend(root, &entries)?, across, up)?;
        mesh(&mut chart, x, y, true)?;
        let thickness = SPAN / series.len() as f64;
        for (row, of_row) in rows.iter().rev().enumerate() {
            for (i, (bar, (_, colour))) in of_row.bars.iter().zip(series).enumerate() {
                let Some(bar) = bar.filter(fits) else { continue };
                let top = row as f64 + SPAN / 2.0 - i as f64 * thickness;
                let corners = [(0.0, top), (bar.value, top - 0.8 * thickness)];
                chart.draw_series([Rectangle::new(corners, colour.rgb().filled())])?;
                if let Some([low, high]) = bar.interval {
                    let line = vec![(low, top - 0.4 * thickness), (high, top - 0.4 * thickness)];
                    chart.draw_series([PathElement::new(line, Colour::Ink.rgb().stroke_width(3))])?;
                }
            }
        }
        Ok(())
    });
    Some(Plot::new(name, title, description, &drawing))
}

/// Whether the value can be drawn on an axis from 0.
fn fits(bar: &Estimate) -> bool {
    let holds = |value: f64| value.is_finite() && value >= 0.0;
    holds(bar.value) && bar.interval.is_none_or(|ends| ends.into_iter().all(holds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_bars_and_intervals_have_lines() {
        let series = [("plain".to_owned(), Colour::First), ("rotated".to_owned(), Colour::Second)];
        let sure = Estimate { value: 2.0, interval: Some([1.5, 2.5]) };
        let row = |label: &str, bars: [Option<Estimate>; 2]| Row { label: label.to_owned(), bars: bars.to_vec() };
        let rows = [
            row("INT8", [Some(sure), Some(Estimate::without_interval(1.0))]),
            row("MXFP4", [Some(Estimate::without_interval(f64::INFINITY)), None]),
        ];
        let drawn = |rows: &[Row]| bars("n", "t", "d", ["x", "y"], &series, rows);
        let svg = drawn(&rows).unwrap().svg;
        let count = |what: &str| svg.matches(what).count();
        let colours = ["#0B5CAD", "#B04A00"].map(|colour| count(&format!("fill=\"{colour}\"")));
        assert_eq!(colours, [2, 2], "one in the legend each: {svg}");
        assert!(svg.contains(">\nINT8\n<") && svg.contains(">\nMXFP4\n<"), "{svg}");
        assert_eq!(count("stroke-width=\"3\""), 1, "{svg}");
        assert_eq!(drawn(&rows[1..]), None);
    }
}
