//! Tables of one model, for the page: its features, thresholds, massive activations, experts and
//! routers.

use outliers_protocol::{
    AblationArm, ExpertPeak, Feature, FeaturePeak, IndexSet, MassiveActivations, Point, Results, RouterSummary, Sided,
    SuperExperts,
};

use super::folder::Run;
use super::measured;
use super::plots::{peak_quartiles, quartiles};
use super::published;
use super::table::{NONE, Table, numbers, optional, words};
use super::threshold_sweep::{LAYER_PERCENTS, POSITION_PERCENTS, SweepPoint, shares, sweep};
use crate::ui::report::diagnostics::{WITHOUT, without};
use crate::ui::report::tables::strongest;
use crate::units::in_percent;

/// Maximum rows of a long table; `results.json` contains all.
const ROWS: usize = 40;

/// Maximum locations listed per feature.
const PLACES: usize = 3;

/// The tables with content; `name` is their prefix.
pub(crate) fn tables(name: &str, run: &Run) -> Vec<Table> {
    let results = &run.results;
    let all = [
        features(run),
        threshold_sweep(run),
        Some(share_table(results)),
        results.massive_activations.as_ref().map(massive),
        results.super_experts.as_ref().map(|experts| super_experts(&results.model, experts)),
        (!results.routers.is_empty()).then(|| routers(&results.routers)),
        (!results.ablation.is_empty()).then(|| ablation(&results.ablation)),
    ];
    let all = measured::tables(results).into_iter().map(Some).chain(all);
    let named = |table: Table| Table { name: format!("{name}-{}", table.name), ..table };
    all.flatten().map(named).collect()
}

fn ablation(arms: &[AblationArm]) -> Table {
    let [perplexity, of_the_whole, probability, share] = WITHOUT.map(numbers);
    let features = |arm: &AblationArm| match &arm.features[..] {
        [] => NONE.to_owned(),
        features => features.iter().map(usize::to_string).collect::<Vec<_>>().join(", "),
    };
    let figure = |arm: &AblationArm, which: usize| without(arm, &arms[0])[which].clone();
    Table::of(
        ("ablation", "Without some features"),
        arms,
        &[
            (words("without"), &|arm| arm.removed.label().to_owned()),
            (words("features"), &features),
            (perplexity, &|arm| figure(arm, 0)),
            (of_the_whole, &|arm| figure(arm, 1)),
            (probability, &|arm| figure(arm, 2)),
            (share, &|arm| figure(arm, 3)),
        ],
    )
    .noted(
        "features set to 0 at every norm output that feeds attention or MLP (LLM.int8(), section 4.2); perplexity and the largest probability of \
         the next token with all that follows in later layers; the largest share that attention gives to one key, mean over queries, heads and \
         layers, with each layer's input that of the whole model but for the features",
    )
}

/// As many of them as a table shows.
fn top<T>(all: &[T]) -> &[T] {
    &all[..all.len().min(ROWS)]
}

fn first(what: &str, shown: usize, all: usize) -> String {
    if all > shown { format!("The first {shown} of {all} {what}; results.json has them all. ") } else { String::new() }
}

