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

use crate::run::{self, IllegalEvent, RunEvent, RunSpec, RunState};
use crate::units::Usd;

/// Version of the tables and of what stands in them. An older program refuses a newer ledger.
const SCHEMA: i64 = 3;

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

impl RunRecord {
    /// What the run's instances have cost until they were seen gone, or until `now_ms`: our arithmetic, never less than the time
    /// they can have existed times their price; not the cloud's bill.
    pub fn cost(&self, now_ms: u64) -> Usd {
        let mut cost = Usd::ZERO;
        let mut from = None;
        let mut state = RunState::initial();
        let bill = |from: Option<(u64, crate::units::UsdPerHour)>, to: u64| {
            from.map_or(Usd::ZERO, |(since, price)| price.cost(Duration::from_millis(to.saturating_sub(since))))
        };
        let mut asked_at = self.created_at_ms;
        for entry in &self.events {
            let Ok(new) = run::next(&state, &entry.event) else { break };
            match (&entry.event, new.rental()) {
                (RunEvent::Creating { .. }, _) => asked_at = entry.at_ms,
                // It may have been there, and billed, from the first call on: a controller may have died in between.
                (RunEvent::Created { .. }, Some(rental)) => from = Some((asked_at, rental.price)),
                (RunEvent::Reached { .. }, Some(rental)) => from = from.map(|(since, _)| (since, rental.price)),
                (RunEvent::Gone | RunEvent::Vanished, _) => cost = cost + bill(from.take(), entry.at_ms),
                _ => {}
            }
            state = new;
        }
        cost + bill(from, now_ms)
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
        let ids: Vec<String> = self
            .connection()
            .prepare("SELECT id FROM runs ORDER BY created_at_ms, id")?
            .query_map([], |row| row.get(0))?
            .collect::<Result<_, _>>()?;
        ids.iter().map(|id| self.run(id)).collect()
    }

    /// One run by its id.
    ///
    /// # Errors
    /// [`LedgerError::NoSuchRun`], or [`LedgerError::Damaged`] when the record cannot be read or replayed.
    pub fn run(&self, id: &str) -> Result<RunRecord, LedgerError> {
        let connection = self.connection();
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

    fn lock(&self, id: &str) -> Result<Option<File>, LedgerError> {
        let folder = self.run_folder(id);
        let path = folder.join("lock");
        let at = |source| LedgerError::Io { path: path.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(at)?;
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
    connection.execute_batch("BEGIN IMMEDIATE")?;
    let owner = tables_and_owner(connection);
    connection.execute_batch(if owner.is_ok() { "COMMIT" } else { "ROLLBACK" })?;
    owner
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
        let state = run::next(&self.record.state, &event)?;
        let at_ms = now_ms();
        let seq = self.record.events.len() as i64;
        self.ledger.connection().execute(
            "INSERT INTO events (run, seq, at_ms, event) VALUES (?1, ?2, ?3, ?4)",
            params![self.record.id, seq, at_ms as i64, to_json(&event)],
        )?;
        self.record.events.push(Entry { at_ms, event });
        self.record.state = state;
        Ok(&self.record.state)
    }
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
    use crate::run::{Ending, Intent, Pin, Watch};
    use crate::units::{Bytes, UsdPerHour};

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
