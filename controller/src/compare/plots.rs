//! Which plots a comparison has: across models, the paper's figures 3 and 4; of one model, its layers, features, experts.

use std::collections::BTreeMap;

use outliers_protocol::{Axis as Spread, Feature, Point as Place, Reading, Results};

use super::Comparison;
use super::comparison::Compared;
use super::folder::{Run, layers};
use super::ladder::{self, Rung};
use super::plot::{Axis, Colour, Group, Kind, Mark, Plot, Point, heat, points};
use super::published::{Row, Table};
use super::statistics::Statistics;
use super::tally::mean;

/// Features in a heat map.
const FEATURES: usize = 24;

const fn mark(colour: Colour, round: bool, filled: bool) -> Mark {
    Mark { colour, round, filled }
}

// ---------------------------------------------------------------------------------------------------- across models

/// What models are laid out by.
struct By {
    name: &'static str,
    words: &'static str,
    axis: Axis,
    ours: fn(&Compared) -> Option<f64>,
    theirs: fn(&Row) -> Option<f64>,
}

const BY: [By; 4] = [
    By {
        name: "parameters",
        words: "total parameters",
        axis: Axis { label: "parameters", kind: Kind::Log },
        ours: |model| Some(model.parameters? as f64),
        theirs: |row| Some(row.parameters as f64),
    },
    By {
        name: "active",
        words: "active parameters",
        axis: Axis { label: "active parameters per token", kind: Kind::Log },
        ours: |model| Some(model.active_parameters? as f64),
        theirs: |row| Some(row.active.unwrap_or(row.parameters) as f64),
    },
    By {
        name: "sparsity",
        words: "sparsity",
        axis: Axis { label: "% of parameters not active", kind: Kind::Percent },
        ours: |model| Some(100.0 * (1.0 - model.active_share()?)),
        // Dense models all stand at 0: nothing to see among published ones.
        theirs: |row| Some(100.0 * (1.0 - row.active? as f64 / row.parameters as f64)),
    },
    By {
        name: "perplexity",
        words: "perplexity",
        axis: Axis { label: "perplexity", kind: Kind::Log },
        ours: |model| Some(model.perplexity?.value),
        theirs: |row| row.perplexity,
    },
];

/// A definition of the count, and the table that holds to it.
struct Under<'a> {
    name: &'static str,
    words: &'static str,
    reading: Reading,
    spread: Spread,
    table: Option<&'a Table>,
    whose: &'static str,
}

/// The plots across models, those that have anything to show.
pub fn across(comparison: &Comparison) -> Vec<Plot> {
    let table = |name: &str| comparison.published.iter().find(|table| table.name == name);
    let paper = Under {
        name: "paper",
        words: "the paper's definition: unique features, by layers",
        reading: Reading::Unique,
        spread: Spread::Layers,
        table: table("paper"),
        whose: "the paper",
    };
    let predecessor = Under {
        name: "predecessor",
        words: "the predecessor's definition: sum over sequences, by norm outputs",
        reading: Reading::SumOverSequences,
        spread: Spread::Sites,
        table: table("predecessor"),
        whose: "the predecessor",
    };
    let mut plots = Vec::new();
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
    plots
}

const NUMBERS: &str = "Numbers are models, letters rows of the published table. Bars: 95 % intervals over sequences, where there are any.";

/// The models that a plot cannot show: a point that is missing is never missing in silence.
fn missing(comparison: &Comparison, groups: &[Group]) -> String {
    let shown = |model: &&Compared| {
        groups.iter().flat_map(|group| &group.points).any(|point| point.key == model.number.to_string())
    };
    let numbers: Vec<String> =
        comparison.models.iter().filter(|model| !shown(model)).map(|model| model.number.to_string()).collect();
    if numbers.is_empty() { String::new() } else { format!(" Not shown, for want of a value: {}.", numbers.join(", ")) }
}

