//! Figures of `--measure`, compared with numpy on transformers' activations and attention weights
//! (numbers from `tests/measures.py`).

use outliers_protocol::{Inspection, Point, QuantizationError, Record, Results, files};
use outliers_tests::programs::{golden, run_worker};
use serde_json::Value;

use crate::worker::{read, run_like};

const ALL: [&str; 2] = ["--measure", "quantization-error,residual-sinks,spike-life,attention-sinks"];

fn run(name: &str, more: &[&str]) -> Results {
    read(run_like(name, &golden(name).join("model"), more).path(), files::RESULTS)
}

#[track_caller]
fn near(what: &str, got: f64, want: &Value, tolerance: f64) {
    let want = want.as_f64().unwrap_or_else(|| panic!("{what}: {want}"));
    assert!((got - want).abs() <= tolerance * want.abs().max(1e-3), "{what}: {got} instead of {want}");
}

/// Values near the middle of two representable numbers may be rounded either way; values near the
/// threshold may or may not count.
fn errors_equal(what: &str, got: &[QuantizationError], want: &Value) {
    assert_eq!(got.len(), want.as_array().unwrap().len(), "{what}");
    for (got, want) in got.iter().zip(want.as_array().unwrap()) {
        let what = format!("{what}, {} rotated by {}", got.format.label(), got.rotation);
        assert_eq!(serde_json::to_value(got.format).unwrap(), want["format"], "{what}");
        assert_eq!(got.rotation as u64, want["rotation"], "{what}");
        near(&what, got.error, &want["error"], 2e-3);
        near(&what, got.share_in_outlier_blocks, &want["share_in_outlier_blocks"], 5e-3);
        near(&what, got.outlier_blocks, &want["outlier_blocks"], 2e-2);
    }
}

#[track_caller]
fn all_near(what: &str, got: impl IntoIterator<Item = f64>, want: &Value, tolerance: f64) {
    let got: Vec<f64> = got.into_iter().collect();
    let want = want.as_array().unwrap_or_else(|| panic!("{what}: {want}"));
    assert_eq!(got.len(), want.len(), "{what}");
    got.iter().zip(want).for_each(|(got, want)| near(what, *got, want, tolerance));
}

/// The mean over sequences equals the figure of all of them.
#[track_caller]
fn mean_is(what: &str, per_sequence: &[f64], all: f64) {
    let mean = per_sequence.iter().sum::<f64>() / per_sequence.len() as f64;
    assert!((mean - all).abs() <= 1e-9 * all.abs(), "{what}: {mean} instead of {all}");
}

fn place_equals(what: &str, got: Option<Record>, want: &Value) {
    let got = got.unwrap_or_else(|| panic!("{what}: no record"));
    near(what, f64::from(got.value), &want["value"], 1e-3);
    assert_eq!((got.dim as u64, got.position), (want["dim"].as_u64().unwrap(), 0), "{what}");
}

