//! Synthetic weights: the tensors of a configuration with their published names, shapes and
//! dtypes, and values generated on reading. Cost and memory of a run are those of real weights.
//!
//! Sign and mantissa of a number are noise, its exponent is fixed. Activations therefore keep a
//! sane scale through the layers, no format overflows, and generating weights is as fast as
//! writing them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use outliers_protocol::FileBytes;
use outliers_scan::vectorize;
use rayon::prelude::*;
use serde_json::Value;

use super::{TensorEntry, TensorIndex, WeightSource, check_range};
use crate::checkpoint::safetensors::{HeaderTensor, StoredDtype};
use crate::checkpoint::{MXFP4_BLOCK, NVFP4_BLOCK};
use crate::error::{Result, WorkerError};
use crate::model::arch::{self, Architecture, Nvfp4Layout, Quantisation};
use crate::model::decoder::{Need, Role};
use crate::noise::{mix, name_hash};

/// Bytes that a thread generates at a time, a multiple of a word.
const TASK: usize = 1 << 16;
/// Root mean square of numbers with magnitude 1 to 2.
const SPREAD: f64 = 1.53;
/// Root mean square of all codes of e2m1.
const SPREAD_OF_E2M1: f64 = 2.93;
/// Root mean square of the integers from -8 to 7.
const SPREAD_OF_INT4: f64 = 4.64;

/// Weights of a configuration and seed.
pub struct SyntheticSource {
    index: TensorIndex,
    made: BTreeMap<String, ByteGenerator>,
    seed: u64,
    read: AtomicU64,
}

impl SyntheticSource {
    /// The tensors that a pass of the model reads.
    ///
    /// # Errors
    /// Errors of the configuration: an unknown architecture, an unsupported setting.
    pub fn new(config: &Value, seed: u64) -> Result<Self> {
        let architecture = arch::read(config)?;
        let layout = Layout { plain: plain_dtype(config, architecture.quantisation), architecture };
        let mut tensors = Vec::new();
        let mut made = BTreeMap::new();
        let mut end = 0;
        for (layer, need) in layout.architecture.spec.needs() {
            for (name, shape, kind) in layout.tensors(layer, &need) {
                if made.contains_key(&name) {
                    // Another expert of the same stacked tensor.
                    continue;
                }
                let size = kind.dtype.size().ok_or_else(|| WorkerError::internal("a dtype without a size"))?;
                let len = size * shape.iter().product::<u64>();
                let dtype = kind.dtype.clone();
                tensors.push(HeaderTensor { name: name.clone(), dtype, shape, strides: None, offset: end, len });
                made.insert(name, kind);
                end += len;
            }
        }
        let file = FileBytes { name: "synthetic".to_owned(), bytes: end };
        let index = TensorIndex::assemble(vec![(file, tensors)], None)?;
        Ok(Self { index, made, seed, read: AtomicU64::new(0) })
    }
}

impl WeightSource for SyntheticSource {
    fn index(&self) -> &TensorIndex {
        &self.index
    }

