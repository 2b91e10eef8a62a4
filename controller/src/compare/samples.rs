//! Counts systematic features over samples of the sequences, from the details per sequence in
//! `results.json` ([`outliers_protocol::Feature::within`]).

use outliers_protocol::{Feature, Results, WithinSequence};

use super::bootstrap::{SequenceTotals, samples};

/// Totals of systematic features over each of many samples of the sequences, by layers and by norm
/// outputs, with all sequences of a sample together. Empty for runs without details per sequence,
/// and for one sequence.
pub(crate) fn resampled(results: &Results) -> [Vec<SequenceTotals>; 2] {
    if !tells(results) {
        return [Vec::new(), Vec::new()];
    }
    let sequences: Vec<usize> = (0..results.sequences).collect();
    let drawn = samples(&sequences, |sample| over(results, sample.iter().map(|sequence| **sequence)));
    [0, 1].map(|axis| drawn.iter().map(|by_axis| by_axis[axis]).collect())
}

/// Whether a run has details per sequence.
fn tells(results: &Results) -> bool {
    results.features.iter().any(|feature| !feature.within.is_empty())
}

/// Totals over these sequences together, with repetitions; by layers and by norm outputs.
fn over(results: &Results, sequences: impl Iterator<Item = usize>) -> [SequenceTotals; 2] {
    let mut times = vec![0u64; results.sequences];
    sequences.for_each(|sequence| times[sequence] += 1);
    let tokens = times.iter().sum::<u64>() as f64 * results.tokens_per_sequence as f64;
    let mut tallies = [SequenceTotals::default(); 2];
    let mut reached = vec![false; results.n_sites];
    for feature in &results.features {
        reached.fill(false);
        let mut positions = 0.0;
        for within in feature.within.iter().filter(|within| times[within.sequence] > 0) {
            positions += times[within.sequence] as f64 * within.positions as f64;
            within.sites.ranges().for_each(|sites| reached[sites].fill(true));
        }
        let share = positions / tokens;
        for (tally, (part, whole)) in tallies.iter_mut().zip(extent(results, &reached)) {
            tally.judge(part, part as f64 / whole as f64, share, &results.thresholds);
        }
    }
    tallies
}

/// Number of layers and norm outputs reached, each with the total.
fn extent(results: &Results, reached: &[bool]) -> [(u64, usize); 2] {
    let sites = results.sites.iter().zip(reached).filter(|(_, reached)| **reached).map(|(site, _)| site.layer);
    let mut layers: Vec<usize> = sites.collect();
    let n_sites = layers.len();
    layers.dedup();
    [(layers.len() as u64, results.n_layers), (n_sites as u64, results.n_sites)]
}

/// Checks details within sequences against the features and sequences of the results.
///
/// # Errors
/// The inconsistency.
pub(crate) fn check(results: &Results) -> Result<(), String> {
    if !tells(results) {
        return Ok(());
    }
    results.features.iter().try_for_each(|feature| check_feature(feature, results))?;
    let said = |of: [fn(&Feature) -> bool; 2]| of.map(|of| results.features.iter().filter(|f| of(f)).count());
    let whole = over(results, 0..results.sequences).map(|tally| tally.features);
    if whole != said([|f| f.systematic_by_layers, |f| f.systematic_by_sites]) {
        return Err("its verdicts on features do not follow from what it says of each sequence".to_owned());
    }
    for (sequence, summary) in results.per_sequence.iter().enumerate() {
        let within = over(results, std::iter::once(sequence)).map(|tally| tally.features);
        if within != [summary.systematic_by_layers, summary.systematic_by_sites] {
            return Err(format!("its features come to other counts in sequence {sequence} than it says of that"));
        }
    }
    Ok(())
}

fn check_feature(feature: &Feature, results: &Results) -> Result<(), String> {
    let known = |within: &WithinSequence| {
        within.sequence < results.sequences
            && within.positions <= results.tokens_per_sequence as u64
            && within.sites.last().is_some_and(|site| site < results.n_sites)
    };
    let ascending = feature.within.windows(2).all(|pair| pair[0].sequence < pair[1].sequence);
    let told = feature.within.is_empty() || feature.peaks.len() == feature.n_sites;
    match ascending && told && feature.within.iter().all(known) {
        true => Ok(()),
        false => Err(format!("what it says of feature {} within sequences cannot be", feature.dim)),
    }
}

#[cfg(test)]
mod tests {
    use outliers_protocol::files;
    use serde_json::{Value, json};

    use super::super::fixture::{change, copy};
    use super::super::folder::{Flaw, Run, read};
    use super::super::plots::{peak_quartiles, quartiles};
    use super::*;

    fn close(tally: SequenceTotals, other: SequenceTotals) -> bool {
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
        tally.features == other.features
            && near(tally.layer_share, other.layer_share)
            && near(tally.position_share, other.position_share)
    }

