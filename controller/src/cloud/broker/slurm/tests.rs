//! Parses recorded output, and output that has not been recorded.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use outliers_protocol::FileBytes;
use proptest::prelude::*;

use super::queue::{self, Snapshot};
use super::{JOB, NAME, Site, Sku, Slurm, error, gpus_of, offers, refused, scratch};
use crate::cloud::broker::{
    Broker, BrokerErrorKind as Kind, GpuRequest, Instance, InstanceState, Lease, LeaseTag, Offer, RunTime, SshEndpoint,
    Stage,
};
use crate::host::transport::program::OpenSsh;
use crate::units::{Bytes, UsdPerHour};

const QUEUE: &str = include_str!("../../../../../tests/slurm/recorded/squeue-22.05.8.txt");
const LATER: &str = include_str!("../../../../../tests/slurm/recorded/squeue-22.05.8-later.txt");
const NODES: &str = include_str!("../../../../../tests/slurm/recorded/sinfo-22.05.8.txt");

fn site() -> Site {
    Site {
        host: "c".into(),
        ssh_config: None,
        partition: None,
        account: Some("lab".into()),
        qos: None,
        constraint: None,
        scratch: None,
        hf_home: None,
        hub: "https://hub.example".into(),
        stage_partition: Some("io".into()),
        token: None,
        sbatch: vec!["--nice=100".into()],
        queue: Duration::from_secs(86_400),
        gpu_memory: None,
        price_per_gpu: UsdPerHour::default(),
        listing_interval: Duration::from_secs(10),
    }
}

fn login_endpoint() -> SshEndpoint {
    SshEndpoint { host: "login".into(), port: 22, user: "me".into() }
}

fn tag(run: &str) -> String {
    format!("outliers-a1b2c3-{run}-n1x-1790000000")
}

fn seen(leases: &str, queue: &str) -> Snapshot {
    Snapshot::read(&format!("{leases}{queue}@end \n")).unwrap()
}

/// A line of a lease's folder.
fn folder(run: &str, stage: &str, ends: &str) -> String {
    format!("@lease {}|{stage}|{ends}|1 x a100 in gpu\n", tag(run))
}

fn state(snapshot: &Snapshot, run: &str) -> InstanceState {
    let found = snapshot.instances(&login_endpoint()).into_iter().find(|instance| instance.id.0 == tag(run));
    found.unwrap_or_else(|| panic!("{run} is listed")).state
}

#[test]
fn recorded_jobs_have_states_and_pending_reasons() {
    let leases: String = (1..=6).map(|i| folder(&format!("r{i}"), "waiting", "")).collect();
    let snapshot = seen(&leases, QUEUE);
    for (run, words) in [
        ("r3", &["JobHeldUser", "scontrol release 12"][..]),
        ("r4", &["PartitionTimeLimit", "never starts", "gpu"][..]),
        ("r6", &["Resources", "PENDING", "may start by 2026-11-30T10:00:00Z"][..]),
    ] {
        let InstanceState::Queued(why) = state(&snapshot, run) else { panic!("{run}: {:?}", state(&snapshot, run)) };
        assert!(words.iter().all(|word| why.contains(word)), "{why}");
    }
    assert_eq!(state(&snapshot, "r2"), InstanceState::Ready(login_endpoint()));
    assert_eq!(state(&snapshot, "r1"), InstanceState::Booting, "it is completing");
    let InstanceState::Failed(why) = state(&snapshot, "r5") else { panic!("it waited for too long") };
    assert!(why.contains("DEADLINE"), "{why}");
    let all = snapshot.instances(&login_endpoint());
    let foreign: Vec<&Instance> = all.iter().filter(|instance| instance.tag().is_none()).collect();
    let names: Vec<&str> = foreign.iter().map(|instance| instance.name.as_str()).collect();
    assert_eq!(names, ["we|ird", "other"], "a name may hold anything, and nothing of it is read: {foreign:?}");
    assert!(snapshot.ends_at(&tag("r2")).is_some() && snapshot.ends_at(&tag("r6")).is_none());
}

