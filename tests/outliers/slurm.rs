//! A Slurm cluster: jobs, their queue and their folders, through a real login node.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use outliers::cloud::broker::slurm::{Site, Slurm};
use outliers::cloud::broker::{Broker, GpuRequest, Instance, InstanceState, Offer};
use outliers::host::PROBE;
use outliers::host::transport::program::OpenSsh;
use outliers::host::transport::{SendRequest, Transport, TransportErrorKind};
use outliers::units::{Bytes, UsdPerHour};
use outliers_clouds::conformance::{lease, life};
use outliers_protocol::{Results, files};
use outliers_tests::cluster::Cluster;
use outliers_tests::context::{Said, TestContext};
use outliers_tests::golden::assert_statistics_equal;
use outliers_tests::hub::{MockHub, ReceivedRequest, Repo};
use outliers_tests::noise;
use outliers_tests::programs::{golden, run_worker, workspace};

mod kills;

/// An address where nothing listens.
const NOBODY: &str = "http://127.0.0.1:9";
const HUB_MODEL: &str = "owner/tiny-olmoe";

/// The broker's `squeue` command.
const ALL_JOBS: [&str; 4] = ["--me", "--noheader", "--states=all", "--format=@job %i|%T|%r|%P|%S|%e|%N|%j"];

/// Timeout of a test: longer than any step takes on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(180);

/// A cluster with the fake commands, and a context whose settings use it.
fn office() -> Option<(Cluster, TestContext)> {
    let cluster = Cluster::fake().unwrap()?;
    let context = context(&cluster);
    Some((cluster, context))
}

fn context(cluster: &Cluster) -> TestContext {
    let context = TestContext::new();
    std::fs::write(context.work().join("mine.toml"), cluster.settings()).unwrap();
    context.with("OUTLIERS_CONFIG", "mine.toml").with("HF_ENDPOINT", NOBODY)
}

/// `deploy` of the small fixture's model over its own token ids, uploaded.
fn deploy(fixture: &str) -> Vec<String> {
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let folder = golden(fixture);
    let (model, ids) = (text(&folder.join("model")), text(&folder.join("golden.safetensors")));
    let words = ["deploy", "-y", "--broker", "slurm", "--gpu-count", "0", "--push-model"];
    let job = ["--model", &model, "--token-ids", &ids, "--precision", "f32"];
    words.iter().chain(&job).map(|word| (*word).to_owned()).collect()
}

/// The same for a model on the hub.
fn hub_deploy(more: &[&str]) -> Vec<String> {
    let ids = golden("olmoe-bf16").join("golden.safetensors");
    let words = ["deploy", "-y", "--broker", "slurm", "--gpu-count", "0", "--model", HUB_MODEL];
    let job = ["--token-ids", ids.to_str().unwrap(), "--precision", "f32"];
    words.iter().chain(&job).chain(more).map(|word| (*word).to_owned()).collect()
}

/// A cluster whose nodes have no network, and a context with a hub of one model.
fn office_cut_off() -> Option<(Cluster, TestContext, MockHub)> {
    let cluster = Cluster::fake().unwrap()?;
    cluster.cut_off().unwrap();
    let hub = MockHub::start([Repo::new(HUB_MODEL, &golden("olmoe-bf16").join("model"))]).unwrap();
    let context = context(&cluster).with("HF_ENDPOINT", &hub.url());
    Some((cluster, context, hub))
}

/// The same, with a partition `net` that reaches the hub, where jobs fetch models.
fn office_with_stage(partition: &str) -> Option<(Cluster, TestContext, MockHub)> {
    if std::process::Command::new("curl").arg("--version").output().is_err() {
        outliers_tests::not_checked("no curl is installed");
        return None;
    }
    let (cluster, context, hub) = office_cut_off()?;
    stage_in(partition, &cluster, &context);
    Some((cluster, context, hub))
}

fn stage_in(partition: &str, cluster: &Cluster, context: &TestContext) {
    let settings = format!("{}stage-partition = {partition:?}\n", cluster.settings());
    std::fs::write(context.work().join("mine.toml"), settings).unwrap();
}

fn is_home_and_gone(said: Said, cluster: &Cluster, context: &TestContext, fixture: &str) {
    let said = said.ok();
    assert_statistics_equal(&golden(fixture).join("outliers.json"), &context.results());
    assert!(!cluster.leases().exists(), "something is left in scratch: {said:?}");
}

#[test]
fn slurm_deploy_equals_the_reference_and_leaves_no_job() {
    let Some((cluster, context)) = office() else { return };
    cluster.inject_failure("hold", "QOSMaxGRESPerUser").unwrap();
    let mut child = context.start(deploy("llama-f32"));
    context.wait_for("the reason", || context.stderr().contains("QOSMaxGRESPerUser"));
    cluster.clear_failure("hold");
    let status = child.wait().unwrap();
    let said = Said { code: status.code(), stdout: context.stdout(), stderr: context.stderr() };
    is_home_and_gone(said, &cluster, &context, "llama-f32");
    assert_eq!(cluster.jobs(), 1, "a job that waits is not exchanged");
    let listed = context.json(&["instances", "list", "--broker", "slurm"]);
    assert_eq!(listed["instances"].as_array().map(Vec::len), Some(0), "{listed}");
    context.assert_nothing_left();
}

#[test]
fn lost_sbatch_reply_is_resolved_by_job_name() {
    let Some((cluster, context)) = office() else { return };
    cluster.inject_failure("lose-reply", "").unwrap();
    is_home_and_gone(context.run(deploy("llama-f32")), &cluster, &context, "llama-f32");
    assert_eq!(cluster.jobs(), 1, "it was not submitted again");
    context.assert_nothing_left();
}

#[test]
fn sbatch_refusal_ends_the_run_with_its_message() {
    let Some((cluster, context)) = office() else { return };
    cluster.inject_failure("refuse", "Invalid account or account/partition combination specified").unwrap();
    let said = context.run(deploy("llama-f32"));
    assert_eq!(said.code, Some(5), "{said:?}");
    assert!(said.stderr.contains("Invalid account"), "{said:?}");
    assert!(cluster.jobs() == 0 && !cluster.leases().exists(), "{said:?}");
}

