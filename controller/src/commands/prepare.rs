//! Prepares a run: all steps of `deploy` and `survey` before anything is rented.

use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;

use outliers_protocol::{CorpusSource, FileBytes, Inspection, JobSpec, ModelSource, Weights};

use super::Context;
use crate::cli::settings::RunTerms;
use crate::cloud::broker::{GpuRequest, Offer, Stage, slurm};
use crate::cloud::clouds::{Cloud, Clouds, Offered};
use crate::cloud::market::Quote;
use crate::files::{RESERVE, free_disk};
use crate::run::deploy::JobIdentity;
use crate::run::ledger::random_word;
use crate::run::local_worker::{InspectScope, LocalWorker, Pushed, corpus_files};
use crate::run::output;
use crate::run::{GuardTimeouts, RunSpec};
use crate::secret::Secret;
use crate::text::counted;
use crate::ui::report::tables::TOP;
use crate::ui::report::{CliError, ExitStatus};
use crate::units::{Bytes, Usd};

/// Disk for a run's own files if the checkpoint is stored elsewhere.
const OWN_FILES: Bytes = Bytes::from_mib(64);

/// A requested run.
pub(super) struct RunRequest {
    /// The job, with local paths.
    pub(super) job: JobSpec,
    /// Key of the same work.
    pub(super) job_key: String,
    pub(super) terms: RunTerms,
}

/// A checked run that may start.
pub(super) struct Prepared {
    pub(super) spec: RunSpec,
    /// The checkpoint, and what the job needs.
    pub(super) inspection: Inspection,
    /// At least one offer. The first is rented, or the next ones if it is unavailable.
    pub(super) quote: Quote,
}

impl Prepared {
    /// Maximum total cost as shown and agreed to, within the run's own budget.
    pub(super) fn at_most(&self) -> Usd {
        let first = || self.quote.offers.first().map_or(Usd::ZERO, |offer| until_the_limit(&self.spec, offer));
        let agreed = self.quote.ceiling.unwrap_or_else(first);
        own_budget(&self.spec).map_or(agreed, |budget| agreed.min(budget))
    }

    /// With the figure that whoever says yes is held to, and without the offers for which it does
    /// not pay. This machine costs nothing that anybody has to agree to.
    fn with_ceiling(mut self, is_local: bool) -> Self {
        if let (false, Some(first)) = (is_local, self.quote.offers.first()) {
            let first = until_the_limit(&self.spec, first);
            self.quote.ceiling = own_budget(&self.spec).into_iter().chain([first]).max();
            self.spec.quote.ceiling = self.quote.ceiling;
            self.quote.offers.retain(|offer| self.spec.pays_for(offer, Usd::ZERO));
        }
        self
    }

    /// The plan with the agreed offers.
    pub(super) fn signed(mut self) -> RunSpec {
        self.quote.offers.truncate(TOP);
        RunSpec { quote: self.quote, ..self.spec }
    }
}

/// Cost of an offer until the time limit, rounded up to the cent.
fn until_the_limit(spec: &RunSpec, offer: &Offer) -> Usd {
    offer.price.cost_up_to_cents(spec.limit())
}

/// The budget that no other run shares.
fn own_budget(spec: &RunSpec) -> Option<Usd> {
    spec.budget.filter(|_| spec.survey.is_none())
}

