//! Drives runs with one signal handler for all of them.

use std::path::Path;
use std::time::Duration;

use outliers_protocol::{Metadata, Results, WeightVerification, files};
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use super::SCHEMA;
use crate::calendar::rfc3339;
use crate::cli::settings::Span;
use crate::files::read_json;
use crate::run::deploy::{DeployEvent, Driver, Ports, Stop};
use crate::run::ledger::{RunRecord, RunWriter, now_ms};
use crate::ui::report::{CliError, ExitStatus, Reporter, tables};

#[derive(Debug, Serialize)]
pub(super) struct Deployed {
    pub(super) schema: u32,
    pub(super) run: RunRecord,
    pub(super) cost_micro_usd: i64,
    pub(super) exit_status: u8,
    pub(super) results: Option<Results>,
    /// Verification of weight files by the hub's hashes.
    pub(super) weight_verification: Option<WeightVerification>,
}

impl Deployed {
    /// The result of a run at rest.
    pub(super) fn of(run: RunRecord) -> Self {
        let folder = run.state.results().filter(|results| results.complete).map(|results| Path::new(&results.folder));
        let results = folder.and_then(|folder| read_json(&folder.join(files::RESULTS)).ok());
        let metadata: Option<Metadata> = folder.and_then(|folder| read_json(&folder.join(files::METADATA)).ok());
        Self {
            schema: SCHEMA,
            cost_micro_usd: run.cost(now_ms()).micros(),
            exit_status: ExitStatus::of_run(&run.state).number(),
            results,
            weight_verification: metadata.and_then(|metadata| metadata.model.weight_verification),
            run,
        }
    }

    /// The table of its results; empty without results.
    pub(super) fn table(&self) -> String {
        let verification = self.weight_verification.as_ref();
        let table = |results| tables::results(&self.run.spec.model, results, verification);
        self.results.as_ref().map(table).unwrap_or_default()
    }

    pub(super) fn status(&self) -> ExitStatus {
        ExitStatus::of_run(&self.run.state)
    }
}

/// Drives a run to its end, with Ctrl-C handling; with `detach` only until its worker runs: the
/// returned run is then not at rest.
///
/// # Errors
/// Status 6: its instance may remain.
pub(super) async fn drive(
    reporter: &Reporter,
    run: RunWriter,
    ports: Ports<'_>,
    detach: bool,
) -> Result<Deployed, CliError> {
    let on = |event| reporter.event(event);
    let driven = listening(reporter, async |stop| Driver::new(run, ports, stop, &on).detaching(detach).drive().await);
    let run = driven.await??;
    if detach || run.state.is_at_rest() { Ok(Deployed::of(run)) } else { Err(let_go(&run)) }
}

/// The error for a run that was left running without `--detach`.
fn let_go(run: &RunRecord) -> CliError {
    let bills = run.state.rental().map(|rental| {
        let until = rfc3339(run.ends_at().unwrap_or(rental.tag.deadline));
        format!(", and instance {} on {} bills {} until {until}", rental.instance, rental.offer.broker, rental.price)
    });
    let lease = Duration::from_secs(run.spec.watch.lease_s);
    let sooner = match lease.is_zero() {
        true => String::new(),
        false => format!("; its guard ends the run after {} without a controller", Span(lease)),
    };
    let message = format!("run {} was left running{}", run.id, bills.unwrap_or_default());
    CliError::new(ExitStatus::InstanceLeft, message, format!("`outliers attach {}` resumes it{sooner}", run.id))
}

/// Runs `work`, which receives the user's requests to stop.
///
/// # Errors
/// Status 6: signals are unavailable, and instances may remain.
pub(super) async fn listening<T>(
    reporter: &Reporter,
    work: impl AsyncFnOnce(watch::Receiver<Stop>) -> T,
) -> Result<T, CliError> {
    let stop = watch::Sender::new(Stop::Go);
    let listen = listen(|level| {
        reporter.event(DeployEvent::Stopping(level));
        stop.send_replace(level);
    });
    tokio::select! {
        done = work(stop.subscribe()) => Ok(done),
        error = listen => Err(deaf(&error)),
    }
}

fn deaf(error: &std::io::Error) -> CliError {
    let hint = "an instance may still be running: outliers instances list";
    CliError::new(ExitStatus::InstanceLeft, format!("signals cannot be heard: {error}"), hint)
}

/// Handles signals, forever. Of Ctrl-C and SIGTERM the first stops and the second skips the
/// results; the instance is ended in any case. SIGHUP leaves the run, unless it is ending.
async fn listen(heard: impl Fn(Stop)) -> std::io::Error {
    let signals = || {
        let (interrupt, terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        // The parent may ignore SIGHUP, which a handler would undo.
        let hangup = (!is_ignored(SignalKind::hangup())).then(|| signal(SignalKind::hangup()));
        std::io::Result::Ok((interrupt, terminate, hangup.transpose()?))
    };
    let (mut interrupt, mut terminate, mut hangup) = match signals() {
        Ok(signals) => signals,
        Err(error) => return error,
    };
    let mut level = Stop::Go;
    loop {
        let more = if level < Stop::Now { Stop::Now } else { Stop::SkipSync };
        let next = tokio::select! {
            _ = interrupt.recv() => more,
            _ = terminate.recv() => more,
            () = received(&mut hangup) => Stop::LetGo,
        };
        if next > level {
            level = next;
            heard(level);
        }
    }
}

/// Resolves when the signal arrives; never without a handler.
async fn received(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Whether this process was started with the signal ignored, as by `nohup`. False if unknown.
fn is_ignored(signal: SignalKind) -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| ignores(&status, signal))
}

/// Reads the mask in the text of `/proc/PID/status`. Bit 0 is signal 1.
fn ignores(status: &str, signal: SignalKind) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default();
    (mask >> (signal.as_raw_value() - 1)) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_systems_mask() {
        let status = |mask: &str| format!("Name:\toutliers\nSigBlk:\tffffffffffffffff\nSigIgn:\t{mask}\nSigCgt:\t1\n");
        let ignored = |mask: &str| ignores(&status(mask), SignalKind::hangup());
        assert!(ignored("0000000000000001") && ignored("0000000000001001"));
        assert!(!ignored("0000000000001000") && !ignored("fffffffffffffffe") && !ignored("?"));
        assert!(!ignores("", SignalKind::hangup()));
    }
}
