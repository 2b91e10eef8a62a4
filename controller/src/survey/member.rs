//! What the ledger and the folders know of one model of a survey.

use std::path::Path;

use outliers_protocol::JobSpec;

use super::index::{Line, Outcome};
use crate::deploy::{holds, job_key};
use crate::ledger::RunRecord;
use crate::run::{Ending, TroubleKind};

/// A model of a survey, and what it is to be run as.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    /// The survey's name.
    pub survey: &'a str,
    /// The model's name in it.
    pub name: &'a str,
    /// The job.
    pub job: &'a JobSpec,
    /// Its key.
    pub job_key: &'a str,
    /// The survey's folder.
    pub folder: &'a Path,
}

impl<'a> Member<'a> {
    /// The run of this very work that tells most: one whose whole results are there, else the latest.
    pub fn run<'r>(&self, runs: &'r [RunRecord]) -> Option<&'r RunRecord> {
        let own = || runs.iter().rev().filter(|run| self.is_run_by(run));
        own().find(|run| self.is_complete(run)).or_else(|| own().next())
    }

    /// Whether a run does this work for this survey, wherever it may rent.
    pub fn is_run_by(&self, run: &RunRecord) -> bool {
        let here = |member: &crate::run::Membership| {
            (member.survey.as_str(), member.model.as_str()) == (self.survey, self.name)
        };
        run.spec.survey.as_ref().is_some_and(here)
            && run.spec.job == *self.job
            && job_key(self.job, &run.spec.brokers).is_ok_and(|key| key == run.spec.job_key)
    }

    fn is_complete(&self, run: &RunRecord) -> bool {
        run.state.ending() == Some(&Ending::Completed) && self.flaw(run).is_none()
    }

    /// What is wrong with the results of a completed run.
    fn flaw(&self, run: &RunRecord) -> Option<String> {
        holds(&self.folder.join(self.name), &run.id).err()
    }

    /// What became of it.
    pub fn line(&self, runs: &[RunRecord]) -> Line {
        let run = self.run(runs);
        let (outcome, why) = run.map_or((Outcome::Open, None), |run| self.judge(run));
        let folder = run.filter(|_| outcome != Outcome::Open).and_then(|run| run.state.results());
        let folder = folder.and_then(|results| Path::new(&results.folder).file_name()?.to_str().map(str::to_owned));
        Line {
            name: self.name.to_owned(),
            model: self.job.model.name().to_owned(),
            job_key: self.job_key.to_owned(),
            run: run.map(|run| run.id.clone()),
            outcome,
            folder,
            why,
        }
    }

    fn judge(&self, run: &RunRecord) -> (Outcome, Option<String>) {
        let Some(ending) = run.state.ending().filter(|_| run.state.is_at_rest()) else { return (Outcome::Open, None) };
        if *ending == Ending::Completed {
            // They were there: without them it is as if it had not been run.
            return match self.flaw(run) {
                None => (Outcome::Complete, None),
                Some(flaw) => (Outcome::Open, Some(flaw)),
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
        Ending::Failed { trouble } => matches!(trouble.kind, TroubleKind::NoOffer | TroubleKind::Budget),
        _ => false,
    }
}
