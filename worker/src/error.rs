//! Errors with the failure kinds of the protocol. Every error states what failed, where, and what
//! to do.

use std::io;
use std::path::Path;

use outliers_protocol::{Failure, FailureKind};

/// Result with this crate's error.
pub type Result<T, E = WorkerError> = std::result::Result<T, E>;

/// Maximum characters of a message or a hint.
const LONGEST: usize = 4000;

/// A failure that ends a run: a kind for programs, a message and a hint for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct WorkerError {
    kind: FailureKind,
    message: String,
    hint: Option<String>,
}

/// One constructor per kind.
macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $kind:ident),* $(,)?) => {
        $($(#[$doc])* pub fn $name(message: impl Into<String>) -> Self { Self::new(FailureKind::$kind, message) })*
    };
}

impl WorkerError {
    /// An error of `kind`, without a hint.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: printable(&message.into(), LONGEST), hint: None }
    }

    constructors! {
        /// The job or an option is wrong.
        job => Job,
        /// Unknown model or revision.
        model_not_found => ModelNotFound,
        /// The hub wants a token, or the token has no access.
        model_gated => ModelGated,
        /// The architecture, or a setting of it, is unsupported.
        unsupported => Unsupported,
        /// Files missing, damaged, or not what the architecture expects.
        checkpoint => Checkpoint,
        /// No text, or too little.
        corpus => Corpus,
        /// No such device, or it failed.
        device => Device,
        /// Disk full or unreadable.
        storage => Storage,
        /// The hub is unreachable or answered with errors.
        network => Network,
        /// A broken invariant of this program.
        internal => Internal,
    }

    /// The failure of `action` (a verb: "read", "create") on `path`; kind `Storage`.
    pub fn io(action: &str, path: impl AsRef<Path>, error: &io::Error) -> Self {
        let storage = Self::storage(format!("cannot {action} {}: {error}", path.as_ref().display()));
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                storage.hint("free some space, or ask for an instance with a larger disk (`--min-disk`)")
            }
            io::ErrorKind::PermissionDenied => storage.hint("check the permissions of that path"),
            _ => storage,
        }
    }

    /// Adds a hint, replacing an earlier one.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(printable(&hint.into(), LONGEST));
        self
    }

    /// Puts `context` and a colon before the message; kind and hint stay.
    #[must_use]
    pub fn context(mut self, context: impl std::fmt::Display) -> Self {
        self.message = printable(&format!("{context}: {}", self.message), LONGEST);
        self
    }

    /// Kind of the failure, for programs.
    pub fn kind(&self) -> FailureKind {
        self.kind
    }

    /// The message: what went wrong, and where.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The hint: what to do about it, if known.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

/// Sanitises text from a server or a file for a message: at most `limit` characters, no control
/// characters for terminals or text direction, white space as a space.
pub fn printable(text: &str, limit: usize) -> String {
    let turns = |c| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let plain = text.chars().map(|c| if c.is_whitespace() { ' ' } else { c }).filter(|&c| !c.is_control() && !turns(c));
    let mut chars = plain.peekable();
    let mut out: String = chars.by_ref().take(limit).collect();
    if chars.peek().is_some() {
        out.push('…');
    }
    out
}

/// The first five names, and how many more there are.
pub fn listed(names: impl IntoIterator<Item = impl std::fmt::Display>) -> String {
    const SHOWN: usize = 5;
    let names: Vec<String> = names.into_iter().map(|name| name.to_string()).collect();
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// The failure as stored in the manifest.
impl From<WorkerError> for Failure {
    fn from(error: WorkerError) -> Self {
        Self { kind: error.kind, message: error.message, hint: error.hint }
    }
}

/// For input and output without a path (pipes, standard output). With a path, use
/// [`WorkerError::io`].
impl From<io::Error> for WorkerError {
    fn from(error: io::Error) -> Self {
        Self::storage(error.to_string())
    }
}

/// Candle fails if an allocation, a kernel or a shape fails. The first two are device errors, the
/// last is internal.
impl From<candle_core::Error> for WorkerError {
    fn from(error: candle_core::Error) -> Self {
        use candle_core::Error as E;
        match error {
            E::Cuda(_) | E::Metal(_) | E::NotCompiledWithCudaSupport | E::NotCompiledWithMetalSupport => {
                Self::device(error.to_string())
            }
            other => Self::internal(format!("tensor arithmetic failed: {other}")),
        }
    }
}

/// Adds an action and a path to `std::io` errors.
pub trait IoContext<T> {
    /// `cannot {action} {path}: ...`, kind `Storage`.
    fn at(self, action: &str, path: impl AsRef<Path>) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, action: &str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|error| WorkerError::io(action, path, &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_disk_error_has_a_hint() {
        let error = WorkerError::io("write", "/data/x", &io::Error::from(io::ErrorKind::StorageFull));
        assert_eq!(error.kind(), FailureKind::Storage);
        assert!(error.message().starts_with("cannot write /data/x: "));
        assert!(error.hint_text().is_some_and(|hint| hint.contains("disk")));
    }

    #[test]
    fn foreign_text_in_errors_is_sanitised_and_bounded() {
        let stranger = "\u{1b}[2J\u{202e}x\ny\0";
        let error = WorkerError::unsupported(format!("activation {stranger}")).hint(stranger).context(stranger);
        assert_eq!(error.message(), "[2Jx y: activation [2Jx y");
        assert_eq!(error.hint_text(), Some("[2Jx y"));
        let long = WorkerError::unsupported("é".repeat(1_000_000));
        assert_eq!(long.message().chars().count(), LONGEST + 1);
        assert_eq!((printable("abc", 3), printable("abcd", 3)), ("abc".to_owned(), "abc…".to_owned()));
    }

    #[test]
    fn long_lists_end_with_the_remaining_count() {
        assert_eq!(listed(["a"]), "a");
        assert_eq!(listed(["a", "b", "c", "d", "e"]), "a, b, c, d, e");
        assert_eq!(listed(0..8), "0, 1, 2, 3, 4 and 3 more");
    }

    #[test]
    fn context_keeps_kind_and_hint() {
        let error = WorkerError::checkpoint("header too long").hint("fetch it again").context("model.safetensors");
        let failure = Failure::from(error);
        assert_eq!(failure.kind, FailureKind::Checkpoint);
        assert_eq!(failure.message, "model.safetensors: header too long");
        assert_eq!(failure.hint.as_deref(), Some("fetch it again"));
    }
}