#[test]
fn finished_job_keeps_its_folder_until_results_are_saved() {
    let leases = folder("r2", "launched", "1700000000") + &folder("r6", "waiting", "");
    let snapshot = seen(&leases, LATER);
    assert_eq!(state(&snapshot, "r2"), InstanceState::Ready(login_endpoint()), "there may be results");
    assert!(snapshot.over(&tag("r2")).is_some_and(|why| why.contains("CANCELLED")));
    assert_eq!(snapshot.ends_at(&tag("r2")), None, "its time was not up");
    // Slurm forgets ended jobs.
    let forgotten = seen(&leases, "");
    assert_eq!(state(&forgotten, "r2"), InstanceState::Ready(login_endpoint()));
    assert!(matches!(state(&forgotten, "r6"), InstanceState::Failed(_)));
    assert_eq!(forgotten.ends_at(&tag("r2")), Some(1_700_000_000), "its script has written it down");
    let gone = seen("", LATER);
    assert!(gone.instances(&login_endpoint()).iter().all(|instance| instance.id.0 != tag("r2")), "no folder, no job");
}

#[test]
fn every_final_job_state_has_a_message() {
    for (word, says) in [
        ("OUT_OF_MEMORY", "more memory"),
        ("TIMEOUT", "time limit"),
        ("PREEMPTED", "took its place"),
        ("NODE_FAIL", "node failed"),
        ("CANCELLED", "cancelled"),
    ] {
        let queue = format!("@job 7|{word}|None|gpu|1|1700000000|n1|{}\n", tag("r1"));
        let snapshot = seen(&folder("r1", "launched", "1700000000"), &queue);
        let over = snapshot.over(&tag("r1")).unwrap();
        assert!(over.contains(word) && over.contains(says), "{over}");
        let by_time = word == "TIMEOUT";
        assert_eq!(snapshot.ends_at(&tag("r1")).is_some(), by_time, "{word}");
    }
    let twice = format!("@job 7|TIMEOUT|None|gpu|1|1|n1|{0}\n@job 8|PENDING|Priority|gpu|N/A|N/A||{0}\n", tag("r1"));
    assert_eq!(seen("", &twice).over(&tag("r1")), None, "one that lives counts");
}

/// All that the page "Job State Codes" of Slurm's documentation names.
#[test]
fn states_of_newer_slurm_versions_are_mapped() {
    for word in [
        "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PENDING PREEMPTED RUNNING SUSPENDED",
        "TIMEOUT COMPLETING CONFIGURING EXPEDITING LAUNCH_FAILED POWER_UP_NODE RECONFIG_FAIL REQUEUED REQUEUE_FED",
        "REQUEUE_HOLD RESIZING RESV_DEL_HOLD REVOKED SIGNALING SPECIAL_EXIT STAGE_OUT STOPPED UPDATE_DB",
    ]
    .iter()
    .flat_map(|words| words.split(' '))
    {
        let job = format!("@job 7|{word}|None|gpu|1|1700000000|n1|{}\n", tag("r1"));
        let state = state(&seen(&folder("r1", "launched", "1700000000"), &job), "r1");
        assert!(!matches!(state, InstanceState::Unknown(_)), "{word}");
    }
}

#[test]
fn main_job_and_staging_job_form_one_instance() {
    let waits = format!("@job 8|PENDING|Dependency|gpu|N/A|N/A||{}\n", tag("r1"));
    let fetches = |word: &str, reason: &str| format!("@job 7|{word}|{reason}|io|1|2|n1|{}-stage\n{waits}", tag("r1"));
    let lease = folder("r1", "waiting", "");
    for (queue, says) in [
        (fetches("RUNNING", "None"), "job 7 in io fetches the model for job 8"),
        (fetches("PENDING", "Resources"), "PENDING (Resources), may start by 1970-01-01T00:10:00Z; it fetches"),
        (fetches("COMPLETED", "None"), "job 8 in gpu: PENDING (Dependency)"),
    ] {
        let all = seen(&lease, &queue).instances(&login_endpoint());
        assert_eq!(all.len(), 1, "{all:?}");
        let InstanceState::Queued(why) = &all[0].state else { panic!("{all:?}") };
        assert!(why.contains(says), "{why}");
    }
    let failed = format!(
        "@unstaged {}|config.json could not be fetched\n{lease}@job 7|FAILED|NonZeroExitCode|io|1|2|n1|{0}-stage\n",
        tag("r1")
    );
    let gone = format!("@job 8|CANCELLED|DependencyNeverSatisfied|gpu|N/A|2||{}\n", tag("r1"));
    let InstanceState::Failed(why) = state(&seen(&failed, &gone), "r1") else { panic!("it never starts") };
    assert!(why.contains("failed: config.json could not be fetched"), "{why}");
    let ending = seen("", &format!("@job 7|COMPLETING|None|io|1|2|n1|{}-stage\n", tag("r1")));
    assert_eq!(state(&ending, "r1"), InstanceState::Terminating, "its folder goes before it does");
}

