use std::collections::{BTreeMap, BTreeSet};

use half::bf16;
use outliers_protocol::{CorpusSpec, FailureKind};

use super::*;
use crate::checkpoint::hub::{Hub, HubOptions};
use crate::checkpoint::source::Checkpoint;
use crate::corpus;
use crate::model::decoder::MaxSequenceLength;

/// OLMoE in plain loops over f32, independent of the worker's blocks.
struct Reference {
    weights: BTreeMap<String, Vec<f32>>,
}

impl Reference {
    fn open(folder: &Path) -> Self {
        let source = Checkpoint::open_folder(folder).unwrap().weights;
        let value = |bytes: &[u8]| bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
        let read = |name: &str| {
            let entry = source.entry(name).unwrap();
            let mut bytes = vec![0; entry.len as usize];
            source.read(entry, 0..entry.len, &mut bytes).unwrap();
            bytes.chunks_exact(2).map(value).collect()
        };
        let weights = source.names().map(|name| (name.to_owned(), read(name))).collect();
        Self { weights }
    }

    fn norm(&self, name: &str, x: &[f32]) -> Vec<f32> {
        let mean = x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32;
        x.iter().zip(&self.weights[name]).map(|(v, gain)| v / (mean + 1e-5).sqrt() * gain).collect()
    }

    fn linear(&self, name: &str, x: &[f32]) -> Vec<f32> {
        self.weights[name].chunks_exact(x.len()).map(|row| dot(row, x)).collect()
    }

