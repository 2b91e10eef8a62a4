//! The recurrences of DeltaNets and Mamba on a GPU, in the bits of the worker's own loop.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, DevicePtr, DevicePtrMut, DriverError};

use crate::kernels::Argument::Address;
use crate::kernels::{File, Grid, launch, number};

/// Threads of a block, and the columns of a state that it has.
const THREADS: usize = 128;
const COLUMNS: usize = 64;
/// The kernels: rows of a state that each has room for.
const KERNELS: [usize; 4] = [16, 64, 128, MOST_ROWS];

/// Rows of a state at most.
pub const MOST_ROWS: usize = 256;

/// Shape of a recurrence.
#[derive(Clone, Copy, Debug)]
pub struct Recurrence {
    /// Heads of all sequences, each with a state.
    pub heads: usize,
    /// Adjacent heads for each head of keys and queries.
    pub served: usize,
    /// Tokens of a sequence.
    pub positions: usize,
    /// Rows of a state.
    pub rows: usize,
    /// Columns of a state.
    pub width: usize,
    /// Factors of a token: 1, or one for each row.
    pub factors: usize,
}

/// Results `[heads, positions, width]` of `query` and `key` `[heads / served, positions, rows]`,
/// `value` `[heads, positions, width]`, `decay` `[heads, positions, factors]` and, if there are
/// some, `strength` `[heads, positions]`.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn recurrence(
    stream: &Arc<CudaStream>,
    [query, key, value, decay]: [&CudaView<'_, f32>; 4],
    strength: Option<&CudaView<'_, f32>>,
    of: Recurrence,
) -> Result<CudaSlice<f32>, DriverError> {
    let Recurrence { heads, served, positions, rows, width, factors } = of;
    let kernel = KERNELS.into_iter().find(|most| rows <= *most).expect("a kernel for states of so many rows");
    assert!(positions > 0 && served > 0 && heads.is_multiple_of(served), "{of:?}");
    assert!(rows > 0 && width > 0 && (factors == 1 || factors == rows), "{of:?}");
    let (tokens, of_keys) = (heads * positions, heads / served * positions * rows);
    assert_eq!([query.len(), key.len()], [of_keys; 2], "{of:?}");
    assert_eq!([value.len(), decay.len()], [tokens * width, tokens * factors], "{of:?}");
    assert!(strength.is_none_or(|strength| strength.len() == tokens), "{of:?}: a strength for each token");
    // SAFETY: the kernel writes all of it.
    let mut out = unsafe { stream.alloc::<f32>(tokens * width) }?;
    {
        let ((query, _query), (key, _key)) = (query.device_ptr(stream), key.device_ptr(stream));
        let ((value, _value), (decay, _decay)) = (value.device_ptr(stream), decay.device_ptr(stream));
        let strength = strength.map(|strength| strength.device_ptr(stream));
        let (to, _to) = out.device_ptr_mut(stream);
        let strength = Address(strength.as_ref().map_or(0, |(strength, _)| *strength));
        let numbers = [positions, served, rows, width, factors].map(number);
        let inputs = [Address(query), Address(key), Address(value), Address(decay), strength];
        let arguments = [&inputs[..], &numbers[..], &[Address(to)]].concat();
        let grid = Grid { blocks: [heads, width.div_ceil(COLUMNS)], threads: THREADS };
        // SAFETY: tensors of the shapes that were checked, and room for the results.
        unsafe { launch(stream, File::Recurrence, &format!("recurrence_{kernel}"), grid, &arguments) }?;
    }
    Ok(out)
}
