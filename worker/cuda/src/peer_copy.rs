//! Copies values from one GPU to another while both compute: directly if the driver allows peer
//! access, otherwise through pinned host memory.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtrMut, DriverError};

use crate::readback::{Part, Readback, StreamPerContext};
use crate::statistics::Stored;

/// Values in transfer to another GPU. Their source may be freed after the transfer is complete or
/// this is dropped, not before.
#[must_use]
pub struct PeerCopy {
    /// The destination; `None` after the values were taken.
    bytes: Option<CudaSlice<u8>>,
    arrived: Arc<CudaEvent>,
    /// The stream that computes and frees the source, if another one reads it: a copy through the
    /// host is read on this stream.
    from: Option<Arc<CudaStream>>,
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
        let (arrived, from_until_then) = if reaches(to.context(), from.context()) {
            let (address, _read) = x.address(from);
            mail.wait(&from.record_event(None)?)?;
            mail.context().bind_to_thread()?;
            let (here, there) = (from.context().cu_ctx(), to.context().cu_ctx());
            // SAFETY: as many bytes are at both addresses; the first are kept until this has
            // arrived.
            unsafe { result::memcpy_peer_async(there, at, here, address, x.bytes(), mail.cu_stream()) }?;
            (Arc::new(mail.record_event(None)?), Some(Arc::clone(from)))
        } else {
            let readback = Readback::start(from, &[Part::at(x.address(from), x.bytes())])?;
            // SAFETY: room for all of it, which nobody reads before the event. `mail` frees it, or
            // the stream that has waited for the event.
            (unsafe { readback.upload(at, &mail) }?, None)
        };
        from.context().bind_to_thread()?;
        Ok(Self { bytes: Some(bytes), arrived, from: from_until_then })
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
        if let Some(from) = &self.from {
            // After a GPU error no copy is pending.
            let _ = from.wait(&self.arrived);
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
        // Many that nobody takes, one right after the other, and one whose buffer they had before.
        let values = vec![0.5f32; 100_000];
        for _ in 0..20 {
            let source = first.clone_htod(&values).unwrap();
            let peer_copy = PeerCopy::start(&Stored::F32(source.as_view()), &first, &second).unwrap();
            drop((peer_copy, source));
            bytes += 4 * values.len() as u64;
        }
        let last: Vec<f32> = (0..100_000).map(|at| at as f32).collect();
        let source = first.clone_htod(&last).unwrap();
        let peer_copy = PeerCopy::start(&Stored::F32(source.as_view()), &first, &second).unwrap();
        bytes += 4 * last.len() as u64;
        let there = peer_copy.wait::<f32>(&second).unwrap();
        drop(source);
        assert_eq!(second.clone_dtoh(&there).unwrap(), last);
        // As many buffers as copies may read, and those of a size that came before.
        let kept = crate::readback::kept();
        assert!(kept <= 8, "{kept} buffers");
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
