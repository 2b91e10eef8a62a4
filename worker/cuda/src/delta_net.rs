//! The triangular systems of DeltaNets on a GPU, inverted in the bits of the worker's own loop.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, DevicePtr, DevicePtrMut, DriverError};

use crate::kernels::Argument::Address;
use crate::kernels::{File, Grid, launch, number};

/// Rows of a system at most, and threads of a block, which has one system.
const ROWS: usize = 64;

/// Inverse of the identity plus what of each of `systems` `[.., n, n]` is below the diagonal,
/// row-major and contiguous, of the stream that is given. n is 64 at most.
///
/// # Errors
/// The driver's.
pub fn invert(stream: &Arc<CudaStream>, systems: &CudaView<'_, f32>, n: usize) -> Result<CudaSlice<f32>, DriverError> {
    let values = systems.len();
    assert!((1..=ROWS).contains(&n) && values.is_multiple_of(n * n), "{values} values in systems of {n} rows");
    // SAFETY: the kernel writes all of it.
    let mut out = unsafe { stream.alloc::<f32>(values) }?;
    {
        let ((from, _from), (to, _to)) = (systems.device_ptr(stream), out.device_ptr_mut(stream));
        let grid = Grid { blocks: [values / (n * n), 1], threads: ROWS };
        // SAFETY: a system for each block, and as much room.
        unsafe { launch(stream, File::DeltaNet, "invert", grid, &[Address(from), number(n), Address(to)]) }?;
    }
    Ok(out)
}
