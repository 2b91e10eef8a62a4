//! `outliers deploy` on the local broker: real processes, real SSH, real checkpoints.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use outliers_protocol::files;
use outliers_tests::context::TestContext;
use outliers_tests::golden::{assert_activations_equal, assert_statistics_equal};
use outliers_tests::hub::{MockHub, Repo};
use outliers_tests::programs::{golden, goldens, run_worker};

fn text(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_owned()
}

/// `deploy` of a fixture's model over its own token ids.
fn fixture(name: &str, more: &[&str]) -> Vec<String> {
    let folder = golden(name);
    let mut arguments = vec!["deploy".to_owned(), "--model".to_owned(), text(&folder.join("model"))];
    arguments.extend(["--token-ids".to_owned(), text(&folder.join("golden.safetensors"))]);
    arguments.extend(["-y", "--precision", "f32"].into_iter().chain(more.iter().copied()).map(str::to_owned));
    arguments
}

/// Sequences of a slow deploy.
pub(super) const SLOW: usize = 60;

/// A deploy that takes some seconds. What needs longer than a moment in its midst halts the worker
/// meanwhile (see [`signal_worker`]).
pub(super) fn slow_deploy(context: &TestContext) -> Vec<String> {
    let model = context.work().join("model");
    if !model.exists() {
        assert!(run_worker(["demo-model", "--output", &text(&model)]).status.success());
    }
    let (model, sequences) = (text(&model), SLOW.to_string());
    let arguments = ["deploy", "--model", &model, "--num-sequences", &sequences, "--sequence-length", "512", "-y"];
    arguments.map(str::to_owned).to_vec()
}

pub(super) fn signal(child: &Child, signal: i32) {
    let pid = i32::try_from(child.id()).expect("a pid");
    let sent = Command::new("kill").args([format!("-{signal}"), pid.to_string()]).status().unwrap();
    assert!(sent.success());
}

/// Folders of the runs on all instances.
fn run_folders(context: &TestContext) -> Vec<PathBuf> {
    let below = |folder: PathBuf| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
        entries.map(|entry| entry.path()).collect()
    };
    let instances = below(context.state().join("local/instances")).into_iter();
    instances.flat_map(|instance| below(instance.join("home/outliers"))).collect()
}

/// Whether the worker of the only run has done its first layer, and said so.
pub(super) fn worker_is_busy(context: &TestContext) -> bool {
    let log = |run: &PathBuf| std::fs::read_to_string(run.join(files::LOG)).unwrap_or_default();
    run_folders(context).iter().any(|run| log(run).contains("layer 1/8"))
}

/// Halts the worker of the only run (`STOP`), so that it stays where it is however slow this
/// machine is, or lets it go on (`CONT`).
pub(super) fn signal_worker(context: &TestContext, name: &str) {
    let runs = run_folders(context);
    let pid = runs.iter().find_map(|run| std::fs::read_to_string(run.join(files::PID)).ok()).expect("a worker");
    // Its wrapper leads a group.
    let group = format!("-{}", pid.lines().next().expect("the wrapper's number"));
    let sent = Command::new("kill").args([format!("-{name}").as_str(), "--", &group]).status().unwrap();
    assert!(sent.success());
}

#[test]
fn earlier_runs_of_the_same_job_are_named_before_renting() {
    let context = TestContext::new();
    let first = context.run(fixture("llama-f32", &["--num-sequences", "1"])).ok();
    assert!(!first.stderr.contains("of the same job"), "{first:?}");
    let again = context.run(fixture("llama-f32", &["--num-sequences", "1", "--dry-run"])).ok();
    let folder = context.results_folder();
    let said = format!("of the same job is complete: {}", folder.display());
    assert!(again.stderr.contains(&said), "{again:?}");
    let other = context.run(fixture("llama-f32", &["--num-sequences", "2", "--dry-run"])).ok();
    assert!(!other.stderr.contains("of the same job"), "{other:?}");
}

