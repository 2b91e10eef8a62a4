//! The causal depthwise convolution of DeltaNet and Mamba, with bias and activation.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use outliers_scan::simd::vectorized;
use rayon::prelude::*;

use super::UNIT_EPS;
#[cfg(feature = "cuda")]
use crate::device::gpu::fused as kernels;
use crate::kernels::fused::{Real, lane_sum, part, reading, sigmoid};

/// A convolution of some channels, and what follows it.
#[derive(Clone, Copy, Debug)]
pub struct Convolution<'a> {
    /// Number of heads; their columns are consecutive.
    pub heads: usize,
    /// Tokens per sequence.
    pub positions: usize,
    /// Channel of the first head's first column; the others follow.
    pub first_channel: usize,
    /// Length to which each head's vector is scaled; `None`: no scaling.
    pub length: Option<f32>,
    /// Bias per channel before SiLU, `[channels]` in f32.
    pub bias: Option<&'a Tensor>,
}

impl Convolution<'_> {
    /// Convolves, adds the bias and applies SiLU. `x` is `[sequences * positions, heads * width]`,
    /// `taps` `[channels, kernel]` in f32, both contiguous; the result is `[sequences * heads,
    /// positions, width]` in f32. The last tap applies to the current token; tokens before a
    /// sequence are zeros.
    pub fn apply(&self, x: &Tensor, taps: &Tensor) -> Result<Tensor> {
        x.apply_op2_no_bwd(taps, self)
    }

    fn run<T: Real>(&self, x: &[T], width: usize, taps: &[f32], kernel: usize, bias: Option<&[f32]>) -> Vec<f32> {
        let Self { heads, positions, .. } = *self;
        let columns = heads * width;
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(positions * width).enumerate().for_each(|(at, out)| {
            let (sequence, head) = (at / heads, at % heads);
            let taps = self.taps_of(head, width, taps, kernel);
            let bias = bias.map(|bias| &bias[self.first_channel + head * width..][..width]);
            let x = &x[sequence * positions * columns + head * width..];
            vectorized(
                #[inline(always)]
                || {
                    for (position, out) in out.chunks_exact_mut(width).enumerate() {
                        let seen = kernel.min(position + 1);
                        let taps = taps.chunks_exact(width).skip(kernel - seen);
                        for (source, taps) in (position + 1 - seen..).zip(taps) {
                            for ((o, x), tap) in out.iter_mut().zip(&x[source * columns..][..width]).zip(taps) {
                                *o += x.wide() * tap;
                            }
                        }
                        if let Some(bias) = bias {
                            out.iter_mut().zip(bias).for_each(|(v, bias)| *v += bias);
                        }
                        out.iter_mut().for_each(|v| *v *= sigmoid(*v));
                        if let Some(length) = self.length {
                            let scale = length / (lane_sum(out, |v| v * v) + UNIT_EPS).sqrt();
                            out.iter_mut().for_each(|v| *v *= scale);
                        }
                    }
                },
            );
        });
        out
    }

    /// A head's taps as `[kernel, width]`, in the order of a row's tokens.
    fn taps_of(&self, head: usize, width: usize, taps: &[f32], kernel: usize) -> Vec<f32> {
        let first = self.first_channel + head * width;
        let channels = taps[first * kernel..].chunks_exact(kernel).take(width);
        (0..kernel).flat_map(|tap| channels.clone().map(move |channel| channel[tap])).collect()
    }

    /// Rows, channels per head and taps per channel.
    fn sizes(&self, x: &Layout, taps: &Layout) -> Result<[usize; 3]> {
        let ((rows, columns), (_, kernel)) = (x.shape().dims2()?, taps.shape().dims2()?);
        if !rows.is_multiple_of(self.positions) || !columns.is_multiple_of(self.heads) {
            bail!("{}: {rows} rows of {columns} for {:?}", self.name(), self);
        }
        Ok([rows, columns / self.heads, kernel])
    }

    /// Shape of the output.
    fn shape(&self, rows: usize, width: usize) -> Shape {
        Shape::from((rows / self.positions * self.heads, self.positions, width))
    }
}

