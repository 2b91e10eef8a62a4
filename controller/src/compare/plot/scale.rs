//! Axes of a plot: positions of values and ticks.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

use crate::compare::table::short;

/// Maximum ticks of a logarithmic axis, so that their labels (100 M) do not touch.
const MAX_NAMES: usize = 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AxisKind {
    /// Linear from 0.
    Linear,
    /// Logarithmic; values must be positive.
    Log,
    /// Logarithm of the value plus one, from 0: for counts, which may be 0.
    Count,
    /// 0 to 100.
    Percent,
    /// Whole numbers from 0, such as layers.
    Index,
}

/// An axis with its ticks.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scale {
    low: f64,
    high: f64,
    shape: Shape,
    ticks: Vec<(f64, String)>,
}

/// The function that is linear along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Values,
    Logarithms,
    /// Logarithm of the value plus one.
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
    /// An axis for all values, which must be finite and, for a logarithmic axis, positive.
    pub(super) fn of(kind: AxisKind, values: impl Iterator<Item = f64>) -> Self {
        let (min, max) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| (a.min(x), b.max(x)));
        match kind {
            AxisKind::Percent => Self::even(0.0, 100.0, 25.0, 4.0),
            AxisKind::Index => Self::even(0.0, max, nice(max / 8.0).max(1.0), 0.5),
            AxisKind::Linear => {
                let max = if max > 0.0 { max * 1.08 } else { 1.0 };
                Self::even(0.0, max, nice(max / 5.0), 0.0)
            }
            AxisKind::Log => Self::log(min, max),
            AxisKind::Count => Self::count(max.max(1.0)),
        }
    }

    /// Ticks at every `step` from `low` to `high`, with a margin.
    fn even(low: f64, high: f64, step: f64, space: f64) -> Self {
        let count = ((high - low) / step).floor() as usize;
        let ticks = (0..=count.min(1000)).map(|i| low + i as f64 * step).map(|at| (at, short(at))).collect();
        Self { low: low - space, high: high + space, shape: Shape::Values, ticks }
    }

    fn log(min: f64, max: f64) -> Self {
        // A margin of a tenth on both sides, and at least a factor of two in total.
        let space = ((max / min).log10() * 0.1).max(0.17);
        let (low, high) = (min.log10() - space, max.log10() + space);
        let decades = (low.floor() as i32)..=(high.ceil() as i32);
        // Limited by the width of the labels (100 M, 200 M).
        let steps: &[f64] = if high - low < 0.71 {
            &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0]
        } else if high - low < 2.05 {
            &[1.0, 2.0, 5.0]
        } else {
            &[1.0]
        };
        let at = decades.flat_map(|decade| steps.iter().map(move |step| step * 10f64.powi(decade)));
        let at: Vec<f64> = at.filter(|at| (low..=high).contains(&at.log10())).collect();
        let every = at.len().div_ceil(MAX_NAMES);
        let ticks = at.into_iter().step_by(every.max(1)).map(|at| (at, short(at))).collect();
        Self { low, high, shape: Shape::Logarithms, ticks }
    }

    fn count(max: f64) -> Self {
        let shape = Shape::Successors;
        let decades = (0..=max.log10().ceil() as i32).map(|decade| 10f64.powi(decade));
        let ticks =
            std::iter::once(0.0).chain(decades).filter(|at| *at <= max * 1.3).map(|at| (at, short(at))).collect();
        Self { low: -0.1, high: shape.of(max) + 0.15, shape, ticks }
    }

    /// One position per label, from 0.
    pub(super) fn labels(labels: &[&str]) -> Self {
        let ticks = labels.iter().enumerate().map(|(i, label)| (i as f64, (*label).to_owned())).collect();
        Self { low: -0.5, high: labels.len() as f64 - 0.5, shape: Shape::Values, ticks }
    }
}

/// The next of 1, 2, 5, 10, 20, ... and their fractions.
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

    proptest! {
        #[test]
        fn scales_contain_their_values_and_have_ticks(min in 1e-12f64..1e12, factor in 1f64..1e12) {
            for kind in [AxisKind::Linear, AxisKind::Log, AxisKind::Count] {
                let scale = Scale::of(kind, [min, min * factor].into_iter());
                for value in [min, min * factor] {
                    prop_assert!((0..=1000).contains(&scale.map(&value, (0, 1000))));
                }
                prop_assert!((2..=40).contains(&scale.ticks.len()), "{:?}", scale);
            }
        }
    }
}
