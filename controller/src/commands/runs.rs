//! `runs`: shows the ledger, or cancels a run.

use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;

use super::drive::Deployed;
use super::survey::refresh_indices;
use super::{Context, SCHEMA, ports};
use crate::cli::RunsCommand;
use crate::cloud::clouds::{BadHosts, Clouds};
use crate::run::RunOutcome;
use crate::run::deploy::{DriveError, Driver, Ports, Stop, release};
use crate::run::ledger::{Ledger, Records, RunRecord, RunWriter, Unreadable, now_ms};
use crate::text::clean;
use crate::ui::report::{CliError, ExitStatus, tables};

mod logs;

/// Time for the driver of a run to end it.
const CANCEL_LIMIT: Duration = Duration::from_secs(30 * 60);

/// Maximum characters of untrusted text that are shown.
const LINE: usize = 2000;

#[derive(Serialize)]
struct RunList<'a> {
    schema: u32,
    runs: Vec<RunRow<'a>>,
    /// Runs with unreadable records.
    unreadable: &'a [Unreadable],
}

#[derive(Serialize)]
struct RunRow<'a> {
    #[serde(flatten)]
    run: &'a RunRecord,
    /// Whether a process drives it.
    driven: bool,
    /// Whether no process drives it although it is not over.
    abandoned: bool,
    cost_micro_usd: i64,
}

impl<'a> RunRow<'a> {
    fn of(run: &'a RunRecord, driven: bool) -> Self {
        let abandoned = !driven && !run.state.is_at_rest();
        Self { run, driven, abandoned, cost_micro_usd: run.cost(now_ms()).micros() }
    }
}

pub(super) async fn command(context: &Context, command: RunsCommand) -> Result<ExitStatus, CliError> {
    let ledger = context.ledger()?;
    match command {
        RunsCommand::List => list(context, &ledger),
        RunsCommand::Show { run } => show(context, &ledger, &run),
        RunsCommand::Logs { run, follow } => logs::command(context, &ledger, &run, follow).await,
        RunsCommand::Cancel { run } => cancel(context, &ledger, &run).await,
    }
}

fn list(context: &Context, ledger: &Ledger) -> Result<ExitStatus, CliError> {
    let Records { runs, unreadable } = ledger.records()?;
    context.reporter.unreadable(&unreadable);
    let driven: Vec<bool> = runs.iter().map(|run| is_driven(ledger, run)).collect::<Result<_, _>>()?;
    let shown = runs.iter().zip(&driven).map(|(run, driven)| RunRow::of(run, *driven)).collect();
    context.reporter.result(&RunList { schema: SCHEMA, runs: shown, unreadable: &unreadable }, || {
        tables::runs(&runs, &driven, now_ms())
    });
    Ok(ExitStatus::Done)
}

fn show(context: &Context, ledger: &Ledger, name: &str) -> Result<ExitStatus, CliError> {
    let run = ledger.find(name)?;
    let driven = is_driven(ledger, &run)?;
    context.reporter.result(&RunRow::of(&run, driven), || tables::run(&run, driven, now_ms()));
    Ok(ExitStatus::Done)
}

fn is_driven(ledger: &Ledger, run: &RunRecord) -> Result<bool, CliError> {
    Ok(!run.state.is_closed() && ledger.is_driven(&run.id)?)
}

async fn cancel(context: &Context, ledger: &Ledger, name: &str) -> Result<ExitStatus, CliError> {
    let run = ledger.find(name)?;
    let run = if run.state.is_closed() {
        run
    } else {
        match ledger.take(&run.id)? {
            Some(taken) => end_alone(context, taken, Stop::Now).await?,
            None => ask(context, ledger, &run.id).await?,
        }
    };
    refresh_indices(context, ledger);
    let deployed = Deployed::of(run);
    context.reporter.result(&deployed, || {
        let ending = deployed.run.state.ending().map(ToString::to_string).unwrap_or_default();
        format!("run {} is over: {}", deployed.run.id, clean(ending.as_bytes(), LINE))
    });
    Ok(ExitStatus::Done)
}

/// Ends a run without a driver, with the dependencies of its cloud.
async fn end_alone(context: &Context, run: RunWriter, how: Stop) -> Result<RunRecord, CliError> {
    let cloud = run.state().offer().map(|offer| context.cloud_of(offer)).transpose()?;
    let clouds: Clouds = cloud.into_iter().collect::<Vec<_>>().into();
    // A run that is told to stop from the start pushes nothing.
    let (hosts, bad_hosts) = (context.hosts(&context.exe), BadHosts::default());
    Ok(end(context, ports(&clouds, &bad_hosts, &hosts, &[]), run, how).await?)
}

/// Ends a run without a driver.
///
/// # Errors
/// Its instance may remain.
pub(super) async fn end(
    context: &Context,
    ports: Ports<'_>,
    mut run: RunWriter,
    how: Stop,
) -> Result<RunRecord, DriveError> {
    let on = |event| context.reporter.event(event);
    release(&mut run, ports, &on).await?;
    let stop = watch::Sender::new(how);
    let driver = Driver::new(run, ports, stop.subscribe(), &on);
    driver.stopping_as(RunOutcome::Cancelled).drive().await
}

/// Requests the driver of a run to end it, and waits.
async fn ask(context: &Context, ledger: &Ledger, id: &str) -> Result<RunRecord, CliError> {
    ledger.ask_to_cancel(id)?;
    context.reporter.say(&format!("Asked the process that drives run {id} to end it; waiting"));
    let deadline = Instant::now() + CANCEL_LIMIT;
    while Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let run = ledger.run(id)?;
        if run.state.is_closed() {
            return Ok(run);
        }
        // Its driver died, or had just held the instance at the time of the request.
        if let Some(taken) = ledger.take(id)? {
            return end_alone(context, taken, Stop::Now).await;
        }
    }
    let message = format!("run {id} was asked to end and has not");
    Err(CliError::new(ExitStatus::InstanceLeft, message, format!("outliers runs show {id}")))
}
