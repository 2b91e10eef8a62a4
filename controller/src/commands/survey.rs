//! `survey`: many models, looked at together, then deployed side by side.

use std::path::{Path, PathBuf};

use outliers_protocol::Merge;

use super::instances::LISTS;
use super::prepare::{Prepared, RunRequest, consent, identity, prepare, room, writable};
use super::{Context, ports};
use crate::cli::SurveyArgs;
use crate::clouds::{BadHosts, Clouds};
use crate::deploy::{JobIdentity, recover};
use crate::ledger::{Ledger, Records, RunRecord, RunWriter, now_ms};
use crate::local_worker::LocalWorker;
use crate::report::{CliError, ExitStatus};
use crate::run::Membership;
use crate::settings::DefaultBroker;
use crate::survey::{Index, Member, ModelOutcome, Survey, SurveyError, SurveyModel, index};
use crate::units::Usd;

mod drive;
mod tell;

impl From<SurveyError> for CliError {
    fn from(error: SurveyError) -> Self {
        Self::refused(error.to_string(), "config/surveys has surveys to start from")
    }
}

/// A model with its job.
struct Model<'a> {
    entry: &'a SurveyModel,
    /// It is to be run now, if it needs to be.
    wanted: bool,
    identity: JobIdentity,
    job_key: String,
}

/// A survey, as it stands on this machine.
struct Session<'a> {
    context: &'a Context,
    args: &'a SurveyArgs,
    survey: &'a Survey,
    folder: PathBuf,
    clouds: Clouds,
    models: Vec<Model<'a>>,
    /// What the index in the folder said when this began.
    before: Option<Index>,
}

/// What is to be done for a model.
enum Todo {
    /// Nothing: it is complete, or failed and is not to be run again.
    Nothing,
    /// Drive on what was left.
    PickUp(Box<RunWriter>),
    /// Run it.
    Run(Box<Prepared>),
}

/// Runs `survey`.
pub(super) async fn command(context: &Context, args: &SurveyArgs) -> Result<ExitStatus, CliError> {
    let survey = Survey::read(&context.here.join(&args.file))?;
    let session = Session::open(context, args, &survey)?;
    let (worker, ledger) = (context.worker().await?, context.ledger()?);
    let _only_one = if args.dry_run { None } else { Some(session.take(&ledger)?) };
    let mut todo = session.left(&ledger)?;
    let (hosts, bad_hosts) = (context.hosts_for(&worker), BadHosts::default());
    let ports = ports(&session.clouds, &bad_hosts, &hosts, &[]);
    if !args.dry_run {
        let on = |event| context.reporter.event(event);
        let found = context.reporter.waiting(LISTS, recover(&ledger, ports, &on)).await?;
        context.reporter.recovered(found.iter());
    }
    let Records { runs, unreadable } = ledger.records()?;
    context.reporter.unreadable(&unreadable);
    let problems = session.prepare(&worker, &runs, &mut todo).await;
    if args.dry_run {
        return Ok(session.show(&runs, &todo, &problems));
    }
    refuse(&problems)?;
    room(context, todo.iter().filter_map(Todo::prepared).map(|prepared| &prepared.spec))?;
    session.consent(&todo)?;
    writable(&session.folder)?;
    session.write_index(&ledger)?;
    let stuck = session.drive(&ledger, ports, todo).await?;
    session.write_index(&ledger)?;
    Ok(session.conclude(&ledger.runs()?, &stuck))
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
    Err(CliError {
        status,
        message: format!("nothing was rented: {}", words.join("; ")),
        hint: Some("--only leaves models out; --dry-run shows what the others would take".to_owned()),
    })
}

fn in_words(cli_error: &CliError) -> String {
    let hint = cli_error.hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default();
    format!("{}{hint}", cli_error.message)
}

impl<'a> Session<'a> {
    fn open(context: &'a Context, args: &'a SurveyArgs, survey: &'a Survey) -> Result<Self, CliError> {
        let clouds = context.clouds(&args.want.broker)?;
        if args.want.broker.is_empty() && context.settings.broker == DefaultBroker::Local {
            context.reporter.using_this_machine();
        }
        let models = models(context, args, survey, &clouds.names())?;
        let folder = context.settings.results.join(&survey.name);
        // One that cannot be read says nothing.
        let before = Index::read(&folder).ok().flatten();
        Ok(Self { context, args, survey, folder, clouds, models, before })
    }