    #[test]
    fn results_json_agrees_with_statistics_per_sequence() {
        for run in ["mixture", "dense"].map(Run::fixture) {
            let [by_layers, by_sites] = run.tallies.as_ref().unwrap();
            assert!(by_layers.iter().any(|tally| tally.features > 0), "else this shows nothing");
            for (sequence, (layers, sites)) in by_layers.iter().zip(by_sites).enumerate() {
                let [ours, by_sites] = over(&run.results, std::iter::once(sequence));
                assert!(close(ours, *layers) && close(by_sites, *sites), "sequence {sequence}");
            }
        }
    }

    #[test]
    fn results_json_contains_the_quartiles_of_peaks() {
        for run in ["mixture", "dense"].map(Run::fixture) {
            for feature in run.results.features.iter().filter(|feature| !feature.within.is_empty()) {
                let peaks = feature.peaks.iter().copied().map(f64::from).collect();
                assert_eq!(quartiles(peaks), peak_quartiles(run.statistics.as_ref().unwrap(), feature.dim));
            }
        }
    }

    #[test]
    fn samples_have_the_verdict_of_their_pooled_sequences() {
        // One feature, four layers with two norm outputs, four sequences of ten positions: 25 % is
        // one layer or two norm outputs, 6 % is one position.
        let within = |sequence: usize, positions: u64, sites: &str| json!({"sequence": sequence, "positions": positions, "sites": sites});
        let site = |layer: usize, point: &str| json!({"layer": layer, "point": point, "occurrences": 0, "features": 0, "max_abs": 0.0, "rms": 0.0, "kurtosis": 0.0});
        let results: Results = serde_json::from_value(json!({
            "schema": 1, "model": "m", "thresholds": {}, "n_layers": 4, "n_sites": 8, "hidden": 8, "sequences": 4,
            "tokens_per_sequence": 10, "verdicts": [], "per_sequence": [], "total_occurrences": 0, "max_abs": 7.0, "perplexity": null,
            "sites": (0..4).flat_map(|l| [site(l, "before_attention"), site(l, "before_mlp")]).collect::<Vec<Value>>(),
            "features": [{
                "dim": 0, "n_layers": 2, "n_sites": 3, "layer_fraction": 0.5, "site_fraction": 0.375, "n_positions": 4,
                "position_fraction": 0.1, "occurrences": 4, "positive": 4, "sided": "pos", "max": 7.0, "min": 0.0, "max_abs": 7.0,
                "systematic_by_layers": true, "systematic_by_sites": true, "sequences_systematic_by_layers": 2,
                "sequences_systematic_by_sites": 1, "layers_before_attention": [0, 3], "layers_before_mlp": [0],
                "within": [within(0, 3, "0-1"), within(2, 1, "6")], "peaks": [7.0, 7.0, 7.0],
            }],
        }))
        .unwrap();
        let over = |sequences: &[usize]| {
            over(&results, sequences.iter().copied()).map(|t| (t.features, t.layer_share, t.position_share))
        };
        let none = (0, 0.0, 0.0);
        assert_eq!(over(&[0]), [(1, 0.25, 0.3), (1, 0.25, 0.3)]);
        assert_eq!(over(&[2]), [(1, 0.25, 0.1), none], "one norm output of eight");
        assert_eq!(over(&[1, 3]), [none, none]);
        assert_eq!(over(&[0, 1, 2, 3]), [(1, 0.5, 0.1), (1, 0.375, 0.1)]);
        assert_eq!(over(&[0, 0, 2, 2]), [(1, 0.5, 0.2), (1, 0.375, 0.2)], "as often as they are drawn");
        assert_eq!(over(&[2, 3, 3, 3]), [none, none], "2.5 % of positions");
    }

    #[test]
    fn older_results_have_no_samples() {
        for mut run in ["mixture", "dense"].map(Run::fixture) {
            assert!(resampled(&run.results).iter().all(|tallies| tallies.len() > 1000));
            run.results.features.iter_mut().for_each(|feature| feature.within.clear());
            assert_eq!(resampled(&run.results), [vec![], vec![]]);
            assert_eq!(check(&run.results), Ok(()));
        }
    }

    #[test]
    fn impossible_per_sequence_counts_are_damage() {
        let changes: [fn(&mut Value); 7] = [
            |within| within[0]["sequence"] = json!(6),
            |within| within[1] = within[0].clone(),
            |within| within[0]["positions"] = json!(25),
            |within| within[0]["positions"] = json!(0),
            |within| within[0]["sites"] = json!(""),
            |within| within[0]["sites"] = json!(format!("0-{}", usize::MAX)),
            |within| *within = json!([]),
        ];
        for change_within in changes {
            let home = tempfile::tempdir().unwrap();
            let folder = copy("dense", &home.path().join("r"));
            change(&folder, files::RESULTS, |results| {
                let features = results["features"].as_array_mut().unwrap();
                let all = |f: &&mut Value| f["sequences_systematic_by_layers"] == json!(6);
                change_within(&mut features.iter_mut().find(all).unwrap()["within"]);
            });
            assert!(matches!(read(&folder), Err(Flaw::Damaged(why)) if why.contains(files::RESULTS)));
        }
    }
}
