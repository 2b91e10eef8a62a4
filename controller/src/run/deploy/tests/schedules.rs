//! Random schedules of faults: clouds of every kind, up to six faults at any effect, and processes
//! that die and restart hours later, until the run is over. The runtime's clock is paused and
//! advanced, so that hours take no time and the same seed gives the same trace.
//!
//! `tests/schedules.sh --schedules N --seed S` runs more of them, or repeats one: schedule `i` of
//! seed `S` is schedule 0 of seed `S + i`. `tests/faults.sh` applies known bugs to a copy of the
//! program and counts the schedules until each is caught.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use outliers_tests::tell;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::fake::{Fake, Fault, Simulation, now_ms, offer, open_ledger, set_clock};
use super::{ProcessOutcome, closed_and_clean, home, life};
use crate::run::deploy::*;
use crate::run::ledger::{LedgerEntry, Records};
use crate::run::reconcile::{Action, Stray};
use crate::units::{Usd, UsdPerHour};

/// Default number of schedules.
const SCHEDULES: u64 = 2000;
/// Default seed. It is constant, so that a commit has one result.
const SEED: u64 = 1;
/// Number of schedules that run twice.
const TWICE: u64 = 200;
/// Maximum processes of a run: each fault costs at most one, plus the last one.
const MAX_LIVES: usize = 12;
/// Effects over which faults are spread: about the number without faults.
const EFFECTS: usize = 30;
/// 2026-01-01 in milliseconds, an arbitrary constant.
const BEGIN_MS: u64 = 1_767_225_600_000;
/// Seconds from the death of a controller to the next one.
const GAPS: [u64; 5] = [0, 30, 1200, 3 * 3600, 9 * 3600];

/// Seconds by which the cloud's clock may be ahead of this machine's. With hours of skew nothing
/// is rented.
const SKEWS: [i64; 3] = [200, 7 * 3600, -7 * 3600];

const FAULTS: [Fault; 14] = [
    Fault::CrashBefore,
    Fault::CrashAfter,
    Fault::Fails,
    Fault::AnswerLost,
    Fault::Preempted,
    Fault::Stop,
    Fault::PriceRises,
    Fault::Refuses,
    Fault::Odd,
    Fault::Hangup,
    Fault::StateFull,
    Fault::ResultsFull,
    Fault::Unreadable,
    Fault::ClockJumps,
];

