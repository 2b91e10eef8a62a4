//! Fetches announced bytes before they are read: many ranges at the same time, in reading order,
//! in limited memory.
//!
//! Each part is fetched by a separate thread into a reused buffer. Bytes in transit or waiting to
//! be read stay within the limit, except for a part that the reader of the earliest layer waits
//! for; readers of later layers, on other devices, wait for free memory. A late part is requested
//! a second time, and the first complete answer is used, so that one slow connection does not
//! delay the others.
//!
//! Verified files ([`super::verify`]) are hashed by separate threads as their parts arrive. A part
//! of them is held until it is both read and hashed.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::http::Timeouts;
use super::plan::Part;
use super::remote::RemoteFile;
use super::response::RequestFailure;
use super::verify::{Hasher, Schedule};
use crate::error::{Result, WorkerError};

/// Interval at which idle threads look for late parts.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Concurrent fetches of one part; the second is for a late one.
const ATTEMPTS: u32 = 2;
/// A part is late after this multiple of its expected time. It is given up, and resumed on another
/// connection, after [`HOPELESS`] times it.
const LATE: f64 = 3.0;
const HOPELESS: f64 = 10.0;
/// Files hashed at the same time. A pass rarely reads more.
const HASHERS: usize = 4;

/// Limits of memory and connections.
#[derive(Clone, Copy, Debug)]
pub(super) struct PrefetchLimits {
    /// Bytes of buffers.
    pub(super) bytes: u64,
    /// Maximum concurrent requests.
    pub(super) connections: usize,
}

/// A running prefetch of announced bytes. It ends when dropped.
pub(super) struct Prefetcher {
    shared: Arc<Shared>,
    /// Part indices by file and offset.
    by_place: Vec<usize>,
}

struct Shared {
    files: Arc<Vec<RemoteFile>>,
    parts: Vec<Part>,
    limits: PrefetchLimits,
    timeouts: Timeouts,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    status: Vec<Status>,
    /// The first part that is not being fetched.
    next: usize,
    /// Parts that are being fetched.
    coming: Vec<usize>,
    /// The first wanted part that has not been read.
    unread: usize,
    /// Bytes of started parts that are not yet read or hashed.
    held: u64,
    /// Parts that readers wait for.
    waiting: Vec<usize>,
    checks: Vec<FileHash>,
    /// Parts that are not yet hashed.
    unhashed: Vec<bool>,
    pool: Pool,
    rate: TransferRate,
    failed: Option<WorkerError>,
    /// Whether the failure is a wrong hash.
    damaged: bool,
    closed: bool,
}

enum Status {
    Planned,
    /// Numbers of fetches that were `begun` and are still `running`.
    Coming {
        since: Instant,
        begun: u32,
        running: u32,
        settled: Arc<AtomicBool>,
    },
    /// The number of bytes still to be read; 0: the part waits for its hash.
    Here {
        bytes: Arc<Vec<u8>>,
        left: u64,
    },
    Gone,
}

/// The hash of a file in progress.
struct FileHash {
    file: usize,
    /// Its parts, in file order.
    parts: Vec<usize>,
    /// Number of hashed parts.
    hashed: usize,
    /// `None` while a thread hashes the next part, and at the end.
    hasher: Option<Hasher>,
}

impl FileHash {
    fn is_whole(&self) -> bool {
        self.hashed == self.parts.len()
    }
}

/// A fetch to do.
struct Task {
    part: usize,
    buffer: Vec<u8>,
    settled: Arc<AtomicBool>,
    hopeless_after: Duration,
}

