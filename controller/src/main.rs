//! The controller.

use std::path::PathBuf;
use std::process::ExitCode;

use outliers::broker::local;

#[tokio::main]
async fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let (command, folder) = (arguments.next(), arguments.next().map(PathBuf::from));
    match (command, folder) {
        (Some(command), Some(folder)) if command == local::SERVE_COMMAND => match local::serve(&folder).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        },
        _ => {
            eprintln!("usage: outliers {} FOLDER", local::SERVE_COMMAND);
            ExitCode::from(2)
        }
    }
}
