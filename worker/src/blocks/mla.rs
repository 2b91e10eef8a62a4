//! Multi-head latent attention. A head's queries and keys are [part without position | rotated
//! part]; all heads share the rotated key; keys and values are projected from one low-rank vector
//! per token.

use std::ops::Range;

use candle_core::{Result, Tensor};

use crate::blocks::attention::{MaybeRecorder, SoftmaxAttention, sequences_at_once};
use crate::blocks::norm::Norm;
use crate::kernels::fused::{self, RotatedPart};
use crate::kernels::input_collector::InputCollector;
use crate::kernels::product::Linear;
use crate::model::decoder::{LatentSpec, Window};
use crate::model::rope::RopeTable;

/// A latent attention's tensors on one device.
pub struct LatentWeights {
    /// Projection to the queries.
    pub query: LatentQuery,
    /// Shape `[kv_rank + rope_dim, hidden]`: the low-rank vector of keys and values, then the
    /// rotated part of the key.
    pub kv_down: Linear,
    /// Norm of the low-rank vector.
    pub kv_norm: Norm,
    /// Shape `[heads * (nope_dim + value_dim), kv_rank]`, per head [key without position | value].
    pub kv_up: Linear,
    /// `[hidden, heads * value_dim]`.
    pub output: Linear,
    /// Observer of the queries `[rows, heads * (nope_dim + rope_dim)]`, if there is one.
    pub queries: Option<InputCollector>,
}

/// Projection to the queries `[rows, heads * (nope_dim + rope_dim)]`.
pub enum LatentQuery {
    /// One matrix.
    Direct(Linear),
    /// Low-rank.
    LowRank {
        /// Projection to the low-rank vector.
        down: Linear,
        /// Norm of the low-rank vector.
        norm: Norm,
        /// Projection to the queries.
        up: Linear,
    },
}

/// Maximum expanded keys and values held at a time, in values. Heads are processed in groups if
/// there are more.
const EXPANDED_VALUES: usize = 64 << 20;

impl LatentQuery {
    /// Queries of `x` `[rows, hidden]`.
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Direct(all) => all.apply(x),
            Self::LowRank { down, norm, up } => up.apply(&norm.apply(&down.apply(x)?)?),
        }
    }
}

/// Latent attention of `x` `[sequences * positions, hidden]` (whole sequences), with an output of
/// the same shape, before the residual addition.
pub fn latent_attention(
    spec: &LatentSpec,
    weights: &LatentWeights,
    table: Option<&RopeTable>,
    x: &Tensor,
    positions: usize,
    recorder: MaybeRecorder<'_>,
) -> Result<Tensor> {
    let head_dim = spec.nope_dim + spec.rope_dim;
    let rotate = |part: Tensor, head_dim: usize, first: usize| match table {
        Some(table) => fused::rope(part, table, RotatedPart { head_dim, first }, positions),
        None => Ok(part),
    };
    let query = rotate(weights.query.apply(x)?, head_dim, spec.nope_dim)?;
    let down = weights.kv_down.apply(x)?;
    let latent = weights.kv_norm.apply(&down.narrow(1, 0, spec.kv_rank)?.contiguous()?)?;
    // The product itself follows below, some heads at a time.
    weights.kv_up.observe_input(&latent)?;
    weights.queries.as_ref().map_or(Ok(()), |collector| collector.add(&query))?;
    let rotated = rotate(down.narrow(1, spec.kv_rank, spec.rope_dim)?.contiguous()?, spec.rope_dim, 0)?;
    let sequences = x.dim(0)? / positions;
    let at_once = sequences_at_once(x.device(), sequences);
    let some = |first: usize| {
        recorder.iter().for_each(|recorder| recorder.at_sequence(first));
        let count = at_once.min(sequences - first);
        let rows = |t: &Tensor| t.narrow(0, first * positions, count * positions);
        let query = rows(&query)?.reshape((count, positions, spec.heads, head_dim))?;
        let narrow = Narrow { sequences: count, latent: rows(&latent)?, rotated: rows(&rotated)? };
        narrow.mix(spec, &weights.kv_up, &query, EXPANDED_VALUES, recorder)
    };
    let mixed = (0..sequences).step_by(at_once).map(some).collect::<Result<Vec<_>>>()?;
    weights.output.apply(&Tensor::cat(&mixed, 0)?)
}