/// Result of a schedule.
#[derive(Debug, PartialEq)]
struct Played {
    /// All effects, events and the outcome.
    trace: Vec<String>,
    /// Faults that occurred, with their effects.
    struck: Vec<(Fault, &'static str)>,
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is `{text}`, which is no number")))
}

/// Parses `OUTLIERS_SEED`: a number, or `random`.
fn first_seed() -> u64 {
    match std::env::var("OUTLIERS_SEED").as_deref() {
        Ok("random") => rand::rng().random_range(0..1 << 32),
        _ => number("OUTLIERS_SEED").unwrap_or(SEED),
    }
}

/// Sets up a cloud. Every fourth has one fault and no other problems.
fn prepare(simulation: &mut Simulation, random: &mut StdRng) {
    simulation.self_destruct = random.random_bool(0.5);
    if random.random_bool(0.05) {
        simulation.clock_ahead = SKEWS[random.random_range(0..SKEWS.len())];
    }
    simulation.max_duration_s = [1800, 7200, 6 * 3600][random.random_range(0..3)];
    (0..random.random_range(0..4)).for_each(|number| simulation.add_foreign(number));
    if random.random_bool(0.25) {
        simulation.visibility = random.random_range(0..3);
        simulation.armed = vec![(random.random_range(1..EFFECTS / 2), FAULTS[random.random_range(0..FAULTS.len())])];
    } else {
        trouble(simulation, random);
    }
    // Of the first offer, to the cent above; or more.
    let first = simulation.offers[0].price.cost_up_to_cents(Duration::from_secs(simulation.max_duration_s));
    simulation.agreed = [None, Some(first), Some(Usd::from_dollars(first.dollars() * 2.5))][random.random_range(0..3)];
}

fn trouble(simulation: &mut Simulation, random: &mut StdRng) {
    let offers = random.random_range(1..6);
    simulation.offers = (0..offers).map(|i| offer(&format!("o{i}"), f64::from(i + 1))).collect();
    let pick = |random: &mut StdRng, share: f64| -> Vec<String> {
        (0..offers).filter(|_| random.random_bool(share)).map(|i| format!("o{i}")).collect()
    };
    simulation.sold_out = pick(random, 0.2);
    simulation.unfit = pick(random, 0.1);
    simulation.visibility = random.random_range(0..3);
    simulation.endless = random.random_bool(0.05);
    simulation.deaths = if random.random_bool(0.1) { random.random_range(1..4) } else { 0 };
    simulation.damage = random.random_bool(0.05);
    match random.random_range(0..10) {
        0..3 => {
            let hours = simulation.max_duration_s as f64 / 3600.0;
            simulation.budget = Some(Usd::from_dollars(hours * random.random_range(0.8..6.0)));
        }
        // A bill above the offer's price cannot be budgeted.
        3 => simulation.price_on_arrival = Some(UsdPerHour::from_dollars(random.random_range(0.5..9.0))),
        _ => {}
    }
    for _ in 0..random.random_range(1..7) {
        let fault = FAULTS[random.random_range(0..FAULTS.len())];
        simulation.armed.push((random.random_range(1..EFFECTS), fault));
    }
}

fn is_hours_off(simulation: &Simulation) -> bool {
    simulation.clock_ahead.abs() > 3600
}

/// Whether the run must complete: at most one fault, and none that ends the run.
fn must_complete(simulation: &Simulation) -> bool {
    let harmless = |(_, fault): &(usize, Fault)| {
        use Fault::{AnswerLost, CrashAfter, CrashBefore, Fails, Odd, Refuses, Unreadable};
        matches!(fault, CrashBefore | CrashAfter | Fails | AnswerLost | Refuses | Odd | Unreadable)
    };
    let serves = |offer: &Offer| !simulation.sold_out.contains(&offer.key) && !simulation.unfit.contains(&offer.key);
    // The cost of an unfit instance may leave too little for the next.
    let affordable = simulation.agreed.is_none() || simulation.sold_out.is_empty() && simulation.unfit.is_empty();
    simulation.armed.len() <= 1
        && !is_hours_off(simulation)
        && affordable
        && simulation.armed.iter().all(harmless)
        && simulation.offers.iter().any(serves)
        && simulation.unfit.len() <= 2
        && !simulation.endless
        && !simulation.damage
        && simulation.deaths <= 2
        && simulation.budget.is_none()
        && simulation.price_on_arrival.is_none()
}

/// Runs `reap` in another process, as from a timer.
async fn bystander(fake: &Fake, home: &Path) {
    let ledger = open_ledger(&home.join("state"));
    let clouds = fake.clouds();
    let looks_after = recover(&ledger, fake.ports(&clouds), &|_| {});
    tokio::select! {
        biased;
        () = fake.crashed.notified() => {}
        _ = looks_after => {}
    }
}

/// Another process cannot read the run's row: it must name the run and leave its instance until
/// its deadline.
async fn onlooker(fake: &Fake, home: &Path) {
    let ledger = open_ledger(&home.join("state"));
    let Records { runs, unreadable } = ledger.records().expect("one row is not the ledger");
    assert_eq!((runs.len(), unreadable.len()), (0, 1), "{unreadable:?}");
    let clouds = fake.clouds();
    let cloud = clouds.iter().next().expect("there is one");
    let reconciliation = tokio::select! {
        biased;
        () = fake.crashed.notified() => return,
        reconciliation = reconcile_cloud(Some(&ledger), cloud) => reconciliation,
    };
    let in_time =
        |action: &Action| matches!(action, Action::LeaveAlone { .. } | Action::Terminate { why: Stray::Expired, .. });
    // A cloud that does not answer yields no actions.
    let actions = reconciliation.map(|reconciliation| reconciliation.actions).unwrap_or_default();
    assert!(actions.iter().all(in_time), "{actions:?}");
}

/// Plays one schedule to its end.
async fn schedule(seed: u64) -> Played {
    set_clock(BEGIN_MS);
    let mut random = StdRng::seed_from_u64(seed);
    let (mut fake, home) = (Fake::new(), home());
    fake.timeouts = Timeouts::CLOUD;
    fake.set(|simulation| {
        prepare(simulation, &mut random);
        simulation.ledger = home.path().join("state/ledger.db");
    });
    let (must_complete, hours_off) = {
        let simulation = fake.simulation.lock().expect("nobody panicked");
        (must_complete(&simulation), is_hours_off(&simulation))
    };
    let (mut lives, mut hurried) = (0, true);
    let record = loop {
        let last = life(&fake, home.path()).await;
        // A new process has received no Ctrl-C.
        fake.stop.send_replace(Stop::Go);
        if let ProcessOutcome::Finished(record) = last {
            break record;
        }
        lives += 1;
        assert!(lives < MAX_LIVES, "no end: {last:?}");
        let gap = Duration::from_secs(GAPS[random.random_range(0..GAPS.len())]);
        hurried &= gap < Duration::from_secs(60);
        tokio::time::sleep(gap).await;
        fake.set(|simulation| {
            simulation.make_room(None);
            simulation.pass(gap);
        });
        if random.random_bool(0.3) {
            // The process may have ended a run during the termination of its instance: then no
            // other instance is rented.
            hurried = false;
            let unreadable = fake.simulation.lock().expect("nobody panicked").unreadable;
            if unreadable {
                onlooker(&fake, home.path()).await;
            } else {
                bystander(&fake, home.path()).await;
            }
        }
        fake.set(Simulation::repair_row);
    };
    fake.set(Simulation::repair_row);
    let (rented, jumped) = {
        let simulation = fake.simulation.lock().expect("nobody panicked");
        // A jump may correct a clock that was hours behind.
        (simulation.creates > 0, simulation.struck.iter().any(|(fault, _)| *fault == Fault::ClockJumps))
    };
    assert!(!(hours_off && rented) || jumped, "by such a clock nobody rents");
    closed_and_clean(&fake, &record, "in the end");
    honest(&fake, &record);
    if must_complete && hurried {
        let effects = &fake.simulation.lock().expect("nobody panicked").effects;
        assert_eq!(record.state.ending(), Some(&RunOutcome::Completed), "nothing spoke against it: {effects:?}");
    }
    agreed(&fake, home.path()).await;
    played(&fake, &record)
}

/// Checks the record: the outcome is the one decided first, losses are named, costs are not
/// understated, and the budget is kept.
fn honest(fake: &Fake, record: &RunRecord) {
    let simulation = fake.simulation.lock().expect("nobody panicked");
    let mut state = RunState::initial();
    for entry in &record.events {
        let next = crate::run::next(&state, &entry.event).expect("it was written so");
        let stands = state.ending().is_none_or(|ending| next.ending() == Some(ending));
        assert!(stands, "{:?} became {:?}", state.ending(), next.ending());
        state = next;
    }
    let RunState::Closed { results, loss, .. } = &record.state else { unreachable!("it is closed") };
    let launched = record.events.iter().any(|entry| entry.event == RunEvent::Launched);
    assert!(!launched || results.is_some() || loss.is_some(), "something was lost, and nobody says so");
    let cost = record.cost(now_ms());
    // An instance that no list showed counts at its offer's price until its time limit.
    let unseen = |entry: &LedgerEntry| matches!(entry.event, RunEvent::NotCreated { unseen: true, .. });
    let as_given = simulation.price_on_arrival.is_none() && simulation.self_destruct;
    if as_given || !record.events.iter().any(unseen) {
        assert!(cost >= simulation.billed, "it cost {}, and {cost} is said", simulation.billed);
    }
    if let Some(budget) = simulation.budget {
        assert!(simulation.kept <= budget, "it cost {}, the budget was {budget}", simulation.kept);
    }
}

/// Checks that ledger and cloud agree: another comparison yields no actions.
async fn agreed(fake: &Fake, home: &Path) {
    let ledger = open_ledger(&home.join("state"));
    fake.set(|simulation| simulation.armed.clear());
    for cloud in fake.clouds().iter() {
        let reconciliation = reconcile_cloud(Some(&ledger), cloud).await.expect("nothing fails any more");
        let ours = reconciliation.listed.iter().filter(|instance| instance.id.0.starts_with('i')).count();
        let idle = |action: &Action| matches!(action, Action::LeaveAlone { .. });
        assert!(ours == 0 && reconciliation.actions.iter().all(idle), "{reconciliation:?}");
    }
}

fn played(fake: &Fake, record: &RunRecord) -> Played {
    let simulation = fake.simulation.lock().expect("nobody panicked");
    let effects = simulation.effects.iter().map(|effect| (*effect).to_owned());
    let events = record.events.iter().map(|entry| format!("{} {}", entry.at_ms, entry.event.word()));
    let ending = record.state.ending().map(ToString::to_string);
    Played { trace: effects.chain(events).chain(ending).collect(), struck: simulation.struck.clone() }
}

/// Plays one schedule on this thread.
///
/// # Errors
/// The first failed assertion.
fn play(seed: u64) -> Result<Played, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    let runtime = runtime.expect("a runtime of one thread");
    let played = catch_unwind(AssertUnwindSafe(|| runtime.block_on(schedule(seed))));
    played.map_err(|panic| {
        let said = panic.downcast_ref::<String>().cloned();
        said.or_else(|| panic.downcast_ref::<&str>().map(|said| (*said).to_owned())).unwrap_or_default()
    })
}

