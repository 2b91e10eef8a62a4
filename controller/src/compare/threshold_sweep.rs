//! Counts as functions of thresholds, from the stored data of one run.
//!
//! Extremes are stored per norm output and feature, so that counts by layers are known for any
//! magnitude. Positions are stored for the run's magnitude only, for any pair of shares.

use outliers_protocol::Results;

use super::folder::{Run, layers};

/// Magnitude thresholds around the paper's 6, from ordinary features (3.5) to massive activations
/// (100).
pub(crate) const MAGNITUDES: [f32; 12] = [3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 100.0];

/// Shares of layers in percent; 0: any layer.
pub(crate) const LAYER_PERCENTS: [f64; 6] = [0.0, 10.0, 25.0, 50.0, 75.0, 100.0];

/// Shares of positions in percent; 0: any position.
pub(crate) const POSITION_PERCENTS: [f64; 6] = [0.0, 1.0, 6.0, 25.0, 50.0, 75.0];

/// Features at one threshold of magnitude.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct SweepPoint {
    /// Threshold of |x|.
    pub(crate) magnitude: f32,
    /// Number of features that reach it anywhere.
    pub(crate) anywhere: usize,
    /// Number of features that reach it in at least the run's share of layers, at any positions.
    pub(crate) in_layers: usize,
    /// Those of them that are systematic at the run's magnitude. At higher magnitudes this is an
    /// upper bound.
    pub(crate) systematic: usize,
}

/// Points for all magnitudes; empty without statistics.
pub(crate) fn sweep(run: &Run) -> Vec<SweepPoint> {
    let Some(statistics) = &run.statistics else { return Vec::new() };
    let results = &run.results;
    let order = layer_order(results);
    let peaks: Vec<Vec<f32>> = (0..results.hidden)
        .map(|feature| {
            let mut layers = vec![0.0f32; results.n_layers];
            for (site, layer) in order.iter().enumerate() {
                layers[*layer] = layers[*layer].max(statistics.max_abs(site, feature));
            }
            layers
        })
        .collect();
    let systematic: Vec<usize> = results.features.iter().filter(|f| f.systematic_by_layers).map(|f| f.dim).collect();
    MAGNITUDES.iter().map(|magnitude| point(*magnitude, &peaks, &systematic, results)).collect()
}

/// Index of each norm output's layer among the studied layers.
fn layer_order(results: &Results) -> Vec<usize> {
    let layers = layers(results);
    let place = |layer: usize| layers.iter().position(|known| *known == layer).expect("it is of a norm output");
    results.sites.iter().map(|site| place(site.layer)).collect()
}

fn point(magnitude: f32, peaks: &[Vec<f32>], systematic: &[usize], results: &Results) -> SweepPoint {
    let layers = |feature: &Vec<f32>| feature.iter().filter(|peak| **peak >= magnitude).count();
    let enough = |n: usize| n > 0 && n as f64 / results.n_layers as f64 >= results.thresholds.layer_fraction;
    let wide = |(_, feature): &(usize, &Vec<f32>)| enough(layers(feature));
    SweepPoint {
        magnitude,
        anywhere: peaks.iter().filter(|feature| layers(feature) > 0).count(),
        in_layers: peaks.iter().enumerate().filter(wide).count(),
        systematic: peaks.iter().enumerate().filter(wide).filter(|(dim, _)| systematic.contains(dim)).count(),
    }
}

/// Number of features in at least these shares of layers and of positions, in percent, at the
/// run's magnitude.
pub(crate) fn shares(results: &Results, layer_percent: f64, position_percent: f64) -> usize {
    let within = |f: &&outliers_protocol::Feature| {
        f.layer_fraction >= layer_percent / 100.0 && f.position_fraction >= position_percent / 100.0
    };
    results.features.iter().filter(within).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweep_contains_the_runs_own_count() {
        for run in ["mixture", "dense"].map(Run::fixture) {
            let sweep = sweep(&run);
            let own = sweep.iter().find(|point| point.magnitude == run.results.thresholds.magnitude).unwrap();
            let features = &run.results.features;
            let share = run.results.thresholds.layer_fraction;
            assert_eq!(own.anywhere, features.len());
            assert_eq!(own.in_layers, features.iter().filter(|f| f.layer_fraction >= share).count());
            assert_eq!(own.systematic, features.iter().filter(|f| f.systematic_by_layers).count());
            assert!(own.systematic > 0, "else this shows nothing");
        }
    }

    #[test]
    fn counts_fall_as_thresholds_rise() {
        for run in ["mixture", "dense"].map(Run::fixture) {
            for pair in sweep(&run).windows(2) {
                assert!(pair[0].anywhere >= pair[1].anywhere && pair[0].in_layers >= pair[1].in_layers);
                assert!(pair[0].systematic >= pair[1].systematic && pair[0].anywhere >= pair[0].in_layers);
            }
            assert_eq!(shares(&run.results, 0.0, 0.0), run.results.features.len());
            assert_eq!(shares(&run.results, 25.0, 6.0) as f64, run.results.verdicts[0].count);
            for [low, high] in [[0.0, 10.0], [25.0, 50.0], [50.0, 100.0]] {
                assert!(shares(&run.results, low, 6.0) >= shares(&run.results, high, 6.0));
                assert!(shares(&run.results, 25.0, low) >= shares(&run.results, 25.0, high));
            }
        }
    }
}
