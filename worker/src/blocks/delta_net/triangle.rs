//! The systems of chunks: unit lower triangles, inverted.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::recurrence::CHUNK;
#[cfg(feature = "cuda")]
use crate::device::gpu::fused as kernels;
use crate::kernels::fused::part;

/// Inverse of the identity plus what of each of `systems` `[count, n, n]` is below the diagonal, by
/// forward substitution. In f32 and contiguous; n is 64 at most.
///
/// # Errors
/// Other tensors; the device's.
pub fn inverse(systems: &Tensor) -> Result<Tensor> {
    systems.apply_op1_no_bwd(&Invert)
}

struct Invert;

impl Invert {
    /// Rows of a system.
    fn rows(layout: &Layout) -> Result<usize> {
        let (_, n, columns) = layout.shape().dims3()?;
        if n != columns || !(1..=CHUNK).contains(&n) {
            bail!("invert: {:?} are no systems of up to {CHUNK} rows", layout.shape());
        }
        Ok(n)
    }
}

impl CustomOp1 for Invert {
    fn name(&self) -> &'static str {
        "invert"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let CpuStorage::F32(systems) = storage else { bail!("{}: not f32", self.name()) };
        let (n, systems) = (Self::rows(layout)?, part(systems, layout)?);
        let mut out = vec![0_f32; systems.len()];
        out.par_chunks_mut(n * n).zip(systems.par_chunks(n * n)).for_each(|(out, system)| {
            for (row, factors) in system.chunks_exact(n).enumerate() {
                let (above, own) = out.split_at_mut(row * n);
                own[row] = 1.0;
                for (k, (above, factor)) in above.chunks_exact(n).zip(factors).enumerate() {
                    for (value, above) in own.iter_mut().zip(&above[..=k]) {
                        *value -= factor * above;
                    }
                }
            }
        });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((kernels::invert((storage, layout), Self::rows(layout)?)?, layout.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::blocks::delta_net::tests::{close, values};

    #[test]
    fn inverse_times_its_system_is_the_identity() {
        for n in [1, 2, 7, 16, 33, 64] {
            let systems = values(&[3, n, n], 1.0, n as u64);
            let identity = Tensor::eye(n, DType::F32, &Device::Cpu).unwrap();
            let below = (Tensor::tril2(n, DType::F32, &Device::Cpu).unwrap() - &identity).unwrap();
            let lower = systems.broadcast_mul(&below).unwrap().broadcast_add(&identity).unwrap();
            let product = inverse(&systems).unwrap().matmul(&lower).unwrap();
            let identities = identity.unsqueeze(0).unwrap().repeat((3, 1, 1)).unwrap();
            close(&product, &identities, 1e-4);
        }
    }

    #[test]
    fn other_tensors_than_systems_are_refused() {
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
        assert!(inverse(&zeros(&[1, 2, 3], DType::F32)).is_err());
        assert!(inverse(&zeros(&[1, 65, 65], DType::F32)).is_err());
        assert!(inverse(&zeros(&[1, 2, 2], DType::F64)).is_err());
    }
}