/// Does something again and again until the program has ended; its exit code.
fn until_it_ends(child: &mut std::process::Child, context: &TestContext, mut again: impl FnMut()) -> Option<i32> {
    let begun = Instant::now();
    loop {
        again();
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        assert!(begun.elapsed() < TIMEOUT, "{}", context.stderr());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// No partition gave a job.
fn none_was_had(code: Option<i32>, cluster: &Cluster, context: &TestContext) {
    assert_eq!(code, Some(3), "{}", context.stderr());
    assert!(context.stderr().contains("were tried and none could be had"), "{}", context.stderr());
    assert!(!cluster.leases().exists(), "{}", context.stderr());
    context.assert_nothing_left();
}

#[test]
fn partitions_that_all_refuse_exit_as_without_an_offer() {
    let Some((cluster, context)) = office() else { return };
    let mut child = context.start(deploy("llama-f32"));
    let refuse = || cluster.inject_failure("refuse", "Requested node configuration is not available").unwrap();
    none_was_had(until_it_ends(&mut child, &context, refuse), &cluster, &context);
    assert_eq!(cluster.jobs(), 0);
}

#[test]
fn jobs_cancelled_while_they_wait_exit_as_without_an_offer() {
    let Some((cluster, context)) = office() else { return };
    cluster.inject_failure("hold", "Priority").unwrap();
    let mut child = context.start(deploy("llama-f32"));
    context.wait_for("the queue", || context.stderr().contains("Priority"));
    let me = std::process::Command::new("id").arg("-un").output().unwrap().stdout;
    let user = format!("--user={}", String::from_utf8(me).unwrap().trim());
    let cancel = || {
        for name in cluster.job_names().iter().filter(|name| !name.is_empty()) {
            cluster.says("scancel", &[&user, &format!("--name={name}")]);
        }
    };
    none_was_had(until_it_ends(&mut child, &context, cancel), &cluster, &context);
    assert!(context.stderr().contains("CANCELLED"), "{}", context.stderr());
}

#[test]
fn node_without_hub_access_is_reported_with_a_remedy() {
    let Some((cluster, context, _hub)) = office_cut_off() else { return };
    let said = context.run(hub_deploy(&[]));
    assert_eq!(said.code, Some(1), "{said:?}");
    for word in ["does not reach the hub", "--weights local:DIR", "hf-home"] {
        assert!(said.stderr.contains(word), "{word}: {said:?}");
    }
    assert!(cluster.jobs() == 1 && !cluster.leases().exists(), "no other node is tried, and nothing is left");
    context.assert_nothing_left();
}

#[test]
fn checkpoint_in_a_cluster_folder_needs_no_network() {
    let Some((cluster, context, _hub)) = office_cut_off() else { return };
    let absent = context.run(hub_deploy(&["--weights", "local:/no/such"]));
    assert!(absent.code == Some(2) && absent.stderr.contains("holds no config.json"), "{absent:?}");
    assert_eq!(cluster.jobs(), 0);
    let there = format!("local:{}", golden("olmoe-bf16").join("model").display());
    is_home_and_gone(context.run(hub_deploy(&["--weights", &there])), &cluster, &context, "olmoe-bf16");
    context.assert_nothing_left();
}

#[test]
fn staging_job_fetches_the_model_before_the_main_job() {
    let Some((cluster, context, hub)) = office_with_stage("net") else { return };
    let context = context.with("HF_TOKEN", "hf_of_a_person");
    let planned = context.run(hub_deploy(&["--dry-run"])).ok();
    assert!(planned.stderr.contains("A job in partition net fetches owner/tiny-olmoe first: "), "{planned:?}");
    assert_eq!(cluster.jobs(), 0);
    let before = hub.requests().len();
    let said = context.run(hub_deploy(&["--explain"]));
    assert!(said.stderr.contains("stage.sh") && !said.stderr.contains("hf_of_a_person"), "{said:?}");
    is_home_and_gone(said, &cluster, &context, "olmoe-bf16");
    let mut names = cluster.job_names();
    names.sort();
    assert!(names.len() == 2 && names[1] == format!("{}-stage", names[0]), "one intent: {names:?}");
    let seen = hub.requests();
    let whole = |seen: &&ReceivedRequest| !seen.cdn && seen.method == "GET" && seen.range.is_none();
    let weights = |seen: &&ReceivedRequest| seen.path.ends_with("/model.safetensors");
    let fetched: Vec<&ReceivedRequest> = seen[before..].iter().filter(whole).filter(weights).collect();
    assert_eq!(fetched.len(), 1, "{fetched:?}");
    assert_eq!(fetched[0].authorization.as_deref(), Some("Bearer hf_of_a_person"));
    context.assert_nothing_left();
}

#[test]
fn failed_staging_ends_the_run_with_the_reason() {
    let Some((cluster, context, _hub)) = office_with_stage("cpu") else { return };
    let said = context.run(hub_deploy(&[]));
    assert_eq!(said.code, Some(3), "{said:?}");
    let why = "the job that fetches the model failed: config.json could not be fetched";
    assert!(said.stderr.contains(why) && !cluster.leases().exists(), "{said:?}");
    context.assert_nothing_left();
}

#[test]
fn main_job_and_staging_job_are_cancelled_together() {
    let Some((cluster, context, _hub)) = office_with_stage("net") else { return };
    cluster.inject_failure("hold", "Priority").unwrap();
    let mut child = context.start(hub_deploy(&[]));
    context.wait_for("the queue", || context.stderr().contains("it fetches the model for job 2"));
    child.kill().unwrap();
    child.wait().unwrap();
    let listed = context.json(&["instances", "list", "--broker", "slurm"]);
    assert_eq!(listed["instances"].as_array().map(Vec::len), Some(1), "{listed}");
    let id = listed["instances"][0]["id"].as_str().unwrap().to_owned();
    let said = context.run(["instances", "terminate", &id, "--broker", "slurm", "-y"]).ok();
    let queue = cluster.says("squeue", &ALL_JOBS);
    assert!(said.stdout.contains("seen gone") && queue.matches("|CANCELLED|").count() == 2, "{said:?} {queue}");
    assert!(!cluster.leases().exists());
}

#[test]
fn job_with_a_cluster_checkpoint_gets_no_token() {
    let Some((cluster, context, _hub)) = office_cut_off() else { return };
    let context = context.with("HF_TOKEN", "hf_of_a_person");
    let there = format!("local:{}", golden("olmoe-bf16").join("model").display());
    let _ = context.run(hub_deploy(&["--weights", &there, "--keep-running"])).ok();
    let texts = || std::process::Command::new("grep").args(["-rl", "hf_of_a_person"]).arg(cluster.leases()).output();
    let found = texts().unwrap();
    assert!(cluster.leases().exists() && found.stdout.is_empty(), "{found:?}");
    let listed = context.json(&["instances", "list", "--broker", "slurm"]);
    let id = listed["instances"][0]["id"].as_str().expect("it is kept").to_owned();
    let _ = context.run(["instances", "terminate", &id, "--broker", "slurm", "-y"]).ok();
    assert!(!cluster.leases().exists(), "nothing is left");
}

#[test]
fn model_is_read_from_the_clusters_hub_cache() {
    let Some((cluster, context, _hub)) = office_cut_off() else { return };
    let home = cluster.sshd.home().join("hf");
    let snapshots = home.join("hub/models--owner--tiny-olmoe/snapshots");
    std::fs::create_dir_all(&snapshots).unwrap();
    let commit = Repo::new(HUB_MODEL, Path::new("")).commit();
    std::os::unix::fs::symlink(golden("olmoe-bf16").join("model"), snapshots.join(commit)).unwrap();
    let settings = format!("{}hf-home = {home:?}\n", cluster.settings());
    std::fs::write(context.work().join("mine.toml"), settings).unwrap();
    is_home_and_gone(context.run(hub_deploy(&[])), &cluster, &context, "olmoe-bf16");
    context.assert_nothing_left();
}

const SURVEY: [&str; 8] = ["survey", "three.toml", "-y", "--broker", "slurm", "--gpu-count", "0", "--push-model"];

/// Writes the survey of [`SURVEY`], and its models.
fn survey_of_three(context: &TestContext) {
    for (name, model) in [("one", "qwen3-moe"), ("two", "glm4-moe"), ("three", "qwen3-moe")] {
        let into = context.work().join("models").join(name);
        std::fs::create_dir_all(&into).unwrap();
        for entry in std::fs::read_dir(golden(model).join("model")).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), into.join(entry.file_name())).unwrap();
        }
    }
    let text = "name = \"three\"\nnum-sequences = 2\nsequence-length = 32\nprecision = \"f32\"\n\
                models = [\"./models/one\", \"./models/two\", \"./models/three\"]\n";
    std::fs::write(context.work().join("three.toml"), text).unwrap();
}

