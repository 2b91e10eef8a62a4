//! The driver's functions, with NVIDIA's names and order of arguments.
//!
//! All take addresses as their descriptions say: <https://docs.nvidia.com/cuda/cuda-driver-api/>

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_longlong, c_uint, c_void};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::blas::{self, Kind, Matrix, Product};
use crate::memory::{Memory, Owner};
use crate::ptx::{self, Grid, Kernel, Module};
use crate::stream::{Event, Stream};

/// `CUresult`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
enum Code {
    Success = 0,
    InvalidValue = 1,
    OutOfMemory = 2,
    InvalidDevice = 101,
    InvalidContext = 201,
    NoBinary = 209,
    InvalidHandle = 400,
    NotFound = 500,
    NotReady = 600,
    LaunchFailed = 719,
}

/// State shared by all GPUs.
struct Machine {
    gpus: usize,
    memory_bytes: usize,
    delay: Duration,
    /// Whether the GPUs have peer access.
    peers: bool,
    /// Whether cuBLAS multiplies several matrices by one call.
    grouped: bool,
    peak: Option<Peak>,
    launches: Option<Launches>,
    streams: Handles<Stream>,
    events: Handles<Event>,
    modules: Handles<Module>,
    functions: Handles<Function>,
    /// The stream that each product of a handle is asked of.
    blas: Handles<AtomicU64>,
    /// The predefined streams, by GPU.
    own: Mutex<BTreeMap<usize, Arc<Stream>>>,
}

/// A kernel, and how many bytes a launch may add to what its blocks share.
struct Function {
    kernel: Kernel,
    shared: AtomicUsize,
}

/// Bytes that each launch may add, and those of compute capability 8.6 and 8.9, which are fewest.
const SHARED: usize = 48 << 10;
const MAX_SHARED: c_int = 99 << 10;

/// The most that was used, and where it is told.
struct Peak {
    path: String,
    bytes: Mutex<usize>,
}

/// How often each kernel, a product of matrices and several by one call were asked for, and where
/// it is told.
struct Launches {
    path: String,
    counts: Mutex<BTreeMap<String, u64>>,
}

impl Launches {
    fn count(&self, name: &str) -> Result<(), Code> {
        let mut counts = lock(&self.counts);
        *counts.entry(name.to_owned()).or_default() += 1;
        let lines: String = counts.iter().map(|(name, count)| format!("{count} {name}\n")).collect();
        std::fs::write(&self.path, lines).map_err(|_| Code::InvalidValue)
    }
}

static MEMORY: Memory = Memory::new();

thread_local! {
    /// The GPU of calls without a stream, as its index plus one.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Objects by handle; callers may pass invalid handles.
struct Handles<T> {
    by_number: Mutex<BTreeMap<u64, Arc<T>>>,
}

impl<T> Handles<T> {
    fn new() -> Self {
        Self { by_number: Mutex::default() }
    }

    fn add(&self, value: T) -> u64 {
        // The lowest handles are predefined streams.
        static NEXT: AtomicU64 = AtomicU64::new(0x1000);
        let number = NEXT.fetch_add(0x10, Ordering::Relaxed);
        lock(&self.by_number).insert(number, Arc::new(value));
        number
    }

    fn get(&self, number: u64) -> Result<Arc<T>, Code> {
        lock(&self.by_number).get(&number).cloned().ok_or(Code::InvalidHandle)
    }

    fn remove(&self, number: u64) -> Result<(), Code> {
        lock(&self.by_number).remove(&number).map(drop).ok_or(Code::InvalidHandle)
    }
}

fn machine() -> &'static Machine {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<usize>().ok());
    MACHINE.get_or_init(|| Machine {
        gpus: number("OUTLIERS_GPUS").unwrap_or(1),
        memory_bytes: number("OUTLIERS_GPU_MEMORY").unwrap_or(8 << 30),
        delay: Duration::from_micros(number("OUTLIERS_GPU_DELAY_US").unwrap_or(0) as u64),
        peers: number("OUTLIERS_GPU_PEERS") != Some(0),
        grouped: number("OUTLIERS_GPU_GROUPED") != Some(0),
        peak: std::env::var("OUTLIERS_GPU_PEAK").ok().map(|path| Peak { path, bytes: Mutex::new(0) }),
        launches: std::env::var("OUTLIERS_GPU_LAUNCHES").ok().map(|path| Launches { path, counts: Mutex::default() }),
        streams: Handles::new(),
        events: Handles::new(),
        modules: Handles::new(),
        functions: Handles::new(),
        blas: Handles::new(),
        own: Mutex::default(),
    })
}

