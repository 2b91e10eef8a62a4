//! `outliers survey` on the local broker: one tiny checkpoint per family of the nine-model survey,
//! real processes, real kills.

use std::path::{Path, PathBuf};
use std::process::Child;

use outliers::cloud::broker::InstanceState;
use outliers::cloud::broker::local::Bill;
use outliers_tests::browser::{Browser, plots};
use outliers_tests::context::{Said, TestContext};
use outliers_tests::programs::golden;
use serde_json::Value;

/// The nine-model survey's models, in order, as fixtures of their families.
const NINE: [&str; 9] = [
    "qwen3-moe",
    "gpt-oss-mxfp4",
    "olmoe-bf16",
    "glm4-moe",
    "llama4-maverick",
    "llama4-scout",
    "deepseek-v31-fp8",
    "deepseek-v3-fp8",
    "kimi-k2-fp8",
];

/// The model that must fail.
const BROKEN: &str = "olmoe-bf16";

/// A context with copies of these models in their own folders, and a survey of them.
fn context(models: &[&str]) -> TestContext {
    let context = TestContext::new();
    for model in models {
        copy(&golden(model).join("model"), &context.work().join("models").join(model));
    }
    let list: Vec<String> = models.iter().map(|model| format!("\"./models/{model}\"")).collect();
    let text = format!(
        "name = \"nine\"\nnum_sequences = 4\nsequence_length = 32\nprecision = \"f32\"\nmodels = [{}]\n",
        list.join(", ")
    );
    std::fs::write(context.work().join("nine.toml"), text).unwrap();
    std::fs::write(context.work().join("settings.toml"), "[survey]\nstagger-seconds = 0\n").unwrap();
    context
}

fn copy(from: &Path, into: &Path) {
    std::fs::create_dir_all(into).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), into.join(entry.file_name())).unwrap();
    }
}

fn survey<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let arguments = ["survey", "nine.toml", "--config", "settings.toml", "--max-parallel", "2"];
    arguments.iter().chain(more).copied().collect()
}

/// NaN values in place of a model's weights; headers are unchanged.
fn spoil(context: &TestContext, model: &str) -> PathBuf {
    let weights = context.work().join("models").join(model).join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..].fill(0xff);
    std::fs::write(&weights, bytes).unwrap();
    weights
}

/// Name, outcome and reason of each model in the index.
fn index(context: &TestContext) -> Vec<(String, String, String)> {
    let text = std::fs::read(context.work().join("remote_results/nine/index.json")).unwrap();
    let index: Value = serde_json::from_slice(&text).unwrap();
    let word = |line: &Value, key: &str| line[key].as_str().unwrap_or_default().to_owned();
    let line = |line: &Value| (word(line, "name"), word(line, "outcome"), word(line, "why"));
    index["models"].as_array().unwrap().iter().map(line).collect()
}

fn compare(context: &TestContext, more: &[&str]) -> Said {
    context.run(["compare", "remote_results/nine", "--format", "json"].iter().chain(more))
}

/// The page of all nine, in a browser.
fn read_page(context: &TestContext) {
    let page = ["compare", "remote_results/nine", "--html", "page.html", "--svg", "plots", "--png", "pictures"];
    let _ = context.run(page).ok();
    let drawn = plots(&context.work().join("plots"));
    assert_eq!(drawn, plots(&context.work().join("pictures")));
    let (page, keep) = (context.work().join("page.html"), std::env::var_os("OUTLIERS_KEEP_PAGE"));
    if let Some(folder) = keep {
        std::fs::copy(&page, Path::new(&folder).join("nine.html")).unwrap();
    }
    match Browser::find() {
        Some(browser) => browser.assert_readable(&page, "Outlier features in 9 results", &drawn),
        None => outliers_tests::not_checked("how the page looks: no Chromium is installed"),
    }
}

/// Kills the controller while instances are running. It is stopped first, so that the state does
/// not change. All instances are up: one that was not started would be billed and replaced.
fn kill_in_the_midst(context: &TestContext, controller: &mut Child) {
    context.wait_for("the survey to be in its midst", || {
        signal(controller, "STOP");
        let Bill { entries, running } = context.bill();
        let are_up = running.iter().all(|instance| matches!(instance.state, InstanceState::Ready(_)));
        let in_the_midst = entries.len() >= 2 && !running.is_empty() && are_up;
        if !in_the_midst {
            signal(controller, "CONT");
        }
        in_the_midst
    });
    controller.kill().unwrap();
    controller.wait().unwrap();
}

