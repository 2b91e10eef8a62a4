//! Files over SFTP, with many requests under way at once.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::stream::{FuturesOrdered, FuturesUnordered, StreamExt};
use russh::ChannelMsg;
use russh::client::Handle;
use russh_sftp::client::error::Error as SftpError;
use russh_sftp::client::{Config, RawSftpSession};
use russh_sftp::protocol::{FileAttributes, OpenFlags, Packet, StatusCode};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::Limit;
use super::connect::{Client, broken};
use super::exec::Channel;
use crate::text::clean;
use crate::transport::{TransportError, TransportErrorKind as Kind};

/// Bytes per request: with its header it stays below the 32 KiB that every server takes.
const CHUNK: u64 = 31 << 10;
/// Requests under way per channel: together they fill OpenSSH's window of 2 MiB.
const IN_FLIGHT: usize = 64;
/// What a lane reads from disk at a time.
const BLOCK: u64 = 64 * CHUNK;
/// No single answer for so long: the link is dead. A clock per request would run out on a slow line, since requests queue.
const NO_PROGRESS: Duration = Duration::from_secs(60);
/// So long a request may take in all, queueing included.
const REQUEST_LIMIT_SECS: u64 = 24 * 3600;
/// Type bits of a mode, and the value for a plain file.
const TYPE_MASK: u32 = 0o170_000;
const PLAIN_FILE: u32 = 0o100_000;

/// What is uploaded.
pub(super) enum Source {
    /// A file, as long as it was when opened.
    File(Arc<File>, u64),
    /// A few bytes.
    Bytes(Arc<[u8]>),
}

impl Source {
    pub(super) fn file(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let facts = file.metadata()?;
        if !facts.is_file() {
            return Err(io::Error::other("not a plain file"));
        }
        Ok(Self::File(Arc::new(file), facts.len()))
    }

    pub(super) fn bytes(content: &[u8]) -> Self {
        Self::Bytes(content.into())
    }

    pub(super) fn len(&self) -> u64 {
        match self {
            Self::File(_, len) => *len,
            Self::Bytes(bytes) => bytes.len() as u64,
        }
    }

    /// The bytes from `offset`, `len` of them or fewer at the end.
    pub(super) async fn block(&self, offset: u64, len: u64) -> Result<Vec<u8>, TransportError> {
        let len = len.min(self.len().saturating_sub(offset)) as usize;
        let read = match self {
            Self::Bytes(bytes) => Ok(bytes[offset as usize..offset as usize + len].to_vec()),
            Self::File(file, _) => {
                let file = file.clone();
                let read = move || {
                    let mut block = vec![0; len];
                    file.read_exact_at(&mut block, offset).map(|()| block)
                };
                tokio::task::spawn_blocking(read).await.unwrap_or_else(|e| Err(io::Error::other(e)))
            }
        };
        read.map_err(|e| TransportError::new(Kind::Local, format!("reading the file to send: {e}")))
    }
}

/// An SFTP session on a channel of its own.
pub(super) struct Sftp(RawSftpSession);

impl Sftp {
    /// `None` when the server has no SFTP.
    pub(super) async fn open(handle: &Handle<Client>) -> Result<Option<Self>, TransportError> {
        timeout(NO_PROGRESS, Self::start(handle))
            .await
            .unwrap_or_else(|_| Err(TransportError::new(Kind::TimedOut, "SFTP: no answer to the first request")))
    }

    async fn start(handle: &Handle<Client>) -> Result<Option<Self>, TransportError> {
        let fail = |e: russh::Error| broken(&"SFTP", &e);
        let mut channel: Channel = handle.channel_open_session().await.map_err(fail)?;
        channel.request_subsystem(true, "sftp").await.map_err(fail)?;
        loop {
            match channel.wait().await {
                Some(ChannelMsg::Success) => break,
                Some(ChannelMsg::Failure | ChannelMsg::Close | ChannelMsg::Eof) => return Ok(None),
                None => return Err(fail(russh::Error::Disconnect)),
                Some(_) => {}
            }
        }
        let config = Config { request_timeout_secs: REQUEST_LIMIT_SECS, ..Config::default() };
        let session = RawSftpSession::new_with_config(channel.into_stream(), config);
        match session.init().await {
            Ok(_) => Ok(Some(Self(session))),
            Err(_) if handle.is_closed() => Err(fail(russh::Error::Disconnect)),
            // The server said yes and started something that speaks no SFTP, or nothing at all.
            Err(_) => Ok(None),
        }
    }

    /// Renames over an existing file; `false` when the server cannot.
    pub(super) async fn rename_over(&self, from: &str, to: &str) -> Result<bool, TransportError> {
        let mut payload = Vec::new();
        for path in [from, to] {
            payload.extend_from_slice(&(path.len() as u32).to_be_bytes());
            payload.extend_from_slice(path.as_bytes());
        }
        match patient(to, self.0.extended("posix-rename@openssh.com", payload)).await? {
            Packet::Status(status) if status.status_code == StatusCode::Ok => Ok(true),
            Packet::Status(status) if status.status_code == StatusCode::OpUnsupported => Ok(false),
            Packet::Status(status) => Err(wrong(to, &SftpError::Status(status))),
            _ => Ok(false),
        }
    }