#[test]
fn survey_respects_its_limit_of_concurrent_jobs() {
    let Some((cluster, context)) = office() else { return };
    survey_of_three(&context);
    let settings = format!("[survey]\nstagger-seconds = 0\n{}", cluster.settings());
    std::fs::write(context.work().join("mine.toml"), settings).unwrap();
    cluster.inject_failure("hold", "Priority").unwrap();
    let mut child = context.start(SURVEY.iter().chain(&["--max-parallel", "2"]));
    context.wait_for("the queue", || context.stderr().contains("Priority") && cluster.jobs() == 2);
    // Another one would have been submitted by now.
    let looks = cluster.asked("squeue");
    context.wait_for("more looks", || cluster.asked("squeue") > looks + 2);
    assert_eq!(cluster.jobs(), 2, "{}", context.stderr());
    cluster.clear_failure("hold");
    let status = child.wait().unwrap();
    assert!(status.success(), "{}", context.stderr());
    assert_eq!((cluster.jobs(), cluster.most_jobs()), (3, 2), "one job per model: {}", context.stderr());
    assert!(!cluster.leases().exists(), "{}", context.stderr());
    context.assert_nothing_left();
}

#[test]
fn login_node_with_an_unknown_host_key_is_refused() {
    let Some((cluster, context)) = office() else { return };
    cluster.forget_host_key().unwrap();
    for command in [&["offers", "--gpu-count", "0"][..], &["instances", "list"]] {
        let command = [command, &["--broker", "slurm"]].concat();
        let said = context.run(command);
        assert_eq!(said.code, Some(5), "{said:?}");
        assert!(said.stderr.contains("ssh cluster"), "it says what to do: {said:?}");
    }
    assert_eq!(cluster.asked(""), 0, "nobody was asked anything");
}

#[test]
fn cluster_without_a_host_is_refused_with_the_option_to_set() {
    let context = TestContext::new();
    let said = context.run(deploy("llama-f32"));
    assert_eq!(said.code, Some(2), "{said:?}");
    assert!(said.stderr.contains("--host"), "{said:?}");
}

#[test]
fn offers_show_partitions_gpus_and_estimated_start() {
    for newer in [false, true] {
        let Some((cluster, context)) = office() else { return };
        if newer {
            cluster.inject_failure("newer", "").unwrap();
        }
        let words = ["offers", "--json", "--broker", "slurm", "--gpu-count", "2", "--gpu-filter", "a100"];
        let said = context.run(words).ok();
        for word in ["a100", "gpu: 1 of 2 nodes idle, starts at once", "without GPUs"] {
            assert!(said.stdout.contains(word), "{word}: {said:?}");
        }
        assert_eq!((cluster.jobs(), cluster.asked("sbatch --test-only")), (0, 1));
    }
}

#[test]
fn missing_partition_is_named_with_those_that_exist() {
    let Some((cluster, context)) = office() else { return };
    let said = context.run(["offers", "--broker", "slurm", "--gpu-count", "0", "--partition", "gone"]);
    assert_eq!(said.code, Some(5), "{said:?}");
    assert!(said.stderr.contains("no partition gone with nodes: there are cpu, gpu"), "{said:?}");
    assert_eq!(cluster.jobs(), 0);
}

#[test]
fn job_over_the_gpu_hour_limit_is_not_submitted() {
    let Some((cluster, context)) = office() else { return };
    let folder = golden("llama-f32");
    let (model, ids) = (folder.join("model"), folder.join("golden.safetensors"));
    let try_with = |hours: &str| {
        let words = ["deploy", "--dry-run", "--broker", "slurm", "--gpu-count", "2", "--devices", "cpu"];
        let limits = ["--push-model", "--max-duration", "1h", "--max-gpu-hours", hours];
        let job = ["--model", model.to_str().unwrap(), "--token-ids", ids.to_str().unwrap()];
        context.run(words.iter().chain(&limits).chain(&job))
    };
    let refused = try_with("1.9");
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("may take 2.00 GPU-hours") && refused.stderr.contains("1.90"), "{refused:?}");
    let _ = try_with("2").ok();
    assert_eq!(cluster.jobs(), 0);
}

/// Kills a controller whose job waits in the queue. Returns the output of `instances list`.
fn killed_while_its_job_waits(cluster: &Cluster, context: &TestContext) -> serde_json::Value {
    cluster.inject_failure("hold", "Priority").unwrap();
    let mut child = context.start(deploy("llama-f32"));
    context.wait_for("the queue", || context.stderr().contains("Priority"));
    child.kill().unwrap();
    child.wait().unwrap();
    context.json(&["instances", "list", "--broker", "slurm"])
}

#[test]
fn attach_saves_results_after_a_killed_controller() {
    let Some((cluster, context)) = office() else { return };
    let listed = killed_while_its_job_waits(&cluster, &context);
    let state = listed["instances"][0]["state"]["queued"].as_str().unwrap_or_default().to_owned();
    assert!(state.contains("Priority"), "{listed}");
    let standing = context.json(&["status"]);
    assert!(standing["under_way"][0]["waits"].as_str().is_some_and(|why| why.contains("Priority")), "{standing}");
    assert!(context.run(["status"]).ok().stdout.contains("waits: job 1 in"), "a person sees it too");
    cluster.clear_failure("hold");
    is_home_and_gone(context.run(["attach"]), &cluster, &context, "llama-f32");
    assert_eq!(cluster.jobs(), 1);
    context.assert_nothing_left();
}

/// Settings with all but the login node.
fn leave_the_host_out(cluster: &Cluster, context: &TestContext) {
    let settings = cluster.settings().replace("host = \"cluster\"\n", "");
    assert_ne!(settings, cluster.settings());
    std::fs::write(context.work().join("mine.toml"), settings).unwrap();
}

#[test]
fn open_job_is_found_by_its_record_where_no_host_is_named() {
    let Some((cluster, context)) = office() else { return };
    let listed = killed_while_its_job_waits(&cluster, &context);
    let id = listed["instances"][0]["id"].as_str().unwrap().to_owned();
    leave_the_host_out(&cluster, &context);
    for more in [&["--broker", "slurm"][..], &[]] {
        let listed = context.json(&[&["instances", "list"][..], more].concat());
        assert_eq!(listed["instances"][0]["id"], id.as_str(), "{listed}");
        let doctor = context.run([&["doctor", "--json"][..], more].concat()).ok();
        assert!(doctor.stdout.contains("slurm instances") && doctor.stdout.contains("1 left behind"), "{doctor:?}");
    }
    let standing = context.json(&["status"]);
    assert!(standing["under_way"][0]["waits"].as_str().is_some_and(|why| why.contains("Priority")), "{standing}");
    cluster.clear_failure("hold");
    is_home_and_gone(context.run(["attach"]), &cluster, &context, "llama-f32");
    context.assert_nothing_left();
}