#[test]
fn held_instance_can_be_shown_and_entered_by_ssh() {
    let context = TestContext::new();
    let _ = context.run(fixture("llama-f32", &["--keep-running", "--num-sequences", "1"])).ok();
    let listed = context.json(&["instances", "list"]);
    let id = listed["instances"][0]["id"].as_str().expect("it is kept").to_owned();
    let shown = context.run(["instances", "show", &id]).ok();
    assert!(shown.stdout.contains("held") && shown.stdout.contains("deadline"), "{shown:?}");
    assert!(shown.stdout.lines().next().unwrap().contains(&id), "no header without words: {shown:?}");
    let command = context.run(["instances", "ssh", &id]).ok().stdout;
    assert_eq!(context.run(["instances", "ssh", &id[..5]]).ok().stdout, command, "the beginning is enough");
    // A shell of the instance, without the test's environment variables.
    let script = format!("{} -c 'pwd; echo ${{OUTLIERS_STATE-none}}'", command.trim());
    let said = Command::new("sh").args(["-c", &script]).env("OUTLIERS_STATE", "ours").output().unwrap();
    let text = String::from_utf8_lossy(&said.stdout);
    assert!(text.contains(&format!("{id}/home\n")) && text.ends_with("none\n"), "{command}: {said:?}");
    let stranger = context.run(["instances", "ssh", "i-nobody"]);
    assert!(stranger.code == Some(2) && stranger.stderr.contains("no instance"), "{stranger:?}");
    let _ = context.run(["instances", "terminate", &id, "-y"]).ok();
    context.assert_nothing_left();
}

#[test]
fn demo_finds_exactly_the_planted_features() {
    let context = TestContext::new();
    let said = context.run(["demo"]).ok();
    for dim in ["17", "42", "83", "101"] {
        assert!(said.stdout.contains(dim), "{}", said.stdout);
    }
    context.assert_nothing_left();
    let bill = context.bill();
    assert_eq!(bill.entries.len(), 1);
    assert!(bill.entries[0].cost.micros() > 0);
}

#[test]
fn deployed_fixture_equals_the_reference() {
    for name in goldens() {
        let context = TestContext::new();
        let _ = context.run(fixture(&name, &["--save-activations", "activations.safetensors"])).ok();
        let (home, reference) = (context.results_folder(), golden(&name));
        assert_activations_equal(&reference.join("golden.safetensors"), &home.join("activations.safetensors"));
        assert_statistics_equal(&reference.join("outliers.json"), &context.results());
        for file in [files::METADATA, files::STATISTICS, files::MANIFEST, files::LOG, files::PROGRESS] {
            assert!(home.join(file).exists(), "{name}: {file} did not come home");
        }
        let progress = std::fs::read_to_string(home.join(files::PROGRESS)).unwrap();
        assert!(progress.contains("parts of the vocabulary"), "{name}: how far perplexity is: {progress}");
        context.assert_nothing_left();
        assert_eq!(context.bill().entries.len(), 1, "{name}");
    }
}

#[test]
fn dry_run_rents_nothing() {
    let context = TestContext::new();
    let said = context.run(fixture("olmoe-bf16", &["--dry-run"])).ok();
    assert!(said.stdout.contains("local"), "{}", said.stdout);
    assert!(context.bill().entries.is_empty());
    assert!(!context.work().join("remote_results").exists());
    context.assert_nothing_left();
}

#[test]
fn shown_amount_suffices_as_budget_and_a_dry_run_refuses_less() {
    let context = TestContext::new();
    let deploy = |more: &[&str]| context.run(fixture("llama-f32", &[&["--max-duration", "100h"][..], more].concat()));
    let plan: serde_json::Value = serde_json::from_str(&deploy(&["--dry-run", "--json"]).ok().stdout).unwrap();
    let shown = plan["at_most"].as_i64().expect("millionths of a dollar");
    let budget = |micros: i64| format!("{:.2}", micros as f64 / 1e6);
    let (enough, little) = (budget(shown), budget(shown - 10_000));
    for dry in [&["--dry-run"][..], &[]] {
        let said = deploy(&[dry, &["--budget", &little]].concat());
        assert_eq!(said.code, Some(4), "{said:?}");
        assert!(said.stderr.contains(&format!("--budget allows ${little}")), "{said:?}");
        assert!(said.stderr.contains("--max-duration reserves less"), "{said:?}");
    }
    assert!(context.bill().entries.is_empty() && !context.work().join("remote_results").exists());
    for dry in [&["--dry-run"][..], &[]] {
        let _ = deploy(&[dry, &["--budget", &enough]].concat()).ok();
    }
    context.assert_nothing_left();
    assert_eq!(context.bill().entries.len(), 1);
}

