//! The guard on a host, against a real OpenSSH server: every way in which a run loses its
//! controller.

use outliers::host::GuardConfig;
use outliers::run::GuardTimeouts;

use super::*;

/// Replaces a cloud's termination command.
const END: &str = "echo ended >> \"$HOME/ended\"";
/// A termination command that fails.
const FAILS: &str = "echo 'no such pod' >&2; exit 1";

fn terms(lease_s: u64, unclaimed_s: u64, left_s: u64, end_itself: Option<&'static str>) -> GuardConfig {
    GuardConfig { watch: GuardTimeouts { lease_s, unclaimed_s }, left: Duration::from_secs(left_s), end_itself }
}

impl HostFixture {
    async fn guarded(&self, run: &str, scenario: &str, terms: GuardConfig) {
        self.host.guard(run, &terms).await.unwrap();
        self.launch(run, scenario).await;
    }

    fn said(&self, run: &str) -> String {
        std::fs::read_to_string(self.remote(run, "guard.log")).unwrap_or_default()
    }

    fn told_to_end(&self) -> bool {
        self.server.home().join("ended").exists()
    }

    fn guard_pid(&self, run: &str) -> u32 {
        let text = std::fs::read_to_string(self.remote(run, "guard.pid")).unwrap();
        text.lines().next().unwrap().parse().unwrap()
    }
}

#[tokio::test]
async fn guard_ends_worker_and_instance_without_heartbeat() {
    let Some(fixture) = HostFixture::new().await else { return };
    fixture.guarded("r", "hangs", terms(3, 600, 600, Some(END))).await;
    assert!(!fixture.told_to_end());
    fixture.until("the order to end", HostFixture::told_to_end).await;
    assert_eq!(fixture.host.status("r").await.unwrap(), JobStatus::Ended { exit: Some(143) }, "before the instance");
    assert!(fixture.said("r").contains("nobody looked after this run for 3 s"), "{}", fixture.said("r"));
    let log = std::fs::read_to_string(fixture.remote("r", "worker.log")).unwrap();
    assert!(log.contains("guard: nobody looked after"), "the reason is in the fetched log: {log}");
}

#[tokio::test]
async fn heartbeat_keeps_the_instance_and_a_killed_guard_is_replaced() {
    let Some(fixture) = HostFixture::new().await else { return };
    // On a busy machine a renewal takes seconds: the lease is many times the pause, and renewals
    // last longer than the lease.
    fixture.guarded("r", "hangs", terms(10, 600, 600, Some(END))).await;
    let first = fixture.guard_pid("r");
    kill(&first.to_string());
    for _ in 0..14 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        fixture.host.renew_guard("r").await.unwrap();
    }
    assert_eq!(fixture.host.status("r").await.unwrap(), JobStatus::Running);
    assert!(!fixture.told_to_end() && fixture.said("r").is_empty(), "{}", fixture.said("r"));
    assert_ne!(fixture.guard_pid("r"), first);
    kill(&fixture.guard_pid("r").to_string());
    fixture.host.stop_worker("r").await.unwrap();
}

#[tokio::test]
async fn uncollected_results_end_the_instance_but_a_running_worker_does_not() {
    let Some(fixture) = HostFixture::new().await else { return };
    fixture.guarded("runs", "hangs", terms(600, 2, 600, Some(END))).await;
    fixture.guarded("ended", "quick", terms(600, 2, 600, None)).await;
    fixture
        .until("its last word", |fixture| fixture.said("ended").contains("no means to end itself: it bills until"))
        .await;
    assert!(fixture.said("ended").contains("nobody came for its files in 2 s"), "{}", fixture.said("ended"));
    assert!(!fixture.told_to_end() && fixture.said("runs").is_empty());
    assert_eq!(fixture.fetch("ended").await.manifest.unwrap().files.len(), 2, "they are there all the same");
    kill(&fixture.guard_pid("runs").to_string());
    fixture.host.stop_worker("runs").await.unwrap();
}

#[tokio::test]
async fn time_limit_ends_the_instance_and_a_refused_call_is_retried() {
    let Some(fixture) = HostFixture::new().await else { return };
    fixture.guarded("r", "stubborn", terms(0, 0, 3, Some(FAILS))).await;
    let pid = fixture.guard_pid("r");
    fixture.until("its word", |fixture| fixture.said("r").contains("once more in a minute")).await;
    assert!(
        fixture.said("r").contains("the time limit of the run is reached") && fixture.said("r").contains("no such pod")
    );
    assert_eq!(fixture.host.status("r").await.unwrap(), JobStatus::Ended { exit: None }, "however stubborn");
    assert!(living_in_group(pid) > 0, "it goes on trying");
    kill(&format!("-{pid}"));
}

#[tokio::test]
async fn one_guard_runs_per_folder_and_ends_with_it() {
    let Some(fixture) = HostFixture::new().await else { return };
    fixture.host.guard("r", &terms(600, 8, 600, Some(END))).await.unwrap();
    kill(&fixture.guard_pid("r").to_string());
    let renew = || fixture.host.renew_guard("r");
    let (a, b, c, d) = tokio::join!(renew(), renew(), renew(), renew());
    for renewed in [a, b, c, d] {
        renewed.unwrap();
    }
    let folder = fixture.remote("r", "");
    let on_duty = || {
        let table = std::process::Command::new("ps").args(["-A", "-o", "args="]).output().unwrap();
        let table = String::from_utf8(table.stdout).unwrap();
        table
            .lines()
            .filter(|line| line.contains("guard.sh") && line.contains(folder.to_str().unwrap().trim_end_matches('/')))
            .count()
    };
    fixture.until("one", |_| on_duty() == 1).await;
    std::fs::remove_dir_all(&folder).unwrap();
    fixture.until("none", |_| on_duty() == 0).await;
    assert!(!fixture.told_to_end());
}

/// A run where the server permits one channel at a time; the lease is renewed while the worker is
/// followed.
#[tokio::test]
async fn worker_guard_and_follower_share_one_ssh_channel() {
    let Some(fixture) = HostFixture::with("MaxSessions 1").await else { return };
    fixture.guarded("r", "slow", terms(600, 600, 600, None)).await;
    let renewing = async {
        for _ in 0..8 {
            tokio::time::sleep(Duration::from_millis(200)).await;
            fixture.host.renew_guard("r").await.unwrap();
        }
    };
    let (followed, ()) = tokio::join!(fixture.follow("r"), renewing);
    assert_eq!(followed, ENDED_WELL);
    assert!(!fixture.fetch("r").await.partial);
    let left = std::fs::read_dir(fixture.remote("r", "")).unwrap().map(|entry| entry.unwrap().file_name());
    let parts = left.filter(|name| name.to_string_lossy().contains(".part")).count();
    assert_eq!(parts, 0, "temporary files stay there");
    kill(&fixture.guard_pid("r").to_string());
}
