//! How fast a GPU attends by products and a softmax, and how fast by one kernel.

use std::fmt;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use serde::Serialize;

use super::{fastest, giga};
use crate::blocks::attention::SoftmaxAttention;
use crate::error::{Result, WorkerError};
use crate::model::decoder::Window;

/// Widths of a head: of its queries and keys, and of its values.
const WIDTHS: [[usize; 2]; 6] = [[64, 64], [80, 80], [96, 96], [128, 128], [192, 128], [256, 256]];
/// How far both may differ. Inputs are within 1. Composed, scores of some 10 are rounded to bf16;
/// shares and results are in both forms.
const DIFFERENCE: f32 = 0.03;

/// What [`attention`] measured.
#[derive(Clone, Debug, Serialize)]
pub struct AttentionTable {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// One row per width and length.
    pub rows: Vec<AttentionRow>,
}

/// Sequences of one length, heads of one width.
#[derive(Clone, Debug, Serialize)]
pub struct AttentionRow {
    /// Width of queries and keys.
    pub head_dim: usize,
    /// Width of values.
    pub value_dim: usize,
    /// Sequences together.
    pub sequences: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// 10^12 FLOP per second by products and a softmax, of scores that are seen.
    pub composed_tflop_per_second: f64,
    /// The same by one kernel.
    pub fused_tflop_per_second: f64,
    /// Between both results, also with a window and sinks.
    pub largest_difference: f32,
}

impl fmt::Display for AttentionTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} heads of queries, {} of keys and values, in bf16; TFLOP/s", self.heads, self.kv_heads)?;
        let titles = ["width", "sequences", "tokens", "composed", "fused", "ratio", "difference"];
        let [width, sequences, tokens, composed, fused, ratio, difference] = titles;
        writeln!(f, "{width:>9} {sequences:>9} {tokens:>8} {composed:>10} {fused:>8} {ratio:>6} {difference:>11}")?;
        for r in &self.rows {
            let width = format!("{}, {}", r.head_dim, r.value_dim);
            let (composed, fused) = (r.composed_tflop_per_second, r.fused_tflop_per_second);
            writeln!(
                f,
                "{width:>9} {:>9} {:>8} {composed:>10.1} {fused:>8.1} {:>6.1} {:>11.4}",
                r.sequences,
                r.tokens,
                fused / composed,
                r.largest_difference
            )?;
        }
        Ok(())
    }
}

/// Attends within sequences of each of `lengths`, as many as have the tokens of the longest, in
/// both forms on a GPU, the fastest of `rounds` each. With a window and sinks results are compared,
/// but not timed.
///
/// # Errors
/// Job: no GPU, no length, or one of 0. Internal: both forms differ. Device: the driver's.
pub fn attention(lengths: &[usize], heads: usize, rounds: usize, device: &Device) -> Result<AttentionTable> {
    if device.is_cpu() {
        let error = WorkerError::job("bench attention compares two forms of GPUs");
        return Err(error.hint("name a GPU, such as --device cuda:0"));
    }
    let tokens = lengths.iter().copied().max().unwrap_or(0);
    if tokens == 0 || heads == 0 || lengths.contains(&0) {
        return Err(WorkerError::job("--lengths and --heads are whole numbers from 1 on"));
    }
    let kv_heads = if heads.is_multiple_of(4) { heads / 4 } else { heads };
    let mut rows = Vec::new();
    for [width, value_width] in WIDTHS {
        let made_up = |heads: usize, width: usize| {
            let values = Tensor::randn(0f32, 0.4f32, (tokens, heads * width), &Device::Cpu)?;
            values.to_dtype(DType::BF16)?.to_device(device)
        };
        let (query, key) = (made_up(heads, width)?, made_up(kv_heads, width)?);
        let value = made_up(kv_heads, value_width)?;
        let sinks = Tensor::randn(0f32, 0.4f32, heads, &Device::Cpu)?.to_device(device)?;
        for &length in lengths {
            let sequences = tokens / length;
            let some = |all: &Tensor| all.narrow(0, 0, sequences * length);
            let query = some(&query)?.reshape((sequences, length, heads, width))?;
            let key = some(&key)?.reshape((sequences * kv_heads, length, width))?;
            let value = some(&value)?.reshape((sequences * kv_heads, length, value_width))?;
            let compare = |window: Window, sinks: Option<&Tensor>, rounds: usize| {
                let by = |fused_from: usize| {
                    let mixing = SoftmaxAttention::new((width as f64).powf(-0.5), window, sinks).fused_from(fused_from);
                    let mut mixed = Vec::new();
                    let seconds = fastest(rounds, || {
                        mixed = vec![mixing.mix(&query, &key, &value)?];
                        device.synchronize()?;
                        Ok(())
                    })?;
                    Ok::<_, WorkerError>((mixed.remove(0).flatten_all()?.to_vec1::<bf16>()?, seconds))
                };
                let ((composed, composed_seconds), (fused, fused_seconds)) = (by(usize::MAX)?, by(0)?);
                let largest = difference(&composed, &fused);
                if largest.is_nan() || largest > DIFFERENCE {
                    return Err(WorkerError::internal(format!(
                        "both forms of attention differ by {largest}: heads of {width} and {value_width}, \
                         {length} tokens, {window:?}"
                    )));
                }
                Ok::<_, WorkerError>((largest, [composed_seconds, fused_seconds]))
            };
            let (of_all, [composed_seconds, fused_seconds]) = compare(Window::Full, None, rounds)?;
            let (of_some, _) = compare(Window::Sliding(length.div_ceil(3)), Some(&sinks), 1)?;
            // Both products of each score, of which a query has as many as its position and one.
            let flop = sequences * heads * length * (length + 1) * (width + value_width);
            rows.push(AttentionRow {
                head_dim: width,
                value_dim: value_width,
                sequences,
                tokens: length,
                composed_tflop_per_second: giga(flop, composed_seconds) / 1e3,
                fused_tflop_per_second: giga(flop, fused_seconds) / 1e3,
                largest_difference: of_all.max(of_some),
            });
        }
    }
    Ok(AttentionTable { heads, kv_heads, rows })
}

/// The largest; NaN if there is one.
fn difference(a: &[bf16], b: &[bf16]) -> f32 {
    let differences = a.iter().zip(b).map(|(a, b)| (a.to_f32() - b.to_f32()).abs());
    differences.fold(0.0, |most, one| if one > most || one.is_nan() { one } else { most })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_gpus_are_compared() {
        let error = attention(&[64], 4, 1, &Device::Cpu).unwrap_err();
        assert!(error.message().contains("two forms of GPUs"), "{}", error.message());
    }

    #[test]
    fn a_difference_that_is_no_number_shows() {
        let of = |values: [f32; 3]| values.map(bf16::from_f32);
        assert_eq!(difference(&of([1.0, 2.0, 3.0]), &of([1.0, 2.5, 2.75])), 0.5);
        assert!(difference(&of([1.0, f32::NAN, 3.0]), &of([1.0, 2.0, 2.0])).is_nan());
    }
}
