//! A host with a shell and a home folder that works, except for one attack.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use outliers::cloud::broker::SshEndpoint;
use russh::keys::{Algorithm, PrivateKey, key::safe_rng};
use russh::server::{Auth, ChannelOpenHandle, Config, Handle, Handler, Msg, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, ChannelMsg, ChannelReadHalf};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;

/// Attack on a client that logs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attack {
    /// None.
    Nothing,
    /// Commands never end and print nothing.
    Silence,
    /// Commands print a byte a second and never end.
    Drip,
    /// Commands print without end.
    Flood,
    /// Commands work; SFTP starts and never answers.
    SilentFiles,
    /// It opens channels of all kinds, the most it can.
    OpensChannels,
    /// It requests forwarding of ports and sockets.
    AsksForForwards,
}

/// What a client permitted.
#[derive(Debug, Default)]
pub(crate) struct LoginCounts {
    accepted: AtomicUsize,
    refused: AtomicUsize,
}

impl LoginCounts {
    fn count(&self, accepted: bool) {
        if accepted { &self.accepted } else { &self.refused }.fetch_add(1, Ordering::Relaxed);
    }

    /// Accepted and refused.
    pub(crate) fn read(&self) -> (usize, usize) {
        (self.accepted.load(Ordering::Relaxed), self.refused.load(Ordering::Relaxed))
    }
}

/// A running host. It ends, with its processes, on drop.
pub(crate) struct Host {
    home: TempDir,
    port: u16,
    serving: JoinHandle<()>,
}

impl Host {
    pub(crate) async fn start(bad: Attack, tally: Arc<LoginCounts>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let home = tempfile::tempdir().unwrap();
        let keys = vec![PrivateKey::random(&mut safe_rng(), Algorithm::Ed25519).unwrap()];
        let config = Arc::new(Config { keys, ..Config::default() });
        let place = home.path().to_owned();
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let channels = HashMap::new();
                let connection = Connection { bad, home: place.clone(), tally: tally.clone(), channels };
                if let Ok(running) = russh::server::run_stream(config.clone(), stream, connection).await {
                    // It ends with the client.
                    tokio::spawn(async move { drop(running.await) });
                }
            }
        });
        Self { home, port, serving }
    }

    pub(crate) fn endpoint(&self) -> SshEndpoint {
        SshEndpoint { host: "127.0.0.1".to_owned(), port: self.port, user: "root".to_owned() }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.serving.abort();
        let runs = std::fs::read_dir(self.home.path().join("outliers")).into_iter().flatten().flatten();
        for run in runs {
            for name in ["guard.pid", "worker.pid"] {
                let text = std::fs::read_to_string(run.path().join(name)).unwrap_or_default();
                let Some(pid) = text.lines().next().filter(|pid| pid.parse::<u32>().is_ok()) else { continue };
                // Each leads its own process group, and may have ended.
                let _ = Command::new("kill").args(["-9", "--", &format!("-{pid}")]).stderr(Stdio::null()).status();
            }
        }
    }
}

/// One connection.
struct Connection {
    bad: Attack,
    home: PathBuf,
    tally: Arc<LoginCounts>,
    channels: HashMap<ChannelId, Channel<Msg>>,
}

impl Handler for Connection {
    type Error = russh::Error;

    async fn auth_publickey(&mut self, _user: &str, _key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        Ok(Auth::Accept)
    }

    async fn auth_succeeded(&mut self, session: &mut Session) -> Result<(), Self::Error> {
        match self.bad {
            Attack::OpensChannels => drop(tokio::spawn(open_channels(session.handle(), self.tally.clone()))),
            Attack::AsksForForwards => drop(tokio::spawn(ask_for_forwards(session.handle(), self.tally.clone()))),
            _ => {}
        }
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        self.channels.insert(channel.id(), channel);
        reply.accept().await;
        Ok(())
    }

