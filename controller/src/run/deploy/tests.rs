//! Tests the driver with faults at every point.

use std::path::Path;

use outliers_protocol::{Failure, FailureKind, Outcome, files};

use super::*;
use crate::cloud::broker::BrokerErrorKind;
use crate::run::ledger::Ledger;
use crate::run::{Membership, RefusedOffer, RunFailureKind, RunOutcome, RunSpec};
use crate::units::{GpuTime, Usd, UsdPerHour};

pub(crate) mod fake;
mod schedules;

use fake::{Fake, Fault, now_ms, open_ledger, set_clock, spec, up_to};

/// Cost of the first offer for the time limit of an hour.
const AGREED: Usd = Usd::from_micros(1_000_000);

/// How one process ended.
#[derive(Debug)]
enum ProcessOutcome {
    Finished(Box<RunRecord>),
    Stuck(#[expect(dead_code, reason = "shown when an assertion fails")] DriveError),
    LetGo,
    Killed,
}

/// One process: plans the run, or resumes the existing one, and drives it.
async fn life(fake: &Fake, home: &Path) -> ProcessOutcome {
    let ledger = open_ledger(&home.join("state"));
    let run = match ledger.runs().unwrap().first() {
        Some(run) => ledger.take(&run.id).unwrap().expect("the process before is dead"),
        None => {
            let max_duration_s = fake.simulation.lock().unwrap().max_duration_s;
            let (budget, agreed) = {
                let simulation = fake.simulation.lock().unwrap();
                (simulation.budget, simulation.agreed)
            };
            let quote = agreed.map(up_to).unwrap_or_default();
            ledger.plan(&RunSpec { max_duration_s, budget, quote, ..spec(&home.join("results")) }).unwrap()
        }
    };
    let on = |_| {};
    let clouds = fake.clouds();
    let driver = Driver::new(run, fake.ports(&clouds), fake.stop.subscribe(), &on);
    tokio::select! {
        biased;
        () = fake.crashed.notified() => ProcessOutcome::Killed,
        driven = driver.drive() => match driven {
            Ok(record) if record.state.is_at_rest() => ProcessOutcome::Finished(Box::new(record)),
            Ok(_) => ProcessOutcome::LetGo,
            Err(stuck) => ProcessOutcome::Stuck(stuck),
        },
    }
}

/// Invariants of every finished run.
fn closed_and_clean(fake: &Fake, record: &RunRecord, what: &str) {
    let simulation = fake.simulation.lock().unwrap();
    assert!(record.state.is_closed(), "{what}: {:?}", record.state);
    assert_eq!(simulation.ours().count(), 0, "{what}: an instance is left");
    assert!(simulation.most_alive <= 1, "{what}: {} instances at once", simulation.most_alive);
    if let Some(agreed) = record.spec.quote.ceiling {
        assert!(simulation.kept <= agreed, "{what}: {} were paid, {agreed} were agreed", simulation.kept);
    }
    if let Some(results) = record.state.results() {
        let folder = Path::new(&results.folder);
        assert!(folder.join(RUN_FILE).exists(), "{what}");
        // Damaged results are kept, and not marked complete.
        let kept_aside = simulation.damage || simulation.other_layers.is_some();
        assert!(folder.join(files::RESULTS).exists() == results.complete || kept_aside, "{what}");
    }
    if record.state.ending() == Some(&RunOutcome::Completed) {
        assert!(record.state.results().is_some_and(|results| results.complete), "{what}");
    }
}

fn home() -> tempfile::TempDir {
    // Thousands of small ledgers with synced commits are faster in memory.
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

async fn happy() -> (Fake, Box<RunRecord>, tempfile::TempDir) {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.agreed = Some(AGREED));
    let ProcessOutcome::Finished(record) = life(&fake, home.path()).await else { panic!("nothing was armed") };
    (fake, record, home)
}

#[tokio::test(start_paused = true)]
async fn run_passes_through_all_states_and_leaves_no_instance() {
    let (fake, record, home) = happy().await;
    closed_and_clean(&fake, &record, "happy path");
    let words: Vec<_> = record.events.iter().map(|entry| entry.event.word()).collect();
    let expected = ["creating", "created", "reached", "launched", "worker ended", "fetched", "terminate", "gone"];
    assert_eq!(words, expected);
    assert_eq!(record.state.ending(), Some(&RunOutcome::Completed));
    let names: Vec<_> =
        std::fs::read_dir(home.path().join("results")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, [format!("owner--model-{}", record.id).as_str()], "nothing half-arrived is left");
    assert!(!home.path().join("state/runs").join(&record.id).join("key").exists());
}

#[tokio::test(start_paused = true)]
async fn queued_job_outlasts_the_boot_timeout() {
    let (fake, home) = (Fake::new(), home());
    // Many times the timeout of a boot.
    fake.set(|simulation| simulation.queued = 5000);
    let ProcessOutcome::Finished(record) = life(&fake, home.path()).await else { panic!("nothing was armed") };
    closed_and_clean(&fake, &record, "a queue");
    assert_eq!(record.state.ending(), Some(&RunOutcome::Completed));
    assert_eq!(fake.simulation.lock().unwrap().creates, 1, "what waits is not exchanged");
}

#[tokio::test(start_paused = true)]
async fn queue_is_reported_only_when_something_changes() {
    set_clock(now_ms());
    let (mut fake, home, told) = (Fake::new(), home(), std::sync::Mutex::new(Vec::new()));
    fake.timeouts = Timeouts::CLOUD;
    // Ten minutes of listings.
    fake.set(|simulation| {
        simulation.queued = 60;
        simulation.offers.iter_mut().for_each(|offer| offer.queued = true);
    });
    let run = open_ledger(&home.path().join("state")).plan(&spec(&home.path().join("results"))).unwrap();
    let on = |event| match event {
        DeployEvent::Waiting { what, .. } if what.contains("to come up and answer") => told.lock().unwrap().push(what),
        DeployEvent::Note(note) => told.lock().unwrap().push(note),
        _ => {}
    };
    let clouds = fake.clouds();
    Driver::new(run, fake.ports(&clouds), fake.stop.subscribe(), &on).drive().await.unwrap();
    let told = told.into_inner().unwrap();
    assert_eq!(told.iter().filter(|words| words.contains("Priority")).count(), 1, "{told:?}");
    assert!(told.len() <= 2, "ten minutes of waiting repeat nothing: {told:?}");
}

#[tokio::test(start_paused = true)]
async fn worker_ended_at_the_time_limit_is_not_restarted() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| (simulation.deaths, simulation.limited) = (1, true));
    let ProcessOutcome::Finished(record) = life(&fake, home.path()).await else { panic!("nothing was armed") };
    closed_and_clean(&fake, &record, "a time limit");
    assert_eq!(record.state.ending(), Some(&RunOutcome::Deadline));
    assert!(record.state.results().is_some_and(|results| !results.complete), "what there was came home");
    assert_eq!(fake.simulation.lock().unwrap().creates, 1, "nothing was rented anew");
}

#[tokio::test(start_paused = true)]
async fn requeued_job_stops_when_what_was_agreed_is_used_up() {
    let (fake, home) = (Fake::new(), home());
    let began = now_ms() / 1000;
    fake.set(|simulation| {
        (simulation.endless, simulation.agreed) = (true, Some(AGREED));
        simulation.offers.iter_mut().for_each(|offer| offer.queued = true);
        // Its first start took 50 of 60 minutes, and it has got 60 again.
        simulation.run_time = Some(RunTime { ended_s: 3000, since: Some(began), until: Some(began + 3600) });
    });
    let begun = Instant::now();
    let ProcessOutcome::Finished(record) = life(&fake, home.path()).await else { panic!("nothing was armed") };
    closed_and_clean(&fake, &record, "a second start");
    assert_eq!(record.state.ending(), Some(&RunOutcome::Deadline));
    let took = begun.elapsed().as_secs();
    assert!(took > 500 && took <= 600, "{took} s of the ten minutes that were left");
    assert!(record.events.iter().any(|entry| entry.event.word() == "metered"), "{:?}", record.events);
}

/// What the other runs of a survey have reserved is not for one that was put back.
#[tokio::test(start_paused = true)]
async fn requeued_job_of_a_survey_takes_no_more_than_its_share() {
    let (money, gpus) = (Some(Usd::from_dollars(99.0)), Some(GpuTime::from_seconds(360_000)));
    for (budget, max_gpu_time, most) in [(money, None, 600), (None, gpus, 600), (None, None, 3600)] {
        set_clock(now_ms());
        let (fake, home) = (Fake::new(), home());
        let began = now_ms() / 1000;
        fake.set(|simulation| {
            simulation.endless = true;
            simulation.offers.iter_mut().for_each(|offer| offer.queued = true);
            // Its first start took 50 of 60 minutes, and it has got 60 again.
            simulation.run_time = Some(RunTime { ended_s: 3000, since: Some(began), until: Some(began + 3600) });
        });
        let begun = Instant::now();
        let share = |spec: &mut RunSpec| {
            let survey = Some(Membership { survey: "s".into(), model: "a".into() });
            (spec.survey, spec.budget, spec.max_gpu_time) = (survey, budget, max_gpu_time);
        };
        let record = with(share, &fake, home.path()).await;
        closed_and_clean(&fake, &record, "a second start");
        assert_eq!(record.state.ending(), Some(&RunOutcome::Deadline));
        let took = begun.elapsed().as_secs();
        assert!(took > most - most / 5 && took <= most, "{took} s of {most}: {budget:?} {max_gpu_time:?}");
    }
}

/// Every fault of `first` at every effect; then, if `second` is given, that one at every effect
/// after it.
async fn sweep(first: Fault, second: Option<Fault>, check: impl Fn(&Fake, &[ProcessOutcome], &str)) -> usize {
    sweep_with(first, second, |_| {}, check).await
}

/// As [`sweep`], with a changed simulation.
async fn sweep_with(
    first: Fault,
    second: Option<Fault>,
    change: impl Fn(&mut fake::Simulation),
    check: impl Fn(&Fake, &[ProcessOutcome], &str),
) -> usize {
    let mut runs = 0;
    for at in 1.. {
        let mut later = at;
        loop {
            later += 1;
            let (fake, home) = (Fake::new(), home());
            fake.set(|simulation| (simulation.armed, simulation.agreed) = (vec![(at, first)], Some(AGREED)));
            fake.set(&change);
            if let Some(second) = second {
                fake.set(|simulation| simulation.armed.push((later, second)));
            }
            let mut lives = vec![life(&fake, home.path()).await];
            let fired = || fake.simulation.lock().unwrap().fired;
            if fired() == 0 {
                return runs;
            }
            while !matches!(lives.last(), Some(ProcessOutcome::Finished(_))) {
                assert!(lives.len() < 6, "no end: {lives:?}");
                if matches!(lives.last(), Some(ProcessOutcome::LetGo)) {
                    // The next process has another terminal.
                    fake.stop.send_replace(Stop::Go);
                }
                lives.push(life(&fake, home.path()).await);
            }
            let names = fake.simulation.lock().unwrap().effects.clone();
            let what = format!("{first:?} at {at} ({}), {second:?} at {later}", names[at - 1]);
            runs += 1;
            check(&fake, &lives, &what);
            if second.is_none() || fired() < 2 {
                break;
            }
        }
    }
    unreachable!("the happy path has an end")
}

