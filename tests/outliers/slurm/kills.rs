//! kill -9 of the real controller at commands to a cluster and at times between them; then
//! `attach`, or the same command again if the run had not begun.
//!
//! `tests/kills.sh N slurm` tests N points.

use std::collections::BTreeSet;

use outliers_tests::kills::{points, strike_all};
use outliers_tests::tell;
use serde_json::Value;

use super::*;

const FIXTURE: &str = "llama-f32";
/// Default number of points.
const POINTS: usize = 6;

/// When the controller is killed.
#[derive(Clone, Copy, Debug)]
enum Point {
    /// At the n-th of Slurm's commands, from 1 on.
    Command(usize, &'static str),
    /// After this share of a run's time.
    Time(f64),
}

/// One point: whether the controller was still there to be struck.
fn strike(point: Point, whole: Duration) -> bool {
    let (cluster, context) = office().expect("there was a server a moment ago");
    let mut controller = context.start(deploy(FIXTURE));
    match point {
        // It reads the model before its first command.
        Point::Command(number, when) => {
            cluster.inject_failure("strike", &format!("{number} {when} {}\n", controller.id())).unwrap();
        }
        Point::Time(share) => {
            std::thread::sleep(whole.mul_f64(share));
            controller.kill().unwrap();
        }
    }
    let died = controller.wait().expect("it was started here").code().is_none();
    cluster.clear_failure("strike");
    let what = format!("{point:?}");
    let runs = context.json(&["runs", "list"]);
    let runs = runs["runs"].as_array().expect("a list");
    let again = match runs.iter().find(|run| run["state"]["state"] != "closed") {
        Some(_) => Some(context.run(["attach"])),
        None if runs.iter().any(is_whole) => None,
        None => Some(context.run(deploy(FIXTURE))),
    };
    assert!(again.as_ref().is_none_or(|said| said.code == Some(0)), "{what}: {again:?}");
    agreed(&cluster, &context, &what);
    died
}

fn is_whole(run: &Value) -> bool {
    run["state"]["results"]["complete"] == true
}

/// Final assertion: at most one job per intent, none in the queue, nothing in scratch, and
/// complete results of a closed run.
fn agreed(cluster: &Cluster, context: &TestContext, what: &str) {
    let names = cluster.job_names();
    let apart: BTreeSet<&String> = names.iter().collect();
    assert_eq!(apart.len(), names.len(), "{what}: two jobs of one intent: {names:?}");
    let queue = cluster.says("squeue", &ALL_JOBS);
    let live = ["|RUNNING|", "|PENDING|"].iter().any(|word| queue.contains(word));
    assert!(!live && !cluster.leases().exists(), "{what}: something is left: {queue}");
    let runs = context.json(&["runs", "list"]);
    let runs = runs["runs"].as_array().expect("a list");
    assert!(runs.iter().all(|run| run["state"]["state"] == "closed"), "{what}: {runs:#?}");
    let whole: Vec<&Value> = runs.iter().filter(|run| is_whole(run)).collect();
    assert_eq!(whole.len(), 1, "{what}: {runs:#?}");
    let folder = Path::new(whole[0]["state"]["results"]["folder"].as_str().expect("a path"));
    let results = std::fs::read(folder.join(files::RESULTS)).expect("whole results are there");
    let results = serde_json::from_slice(&results).expect("results");
    assert_statistics_equal(&golden(FIXTURE).join("outliers.json"), &results);
    context.assert_nothing_left();
}

#[test]
fn slurm_controller_killed_at_any_point_leaves_no_job_and_loses_no_result() {
    let Some((cluster, context)) = office() else { return };
    // The first run may wait for the programs to be built.
    let _ = context.run(["completions", "bash"]).ok();
    let begun = Instant::now();
    let _ = context.run(deploy(FIXTURE)).ok();
    let (whole, commands) = (begun.elapsed(), cluster.asked(""));
    drop((cluster, context));
    let both = |number: usize| ["before", "after"].map(|when| Point::Command(number, when));
    let named: Vec<Point> = (1..=commands).flat_map(both).collect();
    let points = points(POINTS, &named, Point::Time);
    let (died, seconds) = (strike_all(&points, |point| strike(point, whole)), whole.as_secs_f64());
    tell(&format!("{commands} commands in {seconds:.1} s; of {} controllers {died} died of it", points.len()));
    assert!(died * 2 >= points.len(), "only {died} of {} were still there to be struck", points.len());
}
