//! Files for other programs: llama.cpp's importance matrix (`imatrix`), activation scales
//! (`act_scales`) and the saliency of experts (`reap`).
//!
//! [`Exports`] sums over the inputs of every matrix of the layers, which [`InputCollectors`]
//! observe. Matrices outside the layers (embedding, head) are not included.

mod act_scales;
mod gguf;
mod imatrix;
mod names;
mod reap;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use outliers_protocol::{Export, FileBytes, JobSpec, Results, files};
use serde::{Deserialize, Serialize};

use crate::blocks::ffn::{Choices, ExpertRows};
use crate::checkpoint::Model;
use crate::corpus::Tokens;
use crate::error::{Result, WorkerError, listed};
use crate::kernels::input_collector::{InputSums, row_norms};
use crate::kernels::input_collectors::{Input, InputCollectors, InputKey};
use crate::model::decoder::{DecoderSpec, Need, Role};
use crate::stats::Study;

/// Sums over an input of matrices; empty where no export needs them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct InputStatistics {
    rows: u64,
    /// Sum of x^2 per column.
    squares: Vec<f32>,
    /// Sum of x per column.
    values: Vec<f32>,
    /// Largest |x| per column.
    largest: Vec<f32>,
}

impl InputStatistics {
    fn of(sums: InputSums, asked: &BTreeSet<Export>) -> Self {
        let (summed, scaled) = (asked.contains(&Export::Imatrix), asked.contains(&Export::ActScales));
        let narrow = |sums: Vec<f64>| sums.into_iter().filter(|_| summed).map(|sum| sum as f32).collect();
        Self {
            rows: sums.rows,
            squares: narrow(sums.squares),
            values: narrow(sums.values),
            largest: if scaled { sums.largest } else { Vec::new() },
        }
    }

    fn is_finite(&self) -> bool {
        self.squares.iter().chain(&self.values).chain(&self.largest).all(|value| value.is_finite())
    }
}

/// Sums over the tokens routed to an expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Saliency {
    tokens: u64,
    /// Sum of gate weight x norm of the output.
    saliency: f64,
    /// Sum of the gate weight.
    gate: f64,
    /// Sum of the norm of the output.
    norm: f64,
}

/// Sums of one layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Layer {
    inputs: BTreeMap<InputKey, InputStatistics>,
    /// Saliency by expert index.
    experts: BTreeMap<usize, Saliency>,
}

/// Sums for the exports of a job, of the whole pass or of one layer.
#[derive(Debug, Default)]
pub struct Exports {
    asked: BTreeSet<Export>,
    layers: BTreeMap<usize, Layer>,
    /// Index of the layer that is being observed.
    layer: usize,
    collectors: InputCollectors,
    /// Gate weights multiply the experts' inputs.
    scales_input: bool,
}

impl Exports {
    /// `None` if the job has no exports.
    pub fn new(job: &JobSpec) -> Option<Self> {
        (!job.export.is_empty()).then(|| Self { asked: job.export.clone(), ..Self::default() })
    }

    /// Empty sums for one layer.
    #[must_use]
    pub fn layer(&self, layer: usize) -> Self {
        Self { asked: self.asked.clone(), layer, ..Self::default() }
    }

    /// Observers of the inputs of the layer's matrices.
    pub fn collectors(&self) -> Option<InputCollectors> {
        self.asked.iter().any(|export| *export != Export::Reap).then(|| self.collectors.clone())
    }

    /// Records a mixture's choices, before its experts' outputs.
    pub fn routing(&mut self, choices: &Choices) {
        self.scales_input = choices.scales_input();
    }

