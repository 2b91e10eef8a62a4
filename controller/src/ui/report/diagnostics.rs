//! A short summary of a run's optional measurements.

use std::collections::BTreeSet;

use outliers_protocol::{
    AblationArm, AttentionSinks, MassiveActivations, NumberFormat, OtherSite, Point, PooledQuantization,
    QuantizationErrors, ResidualSinks, Results, RouterSummary, SpikeLife, SuperExperts,
};

use super::table::{number, table, text};
use crate::text::{clean, counted};
use crate::units::figure;

/// Maximum dimensions, experts and layers shown; the file contains all.
const SHOWN: usize = 5;

/// Ablation, quantisation errors, massive activations, other sites, super experts, sinks, spikes
/// and routers. Empty if none was measured.
pub(super) fn diagnostics(results: &Results) -> String {
    let mut out = ablation(&results.ablation);
    if let Some(errors) = &results.quantization_error {
        out += &quantization(errors, results.hidden);
    }
    if !results.other_sites.is_empty() {
        out += &sites(results);
    }
    if let Some(massive_activations) = &results.massive_activations {
        out += &massive(massive_activations);
    }
    if let Some(experts) = &results.super_experts {
        out += &super_experts(experts);
    }
    out += &results.residual_sinks.as_ref().map(residual_sinks).unwrap_or_default();
    out += &results.spike_life.as_ref().map(spike_life).unwrap_or_default();
    out += &results.attention_sinks.as_ref().map(attention_sinks).unwrap_or_default();
    out + &routers(&results.routers)
}

/// Columns of an ablation.
pub(crate) const WITHOUT: [&str; 4] = ["perplexity", "of the whole", "largest probability", "largest attention share"];

/// Cells of an ablation.
pub(crate) fn without(arm: &AblationArm, whole: &AblationArm) -> [String; 4] {
    [
        figure(arm.perplexity.perplexity, 4),
        format!("{} x", figure(arm.perplexity.perplexity / whole.perplexity.perplexity, 3)),
        format!("{:.4}", arm.top_probability),
        arm.attention.map_or_else(|| "-".to_owned(), |share| format!("{share:.4}")),
    ]
}

/// The ablated model beside the whole one.
fn ablation(arms: &[AblationArm]) -> String {
    let Some(whole) = arms.first() else { return String::new() };
    let mut rows = table(&[&["without", "features"], &WITHOUT[..]].concat());
    for arm in arms {
        let of_arm = [text(arm.removed.label()), number(arm.features.len())];
        rows.add_row(of_arm.into_iter().chain(without(arm, whole).map(number)));
    }
    format!("\n{rows}\n")
}

/// Name of a kind of site.
pub(crate) fn name(point: Point) -> &'static str {
    match point {
        Point::BeforeAttention => "norm before attention",
        Point::BeforeMlp => "norm before MLP",
        Point::AfterAttention => "norm after attention",
        Point::AfterMlp => "norm after MLP",
        Point::Residual => "residual stream",
        Point::AttentionOut => "attention output",
        Point::MlpOut => "MLP output",
        Point::ExpertOut => "expert output",
    }
}

/// One line per kind of site: the largest value with its location, and kurtosis.
fn sites(results: &Results) -> String {
    let mut rows = table(&[
        "values at",
        "largest",
        "layer",
        "dimension",
        "position",
        "pooled excess kurtosis",
        "token kurtosis",
        "token max/median",
    ]);
    for top in &results.top_records {
        let Some(record) = top.records.first() else { continue };
        let at_point = || results.sites.iter().filter(|site| site.point == top.point);
        let pooled = at_point().map(|site| site.kurtosis - 3.0).reduce(f64::max);
        let norms = at_point().filter_map(|site| site.rows);
        let others =
            results.other_sites.iter().filter(|site| site.point == top.point).map(|site: &OtherSite| site.rows);
        let statistics: Vec<_> = norms.chain(others).collect();
        let kurtosis = statistics.iter().filter_map(|rows| rows.kurtosis).map(|spread| spread.mean).fold(0.0, f64::max);
        let ratio =
            statistics.iter().filter_map(|rows| rows.max_over_median).map(|spread| spread.max).fold(0.0, f64::max);
        rows.add_row([
            text(name(top.point)),
            number(format!("{:.2}", record.value)),
            number(record.layer),
            number(record.dim),
            number(record.position),
            number(pooled.map_or_else(|| "-".to_owned(), |pooled| format!("{pooled:.1}"))),
            number(format!("{kurtosis:.1}")),
            number(format!("{ratio:.0}")),
        ]);
    }
    format!(
        "\n{rows}\npooled excess kurtosis: of all values of a norm output, in the layer where it is largest; token kurtosis: mean \
         over tokens, likewise; token max/median: of the worst token\n"
    )
}

