//! Where no GPUs are used.

use candle_core::{Result, Tensor, bail};

use super::FusedAttention;

/// There is no kernel.
pub fn attends(_: &Tensor, _: &Tensor) -> bool {
    false
}

/// Never called.
///
/// # Errors
/// Always.
pub fn attend(_: FusedAttention<'_>, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
    bail!("queries are on a GPU, which this worker was built without")
}
