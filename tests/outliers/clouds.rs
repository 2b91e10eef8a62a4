//! `outliers deploy` on fakes of real clouds' APIs, whose instances are real OpenSSH servers.

use std::path::Path;
use std::sync::Arc;

use outliers_clouds::dialect::lambda::Lambda;
use outliers_clouds::dialect::prime::Prime;
use outliers_clouds::dialect::runpod::RunPod;
use outliers_clouds::dialect::vast::Vast;
use outliers_clouds::{Dialect, FakeCloud, FakeInstance, Gpu, How, KEY, Op, Refusal, Rented, Stock};
use outliers_protocol::files;
use outliers_tests::context::{Said, TestContext};
use outliers_tests::flaky_link::FlakyLink;
use outliers_tests::golden::{assert_activations_equal, assert_statistics_equal};
use outliers_tests::programs::{golden, run_worker, worker};
use outliers_tests::sshd::Sshd;

mod kills;

const FIXTURE: &str = "olmoe-bf16";

/// Of a cloud's settings: its list is asked for often, so that no test waits ten seconds for the
/// next, and that several times.
pub(super) const QUICK: &str = "listing-interval = \"1s\"\n";

/// A context on which only these clouds are known, each with [`QUICK`] settings.
pub(super) struct CloudContext {
    pub(super) context: TestContext,
    /// Folder of the hosts' tools: an `nvidia-smi` that lists the rented GPUs.
    tools: tempfile::TempDir,
}

impl CloudContext {
    pub(super) fn new(clouds: &[&FakeCloud]) -> Self {
        Self::with_settings(clouds, "")
    }

