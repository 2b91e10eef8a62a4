//! Attacks of a hostile host: a whole run per attack, against a small SSH server, and a line about
//! each in the test's log.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{StreamExt, stream};
use outliers::cloud::broker::{GpuRequest, SshEndpoint};
use outliers::cloud::clouds::{BadHosts, Clouds, Timeouts};
use outliers::cloud::estimate::Work;
use outliers::cloud::market::Quote;
use outliers::host::keys::RunKey;
use outliers::host::transport::TransportErrorKind as Kind;
use outliers::host::transport::ssh::SshTransport;
use outliers::host::{HostEvent, HostFacts};
use outliers::run::deploy::{DeployEvent, Driver, Ports, SshHosts, Stop};
use outliers::run::ledger::{Ledger, RunRecord};
use outliers::run::local_worker::{InspectScope, LocalWorker};
use outliers::run::output;
use outliers::run::{GuardTimeouts, RunOutcome, RunSpec};
use outliers::units::Bytes;
use outliers_protocol::{CorpusSource, JobSpec, ModelSource, Precision};
use outliers_tests::programs::{golden, worker};
use outliers_tests::tell;
use russh::keys::{Algorithm, PrivateKey, key::safe_rng};
use russh::{Preferred, cipher, kex, mac};

mod cloud;
mod host;

use cloud::{Cloud, NAME};
use host::{Attack, tampering};

/// Timeout of an attack. Later, it would have kept an instance.
const TIMEOUT: Duration = Duration::from_secs(150);
/// Timeout from login to the worker's start, for hosts that must be replaced.
const READY: Duration = Duration::from_secs(20);
/// Upper bound of the files of a run of the small fixture.
const LARGEST: u64 = 64 << 20;
/// Attacks that run at the same time.
const AT_ONCE: usize = 6;

