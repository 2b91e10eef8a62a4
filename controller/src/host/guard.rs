//! The guard on the host. It outlives the worker and the controller, and ends both worker and
//! instance when its timeouts pass.
//!
//! The guard is a shell script in its own session. The controller renews the guard's lease while
//! it is connected. The guard stops the worker and terminates the instance when the lease expires,
//! when the run's time is up, or when nobody fetches the files of a worker that has ended. It
//! terminates the instance through the cloud's API
//! ([`Broker::self_destruct`](crate::cloud::broker::Broker::self_destruct)). It never powers the
//! machine off: clouds without such an API bill a stopped machine like a running one, and its
//! results would be out of reach.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::launch::PROCESS;
use super::retry::again;
use super::{HostError, RemoteHost, SHORT, TIMEOUT};
use crate::host::transport::quote::quote;

const SCRIPT: &str = include_str!("guard.sh");
/// Maximum seconds between two checks by the guard.
const LONGEST_PAUSE: u64 = 15;
/// Maximum seconds between two renewals.
const LONGEST_RENEWAL: u64 = 60;

/// Timeouts after which the guard ends an instance. 0: never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardTimeouts {
    /// Seconds without a renewal by the controller.
    pub lease_s: u64,
    /// Seconds after the worker's end without a fetch of its files.
    pub unclaimed_s: u64,
}

impl GuardTimeouts {
    /// For an instance that is kept: only its time limit ends it.
    pub const NEVER: Self = Self { lease_s: 0, unclaimed_s: 0 };

    /// The shorter of those that are set, in seconds.
    pub fn shortest(self) -> u64 {
        [self.lease_s, self.unclaimed_s].into_iter().filter(|s| *s > 0).min().unwrap_or(u64::MAX)
    }
}

/// Configuration of a guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuardConfig {
    /// Timeouts without a controller.
    pub watch: GuardTimeouts,
    /// Remaining time of the run by the local clock, since the host's may be wrong.
    pub left: Duration,
    /// The script with which the instance terminates itself, if its cloud has one.
    pub end_itself: Option<&'static str>,
}

impl GuardConfig {
    /// Interval of lease renewals.
    pub fn renewal(&self) -> Duration {
        Duration::from_secs((self.watch.shortest() / 6).clamp(1, LONGEST_RENEWAL))
    }
}

impl RemoteHost {
    /// Installs a run's guard and starts it unless one is running. A new configuration replaces
    /// the old one.
    pub async fn guard(&self, run: &str, config: &GuardConfig) -> Result<(), HostError> {
        let folder = self.run_folder(run).await?;
        let at = |name: &str| format!("{folder}/{name}");
        let script = format!("{PROCESS}\n{SCRIPT}");
        again!(TIMEOUT, &|_| {}, self.sh(&format!("umask 077; mkdir -p {}", quote(&folder)), SHORT));
        again!(TIMEOUT, &|_| {}, self.place(script.as_bytes(), &at("guard.sh")));
        if let Some(end) = config.end_itself {
            again!(TIMEOUT, &|_| {}, self.place(end.as_bytes(), &at("guard.end.sh")));
        }
        let GuardTimeouts { lease_s, unclaimed_s } = config.watch;
        let pause = (config.watch.shortest() / 8).clamp(1, LONGEST_PAUSE);
        let write = format!(
            "{PROCESS}\ncd {} || exit 1\numask 077\n\
             echo \"ends=$(($(ticks) + {})) lease={lease_s} unclaimed={unclaimed_s} pause={pause}\" > guard.terms.part\n\
             mv -f guard.terms.part guard.terms",
            quote(&folder),
            config.left.as_secs(),
        );
        again!(TIMEOUT, &|_| {}, self.sh(&write, SHORT));
        self.renew_guard(run).await
    }

    async fn place(&self, bytes: &[u8], path: &str) -> Result<(), HostError> {
        Ok(self.transport.put_bytes(bytes, path, 0o600).await?)
    }

    /// Renews the guard's lease. Starts a guard if none is running.
    pub async fn renew_guard(&self, run: &str) -> Result<(), HostError> {
        let folder = self.run_folder(run).await?;
        let script = format!(
            "{PROCESS}\ncd {} || exit 1\numask 077\nticks > guard.lease.part && mv -f guard.lease.part guard.lease\n\
             alive guard.pid && exit 0\n\
             if command -v setsid > /dev/null 2>&1; then setsid sh ./guard.sh \"$PWD\" < /dev/null > /dev/null 2>&1 &\n\
             else set -m; nohup sh ./guard.sh \"$PWD\" < /dev/null > /dev/null 2>&1 & fi\n\
             i=0; while ! alive guard.pid && [ $i -lt 50 ]; do i=$((i + 1)); sleep 0.1 2> /dev/null || sleep 1; done\n\
             alive guard.pid",
            quote(&folder),
        );
        again!(TIMEOUT, &|_| {}, self.sh(&script, SHORT));
        Ok(())
    }
}
