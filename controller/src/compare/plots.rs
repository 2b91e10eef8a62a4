//! The plots of a comparison: across models, the paper's figures 3 and 4; for one model
//! ([`of_model`]), its layers, features and experts.

use outliers_protocol::{Axis as Spread, Reading};

use super::Comparison;
use super::comparison::Compared;
use super::folder::Run;
use super::plot::{Axis, AxisKind, Colour, Group, Mark, Plot, Point, points};
use super::published::{PublishedRow, PublishedTable};

mod cost;
mod heatmap;
mod model;
mod residual;
mod trajectory;

pub(crate) use model::{of_model, peak_quartiles, quartiles};

const fn mark(colour: Colour, round: bool, filled: bool) -> Mark {
    Mark { colour, round, filled }
}

/// Horizontal axis of models.
struct ModelAxis {
    name: &'static str,
    words: &'static str,
    axis: Axis,
    ours: fn(&Compared) -> Option<f64>,
    theirs: fn(&PublishedRow) -> Option<f64>,
}

const BY: [ModelAxis; 4] = [
    ModelAxis {
        name: "parameters",
        words: "total parameters",
        axis: Axis { label: "parameters", kind: AxisKind::Log },
        ours: |model| Some(model.parameters? as f64),
        theirs: |row| Some(row.parameters as f64),
    },
    ModelAxis {
        name: "active",
        words: "active parameters",
        axis: Axis { label: "active parameters per token", kind: AxisKind::Log },
        ours: |model| Some(model.active_parameters? as f64),
        theirs: |row| Some(row.active.unwrap_or(row.parameters) as f64),
    },
    ModelAxis {
        name: "sparsity",
        words: "sparsity",
        axis: Axis { label: "% of parameters not active", kind: AxisKind::Percent },
        ours: |model| Some(100.0 * (1.0 - model.active_share()?)),
        // Dense models are all at 0, so published ones are left out.
        theirs: |row| Some(100.0 * (1.0 - row.active? as f64 / row.parameters as f64)),
    },
    ModelAxis {
        name: "perplexity",
        words: "perplexity",
        axis: Axis { label: "perplexity", kind: AxisKind::Log },
        ours: |model| Some(model.perplexity?.value),
        theirs: |row| row.perplexity,
    },
];

/// A definition of the count, with the published table that uses it.
struct CountDefinition<'a> {
    name: &'static str,
    words: &'static str,
    reading: Reading,
    spread: Spread,
    table: Option<&'a PublishedTable>,
    whose: &'static str,
}

/// The plots across models that have points.
pub(crate) fn across(comparison: &Comparison) -> Vec<Plot> {
    let table = |name: &str| comparison.published.iter().find(|table| table.name == name);
    let paper = CountDefinition {
        name: "paper",
        words: "the paper's definition: unique features, by layers",
        reading: Reading::Unique,
        spread: Spread::Layers,
        table: table("paper"),
        whose: "the paper",
    };
    let predecessor = CountDefinition {
        name: "predecessor",
        words: "the predecessor's definition: sum over sequences, by norm outputs",
        reading: Reading::SumOverSequences,
        spread: Spread::Sites,
        table: table("predecessor"),
        whose: "the predecessor",
    };
    let mut plots = Vec::new();
    plots.extend(cost::across(comparison));
    for by in &BY {
        plots.extend(affected(comparison, &paper, by));
    }
    for by in &BY {
        plots.extend(counted(comparison, &paper, by));
    }
    for by in [&BY[0], &BY[3]] {
        plots.extend(magnitude(comparison, &paper, by));
    }
    for by in &BY {
        plots.extend(affected(comparison, &predecessor, by));
        plots.extend(counted(comparison, &predecessor, by));
    }
    plots.extend(trajectory::trajectories(comparison));
    plots
}

const NUMBERS: &str = "Numbers are models, letters rows of the published table. Bars: 95 % intervals over sequences, where there are any.";

/// Lists the models that a plot cannot show.
fn missing(comparison: &Comparison, groups: &[Group]) -> String {
    let numbers = comparison.models.iter().map(|model| model.number.to_string());
    let numbers: Vec<String> = numbers.filter(|number| !is_shown(number, groups)).collect();
    if numbers.is_empty() { String::new() } else { format!(" Not shown, for want of a value: {}.", numbers.join(", ")) }
}

fn is_shown(key: &str, groups: &[Group]) -> bool {
    groups.iter().flat_map(|group| &group.points).any(|point| point.key == key)
}

