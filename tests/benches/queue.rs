//! How long a queue of many jobs takes to be listed, and the memory that it takes: the real
//! controller, through a real login node, with a folder for each job.
//!
//! `cargo bench --workspace --bench queue -- [JOBS]`
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed measurement")]

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use outliers_tests::cluster::Cluster;
use outliers_tests::context::TestContext;

const ROUNDS: usize = 5;

fn main() {
    let jobs: usize = std::env::args().filter_map(|argument| argument.parse().ok()).next().unwrap_or(500);
    let Some(cluster) = Cluster::fake().unwrap() else { return };
    let mut queue = String::new();
    for i in 0..jobs {
        let tag = format!("outliers-a1b2c3-r{i}-n1x-1790000000");
        let lease = cluster.leases().join(&tag);
        std::fs::create_dir_all(&lease).unwrap();
        std::fs::write(lease.join("job.id"), format!("{i}\n")).unwrap();
        std::fs::write(lease.join("lease"), "1 x a100 in gpu\n").unwrap();
        queue += &format!("@job {i}|RUNNING|None|gpu|1790000000|1790003600|n1|{tag}\n");
    }
    cluster.prints("squeue", &queue).unwrap();
    let context = TestContext::new();
    std::fs::write(context.work().join("mine.toml"), cluster.settings()).unwrap();
    let context = context.with("OUTLIERS_CONFIG", "mine.toml");
    // The first one also logs in.
    println!("{:>6} {:>9} {:>9}", "jobs", "seconds", "MB");
    for _ in 0..ROUNDS {
        let mut command = context.command(["instances", "list", "--broker", "slurm", "--json"]);
        let (seconds, bytes) = measure(&mut command);
        println!("{jobs:>6} {seconds:>9.2} {:>9.1}", bytes as f64 / 1e6);
    }
}

/// Seconds until a command has ended, and the most memory that it had.
fn measure(command: &mut Command) -> (f64, u64) {
    let begun = Instant::now();
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut most = 0;
    while child.try_wait().unwrap().is_none() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        most = most.max(kib.unwrap_or(0) * 1024);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(child.wait().unwrap().success());
    (begun.elapsed().as_secs_f64(), most)
}
