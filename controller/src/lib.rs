//! The controller: rents an instance, pushes the worker, follows it, fetches the results, ends the
//! rental.
//!
//! Its rooms, without circular dependencies:
//!
//! - [`host`]: a rented host, reached over a [`transport`](host::transport).
//! - [`cloud`]: concurrent [`broker`](cloud::broker)s ([`clouds`](cloud::clouds)) that use
//!   [`http`](cloud::http); their offers form a [`market`](cloud::market).
//! - [`run`]: the life of a run as a pure state machine, recorded event by event
//!   ([`ledger`](run::ledger)), driven by one loop ([`deploy`](run::deploy)) and compared with the
//!   clouds' lists (`reconcile`).
//! - [`survey`]: many runs at once.
//! - [`cli`]: the command line, and its `settings`.
//! - `ui`: `report` prints all events; `status` and `handoff` show all runs, as table and document.
//! - `compare`: comparison of results.
//! - `commands`: one file per command.
//!
//! The other modules are helpers for all rooms.

pub mod calendar;
pub mod cli;
pub mod cloud;
mod commands;
mod compare;
mod files;
pub mod host;
mod model_name;
pub mod run;
pub mod secret;
pub mod survey;
mod text;
mod ui;
pub mod units;
pub mod waiting;

use std::process::ExitCode;

use clap::Parser;

/// Parses the arguments, runs the command, and returns the documented exit code.
pub fn main_impl() -> ExitCode {
    let cli = cli::Cli::parse();
    let level = if cli.global.verbose { tracing::Level::INFO } else { tracing::Level::WARN };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        // A closed terminal must not end the program.
        .log_internal_errors(false)
        .init();
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(commands::run(cli)).into(),
        Err(error) => {
            tracing::error!("the program cannot start: {error}");
            ui::report::ExitStatus::Failed.into()
        }
    }
}
