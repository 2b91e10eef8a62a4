//! A hostile server: its wrong answers, and that none does harm.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outliers::cloud::broker::SshEndpoint;
use outliers::host::keys::RunKey;
use outliers::host::transport::ssh::SshTransport;
use outliers::host::transport::{Transport, TransportErrorKind as Kind};
use outliers::host::{Cursor, HostErrorKind, HostEvent, RemoteHost, unfinished};
use outliers_protocol::FileBytes;
use russh::keys::{Algorithm, PrivateKey, key::safe_rng};
use russh::server::{Auth, ChannelOpenHandle, Config, Handle, Handler, Msg, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId};
use russh_sftp::protocol::{Attrs, Data, FileAttributes, Handle as FileHandle, OpenFlags, Status, StatusCode, Version};
use russh_sftp::server::StatusReply;
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(20);

/// Output for a script, after the mark that a correct shell prints.
type Answer = Arc<dyn Fn(&str) -> Vec<u8> + Send + Sync>;

/// One connection of the server.
struct LyingServer {
    answer: Answer,
    channels: HashMap<ChannelId, Channel<Msg>>,
    scripts: HashMap<ChannelId, Vec<u8>>,
}

impl Handler for LyingServer {
    type Error = russh::Error;

    async fn auth_publickey(&mut self, _user: &str, _key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        Ok(Auth::Accept)
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
        match command {
            b"sh -s" => drop(self.scripts.insert(id, Vec::new())),
            other => drop(tokio::spawn(misbehave(session.handle(), id, other.to_vec()))),
        }
        Ok(())
    }

    async fn data(&mut self, id: ChannelId, data: &[u8], _session: &mut Session) -> Result<(), Self::Error> {
        if let Some(script) = self.scripts.get_mut(&id) {
            script.extend_from_slice(data);
        }
        Ok(())
    }

    async fn channel_eof(&mut self, id: ChannelId, session: &mut Session) -> Result<(), Self::Error> {
        let Some(script) = self.scripts.remove(&id) else { return Ok(()) };
        let said = (self.answer)(&String::from_utf8(script).unwrap());
        let handle = session.handle();
        tokio::spawn(async move {
            let _ = handle.data(id, [b"\n@outliers@\n".to_vec(), said].concat()).await;
            let _ = handle.exit_status_request(id, 0).await;
            let _ = handle.close(id).await;
        });
        Ok(())
    }

    async fn subsystem_request(
        &mut self,
        id: ChannelId,
        _name: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        session.channel_success(id)?;
        let channel = self.channels.remove(&id).unwrap();
        tokio::spawn(async move { russh_sftp::server::run(channel.into_stream(), LyingFiles).await });
        Ok(())
    }
}

/// Answer to commands of one word.
async fn misbehave(handle: Handle, id: ChannelId, command: Vec<u8>) {
    let say = |text: &'static [u8]| handle.data(id, text.to_vec());
    match command.as_slice() {
        b"no-status" => {
            let _ = say(b"all is well\n").await;
            let _ = handle.eof(id).await;
        }
        b"late-status" => {
            let _ = handle.eof(id).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
            let _ = handle.exit_status_request(id, 3).await;
        }
        b"endless" => while say(&[b'y'; 30_000]).await.is_ok() {},
        b"silent" => std::future::pending().await,
        _ => {}
    }
    let _ = handle.close(id).await;
}

/// Files with correct names and content.
struct LyingFiles;

impl russh_sftp::server::Handler for LyingFiles {
    type Error = StatusReply;

    fn unimplemented(&self) -> StatusReply {
        StatusReply::new(StatusCode::OpUnsupported)
    }

    async fn init(&mut self, _version: u32, _extensions: HashMap<String, String>) -> Result<Version, StatusReply> {
        Ok(Version::new())
    }

    async fn lstat(&mut self, id: u32, path: String) -> Result<Attrs, StatusReply> {
        let (size, mode) = match path.as_str() {
            "giant" => (u64::MAX, 0o100_644),
            "device" => (100, 0o020_666),
            "pipe" => (100, 0o010_666),
            "link" => (100, 0o120_777),
            "untyped" => (100, 0),
            "escape" => return Err(StatusCode::Failure.with_message("\u{1b}]0;owned\u{7}no \u{202e}such")),
            _ => (100, 0o100_644),
        };
        Ok(Attrs { id, attrs: FileAttributes { size: Some(size), permissions: Some(mode), ..FileAttributes::empty() } })
    }