#[test]
fn sacct_names_jobs_gone_from_the_queue() {
    let leases = folder("r1", "launched", "1700000000") + &folder("r2", "waiting", "");
    for (word, says, by_time) in [
        ("TIMEOUT", "time limit", true),
        ("PREEMPTED", "took its place", false),
        ("NODE_FAIL", "node failed", false),
        ("OUT_OF_MEMORY", "more memory", false),
        ("RUNNING", "in the queue no more", true),
    ] {
        let snapshot = seen(&leases, &format!("@past {}|{word}\n@past {}|\n", tag("r1"), tag("r2")));
        let all = snapshot.instances(&login_endpoint());
        let shown = all.iter().find(|instance| instance.id.0 == tag("r1")).unwrap();
        assert_eq!(shown.state, InstanceState::Ready(login_endpoint()), "its files are there");
        assert!(shown.hardware.starts_with("1 x a100 in gpu; ") && shown.hardware.contains(says), "{shown:?}");
        assert_eq!(snapshot.ends_at(&tag("r1")).is_some(), by_time, "{word}");
        assert!(snapshot.over(&tag("r2")).is_some_and(|why| why.contains("in the queue no more")));
    }
}

#[test]
fn job_has_run_for_as_long_as_queue_script_and_accounting_say() {
    let time = |ended_s, since, until| Some(RunTime { ended_s, since, until });
    let job =
        |word: &str, starts: &str, ends: &str| format!("@job 7|{word}|None|gpu|{starts}|{ends}|n1|{}\n", tag("r1"));
    let past = |words: &str| format!("@past {}|{words}\n", tag("r1"));
    let script = |times: &str, alive: &str| format!("@time {}|{times}|{alive}\n", tag("r1"));
    for (queue, expected) in [
        (job("PENDING", "9000", "N/A"), time(0, None, None)),
        (job("RUNNING", "1000", "1600"), time(0, Some(1000), Some(1600))),
        (job("RUNNING", "1000", "1600") + &script("0 1004", "1060"), time(0, Some(1000), Some(1600))),
        // Put back: an earlier start of 200 s, one of 56 s.
        (job("PENDING", "9000", "N/A") + &script("200 1004", "1060"), time(256, None, None)),
        (job("RUNNING", "5000", "5600") + &script("200 1004", "1060"), time(256, Some(5000), Some(5600))),
        (job("RUNNING", "5000", "5600") + &script("256 5002", "5002"), time(256, Some(5000), Some(5600))),
        (job("TIMEOUT", "5000", "5600") + &script("256 5002", "5542"), time(856, None, None)),
        (job("COMPLETING", "5000", "5100"), time(100, None, None)),
        (job("CANCELLED", "1750", "1750"), time(0, None, None)),
        // The queue has forgotten it.
        (past("NODE_FAIL 5000 5600") + &script("256 5002", "5542"), time(856, None, None)),
        (past("NODE_FAIL Unknown Unknown") + &script("256 5002", "5542"), time(796, None, None)),
        (script("x 5002", "5542"), time(0, None, None)),
    ] {
        let snapshot = seen(&folder("r1", "launched", ""), &queue);
        assert_eq!(snapshot.run_time(&tag("r1")), expected, "{queue}");
    }
    assert_eq!(seen("", "").run_time(&tag("r1")), None);
    // Its folder is gone, and with it what the script said of the first start.
    let mut later = seen("", &job("CANCELLED", "5000", "5050"));
    later.remember(&seen(&folder("r1", "launched", ""), &script("256 5002", "5040")));
    assert_eq!(later.run_time(&tag("r1")), time(306, None, None));
}