    fn read(&self, entry: &TensorEntry, range: Range<u64>, into: &mut [u8]) -> Result<()> {
        check_range(entry, &range, into)?;
        let unknown = || WorkerError::internal(format!("no synthetic tensor {}", entry.name));
        let made = self.made.get(&entry.name).ok_or_else(unknown)?;
        let key = mix(self.seed) ^ name_hash(&entry.name);
        let pieces = into.par_chunks_mut(TASK).enumerate();
        pieces.for_each(|(i, into)| made.fill(key, range.start + (i * TASK) as u64, into));
        self.read.fetch_add(into.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn reads_parts(&self, _: &TensorEntry) -> bool {
        true
    }

    fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }
}

/// Stored dtype of floats that are not quantised.
fn plain_dtype(config: &Value, quantisation: Option<Quantisation>) -> StoredDtype {
    let places = [config, &config["text_config"]];
    let named = places.iter().flat_map(|config| [&config["torch_dtype"], &config["dtype"]]).find_map(Value::as_str);
    match named {
        Some("bfloat16") => StoredDtype::BF16,
        Some("float16") => StoredDtype::F16,
        Some("float32") => StoredDtype::F32,
        // Older configurations, and gpt-oss's, do not contain the dtype.
        _ => {
            if quantisation.is_some() {
                StoredDtype::BF16
            } else {
                StoredDtype::F32
            }
        }
    }
}

/// Generator of a tensor's bytes: words of eight bytes, with random and fixed bits.
struct ByteGenerator {
    dtype: StoredDtype,
    noise: u64,
    fixed: u64,
}

impl ByteGenerator {
    /// Floats with magnitudes from 2^exponent to 2^(exponent + 1).
    fn floats(dtype: &StoredDtype, signed: bool, exponent: i32) -> Self {
        let (bits, mantissa, bias) = match dtype {
            StoredDtype::F32 => (32, 23, 127),
            StoredDtype::F16 => (16, 10, 15),
            StoredDtype::F8E4M3 => (8, 3, 7),
            _ => (16, 7, 127),
        };
        let sign = if signed { 1u64 << (bits - 1) } else { 0 };
        // At least the smallest normal number. The largest exponents would be infinite or NaN.
        let exponent = (exponent + bias).clamp(1, 2 * bias) as u64;
        let (noise, fixed) = (sign | ((1 << mantissa) - 1), exponent << mantissa);
        Self { dtype: dtype.clone(), noise: repeated(noise, bits), fixed: repeated(fixed, bits) }
    }

    /// Two 4-bit codes per byte.
    fn codes(dtype: StoredDtype) -> Self {
        Self { dtype, noise: u64::MAX, fixed: 0 }
    }

    /// Eight constant bytes, repeated.
    fn constant(dtype: StoredDtype, word: u64) -> Self {
        Self { dtype, noise: 0, fixed: word }
    }

    /// A power of two, as stored by MXFP4.
    fn power(exponent: i32) -> Self {
        Self { dtype: StoredDtype::U8, noise: 0, fixed: repeated((127 + exponent).clamp(1, 254) as u64, 8) }
    }

    #[inline(always)]
    fn word(&self, key: u64, index: u64) -> [u8; 8] {
        (mix(key.wrapping_add(index)) & self.noise | self.fixed).to_le_bytes()
    }

