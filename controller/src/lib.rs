//! The controller: rents, pushes, follows, brings home, ends.
//!
//! What was typed ([`cli`]), what it means ([`settings`]), what it does ([`commands`]). A run's
//! life is a pure state machine ([`run`]), recorded event by event ([`ledger`]), driven by one
//! loop ([`deploy`]) and compared with the clouds' lists ([`reconcile`]). [`clouds`] are
//! [`broker`]s side by side, reached over [`http`]; what they [`offer`] is chosen from through
//! [`market`]; a rented machine is a [`host`], spoken to over a [`transport`]. Everything that
//! happens is an event; [`report`] makes sentences of them. A [`survey`] is many runs at once;
//! where everything stands ([`status`]) is told as a table, or as a document for whoever carries on
//! ([`handoff`]). What came home is put side by side by [`compare`].

pub mod broker;
pub mod broker_error;
pub mod calendar;
pub mod cli;
pub mod clouds;
pub mod commands;
pub mod compare;
pub mod deploy;
pub mod estimate;
pub mod files;
pub mod gpu;
pub mod handoff;
pub mod host;
pub mod http;
pub mod keys;
pub mod ledger;
pub mod local_worker;
pub mod market;
pub mod model_name;
pub mod offer;
pub mod output;
pub mod reconcile;
pub mod report;
pub mod run;
pub mod secret;
pub mod settings;
pub mod status;
pub mod survey;
pub mod text;
pub mod transport;
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
            report::ExitStatus::Failed.into()
        }
    }
}