/// Required end of a run.
#[derive(Clone, Copy)]
enum Expect {
    /// With complete results, after this many instances.
    Completed(usize),
    /// Without complete results.
    Refused,
    /// With or without results.
    Over,
    /// With or without results, but without a file of this name.
    Without(&'static str),
}

/// What a host does, what it does to the worker's files before the worker ends (for `tamper.sh`),
/// and how the run must end.
type Row = (&'static str, Attack, &'static str, Expect);

const ROWS: [Row; 23] = [
    ("nothing", Attack::Nothing, "", Expect::Completed(1)),
    ("no command ever ends", Attack::Silence, "", Expect::Completed(2)),
    ("commands drip a byte a second", Attack::Drip, "", Expect::Completed(2)),
    ("commands talk without end", Attack::Flood, "", Expect::Completed(2)),
    ("SFTP that never answers", Attack::SilentFiles, "", Expect::Completed(2)),
    ("81,000 channels opened by the server", Attack::OpensChannels, "", Expect::Completed(2)),
    ("1000 forwards asked for", Attack::AsksForForwards, "", Expect::Completed(1)),
    (
        "a file of 50 GiB in the manifest",
        Attack::Nothing,
        r#"truncate -s 50G big.bin; manifest '{"name":"big.bin","bytes":53687091200,"sha256":"'$zeros'"}'"#,
        Expect::Refused,
    ),
    (
        "a file of 1 TB in the manifest",
        Attack::Nothing,
        r#"manifest '{"name":"big.bin","bytes":1099511627776,"sha256":"'$zeros'"}'"#,
        Expect::Refused,
    ),
    (
        "a name outside the job",
        Attack::Nothing,
        r#"echo exec evil > evil.sh; manifest "$(entry evil.sh evil.sh)""#,
        Expect::Without("evil.sh"),
    ),
    (
        "another job's metadata",
        Attack::Nothing,
        r#"sed 's/"precision": *"f32"/"precision": "bf16"/' metadata.json > .m; mv .m metadata.json; manifest"#,
        Expect::Refused,
    ),
    ("1 GiB of progress", Attack::Nothing, "truncate -s 1G progress.jsonl", Expect::Over),
    ("1 GiB of log", Attack::Nothing, "truncate -s 1G worker.log", Expect::Over),
    (
        "escape sequences in log, progress and names",
        Attack::Nothing,
        r#"printf '\033]0;owned\007\033[2J \342\200\256log\n' >&2
           printf '{"schema":1,"message":"\\u001b[2J\\u202e"}\n\033[31m\n' >> progress.jsonl
           manifest "$(entry '\u001b[2Jx' results.json)""#,
        Expect::Refused,
    ),
    ("a path that climbs", Attack::Nothing, r#"manifest "$(entry ../../../climbed results.json)""#, Expect::Refused),
    ("an absolute path", Attack::Nothing, r#"manifest "$(entry /etc/passwd /etc/passwd)""#, Expect::Refused),
    (
        "a link to a file of the host's",
        Attack::Nothing,
        r#"ln -s /etc/passwd linked; manifest "$(entry linked linked)""#,
        Expect::Refused,
    ),
    ("a link in place of the results", Attack::Nothing, "mv results.json .r; ln -s .r results.json", Expect::Refused),
    (
        "a named pipe",
        Attack::Nothing,
        r#"mkfifo pipe; manifest '{"name":"pipe","bytes":3,"sha256":"'$zeros'"}'"#,
        Expect::Refused,
    ),
    ("bytes of another hash", Attack::Nothing, "tr 0-4 5-9 < results.json > .r; mv .r results.json", Expect::Refused),
    ("a longer file than the manifest says", Attack::Nothing, "echo more >> results.json", Expect::Refused),
    (
        "a manifest that is a bomb",
        Attack::Nothing,
        r"head -c 500000 /dev/zero | tr '\0' '[' > manifest.json",
        Expect::Refused,
    ),
    ("no manifest at all", Attack::Nothing, "rm manifest.json; mkdir manifest.json", Expect::Refused),
];

#[tokio::test(flavor = "multi_thread")]
async fn hostile_hosts_do_no_harm() {
    let program = worker();
    let worker = program.as_path();
    // Those that only wait come first, and none waits for another's words.
    let mut rows: Vec<&Row> = ROWS.iter().collect();
    rows.sort_by_key(|(_, bad, ..)| !is_slow(*bad));
    let runs = stream::iter(rows).map(|row| async move { (row.0, over(played(row, worker)).await) });
    let (mut lines, preface, weak, lying) = tokio::join!(
        runs.buffer_unordered(AT_ONCE).collect::<Vec<_>>(),
        over(endless_preface()),
        over(weak_algorithms()),
        over(lying_files()),
    );
    lines.sort_by_key(|(attack, _)| ROWS.iter().position(|row| row.0 == *attack));
    lines.push(("text without end before the version", preface));
    lines.push(("weak algorithms", weak));
    lines.push(("devices, pipes, links and wrong sizes by SFTP", lying));
    tell(&format!("{:<46}outcome", "tried"));
    for (attack, outcome) in &lines {
        let (held, words) = outcome.as_ref().map_or_else(|why| ("HARM: ", why), |words| ("", words));
        tell(&format!("{attack:<46}{held}{words}"));
    }
    let harmful: Vec<&str> = lines.iter().filter(|(_, outcome)| outcome.is_err()).map(|(attack, _)| *attack).collect();
    assert!(harmful.is_empty(), "{harmful:?}");
}

/// Whether nothing but the end of a host's time tells what it does.
fn is_slow(bad: Attack) -> bool {
    matches!(bad, Attack::Silence | Attack::Drip | Attack::SilentFiles)
}

async fn over(attack: impl Future<Output = Result<String, String>>) -> Result<String, String> {
    tokio::time::timeout(TIMEOUT, attack).await.unwrap_or_else(|_| Err("it does not end".to_owned()))
}

/// Runs one attack; returns the outcome as text.
async fn played((_, bad, attack, expect): &Row, worker: &Path) -> Result<String, String> {
    let here = tempfile::tempdir().unwrap();
    let (cloud, program) = (Arc::new(Cloud::new(*bad)), tampering(worker, attack, here.path()));
    let heard = Mutex::new(Vec::new());
    let timeouts = Timeouts { ready: if is_slow(*bad) { READY } else { Timeouts::LOCAL.ready }, ..Timeouts::LOCAL };
    let record = drive(&cloud, timeouts, program, here.path(), &heard).await?;
    let (created, left) = cloud.count();
    let ending = record.state.ending().ok_or("it is not over")?;
    demand(record.state.is_closed() && left == 0, || format!("{left} instances are left"))?;
    let whole = record.state.results().is_some_and(|results| results.complete);
    let held = match expect {
        Expect::Completed(instances) => *ending == RunOutcome::Completed && whole && created == *instances,
        Expect::Refused => *ending != RunOutcome::Completed && !whole,
        Expect::Over | Expect::Without(_) => true,
    };
    demand(held, || format!("{created} instances, whole: {whole}, {ending}"))?;
    let (accepted, refused) = cloud.tally.read();
    demand(accepted == 0, || format!("{accepted} channels or forwards were accepted"))?;
    demand(*bad != Attack::OpensChannels || (1..20).contains(&refused), || format!("{refused} channels were refused"))?;
    demand(*bad != Attack::AsksForForwards || refused > 0, || "nobody was asked".to_owned())?;
    files_are_harmless(here.path(), *expect)?;
    let mut heard = heard.into_inner().unwrap();
    if let RunOutcome::Failed { trouble } = ending {
        heard.push(trouble.message.clone());
    }
    let harmless = |c: char| !c.is_control() && !matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}');
    demand(heard.iter().all(|text| text.chars().all(harmless)), || format!("{heard:?}"))?;
    let words: String = ending.to_string().replace('\n', " ").chars().take(110).collect();
    Ok(format!("{created} rented; {words}"))
}

fn demand(holds: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(why()) }
}

/// No received file is too large, a link, or outside the results.
fn files_are_harmless(here: &Path, expect: Expect) -> Result<(), String> {
    let mut names: Vec<String> = Vec::new();
    let mut folders = vec![here.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let facts = path.symlink_metadata().unwrap();
            let is_plain = facts.is_file() && facts.len() <= LARGEST;
            demand(facts.is_dir() || is_plain, || format!("{} has {} bytes", path.display(), facts.len()))?;
            names.push(path.file_name().unwrap().to_string_lossy().into_owned());
            if facts.is_dir() {
                folders.push(path);
            }
        }
    }
    let mut above: Vec<_> = std::fs::read_dir(here).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    above.sort();
    let ours = ["outliers-worker", "results", "state"];
    demand(above.iter().all(|name| ours.iter().any(|known| name == known)), || format!("{above:?}"))?;
    let unwanted = if let Expect::Without(name) = expect { name } else { "passwd" };
    demand(!names.iter().any(|name| name == unwanted), || format!("{unwanted} came here"))
}

