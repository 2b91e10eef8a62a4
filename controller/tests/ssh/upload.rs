//! Uploads over links that are slow, narrow, stalled or break.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use outliers::host::transport::ssh::{SshTransport, Tuning};
use outliers::host::transport::{SendRequest, Transport, TransportError, TransportErrorKind as Kind};
use outliers::host::{HostEvent, RemoteHost};
use outliers_tests::flaky_link::FlakyLink;
use outliers_tests::{noise, sha256};

use crate::fixture::{HASTY, SshFixture, names};

const MB: usize = 1_000_000;
const PLACE: &str = "outliers/data/big";

/// Pushes a file to [`PLACE`]; the path there.
async fn push(host: &RemoteHost, file: &Path, on: impl Fn(HostEvent) + Send + Sync) -> PathBuf {
    host.push_file(file, PLACE, 1 << 40, &on).await.unwrap().into()
}

/// Pushes a file until more than `bytes` of it are acknowledged, then drops the upload, as a
/// killed controller does.
async fn push_some(host: RemoteHost, file: &Path, bytes: u64) {
    let enough = tokio::sync::Notify::new();
    let on = |event| {
        if matches!(event, HostEvent::Uploading { sent, .. } if sent > bytes) {
            enough.notify_one();
        }
    };
    tokio::select! {
        _ = host.push_file(file, PLACE, 1 << 40, &on) => panic!("the whole file went too fast to be cut"),
        () = enough.notified() => {}
    }
    drop(host);
}

