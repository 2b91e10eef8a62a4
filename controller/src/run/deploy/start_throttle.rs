//! Spaces the starts of workers, since a hub refuses some of many large simultaneous downloads.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Spaces the starts of workers by a minimum pause. Shared by all runs of a batch.
#[derive(Debug)]
pub struct StartThrottle {
    pause: Duration,
    /// Earliest time of the next start; `None` before the first.
    next: Mutex<Option<Instant>>,
    /// The first caller waits here. The others wait for it.
    queue: tokio::sync::Mutex<()>,
    waiting: AtomicU32,
}

/// A place in the queue.
struct QueueSlot<'a>(&'a AtomicU32);

impl Drop for QueueSlot<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl StartThrottle {
    /// A throttle with this pause between two starts.
    pub fn new(pause: Duration) -> Self {
        Self { pause, next: Mutex::default(), queue: tokio::sync::Mutex::default(), waiting: AtomicU32::new(0) }
    }

    /// Pause between two starts.
    pub fn pause(&self) -> Duration {
        self.pause
    }

    /// Waits for the caller's turn. `say` is called with the time to wait, if any. A cancelled
    /// wait takes no turn.
    pub async fn wait(&self, say: impl FnOnce(Duration)) {
        let before = self.waiting.fetch_add(1, Ordering::Relaxed);
        let _place = QueueSlot(&self.waiting);
        let first = self.next().map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now()));
        let wait = first + self.pause * before;
        if !wait.is_zero() {
            say(wait);
        }
        let _first = self.queue.lock().await;
        if let Some(at) = self.next() {
            tokio::time::sleep_until(at).await;
        }
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + self.pause);
    }

    fn next(&self) -> Option<Instant> {
        *self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures::future::join_all;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn starts_are_spaced_and_a_cancelled_one_uses_no_slot() {
        let (start_throttle, begun) = (StartThrottle::new(Duration::from_secs(20)), Instant::now());
        start_throttle.wait(|_| panic!("the first need not wait")).await;
        let gave_up = tokio::time::timeout(Duration::from_secs(1), start_throttle.wait(|_| {})).await;
        assert!(gave_up.is_err());
        let told = Mutex::new(Vec::new());
        let waits = (0..3).map(|_| async {
            start_throttle.wait(|wait| told.lock().unwrap().push(wait.as_secs())).await;
            begun.elapsed().as_secs()
        });
        assert_eq!(join_all(waits).await, [20, 40, 60]);
        assert_eq!(told.into_inner().unwrap(), [19, 39, 59], "each was told how long, a second after the first");
    }
}
