//! The durable record of runs: an intent log for recovery, not a debug log.
//!
//! One SQLite file, `ledger.db`: what each run is to do, and every event of its life, append-only. A run's state is the
//! replay of its events through [`run::next`]. Nothing in it is secret.
//!
//! Any number of processes may read. Who drives a run holds the lock on `runs/<run>/lock`; the system releases it when the
//! process dies, however it dies. A run that is not at rest and whose lock is free is *abandoned*: somebody should carry on.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::Rng;
use rusqlite::{Connection, OptionalExtension, params};
use serde::Serialize;

use crate::broker::Offer;
use crate::mutant::{Mutant, planted};
use crate::run::{self, IllegalEvent, Intent, RunEvent, RunSpec, RunState};
use crate::units::{Usd, UsdPerHour};

/// Version of the tables and of what stands in them. An older program refuses a newer ledger.
const SCHEMA: i64 = 4;

/// How long a writer waits for another one.
const BUSY: Duration = Duration::from_secs(20);

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

/// The ledger of one state folder.
#[derive(Clone)]
pub struct Ledger {
    connection: Arc<Mutex<Connection>>,
    folder: PathBuf,
    owner: String,
}

/// A run as the ledger has it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunRecord {
    /// Lower-case letters and digits.
    pub id: String,
    /// Milliseconds since the Unix epoch.
    pub created_at_ms: u64,
    /// What it is to do.
    pub spec: RunSpec,
    /// What happened, oldest first.
    pub events: Vec<Entry>,
    /// The replay of `events`.
    pub state: RunState,
}

/// One event and when it was written.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Entry {
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// What happened.
    #[serde(flatten)]
    pub event: RunEvent,
}

/// An instance that bills.
#[derive(Clone, Copy)]
struct OpenBill {
    since_ms: u64,
    price: UsdPerHour,
}

impl OpenBill {
    fn until(self, to_ms: u64) -> Usd {
        self.price.cost(Duration::from_millis(to_ms.saturating_sub(self.since_ms)))
    }
}

/// What there is of a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Purse {
    /// All of it.
    pub budget: Usd,
    /// What nobody has spent, or may still spend until the time limits of the instances there are or may be.
    pub left: Usd,
    /// What may be left if the other runs under way cost nothing more than they have.
    pub at_best: Usd,
}

impl RunRecord {
    /// What the run's instances have cost until they were seen gone, or until `now_ms`: our arithmetic, never less than the time
    /// they can have existed times their price; not the cloud's bill.
    pub fn cost(&self, now_ms: u64) -> Usd {
        let (gone, present) = self.bills();
        gone + present.map_or(Usd::ZERO, |bill| bill.until(now_ms))
    }

    /// What the run may have cost when the time of its instance, which exists or may exist, is up: so much of a budget is not to
    /// be promised to anybody else.
    pub fn at_most(&self, now_ms: u64) -> Usd {
        let (gone, present) = self.bills();
        let agreed = |offer: &Offer| self.spec.agreed(offer);
        let present = match &self.state {
            RunState::Creating { intent, .. } => {
                Some(OpenBill { since_ms: self.changed_at_ms(), price: agreed(&intent.offer) })
            }
            // What it bills in the end is said when it is up.
            RunState::Rented { rental } => {
                present.map(|bill| OpenBill { price: bill.price.max(agreed(&rental.offer)), ..bill })
            }
            _ => present,
        };
        let until_ms = now_ms.max(self.deadline().unwrap_or_default() * 1000);
        gone + present.map_or(Usd::ZERO, |bill| bill.until(until_ms))
    }

