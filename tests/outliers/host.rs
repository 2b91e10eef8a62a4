//! The life of a host with a fake worker, against a real OpenSSH server.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use outliers::cloud::broker::SshEndpoint;
use outliers::host::keys::RunKey;
use outliers::host::transport::TransportErrorKind as Kind;
use outliers::host::transport::ssh::HostKeyPin;
use outliers::host::{
    Cursor, Fetched, HostErrorKind, HostEvent, JobStatus, Launched, RemoteHost, RemoteWorker, reach, unfinished,
};
use outliers::secret::Secret;
use outliers_protocol::{FileBytes, JobSpec, ModelSource};
use outliers_tests::sshd::Sshd;
use tempfile::TempDir;
use tokio::time::Instant;

mod guard;
mod savepoint;

/// Recorded events.
#[derive(Default)]
struct Events(Mutex<Vec<HostEvent>>);

impl Events {
    fn on(&self) -> impl Fn(HostEvent) + Send + Sync {
        |event| self.0.lock().unwrap().push(event)
    }

    fn all(&self) -> Vec<HostEvent> {
        self.0.lock().unwrap().clone()
    }

    fn layers(&self) -> Vec<usize> {
        let layer = |event| match event {
            HostEvent::Progress(progress) => Some(progress.layer),
            _ => None,
        };
        self.all().into_iter().filter_map(layer).collect()
    }

    fn logs(&self) -> String {
        let line = |event| match event {
            HostEvent::Log(line) => Some(line),
            _ => None,
        };
        self.all().into_iter().filter_map(line).collect::<Vec<_>>().join("\n")
    }
}

/// A server, a host behind it, and a folder for fetched files.
struct HostFixture {
    server: Sshd,
    host: RemoteHost,
    here: TempDir,
    events: Events,
}

impl HostFixture {
    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        // Timeout of a test. A worker that ignores signals takes 18 s of it.
        let limit = within(120);
        while !holds(self) {
            assert!(Instant::now() < limit, "in vain: {what}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn new() -> Option<Self> {
        Self::with("").await
    }

    async fn with(config: &str) -> Option<Self> {
        let server = Sshd::start_with(config).unwrap()?;
        let events = Events::default();
        let pin = Some(server.host_key().clone());
        let (host, _) =
            reach(&server.endpoint(), server.key().private_path(), pin, within(20), &events.on()).await.unwrap();
        Some(Self { server, host, here: tempfile::tempdir().unwrap(), events })
    }

    fn worker_file(&self, version: &str) -> PathBuf {
        let path = self.here.path().join("outliers-worker");
        let script = include_str!("fake_worker.sh").replace("VERSION", version);
        std::fs::write(&path, script).unwrap();
        path
    }

    async fn worker(&self) -> RemoteWorker {
        self.host.push_worker(&self.worker_file(env!("CARGO_PKG_VERSION")), &self.events.on()).await.unwrap()
    }

    async fn launch(&self, run: &str, scenario: &str) -> Launched {
        let worker = self.worker().await;
        self.host.launch(&worker, run, &job(scenario), &[]).await.unwrap()
    }

    async fn follow(&self, run: &str) -> JobStatus {
        self.host.follow(run, &mut Cursor::default(), within(40), &self.events.on()).await.unwrap()
    }

    async fn fetch(&self, run: &str) -> Fetched {
        self.host.fetch(run, &self.home_folder(run), &expected(), &self.events.on()).await.unwrap()
    }

    fn home_folder(&self, run: &str) -> PathBuf {
        self.here.path().join("results").join(run)
    }

    fn remote(&self, run: &str, name: &str) -> PathBuf {
        self.server.home().join("outliers").join(run).join(name)
    }
}

fn within(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds)
}

fn job(scenario: &str) -> JobSpec {
    JobSpec::new(ModelSource::Folder { path: scenario.to_owned() })
}

/// Processes that the fake worker may leave.
fn expected() -> Vec<FileBytes> {
    let names = ["job.json", "results.json", "metadata.json", "linked.json", "missing.json", "pipe.json", "vast.json"];
    names.map(|name| FileBytes { name: name.to_owned(), bytes: 1 << 20 }).to_vec()
}

