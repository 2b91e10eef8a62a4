//! Reports what a long wait is for.

use std::pin::pin;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::time::Instant;

/// Time before the first report.
pub const FIRST_WORD: Duration = Duration::from_secs(3);
/// Time between reports.
pub const NEXT_WORD: Duration = Duration::from_secs(60);

/// A failed attempt that will be repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    /// The error.
    pub words: String,
    /// Time until the next attempt.
    pub pause: Duration,
}

tokio::task_local! {
    /// Receiver of the failed attempts of this task.
    static WAITER: UnboundedSender<Failed>;
}

/// Reports to the waiting caller, if there is one.
pub fn tell(failed: impl FnOnce() -> Failed) {
    let _ = WAITER.try_with(|waiter| waiter.send(failed()));
}

/// Runs `work`. If it takes more than some seconds, calls `say` with the last attempt that failed.
pub async fn told<T>(say: impl Fn(Option<&Failed>), work: impl Future<Output = T>) -> T {
    let (waiter, mut failures) = unbounded_channel();
    let mut work = pin!(WAITER.scope(waiter, work));
    let (mut last, mut at) = (None, Instant::now() + FIRST_WORD);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            Some(failed) = failures.recv() => last = Some(failed),
            () = tokio::time::sleep_until(at) => {
                say(last.as_ref());
                at += NEXT_WORD;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn first_message_comes_within_5_s_and_names_the_failure() {
        let (begun, said) = (Instant::now(), Mutex::new(Vec::new()));
        let say = |failed: Option<&Failed>| {
            said.lock().unwrap().push((begun.elapsed(), failed.map(|failed| failed.words.clone())));
        };
        told(say, tokio::time::sleep(Duration::from_secs(2))).await;
        assert!(said.lock().unwrap().is_empty(), "what is quick needs no words");
        let work = async {
            tell(|| Failed { words: "HTTP 500".to_owned(), pause: Duration::from_secs(100) });
            tokio::time::sleep(Duration::from_secs(100)).await;
        };
        told(say, work).await;
        let said = said.into_inner().unwrap();
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(said[0].0 < Duration::from_secs(2 + 5), "{said:?}");
        assert!(said.iter().all(|(_, words)| words.as_deref() == Some("HTTP 500")), "{said:?}");
        tell(|| unreachable!("nobody waits"));
    }
}
