//! Ending an instance needs only its id and a key: whatever else is damaged, missing or odd, no
//! instance is left running.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use outliers_clouds::dialect::lambda::Lambda;
use outliers_clouds::{FakeCloud, How, KEY, Odd, Op, Refusal};
use outliers_tests::context::{Said, TestContext};
use outliers_tests::programs::golden;
use serde_json::json;

use crate::clouds::{CloudContext, QUICK};

/// The small fixture's model over its own token ids.
fn job(name: &str) -> Vec<String> {
    let folder = golden(name);
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (model, ids) = (text(&folder.join("model")), text(&folder.join("golden.safetensors")));
    ["--model", &model, "--token-ids", &ids, "--precision", "f32"].map(str::to_owned).to_vec()
}

fn run(context: &TestContext, command: &[&str], job: Vec<String>) -> Said {
    context.run(command.iter().map(|word| (*word).to_owned()).chain(job))
}

/// Deploys and keeps the instance; returns the run and the instance.
fn kept(context: &TestContext) -> (String, String) {
    let said = run(context, &["deploy", "-y", "--json", "--keep-running"], job("llama-f32")).ok();
    let deployed: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    let text = |pointer: &str| deployed.pointer(pointer).and_then(|value| value.as_str()).unwrap().to_owned();
    (text("/run/id"), text("/run/state/rental/instance"))
}

#[test]
fn implausible_numbers_are_refused_before_renting() {
    let context = TestContext::new();
    let model = golden("llama-f32").join("model");
    std::fs::write(context.work().join("s.toml"), format!("name = \"s\"\nmodels = [{model:?}]\n")).unwrap();
    let settings = context.work().join("mine.toml");
    for (section, key, value) in [
        ("thresholds", "magnitude", "nan"),
        ("thresholds", "magnitude", "0"),
        ("thresholds", "layer-fraction", "1.5"),
        ("thresholds", "position-fraction", "inf"),
        ("plan", "efficiency", "-0.5"),
        ("plan", "read-rate", "\"0 GiB\""),
    ] {
        std::fs::write(&settings, format!("[{section}]\n{key} = {value}\n")).unwrap();
        for command in [&["deploy", "-y"][..], &["plan"], &["analyze"], &["survey", "s.toml", "-y"]] {
            let job = if command[0] == "survey" { Vec::new() } else { job("llama-f32") };
            let said = run(&context, &[&["--config", "mine.toml"], command].concat(), job);
            assert_eq!(said.code, Some(2), "{key} = {value}: {command:?}: {said:?}");
            assert!(said.stderr.contains(key) && said.stderr.contains("positive number"), "{said:?}");
        }
    }
    assert!(!context.state().join("ledger.db").exists(), "nothing was even planned");
    context.assert_nothing_left();
}

#[test]
fn damaged_record_blocks_no_command_and_its_instance_is_found_by_tag() {
    let context = TestContext::new();
    let (lost, instance) = kept(&context);
    let ledger = rusqlite::Connection::open(context.state().join("ledger.db")).unwrap();
    let damage = "UPDATE runs SET spec = replace(spec, '\"magnitude\":6.0', '\"magnitude\":null')";
    assert_eq!(ledger.execute(damage, []).unwrap(), 1);
    for command in [&["runs", "list"][..], &["status"], &["handoff"], &["reap"]] {
        let said = context.run(command).ok();
        let named = said.stderr.contains(&lost) && said.stderr.contains("damaged");
        assert!(named, "{command:?} names it: {said:?}");
    }
    let attached = context.run(["attach"]);
    assert!(attached.code == Some(2) && attached.stderr.contains("no run was left behind"), "{attached:?}");
    let said = run(&context, &["deploy", "-y"], job("qwen3")).ok();
    assert!(said.stderr.contains(&lost), "{said:?}");
    let listed = context.run(["instances", "list"]).ok();
    assert!(listed.stdout.contains(&instance) && listed.stdout.contains("record cannot be read"), "{listed:?}");
    let said = context.run(["instances", "terminate", &instance, "-y"]).ok();
    assert!(said.stdout.contains("seen gone"), "{said:?}");
    context.assert_nothing_left();
}

