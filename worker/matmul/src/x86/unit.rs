//! Units that Linux on x86-64 reports.

mod pack;
mod product;
mod tiles;
mod vectors;

use std::sync::OnceLock;

use half::bf16;

use self::pack::Matrix;
use self::product::append_by;
use self::tiles::Tiles;
use self::vectors::{Pairs, Singles};
use crate::Order;

pub(crate) use pack::Real;

/// A unit that was [found](found).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Tiles of AMX.
    Tiles,
    /// AVX-512, and AVX512_BF16 for bf16.
    Pairs,
    /// AVX-512 without AVX512_BF16.
    Singles,
}

pub(crate) fn found() -> &'static [Kind] {
    static FOUND: OnceLock<Vec<Kind>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let vectors = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        let pairs = vectors && is_x86_feature_detected!("avx512bf16");
        let kinds = [(Kind::Tiles, vectors && tiles::are_there()), (Kind::Pairs, pairs), (Kind::Singles, vectors)];
        kinds.into_iter().filter_map(|(kind, is_there)| is_there.then_some(kind)).collect()
    })
}

/// As [`Unit::append_product`](crate::Unit::append_product).
pub(crate) fn append_product<A: Real>(
    kind: Kind,
    out: &mut Vec<A>,
    a: &[A],
    b: &[bf16],
    order: Order,
    n: usize,
    k: usize,
) {
    let b = Matrix::new(b, order, n, k);
    // SAFETY: the processor has what was found.
    unsafe {
        match kind {
            Kind::Tiles => append_by::<A, Tiles>(out, a, &b),
            Kind::Pairs if A::PARTS == 1 => append_by::<A, Pairs>(out, a, &b),
            Kind::Pairs | Kind::Singles => append_by::<A, Singles>(out, a, &b),
        }
    }
}
