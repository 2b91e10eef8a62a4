//! Faults that a connection must survive.

use std::time::Duration;

use outliers::cloud::broker::SshEndpoint;
use outliers::host::transport::ssh::{SshTransport, Tuning};
use outliers::host::transport::{Transport, TransportErrorKind as Kind};
use outliers_tests::flaky_link::FlakyLink;

use crate::fixture::{HASTY, SshFixture};

/// RFC 4253, section 4.2: a server may send lines before its version. OpenSSH's client accepts
/// 1023 lines of 8192 characters.
#[tokio::test(flavor = "multi_thread")]
async fn text_before_the_ssh_version_is_skipped_as_openssh_does() {
    let text = |length: usize, end: &str| format!("{}{end}", "x".repeat(length));
    let borne = [
        "Welcome to the gateway. Authorised use only.\r\n".to_owned(),
        (0..8).map(|i| format!("0{i} This is a private system of a provider, do not enter.\r\n")).collect(),
        text(62, "\n").repeat(50),
        text(8192, "\r\n"),
        "\n".repeat(1023),
        text(80, "\r\n").repeat(1023),
        format!("SSL is not spoken here\nS\n{}", text(300, "\n")),
    ];
    for preface in borne {
        let link = |server: &SshEndpoint| FlakyLink::with_preface(server, preface.as_bytes()).unwrap();
        let Some(fixture) = SshFixture::new("", link) else { return };
        let ssh = fixture.ssh(Tuning::default()).await;
        let said = ssh.exec("echo in", b"", Duration::from_secs(20)).await.unwrap();
        assert_eq!(said.stdout, b"in\n", "{} bytes", preface.len());
    }
    for preface in [text(9000, "\r\n"), "\x1b[31mno\n".repeat(1024)] {
        let link = |server: &SshEndpoint| FlakyLink::with_preface(server, preface.as_bytes()).unwrap();
        let Some(fixture) = SshFixture::new("", link) else { return };
        let attempt = SshTransport::connect(&fixture.link.endpoint(), fixture.server.key().private_path(), None).await;
        let error = attempt.err().expect("too much text is no SSH server");
        assert_eq!(error.kind, Kind::Reset, "{error}");
        assert!(error.message.contains("more text") && !error.message.contains('\u{1b}'), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unresponsive_server_is_detected_during_a_long_command() {
    let Some(fixture) = SshFixture::without_delay("") else { return };
    let ssh = fixture.ssh(HASTY).await;
    let quiet = ssh.exec("sleep 4; echo done", b"", Duration::from_secs(60)).await.unwrap();
    assert_eq!(quiet.stdout, b"done\n", "a quiet command on a living server is left alone");
    let begun = fixture.there("begun");
    let command = format!("touch {}; sleep 600", begun.display());
    let freeze = async {
        while !begun.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        fixture.server.freeze_sessions().unwrap();
    };
    let (lost, ()) = tokio::join!(ssh.exec(&command, b"", Duration::from_secs(600)), freeze);
    assert_eq!(lost.unwrap_err().kind, Kind::Reset);
    assert_eq!(ssh.exec("echo anew", b"", Duration::from_secs(20)).await.unwrap().stdout, b"anew\n");
}