    fn attention(&self, layer: usize, inputs: &[Vec<f32>]) -> Vec<Vec<f32>> {
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}.weight");
        let turned = |part: &str, norm: &str| -> Vec<Vec<f32>> {
            let project = |x: &Vec<f32>| self.norm(&name(norm), &self.linear(&name(part), x));
            inputs.iter().enumerate().map(|(at, x)| rope(project(x), at)).collect()
        };
        let (q, k) = (turned("q_proj", "q_norm"), turned("k_proj", "k_norm"));
        let v: Vec<Vec<f32>> = inputs.iter().map(|x| self.linear(&name("v_proj"), x)).collect();
        let width = HIDDEN / HEADS;
        (0..inputs.len())
            .map(|at| {
                let mut mixed = vec![0.0; HIDDEN];
                for head in (0..HIDDEN).step_by(width).map(|start| start..start + width) {
                    let scale = (width as f32).sqrt();
                    let scores = (0..=at).map(|j| dot(&q[at][head.clone()], &k[j][head.clone()]) / scale).collect();
                    for (j, weight) in softmax(scores).into_iter().enumerate() {
                        head.clone().for_each(|i| mixed[i] += weight * v[j][i]);
                    }
                }
                self.linear(&name("o_proj"), &mixed)
            })
            .collect()
    }

    fn experts(&self, layer: usize, x: &[f32]) -> Vec<f32> {
        let name = |part: &str| format!("model.layers.{layer}.mlp.{part}.weight");
        let shares = softmax(self.linear(&name("gate"), x));
        let mut order: Vec<usize> = (0..EXPERTS).collect();
        order.sort_by(|a, b| shares[*b].total_cmp(&shares[*a]));
        let mut out = vec![0.0; HIDDEN];
        for expert in &order[..EXPERTS_PER_TOKEN] {
            let part = |part: &str| name(&format!("experts.{expert}.{part}"));
            let (gate, up) = (self.linear(&part("gate_proj"), x), self.linear(&part("up_proj"), x));
            let inner: Vec<f32> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            let add = self.linear(&part("down_proj"), &inner);
            out.iter_mut().zip(add).for_each(|(o, a)| *o += shares[*expert] * a);
        }
        out
    }

    /// Logits `[token][vocab]`, and the norm outputs `[site][token][feature]` in order of
    /// computation.
    fn run(&self, ids: &[i64]) -> (Vec<Vec<f32>>, Vec<Vec<Vec<f32>>>) {
        let embedding = &self.weights["model.embed_tokens.weight"];
        let row = |id: &i64| embedding[*id as usize * HIDDEN..][..HIDDEN].to_vec();
        let mut hidden: Vec<Vec<f32>> = ids.iter().map(row).collect();
        let mut sites = Vec::new();
        for layer in 0..LAYERS {
            let norm = |part: &str, hidden: &[Vec<f32>]| -> Vec<Vec<f32>> {
                let name = format!("model.layers.{layer}.{part}.weight");
                hidden.iter().map(|x| self.norm(&name, x)).collect()
            };
            sites.push(norm("input_layernorm", &hidden));
            add(&mut hidden, self.attention(layer, &sites[2 * layer]));
            sites.push(norm("post_attention_layernorm", &hidden));
            add(&mut hidden, sites[2 * layer + 1].iter().map(|x| self.experts(layer, x)).collect());
        }
        let head = |x: &Vec<f32>| self.linear("lm_head.weight", &self.norm("model.norm.weight", x));
        (hidden.iter().map(head).collect(), sites)
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn softmax(mut x: Vec<f32>) -> Vec<f32> {
    let max = x.iter().copied().fold(f32::MIN, f32::max);
    x.iter_mut().for_each(|v| *v = (*v - max).exp());
    let sum: f32 = x.iter().sum();
    x.into_iter().map(|v| v / sum).collect()
}

fn rope(mut x: Vec<f32>, position: usize) -> Vec<f32> {
    let width = HIDDEN / HEADS;
    for head in x.chunks_exact_mut(width) {
        for i in 0..width / 2 {
            let angle = position as f32 / 10_000_f32.powf(2.0 * i as f32 / width as f32);
            let (a, b) = (head[i], head[i + width / 2]);
            head[i] = a * angle.cos() - b * angle.sin();
            head[i + width / 2] = b * angle.cos() + a * angle.sin();
        }
    }
    x
}

fn add(hidden: &mut [Vec<f32>], update: Vec<Vec<f32>>) {
    for (x, u) in hidden.iter_mut().zip(update) {
        x.iter_mut().zip(u).for_each(|(x, u)| *x += u);
    }
}

/// Sites and positions at which each feature reaches magnitude 6.
type Found = BTreeMap<usize, (BTreeSet<[usize; 2]>, BTreeSet<usize>)>;

fn outliers(sites: &[Vec<Vec<f32>>]) -> Found {
    let mut found = Found::new();
    for (site, tokens) in sites.iter().enumerate() {
        for (position, x) in tokens.iter().enumerate() {
            for (dim, _) in x.iter().enumerate().filter(|(_, v)| v.abs() >= 6.0) {
                let (at, positions) = found.entry(dim).or_default();
                at.insert([site / 2, site % 2]);
                positions.insert(position);
            }
        }
    }
    found
}

fn demo_ids(folder: &Path, tokens: usize) -> Vec<i64> {
    let spec = CorpusSpec { num_sequences: Some(1), sequence_length: Some(tokens), ..CorpusSpec::default() };
    let hub = Hub::new(HubOptions::new("/nowhere")).unwrap();
    corpus::load(&spec, Some(folder), VOCAB, Some(MaxSequenceLength::Positions(MAX_POSITIONS)), &hub).unwrap().ids
}

const TOKENS: usize = 384;

#[test]
fn planting_preserves_logits_and_makes_the_planned_features() {
    for seed in [0, 7] {
        let dir = tempfile::tempdir().unwrap();
        let (with, without) = (dir.path().join("planted"), dir.path().join("plain"));
        let planted = make(&with, seed).unwrap();
        let nothing = Planted { systematic: Vec::new(), decoys: Vec::new(), ..planted.clone() };
        write_checkpoint(&without, seed, &nothing).unwrap();
        let ids = demo_ids(&with, TOKENS);
        let (logits, sites) = Reference::open(&with).run(&ids);
        let (plain_logits, plain_sites) = Reference::open(&without).run(&ids);
        assert!(logits == plain_logits, "planting changed a logit");
        assert_eq!(outliers(&plain_sites), Found::new());

        let found = outliers(&sites);
        let share = |dim: usize| found[&dim].1.len() as f64 / TOKENS as f64;
        for feature in &planted.systematic {
            let sites: BTreeSet<_> = feature.sites.iter().copied().collect();
            assert_eq!(found[&feature.dim].0, sites, "feature {}", feature.dim);
            assert!(share(feature.dim) > 0.2, "feature {} at {}", feature.dim, share(feature.dim));
        }
        let [few_layers, few_positions] = &planted.decoys[..] else { panic!("two decoys") };
        assert_eq!(found[&few_layers.feature.dim].0, BTreeSet::from([[3, 0], [3, 1]]));
        assert!(share(few_layers.feature.dim) > 0.2);
        let dim = few_positions.feature.dim;
        assert!(share(dim) > 0.0 && share(dim) < 0.045, "decoy {dim} at {}", share(dim));
        assert!(found[&dim].0.len() >= 4);
        assert_eq!(found.len(), planted.systematic.len() + 2);
    }
}

#[test]
fn same_seed_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let hashes: Vec<_> = [("a", 0), ("b", 0), ("c", 1)]
        .map(|(name, seed)| {
            let folder = dir.path().join(name);
            make(&folder, seed).unwrap();
            let mut names: Vec<_> = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names.into_iter().map(|n| (n.clone(), fs::read(folder.join(n)).unwrap())).collect::<Vec<_>>()
        })
        .into();
    assert!(hashes[0] == hashes[1]);
    assert!(hashes[0] != hashes[2]);
    assert_eq!(hashes[0].len(), 9);
}

#[test]
fn token_ids_are_reproducible() {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), 0).unwrap();
    let ids = demo_ids(dir.path(), MAX_POSITIONS);
    assert_eq!(corpus::token_ids_sha256(&ids), "d45bb963607c7d434810aa27e3f65fdc1718c1f69f109f1cdfb89c083be98fce");
}

#[test]
fn planted_features_are_written_beside_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let planted = make(dir.path(), 0).unwrap();
    let text = fs::read_to_string(dir.path().join(PLANTED_FILE)).unwrap();
    assert_eq!(serde_json::from_str::<Planted>(&text).unwrap(), planted);
    // An earlier demo may be overwritten.
    make(dir.path(), 1).unwrap();
}

#[test]
fn foreign_folder_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(CONFIG_FILE), "{}").unwrap();
    assert_eq!(make(dir.path(), 0).unwrap_err().kind(), FailureKind::Job);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}