#[test]
fn doctor_looks_at_clouds_where_the_ledger_cannot_be_read() {
    let context = TestContext::new();
    let _ = context.run(["runs", "list"]).ok();
    let ledger = rusqlite::Connection::open(context.state().join("ledger.db")).unwrap();
    ledger.execute_batch("ALTER TABLE runs RENAME COLUMN created_at_ms TO other").unwrap();
    drop(ledger);
    let said = context.run(["doctor"]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.stdout.contains("BAD") && said.stdout.contains("local instances"), "{said:?}");
    context.assert_nothing_left();
}

/// The same command where no file can grow: as on a full disk, and for root too.
fn on_a_full_disk(context: &TestContext, arguments: &[&str]) -> Said {
    let plain = context.command(arguments);
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' XFSZ; ulimit -f 0; exec \"$0\" \"$@\""]);
    command.arg(plain.get_program()).args(plain.get_args());
    command.current_dir(context.work()).stdin(Stdio::null()).env_clear();
    command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    Said::from(command.output().unwrap())
}

/// A cloud with one overdue instance of `owner`, one that is not overdue, and one of another
/// owner.
fn planted(owner: &str) -> (FakeCloud, [String; 3]) {
    let cloud = FakeCloud::start(Lambda);
    let now = cloud.state().now;
    let (past, future) = (now - 60, now + 3600);
    let names =
        [format!("outliers-{owner}-r1-n1-{past}"), format!("outliers-{owner}-r2-n1-{future}"), "web".to_owned()];
    let ids = names.map(|name| cloud.state().plant(&name));
    (cloud, ids)
}

fn live(cloud: &FakeCloud) -> Vec<String> {
    cloud.state().live().map(|instance| instance.id.clone()).collect()
}

/// Lists and ends instances without a usable ledger; `wrong` is the message about it.
fn ends_without_a_ledger(
    place: &CloudContext,
    cloud: &FakeCloud,
    ids: &[String; 3],
    run: impl Fn(&[&str]) -> Said,
    wrong: &str,
) {
    let listed = run(&["instances", "list"]).ok();
    assert!(ids.iter().all(|id| listed.stdout.contains(id)), "{listed:?}");
    assert!(listed.stdout.contains("not known here"), "{listed:?}");
    assert!(listed.stderr.contains("ledger.db") && listed.stderr.contains(wrong), "{listed:?}");
    let stranger = run(&["instances", "terminate", &ids[2], "-y"]);
    assert!(stranger.code == Some(2) && stranger.stderr.contains("--force"), "{stranger:?}");
    let reaped = run(&["reap"]).ok();
    assert!(reaped.stdout.contains(&ids[0]) && reaped.stdout.contains("seen gone"), "{reaped:?}");
    assert_eq!(live(cloud), ids[1..], "what was overdue and nothing else");
    let said = run(&["instances", "terminate", &ids[1], "-y"]).ok();
    assert!(said.stdout.contains("seen gone"), "{said:?}");
    assert_eq!(live(cloud), ids[2..]);
    assert_eq!(place.context.bill().running.len(), 0);
}

#[test]
fn instances_are_listed_reaped_and_ended_without_a_readable_ledger() {
    let (cloud, ids) = planted("me");
    let place = CloudContext::new(&[&cloud]);
    std::fs::create_dir_all(place.context.state()).unwrap();
    std::fs::write(place.context.state().join("owner"), "me\n").unwrap();
    std::fs::write(place.context.state().join("ledger.db"), "some text that somebody wrote over it").unwrap();
    ends_without_a_ledger(&place, &cloud, &ids, |command| place.context.run(command), "doctor --repair");
}

#[test]
fn instances_are_listed_reaped_and_ended_on_a_full_disk() {
    let (cloud, ids) = planted("me");
    let place = CloudContext::new(&[&cloud]);
    std::fs::create_dir_all(place.context.state()).unwrap();
    std::fs::write(place.context.state().join("owner"), "me\n").unwrap();
    let _ = place.context.run(["runs", "list"]).ok();
    ends_without_a_ledger(&place, &cloud, &ids, |command| on_a_full_disk(&place.context, command), "have room");
}

