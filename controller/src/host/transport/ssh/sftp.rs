//! Files over SFTP, with many concurrent requests.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::{FuturesOrdered, FuturesUnordered, StreamExt};
use russh::ChannelMsg;
use russh::client::Handle;
use russh_sftp::client::error::Error as SftpError;
use russh_sftp::client::{Config, RawSftpSession};
use russh_sftp::protocol::{FileAttributes, OpenFlags, Packet, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::Limit;
use super::clock::Clock;
use super::connect::{Client, broken};
use super::exec::Channel;
use crate::host::transport::{TransportError, TransportErrorKind as Kind};
use crate::text::clean;

/// Bytes per request: with its header below the 32 KiB that every server accepts.
const CHUNK: u64 = 31 << 10;
/// Concurrent writes per channel: together they fill OpenSSH's window of 2 MiB.
const WRITES: usize = 64;
/// Concurrent reads: they fill half of this client's window.
const READS: usize = 256;
/// Maximum time of a request, including its time in the queue. [`Clock`] detects a lost
/// connection.
const REQUEST_LIMIT_SECS: u64 = 24 * 3600;
/// Type bits of a mode, and their value for a plain file.
const TYPE_MASK: u32 = 0o170_000;
const PLAIN_FILE: u32 = 0o100_000;

/// An SFTP session on its own channel.
pub struct Sftp {
    session: RawSftpSession,
    patience: Duration,
}

impl Sftp {
    /// `None` if the server has no SFTP. `patience` is the time limit of an answer.
    pub(super) async fn open(handle: &Handle<Client>, patience: Duration) -> Result<Option<Self>, TransportError> {
        timeout(patience, Self::start(handle, patience))
            .await
            .unwrap_or_else(|_| Err(TransportError::new(Kind::TimedOut, "SFTP: no answer to the first request")))
    }

    async fn start(handle: &Handle<Client>, patience: Duration) -> Result<Option<Self>, TransportError> {
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
        match Self::over(channel.into_stream(), patience).await {
            Ok(session) => Ok(Some(session)),
            Err(_) if handle.is_closed() => Err(fail(russh::Error::Disconnect)),
            // The server accepted the request and started a program that does not speak SFTP.
            Err(_) => Ok(None),
        }
    }

    /// A session with the server at the other end of `stream`. `patience` is the time limit of an
    /// answer.
    ///
    /// # Errors
    /// The answer is not SFTP.
    pub async fn over(
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        patience: Duration,
    ) -> Result<Self, TransportError> {
        let config = Config { request_timeout_secs: REQUEST_LIMIT_SECS, ..Config::default() };
        let session = RawSftpSession::new_with_config(stream, config);
        session.init().await.map_err(|e| wrong("SFTP", &e))?;
        Ok(Self { session, patience })
    }

    /// Reads at most `limit` bytes of a plain file from `offset`; `None` if it does not exist.
    ///
    /// # Errors
    /// The server's error, or a timeout.
    pub async fn read(&self, remote: &str, offset: u64, limit: u64) -> Result<Option<Vec<u8>>, TransportError> {
        let mut content = Vec::new();
        Ok(self.download(remote, offset, Limit::Cut(limit), &mut content).await?.map(|_| content))
    }

    /// Renames over an existing file; `false` if the server does not support it.
    pub(super) async fn rename_over(&self, from: &str, to: &str) -> Result<bool, TransportError> {
        let mut payload = Vec::new();
        for path in [from, to] {
            payload.extend_from_slice(&(path.len() as u32).to_be_bytes());
            payload.extend_from_slice(path.as_bytes());
        }
        match self.patient(to, self.session.extended("posix-rename@openssh.com", payload)).await? {
            Packet::Status(status) if status.status_code == StatusCode::Ok => Ok(true),
            Packet::Status(status) if status.status_code == StatusCode::OpUnsupported => Ok(false),
            Packet::Status(status) => Err(wrong(to, &SftpError::Status(status))),
            _ => Ok(false),
        }
    }

    /// Copies a plain file from `offset` to `out`; `None` if it does not exist. Links are not
    /// followed.
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
        let handle =
            self.patient(remote, self.session.open(remote, OpenFlags::READ, FileAttributes::empty())).await?.handle;
        let result = self.stream(remote, &handle, offset, offset + len, out).await;
        let closed = self.patient(remote, self.session.close(handle)).await;
        let copied = result?;
        closed?;
        Ok(Some(copied))
    }

    async fn size_of(&self, remote: &str) -> Result<Option<u64>, TransportError> {
        let attrs = match timeout(self.patience, self.session.lstat(remote)).await {
            Ok(Ok(found)) => found.attrs,
            Ok(Err(SftpError::Status(status))) if status.status_code == StatusCode::NoSuchFile => return Ok(None),
            Ok(Err(e)) => return Err(wrong(remote, &e)),
            Err(_) => return Err(self.stalled(remote)),
        };
        let kind = attrs.permissions.unwrap_or(0) & TYPE_MASK;
        // A server that reports no type is trusted. A named pipe would never end, and a link may
        // point anywhere.
        if kind != 0 && kind != PLAIN_FILE {
            return Err(TransportError::new(Kind::Remote, format!("{remote}: not a plain file")));
        }
        Ok(Some(attrs.size.unwrap_or(0)))
    }

    /// Reads `from..to` in order with many requests ahead. Ends early if the file got shorter.
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
            while next < to && flight.len() < READS {
                let end = to.min(next.saturating_add(CHUNK));
                flight.push_back(self.chunk(handle, next, end));
                next = end;
            }
            let answer = timeout(self.patience, flight.next()).await.map_err(|_| self.stalled(remote))?;
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

    /// Reads `from..to`, repeating where the server returns fewer bytes; `false` if the file ends
    /// earlier.
    async fn chunk(&self, handle: &str, from: u64, to: u64) -> Result<(Vec<u8>, bool), SftpError> {
        let mut bytes = Vec::new();
        while from + (bytes.len() as u64) < to {
            let at = from + bytes.len() as u64;
            match self.session.read(handle, at, (to - at) as u32).await {
                // An empty answer would loop forever, an overlong one would overrun.
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

    /// One request with the session's time limit.
    async fn patient<T>(
        &self,
        path: &str,
        request: impl Future<Output = Result<T, SftpError>>,
    ) -> Result<T, TransportError> {
        timeout(self.patience, request).await.map_err(|_| self.stalled(path))?.map_err(|e| wrong(path, &e))
    }

    fn stalled(&self, path: &str) -> TransportError {
        TransportError::new(Kind::TimedOut, format!("{path}: no progress for {} s", self.patience.as_secs_f64()))
    }

    /// Opens a file for writing parts of it; `make` creates it with mode 0600.
    pub(super) async fn writer<'a>(
        self: Arc<Self>,
        path: &'a str,
        make: bool,
        clock: &'a Clock<'a>,
    ) -> Result<Writer<'a>, TransportError> {
        let private = FileAttributes { permissions: Some(0o600), ..FileAttributes::empty() };
        let flags = if make { OpenFlags::CREATE | OpenFlags::WRITE } else { OpenFlags::WRITE };
        let open = self.session.open(path, flags, private);
        let handle = self.patient(path, open).await?.handle;
        Ok(Writer { sftp: self, path, handle, clock, flight: FuturesUnordered::new() })
    }

    /// Writes a few bytes into the new file `part`, syncs it and sets `mode`.
    pub(super) async fn write_new(&self, part: &str, mode: u32, bytes: &[u8]) -> Result<(), TransportError> {
        // Mode 0600 until complete, since it may be a secret.
        let private = FileAttributes { permissions: Some(0o600), ..FileAttributes::empty() };
        let create = OpenFlags::CREATE | OpenFlags::WRITE | OpenFlags::EXCLUDE;
        let handle = self.patient(part, self.session.open(part, create, private)).await?.handle;
        let sealed = self.fill(part, &handle, mode, bytes).await;
        let closed = self.patient(part, self.session.close(handle)).await;
        sealed.and(closed.map(drop))
    }

    async fn fill(&self, part: &str, handle: &str, mode: u32, bytes: &[u8]) -> Result<(), TransportError> {
        for (i, chunk) in bytes.chunks(CHUNK as usize).enumerate() {
            self.patient(part, self.session.write(handle, i as u64 * CHUNK, chunk.to_vec())).await?;
        }
        let attrs = FileAttributes { permissions: Some(mode), ..FileAttributes::empty() };
        self.patient(part, self.session.fsetstat(handle, attrs)).await?;
        match self.patient(part, self.session.fsync(handle)).await {
            // Not every server supports this.
            Err(e) if e.kind != Kind::Remote => Err(e),
            _ => Ok(()),
        }
    }
}

/// A remote file that is written through one channel, with many concurrent requests.
pub(super) struct Writer<'a> {
    sftp: Arc<Sftp>,
    path: &'a str,
    handle: String,
    clock: &'a Clock<'a>,
    flight: FuturesUnordered<BoxFuture<'a, Result<u64, SftpError>>>,
}

