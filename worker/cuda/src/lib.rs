//! NVIDIA's driver and libraries, loaded at run time. One program starts on machines with and
//! without them, and reports which are missing.
//!
//! Linking this crate provides the functions of the tensor library's `-lcuda -lcublas ..` (see
//! `table.rs`). The tensor library's kernels are built through `nvcc.sh`; this crate's kernels are
//! in `kernels/`, compiled.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod assembled;
#[cfg(feature = "staging")]
pub mod attention;
#[cfg(feature = "staging")]
mod copies;
#[cfg(feature = "staging")]
mod decode;
#[cfg(feature = "staging")]
pub mod fused;
#[cfg(feature = "staging")]
pub mod grouped;
#[cfg(feature = "staging")]
mod kernels;
mod libraries;
#[cfg(feature = "staging")]
mod peer_copy;
#[cfg(feature = "staging")]
mod readback;
#[cfg(feature = "staging")]
pub mod recurrence;
#[cfg(feature = "staging")]
pub mod routing;
#[cfg(feature = "staging")]
mod staging;
#[cfg(feature = "staging")]
mod statistics;
mod table;
mod traffic;

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::sync::OnceLock;

#[cfg(feature = "staging")]
pub use copies::{copy_rates, is_idle};
#[cfg(feature = "staging")]
pub use decode::{Codes, Form, Number, StoredTensor, Value};
#[cfg(feature = "staging")]
pub use peer_copy::PeerCopy;
#[cfg(feature = "staging")]
pub use readback::PendingCopy;
#[cfg(feature = "staging")]
pub use staging::{OutOfRangeValue, PINNED, ReleaseFence, Staging, UploadFence};
#[cfg(feature = "staging")]
pub use statistics::{Activation, PendingScan, ScanSummary, Stored};
use table::Of;
pub use traffic::{Traffic, traffic};

/// A CUDA version: major, minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CudaVersion(pub u32, pub u32);

impl fmt::Display for CudaVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// The oldest CUDA version whose drivers load the kernels: drivers from R520 on. `nvcc.sh` writes
/// the matching PTX version.
pub const OLDEST: CudaVersion = CudaVersion(11, 8);

/// The oldest compute capability that the kernels run on: the first with bf16.
pub const OLDEST_COMPUTE: (u32, u32) = (8, 0);

/// A GPU, as its driver reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its name, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Total memory in bytes.
    pub memory_bytes: u64,
    /// Compute capability: major, minor.
    pub compute: (u32, u32),
}

/// A driver and its GPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriverInfo {
    /// The newest CUDA version that the driver supports.
    pub driver: CudaVersion,
    /// In the order of the driver's indices.
    pub gpus: Vec<Gpu>,
    /// cuBLAS multiplies several matrices of different sizes by one call: 12.5 and newer do.
    pub grouped_products: bool,
}

/// Why no GPU is usable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// There is no driver.
    NoDriver {
        /// The system's error message.
        why: String,
    },
    /// The driver shows no GPU.
    NoGpu {
        /// The driver's error number; 0 if it reported no GPU.
        code: i32,
    },
    /// The driver is too old for the kernels.
    OldDriver {
        /// The CUDA version that it supports.
        driver: CudaVersion,
    },
    /// A library is missing, though driver and GPUs are present.
    NoLibrary {
        /// Name of the library.
        name: &'static str,
        /// Reason for each place that was searched.
        why: String,
    },
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDriver { why } => write!(f, "no NVIDIA driver: {why}"),
            Self::NoGpu { code: 0 } => f.write_str("the NVIDIA driver shows no GPU"),
            Self::NoGpu { code } => write!(f, "the NVIDIA driver shows no GPU (its error {code})"),
            Self::OldDriver { driver } => write!(f, "the NVIDIA driver serves CUDA {driver}, {OLDEST} is needed"),
            Self::NoLibrary { name, why } => write!(f, "{name} is not there: {why}"),
        }
    }
}

impl std::error::Error for Unavailable {}

impl Unavailable {
    /// Whether a GPU is present. It may be rented, so the user should know of it.
    pub fn wastes_a_gpu(&self) -> bool {
        matches!(self, Self::OldDriver { .. } | Self::NoLibrary { .. })
    }
}

/// Loads driver and libraries and lists GPUs, once. Functions of the table fail until then.
///
/// # Errors
/// Why no GPU is usable.
pub fn find() -> Result<&'static DriverInfo, &'static Unavailable> {
    static FOUND: OnceLock<Result<DriverInfo, Unavailable>> = OnceLock::new();
    FOUND.get_or_init(look).as_ref()
}

