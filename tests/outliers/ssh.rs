//! The SSH transport against a real OpenSSH server.

use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use outliers::cloud::broker::SshEndpoint;
use outliers::host::keys::RunKey;
use outliers::host::transport::ssh::{HostKeyPin, SshTransport};
use outliers::host::transport::{SendRequest, Transport, TransportError, TransportErrorKind as Kind};
use outliers_tests::noise;
use outliers_tests::sshd::Sshd;
use sha2::{Digest, Sha256};

const LIMIT: Duration = Duration::from_secs(30);

async fn connect(server: &Sshd) -> SshTransport {
    let pin = Some(server.host_key());
    SshTransport::connect(&server.endpoint(), server.key().private_path(), pin).await.unwrap().0
}

/// Sends a whole file.
async fn put(
    ssh: &SshTransport,
    local: &Path,
    remote: &str,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(), TransportError> {
    let whole = 0..local.metadata().map_or(1, |facts| facts.len());
    ssh.send(&SendRequest { local, remote, parts: std::slice::from_ref(&whole), progress }).await
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[tokio::test]
async fn commands_return_status_output_and_signals() {
    let Some(server) = Sshd::start().unwrap() else { return };
    let ssh = connect(&server).await;
    let out = ssh.exec("printf out; printf err >&2; exit 7", b"", LIMIT).await.unwrap();
    assert_eq!((out.status, &out.stdout[..], &out.stderr[..]), (Some(7), &b"out"[..], &b"err"[..]));
    let out = ssh.exec("kill -9 $$", b"", LIMIT).await.unwrap();
    assert_eq!(out.status, None, "a signal is no status");
    let out = ssh.exec("true", &noise(300_000), LIMIT).await.unwrap();
    assert_eq!(out.status, Some(0), "input that nobody reads is no error");
    let out = ssh.exec("no-such-program", b"", LIMIT).await.unwrap();
    assert_eq!(out.status, Some(127));
    let out = ssh.exec("echo $HOME", b"", LIMIT).await.unwrap();
    assert_eq!(String::from_utf8(out.stdout).unwrap().trim(), server.home().to_str().unwrap());
}

#[tokio::test]
async fn large_streams_flow_both_ways_concurrently() {
    let Some(server) = Sshd::start().unwrap() else { return };
    let ssh = connect(&server).await;
    let content = noise(20_000_000);
    let out = ssh.exec("cat", &content, LIMIT).await.unwrap();
    assert_eq!((out.status, out.stdout.len()), (Some(0), content.len()));
    assert_eq!(sha256(&out.stdout), sha256(&content));
    let flood = ssh.exec("yes outliers", b"", LIMIT).await.unwrap_err();
    assert_eq!(flood.kind, Kind::Remote, "{flood}");
    assert_eq!(ssh.exec("echo still there", b"", LIMIT).await.unwrap().stdout, b"still there\n");
}

#[tokio::test]
async fn commands_run_concurrently_and_end_at_their_time_limit() {
    let Some(server) = Sshd::start().unwrap() else { return };
    let ssh = connect(&server).await;
    // Each waits for the other.
    let first = ssh.exec("touch a; until [ -e b ]; do sleep 0.05; done; echo a", b"", LIMIT);
    let second = ssh.exec("touch b; until [ -e a ]; do sleep 0.05; done; echo b", b"", LIMIT);
    let both = tokio::join!(first, second);
    assert_eq!((both.0.unwrap().stdout, both.1.unwrap().stdout), (b"a\n".to_vec(), b"b\n".to_vec()));
    let late = ssh.exec("sleep 60", b"", Duration::from_millis(300)).await.unwrap_err();
    assert_eq!(late.kind, Kind::TimedOut, "{late}");
    assert_eq!(ssh.exec("echo again", b"", LIMIT).await.unwrap().stdout, b"again\n");
}

#[tokio::test]
async fn files_transfer_intact_over_sftp_and_cat() {
    let servers = [
        ("", "sftp"),
        ("Subsystem sftp /bin/false", "a server whose sftp is broken"),
        ("Subsystem other internal-sftp", "a server without sftp"),
        ("MaxSessions 2", "a server with few channels"),
    ];
    for (config, name) in servers {
        let Some(server) = Sshd::start_with(config).unwrap() else { return };
        round_trip(&server, name).await;
    }
}

async fn round_trip(server: &Sshd, name: &str) {
    let ssh = connect(server).await;
    let content = noise(20_000_003);
    let (here, remote) = (tempfile::tempdir().unwrap(), server.home().join("it's a file"));
    let remote = remote.to_str().unwrap();
    let (from, back) = (here.path().join("from"), here.path().join("back"));
    std::fs::write(&from, &content).unwrap();
    let told = AtomicU64::new(0);
    put(&ssh, &from, remote, &|sent| {
        told.fetch_max(sent, Ordering::Relaxed);
    })
    .await
    .unwrap();
    assert_eq!(told.into_inner(), content.len() as u64, "{name}");
    assert_eq!(sha256(&std::fs::read(remote).unwrap()), sha256(&content), "{name}");
    assert_eq!(mode(Path::new(remote)), 0o600, "{name}: nobody else's before it is whole");
    // Over the existing file, and with another mode.
    ssh.put_bytes(b"", remote, 0o755).await.unwrap();
    assert_eq!(std::fs::read(remote).unwrap(), b"", "{name}");
    assert_eq!(mode(Path::new(remote)), 0o755, "{name}");
    ssh.put_bytes(&content, remote, 0o644).await.unwrap();
    assert_eq!(ssh.get(remote, &back, content.len() as u64).await.unwrap(), content.len() as u64, "{name}");
    assert_eq!(sha256(&std::fs::read(&back).unwrap()), sha256(&content), "{name}");
    let too_long = ssh.get(remote, &here.path().join("no"), content.len() as u64 - 1).await.unwrap_err();
    assert_eq!(too_long.kind, Kind::Remote, "{name}: {too_long}");
    assert_eq!(ssh.read_from(remote, 19_999_999, 100).await.unwrap().unwrap(), content[19_999_999..], "{name}");
    assert_eq!(ssh.read_from(remote, 7, 1000).await.unwrap().unwrap(), content[7..1007], "{name}");
    assert_eq!(ssh.read_from(remote, 20_000_003, 10).await.unwrap().unwrap(), b"", "{name}");
    assert_eq!(ssh.read_from(remote, u64::MAX / 2, 10).await.unwrap().unwrap(), b"", "{name}");
    refuses_what_is_no_file(&ssh, server, here.path(), name).await;
    let left = |folder: &Path| std::fs::read_dir(folder).unwrap().count();
    assert_eq!(left(here.path()), 2, "{name}: temporary files stay here");
    assert_eq!(left(&server.home()), 3, "{name}: temporary files stay there");
}

/// Leaves a link and a folder in the server's home.
async fn refuses_what_is_no_file(ssh: &SshTransport, server: &Sshd, here: &Path, name: &str) {
    let at = |file: &str| server.home().join(file).to_str().unwrap().to_owned();
    std::os::unix::fs::symlink("/etc/passwd", at("link")).unwrap();
    std::fs::create_dir(at("folder")).unwrap();
    assert_eq!(ssh.read_from(&at("none"), 0, 10).await.unwrap(), None, "{name}");
    assert_eq!(ssh.get(&at("none"), &here.join("none"), 10).await.unwrap_err().kind, Kind::Remote, "{name}");
    for odd in ["link", "folder"] {
        assert_eq!(ssh.read_from(&at(odd), 0, 10).await.unwrap_err().kind, Kind::Remote, "{name}: {odd}");
        assert_eq!(ssh.get(&at(odd), &here.join(odd), 1 << 20).await.unwrap_err().kind, Kind::Remote, "{name}: {odd}");
    }
    assert!(ssh.put_bytes(b"x", &at("folder"), 0o644).await.is_err(), "{name}: a file over a folder");
    assert!(ssh.put_bytes(b"x", &at("none/file"), 0o644).await.is_err(), "{name}: a file in no folder");
    let missing = put(ssh, &here.join("nothing"), &at("x"), &|_| {}).await.unwrap_err();
    assert_eq!(missing.kind, Kind::Local, "{name}: {missing}");
}

fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn transfers_survive_rekeying() {
    let Some(server) = Sshd::start_with("RekeyLimit 1M").unwrap() else { return };
    let ssh = connect(&server).await;
    let here = tempfile::tempdir().unwrap();
    let content = noise(12_000_000);
    std::fs::write(here.path().join("from"), &content).unwrap();
    let remote = server.home().join("file");
    put(&ssh, &here.path().join("from"), remote.to_str().unwrap(), &|_| {}).await.unwrap();
    ssh.get(remote.to_str().unwrap(), &here.path().join("back"), 1 << 30).await.unwrap();
    assert_eq!(sha256(&std::fs::read(here.path().join("back")).unwrap()), sha256(&content));
}

#[tokio::test]
async fn wrong_client_and_host_keys_give_different_errors() {
    let Some(server) = Sshd::start().unwrap() else { return };
    let folder = tempfile::tempdir().unwrap();
    let stranger = RunKey::create(folder.path(), "stranger", "").unwrap();
    let refused = attempt(&server.endpoint(), stranger.private_path(), None).await;
    assert_eq!(refused.kind, Kind::AuthFailed, "{refused}");
    server.authorize(stranger.public_line()).unwrap();
    SshTransport::connect(&server.endpoint(), stranger.private_path(), None).await.unwrap();

    let other = HostKeyPin::new(stranger.public_line()).unwrap();
    let changed = attempt(&server.endpoint(), server.key().private_path(), Some(&other)).await;
    assert_eq!(changed.kind, Kind::HostKeyChanged, "{changed}");
    assert!(
        changed.message.contains(&other.fingerprint()) && changed.message.contains(&server.host_key().fingerprint())
    );
    // Trusted on first use, then pinned.
    let (_, seen) = SshTransport::connect(&server.endpoint(), server.key().private_path(), None).await.unwrap();
    assert_eq!(&seen, server.host_key());
    let by_print = HostKeyPin::new(&seen.fingerprint()).unwrap();
    SshTransport::connect(&server.endpoint(), server.key().private_path(), Some(&by_print)).await.unwrap();

    let no_key = attempt(&server.endpoint(), &folder.path().join("none"), None).await;
    assert_eq!(no_key.kind, Kind::Local, "{no_key}");
}

async fn attempt(endpoint: &SshEndpoint, key: &Path, pin: Option<&HostKeyPin>) -> TransportError {
    SshTransport::connect(endpoint, key, pin).await.err().expect("this must not connect")
}

#[tokio::test]
async fn silent_ports_give_different_errors() {
    let folder = tempfile::tempdir().unwrap();
    let key = RunKey::create(folder.path(), "key", "").unwrap();
    let at = |host: &str, port| SshEndpoint { host: host.to_owned(), port, user: "root".to_owned() };
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let refused = attempt(&at("127.0.0.1", free), key.private_path(), None).await;
    assert_eq!(refused.kind, Kind::Refused, "{refused}");
    let unknown = attempt(&at("no-such-host.invalid", 22), key.private_path(), None).await;
    assert_eq!(unknown.kind, Kind::Unreachable, "{unknown}");
    for rude in [Rude::Close, Rude::Reset, Rude::CloseAfterGreeting, Rude::Excuse] {
        let port = rude_server(rude);
        let reset = attempt(&at("127.0.0.1", port), key.private_path(), None).await;
        assert_eq!(reset.kind, Kind::Reset, "{rude:?}: {reset}");
        if rude == Rude::Excuse {
            assert!(reset.message.contains("Not allowed at this time"), "{reset}");
            assert!(!reset.message.contains('\u{1b}'), "{reset}");
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Rude {
    Close,
    Reset,
    CloseAfterGreeting,
    Excuse,
}

/// A server that accepts and then closes at once.
fn rude_server(how: Rude) -> u16 {
    use std::io::Write;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut stream = stream;
            match how {
                Rude::Close => {}
                // Closing with unread input makes the kernel send a reset.
                Rude::Reset => {
                    let _ = stream.write_all(b"SSH-2.0-x\r\n");
                    std::thread::sleep(Duration::from_millis(300));
                }
                Rude::CloseAfterGreeting => {
                    let _ = stream.write_all(b"SSH-2.0-x\r\n");
                    let mut taken = [0; 4096];
                    let _ = stream.read(&mut taken);
                }
                Rude::Excuse => {
                    let _ = stream.write_all(b"Not allowed \x1b[31mat this time\r\n");
                }
            }
        }
    });
    port
}

#[tokio::test]
async fn next_call_reconnects_after_a_lost_connection() {
    let Some(server) = Sshd::start().unwrap() else { return };
    let ssh = connect(&server).await;
    let file = server.home().join("file");
    let file = file.to_str().unwrap();
    ssh.put_bytes(b"content", file, 0o600).await.unwrap();
    // A command starts in the user's home, not in the server's.
    let started = server.home().join("started");
    let command = format!("touch {}; sleep 20; echo done", started.display());
    let (lost, killed) = tokio::join!(ssh.exec(&command, b"", LIMIT), async {
        // If the session is killed before the command runs, it would be opened again.
        let begins = async {
            while !started.exists() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(LIMIT, begins).await.expect("the command starts");
        server.kill_sessions().unwrap()
    });
    assert!(killed > 0);
    assert_eq!(lost.unwrap_err().kind, Kind::Reset);
    assert_eq!(ssh.exec("echo back", b"", LIMIT).await.unwrap().stdout, b"back\n");
    assert_eq!(ssh.read_from(file, 0, 100).await.unwrap().unwrap(), b"content");
    // Also while idle. On a busy machine the end may be detected after the next call has begun;
    // that call then fails.
    server.kill_sessions().unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let read = match ssh.read_from(file, 0, 100).await {
        Err(error) if error.kind == Kind::Reset => ssh.read_from(file, 0, 100).await,
        read => read,
    };
    assert_eq!(read.unwrap().unwrap(), b"content");
}

#[tokio::test]
async fn silent_connection_is_replaced() {
    let Some(server) = Sshd::start().unwrap() else { return };
    let ssh = connect(&server).await;
    ssh.exec("true", b"", LIMIT).await.unwrap();
    assert!(server.freeze_sessions().unwrap() > 0);
    let silent = ssh.exec("echo never", b"", Duration::from_secs(1)).await.unwrap_err();
    assert_eq!(silent.kind, Kind::TimedOut, "{silent}");
    assert_eq!(ssh.exec("echo anew", b"", LIMIT).await.unwrap().stdout, b"anew\n");
}

#[tokio::test]
async fn full_disk_is_reported_as_no_space() {
    for config in ["", "Subsystem sftp /bin/false"] {
        let Some(server) = Sshd::start_with(config).unwrap() else { return };
        let small = server.home().join("small");
        std::fs::create_dir(&small).unwrap();
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"])
            .arg(&small)
            .stderr(std::process::Stdio::null())
            .status();
        if !mount.is_ok_and(|status| status.success()) {
            outliers_tests::not_checked("no tmpfs can be mounted");
            return;
        }
        let ssh = connect(&server).await;
        let here = tempfile::tempdir().unwrap();
        std::fs::write(here.path().join("big"), noise(12_000_000)).unwrap();
        let target = small.join("big");
        let full = put(&ssh, &here.path().join("big"), target.to_str().unwrap(), &|_| {}).await;
        std::fs::remove_file(&target).unwrap();
        let bytes = ssh.put_bytes(&noise(3_000_000), target.to_str().unwrap(), 0o600).await;
        let left = std::fs::read_dir(&small).unwrap().count();
        std::process::Command::new("umount").arg("-l").arg(&small).status().unwrap();
        for full in [full.unwrap_err(), bytes.unwrap_err()] {
            assert_eq!(full.kind, Kind::NoSpace, "{full}");
        }
        assert_eq!(left, 0, "the part is gone");
    }
}
