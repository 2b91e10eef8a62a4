//! Recounts with other shares of layers and positions, from stored counts without another run.

use outliers_protocol::{Axis, Reading, Results, Thresholds, Verdict};

use super::bootstrap::SequenceTotals;
use super::folder::Run;
use super::statistics::Statistics;

/// Applies shares of layers and positions to the stored counts of a run. The magnitude threshold
/// cannot change, since positions are stored only for the run's. Details within sequences are left
/// out, since they are stored only for features that the run's shares could make systematic.
///
/// # Errors
/// Why the stored counts do not suffice.
pub(crate) fn recount(run: &Run, thresholds: Thresholds) -> Result<Results, String> {
    let own = run.results.thresholds.magnitude;
    if thresholds.magnitude != own {
        return Err(format!(
            "the run stored where values reach its own threshold of {own}, not where they reach {}",
            thresholds.magnitude
        ));
    }
    let statistics = run.statistics.as_ref().ok_or("the run has no statistics.safetensors, which holds its counts")?;
    let mut results = Results { thresholds, ..run.results.clone() };
    for feature in &mut results.features {
        let enough = |parts: usize, share: f64, positions: f64| {
            parts > 0 && share >= thresholds.layer_fraction && positions >= thresholds.position_fraction
        };
        feature.systematic_by_layers = enough(feature.n_layers, feature.layer_fraction, feature.position_fraction);
        feature.systematic_by_sites = enough(feature.n_sites, feature.site_fraction, feature.position_fraction);
        let [layers, sites] = sequences(statistics, &run.results, thresholds, feature.dim);
        (feature.sequences_systematic_by_layers, feature.sequences_systematic_by_sites) = (layers, sites);
        feature.within.clear();
        feature.peaks.clear();
    }
    let tallies = SequenceTotals::of_run(statistics, &results);
    let [by_layers, by_sites] = &tallies;
    for ((sequence, layers), sites) in results.per_sequence.iter_mut().zip(by_layers).zip(by_sites) {
        (sequence.systematic_by_layers, sequence.systematic_by_sites) = (layers.features, sites.features);
    }
    results.verdicts = run.results.verdicts.iter().map(|verdict| verdict_anew(verdict, &results, &tallies)).collect();
    Ok(results)
}

/// Number of sequences in which a feature is systematic, by layers and by norm outputs.
fn sequences(statistics: &Statistics, results: &Results, thresholds: Thresholds, feature: usize) -> [usize; 2] {
    let parts = [(&statistics.sequence_layers, results.n_layers), (&statistics.sequence_sites, results.n_sites)];
    parts.map(|(parts, whole)| {
        let is_systematic = |sequence: &usize| {
            let part = parts.at(*sequence, feature);
            let positions = statistics.sequence_positions.at(*sequence, feature);
            let mut tally = SequenceTotals::default();
            let positions = positions as f64 / results.tokens_per_sequence as f64;
            tally.judge(part, part as f64 / whole as f64, positions, &thresholds);
            tally.features > 0
        };
        (0..results.sequences).filter(is_systematic).count()
    })
}

/// Recomputes a verdict from features and sequences with the new shares.
fn verdict_anew(verdict: &Verdict, results: &Results, [by_layers, by_sites]: &[Vec<SequenceTotals>; 2]) -> Verdict {
    let sum = match (verdict.reading, verdict.axis) {
        (Reading::Unique, axis) => {
            let mut tally = SequenceTotals::default();
            for feature in &results.features {
                let (systematic, share) = match axis {
                    Axis::Layers => (feature.systematic_by_layers, feature.layer_fraction),
                    Axis::Sites => (feature.systematic_by_sites, feature.site_fraction),
                };
                if systematic {
                    tally.add(share, feature.position_fraction);
                }
            }
            tally
        }
        (_, Axis::Layers) => SequenceTotals::sum(by_layers),
        (_, Axis::Sites) => SequenceTotals::sum(by_sites),
    };
    let divisor = if verdict.reading == Reading::MeanPerSequence { results.sequences.max(1) } else { 1 };
    let percent = |share: f64| (sum.features > 0).then(|| 100.0 * share / sum.features as f64);
    Verdict {
        count: sum.features as f64 / divisor as f64,
        mean_layer_percent: percent(sum.layer_share),
        mean_sequence_percent: percent(sum.position_share),
        ..verdict.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::super::threshold_sweep::shares;
    use super::*;

    #[test]
    fn recount_at_the_runs_thresholds_equals_its_counts() {
        for run in ["mixture", "dense"].map(Run::fixture) {
            let again = recount(&run, run.results.thresholds).unwrap();
            assert_eq!(again.per_sequence, run.results.per_sequence);
            for (now, before) in again.features.iter().zip(&run.results.features) {
                let judged = |f: &outliers_protocol::Feature| {
                    (
                        [f.systematic_by_layers, f.systematic_by_sites],
                        [f.sequences_systematic_by_layers, f.sequences_systematic_by_sites],
                    )
                };
                assert_eq!(judged(now), judged(before), "feature {}", now.dim);
            }
            for (now, before) in again.verdicts.iter().zip(&run.results.verdicts) {
                assert_eq!((&now.label, now.count), (&before.label, before.count));
                let near = |a: Option<f64>, b: Option<f64>| a.zip(b).is_none_or(|(a, b)| (a - b).abs() < 1e-9);
                assert!(near(now.mean_layer_percent, before.mean_layer_percent), "{}", now.label);
                assert!(near(now.mean_sequence_percent, before.mean_sequence_percent), "{}", now.label);
            }
        }
    }

    #[test]
    fn other_thresholds_are_applied_to_stored_counts() {
        for run in ["mixture", "dense"].map(Run::fixture) {
            for (layers, positions) in [(10.0, 1.0), (50.0, 6.0), (100.0, 25.0)] {
                let own = run.results.thresholds;
                let asked = Thresholds { layer_fraction: layers / 100.0, position_fraction: positions / 100.0, ..own };
                let counted = recount(&run, asked).unwrap();
                assert_eq!(counted.thresholds, asked);
                assert_eq!(counted.verdicts[0].count, shares(&run.results, layers, positions) as f64);
            }
        }
    }

    #[test]
    fn recount_of_unstored_data_is_refused() {
        let mut run = Run::fixture("dense");
        let own = run.results.thresholds;
        let other = Thresholds { magnitude: own.magnitude - 1.0, ..own };
        assert!(recount(&run, other).unwrap_err().contains("its own threshold"));
        run.statistics = None;
        assert!(recount(&run, own).unwrap_err().contains("statistics.safetensors"));
    }
}
