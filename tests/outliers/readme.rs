//! Runs the commands of README.md on a fake cloud and on this machine, with a small text added,
//! and answers to their questions.

use std::fs;

use outliers_clouds::dialect::runpod::RunPod;
use outliers_clouds::{FakeCloud, Gpu, Op, Stock};
use outliers_tests::context::{Said, TestContext};
use outliers_tests::hub::{MockHub, Repo};
use outliers_tests::programs::{golden, run_worker};
use serde_json::json;

use super::clouds::{CloudContext, nothing_left};
use super::docs::{commands, readme};

/// The README's two models, as fixtures of their families.
const MODELS: [(&str, &str); 2] = [("allenai/OLMoE-1B-7B-0125", "olmoe-bf16"), ("Qwen/Qwen3-30B-A3B", "qwen3-moe")];

const SMALL: [&str; 4] = ["--num-sequences", "2", "--sequence-length", "32"];

/// A hub with these models.
fn hub() -> MockHub {
    MockHub::start(MODELS.map(|(id, fixture)| Repo::new(id, &golden(fixture).join("model")))).unwrap()
}

/// The code block of README.md with this text in it.
fn block(with: &str) -> String {
    let mut blocks = readme().blocks().into_iter().map(|(_, block)| block);
    blocks.find(|block| block.contains(with)).unwrap_or_else(|| panic!("README.md has no `{with}`"))
}

fn typed(context: &TestContext, command: &[String], more: &[&str]) -> Said {
    context.run(command[1..].iter().map(String::as_str).chain(more.iter().copied()))
}

#[test]
fn readme_cloud_commands_list_rent_and_terminate() {
    let (hub, cloud) = (hub(), FakeCloud::start(RunPod::default()));
    let mut place = CloudContext::new(&[&cloud]);
    place.context = std::mem::take(&mut place.context).with("HF_ENDPOINT", &hub.url());
    if place.host(&cloud).is_none() {
        return;
    }
    cloud.state().stock = vec![Stock::plain("1001", Gpu::A100, 1, 1.5), Stock::plain("1002", Gpu::H100, 1, 3.0)];
    let lines = commands(&block("export RUNPOD_API_KEY"));
    let verbs: Vec<&str> = lines.iter().map(|line| line[1].as_str()).collect();
    // `worker build` downloads a compiler for GPUs: tests/gpu.sh runs it.
    assert_eq!(verbs, ["worker", "offers", "deploy", "compare"]);

    let offers = typed(&place.context, &lines[1], &[]).ok();
    assert!(offers.stdout.contains("A100") && offers.stdout.contains("runpod"), "{offers:?}");
    assert_eq!(cloud.state().count(Op::Create), 0);
    let more = [&SMALL[..], &["-y", "--devices", "cpu"]].concat();
    let deployed = typed(&place.context, &lines[2], &more).ok();
    assert!(deployed.stdout.contains("unique features, by layers"), "{deployed:?}");
    assert_eq!(cloud.state().count(Op::Create), 1);
    nothing_left(&cloud);
    assert_eq!(place.context.results().model, MODELS[0].0);
    let _ = typed(&place.context, &lines[3], &[]).ok();
    assert!(fs::read_to_string(place.context.work().join("report.html")).unwrap().contains(MODELS[0].0));

    let glance = commands(&block("outliers offers --gpu-filter H100"));
    let offers = glance.iter().find(|line| line[1] == "offers").unwrap();
    let offers = typed(&place.context, offers, &[]).ok();
    assert!(offers.stdout.contains("H100") && !offers.stdout.contains("A100"), "{offers:?}");
    assert_eq!(cloud.state().count(Op::Create), 1);
}

#[test]
fn readme_survey_is_planned_run_and_compared() {
    let (hub, context) = (hub(), TestContext::new());
    let settings = context.work().join("settings.toml");
    fs::write(&settings, "[survey]\nstagger-seconds = 0\n").unwrap();
    let context = context.with("HF_ENDPOINT", &hub.url()).with("OUTLIERS_CONFIG", settings.to_str().unwrap());
    let (survey, small) = (block("name = \"two\""), "num-sequences = 2\nsequence-length = 32");
    assert!(MODELS.iter().all(|(id, _)| survey.contains(id)), "{survey}");
    fs::write(context.work().join("two.toml"), survey.replace("dataset = \"fineweb-edu\"", small)).unwrap();

    let lines = commands(&block("outliers survey two.toml"));
    let words: Vec<&str> = lines.iter().map(|line| line[1].as_str()).collect();
    assert_eq!(words, ["survey", "survey", "compare"]);
    let plan = typed(&context, &lines[0], &[]).ok();
    assert!(plan.stdout.contains("budget $5.00") && plan.stdout.contains("Qwen3-30B-A3B"), "{plan:?}");
    assert!(context.bill().entries.is_empty(), "a dry run rents nothing");
    let done = typed(&context, &lines[1], &["-y"]).ok();
    assert!(done.stdout.contains("2 of 2 complete"), "{done:?}");
    let _ = typed(&context, &lines[2], &[]).ok();
    let page = fs::read_to_string(context.work().join("report.html")).unwrap();
    assert!(MODELS.iter().all(|(id, _)| page.contains(id)), "both models");
    context.assert_nothing_left();
}

#[test]
fn readme_command_overview_works_as_described() {
    let (hub, context) = (hub(), TestContext::new());
    let context = context.with("HF_ENDPOINT", &hub.url());
    let model = golden(MODELS[0].1).join("model");
    let survey = format!("name = \"one\"\nnum-sequences = 2\nsequence-length = 32\nmodels = [{model:?}]\n");
    fs::write(context.work().join("one.toml"), survey).unwrap();
    let feature = json!({"feature_dim": 7, "layer_percentage": 0.5, "seq_percentage": 0.25, "max_magnitude": 17.0});
    let old = json!({
        "analysis_summary": {"total_batches": 1, "total_sequences": 1, "total_systematic_outliers": 1},
        "run_config": {"model": "a/b", "sequence_length": 2048, "batch_size": 1, "threshold": 6.0},
        "batch_results": [{"sequences_processed": 1, "systematic_outliers": [feature]}],
    });
    fs::create_dir(context.work().join("old")).unwrap();
    fs::write(context.work().join("old/final_analysis_results.json"), old.to_string()).unwrap();

    let mut run = Vec::new();
    for line in commands(&block("outliers inspect --model ID")) {
        let (program, verb) = (line[0].as_str(), line[1].clone());
        let stands_for = |word: &String| match word.as_str() {
            "ID" => MODELS[0].0.to_owned(),
            "FILE" => "one.toml".to_owned(),
            "FOLDER" if verb == "import" => "old".to_owned(),
            "FOLDER" => model.to_str().unwrap().to_owned(),
            _ => word.clone(),
        };
        let words: Vec<String> = line.iter().map(stands_for).collect();
        let more: &[&str] = match verb.as_str() {
            "analyze" | "deploy" => &SMALL,
            "survey" => &["-y"],
            _ => &[],
        };
        match (program, verb.as_str()) {
            ("outliers-worker", _) => assert!(run_worker(&words[1..]).status.success(), "{words:?}"),
            // .ci/run runs the README's first command; for offers see above.
            (_, "demo" | "offers") => continue,
            _ => drop(typed(&context, &words, more).ok()),
        }
        run.push(verb);
    }
    assert!(run.len() >= 15, "{run:?}");
    assert_eq!(context.bill().entries.len(), 1, "the survey's; a dry run rents nothing");
    context.assert_nothing_left();
}
