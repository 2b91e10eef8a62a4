//! Output files of a run. Each is written to a temporary name, synced and renamed; the manifest
//! comes last.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Tensor};
use outliers_protocol::{FileEntry, Manifest, Outcome, Point, SCHEMA, files};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::blocks::ffn::Choices;
use crate::checkpoint::safetensors::{StoredDtype, TensorSpec, Writer};
use crate::corpus::Tokens;
use crate::error::{IoContext, Result, WorkerError};
use crate::files::{hex, remove_if_there, write_atomic};
use crate::model::decoder::{DecoderSpec, FfnSpec};
use crate::stats::mixture::{ExpertLoad, ExpertPeaks, RouterStats};
use crate::stats::top::TopValue;
use crate::stats::{Column, LayerObserver, Observer, OutlierStats, Scope, Site, Study, with_f32};

/// A run's output folder.
pub struct OutputFolder {
    path: PathBuf,
}

impl OutputFolder {
    /// Creates the folder and removes the manifest of an earlier run. Without a manifest no file
    /// of the folder is complete.
    ///
    /// # Errors
    /// Storage: it cannot be made or written.
    pub fn create(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).at("create", path)?;
        for name in [files::MANIFEST, files::RESULTS, files::METADATA, files::STATISTICS, files::PROGRESS] {
            remove_if_there(&path.join(name))?;
        }
        Ok(Self { path: path.to_owned() })
    }

    /// Path of a file in the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes a JSON document by renaming, so that a reader never sees a part of it.
    ///
    /// # Errors
    /// Storage.
    pub fn write_json(&self, name: &str, value: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(value)
            .map_err(|e| WorkerError::internal(format!("{name} cannot be written as JSON: {e}")))?;
        text.push(b'\n');
        write_atomic(&self.file(name), &text)
    }

    /// Hashes the named files and writes the manifest.
    ///
    /// # Errors
    /// Storage: a named file is missing, or the disk is full.
    pub fn finish(&self, outcome: Outcome, names: &[&str]) -> Result<()> {
        let files = names.iter().map(|name| self.entry(name)).collect::<Result<_>>()?;
        self.write_json(files::MANIFEST, &Manifest { schema: SCHEMA, outcome, files })
    }

    fn entry(&self, name: &str) -> Result<FileEntry> {
        let path = self.file(name);
        let (sha256, bytes) = hash(&path).at("read", &path)?;
        Ok(FileEntry { name: name.to_owned(), bytes, sha256 })
    }
}

fn hash(path: &Path) -> std::io::Result<(String, u64)> {
    let (mut file, mut hasher, mut bytes) = (File::open(path)?, Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((hex(&hasher.finalize()), bytes)),
            n => {
                hasher.update(&buffer[..n]);
                bytes += n as u64;
            }
        }
    }
}

// -------------------------------------------------------------------------- statistics.safetensors

/// Writes the counts behind the results, so that thresholds on layers and positions can be changed
/// without a new run, and data too long for `results.json`. P = tokens at position 0 of their
/// sequence.
///
/// | tensor | shape | |
/// |---|---|---|
/// | `count`, `positive`, `max`, `min`, `sum`, `sum2`, `sum3`, `sum4` | `[sites, hidden]` | per norm output and feature |
/// | `gain` | `[sites, hidden]` | what the norm multiplies by |
/// | `sequence_positions`, `sequence_sites`, `sequence_layers` | `[sequences, hidden]` | per sequence and feature |
/// | `router.{i}.tokens`, `.tokens_at_position_0` | `[experts]` | tokens sent to each expert of layer i; those in P |
/// | `router.{i}.gate_mass`, `.gate_mass_at_position_0` | `[experts]` | sum of their gate weights; of those in P |
/// | `expert.{i}.peak`, `.peak_token`, `.peak_dim` | `[experts]` | value of largest magnitude at each expert's output, and where: token counted through all sequences; 0, -1, -1 without a token. Only if studied |
///
/// # Errors
/// Storage.
pub fn write_statistics(path: &Path, study: &Study, threshold: f32) -> Result<()> {
    let stats = study.outliers();
    let site_names: Vec<String> =
        stats.sites().iter().map(|s| format!("{}.{}", s.layer, site_index(s.point))).collect();
    let metadata = BTreeMap::from([
        ("schema".to_owned(), SCHEMA.to_string()),
        ("threshold".to_owned(), threshold.to_string()),
        ("tokens_per_sequence".to_owned(), stats.tokens().to_string()),
        ("sites".to_owned(), site_names.join(",")),
    ]);
    let experts = expert_tensors(study);
    let specs: Vec<TensorSpec> =
        feature_specs(stats).into_iter().chain(experts.iter().map(|(spec, _)| spec.clone())).collect();
    let writer = Writer::create(path, &specs, &metadata)?;
    write_features(&writer, study)?;
    for (spec, bytes) in &experts {
        writer.write(&spec.name, 0, bytes)?;
    }
    writer.finish()
}

