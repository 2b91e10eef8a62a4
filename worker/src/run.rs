//! Executes a job: loads the model, runs the pass, writes the output files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use candle_core::DType;
use outliers_protocol::{
    CONFIG_RULES, FileBytes, HostInfo, JobSpec, Metadata, ModelProvenance, ModelSource, Outcome, Phase, Results,
    SCHEMA, WeightVerification, Weights, files,
};
use sha2::{Digest, Sha256};
use sysinfo::System;

use crate::checkpoint::Model;
use crate::checkpoint::hub::{FetchProgress, Hub};
use crate::checkpoint::source::{Checkpoint, Container, LocalSource, ModelFiles, SyntheticSource, is_plain_name};
use crate::corpus::{self, Tokens};
use crate::device::gpu;
use crate::device::{self, MachineInfo, Placement};
use crate::error::{Result, WorkerError};
use crate::files::{hex, remove_if_there};
use crate::pass::ablation::{Arms, Sharpness};
use crate::pass::budget::{self, StreamBudget};
use crate::pass::meter::Meter;
use crate::pass::progress::{ProgressSink, now_ms};
use crate::pass::savepoint::SavePoints;
use crate::pass::stream::{Pass, PassResult, Predicted};
use crate::pass::trace;
use crate::run::export::Exports;
use crate::run::inspect::PlannedRun;
use crate::run::observer::RunObserver;
use crate::run::output::{ActivationDump, OutputFolder, write_statistics};
use crate::stats::{Scope, Study};

pub mod export;
pub mod inspect;
pub mod observer;
pub mod output;

/// Runs a job and writes its files to `output`. The folder ends with a manifest that states the
/// outcome, also after an error, unless the disk refuses the write.
///
/// The state of the pass is saved at the end of a layer, every `save_every`. The same job into the
/// same folder continues from there if an earlier run did not finish. With `save_activations` no
/// state is saved, since that file could not be completed.
///
/// # Errors
/// Anything in [`outliers_protocol::FailureKind`]; the same error is in the manifest.
pub fn run(job: &JobSpec, output: &Path, hub: &Hub, save_every: Duration, talk: bool) -> Result<Results> {
    let folder = OutputFolder::create(output)?;
    folder.write_json(files::JOB, job)?;
    let progress = ProgressSink::new(Some(&folder.file(files::PROGRESS)), talk)?;
    let result = Run { job, folder: &folder, progress: &progress }.attempt(hub, save_every);
    let finished = match &result {
        Ok(_) => {
            remove_if_there(&folder.file(files::SAVE_POINT))?;
            let mut names = vec![files::JOB, files::RESULTS, files::METADATA, files::STATISTICS];
            names.extend(asked_for(job).map(|(_, name)| name));
            names.extend(job.export.iter().flat_map(|export| export.files()));
            folder.finish(Outcome::Complete, &names)
        }
        Err(error) => folder.finish(Outcome::Failed(error.clone().into()), &[files::JOB]),
    };
    progress.phase(if result.is_ok() { Phase::Done } else { Phase::Failed });
    let results = result?;
    finished?;
    Ok(results)
}

/// Opens the checkpoint of a job, with weights from the source that the job names.
///
/// # Errors
/// Model not found or gated, network, damaged files; `--weights` hub for a model that is a folder.
pub fn checkpoint(job: &JobSpec, budget: StreamBudget, hub: &Hub, progress: &ProgressSink) -> Result<Checkpoint> {
    let fetched = |fetched: FetchProgress| {
        progress.work(0, fetched.bytes_total, 0);
        progress.bytes(fetched.bytes_done);
    };
    match (&job.model, &job.weights) {
        (ModelSource::Hub { id, revision }, None | Some(Weights::Hub)) => {
            progress.phase(Phase::Fetching);
            hub.stream(id, revision, budget.read_ahead(), &fetched)
        }
        (ModelSource::Hub { id, revision }, Some(Weights::Cache)) => {
            progress.phase(Phase::Fetching);
            hub.fetch_all(id, revision, &fetched)
        }
        _ => metadata(job, hub),
    }
}

