//! `status`: what runs, what is finished, what it costs.

use serde::Serialize;

use super::{Context, SCHEMA};
use crate::ledger::now_ms;
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
pub(super) fn command(context: &Context) -> Result<ExitStatus, Complaint> {
    let standing = Standing::look(&context.ledger()?, &context.settings.results, now_ms())?;
    context.reporter.unreadable(&standing.unreadable);
    let document = Document { schema: SCHEMA, standing: &standing };
    context.reporter.result(&document, || tables::standing(&standing));
    Ok(ExitStatus::Done)
}
