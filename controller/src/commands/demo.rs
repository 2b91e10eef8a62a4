//! `demo`: deploys a model with known outlier features, and compares the results with them.

use std::path::{Path, PathBuf};

use outliers_protocol::{JobOptions, Merge, Results};
use serde::{Deserialize, Serialize};

use super::deploy::{deploy, print_result};
use super::drive::Deployed;
use super::{Context, SCHEMA};
use crate::cli::DemoArgs;
use crate::cli::settings::{DeployRequest, JobRequest, RunTerms};
use crate::cloud::broker::{GpuRequest, Instance, local};
use crate::files::{beside, create_private_folder, read_json};
use crate::ui::report::{CliError, ExitStatus, tables};
use crate::units::Usd;

/// File with the planted features, written by the worker beside the checkpoint.
const TRUTH: &str = "planted.json";

/// Enough text for stable shares of positions, little enough for a laptop.
const SEQUENCES: usize = 8;
const LENGTH: usize = 256;

#[derive(Clone, Debug, PartialEq, Deserialize)]
struct Planted {
    systematic: Vec<Feature>,
    decoys: Vec<Decoy>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
struct Feature {
    dim: usize,
    sites: Vec<(usize, usize)>,
    factor: f64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
struct Decoy {
    #[serde(flatten)]
    feature: Feature,
    #[serde(default)]
    why: String,
}

/// A planted feature with the result.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct ComparedFeature {
    dim: usize,
    planted: String,
    expected: bool,
    found: bool,
}

#[derive(Debug, Serialize)]
struct DemoReport {
    schema: u32,
    /// Whether exactly the planted features were found.
    exact: bool,
    /// Whether no instance of the run remains.
    clean: bool,
    comparison: Vec<ComparedFeature>,
    deployed: Deployed,
}

pub(super) async fn command(context: &Context, args: &DemoArgs) -> Result<ExitStatus, CliError> {
    let folder = model(context, args).await?;
    let planted = truth(&folder)?;
    let (features, decoys) = (planted.systematic.len(), planted.decoys.len());
    context
        .reporter
        .say(&format!("A model with {features} planted outlier features and {decoys} decoys: {}", folder.display()));
    let deployed = deploy(context, &asked(context, &folder)).await?;
    let deployed = deployed.ok_or_else(|| CliError::failed("the demo was not deployed"))?;
    let Some(results) = &deployed.results else {
        print_result(context, &deployed);
        let status = deployed.status();
        return Ok(if status == ExitStatus::Done { ExitStatus::Failed } else { status });
    };
    let comparison = compare(&planted, results);
    let exact = comparison.iter().all(|line| line.expected == line.found);
    let left = left(context, &deployed.run.id).await?;
    let document = DemoReport { schema: SCHEMA, exact, clean: left.is_empty(), comparison, deployed };
    context.reporter.result(&document, || in_words(&document));
    verdict(exact, &left)
}

fn verdict(exact: bool, left: &[Instance]) -> Result<ExitStatus, CliError> {
    if let Some(instance) = left.first() {
        let hint = format!("outliers instances terminate {}", instance.id);
        return Err(CliError::new(ExitStatus::InstanceLeft, format!("instance {} is left", instance.id), hint));
    }
    if exact {
        return Ok(ExitStatus::Done);
    }
    Err(CliError::failed("what was found is not what was planted: this build counts wrongly"))
}

/// Creates the checkpoint unless it exists. Its path is constant, so that an interrupted demo can
/// be resumed.
async fn model(context: &Context, args: &DemoArgs) -> Result<PathBuf, CliError> {
    let usual = || context.settings.state.join("demo").join(concat!("olmoe-", env!("CARGO_PKG_VERSION")));
    let folder = args.output.as_ref().map_or_else(usual, |path| context.here.join(path));
    if folder.join(TRUTH).exists() {
        return Ok(folder);
    }
    let trouble = |error: std::io::Error| CliError::failed(format!("{}: {error}", folder.display()));
    let part = beside(&folder, &format!(".{}.part", crate::run::ledger::random_word(6)));
    let parent = folder.parent().unwrap_or(Path::new("/"));
    // The state folder may be created here.
    let made = if args.output.is_none() { create_private_folder(parent) } else { std::fs::create_dir_all(parent) };
    made.map_err(trouble)?;
    let worker = context.worker().await?;
    worker.demo_model::<serde_json::Value>(&part).await?;
    match std::fs::rename(&part, &folder) {
        // Another demo has created the same files.
        Err(_) if folder.join(TRUTH).exists() => std::fs::remove_dir_all(&part).map_err(trouble)?,
        renamed => renamed.map_err(trouble)?,
    }
    Ok(folder)
}

fn truth(folder: &Path) -> Result<Planted, CliError> {
    let path = folder.join(TRUTH);
    read_json(&path).map_err(|error| CliError::failed(format!("{}: {error}", path.display())))
}

fn asked(context: &Context, folder: &Path) -> DeployRequest {
    let settings = &context.settings;
    let size = JobOptions { num_sequences: Some(SEQUENCES), sequence_length: Some(LENGTH), ..JobOptions::default() };
    DeployRequest {
        job: JobRequest {
            model: folder.to_string_lossy().into_owned(),
            revision: "main".to_owned(),
            options: size.merge(settings.job.clone()),
            here: context.here.clone(),
        },
        brokers: vec![local::NAME.to_owned()],
        terms: RunTerms {
            // The CPU is sufficient.
            request: GpuRequest { gpu_count: Some(0), ..GpuRequest::default() },
            push_model: true,
            keep_running: false,
            detach: false,
            max_duration: settings.max_duration,
            cut_short: false,
            budget: None,
            max_gpu_time: None,
            results: settings.results.clone(),
            survey: None,
        },
        dry_run: false,
        yes: true,
    }
}

/// Planted features and decoys in the file's order, then others that were found.
fn compare(planted: &Planted, results: &Results) -> Vec<ComparedFeature> {
    let found = |dim: usize| results.features.iter().any(|f| f.dim == dim && f.systematic_by_layers);
    let line = |feature: &Feature, expected: bool, why: &str| {
        let what = if why.is_empty() { String::new() } else { format!("; decoy: {why}") };
        let planted = format!("x {} at {} norm outputs{what}", feature.factor, feature.sites.len());
        ComparedFeature { dim: feature.dim, planted, expected, found: found(feature.dim) }
    };
    let mut lines: Vec<ComparedFeature> = planted.systematic.iter().map(|feature| line(feature, true, "")).collect();
    lines.extend(planted.decoys.iter().map(|decoy| line(&decoy.feature, false, &decoy.why)));
    let known: Vec<usize> = lines.iter().map(|line| line.dim).collect();
    let others = results.features.iter().filter(|f| f.systematic_by_layers && !known.contains(&f.dim));
    lines.extend(others.map(|f| ComparedFeature {
        dim: f.dim,
        planted: "nothing".to_owned(),
        expected: false,
        found: true,
    }));
    lines
}

fn in_words(document: &DemoReport) -> String {
    let deployed = &document.deployed;
    let mut table = tables::table(&["feature", "planted", "systematic", "found", "verdict"]);
    let yes = |is: bool| if is { "yes" } else { "no" };
    for line in &document.comparison {
        let right = if line.expected == line.found { "right" } else { "WRONG" };
        let dim = line.dim.to_string();
        let words = [dim.as_str(), &line.planted, yes(line.expected), yes(line.found), right];
        table.add_row(words.map(tables::text));
    }
    let mut out = deployed.table();
    out += &format!("\n{table}\n\n");
    out += &tables::epilogue(&deployed.run, Usd::from_micros(deployed.cost_micro_usd));
    if document.exact {
        out += "every planted feature was found, and nothing else\n";
    }
    out + if document.clean { "no instance is left\n" } else { "" }
}

async fn left(context: &Context, run: &str) -> Result<Vec<Instance>, CliError> {
    let listed = context.cloud(local::NAME)?.broker.list().await?;
    Ok(listed.into_iter().filter(|instance| instance.tag().is_some_and(|tag| tag.run == run)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(systematic: &[usize], others: &[usize]) -> Results {
        let feature = |dim: &usize, systematic: bool| {
            serde_json::json!({
                "dim": dim, "n_layers": 1, "n_sites": 1, "layer_fraction": 0.5, "site_fraction": 0.5, "n_positions": 1,
                "position_fraction": 0.5, "occurrences": 1, "positive": 1, "sided": "pos", "max": 7.0, "min": 0.0,
                "max_abs": 7.0, "systematic_by_layers": systematic, "systematic_by_sites": false,
                "sequences_systematic_by_layers": 0, "sequences_systematic_by_sites": 0,
                "layers_before_attention": [], "layers_before_mlp": [],
            })
        };
        let features: Vec<_> =
            systematic.iter().map(|d| feature(d, true)).chain(others.iter().map(|d| feature(d, false))).collect();
        serde_json::from_value(serde_json::json!({
            "schema": 1, "model": "m", "thresholds": {}, "n_layers": 1, "n_sites": 2, "hidden": 8, "sequences": 1,
            "tokens_per_sequence": 2, "verdicts": [], "features": features, "per_sequence": [], "sites": [],
            "total_occurrences": 0, "max_abs": 7.0, "perplexity": null,
        }))
        .unwrap()
    }

    fn planted() -> Planted {
        serde_json::from_str(
            r#"{"schema":1,"systematic":[{"dim":1,"sites":[[0,0]],"factor":16.0},{"dim":2,"sites":[[0,1]],"factor":8}],
                "decoys":[{"dim":3,"sites":[],"factor":4.0,"why":"too few layers"}]}"#,
        )
        .unwrap()
    }

    #[test]
    fn only_the_exact_planted_features_pass() {
        let right = |found: &[usize], others: &[usize]| {
            compare(&planted(), &results(found, others)).iter().all(|line| line.expected == line.found)
        };
        assert!(right(&[1, 2], &[3]));
        assert!(right(&[2, 1], &[]), "a decoy need not be seen at all");
        assert!(!right(&[1], &[3]), "one is missing");
        assert!(!right(&[1], &[2, 3]), "one is seen but not called systematic");
        assert!(!right(&[1, 2, 3], &[]), "a decoy is called systematic");
        assert!(!right(&[1, 2, 7], &[3]), "one that nobody planted");
    }
}
