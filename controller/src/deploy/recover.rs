//! Carries out what [`reconcile::compare`] finds.

use std::collections::BTreeMap;

use futures::future::join_all;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{DeployEvent, Driver, OnEvent, Ports, Stop, Stuck};
use crate::broker::{BrokerError, Instance, InstanceId};
use crate::clouds::Cloud;
use crate::ledger::{Ledger, now_ms};
use crate::mutant::{Mutant, planted};
use crate::reconcile::{self, Action, Finish};
use crate::run::{Ending, RunEvent, RunState};

/// Brings ledger and clouds into agreement: ends strays, finishes what has nothing left to decide, leaves the rest.
/// Returns what was found.
///
/// # Errors
/// [`Stuck`] when a cloud does not answer, or an instance does not go.
pub async fn recover(ledger: &Ledger, ports: Ports<'_>, on: &OnEvent<'_>) -> Result<Vec<Action>, Stuck> {
    let each = join_all(ports.clouds.iter().map(|cloud| recover_on(ledger, ports, cloud, on))).await;
    let mut actions = Vec::new();
    for found in each {
        actions.extend(found?);
    }
    Ok(actions)
}

async fn recover_on(ledger: &Ledger, ports: Ports<'_>, cloud: &Cloud, on: &OnEvent<'_>) -> Result<Vec<Action>, Stuck> {
    let actions = look(ledger, cloud).await?.actions;
    for action in &actions {
        match action {
            Action::MarkGone { run } => mark_gone(ledger, run)?,
            Action::Finish { run, why } => finish(ledger, ports, on, run, *why).await?,
            Action::Terminate { .. } | Action::Adopt { .. } | Action::LeaveAlone { .. } => {}
        }
    }
    let strays: Vec<&InstanceId> = actions
        .iter()
        .filter_map(|action| if let Action::Terminate { instance, .. } = action { Some(instance) } else { None })
        .collect();
    if !strays.is_empty() {
        end(cloud, on, &strays).await?;
    }
    Ok(actions)
}

/// A cloud's complete list, and what is to be done about it.
#[derive(Debug, Default)]
pub struct Looked {
    /// Ours or not.
    pub listed: Vec<Instance>,
    /// About instances and runs.
    pub actions: Vec<Action>,
}

/// Lists once, or as often as it takes to call a missing instance gone, and compares.
///
/// # Errors
/// [`Stuck`] when the cloud does not answer.
pub async fn look(ledger: &Ledger, cloud: &Cloud) -> Result<Looked, Stuck> {
    let (broker, patience) = (cloud.name(), &cloud.patience);
    let mut missing = BTreeMap::new();
    let absences = if planted(Mutant::JudgesAtOnce) { 1 } else { patience.absences };
    for again in (0..absences).rev() {
        // In this order: a run's intent is in the ledger before its instance can be in a list.
        let listed = cloud.call(cloud.broker.list()).await.map_err(|error| unanswered(&error))?;
        let leases = reconcile::leases(ledger)?;
        reconcile::count_missing(&leases, broker, &listed, &mut missing);
        if again > 0 && !missing.is_empty() {
            tokio::time::sleep(patience.listing_interval).await;
            continue;
        }
        let now = now_ms() / 1000;
        let owner = ledger.owner();
        let actions = reconcile::compare(owner, broker, now, &leases, &listed, &missing, absences);
        return Ok(Looked { listed, actions });
    }
    Ok(Looked::default())
}

fn mark_gone(ledger: &Ledger, run: &str) -> Result<(), Stuck> {
    if let Some(mut run) = ledger.take(run)? {
        let event = match run.state() {
            RunState::Terminating { .. } => RunEvent::Gone,
            _ => RunEvent::Vanished,
        };
        // Its state may have changed since we looked: then it is not gone but somebody's.
        if crate::run::next(run.state(), &event).is_ok() {
            run.append(event)?;
        }
    }
    Ok(())
}

async fn finish(ledger: &Ledger, ports: Ports<'_>, on: &OnEvent<'_>, run: &str, why: Finish) -> Result<(), Stuck> {
    let Some(mut run) = ledger.take(run)? else { return Ok(()) };
    if matches!(run.state(), RunState::Held { .. }) {
        run.append(RunEvent::Terminate)?;
    }
    // Told to stop from the start: it must bring home and end, never rent anew.
    let stop = watch::Sender::new(Stop::Now);
    let ending = match why {
        Finish::Expired => Ending::Deadline,
        Finish::Ending => Ending::Interrupted,
    };
    Driver::new(run, ports, stop.subscribe(), on).stopping_as(ending).drive().await?;
    Ok(())
}

/// Ends instances and waits until complete listings no longer show them.
///
/// # Errors
/// [`Stuck`] when one does not go.
pub async fn end(cloud: &Cloud, on: &OnEvent<'_>, strays: &[&InstanceId]) -> Result<(), Stuck> {
    let patience = &cloud.patience;
    let deadline = Instant::now() + patience.terminate;
    let mut absences = 0;
    let mut trouble = None;
    loop {
        match cloud.call(cloud.broker.list()).await {
            Ok(listed) => {
                let left: Vec<Instance> = listed.into_iter().filter(|i| strays.contains(&&i.id)).collect();
                absences = if left.is_empty() { absences + 1 } else { 0 };
                if absences >= patience.absences {
                    return Ok(());
                }
                for instance in left {
                    on(DeployEvent::Terminating(Box::new(instance.clone())));
                    trouble = cloud.call(cloud.broker.terminate(&instance.id)).await.err();
                }
            }
            Err(error) => trouble = Some(error),
        }
        if Instant::now() >= deadline {
            let why = trouble.map_or_else(|| "it is still listed".to_owned(), |error| error.to_string());
            let names: Vec<&str> = strays.iter().map(|id| id.0.as_str()).collect();
            let message = format!("instances could not be seen gone ({}): {why}", names.join(", "));
            return Err(Stuck::Broker { message });
        }
        tokio::time::sleep(patience.listing_interval).await;
    }
}

fn unanswered(error: &BrokerError) -> Stuck {
    Stuck::Broker { message: format!("it is not known which instances exist: {error}") }
}