/// The rotated block sizes in the errors, at most so many; 0 is no rotation.
pub(crate) fn rotations<'a>(errors: impl IntoIterator<Item = &'a QuantizationErrors>, most: usize) -> Vec<usize> {
    let all = errors.into_iter().flat_map(|errors| &errors.norm_outputs);
    let rotations: BTreeSet<usize> = all.map(|pooled| pooled.all.rotation).collect();
    rotations.into_iter().take(most).collect()
}

pub(crate) fn rotation_name(rotation: &usize) -> String {
    if *rotation == 0 { "plain".to_owned() } else { format!("Hadamard {rotation}") }
}

/// The error of a format with a rotation.
pub(crate) fn pooled(
    errors: &QuantizationErrors,
    format: NumberFormat,
    rotation: usize,
) -> Option<&PooledQuantization> {
    errors.norm_outputs.iter().find(|pooled| (pooled.all.format, pooled.all.rotation) == (format, rotation))
}

/// A line per format, plain and rotated.
fn quantization(errors: &QuantizationErrors, hidden: usize) -> String {
    let rotations = rotations([errors], SHOWN);
    let columns: Vec<String> = rotations.iter().map(rotation_name).collect();
    let header: Vec<&str> = std::iter::once("error, %").chain(columns.iter().map(String::as_str)).collect();
    let mut rows = table(&header);
    for format in NumberFormat::ALL {
        let error = |rotation: &usize| {
            let found = pooled(errors, format, *rotation);
            number(found.map_or_else(|| "-".to_owned(), |pooled| format!("{:.4}", 100.0 * pooled.all.error)))
        };
        rows.add_row(std::iter::once(text(format.label())).chain(rotations.iter().map(error)));
    }
    let left =
        rotations.iter().filter(|rotation| **rotation > 0 && !hidden.is_multiple_of(**rotation)).map(|rotation| {
            let left = hidden % rotation;
            format!("Hadamard {rotation}: the last {left} of {hidden} dimensions fill no block and are not rotated\n")
        });
    let left: String = left.collect();
    format!("\n{rows}\nof norm outputs: {}\n{left}", clean(errors.rule.as_bytes(), 300))
}

fn residual_sinks(sinks: &ResidualSinks) -> String {
    let rule = clean(sinks.rule.as_bytes(), 300);
    let most = sinks.layers.iter().max_by(|a, b| a.share_of_squares.total_cmp(&b.share_of_squares));
    match most.filter(|layer| layer.n_dims > 0) {
        None => format!("\nno residual sinks: {rule}\n"),
        Some(layer) => {
            let dims: Vec<String> = layer.dims.iter().take(SHOWN).map(|sink| sink.dim.to_string()).collect();
            format!(
                "\nresidual sinks: {} in layer {}, where they are largest, with {:.1} % of x^2 ({})\n{rule}\n",
                layer.n_dims,
                layer.layer,
                100.0 * layer.share_of_squares,
                dims.join(", ")
            )
        }
    }
}

fn spike_life(life: &SpikeLife) -> String {
    let rule = clean(life.rule.as_bytes(), 300);
    let Some(onset) = life.onset_layer else { return format!("\nno spike at first tokens: {rule}\n") };
    let end =
        life.fall_layer.map_or_else(|| "stays to the end".to_owned(), |layer| format!("is gone in layer {layer}"));
    format!("\nspike at first tokens: from layer {onset} on, {end}\n{rule}\n")
}

fn attention_sinks(sinks: &AttentionSinks) -> String {
    let share = sinks.first_key.map_or_else(|| "-".to_owned(), |share| format!("{:.1} %", 100.0 * share));
    format!(
        "\nattention on the first key: {share}, mean over layers; mean largest |hidden|: {:.1}\n",
        sinks.largest_hidden
    )
}

