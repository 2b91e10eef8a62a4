//! `completions`: prints a completion script.

use clap::CommandFactory;

use crate::cli::Cli;
use crate::ui::report::ExitStatus;

pub(super) fn command(shell: clap_complete::Shell) -> ExitStatus {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "outliers", &mut script);
    // A closed pipe is not an error.
    let _ = std::io::Write::write_all(&mut std::io::stdout().lock(), &script);
    ExitStatus::Done
}