fn kill(target: &str) {
    assert!(std::process::Command::new("kill").args(["-9", "--", target]).status().unwrap().success());
}

fn pid_of(launched: Launched) -> u32 {
    let Launched::Started { pid } = launched else { panic!("{launched:?}") };
    assert!(pid > 1);
    pid
}

const ENDED_WELL: JobStatus = JobStatus::Ended { exit: Some(0) };

#[tokio::test]
async fn run_goes_from_probe_to_results() {
    let Some(fixture) = HostFixture::new().await else { return };
    let host = &fixture.host;
    let facts = host.probe().await.unwrap();
    assert_eq!(facts.home, fixture.server.home().to_str().unwrap());
    assert_eq!(
        (facts.user.as_str(), facts.arch.as_str()),
        (fixture.server.endpoint().user.as_str(), std::env::consts::ARCH)
    );
    assert!(facts.cores.unwrap() >= 1 && facts.ram.unwrap().gib() > 0.1 && facts.disk_free.unwrap().gib() > 0.01);
    assert!(facts.clock_skew.unwrap().abs() <= 1);

    let worker = fixture.worker().await;
    assert!(worker.path.ends_with(&format!(".cache/outliers/bin/{}/outliers-worker", worker.sha256)));
    assert!(
        fixture.events.all().iter().any(|e| matches!(e, HostEvent::Uploading { sent, total, .. } if sent == total))
    );
    let already =
        |fixture: &HostFixture| fixture.events.all().iter().any(|e| matches!(e, HostEvent::AlreadyThere { .. }));
    assert!(!already(&fixture));
    assert_eq!(fixture.worker().await, worker);
    assert!(already(&fixture));

    assert_eq!(host.status("r1").await.unwrap(), JobStatus::NotStarted);
    let secret = Secret::new("hf_'quote' $HOME");
    let launched = host.launch(&worker, "r1", &job("slow"), &[("HF_TOKEN", &secret)]).await.unwrap();
    let pid = pid_of(launched);
    assert_eq!(host.status("r1").await.unwrap(), JobStatus::Running);
    let again = host.launch(&worker, "r1", &job("slow"), &[]).await.unwrap();
    assert_eq!(again, Launched::Running { pid });
    assert!(!fixture.remote("r1", ".secrets").exists(), "read and removed");
    let table = std::process::Command::new("ps").args(["-A", "-o", "command="]).output().unwrap();
    assert!(!String::from_utf8_lossy(&table.stdout).contains("hf_'quote'"));

    assert_eq!(fixture.follow("r1").await, ENDED_WELL);
    assert_eq!(fixture.events.layers(), [0, 1, 2, 3, 4, 4]);
    assert!(fixture.events.logs().contains("the worker says hello"));
    assert!(fixture.events.all().contains(&HostEvent::Launched { pid }));
    assert_eq!(host.launch(&worker, "r1", &job("slow"), &[]).await.unwrap(), Launched::Ended { exit: Some(0) });

    let fetched = fixture.fetch("r1").await;
    assert!(!fetched.partial && fetched.manifest.is_some());
    let whole = ["job.json", "manifest.json", "metadata.json", "progress.jsonl", "results.json", "worker.log"];
    assert_eq!(fetched.files, whole);
    let results = std::fs::read_to_string(fixture.home_folder("r1").join("results.json")).unwrap();
    assert_eq!(results, format!("{{\"token\":\"{}\"}}", secret.expose()));
    let brought: JobSpec =
        serde_json::from_slice(&std::fs::read(fixture.home_folder("r1").join("job.json")).unwrap()).unwrap();
    assert_eq!(brought, job("slow"));
    assert_eq!(fixture.fetch("r1").await, fetched, "a second fetch changes nothing");
    assert_eq!(std::fs::read_dir(fixture.here.path().join("results")).unwrap().count(), 1, "no .part stays");
}

