//! The loop against a world that fails at every point.

use std::path::Path;

use outliers_protocol::{Failure, FailureKind, Outcome, files};

use super::fake::{Fake, Fault, nothing, spec};
use super::*;
use crate::broker::BrokerErrorKind;
use crate::ledger::Ledger;
use crate::run::{Ending, Membership, RunSpec, TroubleKind};
use crate::units::{Usd, UsdPerHour};

/// How one process ended.
#[derive(Debug)]
pub(super) enum Life {
    Finished(Box<RunRecord>),
    Stuck(#[expect(dead_code, reason = "shown when an assertion fails")] Stuck),
    Killed,
}

/// One process: plans the run, or takes up the one that is there, and drives it.
pub(super) async fn life(fake: &Fake, home: &Path) -> Life {
    let ledger = Ledger::open(&home.join("state")).unwrap();
    let run = match ledger.runs().unwrap().first() {
        Some(run) => ledger.take(&run.id).unwrap().expect("the process before is dead"),
        None => {
            let max_duration_s = fake.world.lock().unwrap().max_duration_s;
            let budget = fake.world.lock().unwrap().budget;
            ledger.plan(&RunSpec { max_duration_s, budget, ..spec(&home.join("results")) }).unwrap()
        }
    };
    let on = |_| {};
    let clouds = fake.clouds();
    let driver = Driver::new(run, fake.ports(&clouds), fake.stop.subscribe(), &on);
    tokio::select! {
        biased;
        () = fake.crashed.notified() => Life::Killed,
        driven = driver.drive() => match driven {
            Ok(record) => Life::Finished(Box::new(record)),
            Err(stuck) => Life::Stuck(stuck),
        },
    }
}

/// What must hold whenever a run is over.
pub(super) fn closed_and_clean(fake: &Fake, record: &RunRecord, what: &str) {
    let world = fake.world.lock().unwrap();
    assert!(record.state.is_closed(), "{what}: {:?}", record.state);
    assert_eq!(world.ours().count(), 0, "{what}: an instance is left");
    assert!(world.most_alive <= 1, "{what}: {} instances at once", world.most_alive);
    if let Some(results) = record.state.results() {
        let folder = Path::new(&results.folder);
        assert!(folder.join(RUN_FILE).exists(), "{what}");
        // Damaged ones are kept, and not called complete.
        assert!(folder.join(files::RESULTS).exists() == results.complete || world.damage, "{what}");
    }
    if record.state.ending() == Some(&Ending::Completed) {
        assert!(record.state.results().is_some_and(|results| results.complete), "{what}");
    }
}

pub(super) fn home() -> tempfile::TempDir {
    // Thousands of small ledgers, each commit synced: memory is quicker where there is some.
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

async fn happy() -> (Fake, Box<RunRecord>, tempfile::TempDir) {
    let (fake, home) = (Fake::new(), home());
    let Life::Finished(record) = life(&fake, home.path()).await else { panic!("nothing was armed") };
    (fake, record, home)
}

#[tokio::test(start_paused = true)]
async fn a_run_goes_through_all_states_and_leaves_nothing() {
    let (fake, record, home) = happy().await;
    closed_and_clean(&fake, &record, "happy path");
    let words: Vec<_> = record.events.iter().map(|entry| entry.event.word()).collect();
    let expected = ["creating", "created", "reached", "launched", "worker ended", "fetched", "terminate", "gone"];
    assert_eq!(words, expected);
    assert_eq!(record.state.ending(), Some(&Ending::Completed));
    let names: Vec<_> =
        std::fs::read_dir(home.path().join("results")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, [format!("owner--model-{}", record.id).as_str()], "nothing half-arrived is left");
    assert!(!home.path().join("state/runs").join(&record.id).join("key").exists());
}

/// Every fault of `first` at every effect; then, if `second` is given, that one at every effect after it.
async fn sweep(first: Fault, second: Option<Fault>, check: impl Fn(&Fake, &[Life], &str)) -> usize {
    sweep_with(first, second, |_| {}, check).await
}

/// The same in a world that was changed first.
async fn sweep_with(
    first: Fault,
    second: Option<Fault>,
    change: impl Fn(&mut super::fake::World),
    check: impl Fn(&Fake, &[Life], &str),
) -> usize {
    let mut runs = 0;
    for at in 1.. {
        let mut later = at;
        loop {
            later += 1;
            let (fake, home) = (Fake::new(), home());
            fake.set(|world| world.armed = vec![(at, first)]);
            fake.set(&change);
            if let Some(second) = second {
                fake.set(|world| world.armed.push((later, second)));
            }
            let mut lives = vec![life(&fake, home.path()).await];
            let fired = || fake.world.lock().unwrap().fired;
            if fired() == 0 {
                return runs;
            }
            while !matches!(lives.last(), Some(Life::Finished(_))) {
                assert!(lives.len() < 6, "no end: {lives:?}");
                lives.push(life(&fake, home.path()).await);
            }
            let names = fake.world.lock().unwrap().effects.clone();
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

fn last(lives: &[Life]) -> &RunRecord {
    match lives.last() {
        Some(Life::Finished(record)) => record,
        other => panic!("{other:?}"),
    }
}

/// kill -9 before and after every effect: the next process ends the run as if nothing had happened.
#[tokio::test(start_paused = true)]
async fn killed_anywhere_the_run_still_completes() {
    for fault in [Fault::CrashBefore, Fault::CrashAfter] {
        let runs = sweep(fault, None, |fake, lives, what| {
            assert_eq!(lives.len(), 2, "{what}");
            closed_and_clean(fake, last(lives), what);
            assert_eq!(last(lives).state.ending(), Some(&Ending::Completed), "{what}");
            let made = last(lives).events.iter().filter(|entry| entry.event.word() == "created").count();
            assert_eq!(made, 1, "{what}: work is never done twice on two instances");
        });
        let runs = runs.await;
        assert!(runs >= 15, "{runs} points only");
    }
}

/// And killed again while it recovers.
#[tokio::test(start_paused = true)]
async fn killed_twice_the_run_still_completes() {
    for first in [Fault::CrashBefore, Fault::CrashAfter] {
        for second in [Fault::CrashBefore, Fault::CrashAfter] {
            let runs = sweep(first, Some(second), |fake, lives, what| {
                closed_and_clean(fake, last(lives), what);
                assert_eq!(last(lives).state.ending(), Some(&Ending::Completed), "{what}");
            });
            assert!(runs.await >= 100);
        }
    }
}

/// One failure, or one lost answer, is lived through within the same process.
#[tokio::test(start_paused = true)]
async fn a_single_failure_anywhere_is_survived() {
    for fault in [Fault::Fails, Fault::AnswerLost] {
        sweep(fault, None, |fake, lives, what| {
            assert_eq!(lives.len(), 1, "{what}");
            closed_and_clean(fake, last(lives), what);
            assert_eq!(last(lives).state.ending(), Some(&Ending::Completed), "{what}");
            assert!(fake.world.lock().unwrap().creates <= 2, "{what}");
        })
        .await;
    }
}

/// A failure and then a crash, at every pair of points.
#[tokio::test(start_paused = true)]
async fn a_lost_answer_and_then_a_crash_are_survived() {
    sweep(Fault::AnswerLost, Some(Fault::CrashAfter), |fake, lives, what| {
        closed_and_clean(fake, last(lives), what);
        assert_eq!(last(lives).state.ending(), Some(&Ending::Completed), "{what}");
    })
    .await;
}

/// When everything stops working, the program says that an instance may be left, never that all is well; and a later
/// process, when things work again, ends it.
#[tokio::test(start_paused = true)]
async fn an_outage_is_told_and_mended_later() {
    for at in 1.. {
        let (fake, home) = (Fake::new(), home());
        fake.set(|world| {
            world.armed = vec![(at, Fault::Outage)];
            world.max_duration_s = 2;
        });
        let first = life(&fake, home.path()).await;
        if fake.world.lock().unwrap().fired == 0 {
            return;
        }
        let what = format!("outage at {at}");
        if let Life::Finished(record) = &first {
            closed_and_clean(&fake, record, &what);
        }
        fake.set(|world| {
            world.armed.clear();
            world.outage = false;
        });
        let second = life(&fake, home.path()).await;
        let Life::Finished(record) = second else { panic!("{what}: {second:?}") };
        closed_and_clean(&fake, &record, &what);
    }
}

#[tokio::test(start_paused = true)]
async fn ctrl_c_anywhere_ends_in_terminate() {
    for fault in [Fault::Stop, Fault::StopTwice] {
        sweep(fault, None, |fake, lives, what| {
            assert_eq!(lives.len(), 1, "{what}");
            let record = last(lives);
            closed_and_clean(fake, record, what);
            let ending = record.state.ending();
            assert!(matches!(ending, Some(Ending::Interrupted | Ending::Completed)), "{what}: {ending:?}");
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn ctrl_c_and_then_a_crash_still_end_in_terminate() {
    sweep(Fault::Stop, Some(Fault::CrashAfter), |fake, lives, what| {
        closed_and_clean(fake, last(lives), what);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_goes_away_is_replaced_and_the_run_completes() {
    sweep(Fault::Preempted, None, |fake, lives, what| {
        closed_and_clean(fake, last(lives), what);
        assert_eq!(last(lives).state.ending(), Some(&Ending::Completed), "{what}");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn instances_that_go_away_again_and_again_end_the_run_with_a_loss() {
    let (fake, home) = (Fake::new(), home());
    let (plain, ..) = happy().await;
    let follow = plain.world.lock().unwrap().effects.iter().position(|name| *name == "follow").unwrap() + 1;
    fake.set(|world| world.armed = (follow..200).map(|at| (at, Fault::Preempted)).collect());
    let Life::Finished(record) = life(&fake, home.path()).await else { panic!("stuck") };
    closed_and_clean(&fake, &record, "preempted");
    let RunState::Closed { ending: Ending::InstanceLost, loss: Some(loss), .. } = &record.state else {
        panic!("{:?}", record.state)
    };
    assert!(loss.contains("before its files were brought home"), "{loss}");
    assert_eq!(fake.world.lock().unwrap().creates, 3);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_dies_is_started_again_and_not_for_ever() {
    for (deaths, completed) in [(1, true), (2, true), (3, false)] {
        let (fake, home) = (Fake::new(), home());
        fake.set(|world| world.deaths = deaths);
        let Life::Finished(record) = life(&fake, home.path()).await else { panic!("stuck") };
        closed_and_clean(&fake, &record, "died");
        assert_eq!(record.state.ending() == Some(&Ending::Completed), completed, "{deaths}");
        assert!(completed || record.state.ending() == Some(&Ending::WorkerVanished { exit: Some(137) }));
        assert_eq!(fake.world.lock().unwrap().creates, 1);
    }
}

#[tokio::test(start_paused = true)]
async fn killed_anywhere_while_a_worker_is_started_again_the_run_still_completes() {
    let dies = |world: &mut super::fake::World| world.deaths = 1;
    for fault in [Fault::CrashBefore, Fault::CrashAfter] {
        let runs = sweep_with(fault, None, dies, |fake, lives, what| {
            closed_and_clean(fake, last(lives), what);
            assert_eq!(last(lives).state.ending(), Some(&Ending::Completed), "{what}");
        });
        assert!(runs.await > 18);
    }
}

#[tokio::test(start_paused = true)]
async fn ctrl_c_in_mid_run_brings_home_what_there_is_and_a_second_one_does_not() {
    for (fault, salvaged) in [(Fault::Stop, true), (Fault::StopTwice, false)] {
        let (fake, home) = (Fake::new(), home());
        let (plain, ..) = happy().await;
        let follow = plain.world.lock().unwrap().effects.iter().position(|name| *name == "follow").unwrap() + 1;
        fake.set(|world| {
            world.endless = true;
            world.armed = vec![(follow, fault)];
        });
        let Life::Finished(record) = life(&fake, home.path()).await else { panic!("stuck") };
        closed_and_clean(&fake, &record, "ctrl-c");
        assert_eq!(record.state.ending(), Some(&Ending::Interrupted));
        assert_eq!(record.state.results().is_some(), salvaged);
        if let Some(results) = record.state.results() {
            assert!(!results.complete && results.folder.ends_with(".partial"));
            assert!(Path::new(&results.folder).join(files::LOG).exists());
        }
    }
}

/// Drives a run with its own wishes to its end.
async fn with(change: impl FnOnce(&mut crate::run::RunSpec), fake: &Fake, home: &Path) -> RunRecord {
    let ledger = Ledger::open(&home.join("state")).unwrap();
    let mut wishes = spec(&home.join("results"));
    change(&mut wishes);
    let run = ledger.plan(&wishes).unwrap();
    Driver::new(run, fake.ports(&fake.clouds()), fake.stop.subscribe(), &|_| {}).drive().await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_time_limit_ends_a_run_that_does_not() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|world| world.endless = true);
    let record = with(|spec| spec.max_duration_s = 3, &fake, home.path()).await;
    closed_and_clean(&fake, &record, "deadline");
    assert_eq!(record.state.ending(), Some(&Ending::Deadline));
    assert!(record.state.results().is_some_and(|results| !results.complete));
}

#[tokio::test(start_paused = true)]
async fn cancelling_from_another_process_ends_the_run() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|world| world.endless = true);
    let state = home.path().join("state");
    let cancel = async {
        loop {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let ledger = Ledger::open(&state).unwrap();
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
    assert_eq!(record.state.ending(), Some(&Ending::Cancelled));
}

#[tokio::test(start_paused = true)]
async fn a_held_instance_stays_and_is_no_loose_end() {
    let (fake, home) = (Fake::new(), home());
    let record = with(|spec| spec.keep_running = true, &fake, home.path()).await;
    assert_eq!(record.state.word(), "held");
    assert_eq!(fake.world.lock().unwrap().machines.len(), 1);
    let ledger = Ledger::open(&home.path().join("state")).unwrap();
    let mut run = ledger.take(&record.id).unwrap().unwrap();
    run.append(RunEvent::Terminate).unwrap();
    drop(run);
    let Life::Finished(record) = life(&fake, home.path()).await else { panic!("stuck") };
    closed_and_clean(&fake, &record, "released");
    assert_eq!(record.state.ending(), Some(&Ending::Completed));
}

#[tokio::test(start_paused = true)]
async fn the_next_offer_is_tried_and_the_last_refusal_tells_all() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|world| world.sold_out = vec!["a".into()]);
    let record = with(|_| {}, &fake, home.path()).await;
    assert_eq!(record.state.ending(), Some(&Ending::Completed));
    let RunEvent::Creating { intent } = &record.events[2].event else { panic!("{:?}", record.events) };
    assert_eq!(intent.offer.key, "b");

    let (fake, home) = (Fake::new(), self::home());
    fake.set(|world| world.sold_out = vec!["a".into(), "b".into()]);
    let record = with(|_| {}, &fake, home.path()).await;
    let Some(Ending::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
    assert_eq!(trouble.kind, TroubleKind::NoOffer);
    assert!(trouble.message.contains("2 of 2 offers") && trouble.message.contains("gone"), "{}", trouble.message);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_of_us_is_not_tried_again_elsewhere() {
    for kind in [BrokerErrorKind::Auth, BrokerErrorKind::Budget] {
        let (fake, home) = (Fake::new(), home());
        fake.set(|world| world.create_error = Some(kind));
        let record = with(|_| {}, &fake, home.path()).await;
        closed_and_clean(&fake, &record, "refused");
        assert_eq!(fake.world.lock().unwrap().creates, 1);
        let Some(Ending::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
        assert!(trouble.hint.is_some() && trouble.kind == TroubleKind::Broker);
    }
}

#[tokio::test(start_paused = true)]
async fn a_create_that_is_never_answered_gives_up() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|world| world.create_error = Some(BrokerErrorKind::Maybe));
    let record = with(|_| {}, &fake, home.path()).await;
    closed_and_clean(&fake, &record, "maybe for ever");
    assert!(fake.world.lock().unwrap().creates <= 8);
}

#[tokio::test(start_paused = true)]
async fn no_offer_means_nothing_rented() {
    let (fake, home) = (Fake::new(), home());
    let ledger = Ledger::open(&home.path().join("state")).unwrap();
    let run = ledger.plan(&spec(&home.path().join("results"))).unwrap();
    let clouds = fake.clouds();
    let ports = Ports { select: nothing, ..fake.ports(&clouds) };
    let record = Driver::new(run, ports, fake.stop.subscribe(), &|_| {}).drive().await.unwrap();
    assert_eq!(fake.world.lock().unwrap().creates, 0);
    let Some(Ending::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
    assert!(trouble.message.contains("--gpu-filter"));
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_bills_more_than_allowed_is_given_back() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|world| world.price_on_arrival = Some(UsdPerHour::from_dollars(9.0)));
    let cap = UsdPerHour::from_dollars(1.5);
    let record = with(|spec| spec.request.max_price = Some(cap), &fake, home.path()).await;
    closed_and_clean(&fake, &record, "price");
    let Some(Ending::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
    assert!(trouble.message.contains("$9.00/h"), "{}", trouble.message);
}

#[tokio::test(start_paused = true)]
async fn without_a_cap_the_offers_price_is_what_was_agreed() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|world| world.price_on_arrival = Some(UsdPerHour::from_dollars(1.9)));
    let record = with(|_| {}, &fake, home.path()).await;
    closed_and_clean(&fake, &record, "price");
    // $1.90 is far above the $1.00 of the first offer, and below the $2.00 of the second.
    assert_eq!(record.state.ending(), Some(&Ending::Completed));
    let words: Vec<_> = record.events.iter().map(|entry| entry.event.word()).collect();
    let expected = ["creating", "created", "discarded", "gone", "creating", "created", "reached", "launched"];
    assert_eq!(words[..8], expected);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_is_not_what_was_rented_is_exchanged_and_remembered() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|world| world.unfit = vec!["a".into()]);
    let record = with(|_| {}, &fake, home.path()).await;
    closed_and_clean(&fake, &record, "unfit");
    assert_eq!(record.state.ending(), Some(&Ending::Completed));
    assert_eq!(fake.world.lock().unwrap().creates, 2);
    let (bad, good) = (super::fake::offer("a", 1.0), super::fake::offer("b", 2.0));
    assert!(fake.bad_hosts.has(&bad) && !fake.bad_hosts.has(&good));
    // The next run of the batch does not go there again.
    let again = with(|_| {}, &fake, &home.path().join("next")).await;
    assert_eq!((again.state.ending(), fake.world.lock().unwrap().creates), (Some(&Ending::Completed), 3));
}

#[tokio::test(start_paused = true)]
async fn after_some_hosts_that_do_not_serve_the_fault_is_not_theirs() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|world| {
        world.offers = (0..9).map(|i| super::fake::offer(&format!("o{i}"), 1.0)).collect();
        world.unfit = world.offers.iter().map(|offer| offer.key.clone()).collect();
    });
    let record = with(|_| {}, &fake, home.path()).await;
    closed_and_clean(&fake, &record, "all unfit");
    assert_eq!(fake.world.lock().unwrap().creates, 3);
    let Some(Ending::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
    assert!(
        trouble.message.starts_with("3 of 9 offers were tried") && trouble.message.contains("0 GPUs"),
        "{trouble:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn killed_anywhere_while_a_host_is_exchanged_the_run_still_completes() {
    let runs = sweep_with(
        Fault::CrashAfter,
        None,
        |world| world.unfit = vec!["a".into()],
        |fake, lives, what| {
            let record = last(lives);
            closed_and_clean(fake, record, what);
            assert_eq!(record.state.ending(), Some(&Ending::Completed), "{what}");
        },
    );
    assert!(runs.await > 15);
}

#[tokio::test(start_paused = true)]
async fn the_workers_own_words_end_the_run() {
    let (fake, home) = (Fake::new(), home());
    let failure = Failure { kind: FailureKind::Corpus, message: "no text".into(), hint: Some("give some".into()) };
    fake.set(|world| world.outcome = Some(Outcome::Failed(failure.clone())));
    let record = with(|_| {}, &fake, home.path()).await;
    assert_eq!(record.state.ending(), Some(&Ending::WorkerFailed { failure }));
    assert!(record.state.results().is_some_and(|results| !results.complete));
    assert!(fake.world.lock().unwrap().machines.is_empty());
}

#[tokio::test(start_paused = true)]
async fn damaged_results_are_never_called_complete() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|world| world.damage = true);
    let record = with(|_| {}, &fake, home.path()).await;
    let Some(Ending::Failed { trouble }) = record.state.ending() else { panic!("{:?}", record.state) };
    assert!(trouble.message.contains(files::RESULTS));
    assert!(record.state.results().is_some_and(|r| !r.complete && r.folder.ends_with(".partial")));
}

#[test]
fn the_same_work_has_the_same_key() {
    use outliers_protocol::{CorpusSource, JobSpec, ModelSource};
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text");
    std::fs::write(&text, "one").unwrap();
    let mut job = JobSpec::new(ModelSource::Folder { path: "/m".into() });
    job.corpus.source = CorpusSource::Files(vec![text.to_string_lossy().into_owned()]);
    let key = JobIdentity::of(&job).unwrap().key("local");
    assert_eq!(key, JobIdentity::of(&job).unwrap().key("local"));
    assert_ne!(key, JobIdentity::of(&job).unwrap().key("cloud"));
    std::fs::write(&text, "two").unwrap();
    assert_ne!(key, JobIdentity::of(&job).unwrap().key("local"));
    std::fs::remove_file(&text).unwrap();
    assert!(JobIdentity::of(&job).is_err());
}

/// What another process finds: strays go, an abandoned run's instance stays until its time is up, then it is salvaged.
#[tokio::test]
async fn recovery_ends_strays_and_expired_runs_and_nothing_else() {
    use crate::broker::{Broker, Lease, LeaseTag};
    use crate::units::Bytes;

    let (fake, home) = (Fake::new(), home());
    fake.set(|world| {
        world.endless = true;
        world.max_duration_s = 3;
        world.visibility = 0;
    });
    let ledger = Ledger::open(&home.path().join("state")).unwrap();
    // Killed while the worker runs.
    let (plain, ..) = happy().await;
    let follow = plain.world.lock().unwrap().effects.iter().position(|name| *name == "follow").unwrap();
    fake.set(|world| world.armed = vec![(follow, Fault::CrashBefore)]);
    assert!(matches!(life(&fake, home.path()).await, Life::Killed));
    let stray = LeaseTag {
        owner: ledger.owner().into(),
        run: "unknown".into(),
        nonce: "n".into(),
        deadline: now_ms() / 1000 + 3,
    };
    let tags = [stray.to_string(), "outliers-somebody-unknown-n-1".to_owned()];
    for tag in &tags {
        let lease = Lease { tag: tag.parse().unwrap(), ssh_public_key: "ssh-fake".into(), disk: Bytes(0) };
        fake.create(&super::fake::offer("a", 1.0), &lease).await.unwrap();
    }
    let names = || -> Vec<String> { fake.world.lock().unwrap().machines.values().map(|m| m.name.clone()).collect() };
    assert_eq!(names().len(), 3);

    recover(&ledger, fake.ports(&fake.clouds()), &|_| {}).await.unwrap();
    assert_eq!(names().len(), 2, "the stray is gone, the abandoned run's instance and the foreign one are not");
    assert!(!names().contains(&tags[0]) && names().contains(&tags[1]));

    tokio::time::sleep(Duration::from_secs(3)).await;
    recover(&ledger, fake.ports(&fake.clouds()), &|_| {}).await.unwrap();
    assert_eq!(names(), [tags[1].clone()]);
    let run = ledger.find("last").unwrap();
    assert_eq!(run.state.ending(), Some(&Ending::Deadline));
    assert!(run.state.results().is_some_and(|results| !results.complete), "what there was came home");
}

#[tokio::test(start_paused = true)]
async fn recovery_marks_what_went_away_and_never_rents() {
    let (fake, home) = (Fake::new(), home());
    let (plain, ..) = happy().await;
    let effects = plain.world.lock().unwrap().effects.clone();
    let ledger = Ledger::open(&home.path().join("state")).unwrap();
    let follow = effects.iter().position(|name| *name == "follow").unwrap();
    fake.set(|world| world.armed = vec![(follow, Fault::CrashBefore)]);
    assert!(matches!(life(&fake, home.path()).await, Life::Killed));
    fake.set(|world| world.machines.clear());
    recover(&ledger, fake.ports(&fake.clouds()), &|_| {}).await.unwrap();
    assert_eq!(ledger.find("last").unwrap().state.ending(), Some(&Ending::InstanceLost));
    assert_eq!(fake.world.lock().unwrap().creates, 1);

    // A create call that never happened, and whose run's time is up: closed, not created again.
    let (fake, home) = (Fake::new(), self::home());
    let ledger = Ledger::open(&home.path().join("state")).unwrap();
    let create = effects.iter().position(|name| *name == "create").unwrap() + 1;
    fake.set(|world| {
        world.armed = vec![(create, Fault::CrashBefore)];
        world.max_duration_s = 0;
    });
    assert!(matches!(life(&fake, home.path()).await, Life::Killed));
    recover(&ledger, fake.ports(&fake.clouds()), &|_| {}).await.unwrap();
    let run = ledger.find("last").unwrap();
    assert_eq!((run.state.word(), run.state.ending()), ("closed", Some(&Ending::Deadline)));
    assert_eq!(fake.world.lock().unwrap().creates, 0);
}

/// Runs of one survey, side by side in one process.
async fn side_by_side(fake: &Fake, home: &Path, budget: f64) -> Vec<RunRecord> {
    let ledger = Ledger::open(&home.join("state")).unwrap();
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
async fn parallel_runs_wait_for_the_budget_they_share_instead_of_passing_it() {
    for (budget, at_once) in [(1.2, 1), (2.5, 2), (99.0, 3)] {
        let (fake, home) = (Fake::new(), home());
        let runs = side_by_side(&fake, home.path(), budget).await;
        for (run, place) in runs.iter().zip(["a", "b", "c"]) {
            assert_eq!(run.state.ending(), Some(&Ending::Completed), "{budget}");
            let folder = home.path().join("results/s").join(place);
            assert_eq!(run.state.results().unwrap().folder, folder.to_string_lossy());
            holds(&folder, &run.id).unwrap();
        }
        assert_eq!(fake.world.lock().unwrap().most_alive, at_once, "of a budget of {budget}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_budget_that_never_pays_for_a_run_ends_it_before_anything_is_rented() {
    let (fake, home) = (Fake::new(), home());
    for run in side_by_side(&fake, home.path(), 1.0).await {
        let Some(Ending::Failed { trouble }) = run.state.ending() else { panic!("{:?}", run.state) };
        assert_eq!(trouble.kind, TroubleKind::Budget);
    }
    assert_eq!(fake.world.lock().unwrap().creates, 0);
}

#[tokio::test(start_paused = true)]
async fn a_survey_of_which_one_run_is_stopped_waiting_ends() {
    let (fake, home) = (Fake::new(), home());
    fake.set(|world| world.endless = true);
    let stop = async {
        while fake.world.lock().unwrap().ours().count() == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        fake.stop.send_replace(Stop::Now);
    };
    let (runs, ()) = tokio::join!(side_by_side(&fake, home.path(), 1.2), stop);
    assert!(runs.iter().all(|run| run.state.ending() == Some(&Ending::Interrupted)), "{runs:?}");
    let world = fake.world.lock().unwrap();
    assert_eq!((world.creates, world.ours().count()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn workers_of_a_batch_start_a_pause_apart() {
    let (fake, home, begun) = (Fake::new(), home(), Instant::now());
    let ledger = Ledger::open(&home.path().join("state")).unwrap();
    let (clouds, turns) = (fake.clouds(), Turns::new(Duration::from_secs(20)));
    let ports = Ports { turns: Some(&turns), ..fake.ports(&clouds) };
    let launched = std::sync::Mutex::new(Vec::new());
    let on = |event| {
        if let DeployEvent::State(state) = event
            && matches!(*state, RunState::Launched { .. })
        {
            launched.lock().unwrap().push(begun.elapsed().as_secs() / 20);
        }
    };
    let drive = |_| Driver::new(ledger.plan(&spec(home.path())).unwrap(), ports, fake.stop.subscribe(), &on).drive();
    for run in futures::future::join_all((0..3).map(drive)).await {
        assert_eq!(run.unwrap().state.ending(), Some(&Ending::Completed));
    }
    assert_eq!(*launched.lock().unwrap(), [0, 1, 2]);
}
