//! `survey`: checks many models, then deploys them concurrently.

use std::collections::BTreeSet;
use std::path::Path;

use super::instances::LISTS;
use super::prepare::{Prepared, RunRequest, consent, identity, prepare, room, writable};
use super::{Context, ports};
use crate::cli::settings::{DefaultBroker, ModelRequest, SurveyRequest};
use crate::cloud::clouds::{BadHosts, Clouds};
use crate::run::deploy::{JobIdentity, recover};
use crate::run::ledger::{FileLock, Ledger, Records, RunRecord, RunWriter, now_ms};
use crate::run::local_worker::LocalWorker;
use crate::survey::{Index, Member, Members, ModelOutcome, SurveyError, index};
use crate::text::counted;
use crate::ui::report::{CliError, ExitStatus};
use crate::units::{GpuTime, Usd};

mod drive;
mod output;

impl From<SurveyError> for CliError {
    fn from(error: SurveyError) -> Self {
        Self::refused(error.to_string(), "docs/surveys.md describes the file; config/surveys has examples")
    }
}

/// A model with its job.
struct Model<'a> {
    entry: &'a ModelRequest,
    /// Whether it should run now, if necessary.
    wanted: bool,
    identity: JobIdentity,
    job_key: String,
}

/// State of a survey on this machine.
struct Session<'a> {
    context: &'a Context,
    asked: &'a SurveyRequest,
    clouds: Clouds,
    models: Vec<Model<'a>>,
    /// The index in the folder at the start.
    before: Option<Index>,
}

/// Action for a model.
enum ModelAction {
    /// Nothing: it is complete, or failed and is not repeated.
    Nothing,
    /// Resume the abandoned run.
    PickUp(Box<RunWriter>),
    /// Start a run.
    Run(Box<Prepared>),
}

pub(super) async fn command(context: &Context, asked: &SurveyRequest) -> Result<ExitStatus, CliError> {
    let session = Session::open(context, asked)?;
    let (worker, ledger) = (context.worker().await?, context.ledger()?);
    let _only_one = if asked.dry_run { None } else { Some(session.take(&ledger)?) };
    let mut todo = session.left(&ledger)?;
    let (hosts, bad_hosts) = (context.hosts_for(&worker), BadHosts::default());
    let ports = ports(&session.clouds, &bad_hosts, &hosts, &[]);
    if !asked.dry_run {
        let on = |event| context.reporter.event(event);
        let found = context.reporter.waiting(LISTS, recover(&ledger, ports, &on)).await?;
        context.reporter.recovered(found.iter());
    }
    let Records { runs, unreadable } = ledger.records()?;
    context.reporter.unreadable(&unreadable);
    let problems = session.prepare(&worker, &runs, &mut todo).await;
    if asked.dry_run {
        return Ok(session.show(&runs, &todo, &problems));
    }
    refuse(&problems)?;
    room(context, todo.iter().filter_map(ModelAction::prepared).map(|prepared| &prepared.spec))?;
    session.consent(&todo)?;
    writable(&asked.folder)?;
    session.write_index(&ledger)?;
    let stuck = session.drive(&ledger, ports, todo).await?;
    session.write_index(&ledger)?;
    Ok(session.conclude(&ledger.runs()?, &stuck))
}

/// Brings the indices of surveys up to date after another command that ended runs. What cannot be
/// written is said.
pub(super) fn refresh_indices(context: &Context, ledger: &Ledger) {
    if let Err(CliError { message, .. }) = refreshed(ledger) {
        context.reporter.warn(&format!("a survey's index is not up to date: {message}"));
    }
}

fn refreshed(ledger: &Ledger) -> Result<(), CliError> {
    let runs = ledger.runs()?;
    let members = Members::of(&runs);
    let place = |run: &RunRecord| Some((run.spec.survey.as_ref()?.survey.clone(), run.spec.results.clone()));
    let places: BTreeSet<(String, String)> = runs.iter().filter_map(place).collect();
    for (survey, folder) in &places {
        let folder = Path::new(folder);
        let changed = || {
            // One that cannot be read is for `compare` to say.
            let index = Index::read(folder).ok().flatten().filter(|index| index.survey == *survey)?;
            let now = members.in_folder(folder, index.clone());
            (now != index).then_some(now)
        };
        if changed().is_none() {
            continue;
        }
        // The survey's own command writes its index itself while it runs.
        let Some(_only_one) = ledger.take_survey(survey)? else { continue };
        if let Some(index) = changed() {
            write(&index, folder)?;
        }
    }
    Ok(())
}

fn write(index: &Index, folder: &Path) -> Result<(), CliError> {
    let wrong = |error| CliError::failed(format!("{}: {error}", folder.join(index::FILE).display()));
    index.write(folder).map_err(wrong)
}

/// A model that cannot be run.
struct Problem {
    model: usize,
    cli_error: CliError,
}