#[tokio::test]
async fn job_survives_a_lost_connection() {
    let Some(fixture) = HostFixture::new().await else { return };
    pid_of(fixture.launch("r1", "slow").await);
    let mut cursor = Cursor::default();
    let on = fixture.events.on();
    let follow = fixture.host.follow("r1", &mut cursor, within(40), &on);
    let cut = async {
        fixture.until("the first layer", |fixture| !fixture.events.layers().is_empty()).await;
        fixture.server.go_down().unwrap();
        let is_lost = |event: &HostEvent| matches!(event, HostEvent::ConnectionLost { .. });
        fixture.until("the loss", |fixture| fixture.events.all().iter().any(is_lost)).await;
        fixture.server.come_back().unwrap();
        // Again without traffic: a session that dies while idle.
        fixture.until("the return", |fixture| fixture.events.all().contains(&HostEvent::Reconnected)).await;
        fixture.server.kill_sessions().unwrap();
    };
    let (status, ()) = tokio::join!(follow, cut);
    assert_eq!(status.unwrap(), ENDED_WELL);
    assert_eq!(fixture.events.layers(), [0, 1, 2, 3, 4, 4], "no line lost, none twice");
    let lost = fixture.events.all().iter().filter(|e| matches!(e, HostEvent::ConnectionLost { .. })).count();
    let back = fixture.events.all().iter().filter(|e| matches!(e, HostEvent::Reconnected)).count();
    assert!(lost >= 1 && lost == back, "{lost} {back}: {:?}", fixture.events.all());
    // Another process that continues from the first one's cursor sees no event twice.
    let later = Events::default();
    fixture.host.follow("r1", &mut cursor, within(10), &later.on()).await.unwrap();
    assert!(later.layers().is_empty());
    fixture.server.kill_sessions().unwrap();
    assert!(!fixture.fetch("r1").await.partial);
}

#[tokio::test]
async fn killed_worker_is_reported_and_partial_results_are_saved() {
    let Some(fixture) = HostFixture::new().await else { return };
    let pid = pid_of(fixture.launch("group", "hangs").await);
    kill(&format!("-{pid}"));
    assert_eq!(fixture.follow("group").await, JobStatus::Ended { exit: None });
    assert_eq!(fixture.host.status("group").await.unwrap(), JobStatus::Ended { exit: None });
    let fetched = fixture.fetch("group").await;
    assert!(fetched.partial && fetched.manifest.is_none());
    assert_eq!(fetched.files, ["job.json", "progress.jsonl", "worker.log"]);
    assert_eq!(fixture.fetch("group").await, fetched, "a partial folder is replaced");

    let pid = pid_of(fixture.launch("alone", "hangs").await);
    let children = std::process::Command::new("ps").args(["-A", "-o", "pid=,ppid="]).output().unwrap();
    let children = String::from_utf8(children.stdout).unwrap();
    let worker = children.lines().find(|l| l.split_whitespace().nth(1) == Some(&pid.to_string())).unwrap();
    kill(worker.split_whitespace().next().unwrap());
    assert_eq!(fixture.follow("alone").await, JobStatus::Ended { exit: Some(137) });

    fixture.launch("fails", "fails").await;
    assert_eq!(fixture.follow("fails").await, JobStatus::Ended { exit: Some(3) });
    assert!(fixture.events.logs().contains("no such model"));
}

#[tokio::test]
async fn zombie_or_foreign_pid_is_not_taken_for_the_worker() {
    let Some(fixture) = HostFixture::new().await else { return };
    // Not reaped: the state of a killed wrapper in a container whose first process does not reap.
    let mut child = std::process::Command::new("sleep").arg("60").stdout(std::process::Stdio::null()).spawn().unwrap();
    let started = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().unwrap().split(' ').nth(19).unwrap_or_default().to_owned()
    };
    let start = started(child.id());
    if start.is_empty() {
        outliers_tests::not_checked("there is no /proc");
        child.kill().unwrap();
        child.wait().unwrap();
        return;
    }
    let pretend = |run: &str, start: &str| {
        std::fs::create_dir_all(fixture.remote(run, "")).unwrap();
        std::fs::write(fixture.remote(run, "worker.pid"), format!("{}\n{start}\n", child.id())).unwrap();
    };
    pretend("mine", &start);
    pretend("recycled", "12345");
    assert_eq!(fixture.host.status("mine").await.unwrap(), JobStatus::Running);
    assert_eq!(fixture.host.status("recycled").await.unwrap(), JobStatus::Ended { exit: None });
    fixture.host.stop_worker("recycled").await.unwrap();
    assert_eq!(fixture.host.status("mine").await.unwrap(), JobStatus::Running, "another's process is not touched");
    kill(&child.id().to_string());
    while !std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap().contains(") Z ") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(fixture.host.status("mine").await.unwrap(), JobStatus::Ended { exit: None });
    child.wait().unwrap();
}