/// Performs all checks before renting. `offered` is called with the clouds' offers.
///
/// # Errors
/// [`CliError`]: the failed check.
pub(super) async fn prepare(
    context: &Context,
    clouds: &Clouds,
    worker: &LocalWorker,
    run_request: RunRequest,
    offered: impl Fn(&Offered),
) -> Result<Prepared, CliError> {
    let RunRequest { job, job_key, terms } = run_request;
    let request = with_gpus(clouds, worker.pushed(), &job, terms.request)?;
    let run_request = RunRequest { job, job_key, terms: RunTerms { request, ..terms } };
    let inspection = preflight(context, clouds, worker, &run_request.job, run_request.terms.push_model).await?;
    let (run_request, stage) = match on_shared_files(context, clouds, &run_request.job, &inspection).await? {
        Some(OnSharedFiles { job, stage }) => (RunRequest { job, ..run_request }, stage),
        None => (run_request, None),
    };
    let spec = spec(context, clouds, run_request, &inspection, stage)?;
    let found = context.reporter.waiting("the clouds' offers", clouds.offers(&spec.request)).await?;
    offered(&found);
    if let Some(wrong) = clouds.wrong_clock() {
        return Err(CliError::refused(wrong, "set the clock, by NTP for example; `outliers doctor` compares it again"));
    }
    let quote = in_gpu_time(spec.select(found.offers)?, &spec)?;
    let prepared = Prepared { spec, inspection, quote }.with_ceiling(clouds.is_local());
    within_budget(&prepared)?;
    Ok(prepared)
}

/// Checks that the whole budget pays for one of the offers until the time limit.
///
/// # Errors
/// It does not.
fn within_budget(Prepared { spec, quote, .. }: &Prepared) -> Result<(), CliError> {
    let Some(budget) = spec.budget else { return Ok(()) };
    let least = quote.offers.iter().map(|offer| spec.worst(offer, Usd::ZERO)).min();
    let Some(least) = least.filter(|least| *least > budget) else { return Ok(()) };
    let message = format!("the cheapest offer may cost {least} until its time limit, and --budget allows {budget}");
    Err(CliError::new(ExitStatus::TimeUp, message, "a shorter --max-duration reserves less; or raise --budget"))
}

/// The offers within the run's budget of GPU time until the time limit.
///
/// # Errors
/// No offer is within it.
fn in_gpu_time(mut quote: Quote, spec: &RunSpec) -> Result<Quote, CliError> {
    let Some(most) = spec.max_gpu_time else { return Ok(quote) };
    let least = quote.offers.iter().map(|offer| spec.gpu_time(offer)).min();
    quote.offers.retain(|offer| spec.gpu_time(offer) <= most);
    match least.filter(|_| quote.offers.is_empty()) {
        Some(least) => {
            let message = format!("the run may take {least} until its time limit, and --max-gpu-hours allows {most}");
            let hint = "a shorter --max-duration or fewer GPUs take less; or raise --max-gpu-hours";
            Err(CliError::refused(message, hint))
        }
        None => Ok(quote),
    }
}

pub(super) fn identity(context: &Context, job: &JobSpec) -> Result<JobIdentity, CliError> {
    for path in corpus_files(job) {
        // Checked before hashing, which would take long for a terabyte.
        let bytes = Bytes(std::fs::metadata(path).map_or(0, |meta| meta.len()));
        check_size(path, bytes, context.settings.push_limit)?;
    }
    JobIdentity::of(job).map_err(|error| CliError::failed(format!("the corpus: {error}")))
}

/// Secrets for this job's worker if `workers` of them run at the same time.
pub(super) fn secrets(context: &Context, job: &JobSpec, workers: usize) -> Vec<(&'static str, Secret)> {
    if job.asks_the_hub() { context.settings.hub_variables(workers) } else { Vec::new() }
}

