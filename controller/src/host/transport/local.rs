//! [`Transport`] to a folder of this machine: commands are child processes, files are copied.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::program::{gather, is_flood};
use super::{ExecOutput, SendRequest, Transport, TransportError, TransportErrorKind as Kind, local_error, part_beside};
use crate::files::{absent, blocking, open_regular};

/// Bytes copied at once.
const PIECE: usize = 1 << 20;

/// Returns a lock to hold while a process starts in the folder; `None` when none may start any
/// more.
pub type Admission = dyn Fn() -> io::Result<Option<File>> + Send + Sync;

/// Commands and files in a folder, which is the home folder of every command.
pub struct LocalTransport {
    /// Name in messages.
    name: String,
    home: PathBuf,
    /// The complete environment of commands.
    environment: Vec<(String, String)>,
    admission: Box<Admission>,
}

/// Process group of a command. It is killed when this value is dropped, unless the command has
/// ended.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // The group may have ended already.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

impl LocalTransport {
    /// Commands run in `home` with only `environment`. Each command and file operation calls
    /// `admission` first.
    pub fn new(
        name: String,
        home: PathBuf,
        environment: Vec<(String, String)>,
        admission: impl Fn() -> io::Result<Option<File>> + Send + Sync + 'static,
    ) -> Self {
        Self { name, home, environment, admission: Box::new(admission) }
    }

    fn admitted(&self) -> Result<File, TransportError> {
        let gone = |why: &str| TransportError::new(Kind::Gone, format!("{}: {why}", self.name));
        match (self.admission)() {
            Ok(Some(held)) => Ok(held),
            Ok(None) => Err(gone("it has ended, or is being ended")),
            Err(error) => Err(gone(&error.to_string())),
        }
    }

    fn start(&self, command: &str) -> Result<Child, TransportError> {
        let _held = self.admitted()?;
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(command).current_dir(&self.home).process_group(0);
        shell.env_clear().envs(self.environment.iter().map(|(name, value)| (name, value)));
        shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        shell.spawn().map_err(|error| self.failed(&error))
    }

    /// An error of starting a process or pipe, which may be transient.
    fn failed(&self, error: &io::Error) -> TransportError {
        TransportError::new(Kind::Reset, format!("{}: {error}", self.name))
    }

    /// Local path of a remote one. A relative path starts in the home folder.
    fn at(&self, path: &str) -> PathBuf {
        self.home.join(path)
    }
}

#[async_trait]
impl Transport for LocalTransport {
    async fn exec(&self, command: &str, stdin: &[u8], limit: Duration) -> Result<ExecOutput, TransportError> {
        let mut child = self.start(command)?;
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        let mut group = Group(id.and_then(Pid::from_raw));
        let Ok(done) = timeout(limit, gather(&mut child, stdin)).await else {
            let message = format!("{}: a command took longer than {} s", self.name, limit.as_secs());
            return Err(TransportError::new(Kind::TimedOut, message));
        };
        let out = done.map_err(|error| self.failed(&error))?;
        // Background processes of the command keep running.
        group.0 = None;
        if is_flood(&out) {
            return Err(TransportError::new(Kind::Remote, format!("{}: a command printed too much", self.name)));
        }
        // If the instance has ended, its commands were killed and their output is not an answer.
        drop(self.admitted()?);
        Ok(out)
    }

    async fn send(&self, what: &SendRequest<'_>) -> Result<(), TransportError> {
        drop(self.admitted()?);
        let here = |error: io::Error| local_error(what.local, &error);
        let there = |error: io::Error| remote(what.remote, &error);
        let mut from = tokio::fs::File::open(what.local).await.map_err(here)?;
        let mut options = tokio::fs::OpenOptions::new();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let mut to = options.open(self.at(what.remote)).await.map_err(there)?;
        let (mut piece, mut sent) = (vec![0; PIECE], 0);
        for part in what.parts {
            from.seek(SeekFrom::Start(part.start)).await.map_err(here)?;
            to.seek(SeekFrom::Start(part.start)).await.map_err(there)?;
            let mut left = part.end - part.start;
            while left > 0 {
                let most = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
                let read = from.read(&mut piece[..most]).await.map_err(here)?;
                if read == 0 {
                    let message = format!("{} got shorter while it was sent", what.local.display());
                    return Err(TransportError::new(Kind::Local, message));
                }
                to.write_all(&piece[..read]).await.map_err(there)?;
                left -= read as u64;
                sent += read as u64;
                (what.progress)(sent);
            }
        }
        to.flush().await.map_err(there)
    }

