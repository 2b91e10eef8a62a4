//! Rates of copies between host and GPU, and whether a GPU's stream is idle.

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaStream, DriverError};

/// Bytes of a copy so large that its launch time does not matter.
const BYTES: usize = 16 << 20;

/// Bytes per second of copies from pinned memory to a GPU and back, the fastest of several rounds.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn copy_rates(stream: &Arc<CudaStream>, rounds: usize) -> Result<[f64; 2], DriverError> {
    // SAFETY: bytes may be anything.
    let mut pinned = unsafe { stream.context().alloc_pinned_with_flags::<u8>(BYTES, 0) }?;
    pinned.as_mut_slice()?.fill(1);
    let mut there = stream.alloc_zeros::<u8>(BYTES)?;
    let mut best = [0f64; 2];
    for _ in 0..rounds.max(1) {
        stream.synchronize()?;
        let start = Instant::now();
        stream.memcpy_htod(&pinned, &mut there)?;
        stream.synchronize()?;
        best[0] = best[0].max(BYTES as f64 / start.elapsed().as_secs_f64());
        let start = Instant::now();
        stream.memcpy_dtoh(&there, &mut pinned)?;
        stream.synchronize()?;
        best[1] = best[1].max(BYTES as f64 / start.elapsed().as_secs_f64());
    }
    Ok(best)
}

unsafe extern "C" {
    fn cuStreamQuery(stream: *mut c_void) -> c_int;
}

/// Whether a stream has finished all its work; `None` if the driver does not report it. Does not
/// wait. <https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__STREAM.html>
pub fn is_idle(stream: &CudaStream) -> Option<bool> {
    stream.context().bind_to_thread().ok()?;
    // SAFETY: a stream that is there as long as this borrows it.
    match unsafe { cuStreamQuery(stream.cu_stream().cast()) } {
        0 => Some(true),
        code if code == CUresult::CUDA_ERROR_NOT_READY as c_int => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use cudarc::driver::CudaContext;

    use super::*;
    use crate::tests::test_output;

    #[test]
    #[ignore = "the process that the other starts"]
    fn copy_and_ask() {
        crate::find().unwrap();
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        let rates = copy_rates(&stream, 1).unwrap();
        assert!(rates.iter().all(|rate| *rate > 0.0 && rate.is_finite()), "{rates:?}");
        // The buffer is freed by the stream, too.
        stream.synchronize().unwrap();
        assert_eq!(is_idle(&stream), Some(true), "all that was asked for is done");
        let bytes = BYTES as u64;
        assert_eq!(crate::traffic(), crate::Traffic { to_gpus: bytes, from_gpus: bytes });
        println!("said: idle");
    }

    #[test]
    fn copies_are_timed_and_a_stream_tells_whether_it_is_done() {
        let gpu = std::env::var("OUTLIERS_GPU")
            .expect("OUTLIERS_GPU names a folder that tests/gpu/install_fake_driver.sh made");
        for delay in ["0", "300"] {
            let environment = [("LD_LIBRARY_PATH", gpu.as_str()), ("OUTLIERS_GPU_DELAY_US", delay)];
            assert_eq!(test_output("copies::tests::copy_and_ask", &environment), "idle", "{delay} us");
        }
    }
}
