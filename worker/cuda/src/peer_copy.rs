//! Copies values from one GPU to another while both compute: directly if the driver allows peer
//! access, otherwise through pinned host memory.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result;
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtrMut, DriverError};

use crate::readback::{Part, Readback, StreamPerContext};
use crate::statistics::Stored;

/// Values in transfer to another GPU. Their source may be freed after the transfer is complete or
/// this is dropped, not before.
#[must_use]
pub struct PeerCopy {
    /// The destination; `None` after the values were taken.
    bytes: Option<CudaSlice<u8>>,
    arrived: CudaEvent,
    /// The stream that computes and frees the source.
    from: Arc<CudaStream>,
    /// The host buffer, if the GPUs have no peer access.
    through: Option<Readback>,
}

impl PeerCopy {
    /// Starts the copy of values computed by `from` to the GPU on which `to` computes. Does not
    /// wait.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub fn start(x: &Stored<'_>, from: &Arc<CudaStream>, to: &Arc<CudaStream>) -> Result<Self, DriverError> {
        // A stream to which others send.
        static MAIL: StreamPerContext = StreamPerContext::new();
        let mail = MAIL.of(to.context())?;
        // By this stream, which gives it out at once: the other one would when all that it was
        // asked to compute is done. SAFETY: nobody sees it before all of it is asked to be
        // written.
        let mut bytes = unsafe { mail.alloc::<u8>(x.bytes()) }?;
        let at = bytes.device_ptr_mut(&mail).0;
        let through = if reaches(to.context(), from.context()) {
            let (address, _read) = x.address(from);
            mail.wait(&from.record_event(None)?)?;
            mail.context().bind_to_thread()?;
            let (here, there) = (from.context().cu_ctx(), to.context().cu_ctx());
            // SAFETY: as many bytes are at both addresses; the first are kept until this has
            // arrived.
            unsafe { result::memcpy_peer_async(there, at, here, address, x.bytes(), mail.cu_stream()) }?;
            None
        } else {
            let readback = Readback::start(from, &[Part::at(x.address(from), x.bytes())])?;
            // SAFETY: room for all of it, which nobody reads before the event.
            unsafe { readback.upload_after(at, &mail) }?;
            Some(readback)
        };
        // The event blocks: a waiting thread sleeps.
        let arrived = mail.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC))?;
        from.context().bind_to_thread()?;
        Ok(Self { bytes: Some(bytes), arrived, from: Arc::clone(from), through })
    }

    /// The values, usable by work enqueued on `compute` from now on. `T` is their type.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub fn wait<T>(mut self, compute: &Arc<CudaStream>) -> Result<CudaSlice<T>, DriverError> {
        compute.wait(&self.arrived)?;
        let bytes = self.bytes.take().expect("there until it arrives");
        let count = bytes.len() / size_of::<T>();
        // SAFETY: an allocation of as many values, which are written before `compute` goes on.
        let values = unsafe { compute.upgrade_device_ptr(bytes.leak(), count) };
        drop(self);
        compute.context().bind_to_thread()?;
        Ok(values)
    }
}

impl Drop for PeerCopy {
    fn drop(&mut self) {
        // After a GPU error no copy is pending.
        let _ = self.from.wait(&self.arrived);
        if self.through.is_some() {
            // No copy reads the host buffer any more, so it can be reused.
            let _ = self.arrived.synchronize();
        }
    }
}

/// Whether a GPU reads another's memory, which that one is told to let it. Asked once of each pair.
fn reaches(reader: &CudaContext, other: &CudaContext) -> bool {
    static KNOWN: Mutex<Vec<([usize; 2], bool)>> = Mutex::new(Vec::new());
    let pair = [reader.ordinal(), other.ordinal()];
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, reaches)) = known.iter().find(|(of, _)| *of == pair) {
        return *reaches;
    }
    let reaches = let_in(reader.cu_device(), other.cu_device());
    known.push((pair, reaches));
    reaches
}

/// `CUmemAccessDesc`: location type, location number, access flags.
#[repr(C)]
struct MemoryAccess {
    kind: c_uint,
    device: c_int,
    allowed: c_uint,
}

unsafe extern "C" {
    fn cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, other: c_int) -> c_int;
    fn cuDeviceGetDefaultMemPool(pool: *mut *mut c_void, device: c_int) -> c_int;
    fn cuMemPoolSetAccess(pool: *mut c_void, access: *const MemoryAccess, count: usize) -> c_int;
}

/// <https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MALLOC__ASYNC.html>
fn let_in(reader: c_int, other: c_int) -> bool {
    const DEVICE: c_uint = 1;
    const READ_AND_WRITE: c_uint = 3;
    let (mut can, mut pool) = (0, std::ptr::null_mut());
    let access = MemoryAccess { kind: DEVICE, device: reader, allowed: READ_AND_WRITE };
    // SAFETY: the first two write one answer each; the third reads one description.
    unsafe {
        cuDeviceCanAccessPeer(&raw mut can, reader, other) == 0
            && can == 1
            && cuDeviceGetDefaultMemPool(&raw mut pool, other) == 0
            && cuMemPoolSetAccess(pool, &raw const access, 1) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::test_output;

    #[test]
    #[ignore = "the process that the other starts"]
    fn copy_and_read() {
        crate::find().unwrap();
        let open = |gpu| CudaContext::new(gpu).unwrap().new_stream().unwrap();
        let (first, second) = (open(0), open(1));
        let mut waiting = Vec::new();
        let mut bytes = 0;
        for round in 0..60usize {
            let values: Vec<f32> = (0..1 + 997 * (round % 7)).map(|at| (round * 10_000 + at) as f32).collect();
            let source = first.clone_htod(&values).unwrap();
            let peer_copy = PeerCopy::start(&Stored::F32(source.as_view()), &first, &second).unwrap();
            bytes += 4 * values.len() as u64;
            if round % 9 == 8 {
                // Dropped without being taken.
                drop((peer_copy, source));
                continue;
            }
            waiting.push((peer_copy, source, values));
            if waiting.len() > 3 {
                let (peer_copy, source, values) = waiting.remove(0);
                let there = peer_copy.wait::<f32>(&second).unwrap();
                drop(source);
                assert_eq!(second.clone_dtoh(&there).unwrap(), values, "round {round}");
            }
        }
        for (peer_copy, source, values) in waiting {
            let there = peer_copy.wait::<f32>(&second).unwrap();
            drop(source);
            assert_eq!(second.clone_dtoh(&there).unwrap(), values);
        }
        // The values that were copied first.
        let through_the_host = crate::traffic().to_gpus - bytes;
        println!("said: {}", if through_the_host == 0 { "directly" } else { "through the host" });
    }

    #[test]
    fn values_arrive_on_another_gpu_directly_or_through_the_host() {
        let gpu = std::env::var("OUTLIERS_GPU")
            .expect("OUTLIERS_GPU names a folder that tests/gpu/install_fake_driver.sh made");
        for (peers, way) in [("1", "directly"), ("0", "through the host")] {
            for delay in ["0", "300", "5000"] {
                let environment = [
                    ("LD_LIBRARY_PATH", gpu.as_str()),
                    ("OUTLIERS_GPUS", "2"),
                    ("OUTLIERS_GPU_PEERS", peers),
                    ("OUTLIERS_GPU_DELAY_US", delay),
                ];
                assert_eq!(test_output("peer_copy::tests::copy_and_read", &environment), way, "{delay} us");
            }
        }
    }
}