    /// The right to go on with it, for one process at a time.
    fn take(&self, ledger: &Ledger) -> Result<std::fs::File, CliError> {
        ledger.take_survey(&self.survey.name)?.ok_or_else(|| {
            let message = format!("the survey {} is being run by another process", self.survey.name);
            CliError::refused(message, "`outliers status` shows how it is going")
        })
    }

    fn member(&'a self, model: &'a Model<'a>) -> Member<'a> {
        Member {
            survey: &self.survey.name,
            name: &model.entry.name,
            identity: &model.identity,
            job_key: &model.job_key,
            folder: &self.folder,
            before: self.before.as_ref().and_then(|index| index.entry(&model.entry.name)),
        }
    }

    /// Runs of wanted models that nobody drives and that have time left, before anybody cleans them up.
    fn left(&self, ledger: &Ledger) -> Result<Vec<Todo>, CliError> {
        let (runs, now) = (ledger.runs()?, now_ms() / 1000);
        let mut todo = Vec::new();
        for model in &self.models {
            let member = self.member(model);
            let under_way = |run: &&RunRecord| member.is_run_by(run) && !run.state.is_at_rest();
            let left = runs.iter().rev().filter(|_| model.wanted).find(under_way);
            let left = left.filter(|run| run.deadline().is_none_or(|deadline| deadline > now));
            todo.push(match left {
                Some(run) => self.pick_up(ledger, run)?,
                None => Todo::Nothing,
            });
        }
        Ok(todo)
    }

    fn pick_up(&self, ledger: &Ledger, run: &RunRecord) -> Result<Todo, CliError> {
        let unknown = run.spec.broker_names().into_iter().find(|broker| self.clouds.get(broker).is_none());
        if let Some(broker) = unknown {
            let message = format!("run {} of {} was left, and may be on {broker}", run.id, run.spec.model);
            return Err(CliError::refused(
                message,
                format!("add --broker {}, or `outliers runs cancel {}`", run.spec.brokers, run.id),
            ));
        }
        match ledger.take(&run.id)? {
            Some(taken) if taken.state().is_at_rest() => Ok(Todo::Nothing),
            Some(taken) => Ok(Todo::PickUp(Box::new(taken))),
            None => Err(CliError::refused(
                format!("run {} of {} is driven by another process", run.id, run.spec.model),
                format!("wait for it, or `outliers runs cancel {}`", run.id),
            )),
        }
    }

    /// Looks at every model that is to be run, one after another: the hub is asked for each. Returns all that is wrong.
    async fn prepare(&self, worker: &LocalWorker, runs: &[RunRecord], todo: &mut [Todo]) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut told = false;
        for (number, (model, todo)) in self.models.iter().zip(todo).enumerate() {
            if matches!(todo, Todo::PickUp(_)) || !self.is_to_run(model, runs) {
                continue;
            }
            let reporter = &self.context.reporter;
            reporter.say(&format!("Looking at {}", model.entry.name));
            let first = !std::mem::replace(&mut told, true);
            let tell = |offered: &_| {
                if first {
                    reporter.offered(offered)
                }
            };
            let prepared = match self.place(model, runs) {
                Ok(()) => prepare(self.context, &self.clouds, worker, self.run_request(model), tell).await,
                Err(cli_error) => Err(cli_error),
            };
            match prepared {
                Ok(prepared) => *todo = Todo::Run(Box::new(prepared)),
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
            && match self.member(model).look(runs).0.outcome {
                ModelOutcome::Complete => false,
                ModelOutcome::Open => true,
                ModelOutcome::Partial | ModelOutcome::Failed => self.args.rerun_failed,
            }
    }

    /// Results that cost money are not overwritten by those of other work.
    fn place(&self, model: &Model<'_>, runs: &[RunRecord]) -> Result<(), CliError> {
        let place = self.folder.join(&model.entry.name);
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

    fn run_request(&self, model: &Model<'_>) -> RunRequest {
        let settings = &self.context.settings;
        let limit = self.args.max_duration.or(model.entry.max_duration).or(self.survey.max_duration);
        RunRequest {
            job: model.identity.job.clone(),
            job_key: model.job_key.clone(),
            request: self.args.want.request.clone().merge(model.entry.request.clone()),
            push_model: self.args.push_model,
            keep_running: false,
            detach: false,
            max_duration: limit.map_or(settings.max_duration, |span| span.0),
            cut_short: self.args.allow_cut_short,
            budget: self.budget(),
            results: self.folder.clone(),
            survey: Some(Membership { survey: self.survey.name.clone(), model: model.entry.name.clone() }),
        }
    }

    fn budget(&self) -> Option<Usd> {
        self.args.budget.map(|usd| Usd::from_dollars(usd.get())).or(self.survey.budget)
    }

    fn parallel(&self) -> usize {
        let typed = self.args.max_parallel.map(usize::from);
        typed.or(self.survey.max_parallel).unwrap_or(self.context.settings.max_parallel)
    }

    /// By all its runs, earlier ones included.
    fn spent(&self, runs: &[RunRecord]) -> Usd {
        let is_own =
            |run: &&RunRecord| run.spec.survey.as_ref().is_some_and(|member| member.survey == self.survey.name);
        runs.iter().filter(is_own).map(|run| run.cost(now_ms())).sum()
    }

    fn consent(&self, todo: &[Todo]) -> Result<(), CliError> {
        let prepared: Vec<&Prepared> = todo.iter().filter_map(Todo::prepared).collect();
        if prepared.is_empty() {
            return Ok(());
        }
        consent(self.context, &self.clouds, self.args.yes, &format!("{} instances", prepared.len()), || {
            let at_most: Usd = prepared.iter().map(|prepared| prepared.at_most()).sum();
            let budget = self.budget().map_or_else(String::new, |budget| format!(", within a budget of {budget}"));
            let shown = self.rows(&[], todo, &[]);
            let question = format!("Rent these, {} at a time, for {at_most} at most{budget}?", self.parallel());
            (tell::table_of(&shown), question)
        })
    }

    /// What is known of every model of the survey.
    fn write_index(&self, ledger: &Ledger) -> Result<(), CliError> {
        let runs = ledger.runs()?;
        let file = std::path::absolute(&self.survey.path).unwrap_or_else(|_| self.survey.path.clone());
        let index = Index {
            schema: index::SCHEMA,
            survey: self.survey.name.clone(),
            file: file.to_string_lossy().into_owned(),
            models: self.models.iter().map(|model| self.member(model).look(&runs).0).collect(),
        };
        let wrong = |error| CliError::failed(format!("{}: {error}", self.folder.join(index::FILE).display()));
        index.write(&self.folder).map_err(wrong)
    }
}

/// The file's models as jobs; all that is wrong with them at once.
fn models<'a>(
    context: &Context,
    args: &SurveyArgs,
    survey: &'a Survey,
    brokers: &str,
) -> Result<Vec<Model<'a>>, CliError> {
    let is = |entry: &SurveyModel, word: &String| [&entry.name, &entry.model.model].contains(&word);
    if let Some(unknown) = args.only.iter().find(|word| !survey.models.iter().any(|entry| is(entry, word))) {
        let known: Vec<&str> = survey.models.iter().map(|entry| entry.name.as_str()).collect();
        return Err(CliError::refused(
            format!("--only {unknown}: there is no such model in {}", survey.path.display()),
            format!("it has {}", known.join(", ")),
        ));
    }
    let here = survey.path.parent().unwrap_or(Path::new("."));
    let (mut models, mut problems) = (Vec::new(), Vec::new());
    for (number, entry) in survey.models.iter().enumerate() {
        let wanted = args.only.is_empty() || args.only.iter().any(|word| is(entry, word));
        let job = super::job::job(&entry.model, &survey.job, context.settings.thresholds, here);
        match job.and_then(|job| identity(context, &job)) {
            Ok(identity) => models.push(Model { entry, wanted, job_key: identity.key(brokers), identity }),
            Err(cli_error) => problems.push(Problem { model: number, cli_error }),
        }
    }
    refuse(&problems)?;
    Ok(models)
}

impl Todo {
    fn prepared(&self) -> Option<&Prepared> {
        if let Self::Run(prepared) = self { Some(prepared) } else { None }
    }
}