    async fn put_bytes(&self, content: &[u8], remote: &str, mode: u32) -> Result<(), TransportError> {
        drop(self.admitted()?);
        let (path, content) = (self.at(remote), content.to_vec());
        let written = blocking(move || write_beside(&path, mode, |file| file.write_all(&content))).await;
        written.map_err(|error| self::remote(remote, &error))
    }

    async fn get(&self, remote: &str, local: &Path, limit: u64) -> Result<u64, TransportError> {
        drop(self.admitted()?);
        let path = self.at(remote);
        let opened = blocking(move || open_plain(&path)).await;
        let file = opened.map_err(|error| self::remote(remote, &error))?;
        let target = local.to_owned();
        let copied = blocking(move || {
            let mut copied = 0;
            let write = |to: &mut File| {
                // One more byte is read to detect a file that is too long.
                copied = io::copy(&mut file.take(limit.saturating_add(1)), to)?;
                if copied > limit { Err(io::Error::from(ErrorKind::FileTooLarge)) } else { Ok(()) }
            };
            write_beside(&target, 0o600, write).map(|()| copied)
        });
        copied.await.map_err(|error| match error.kind() {
            ErrorKind::FileTooLarge => {
                TransportError::new(Kind::Remote, format!("{remote}: longer than {limit} bytes"))
            }
            _ => local_error(local, &error),
        })
    }

    async fn read_from(&self, remote: &str, offset: u64, limit: u64) -> Result<Option<Vec<u8>>, TransportError> {
        drop(self.admitted()?);
        let path = self.at(remote);
        let read = blocking(move || {
            let Some(mut file) = absent(open_plain(&path))? else { return Ok(None) };
            let mut bytes = Vec::new();
            if offset < file.metadata()?.len() {
                file.seek(SeekFrom::Start(offset))?;
                file.take(limit).read_to_end(&mut bytes)?;
            }
            Ok(Some(bytes))
        });
        read.await.map_err(|error| self::remote(remote, &error))
    }
}

/// Writes a file to a temporary name beside `path`, syncs it and renames it over `path`.
fn write_beside(path: &Path, mode: u32, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let part = part_beside(path);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&part)?;
    let written = write(&mut file)
        .and_then(|()| file.set_permissions(fs::Permissions::from_mode(mode)))
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&part, path));
    if written.is_err() {
        // The file may not exist.
        let _ = fs::remove_file(&part);
    }
    written
}

/// Opens a plain file. A link is refused.
fn open_plain(path: &Path) -> io::Result<File> {
    match fs::symlink_metadata(path)?.is_symlink() {
        true => Err(io::Error::other("it is a link")),
        false => open_regular(path),
    }
}

