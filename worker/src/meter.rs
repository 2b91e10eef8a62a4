//! Where the time of a pass goes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a thread of a pass is busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The loader: bytes from the source, waiting for the network included.
    Reading,
    /// The loader: bytes to tensors.
    Decoding,
    /// The computing thread: nothing to do until the loader is ready.
    Waiting,
    /// The computing thread: layers, statistics included.
    Computing,
}

/// Adds up. Reading and decoding happen beside waiting and computing.
#[derive(Debug, Default)]
pub struct Meter {
    nanoseconds: [AtomicU64; 4],
}

impl Meter {
    /// Does something and adds the time it took.
    pub fn time<R>(&self, work: Work, what: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = what();
        self.nanoseconds[work as usize].fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }

    /// What it came to.
    pub fn seconds(&self, work: Work) -> f64 {
        Duration::from_nanos(self.nanoseconds[work as usize].load(Ordering::Relaxed)).as_secs_f64()
    }
}