fn feature_specs(stats: &OutlierStats) -> Vec<TensorSpec> {
    let (sites, sequences, hidden) = (stats.sites().len() as u64, stats.sequences() as u64, stats.hidden() as u64);
    let integers = ["count", "positive"].map(|n| (n, sites, StoredDtype::I64));
    let values = ["max", "min", "gain"].map(|n| (n, sites, StoredDtype::F32));
    let sums = ["sum", "sum2", "sum3", "sum4"].map(|n| (n, sites, StoredDtype::F64));
    let spread = ["sequence_positions", "sequence_sites", "sequence_layers"].map(|n| (n, sequences, StoredDtype::I64));
    let all = integers.into_iter().chain(values).chain(sums).chain(spread);
    all.map(|(name, rows, dtype)| TensorSpec::new(name, dtype, &[rows, hidden])).collect()
}

fn write_features(writer: &Writer, study: &Study) -> Result<()> {
    let stats = study.outliers();
    for (index, site) in stats.sites().iter().enumerate() {
        let row = |name: &str, bytes: &dyn Fn(&Column) -> Vec<u8>| {
            let all: Vec<u8> = (0..stats.hidden()).flat_map(|dim| bytes(stats.column(index, dim))).collect();
            writer.write_rows(name, index as u64, &all)
        };
        row("count", &|c| (c.count as i64).to_le_bytes().to_vec())?;
        row("positive", &|c| (c.positive as i64).to_le_bytes().to_vec())?;
        row("max", &|c| c.max.to_le_bytes().to_vec())?;
        row("min", &|c| c.min.to_le_bytes().to_vec())?;
        row("sum", &|c| c.sum.to_le_bytes().to_vec())?;
        row("sum2", &|c| c.sum2.to_le_bytes().to_vec())?;
        row("sum3", &|c| c.sum3.to_le_bytes().to_vec())?;
        row("sum4", &|c| c.sum4.to_le_bytes().to_vec())?;
        let gain = study.gain_of(*site).ok_or_else(|| WorkerError::internal(format!("no gain of {site:?}")))?;
        writer.write_rows("gain", index as u64, bytemuck::cast_slice(gain))?;
    }
    for sequence in 0..stats.sequences() {
        let row = |name: &str, of: &dyn Fn(usize) -> u64| {
            let all: Vec<u8> = (0..stats.hidden()).flat_map(|dim| (of(dim) as i64).to_le_bytes()).collect();
            writer.write_rows(name, sequence as u64, &all)
        };
        row("sequence_positions", &|dim| stats.positions_in(sequence, dim))?;
        row("sequence_sites", &|dim| stats.spread_in(sequence, dim).1 as u64)?;
        row("sequence_layers", &|dim| stats.spread_in(sequence, dim).0 as u64)?;
    }
    Ok(())
}

