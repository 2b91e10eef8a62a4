//! Runs the worker on a rented host: reach, probe, push, launch, follow, fetch.
//!
//! Layout on the host, below its home folder: `.cache/outliers/bin/<sha256>/outliers-worker`
//! (content-addressed; in another folder where the home folder is mounted noexec, see
//! `push/place.rs`), and `outliers/<run>/` with the job, the output files of
//! [`outliers_protocol::files`], the pid file and the exit-code file.
//!
//! Every script is piped to `sh`. The login shell and the length of a command line therefore do
//! not matter, and the script does not appear in the host's process table. Answers are untrusted
//! until checked.

use std::sync::Arc;
use std::time::Duration;

use outliers_protocol::Progress;
use tokio::sync::OnceCell;

use crate::host::transport::{Transport, TransportErrorKind};
use crate::text::clean;

mod bundle;
mod error;
mod fetch;
mod follow;
mod guard;
pub mod keys;
mod launch;
mod names;
pub(crate) mod probe;
mod push;
mod reach;
mod retry;
mod savepoint;
pub mod transport;

pub use error::{HostError, HostErrorKind};
pub use fetch::{Fetched, unfinished};
pub use follow::Cursor;
pub use guard::{GuardConfig, GuardTimeouts};
pub use launch::{JobStatus, Launched};
pub use probe::{GpuFacts, HostFacts, SCRIPT as PROBE};
pub use push::{PushedFolder, RemoteWorker};
pub use reach::reach;
pub use savepoint::Stamp;

/// Time limit of a short script: connection, three round trips and a slow disk.
const SHORT: Duration = Duration::from_secs(60);
/// Default time for restoring a broken connection.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Separates a script's output from greetings that a login shell prints.
const MARK: &[u8] = b"\n@outliers@\n";

/// Progress of work on a host, for the reporter.
#[derive(Clone, Debug, PartialEq)]
pub enum HostEvent {
    /// Not reachable yet. Another attempt follows.
    Waiting {
        /// The last attempt's failure.
        what: String,
        /// Kind of that failure.
        kind: TransportErrorKind,
        /// Attempts so far.
        attempt: u32,
    },
    /// Logged in.
    Connected,
    /// Facts about the host.
    Probed(HostFacts),
    /// A file or a folder is being uploaded.
    Uploading {
        /// Its name.
        name: String,
        /// Bytes the host has acknowledged.
        sent: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The host has the same file or folder: nothing is sent.
    AlreadyThere {
        /// The name of the file or folder.
        name: String,
    },
    /// The worker was seen running.
    Launched {
        /// Process id of its wrapper on the host.
        pid: u32,
    },
    /// The connection broke. The worker keeps running.
    ConnectionLost {
        /// Cause of the loss.
        why: String,
    },
    /// Connected again.
    Reconnected,
    /// A line of the worker's progress file.
    Progress(Progress),
    /// A line of the progress file that cannot be parsed, shortened.
    BadProgress(String),
    /// A line of the worker's log.
    Log(String),
    /// Position up to which the worker's files have been read and reported.
    Read(Cursor),
    /// Bytes of the log that were skipped because it grows faster than it can be read. The whole
    /// log is fetched at the end.
    LogSkipped(u64),
    /// Bytes of the progress file that were skipped for the same reason.
    ProgressSkipped(u64),
    /// A file is being fetched.
    Fetching {
        /// Its name.
        name: String,
        /// Its size in bytes, 0 if unknown.
        bytes: u64,
    },
}

/// Receives events.
pub type OnEvent<'a> = &'a (dyn Fn(HostEvent) + Send + Sync);

/// A host we can log in to.
pub struct RemoteHost {
    transport: Arc<dyn Transport>,
    name: String,
    home: OnceCell<String>,
}

/// Output of a script, without the login shell's greetings.
struct ScriptOutput {
    status: Option<i32>,
    stdout: Vec<u8>,
    stderr: String,
}

impl RemoteHost {
    /// A host behind a transport. Messages use `name`.
    pub fn new(transport: Arc<dyn Transport>, name: impl Into<String>) -> Self {
        Self { transport, name: name.into(), home: OnceCell::new() }
    }

    /// The transport to the host.
    pub fn transport(&self) -> &Arc<dyn Transport> {
        &self.transport
    }

    /// Absolute path of the login user's home folder.
    pub async fn home(&self) -> Result<&str, HostError> {
        let home = self.home.get_or_try_init(|| async {
            let answer = self.sh("printf '%s' \"$HOME\"", SHORT).await?;
            let text = String::from_utf8(answer.stdout).ok();
            let usable = |home: &String| home.starts_with('/') && !home.chars().any(char::is_control);
            text.filter(usable).ok_or_else(|| self.odd("the path of its home folder is unusable"))
        });
        home.await.map(String::as_str)
    }

    /// Absolute path of a run's folder.
    pub async fn run_folder(&self, run: &str) -> Result<String, HostError> {
        names::check_run(run)?;
        Ok(format!("{}/outliers/{run}", self.home().await?))
    }

    /// Runs a POSIX shell script and fails unless it exits with status 0.
    async fn sh(&self, script: &str, limit: Duration) -> Result<ScriptOutput, HostError> {
        let answer = self.try_sh(script, limit).await?;
        match answer.status {
            Some(0) => Ok(answer),
            Some(status) => Err(self.odd(&format!("a script ended with status {status}: {}", answer.stderr))),
            None => Err(self.odd(&format!("a script was killed: {}", answer.stderr))),
        }
    }

    /// Runs a POSIX shell script and returns its output whatever its exit status. Commands of the
    /// script have an empty standard input.
    async fn try_sh(&self, script: &str, limit: Duration) -> Result<ScriptOutput, HostError> {
        // The braces make the shell read the whole script before it runs any of it.
        let mark = "printf '\\n@outliers@\\n'";
        let script = format!("LC_ALL=C; export LC_ALL\n{{\n{mark}\n{script}\n}} </dev/null\n");
        let out = self.transport.exec("sh -s", script.as_bytes(), limit).await?;
        let stderr = clean(&out.stderr, 500);
        let Some(at) = out.stdout.windows(MARK.len()).position(|w| w == MARK) else {
            let said = clean(&out.stdout, 200);
            return Err(self.odd(&format!("it does not run shell scripts: {said} {stderr}")));
        };
        Ok(ScriptOutput { status: out.status, stdout: out.stdout[at + MARK.len()..].to_vec(), stderr })
    }

    /// An error of kind [`HostErrorKind::Host`].
    fn odd(&self, what: &str) -> HostError {
        HostError::new(HostErrorKind::Host, format!("{}: {what}", self.name))
    }
}

impl ScriptOutput {
    /// Rest of the first line `@<key> ...`; empty if there is none.
    fn field(&self, key: &str) -> String {
        self.fields(key).into_iter().next().unwrap_or_default()
    }

    /// Rests of all lines `@<key> ...`, shortened.
    fn fields(&self, key: &str) -> Vec<String> {
        let lines = self.stdout.split(|b| *b == b'\n');
        let prefix = format!("@{key} ");
        lines.filter_map(|line| line.strip_prefix(prefix.as_bytes())).map(|rest| clean(rest, 4096)).collect()
    }

    fn number(&self, key: &str) -> Option<u64> {
        self.field(key).trim().parse().ok()
    }
}
