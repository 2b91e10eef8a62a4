//! The process that is an instance: it lives as long as the rental, and ends everything that runs
//! there.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::signal::unix::{SignalKind, signal};

use super::processes::Marks;
use super::record::{Folder, Ready, Record, now};

/// A sleeping machine's timers stand still, the deadline does not: looked at this often.
const DEADLINE_CHECK: Duration = Duration::from_secs(60);

/// Why an instance ends.
enum End {
    /// It was told to.
    Signal,
    /// Its lease is over. No controller may ever call again, so it removes its files.
    Deadline,
}

/// Is the instance whose folder is `dir`, until a termination signal or the lease's deadline; then
/// ends everything that runs there.
///
/// At the deadline the bill is written and the folder removed too: nothing is left to terminate.
///
/// # Errors
/// The folder is damaged, or in use by another process; the lease is over; no signals. Nothing runs then.
pub async fn serve(dir: &Path) -> Result<()> {
    // Into the folder's log, unless the program has set up its own reporting.
    let _ = tracing_subscriber::fmt().with_ansi(false).with_writer(io::stderr).try_init();
    // A leader of its own session, deaf to the terminal the controller was started from. Refused
    // only if it leads a process group, and then the terminal is not its own either.
    let _ = rustix::process::setsid();
    let folder = Folder::new(dir);
    let lock = hold(&folder)?;
    let record = folder.record().with_context(|| format!("cannot read {}", dir.join("instance.json").display()))?;
    ensure!(!folder.is_ending(), "{} is being terminated", record.id);
    ensure!(record.deadline().is_none_or(|deadline| now() < deadline), "the lease of {} is over", record.id);
    let end = live(&folder, &record).await?;
    // Who terminates it keeps commands from starting; else nobody does. One that ends with the
    // instance is told so, too.
    let shut = if folder.is_ending() { Ok(None) } else { folder.shut() };
    if let Err(error) = &shut {
        // What starts meanwhile may be left; everything else ends all the same.
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
    let marks = Marks::new(&record.id, folder.home());
    let ended = tokio::task::spawn_blocking(move || marks.end_all()).await.map_err(io::Error::other)?;
    ended.map_err(anyhow::Error::msg)
}
