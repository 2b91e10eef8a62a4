//! The causal depthwise convolution and what follows it channel by channel.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::UNIT_EPS;
use crate::fused::has_loops;

/// One of queries, keys and values: which channels of the convolution, and what follows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Convolution {
    /// Heads, their columns one after another.
    pub(super) heads: usize,
    /// Tokens of a sequence.
    pub(super) positions: usize,
    /// Channel of the first head's first column; the others follow.
    pub(super) first_channel: usize,
    /// Length to which the vector of each head is scaled in the end; `None`: left as it is.
    pub(super) length: Option<f32>,
}

impl Convolution {
    /// Convolves, and applies SiLU. `x` `[sequences * positions, heads * width]` and `taps` `[channels, kernel]`, both f32 and
    /// contiguous, to `[sequences * heads, positions, width]`. The last tap is for the current token; before a sequence there are zeros.
    pub(super) fn apply(&self, x: &Tensor, taps: &Tensor) -> Result<Tensor> {
        if has_loops(x) { x.apply_op2_no_bwd(taps, self) } else { self.composed(x, taps) }
    }

    fn run(&self, x: &[f32], columns: usize, taps: &[f32], kernel: usize) -> Vec<f32> {
        let Self { heads, positions, .. } = *self;
        let width = columns / heads;
        let mut out = vec![0.0; x.len()];
        out.par_chunks_mut(positions * width).enumerate().for_each(|(at, out)| {
            let (sequence, head) = (at / heads, at % heads);
            let taps = self.taps_of(head, width, taps, kernel);
            let row = |position: usize| &x[(sequence * positions + position) * columns + head * width..][..width];
            for (position, out) in out.chunks_exact_mut(width).enumerate() {
                let seen = kernel.min(position + 1);
                for (source, taps) in (position + 1 - seen..).zip(taps.chunks_exact(width).skip(kernel - seen)) {
                    for ((o, x), tap) in out.iter_mut().zip(row(source)).zip(taps) {
                        *o += x * tap;
                    }
                }
                out.iter_mut().for_each(|v| *v /= 1.0 + (-*v).exp());
                if let Some(length) = self.length {
                    let scale = length / (out.iter().map(|v| v * v).sum::<f32>() + UNIT_EPS).sqrt();
                    out.iter_mut().for_each(|v| *v *= scale);
                }
            }
        });
        out
    }

    /// A head's taps `[kernel, width]`: in the order in which a row of tokens meets them.
    fn taps_of(&self, head: usize, width: usize, taps: &[f32], kernel: usize) -> Vec<f32> {
        let first = self.first_channel + head * width;
        let channels = taps[first * kernel..].chunks_exact(kernel).take(width);
        (0..kernel).flat_map(|tap| channels.clone().map(move |channel| channel[tap])).collect()
    }

    fn composed(&self, x: &Tensor, taps: &Tensor) -> Result<Tensor> {
        let Self { heads, positions, .. } = *self;
        let ((rows, columns), kernel) = (x.dims2()?, taps.dim(1)?);
        let (sequences, width) = (rows / positions, columns / heads);
        let x = x.reshape((sequences, positions, heads, width))?.transpose(1, 2)?.pad_with_zeros(2, kernel - 1, 0)?;
        let taps = taps.narrow(0, self.first_channel, columns)?.reshape((1, heads, width, kernel))?;
        let mut sum = Tensor::zeros((sequences, heads, positions, width), DType::F32, x.device())?;
        for tap in 0..kernel {
            let weight = taps.narrow(3, tap, 1)?.transpose(2, 3)?;
            sum = (sum + x.narrow(2, tap, positions)?.broadcast_mul(&weight)?)?;
        }
        let out = sum.silu()?.reshape((sequences * heads, positions, width))?;
        let Some(length) = self.length else { return Ok(out) };
        let norm = (out.sqr()?.sum_keepdim(2)? + f64::from(UNIT_EPS))?.sqrt()?;
        out.broadcast_div(&norm)? * f64::from(length)
    }
}

impl CustomOp2 for Convolution {
    fn name(&self) -> &'static str {
        "delta-net-convolution"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (CpuStorage::F32(x), CpuStorage::F32(taps)) = (s1, s2) else { bail!("{}: not f32", self.name()) };
        let (Some((x_start, x_end)), Some((taps_start, taps_end))) = (l1.contiguous_offsets(), l2.contiguous_offsets())
        else {
            bail!("{}: not contiguous", self.name())
        };
        let ((rows, columns), (_, kernel)) = (l1.shape().dims2()?, l2.shape().dims2()?);
        let out = self.run(&x[x_start..x_end], columns, &taps[taps_start..taps_end], kernel);
        let shape = Shape::from((rows / self.positions * self.heads, self.positions, columns / self.heads));
        Ok((CpuStorage::F32(out), shape))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;
    use crate::delta_net::tests::{close, values};

    proptest! {
        #[test]
        fn fused_equals_composed(
            heads in 1_usize..5, positions in 1_usize..9, width in 1_usize..20, kernel in 1_usize..6, unit: bool,
        ) {
            let part = Convolution { heads, positions, first_channel: 2, length: unit.then_some(0.5) };
            let x = values(&[2 * positions, heads * width], 3.0, 1);
            let taps = values(&[heads * width + 4, kernel], 1.0, 2);
            close(&part.apply(&x, &taps).unwrap(), &part.composed(&x, &taps).unwrap(), 1e-5);
        }
    }

    #[test]
    fn the_last_tap_is_on_the_current_token_and_nothing_precedes_a_sequence() {
        let part = Convolution { heads: 1, positions: 3, first_channel: 0, length: None };
        let x = Tensor::new(&[[1f32], [2.0], [3.0], [4.0], [5.0], [6.0]], &Device::Cpu).unwrap();
        let taps = Tensor::new(&[[10f32, 1.0]], &Device::Cpu).unwrap();
        let silu = |v: f32| v / (1.0 + (-v).exp());
        let want = [1.0, 12.0, 23.0, 4.0, 45.0, 56.0].map(silu);
        assert_eq!(part.apply(&x, &taps).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap(), want);
    }
}
