//! `deploy`: pre-flight, plan, consent, and the drive.

use std::io::{BufRead, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use outliers_protocol::{Inspection, JobSpec, ModelSource, Results, Weights, files};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::{Context, SCHEMA, ports, request};
use crate::broker::Offer;
use crate::cli::DeployArgs;
use crate::clouds::{BadHosts, Clouds};
use crate::deploy::{DeployEvent, Driver, Ports, Stop, job_key, recover};
use crate::ledger::{Ledger, RunRecord, RunWriter, now_ms, random_word};
use crate::local_worker::{Check, LocalWorker, corpus_files};
use crate::market;
use crate::reconcile::Action;
use crate::report::tables::TOP;
use crate::report::{Complaint, ExitStatus, Reporter, tables};
use crate::run::{Ending, RunSpec, Watch};
use crate::secret::Secret;
use crate::settings::{DefaultBroker, Span};
use crate::units::{Bytes, Usd};

/// Disk for a run's own files where the checkpoint lies elsewhere.
const OWN_FILES: Bytes = Bytes::from_mib(64);

/// What a deploy came to.
#[derive(Debug, Serialize)]
pub struct Deployed {
    /// Document version.
    pub schema: u32,
    /// The run, with all that happened.
    pub run: RunRecord,
    /// What it cost, in millionths of a dollar.
    pub cost_micro_usd: i64,
    /// What the program ends with.
    pub exit_status: u8,
    /// What the worker counted, where it got so far.
    pub results: Option<Results>,
}

impl Deployed {
    /// From a run that is at rest.
    pub fn of(run: RunRecord) -> Self {
        let results = run.state.results().filter(|results| results.complete).and_then(|results| {
            let text = std::fs::read(Path::new(&results.folder).join(files::RESULTS)).ok()?;
            serde_json::from_slice(&text).ok()
        });
        let exit_status = ExitStatus::of_run(&run.state).number();
        Self { schema: SCHEMA, cost_micro_usd: run.cost(now_ms()).micros(), exit_status, results, run }
    }

    /// What the program ends with.
    pub fn status(&self) -> ExitStatus {
        ExitStatus::of_run(&self.run.state)
    }
}

/// What a deploy would do.
#[derive(Debug, Serialize)]
struct Plan<'a> {
    schema: u32,
    dry_run: bool,
    spec: &'a RunSpec,
    inspection: &'a Inspection,
    /// Best first; the first is rented, the others if it cannot be had.
    offers: &'a [Offer],
    considered: usize,
    /// Price of the first offer until the time limit.
    at_most: Usd,
}

/// Does it.
pub(super) async fn command(context: &Context, args: &DeployArgs) -> Result<ExitStatus, Complaint> {
    let Some(deployed) = deploy(context, args).await? else { return Ok(ExitStatus::Done) };
    tell(context, &deployed);
    Ok(deployed.status())
}

/// Prints what a deploy came to.
pub(super) fn tell(context: &Context, deployed: &Deployed) {
    let cost = Usd::from_micros(deployed.cost_micro_usd);
    context.reporter.result(deployed, || {
        let table = deployed.results.as_ref().map(|results| tables::results(&deployed.run.spec.model, results));
        table.unwrap_or_default() + &tables::epilogue(&deployed.run, cost)
    });
    if let Some(complaint) = complaint_of(&deployed.run) {
        context.reporter.sentence(&complaint);
    }
}

fn complaint_of(run: &RunRecord) -> Option<Complaint> {
    let ending = run.state.ending().filter(|ending| **ending != Ending::Completed)?;
    let hint = match ending {
        Ending::WorkerFailed { failure } => failure.hint.clone(),
        Ending::Failed { trouble } => trouble.hint.clone(),
        Ending::WorkerVanished { .. } => Some(format!("`outliers runs logs {}` shows its last words", run.id)),
        Ending::Deadline => Some("give it more time with --max-duration".to_owned()),
        _ => None,
    };
    Some(Complaint { status: ExitStatus::of_run(&run.state), message: ending.to_string(), hint })
}

