//! `inspect`: describes a checkpoint.

use super::Context;
use crate::cli::settings::JobRequest;
use crate::run::local_worker::InspectScope;
use crate::ui::report::{CliError, ExitStatus, tables};

pub(super) async fn command(context: &Context, asked: &JobRequest) -> Result<ExitStatus, CliError> {
    let worker = context.worker().await?;
    let job = super::job::job(asked)?;
    let what = format!("the headers of {}", job.model.name());
    let inspection = context.reporter.waiting(&what, worker.inspect(&job, InspectScope::Model)).await?;
    context.reporter.result(&inspection, || tables::inspection(&inspection));
    Ok(ExitStatus::Done)
}
