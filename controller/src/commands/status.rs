//! `status`: what runs, what is finished, what it costs.

use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::{Context, SCHEMA};
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

/// Does it.
pub(super) async fn command(context: &Context, watch: bool) -> Result<ExitStatus, Complaint> {
    let ledger = context.ledger()?;
    let standing = look(context, &ledger)?;
    context.reporter.unreadable(&standing.unreadable);
    if watch {
        return self::watch(context, &ledger, standing).await;
    }
    let document = Document { schema: SCHEMA, standing: &standing };
    context.reporter.result(&document, || tables::standing(&standing));
    Ok(ExitStatus::Done)
}

fn look(context: &Context, ledger: &Ledger) -> Result<Standing, Complaint> {
    Ok(Standing::look(ledger, &context.settings.results, now_ms())?)
}

/// One picture after the other until nothing runs any more, or Ctrl-C.
async fn watch(context: &Context, ledger: &Ledger, first: Standing) -> Result<ExitStatus, Complaint> {
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
        standing = look(context, ledger)?;
    }
}