/// Checks the request before anything is rented.
async fn preflight(
    context: &Context,
    clouds: &Clouds,
    worker: &LocalWorker,
    job: &JobSpec,
    push_model: bool,
) -> Result<Inspection, CliError> {
    let folder = matches!(job.model, ModelSource::Folder { .. });
    if push_model && !folder {
        let hint = "a hub model is fetched by the instance";
        return Err(CliError::refused("--push-model needs a folder as --model", hint));
    }
    let is_theirs = matches!(job.weights, Some(Weights::Local { .. })) && !clouds.is_local();
    if is_theirs && clouds.names() != slurm::NAME {
        let hint = "leave out --weights: the instance streams them from the hub";
        return Err(CliError::refused("the weights are a folder on this machine", hint));
    }
    if is_theirs && push_model {
        let hint = "leave out --push-model: the job reads the whole checkpoint from --weights local:DIR of the cluster";
        return Err(CliError::refused("--push-model does not go with weights that are on the cluster", hint));
    }
    if folder && !push_model && !is_theirs && !clouds.is_local() {
        let hint = match clouds.names() == slurm::NAME {
            true => "add --push-model to upload it (when it is small), or --weights local:DIR of the cluster",
            false => "add --push-model to upload it (when it is small), or use a hub id",
        };
        return Err(CliError::refused("the model is a folder on this machine", hint));
    }
    // A device list is about the instance; it can be tried here only when the instance is here.
    let check = if clouds.is_local() { InspectScope::TextAndDevices } else { InspectScope::Text };
    let what = format!("the headers of {}", job.model.name());
    // Those of the hub, or of the folder here, stand for a folder that is on a cluster; without any
    // the configuration tells their shapes.
    let weights = match &job.model {
        ModelSource::Folder { path } if is_theirs && !has_weights(Path::new(path)) => {
            Some(Weights::Synthetic { seed: 0 })
        }
        _ => job.weights.clone().filter(|_| !is_theirs),
    };
    let seen = JobSpec { weights, ..job.clone() };
    let inspection = context.reporter.waiting(&what, worker.inspect(&seen, check)).await?;
    if push_model {
        let bytes = Bytes(inspection.files.iter().map(|file| file.bytes).sum());
        check_size(job.model.name(), bytes, context.settings.push_limit)?;
    }
    Ok(inspection)
}

/// Whether a folder holds weights, and not the description of a model alone.
fn has_weights(folder: &Path) -> bool {
    let is_weights = |name: &Path| name.extension().is_some_and(|end| end == "safetensors" || end == "bin");
    std::fs::read_dir(folder).into_iter().flatten().flatten().any(|entry| is_weights(&entry.path()))
}

/// A job whose checkpoint lies on the file system that all nodes of a cluster share, or will when
/// it starts: then its node needs no network for it.
struct OnSharedFiles {
    job: JobSpec,
    /// The model to fetch there first.
    stage: Option<Stage>,
}

/// The job with its checkpoint on a cluster's file system: in the given folder, in a hub cache, or
/// fetched by a staging job. `None`: the node fetches it.
///
/// # Errors
/// The folder contains no checkpoint, the model cannot be staged, or the cluster does not answer.
async fn on_shared_files(
    context: &Context,
    clouds: &Clouds,
    job: &JobSpec,
    inspection: &Inspection,
) -> Result<Option<OnSharedFiles>, CliError> {
    let site = context.settings.slurm.as_ref().filter(|_| clouds.names() == slurm::NAME);
    let (Some(site), Some(cloud)) = (site, clouds.get(slurm::NAME)) else { return Ok(None) };
    let read_there = |path: String, stage: Option<Stage>| {
        let (model, label) = (ModelSource::Folder { path }, Some(job.model_name().to_owned()));
        OnSharedFiles { job: JobSpec { model, weights: None, label, ..job.clone() }, stage }
    };
    if let Some(Weights::Local { path }) = &job.weights {
        if is_on_cluster(context, cloud, path).await? {
            return Ok(Some(read_there(path.clone(), None)));
        }
        let hint = "name a folder of the cluster with the whole checkpoint, by its absolute path";
        return Err(CliError::refused(format!("{path} on {} holds no config.json", site.host), hint));
    }
    let ModelSource::Hub { id, .. } = &job.model else { return Ok(None) };
    if let Some(Weights::Hub | Weights::Synthetic { .. }) = job.weights {
        return Ok(None);
    }
    if let (Some(home), Some(commit)) = (&site.hf_home, &inspection.revision) {
        let path = snapshot(home, id, commit);
        if is_on_cluster(context, cloud, &path).await? {
            return Ok(Some(read_there(path, None)));
        }
        context.reporter.say(&format!("{id} is not in hf-home on {}", site.host));
    }
    let Some(partition) = &site.stage_partition else { return Ok(None) };
    let stage = stage(job, id, inspection)?;
    let (files, bytes) = (counted(stage.files.len(), "file"), stage.bytes());
    context.reporter.say(&format!("A job in partition {partition} fetches {id} first: {files}, {bytes}"));
    Ok(Some(read_there(slurm::STAGED.to_owned(), Some(stage))))
}

