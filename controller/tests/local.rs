//! The local broker with real processes.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use outliers::cloud::broker::local::{LocalBroker, MARKER};
use outliers::cloud::broker::{
    Broker, BrokerErrorKind, GpuRequest, Instance, InstanceId, InstanceState, Lease, LeaseTag, Offer,
};
use outliers::host::transport::{ExecOutput, Transport, TransportErrorKind};
use outliers::units::{Bytes, Usd};
use tempfile::TempDir;

const EXE: &str = env!("CARGO_BIN_EXE_outliers");

/// Timeout of waits; long, because a busy machine is slow.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A local cloud that is stopped when dropped, also by a failing test.
struct Cloud {
    broker: LocalBroker,
    root: TempDir,
}

impl Drop for Cloud {
    fn drop(&mut self) {
        // Tests run in a runtime, which cannot be entered again, so this uses a runtime on another
        // thread.
        let broker = self.broker.clone();
        let ended = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async {
                for instance in broker.list().await.unwrap_or_default() {
                    broker.terminate(&instance.id).await.unwrap();
                }
            });
        });
        ended.join().unwrap();
    }
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

impl Cloud {
    fn new() -> Self {
        Self::with_exe(PathBuf::from(EXE))
    }

    fn with_exe(exe: PathBuf) -> Self {
        let root = tempfile::tempdir().unwrap();
        let broker = LocalBroker::new(root.path().join("cloud"), exe);
        Self { broker: broker.with_nvidia_smi("/no/such/program".into()), root }
    }

    fn root(&self) -> PathBuf {
        self.root.path().join("cloud")
    }

    fn folder(&self, instance: &Instance) -> PathBuf {
        self.root().join("instances").join(&instance.id.0)
    }

    fn lease_for(&self, seconds: u64) -> Lease {
        let tag = LeaseTag {
            owner: "me".to_owned(),
            run: "r1".to_owned(),
            nonce: "n0".to_owned(),
            deadline: unix_now() + seconds,
        };
        Lease { tag, ssh_public_key: String::new(), disk: Bytes::from_mib(1), stage: None }
    }

    async fn offer(&self) -> Offer {
        self.broker.offers(&GpuRequest::default()).await.unwrap().offers.remove(0)
    }

    async fn rent(&self) -> Instance {
        self.broker.create(&self.offer().await, &self.lease_for(3600)).await.unwrap()
    }

    fn reach(&self, instance: &Instance) -> Arc<dyn Transport> {
        self.broker.instance_transport(&instance.id).unwrap().transport
    }

    async fn only(&self) -> Instance {
        let mut list = self.broker.list().await.unwrap();
        assert_eq!(list.len(), 1, "{list:?}");
        list.remove(0)
    }
}

async fn exec(there: &Arc<dyn Transport>, command: &str) -> ExecOutput {
    there.exec(command, b"", TIMEOUT).await.unwrap()
}

async fn text(there: &Arc<dyn Transport>, command: &str) -> String {
    String::from_utf8(exec(there, command).await.stdout).unwrap().trim_end().to_owned()
}

fn alive(pid: u32) -> bool {
    // A zombie has no memory and no line for it.
    let status = fs::read_to_string(format!("/proc/{pid}/status"));
    if Path::new("/proc/self/status").exists() {
        return status.is_ok_and(|text| !text.contains("State:\tZ"));
    }
    Command::new("kill").args(["-0", &pid.to_string()]).status().unwrap().success()
}