/// Per-expert tensors with their bytes.
fn expert_tensors(study: &Study) -> Vec<(TensorSpec, Vec<u8>)> {
    let mut tensors = Vec::new();
    let mut add = |name: String, dtype, experts: usize, bytes: Vec<u8>| {
        tensors.push((TensorSpec::new(name, dtype, &[experts as u64]), bytes));
    };
    for (layer, RouterStats { loads, .. }) in study.routers() {
        let integers = |of: fn(&ExpertLoad) -> u64| loads.iter().flat_map(|l| (of(l) as i64).to_le_bytes()).collect();
        let sums = |of: fn(&ExpertLoad) -> f64| loads.iter().flat_map(|l| of(l).to_le_bytes()).collect();
        let name = |what: &str| format!("router.{layer}.{what}");
        let n = loads.len();
        add(name("tokens"), StoredDtype::I64, n, integers(|l| l.tokens));
        add(name("tokens_at_position_0"), StoredDtype::I64, n, integers(|l| l.tokens_at_position_0));
        add(name("gate_mass"), StoredDtype::F64, n, sums(ExpertLoad::gate_mass));
        add(name("gate_mass_at_position_0"), StoredDtype::F64, n, sums(ExpertLoad::gate_mass_at_position_0));
    }
    for (layer, ExpertPeaks { peaks }) in study.expert_peaks() {
        let place = |of: fn(&TopValue) -> usize| {
            peaks.iter().flat_map(|p| p.as_ref().map_or(-1, |found| of(found) as i64).to_le_bytes()).collect()
        };
        let name = |what: &str| format!("expert.{layer}.{what}");
        let n = peaks.len();
        let values = peaks.iter().flat_map(|p| p.map_or(0.0, |found| found.value).to_le_bytes()).collect();
        add(name("peak"), StoredDtype::F32, n, values);
        add(name("peak_token"), StoredDtype::I64, n, place(|found| found.token));
        add(name("peak_dim"), StoredDtype::I64, n, place(|found| found.dim));
    }
    tensors
}

/// Index of a norm output within its layer.
fn site_index(point: Point) -> usize {
    usize::from(matches!(point, Point::BeforeMlp | Point::AfterMlp))
}

// ------------------------------------------------------------------------------------- activations

/// Every studied activation, router choice, final norm and logit of a run, under the names of the
/// reference's golden files: `layer.{i}.site.{j}` f32 `[S, N, H]` (j = 0 before attention, 1
/// before the MLP), if studied `debug.{i}.attn_out`, `.mlp_out` and `.block_out` f32 `[S, N, H]`
/// (what attention and MLP add to the residual stream, and that stream after the layer),
/// `router.{i}.indices` i64 and `.weights` f32 `[S * N, k]`, `final_norm` `[S, N, H]`, `logits`
/// `[S, N, V]`, `nll` `[S, N - 1]`, `input_ids` i64 `[S, N]`.
#[derive(Clone)]
pub struct ActivationDump {
    writer: Arc<Writer>,
    others: Vec<Site>,
    hidden: usize,
    vocab: usize,
}

impl ActivationDump {
    /// Creates the file for all sites in scope except single experts' outputs. `with_head` adds
    /// final norm, logits and nll.
    ///
    /// # Errors
    /// Storage: no room, or the file cannot be made.
    pub fn create(path: &Path, spec: &DecoderSpec, scope: &Scope, tokens: &Tokens, with_head: bool) -> Result<Self> {
        let (s, n) = (tokens.sequences as u64, tokens.tokens as u64);
        let (h, v) = (spec.hidden as u64, spec.vocab as u64);
        let f32 = |name: String, shape: &[u64]| TensorSpec::new(name, StoredDtype::F32, shape);
        let mut specs = vec![TensorSpec::new("input_ids", StoredDtype::I64, &[s, n])];
        let others: Vec<Site> = scope.others.iter().filter(|s| s.point != Point::ExpertOut).copied().collect();
        specs.extend(scope.norms.iter().chain(&others).map(|site| f32(site_name(*site), &[s, n, h])));
        for (i, layer) in spec.layers.iter().enumerate() {
            if let FfnSpec::Moe(moe) = &layer.ffn {
                let shape = [s * n, moe.top_k as u64];
                specs.push(TensorSpec::new(format!("router.{i}.indices"), StoredDtype::I64, &shape));
                specs.push(f32(format!("router.{i}.weights"), &shape));
            }
        }
        if with_head {
            if spec.final_norm.is_some() {
                specs.push(f32("final_norm".to_owned(), &[s, n, h]));
            }
            specs.push(f32("logits".to_owned(), &[s, n, v]));
            specs.push(f32("nll".to_owned(), &[s, n - 1]));
        }
        let writer = Writer::create(path, &specs, &BTreeMap::new())?;
        let ids: Vec<u8> = tokens.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        writer.write("input_ids", 0, &ids)?;
        Ok(Self { writer: Arc::new(writer), others, hidden: spec.hidden, vocab: spec.vocab })
    }