async fn is_on_cluster(context: &Context, cloud: &Cloud, folder: &str) -> Result<bool, CliError> {
    let look = cloud.call(cloud.broker.has_checkpoint(folder));
    Ok(context.reporter.waiting("the cluster's files", look).await? == Some(true))
}

fn stage(job: &JobSpec, id: &str, inspection: &Inspection) -> Result<Stage, CliError> {
    if let CorpusSource::Dataset(_) = job.corpus.source {
        let message = "--dataset is read from the hub, and --stage-partition fetches the model alone";
        return Err(CliError::refused(message, "take a file as --corpus, which is uploaded; or the built-in text"));
    }
    let files: Vec<FileBytes> = inspection.description.iter().chain(&inspection.files).cloned().collect();
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-+".contains(c);
    let odd = files.iter().find(|file| file.name.starts_with(['.', '-']) || !file.name.chars().all(plain));
    let hint = "download the model on the login node, and say --weights local:DIR";
    match (&inspection.revision, odd) {
        (_, Some(odd)) => {
            let message = format!("{id} has a file with a name that --stage-partition cannot fetch: {:?}", odd.name);
            Err(CliError::refused(message, hint))
        }
        (None, _) => Err(CliError::refused(format!("the hub does not tell the commit of {id}"), hint)),
        (Some(commit), None) => Ok(Stage { model: id.to_owned(), commit: commit.clone(), files }),
    }
}

/// Path of a model in a hub cache.
fn snapshot(hf_home: &str, id: &str, commit: &str) -> String {
    format!("{}/hub/models--{}/snapshots/{commit}", hf_home.trim_end_matches('/'), id.replace('/', "--"))
}

/// The request with the worker's requirements on GPUs.
fn with_gpus(clouds: &Clouds, pushed: &Pushed, job: &JobSpec, request: GpuRequest) -> Result<GpuRequest, CliError> {
    // Without named devices all GPUs are used.
    let uses_gpus = job.devices.is_empty() || job.devices.iter().any(|device| !device.starts_with("cpu"));
    if clouds.is_local() || request.gpu_count == Some(0) || !uses_gpus {
        return Ok(request);
    }
    if pushed.cuda.is_none() {
        let message = format!("{} was built without CUDA: GPUs would be paid for and not used", pushed.path.display());
        let hint = "`outliers worker build --cuda` builds one that uses them; or say --devices cpu, or --gpu-count 0";
        return Err(CliError::refused(message, hint));
    }
    Ok(GpuRequest { worker_cuda: pushed.cuda, ..request })
}

fn check_size(name: &str, bytes: Bytes, limit: Bytes) -> Result<(), CliError> {
    if bytes <= limit {
        return Ok(());
    }
    Err(CliError::refused(
        format!("{name} has {bytes}; at most {limit} are uploaded"),
        "put it on the hub, or raise run.push-limit in the settings",
    ))
}

