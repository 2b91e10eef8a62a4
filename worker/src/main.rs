//! `outliers-worker`: arguments to job to run; errors to exit codes.

use std::process::ExitCode;

fn main() -> ExitCode {
    outliers_worker::app::main_impl()
}