/// Hosts of several runs may share a folder.
#[tokio::test]
async fn concurrent_pushes_of_one_worker_all_succeed() {
    let Some(fixture) = HostFixture::new().await else { return };
    let file = fixture.worker_file(env!("CARGO_PKG_VERSION"));
    let script = std::fs::read_to_string(&file).unwrap();
    let on = |_: HostEvent| {};
    for round in 0..5 {
        std::fs::write(&file, format!("{script}\nexit 0\n# {}", round.to_string().repeat(6 << 20))).unwrap();
        let push = || fixture.host.push_worker(&file, &on);
        let (a, b, c) = tokio::join!(push(), push(), push());
        for pushed in [a, b, c] {
            pushed.unwrap();
        }
    }
}

#[tokio::test]
async fn concurrent_launches_start_one_worker() {
    let Some(fixture) = HostFixture::new().await else { return };
    let worker = fixture.worker().await;
    for round in 0..5 {
        let run = format!("race{round}");
        let spec = job("hangs");
        let (a, b) = tokio::join!(
            fixture.host.launch(&worker, &run, &spec, &[]),
            fixture.host.launch(&worker, &run, &spec, &[])
        );
        let pid = |launched| match launched {
            Launched::Started { pid } | Launched::Running { pid } => pid,
            Launched::Ended { .. } => panic!("{launched:?}"),
        };
        assert_eq!(pid(a.unwrap()), pid(b.unwrap()));
        let starts =
            |fixture: &HostFixture| std::fs::read_to_string(fixture.remote(&run, "starts")).unwrap_or_default();
        fixture.until("a start", |fixture| !starts(fixture).is_empty()).await;
        // A second one would have come by now.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(starts(&fixture), "start\n");
        fixture.host.stop_worker(&run).await.unwrap();
    }
}

#[tokio::test]
async fn stop_ends_a_worker_that_ignores_signals_and_its_children() {
    let Some(fixture) = HostFixture::new().await else { return };
    fixture.host.stop_worker("none").await.unwrap();
    fixture.launch("kind", "hangs").await;
    fixture.host.stop_worker("kind").await.unwrap();
    assert_eq!(fixture.host.status("kind").await.unwrap(), JobStatus::Ended { exit: Some(143) });
    let pid = pid_of(fixture.launch("stubborn", "stubborn").await);
    fixture.host.stop_worker("stubborn").await.unwrap();
    assert_eq!(fixture.host.status("stubborn").await.unwrap(), JobStatus::Ended { exit: None });
    assert_eq!(living_in_group(pid), 0);
    // A wrapper that was killed alone leaves its worker; stopping the run finds the worker.
    let pid = pid_of(fixture.launch("orphan", "hangs").await);
    kill(&pid.to_string());
    assert!(living_in_group(pid) > 0);
    fixture.host.stop_worker("orphan").await.unwrap();
    fixture.until("the worker's end", |_| living_in_group(pid) == 0).await;
    fixture.host.stop_worker("orphan").await.unwrap();
}

/// Processes of a group without zombies.
fn living_in_group(pgid: u32) -> usize {
    let table = std::process::Command::new("ps").args(["-A", "-o", "pgid=,stat="]).output().unwrap();
    let table = String::from_utf8(table.stdout).unwrap();
    let mine = |line: &&str| {
        let mut words = line.split_whitespace();
        words.next() == Some(&pgid.to_string()) && !words.next().unwrap_or("Z").starts_with('Z')
    };
    table.lines().filter(mine).count()
}