    /// Writes the tensor's bytes from `start` on.
    fn fill(&self, key: u64, start: u64, into: &mut [u8]) {
        let skip = (start % 8) as usize;
        let (head, body) = into.split_at_mut(((8 - skip) % 8).min(into.len()));
        head.copy_from_slice(&self.word(key, start / 8)[skip..][..head.len()]);
        let first = start.div_ceil(8);
        let (words, tail) = body.as_chunks_mut::<8>();
        vectorize!(words.iter_mut().zip(first..).for_each(|(word, index)| *word = self.word(key, index)));
        tail.copy_from_slice(&self.word(key, first + words.len() as u64)[..tail.len()]);
    }
}

/// A word with `number` repeated in fields of `bits` bits.
fn repeated(number: u64, bits: u32) -> u64 {
    (0..64 / bits).fold(0, |word, i| word | number << (i * bits))
}

/// The exponent for the root mean square `target` of numbers with the root mean square `spread`.
fn exponent(target: f64, spread: f64) -> i32 {
    (target / spread).log2().round() as i32
}

/// Stored tensors of each need.
struct Layout {
    architecture: Architecture,
    plain: StoredDtype,
}

impl Layout {
    /// Name, shape and generator of the tensors of a need: one tensor, or codes and scales.
    fn tensors(&self, layer: usize, need: &Need) -> Vec<(String, Vec<u64>, ByteGenerator)> {
        let Architecture { names, spec, quantisation, .. } = &self.architecture;
        let name = names.of(names.bases[0], layer, need.role, need.expert);
        let stack = need.expert.filter(|_| names.is_stacked(need.role)).map(|_| spec.layers[layer].experts());
        let stacked = |shape: &[usize]| -> Vec<u64> { stack.iter().chain(shape).map(|&n| n as u64).collect() };
        let mut shape = need.shape.clone();
        let scale = scale(need);
        match quantisation {
            Some(Quantisation::Mxfp4) if matches!(need.role, Role::ExpertGateUp | Role::ExpertDown) => {
                let blocks = shape[1] / MXFP4_BLOCK;
                let codes = stacked(&[shape[0], blocks, MXFP4_BLOCK / 2]);
                let power = ByteGenerator::power(exponent(scale, SPREAD_OF_E2M1));
                return vec![
                    (format!("{name}_blocks"), codes, ByteGenerator::codes(StoredDtype::U8)),
                    (format!("{name}_scales"), stacked(&[shape[0], blocks]), power),
                ];
            }
            Some(Quantisation::Fp8Blocks { block }) if is_fp8(need) => {
                let tiles = stacked(&[shape[0].div_ceil(block[0]), shape[1].div_ceil(block[1])]);
                let scales = ByteGenerator::floats(&StoredDtype::F32, false, exponent(scale, SPREAD * SPREAD));
                return vec![
                    (name.clone(), stacked(&shape), ByteGenerator::floats(&StoredDtype::F8E4M3, true, 0)),
                    (format!("{name}_scale_inv"), tiles, scales),
                ];
            }
            // Kimi's checkpoints quantise only experts.
            Some(Quantisation::Int4 { group }) if need.expert.is_some() && stack.is_none() => {
                let scales = ByteGenerator::floats(&StoredDtype::BF16, false, exponent(scale, SPREAD * SPREAD_OF_INT4));
                let sides = ByteGenerator::constant(StoredDtype::I32, shape[0] as u64 | ((shape[1] as u64) << 32));
                return vec![
                    (
                        format!("{name}_packed"),
                        stacked(&[shape[0], shape[1] / 8]),
                        ByteGenerator::codes(StoredDtype::I32),
                    ),
                    (format!("{name}_scale"), stacked(&[shape[0], shape[1] / group]), scales),
                    (format!("{name}_shape"), vec![2], sides),
                ];
            }
            Some(Quantisation::Nvfp4(layout)) if is_fp8(need) && stack.is_none() => {
                let scales = ByteGenerator::floats(&StoredDtype::F8E4M3, false, 0);
                let whole = (scale / (SPREAD * SPREAD_OF_E2M1)) as f32;
                let (codes, number, whole) = match layout {
                    Nvfp4Layout::ModelOpt => (name.clone(), "scale_2", whole),
                    Nvfp4Layout::CompressedTensors => (format!("{name}_packed"), "global_scale", whole.recip()),
                };
                let whole = ByteGenerator::constant(StoredDtype::F32, repeated(whole.to_bits().into(), 32));
                return vec![
                    (codes, stacked(&[shape[0], shape[1] / 2]), ByteGenerator::codes(StoredDtype::U8)),
                    (format!("{name}_scale"), stacked(&[shape[0], shape[1] / NVFP4_BLOCK]), scales),
                    (format!("{name}_{number}"), vec![1], whole),
                ];
            }
            _ => {}
        }
        if names.input_major.contains(&need.role) {
            shape.reverse();
        }
        let made = ByteGenerator::floats(&self.plain, !is_positive(need.role), exponent(scale, SPREAD));
        vec![(name, stacked(&shape), made)]
    }
}

/// Whether DeepSeek's checkpoints quantise this matrix.
fn is_fp8(need: &Need) -> bool {
    need.shape.len() == 2 && !matches!(need.role, Role::Embedding | Role::Head | Role::Router)
}

/// Whether values are positive: gains, and logarithms of decays.
fn is_positive(role: Role) -> bool {
    use Role::{
        BesidePostNorm, DeltaDecay, DeltaNorm, ExpertScale, ExpertsNorm, ExpertsPostNorm, FfnNorm, FfnPostNorm,
        FinalNorm, KNorm, KvANorm, LayerScalar, MambaDecay, MambaNorm, MixerNorm, MixerPostNorm, QANorm, QNorm,
        RouterScale,
    };
    let norms = [MixerNorm, MixerPostNorm, FfnNorm, FfnPostNorm, FinalNorm, QNorm, KNorm];
    let inner = [QANorm, KvANorm, DeltaNorm, DeltaDecay, MambaNorm, MambaDecay, LayerScalar];
    let of_mixtures = [RouterScale, ExpertScale, ExpertsNorm, ExpertsPostNorm, BesidePostNorm];
    norms.contains(&role) || inner.contains(&role) || of_mixtures.contains(&role)
}

/// Root mean square that preserves the scale of a block's input in its output.
fn scale(need: &Need) -> f64 {
    match (need.role, &need.shape[..]) {
        (Role::Embedding, _) => 0.7,
        (Role::Positions, _) => 0.02,
        (role, _) if is_positive(role) => 0.7,
        (_, [_]) => 0.02,
        (_, [.., inputs]) => 1.0 / (*inputs as f64).sqrt(),
        (_, []) => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use serde_json::json;

    use super::*;

    fn llama(dtype: &str) -> SyntheticSource {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64,
            "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5, "vocab_size": 100, "tie_word_embeddings": false, "torch_dtype": dtype,
        });
        SyntheticSource::new(&config, 7).unwrap()
    }

