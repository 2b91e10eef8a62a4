//! [`Transport`] over SSH: one connection per host, channels inside it.
//!
//! A broken connection is dropped, and the next call opens a new one against the same pinned host
//! key. Every method makes one attempt; callers decide on retries.
//!
//! Calls run concurrently, each on its own channels. If a server refuses another channel
//! (`MaxSessions`), calls run one at a time from then on and use commands only: a command closes
//! its channel before the next opens one.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use rand::Rng;
use russh::client::Handle;
use russh::keys::{PrivateKey, load_secret_key};
use tokio::sync::{Mutex, Semaphore, SemaphorePermit};

use super::{
    ExecOutput, SendRequest, SshEndpoint, Transport, TransportError, TransportErrorKind, local_error, part_beside,
    settle,
};

mod clock;
mod connect;
mod exec;
mod pin;
mod plain;
mod sftp;
mod source;
mod upload;

pub use pin::HostKeyPin;
pub use sftp::Sftp;

use clock::Clock;
use connect::{ChannelCount, Client};
use source::UploadSource;
use upload::{LANES, Queue, Upload};

/// Timeouts of a connection and the lifetime of its keys.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// Silence after which the server is probed. Three unanswered probes end the connection.
    pub keepalive: Duration,
    /// Silence during a transfer after which the connection counts as lost.
    pub stall: Duration,
    /// Bytes in each direction after which keys are renewed.
    pub rekey_after: usize,
}

impl Default for Tuning {
    /// Chosen for long-distance lines. RFC 4253 (section 9) requires new keys after a gigabyte.
    fn default() -> Self {
        Self { keepalive: Duration::from_secs(15), stall: Duration::from_secs(30), rekey_after: 1 << 30 }
    }
}

/// Commands and files on one host over SSH.
pub struct SshTransport {
    endpoint: SshEndpoint,
    key: Arc<PrivateKey>,
    pin: HostKeyPin,
    tuning: Tuning,
    link: Mutex<Option<Arc<Link>>>,
    /// Whether the server lacks SFTP: files go through `cat`.
    without_sftp: AtomicBool,
    /// Whether the server refused concurrent channels.
    one_at_a_time: AtomicBool,
    turns: Semaphore,
    /// Channels that the host tried to open, over all connections.
    opened: ChannelCount,
}

/// More than the number of concurrent calls.
const ALL_TURNS: u32 = 1024;

/// How often a call is repeated after the server opened no channel: alone, and on a fresh
/// connection.
const MAX_REFUSALS: u32 = 2;

/// Evaluates an expression that needs channels on the open connection.
///
/// A macro, since futures made by an async closure cannot be proved to be `Send`.
macro_rules! on_link {
    ($self:ident, $link:ident, $work:expr) => {{
        let mut refusals = 0;
        loop {
            let turn = $self.channel_permit().await;
            let $link = $self.link().await?;
            let result = $work.await;
            let result = $self.settle(&$link, result).await;
            drop(turn);
            match result {
                Err(error) if error.kind == TransportErrorKind::NoChannel && refusals < MAX_REFUSALS => {
                    refusals += 1;
                    $self.one_at_a_time.store(true, Ordering::Relaxed);
                    $self.forget(&$link).await;
                }
                result => break result,
            }
        }
    }};
}

/// An open connection.
struct Link {
    handle: Handle<Client>,
    sftp: Mutex<Option<Arc<Sftp>>>,
}

impl SshTransport {
    /// One attempt to connect and log in as `endpoint.user` with the key file `private_key`.
    ///
    /// Without a pin the server's key is accepted and returned, to be pinned from then on.
    pub async fn connect(
        endpoint: &SshEndpoint,
        private_key: &Path,
        pin: Option<&HostKeyPin>,
    ) -> Result<(Self, HostKeyPin), TransportError> {
        Self::connect_with(endpoint, private_key, pin, Tuning::default()).await
    }

