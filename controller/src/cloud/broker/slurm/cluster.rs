//! The login node: scripts run there, and the last snapshot of the queue.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex as Lock};
use std::time::Duration;

use tokio::sync::{Mutex, OnceCell};
use tokio::time::{Instant, sleep_until};

use super::queue::{self, Snapshot};
use super::{Kind, error};
use crate::cloud::broker::{BrokerError, SshEndpoint, wire};
use crate::cloud::http::Explain;
use crate::host::transport::program::OpenSsh;
use crate::host::transport::quote::quote;
use crate::host::transport::{Transport, TransportError, TransportErrorKind};
use crate::secret::Secret;
use crate::text::{clean, clean_lines};

/// Time limit of a script. A busy controller of Slurm answers late.
const LIMIT: Duration = Duration::from_secs(100);
/// Separates an answer from greetings that login shells print.
const MARK: &str = "\n@outliers@\n";
/// Variable with the token, for scripts that get one.
pub(super) const TOKEN: &str = "token";
/// Folder of all leases, below the scratch folder.
const FOLDER: &str = "outliers-jobs";

/// Prints the cluster's own name, if Slurm's controller answers.
const NAME: &str = r#"limited() { if command -v timeout > /dev/null 2>&1; then timeout 20 "$@"; else "$@"; fi; }
echo "@cluster $(limited scontrol show config 2> /dev/null | sed -n 's/^ClusterName *= *//p')""#;

/// Who we are there.
#[derive(Clone, Debug)]
pub(super) struct Login {
    pub(super) user: String,
    home: String,
    /// Slurm's name of the cluster; empty where it does not tell.
    cluster: String,
}

/// One cluster, shared by all runs.
pub(super) struct Cluster {
    ssh: OpenSsh,
    scratch: Option<String>,
    /// Minimum time between two snapshots of the queue.
    interval: Duration,
    explain: Option<Explain>,
    login: OnceCell<Login>,
    login_endpoint: OnceCell<Option<SshEndpoint>>,
    cached: Mutex<Option<CachedSnapshot>>,
    /// Whether a job was submitted or ended since the last snapshot.
    changed: AtomicBool,
    latest: Lock<Option<Arc<Snapshot>>>,
}

/// Time and result of the last snapshot; `None` while it is unknown.
type CachedSnapshot = (Instant, Option<Result<Arc<Snapshot>, BrokerError>>);

impl Cluster {
    pub(super) fn new(ssh: OpenSsh, scratch: Option<String>, interval: Duration, explain: Option<Explain>) -> Self {
        Self {
            ssh,
            scratch,
            interval,
            explain,
            login: OnceCell::new(),
            login_endpoint: OnceCell::new(),
            cached: Mutex::default(),
            changed: AtomicBool::new(false),
            latest: Lock::default(),
        }
    }

    pub(super) fn ssh(&self) -> &OpenSsh {
        &self.ssh
    }

    /// The output of a successful script on the login node. `lost` is the error kind if the answer
    /// is lost.
    pub(super) async fn ask(&self, script: &str, lost: Kind) -> Result<String, BrokerError> {
        self.ask_with(None, script, lost).await
    }

    /// As [`Self::ask`], with a token in the script's variable [`TOKEN`], which no other program
    /// sees.
    pub(super) async fn ask_with(
        &self,
        token: Option<&Secret>,
        script: &str,
        lost: Kind,
    ) -> Result<String, BrokerError> {
        let token = token.map_or_else(String::new, |token| format!("{TOKEN}={}\n", quote(token.expose())));
        let text = format!(
            "{token}LC_ALL=C SLURM_TIME_FORMAT=%s\nexport LC_ALL SLURM_TIME_FORMAT\n\
             {{\nprintf '\\n@outliers@\\n'\n{script}\n}} < /dev/null\n"
        );
        if let Some(explain) = &self.explain {
            explain(&format!("slurm: sh -s\n{}", clean_lines(script)));
        }
        let out = self.ssh.exec("sh -s", text.as_bytes(), LIMIT).await.map_err(|failed| not_reached(failed, lost))?;
        let stdout = String::from_utf8_lossy(&out.stdout).into_owned();
        let stderr = clean(&out.stderr, 300);
        if let Some(explain) = &self.explain {
            explain(&format!("slurm: status {:?}\n{}{stderr}", out.status, clean_lines(&stdout)));
        }
        let Some((_, answer)) = stdout.split_once(MARK) else {
            return Err(error(Kind::Unavailable, format!("the login node does not run shell scripts: {stderr}")));
        };
        match out.status {
            Some(0) => Ok(answer.to_owned()),
            // The script may have done a part of its work.
            status => {
                let status = status.map_or("a signal".to_owned(), |status| format!("status {status}"));
                Err(error(lost, format!("{status}: {}", hint(&stderr))))
            }
        }
    }

