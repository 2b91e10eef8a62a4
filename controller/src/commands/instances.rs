//! `instances`: a broker's list, and what this program makes of it.

use std::io::{BufRead, IsTerminal, Write};

use serde::Serialize;

use super::{Cloud, Context, SCHEMA, runs};
use crate::broker::{Instance, InstanceId};
use crate::cli::InstancesCommand;
use crate::deploy::{Stop, look};
use crate::ledger::Ledger;
use crate::reconcile::Action;
use crate::report::{Complaint, ExitStatus, tables};

#[derive(Serialize)]
struct Listed<'a> {
    schema: u32,
    broker: &'a str,
    instances: Vec<Shown<'a>>,
}

#[derive(Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    instance: &'a Instance,
    /// What this program makes of it, in words.
    what_it_is: String,
}

/// Does it.
pub(super) async fn command(context: &Context, command: InstancesCommand) -> Result<ExitStatus, Complaint> {
    let ledger = context.ledger()?;
    match command {
        InstancesCommand::List { broker } => list(context, &ledger, &context.cloud(broker.as_deref())?).await,
        InstancesCommand::Terminate { ids, all, broker, yes } => {
            let cloud = context.cloud(broker.as_deref())?;
            let listed = cloud.broker.list().await?;
            let chosen = choose(&ledger, &listed, &ids, all)?;
            consent(context, &cloud, &chosen, all, yes)?;
            terminate(context, &ledger, &cloud, &chosen).await
        }
    }
}

async fn list(context: &Context, ledger: &Ledger, cloud: &Cloud) -> Result<ExitStatus, Complaint> {
    let hosts = context.hosts(&context.exe);
    let actions: Vec<Action> = look(ledger, cloud.ports(&hosts, &[]), &cloud.patience).await?;
    let listed = cloud.broker.list().await?;
    let shown = listed.iter().map(|instance| Shown { instance, what_it_is: tables::what_it_is(instance, &actions) });
    let document = Listed { schema: SCHEMA, broker: cloud.broker.name(), instances: shown.collect() };
    context.reporter.result(&document, || tables::instances(&listed, &actions));
    Ok(ExitStatus::Done)
}

/// The instances that are meant; all of them this ledger's.
fn choose<'a>(
    ledger: &Ledger,
    listed: &'a [Instance],
    ids: &[String],
    all: bool,
) -> Result<Vec<&'a Instance>, Complaint> {
    let ours = |instance: &&Instance| instance.tag().is_some_and(|tag| tag.owner == ledger.owner());
    if all {
        return Ok(listed.iter().filter(ours).collect());
    }
    let find = |id: &String| {
        let found = listed.iter().find(|instance| instance.id.0 == *id);
        let found = found.ok_or_else(|| {
            Complaint::refused(format!("there is no instance `{id}`"), "see `outliers instances list`")
        })?;
        Some(found).filter(ours).ok_or_else(|| {
            Complaint::refused(format!("instance {id} was not rented by this ledger"), "end it where it was rented")
        })
    };
    ids.iter().map(find).collect()
}

/// All of them at once wants more than a letter, where they cost something.
fn consent(context: &Context, cloud: &Cloud, chosen: &[&Instance], all: bool, yes: bool) -> Result<(), Complaint> {
    if yes || cloud.is_local || chosen.is_empty() {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Complaint::refused("nobody is there to ask", "add --yes"));
    }
    let word = if all { chosen.len().to_string() } else { "y".to_owned() };
    context.reporter.say(&format!("{} instances end, with all that is on them.", chosen.len()));
    let _ = write!(std::io::stderr(), "Type {word} to go on: ");
    let mut answer = String::new();
    match std::io::stdin().lock().read_line(&mut answer) {
        Ok(_) if answer.trim() == word => Ok(()),
        _ => Err(Complaint::refused("nothing was ended", format!("type {word}, or add --yes"))),
    }
}

async fn terminate(
    context: &Context,
    ledger: &Ledger,
    cloud: &Cloud,
    chosen: &[&Instance],
) -> Result<ExitStatus, Complaint> {
    for instance in chosen {
        end(context, ledger, cloud, instance).await?;
    }
    let ended: Vec<&InstanceId> = chosen.iter().map(|instance| &instance.id).collect();
    let document = serde_json::json!({ "schema": SCHEMA, "broker": cloud.broker.name(), "ended": ended });
    context.reporter.result(&document, || match ended.len() {
        0 => "no instances to end".to_owned(),
        1 => "1 instance ended, and seen gone".to_owned(),
        n => format!("{n} instances ended, and seen gone"),
    });
    Ok(ExitStatus::Done)
}

/// Through its run where it has one, so that the ledger knows; else at the broker.
async fn end(context: &Context, ledger: &Ledger, cloud: &Cloud, instance: &Instance) -> Result<(), Complaint> {
    let run = instance.tag().and_then(|tag| ledger.run(&tag.run).ok());
    if let Some(run) = run.filter(|run| !run.state.is_closed() && run.state.tag() == instance.tag().as_ref()) {
        let Some(taken) = ledger.take(&run.id)? else {
            let hint = format!("`outliers runs cancel {}` ends it", run.id);
            return Err(Complaint::refused(format!("a process drives run {} on it", run.id), hint));
        };
        return runs::end(context, taken, Stop::SkipSync).await.map(drop);
    }
    let hosts = context.hosts(&context.exe);
    let ports = cloud.ports(&hosts, &[]);
    Ok(crate::deploy::end(ports, &cloud.patience, &|event| context.reporter.event(event), &[&instance.id]).await?)
}
