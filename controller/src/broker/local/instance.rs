//! The process that is an instance: an SSH server on a loopback port, and the end of everything it started.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use russh::keys::{Algorithm, PrivateKey, PublicKey, key::safe_rng, ssh_key::LineEnding};
use russh::server::Config;
use russh::{MethodKind, MethodSet};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::command::Shell;
use super::processes::Marks;
use super::reaper::Reaper;
use super::record::{Folder, Ready, Record, now, write_durably};
use super::session::Connection;

/// Bytes a client may send ahead on a channel: 16 MiB do not slow a transfer down at 100 ms round trip.
const WINDOW: u32 = 16 << 20;
/// Messages kept for a command that does not read. Beyond, its whole connection waits: the library opens a channel's window
/// again when data arrives, not when it is used. A filter that answers more than its client reads needs this room.
const CHANNEL_BUFFER: usize = 4096;
/// A sleeping machine's timers stand still, the deadline does not: looked at this often.
const DEADLINE_CHECK: Duration = Duration::from_secs(60);

/// From the connection to the login: a client that says nothing is no client.
const LOGIN_LIMIT: Duration = Duration::from_secs(30);
/// Connections at the same time that have not logged in. Any user of the machine may make them;
/// beyond these the oldest one is hung up on, so that whoever does log in finds a way in.
const MOST_STRANGERS: usize = 100;

/// Why an instance ends.
enum End {
    /// It was told to.
    Signal,
    /// Its lease is over: nobody may ever call again, so it clears up after itself.
    Deadline,
}

/// Is the instance whose folder is `dir`, until a termination signal or the lease's deadline; then ends everything it started.
///
/// At the deadline the bill is written and the folder removed too: nothing is left to terminate.
///
/// # Errors
/// The folder is damaged, or in use by another process; the lease is over; no port, no signals. Nothing runs then.
pub async fn serve(dir: &Path) -> Result<()> {
    // Into the folder's log, unless the program has set up its own reporting.
    let _ = tracing_subscriber::fmt().with_ansi(false).with_writer(io::stderr).try_init();
    // A leader of its own session, deaf to the terminal the controller was started from. Refused only if it leads a process
    // group, and then the terminal is not its own either.
    let _ = rustix::process::setsid();
    let folder = Folder::new(dir);
    let lock = hold(&folder)?;
    let record = folder.record().with_context(|| format!("cannot read {}", dir.join("instance.json").display()))?;
    ensure!(!folder.is_ending(), "{} is being terminated", record.id);
    ensure!(record.deadline().is_none_or(|deadline| now() < deadline), "the lease of {} is over", record.id);
    let reaper = Reaper::start().context("cannot wait for child processes")?;
    let end = listen(&folder, &record, &reaper).await?;
    reaper.close();
    end_everything(&folder, &record).await?;
    if let End::Deadline = end {
        super::conclude(&folder, &record, true).context("the lease is over, but its folder stays")?;
    }
    drop(lock);
    Ok(())
}

fn hold(folder: &Folder) -> Result<File> {
    let path = folder.path().display();
    let lock = folder.lock().with_context(|| format!("cannot lock {path}"))?;
    lock.with_context(|| format!("{path} is in use by another process"))
}

async fn listen(folder: &Folder, record: &Record, reaper: &Reaper) -> Result<End> {
    let mut told = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let mut interrupted = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    let authorized = PublicKey::from_openssh(&folder.authorized_key().context("cannot read the authorised key")?);
    let authorized = Arc::new(authorized.context("the authorised key is not one of OpenSSH's format")?);
    let home = folder.home().canonicalize().context("the home folder is missing")?;
    let gpus = record.gpus.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let shell = Arc::new(Shell { id: record.id.clone(), home, gpus, reaper: reaper.clone() });
    let host_key = make_host_key(folder)?;
    let public = host_key.public_key().to_openssh().context("cannot write the host key")?;
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("cannot listen on a loopback port")?;
    let port = listener.local_addr().context("cannot tell the port")?.port();
    folder.set_ready(&Ready { port, pid: std::process::id(), host_key: public }).context("cannot write ready.json")?;
    tracing::info!(id = record.id, port, "ready");
    tokio::select! {
        () = accept(listener, Arc::new(config(host_key)), shell, authorized) => Ok(End::Signal),
        _ = told.recv() => Ok(End::Signal),
        _ = interrupted.recv() => Ok(End::Signal),
        () = passed(record.deadline()) => Ok(End::Deadline),
    }
}