fn massive(massive: &MassiveActivations) -> String {
    let rule = clean(massive.rule.as_bytes(), 300);
    let (Some(first), Some(last)) = (massive.onset_layer, massive.last_layer) else {
        return format!("\nno massive activations: {rule}\n");
    };
    let mut out = format!(
        "\nmassive activations at {} ({} at position 0) of {}, from layer {first} to layer {last}\n{rule}\n",
        counted(massive.tokens as usize, "token"),
        massive.tokens_at_position_0,
        counted(massive.sequences as usize, "sequence")
    );
    let mut rows = table(&["dimension", "layers", "values", "at position 0", "min", "max"]);
    for dim in massive.dims.iter().take(SHOWN) {
        rows.add_row([
            number(dim.dim),
            number(dim.n_layers),
            number(dim.values),
            number(dim.values_at_position_0),
            number(format!("{:.1}", dim.min)),
            number(format!("{:.1}", dim.max)),
        ]);
    }
    out += &format!("{rows}\n");
    out + &more(massive.n_dims, "dimensions")
}

fn super_experts(experts: &SuperExperts) -> String {
    let rule = clean(experts.rule.as_bytes(), 300);
    if experts.candidates.is_empty() {
        return format!("\nno super-expert candidates: {rule}\n");
    }
    let next = experts.runner_up.map_or_else(String::new, |next| {
        format!("; the largest is always one, the first that is none has {:.2}", next.at.value.abs())
    });
    let mut out = format!("\nsuper-expert candidates: {}{next}\n{rule}\n", experts.candidates.len());
    let mut rows = table(&["layer", "expert", "largest output", "dimension", "position", "tokens sent"]);
    for candidate in experts.candidates.iter().take(SHOWN) {
        let at = candidate.at;
        rows.add_row([
            number(at.layer),
            number(at.expert.map(|expert| expert.to_string()).unwrap_or_default()),
            number(format!("{:.2}", at.value)),
            number(at.dim),
            number(at.position),
            number(candidate.tokens),
        ]);
    }
    out += &format!("{rows}\n");
    out + &more(experts.candidates.len(), "candidates")
}

/// One line for all routers.
fn routers(routers: &[RouterSummary]) -> String {
    let by_load = |a: &&RouterSummary, b: &&RouterSummary| a.max_over_mean.total_cmp(&b.max_over_mean);
    let Some(worst) = routers.iter().max_by(by_load) else { return String::new() };
    let experts: usize = routers.iter().map(|router| router.experts).sum();
    let never: usize = routers.iter().map(|router| router.never_hit).sum();
    let least_even = routers.iter().map(|router| router.normalised_entropy).fold(f64::INFINITY, f64::min);
    format!(
        "\nrouters: {} mixture layers, {never} of {experts} experts never hit; busiest expert {:.1} x the mean (layer {}, expert {}), \
         normalised entropy of the load {least_even:.3} at the least even layer\n",
        routers.len(),
        worst.max_over_mean,
        worst.layer,
        worst.busiest,
    )
}