    async fn open(
        &mut self,
        id: u32,
        path: String,
        _flags: OpenFlags,
        _attrs: FileAttributes,
    ) -> Result<FileHandle, StatusReply> {
        Ok(FileHandle { id, handle: path })
    }

    async fn read(&mut self, id: u32, handle: String, offset: u64, len: u32) -> Result<Data, StatusReply> {
        let data = match handle.as_str() {
            "overlong" => vec![7; len as usize + 1000],
            "empty" => Vec::new(),
            "drip" => vec![7; 1],
            "short" if offset >= 10 => return Err(StatusReply::new(StatusCode::Eof)),
            "short" => vec![7; 10],
            _ => vec![7; len as usize],
        };
        Ok(Data { id, data })
    }

    async fn close(&mut self, id: u32, _handle: String) -> Result<Status, StatusReply> {
        let (error_message, language_tag) = ("Ok".to_owned(), "en".to_owned());
        Ok(Status { id, status_code: StatusCode::Ok, error_message, language_tag })
    }
}

/// A connection to the hostile server.
async fn liar(answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static) -> (SshTransport, TempDir) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let host_key = PrivateKey::random(&mut safe_rng(), Algorithm::Ed25519).unwrap();
    let config = Arc::new(Config { keys: vec![host_key], ..Config::default() });
    let answer: Answer = Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let liar = LyingServer { answer: answer.clone(), channels: HashMap::new(), scripts: HashMap::new() };
            let running = russh::server::run_stream(config.clone(), stream, liar).await.unwrap();
            // It ends with the client.
            tokio::spawn(async move { drop(running.await) });
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let key = RunKey::create(folder.path(), "key", "").unwrap();
    let endpoint = SshEndpoint { host: "127.0.0.1".to_owned(), port, user: "root".to_owned() };
    (SshTransport::connect(&endpoint, key.private_path(), None).await.unwrap().0, folder)
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_exit_status_is_a_failure_and_a_late_one_counts() {
    let (ssh, _folder) = liar(|_| Vec::new()).await;
    let none = ssh.exec("no-status", b"", LIMIT).await.unwrap_err();
    assert_eq!(none.kind, Kind::Reset, "{none}");
    assert_eq!(ssh.exec("late-status", b"", LIMIT).await.unwrap().status, Some(3));
    let silent = ssh.exec("silent", b"", Duration::from_millis(300)).await.unwrap_err();
    assert_eq!(silent.kind, Kind::TimedOut, "{silent}");
    let endless = ssh.exec("endless", b"", LIMIT).await.unwrap_err();
    assert_eq!(endless.kind, Kind::Remote, "{endless}");
    assert_eq!(ssh.exec("late-status", b"", LIMIT).await.unwrap().status, Some(3), "the connection lives");
}

#[tokio::test(flavor = "multi_thread")]
async fn irregular_files_and_wrong_lengths_are_errors() {
    lying_files().await;
}

/// Requests files from the hostile server.
pub(crate) async fn lying_files() {
    let (ssh, folder) = liar(|_| Vec::new()).await;
    let home = |name: &str| folder.path().join(name);
    for name in ["giant", "device", "pipe", "link", "overlong", "empty", "escape"] {
        let error = ssh.get(name, &home(name), 1 << 20).await.unwrap_err();
        assert_eq!(error.kind, Kind::Remote, "{name}: {error}");
        assert!(!error.message.chars().any(|c| c.is_control() || c == '\u{202e}'), "{:?}", error.message);
        assert!(!home(name).exists(), "{name}");
    }
    for (name, bytes) in [("drip", 100), ("untyped", 100), ("short", 10)] {
        assert_eq!(ssh.get(name, &home(name), 1 << 20).await.unwrap(), bytes, "{name}");
        assert_eq!(std::fs::read(home(name)).unwrap().len() as u64, bytes, "{name}");
    }
    let cut = ssh.read_from("giant", u64::MAX - 5, 1000).await.unwrap().unwrap();
    assert_eq!(cut.len(), 5, "no sum of ours runs over");
}