/// L% and S%: figures 3a and 3b.
fn affected(comparison: &Comparison, under: &Under<'_>, by: &By) -> Option<Plot> {
    let ours =
        |of: fn(&super::comparison::Figure) -> Option<super::tally::Estimate>| own_points(comparison, under, by, of);
    let theirs = |of: fn(&Row) -> f64| published_points(under, by, move |row| Some(of(row)));
    let groups = [
        group("L% here", mark(Colour::First, true, true), ours(|figure| figure.layers)),
        group("S% here", mark(Colour::Second, false, true), ours(|figure| figure.positions)),
        group(&format!("L% of {}", under.whose), mark(Colour::First, true, false), theirs(|row| row.layers)),
        group(&format!("S% of {}", under.whose), mark(Colour::Second, false, false), theirs(|row| row.positions)),
    ];
    let figure = match (under.name, by.name) {
        ("paper", "parameters") => "; the paper's figure 3a",
        ("paper", "perplexity") => "; the paper's figure 3b",
        _ => "",
    };
    points(
        &format!("affected-{}-{}", by.name, under.name),
        &format!("Layers and positions affected, by {}{figure}", by.words),
        &format!(
            "Mean percentage of layers (L%) and of sequence positions (S%) in which systematic outlier features occur, by {}, under {}. {NUMBERS}{}",
            by.words,
            under.words,
            missing(comparison, &groups)
        ),
        [by.axis, Axis { label: "% affected", kind: Kind::Percent }],
        &groups,
    )
}

/// The count: figure 4b.
fn counted(comparison: &Comparison, under: &Under<'_>, by: &By) -> Option<Plot> {
    let kind = if under.reading == Reading::Unique { Kind::Linear } else { Kind::Count };
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
    let figure = if (under.name, by.name) == ("paper", "perplexity") { "; the paper's figure 4b" } else { "" };
    points(
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
    )
}

/// How large the largest outlier feature is: figure 4a.
fn magnitude(comparison: &Comparison, under: &Under<'_>, by: &By) -> Option<Plot> {
    let ours = comparison.models.iter().filter_map(|model| {
        let (x, y) = ((by.ours)(model)?, typical_peak(model.run.as_deref()?)?);
        Some(Point { x, y, interval: None, key: model.number.to_string() })
    });
    let theirs = published_points(under, by, |row| Some(row.quartiles?[1].abs()));
    let groups = [
        group("here: median of its peaks", mark(Colour::Fourth, false, true), ours.collect()),
        group("the paper: median of its values", mark(Colour::Fourth, false, false), theirs),
    ];
    points(
        &format!("magnitude-{}", by.name),
        &format!("Magnitude of the most common outlier feature, by {}; the paper's figure 4a", by.words),
        &format!(
            "Magnitude of the most common systematic outlier feature, by {}. The two are not the same statistic: the paper takes the median of all its \
             outlier values; here it is the median, over the norm outputs where it has any, of the largest value at each, which is larger. {NUMBERS}{}",
            by.words,
            missing(comparison, &groups)
        ),
        [by.axis, Axis { label: "magnitude", kind: Kind::Linear }],
        &groups,
    )
}

fn group(name: &str, mark: Mark, points: Vec<Point>) -> Group {
    Group { name: name.to_owned(), mark, joined: false, points }
}

fn own_points(
    comparison: &Comparison,
    under: &Under<'_>,
    by: &By,
    of: impl Fn(&super::comparison::Figure) -> Option<super::tally::Estimate>,
) -> Vec<Point> {
    let point = |model: &Compared| {
        let estimate = of(comparison.own(model, under.reading, under.spread)?)?;
        let key = model.number.to_string();
        Some(Point { x: (by.ours)(model)?, y: estimate.value, interval: estimate.interval, key })
    };
    comparison.models.iter().filter_map(point).collect()
}