    /// What instances that are gone have cost, and the bill of the one that is there.
    fn bills(&self) -> (Usd, Option<OpenBill>) {
        let mut gone = Usd::ZERO;
        let mut present: Option<OpenBill> = None;
        let mut state = RunState::initial();
        let mut asked_at = self.created_at_ms;
        for entry in &self.events {
            let Ok(new) = run::next(&state, &entry.event) else { break };
            match (&entry.event, new.rental()) {
                (RunEvent::Creating { .. }, _) => asked_at = entry.at_ms,
                // It may have been there, and billed, from the first call on: a controller may have died in between.
                (RunEvent::Created { .. }, Some(rental)) => {
                    present = Some(OpenBill { since_ms: asked_at, price: rental.price });
                }
                (RunEvent::Reached { .. }, Some(rental)) => {
                    present = present.map(|bill| OpenBill { price: rental.price, ..bill });
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

    /// What must not be exceeded, by this run and those it shares the budget with.
    fn budget(&self) -> Option<Usd> {
        self.spec.budget.filter(|_| !planted(Mutant::BudgetIgnored))
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

    /// Unix seconds after which its instance has no right to exist, where there is or may be one.
    pub fn deadline(&self) -> Option<u64> {
        self.state.tag().map(|tag| tag.deadline)
    }
}

impl Ledger {
    /// Opens or makes the ledger below `folder`.
    ///
    /// # Errors
    /// [`LedgerError::Newer`] when a later version of the program wrote it; otherwise what the file system or SQLite says.
    pub fn open(folder: &Path) -> Result<Self, LedgerError> {
        let at = |source| LedgerError::Io { path: folder.to_owned(), source };
        // Keys lie below it.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder.join("runs")).map_err(at)?;
        // The change to a write-ahead log waits for nobody: it fails where two meet in it.
        let opening = File::options().create(true).append(true).open(folder.join("opening")).map_err(at)?;
        opening.lock().map_err(at)?;
        let connection = Connection::open(folder.join("ledger.db"))?;
        connection.busy_timeout(BUSY)?;
        // Every commit is on disk before the call returns: what costs money comes after it.
        connection.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;")?;
        let owner = prepare(&connection)?;
        Ok(Self { connection: Arc::new(Mutex::new(connection)), folder: folder.to_owned(), owner })
    }

    /// The name of this ledger in lease tags: random, made once.
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
    /// What the file system or SQLite says.
    pub fn plan(&self, spec: &RunSpec) -> Result<RunWriter, LedgerError> {
        let id = random_word(8);
        // Locked before it is recorded: nobody ever sees the run unlocked and takes it for abandoned.
        let lock = self.lock(&id)?.ok_or_else(|| LedgerError::Driven { run: id.clone() })?;
        let created_at_ms = now_ms();
        self.connection().execute(
            "INSERT INTO runs (id, created_at_ms, job_key, spec) VALUES (?1, ?2, ?3, ?4)",
            params![id, created_at_ms as i64, spec.job_key, to_json(spec)],
        )?;
        let record =
            RunRecord { id, created_at_ms, spec: spec.clone(), events: Vec::new(), state: RunState::initial() };
        Ok(RunWriter { ledger: self.clone(), record, _lock: lock })
    }

    /// All runs, oldest first.
    ///
    /// # Errors
    /// [`LedgerError::Damaged`] when a record cannot be read or replayed.
    pub fn runs(&self) -> Result<Vec<RunRecord>, LedgerError> {
        read_runs(&self.connection())
    }

    /// One run by its id.
    ///
    /// # Errors
    /// [`LedgerError::NoSuchRun`], or [`LedgerError::Damaged`] when the record cannot be read or replayed.
    pub fn run(&self, id: &str) -> Result<RunRecord, LedgerError> {
        read_run(&self.connection(), id)
    }

    /// One run by the beginning of its id, or the latest for `last`.
    ///
    /// # Errors
    /// [`LedgerError::NoSuchRun`] or [`LedgerError::Ambiguous`].
    pub fn find(&self, prefix: &str) -> Result<RunRecord, LedgerError> {
        let mut found: Vec<RunRecord> = self.runs()?;
        if prefix == "last" {
            return found.pop().ok_or_else(|| LedgerError::NoSuchRun { run: prefix.to_owned() });
        }
        found.retain(|run| run.id.starts_with(prefix));
        match found.len() {
            1 => Ok(found.remove(0)),
            0 => Err(LedgerError::NoSuchRun { run: prefix.to_owned() }),
            n => Err(LedgerError::Ambiguous { prefix: prefix.to_owned(), count: n }),
        }
    }

    /// Takes over a run, unless some process drives it: then `None`.
    ///
    /// # Errors
    /// [`LedgerError::NoSuchRun`], or what the file system or SQLite says.
    pub fn take(&self, id: &str) -> Result<Option<RunWriter>, LedgerError> {
        self.run(id)?;
        let Some(lock) = self.lock_patiently(id)? else { return Ok(None) };
        // Read again under the lock: its last driver may have written until a moment ago.
        let record = self.run(id)?;
        Ok(Some(RunWriter { ledger: self.clone(), record, _lock: lock }))
    }

    /// Whether some process drives the run now.
    ///
    /// # Errors
    /// What the file system says.
    pub fn is_driven(&self, id: &str) -> Result<bool, LedgerError> {
        let path = self.run_folder(id).join("lock");
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(source) => return Err(LedgerError::Io { path, source }),
        };
        match file.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(source)) => Err(LedgerError::Io { path, source }),
        }
    }

    /// Asks whoever drives the run, now or later, to stop it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn ask_to_cancel(&self, id: &str) -> Result<(), LedgerError> {
        let path = self.cancel_file(id);
        File::create(&path).map(drop).map_err(|source| LedgerError::Io { path, source })
    }

    /// Whether somebody asked to stop the run.
    pub fn cancel_asked(&self, id: &str) -> bool {
        self.cancel_file(id).exists()
    }

    fn cancel_file(&self, id: &str) -> PathBuf {
        self.run_folder(id).join("cancel")
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        // SQLite rolls back what a panicking thread left open; the connection stays usable.
        self.connection.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Somebody who only looks whether the run is driven holds the lock for a moment: that must not keep us off.
    fn lock_patiently(&self, id: &str) -> Result<Option<File>, LedgerError> {
        for _ in 0..10 {
            if let Some(lock) = self.lock(id)? {
                return Ok(Some(lock));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(None)
    }

    /// Makes the caller the only one that goes on with this survey, as long as the file is open; `None`: somebody else is.
    ///
    /// # Errors
    /// What the file system says.
    pub fn take_survey(&self, name: &str) -> Result<Option<File>, LedgerError> {
        Self::lock_in(&self.folder.join("surveys").join(name))
    }

    fn lock(&self, id: &str) -> Result<Option<File>, LedgerError> {
        Self::lock_in(&self.run_folder(id))
    }

    fn lock_in(folder: &Path) -> Result<Option<File>, LedgerError> {
        let path = folder.join("lock");
        let at = |source| LedgerError::Io { path: path.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(at)?;
        let file = File::options().create(true).append(true).open(&path).map_err(at)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(at(source)),
        }
    }
}

/// Makes or checks the tables; returns the owner.
fn prepare(connection: &Connection) -> Result<String, LedgerError> {
    atomically(connection, tables_and_owner)
}

fn tables_and_owner(connection: &Connection) -> Result<String, LedgerError> {
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if found > SCHEMA {
        return Err(LedgerError::Newer { found, known: SCHEMA });
    }
    connection.execute_batch(TABLES)?;
    connection.execute_batch(&format!("PRAGMA user_version = {SCHEMA}"))?;
    connection
        .execute("INSERT OR IGNORE INTO meta (key, value) VALUES ('owner', ?1)", [random_word(8)])
        .and_then(|_| connection.query_row("SELECT value FROM meta WHERE key = 'owner'", [], |row| row.get(0)))
        .map_err(LedgerError::from)
}

fn read_runs(connection: &Connection) -> Result<Vec<RunRecord>, LedgerError> {
    let ids: Vec<String> = connection
        .prepare("SELECT id FROM runs ORDER BY created_at_ms, id")?
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    ids.iter().map(|id| read_run(connection, id)).collect()
}

fn read_run(connection: &Connection, id: &str) -> Result<RunRecord, LedgerError> {
    let row: Option<(i64, String)> = connection
        .query_row("SELECT created_at_ms, spec FROM runs WHERE id = ?1", [id], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((created_at_ms, spec)) = row else {
        return Err(LedgerError::NoSuchRun { run: id.to_owned() });
    };
    let rows: Vec<(i64, String)> = connection
        .prepare("SELECT at_ms, event FROM events WHERE run = ?1 ORDER BY seq")?
        .query_map([id], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<Result<_, _>>()?;
    let damaged = |why: String| LedgerError::Damaged { run: id.to_owned(), why };
    let spec = serde_json::from_str(&spec).map_err(|e| damaged(e.to_string()))?;
    let mut state = RunState::initial();
    let mut events = Vec::with_capacity(rows.len());
    for (at_ms, text) in rows {
        let event: RunEvent = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
        state = run::next(&state, &event).map_err(|e| damaged(e.to_string()))?;
        events.push(Entry { at_ms: at_ms as u64, event });
    }
    Ok(RunRecord { id: id.to_owned(), created_at_ms: created_at_ms as u64, spec, events, state })
}

/// Does something that nobody else's writing, in this process or another, may come in between.
fn atomically<T>(
    connection: &Connection,
    act: impl FnOnce(&Connection) -> Result<T, LedgerError>,
) -> Result<T, LedgerError> {
    connection.execute_batch("BEGIN IMMEDIATE")?;
    let done = act(connection);
    connection.execute_batch(if done.is_ok() { "COMMIT" } else { "ROLLBACK" })?;
    done
}

/// The right to drive one run: the only way to write its events. Dropping it abandons the run.
pub struct RunWriter {
    ledger: Ledger,
    record: RunRecord,
    _lock: File,
}

impl RunWriter {
    /// The run as it is now.
    pub fn record(&self) -> &RunRecord {
        &self.record
    }

    /// Its state.
    pub fn state(&self) -> &RunState {
        &self.record.state
    }

    /// Its folder: key, log.
    pub fn folder(&self) -> PathBuf {
        self.ledger.run_folder(&self.record.id)
    }

    /// The owner in lease tags.
    pub fn owner(&self) -> &str {
        &self.ledger.owner
    }

    /// Whether somebody asked to stop the run.
    pub fn cancel_asked(&self) -> bool {
        self.ledger.cancel_asked(&self.record.id)
    }

    /// The same question, for a task of its own.
    pub fn cancel_probe(&self) -> impl Fn() -> bool + Send + use<> {
        let file = self.ledger.cancel_file(&self.record.id);
        move || file.exists()
    }

    /// Writes an event; it is on disk when this returns.
    ///
    /// # Errors
    /// [`LedgerError::Illegal`] when the event cannot happen now: nothing is written. What SQLite says otherwise.
    pub fn append(&mut self, event: RunEvent) -> Result<&RunState, LedgerError> {
        let ledger = self.ledger.clone();
        self.append_to(&ledger.connection(), event)?;
        Ok(&self.record.state)
    }

    /// Writes the intent to rent, unless the budget does not pay for it any more: `worst` is what the instance may cost until its
    /// time limit. Runs that share the budget cannot do so at the same time.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn reserve(&mut self, intent: Intent, worst: Usd) -> Result<bool, LedgerError> {
        let ledger = self.ledger.clone();
        atomically(&ledger.connection(), |connection| {
            if let Some(budget) = self.record.budget()
                && worst > less(budget, &self.sharers(connection)?, |run| run.at_most(now_ms()))
            {
                return Ok(false);
            }
            self.append_to(connection, RunEvent::Creating { intent: Box::new(intent) })?;
            Ok(true)
        })
    }

    /// What there is of the run's budget, if it has one.
    ///
    /// # Errors
    /// What the file system or SQLite says.
    pub fn purse(&self) -> Result<Option<Purse>, LedgerError> {
        let Some(budget) = self.record.budget() else { return Ok(None) };
        let (runs, now) = (self.sharers(&self.ledger.connection())?, now_ms());
        let mut others_under_way = Vec::new();
        for run in &runs {
            if run.id != self.record.id && !run.state.is_at_rest() && self.ledger.is_driven(&run.id)? {
                others_under_way.push(run.id.clone());
            }
        }
        let at_best = |run: &RunRecord| {
            if others_under_way.contains(&run.id) { run.cost(now) } else { run.at_most(now) }
        };
        let left = less(budget, &runs, |run| run.at_most(now));
        Ok(Some(Purse { budget, left, at_best: less(budget, &runs, at_best) }))
    }

    /// This run, and those with which it shares its budget.
    fn sharers(&self, connection: &Connection) -> Result<Vec<RunRecord>, LedgerError> {
        if self.record.spec.survey.is_none() {
            return Ok(vec![self.record.clone()]);
        }
        let mut runs = read_runs(connection)?;
        runs.retain(|run| self.record.shares_budget_with(run));
        Ok(runs)
    }

    fn append_to(&mut self, connection: &Connection, event: RunEvent) -> Result<(), LedgerError> {
        let state = run::next(&self.record.state, &event)?;
        let at_ms = now_ms();
        let seq = self.record.events.len() as i64;
        connection.execute(
            "INSERT INTO events (run, seq, at_ms, event) VALUES (?1, ?2, ?3, ?4)",
            params![self.record.id, seq, at_ms as i64, to_json(&event)],
        )?;
        self.record.events.push(Entry { at_ms, event });
        self.record.state = state;
        Ok(())
    }
}

/// What is left of a budget without what these runs take of it.
fn less(budget: Usd, runs: &[RunRecord], takes: impl Fn(&RunRecord) -> Usd) -> Usd {
    let taken: Usd = runs.iter().map(takes).sum();
    Usd::from_micros(budget.micros() - taken.micros())
}

/// Why the ledger could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// Written by a later version.
    #[error("the ledger has version {found}; this program knows version {known}")]
    Newer {
        /// Its version.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// A record does not make sense.
    #[error("run {run}: its record in the ledger is damaged: {why}")]
    Damaged {
        /// Which.
        run: String,
        /// What is wrong.
        why: String,
    },
    /// Unknown.
    #[error("there is no run `{run}`")]
    NoSuchRun {
        /// What was asked for.
        run: String,
    },
    /// Too short.
    #[error("{count} runs begin with `{prefix}`")]
    Ambiguous {
        /// What was asked for.
        prefix: String,
        /// How many match.
        count: usize,
    },
    /// Some process drives it.
    #[error("run {run} is being driven by another process")]
    Driven {
        /// Which.
        run: String,
    },
    /// The event cannot happen now.
    #[error(transparent)]
    Illegal(#[from] IllegalEvent),
    /// The file system said no.
    #[error("{}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// SQLite said no.
    #[error("the ledger: {0}")]
    Sqlite(#[from] rusqlite::Error),
}

impl LedgerError {
    /// What to do about it, where something can be done.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Newer { .. } => Some("use the newer program, or another state folder (OUTLIERS_STATE)".to_owned()),
            Self::NoSuchRun { .. } => Some("`outliers runs list` shows all runs".to_owned()),
            Self::Ambiguous { .. } => Some("give more letters of the id".to_owned()),
            Self::Driven { run } => Some(format!("`outliers runs show {run}` shows how it is going")),
            _ => None,
        }
    }
}

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    #[cfg(test)]
    if let Some(now) = crate::deploy::fake::wound_ms() {
        return now;
    }
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
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use outliers_protocol::{JobSpec, ModelSource};

    use super::*;
    use crate::broker::{GpuRequest, InstanceId, LeaseTag, Offer};
    use crate::estimate::Work;
    use crate::run::{Ending, Membership, Pin, Watch};
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
            max_duration_s: 60,
            watch: Watch::NEVER,
            budget: None,
            results: "/r".into(),
            survey: None,
        }
    }

    fn creating() -> RunEvent {
        let offer = Offer::new("fake", "o".into(), 0, UsdPerHour::from_dollars(3600.0));
        let tag = LeaseTag { owner: "o".into(), run: "r".into(), nonce: "n".into(), deadline: 7 };
        RunEvent::Creating { intent: Box::new(Intent { offer, tag }) }
    }

    #[test]
    fn what_was_written_is_replayed_by_the_next_process() {
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
        assert!(ledger.find("").is_ok(), "one run only: the empty prefix is enough");
        ledger.plan(&spec()).unwrap();
        assert!(matches!(ledger.find(""), Err(LedgerError::Ambiguous { count: 2, .. })));
    }

    #[test]
    fn an_illegal_event_is_refused_and_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let mut run = ledger.plan(&spec()).unwrap();
        assert!(matches!(run.append(RunEvent::Gone), Err(LedgerError::Illegal(_))));
        run.append(RunEvent::Stopped { ending: Ending::Interrupted }).unwrap();
        assert!(matches!(run.append(creating()), Err(LedgerError::Illegal(_))));
        assert_eq!(ledger.run(&run.record().id).unwrap().events.len(), 1);
    }

    #[test]
    fn a_run_has_one_driver_and_is_abandoned_without_one() {
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
    fn cancelling_is_seen_by_the_driver() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let run = ledger.plan(&spec()).unwrap();
        assert!(!run.cancel_asked());
        Ledger::open(folder.path()).unwrap().ask_to_cancel(&run.record().id).unwrap();
        assert!(run.cancel_asked());
    }

    #[test]
    fn a_newer_ledger_is_refused_and_left_alone() {
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
    fn damage_is_named_not_guessed_around() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let mut run = ledger.plan(&spec()).unwrap();
        run.append(creating()).unwrap();
        let raw = Connection::open(folder.path().join("ledger.db")).unwrap();
        raw.execute("UPDATE events SET event = '{\"event\":\"gone\"}'", []).unwrap();
        assert!(matches!(ledger.runs(), Err(LedgerError::Damaged { .. })));
        raw.execute("UPDATE events SET event = '{'", []).unwrap();
        assert!(matches!(ledger.runs(), Err(LedgerError::Damaged { .. })));
    }

    #[test]
    fn the_bill_runs_from_the_create_call_to_gone() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let mut run = ledger.plan(&spec()).unwrap();
        assert_eq!(run.record().cost(now_ms() + 9_000_000), Usd::ZERO);
        run.append(creating()).unwrap();
        let since = run.record().changed_at_ms();
        std::thread::sleep(Duration::from_millis(20));
        run.append(RunEvent::Created { instance: InstanceId("i".into()), price: None }).unwrap();
        assert_eq!(run.record().cost(since + 2_000), Usd::from_dollars(2.0));
        run.append(RunEvent::Stopped { ending: Ending::Interrupted }).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        run.append(RunEvent::Gone).unwrap();
        let bill = run.record().cost(since + 9_000_000);
        assert!(bill >= Usd::from_dollars(0.02) && bill < Usd::from_dollars(60.0), "{bill}");
    }

