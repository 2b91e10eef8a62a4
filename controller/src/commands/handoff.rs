//! `handoff`: writes the status of all runs as a document.

use std::path::Path;

use serde::Serialize;

use super::status::StatusReport;
use super::{Context, SCHEMA};
use crate::calendar::rfc3339;
use crate::files::{MAX_FILE_BYTES, read_small, write_whole};
use crate::run::ledger::now_ms;
use crate::ui::handoff::{document, is_untouched, with_checksum};
use crate::ui::report::{CliError, ExitStatus};
use crate::ui::status::Status;

/// Default folder of documents, relative to the current folder.
const FOLDER: &str = "handoffs";

#[derive(Serialize)]
struct Written<'a> {
    file: &'a Path,
    #[serde(flatten)]
    document: StatusReport<'a>,
}

/// Runs `handoff`. A second document on the same day replaces the first, unless that was edited.
pub(super) fn command(context: &Context, output: Option<&Path>, force: bool) -> Result<ExitStatus, CliError> {
    let status = Status::of_ledger(&context.ledger()?, &context.settings.results, now_ms())?;
    context.reporter.unreadable(&status.unreadable);
    let moment = rfc3339(status.at);
    let date = moment.split('T').next().unwrap_or_default();
    let folder = context.here.join(output.unwrap_or(Path::new(FOLDER)));
    let file = folder.join(format!("{date}.md"));
    let is_edited = match read_small(&file, MAX_FILE_BYTES) {
        Ok(text) => !is_untouched(&text),
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    };
    if !force && is_edited {
        return Err(CliError::refused(
            format!("{} was edited, or is of another version, and is left as it is", file.display()),
            "--force replaces it; --output writes to another folder",
        ));
    }
    let text = with_checksum(document(&status));
    let written = std::fs::create_dir_all(&folder).and_then(|()| write_whole(&file, text.as_bytes()));
    written.map_err(|error| CliError::failed(format!("{}: {error}", file.display())))?;
    let document = StatusReport { schema: SCHEMA, status: &status };
    context.reporter.result(&Written { file: &file, document }, || file.display().to_string());
    Ok(ExitStatus::Done)
}