#[test]
fn place_in_the_queue_is_part_of_the_reason_to_wait() {
    let why = |more: &str| {
        let waits = format!("@job 8|PENDING|Priority|gpu|600|N/A||{}\n{more}", tag("r1"));
        let snapshot = seen(&folder("r1", "waiting", ""), &waits);
        let InstanceState::Queued(why) = state(&snapshot, "r1") else { panic!("{more}") };
        why
    };
    let before = "job 8 in gpu: PENDING (Priority), may start by 1970-01-01T00:10:00Z";
    assert_eq!(why(""), before);
    assert_eq!(why("@place 8|3|17\n@place 9|4|17\n"), format!("{before}, position 3 of 17"));
    assert_eq!(why("@places hidden\n"), format!("{before}, position not shown by this cluster"));
    assert_eq!(why("@place 8|x|17\n"), before);
}

#[test]
fn five_hundred_jobs_are_listed_by_one_query() {
    let folder = tempfile::tempdir().unwrap();
    let (root, asked) = (folder.path().join("jobs"), folder.path().join("asked"));
    for i in 0..500 {
        let lease = root.join(tag(&format!("r{i}")));
        std::fs::create_dir_all(&lease).unwrap();
        std::fs::write(lease.join("job.id"), format!("{i}\n")).unwrap();
    }
    let squeue = format!(
        "squeue() {{ echo asked >> {}; i=0; while [ $i -lt 500 ]; do\n\
         echo \"@job $i|RUNNING|None|gpu|1|2|n1|outliers-a1b2c3-r$i-n1x-1790000000\"; i=$((i + 1)); done; }}",
        asked.display()
    );
    let script_of_snapshot = queue::snapshot_script(root.to_str().unwrap(), "here", Duration::from_secs(60));
    for _ in 0..2 {
        let script = format!("{squeue}\n{script_of_snapshot}");
        let out = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        let answer = String::from_utf8(out.stdout).unwrap();
        let all = Snapshot::read(&answer).unwrap().instances(&login_endpoint());
        let up = all.iter().filter(|instance| matches!(instance.state, InstanceState::Ready(_))).count();
        assert_eq!((all.len(), up), (500, 500), "{:?}", String::from_utf8_lossy(&out.stderr));
    }
    assert_eq!(std::fs::read_to_string(asked).unwrap(), "asked\n", "the second look shares the first one's answer");
}

#[test]
fn job_that_slurm_is_ending_keeps_the_time_limit_of_its_script() {
    let queue = format!("@job 7|COMPLETING|None|gpu|1|1700000000|n1|{}\n", tag("r1"));
    let snapshot = seen(&folder("r1", "launched", "1800000000"), &queue);
    assert!(snapshot.is_ending(&tag("r1")));
    assert_eq!(snapshot.ends_at(&tag("r1")), Some(1_800_000_000), "not the moment at which it is ended");
}

/// The job's script in a lease's folder, in a process group of its own.
fn job_in(folder: &Path) -> Child {
    let script = format!("RUN=outliers/r1 LIMIT=3600 HUB=http://127.0.0.1:9\nprobe() {{ :; }}\n{JOB}");
    let mut job = Command::new("sh");
    job.args(["-c", &script]).current_dir(folder).env("SLURM_JOB_ID", "7").process_group(0);
    job.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn job_that_is_asked_to_end_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("outliers/r1");
    std::fs::create_dir_all(&run).unwrap();
    std::fs::write(folder.path().join("lease"), "").unwrap();
    std::fs::write(run.join("go"), "").unwrap();
    let worker = "trap 'echo 143 > outliers/r1/exit_code; exit' TERM\n: > outliers/r1/up\n\
                  while :; do sleep 0.1; done\n";
    std::fs::write(run.join("launch.sh"), worker).unwrap();
    let mut job = job_in(folder.path());
    let begun = Instant::now();
    while !run.join("up").exists() && begun.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(run.join("up").exists(), "the worker was started");
    let asked = Command::new("sh").args(["-c", &format!("kill -TERM {}", job.id())]).status().unwrap();
    assert!(asked.success() && job.wait().unwrap().code().is_some());
    assert!(run.join("ending").exists() && !run.join("exit_code").exists(), "it did not die by itself");
    // Put back into the queue, it has forgotten that.
    std::fs::write(run.join("stop"), "").unwrap();
    assert!(job_in(folder.path()).wait().unwrap().success() && !run.join("ending").exists());
}

