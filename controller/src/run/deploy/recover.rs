//! Carries out what [`reconcile::compare`] finds.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::watch;

use super::terminate::{Bill, InstanceTerminator};
use super::{DriveError, Driver, OnEvent, Ports, Stop};
use crate::cloud::broker::{BrokerError, Instance, InstanceId, Offer};
use crate::cloud::clouds::{Cloud, Clouds};
use crate::run::ledger::{Ledger, RunWriter, now_ms};
use crate::run::reconcile::{self, Action, Finish};
use crate::run::{RunEvent, RunOutcome, RunState};
use crate::units::UsdPerHour;

/// Reconciles ledger and clouds: ends strays and finishes runs without an open decision. Returns
/// all findings.
///
/// # Errors
/// [`DriveError`] if a cloud does not answer, or an instance cannot be terminated.
pub(crate) async fn recover(ledger: &Ledger, ports: Ports<'_>, on: &OnEvent<'_>) -> Result<Vec<Action>, DriveError> {
    let each = join_all(ports.clouds.iter().map(|cloud| recover_on(ledger, ports, cloud, on))).await;
    let mut actions = Vec::new();
    for found in each {
        actions.extend(found?);
    }
    Ok(actions)
}

async fn recover_on(
    ledger: &Ledger,
    ports: Ports<'_>,
    cloud: &Cloud,
    on: &OnEvent<'_>,
) -> Result<Vec<Action>, DriveError> {
    let reconciliation = reconcile_cloud(Some(ledger), cloud).await?;
    apply_actions(ledger, ports, cloud, &reconciliation, on).await?;
    Ok(reconciliation.actions)
}

/// Performs all actions that the comparison found. A failed action does not stop the others.
///
/// # Errors
/// The first [`DriveError`].
pub(crate) async fn apply_actions(
    ledger: &Ledger,
    ports: Ports<'_>,
    cloud: &Cloud,
    reconciliation: &Reconciliation,
    on: &OnEvent<'_>,
) -> Result<(), DriveError> {
    // What is on this cloud is not looked for on another, and nothing is rented anew.
    let alone = Clouds::from(vec![cloud.clone()]);
    let ports = Ports { clouds: &alone, ..ports };
    let mut done = Ok(());
    for action in &reconciliation.actions {
        let this = match action {
            Action::MarkGone { run, instance } => mark_gone(ledger, cloud, run, instance),
            Action::Finish { run, why } => finish(ledger, ports, on, run, *why).await,
            Action::Terminate { .. } | Action::Adopt { .. } | Action::LeaveAlone { .. } => Ok(()),
        };
        done = done.and(this);
    }
    let ended: HashSet<&InstanceId> = reconciliation
        .actions
        .iter()
        .filter_map(|action| if let Action::Terminate { instance, .. } = action { Some(instance) } else { None })
        .collect();
    let is_stray = |instance: &&Instance| ended.contains(&instance.id);
    let strays: Vec<Target> = reconciliation.listed.iter().filter(is_stray).map(Target::from).collect();
    if !strays.is_empty() {
        done = done.and(end(cloud, on, &strays).await);
    }
    done
}

/// A cloud's complete list, and the actions it requires.
#[derive(Debug, Default)]
pub(crate) struct Reconciliation {
    pub(crate) listed: Vec<Instance>,
    pub(crate) actions: Vec<Action>,
}

/// Compares the ledger with a cloud's list, listing again until a missing instance counts as gone.
/// Without a ledger the tags alone are compared, and no action results.
///
/// # Errors
/// [`DriveError`] if the cloud does not answer.
pub(crate) async fn reconcile_cloud(ledger: Option<&Ledger>, cloud: &Cloud) -> Result<Reconciliation, DriveError> {
    let Some(ledger) = ledger else {
        let listed = cloud.call(cloud.broker.list()).await.map_err(|error| unanswered(&error, true))?;
        let actions = reconcile::by_tag(&listed);
        return Ok(Reconciliation { listed, actions });
    };
    let (is_here, timeouts) = (|offer: &Offer| cloud.broker.made(offer), &cloud.timeouts);
    let mut missing = BTreeMap::new();
    for again in (0..timeouts.absences).rev() {
        // In this order, since a run's intent is recorded before its instance can be listed.
        let before = reconcile::leases(ledger)?;
        let known: Vec<&InstanceId> = reconcile::abandoned_on(&before, &is_here).collect();
        let open = before.iter().any(|lease| lease.may_be_on(&is_here));
        let mut listed = cloud.list(&known).await.map_err(|error| unanswered(&error, open))?;
        let leases = reconcile::leases(ledger)?;
        let elsewhere = reconcile::elsewhere(&leases, &is_here);
        listed.retain(|instance| !elsewhere.contains(&instance.name));
        reconcile::count_missing(&leases, &is_here, &listed, &mut missing);
        if again > 0 && !missing.is_empty() {
            tokio::time::sleep(timeouts.listing_interval).await;
            continue;
        }
        // Deadlines follow the cloud's clock.
        let now = cloud.time(ledger.now_ms() / 1000);
        let owner = ledger.owner();
        let actions = reconcile::compare(owner, &is_here, now, &leases, &listed, &missing, timeouts.absences);
        return Ok(Reconciliation { listed, actions });
    }
    Ok(Reconciliation::default())
}

