//! Linear recurrences over tokens: the gated delta rule and Mamba-2, by their definition.
//!
//! Per head, the state `S` `[rows, width]` is zero before a sequence. Each token has factors `a`
//! of the state's rows, a key `k`, a value `v`, a query `q` and, in the delta rule, a write
//! strength `b`:
//!
//! ```text
//! S <- a S      u = b (v - S^T k), or v without strengths      S <- S + k u^T      out = S^T q
//! ```
//!
//! The loop for CPUs and the kernel for GPUs (`cuda/kernels/recurrence.cu`) do the same operations
//! in the same order, so that results are bit-identical. (Where a kernel has more rows than the
//! state, an infinite value becomes NaN.) The state of a head stays in a CPU's cache or in a GPU's
//! registers.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail};
use outliers_scan::simd::vectorized;
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::device::gpu::fused as kernels;
use crate::kernels::fused::{part, reading};

/// Parts of a sum over rows: as many threads of a GPU share a column.
const SHARES: usize = 4;
/// Adjacent rows in one part.
const GROUP: usize = 4;

/// How much of a state remains, and what is corrected, at each token. In f32 and contiguous.
#[derive(Clone, Copy, Debug)]
pub struct Recurrence<'a> {
    /// Factors of the state's rows: `[heads, positions]` or `[heads, positions, 1]` if all rows of
    /// a state have the same, `[heads, positions, rows]` if each has a separate one.
    pub decay: &'a Tensor,
    /// Write strengths `[heads, positions]` of the delta rule; `None`: values are added as they
    /// are.
    pub strength: Option<&'a Tensor>,
}

/// Sizes of a recurrence.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    /// Adjacent heads for each head of keys and queries.
    served: usize,
    positions: usize,
    rows: usize,
    width: usize,
    /// Factors of a token.
    factors: usize,
}

impl Recurrence<'_> {
    /// Results `[heads, positions, width]` of `query` and `key` `[key heads, positions, rows]` and
    /// `value` `[heads, positions, width]`, all f32 and contiguous. Each key head serves the same
    /// number of adjacent heads.
    ///
    /// # Errors
    /// Other tensors; on a GPU more than 256 rows; the device's.
    pub fn apply(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor> {
        query.apply_op3_no_bwd(key, value, self)
    }

    fn sizes(&self, query: &Layout, key: &Layout, value: &Layout) -> Result<Sizes> {
        let ((heads, positions, width), (key_heads, _, rows)) = (value.shape().dims3()?, key.shape().dims3()?);
        let factors = if self.decay.rank() == 3 { self.decay.dim(2)? } else { 1 };
        let fit = key_heads > 0
            && heads.is_multiple_of(key_heads)
            && query.dims() == key.dims()
            && key.dims()[1] == positions
            && (factors == 1 || factors == rows)
            && self.decay.elem_count() == heads * positions * factors
            && self.strength.is_none_or(|strength| strength.elem_count() == heads * positions);
        if !fit || heads * positions * width * rows == 0 {
            bail!("recurrence: {:?}, {:?} and {:?} of {self:?}", query.shape(), key.shape(), value.shape());
        }
        Ok(Sizes { served: heads / key_heads, positions, rows, width, factors })
    }
}

