//! A real OpenSSH server on a loopback port, with its own configuration, keys and home folder.

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use outliers::cloud::broker::SshEndpoint;
use outliers::host::keys::RunKey;
use outliers::host::transport::ssh::HostKeyPin;
use tempfile::TempDir;

/// Privilege separation folder of a root `sshd`: empty and owned by root.
const PRIVILEGE_SEPARATION: &str = "/run/sshd";

/// A running `sshd` as the current user. Ends, with every session it serves, when dropped.
pub struct Sshd {
    folder: TempDir,
    program: PathBuf,
    child: Mutex<Child>,
    port: u16,
    user: String,
    key: RunKey,
    host_key: HostKeyPin,
    mounted: bool,
}

impl Sshd {
    /// Starts a server that accepts [`Sshd::key`]. `None`, with a message, without an OpenSSH
    /// server.
    pub fn start() -> Result<Option<Self>> {
        Self::start_with("")
    }

    /// The same with more lines of `sshd_config`, which take precedence. `{folder}` in them is the
    /// server's folder.
    pub fn start_with(config: &str) -> Result<Option<Self>> {
        let Some(program) = find("sshd", &["/usr/sbin", "/usr/local/sbin", "/usr/bin", "/sbin"]) else {
            crate::not_checked("no sshd is installed");
            return Ok(None);
        };
        make_privilege_separation_folder()?;
        let mut log = String::new();
        // Another process may take the port before the server starts.
        for _ in 0..5 {
            let server = Self::prepare(&program, config)?;
            if server.is_up()? {
                return Ok(Some(server));
            }
            log = server.log();
        }
        bail!("sshd did not come up: {log}")
    }

    fn prepare(program: &Path, config: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let at = |name: &str| folder.path().join(name);
        let key = RunKey::create(folder.path(), "client_key", "test client")?;
        let host = RunKey::create(folder.path(), "host_key", "test host")?;
        fs::DirBuilder::new().mode(0o700).create(at("home"))?;
        fs::write(at("authorized_keys"), format!("{}\n", key.public_line()))?;
        let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        fs::write(at("sshd_config"), configuration(folder.path(), port, config))?;
        let child = Mutex::new(spawn(program, folder.path())?);
        let host_key = HostKeyPin::new(host.public_line())?;
        Ok(Self {
            folder,
            program: program.to_owned(),
            child,
            port,
            user: current_user()?,
            key,
            host_key,
            mounted: false,
        })
    }

    /// Whether it listens; `false` if it ended.
    fn is_up(&self) -> Result<bool> {
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until {
            if self.child().try_wait()?.is_some() {
                return Ok(false);
            }
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(false)
    }

    /// Address and user.
    pub fn endpoint(&self) -> SshEndpoint {
        SshEndpoint { host: "127.0.0.1".to_owned(), port: self.port, user: self.user.clone() }
    }

    /// The key that it accepts.
    pub fn key(&self) -> &RunKey {
        &self.key
    }

    /// Its host key.
    pub fn host_key(&self) -> &HostKeyPin {
        &self.host_key
    }

    /// `$HOME` of its sessions: an empty folder, not the user's.
    pub fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    /// Mounts a disk of this many MiB as the home folder; `false`, with a message, if mounting is
    /// not possible. It is unmounted with the server.
    pub fn shrink_home(&mut self, mib: u32) -> bool {
        self.mount_home(&format!("size={mib}m"))
    }

    /// The same with options of `mount`, as `noexec`.
    pub fn mount_home(&mut self, options: &str) -> bool {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(self.home());
        self.mounted = mount.stderr(Stdio::null()).status().is_ok_and(|status| status.success());
        if !self.mounted {
            crate::not_checked("no tmpfs can be mounted");
        }
        self.mounted
    }

    /// Accepts another public key.
    pub fn authorize(&self, public_line: &str) -> Result<()> {
        let file = self.folder.path().join("authorized_keys");
        let known = fs::read_to_string(&file)?;
        fs::write(file, format!("{known}{public_line}\n")).context("authorized_keys")
    }

    /// Log of the server.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("sshd.log")).unwrap_or_default()
    }