fn remote(path: &str, error: &io::Error) -> TransportError {
    let full = matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
    TransportError::new(if full { Kind::NoSpace } else { Kind::Remote }, format!("{path}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    /// A folder, its transport, and a flag whether it admits processes.
    fn scene() -> (tempfile::TempDir, LocalTransport, Arc<AtomicBool>) {
        let folder = tempfile::tempdir().unwrap();
        let open = Arc::new(AtomicBool::new(true));
        let (gate, admits) = (folder.path().to_owned(), Arc::clone(&open));
        let admission = move || File::open(&gate).map(|file| admits.load(Ordering::SeqCst).then_some(file));
        let variables = [("PATH", "/usr/bin:/bin"), ("A", "it's")];
        let environment = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        let transport = LocalTransport::new("here".into(), folder.path().to_owned(), environment, admission);
        (folder, transport, open)
    }

    #[tokio::test]
    async fn command_gets_folder_and_environment_and_returns_status() {
        let (folder, here, _) = scene();
        let out = here.exec("pwd; printf %s \"$A${HOME-}\" >&2; cat; exit 7", b"in", LIMIT).await.unwrap();
        let home = folder.path().canonicalize().unwrap();
        assert_eq!(String::from_utf8(out.stdout).unwrap(), format!("{}\nin", home.display()));
        assert_eq!((out.status, &out.stderr[..]), (Some(7), &b"it's"[..]));
        assert_eq!(here.exec("kill -9 $$", b"", LIMIT).await.unwrap().status, None, "unknown, never success");
        let much = vec![b'x'; 1 << 20];
        assert_eq!(here.exec("cat", &much, LIMIT).await.unwrap().stdout, much);
        assert_eq!(here.exec("exit 3", &much, LIMIT).await.unwrap().status, Some(3), "it reads nothing");
        let flood = here.exec("yes", b"", LIMIT).await.unwrap_err();
        assert_eq!(flood.kind, Kind::Remote, "{flood}");
    }

    /// Whether a process exists and is not a zombie.
    fn lives(pid: &str) -> bool {
        let out = std::process::Command::new("ps").args(["-o", "stat=", "-p", pid.trim()]).output().unwrap();
        !out.stdout.is_empty() && !out.stdout.starts_with(b"Z")
    }

    #[tokio::test]
    async fn cancelled_command_kills_its_children_and_finished_one_does_not() {
        let (folder, here, _) = scene();
        let late = here.exec("sleep 1000", b"", Duration::from_millis(100)).await.unwrap_err();
        assert_eq!(late.kind, Kind::TimedOut, "{late}");
        let file = folder.path().join("pid");
        let started = async {
            while !fs::read_to_string(&file).is_ok_and(|pid| pid.ends_with('\n')) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            out = here.exec("sleep 1000 & echo $! > pid; wait", b"", LIMIT) => panic!("{out:?}"),
            () = started => {}
        }
        let pid = fs::read_to_string(&file).unwrap();
        let begun = std::time::Instant::now();
        while lives(&pid) {
            assert!(begun.elapsed() < LIMIT, "it lives on");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let left = here.exec("sleep 1000 > /dev/null 2>&1 & echo $!", b"", LIMIT).await.unwrap();
        let pid = String::from_utf8(left.stdout).unwrap();
        assert!(lives(&pid));
        assert_eq!(here.exec(&format!("kill {pid}"), b"", LIMIT).await.unwrap().status, Some(0));
    }

    #[tokio::test]
    async fn files_transfer_intact_and_only_regular_ones_are_read() {
        let (folder, here, _) = scene();
        let path = |name: &str| folder.path().join(name);
        let content: Vec<u8> = (0..3 << 20).map(|i| (i % 251) as u8).collect();
        fs::write(path("from"), &content).unwrap();
        let sent = std::sync::Mutex::new(0);
        let progress = |bytes| *sent.lock().unwrap() = bytes;
        let parts = [0..1 << 20, 2 << 20..3 << 20];
        let (local, remote) = (path("from"), path("to"));
        let remote = remote.to_str().unwrap();
        let what = SendRequest { local: &local, remote, parts: &parts, progress: &progress };
        here.send(&what).await.unwrap();
        let there = fs::read(path("to")).unwrap();
        assert!(there.len() == content.len() && there[..1 << 20] == content[..1 << 20]);
        assert!(there[1 << 20..2 << 20].iter().all(|b| *b == 0) && there[2 << 20..] == content[2 << 20..]);
        assert_eq!(*sent.lock().unwrap(), 2 << 20);
        assert_eq!(fs::metadata(path("to")).unwrap().permissions().mode() & 0o777, 0o600);

        here.put_bytes(b"small", "to", 0o640).await.unwrap();
        assert_eq!(fs::metadata(path("to")).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(here.get("to", &path("back"), 5).await.unwrap(), 5);
        assert_eq!(fs::read(path("back")).unwrap(), b"small");
        assert_eq!(here.get("to", &path("none"), 4).await.unwrap_err().kind, Kind::Remote, "longer than allowed");
        assert_eq!(here.read_from("to", 3, 100).await.unwrap().unwrap(), b"ll");
        assert_eq!(here.read_from("to", u64::MAX / 2 + 9, 100).await.unwrap().unwrap(), b"");
        assert_eq!(here.read_from("nothing", 0, 1).await.unwrap(), None);
        assert_eq!(here.get("nothing", &path("none"), 4).await.unwrap_err().kind, Kind::Remote);
        std::os::unix::fs::symlink("to", path("link")).unwrap();
        fs::create_dir(path("folder")).unwrap();
        for odd in ["link", "folder"] {
            assert_eq!(here.read_from(odd, 0, 1).await.unwrap_err().kind, Kind::Remote, "{odd}");
        }
        for nowhere in ["folder", "no/x"] {
            assert!(here.put_bytes(b"x", nowhere, 0o644).await.is_err(), "{nowhere}");
        }
        let mut names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["back", "folder", "from", "link", "to"], "nothing half-written is left");
    }

    #[tokio::test]
    async fn closed_instance_refuses_commands_and_uploads() {
        let (folder, here, open) = scene();
        open.store(false, Ordering::SeqCst);
        let gone = here.exec("touch ran", b"", LIMIT).await.unwrap_err();
        assert!(gone.kind == Kind::Gone && gone.kind.is_transient(), "{gone}");
        assert_eq!(here.put_bytes(b"x", "x", 0o600).await.unwrap_err().kind, Kind::Gone);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
