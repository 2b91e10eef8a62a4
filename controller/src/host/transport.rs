//! Running commands and moving files on one host. Knows no broker and no run.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, fs, io};

use async_trait::async_trait;
use rand::Rng;
use serde::{Deserialize, Serialize};

pub mod local;
pub mod program;
pub mod quote;
mod scripts;
pub mod ssh;

/// Where a host's SSH server listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshEndpoint {
    /// Host name or address.
    pub host: String,
    /// TCP port; 0: none listens, and the broker has a way of its own.
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

/// A host we can command.
#[async_trait]
pub trait Transport: Send + Sync {
    /// Runs a shell command, feeding it `stdin`, and waits for it to end.
    async fn exec(&self, command: &str, stdin: &[u8], limit: Duration) -> Result<ExecOutput, TransportError>;

    /// Sends parts of a large file. What lies between them on the host stays, so that an upload
    /// that broke off can go on.
    async fn send(&self, what: &SendRequest<'_>) -> Result<(), TransportError>;

    /// Writes a small file: to a temporary name beside `remote`, synced, then renamed over it. The
    /// folder must exist. Its content never appears in a command line.
    async fn put_bytes(&self, content: &[u8], remote: &str, mode: u32) -> Result<(), TransportError>;

    /// Downloads a file of at most `limit` bytes to a temporary name beside `local`, synced, then
    /// renamed over it.
    async fn get(&self, remote: &str, local: &Path, limit: u64) -> Result<u64, TransportError>;

    /// The bytes of a remote file from `offset`, at most `limit` of them; empty at or past its
    /// end; `None` if there is no such file.
    async fn read_from(&self, remote: &str, offset: u64, limit: u64) -> Result<Option<Vec<u8>>, TransportError>;
}

/// Parts of a local file that are to lie in a remote one, at the same offsets.
pub struct SendRequest<'a> {
    /// The file here.
    pub local: &'a Path,
    /// The file there; made, private to its owner, if there is none. Neither synced nor compared:
    /// whoever uses it does.
    pub remote: &'a str,
    /// Byte ranges, in order; each starts at a multiple of 64 KiB.
    pub parts: &'a [Range<u64>],
    /// Is told how many bytes of the parts are acknowledged so far.
    pub progress: &'a (dyn Fn(u64) + Send + Sync),
}

/// What a command left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecOutput {
    /// Exit status; `None` when a signal ended the command: unknown, never success.
    /// A connection that breaks before the status arrives is [`TransportErrorKind::Reset`].
    pub status: Option<i32>,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

/// Why a host could not be commanded.
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

/// Kinds of transport failure, told apart because each has another cure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransportErrorKind {
    /// Nobody listens there (yet).
    Refused,
    /// No answer, no route, name unknown.
    Unreachable,
    /// The server knows us not: wrong key or user.
    AuthFailed,
    /// The host's key is not the pinned one.
    HostKeyChanged,
    /// The connection broke off.
    Reset,
    /// What was there has ended.
    Gone,
    /// It took too long.
    TimedOut,
    /// The server opens no further channel, not even for one thing at a time.
    NoChannel,
    /// No space left on the host.
    NoSpace,
    /// The host answered with an error of another kind.
    Remote,
    /// Something on this side.
    Local,
}

impl TransportErrorKind {
    /// Whether trying again, within a deadline, can help.
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
    let mut part = path.as_os_str().to_owned();
    part.push(format!(".part.{:08x}", rand::rng().random::<u32>()));
    part.into()
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
