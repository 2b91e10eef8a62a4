//! The state of one model of a survey, by the ledger and the folders.

use std::collections::HashMap;
use std::path::Path;

use super::index::{Index, IndexEntry, ModelOutcome};
use crate::files::read_json;
use crate::run::deploy::{JobIdentity, holds};
use crate::run::ledger::{RUN_FILE, RunRecord};
use crate::run::{Membership, RunFailureKind, RunOutcome};

/// A model of a survey with its work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member<'a> {
    /// The survey's name.
    pub(crate) survey: &'a str,
    /// The model's name in it.
    pub(crate) name: &'a str,
    /// Identity of its job.
    pub(crate) identity: &'a JobIdentity,
    /// Key of its work on this survey's brokers.
    pub(crate) job_key: &'a str,
    /// The survey's folder.
    pub(crate) folder: &'a Path,
    /// Its entry in the previous index.
    pub(crate) before: Option<&'a IndexEntry>,
}

impl Member<'_> {
    /// Its outcome, and the run of the same work with this outcome: one with complete results,
    /// else the latest. If the ledger has none, since it may be new, the folder and its index are
    /// used.
    pub(crate) fn index_entry<'r>(&self, runs: &'r [RunRecord]) -> (IndexEntry, Option<&'r RunRecord>) {
        let mut latest = None;
        for run in runs.iter().rev().filter(|run| self.is_run_by(run)) {
            let (outcome, why) = judge(run, &self.folder.join(self.name));
            if outcome == ModelOutcome::Complete {
                return (self.entry(Some(run), outcome, why), Some(run));
            }
            latest.get_or_insert((run, outcome, why));
        }
        if let Some(line) = self.at_home() {
            return (line, None);
        }
        let is_failure = |line: &&IndexEntry| matches!(line.outcome, ModelOutcome::Partial | ModelOutcome::Failed);
        let failed = self.before.filter(is_failure).filter(|line| line.job_key == self.job_key);
        match (latest, failed) {
            (Some((run, outcome, why)), _) => (self.entry(Some(run), outcome, why), Some(run)),
            (None, Some(before)) => (before.clone(), None),
            (None, None) => (self.entry(None, ModelOutcome::Open, None), None),
        }
    }

    /// Complete results of the same work in its folder, by the record and the hashes beside them.
    fn at_home(&self) -> Option<IndexEntry> {
        let place = self.folder.join(self.name);
        let run: RunRecord = read_json(&place.join(RUN_FILE)).ok()?;
        let is_whole = self.is_run_by(&run) && holds(&place, &run.id).is_ok();
        let line = || self.entry(Some(&run), ModelOutcome::Complete, None);
        is_whole.then(|| IndexEntry { folder: Some(self.name.to_owned()), ..line() })
    }

    /// Whether a run does this work for this survey, on any broker.
    pub(crate) fn is_run_by(&self, run: &RunRecord) -> bool {
        let is_this = |member: &Membership| (member.survey.as_str(), member.model.as_str()) == (self.survey, self.name);
        run.spec.survey.as_ref().is_some_and(is_this)
            && run.spec.job == self.identity.job
            && run.spec.job_key == self.identity.key(&run.spec.brokers)
    }

    fn entry(&self, run: Option<&RunRecord>, outcome: ModelOutcome, why: Option<String>) -> IndexEntry {
        IndexEntry {
            name: self.name.to_owned(),
            model: self.identity.job.model.name().to_owned(),
            job_key: self.job_key.to_owned(),
            run: run.map(|run| run.id.clone()),
            outcome,
            folder: run.and_then(|run| brought(run, outcome)),
            why,
        }
    }
}

/// The runs of each model of all surveys, oldest first.
pub(crate) struct Members<'a>(HashMap<&'a Membership, Vec<&'a RunRecord>>);

impl<'a> Members<'a> {
    /// From all runs of the ledger.
    pub(crate) fn of(runs: &'a [RunRecord]) -> Self {
        let mut of_model: HashMap<_, Vec<_>> = HashMap::new();
        for run in runs {
            if let Some(member) = &run.spec.survey {
                of_model.entry(member).or_default().push(run);
            }
        }
        Self(of_model)
    }

    /// An index as the runs' records have it: the survey's command wrote it, and `attach` may have
    /// brought runs home since. Nothing is read of their results.
    pub(crate) fn on(&self, index: Index) -> Index {
        let by_record = |run: &RunRecord| {
            let outcome = outcome(run);
            let ending = run.state.ending().filter(|_| run.state.is_at_rest() && outcome != ModelOutcome::Complete);
            (outcome, ending.map(ToString::to_string))
        };
        self.on_each(index, |run, _| by_record(run))
    }

