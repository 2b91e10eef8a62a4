//! Errors of work on a host.

use std::io;
use std::path::Path;

use crate::host::transport::{TransportError, TransportErrorKind};

/// A failure of the connection or of the host.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct HostError {
    /// What a caller may do about it.
    pub kind: HostErrorKind,
    /// What happened, and where.
    pub message: String,
    /// What a person may do about it.
    pub hint: Option<String>,
}

/// Kinds of failure that callers treat differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostErrorKind {
    /// The host cannot be reached, or the connection could not be restored.
    Connection(TransportErrorKind),
    /// The time limit has passed.
    Deadline,
    /// No space left on the host.
    NoSpace,
    /// The host answered with an error.
    Host,
    /// The host differs from what was rented.
    NotAsRented,
    /// The worker does not run there: wrong processor, missing library.
    WorkerUnfit,
    /// The version of the worker or of its documents differs from this program's.
    WorkerVersion,
    /// Fetched files differ from their manifest, or the manifest is invalid.
    Damaged,
    /// The data exceeds a size limit.
    TooLarge,
    /// The cause is this machine or the request: a full disk, a missing file, an invalid run name.
    /// Another host would fail, too.
    Local,
}

impl HostError {
    /// An error without a hint.
    pub fn new(kind: HostErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None }
    }

    /// A failure of this machine's file system.
    pub(crate) fn local(path: &Path, error: &io::Error) -> Self {
        Self::new(HostErrorKind::Local, format!("{}: {error}", path.display()))
    }

    /// Adds a hint.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Whether a retry within a deadline can help.
    pub fn is_transient(&self) -> bool {
        matches!(self.kind, HostErrorKind::Connection(kind) if kind.is_transient())
    }

    /// Whether another host would fail in the same way.
    pub fn is_here(&self) -> bool {
        self.kind == HostErrorKind::Local
    }
}

impl From<TransportError> for HostError {
    fn from(error: TransportError) -> Self {
        use TransportErrorKind as T;
        let kind = match error.kind {
            T::NoSpace => HostErrorKind::NoSpace,
            T::Remote => HostErrorKind::Host,
            T::Local => HostErrorKind::Local,
            other => HostErrorKind::Connection(other),
        };
        Self { kind, message: error.message, hint: hint_for(error.kind).map(str::to_owned) }
    }
}

fn hint_for(kind: TransportErrorKind) -> Option<&'static str> {
    use TransportErrorKind as T;
    match kind {
        T::Refused => Some("nothing listens on that port: the instance is still starting, or it has no SSH server"),
        T::Unreachable => Some("check the network between here and the instance, and the address the cloud gave"),
        T::AuthFailed => {
            Some("the instance does not know the run's key; check the user name and how the cloud installs keys")
        }
        T::HostKeyChanged => Some("the address may belong to another machine now; end this instance and rent another"),
        T::Reset => {
            Some("the SSH server or a proxy before it hangs up: it may still be starting, or it limits connections")
        }
        T::Gone => Some("list what exists now: outliers instances list"),
        T::TimedOut => Some("the instance or the line is too slow or gone"),
        T::NoChannel => Some("the SSH server allows no session: check MaxSessions in its sshd_config"),
        T::NoSpace => Some("ask for more disk with the next instance, or free some on this one"),
        T::Remote | T::Local => None,
    }
}
