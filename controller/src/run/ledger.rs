//! The durable record of runs: an intent log for recovery, not a debug log.
//!
//! One SQLite file, `ledger.db`, contains the plan of each run and all its events, append-only. A
//! run's state is the replay of its events through [`run::next`]. It contains no secrets.
//!
//! Any number of processes may read. The process that drives a run holds the lock on
//! `runs/<run>/lock`, which the operating system releases when the process dies. A run that is not
//! at rest and whose lock is free is *abandoned*: another process should take it over.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::Rng;
use rusqlite::{Connection, ErrorCode, OptionalExtension, params};
use serde::{Deserialize, Serialize};

use crate::cloud::broker::{LeaseTag, Offer, RunTime};
use crate::files::{MAX_FILE_BYTES, absent, create_private_folder, is_taken, make_private, read_text, write_whole};
use crate::run::{self, IllegalEvent, Intent, RunEvent, RunSpec, RunState};
use crate::units::{GpuTime, Usd, UsdPerHour};

mod repair;

pub use repair::Repaired;

/// Version of the tables and their contents. An older program refuses a newer ledger.
const SCHEMA: i64 = 6;

/// Name of a run's record in its results' folder.
pub const RUN_FILE: &str = "run.json";

/// Name of the SQLite file.
const FILE: &str = "ledger.db";
/// File beside the ledger with the owner's name. It survives the loss of the ledger, as instances
/// do.
const OWNER_FILE: &str = "owner";
/// Maximum bytes of that file.
const MAX_OWNER: u64 = 4096;

/// How long a writer waits for another.
const BUSY: Duration = Duration::from_secs(20);

/// Attempts to take a lock before another process counts as its holder.
const LOCK_ATTEMPTS: u32 = 10;
/// Pause between such attempts.
const LOCK_PAUSE: Duration = Duration::from_millis(20);

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS runs (
        id TEXT PRIMARY KEY, created_at_ms INTEGER NOT NULL, job_key TEXT NOT NULL, spec TEXT NOT NULL
    ) STRICT;
    CREATE TABLE IF NOT EXISTS events (
        run TEXT NOT NULL REFERENCES runs (id), seq INTEGER NOT NULL, at_ms INTEGER NOT NULL, event TEXT NOT NULL,
        PRIMARY KEY (run, seq)
    ) STRICT;
";

/// A wall clock: milliseconds since the Unix epoch.
pub type Clock = fn() -> u64;

/// The ledger of one state folder.
#[derive(Clone)]
pub struct Ledger {
    connection: Arc<Mutex<Connection>>,
    folder: PathBuf,
    owner: String,
    clock: Clock,
}

/// A run in the ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Lower-case letters and digits.
    pub id: String,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: u64,
    /// The job and its limits.
    pub spec: RunSpec,
    /// Events, oldest first.
    pub events: Vec<LedgerEntry>,
    /// The replay of `events`.
    pub state: RunState,
}

/// An event with its time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LedgerEntry {
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// The event.
    #[serde(flatten)]
    pub event: RunEvent,
}

/// The contents of the ledger.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Records {
    /// Oldest first.
    pub runs: Vec<RunRecord>,
    /// Unreadable runs. Only their ids are known.
    pub unreadable: Vec<Unreadable>,
}

/// A run whose record cannot be read. Its instances are found by its id in their tags.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unreadable {
    /// Its id.
    pub run: String,
    /// The error.
    pub why: String,
}

/// How long an instance counts: earlier starts, and the present one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct BilledTime {
    ended_ms: u64,
    /// `None`: it does not count now.
    since_ms: Option<u64>,
}

impl BilledTime {
    fn since(at_ms: u64) -> Self {
        Self { ended_ms: 0, since_ms: Some(at_ms) }
    }

    /// It runs at that time, if not before.
    fn runs_at(self, at_ms: u64) -> Self {
        Self { since_ms: self.since_ms.or(Some(at_ms)), ..self }
    }

    fn by(time: RunTime) -> Self {
        let since_ms = time.since.map(|since| since.saturating_mul(1000));
        Self { ended_ms: time.ended_s.saturating_mul(1000), since_ms }
    }

    fn until(self, to_ms: u64) -> Duration {
        let present = self.since_ms.map_or(0, |since_ms| to_ms.saturating_sub(since_ms));
        Duration::from_millis(self.ended_ms.saturating_add(present))
    }
}

/// An instance that bills.
#[derive(Clone, Copy, Debug, PartialEq)]
struct OpenBill {
    counted: BilledTime,
    price: UsdPerHour,
}

impl OpenBill {
    fn until(self, to_ms: u64) -> Usd {
        self.price.cost(self.counted.until(to_ms))
    }
}

/// Cost of a run so far and from now on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CostMeter {
    gone: Usd,
    present: Option<OpenBill>,
    /// Unix seconds until which its instance may bill, if one exists or may exist.
    pub deadline: Option<u64>,
}

impl CostMeter {
    /// As [`RunRecord::cost`].
    pub fn cost(&self, now_ms: u64) -> Usd {
        self.gone + self.present.map_or(Usd::ZERO, |bill| bill.until(now_ms))
    }
}

/// The state of a budget of money or of GPU time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetStatus<Amount = Usd> {
    /// The whole budget.
    pub budget: Amount,
    /// The part that is neither spent nor reserved. The reserved part is what existing and
    /// possible instances may cost until their time limits.
    pub left: Amount,
    /// The part that would be left if the other active runs cost nothing more.
    pub at_best: Amount,
}

impl RunRecord {
    /// Cost of the run's instances until they were gone, or until `now_ms`, computed from prices
    /// and times; not the cloud's bill. Never less than the price times the longest possible
    /// lifetime of the instances. An instance that no list showed, after an unanswered create
    /// call, counts for its longest possible lifetime.
    pub fn cost(&self, now_ms: u64) -> Usd {
        self.meter().cost(now_ms)
    }

    /// The cost as a function of time.
    pub fn meter(&self) -> CostMeter {
        let (gone, present) = self.bills();
        CostMeter { gone, present, deadline: self.ends_at() }
    }

    /// Maximum cost of the run until the deadline of its existing or possible instance: this part
    /// of a budget is reserved. At most the agreed amount, which limits the run, unless the cost
    /// already exceeds it.
    pub fn at_most(&self, now_ms: u64) -> Usd {
        let most = self.at_most_by_prices(now_ms);
        self.spec.quote.ceiling.map_or(most, |agreed| most.min(agreed.max(self.cost(now_ms))))
    }

    fn at_most_by_prices(&self, now_ms: u64) -> Usd {
        let (gone, present) = self.bills();
        let agreed = |offer: &Offer| self.spec.highest_price(offer);
        let present = match &self.state {
            RunState::Creating { intent, .. } => {
                let counted = self.since_create(&intent.offer, self.changed_at_ms());
                Some(OpenBill { counted, price: agreed(&intent.offer) })
            }
            // The final price is known when the instance is up.
            RunState::Rented { rental } => {
                present.map(|bill| OpenBill { price: bill.price.max(agreed(&rental.offer)), ..bill })
            }
            _ => present,
        };
        gone + present.map_or(Usd::ZERO, |bill| bill.price.cost(self.time_at_most(bill.counted, now_ms)))
    }

    /// What counts of the instance that was asked for last, by the create call alone.
    fn since_create(&self, offer: &Offer, asked_ms: u64) -> BilledTime {
        if offer.queued { BilledTime::default() } else { BilledTime::since(asked_ms) }
    }

    /// What counts when the time of the present instance is up, or now if that is later. One that
    /// waits in a queue has all of its time yet.
    fn time_at_most(&self, counted: BilledTime, now_ms: u64) -> Duration {
        let queued = self.state.offer().is_some_and(|offer| offer.queued);
        let ends_ms = match (queued, counted.since_ms) {
            (true, None) if self.is_in_queue() => return counted.until(0).saturating_add(self.spec.limit()),
            (true, None) => now_ms,
            (true, Some(since_ms)) => match self.run_time().and_then(|time| time.until) {
                Some(until) => until.saturating_mul(1000),
                None => since_ms.saturating_add(self.spec.max_duration_s.saturating_mul(1000)),
            },
            (false, _) => self.deadline().unwrap_or_default() * 1000,
        };
        counted.until(now_ms.max(ends_ms))
    }

    /// The cost of ended instances.
    pub fn spent_before(&self) -> Usd {
        self.bills().0
    }

    /// The cost at the instance's time limit if it bills `price` from the create call on.
    pub fn at_price(&self, price: UsdPerHour) -> Usd {
        let (gone, present) = self.bills();
        gone + present.map_or(Usd::ZERO, |bill| price.cost(self.time_at_most(bill.counted, 0)))
    }

    /// The tags of all its create calls, oldest first. A copy of its ledger elsewhere may have made
    /// others.
    pub fn tags(&self) -> impl Iterator<Item = &LeaseTag> {
        self.events.iter().filter_map(|entry| match &entry.event {
            RunEvent::Creating { intent } => Some(&intent.tag),
            _ => None,
        })
    }

    /// Time of the last recorded create call, in milliseconds since the Unix epoch.
    pub fn asked_at_ms(&self) -> Option<u64> {
        let asked = |entry: &&LedgerEntry| matches!(entry.event, RunEvent::Creating { .. });
        self.events.iter().rev().find(asked).map(|entry| entry.at_ms)
    }

