//! Runs whose controller ends, by option or with its terminal, and other processes that watch
//! them.

use std::time::{SystemTime, UNIX_EPOCH};

use outliers_clouds::dialect::lambda::Lambda;
use outliers_clouds::{FakeCloud, Op};
use outliers_protocol::files;
use outliers_tests::context::TestContext;

use crate::clouds::CloudContext;
use crate::deploy::{SLOW, signal, signal_worker, slow_deploy, worker_is_busy};

const SIGHUP: i32 = 1;
const SIGINT: i32 = 2;

/// Removes settings of the environment in which the tests were started.
const WITH_HANGUPS: [&str; 2] = ["env", "--default-signal=HUP"];

#[test]
fn deploy_under_nohup_survives_the_terminal() {
    let context = TestContext::new();
    let mut controller = context.start_under(&["nohup"], slow_deploy(&context));
    context.wait_for("the worker to be busy", || worker_is_busy(&context));
    signal(&controller, SIGHUP);
    let code = controller.wait().unwrap().code();
    assert_eq!(code, Some(0), "{}", context.stderr());
    assert_eq!(context.results().sequences, SLOW);
    context.assert_nothing_left();
}

#[test]
fn run_is_resumed_after_the_terminal_closes() {
    let context = TestContext::new();
    let mut controller = context.start_under(&WITH_HANGUPS, slow_deploy(&context));
    context.wait_for("the worker to be busy", || worker_is_busy(&context));
    signal_worker(&context, "STOP");
    context.wait_for("the controller to know", || context.stderr().contains("The worker runs"));
    signal(&controller, SIGHUP);
    let code = controller.wait().unwrap().code();
    let said = context.stderr();
    assert_eq!(code, Some(6), "{said}");
    assert!(said.contains("was left running") && said.contains("outliers attach"), "{said}");
    assert!(said.contains("after 2 h 00 min without a controller"), "{said}");
    assert_eq!(context.bill().running.len(), 1, "it works on");
    let shown = context.run(["status"]).ok();
    assert!(shown.stdout.contains("launched, abandoned"), "{shown:?}");
    signal_worker(&context, "CONT");
    let _ = context.run(["attach"]).ok();
    assert_eq!(context.results().sequences, SLOW);
    context.assert_nothing_left();
    assert_eq!(context.bill().entries.len(), 1, "the same instance, rented once");
}

#[test]
fn detached_run_continues_and_attach_saves_its_results() {
    let context = TestContext::new();
    let arguments = slow_deploy(&context).into_iter().chain(["--detach", "--json"].map(str::to_owned));
    let said = context.run(arguments).ok();
    let document: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    let id = document["run"]["id"].as_str().unwrap().to_owned();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    assert!(document["detached"] == true && document["deadline"].as_u64().unwrap() > now, "{document:#}");
    assert!(document["price"].as_i64().unwrap() > 0 && document["exit_status"] == 0, "{document:#}");
    let commands = [format!("outliers attach {id}"), format!("outliers runs logs {id} -f")];
    for (i, command) in commands.iter().enumerate() {
        assert_eq!(document["commands"][i], *command, "{document:#}");
    }
    let instance = context.bill().running[0].id.0.clone();
    assert_eq!(document["instance"], instance.as_str());

    // Its guard does not act before the time limit.
    let folder = context.state().join("local/instances").join(&instance).join("home/outliers").join(&id);
    let terms = std::fs::read_to_string(folder.join("guard.terms")).unwrap();
    assert!(terms.contains("lease=0 unclaimed=0"), "{terms}");
    let shown = context.run(["status"]).ok();
    assert!(shown.stdout.contains("launched, detached"), "{shown:?}");
    let mut watching = context.start(["status", "--watch"]);
    context.wait_for("a picture", || context.stdout().contains("launched, detached"));
    signal(&watching, SIGINT);
    assert_eq!(watching.wait().unwrap().code(), Some(0), "{}", context.stderr());
    assert_eq!(context.stderr(), "");

    let followed = context.run(["runs", "logs", &id, "-f"]).ok();
    assert!(["layer 1/8", "layer 8/8"].iter().all(|line| followed.stdout.contains(line)), "{followed:?}");
    assert!(followed.stderr.contains("outliers attach"), "{followed:?}");
    let again = context.run(["runs", "logs", &id]).ok();
    assert_eq!(again.stdout, followed.stdout, "reading changes nothing");
    assert_eq!(context.bill().running.len(), 1, "what the worker left waits");
    let _ = context.run(["attach"]).ok();
    assert_eq!(context.results().sequences, SLOW);
    context.assert_nothing_left();
    assert_eq!(context.bill().entries.len(), 1, "rented once");
}

/// Detaching is refused if only a controller can end the instance.
#[test]
fn detach_is_refused_on_clouds_without_self_termination() {
    let cloud = FakeCloud::start(Lambda);
    let place = CloudContext::new(&[&cloud]);
    let said = place.context.run(CloudContext::deployment().into_iter().chain(["--detach".to_owned()]));
    assert_eq!(said.code, Some(2), "{said:?}");
    assert!(said.stderr.contains("--detach") && said.stderr.contains("lambda"), "{said:?}");
    assert_eq!(cloud.state().count(Op::Create), 0);
}

fn lines(text: &str) -> Vec<&str> {
    text.trim_end().lines().map(str::trim_end).collect()
}

#[test]
fn logs_are_readable_while_another_process_drives_the_run() {
    let context = TestContext::new();
    let mut controller = context.start(slow_deploy(&context));
    context.wait_for("the worker to be busy", || worker_is_busy(&context));
    signal_worker(&context, "STOP");
    context.wait_for("its log to be written down", || {
        let said = context.run(["runs", "logs", "last"]);
        said.code == Some(0) && said.stdout.contains("layer 1/8")
    });
    assert!(controller.try_wait().unwrap().is_none(), "what there is is shown while the run goes on");
    signal_worker(&context, "CONT");
    let followed = context.run(["runs", "logs", "last", "--follow"]).ok();
    assert_eq!(controller.wait().unwrap().code(), Some(0), "{}", context.stderr());
    let home = std::fs::read_to_string(context.results_folder().join(files::LOG)).unwrap();
    assert_eq!(lines(&followed.stdout), lines(&home), "every line once");
    context.assert_nothing_left();
}

#[test]
fn status_watch_refreshes_until_no_run_is_active() {
    let context = TestContext::new();
    let mut controller = context.start(slow_deploy(&context));
    context.wait_for("the worker to be busy", || worker_is_busy(&context));
    signal_worker(&context, "STOP");
    context.wait_for("its progress to be shown", || context.run(["status"]).ok().stdout.contains(" of 8 layers"));
    signal_worker(&context, "CONT");
    let said = context.run(["status", "--watch"]).ok();
    assert!(said.stdout.contains("launched") && said.stdout.contains("nothing is under way"), "{said:?}");
    assert!(!said.stdout.contains('\u{1b}'), "no terminal, nothing to redraw: {said:?}");
    assert_eq!(controller.wait().unwrap().code(), Some(0), "{}", context.stderr());
    let said = context.run(["status", "--watch", "--json"]).ok();
    let pictures: Vec<serde_json::Value> =
        said.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(pictures.len(), 1, "nothing runs: {said:?}");
    assert_eq!(pictures[0]["under_way"].as_array().map(Vec::len), Some(0), "{said:?}");
    context.assert_nothing_left();
}
