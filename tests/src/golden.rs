//! Comparing a run with the reference's activations and with independently computed statistics.

use std::path::Path;

use outliers_protocol::{Axis, Reading, Results, Sided};
use safetensors::SafeTensors;
use serde_json::Value;

/// Activations and likelihoods agree within this, relative to each tensor's root mean square.
pub const TOLERANCE: f64 = 1e-4;

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let tensor = file.tensor(name).expect("listed");
    tensor.data().as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
}

/// Compares every tensor both files hold: floats within [`TOLERANCE`] of the golden tensor's RMS, integers (token ids, expert
/// choices) exactly. Returns how many were compared.
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

/// Compares results with the reference's statistics: every count, share and verdict exactly, extremes within rounding.
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
    let count = |reading: Reading| {
        let verdict = results.verdicts.iter().find(|v| v.reading == reading && v.axis == Axis::Layers);
        verdict.expect("every reading is there").count
    };
    let sum = reference["sum_over_sequences"]["n_systematic"].as_f64().expect("number");
    assert_eq!(count(Reading::Unique), corpus["n_systematic"].as_f64().expect("number"));
    assert_eq!(count(Reading::SumOverSequences), sum);
    assert_eq!(count(Reading::MeanPerSequence), sum / results.sequences as f64);
    for (got, want) in results.per_sequence.iter().zip(reference["per_sequence"].as_array().expect("list")) {
        assert_eq!(got.features_any as u64, want["n_features_any"].as_u64().expect("number"));
        assert_eq!(got.systematic_by_layers as u64, want["n_systematic"].as_u64().expect("number"));
    }
}
