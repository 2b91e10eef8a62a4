//! Rate limits of calls.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// Rate limits of one account, shared by all callers.
#[derive(Debug, Default)]
pub(super) struct RateLimits(Mutex<BTreeMap<Option<&'static str>, RateLimit>>);

/// At most one call per `every`, and none before `held` ends.
#[derive(Clone, Copy, Debug)]
struct RateLimit {
    every: Duration,
    next: Instant,
    held: Instant,
}

impl RateLimit {
    fn new(every: Duration) -> Self {
        let now = Instant::now();
        Self { every, next: now, held: now }
    }
}

impl RateLimits {
    /// Sets at most one call per `every`, for this name or for all calls.
    pub(super) fn set(&self, name: Option<&'static str>, every: Duration) {
        self.lock().insert(name, RateLimit::new(every));
    }

    /// Blocks calls of this name for a time that the cloud requested. Calls without a name are not
    /// blocked, since they may end an instance.
    pub(super) fn hold(&self, name: Option<&'static str>, time: Duration) {
        if let Some(pace) = self.lock().get_mut(&name).filter(|_| name.is_some()) {
            pace.held = pace.held.max(Instant::now() + time);
        }
    }

    /// Remaining time for which the cloud blocks calls of this name.
    pub(super) fn held(&self, name: Option<&'static str>) -> Duration {
        let held = self.lock().get(&name).map(|pace| pace.held);
        held.map_or(Duration::ZERO, |held| held.saturating_duration_since(Instant::now()))
    }

    /// Waits until a call of this name is allowed, in the order of callers.
    pub(super) async fn acquire(&self, name: Option<&'static str>) {
        // In sequence: a slot of the general limit taken for later would block all other callers
        // until then.
        if name.is_some() {
            self.turn_of(name).await;
        }
        self.turn_of(None).await;
    }

    async fn turn_of(&self, name: Option<&'static str>) {
        if let Some(turn) = self.take(name, Instant::now()) {
            sleep_until(turn).await;
        }
    }

    /// Takes the next slot of calls of this name and returns its time; `None`: unlimited.
    fn take(&self, name: Option<&'static str>, now: Instant) -> Option<Instant> {
        let mut paces = self.lock();
        let pace = paces.get_mut(&name)?;
        let turn = pace.next.max(pace.held).max(now);
        pace.next = turn + pace.every;
        Some(turn)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Option<&'static str>, RateLimit>> {
        self.0.lock().expect("nothing panics while it is held")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_spaced() {
        let (paces, second) = (RateLimits::default(), Duration::from_secs(1));
        let begun = Instant::now();
        assert_eq!(paces.take(None, begun), None, "no pace, no wait");
        paces.set(None, second);
        let now = Instant::now();
        assert_eq!(paces.take(None, now), Some(now));
        assert_eq!(paces.take(None, now), Some(now + second));
        let later = now + 60 * second;
        assert_eq!(paces.take(None, later), Some(later), "what was not used is not saved up");
        assert_eq!(paces.take(None, later), Some(later + second));
        assert_eq!(paces.take(Some("launch"), later), None);
    }

    #[tokio::test(start_paused = true)]
    async fn requested_wait_applies_to_calls_of_that_kind() {
        let (paces, minute) = (RateLimits::default(), Duration::from_secs(60));
        paces.set(Some("search"), Duration::from_secs(1));
        paces.hold(Some("search"), minute);
        paces.hold(None, minute);
        assert_eq!((paces.held(Some("search")), paces.held(None)), (minute, Duration::ZERO));
        let begun = Instant::now();
        paces.acquire(None).await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        paces.acquire(Some("search")).await;
        assert_eq!((begun.elapsed(), paces.held(Some("search"))), (minute, Duration::ZERO));
    }

    #[tokio::test]
    async fn call_kinds_have_separate_queues() {
        let paces = RateLimits::default();
        paces.set(None, Duration::from_millis(1));
        paces.set(Some("launch"), Duration::from_secs(1));
        let begun = Instant::now();
        let launches = async {
            tokio::join!(paces.acquire(Some("launch")), paces.acquire(Some("launch")));
            begun.elapsed()
        };
        let other = async {
            tokio::task::yield_now().await;
            paces.acquire(None).await;
            begun.elapsed()
        };
        let (launches, other) = tokio::join!(launches, other);
        assert!(launches >= Duration::from_secs(1), "{launches:?}");
        assert!(other < Duration::from_millis(900), "{other:?}");
    }
}
