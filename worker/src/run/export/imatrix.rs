//! llama.cpp's importance matrix. For every matrix X: the sums of x^2 (`X.in_sum2`) and of x
//! (`X.in_sum`) over its input per column, and the number of rows (`X.counts`).
//!
//! An expert without tokens has sums and a count of 0, as the format requires. `llama-quantize`
//! then treats all its columns as equally important. `outliers.experts_never_hit` lists such
//! experts.

use std::collections::BTreeMap;
use std::path::Path;

use super::gguf::{self, Tensor, Value};
use super::{ENTRY, FinishedPass, InputStatistics, Layer, Matrix, UnroutedExpert, matrices, names};
use crate::error::{Result, WorkerError, printable};
use crate::kernels::input_collectors::{Input, InputKey};
use crate::model::decoder::{DecoderSpec, DeltaNetSpec, LatentSpec, MixerSpec, Role};

/// Maximum characters of the text's description.
const DATASET: usize = 1000;

/// Which columns of an input enter one matrix, and in which order.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Columns {
    /// All, in the checkpoint's order.
    All,
    /// The first columns of one head.
    OfHead {
        /// Values per head.
        width: usize,
    },
    /// All, regrouped: the first heads of all groups, then the second heads.
    Regrouped {
        /// Heads per group.
        heads: usize,
        /// Values per head.
        width: usize,
    },
}

/// One tensor of llama.cpp, or a stack of one per expert or head.
struct Entry {
    name: String,
    layer: usize,
    input: Input,
    /// Each expert has a separate input.
    by_expert: bool,
    columns: usize,
    count: usize,
    taken: Columns,
}

impl Entry {
    fn seen<'a>(&self, layers: &'a BTreeMap<usize, Layer>, at: usize) -> Option<&'a InputStatistics> {
        let place: InputKey = (self.input, self.by_expert.then_some(at));
        layers.get(&self.layer)?.inputs.get(&place).filter(|seen| seen.rows > 0)
    }

    /// Shape `[count, columns]`; zeros where no token entered.
    fn sums(&self, layers: &BTreeMap<usize, Layer>, of: fn(&InputStatistics) -> &[f32]) -> Vec<f32> {
        let mut all = Vec::with_capacity(self.count * self.columns);
        for at in 0..self.count {
            let Some(seen) = self.seen(layers, at).map(of) else {
                all.resize(all.len() + self.columns, 0.0);
                continue;
            };
            match self.taken {
                Columns::All => all.extend(seen),
                Columns::OfHead { width } => all.extend(&seen[at * width..][..self.columns]),
                Columns::Regrouped { heads, width } => {
                    let group =
                        |head: usize| seen.chunks(heads * width).flat_map(move |group| &group[head * width..][..width]);
                    all.extend((0..heads).flat_map(group));
                }
            }
        }
        all
    }

    /// Shape `[count]`.
    fn counts(&self, layers: &BTreeMap<usize, Layer>) -> Vec<f32> {
        (0..self.count).map(|at| self.seen(layers, at).map_or(0.0, |seen| seen.rows as f32)).collect()
    }
}

/// The tensors that llama.cpp's conversion makes of the matrices of all layers.
fn entries(family: &str, spec: &DecoderSpec) -> Vec<Entry> {
    let mut all = Vec::new();
    for matrix in matrices(spec) {
        let Matrix { layer, role, columns, experts } = matrix;
        let mixer = &spec.layers[layer].mixer;
        let taken = match mixer {
            MixerSpec::DeltaNet(DeltaNetSpec { key_heads, value_heads, value_dim, .. })
                if role == Role::DeltaOutput && names::reorders_value_heads(family) =>
            {
                Columns::Regrouped { heads: value_heads / key_heads, width: *value_dim }
            }
            _ => Columns::All,
        };
        let entry = |name: &str, input, columns, count, taken| Entry {
            name: format!("blk.{layer}.{name}.weight"),
            layer,
            input,
            by_expert: experts.is_some(),
            columns,
            count,
            taken,
        };
        let plain = |name: &&str| entry(name, Input::of(role), columns, experts.unwrap_or(1), taken);
        all.extend(names::tensors(family, role).iter().map(plain));
        if let (MixerSpec::Latent(LatentSpec { heads, nope_dim, rope_dim, .. }), Role::KvBProj) = (mixer, role) {
            let of_head = Columns::OfHead { width: nope_dim + rope_dim };
            // Keys are not computed: the query is multiplied by this matrix, head by head.
            all.push(entry("attn_k_b", Input::Queries, *nope_dim, *heads, of_head));
            all.push(entry("attn_v_b", Input::of(role), columns, *heads, Columns::All));
        }
    }
    all
}