fn features(run: &Run) -> Option<Table> {
    let results = &run.results;
    let strongest = strongest(results);
    if strongest.is_empty() {
        return None;
    }
    let peaks = |feature: &&Feature| {
        let quartiles = match &run.statistics {
            Some(statistics) => peak_quartiles(statistics, feature.dim),
            None => quartiles(feature.peaks.iter().copied().map(f64::from).collect()),
        };
        optional(quartiles, |[a, b, c]| format!("{a:.1}, {b:.1}, {c:.1}"))
    };
    let at_peak = |feature: &&Feature, of: fn(&FeaturePeak) -> Option<f32>| {
        optional(feature.peak.as_ref().and_then(of), |value| format!("{value:.2}"))
    };
    let in_sequences = |feature: &&Feature| {
        format!("{}, {}", feature.sequences_systematic_by_layers, feature.sequences_systematic_by_sites)
    };
    let note = first("features", ROWS, strongest.len())
        + "L%, S%: share of layers and of positions with an outlier, over all sequences. In sequences: in how many it is systematic by \
           itself, by layers and by norm outputs. Quartiles of peaks: over the norm outputs where the feature has \
           outliers, of its largest value at each. Gain: of the norm where its value is largest; under RMSNorm a large value may be a large gain. \
           Where: layer, sequence:position and token id of its values among the 100 largest of their kind of norm output.";
    let table = Table::of(
        ("features", "Features with outliers"),
        top(&strongest),
        &[
            (numbers("feature"), &|feature| feature.dim.to_string()),
            (words("systematic by"), &|feature| systematic(feature).to_owned()),
            (numbers("L%"), &|feature| format!("{:.1}", 100.0 * feature.layer_fraction)),
            (numbers("S%"), &|feature| format!("{:.1}", 100.0 * feature.position_fraction)),
            (numbers("in sequences"), &in_sequences),
            (words("signs"), &|feature| signs(feature.sided).to_owned()),
            (numbers("min"), &|feature| format!("{:.2}", feature.min)),
            (numbers("max"), &|feature| format!("{:.2}", feature.max)),
            (numbers("quartiles of peaks"), &peaks),
            (numbers("gain"), &|feature| at_peak(feature, |peak| peak.gain)),
            (numbers("x / gain"), &|feature| at_peak(feature, |peak| peak.value_over_gain)),
            (words("layers, attention's norm"), &|feature| ranges(&feature.layers_before_attention)),
            (words("layers, MLP's norm"), &|feature| ranges(&feature.layers_before_mlp)),
            (words("where its largest values stand"), &|feature| places(results, feature.dim)),
        ],
    );
    Some(table.noted(note))
}

fn systematic(feature: &Feature) -> &'static str {
    match (feature.systematic_by_layers, feature.systematic_by_sites) {
        (true, true) => "both",
        (true, false) => "layers",
        (false, true) => "norm outputs",
        (false, false) => "neither",
    }
}

fn signs(sided: Sided) -> &'static str {
    match sided {
        Sided::Pos => "all +",
        Sided::Neg => "all -",
        Sided::Both => "both",
    }
}

fn ranges(layers: &[usize]) -> String {
    layers.iter().copied().collect::<IndexSet>().to_string()
}

fn places(results: &Results, feature: usize) -> String {
    let norms = results.top_records.iter().filter(|top| top.point.is_norm_output());
    let mut records: Vec<_> = norms.flat_map(|top| &top.records).filter(|record| record.dim == feature).collect();
    records.sort_by(|a, b| b.value.abs().total_cmp(&a.value.abs()));
    let words = records.iter().take(PLACES).map(|record| {
        let (layer, sequence, position) = (record.layer, record.sequence, record.position);
        format!("layer {layer}, {sequence}:{position}, token {}", record.token_id)
    });
    words.collect::<Vec<_>>().join("; ")
}

fn threshold_sweep(run: &Run) -> Option<Table> {
    let sweep = sweep(run);
    if sweep.is_empty() {
        return None;
    }
    let own = run.results.thresholds;
    let systematic = |point: &SweepPoint| {
        let known = (point.magnitude >= own.magnitude).then_some(point.systematic);
        optional(known, |n| n.to_string())
    };
    let note = format!(
        "Enough layers: >= {} %. Positions are counted at the run's own threshold of {} alone: above it the last column is the most that can be \
         systematic, below it nothing is known.",
        in_percent(own.layer_fraction),
        own.magnitude
    );
    let table = Table::of(
        ("ladder", "Threshold ladder: magnitude"),
        &sweep,
        &[
            (numbers("|x| >="), &|point| point.magnitude.to_string()),
            (numbers("anywhere"), &|point| point.anywhere.to_string()),
            (numbers("in enough layers"), &|point| point.in_layers.to_string()),
            (numbers("and systematic at the run's own"), &systematic),
        ],
    );
    Some(table.noted(note))
}