impl CustomOp2 for Convolution<'_> {
    fn name(&self) -> &'static str {
        "convolution"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let CpuStorage::F32(taps) = s2 else { bail!("{}: taps are not f32", self.name()) };
        let ([rows, width, kernel], taps) = (self.sizes(l1, l2)?, part(taps, l2)?);
        let out = reading(self.bias, |bias| {
            let bias = match bias {
                None => None,
                Some((CpuStorage::F32(bias), layout)) => Some(part(bias, layout)?),
                Some(_) => bail!("{}: the bias is not f32", self.name()),
            };
            Ok(match s1 {
                CpuStorage::F32(x) => self.run(part(x, l1)?, width, taps, kernel, bias),
                CpuStorage::BF16(x) => self.run(part(x, l1)?, width, taps, kernel, bias),
                CpuStorage::F16(x) => self.run(part(x, l1)?, width, taps, kernel, bias),
                _ => bail!("{}: not a float", self.name()),
            })
        })?;
        Ok((CpuStorage::F32(out), self.shape(rows, width)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s1: &CudaStorage, l1: &Layout, s2: &CudaStorage, l2: &Layout) -> Result<(CudaStorage, Shape)> {
        let [rows, width, kernel] = self.sizes(l1, l2)?;
        let Self { heads, positions, first_channel, length, bias } = *self;
        let told = kernels::Convolution { heads, positions, width, kernel, first_channel, length };
        Ok((kernels::convolution((s1, l1), (s2, l2), bias, told)?, self.shape(rows, width)))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use proptest::prelude::*;

    use super::*;
    use crate::blocks::delta_net::tests::{close, values};

    proptest! {
        #[test]
        fn convolution_equals_the_definition(
            heads in 1_usize..5, positions in 1_usize..9, width in 1_usize..40, kernel in 1_usize..6,
            unit: bool, biased: bool,
            dtype in prop::sample::select(vec![DType::F32, DType::BF16]),
        ) {
            let bias = values(&[heads * width + 4], 1.0, 3);
            let length = unit.then_some(0.5);
            let part = Convolution { heads, positions, first_channel: 2, length, bias: biased.then_some(&bias) };
            let biases: Vec<f32> = bias.to_vec1().unwrap();
            let x = values(&[2 * positions, heads * width], 3.0, 1).to_dtype(dtype).unwrap();
            let taps = values(&[heads * width + 4, kernel], 1.0, 2);
            let rows = |t: &Tensor| t.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
            let (of_x, of_taps) = (rows(&x), rows(&taps));
            let mut want = Vec::new();
            for at in 0..2 * heads * positions {
                let (sequence, head, position) = (at / positions / heads, at / positions % heads, at % positions);
                let silu = |column: usize| {
                    let of_tap = |tap: usize| {
                        let at = (sequence * positions + position + tap + 1).checked_sub(kernel);
                        let at = at.filter(|at| *at >= sequence * positions);
                        at.map_or(0.0, |at| of_x[at][column] * of_taps[2 + column][tap])
                    };
                    let bias = if biased { f64::from(biases[2 + column]) } else { 0.0 };
                    let sum = (0..kernel).map(of_tap).sum::<f64>() + bias;
                    sum / (1.0 + (-sum).exp())
                };
                let row: Vec<f64> = (head * width..(head + 1) * width).map(silu).collect();
                let norm = (row.iter().map(|v| v * v).sum::<f64>() + f64::from(UNIT_EPS)).sqrt();
                want.extend(row.iter().map(|v| if unit { 0.5 * v / norm } else { *v }));
            }
            let want = Tensor::from_vec(want, (2 * heads, positions, width), &Device::Cpu).unwrap();
            close(&part.apply(&x, &taps).unwrap(), &want, 1e-4);
        }
    }

    #[test]
    fn last_tap_is_the_current_token_and_padding_is_zero() {
        let part = Convolution { heads: 1, positions: 3, first_channel: 0, length: None, bias: None };
        let x = Tensor::new(&[[1f32], [2.0], [3.0], [4.0], [5.0], [6.0]], &Device::Cpu).unwrap();
        let taps = Tensor::new(&[[10f32, 1.0]], &Device::Cpu).unwrap();
        let silu = |v: f32| v / (1.0 + (-v).exp());
        let want = [1.0, 12.0, 23.0, 4.0, 45.0, 56.0].map(silu);
        let got = part.apply(&x, &taps).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() <= 1e-6 * want), "{got:?}, not {want:?}");
    }
}