#[test]
fn login_node_of_an_open_job_that_cannot_be_reached_is_told() {
    let Some((cluster, context)) = office() else { return };
    let _ = killed_while_its_job_waits(&cluster, &context);
    leave_the_host_out(&cluster, &context);
    let known_hosts = cluster.ssh_config().with_file_name("known_hosts");
    let keys = std::fs::read(&known_hosts).unwrap();
    cluster.forget_host_key().unwrap();
    // Of a cloud with an open run `reap` says that an instance may still be running.
    for (command, code) in
        [(&["instances", "list"][..], 5), (&["status"], 5), (&["doctor"], 5), (&["reap", "--dry-run"], 6)]
    {
        let said = context.run(command);
        assert_eq!(said.code, Some(code), "{command:?}: {said:?}");
        let words = said.stdout.clone() + &said.stderr;
        assert!(words.contains("slurm") && words.contains("cluster:"), "{command:?}: {said:?}");
    }
    std::fs::write(&known_hosts, keys).unwrap();
    let _ = context.run(["runs", "cancel", "last"]).ok();
    assert!(!cluster.leases().exists(), "it is ended by its record");
    context.assert_nothing_left();
}

#[test]
fn run_on_one_cluster_is_not_taken_for_gone_on_another() {
    let Some((cluster, context)) = office() else { return };
    let Some(other) = Cluster::fake().unwrap() else { return };
    let _ = killed_while_its_job_waits(&cluster, &context);
    let config = |cluster: &Cluster| std::fs::read_to_string(cluster.ssh_config()).unwrap();
    let both = config(&cluster) + &config(&other).replace("Host cluster", "Host other");
    let path = context.work().join("ssh_config");
    std::fs::write(&path, both).unwrap();
    let settings = format!("[brokers.slurm]\nhost = \"other\"\nssh-config = {path:?}\nlisting-interval = \"1s\"\n");
    std::fs::write(context.work().join("mine.toml"), settings).unwrap();
    let _ = context.run(["reap"]).ok();
    let runs = context.json(&["runs", "list"]);
    assert_eq!(runs["runs"][0]["state"]["state"], "rented", "{runs}");
    let listed = context.json(&["instances", "list"]);
    assert_eq!(listed["instances"].as_array().map(Vec::len), Some(1), "{listed}");
    cluster.clear_failure("hold");
    is_home_and_gone(context.run(["attach"]), &cluster, &context, "llama-f32");
    assert_eq!((cluster.jobs(), other.jobs()), (1, 0));
    context.assert_nothing_left();
}

/// Settings that lead to the same login node by another alias.
fn call_it(alias: &str, cluster: &Cluster, context: &TestContext) {
    let config = std::fs::read_to_string(cluster.ssh_config()).unwrap();
    let path = context.work().join("ssh_config");
    std::fs::write(&path, config.replace("Host cluster", &format!("Host cluster {alias}"))).unwrap();
    let settings = format!("[brokers.slurm]\nhost = {alias:?}\nssh-config = {path:?}\nlisting-interval = \"1s\"\n");
    std::fs::write(context.work().join("mine.toml"), settings).unwrap();
}

#[test]
fn run_is_picked_up_where_its_cluster_has_another_alias() {
    let Some((cluster, context)) = office() else { return };
    let _ = killed_while_its_job_waits(&cluster, &context);
    call_it("otherwise", &cluster, &context);
    cluster.clear_failure("hold");
    let said = context.run(deploy("llama-f32"));
    assert!(said.stderr.contains("Picking up run "), "{said:?}");
    is_home_and_gone(said, &cluster, &context, "llama-f32");
    assert_eq!(cluster.jobs(), 1, "no other job was submitted");
    context.assert_nothing_left();
}

#[test]
fn survey_is_picked_up_where_its_cluster_has_another_alias() {
    let Some((cluster, context)) = office() else { return };
    survey_of_three(&context);
    let only: Vec<&str> = SURVEY.into_iter().chain(["--only", "one"]).collect();
    cluster.inject_failure("hold", "Priority").unwrap();
    let mut child = context.start(&only);
    context.wait_for("the queue", || context.stderr().contains("Priority"));
    child.kill().unwrap();
    child.wait().unwrap();
    call_it("otherwise", &cluster, &context);
    cluster.clear_failure("hold");
    let said = context.run(&only).ok();
    assert!(said.stderr.contains("Picking up run ") && cluster.jobs() == 1, "{said:?}");
    assert!(!cluster.leases().exists(), "something is left in scratch: {said:?}");
    context.assert_nothing_left();
}

/// Of two names of one cluster the first is one by which the run was not submitted.
#[test]
fn job_is_ended_where_its_cluster_has_two_aliases() {
    let Some((cluster, context)) = office() else { return };
    let listed = killed_while_its_job_waits(&cluster, &context);
    let id = listed["instances"][0]["id"].as_str().unwrap().to_owned();
    call_it("another", &cluster, &context);
    let listed = context.json(&["instances", "list"]);
    assert_eq!(listed["instances"].as_array().map(Vec::len), Some(1), "it is listed once: {listed}");
    let _ = context.run(["instances", "show", &id[..id.len() - 1]]).ok();
    let said = context.run(["instances", "terminate", &id, "-y"]).ok();
    assert!(said.stdout.contains("1 instance ended, and seen gone"), "{said:?}");
    assert_eq!(context.json(&["runs", "list"])["runs"][0]["state"]["state"], "closed");
    assert!(!cluster.leases().exists());
    context.assert_nothing_left();
}

#[test]
fn clusters_with_one_scratch_folder_are_told_apart() {
    let Some((cluster, here)) = office() else { return };
    let Some(other) = Cluster::fake().unwrap() else { return };
    other.inject_failure("cluster", "other").unwrap();
    let (there, scratch) = (context(&other), cluster.sshd.home().join("shared"));
    std::fs::create_dir(&scratch).unwrap();
    for (cluster, desk) in [(&cluster, &here), (&other, &there)] {
        let settings = format!("{}scratch = {scratch:?}\n", cluster.settings());
        std::fs::write(desk.work().join("mine.toml"), settings).unwrap();
    }
    cluster.inject_failure("hold", "Priority").unwrap();
    let mut child = here.start(deploy("llama-f32"));
    here.wait_for("the queue", || here.stderr().contains("Priority"));
    // Neither the folder of the job nor what one queue answered is taken for the other cluster's.
    for (desk, count) in [(&there, 0), (&here, 1), (&there, 0), (&here, 1)] {
        let listed = desk.json(&["instances", "list", "--broker", "slurm"]);
        assert_eq!(listed["instances"].as_array().map(Vec::len), Some(count), "{listed}");
    }
    cluster.clear_failure("hold");
    assert!(child.wait().unwrap().success(), "{}", here.stderr());
    assert_eq!((cluster.jobs(), other.jobs()), (1, 0), "{}", here.stderr());
    assert!(!scratch.join("outliers-jobs").exists(), "something is left in scratch");
    here.assert_nothing_left();
}