/// Bytes of weights that a run of this job writes to its machine's disk, or finds there where the
/// model is a folder.
pub fn disk_bytes(job: &JobSpec, files: &[FileBytes]) -> u64 {
    let streams = |file: &FileBytes| Container::of(&file.name) == Some(Container::Safetensors);
    match (&job.model, &job.weights) {
        (_, Some(Weights::Local { .. } | Weights::Synthetic { .. })) => 0,
        (ModelSource::Hub { .. }, None | Some(Weights::Hub)) if files.iter().all(streams) => 0,
        _ => files.iter().map(|file| file.bytes).sum(),
    }
}

/// As [`checkpoint`], without fetching weights: enough to inspect and to plan.
///
/// # Errors
/// As [`checkpoint`].
pub fn metadata(job: &JobSpec, hub: &Hub) -> Result<Checkpoint> {
    match (&job.model, &job.weights) {
        (model, Some(Weights::Local { path })) => {
            Ok(described(model, hub)?.with(LocalSource::open(&PathBuf::from(path))?))
        }
        (model, Some(Weights::Synthetic { seed })) => {
            let described = described(model, hub)?;
            let source = SyntheticSource::new(described.config(), *seed)?;
            Ok(described.with(source))
        }
        (ModelSource::Hub { id, revision }, None | Some(Weights::Hub | Weights::Cache)) => {
            hub.fetch_metadata(id, revision)
        }
        (ModelSource::Folder { path }, None) => Checkpoint::open_folder(&PathBuf::from(path)),
        (ModelSource::Folder { path }, Some(Weights::Hub | Weights::Cache)) => {
            Err(WorkerError::job(format!("{path} is a folder: its weights cannot come from the hub"))
                .hint("leave out --weights, or name the model by its hub id (owner/name)"))
        }
    }
}

fn described(model: &ModelSource, hub: &Hub) -> Result<ModelFiles> {
    match model {
        ModelSource::Folder { path } => ModelFiles::read(&PathBuf::from(path), None),
        ModelSource::Hub { id, revision } => hub.describe(id, revision),
    }
}

/// A job under way.
struct Run<'a> {
    job: &'a JobSpec,
    folder: &'a OutputFolder,
    progress: &'a ProgressSink,
}

