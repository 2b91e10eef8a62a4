//! Hosts and lines that misbehave: real OpenSSH servers behind bad lines, and servers that lie.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod hostile;
mod rogue;
mod scene;
mod session;
mod upload;
