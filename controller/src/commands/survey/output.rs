//! Tables and documents of a survey's plan and results.

use std::time::Duration;

use outliers_protocol::ModelSource;
use serde::Serialize;

use super::{Model, ModelAction, Problem, Session, in_words};
use crate::cli::settings::Span;
use crate::cloud::broker::Offer;
use crate::cloud::estimate::Estimate;
use crate::cloud::market;
use crate::commands::SCHEMA;
use crate::commands::prepare::Prepared;
use crate::host::transport::quote::quote;
use crate::run::deploy::DriveError;
use crate::run::ledger::{RunRecord, now_ms};
use crate::run::{RunOutcome, RunSpec};
use crate::survey::{IndexEntry, ModelOutcome, is_commit};
use crate::text::clean_lines;
use crate::ui::report::{CliError, ExitStatus, tables};
use crate::ui::status::HeadlineFigures;
use crate::units::{GpuTime, Usd, figure};

/// Estimate for the first offer.
pub(super) fn estimate(prepared: &Prepared) -> Option<Estimate> {
    prepared.quote.offers.first().map(|offer| prepared.spec.work.on(offer))
}

/// Planned action for a model.
#[derive(Serialize)]
pub(super) struct ModelRow<'a> {
    name: &'a str,
    model: &'a str,
    job_key: &'a str,
    /// Action as text.
    to_do: &'static str,
    /// Why it is impossible.
    problem: Option<String>,
    spec: Option<&'a RunSpec>,
    /// The best of the matching `offers`.
    offer: Option<&'a Offer>,
    offers: usize,
    estimate: Option<Estimate>,
    /// Cost of the offer until the time limit, which no alternative may exceed.
    at_most: Option<Usd>,
}

#[derive(Serialize)]
struct SurveyPlan<'a> {
    schema: u32,
    dry_run: bool,
    survey: &'a str,
    models: Vec<ModelRow<'a>>,
    max_parallel: usize,
    budget: Option<Usd>,
    /// Cost of all runs of the survey so far.
    spent: Usd,
    /// Budget of GPU time, and the GPU time taken so far, in GPU-seconds.
    max_gpu_time: Option<GpuTime>,
    gpu_time: GpuTime,
    /// Estimated cost of the planned runs.
    estimate: Usd,
    at_most: Usd,
}

#[derive(Serialize)]
struct Surveyed<'a> {
    schema: u32,
    survey: &'a str,
    folder: String,
    models: Vec<ModelResult>,
    /// Cost of all runs of the survey.
    cost: Usd,
    exit_status: u8,
}

#[derive(Serialize)]
struct ModelResult {
    #[serde(flatten)]
    line: IndexEntry,
    /// Cost of its latest run.
    cost: Usd,
    /// Figures of complete results.
    figures: Option<HeadlineFigures>,
    #[serde(skip)]
    status: ExitStatus,
}

impl ModelResult {
    fn has_failed(&self) -> bool {
        matches!(self.line.outcome, ModelOutcome::Partial | ModelOutcome::Failed)
    }
}

