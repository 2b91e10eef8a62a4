//! The process of an instance. It lives as long as the rental and ends all processes of the
//! instance.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::signal::unix::{SignalKind, signal};

use super::processes::ProcessMarks;
use super::record::{Folder, Ready, Record, now};

/// Interval of deadline checks. Timers stop while a machine sleeps, the deadline does not.
const DEADLINE_CHECK: Duration = Duration::from_secs(60);

/// Reason for the end of an instance.
enum End {
    /// A termination signal.
    Signal,
    /// The lease's deadline. No controller may connect again, so the process removes its files.
    Deadline,
}

/// Runs the instance in the folder `dir` until a termination signal or the lease's deadline; then
/// ends all processes of the instance.
///
/// At the deadline it also writes the bill and removes the folder.
///
/// # Errors
/// The folder is damaged or in use by another process; the lease is over; signals are unavailable.
/// Then nothing runs.
pub async fn serve(dir: &Path) -> Result<()> {
    // Logs to the folder, unless the program has set up its own logging.
    let _ = tracing_subscriber::fmt().with_ansi(false).with_writer(io::stderr).try_init();
    // Creates its own session, independent of the controller's terminal. This fails only for a
    // process group leader, which has another terminal.
    let _ = rustix::process::setsid();
    let folder = Folder::new(dir);
    let lock = hold(&folder)?;
    let record = folder.record().with_context(|| format!("cannot read {}", dir.join("instance.json").display()))?;
    ensure!(!folder.is_ending(), "{} is being terminated", record.id);
    ensure!(record.deadline().is_none_or(|deadline| now() < deadline), "the lease of {} is over", record.id);
    let end = live(&folder, &record).await?;
    // Prevents commands from starting. A terminator has done so already. A command that ends with
    // the instance is told so.
    let shut = if folder.is_ending() { Ok(None) } else { folder.shut() };
    if let Err(error) = &shut {
        // A process that starts meanwhile may remain. The instance still ends.
        tracing::warn!(id = record.id, %error, "commands are not kept from starting");
    }
    end_everything(&folder, &record).await?;
    if let End::Deadline = end {
        super::conclude(&folder, &record, true).context("the lease is over, but its folder stays")?;
    }
    drop((shut, lock));
    Ok(())
}

fn hold(folder: &Folder) -> Result<File> {
    let path = folder.path().display();
    let lock = folder.lock().with_context(|| format!("cannot lock {path}"))?;
    lock.with_context(|| format!("{path} is in use by another process"))
}

async fn live(folder: &Folder, record: &Record) -> Result<End> {
    let mut told = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let mut interrupted = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    ensure!(folder.home().is_dir(), "the home folder is missing");
    folder.set_ready(&Ready { pid: std::process::id() }).context("cannot write ready.json")?;
    tracing::info!(id = record.id, "ready");
    tokio::select! {
        _ = told.recv() => Ok(End::Signal),
        _ = interrupted.recv() => Ok(End::Signal),
        () = passed(record.deadline()) => Ok(End::Deadline),
    }
}

async fn passed(deadline: Option<u64>) {
    let Some(deadline) = deadline else { return std::future::pending().await };
    while let Some(left) = deadline.checked_sub(now()).filter(|left| *left > 0) {
        tokio::time::sleep(Duration::from_secs(left).min(DEADLINE_CHECK)).await;
    }
}

async fn end_everything(folder: &Folder, record: &Record) -> Result<()> {
    let marks = ProcessMarks::new(&record.id, folder.home());
    let ended = tokio::task::spawn_blocking(move || marks.end_all()).await.map_err(io::Error::other)?;
    ended.map_err(anyhow::Error::msg)
}