#[test]
fn filter_that_removed_every_offer_is_named() {
    let context = TestContext::new();
    let said = context.run(fixture("llama-f32", &["--max-price", "0.000001"]));
    assert_eq!(said.code, Some(3), "{said:?}");
    assert!(said.stderr.contains("--max-price"), "{}", said.stderr);
    let said = context.run(fixture("llama-f32", &["--min-cpu-ram", "1000000"]));
    assert_eq!(said.code, Some(3), "{said:?}");
    assert!(said.stderr.contains("--min-cpu-ram"), "{}", said.stderr);
    if Command::new("nvidia-smi").output().is_err() {
        let said = context.run(fixture("llama-f32", &["--gpu-filter", "A100"]));
        assert_eq!(said.code, Some(3), "{said:?}");
        assert!(said.stderr.contains("--gpu-filter"), "{}", said.stderr);
    }
    assert!(context.bill().entries.is_empty());
    context.assert_nothing_left();
}

#[test]
fn same_command_resumes_the_run_of_a_killed_controller() {
    let context = TestContext::new();
    let arguments = slow_deploy(&context);
    let mut controller = context.start(&arguments);
    context.wait_for("the worker to be busy", || worker_is_busy(&context));
    controller.kill().unwrap();
    controller.wait().unwrap();
    assert_eq!(context.bill().running.len(), 1, "the instance outlives its controller");
    let shown = context.run(["runs", "show", "last"]).ok();
    assert!(shown.stdout.contains(&context.bill().running[0].id.0), "{}", shown.stdout);
    let said = context.run(&arguments).ok();
    assert_eq!(context.results().sequences, SLOW, "{said:?}");
    context.assert_nothing_left();
    assert_eq!(context.bill().entries.len(), 1, "the same instance, rented once");
}

#[test]
fn second_interrupt_skips_only_saving_results() {
    for interrupts in [1, 2] {
        let context = TestContext::new();
        let mut controller = context.start(slow_deploy(&context));
        context.wait_for("the worker to be busy", || worker_is_busy(&context));
        for _ in 0..interrupts {
            signal(&controller, 2);
            context.wait_for("the interrupt to be heard", || context.stderr().contains("Stopping"));
        }
        let code = controller.wait().unwrap().code();
        assert_eq!(code, Some(130), "{}", context.stderr());
        context.assert_nothing_left();
        assert_eq!(context.bill().entries.len(), 1);
        if interrupts == 1 {
            let log = std::fs::read_to_string(context.results_folder().join(files::LOG)).unwrap();
            assert!(log.contains("layer 1/8"), "what there is came home: {log}");
        }
    }
}

#[test]
fn attach_resumes_a_killed_controllers_run_and_its_log() {
    let context = TestContext::new();
    let mut controller = context.start([slow_deploy(&context), vec!["-v".to_owned()]].concat());
    context.wait_for("the worker to be busy", || worker_is_busy(&context));
    signal_worker(&context, "STOP");
    context.wait_for("the worker to be heard", || context.stderr().contains("layer 1/8"));
    let refused = context.run(["attach", "last"]);
    assert!(refused.code == Some(2) && refused.stderr.contains("driven by another process"), "{refused:?}");
    controller.kill().unwrap();
    controller.wait().unwrap();
    signal_worker(&context, "CONT");
    let said = context.run(["attach", "-v"]).ok();
    assert_eq!(context.results().sequences, SLOW, "{said:?}");
    let goes_on = said.stderr.contains("layer 8/8") && !said.stderr.contains("layer 1/8");
    assert!(said.stderr.contains("Picking up run") && goes_on, "{said:?}");
    context.assert_nothing_left();
    assert_eq!(context.bill().entries.len(), 1, "the same instance, rented once");
    let nothing = context.run(["attach"]);
    assert!(nothing.code == Some(2) && nothing.stderr.contains("no run was left behind"), "{nothing:?}");
}