#[test]
fn instances_of_another_ledger_end_by_owner_name() {
    let (cloud, ids) = planted("lost");
    let place = CloudContext::new(&[&cloud]);
    let context = &place.context;
    let refused = context.run(["instances", "terminate", &ids[1], "-y"]);
    assert!(refused.code == Some(2) && refused.stderr.contains("--owner lost"), "{refused:?}");
    let refused = context.run(["instances", "terminate", &ids[2], "-y", "--owner", "lost"]);
    assert!(refused.code == Some(2) && refused.stderr.contains("--force"), "{refused:?}");
    assert_eq!(cloud.state().count(Op::Terminate), 0);
    let _ = context.run(["instances", "terminate", &ids[1], "-y", "--owner", "lost"]).ok();
    let _ = context.run(["instances", "terminate", &ids[2], "-y", "--force", "--broker", "lambda"]).ok();
    let _ = context.run(["instances", "terminate", "--all", "-y", "--owner", "lost"]).ok();
    assert_eq!(live(&cloud), [""; 0]);
}

#[test]
fn terminate_without_yes_lists_instances_and_ends_none() {
    let (cloud, ids) = planted("me");
    let place = CloudContext::new(&[&cloud]);
    for named in [&["--all"][..], &[ids[0].as_str(), ids[1].as_str()]] {
        let said = place.context.run([&["instances", "terminate", "--owner", "me"][..], named].concat());
        assert!(said.code == Some(2) && said.stderr.contains("--yes"), "{said:?}");
        let shown = |word: &str| said.stderr.contains(word);
        assert!(shown(&ids[0]) && shown(&ids[1]) && !shown(&ids[2]) && shown("2 instances"), "{said:?}");
        assert!(shown("hardware") && shown("price") && shown("/h") && shown("outliers-me-r1"), "{said:?}");
    }
    assert_eq!(cloud.state().count(Op::Terminate), 0);
}

#[test]
fn damaged_ledger_is_repaired_and_losses_are_reported() {
    let context = TestContext::new();
    let _ = run(&context, &["deploy", "-y"], job("llama-f32")).ok();
    let (lost, instance) = kept(&context);
    // Its record is in its results, as far as it came.
    let results = context.work().join("remote_results");
    let of_lost = std::fs::read_dir(&results).unwrap().map(|entry| entry.unwrap().path());
    let of_lost = of_lost.into_iter().find(|path| path.to_string_lossy().ends_with(&lost)).unwrap();
    std::fs::remove_dir_all(of_lost).unwrap();
    for end in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(context.state().join(format!("ledger.db{end}")));
    }
    std::fs::write(context.state().join("ledger.db"), "some text that somebody wrote over it").unwrap();
    let broken = context.run(["runs", "list"]);
    assert!(broken.code == Some(1) && broken.stderr.contains("doctor --repair"), "{broken:?}");
    let said = context.run(["doctor", "--repair"]);
    let tells = |word: &str| said.stdout.contains(word);
    assert!(tells("1 from results") && tells(&lost) && tells(&instance), "{said:?}");
    let kept_aside = std::fs::read_dir(context.state()).unwrap().filter_map(Result::ok);
    assert!(kept_aside.map(|entry| entry.file_name()).any(|name| name.to_string_lossy().contains("damaged-20")));
    let listed = context.json(&["runs", "list"]);
    assert_eq!(listed["runs"].as_array().unwrap().len(), 1, "{listed:#}");
    let shown = context.run(["instances", "list"]).ok();
    assert!(shown.stdout.contains(&instance), "{shown:?}");
    let _ = context.run(["instances", "terminate", &instance, "-y"]).ok();
    context.assert_nothing_left();
}

#[test]
fn invalid_settings_do_not_block_termination() {
    let (cloud, ids) = planted("me");
    let place = CloudContext::new(&[&cloud]);
    let context = &place.context;
    let mine = context.work().join("mine.toml");
    let clouds = format!("[brokers.lambda]\nbase-url = \"{}\"\n{QUICK}", cloud.url());
    std::fs::write(&mine, format!("[thresholds]\nmagnitude = nan\n{clouds}")).unwrap();
    let said = context.run(["--config", "mine.toml", "reap", "--owner", "me"]).ok();
    assert!(said.stderr.contains("magnitude"), "{said:?}");
    assert_eq!(live(&cloud), ids[1..]);
}

