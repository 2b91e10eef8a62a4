//! `instances`: lists the clouds' instances and their relation to the ledger.

use std::process::Command;

use futures::future::join_all;
use serde::Serialize;

use super::{Context, Home, SCHEMA};
use crate::cli::{BrokerFilter, InstancesCommand};
use crate::cloud::broker::{Instance, InstanceState, SshEndpoint};
use crate::cloud::clouds::{Cloud, Clouds};
use crate::host::transport::quote::quote;
use crate::run::deploy::{KEY_FILE, Reconciliation, reconcile_cloud};
use crate::run::ledger::{Ledger, RunRecord};
use crate::run::{Pin, RunEvent};
use crate::ui::report::{CliError, ExitStatus, tables};

mod terminate;

/// Description of the lists, for progress messages.
pub(super) const LISTS: &str = "the clouds' lists of instances";

#[derive(Serialize)]
struct InstanceList<'a> {
    schema: u32,
    instances: Vec<InstanceRow<'a>>,
    /// Number of unreadable entries.
    unreadable: usize,
    /// Errors of clouds whose list is unknown.
    silent: Vec<String>,
}

#[derive(Serialize)]
struct InstanceRow<'a> {
    #[serde(flatten)]
    instance: &'a Instance,
    /// Relation to the ledger, as text.
    what_it_is: String,
    /// When it ends at the latest, Unix seconds: by its cloud, else by its tag.
    deadline: Option<u64>,
}

pub(super) async fn command(context: &Context, command: InstancesCommand) -> Result<ExitStatus, CliError> {
    let home = context.home();
    match command {
        InstancesCommand::List { only } => list(context, &home, &clouds(context, &home, &only)?).await,
        InstancesCommand::Show { id, only } => show(context, &home, &clouds(context, &home, &only)?, &id).await,
        InstancesCommand::Ssh { id, run, only } => {
            let clouds = clouds(context, &home, &only)?;
            let (cloud, instance) = context.reporter.waiting(LISTS, find(&home, &clouds, &id)).await?;
            let endpoint = endpoint(&instance)?;
            let words = match cloud.broker.instance_transport(&instance.id) {
                Some(access) => access.shell,
                None => ssh_words(&context.ledger()?, &instance, endpoint)?,
            };
            shell(context, &words, run)
        }
        InstancesCommand::Terminate(args) => terminate::command(context, &home, &args).await,
    }
}

/// Those that were named, else all that can be asked.
pub(super) fn clouds(context: &Context, home: &Home, only: &BrokerFilter) -> Result<Clouds, CliError> {
    context.clouds_to_list(home.ledger.as_ref(), &only.broker)
}

async fn list(context: &Context, home: &Home, clouds: &Clouds) -> Result<ExitStatus, CliError> {
    let (mut reconciliations, mut deadlines, mut silent) = (Vec::new(), Vec::new(), Vec::new());
    let all = join_all(clouds.iter().map(|cloud| reconcile_cloud(home.ledger.as_ref(), cloud)));
    for (cloud, reconciliation) in clouds.iter().zip(context.reporter.waiting(LISTS, all).await) {
        match reconciliation {
            Ok(reconciliation) => {
                deadlines.extend(reconciliation.listed.iter().map(|instance| deadline(cloud, instance)));
                reconciliations.push(reconciliation);
            }
            Err(stuck) => silent.push(stuck.to_string()),
        }
    }
    let shown =
        |reconciliation: &Reconciliation| tables::what_they_are(&reconciliation.listed, &reconciliation.actions);
    let words: Vec<String> = reconciliations.iter().flat_map(shown).collect();
    let all: Vec<&Instance> = reconciliations.iter().flat_map(|reconciliation| &reconciliation.listed).collect();
    let instances = all.iter().zip(&words).zip(&deadlines).map(|((instance, words), deadline)| InstanceRow {
        instance,
        what_it_is: words.clone(),
        deadline: *deadline,
    });
    let unreadable = all.iter().filter(|instance| matches!(instance.state, InstanceState::Unreadable(_))).count();
    if unreadable > 0 {
        context.reporter.warn(&format!("of the entries of the clouds' lists, {unreadable} cannot be read"));
    }
    let document = InstanceList { schema: SCHEMA, instances: instances.collect(), unreadable, silent };
    let table = || match (all.is_empty(), document.silent.is_empty()) {
        (false, _) => tables::instances(&all, &words, &deadlines),
        (true, true) => format!("no instances on {}\n", clouds.names()),
        // An incomplete list without instances does not prove that there are none.
        (true, false) => String::new(),
    };
    context.reporter.result(&document, table);
    match document.silent.first() {
        None => Ok(ExitStatus::Done),
        Some(words) => {
            Err(CliError::new(ExitStatus::Cloud, format!("this list is not whole: {words}"), "outliers doctor"))
        }
    }
}