impl Writer<'_> {
    /// Sends bytes for `offset`. Waits only if too many requests are in flight.
    pub(super) async fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), TransportError> {
        for (i, chunk) in bytes.chunks(CHUNK as usize).enumerate() {
            while self.flight.len() >= WRITES {
                self.acknowledge().await?;
            }
            let (sftp, handle, chunk) = (self.sftp.clone(), self.handle.clone(), chunk.to_vec());
            let offset = offset + i as u64 * CHUNK;
            self.flight.push(Box::pin(async move {
                let len = chunk.len() as u64;
                sftp.session.write(handle, offset, chunk).await.map(|_| len)
            }));
        }
        // Polling the future sends the request.
        match self.flight.next().now_or_never() {
            Some(answer) => self.take(answer).map(drop),
            None => Ok(()),
        }
    }

    async fn settle(&mut self) -> Result<(), TransportError> {
        while self.acknowledge().await? {}
        Ok(())
    }

    /// Waits until all writes are acknowledged, and closes the file.
    pub(super) async fn close(mut self) -> Result<(), TransportError> {
        let settled = self.settle().await;
        let closed = self.sftp.patient(self.path, self.sftp.session.close(self.handle.as_str())).await;
        settled.and(closed.map(drop))
    }

    /// Waits for one answer; `false` if none is outstanding.
    pub(super) async fn acknowledge(&mut self) -> Result<bool, TransportError> {
        let answer = self.flight.next().await;
        self.take(answer)
    }

    fn take(&self, answer: Option<Result<u64, SftpError>>) -> Result<bool, TransportError> {
        let Some(answer) = answer else { return Ok(false) };
        self.clock.acknowledge(answer.map_err(|e| wrong(self.path, &e))?);
        Ok(true)
    }
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

