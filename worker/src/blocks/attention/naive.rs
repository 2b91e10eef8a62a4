//! Attention by its definition, in f64 and one number at a time: the reference for the fast
//! implementations.

use candle_core::{DType, Device, Tensor};

use super::{AttentionWeights, Projections};
use crate::blocks::norm::Norm;
use crate::kernels::product::Linear;
use crate::model::decoder::{AttentionSpec, NormKind, NormSpec, OutputGate, QkNorm, Window};
use crate::model::rope::{Pairing, RopeScaling, RopeSpec};

/// One vector per row.
pub(crate) type Rows = Vec<Vec<f64>>;

/// Random numbers in -1..1.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|_| self.next()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

pub(crate) fn rows(x: &Tensor) -> Rows {
    x.to_dtype(DType::F64).unwrap().to_vec2().unwrap()
}

fn vector(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

/// Asserts that every value is within `tolerance` times the root mean square of all.
pub(crate) fn assert_close(got: &Tensor, expected: &Rows, tolerance: f64) {
    let got = rows(got);
    assert_eq!((got.len(), got[0].len()), (expected.len(), expected[0].len()));
    let (got, expected) = (got.concat(), expected.concat());
    let rms = (dot(&expected, &expected) / expected.len() as f64).sqrt();
    for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
        assert!((g - e).abs() <= tolerance * rms, "value {i} is {g}, expected {e}");
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(crate) fn linear(x: &Rows, of: &Linear) -> Rows {
    let weight = rows(&of.weight);
    let bias = of.bias.as_ref().map_or(vec![0.0; weight.len()], vector);
    x.iter().map(|x| weight.iter().zip(&bias).map(|(w, b)| dot(w, x) + b).collect()).collect()
}

fn unit_rms(x: &[f64], eps: f64) -> Vec<f64> {
    let rms = (dot(x, x) / x.len() as f64 + eps).sqrt();
    x.iter().map(|v| v / rms).collect()
}

/// RMSNorm; the gain is the factor itself.
pub(crate) fn rms_norm(x: &[f64], norm: &Norm, spec: NormSpec) -> Vec<f64> {
    assert_ne!(spec.kind, NormKind::Layer);
    unit_rms(x, spec.eps).iter().zip(vector(norm.gain())).map(|(v, gain)| v * gain).collect()
}

/// Rotates the first `rope.dims` values of one head.
pub(crate) fn rotate(head: &mut [f64], rope: &RopeSpec, position: usize) {
    assert_eq!(rope.scaling, RopeScaling::None);
    let pairs = rope.dims / 2;
    for pair in 0..pairs {
        let (i, j) = match rope.pairing {
            Pairing::Halves => (pair, pair + pairs),
            Pairing::Interleaved => (2 * pair, 2 * pair + 1),
        };
        let angle = position as f64 * rope.theta.powf(-(pair as f64) / pairs as f64);
        let (a, b) = (head[i], head[j]);
        head[i] = a * angle.cos() - b * angle.sin();
        head[j] = a * angle.sin() + b * angle.cos();
    }
}

fn sees(window: Window, query: usize, key: usize) -> bool {
    key <= query
        && match window {
            Window::Full => true,
            Window::Sliding(n) => query - key < n,
            Window::Chunked(n) => query / n == key / n,
        }
}

/// Attention of one head over one sequence: a query, a key and a value per position.
pub(crate) fn mix(query: &Rows, key: &Rows, value: &Rows, scale: f64, window: Window, sink: Option<f64>) -> Rows {
    let one = |(position, query): (usize, &Vec<f64>)| {
        let seen: Vec<usize> = (0..=position).filter(|&k| sees(window, position, k)).collect();
        let shares: Vec<f64> = seen.iter().map(|&k| (dot(query, &key[k]) * scale).exp()).collect();
        let sum: f64 = shares.iter().sum::<f64>() + sink.map_or(0.0, f64::exp);
        let weighted =
            |column: usize| seen.iter().zip(&shares).map(|(&k, share)| share * value[k][column]).sum::<f64>();
        (0..value[0].len()).map(|column| weighted(column) / sum).collect()
    };
    query.iter().enumerate().map(one).collect()
}

/// Columns `from..from + width` of every row.
pub(crate) fn columns(x: &Rows, from: usize, width: usize) -> Rows {
    x.iter().map(|row| row[from..from + width].to_vec()).collect()
}

/// Rows of several matrices, side by side.
pub(crate) fn side_by_side(parts: &[Rows]) -> Rows {
    (0..parts[0].len()).map(|row| parts.iter().flat_map(|part| part[row].clone()).collect()).collect()
}

/// The result of [`super::attention`].
pub(crate) fn attention(spec: &AttentionSpec, weights: &AttentionWeights, x: &Tensor, positions: usize) -> Rows {
    let mixed: Rows =
        rows(x).chunks(positions).flat_map(|sequence| one_sequence(spec, weights, &sequence.to_vec())).collect();
    linear(&mixed, &weights.output)
}

fn one_sequence(spec: &AttentionSpec, weights: &AttentionWeights, x: &Rows) -> Rows {
    let (d, kv) = (spec.head_dim, spec.kv_heads * spec.head_dim);
    let [query, key, value] = match &weights.projections {
        Projections::Separate { query, key, value } => [linear(x, query), linear(x, key), linear(x, value)],
        Projections::KeyIsValue { query, key } => [linear(x, query), linear(x, key), linear(x, key)],
        Projections::Fused(all) => {
            let all = linear(x, all);
            let queries = all[0].len() - 2 * kv;
            [columns(&all, 0, queries), columns(&all, queries, kv), columns(&all, queries + kv, kv)]
        }
    };
    // Per head [query | gate].
    let with_query = spec.output_gate == OutputGate::WithQuery;
    let stride = if with_query { 2 * d } else { d };
    let heads: Vec<Rows> = (0..spec.heads).map(|head| columns(&query, head * stride, d)).collect();
    let (query_norm, key_norm) = weights.qk_norm.as_ref().map(|(q, k)| (q, k)).unzip();
    let query = prepare(spec, query_norm, side_by_side(&heads));
    let key = prepare(spec, key_norm, key);
    let clip = |x: &Rows| -> Rows {
        let limit = spec.clip_qkv.unwrap_or(f64::INFINITY);
        x.iter().map(|row| row.iter().map(|v| v.clamp(-limit, limit)).collect()).collect()
    };
    let sinks = weights.sinks.as_ref().map(vector);
    let gates = match (&weights.gate, &weights.projections) {
        (Some(gate), _) => Some(linear(x, gate)),
        (None, Projections::Separate { query, .. } | Projections::KeyIsValue { query, .. }) if with_query => {
            Some(linear(x, query))
        }
        (None, Projections::Fused(all)) if with_query => Some(linear(x, all)),
        _ => None,
    };
    let first_gate = |head: usize| if with_query { head * 2 * d + d } else { head * d };
    let value: Rows = value
        .iter()
        .map(|row| match spec.value_norm {
            Some(eps) => row.chunks(d).flat_map(|head| unit_rms(head, eps)).collect(),
            None => row.clone(),
        })
        .collect();
    let one_head = |head: usize| {
        let shared = head / (spec.heads / spec.kv_heads);
        let of = |x: &Rows, head: usize| columns(x, head * d, d);
        let query = temper(spec, of(&query, head));
        let sink = sinks.as_ref().map(|sinks| sinks[head]);
        let scale = spec.scale.unwrap_or((d as f64).powf(-0.5));
        let mut mixed = mix(&query, &of(&key, shared), &of(&clip(&value), shared), scale, spec.window, sink);
        if let Some(gates) = &gates {
            for (mixed, gates) in mixed.iter_mut().zip(gates) {
                for (value, gate) in mixed.iter_mut().zip(&gates[first_gate(head)..]) {
                    *value /= 1.0 + (-gate).exp();
                }
            }
        }
        mixed
    };
    side_by_side(&(0..spec.heads).map(one_head).collect::<Vec<_>>())
}

/// Norm, clip, rotation, norm: queries or keys of all heads side by side.
fn prepare(spec: &AttentionSpec, norm: Option<&Norm>, mut x: Rows) -> Rows {
    for (position, row) in x.iter_mut().enumerate() {
        if let (QkNorm::WholeProjection(of), Some(norm)) = (spec.qk_norm, norm) {
            *row = rms_norm(row, norm, of);
        }
        for head in row.chunks_exact_mut(spec.head_dim) {
            if let (QkNorm::PerHead(of), Some(norm)) = (spec.qk_norm, norm) {
                head.copy_from_slice(&rms_norm(head, norm, of));
            }
            if let Some(limit) = spec.clip_qkv {
                head.iter_mut().for_each(|v| *v = v.clamp(-limit, limit));
            }
            if let Some(rope) = &spec.rope {
                rotate(head, rope, position);
            }
            if let QkNorm::AfterRope { eps } = spec.qk_norm {
                head.copy_from_slice(&unit_rms(head, eps));
            }
        }
    }
    x
}

fn temper(spec: &AttentionSpec, mut query: Rows) -> Rows {
    if let Some(temperature) = &spec.temperature {
        for (position, row) in query.iter_mut().enumerate() {
            let steps = ((position as f64 + 1.0) / temperature.floor).floor();
            row.iter_mut().for_each(|v| *v *= 1.0 + temperature.scale * (1.0 + steps).ln());
        }
    }
    query
}
