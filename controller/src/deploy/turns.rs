//! Who starts a worker next: a hub that many instances ask at the same moment for many gigabytes refuses some of them.

use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

/// Starts of workers, each at least a pause after the one before. Shared by all runs of a batch.
#[derive(Debug)]
pub struct Turns {
    pause: Duration,
    next: Mutex<Option<Instant>>,
}

impl Turns {
    /// With so much time between two starts.
    pub fn new(pause: Duration) -> Self {
        Self { pause, next: Mutex::new(None) }
    }

    /// Returns when it is the caller's turn. One that gives up waiting takes no turn.
    pub async fn wait(&self) {
        let mut next = self.next.lock().await;
        if let Some(at) = *next {
            tokio::time::sleep_until(at).await;
        }
        *next = Some(Instant::now() + self.pause);
    }
}

#[cfg(test)]
mod tests {
    use futures::future::join_all;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn starts_are_a_pause_apart_and_who_gives_up_takes_no_turn() {
        let (turns, begun) = (Turns::new(Duration::from_secs(20)), Instant::now());
        turns.wait().await;
        let gave_up = tokio::time::timeout(Duration::from_secs(1), turns.wait()).await;
        assert!(gave_up.is_err());
        let waits = (0..3).map(|_| async {
            turns.wait().await;
            begun.elapsed().as_secs()
        });
        assert_eq!(join_all(waits).await, [20, 40, 60]);
    }
}