/// Kills processes of the only instance: all of them, or those of the worker.
fn kill_on_the_instance(context: &TestContext, worker_only: bool) {
    let id = context.bill().running[0].id.0.clone();
    let marked = format!("OUTLIERS_LOCAL_INSTANCE={id}");
    for entry in std::fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let of_worker =
            ["launch.sh", "outliers-worker"].iter().any(|word| String::from_utf8_lossy(&command).contains(word));
        if String::from_utf8_lossy(&environment).contains(&marked) && (of_worker || !worker_only) {
            let pid = entry.file_name().into_string().unwrap();
            // It may be gone already, with its parent.
            let _ = Command::new("kill").args(["-9", &pid]).output();
        }
    }
}

#[test]
fn run_completes_after_worker_or_instance_death() {
    for (worker_only, said, instances) in
        [(true, "it is started again", 1), (false, "the instance went away by itself", 2)]
    {
        let context = TestContext::new();
        let mut controller = context.start(slow_deploy(&context));
        context.wait_for("the worker to be busy", || worker_is_busy(&context));
        kill_on_the_instance(&context, worker_only);
        let code = controller.wait().unwrap().code();
        assert_eq!(code, Some(0), "{}", context.stderr());
        assert!(context.stderr().contains(said), "{}", context.stderr());
        assert_eq!(context.results().sequences, SLOW);
        context.assert_nothing_left();
        assert_eq!(context.bill().entries.len(), instances, "{said}");
    }
}

#[test]
fn cancel_from_another_process_ends_the_instance() {
    let context = TestContext::new();
    let mut controller = context.start(slow_deploy(&context));
    context.wait_for("the worker to be busy", || worker_is_busy(&context));
    let _ = context.run(["runs", "cancel", "last"]).ok();
    let code = controller.wait().unwrap().code();
    assert_eq!(code, Some(130), "{}", context.stderr());
    context.assert_nothing_left();
}

#[test]
fn held_instance_exists_until_it_is_terminated() {
    let context = TestContext::new();
    let kept = context.run(fixture("llama-f32", &["--keep-running"])).ok();
    assert_eq!(context.bill().running.len(), 1);
    let id = context.bill().running[0].id.0.clone();
    assert!(kept.stdout.contains(&format!("to end it: outliers instances terminate {id}")), "{kept:?}");
    let listed = context.run(["instances", "list"]).ok();
    assert!(listed.stdout.contains(&id), "{}", listed.stdout);
    // Another deploy does not touch it.
    let _ = context.run(fixture("llama-f32", &[])).ok();
    assert_eq!(context.bill().running.len(), 1);
    let _ = context.run(["instances", "terminate", &id, "-y"]).ok();
    context.assert_nothing_left();
}

// ------------------------------------------------------------------------------ no room at home

#[test]
fn too_little_local_disk_for_results_is_refused_before_renting() {
    let context = TestContext::new();
    let planned = fixture("llama-f32", &[]).into_iter().skip(1).filter(|word| word != "-y");
    let planned = context.run(["plan".to_owned()].into_iter().chain(planned)).ok();
    assert!(planned.stdout.contains(" at most, on this machine"), "{planned:?}");
    // Activations of eight million tokens in a model of 10^12 parameters.
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("published/Kimi-K2-Instruct");
    let rows = vec![format!("[{}1]", "0,".repeat(2047)); 4000];
    std::fs::write(context.work().join("ids.json"), format!("[{}]", rows.join(","))).unwrap();
    let job = ["--weights", "synthetic:1", "--token-ids", "ids.json", "--save-activations", "all.safetensors"];
    let said = context.run(deploy(&model, &[&job[..], &["--allow-cut-short"]].concat()));
    assert_eq!(said.code, Some(2), "{said:?}");
    for word in ["the results may need", "TiB in ", "remote_results, and ", "are free there", "make room"] {
        assert!(said.stderr.contains(word), "{word:?} is missing: {said:?}");
    }
    assert!(context.bill().entries.is_empty() && !context.work().join("remote_results").exists());
    context.assert_nothing_left();
}

