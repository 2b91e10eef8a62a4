//! Rebuilds a damaged ledger from its readable parts, and from the records beside results.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, params};

use super::{FILE, Ledger, LedgerError, OWNER_FILE, RUN_FILE, Records, RunRecord, Unreadable, now_ms, to_json};
use crate::calendar::rfc3339;
use crate::files::{read_json, write_whole};
use crate::run::{RunEvent, RunState, next};

/// Result of a repair.
#[derive(Debug)]
pub struct Repaired {
    /// Path of the damaged file; `None` if there was none or it was intact.
    pub aside: Option<PathBuf>,
    /// Number of runs read from the damaged file.
    pub kept: usize,
    /// Number of runs read from their results.
    pub from_results: usize,
    /// Runs of which only the id is known.
    pub lost: Vec<Unreadable>,
}

/// Readable parts of a damaged ledger.
#[derive(Default)]
struct Salvage {
    owner: Option<String>,
    records: Records,
    /// Why it is not a ledger.
    wrong: Option<LedgerError>,
}

impl Ledger {
    /// Renames a damaged ledger and creates a new one from its readable parts and from the records
    /// in `results`. `owner` is the owner of existing instances, if no file on this machine states
    /// it.
    ///
    /// # Errors
    /// [`LedgerError::Newer`] and [`LedgerError::Driven`], with nothing changed; errors of the
    /// file system or SQLite.
    pub fn repair(folder: &Path, results: &Path, owner: Option<String>) -> Result<Repaired, LedgerError> {
        let known = known_runs(folder);
        if let Some(run) = known.iter().find(|run| is_held(folder, run)) {
            return Err(LedgerError::Driven { run: run.clone() });
        }
        let salvage = salvage(folder);
        match salvage.wrong {
            Some(newer @ LedgerError::Newer { .. }) => return Err(newer),
            None if salvage.records.unreadable.is_empty() => {
                return Ok(Repaired {
                    aside: None,
                    kept: salvage.records.runs.len(),
                    from_results: 0,
                    lost: Vec::new(),
                });
            }
            _ => {}
        }
        // Results that did not fit in their folder are in the runs' folders.
        let at_home = [of_results(results), of_results(&folder.join("runs"))].concat();
        let owner = Self::owner_beside(folder).or(salvage.owner).or_else(|| only_owner(&at_home)).or(owner);
        let aside = set_aside(folder)?;
        if let Some(owner) = &owner {
            let path = folder.join(OWNER_FILE);
            write_whole(&path, owner.as_bytes()).map_err(|source| LedgerError::Io { path, source })?;
        }
        let ledger = Self::open(folder)?;
        let kept = salvage.records.runs.len();
        let mut runs: BTreeMap<String, RunRecord> =
            salvage.records.runs.into_iter().map(|run| (run.id.clone(), run)).collect();
        let is_ours = |run: &RunRecord| owners(run).all(|of| of == ledger.owner);
        for run in at_home.into_iter().filter(is_ours) {
            runs.entry(run.id.clone()).or_insert(run);
        }
        runs.values().try_for_each(|run| ledger.insert(run))?;
        let unreadable = salvage.records.unreadable;
        let why = |run: &str| unreadable.iter().find(|lost| lost.run == run).map(|lost| lost.why.clone());
        let all = known.into_iter().chain(unreadable.iter().map(|lost| lost.run.clone()));
        let lost: BTreeSet<String> = all.filter(|run| !runs.contains_key(run)).collect();
        let tell = |run: String| Unreadable {
            why: why(&run).unwrap_or_else(|| "neither the ledger nor any results tell what it was".to_owned()),
            run,
        };
        Ok(Repaired { aside, kept, from_results: runs.len() - kept, lost: lost.into_iter().map(tell).collect() })
    }