/// L% and S%: figures 3a and 3b.
fn affected(comparison: &Comparison, under: &CountDefinition<'_>, by: &ModelAxis) -> Option<Plot> {
    let ours = |of: fn(&super::comparison::Figure) -> Option<super::bootstrap::Estimate>| {
        own_points(comparison, under, by, of)
    };
    let theirs = |of: fn(&PublishedRow) -> f64| published_points(under, by, move |row| Some(of(row)));
    let groups = [
        group("L% here", mark(Colour::First, true, true), ours(|figure| figure.layers)),
        group("S% here", mark(Colour::Second, false, true), ours(|figure| figure.positions)),
        group(&format!("L% of {}", under.whose), mark(Colour::First, true, false), theirs(|row| row.layers)),
        group(&format!("S% of {}", under.whose), mark(Colour::Second, false, false), theirs(|row| row.positions)),
    ];
    let figure = match (under.name, by.name) {
        ("paper", "parameters") => "; the paper's figure 3a",
        ("paper", "perplexity") => "; the paper's figure 3b",
        ("predecessor", _) => ", as the predecessor counts",
        _ => "",
    };
    let plot = points(
        &format!("affected-{}-{}", by.name, under.name),
        &format!("Layers and positions affected, by {}{figure}", by.words),
        &format!(
            "Mean percentage of layers (L%) and of sequence positions (S%) in which systematic outlier features occur, by {}, under {}. {NUMBERS}{}",
            by.words,
            under.words,
            missing(comparison, &groups)
        ),
        [by.axis, Axis { label: "% affected", kind: AxisKind::Percent }],
        &groups,
    )?;
    Some(plot.keyed(&names(comparison, under, &groups)))
}

/// The count: figure 4b.
fn counted(comparison: &Comparison, under: &CountDefinition<'_>, by: &ModelAxis) -> Option<Plot> {
    let kind = if under.reading == Reading::Unique { AxisKind::Linear } else { AxisKind::Count };
    let groups = [
        group(
            "counted here",
            mark(Colour::Third, true, true),
            own_points(comparison, under, by, |figure| Some(figure.count)),
        ),
        group(
            &format!("published by {}", under.whose),
            mark(Colour::Third, true, false),
            published_points(under, by, |row| Some(row.count)),
        ),
    ];
    let figure = match (under.name, by.name) {
        ("paper", "perplexity") => "; the paper's figure 4b",
        ("predecessor", _) => ", as the predecessor counts",
        _ => "",
    };
    let plot = points(
        &format!("count-{}-{}", by.name, under.name),
        &format!("Outlier features counted, by {}{figure}", by.words),
        &format!(
            "Number of systematic outlier features by {}, under {}. {NUMBERS}{}",
            by.words,
            under.words,
            missing(comparison, &groups)
        ),
        [by.axis, Axis { label: "features", kind }],
        &groups,
    )?;
    Some(plot.keyed(&names(comparison, under, &groups)))
}

/// Magnitude of the largest outlier feature: figure 4a.
fn magnitude(comparison: &Comparison, under: &CountDefinition<'_>, by: &ModelAxis) -> Option<Plot> {
    let ours = comparison.models.iter().filter_map(|model| {
        let (x, y) = ((by.ours)(model)?, typical_peak(model.run.as_deref()?)?);
        Some(Point { x, y, interval: None, key: model.number.to_string() })
    });
    let theirs = published_points(under, by, |row| Some(row.quartiles?[1].abs()));
    let groups = [
        group("here: median |x| of its peaks", mark(Colour::Fourth, false, true), ours.collect()),
        group("the paper: median |x| of its values", mark(Colour::Fourth, false, false), theirs),
    ];
    let plot = points(
        &format!("magnitude-{}", by.name),
        &format!("Magnitude of the most common outlier feature, by {}; the paper's figure 4a", by.words),
        &format!(
            "Magnitude of the most common systematic outlier feature, by {}. The two are not the same statistic: the paper takes the median of all its \
             outlier values; here it is the median, over the norm outputs where it has any, of the largest value at each, which is larger. {NUMBERS}{}",
            by.words,
            missing(comparison, &groups)
        ),
        [by.axis, Axis { label: "|x|", kind: AxisKind::Linear }],
        &groups,
    )?;
    Some(plot.keyed(&names(comparison, under, &groups)))
}

/// Names of the keys of these points, models first.
fn names(comparison: &Comparison, under: &CountDefinition<'_>, groups: &[Group]) -> Vec<(String, String)> {
    let short = |name: &str| name.rsplit('/').next().unwrap_or(name).to_owned();
    let models = comparison.models.iter().map(|model| (model.number.to_string(), short(&model.label)));
    let rows = under.table.iter().flat_map(|table| &table.models).enumerate();
    let rows = rows.map(|(i, row)| (letter(i), short(&row.name)));
    models.chain(rows).filter(|(key, _)| is_shown(key, groups)).collect()
}

fn group(name: &str, mark: Mark, points: Vec<Point>) -> Group {
    Group { name: name.to_owned(), mark, joined: false, points }
}