impl Session<'_> {
    /// Planned actions for all models.
    pub(super) fn rows<'r>(
        &'r self,
        runs: &[RunRecord],
        todo: &'r [ModelAction],
        problems: &[Problem],
    ) -> Vec<ModelRow<'r>> {
        let row = |(number, (model, todo)): (usize, (&'r Model<'_>, &'r ModelAction))| {
            let problem = problems.iter().find(|problem| problem.model == number);
            let prepared = todo.prepared();
            let outcome = self.member(model).index_entry(runs).0.outcome;
            let to_do = match (todo, outcome) {
                (ModelAction::PickUp(_), _) => "pick up",
                (ModelAction::Run(_), _) => "run",
                _ if problem.is_some() => "cannot be run",
                (_, ModelOutcome::Complete) => "nothing: complete",
                (_, ModelOutcome::Partial | ModelOutcome::Failed) => "nothing: failed",
                _ => "nothing: left out",
            };
            let estimate = prepared.and_then(estimate);
            ModelRow {
                name: &model.entry.name,
                model: &model.entry.job.model,
                job_key: &model.job_key,
                to_do,
                problem: problem.map(|problem| in_words(&problem.cli_error)),
                spec: prepared.map(|prepared| &prepared.spec),
                offer: prepared.and_then(|prepared| prepared.quote.offers.first()),
                offers: prepared.map_or(0, |prepared| prepared.quote.offers.len()),
                estimate,
                at_most: prepared.map(Prepared::at_most),
            }
        };
        self.models.iter().zip(todo).enumerate().map(row).collect()
    }

    /// Prints the plan.
    pub(super) fn show(&self, runs: &[RunRecord], todo: &[ModelAction], problems: &[Problem]) -> ExitStatus {
        for model in self.models.iter().filter(|model| model.wanted) {
            if let ModelSource::Hub { id, revision } = &model.identity.job.model
                && !is_commit(revision)
            {
                let words = format!("{id} is taken at {revision}, which may move: name a commit (revision = \"..\")");
                self.context.reporter.warn(&words);
            }
        }
        let models = self.rows(runs, todo, problems);
        let costs = models.iter().filter_map(|row| row.estimate.as_ref()?.cost);
        let plan = SurveyPlan {
            schema: SCHEMA,
            dry_run: true,
            survey: &self.asked.name,
            max_parallel: self.asked.max_parallel,
            budget: self.asked.budget,
            spent: self.spent(runs),
            max_gpu_time: self.asked.max_gpu_time,
            gpu_time: self.gpu_time(runs),
            estimate: costs.sum(),
            at_most: models.iter().filter_map(|row| row.at_most).sum(),
            models,
        };
        self.context.reporter.result(&plan, || {
            let budget = plan.budget.map_or_else(|| "none".to_owned(), |budget| budget.to_string());
            let gpus = plan.max_gpu_time.map(|most| format!("GPUs: {} so far, {most} allowed\n", plan.gpu_time));
            let gpus = gpus.unwrap_or_default();
            let problems: Vec<String> = plan.models.iter().filter_map(|row| row.problem.clone()).collect();
            let problems: String = problems.iter().map(|problem| clean_lines(problem) + "\n").collect();
            tables::paragraphs(&format!(
                "Nothing is rented. {} at a time.\n\n{}\n{problems}\
                 about {}, at most {} until the time limits; spent so far {}, budget {budget}\n{gpus}",
                plan.max_parallel,
                table_of(&plan.models),
                plan.estimate,
                plan.at_most,
                plan.spent,
            ))
        });
        ExitStatus::worst(problems.iter().map(|problem| problem.cli_error.status))
    }

    /// Prints the result. The exit status is that of the most urgent run.
    pub(super) fn conclude(&self, runs: &[RunRecord], stuck: &[(String, DriveError)]) -> ExitStatus {
        let wanted = self.models.iter().filter(|model| model.wanted);
        let models: Vec<ModelResult> = wanted.map(|model| self.came(model, runs, stuck)).collect();
        let status = ExitStatus::worst(models.iter().map(|came| came.status));
        let surveyed = Surveyed {
            schema: SCHEMA,
            survey: &self.asked.name,
            folder: self.asked.folder.to_string_lossy().into_owned(),
            cost: self.spent(runs),
            exit_status: status.number(),
            models,
        };
        self.context.reporter.result(&surveyed, || self.in_words(&surveyed));
        let failed = surveyed.models.iter().filter(|came| came.has_failed()).count();
        if failed > 0 {
            self.context.reporter.say(&format!("{failed} failed; --rerun-failed runs them again"));
        }
        for (name, stuck) in stuck {
            self.context.reporter.of_one(name).sentence(&CliError::of_drive_error(stuck));
        }
        status
    }

    fn came(&self, model: &Model<'_>, runs: &[RunRecord], stuck: &[(String, DriveError)]) -> ModelResult {
        let (line, run) = self.member(model).index_entry(runs);
        let status = match (line.outcome, run) {
            _ if stuck.iter().any(|(name, _)| *name == model.entry.name) => ExitStatus::InstanceLeft,
            (ModelOutcome::Complete, _) => ExitStatus::Done,
            // The run is of an earlier ledger.
            (ModelOutcome::Partial | ModelOutcome::Failed, None) => ExitStatus::Failed,
            // Interrupted before it started.
            (_, None) => ExitStatus::Interrupted,
            (_, Some(run)) if run.state.ending() == Some(&RunOutcome::Completed) => ExitStatus::Failed,
            (_, Some(run)) => ExitStatus::of_run(&run.state),
        };
        let place = self.asked.folder.join(&model.entry.name);
        let figures = (line.outcome == ModelOutcome::Complete).then(|| HeadlineFigures::read(&place)).flatten();
        ModelResult { cost: run.map_or(Usd::ZERO, |run| run.cost(now_ms())), figures, line, status }
    }

    fn in_words(&self, surveyed: &Surveyed<'_>) -> String {
        let mut table = tables::table(&["model", "run", "state", "cost", "outlier features", "perplexity", "why"]);
        for came in &surveyed.models {
            let optional = |of: Option<f64>, digits: usize| of.map_or_else(|| "-".to_owned(), |x| figure(x, digits));
            table.add_row([
                tables::name(&came.line.name),
                tables::id(came.line.run.as_deref().unwrap_or("-")),
                tables::text(came.line.outcome.word()),
                tables::number(came.cost),
                tables::number(optional(came.figures.map(|figures| figures.features), 0)),
                tables::number(optional(came.figures.and_then(|figures| figures.perplexity), 4)),
                tables::text(came.line.why.as_deref().unwrap_or_default()),
            ]);
        }
        let complete = surveyed.models.iter().filter(|came| came.line.outcome == ModelOutcome::Complete).count();
        let price = if self.clouds.is_local() { " (made up: this machine)" } else { "" };
        format!(
            "{table}\n{complete} of {} complete, cost of the survey {}{price}\nfiles: {}\n{}",
            surveyed.models.len(),
            surveyed.cost,
            surveyed.folder,
            self.next(surveyed, complete),
        )
    }

    /// The command that helps now: `compare` needs something to compare.
    fn next(&self, surveyed: &Surveyed<'_>, complete: usize) -> String {
        if complete > 0 {
            return format!("side by side: outliers compare {}\n", quote(&surveyed.folder));
        }
        let mut failed = surveyed.models.iter().filter(|came| came.has_failed());
        match failed.find_map(|came| came.line.run.as_ref()) {
            Some(run) => format!("log of the first that failed: outliers runs logs {run}\n"),
            None => format!("to continue: outliers survey {}\n", quote(&self.asked.file.to_string_lossy())),
        }
    }
}

pub(super) fn table_of(rows: &[ModelRow<'_>]) -> String {
    let mut table = tables::table(&["model", "to do", "what", "price", "takes", "costs", "at most"]);
    for row in rows {
        let of_offer = |of: fn(&Offer) -> String| row.offer.map(of).unwrap_or_default();
        let span = |estimate: &Estimate| format!("{:#}", Span(Duration::from_secs_f64(estimate.seconds)));
        let takes = row.estimate.as_ref().map(span);
        let costs = row.estimate.as_ref().and_then(|estimate| estimate.cost).map(|cost| cost.to_string());
        table.add_row([
            tables::name(row.name),
            tables::text(row.to_do),
            tables::facts(&of_offer(|offer| format!("{}: {}", offer.broker, market::hardware(offer)))),
            tables::number(of_offer(|offer| offer.price.to_string())),
            tables::number(takes.unwrap_or_default()),
            tables::number(costs.unwrap_or_default()),
            tables::number(row.at_most.map(|most| most.to_string()).unwrap_or_default()),
        ]);
    }
    format!("{table}\n")
}
