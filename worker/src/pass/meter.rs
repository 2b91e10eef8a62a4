//! Measures how long each kind of work in a pass takes. On request it also records the start and
//! end of each piece of work, per thread.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Kinds of work of the threads of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Loader: reads bytes from the source, waiting for the network included.
    Reading,
    /// Loader: decodes bytes to tensors.
    Decoding,
    /// Device: waits for weights, or for hidden states from another device.
    Waiting,
    /// Device: embeds token ids.
    Embedding,
    /// A device: norm and token mixer.
    Mixer,
    /// A device: norm and feed-forward, router and experts.
    FeedForward,
    /// Device: computes statistics.
    Statistics,
    /// Device: final norm, logits, likelihoods.
    Head,
    /// Device: writes a save point.
    Saving,
}

impl Work {
    /// Number of kinds.
    const COUNT: usize = Self::Saving as usize + 1;

    /// One word for time lines.
    pub fn word(self) -> &'static str {
        match self {
            Self::Reading => "read",
            Self::Decoding => "decode",
            Self::Waiting => "wait",
            Self::Embedding => "embedding",
            Self::Mixer => "mixer",
            Self::FeedForward => "ffn",
            Self::Statistics => "statistics",
            Self::Head => "head",
            Self::Saving => "save",
        }
    }
}

/// Layer and micro-batches of a piece of work, where it has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// Layer, from 0.
    pub layer: Option<usize>,
    /// Indices of the micro-batches, from 0.
    pub micro_batches: Option<Range<usize>>,
}

/// One of the two threads of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Thread {
    /// The computing thread, by the device's index.
    Device(usize),
    /// The thread that loads its weights.
    Loader(usize),
}

/// A piece of work without interruption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Thread that did it.
    pub thread: Thread,
    /// Kind of work.
    pub work: Work,
    /// Subject of the work.
    pub subject: Subject,
    /// Start, since the meter was created.
    pub start: Duration,
    /// End, since the meter was created.
    pub end: Duration,
}

/// Sums the times of all threads of a pass.
#[derive(Debug)]
pub struct Meter {
    began: Instant,
    nanoseconds: [AtomicU64; Work::COUNT],
    /// One bit for each of the first 64 devices: whether it waits now.
    waiting: AtomicU64,
    /// `None`: only sums are recorded.
    spans: Option<Mutex<Vec<Span>>>,
}

impl Default for Meter {
    fn default() -> Self {
        Self { began: Instant::now(), nanoseconds: Default::default(), waiting: AtomicU64::new(0), spans: None }
    }
}

impl Meter {
    /// A meter that also records every span: about 100 bytes per loaded tensor and per step of a
    /// micro-batch.
    pub fn with_spans() -> Self {
        Self { spans: Some(Mutex::default()), ..Self::default() }
    }

    /// Creates the clock of one thread.
    pub fn clock(&self, thread: Thread) -> Clock<'_> {
        Clock {
            meter: self,
            thread,
            now: RefCell::new(None),
            since: Cell::new(Instant::now()),
            spans: RefCell::default(),
        }
    }

    /// Seconds of all threads on a kind of work, without interruptions.
    pub fn seconds(&self, work: Work) -> f64 {
        Duration::from_nanos(self.nanoseconds[work as usize].load(Ordering::Relaxed)).as_secs_f64()
    }

    /// Whether a device's thread waits now, for weights or for hidden states from another device.
    pub fn is_waiting(&self, device: usize) -> bool {
        self.waiting.load(Ordering::Relaxed) & bit(device) != 0
    }

    /// Spans of dropped clocks, by thread and time.
    pub fn spans(&self) -> Vec<Span> {
        let Some(spans) = &self.spans else { return Vec::new() };
        let mut spans = spans.lock().unwrap_or_else(PoisonError::into_inner).clone();
        spans.sort_by_key(|span| (span.thread, span.start));
        spans
    }
}