/// When an instance of ours ends at the latest: by its cloud, else by its tag.
fn deadline(cloud: &Cloud, instance: &Instance) -> Option<u64> {
    let by_tag = instance.tag()?.deadline;
    let by_cloud = cloud.broker.run_time(&instance.id).and_then(|time| time.until);
    Some(by_cloud.map_or(by_tag, |until| until.min(by_tag)))
}

/// All instances of all clouds; one that does not answer is an error.
async fn everything(clouds: &Clouds) -> Result<Vec<(&Cloud, Instance)>, CliError> {
    let lists =
        join_all(clouds.iter().map(|cloud| async move { (cloud, cloud.call(cloud.broker.list()).await) })).await;
    let mut all = Vec::new();
    for (cloud, listed) in lists {
        all.extend(listed?.into_iter().map(|instance| (cloud, instance)));
    }
    Ok(all)
}

/// Each instance of ours once: where one cluster goes by several names, by that of the run's
/// record. Jobs of others stay, for their numbers are those of one cluster each.
fn once<'a>(home: &Home, listed: Vec<(&'a Cloud, Instance)>) -> Vec<(&'a Cloud, Instance)> {
    let is_recorded = |cloud: &Cloud, instance: &Instance| {
        let run = home.ledger.as_ref()?.run(&instance.tag()?.run).ok()?;
        Some(cloud.broker.made(run.state.offer()?))
    };
    let mut all: Vec<(&Cloud, Instance)> = Vec::new();
    for (cloud, instance) in listed {
        let is_same = |(_, other): &(&Cloud, Instance)| {
            (&other.broker, &other.id) == (&instance.broker, &instance.id) && instance.tag().is_some()
        };
        match all.iter().position(is_same) {
            None => all.push((cloud, instance)),
            Some(at) if is_recorded(cloud, &instance) == Some(true) => all[at] = (cloud, instance),
            Some(_) => {}
        }
    }
    all
}

/// By its id or the beginning of it.
async fn find<'a>(home: &Home, clouds: &'a Clouds, id: &str) -> Result<(&'a Cloud, Instance), CliError> {
    let mut found = once(home, everything(clouds).await?);
    found.retain(|(_, instance)| !id.is_empty() && instance.id.0.starts_with(id));
    let is_it = |(_, instance): &(&Cloud, Instance)| instance.id.0 == id;
    let is_whole = found.iter().any(is_it);
    found.retain(|instance| !is_whole || is_it(instance));
    match (found.pop(), found.len()) {
        (Some(one), 0) => Ok(one),
        (Some(_), _) if is_whole => Err(several(id)),
        (Some(_), more) => Err(CliError::refused(
            format!("the ids of {} instances begin with `{id}`", more + 1),
            "give more of it; see `outliers instances list`",
        )),
        (None, _) => Err(missing(id)),
    }
}

/// The error for an id that is one of several clouds.
fn several(id: &str) -> CliError {
    let hint = "name its cloud with --broker; of jobs that are not of this program `squeue` tells more";
    CliError::refused(format!("several clouds have an instance `{id}`"), hint)
}

fn missing(id: &str) -> CliError {
    CliError::refused(format!("there is no instance `{id}`"), "see `outliers instances list`")
}

async fn show(context: &Context, home: &Home, clouds: &Clouds, id: &str) -> Result<ExitStatus, CliError> {
    let (cloud, instance) = context.reporter.waiting(LISTS, find(home, clouds, id)).await?;
    // The list's word may be older than the cloud's word on the one.
    let instance = cloud.call(cloud.broker.get(&instance.id)).await?.unwrap_or(instance);
    let run = instance.tag().and_then(|tag| home.ledger.as_ref()?.run(&tag.run).ok());
    let reconciliation = reconcile_cloud(home.ledger.as_ref(), cloud).await?;
    let words = tables::what_they_are(std::slice::from_ref(&instance), &reconciliation.actions).concat();
    let document = serde_json::json!({
        "schema": SCHEMA, "instance": instance, "what_it_is": words, "run": run.as_ref().map(|run| &run.id),
        "capabilities": cloud.broker.capabilities(), "deadline": deadline(cloud, &instance),
    });
    let (can, deadline) = (cloud.broker.capabilities(), deadline(cloud, &instance));
    context.reporter.result(&document, || tables::instance(&instance, &words, run.as_ref(), can, deadline));
    Ok(ExitStatus::Done)
}

