//! `analyze`: runs the worker on this machine.

use std::path::{Path, PathBuf};

use outliers_protocol::{JobSpec, Metadata, Results, files};
use serde::de::DeserializeOwned;

use super::Context;
use crate::cli::settings::JobRequest;
use crate::files::{beside, read_json, rename_folder};
use crate::run::deploy::slug;
use crate::run::ledger::random_word;
use crate::run::local_worker::{LocalWorkerError, is_refusal};
use crate::ui::report::{CliError, ExitStatus, tables};

/// Runs `analyze`. Results are in another folder until they are complete, so that a failure does
/// not change existing ones.
pub(super) async fn command(
    context: &Context,
    asked: &JobRequest,
    output: Option<&Path>,
) -> Result<ExitStatus, CliError> {
    let worker = context.worker().await?;
    let job = super::job::job(asked)?;
    let usual = || context.settings.results.join(format!("{}-{}", slug(job.model_name()), random_word(8)));
    let folder = output.map_or_else(usual, |path| context.here.join(path));
    let partial = partial(&folder, &job)?;
    let on = |progress| context.reporter.progress(&progress);
    let ran = tokio::select! {
        ran = worker.run(&job, &partial, &on) => ran,
        // The worker receives the terminal's Ctrl-C, too. Dropping it ends it in any case.
        _ = tokio::signal::ctrl_c() => {
            let hint = format!("the same command with --output {} resumes it", folder.display());
            return Err(CliError::new(ExitStatus::Interrupted, "interrupted", hint));
        }
    };
    if let Err(error) = ran {
        let nothing_to_go_on_with = output.is_none() && !partial.join(files::SAVE_POINT).exists();
        if is_refusal(&error) && nothing_to_go_on_with {
            // The request is invalid: the folder contains only the message that is printed below.
            let _ = std::fs::remove_dir_all(&partial);
        }
        return Err(cli_error(error, &partial));
    }
    let results: Results = read(&partial.join(files::RESULTS))?;
    let metadata: Metadata = read(&partial.join(files::METADATA))?;
    rename_folder(&partial, &folder).map_err(|error| CliError::failed(format!("{}: {error}", folder.display())))?;
    context.reporter.result(&results, || {
        let verification = metadata.model.weight_verification.as_ref();
        let table = tables::results(job.model_name(), &results, verification);
        format!("{table}files: {}\n", folder.display())
    });
    Ok(ExitStatus::Done)
}

/// The folder of `job`'s results until they are complete and it is renamed to `folder`.
///
/// # Errors
/// Either folder contains other files.
fn partial(folder: &Path, job: &JobSpec) -> Result<PathBuf, CliError> {
    let refused = |place: &Path, what: &str| {
        let message = format!("{} holds {what}", place.display());
        Err(CliError::refused(message, "name another folder with --output, or move that one away"))
    };
    let is_empty = |place: &Path| std::fs::read_dir(place).map_or(!place.exists(), |mut there| there.next().is_none());
    if folder.is_file() {
        let message = format!("{} is a file, and results are a folder", folder.display());
        return Err(CliError::refused(message, "name another folder with --output"));
    }
    if !is_empty(folder) {
        return refused(folder, "other results");
    }
    let partial = beside(folder, ".partial");
    let begun = || read_json::<JobSpec>(&partial.join(files::JOB)).ok();
    if !is_empty(&partial) && begun().as_ref() != Some(job) {
        return refused(&partial, "what another job left");
    }
    Ok(partial)
}

fn cli_error(error: LocalWorkerError, folder: &Path) -> CliError {
    let refused = is_refusal(&error);
    let mut cli_error = CliError::from(error);
    if !refused {
        cli_error.status = ExitStatus::Failed;
        cli_error.hint.get_or_insert_with(|| format!("see {}", folder.join(files::LOG).display()));
    }
    cli_error
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, CliError> {
    read_json(path).map_err(|error| CliError::failed(format!("{}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use outliers_protocol::ModelSource;

    use super::*;

    #[test]
    fn existing_files_in_the_folder_are_not_touched() {
        let home = tempfile::tempdir().unwrap();
        let job = JobSpec::new(ModelSource::Hub { id: "a/b".into(), revision: "main".into() });
        let folder = home.path().join("out");
        let beside = home.path().join("out.partial");
        let found = |job: &JobSpec| partial(&folder, job).map_err(|cli_error| cli_error.message);
        assert_eq!(found(&job), Ok(beside.clone()));
        std::fs::create_dir(&folder).unwrap();
        assert_eq!(found(&job), Ok(beside.clone()), "an empty folder is as good as none");
        std::fs::create_dir(&beside).unwrap();
        std::fs::write(beside.join(files::JOB), serde_json::to_vec(&job).unwrap()).unwrap();
        assert_eq!(found(&job), Ok(beside.clone()), "the same job goes on");
        let other = JobSpec { layers: Some(1), ..job.clone() };
        assert!(found(&other).unwrap_err().contains("another job"));
        std::fs::write(folder.join("results.json"), "{}").unwrap();
        assert!(found(&job).unwrap_err().contains("other results"));
        std::fs::remove_dir_all(&folder).unwrap();
        std::fs::write(&folder, "a file").unwrap();
        assert!(found(&job).unwrap_err().contains("is a file"));
    }
}