fn signal(child: &Child, name: &str) {
    let sent = std::process::Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status();
    assert!(sent.unwrap().success());
}

/// Parallel 2, one failing model, the controller killed in mid-run.
#[test]
fn survey_with_a_broken_model_survives_controller_death() {
    let context = context(&NINE);
    let weights = spoil(&context, BROKEN);
    let plan = context.run(survey(&["--dry-run"])).ok();
    assert!(NINE.iter().all(|model| plan.stdout.contains(model)) && plan.stdout.contains("at most"), "{plan:?}");
    assert!(context.bill().entries.is_empty() && !context.work().join("remote_results").exists());

    let mut controller = context.start(survey(&[]));
    context.wait_for("the survey to begin", || !context.bill().running.is_empty());
    let busy = context.run(survey(&[]));
    assert!(busy.code == Some(2) && busy.stderr.contains("another process"), "{busy:?}");
    kill_in_the_midst(&context, &mut controller);
    assert!(context.bill().running.len() <= 2, "{:?}", context.bill().running);
    let status = context.json(&["status"]);
    let alone = |run: &Value| run["looked_after"] == Value::Bool(false) && run["survey"] == "nine";
    assert!(status["under_way"].as_array().unwrap().iter().any(alone), "{status}");
    let written = context.run(["handoff"]).ok().stdout;
    let handoff = std::fs::read_to_string(written.trim()).unwrap();
    let command = format!("outliers survey {}", context.work().join("nine.toml").display());
    assert!(handoff.contains(&command) && handoff.contains("NOBODY"), "{handoff}");

    let said = context.run(survey(&[]));
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stderr.contains("Picking up run") && said.stdout.contains("8 of 9 complete"), "{said:?}");
    assert!(said.stdout.contains("holds NaN") && said.stderr.contains("--rerun-failed"), "{said:?}");
    context.assert_nothing_left();
    assert_eq!(context.bill().entries.len(), 9, "what was left was picked up: nothing was rented twice");
    for (name, outcome, why) in index(&context) {
        let failed = name == BROKEN;
        assert_eq!(outcome, if failed { "partial" } else { "complete" }, "{name}: {why}");
        assert_eq!(why.contains("holds NaN"), failed, "{name}: {why}");
    }
    let partial = compare(&context, &[]);
    assert!(partial.code == Some(1) && partial.stderr.contains(BROKEN), "{partial:?}");
    let _ = compare(&context, &["--allow-partial"]).ok();

    let again = context.run(survey(&[]));
    assert_eq!(
        (again.code, context.bill().entries.len()),
        (Some(1), 9),
        "what failed waits to be asked for: {again:?}"
    );

    copy(&golden(BROKEN).join("model"), weights.parent().unwrap());
    let mended = context.run(survey(&["--rerun-failed"])).ok();
    assert!(mended.stdout.contains("9 of 9 complete"), "{mended:?}");
    assert_eq!(context.bill().entries.len(), 10, "only what failed was run again");
    assert!(index(&context).iter().all(|(_, outcome, _)| outcome == "complete"));
    let compared: Value = serde_json::from_str(&compare(&context, &[]).ok().stdout).unwrap();
    assert_eq!(compared["models"].as_array().unwrap().len(), 9);

    read_page(&context);

    let handoff = std::fs::read_to_string(context.run(["handoff"]).ok().stdout.trim()).unwrap();
    assert!(handoff.contains("outliers compare ") && !handoff.contains("holds NaN"), "{handoff}");

    let document = context.json(&survey(&["--rerun-failed"]));
    assert_eq!(
        (&document["exit_status"], context.bill().entries.len()),
        (&Value::from(0), 10),
        "nothing is left to do"
    );
    assert!(
        document["models"].as_array().unwrap().iter().all(|model| model["figures"]["perplexity"].is_number()),
        "{document}"
    );
    context.assert_nothing_left();
    let status = context.run(["status"]).ok().stdout;
    assert!(status.contains("nothing is under way") && status.contains("nine"), "{status}");
    assert!(!status.contains("may still cost"), "{status}");
}

