//! [`Transport`] by the `ssh` program of this machine. Aliases, jump hosts, keys, agents and host
//! keys follow OpenSSH and the user's `~/.ssh/config`. A second factor is entered where the user
//! logs in, never here.
//!
//! All commands share one connection (`ControlMaster`). If the user's configuration has an open
//! one, it is used. The program's own connection ends with this process in any case, since it
//! lives as long as a pipe to it.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use rand::Rng;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::quote::quote;
use super::scripts::{self, demand, in_sh};
use super::{
    ExecOutput, SendRequest, Transport, TransportError, TransportErrorKind as Kind, local_error, part_beside, settle,
};
use crate::files::create_private_folder;
use crate::text::clean;

/// Time limit from the start of `ssh` to a session.
const LOGIN_LIMIT: Duration = Duration::from_secs(45);
/// Time without transferred bytes after which the connection counts as lost.
const STALL: Duration = Duration::from_secs(60);
/// Time limit of a command that writes its input.
const WRITE_LIMIT: Duration = Duration::from_secs(120);
/// Maximum output of one command in bytes.
const MAX_OUTPUT: u64 = 64 << 20;
/// Bytes handed over at once.
const PIECE: usize = 256 << 10;
/// Maximum length of a socket's path: 108 bytes on Linux, 104 elsewhere, minus the 17 that `ssh`
/// adds.
const LONGEST_SOCKET: usize = 85;
/// Printed by the shared connection when it is open.
const READY: &[u8] = b"@outliers@";
/// Exit status of `ssh` itself.
const OWN_FAILURE: i32 = 255;

/// Commands and files on one host by the `ssh` program.
pub struct OpenSsh {
    host: String,
    config: Option<PathBuf>,
    socket: PathBuf,
    line: Mutex<Line>,
}

/// The connection that commands use.
enum Line {
    /// No connection yet, or it is lost.
    None,
    /// The user's open connection.
    Theirs,
    /// This program's connection.
    Ours(Box<Child>),
}

impl OpenSsh {
    /// Commands on `host`, an alias of the user's configuration or `user@name`. `config` replaces
    /// `~/.ssh/config`; the connection's socket is in `folder`.
    ///
    /// # Errors
    /// The host's name is invalid, or the folder's path is too long for a socket.
    pub fn new(host: &str, config: Option<&Path>, folder: &Path) -> Result<Self, TransportError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let plain = |c: char| !c.is_whitespace() && !c.is_control();
        if host.is_empty() || host.starts_with('-') || !host.chars().all(plain) {
            return Err(TransportError::new(Kind::Local, format!("{host:?} is not a host name")));
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let socket = folder.join(format!("ssh-{}-{number}", std::process::id()));
        if socket.as_os_str().len() > LONGEST_SOCKET {
            let message = "its path is too long for a socket; set OUTLIERS_STATE to a shorter one";
            let message = format!("{}: {message}", folder.display());
            return Err(TransportError::new(Kind::Local, message));
        }
        let line = Mutex::new(Line::None);
        Ok(Self { host: host.to_owned(), config: config.map(Path::to_owned), socket, line })
    }

    /// The command line that opens a shell on the host, without the command to run.
    pub fn shell(&self) -> Vec<String> {
        let config = self.config.iter().flat_map(|path| ["-F".to_owned(), path.to_string_lossy().into_owned()]);
        config.chain(["-t", "--", &self.host].map(str::to_owned)).collect()
    }

    /// User, host and port by the configuration; `None` where `ssh` does not print them.
    pub async fn resolve(&self) -> Option<(String, String, u16)> {
        let out = self.program().arg("-G").args(["--", &self.host]).output().await.ok()?;
        let text = String::from_utf8(out.stdout).ok()?;
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        Some((value("user")?.to_owned(), value("hostname")?.to_owned(), value("port")?.parse().ok()?))
    }