impl Run<'_> {
    fn attempt(&self, hub: &Hub, save_every: Duration) -> Result<Results> {
        let Self { job, folder, progress } = *self;
        let started_at_ms = now_ms();
        check(job)?;
        let before = gpu::traffic();
        let devices = device::open(&job.devices)?;
        let compute = device::compute_dtype(job.precision, &devices);
        let budget = StreamBudget::new(job.stream_budget_bytes);
        let checkpoint = checkpoint(job, budget, hub, progress)?;
        progress.phase(Phase::Checking);
        let source = &*checkpoint.weights;
        let model = Model::open(&checkpoint.config, source, job.layers)?;
        export::check(job, model.family.architecture)?;
        for ignored in &model.ignored {
            progress
                .say(format!("{} tensors left unread: {} ({}, ...)", ignored.tensors, ignored.why, ignored.example));
        }
        model.warnings().into_iter().for_each(|warning| progress.warn(warning));
        progress.phase(Phase::Tokenizing);
        let tokens = corpus::load(&job.corpus, Some(&checkpoint.folder), model.spec.vocab, model.spec.longest(), hub)?;
        let expected: u64 = bytes_to_read(&model, job.layers.is_none());
        progress.work(model.spec.layers.len(), expected, tokens.ids.len());
        let mut save = job.save_activations.is_none().then(|| {
            let run = identity(job, &checkpoint, &tokens, compute);
            SavePoints::new(folder.file(files::SAVE_POINT), run, save_every)
        });
        let arms = Arms::of(job.ablation.as_ref(), model.spec.hidden, tokens.tokens)?;
        let size = [tokens.sequences, tokens.tokens];
        let mut planned = PlannedRun::new(job, &model.spec, size, arms.count(), &devices, budget);
        planned.micro_batch_tokens = inspect::micro_batch_tokens(job.micro_batch_tokens, &model, planned, &devices);
        if device::has_gpu(&devices) {
            progress.say(format!("{} tokens are computed together", planned.micro_batch_tokens));
        }
        let needed = inspect::streamed_memory(&model, planned);
        let on_cpu = devices.iter().any(|placement| placement.device.is_cpu());
        let (cpus, gpus): (Vec<&Placement>, Vec<_>) = devices.iter().partition(|placement| placement.device.is_cpu());
        if !cpus.is_empty() {
            let on = if cpus.len() > 1 { format!("{} CPU devices", cpus.len()) } else { "the CPU".to_owned() };
            fits(needed, &on, budget::free_memory())?;
        }
        for Placement { name, device } in gpus {
            fits(needed, name, gpu::free_memory(device))?;
        }
        let pass = Pass {
            model: &model,
            tokens: &tokens,
            arms: &arms,
            compute,
            devices: &devices,
            micro_batch_tokens: planned.micro_batch_tokens,
            with_head: job.layers.is_none(),
            group_elements: planned.group_elements,
            hash_memory: budget.hash_memory(if on_cpu { needed } else { 0 }),
            read_ahead: true,
            progress,
            meter: &if job.trace.is_some() { Meter::with_spans() } else { Meter::default() },
        };
        let passed = self.pass(&pass, save.as_mut()).and_then(|passed| Ok((passed, source.verify()?)));
        if source.is_damaged() {
            // The saved state may have been computed from the damaged file.
            remove_if_there(&folder.file(files::SAVE_POINT))?;
        }
        let ((observer, passed), mut verification) = passed?;
        if let (Some(verification), Some(layer)) = (&mut verification, passed.resumed_at_layer) {
            let reason = format!("an earlier process read them before the save point at layer {layer}");
            verification.leave_out(reason, passed.unverified_before.clone());
        }
        if matches!(job.model, ModelSource::Hub { .. }) {
            verification.iter().flat_map(WeightVerification::warnings).for_each(|warning| progress.warn(warning));
        }
        let study = &observer.study;
        progress.phase(Phase::Writing);
        write_statistics(&folder.file(files::STATISTICS), study, job.thresholds.magnitude)?;
        let mut results = results(job, &model, &tokens, study, passed.whole());
        if let Some(predicted) = &passed.predicted {
            results.ablation = arms.report(model.spec.layers.len(), predicted, &observer.sharpness);
        }
        folder.write_json(files::RESULTS, &results)?;
        if let Some(exports) = &observer.exports {
            let passed = export::FinishedPass { model: &model, tokens: &tokens, study, results: &results };
            let warnings = exports.write(&passed, |name| folder.file(name))?;
            warnings.into_iter().for_each(|warning| progress.warn(warning));
        }
        let machine = device::machine();
        let copied = device::has_gpu(&devices).then(|| gpu::traffic().since(before));
        let metadata = Metadata {
            schema: SCHEMA,
            worker_version: env!("CARGO_PKG_VERSION").to_owned(),
            job: job.clone(),
            model: ModelProvenance { weight_verification: verification, ..provenance(job, &checkpoint, &model) },
            compute_dtype: compute.as_str().to_owned(),
            tokenizer: tokens.tokenizer.clone(),
            corpus: tokens.provenance.clone(),
            devices: device::describe(&devices, &machine),
            host: host(&machine),
            weight_bytes_read: source.bytes_read(),
            weight_bytes_expected: expected,
            resumed_at_layer: passed.resumed_at_layer,
            peak_memory_bytes: peak_memory(),
            micro_batch_tokens: Some(planned.micro_batch_tokens),
            host_to_device_bytes: copied.map(|copied| copied.to_gpus),
            device_to_host_bytes: copied.map(|copied| copied.from_gpus),
            seconds: seconds(progress),
            started_at_ms,
            finished_at_ms: now_ms(),
        };
        folder.write_json(files::METADATA, &metadata)?;
        Ok(results)
    }

    /// Runs the pass, and writes activations and save points during it.
    fn pass(&self, pass: &Pass<'_>, save: Option<&mut SavePoints>) -> Result<(RunObserver, PassResult)> {
        let Self { job, folder, .. } = *self;
        let (spec, tokens) = (&pass.model.spec, pass.tokens);
        let scope = Scope::new(job, spec, tokens);
        let dump = |name: &String| ActivationDump::create(&folder.file(name), spec, &scope, tokens, pass.with_head);
        let dump = job.save_activations.as_ref().map(dump).transpose()?;
        let study = Study::new(scope, job.thresholds.magnitude);
        let mut observer = RunObserver { study, dump, sharpness: Sharpness::new(), exports: Exports::new(job) };
        let passed = pass.run(&mut observer, save)?;
        if let Some(name) = &job.trace {
            trace::write(&folder.file(name), &pass.meter.spans(), pass.devices)?;
        }
        if let Some(dump) = observer.dump.take() {
            dump.finish(passed.whole().map(|predicted| predicted.nll.as_slice()))?;
        }
        Ok((observer, passed))
    }
}

