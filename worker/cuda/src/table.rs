//! Jump table for the functions of NVIDIA's libraries that the tensor library calls, filled at run
//! time.
//!
//! The tensor library links `libcuda`, `libcublas` and others, so a program built with it needs
//! them all to build and to start. This module defines each function as a jump to an address in
//! [`SLOTS`]. Until [`fill`] has set the address, the jump goes to a function that returns
//! [`MISSING`].

use std::ffi::c_void;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::Library;

/// `CUDA_ERROR_NO_DEVICE`. The other libraries define no errors from 100 on and report it as
/// unknown.
pub(crate) const MISSING: i32 = 100;

/// Target of calls without a library. The ABI allows it to ignore arguments.
extern "C" fn missing() -> i32 {
    MISSING
}

/// Target of calls to a library that is not needed: returns success.
extern "C" fn unneeded() -> i32 {
    0
}

/// Defines a jump for each `$function` and one table for all.
macro_rules! table {
    ($($library:ident { $($function:ident)* })*) => {
        /// Address of each function.
        #[derive(Clone, Copy)]
        #[repr(usize)]
        #[expect(non_camel_case_types, reason = "names of C functions")]
        pub(crate) enum Slot { $($($function),*),* }

        #[derive(Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Of { $($library),* }

        pub(crate) const NAMES: &[(Of, &str)] = &[$($((Of::$library, stringify!($function))),*),*];

        $($(
            std::arch::global_asm!(
                concat!(".globl ", stringify!($function)),
                concat!(".type ", stringify!($function), ", @function"),
                concat!(stringify!($function), ":"),
                "jmp *({slots} + {at})(%rip)",
                slots = sym SLOTS,
                at = const 8 * Slot::$function as usize,
                options(att_syntax),
            );
        )*)*
    };
}

static SLOTS: [AtomicPtr<c_void>; NAMES.len()] =
    [const { AtomicPtr::new(missing as extern "C" fn() -> i32 as *mut c_void) }; NAMES.len()];

/// Sets the table's addresses from `library`. Returns the first function that it lacks.
pub(crate) fn fill(of: Of, library: &'static Library) -> Result<(), &'static str> {
    let functions = || NAMES.iter().zip(&SLOTS).filter(|((whose, _), _)| *whose == of);
    for ((_, name), slot) in functions() {
        // SAFETY: only the address is taken; whoever calls it does so under the name it was found
        // by.
        let found = unsafe { library.get::<*mut c_void>(*name) }.map_err(|_| *name)?;
        // SAFETY: an address of a function of a library that is never unloaded.
        slot.store(unsafe { found.try_as_raw_ptr() }.ok_or(*name)?, Ordering::Release);
    }
    Ok(())
}

/// The current address of a function.
pub(crate) fn function(slot: Slot) -> *mut c_void {
    SLOTS[slot as usize].load(Ordering::Acquire)
}

/// Replaces the address of a function.
pub(crate) fn replace(slot: Slot, function: *mut c_void) {
    SLOTS[slot as usize].store(function, Ordering::Release);
}

/// Points the table at functions that do nothing. Functions with outputs keep failing, because
/// their outputs would not be set.
pub(crate) fn do_without(of: Of) {
    let gives_nothing = |name: &str| !name.starts_with("curandGenerate");
    for (_, slot) in NAMES.iter().zip(&SLOTS).filter(|((whose, name), _)| *whose == of && gives_nothing(name)) {
        slot.store(unneeded as extern "C" fn() -> i32 as *mut c_void, Ordering::Release);
    }
}

// All functions that the tensor library calls in this program, and `find`. The linker reports any
// other.
table! {
    Driver {
        cuInit
        cuDriverGetVersion
        cuDeviceGetCount
        cuDeviceGet
        cuDeviceGetName
        cuDeviceTotalMem_v2
        cuDeviceGetAttribute
        cuDeviceCanAccessPeer
        cuDeviceGetDefaultMemPool
        cuDevicePrimaryCtxRetain
        cuDevicePrimaryCtxRelease_v2
        cuCtxDestroy_v2
        cuCtxGetCurrent
        cuCtxSetCurrent
        cuCtxSynchronize
        cuMemGetInfo_v2
        cuMemAlloc_v2
        cuMemAllocAsync
        cuMemFree_v2
        cuMemFreeAsync
        cuMemHostAlloc
        cuMemPoolSetAccess
        cuMemPoolSetAttribute
        cuMemFreeHost
        cuMemcpyDtoDAsync_v2
        cuMemcpyDtoHAsync_v2
        cuMemcpyHtoDAsync_v2
        cuMemcpyPeerAsync
        cuMemsetD8Async
        cuModuleGetFunction
        cuModuleLoad
        cuModuleLoadData
        cuModuleUnload
        cuFuncSetAttribute
        cuLaunchKernel
        cuEventCreate
        cuEventDestroy_v2
        cuEventQuery
        cuEventRecord
        cuEventSynchronize
        cuStreamCreate
        cuStreamDestroy_v2
        cuStreamIsCapturing
        cuStreamQuery
        cuStreamSynchronize
        cuStreamWaitEvent
        cuGetErrorString
    }
    Blas {
        cublasCreate_v2
        cublasDestroy_v2
        cublasSetStream_v2
        cublasDgemmStridedBatched
        cublasGemmStridedBatchedEx
    }
    GroupedBlas {
        cublasGemmGroupedBatchedEx
    }
    Random {
        curandCreateGenerator
        curandDestroyGenerator
        curandGenerateNormal
        curandGenerateNormalDouble
        curandSetPseudoRandomGeneratorSeed
        curandSetStream
    }
}