fn answer(result: Result<(), Code>) -> c_int {
    result.err().unwrap_or(Code::Success) as c_int
}

/// Writes a result, if a place is given.
///
/// # Safety
/// `to` is null or has room for one value.
unsafe fn give<T>(to: *mut T, value: T) -> Result<(), Code> {
    if to.is_null() {
        return Err(Code::InvalidValue);
    }
    // SAFETY: there is room for one.
    unsafe { to.write(value) };
    Ok(())
}

fn current() -> Result<usize, Code> {
    CURRENT.get().checked_sub(1).ok_or(Code::InvalidContext)
}

/// A stream by its handle; 0 to 2 are predefined.
fn stream(number: u64) -> Result<Arc<Stream>, Code> {
    let machine = machine();
    if number > 2 {
        return machine.streams.get(number);
    }
    let gpu = current()?;
    Ok(Arc::clone(lock(&machine.own).entry(gpu).or_insert_with(|| Arc::new(Stream::new(machine.delay)))))
}

fn failed(_: String) -> Code {
    Code::LaunchFailed
}

fn synchronize_all() -> Result<(), Code> {
    let machine = machine();
    let own: Vec<_> = lock(&machine.own).values().cloned().collect();
    let created: Vec<_> = lock(&machine.streams.by_number).values().cloned().collect();
    own.into_iter().chain(created).try_for_each(|stream| stream.synchronize().map_err(failed))
}

