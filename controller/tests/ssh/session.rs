//! What a connection bears.

use std::time::Duration;

use outliers::transport::{Transport, TransportErrorKind as Kind};

use crate::scene::{HASTY, Scene};

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_answers_no_more_is_found_out_in_the_middle_of_a_long_command() {
    let Some(scene) = Scene::near("") else { return };
    let ssh = scene.ssh(HASTY).await;
    let quiet = ssh.exec("sleep 4; echo done", b"", Duration::from_secs(60)).await.unwrap();
    assert_eq!(quiet.stdout, b"done\n", "a quiet command on a living server is left alone");
    let begun = scene.there("begun");
    let command = format!("touch {}; sleep 600", begun.display());
    let freeze = async {
        while !begun.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        scene.server.freeze_sessions().unwrap();
    };
    let (lost, ()) = tokio::join!(ssh.exec(&command, b"", Duration::from_secs(600)), freeze);
    assert_eq!(lost.unwrap_err().kind, Kind::Reset);
    assert_eq!(ssh.exec("echo anew", b"", Duration::from_secs(20)).await.unwrap().stdout, b"anew\n");
}