#[test]
fn measurements_equal_numpy_over_transformers() {
    for name in ["llama-f32", "gpt-oss-mxfp4", "deepseek-v2-lite"] {
        let results = run(name, &[&ALL[..], &["--threshold", "2"]].concat());
        let want: Value = serde_json::from_slice(&std::fs::read(golden(name).join("measures.json")).unwrap()).unwrap();

        let errors = results.quantization_error.unwrap();
        let norms: Vec<_> = errors.sites.iter().filter(|site| site.point.is_norm_output()).collect();
        assert_eq!((norms.len(), errors.norm_outputs.len()), (results.n_sites, 16));
        for (at, (site, want)) in norms.iter().zip(want["quantization"].as_array().unwrap()).enumerate() {
            errors_equal(&format!("{name} norm output {at}"), &site.errors, &want["errors"]);
        }
        let last = errors.sites.iter().rfind(|site| site.point == Point::Residual).unwrap();
        errors_equal(&format!("{name} residual"), &last.errors, &want["residual_quantization"]);
        for pooled in &errors.norm_outputs {
            let means: Vec<f64> = pooled.per_sequence.iter().map(|mean| mean.unwrap()).collect();
            assert_eq!(means.len(), results.sequences);
            mean_is(&format!("{name}, every row was quantised"), &means, pooled.all.error);
        }

        let sinks = results.residual_sinks.unwrap();
        let what = format!("{name} sinks of sequences");
        all_near(&what, sinks.per_sequence.iter().copied(), &want["most_sinks"]["per_sequence"], 1e-3);
        assert_eq!(sinks.per_sequence.is_empty(), name == "gpt-oss-mxfp4", "{what}");
        let (map, mapped) = (sinks.map.unwrap(), &want["most_sinks"]["map"]);
        assert_eq!(map.layer as u64, mapped["layer"], "{what}");
        assert_eq!(map.dims.len(), mapped["dims"].as_array().unwrap().len(), "{what}");
        for (got, want) in map.dims.iter().zip(mapped["dims"].as_array().unwrap()) {
            let place = (want["dim"].as_u64().unwrap(), want["is_sink"].as_bool().unwrap());
            assert_eq!((got.dim as u64, got.is_sink), place, "{what}");
            let values = want["values"].as_array().unwrap();
            let close = |(got, want): (&f32, &Value)| (f64::from(*got) - want.as_f64().unwrap()).abs() < 1e-3;
            assert!(got.values.len() == values.len() && got.values.iter().zip(values).all(close), "{what}: {got:?}");
        }
        let sinks = sinks.layers;
        for (got, want) in sinks.iter().zip(want["residual_sinks"].as_array().unwrap()) {
            let what = format!("{name} sinks after layer {}", got.layer);
            assert_eq!(got.n_dims as u64, want["n_dims"], "{what}");
            near(&what, got.share_of_squares, &want["share_of_squares"], 1e-3);
            for (got, want) in got.dims.iter().zip(want["dims"].as_array().unwrap()) {
                assert_eq!(got.dim as u64, want["dim"], "{what}");
                near(&what, got.share_of_tokens, &want["share_of_tokens"], 4e-2);
                near(&what, got.share_of_squares, &want["share_of_squares"], 1e-3);
            }
        }

        let life = results.spike_life.unwrap().layers;
        for (got, want) in life.iter().zip(want["spike_life"].as_array().unwrap()) {
            let what = format!("{name} first tokens after layer {}", got.layer);
            near(&what, got.first, &want["first"], 1e-3);
            near(&what, got.others.unwrap(), &want["others"], 1e-3);
            place_equals(&what, got.residual, &want["residual"]);
            place_equals(&what, got.attention_out, &want["attention_out"]);
            place_equals(&what, got.mlp_out, &want["mlp_out"]);
            near(&what, f64::from(got.attention_out_others), &want["attention_out_others"], 1e-3);
            near(&what, f64::from(got.mlp_out_others), &want["mlp_out_others"], 1e-3);
            near(&what, got.agreement, &want["agreement"], 1e-3);
            all_near(&what, got.margins.iter().copied().map(f64::from), &want["margins"], 1e-3);
            let is_spike = got.first >= 10.0 * got.others.unwrap();
            assert_eq!(got.margins.iter().sum::<f32>() >= 0.0, is_spike, "{what}");
            match got.cosine_with_previous {
                Some(cosine) => near(&what, cosine, &want["cosine_with_previous"], 1e-3),
                None => assert!(want["cosine_with_previous"].is_null(), "{what}"),
            }
        }

        let attention = results.attention_sinks.unwrap();
        let (what, each) = (format!("{name} attention of sequences"), &want["attention_of_sequences"]);
        all_near(&what, attention.first_key_per_sequence.iter().copied(), &each["first_key"], 1e-3);
        all_near(&what, attention.largest_hidden_per_sequence.iter().copied(), &each["largest_hidden"], 1e-3);
        mean_is(&what, &attention.first_key_per_sequence, attention.first_key.unwrap());
        mean_is(&what, &attention.largest_hidden_per_sequence, attention.largest_hidden);
        let attention = attention.layers;
        for (got, want) in attention.iter().zip(want["attention_sinks"].as_array().unwrap()) {
            let what = format!("{name} attention of layer {}", got.layer);
            near(&what, got.first_key.unwrap(), &want["first_key"], 1e-3);
            near(&what, got.largest_hidden, &want["largest_hidden"], 1e-3);
            all_near(&what, got.heads.iter().copied(), &want["heads"], 1e-3);
        }
        assert_eq!([sinks.len(), life.len(), attention.len()], [results.n_layers; 3]);
    }
}