fn kill(pid: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < TIMEOUT, "{what} does not happen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn instance_pid(cloud: &Cloud, instance: &Instance) -> u32 {
    let text = fs::read_to_string(cloud.folder(instance).join("ready.json")).unwrap();
    let ready: serde_json::Value = serde_json::from_str(&text).unwrap();
    u32::try_from(ready["pid"].as_u64().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn instance_goes_from_create_to_terminate() {
    let cloud = Cloud::new();
    assert!(cloud.broker.list().await.unwrap().is_empty());
    let offer = cloud.offer().await;
    let lease = cloud.lease_for(3600);
    let instance = cloud.broker.create(&offer, &lease).await.unwrap();
    assert_eq!(instance.tag().unwrap(), lease.tag);
    assert_eq!(instance.price, Some(offer.price));
    assert_eq!(cloud.only().await, instance);
    assert_eq!(cloud.broker.bill().unwrap().running, std::slice::from_ref(&instance));

    let there = cloud.reach(&instance);
    let output = exec(&there, "echo out; echo err >&2; exit 7").await;
    assert_eq!((output.status, &output.stdout[..], &output.stderr[..]), (Some(7), &b"out\n"[..], &b"err\n"[..]));

    let pid = instance_pid(&cloud, &instance);
    cloud.broker.terminate(&instance.id).await.unwrap();
    assert!(!alive(pid) && !cloud.folder(&instance).exists());
    assert!(cloud.broker.list().await.unwrap().is_empty());
    let gone = there.exec("true", b"", TIMEOUT).await.unwrap_err();
    assert_eq!(gone.kind, TransportErrorKind::Gone, "{gone}");
    cloud.broker.terminate(&instance.id).await.unwrap();
    let bill = cloud.broker.bill().unwrap();
    assert!(bill.running.is_empty());
    let [entry] = &bill.entries[..] else { panic!("{bill:?}") };
    assert_eq!((&entry.id, &entry.name, entry.price), (&instance.id.0, &lease.tag.to_string(), offer.price));
    assert!(entry.cost > Usd::ZERO && entry.to >= entry.from && bill.total() == entry.cost);
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_have_a_clean_environment() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let there = cloud.reach(&instance);
    let home = cloud.folder(&instance).join("home").canonicalize().unwrap();
    let names: HashSet<String> =
        text(&there, "env").await.lines().map(|l| l.split('=').next().unwrap().to_owned()).collect();
    let expected = [
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "PWD",
        MARKER,
        "CUDA_VISIBLE_DEVICES",
        "CUDA_DEVICE_ORDER",
    ];
    let surplus: Vec<_> = names
        .iter()
        .filter(|name| !expected.contains(&name.as_str()) && *name != "_" && *name != "OLDPWD" && *name != "SHLVL")
        .collect();
    assert!(surplus.is_empty(), "{surplus:?}");
    let said = text(&there, &format!("pwd; echo $HOME; echo ${MARKER}")).await;
    assert_eq!(said, format!("{0}\n{0}\n{1}", home.display(), instance.id));
    assert_eq!(exec(&there, "kill -TERM $$").await.status, None);
    assert_eq!(exec(&there, "/no/such/program").await.status, Some(127));
    let private = |name: &str| fs::metadata(cloud.folder(&instance).join(name)).unwrap().permissions().mode() & 0o077;
    assert_eq!((private("home"), private("log"), private("")), (0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn detached_child_survives_its_controller() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let said = text(&cloud.reach(&instance), "setsid nohup sleep 300 </dev/null >log 2>&1 & echo $!").await;
    let pid: u32 = said.parse().unwrap();
    // Another lease, without processes.
    let other = LocalBroker::new(cloud.root(), PathBuf::from(EXE));
    let there = other.instance_transport(&instance.id).unwrap().transport;
    assert_eq!(text(&there, &format!("kill -0 {pid} && echo lives")).await, "lives");
    other.terminate(&instance.id).await.unwrap();
    assert!(!alive(pid));
}

/// Starts processes, each of which has only one of the marks by which it can be found; returns
/// their ids.
async fn shed_marks(there: &Arc<dyn Transport>) -> Vec<u32> {
    let script = "
        setsid nohup sleep 301 </dev/null >/dev/null 2>&1 & echo $!
        sleep 302 </dev/null >/dev/null 2>&1 & echo $!
        trap '' TERM; setsid sh -c 'trap \"\" TERM HUP; while :; do sleep 303; done' </dev/null >/dev/null 2>&1 & echo $!
        cp /bin/sleep ./worker; setsid env -i ./worker 304 </dev/null >/dev/null 2>&1 & echo $!";
    let pids: Vec<u32> = text(there, script).await.lines().map(|line| line.parse().unwrap()).collect();
    // The last two change shortly after their start.
    let name = |pid: u32| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    until("their start", || name(pids[3]).starts_with(b"./worker") || !Path::new("/proc/self").exists()).await;
    pids
}

#[tokio::test(flavor = "multi_thread")]
async fn terminate_ends_processes_of_other_sessions_and_stopped_ones() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let there = cloud.reach(&instance);
    let mut pids = shed_marks(&there).await;
    // In its own session: a process group whose parent ends while a member is stopped gets a
    // SIGHUP.
    let script = "
        setsid sleep 305 </dev/null >/dev/null 2>&1 & P=$!
        until [ \"$(cut -d' ' -f6 /proc/$P/stat)\" = $P ]; do :; done
        kill -STOP $P; echo $P";
    let stopped = text(&there, script).await;
    pids.push(stopped.parse().unwrap());
    assert!(pids.len() == 5 && pids.iter().all(|pid| alive(*pid)), "{pids:?}");
    cloud.broker.terminate(&instance.id).await.unwrap();
    let left: Vec<_> = pids.iter().filter(|pid| alive(**pid)).collect();
    assert!(left.is_empty(), "{left:?} of {pids:?}");
    assert_eq!(cloud.broker.bill().unwrap().entries.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_of_a_killed_instance_are_found() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let there = cloud.reach(&instance);
    let pids = shed_marks(&there).await;
    kill(instance_pid(&cloud, &instance), "-KILL");
    let begun = Instant::now();
    while matches!(cloud.only().await.state, InstanceState::Ready(_)) {
        assert!(begun.elapsed() < TIMEOUT);
    }
    let dead = cloud.only().await;
    assert!(matches!(&dead.state, InstanceState::Failed(why) if why.contains("process ended")), "{dead:?}");
    assert_eq!(dead.tag(), instance.tag());
    assert_eq!(cloud.broker.bill().unwrap().running.len(), 1, "a dead instance still bills");
    assert!(pids.iter().all(|pid| alive(*pid)), "what runs there lives on");
    let gone = there.exec("true", b"", TIMEOUT).await.unwrap_err();
    assert_eq!(gone.kind, TransportErrorKind::Gone, "{gone}");
    cloud.broker.terminate(&instance.id).await.unwrap();
    let left: Vec<_> = pids.iter().filter(|pid| alive(**pid)).collect();
    assert!(left.is_empty(), "{left:?} of {pids:?}");
    assert!(cloud.broker.list().await.unwrap().is_empty());
    assert_eq!(cloud.broker.bill().unwrap().entries.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn forking_process_is_ended() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let there = cloud.reach(&instance);
    let breed = "cat >breed <<'END'\ntrap '' TERM\nsleep 0.02\nsetsid sh breed &\nEND\nsetsid sh breed </dev/null >/dev/null 2>&1 &";
    assert_eq!(exec(&there, breed).await.status, Some(0));
    cloud.broker.terminate(&instance.id).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mark = format!("{MARKER}={}", instance.id);
    let environments = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path().join("environ"));
    let left = environments
        .filter_map(|path| fs::read(path).ok())
        .filter(|env| env.split(|b| *b == 0).any(|v| v == mark.as_bytes()));
    assert_eq!(left.count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn running_command_ends_with_its_instance() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let (there, broker) = (cloud.reach(&instance), cloud.broker.clone());
    let up = cloud.folder(&instance).join("home/up");
    let running = tokio::spawn(async move { there.exec("touch up; exec sleep 300", b"", TIMEOUT).await });
    until("the command", || up.exists()).await;
    broker.terminate(&instance.id).await.unwrap();
    let gone = running.await.unwrap().unwrap_err();
    assert_eq!(gone.kind, TransportErrorKind::Gone, "{gone}");
}

#[tokio::test(flavor = "multi_thread")]
async fn command_killed_with_its_instance_reports_gone() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let there = cloud.reach(&instance);
    let up = cloud.folder(&instance).join("home/up");
    let running = tokio::spawn(async move { there.exec("touch up; exec sleep 300", b"", TIMEOUT).await });
    until("the command", || up.exists()).await;
    kill(instance_pid(&cloud, &instance), "-TERM");
    let gone = running.await.unwrap().unwrap_err();
    assert_eq!(gone.kind, TransportErrorKind::Gone, "{gone}");
}

#[tokio::test(flavor = "multi_thread")]
async fn signal_ends_the_instance_and_its_processes() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let pids = shed_marks(&cloud.reach(&instance)).await;
    kill(instance_pid(&cloud, &instance), "-TERM");
    until("the end", || pids.iter().all(|pid| !alive(*pid)) && !alive(instance_pid(&cloud, &instance))).await;
    assert!(matches!(cloud.only().await.state, InstanceState::Failed(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn deadline_ends_the_instance_and_its_bill() {
    let cloud = Cloud::new();
    let instance = cloud.broker.create(&cloud.offer().await, &cloud.lease_for(4)).await.unwrap();
    let pids = shed_marks(&cloud.reach(&instance)).await;
    let pid = instance_pid(&cloud, &instance);
    until("the end", || !alive(pid)).await;
    assert!(pids.iter().all(|pid| !alive(*pid)));
    assert!(!cloud.folder(&instance).exists());
    let bill = cloud.broker.bill().unwrap();
    assert!(bill.running.is_empty() && bill.entries.len() == 1, "{bill:?}");
    cloud.broker.terminate(&instance.id).await.unwrap();
    assert_eq!(cloud.broker.bill().unwrap(), bill);
}

#[tokio::test(flavor = "multi_thread")]
async fn deadline_ends_an_instance_without_its_gate_file() {
    let cloud = Cloud::new();
    let instance = cloud.broker.create(&cloud.offer().await, &cloud.lease_for(4)).await.unwrap();
    let worker = text(&cloud.reach(&instance), "sleep 300 </dev/null >/dev/null 2>&1 & echo $!").await;
    let (worker, pid) = (worker.parse().unwrap(), instance_pid(&cloud, &instance));
    fs::remove_file(cloud.folder(&instance).join("gate")).unwrap();
    until("the end", || !alive(pid)).await;
    assert!(!alive(worker) && !cloud.folder(&instance).exists());
    assert_eq!(cloud.broker.bill().unwrap().entries.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_terminations_bill_once() {
    let cloud = Cloud::new();
    let (one, two) = tokio::join!(cloud.rent(), cloud.rent());
    assert_eq!(cloud.broker.list().await.unwrap().len(), 2);
    let all = [&one, &two, &one, &two, &one, &two].map(|instance| cloud.broker.terminate(&instance.id));
    for result in futures::future::join_all(all).await {
        result.unwrap();
    }
    assert_eq!(cloud.broker.bill().unwrap().entries.len(), 2);
    assert!(cloud.broker.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn instance_survives_its_creator() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let pid = instance_pid(&cloud, &instance);
    let field = |name: &str| {
        let output = Command::new("ps").args(["-o", &format!("{name}="), "-p", &pid.to_string()]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    // Its own session without a terminal: neither a hang-up nor a Ctrl-C of its creator's reaches
    // it.
    assert_eq!((field("sess"), field("pgid")), (pid.to_string(), pid.to_string()));
    assert_eq!(field("tty"), "?");
    // Another controller finds and ends it.
    let other = LocalBroker::new(cloud.root(), PathBuf::from(EXE));
    assert_eq!(other.list().await.unwrap(), std::slice::from_ref(&instance));
    other.terminate(&instance.id).await.unwrap();
    assert!(!alive(pid));
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_instance_uses_no_cpu() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    exec(&cloud.reach(&instance), "true").await;
    let pid = instance_pid(&cloud, &instance);
    let ticks = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
        Some(fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?)
    };
    let Some(before) = ticks() else { return outliers_tests::not_checked("there is no /proc") };
    tokio::time::sleep(Duration::from_secs(3)).await;
    let used = ticks().unwrap() - before;
    assert!(used <= 1, "{used} ticks in 3 s");
}

#[tokio::test(flavor = "multi_thread")]
async fn instance_that_cannot_start_is_reported_and_free() {
    let root = tempfile::tempdir().unwrap();
    let script = root.path().join("broken");
    fs::write(&script, "#!/bin/sh\necho starting\necho 'no port is left' >&2\nexit 9\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    for (exe, why) in [(script, "no port is left"), (root.path().join("missing"), "cannot run")] {
        let cloud = Cloud::with_exe(exe);
        let error = cloud.broker.create(&cloud.offer().await, &cloud.lease_for(60)).await.unwrap_err();
        assert_eq!(error.kind, BrokerErrorKind::Unavailable);
        assert!(error.message.contains(why), "{error}");
        let bill = cloud.broker.bill().unwrap();
        assert!(bill.running.is_empty() && bill.entries.is_empty());
        assert_eq!(fs::read_dir(cloud.root().join("instances")).unwrap().count(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_create_is_listed_and_can_be_terminated() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let folder = cloud.folder(&instance);
    // The state after a controller was killed between the intent and the start of the process.
    kill(instance_pid(&cloud, &instance), "-KILL");
    for name in ["ready.json", "log"] {
        fs::remove_file(folder.join(name)).unwrap();
    }
    let begun = Instant::now();
    while cloud.only().await.state != InstanceState::Booting {
        assert!(begun.elapsed() < TIMEOUT, "{:?}", cloud.only().await);
    }
    assert_eq!(cloud.only().await.tag(), instance.tag());
    let text = fs::read_to_string(folder.join("instance.json")).unwrap();
    let mut record: serde_json::Value = serde_json::from_str(&text).unwrap();
    record["created_at"] = (unix_now() - 1000).into();
    fs::write(folder.join("instance.json"), record.to_string()).unwrap();
    let begun = Instant::now();
    while cloud.only().await.state != InstanceState::Stopped {
        assert!(begun.elapsed() < TIMEOUT, "{:?}", cloud.only().await);
    }
    cloud.broker.terminate(&instance.id).await.unwrap();
    assert_eq!(cloud.broker.bill().unwrap().entries.len(), 1);
    assert!(cloud.broker.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_termination_can_be_completed() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    fs::write(cloud.folder(&instance).join("ending"), "").unwrap();
    assert_eq!(cloud.only().await.state, InstanceState::Terminating);
    kill(instance_pid(&cloud, &instance), "-KILL");
    let begun = Instant::now();
    while cloud.only().await.state == InstanceState::Terminating {
        assert!(begun.elapsed() < TIMEOUT);
    }
    assert!(matches!(cloud.only().await.state, InstanceState::Failed(_)));
    // Interrupted after the bill, and after the folder was moved.
    fs::create_dir(cloud.root().join("instances/.gone-i-abcdefghijkl")).unwrap();
    cloud.broker.terminate(&InstanceId("i-abcdefghijkl".to_owned())).await.unwrap();
    assert!(!cloud.root().join("instances/.gone-i-abcdefghijkl").exists());
    cloud.broker.terminate(&instance.id).await.unwrap();
    assert!(cloud.broker.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_files_are_not_listed_and_damaged_instances_are() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let instances = cloud.root().join("instances");
    fs::write(instances.join("notes.txt"), "x").unwrap();
    fs::write(instances.join("i-abcdefghijkl"), "a file").unwrap();
    fs::create_dir(instances.join("lost+found")).unwrap();
    fs::create_dir(instances.join(".new-i-bbbbbbbbbbbb")).unwrap();
    std::os::unix::fs::symlink("/", instances.join("i-cccccccccccc")).unwrap();
    fs::create_dir(instances.join("i-dddddddddddd")).unwrap();
    fs::create_dir(instances.join("i-eeeeeeeeeeee")).unwrap();
    fs::write(instances.join("i-eeeeeeeeeeee/instance.json"), "{").unwrap();
    let list = cloud.broker.list().await.unwrap();
    let ids: HashSet<&str> = list.iter().map(|i| i.id.0.as_str()).collect();
    assert_eq!(ids, HashSet::from(["i-dddddddddddd", "i-eeeeeeeeeeee", instance.id.0.as_str()]));
    assert!(
        list.iter()
            .filter(|i| i.id != instance.id)
            .all(|i| matches!(i.state, InstanceState::Failed(_)) && i.tag().is_none())
    );
    for id in ["i-dddddddddddd", "i-eeeeeeeeeeee"] {
        cloud.broker.terminate(&InstanceId(id.to_owned())).await.unwrap();
    }
    assert_eq!(cloud.only().await.id, instance.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn instance_ids_cannot_be_paths() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    for id in
        ["", ".", "..", "../..", "../instances/x", "/etc", &format!("../instances/{}", instance.id), "i-AAAAAAAAAAAA"]
    {
        let error = cloud.broker.terminate(&InstanceId(id.to_owned())).await.unwrap_err();
        assert_eq!(error.kind, BrokerErrorKind::Rejected, "{id}");
    }
    cloud.broker.terminate(&InstanceId("i-000000000000".to_owned())).await.unwrap();
    assert_eq!(cloud.only().await.id, instance.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn unreadable_folder_is_an_error_and_not_an_empty_list() {
    let cloud = Cloud::new();
    fs::create_dir_all(cloud.root()).unwrap();
    fs::write(cloud.root().join("instances"), "in the way").unwrap();
    assert!(cloud.broker.list().await.is_err());
    assert!(cloud.broker.bill().is_err());
    assert!(cloud.broker.create(&cloud.offer().await, &cloud.lease_for(60)).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn unavailable_hardware_is_refused() {
    let cloud = Cloud::new();
    let offer = cloud.offer().await;
    let kind = async |offer: &Offer, lease: &Lease| cloud.broker.create(offer, lease).await.unwrap_err().kind;
    let lease = cloud.lease_for(60);
    assert_eq!(kind(&Offer { key: "moon".to_owned(), ..offer.clone() }, &lease).await, BrokerErrorKind::Rejected);
    assert_eq!(kind(&Offer { broker: "runpod".to_owned(), ..offer.clone() }, &lease).await, BrokerErrorKind::Rejected);
    let huge = Lease { disk: Bytes(u64::MAX), ..lease.clone() };
    assert_eq!(kind(&offer, &huge).await, BrokerErrorKind::NoCapacity);
    let mut late = lease.clone();
    late.tag.deadline = 1;
    assert_eq!(kind(&offer, &late).await, BrokerErrorKind::Rejected);
    let gpu = Offer { key: "gpu/1/NVIDIA L4".to_owned(), ..offer };
    assert_eq!(kind(&gpu, &lease).await, BrokerErrorKind::NoCapacity);
    assert!(cloud.broker.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn gpu_is_rented_once_at_a_time() {
    let mut cloud = Cloud::new();
    let smi = cloud.root.path().join("nvidia-smi");
    fs::write(&smi, "#!/bin/sh\nfor i in 1 2 3; do echo 'NVIDIA H100 80GB HBM3, 81559'; done\n").unwrap();
    fs::set_permissions(&smi, fs::Permissions::from_mode(0o755)).unwrap();
    cloud.broker = cloud.broker.clone().with_nvidia_smi(smi);
    let offers = cloud.broker.offers(&GpuRequest::default()).await.unwrap().offers;
    assert_eq!(offers.iter().map(|o| o.gpu_count).collect::<Vec<_>>(), [0, 1, 2, 3]);
    let lease = cloud.lease_for(3600);
    let two = cloud.broker.create(&offers[2], &lease).await.unwrap();
    assert_eq!(two.hardware, "2 x H100");
    let visible = "echo $CUDA_VISIBLE_DEVICES";
    assert_eq!(text(&cloud.reach(&two), visible).await, "0,1");
    let refused = cloud.broker.create(&offers[2], &lease).await.unwrap_err();
    assert_eq!(refused.kind, BrokerErrorKind::NoCapacity);
    let one = cloud.broker.create(&offers[1], &lease).await.unwrap();
    assert_eq!(text(&cloud.reach(&one), visible).await, "2");
    let none = cloud.broker.create(&offers[0], &lease).await.unwrap();
    assert_eq!(text(&cloud.reach(&none), visible).await, "");
    cloud.broker.terminate(&two.id).await.unwrap();
    let again = cloud.broker.create(&offers[2], &lease).await.unwrap();
    assert_eq!(text(&cloud.reach(&again), visible).await, "0,1");
}
