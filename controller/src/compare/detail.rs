//! Tables of one model, for the page: its features, thresholds, massive activations, experts and
//! routers.

use outliers_protocol::{
    AblationArm, ExpertPeak, Feature, IndexSet, MassiveActivations, Point, Results, RouterSummary, Sided, SuperExperts,
};

use super::folder::Run;
use super::measured;
use super::plots::{peak_quartiles, quartiles, strongest};
use super::published;
use super::table::{Column, NONE, Table, numbers, optional, words};
use super::threshold_sweep::{LAYER_PERCENTS, POSITION_PERCENTS, shares, sweep};
use crate::ui::report::diagnostics::{WITHOUT, without};

/// Rows of what may be long; `results.json` has them all.
const ROWS: usize = 40;

/// Places named per feature.
const PLACES: usize = 3;

/// The tables that have anything to show; `name` is put before each one's.
pub fn tables(name: &str, run: &Run) -> Vec<Table> {
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
    let columns = [words("without"), words("features"), perplexity, of_the_whole, probability, share];
    let named = |features: &[usize]| features.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    let row = |arm: &AblationArm| {
        let features = if arm.features.is_empty() { NONE.to_owned() } else { named(&arm.features) };
        let [perplexity, of_the_whole, probability, share] = without(arm, &arms[0]);
        [arm.removed.label().to_owned(), features, perplexity, of_the_whole, probability, share]
    };
    let table = table("ablation", "Without some features", columns, arms.iter().map(row).collect());
    noted(
        table,
        "features set to 0 at every norm output that feeds attention or MLP (LLM.int8(), section 4.2); perplexity and the largest probability of \
         the next token with all that follows in later layers; the largest share that attention gives to one key, mean over queries, heads and \
         layers, with each layer's input that of the whole model but for the features",
    )
}

fn table<const N: usize>(name: &str, title: &str, columns: [Column; N], rows: Vec<[String; N]>) -> Table {
    Table {
        name: name.to_owned(),
        title: title.to_owned(),
        columns: Vec::from(columns),
        rows: rows.into_iter().map(Vec::from).collect(),
        notes: Vec::new(),
    }
}

fn noted(mut table: Table, note: impl Into<String>) -> Table {
    table.notes.push(note.into());
    table
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
    let columns = [
        numbers("feature"),
        words("systematic by"),
        numbers("L%"),
        numbers("S%"),
        numbers("in sequences"),
        words("signs"),
        numbers("min"),
        numbers("max"),
        numbers("quartiles of peaks"),
        numbers("gain"),
        numbers("x / gain"),
        words("layers, attention's norm"),
        words("layers, MLP's norm"),
        words("where its largest values stand"),
    ];
    let row = |feature: &&Feature| {
        let quartiles = match &run.statistics {
            Some(statistics) => peak_quartiles(statistics, feature.dim),
            None => quartiles(feature.peaks.iter().copied().map(f64::from).collect()),
        };
        let peak = feature.peak.as_ref();
        [
            feature.dim.to_string(),
            systematic(feature).to_owned(),
            format!("{:.1}", 100.0 * feature.layer_fraction),
            format!("{:.1}", 100.0 * feature.position_fraction),
            format!("{}, {}", feature.sequences_systematic_by_layers, feature.sequences_systematic_by_sites),
            signs(feature.sided).to_owned(),
            format!("{:.2}", feature.min),
            format!("{:.2}", feature.max),
            optional(quartiles, |[a, b, c]| format!("{a:.1}, {b:.1}, {c:.1}")),
            optional(peak.and_then(|peak| peak.gain), |gain| format!("{gain:.2}")),
            optional(peak.and_then(|peak| peak.value_over_gain), |value| format!("{value:.2}")),
            ranges(&feature.layers_before_attention),
            ranges(&feature.layers_before_mlp),
            places(results, feature.dim),
        ]
    };
    let rows = strongest.iter().take(ROWS).map(row).collect();
    let note = first("features", ROWS, strongest.len())
        + "L%, S%: share of layers and of positions with an outlier, over all sequences. In sequences: in how many it is systematic by \
           itself, by layers and by norm outputs. Quartiles of peaks: over the norm outputs where the feature has \
           outliers, of its largest value at each. Gain: of the norm where its value is largest; under RMSNorm a large value may be a large gain. \
           Where: layer, sequence:position and token id of its values among the 100 largest of their kind of norm output.";
    Some(noted(table("features", "Features with outliers", columns, rows), note))
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
    let columns = [
        numbers("|x| >="),
        numbers("anywhere"),
        numbers("in enough layers"),
        numbers("and systematic at the run's own"),
    ];
    let rows = sweep.iter().map(|point| {
        let systematic = if point.magnitude < own.magnitude { None } else { Some(point.systematic) };
        [
            point.magnitude.to_string(),
            point.anywhere.to_string(),
            point.in_layers.to_string(),
            optional(systematic, |n| n.to_string()),
        ]
    });
    let note = format!(
        "Enough layers: >= {:.0} %. Positions are counted at the run's own threshold of {} alone: above it the last column is the most that can be \
         systematic, below it nothing is known.",
        100.0 * own.layer_fraction,
        own.magnitude
    );
    Some(noted(table("ladder", "Threshold ladder: magnitude", columns, rows.collect()), note))
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
    let columns = [
        numbers("dimension"),
        numbers("layers"),
        numbers("first"),
        numbers("last"),
        numbers("values"),
        numbers("at position 0"),
        numbers("min"),
        numbers("max"),
    ];
    let rows = massive.dims.iter().take(ROWS).map(|dim| {
        [
            dim.dim.to_string(),
            dim.n_layers.to_string(),
            dim.first_layer.to_string(),
            dim.last_layer.to_string(),
            dim.values.to_string(),
            dim.values_at_position_0.to_string(),
            format!("{:.1}", dim.min),
            format!("{:.1}", dim.max),
        ]
    });
    let found = match (massive.onset_layer, massive.last_layer) {
        (Some(first), Some(last)) => format!(
            "At {} tokens ({} at position 0) of {} sequences, from layer {first} to layer {last}; by each token's own median: {} values. ",
            massive.tokens, massive.tokens_at_position_0, massive.sequences, massive.values_by_token_median
        ),
        _ => "None. ".to_owned(),
    };
    let note = format!("{found}{}Rule: {}", first("dimensions", ROWS, massive.n_dims), massive.rule);
    noted(table("massive-table", "Massive activations", columns, rows.collect()), note)
}

