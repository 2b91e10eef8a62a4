//! What a run does to the world, as traits: the real thing and the tests' fakes are two
//! implementations of each.

use async_trait::async_trait;
use outliers_protocol::{FileBytes, JobSpec, Manifest};
use std::path::Path;
use tokio::time::Instant;

use super::StartThrottle;
use crate::cloud::broker::{GpuRequest, Offer, SshEndpoint, Way};
use crate::cloud::clouds::{BadHosts, Clouds};
use crate::host::{GuardConfig, HostError, HostFacts, JobStatus, OnEvent};
use crate::run::Pin;
use crate::secret::Secret;

/// Everything a run needs from outside.
#[derive(Clone, Copy)]
pub struct Ports<'a> {
    /// Where to rent.
    pub clouds: &'a Clouds,
    /// Machines not to rent again.
    pub bad_hosts: &'a BadHosts,
    /// The way to rented hosts.
    pub hosts: &'a dyn Hosts,
    /// Environment of the worker only: name and value of each variable.
    pub secrets: &'a [(&'static str, Secret)],
    /// When each of several runs may start its worker; one alone need not wait.
    pub start_throttle: Option<&'a StartThrottle>,
}

/// The way to rented hosts.
#[async_trait]
pub trait Hosts: Send + Sync {
    /// The run's SSH key below `folder`, made if there is none: the public half as a line of
    /// `authorized_keys`.
    fn key(&self, folder: &Path) -> Result<String, HostError>;

    /// Whether the worker that would be pushed now uses the GPUs that are wanted for it. It may be
    /// another one than when the run was planned.
    fn serve(&self, want: &GpuRequest) -> Result<(), HostError>;

    /// Removes the run's key, and what else only a run that goes on needs. What is gone already is
    /// a success.
    fn forget(&self, folder: &Path) -> Result<(), HostError>;

    /// Connects, again and again until `deadline`. The host must show `pin`, where there is one;
    /// returns the one it showed.
    async fn reach(
        &self,
        endpoint: &SshEndpoint,
        folder: &Path,
        pin: Option<&Pin>,
        deadline: Instant,
        on: OnEvent<'_>,
    ) -> Result<(Box<dyn Host>, Pin), HostError>;

    /// The host at the end of a cloud's own way. Its connection is made when it is needed.
    /// `folder` is the run's.
    fn over(&self, way: Way, folder: &Path) -> Box<dyn Host>;
}

/// A host we are connected to. Every method may be called again after it failed, or after we
/// crashed within it.
#[async_trait]
pub trait Host: Send + Sync {
    /// Looks at the machine. An error when it is not what was rented, or when the job needs the hub
    /// and the machine does not reach it.
    async fn probe(&self, offer: &Offer, want: &GpuRequest, asks_the_hub: bool) -> Result<HostFacts, HostError>;

    /// Makes sure that the run's guard watches over the instance, and tells it that we do as long
    /// as this value lives.
    async fn guard(&self, run: &str, config: &GuardConfig) -> Result<(), HostError>;

    /// Makes sure that the worker is there.
    async fn push_worker(&self, on: OnEvent<'_>) -> Result<(), HostError>;

    /// Copies a file or a folder to where the run's worker can read it, under `name`; returns the
    /// path to give to the worker.
    async fn push(&self, run: &str, local: &Path, name: &str, on: OnEvent<'_>) -> Result<String, HostError>;

    /// Starts the worker, detached. Starting it twice starts it once.
    async fn launch(&self, run: &str, job: &JobSpec, secrets: &[(&'static str, Secret)]) -> Result<(), HostError>;

    /// Starts a worker again that died, on what it left. One that runs, or has ended as it should,
    /// is left alone.
    async fn restart(&self, run: &str, secrets: &[(&'static str, Secret)]) -> Result<(), HostError>;

    /// The state of the worker.
    async fn status(&self, run: &str) -> Result<JobStatus, HostError>;

    /// Passes on what the worker says until it has ended.
    async fn follow(&self, run: &str, on: OnEvent<'_>) -> Result<JobStatus, HostError>;

    /// Copies the worker's files into the local folder `into`: no others than are `expected`, and
    /// none that is larger. The manifest if the worker has written one.
    async fn fetch(
        &self,
        run: &str,
        into: &Path,
        expected: &[FileBytes],
        on: OnEvent<'_>,
    ) -> Result<Option<Manifest>, HostError>;

    /// Ends the worker. One that has ended already is a success.
    async fn stop_worker(&self, run: &str) -> Result<(), HostError>;
}
