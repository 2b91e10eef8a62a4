//! The controller: rents an instance, pushes the worker, follows it, fetches the results, ends the
//! rental.
//!
//! Its rooms, which use each other in no circle:
//!
//! - [`host`]: a rented host, reached over a [`transport`](host::transport).
//! - [`cloud`]: [`broker`](cloud::broker)s side by side ([`clouds`](cloud::clouds)), reached over
//!   [`http`](cloud::http); their offers form a [`market`](cloud::market).
//! - [`run`]: the life of a run as a pure state machine, recorded event by event
//!   ([`ledger`](run::ledger)), driven by one loop ([`deploy`](run::deploy)) and compared with the
//!   clouds' lists ([`reconcile`](run::reconcile)).
//! - [`survey`]: many runs at once.
//! - [`cli`]: what was typed, and what it means ([`settings`](cli::settings)).
//! - [`ui`]: [`report`](ui::report) makes sentences of all events; where everything stands
//!   ([`status`](ui::status)) is told as a table or as a document ([`handoff`](ui::handoff)).
//! - [`compare`]: results side by side.
//! - [`commands`]: one file per command.
//!
//! Beside them lie helpers that every room may use.

pub mod calendar;
pub mod cli;
pub mod cloud;
pub mod commands;
pub mod compare;
pub mod files;
pub mod host;
pub mod model_name;
pub mod run;
pub mod secret;
pub mod survey;
pub mod text;
pub mod ui;
pub mod units;
pub mod waiting;

use std::process::ExitCode;

use clap::Parser;

/// Parses the arguments, does what they say, and returns the documented exit code.
pub fn main_impl() -> ExitCode {
    let cli = cli::Cli::parse();
    let level = if cli.global.verbose { tracing::Level::INFO } else { tracing::Level::WARN };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        // A terminal that is gone must end nothing here.
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
