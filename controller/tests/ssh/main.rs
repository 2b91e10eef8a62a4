//! Hosts and links that misbehave: real OpenSSH servers behind bad links, and hostile servers.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod fixture;
mod hostile;
mod lying_server;
mod session;
mod upload;