#[test]
fn shell_in_a_job_that_waits_is_refused_with_its_reason() {
    let Some((cluster, context)) = office() else { return };
    let listed = killed_while_its_job_waits(&cluster, &context);
    let id = listed["instances"][0]["id"].as_str().unwrap().to_owned();
    let said = context.run(["instances", "ssh", &id, "--broker", "slurm"]);
    assert!(said.code == Some(1) && said.stdout.is_empty(), "{said:?}");
    assert!(said.stderr.contains("has no node yet: job 1 in "), "{said:?}");
    assert!(said.stderr.contains("PENDING (Priority)"), "{said:?}");
    cluster.clear_failure("hold");
    let state = || context.json(&["instances", "list", "--broker", "slurm"])["instances"][0]["state"].clone();
    context.wait_for("the job to run", || state()["ready"].is_object());
    let command = context.run(["instances", "ssh", &id, "--broker", "slurm"]).ok().stdout;
    assert!(command.contains("srun '--jobid=1' --overlap --pty sh"), "{command}");
    let _ = context.run(["instances", "terminate", &id, "--broker", "slurm", "-y"]).ok();
    assert!(!cluster.leases().exists());
    context.assert_nothing_left();
}

/// Where a worker is in mid-pass.
const MID_PASS: &str = "\"layers\",\"layer\":1";

#[test]
fn waiting_run_shows_its_position_and_no_expected_end() {
    for (private, says) in [(false, "position 3 of 4"), (true, "position not shown by this cluster")] {
        let Some((cluster, context)) = office() else { return };
        if private {
            cluster.inject_failure("private", "").unwrap();
        }
        // A higher priority, an older job of the same, a younger one, another partition.
        let others = "900|cpu,gpu|2000\n0|gpu,cpu|1000\n901|cpu,gpu|1000\n902|net|5000\n";
        cluster.inject_failure("others", others).unwrap();
        cluster.inject_failure("hold", "Priority").unwrap();
        let mut child = context.start(deploy("llama-f32"));
        context.wait_for("its position", || context.stderr().contains(says));
        let standing = context.json(&["status"]);
        child.kill().unwrap();
        child.wait().unwrap();
        let run = &standing["under_way"][0];
        assert!(run["waits"].as_str().is_some_and(|why| why.contains("PENDING") && why.contains(says)), "{standing}");
        assert!(run["expected"].is_null(), "nobody knows: {standing}");
        assert_eq!(cluster.asked("squeue --noheader --states=PENDING") > 0, !private);
    }
}

