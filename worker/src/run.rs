//! One run, from a job to its files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::DType;
use outliers_protocol::{
    HostInfo, JobSpec, Metadata, ModelProvenance, ModelSource, Outcome, Perplexity, Phase, Results, SCHEMA, files,
};
use sysinfo::System;

use crate::corpus::{self, Tokens};
use crate::device::{self, Machine, Placement};
use crate::error::{Result, WorkerError};
use crate::hub::Hub;
use crate::model::Model;
use crate::output::{ActivationDump, OutputFolder, write_statistics};
use crate::progress::{ProgressSink, now_ms};
use crate::source::Checkpoint;
use crate::stats::{Observer, Scope, Study};
use crate::stream::Pass;

/// Runs a job into a folder. Whatever happens, the folder ends with a manifest that says so, unless the disk refuses it.
///
/// # Errors
/// Anything in [`outliers_protocol::FailureKind`]; the same error is in the manifest.
pub fn run(job: &JobSpec, output: &Path, hub: &Hub, talk: bool) -> Result<Results> {
    let folder = OutputFolder::create(output)?;
    folder.write_json(files::JOB, job)?;
    let progress = ProgressSink::new(Some(&folder.file(files::PROGRESS)), talk)?;
    let result = attempt(job, &folder, hub, &progress);
    let finished = match &result {
        Ok(_) => {
            let mut names = vec![files::JOB, files::RESULTS, files::METADATA, files::STATISTICS];
            // Large, but asked for by name.
            names.extend(job.save_activations.as_deref());
            folder.finish(Outcome::Complete, &names)
        }
        Err(error) => folder.finish(Outcome::Failed(error.clone().into()), &[files::JOB]),
    };
    progress.phase(if result.is_ok() { Phase::Done } else { Phase::Failed });
    let results = result?;
    finished?;
    Ok(results)
}

/// Finds the checkpoint a job names; weights of a hub model are fetched into the cache.
///
/// # Errors
/// Model not found or gated, network, damaged files.
pub fn checkpoint(source: &ModelSource, hub: &Hub, progress: &ProgressSink) -> Result<Checkpoint> {
    match source {
        ModelSource::Folder { path } => Checkpoint::open_folder(&PathBuf::from(path)),
        ModelSource::Hub { id, revision } => {
            progress.phase(Phase::Fetching);
            hub.fetch_all(id, revision, &|fetched| {
                progress.work(0, fetched.bytes_total, 0);
                progress.bytes(fetched.bytes_done);
            })
        }
    }
}

/// The same without any weights: enough to inspect and to plan.
///
/// # Errors
/// As [`checkpoint`].
pub fn metadata(source: &ModelSource, hub: &Hub) -> Result<Checkpoint> {
    match source {
        ModelSource::Folder { path } => Checkpoint::open_folder(&PathBuf::from(path)),
        ModelSource::Hub { id, revision } => hub.fetch_metadata(id, revision),
    }
}

fn attempt(job: &JobSpec, folder: &OutputFolder, hub: &Hub, progress: &ProgressSink) -> Result<Results> {
    let started_at_ms = now_ms();
    check(job)?;
    let devices = device::open(&job.devices)?;
    let compute = device::compute_dtype(job.precision, &devices);
    let checkpoint = checkpoint(&job.model, hub, progress)?;
    progress.phase(Phase::Checking);
    let source = &*checkpoint.weights;
    let model = Model::open(&checkpoint.config, source, job.layers)?;
    for ignored in &model.ignored {
        progress.say(format!("{} tensors left unread: {} ({}, ...)", ignored.tensors, ignored.why, ignored.example));
    }
    if !model.unexplained.is_empty() {
        progress.say(format!(
            "{} tensors on disk are not explained: {}",
            model.unexplained.len(),
            sample(&model.unexplained)
        ));
    }
    progress.phase(Phase::Tokenizing);
    let tokens = corpus::load(&job.corpus, Some(&checkpoint.folder), model.spec.vocab, model.spec.max_positions)?;
    let expected: u64 = bytes_to_read(&model, job.layers.is_none());
    progress.work(model.spec.layers.len(), expected, tokens.ids.len());
    let (study, nll) = pass(job, folder, &model, &tokens, compute, &devices, progress)?;
    progress.phase(Phase::Writing);
    write_statistics(&folder.file(files::STATISTICS), &study, job.thresholds.magnitude)?;
    let results = results(job, &model, &tokens, &study, nll.as_deref());
    folder.write_json(files::RESULTS, &results)?;
    let machine = device::machine();
    let metadata = Metadata {
        schema: SCHEMA,
        worker_version: env!("CARGO_PKG_VERSION").to_owned(),
        job: job.clone(),
        model: provenance(job, &checkpoint, &model),
        compute_dtype: compute.as_str().to_owned(),
        tokenizer: tokens.tokenizer.clone(),
        corpus: tokens.provenance.clone(),
        devices: device::describe(&devices, &machine),
        host: host(&machine),
        weight_bytes_read: source.bytes_read(),
        weight_bytes_expected: expected,
        peak_memory_bytes: peak_memory(),
        seconds: seconds(progress),
        started_at_ms,
        finished_at_ms: now_ms(),
    };
    folder.write_json(files::METADATA, &metadata)?;
    Ok(results)
}