/// A controller whose worker is busy, and whose results cannot be saved; with the run.
fn deployed_without_room(context: &TestContext) -> (Child, String) {
    let controller = context.start(slow_deploy(context));
    context.wait_for("the worker to be busy", || worker_is_busy(context));
    signal_worker(context, "STOP");
    let run = context.json(&["runs", "list"])["runs"][0]["id"].as_str().unwrap().to_owned();
    let results = context.work().join("remote_results");
    std::fs::remove_dir(&results).unwrap();
    std::fs::write(&results, "in the way").unwrap();
    std::fs::write(context.state().join("runs").join(&run).join(format!("work-{run}.part")), "in the way").unwrap();
    signal_worker(context, "CONT");
    context.wait_for("the results to fit nowhere", || context.stderr().contains("its results cannot be saved"));
    for word in ["keeps them until 20", "/h, $", " so far", &format!("outliers attach {run} --results DIR")] {
        assert!(context.stderr().contains(word), "{word:?} is missing: {}", context.stderr());
    }
    assert_eq!(context.bill().running.len(), 1, "they are nowhere but there");
    (controller, run)
}

fn assert_saved(context: &TestContext, run: &str) {
    let folder = context.work().join("larger").join(format!("work-{run}"));
    let results = std::fs::read(folder.join(files::RESULTS)).unwrap();
    let results: serde_json::Value = serde_json::from_slice(&results).unwrap();
    assert_eq!(results["sequences"], SLOW);
    context.assert_nothing_left();
    assert_eq!(context.bill().entries.len(), 1, "rented once");
    let late = context.run(["attach", run, "--results", "another"]);
    assert!(late.code == Some(2) && late.stderr.contains("are already saved in"), "{late:?}");
}

#[test]
fn unsaved_results_stay_on_the_instance_until_a_folder_is_named() {
    let context = TestContext::new();
    let (mut controller, run) = deployed_without_room(&context);
    let said = context.run(["attach", &run, "--results", "larger"]).ok();
    assert!(said.stderr.contains("from now on"), "{said:?}");
    assert_eq!(controller.wait().unwrap().code(), Some(0), "{}", context.stderr());
    assert_saved(&context, &run);
}

#[test]
fn unsaved_results_survive_a_killed_controller() {
    let context = TestContext::new();
    let (mut controller, run) = deployed_without_room(&context);
    controller.kill().unwrap();
    controller.wait().unwrap();
    assert_eq!(context.bill().running.len(), 1);
    let said = context.run(["attach", "--results", "larger"]).ok();
    assert!(said.stderr.contains("Picking up run") && said.stdout.contains("larger"), "{said:?}");
    assert_saved(&context, &run);
}

/// A disk of its own for a folder, as long as this lives.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None`, after saying so, where nothing can be mounted.
    fn on(folder: PathBuf, mib: u32) -> Option<Self> {
        std::fs::create_dir_all(&folder).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"]).arg(&folder);
        if mount.output().is_ok_and(|output| output.status.success()) {
            return Some(Self(folder));
        }
        outliers_tests::not_checked("no tmpfs can be mounted");
        None
    }

    fn fill(&self) {
        let mut file = std::fs::File::create(self.0.join("ballast")).unwrap();
        let full = std::io::copy(&mut std::io::repeat(1), &mut file).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull, "{full}");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn results_are_saved_beside_the_ledger_when_the_disk_fills() {
    let context = TestContext::new();
    let Some(disk) = SmallDisk::on(context.work().join("remote_results"), 256) else { return };
    let mut controller = context.start(slow_deploy(&context));
    context.wait_for("the worker to be busy", || worker_is_busy(&context));
    signal_worker(&context, "STOP");
    disk.fill();
    signal_worker(&context, "CONT");
    assert_eq!(controller.wait().unwrap().code(), Some(0), "{}", context.stderr());
    let run = context.json(&["runs", "list"])["runs"][0]["id"].as_str().unwrap().to_owned();
    let folder = context.state().join("runs").join(&run).join(format!("work-{run}"));
    assert!(folder.join(files::RESULTS).exists(), "{}", context.stderr());
    assert!(context.stdout().contains(&text(&folder)), "it says where: {}", context.stdout());
    let left = std::fs::read_dir(context.work().join("remote_results")).unwrap().count();
    assert_eq!(left, 1, "nothing but the ballast");
    context.assert_nothing_left();
}

