//! GPUs as their driver knows them.

use candle_core::Device;
use outliers_cuda::{DriverInfo, Gpu as CudaGpu, OLDEST_COMPUTE};

use super::{Gpu, Gpus, Traffic};
use crate::error::Result;

/// Detects the GPUs.
pub fn find() -> Gpus {
    let one = |CudaGpu { name, memory_bytes, compute }: &CudaGpu| {
        let ((major, minor), (least, dot)) = (*compute, OLDEST_COMPUTE);
        let old = *compute < OLDEST_COMPUTE;
        let unfit = old.then(|| format!("its compute capability is {major}.{minor}, {least}.{dot} is needed"));
        Gpu { name: name.clone(), memory_bytes: *memory_bytes, unfit }
    };
    match outliers_cuda::find() {
        Ok(DriverInfo { gpus, .. }) => Gpus { gpus: gpus.iter().map(one).collect(), why_none: None, wasted: false },
        Err(why) => Gpus { gpus: Vec::new(), why_none: Some(why.to_string()), wasted: why.wastes_a_gpu() },
    }
}

/// Minimum CUDA version of the driver, for a program that uses GPUs.
pub fn oldest_driver() -> Option<String> {
    Some(outliers_cuda::OLDEST.to_string())
}

/// Free memory of a GPU in bytes; `None` for the CPU, and if the driver does not report it.
pub fn free_memory(device: &Device) -> Option<u64> {
    let context = device.as_cuda_device().ok()?.cuda_stream().context().clone();
    context.mem_get_info().ok().map(|(free, _)| free as u64)
}

/// Whether a GPU has finished all work; `None` for the CPU, and if the driver does not report it.
pub fn is_idle(device: &Device) -> Option<bool> {
    outliers_cuda::is_idle(&device.as_cuda_device().ok()?.cuda_stream())
}

/// Measured rates of copies from pinned memory to a GPU and back in bytes per second; `None` for
/// the CPU.
pub fn copy_rates(device: &Device, rounds: usize) -> Result<Option<[f64; 2]>> {
    let Device::Cuda(device) = device else { return Ok(None) };
    Ok(Some(outliers_cuda::copy_rates(&device.cuda_stream(), rounds)?))
}

/// Bytes copied by this process so far.
pub fn traffic() -> Traffic {
    let outliers_cuda::Traffic { to_gpus, from_gpus } = outliers_cuda::traffic();
    Traffic { to_gpus, from_gpus }
}
