//! External effects of a run as traits, with a real and a fake implementation each.

use async_trait::async_trait;
use outliers_protocol::{FileBytes, JobSpec, Manifest};
use std::path::Path;
use tokio::time::Instant;

use super::StartThrottle;
use crate::cloud::broker::{GpuRequest, InstanceTransport, Offer, SshEndpoint};
use crate::cloud::clouds::{BadHosts, Clouds};
use crate::host::{GuardConfig, HostError, HostFacts, JobStatus, OnEvent};
use crate::run::Pin;
use crate::secret::Secret;

/// External dependencies of a run.
#[derive(Clone, Copy)]
pub struct Ports<'a> {
    /// The clouds.
    pub clouds: &'a Clouds,
    /// Unfit machines.
    pub bad_hosts: &'a BadHosts,
    /// Access to rented hosts.
    pub hosts: &'a dyn Hosts,
    /// Environment of the worker only: name and value of each variable.
    pub secrets: &'a [(&'static str, Secret)],
    /// Spaces the starts of several runs' workers; `None` for a single run.
    pub start_throttle: Option<&'a StartThrottle>,
}

/// Access to rented hosts.
#[async_trait]
pub trait Hosts: Send + Sync {
    /// The run's SSH key in `folder`, created if missing. Returns the public half as a line of
    /// `authorized_keys`.
    fn key(&self, folder: &Path) -> Result<String, HostError>;

    /// Checks that the current worker program supports the requested GPUs. It may have been
    /// replaced since the run was planned.
    fn serve(&self, want: &GpuRequest) -> Result<(), HostError>;

    /// Removes the run's key and other files of an active run. Missing files count as success.
    fn forget(&self, folder: &Path) -> Result<(), HostError>;

    /// Connects, with retries until `deadline`. The host must present `pin`, if given. Returns the
    /// presented key.
    async fn reach(
        &self,
        endpoint: &SshEndpoint,
        folder: &Path,
        pin: Option<&Pin>,
        deadline: Instant,
        on: OnEvent<'_>,
    ) -> Result<(Box<dyn Host>, Pin), HostError>;

    /// The host behind a cloud's own transport, which connects on demand. `folder` is the run's.
    fn over(&self, access: InstanceTransport, folder: &Path) -> Box<dyn Host>;
}

/// A connected host. Every method can be repeated after a failure or a crash.
#[async_trait]
pub trait Host: Send + Sync {
    /// Probes the machine. Fails if it differs from the rented one, or if the job needs the hub
    /// and the machine does not reach it.
    async fn probe(&self, offer: &Offer, want: &GpuRequest, asks_the_hub: bool) -> Result<HostFacts, HostError>;

    /// Starts the run's guard unless it runs, and renews its lease while this value lives.
    async fn guard(&self, run: &str, config: &GuardConfig) -> Result<(), HostError>;

    /// Pushes the worker unless it is there.
    async fn push_worker(&self, on: OnEvent<'_>) -> Result<(), HostError>;

    /// Pushes a file or folder under `name` for the run's worker. Returns its path for the worker.
    async fn push(&self, run: &str, local: &Path, name: &str, on: OnEvent<'_>) -> Result<String, HostError>;

    /// Starts the worker, detached. A second call starts nothing.
    async fn launch(&self, run: &str, job: &JobSpec, secrets: &[(&'static str, Secret)]) -> Result<(), HostError>;

    /// Restarts a worker that died, with its files. A worker that runs, or ended regularly, is
    /// left alone.
    async fn restart(&self, run: &str, secrets: &[(&'static str, Secret)]) -> Result<(), HostError>;

    /// The state of the worker.
    async fn status(&self, run: &str) -> Result<JobStatus, HostError>;

    /// Reports the worker's output until it has ended.
    async fn follow(&self, run: &str, on: OnEvent<'_>) -> Result<JobStatus, HostError>;

    /// Fetches the worker's files into the local folder `into`, limited to the names and sizes of
    /// `expected`. Returns the manifest, if there is one.
    async fn fetch(
        &self,
        run: &str,
        into: &Path,
        expected: &[FileBytes],
        on: OnEvent<'_>,
    ) -> Result<Option<Manifest>, HostError>;

    /// Ends the worker. A worker that has ended counts as success.
    async fn stop_worker(&self, run: &str) -> Result<(), HostError>;
}