    /// Records an expert's output rows, which follow those recorded before.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn expert(&mut self, expert: usize, rows: &ExpertRows) -> Result<()> {
        if !self.asked.contains(&Export::Reap) {
            return Ok(());
        }
        let norms = row_norms(&rows.out)?;
        let sums = self.layers.entry(self.layer).or_default().experts.entry(expert).or_default();
        for (norm, weight) in norms.into_iter().zip(&rows.weights) {
            let gate = f64::from(*weight);
            sums.tokens += 1;
            // The output already contains the gate weight.
            sums.saliency += if self.scales_input { norm } else { gate * norm };
            sums.gate += gate;
            sums.norm += norm;
        }
        Ok(())
    }

    /// Adds the sums of a layer that all tokens have passed.
    pub fn join(&mut self, mut seen: Self) {
        let inputs =
            seen.collectors.take().map(|(place, sums)| (place, InputStatistics::of(sums, &self.asked))).collect();
        let layer = seen.layers.remove(&seen.layer).unwrap_or_default();
        self.layers.insert(seen.layer, Layer { inputs, ..layer });
    }

    /// Sums of the layers joined so far.
    pub fn layers(&self) -> &BTreeMap<usize, Layer> {
        &self.layers
    }

    /// Sets the sums of layers that an earlier process joined.
    pub fn restore(&mut self, layers: BTreeMap<usize, Layer>) {
        self.layers = layers;
    }

    /// Writes the files that the job names. `at` maps a file name to its path. Returns notes for
    /// the user of the files.
    ///
    /// # Errors
    /// Internal: an input was not finite. Storage.
    pub fn write(&self, pass: &FinishedPass<'_>, at: impl Fn(&str) -> PathBuf) -> Result<Vec<String>> {
        for (layer, seen) in &self.layers {
            if let Some((place, _)) = seen.inputs.iter().find(|(_, seen)| !seen.is_finite()) {
                let error = WorkerError::internal(format!("an input is no longer finite: layer {layer} {place:?}"));
                return Err(error.hint("try --precision f32; if it stays, the checkpoint or this program is wrong"));
            }
        }
        let never_hit = never_hit(pass.study);
        for export in &self.asked {
            match export {
                Export::Imatrix => imatrix::write(&at(files::IMATRIX), &self.layers, pass, &never_hit)?,
                Export::ActScales => {
                    let paths = [at(files::ACT_SCALES), at(files::INPUT_SCALES)];
                    act_scales::write([&paths[0], &paths[1]], &self.layers, pass, &never_hit)?;
                }
                Export::Reap => reap::write(&at(files::REAP), &self.layers, pass)?,
            }
        }
        Ok(self.warning(&never_hit).into_iter().collect())
    }

    fn warning(&self, never_hit: &[UnroutedExpert]) -> Option<String> {
        if never_hit.is_empty() {
            return None;
        }
        let files: Vec<&str> = self.asked.iter().flat_map(|export| export.files()).copied().collect();
        let (count, experts, files) = (never_hit.len(), listed(never_hit), files.join(", "));
        let meaning = if self.asked.contains(&Export::Imatrix) {
            "; llama-quantize takes all columns of such an expert as equally important"
        } else {
            ""
        };
        let why = format!("{files} have no data for them{meaning}; more text reaches more experts");
        Some(format!("experts that no token was sent to: {count} ({experts}). {why}"))
    }
}

/// A finished pass.
#[derive(Clone, Copy)]
pub struct FinishedPass<'a> {
    /// The model of the run.
    pub model: &'a Model<'a>,
    /// The token ids of the run.
    pub tokens: &'a Tokens,
    /// The measured statistics.
    pub study: &'a Study,
    /// The results computed from `study`.
    pub results: &'a Results,
}

/// An expert that no token was routed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct UnroutedExpert {
    layer: usize,
    expert: usize,
}

impl std::fmt::Display for UnroutedExpert {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "layer {} expert {}", self.layer, self.expert)
    }
}

fn never_hit(study: &Study) -> Vec<UnroutedExpert> {
    let mut all = Vec::new();
    for (layer, router) in study.routers() {
        let unused = router.loads.iter().enumerate().filter(|(_, load)| load.tokens == 0);
        all.extend(unused.map(|(expert, _)| UnroutedExpert { layer: *layer, expert }));
    }
    all
}

/// A matrix of a layer, or the same matrix of all its experts.
struct Matrix {
    layer: usize,
    role: Role,
    /// Width of the input.
    columns: usize,
    /// Number of experts; `None`: the matrix does not belong to an expert.
    experts: Option<usize>,
}

impl Matrix {
    /// The key under which its input is summed.
    fn place(&self, expert: usize) -> InputKey {
        (Input::of(self.role), self.experts.map(|_| expert))
    }

    /// Number of matrices: one, or one per expert.
    fn count(&self) -> usize {
        self.experts.unwrap_or(1)
    }
}

/// The matrices of all layers.
fn matrices(spec: &DecoderSpec) -> Vec<Matrix> {
    let mut all = Vec::new();
    for unit in spec.units(u64::MAX) {
        let experts = spec.layers[unit.layer].experts();
        let matrix = |need: &Need| Matrix {
            layer: unit.layer,
            role: need.role,
            columns: need.shape[1],
            experts: need.expert.map(|_| experts),
        };
        // The first expert stands for all.
        let is_one = |need: &&Need| need.is_matrix() && need.expert.unwrap_or(0) == 0;
        all.extend(unit.needs.iter().filter(is_one).map(matrix));
    }
    all
}

/// Refuses what cannot be exported, before anything is computed.
///
/// # Errors
/// Job: together with an ablation. Unsupported: an importance matrix of a family that llama.cpp
/// does not read.
pub fn check(job: &JobSpec, architecture: &str) -> Result<()> {
    if !job.export.is_empty() && job.ablation.is_some() {
        return Err(WorkerError::job("--export and --ablate do not go together").hint("make two runs of it"));
    }
    if job.export.contains(&Export::Imatrix) && names::of(architecture).is_none() {
        let message = format!("--export imatrix: llama.cpp does not read {architecture}");
        return Err(WorkerError::unsupported(message).hint("leave out imatrix; act-scales and reap need no llama.cpp"));
    }
    Ok(())
}

