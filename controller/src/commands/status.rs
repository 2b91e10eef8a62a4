//! `status`: shows active and finished runs and their costs.

use futures::future::join_all;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::{Context, SCHEMA};
use crate::cloud::broker::slurm;
use crate::cloud::clouds::Cloud;
use crate::run::ledger::{Ledger, now_ms};
use crate::ui::report::{CliError, ExitStatus, tables};
use crate::ui::status::Status;

#[derive(Serialize)]
pub(super) struct StatusReport<'a> {
    pub(super) schema: u32,
    #[serde(flatten)]
    pub(super) status: &'a Status,
}

/// The clusters that have jobs of the ledger's runs, or why they cannot be asked.
type Clusters = Result<Vec<Cloud>, CliError>;

/// What the ledger and the files say, and what could not be asked of clusters.
struct StatusSnapshot {
    status: Status,
    /// Of clusters that do not answer.
    silent: Vec<CliError>,
}

pub(super) async fn command(context: &Context, watch: bool) -> Result<ExitStatus, CliError> {
    let ledger = context.ledger()?;
    let clusters = context.clusters(Some(&ledger));
    let StatusSnapshot { status, mut silent } = read_status(context, &ledger, &clusters).await?;
    context.reporter.unreadable(&status.unreadable);
    if watch {
        warn(context, &silent);
        return self::watch(context, &ledger, &clusters, status).await;
    }
    let document = StatusReport { schema: SCHEMA, status: &status };
    context.reporter.result(&document, || tables::status(&status));
    let Some(last) = silent.pop() else { return Ok(ExitStatus::Done) };
    warn(context, &silent);
    Err(last)
}

fn warn(context: &Context, silent: &[CliError]) {
    silent.iter().for_each(|cli_error| context.reporter.warn(&cli_error.message));
}

/// Why runs on clusters wait is asked there, if there are any.
async fn read_status(context: &Context, ledger: &Ledger, clusters: &Clusters) -> Result<StatusSnapshot, CliError> {
    let mut status = Status::of_ledger(ledger, &context.settings.results, now_ms())?;
    let mut silent = Vec::new();
    let asked: &[Cloud] = match clusters {
        _ if !status.uses(slurm::NAME) => &[],
        Ok(clusters) => clusters,
        Err(error) => {
            silent.push(error.clone());
            &[]
        }
    };
    let lists = join_all(asked.iter().map(|cluster| cluster.call(cluster.broker.list())));
    let mut listed = Vec::new();
    for answer in context.reporter.waiting("the clusters' queues", lists).await {
        match answer {
            Ok(found) => listed.extend(found),
            Err(error) => {
                let message = format!("whether runs wait in the queue is not known: {error}");
                silent.push(CliError::new(ExitStatus::Cloud, message, "outliers doctor"));
            }
        }
    }
    status.note_queue(&listed);
    asked.iter().for_each(|cluster| status.note_ends(&*cluster.broker));
    Ok(StatusSnapshot { status, silent })
}

/// One picture after the other until nothing runs any more, or Ctrl-C.
async fn watch(context: &Context, ledger: &Ledger, clusters: &Clusters, first: Status) -> Result<ExitStatus, CliError> {
    let deaf = |error: std::io::Error| CliError::failed(format!("signals cannot be heard: {error}"));
    let mut interrupted = signal(SignalKind::interrupt()).map_err(deaf)?;
    let (screen, mut status) = (context.reporter.screen(), first);
    loop {
        screen.show(&StatusReport { schema: SCHEMA, status: &status }, || tables::status(&status));
        if !status.is_at_work() {
            return Ok(ExitStatus::Done);
        }
        tokio::select! {
            _ = interrupted.recv() => return Ok(ExitStatus::Done),
            () = tokio::time::sleep(screen.pause()) => {}
        }
        let snapshot = read_status(context, ledger, clusters).await?;
        warn(context, &snapshot.silent);
        status = snapshot.status;
    }
}
