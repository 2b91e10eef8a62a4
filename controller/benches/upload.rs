//! How long a large file takes to an OpenSSH server over lines of several lengths: this program,
//! `sftp put` and `scp`.
//!
//! Every figure is the whole of it, from no connection to the last byte acknowledged. The line is
//! a relay in this process without losses, the same for all.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use outliers::cloud::broker::SshEndpoint;
use outliers::host::transport::ssh::SshTransport;
use outliers::host::transport::{SendRequest, Transport};
use outliers_tests::flaky_link::FlakyLink;
use outliers_tests::noise;
use outliers_tests::sshd::Sshd;

/// Uploads to a real `sshd`, side by side.
#[derive(Parser)]
struct Options {
    /// Size of the file, in MB of 1,000,000 bytes.
    #[arg(long, default_value_t = 200)]
    megabytes: usize,
    /// Round trips, in ms.
    #[arg(long, value_delimiter = ',', default_value = "0,20,80,150")]
    rtt: Vec<u64>,
    /// Number of tries; each figure is the best of them.
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Only this program.
    #[arg(long)]
    alone: bool,
    /// Cargo says so.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let Some(server) = Sshd::start()? else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("file");
    std::fs::write(&file, noise(options.megabytes * 1_000_000))?;
    println!("{} MB to OpenSSH's server, seconds (in brackets: times ours)", options.megabytes);
    println!("{:>7}  {:>8}  {:>16}  {:>16}", "RTT, ms", "outliers", "sftp put", "scp");
    for rtt in &options.rtt {
        let link = FlakyLink::long(&server.endpoint(), Duration::from_millis(*rtt))?;
        let to = link.endpoint();
        let ours = best(&options, || outliers(&server, &to, &file))?;
        if options.alone {
            println!("{rtt:>7}  {ours:>8.2}  {:>5.1} MB/s", options.megabytes as f64 / ours);
            continue;
        }
        let sftp = best(&options, || sftp_put(&server, &to, &file))?;
        let scp = best(&options, || scp(&server, &to, &file))?;
        println!("{rtt:>7}  {ours:>8.2}  {sftp:>8.2} ({:.1} x)  {scp:>8.2} ({:.1} x)", sftp / ours, scp / ours);
    }
    Ok(())
}

/// Seconds of the quickest run.
fn best(options: &Options, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..options.rounds {
        let started = Instant::now();
        run()?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn outliers(server: &Sshd, to: &SshEndpoint, file: &Path) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let remote = server.home().join("outliers");
    runtime.block_on(async {
        let (ssh, _) = SshTransport::connect(to, server.key().private_path(), Some(server.host_key())).await?;
        let whole = 0..file.metadata()?.len();
        let what = SendRequest {
            local: file,
            remote: remote.to_str().context("a path of ours")?,
            parts: std::slice::from_ref(&whole),
            progress: &|_| {},
        };
        ssh.send(&what).await?;
        anyhow::Ok(())
    })?;
    arrived(file, &remote)
}

fn sftp_put(server: &Sshd, to: &SshEndpoint, file: &Path) -> Result<()> {
    let remote = server.home().join("sftp");
    let batch = file.with_extension("batch");
    std::fs::write(&batch, format!("put {} {}\n", file.display(), remote.display()))?;
    let mut sftp = openssh("sftp", server, to);
    sftp.arg("-b").arg(&batch).arg(format!("{}@{}", to.user, to.host));
    finish(sftp)?;
    arrived(file, &remote)
}

fn scp(server: &Sshd, to: &SshEndpoint, file: &Path) -> Result<()> {
    let remote = server.home().join("scp");
    let mut scp = openssh("scp", server, to);
    scp.arg(file).arg(format!("{}@{}:{}", to.user, to.host, remote.display()));
    finish(scp)?;
    arrived(file, &remote)
}

fn openssh(program: &str, server: &Sshd, to: &SshEndpoint) -> Command {
    let mut command = Command::new(program);
    command.args(["-q", "-F", "none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"]);
    command.args(["-o", "UserKnownHostsFile=/dev/null", "-P", &to.port.to_string(), "-i"]);
    command.arg(server.key().private_path()).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn finish(mut command: Command) -> Result<()> {
    match command.status().with_context(|| format!("{command:?}"))?.success() {
        true => Ok(()),
        false => bail!("{command:?} failed"),
    }
}

/// The file is there whole, and away again.
fn arrived(file: &Path, remote: &Path) -> Result<()> {
    ensure!(file.metadata()?.len() == remote.metadata()?.len(), "{} is not whole", remote.display());
    Ok(std::fs::remove_file(remote)?)
}
