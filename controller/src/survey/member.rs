//! What the ledger and the folders know of one model of a survey.

use std::path::Path;

use super::index::{Line, Outcome};
use crate::deploy::{JobIdentity, holds};
use crate::ledger::RunRecord;
use crate::run::{Brought, Ending, Membership, TroubleKind};

/// A model of a survey, and what it is to be run as.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    /// The survey's name.
    pub survey: &'a str,
    /// The model's name in it.
    pub name: &'a str,
    /// The job.
    pub identity: &'a JobIdentity,
    /// Its key, where this survey rents.
    pub job_key: &'a str,
    /// The survey's folder.
    pub folder: &'a Path,
}

impl Member<'_> {
    /// What became of it, and the run of this very work that says so: one whose whole results are there, else the latest.
    pub fn look<'r>(&self, runs: &'r [RunRecord]) -> (Line, Option<&'r RunRecord>) {
        let mut latest = None;
        for run in runs.iter().rev().filter(|run| self.is_run_by(run)) {
            let (outcome, why) = self.judge(run);
            if outcome == Outcome::Complete {
                return (self.line(Some(run), outcome, why), Some(run));
            }
            latest.get_or_insert((run, outcome, why));
        }
        match latest {
            Some((run, outcome, why)) => (self.line(Some(run), outcome, why), Some(run)),
            None => (self.line(None, Outcome::Open, None), None),
        }
    }

    /// Whether a run does this work for this survey, wherever it may rent.
    pub fn is_run_by(&self, run: &RunRecord) -> bool {
        let is_this = |member: &Membership| (member.survey.as_str(), member.model.as_str()) == (self.survey, self.name);
        run.spec.survey.as_ref().is_some_and(is_this)
            && run.spec.job == self.identity.job
            && run.spec.job_key == self.identity.key(&run.spec.brokers)
    }

    fn line(&self, run: Option<&RunRecord>, outcome: Outcome, why: Option<String>) -> Line {
        let results = run.filter(|_| outcome != Outcome::Open).and_then(|run| run.state.results());
        let name = |results: &Brought| Some(Path::new(&results.folder).file_name()?.to_str()?.to_owned());
        Line {
            name: self.name.to_owned(),
            model: self.identity.job.model.name().to_owned(),
            job_key: self.job_key.to_owned(),
            run: run.map(|run| run.id.clone()),
            outcome,
            folder: results.and_then(name),
            why,
        }
    }

    fn judge(&self, run: &RunRecord) -> (Outcome, Option<String>) {
        let Some(ending) = run.state.ending().filter(|_| run.state.is_at_rest()) else { return (Outcome::Open, None) };
        if *ending == Ending::Completed {
            // They were there: without them it is as if it had not been run.
            return match holds(&self.folder.join(self.name), &run.id) {
                Ok(()) => (Outcome::Complete, None),
                Err(flaw) => (Outcome::Open, Some(flaw)),
            };
        }
        let why = Some(ending.to_string());
        match run.state.results() {
            _ if is_to_go_on(ending) => (Outcome::Open, why),
            Some(_) => (Outcome::Partial, why),
            None => (Outcome::Failed, why),
        }
    }
}

/// Whether a run that ended so was only kept from doing its work: the survey does it without being asked.
fn is_to_go_on(ending: &Ending) -> bool {
    match ending {
        Ending::Interrupted | Ending::Cancelled => true,
        Ending::Failed { trouble } => {
            matches!(trouble.kind, TroubleKind::NoOffer | TroubleKind::Unfit | TroubleKind::Budget)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use outliers_protocol::{Failure, FailureKind, JobSpec};

    use super::*;
    use crate::compare::fixture::copy;
    use crate::deploy::RUN_FILE;
    use crate::run::{RunEvent, RunSpec, Trouble};
    use crate::standing::tests::{ended, rented, run};

    /// A run of the model `owner/a`, its job and key set.
    fn of_a(id: &str, events: Vec<RunEvent>) -> RunRecord {
        let run = run(id, "owner/a", 60, events);
        let job_key = JobIdentity::of(&run.spec.job).unwrap().key(&run.spec.brokers);
        RunRecord { spec: RunSpec { job_key, ..run.spec.clone() }, ..run }
    }

    fn stopped(ending: Ending) -> Vec<RunEvent> {
        vec![RunEvent::Stopped { ending }]
    }

    fn line(folder: &Path, job: &JobSpec, runs: &[RunRecord]) -> Line {
        let identity = JobIdentity::of(job).unwrap();
        Member { survey: "moe-two", name: "owner--a", identity: &identity, job_key: "k", folder }.look(runs).0
    }

    #[test]
    fn what_became_of_a_model_is_judged_by_ledger_and_files() {
        let home = tempfile::tempdir().unwrap();
        let folder = |name: &str, complete| Brought { folder: format!("/nowhere/{name}"), complete };
        let trouble = |kind| Ending::Failed { trouble: Trouble { kind, message: "no".into(), hint: None } };
        let failure = Failure { kind: FailureKind::Internal, message: "NaN".into(), hint: None };
        let failed = Ending::WorkerFailed { failure };
        for (events, expected, has_folder) in [
            (rented("r"), Outcome::Open, false),
            (stopped(Ending::Interrupted), Outcome::Open, false),
            (stopped(Ending::Cancelled), Outcome::Open, false),
            (stopped(trouble(TroubleKind::NoOffer)), Outcome::Open, false),
            (stopped(trouble(TroubleKind::Unfit)), Outcome::Open, false),
            (stopped(trouble(TroubleKind::Budget)), Outcome::Open, false),
            (stopped(trouble(TroubleKind::Host)), Outcome::Failed, false),
            (ended("r", folder("a.partial", false), failed.clone()), Outcome::Partial, true),
            (ended("r", folder("owner--a", true), Ending::Completed), Outcome::Open, false),
        ] {
            let runs = [of_a("r", events)];
            let line = line(home.path(), &runs[0].spec.job, &runs);
            let got = (line.outcome, line.run.as_deref(), line.folder.is_some());
            assert_eq!(got, (expected, Some("r"), has_folder), "{:?}: {line:?}", runs[0].state);
        }
        let whole = copy("mixture", &home.path().join("owner--a"));
        std::fs::write(whole.join(RUN_FILE), r#"{"id":"r1"}"#).unwrap();
        let complete = of_a("r1", ended("r1", folder("owner--a", true), Ending::Completed));
        let later = of_a("r2", ended("r2", folder("a.partial", false), failed));
        let job = complete.spec.job.clone();
        let both = [complete.clone(), later];
        let found = line(home.path(), &job, &both);
        assert_eq!(
            (found.outcome, found.run.as_deref()),
            (Outcome::Complete, Some("r1")),
            "whole results stay what they are"
        );
        std::fs::write(whole.join("results.json"), "{}").unwrap();
        let damaged = line(home.path(), &job, &both[..1]);
        assert!(damaged.outcome == Outcome::Open && damaged.why.unwrap().contains("results.json"));
    }

    #[test]
    fn only_the_same_work_counts_wherever_it_was_done() {
        let home = tempfile::tempdir().unwrap();
        let run = of_a("r", stopped(Ending::Interrupted));
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
