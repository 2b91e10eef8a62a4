//! The causal depthwise convolution and what follows it channel by channel.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::UNIT_EPS;

/// One of queries, keys and values: which columns of the projection, which channels of the convolution.
#[derive(Clone, Copy, Debug)]
pub(super) struct Convolution {
    /// Equal groups of the projection's columns: one per key head.
    pub(super) groups: usize,
    /// Heads in a group: the key head itself, or the value heads it serves, side by side.
    pub(super) per_group: usize,
    /// Tokens of a sequence.
    pub(super) positions: usize,
    /// First column of the first head, within a group.
    pub(super) first_column: usize,
    /// Columns of a head.
    pub(super) width: usize,
    /// First channel of the first head; the channels of all heads lie one after another.
    pub(super) first_channel: usize,
    /// Length to which the vector of each head is scaled in the end; `None`: left as it is.
    pub(super) length: Option<f32>,
}

impl Convolution {
    /// `projected` `[sequences * positions, columns]` and `taps` `[channels, kernel]`, both f32 and contiguous, to
    /// `[sequences * heads, positions, width]`. The last tap is for the current token; before a sequence there are zeros.
    pub(super) fn apply(&self, projected: &Tensor, taps: &Tensor) -> Result<Tensor> {
        if projected.device().is_cpu() {
            projected.apply_op2_no_bwd(taps, self)
        } else {
            self.composed(projected, taps)
        }
    }

    fn run(&self, projected: &[f32], row_width: usize, taps: &[f32], kernel: usize) -> Vec<f32> {
        let Self { positions, width, .. } = *self;
        let heads = self.heads();
        let mut out = vec![0.0; projected.len() / row_width * heads * width];
        out.par_chunks_mut(positions * width).enumerate().for_each(|(at, out)| {
            let (sequence, head) = (at / heads, at % heads);
            let taps = self.taps_of(head, taps, kernel);
            let (group, member) = (head / self.per_group, head % self.per_group);
            let column = group * (row_width / self.groups) + self.first_column + member * width;
            let row = |position: usize| &projected[(sequence * positions + position) * row_width + column..][..width];
            for (position, out) in out.chunks_exact_mut(width).enumerate() {
                let before = kernel.min(position + 1);
                for (source, taps) in (position + 1 - before..).zip(taps.chunks_exact(width).skip(kernel - before)) {
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

    fn heads(&self) -> usize {
        self.groups * self.per_group
    }

    /// A head's taps `[kernel, width]`: in the order in which a row of tokens meets them.
    fn taps_of(&self, head: usize, taps: &[f32], kernel: usize) -> Vec<f32> {
        let first = self.first_channel + head * self.width;
        let channels = taps[first * kernel..].chunks_exact(kernel).take(self.width);
        (0..kernel).flat_map(|tap| channels.clone().map(move |channel| channel[tap])).collect()
    }

    fn composed(&self, projected: &Tensor, taps: &Tensor) -> Result<Tensor> {
        let Self { groups, positions, width, .. } = *self;
        let ((rows, columns), kernel) = (projected.dims2()?, taps.dim(1)?);
        let (sequences, heads) = (rows / positions, self.heads());
        let grouped = projected.reshape((rows, groups, columns / groups))?;
        let own = grouped.narrow(2, self.first_column, self.per_group * width)?.contiguous()?;
        let x = own.reshape((sequences, positions, heads, width))?.transpose(1, 2)?.pad_with_zeros(2, kernel - 1, 0)?;
        let taps = taps.narrow(0, self.first_channel, heads * width)?.reshape((1, heads, width, kernel))?;
        let mut sum = Tensor::zeros((sequences, heads, positions, width), DType::F32, projected.device())?;
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
        let ((rows, row_width), (_, kernel)) = (l1.shape().dims2()?, l2.shape().dims2()?);
        let out = self.run(&x[x_start..x_end], row_width, &taps[taps_start..taps_end], kernel);
        let shape = Shape::from((rows / self.positions * self.heads(), self.positions, self.width));
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
            groups in 1_usize..4, per_group in 1_usize..4, positions in 1_usize..9,
            width in 1_usize..20, kernel in 1_usize..6, unit: bool,
        ) {
            // Two sequences, of each head the middle columns.
            let part = Convolution {
                groups, per_group, positions, first_column: 3, width, first_channel: 2, length: unit.then_some(0.5),
            };
            let x = values(&[2 * positions, groups * (per_group * width + 5)], 3.0, 1);
            let taps = values(&[groups * per_group * width + 4, kernel], 1.0, 2);
            close(&part.apply(&x, &taps).unwrap(), &part.composed(&x, &taps).unwrap(), 1e-5);
        }
    }

    #[test]
    fn the_last_tap_is_on_the_current_token_and_nothing_precedes_a_sequence() {
        let part = Convolution {
            groups: 1,
            per_group: 1,
            positions: 3,
            first_column: 0,
            width: 1,
            first_channel: 0,
            length: None,
        };
        let x = Tensor::new(&[[1f32], [2.0], [3.0], [4.0], [5.0], [6.0]], &Device::Cpu).unwrap();
        let taps = Tensor::new(&[[10f32, 1.0]], &Device::Cpu).unwrap();
        let silu = |v: f32| v / (1.0 + (-v).exp());
        let want = [1.0, 12.0, 23.0, 4.0, 45.0, 56.0].map(silu);
        assert_eq!(part.apply(&x, &taps).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap(), want);
    }
}
