//! The demo's tensors: noise from a counter, in the published names and layout.

use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;
use serde_json::{Value, json};

use super::plant::{Planted, RARE_DIM};
use super::{EXPERTS, HIDDEN, INTERMEDIATE, LAYERS, VOCAB};
use crate::checkpoint::safetensors::{StoredDtype, TensorSpec, Writer};
use crate::error::Result;
use crate::noise::{mix, name_hash};

/// Standard deviations. The embedding is larger than what the layers add, so that all hidden
/// states keep its short tails and no value comes near the threshold by itself.
const EMBEDDING_STD: f32 = 0.5;
const MATRIX_STD: f32 = 0.05;
const ROUTER_STD: f32 = 0.1;
const GAIN_STD: f32 = 0.03;

/// Kind of a tensor, which decides how planting changes it.
enum TensorKind {
    Embedding,
    /// A norm's gain. Planting multiplies it.
    Gain(Option<[usize; 2]>),
    /// A matrix `[out, in]`. Planting divides the columns of the norm's planted features.
    Matrix {
        std: f32,
        reads: Option<[usize; 2]>,
    },
}

/// One tensor of the checkpoint.
struct Plan {
    name: String,
    shape: [usize; 2],
    role: TensorKind,
}

impl Plan {
    fn gain(name: String, site: Option<[usize; 2]>) -> Self {
        // One row, since `spec` drops the first dimension.
        Self { name, shape: [1, HIDDEN], role: TensorKind::Gain(site) }
    }

    fn matrix(name: String, shape: [usize; 2], reads: Option<[usize; 2]>) -> Self {
        Self { name, shape, role: TensorKind::Matrix { std: MATRIX_STD, reads } }
    }

    fn spec(&self) -> TensorSpec {
        let shape = self.shape.map(|dim| dim as u64);
        let shape = if matches!(self.role, TensorKind::Gain(_)) { &shape[1..] } else { &shape[..] };
        TensorSpec::new(&self.name, StoredDtype::BF16, shape)
    }

    /// The stored values, little-endian.
    fn bytes(&self, seed: u64, planted: &Planted) -> Vec<u8> {
        let key = mix(seed) ^ name_hash(&self.name);
        let [rows, columns] = self.shape;
        let mut values: Vec<f32> = (0..rows * columns).map(|i| self.base(key, i)).collect();
        if let TensorKind::Gain(Some(site)) = self.role {
            planted.at(site).for_each(|(dim, factor)| values[dim] *= factor);
        }
        if let TensorKind::Matrix { reads: Some(site), .. } = self.role {
            for (dim, factor) in planted.at(site) {
                values.iter_mut().skip(dim).step_by(columns).for_each(|value| *value /= factor);
            }
        }
        values.into_iter().flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect()
    }

    /// The value before planting, rounded to bf16, so that planting scales the stored number.
    fn base(&self, key: u64, index: usize) -> f32 {
        let noise = gaussian(key, index as u64);
        let value = match self.role {
            TensorKind::Gain(_) => 1.0 + GAIN_STD * noise,
            TensorKind::Matrix { std, .. } => std * noise,
            TensorKind::Embedding if index % HIDDEN == RARE_DIM => EMBEDDING_STD * rare(index / HIDDEN, noise),
            TensorKind::Embedding => EMBEDDING_STD * noise,
        };
        bf16::from_f32(value).to_f32()
    }
}

/// The feature at few positions: two standard deviations for some of the rarer tokens (later
/// entries of a trained vocabulary are rarer), almost 0 for all others.
fn rare(token: usize, noise: f32) -> f32 {
    let is_rare = token >= VOCAB / 2 && token % 8 == 5;
    if is_rare { 2.0_f32.copysign(noise) } else { noise / 8.0 }
}

/// Approximately normal with variance 1, at most 3.47: the sum of four uniform 16-bit numbers.
/// Logarithms and cosines would be closer to normal, but differ between mathematics libraries in
/// the last bit.
fn gaussian(key: u64, index: u64) -> f32 {
    const MEAN: i32 = 2 * 65_535;
    const STD: f32 = 37_837.2;
    let bits = mix(key ^ mix(index));
    let sum: i32 = [0, 16, 32, 48].into_iter().map(|shift| ((bits >> shift) & 0xFFFF) as i32).sum();
    (sum - MEAN) as f32 / STD
}

/// All tensors, in the order of the layers.
fn tensors() -> Vec<Plan> {
    let embedding =
        Plan { name: "model.embed_tokens.weight".to_owned(), shape: [VOCAB, HIDDEN], role: TensorKind::Embedding };
    let mut all = vec![embedding];
    all.extend((0..LAYERS).flat_map(layer));
    all.push(Plan::gain("model.norm.weight".to_owned(), None));
    all.push(Plan::matrix("lm_head.weight".to_owned(), [VOCAB, HIDDEN], None));
    all
}

fn layer(layer: usize) -> Vec<Plan> {
    let (attention, experts) = (Some([layer, 0]), Some([layer, 1]));
    let name = |rest: &str| format!("model.layers.{layer}.{rest}.weight");
    let square = |rest: &str, reads| Plan::matrix(name(rest), [HIDDEN, HIDDEN], reads);
    let mut plans = vec![
        Plan::gain(name("input_layernorm"), attention),
        square("self_attn.q_proj", attention),
        square("self_attn.k_proj", attention),
        square("self_attn.v_proj", attention),
        square("self_attn.o_proj", None),
        Plan::gain(name("self_attn.q_norm"), None),
        Plan::gain(name("self_attn.k_norm"), None),
        Plan::gain(name("post_attention_layernorm"), experts),
        Plan {
            name: name("mlp.gate"),
            shape: [EXPERTS, HIDDEN],
            role: TensorKind::Matrix { std: ROUTER_STD, reads: experts },
        },
    ];
    for expert in 0..EXPERTS {
        let name = |part: &str| name(&format!("mlp.experts.{expert}.{part}"));
        plans.push(Plan::matrix(name("gate_proj"), [INTERMEDIATE, HIDDEN], experts));
        plans.push(Plan::matrix(name("up_proj"), [INTERMEDIATE, HIDDEN], experts));
        plans.push(Plan::matrix(name("down_proj"), [HIDDEN, INTERMEDIATE], None));
    }
    plans
}

/// Writes the two shards and returns their index.
pub(super) fn write(folder: &Path, seed: u64, planted: &Planted) -> Result<Value> {
    let all = tensors();
    let middle = all.len() / 2;
    let mut weight_map = BTreeMap::new();
    let mut total = 0;
    for (shard, plans) in [&all[..middle], &all[middle..]].into_iter().enumerate() {
        let file = format!("model-{:05}-of-00002.safetensors", shard + 1);
        total += write_shard(&folder.join(&file), plans, seed, planted)?;
        weight_map.extend(plans.iter().map(|plan| (plan.name.clone(), file.clone())));
    }
    Ok(json!({"metadata": {"total_size": total}, "weight_map": weight_map}))
}

/// Writes a shard. Returns the bytes of its tensors.
fn write_shard(path: &Path, plans: &[Plan], seed: u64, planted: &Planted) -> Result<usize> {
    let specs: Vec<TensorSpec> = plans.iter().map(Plan::spec).collect();
    let writer = Writer::create(path, &specs, &BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?;
    let mut total = 0;
    for plan in plans {
        let bytes = plan.bytes(seed, planted);
        writer.write(&plan.name, 0, &bytes)?;
        total += bytes.len();
    }
    writer.finish()?;
    Ok(total)
}