    /// The cost of ended instances, and the bill of the current one.
    fn bills(&self) -> (Usd, Option<OpenBill>) {
        let mut gone = Usd::ZERO;
        let mut present: Option<OpenBill> = None;
        let mut state = RunState::initial();
        let mut asked_at = self.created_at_ms;
        for entry in &self.events {
            let Ok(new) = run::next(&state, &entry.event) else { break };
            match (&entry.event, new.rental()) {
                (RunEvent::Creating { .. }, _) => asked_at = entry.at_ms,
                // The instance may have existed and billed since the first call: a controller may
                // have died in between.
                (RunEvent::Created { .. }, Some(rental)) => {
                    let counted = self.since_create(&rental.offer, asked_at);
                    present = Some(OpenBill { counted, price: rental.price });
                }
                (RunEvent::Reached { .. }, Some(rental)) => {
                    let price = rental.price;
                    present = present.map(|bill| OpenBill { price, counted: bill.counted.runs_at(entry.at_ms) });
                }
                (RunEvent::Repriced { price }, _) => {
                    present = present.map(|bill| OpenBill { price: *price, ..bill });
                }
                (RunEvent::Metered { time }, _) => {
                    present = present.map(|bill| OpenBill { counted: BilledTime::by(*time), ..bill });
                }
                (RunEvent::NotCreated { unseen: true, .. }, _) => {
                    let limit_ms = asked_at.saturating_add(self.spec.max_duration_s.saturating_mul(1000));
                    let bill = state
                        .offer()
                        .map(|offer| OpenBill { counted: self.since_create(offer, asked_at), price: offer.price });
                    gone = gone + bill.map_or(Usd::ZERO, |bill| bill.until(entry.at_ms.min(limit_ms)));
                }
                (RunEvent::Gone | RunEvent::Vanished, _) => {
                    gone = gone + present.take().map_or(Usd::ZERO, |bill| bill.until(entry.at_ms));
                }
                _ => {}
            }
            state = new;
        }
        (gone, present)
    }

    /// What the run's instances have had of GPUs until `now_ms`: for as long as they have run by
    /// their cloud's own record. Without one the time of an instance begins when it was first
    /// spoken to, since one that waits in a queue has no GPUs; it begins with the create call, and
    /// has no more than the time limit, where the instance was given up before that.
    pub fn gpu_time(&self, now_ms: u64) -> GpuTime {
        let (gone, present) = self.gpu_times();
        let now = present.map_or(0, |(offer, counted)| GpuTime::of(offer.gpu_count, counted.until(now_ms)).seconds());
        GpuTime::from_seconds(gone.saturating_add(now))
    }

    /// The same when the time of the instance that exists or may exist is up. One that was put back
    /// into its queue has all of its time again.
    pub fn gpu_time_at_most(&self, now_ms: u64) -> GpuTime {
        let (gone, present) = self.gpu_times();
        let most = present.map_or(0, |(offer, counted)| {
            let by_events = || self.spec.limit().max(counted.until(now_ms));
            let time = if offer.queued { self.time_at_most(counted, now_ms) } else { by_events() };
            GpuTime::of(offer.gpu_count, time).seconds()
        });
        GpuTime::from_seconds(gone.saturating_add(most))
    }

    /// GPU-seconds of instances that are gone; of the one that is there or may be, the offer and
    /// what counts of it.
    fn gpu_times(&self) -> (i64, Option<(&Offer, BilledTime)>) {
        let limit_ms = self.spec.max_duration_s.saturating_mul(1000);
        let (mut gone, mut asked_ms) = (0_i64, self.created_at_ms);
        // `None`: neither was it spoken to, nor is there a record.
        let mut counted: Option<BilledTime> = None;
        let mut state = RunState::initial();
        for entry in &self.events {
            let Ok(new) = run::next(&state, &entry.event) else { break };
            match &entry.event {
                RunEvent::Creating { .. } => (asked_ms, counted) = (entry.at_ms, None),
                RunEvent::Reached { .. } => counted = Some(counted.unwrap_or_default().runs_at(entry.at_ms)),
                RunEvent::Metered { time } => counted = Some(BilledTime::by(*time)),
                RunEvent::Gone | RunEvent::Vanished => {
                    let queued = state.offer().is_some_and(|offer| offer.queued);
                    let given_up = matches!(state, RunState::Discarding { .. }) && !queued;
                    let at_most = asked_ms.max(entry.at_ms.saturating_sub(limit_ms));
                    let counted = counted.take().or(given_up.then_some(BilledTime::since(at_most)));
                    if let (Some(offer), Some(counted)) = (state.offer(), counted) {
                        let time = GpuTime::of(offer.gpu_count, counted.until(entry.at_ms));
                        gone = gone.saturating_add(time.seconds());
                    }
                }
                _ => {}
            }
            state = new;
        }
        (gone, self.state.offer().map(|offer| (offer, counted.unwrap_or_default())))
    }

    /// The budget of this run, shared with others.
    fn budget(&self) -> Option<Usd> {
        self.spec.budget
    }

    /// Whether both spend one budget: the same run, or runs of the same survey.
    fn shares_budget_with(&self, other: &Self) -> bool {
        let survey = |run: &Self| run.spec.survey.as_ref().map(|member| member.survey.clone());
        self.id == other.id || (survey(self).is_some() && survey(self) == survey(other))
    }

    /// When the last event was written; the run's creation if there is none.
    pub fn changed_at_ms(&self) -> u64 {
        self.events.last().map_or(self.created_at_ms, |entry| entry.at_ms)
    }

    /// Whether an instance came up and turned out not to serve. One that never answered was not
    /// had.
    pub fn an_instance_did_not_serve(&self) -> bool {
        let mut answered = false;
        self.events.iter().any(|entry| match &entry.event {
            RunEvent::Creating { .. } => {
                answered = false;
                false
            }
            RunEvent::Reached { .. } => {
                answered = true;
                false
            }
            RunEvent::Discarded { lost, .. } => answered && !lost,
            _ => false,
        })
    }

    /// Whether its worker was left running, if no process drives the run.
    pub fn is_detached(&self) -> bool {
        self.spec.detach && matches!(self.state, RunState::Launched { .. })
    }

    /// Deadline of its instance in Unix seconds, if one exists or may exist.
    pub fn deadline(&self) -> Option<u64> {
        self.state.tag().map(|tag| tag.deadline)
    }

    /// When its instance ends: by the cloud's own record, else at its deadline. Unix seconds.
    pub fn ends_at(&self) -> Option<u64> {
        let deadline = self.deadline()?;
        Some(self.run_time().and_then(|time| time.until).map_or(deadline, |until| until.min(deadline)))
    }

    /// The cloud's own record of how long the present instance has run.
    pub fn run_time(&self) -> Option<RunTime> {
        self.state.rental()?;
        self.run_times().next()
    }

    /// What is new in the cloud's record of how long the instance has run, if anything. Time that
    /// has ended is never taken back, for a list may have forgotten it, or measure it a little
    /// shorter; unless a start goes on that had only been interrupted.
    pub fn news(&self, time: RunTime) -> Option<RunTime> {
        let Some(known) = self.run_time() else { return Some(time) };
        let goes_on = time.since != known.since && time.since.is_some_and(|since| self.has_begun_at(since));
        let ended_s = if goes_on { time.ended_s } else { time.ended_s.max(known.ended_s) };
        Some(RunTime { ended_s, ..time }).filter(|news| *news != known)
    }

    /// Whether the present instance had a start at that time, Unix seconds.
    fn has_begun_at(&self, since: u64) -> bool {
        self.run_times().any(|time| time.since == Some(since))
    }

    /// The cloud's records of how long the present instance has run, the last one first.
    fn run_times(&self) -> impl Iterator<Item = RunTime> {
        let is_present = |entry: &&LedgerEntry| !matches!(entry.event, RunEvent::Creating { .. });
        self.events.iter().rev().take_while(is_present).filter_map(|entry| match entry.event {
            RunEvent::Metered { time } => Some(time),
            _ => None,
        })
    }

    /// Whether its instance waits in a queue, or may, as far as is known here.
    pub fn is_in_queue(&self) -> bool {
        let waits = |time: RunTime| time.since.is_none();
        let may_wait = match self.state {
            RunState::Creating { .. } | RunState::Rented { .. } => self.run_time().is_none_or(waits),
            RunState::Reachable { .. } | RunState::Launched { .. } => self.run_time().is_some_and(waits),
            _ => false,
        };
        may_wait && self.state.offer().is_some_and(|offer| offer.queued)
    }
}

