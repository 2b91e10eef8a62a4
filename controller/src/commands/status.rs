//! `status`: what runs, what is finished, what it costs.

use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::{Context, SCHEMA};
use crate::cloud::broker::slurm;
use crate::cloud::clouds::Cloud;
use crate::run::ledger::{Ledger, now_ms};
use crate::ui::report::{CliError, ExitStatus, tables};
use crate::ui::status::Status;

/// The picture with its version.
#[derive(Serialize)]
pub(super) struct StatusReport<'a> {
    pub(super) schema: u32,
    #[serde(flatten)]
    pub(super) status: &'a Status,
}

/// Runs `status`.
pub(super) async fn command(context: &Context, watch: bool) -> Result<ExitStatus, CliError> {
    let ledger = context.ledger()?;
    // One that cannot be spoken to is for `doctor` to tell.
    let cluster = context.settings.slurm.as_ref().and_then(|_| context.cloud(slurm::NAME).ok());
    let status = look(context, &ledger, cluster.as_ref()).await?;
    context.reporter.unreadable(&status.unreadable);
    if watch {
        return self::watch(context, &ledger, cluster.as_ref(), status).await;
    }
    let document = StatusReport { schema: SCHEMA, status: &status };
    context.reporter.result(&document, || tables::status(&status));
    Ok(ExitStatus::Done)
}

/// Why runs on the cluster wait is asked there, if there are any.
async fn look(context: &Context, ledger: &Ledger, cluster: Option<&Cloud>) -> Result<Status, CliError> {
    let mut status = Status::look(ledger, &context.settings.results, now_ms())?;
    if let Some(cluster) = cluster.filter(|cluster| status.uses(cluster.name())) {
        let listed = cluster.call(cluster.broker.list());
        match context.reporter.waiting("the cluster's queue", listed).await {
            Ok(listed) => status.note_queue(&listed),
            Err(error) => context.reporter.warn(&format!("whether runs wait in the queue is not known: {error}")),
        }
    }
    Ok(status)
}

/// One picture after the other until nothing runs any more, or Ctrl-C.
async fn watch(
    context: &Context,
    ledger: &Ledger,
    cluster: Option<&Cloud>,
    first: Status,
) -> Result<ExitStatus, CliError> {
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
        status = look(context, ledger, cluster).await?;
    }
}
