//! Runs are driven while Ctrl-C is listened to: one listener for all of them.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::deploy::Deployed;
use crate::deploy::{DeployEvent, Driver, Ports, Stop};
use crate::ledger::RunWriter;
use crate::report::{Complaint, ExitStatus, Reporter};

/// Drives a run to its end, listening for Ctrl-C.
///
/// # Errors
/// Status 6: its instance may be left.
pub(super) async fn drive(reporter: &Reporter, run: RunWriter, ports: Ports<'_>) -> Result<Deployed, Complaint> {
    let on = |event| reporter.event(event);
    let driven = listening(reporter, async |stop| Driver::new(run, ports, stop, &on).drive().await).await?;
    Ok(Deployed::of(driven?))
}

/// Does `work`, which is told how urgently a person wants it to end.
///
/// # Errors
/// Status 6: signals cannot be heard, and instances may be left.
pub(super) async fn listening<T>(
    reporter: &Reporter,
    work: impl AsyncFnOnce(watch::Receiver<Stop>) -> T,
) -> Result<T, Complaint> {
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

fn deaf(error: &std::io::Error) -> Complaint {
    Complaint {
        status: ExitStatus::InstanceLeft,
        message: format!("signals cannot be heard: {error}"),
        hint: Some("an instance may still be running: outliers instances list".to_owned()),
    }
}

/// Ctrl-C and its like, for ever: the first stops, the second skips the results. Nothing skips the end of the instance.
async fn listen(heard: impl Fn(Stop)) -> std::io::Error {
    let signals = || {
        let (interrupt, terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        std::io::Result::Ok((interrupt, terminate, signal(SignalKind::hangup())?))
    };
    let (mut interrupt, mut terminate, mut hangup) = match signals() {
        Ok(signals) => signals,
        Err(error) => return error,
    };
    let mut level = Stop::Go;
    loop {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
        let next = if level == Stop::Go { Stop::Now } else { Stop::SkipSync };
        if next != level {
            level = next;
            heard(level);
        }
    }
}