/// Another owner's odd instance must not keep an instance running.
#[test]
fn malformed_list_entry_does_not_block_termination() {
    for (field, value) in [
        ("instance_type", Some(json!({"name": "gpu_1x", "specs": {"vcpus": 4}}))),
        ("actions", Some(json!(null))),
        ("id", Some(json!(null))),
        ("name", Some(json!(77))),
    ] {
        let (cloud, ids) = planted("me");
        let place = CloudContext::new(&[&cloud]);
        let context = &place.context;
        cloud.state().odd = Some(Odd { id: ids[2].clone(), field: field.to_owned(), value });
        let listed = context.json(&["instances", "list"]);
        assert_eq!(listed["instances"].as_array().unwrap().len(), 3, "{listed:#}");
        assert_eq!(listed["unreadable"].as_u64(), Some(u64::from(["id", "name"].contains(&field))), "{listed:#}");
        let _ = context.run(["reap", "--owner", "me"]).ok();
        assert_eq!(live(&cloud), ids[1..], "{field}");
        let _ = context.run(["instances", "terminate", &ids[1], "-y", "--owner", "me"]).ok();
        assert_eq!(live(&cloud), ids[2..], "{field}");
    }
}

/// With a named cloud no list is needed, neither to end an instance nor to check that it is gone.
#[test]
fn named_instance_is_terminated_without_listing() {
    let (cloud, ids) = planted("me");
    let place = CloudContext::new(&[&cloud]);
    let context = &place.context;
    cloud.state().fail_always(Op::List, How::OtherJson);
    let unseen = context.run(["instances", "terminate", &ids[1], "-y", "--owner", "me"]);
    assert!(unseen.code == Some(5) && unseen.stderr.contains("--broker"), "{unseen:?}");
    let args = ["instances", "terminate", &ids[1], "-y", "--owner", "me", "--broker", "lambda"];
    let said = context.run(args).ok();
    assert!(said.stdout.contains("seen gone"), "{said:?}");
    assert_eq!(live(&cloud), [&ids[0], &ids[2]].map(String::as_str));
    // Even if its own entry is odd.
    cloud.state().odd = Some(Odd { id: ids[0].clone(), field: "name".to_owned(), value: None });
    let _ = context.run(["instances", "terminate", &ids[0], "-y", "--force", "--broker", "lambda"]).ok();
    assert_eq!(live(&cloud), ids[2..]);
}

#[test]
fn refused_termination_reports_price_and_remedy() {
    let (cloud, ids) = planted("me");
    let place = CloudContext::new(&[&cloud]);
    let context = &place.context;
    cloud.state().fail_always(Op::Terminate, How::Refuse(Refusal::Broken(500)));
    let mut child = context.start(["instances", "terminate", &ids[1], "-y", "--owner", "me", "--broker", "lambda"]);
    context.wait_for("the cloud to be told", || cloud.state().count(Op::Terminate) > 0);
    // The limit of five seconds is tested in `waiting.rs`, with a clock that does not depend on
    // the machine.
    context.wait_for("the first word", || context.stderr().contains("does not end instance"));
    for word in ["HTTP 500", "next try in", "$1.89/h", "--broker lambda", &ids[1]] {
        assert!(context.stderr().contains(word), "{word}: {}", context.stderr());
    }
    cloud.state().faults.clear();
    assert!(child.wait().unwrap().success(), "{}", context.stderr());
    assert_eq!(live(&cloud), [&ids[0], &ids[2]].map(String::as_str));
}

#[test]
fn unresponsive_hub_is_named_while_waiting() {
    let silent = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let context = TestContext::new().with("HF_ENDPOINT", &endpoint);
    let mut child = context.start(["inspect", "--model", "owner/name"]);
    context.wait_for("a word", || context.stderr().contains("Waiting for the headers of owner/name"));
    child.kill().unwrap();
    child.wait().unwrap();
}