    /// The same by the results in the survey's folder too.
    pub(crate) fn in_folder(&self, folder: &Path, index: Index) -> Index {
        self.on_each(index, |run, name| judge(run, &folder.join(name)))
    }

    fn on_each(&self, index: Index, judge: impl Fn(&RunRecord, &str) -> (ModelOutcome, Option<String>)) -> Index {
        let models = index.models.into_iter().map(|line| self.on_line(&index.survey, line, &judge)).collect();
        Index { models, ..index }
    }

    fn on_line(
        &self,
        survey: &str,
        line: IndexEntry,
        judge: impl Fn(&RunRecord, &str) -> (ModelOutcome, Option<String>),
    ) -> IndexEntry {
        let member = Membership { survey: survey.to_owned(), model: line.name.clone() };
        let is_its = |run: &RunRecord| line.run.as_ref() == Some(&run.id);
        let all = self.0.get(&member).into_iter().flatten().copied();
        let mut latest: Vec<&RunRecord> = all.filter(|run| is_its(run) || run.spec.job_key == line.job_key).collect();
        latest.sort_by_key(|run| outcome(run) == ModelOutcome::Complete);
        let Some(run) = latest.pop() else { return line };
        // The survey's command has looked at the files too.
        let was_looked_at = is_its(run) && (line.outcome != ModelOutcome::Open || line.why.is_some());
        if was_looked_at || line.outcome == ModelOutcome::Complete {
            return line;
        }
        let (outcome, why) = judge(run, &line.name);
        IndexEntry { run: Some(run.id.clone()), outcome, folder: brought(run, outcome), why, ..line }
    }
}

/// Name of the folder that came home, if one did.
fn brought(run: &RunRecord, outcome: ModelOutcome) -> Option<String> {
    let results = run.state.results().filter(|_| outcome != ModelOutcome::Open)?;
    Some(Path::new(&results.folder).file_name()?.to_str()?.to_owned())
}

/// What became of a model by the record of a run, and by its results, which belong in `place`.
fn judge(run: &RunRecord, place: &Path) -> (ModelOutcome, Option<String>) {
    let Some(ending) = run.state.ending().filter(|_| run.state.is_at_rest()) else {
        return (ModelOutcome::Open, None);
    };
    if *ending == RunOutcome::Completed {
        let Err(flaw) = holds(place, &run.id) else { return (ModelOutcome::Complete, None) };
        let elsewhere = run.state.results().map(|results| Path::new(&results.folder));
        return match elsewhere.filter(|folder| *folder != place && holds(folder, &run.id).is_ok()) {
            Some(folder) => {
                let (from, to) = (folder.display(), place.display());
                (ModelOutcome::Partial, Some(format!("its results could not be saved there: move {from} to {to}")))
            }
            // They were there: without them it is as if it had not been run.
            None => (ModelOutcome::Open, Some(flaw)),
        };
    }
    (outcome(run), Some(ending.to_string()))
}

/// What became of a model by a run's record alone: nothing is read of its results.
fn outcome(run: &RunRecord) -> ModelOutcome {
    match run.state.ending().filter(|_| run.state.is_at_rest()) {
        None => ModelOutcome::Open,
        Some(RunOutcome::Completed) => ModelOutcome::Complete,
        Some(ending) if is_to_go_on(ending) => ModelOutcome::Open,
        Some(_) if run.state.results().is_some() => ModelOutcome::Partial,
        Some(_) => ModelOutcome::Failed,
    }
}

