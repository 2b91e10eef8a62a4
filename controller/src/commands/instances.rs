//! `instances`: the clouds' lists, and what this program makes of them.

use std::io::{BufRead, IsTerminal, Write};
use std::process::Command;

use futures::future::join_all;
use serde::Serialize;

use super::{Context, SCHEMA, ports, runs};
use crate::broker::{Instance, InstanceState, SshEndpoint};
use crate::cli::{InstancesCommand, Only};
use crate::clouds::{BadHosts, Cloud, Clouds};
use crate::deploy::{KEY_FILE, Looked, Stop, look};
use crate::ledger::{Ledger, RunRecord};
use crate::report::{Complaint, ExitStatus, tables};
use crate::run::{Pin, RunEvent};
use crate::transport::quote::quote;

#[derive(Serialize)]
struct Listed<'a> {
    schema: u32,
    instances: Vec<Shown<'a>>,
    /// Clouds whose list is not known, in their words.
    silent: Vec<String>,
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
        InstancesCommand::List { only } => list(context, &ledger, &clouds(context, &only)?).await,
        InstancesCommand::Show { id, only } => show(context, &ledger, &clouds(context, &only)?, &id).await,
        InstancesCommand::Ssh { id, run, only } => {
            let clouds = clouds(context, &only)?;
            let (_, instance) = find(&clouds, &id).await?;
            ssh(context, &ledger, &instance, run)
        }
        InstancesCommand::Terminate { ids, all, only, yes } => {
            let clouds = clouds(context, &only)?;
            let chosen = choose(&ledger, &clouds, &ids, all).await?;
            consent(context, &chosen, all, yes)?;
            terminate(context, &ledger, &clouds, &chosen).await
        }
    }
}

/// Those that were named, else all that can be asked: a forgotten instance may be on any of them.
pub(super) fn clouds(context: &Context, only: &Only) -> Result<Clouds, Complaint> {
    if only.broker.is_empty() { context.all_clouds() } else { context.clouds(&only.broker) }
}

async fn list(context: &Context, ledger: &Ledger, clouds: &Clouds) -> Result<ExitStatus, Complaint> {
    let (mut looks, mut silent) = (Vec::new(), Vec::new());
    for looked in join_all(clouds.iter().map(|cloud| look(ledger, cloud))).await {
        match looked {
            Ok(looked) => looks.push(looked),
            Err(stuck) => silent.push(stuck.to_string()),
        }
    }
    let shown = |looked: &'_ Looked| -> Vec<String> {
        looked.listed.iter().map(|instance| tables::what_it_is(instance, &looked.actions)).collect()
    };
    let words: Vec<String> = looks.iter().flat_map(shown).collect();
    let all: Vec<&Instance> = looks.iter().flat_map(|looked| &looked.listed).collect();
    let instances = all.iter().zip(&words).map(|(instance, words)| Shown { instance, what_it_is: words.clone() });
    let document = Listed { schema: SCHEMA, instances: instances.collect(), silent };
    context.reporter.result(&document, || tables::instances(&all, &words));
    match document.silent.first() {
        None => Ok(ExitStatus::Done),
        Some(words) => Err(Complaint {
            status: ExitStatus::Cloud,
            message: format!("this list is not whole: {words}"),
            hint: Some("outliers doctor".to_owned()),
        }),
    }
}

/// All instances of all clouds; one that does not answer is an error.
async fn everything(clouds: &Clouds) -> Result<Vec<(&Cloud, Instance)>, Complaint> {
    let lists =
        join_all(clouds.iter().map(|cloud| async move { (cloud, cloud.call(cloud.broker.list()).await) })).await;
    let mut all = Vec::new();
    for (cloud, listed) in lists {
        all.extend(listed?.into_iter().map(|instance| (cloud, instance)));
    }
    Ok(all)
}

async fn find<'a>(clouds: &'a Clouds, id: &str) -> Result<(&'a Cloud, Instance), Complaint> {
    let found = everything(clouds).await?.into_iter().find(|(_, instance)| instance.id.0 == *id);
    found.ok_or_else(|| missing(id))
}