    /// Copies a plain file from `offset` into `out`; `None` if there is no such file. Links are not followed.
    pub(super) async fn download(
        &self,
        remote: &str,
        offset: u64,
        limit: Limit,
        out: &mut (dyn AsyncWrite + Send + Unpin),
    ) -> Result<Option<u64>, TransportError> {
        let Some(size) = self.size_of(remote).await? else { return Ok(None) };
        let len = match limit {
            Limit::Refuse(max) if size > max => {
                let message = format!("{remote}: {size} bytes, more than the {max} we take");
                return Err(TransportError::new(Kind::Remote, message));
            }
            Limit::Refuse(_) => size.saturating_sub(offset),
            Limit::Cut(max) => size.saturating_sub(offset).min(max),
        };
        if len == 0 {
            return Ok(Some(0));
        }
        let handle = patient(remote, self.0.open(remote, OpenFlags::READ, FileAttributes::empty())).await?.handle;
        let result = self.stream(remote, &handle, offset, offset + len, out).await;
        let closed = patient(remote, self.0.close(handle)).await;
        let copied = result?;
        closed?;
        Ok(Some(copied))
    }

    async fn size_of(&self, remote: &str) -> Result<Option<u64>, TransportError> {
        let attrs = match timeout(NO_PROGRESS, self.0.lstat(remote)).await {
            Ok(Ok(found)) => found.attrs,
            Ok(Err(SftpError::Status(status))) if status.status_code == StatusCode::NoSuchFile => return Ok(None),
            Ok(Err(e)) => return Err(wrong(remote, &e)),
            Err(_) => return Err(stalled(remote)),
        };
        let kind = attrs.permissions.unwrap_or(0) & TYPE_MASK;
        // A server that tells no type at all is taken at its word; a named pipe would never end, a link may lead anywhere.
        if kind != 0 && kind != PLAIN_FILE {
            return Err(TransportError::new(Kind::Remote, format!("{remote}: not a plain file")));
        }
        Ok(Some(attrs.size.unwrap_or(0)))
    }

    /// Reads `from..to` in order, many requests ahead. Ends early if the file got shorter.
    async fn stream(
        &self,
        remote: &str,
        handle: &str,
        from: u64,
        to: u64,
        out: &mut (dyn AsyncWrite + Send + Unpin),
    ) -> Result<u64, TransportError> {
        let mut flight = FuturesOrdered::new();
        let (mut next, mut copied) = (from, 0);
        loop {
            while next < to && flight.len() < IN_FLIGHT {
                let end = to.min(next + CHUNK);
                flight.push_back(self.chunk(handle, next, end));
                next = end;
            }
            let answer = timeout(NO_PROGRESS, flight.next()).await.map_err(|_| stalled(remote))?;
            let Some(answer) = answer else { return Ok(copied) };
            let (bytes, whole) = answer.map_err(|e| wrong(remote, &e))?;
            out.write_all(&bytes)
                .await
                .map_err(|e| TransportError::new(Kind::Local, format!("writing what comes from {remote}: {e}")))?;
            copied += bytes.len() as u64;
            if !whole {
                return Ok(copied);
            }
        }
    }

    /// The bytes `from..to`, asked for again where the server answers with fewer; `false` with those before its end.
    async fn chunk(&self, handle: &str, from: u64, to: u64) -> Result<(Vec<u8>, bool), SftpError> {
        let mut bytes = Vec::new();
        while from + (bytes.len() as u64) < to {
            let at = from + bytes.len() as u64;
            match self.0.read(handle, at, (to - at) as u32).await {
                // An empty or overlong answer would never end or overrun.
                Ok(data) if data.data.is_empty() || data.data.len() as u64 > to - at => {
                    return Err(SftpError::UnexpectedPacket);
                }
                Ok(data) => bytes.extend_from_slice(&data.data),
                Err(SftpError::Status(status)) if status.status_code == StatusCode::Eof => return Ok((bytes, false)),
                Err(e) => return Err(e),
            }
        }
        Ok((bytes, true))
    }
}

/// Up to `wanted` sessions for one file: the first and, as far as the server allows, more beside it.
pub(super) async fn lanes(first: Arc<Sftp>, handle: &Handle<Client>, wanted: usize) -> Vec<Arc<Sftp>> {
    let more = (1..wanted).map(|_| Sftp::open(handle));
    let more = futures::future::join_all(more).await;
    let more = more.into_iter().filter_map(|opened| opened.ok().flatten().map(Arc::new));
    std::iter::once(first).chain(more).collect()
}