impl Ledger {
    /// Opens or creates the ledger in `folder`.
    ///
    /// # Errors
    /// [`LedgerError::Newer`] if a later version of the program wrote it; errors of the file
    /// system or SQLite.
    pub fn open(folder: &Path) -> Result<Self, LedgerError> {
        let at = |source| LedgerError::Io { path: folder.to_owned(), source };
        // Keys are stored in this folder.
        create_private_folder(&folder.join("runs")).map_err(at)?;
        // The change to a write-ahead log fails, instead of waiting, if two processes make it at
        // the same time.
        let opening = private_file().create(true).open(folder.join("opening")).map_err(at)?;
        opening.lock().map_err(at)?;
        close_to_others(folder);
        let named = Self::owner_beside(folder);
        let (connection, owner) =
            connect(&folder.join(FILE), named.as_deref()).map_err(|error| error.of_file(folder.join(FILE)))?;
        if named.as_deref() != Some(&owner) {
            // The ledger works without this file, which matters only if the ledger is lost.
            if let Err(error) = write_whole(&folder.join(OWNER_FILE), owner.as_bytes()) {
                tracing::info!("{}: {error}", folder.join(OWNER_FILE).display());
            }
        }
        Ok(Self { connection: Arc::new(Mutex::new(connection)), folder: folder.to_owned(), owner, clock: now_ms })
    }

    /// Replaces the system's clock. It dates events and all work on the runs.
    #[must_use]
    pub fn with_clock(self, clock: Clock) -> Self {
        Self { clock, ..self }
    }

    /// Milliseconds since the Unix epoch, by this ledger's clock.
    pub fn now_ms(&self) -> u64 {
        (self.clock)()
    }

    /// The owner's name from the file beside the ledger, which may be missing itself.
    pub fn owner_beside(folder: &Path) -> Option<String> {
        let text = read_text(&folder.join(OWNER_FILE), MAX_OWNER).ok()?;
        let owner = text.trim();
        let is_word = !owner.is_empty() && owner.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        is_word.then(|| owner.to_owned())
    }

    /// The random, constant name of this ledger in lease tags.
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// The folder of a run: its lock, its key, its log.
    pub fn run_folder(&self, id: &str) -> PathBuf {
        self.folder.join("runs").join(id)
    }

    /// Records a new run, driven by the caller.
    ///
    /// # Errors
    /// Errors of the file system or SQLite.
    pub fn plan(&self, spec: &RunSpec) -> Result<RunWriter, LedgerError> {
        let id = random_word(8);
        // Locked before it is recorded, so that no other process takes the run for abandoned.
        let lock = self.lock(&id)?.ok_or_else(|| LedgerError::Driven { run: id.clone() })?;
        let created_at_ms = self.now_ms();
        let written = self.connection().execute(
            "INSERT INTO runs (id, created_at_ms, job_key, spec) VALUES (?1, ?2, ?3, ?4)",
            params![id, created_at_ms as i64, spec.job_key, to_json(spec)],
        );
        written.map_err(|error| self.named(error.into()))?;
        let record =
            RunRecord { id, created_at_ms, spec: spec.clone(), events: Vec::new(), state: RunState::initial() };
        Ok(RunWriter { ledger: self.clone(), record, _lock: lock })
    }

    /// All runs, read one by one.
    ///
    /// # Errors
    /// Errors of SQLite for the whole file.
    pub fn records(&self) -> Result<Records, LedgerError> {
        read_records(&self.connection()).map_err(|error| self.named(error))
    }

    /// All readable runs, oldest first.
    ///
    /// # Errors
    /// As [`Self::records`].
    pub fn runs(&self) -> Result<Vec<RunRecord>, LedgerError> {
        Ok(self.records()?.runs)
    }

    /// One run by its id.
    ///
    /// # Errors
    /// [`LedgerError::NoSuchRun`]; [`LedgerError::Damaged`] if the record cannot be read or
    /// replayed.
    pub fn run(&self, id: &str) -> Result<RunRecord, LedgerError> {
        read_run(&self.connection(), id).map_err(|error| self.named(error))
    }

    /// The run with this prefix of an id, or the latest for `last`.
    ///
    /// # Errors
    /// [`LedgerError::NoSuchRun`] or [`LedgerError::Ambiguous`], or as [`Self::run`].
    pub fn find(&self, prefix: &str) -> Result<RunRecord, LedgerError> {
        let mut found = read_ids(&self.connection()).map_err(|error| self.named(error))?;
        if prefix == "last" {
            found.drain(..found.len().saturating_sub(1));
        } else {
            // Nothing typed, as by a variable that is not set, means no run.
            found.retain(|id| !prefix.is_empty() && id.starts_with(prefix));
        }
        match &found[..] {
            [id] => self.run(id),
            [] => Err(LedgerError::NoSuchRun { run: prefix.to_owned() }),
            several => Err(LedgerError::Ambiguous { prefix: prefix.to_owned(), count: several.len() }),
        }
    }

    /// Takes over a run. `None` if another process drives it.
    ///
    /// # Errors
    /// [`LedgerError::NoSuchRun`]; errors of the file system or SQLite.
    pub fn take(&self, id: &str) -> Result<Option<RunWriter>, LedgerError> {
        self.run(id)?;
        let Some(lock) = self.lock_patiently(id)? else { return Ok(None) };
        // Read again under the lock, since the last driver may have written just before.
        let record = self.run(id)?;
        Ok(Some(RunWriter { ledger: self.clone(), record, _lock: lock }))
    }

    /// Whether some process drives the run now.
    ///
    /// # Errors
    /// Errors of the file system.
    pub fn is_driven(&self, id: &str) -> Result<bool, LedgerError> {
        let path = self.run_folder(id).join("lock");
        let at = |source| LedgerError::Io { path: path.clone(), source };
        let Some(file) = absent(File::open(&path)).map_err(at)? else { return Ok(false) };
        Ok(FileLock::of(file, File::try_lock_shared).map_err(at)?.is_none())
    }

    /// Asks the current or next driver of the run to stop it.
    ///
    /// # Errors
    /// Errors of the file system.
    pub fn ask_to_cancel(&self, id: &str) -> Result<(), LedgerError> {
        let path = self.cancel_file(id);
        File::create(&path).map(drop).map_err(|source| LedgerError::Io { path, source })
    }

    /// Whether a stop of the run was requested.
    pub fn cancel_asked(&self, id: &str) -> bool {
        self.cancel_file(id).exists()
    }

    fn cancel_file(&self, id: &str) -> PathBuf {
        self.run_folder(id).join("cancel")
    }

    /// Sets another absolute folder in which a run's results are created, for its current or next
    /// driver.
    ///
    /// # Errors
    /// Errors of the file system.
    pub fn send_results_to(&self, id: &str, folder: &str) -> Result<(), LedgerError> {
        let path = self.results_file(id);
        write_whole(&path, folder.as_bytes()).map_err(|source| LedgerError::Io { path, source })
    }

    fn results_file(&self, id: &str) -> PathBuf {
        self.run_folder(id).join("results-folder")
    }

    /// The error with the file's name.
    fn named(&self, error: LedgerError) -> LedgerError {
        error.of_file(self.folder.join(FILE))
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        // SQLite rolls back a transaction of a panicking thread, and the connection stays usable.
        self.connection.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Retries, since a process that only checks whether the run is driven holds the lock briefly,
    /// and so does one that is just being started by a process that died.
    fn lock_patiently(&self, id: &str) -> Result<Option<FileLock>, LedgerError> {
        for _ in 0..LOCK_ATTEMPTS {
            if let Some(lock) = self.lock(id)? {
                return Ok(Some(lock));
            }
            std::thread::sleep(LOCK_PAUSE);
        }
        Ok(None)
    }

    /// Locks this survey for the caller while the lock lives. `None` if another process has it.
    ///
    /// # Errors
    /// Errors of the file system.
    pub fn take_survey(&self, name: &str) -> Result<Option<FileLock>, LedgerError> {
        Self::lock_in(&self.folder.join("surveys").join(name))
    }

    fn lock(&self, id: &str) -> Result<Option<FileLock>, LedgerError> {
        Self::lock_in(&self.run_folder(id))
    }

    fn lock_in(folder: &Path) -> Result<Option<FileLock>, LedgerError> {
        let path = folder.join("lock");
        let at = |source| LedgerError::Io { path: path.clone(), source };
        create_private_folder(folder).map_err(at)?;
        let file = private_file().create(true).open(&path).map_err(at)?;
        FileLock::of(file, File::try_lock).map_err(at)
    }
}

/// A lock on a file until it is dropped. Dropping it unlocks the file. Closing the file is not
/// enough: a process that is being started has a copy of every open file until its program runs.
#[derive(Debug)]
pub struct FileLock(File);

impl FileLock {
    /// `None` if another process has it.
    fn of(file: File, lock: impl Fn(&File) -> Result<(), TryLockError>) -> io::Result<Option<Self>> {
        Ok(if is_taken(lock(&file))? { None } else { Some(Self(file)) })
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            tracing::debug!("a lock ends with its file: {error}");
        }
    }
}

/// Options of a file with access for its owner only, under any umask.
fn private_file() -> OpenOptions {
    let mut options = File::options();
    options.append(true).mode(0o600);
    options
}

/// Removes the access of other users that an earlier version or a umask of 000 left. A folder that
/// is shared on purpose (`/tmp`), or readable by others, may contain other files and is not
/// changed; the files in it are.
fn close_to_others(folder: &Path) {
    let mode = fs::metadata(folder).map_or(0, |metadata| metadata.permissions().mode());
    let is_open = mode & 0o022 != 0 && mode & 0o1000 == 0;
    let folder = folder.to_owned();
    let database = ["", "-wal", "-shm"].map(|end| folder.join(format!("{FILE}{end}")));
    // The database is created here, since SQLite would create it and its companion files readable
    // for all. An existing one is not opened: closing it would release SQLite's locks.
    let _ = private_file().create_new(true).open(&database[0]);
    for path in database.iter().chain(is_open.then_some(&folder)) {
        if let Err(error) = absent(make_private(path)) {
            tracing::info!("{}: {error}", path.display());
        }
    }
}

