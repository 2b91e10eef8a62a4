//! Random schedules: worlds of every kind, up to six faults at any effect, processes that die and come back, until it is over.
//!
//! `OUTLIERS_SCHEDULES=N OUTLIERS_SEED=S cargo test -p outliers --lib schedules` runs more of them, or one again: schedule `i` of seed
//! `S` is schedule 0 of seed `S + i`.

use std::path::Path;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::fake::{Fake, Fault, World, offer};
use super::tests::{Life, closed_and_clean, home, life};
use super::*;
use crate::ledger::Ledger;
use crate::units::UsdPerHour;

/// Without being asked for more.
const SCHEDULES: u64 = 2000;
/// Processes after which a run must have come to its end: each fault costs at most one, and one is the last.
const MOST_LIVES: usize = 12;
/// Effects among which faults are spread: a path without faults has about as many.
const EFFECTS: usize = 30;

const FAULTS: [Fault; 6] =
    [Fault::CrashBefore, Fault::CrashAfter, Fault::Fails, Fault::AnswerLost, Fault::Preempted, Fault::Stop];

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn prepare(world: &mut World, random: &mut StdRng) {
    let offers = random.random_range(1..6);
    world.offers = (0..offers).map(|i| offer(&format!("o{i}"), f64::from(i + 1))).collect();
    let pick = |random: &mut StdRng, share: f64| -> Vec<String> {
        (0..offers).filter(|_| random.random_bool(share)).map(|i| format!("o{i}")).collect()
    };
    world.sold_out = pick(random, 0.2);
    world.unfit = pick(random, 0.1);
    world.visibility = random.random_range(0..3);
    world.endless = random.random_bool(0.05);
    world.deaths = if random.random_bool(0.1) { random.random_range(1..4) } else { 0 };
    world.damage = random.random_bool(0.05);
    world.max_duration_s = if world.endless { 2 } else { 3600 };
    if random.random_bool(0.1) {
        world.price_on_arrival = Some(UsdPerHour::from_dollars(random.random_range(0.5..9.0)));
    }
    for _ in 0..random.random_range(1..7) {
        let fault = FAULTS[random.random_range(0..FAULTS.len())];
        world.armed.push((random.random_range(1..EFFECTS), fault));
    }
}

/// One schedule to its end; how many faults struck.
async fn schedule(seed: u64) -> usize {
    let mut random = StdRng::seed_from_u64(seed);
    let (fake, home) = (Fake::new(), home());
    fake.set(|world| prepare(world, &mut random));
    let mut lives = Vec::new();
    let record = loop {
        let last = life(&fake, home.path()).await;
        // A new process has heard no Ctrl-C.
        fake.stop.send_replace(Stop::Go);
        match last {
            Life::Finished(record) => break record,
            other => lives.push(other),
        }
        assert!(lives.len() < MOST_LIVES, "seed {seed}: no end: {lives:?}");
    };
    closed_and_clean(&fake, &record, &format!("seed {seed}"));
    agreed(&fake, home.path(), seed).await;
    fake.world.lock().expect("no test panicked while it held the world").fired
}

/// Ledger and cloud agree: another look finds nothing to do.
async fn agreed(fake: &Fake, home: &Path, seed: u64) {
    let ledger = Ledger::open(&home.join("state")).expect("it was open before");
    fake.set(|world| world.armed.clear());
    for cloud in fake.clouds().iter() {
        let looked = look(&ledger, cloud).await.expect("nothing fails any more");
        assert!(looked.listed.is_empty() && looked.actions.is_empty(), "seed {seed}: {looked:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_random_schedule_ends_clean() {
    let count = number("OUTLIERS_SCHEDULES").unwrap_or(SCHEDULES);
    let seed = number("OUTLIERS_SEED").unwrap_or_else(|| rand::rng().random_range(0..1 << 32));
    println!("{count} schedules from seed {seed}");
    let mut struck = 0;
    for first in (0..count).step_by(64) {
        let batch = (first..count.min(first + 64)).map(|i| tokio::spawn(schedule(seed + i)));
        for schedule in futures::future::join_all(batch).await {
            struck += schedule.expect("the panic above names the seed");
        }
    }
    println!("{struck} faults struck");
    assert!(struck as u64 >= count, "faults that do not strike test nothing");
}
