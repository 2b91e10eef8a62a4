//! Comparing a run with the reference's activations and with independently computed statistics.

use std::path::Path;

use outliers_protocol::{Axis, Feature, Point, Reading, Results, Sided, Verdict};
use safetensors::SafeTensors;
use serde_json::Value;

/// Activations and likelihoods agree within this, relative to each tensor's root mean square.
pub const TOLERANCE: f64 = 1e-4;

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let tensor = file.tensor(name).expect("listed");
    tensor.data().as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
}

/// Compares every tensor both files hold: floats within [`TOLERANCE`] of the golden tensor's RMS,
/// integers (token ids, expert choices) exactly. Returns how many were compared.
///
/// # Panics
/// On the first difference, naming the tensor.
pub fn assert_activations_equal(golden: &Path, dump: &Path) -> usize {
    let (golden, dump) =
        (std::fs::read(golden).expect("golden file"), std::fs::read(dump).expect("activations were saved"));
    let (golden, dump) =
        (SafeTensors::deserialize(&golden).expect("golden"), SafeTensors::deserialize(&dump).expect("dump"));
    // Kept by the reference alone: how close its expert choices were.
    let not_saved =
        |name: &str| name.starts_with("router.") && (name.ends_with(".margin") || name.ends_with(".logits"));
    let names: Vec<&str> = golden.names().into_iter().filter(|name| !not_saved(name)).collect();
    for name in &names {
        let want = golden.tensor(name).expect("listed");
        let got = dump.tensor(name).unwrap_or_else(|_| panic!("{name} was not saved"));
        assert_eq!(got.shape(), want.shape(), "{name}");
        if want.dtype() == safetensors::Dtype::I64 {
            assert!(got.data() == want.data(), "{name} differs");
            continue;
        }
        let (want, got) = (floats(&golden, name), floats(&dump, name));
        let rms = (want.iter().map(|v| v * v).sum::<f64>() / want.len() as f64).sqrt();
        let worst = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst <= TOLERANCE * rms, "{name}: differs by {worst:e} where the RMS is {rms:e}");
    }
    names.len()
}

/// Compares results with the reference's statistics: every count, share and verdict exactly,
/// extremes within rounding.
///
/// # Panics
/// On the first difference.
pub fn assert_statistics_equal(reference: &Path, results: &Results) {
    let reference: Value = serde_json::from_slice(&std::fs::read(reference).expect("reference")).expect("JSON");
    let corpus = &reference["corpus"];
    let features = corpus["features"].as_array().expect("list");
    assert_eq!(results.features.len(), features.len(), "features with an occurrence");
    for (got, want) in results.features.iter().zip(features) {
        let number = |key: &str| want[key].as_f64().expect("number");
        let dim = got.dim;
        assert_eq!(dim as f64, number("dim"));
        let got_numbers = [
            ("n_sites", got.n_sites as f64),
            ("n_layers", got.n_layers as f64),
            ("n_positions", got.n_positions as f64),
            ("occurrences", got.occurrences as f64),
            ("layer_fraction", got.layer_fraction),
            ("position_fraction", got.position_fraction),
        ];
        for (key, value) in got_numbers {
            assert_eq!(value, number(key), "feature {dim}: {key}");
        }
        for (key, value) in [("max", got.max), ("min", got.min), ("max_abs", got.max_abs)] {
            let want = number(key);
            assert!((f64::from(value) - want).abs() <= TOLERANCE * want.abs().max(1.0), "feature {dim}: {key}");
        }
        let sided = match got.sided {
            Sided::Pos => "pos",
            Sided::Neg => "neg",
            Sided::Both => "both",
        };
        assert_eq!(sided, want["sided"], "feature {dim}: sides");
        assert_eq!(got.systematic_by_layers, want["systematic"].as_bool().expect("bool"), "feature {dim}");
    }
    assert_figures_equal(&reference, results);
    assert_sequences_equal(&reference, results);
    for (got, want) in results.per_sequence.iter().zip(reference["per_sequence"].as_array().expect("list")) {
        assert_eq!(got.features_any as u64, want["n_features_any"].as_u64().expect("number"));
        assert_eq!(got.systematic_by_layers as u64, want["n_systematic"].as_u64().expect("number"));
    }
}

/// Every count with its mean L % and S %, from the shares that the reference found over all
/// sequences and within each.
fn assert_figures_equal(reference: &Value, results: &Results) {
    let number = |value: &Value| value.as_f64().expect("number");
    let sequences = reference["per_sequence"].as_array().expect("list");
    for axis in [Axis::Layers, Axis::Sites] {
        let systematic = |part: &Value| -> Vec<[f64; 2]> {
            let shares = part["features"].as_array().expect("list").iter().map(|feature| {
                let part = match axis {
                    Axis::Layers => number(&feature["layer_fraction"]),
                    Axis::Sites => number(&feature["n_sites"]) / number(&reference["n_sites"]),
                };
                [part, number(&feature["position_fraction"])]
            });
            let least = ["layer_fraction_min", "position_fraction_min"].map(|key| number(&reference[key]));
            shares.filter(|[part, positions]| *part >= least[0] && *positions >= least[1]).collect()
        };
        let whole = systematic(&reference["corpus"]);
        let within: Vec<_> = sequences.iter().flat_map(systematic).collect();
        for (reading, found, divisor) in [
            (Reading::Unique, &whole, 1),
            (Reading::MeanPerSequence, &within, sequences.len()),
            (Reading::SumOverSequences, &within, 1),
        ] {
            let same = |verdict: &&Verdict| (verdict.reading, verdict.axis) == (reading, axis);
            let verdict = results.verdicts.iter().find(same).expect("every reading is there");
            assert_eq!(verdict.count, found.len() as f64 / divisor as f64, "{}", verdict.label);
            for (column, ours) in [verdict.mean_layer_percent, verdict.mean_sequence_percent].into_iter().enumerate() {
                let mean = 100.0 * found.iter().map(|shares| shares[column]).sum::<f64>() / found.len() as f64;
                assert_eq!(ours.is_none(), found.is_empty(), "{}", verdict.label);
                assert!(ours.is_none_or(|ours| (ours - mean).abs() < 1e-9), "{}: {ours:?}, not {mean}", verdict.label);
            }
        }
    }
}

/// Positions of features within each sequence, for features that have them.
fn assert_sequences_equal(reference: &Value, results: &Results) {
    // A layer of one block has one of the two sites.
    let place = |index: usize| {
        let site = &results.sites[index];
        format!("{}.{}", site.layer, u8::from(matches!(site.point, Point::BeforeMlp | Point::AfterMlp)))
    };
    let told = results.features.iter().filter(|feature| !feature.within.is_empty());
    for (feature, within) in told.flat_map(|feature| feature.within.iter().map(move |within| (feature, within))) {
        let features = reference["per_sequence"][within.sequence]["features"].as_array().expect("list");
        let want = features.iter().find(|want| want["dim"] == feature.dim).expect("it is there as well");
        let sites: Vec<String> = within.sites.ranges().flatten().map(place).collect();
        assert_eq!(within.positions, want["n_positions"].as_u64().expect("number"), "feature {}", feature.dim);
        assert_eq!(serde_json::json!(sites), want["sites"], "feature {}", feature.dim);
    }
    let systematic = |feature: &Feature| feature.systematic_by_layers || feature.sequences_systematic_by_layers > 0;
    assert!(results.features.iter().filter(|f| systematic(f)).all(|f| !f.within.is_empty()), "told of all that matter");
}