fn last(lives: &[ProcessOutcome]) -> &RunRecord {
    match lives.last() {
        Some(ProcessOutcome::Finished(record)) => record,
        other => panic!("{other:?}"),
    }
}

/// kill -9 before and after every effect: the next process completes the run.
#[tokio::test(start_paused = true)]
async fn run_completes_after_a_kill_at_any_effect() {
    for fault in [Fault::CrashBefore, Fault::CrashAfter] {
        let runs = sweep(fault, None, |fake, lives, what| {
            assert_eq!(lives.len(), 2, "{what}");
            closed_and_clean(fake, last(lives), what);
            assert_eq!(last(lives).state.ending(), Some(&RunOutcome::Completed), "{what}");
            let made = last(lives).events.iter().filter(|entry| entry.event.word() == "created").count();
            assert_eq!(made, 1, "{what}: work is never done twice on two instances");
        });
        let runs = runs.await;
        assert!(runs >= 15, "{runs} points only");
    }
}

/// A second kill during the recovery.
#[tokio::test(start_paused = true)]
async fn run_completes_after_two_kills() {
    for first in [Fault::CrashBefore, Fault::CrashAfter] {
        for second in [Fault::CrashBefore, Fault::CrashAfter] {
            let runs = sweep(first, Some(second), |fake, lives, what| {
                closed_and_clean(fake, last(lives), what);
                assert_eq!(last(lives).state.ending(), Some(&RunOutcome::Completed), "{what}");
            });
            assert!(runs.await >= 100);
        }
    }
}

/// One failure, or one lost answer, is handled within the same process.
#[tokio::test(start_paused = true)]
async fn single_failure_at_any_effect_is_survived() {
    for fault in [Fault::Fails, Fault::AnswerLost] {
        sweep(fault, None, |fake, lives, what| {
            assert_eq!(lives.len(), 1, "{what}");
            closed_and_clean(fake, last(lives), what);
            assert_eq!(last(lives).state.ending(), Some(&RunOutcome::Completed), "{what}");
            assert!(fake.simulation.lock().unwrap().creates <= 2, "{what}");
        })
        .await;
    }
}

/// A list with an unreadable entry shows neither that the instance exists nor that it is gone.
#[tokio::test(start_paused = true)]
async fn unreadable_list_entry_never_means_a_gone_instance() {
    for second in [None, Some(Fault::CrashAfter), Some(Fault::AnswerLost)] {
        sweep(Fault::Odd, second, |fake, lives, what| {
            closed_and_clean(fake, last(lives), what);
            assert_eq!(last(lives).state.ending(), Some(&RunOutcome::Completed), "{what}");
            let made = last(lives).events.iter().filter(|entry| entry.event.word() == "created").count();
            assert_eq!(made, 1, "{what}");
        })
        .await;
    }
}

/// A failure, then a crash, at every pair of points.
#[tokio::test(start_paused = true)]
async fn lost_answer_followed_by_a_crash_is_survived() {
    sweep(Fault::AnswerLost, Some(Fault::CrashAfter), |fake, lives, what| {
        closed_and_clean(fake, last(lives), what);
        assert_eq!(last(lives).state.ending(), Some(&RunOutcome::Completed), "{what}");
    })
    .await;
}

/// If everything fails, the program reports that an instance may remain, and a later process ends
/// it.
#[tokio::test(start_paused = true)]
async fn outage_is_reported_and_resolved_later() {
    for at in 1.. {
        let (fake, home) = (Fake::new(), home());
        fake.set(|simulation| {
            simulation.armed = vec![(at, Fault::Outage)];
            simulation.max_duration_s = 2;
        });
        let first = life(&fake, home.path()).await;
        if fake.simulation.lock().unwrap().fired == 0 {
            return;
        }
        let what = format!("outage at {at}");
        if let ProcessOutcome::Finished(record) = &first {
            closed_and_clean(&fake, record, &what);
        }
        fake.set(|simulation| {
            simulation.armed.clear();
            simulation.outage = false;
        });
        let second = life(&fake, home.path()).await;
        let ProcessOutcome::Finished(record) = second else { panic!("{what}: {second:?}") };
        closed_and_clean(&fake, &record, &what);
    }
}