/// Writes `source` to the new file `part` through all lanes, syncs it and gives it `mode`.
pub(super) async fn upload(
    lanes: &[Arc<Sftp>],
    part: &str,
    mode: u32,
    source: &Source,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(), TransportError> {
    let [first, others @ ..] = lanes else {
        return Err(TransportError::new(Kind::Local, "no SFTP channel"));
    };
    // Private until it is whole: it may be a secret.
    let private = FileAttributes { permissions: Some(0o600), ..FileAttributes::empty() };
    let create = OpenFlags::CREATE | OpenFlags::WRITE | OpenFlags::EXCLUDE;
    let mut files = vec![(first, patient(part, first.0.open(part, create, private)).await?.handle)];
    for lane in others {
        let open = lane.0.open(part, OpenFlags::WRITE, FileAttributes::empty());
        files.push((lane, patient(part, open).await?.handle));
    }
    let work = Work { next: AtomicU64::new(0), sent: AtomicU64::new(0), source, part, progress };
    let written =
        futures::future::try_join_all(files.iter().map(|(lane, handle)| work.lane(lane, handle))).await.map(drop);
    let sealed = match written {
        Ok(()) => seal(first, part, &files[0].1, mode).await,
        Err(e) => Err(e),
    };
    for (lane, handle) in files {
        let closed = patient(part, lane.0.close(handle)).await;
        if sealed.is_ok() {
            closed?;
        }
    }
    sealed
}

async fn seal(sftp: &Sftp, part: &str, handle: &str, mode: u32) -> Result<(), TransportError> {
    let attrs = FileAttributes { permissions: Some(mode), ..FileAttributes::empty() };
    patient(part, sftp.0.fsetstat(handle, attrs)).await?;
    match patient(part, sftp.0.fsync(handle)).await {
        // Not every server knows how; the hash compared later is the proof.
        Err(e) if e.kind != Kind::Remote => Err(e),
        _ => Ok(()),
    }
}

/// One upload shared by its lanes.
struct Work<'a> {
    next: AtomicU64,
    sent: AtomicU64,
    source: &'a Source,
    part: &'a str,
    progress: &'a (dyn Fn(u64) + Send + Sync),
}

impl Work<'_> {
    /// Takes blocks until none is left.
    async fn lane(&self, sftp: &Sftp, handle: &str) -> Result<(), TransportError> {
        let mut flight = FuturesUnordered::new();
        loop {
            let at = self.next.fetch_add(BLOCK, Ordering::Relaxed);
            if at >= self.source.len() {
                break;
            }
            let block = self.source.block(at, BLOCK).await?;
            for (i, chunk) in block.chunks(CHUNK as usize).enumerate() {
                while flight.len() >= IN_FLIGHT {
                    self.acknowledge(flight.next()).await?;
                }
                let (offset, chunk) = (at + i as u64 * CHUNK, chunk.to_vec());
                flight.push(async move {
                    let len = chunk.len() as u64;
                    sftp.0.write(handle, offset, chunk).await.map(|_| len)
                });
            }
        }
        while !flight.is_empty() {
            self.acknowledge(flight.next()).await?;
        }
        Ok(())
    }

    async fn acknowledge(
        &self,
        next: impl Future<Output = Option<Result<u64, SftpError>>>,
    ) -> Result<(), TransportError> {
        let answer = timeout(NO_PROGRESS, next).await.map_err(|_| stalled(self.part))?;
        let len = answer.transpose().map_err(|e| wrong(self.part, &e))?.unwrap_or(0);
        (self.progress)(self.sent.fetch_add(len, Ordering::Relaxed) + len);
        Ok(())
    }
}

/// One request that nothing else queues before.
async fn patient<T>(path: &str, request: impl Future<Output = Result<T, SftpError>>) -> Result<T, TransportError> {
    timeout(NO_PROGRESS, request).await.map_err(|_| stalled(path))?.map_err(|e| wrong(path, &e))
}

fn stalled(path: &str) -> TransportError {
    TransportError::new(Kind::TimedOut, format!("{path}: no progress for {} s", NO_PROGRESS.as_secs()))
}

fn wrong(path: &str, error: &SftpError) -> TransportError {
    let kind = match error {
        SftpError::Status(status) => match status.status_code {
            StatusCode::NoConnection | StatusCode::ConnectionLost => Kind::Reset,
            _ => Kind::Remote,
        },
        SftpError::Timeout => Kind::TimedOut,
        SftpError::IO(_) | SftpError::UnexpectedBehavior(_) => Kind::Reset,
        SftpError::Limited(_) | SftpError::UnexpectedPacket => Kind::Remote,
    };
    let what = match error {
        SftpError::Status(status) => format!("{} ({})", status.error_message, status.status_code),
        SftpError::UnexpectedBehavior(_) => "the SFTP channel was closed".to_owned(),
        other => other.to_string(),
    };
    TransportError::new(kind, format!("{path}: {}", clean(what.as_bytes(), 200)))
}
