//! The process behind an instance of the local broker, which wants a program to run.

use std::path::PathBuf;
use std::process::ExitCode;

use outliers::cloud::broker::local;

#[tokio::main]
async fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match (arguments.next(), arguments.next()) {
        (Some(command), Some(folder)) if command == local::SERVE_COMMAND => {
            match local::serve(&PathBuf::from(folder)).await {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("{error:#}");
                    ExitCode::FAILURE
                }
            }
        }
        _ => ExitCode::FAILURE,
    }
}
