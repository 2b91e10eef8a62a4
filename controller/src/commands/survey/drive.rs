//! Drives the runs of a survey concurrently.

use std::convert::Infallible;
use std::time::Duration;

use futures::{StreamExt, stream};
use outliers_protocol::JobSpec;
use tokio::sync::watch;

use super::output::estimate;
use super::{ModelAction, Session};
use crate::cloud::clouds::Clouds;
use crate::commands::deploy::cli_error_of;
use crate::commands::drive::listening;
use crate::commands::prepare::secrets;
use crate::run::RunSpec;
use crate::run::deploy::{DriveError, Driver, Ports, StartThrottle, Stop};
use crate::run::ledger::{Ledger, RunRecord, RunWriter, now_ms};
use crate::secret::Secret;
use crate::ui::report::{CliError, Reporter};
use crate::units::Usd;

/// Interval of summaries of all runs.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// A run that is active or about to start.
struct Task {
    name: String,
    secrets: Vec<(&'static str, Secret)>,
    /// Whether its worker reads from the hub, and is spaced from others.
    asks_the_hub: bool,
    begin: RunStart,
    /// Estimated cost, until the actual one is known.
    estimate: Usd,
}

enum RunStart {
    /// With the clouds with which it goes on.
    Left(Box<RunWriter>, Clouds),
    Anew(Box<RunSpec>),
}

impl Session<'_> {
    /// Drives all runs. Returns the errors of runs that could not be driven to their end, with
    /// model names.
    pub(super) async fn drive(
        &self,
        ledger: &Ledger,
        ports: Ports<'_>,
        todo: Vec<ModelAction>,
    ) -> Result<Vec<(String, DriveError)>, CliError> {
        // Abandoned runs bill, whether they are driven or not.
        let left = todo.iter().filter(|todo| matches!(todo, ModelAction::PickUp(_))).count();
        let parallel = self.asked.max_parallel.max(left);
        let tasks = self.tasks(todo, parallel)?;
        if tasks.is_empty() {
            return Ok(Vec::new());
        }
        let (board, since_ms) = (self.context.reporter.of_one(&self.asked.name), now_ms());
        let estimates: Vec<(String, Usd)> = tasks.iter().map(|task| (task.name.clone(), task.estimate)).collect();
        let start_throttle = StartThrottle::new(self.context.settings.stagger);
        let ports = Ports { start_throttle: Some(&start_throttle), ..ports };
        let driven = listening(&self.context.reporter, async |stop| {
            let runs = stream::iter(tasks).map(|task| self.drive_one(ledger, ports, task, stop.clone()));
            let all = runs.buffer_unordered(parallel).filter_map(async |stuck| stuck).collect::<Vec<_>>();
            tokio::select! {
                stuck = all => stuck,
                never = self.watch(ledger, &board, &estimates, since_ms) => match never {},
            }
        });
        let stuck = driven.await;
        board.done();
        stuck
    }

    /// Runs that were left come first: they bill already. At most this many at a time.
    fn tasks(&self, todo: Vec<ModelAction>, parallel: usize) -> Result<Vec<Task>, CliError> {
        let mut tasks: Vec<Task> = Vec::new();
        // A checkpoint on a cluster needs no token, and its worker need not wait for others.
        let of_job = |job: &JobSpec| (secrets(self.context, job, parallel), job.asks_the_hub());
        for (model, todo) in self.models.iter().zip(todo) {
            let ((secrets, asks_the_hub), begin, estimate) = match todo {
                ModelAction::Nothing => continue,
                ModelAction::PickUp(run) => {
                    let offer = run.state().offer();
                    let estimate = offer.and_then(|offer| run.record().spec.work.on(offer).cost);
                    let clouds = self.context.clouds_to_go_on(run.record(), &self.clouds)?;
                    (of_job(&run.record().spec.job), RunStart::Left(run, clouds), estimate)
                }
                ModelAction::Run(prepared) => {
                    let estimate = estimate(&prepared).and_then(|estimate| estimate.cost);
                    (of_job(&prepared.spec.job), RunStart::Anew(Box::new(prepared.signed())), estimate)
                }
            };
            let estimate = estimate.unwrap_or(Usd::ZERO);
            tasks.push(Task { name: model.entry.name.clone(), secrets, asks_the_hub, begin, estimate });
        }
        tasks.sort_by_key(|task| matches!(task.begin, RunStart::Anew(_)));
        Ok(tasks)
    }