fn spec(
    context: &Context,
    clouds: &Clouds,
    run_request: RunRequest,
    inspection: &Inspection,
    stage: Option<Stage>,
) -> Result<RunSpec, CliError> {
    let RunRequest { job, job_key, terms } = run_request;
    let disk = match &job.model {
        ModelSource::Hub { .. } => Bytes(inspection.plan.disk_bytes + context.settings.spare_disk.0),
        ModelSource::Folder { .. } if terms.push_model => Bytes(inspection.plan.disk_bytes + OWN_FILES.0),
        ModelSource::Folder { .. } => Bytes(OWN_FILES.0 + stage.as_ref().map_or(0, |stage| stage.bytes().0)),
    };
    let mut request = terms.request;
    let disk = request.min_disk.map_or(disk, |typed| typed.max(disk));
    request.min_disk = Some(disk);
    // This machine may have no GPU, and CPUs have no such limit.
    if !clouds.is_local() && request.gpu_count != Some(0) {
        request.min_vram.get_or_insert(Bytes(inspection.plan.streamed_memory_bytes));
        // None is planned for a run on CPUs.
        request.worker_ram = Some(Bytes(inspection.plan.host_memory_bytes)).filter(|ram| ram.0 > 0);
    }
    let results = terms.results.to_str().map(str::to_owned);
    let output = output::planned(&job, inspection);
    Ok(RunSpec {
        model: job.model_name().to_owned(),
        brokers: clouds.names(),
        job,
        job_key,
        request,
        work: context.work(&inspection.plan),
        disk,
        push_model: terms.push_model,
        keep_running: terms.keep_running,
        detach: terms.detach,
        max_duration_s: terms.max_duration.as_secs(),
        // A kept or detached instance stays until its time limit.
        watch: if terms.keep_running || terms.detach { GuardTimeouts::NEVER } else { context.settings.watch },
        budget: terms.budget,
        max_gpu_time: terms.max_gpu_time,
        quote: Quote::default(),
        only_in_time: !terms.cut_short,
        stage,
        results: results.ok_or_else(|| CliError::refused("the results' folder is not UTF-8", "choose another"))?,
        output,
        survey: terms.survey,
    })
}

/// Asks for consent to spend money on `what`. `words` are the plan and the question.
///
/// # Errors
/// The user declines.
pub(super) fn consent(
    context: &Context,
    clouds: &Clouds,
    yes: bool,
    what: &str,
    words: impl FnOnce() -> (String, String),
) -> Result<(), CliError> {
    if yes || clouds.is_local() {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        let message = format!("this would rent {what}, and there is no terminal to ask on");
        return Err(CliError::refused(message, "add --yes"));
    }
    let (shown, question) = words();
    context.reporter.say(&shown);
    // On a separate line, so that Ctrl-C leaves no incomplete one.
    let _ = writeln!(std::io::stderr(), "{question} [y/N]");
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer);
    match (read, answer.trim()) {
        (Ok(_), "y" | "Y" | "yes") => Ok(()),
        _ => Err(CliError::refused("nothing was rented", "answer y, or add --yes")),
    }
}

/// Checks the free disk for the results of these runs and for the ledger.
///
/// # Errors
/// The free space is too small.
pub(super) fn room<'s>(context: &Context, specs: impl IntoIterator<Item = &'s RunSpec>) -> Result<(), CliError> {
    let mut needed = RESERVE;
    for spec in specs {
        needed = Bytes(needed.0.saturating_add(output::bytes(&spec.output).0));
        fits("the results", needed, Path::new(&spec.results), "`results` in the settings")?;
    }
    fits("the ledger", RESERVE, &context.settings.state, "OUTLIERS_STATE")
}

fn fits(what: &str, needed: Bytes, folder: &Path, setting: &str) -> Result<(), CliError> {
    let Some(free) = free_disk(folder).filter(|free| *free < needed) else { return Ok(()) };
    let message = format!("{what} may need {needed} in {}, and {free} are free there", folder.display());
    Err(CliError::refused(message, format!("make room, or set {setting} to a folder on another disk")))
}