#[tokio::test]
async fn endless_lines_and_escapes_are_harmless() {
    let Some(fixture) = HostFixture::new().await else { return };
    fixture.launch("r1", "endless").await;
    assert_eq!(fixture.follow("r1").await, ENDED_WELL);
    assert_eq!(fixture.events.layers(), [0, 1, 4]);
    let bad: Vec<String> = fixture
        .events
        .all()
        .into_iter()
        .filter_map(|e| if let HostEvent::BadProgress(line) = e { Some(line) } else { None })
        .collect();
    assert_eq!(bad.len(), 2, "{bad:?}");
    assert!(bad[0].starts_with("xxx") && bad[0].len() < 300 && bad[1] == "torn {");
    assert!(fixture.events.logs().contains("log with colour and bell"), "{}", fixture.events.logs());
    assert!(!fixture.fetch("r1").await.partial);
}

#[tokio::test]
async fn huge_log_is_skipped_and_its_end_is_saved() {
    let Some(fixture) = HostFixture::new().await else { return };
    fixture.launch("r1", "huge-log").await;
    assert_eq!(fixture.follow("r1").await, ENDED_WELL);
    assert!(fixture.events.all().iter().any(|e| matches!(e, HostEvent::LogSkipped(n) if *n > 1 << 20)));
    assert!(fixture.events.logs().ends_with("last"));
    fixture.fetch("r1").await;
    let log = std::fs::read(fixture.home_folder("r1").join("worker.log")).unwrap();
    assert_eq!(log.len(), 16 << 20);
    assert!(log.ends_with(b"l\nlast\n"));
}

#[tokio::test]
async fn hostile_manifests_download_nothing() {
    let Some(fixture) = HostFixture::new().await else { return };
    let lies = [
        "climbs", "absolute", "nested", "hidden", "twice", "linked", "missing", "changed", "longer", "pipe",
        "nonsense", "future", "stranger",
    ];
    for scenario in lies {
        fixture.launch(scenario, scenario).await;
        assert_eq!(fixture.follow(scenario).await, ENDED_WELL, "{scenario}: {}", fixture.events.logs());
        let error =
            fixture.host.fetch(scenario, &fixture.home_folder(scenario), &expected(), &|_| {}).await.unwrap_err();
        assert_eq!(error.kind, HostErrorKind::Damaged, "{scenario}: {error}");
        assert!(!fixture.home_folder(scenario).exists(), "{scenario}");
        assert!(!unfinished(&fixture.home_folder(scenario)).exists(), "{scenario}: it says that nothing was kept");
        assert!(!fixture.here.path().join("results/results.json").exists(), "{scenario}");
    }
}

/// A sparse file of 50 GiB: one that the job writes, and one larger than the job's.
#[tokio::test]
async fn results_larger_than_the_job_allows_are_refused_before_download() {
    let Some(fixture) = HostFixture::new().await else { return };
    fixture.launch("r1", "vast").await;
    assert_eq!(fixture.follow("r1").await, ENDED_WELL, "{}", fixture.events.logs());
    let fetched = fixture.host.fetch("r1", &fixture.home_folder("r1"), &expected(), &fixture.events.on()).await;
    let error = fetched.unwrap_err();
    assert_eq!(error.kind, HostErrorKind::TooLarge, "{error}");
    assert!(error.message.contains("vast.json") && error.message.contains("50.0 GiB"), "{error}");
    assert!(error.message.contains("1.0 MiB at most"), "{error}");
    assert!(!fixture.events.all().iter().any(|event| matches!(event, HostEvent::Fetching { .. })));
    assert!(!fixture.home_folder("r1").exists() && !unfinished(&fixture.home_folder("r1")).exists());
}