// ------------------------------------------------------------------------------ on this machine

/// `analyze` of a fixture's model over its own token ids.
fn analyze(name: &str, more: &[&str]) -> Vec<String> {
    let words = fixture(name, more).into_iter().skip(1).filter(|word| word != "-y");
    ["analyze".to_owned()].into_iter().chain(words).collect()
}

#[test]
fn analyze_writes_only_its_own_folder() {
    let context = TestContext::new();
    let _ = context.run(analyze("llama-f32", &[])).ok();
    let first = context.results_folder();
    let name = first.file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with("llama-f32-") && name.len() == "llama-f32-".len() + 8, "{name}");
    assert!(!context.json(&["results", "list"])["results"][0]["model"].as_str().unwrap().contains("model"), "its name");
    let results = std::fs::read(first.join(files::RESULTS)).unwrap();
    let again = context.run(analyze("llama-f32", &[])).ok();
    assert_eq!(std::fs::read_dir(context.work().join("remote_results")).unwrap().count(), 2, "{again:?}");
    let other = context.run(analyze("qwen3", &["--output", &text(&first)]));
    assert!(other.code == Some(2) && other.stderr.contains("holds other results"), "{other:?}");
    assert_eq!(std::fs::read(first.join(files::RESULTS)).unwrap(), results);
    assert!(context.bill().entries.is_empty());
}

#[test]
fn failed_analysis_is_kept_as_partial_and_compare_excludes_it() {
    let context = TestContext::new();
    let model = copied_model(&context, "llama-f32");
    let path = model.join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let mut bytes = whole.clone();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let job = ["--num-sequences", "2", "--sequence-length", "32", "--output", "remote_results/mine"].map(str::to_owned);
    let analysis: Vec<String> =
        ["analyze".to_owned(), "--model".to_owned(), text(&model)].into_iter().chain(job).collect();
    let said = context.run(&analysis);
    assert!(matches!(said.code, Some(1 | 2)) && said.stderr.contains("NaN"), "{said:?}");
    let mine = context.work().join("remote_results/mine");
    let partial = context.work().join("remote_results/mine.partial");
    assert!(!mine.exists() && partial.join(files::LOG).exists());
    let _ = context.run(analyze("qwen3", &[])).ok();
    let compared = context.run(["compare"]).ok();
    assert!(compared.stderr.contains("Left out") && compared.stderr.contains("mine.partial"), "{compared:?}");
    let named = context.run(["compare", "remote_results"]);
    assert!(named.code == Some(1) && named.stderr.contains("mine.partial is partial"), "{named:?}");
    // The same job resumes there; another does not.
    let other = context.run(analyze("qwen3", &["--output", "remote_results/mine"]));
    assert!(other.code == Some(2) && other.stderr.contains("what another job left"), "{other:?}");
    std::fs::write(&path, whole).unwrap();
    let _ = context.run(&analysis).ok();
    assert!(mine.join(files::RESULTS).exists() && !partial.exists());
    let compared = context.run(["compare"]).ok();
    assert!(!compared.stderr.contains("Left out"), "{compared:?}");
}