#[test]
fn job_being_submitted_is_booting() {
    let snapshot = seen(&folder("r1", "submitting", ""), "");
    assert_eq!((state(&snapshot, "r1"), snapshot.over(&tag("r1"))), (InstanceState::Booting, None));
    assert_eq!(seen("", "").over(&tag("r1")), None, "one that nothing is known of is not over");
}

#[test]
fn truncated_list_is_an_error_and_malformed_lines_are_shown() {
    assert!(Snapshot::read(QUEUE).is_err_and(|error| error.kind == Kind::Unavailable));
    let odd = seen("", "@job 1|RUNNING\n@job x y|lower|a|b|c|d|e\n");
    let all = odd.instances(&login_endpoint());
    assert!(all.len() == 2 && all.iter().all(Instance::is_nameless), "{all:?}");
    let word = seen("", &format!("@job 1|DANCING|None|gpu|N/A|N/A|n1|{}\n", tag("r1")));
    assert_eq!(state(&word, "r1"), InstanceState::Unknown("DANCING".into()));
}

fn offered(nodes: &str, want: &GpuRequest) -> Vec<Offer> {
    let disk = "@disk /dev/sda1 1000 100 900 10% /\n";
    offers::read(&format!("{nodes}{disk}"), want, &site()).offers.offers
}

#[test]
fn node_groups_become_offers_of_the_requested_size() {
    let want = |count| GpuRequest { gpu_count: Some(count), ..GpuRequest::default() };
    assert!(offered(NODES, &want(1)).is_empty(), "the recorded cluster shows no GPUs");
    let cpus = offered(NODES, &want(0));
    let cpu = &cpus[0];
    assert_eq!((cpu.gpu_count, cpu.cpu_cores, cpu.cpu_ram), (0, Some(2), Some(Bytes::from_mib(4000))));
    let nodes = "@nodes gpu*|up|2-00:00:00|1/1/0/2|64|512000|gpu:a100:4(S:0-1),shard:8\n\
                 @nodes gpu|up|12:00:00|0/0/1/1|32|256000|gpu:h100:2\n\
                 @nodes old|down|infinite|0/9/0/9|8|1000|gpu:8\n@nodes cpu|up|30:00|0/1/0/1|8|1000|(null)\n";
    let two = offered(nodes, &want(2));
    let names: Vec<_> = two.iter().map(|offer| (offer.gpu.as_deref(), offer.gpu_count, offer.cpu_cores)).collect();
    assert_eq!(names, [(Some("a100"), 2, Some(32)), (Some("H100"), 2, Some(32))]);
    assert_eq!(two[0].vram, Some(Bytes::from_gib(40)), "the smaller of two, where the name leaves it open");
    assert_eq!(two[0].price, UsdPerHour::default());
    assert!(two.iter().all(|offer| offer.queued));
    let priced = Site { price_per_gpu: UsdPerHour::from_dollars(1.5), ..site() };
    let priced = offers::read(nodes, &want(2), &priced).offers.offers;
    assert!(priced.iter().all(|offer| offer.price == UsdPerHour::from_dollars(3.0)), "{priced:?}");
    let sizes = ["2 x a100 in gpu; its job is over", "4 GPUs in gpu", "8 CPU cores in cpu", ""].map(gpus_of);
    assert_eq!(sizes, [2, 4, 0, 0]);
    assert_eq!(two[0].region.as_deref(), Some("gpu: 1 of 2 nodes idle"));
    let sku: Sku = serde_json::from_str(&two[1].key).unwrap();
    assert_eq!((sku.limit_s, sku.gpu_type.as_deref(), sku.mem_mib), (Some(43_200), Some("h100"), 256_000));
    let found = offers::read(nodes, &want(4), &site()).offers;
    let dropped: Vec<&str> = found.dropped.iter().map(|dropped| dropped.reason.as_str()).collect();
    assert_eq!(dropped, ["with fewer GPUs in a node", "partition old is not up", "without GPUs"]);
}