fn missing(id: &str) -> Complaint {
    Complaint::refused(format!("there is no instance `{id}`"), "see `outliers instances list`")
}

async fn show(context: &Context, ledger: &Ledger, clouds: &Clouds, id: &str) -> Result<ExitStatus, Complaint> {
    let (cloud, instance) = find(clouds, id).await?;
    // The list's word may be older than the cloud's word on the one.
    let instance = cloud.call(cloud.broker.get(&instance.id)).await?.unwrap_or(instance);
    let run = instance.tag().and_then(|tag| ledger.run(&tag.run).ok());
    let looked = look(ledger, cloud).await?;
    let words = tables::what_it_is(&instance, &looked.actions);
    let document = serde_json::json!({
        "schema": SCHEMA, "instance": instance, "what_it_is": words, "run": run.as_ref().map(|run| &run.id),
        "capabilities": cloud.broker.capabilities(),
    });
    context
        .reporter
        .result(&document, || tables::instance(&instance, &words, run.as_ref(), cloud.broker.capabilities()));
    Ok(ExitStatus::Done)
}

/// The command that opens a shell, with the run's key and the host key it showed first.
fn ssh(context: &Context, ledger: &Ledger, instance: &Instance, run: bool) -> Result<ExitStatus, Complaint> {
    let arguments = ssh_arguments(ledger, instance)?;
    if run {
        let status = Command::new("ssh").args(&arguments).status();
        let status = status.map_err(|error| Complaint::failed(format!("ssh cannot be run: {error}")))?;
        return Ok(if status.success() { ExitStatus::Done } else { ExitStatus::Failed });
    }
    let command = format!("ssh {}", arguments.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" "));
    let document = serde_json::json!({ "schema": SCHEMA, "command": command });
    context.reporter.result(&document, || command.clone());
    Ok(ExitStatus::Done)
}

fn ssh_arguments(ledger: &Ledger, instance: &Instance) -> Result<Vec<String>, Complaint> {
    let InstanceState::Ready(endpoint) = &instance.state else {
        return Err(Complaint::failed(format!("instance {} has no address", instance.id)));
    };
    let tag = instance.tag().filter(|tag| tag.owner == ledger.owner());
    let tag = tag.ok_or_else(|| Complaint::failed(format!("instance {} is not of this ledger", instance.id)))?;
    let (record, folder) = (ledger.run(&tag.run)?, ledger.run_folder(&tag.run));
    let (key, known_hosts) = (folder.join(KEY_FILE), folder.join("known_hosts"));
    if !key.exists() {
        return Err(Complaint::failed(format!("the key of run {} is gone", record.id)));
    }
    let address = address(endpoint)?;
    let strict = match pin(&record) {
        Some(pin) => {
            let written = std::fs::write(&known_hosts, format!("{address} {}\n", pin.0));
            written.map_err(|error| Complaint::failed(format!("{}: {error}", known_hosts.display())))?;
            "yes"
        }
        None => "accept-new",
    };
    let options = [
        "IdentitiesOnly=yes".to_owned(),
        format!("UserKnownHostsFile={}", known_hosts.display()),
        format!("StrictHostKeyChecking={strict}"),
    ];
    let mut arguments = vec!["-i".to_owned(), key.to_string_lossy().into_owned()];
    arguments.extend(["-p".to_owned(), endpoint.port.to_string()]);
    arguments.extend(options.into_iter().flat_map(|option| ["-o".to_owned(), option]));
    arguments.extend(["--".to_owned(), format!("{}@{}", endpoint.user, endpoint.host)]);
    Ok(arguments)
}

/// The host key that the run's present instance showed first.
fn pin(record: &RunRecord) -> Option<&Pin> {
    let since = record.events.iter().rev().take_while(|entry| !matches!(entry.event, RunEvent::Created { .. }));
    since.into_iter().find_map(|entry| match &entry.event {
        RunEvent::Reached { pin, .. } => Some(pin),
        _ => None,
    })
}