#[test]
fn edited_handoff_is_not_overwritten() {
    let context = TestContext::new();
    let file = context.run(["handoff"]).ok().stdout.trim().to_owned();
    let again = context.run(["handoff"]).ok().stdout;
    assert_eq!(again.trim(), file, "what nobody edited is written anew");
    let edited = std::fs::read_to_string(&file).unwrap().replace("Nothing.", "Ask Ada.");
    std::fs::write(&file, &edited).unwrap();
    let refused = context.run(["handoff"]);
    assert!(refused.code == Some(2) && refused.stderr.contains("was edited"), "{refused:?}");
    assert!(refused.stderr.contains("--force") && refused.stderr.contains(&file), "{refused:?}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), edited);
    let _ = context.run(["handoff", "--output", "elsewhere"]).ok();
    let _ = context.run(["handoff", "--force"]).ok();
    assert!(!std::fs::read_to_string(&file).unwrap().contains("Ask Ada."));
}

// --------------------------------------------------------------------------------------- bad input

/// Bad input: the exit code, a word of the message, and that nothing was rented.
fn refused(context: &TestContext, arguments: &[String], words: &[&str]) {
    let said = context.run(arguments);
    assert!(matches!(said.code, Some(1 | 2)), "{arguments:?}: {said:?}");
    for word in words {
        assert!(said.stderr.contains(word), "{word:?} is missing for {arguments:?}: {}", said.stderr);
    }
    assert!(!said.stderr.contains("panicked"), "{}", said.stderr);
    assert!(context.bill().entries.is_empty() && context.bill().running.is_empty(), "{arguments:?} rented something");
}

fn copied_model(context: &TestContext, name: &str) -> PathBuf {
    let copy = context.work().join(format!("copy-{}", rand_name()));
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(golden(name).join("model")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    copy
}

fn rand_name() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

fn deploy(model: &Path, more: &[&str]) -> Vec<String> {
    let arguments = ["deploy", "--model"].map(str::to_owned).into_iter().chain([text(model), "-y".to_owned()]);
    arguments.chain(more.iter().map(|s| (*s).to_owned())).collect()
}

#[test]
fn invalid_models_are_refused_before_renting() {
    let context = TestContext::new();
    refused(&context, &deploy(Path::new("/no/such/folder"), &[]), &["/no/such/folder"]);
    refused(&context, &deploy(Path::new("neither a folder nor an id"), &[]), &["neither a folder nor an id"]);

    let unsupported = copied_model(&context, "llama-f32");
    let config = std::fs::read_to_string(unsupported.join("config.json")).unwrap();
    std::fs::write(unsupported.join("config.json"), config.replace("LlamaForCausalLM", "MambaForCausalLM")).unwrap();
    refused(&context, &deploy(&unsupported, &[]), &["MambaForCausalLM", "OlmoeForCausalLM"]);

    let missing = copied_model(&context, "olmoe-f32-sharded");
    std::fs::remove_file(missing.join("model-00002-of-00003.safetensors")).unwrap();
    refused(&context, &deploy(&missing, &[]), &["model-00002-of-00003.safetensors"]);

    let truncated = copied_model(&context, "llama-f32");
    let weights = truncated.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    refused(&context, &deploy(&truncated, &[]), &["model.safetensors"]);
    std::fs::write(&weights, [&u64::MAX.to_le_bytes()[..], &bytes[8..]].concat()).unwrap();
    refused(&context, &deploy(&truncated, &[]), &["model.safetensors"]);
    context.assert_nothing_left();
}

#[test]
fn overlapping_tensors_are_refused_before_renting() {
    let context = TestContext::new();
    let model = copied_model(&context, "llama-f32");
    let path = model.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let first = header["model.layers.0.input_layernorm.weight"]["data_offsets"].clone();
    header["model.layers.1.input_layernorm.weight"]["data_offsets"] = first;
    let header = header.to_string();
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + length..]].concat())
        .unwrap();
    refused(&context, &deploy(&model, &[]), &["input_layernorm"]);
}

#[test]
fn invalid_texts_are_refused_before_renting() {
    let context = TestContext::new();
    let model = golden("olmoe-bf16").join("model");
    let (empty, short) = (context.work().join("empty.txt"), context.work().join("short.txt"));
    std::fs::write(&empty, "").unwrap();
    std::fs::write(&short, "Far too short.").unwrap();
    refused(&context, &deploy(&model, &["--corpus", &text(&empty)]), &["empty.txt"]);
    refused(&context, &deploy(&model, &["--corpus", &text(&short), "--sequence-length", "512"]), &["512"]);
    refused(&context, &deploy(&model, &["--corpus", "/no/such/book.txt"]), &["/no/such/book.txt"]);
    refused(&context, &deploy(&model, &["--sequence-length", "5000"]), &["5000", "4096"]);
    context.assert_nothing_left();
}