fn allocate(bytes: usize) -> Result<u64, Code> {
    let (machine, gpu) = (machine(), current()?);
    let used = MEMORY.used(Owner::Gpu(gpu)) + bytes;
    if used > machine.memory_bytes {
        return Err(Code::OutOfMemory);
    }
    if let Some(peak) = &machine.peak {
        let mut most = lock(&peak.bytes);
        if used > *most {
            *most = used;
            std::fs::write(&peak.path, format!("{used}\n")).map_err(|_| Code::InvalidValue)?;
        }
    }
    Ok(MEMORY.allocate(bytes, Owner::Gpu(gpu)))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: c_uint) -> c_int {
    answer(Ok(()))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    // SAFETY: as the function is described.
    answer(unsafe { give(version, 12040) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    // SAFETY: as the function is described.
    answer(unsafe { give(count, machine().gpus as c_int) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    if ordinal < 0 || ordinal as usize >= machine().gpus {
        return answer(Err(Code::InvalidDevice));
    }
    // SAFETY: as the function is described.
    answer(unsafe { give(device, ordinal) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) -> c_int {
    const NAME: &CStr = c"emulated GPU";
    if len < NAME.count_bytes() as c_int + 1 {
        return answer(Err(Code::InvalidValue));
    }
    // SAFETY: there is room for `len`.
    unsafe { name.copy_from(NAME.as_ptr(), NAME.count_bytes() + 1) };
    answer(Ok(()))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> c_int {
    // SAFETY: as the function is described.
    answer(unsafe { give(bytes, machine().memory_bytes) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) -> c_int {
    let known = match attribute {
        // Threads per block; threads per warp.
        1 => 1024,
        10 => 32,
        // Multiprocessors.
        16 => 4,
        // Compute capability 8.0.
        75 => 8,
        76 => 0,
        // Memory pools (stream-ordered allocation) are supported.
        115 => 1,
        _ => 0,
    };
    // SAFETY: as the function is described.
    answer(unsafe { give(value, known) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceCanAccessPeer(can: *mut c_int, _device: c_int, _other: c_int) -> c_int {
    // SAFETY: as the function is described.
    answer(unsafe { give(can, c_int::from(machine().peers)) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetDefaultMemPool(pool: *mut u64, _device: c_int) -> c_int {
    // SAFETY: as the function is described.
    answer(unsafe { give(pool, 1) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolSetAccess(_pool: u64, _access: *const c_void, _count: usize) -> c_int {
    answer(machine().peers.then_some(()).ok_or(Code::InvalidDevice))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolSetAttribute(_pool: u64, _attribute: c_int, _value: *const c_void) -> c_int {
    answer(Ok(()))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) -> c_int {
    // SAFETY: as the function is described.
    answer(unsafe { give(context, device as usize + 1) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> c_int {
    answer(Ok(()))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxDestroy_v2(_context: usize) -> c_int {
    answer(Ok(()))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut usize) -> c_int {
    // SAFETY: as the function is described.
    answer(unsafe { give(context, CURRENT.get()) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: usize) -> c_int {
    if context > machine().gpus {
        return answer(Err(Code::InvalidContext));
    }
    CURRENT.set(context);
    answer(Ok(()))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> c_int {
    answer(synchronize_all())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_int {
    let told = current().and_then(|gpu| {
        let all = machine().memory_bytes;
        // SAFETY: as the function is described.
        unsafe {
            give(free, all.saturating_sub(MEMORY.used(Owner::Gpu(gpu))))?;
            give(total, all)
        }
    });
    answer(told)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> c_int {
    // SAFETY: as the function is described.
    answer(allocate(bytes).and_then(|new| unsafe { give(address, new) }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocAsync(address: *mut u64, bytes: usize, on: u64) -> c_int {
    let allocated = stream(on).and_then(|stream| {
        let new = allocate(bytes)?;
        // The memory belongs to the caller in stream order; its earlier content is lost.
        stream.ask(move || MEMORY.reader().forget(new, bytes));
        Ok(new)
    });
    // SAFETY: as the function is described.
    answer(allocated.and_then(|new| unsafe { give(address, new) }))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> c_int {
    answer(synchronize_all().and_then(|()| MEMORY.free(address).map_err(failed)))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeAsync(address: u64, on: u64) -> c_int {
    answer(stream(on).map(|stream| stream.ask(move || MEMORY.free(address))))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(address: *mut u64, bytes: usize, _flags: c_uint) -> c_int {
    // SAFETY: as the function is described.
    answer(unsafe { give(address, MEMORY.allocate(bytes, Owner::Host)) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(address: u64) -> c_int {
    // Does not wait for copies from this memory, as the driver need not.
    answer(MEMORY.free(address).map_err(failed))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, on: u64) -> c_int {
    answer(stream(on).map(|stream| stream.ask(move || MEMORY.reader().copy(to, from, bytes))))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyPeerAsync(to: u64, _: usize, from: u64, _: usize, bytes: usize, on: u64) -> c_int {
    if !machine().peers {
        eprintln!("emulated GPU: a copy between GPUs that do not reach each other");
        return answer(Err(Code::InvalidDevice));
    }
    cuMemcpyDtoDAsync_v2(to, from, bytes, on)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: u64, bytes: usize, on: u64) -> c_int {
    let asked = stream(on).map(|stream| {
        if MEMORY.is_pinned(from) {
            return stream.ask(move || MEMORY.reader().copy(to, from, bytes));
        }
        // SAFETY: so many bytes are there, and need not be any more when this returns.
        let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) }.to_vec();
        stream.ask(move || MEMORY.reader().write(to, &bytes));
    });
    answer(asked)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(to: u64, from: u64, bytes: usize, on: u64) -> c_int {
    let copied = stream(on).and_then(|stream| {
        if MEMORY.is_pinned(to) {
            stream.ask(move || MEMORY.reader().copy(to, from, bytes));
            return Ok(());
        }
        stream.ask(move || {
            // SAFETY: room for so many bytes is there until this function returns, which it does
            // when they are.
            let into = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, bytes) };
            MEMORY.reader().read(from, into)
        });
        stream.synchronize().map_err(failed)
    });
    answer(copied)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, on: u64) -> c_int {
    answer(stream(on).map(|stream| stream.ask(move || MEMORY.reader().fill(to, value, bytes))))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleLoad(_module: *mut u64, _path: *const c_char) -> c_int {
    answer(Err(Code::NotFound))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut u64, image: *const c_char) -> c_int {
    // SAFETY: PTX ends with a zero, and what is assembled has one in it.
    let image = unsafe { CStr::from_ptr(image) };
    if image.to_bytes().starts_with(b"\x7fELF") {
        eprintln!("emulated GPU: these kernels are assembled for other GPUs");
        return answer(Err(Code::NoBinary));
    }
    let text = image.to_string_lossy().into_owned();
    // SAFETY: as the function is described.
    answer(unsafe { give(module, machine().modules.add(Module::new(text))) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(module: u64) -> c_int {
    answer(machine().modules.remove(module))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(function: *mut u64, module: u64, name: *const c_char) -> c_int {
    // SAFETY: a name ends with a zero.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    let found = machine().modules.get(module).and_then(|module| module.kernel(&name).ok_or(Code::NotFound));
    if found.is_err() {
        eprintln!("emulated GPU: there is no kernel {name}");
    }
    // SAFETY: as the function is described.
    answer(found.and_then(|kernel| unsafe {
        give(function, machine().functions.add(Function { kernel, shared: AtomicUsize::new(SHARED) }))
    }))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(function: u64, attribute: c_int, value: c_int) -> c_int {
    /// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
    const MAX_ADDED: c_int = 8;
    if attribute != MAX_ADDED || !(0..=MAX_SHARED).contains(&value) {
        eprintln!("emulated GPU: a kernel's attribute {attribute} cannot be {value}");
        return answer(Err(Code::InvalidValue));
    }
    let found = machine().functions.get(function);
    answer(found.map(|function| function.shared.store(value as usize, Ordering::SeqCst)))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: u64,
    blocks_x: c_uint,
    blocks_y: c_uint,
    blocks_z: c_uint,
    threads_x: c_uint,
    threads_y: c_uint,
    threads_z: c_uint,
    shared: c_uint,
    on: u64,
    parameters: *const *const u8,
    _extra: *const c_void,
) -> c_int {
    let grid = Grid {
        blocks: [blocks_x, blocks_y, blocks_z],
        threads: [threads_x, threads_y, threads_z],
        shared: shared as usize,
    };
    if grid.blocks.contains(&0)
        || grid.blocks[1..].iter().any(|blocks| *blocks > 65_535)
        || grid.threads.iter().product::<u32>() == 0
        || grid.threads.iter().product::<u32>() > 1024
    {
        eprintln!("emulated GPU: {grid:?} cannot be launched");
        return answer(Err(Code::InvalidValue));
    }
    let launched = machine().functions.get(function).and_then(|function| {
        let kernel = &function.kernel;
        if grid.shared > function.shared.load(Ordering::SeqCst) {
            eprintln!("emulated GPU: {} may not add {} bytes to what blocks share", kernel.name, grid.shared);
            return Err(Code::InvalidValue);
        }
        machine().launches.as_ref().map_or(Ok(()), |launches| launches.count(&kernel.name))?;
        let mut all = Vec::new();
        for (i, (bytes, at)) in kernel.parameters.iter().enumerate() {
            all.resize(*at, 0);
            // SAFETY: there is an address for each parameter of the kernel, of as many bytes as it
            // has.
            all.extend_from_slice(unsafe { std::slice::from_raw_parts(*parameters.add(i), *bytes) });
        }
        stream(on)?.ask(move || ptx::run(&function.kernel, grid, &all, &MEMORY));
        Ok(())
    });
    answer(launched)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut u64, _flags: c_uint) -> c_int {
    // SAFETY: as the function is described.
    answer(unsafe { give(event, machine().events.add(Event::default())) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: u64) -> c_int {
    answer(machine().events.remove(event))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: u64, on: u64) -> c_int {
    answer(machine().events.get(event).and_then(|event| stream(on).map(|stream| stream.record(&event))))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: u64) -> c_int {
    let reached = |event: Arc<Event>| event.is_reached().then_some(()).ok_or(Code::NotReady);
    answer(machine().events.get(event).and_then(reached))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: u64) -> c_int {
    answer(machine().events.get(event).map(|event| event.synchronize()))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(to: *mut u64, _flags: c_uint) -> c_int {
    let machine = machine();
    // SAFETY: as the function is described.
    answer(unsafe { give(to, machine.streams.add(Stream::new(machine.delay))) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(number: u64) -> c_int {
    answer(machine().streams.remove(number))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(_stream: u64, status: *mut c_int) -> c_int {
    // SAFETY: as the function is described.
    answer(unsafe { give(status, 0) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(on: u64) -> c_int {
    answer(stream(on).and_then(|stream| stream.is_done().then_some(()).ok_or(Code::NotReady)))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(on: u64) -> c_int {
    answer(stream(on).and_then(|stream| stream.synchronize().map_err(failed)))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(on: u64, event: u64, _flags: c_uint) -> c_int {
    answer(machine().events.get(event).and_then(|event| stream(on).map(|stream| stream.wait(&event))))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(_code: c_int, text: *mut *const c_char) -> c_int {
    // SAFETY: as the function is described.
    answer(unsafe { give(text, c"the emulated GPU said why on standard error".as_ptr()) })
}

/// `CUBLAS_STATUS_..`: not supported, an argument that means nothing, and no such handle.
const UNSUPPORTED: c_int = 15;
const INVALID: c_int = 7;
const NO_HANDLE: c_int = 1;

/// `CUBLAS_COMPUTE_32F`, and what is rounded more where a GPU likes it.
const COMPUTE_F32: std::ops::RangeInclusive<c_int> = 68..=77;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasCreate_v2(handle: *mut u64) -> c_int {
    // SAFETY: as the function is described.
    answer(unsafe { give(handle, machine().blas.add(AtomicU64::new(0))) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasDestroy_v2(handle: u64) -> c_int {
    answer(machine().blas.remove(handle))
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasSetStream_v2(handle: u64, on: u64) -> c_int {
    answer(machine().blas.get(handle).map(|handle| handle.store(on, Ordering::SeqCst)))
}

/// Rows, columns, depth, batch size.
type Sizes = [c_int; 4];

fn matrix(address: u64, transpose: c_int, kind: Option<Kind>, leading: c_int, stride: c_longlong) -> Option<Matrix> {
    Some(Matrix { address, kind: kind?, transposed: transpose != 0, leading: leading as usize, stride })
}

/// Addresses are checked when the product is computed.
fn product(handle: u64, sizes: Sizes, [alpha, beta]: [f64; 2], matrices: [Option<Matrix>; 3]) -> c_int {
    let Ok(on) = machine().blas.get(handle).and_then(|handle| stream(handle.load(Ordering::SeqCst))) else {
        return NO_HANDLE;
    };
    let [Some(a), Some(b), Some(c)] = matrices else {
        eprintln!("emulated GPU: a product of matrices {matrices:?}");
        return UNSUPPORTED;
    };
    if let Err(code) = machine().launches.as_ref().map_or(Ok(()), |launches| launches.count("product")) {
        return answer(Err(code));
    }
    let [rows, columns, depth, batch] = sizes.map(|n| n.max(0) as usize);
    let product = Product { rows, columns, depth, batch, alpha, beta, a, b, c };
    on.ask(move || product.run(&MEMORY));
    answer(Ok(()))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasDgemmStridedBatched(
    handle: u64,
    transpose_a: c_int,
    transpose_b: c_int,
    rows: c_int,
    columns: c_int,
    depth: c_int,
    alpha: *const f64,
    a: u64,
    leading_a: c_int,
    stride_a: c_longlong,
    b: u64,
    leading_b: c_int,
    stride_b: c_longlong,
    beta: *const f64,
    c: u64,
    leading_c: c_int,
    stride_c: c_longlong,
    batch: c_int,
) -> c_int {
    let kind = Some(Kind::F64);
    let a = matrix(a, transpose_a, kind, leading_a, stride_a);
    let b = matrix(b, transpose_b, kind, leading_b, stride_b);
    let c = matrix(c, 0, kind, leading_c, stride_c);
    // SAFETY: as the function is described.
    product(handle, [rows, columns, depth, batch], unsafe { [*alpha, *beta] }, [a, b, c])
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasGemmStridedBatchedEx(
    handle: u64,
    transpose_a: c_int,
    transpose_b: c_int,
    rows: c_int,
    columns: c_int,
    depth: c_int,
    alpha: *const f32,
    a: u64,
    kind_a: c_int,
    leading_a: c_int,
    stride_a: c_longlong,
    b: u64,
    kind_b: c_int,
    leading_b: c_int,
    stride_b: c_longlong,
    beta: *const f32,
    c: u64,
    kind_c: c_int,
    leading_c: c_int,
    stride_c: c_longlong,
    batch: c_int,
    compute: c_int,
    _algorithm: c_int,
) -> c_int {
    if !COMPUTE_F32.contains(&compute) {
        return UNSUPPORTED;
    }
    let a = matrix(a, transpose_a, Kind::new(kind_a), leading_a, stride_a);
    let b = matrix(b, transpose_b, Kind::new(kind_b), leading_b, stride_b);
    let c = matrix(c, 0, Kind::new(kind_c), leading_c, stride_c);
    // SAFETY: numbers of the type that this way to compute has.
    let factors = unsafe { [*alpha, *beta] }.map(f64::from);
    product(handle, [rows, columns, depth, batch], factors, [a, b, c])
}

/// Numbers of each product are on the host, and are copied before this returns. Addresses of
/// matrices are on the GPU, and are read when the stream comes to it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasGemmGroupedBatchedEx(
    handle: u64,
    transposed_a: *const c_int,
    transposed_b: *const c_int,
    rows: *const c_int,
    columns: *const c_int,
    depths: *const c_int,
    alphas: *const f32,
    a: u64,
    kind_a: c_int,
    leading_a: *const c_int,
    b: u64,
    kind_b: c_int,
    leading_b: *const c_int,
    betas: *const f32,
    c: u64,
    kind_c: c_int,
    leading_c: *const c_int,
    groups: c_int,
    sizes: *const c_int,
    compute: c_int,
) -> c_int {
    let kinds = [kind_a, kind_b, kind_c].map(Kind::new);
    let is_served = machine().grouped && COMPUTE_F32.contains(&compute);
    let (Some(kind), true) = (kinds[0], is_served) else { return UNSUPPORTED };
    if kind == Kind::F64 || kinds.iter().any(|other| *other != Some(kind)) {
        eprintln!("emulated GPU: grouped products of matrices {kinds:?}");
        return UNSUPPORTED;
    }
    let Ok(groups) = usize::try_from(groups) else { return INVALID };
    // SAFETY: each is an array of so many numbers.
    let numbers = |at: *const c_int| unsafe { std::slice::from_raw_parts(at, groups) };
    // SAFETY: as above.
    let factors = |at: *const f32| unsafe { std::slice::from_raw_parts(at, groups) };
    let (rows, columns, depths) = (numbers(rows), numbers(columns), numbers(depths));
    let (transposed_a, transposed_b) = (numbers(transposed_a), numbers(transposed_b));
    let leading = [leading_a, leading_b, leading_c].map(numbers);
    let (alphas, betas) = (factors(alphas), factors(betas));
    let mut products = Vec::new();
    for (group, size) in numbers(sizes).iter().enumerate() {
        let (m, n, k) = (rows[group], columns[group], depths[group]);
        let least = |transposed: c_int, sizes: [c_int; 2]| sizes[usize::from(transposed != 0)].max(1);
        let least = [least(transposed_a[group], [m, k]), least(transposed_b[group], [k, n]), m.max(1)];
        if [m, n, k, *size].iter().any(|n| *n < 0) || leading.iter().zip(least).any(|(of, least)| of[group] < least) {
            eprintln!("emulated GPU: grouped products, number {group} of sizes {m}, {n}, {k}");
            return INVALID;
        }
        let matrix = |transposed: c_int, leading: &[c_int]| Matrix {
            address: 0,
            kind,
            transposed: transposed != 0,
            leading: leading[group] as usize,
            stride: 0,
        };
        let product = Product {
            rows: m as usize,
            columns: n as usize,
            depth: k as usize,
            batch: 1,
            alpha: alphas[group].into(),
            beta: betas[group].into(),
            a: matrix(transposed_a[group], leading[0]),
            b: matrix(transposed_b[group], leading[1]),
            c: matrix(0, leading[2]),
        };
        products.extend(std::iter::repeat_n(product, *size as usize));
    }
    let Ok(on) = machine().blas.get(handle).and_then(|handle| stream(handle.load(Ordering::SeqCst))) else {
        return NO_HANDLE;
    };
    if let Err(code) = machine().launches.as_ref().map_or(Ok(()), |launches| launches.count("grouped product")) {
        return answer(Err(code));
    }
    on.ask(move || blas::run_grouped(&products, [a, b, c], &MEMORY));
    answer(Ok(()))
}