    fn child(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Ends the server and all sessions: connections are refused until [`Sshd::come_back`].
    pub fn go_down(&self) -> Result<()> {
        self.kill_sessions()?;
        self.child().kill()?;
        self.child().wait()?;
        Ok(())
    }

    /// Restarts it with the same port, keys and files.
    pub fn come_back(&self) -> Result<()> {
        *self.child() = spawn(&self.program, self.folder.path())?;
        match self.is_up()? {
            true => Ok(()),
            false => bail!("sshd did not come back: {}", self.log()),
        }
    }

    /// Kills the processes that serve connections, as a broken link does; the server keeps
    /// running. Returns their number.
    pub fn kill_sessions(&self) -> Result<usize> {
        self.signal_sessions("-KILL")
    }

    /// Stops those processes without ending them, so that the link stalls.
    pub fn freeze_sessions(&self) -> Result<usize> {
        self.signal_sessions("-STOP")
    }

    fn signal_sessions(&self, signal: &str) -> Result<usize> {
        let sessions = self.sessions()?;
        for pid in &sessions {
            // It may have ended.
            let _ = Command::new("kill").args([signal, &pid.to_string()]).stderr(Stdio::null()).status();
        }
        Ok(sessions.len())
    }

    /// Processes named sshd below the server.
    fn sessions(&self) -> Result<Vec<u32>> {
        let table = Command::new("ps").args(["-A", "-o", "pid=,ppid=,command="]).output().context("ps")?;
        let table = String::from_utf8_lossy(&table.stdout).into_owned();
        let rows: Vec<(u32, u32, &str)> = table
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?))
            })
            .collect();
        let mut found = vec![self.child().id()];
        let mut looked = 0;
        while let Some(&parent) = found.get(looked) {
            let children = rows.iter().filter(|(_, ppid, name)| *ppid == parent && name.contains("sshd"));
            found.extend(children.map(|(pid, ..)| *pid));
            looked += 1;
        }
        Ok(found.split_off(1))
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        // A destructor cannot report errors; a leftover process would show in the process table.
        let _ = self.kill_sessions();
        let _ = self.child().kill();
        let _ = self.child().wait();
        if self.mounted {
            let _ = Command::new("umount").arg("-l").arg(self.home()).status();
        }
    }
}

fn spawn(program: &Path, folder: &Path) -> Result<Child> {
    let log = File::options().create(true).append(true).open(folder.join("sshd.log"))?;
    Command::new(program)
        .args(["-D", "-e", "-f"])
        .arg(folder.join("sshd_config"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {}", program.display()))
}

fn configuration(folder: &Path, port: u16, first: &str) -> String {
    let folder = folder.display().to_string();
    // The first value of an option applies.
    let ours = "
        ListenAddress 127.0.0.1
        HostKey {folder}/host_key
        AuthorizedKeysFile {folder}/authorized_keys
        PidFile none
        UsePAM no
        StrictModes no
        PermitRootLogin prohibit-password
        PasswordAuthentication no
        KbdInteractiveAuthentication no
        SetEnv HOME={folder}/home
        PrintMotd no
        MaxStartups 100
        LogLevel VERBOSE
    ";
    // This option must not be repeated.
    let sftp = if first.contains("Subsystem") { "" } else { "Subsystem sftp internal-sftp" };
    format!("{first}\nPort {port}\n{ours}\n{sftp}\n").replace("{folder}", &folder)
}

/// The first program of this name in `PATH` or in `more`: `sshd` is often not in a user's path.
fn find(name: &str, more: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let listed = std::env::split_paths(&path).chain(more.iter().map(PathBuf::from));
    listed.map(|folder| folder.join(name)).find(|program| program.is_file())
}

fn current_user() -> Result<String> {
    let out = Command::new("id").arg("-un").output().context("id -un")?;
    Ok(String::from_utf8(out.stdout)?.trim().to_owned())
}

fn make_privilege_separation_folder() -> Result<()> {
    let is_root = Command::new("id").arg("-u").output().context("id -u")?.stdout.starts_with(b"0\n");
    if !is_root || Path::new(PRIVILEGE_SEPARATION).is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new()
        .mode(0o755)
        .create(PRIVILEGE_SEPARATION)
        .with_context(|| format!("sshd started by root wants the folder {PRIVILEGE_SEPARATION}, which cannot be made"))
}