    /// As [`Self::connect`], with other timeouts.
    pub async fn connect_with(
        endpoint: &SshEndpoint,
        private_key: &Path,
        pin: Option<&HostKeyPin>,
        tuning: Tuning,
    ) -> Result<(Self, HostKeyPin), TransportError> {
        let key = load_secret_key(private_key, None).map_err(|e| {
            let message = format!("SSH key {} cannot be used: {e}", private_key.display());
            TransportError::new(TransportErrorKind::Local, message)
        })?;
        let key = Arc::new(key);
        let opened = ChannelCount::default();
        let (handle, seen) = connect::open(endpoint, &key, pin, &tuning, &opened).await?;
        let pin = pin.cloned().unwrap_or(seen);
        let link = Arc::new(Link { handle, sftp: Mutex::new(None) });
        let transport = Self {
            endpoint: endpoint.clone(),
            key,
            pin: pin.clone(),
            tuning,
            link: Mutex::new(Some(link)),
            without_sftp: AtomicBool::new(false),
            one_at_a_time: AtomicBool::new(false),
            turns: Semaphore::new(ALL_TURNS as usize),
            opened,
        };
        Ok((transport, pin))
    }

    /// The open connection, or a new one.
    async fn link(&self) -> Result<Arc<Link>, TransportError> {
        let mut slot = self.link.lock().await;
        if let Some(link) = slot.as_ref().filter(|link| !link.handle.is_closed()) {
            return Ok(link.clone());
        }
        *slot = None;
        if let Some(error) = self.opened.too_many_channels(&self.endpoint) {
            return Err(error);
        }
        let (handle, _) = connect::open(&self.endpoint, &self.key, Some(&self.pin), &self.tuning, &self.opened).await?;
        let link = Arc::new(Link { handle, sftp: Mutex::new(None) });
        *slot = Some(link.clone());
        Ok(link)
    }