/// Sends a whole file without resuming.
async fn send(
    ssh: &SshTransport,
    local: &Path,
    remote: &Path,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(), TransportError> {
    let whole = 0..local.metadata().unwrap().len();
    let (remote, parts) = (remote.to_str().unwrap(), std::slice::from_ref(&whole));
    ssh.send(&SendRequest { local, remote, parts, progress }).await
}

/// The same content, and no other file beside it.
fn assert_arrived(file: &Path, there: &Path) {
    assert_eq!(sha256(&std::fs::read(there).unwrap()), sha256(&std::fs::read(file).unwrap()));
    assert_eq!(names(there.parent().unwrap()), ["big"]);
}

/// The part file that an upload to [`PLACE`] has left.
fn part(fixture: &SshFixture) -> PathBuf {
    let folder = fixture.there(PLACE).parent().unwrap().to_owned();
    let [name] = &names(&folder)[..] else { panic!("{:?}", names(&folder)) };
    assert!(name.starts_with("big.part."), "{name}");
    folder.join(name)
}

#[tokio::test(flavor = "multi_thread")]
async fn upload_resumes_after_a_broken_connection() {
    for config in ["", "Subsystem other internal-sftp"] {
        let Some(fixture) = SshFixture::without_delay(config) else { return };
        let file = fixture.file("big", &noise(60 * MB));
        let host = fixture.host(Tuning::default()).await;
        fixture.link.cut_after(45 * MB as u64);
        let lost = AtomicBool::new(false);
        let there = push(&host, &file, |event| {
            lost.fetch_or(matches!(event, HostEvent::ConnectionLost { .. }), Ordering::Relaxed);
        })
        .await;
        assert!(lost.into_inner(), "{config}: the line did break");
        assert_arrived(&file, &there);
        let carried = fixture.link.carried_up() as usize / MB;
        assert!(carried < 90, "{config}: {carried} MB went up for 60 MB in two attempts");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn partial_upload_of_a_killed_controller_is_resumed_and_corrected() {
    let Some(fixture) = SshFixture::without_delay("") else { return };
    let content = noise(60 * MB);
    let file = fixture.file("big", &content);
    push_some(fixture.host(Tuning::default()).await, &file, 40 * MB as u64).await;
    let part = part(&fixture);
    assert_eq!(part.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    // A disk error within the bytes that had arrived.
    let mut there = std::fs::read(&part).unwrap();
    there[5 * MB] ^= 1;
    std::fs::write(&part, &there).unwrap();
    let before = fixture.link.carried_up();
    let host = fixture.host(Tuning::default()).await;
    let first = std::sync::Mutex::new(None);
    let placed = push(&host, &file, |event| {
        if let HostEvent::Uploading { sent, total, .. } = event {
            assert_eq!(total, first.lock().unwrap().get_or_insert((sent, total)).1);
        }
    })
    .await;
    assert_arrived(&file, &placed);
    let carried = (fixture.link.carried_up() - before) as usize;
    assert!(carried > 4 << 20 && carried < 45 * MB, "{carried}");
    let again = fixture.link.carried_up();
    push(&host, &file, |event| assert!(matches!(event, HostEvent::AlreadyThere { .. }), "{event:?}")).await;
    assert!(fixture.link.carried_up() - again < 100_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_partial_file_is_replaced_and_its_link_target_kept() {
    let Some(fixture) = SshFixture::without_delay("") else { return };
    let file = fixture.file("big", &noise(10 * MB));
    push_some(fixture.host(Tuning::default()).await, &file, 1).await;
    let part = part(&fixture);
    let plant = |what: &dyn Fn()| {
        std::fs::remove_file(&part).unwrap();
        what();
    };
    let precious = fixture.file("precious", b"not ours");
    let longer = || std::fs::write(&part, noise(11 * MB)).unwrap();
    let link = || std::os::unix::fs::symlink(&precious, &part).unwrap();
    for what in [&longer as &dyn Fn(), &link] {
        plant(what);
        let placed = push(&fixture.host(Tuning::default()).await, &file, |_| {}).await;
        assert_arrived(&file, &placed);
        assert_eq!(std::fs::read(&precious).unwrap(), b"not ours");
        // The next kind finds the same state.
        std::fs::rename(&placed, &part).unwrap();
    }
}

/// The kernel refuses to start a program that is open for writing, and a server detects late that
/// its client is gone.
#[tokio::test(flavor = "multi_thread")]
async fn program_starts_while_a_dead_connection_holds_it_open() {
    let Some(fixture) = SshFixture::without_delay("") else { return };
    let version = format!(
        r#"{{"version":"{}","schema":1,"target":"any","cuda":false,"architectures":[]}}"#,
        env!("CARGO_PKG_VERSION")
    );
    let mut program = format!("#!/bin/sh\necho '{version}'\nexit 0\n").into_bytes();
    program.extend(noise(24 * MB));
    let file = fixture.file("worker", &program);
    let host = fixture.host(HASTY).await;
    let frozen = AtomicBool::new(false);
    let on = |event| {
        if matches!(event, HostEvent::Uploading { sent, .. } if sent > 12 * MB as u64)
            && !frozen.swap(true, Ordering::Relaxed)
        {
            assert!(fixture.server.freeze_sessions().unwrap() > 0);
        }
    };
    let worker = host.push_worker(&file, &on).await.unwrap();
    assert!(frozen.into_inner());
    assert_eq!(worker.sha256, sha256(&program));
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connection_is_abandoned_and_a_slow_one_is_not() {
    let link = |server: &_| FlakyLink::narrow(server, 2 * MB as u64).unwrap();
    let Some(fixture) = SshFixture::new("", link) else { return };
    let file = fixture.file("big", &noise(8 * MB));
    // All requests of the file are in flight at once, and the last one waits four times the
    // timeout.
    let placed = push(&fixture.host(HASTY).await, &file, |_| {}).await;
    assert_arrived(&file, &placed);
    let ssh = fixture.ssh(HASTY).await;
    let frozen = AtomicBool::new(false);
    let freeze = |_| {
        if !frozen.swap(true, Ordering::Relaxed) {
            fixture.server.freeze_sessions().unwrap();
        }
    };
    let silent = send(&ssh, &file, &fixture.there("silent"), &freeze).await.unwrap_err();
    assert_eq!(silent.kind, Kind::TimedOut, "{silent}");
}

#[tokio::test(flavor = "multi_thread")]
async fn upload_works_with_few_ssh_channels() {
    for config in ["MaxSessions 1", "MaxSessions 3", "MaxSessions 2\nSubsystem other internal-sftp"] {
        let Some(fixture) = SshFixture::without_delay(config) else { return };
        let file = fixture.file("big", &noise(20 * MB + 1));
        let remote = fixture.there("big");
        let ssh = fixture.ssh(Tuning::default()).await;
        send(&ssh, &file, &remote, &|_| {}).await.unwrap_or_else(|e| panic!("{config}: {e}"));
        assert_eq!(sha256(&std::fs::read(&remote).unwrap()), sha256(&std::fs::read(&file).unwrap()), "{config}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rekeying_by_either_side_during_a_transfer_works() {
    let often = Tuning { rekey_after: 2 << 20, ..Tuning::default() };
    for (config, tuning) in [("RekeyLimit 1M", Tuning::default()), ("", often), ("RekeyLimit 3M", often)] {
        let Some(fixture) = SshFixture::without_delay(config) else { return };
        // The keys of each transfer are renewed three times and more.
        let content = noise(12 * MB);
        let file = fixture.file("big", &content);
        let ssh = fixture.ssh(tuning).await;
        let (remote, back) = (fixture.there("big"), fixture.here.path().join("back"));
        send(&ssh, &file, &remote, &|_| {}).await.unwrap_or_else(|e| panic!("{config} {tuning:?}: {e}"));
        let remote = remote.to_str().unwrap();
        ssh.get(remote, &back, 1 << 30).await.unwrap_or_else(|e| panic!("{config} {tuning:?}: {e}"));
        assert_eq!(sha256(&std::fs::read(&back).unwrap()), sha256(&content), "{config}");
        let echoed = ssh.exec("cat", &content, Duration::from_secs(60)).await.unwrap();
        assert_eq!(sha256(&echoed.stdout), sha256(&content), "{config}");
    }
}