/// A hash of everything that a pass's numbers depend on.
fn identity(job: &JobSpec, checkpoint: &Checkpoint, tokens: &Tokens, compute: DType) -> String {
    // Devices, the model's display name and the source of weights do not change the numbers,
    // except synthetic weights.
    let weights = job.weights.clone().filter(|weights| matches!(weights, Weights::Synthetic { .. }));
    let unnamed = JobSpec { devices: Vec::new(), label: None, trace: None, ..job.clone() };
    let job = JobSpec { weights, stream_budget_bytes: None, ..unnamed };
    let parts =
        (env!("CARGO_PKG_VERSION"), CONFIG_RULES, &job, &checkpoint.config_sha256, &tokens.provenance.token_ids_sha256);
    let text = serde_json::to_vec(&(parts, compute.as_str(), checkpoint.weights.files()));
    hex(&Sha256::digest(text.expect("plain data")))
}

/// Refuses a run that the system would kill for lack of memory. Sizes are in bytes.
fn fits(needed: u64, on: &str, free: Option<u64>) -> Result<()> {
    let Some(free) = free.filter(|free| *free < needed) else { return Ok(()) };
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    let (needed, free) = (gib(needed), gib(free));
    let message = format!("the run on {on} needs {needed:.2} GiB of memory, and {free:.2} GiB are free");
    Err(WorkerError::device(message).hint(
        "fewer --devices, a smaller --stream-budget or --micro-batch-tokens, or fewer sequences need less; `outliers-worker inspect` shows \
         how much",
    ))
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
    if job.ablation.is_some() && job.layers.is_some() {
        let error = WorkerError::job("--ablate needs all layers, since it compares perplexities");
        return Err(error.hint("leave out --layers"));
    }
    if job.stream_budget_bytes == Some(0) {
        return Err(WorkerError::job("the stream budget is 0: no weights can be loaded"));
    }
    for (option, name) in asked_for(job) {
        if !is_plain_name(name) || name.starts_with('.') {
            return Err(WorkerError::job(format!("{option} {name:?} must be a plain file name")));
        }
    }
    Ok(())
}

/// Optional files of the output folder that a job names: the option and the file's name.
fn asked_for(job: &JobSpec) -> impl Iterator<Item = (&'static str, &str)> {
    let named = [("save_activations", &job.save_activations), ("trace", &job.trace)];
    named.into_iter().filter_map(|(option, name)| Some((option, name.as_deref()?)))
}

/// Weight bytes one pass reads.
fn bytes_to_read(model: &Model<'_>, with_head: bool) -> u64 {
    let head = model.stored_bytes(0, &model.spec.head_needs());
    let all: u64 = model.stored_dtypes().values().sum();
    if with_head { all } else { all - head }
}

