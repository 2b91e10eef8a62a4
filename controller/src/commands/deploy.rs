//! `deploy`: checks, plan, consent, and driving the run.

use std::path::Path;

use outliers_protocol::Inspection;
use serde::Serialize;

use super::drive::{Deployed, drive};
use super::instances::LISTS;
use super::prepare::{Prepared, RunRequest, consent, identity, prepare, room, secrets, writable};
use super::{Context, SCHEMA, ports};
use crate::calendar::rfc3339;
use crate::cli::settings::{DefaultBroker, DeployRequest, Span};
use crate::cloud::broker::InstanceId;
use crate::cloud::clouds::{BadHosts, Clouds};
use crate::cloud::market::Quote;
use crate::run::deploy::{JobIdentity, Ports, recover};
use crate::run::ledger::{Ledger, RunRecord, RunWriter, now_ms};
use crate::run::reconcile::Action;
use crate::run::{RunOutcome, RunSpec};
use crate::ui::report::tables::TOP;
use crate::ui::report::{CliError, ExitStatus, Reporter, tables};
use crate::units::{Usd, UsdPerHour};

/// The plan that `deploy` shows.
#[derive(Debug, Serialize)]
struct Plan<'a> {
    schema: u32,
    dry_run: bool,
    spec: &'a RunSpec,
    inspection: &'a Inspection,
    /// The first offer is rented, or the next ones if it is unavailable.
    #[serde(flatten)]
    quote: &'a Quote,
    /// Maximum total cost of all rentals.
    at_most: Usd,
}

pub(super) async fn command(context: &Context, asked: &DeployRequest) -> Result<ExitStatus, CliError> {
    let Some(deployed) = deploy(context, asked).await? else { return Ok(ExitStatus::Done) };
    if !deployed.run.state.is_at_rest() {
        tell_of_detached(context, &deployed.run);
        return Ok(ExitStatus::Done);
    }
    print_result(context, &deployed);
    Ok(deployed.status())
}

/// A run whose worker continues without a local process.
#[derive(Serialize)]
struct Detached<'a> {
    schema: u32,
    detached: bool,
    run: &'a RunRecord,
    broker: Option<&'a str>,
    instance: Option<&'a InstanceId>,
    price: Option<UsdPerHour>,
    /// Maximum total cost until the deadline.
    at_most: Usd,
    /// Unix seconds until which it may bill.
    deadline: Option<u64>,
    /// Commands to continue with.
    commands: [String; 3],
    exit_status: u8,
}

fn tell_of_detached(context: &Context, run: &RunRecord) {
    let (id, rental) = (&run.id, run.state.rental());
    let document = Detached {
        schema: SCHEMA,
        detached: true,
        run,
        broker: rental.map(|rental| rental.offer.broker.as_str()),
        instance: rental.map(|rental| &rental.instance),
        price: rental.map(|rental| rental.price),
        at_most: run.at_most(now_ms()),
        deadline: run.ends_at(),
        commands: [
            format!("outliers attach {id}"),
            format!("outliers runs logs {id} -f"),
            "outliers status --watch".to_owned(),
        ],
        exit_status: ExitStatus::Done.number(),
    };
    context.reporter.result(&document, || in_words(&document));
}

fn in_words(detached: &Detached<'_>) -> String {
    let Detached { run, broker, instance, price, at_most, deadline, commands: [attach, logs, status], .. } = detached;
    let instance = instance.map(ToString::to_string).unwrap_or_default();
    let (broker, price) = (broker.unwrap_or_default(), price.map(|price| price.to_string()).unwrap_or_default());
    let until = deadline.map(rfc3339).unwrap_or_default();
    let width = logs.len();
    format!(
        "run {} works on, on instance {instance} of {broker}, at {price}\n\
         it may bill until {until}, {at_most} in all\n\
         then its guard ends it, or its cloud, and what nobody fetched is lost\n\n  \
         {attach:width$}  saves its results and ends the instance\n  \
         {logs}  what its worker says\n  \
         {status:width$}  what it costs\n",
        run.id,
    )
}

pub(super) fn print_result(context: &Context, deployed: &Deployed) {
    let cost = Usd::from_micros(deployed.cost_micro_usd);
    context.reporter.result(deployed, || deployed.table() + &tables::epilogue(&deployed.run, cost));
    if let Some(cli_error) = cli_error_of(&deployed.run) {
        context.reporter.sentence(&cli_error);
    }
}

/// The error of a finished run that did not complete.
pub(super) fn cli_error_of(run: &RunRecord) -> Option<CliError> {
    let ending = run.state.ending().filter(|ending| **ending != RunOutcome::Completed)?;
    let hint = match ending {
        RunOutcome::WorkerVanished { .. } => Some(format!("`outliers runs logs {}` shows its last words", run.id)),
        RunOutcome::Deadline => Some("give it more time with --max-duration".to_owned()),
        other => other.hint().map(str::to_owned),
    };
    Some(CliError { status: ExitStatus::of_run(&run.state), message: ending.to_string(), hint })
}