/// Opens the file and creates or checks its tables. Returns the owner, which becomes `named` if
/// there is none.
fn connect(path: &Path, named: Option<&str>) -> Result<(Connection, String), LedgerError> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY)?;
    // Every commit is synced before the call returns, since calls that cost money follow.
    connection.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;")?;
    let owner = atomically(&connection, |connection| tables_and_owner(connection, named))?;
    Ok((connection, owner))
}

fn tables_and_owner(connection: &Connection, named: Option<&str>) -> Result<String, LedgerError> {
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if found > SCHEMA {
        return Err(LedgerError::Newer { found, known: SCHEMA });
    }
    connection.execute_batch(TABLES)?;
    // Existing tables are not written, since a full disk must not prevent reading.
    if found < SCHEMA {
        connection.execute_batch(&format!("PRAGMA user_version = {SCHEMA}"))?;
    }
    let named = named.map_or_else(|| random_word(8), str::to_owned);
    connection
        .execute("INSERT OR IGNORE INTO meta (key, value) VALUES ('owner', ?1)", [named])
        .and_then(|_| connection.query_row("SELECT value FROM meta WHERE key = 'owner'", [], |row| row.get(0)))
        .map_err(LedgerError::from)
}

/// Ids, oldest first.
fn read_ids(connection: &Connection) -> Result<Vec<String>, LedgerError> {
    let ids = connection
        .prepare("SELECT id FROM runs ORDER BY created_at_ms, id")?
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    Ok(ids)
}

fn read_records(connection: &Connection) -> Result<Records, LedgerError> {
    let mut records = Records::default();
    for id in read_ids(connection)? {
        match read_run(connection, &id) {
            Ok(run) => records.runs.push(run),
            Err(LedgerError::Damaged { run, why }) => records.unreadable.push(Unreadable { run, why }),
            Err(error) => return Err(error),
        }
    }
    Ok(records)
}

fn read_run(connection: &Connection, id: &str) -> Result<RunRecord, LedgerError> {
    replay(connection, id).map_err(|error| match error {
        LedgerError::Sqlite { source, .. } if is_of_the_row(&source) => {
            LedgerError::Damaged { run: id.to_owned(), why: source.to_string() }
        }
        error => error,
    })
}

/// Whether other rows may be readable.
fn is_of_the_row(error: &rusqlite::Error) -> bool {
    match error {
        rusqlite::Error::SqliteFailure(failure, _) => failure.code == ErrorCode::DatabaseCorrupt,
        _ => true,
    }
}

fn replay(connection: &Connection, id: &str) -> Result<RunRecord, LedgerError> {
    let row: Option<(i64, String)> = connection
        .prepare_cached("SELECT created_at_ms, spec FROM runs WHERE id = ?1")?
        .query_row([id], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((created_at_ms, spec)) = row else {
        return Err(LedgerError::NoSuchRun { run: id.to_owned() });
    };
    let rows: Vec<(i64, String)> = connection
        .prepare_cached("SELECT at_ms, event FROM events WHERE run = ?1 ORDER BY seq")?
        .query_map([id], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<_, _>>()?;
    let damaged = |why: String| LedgerError::Damaged { run: id.to_owned(), why };
    let spec = serde_json::from_str(&spec).map_err(|e| damaged(e.to_string()))?;
    let mut state = RunState::initial();
    let mut events = Vec::with_capacity(rows.len());
    for (at_ms, text) in rows {
        let event: RunEvent = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
        state = run::next(&state, &event).map_err(|e| damaged(e.to_string()))?;
        events.push(LedgerEntry { at_ms: at_ms as u64, event });
    }
    Ok(RunRecord { id: id.to_owned(), created_at_ms: created_at_ms as u64, spec, events, state })
}

/// Runs a function in an exclusive transaction across threads and processes.
fn atomically<T>(
    connection: &Connection,
    act: impl FnOnce(&Connection) -> Result<T, LedgerError>,
) -> Result<T, LedgerError> {
    connection.execute_batch("BEGIN IMMEDIATE")?;
    let done = act(connection).and_then(|done| Ok(connection.execute_batch("COMMIT").map(|()| done)?));
    // SQLite has rolled back by itself after some errors, as of a full disk.
    if done.is_err() && !connection.is_autocommit() {
        connection.execute_batch("ROLLBACK")?;
    }
    done
}

/// The right to drive one run, and the only way to record its events. Dropping it abandons the
/// run.
pub struct RunWriter {
    ledger: Ledger,
    record: RunRecord,
    _lock: FileLock,
}

impl RunWriter {
    /// The current record.
    pub fn record(&self) -> &RunRecord {
        &self.record
    }

    /// Its state.
    pub fn state(&self) -> &RunState {
        &self.record.state
    }

    /// Its folder with key and log.
    pub fn folder(&self) -> PathBuf {
        self.ledger.run_folder(&self.record.id)
    }

    /// Folder in which its results are created: the last one that was set.
    pub fn results(&self) -> PathBuf {
        let named = read_text(&self.ledger.results_file(&self.record.id), MAX_FILE_BYTES).ok();
        named.unwrap_or_else(|| self.record.spec.results.clone()).into()
    }

    /// Milliseconds since the Unix epoch, by the ledger's clock.
    pub fn now_ms(&self) -> u64 {
        self.ledger.now_ms()
    }

    /// The owner in lease tags.
    pub fn owner(&self) -> &str {
        &self.ledger.owner
    }

    /// Whether a stop of the run was requested.
    pub fn cancel_asked(&self) -> bool {
        self.ledger.cancel_asked(&self.record.id)
    }

    /// A probe for a requested stop, for another task.
    pub fn cancel_probe(&self) -> impl Fn() -> bool + Send + use<> {
        let file = self.ledger.cancel_file(&self.record.id);
        move || file.exists()
    }

    /// Records an event, synced to disk.
    ///
    /// # Errors
    /// [`LedgerError::Illegal`] if the event cannot happen now: nothing is written. Errors of
    /// SQLite.
    pub fn append(&mut self, event: RunEvent) -> Result<&RunState, LedgerError> {
        let ledger = self.ledger.clone();
        self.append_to(&ledger.connection(), event).map_err(|error| ledger.named(error))?;
        Ok(&self.record.state)
    }

    /// Records the intent to rent, unless the budget of money or GPU time does not allow it:
    /// `worst` is the maximum cost of the instance until its time limit. Runs that share the
    /// budget cannot do so at the same time.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn reserve(&mut self, intent: Intent, worst: Usd) -> Result<bool, LedgerError> {
        let (ledger, before) = (self.ledger.clone(), self.record.clone());
        let reserved = atomically(&ledger.connection(), |connection| {
            let now = ledger.now_ms();
            if let Some(budget) = self.record.budget()
                && worst > less(budget, &self.sharers(connection)?, |run| run.at_most(now))
            {
                return Ok(false);
            }
            if let Some(most) = self.record.spec.max_gpu_time
                && self.record.spec.gpu_time(&intent.offer)
                    > without(most, &self.sharers(connection)?, |run| run.gpu_time_at_most(now))
            {
                return Ok(false);
            }
            self.append_to(connection, RunEvent::Creating { intent: Box::new(intent) })?;
            Ok(true)
        });
        if reserved.is_err() {
            self.record = before;
        }
        reserved.map_err(|error| ledger.named(error))
    }

    /// The state of the run's budget, if it has one.
    ///
    /// # Errors
    /// Errors of the file system or SQLite.
    pub fn budget_status(&self) -> Result<Option<BudgetStatus>, LedgerError> {
        let Some(budget) = self.record.budget() else { return Ok(None) };
        let (runs, others_under_way) = self.sharers_and_driven()?;
        let now = self.now_ms();
        let at_best = |run: &RunRecord| {
            if others_under_way.contains(&run.id) { run.cost(now) } else { run.at_most(now) }
        };
        let left = less(budget, &runs, |run| run.at_most(now));
        Ok(Some(BudgetStatus { budget, left, at_best: less(budget, &runs, at_best) }))
    }

    /// The state of the run's budget of GPU time, if it has one.
    ///
    /// # Errors
    /// Errors of the file system or SQLite.
    pub fn gpu_budget_status(&self) -> Result<Option<BudgetStatus<GpuTime>>, LedgerError> {
        let Some(budget) = self.record.spec.max_gpu_time else { return Ok(None) };
        let (runs, others_under_way) = self.sharers_and_driven()?;
        let now = self.now_ms();
        let at_best = |run: &RunRecord| {
            if others_under_way.contains(&run.id) { run.gpu_time(now) } else { run.gpu_time_at_most(now) }
        };
        let left = without(budget, &runs, |run| run.gpu_time_at_most(now));
        Ok(Some(BudgetStatus { budget, left, at_best: without(budget, &runs, at_best) }))
    }

    /// [`Self::sharers`], and the ids of those that others drive.
    fn sharers_and_driven(&self) -> Result<(Vec<RunRecord>, Vec<String>), LedgerError> {
        let runs = self.sharers(&self.ledger.connection()).map_err(|error| self.ledger.named(error))?;
        let mut driven = Vec::new();
        for run in &runs {
            if run.id != self.record.id && !run.state.is_at_rest() && self.ledger.is_driven(&run.id)? {
                driven.push(run.id.clone());
            }
        }
        Ok((runs, driven))
    }

    /// This run, and those that share its budget. An unreadable one is an error, since its cost is
    /// unknown.
    fn sharers(&self, connection: &Connection) -> Result<Vec<RunRecord>, LedgerError> {
        let Some(member) = &self.record.spec.survey else { return Ok(vec![self.record.clone()]) };
        let Records { mut runs, unreadable } = read_records(connection)?;
        for Unreadable { run, why } in unreadable {
            if may_be_of(connection, &run, &member.survey)? {
                return Err(LedgerError::Damaged { run, why });
            }
        }
        runs.retain(|run| self.record.shares_budget_with(run));
        Ok(runs)
    }

    fn append_to(&mut self, connection: &Connection, event: RunEvent) -> Result<(), LedgerError> {
        let state = run::next(&self.record.state, &event)?;
        let at_ms = self.now_ms();
        let seq = self.record.events.len() as i64;
        connection.execute(
            "INSERT INTO events (run, seq, at_ms, event) VALUES (?1, ?2, ?3, ?4)",
            params![self.record.id, seq, at_ms as i64, to_json(&event)],
        )?;
        self.record.events.push(LedgerEntry { at_ms, event });
        self.record.state = state;
        Ok(())
    }
}

/// Whether an unreadable run may belong to the survey; false only if the readable part of its
/// record excludes it.
fn may_be_of(connection: &Connection, run: &str, survey: &str) -> Result<bool, LedgerError> {
    let spec: Result<String, _> = connection.query_row("SELECT spec FROM runs WHERE id = ?1", [run], |row| row.get(0));
    let spec = match spec {
        Err(error) if !is_of_the_row(&error) => return Err(error.into()),
        spec => spec.ok().and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok()),
    };
    Ok(spec.is_none_or(|spec| match spec.get("survey") {
        None | Some(serde_json::Value::Null) => false,
        Some(of) => of.get("survey").and_then(serde_json::Value::as_str).is_none_or(|name| name == survey),
    }))
}