/// Whether a run with this outcome was only interrupted: the survey repeats it without being
/// asked.
fn is_to_go_on(ending: &RunOutcome) -> bool {
    match ending {
        RunOutcome::Interrupted | RunOutcome::Cancelled => true,
        RunOutcome::Failed { trouble } => {
            matches!(trouble.kind, RunFailureKind::NoOffer | RunFailureKind::Unfit | RunFailureKind::Budget)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use outliers_protocol::{Failure, FailureKind, JobSpec};

    use super::*;
    use crate::compare::fixture::copy;
    use crate::run::{FailureDetail, RunEvent, RunSpec, SavedResults};
    use crate::ui::status::tests::{ended, rented, run};

    /// A run of the model `owner/a` with job and key.
    fn of_a(id: &str, events: Vec<RunEvent>) -> RunRecord {
        let run = run(id, "owner/a", 60, events);
        let job_key = JobIdentity::of(&run.spec.job).unwrap().key(&run.spec.brokers);
        RunRecord { spec: RunSpec { job_key, ..run.spec.clone() }, ..run }
    }

    fn stopped(ending: RunOutcome) -> Vec<RunEvent> {
        vec![RunEvent::Stopped { ending }]
    }

    fn line(folder: &Path, job: &JobSpec, runs: &[RunRecord]) -> IndexEntry {
        let identity = JobIdentity::of(job).unwrap();
        let (survey, name, job_key) = ("moe-two", "owner--a", "k");
        Member { survey, name, identity: &identity, job_key, folder, before: None }.index_entry(runs).0
    }

    #[test]
    fn model_outcome_follows_ledger_and_files() {
        let home = tempfile::tempdir().unwrap();
        let folder = |name: &str, complete| SavedResults { folder: format!("/nowhere/{name}"), complete };
        let trouble = |kind| RunOutcome::Failed { trouble: FailureDetail { kind, message: "no".into(), hint: None } };
        let failure = Failure { kind: FailureKind::Internal, message: "NaN".into(), hint: None };
        let failed = RunOutcome::WorkerFailed { failure };
        for (events, expected, has_folder) in [
            (rented("r"), ModelOutcome::Open, false),
            (stopped(RunOutcome::Interrupted), ModelOutcome::Open, false),
            (stopped(RunOutcome::Cancelled), ModelOutcome::Open, false),
            (stopped(trouble(RunFailureKind::NoOffer)), ModelOutcome::Open, false),
            (stopped(trouble(RunFailureKind::Unfit)), ModelOutcome::Open, false),
            (stopped(trouble(RunFailureKind::Budget)), ModelOutcome::Open, false),
            (stopped(trouble(RunFailureKind::Host)), ModelOutcome::Failed, false),
            (ended("r", folder("a.partial", false), failed.clone()), ModelOutcome::Partial, true),
            (ended("r", folder("owner--a", true), RunOutcome::Completed), ModelOutcome::Open, false),
        ] {
            let runs = [of_a("r", events)];
            let line = line(home.path(), &runs[0].spec.job, &runs);
            let got = (line.outcome, line.run.as_deref(), line.folder.is_some());
            assert_eq!(got, (expected, Some("r"), has_folder), "{:?}: {line:?}", runs[0].state);
        }
        let whole = copy("mixture", &home.path().join("owner--a"));
        std::fs::write(whole.join(RUN_FILE), r#"{"id":"r1"}"#).unwrap();
        let complete = of_a("r1", ended("r1", folder("owner--a", true), RunOutcome::Completed));
        let later = of_a("r2", ended("r2", folder("a.partial", false), failed));
        let job = complete.spec.job.clone();
        let both = [complete.clone(), later];
        let found = line(home.path(), &job, &both);
        assert_eq!(
            (found.outcome, found.run.as_deref()),
            (ModelOutcome::Complete, Some("r1")),
            "whole results stay what they are"
        );
        let moved = home.path().join("elsewhere");
        std::fs::rename(&whole, &moved).unwrap();
        let away = SavedResults { folder: moved.to_string_lossy().into_owned(), complete: true };
        let away = line(home.path(), &job, &[of_a("r1", ended("r1", away, RunOutcome::Completed))]);
        assert!(away.outcome == ModelOutcome::Partial && away.why.unwrap().contains("move "), "not run again unasked");
        std::fs::rename(&moved, &whole).unwrap();
        std::fs::write(whole.join("results.json"), "{}").unwrap();
        let damaged = line(home.path(), &job, &both[..1]);
        assert!(damaged.outcome == ModelOutcome::Open && damaged.why.unwrap().contains("results.json"));
    }

    #[test]
    fn index_follows_runs_that_another_command_ended() {
        let home = tempfile::tempdir().unwrap();
        let whole = copy("mixture", &home.path().join("owner--a"));
        std::fs::write(whole.join(RUN_FILE), r#"{"id":"r1"}"#).unwrap();
        let brought = SavedResults { folder: whole.to_string_lossy().into_owned(), complete: true };
        let runs = [of_a("r1", ended("r1", brought, RunOutcome::Completed))];
        let line = IndexEntry {
            name: "owner--a".into(),
            model: "owner/a".into(),
            job_key: runs[0].spec.job_key.clone(),
            run: None,
            outcome: ModelOutcome::Open,
            folder: None,
            why: None,
        };
        let index = |line: &IndexEntry| Index {
            schema: super::super::index::SCHEMA,
            survey: "moe-two".into(),
            file: "/s.toml".into(),
            models: vec![line.clone()],
        };
        let now = Members::of(&runs).in_folder(home.path(), index(&line)).models.remove(0);
        assert_eq!((now.outcome, now.run.as_deref()), (ModelOutcome::Complete, Some("r1")));
        assert_eq!(now.folder.as_deref(), Some("owner--a"));
        std::fs::write(whole.join("results.json"), "{}").unwrap();
        assert_eq!(Members::of(&runs).in_folder(home.path(), index(&now)), index(&now), "it was looked at");
        let damaged = Members::of(&runs).in_folder(home.path(), index(&line)).models.remove(0);
        assert!(damaged.outcome == ModelOutcome::Open && damaged.why.unwrap().contains("results.json"));
        assert_eq!(Members::of(&runs).on(index(&line)).models[0].outcome, ModelOutcome::Complete, "by the record");
    }

    #[test]
    fn model_outcome_without_a_ledger_follows_record_and_hashes() {
        let home = tempfile::tempdir().unwrap();
        let brought = SavedResults { folder: "/lost".into(), complete: true };
        let run = of_a("r1", ended("r1", brought, RunOutcome::Completed));
        let place = copy("mixture", &home.path().join("owner--a"));
        crate::compare::fixture::change(&place, "metadata.json", |metadata| {
            metadata["job"] = serde_json::to_value(&run.spec.job).unwrap();
        });
        let record = |run: &RunRecord| {
            std::fs::write(place.join(RUN_FILE), serde_json::to_string(run).unwrap()).unwrap();
        };
        record(&run);
        let found = line(home.path(), &run.spec.job, &[]);
        let got = (found.outcome, found.run.as_deref(), found.folder.as_deref());
        assert_eq!(got, (ModelOutcome::Complete, Some("r1"), Some("owner--a")));
        let other = RunSpec { job_key: "of another text".into(), ..run.spec.clone() };
        record(&RunRecord { spec: other, ..run.clone() });
        assert_eq!(line(home.path(), &run.spec.job, &[]).outcome, ModelOutcome::Open, "other work");
        record(&run);
        std::fs::write(place.join("results.json"), "{}").unwrap();
        assert_eq!(line(home.path(), &run.spec.job, &[]).outcome, ModelOutcome::Open, "damaged");
        // A failed model is repeated only on request, unless its work changed.
        let identity = JobIdentity::of(&run.spec.job).unwrap();
        let before = IndexEntry { outcome: ModelOutcome::Failed, why: Some("no".into()), ..found };
        for (job_key, outcome) in [("k", ModelOutcome::Failed), ("other", ModelOutcome::Open)] {
            let (folder, before) = (Path::new("/nowhere"), Some(&before));
            let member = Member { survey: "moe-two", name: "owner--a", identity: &identity, job_key, folder, before };
            assert_eq!(member.index_entry(&[]).0.outcome, outcome);
        }
    }

    #[test]
    fn only_equal_jobs_count_as_done() {
        let home = tempfile::tempdir().unwrap();
        let run = of_a("r", stopped(RunOutcome::Interrupted));
        let found = |job: &JobSpec, run: &RunRecord| line(home.path(), job, std::slice::from_ref(run)).run;
        assert!(found(&run.spec.job, &run).is_some());
        let mut other_job = run.spec.job.clone();
        other_job.corpus.num_sequences = Some(3);
        assert!(found(&other_job, &run).is_none(), "another text");
        let job_key = JobIdentity::of(&run.spec.job).unwrap().key("vast");
        let elsewhere = RunSpec { brokers: "vast".into(), job_key, ..run.spec.clone() };
        assert!(found(&run.spec.job, &RunRecord { spec: elsewhere, ..run.clone() }).is_some(), "another cloud");
        let alone = RunSpec { survey: None, ..run.spec.clone() };
        assert!(found(&run.spec.job, &RunRecord { spec: alone, ..run.clone() }).is_none(), "no survey's");
        let corpus_changed = RunSpec { job_key: "k".into(), ..run.spec.clone() };
        assert!(found(&run.spec.job, &RunRecord { spec: corpus_changed, ..run.clone() }).is_none());
    }
}