fn make_host_key(folder: &Folder) -> Result<PrivateKey> {
    let key = PrivateKey::random(&mut safe_rng(), Algorithm::Ed25519).context("cannot make a host key")?;
    let text = key.to_openssh(LineEnding::LF).context("cannot write the host key")?;
    write_durably(&folder.path().join("host_key"), text.as_bytes()).context("cannot write the host key")?;
    Ok(key)
}

fn config(host_key: PrivateKey) -> Config {
    Config {
        methods: MethodSet::from(&[MethodKind::PublicKey][..]),
        auth_rejection_time: Duration::from_millis(100),
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![host_key],
        window_size: WINDOW,
        maximum_packet_size: 65535,
        channel_buffer_size: CHANNEL_BUFFER,
        event_buffer_size: 64,
        // A command may be silent for hours; a client that is gone is noticed by the keepalives.
        inactivity_timeout: None,
        keepalive_interval: Some(Duration::from_secs(30)),
        keepalive_max: 4,
        nodelay: true,
        ..Config::default()
    }
}

async fn accept(listener: TcpListener, config: Arc<Config>, shell: Arc<Shell>, authorized: Arc<PublicKey>) {
    let mut strangers: VecDeque<oneshot::Sender<()>> = VecDeque::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                strangers.retain(|stranger| !stranger.is_closed());
                if strangers.len() >= MOST_STRANGERS {
                    strangers.pop_front();
                }
                let (stays, turned_away) = oneshot::channel();
                strangers.push_back(stays);
                let (known, login) = oneshot::channel();
                let connection = Connection::new(Arc::clone(&shell), Arc::clone(&authorized), known);
                tokio::spawn(converse(stream, Arc::clone(&config), connection, login, turned_away));
            }
            Err(error) => {
                // Out of descriptors, most likely: those in use may become free.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

/// Serves a connection to its end. One that does not log in in time, or whose place is wanted for
/// another (`turned_away` is dropped), is hung up on.
async fn converse(
    stream: TcpStream,
    config: Arc<Config>,
    connection: Connection,
    login: oneshot::Receiver<()>,
    turned_away: oneshot::Receiver<()>,
) {
    let result = async {
        stream.set_nodelay(true)?;
        let socket = stream.into_std()?;
        let line = socket.try_clone()?;
        let stream = TcpStream::from_std(socket)?;
        let mut session = pin!(async { russh::server::run_stream(config, stream, connection).await?.await });
        let is_known = tokio::select! {
            ended = &mut session => return ended,
            Ok(()) = login => true,
            _ = turned_away => false,
            () = tokio::time::sleep(LOGIN_LIMIT) => false,
        };
        if !is_known {
            // The library serves it on its own, and ends with the line.
            line.shutdown(Shutdown::Both)?;
        }
        drop(line);
        session.await
    };
    if let Err(error) = result.await {
        tracing::debug!(%error, "a connection ended with an error");
    }
}

async fn passed(deadline: Option<u64>) {
    let Some(deadline) = deadline else { return std::future::pending().await };
    while let Some(left) = deadline.checked_sub(now()).filter(|left| *left > 0) {
        tokio::time::sleep(Duration::from_secs(left).min(DEADLINE_CHECK)).await;
    }
}

async fn end_everything(folder: &Folder, record: &Record) -> Result<()> {
    let marks = Marks::new(&record.id, folder.home(), Some(std::process::id()));
    let ended = tokio::task::spawn_blocking(move || marks.end_all()).await.map_err(io::Error::other)?;
    ended.map_err(anyhow::Error::msg)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::{Instant, timeout};

    use super::*;

    /// Serves a port within this process.
    async fn serve_here() -> SocketAddr {
        let key = || PrivateKey::random(&mut safe_rng(), Algorithm::Ed25519).unwrap();
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shell = Shell { id: "i".into(), home: "/".into(), gpus: String::new(), reaper: Reaper::default() };
        let authorized = Arc::new(key().public_key().clone());
        tokio::spawn(accept(listener, Arc::new(config(key())), Arc::new(shell), authorized));
        address
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_log_in_is_hung_up_on() {
        let (address, begun) = (serve_here().await, Instant::now());
        for said in [&b""[..], b"SSH-2.0-nobody\r\n"] {
            let mut stranger = TcpStream::connect(address).await.unwrap();
            stranger.write_all(said).await.unwrap();
            let mut heard = Vec::new();
            let ended = timeout(10 * LOGIN_LIMIT, stranger.read_to_end(&mut heard)).await;
            assert!(ended.is_ok(), "{:?} after {:?}", said, begun.elapsed());
        }
        assert!(begun.elapsed() >= 2 * LOGIN_LIMIT, "each was given its time");
    }
}
