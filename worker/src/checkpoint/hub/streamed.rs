//! Streams weights from the hub in an announced order.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outliers_protocol::WeightVerification;

use super::http::{MAX_CONNECTIONS, Timeouts};
use super::plan;
use super::prefetch::{PrefetchLimits, Prefetcher};
use super::remote::RemoteFile;
use super::verify::{Schedule, Unverifiable};
use crate::checkpoint::source::{PlannedRead, TensorEntry, TensorIndex, WeightSource, check_range};
use crate::error::Result;

/// Maximum bytes per request. Smaller requests cost round trips, larger ones lose more when a
/// connection breaks.
const LARGEST_PART: u64 = 16 << 20;
/// Lower limit of that maximum, for machines with little memory.
const SMALLEST_PART: u64 = 1 << 20;
/// Concurrent connections. One gets a small share of the bandwidth of the hub's file servers.
const CONNECTIONS: usize = 32;
const _: () = assert!(CONNECTIONS <= MAX_CONNECTIONS);

/// The weight files of a repository, read in ranges.
pub(super) struct HubSource {
    index: TensorIndex,
    files: Arc<Vec<RemoteFile>>,
    timeouts: Timeouts,
    read_ahead: u64,
    announced: Mutex<Announced>,
    read: AtomicU64,
}

/// State of the last announcement.
#[derive(Default)]
struct Announced {
    prefetcher: Option<Arc<Prefetcher>>,
    /// Indices of the files that are not verified, with reasons.
    unverified: Vec<(usize, Unverifiable)>,
}

impl HubSource {
    pub(super) fn new(index: TensorIndex, files: Vec<RemoteFile>, timeouts: Timeouts, read_ahead: u64) -> Self {
        let (files, announced, read) = (Arc::new(files), Mutex::default(), AtomicU64::new(0));
        Self { index, files, timeouts, read_ahead, announced, read }
    }

    fn announced(&self) -> MutexGuard<'_, Announced> {
        self.announced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn prefetcher(&self) -> Option<Arc<Prefetcher>> {
        self.announced().prefetcher.clone()
    }

    fn name(&self, file: usize) -> String {
        self.files[file].name().to_owned()
    }
}

/// Maximum bytes held until their file is hashed up to them, if all files of these sizes are
/// verified whose reading order allows it.
pub(crate) fn held_for_hashes(order: &[PlannedRead], sizes: impl Iterator<Item = u64>) -> u64 {
    let sizes: Vec<Option<u64>> = sizes.map(Some).collect();
    Schedule::new(plan::plan(order, LARGEST_PART), &sizes, LARGEST_PART, u64::MAX).held
}

impl WeightSource for HubSource {
    fn index(&self) -> &TensorIndex {
        &self.index
    }

    fn announce(&self, order: &[PlannedRead], hash_memory: u64) {
        // At least one part for every second connection, and the same number waiting, even on a
        // machine with little memory.
        let largest = (self.read_ahead / CONNECTIONS as u64).clamp(SMALLEST_PART, LARGEST_PART);
        let sizes: Vec<Option<u64>> = self.files.iter().map(|file| file.digest().map(|_| file.size())).collect();
        let mut schedule = Schedule::new(plan::plan(order, largest), &sizes, largest, hash_memory);
        let unverified = std::mem::take(&mut schedule.unverified);
        let limits = PrefetchLimits { bytes: self.read_ahead + schedule.held, connections: CONNECTIONS };
        let prefetcher = Some(Arc::new(Prefetcher::start(&self.files, schedule, limits, self.timeouts)));
        *self.announced() = Announced { prefetcher, unverified };
    }

    fn verified(&self) -> Vec<String> {
        self.prefetcher()
            .map_or_else(Vec::new, |prefetcher| prefetcher.verified().into_iter().map(|file| self.name(file)).collect())
    }

    fn is_damaged(&self) -> bool {
        self.prefetcher().is_some_and(|prefetcher| prefetcher.is_damaged())
    }

    fn verify(&self) -> Result<Option<WeightVerification>> {
        let Some(prefetcher) = self.prefetcher() else { return Ok(None) };
        prefetcher.verify()?;
        let mut verification = WeightVerification { verified_files: prefetcher.verified().len(), ..Default::default() };
        let mut reasons: Vec<(Unverifiable, Vec<String>)> = Vec::new();
        for (file, why) in &self.announced().unverified {
            let same = reasons.iter_mut().find_map(|(reason, files)| Some((reason.and(why)?, reason, files)));
            match same {
                Some((both, reason, files)) => {
                    *reason = both;
                    files.push(self.name(*file));
                }
                None => reasons.push((why.clone(), vec![self.name(*file)])),
            }
        }
        reasons.into_iter().for_each(|(reason, files)| verification.leave_out(reason.to_string(), files));
        Ok(Some(verification))
    }

    fn read(&self, entry: &TensorEntry, range: Range<u64>, into: &mut [u8]) -> Result<()> {
        check_range(entry, &range, into)?;
        let bytes = entry.offset + range.start..entry.offset + range.end;
        let announced = match self.prefetcher() {
            Some(prefetcher) => prefetcher.read(entry.file, &bytes, into)?,
            None => false,
        };
        if !announced {
            into.copy_from_slice(&self.files[entry.file].read(bytes)?);
        }
        self.read.fetch_add(into.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }
}