/// Checks that results can be written to `folder`, before anything is rented.
///
/// # Errors
/// They cannot be written.
pub(super) fn writable(folder: &Path) -> Result<(), CliError> {
    let probe = folder.join(format!(".{}.part", random_word(8)));
    let tried = std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&probe, b"x"))
        .and_then(|()| std::fs::remove_file(&probe));
    tried.map_err(|error| {
        CliError::refused(
            format!("results cannot be written to {}: {error}", folder.display()),
            "run the command elsewhere, or set `results` in the settings",
        )
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::run::deploy::tests::fake;
    use crate::run::output::tests::inspection;
    use crate::units::UsdPerHour;

    proptest! {
        #[test]
        fn shown_amount_suffices_as_budget(
            micros in 1i64..200_000_000, limit in 1u64..2_000_000, is_local in any::<bool>(),
        ) {
            let price = UsdPerHour(Usd::from_micros(micros));
            let prepared = |budget| {
                let mut spec = fake::spec(Path::new("results"));
                (spec.max_duration_s, spec.budget) = (limit, budget);
                // As long as the time limit: no second of it may be lacking.
                spec.work.read = Bytes::from_gib(limit);
                let offers = vec![Offer { price, is_local, ..fake::offer("a", 1.0) }];
                let quote = Quote { offers, ..Quote::default() };
                Prepared { spec, inspection: inspection(), quote }.with_ceiling(is_local)
            };
            let free = prepared(None);
            prop_assert_eq!(free.quote.offers.len(), 1, "the offer pays for itself");
            let shown = free.at_most().to_string();
            let typed = Usd::from_dollars(shown.trim_start_matches('$').parse().unwrap());
            let again = prepared(Some(typed));
            prop_assert!(again.quote.offers.len() == 1 && within_budget(&again).is_ok(), "{}", shown);
            prop_assert_eq!(again.at_most().to_string(), shown);
            let little = Usd::from_micros(price.cost(free.spec.limit()).micros() - 1);
            let refused = within_budget(&prepared(Some(little))).map_err(|refused| refused.status.number());
            prop_assert_eq!(refused, Err(4));
        }
    }

    #[test]
    fn model_in_a_shared_cache_is_found_by_commit() {
        assert_eq!(snapshot("/hf/", "a/b", "c0ffee"), "/hf/hub/models--a--b/snapshots/c0ffee");
    }

    #[test]
    fn model_files_are_fetched_first_or_the_run_is_refused() {
        let file = |name: &str, bytes| FileBytes { name: name.into(), bytes };
        let seen = |name: &str| Inspection {
            revision: Some("c0ffee".into()),
            files: vec![file(name, 7)],
            description: vec![file("config.json", 1)],
            ..inspection()
        };
        let mut job = JobSpec::new(ModelSource::Hub { id: "a/b".into(), revision: "main".into() });
        let staged = stage(&job, "a/b", &seen("model-00001-of-00001.safetensors")).unwrap();
        assert_eq!((staged.files.len(), staged.bytes(), staged.commit.as_str()), (2, Bytes(8), "c0ffee"));
        for odd in ["-o", ".token", "a b", "$(x)"] {
            let refused = stage(&job, "a/b", &seen(odd)).unwrap_err();
            assert!(refused.status.number() == 2 && refused.message.contains("cannot fetch"), "{}", refused.message);
        }
        job.corpus.source = CorpusSource::Dataset("fineweb-edu".parse().unwrap());
        let refused = stage(&job, "a/b", &seen("m")).unwrap_err();
        assert!(refused.message.contains("--dataset"), "{}", refused.message);
    }

    #[test]
    fn too_little_disk_is_refused_with_needed_and_free_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("not/yet");
        assert!(fits("the results", Bytes(1), &place, "HERE").is_ok());
        let refused = fits("the results", Bytes(u64::MAX), &place, "HERE").unwrap_err();
        assert_eq!(refused.status.number(), 2);
        let said = ["the results may need 16777216.00 TiB", "not/yet", "are free there"];
        assert!(said.iter().all(|word| refused.message.contains(word)), "{}", refused.message);
        assert_eq!(refused.hint.as_deref(), Some("make room, or set HERE to a folder on another disk"));
    }
}