fn more(all: usize, what: &str) -> String {
    if all > SHOWN { format!("and {} more {what}\n", all - SHOWN) } else { String::new() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn results(more: serde_json::Value) -> Results {
        let mut document = json!({
            "schema": 1, "model": "m", "thresholds": {}, "n_layers": 4, "n_sites": 8, "hidden": 8, "sequences": 2,
            "tokens_per_sequence": 4, "verdicts": [], "features": [], "per_sequence": [], "sites": [],
            "total_occurrences": 0, "max_abs": 1.0, "perplexity": null,
        });
        document.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(document).unwrap()
    }

    fn record(value: f32) -> serde_json::Value {
        json!({"layer": 3, "expert": 68, "sequence": 0, "position": 0, "token_id": 5, "dim": 7, "value": value})
    }

    fn massive(values: u64) -> serde_json::Value {
        let layer = (values > 0).then_some(2);
        json!({
            "rule": "a rule\u{1b}[2J", "onset_layer": layer, "last_layer": layer, "values": values, "tokens": values,
            "tokens_at_position_0": values, "sequences": values, "n_dims": 7, "values_by_token_median": values, "layers": [],
            "dims": [{"dim": 1415, "values": 2, "values_at_position_0": 2, "n_layers": 1, "first_layer": 2, "last_layer": 2,
                      "min": -1512.5, "max": 900.0}],
        })
    }

    #[test]
    fn no_measurements_print_nothing() {
        assert_eq!(diagnostics(&results(json!({}))), "");
    }

    #[test]
    fn massive_activations_or_their_absence_are_printed() {
        let shown = diagnostics(&results(json!({"massive_activations": massive(2)})));
        for expected in
            ["at 2 tokens (2 at position 0) of 2 sequences, from layer 2 to layer 2", "1415", "-1512.5", "and 2 more"]
        {
            assert!(shown.contains(expected), "{expected} in {shown}");
        }
        assert!(shown.chars().all(|c| !c.is_control() || c == '\n'), "{shown}");
        assert!(
            diagnostics(&results(json!({"massive_activations": massive(0)})))
                .contains("no massive activations: a rule")
        );
    }

    #[test]
    fn super_experts_and_routers_are_printed() {
        let mut peak = record(-744.0);
        peak["tokens"] = json!(12);
        let shown = diagnostics(&results(json!({
            "super_experts": {"rule": "r", "layers_considered": 3, "experts_considered": 9, "percentile_99_5": 63.0, "max": 744.0,
                              "candidates": [peak], "runner_up": null},
            "routers": [{"layer": 1, "experts": 128, "experts_per_token": 8, "never_hit": 3, "max_over_mean": 5.25, "busiest": 40,
                         "normalised_entropy": 0.9, "gate_mass_per_token": 1.0, "gate_mass_per_token_at_position_0": 1.0,
                         "favourite_at_position_0": 4, "favourite_share_at_position_0": 0.5, "favourite_share_elsewhere": 0.01}],
        })));
        for expected in [
            "super-expert candidates: 1",
            "68",
            "-744.00",
            "3 of 128 experts never hit",
            "5.2 x the mean (layer 1, expert 40)",
        ] {
            assert!(shown.contains(expected), "{expected} in {shown}");
        }
    }

    #[test]
    fn additional_measurements_are_printed() {
        let error = |rotation: u64, error: f64| {
            json!({"format": "mxfp4", "rotation": rotation, "rows": 8, "error": error, "share_in_outlier_blocks": 0.5,
                   "outlier_blocks": 0.5, "per_sequence": []})
        };
        let shown = diagnostics(&results(json!({
            "quantization_error": {"rule": "a rule\u{1b}[2J", "sites": [], "norm_outputs": [error(0, 0.02), error(32, 0.01)]},
            "residual_sinks": {"rule": "r", "layers": [{"layer": 2, "n_dims": 1, "share_of_squares": 0.25, "dims": [
                {"dim": 17, "share_of_tokens": 1.0, "share_of_squares": 0.25, "gain": 0.5}]}]},
            "spike_life": {"rule": "r", "onset_layer": 1, "fall_layer": 3, "layers": []},
            "attention_sinks": {"rule": "r", "first_key": 0.5, "largest_hidden": 94.25, "layers": []},
        })));
        for expected in [
            "MXFP4",
            "2.0000",
            "Hadamard 32",
            "1.0000",
            "Hadamard 32: the last 8 of 8 dimensions fill no block and are not rotated",
            "residual sinks: 1 in layer 2, where they are largest, with 25.0 % of x^2 (17)",
            "from layer 1 on, is gone in layer 3",
            "attention on the first key: 50.0 %",
            "94.2",
        ] {
            assert!(shown.contains(expected), "{expected} in {shown}");
        }
        assert!(shown.chars().all(|c| !c.is_control() || c == '\n'), "{shown}");
    }

    #[test]
    fn every_site_kind_has_a_line() {
        let spread = json!({"rows": 8, "mean": 12.0, "p50": 1.0, "p99": 1.0, "max": 5000.0});
        let shown = diagnostics(&results(json!({
            "other_sites": [{"layer": 3, "point": "residual", "max_abs": 20.0, "rms": 1.0, "rows": {
                "rows": 8, "magnitude": {"p50": 1.0, "p90": 1.0, "p99": 1.0, "p99_9": 1.0}, "kurtosis": spread, "max_over_median": spread,
            }}],
            "top_records": [{"point": "residual", "records": [record(-20.0)]}],
        })));
        for expected in ["residual stream", "-20.00", "12.0", "5000"] {
            assert!(shown.contains(expected), "{expected} in {shown}");
        }
    }
}
