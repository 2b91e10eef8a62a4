//! `compare`: results side by side, in tables and as a page.

use super::Context;
use crate::cli::{CompareArgs, CompareFormat};
use crate::compare::folder::{ReadError, read_all};
use crate::compare::{Comparison, print};
use crate::report::{Complaint, ExitStatus};

/// Does it.
pub(super) fn command(context: &Context, args: &CompareArgs) -> Result<ExitStatus, Complaint> {
    let folders = match args.folders.is_empty() {
        true => vec![context.settings.results.clone()],
        false => args.folders.clone(),
    };
    let comparison = Comparison::of(read_all(&folders, args.allow_partial)?);
    context.reporter.result(&comparison, || match args.format {
        CompareFormat::Table => print::terminal(&comparison),
        CompareFormat::Markdown => print::markdown(&comparison),
        CompareFormat::Csv => print::csv(&comparison),
        CompareFormat::Json => {
            serde_json::to_string_pretty(&comparison).expect("documents hold no maps with keys other than strings")
        }
    });
    Ok(ExitStatus::Done)
}

impl From<ReadError> for Complaint {
    fn from(error: ReadError) -> Self {
        let message = error.to_string();
        match error {
            ReadError::Flawed(_) => Self {
                status: ExitStatus::Failed,
                message,
                hint: Some("--allow-partial goes on without their figures, and says so beside the others".to_owned()),
            },
            ReadError::Nothing(_) | ReadError::Unreadable { .. } => Self::refused(
                message,
                "name folders with results, or with folders of results: <model>-<run>/, <survey>/<model>/",
            ),
        }
    }
}