fn look() -> Result<DriverInfo, Unavailable> {
    let driver = libraries::driver().map_err(|why| Unavailable::NoDriver { why })?;
    table::fill(Of::Driver, driver)
        .map_err(|lacks| Unavailable::NoDriver { why: format!("libcuda.so.1 lacks {lacks}: it is too old") })?;
    traffic::count();
    assembled::serve();
    let mut found = ask_driver()?;
    if found.driver < OLDEST {
        return Err(Unavailable::OldDriver { driver: found.driver });
    }
    let missing = |name| move |why| Unavailable::NoLibrary { name, why };
    let blas = libraries::blas(found.driver.0).map_err(missing("cuBLAS"))?;
    table::fill(Of::Blas, blas).map_err(|lacks| missing("cuBLAS")(format!("it lacks {lacks}")))?;
    found.grouped_products = table::fill(Of::GroupedBlas, blas).is_ok();
    // Random numbers are not drawn, but the tensor library makes a generator with every device.
    match libraries::random() {
        Ok(random) => table::fill(Of::Random, random).unwrap_or_else(|_| table::do_without(Of::Random)),
        Err(_) => table::do_without(Of::Random),
    }
    Ok(found)
}

/// Makes the driver keep freed GPU memory for reuse. By default it returns that memory to the
/// system at each synchronisation.
///
/// # Errors
/// The driver's error number.
/// <https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MALLOC__ASYNC.html>
pub fn keep_memory(gpu: u32) -> Result<(), i32> {
    const RELEASE_THRESHOLD: c_int = 4;
    // Some virtual GPUs have no memory pool.
    const NOT_SUPPORTED: c_int = 801;
    let done = |code| if code == 0 { Ok(()) } else { Err(code) };
    let (mut device, mut pool, all) = (0, std::ptr::null_mut(), u64::MAX);
    // SAFETY: each writes what it was asked for where it is told to; the last one reads a number
    // of 64 bits, as this attribute is.
    unsafe {
        done(cuDeviceGet(&raw mut device, gpu as c_int))?;
        match cuDeviceGetDefaultMemPool(&raw mut pool, device) {
            NOT_SUPPORTED => Ok(()),
            0 => done(cuMemPoolSetAttribute(pool, RELEASE_THRESHOLD, (&raw const all).cast())),
            code => Err(code),
        }
    }
}

/// Stops the library from creating two events for each allocation, and from recording and awaiting
/// them at each use, which takes the host about as long as starting a kernel. From now on only
/// events of this crate order the streams of this GPU.
#[cfg(feature = "staging")]
pub fn order_by_own_events(stream: &cudarc::driver::CudaStream) {
    // SAFETY: memory that one stream allocates and another uses or frees is an upload, a summary
    // or a copy between GPUs. `UploadFence`, `Readback` and `PeerCopy` order these by events, or
    // the host waits.
    unsafe { stream.context().disable_event_tracking() }
}

unsafe extern "C" {
    fn cuDeviceGetDefaultMemPool(pool: *mut *mut c_void, device: c_int) -> c_int;
    fn cuMemPoolSetAttribute(pool: *mut c_void, attribute: c_int, value: *const c_void) -> c_int;
    fn cuInit(flags: c_uint) -> c_int;
    fn cuDriverGetVersion(version: *mut c_int) -> c_int;
    fn cuDeviceGetCount(count: *mut c_int) -> c_int;
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int;
    fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) -> c_int;
    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) -> c_int;
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) -> c_int;
}

/// <https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__DEVICE.html>
fn ask_driver() -> Result<DriverInfo, Unavailable> {
    const COMPUTE_MAJOR: c_int = 75;
    const COMPUTE_MINOR: c_int = 76;
    let done = |code| if code == 0 { Ok(()) } else { Err(Unavailable::NoGpu { code }) };
    let number = |ask: &dyn Fn(*mut c_int) -> c_int| {
        let mut value = 0;
        done(ask(&raw mut value)).map(|()| value)
    };
    // SAFETY: as its description asks, before all others.
    done(unsafe { cuInit(0) })?;
    // SAFETY: each writes one number where it is told to.
    let version = number(&|at| unsafe { cuDriverGetVersion(at) })?.unsigned_abs();
    // SAFETY: as above.
    let count = number(&|at| unsafe { cuDeviceGetCount(at) })?;
    if count < 1 {
        return Err(Unavailable::NoGpu { code: 0 });
    }
    let gpu = |ordinal| {
        // SAFETY: as above.
        let device = number(&|at| unsafe { cuDeviceGet(at, ordinal) })?;
        // SAFETY: as above.
        let attribute = |which| number(&|at| unsafe { cuDeviceGetAttribute(at, which, device) });
        let mut name = [0; 256];
        // SAFETY: it writes at most so many bytes, with a zero at the end.
        done(unsafe { cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device) })?;
        let mut memory = 0;
        // SAFETY: it writes one number.
        done(unsafe { cuDeviceTotalMem_v2(&raw mut memory, device) })?;
        // SAFETY: it ends with a zero, or was left empty.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let compute = (attribute(COMPUTE_MAJOR)?.unsigned_abs(), attribute(COMPUTE_MINOR)?.unsigned_abs());
        Ok(Gpu { name, memory_bytes: memory as u64, compute })
    };
    let gpus = (0..count).map(gpu).collect::<Result<_, _>>()?;
    let driver = CudaVersion(version / 1000, version % 1000 / 10);
    Ok(DriverInfo { driver, gpus, grouped_products: false })
}

#[cfg(test)]
mod tests;