/// Deploys, or shows the plan and returns `None`.
///
/// # Errors
/// [`CliError`]. Nothing was rented unless its status is 6.
pub(super) async fn deploy(context: &Context, asked: &DeployRequest) -> Result<Option<Deployed>, CliError> {
    let reporter = &context.reporter;
    let clouds = context.clouds(&asked.brokers)?;
    if asked.brokers.is_empty() && context.settings.broker == DefaultBroker::Local {
        reporter.using_this_machine();
    }
    if asked.terms.detach {
        end_by_themselves(&clouds)?;
    }
    let worker = context.worker().await?;
    let job = super::job::job(&asked.job)?;
    let identity = identity(context, &job)?;
    let key = identity.key(&clouds.names());
    let hosts = context.hosts_for(&worker);
    let bad_hosts = BadHosts::default();
    let ports = ports(&clouds, &bad_hosts, &hosts, &[]);
    let ledger = context.ledger()?;
    if !asked.dry_run
        && let Some(run) = reconcile(reporter, &ledger, ports, &key).await?
    {
        reporter.resumed(run.record());
        let secrets = secrets(context, &run.record().spec.job, 1);
        let clouds = context.clouds_to_go_on(run.record(), &clouds)?;
        let ports = Ports { clouds: &clouds, secrets: &secrets, ..ports };
        return drive(reporter, run, ports, asked.terms.detach).await.map(Some);
    }
    tell_of_the_same(reporter, &ledger, &identity)?;
    let run_request = RunRequest { job, job_key: key, terms: asked.terms.clone() };
    let prepared = prepare(context, &clouds, &worker, run_request, |offered| reporter.offered(offered)).await?;
    room(context, [&prepared.spec])?;
    if asked.dry_run {
        show(reporter, &prepared);
        return Ok(None);
    }
    consent(context, &clouds, asked.yes, "an instance", || {
        let at_most = prepared.at_most();
        (market(&prepared), format!("Rent the first, or else the next, for at most {at_most} in all?"))
    })?;
    writable(Path::new(&prepared.spec.results))?;
    let at_most = prepared.at_most();
    let run = ledger.plan(&prepared.signed())?;
    reporter.say(&format!("Run {}", run.record().id));
    if run.record().spec.quote.ceiling.is_some() {
        reporter.say(&format!("It costs at most {at_most}"));
    }
    // A checkpoint on a cluster needs no token.
    let secrets = secrets(context, &run.record().spec.job, 1);
    drive(reporter, run, Ports { secrets: &secrets, ..ports }, asked.terms.detach).await.map(Some)
}

/// Checks that each of these clouds ends an abandoned instance.
fn end_by_themselves(clouds: &Clouds) -> Result<(), CliError> {
    let Some(cloud) = clouds.iter().find(|cloud| !cloud.broker.capabilities().ends_by_itself()) else { return Ok(()) };
    let message = format!(
        "--detach leaves an instance alone, and {} keeps no deadline and gives it no means to end itself",
        cloud.name()
    );
    let hint = "name other clouds with --broker; or leave out --detach and keep the command running, under nohup";
    Err(CliError::refused(message, hint))
}

/// Reports active or complete runs of the same job, on any cloud, so that nobody pays twice
/// unknowingly.
fn tell_of_the_same(reporter: &Reporter, ledger: &Ledger, identity: &JobIdentity) -> Result<(), CliError> {
    for run in ledger.runs()? {
        let id = &run.id;
        let complete = run.state.results().filter(|_| run.state.ending() == Some(&RunOutcome::Completed));
        let words = match complete {
            _ if identity.key(&run.spec.brokers) != run.spec.job_key => continue,
            Some(results) => format!("is complete: {}", results.folder),
            None if !run.state.is_at_rest() => format!("is under way: `outliers runs show {id}`"),
            None => continue,
        };
        reporter.say(&format!("Run {id} of the same job {words}"));
    }
    Ok(())
}

/// The offers, and what was left out.
fn market(prepared: &Prepared) -> String {
    let Prepared { spec, quote, .. } = prepared;
    let agreed = quote.ceiling.map(|_| prepared.at_most());
    let offers = tables::offers(&quote.offers, &spec.work, spec.limit(), agreed, TOP);
    tables::paragraphs(&(offers + &tables::steps(quote.considered, &quote.steps)))
}

/// Prints the plan.
fn show(reporter: &Reporter, prepared: &Prepared) {
    let Prepared { spec, inspection, quote } = prepared;
    let plan = Plan { schema: SCHEMA, dry_run: true, spec, inspection, quote, at_most: prepared.at_most() };
    let head = format!("Nothing is rented. Time limit {}.\n\n", Span(spec.limit()));
    reporter.result(&plan, || head + &tables::needs(inspection) + "\n" + &market(prepared));
}

/// Reconciles ledger and cloud. Returns the abandoned run of the same work, if there is one.
async fn reconcile(
    reporter: &Reporter,
    ledger: &Ledger,
    ports: Ports<'_>,
    key: &str,
) -> Result<Option<RunWriter>, CliError> {
    // Taken first, so that the recovery does not end the run to resume.
    let run = abandoned(ledger, key)?;
    let on = |event| reporter.event(event);
    let found: Vec<Action> = reporter.waiting(LISTS, recover(ledger, ports, &on)).await?;
    reporter.recovered(found.iter());
    reporter.unreadable(&ledger.records()?.unreadable);
    Ok(run)
}

/// An abandoned run of the same work with time left.
fn abandoned(ledger: &Ledger, key: &str) -> Result<Option<RunWriter>, CliError> {
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