    fn insert(&self, run: &RunRecord) -> Result<(), LedgerError> {
        let connection = self.connection();
        super::atomically(&connection, |connection| {
            connection.execute(
                "INSERT INTO runs (id, created_at_ms, job_key, spec) VALUES (?1, ?2, ?3, ?4)",
                params![run.id, run.created_at_ms as i64, run.spec.job_key, to_json(&run.spec)],
            )?;
            for (seq, entry) in run.events.iter().enumerate() {
                connection.execute(
                    "INSERT INTO events (run, seq, at_ms, event) VALUES (?1, ?2, ?3, ?4)",
                    params![run.id, seq as i64, entry.at_ms as i64, to_json(&entry.event)],
                )?;
            }
            Ok(())
        })
        .map_err(|error| self.named(error))
    }
}

/// Every run with a folder, and those in the results.
fn known_runs(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder.join("runs")).into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn is_held(folder: &Path, run: &str) -> bool {
    let lock = fs::File::open(folder.join("runs").join(run).join("lock"));
    lock.is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(fs::TryLockError::WouldBlock)))
}

fn salvage(folder: &Path) -> Salvage {
    let mut salvage = Salvage::default();
    let read = Connection::open_with_flags(folder.join(FILE), OpenFlags::SQLITE_OPEN_READ_WRITE)
        .map_err(LedgerError::from)
        .and_then(|connection| {
            let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
            if found > super::SCHEMA {
                return Err(LedgerError::Newer { found, known: super::SCHEMA });
            }
            let owner = connection.query_row("SELECT value FROM meta WHERE key = 'owner'", [], |row| row.get(0));
            salvage.owner = owner.ok();
            salvage.records = super::read_records(&connection)?;
            connection.query_row("SELECT value FROM meta WHERE key = 'owner'", [], |_| Ok(()))?;
            Ok(())
        });
    salvage.wrong = read.err();
    salvage
}

/// The valid records beside results, those of surveys included.
fn of_results(results: &Path) -> Vec<RunRecord> {
    let below = |folder: &Path| -> Vec<PathBuf> {
        fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect()
    };
    let folders = below(results);
    let deeper: Vec<PathBuf> = folders.iter().flat_map(|folder| below(folder)).collect();
    folders.iter().chain(&deeper).filter_map(|folder| read(&folder.join(RUN_FILE))).collect()
}

fn read(path: &Path) -> Option<RunRecord> {
    let run: RunRecord = read_json(path).ok()?;
    let plain = !run.id.is_empty() && run.id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let state = run.events.iter().try_fold(RunState::initial(), |state, entry| next(&state, &entry.event)).ok()?;
    plain.then_some(RunRecord { state, ..run })
}

/// Owners in the tags of its instances.
fn owners(run: &RunRecord) -> impl Iterator<Item = &str> {
    run.events.iter().filter_map(|entry| match &entry.event {
        RunEvent::Creating { intent } => Some(intent.tag.owner.as_str()),
        _ => None,
    })
}

fn only_owner(runs: &[RunRecord]) -> Option<String> {
    let all: BTreeSet<&str> = runs.iter().flat_map(owners).collect();
    all.first().filter(|_| all.len() == 1).map(|owner| (*owner).to_owned())
}

/// Renames the file, with SQLite's companion files, to a name with the time.
fn set_aside(folder: &Path) -> Result<Option<PathBuf>, LedgerError> {
    let (path, date) = (folder.join(FILE), rfc3339(now_ms() / 1000).replace(':', ""));
    let aside = folder.join(format!("{FILE}.damaged-{date}"));
    if !path.exists() {
        return Ok(None);
    }
    for end in ["", "-wal", "-shm"] {
        let (from, to) = (folder.join(format!("{FILE}{end}")), PathBuf::from(format!("{}{end}", aside.display())));
        match fs::rename(&from, to) {
            Err(error) if end.is_empty() || error.kind() != std::io::ErrorKind::NotFound => {
                return Err(LedgerError::Io { path: from, source: error });
            }
            _ => {}
        }
    }
    Ok(Some(aside))
}

#[cfg(test)]
mod tests;
