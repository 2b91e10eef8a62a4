//! `inspect`.

use super::Context;
use crate::cli::InspectArgs;
use crate::local_worker::InspectScope;
use crate::report::{CliError, ExitStatus, tables};

/// Runs `inspect`.
pub(super) async fn command(context: &Context, args: &InspectArgs) -> Result<ExitStatus, CliError> {
    let worker = context.worker().await?;
    let job = super::job::job(&args.model, &args.job, context.settings.thresholds, &context.here)?;
    let what = format!("the headers of {}", job.model.name());
    let inspection = context.reporter.waiting(&what, worker.inspect(&job, InspectScope::Model)).await?;
    context.reporter.result(&inspection, || tables::inspection(&inspection));
    Ok(ExitStatus::Done)
}
