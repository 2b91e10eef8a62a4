//! Fixtures of the tests: a server, a link to it, and a host behind it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use outliers::cloud::broker::SshEndpoint;
use outliers::host::RemoteHost;
use outliers::host::transport::ssh::{SshTransport, Tuning};
use outliers_tests::flaky_link::FlakyLink;
use outliers_tests::sshd::Sshd;
use tempfile::TempDir;

/// A connection with short timeouts.
pub(crate) const HASTY: Tuning =
    Tuning { keepalive: Duration::from_millis(500), stall: Duration::from_secs(1), rekey_after: 1 << 30 };

/// A server at the end of a link.
pub(crate) struct SshFixture {
    pub(crate) server: Sshd,
    pub(crate) link: FlakyLink,
    pub(crate) here: TempDir,
}

impl SshFixture {
    /// With more lines of `sshd_config`. `None` without OpenSSH.
    pub(crate) fn new(config: &str, link: impl FnOnce(&SshEndpoint) -> FlakyLink) -> Option<Self> {
        let server = Sshd::start_with(config).unwrap()?;
        let link = link(&server.endpoint());
        Some(Self { server, link, here: tempfile::tempdir().unwrap() })
    }

    /// Behind a link without delay.
    pub(crate) fn without_delay(config: &str) -> Option<Self> {
        Self::new(config, |server| FlakyLink::long(server, Duration::ZERO).unwrap())
    }

    pub(crate) async fn ssh(&self, tuning: Tuning) -> SshTransport {
        let (key, pin) = (self.server.key().private_path(), Some(self.server.host_key()));
        SshTransport::connect_with(&self.link.endpoint(), key, pin, tuning).await.unwrap().0
    }

    pub(crate) async fn host(&self, tuning: Tuning) -> RemoteHost {
        RemoteHost::new(Arc::new(self.ssh(tuning).await), "host")
    }

    /// A local file of this content.
    pub(crate) fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.here.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// A path below the server's home.
    pub(crate) fn there(&self, name: &str) -> PathBuf {
        self.server.home().join(name)
    }
}

/// Names in a folder, sorted.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().to_str().unwrap().to_owned()).collect();
    names.sort();
    names
}
