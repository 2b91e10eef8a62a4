//! Softmax attention of whole sequences in bf16 on a GPU, by one kernel that leaves scores and
//! shares in registers.
//!
//! Values are row-major, and belong to the stream that is given.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, DevicePtr, DevicePtrMut, DriverError};
use half::bf16;

use crate::kernels::Argument::{Address, Float, Number};
use crate::kernels::{File, Grid, launch_sharing, number};

/// Threads of a block.
const THREADS: usize = 256;
/// Queries of a block.
const QUERIES: usize = 128;
/// For each kernel how wide queries and keys of a head are, how wide its values are, and how many
/// keys a tile has.
const KERNELS: [[usize; 3]; 6] =
    [[64, 64, 64], [80, 80, 64], [96, 96, 64], [128, 128, 64], [192, 128, 64], [256, 256, 32]];

/// Widths of a head: of its queries and keys, and of its values.
pub type Widths = [usize; 2];

/// Widths of the heads that there are kernels for.
pub fn widths() -> impl Iterator<Item = Widths> {
    KERNELS.into_iter().map(|[keys, values, _]| [keys, values])
}

/// What attends to what.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Sequences.
    pub sequences: usize,
    /// Tokens of each.
    pub positions: usize,
    /// Heads of a sequence's queries.
    pub heads: usize,
    /// Heads of its keys and values, each of which serves as many heads of queries.
    pub kv_heads: usize,
    /// Widths of a head; one of [`widths`].
    pub widths: Widths,
    /// From one token's queries to the next one's, in values.
    pub query_stride: usize,
    /// How many keys a query sees at most, the last up to its own.
    pub window: usize,
    /// Keys of a chunk, where a query sees those in its own chunk instead.
    pub chunk: Option<usize>,
    /// What multiplies scores.
    pub scale: f32,
}

/// Attends: of `query` `[sequences * positions, heads, width]`, rows `query_stride` apart, `key`
/// `[sequences * kv_heads, positions, width]` and `value` alike, the mixed values `[sequences *
/// positions, heads * width]`. `sinks`: a logit for each head, which takes part unscaled and has no
/// value. If it is `watched`, also in f32 of each query of `[sequences * heads, positions]` the
/// largest share of a key, and that of the first key.
///
/// # Errors
/// The driver's.
pub fn attend(
    stream: &Arc<CudaStream>,
    [query, key, value]: [&CudaView<'_, bf16>; 3],
    of: Attention,
    sinks: Option<&CudaView<'_, f32>>,
    watched: bool,
) -> Result<(CudaSlice<bf16>, Option<CudaSlice<f32>>), DriverError> {
    let Attention { sequences, positions, heads, kv_heads, widths: [width, value_width], .. } = of;
    let kernel = KERNELS.into_iter().find(|[keys, values, _]| [*keys, *values] == of.widths);
    let [_, _, keys] = kernel.expect("a kernel for heads of these widths");
    assert!(sequences > 0 && positions > 0 && kv_heads > 0 && heads.is_multiple_of(kv_heads), "{of:?}");
    assert!(of.query_stride >= heads * width && of.query_stride.is_multiple_of(2), "{of:?}");
    assert!(query.len() >= (sequences * positions - 1) * of.query_stride + heads * width, "{of:?}: too few queries");
    let of_keys = sequences * kv_heads * positions;
    assert_eq!([key.len(), value.len()], [of_keys * width, of_keys * value_width], "{of:?}");
    assert!(sinks.is_none_or(|sinks| sinks.len() == heads), "{of:?}: a sink for each head");
    // SAFETY: the kernel writes all of it.
    let mut out = unsafe { stream.alloc::<bf16>(sequences * positions * heads * value_width) }?;
    let pairs = 2 * sequences * heads * positions;
    // SAFETY: as before.
    let mut shares = watched.then(|| unsafe { stream.alloc::<f32>(pairs) }).transpose()?;
    {
        let ((query, _query), (key, _key), (value, _value)) =
            (query.device_ptr(stream), key.device_ptr(stream), value.device_ptr(stream));
        // It is copied in pieces of 16 bytes, and queries are read in pairs.
        assert!(key.is_multiple_of(16) && value.is_multiple_of(16) && query.is_multiple_of(4), "{of:?}: misaligned");
        let sinks = sinks.map(|sinks| sinks.device_ptr(stream));
        let (to, _to) = out.device_ptr_mut(stream);
        let shares = shares.as_mut().map(|shares| shares.device_ptr_mut(stream));
        // What is larger than any position hides nothing.
        let limit = |keys: usize| Number(u32::try_from(keys.max(1)).unwrap_or(u32::MAX));
        let arguments = [
            Address(query),
            Address(key),
            Address(value),
            Address(sinks.as_ref().map_or(0, |(sinks, _)| *sinks)),
            number(positions),
            number(heads),
            number(heads / kv_heads),
            number(of.query_stride),
            limit(of.window),
            of.chunk.map_or(Number(0), limit),
            Float(of.scale),
            Address(to),
            Address(shares.as_ref().map_or(0, |(shares, _)| *shares)),
        ];
        let grid = Grid { blocks: [sequences * heads, positions.div_ceil(QUERIES)], threads: THREADS };
        // Rows in shared memory have an odd number of 16 bytes; there are two tiles.
        let row = |width: usize| 16 * ((width / 8) | 1);
        let shared = 2 * keys * (row(width) + row(value_width));
        let name = format!("attention_{width}_{value_width}");
        // SAFETY: queries, keys, values, sinks and room of the shapes that were checked.
        unsafe { launch_sharing(stream, File::Attention, &name, grid, shared, &arguments) }?;
    }
    Ok((out, shares))
}