    /// `ssh` without prompts. It refuses unknown host keys.
    fn program(&self) -> Command {
        let mut command = Command::new("ssh");
        if let Some(config) = &self.config {
            command.arg("-F").arg(config);
        }
        for option in ["BatchMode=yes", "StrictHostKeyChecking=yes", "ConnectTimeout=20", "LogLevel=ERROR"] {
            command.args(["-o", option]);
        }
        command.args(["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3", "-T"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    fn over(&self, mut command: Command, master: &str) -> Command {
        // `ssh` expands a per cent sign in its options.
        let path = self.socket.to_string_lossy().replace('%', "%%");
        command.args(["-o", &format!("ControlMaster={master}"), "-o", &format!("ControlPath={path}")]);
        command.args(["-o", "ControlPersist=no"]);
        command
    }

    /// `ssh` over the shared connection, which is opened if there is none.
    async fn ssh(&self) -> Result<Command, TransportError> {
        let mut line = self.line.lock().await;
        let lives = match &mut *line {
            Line::None => false,
            Line::Theirs => true,
            Line::Ours(child) => matches!(child.try_wait(), Ok(None)),
        };
        if !lives {
            *line = self.connect().await?;
        }
        Ok(match &*line {
            Line::Ours(_) => self.over(self.program(), "no"),
            Line::None | Line::Theirs => self.program(),
        })
    }

    async fn connect(&self) -> Result<Line, TransportError> {
        let mut check = self.program();
        let check = check.args(["-O", "check", "--", &self.host]).output();
        let checked = timeout(LOGIN_LIMIT, check).await.map_err(|_| self.late("ssh -O check", LOGIN_LIMIT))?;
        if checked.map_err(|error| self.not_run(&error))?.status.success() {
            return Ok(Line::Theirs);
        }
        self.make_folder()?;
        let mut command = self.over(self.program(), "yes");
        command.stdin(Stdio::piped()).args(["--", &self.host, "echo @outliers@; cat > /dev/null"]);
        // The connection ends when its standard input closes, which this process holds.
        let mut child = command.kill_on_drop(false).spawn().map_err(|error| self.not_run(&error))?;
        match timeout(LOGIN_LIMIT, self.greeting(&mut child)).await {
            Ok(Ok(())) => Ok(Line::Ours(Box::new(child))),
            Ok(Err(error)) => Err(error),
            Err(_) => {
                // The program may be waiting for a server that does not answer.
                let _ = child.kill().await;
                Err(self.late("login", LOGIN_LIMIT))
            }
        }
    }

    /// Waits for the remote greeting, or for the program's end with its reason.
    async fn greeting(&self, child: &mut Child) -> Result<(), TransportError> {
        let mut said = Vec::new();
        if let Some(stdout) = child.stdout.as_mut() {
            let mut piece = [0; 1024];
            while !said.windows(READY.len()).any(|words| words == READY) && said.len() < 1 << 20 {
                match stdout.read(&mut piece).await {
                    Ok(read) if read > 0 => said.extend_from_slice(&piece[..read]),
                    _ => return Err(self.ended(child).await),
                }
            }
        }
        Ok(())
    }

    async fn ended(&self, child: &mut Child) -> TransportError {
        let mut words = Vec::new();
        if let Some(stderr) = child.stderr.take() {
            // Unreadable output is ignored.
            let _ = stderr.take(1 << 16).read_to_end(&mut words).await;
        }
        let _ = child.wait().await;
        self.failure(&words)
    }

    fn make_folder(&self) -> Result<(), TransportError> {
        let folder = self.socket.parent().unwrap_or_else(|| Path::new("/"));
        create_private_folder(folder).map_err(|error| local_error(folder, &error))
    }

    /// The error for a failure of `ssh` itself.
    fn failure(&self, stderr: &[u8]) -> TransportError {
        let words = clean(stderr, 400);
        let lower = words.to_lowercase();
        let has = |parts: &[&str]| parts.iter().any(|part| lower.contains(part));
        let kind = match () {
            () if has(&["host key verification failed", "host key is known", "identification has changed"]) => {
                Kind::HostKeyChanged
            }
            () if has(&["permission denied", "too many authentication failures"]) => Kind::AuthFailed,
            () if has(&["connection refused"]) => Kind::Refused,
            () if has(&["could not resolve", "no route", "unreachable", "timed out"]) => Kind::Unreachable,
            () if has(&["bad configuration", "no such file"]) => Kind::Local,
            () => Kind::Reset,
        };
        let host = &self.host;
        let hint = match kind {
            Kind::HostKeyChanged => format!(" (log in once with `ssh {host}` and compare the key that it shows)"),
            Kind::AuthFailed => format!(
                " (nobody is asked here: load the key into the agent; where a password or a second factor is \
                 wanted, set ControlMaster and ControlPath in ~/.ssh/config and keep one `ssh {host}` open)"
            ),
            _ => String::new(),
        };
        let words = if words.is_empty() { "the connection broke off".to_owned() } else { words };
        TransportError::new(kind, format!("{host}: {words}{hint}"))
    }

    fn not_run(&self, error: &std::io::Error) -> TransportError {
        TransportError::new(Kind::Local, format!("ssh cannot be run: {error}; install OpenSSH's client"))
    }

    fn late(&self, what: &str, limit: Duration) -> TransportError {
        TransportError::new(Kind::TimedOut, format!("{}: {what} took longer than {} s", self.host, limit.as_secs()))
    }

    async fn spawn(&self, command: &str) -> Result<Child, TransportError> {
        let mut ssh = self.ssh().await?;
        ssh.stdin(Stdio::piped()).args(["--", &self.host, command]);
        ssh.spawn().map_err(|error| self.not_run(&error))
    }

    /// Waits for a command and collects its output.
    async fn gather(&self, child: &mut Child, stdin: &[u8]) -> Result<ExecOutput, TransportError> {
        let out = gather(child, stdin).await.map_err(|error| self.not_read(&error))?;
        if is_flood(&out) {
            let message = format!("{}: a command printed more than {} MiB", self.host, MAX_OUTPUT >> 20);
            return Err(TransportError::new(Kind::Remote, message));
        }
        match out.status {
            Some(OWN_FAILURE) | None => Err(self.failure(&out.stderr)),
            _ => Ok(out),
        }
    }

    fn not_read(&self, error: &std::io::Error) -> TransportError {
        TransportError::new(Kind::Reset, format!("{}: {error}", self.host))
    }

    /// Output of a script that must succeed.
    async fn demand(&self, path: &str, script: &str, stdin: &[u8]) -> Result<Vec<u8>, TransportError> {
        demand(path, self.exec(script, stdin, WRITE_LIMIT).await?)
    }

    async fn send_part(&self, what: &SendRequest<'_>, start: u64, end: u64, before: u64) -> Result<(), TransportError> {
        let here = |error: std::io::Error| local_error(what.local, &error);
        let mut file = tokio::fs::File::open(what.local).await.map_err(here)?;
        file.seek(std::io::SeekFrom::Start(start)).await.map_err(here)?;
        let mut child = self.spawn(&scripts::write_at(what.remote, start)).await?;
        let mut to = child.stdin.take();
        let (mut piece, mut sent) = (vec![0; PIECE], 0);
        while sent < end - start {
            let most = usize::try_from(end - start - sent).unwrap_or(PIECE).min(PIECE);
            let read = file.read(&mut piece[..most]).await.map_err(here)?;
            if read == 0 {
                let message = format!("{} got shorter while it was sent", what.local.display());
                return Err(TransportError::new(Kind::Local, message));
            }
            let Some(to) = &mut to else { break };
            match timeout(STALL, to.write_all(&piece[..read])).await {
                Ok(Ok(())) => {}
                // The program has ended. Its status is read below.
                Ok(Err(_)) => break,
                Err(_) => return Err(self.late("an upload", STALL)),
            }
            sent += read as u64;
            (what.progress)(before + sent);
        }
        drop(to);
        let out = timeout(WRITE_LIMIT, self.gather(&mut child, &[])).await;
        let out = out.map_err(|_| self.late("the end of an upload", WRITE_LIMIT))??;
        demand(what.remote, out).map(drop)
    }

    /// Copies a remote file of at most `limit` bytes to `part`.
    async fn download(&self, remote: &str, part: &Path, limit: u64) -> Result<u64, TransportError> {
        let here = |error: std::io::Error| local_error(part, &error);
        let mut file = tokio::fs::File::create_new(part).await.map_err(here)?;
        let mut child = self.spawn(&scripts::cat(remote)).await?;
        let mut from = child.stdout.take();
        let (mut piece, mut got) = (vec![0; PIECE], 0);
        while let Some(from) = &mut from {
            let read = timeout(STALL, from.read(&mut piece)).await.map_err(|_| self.late("a download", STALL))?;
            let read = read.map_err(|error| self.not_read(&error))?;
            if read == 0 {
                break;
            }
            got += read as u64;
            if got > limit {
                return Err(TransportError::new(Kind::Remote, format!("{remote}: longer than {limit} bytes")));
            }
            file.write_all(&piece[..read]).await.map_err(here)?;
        }
        let out = timeout(WRITE_LIMIT, self.gather(&mut child, &[])).await;
        let out = out.map_err(|_| self.late("the end of a download", WRITE_LIMIT))??;
        if scripts::content(remote, out)?.is_none() {
            return Err(TransportError::new(Kind::Remote, format!("{remote}: no such file")));
        }
        file.flush().await.map_err(here)?;
        file.sync_all().await.map_err(here)?;
        Ok(got)
    }
}

/// Writes a child's input, waits for its end and returns its output. A stream that exceeds the
/// limit is closed.
pub(super) async fn gather(child: &mut Child, stdin: &[u8]) -> std::io::Result<ExecOutput> {
    let (mut to, out, err) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let feed = async {
        if let Some(to) = &mut to {
            // A command need not read its input.
            let _ = to.write_all(stdin).await;
        }
        drop(to.take());
    };
    let (_, stdout, stderr) = tokio::join!(feed, read_all(out), read_all(err));
    let (stdout, stderr) = (stdout?, stderr?);
    Ok(ExecOutput { status: child.wait().await?.code(), stdout, stderr })
}

/// Whether a command printed more than the limit.
pub(super) fn is_flood(out: &ExecOutput) -> bool {
    out.stdout.len().max(out.stderr.len()) as u64 > MAX_OUTPUT
}

/// Reads a stream up to one byte more than the limit.
async fn read_all(from: Option<impl AsyncRead + Unpin>) -> std::io::Result<Vec<u8>> {
    let mut all = Vec::new();
    if let Some(from) = from {
        from.take(MAX_OUTPUT + 1).read_to_end(&mut all).await?;
    }
    Ok(all)
}

#[async_trait]
impl Transport for OpenSsh {
    async fn exec(&self, command: &str, stdin: &[u8], limit: Duration) -> Result<ExecOutput, TransportError> {
        let run = async {
            let mut child = self.spawn(command).await?;
            self.gather(&mut child, stdin).await
        };
        timeout(limit, run).await.map_err(|_| self.late("a command", limit))?
    }

    async fn send(&self, what: &SendRequest<'_>) -> Result<(), TransportError> {
        self.demand(what.remote, &scripts::make(what.remote), &[]).await?;
        let mut before = 0;
        for part in what.parts {
            self.send_part(what, part.start, part.end, before).await?;
            before += part.end - part.start;
        }
        Ok(())
    }

    async fn put_bytes(&self, content: &[u8], remote: &str, mode: u32) -> Result<(), TransportError> {
        let part = format!("{remote}.part.{:016x}", rand::rng().random::<u64>());
        let (file, target, bytes) = (quote(&part), quote(remote), content.len());
        // A shell that is killed mid-stream may still report success, so the script checks the
        // length.
        let script = format!(
            "umask 077; set -C; if [ -d {target} ]; then echo 'is a folder' >&2; exit 1; fi; \
             cat > {file} && [ $(wc -c < {file}) -eq {bytes} ] && chmod {mode:o} {file} && mv -f {file} {target} || \
             {{ rm -f {file}; exit 1; }}"
        );
        self.demand(remote, &in_sh(&script), content).await.map(drop)
    }

    async fn get(&self, remote: &str, local: &Path, limit: u64) -> Result<u64, TransportError> {
        let part = part_beside(local);
        let got = self.download(remote, &part, limit).await;
        settle(&part, local, got)
    }

    async fn read_from(&self, remote: &str, offset: u64, limit: u64) -> Result<Option<Vec<u8>>, TransportError> {
        let out = self.exec(&scripts::read(remote, offset, limit), &[], WRITE_LIMIT).await?;
        scripts::content(remote, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(host: &str) -> Result<OpenSsh, TransportError> {
        OpenSsh::new(host, None, Path::new("/tmp/x"))
    }

    #[test]
    fn ssh_host_is_never_an_option_and_socket_path_fits() {
        for host in ["", "-oProxyCommand=x", "a b", "a\nb"] {
            assert!(at(host).is_err(), "{host:?}");
        }
        assert!(at("me@login.cluster.edu").is_ok() && at("alias").is_ok());
        let long = OpenSsh::new("a", None, Path::new(&format!("/{}", "x".repeat(90))));
        assert!(long.is_err_and(|error| error.message.contains("OUTLIERS_STATE")));
    }

    #[test]
    fn ssh_error_messages_map_to_kinds() {
        let ssh = at("c").unwrap();
        for (words, kind, hint) in [
            ("Host key verification failed.", Kind::HostKeyChanged, "ssh c"),
            ("No ED25519 host key is known for c and you have requested", Kind::HostKeyChanged, "ssh c"),
            ("me@c: Permission denied (publickey,keyboard-interactive).", Kind::AuthFailed, "ControlMaster"),
            ("ssh: connect to host c port 22: Connection refused", Kind::Refused, ""),
            ("ssh: Could not resolve hostname c: Name or service not known", Kind::Unreachable, ""),
            ("Connection to c closed by remote host.", Kind::Reset, ""),
            ("", Kind::Reset, ""),
        ] {
            let error = ssh.failure(words.as_bytes());
            assert!(error.kind == kind && error.message.contains(hint), "{words}: {error:?}");
        }
        let full = ExecOutput { status: Some(1), stdout: Vec::new(), stderr: b"dd: f: Disk quota exceeded".to_vec() };
        assert_eq!(demand("f", full).unwrap_err().kind, Kind::NoSpace);
    }
}