#[test]
fn nan_weights_end_the_run_and_the_rental() {
    let context = TestContext::new();
    let model = copied_model(&context, "llama-f32");
    let path = model.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let said = context.run(deploy(&model, &["--num-sequences", "2", "--sequence-length", "32"]));
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stderr.contains("NaN at element"), "{}", said.stderr);
    context.assert_nothing_left();
}

#[test]
fn worker_of_another_version_is_refused_before_renting() {
    use std::os::unix::fs::PermissionsExt;
    let context = TestContext::new();
    let other = context.work().join("other-worker");
    let version = r#"{"version":"99.0.0","schema":99,"target":"x86_64-linux","cuda":false,"architectures":[]}"#;
    std::fs::write(&other, format!("#!/bin/sh\necho '{version}'\n")).unwrap();
    std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o755)).unwrap();
    let settings = context.work().join("outliers.toml");
    std::fs::write(&settings, format!("[worker]\nbinary = {:?}\n", text(&other))).unwrap();
    let model = golden("llama-f32").join("model");
    refused(&context, &deploy(&model, &["--config", &text(&settings)]), &["99"]);
    std::fs::remove_file(&other).unwrap();
    refused(&context, &deploy(&model, &["--config", &text(&settings)]), &["other-worker"]);
}

// ------------------------------------------------------------------------------------ from the hub

const HUB_MODEL: &str = "owner/tiny-olmoe";
const HUB_TOKEN: &str = "hf_not-to-be-seen-anywhere";

/// A context with a test hub that has one gated model.
fn context_with_hub() -> (TestContext, MockHub) {
    let repo = Repo::new(HUB_MODEL, &golden("olmoe-bf16").join("model")).gated(HUB_TOKEN);
    let hub = MockHub::start([repo]).unwrap();
    let context = TestContext::new().with("HF_ENDPOINT", &hub.url());
    (context, hub)
}

fn hub_deploy(model: &str, more: &[&str]) -> Vec<String> {
    let ids = text(&golden("olmoe-bf16").join("golden.safetensors"));
    let arguments = ["deploy", "--model", model, "--token-ids", &ids, "-y", "--precision", "f32"];
    arguments.iter().chain(more).map(|s| (*s).to_owned()).collect()
}

#[test]
fn gated_model_is_deployed_without_exposing_the_token() {
    let (context, _hub) = context_with_hub();
    let context = context.with("HF_TOKEN", HUB_TOKEN);
    let said = context.run(hub_deploy(HUB_MODEL, &["-v"])).ok();
    assert_statistics_equal(&golden("olmoe-bf16").join("outliers.json"), &context.results());
    let metadata = std::fs::read_to_string(context.results_folder().join(files::METADATA)).unwrap();
    let commit = Repo::new(HUB_MODEL, Path::new("")).commit();
    assert!(metadata.contains(&commit), "the revision is recorded");
    context.assert_nothing_left();
    assert!(!(said.stdout + &said.stderr).contains(HUB_TOKEN));
    for file in files_below(&context.state()).into_iter().chain(files_below(&context.work())) {
        let bytes = std::fs::read(&file).unwrap_or_default();
        let seen = bytes.windows(HUB_TOKEN.len()).any(|w| w == HUB_TOKEN.as_bytes());
        assert!(!seen, "the token lies in {}", file.display());
    }
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

#[test]
fn missing_or_gated_hub_model_is_refused_before_renting() {
    let (context, _hub) = context_with_hub();
    refused(&context, &hub_deploy(HUB_MODEL, &[]), &["gated", "HF_TOKEN"]);
    let context = context.with("HF_TOKEN", HUB_TOKEN);
    refused(&context, &hub_deploy("owner/no-such-model", &[]), &["owner/no-such-model"]);
    refused(&context, &hub_deploy(HUB_MODEL, &["--revision", "no-such-branch"]), &["no-such-branch"]);
    context.assert_nothing_left();
}