fn own_points(
    comparison: &Comparison,
    under: &CountDefinition<'_>,
    by: &ModelAxis,
    of: impl Fn(&super::comparison::Figure) -> Option<super::bootstrap::Estimate>,
) -> Vec<Point> {
    let point = |model: &Compared| {
        let estimate = of(comparison.own(model, under.reading, under.spread)?)?;
        let key = model.number.to_string();
        Some(Point { x: (by.ours)(model)?, y: estimate.value, interval: estimate.interval, key })
    };
    comparison.models.iter().filter_map(point).collect()
}

fn published_points(
    under: &CountDefinition<'_>,
    by: &ModelAxis,
    of: impl Fn(&PublishedRow) -> Option<f64>,
) -> Vec<Point> {
    let rows = under.table.iter().flat_map(|table| &table.models).enumerate();
    rows.filter_map(|(i, row)| Some(Point { x: (by.theirs)(row)?, y: of(row)?, interval: None, key: letter(i) }))
        .collect()
}

/// The letter of a row of a published table: a, b, c, ...
pub(crate) fn letter(row: usize) -> String {
    char::from_u32('a' as u32 + row as u32 % 26).map(String::from).unwrap_or_default()
}

/// Of the systematic feature with the most outliers: the median of its largest magnitudes at norm
/// outputs with outliers.
fn typical_peak(run: &Run) -> Option<f64> {
    let systematic = run.results.features.iter().filter(|feature| feature.systematic_by_layers);
    let most_common = systematic.max_by_key(|feature| feature.occurrences)?;
    let magnitudes = model::peaks(run.statistics.as_ref()?, most_common.dim).into_iter().map(f64::abs).collect();
    quartiles(magnitudes).map(|[_, median, _]| median)
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{copy, rename};
    use super::super::folder::read_all;
    use super::*;

    fn compared() -> Comparison {
        let home = tempfile::tempdir().unwrap();
        rename(&copy("mixture", &home.path().join("a")), "allenai/OLMoE-1B-7B-0125");
        copy("dense", &home.path().join("b"));
        Comparison::of(read_all(&[home.path().to_owned()], false).unwrap())
    }

    #[test]
    fn each_plot_with_data_appears_once() {
        let compared = compared();
        let names: Vec<String> = across(&compared).into_iter().map(|plot| plot.name).collect();
        assert_eq!(names.len(), 18, "{names:?}");
        let titles: std::collections::BTreeSet<String> = across(&compared).into_iter().map(|plot| plot.title).collect();
        assert_eq!(
            (names.iter().collect::<std::collections::BTreeSet<_>>().len(), titles.len()),
            (18, 18),
            "{names:?}"
        );
        let of = |i: usize| of_model(&compared.models[i]).into_iter().map(|plot| plot.name).collect::<Vec<_>>();
        let what = ["magnitudes", "features", "ladder", "massive", "experts", "routers"];
        assert_eq!(of(0), what.map(|what| format!("model1-{what}")));
        assert_eq!(of(1), ["magnitudes", "features", "ladder"].map(|what| format!("model2-{what}")));
    }

    #[test]
    fn plotted_points_equal_the_figures() {
        let compared = compared();
        let plots = across(&compared);
        let plot = plots.iter().find(|plot| plot.name == "affected-parameters-predecessor").unwrap();
        // Two models and twelve published rows, L% and S%, and two legends each.
        assert_eq!(plot.svg.matches("<circle").count(), 2 + 12 + 2);
        assert!(
            plot.svg.contains(">\nl\n<") && plot.svg.contains(">\n2\n<"),
            "keys of the last row and the last model"
        );
    }

    #[test]
    fn equal_results_share_a_key_and_are_named_below() {
        let home = tempfile::tempdir().unwrap();
        for name in ["one", "two", "three", "a-name-that-is-too-long-for-half-a-line"] {
            rename(&copy("dense", &home.path().join(name)), &format!("somebody/{name}"));
        }
        let compared = Comparison::of(read_all(&[home.path().to_owned()], false).unwrap());
        let plots = across(&compared);
        let plot = plots.iter().find(|plot| plot.name == "affected-parameters-paper").unwrap();
        assert_eq!(plot.svg.matches(">\n1-4\n<").count(), 2, "one key for L%, one for S%: {}", plot.svg);
        assert!(plot.svg.contains("a-name-that-is-too-long-for-half-a-line") && plot.svg.contains(" three<"));
    }

    #[test]
    fn quartiles_cover_the_norm_outputs_with_outliers() {
        let compared = compared();
        let run = compared.models[0].run.as_ref().unwrap();
        let statistics = run.statistics.as_ref().unwrap();
        for feature in &run.results.features {
            let [low, median, high] = peak_quartiles(statistics, feature.dim).unwrap();
            assert!(low <= median && median <= high);
            assert!(low.abs().max(high.abs()) <= f64::from(feature.max_abs));
        }
        let quiet = (0..run.results.hidden).find(|dim| run.results.features.iter().all(|f| f.dim != *dim)).unwrap();
        assert_eq!(peak_quartiles(statistics, quiet), None);
        assert!(typical_peak(run).unwrap() >= 6.0);
    }
}