/// The rest of a budget of money after the shares of these runs.
fn less(budget: Usd, runs: &[RunRecord], takes: impl Fn(&RunRecord) -> Usd) -> Usd {
    let taken: Usd = runs.iter().map(takes).sum();
    Usd::from_micros(budget.micros() - taken.micros())
}

/// The rest of a budget of GPU time after the shares of these runs.
fn without(budget: GpuTime, runs: &[RunRecord], takes: impl Fn(&RunRecord) -> GpuTime) -> GpuTime {
    let taken = runs.iter().fold(0_i64, |sum, run| sum.saturating_add(takes(run).seconds()));
    GpuTime::from_seconds(budget.seconds().saturating_sub(taken))
}

/// Why the ledger could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The ledger was written by a later version.
    #[error("the ledger has version {found}; this program knows version {known}")]
    Newer {
        /// Its version.
        found: i64,
        /// The newest version that this program knows.
        known: i64,
    },
    /// A record is damaged.
    #[error("run {run}: its record in the ledger is damaged: {why}")]
    Damaged {
        /// The run's id.
        run: String,
        /// What is wrong.
        why: String,
    },
    /// No run has this id.
    #[error("there is no run `{run}`")]
    NoSuchRun {
        /// The requested id.
        run: String,
    },
    /// The beginning of an id matches several runs.
    #[error("{count} runs begin with `{prefix}`")]
    Ambiguous {
        /// The requested prefix.
        prefix: String,
        /// Number of runs that match.
        count: usize,
    },
    /// Some process drives it.
    #[error("run {run} is being driven by another process")]
    Driven {
        /// The run's id.
        run: String,
    },
    /// The event cannot happen now.
    #[error(transparent)]
    Illegal(#[from] IllegalEvent),
    /// The file system reported an error.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// SQLite reported an error.
    #[error("{}: {source}", path.as_ref().map_or("the ledger".into(), |path| path.to_string_lossy()))]
    Sqlite {
        /// The file.
        path: Option<PathBuf>,
        /// The error.
        source: rusqlite::Error,
    },
}

impl From<rusqlite::Error> for LedgerError {
    fn from(source: rusqlite::Error) -> Self {
        Self::Sqlite { path: None, source }
    }
}

impl LedgerError {
    /// The same error with the file's name, if it concerns the file.
    fn of_file(self, path: PathBuf) -> Self {
        match self {
            Self::Sqlite { source, .. } => Self::Sqlite { path: Some(path), source },
            error => error,
        }
    }

    /// Whether the error concerns the file or its disk and may be transient.
    pub fn is_of_the_file(&self) -> bool {
        matches!(self, Self::Sqlite { .. } | Self::Io { .. })
    }

    /// A remedy, if there is one.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Newer { .. } => Some("use the newer program, or another state folder (OUTLIERS_STATE)".to_owned()),
            Self::NoSuchRun { .. } => Some("`outliers runs list` shows all runs".to_owned()),
            Self::Damaged { run, .. } => Some(format!(
                "what run {run} rented carries its id: `outliers instances list` shows it, \
                 `outliers instances terminate` ends it"
            )),
            Self::Ambiguous { .. } => Some("give more letters of the id".to_owned()),
            Self::Driven { run } => Some(format!("`outliers runs show {run}` shows how it is going")),
            Self::Sqlite { source, .. } if is_damage(source) => Some(
                "`outliers doctor --repair` keeps the file aside and makes a new one of what is left; \
                 `instances list`, `instances terminate` and `reap` work without it"
                    .to_owned(),
            ),
            Self::Sqlite { .. } | Self::Io { .. } => Some(
                "the state folder must be writable and have room (OUTLIERS_STATE); \
                 `instances list`, `instances terminate` and `reap` work without it"
                    .to_owned(),
            ),
            Self::Illegal(_) => None,
        }
    }
}

/// Whether the file is not, or no longer, a ledger.
fn is_damage(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), None | Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt))
}

/// Milliseconds since the Unix epoch, by the system's clock.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// Random lower-case letters and digits, the first a letter.
pub fn random_word(length: usize) -> String {
    const LETTERS: &[u8] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let mut rng = rand::rng();
    (0..length).map(|i| LETTERS[rng.random_range(0..if i == 0 { 24 } else { LETTERS.len() })] as char).collect()
}

