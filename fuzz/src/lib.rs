//! Shared code of the targets: clouds and hosts with given answers, and checks of the results.
//! `README.md` says how to run them.

use std::future::Future;

use tokio::runtime::{Builder, Runtime};

#[cfg(feature = "worker")]
pub mod checkpoint;
pub mod cloud;
#[cfg(feature = "worker")]
pub mod corpus;
pub mod host;
pub mod responses;
pub mod sftp;

/// A runtime whose clock advances when all tasks wait, so waits take no time.
fn impatient() -> Runtime {
    Builder::new_current_thread().enable_all().start_paused(true).build().expect("a runtime needs nothing")
}

/// Runs `future` in a new runtime, without state of other inputs.
fn run<T>(future: impl Future<Output = T>) -> T {
    impatient().block_on(future)
}

/// The text has no control characters for a terminal.
#[track_caller]
fn assert_harmless(text: &str) {
    assert!(!text.chars().any(char::is_control), "a terminal would obey this: {text:?}");
}