    async fn exec_request(&mut self, id: ChannelId, command: &[u8], session: &mut Session) -> Result<(), Self::Error> {
        session.channel_success(id)?;
        let Some(channel) = self.channels.remove(&id) else { return Ok(()) };
        match self.bad {
            // Waits for a host that opens channels, so that no command ends before it.
            Attack::Silence | Attack::OpensChannels => drop(tokio::spawn(hold(channel))),
            Attack::Drip => drop(tokio::spawn(talk(channel, 1, Duration::from_secs(1)))),
            Attack::Flood => drop(tokio::spawn(talk(channel, 30_000, Duration::ZERO))),
            _ => drop(tokio::spawn(run(command.to_vec(), self.home.clone(), channel))),
        }
        Ok(())
    }

    async fn subsystem_request(
        &mut self,
        id: ChannelId,
        _name: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        if self.bad != Attack::SilentFiles {
            return session.channel_failure(id);
        }
        session.channel_success(id)
    }
}

/// Keeps a channel open and sends nothing.
async fn hold(channel: Channel<Msg>) {
    std::future::pending::<()>().await;
    drop(channel);
}

/// Sends these bytes repeatedly until the client closes.
async fn talk(channel: Channel<Msg>, bytes: usize, pause: Duration) {
    while channel.data_bytes(vec![b'y'; bytes]).await.is_ok() {
        tokio::time::sleep(pause).await;
    }
}

/// Runs a command as a login shell does, after all of its input was received.
async fn run(command: Vec<u8>, home: PathBuf, channel: Channel<Msg>) {
    let (input, output) = channel.split();
    let fed = gather(input).await;
    let mut shell = tokio::process::Command::new("/bin/sh");
    shell.arg("-c").arg(OsStr::from_bytes(&command)).env("HOME", &home).current_dir(&home);
    let mut child = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let feed = async move {
        // A command need not read its input.
        let _ = stdin.write_all(&fed).await;
    };
    let (said, ()) = tokio::join!(child.wait_with_output(), feed);
    let said = said.unwrap();
    // An error if the client is gone.
    if !said.stdout.is_empty() {
        let _ = output.data_bytes(said.stdout).await;
    }
    if !said.stderr.is_empty() {
        let _ = output.extended_data_bytes(1, said.stderr).await;
    }
    if let Some(status) = said.status.code() {
        let _ = output.exit_status(status.unsigned_abs()).await;
    }
    let _ = output.eof().await;
    let _ = output.close().await;
}

async fn gather(mut input: ChannelReadHalf) -> Vec<u8> {
    let mut fed = Vec::new();
    while let Some(message) = input.wait().await {
        match message {
            ChannelMsg::Data { data } => fed.extend_from_slice(&data),
            ChannelMsg::Eof | ChannelMsg::Close => break,
            _ => {}
        }
    }
    fed
}

/// Number of channels opened at first; none was refused.
const MANY: usize = 81_000;

async fn open_channels(handle: Handle, tally: Arc<LoginCounts>) {
    let (host, path) = ("127.0.0.1", "/tmp/socket");
    for kind in (0..7).cycle().take(MANY) {
        let opened = match kind {
            0 => handle.channel_open_session().await,
            1 => handle.channel_open_x11(host, 6010).await,
            2 => handle.channel_open_agent().await,
            3 => handle.channel_open_forwarded_tcpip(host, 22, host, 1).await,
            4 => handle.channel_open_forwarded_streamlocal(path).await,
            5 => handle.channel_open_direct_tcpip(host, 22, host, 1).await,
            _ => handle.channel_open_direct_streamlocal(path).await,
        };
        match opened {
            Ok(_) => tally.count(true),
            Err(russh::Error::ChannelOpenFailure(_)) => tally.count(false),
            Err(_) => return,
        }
    }
}

async fn ask_for_forwards(handle: Handle, tally: Arc<LoginCounts>) {
    for port in 0..1000 {
        tally.count(handle.forward_tcpip("0.0.0.0".to_owned(), 8000 + port).await.is_ok());
    }
}

/// A wrapper of the worker: the real worker, after which `attack` alters its files.
pub(crate) fn tampering(worker: &Path, attack: &str, folder: &Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let program = folder.join("outliers-worker");
    let script = include_str!("tamper.sh").replace("WORKER", worker.to_str().unwrap()).replace("ATTACK", attack);
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    program
}