/// All output of the host.
fn words(facts: HostFacts) -> String {
    let gpus = facts.gpus.into_iter().flat_map(|gpu| [gpu.name, gpu.driver, gpu.uuid]);
    [facts.os, facts.arch, facts.user, facts.home].into_iter().chain(gpus).collect::<Vec<_>>().join(" ")
}

/// A whole run, in `here`.
async fn drive(
    cloud: &Arc<Cloud>,
    timeouts: Timeouts,
    program: PathBuf,
    here: &Path,
    heard: &Mutex<Vec<String>>,
) -> Result<RunRecord, String> {
    let on = |event| {
        let text = match event {
            DeployEvent::Host(HostEvent::Log(text) | HostEvent::BadProgress(text)) => text,
            DeployEvent::Host(HostEvent::Waiting { what, .. }) => what,
            DeployEvent::Host(HostEvent::ConnectionLost { why }) => why,
            DeployEvent::Host(HostEvent::Progress(progress)) => progress.message.unwrap_or_default(),
            DeployEvent::Host(HostEvent::Probed(facts)) => words(facts),
            DeployEvent::Note(note) => note,
            DeployEvent::Refused { reason } | DeployEvent::Retrying { reason, .. } => reason,
            _ => return,
        };
        heard.lock().unwrap().push(text);
    };
    let ledger = Ledger::open(&here.join("state")).map_err(|error| error.to_string())?;
    let run = ledger.plan(&spec(&here.join("results")).await).map_err(|error| error.to_string())?;
    let (hosts, bad_hosts) = (SshHosts::new(program, Bytes::from_gib(1), Bytes::from_gib(1)), BadHosts::default());
    let cloud = outliers::cloud::clouds::Cloud { broker: cloud.clone(), timeouts, is_local: false };
    let clouds = Clouds::from(vec![cloud]);
    let ports = Ports { clouds: &clouds, bad_hosts: &bad_hosts, hosts: &hosts, secrets: &[], start_throttle: None };
    let stop = tokio::sync::watch::Sender::new(Stop::Go);
    Driver::new(run, ports, stop.subscribe(), &on).drive().await.map_err(|error| error.to_string())
}