fn share_table(results: &Results) -> Table {
    let header = ["any", "S% >= 1", "S% >= 6", "S% >= 25", "S% >= 50", "S% >= 75"];
    let mut columns = vec![words("in layers")];
    columns.extend(header.map(numbers));
    let rows = LAYER_PERCENTS.map(|layers| {
        let mut row = vec![if layers == 0.0 { "any".to_owned() } else { format!("L% >= {layers}") }];
        row.extend(POSITION_PERCENTS.map(|positions| shares(results, layers, positions).to_string()));
        row
    });
    Table {
        name: "shares".to_owned(),
        title: "Threshold ladder: shares of layers and positions".to_owned(),
        columns,
        rows: Vec::from(rows),
        notes: vec![format!(
            "Features with values of magnitude {} and more in at least a share of layers and at at least a share of positions.",
            results.thresholds.magnitude
        )],
    }
}

fn massive(massive: &MassiveActivations) -> Table {
    let found = match (massive.onset_layer, massive.last_layer) {
        (Some(first), Some(last)) => format!(
            "At {} tokens ({} at position 0) of {} sequences, from layer {first} to layer {last}; by each token's own median: {} values. ",
            massive.tokens, massive.tokens_at_position_0, massive.sequences, massive.values_by_token_median
        ),
        _ => "None. ".to_owned(),
    };
    let note = format!("{found}{}Rule: {}", first("dimensions", ROWS, massive.n_dims), massive.rule);
    Table::of(
        ("massive-table", "Massive activations"),
        top(&massive.dims),
        &[
            (numbers("dimension"), &|dim| dim.dim.to_string()),
            (numbers("layers"), &|dim| dim.n_layers.to_string()),
            (numbers("first"), &|dim| dim.first_layer.to_string()),
            (numbers("last"), &|dim| dim.last_layer.to_string()),
            (numbers("values"), &|dim| dim.values.to_string()),
            (numbers("at position 0"), &|dim| dim.values_at_position_0.to_string()),
            (numbers("min"), &|dim| format!("{:.1}", dim.min)),
            (numbers("max"), &|dim| format!("{:.1}", dim.max)),
        ],
    )
    .noted(note)
}

fn super_experts(model: &str, experts: &SuperExperts) -> Table {
    let candidates = top(&experts.candidates).iter().map(|peak| ("candidate", peak));
    let rows: Vec<(&str, &ExpertPeak)> =
        candidates.chain(experts.runner_up.iter().map(|peak| ("next, no candidate", peak))).collect();
    let place = |peak: &ExpertPeak| format!("{}:{}, token {}", peak.at.sequence, peak.at.position, peak.at.token_id);
    let note = format!(
        "{}{}The largest always is a candidate: only its distance to the next says whether it is out of the ordinary. 99.5 % of {} experts in the first {} \
         layers have at most {:.2}. Rule: {}",
        beside_published(model, experts),
        first("candidates", ROWS, experts.candidates.len()),
        experts.experts_considered,
        experts.layers_considered,
        experts.percentile_99_5,
        experts.rule
    );
    Table::of(
        ("super-experts", "Super experts"),
        &rows,
        &[
            (words(""), &|(what, _)| (*what).to_owned()),
            (numbers("layer"), &|(_, peak)| peak.at.layer.to_string()),
            (numbers("expert"), &|(_, peak)| optional(peak.at.expert, |expert| expert.to_string())),
            (numbers("largest output"), &|(_, peak)| format!("{:.2}", peak.at.value)),
            (numbers("dimension"), &|(_, peak)| peak.at.dim.to_string()),
            (words("where"), &|(_, peak)| place(peak)),
            (numbers("tokens sent"), &|(_, peak)| peak.tokens.to_string()),
        ],
    )
    .noted(note)
}