    pub(super) async fn login(&self) -> Result<&Login, BrokerError> {
        let ask = || async {
            let script = format!("echo \"@user $(id -un)\"; echo \"@home $HOME\"\n{NAME}");
            let answer = self.ask(&script, Kind::Unavailable).await?;
            let of = |key| queue::field(&answer, key).unwrap_or_default().to_owned();
            let (user, home) = (of("user"), of("home"));
            let plain = |text: &str| !text.is_empty() && !text.chars().any(char::is_control);
            if !plain(&user) || user.starts_with('-') || !home.starts_with('/') || !plain(&home) {
                return Err(error(Kind::Unavailable, "the login node does not tell user and home folder".to_owned()));
            }
            let is_word = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
            let cluster = Some(of("cluster")).filter(|name| is_word(name)).unwrap_or_default();
            Ok(Login { user, home, cluster })
        };
        self.login.get_or_try_init(ask).await
    }

    /// Slurm's name of the cluster, as far as it is known yet; empty where it is not.
    pub(super) fn name(&self) -> &str {
        self.login.get().map_or("", |login| login.cluster.as_str())
    }

    /// Absolute path of the folder in which the leases' folders lie.
    pub(super) async fn root(&self) -> Result<String, BrokerError> {
        let home = &self.login().await?.home;
        Ok(match self.scratch.as_deref() {
            Some(path) if path.starts_with('/') => format!("{}/{FOLDER}", path.trim_end_matches('/')),
            Some(path) => format!("{home}/{}/{FOLDER}", path.trim_matches('/')),
            None => format!("{home}/{FOLDER}"),
        })
    }

    /// The login node's address, for people.
    pub(super) async fn login_endpoint(&self, host: &str) -> SshEndpoint {
        let find = || async {
            let (user, name, port) = self.ssh.resolve().await?;
            wire::endpoint(&user, &name, port)
        };
        let named = || SshEndpoint { host: clean(host.as_bytes(), 80), port: 22, user: String::new() };
        self.login_endpoint.get_or_init(find).await.clone().unwrap_or_else(named)
    }

    /// A snapshot of the queue and the leases' folders, taken after the last change by this
    /// process. `squeue` runs once per interval for all callers; a failure counts as an answer.
    pub(super) async fn snapshot(&self) -> Result<Arc<Snapshot>, BrokerError> {
        let mut cached = self.cached.lock().await;
        if let Some((at, seen)) = &*cached {
            let next = *at + self.interval;
            if Instant::now() < next {
                match seen {
                    Some(seen) if !self.changed.load(Ordering::Relaxed) => return seen.clone(),
                    _ => sleep_until(next).await,
                }
            }
        }
        let root = self.root().await?;
        self.changed.store(false, Ordering::Relaxed);
        // A cancelled snapshot counts for the interval.
        *cached = Some((Instant::now(), None));
        let answer = self.ask(&queue::snapshot_script(&root, self.name(), self.interval), Kind::Unavailable).await;
        let earlier = self.latest();
        let seen = answer.and_then(|answer| Snapshot::read(&answer)).map(|mut snapshot| {
            if let Some(earlier) = &earlier {
                snapshot.remember(earlier);
            }
            Arc::new(snapshot)
        });
        if let Ok(snapshot) = &seen {
            *self.latest.lock().expect("nothing panics while it is held") = Some(snapshot.clone());
        }
        *cached = Some((Instant::now(), Some(seen.clone())));
        seen
    }

    /// Invalidates the last snapshot.
    pub(super) fn changed(&self) {
        self.changed.store(true, Ordering::Relaxed);
    }

    /// The last snapshot, however old.
    pub(super) fn latest(&self) -> Option<Arc<Snapshot>> {
        self.latest.lock().expect("nothing panics while it is held").clone()
    }

    /// The id of a job in the last snapshot.
    pub(super) fn seen(&self, tag: &str) -> Option<String> {
        self.latest()?.number(tag)
    }

    /// The folder of a lease, quoted for a shell.
    pub(super) async fn lease(&self, tag: &str) -> Result<String, BrokerError> {
        Ok(quote(&format!("{}/{tag}", self.root().await?)))
    }
}

/// Without a connection nothing was executed.
fn not_reached(failed: TransportError, lost: Kind) -> BrokerError {
    use TransportErrorKind as T;
    let kind = match failed.kind {
        T::AuthFailed | T::HostKeyChanged => Kind::Auth,
        T::Refused | T::Unreachable | T::NoChannel | T::Local => Kind::Unavailable,
        T::Reset | T::Gone | T::TimedOut | T::NoSpace | T::Remote => lost,
    };
    error(kind, failed.message)
}

/// The remedy for common errors.
fn hint(stderr: &str) -> String {
    let lower = stderr.to_lowercase();
    let more = if lower.contains("not found") {
        " (Slurm's commands are not in the PATH of a login without a terminal)"
    } else if lower.contains("quota exceeded") {
        " (the quota of the scratch folder is full)"
    } else if lower.contains("munge") {
        " (the cluster's munge is down: its administrators know)"
    } else {
        ""
    };
    format!("{stderr}{more}")
}