/// Deploys, or shows the plan: then `None`.
///
/// # Errors
/// [`Complaint`]: what is wrong; nothing was rented unless its status is 6.
pub(super) async fn deploy(context: &Context, args: &DeployArgs) -> Result<Option<Deployed>, Complaint> {
    let reporter = &context.reporter;
    let clouds = context.clouds(&args.want.broker)?;
    if args.want.broker.is_empty() && context.settings.broker == DefaultBroker::Local {
        reporter.using_this_machine();
    }
    let worker = context.worker().await?;
    let job = super::job::job(&args.model, &args.job, context.settings.thresholds, &context.here)?;
    let key = job_key(&job, &clouds.names()).map_err(|error| Complaint::failed(format!("the corpus: {error}")))?;
    let hosts = context.hosts(worker.path());
    let secrets = secrets(context, &job);
    let bad_hosts = BadHosts::default();
    let ports = ports(&clouds, &bad_hosts, &hosts, &secrets);
    let ledger = context.ledger()?;
    if !args.dry_run
        && let Some(run) = reconcile(reporter, &ledger, ports, &key).await?
    {
        reporter.picked_up(run.record());
        return drive(reporter, run, ports).await.map(Some);
    }
    let inspection = preflight(context, &clouds, &worker, &job, args).await?;
    let spec = spec(context, &clouds, job, key, &inspection, args)?;
    let offers = offers(reporter, &clouds, &spec, &inspection, args.dry_run).await?;
    if args.dry_run {
        return Ok(None);
    }
    consent(context, &clouds, &offers, &spec, args.yes)?;
    writable(Path::new(&spec.results))?;
    let run = ledger.plan(&spec)?;
    reporter.say(&format!("Run {}", run.record().id));
    drive(reporter, run, ports).await.map(Some)
}

/// What the worker of this job is given: a model that is a folder needs nothing of the hub.
pub(super) fn secrets(context: &Context, job: &JobSpec) -> Vec<(&'static str, Secret)> {
    let hub = matches!(job.model, ModelSource::Hub { .. });
    if hub { context.settings.hub_variables() } else { Vec::new() }
}

/// Brings ledger and cloud into agreement; returns the unfinished run of the same work, if nobody drives one.
async fn reconcile(
    reporter: &Reporter,
    ledger: &Ledger,
    ports: Ports<'_>,
    key: &str,
) -> Result<Option<RunWriter>, Complaint> {
    // Taken first: a run that is ours to go on with is nobody's to clean up.
    let run = abandoned(ledger, key)?;
    let found: Vec<Action> = recover(ledger, ports, &|event| reporter.event(event)).await?;
    reporter.recovered(found.iter());
    Ok(run)
}

/// A run of the same work that nobody drives, that is not over, and that has time left.
fn abandoned(ledger: &Ledger, key: &str) -> Result<Option<RunWriter>, Complaint> {
    let now = now_ms() / 1000;
    for run in ledger.runs()?.iter().rev() {
        if run.spec.job_key == key
            && !run.state.is_at_rest()
            && run.deadline().is_none_or(|deadline| deadline > now)
            && let Some(taken) = ledger.take(&run.id)?
            && !taken.state().is_at_rest()
        {
            return Ok(Some(taken));
        }
    }
    Ok(None)
}

/// Everything that can be known to be wrong before anything is rented.
async fn preflight(
    context: &Context,
    clouds: &Clouds,
    worker: &LocalWorker,
    job: &JobSpec,
    args: &DeployArgs,
) -> Result<Inspection, Complaint> {
    let folder = matches!(job.model, ModelSource::Folder { .. });
    if args.push_model && !folder {
        let hint = "a hub model is fetched by the instance";
        return Err(Complaint::refused("--push-model needs a folder as --model", hint));
    }
    if folder && !args.push_model && !clouds.is_local() {
        let hint = "add --push-model to upload it (when it is small), or use a hub id";
        return Err(Complaint::refused("the model is a folder on this machine", hint));
    }
    let limit = context.settings.push_limit;
    if matches!(job.weights, Some(Weights::Local { .. })) && !clouds.is_local() {
        let hint = "leave out --weights: the instance streams them from the hub";
        return Err(Complaint::refused("the weights are a folder on this machine", hint));
    }
    for path in corpus_files(job) {
        check_size(path, Bytes(std::fs::metadata(path).map_or(0, |meta| meta.len())), limit)?;
    }
    // A device list is about the instance; it can be tried here only when the instance is here.
    let check = if clouds.is_local() { Check::TextAndDevices } else { Check::Text };
    let inspection = worker.inspect(job, check).await?;
    if args.push_model {
        check_size(job.model.name(), Bytes(inspection.files.iter().map(|file| file.bytes).sum()), limit)?;
    }
    Ok(inspection)
}

fn check_size(name: &str, bytes: Bytes, limit: Bytes) -> Result<(), Complaint> {
    if bytes <= limit {
        return Ok(());
    }
    Err(Complaint::refused(
        format!("{name} has {bytes}; at most {limit} are uploaded"),
        "put it on the hub, or raise run.push-limit in the settings",
    ))
}

