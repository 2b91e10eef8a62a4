//! Runs commands and moves files on one host. Independent of brokers and runs.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, fs, io};

use async_trait::async_trait;
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::files::beside;

pub mod local;
pub mod program;
pub mod quote;
mod scripts;
pub mod ssh;

/// Address and login of a host's SSH server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshEndpoint {
    /// Host name or address.
    pub host: String,
    /// TCP port; 0: no server listens, and the broker uses another transport.
    pub port: u16,
    /// User to log in as.
    pub user: String,
}

impl fmt::Display for SshEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            0 => write!(f, "{}@{}", self.user, self.host),
            port => write!(f, "{}@{}:{port}", self.user, self.host),
        }
    }
}

/// Commands and files on one host.
#[async_trait]
pub trait Transport: Send + Sync {
    /// Runs a shell command with `stdin` as its input and waits for its end.
    async fn exec(&self, command: &str, stdin: &[u8], limit: Duration) -> Result<ExecOutput, TransportError>;

    /// Sends parts of a large file. The rest of the remote file is unchanged, so that an
    /// interrupted upload can resume.
    async fn send(&self, what: &SendRequest<'_>) -> Result<(), TransportError>;

    /// Writes a small file: to a temporary name beside `remote`, synced, then renamed over it. The
    /// folder must exist. The content never appears on a command line.
    async fn put_bytes(&self, content: &[u8], remote: &str, mode: u32) -> Result<(), TransportError>;

    /// Downloads a file of at most `limit` bytes: to a temporary name beside `local`, synced, then
    /// renamed over it.
    async fn get(&self, remote: &str, local: &Path, limit: u64) -> Result<u64, TransportError>;

    /// Reads at most `limit` bytes of a remote file from `offset`. Empty at or past its end;
    /// `None` if the file does not exist.
    async fn read_from(&self, remote: &str, offset: u64, limit: u64) -> Result<Option<Vec<u8>>, TransportError>;
}

/// Parts of a local file to write at the same offsets of a remote file.
pub struct SendRequest<'a> {
    /// The local file.
    pub local: &'a Path,
    /// The remote file, created with mode 0600 if missing. It is neither synced nor verified; the
    /// caller does both.
    pub remote: &'a str,
    /// Byte ranges, ascending; each starts at a multiple of 64 KiB.
    pub parts: &'a [Range<u64>],
    /// Called with the number of bytes acknowledged so far.
    pub progress: &'a (dyn Fn(u64) + Send + Sync),
}

/// Output of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecOutput {
    /// Exit status; `None` if a signal ended the command. A connection that breaks before the
    /// status arrives is the error [`TransportErrorKind::Reset`].
    pub status: Option<i32>,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

/// An error of a transport.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct TransportError {
    /// What a caller may do about it.
    pub kind: TransportErrorKind,
    /// What happened, and where.
    pub message: String,
}

impl TransportError {
    /// An error of this kind.
    pub fn new(kind: TransportErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// Kinds of transport failure, distinguished by their remedy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransportErrorKind {
    /// No server listens on the port, perhaps not yet.
    Refused,
    /// No answer, no route, or unknown host name.
    Unreachable,
    /// The server refused the login: wrong key or user.
    AuthFailed,
    /// The host's key is not the pinned one.
    HostKeyChanged,
    /// The connection broke off.
    Reset,
    /// The instance or job has ended.
    Gone,
    /// The time limit was exceeded.
    TimedOut,
    /// The server does not open a channel, even with no other open.
    NoChannel,
    /// No space left on the host.
    NoSpace,
    /// The host answered with an error of another kind.
    Remote,
    /// A local error.
    Local,
}

impl TransportErrorKind {
    /// Whether a retry within a deadline can help.
    pub fn is_transient(self) -> bool {
        matches!(self, Self::Refused | Self::Unreachable | Self::Reset | Self::Gone | Self::TimedOut)
    }
}

/// A failure of this machine's file system.
fn local_error(path: &Path, error: &io::Error) -> TransportError {
    TransportError::new(TransportErrorKind::Local, format!("{}: {error}", path.display()))
}

/// A temporary name beside a file of this machine.
fn part_beside(path: &Path) -> PathBuf {
    beside(path, &format!(".part.{:08x}", rand::rng().random::<u32>()))
}

/// Renames a file that was downloaded to `part`, or removes what has come of it.
fn settle(part: &Path, local: &Path, got: Result<u64, TransportError>) -> Result<u64, TransportError> {
    let got = got.and_then(|bytes| fs::rename(part, local).map(|()| bytes).map_err(|e| local_error(local, &e)));
    if got.is_err() {
        // It may never have come to be.
        let _ = fs::remove_file(part);
    }
    got
}