/// The bit of a device; 0 from the 65th on.
fn bit(device: usize) -> u64 {
    1u64.checked_shl(device as u32).unwrap_or(0)
}

/// Measures one thread. Nested work interrupts the outer work, so that times add up and spans
/// never overlap.
pub struct Clock<'m> {
    meter: &'m Meter,
    thread: Thread,
    now: RefCell<Option<(Work, Subject)>>,
    since: Cell<Instant>,
    /// Passed to the meter on drop, so that threads do not wait for each other.
    spans: RefCell<Vec<Span>>,
}

impl Clock<'_> {
    /// Measures `what` as work on `subject`.
    pub fn time_about<R>(&self, work: Work, subject: Subject, what: impl FnOnce() -> R) -> R {
        let outer = self.turn_to(Some((work, subject)));
        let result = what();
        self.turn_to(outer);
        result
    }

    /// Measures `what` with the subject of the work it interrupts.
    pub fn time<R>(&self, work: Work, what: impl FnOnce() -> R) -> R {
        let subject = self.now.borrow().as_ref().map(|(_, subject)| subject.clone());
        self.time_about(work, subject.unwrap_or_default(), what)
    }

    fn turn_to(&self, next: Option<(Work, Subject)>) -> Option<(Work, Subject)> {
        if let Thread::Device(device) = self.thread {
            match &next {
                Some((Work::Waiting, _)) => self.meter.waiting.fetch_or(bit(device), Ordering::Relaxed),
                _ => self.meter.waiting.fetch_and(!bit(device), Ordering::Relaxed),
            };
        }
        let (now, since) = (Instant::now(), self.since.get());
        let ended = self.now.replace(next);
        self.since.set(now);
        if let Some((work, subject)) = &ended {
            self.meter.nanoseconds[*work as usize].fetch_add((now - since).as_nanos() as u64, Ordering::Relaxed);
            if self.meter.spans.is_some() {
                let (start, end) = (since - self.meter.began, now - self.meter.began);
                let span = Span { thread: self.thread, work: *work, subject: subject.clone(), start, end };
                self.spans.borrow_mut().push(span);
            }
        }
        ended
    }
}

impl Drop for Clock<'_> {
    fn drop(&mut self) {
        if let Some(spans) = &self.meter.spans {
            spans.lock().unwrap_or_else(PoisonError::into_inner).append(self.spans.get_mut());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inner_time_is_excluded_from_outer_time() {
        let meter = Meter::with_spans();
        let clock = meter.clock(Thread::Device(1));
        let subject = Subject { layer: Some(3), micro_batches: Some(0..2) };
        let seen = clock.time_about(Work::Mixer, subject.clone(), || clock.time(Work::Statistics, || 7));
        clock.time(Work::Waiting, || assert!(meter.is_waiting(1) && !meter.is_waiting(0) && !meter.is_waiting(65)));
        assert!(!meter.is_waiting(1));
        drop(clock);
        let spans = meter.spans();
        let of = |span: &Span| (span.work, span.subject.clone());
        let about = |work| (work, subject.clone());
        let whole =
            [about(Work::Mixer), about(Work::Statistics), about(Work::Mixer), (Work::Waiting, Subject::default())];
        assert_eq!((seen, spans.iter().map(of).collect::<Vec<_>>()), (7, whole.to_vec()));
        assert!(spans.windows(2).all(|pair| pair[0].end <= pair[1].start));
        let sum: f64 = spans.iter().filter(|s| s.work == Work::Mixer).map(|s| (s.end - s.start).as_secs_f64()).sum();
        assert!((meter.seconds(Work::Mixer) - sum).abs() < 1e-9);
    }

    #[test]
    fn spans_are_kept_only_on_request() {
        let meter = Meter::default();
        meter.clock(Thread::Loader(0)).time(Work::Reading, || ());
        assert!(meter.spans().is_empty() && meter.seconds(Work::Reading) > 0.0);
    }
}
