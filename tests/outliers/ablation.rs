//! Ablations, compared with Hugging Face transformers (numbers from `tests/ablation.py`).

use std::path::Path;

use outliers_protocol::{AblationArm, Removed, Results, files};
use outliers_tests::context::TestContext;
use outliers_tests::programs::{golden, goldens, run_worker};
use outliers_worker::commands::demo;
use serde::Deserialize;

/// The figures of transformers.
#[derive(Deserialize)]
struct Arm {
    features: Vec<usize>,
    mean_nll: f64,
    top_probability: f64,
    attention_by_layer: Vec<Option<f64>>,
}

const TOLERANCE: f64 = 1e-4;

fn arms(name: &str) -> Vec<Arm> {
    serde_json::from_str(&std::fs::read_to_string(golden(name).join("ablation.json")).unwrap()).unwrap()
}

fn run(model: &Path, ids: &Path, features: &[usize]) -> Results {
    let out = tempfile::tempdir().unwrap();
    let features = features.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let said = run_worker([
        "run".as_ref(),
        "--model".as_ref(),
        model.as_os_str(),
        "--token-ids".as_ref(),
        ids.as_os_str(),
        "--precision=f32".as_ref(),
        "--ablate".as_ref(),
        features.as_ref(),
        "--output".as_ref(),
        out.path().as_os_str(),
    ]);
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    serde_json::from_slice(&std::fs::read(out.path().join(files::RESULTS)).unwrap()).unwrap()
}

fn compare(name: &str, ours: &[AblationArm], theirs: &[Arm]) {
    let removed: Vec<Removed> = ours.iter().map(|arm| arm.removed).collect();
    assert_eq!(removed, [Removed::Nothing, Removed::Named, Removed::Random], "{name}");
    for (ours, theirs) in ours.iter().zip(theirs) {
        let near = |what, a: f64, b: f64| assert!((a - b).abs() <= TOLERANCE, "{name}: {what} {a} instead of {b}");
        assert_eq!(ours.features, theirs.features, "{name}");
        near("nats", ours.perplexity.mean_nll, theirs.mean_nll);
        near("top probability", ours.top_probability, theirs.top_probability);
        assert_eq!(ours.attention_by_layer.len(), theirs.attention_by_layer.len(), "{name}");
        for (a, b) in ours.attention_by_layer.iter().zip(&theirs.attention_by_layer) {
            assert_eq!(a.is_some(), b.is_some(), "{name}");
            near("attention", a.unwrap_or_default(), b.unwrap_or_default());
        }
    }
}

#[test]
fn ablation_agrees_with_transformers_in_every_family() {
    for name in goldens() {
        let theirs = arms(&name);
        let results = run(&golden(&name).join("model"), &golden(&name).join("golden.safetensors"), &theirs[1].features);
        compare(&name, &results.ablation, &theirs);
        assert_eq!(results.perplexity, Some(results.ablation[0].perplexity), "{name}");
    }
}

#[test]
fn ablation_of_the_demos_features_equals_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    demo::make(folder.path(), 1).unwrap();
    let theirs = arms("demo");
    let results = run(folder.path(), &golden("demo").join("ids.json"), &theirs[1].features);
    compare("demo", &results.ablation, &theirs);
}

/// Systematic features of one run are ablated in the next.
#[test]
fn deploy_ablates_features_found_by_an_earlier_run() {
    let folder = tempfile::tempdir().unwrap();
    demo::make(folder.path(), 1).unwrap();
    let deploy = |more: &[&str]| {
        let context = TestContext::new();
        let model = ["deploy", "-y", "--push-model", "--model", folder.path().to_str().unwrap()];
        let text = ["--num-sequences", "4", "--sequence-length", "128"];
        let said = context.run(model.iter().chain(&text).chain(more)).ok();
        let file = context.results_folder().join(files::RESULTS);
        let results: Results = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        context.assert_nothing_left();
        (context, said, file, results)
    };
    let (_context, _, file, found) = deploy(&[]);
    let systematic: Vec<usize> = found.features.iter().filter(|f| f.systematic_by_layers).map(|f| f.dim).collect();
    let (other, said, _, results) = deploy(&["--ablate", file.to_str().unwrap()]);
    assert_eq!(results.ablation[1].features, systematic);
    assert_eq!(results.verdicts, found.verdicts);
    assert_eq!(results.perplexity, found.perplexity);
    assert!(said.stdout.contains("as many others, at random"), "{said:?}");
    let _ = other.run(["compare", "--html", "page.html"]).ok();
    let page = std::fs::read_to_string(other.work().join("page.html")).unwrap();
    let named = systematic.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
    assert!(page.contains("Without some features") && page.contains(&named));
}