    /// With more settings: of the last cloud, and behind them any other section.
    pub(super) fn with_settings(clouds: &[&FakeCloud], more: &str) -> Self {
        let tools = tempfile::tempdir().unwrap();
        let smi = tools.path().join("nvidia-smi");
        let script = "#!/bin/sh\ncase \"$*\" in *query-gpu*) \
            echo '0, NVIDIA A100-SXM4-80GB, 81251, 550.54.15, GPU-1';; \
            *) echo '| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: 12.4 |';; esac\n";
        std::fs::write(&smi, script).unwrap();
        std::fs::set_permissions(&smi, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let settings = tools.path().join("outliers.toml");
        let section = |cloud: &&FakeCloud| {
            let name = cloud.dialect().cloud().name;
            format!("[brokers.{name}]\nbase-url = \"{}\"\n{QUICK}", cloud.url())
        };
        std::fs::write(&settings, clouds.iter().map(section).collect::<String>() + more).unwrap();
        let mut context = TestContext::new().with("OUTLIERS_CONFIG", settings.to_str().unwrap());
        for cloud in clouds {
            context = context.with(cloud.dialect().cloud().key_variable, KEY);
        }
        Self { context, tools }
    }

    /// Makes every instance of `cloud` an OpenSSH server; `None` on a machine without one.
    pub(super) fn host(&self, cloud: &FakeCloud) -> Option<()> {
        self.host_with(cloud, "", |server| Rented { ssh: server.endpoint(), machine: Box::new(server) })
    }

    /// The same with these lines in its `sshd_config` and the address of `rented`.
    fn host_with(
        &self,
        cloud: &FakeCloud,
        config: &str,
        rented: impl Fn(Sshd) -> Rented + Send + Sync + 'static,
    ) -> Option<()> {
        Sshd::start().unwrap()?;
        let tools = self.tools.path().display();
        let config = format!("{config}SetEnv HOME={{folder}}/home PATH={tools}:/usr/bin:/bin");
        cloud.state().host = Some(Arc::new(move |instance: &FakeInstance| {
            let server = Sshd::start_with(&config).unwrap().unwrap();
            server.authorize(instance.public_key.as_deref().expect("a lease comes with a key")).unwrap();
            rented(server)
        }));
        Some(())
    }

    /// Deploys an uploaded fixture on any offer with an A100.
    fn deploy(&self) -> Said {
        self.context.run(Self::deployment())
    }

    pub(super) fn deployment() -> Vec<String> {
        let folder = golden(FIXTURE);
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let (model, ids) = (text(&folder.join("model")), text(&folder.join("golden.safetensors")));
        let usual = [
            "deploy",
            "--model",
            &model,
            "--push-model",
            "--token-ids",
            &ids,
            "--precision",
            "f32",
            "--devices",
            "cpu",
        ];
        let rest = [
            "--gpu-filter",
            "A100",
            "--min-vram",
            "80",
            "--save-activations",
            "activations.safetensors",
            "-y",
            "--json",
        ];
        usual.into_iter().chain(rest).map(str::to_owned).collect()
    }

    /// Of two A100s the first is sold out. Results are as on other instances, and nothing is left.
    fn full_run(&self, cloud: &FakeCloud) {
        {
            let mut state = cloud.state();
            state.stock = vec![
                Stock::plain("1001", Gpu::A100, 1, 1.5),
                Stock { region: "us-texas-1", ..Stock::plain("1002", Gpu::A100, 1, 1.5) },
                Stock::plain("1003", Gpu::H100, 1, 1.0),
            ];
            state.shown_after = 1;
            state.fail(Op::Create, How::Refuse(Refusal::NoCapacity));
        }
        let said = self.deploy().ok();
        let deployed: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
        let events: Vec<&str> = deployed["run"]["events"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| entry["event"].as_str().unwrap())
            .collect();
        assert_eq!(events[..4], ["creating", "not_created", "creating", "created"], "{said:?}");
        let home = self.context.results_folder();
        let reference = golden(FIXTURE);
        assert_activations_equal(&reference.join("golden.safetensors"), &home.join("activations.safetensors"));
        assert_statistics_equal(&reference.join("outliers.json"), &self.context.results());
        assert!(home.join(files::METADATA).exists());
        nothing_left(cloud);
        let state = cloud.state();
        assert_eq!(state.instances.len(), 1, "rented once");
        assert!(state.keys.is_empty(), "the account's keys are as before: {:?}", state.keys);
        assert!(!format!("{said:?}").contains(KEY));
    }
}

/// Final assertion: the cloud bills nothing.
pub(super) fn nothing_left(cloud: &FakeCloud) {
    let state = cloud.state();
    assert_eq!(state.live().count(), 0, "still billing: {state:?}");
}

/// An SSH session on a kept instance, which must show its first host key.
#[test]
fn ssh_to_a_held_instance_checks_its_host_key() {
    let cloud = FakeCloud::start(RunPod::default());
    let place = CloudContext::new(&[&cloud]);
    if place.host(&cloud).is_none() {
        return;
    }
    cloud.state().stock = vec![Stock::plain("1001", Gpu::A100, 1, 1.5)];
    let _ = place.context.run(CloudContext::deployment().into_iter().chain(["--keep-running".to_owned()])).ok();
    let listed = place.context.json(&["instances", "list"]);
    let id = listed["instances"][0]["id"].as_str().expect("it is kept").to_owned();
    let command = place.context.run(["instances", "ssh", &id]).ok().stdout;
    assert!(command.starts_with("ssh -i ") && command.contains("StrictHostKeyChecking=yes"), "{command}");
    let shell = |command: &str| std::process::Command::new("sh").args(["-c", command]).output().unwrap();
    if shell("command -v ssh").status.success() {
        let said = shell(&format!("{} 'echo entered' 2>&1", command.trim()));
        assert!(String::from_utf8_lossy(&said.stdout).contains("entered"), "{said:?}");
        // Another host at the same address.
        let run = listed["instances"][0]["name"].as_str().unwrap().split('-').nth(2).unwrap();
        let known_hosts = place.context.state().join("runs").join(run).join("known_hosts");
        let known = std::fs::read_to_string(&known_hosts).unwrap();
        let (address, _) = known.split_once(' ').unwrap();
        let other = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDn1pBGEfNCWyLLKkRzKDmJpDxkFMhfDkMr0Q0QxQQQQ";
        std::fs::write(&known_hosts, format!("{address} {other}\n")).unwrap();
        let said = shell(&format!("{} true 2>&1", command.trim().replacen("ssh", "ssh -o BatchMode=yes", 1)));
        assert!(String::from_utf8_lossy(&said.stdout).contains("Host key verification failed"), "{said:?}");
    } else {
        outliers_tests::not_checked("no ssh is installed");
    }
    let _ = place.context.run(["instances", "terminate", &id, "-y"]).ok();
    nothing_left(&cloud);
}

fn deploys_to(dialect: impl Dialect) {
    let cloud = FakeCloud::start(dialect);
    let place = CloudContext::new(&[&cloud]);
    if place.host(&cloud).is_some() {
        place.full_run(&cloud);
    }
}

#[test]
fn deploy_to_runpod_completes() {
    deploys_to(RunPod::default());
}

#[test]
fn deploy_to_vast_completes() {
    deploys_to(Vast);
}

#[test]
fn deploy_to_prime_completes() {
    deploys_to(Prime);
}

/// Lambda reports only an address: user and port are those of its images, unless the settings have
/// others.
#[test]
fn deploy_to_lambda_completes() {
    let Some(server) = Sshd::start().unwrap() else { return };
    let user = server.endpoint().user;
    drop(server);
    let port = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let cloud = FakeCloud::start(Lambda);
    let place = CloudContext::with_settings(&[&cloud], &format!("ssh-user = \"{user}\"\nssh-port = {port}\n"));
    let plain = |server: Sshd| Rented { ssh: server.endpoint(), machine: Box::new(server) };
    place.host_with(&cloud, &format!("Port {port}\n"), plain).expect("it started above");
    place.full_run(&cloud);
}

/// A gateway's text before the SSH version (RFC 4253, section 4.2), and a server that permits one
/// session.
#[test]
fn deploy_works_with_an_ssh_banner_and_one_session() {
    let cloud = FakeCloud::start(RunPod::default());
    let place = CloudContext::new(&[&cloud]);
    let line = |i| format!("0{i} This is a private system of a provider, do not enter.\r\n");
    let preface: String = (0..50).map(line).collect();
    let behind_a_gateway = move |server: Sshd| {
        let link = FlakyLink::with_preface(&server.endpoint(), preface.as_bytes()).unwrap();
        Rented { ssh: link.endpoint(), machine: Box::new((link, server)) }
    };
    if place.host_with(&cloud, "MaxSessions 1\n", behind_a_gateway).is_some() {
        place.full_run(&cloud);
    }
}

/// A rented GPU must be used.
#[test]
fn unsupported_gpus_are_not_rented() {
    let cloud = FakeCloud::start(Vast);
    let usual = CloudContext::deployment();
    let devices = usual.iter().position(|word| word == "--devices").unwrap();
    let all_devices: Vec<_> = [&usual[..devices], &usual[devices + 2..]].concat();
    let plain = CloudContext::new(&[&cloud]).context.run(&all_devices);
    assert_eq!(plain.code, Some(2), "{plain:?}");
    let said = format!("{plain:?}");
    assert!(said.contains("without CUDA") && said.contains("outliers worker build --cuda"), "{said}");

    // A worker with CUDA that no current driver supports.
    let tools = tempfile::tempdir().unwrap();
    let program = tools.path().join("outliers-worker");
    let version = String::from_utf8(run_worker(["version", "--json"]).stdout).unwrap();
    let version = version.replace("\"cuda\": false", "\"cuda\": true, \"oldest_cuda\": \"99.0\"");
    let real = worker();
    let script =
        format!("#!/bin/sh\n[ \"$1\" != version ] || exec cat <<'END'\n{version}\nEND\nexec {real:?} \"$@\"\n");
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let place = CloudContext::with_settings(&[&cloud], &format!("[worker]\nbinary = {program:?}\n"));
    let demanding = place.context.run(&all_devices);
    assert_eq!(demanding.code, Some(3), "{demanding:?}");
    assert!(format!("{demanding:?}").contains("a driver for the worker (CUDA 99.0)"), "{demanding:?}");
    assert_eq!(cloud.state().count(Op::Create), 0);
}

/// If the rented offer is dearer than the shown one, the time limit is reduced to the agreed
/// amount.
#[test]
fn amount_paid_is_at_most_the_amount_shown() {
    let cloud = FakeCloud::start(Vast);
    let place = CloudContext::new(&[&cloud]);
    if place.host(&cloud).is_none() {
        return;
    }
    {
        let mut state = cloud.state();
        state.stock = vec![Stock::plain("1001", Gpu::A100, 1, 1.5), Stock::plain("1002", Gpu::A100, 1, 1.65)];
        state.fail(Op::Create, How::Refuse(Refusal::NoCapacity));
    }
    let plan =
        CloudContext::deployment().into_iter().map(|word| if word == "-y" { "--dry-run".to_owned() } else { word });
    let said = place.context.run(plan).ok();
    let plan: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    let at_most = plan["at_most"].as_i64().unwrap();
    assert!(at_most > 9_000_000 && at_most % 10_000 == 0, "six hours, to the cent above: {at_most}");

    let budget = format!("{:.2}", at_most as f64 / 1e6);
    let said = place.context.run(CloudContext::deployment().into_iter().chain(["--budget".to_owned(), budget])).ok();
    let deployed: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    let run = &deployed["run"];
    assert_eq!(run["spec"]["agreed"], at_most, "{said:?}");
    for shown in ["offers", "considered", "steps"] {
        assert_eq!(run["spec"][shown], plan[shown], "{said:?}");
    }
    let rented = &run["events"][2];
    assert_eq!(rented["event"], "creating", "{said:?}");
    let (price, tag) =
        (rented["intent"]["offer"]["price"].as_f64().unwrap(), rented["intent"]["tag"].as_str().unwrap());
    let deadline: f64 = tag.rsplit('-').next().unwrap().parse().unwrap();
    let time = deadline - rented["at_ms"].as_f64().unwrap() / 1000.0;
    assert!(price > 1_650_000.0 && time < 6.0 * 3600.0 && price * time / 3600.0 <= at_most as f64, "{said:?}");
    assert!(deployed["cost_micro_usd"].as_i64().unwrap() <= at_most);
    nothing_left(&cloud);
}

/// The start of an instance is estimated to take five minutes.
#[test]
fn run_over_its_time_limit_needs_allow_cut_short() {
    let cloud = FakeCloud::start(Vast);
    let place = CloudContext::with_settings(&[&cloud], "[run]\nmax-duration = \"2m\"\n");
    let run = |more: &[&str]| {
        let usual = CloudContext::deployment().into_iter().filter(|word| word != "-y");
        place.context.run(usual.chain(more.iter().map(|word| (*word).to_owned())))
    };
    for typed in [&["--dry-run"][..], &["-y"]] {
        let said = run(typed);
        assert_eq!(said.code, Some(2), "{said:?}");
        let words = ["longer than its time limit of 2 min 00 s", "--max-duration 6m", "--allow-cut-short"];
        assert!(words.iter().all(|word| said.stderr.contains(word)), "{said:?}");
    }
    assert_eq!(cloud.state().count(Op::Create), 0);
    drop(run(&["--dry-run", "--max-duration", "6m"]).ok());
    drop(run(&["--dry-run", "--allow-cut-short"]).ok());

    let said = place.context.run(["offers", "--gpu-filter", "a100"]).ok();
    assert!(said.stdout.contains("(!)") && said.stdout.contains("time limit of 2 min 00 s"), "{said:?}");
    assert!(said.stdout.contains("a model of 50 billion parameters"), "it says what takes and costs so much: {said:?}");
    let found = place.context.json(&["offers", "--gpu-filter", "a100"]);
    assert_eq!(found["offers"][0]["over_limit"], true, "{found:#}");
}

#[test]
fn clock_hours_off_is_refused_and_seconds_off_is_corrected() {
    let cloud = FakeCloud::start(Vast);
    let place = CloudContext::new(&[&cloud]);
    for (ahead, said) in [(7 * 3600 + 30, "7 h 00 min behind that of vast"), (-7 * 3600, "ahead of that of vast")] {
        cloud.state().clock_ahead = ahead;
        let refused = place.deploy();
        assert!(refused.code == Some(2) && refused.stderr.contains(said), "{refused:?}");
        let doctor = place.context.run(["doctor"]);
        assert!(doctor.stdout.contains("its clock is"), "{doctor:?}");
    }
    assert_eq!(cloud.state().count(Op::Create), 0);

    cloud.state().clock_ahead = 200;
    cloud.state().stock = vec![Stock::plain("1001", Gpu::A100, 1, 1.5)];
    if place.host(&cloud).is_none() {
        return;
    }
    let said = place.deploy().ok();
    let deployed: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    let asked = &deployed["run"]["events"][0];
    let deadline: f64 = asked["intent"]["tag"].as_str().unwrap().rsplit('-').next().unwrap().parse().unwrap();
    let after = deadline - asked["at_ms"].as_f64().unwrap() / 1000.0 - 6.0 * 3600.0;
    assert!((195.0..=205.0).contains(&after), "{after}");
}

/// A fake of every cloud.
fn all_clouds() -> [FakeCloud; 4] {
    [FakeCloud::start(RunPod::default()), FakeCloud::start(Vast), FakeCloud::start(Lambda), FakeCloud::start(Prime)]
}

#[test]
fn deploy_on_a_sold_out_cloud_exits_as_without_an_offer() {
    let clouds = all_clouds();
    for cloud in &clouds {
        cloud.state().fail_always(Op::Create, How::Refuse(Refusal::NoCapacity));
        let said = CloudContext::new(&[cloud]).deploy();
        assert_eq!(said.code, Some(3), "{said:?}");
        assert!(said.stderr.contains("none could be had") && cloud.state().count(Op::Create) > 0, "{said:?}");
        nothing_left(cloud);
    }
}

/// Every cloud in one table; one that does not answer is left out, and said so.
#[test]
fn offers_queries_all_clouds_concurrently() {
    let clouds = all_clouds();
    clouds[3].state().stock.push(Stock { currency: "EUR", ..Stock::plain("2001", Gpu::A100, 1, 1.0) });
    let place = CloudContext::new(&clouds.iter().collect::<Vec<_>>());
    let found = place.context.json(&["offers", "--gpu-filter", "a100", "--min-vram", "80", "--all"]);
    let offers = found["offers"].as_array().unwrap();
    let mut brokers: Vec<&str> = offers.iter().map(|offer| offer["broker"].as_str().unwrap()).collect();
    brokers.sort_unstable();
    brokers.dedup();
    assert_eq!(brokers, ["lambda", "prime", "runpod", "vast"], "{found:#}");
    let costs: Vec<i64> = offers.iter().map(|offer| offer["estimate"]["cost"].as_i64().unwrap()).collect();
    assert!(costs.is_sorted(), "{costs:?}");
    let dropped = found["dropped"].as_array().unwrap();
    assert!(
        dropped.iter().any(|left| left["broker"] == "prime" && left["reason"].as_str().unwrap().contains("EUR")),
        "{dropped:?}"
    );

    clouds[1].state().fail_always(Op::Offers, How::Refuse(Refusal::Unauthorized));
    let said = place.context.run(["offers", "--gpu-filter", "a100"]).ok();
    assert!(
        said.stderr.contains("vast") && said.stdout.contains("runpod") && !said.stdout.contains("vast"),
        "{said:?}"
    );

    let said = place.context.run(["offers", "--gpu-filter", "a100", "--max-price", "0.01", "--broker", "runpod,prime"]);
    assert_eq!(said.code, Some(3), "{said:?}");
    assert!(said.stderr.contains("--max-price") && said.stderr.contains("would find"), "{said:?}");
}

/// On a machine without a ledger: exactly the owner's overdue instances end, on every cloud.
#[test]
fn reap_needs_only_api_keys() {
    let clouds = all_clouds();
    let now = clouds[0].state().now;
    let (past, future) = (now - 60, now + 3600);
    let names = [
        format!("outliers-me-r1-n1-{past}"),
        format!("outliers-me-r2-n1-{future}"),
        format!("outliers-you-r3-n1-{past}"),
        "somebodys-web-server".to_owned(),
        format!("outliers-me-{past}"),
    ];
    for cloud in &clouds {
        names.iter().for_each(|name| drop(cloud.state().plant(name)));
    }
    let left = |cloud: &FakeCloud| cloud.state().live().map(|instance| instance.name.clone()).collect::<Vec<_>>();
    let place = CloudContext::new(&clouds.iter().collect::<Vec<_>>());
    let shown = place.context.json(&["reap", "--owner", "me", "--dry-run"]);
    assert_eq!(shown["overdue"].as_array().unwrap().len(), 4, "{shown:#}");
    assert!(clouds.iter().all(|cloud| left(cloud) == names), "a dry run ends nothing");
    let reaped = place.context.json(&["reap", "--owner", "me"]);
    assert!(reaped["overdue"].as_array().unwrap().iter().all(|overdue| overdue["gone"] == true), "{reaped:#}");
    assert!(clouds.iter().all(|cloud| left(cloud) == names[1..]), "{:?}", clouds.each_ref().map(left));
    let said = place.context.run(["reap", "--all-owners"]);
    assert!(said.code == Some(2) && said.stderr.contains("--yes twice"), "{said:?}");
    clouds[1].state().fail_always(Op::List, How::Refuse(Refusal::Unauthorized));
    let said = place.context.run(["reap", "--all-owners", "-y", "-y"]);
    assert!(said.code == Some(6) && said.stderr.contains("vast"), "{said:?}");
    for (i, cloud) in clouds.iter().enumerate() {
        assert_eq!(left(cloud).contains(&names[2]), i == 1, "what can be seen is ended, what cannot is told");
    }
}

#[test]
fn doctor_reports_each_problem() {
    let clouds = [FakeCloud::start(RunPod::default()), FakeCloud::start(Lambda)];
    let place = CloudContext::new(&clouds.iter().collect::<Vec<_>>());
    let said = place.context.run(["doctor"]).ok();
    for word in ["runpod account", "lambda account", "prime API", "PRIME_API_KEY", "worker", "ledger"] {
        assert!(said.stdout.contains(word), "{word}: {said:?}");
    }
    let lacks_cuda = said.stdout.contains("without CUDA");
    assert_eq!(lacks_cuda, said.stdout.contains("outliers worker build --cuda"), "{said:?}");
    clouds[1].state().fail_always(Op::List, How::Refuse(Refusal::Unauthorized));
    let said = place.context.run(["doctor"]);
    assert!(said.code == Some(5) && said.stdout.contains("BAD") && !said.stdout.contains(KEY), "{said:?}");
    let said = place.context.run(["doctor", "--broker", "runpod"]).ok();
    assert!(said.stdout.contains("runpod account") && !said.stdout.contains("lambda"), "{said:?}");
}

/// Five hundred instances of others and one stray of this ledger: all are listed, only the stray
/// is this ledger's, and memory stays small.
#[test]
fn large_account_is_listed_whole_and_only_our_stray_is_ours() {
    let cloud = FakeCloud::start(RunPod::default());
    {
        let mut state = cloud.state();
        for stock in &mut state.stock {
            stock.left = 1000;
        }
        for i in 0..500 {
            state.plant(&format!("someone-elses-{i}"));
        }
    }
    let place = CloudContext::new(&[&cloud]);
    let mut child = place.context.start(["instances", "list", "--broker", "runpod", "--json"]);
    let mut peak_kib = 0;
    let status = loop {
        let text = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
        peak_kib = line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0).max(peak_kib);
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None => std::thread::sleep(std::time::Duration::from_millis(2)),
        }
    };
    assert!(status.success(), "{}", place.context.stderr());
    let listed: serde_json::Value = serde_json::from_str(&place.context.stdout()).unwrap();
    assert_eq!(listed["instances"].as_array().unwrap().len(), 500);
    assert!(peak_kib > 0 && peak_kib < 60 * 1024, "{peak_kib} KiB");
    assert_eq!(cloud.state().count(Op::Terminate), 0, "nobody touches what is not ours");
}
