//! Weights straight from the hub, for readers that say in advance what they will read.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::http::{MAX_CONNECTIONS, Patience};
use super::intake::{Intake, Limits};
use super::plan;
use super::remote::RemoteFile;
use crate::error::Result;
use crate::source::{TensorEntry, TensorIndex, Wanted, WeightSource, check_range};

/// Largest range asked for in one request, bytes. Less costs round trips, more is lost when a connection breaks.
const LARGEST_PART: u64 = 16 << 20;
/// Smallest bound on it, however little memory there is.
const SMALLEST_PART: u64 = 1 << 20;
/// One connection brings a small share of what the hub's file servers and a good wire can do together.
const CONNECTIONS: usize = 32;
const _: () = assert!(CONNECTIONS <= MAX_CONNECTIONS);

/// The weight files of a repository, read in ranges.
pub(super) struct HubSource {
    index: TensorIndex,
    files: Arc<Vec<RemoteFile>>,
    patience: Patience,
    read_ahead: u64,
    /// Of what was announced last.
    intake: Mutex<Option<Arc<Intake>>>,
    read: AtomicU64,
}

impl HubSource {
    pub(super) fn new(index: TensorIndex, files: Vec<RemoteFile>, patience: Patience, read_ahead: u64) -> Self {
        let (files, intake, read) = (Arc::new(files), Mutex::default(), AtomicU64::new(0));
        Self { index, files, patience, read_ahead, intake, read }
    }

    fn intake(&self) -> Option<Arc<Intake>> {
        self.intake.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl WeightSource for HubSource {
    fn index(&self) -> &TensorIndex {
        &self.index
    }

    fn announce(&self, order: &[Wanted]) {
        // At least one part on every second connection and as many waiting, on a machine with little memory too.
        let largest = (self.read_ahead / CONNECTIONS as u64).clamp(SMALLEST_PART, LARGEST_PART);
        let limits = Limits { bytes: self.read_ahead, connections: CONNECTIONS };
        let intake = Intake::start(&self.files, plan::plan(order, largest), limits, self.patience);
        *self.intake.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(intake));
    }

    fn read(&self, entry: &TensorEntry, range: Range<u64>, into: &mut [u8]) -> Result<()> {
        check_range(entry, &range, into)?;
        let bytes = entry.offset + range.start..entry.offset + range.end;
        let announced = match self.intake() {
            Some(intake) => intake.read(entry.file, &bytes, into)?,
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
