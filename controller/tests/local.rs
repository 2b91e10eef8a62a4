//! The local broker with real processes and real SSH.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use outliers::broker::local::{LocalBroker, MARKER};
use outliers::broker::{
    Broker, BrokerErrorKind, GpuRequest, Instance, InstanceId, InstanceState, Lease, LeaseTag, Offer, SshEndpoint,
};
use outliers::units::{Bytes, Usd};
use outliers_tests::noise;
use russh::client::{self, AuthResult};
use russh::keys::{Algorithm, PrivateKey, PrivateKeyWithHashAlg, PublicKeyOrCertificate, key::safe_rng};
use russh::{ChannelMsg, Sig};
use russh_sftp::client::SftpSession;
use russh_sftp::protocol::OpenFlags;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};

const EXE: &str = env!("CARGO_BIN_EXE_outliers");

/// After this nothing is hoped for any more: no bound, on a busy machine much takes long.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A cloud of its own, which a failing test does not leave running.
struct Cloud {
    broker: LocalBroker,
    key: Arc<PrivateKey>,
    root: TempDir,
}

impl Drop for Cloud {
    fn drop(&mut self) {
        // Tests run within a runtime, which cannot be entered again: another thread, another runtime.
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

fn make_key() -> Arc<PrivateKey> {
    Arc::new(PrivateKey::random(&mut safe_rng(), Algorithm::Ed25519).unwrap())
}

impl Cloud {
    fn new() -> Self {
        Self::with_exe(PathBuf::from(EXE))
    }

    fn with_exe(exe: PathBuf) -> Self {
        let root = tempfile::tempdir().unwrap();
        let broker = LocalBroker::new(root.path().join("cloud"), exe);
        Self { broker: broker.with_nvidia_smi("/no/such/program".into()), key: make_key(), root }
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
        Lease { tag, ssh_public_key: self.key.public_key().to_openssh().unwrap(), disk: Bytes::from_mib(1) }
    }

    async fn offer(&self) -> Offer {
        self.broker.offers(&GpuRequest::default()).await.unwrap().offers.remove(0)
    }

    async fn rent(&self) -> Instance {
        self.broker.create(&self.offer().await, &self.lease_for(3600)).await.unwrap()
    }

    async fn connect(&self, instance: &Instance) -> client::Handle<Trusting> {
        let handle = connect(&endpoint(instance), "outliers", &self.key).await;
        handle.unwrap_or_else(|| panic!("{instance:?} does not let us in"))
    }

    async fn only(&self) -> Instance {
        let mut list = self.broker.list().await.unwrap();
        assert_eq!(list.len(), 1, "{list:?}");
        list.remove(0)
    }
}

fn endpoint(instance: &Instance) -> SshEndpoint {
    match &instance.state {
        InstanceState::Ready(endpoint) => endpoint.clone(),
        other => panic!("not ready: {other:?}"),
    }
}

struct Trusting;

impl client::Handler for Trusting {
    type Error = russh::Error;
    async fn check_server_key(&mut self, _key: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        Ok(true)
    }
}

async fn connect(to: &SshEndpoint, user: &str, key: &Arc<PrivateKey>) -> Option<client::Handle<Trusting>> {
    let config = client::Config { nodelay: true, window_size: 1 << 20, ..client::Config::default() };
    let mut handle = client::connect(Arc::new(config), (to.host.as_str(), to.port), Trusting).await.unwrap();
    let key = PrivateKeyWithHashAlg::new(Arc::clone(key), None);
    matches!(handle.authenticate_publickey(user, key).await.unwrap(), AuthResult::Success).then_some(handle)
}

#[derive(Debug, Default, PartialEq)]
struct Output {
    status: Option<u32>,
    signal: Option<String>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    eof: bool,
}

impl Output {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap().trim_end()
    }
}

async fn collect(mut reader: russh::ChannelReadHalf) -> Output {
    let mut output = Output::default();
    while let Some(message) = reader.wait().await {
        match message {
            ChannelMsg::Data { data } => output.stdout.extend_from_slice(&data),
            ChannelMsg::ExtendedData { data, .. } => output.stderr.extend_from_slice(&data),
            ChannelMsg::ExitStatus { exit_status } => output.status = Some(exit_status),
            ChannelMsg::ExitSignal { signal_name, .. } => output.signal = Some(format!("{signal_name:?}")),
            ChannelMsg::Eof => output.eof = true,
            ChannelMsg::Failure => panic!("refused"),
            _ => {}
        }
    }
    output
}

async fn exec_with(handle: &client::Handle<Trusting>, command: &str, stdin: Vec<u8>) -> Output {
    let work = async {
        let channel = handle.channel_open_session().await.unwrap();
        let (reader, writer) = channel.split();
        writer.exec(true, command).await.unwrap();
        let feed = async {
            // Refused when the command has ended without reading it all.
            if writer.data_bytes(stdin).await.is_ok() {
                let _ = writer.eof().await;
            }
        };
        let mut output = std::pin::pin!(collect(reader));
        tokio::select! {
            output = &mut output => output,
            () = feed => output.await,
        }
    };
    tokio::time::timeout(Duration::from_secs(60), work).await.unwrap_or_else(|_| panic!("{command} hangs"))
}

async fn exec(handle: &client::Handle<Trusting>, command: &str) -> Output {
    exec_with(handle, command, Vec::new()).await
}

async fn sftp(handle: &client::Handle<Trusting>) -> SftpSession {
    let channel = handle.channel_open_session().await.unwrap();
    channel.request_subsystem(true, "sftp").await.unwrap();
    SftpSession::new(channel.into_stream()).await.unwrap()
}

fn alive(pid: u32) -> bool {
    // A zombie has no memory: its line for it is missing.
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
async fn a_life() {
    let cloud = Cloud::new();
    assert!(cloud.broker.list().await.unwrap().is_empty());
    let offer = cloud.offer().await;
    let lease = cloud.lease_for(3600);
    let instance = cloud.broker.create(&offer, &lease).await.unwrap();
    assert_eq!(instance.tag().unwrap(), lease.tag);
    assert_eq!(instance.price, Some(offer.price));
    assert_eq!(cloud.only().await, instance);
    assert_eq!(cloud.broker.bill().unwrap().running, std::slice::from_ref(&instance));

    let ssh = cloud.connect(&instance).await;
    let output = exec(&ssh, "echo out; echo err >&2; exit 7").await;
    assert_eq!((output.status, output.text(), &output.stderr[..], output.eof), (Some(7), "out", &b"err\n"[..], true));

    let pid = instance_pid(&cloud, &instance);
    cloud.broker.terminate(&instance.id).await.unwrap();
    assert!(!alive(pid) && !cloud.folder(&instance).exists());
    assert!(cloud.broker.list().await.unwrap().is_empty());
    cloud.broker.terminate(&instance.id).await.unwrap();
    let bill = cloud.broker.bill().unwrap();
    assert!(bill.running.is_empty());
    let [entry] = &bill.entries[..] else { panic!("{bill:?}") };
    assert_eq!((&entry.id, &entry.name, entry.price), (&instance.id.0, &lease.tag.to_string(), offer.price));
    assert!(entry.cost > Usd::ZERO && entry.to >= entry.from && bill.total() == entry.cost);
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_see_a_clean_machine() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let ssh = cloud.connect(&instance).await;
    let home = cloud.folder(&instance).join("home").canonicalize().unwrap();
    let names: HashSet<String> =
        exec(&ssh, "env").await.text().lines().map(|l| l.split('=').next().unwrap().to_owned()).collect();
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
    assert_eq!(
        exec(&ssh, &format!("pwd; echo $HOME; echo ${MARKER}")).await.text(),
        format!("{0}\n{0}\n{1}", home.display(), instance.id)
    );
    let signalled = exec(&ssh, "kill -TERM $$").await;
    assert_eq!((signalled.status, signalled.signal.as_deref()), (None, Some("TERM")));
    assert_eq!(exec(&ssh, "/no/such/program").await.status, Some(127));
    assert_eq!(exec(&ssh, "printf 'a\\377b'").await.stdout, b"a\xffb");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_any_size() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let ssh = cloud.connect(&instance).await;
    let big = exec(&ssh, "head -c 30000000 /dev/zero; echo end >&2").await;
    assert_eq!((big.status, big.stdout.len(), &big.stderr[..]), (Some(0), 30_000_000, &b"end\n"[..]));
    let data = noise(20_000_000);
    assert_eq!(exec_with(&ssh, "wc -c", data.clone()).await.text().trim(), "20000000");
    let echo = exec_with(&ssh, "cat", data.clone()).await;
    assert!(echo.stdout == data && echo.status == Some(0));
    // A command that does not read its input, with more input than any window.
    assert_eq!(exec_with(&ssh, "head -c 1 >/dev/null; exit 3", data).await.status, Some(3));
    assert_eq!(exec_with(&ssh, "cat | tr a-z A-Z", b"no newline".to_vec()).await.text(), "NO NEWLINE");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_channels_and_connections() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let first = cloud.connect(&instance).await;
    let others = futures::future::join_all((0..5).map(|_| cloud.connect(&instance))).await;
    let slow = exec(&first, "sleep 1; echo slow");
    let commands = others.iter().chain([&first]).flat_map(|ssh| {
        (0..10).map(move |i| async move {
            let output = exec(ssh, &format!("head -c 100000 /dev/zero; echo {i}")).await;
            assert_eq!(output.stdout.len(), 100_002);
        })
    });
    let (slow, _) = tokio::join!(slow, futures::future::join_all(commands));
    assert_eq!(slow.text(), "slow");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_nothing_does_not_stop_the_others() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let ssh = cloud.connect(&instance).await;
    let stuck = ssh.channel_open_session().await.unwrap();
    stuck.exec(true, "echo $$ >pid; exec cat /dev/zero").await.unwrap();
    let pid_file = cloud.folder(&instance).join("home/pid");
    until("the start", || fs::read_to_string(&pid_file).is_ok_and(|t| t.ends_with('\n'))).await;
    let pid: u32 = fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    let other = cloud.connect(&instance).await;
    assert_eq!(exec(&other, "echo free").await.text(), "free");
    // The client goes away: the command loses its pipe and ends.
    drop(stuck);
    drop(ssh);
    until("the end of the writer", || !alive(pid)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_key_and_the_user_of_the_lease_are_let_in() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let to = endpoint(&instance);
    assert!(connect(&to, "outliers", &make_key()).await.is_none());
    assert!(connect(&to, "root", &cloud.key).await.is_none());
    let config = Arc::new(client::Config::default());
    let mut handle = client::connect(config, (to.host.as_str(), to.port), Trusting).await.unwrap();
    assert!(!handle.authenticate_none("outliers").await.unwrap().success());
    assert!(!handle.authenticate_password("outliers", "").await.unwrap().success());
    assert!(connect(&to, "outliers", &cloud.key).await.is_some());
    let private = |name: &str| fs::metadata(cloud.folder(&instance).join(name)).unwrap().permissions().mode() & 0o077;
    assert_eq!((private("host_key"), private("home"), private("log")), (0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_served_is_refused_and_the_connection_lives() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let ssh = cloud.connect(&instance).await;
    let mut channel = ssh.channel_open_session().await.unwrap();
    channel.request_pty(true, "xterm", 80, 24, 0, 0, &[]).await.unwrap();
    assert!(matches!(channel.wait().await, Some(ChannelMsg::Failure)));
    channel.request_subsystem(true, "netconf").await.unwrap();
    assert!(matches!(channel.wait().await, Some(ChannelMsg::Failure)));
    channel.exec(true, "sleep 1; echo still here").await.unwrap();
    assert!(matches!(channel.wait().await, Some(ChannelMsg::Success)));
    channel.exec(true, "echo twice").await.unwrap();
    let mut seen = Vec::new();
    while let Some(message) = channel.wait().await {
        seen.push(format!("{message:?}"));
    }
    assert!(seen.iter().any(|m| m.contains("Failure")) && seen.iter().any(|m| m.contains("still here")), "{seen:?}");
    assert!(ssh.channel_open_direct_tcpip("127.0.0.1", 22, "127.0.0.1", 1).await.is_err());
    assert_eq!(exec(&ssh, "echo alive").await.text(), "alive");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_reaches_the_command() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let ssh = cloud.connect(&instance).await;
    let (reader, writer) = ssh.channel_open_session().await.unwrap().split();
    writer.exec(true, "sleep 100 & touch up; sleep 100").await.unwrap();
    let up = cloud.folder(&instance).join("home/up");
    until("the command", || up.exists()).await;
    writer.signal(Sig::TERM).await.unwrap();
    let output = tokio::time::timeout(TIMEOUT, collect(reader)).await.unwrap();
    assert_eq!(output.signal.as_deref(), Some("TERM"));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_both_ways() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let ssh = cloud.connect(&instance).await;
    let sftp = sftp(&ssh).await;
    let home = cloud.folder(&instance).join("home").canonicalize().unwrap();
    assert_eq!(sftp.canonicalize(".").await.unwrap(), home.to_str().unwrap());

    let data = noise(5_000_000);
    sftp.create_dir("d").await.unwrap();
    let mut file = sftp.create("d/big.part").await.unwrap();
    file.write_all(&data).await.unwrap();
    file.flush().await.unwrap();
    file.shutdown().await.unwrap();
    fs::write(home.join("d/big"), "old").unwrap();
    sftp.rename("d/big.part", "d/big").await.unwrap();
    assert!(fs::read(home.join("d/big")).unwrap() == data);

    let mut back = Vec::new();
    let mut file = sftp.open("d/big").await.unwrap();
    assert_eq!(file.metadata().await.unwrap().size, Some(5_000_000));
    file.read_to_end(&mut back).await.unwrap();
    assert!(back == data);
    file.seek(std::io::SeekFrom::Start(4_999_990)).await.unwrap();
    let mut tail = Vec::new();
    file.read_to_end(&mut tail).await.unwrap();
    assert_eq!(tail, data[4_999_990..]);
    file.shutdown().await.unwrap();

    let mut log = sftp.open_with_flags("log", OpenFlags::WRITE | OpenFlags::CREATE | OpenFlags::APPEND).await.unwrap();
    log.write_all(b"one\n").await.unwrap();
    log.shutdown().await.unwrap();
    let mut attributes = sftp.metadata("log").await.unwrap();
    attributes.permissions = Some(0o600);
    sftp.set_metadata("log", attributes).await.unwrap();
    assert_eq!(fs::metadata(home.join("log")).unwrap().permissions().mode() & 0o777, 0o600);
    let mut log = sftp.open_with_flags("log", OpenFlags::WRITE | OpenFlags::APPEND).await.unwrap();
    log.write_all(b"two\n").await.unwrap();
    log.shutdown().await.unwrap();
    assert_eq!(sftp.read("log").await.unwrap(), b"one\ntwo\n");

    for i in 0..250 {
        fs::write(home.join(format!("d/{i}")), "").unwrap();
    }
    let mut names: Vec<_> = sftp.read_dir("d").await.unwrap().map(|entry| entry.file_name()).collect();
    names.sort();
    assert_eq!(names.len(), 251);
    std::os::unix::fs::symlink("log", home.join("link")).unwrap();
    assert_eq!(sftp.read_link("link").await.unwrap(), "log");
    assert!(sftp.symlink_metadata("link").await.unwrap().file_type().is_symlink());
    assert!(sftp.metadata("link").await.unwrap().file_type().is_file());

    let missing = sftp.metadata("nowhere").await.unwrap_err();
    assert!(format!("{missing:?}").contains("NoSuchFile"), "{missing:?}");
    assert!(sftp.open("nowhere").await.is_err() && sftp.remove_dir("d").await.is_err());
    sftp.remove_file("log").await.unwrap();
    assert!(!home.join("log").exists());
    let space = sftp.fs_info(".").await.unwrap().unwrap();
    assert!(space.blocks_avail > 0);
    sftp.close().await.unwrap();
    assert_eq!(exec(&ssh, "wc -c <d/big").await.text().trim(), "5000000");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_detached_child_outlives_its_channel_and_connection() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let ssh = cloud.connect(&instance).await;
    let begun = Instant::now();
    let output = exec(&ssh, "setsid nohup sleep 300 </dev/null >log 2>&1 & echo $!").await;
    assert!(begun.elapsed() < TIMEOUT);
    let pid: u32 = output.text().parse().unwrap();
    drop(ssh);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(alive(pid));
    let again = cloud.connect(&instance).await;
    assert_eq!(exec(&again, &format!("kill -0 {pid} && echo lives")).await.text(), "lives");
    cloud.broker.terminate(&instance.id).await.unwrap();
    assert!(!alive(pid));
}

#[tokio::test(flavor = "multi_thread")]
async fn no_zombies_are_kept() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let ssh = cloud.connect(&instance).await;
    exec(&ssh, "for i in 1 2 3 4 5; do setsid sh -c 'sleep 0.1' </dev/null >/dev/null 2>&1 & done").await;
    let parent = instance_pid(&cloud, &instance);
    let children = || Command::new("ps").args(["-o", "pid=", "--ppid", &parent.to_string()]).output();
    if children().is_ok() {
        until("the end of the orphans", || children().unwrap().stdout.is_empty()).await;
    }
}

/// Starts processes that shed one mark each; returns their ids.
async fn shed_marks(ssh: &client::Handle<Trusting>) -> Vec<u32> {
    let script = "
        setsid nohup sleep 301 </dev/null >/dev/null 2>&1 & echo $!
        env -i sleep 302 </dev/null >/dev/null 2>&1 & echo $!
        trap '' TERM; setsid sh -c 'trap \"\" TERM HUP; while :; do sleep 303; done' </dev/null >/dev/null 2>&1 & echo $!
        cp /bin/sleep ./worker; setsid env -i ./worker 304 </dev/null >/dev/null 2>&1 & echo $!";
    let output = exec(ssh, script).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    output.text().lines().map(|line| line.parse().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn terminate_ends_what_sheds_its_marks() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let ssh = cloud.connect(&instance).await;
    let mut pids = shed_marks(&ssh).await;
    let output =
        exec(&ssh, "setsid env -i /bin/sh -c '/bin/sleep 306 </dev/null >/dev/null 2>&1 & echo $!' & wait").await;
    pids.push(output.text().parse().unwrap());
    let stopped = exec(&ssh, "sleep 305 </dev/null >/dev/null 2>&1 & P=$!; sleep 0.3; kill -STOP $P; echo $P").await;
    pids.insert(0, stopped.text().parse().unwrap());
    assert!(pids.len() == 6 && pids.iter().all(|pid| alive(*pid)), "{pids:?}");
    cloud.broker.terminate(&instance.id).await.unwrap();
    // Only a system that lets orphans be adopted keeps hold of one that sheds all its marks at once.
    let sure = if cfg!(target_os = "linux") { &pids[..] } else { &pids[..5] };
    let left: Vec<_> = sure.iter().filter(|pid| alive(**pid)).collect();
    assert!(left.is_empty(), "{left:?} of {pids:?}");
    assert_eq!(cloud.broker.bill().unwrap().entries.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_children_of_a_killed_instance_are_found() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let ssh = cloud.connect(&instance).await;
    let pids = shed_marks(&ssh).await;
    kill(instance_pid(&cloud, &instance), "-KILL");
    let begun = Instant::now();
    while matches!(cloud.only().await.state, InstanceState::Ready(_)) {
        assert!(begun.elapsed() < TIMEOUT);
    }
    let dead = cloud.only().await;
    assert!(matches!(&dead.state, InstanceState::Failed(why) if why.contains("process ended")), "{dead:?}");
    assert_eq!(dead.tag(), instance.tag());
    assert_eq!(cloud.broker.bill().unwrap().running.len(), 1, "a dead instance still bills");
    assert!(pids.iter().all(|pid| alive(*pid)), "its children live on");
    cloud.broker.terminate(&instance.id).await.unwrap();
    let left: Vec<_> = pids.iter().filter(|pid| alive(**pid)).collect();
    assert!(left.is_empty(), "{left:?} of {pids:?}");
    assert!(cloud.broker.list().await.unwrap().is_empty());
    assert_eq!(cloud.broker.bill().unwrap().entries.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_multiplies_is_ended() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let ssh = cloud.connect(&instance).await;
    let breed = "cat >breed <<'END'\ntrap '' TERM\nsleep 0.02\nsetsid sh breed &\nEND\nsetsid sh breed </dev/null >/dev/null 2>&1 &";
    assert_eq!(exec(&ssh, breed).await.status, Some(0));
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
async fn nothing_is_kept_of_clients_that_went_away() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let folder = PathBuf::from(format!("/proc/{}/fd", instance_pid(&cloud, &instance)));
    let open = || fs::read_dir(&folder).map_or(0, Iterator::count);
    exec(&cloud.connect(&instance).await, "true").await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let before = open();
    for _ in 0..10 {
        let ssh = cloud.connect(&instance).await;
        // A writer that nobody reads, a reader that nobody feeds, a file that nobody closes, a channel on which nothing runs.
        let reader = ssh.channel_open_session().await.unwrap();
        reader.exec(true, "cat >/dev/null").await.unwrap();
        let files = sftp(&ssh).await;
        let file = files.create("kept").await.unwrap();
        let idle = ssh.channel_open_session().await.unwrap();
        // The last, because the client's library stalls a connection of which one channel is not read.
        let writer = ssh.channel_open_session().await.unwrap();
        writer.exec(true, "cat /dev/zero").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        ssh.disconnect(russh::Disconnect::ByApplication, "", "").await.unwrap();
        drop((writer, reader, files, file, idle));
    }
    until("the end of what they left", || open() <= before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_the_instance_and_its_children() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let ssh = cloud.connect(&instance).await;
    let pids = shed_marks(&ssh).await;
    kill(instance_pid(&cloud, &instance), "-TERM");
    until("the end", || pids.iter().all(|pid| !alive(*pid)) && !alive(instance_pid(&cloud, &instance))).await;
    assert!(matches!(cloud.only().await.state, InstanceState::Failed(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deadline_ends_everything_and_the_bill() {
    let cloud = Cloud::new();
    let instance = cloud.broker.create(&cloud.offer().await, &cloud.lease_for(4)).await.unwrap();
    let ssh = cloud.connect(&instance).await;
    let pids = shed_marks(&ssh).await;
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
async fn many_terminate_at_once_and_bill_once() {
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
async fn an_instance_outlives_its_creator() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let pid = instance_pid(&cloud, &instance);
    let field = |name: &str| {
        let output = Command::new("ps").args(["-o", &format!("{name}="), "-p", &pid.to_string()]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    // A session of its own, without a terminal: neither a hang-up nor a Ctrl-C of its creator's reaches it.
    assert_eq!((field("sess"), field("pgid")), (pid.to_string(), pid.to_string()));
    assert_eq!(field("tty"), "?");
    // Another controller finds and ends it.
    let other = LocalBroker::new(cloud.root(), PathBuf::from(EXE));
    assert_eq!(other.list().await.unwrap(), std::slice::from_ref(&instance));
    other.terminate(&instance.id).await.unwrap();
    assert!(!alive(pid));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_at_rest_uses_no_processor() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let ssh = cloud.connect(&instance).await;
    exec(&ssh, "true").await;
    let _sftp = sftp(&ssh).await;
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
async fn an_instance_that_cannot_start_is_explained_and_costs_nothing() {
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
async fn a_create_cut_short_is_listed_and_can_be_ended() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let folder = cloud.folder(&instance);
    // As a controller leaves it that is killed between the intent and the process: no process, nothing it would write.
    kill(instance_pid(&cloud, &instance), "-KILL");
    for name in ["ready.json", "host_key", "log"] {
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
async fn a_termination_cut_short_can_be_finished() {
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
    // Cut short after the bill, and after the folder was moved away.
    fs::create_dir(cloud.root().join("instances/.gone-i-abcdefghijkl")).unwrap();
    cloud.broker.terminate(&InstanceId("i-abcdefghijkl".to_owned())).await.unwrap();
    assert!(!cloud.root().join("instances/.gone-i-abcdefghijkl").exists());
    cloud.broker.terminate(&instance.id).await.unwrap();
    assert!(cloud.broker.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn junk_is_not_listed_and_damage_is() {
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
async fn ids_are_not_paths() {
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
async fn an_unreadable_folder_is_an_error_not_an_empty_list() {
    let cloud = Cloud::new();
    fs::create_dir_all(cloud.root()).unwrap();
    fs::write(cloud.root().join("instances"), "in the way").unwrap();
    assert!(cloud.broker.list().await.is_err());
    assert!(cloud.broker.bill().is_err());
    assert!(cloud.broker.create(&cloud.offer().await, &cloud.lease_for(60)).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_rented() {
    let cloud = Cloud::new();
    let offer = cloud.offer().await;
    let kind = async |offer: &Offer, lease: &Lease| cloud.broker.create(offer, lease).await.unwrap_err().kind;
    let lease = cloud.lease_for(60);
    assert_eq!(kind(&Offer { key: "moon".to_owned(), ..offer.clone() }, &lease).await, BrokerErrorKind::Rejected);
    assert_eq!(kind(&Offer { broker: "runpod".to_owned(), ..offer.clone() }, &lease).await, BrokerErrorKind::Rejected);
    let no_key = Lease { ssh_public_key: "ssh-ed25519 nonsense".to_owned(), ..lease.clone() };
    assert_eq!(kind(&offer, &no_key).await, BrokerErrorKind::Rejected);
    let two_keys = Lease { ssh_public_key: format!("{0}\n{0}", lease.ssh_public_key), ..lease.clone() };
    assert_eq!(kind(&offer, &two_keys).await, BrokerErrorKind::Rejected);
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
async fn a_gpu_is_rented_once_at_a_time() {
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
    assert_eq!(exec(&cloud.connect(&two).await, visible).await.text(), "0,1");
    let refused = cloud.broker.create(&offers[2], &lease).await.unwrap_err();
    assert_eq!(refused.kind, BrokerErrorKind::NoCapacity);
    let one = cloud.broker.create(&offers[1], &lease).await.unwrap();
    assert_eq!(exec(&cloud.connect(&one).await, visible).await.text(), "2");
    let none = cloud.broker.create(&offers[0], &lease).await.unwrap();
    assert_eq!(exec(&cloud.connect(&none).await, visible).await.text(), "");
    cloud.broker.terminate(&two.id).await.unwrap();
    let again = cloud.broker.create(&offers[2], &lease).await.unwrap();
    assert_eq!(exec(&cloud.connect(&again).await, visible).await.text(), "0,1");
}

/// Anybody on the machine can connect to a loopback port; only the owner can log in.
#[tokio::test]
async fn connections_that_do_not_log_in_keep_nobody_out() {
    let cloud = Cloud::new();
    let instance = cloud.rent().await;
    let to = endpoint(&instance);
    let mut strangers = Vec::new();
    for _ in 0..200 {
        let mut stranger = tokio::net::TcpStream::connect((to.host.as_str(), to.port)).await.unwrap();
        stranger.write_all(b"SSH-2.0-nobody\r\n").await.unwrap();
        strangers.push(stranger);
    }
    let handle = cloud.connect(&instance).await;
    assert_eq!(exec(&handle, "echo in").await.text(), "in");
    // The oldest had to make room. A reset is as good as an end.
    let ended = tokio::time::timeout(TIMEOUT, strangers[0].read_to_end(&mut Vec::new())).await;
    assert!(ended.is_ok(), "it is still there");
    assert_eq!(exec(&handle, "echo still").await.text(), "still", "who has logged in is no stranger");
}