/// The endpoint as a `known_hosts` file names it. A cloud's word goes into a command line here, so it has to look like an address.
fn address(endpoint: &SshEndpoint) -> Result<String, Complaint> {
    let plain = |text: &str| {
        let fits = |c: char| c.is_ascii_alphanumeric() || ".-_:".contains(c);
        !text.is_empty() && !text.starts_with('-') && text.chars().all(fits)
    };
    if !plain(&endpoint.host) || !plain(&endpoint.user) {
        return Err(Complaint::failed("the cloud gives an address that is none"));
    }
    Ok(if endpoint.port == 22 { endpoint.host.clone() } else { format!("[{}]:{}", endpoint.host, endpoint.port) })
}

/// The instances that are meant; all of them this ledger's.
async fn choose<'a>(
    ledger: &Ledger,
    clouds: &'a Clouds,
    ids: &[String],
    all: bool,
) -> Result<Vec<(&'a Cloud, Instance)>, Complaint> {
    let ours = |instance: &Instance| instance.tag().is_some_and(|tag| tag.owner == ledger.owner());
    let listed = everything(clouds).await?;
    if all {
        return Ok(listed.into_iter().filter(|(_, instance)| ours(instance)).collect());
    }
    let find = |id: &String| {
        let found = listed.iter().find(|(_, instance)| instance.id.0 == *id).ok_or_else(|| missing(id))?;
        Some(found.clone()).filter(|(_, instance)| ours(instance)).ok_or_else(|| {
            Complaint::refused(format!("instance {id} was not rented by this ledger"), "end it where it was rented")
        })
    };
    ids.iter().map(find).collect()
}

/// All of them at once wants more than a letter, where they cost something.
fn consent(context: &Context, chosen: &[(&Cloud, Instance)], all: bool, yes: bool) -> Result<(), Complaint> {
    if yes || chosen.iter().all(|(cloud, _)| cloud.is_local) {
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
    clouds: &Clouds,
    chosen: &[(&Cloud, Instance)],
) -> Result<ExitStatus, Complaint> {
    for (cloud, instance) in chosen {
        end(context, ledger, clouds, cloud, instance).await?;
    }
    let ended: Vec<_> = chosen.iter().map(|(cloud, instance)| (cloud.name(), &instance.id)).collect();
    let document = serde_json::json!({ "schema": SCHEMA, "ended": ended });
    context.reporter.result(&document, || match ended.len() {
        0 => "no instances to end".to_owned(),
        1 => "1 instance ended, and seen gone".to_owned(),
        n => format!("{n} instances ended, and seen gone"),
    });
    Ok(ExitStatus::Done)
}

/// Through its run where it has one, so that the ledger knows; else at the cloud.
async fn end(
    context: &Context,
    ledger: &Ledger,
    clouds: &Clouds,
    cloud: &Cloud,
    instance: &Instance,
) -> Result<(), Complaint> {
    let run = instance.tag().and_then(|tag| ledger.run(&tag.run).ok());
    if let Some(run) = run.filter(|run| !run.state.is_closed() && run.state.tag() == instance.tag().as_ref()) {
        let Some(taken) = ledger.take(&run.id)? else {
            let hint = format!("`outliers runs cancel {}` ends it", run.id);
            return Err(Complaint::refused(format!("a process drives run {} on it", run.id), hint));
        };
        let (hosts, bad_hosts) = (context.hosts(&context.exe), BadHosts::default());
        let ports = ports(clouds, &bad_hosts, &hosts, &[]);
        return runs::end(context, ports, taken, Stop::SkipSync).await.map(drop);
    }
    Ok(crate::deploy::end(cloud, &|event| context.reporter.event(event), &[&instance.id]).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_never_an_option() {
        let at = |host: &str, user: &str| SshEndpoint { host: host.into(), port: 22, user: user.into() };
        assert_eq!(address(&at("1.2.3.4", "root")).unwrap(), "1.2.3.4");
        assert_eq!(address(&SshEndpoint { port: 2222, ..at("::1", "u") }).unwrap(), "[::1]:2222");
        for (host, user) in [("-oProxyCommand=x", "root"), ("a b", "root"), ("h", "-l"), ("", "root"), ("h;x", "root")]
        {
            assert!(address(&at(host, user)).is_err(), "{host} {user}");
        }
    }
}
