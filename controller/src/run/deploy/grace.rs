//! How long a host may take from the login until its worker runs: one patience for all that is
//! done there, however often a part of it fails and is tried again.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::host::{HostError, HostErrorKind, HostEvent};
use crate::units::Span;

/// Bytes per second at which an upload is worth waiting for.
const USABLE_RATE: u64 = 128 << 10;

/// One host's time. Each byte of an upload that the host acknowledges for the first time adds what
/// it takes at the usable rate, so that a slow line is borne and one that drips is not.
pub(super) struct Grace {
    timeouts: Duration,
    spent: Mutex<Spent>,
}

/// What it was spent on so far.
struct Spent {
    /// When it ends, without what uploads add.
    end: Instant,
    /// Most bytes of each upload that were acknowledged.
    uploaded: BTreeMap<String, u64>,
    /// What is being done.
    stage: &'static str,
    /// The last failure, which was tried again.
    failure: Option<String>,
}

impl Grace {
    /// From now on.
    pub(super) fn new(timeouts: Duration) -> Self {
        let (uploaded, stage, failure) = (BTreeMap::new(), "connecting", None);
        let spent = Spent { end: Instant::now() + timeouts, uploaded, stage, failure };
        Self { timeouts, spent: Mutex::new(spent) }
    }

    /// When it is over, as things stand.
    pub(super) fn end(&self) -> Instant {
        let spent = self.lock();
        let uploaded: u64 = spent.uploaded.values().sum();
        spent.end + Duration::from_secs(uploaded / USABLE_RATE)
    }

    /// It is over.
    pub(super) fn is_over(&self) -> bool {
        Instant::now() >= self.end()
    }

    /// Something else is done from here on.
    pub(super) fn begin(&self, stage: &'static str) {
        self.lock().stage = stage;
    }

    /// Takes note of an upload's bytes.
    pub(super) fn hear(&self, event: &HostEvent) {
        if let HostEvent::Uploading { name, sent, .. } = event {
            let mut spent = self.lock();
            let most = spent.uploaded.entry(name.clone()).or_default();
            *most = (*most).max(*sent);
        }
    }

    /// Takes note of a failure that is tried again.
    pub(super) fn failed(&self, failure: &str) {
        self.lock().failure = Some(failure.to_owned());
    }

    /// Excludes time that the host could not use.
    pub(super) fn put_off(&self, time: Duration) {
        self.lock().end += time;
    }

    /// Does the work, or ends it with [`Grace::verdict`] when the time is over first.
    pub(super) async fn within<T>(&self, work: impl Future<Output = Result<T, HostError>>) -> Result<T, HostError> {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                () = sleep_until(self.end()) => {}
            }
            if self.is_over() {
                return Err(self.verdict());
            }
        }
    }

    /// Why a host is given up whose time is over.
    pub(super) fn verdict(&self) -> HostError {
        let spent = self.lock();
        let failure = spent.failure.as_ref().map_or_else(String::new, |failure| format!("; last failure: {failure}"));
        let (timeouts, stage) = (Span(self.timeouts), spent.stage);
        let message = format!("the host was not ready {timeouts} after the login ({stage}){failure}");
        HostError::new(HostErrorKind::Deadline, message)
    }

    fn lock(&self) -> MutexGuard<'_, Spent> {
        self.spent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(300);

    /// An upload of 100 MB that gets on by `bytes` a second; how long it was borne, and whether to
    /// its end.
    async fn upload(bytes: u64) -> (u64, bool) {
        let (grace, begun) = (Grace::new(TIMEOUT), Instant::now());
        let work = async {
            let mut sent = 0;
            while sent < 100_000_000 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                sent += bytes;
                grace.hear(&HostEvent::Uploading { name: "worker".into(), sent, total: 100_000_000 });
            }
            Ok(())
        };
        let done = grace.within(work).await;
        (begun.elapsed().as_secs(), done.is_ok())
    }

    #[tokio::test(start_paused = true)]
    async fn slow_upload_extends_the_timeout_and_a_stalling_one_does_not() {
        assert_eq!(upload(200_000).await, (500, true), "longer than the patience");
        assert_eq!(upload(1).await, (300, false));
        let (lasted, done) = upload(13_107).await;
        assert!(!done && (300..340).contains(&lasted), "a tenth of the usable rate adds a tenth: {lasted}");
    }

    #[tokio::test(start_paused = true)]
    async fn repeated_progress_does_not_extend_the_timeout() {
        let (grace, begun) = (Grace::new(TIMEOUT), Instant::now());
        let told = |sent| grace.hear(&HostEvent::Uploading { name: "worker".into(), sent, total: 1 << 30 });
        (0..50).for_each(|_| [0, 10 * USABLE_RATE, 3].into_iter().for_each(told));
        assert_eq!(grace.end() - begun, TIMEOUT + Duration::from_secs(10));
        grace.put_off(Duration::from_secs(60));
        assert_eq!(grace.end() - begun, TIMEOUT + Duration::from_secs(70));
    }

    #[tokio::test(start_paused = true)]
    async fn timeout_error_names_the_step_and_the_last_failure() {
        let grace = Grace::new(TIMEOUT);
        grace.begin("looking at it");
        grace.failed("`sh -s` did not end within 90 s");
        let error = grace.within(std::future::pending::<Result<(), HostError>>()).await.unwrap_err();
        assert!(grace.is_over() && !error.is_transient() && !error.is_here());
        let told = ["5 min 00 s", "looking at it", "did not end within 90 s"];
        assert!(told.iter().all(|word| error.message.contains(*word)), "{error}");
    }
}