fn results(job: &JobSpec, model: &Model<'_>, tokens: &Tokens, study: &Study, predicted: Option<&Predicted>) -> Results {
    let report = study.report(&job.thresholds, &tokens.ids);
    let judged = report.judged;
    let mut per_sequence = judged.per_sequence;
    if let Some(predicted) = predicted {
        for (summary, mean_nll) in per_sequence.iter_mut().zip(predicted.of_sequences(tokens.sequences)) {
            summary.mean_nll = mean_nll;
        }
    }
    Results {
        schema: SCHEMA,
        model: job.model_name().to_owned(),
        thresholds: job.thresholds,
        n_layers: model.spec.layers.len(),
        n_sites: study.outliers().sites().len(),
        unstudied_norms: model.unstudied_norms(),
        hidden: model.spec.hidden,
        sequences: tokens.sequences,
        tokens_per_sequence: tokens.tokens,
        verdicts: judged.verdicts,
        features: judged.features,
        per_sequence,
        sites: judged.sites,
        total_occurrences: judged.total_occurrences,
        max_abs: judged.max_abs,
        perplexity: predicted.and_then(Predicted::perplexity),
        other_sites: report.other_sites,
        massive_activations: report.massive_activations,
        top_records: report.top_records,
        routers: report.routers,
        super_experts: report.super_experts,
        quantization_error: report.quantization_error,
        residual_sinks: report.residual_sinks,
        spike_life: report.spike_life,
        attention_sinks: report.attention_sinks,
        ablation: Vec::new(),
    }
}

fn provenance(job: &JobSpec, checkpoint: &Checkpoint, model: &Model<'_>) -> ModelProvenance {
    ModelProvenance {
        name: job.model_name().to_owned(),
        revision: checkpoint.revision.clone(),
        architecture: model.family.architecture.to_owned(),
        config_sha256: checkpoint.config_sha256.clone(),
        parameters: model.parameters(),
        active_parameters: Some(inspect::active_parameters(&model.spec)),
        stored_dtypes: model.stored_dtypes(),
        ignored: model.ignored.clone(),
        unexplained: model.unexplained.clone(),
        config: Some(model.config.clone()),
        checkpoint_notes: model.checkpoint_notes(),
        weight_verification: None,
    }
}

fn host(machine: &MachineInfo) -> HostInfo {
    HostInfo {
        os: System::long_os_version().unwrap_or_else(|_| std::env::consts::OS.to_owned()),
        cpu: machine.cpu.clone(),
        threads: rayon::current_num_threads(),
        memory_bytes: machine.memory_bytes,
    }
}

/// Peak resident memory of this process in bytes; `None` where the system does not report it.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unstreamed_weights_need_disk() {
        let file = |name: &str| FileBytes { name: name.to_owned(), bytes: 10 };
        let (streams, pickled) = ([file("a.safetensors"), file("b.safetensors")], [file("pytorch_model.bin")]);
        let hub = ModelSource::Hub { id: "a/b".into(), revision: "main".into() };
        let folder = ModelSource::Folder { path: "/m".into() };
        let local = Weights::Local { path: "/w".into() };
        for (model, weights, files, bytes) in [
            (&hub, None, &streams[..], 0),
            (&hub, Some(Weights::Hub), &streams[..], 0),
            (&hub, Some(Weights::Cache), &streams[..], 20),
            (&hub, None, &pickled[..], 10),
            (&hub, Some(local), &streams[..], 0),
            (&hub, Some(Weights::Synthetic { seed: 1 }), &streams[..], 0),
            (&folder, None, &streams[..], 20),
        ] {
            let job = JobSpec { weights, ..JobSpec::new(model.clone()) };
            assert_eq!(disk_bytes(&job, files), bytes, "{job:?}");
        }
    }

    #[test]
    fn job_over_available_memory_is_refused_with_numbers() {
        let gib = |n: u64| n << 30;
        assert!(fits(gib(8), "cuda:0", Some(gib(8))).is_ok() && fits(gib(8), "cuda:0", None).is_ok());
        let error = fits(gib(9), "cuda:0", Some(gib(8))).unwrap_err();
        assert_eq!(error.message(), "the run on cuda:0 needs 9.00 GiB of memory, and 8.00 GiB are free");
        assert!(error.hint_text().is_some());
    }
}