/// Compares the model's published super experts with the candidates.
fn beside_published(model: &str, experts: &SuperExperts) -> String {
    let Some(published) = published::super_experts_of(model) else { return String::new() };
    let is_found = |[layer, expert]: &&[usize; 2]| {
        experts.candidates.iter().any(|peak| peak.at.layer == *layer && peak.at.expert == Some(*expert))
    };
    let named = |[layer, expert]: &[usize; 2]| format!("layer {layer} expert {expert}");
    let missing: Vec<String> = published.experts.iter().filter(|at| !is_found(at)).map(named).collect();
    let all: Vec<String> = published.experts.iter().map(named).collect();
    let verdict = if missing.is_empty() {
        "all of them are candidates here".to_owned()
    } else {
        format!("NOT among the candidates here: {}", missing.join(", "))
    };
    format!("Published ({}): {}; {verdict}. ", published.source, all.join(", "))
}

fn routers(routers: &[RouterSummary]) -> Table {
    let note = "Entropy of the experts' shares over its largest possible value: 1 is even. Gate mass: sum of a token's gate weights. The favourite \
                at position 0 is the expert with the largest share of the gate mass of first tokens.";
    Table::of(
        ("routers-table", "Router load"),
        routers,
        &[
            (numbers("layer"), &|router| router.layer.to_string()),
            (numbers("experts"), &|router| router.experts.to_string()),
            (numbers("per token"), &|router| router.experts_per_token.to_string()),
            (numbers("never hit"), &|router| router.never_hit.to_string()),
            (numbers("busiest"), &|router| router.busiest.to_string()),
            (numbers("its load / mean"), &|router| format!("{:.2}", router.max_over_mean)),
            (numbers("entropy"), &|router| format!("{:.3}", router.normalised_entropy)),
            (numbers("gate mass"), &|router| format!("{:.3}", router.gate_mass_per_token)),
            (numbers("at position 0"), &|router| format!("{:.3}", router.gate_mass_per_token_at_position_0)),
            (numbers("favourite there"), &|router| router.favourite_at_position_0.to_string()),
            (numbers("its share there"), &|router| format!("{:.3}", router.favourite_share_at_position_0)),
            (numbers("elsewhere"), &|router| format!("{:.3}", router.favourite_share_elsewhere)),
        ],
    )
    .noted(note)
}

/// Names of the studied sites that are not norm outputs; empty if there are none.
pub(crate) fn other_sites(results: &Results) -> String {
    let mut kinds: Vec<&str> = results.other_sites.iter().map(|site| kind(site.point)).collect();
    kinds.sort_unstable();
    kinds.dedup();
    kinds.join(", ")
}

fn kind(point: Point) -> &'static str {
    match point {
        Point::BeforeAttention | Point::BeforeMlp | Point::AfterAttention | Point::AfterMlp => "norm outputs",
        Point::Residual => "residual stream",
        Point::AttentionOut => "attention outputs",
        Point::MlpOut => "MLP outputs",
        Point::ExpertOut => "expert outputs",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables_of(name: &str) -> Vec<Table> {
        tables("m", &Run::fixture(name))
    }

    #[test]
    fn share_of_enough_layers_is_not_rounded() {
        let mut run = Run::fixture("dense");
        run.results.thresholds.layer_fraction = 0.125;
        let note = threshold_sweep(&run).unwrap().notes.concat();
        assert!(note.starts_with("Enough layers: >= 12.5 %."), "{note}");
    }

    #[test]
    fn measured_quantities_have_complete_tables() {
        let names = |name: &str| tables_of(name).into_iter().map(|table| table.name).collect::<Vec<_>>();
        let all = ["features", "ladder", "shares", "massive-table", "super-experts", "routers-table"];
        assert_eq!(names("mixture"), all.map(|name| format!("m-{name}")));
        assert_eq!(names("dense"), ["m-features", "m-ladder", "m-shares"]);
        for table in tables_of("mixture") {
            assert!(table.rows.iter().all(|row| row.len() == table.columns.len()), "{}", table.name);
        }
    }
}