fn refuse(problems: &[Problem]) -> Result<(), CliError> {
    if problems.is_empty() {
        return Ok(());
    }
    let status = ExitStatus::worst(problems.iter().map(|problem| problem.cli_error.status));
    let words: Vec<String> = problems.iter().map(|problem| in_words(&problem.cli_error)).collect();
    let hint = "--only leaves models out; --dry-run shows what the others would take";
    Err(CliError::new(status, format!("nothing was rented: {}", words.join("; ")), hint))
}

fn in_words(cli_error: &CliError) -> String {
    let hint = cli_error.hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default();
    format!("{}{hint}", cli_error.message)
}

impl<'a> Session<'a> {
    fn open(context: &'a Context, asked: &'a SurveyRequest) -> Result<Self, CliError> {
        let clouds = context.clouds(&asked.brokers)?;
        if asked.brokers.is_empty() && context.settings.broker == DefaultBroker::Local {
            context.reporter.using_this_machine();
        }
        let models = models(context, asked, &clouds.names())?;
        // An unreadable index is ignored.
        let before = Index::read(&asked.folder).ok().flatten();
        Ok(Self { context, asked, clouds, models, before })
    }

    /// Locks the survey for this process.
    fn take(&self, ledger: &Ledger) -> Result<FileLock, CliError> {
        ledger.take_survey(&self.asked.name)?.ok_or_else(|| {
            let message = format!("the survey {} is being run by another process", self.asked.name);
            CliError::refused(message, "`outliers status` shows how it is going")
        })
    }

    fn member(&'a self, model: &'a Model<'a>) -> Member<'a> {
        Member {
            survey: &self.asked.name,
            name: &model.entry.name,
            identity: &model.identity,
            job_key: &model.job_key,
            folder: &self.asked.folder,
            before: self.before.as_ref().and_then(|index| index.entry(&model.entry.name)),
        }
    }

    /// Abandoned runs of wanted models with time left, before recovery ends them.
    fn left(&self, ledger: &Ledger) -> Result<Vec<ModelAction>, CliError> {
        let (runs, now) = (ledger.runs()?, now_ms() / 1000);
        let mut todo = Vec::new();
        for model in &self.models {
            let member = self.member(model);
            let under_way = |run: &&RunRecord| member.is_run_by(run) && !run.state.is_at_rest();
            let left = runs.iter().rev().filter(|_| model.wanted).find(under_way);
            let left = left.filter(|run| run.deadline().is_none_or(|deadline| deadline > now));
            todo.push(match left {
                Some(run) => self.pick_up(ledger, run)?,
                None => ModelAction::Nothing,
            });
        }
        Ok(todo)
    }

    fn pick_up(&self, ledger: &Ledger, run: &RunRecord) -> Result<ModelAction, CliError> {
        let unknown = run.spec.broker_names().into_iter().find(|broker| self.clouds.get(broker).is_none());
        if let Some(broker) = unknown {
            let message = format!("run {} of {} was left, and may be on {broker}", run.id, run.spec.model);
            return Err(CliError::refused(
                message,
                format!("add --broker {}, or `outliers runs cancel {}`", run.spec.brokers, run.id),
            ));
        }
        match ledger.take(&run.id)? {
            Some(taken) if taken.state().is_at_rest() => Ok(ModelAction::Nothing),
            Some(taken) => Ok(ModelAction::PickUp(Box::new(taken))),
            None => Err(CliError::refused(
                format!("run {} of {} is driven by another process", run.id, run.spec.model),
                format!("wait for it, or `outliers runs cancel {}`", run.id),
            )),
        }
    }

    /// Checks every model to run, one after another, with requests to the hub. Returns all errors.
    async fn prepare(&self, worker: &LocalWorker, runs: &[RunRecord], todo: &mut [ModelAction]) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut told = false;
        for (number, (model, todo)) in self.models.iter().zip(todo).enumerate() {
            if matches!(todo, ModelAction::PickUp(_)) || !self.is_to_run(model, runs) {
                continue;
            }
            let reporter = &self.context.reporter;
            reporter.say(&format!("Looking at {}", model.entry.name));
            let first = !std::mem::replace(&mut told, true);
            let report = |offered: &_| {
                if first {
                    reporter.offered(offered)
                }
            };
            let prepared = match self.place(model, runs) {
                Ok(()) => prepare(self.context, &self.clouds, worker, Self::run_request(model), report).await,
                Err(cli_error) => Err(cli_error),
            };
            match prepared {
                Ok(prepared) => *todo = ModelAction::Run(Box::new(prepared)),
                Err(cli_error) => {
                    let message = format!("{}: {}", model.entry.name, cli_error.message);
                    problems.push(Problem { model: number, cli_error: CliError { message, ..cli_error } });
                }
            }
        }
        problems
    }