/// Fetches from a host with a home folder that sends this answer to the request for its manifest
/// and loose files, and then none.
async fn fetch(files: Vec<u8>, into: &Path) -> HostErrorKind {
    let answer = move |script: &str| match (script.contains("manifest.json"), script.contains("piece")) {
        (true, _) => files.clone(),
        (false, true) => Vec::new(),
        (false, false) => b"/root".to_vec(),
    };
    let (ssh, _folder) = liar(answer).await;
    let host = RemoteHost::new(Arc::new(ssh), "liar");
    let expected = ["a", "missing"].map(|name| FileBytes { name: name.to_owned(), bytes: 1 << 30 });
    let error = host.fetch("r1", into, &expected, &|_| {}).await.unwrap_err();
    assert!(!unfinished(into).exists(), "{error}");
    assert!(!error.message.contains('\u{1b}'), "{:?}", error.message);
    error.kind
}

fn manifest(text: &str) -> Vec<u8> {
    format!("@file 0 {}\n{text}\n", text.len()).into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn huge_or_false_manifest_downloads_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let into = folder.path().join("results").join("r1");
    let entry = |name: &str, bytes: &str| {
        let sha256 = "0".repeat(64);
        let file = format!(r#"{{"name":"{name}","bytes":{bytes},"sha256":"{sha256}"}}"#);
        manifest(&format!(r#"{{"schema":1,"outcome":"complete","files":[{file}]}}"#))
    };
    let deep = manifest(&"[".repeat(500_000));
    let long_name = entry(&"x".repeat(100_000), "1");
    let damaged = [
        ("deep", deep),
        ("huge number", entry("a", "1e999")),
        ("more than 64 bits", entry("a", "99999999999999999999")),
        ("escape in a name", entry("\\u001b[2Jx", "1")),
        ("long name", long_name),
        ("device", entry("/dev/sda", "1")),
        ("climbs", entry("../../.ssh/authorized_keys", "1")),
        ("named but not there", entry("missing", "1")),
        ("nothing that the job makes", entry("another.json", "1")),
    ];
    for (what, files) in damaged {
        assert_eq!(fetch(files, &into).await, HostErrorKind::Damaged, "{what}");
    }
    for bytes in ["200000000000000000", "1073741825"] {
        let kind = fetch(entry("a", bytes), &into).await;
        assert_eq!(kind, HostErrorKind::TooLarge, "{bytes}");
    }
    let odd = [b"@file 0 99\nshort\n".to_vec(), b"@file 9 1\nx\n".to_vec(), b"\x1b[31mhello".to_vec()];
    for files in odd.into_iter().chain([manifest(&" ".repeat(2 << 20))]) {
        assert_eq!(fetch(files, &into).await, HostErrorKind::Host);
    }
    assert!(!into.exists());
}

/// Result of following a host whose progress file repeats these bytes without end.
async fn follow(progress: Vec<u8>) -> Vec<HostEvent> {
    let answer = move |script: &str| match script.contains("take()") {
        true => {
            let head = format!("@state running 7\n@piece 99999999999999 {}\n", progress.len());
            [head.into_bytes(), progress.clone(), b"\n@piece 0 0\n\n".to_vec()].concat()
        }
        false => b"/root".to_vec(),
    };
    let (ssh, _folder) = liar(answer).await;
    let host = RemoteHost::new(Arc::new(ssh), "liar");
    let events = Mutex::new(Vec::new());
    let deadline = tokio::time::Instant::now() + Duration::from_secs(2);
    let ended = host.follow("r1", &mut Cursor::default(), deadline, &|event| events.lock().unwrap().push(event)).await;
    assert_eq!(ended.unwrap_err().kind, HostErrorKind::Deadline);
    events.into_inner().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_progress_file_ends_at_the_deadline() {
    let bad = |events: Vec<HostEvent>| {
        let line = |event| if let HostEvent::BadProgress(line) = event { Some(line) } else { None };
        events.into_iter().filter_map(line).collect::<Vec<_>>()
    };
    let endless = bad(follow(vec![b'['; 256 << 10]).await);
    assert_eq!(endless.len(), 1, "one line, told once");
    let deep = [&[b'['; 50_000][..], b"\n{\"schema\":1e999}\n\x1b]0;owned\x07{\n"].concat();
    let bombs = bad(follow(deep).await);
    // The skipped part, and the line at its end, are dropped.
    assert!(bombs.len() == 3 || bombs.len() % 3 == 2, "{}", bombs.len());
    for line in endless.iter().chain(&bombs) {
        assert!(line.chars().count() <= 201 && !line.chars().any(char::is_control), "{line:?}");
    }
}