/// Runs the recurrence on a CPU.
fn run(of: Sizes, [query, key, value, decay]: [&[f32]; 4], strength: Option<&[f32]>) -> Vec<f32> {
    let Sizes { served, positions, rows, width, factors } = of;
    let mut out = vec![0_f32; value.len()];
    out.par_chunks_mut(positions * width).enumerate().for_each(|(head, out)| {
        let (tokens, of_keys) = (head * positions, head / served * positions * rows);
        let (query, key) = (&query[of_keys..][..positions * rows], &key[of_keys..][..positions * rows]);
        let (value, decay) = (&value[tokens * width..], &decay[tokens * factors..]);
        let strength = strength.map(|strength| &strength[tokens..]);
        vectorized(
            #[inline(always)]
            || {
                let mut state = vec![0_f32; rows * width];
                let (mut write, mut sums) = (vec![0_f32; width], vec![0_f32; SHARES * width]);
                for (token, out) in out.chunks_exact_mut(width).enumerate() {
                    let (query, key) = (&query[token * rows..][..rows], &key[token * rows..][..rows]);
                    let decay = &decay[token * factors..][..factors];
                    sums.fill(0.0);
                    for (row, (state, key)) in state.chunks_exact_mut(width).zip(key).enumerate() {
                        let decay = decay[row.min(factors - 1)];
                        for (s, sum) in state.iter_mut().zip(share_of(&mut sums, row, width)) {
                            *s *= decay;
                            *sum += key * *s;
                        }
                    }
                    write.copy_from_slice(&value[token * width..][..width]);
                    if let Some(strength) = strength {
                        for (column, write) in write.iter_mut().enumerate() {
                            *write = (*write - joined(&sums, column, width)) * strength[token];
                        }
                    }
                    sums.fill(0.0);
                    for (row, (state, (key, query))) in
                        state.chunks_exact_mut(width).zip(key.iter().zip(query)).enumerate()
                    {
                        for ((s, write), sum) in state.iter_mut().zip(&write).zip(share_of(&mut sums, row, width)) {
                            *s += key * write;
                            *sum += query * *s;
                        }
                    }
                    for (column, out) in out.iter_mut().enumerate() {
                        *out = joined(&sums, column, width);
                    }
                }
            },
        );
    });
    out
}

/// The part of all columns' sums that a row is added to.
#[inline(always)]
fn share_of(sums: &mut [f32], row: usize, width: usize) -> &mut [f32] {
    &mut sums[row / GROUP % SHARES * width..][..width]
}

/// The sum of a column.
#[inline(always)]
fn joined(sums: &[f32], column: usize, width: usize) -> f32 {
    let share = |share: usize| sums[share * width + column];
    (share(0) + share(1)) + (share(2) + share(3))
}

/// The values of a tensor on a CPU.
fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match storage {
        CpuStorage::F32(values) => part(values, layout),
        _ => bail!("recurrence: not f32"),
    }
}

impl CustomOp3 for Recurrence<'_> {
    fn name(&self) -> &'static str {
        "recurrence"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let of = self.sizes(l1, l2, l3)?;
        let (decay, decay_layout) = self.decay.storage_and_layout();
        let Storage::Cpu(decay) = &*decay else { bail!("recurrence: tensors of several devices") };
        let inputs = [floats(s1, l1)?, floats(s2, l2)?, floats(s3, l3)?, floats(decay, decay_layout)?];
        let out = reading(self.strength, |strength| {
            let strength = strength.map(|(strength, layout)| floats(strength, layout)).transpose()?;
            Ok(run(of, inputs, strength))
        })?;
        Ok((CpuStorage::F32(out), l3.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let Sizes { served, positions, rows, width, factors } = self.sizes(l1, l2, l3)?;
        let told = kernels::Recurrence { heads: l3.dims()[0], served, positions, rows, width, factors };
        let out = kernels::recurrence([(s1, l1), (s2, l2), (s3, l3)], self.decay, self.strength, told)?;
        Ok((out, l3.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn other_tensors_than_a_recurrence_has_are_refused() {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let refused = |key: &[usize], value: &[usize], decay: &[usize], strength: &[usize]| {
            let (decay, strength) = (zeros(decay), zeros(strength));
            let of = Recurrence { decay: &decay, strength: Some(&strength) };
            of.apply(&zeros(key), &zeros(key), &zeros(value)).is_err()
        };
        assert!(!refused(&[2, 3, 5], &[4, 3, 7], &[4, 3, 5], &[4, 3]));
        assert!(!refused(&[2, 3, 5], &[4, 3, 7], &[4, 3, 1], &[4, 3]));
        assert!(refused(&[3, 3, 5], &[4, 3, 7], &[4, 3], &[4, 3]), "heads that are not served alike");
        assert!(refused(&[2, 2, 5], &[4, 3, 7], &[4, 3], &[4, 3]), "keys of other tokens");
        assert!(refused(&[2, 3, 5], &[4, 3, 7], &[4, 3, 4], &[4, 3]), "factors of other rows");
        assert!(refused(&[2, 3, 5], &[4, 3, 7], &[4, 3], &[4, 2]), "strengths of other tokens");
    }
}