    /// Writes the negative log-likelihoods, if there are any, and renames the file into place.
    ///
    /// # Errors
    /// Storage.
    pub fn finish(self, nll: Option<&[f32]>) -> Result<()> {
        if let Some(nll) = nll {
            self.writer.write("nll", 0, bytemuck::cast_slice(nll))?;
        }
        let writer = Arc::into_inner(self.writer);
        writer.ok_or_else(|| WorkerError::internal("activations are still being written"))?.finish()
    }

    fn write_hidden(&self, name: &str, first_token: usize, x: &Tensor) -> Result<()> {
        let offset = (first_token * self.hidden * DType::F32.size_in_bytes()) as u64;
        with_f32(x, |values| self.writer.write(name, offset, bytemuck::cast_slice(values)))
    }
}

fn site_name(Site { layer, point }: Site) -> String {
    match point {
        Point::AttentionOut => format!("debug.{layer}.attn_out"),
        Point::MlpOut => format!("debug.{layer}.mlp_out"),
        Point::ExpertOut => format!("debug.{layer}.expert_out"),
        Point::Residual => format!("debug.{layer}.block_out"),
        norm => format!("layer.{layer}.site.{}", site_index(norm)),
    }
}

impl LayerObserver for ActivationDump {
    fn wants(&self, site: Site) -> bool {
        site.point.is_norm_output() || self.others.contains(&site)
    }

    fn observe(&mut self, site: Site, first_token: usize, x: &Tensor) -> Result<()> {
        self.write_hidden(&site_name(site), first_token, x)
    }

    fn routing(&mut self, layer: usize, first_token: usize, choices: &Choices) -> Result<()> {
        let routing = choices.on_host()?;
        let first = (first_token * routing.top_k) as u64;
        let indices: Vec<u8> = routing.experts.iter().flat_map(|e| i64::from(*e).to_le_bytes()).collect();
        self.writer.write(&format!("router.{layer}.indices"), first * 8, &indices)?;
        self.writer.write(&format!("router.{layer}.weights"), first * 4, bytemuck::cast_slice(&routing.weights))
    }
}

/// Every value has a fixed offset in the file, so any thread may write it.
impl Observer for ActivationDump {
    type Layer = Self;

    fn layer(&self, _layer: usize) -> Self {
        self.clone()
    }

    fn join(&mut self, _seen: Self) {}

    fn final_norm(&mut self, first_token: usize, x: &Tensor) -> Result<()> {
        self.write_hidden("final_norm", first_token, x)
    }

    fn logits(&mut self, first_token: usize, first_id: usize, x: &Tensor) -> Result<()> {
        let block = x.dim(1)?;
        with_f32(x, |values| {
            for (i, row) in values.chunks_exact(block).enumerate() {
                let offset = ((first_token + i) * self.vocab + first_id) * DType::F32.size_in_bytes();
                self.writer.write("logits", offset as u64, bytemuck::cast_slice(row))?;
            }
            Ok(())
        })
    }
}
