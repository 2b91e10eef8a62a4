//! The plots of one model: its layers, features, thresholds, experts and routers.

use std::collections::BTreeMap;

use outliers_protocol::{Feature, Point as Place, Results};

use super::heatmap::ColourSteps;
use super::{cost, mark, residual};
use crate::compare::bootstrap::mean;
use crate::compare::comparison::Compared;
use crate::compare::folder::{Run, layers};
use crate::compare::plot::{Axis, AxisKind, Colour, Group, Mark, Plot, Point, heatmap, points};
use crate::compare::statistics::Statistics;
use crate::compare::threshold_sweep::{self, SweepPoint};
use crate::ui::report::tables::strongest;

/// Maximum features in a heat map.
const FEATURES: usize = 24;

const LAYER: Axis = Axis { label: "layer", kind: AxisKind::Index };

/// The plots of one model; empty without a run.
pub(crate) fn of_model(model: &Compared) -> Vec<Plot> {
    let Some(run) = model.run.as_deref() else { return Vec::new() };
    let number = model.number;
    let named = |what: &str| format!("model{number}-{what}");
    let titled = |what: &str| format!("{what}, model {number}");
    let results = &run.results;
    let all = [
        cost::of_model(&named("cost"), &titled("What outliers cost in 8 and 4 bits"), results),
        magnitudes(&named("magnitudes"), &titled("Magnitudes by layer"), results),
        features(&named("features"), &titled("Outlier features by layer"), run),
        sweep(&named("ladder"), &titled("Features by threshold"), run),
        massive(&named("massive"), &titled("Residual stream: the largest values by layer"), results),
        residual::map(&named("residual-map"), &titled("Residual stream: dimensions by token"), results),
        experts(&named("experts"), &titled("Experts: the largest outputs by layer"), run),
        routers(&named("routers"), &titled("Routers: load of the experts by layer"), run),
    ];
    all.into_iter().flatten().collect()
}

fn curve(name: &str, mark: Mark, values: impl IntoIterator<Item = (usize, f64)>) -> Group {
    let points = values.into_iter().map(|(layer, y)| Point { x: layer as f64, y, ..Point::default() });
    Group { name: name.to_owned(), mark, joined: true, points: points.collect() }
}

fn magnitudes(name: &str, title: &str, results: &Results) -> Option<Plot> {
    let norms = |first: Place, second: Place, of: fn(&outliers_protocol::SiteSummary) -> Option<f64>| {
        let sites = results.sites.iter().filter(move |site| site.point == first || site.point == second);
        sites.filter_map(move |site| Some((site.layer, of(site)?))).collect::<Vec<_>>()
    };
    let largest = |site: &outliers_protocol::SiteSummary| Some(f64::from(site.max_abs));
    let high = |site: &outliers_protocol::SiteSummary| site.rows.map(|rows| rows.magnitude.p99_9);
    let (attention, mlp) = ((Place::BeforeAttention, Place::AfterMlp), (Place::BeforeMlp, Place::AfterAttention));
    let groups = [
        curve(
            "largest |x|, attention's norm",
            mark(Colour::First, true, true),
            norms(attention.0, attention.1, largest),
        ),
        curve("largest |x|, MLP's norm", mark(Colour::Second, false, true), norms(mlp.0, mlp.1, largest)),
        curve(
            "99.9 % of |x|, attention's norm",
            mark(Colour::First, true, false),
            norms(attention.0, attention.1, high),
        ),
        curve("99.9 % of |x|, MLP's norm", mark(Colour::Second, false, false), norms(mlp.0, mlp.1, high)),
    ];
    let description = "The largest magnitude at each norm output, and the magnitude that 99.9 % of its values do not exceed, by layer.";
    points(name, title, description, [LAYER, Axis { label: "|x|", kind: AxisKind::Log }], &groups)
}