/// The state after a controller was killed between recording an instance and starting it. Only
/// this machine can be rented.
#[test]
fn instance_that_never_starts_is_replaced() {
    let context = context(&NINE[..1]);
    let mut controller = context.start(survey(&[]));
    context.wait_for("an instance", || !context.bill().running.is_empty());
    controller.kill().unwrap();
    controller.wait().unwrap();
    let instance = context.state().join("local/instances").join(&context.bill().running[0].id.0);
    let ready = instance.join("ready.json");
    // It may have been started.
    context.wait_for("it to be up", || {
        ready.exists() || !matches!(context.bill().running[0].state, InstanceState::Booting)
    });
    if let Ok(text) = std::fs::read_to_string(&ready) {
        let ready: Value = serde_json::from_str(&text).unwrap();
        let killed = std::process::Command::new("kill").args(["-KILL", &ready["pid"].to_string()]).status();
        assert!(killed.unwrap().success());
        std::fs::remove_file(instance.join("ready.json")).unwrap();
    }
    let mut record: Value = serde_json::from_slice(&std::fs::read(instance.join("instance.json")).unwrap()).unwrap();
    record["created_at"] = (record["created_at"].as_u64().unwrap() - 1000).into();
    std::fs::write(instance.join("instance.json"), record.to_string()).unwrap();
    context.wait_for("its state", || context.bill().running[0].state == InstanceState::Stopped);

    let said = context.run(survey(&[])).ok();
    assert!(said.stdout.contains("1 of 1 complete"), "{said:?}");
    assert_eq!(context.bill().entries.len(), 2);
    context.assert_nothing_left();
}

/// A run with valid records and hashes in its results is not rented again.
#[test]
fn survey_resumes_from_index_and_results_without_a_ledger() {
    let context = context(&NINE[..3]);
    let weights = spoil(&context, BROKEN);
    let first = context.run(survey(&[]));
    assert!(first.code == Some(1) && first.stdout.contains("2 of 3 complete"), "{first:?}");
    let rented = context.bill().entries.len();
    for end in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(context.state().join(format!("ledger.db{end}")));
    }
    std::fs::remove_dir_all(context.state().join("runs")).unwrap();
    let again = context.run(survey(&[]));
    assert!(again.code == Some(1) && again.stdout.contains("2 of 3 complete"), "{again:?}");
    assert_eq!(context.bill().entries.len(), rented, "nothing was rented again: {again:?}");
    assert_eq!(index(&context).iter().map(|line| line.1.as_str()).filter(|outcome| *outcome == "complete").count(), 2);
    copy(&golden(BROKEN).join("model"), weights.parent().unwrap());
    let mended = context.run(survey(&["--rerun-failed"])).ok();
    assert!(mended.stdout.contains("3 of 3 complete"), "{mended:?}");
    assert_eq!(context.bill().entries.len(), rented + 1, "only what failed was run again");
    // Altered results are neither trusted nor overwritten.
    std::fs::remove_file(context.state().join("ledger.db")).unwrap();
    for end in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(context.state().join(format!("ledger.db{end}")));
    }
    std::fs::write(context.work().join("remote_results/nine").join(NINE[0]).join("results.json"), "{}").unwrap();
    let damaged = context.run(survey(&[]));
    assert!(damaged.code == Some(2) && damaged.stderr.contains("holds results of other work"), "{damaged:?}");
    context.assert_nothing_left();
}

#[test]
fn model_beyond_the_whole_budget_is_refused_before_renting() {
    let context = context(&NINE[..1]);
    for dry in [&["--dry-run"][..], &[]] {
        let said = context.run(survey(&[&["--max-duration", "100h", "--budget", "0.01"][..], dry].concat()));
        assert_eq!(said.code, Some(4), "{said:?}");
        let words = said.stdout + &said.stderr;
        assert!(words.contains(NINE[0]) && words.contains("--budget allows $0.01"), "{words}");
    }
    assert!(context.bill().entries.is_empty() && context.bill().running.is_empty());
    context.assert_nothing_left();
}

