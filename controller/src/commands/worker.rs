//! `worker`: builds a worker for instances from this project's source.

use std::path::{Path, PathBuf};

use serde::Serialize;
use tokio::process::Command;

use super::{Context, SCHEMA};
use crate::cli::WorkerCommand;
use crate::run::local_worker::{PORTABLE, Pushed};
use crate::ui::report::{CliError, ExitStatus};
use crate::units::CudaVersion;

/// Build script in the project's folder.
const SCRIPT: &str = "worker/build.sh";

#[derive(Debug, Serialize)]
struct WorkerReport {
    schema: u32,
    path: PathBuf,
    /// Minimum CUDA version of the driver, if it uses GPUs.
    oldest_cuda: Option<CudaVersion>,
}

pub(super) async fn command(context: &Context, command: WorkerCommand) -> Result<ExitStatus, CliError> {
    let WorkerCommand::Build { cuda, output } = command;
    let project = project(&context.here)?;
    let output = output.map_or_else(|| context.exe.with_file_name(PORTABLE), |path| context.here.join(path));
    let mut build = Command::new(project.join(SCRIPT));
    build.args(cuda.then_some("--cuda")).arg("--output").arg(&output).kill_on_drop(true);
    // The script's output is for people. Standard output contains the result.
    build.stdout(std::io::stderr());
    let status = build.status().await.map_err(|error| CliError::failed(format!("{SCRIPT}: {error}")))?;
    if !status.success() {
        return Err(CliError::failed(format!("{SCRIPT} ended with {status}; why stands above")));
    }
    let Pushed { path, cuda } = Pushed::look_at(output).await?;
    let what =
        cuda.map_or_else(|| "for CPUs alone".to_owned(), |oldest| format!("for CPUs, and GPUs from CUDA {oldest} on"));
    let words = format!("{}: {what}", path.display());
    context.reporter.result(&WorkerReport { schema: SCHEMA, path, oldest_cuda: cuda }, || words);
    Ok(ExitStatus::Done)
}

/// The project's folder, searched upwards from `here`.
fn project(here: &Path) -> Result<PathBuf, CliError> {
    let found = here.ancestors().find(|folder| folder.join(SCRIPT).is_file());
    found.map(Path::to_owned).ok_or_else(|| {
        CliError::refused(format!("{SCRIPT} is not in {} or above", here.display()), "run it in the project's folder")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_tree_is_found_from_any_subfolder() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        assert_eq!(project(&root.join("worker/src")).unwrap(), root);
        assert_eq!(project(Path::new("/")).unwrap_err().status, ExitStatus::Refused);
    }
}