/// The manifest's file is one of the job's, and the local disk is too small: not the host's fault.
#[tokio::test]
async fn results_larger_than_free_disk_are_refused_before_download() {
    let Some(fixture) = HostFixture::new().await else { return };
    fixture.launch("r1", "petabyte").await;
    assert_eq!(fixture.follow("r1").await, ENDED_WELL, "{}", fixture.events.logs());
    let any = [("results.json", 1 << 20), ("metadata.json", 1 << 20), ("vast.json", u64::MAX)];
    let any = any.map(|(name, bytes)| FileBytes { name: name.to_owned(), bytes });
    let error = fixture.host.fetch("r1", &fixture.home_folder("r1"), &any, &fixture.events.on()).await.unwrap_err();
    assert_eq!(error.kind, HostErrorKind::Local, "{error}");
    assert!(error.message.contains("1024.00 TiB") && error.message.contains("are free there"), "{error}");
    assert!(!unfinished(&fixture.home_folder("r1")).exists());
}

/// A size that would take an hour to read.
#[tokio::test]
async fn runaway_progress_file_does_not_delay_the_end() {
    let Some(fixture) = HostFixture::new().await else { return };
    fixture.launch("r1", "huge-progress").await;
    assert_eq!(fixture.follow("r1").await, ENDED_WELL);
    assert!(fixture.events.all().iter().any(|e| matches!(e, HostEvent::ProgressSkipped(n) if *n > 1 << 30)));
    assert_eq!(fixture.events.layers().last(), Some(&4), "its last line is read");
}

