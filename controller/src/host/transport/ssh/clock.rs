//! Progress and stall timeout of a transfer.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::host::transport::{TransportError, TransportErrorKind as Kind};

/// Progress of one transfer over all its channels.
///
/// A timeout per request or per channel would expire on a slow line, where requests wait for each
/// other and channels share the bandwidth. A line that is only slow still acknowledges something
/// within the timeout.
pub(super) struct Clock<'a> {
    patience: Duration,
    heard: Mutex<Instant>,
    acknowledged: watch::Sender<u64>,
    told: &'a (dyn Fn(u64) + Send + Sync),
}

impl<'a> Clock<'a> {
    /// `told` is called with the bytes acknowledged so far.
    pub(super) fn new(patience: Duration, told: &'a (dyn Fn(u64) + Send + Sync)) -> Self {
        Self { patience, heard: Mutex::new(Instant::now()), acknowledged: watch::Sender::new(0), told }
    }

    /// Maximum time without progress.
    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    pub(super) fn record_activity(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Adds acknowledged bytes.
    pub(super) fn acknowledge(&self, bytes: u64) {
        self.record_activity();
        self.acknowledged.send_modify(|all| *all += bytes);
        (self.told)(self.acknowledged());
    }

    /// Bytes acknowledged so far.
    pub(super) fn acknowledged(&self) -> u64 {
        *self.acknowledged.borrow()
    }

    /// Waits until more than `bytes` are acknowledged.
    pub(super) async fn wait_for_more_than(&self, bytes: u64) {
        // The receiver fails only if the sender is dropped, and `self` owns it.
        let _ = self.acknowledged.subscribe().wait_for(|all| *all > bytes).await;
    }

    /// Runs the future, or fails after too long without progress.
    pub(super) async fn guard<T>(
        &self,
        path: &str,
        work: impl Future<Output = Result<T, TransportError>>,
    ) -> Result<T, TransportError> {
        tokio::select! {
            done = work => done,
            () = self.silence() => {
                let message = format!("{path}: no progress for {} s", self.patience.as_secs_f64());
                Err(TransportError::new(Kind::TimedOut, message))
            }
        }
    }

    async fn silence(&self) {
        loop {
            let end = *self.heard.lock().unwrap_or_else(PoisonError::into_inner) + self.patience;
            if Instant::now() >= end {
                return;
            }
            sleep_until(end).await;
        }
    }
}