fn features(name: &str, title: &str, run: &Run) -> Option<Plot> {
    let (results, statistics) = (&run.results, run.statistics.as_ref()?);
    let threshold = f64::from(results.thresholds.magnitude);
    let largest = f64::from(results.max_abs).max(threshold * 2.0);
    let scale = ColourSteps { threshold, largest };
    let layers = layers(results);
    let row = |feature: &&Feature| {
        let cell = |layer: &usize| {
            let at = results.sites.iter().enumerate().filter(|(_, site)| site.layer == *layer);
            let peak = at.map(|(site, _)| statistics.max_abs(site, feature.dim)).fold(0.0, f32::max);
            scale.step(f64::from(peak))
        };
        let star = if feature.systematic_by_layers { "" } else { "*" };
        (format!("{}{star}", feature.dim), layers.iter().map(cell).collect())
    };
    let rows: Vec<(String, Vec<u8>)> = strongest(results).iter().take(FEATURES).map(row).collect();
    let shown = if results.features.len() > FEATURES {
        format!(" The first {FEATURES} of {}.", results.features.len())
    } else {
        String::new()
    };
    let description = format!(
        "Largest magnitude of each feature in each layer, at either norm output. Systematic features first; those with a star have outliers but \
         are not systematic.{shown}"
    );
    heatmap(name, title, &description, ["layer", "feature"], &scale.words(), &rows)
}

fn sweep(name: &str, title: &str, run: &Run) -> Option<Plot> {
    let (sweep, own) = (threshold_sweep::sweep(run), run.results.thresholds.magnitude);
    let line = |label: &str, mark: Mark, of: fn(&SweepPoint) -> usize, from: f32| {
        let known = sweep.iter().filter(|point| point.magnitude >= from);
        let points =
            known.map(|point| Point { x: f64::from(point.magnitude), y: of(point) as f64, ..Point::default() });
        Group { name: label.to_owned(), mark, joined: true, points: points.collect() }
    };
    let groups = [
        line("anywhere", mark(Colour::First, true, true), |point| point.anywhere, 0.0),
        line("in enough layers", mark(Colour::Second, false, true), |point| point.in_layers, 0.0),
        line("and systematic", mark(Colour::Third, true, false), |point| point.systematic, own),
    ];
    let description = "Features whose largest magnitude reaches a threshold: anywhere; in the share of layers that the run asks for; and those of \
        the latter that are systematic at the run's own threshold, above which no others can be.";
    points(
        name,
        title,
        description,
        [Axis { label: "threshold of |x|", kind: AxisKind::Log }, Axis { label: "features", kind: AxisKind::Linear }],
        &groups,
    )
}

fn massive(name: &str, title: &str, results: &Results) -> Option<Plot> {
    let massive = results.massive_activations.as_ref()?;
    let top =
        |rank: usize| massive.layers.iter().filter_map(move |l| Some((l.layer, *l.mean_top_magnitudes.get(rank)?)));
    let groups = [
        curve("largest |x|", mark(Colour::First, true, true), top(0)),
        curve("second", mark(Colour::Second, false, true), top(1)),
        curve("third", mark(Colour::Fourth, true, false), top(2)),
        curve("median |x|", mark(Colour::Third, false, false), massive.layers.iter().map(|l| (l.layer, l.mean_median))),
    ];
    let description = "Largest, second, third largest and median magnitude of a sequence's residual stream after each layer, mean over sequences \
        (Sun et al. 2024, section 2).";
    points(name, title, description, [LAYER, Axis { label: "|x|", kind: AxisKind::Log }], &groups)
}

