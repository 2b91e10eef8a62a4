//! Where no GPUs are used.

use candle_core::{Result, Tensor, bail};

/// Nothing is tried.
pub fn try_in_group(_: &Tensor) -> Option<String> {
    None
}

/// None is taken.
pub fn takes_in_group(_: &Tensor) -> bool {
    false
}

/// Never called.
///
/// # Errors
/// Always.
pub fn grouped_product(_: &Tensor, _: &[&Tensor], _: &[usize]) -> Result<Tensor> {
    bail!("matrices are on a GPU, which this worker was built without")
}