/// Low-rank keys and values of whole sequences of n tokens.
struct Narrow {
    sequences: usize,
    /// `[sequences * n, kv_rank]`.
    latent: Tensor,
    /// The rotated key of all heads, `[sequences * n, rope_dim]`.
    rotated: Tensor,
}

impl Narrow {
    /// Attends with `query` `[sequences, n, heads, nope_dim + rope_dim]`. Returns `[sequences * n,
    /// heads * value_dim]`. Heads are processed in groups of at most `values_at_once` expanded
    /// keys and values, at least one head.
    fn mix(
        &self,
        spec: &LatentSpec,
        kv_up: &Linear,
        query: &Tensor,
        values_at_once: usize,
        recorder: MaybeRecorder<'_>,
    ) -> Result<Tensor> {
        let per_token = spec.nope_dim + spec.rope_dim + spec.value_dim;
        let at_once = (values_at_once / (self.latent.dim(0)? * per_token)).clamp(1, spec.heads);
        let mixing = SoftmaxAttention::new(spec.scale, Window::Full, None).recorder(recorder);
        let some_heads = |first: usize| {
            let heads = first..(first + at_once).min(spec.heads);
            let query = query.narrow(2, heads.start, heads.len())?;
            let (key, value) = self.expand(spec, kv_up, heads)?;
            mixing.at_head(first).mix(&query, &key, &value)
        };
        let mixed = (0..spec.heads).step_by(at_once).map(some_heads).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&mixed, 1)
    }

    /// Keys `[sequences * heads, n, nope_dim + rope_dim]` and values `[sequences * heads, n,
    /// value_dim]` of some heads.
    fn expand(&self, spec: &LatentSpec, kv_up: &Linear, heads: Range<usize>) -> Result<(Tensor, Tensor)> {
        let per_head = spec.nope_dim + spec.value_dim;
        let weight = kv_up.weight.narrow(0, heads.start * per_head, heads.len() * per_head)?;
        let expanded = Linear::new(weight, None).apply(&self.latent)?;
        let (sequences, n) = (self.sequences, self.latent.dim(0)? / self.sequences);
        let by_head = expanded.reshape((sequences, n, heads.len(), per_head))?.transpose(1, 2)?;
        let key = by_head.narrow(3, 0, spec.nope_dim)?.contiguous()?;
        let rotated = self.rotated.reshape((sequences, 1, n, spec.rope_dim))?;
        let rotated = rotated.broadcast_as((sequences, heads.len(), n, spec.rope_dim))?.contiguous()?;
        let key = Tensor::cat(&[key, rotated], 3)?;
        let value = by_head.narrow(3, spec.nope_dim, spec.value_dim)?;
        let of_all = |t: Tensor, width: usize| t.reshape((sequences * heads.len(), n, width));
        Ok((of_all(key, spec.nope_dim + spec.rope_dim)?, of_all(value, spec.value_dim)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;
    use crate::blocks::attention::naive::{self, Random, Rows};
    use crate::model::decoder::NormSpec;
    use crate::model::rope::{Pairing, RopeScaling, RopeSpec};

    const HIDDEN: usize = 9;

    fn spec(heads: usize, query_rank: Option<usize>, [nope_dim, rope_dim, value_dim]: [usize; 3]) -> LatentSpec {
        let rope = RopeSpec { theta: 50.0, dims: rope_dim, pairing: Pairing::Interleaved, scaling: RopeScaling::None };
        LatentSpec {
            heads,
            query_rank,
            kv_rank: 5,
            nope_dim,
            rope_dim,
            value_dim,
            norm: NormSpec::rms(1e-6),
            scale: 0.6,
            rope: Some(rope),
        }
    }

    fn weights(spec: &LatentSpec, random: &mut Random) -> LatentWeights {
        let mut linear = |rows, columns| Linear::new(random.tensor(&[rows, columns]), None);
        let queries = spec.heads * (spec.nope_dim + spec.rope_dim);
        let kv_down = linear(spec.kv_rank + spec.rope_dim, HIDDEN);
        let kv_up = linear(spec.heads * (spec.nope_dim + spec.value_dim), spec.kv_rank);
        let output = linear(HIDDEN, spec.heads * spec.value_dim);
        let matrices = spec.query_rank.map(|rank| (rank, linear(rank, HIDDEN), linear(queries, rank)));
        let direct = linear(queries, HIDDEN);
        let mut norm = |width| Norm::new(spec.norm, random.tensor(&[width]), None).unwrap();
        let kv_norm = norm(spec.kv_rank);
        let query = match matrices {
            None => LatentQuery::Direct(direct),
            Some((rank, down, up)) => LatentQuery::LowRank { down, norm: norm(rank), up },
        };
        LatentWeights { query, kv_down, kv_norm, kv_up, output, queries: None }
    }

    fn naive_sequence(spec: &LatentSpec, weights: &LatentWeights, x: &Rows) -> Rows {
        let normed = |x: Rows, norm: &Norm| x.iter().map(|row| naive::rms_norm(row, norm, spec.norm)).collect();
        let rotated = |mut x: Rows| {
            if let Some(rope) = &spec.rope {
                x.iter_mut().enumerate().for_each(|(position, row)| naive::rotate(row, rope, position));
            }
            x
        };
        let query = match &weights.query {
            LatentQuery::Direct(all) => naive::linear(x, all),
            LatentQuery::LowRank { down, norm, up } => naive::linear(&normed(naive::linear(x, down), norm), up),
        };
        let down = naive::linear(x, &weights.kv_down);
        let latent: Rows = normed(naive::columns(&down, 0, spec.kv_rank), &weights.kv_norm);
        let key_rotated = rotated(naive::columns(&down, spec.kv_rank, spec.rope_dim));
        let up = naive::linear(&latent, &weights.kv_up);
        let one_head = |head: usize| {
            let at = head * (spec.nope_dim + spec.rope_dim);
            let plain = naive::columns(&query, at, spec.nope_dim);
            let turned = rotated(naive::columns(&query, at + spec.nope_dim, spec.rope_dim));
            let at = head * (spec.nope_dim + spec.value_dim);
            let key = naive::side_by_side(&[naive::columns(&up, at, spec.nope_dim), key_rotated.clone()]);
            let value = naive::columns(&up, at + spec.nope_dim, spec.value_dim);
            naive::mix(&naive::side_by_side(&[plain, turned]), &key, &value, spec.scale, Window::Full, None)
        };
        naive::side_by_side(&(0..spec.heads).map(one_head).collect::<Vec<_>>())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn latent_attention_equals_the_definition(
            heads in 1..6usize,
            query_rank in proptest::option::of(1..7usize),
            dims in (1..6usize, 1..4usize, 1..8usize),
            sequences in 1..3usize,
            positions in 1..30usize,
            rotates: bool,
        ) {
            let mut spec = spec(heads, query_rank, [dims.0, 2 * dims.1, dims.2]);
            spec.rope = spec.rope.filter(|_| rotates);
            let mut random = Random::new(positions as u64);
            let weights = weights(&spec, &mut random);
            let x = random.tensor(&[sequences * positions, HIDDEN]);
            let table = spec.rope.as_ref().map(|rope| rope.table(positions, &Device::Cpu).unwrap());
            let got = latent_attention(&spec, &weights, table.as_ref(), &x, positions, None).unwrap();
            let of_sequence = |x: &[Vec<f64>]| naive_sequence(&spec, &weights, &x.to_vec());
            let mixed: Rows = naive::rows(&x).chunks(positions).flat_map(of_sequence).collect();
            naive::assert_close(&got, &naive::linear(&mixed, &weights.output), 2e-5);
        }

        #[test]
        fn head_grouping_changes_no_result(values_at_once in 0..2000usize) {
            let spec = spec(5, None, [3, 2, 4]);
            let mut random = Random::new(1);
            let (latent, rotated) = (random.tensor(&[2 * 17, spec.kv_rank]), random.tensor(&[2 * 17, 2]));
            let (query, kv_up) = (random.tensor(&[2, 17, 5, 5]), random.tensor(&[5 * 7, spec.kv_rank]));
            let kv_up = Linear::new(kv_up, None);
            // Each sequence alone, then both together.
            let of = |first: usize, sequences: usize, values_at_once: usize| {
                let rows = |t: &Tensor| t.narrow(0, 17 * first, 17 * sequences).unwrap();
                let narrow = Narrow { sequences, latent: rows(&latent), rotated: rows(&rotated) };
                let query = query.narrow(0, first, sequences).unwrap();
                naive::rows(&narrow.mix(&spec, &kv_up, &query, values_at_once, None).unwrap())
            };
            let whole = [of(0, 1, usize::MAX), of(1, 1, usize::MAX)].concat();
            for (got, want) in of(0, 2, values_at_once).concat().iter().zip(whole.concat()) {
                prop_assert!((got - want).abs() < 2e-6 * (1.0 + want.abs()), "{got}, not {want}");
            }
        }
    }
}
