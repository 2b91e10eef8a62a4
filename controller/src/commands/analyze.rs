//! `analyze`: the worker on this machine, no instance.

use std::path::Path;

use outliers_protocol::{Results, files};

use super::Context;
use crate::cli::AnalyzeArgs;
use crate::deploy::slug;
use crate::files::{MOST, read_small};
use crate::local_worker::{LocalWorkerError, is_refusal};
use crate::report::{Complaint, ExitStatus, tables};

/// Does it.
pub(super) async fn command(context: &Context, args: &AnalyzeArgs) -> Result<ExitStatus, Complaint> {
    let worker = context.worker().await?;
    let job = super::job::job(&args.model, &args.job, context.settings.thresholds, &context.here)?;
    let usual = || context.settings.results.join(format!("{}-here", slug(job.model.name())));
    let folder = args.output.as_ref().map_or_else(usual, |path| context.here.join(path));
    let on = |progress| context.reporter.progress(&progress);
    let ran = tokio::select! {
        ran = worker.run(&job, &folder, &on) => ran,
        // The worker hears the terminal's Ctrl-C too; dropping it ends it in any case.
        _ = tokio::signal::ctrl_c() => {
            return Err(Complaint { status: ExitStatus::Interrupted, message: "interrupted".to_owned(), hint: None });
        }
    };
    ran.map_err(|error| complaint(error, &folder))?;
    let results = read(&folder.join(files::RESULTS))?;
    context
        .reporter
        .result(&results, || format!("{}files: {}\n", tables::results(job.model.name(), &results), folder.display()));
    Ok(ExitStatus::Done)
}

fn complaint(error: LocalWorkerError, folder: &Path) -> Complaint {
    let refused = is_refusal(&error);
    let mut complaint = Complaint::from(error);
    if !refused {
        complaint.status = ExitStatus::Failed;
        complaint.hint.get_or_insert_with(|| format!("see {}", folder.join(files::LOG).display()));
    }
    complaint
}

fn read(path: &Path) -> Result<Results, Complaint> {
    let text = read_small(path, MOST).map_err(|error| Complaint::failed(format!("{}: {error}", path.display())))?;
    serde_json::from_slice(&text).map_err(|error| Complaint::failed(format!("{}: {error}", path.display())))
}
