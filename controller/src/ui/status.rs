//! The status of all runs. It depends only on the ledger, the result files and the clock.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use outliers_protocol::{Axis, Progress, Reading, Results, files};
use serde::Serialize;

use crate::cloud::broker::{Broker, Instance, InstanceId, InstanceState};
use crate::files::read_json;
use crate::run::deploy::read_progress;
use crate::run::ledger::{Ledger, LedgerError, Records, RunRecord, Unreadable};
use crate::run::{Membership, RunEvent, RunOutcome, RunState};
use crate::survey::{Index, Members};
use crate::units::{Usd, UsdPerHour};

#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Status {
    /// Time of the status, in Unix seconds.
    pub(crate) at: u64,
    /// Active runs, oldest first.
    pub(crate) under_way: Vec<ActiveRun>,
    /// Finished runs, oldest first.
    pub(crate) over: Vec<FinishedRun>,
    /// Runs with unreadable records; their cost is not included.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) unreadable: Vec<Unreadable>,
    /// Surveys among the results, by name.
    pub(crate) surveys: Vec<SurveyStatus>,
    /// Cost of all runs of the ledger.
    pub(crate) spent: Usd,
    /// Maximum additional cost of active runs until their time limits.
    pub(crate) reserved: Usd,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct ActiveRun {
    pub(crate) run: String,
    pub(crate) survey: Option<String>,
    /// Hub id or folder.
    pub(crate) model: String,
    /// State in one word.
    pub(crate) state: String,
    /// Why it waits in its cluster's queue, if queried.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) waits: Option<String>,
    /// Latest progress of its worker, as stored by its driver.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) progress: Option<Progress>,
    /// Whether a process drives it, or the user keeps it.
    pub(crate) looked_after: bool,
    /// Whether the user keeps the instance.
    pub(crate) held: bool,
    /// Whether the user detached it.
    pub(crate) detached: bool,
    /// Broker of its instance, or of a possible one.
    pub(crate) broker: Option<String>,
    pub(crate) instance: Option<String>,
    pub(crate) price: Option<UsdPerHour>,
    pub(crate) cost: Usd,
    /// Maximum cost until the time limit.
    pub(crate) at_most: Usd,
    /// Expected end by its worker's progress, else by the plan, in Unix seconds.
    pub(crate) expected: Option<u64>,
    /// Deadline of its instance, in Unix seconds.
    pub(crate) deadline: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct FinishedRun {
    pub(crate) run: String,
    pub(crate) survey: Option<String>,
    /// Hub id or folder.
    pub(crate) model: String,
    /// Outcome as text.
    pub(crate) ending: String,
    /// Whether complete results were saved.
    pub(crate) completed: bool,
    /// Whether a later run of the same work completed or is active.
    pub(crate) superseded: bool,
    pub(crate) hint: Option<String>,
    pub(crate) cost: Usd,
    /// End in Unix seconds.
    pub(crate) ended: u64,
    /// Folder of the saved results.
    pub(crate) folder: Option<String>,
    /// Figures; `None` if the results are missing.
    pub(crate) figures: Option<HeadlineFigures>,
}

/// Figures for a table.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct HeadlineFigures {
    /// Distinct systematic features over layers, the paper's count.
    pub(crate) features: f64,
    /// Perplexity of the same pass.
    pub(crate) perplexity: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct SurveyStatus {
    pub(crate) folder: PathBuf,
    pub(crate) index: Index,
    /// Cost of all its runs.
    pub(crate) spent: Usd,
}

impl HeadlineFigures {
    pub(crate) fn read(folder: &Path) -> Option<Self> {
        let results: Results = read_json(&folder.join(files::RESULTS)).ok()?;
        let mut verdicts = results.verdicts.iter();
        let paper = verdicts.find(|verdict| (verdict.reading, verdict.axis) == (Reading::Unique, Axis::Layers))?;
        Some(Self { features: paper.count, perplexity: results.perplexity.map(|perplexity| perplexity.perplexity) })
    }
}

impl Status {
    /// Reads the ledger and the surveys in `results`.
    ///
    /// # Errors
    /// Errors of the ledger.
    pub(crate) fn of_ledger(ledger: &Ledger, results: &Path, now_ms: u64) -> Result<Self, LedgerError> {
        let Records { runs, unreadable } = ledger.records()?;
        let mut driven = Vec::new();
        for run in runs.iter().filter(|run| !run.state.is_closed()) {
            if ledger.is_driven(&run.id)? {
                driven.push(run.id.clone());
            }
        }
        let mut status = Self { unreadable, ..Self::of(&runs, &driven, surveys(results), now_ms) };
        let launched = runs.iter().filter(|run| matches!(run.state, RunState::Launched { .. }));
        let launched: HashSet<&String> = launched.map(|run| &run.id).collect();
        let in_queue: HashSet<&String> = runs.iter().filter(|run| run.is_in_queue()).map(|run| &run.id).collect();
        for run in status.under_way.iter_mut().filter(|run| run.looked_after && launched.contains(&run.run)) {
            if !in_queue.contains(&run.run) {
                run.note_progress(read_progress(&ledger.run_folder(&run.run)));
            }
        }
        Ok(status)
    }

    /// Whether a run may change by itself: a process drives it, or it has time left.
    pub(crate) fn is_at_work(&self) -> bool {
        let has_time = |run: &ActiveRun| run.deadline.is_some_and(|deadline| deadline > self.at);
        self.under_way.iter().any(|run| !run.held && (run.looked_after || has_time(run)))
    }

    /// Whether an active run has its instance at this broker.
    pub(crate) fn uses(&self, broker: &str) -> bool {
        self.under_way.iter().any(|run| run.instance.is_some() && run.broker.as_deref() == Some(broker))
    }

    /// Notes when jobs that run end, as their cluster was last listed: nobody may have written it
    /// down since they began.
    pub(crate) fn note_ends(&mut self, cluster: &dyn Broker) {
        let of_cluster = |run: &&mut ActiveRun| run.broker.as_deref() == Some(cluster.name());
        for run in self.under_way.iter_mut().filter(of_cluster) {
            let instance = run.instance.clone().map(InstanceId);
            let ends = instance.and_then(|instance| cluster.run_time(&instance)?.until);
            // One that was put back late has less than all of its time: its lease ends it.
            run.deadline = ends.into_iter().chain(run.deadline).min();
        }
    }

    /// Notes which runs wait in a queue, by their cluster's list: nobody knows when they are done.
    pub(crate) fn note_queue(&mut self, listed: &[Instance]) {
        let waits = |run: &ActiveRun| {
            let same = |instance: &&Instance| {
                Some(&instance.id.0) == run.instance.as_ref() && Some(&instance.broker) == run.broker.as_ref()
            };
            match &listed.iter().find(same)?.state {
                InstanceState::Queued(why) => Some(why.clone()),
                _ => None,
            }
        };
        for run in &mut self.under_way {
            run.waits = waits(run);
            if run.waits.is_some() {
                (run.expected, run.progress) = (None, None);
            }
        }
    }

    /// Computes the status from runs, driven ids, and the surveys' folders and indices. Cost is
    /// linear in the number of runs.
    fn of(runs: &[RunRecord], driven: &[String], surveys: Vec<(PathBuf, Index)>, now_ms: u64) -> Self {
        let mut spent_by: HashMap<&str, Usd> = HashMap::new();
        for run in runs {
            if let Some(member) = &run.spec.survey {
                let spent = spent_by.entry(&member.survey).or_default();
                *spent = *spent + run.cost(now_ms);
            }
        }
        let spent_by = |survey: &str| spent_by.get(survey).copied().unwrap_or_default();
        let (driven, mended): (HashSet<&String>, LatestSuccess<'_>) =
            (driven.iter().collect(), LatestSuccess::by(runs));
        let members = Members::of(runs);
        let (closed, open): (Vec<_>, Vec<_>) = runs.iter().partition(|run| run.state.is_closed());
        let left = |run: &&RunRecord| Usd::from_micros(run.at_most(now_ms).micros() - run.cost(now_ms).micros());
        Self {
            at: now_ms / 1000,
            reserved: open.iter().map(left).sum(),
            under_way: open.iter().map(|run| ActiveRun::of(run, driven.contains(&run.id), now_ms)).collect(),
            unreadable: Vec::new(),
            over: closed.iter().map(|run| FinishedRun::of(run, &mended, now_ms)).collect(),
            surveys: surveys
                .into_iter()
                .map(|(folder, index)| (folder, members.on(index)))
                .map(|(folder, index)| SurveyStatus { spent: spent_by(&index.survey), folder, index })
                .collect(),
            spent: runs.iter().map(|run| run.cost(now_ms)).sum(),
        }
    }
}

/// Every survey with an index in a folder of `results`, sorted by name. Unreadable ones are
/// reported by `compare`.
fn surveys(results: &Path) -> Vec<(PathBuf, Index)> {
    let entries = std::fs::read_dir(results).into_iter().flatten().filter_map(Result::ok);
    let mut found: Vec<(PathBuf, Index)> =
        entries.filter_map(|entry| Some((entry.path(), Index::read(&entry.path()).ok()??))).collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

fn name_of_survey(run: &RunRecord) -> Option<String> {
    run.spec.survey.as_ref().map(|member| member.survey.clone())
}

impl ActiveRun {
    fn of(run: &RunRecord, driven: bool, now_ms: u64) -> Self {
        let (rental, held) = (run.state.rental(), matches!(run.state, RunState::Held { .. }));
        Self {
            run: run.id.clone(),
            survey: name_of_survey(run),
            model: run.spec.model.clone(),
            state: run.state.word().to_owned(),
            waits: None,
            progress: None,
            looked_after: driven || held,
            held,
            detached: !driven && run.is_detached(),
            broker: run.state.offer().map(|offer| offer.broker.clone()),
            instance: rental.map(|rental| rental.instance.0.clone()),
            price: rental.map(|rental| rental.price),
            cost: run.cost(now_ms),
            at_most: run.at_most(now_ms),
            expected: expected(run),
            deadline: run.ends_at(),
        }
    }

    /// Replaces the estimate by the worker's measurement.
    fn note_progress(&mut self, progress: Option<Progress>) {
        let left = |progress: &Progress| Duration::try_from_secs_f64(progress.eta_seconds?).ok();
        let measured = progress
            .as_ref()
            .and_then(|progress| Some(Duration::from_millis(progress.at_ms).checked_add(left(progress)?)?.as_secs()));
        self.expected = measured.or(self.expected);
        self.progress = progress;
    }
}

/// The plan's estimate, counted from the worker's start, or before it from the start of the job, or
/// from the create call where there is no queue. `None` while the instance waits in one.
fn expected(run: &RunRecord) -> Option<u64> {
    if run.state.ending().is_some() || run.is_in_queue() {
        return None;
    }
    let estimate = run.spec.work.on(run.state.offer()?);
    let last =
        |is: fn(&RunEvent) -> bool| run.events.iter().rev().find(|entry| is(&entry.event)).map(|entry| entry.at_ms);
    let asked = last(|event| matches!(event, RunEvent::Creating { .. }))?;
    let began = run.run_time().and_then(|time| time.since).map_or(asked, |since| since.saturating_mul(1000));
    let launched = last(|event| matches!(event, RunEvent::Launched)).filter(|at| *at >= asked);
    let (from, seconds) = match launched {
        Some(at) => (at, estimate.seconds - estimate.start_seconds),
        None => (began, estimate.seconds),
    };
    Some((Duration::from_millis(from) + Duration::from_secs_f64(seconds.max(0.0))).as_secs())
}

/// Of each work, when the last run of it that completed or is under way was created.
struct LatestSuccess<'a>(HashMap<(&'a str, Option<&'a Membership>), u64>);

impl<'a> LatestSuccess<'a> {
    fn by(runs: impl IntoIterator<Item = &'a RunRecord>) -> Self {
        let mut latest = HashMap::new();
        for run in runs {
            if !run.state.is_closed() || run.state.ending() == Some(&RunOutcome::Completed) {
                let at = latest.entry(Self::work(run)).or_default();
                *at = run.created_at_ms.max(*at);
            }
        }
        Self(latest)
    }

    fn work(run: &RunRecord) -> (&str, Option<&Membership>) {
        (&run.spec.job_key, run.spec.survey.as_ref())
    }

    /// Whether a later run of the same work completed or is active.
    fn after(&self, run: &RunRecord) -> bool {
        self.0.get(&Self::work(run)).is_some_and(|latest| *latest > run.created_at_ms)
    }
}

impl FinishedRun {
    fn of(run: &RunRecord, mended: &LatestSuccess<'_>, now_ms: u64) -> Self {
        let completed = run.state.ending() == Some(&RunOutcome::Completed);
        let results = run.state.results();
        Self {
            run: run.id.clone(),
            survey: name_of_survey(run),
            model: run.spec.model.clone(),
            ending: run.state.ending().map(ToString::to_string).unwrap_or_default(),
            completed,
            superseded: mended.after(run),
            hint: run.state.ending().and_then(RunOutcome::hint).map(str::to_owned),
            cost: run.cost(now_ms),
            ended: run.changed_at_ms() / 1000,
            folder: results.map(|results| results.folder.clone()),
            figures: results
                .filter(|_| completed)
                .and_then(|results| HeadlineFigures::read(Path::new(&results.folder))),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::cloud::broker::{Lease, LeaseTag, RunTime};
    use crate::run::deploy::tests::fake::{Fake, now_ms as fake_now_ms, offer, spec};
    use crate::run::ledger::LedgerEntry;
    use crate::run::{FailureDetail, Intent, Membership, Pin, RunFailureKind, RunSpec, SavedResults, next};
    use crate::survey::{IndexEntry, ModelOutcome, index};
    use crate::units::Bytes;

    /// 2026-06-01T12:00:00Z.
    pub(crate) const NOW_MS: u64 = 1_780_315_200_000;

    /// A run of the survey `moe-two` that began `minutes` ago, with one event per minute.
    pub(crate) fn run(id: &str, model: &str, minutes: u64, events: Vec<RunEvent>) -> RunRecord {
        let survey = Some(Membership { survey: "moe-two".into(), model: model.replace('/', "--") });
        let spec = RunSpec { model: model.into(), job_key: model.into(), survey, ..spec(Path::new("/nowhere")) };
        let created_at_ms = NOW_MS - minutes * 60_000;
        let at = |i: usize| created_at_ms + i as u64 * 60_000;
        let state = events.iter().fold(RunState::initial(), |state, event| next(&state, event).unwrap());
        let events = events.into_iter().enumerate().map(|(i, event)| LedgerEntry { at_ms: at(i), event }).collect();
        RunRecord { id: id.into(), created_at_ms, spec, events, state }
    }

    /// Up to the start of the worker.
    pub(crate) fn rented(id: &str) -> Vec<RunEvent> {
        let tag = LeaseTag { owner: "me".into(), run: id.into(), nonce: "n".into(), deadline: NOW_MS / 1000 + 1800 };
        vec![
            RunEvent::Creating { intent: Box::new(Intent { offer: offer("a", 6.0), tag }) },
            RunEvent::Created { instance: InstanceId(format!("i-{id}")), price: None },
            RunEvent::Reached { pin: Pin("p".into()), price: None },
            RunEvent::Launched,
        ]
    }

    /// To the end of the instance.
    pub(crate) fn ended(id: &str, results: SavedResults, ending: RunOutcome) -> Vec<RunEvent> {
        let end = [
            RunEvent::WorkerEnded { exit: Some(0) },
            RunEvent::Fetched { results, ending },
            RunEvent::Terminate,
            RunEvent::Gone,
        ];
        rented(id).into_iter().chain(end).collect()
    }

    /// One run of each kind: complete (with real results at `home`), failed, active, abandoned,
    /// and without an offer.
    pub(crate) fn status(home: &Path) -> Status {
        let whole = crate::compare::fixture::copy("mixture", &home.join("moe-two/owner--a"));
        let whole = SavedResults { folder: whole.to_string_lossy().into_owned(), complete: true };
        let partial = SavedResults { folder: "/nowhere/b-2.partial".into(), complete: false };
        let broken = RunOutcome::WorkerVanished { exit: Some(9) };
        let trouble = FailureDetail {
            kind: RunFailureKind::NoOffer,
            message: "--min-vram 200 | removed the last offer".into(),
            hint: Some("relax the filters".into()),
        };
        let refused = vec![RunEvent::Stopped { ending: RunOutcome::Failed { trouble } }];
        let runs = [
            run("run1", "owner/a", 60, ended("run1", whole, RunOutcome::Completed)),
            run("run2", "owner/b", 50, ended("run2", partial, broken)),
            run("run3", "owner/c", 10, rented("run3")),
            run("run4", "owner/d", 20, rented("run4")),
            run("run5", "owner/e", 5, refused),
        ];
        let line = |name: &str, run: Option<&str>, outcome| IndexEntry {
            name: name.into(),
            model: name.replace("--", "/"),
            job_key: "k".into(),
            run: run.map(str::to_owned),
            outcome,
            folder: None,
            why: None,
        };
        let index = Index {
            schema: index::SCHEMA,
            survey: "moe-two".into(),
            file: "/my surveys/moe-two.toml".into(),
            models: vec![
                line("owner--a", Some("run1"), ModelOutcome::Complete),
                line("owner--b", Some("run2"), ModelOutcome::Partial),
                line("owner--c", Some("run3"), ModelOutcome::Open),
            ],
        };
        Status::of(&runs, &["run3".to_owned()], vec![(home.join("moe-two"), index)], NOW_MS)
    }

    #[test]
    fn status_is_computed_from_ledger_and_result_files() {
        let home = tempfile::tempdir().unwrap();
        let status = status(home.path());
        let ids = |runs: &[&str]| runs.iter().map(|run| (*run).to_owned()).collect::<Vec<_>>();
        assert_eq!(status.under_way.iter().map(|run| run.run.clone()).collect::<Vec<_>>(), ids(&["run3", "run4"]));
        let running = &status.under_way[0];
        assert!(running.looked_after && !status.under_way[1].looked_after);
        assert!(status.is_at_work() && !running.detached && !status.under_way[1].detached);
        assert_eq!((running.cost, running.at_most), (Usd::from_dollars(1.0), Usd::from_dollars(4.0)));
        assert_eq!(status.reserved, Usd::from_dollars(6.0), "half an hour of two instances");
        // Four seconds of arithmetic from the launch, three minutes after the create call.
        assert_eq!(running.expected, Some(NOW_MS / 1000 - 10 * 60 + 3 * 60 + 4));
        let (mut running, plan) = (running.clone(), running.expected);
        let line = r#"{"schema":1,"at_ms":60000,"phase":"layers","layer":3,"layers":8,"bytes_read":1,"bytes_total":2,
            "tokens_per_second":502.4}"#;
        let mut progress: Progress = serde_json::from_str(line).unwrap();
        running.note_progress(Some(progress.clone()));
        assert_eq!(running.expected, plan, "its worker does not know yet");
        for (seconds, expected) in [(75.0, Some(135)), (f64::INFINITY, Some(135)), (-1.0, Some(135))] {
            progress.eta_seconds = Some(seconds);
            running.note_progress(Some(progress.clone()));
            assert_eq!(running.expected, expected);
        }
        let done = &status.over[0];
        assert!(done.completed && done.figures.is_some_and(|figures| figures.perplexity.is_some()));
        assert_eq!(status.over[2].hint.as_deref(), Some("relax the filters"));
        assert_eq!(status.surveys[0].spent, status.spent);
        assert_eq!(status, super::tests::status(tempfile::tempdir().unwrap().path()).moved(&status));
    }

    impl Status {
        /// The status with the folders of another one.
        fn moved(mut self, other: &Self) -> Self {
            for (survey, to) in self.surveys.iter_mut().zip(&other.surveys) {
                survey.folder.clone_from(&to.folder);
            }
            for (run, to) in self.over.iter_mut().zip(&other.over) {
                run.folder.clone_from(&to.folder);
            }
            self
        }
    }

    #[test]
    fn only_queued_instances_are_shown_as_waiting() {
        let runs = [run("run1", "owner/a", 10, rented("run1")), run("run2", "owner/b", 10, rented("run2"))];
        let mut status = Status::of(&runs, &[], Vec::new(), NOW_MS);
        let broker = status.under_way[0].broker.clone().unwrap();
        assert!(status.uses(&broker) && !status.uses("elsewhere"));
        let instance = |broker: &str, id: &str, state| Instance {
            broker: broker.to_owned(),
            id: InstanceId(id.to_owned()),
            name: String::new(),
            state,
            price: None,
            hardware: String::new(),
            created_at: None,
        };
        let queued = |why: &str| InstanceState::Queued(why.to_owned());
        status.note_queue(&[
            instance("elsewhere", "i-run1", queued("no")),
            instance(&broker, "i-run1", queued("Priority")),
            instance(&broker, "i-run2", InstanceState::Booting),
        ]);
        let waits: Vec<Option<&str>> = status.under_way.iter().map(|run| run.waits.as_deref()).collect();
        assert_eq!(waits, [Some("Priority"), None]);
        assert!(crate::ui::report::tables::status(&status).contains("launched, waits: Priority"));
        status.note_queue(&[]);
        assert_eq!(status.under_way[0].waits, None, "it waits no more");
    }

    #[test]
    fn run_in_a_queue_has_no_expected_end_and_then_its_jobs_own() {
        let mut events = rented("run1");
        let RunEvent::Creating { intent } = &mut events[0] else { panic!("it is asked for first") };
        intent.offer.queued = true;
        intent.tag.deadline = NOW_MS / 1000 + 7 * 86_400;
        let metered = |since, until| RunEvent::Metered { time: RunTime { ended_s: 0, since, until } };
        let at = |events: &[RunEvent]| {
            let status = Status::of(&[run("run1", "owner/a", 10, events.to_vec())], &[], Vec::new(), NOW_MS);
            status.under_way[0].clone()
        };
        let waits = at(&[&events[..2], &[metered(None, None)]].concat());
        assert_eq!((waits.expected, waits.cost, waits.deadline), (None, Usd::ZERO, Some(NOW_MS / 1000 + 7 * 86_400)));
        let began = NOW_MS / 1000 - 60;
        let runs = at(&[&events[..2], &[metered(Some(began), Some(began + 1800))], &events[2..]].concat());
        assert_eq!((runs.deadline, runs.cost), (Some(began + 1800), Usd::from_dollars(0.1)));
        assert!(runs.expected.is_some(), "its worker runs");
    }

    #[tokio::test(start_paused = true)]
    async fn job_that_began_late_ends_with_its_lease() {
        let (fake, soon) = (Fake::new(), fake_now_ms() / 1000 + 60);
        let tag = LeaseTag { owner: "me".into(), run: "run1".into(), nonce: "n".into(), deadline: soon };
        let lease = Lease { tag, ssh_public_key: "ssh-fake".into(), disk: Bytes(1), stage: None };
        let made = fake.create(&offer("a", 6.0), &lease).await.unwrap();
        let mut events = rented("run1");
        events[1] = RunEvent::Created { instance: made.id, price: None };
        for (left, shown) in [(60, 60), (7200, 1800)] {
            let until = Some(NOW_MS / 1000 + left);
            fake.set(|simulation| {
                simulation.run_time = Some(RunTime { ended_s: 0, since: Some(NOW_MS / 1000), until })
            });
            let runs = [run("run1", "owner/a", 10, events.clone())];
            let mut status = Status::of(&runs, &[], Vec::new(), NOW_MS);
            status.note_ends(&fake);
            assert_eq!(status.under_way[0].deadline, Some(NOW_MS / 1000 + shown), "{left} s are left");
        }
    }

    #[test]
    fn survey_is_counted_by_the_records_of_its_runs() {
        let home = |id: &str, complete| SavedResults { folder: format!("/nowhere/{id}"), complete };
        let broken = RunOutcome::WorkerVanished { exit: None };
        let runs = [
            run("run1", "owner/a", 60, ended("run1", home("owner--a", true), RunOutcome::Completed)),
            run("run2", "owner/b", 50, ended("run2", home("b.partial", false), broken)),
            run("run3", "owner/c", 10, rented("run3")),
            run("run4", "owner/d", 10, ended("run4", home("owner--d", true), RunOutcome::Completed)),
        ];
        let line = |name: &str, why: Option<&str>| IndexEntry {
            name: name.replace('/', "--"),
            model: name.into(),
            job_key: name.into(),
            run: why.map(|_| "run4".to_owned()),
            outcome: ModelOutcome::Open,
            folder: None,
            why: why.map(str::to_owned),
        };
        let flaw = Some("results.json is gone");
        let models = vec![line("owner/a", None), line("owner/b", None), line("owner/c", None), line("owner/d", flaw)];
        let index = Index { schema: index::SCHEMA, survey: "moe-two".into(), file: "/s.toml".into(), models };
        let status = Status::of(&runs, &[], vec![("/nowhere/moe-two".into(), index)], NOW_MS);
        let models = &status.surveys[0].index.models;
        let found: Vec<_> = models.iter().map(|line| (line.outcome, line.folder.as_deref())).collect();
        let expected = [
            (ModelOutcome::Complete, Some("owner--a")),
            (ModelOutcome::Partial, Some("b.partial")),
            (ModelOutcome::Open, None),
            (ModelOutcome::Open, None),
        ];
        assert_eq!(found, expected, "what the survey's command said of files stands");
    }

    #[test]
    fn detached_run_is_active_until_its_deadline() {
        let detached = run("run1", "owner/a", 10, rented("run1"));
        let detached = RunRecord { spec: RunSpec { detach: true, ..detached.spec.clone() }, ..detached };
        let whole = SavedResults { folder: "/nowhere/a".into(), complete: true };
        let mut events = ended("run2", whole, RunOutcome::Completed);
        events.truncate(events.len() - 2);
        events.push(RunEvent::Held);
        let runs = [detached, run("run2", "owner/b", 10, events)];
        let at = |runs: &[RunRecord], now_ms| Status::of(runs, &[], Vec::new(), now_ms);
        let status = at(&runs, NOW_MS);
        assert!(status.under_way[0].detached && !status.under_way[1].detached);
        assert!(status.is_at_work() && !at(&runs[1..], NOW_MS).is_at_work());
        assert!(!at(&runs, NOW_MS + 1_800_000).is_at_work(), "its time is up");
        assert!(!at(&[], NOW_MS).is_at_work());
    }

    #[test]
    fn superseded_failures_are_found_in_one_pass() {
        let failed = || vec![RunEvent::Stopped { ending: RunOutcome::Interrupted }];
        let mut runs: Vec<RunRecord> =
            (0..200).map(|i| run(&format!("r{i}"), &format!("owner/{}", i % 20), 300 - i, failed())).collect();
        runs.push(run("open", "owner/7", 1, rented("open")));
        let looks = std::cell::Cell::new(0);
        let mended = LatestSuccess::by(runs.iter().inspect(|_| looks.set(looks.get() + 1)));
        let superseded: Vec<&str> =
            runs.iter().filter(|run| mended.after(run)).map(|run| run.spec.model.as_str()).collect();
        assert_eq!(looks.get(), runs.len(), "not once per run");
        assert_eq!(superseded, ["owner/7"; 10]);
    }

    #[test]
    fn failure_followed_by_success_is_not_reported() {
        let broken = SavedResults { folder: "/nowhere/a.partial".into(), complete: false };
        let whole = SavedResults { folder: "/nowhere/a".into(), complete: true };
        let first = run("run1", "owner/a", 60, ended("run1", broken, RunOutcome::WorkerVanished { exit: None }));
        let second = run("run2", "owner/a", 30, ended("run2", whole, RunOutcome::Completed));
        let other = RunRecord { spec: RunSpec { survey: None, ..second.spec.clone() }, ..second.clone() };
        let superseded = |runs: &[RunRecord]| Status::of(runs, &[], Vec::new(), NOW_MS).over[0].superseded;
        assert!(superseded(&[first.clone(), second]));
        assert!(!superseded(&[first, other]), "it stands in another place");
    }
}
