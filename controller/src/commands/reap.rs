//! `reap`: ends instances whose time is up, by the clouds' lists alone.
//!
//! It needs no ledger: an instance's tag says whose it is and when it had to end. That makes it the last of the dead men's
//! switches, for a timer or for a machine that knows nothing of the runs.

use std::io::{BufRead, IsTerminal, Write};
use std::time::Duration;

use futures::future::join_all;
use serde::Serialize;

use super::{Context, SCHEMA};
use crate::broker::{Instance, InstanceId, LeaseTag};
use crate::cli::ReapArgs;
use crate::clouds::Cloud;
use crate::deploy::{end, recover};
use crate::ledger::now_ms;
use crate::reconcile::overdue;
use crate::report::{Complaint, ExitStatus, tables};
use crate::settings::Span;

#[derive(Serialize)]
struct Document {
    schema: u32,
    dry_run: bool,
    /// Instances whose time is up.
    overdue: Vec<Overdue>,
    /// Clouds whose list is not known, runs and instances that do not end, in words.
    troubles: Vec<String>,
}

#[derive(Serialize)]
struct Overdue {
    #[serde(flatten)]
    instance: Instance,
    owner: String,
    run: String,
    /// Since its time was up.
    seconds: u64,
    /// It is ended, and a complete list no longer shows it.
    gone: bool,
}

/// Does it.
pub(super) async fn command(context: &Context, args: &ReapArgs) -> Result<ExitStatus, Complaint> {
    let ledger = context.ledger()?;
    let clouds = super::instances::clouds(context, &args.only)?;
    let (mut found, mut troubles) = (Vec::new(), Vec::new());
    if !args.dry_run {
        // Runs of this ledger end as runs do, results first.
        let (hosts, bad_hosts) = (context.hosts(&context.exe), Default::default());
        let ports = super::ports(&clouds, &bad_hosts, &hosts, &[]);
        match recover(&ledger, ports, &|event| context.reporter.event(event)).await {
            Ok(actions) => context.reporter.recovered(actions.iter()),
            Err(stuck) => troubles.push(stuck.to_string()),
        }
    }
    let owner = args.owner.as_deref().unwrap_or(ledger.owner());
    let owner = (!args.all_owners).then_some(owner);
    for (cloud, listed) in join_all(clouds.iter().map(list)).await {
        match listed {
            Ok(listed) => found.push((cloud, overdue_of(listed, owner))),
            Err(why) => troubles.push(why),
        }
    }
    let all: usize = found.iter().map(|(_, instances)| instances.len()).sum();
    if !args.dry_run && args.all_owners {
        consent(context, all, args.yes)?;
    }
    if !args.dry_run {
        let ends = found.iter_mut().map(|(cloud, instances)| end_all(context, cloud, instances));
        troubles.extend(join_all(ends).await.into_iter().flatten());
    }
    let overdue: Vec<Overdue> = found.into_iter().flat_map(|(_, instances)| instances).collect();
    let document = Document { schema: SCHEMA, dry_run: args.dry_run, overdue, troubles };
    context.reporter.result(&document, || in_words(&document));
    match document.troubles.first() {
        None => Ok(ExitStatus::Done),
        // What cannot be seen may be running, too.
        Some(why) => Err(Complaint {
            status: ExitStatus::InstanceLeft,
            message: why.clone(),
            hint: Some("an instance may still be running and billing; the same command tries again".to_owned()),
        }),
    }
}

async fn list(cloud: &Cloud) -> (&Cloud, Result<Vec<Instance>, String>) {
    let listed = cloud.call(cloud.broker.list()).await;
    (cloud, listed.map_err(|error| format!("it is not known which instances exist: {error}")))
}

fn overdue_of(listed: Vec<Instance>, owner: Option<&str>) -> Vec<Overdue> {
    let now = now_ms() / 1000;
    let judge = |instance: Instance| {
        let LeaseTag { owner, run, deadline, .. } = overdue(owner, now, &instance)?;
        Some(Overdue { instance, owner, run, seconds: now.saturating_sub(deadline), gone: false })
    };
    listed.into_iter().filter_map(judge).collect()
}

/// Ends them and waits until they are gone; why not, if one stays.
async fn end_all(context: &Context, cloud: &Cloud, instances: &mut [Overdue]) -> Option<String> {
    if instances.is_empty() {
        return None;
    }
    let ids: Vec<&InstanceId> = instances.iter().map(|overdue| &overdue.instance.id).collect();
    match end(cloud, &|event| context.reporter.event(event), &ids).await {
        Ok(()) => {
            instances.iter_mut().for_each(|overdue| overdue.gone = true);
            None
        }
        Err(stuck) => Some(stuck.to_string()),
    }
}

/// Other people's instances: asked twice, the second time for their number.
fn consent(context: &Context, all: usize, yes: u8) -> Result<(), Complaint> {
    if all == 0 || yes >= 2 {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Complaint::refused(
            format!("{all} instances may be other people's, and nobody is there to ask"),
            "say --yes twice, or leave --all-owners out",
        ));
    }
    for (question, answer) in
        [("End instances of every owner? [y/N]", "y".to_owned()), ("How many are they?", all.to_string())]
    {
        context.reporter.say(question);
        let _ = std::io::stderr().flush();
        let mut typed = String::new();
        let read = std::io::stdin().lock().read_line(&mut typed);
        if read.is_err() || typed.trim() != answer {
            return Err(Complaint::refused("nothing was ended", "see them with --dry-run"));
        }
    }
    Ok(())
}

fn in_words(document: &Document) -> String {
    if document.overdue.is_empty() {
        return "no instance is overdue".to_owned();
    }
    let mut table = tables::table(&["broker", "instance", "owner", "run", "overdue for", "price", ""]);
    for overdue in &document.overdue {
        let became = match (document.dry_run, overdue.gone) {
            (true, _) => "would be ended",
            (false, true) => "ended, and seen gone",
            (false, false) => "STILL THERE",
        };
        let price = overdue.instance.price.map(|price| price.to_string()).unwrap_or_default();
        let since = Span(Duration::from_secs(overdue.seconds)).to_string();
        let Instance { broker, id, .. } = &overdue.instance;
        table.add_row([broker, &id.0, &overdue.owner, &overdue.run, &since, &price, became].map(tables::text));
    }
    format!("{table}\n")
}