fn super_experts(model: &str, experts: &SuperExperts) -> Table {
    let columns = [
        words(""),
        numbers("layer"),
        numbers("expert"),
        numbers("largest output"),
        numbers("dimension"),
        words("where"),
        numbers("tokens sent"),
    ];
    let row = |what: &str, peak: &ExpertPeak| {
        let at = peak.at;
        [
            what.to_owned(),
            at.layer.to_string(),
            optional(at.expert, |expert| expert.to_string()),
            format!("{:.2}", at.value),
            at.dim.to_string(),
            format!("{}:{}, token {}", at.sequence, at.position, at.token_id),
            peak.tokens.to_string(),
        ]
    };
    let mut rows: Vec<_> = experts.candidates.iter().take(ROWS).map(|peak| row("candidate", peak)).collect();
    rows.extend(experts.runner_up.iter().map(|peak| row("next, no candidate", peak)));
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
    noted(table("super-experts", "Super experts", columns, rows), note)
}

/// The model's published super experts, and whether they are among the candidates.
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
    let columns = [
        numbers("layer"),
        numbers("experts"),
        numbers("per token"),
        numbers("never hit"),
        numbers("busiest"),
        numbers("its load / mean"),
        numbers("entropy"),
        numbers("gate mass"),
        numbers("at position 0"),
        numbers("favourite there"),
        numbers("its share there"),
        numbers("elsewhere"),
    ];
    let rows = routers.iter().map(|router| {
        [
            router.layer.to_string(),
            router.experts.to_string(),
            router.experts_per_token.to_string(),
            router.never_hit.to_string(),
            router.busiest.to_string(),
            format!("{:.2}", router.max_over_mean),
            format!("{:.3}", router.normalised_entropy),
            format!("{:.3}", router.gate_mass_per_token),
            format!("{:.3}", router.gate_mass_per_token_at_position_0),
            router.favourite_at_position_0.to_string(),
            format!("{:.3}", router.favourite_share_at_position_0),
            format!("{:.3}", router.favourite_share_elsewhere),
        ]
    });
    let note = "Entropy of the experts' shares over its largest possible value: 1 is even. Gate mass: sum of a token's gate weights. The favourite \
                at position 0 is the expert with the largest share of the gate mass of first tokens.";
    noted(table("routers-table", "Router load", columns, rows.collect()), note)
}

/// The kinds of studied values that are no norm outputs, in words; empty if there are none.
pub fn other_sites(results: &Results) -> String {
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