#[test]
fn start_estimate_of_the_queue_is_shown() {
    let nodes = "@nodes gpu|up|1:00:00|0/1/0/1|8|1000|gpu:l4:1\n@nodes big|up|1:00:00|0/1/0/1|8|1000|gpu:l4:1\n";
    let mut found = offers::read(nodes, &GpuRequest::default(), &site());
    found.note_starts(
        "@start-0 sbatch: Job 5 to start at 8200 using 1 processors on nodes vm in partition gpu \n\
         @start-1 allocation failure: Requested node configuration is not available \n@now 1000\n",
    );
    let offers = found.offers.offers;
    let region = |i: usize| offers[i].region.clone().unwrap();
    assert!(region(0).ends_with("starts in some 2 h"), "{}", region(0));
    assert!(region(1).contains("no start: allocation failure"), "{}", region(1));
    assert_eq!([offers[0].starts_in_s, offers[1].starts_in_s], [Some(7200), None]);
}

fn slurm() -> Slurm {
    Slurm::new(site(), OpenSsh::new("c", None, std::path::Path::new("/tmp/x")).unwrap(), "echo facts", None)
}

fn lease(stage: Option<Stage>) -> Lease {
    let tag = tag("r1").parse::<LeaseTag>().unwrap();
    Lease { tag, ssh_public_key: String::new(), disk: Bytes::from_gib(1), stage }
}

fn two_gpus() -> Sku {
    let (host, partition) = ("c".into(), "gpu".into());
    Sku {
        host,
        scratch: None,
        partition,
        gpus: 2,
        gpu_type: Some("a100".into()),
        cpus: 8,
        mem_mib: 1000,
        limit_s: None,
    }
}

#[test]
fn offer_without_a_login_node_is_of_one_cluster() {
    let offer = |sku: &Sku| Offer::new(NAME, serde_json::to_string(sku).unwrap(), 2, UsdPerHour::default());
    let nameless = offer(&Sku { host: String::new(), ..two_gpus() });
    assert!(slurm().made(&nameless) && !slurm().taking_nameless(false).made(&nameless));
    let named = offer(&Sku { host: site().host, ..two_gpus() });
    assert!(slurm().taking_nameless(false).made(&named));
    assert!(!slurm().made(&offer(&Sku { host: "another".into(), ..two_gpus() })));
}

/// The settings may name another scratch folder than when the job was submitted.
#[test]
fn offer_is_of_the_scratch_folder_in_its_record() {
    let offer = |scratch: Option<&str>| {
        let sku = Sku { scratch: scratch.map(str::to_owned), ..two_gpus() };
        Offer::new(NAME, serde_json::to_string(&sku).unwrap(), 2, UsdPerHour::default())
    };
    let at = |path: &str| {
        let ssh = OpenSsh::new("c", None, Path::new("/tmp/x")).unwrap();
        Slurm::new(site().with_scratch(path.to_owned()), ssh, "", None)
    };
    for (recorded, named, same) in [
        (Some(""), "", true),
        (Some("/scratch/me"), "/scratch/me", true),
        (Some("/scratch/me"), "", false),
        (Some(""), "/scratch/me", false),
        (None, "/scratch/me", true),
    ] {
        assert_eq!(at(named).made(&offer(recorded)), same, "{recorded:?} {named}");
        assert_eq!(scratch(&offer(recorded)).as_deref(), recorded);
    }
}