fn mark_gone(ledger: &Ledger, cloud: &Cloud, run: &str, instance: &InstanceId) -> Result<(), DriveError> {
    // It may have got another instance since the listing.
    let has_it = |run: &RunWriter| run.state().rental().is_some_and(|rental| rental.instance == *instance);
    if let Some(mut run) = ledger.take(run)?.filter(has_it) {
        let event = match run.state() {
            RunState::Terminating { .. } => RunEvent::Gone,
            _ => RunEvent::Vanished,
        };
        // The state may have changed since the listing. Then another process drives the run.
        if crate::run::next(run.state(), &event).is_ok() {
            let time = run.state().rental().and_then(|rental| cloud.broker.run_time(&rental.instance));
            if let Some(time) = time.and_then(|time| run.record().news(time)) {
                run.append(RunEvent::Metered { time })?;
            }
            run.append(event)?;
        }
    }
    Ok(())
}

async fn finish(ledger: &Ledger, ports: Ports<'_>, on: &OnEvent<'_>, run: &str, why: Finish) -> Result<(), DriveError> {
    let Some(mut run) = ledger.take(run)? else { return Ok(()) };
    release(&mut run, ports, on).await?;
    // The run is stopped from the start: it saves its results and ends, and never rents again.
    let stop = watch::Sender::new(Stop::Now);
    let ending = match why {
        Finish::Expired => RunOutcome::Deadline,
        Finish::Ending => RunOutcome::Interrupted,
    };
    Driver::new(run, ports, stop.subscribe(), on).stopping_as(ending).drive().await?;
    Ok(())
}

/// Releases a held run. If the ledger cannot be written, its instance is terminated directly.
///
/// # Errors
/// [`DriveError`]. The instance is gone unless the error says otherwise.
pub(crate) async fn release(run: &mut RunWriter, ports: Ports<'_>, on: &OnEvent<'_>) -> Result<(), DriveError> {
    let RunState::Held { rental, .. } = run.state().clone() else { return Ok(()) };
    let Err(error) = run.append(RunEvent::Terminate) else { return Ok(()) };
    if let Some(cloud) = ports.clouds.of(&rental.offer) {
        end(cloud, on, &[Target { price: Some(rental.price), ..Target::of(&rental.instance) }]).await?;
    }
    Err(error.into())
}

/// An instance to terminate.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) id: InstanceId,
    /// Its price, if known.
    pub(crate) price: Option<UsdPerHour>,
    /// Its creation in Unix seconds, if known.
    pub(crate) since: Option<u64>,
}

impl Target {
    /// An instance with an unknown price and age.
    pub(crate) fn of(id: &InstanceId) -> Self {
        Self { id: id.clone(), price: None, since: None }
    }

    fn bill(&self) -> Bill {
        let hours = self.since.map(|since| Duration::from_secs((now_ms() / 1000).saturating_sub(since)));
        Bill { price: self.price, cost: self.price.zip(hours).map(|(price, time)| price.cost(time)) }
    }
}

impl From<&Instance> for Target {
    fn from(instance: &Instance) -> Self {
        Self { price: instance.price, since: instance.created_at, ..Self::of(&instance.id) }
    }
}

/// Terminates instances and waits until complete listings no longer show them. If the cloud gives
/// no list, each is terminated and queried by its id.
///
/// # Errors
/// [`DriveError`] if one cannot be terminated.
pub(crate) async fn end(cloud: &Cloud, on: &OnEvent<'_>, targets: &[Target]) -> Result<(), DriveError> {
    let ids: Vec<&InstanceId> = targets.iter().map(|target| &target.id).collect();
    let ender = InstanceTerminator::new(cloud, on);
    let gone = ender.until_gone(targets.to_vec(), Target::bill, || cloud.those_of(&ids)).await;
    gone.map_err(|why| {
        let names: Vec<&str> = ids.iter().map(|id| id.0.as_str()).collect();
        DriveError::Broker { message: format!("instances could not be seen gone ({}): {why}", names.join(", ")) }
    })
}

/// The error for a missing list, by whether it may contain an instance of this program.
fn unanswered(error: &BrokerError, open: bool) -> DriveError {
    let message = format!("it is not known which instances exist: {error}");
    if open { DriveError::Broker { message } } else { DriveError::Silent { message, hint: error.hint() } }
}
