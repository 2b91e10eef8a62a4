//! `outliers`: arguments in, an exit status out.

use std::process::ExitCode;

fn main() -> ExitCode {
    outliers::main_impl()
}