#[test]
fn measurements_change_no_other_result_and_are_absent_by_default() {
    let plain = run("olmoe-bf16", &["--sites", "all"]);
    let all = run("olmoe-bf16", &[&["--sites", "all"], &ALL[..]].concat());
    assert!(all.quantization_error.as_ref().unwrap().sites.iter().any(|site| site.point == Point::ExpertOut));
    let without =
        Results { quantization_error: None, residual_sinks: None, spike_life: None, attention_sinks: None, ..all };
    assert_eq!(plain, without);
    let one = run("olmoe-bf16", &["--measure", "attention-sinks"]);
    assert!(one.attention_sinks.is_some() && one.residual_sinks.is_none() && one.quantization_error.is_none());
    let points: Vec<Point> = one.other_sites.iter().map(|site| site.point).collect();
    assert_eq!(points, vec![Point::Residual; one.n_layers], "what it needs, and no more");
}

#[test]
fn layers_without_softmax_have_no_attention_sinks() {
    let results = run("qwen3-next", &["--measure", "attention-sinks"]);
    let layers = results.attention_sinks.unwrap().layers;
    let (with, without): (Vec<_>, Vec<_>) = layers.iter().partition(|layer| layer.first_key.is_some());
    assert!(!with.is_empty() && !without.is_empty());
    assert!(without.iter().all(|layer| layer.heads.is_empty()) && with.iter().all(|layer| !layer.heads.is_empty()));
}

#[test]
fn plan_counts_values_that_a_gpu_sends_to_the_host_to_be_measured() {
    let model = golden("llama-f32").join("model");
    let inspected = |more: &[&str]| -> Inspection {
        let plain = ["inspect", "--json", "--model", model.to_str().unwrap()];
        let said = run_worker(plain.iter().chain(more));
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
        serde_json::from_slice(&said.stdout).unwrap()
    };
    let plain = inspected(&["--sites", "residual"]);
    let plan = &plain.plan;
    let values = (plan.sequences * plan.tokens_per_sequence * plain.hidden * size_of::<f32>()) as u64;
    let (norms, residuals) = (plain.sites.len() as u64, plain.layers.len() as u64);
    let more = |measurement: &str| {
        let with = inspected(&["--sites", "residual", "--measure", measurement]);
        with.plan.on_gpus.device_to_host_bytes - plan.on_gpus.device_to_host_bytes
    };
    assert_eq!(more("quantization-error"), (norms + residuals) * values);
    assert_eq!((more("residual-sinks"), more("attention-sinks")), (residuals * values, 0));
}

#[test]
fn unsupported_measurement_is_refused_with_the_supported_ones() {
    let (model, folder) = (golden("llama-f32").join("model"), tempfile::tempdir().unwrap());
    let job = ["run", "--model", model.to_str().unwrap(), "--output", folder.path().to_str().unwrap()];
    let said = run_worker(job.into_iter().chain(["--measure", "sinks"]));
    assert_eq!(said.status.code(), Some(2));
    let text = String::from_utf8_lossy(&said.stderr);
    assert!(text.contains("quantization-error, residual-sinks, spike-life, attention-sinks"), "{text}");
}