    /// Permission to open channels, concurrent or exclusive, in the order of requests.
    async fn channel_permit(&self) -> SemaphorePermit<'_> {
        let turns = if self.one_at_a_time.load(Ordering::Relaxed) { ALL_TURNS } else { 1 };
        self.turns.acquire_many(turns).await.expect("nobody closes it")
    }

    /// Returns `result`. After a failure of the connection the next call uses a new one.
    async fn settle<T>(&self, link: &Arc<Link>, result: Result<T, TransportError>) -> Result<T, TransportError> {
        // If the host misbehaved, the error says so instead of reporting a broken connection.
        let result = result.map_err(|error| self.opened.too_many_channels(&self.endpoint).unwrap_or(error));
        if result.as_ref().is_err_and(|e| e.kind.is_transient()) {
            self.forget(link).await;
        }
        result
    }

    /// Drops the connection, so that the next call opens a new one.
    async fn forget(&self, link: &Arc<Link>) {
        let mut slot = self.link.lock().await;
        if slot.as_ref().is_some_and(|now| Arc::ptr_eq(now, link)) {
            *slot = None;
        }
    }

    /// The connection's SFTP channel; `None` if the server has no SFTP.
    async fn sftp(&self, link: &Link) -> Result<Option<Arc<Sftp>>, TransportError> {
        if self.without_sftp.load(Ordering::Relaxed) || self.one_at_a_time.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let mut slot = link.sftp.lock().await;
        if slot.is_none() {
            *slot = Sftp::open(&link.handle, self.tuning.stall).await?.map(Arc::new);
            self.without_sftp.store(slot.is_none(), Ordering::Relaxed);
        }
        Ok(slot.clone())
    }

    async fn upload(&self, link: &Link, source: &UploadSource, what: &SendRequest<'_>) -> Result<(), TransportError> {
        let sftp = self.sftp(link).await?;
        let upload = Upload {
            handle: &link.handle,
            source,
            remote: what.remote,
            clock: Clock::new(self.tuning.stall, what.progress),
            queue: Queue::of(what.parts),
            lanes: if self.one_at_a_time.load(Ordering::Relaxed) { 1 } else { LANES },
        };
        match upload.run(sftp).await {
            Err(e) if e.kind == TransportErrorKind::Remote => Err(plain::explain(&link.handle, what.remote, e).await),
            sent => sent,
        }
    }

    async fn write(&self, link: &Link, content: &[u8], remote: &str, mode: u32) -> Result<(), TransportError> {
        let part = format!("{remote}.part.{:016x}", rand::rng().random::<u64>());
        let written = match self.sftp(link).await? {
            Some(sftp) => sftp.write_new(&part, mode, content).await,
            None => plain::write_new(&link.handle, &part, mode, content).await,
        };
        let result = match written {
            Ok(()) => self.rename(link, &part, remote).await,
            Err(e) if e.kind == TransportErrorKind::Remote => Err(plain::explain(&link.handle, &part, e).await),
            Err(e) => Err(e),
        };
        if result.is_err() && !link.handle.is_closed() {
            plain::remove(&link.handle, &part).await;
        }
        result
    }

    async fn rename(&self, link: &Link, from: &str, to: &str) -> Result<(), TransportError> {
        if let Some(sftp) = self.sftp(link).await?
            && sftp.rename_over(from, to).await?
        {
            return Ok(());
        }
        plain::rename(&link.handle, from, to).await
    }

    async fn download(&self, link: &Link, remote: &str, local: &Path, limit: u64) -> Result<u64, TransportError> {
        let part = part_beside(local);
        let got = self.download_to(link, remote, &part, limit).await;
        settle(&part, local, got)
    }

    async fn download_to(&self, link: &Link, remote: &str, part: &Path, limit: u64) -> Result<u64, TransportError> {
        use tokio::io::AsyncWriteExt;
        let file = tokio::fs::File::create_new(part).await.map_err(|e| local_error(part, &e))?;
        let mut file = tokio::io::BufWriter::with_capacity(1 << 20, file);
        let bytes = match self.sftp(link).await? {
            Some(sftp) => sftp.download(remote, 0, Limit::Refuse(limit), &mut file).await?,
            None => plain::download(&link.handle, remote, limit, &mut file).await?,
        };
        let Some(bytes) = bytes else {
            return Err(TransportError::new(TransportErrorKind::Remote, format!("{remote}: no such file")));
        };
        file.flush().await.map_err(|e| local_error(part, &e))?;
        file.get_ref().sync_all().await.map_err(|e| local_error(part, &e))?;
        Ok(bytes)
    }

    async fn read(&self, link: &Link, remote: &str, at: u64, limit: u64) -> Result<Option<Vec<u8>>, TransportError> {
        let Some(sftp) = self.sftp(link).await? else {
            return plain::read(&link.handle, remote, at, limit).await;
        };
        sftp.read(remote, at, limit).await
    }
}

/// Treatment of a file longer than its limit.
#[derive(Clone, Copy)]
enum Limit {
    /// An error, before a byte is read.
    Refuse(u64),
    /// Read up to this many bytes.
    Cut(u64),
}

#[async_trait]
impl Transport for SshTransport {
    async fn exec(&self, command: &str, stdin: &[u8], limit: Duration) -> Result<ExecOutput, TransportError> {
        on_link!(self, link, exec::exec(&link.handle, command, stdin, limit))
    }

    async fn send(&self, what: &SendRequest<'_>) -> Result<(), TransportError> {
        let source = UploadSource::open(what.local).map_err(|e| local_error(what.local, &e))?;
        on_link!(self, link, self.upload(&link, &source, what))
    }

    async fn put_bytes(&self, content: &[u8], remote: &str, mode: u32) -> Result<(), TransportError> {
        on_link!(self, link, self.write(&link, content, remote, mode))
    }

    async fn get(&self, remote: &str, local: &Path, limit: u64) -> Result<u64, TransportError> {
        on_link!(self, link, self.download(&link, remote, local, limit))
    }

    async fn read_from(&self, remote: &str, offset: u64, limit: u64) -> Result<Option<Vec<u8>>, TransportError> {
        on_link!(self, link, self.read(&link, remote, offset, limit))
    }
}
