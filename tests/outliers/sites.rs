//! Measurements in addition to outlier features: unchanged for any split of the work, with planted
//! values found in place.

use std::path::Path;

use outliers_protocol::{Point, Results, files};
use outliers_tests::programs::golden;

use crate::worker::{copy, read, run_like};

/// Runs a model over a fixture's token ids.
fn run(model: &Path, fixture: &str, more: &[&str]) -> Results {
    read(run_like(fixture, model, more).path(), files::RESULTS)
}

/// Multiplies one row of an f32 matrix in place.
fn scale_row(folder: &Path, tensor: &str, row: usize, factor: f32) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let mut bytes = std::fs::read(&path).unwrap();
        let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
        let Some(entry) = header.get(tensor) else { continue };
        assert_eq!(entry["dtype"], "F32");
        let width = entry["shape"][1].as_u64().unwrap() as usize;
        let start = 8 + header_len + entry["data_offsets"][0].as_u64().unwrap() as usize + row * width * 4;
        for value in bytes[start..start + width * 4].as_chunks_mut::<4>().0 {
            *value = (f32::from_le_bytes(*value) * factor).to_le_bytes();
        }
        std::fs::write(&path, bytes).unwrap();
        return;
    }
    panic!("{tensor} is in no file of {}", folder.display());
}

#[test]
fn additional_sites_change_no_other_result() {
    for fixture in ["olmoe-bf16", "llama-f32"] {
        let model = golden(fixture).join("model");
        let (plain, all) = (run(&model, fixture, &[]), run(&model, fixture, &["--sites", "all"]));
        assert_eq!(plain.features, all.features);
        assert_eq!(plain.sites, all.sites);
        assert_eq!(plain.routers, all.routers);
        assert_eq!((plain.perplexity, plain.verdicts), (all.perplexity, all.verdicts));
        assert!(plain.other_sites.is_empty() && plain.massive_activations.is_none() && plain.super_experts.is_none());
        let mixture = fixture.starts_with("olmoe");
        assert_eq!(all.other_sites.len(), all.n_layers * if mixture { 4 } else { 3 });
        assert_eq!((all.super_experts.is_some(), all.routers.len()), (mixture, if mixture { all.n_layers } else { 0 }));
        let feature = all.features.iter().find(|f| f.systematic_by_layers).expect("planted");
        let peak = feature.peak.expect("known");
        let (gain, before) = (peak.gain.unwrap(), peak.value_over_gain.unwrap());
        assert!((gain * before - peak.value).abs() <= 1e-6 * peak.value.abs() && peak.value.abs() == feature.max_abs);
    }
}

#[test]
fn devices_change_no_bit_and_micro_batches_change_no_count() {
    let model = golden("olmoe-f32-sharded").join("model");
    let of = |more: &[&str]| run(&model, "olmoe-f32-sharded", &[&["--sites", "all"], more].concat());
    let one = of(&[]);
    assert_eq!(of(&["--devices", "cpu:2"]), one);
    // A matrix product of other dimensions is summed in another order: places and counts are
    // equal, values up to rounding.
    let cut = of(&["--micro-batch-tokens", "1"]);
    let loads = |r: &Results| r.routers.iter().map(|r| (r.never_hit, r.busiest, r.max_over_mean)).collect::<Vec<_>>();
    assert_eq!(loads(&cut), loads(&one));
    let rows = |r: &Results| r.other_sites.iter().map(|s| (s.layer, s.point, s.rows.rows)).collect::<Vec<_>>();
    assert_eq!(rows(&cut), rows(&one));
    for (a, b) in cut.other_sites.iter().zip(&one.other_sites) {
        assert!((a.rms / b.rms - 1.0).abs() < 1e-4, "{:?} {}: {} {}", a.point, a.layer, a.rms, b.rms);
        let (a, b) = (a.rows.kurtosis.unwrap(), b.rows.kurtosis.unwrap());
        assert!((a.mean / b.mean - 1.0).abs() < 1e-3, "{} {}", a.mean, b.mean);
    }
}

#[test]
fn planted_massive_activation_is_found_from_its_layer_on() {
    let model = copy("llama-f32");
    scale_row(model.path(), "model.layers.1.mlp.down_proj.weight", 9, 1e7);
    let results = run(model.path(), "llama-f32", &["--sites", "residual,mlp-out"]);
    let massive = results.massive_activations.expect("asked for");
    assert_eq!((massive.onset_layer, massive.last_layer), (Some(1), Some(results.n_layers - 1)));
    let [dim] = massive.dims[..] else { panic!("one dimension: {:?}", massive.dims) };
    assert_eq!((dim.dim, dim.first_layer, dim.n_layers, dim.values), (9, 1, results.n_layers - 1, massive.values));
    assert_eq!(massive.layers[0].values, 0);
    for layer in &massive.layers[1..] {
        let largest = layer.records[0];
        assert!(largest.ratio.unwrap() >= 1000.0 && largest.at.value.abs() > 100.0 && largest.at.dim == 9);
    }
    let top = results.top_records.iter().find(|top| top.point == Point::Residual).unwrap();
    assert_eq!(top.records.len(), 100);
    assert!(top.records.iter().all(|record| record.dim == 9 && record.layer >= 1));
    assert!(!results.other_sites.iter().any(|site| site.point == Point::AttentionOut), "not asked for");
}

#[test]
fn planted_super_expert_is_the_only_candidate() {
    let model = copy("olmoe-f32-sharded");
    scale_row(model.path(), "model.layers.1.mlp.experts.4.down_proj.weight", 20, 1e7);
    let results = run(model.path(), "olmoe-f32-sharded", &["--sites", "residual,expert-out"]);
    let experts = results.super_experts.expect("asked for");
    let [candidate] = &experts.candidates[..] else { panic!("{:?}", experts.candidates) };
    assert_eq!((candidate.at.layer, candidate.at.expert, candidate.at.dim), (1, Some(4), 20));
    assert_eq!((candidate.at.value.abs(), candidate.tokens > 0), (experts.max, true));
    assert!(experts.runner_up.expect("others have tokens").at.value.abs() < 0.01 * experts.max);
    let massive = results.massive_activations.expect("asked for");
    assert_eq!((massive.onset_layer, massive.dims[0].dim, massive.n_dims), (Some(1), 20, 1));
    assert!(massive.layers[1].tokens <= candidate.tokens, "only tokens that were sent there can have it");
}