    fn bytes(source: &SyntheticSource, name: &str, range: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        source.read(source.entry(name).unwrap(), range, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn any_range_equals_that_part_of_the_whole() {
        let source = llama("bfloat16");
        let name = "model.embed_tokens.weight";
        let whole = bytes(&source, name, 0..100 * 64 * 2);
        for range in [0..1, 3..5, 7..33, 8..16, 5..12_800, 12_799..12_800, 40..40] {
            assert_eq!(
                bytes(&source, name, range.clone()),
                whole[range.start as usize..range.end as usize],
                "{range:?}"
            );
        }
        assert_ne!(whole, bytes(&source, "lm_head.weight", 0..100 * 64 * 2));
        assert_eq!(whole, bytes(&llama("bfloat16"), name, 0..100 * 64 * 2));
    }

    /// Converts stored bytes to numbers.
    type Widen = fn(&[u8]) -> Vec<f64>;

    /// Mean and root mean square of a matrix.
    fn moments(values: &[f64]) -> (f64, f64) {
        let n = values.len() as f64;
        (values.iter().sum::<f64>() / n, (values.iter().map(|v| v * v).sum::<f64>() / n).sqrt())
    }

    #[test]
    fn values_are_centred_with_fan_in_variance() {
        let name = "model.layers.1.mlp.down_proj.weight";
        let wide: [(&str, Widen); 3] = [
            ("float32", |b| b.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()),
            ("float16", |b| b.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f64()).collect()),
            ("bfloat16", |b| b.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f64()).collect()),
        ];
        for (dtype, values) in wide {
            let source = llama(dtype);
            let len = source.entry(name).unwrap().len;
            let (mean, rms) = moments(&values(&bytes(&source, name, 0..len)));
            let due = 1.0 / 128f64.sqrt();
            assert!(mean.abs() < 0.05 * due, "{dtype}: {mean}");
            assert!((0.7..1.42).contains(&(rms / due)), "{dtype}: {rms} for {due}");
        }
    }

    #[test]
    fn gains_are_positive() {
        let source = llama("bfloat16");
        let gains = bytes(&source, "model.norm.weight", 0..128);
        assert!(gains.as_chunks().0.iter().all(|b| (0.5..1.0).contains(&bf16::from_le_bytes(*b).to_f32())));
    }
}