/// Bytes of a tensor's header entry, and of one line of a JSON document.
const ENTRY: u64 = 512;
/// Fixed bytes of a file besides its entries.
const BASE: u64 = 1 << 20;

/// The files of a job's exports, each with its maximum size.
pub fn planned(job: &JobSpec, spec: &DecoderSpec) -> Vec<FileBytes> {
    let matrices = matrices(spec);
    let experts: u64 = spec.layers.iter().map(|layer| layer.experts() as u64).sum();
    let most = |name: &str| match name {
        files::IMATRIX => imatrix::bytes(spec) + ENTRY * experts,
        files::ACT_SCALES => matrices.iter().map(|m| m.count() as u64 * (4 * m.columns as u64 + ENTRY)).sum(),
        files::INPUT_SCALES => matrices.iter().map(|m| m.count() as u64 * ENTRY).sum::<u64>() + ENTRY * experts,
        _ => 4 * ENTRY * experts,
    };
    let names = job.export.iter().flat_map(|export| export.files());
    names.map(|name| FileBytes { name: (*name).to_owned(), bytes: BASE + most(name) }).collect()
}

/// Memory of a job's exports at the end of the pass, in bytes.
pub fn memory(job: &JobSpec, spec: &DecoderSpec) -> u64 {
    let asked = |export| job.export.contains(&export);
    let kept = 8 * u64::from(asked(Export::Imatrix)) + 4 * u64::from(asked(Export::ActScales));
    if kept == 0 {
        return 0;
    }
    // The layer being observed is summed in f64.
    let (seen, mut columns) = (size_of::<f64>() * 2 + size_of::<f32>(), vec![0; spec.layers.len()]);
    let mut inputs = BTreeSet::new();
    for matrix in matrices(spec) {
        if inputs.insert((matrix.layer, Input::of(matrix.role))) {
            columns[matrix.layer] += (matrix.count() * matrix.columns) as u64;
        }
    }
    kept * columns.iter().sum::<u64>() + seen as u64 * columns.iter().max().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};
    use outliers_protocol::ModelSource;

    use super::*;
    use crate::blocks::ffn::Routing;

    fn job(export: &[Export]) -> JobSpec {
        let export = export.iter().copied().collect();
        JobSpec { export, ..JobSpec::new(ModelSource::Folder { path: "/m".into() }) }
    }

    fn saliency(scales_input: bool) -> Saliency {
        let mut exports = Exports::new(&job(&[Export::Reap])).unwrap();
        assert!(exports.collectors().is_none(), "no matrix is of interest");
        let mut layer = exports.layer(3);
        let routing = Routing { top_k: 1, experts: vec![7, 7], weights: vec![0.5, 0.25], scales_input };
        layer.routing(&Choices::Host(routing));
        let out = Tensor::new(&[[3f32, 4.0], [0.0, 2.0]], &Device::Cpu).unwrap();
        layer.expert(7, &ExpertRows { out, rows: vec![0, 1], weights: vec![0.5, 0.25] }).unwrap();
        exports.join(layer);
        exports.layers()[&3].experts[&7]
    }

    #[test]
    fn gate_weight_multiplies_the_norm_unless_already_included() {
        let sums = |saliency| Saliency { tokens: 2, saliency, gate: 0.75, norm: 7.0 };
        assert_eq!(saliency(false), sums(3.0));
        assert_eq!(saliency(true), sums(7.0));
    }

    #[test]
    fn only_requested_sums_are_kept() {
        let kept = |export: &[Export]| {
            let mut exports = Exports::new(&job(export)).unwrap();
            let layer = exports.layer(0);
            let collector = layer.collectors().unwrap().of(Role::QProj, None).unwrap();
            collector.add(&Tensor::new(&[[-3f32, 1.0]], &Device::Cpu).unwrap()).unwrap();
            exports.join(layer);
            exports.layers()[&0].inputs[&(Input::of(Role::KProj), None)].clone()
        };
        let summed = kept(&[Export::Imatrix]);
        assert_eq!((summed.rows, summed.squares, summed.values), (1, vec![9.0, 1.0], vec![-3.0, 1.0]));
        assert!(summed.largest.is_empty());
        let scaled = kept(&[Export::ActScales]);
        assert!(scaled.squares.is_empty() && scaled.values.is_empty());
        assert_eq!(scaled.largest, [3.0, 1.0]);
    }

    #[test]
    fn only_input_sums_need_memory() {
        let config = include_str!("../../../tests/golden/olmoe-bf16/model/config.json");
        let spec = crate::model::arch::read(&serde_json::from_str(config).unwrap()).unwrap().spec;
        let memory = |export: &[Export]| memory(&job(export), &spec);
        assert_eq!((memory(&[]), memory(&[Export::Reap])), (0, 0));
        assert!(memory(&[Export::Imatrix]) > memory(&[Export::ActScales]));
        let both = memory(&[Export::Imatrix, Export::ActScales]);
        assert!(both > memory(&[Export::Imatrix]));
    }
}
