//! Pauses and limits of retries.

use std::time::Duration;

use rand::Rng;
use tokio::time::{Instant, sleep_until};

use super::{HostError, HostErrorKind, HostEvent, OnEvent};
use crate::host::transport::TransportErrorKind as Kind;

/// Minimum pause after a refused login, since servers lock out clients that fail often.
const AUTH_PAUSE: Duration = Duration::from_secs(5);
/// How long a refused key is retried, since clouds install keys late.
const AUTH_TIMEOUT: Duration = Duration::from_secs(30);

/// A series of failures, ended by the next success.
pub(super) struct Retry {
    budget: Duration,
    deadline: Option<Instant>,
    row: Option<FailureStreak>,
}

struct FailureStreak {
    since: Instant,
    attempts: u32,
    refused_key_since: Option<Instant>,
}

impl Retry {
    /// Gives up when failures last longer than `budget`, or at `deadline`.
    pub(super) fn new(budget: Duration, deadline: Option<Instant>) -> Self {
        Self { budget, deadline, row: None }
    }

    /// Waits before the next attempt, or returns the error if there is none.
    pub(super) async fn wait(&mut self, error: HostError, on: OnEvent<'_>) -> Result<(), HostError> {
        let now = Instant::now();
        let first = self.row.is_none();
        let row = self.row.get_or_insert(FailureStreak { since: now, attempts: 0, refused_key_since: None });
        row.attempts += 1;
        let end = row.since + self.budget;
        let end = self.deadline.map_or(end, |deadline| end.min(deadline));
        match next_attempt(&error, row.attempts, now, &mut row.refused_key_since) {
            Some(pause) if now + pause < end => {
                if first {
                    on(HostEvent::ConnectionLost { why: error.message });
                }
                sleep_until(now + pause).await;
                Ok(())
            }
            _ => Err(error),
        }
    }

    /// Ends the series after a success.
    pub(super) fn recovered(&mut self, on: OnEvent<'_>) {
        if self.row.take().is_some() {
            on(HostEvent::Reconnected);
        }
    }
}

/// Retries an idempotent expression while only the connection fails. Returns the error from the
/// calling function when the time is over.
///
/// A macro, since futures made by an async closure cannot be proved to be `Send`, and a deploy may
/// be spawned.
macro_rules! again {
    ($budget:expr, $on:expr, $attempt:expr) => {{
        let mut retry = $crate::host::retry::Retry::new($budget, None);
        loop {
            match $attempt.await {
                Ok(value) => {
                    retry.recovered($on);
                    break value;
                }
                Err(error) => retry.wait(error, $on).await?,
            }
        }
    }};
}
pub(super) use again;

/// Pause after the `attempt`-th failure in a series; `None`: no further attempt.
pub(super) fn next_attempt(
    error: &HostError,
    attempt: u32,
    now: Instant,
    refused_key_since: &mut Option<Instant>,
) -> Option<Duration> {
    if error.kind == HostErrorKind::Connection(Kind::AuthFailed) {
        let since = *refused_key_since.get_or_insert(now);
        return (now - since < AUTH_TIMEOUT).then(|| AUTH_PAUSE.mul_f64(jitter(1.0, 1.4)));
    }
    error.is_transient().then(|| backoff(attempt))
}

/// Half a second, growing by half up to ten seconds, with random jitter since many controllers may
/// wait for one cloud.
fn backoff(attempt: u32) -> Duration {
    let steps = attempt.saturating_sub(1).min(20);
    let seconds = (0.5 * 1.5_f64.powi(steps as i32)).min(10.0);
    Duration::from_secs_f64(seconds * jitter(0.7, 1.3))
}

fn jitter(low: f64, high: f64) -> f64 {
    rand::rng().random_range(low..high)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(kind: Kind) -> HostError {
        HostError::new(HostErrorKind::Connection(kind), "x")
    }

    #[test]
    fn retry_pauses_grow_to_a_limit_with_jitter() {
        assert!(backoff(1) < Duration::from_secs(1));
        assert!(backoff(1000) >= Duration::from_secs(7) && backoff(1000) <= Duration::from_secs(13));
        let pauses: std::collections::HashSet<_> = (0..20).map(|_| backoff(5)).collect();
        assert!(pauses.len() > 1);
    }

    #[test]
    fn only_transient_errors_are_retried() {
        let (mut since, mut now) = (None, Instant::now());
        for kind in [Kind::Refused, Kind::Reset, Kind::TimedOut, Kind::Unreachable] {
            assert!(next_attempt(&failure(kind), 1, now, &mut since).is_some(), "{kind:?}");
        }
        assert_eq!(next_attempt(&failure(Kind::HostKeyChanged), 1, now, &mut since), None);
        assert_eq!(next_attempt(&HostError::new(HostErrorKind::NoSpace, "x"), 1, now, &mut since), None);
        let mut attempts = 0;
        while let Some(pause) = next_attempt(&failure(Kind::AuthFailed), 1, now, &mut since) {
            assert!(pause >= AUTH_PAUSE);
            now += pause;
            attempts += 1;
        }
        assert!((4..=6).contains(&attempts), "{attempts}");
    }

    #[tokio::test(start_paused = true)]
    async fn retry_budget_is_reset_by_a_success() {
        let events = std::sync::Mutex::new(Vec::new());
        let on = |event| events.lock().unwrap().push(event);
        let started = Instant::now();
        let mut retry = Retry::new(Duration::from_millis(1500), None);
        while retry.wait(failure(Kind::Reset), &on).await.is_ok() {}
        let lasted = started.elapsed();
        assert!(lasted >= Duration::from_millis(350) && lasted < Duration::from_millis(1500), "{lasted:?}");
        retry.recovered(&on);
        retry.wait(failure(Kind::Reset), &on).await.unwrap();
        let lost = HostEvent::ConnectionLost { why: "x".to_owned() };
        assert_eq!(*events.lock().unwrap(), [lost.clone(), HostEvent::Reconnected, lost]);
    }
}