impl Prefetcher {
    pub(super) fn start(
        files: &Arc<Vec<RemoteFile>>,
        schedule: Schedule,
        limits: PrefetchLimits,
        timeouts: Timeouts,
    ) -> Self {
        let Schedule { parts, verified, .. } = schedule;
        let mut by_place: Vec<usize> = (0..parts.len()).collect();
        by_place.sort_by_key(|&part| (parts[part].file, parts[part].range.start));
        let threads = limits.connections.min(parts.len());
        let hashers = HASHERS.min(verified.len());
        let mut unhashed = vec![false; parts.len()];
        verified.iter().flat_map(|(_, parts)| parts).for_each(|part| unhashed[*part] = true);
        let check = |(file, parts): (usize, Vec<usize>)| {
            let hasher = files[file].digest().map(|digest| Hasher::new(digest, files[file].size()));
            FileHash { file, parts, hashed: 0, hasher }
        };
        let state = State {
            status: parts.iter().map(|_| Status::Planned).collect(),
            next: 0,
            unread: 0,
            checks: verified.into_iter().map(check).collect(),
            unhashed,
            coming: Vec::new(),
            held: 0,
            waiting: Vec::new(),
            pool: Pool::default(),
            rate: TransferRate::default(),
            failed: None,
            damaged: false,
            closed: false,
        };
        let (files, state) = (Arc::clone(files), Mutex::new(state));
        let shared = Arc::new(Shared { files, parts, limits, timeouts, state, changed: Condvar::new() });
        for _ in 0..threads {
            let shared = Arc::clone(&shared);
            // Threads are not joined: one that is blocked on a silent connection must not delay
            // the end of a run.
            thread::spawn(move || shared.work());
        }
        for _ in 0..hashers {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.hash());
        }
        Self { shared, by_place }
    }

    /// Copies announced bytes of a file, waiting if necessary. `Ok(false)`: some were not
    /// announced, or have been read already.
    pub(super) fn read(&self, file: usize, bytes: &Range<u64>, into: &mut [u8]) -> Result<bool> {
        let Some(parts) = self.covering(file, bytes) else { return Ok(false) };
        for part in parts {
            let Some(here) = self.shared.wait_for(part)? else { return Ok(false) };
            let of = &self.shared.parts[part].range;
            let (start, end) = (bytes.start.max(of.start), bytes.end.min(of.end));
            let place = |at: u64, from: u64| (at - from) as usize;
            into[place(start, bytes.start)..place(end, bytes.start)]
                .copy_from_slice(&here[place(start, of.start)..place(end, of.start)]);
            self.shared.has_read(part, end - start, here);
        }
        Ok(true)
    }

    /// Indices of the files whose hash matches the listed one.
    pub(super) fn verified(&self) -> Vec<usize> {
        self.shared.lock().checks.iter().filter(|check| check.is_whole()).map(|check| check.file).collect()
    }

    /// Whether a file's hash differs from the listed one.
    pub(super) fn is_damaged(&self) -> bool {
        self.shared.lock().damaged
    }

    /// Waits until all verified files are hashed.
    ///
    /// # Errors
    /// Kind `Checkpoint`: a file differs from the hub's listing. Errors of fetching a
    /// part.
    pub(super) fn verify(&self) -> Result<()> {
        let mut state = self.shared.lock();
        loop {
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            if state.checks.iter().all(FileHash::is_whole) {
                return Ok(());
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The parts that contain all of `bytes`.
    fn covering(&self, file: usize, bytes: &Range<u64>) -> Option<Vec<usize>> {
        let part = |at: usize| &self.shared.parts[at];
        let first = self.by_place.partition_point(|&at| (part(at).file, part(at).range.end) <= (file, bytes.start));
        let mut covering = Vec::new();
        let mut end = bytes.start;
        for &at in &self.by_place[first..] {
            if end >= bytes.end {
                break;
            }
            if part(at).file != file || part(at).range.start > end {
                return None;
            }
            end = part(at).range.end;
            covering.push(at);
        }
        (end >= bytes.end).then_some(covering)
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ------------------------------------------------------------------------------ readers

    /// The bytes of a part; `None` if all wanted bytes of it have been read.
    fn wait_for(&self, part: usize) -> Result<Option<Arc<Vec<u8>>>> {
        let mut state = self.lock();
        if let Some(found) = state.found(part) {
            return found;
        }
        state.waiting.push(part);
        self.changed.notify_all();
        loop {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            if let Some(found) = state.found(part) {
                let place = state.waiting.iter().position(|waited| *waited == part).expect("put there above");
                state.waiting.swap_remove(place);
                return found;
            }
        }
    }

    /// Records that `count` bytes of a part were copied. After the last one its buffer is
    /// released.
    fn has_read(&self, part: usize, count: u64, bytes: Arc<Vec<u8>>) {
        drop(bytes);
        let mut state = self.lock();
        let Status::Here { left, .. } = &mut state.status[part] else { return };
        *left = left.saturating_sub(count);
        if *left > 0 {
            return;
        }
        let unread = |at: &usize| {
            self.parts[*at].wanted > 0 && !matches!(state.status[*at], Status::Gone | Status::Here { left: 0, .. })
        };
        state.unread = (state.unread..self.parts.len()).find(unread).unwrap_or(self.parts.len());
        self.release(&mut state, part);
        self.changed.notify_all();
    }

    /// Releases a part that has been read and hashed.
    fn release(&self, state: &mut State, part: usize) {
        if state.unhashed[part] || !matches!(state.status[part], Status::Here { left: 0, .. }) {
            return;
        }
        let Status::Here { bytes, .. } = std::mem::replace(&mut state.status[part], Status::Gone) else { return };
        state.held -= self.parts[part].len();
        // Near the end buffers are not reused.
        if let Some(buffer) = Arc::into_inner(bytes).filter(|_| state.next < self.parts.len()) {
            state.pool.give_back(buffer);
        }
    }

    // ------------------------------------------------------------------------------ hashes

    /// Main loop of a hashing thread.
    fn hash(&self) {
        let _alarm = PanicGuard(self);
        let mut state = self.lock();
        loop {
            if state.closed || state.failed.is_some() || state.checks.iter().all(FileHash::is_whole) {
                return;
            }
            let Some((number, part, bytes, mut hasher)) = state.next_to_hash() else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            hasher.add(&bytes);
            drop(bytes);
            state = self.lock();
            state.unhashed[part] = false;
            self.release(&mut state, part);
            let FileHash { file, parts, hashed, hasher: kept } = &mut state.checks[number];
            if *hashed + 1 < parts.len() {
                (*hashed, *kept) = (*hashed + 1, Some(hasher));
            } else {
                match self.files[*file].check_hash(&hasher.hex()) {
                    Ok(()) => *hashed += 1,
                    Err(error) => (state.failed, state.damaged) = (Some(error), true),
                }
            }
            self.changed.notify_all();
        }
    }

    // ------------------------------------------------------------------------------ fetchers

    /// Main loop of a fetching thread.
    fn work(&self) {
        let _alarm = PanicGuard(self);
        while let Some(mut task) = self.next_task() {
            let fetched = self.fetch(&mut task);
            self.settle(task, fetched);
        }
    }

    fn next_task(&self) -> Option<Task> {
        let mut state = self.lock();
        loop {
            if state.closed || state.failed.is_some() {
                return None;
            }
            let late = state.late(&self.parts, self.timeouts.late);
            // Parts that readers wait for have priority.
            let part = late
                .filter(|part| state.waiting.iter().any(|waited| waited >= part))
                .or_else(|| self.may_begin(&state))
                .or(late);
            if let Some(part) = part {
                return Some(self.begin(&mut state, part));
            }
            if state.next == self.parts.len() && state.coming.is_empty() {
                return None;
            }
            state = self.changed.wait_timeout(state, POLL_INTERVAL).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The next part, if there is memory for it or a reader of the earliest layer waits. Later
    /// parts wait for memory: what occupies it will be read by readers of earlier layers, which
    /// never wait for a later layer.
    fn may_begin(&self, state: &State) -> Option<usize> {
        let part = self.parts.get(state.next)?;
        let earliest = self.parts.get(state.unread).map_or(usize::MAX, |unread| unread.layer);
        let must = |waited: &usize| *waited >= state.next && self.parts[*waited].layer <= earliest;
        let room = state.held + part.len() <= self.limits.bytes;
        // Hashing frees memory by itself.
        (room || (state.waiting.iter().any(must) && !state.hashing())).then_some(state.next)
    }

    fn begin(&self, state: &mut State, part: usize) -> Task {
        let len = self.parts[part].len();
        let since = Instant::now();
        let settled = match &mut state.status[part] {
            Status::Coming { begun, running, settled, .. } => {
                (*begun, *running) = (*begun + 1, *running + 1);
                Arc::clone(settled)
            }
            status => {
                let settled = Arc::new(AtomicBool::new(false));
                *status = Status::Coming { since, begun: 1, running: 1, settled: Arc::clone(&settled) };
                state.next += 1;
                state.held += len;
                state.coming.push(part);
                settled
            }
        };
        let room = self.limits.bytes.saturating_sub(state.held);
        let buffer = state.pool.take(len as usize, room);
        let hopeless_after = self.timeouts.silence + state.rate.due(len).mul_f64(HOPELESS);
        Task { part, buffer, settled, hopeless_after }
    }

    /// Fills the task's buffer, with retries. `Ok(false)`: it is no longer needed.
    fn fetch(&self, task: &mut Task) -> Result<bool> {
        let Part { file, range, .. } = &self.parts[task.part];
        let file = &self.files[*file];
        let buffer = &mut task.buffer;
        buffer.resize((range.end - range.start) as usize, 0);
        let (mut filled, mut failed) = (0, 0);
        loop {
            if task.settled.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let (before, begun) = (filled, Instant::now());
            let go_on = || !task.settled.load(Ordering::Relaxed) && begun.elapsed() < task.hopeless_after;
            let refusal = match file.read_on(range.start, buffer, &mut filled, &go_on) {
                _ if filled == buffer.len() => return Ok(true),
                Ok(()) => {
                    let why = format!("only {filled} of {} bytes came in time", buffer.len());
                    RequestFailure::Retry { why, pause: Some(Duration::ZERO) }
                }
                Err(refusal) => refusal,
            };
            if task.settled.load(Ordering::Relaxed) {
                return Ok(false);
            }
            failed = if filled > before { 1 } else { failed + 1 };
            file.wait(failed, refusal)?;
        }
    }

    fn settle(&self, task: Task, fetched: Result<bool>) {
        let mut state = self.lock();
        let Task { part, buffer, .. } = task;
        let Status::Coming { since, running, settled, .. } = &mut state.status[part] else {
            // The other fetch was faster.
            state.pool.give_back(buffer);
            return;
        };
        match fetched {
            Ok(true) => {
                settled.store(true, Ordering::Relaxed);
                let (took, Part { wanted, .. }) = (since.elapsed(), &self.parts[part]);
                state.status[part] = Status::Here { bytes: Arc::new(buffer), left: *wanted };
                state.coming.retain(|&other| other != part);
                self.release(&mut state, part);
                state.rate.add(self.parts[part].len(), took);
            }
            // The other fetch may still succeed.
            _ if *running > 1 => {
                *running -= 1;
                state.pool.give_back(buffer);
            }
            Err(error) => state.failed = Some(error),
            Ok(false) => state.failed = Some(WorkerError::internal("a range was given up that was still needed")),
        }
        self.changed.notify_all();
    }
}

/// Reports a panicked thread to the readers that wait for it.
struct PanicGuard<'a>(&'a Shared);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.lock().failed = Some(WorkerError::internal("a thread that fetched weights panicked"));
            self.0.changed.notify_all();
        }
    }
}

impl State {
    /// The result for a reader, once known: the bytes of a part; `None` if all wanted bytes of it
    /// have been read.
    fn found(&self, part: usize) -> Option<Result<Option<Arc<Vec<u8>>>>> {
        match &self.status[part] {
            Status::Here { left: 0, .. } | Status::Gone => Some(Ok(None)),
            Status::Here { bytes, .. } => Some(Ok(Some(Arc::clone(bytes)))),
            Status::Planned | Status::Coming { .. } => self.failed.clone().map(Err),
        }
    }

    /// The next part that can be hashed: the index of its file's hash, the part, its bytes, and
    /// the hash so far, which is returned to [`FileHash::hasher`].
    fn next_to_hash(&mut self) -> Option<(usize, usize, Arc<Vec<u8>>, Hasher)> {
        let Self { checks, status, .. } = self;
        checks.iter_mut().enumerate().find_map(|(number, check)| {
            let part = *check.parts.get(check.hashed)?;
            let Status::Here { bytes, .. } = &status[part] else { return None };
            Some((number, part, Arc::clone(bytes), check.hasher.take()?))
        })
    }

    /// Whether a part is being hashed or could be.
    fn hashing(&self) -> bool {
        let here = |part: &usize| matches!(self.status[*part], Status::Here { .. });
        self.checks.iter().any(|check| check.parts.get(check.hashed).is_some_and(here))
    }

    /// The first late part, in reading order, that is fetched only once.
    fn late(&self, parts: &[Part], timeouts: Duration) -> Option<usize> {
        let late = |part: &&usize| match &self.status[**part] {
            Status::Coming { since, begun, .. } if *begun < ATTEMPTS => {
                since.elapsed() > timeouts + self.rate.due(parts[**part].len()).mul_f64(LATE)
            }
            _ => false,
        };
        self.coming.iter().filter(late).min().copied()
    }
}

/// Free buffers.
#[derive(Default)]
struct Pool {
    free: VecDeque<Vec<u8>>,
    bytes: u64,
}

impl Pool {
    /// A buffer of at least `len` bytes, the best fit. Free buffers beyond `room` bytes are
    /// released to the system.
    fn take(&mut self, len: usize, room: u64) -> Vec<u8> {
        let fits = |at: &usize| (len..=len.saturating_mul(2)).contains(&self.free[*at].capacity());
        let best = (0..self.free.len()).filter(fits).min_by_key(|at| self.free[*at].capacity());
        let buffer = best.and_then(|at| self.free.remove(at)).unwrap_or_default();
        self.bytes -= buffer.capacity() as u64;
        while self.bytes > room {
            let Some(oldest) = self.free.pop_front() else { break };
            self.bytes -= oldest.capacity() as u64;
        }
        buffer
    }

    fn give_back(&mut self, buffer: Vec<u8>) {
        self.bytes += buffer.capacity() as u64;
        self.free.push_back(buffer);
    }
}

/// Transfer times of ranges, measured.
#[derive(Default)]
struct TransferRate {
    seconds_per_byte: Option<f64>,
}

impl TransferRate {
    /// Minimum bytes of a measurement. Smaller ranges show latency, not bandwidth.
    const TELLING: u64 = 64 << 10;
    /// Seconds per byte before the first measurement: 4 MB/s, a slow connection.
    const ASSUMED: f64 = 1.0 / 4e6;

    fn add(&mut self, bytes: u64, took: Duration) {
        if bytes < Self::TELLING {
            return;
        }
        let seen = took.as_secs_f64() / bytes as f64;
        self.seconds_per_byte = Some(self.seconds_per_byte.map_or(seen, |known| 0.9 * known + 0.1 * seen));
    }

    fn due(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(self.seconds_per_byte.unwrap_or(Self::ASSUMED) * bytes as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_reused_and_surplus_ones_freed() {
        let mut pool = Pool::default();
        for len in [100, 200, 300] {
            pool.give_back(vec![0; len]);
        }
        assert_eq!(pool.take(150, 1000).capacity(), 200);
        assert_eq!(pool.bytes, 400);
        assert_eq!(pool.take(10, 1000).capacity(), 0, "a large buffer is not spent on a small part");
        pool.take(10, 350);
        assert_eq!((pool.bytes, pool.free.len()), (300, 1));
    }

    #[test]
    fn measured_rate_follows_large_ranges() {
        let mut rate = TransferRate::default();
        assert_eq!(rate.due(4_000_000), Duration::from_secs(1));
        rate.add(10, Duration::from_secs(5));
        rate.add(1 << 20, Duration::from_secs(1));
        assert_eq!(rate.due(2 << 20), Duration::from_secs(2));
    }
}