#[cfg(test)]
mod tests {
    use russh_sftp::protocol::{Attrs, Data, Handle, Status};
    use russh_sftp::server;

    use super::*;

    /// A server with a file of the maximum length.
    struct Endless;

    impl server::Handler for Endless {
        type Error = StatusCode;

        fn unimplemented(&self) -> StatusCode {
            StatusCode::OpUnsupported
        }

        async fn lstat(&mut self, id: u32, _: String) -> Result<Attrs, StatusCode> {
            Ok(Attrs { id, attrs: FileAttributes { size: Some(u64::MAX), ..FileAttributes::empty() } })
        }

        async fn open(&mut self, id: u32, _: String, _: OpenFlags, _: FileAttributes) -> Result<Handle, StatusCode> {
            Ok(Handle { id, handle: "1".to_owned() })
        }

        async fn read(&mut self, id: u32, _: String, _: u64, len: u32) -> Result<Data, StatusCode> {
            Ok(Data { id, data: vec![0; len as usize] })
        }

        async fn close(&mut self, id: u32, _: String) -> Result<Status, StatusCode> {
            Ok(Status { id, status_code: StatusCode::Ok, error_message: String::new(), language_tag: String::new() })
        }
    }

    #[tokio::test]
    async fn download_of_an_endless_file_stops_at_its_limit() {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        server::run(theirs, Endless).await;
        let sftp = Sftp::over(ours, Duration::from_secs(20)).await.unwrap();
        let (mut content, limit) = (Vec::new(), 16 << 10);
        let read = sftp.download("log", u64::MAX - 100, Limit::Cut(limit), &mut content);
        let copied = timeout(Duration::from_secs(20), read).await.expect("it ends").unwrap();
        assert_eq!((copied, content.len()), (Some(100), 100));
    }
}
