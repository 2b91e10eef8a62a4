//! What the targets have in common: clouds and hosts that say whatever a fuzzer wants, and what must be true of all that comes
//! of it. `README.md` says how to run them.

use std::future::Future;

use tokio::runtime::{Builder, Runtime};

pub mod answers;
#[cfg(feature = "worker")]
pub mod checkpoint;
pub mod cloud;
#[cfg(feature = "worker")]
pub mod corpus;
pub mod host;
pub mod sftp;

/// A runtime whose clock goes on as soon as everybody waits: no patience of the program costs any time.
fn impatient() -> Runtime {
    Builder::new_current_thread().enable_all().start_paused(true).build().expect("a runtime needs nothing")
}

/// Runs `future` in a runtime of its own, which nothing of another input is left in.
fn run<T>(future: impl Future<Output = T>) -> T {
    impatient().block_on(future)
}

/// A terminal would obey nothing in it.
#[track_caller]
fn assert_harmless(text: &str) {
    assert!(!text.chars().any(char::is_control), "a terminal would obey this: {text:?}");
}
