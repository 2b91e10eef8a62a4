//! kill -9 of the real controller at every request to a cloud and at times between them; then the
//! same command again.
//!
//! The cloud is a fake over real HTTP, with a bill; the instances are real OpenSSH servers, the
//! ledger and the results real files. Its list has an entry that is partly unreadable, and it
//! refuses terminations at first. `tests/kills.sh N` tests N points.

use std::process::Child;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use outliers::units::Usd;
use outliers_clouds::{Fault, Moment, Odd};
use outliers_tests::kills::{points, strike_all};
use outliers_tests::tell;

use super::*;

/// Default number of points.
const POINTS: usize = 12;
const MOMENTS: [Moment; 3] = [Moment::Arrived, Moment::Applied, Moment::Answered];
/// Another owner's instance in the same account.
const STRANGER: &str = "somebodys-web-server";

/// When the controller is killed.
#[derive(Clone, Copy, Debug)]
enum Point {
    /// At the n-th request to the cloud, from 1 on.
    Request(usize, Moment),
    /// After this share of a run's time.
    Time(f64),
}

/// A cloud of its own with one place that uses it; `None` on a machine without an SSH server.
fn scene() -> Option<(FakeCloud, CloudContext)> {
    let cloud = FakeCloud::start(RunPod::default());
    let place = CloudContext::new(&[&cloud]);
    {
        let mut state = cloud.state();
        state.stock = vec![Stock { left: 9, ..Stock::plain("1001", Gpu::A100, 1, 1.5) }];
        state.shown_after = 1;
        state.pace = 10;
        let id = state.plant(STRANGER);
        state.odd = Some(Odd { id, field: "status".to_owned(), value: None });
        let how = How::Refuse(Refusal::Broken(500));
        state.faults.push(Fault { on: Op::Terminate, applied: false, how, times: 2 });
    }
    place.host(&cloud)?;
    Some((cloud, place))
}

/// Starts a deploy that is killed when its `at`-th request reaches this stage.
fn start_to_die_at(place: &CloudContext, cloud: &FakeCloud, at: usize, when: Moment) -> Child {
    let (aim, struck) = (Arc::new(AtomicUsize::new(0)), AtomicBool::new(false));
    let target = aim.clone();
    // Requests wait until the point is set.
    let mut state = cloud.state();
    state.watch = Some(Arc::new(move |number, moment| {
        if (number, moment) == (at, when) && !struck.swap(true, Ordering::SeqCst) {
            kill(aim.load(Ordering::SeqCst));
        }
    }));
    let controller = place.context.start(CloudContext::deployment());
    target.store(controller.id() as usize, Ordering::SeqCst);
    drop(state);
    controller
}

/// Tests one point. Returns whether the controller was still running.
fn strike(point: Point, whole: Duration) -> bool {
    let (cloud, place) = scene().expect("there was a server a moment ago");
    let mut controller = match point {
        Point::Request(number, moment) => start_to_die_at(&place, &cloud, number, moment),
        Point::Time(share) => {
            let controller = place.context.start(CloudContext::deployment());
            std::thread::sleep(whole.mul_f64(share));
            kill(controller.id() as usize);
            controller
        }
    };
    let died = controller.wait().expect("it was started here").code().is_none();
    cloud.state().watch = None;
    let what = format!("{point:?}");
    let again = place.context.run(CloudContext::deployment());
    assert_eq!(again.code, Some(0), "{what}: {again:?}");
    agreed(&cloud, &place, &what);
    died
}

/// Final assertion: nothing of this ledger bills, the amount paid is at most the agreed one, every
/// run is closed with complete results or a reported loss, and other owners' instances are still
/// listed.
fn agreed(cloud: &FakeCloud, place: &CloudContext, what: &str) {
    let state = cloud.state();
    let left: Vec<&str> = state.live().map(|instance| instance.name.as_str()).collect();
    assert_eq!(left, [STRANGER], "{what}: still billing, or ended although it was not ours");
    let ours = || state.instances.iter().filter(|instance| instance.name != STRANGER);
    assert!(ours().count() <= 2, "{what}: {} instances", ours().count());
    let paid: Usd = ours().map(|instance| instance.cost(state.now)).sum();
    drop(state);
    let runs = place.context.json(&["runs", "list"]);
    let mut whole = 0;
    let mut at_most = Usd::ZERO;
    for run in runs["runs"].as_array().expect("a list") {
        let agreed = run["spec"]["agreed"].as_i64().expect("somebody said yes");
        let cost = run["cost_micro_usd"].as_i64().expect("a figure");
        assert!(cost <= agreed, "{what}: {cost} of {agreed}");
        at_most = at_most + Usd::from_micros(agreed);
        assert_eq!(run["state"]["state"], "closed", "{what}: {run:#}");
        let is_whole = run["state"]["results"]["complete"] == true;
        whole += usize::from(is_whole);
        assert!(is_whole || run["state"]["loss"].is_string(), "{what}: lost without a word: {run:#}");
        if is_whole {
            let folder = Path::new(run["state"]["results"]["folder"].as_str().expect("a path"));
            let results = std::fs::read(folder.join(files::RESULTS)).expect("whole results are there");
            let results = serde_json::from_slice(&results).expect("results");
            assert_statistics_equal(&golden(FIXTURE).join("outliers.json"), &results);
        }
    }
    assert!(whole >= 1, "{what}: {runs:#}");
    assert!(Usd::ZERO < paid && paid <= at_most, "{what}: {paid} of {at_most}");
    let listed = place.context.json(&["instances", "list", "--broker", "runpod"]);
    let names = listed["instances"].as_array().expect("a list").iter().map(|instance| &instance["name"]);
    assert_eq!(names.collect::<Vec<_>>(), [STRANGER], "{what}: {listed:#}");
}

fn kill(pid: usize) {
    let _ = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status();
}

#[test]
fn controller_killed_at_any_point_leaves_no_instance_and_loses_no_result() {
    let Some((cloud, place)) = scene() else { return };
    // The first run may wait for the programs to be built.
    let _ = place.context.run(["completions", "bash"]).ok();
    let begun = Instant::now();
    let _ = place.deploy().ok();
    let (whole, requests) = (begun.elapsed(), cloud.state().requests.len());
    drop((cloud, place));
    let moments = |number: usize| MOMENTS.map(|moment| Point::Request(number, moment));
    let named: Vec<Point> = (1..=requests).flat_map(moments).collect();
    let points = points(POINTS, &named, Point::Time);
    let (died, seconds) = (strike_all(&points, |point| strike(point, whole)), whole.as_secs_f64());
    tell(&format!("{requests} requests in {seconds:.1} s; of {} controllers {died} died of it", points.len()));
    assert!(died * 10 >= points.len() * 7, "only {died} of {} were still there to be struck", points.len());
}
