//! `status`: what runs, what is finished, what it costs.

use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::{Context, SCHEMA};
use crate::broker::slurm;
use crate::clouds::Cloud;
use crate::ledger::{Ledger, now_ms};
use crate::report::{Complaint, ExitStatus, tables};
use crate::standing::Standing;

/// The picture with its version.
#[derive(Serialize)]
pub(super) struct Document<'a> {
    pub(super) schema: u32,
    #[serde(flatten)]
    pub(super) standing: &'a Standing,
}

/// Runs `status`.
pub(super) async fn command(context: &Context, watch: bool) -> Result<ExitStatus, Complaint> {
    let ledger = context.ledger()?;
    // One that cannot be spoken to is for `doctor` to tell.
    let cluster = context.settings.slurm.as_ref().and_then(|_| context.cloud(slurm::NAME).ok());
    let standing = look(context, &ledger, cluster.as_ref()).await?;
    context.reporter.unreadable(&standing.unreadable);
    if watch {
        return self::watch(context, &ledger, cluster.as_ref(), standing).await;
    }
    let document = Document { schema: SCHEMA, standing: &standing };
    context.reporter.result(&document, || tables::standing(&standing));
    Ok(ExitStatus::Done)
}

/// Why runs on the cluster wait is asked there, if there are any.
async fn look(context: &Context, ledger: &Ledger, cluster: Option<&Cloud>) -> Result<Standing, Complaint> {
    let mut standing = Standing::look(ledger, &context.settings.results, now_ms())?;
    if let Some(cluster) = cluster.filter(|cluster| standing.uses(cluster.name())) {
        let listed = cluster.call(cluster.broker.list());
        match context.reporter.waiting("the cluster's queue", listed).await {
            Ok(listed) => standing.note_queue(&listed),
            Err(error) => context.reporter.warn(&format!("whether runs wait in the queue is not known: {error}")),
        }
    }
    Ok(standing)
}

/// One picture after the other until nothing runs any more, or Ctrl-C.
async fn watch(
    context: &Context,
    ledger: &Ledger,
    cluster: Option<&Cloud>,
    first: Standing,
) -> Result<ExitStatus, Complaint> {
    let deaf = |error: std::io::Error| Complaint::failed(format!("signals cannot be heard: {error}"));
    let mut interrupted = signal(SignalKind::interrupt()).map_err(deaf)?;
    let (screen, mut standing) = (context.reporter.screen(), first);
    loop {
        screen.show(&Document { schema: SCHEMA, standing: &standing }, || tables::standing(&standing));
        if !standing.is_at_work() {
            return Ok(ExitStatus::Done);
        }
        tokio::select! {
            _ = interrupted.recv() => return Ok(ExitStatus::Done),
            () = tokio::time::sleep(screen.pause()) => {}
        }
        standing = look(context, ledger, cluster).await?;
    }
}