/// Before its guard runs, only the controller ends an instance.
#[tokio::test(start_paused = true)]
async fn new_instance_is_ended_if_no_list_can_be_read() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.mute = true);
    let run = open_ledger(&home.path().join("state")).plan(&spec(&home.path().join("results"))).unwrap();
    let driven = Driver::new(run, fake.ports(&fake.clouds()), fake.stop.subscribe(), &|_| {}).drive().await;
    assert!(matches!(driven, Err(DriveError::Instance { .. })), "{driven:?}");
    let simulation = fake.simulation.lock().unwrap();
    assert_eq!((simulation.creates, simulation.ours().count()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn ctrl_c_at_any_effect_terminates_the_instance() {
    for fault in [Fault::Stop, Fault::StopTwice] {
        sweep(fault, None, |fake, lives, what| {
            assert_eq!(lives.len(), 1, "{what}");
            let record = last(lives);
            closed_and_clean(fake, record, what);
            let ending = record.state.ending();
            assert!(matches!(ending, Some(RunOutcome::Interrupted | RunOutcome::Completed)), "{what}: {ending:?}");
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn ctrl_c_followed_by_a_crash_terminates_the_instance() {
    sweep(Fault::Stop, Some(Fault::CrashAfter), |fake, lives, what| {
        closed_and_clean(fake, last(lives), what);
    })
    .await;
}

/// After SIGHUP a run whose instance ends by itself is left while its worker runs, and can be
/// resumed. Any other run ends, as after SIGTERM.
#[tokio::test(start_paused = true)]
async fn hangup_leaves_resumable_runs_and_ends_others() {
    for ends_itself in [true, false] {
        let let_go = std::cell::Cell::new(0);
        let change = |simulation: &mut fake::Simulation| simulation.self_destruct = ends_itself;
        let check = |fake: &Fake, lives: &[ProcessOutcome], what: &str| {
            closed_and_clean(fake, last(lives), what);
            assert_eq!(lives.len() == 2, ends_itself && what.contains("(follow)"), "{what}: {lives:?}");
            let ending = last(lives).state.ending();
            if lives.len() == 2 {
                let_go.set(let_go.get() + 1);
                assert_eq!(
                    (ending, fake.simulation.lock().unwrap().creates),
                    (Some(&RunOutcome::Completed), 1),
                    "{what}"
                );
            }
            assert!(matches!(ending, Some(RunOutcome::Interrupted | RunOutcome::Completed)), "{what}: {ending:?}");
        };
        sweep_with(Fault::Hangup, None, change, check).await;
        assert_eq!(let_go.get() > 0, ends_itself);
    }
}

#[tokio::test(start_paused = true)]
async fn detached_run_is_left_once_its_worker_runs_and_is_resumed_later() {
    let (fake, home) = (Fake::new(), home());
    let ledger = open_ledger(&home.path().join("state"));
    let run = ledger.plan(&RunSpec { detach: true, ..spec(&home.path().join("results")) }).unwrap();
    let (clouds, on) = (fake.clouds(), |_| {});
    let driver = Driver::new(run, fake.ports(&clouds), fake.stop.subscribe(), &on).detaching(true);
    let record = driver.drive().await.unwrap();
    assert!(record.is_detached() && record.state.word() == "launched", "{:?}", record.state);
    assert!(!ledger.is_driven(&record.id).unwrap());
    let effects = fake.simulation.lock().unwrap().effects.clone();
    assert!(effects.last() == Some(&"status") && !effects.contains(&"follow"), "{effects:?}");
    recover(&ledger, fake.ports(&clouds), &on).await.unwrap();
    assert_eq!(fake.simulation.lock().unwrap().ours().count(), 1, "it has time left");
    let ProcessOutcome::Finished(record) = life(&fake, home.path()).await else { panic!("nothing was armed") };
    closed_and_clean(&fake, &record, "detached");
    assert_eq!(record.state.ending(), Some(&RunOutcome::Completed));
    assert!(!record.is_detached() && fake.simulation.lock().unwrap().creates == 1);
}

#[tokio::test(start_paused = true)]
async fn vanished_instance_is_replaced_and_the_run_completes() {
    sweep(Fault::Preempted, None, |fake, lives, what| {
        closed_and_clean(fake, last(lives), what);
        assert_eq!(last(lives).state.ending(), Some(&RunOutcome::Completed), "{what}");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn repeatedly_vanishing_instances_end_the_run_with_a_loss() {
    let (fake, home) = (Fake::new(), home());
    let (plain, ..) = happy().await;
    let follow = plain.simulation.lock().unwrap().effects.iter().position(|name| *name == "follow").unwrap() + 1;
    fake.set(|simulation| simulation.armed = (follow..200).map(|at| (at, Fault::Preempted)).collect());
    let ProcessOutcome::Finished(record) = life(&fake, home.path()).await else { panic!("stuck") };
    closed_and_clean(&fake, &record, "preempted");
    let RunState::Closed { ending: RunOutcome::InstanceLost, loss: Some(loss), .. } = &record.state else {
        panic!("{:?}", record.state)
    };
    assert!(loss.contains("before its files were saved"), "{loss}");
    assert_eq!(fake.simulation.lock().unwrap().creates, 3);
}

#[tokio::test(start_paused = true)]
async fn dead_worker_is_restarted_a_bounded_number_of_times() {
    for (deaths, completed) in [(1, true), (2, true), (3, false)] {
        let (fake, home) = (Fake::new(), home());
        fake.set(|simulation| simulation.deaths = deaths);
        let ProcessOutcome::Finished(record) = life(&fake, home.path()).await else { panic!("stuck") };
        closed_and_clean(&fake, &record, "died");
        assert_eq!(record.state.ending() == Some(&RunOutcome::Completed), completed, "{deaths}");
        assert!(completed || record.state.ending() == Some(&RunOutcome::WorkerVanished { exit: Some(137) }));
        assert_eq!(fake.simulation.lock().unwrap().creates, 1);
    }
}

/// A worker that dies when little of the hour is left: five minutes of it are for the files.
#[tokio::test(start_paused = true)]
async fn dead_worker_without_time_for_work_is_not_restarted() {
    for (after, restarted) in [(3200, true), (3270, false)] {
        set_clock(now_ms());
        let (fake, home) = (Fake::new(), home());
        let (plain, ..) = happy().await;
        let follow = plain.simulation.lock().unwrap().effects.iter().position(|name| *name == "follow").unwrap() + 1;
        fake.set(|simulation| (simulation.deaths, simulation.armed) = (1, vec![(follow, Fault::CrashBefore)]));
        assert!(matches!(life(&fake, home.path()).await, ProcessOutcome::Killed), "it dies before it looks");
        tokio::time::sleep(Duration::from_secs(after)).await;
        let ProcessOutcome::Finished(record) = life(&fake, home.path()).await else { panic!("stuck") };
        closed_and_clean(&fake, &record, "late");
        let again = record.events.iter().any(|entry| entry.event == RunEvent::Restarted);
        let complete = record.state.results().map(|results| results.complete);
        assert_eq!((again, complete), (restarted, Some(restarted)), "after {after} s: {:?}", record.events);
        assert!(restarted || record.state.ending() == Some(&RunOutcome::WorkerVanished { exit: Some(137) }));
    }
}

#[tokio::test(start_paused = true)]
async fn run_completes_after_a_kill_during_a_worker_restart() {
    let dies = |simulation: &mut fake::Simulation| simulation.deaths = 1;
    for fault in [Fault::CrashBefore, Fault::CrashAfter] {
        let runs = sweep_with(fault, None, dies, |fake, lives, what| {
            closed_and_clean(fake, last(lives), what);
            assert_eq!(last(lives).state.ending(), Some(&RunOutcome::Completed), "{what}");
        });
        assert!(runs.await > 18);
    }
}

#[tokio::test(start_paused = true)]
async fn ctrl_c_saves_partial_results_and_a_second_one_skips_them() {
    for (fault, salvaged) in [(Fault::Stop, true), (Fault::StopTwice, false)] {
        let (fake, home) = (Fake::new(), home());
        let (plain, ..) = happy().await;
        let follow = plain.simulation.lock().unwrap().effects.iter().position(|name| *name == "follow").unwrap() + 1;
        fake.set(|simulation| {
            simulation.endless = true;
            simulation.armed = vec![(follow, fault)];
        });
        let ProcessOutcome::Finished(record) = life(&fake, home.path()).await else { panic!("stuck") };
        closed_and_clean(&fake, &record, "ctrl-c");
        assert_eq!(record.state.ending(), Some(&RunOutcome::Interrupted));
        assert_eq!(record.state.results().is_some(), salvaged);
        if let Some(results) = record.state.results() {
            assert!(!results.complete && results.folder.ends_with(".partial"));
            assert!(Path::new(&results.folder).join(files::LOG).exists());
        }
    }
}

/// Drives a run with a changed plan to its end.
async fn with(change: impl FnOnce(&mut crate::run::RunSpec), fake: &Fake, home: &Path) -> RunRecord {
    let ledger = open_ledger(&home.join("state"));
    let mut request = spec(&home.join("results"));
    change(&mut request);
    fake.set(|simulation| simulation.agreed = request.quote.ceiling);
    let run = ledger.plan(&request).unwrap();
    Driver::new(run, fake.ports(&fake.clouds()), fake.stop.subscribe(), &|_| {}).drive().await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn time_limit_ends_an_endless_run() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.endless = true);
    let record = with(|spec| spec.max_duration_s = 3, &fake, home.path()).await;
    closed_and_clean(&fake, &record, "deadline");
    assert_eq!(record.state.ending(), Some(&RunOutcome::Deadline));
    assert!(record.state.results().is_some_and(|results| !results.complete));
}

#[tokio::test(start_paused = true)]
async fn cancel_from_another_process_ends_the_run() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.endless = true);
    let state = home.path().join("state");
    let cancel = async {
        loop {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let ledger = open_ledger(&state);
            if let Some(run) = ledger.runs().unwrap().first()
                && run.state.word() == "launched"
            {
                ledger.ask_to_cancel(&run.id).unwrap();
                std::future::pending::<()>().await;
            }
        }
    };
    let record = tokio::select! {
        record = with(|_| {}, &fake, home.path()) => record,
        () = cancel => unreachable!("it never ends"),
    };
    closed_and_clean(&fake, &record, "cancelled");
    assert_eq!(record.state.ending(), Some(&RunOutcome::Cancelled));
}

#[tokio::test(start_paused = true)]
async fn held_instance_stays_and_is_not_reported_as_left_over() {
    let (fake, home) = (Fake::new(), home());
    let record = with(|spec| spec.keep_running = true, &fake, home.path()).await;
    assert_eq!(record.state.word(), "held");
    assert_eq!(fake.simulation.lock().unwrap().machines.len(), 1);
    let ledger = open_ledger(&home.path().join("state"));
    let mut run = ledger.take(&record.id).unwrap().unwrap();
    run.append(RunEvent::Terminate).unwrap();
    drop(run);
    let ProcessOutcome::Finished(record) = life(&fake, home.path()).await else { panic!("stuck") };
    closed_and_clean(&fake, &record, "released");
    assert_eq!(record.state.ending(), Some(&RunOutcome::Completed));
}

#[tokio::test(start_paused = true)]
async fn next_offer_is_tried_and_the_final_error_lists_all_refusals() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.sold_out = vec!["a".into()]);
    let record = with(|_| {}, &fake, home.path()).await;
    assert_eq!(record.state.ending(), Some(&RunOutcome::Completed));
    let RunEvent::Creating { intent } = &record.events[2].event else { panic!("{:?}", record.events) };
    assert_eq!(intent.offer.key, "b");

    let (fake, home) = (Fake::new(), self::home());
    fake.set(|simulation| simulation.sold_out = vec!["a".into(), "b".into()]);
    let record = with(|_| {}, &fake, home.path()).await;
    let Some(RunOutcome::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
    assert_eq!(trouble.kind, RunFailureKind::NoOffer);
    assert!(trouble.message.contains("2 of 2 offers") && trouble.message.contains("gone"), "{}", trouble.message);
}

#[tokio::test(start_paused = true)]
async fn account_refusal_is_not_retried_with_other_offers() {
    for kind in [BrokerErrorKind::Auth, BrokerErrorKind::Budget] {
        let (fake, home) = (Fake::new(), home());
        fake.set(|simulation| simulation.create_error = Some(kind));
        let record = with(|_| {}, &fake, home.path()).await;
        closed_and_clean(&fake, &record, "refused");
        assert_eq!(fake.simulation.lock().unwrap().creates, 1);
        let Some(RunOutcome::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
        assert!(trouble.hint.is_some() && trouble.kind == RunFailureKind::Broker);
    }
}

#[tokio::test(start_paused = true)]
async fn unanswered_create_call_gives_up() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.create_error = Some(BrokerErrorKind::Maybe));
    let record = with(|_| {}, &fake, home.path()).await;
    closed_and_clean(&fake, &record, "maybe for ever");
    assert!(fake.simulation.lock().unwrap().creates <= 8);
}

#[tokio::test(start_paused = true)]
async fn no_offer_rents_nothing() {
    let (fake, home) = (Fake::new(), home());
    let record = with(|spec| spec.request.gpu_filter = Some("A100".into()), &fake, home.path()).await;
    assert_eq!(fake.simulation.lock().unwrap().creates, 0);
    let Some(RunOutcome::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
    assert_eq!(trouble.kind, RunFailureKind::NoOffer);
    assert!(trouble.message.contains("--gpu-filter"));
}

/// Filters apply to every selection of offers, not only before the consent.
#[tokio::test(start_paused = true)]
async fn offer_that_exceeds_the_time_limit_is_not_rented() {
    let (fake, home) = (Fake::new(), home());
    // The start alone is estimated to take five minutes.
    let record = with(|spec| (spec.only_in_time, spec.max_duration_s) = (true, 240), &fake, home.path()).await;
    closed_and_clean(&fake, &record, "late");
    assert_eq!(fake.simulation.lock().unwrap().creates, 0);
    let Some(RunOutcome::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
    assert!(trouble.message.contains("longer than its time limit of 4 min 00 s"), "{}", trouble.message);
    assert!(trouble.hint.as_ref().is_some_and(|hint| hint.contains("--allow-cut-short")), "{trouble:?}");
}

#[tokio::test(start_paused = true)]
async fn instance_billing_above_the_limit_is_terminated() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.price_on_arrival = Some(UsdPerHour::from_dollars(9.0)));
    let cap = UsdPerHour::from_dollars(1.5);
    let record = with(|spec| spec.request.max_price = Some(cap), &fake, home.path()).await;
    closed_and_clean(&fake, &record, "price");
    let Some(RunOutcome::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
    assert!(trouble.message.contains("$9.00/h"), "{}", trouble.message);
}

#[tokio::test(start_paused = true)]
async fn without_a_price_cap_the_quote_bounds_the_price() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.price_on_arrival = Some(UsdPerHour::from_dollars(1.9)));
    let record = with(|_| {}, &fake, home.path()).await;
    closed_and_clean(&fake, &record, "price");
    // $1.90 is far above the $1.00 of the first offer, and below the $2.00 of the second.
    assert_eq!(record.state.ending(), Some(&RunOutcome::Completed));
    let words: Vec<_> = record.events.iter().map(|entry| entry.event.word()).collect();
    let expected = ["creating", "created", "discarded", "gone", "creating", "created", "reached", "launched"];
    assert_eq!(words[..8], expected);
}

#[tokio::test(start_paused = true)]
async fn agreed_amount_bounds_every_offer_tried() {
    set_clock(now_ms());
    for (dearer, rented) in [(2.0, true), (9.0, false)] {
        let (fake, home) = (Fake::new(), home());
        fake.set(|simulation| {
            simulation.offers[1].price = UsdPerHour::from_dollars(dearer);
            simulation.sold_out = vec!["a".into()];
            simulation.endless = true;
        });
        let record = with(|spec| spec.quote = up_to(AGREED), &fake, home.path()).await;
        closed_and_clean(&fake, &record, "dearer");
        let cost = record.cost(now_ms());
        if rented {
            assert_eq!(record.state.ending(), Some(&RunOutcome::Deadline), "half the time for twice the price");
            assert!(cost <= AGREED && cost > Usd::from_dollars(0.8), "{cost}");
        } else {
            let Some(RunOutcome::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
            assert!(trouble.hint.as_ref().is_some_and(|hint| hint.contains("--budget")), "{trouble:?}");
            assert_eq!(cost, Usd::ZERO);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn instance_billing_above_its_offer_needs_cover_by_the_quote() {
    for (agreed, creates) in [(1.0, 2), (1.06, 1)] {
        let (fake, home) = (Fake::new(), home());
        fake.set(|simulation| simulation.price_on_arrival = Some(UsdPerHour::from_dollars(1.05)));
        let agreed = Usd::from_dollars(agreed);
        let record = with(|spec| spec.quote = up_to(agreed), &fake, home.path()).await;
        closed_and_clean(&fake, &record, "bill");
        assert_eq!(record.state.ending(), Some(&RunOutcome::Completed));
        assert_eq!(fake.simulation.lock().unwrap().creates, creates, "{agreed}");
    }
}

#[tokio::test(start_paused = true)]
async fn price_risen_before_create_is_not_paid() {
    set_clock(now_ms());
    let create = happy().await.0.simulation.lock().unwrap().effects.iter().position(|name| *name == "create").unwrap();
    for at in [create, create + 1] {
        let (fake, home) = (Fake::new(), home());
        fake.set(|simulation| {
            simulation.endless = true;
            simulation.armed = vec![(at, Fault::PriceRises)];
        });
        let record = with(|spec| spec.quote = up_to(AGREED), &fake, home.path()).await;
        closed_and_clean(&fake, &record, "it rose");
        assert!(record.cost(now_ms()) <= AGREED, "{}", record.cost(now_ms()));
    }
}

#[tokio::test(start_paused = true)]
async fn budget_equal_to_the_quote_suffices() {
    let (fake, home) = (Fake::new(), home());
    let record = with(|spec| (spec.budget, spec.quote) = (Some(AGREED), up_to(AGREED)), &fake, home.path()).await;
    assert_eq!(record.state.ending(), Some(&RunOutcome::Completed));
}

/// Events of an endless run if something happens after half an hour.
async fn told_while_it_runs(spec: RunSpec, after: impl FnOnce(&mut fake::Simulation)) -> (RunRecord, Vec<String>) {
    set_clock(now_ms());
    let (fake, told) = (Fake::new(), std::sync::Mutex::new(Vec::new()));
    fake.set(|simulation| simulation.endless = true);
    let state = tempfile::tempdir().unwrap();
    let run = open_ledger(state.path()).plan(&spec).unwrap();
    let on = |event| {
        if let DeployEvent::Note(note) = event {
            told.lock().unwrap().push(note);
        }
    };
    let clouds = fake.clouds();
    let driven = Driver::new(run, fake.ports(&clouds), fake.stop.subscribe(), &on).drive();
    let change = async {
        tokio::time::sleep(Duration::from_secs(1800)).await;
        fake.set(after);
    };
    let (record, ()) = tokio::join!(driven, change);
    let told = told.lock().unwrap().clone();
    (record.unwrap(), told)
}

#[tokio::test(start_paused = true)]
async fn requested_price_increase_is_reported_once_and_refused() {
    let home = home();
    let rise = |simulation: &mut fake::Simulation| simulation.rise = Some("$2.00/h".into());
    let (record, told) = told_while_it_runs(RunSpec { quote: up_to(AGREED), ..spec(home.path()) }, rise).await;
    assert_eq!(record.state.ending(), Some(&RunOutcome::Deadline), "it goes on at the old price");
    assert_eq!(told, ["The host of i1 asks for $2.00/h; it is not agreed to"]);
}

#[tokio::test(start_paused = true)]
async fn price_risen_during_the_run_ends_it_with_partial_results() {
    let home = home();
    let bill = |simulation: &mut fake::Simulation| simulation.bill(UsdPerHour::from_dollars(1.2));
    let (record, _) = told_while_it_runs(RunSpec { quote: up_to(AGREED), ..spec(home.path()) }, bill).await;
    let Some(RunOutcome::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
    assert!(trouble.kind == RunFailureKind::Budget && trouble.message.contains("$1.20/h"), "{trouble:?}");
    assert!(record.state.results().is_some() && record.state.is_closed());
}

#[tokio::test(start_paused = true)]
async fn covered_price_rise_is_recorded_and_counted() {
    let home = home();
    let bill = |simulation: &mut fake::Simulation| simulation.bill(UsdPerHour::from_dollars(1.2));
    let quote = up_to(Usd::from_dollars(1.3));
    let (record, _) = told_while_it_runs(RunSpec { quote, ..spec(home.path()) }, bill).await;
    assert_eq!(record.state.ending(), Some(&RunOutcome::Deadline), "it goes on");
    let told = record.events.iter().filter(|entry| entry.event.word() == "repriced").count();
    let cost = record.cost(now_ms());
    assert!(told == 1 && cost > Usd::from_dollars(1.0) && cost <= Usd::from_dollars(1.2), "{told} {cost}");
}

#[tokio::test(start_paused = true)]
async fn wrong_hardware_is_exchanged_and_its_host_avoided() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.unfit = vec!["a".into()]);
    let record = with(|_| {}, &fake, home.path()).await;
    closed_and_clean(&fake, &record, "unfit");
    assert_eq!(record.state.ending(), Some(&RunOutcome::Completed));
    assert_eq!(fake.simulation.lock().unwrap().creates, 2);
    let (bad, good) = (fake::offer("a", 1.0), fake::offer("b", 2.0));
    assert!(fake.bad_hosts.has(&bad) && !fake.bad_hosts.has(&good));
    // The next run of the batch does not use that machine.
    let again = with(|_| {}, &fake, &home.path().join("next")).await;
    assert_eq!((again.state.ending(), fake.simulation.lock().unwrap().creates), (Some(&RunOutcome::Completed), 3));
}

#[tokio::test(start_paused = true)]
async fn several_unfit_hosts_in_a_row_end_the_run() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| {
        simulation.offers = (0..9).map(|i| fake::offer(&format!("o{i}"), 1.0)).collect();
        simulation.unfit = simulation.offers.iter().map(|offer| offer.key.clone()).collect();
    });
    let record = with(|_| {}, &fake, home.path()).await;
    closed_and_clean(&fake, &record, "all unfit");
    assert_eq!(fake.simulation.lock().unwrap().creates, 3);
    let Some(RunOutcome::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
    assert!(
        trouble.message.starts_with("3 of 9 offers were tried") && trouble.message.contains("0 GPUs"),
        "{trouble:?}"
    );
}

/// A host that accepts the login and then ends no command, or fails repeatedly, costs one timeout.
#[tokio::test(start_paused = true)]
async fn slow_host_is_exchanged_after_its_timeout() {
    for each in [Duration::MAX, Duration::from_secs(90), Duration::from_secs(1)] {
        set_clock(now_ms());
        let (mut fake, home, begun) = (Fake::new(), home(), Instant::now());
        fake.timeouts = Timeouts::CLOUD;
        fake.set(|simulation| simulation.drags = vec![("a".into(), each)]);
        let record = with(|_| {}, &fake, home.path()).await;
        closed_and_clean(&fake, &record, "drags");
        assert_eq!(record.state.ending(), Some(&RunOutcome::Completed), "{each:?}");
        let rented: Vec<u64> = record.events.iter().filter(|e| e.event.word() == "created").map(|e| e.at_ms).collect();
        let kept = rented[1] - rented[0];
        // Ending one instance and renting another take some listings.
        let most = (Timeouts::CLOUD.ready + Duration::from_secs(120)).as_millis() as u64;
        assert!((Timeouts::CLOUD.ready.as_millis() as u64..most).contains(&kept), "{kept} ms for {each:?}");
        let reason = record.events.iter().find_map(|entry| match &entry.event {
            RunEvent::Discarded { reason, .. } => Some(reason.clone()),
            _ => None,
        });
        assert!(reason.is_some_and(|reason| reason.contains("5 min 00 s after the login (looking at it)")));
        assert!(begun.elapsed() < 2 * Timeouts::CLOUD.ready, "the second host answers at once");
    }
}

#[tokio::test(start_paused = true)]
async fn noexec_hosts_are_exchanged_and_the_last_reason_is_reported() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.barred = 1);
    let record = with(|_| {}, &fake, home.path()).await;
    closed_and_clean(&fake, &record, "barred");
    assert_eq!((record.state.ending(), fake.simulation.lock().unwrap().creates), (Some(&RunOutcome::Completed), 2));

    let (fake, home) = (Fake::new(), self::home());
    fake.set(|simulation| simulation.barred = 9);
    let record = with(|_| {}, &fake, home.path()).await;
    closed_and_clean(&fake, &record, "all barred");
    let Some(RunOutcome::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
    assert_eq!(trouble.kind, RunFailureKind::Unfit, "instances were had");
    assert!(trouble.message.contains("2 of 2 offers") && trouble.message.contains("nothing runs"), "{trouble:?}");
    assert!(trouble.message.contains("none served"), "{trouble:?}");
    assert_eq!(crate::ui::report::ExitStatus::of_run(&record.state).number(), 1);
}

#[test]
fn reason_that_offers_share_is_given_once() {
    let refused = |place: &str, reason: &str| RefusedOffer {
        offer: Offer { region: Some(place.to_owned()), ..fake::offer("a", 1.0) },
        reason: reason.to_owned(),
        rented: false,
        lost: false,
    };
    let all = [refused("here", "sold out"), refused("there", "no money"), refused("yonder", "sold out")];
    let RunOutcome::Failed { trouble } = super::steps::none_left(&all, 3, 0, false) else { panic!("it failed") };
    let words = "3 of 3 offers were tried and none could be had (CPU only on fake in here, CPU only on fake in yonder: \
                 sold out; CPU only on fake in there: no money)";
    assert_eq!(trouble.message, words);
}

#[tokio::test(start_paused = true)]
async fn instance_that_never_comes_up_was_not_had() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.never_up = true);
    let record = with(|_| {}, &fake, home.path()).await;
    closed_and_clean(&fake, &record, "never up");
    assert_eq!(fake.simulation.lock().unwrap().creates, 2);
    let Some(RunOutcome::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
    assert_eq!(trouble.kind, RunFailureKind::NoOffer);
    assert!(trouble.message.contains("2 of 2 offers were tried and none could be had"), "{trouble:?}");
    assert_eq!(crate::ui::report::ExitStatus::of_run(&record.state).number(), 3);
}

#[tokio::test(start_paused = true)]
async fn run_completes_after_a_kill_during_a_host_exchange() {
    let runs = sweep_with(
        Fault::CrashAfter,
        None,
        |simulation| simulation.unfit = vec!["a".into()],
        |fake, lives, what| {
            let record = last(lives);
            closed_and_clean(fake, record, what);
            assert_eq!(record.state.ending(), Some(&RunOutcome::Completed), "{what}");
        },
    );
    assert!(runs.await > 15);
}

#[tokio::test(start_paused = true)]
async fn worker_failure_message_is_the_run_outcome() {
    let (fake, home) = (Fake::new(), home());
    let failure = Failure { kind: FailureKind::Corpus, message: "no text".into(), hint: Some("give some".into()) };
    fake.set(|simulation| simulation.outcome = Some(Outcome::Failed(failure.clone())));
    let record = with(|_| {}, &fake, home.path()).await;
    assert_eq!(record.state.ending(), Some(&RunOutcome::WorkerFailed { failure }));
    assert!(record.state.results().is_some_and(|results| !results.complete));
    assert!(fake.simulation.lock().unwrap().machines.is_empty());
}

#[tokio::test(start_paused = true)]
async fn damaged_results_are_never_complete() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.damage = true);
    let record = with(|_| {}, &fake, home.path()).await;
    let Some(RunOutcome::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
    assert!(trouble.message.contains(files::RESULTS));
    assert!(record.state.results().is_some_and(|r| !r.complete && r.folder.ends_with(".partial")));
}

#[test]
fn equal_jobs_have_equal_keys() {
    use outliers_protocol::{CorpusSource, JobSpec, ModelSource};
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text");
    std::fs::write(&text, "one").unwrap();
    let mut job = JobSpec::new(ModelSource::Folder { path: "/m".into() });
    job.corpus.source = CorpusSource::Files(vec![text.to_string_lossy().into_owned()]);
    let key = JobIdentity::of(&job).unwrap().key("local");
    assert_eq!(key, JobIdentity::of(&job).unwrap().key("local"));
    assert_ne!(key, JobIdentity::of(&job).unwrap().key("cloud"));
    // As recorded by versions that stored the default.
    let named = JobSpec { micro_batch_tokens: Some(4096), ..job.clone() };
    assert_eq!(key, JobIdentity::of(&named).unwrap().key("local"));
    std::fs::write(&text, "two").unwrap();
    assert_ne!(key, JobIdentity::of(&job).unwrap().key("local"));
    std::fs::remove_file(&text).unwrap();
    assert!(JobIdentity::of(&job).is_err());
}

/// The worker determines formats by file names, as the local check did before anything was rented.
#[tokio::test(start_paused = true)]
async fn corpus_files_keep_their_format_extensions() {
    use outliers_protocol::CorpusSource;
    let (fake, home) = (Fake::new(), home());
    let texts = ["a.txt", "b", "C.JSONL", "d.ndjson", "e.json.gz", "f.csv", "g.tsv.zst", "h.parquet", "i.md"];
    let text = |name: &str| {
        let path = home.path().join(name);
        std::fs::write(&path, "text").unwrap();
        path.to_string_lossy().into_owned()
    };
    let corpus = CorpusSource::Files(texts.map(text).into());
    with(|spec| spec.job.corpus.source = corpus, &fake, home.path()).await;
    let endings = ["txt", "txt", "jsonl", "jsonl", "json.gz", "csv", "tsv.zst", "parquet", "txt"];
    let expected: Vec<String> = endings.iter().enumerate().map(|(i, ending)| format!("corpus-{i}.{ending}")).collect();
    assert_eq!(fake.simulation.lock().unwrap().pushed, expected);
}

/// A run for GPUs, with offers of two GPUs.
fn for_gpus(fake: &Fake, spec: &mut RunSpec) {
    fake.set(|simulation| simulation.offers.iter_mut().for_each(|offer| offer.gpu_count = 2));
    spec.request.worker_cuda = Some("11.8".parse().unwrap());
}

#[tokio::test(start_paused = true)]
async fn worker_gets_the_number_of_rented_gpus() {
    let (fake, home) = (Fake::new(), home());
    let record = with(|spec| for_gpus(&fake, spec), &fake, home.path()).await;
    closed_and_clean(&fake, &record, "for GPUs");
    assert_eq!(record.state.ending(), Some(&RunOutcome::Completed));
    let metadata = Path::new(&record.state.results().unwrap().folder).join(files::METADATA);
    let metadata: serde_json::Value = serde_json::from_slice(&std::fs::read(metadata).unwrap()).unwrap();
    assert_eq!(metadata["job"]["devices"], serde_json::json!(["cuda:0", "cuda:1"]));
}

/// The worker may have been rebuilt since the run was planned.
#[tokio::test(start_paused = true)]
async fn resumed_gpu_run_never_starts_a_cpu_worker() {
    let begun = Fake::new();
    let _ = with(|spec| for_gpus(&begun, spec), &begun, home().path()).await;
    let effects = begun.simulation.lock().unwrap().effects.clone();
    for killed_at in ["create", "push worker", "launch"] {
        let (fake, home) = (Fake::new(), home());
        let at = effects.iter().position(|effect| *effect == killed_at).unwrap() + 1;
        fake.set(|simulation| simulation.armed = vec![(at, Fault::CrashBefore)]);
        let ledger = open_ledger(&home.path().join("state"));
        let mut request = spec(&home.path().join("results"));
        for_gpus(&fake, &mut request);
        drop(ledger.plan(&request).unwrap());
        assert!(matches!(life(&fake, home.path()).await, ProcessOutcome::Killed), "{killed_at}");
        fake.set(|simulation| simulation.without_cuda = true);
        let ProcessOutcome::Finished(record) = life(&fake, home.path()).await else { panic!("{killed_at}") };
        closed_and_clean(&fake, &record, killed_at);
        let Some(RunOutcome::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
        assert!(trouble.kind == RunFailureKind::Local && trouble.message.contains("without CUDA"), "{trouble:?}");
        assert!(!record.events.iter().any(|entry| entry.event.word() == "launched"), "{killed_at}");
    }
}

/// One that is picked up after its worker was started goes on with that worker, also when it has
/// died, but no other one is started in its place on another instance.
#[tokio::test(start_paused = true)]
async fn resumed_gpu_run_keeps_the_worker_it_began_with() {
    let begun = Fake::new();
    let _ = with(|spec| for_gpus(&begun, spec), &begun, home().path()).await;
    let follow = begun.simulation.lock().unwrap().effects.iter().position(|effect| *effect == "follow").unwrap() + 1;
    for (deaths, lost) in [(0, false), (1, false), (0, true)] {
        let what = format!("{deaths} deaths, lost: {lost}");
        let (fake, home) = (Fake::new(), home());
        fake.set(|simulation| {
            simulation.deaths = deaths;
            simulation.armed = vec![(follow, Fault::CrashBefore)];
        });
        let ledger = open_ledger(&home.path().join("state"));
        let mut request = spec(&home.path().join("results"));
        for_gpus(&fake, &mut request);
        drop(ledger.plan(&request).unwrap());
        assert!(matches!(life(&fake, home.path()).await, ProcessOutcome::Killed), "{what}");
        fake.set(|simulation| {
            simulation.without_cuda = true;
            let next = simulation.effects.len() + 1;
            simulation.armed = if lost { vec![(next, Fault::Preempted)] } else { Vec::new() };
        });
        let ProcessOutcome::Finished(record) = life(&fake, home.path()).await else { panic!("{what}") };
        closed_and_clean(&fake, &record, &what);
        let launched = record.events.iter().filter(|entry| entry.event.word() == "launched").count();
        assert_eq!(launched, 1, "{what}");
        match record.state.ending() {
            Some(RunOutcome::Completed) => assert!(!lost, "{what}"),
            Some(RunOutcome::Failed { trouble }) => {
                assert!(lost && trouble.kind == RunFailureKind::Local, "{what}: {trouble:?}");
                assert!(trouble.message.contains("without CUDA"), "{what}: {trouble:?}");
            }
            ending => panic!("{what}: {ending:?}"),
        }
    }
}

/// What another process finds: what has time left stays; then strays go, and an abandoned run is
/// salvaged.
#[tokio::test]
async fn recovery_ends_only_strays_and_expired_runs() {
    use crate::cloud::broker::{Broker, Lease, LeaseTag};
    use crate::units::Bytes;

    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| {
        simulation.endless = true;
        simulation.max_duration_s = 3;
        simulation.visibility = 0;
    });
    let ledger = open_ledger(&home.path().join("state"));
    // Killed while the worker runs.
    let (plain, ..) = happy().await;
    let follow = plain.simulation.lock().unwrap().effects.iter().position(|name| *name == "follow").unwrap();
    fake.set(|simulation| simulation.armed = vec![(follow, Fault::CrashBefore)]);
    assert!(matches!(life(&fake, home.path()).await, ProcessOutcome::Killed));
    let stray = LeaseTag {
        owner: ledger.owner().into(),
        run: "unknown".into(),
        nonce: "n".into(),
        deadline: now_ms() / 1000 + 3,
    };
    let tags = [stray.to_string(), "outliers-somebody-unknown-n-1".to_owned()];
    for tag in &tags {
        let lease = Lease { tag: tag.parse().unwrap(), ssh_public_key: "ssh-fake".into(), disk: Bytes(0), stage: None };
        fake.create(&fake::offer("a", 1.0), &lease).await.unwrap();
    }
    let names =
        || -> Vec<String> { fake.simulation.lock().unwrap().machines.values().map(|m| m.name.clone()).collect() };
    assert_eq!(names().len(), 3);

    recover(&ledger, fake.ports(&fake.clouds()), &|_| {}).await.unwrap();
    assert_eq!(
        names().len(),
        3,
        "an unknown run may be another machine's with a copy of this ledger, and has time left"
    );

    tokio::time::sleep(Duration::from_secs(3)).await;
    recover(&ledger, fake.ports(&fake.clouds()), &|_| {}).await.unwrap();
    assert_eq!(names(), [tags[1].clone()]);
    let run = ledger.find("last").unwrap();
    assert_eq!(run.state.ending(), Some(&RunOutcome::Deadline));
    assert!(run.state.results().is_some_and(|results| !results.complete), "what there was came home");
}

/// A state folder copied before the latest run began.
#[tokio::test(start_paused = true)]
async fn copied_ledger_ends_no_live_instance_of_its_original() {
    let (fake, home, copy) = (Fake::new(), home(), self::home());
    drop(open_ledger(&home.path().join("state")));
    std::fs::copy(home.path().join("state/ledger.db"), copy.path().join("ledger.db")).unwrap();
    let (plain, ..) = happy().await;
    let follow = plain.simulation.lock().unwrap().effects.iter().position(|name| *name == "follow").unwrap();
    fake.set(|simulation| simulation.armed = vec![(follow, Fault::CrashBefore)]);
    assert!(matches!(life(&fake, home.path()).await, ProcessOutcome::Killed));
    let (ours, ledger) = (open_ledger(&home.path().join("state")), open_ledger(copy.path()));
    assert_eq!(ledger.owner(), ours.owner(), "it is a copy");
    let found = recover(&ledger, fake.ports(&fake.clouds()), &|_| {}).await.unwrap();
    assert_eq!(fake.simulation.lock().unwrap().ours().count(), 1, "{found:?}");
}

/// A state folder copied while the run had its first instance, which it has lost since.
#[tokio::test(start_paused = true)]
async fn copied_ledger_ends_no_later_instance_of_a_run() {
    let (fake, home, copy) = (Fake::new(), home(), self::home());
    let (plain, ..) = happy().await;
    let follow = plain.simulation.lock().unwrap().effects.iter().position(|name| *name == "follow").unwrap();
    fake.set(|simulation| simulation.armed = vec![(follow, Fault::CrashBefore)]);
    assert!(matches!(life(&fake, home.path()).await, ProcessOutcome::Killed));
    std::fs::copy(home.path().join("state/ledger.db"), copy.path().join("ledger.db")).unwrap();
    fake.set(|simulation| {
        simulation.preempt();
        simulation.endless = true;
    });
    let at_work = tokio::time::timeout(Duration::from_secs(60), life(&fake, home.path())).await;
    assert!(at_work.is_err() && fake.simulation.lock().unwrap().creates == 2, "{at_work:?}");
    let ledger = open_ledger(copy.path());
    for _ in 0..2 {
        let found = recover(&ledger, fake.ports(&fake.clouds()), &|_| {}).await.unwrap();
        assert_eq!(ledger.find("last").unwrap().state.word(), "closed", "{found:?}");
        assert_eq!(fake.simulation.lock().unwrap().ours().count(), 1, "{found:?}");
    }
}

/// The heartbeat is checked by the guard on the instance. Another process with such a ledger
/// cannot read it, since the key is in the run's folder.
#[tokio::test(start_paused = true)]
async fn missing_heartbeat_ends_the_instance_from_inside() {
    let (fake, home, copy) = (Fake::new(), home(), self::home());
    drop(open_ledger(&home.path().join("state")));
    std::fs::copy(home.path().join("state/ledger.db"), copy.path().join("ledger.db")).unwrap();
    let (plain, ..) = happy().await;
    let follow = plain.simulation.lock().unwrap().effects.iter().position(|name| *name == "follow").unwrap();
    fake.set(|simulation| (simulation.self_destruct, simulation.armed) = (true, vec![(follow, Fault::CrashBefore)]));
    assert!(matches!(life(&fake, home.path()).await, ProcessOutcome::Killed));
    let (ours, ledger) = (open_ledger(&home.path().join("state")), open_ledger(copy.path()));
    let run = ours.find("last").unwrap().id;
    assert!(ours.run_folder(&run).join("key").exists() && !ledger.run_folder(&run).exists());
    let look = async || drop(recover(&ledger, fake.ports(&fake.clouds()), &|_| {}).await.unwrap());
    look().await;
    assert_eq!(fake.simulation.lock().unwrap().ours().count(), 1, "it may beat");
    // No controller connects for the guard's timeout.
    fake.set(|simulation| simulation.pass(Duration::from_secs(7200)));
    assert_eq!(fake.simulation.lock().unwrap().ours().count(), 0);
    look().await;
    assert!(!fake.simulation.lock().unwrap().effects.contains(&"terminate"), "nobody had to end it from outside");
}

/// An instance with time left by the cloud's clock is kept, whatever this machine's clock shows.
#[tokio::test(start_paused = true)]
async fn clock_jump_ahead_ends_no_run_with_time_left() {
    let (fake, home) = (Fake::new(), home());
    let (plain, ..) = happy().await;
    let follow = plain.simulation.lock().unwrap().effects.iter().position(|name| *name == "follow").unwrap();
    set_clock(now_ms());
    fake.set(|simulation| simulation.armed = vec![(follow, Fault::CrashBefore)]);
    assert!(matches!(life(&fake, home.path()).await, ProcessOutcome::Killed));
    fake.set(fake::Simulation::jump);
    let ledger = open_ledger(&home.path().join("state"));
    recover(&ledger, fake.ports(&fake.clouds()), &|_| {}).await.unwrap();
    assert_eq!(fake.simulation.lock().unwrap().ours().count(), 1);
    let ProcessOutcome::Finished(record) = life(&fake, home.path()).await else { panic!("nothing was armed") };
    closed_and_clean(&fake, &record, "ahead");
    assert_eq!(record.state.ending(), Some(&RunOutcome::Completed));
}

#[tokio::test(start_paused = true)]
async fn recovery_marks_vanished_instances_and_never_rents() {
    let (fake, home) = (Fake::new(), home());
    let (plain, ..) = happy().await;
    let effects = plain.simulation.lock().unwrap().effects.clone();
    let ledger = open_ledger(&home.path().join("state"));
    let follow = effects.iter().position(|name| *name == "follow").unwrap();
    fake.set(|simulation| simulation.armed = vec![(follow, Fault::CrashBefore)]);
    assert!(matches!(life(&fake, home.path()).await, ProcessOutcome::Killed));
    fake.set(|simulation| simulation.machines.clear());
    recover(&ledger, fake.ports(&fake.clouds()), &|_| {}).await.unwrap();
    assert_eq!(ledger.find("last").unwrap().state.ending(), Some(&RunOutcome::InstanceLost));
    assert_eq!(fake.simulation.lock().unwrap().creates, 1);

    // A create call that never happened, in a run whose time is up: the run is closed without
    // another call.
    let (fake, home) = (Fake::new(), self::home());
    let ledger = open_ledger(&home.path().join("state"));
    let create = effects.iter().position(|name| *name == "create").unwrap() + 1;
    fake.set(|simulation| {
        simulation.armed = vec![(create, Fault::CrashBefore)];
        simulation.max_duration_s = 0;
    });
    assert!(matches!(life(&fake, home.path()).await, ProcessOutcome::Killed));
    recover(&ledger, fake.ports(&fake.clouds()), &|_| {}).await.unwrap();
    let run = ledger.find("last").unwrap();
    assert_eq!((run.state.word(), run.state.ending()), ("closed", Some(&RunOutcome::Deadline)));
    assert_eq!(fake.simulation.lock().unwrap().creates, 0);
}

/// `reap` may wait for an answer between its listing and its actions.
#[tokio::test(start_paused = true)]
async fn later_instance_of_a_run_is_not_taken_for_the_vanished_one() {
    let (fake, home) = (Fake::new(), home());
    let (plain, ..) = happy().await;
    let follow = plain.simulation.lock().unwrap().effects.iter().position(|name| *name == "follow").unwrap();
    fake.set(|simulation| simulation.armed = vec![(follow, Fault::CrashBefore)]);
    assert!(matches!(life(&fake, home.path()).await, ProcessOutcome::Killed));
    fake.set(|simulation| {
        simulation.preempt();
        simulation.endless = true;
    });
    let (ledger, clouds) = (open_ledger(&home.path().join("state")), fake.clouds());
    let cloud = clouds.iter().next().unwrap();
    let found = reconcile_cloud(Some(&ledger), cloud).await.unwrap();
    assert_eq!(found.actions.len(), 1, "{found:?}");
    let at_work = tokio::time::timeout(Duration::from_secs(60), life(&fake, home.path())).await;
    assert!(at_work.is_err(), "{at_work:?}");
    apply_actions(&ledger, fake.ports(&clouds), cloud, &found, &|_| {}).await.unwrap();
    assert_eq!(ledger.find("last").unwrap().state.word(), "launched");
    assert_eq!(fake.simulation.lock().unwrap().ours().count(), 1);
}

/// Runs of one survey, concurrent in one process.
async fn side_by_side(fake: &Fake, home: &Path, budget: f64) -> Vec<RunRecord> {
    let ledger = open_ledger(&home.join("state"));
    let (clouds, on) = (fake.clouds(), |_| {});
    let drive = |model: &str| {
        let survey = Some(Membership { survey: "s".into(), model: model.into() });
        let budget = Some(Usd::from_dollars(budget));
        let run = ledger.plan(&RunSpec { survey, budget, ..spec(&home.join("results/s")) }).unwrap();
        Driver::new(run, fake.ports(&clouds), fake.stop.subscribe(), &on).drive()
    };
    let driven = futures::future::join_all(["a", "b", "c"].map(drive)).await;
    driven.into_iter().map(Result::unwrap).collect()
}

/// The cheapest offer reserves $1.10.
#[tokio::test(start_paused = true)]
async fn parallel_runs_wait_for_their_shared_budget() {
    for (budget, at_once) in [(1.2, 1), (2.5, 2), (99.0, 3)] {
        let (fake, home) = (Fake::new(), home());
        let runs = side_by_side(&fake, home.path(), budget).await;
        for (run, place) in runs.iter().zip(["a", "b", "c"]) {
            assert_eq!(run.state.ending(), Some(&RunOutcome::Completed), "{budget}");
            let folder = home.path().join("results/s").join(place);
            assert_eq!(run.state.results().unwrap().folder, folder.to_string_lossy());
            holds(&folder, &run.id).unwrap();
        }
        assert_eq!(fake.simulation.lock().unwrap().most_alive, at_once, "of a budget of {budget}");
    }
}

/// Two runs find a higher price at the same time, which the rest of their budget covers once.
#[tokio::test(start_paused = true)]
async fn rest_of_a_shared_budget_covers_one_higher_price() {
    set_clock(now_ms());
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| {
        simulation.price_on_arrival = Some(UsdPerHour::from_dollars(1.1));
        (simulation.priceless, simulation.visibility) = (true, 0);
    });
    let ledger = open_ledger(&home.path().join("state"));
    let (budget, most) = (Usd::from_dollars(2.15), std::sync::Mutex::new(Usd::ZERO));
    let on = |_| {
        let reserved: Usd = ledger.runs().unwrap().iter().map(|run| run.at_most(now_ms())).sum();
        let mut most = most.lock().unwrap();
        *most = reserved.max(*most);
    };
    let clouds = fake.clouds();
    let drive = |model: &str| {
        let survey = Some(Membership { survey: "s".into(), model: model.into() });
        let quote = up_to(Usd::from_dollars(1.2));
        let spec = RunSpec { survey, budget: Some(budget), quote, ..spec(&home.path().join("results/s")) };
        Driver::new(ledger.plan(&spec).unwrap(), fake.ports(&clouds), fake.stop.subscribe(), &on).drive()
    };
    let driven = futures::future::join_all(["a", "b"].map(drive)).await;
    let completed = |run: &RunRecord| run.state.ending() == Some(&RunOutcome::Completed);
    assert!(driven.iter().any(|run| run.as_ref().is_ok_and(completed)), "{driven:?}");
    let most = *most.lock().unwrap();
    assert!(most <= budget && most > Usd::from_dollars(2.05), "{most}");
    assert_eq!(fake.simulation.lock().unwrap().ours().count(), 0);
}

#[tokio::test(start_paused = true)]
async fn insufficient_budget_ends_the_run_before_renting() {
    let (fake, home) = (Fake::new(), home());
    for run in side_by_side(&fake, home.path(), 1.0).await {
        let Some(RunOutcome::Failed { trouble }) = run.state.ending() else { panic!("{:?}", run.state) };
        assert_eq!(trouble.kind, RunFailureKind::Budget);
    }
    assert_eq!(fake.simulation.lock().unwrap().creates, 0);
}

/// A budget may be lowered below what earlier runs have cost: no negative amount is left.
#[tokio::test(start_paused = true)]
async fn overspent_budget_has_nothing_left() {
    set_clock(now_ms());
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.endless = true);
    let (ledger, clouds, on) = (open_ledger(&home.path().join("state")), fake.clouds(), |_| {});
    let drive = |budget: f64| {
        let survey = Some(Membership { survey: "s".into(), model: "a".into() });
        let budget = Some(Usd::from_dollars(budget));
        let run = ledger.plan(&RunSpec { survey, budget, ..spec(&home.path().join("results/s")) }).unwrap();
        Driver::new(run, fake.ports(&clouds), fake.stop.subscribe(), &on).drive()
    };
    let first = drive(99.0).await.unwrap();
    assert!(first.cost(now_ms()) > Usd::from_dollars(0.5), "it ran until its time limit");
    let second = drive(0.01).await.unwrap();
    let Some(RunOutcome::Failed { trouble }) = second.state.ending() else { panic!("{:?}", second.state) };
    assert!(trouble.message.contains("$0.00 of $0.01 are left"), "{trouble:?}");
}