/// Prints or runs the command that opens a shell.
fn shell(context: &Context, words: &[String], run: bool) -> Result<ExitStatus, CliError> {
    if let (true, [program, arguments @ ..]) = (run, words) {
        let status = Command::new(program).args(arguments).status();
        let status = status.map_err(|error| CliError::failed(format!("{program} cannot be run: {error}")))?;
        return Ok(if status.success() { ExitStatus::Done } else { ExitStatus::Failed });
    }
    let command = words.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" ");
    let document = serde_json::json!({ "schema": SCHEMA, "command": command });
    context.reporter.result(&document, || command.clone());
    Ok(ExitStatus::Done)
}

/// Where an instance answers; one that waits for its turn is nowhere yet.
fn endpoint(instance: &Instance) -> Result<&SshEndpoint, CliError> {
    let id = &instance.id;
    Err(CliError::failed(match &instance.state {
        InstanceState::Ready(endpoint) => return Ok(endpoint),
        InstanceState::Queued(why) => format!("instance {id} has no node yet: {why}"),
        InstanceState::Booting => format!("instance {id} has no address: it is still booting"),
        InstanceState::Failed(why) => format!("instance {id} has no address: {why}"),
        _ => format!("instance {id} has no address"),
    }))
}

/// `ssh` with the run's key and the host key it showed first.
fn ssh_words(ledger: &Ledger, instance: &Instance, endpoint: &SshEndpoint) -> Result<Vec<String>, CliError> {
    let tag = instance.tag().filter(|tag| tag.owner == ledger.owner());
    let tag = tag.ok_or_else(|| CliError::failed(format!("instance {} is not of this ledger", instance.id)))?;
    let (record, folder) = (ledger.run(&tag.run)?, ledger.run_folder(&tag.run));
    let (key, known_hosts) = (folder.join(KEY_FILE), folder.join("known_hosts"));
    if !key.exists() {
        return Err(CliError::failed(format!("the key of run {} is gone", record.id)));
    }
    let address = address(endpoint)?;
    let strict = match pin(&record) {
        Some(pin) => {
            let written = std::fs::write(&known_hosts, format!("{address} {}\n", pin.0));
            written.map_err(|error| CliError::failed(format!("{}: {error}", known_hosts.display())))?;
            "yes"
        }
        None => "accept-new",
    };
    let options = [
        "IdentitiesOnly=yes".to_owned(),
        format!("UserKnownHostsFile={}", known_hosts.display()),
        format!("StrictHostKeyChecking={strict}"),
    ];
    let mut words = vec!["ssh".to_owned(), "-i".to_owned(), key.to_string_lossy().into_owned()];
    words.extend(["-p".to_owned(), endpoint.port.to_string()]);
    words.extend(options.into_iter().flat_map(|option| ["-o".to_owned(), option]));
    words.extend(["--".to_owned(), format!("{}@{}", endpoint.user, endpoint.host)]);
    Ok(words)
}

/// The pinned host key of the run's current instance.
fn pin(record: &RunRecord) -> Option<&Pin> {
    let since = record.events.iter().rev().take_while(|entry| !matches!(entry.event, RunEvent::Created { .. }));
    since.into_iter().find_map(|entry| match &entry.event {
        RunEvent::Reached { pin, .. } => Some(pin),
        _ => None,
    })
}

/// The endpoint in the format of `known_hosts`. It is used in a command line, so it must be a
/// valid address.
fn address(endpoint: &SshEndpoint) -> Result<String, CliError> {
    let plain = |text: &str| {
        let fits = |c: char| c.is_ascii_alphanumeric() || ".-_:".contains(c);
        !text.is_empty() && !text.starts_with('-') && text.chars().all(fits)
    };
    if !plain(&endpoint.host) || !plain(&endpoint.user) {
        return Err(CliError::failed("the cloud gives an address that is none"));
    }
    Ok(if endpoint.port == 22 { endpoint.host.clone() } else { format!("[{}]:{}", endpoint.host, endpoint.port) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ssh_address_is_never_parsed_as_an_option() {
        let at = |host: &str, user: &str| SshEndpoint { host: host.into(), port: 22, user: user.into() };
        assert_eq!(address(&at("1.2.3.4", "root")).unwrap(), "1.2.3.4");
        assert_eq!(address(&SshEndpoint { port: 2222, ..at("::1", "u") }).unwrap(), "[::1]:2222");
        for (host, user) in [("-oProxyCommand=x", "root"), ("a b", "root"), ("h", "-l"), ("", "root"), ("h;x", "root")]
        {
            assert!(address(&at(host, user)).is_err(), "{host} {user}");
        }
    }
}