#[test]
fn survey_without_results_suggests_logs_and_no_comparison() {
    let context = context(&[BROKEN]);
    let weights = spoil(&context, BROKEN);
    let settings = "results = \"my results\"\n[survey]\nstagger-seconds = 0\n";
    std::fs::write(context.work().join("settings.toml"), settings).unwrap();
    let said = context.run(survey(&[]));
    assert!(said.code == Some(1) && said.stdout.contains("0 of 1 complete"), "{said:?}");
    assert!(!said.stdout.contains("outliers compare") && said.stderr.contains("--rerun-failed"), "{said:?}");
    let (_, command) = said.stdout.split_once("outliers runs logs ").expect("it is suggested");
    let log = context.run(["runs", "logs", command.trim()]).ok();
    assert!(log.stdout.contains("holds NaN"), "{log:?}");
    copy(&golden(BROKEN).join("model"), weights.parent().unwrap());
    let mended = context.run(survey(&["--rerun-failed"])).ok();
    let (_, command) = mended.stdout.split_once("side by side: ").expect("there is something to compare");
    assert!(command.ends_with("my results/nine'\n"), "a folder with a space is quoted: {mended:?}");
    context.assert_nothing_left();
}

#[test]
fn interrupt_ends_all_runs_and_the_same_command_resumes() {
    let context = context(&NINE[..4]);
    let mut controller = context.start(survey(&[]));
    context.wait_for("two instances", || context.bill().running.len() == 2);
    signal(&controller, "INT");
    let code = controller.wait().unwrap().code();
    assert_eq!(code, Some(130), "{}", context.stderr());
    context.assert_nothing_left();
    assert!(context.bill().entries.len() < 4, "what had not begun does not begin");
    let said = context.run(survey(&["--only", "qwen3-moe,./models/glm4-moe"])).ok();
    assert!(said.stdout.contains("2 of 2 complete"), "{said:?}");
    let said = context.run(survey(&[])).ok();
    assert!(said.stdout.contains("4 of 4 complete"), "{said:?}");
    context.assert_nothing_left();
}

#[test]
fn all_survey_errors_are_reported_together_before_renting() {
    let context = context(&NINE[..3]);
    for model in &NINE[..2] {
        let config = context.work().join("models").join(model).join("config.json");
        let text = std::fs::read_to_string(&config).unwrap().replace("ForCausalLM", "ForNobody");
        std::fs::write(config, text).unwrap();
    }
    let said = context.run(survey(&[]));
    assert_eq!(said.code, Some(2), "{said:?}");
    let named = NINE[..2].iter().all(|model| said.stderr.contains(&format!("{model}: ")));
    assert!(named && said.stderr.contains("nothing was rented"), "{said:?}");
    assert!(context.bill().entries.is_empty() && context.bill().running.is_empty());
    let unknown = context.run(survey(&["--only", "gpt-5"]));
    assert!(unknown.code == Some(2) && unknown.stderr.contains("olmoe-bf16"), "{unknown:?}");
    std::fs::write(context.work().join("nine.toml"), "name = 'nine'\nmodles = []\n").unwrap();
    let typo = context.run(survey(&[]));
    assert!(typo.code == Some(2) && typo.stderr.contains("nine.toml:2") && typo.stderr.contains("modles"), "{typo:?}");
    context.assert_nothing_left();
}

/// Start times are spread for the hub: workers that do not use it start at once.
#[test]
fn workers_without_hub_weights_start_without_throttling() {
    let context = context(&["llama-f32", "qwen3"]);
    std::fs::write(context.work().join("settings.toml"), "[survey]\nstagger-seconds = 3600\n").unwrap();
    let mut controller = context.start(survey(&[]));
    context.wait_for("the survey to end", || controller.try_wait().unwrap().is_some());
    assert_eq!(controller.wait().unwrap().code(), Some(0), "{}", context.stderr());
    assert!(context.stdout().contains("2 of 2 complete"), "{}", context.stdout());
    assert!(!context.stderr().contains("for its turn"), "{}", context.stderr());
    context.assert_nothing_left();
}
