//! `handoff`: where everything stands, written down for whoever carries on.

use std::path::Path;

use serde::Serialize;

use super::status::Document;
use super::{Context, SCHEMA};
use crate::calendar::rfc3339;
use crate::files::{MOST, read_small, write_whole};
use crate::handoff::{document, is_untouched, sealed};
use crate::ledger::now_ms;
use crate::report::{Complaint, ExitStatus};
use crate::standing::Standing;

/// Where documents go, seen from the folder in which the command runs.
const FOLDER: &str = "handoffs";

#[derive(Serialize)]
struct Written<'a> {
    /// The document.
    file: &'a Path,
    #[serde(flatten)]
    document: Document<'a>,
}

/// Runs `handoff`. A second document on the same day replaces the first, unless somebody has edited
/// that.
pub(super) fn command(context: &Context, output: Option<&Path>, force: bool) -> Result<ExitStatus, Complaint> {
    let standing = Standing::look(&context.ledger()?, &context.settings.results, now_ms())?;
    context.reporter.unreadable(&standing.unreadable);
    let moment = rfc3339(standing.at);
    let date = moment.split('T').next().unwrap_or_default();
    let folder = context.here.join(output.unwrap_or(Path::new(FOLDER)));
    let file = folder.join(format!("{date}.md"));
    let is_edited = match read_small(&file, MOST) {
        Ok(text) => !is_untouched(&text),
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    };
    if !force && is_edited {
        return Err(Complaint::refused(
            format!("{} was edited, or is of another version, and is left as it is", file.display()),
            "--force replaces it; --output writes to another folder",
        ));
    }
    let text = sealed(document(&standing));
    let written = std::fs::create_dir_all(&folder).and_then(|()| write_whole(&file, text.as_bytes()));
    written.map_err(|error| Complaint::failed(format!("{}: {error}", file.display())))?;
    let document = Document { schema: SCHEMA, standing: &standing };
    context.reporter.result(&Written { file: &file, document }, || file.display().to_string());
    Ok(ExitStatus::Done)
}