fn published_points(under: &Under<'_>, by: &By, of: impl Fn(&Row) -> Option<f64>) -> Vec<Point> {
    let rows = under.table.iter().flat_map(|table| &table.models).enumerate();
    rows.filter_map(|(i, row)| Some(Point { x: (by.theirs)(row)?, y: of(row)?, interval: None, key: letter(i) }))
        .collect()
}

/// A row of a published table in a plot: a, b, c, ...
pub fn letter(row: usize) -> String {
    char::from_u32('a' as u32 + row as u32 % 26).map(String::from).unwrap_or_default()
}

/// The systematic feature with the most outlier values: the median, over the norm outputs where it has any, of its largest magnitude at each.
fn typical_peak(run: &Run) -> Option<f64> {
    let systematic = run.results.features.iter().filter(|feature| feature.systematic_by_layers);
    let most_common = systematic.max_by_key(|feature| feature.occurrences)?;
    let magnitudes = peaks(run.statistics.as_ref()?, most_common.dim).into_iter().map(f64::abs).collect();
    quartiles(magnitudes).map(|[_, median, _]| median)
}

/// Quartiles, over the norm outputs where a feature has outliers, of its value of largest magnitude at each; signed. `None` if it has none.
pub fn peak_quartiles(statistics: &Statistics, feature: usize) -> Option<[f64; 3]> {
    quartiles(peaks(statistics, feature))
}

/// A feature's value of largest magnitude at each norm output where it has outliers.
fn peaks(statistics: &Statistics, feature: usize) -> Vec<f64> {
    let sites = 0..statistics.count.rows().len();
    let with_outliers = sites.filter(|site| statistics.count.at(*site, feature) > 0);
    with_outliers.map(|site| f64::from(statistics.peak(site, feature))).collect()
}

/// Each one of the values: between two of opposite sign there may be none.
fn quartiles(mut values: Vec<f64>) -> Option<[f64; 3]> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    Some([0.25, 0.5, 0.75].map(|share| values[(share * last as f64).round() as usize]))
}

// ------------------------------------------------------------------------------------------------------ of one model

const LAYER: Axis = Axis { label: "layer", kind: Kind::Index };

/// The plots of one model; empty without a run.
pub fn of_model(model: &Compared) -> Vec<Plot> {
    let Some(run) = model.run.as_deref() else { return Vec::new() };
    let number = model.number;
    let named = |what: &str| format!("model{number}-{what}");
    let titled = |what: &str| format!("{what}, model {number}");
    let results = &run.results;
    let all = [
        magnitudes(&named("magnitudes"), &titled("Magnitudes by layer"), results),
        features(&named("features"), &titled("Outlier features by layer"), run),
        rungs(&named("ladder"), &titled("Features by threshold"), run),
        massive(&named("massive"), &titled("Residual stream: the largest values by layer"), results),
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
        curve("largest, attention's norm", mark(Colour::First, true, true), norms(attention.0, attention.1, largest)),
        curve("largest, MLP's norm", mark(Colour::Second, false, true), norms(mlp.0, mlp.1, largest)),
        curve("99.9 %, attention's norm", mark(Colour::First, true, false), norms(attention.0, attention.1, high)),
        curve("99.9 %, MLP's norm", mark(Colour::Second, false, false), norms(mlp.0, mlp.1, high)),
    ];
    let description = "The largest magnitude at each norm output, and the magnitude that 99.9 % of its values do not exceed, by layer.";
    points(name, title, description, [LAYER, Axis { label: "|x|", kind: Kind::Log }], &groups)
}

/// Features in the order of tables and heat maps: systematic ones first, by magnitude.
pub fn strongest(results: &Results) -> Vec<&Feature> {
    let mut features: Vec<&Feature> = results.features.iter().collect();
    features.sort_by(|a, b| {
        let rank = |f: &Feature| (f.systematic_by_layers, f.systematic_by_sites);
        rank(b).cmp(&rank(a)).then(b.max_abs.total_cmp(&a.max_abs))
    });
    features
}

