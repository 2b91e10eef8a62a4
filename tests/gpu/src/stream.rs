//! Streams: each runs its work in order on its own thread; only events order work of two streams.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Work of a stream.
enum Task {
    Work(Box<dyn FnOnce() -> Result<(), String> + Send>),
    Reach(Arc<Event>, u64),
    WaitFor(Arc<Event>, u64),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A counter that only grows, with waiting threads.
#[derive(Debug, Default)]
struct Counter {
    value: Mutex<u64>,
    grown: Condvar,
}

impl Counter {
    fn reach(&self, value: u64) {
        let mut now = lock(&self.value);
        *now = value.max(*now);
        self.grown.notify_all();
    }

    fn wait_for(&self, value: u64) {
        let mut now = lock(&self.value);
        while *now < value {
            now = self.grown.wait(now).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// An event.
#[derive(Debug, Default)]
pub(crate) struct Event {
    /// Number of records.
    recorded: AtomicU64,
    /// The last record that was reached.
    reached: Counter,
}

impl Event {
    /// Waits for the work before the last record.
    pub(crate) fn synchronize(&self) {
        self.reached.wait_for(self.recorded.load(Ordering::SeqCst));
    }

    /// Whether the work before the last record is done.
    pub(crate) fn is_reached(&self) -> bool {
        *lock(&self.reached.value) >= self.recorded.load(Ordering::SeqCst)
    }
}

/// A stream.
#[derive(Debug)]
pub(crate) struct Stream {
    tasks: Sender<(u64, Task)>,
    asked: AtomicU64,
    done: Arc<Counter>,
    failed: Arc<Mutex<Option<String>>>,
}

impl Stream {
    /// A stream whose tasks are randomly delayed by up to `delay`.
    pub(crate) fn new(delay: Duration) -> Self {
        let (tasks, receiver) = channel::<(u64, Task)>();
        let (done, failed) = (Arc::new(Counter::default()), Arc::new(Mutex::new(None)));
        let (counter, failure) = (Arc::clone(&done), Arc::clone(&failed));
        static STREAMS: AtomicU64 = AtomicU64::new(1);
        let mut dice = STREAMS.fetch_add(1, Ordering::SeqCst);
        std::thread::spawn(move || {
            while let Ok((number, task)) = receiver.recv() {
                dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                if !delay.is_zero() && dice >> 61 == 0 {
                    std::thread::sleep(delay.mul_f64((dice >> 32 & 0xffff) as f64 / 65_536.0));
                }
                match task {
                    Task::Reach(event, ticket) => event.reached.reach(ticket),
                    Task::WaitFor(event, ticket) => event.reached.wait_for(ticket),
                    // After an error no work is done, as on a GPU.
                    Task::Work(_) if lock(&failure).is_some() => {}
                    Task::Work(work) => {
                        if let Err(why) = work() {
                            eprintln!("emulated GPU: {why}");
                            *lock(&failure) = Some(why);
                        }
                    }
                }
                counter.reach(number);
            }
        });
        Self { tasks, asked: AtomicU64::new(0), done, failed }
    }

    /// Enqueues work.
    pub(crate) fn ask(&self, work: impl FnOnce() -> Result<(), String> + Send + 'static) {
        self.add(Task::Work(Box::new(work)));
    }

    fn add(&self, task: Task) {
        let number = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        // The thread ends with the stream.
        let _ = self.tasks.send((number, task));
    }

    /// Waits for all enqueued work.
    ///
    /// # Errors
    /// An operation failed.
    pub(crate) fn synchronize(&self) -> Result<(), String> {
        self.done.wait_for(self.asked.load(Ordering::SeqCst));
        lock(&self.failed).clone().map_or(Ok(()), Err)
    }

    /// Whether all enqueued work is done.
    pub(crate) fn is_done(&self) -> bool {
        *lock(&self.done.value) >= self.asked.load(Ordering::SeqCst)
    }

    /// Records the event after all enqueued work.
    pub(crate) fn record(&self, event: &Arc<Event>) {
        let ticket = event.recorded.fetch_add(1, Ordering::SeqCst) + 1;
        self.add(Task::Reach(Arc::clone(event), ticket));
    }

    /// Makes later work wait for the event's last record.
    pub(crate) fn wait(&self, event: &Arc<Event>) {
        let ticket = event.recorded.load(Ordering::SeqCst);
        self.add(Task::WaitFor(Arc::clone(event), ticket));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_ordered_and_synchronise_only_by_events() {
        let delay = Duration::from_millis(3);
        let (first, second) = (Stream::new(delay), Stream::new(delay));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let note = |stream: &Stream, what: u32| {
            let seen = Arc::clone(&seen);
            stream.ask(move || {
                lock(&seen).push(what);
                Ok(())
            });
        };
        let event = Arc::new(Event::default());
        second.wait(&event);
        for round in 0..20 {
            note(&first, 2 * round);
            first.record(&event);
            second.wait(&event);
            note(&second, 2 * round + 1);
            second.record(&event);
            first.wait(&event);
        }
        first.synchronize().unwrap();
        event.synchronize();
        assert!(event.is_reached() && first.is_done());
        assert_eq!(*lock(&seen), (0..40).collect::<Vec<_>>());
    }

    #[test]
    fn failure_is_sticky_and_stops_the_stream() {
        let stream = Stream::new(Duration::ZERO);
        stream.ask(|| Err("no such address".to_owned()));
        stream.ask(|| panic!("never reached"));
        assert_eq!(stream.synchronize(), Err("no such address".to_owned()));
        let event = Arc::new(Event::default());
        stream.record(&event);
        event.synchronize();
        assert!(stream.synchronize().is_err());
    }
}