    /// A run of the survey `s` with this budget in dollars.
    fn member(budget: f64) -> RunSpec {
        let survey = Some(Membership { survey: "s".into(), model: "m".into() });
        RunSpec { survey, budget: Some(Usd::from_dollars(budget)), ..spec() }
    }

    /// The intent to rent for the run's time limit, and what that may cost: $3960/h for a minute is $66.
    fn intent_of(spec: &RunSpec) -> (Intent, Usd) {
        let offer = Offer::new("fake", "o".into(), 0, UsdPerHour::from_dollars(3600.0));
        let worst = spec.agreed(&offer).cost(Duration::from_secs(spec.max_duration_s));
        let deadline = now_ms() / 1000 + spec.max_duration_s;
        (Intent { offer, tag: LeaseTag { owner: "o".into(), run: "r".into(), nonce: "n".into(), deadline } }, worst)
    }

    #[test]
    fn runs_of_a_survey_cannot_together_pass_its_budget() {
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
    fn a_purse_tells_what_is_gone_from_what_may_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(folder.path()).unwrap();
        let (mut one, two) = (ledger.plan(&member(100.0)).unwrap(), ledger.plan(&member(100.0)).unwrap());
        let dollars = Usd::from_dollars;
        let all = Purse { budget: dollars(100.0), left: dollars(100.0), at_best: dollars(100.0) };
        assert_eq!(two.purse().unwrap(), Some(all));
        let (intent, worst) = intent_of(&one.record().spec);
        assert!(one.reserve(intent, worst).unwrap());
        let purse = two.purse().unwrap().unwrap();
        assert!(purse.left <= dollars(36.0) && purse.at_best > dollars(99.0), "{purse:?}");
        one.append(RunEvent::Created { instance: InstanceId("i".into()), price: None }).unwrap();
        assert!(two.purse().unwrap().unwrap().left < dollars(36.0), "the price is not the last word yet");
        one.append(RunEvent::Reached { pin: Pin("p".into()), price: None }).unwrap();
        let purse = two.purse().unwrap().unwrap();
        assert!(purse.left > dollars(36.0) && purse.left <= dollars(41.0), "{purse:?}");
        drop(one);
        let purse = two.purse().unwrap().unwrap();
        assert_eq!(purse.left, purse.at_best, "what nobody drives gives nothing back before its time is up");
        assert_eq!(ledger.plan(&spec()).unwrap().purse().unwrap(), None);
    }

    #[test]
    fn many_may_open_a_ledger_that_is_not_there_yet() {
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
    fn two_processes_may_write_different_runs_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let written = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let ledger = Ledger::open(folder.path()).unwrap();
                    for _ in 0..5 {
                        let mut run = ledger.plan(&spec()).unwrap();
                        run.append(creating()).unwrap();
                        run.append(RunEvent::NotCreated { reason: "no".into(), refused: true }).unwrap();
                        written.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(Ledger::open(folder.path()).unwrap().runs().unwrap().len(), written.into_inner());
    }

    #[test]
    fn words_fit_into_tags() {
        for length in [1, 8, 30] {
            let word = random_word(length);
            assert_eq!(word.len(), length);
            let tag = LeaseTag { owner: word.clone(), run: word.clone(), nonce: word, deadline: 1 };
            assert_eq!(tag.to_string().parse(), Ok(tag));
        }
    }
}