#[test]
fn staging_job_is_submitted_before_the_main_job() {
    let file = |name: &str, bytes| FileBytes { name: name.into(), bytes };
    let files = vec![file("config.json", 7), file("model.safetensors", 8)];
    let stage = Stage { model: "a/b".into(), commit: "c0ffee".into(), files };
    let script = slurm().submission("/it's me", &two_gpus(), &lease(Some(stage)), Duration::from_secs(3600));
    let at = |part: &str| script.find(part).unwrap_or_else(|| panic!("{part} in {script}"));
    assert!(at("--partition=io") < at("--dependency=afterok:") && at("< stage.sh") < at("< job.sh"));
    for part in [
        "BASE=https://hub.example/a/b/resolve/c0ffee",
        &format!("--job-name={}-stage", tag("r1")),
        "7 config.json\n8 model.safetensors\n",
        "--kill-on-invalid-dep=yes",
        "--account=lab",
    ] {
        at(part);
    }
    assert_eq!(script.matches("--gres").count(), 1, "it fetches without GPUs");
    let checked = std::process::Command::new("sh").args(["-n", "-c", &script]).output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
}

#[test]
fn staging_job_is_cancelled_even_without_its_folder() {
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().join("jobs");
    let lease = root.join(tag("r1"));
    let cancelled = || {
        let removal = Slurm::removal(root.to_str().unwrap(), "me", &tag("r1").parse().unwrap());
        let script = format!("scancel() {{ echo \"$*\"; }}\n{removal}");
        let out = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        assert!(out.status.success() && !lease.exists(), "{out:?}");
        String::from_utf8(out.stdout).unwrap()
    };
    let fetches = format!("--user=me --name={}-stage\n", tag("r1"));
    std::fs::create_dir_all(&lease).unwrap();
    assert!(!cancelled().contains(&fetches), "nothing is fetched for it");
    std::fs::create_dir_all(&lease).unwrap();
    std::fs::write(lease.join("stage.sh"), "").unwrap();
    assert!(cancelled().ends_with(&fetches));
    assert!(cancelled().ends_with(&fetches), "nobody can say any more");
}

#[test]
fn submission_has_tag_and_limits_and_is_shell_quoted() {
    let (lease, sku) = (lease(None), two_gpus());
    let root = "/scratch/it's me; rm -rf x";
    let script = slurm().submission(root, &sku, &lease, Duration::from_secs(3601));
    for part in [
        "--time=61",
        "--gres=gpu:a100:2",
        "--account=lab",
        "--requeue",
        "--signal=B:TERM@120",
        "--deadline=now+90061",
        "--nice=100",
        &format!("--job-name={}", tag("r1")),
        "https://hub.example",
    ] {
        assert!(script.contains(part), "{part} in {script}");
    }
    let short = slurm().submission("/s", &sku, &lease, Duration::from_secs(300));
    assert!(!short.contains("--signal"), "it would be asked to stop as soon as it starts");
    assert!(!short.contains("stage.sh") && !short.contains("--dependency"), "nothing is to be fetched");
    let checked = std::process::Command::new("sh").args(["-n", "-c", &script]).output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
}

#[test]
fn sbatch_refusals_map_to_error_kinds() {
    for (words, kind) in [
        ("Socket timed out on send/recv operation", Kind::Maybe),
        ("Unable to contact slurm controller (connect failure)", Kind::Unavailable),
        ("Munge encode failed: Failed to access munged.socket", Kind::Unavailable),
        ("Invalid account or account/partition combination specified", Kind::Budget),
        ("Job violates accounting/QOS policy (job submit limit)", Kind::Budget),
        ("the scratch folder: mkdir: cannot create directory: Disk quota exceeded", Kind::Budget),
        ("Requested node configuration is not available", Kind::NoCapacity),
        ("Invalid partition name specified", Kind::Rejected),
    ] {
        assert_eq!(refused(words), kind, "{words}");
    }
    assert_eq!(error(Kind::Maybe, String::new()).broker, NAME);
}

proptest! {
    #[test]
    fn any_answer_parses_without_panic(text in "(@job |@lease |@unstaged |@nodes |[a-z0-9|:/(),-]|\n){0,60}") {
        let _ = Snapshot::read(&format!("{text}\n@end ")).map(|snapshot| snapshot.instances(&login_endpoint()));
        let want = GpuRequest { gpu_count: Some(0), ..GpuRequest::default() };
        let _ = offers::read(&text, &want, &site());
    }
}