    async fn drive_one(
        &self,
        ledger: &Ledger,
        ports: Ports<'_>,
        task: Task,
        stop: watch::Receiver<Stop>,
    ) -> Option<(String, DriveError)> {
        let reporter = self.context.reporter.of_one(&task.name);
        let stopped = *stop.borrow() != Stop::Go;
        let (run, its_own) = match task.begin {
            RunStart::Left(run, clouds) => {
                reporter.resumed(run.record());
                (Ok(*run), Some(clouds))
            }
            // After a stop no new run starts.
            RunStart::Anew(_) if stopped => return None,
            RunStart::Anew(spec) => (ledger.plan(&spec), None),
        };
        let start_throttle = ports.start_throttle.filter(|_| task.asks_the_hub);
        let clouds = its_own.as_ref().unwrap_or(ports.clouds);
        let ports = Ports { clouds, secrets: &task.secrets, start_throttle, ..ports };
        let driven = match run {
            Ok(run) => Driver::new(run, ports, stop, &|event| reporter.event(event)).drive().await,
            Err(error) => Err(error.into()),
        };
        reporter.done();
        if let Err(cli_error) = self.write_index(ledger) {
            reporter.sentence(&cli_error);
        }
        match driven {
            Ok(run) => {
                self.tell_end(&reporter, &run);
                None
            }
            Err(stuck) => Some((task.name, stuck)),
        }
    }

    fn tell_end(&self, reporter: &Reporter, run: &RunRecord) {
        match cli_error_of(run) {
            Some(cli_error) => reporter.sentence(&cli_error),
            None if !run.state.is_at_rest() => {
                reporter.say("Let go of: its worker works on, and the same command picks it up");
            }
            None => reporter.say(&format!("Complete, for {}", run.cost(now_ms()))),
        }
    }

    /// Reports the state of all runs until it is cancelled.
    async fn watch(&self, ledger: &Ledger, board: &Reporter, estimates: &[(String, Usd)], since_ms: u64) -> Infallible {
        loop {
            match ledger.runs() {
                Ok(runs) => self.tell_all(board, &runs, estimates, since_ms),
                Err(error) => tracing::warn!("{error}"),
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    fn tell_all(&self, board: &Reporter, runs: &[RunRecord], estimates: &[(String, Usd)], since_ms: u64) {
        let now = now_ms();
        let spent = self.spent(runs);
        let (mut over, mut under_way, mut to_come) = (0, 0, Usd::ZERO);
        for (name, estimate) in estimates {
            let model = self.models.iter().find(|model| model.entry.name == *name);
            // A finished run that is repeated has not started yet.
            let is_of_now = |run: &&RunRecord| !run.state.is_at_rest() || run.changed_at_ms() >= since_ms;
            let latest = model.and_then(|model| runs.iter().rev().find(|run| self.member(model).is_run_by(run)));
            let latest = latest.filter(is_of_now);
            match latest {
                Some(run) if run.state.is_at_rest() => over += 1,
                Some(run) => {
                    under_way += 1;
                    to_come = to_come + Usd::from_micros((estimate.micros() - run.cost(now).micros()).max(0));
                }
                None => to_come = to_come + *estimate,
            }
        }
        let detail = format!("{under_way} under way, {spent} so far, about {} in all", spent + to_come);
        board.together(over, estimates.len(), &detail);
    }
}