#[tokio::test]
async fn foreign_folder_is_not_replaced() {
    let Some(fixture) = HostFixture::new().await else { return };
    fixture.launch("r1", "quick").await;
    fixture.follow("r1").await;
    let into = fixture.here.path().join("thesis");
    std::fs::create_dir(&into).unwrap();
    std::fs::write(into.join("chapter1"), "x").unwrap();
    let error = fixture.host.fetch("r1", &into, &expected(), &|_| {}).await.unwrap_err();
    assert_eq!(error.kind, HostErrorKind::Local, "{error}");
    assert_eq!(std::fs::read(into.join("chapter1")).unwrap(), b"x");
    // Nor the results of another run.
    fixture.launch("r2", "slow").await;
    fixture.follow("r2").await;
    fixture.fetch("r1").await;
    std::fs::write(fixture.remote("r2", "manifest.json"), r#"{"schema":1,"outcome":"complete","files":[]}"#).unwrap();
    let error = fixture.host.fetch("r2", &fixture.home_folder("r1"), &expected(), &|_| {}).await.unwrap_err();
    assert_eq!(error.kind, HostErrorKind::Local, "{error}");
}

#[tokio::test]
async fn unusable_workers_are_refused() {
    let Some(fixture) = HostFixture::new().await else { return };
    let other = fixture.host.push_worker(&fixture.worker_file("9.9.9"), &|_| {}).await.unwrap_err();
    assert_eq!(other.kind, HostErrorKind::WorkerVersion, "{other}");
    assert!(other.message.contains("9.9.9") && other.hint.is_some());
    let file = fixture.here.path().join("alien");
    std::fs::write(&file, b"\x7fELF\x02\x01\x01alien machine").unwrap();
    let unfit = fixture.host.push_worker(&file, &|_| {}).await.unwrap_err();
    assert_eq!(unfit.kind, HostErrorKind::WorkerUnfit, "{unfit}");
    std::fs::write(&file, "#!/bin/sh\necho hello").unwrap();
    let chatty = fixture.host.push_worker(&file, &|_| {}).await.unwrap_err();
    assert_eq!(chatty.kind, HostErrorKind::WorkerVersion, "{chatty}");
    let missing = fixture.host.push_worker(&fixture.here.path().join("none"), &|_| {}).await.unwrap_err();
    assert_eq!(missing.kind, HostErrorKind::Local, "{missing}");
}

#[tokio::test]
async fn noexec_home_puts_the_worker_in_another_folder() {
    let Some(mut fixture) = HostFixture::new().await else { return };
    if !fixture.server.mount_home("noexec") {
        return;
    }
    let worker = fixture.worker().await;
    let folder = Path::new(&worker.path).parent().unwrap().to_owned();
    assert!(!folder.starts_with(fixture.server.home()), "{}", worker.path);
    fixture.host.launch(&worker, "r1", &job("quick"), &[]).await.unwrap();
    assert_eq!(fixture.follow("r1").await, ENDED_WELL);
    assert!(!fixture.fetch("r1").await.partial);
    std::fs::remove_dir_all(folder).unwrap();
}

#[tokio::test]
async fn damaged_worker_on_the_host_is_replaced() {
    let Some(fixture) = HostFixture::new().await else { return };
    let worker = fixture.worker().await;
    std::fs::write(&worker.path, "#!/bin/sh\nexec evil").unwrap();
    std::fs::write(format!("{}.part.00", worker.path), "left by a broken upload").unwrap();
    assert_eq!(fixture.worker().await, worker);
    let local = std::fs::read(fixture.here.path().join("outliers-worker")).unwrap();
    assert_eq!(std::fs::read(&worker.path).unwrap(), local);
}

#[tokio::test]
async fn folders_are_pushed_once_and_within_their_limit() {
    let Some(fixture) = HostFixture::new().await else { return };
    let model = fixture.here.path().join("model");
    std::fs::create_dir_all(model.join("sub")).unwrap();
    std::fs::write(model.join("config.json"), "{}").unwrap();
    std::fs::write(model.join("model.safetensors"), vec![7; 100_000]).unwrap();
    std::fs::write(model.join(".hidden"), "x").unwrap();
    let push = |limit| fixture.host.push_folder(&model, "outliers/models/m", limit, &|_| {});
    let first = push(1 << 20).await.unwrap();
    assert_eq!((first.files, first.bytes, first.sent), (2, 100_002, 100_002));
    let there = fixture.server.home().join("outliers/models/m");
    assert_eq!(first.path, there.to_str().unwrap());
    assert_eq!(std::fs::read(there.join("model.safetensors")).unwrap(), vec![7; 100_000]);
    assert_eq!(std::fs::read_dir(&there).unwrap().count(), 2);
    std::fs::write(model.join("config.json"), "{ }").unwrap();
    assert_eq!(push(1 << 20).await.unwrap().sent, 3, "only what changed");
    assert_eq!(push(1000).await.unwrap_err().kind, HostErrorKind::TooLarge);
    for bad in ["", "/etc", "../x", "a/../../b"] {
        let error = fixture.host.push_file(&model.join("config.json"), bad, 100, &|_| {}).await.unwrap_err();
        assert_eq!(error.kind, HostErrorKind::Local, "{bad}");
    }
    let file = fixture.host.push_file(&model.join("config.json"), "outliers/c 1.json", 100, &|_| {}).await.unwrap();
    assert_eq!(std::fs::read_to_string(file).unwrap(), "{ }");
    assert_eq!(
        fixture.host.launch(&fixture.worker().await, "../x", &job("quick"), &[]).await.unwrap_err().kind,
        HostErrorKind::Local
    );
}

#[tokio::test]
async fn full_home_is_reported_before_upload() {
    let Some(mut fixture) = HostFixture::new().await else { return };
    if !fixture.server.shrink_home(1) {
        return;
    }
    let file = fixture.here.path().join("big");
    std::fs::write(&file, vec![1; 3_000_000]).unwrap();
    let full = fixture.host.push_file(&file, "outliers/big", 1 << 30, &fixture.events.on()).await;
    let facts = fixture.host.probe().await;
    let full = full.unwrap_err();
    assert_eq!(full.kind, HostErrorKind::NoSpace, "{full}");
    assert!(full.hint.is_some() && full.message.contains("free"));
    assert!(!fixture.events.all().iter().any(|e| matches!(e, HostEvent::Uploading { .. })));
    assert!(facts.unwrap().disk_free.unwrap().0 <= 1 << 20);
}

#[tokio::test]
async fn connecting_waits_for_keys_and_gives_up_with_the_reason() {
    let Some(server) = Sshd::start().unwrap() else { return };
    let folder = tempfile::tempdir().unwrap();
    let late = RunKey::create(folder.path(), "late", "").unwrap();
    let events = Events::default();
    let endpoint = server.endpoint();
    let on = events.on();
    let reached = reach(&endpoint, late.private_path(), None, within(30), &on);
    let authorize = async {
        let refused = async {
            while events.all().is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout_at(within(30), refused).await.expect("the first attempt fails");
        server.authorize(late.public_line()).unwrap();
    };
    let (reached, ()) = tokio::join!(reached, authorize);
    assert_eq!(&reached.unwrap().1, server.host_key());
    assert!(matches!(
        events.all()[..],
        [HostEvent::Waiting { kind: Kind::AuthFailed, attempt: 1, .. }, HostEvent::Connected]
    ));

    let pin = HostKeyPin::new(late.public_line()).unwrap();
    let changed = reach(&endpoint, late.private_path(), Some(pin), within(60), &|_| {}).await.err().unwrap();
    assert_eq!(changed.kind, HostErrorKind::Connection(Kind::HostKeyChanged), "{changed}");

    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let nobody = SshEndpoint { port: free, ..endpoint };
    let events = Events::default();
    let refused = reach(&nobody, late.private_path(), None, within(2), &events.on()).await.err().unwrap();
    assert_eq!(refused.kind, HostErrorKind::Connection(Kind::Refused), "{refused}");
    assert!(refused.hint.is_some() && refused.message.contains("connection refused"));
    assert!(events.all().len() >= 2, "it was tried more than once");
}

#[tokio::test]
async fn follow_deadline_leaves_the_worker_running() {
    let Some(fixture) = HostFixture::new().await else { return };
    fixture.launch("r1", "hangs").await;
    let late = fixture.host.follow("r1", &mut Cursor::default(), within(1), &|_| {}).await.unwrap_err();
    assert_eq!(late.kind, HostErrorKind::Deadline, "{late}");
    assert_eq!(fixture.host.status("r1").await.unwrap(), JobStatus::Running);
    fixture.host.stop_worker("r1").await.unwrap();
}

#[tokio::test]
async fn login_shell_output_is_harmless() {
    let Some(fixture) = HostFixture::new().await else { return };
    // Debian's bash reads this file for commands over SSH; other shells print nothing and test
    // less.
    let greeting = "echo 'Welcome! @state ended 0'; echo '@state ended 7'; echo '@home /evil'; echo warning >&2\n";
    std::fs::write(fixture.server.home().join(".bashrc"), greeting).unwrap();
    assert_eq!(fixture.host.probe().await.unwrap().home, fixture.server.home().to_str().unwrap());
    assert_eq!(fixture.host.status("r1").await.unwrap(), JobStatus::NotStarted);
    fixture.launch("r1", "slow").await;
    assert_eq!(fixture.host.status("r1").await.unwrap(), JobStatus::Running);
    assert_eq!(fixture.follow("r1").await, ENDED_WELL);
    assert!(!fixture.fetch("r1").await.partial);
}

#[tokio::test]
async fn every_step_survives_a_broken_connection() {
    let Some(fixture) = HostFixture::new().await else { return };
    let worker = fixture.worker().await;
    let cut = || assert!(fixture.server.kill_sessions().unwrap() > 0);
    cut();
    fixture.host.probe().await.unwrap();
    cut();
    fixture.worker().await;
    cut();
    pid_of(fixture.host.launch(&worker, "r1", &job("hangs"), &[]).await.unwrap());
    cut();
    assert_eq!(fixture.host.status("r1").await.unwrap(), JobStatus::Running);
    cut();
    fixture.host.stop_worker("r1").await.unwrap();
    cut();
    assert!(fixture.fetch("r1").await.partial);
}

/// The host's futures must be able to move between threads: a deploy may be spawned.
#[tokio::test]
async fn host_works_without_sftp_and_from_a_spawned_task() {
    let Some(fixture) = HostFixture::with("Subsystem other internal-sftp").await else { return };
    let task = tokio::spawn(async move {
        fixture.launch("r1", "quick").await;
        assert_eq!(fixture.follow("r1").await, ENDED_WELL);
        assert!(!fixture.fetch("r1").await.partial);
        assert!(Path::new(&fixture.home_folder("r1")).join("results.json").exists());
    });
    task.await.unwrap();
}