#[tokio::test(start_paused = true)]
async fn survey_ends_when_a_waiting_run_is_stopped() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.endless = true);
    let stop = async {
        while fake.simulation.lock().unwrap().ours().count() == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        fake.stop.send_replace(Stop::Now);
    };
    let (runs, ()) = tokio::join!(side_by_side(&fake, home.path(), 1.2), stop);
    assert!(runs.iter().all(|run| run.state.ending() == Some(&RunOutcome::Interrupted)), "{runs:?}");
    let simulation = fake.simulation.lock().unwrap();
    assert_eq!((simulation.creates, simulation.ours().count()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn worker_starts_are_spaced_and_report_the_wait() {
    let (fake, home, begun) = (Fake::new(), home(), Instant::now());
    let ledger = open_ledger(&home.path().join("state"));
    let (clouds, start_throttle) = (fake.clouds(), StartThrottle::new(Duration::from_secs(20)));
    let ports = Ports { start_throttle: Some(&start_throttle), ..fake.ports(&clouds) };
    let (launched, told) = (std::sync::Mutex::new(Vec::new()), std::sync::Mutex::new(Vec::new()));
    let on = |event| match event {
        DeployEvent::State(state) if matches!(*state, RunState::Launched { .. }) => {
            launched.lock().unwrap().push(begun.elapsed().as_secs() / 20);
        }
        DeployEvent::Note(note) => told.lock().unwrap().push(note),
        _ => {}
    };
    let drive = |_| Driver::new(ledger.plan(&spec(home.path())).unwrap(), ports, fake.stop.subscribe(), &on).drive();
    for run in futures::future::join_all((0..3).map(drive)).await {
        assert_eq!(run.unwrap().state.ending(), Some(&RunOutcome::Completed));
    }
    assert_eq!(*launched.lock().unwrap(), [0, 1, 2]);
    let told = told.into_inner().unwrap();
    let seconds = |note: &String| -> u64 {
        assert!(note.starts_with("Waiting ") && note.ends_with(" start 20 s apart"), "{note}");
        note.split(' ').nth(1).unwrap().parse().unwrap()
    };
    let waits: Vec<u64> = told.iter().map(seconds).collect();
    assert!(waits.len() == 2 && (39..=40).contains(&waits[1]), "{waits:?}");
}

/// Drives a run whose ledger accepts only `events`, as on a full disk. `heard` gets the number of
/// reports, and may free the disk.
async fn on_a_full_disk(
    events: usize,
    heard: impl Fn(&Fake, &rusqlite::Connection, usize) + Send + Sync,
) -> (Fake, tempfile::TempDir, Result<RunRecord, DriveError>) {
    fake::set_clock(1_767_225_600_000);
    let (mut fake, home) = (Fake::new(), home());
    fake.timeouts = Timeouts::CLOUD;
    let ledger = open_ledger(&home.path().join("state"));
    let disk = rusqlite::Connection::open(home.path().join("state/ledger.db")).unwrap();
    let full = format!(
        "CREATE TRIGGER full BEFORE INSERT ON events WHEN (SELECT count(*) FROM events) >= {events} \
         BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
    );
    disk.execute_batch(&full).unwrap();
    let run = ledger.plan(&spec(&home.path().join("results"))).unwrap();
    let (disk, said) = (std::sync::Mutex::new(disk), std::sync::atomic::AtomicUsize::new(0));
    let on = |event| {
        if matches!(&event, DeployEvent::Retrying { reason, .. } if reason.contains("disk is full")) {
            let times = said.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
            heard(&fake, &disk.lock().unwrap(), times);
        }
    };
    let driven = Driver::new(run, fake.ports(&fake.clouds()), fake.stop.subscribe(), &on).drive().await;
    (fake, home, driven)
}

#[tokio::test(start_paused = true)]
async fn full_disk_at_any_event_leaves_no_instance() {
    for events in 0..8 {
        let (fake, home, driven) = on_a_full_disk(events, |_, _, _| {}).await;
        let Err(DriveError::Ledger(error)) = driven else { panic!("{events}: {driven:?}") };
        assert!(error.to_string().contains("ledger.db") && error.to_string().contains("full"), "{error}");
        let created = fake.simulation.lock().unwrap().creates;
        assert_eq!(created > 0, events > 0, "{events}: what cannot be intended is not rented");
        assert_eq!(fake.simulation.lock().unwrap().ours().count(), 0, "{events}: an instance is left");
        // With free space the same run completes.
        let disk = rusqlite::Connection::open(home.path().join("state/ledger.db")).unwrap();
        disk.execute_batch("DROP TRIGGER full").unwrap();
        let ProcessOutcome::Finished(record) = life(&fake, home.path()).await else { panic!("{events}") };
        closed_and_clean(&fake, &record, "with room again");
        let (billed, cost) = (fake.simulation.lock().unwrap().billed, record.cost(now_ms()));
        assert!(cost >= billed, "{events}: {billed} were billed, and {cost} is said");
    }
}

/// Whether a higher price fits into the budget of a survey is not known without every record.
#[tokio::test(start_paused = true)]
async fn unreadable_record_of_a_survey_leaves_no_instance() {
    let create = happy().await.0.simulation.lock().unwrap().effects.iter().position(|name| *name == "create").unwrap();
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| {
        simulation.price_on_arrival = Some(UsdPerHour::from_dollars(1.05));
        simulation.armed = vec![(create + 1, Fault::Unreadable)];
        simulation.ledger = home.path().join("state/ledger.db");
    });
    let survey = Some(Membership { survey: "s".into(), model: "a".into() });
    let (budget, quote) = (Some(Usd::from_dollars(99.0)), up_to(Usd::from_dollars(1.06)));
    let spec = RunSpec { survey, budget, quote, ..spec(&home.path().join("results")) };
    let run = open_ledger(&home.path().join("state")).plan(&spec).unwrap();
    let driven = Driver::new(run, fake.ports(&fake.clouds()), fake.stop.subscribe(), &|_| {}).drive().await;
    assert!(matches!(driven, Err(DriveError::Ledger(LedgerError::Damaged { .. }))), "{driven:?}");
    let simulation = fake.simulation.lock().unwrap();
    assert_eq!((simulation.creates, simulation.ours().count()), (1, 0));
}

/// What was just created is in no list yet, and known by the answer alone.
#[tokio::test(start_paused = true)]
async fn full_disk_after_a_create_call_leaves_no_unlisted_instance() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.visibility = 100);
    let ledger = open_ledger(&home.path().join("state"));
    let disk = rusqlite::Connection::open(home.path().join("state/ledger.db")).unwrap();
    let full = "CREATE TRIGGER full BEFORE INSERT ON events WHEN (SELECT count(*) FROM events) >= 1 \
                BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END";
    disk.execute_batch(full).unwrap();
    let run = ledger.plan(&spec(&home.path().join("results"))).unwrap();
    let driven = Driver::new(run, fake.ports(&fake.clouds()), fake.stop.subscribe(), &|_| {}).drive().await;
    assert!(matches!(driven, Err(DriveError::Ledger(_))), "{driven:?}");
    let simulation = fake.simulation.lock().unwrap();
    assert_eq!((simulation.creates, simulation.ours().count()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn run_survives_a_temporarily_full_disk_and_still_obeys_ctrl_c() {
    for events in 2..8 {
        let free = |_: &Fake, disk: &rusqlite::Connection, times| {
            if times == 3 {
                disk.execute_batch("DROP TRIGGER full").unwrap();
            }
        };
        let (fake, _home, driven) = on_a_full_disk(events, free).await;
        // A run that had to end has ended without recording it.
        match driven {
            Ok(record) => closed_and_clean(&fake, &record, "freed"),
            Err(error) => assert!(events >= 6 && matches!(error, DriveError::Ledger(_)), "{events}: {error}"),
        }
        assert_eq!(fake.simulation.lock().unwrap().ours().count(), 0, "{events}");
    }
    let begun = Instant::now();
    let stop = |fake: &Fake, _: &rusqlite::Connection, _| {
        let _ = fake.stop.send(Stop::Now);
    };
    let (fake, _home, driven) = on_a_full_disk(4, stop).await;
    assert!(matches!(driven, Err(DriveError::Ledger(_))) && begun.elapsed() < Duration::from_secs(60), "{driven:?}");
    assert_eq!(fake.simulation.lock().unwrap().ours().count(), 0);
}

/// When a job ended cannot be written down: no reason to leave its results where they are.
#[tokio::test(start_paused = true)]
async fn results_of_an_ended_job_are_saved_while_the_ledger_is_full() {
    set_clock(now_ms());
    let (mut fake, home) = (Fake::new(), home());
    fake.timeouts = Timeouts::CLOUD;
    let began = now_ms() / 1000;
    fake.set(|simulation| {
        simulation.offers.iter_mut().for_each(|offer| offer.queued = true);
        simulation.run_time = Some(RunTime { ended_s: 0, since: Some(began), until: Some(began + 3600) });
    });
    let ledger = open_ledger(&home.path().join("state"));
    let disk = std::sync::Mutex::new(rusqlite::Connection::open(home.path().join("state/ledger.db")).unwrap());
    let run = ledger.plan(&spec(&home.path().join("results"))).unwrap();
    let results = home.path().join("results").join(format!("owner--model-{}", run.record().id));
    let on = |event| {
        if let DeployEvent::State(state) = event
            && matches!(*state, RunState::Ended { .. })
        {
            fake.set(|simulation| simulation.run_time = Some(RunTime { ended_s: 60, since: None, until: None }));
            let full = "CREATE TRIGGER full BEFORE INSERT ON events \
                        BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END";
            disk.lock().unwrap().execute_batch(full).unwrap();
            fake.stop.send_replace(Stop::Now);
        }
    };
    let driven = Driver::new(run, fake.ports(&fake.clouds()), fake.stop.subscribe(), &on).drive().await;
    assert!(matches!(driven, Err(DriveError::Ledger(_))), "{driven:?}");
    assert_eq!(fake.simulation.lock().unwrap().ours().count(), 0, "its instance ended");
    assert!(results.join(files::RESULTS).exists(), "what it counted is here");
}

#[tokio::test(start_paused = true)]
async fn failing_termination_is_reported_within_5_s_and_retried() {
    fake::set_clock(1_767_225_600_000);
    let (mut fake, home) = (Fake::new(), home());
    fake.timeouts = Timeouts::CLOUD;
    fake.set(|simulation| simulation.refuses_until = Some(Instant::now() + Duration::from_secs(600)));
    let ledger = open_ledger(&home.path().join("state"));
    let run = ledger.plan(&spec(&home.path().join("results"))).unwrap();
    let (told, said) = (std::sync::Mutex::new(None), std::sync::Mutex::new(Vec::new()));
    let on = |event| match event {
        DeployEvent::Terminating(_) => {
            told.lock().unwrap().get_or_insert_with(Instant::now);
        }
        DeployEvent::StillBilling(not) => said.lock().unwrap().push((Instant::now(), not)),
        _ => {}
    };
    let record = Driver::new(run, fake.ports(&fake.clouds()), fake.stop.subscribe(), &on).drive().await.unwrap();
    closed_and_clean(&fake, &record, "outwaited");
    let (told, said) = (told.into_inner().unwrap().unwrap(), said.into_inner().unwrap());
    let (first, not) = &said[0];
    assert!(first.duration_since(told) < Duration::from_secs(5), "{said:?}");
    assert_eq!((not.broker.as_str(), not.price), ("fake", Some(UsdPerHour::from_dollars(1.0))));
    assert!(not.why.contains("NotApplied") && not.pause == Duration::from_secs(10), "{not:?}");
    assert!(said.len() > 5 && said.len() <= 21, "now and then, not at every try: {}", said.len());
    let cost = |at: usize| said[at].1.cost.unwrap();
    assert!(cost(said.len() - 1) >= cost(0), "it goes on costing");
}

#[tokio::test(start_paused = true)]
async fn unresponsive_cloud_matters_only_if_a_run_may_be_there() {
    let (fake, home) = (Fake::new(), home());
    let ledger = open_ledger(&home.path().join("state"));
    let silent = async || {
        fake.set(|simulation| simulation.outage = true);
        let stuck = recover(&ledger, fake.ports(&fake.clouds()), &|_| {}).await.unwrap_err();
        fake.set(|simulation| simulation.outage = false);
        stuck
    };
    assert!(matches!(silent().await, DriveError::Silent { .. }), "an empty ledger has nothing anywhere");
    let ProcessOutcome::Finished(_) = life(&fake, home.path()).await else { panic!("nothing was armed") };
    assert!(matches!(silent().await, DriveError::Silent { .. }), "nor has one whose runs are over");
    let mut run = ledger.plan(&spec(&home.path().join("results"))).unwrap();
    assert!(matches!(silent().await, DriveError::Silent { .. }), "nor has a run that asked for nothing");
    let tag = "outliers-o-r-n-1".parse().unwrap();
    let intent = Intent { offer: fake::offer("a", 1.0), tag };
    run.append(RunEvent::Creating { intent: Box::new(intent) }).unwrap();
    drop(run);
    assert!(matches!(silent().await, DriveError::Broker { .. }), "this one may");
}

#[tokio::test(start_paused = true)]
async fn unwritable_results_folder_falls_back_to_the_ledger_folder() {
    let (fake, home) = (Fake::new(), home());
    std::fs::write(home.path().join("results"), "in the way").unwrap();
    let ProcessOutcome::Finished(record) = life(&fake, home.path()).await else { panic!("stuck") };
    closed_and_clean(&fake, &record, "in the way");
    assert_eq!(record.state.ending(), Some(&RunOutcome::Completed));
    let place = home.path().join("state/runs").join(&record.id).join(format!("owner--model-{}", record.id));
    assert_eq!(record.state.results().unwrap().folder, place.to_string_lossy());
    holds(&place, &record.id).unwrap();
}

/// The local disk is full for some time from any moment on. Nothing is lost or repeated.
#[tokio::test(start_paused = true)]
async fn temporarily_full_disk_during_download_is_waited_out() {
    for second in [None, Some(Fault::CrashBefore)] {
        sweep(Fault::ResultsFull, second, |fake, lives, what| {
            closed_and_clean(fake, last(lives), what);
            assert_eq!(last(lives).state.ending(), Some(&RunOutcome::Completed), "{what}");
            assert_eq!(fake.simulation.lock().unwrap().creates, 1, "{what}");
        })
        .await;
    }
}

/// Drives a run whose results fit in no folder. `heard` gets the number of reports.
async fn with_no_room(
    heard: impl Fn(&Fake, &Ledger, &UnsavedResults, usize) + Send + Sync,
) -> (Fake, RunRecord, Vec<UnsavedResults>) {
    set_clock(1_767_225_600_000);
    let (mut fake, home) = (Fake::new(), home());
    fake.timeouts = Timeouts::CLOUD;
    let ledger = open_ledger(&home.path().join("state"));
    std::fs::write(home.path().join("results"), "in the way").unwrap();
    let run = ledger.plan(&RunSpec { quote: up_to(AGREED), ..spec(&home.path().join("results")) }).unwrap();
    let beside = run.folder().join(format!("owner--model-{}.part", run.record().id));
    std::fs::write(beside, "in the way").unwrap();
    let told = std::sync::Mutex::new(Vec::new());
    let on = |event| {
        if let DeployEvent::Kept(kept) = event {
            let mut told = told.lock().unwrap();
            told.push(*kept);
            heard(&fake, &ledger, &told[told.len() - 1], told.len());
        }
    };
    let record = Driver::new(run, fake.ports(&fake.clouds()), fake.stop.subscribe(), &on).drive().await.unwrap();
    closed_and_clean(&fake, &record, "no room");
    assert_eq!(fake.simulation.lock().unwrap().creates, 1);
    let told = told.into_inner().unwrap();
    (fake, record, told)
}

#[tokio::test(start_paused = true)]
async fn unsaved_results_hold_the_instance_until_its_deadline() {
    let begun = Instant::now();
    let (fake, record, told) = with_no_room(|_, _, _, _| {}).await;
    let Some(RunOutcome::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
    assert_eq!(trouble.kind, RunFailureKind::Local, "it is no fault of a cloud: {trouble:?}");
    let RunState::Closed { results: None, loss: Some(loss), .. } = &record.state else { panic!("{:?}", record.state) };
    assert!(loss.contains("results"), "{loss}");
    // An hour was agreed, of which 5 minutes are reserved for the end.
    let (lasted, cost) = (begun.elapsed().as_secs(), fake.simulation.lock().unwrap().kept);
    assert!((3200..3600).contains(&lasted) && cost <= AGREED, "{lasted} s, {cost}");
    let (first, last) = (&told[0], &told[told.len() - 1]);
    assert!(told.len() > 50 && told.len() < 130, "it is said and tried every half minute: {}", told.len());
    assert_eq!((first.price, first.pause.as_secs()), (UsdPerHour::from_dollars(1.0), 30));
    assert!(first.why.contains("results") && first.cost < last.cost, "{first:?}");
    assert!(first.until.abs_diff(last.until) <= 1, "{first:?}, {last:?}");
}

#[tokio::test(start_paused = true)]
async fn unsaved_results_can_be_saved_to_another_folder() {
    let elsewhere = tempfile::tempdir().unwrap();
    let folder = elsewhere.path().join("larger");
    let (_, record, told) = with_no_room(|_, ledger, kept, times| {
        if times == 3 {
            ledger.send_results_to(&kept.run, folder.to_str().unwrap()).unwrap();
        }
    })
    .await;
    assert_eq!((record.state.ending(), told.len()), (Some(&RunOutcome::Completed), 3));
    let place = folder.join(format!("owner--model-{}", record.id));
    assert_eq!(record.state.results().unwrap().folder, place.to_string_lossy());
    holds(&place, &record.id).unwrap();
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "nothing half-arrived is left");
}

#[tokio::test(start_paused = true)]
async fn ctrl_c_gives_up_unsaved_results() {
    let begun = Instant::now();
    let (_, record, told) = with_no_room(|fake, _, _, times| {
        if times == 2 {
            let _ = fake.stop.send(Stop::Now);
        }
    })
    .await;
    assert_eq!((record.state.ending(), told.len()), (Some(&RunOutcome::Interrupted), 2));
    assert!(matches!(&record.state, RunState::Closed { loss: Some(_), .. }), "what is lost is said");
    assert!(begun.elapsed() < Duration::from_secs(300), "{:?}", begun.elapsed());
}

/// A host whose downloads never end, with Ctrl-C before and during them.
#[tokio::test(start_paused = true)]
async fn saving_results_after_ctrl_c_is_bounded() {
    let (plain, ..) = happy().await;
    let effects = plain.simulation.lock().unwrap().effects.clone();
    let follow = effects.iter().position(|name| *name == "follow").unwrap() + 1;
    for (at, endless) in [(follow, true), (effects.iter().position(|name| *name == "fetch").unwrap() + 1, false)] {
        let (mut fake, home, begun) = (Fake::new(), home(), Instant::now());
        fake.timeouts = Timeouts::CLOUD;
        fake.set(|simulation| {
            (simulation.stalls, simulation.endless) = (true, endless);
            simulation.armed = vec![(at, Fault::Stop)];
        });
        let ended = tokio::time::timeout(Duration::from_secs(2 * 3600), life(&fake, home.path())).await;
        let Ok(ProcessOutcome::Finished(record)) = ended else { panic!("{at}: it is brought home for ever") };
        closed_and_clean(&fake, &record, "stalled");
        assert_eq!(record.state.ending(), Some(&RunOutcome::Interrupted));
        let RunState::Closed { loss: Some(loss), .. } = &record.state else { panic!("{:?}", record.state) };
        assert!(loss.contains("within 30 min"), "{loss}");
        assert!(begun.elapsed() < Duration::from_secs(3600), "{:?}", begun.elapsed());
        let left = std::fs::read_dir(home.path().join("results")).unwrap().count();
        assert_eq!(left, 0, "nothing half-arrived is left");
    }
}

/// What a worker left that was stopped at its time limit is not worth more than was agreed.
#[tokio::test(start_paused = true)]
async fn endless_download_of_partial_results_ends_before_the_time_limit() {
    set_clock(now_ms());
    let (mut fake, home) = (Fake::new(), home());
    fake.timeouts = Timeouts::CLOUD;
    fake.set(|simulation| (simulation.endless, simulation.stalls) = (true, true));
    let begun = Instant::now();
    let record = with(|spec| spec.quote = up_to(AGREED), &fake, home.path()).await;
    closed_and_clean(&fake, &record, "a slow line");
    let RunState::Closed { ending, loss, .. } = &record.state else { panic!("{:?}", record.state) };
    assert!(*ending == RunOutcome::Deadline && loss.is_some(), "{:?}", record.state);
    let (took, cost) = (begun.elapsed().as_secs(), record.cost(now_ms()));
    assert!((3500..3600).contains(&took) && cost <= AGREED, "{took} s, {cost}");
}

#[tokio::test(start_paused = true)]
async fn endless_download_ends_soon_after_the_time_limit() {
    set_clock(now_ms());
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.stalls = true);
    let begun = Instant::now();
    let record = with(|_| {}, &fake, home.path()).await;
    closed_and_clean(&fake, &record, "a slow line");
    let RunState::Closed { ending, loss, .. } = &record.state else { panic!("{:?}", record.state) };
    assert!(*ending == RunOutcome::Deadline && loss.is_some(), "{:?}", record.state);
    let took = begun.elapsed().as_secs();
    assert!((3299..3600).contains(&took), "{took} s");
}

#[tokio::test(start_paused = true)]
async fn results_of_another_job_are_kept_apart_as_partial() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|simulation| simulation.other_layers = Some(1));
    let record = with(|_| {}, &fake, home.path()).await;
    closed_and_clean(&fake, &record, "another job");
    let Some(RunOutcome::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
    assert!(trouble.message.contains("another job") && trouble.message.contains("layers"), "{trouble:?}");
    let results = record.state.results().unwrap();
    assert!(!results.complete && results.folder.ends_with(".partial"), "{results:?}");
    assert!(Path::new(&results.folder).join(files::RESULTS).exists());
}