#[test]
fn gpu_hours_have_a_price_where_the_settings_give_one() {
    let Some((cluster, context)) = office() else { return };
    let settings = format!("{}price-per-gpu-hour = 1.2\n", cluster.settings());
    std::fs::write(context.work().join("mine.toml"), settings).unwrap();
    let folder = golden("llama-f32");
    let (model, ids) = (folder.join("model"), folder.join("golden.safetensors"));
    let words = ["deploy", "--broker", "slurm", "--gpu-count", "2", "--devices", "cpu", "--push-model"];
    let job = ["--max-duration", "1h", "--model", model.to_str().unwrap(), "--token-ids", ids.to_str().unwrap()];
    let with = |more: &[&'static str]| [&words[..], &job[..], more].concat();
    let planned = context.json(&with(&["--dry-run"]));
    assert_eq!(planned["at_most"], 2_400_000, "two GPUs for an hour, in millionths of a dollar: {planned}");
    cluster.inject_failure("hold", "Priority").unwrap();
    let mut child = context.start(with(&["-y"]));
    context.wait_for("the queue", || context.stderr().contains("Priority"));
    let standing = context.json(&["status"]);
    let listed = context.json(&["instances", "list", "--broker", "slurm"]);
    child.kill().unwrap();
    child.wait().unwrap();
    let run = &standing["under_way"][0];
    let micros = |value: &serde_json::Value| value.as_i64().unwrap_or(-1);
    assert_eq!([&run["price"], &listed["instances"][0]["price"]].map(micros), [2_400_000; 2], "{standing} {listed}");
    assert_eq!([&run["cost"], &run["at_most"]].map(micros), [0, 2_400_000], "a queue costs nothing: {standing}");
}

/// The cloud's own records of the time of the only run's instance, oldest first.
fn metered(context: &TestContext) -> Vec<serde_json::Value> {
    let runs = context.json(&["runs", "list"]);
    let events = runs["runs"][0]["events"].as_array().cloned().unwrap_or_default();
    events.into_iter().filter(|event| event["event"] == "metered").map(|event| event["time"].clone()).collect()
}

#[test]
fn running_job_ends_by_its_own_limit_and_its_starts_add_up() {
    let Some((cluster, context)) = office() else { return };
    let mut child = busy(&cluster, &context, "60", MID_PASS, &["--max-duration", "30m"]);
    let standing = context.json(&["status"]);
    let listed = context.json(&["instances", "list", "--broker", "slurm"]);
    let at = standing["at"].as_u64().unwrap();
    for deadline in [&standing["under_way"][0]["deadline"], &listed["instances"][0]["deadline"]] {
        assert!(deadline.as_u64().is_some_and(|deadline| deadline <= at + 1800), "{standing} {listed}");
    }
    cluster.inject_failure("hold", "Priority").unwrap();
    cluster.says("scontrol", &["requeue", "1"]);
    let waits = |time: &serde_json::Value| time["since"].is_null();
    context.wait_for("the end of its first start", || metered(&context).last().is_some_and(waits));
    context.wait_for("the reason", || context.stderr().contains("Waiting: job 1 in"));
    let first = metered(&context).pop().unwrap()["ended_s"].as_u64().unwrap();
    cluster.clear_failure("hold");
    assert!(child.wait().unwrap().success(), "{}", context.stderr());
    let times = metered(&context);
    let starts: std::collections::BTreeSet<u64> = times.iter().filter_map(|time| time["since"].as_u64()).collect();
    let all = times.last().unwrap()["ended_s"].as_u64().unwrap();
    assert!(starts.len() == 2 && all >= first, "{times:?}");
    let (begun, over) = (starts.first().unwrap(), starts.last().unwrap());
    assert!(first <= over - begun, "what it waited is none of it: {times:?}");
    assert!(!cluster.leases().exists(), "something is left in scratch");
    context.assert_nothing_left();
}

#[test]
fn survey_is_counted_after_attach_brought_its_runs_home() {
    let Some((cluster, context)) = office() else { return };
    survey_of_three(&context);
    let settings = format!("[survey]\nstagger-seconds = 0\n{}", cluster.settings());
    std::fs::write(context.work().join("mine.toml"), settings).unwrap();
    cluster.inject_failure("hold", "Priority").unwrap();
    let mut child = context.start(SURVEY.iter().chain(&["--max-parallel", "2"]));
    context.wait_for("the queue", || context.stderr().contains("Priority") && cluster.jobs() == 2);
    let rented = |runs: &Vec<serde_json::Value>| runs.iter().all(|run| run["state"]["state"] == "rented");
    context.wait_for("both runs", || context.json(&["runs", "list"])["runs"].as_array().is_some_and(rented));
    child.kill().unwrap();
    child.wait().unwrap();
    cluster.clear_failure("hold");
    let runs = context.json(&["runs", "list"]);
    for run in runs["runs"].as_array().unwrap() {
        let _ = context.run(["attach", run["id"].as_str().unwrap()]).ok();
    }
    let standing = context.json(&["status"]);
    let models = standing["surveys"][0]["index"]["models"].as_array().unwrap();
    let complete = models.iter().filter(|line| line["outcome"] == "complete").count();
    assert_eq!((complete, models.len()), (2, 3), "{standing}");
    let compared = context.run(["compare"]).ok();
    assert!(compared.stderr.contains("Left out, not being whole results: "), "{compared:?}");
    let index = std::fs::read(context.work().join("remote_results/three/index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    let outcomes: Vec<&str> = (0..3).filter_map(|i| index["models"][i]["outcome"].as_str()).collect();
    assert_eq!(outcomes, ["complete", "complete", "open"], "{index}");
    assert!(!cluster.leases().exists(), "something is left in scratch");
    context.assert_nothing_left();
}

#[test]
fn folder_describes_the_model_whose_weights_are_on_the_cluster() {
    let Some((cluster, context)) = office() else { return };
    let (fixture, described) = (golden("olmoe-bf16"), context.work().join("described"));
    std::fs::create_dir(&described).unwrap();
    std::fs::copy(fixture.join("model/config.json"), described.join("config.json")).unwrap();
    let (weights, ids) = (format!("local:{}", fixture.join("model").display()), fixture.join("golden.safetensors"));
    let words = ["deploy", "-y", "--broker", "slurm", "--gpu-count", "0", "--model", "./described"];
    let job = ["--weights", &weights, "--token-ids", ids.to_str().unwrap(), "--precision", "f32"];
    let uploaded = context.run(words.iter().chain(&job).chain(&["--push-model"]));
    assert!(uploaded.code == Some(2) && uploaded.stderr.contains("leave out --push-model"), "{uploaded:?}");
    let absent = context.run(words.iter().chain(&["--weights", "local:/no/such"]).chain(&job[2..]));
    assert!(absent.code == Some(2) && absent.stderr.contains("holds no config.json"), "{absent:?}");
    assert_eq!(cluster.jobs(), 0);
    is_home_and_gone(context.run(words.iter().chain(&job)), &cluster, &context, "olmoe-bf16");
    context.assert_nothing_left();
}

/// Starts a run of so many sequences; returns when its progress says this.
fn busy(cluster: &Cluster, context: &TestContext, sequences: &str, at: &str, more: &[&str]) -> std::process::Child {
    let model = context.work().join("model");
    let model = model.to_str().unwrap();
    assert!(run_worker(["demo-model", "--output", model]).status.success());
    let words = ["deploy", "-y", "--broker", "slurm", "--gpu-count", "0", "--push-model", "--model", model];
    let job = ["--num-sequences", sequences, "--sequence-length", "512"];
    let child = context.start(words.iter().chain(&job).chain(more));
    context.wait_for("the worker to be busy", || says_of_a_run(cluster, files::PROGRESS, at));
    child
}

#[test]
fn requeued_job_resumes_mid_pass() {
    let Some((cluster, context)) = office() else { return };
    let mut child = busy(&cluster, &context, "60", MID_PASS, &[]);
    cluster.says("scontrol", &["requeue", "1"]);
    assert!(!says_of_a_run(&cluster, files::MANIFEST, ""), "it was in mid-pass");
    let status = child.wait().unwrap();
    assert!(status.success(), "{}", context.stderr());
    assert_eq!((context.results().sequences, cluster.jobs()), (60, 1), "{}", context.stderr());
    assert!(!cluster.leases().exists(), "something is left in scratch");
    context.assert_nothing_left();
}

/// The partial results of an interrupted run were fetched, and nothing of it is left.
fn was_cut_off(code: Option<i32>, cluster: &Cluster, context: &TestContext) {
    assert_eq!(code, Some(4), "{}", context.stderr());
    let runs = context.json(&["runs", "list"]);
    let run = &runs["runs"][0];
    assert_eq!(run["state"]["ending"]["ending"], "deadline", "{runs:#}");
    assert_eq!(run["state"]["results"]["complete"], false, "{runs:#}");
    let folder = Path::new(run["state"]["results"]["folder"].as_str().expect("what there is came home"));
    assert!(folder.join(files::PROGRESS).exists() && folder.join(files::LOG).exists(), "{runs:#}");
    assert!(!cluster.leases().exists(), "something is left in scratch");
    context.assert_nothing_left();
}

#[test]
fn job_at_its_time_limit_saves_partial_results() {
    let Some((cluster, context)) = office() else { return };
    let mut child = busy(&cluster, &context, "60", MID_PASS, &[]);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let mut leases = std::fs::read_dir(cluster.leases()).unwrap().map(|entry| entry.unwrap().path());
    let lease = leases.find(|path| path.join("ends").exists()).expect("the job has begun");
    std::fs::write(lease.join("ends"), format!("{now}\n")).unwrap();
    cluster.inject_failure("end", "TIMEOUT").unwrap();
    let code = child.wait().unwrap().code();
    assert_eq!(cluster.jobs(), 1, "what the time limit ended is not submitted again: {}", context.stderr());
    was_cut_off(code, &cluster, &context);
}

/// Slurm makes it wait for half a minute.
#[test]
#[ignore = "takes two minutes: cargo test --workspace --test outliers -- --ignored slurm::"]
fn real_slurm_requeued_job_gives_the_same_bits() {
    let Some(cluster) = Cluster::real().unwrap() else { return };
    let context = context(&cluster);
    let mut child = busy(&cluster, &context, "60", MID_PASS, &[]);
    // Estimates of the queue use up ids, too.
    let job = cluster.says("squeue", &["--noheader", "--format=%i"]);
    cluster.says("scontrol", &["requeue", job.trim()]);
    assert!(!says_of_a_run(&cluster, files::MANIFEST, ""), "it was in mid-pass");
    assert!(child.wait().unwrap().success(), "{}", context.stderr());
    let job = cluster.says("scontrol", &["--oneliner", "show", "job"]);
    assert!(job.lines().count() == 1 && job.contains(" Restarts=1 "), "{job}");
    let here = TestContext::new();
    let model = here.work().join("model");
    let model = model.to_str().unwrap();
    assert!(run_worker(["demo-model", "--output", model]).status.success());
    let words = ["deploy", "-y", "--broker", "local", "--gpu-count", "0", "--push-model", "--model", model];
    let _ = here.run(words.iter().chain(&["--num-sequences", "60", "--sequence-length", "512"])).ok();
    // They name the model by its folder.
    let unnamed = |context: &TestContext| Results { model: String::new(), ..context.results() };
    assert_eq!(unnamed(&context), unnamed(&here));
    assert!(!cluster.leases().exists(), "something is left in scratch");
    context.assert_nothing_left();
}

/// Slurm's shortest time limit is a minute, which it checks twice a minute.
#[test]
#[ignore = "takes two minutes: cargo test --workspace --test outliers -- --ignored slurm::"]
fn real_slurm_ends_a_job_at_its_time_limit() {
    let Some(cluster) = Cluster::real().unwrap() else { return };
    let context = context(&cluster);
    let text = context.work().join("long.txt");
    std::fs::write(&text, "All that glisters is not gold; often have you heard that told. ".repeat(75_000)).unwrap();
    let more = ["--max-duration", "1m", "--allow-cut-short", "--corpus", text.to_str().unwrap()];
    let mut child = busy(&cluster, &context, "1500", "\"tokenizing\"", &more);
    // A controller stops the worker in time.
    child.kill().unwrap();
    child.wait().unwrap();
    let live = || cluster.says("squeue", &["-h", "-t", "PENDING,RUNNING,COMPLETING"]);
    context.wait_for("Slurm to end it", || live().is_empty());
    let job = cluster.says("scontrol", &["--oneliner", "show", "job"]);
    assert!(job.contains("JobState=TIMEOUT"), "{job}");
    was_cut_off(context.run(["attach"]).code, &cluster, &context);
}

/// Whether a file of a run on the cluster is there and holds this.
fn says_of_a_run(cluster: &Cluster, name: &str, text: &str) -> bool {
    let below = |folder: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
        entries.map(|entry| entry.path()).collect()
    };
    let mut runs = below(&cluster.leases()).into_iter().flat_map(|lease| below(&lease.join("outliers")));
    runs.any(|run| std::fs::read_to_string(run.join(name)).is_ok_and(|found| found.contains(text)))
}

#[test]
fn stray_job_is_cancelled_by_tag() {
    let Some((cluster, context)) = office() else { return };
    let listed = killed_while_its_job_waits(&cluster, &context);
    let id = listed["instances"][0]["id"].as_str().unwrap().to_owned();
    std::fs::remove_dir_all(context.state()).unwrap();
    let owner = id.split('-').nth(1).unwrap();
    let said = context.run(["instances", "terminate", &id, "--broker", "slurm", "--owner", owner, "-y"]).ok();
    assert!(said.stdout.contains("seen gone"), "{said:?}");
    assert!(!cluster.leases().exists());
    let foreign = context.run(["instances", "terminate", "7", "--broker", "slurm", "--force", "-y"]);
    assert_eq!(foreign.code, Some(2), "other jobs are never touched: {foreign:?}");
}

#[test]
fn fake_slurm_prints_recorded_slurm_output() {
    let Some(cluster) = Cluster::fake().unwrap() else { return };
    let recorded = |name: &str| {
        let path = workspace().join("tests/slurm/recorded").join(name);
        std::fs::read_to_string(path).unwrap()
    };
    let fields = |text: &str| text.lines().next().map(|line| line.split('|').count());
    let nodes = cluster.says("sinfo", &["--noheader", "--exact", "--format=@nodes %P|%a|%l|%F|%c|%m|%G"]);
    assert_eq!(fields(&nodes), fields(&recorded("sinfo-22.05.8.txt")));
    cluster.inject_failure("hold", "Priority").unwrap();
    let submit = ["--job-name=a", "--chdir=/", "--time=1", "--partition=cpu", "--output=job.log", "--parsable"];
    assert_eq!(cluster.says("sbatch", &submit), "1\n");
    let jobs = cluster.says("squeue", &ALL_JOBS);
    let real = recorded("squeue-22.05.8.txt");
    assert_eq!(jobs, "@job 1|PENDING|Priority|cpu|N/A|N/A||a\n");
    assert!(real.contains("|PENDING|JobHeldUser|gpu|N/A|N/A||") && fields(&jobs) == fields(&real), "{real}");
}

fn site(interval: Duration) -> Site {
    Site {
        host: "cluster".to_owned(),
        ssh_config: None,
        partition: None,
        account: None,
        qos: None,
        constraint: None,
        scratch: None,
        hf_home: None,
        hub: NOBODY.to_owned(),
        stage_partition: None,
        token: None,
        sbatch: Vec::new(),
        queue: Duration::from_secs(60),
        gpu_memory: None,
        price_per_gpu: UsdPerHour::default(),
        listing_interval: interval,
    }
}

fn broker(cluster: &Cluster, folder: &Path, interval: Duration) -> Slurm {
    let ssh = OpenSsh::new("cluster", Some(&cluster.ssh_config()), folder).unwrap();
    Slurm::new(site(interval), ssh, PROBE, None)
}

async fn first_offer(broker: &dyn Broker) -> Offer {
    let want = GpuRequest { gpu_count: Some(0), ..GpuRequest::default() };
    broker.offers(&want).await.unwrap().offers.remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn slurm_broker_meets_the_common_broker_contract() {
    let Some(cluster) = Cluster::fake().unwrap() else { return };
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(&cluster, folder.path(), Duration::from_millis(50));
    life::capabilities_are_true(&broker);
    life::a_good_key_is_good(&broker).await;
    let offer = first_offer(&broker).await;
    life::a_life(&broker, &offer, Bytes::from_gib(1)).await;
    life::instances_are_apart(&broker, &offer, Bytes::from_gib(1)).await;
    cluster.inject_failure("busy", "Unable to contact slurm controller (connect failure)").unwrap();
    tokio::time::sleep(Duration::from_millis(60)).await;
    assert!(broker.list().await.is_err(), "an error is never an empty list");
    assert!(broker.offers(&GpuRequest::default()).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_queue_queries_share_one_squeue_call() {
    let Some(cluster) = Cluster::fake().unwrap() else { return };
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(&cluster, folder.path(), Duration::from_secs(3600));
    let lists = futures::future::join_all((0..20).map(|_| broker.list())).await;
    assert!(lists.iter().all(|list| list.as_ref().is_ok_and(Vec::is_empty)), "{lists:?}");
    cluster.inject_failure("busy", "x").unwrap();
    assert!(broker.list().await.is_ok());
    assert_eq!(cluster.asked("squeue"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn queue_queries_of_several_processes_share_one_squeue_call() {
    let Some(cluster) = Cluster::fake().unwrap() else { return };
    // They share only the folder on the cluster, which any run makes.
    std::fs::create_dir(cluster.leases()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let brokers: Vec<Slurm> = (0..4).map(|_| broker(&cluster, folder.path(), Duration::from_secs(3600))).collect();
    let lists = futures::future::join_all(brokers.iter().map(|broker| broker.list())).await;
    assert!(lists.iter().all(|list| list.as_ref().is_ok_and(Vec::is_empty)), "{lists:?}");
    assert_eq!(cluster.asked("squeue"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_gone_from_the_queue_are_looked_up_once_and_named() {
    for (accounted, newer, word, says) in [
        ("accounting", false, "PREEMPTED", "took its place"),
        ("", false, "NODE_FAIL", "node failed"),
        ("", true, "NODE_FAIL", "node failed"),
    ] {
        let Some(cluster) = Cluster::fake().unwrap() else { return };
        let folder = tempfile::tempdir().unwrap();
        let broker = broker(&cluster, folder.path(), Duration::from_millis(50));
        let made = broker.create(&first_offer(&broker).await, &lease()).await.unwrap();
        if !accounted.is_empty() {
            cluster.inject_failure(accounted, "").unwrap();
        }
        if newer {
            cluster.inject_failure("newer", "").unwrap();
        }
        cluster.inject_failure("end", word).unwrap();
        cluster.inject_failure("forget", "").unwrap();
        for _ in 0..2 {
            tokio::time::sleep(Duration::from_millis(60)).await;
            let job = broker.get(&made.id).await.unwrap().expect("its folder is there");
            let InstanceState::Failed(why) = &job.state else { panic!("{job:?}") };
            assert!(why.contains(word) && why.contains(says), "{why}");
        }
        let asked = (cluster.asked("sacct"), cluster.asked("scontrol --oneliner"));
        assert_eq!(asked, (1, usize::from(accounted.is_empty())));
        broker.terminate(&made.id).await.unwrap();
        assert!(!cluster.leases().exists(), "nothing is left");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ssh_program_transfers_files_intact() {
    let Some(cluster) = Cluster::fake().unwrap() else { return };
    let folder = tempfile::tempdir().unwrap();
    let ssh = OpenSsh::new("cluster", Some(&cluster.ssh_config()), folder.path()).unwrap();
    let limit = TIMEOUT;
    let out = ssh.exec("printf out; printf err >&2; exit 7", b"", limit).await.unwrap();
    assert_eq!((out.status, &out.stdout[..], &out.stderr[..]), (Some(7), &b"out"[..], &b"err"[..]));
    let content = noise(3_000_001);
    assert_eq!(ssh.exec("cat", &content, limit).await.unwrap().stdout, content);
    let (from, back) = (folder.path().join("from"), folder.path().join("back"));
    std::fs::write(&from, &content).unwrap();
    let remote = cluster.sshd.home().join("it's a file");
    let remote = remote.to_str().unwrap();
    // The middle last, as after a broken connection.
    let middle = 65_536..131_072;
    for parts in [&[0..65_536, 131_072..3_000_001][..], std::slice::from_ref(&middle)] {
        let what = SendRequest { local: &from, remote, parts, progress: &|_| {} };
        ssh.send(&what).await.unwrap();
    }
    assert_eq!(std::fs::read(remote).unwrap(), content);
    assert_eq!(ssh.get(remote, &back, 3_000_001).await.unwrap(), 3_000_001);
    assert_eq!(std::fs::read(&back).unwrap(), content);
    assert!(ssh.get(remote, &folder.path().join("no"), 3_000_000).await.is_err(), "longer than allowed");
    assert_eq!(ssh.read_from(remote, 2_999_999, 100).await.unwrap().unwrap(), content[2_999_999..]);
    assert_eq!(ssh.read_from("/no/such", 0, 1).await.unwrap(), None);
    ssh.put_bytes(b"new", remote, 0o600).await.unwrap();
    assert_eq!(std::fs::read(remote).unwrap(), b"new");
    // The connection breaks; the next command opens another.
    assert!(cluster.sshd.kill_sessions().unwrap() > 0);
    let mut again = ssh.exec("echo again", b"", limit).await;
    if let Err(error) = &again {
        assert_eq!(error.kind, TransportErrorKind::Reset, "{error}");
        again = ssh.exec("echo again", b"", limit).await;
    }
    assert_eq!(again.unwrap().stdout, b"again\n");
}

#[test]
fn real_slurm_deploy_equals_the_reference_and_leaves_no_job() {
    let Some(cluster) = Cluster::real().unwrap() else { return };
    let context = context(&cluster);
    is_home_and_gone(context.run(deploy("llama-f32")), &cluster, &context, "llama-f32");
    assert_eq!(cluster.says("squeue", &["-h", "-t", "PENDING,RUNNING"]), "");
    context.assert_nothing_left();
}

#[test]
fn real_slurm_survey_equals_a_local_one_and_leaves_no_job() {
    let Some(cluster) = Cluster::real().unwrap() else { return };
    let (there, here) = (context(&cluster), TestContext::new());
    survey_of_three(&there);
    survey_of_three(&here);
    let _ = there.run(SURVEY).ok();
    let _ = here.run(SURVEY.map(|word| if word == "slurm" { "local" } else { word })).ok();
    for model in ["one", "two", "three"] {
        let results = |context: &TestContext| -> Results {
            let path = context.work().join("remote_results/three").join(model).join(files::RESULTS);
            let results: Results = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
            // They name the model by its folder.
            Results { model: String::new(), ..results }
        };
        assert_eq!(results(&there), results(&here), "{model}");
    }
    assert_eq!(cluster.says("squeue", &["-h", "-t", "PENDING,RUNNING"]), "");
    assert!(!cluster.leases().exists(), "something is left in scratch");
    there.assert_nothing_left();
}

#[test]
fn real_slurm_main_job_waits_for_its_staging_job() {
    let Some(cluster) = Cluster::real().unwrap() else { return };
    let hub = MockHub::start([Repo::new(HUB_MODEL, &golden("olmoe-bf16").join("model"))]).unwrap();
    let context = context(&cluster).with("HF_ENDPOINT", &hub.url());
    stage_in("net", &cluster, &context);
    is_home_and_gone(context.run(hub_deploy(&[])), &cluster, &context, "olmoe-bf16");
    let jobs = cluster.says("scontrol", &["--oneliner", "show", "job"]);
    let staging = jobs.lines().find(|job| job.contains("-stage ")).unwrap_or_default();
    assert!(jobs.lines().count() == 2 && staging.contains("JobState=COMPLETED"), "{jobs}");
    assert_eq!(cluster.says("squeue", &["-h", "-t", "PENDING,RUNNING"]), "");
    context.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn real_slurm_job_is_found_by_name_and_cancelled() {
    let Some(cluster) = Cluster::real().unwrap() else { return };
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(&cluster, folder.path(), Duration::from_millis(500));
    let (offer, lease) = (first_offer(&broker).await, lease());
    let made = broker.create(&offer, &lease).await.unwrap();
    let begun = Instant::now();
    while begun.elapsed() < TIMEOUT {
        let job = broker.get(&made.id).await.unwrap().expect("it is listed from the first look on");
        if matches!(job.state, InstanceState::Ready(_)) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let job = broker.get(&made.id).await.unwrap().unwrap();
    assert!(matches!(job.state, InstanceState::Ready(_)) && job.tag() == Some(lease.tag), "{job:?}");
    let by_name = cluster.says("squeue", &["-h", "-o", "%j"]);
    assert_eq!(by_name.trim(), made.id.0);
    assert!(broker.ends_at(&made.id).is_some(), "Slurm says when");
    broker.terminate(&made.id).await.unwrap();
    let gone = |instance: &Instance| instance.state == InstanceState::Terminating;
    assert!(broker.list().await.unwrap().iter().all(gone));
    assert!(!cluster.leases().exists(), "nothing is left");
}