fn features(name: &str, title: &str, run: &Run) -> Option<Plot> {
    let (results, statistics) = (&run.results, run.statistics.as_ref()?);
    let threshold = f64::from(results.thresholds.magnitude);
    let largest = f64::from(results.max_abs).max(threshold * 2.0);
    let scale = Heat { threshold, largest };
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
    heat(name, title, &description, ["layer", "feature"], &scale.words(), &rows)
}

/// Steps from the threshold to the largest magnitude, each the same factor; below the threshold: step 0.
struct Heat {
    threshold: f64,
    largest: f64,
}

impl Heat {
    const ABOVE: u8 = Colour::STEPS - 1;

    fn factor(&self) -> f64 {
        (self.largest / self.threshold).powf(1.0 / f64::from(Self::ABOVE))
    }

    fn step(&self, magnitude: f64) -> u8 {
        if magnitude < self.threshold {
            return 0;
        }
        let steps = (magnitude / self.threshold).ln() / self.factor().ln();
        1 + (steps.floor() as u8).min(Self::ABOVE - 1)
    }

    /// From where each step goes.
    fn words(&self) -> Vec<String> {
        let from = |step: i32| self.threshold * self.factor().powi(step);
        let above = (0..i32::from(Self::ABOVE)).map(|step| format!(">= {}", super::sheet::short(from(step))));
        std::iter::once(format!("< {}", super::sheet::short(self.threshold))).chain(above).collect()
    }
}

fn rungs(name: &str, title: &str, run: &Run) -> Option<Plot> {
    let (rungs, own) = (ladder::rungs(run), run.results.thresholds.magnitude);
    let line = |label: &str, mark: Mark, of: fn(&Rung) -> usize, from: f32| {
        let known = rungs.iter().filter(|rung| rung.magnitude >= from);
        let points = known.map(|rung| Point { x: f64::from(rung.magnitude), y: of(rung) as f64, ..Point::default() });
        Group { name: label.to_owned(), mark, joined: true, points: points.collect() }
    };
    let groups = [
        line("anywhere", mark(Colour::First, true, true), |rung| rung.anywhere, 0.0),
        line("in enough layers", mark(Colour::Second, false, true), |rung| rung.in_layers, 0.0),
        line("and systematic", mark(Colour::Third, true, false), |rung| rung.systematic, own),
    ];
    let description = "Features whose largest magnitude reaches a threshold: anywhere; in the share of layers that the run asks for; and those of \
        the latter that are systematic at the run's own threshold, above which no others can be.";
    points(
        name,
        title,
        description,
        [Axis { label: "threshold of |x|", kind: Kind::Log }, Axis { label: "features", kind: Kind::Linear }],
        &groups,
    )
}

fn massive(name: &str, title: &str, results: &Results) -> Option<Plot> {
    let massive = results.massive_activations.as_ref()?;
    let top =
        |rank: usize| massive.layers.iter().filter_map(move |l| Some((l.layer, *l.mean_top_magnitudes.get(rank)?)));
    let groups = [
        curve("largest", mark(Colour::First, true, true), top(0)),
        curve("second", mark(Colour::Second, false, true), top(1)),
        curve("third", mark(Colour::Fourth, true, false), top(2)),
        curve("median", mark(Colour::Third, false, false), massive.layers.iter().map(|l| (l.layer, l.mean_median))),
    ];
    let description = "Largest, second, third largest and median magnitude of a sequence's residual stream after each layer, mean over sequences \
        (Sun et al. 2024, section 2).";
    points(name, title, description, [LAYER, Axis { label: "|x|", kind: Kind::Log }], &groups)
}

