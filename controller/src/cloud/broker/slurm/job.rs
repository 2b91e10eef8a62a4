//! Transport to a job: files are on the shared file system, and scripts run on the login node.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::timeout;

use super::cluster::Cluster;
use crate::cloud::broker::{BrokerError, LeaseTag};
use crate::host::transport::quote::quote;
use crate::host::transport::{ExecOutput, SendRequest, Transport, TransportError, TransportErrorKind};

/// How long a script waits for a new snapshot of the queue before it uses the last one.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A job's folder as a host: the folder is its home, and every script gets the job's state.
pub(super) struct JobTransport {
    cluster: Arc<Cluster>,
    tag: LeaseTag,
}

impl JobTransport {
    pub(super) fn new(cluster: Arc<Cluster>, tag: LeaseTag) -> Self {
        Self { cluster, tag }
    }

    /// Variables of [`crate::host`]'s scripts.
    async fn preface(&self) -> Result<String, TransportError> {
        let tag = self.tag.to_string();
        let lease = self.cluster.lease(&tag).await.map_err(in_transport)?;
        let user = &self.cluster.login().await.map_err(in_transport)?.user;
        // If the queue is unavailable, the job is assumed to be open.
        let seen = timeout(TIMEOUT, self.cluster.snapshot()).await;
        let seen = seen.ok().and_then(Result::ok).or_else(|| self.cluster.latest());
        let is_ending = seen.as_ref().is_some_and(|snapshot| snapshot.is_ending(&tag));
        let over = seen.and_then(|snapshot| snapshot.over(&tag));
        let cancel = format!("scancel --user={} --name={tag}", quote(user));
        Ok(format!(
            "HOME={lease}\nexport HOME\noutliers_job={} outliers_job_says={} outliers_cancel={}\n",
            match over {
                Some(_) => "over",
                None if is_ending => "ending",
                None => "open",
            },
            quote(&over.unwrap_or_default()),
            quote(&cancel),
        ))
    }
}

fn in_transport(error: BrokerError) -> TransportError {
    TransportError::new(TransportErrorKind::Reset, error.message)
}

#[async_trait]
impl Transport for JobTransport {
    async fn exec(&self, command: &str, stdin: &[u8], limit: Duration) -> Result<ExecOutput, TransportError> {
        let mut script = self.preface().await?.into_bytes();
        script.extend_from_slice(stdin);
        self.cluster.ssh().exec(command, &script, limit).await
    }

    async fn send(&self, what: &SendRequest<'_>) -> Result<(), TransportError> {
        self.cluster.ssh().send(what).await
    }

    async fn put_bytes(&self, content: &[u8], remote: &str, mode: u32) -> Result<(), TransportError> {
        self.cluster.ssh().put_bytes(content, remote, mode).await
    }

    async fn get(&self, remote: &str, local: &Path, limit: u64) -> Result<u64, TransportError> {
        self.cluster.ssh().get(remote, local, limit).await
    }

    async fn read_from(&self, remote: &str, offset: u64, limit: u64) -> Result<Option<Vec<u8>>, TransportError> {
        self.cluster.ssh().read_from(remote, offset, limit).await
    }
}