/// Maximum bytes of the tensors of a file, for any family.
pub(super) fn bytes(spec: &DecoderSpec) -> u64 {
    let of = |entry: &Entry| (4 * entry.count * (2 * entry.columns + 1)) as u64 + 3 * ENTRY;
    // The empty family has the most names per matrix.
    entries("", spec).iter().map(of).sum()
}

/// Writes the importance matrix to `path`.
///
/// # Errors
/// Unsupported: llama.cpp does not read the family. Storage.
pub(super) fn write(
    path: &Path,
    layers: &BTreeMap<usize, Layer>,
    pass: &FinishedPass<'_>,
    never_hit: &[UnroutedExpert],
) -> Result<()> {
    let architecture = pass.model.family.architecture;
    let family = names::of(architecture)
        .ok_or_else(|| WorkerError::unsupported(format!("llama.cpp does not read {architecture}")))?;
    let mut entries = entries(family, &pass.model.spec);
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let dataset = printable(&pass.tokens.provenance.source, DATASET);
    let mut metadata = vec![
        ("general.type", Value::Text("imatrix".to_owned())),
        ("imatrix.datasets", Value::Texts(vec![dataset])),
        ("imatrix.chunk_count", Value::Number(pass.tokens.sequences as u32)),
        ("imatrix.chunk_size", Value::Number(pass.tokens.tokens as u32)),
        ("outliers.version", Value::Text(env!("CARGO_PKG_VERSION").to_owned())),
        ("outliers.model", Value::Text(pass.results.model.clone())),
        ("outliers.llama_architecture", Value::Text(family.to_owned())),
    ];
    if !never_hit.is_empty() {
        let experts = never_hit.iter().map(|at| format!("blk.{} expert {}", at.layer, at.expert)).collect();
        metadata.push(("outliers.experts_never_hit", Value::Texts(experts)));
    }
    let parts = |entry: &Entry| {
        let tensor = |part: &str, shape| Tensor { name: format!("{}.{part}", entry.name), shape };
        let sums = [entry.columns, entry.count];
        [tensor("counts", [1, entry.count]), tensor("in_sum", sums), tensor("in_sum2", sums)]
    };
    let tensors: Vec<Tensor> = entries.iter().flat_map(parts).collect();
    gguf::write(path, &metadata, &tensors, |index| {
        let entry = &entries[index / 3];
        match index % 3 {
            0 => entry.counts(layers),
            1 => entry.sums(layers, |seen| seen.values.as_slice()),
            _ => entry.sums(layers, |seen| seen.squares.as_slice()),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::model::arch;

    fn spec(fixture: &str) -> DecoderSpec {
        let path = format!("{}/../tests/golden/{fixture}/model/config.json", env!("CARGO_MANIFEST_DIR"));
        arch::read(&serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()).unwrap().spec
    }

    fn named<'a>(entries: &'a [Entry], name: &str) -> &'a Entry {
        entries.iter().find(|entry| entry.name == name).unwrap_or_else(|| panic!("no {name}"))
    }

    /// Layer 0, five rows at one place.
    fn layers(place: InputKey, squares: Vec<f32>) -> BTreeMap<usize, Layer> {
        let seen = InputStatistics { rows: 5, squares, ..InputStatistics::default() };
        BTreeMap::from([(0, Layer { inputs: BTreeMap::from([(place, seen)]), ..Layer::default() })])
    }

    fn squares(seen: &InputStatistics) -> &[f32] {
        &seen.squares
    }

    #[test]
    fn every_matrix_has_a_unique_imatrix_name() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden");
        let mut families = BTreeSet::new();
        for entry in std::fs::read_dir(golden).unwrap() {
            let config = entry.unwrap().path().join("model/config.json");
            let Ok(config) = std::fs::read(config) else { continue };
            let architecture = arch::read(&serde_json::from_slice(&config).unwrap()).unwrap();
            let Some(family) = names::of(architecture.family.architecture) else { continue };
            for Matrix { role, .. } in matrices(&architecture.spec) {
                assert!(!names::tensors(family, role).is_empty(), "{family} {role:?}");
            }
            let entries = entries(family, &architecture.spec);
            let names: BTreeSet<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
            assert_eq!(names.len(), entries.len(), "{family}");
            families.insert(family);
        }
        assert!(families.len() > 20, "{families:?}");
    }

    #[test]
    fn experts_have_separate_entries_and_unused_ones_count_zero() {
        let entries = entries("olmoe", &spec("olmoe-bf16"));
        let (gate, up) = (named(&entries, "blk.0.ffn_gate_exps.weight"), named(&entries, "blk.0.ffn_up_exps.weight"));
        assert_eq!((gate.count, gate.input), (6, up.input));
        let seen = layers((gate.input, Some(2)), vec![2.0; gate.columns]);
        let sums = gate.sums(&seen, squares);
        assert_eq!(sums.chunks(gate.columns).map(|of| of[0]).collect::<Vec<_>>(), [0.0, 0.0, 2.0, 0.0, 0.0, 0.0]);
        assert_eq!(gate.counts(&seen), [0.0, 0.0, 5.0, 0.0, 0.0, 0.0]);
        assert_eq!(named(&entries, "blk.2.attn_q.weight").count, 1);
    }

    #[test]
    fn latent_attention_keys_and_values_have_separate_entries() {
        let spec = spec("deepseek-v2-lite");
        let MixerSpec::Latent(latent) = &spec.layers[0].mixer else { panic!() };
        let entries = entries("deepseek2", &spec);
        let (key, value) = (named(&entries, "blk.0.attn_k_b.weight"), named(&entries, "blk.0.attn_v_b.weight"));
        let width = latent.nope_dim + latent.rope_dim;
        assert_eq!(([key.columns, key.count], value.columns), ([latent.nope_dim, latent.heads], latent.kv_rank));
        let queries: Vec<f32> = (0..latent.heads * width).map(|at| at as f32).collect();
        let of_keys = key.sums(&layers((Input::Queries, None), queries), squares);
        assert_eq!(of_keys[latent.nope_dim], width as f32, "the second head's first");
        let bottleneck: Vec<f32> = (0..latent.kv_rank).map(|at| at as f32).collect();
        let seen = layers((Input::of(Role::KvBProj), None), bottleneck.clone());
        assert_eq!(value.sums(&seen, squares), bottleneck.repeat(latent.heads), "all heads read the same");
        assert_eq!(named(&entries, "blk.0.attn_kv_b.weight").sums(&seen, squares), bottleneck);
    }

    #[test]
    fn delta_net_value_heads_have_llama_cpp_order() {
        let entry = Entry {
            name: String::new(),
            layer: 0,
            input: Input::of(Role::DeltaOutput),
            by_expert: false,
            columns: 8,
            count: 1,
            taken: Columns::Regrouped { heads: 2, width: 2 },
        };
        let seen = layers((entry.input, None), (0..8).map(|at| at as f32).collect());
        assert_eq!(entry.sums(&seen, squares), [0.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0, 7.0]);
        let spec = spec("qwen3-5-moe");
        let regroups = |family| entries(family, &spec).iter().any(|entry| entry.taken != Columns::All);
        assert!(regroups("qwen35moe") && !regroups("qwen3next"));
    }
}