fn experts(name: &str, title: &str, run: &Run) -> Option<Plot> {
    let peaks = &run.statistics.as_ref()?.expert_peaks;
    let ranked: BTreeMap<usize, Vec<f64>> = peaks
        .iter()
        .map(|(layer, peaks)| {
            let mut magnitudes: Vec<f64> = peaks.iter().map(|peak| f64::from(peak.abs())).collect();
            magnitudes.sort_by(|a, b| b.total_cmp(a));
            (*layer, magnitudes)
        })
        .collect();
    let rank = |rank: usize| ranked.iter().filter_map(move |(layer, peaks)| Some((*layer, *peaks.get(rank)?)));
    let median = ranked.iter().filter_map(|(layer, peaks)| Some((*layer, *peaks.get(peaks.len() / 2)?)));
    let groups = [
        curve("largest expert", mark(Colour::First, true, true), rank(0)),
        curve("second", mark(Colour::Second, false, true), rank(1)),
        curve("median expert", mark(Colour::Third, true, false), median),
    ];
    let description = "Largest magnitude at the output of an expert's down projection, before its weight: the expert with the largest, the next, and \
        the median expert of each layer. A super expert stands far above the rest (Su et al. 2025).";
    points(name, title, description, [LAYER, Axis { label: "|x|", kind: Kind::Log }], &groups)
}

fn routers(name: &str, title: &str, run: &Run) -> Option<Plot> {
    let loads = &run.statistics.as_ref()?.router_tokens;
    let relative = |of: fn(&[u64]) -> u64| {
        loads.iter().filter_map(move |(layer, loads)| {
            let mut sorted = loads.clone();
            sorted.sort_unstable();
            let mean = mean(loads.iter().map(|tokens| *tokens as f64))?;
            (mean > 0.0).then(|| (*layer, of(&sorted) as f64 / mean))
        })
    };
    let groups = [
        curve("busiest", mark(Colour::First, true, true), relative(|loads| loads[loads.len() - 1])),
        curve("median", mark(Colour::Third, true, false), relative(|loads| loads[loads.len() / 2])),
        curve("idlest", mark(Colour::Second, false, true), relative(|loads| loads[0])),
    ];
    let description = "Tokens sent to the busiest, the median and the idlest expert of each layer, over the mean of its experts: 1 is even.";
    points(name, title, description, [LAYER, Axis { label: "tokens / mean", kind: Kind::Linear }], &groups)
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
    fn every_plot_that_has_something_to_show_is_there_once() {
        let compared = compared();
        let names: Vec<String> = across(&compared).into_iter().map(|plot| plot.name).collect();
        assert_eq!(names.len(), 18, "{names:?}");
        assert_eq!(names.iter().collect::<std::collections::BTreeSet<_>>().len(), 18, "{names:?}");
        let of = |i: usize| of_model(&compared.models[i]).into_iter().map(|plot| plot.name).collect::<Vec<_>>();
        let what = ["magnitudes", "features", "ladder", "massive", "experts", "routers"];
        assert_eq!(of(0), what.map(|what| format!("model1-{what}")));
        assert_eq!(of(1), ["magnitudes", "features", "ladder"].map(|what| format!("model2-{what}")));
    }

    #[test]
    fn points_are_the_figures() {
        let compared = compared();
        let plots = across(&compared);
        let plot = plots.iter().find(|plot| plot.name == "affected-parameters-predecessor").unwrap();
        // Two models and twelve published rows, L% and S%; two legends each.
        assert_eq!(plot.svg.matches("<circle").count(), 2 + 12 + 2);
        assert!(
            plot.svg.contains(">\nl\n<") && plot.svg.contains(">\n2\n<"),
            "keys of the last row and the last model"
        );
    }

    #[test]
    fn heat_goes_from_the_threshold_to_the_largest_in_even_factors() {
        let heat = Heat { threshold: 6.0, largest: 768.0 };
        assert_eq!([5.99, 6.0, 11.9, 12.1, 768.0, 1e9].map(|x| heat.step(x)), [0, 1, 1, 2, 7, 7]);
        assert_eq!(heat.words().len(), usize::from(Colour::STEPS));
        assert_eq!(&heat.words()[..3], ["< 6", ">= 6", ">= 12"]);
    }

    #[test]
    fn quartiles_are_of_the_norm_outputs_with_outliers() {
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