fn check(job: &JobSpec) -> Result<()> {
    if job.schema != SCHEMA {
        return Err(WorkerError::job(format!("the job is of schema {}, this worker speaks {SCHEMA}", job.schema))
            .hint("controller and worker must be of the same version"));
    }
    let t = job.thresholds;
    let share = 0.0..=1.0;
    if !(t.magnitude > 0.0 && t.magnitude.is_finite()) {
        return Err(WorkerError::job(format!("the magnitude threshold must be above 0, not {}", t.magnitude)));
    }
    if !share.contains(&t.layer_fraction) || !share.contains(&t.position_fraction) {
        return Err(WorkerError::job("layer and position fractions must be between 0 and 1"));
    }
    match &job.save_activations {
        Some(name) if name.contains('/') || name.starts_with('.') || name.is_empty() => {
            Err(WorkerError::job(format!("save_activations {name:?} must be a plain file name")))
        }
        _ => Ok(()),
    }
}

fn sample(names: &[String]) -> String {
    let shown: Vec<&str> = names.iter().take(3).map(String::as_str).collect();
    shown.join(", ") + if names.len() > shown.len() { ", ..." } else { "" }
}

/// Weight bytes one pass reads.
fn bytes_to_read(model: &Model<'_>, with_head: bool) -> u64 {
    let head = model.stored_bytes(0, &model.spec.head_needs());
    let all: u64 = model.stored_dtypes().values().sum();
    if with_head { all } else { all - head }
}

fn pass(
    job: &JobSpec,
    folder: &OutputFolder,
    model: &Model<'_>,
    tokens: &Tokens,
    compute: DType,
    devices: &[Placement],
    progress: &ProgressSink,
) -> Result<(Study, Option<Vec<f32>>)> {
    let with_head = job.layers.is_none();
    let spec = &model.spec;
    let scope = Scope::new(job, spec, tokens);
    let dump = |name: &String| ActivationDump::create(&folder.file(name), spec, &scope, tokens, with_head);
    let mut dump = job.save_activations.as_ref().map(dump).transpose()?;
    let mut study = Study::new(scope, job.thresholds.magnitude);
    let mut observers: Vec<&mut dyn Observer> = vec![&mut study];
    if let Some(dump) = &mut dump {
        observers.push(dump);
    }
    let micro_batch_tokens = job.micro_batch_tokens;
    let group_elements = crate::stream::GROUP_ELEMENTS;
    let pass = Pass { model, tokens, compute, devices, micro_batch_tokens, with_head, group_elements, progress };
    let nll = pass.run(&mut observers, None)?;
    if let Some(dump) = dump {
        dump.finish(nll.as_deref())?;
    }
    Ok((study, nll))
}

fn results(job: &JobSpec, model: &Model<'_>, tokens: &Tokens, study: &Study, nll: Option<&[f32]>) -> Results {
    let report = study.report(&job.thresholds, &tokens.ids);
    let judged = report.judged;
    let mut per_sequence = judged.per_sequence;
    // One token per sequence predicts nothing: no perplexity then.
    let nll = nll.filter(|nll| !nll.is_empty());
    let mean = |nll: &[f32]| nll.iter().map(|v| f64::from(*v)).sum::<f64>() / nll.len() as f64;
    if let Some(nll) = nll {
        for (summary, nll) in per_sequence.iter_mut().zip(nll.chunks(tokens.tokens - 1)) {
            summary.mean_nll = Some(mean(nll));
        }
    }
    Results {
        schema: SCHEMA,
        model: job.model_name().to_owned(),
        thresholds: job.thresholds,
        n_layers: model.spec.layers.len(),
        n_sites: study.outliers().sites().len(),
        hidden: model.spec.hidden,
        sequences: tokens.sequences,
        tokens_per_sequence: tokens.tokens,
        verdicts: judged.verdicts,
        features: judged.features,
        per_sequence,
        sites: judged.sites,
        total_occurrences: judged.total_occurrences,
        max_abs: judged.max_abs,
        perplexity: nll.map(|nll| Perplexity {
            perplexity: mean(nll).exp(),
            mean_nll: mean(nll),
            predicted_tokens: nll.len() as u64,
        }),
        other_sites: report.other_sites,
        massive_activations: report.massive_activations,
        top_records: report.top_records,
        routers: report.routers,
        super_experts: report.super_experts,
    }
}

fn provenance(job: &JobSpec, checkpoint: &Checkpoint, model: &Model<'_>) -> ModelProvenance {
    ModelProvenance {
        name: job.model_name().to_owned(),
        revision: checkpoint.revision.clone(),
        architecture: model.family.architecture.to_owned(),
        config_sha256: checkpoint.config_sha256.clone(),
        parameters: model.parameters(),
        stored_dtypes: model.stored_dtypes(),
        ignored: model.ignored.clone(),
        unexplained: model.unexplained.clone(),
    }
}

fn host(machine: &Machine) -> HostInfo {
    HostInfo {
        os: System::long_os_version().unwrap_or_else(|_| std::env::consts::OS.to_owned()),
        cpu: machine.cpu.clone(),
        threads: rayon::current_num_threads(),
        memory_bytes: machine.memory_bytes,
    }
}

/// Peak resident memory of this process, where the system keeps it.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

fn seconds(progress: &ProgressSink) -> BTreeMap<String, f64> {
    let mut seconds = BTreeMap::new();
    for (phase, spent) in progress.seconds() {
        *seconds.entry(format!("{phase:?}").to_lowercase()).or_default() += spent;
    }
    seconds
}
