use super::super::tests::spec;
use super::*;
use crate::run::deploy::tests::fake::offer;
use crate::run::{Intent, RunOutcome, SavedResults};

fn creating(owner: &str, run: &str) -> RunEvent {
    let tag = crate::cloud::broker::LeaseTag { owner: owner.into(), run: run.into(), nonce: "n".into(), deadline: 7 };
    RunEvent::Creating { intent: Box::new(Intent { offer: offer("a", 1.0), tag }) }
}

/// A finished run with a record beside its results; returns its id.
fn finished(ledger: &Ledger, results: &Path) -> String {
    let mut run = ledger.plan(&spec()).unwrap();
    let id = run.record().id.clone();
    let folder = results.join(format!("m-{id}"));
    fs::create_dir_all(&folder).unwrap();
    let results = SavedResults { folder: folder.to_string_lossy().into_owned(), complete: true };
    for event in [
        creating(ledger.owner(), &id),
        RunEvent::Created { instance: crate::cloud::broker::InstanceId("i".into()), price: None },
        RunEvent::Reached { pin: crate::run::Pin("p".into()), price: None },
        RunEvent::Launched,
        RunEvent::WorkerEnded { exit: Some(0) },
        RunEvent::Fetched { results, ending: RunOutcome::Completed },
        RunEvent::Terminate,
        RunEvent::Gone,
    ] {
        run.append(event).unwrap();
    }
    fs::write(folder.join(RUN_FILE), serde_json::to_vec(run.record()).unwrap()).unwrap();
    id
}

fn repaired(folder: &Path, results: &Path) -> (Repaired, Ledger) {
    let repaired = Ledger::repair(folder, results, None).unwrap();
    (repaired, Ledger::open(folder).unwrap())
}

#[test]
fn garbage_ledger_is_kept_and_rebuilt_from_results() {
    let (state, results) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ledger = Ledger::open(state.path()).unwrap();
    let owner = ledger.owner().to_owned();
    let told = finished(&ledger, results.path());
    let lost = ledger.plan(&spec()).unwrap().record().id.clone();
    let of_survey = finished(&ledger, &results.path().join("survey"));
    let beside = finished(&ledger, &ledger.run_folder(&lost));
    let before = ledger.run(&told).unwrap();
    drop(ledger);
    fs::write(state.path().join(FILE), "no ledger at all, but some text that somebody wrote over it").unwrap();
    let error = Ledger::open(state.path()).err().unwrap();
    assert!(error.to_string().contains(FILE) && error.hint().unwrap().contains("doctor --repair"), "{error}");
    let (found, ledger) = repaired(state.path(), results.path());
    assert_eq!(ledger.owner(), owner, "its instances are still its own");
    assert_eq!((found.kept, found.from_results), (0, 3));
    assert_eq!(found.lost.iter().map(|lost| &lost.run).collect::<Vec<_>>(), [&lost]);
    let aside = found.aside.unwrap();
    assert!(aside.to_string_lossy().contains("ledger.db.damaged-20"), "{aside:?}");
    assert!(fs::read_to_string(aside).unwrap().starts_with("no ledger"));
    assert_eq!(ledger.run(&told).unwrap(), before);
    assert!(ledger.run(&of_survey).is_ok() && ledger.run(&beside).is_ok());
    assert!(repaired(state.path(), results.path()).0.aside.is_none(), "there is nothing left to repair");
}

#[test]
fn repair_keeps_readable_runs_and_names_the_others() {
    let (state, results) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ledger = Ledger::open(state.path()).unwrap();
    let (good, told, lost) = (
        ledger.plan(&spec()).unwrap().record().id.clone(),
        finished(&ledger, results.path()),
        ledger.plan(&spec()).unwrap().record().id.clone(),
    );
    let raw = Connection::open(state.path().join(FILE)).unwrap();
    raw.execute("UPDATE runs SET spec = '{' WHERE id IN (?1, ?2)", [&told, &lost]).unwrap();
    drop((raw, ledger));
    let (found, ledger) = repaired(state.path(), results.path());
    assert_eq!((found.kept, found.from_results), (1, 1));
    assert_eq!(found.lost.len(), 1);
    assert!(found.lost[0].run == lost && found.lost[0].why.contains("EOF"), "{found:?}");
    assert!(ledger.run(&good).is_ok() && ledger.run(&told).is_ok());
    assert!(ledger.records().unwrap().unreadable.is_empty());
}

#[test]
fn repair_is_refused_while_a_run_is_driven() {
    let (state, results) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ledger = Ledger::open(state.path()).unwrap();
    let driven = ledger.plan(&spec()).unwrap();
    fs::write(state.path().join(FILE), "garbage, and long enough to be looked at for its first line").unwrap();
    let error = Ledger::repair(state.path(), results.path(), None).unwrap_err();
    assert!(matches!(&error, LedgerError::Driven { run } if *run == driven.record().id), "{error}");
    assert!(fs::read_to_string(state.path().join(FILE)).unwrap().starts_with("garbage"));
}

#[test]
fn repair_ignores_runs_of_other_owners_and_finds_its_owner() {
    let (state, results) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let elsewhere = tempfile::tempdir().unwrap();
    let other = Ledger::open(elsewhere.path()).unwrap();
    finished(&other, results.path());
    let owner = other.owner().to_owned();
    fs::write(state.path().join(FILE), "garbage, and long enough to be looked at for its first line").unwrap();
    fs::write(state.path().join(OWNER_FILE), "me\n").unwrap();
    let (found, ledger) = repaired(state.path(), results.path());
    assert_eq!((found.from_results, ledger.owner()), (0, "me"));
    drop(ledger);
    fs::write(state.path().join(FILE), "garbage, and long enough to be looked at for its first line").unwrap();
    fs::remove_file(state.path().join(OWNER_FILE)).unwrap();
    let (found, ledger) = repaired(state.path(), results.path());
    assert_eq!((found.from_results, ledger.owner()), (1, owner.as_str()), "one owner has all results: it is this one");
}