fn to_json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("run records hold no maps with keys other than strings")
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use outliers_protocol::{JobSpec, ModelSource};

    use super::*;
    use crate::cloud::broker::{GpuRequest, InstanceId};
    use crate::cloud::estimate::Work;
    use crate::cloud::market::{self, Quote};
    use crate::run::deploy::tests::fake::up_to;
    use crate::run::{GuardTimeouts, Membership, Pin, RunOutcome};
    use crate::units::Bytes;

    pub(crate) fn spec() -> RunSpec {
        RunSpec {
            model: "m".into(),
            brokers: "fake".into(),
            job: JobSpec::new(ModelSource::Folder { path: "/m".into() }),
            job_key: "k".into(),
            request: GpuRequest::default(),
            work: Work::default(),
            disk: Bytes::from_gib(1),
            push_model: false,
            keep_running: false,
            detach: false,
            max_duration_s: 60,
            watch: GuardTimeouts::NEVER,
            budget: None,
            max_gpu_time: None,
            quote: Quote::default(),
            only_in_time: false,
            stage: None,
            results: "/r".into(),
            output: Vec::new(),
            survey: None,
        }
    }

    fn creating() -> RunEvent {
        let offer = Offer::new("fake", "o".into(), 0, UsdPerHour::from_dollars(3600.0));
        let tag = LeaseTag { owner: "o".into(), run: "r".into(), nonce: "n".into(), deadline: 7 };
        RunEvent::Creating { intent: Box::new(Intent { offer, tag }) }
    }

    /// A run whose instance bills 3600 dollars per hour until second 7.
    pub(crate) fn rented() -> RunRecord {
        let folder = tempfile::tempdir().unwrap();
        let mut run = Ledger::open(folder.path()).unwrap().plan(&spec()).unwrap();
        run.append(creating()).unwrap();
        run.append(RunEvent::Created { instance: InstanceId("i".into()), price: None }).unwrap();
        run.record().clone()
    }

    #[test]
    fn written_events_are_replayed_by_the_next_process() {
        let folder = tempfile::tempdir().unwrap();
        let (id, owner) = {
            let ledger = Ledger::open(folder.path()).unwrap();
            let mut run = ledger.plan(&spec()).unwrap();
            run.append(creating()).unwrap();
            run.append(RunEvent::Created { instance: InstanceId("i".into()), price: None }).unwrap();
            run.append(RunEvent::Reached { pin: Pin("p".into()), price: None }).unwrap();
            (run.record().id.clone(), ledger.owner().to_owned())
        };
        let ledger = Ledger::open(folder.path()).unwrap();
        assert_eq!(ledger.owner(), owner, "the owner is made once");
        let run = ledger.find(&id[..4]).unwrap();
        assert_eq!(run.state.word(), "reachable");
        assert_eq!(run.events.len(), 3);
        assert_eq!(run.spec, spec());
        assert_eq!(run.deadline(), Some(7));
        assert_eq!(ledger.find("last").unwrap(), run);
        assert!(matches!(ledger.find("nope"), Err(LedgerError::NoSuchRun { .. })));
        assert!(matches!(ledger.find(""), Err(LedgerError::NoSuchRun { .. })), "not even if it is the only one");
        while ledger.find(&id[..1]).is_ok() {
            ledger.plan(&spec()).unwrap();
        }
        assert!(matches!(ledger.find(&id[..1]), Err(LedgerError::Ambiguous { count: 2, .. })));
    }

    #[test]
    fn illegal_event_is_refused_and_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let mut run = ledger.plan(&spec()).unwrap();
        assert!(matches!(run.append(RunEvent::Gone), Err(LedgerError::Illegal(_))));
        run.append(RunEvent::Stopped { ending: RunOutcome::Interrupted }).unwrap();
        assert!(matches!(run.append(creating()), Err(LedgerError::Illegal(_))));
        assert_eq!(ledger.run(&run.record().id).unwrap().events.len(), 1);
    }

    #[test]
    fn run_has_one_driver_and_is_abandoned_without_one() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let other = Ledger::open(folder.path()).unwrap();
        let run = ledger.plan(&spec()).unwrap();
        let id = run.record().id.clone();
        assert!(other.is_driven(&id).unwrap());
        assert!(other.take(&id).unwrap().is_none());
        assert_eq!(other.run(&id).unwrap().state.word(), "planned", "reading needs no lock");
        drop(run);
        assert!(!other.is_driven(&id).unwrap());
        let taken = other.take(&id).unwrap().unwrap();
        assert!(ledger.take(&id).unwrap().is_none());
        drop(taken);
        assert!(matches!(ledger.take("zzz"), Err(LedgerError::NoSuchRun { .. })));
        assert!(!ledger.run_folder("zzz").exists(), "asking leaves no folder");
    }

    #[test]
    fn transaction_that_sqlite_rolled_back_keeps_its_error() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let mut run = ledger.plan(&spec()).unwrap();
        let raw = Connection::open(folder.path().join("ledger.db")).unwrap();
        let full = "CREATE TRIGGER full BEFORE INSERT ON events BEGIN SELECT RAISE(ROLLBACK, 'disk is full'); END";
        raw.execute_batch(full).unwrap();
        let (intent, worst) = intent_of(&run.record().spec);
        let error = run.reserve(intent.clone(), worst).unwrap_err();
        assert!(error.to_string().contains("disk is full"), "{error}");
        assert_eq!((run.state().word(), run.record().events.len()), ("planned", 0));
        raw.execute_batch("DROP TRIGGER full").unwrap();
        assert!(run.reserve(intent, worst).unwrap(), "no transaction is left open");
        assert_eq!(ledger.run(&run.record().id).unwrap(), *run.record());
    }

    /// A commit that fails leaves nothing behind, in the file or here.
    #[test]
    fn failed_commit_reserves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let mut run = ledger.plan(&spec()).unwrap();
        // A reference that is checked at the commit.
        let check = "CREATE TABLE limits (run TEXT REFERENCES runs (id) DEFERRABLE INITIALLY DEFERRED);
            CREATE TRIGGER full AFTER INSERT ON events BEGIN INSERT INTO limits VALUES ('none'); END";
        Connection::open(folder.path().join("ledger.db")).unwrap().execute_batch(check).unwrap();
        let (intent, worst) = intent_of(&run.record().spec);
        assert!(run.reserve(intent, worst).is_err());
        assert_eq!((run.state().word(), run.record().events.len()), ("planned", 0));
        assert_eq!(ledger.run(&run.record().id).unwrap().state.word(), "planned");
        assert!(ledger.connection().is_autocommit());
    }

    /// A process that is just being started has copies of the open files.
    #[test]
    fn lock_ends_with_its_driver_whoever_has_copied_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let run = ledger.plan(&spec()).unwrap();
        let (id, copy) = (run.record().id.clone(), run._lock.0.try_clone().unwrap());
        assert!(ledger.is_driven(&id).unwrap());
        drop(run);
        assert!(!ledger.is_driven(&id).unwrap() && ledger.lock(&id).unwrap().is_some());
        drop(copy);
        let survey = ledger.take_survey("s").unwrap().unwrap();
        let copy = survey.0.try_clone().unwrap();
        assert!(ledger.take_survey("s").unwrap().is_none());
        drop(survey);
        assert!(ledger.take_survey("s").unwrap().is_some());
        drop(copy);
    }

    #[test]
    fn driver_sees_a_cancellation() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let run = ledger.plan(&spec()).unwrap();
        assert!(!run.cancel_asked());
        Ledger::open(folder.path()).unwrap().ask_to_cancel(&run.record().id).unwrap();
        assert!(run.cancel_asked());
    }

    #[test]
    fn newer_ledger_is_refused_and_unchanged() {
        let folder = tempfile::tempdir().unwrap();
        drop(Ledger::open(folder.path()).unwrap());
        let raw = Connection::open(folder.path().join("ledger.db")).unwrap();
        raw.execute_batch("PRAGMA user_version = 99").unwrap();
        let error = Ledger::open(folder.path()).err().unwrap();
        assert!(matches!(error, LedgerError::Newer { found: 99, known: SCHEMA }), "{error}");
        assert!(error.hint().is_some());
        let version: i64 = raw.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
        assert_eq!(version, 99);
    }

    #[test]
    fn damaged_record_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let mut run = ledger.plan(&spec()).unwrap();
        run.append(creating()).unwrap();
        let raw = Connection::open(folder.path().join("ledger.db")).unwrap();
        let damage = |change: &str| raw.execute(change, [&run.record().id]).unwrap();
        for change in [
            "UPDATE events SET event = '{\"event\":\"gone\"}' WHERE run = ?1",
            "UPDATE events SET event = '{' WHERE run = ?1",
            "UPDATE events SET event = CAST(x'ff' AS TEXT) WHERE run = ?1",
            "UPDATE runs SET spec = replace(spec, '\"magnitude\":6.0', '\"magnitude\":null') WHERE id = ?1",
        ] {
            damage(change);
            assert!(matches!(ledger.run(&run.record().id), Err(LedgerError::Damaged { .. })), "{change}");
        }
        assert!(matches!(ledger.find("last"), Err(LedgerError::Damaged { .. })), "no other run is meant");
    }

    #[test]
    fn unreadable_record_leaves_others_readable() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let ids: Vec<String> = (0..3).map(|_| ledger.plan(&spec()).unwrap().record().id.clone()).collect();
        let raw = Connection::open(folder.path().join("ledger.db")).unwrap();
        raw.execute("UPDATE runs SET spec = '{\"model\":' WHERE id = ?1", [&ids[1]]).unwrap();
        let Records { runs, unreadable } = ledger.records().unwrap();
        assert_eq!(runs.len(), 2);
        assert!(runs.iter().all(|run| run.id != ids[1]));
        assert_eq!(unreadable.iter().map(|lost| &lost.run).collect::<Vec<_>>(), [&ids[1]]);
        assert!(unreadable[0].why.contains("EOF"), "{unreadable:?}");
        assert!(ledger.take(&ids[0]).unwrap().is_some() && ledger.find(&ids[2]).is_ok());
    }

    #[test]
    fn unreadable_run_counts_against_the_shared_budget() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let (lost, of_survey) = (ledger.plan(&member(200.0)).unwrap(), ledger.plan(&member(200.0)).unwrap());
        let alone = ledger.plan(&RunSpec { survey: None, ..member(200.0) }).unwrap();
        let raw = Connection::open(folder.path().join("ledger.db")).unwrap();
        let damage =
            |spec: &str| raw.execute("UPDATE runs SET spec = ?2 WHERE id = ?1", [&lost.record().id, spec]).unwrap();
        for (spec, known) in [
            ("{", false),
            (r#"{"survey":{"survey":"s"}}"#, false),
            (r#"{"survey":{"survey":"other"}}"#, true),
            (r#"{"survey":null}"#, true),
        ] {
            damage(spec);
            assert_eq!(of_survey.budget_status().is_ok(), known, "{spec}");
            assert!(alone.budget_status().is_ok(), "it shares with nobody");
        }
    }

    #[test]
    fn cost_runs_from_the_create_call_until_gone() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let mut run = ledger.plan(&spec()).unwrap();
        assert_eq!(run.record().cost(now_ms() + 9_000_000), Usd::ZERO);
        run.append(creating()).unwrap();
        let since = run.record().changed_at_ms();
        std::thread::sleep(Duration::from_millis(20));
        run.append(RunEvent::Created { instance: InstanceId("i".into()), price: None }).unwrap();
        assert_eq!(run.record().cost(since + 2_000), Usd::from_dollars(2.0));
        run.append(RunEvent::Stopped { ending: RunOutcome::Interrupted }).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        run.append(RunEvent::Gone).unwrap();
        let bill = run.record().cost(since + 9_000_000);
        assert!(bill >= Usd::from_dollars(0.02) && bill < Usd::from_dollars(60.0), "{bill}");
    }

    #[test]
    fn risen_price_counts_from_the_create_call() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = Ledger::open(folder.path()).unwrap().plan(&spec()).unwrap();
        run.append(creating()).unwrap();
        let since = run.record().changed_at_ms();
        run.append(RunEvent::Created { instance: InstanceId("i".into()), price: None }).unwrap();
        run.append(RunEvent::Reached { pin: Pin("p".into()), price: None }).unwrap();
        run.append(RunEvent::Launched).unwrap();
        assert_eq!(run.record().cost(since + 2_000), Usd::from_dollars(2.0));
        run.append(RunEvent::Repriced { price: UsdPerHour::from_dollars(7200.0) }).unwrap();
        assert_eq!(run.record().cost(since + 2_000), Usd::from_dollars(4.0));
        assert!(run.record().at_most(since + 2_000) >= Usd::from_dollars(4.0));
    }

    #[test]
    fn shown_maximum_cost_is_at_most_the_quote() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        // $3600/h for a minute.
        let agreed = Usd::from_dollars(60.0);
        let mut run = ledger.plan(&RunSpec { quote: up_to(agreed), ..spec() }).unwrap();
        let (intent, worst) = intent_of(&run.record().spec);
        assert_eq!(worst, agreed, "no more than is shown is reserved");
        assert!(run.reserve(intent, worst).unwrap());
        let shown = |run: &RunWriter| run.record().at_most(now_ms());
        assert!(shown(&run) <= agreed && shown(&run) > Usd::from_dollars(58.0), "{}", shown(&run));
        let price = UsdPerHour::from_dollars(3900.0);
        run.append(RunEvent::Created { instance: InstanceId("i".into()), price: Some(price) }).unwrap();
        assert!(shown(&run) <= agreed, "{}: it is not kept", shown(&run));
        assert!(run.record().at_price(price) > agreed);
        // Records of earlier versions are read: those without the shown offers, and those without
        // an agreed amount.
        let mut old = serde_json::to_value(&run.record().spec).unwrap();
        for key in ["offers", "considered", "steps"] {
            old.as_object_mut().unwrap().remove(key).unwrap();
        }
        let read = |spec: &serde_json::Value| serde_json::from_value::<RunSpec>(spec.clone()).unwrap();
        assert_eq!(read(&old), run.record().spec);
        assert_eq!(old.as_object_mut().unwrap().remove("agreed").unwrap(), agreed.micros());
        assert_eq!(read(&old), spec());
        let RunEvent::Creating { intent } = &run.record().events[0].event else { panic!("{:?}", run.record()) };
        let mut offer = serde_json::to_value(&intent.offer).unwrap();
        for key in ["is_local", "form", "machine"] {
            offer.as_object_mut().unwrap().remove(key).unwrap();
        }
        assert_eq!(serde_json::from_value::<Offer>(offer).unwrap(), intent.offer);
    }

    #[test]
    fn quote_is_stored_with_the_run() {
        let folder = tempfile::tempdir().unwrap();
        let offers = vec![Offer::new("fake", "shown".into(), 0, UsdPerHour::from_dollars(1.0))];
        let quote = market::select(offers, &GpuRequest { gpu_count: Some(0), ..spec().request }, &spec().work).unwrap();
        let spec = RunSpec { quote: Quote { ceiling: Some(Usd::from_dollars(60.0)), ..quote }, ..spec() };
        let run = Ledger::open(folder.path()).unwrap().plan(&spec).unwrap().record().id.clone();
        assert_eq!(Ledger::open(folder.path()).unwrap().find(&run).unwrap().spec, spec);
    }

    /// A run of the survey `s` with this budget in dollars.
    fn member(budget: f64) -> RunSpec {
        let survey = Some(Membership { survey: "s".into(), model: "m".into() });
        RunSpec { survey, budget: Some(Usd::from_dollars(budget)), ..spec() }
    }

    /// The intent to rent for the run's time limit, and its maximum cost: $3960/h for a minute is
    /// $66.
    fn intent_of(spec: &RunSpec) -> (Intent, Usd) {
        let offer = Offer::new("fake", "o".into(), 0, UsdPerHour::from_dollars(3600.0));
        let worst = spec.highest_price(&offer).cost(Duration::from_secs(spec.max_duration_s));
        let deadline = now_ms() / 1000 + spec.max_duration_s;
        (Intent { offer, tag: LeaseTag { owner: "o".into(), run: "r".into(), nonce: "n".into(), deadline } }, worst)
    }

    #[test]
    fn survey_runs_cannot_exceed_their_budget() {
        let folder = tempfile::tempdir().unwrap();
        let reserved = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for process in 0..4 {
                let (folder, reserved) = (folder.path(), &reserved);
                scope.spawn(move || {
                    let ledger = Ledger::open(folder).unwrap();
                    for _ in 0..2 {
                        let mut run = ledger.plan(&member(200.0)).unwrap();
                        let (intent, worst) = intent_of(&run.record().spec);
                        let done = run.reserve(intent, worst).unwrap();
                        reserved.fetch_add(usize::from(done), Ordering::Relaxed);
                        assert_eq!(run.state().word(), if done { "creating" } else { "planned" }, "{process}");
                    }
                });
            }
        });
        assert_eq!(reserved.into_inner(), 3, "3 x $66 of $200, however they race");
        let ledger = Ledger::open(folder.path()).unwrap();
        let all: Usd = ledger.runs().unwrap().iter().map(|run| run.at_most(now_ms())).sum();
        assert!(all <= Usd::from_dollars(200.0) && all > Usd::from_dollars(190.0), "{all}");
        let mut alone = ledger.plan(&RunSpec { survey: None, ..member(66.0) }).unwrap();
        let (intent, worst) = intent_of(&alone.record().spec);
        assert!(alone.reserve(intent, worst).unwrap(), "a run without the survey has a budget of its own");
    }

    #[test]
    fn budget_separates_spent_from_reserved() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let (mut one, two) = (ledger.plan(&member(100.0)).unwrap(), ledger.plan(&member(100.0)).unwrap());
        let dollars = Usd::from_dollars;
        let all = BudgetStatus { budget: dollars(100.0), left: dollars(100.0), at_best: dollars(100.0) };
        assert_eq!(two.budget_status().unwrap(), Some(all));
        let (intent, worst) = intent_of(&one.record().spec);
        assert!(one.reserve(intent, worst).unwrap());
        let budget_status = two.budget_status().unwrap().unwrap();
        assert!(budget_status.left <= dollars(36.0) && budget_status.at_best > dollars(99.0), "{budget_status:?}");
        one.append(RunEvent::Created { instance: InstanceId("i".into()), price: None }).unwrap();
        assert!(two.budget_status().unwrap().unwrap().left < dollars(36.0), "the price is not the last word yet");
        one.append(RunEvent::Reached { pin: Pin("p".into()), price: None }).unwrap();
        let budget_status = two.budget_status().unwrap().unwrap();
        assert!(budget_status.left > dollars(36.0) && budget_status.left <= dollars(41.0), "{budget_status:?}");
        drop(one);
        let budget_status = two.budget_status().unwrap().unwrap();
        assert_eq!(
            budget_status.left, budget_status.at_best,
            "what nobody drives gives nothing back before its time is up"
        );
        assert_eq!(ledger.plan(&spec()).unwrap().budget_status().unwrap(), None);
    }

    /// The intent to rent two GPUs for the run's minute: 120 GPU-seconds.
    fn two_gpus() -> (Intent, Usd) {
        let tag = LeaseTag { owner: "o".into(), run: "r".into(), nonce: "n".into(), deadline: now_ms() / 1000 + 60 };
        (Intent { offer: Offer::new("fake", "o".into(), 2, UsdPerHour::default()), tag }, Usd::ZERO)
    }

    #[test]
    fn survey_runs_cannot_exceed_their_gpu_hours() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let of_survey = || RunSpec { budget: None, max_gpu_time: Some(GpuTime::from_seconds(300)), ..member(1.0) };
        let mut runs = [0, 1, 2].map(|_| ledger.plan(&of_survey()).unwrap());
        let reserved = runs.each_mut().map(|run| {
            let (intent, worst) = two_gpus();
            run.reserve(intent, worst).unwrap()
        });
        assert_eq!(reserved, [true, true, false], "2 x 120 GPU-seconds of 300");
        let [mut first, second, third] = runs;
        let left = |run: &RunWriter| {
            let status = run.gpu_budget_status().unwrap().unwrap();
            (status.left.seconds(), status.at_best.seconds())
        };
        assert_eq!(left(&third), (60, 300), "jobs that wait have taken nothing yet");
        first.append(RunEvent::Created { instance: InstanceId("i".into()), price: None }).unwrap();
        first.append(RunEvent::Stopped { ending: RunOutcome::Cancelled }).unwrap();
        first.append(RunEvent::Gone).unwrap();
        assert_eq!(left(&third), (180, 300), "it waited in a queue and had no GPUs");
        drop(second);
        assert_eq!(left(&third), (180, 180), "what nobody drives gives nothing back before its time is up");
        assert_eq!(ledger.plan(&spec()).unwrap().gpu_budget_status().unwrap(), None);
    }

    #[test]
    fn gpu_hours_begin_when_the_job_runs() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = Ledger::open(folder.path()).unwrap().plan(&spec()).unwrap();
        let creating = || RunEvent::Creating { intent: Box::new(two_gpus().0) };
        let created = || RunEvent::Created { instance: InstanceId("i".into()), price: None };
        let discarded = || RunEvent::Discarded { reason: "x".into(), lost: false };
        let reached = RunEvent::Reached { pin: Pin("p".into()), price: None };
        // The first waits for 1,000 s and runs for 10. The second is given up unseen after 5, the
        // third after 500, of which it can have had 60. The total is at most a minute of two GPUs.
        let mut times = Vec::new();
        for (at, event, had, at_most) in [
            (0, creating(), 0, 120),
            (1, created(), 0, 120),
            (1000, reached, 0, 120),
            (1010, discarded(), 20, 120),
            (1010, RunEvent::Gone, 20, 20),
            (2000, creating(), 20, 140),
            (2001, created(), 20, 140),
            (2005, discarded(), 20, 140),
            (2005, RunEvent::Gone, 30, 30),
            (3000, creating(), 30, 150),
            (3001, created(), 30, 150),
            (3500, discarded(), 30, 150),
            (3500, RunEvent::Vanished, 150, 150),
        ] {
            run.append(event).unwrap();
            times.push(at * 1000);
            let mut record = run.record().clone();
            record.events.iter_mut().zip(&times).for_each(|(entry, at_ms)| entry.at_ms = *at_ms);
            let now = [record.gpu_time(at * 1000), record.gpu_time_at_most(at * 1000)].map(GpuTime::seconds);
            assert_eq!(now, [had, at_most], "at {at}");
        }
    }

    #[test]
    fn run_of_a_queue_is_counted_by_its_jobs_own_times() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = Ledger::open(folder.path()).unwrap().plan(&spec()).unwrap();
        let (Intent { offer, tag }, _) = two_gpus();
        // $3600/h for a minute; it may wait for a day.
        let offer = Offer { queued: true, price: UsdPerHour::from_dollars(3600.0), ..offer };
        let tag = LeaseTag { deadline: 86_400 + 60, ..tag };
        let creating = || RunEvent::Creating { intent: Box::new(Intent { offer: offer.clone(), tag: tag.clone() }) };
        let created = || RunEvent::Created { instance: InstanceId("i".into()), price: None };
        let metered = |ended_s, since, until| RunEvent::Metered { time: RunTime { ended_s, since, until } };
        let reached = || RunEvent::Reached { pin: Pin("p".into()), price: None };
        // It waits for 1,000 s, runs for 30 and is put back, and runs for 20 after another 970. The
        // second job is given up while it waits.
        let mut times = Vec::new();
        for (at, event, dollars, gpu_seconds, at_most, waits, ends) in [
            (0, creating(), 0, 0, 60, true, Some(86_460)),
            (1, created(), 0, 0, 60, true, Some(86_460)),
            (900, metered(0, None, None), 0, 0, 60, true, Some(86_460)),
            (1010, reached(), 0, 0, 60, true, Some(86_460)),
            (1010, metered(0, Some(1000), Some(1060)), 10, 20, 60, false, Some(1060)),
            (1010, RunEvent::Launched, 10, 20, 60, false, Some(1060)),
            (1040, metered(30, None, None), 30, 60, 90, true, Some(86_460)),
            (2005, metered(30, Some(2000), Some(2060)), 35, 70, 90, false, Some(2060)),
            (2030, RunEvent::Discarded { reason: "x".into(), lost: true }, 60, 120, 90, false, Some(2060)),
            (2030, metered(50, None, None), 50, 100, 50, false, Some(86_460)),
            (2040, RunEvent::Gone, 50, 100, 50, false, None),
            (3000, creating(), 50, 100, 110, true, Some(86_460)),
            (3001, created(), 50, 100, 110, true, Some(86_460)),
            (3500, RunEvent::Discarded { reason: "x".into(), lost: false }, 50, 100, 50, false, Some(86_460)),
            (3500, RunEvent::Gone, 50, 100, 50, false, None),
        ] {
            run.append(event).unwrap();
            times.push(at * 1000);
            let mut record = run.record().clone();
            record.events.iter_mut().zip(&times).for_each(|(entry, at_ms)| entry.at_ms = *at_ms);
            assert_eq!(record.cost(at * 1000), Usd::from_micros(dollars * 1_000_000), "at {at}");
            assert_eq!(record.gpu_time(at * 1000).seconds(), gpu_seconds, "at {at}");
            // A quarter's slack: what an instance may bill at most is more than its offer says.
            let most = record.at_most(at * 1000).micros();
            assert!(most >= at_most * 1_000_000 && most <= at_most * 1_250_000, "{most} at {at}");
            assert_eq!(record.gpu_time_at_most(at * 1000).seconds(), at_most * 2, "at {at}");
            assert_eq!((record.is_in_queue(), record.ends_at()), (waits, ends), "at {at}");
        }
    }

    #[test]
    fn second_start_counts_where_the_first_is_measured_shorter() {
        let folder = tempfile::tempdir().unwrap();
        let mut run = Ledger::open(folder.path()).unwrap().plan(&spec()).unwrap();
        run.append(creating()).unwrap();
        run.append(RunEvent::Created { instance: InstanceId("i".into()), price: None }).unwrap();
        let time = |ended_s, since: Option<u64>| RunTime { ended_s, since, until: since.map(|since| since + 60) };
        for (told, news) in [
            (time(0, Some(1000)), Some(time(0, Some(1000)))),
            (time(0, Some(1000)), None),
            // By the queue, then by the job's own script.
            (time(31, None), Some(time(31, None))),
            (time(29, None), None),
            (time(29, Some(2000)), Some(time(31, Some(2000)))),
            (time(29, Some(2000)), None),
            // It is suspended, and goes on: the same start.
            (time(40, None), Some(time(40, None))),
            (time(31, Some(2000)), Some(time(31, Some(2000)))),
            // It ends, and is forgotten.
            (time(90, None), Some(time(90, None))),
            (time(0, None), None),
        ] {
            let found = run.record().news(told);
            assert_eq!(found, news, "{told:?} after {:?}", run.record().run_time());
            if let Some(time) = found {
                run.append(RunEvent::Metered { time }).unwrap();
            }
        }
    }

    #[test]
    fn ledger_of_an_earlier_version_is_opened_with_its_runs() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let mut run = ledger.plan(&spec()).unwrap();
        run.append(creating()).unwrap();
        let (id, owner) = (run.record().id.clone(), ledger.owner().to_owned());
        drop((run, ledger));
        let raw = Connection::open(folder.path().join("ledger.db")).unwrap();
        for earlier in 1..SCHEMA {
            raw.execute_batch(&format!("PRAGMA user_version = {earlier}")).unwrap();
            let ledger = Ledger::open(folder.path()).unwrap();
            assert_eq!((ledger.owner(), ledger.runs().unwrap().len()), (owner.as_str(), 1), "{earlier}");
            assert_eq!(ledger.run(&id).unwrap().state.word(), "creating");
            let version: i64 = raw.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
            assert_eq!(version, SCHEMA, "an earlier program refuses it from now on");
        }
    }

    #[test]
    fn state_folder_writable_by_others_is_made_private() {
        let folder = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        for (before, after) in [(0o777, 0o700), (0o770, 0o700), (0o755, 0o755), (0o1777, 0o1777)] {
            let state = folder.path().join(format!("{before:o}"));
            fs::create_dir(&state).unwrap();
            set(&state, before);
            let ledger = Ledger::open(&state).unwrap();
            ledger.plan(&spec()).unwrap();
            let files = ["ledger.db", "ledger.db-wal", "ledger.db-shm"].map(|name| state.join(name));
            assert!(files.iter().all(|file| mode(file) == 0o600), "{:?}", files.each_ref().map(|file| mode(file)));
            files.iter().for_each(|file| set(file, 0o644));
            let again = Ledger::open(&state).unwrap();
            assert!(files.iter().all(|file| mode(file) == 0o600));
            assert_eq!(again.runs().unwrap().len(), 1);
            assert_eq!((mode(&state), mode(&state.join("runs"))), (after, 0o700));
        }
    }

    #[test]
    fn new_ledger_can_be_opened_concurrently() {
        for _ in 0..20 {
            let folder = tempfile::tempdir().unwrap();
            let (open, start) = (|| Ledger::open(folder.path()).unwrap(), std::sync::Barrier::new(8));
            let owners: Vec<String> = std::thread::scope(|scope| {
                let one = || {
                    start.wait();
                    open().owner().to_owned()
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(one)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(owners.iter().all(|owner| *owner == owners[0]), "{owners:?}");
        }
    }

    #[test]
    fn processes_can_write_different_runs_concurrently() {
        let folder = tempfile::tempdir().unwrap();
        let written = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let ledger = Ledger::open(folder.path()).unwrap();
                    for _ in 0..5 {
                        let mut run = ledger.plan(&spec()).unwrap();
                        run.append(creating()).unwrap();
                        run.append(RunEvent::NotCreated { reason: "no".into(), refused: true, unseen: false }).unwrap();
                        written.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(Ledger::open(folder.path()).unwrap().runs().unwrap().len(), written.into_inner());
    }

    #[test]
    fn random_words_fit_into_tags() {
        for length in [1, 8, 30] {
            let word = random_word(length);
            assert_eq!(word.len(), length);
            let tag = LeaseTag { owner: word.clone(), run: word.clone(), nonce: word, deadline: 1 };
            assert_eq!(tag.to_string().parse(), Ok(tag));
        }
    }
}