fn spec(
    context: &Context,
    clouds: &Clouds,
    job: JobSpec,
    job_key: String,
    inspection: &Inspection,
    args: &DeployArgs,
) -> Result<RunSpec, Complaint> {
    let disk = match &job.model {
        ModelSource::Hub { .. } => Bytes(inspection.plan.disk_bytes + context.settings.spare_disk.0),
        ModelSource::Folder { .. } if args.push_model => Bytes(inspection.plan.disk_bytes + OWN_FILES.0),
        ModelSource::Folder { .. } => OWN_FILES,
    };
    let mut request = request(&args.want);
    let disk = request.min_disk.map_or(disk, |typed| typed.max(disk));
    request.min_disk = Some(disk);
    let results = context.settings.results.to_str().map(str::to_owned);
    Ok(RunSpec {
        model: job.model.name().to_owned(),
        brokers: clouds.names(),
        job,
        job_key,
        request,
        work: context.work(&inspection.plan),
        disk,
        push_model: args.push_model,
        keep_running: args.keep_running,
        max_duration_s: args.max_duration.map_or(context.settings.max_duration, |span| span.0).as_secs(),
        // An instance that is kept is kept until its time is up.
        watch: if args.keep_running { Watch::NEVER } else { context.settings.watch },
        budget: args.budget.map(Usd::from_dollars),
        results: results.ok_or_else(|| Complaint::refused("the results' folder is not UTF-8", "choose another"))?,
    })
}

/// What can be rented, best first; with `show`, printed as the plan.
async fn offers(
    reporter: &Reporter,
    clouds: &Clouds,
    spec: &RunSpec,
    inspection: &Inspection,
    show: bool,
) -> Result<Vec<Offer>, Complaint> {
    let offered = clouds.offers(&spec.request).await?;
    reporter.offered(&offered);
    let market::Selection { offers, considered, .. } = market::select(offered.offers, &spec.request, &spec.work)?;
    if show {
        let limit = Duration::from_secs(spec.max_duration_s);
        let at_most = offers.first().map_or(Usd::ZERO, |offer| offer.price.cost(limit));
        let plan = Plan { schema: SCHEMA, dry_run: true, spec, inspection, offers: &offers, considered, at_most };
        let head = format!("Nothing is rented. Time limit {}.\n", Span(limit));
        reporter.result(&plan, || head + &tables::needs(inspection) + &tables::offers(&offers, &spec.work, limit, TOP));
    }
    Ok(offers)
}

/// Asks before real money is spent.
fn consent(context: &Context, clouds: &Clouds, offers: &[Offer], spec: &RunSpec, yes: bool) -> Result<(), Complaint> {
    if yes || clouds.is_local() {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Complaint::refused("this would rent an instance, and nobody is there to ask", "add --yes"));
    }
    let limit = Duration::from_secs(spec.max_duration_s);
    context.reporter.say(&tables::offers(offers, &spec.work, limit, TOP));
    let _ = write!(std::io::stderr(), "Rent the first of these, or the next if it cannot be had? [y/N] ");
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer);
    match (read, answer.trim()) {
        (Ok(_), "y" | "Y" | "yes") => Ok(()),
        _ => Err(Complaint::refused("nothing was rented", "answer y, or add --yes")),
    }
}

/// Whether results can come to lie in `folder`; found out before they cost anything.
fn writable(folder: &Path) -> Result<(), Complaint> {
    let probe = folder.join(format!(".{}.part", random_word(8)));
    let tried = std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&probe, b"x"))
        .and_then(|()| std::fs::remove_file(&probe));
    tried.map_err(|error| {
        Complaint::refused(
            format!("results cannot be written to {}: {error}", folder.display()),
            "run the command elsewhere, or set `results` in the settings",
        )
    })
}

/// Drives a run to its end, listening for Ctrl-C.
///
/// # Errors
/// Status 6: its instance may be left.
pub(super) async fn drive(reporter: &Reporter, run: RunWriter, ports: Ports<'_>) -> Result<Deployed, Complaint> {
    let stop = watch::Sender::new(Stop::Go);
    let on = |event| reporter.event(event);
    let driver = Driver::new(run, ports, stop.subscribe(), &on);
    let listen = listen(|level| {
        reporter.event(DeployEvent::Stopping(level));
        stop.send_replace(level);
    });
    let record = tokio::select! {
        record = driver.drive() => record?,
        error = listen => return Err(deaf(&error)),
    };
    Ok(Deployed::of(record))
}

fn deaf(error: &std::io::Error) -> Complaint {
    Complaint {
        status: ExitStatus::InstanceLeft,
        message: format!("signals cannot be heard: {error}"),
        hint: Some("an instance may still be running: outliers instances list".to_owned()),
    }
}

/// Ctrl-C and its like, for ever: the first stops, the second skips the results. Nothing skips the end of the instance.
async fn listen(heard: impl Fn(Stop)) -> std::io::Error {
    let signals = || {
        let (interrupt, terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        std::io::Result::Ok((interrupt, terminate, signal(SignalKind::hangup())?))
    };
    let (mut interrupt, mut terminate, mut hangup) = match signals() {
        Ok(signals) => signals,
        Err(error) => return error,
    };
    let mut level = Stop::Go;
    loop {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
        let next = if level == Stop::Go { Stop::Now } else { Stop::SkipSync };
        if next != level {
            level = next;
            heard(level);
        }
    }
}
