//! Limits requests to the hub to this run's share.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The window in which the hub counts requests: <https://huggingface.co/docs/hub/rate-limits>.
pub(super) const WINDOW: Duration = Duration::from_secs(300);

/// Limits the number of requests in any window.
pub(super) struct RateLimiter {
    max_requests: usize,
    window: Duration,
    /// Times of the latest requests, ascending.
    made: Mutex<VecDeque<Instant>>,
}

impl RateLimiter {
    pub(super) fn new(max_requests: usize, window: Duration) -> Self {
        Self { max_requests: max_requests.max(1), window, made: Mutex::default() }
    }

    /// Waits until another request is allowed, and counts it.
    pub(super) fn take(&self) {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.len() >= self.max_requests
            && let Some(first) = made.pop_front()
        {
            let wait = (first + self.window).saturating_duration_since(Instant::now());
            if wait > Duration::ZERO {
                tracing::info!(seconds = wait.as_secs_f32(), "its share of requests to the hub is used up; waiting");
                // The lock is held while waiting, since other threads must wait as well.
                thread::sleep(wait);
            }
        }
        made.push_back(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_window_exceeds_the_limit() {
        let window = Duration::from_millis(120);
        let rate_limiter = RateLimiter::new(4, window);
        let begun = Instant::now();
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| (0..5).for_each(|_| rate_limiter.take()));
            }
        });
        assert!(begun.elapsed() >= 3 * window, "of 15 the fifth waits for the first, and so on");
    }
}