/// Plays every `step`-th of `count` schedules, beginning with `first`. Returns the faults that
/// occurred.
///
/// # Errors
/// The first schedule that failed, or whose repetition differed, with the reason.
fn play_share(seed: u64, first: u64, count: u64, step: usize) -> Result<Vec<(Fault, &'static str)>, (u64, String)> {
    let mut struck = Vec::new();
    for i in (first..count).step_by(step) {
        let played = play(seed + i).map_err(|why| (i, why))?;
        if i < TWICE && play(seed + i).as_ref() != Ok(&played) {
            return Err((i, "it played otherwise the second time".to_owned()));
        }
        struck.extend(played.struck);
    }
    Ok(struck)
}

#[test]
fn random_fault_schedules_end_clean_and_are_reproducible() {
    let count = number("OUTLIERS_SCHEDULES").unwrap_or(SCHEDULES);
    let seed = first_seed();
    tell(&format!("{count} schedules from seed {seed}"));
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let shares: Vec<_> = std::thread::scope(|scope| {
        let share = |first: usize| scope.spawn(move || play_share(seed, first as u64, count, threads));
        let shares: Vec<_> = (0..threads).map(share).collect();
        shares.into_iter().map(|share| share.join().expect("panics of schedules are caught")).collect()
    });
    // Each share stops at its first failure. The earliest of these is the first of all, for any
    // number of threads.
    if let Some((i, why)) = shares.iter().filter_map(|share| share.as_ref().err()).min() {
        panic!("schedule {} (seed {}): {why}", i + 1, seed + i);
    }
    let struck: Vec<(Fault, &'static str)> = shares.into_iter().flatten().flatten().collect();
    print_coverage(&struck);
    assert!(struck.len() as u64 >= count, "faults that do not strike test nothing");
}

/// Prints how often each fault occurred at each effect.
fn print_coverage(struck: &[(Fault, &'static str)]) {
    let mut table: BTreeMap<&str, BTreeMap<String, u32>> = BTreeMap::new();
    for (fault, effect) in struck {
        *table.entry(effect).or_default().entry(format!("{fault:?}")).or_default() += 1;
    }
    tell(&format!("{} faults struck", struck.len()));
    for (effect, faults) in table {
        let faults: Vec<String> = faults.iter().map(|(fault, times)| format!("{fault} {times}")).collect();
        tell(&format!("{effect:>12}: {}", faults.join(", ")));
    }
}
