//! Why a host could not do what was asked of it.

use crate::host::transport::{TransportError, TransportErrorKind};

/// A failure on the way to a host or on it.
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

/// Kinds of failure a caller may treat differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostErrorKind {
    /// The host could not be reached, or the connection was lost for good.
    Connection(TransportErrorKind),
    /// The time given was over.
    Deadline,
    /// No space left on the host.
    NoSpace,
    /// The host answered with an error of its own.
    Host,
    /// It is not what was rented.
    NotAsRented,
    /// The worker does not run there: wrong processor, missing library.
    WorkerUnfit,
    /// The worker there is of another version, or speaks another one.
    WorkerVersion,
    /// What came from the host is not what its manifest says, or the manifest itself is not to be
    /// trusted.
    Damaged,
    /// More bytes than we are willing to move.
    TooLarge,
    /// The fault is this machine's, or the request's: a full disk, a missing file, a bad run name.
    /// No other host would do.
    Local,
}

impl HostError {
    /// An error without a hint.
    pub fn new(kind: HostErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None }
    }

    /// The same with a hint.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Whether trying again, within a deadline, can help.
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
        T::Gone => Some("see what became of it: outliers instances list"),
        T::TimedOut => Some("the instance or the line is too slow or gone"),
        T::NoChannel => Some("the SSH server allows no session: check MaxSessions in its sshd_config"),
        T::NoSpace => Some("ask for more disk with the next instance, or free some on this one"),
        T::Remote | T::Local => None,
    }
}
