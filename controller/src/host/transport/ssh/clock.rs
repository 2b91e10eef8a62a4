//! What is heard of a transfer, and how long nothing may be heard.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::host::transport::{TransportError, TransportErrorKind as Kind};

/// One transfer's signs of life, from all its channels together.
///
/// A clock per request would run out on a slow line, where requests wait for each other, and so
/// would one per channel: the channels share the line. What cannot happen on a line that is only
/// slow is that nothing at all is acknowledged.
pub(super) struct Clock<'a> {
    patience: Duration,
    heard: Mutex<Instant>,
    acknowledged: watch::Sender<u64>,
    told: &'a (dyn Fn(u64) + Send + Sync),
}

impl<'a> Clock<'a> {
    /// `told` hears the bytes acknowledged so far.
    pub(super) fn new(patience: Duration, told: &'a (dyn Fn(u64) + Send + Sync)) -> Self {
        Self { patience, heard: Mutex::new(Instant::now()), acknowledged: watch::Sender::new(0), told }
    }

    /// How long nothing may be heard.
    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    /// The other side did something.
    pub(super) fn hear(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// The other side has this many more bytes.
    pub(super) fn acknowledge(&self, bytes: u64) {
        self.hear();
        self.acknowledged.send_modify(|all| *all += bytes);
        (self.told)(self.acknowledged());
    }

    /// Bytes acknowledged so far.
    pub(super) fn acknowledged(&self) -> u64 {
        *self.acknowledged.borrow()
    }

    /// Waits until another channel's bytes are acknowledged.
    pub(super) async fn wait_for_more_than(&self, bytes: u64) {
        // Refused only when the sender is gone, which is ours.
        let _ = self.acknowledged.subscribe().wait_for(|all| *all > bytes).await;
    }

    /// Does the work, or gives it up when nothing is heard of it for too long.
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