/// `--dry-run` shows exactly what would end.
#[test]
fn reap_dry_run_shows_exactly_what_reap_ends() {
    let context = TestContext::new();
    // A tag of a finished run, and one of an unknown run that is overdue.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let (cloud, _) = planted("nobody");
    let over = run(&context, &["deploy", "-y", "--json"], job("qwen3")).ok();
    let over: serde_json::Value = serde_json::from_str(&over.stdout).unwrap();
    let asked = over["run"]["events"].as_array().unwrap().iter().find(|event| event["event"] == "creating").unwrap();
    let over = asked["intent"]["tag"].as_str().unwrap();
    const TIME: Duration = Duration::from_secs(60);
    let rented = Instant::now();
    let held = ["deploy", "-y", "--json", "--keep-running", "--max-duration", "60s"];
    let held: serde_json::Value = serde_json::from_str(&run(&context, &held, job("llama-f32")).ok().stdout).unwrap();
    let held = held["run"]["id"].as_str().unwrap().to_owned();
    let owner = std::fs::read_to_string(context.state().join("owner")).unwrap().trim().to_owned();
    let planted = |run: &str, deadline: u64| cloud.state().plant(&format!("outliers-{owner}-{run}-n-{deadline}"));
    let stray = cloud.state().plant(over);
    let (unknown, young) = (planted("unknown", now - 60), planted("unknown", now + 3600));
    let settings = context.work().join("mine.toml");
    std::fs::write(&settings, format!("[brokers.lambda]\nbase-url = \"{}\"\n{QUICK}", cloud.url())).unwrap();
    let with = |more: &[&str]| {
        let mut command = context.command([&["--config", "mine.toml", "reap", "--json"], more].concat());
        let said = Said::from(command.env("LAMBDA_API_KEY", KEY).output().unwrap()).ok();
        serde_json::from_str::<serde_json::Value>(&said.stdout).unwrap()
    };
    // Whoever asked all the time would keep a processor busy for a minute.
    context.wait_for("the held run's time to be up", || {
        rented.elapsed() >= TIME && with(&["--dry-run"])["runs"].as_array().unwrap().len() == 1
    });
    let named = |document: &serde_json::Value| {
        let all = |list: &str, field: &str| {
            let found = document[list].as_array().unwrap().iter().map(|one| one[field].as_str().unwrap().to_owned());
            found.collect::<Vec<_>>()
        };
        (all("runs", "run"), all("strays", "id"), all("overdue", "id"))
    };
    let shown = with(&["--dry-run"]);
    let strays = vec![stray.clone(), unknown.clone()];
    assert_eq!(named(&shown), (vec![held.clone()], strays, vec![]), "{shown:#}");
    assert_eq!(cloud.state().count(Op::Terminate), 0, "a dry run ends nothing");
    let done = with(&[]);
    assert_eq!(named(&done), named(&shown), "{done:#}");
    let left = live(&cloud);
    assert!(!left.contains(&stray) && !left.contains(&unknown) && left.contains(&young), "{left:?}");
    context.assert_nothing_left();
}

/// Without open runs, a bad key or an unreachable cloud is an error of its own, not a possibly
/// running instance.
#[test]
fn unreachable_cloud_exits_5_when_no_run_is_open() {
    let (cloud, _) = planted("nobody");
    let place = CloudContext::new(&[&cloud]);
    cloud.state().fail_always(Op::List, How::Refuse(Refusal::Unauthorized));
    let deploy: Vec<String> = ["deploy", "-y", "--broker", "lambda"].map(str::to_owned).into();
    for command in [vec!["reap".to_owned()], [deploy, job("llama-f32")].concat()] {
        let said = place.context.run(&command);
        assert!(said.code == Some(5) && said.stderr.contains("invalid"), "{command:?}: {said:?}");
        assert!(!said.stderr.contains("still be running"), "{said:?}");
    }
    let elsewhere = place.context.run(["reap", "--owner", "somebody"]);
    assert_eq!(elsewhere.code, Some(6), "of others nobody knows: {elsewhere:?}");
    let settings = place.context.work().join("mine.toml");
    let free = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
    std::fs::write(&settings, format!("[brokers.lambda]\nbase-url = \"http://{free}\"\n")).unwrap();
    let said = place.context.run(["--config", "mine.toml", "reap"]);
    assert!(said.code == Some(5) && said.stderr.contains("cannot be reached"), "{said:?}");
}
