//! Counts bytes copied between host and GPUs, at the driver calls.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use crate::table::{self, Slot};

/// Bytes copied between the host and all GPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// From the host to GPUs.
    pub to_gpus: u64,
    /// From GPUs to the host.
    pub from_gpus: u64,
}

/// Bytes of the copies that this process has requested from the driver.
pub fn traffic() -> Traffic {
    let bytes = |direction: &Direction| direction.bytes.load(Ordering::Relaxed);
    Traffic { to_gpus: bytes(&TO_GPUS), from_gpus: bytes(&FROM_GPUS) }
}

/// Counts from now on. The table must hold the driver's functions.
pub(crate) fn count() {
    TO_GPUS.count(Slot::cuMemcpyHtoDAsync_v2, to_gpu);
    FROM_GPUS.count(Slot::cuMemcpyDtoHAsync_v2, from_gpu);
}

/// Target, source, bytes, stream.
/// <https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEM.html>
type CopyFunction = unsafe extern "C" fn(usize, usize, usize, usize) -> c_int;

static TO_GPUS: Direction = Direction::new();
static FROM_GPUS: Direction = Direction::new();

struct Direction {
    /// The driver's function.
    driver: AtomicPtr<c_void>,
    bytes: AtomicU64,
}

impl Direction {
    const fn new() -> Self {
        Self { driver: AtomicPtr::new(std::ptr::null_mut()), bytes: AtomicU64::new(0) }
    }

    /// Makes the table call `counting` instead of the driver's function.
    fn count(&self, slot: Slot, counting: CopyFunction) {
        self.driver.store(table::function(slot), Ordering::Release);
        table::replace(slot, counting as *mut c_void);
    }

    /// # Safety
    /// As for the driver's function; only after [`count`](Self::count).
    unsafe fn copy(&self, to: usize, from: usize, bytes: usize, stream: usize) -> c_int {
        let driver = self.driver.load(Ordering::Acquire);
        // SAFETY: the table held this address under the name of a function of these arguments.
        let driver = unsafe { std::mem::transmute::<*mut c_void, CopyFunction>(driver) };
        // SAFETY: the caller's arguments.
        let code = unsafe { driver(to, from, bytes, stream) };
        if code == 0 {
            self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
        code
    }
}

/// # Safety
/// As for `cuMemcpyHtoDAsync_v2`.
unsafe extern "C" fn to_gpu(to: usize, from: usize, bytes: usize, stream: usize) -> c_int {
    // SAFETY: the caller's arguments.
    unsafe { TO_GPUS.copy(to, from, bytes, stream) }
}

/// # Safety
/// As for `cuMemcpyDtoHAsync_v2`.
unsafe extern "C" fn from_gpu(to: usize, from: usize, bytes: usize, stream: usize) -> c_int {
    // SAFETY: the caller's arguments.
    unsafe { FROM_GPUS.copy(to, from, bytes, stream) }
}