/// A run of the small fixture, its model uploaded.
async fn spec(results: &Path) -> RunSpec {
    let text = |path: PathBuf| path.to_str().unwrap().to_owned();
    let fixture = golden("llama-f32");
    let model = text(fixture.join("model"));
    let mut job = JobSpec::new(ModelSource::Folder { path: model.clone() });
    job.corpus.source = CorpusSource::TokenIds(text(fixture.join("golden.safetensors")));
    job.precision = Precision::F32;
    let honest = LocalWorker::find(Some(&worker()), Path::new("")).await.unwrap();
    let output = output::planned(&job, &honest.inspect(&job, InspectScope::Model).await.unwrap());
    RunSpec {
        model,
        brokers: NAME.to_owned(),
        job,
        job_key: "hostile".to_owned(),
        request: GpuRequest { gpu_count: Some(0), ..GpuRequest::default() },
        work: Work::default(),
        disk: Bytes::from_mib(16),
        push_model: true,
        keep_running: false,
        detach: false,
        max_duration_s: 600,
        watch: GuardTimeouts { lease_s: 600, unclaimed_s: 600 },
        budget: None,
        max_gpu_time: None,
        quote: Quote::default(),
        only_in_time: false,
        stage: None,
        results: text(results.to_owned()),
        output,
        survey: None,
    }
}

/// An attempt to connect, which must fail with one of these errors.
async fn refused_as(port: u16, kinds: &[Kind]) -> Result<String, String> {
    let folder = tempfile::tempdir().unwrap();
    let key = RunKey::create(folder.path(), "key", "").unwrap();
    let endpoint = SshEndpoint { host: "127.0.0.1".to_owned(), port, user: "root".to_owned() };
    match SshTransport::connect(&endpoint, key.private_path(), None).await {
        Ok(_) => Err("it was logged in to".to_owned()),
        Err(error) if !kinds.contains(&error.kind) => Err(format!("{:?}: {error}", error.kind)),
        Err(error) => Ok(error.message.chars().take(110).collect()),
    }
}

async fn endless_preface() -> Result<String, String> {
    use tokio::io::AsyncWriteExt;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let flood = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
    });
    let outcome = refused_as(port, &[Kind::Reset]).await;
    flood.abort();
    outcome
}

/// Servers that support only broken algorithms.
async fn weak_algorithms() -> Result<String, String> {
    let kex = |name| Preferred { kex: Cow::Owned(vec![name]), ..Preferred::DEFAULT };
    let cipher = |name| Preferred { cipher: Cow::Owned(vec![name]), ..Preferred::DEFAULT };
    let mac = |name| Preferred {
        cipher: Cow::Owned(vec![cipher::AES_256_CTR]),
        mac: Cow::Owned(vec![name]),
        ..Preferred::DEFAULT
    };
    let weak = [
        kex(kex::DH_G1_SHA1),
        kex(kex::DH_G14_SHA1),
        kex(kex::DH_GEX_SHA1),
        cipher(cipher::AES_256_CBC),
        cipher(cipher::NONE),
        mac(mac::HMAC_SHA1),
        mac(mac::NONE),
    ];
    let mut words = String::new();
    for preferred in weak {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let keys = vec![PrivateKey::random(&mut safe_rng(), Algorithm::Ed25519).unwrap()];
        let config = Arc::new(russh::server::Config { keys, preferred, ..russh::server::Config::default() });
        let serving = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            if let Ok(running) = russh::server::run_stream(config, stream, Trusting).await {
                // It ends with the client.
                drop(running.await);
            }
        });
        // Both sides detect it; either may close first.
        words = refused_as(port, &[Kind::Remote, Kind::Reset]).await?;
        serving.abort();
    }
    Ok(words)
}

/// The server that `lying_server` runs, whose errors are ignored.
async fn lying_files() -> Result<String, String> {
    crate::lying_server::lying_files().await;
    Ok("refused, or cut to what was asked for".to_owned())
}

/// Accepts every login.
struct Trusting;

impl russh::server::Handler for Trusting {
    type Error = russh::Error;

    async fn auth_publickey(
        &mut self,
        _user: &str,
        _key: russh::server::VerifiedPublicKey<'_>,
    ) -> Result<russh::server::Auth, Self::Error> {
        Ok(russh::server::Auth::Accept)
    }
}