#[tokio::test(start_paused = true)]
async fn folder_of_refused_files_is_reported_before_termination() {
    let (fake, home, told) = (Fake::new(), home(), std::sync::Mutex::new(Vec::new()));
    fake.set(|simulation| simulation.damaged_manifest = true);
    let ledger = open_ledger(&home.path().join("state"));
    let run = ledger.plan(&spec(&home.path().join("results"))).unwrap();
    let on = |event| match event {
        DeployEvent::Note(note) => told.lock().unwrap().push(Some(note)),
        DeployEvent::Terminating(_) => told.lock().unwrap().push(None),
        _ => {}
    };
    let record = Driver::new(run, fake.ports(&fake.clouds()), fake.stop.subscribe(), &on).drive().await.unwrap();
    closed_and_clean(&fake, &record, "refused");
    let told = told.into_inner().unwrap();
    let lost = format!("The files lie as they are in ~/outliers/{} on instance i1, which ends now", record.id);
    assert_eq!(told[0], Some(lost), "{told:?}");
    assert!(told.len() > 1 && told[1..].iter().all(Option::is_none), "{told:?}");
    assert!(record.state.results().is_none());
    assert_eq!(std::fs::read_dir(home.path().join("results")).unwrap().count(), 0, "nothing was kept");
}