    fn is_to_run(&self, model: &Model<'_>, runs: &[RunRecord]) -> bool {
        model.wanted
            && match self.member(model).index_entry(runs).0.outcome {
                ModelOutcome::Complete => false,
                ModelOutcome::Open => true,
                ModelOutcome::Partial | ModelOutcome::Failed => self.asked.rerun_failed,
            }
    }

    /// Refuses to overwrite results of other work, which cost money.
    fn place(&self, model: &Model<'_>, runs: &[RunRecord]) -> Result<(), CliError> {
        let place = self.asked.folder.join(&model.entry.name);
        let member = self.member(model);
        let is_there = |run: &RunRecord| run.state.results().is_some_and(|results| Path::new(&results.folder) == place);
        if !place.exists() || runs.iter().any(|run| member.is_run_by(run) && is_there(run)) {
            return Ok(());
        }
        Err(CliError::refused(
            format!("{} holds results of other work", place.display()),
            "move that folder away, or give the survey another name",
        ))
    }

    fn run_request(model: &Model<'_>) -> RunRequest {
        let (job, job_key) = (model.identity.job.clone(), model.job_key.clone());
        RunRequest { job, job_key, terms: model.entry.terms.clone() }
    }

    /// Cost of all its runs, earlier ones included.
    fn spent(&self, runs: &[RunRecord]) -> Usd {
        self.own(runs).map(|run| run.cost(now_ms())).sum()
    }

    /// GPU time of all its runs.
    fn gpu_time(&self, runs: &[RunRecord]) -> GpuTime {
        GpuTime::from_seconds(self.own(runs).map(|run| run.gpu_time(now_ms()).seconds()).sum())
    }

    fn own<'r>(&self, runs: &'r [RunRecord]) -> impl Iterator<Item = &'r RunRecord> {
        let is_own = move |run: &&RunRecord| run.spec.survey.as_ref().is_some_and(|of| of.survey == self.asked.name);
        runs.iter().filter(is_own)
    }

    fn consent(&self, todo: &[ModelAction]) -> Result<(), CliError> {
        let prepared: Vec<&Prepared> = todo.iter().filter_map(ModelAction::prepared).collect();
        if prepared.is_empty() {
            return Ok(());
        }
        consent(self.context, &self.clouds, self.asked.yes, &counted(prepared.len(), "instance"), || {
            let at_most: Usd = prepared.iter().map(|prepared| prepared.at_most()).sum();
            let budget = self.asked.budget.map_or_else(String::new, |budget| format!(", within a budget of {budget}"));
            let gpus = self.asked.max_gpu_time.map_or_else(String::new, |most| format!(", within {most}"));
            let shown = self.rows(&[], todo, &[]);
            let parallel = self.asked.max_parallel;
            let question = format!("Rent these, {parallel} at a time, for {at_most} at most{budget}{gpus}?");
            (output::table_of(&shown), question)
        })
    }

    /// Writes the state of every model to the index.
    fn write_index(&self, ledger: &Ledger) -> Result<(), CliError> {
        let runs = ledger.runs()?;
        let file = std::path::absolute(&self.asked.file).unwrap_or_else(|_| self.asked.file.clone());
        let index = Index {
            schema: index::SCHEMA,
            survey: self.asked.name.clone(),
            file: file.to_string_lossy().into_owned(),
            models: self.models.iter().map(|model| self.member(model).index_entry(&runs).0).collect(),
        };
        write(&index, &self.asked.folder)
    }
}

/// The file's models as jobs, or all errors in them.
fn models<'a>(context: &Context, asked: &'a SurveyRequest, brokers: &str) -> Result<Vec<Model<'a>>, CliError> {
    let is = |entry: &ModelRequest, word: &String| [&entry.name, &entry.job.model].contains(&word);
    if let Some(unknown) = asked.only.iter().find(|word| !asked.models.iter().any(|entry| is(entry, word))) {
        let known: Vec<&str> = asked.models.iter().map(|entry| entry.name.as_str()).collect();
        return Err(CliError::refused(
            format!("--only {unknown}: there is no such model in {}", asked.file.display()),
            format!("it has {}", known.join(", ")),
        ));
    }
    let (mut models, mut problems) = (Vec::new(), Vec::new());
    for (number, entry) in asked.models.iter().enumerate() {
        let wanted = asked.only.is_empty() || asked.only.iter().any(|word| is(entry, word));
        match super::job::job(&entry.job).and_then(|job| identity(context, &job)) {
            Ok(identity) => models.push(Model { entry, wanted, job_key: identity.key(brokers), identity }),
            Err(cli_error) => problems.push(Problem { model: number, cli_error }),
        }
    }
    refuse(&problems)?;
    Ok(models)
}

impl ModelAction {
    fn prepared(&self) -> Option<&Prepared> {
        if let Self::Run(prepared) = self { Some(prepared) } else { None }
    }
}
