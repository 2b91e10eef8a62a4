//! This crate's kernels (`worker/cuda/kernels`), launched by name. The driver loads a file on a
//! GPU when its first kernel is launched there.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::{self, DriverError, module};
use cudarc::driver::sys::{CUdeviceptr, CUfunction, CUfunction_attribute, CUmodule};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DeviceRepr};

/// Declares the kernel files, each with its PTX, which ends with a zero byte.
macro_rules! files {
    ($($file:ident $name:literal)*) => {
        /// A file of kernels.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub(crate) enum File { $($file),* }

        impl File {
            fn ptx(self) -> &'static str {
                match self {
                    $(Self::$file => concat!(include_str!(concat!("../kernels/", $name, ".ptx")), "\0"),)*
                }
            }

            /// Its source, without the shared header.
            #[cfg(test)]
            fn source(self) -> &'static str {
                match self {
                    $(Self::$file => include_str!(concat!("../kernels/", $name, ".cu")),)*
                }
            }

            #[cfg(test)]
            const ALL: &[(Self, &str)] = &[$((Self::$file, $name)),*];
        }
    };
}

files! {
    Attention "attention"
    Columns "columns"
    Decode "decode"
    Fused "fused"
    Histogram "histogram"
    Large "large"
    Recurrence "recurrence"
    Route "route"
    Rows "rows"
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Argument {
    /// An address in GPU memory.
    Address(CUdeviceptr),
    Number(u32),
    Float(f32),
}

/// How many there are of something.
///
/// # Panics
/// There are 2^32 or more. The worker refuses tensors with that many values before.
pub(crate) fn number(number: usize) -> Argument {
    let counted = u32::try_from(number);
    Argument::Number(counted.unwrap_or_else(|_| panic!("{number} rows, values or tokens; kernels count below 2^32")))
}

/// Uninitialised memory, for a kernel that writes all of it.
///
/// # Errors
/// Errors of the CUDA driver.
pub(crate) fn room<T: DeviceRepr>(stream: &Arc<CudaStream>, len: usize) -> Result<CudaSlice<T>, DriverError> {
    // SAFETY: any bytes are a value of these types, and the caller's kernel writes all of them.
    unsafe { stream.alloc::<T>(len) }
}

/// Grid and block of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    /// Blocks along x and y.
    pub(crate) blocks: [usize; 2],
    /// Threads per block.
    pub(crate) threads: usize,
}

/// Bytes of shared memory that a launch may add without being allowed to.
const SHARED_BYTES: usize = 48 << 10;

/// Launches a kernel on a stream.
///
/// # Safety
/// The arguments are those that the kernel's source names, addresses of as much memory as it says,
/// which belongs to this stream.
///
/// # Errors
/// Errors of the CUDA driver.
pub(crate) unsafe fn launch(
    stream: &CudaStream,
    file: File,
    name: &str,
    grid: Grid,
    arguments: &[Argument],
) -> Result<(), DriverError> {
    // SAFETY: the caller's promise.
    unsafe { launch_sharing(stream, file, name, grid, 0, arguments) }
}

/// The same of a kernel whose blocks share so many bytes beside what it declares.
///
/// # Safety
/// As [`launch`].
///
/// # Errors
/// The driver's.
pub(crate) unsafe fn launch_sharing(
    stream: &CudaStream,
    file: File,
    name: &str,
    grid: Grid,
    shared: usize,
    arguments: &[Argument],
) -> Result<(), DriverError> {
    stream.context().bind_to_thread()?;
    let function = function(stream.context(), file, name)?;
    if shared > SHARED_BYTES {
        const MAX_SHARED_MEMORY: CUfunction_attribute =
            CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a function of this context.
        unsafe { result::function::set_function_attribute(function, MAX_SHARED_MEMORY, shared as i32) }?;
    }
    let place = |argument: &Argument| -> *mut c_void {
        match argument {
            Argument::Address(address) => std::ptr::from_ref(address).cast_mut().cast(),
            Argument::Number(number) => std::ptr::from_ref(number).cast_mut().cast(),
            Argument::Float(number) => std::ptr::from_ref(number).cast_mut().cast(),
        }
    };
    let mut places: Vec<*mut c_void> = arguments.iter().map(place).collect();
    // The driver refuses a grid that is too large, and would launch one that is cut off.
    let [x, y] = grid.blocks.map(|blocks| u32::try_from(blocks).unwrap_or(u32::MAX));
    // SAFETY: the caller's promise. The arguments are copied before this returns.
    unsafe {
        let threads = (grid.threads as u32, 1, 1);
        result::launch_kernel(function, (x, y, 1), threads, shared as u32, stream.cu_stream(), &mut places)
    }
}

/// Modules loaded on a GPU. They are never unloaded and keep their context alive.
struct Loaded {
    context: Arc<CudaContext>,
    modules: HashMap<File, CUmodule>,
    functions: HashMap<File, HashMap<String, CUfunction>>,
}

// SAFETY: handles of the driver, which any thread may use.
unsafe impl Send for Loaded {}

/// A kernel on the GPU whose context is current on this thread.
fn function(context: &Arc<CudaContext>, file: File, name: &str) -> Result<CUfunction, DriverError> {
    static LOADED: Mutex<Vec<Loaded>> = Mutex::new(Vec::new());
    let mut all = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let at = all.iter().position(|loaded| loaded.context.cu_ctx() == context.cu_ctx());
    let at = at.unwrap_or_else(|| {
        all.push(Loaded { context: Arc::clone(context), modules: HashMap::new(), functions: HashMap::new() });
        all.len() - 1
    });
    let loaded = &mut all[at];
    if let Some(function) = loaded.functions.get(&file).and_then(|functions| functions.get(name)) {
        return Ok(*function);
    }
    let module = match loaded.modules.get(&file) {
        Some(module) => *module,
        None => {
            // SAFETY: PTX that ends with a zero.
            let module = unsafe { module::load_data(file.ptx().as_ptr().cast()) }?;
            loaded.modules.insert(file, module);
            module
        }
    };
    let told = CString::new(name).expect("names of kernels are written here");
    // SAFETY: the module was loaded just now, or before.
    let function = unsafe { module::get_function(module, told) }?;
    loaded.functions.entry(file).or_default().insert(name.to_owned(), function);
    Ok(function)
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::File;

    #[test]
    fn checked_in_kernels_match_their_sources() {
        for (file, name) in File::ALL {
            let source = [include_str!("../kernels/values.cuh"), file.source()].concat();
            let hash: String = Sha256::digest(source).iter().map(|byte| format!("{byte:02x}")).collect();
            let expected = format!("// sha256 of values.cuh and {name}.cu: {hash}");
            assert_eq!(file.ptx().lines().next(), Some(&*expected), "run worker/cuda/kernels/build.sh {name}");
            assert!(
                file.ptx().contains("\n.version 7.8\n.target sm_80\n"),
                "{name}: read by the oldest driver that serves"
            );
            // Attention has no form for CPUs whose bits it must give.
            let fuses = *file == File::Attention;
            assert!(fuses || !file.ptx().contains("fma."), "{name}: a product is rounded before it is added");
        }
    }
}