fn experts(name: &str, title: &str, run: &Run) -> Option<Plot> {
    let peaks = &run.statistics.as_ref()?.expert_peaks;
    let ranked: BTreeMap<usize, Vec<f64>> = peaks
        .iter()
        .map(|(layer, peaks)| {
            // 0 without a token.
            let hit = peaks.iter().filter(|peak| **peak != 0.0);
            let mut magnitudes: Vec<f64> = hit.map(|peak| f64::from(peak.abs())).collect();
            magnitudes.sort_by(|a, b| b.total_cmp(a));
            (*layer, magnitudes)
        })
        .collect();
    let rank = |rank: usize| ranked.iter().filter_map(move |(layer, peaks)| Some((*layer, *peaks.get(rank)?)));
    let median = ranked.iter().filter_map(|(layer, peaks)| Some((*layer, median(peaks)?)));
    let groups = [
        curve("largest |x| of an expert", mark(Colour::First, true, true), rank(0)),
        curve("second", mark(Colour::Second, false, true), rank(1)),
        curve("median expert", mark(Colour::Third, true, false), median),
    ];
    let description = "Largest magnitude at the output of an expert's down projection, before its weight: the expert with the largest, the next, and \
        the median of each layer, of the experts with a token. A super expert stands far above the rest (Su et al. 2025).";
    points(name, title, description, [LAYER, Axis { label: "|x|", kind: AxisKind::Log }], &groups)
}

fn routers(name: &str, title: &str, run: &Run) -> Option<Plot> {
    let loads = &run.statistics.as_ref()?.router_tokens;
    let relative = |of: fn(&[f64]) -> Option<f64>| {
        loads.iter().filter_map(move |(layer, loads)| {
            let mut sorted: Vec<f64> = loads.iter().map(|tokens| *tokens as f64).collect();
            sorted.sort_by(f64::total_cmp);
            let mean = mean(sorted.iter().copied()).filter(|mean| *mean > 0.0)?;
            Some((*layer, of(&sorted)? / mean))
        })
    };
    let groups = [
        curve("busiest", mark(Colour::First, true, true), relative(|loads| loads.last().copied())),
        curve("median", mark(Colour::Third, true, false), relative(median)),
        curve("idlest", mark(Colour::Second, false, true), relative(|loads| loads.first().copied())),
    ];
    let description = "Tokens sent to the busiest, the median and the idlest expert of each layer, over the mean of its experts: 1 is even.";
    points(name, title, description, [LAYER, Axis { label: "tokens / mean", kind: AxisKind::Linear }], &groups)
}

/// The median of sorted values: of an even number, the mean of the middle two. `None` for none.
fn median(sorted: &[f64]) -> Option<f64> {
    let (low, high) = (sorted.len().checked_sub(1)? / 2, sorted.len() / 2);
    Some(f64::midpoint(sorted[low], sorted[high]))
}

/// Quartiles of a feature's signed peaks over the norm outputs with outliers. `None` if it has
/// none.
pub(crate) fn peak_quartiles(statistics: &Statistics, feature: usize) -> Option<[f64; 3]> {
    quartiles(peaks(statistics, feature))
}

/// A feature's peak at each norm output with outliers.
pub(super) fn peaks(statistics: &Statistics, feature: usize) -> Vec<f64> {
    let sites = 0..statistics.count.rows().len();
    let with_outliers = sites.filter(|site| statistics.count.at(*site, feature) > 0);
    with_outliers.map(|site| f64::from(statistics.peak(site, feature))).collect()
}

/// Each quartile is one of the values: a mean of values of opposite sign may be misleading.
pub(crate) fn quartiles(mut values: Vec<f64>) -> Option<[f64; 3]> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    Some([0.25, 0.5, 0.75].map(|share| values[(share * last as f64).round() as usize]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_an_even_number_is_between_the_middle_two() {
        assert_eq!((median(&[]), median(&[3.0])), (None, Some(3.0)));
        assert_eq!((median(&[1.0, 2.0, 9.0]), median(&[0.0, 1.0, 4.0, 9.0])), (Some(2.0), Some(2.5)));
    }

    #[test]
    fn experts_without_a_token_are_left_out_of_their_median() {
        let mut run = Run::fixture("mixture");
        let mut plot = |peaks: &[f32]| {
            run.statistics.as_mut().unwrap().expert_peaks = BTreeMap::from([(1, peaks.to_vec())]);
            experts("n", "t", &run).unwrap()
        };
        assert_eq!(plot(&[0.0, -4.0, 0.0, 2.0, 0.0]), plot(&[-4.0, 2.0]));
        assert_ne!(plot(&[-4.0, 2.0, 1.0]), plot(&[-4.0, 2.0]), "else this shows nothing");
    }
}
