//! `attach`: resumes a run without a controller.

use std::path::Path;

use super::deploy::print_result;
use super::drive::{Deployed, drive};
use super::prepare::{secrets, writable};
use super::survey::refresh_indices;
use super::{Context, ports};
use crate::cloud::clouds::BadHosts;
use crate::run::ledger::{Ledger, Records, RunRecord};
use crate::ui::report::{CliError, ExitStatus};

/// Runs `attach`. `results` is another folder for the results.
pub(super) async fn command(
    context: &Context,
    name: Option<&str>,
    results: Option<&Path>,
) -> Result<ExitStatus, CliError> {
    let ledger = context.ledger()?;
    let run = match name {
        Some(name) => ledger.find(name)?,
        None => the_only_one(context, &ledger)?,
    };
    if let Some(results) = results {
        let folder = send_results(context, &ledger, &run, results)?;
        if ledger.is_driven(&run.id)? {
            context.reporter.say(&format!("The driver of run {} saves its results to {folder} from now on", run.id));
            return Ok(ExitStatus::Done);
        }
    }
    let deployed = if run.state.is_at_rest() { Deployed::of(run) } else { take_up(context, &ledger, &run).await? };
    refresh_indices(context, &ledger);
    print_result(context, &deployed);
    Ok(deployed.status())
}

async fn take_up(context: &Context, ledger: &Ledger, run: &RunRecord) -> Result<Deployed, CliError> {
    let Some(taken) = ledger.take(&run.id)? else {
        return Err(CliError::refused(
            format!("run {} is driven by another process", run.id),
            format!("`outliers runs logs {0}` shows what its worker says, `outliers runs cancel {0}` ends it", run.id),
        ));
    };
    let (clouds, worker) = (context.clouds_of(run)?, context.worker().await?);
    let (hosts, bad_hosts) = (context.hosts_for(&worker), BadHosts::default());
    // Other runs of its survey may be running.
    let workers = if run.spec.survey.is_some() { context.settings.max_parallel } else { 1 };
    let secrets = secrets(context, &run.spec.job, workers);
    context.reporter.resumed(taken.record());
    drive(&context.reporter, taken, ports(&clouds, &bad_hosts, &hosts, &secrets), false).await
}

/// Sets another folder for the unsaved results of a run. Returns its path.
fn send_results(context: &Context, ledger: &Ledger, run: &RunRecord, folder: &Path) -> Result<String, CliError> {
    if let Some(results) = run.state.results() {
        let message = format!("the results of run {} are already saved in {}", run.id, results.folder);
        return Err(CliError::refused(message, "move that folder"));
    }
    if run.state.is_at_rest() {
        return Err(CliError::refused(format!("run {} is over and left no results", run.id), "deploy it again"));
    }
    let folder = context.here.join(folder);
    let Some(path) = folder.to_str() else {
        return Err(CliError::refused("the results' folder is not UTF-8", "choose another"));
    };
    writable(&folder)?;
    ledger.send_results_to(&run.id, path)?;
    Ok(path.to_owned())
}

/// The abandoned run, if there is exactly one.
fn the_only_one(context: &Context, ledger: &Ledger) -> Result<RunRecord, CliError> {
    let mut left = Vec::new();
    let Records { runs, unreadable } = ledger.records()?;
    context.reporter.unreadable(&unreadable);
    for run in runs {
        if !run.state.is_at_rest() && !ledger.is_driven(&run.id)? {
            left.push(run);
        }
    }
    if left.len() == 1 {
        return Ok(left.remove(0));
    }
    let ids: Vec<&str> = left.iter().map(|run| run.id.as_str()).collect();
    Err(match ids[..] {
        [] => CliError::refused("no run was left behind", "`outliers runs list` shows all of them"),
        _ => CliError::refused(format!("{} runs were left behind: {}", ids.len(), ids.join(", ")), "name one of them"),
    })
}
