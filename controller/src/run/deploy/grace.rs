//! Time limit of a host from the login to the start of its worker, over all steps and retries.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::host::{HostError, HostErrorKind, HostEvent};
use crate::units::Span;

/// Minimum rate of an upload in bytes per second.
const USABLE_RATE: u64 = 128 << 10;

/// Time limit of one host. Each byte of an upload extends it when it is first acknowledged, by its
/// time at the usable rate. Slow lines are therefore tolerated, and unusable ones are not.
pub(super) struct Grace {
    timeouts: Duration,
    spent: Mutex<Spent>,
}

struct Spent {
    /// End, without the extension by uploads.
    end: Instant,
    /// Maximum acknowledged bytes per upload.
    uploaded: BTreeMap<String, u64>,
    stage: &'static str,
    /// The last failure that was retried.
    failure: Option<String>,
}

impl Grace {
    /// Starts now.
    pub(super) fn new(timeouts: Duration) -> Self {
        let (uploaded, stage, failure) = (BTreeMap::new(), "connecting", None);
        let spent = Spent { end: Instant::now() + timeouts, uploaded, stage, failure };
        Self { timeouts, spent: Mutex::new(spent) }
    }

    pub(super) fn end(&self) -> Instant {
        let spent = self.lock();
        let uploaded: u64 = spent.uploaded.values().sum();
        spent.end + Duration::from_secs(uploaded / USABLE_RATE)
    }

    pub(super) fn is_over(&self) -> bool {
        Instant::now() >= self.end()
    }

    pub(super) fn begin(&self, stage: &'static str) {
        self.lock().stage = stage;
    }

    pub(super) fn record_upload(&self, event: &HostEvent) {
        if let HostEvent::Uploading { name, sent, .. } = event {
            let mut spent = self.lock();
            let most = spent.uploaded.entry(name.clone()).or_default();
            *most = (*most).max(*sent);
        }
    }

    /// Records a failure that is retried.
    pub(super) fn failed(&self, failure: &str) {
        self.lock().failure = Some(failure.to_owned());
    }

    /// Excludes time that the host could not use.
    pub(super) fn put_off(&self, time: Duration) {
        self.lock().end += time;
    }

    /// Runs the future, or returns [`Grace::verdict`] when the time is over.
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

    /// The error of a host that exceeded its time.
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

    /// Uploads 100 MB at `bytes` per second. Returns its duration until the end or the time limit,
    /// and whether it completed.
    async fn upload(bytes: u64) -> (u64, bool) {
        let (grace, begun) = (Grace::new(TIMEOUT), Instant::now());
        let work = async {
            let mut sent = 0;
            while sent < 100_000_000 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                sent += bytes;
                grace.record_upload(&HostEvent::Uploading { name: "worker".into(), sent, total: 100_000_000 });
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
        let told = |sent| grace.record_upload(&HostEvent::Uploading { name: "worker".into(), sent, total: 1 << 30 });
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
