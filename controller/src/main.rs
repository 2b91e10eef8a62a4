//! The program `outliers`.

use std::process::ExitCode;

fn main() -> ExitCode {
    outliers::main_impl()
}
