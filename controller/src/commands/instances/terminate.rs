//! `instances terminate`: ends instances. It needs an id and the cloud's key; the ledger and lists
//! are optional.

use std::io::{BufRead, IsTerminal, Write};

use futures::future::join_all;

use super::{LISTS, clouds, missing, once, several};
use crate::cli::TerminateArgs;
use crate::cloud::broker::{Instance, InstanceId};
use crate::cloud::clouds::{BadHosts, Cloud, Clouds};
use crate::commands::survey::refresh_indices;
use crate::commands::{Context, Home, SCHEMA, ports, runs};
use crate::model_name::short;
use crate::run::deploy::{DriveError, Stop, Target};
use crate::run::ledger::LedgerError;
use crate::text::counted;
use crate::ui::report::{CliError, ExitStatus, tables};

/// An instance to end.
struct Chosen<'a> {
    cloud: &'a Cloud,
    id: InstanceId,
    /// The cloud's entry, if there is one.
    shown: Option<Instance>,
}

/// Ends the instances that are named, or all.
pub(super) async fn command(context: &Context, home: &Home, args: &TerminateArgs) -> Result<ExitStatus, CliError> {
    let clouds = clouds(context, home, &args.only)?;
    let (chosen, silent) = context.reporter.waiting(LISTS, choose(context, home, &clouds, args)).await?;
    let terminal = std::io::stdin().is_terminal();
    consent(context, home, &chosen, args, terminal, &mut std::io::stdin().lock())?;
    let mut wrong = silent;
    let mut ended = Vec::new();
    for chosen in &chosen {
        match end(context, home, chosen).await {
            Ok(()) => ended.push((chosen.cloud.name(), &chosen.id)),
            Err(cli_error) => wrong.push(cli_error),
        }
    }
    if let Some(ledger) = &home.ledger {
        refresh_indices(context, ledger);
    }
    let document = serde_json::json!({ "schema": SCHEMA, "ended": ended });
    match (&wrong[..], ended.len()) {
        ([], 0) => context.reporter.result(&document, || "no instances to end".to_owned()),
        (_, 0) => {}
        (_, n) => context.reporter.result(&document, || format!("{} ended, and seen gone", counted(n, "instance"))),
    }
    worst(context, wrong)
}

/// Returns the most urgent error, after printing the others.
fn worst(context: &Context, mut all: Vec<CliError>) -> Result<ExitStatus, CliError> {
    let worst = ExitStatus::worst(all.iter().map(|cli_error| cli_error.status));
    let Some(at) = all.iter().position(|cli_error| cli_error.status == worst) else { return Ok(ExitStatus::Done) };
    let last = all.remove(at);
    all.iter().for_each(|cli_error| context.reporter.sentence(cli_error));
    Err(last)
}

/// The instances to end, and errors of clouds whose lists are unknown.
async fn choose<'a>(
    context: &Context,
    home: &Home,
    clouds: &'a Clouds,
    args: &TerminateArgs,
) -> Result<(Vec<Chosen<'a>>, Vec<CliError>), CliError> {
    let named: Vec<&Cloud> = clouds.iter().collect();
    if let ([cloud], false, false) = (&named[..], args.all, args.only.broker.is_empty()) {
        let chosen = join_all(args.ids.iter().map(|id| alone(context, home, cloud, id, args))).await;
        return Ok((chosen.into_iter().collect::<Result<_, _>>()?, Vec::new()));
    }
    let lists = join_all(clouds.iter().map(async |cloud| (cloud, cloud.call(cloud.broker.list()).await))).await;
    let (mut listed, mut silent) = (Vec::new(), Vec::new());
    for (cloud, answer) in lists {
        match answer {
            Ok(found) => listed.extend(found.into_iter().map(|instance| (cloud, instance))),
            Err(error) => silent.push(CliError::from(error)),
        }
    }
    let mut listed = once(home, listed);
    let unreadable = |(cloud, instance): &(&Cloud, Instance)| {
        let tag = instance.tag().filter(|_| instance.id.0.is_empty())?;
        let message = format!("{} lists an instance of run {} whose id cannot be read", cloud.name(), tag.run);
        Some(CliError::new(ExitStatus::InstanceLeft, message, "end it in the cloud's own console"))
    };
    let of =
        |(cloud, instance): (&'a Cloud, Instance)| Chosen { cloud, id: instance.id.clone(), shown: Some(instance) };
    if args.all {
        let meant = whose(home, args)?;
        let is_meant = |(_, instance): &(&Cloud, Instance)| instance.tag().is_some_and(|tag| tag.owner == meant);
        listed.retain(is_meant);
        silent.extend(listed.iter().filter_map(unreadable));
        listed.retain(|(_, instance)| !instance.id.0.is_empty());
        return Ok((listed.into_iter().map(of).collect(), silent));
    }
    let find = |id: &String| {
        let mut found = listed.iter().filter(|(_, instance)| instance.id.0 == *id);
        match (found.next(), found.next()) {
            (Some((cloud, instance)), None) => permitted(home, args, instance).map(|()| of((*cloud, instance.clone()))),
            (Some(_), Some(_)) => Err(several(id)),
            (None, _) => Err(unseen(id, &silent)),
        }
    };
    let chosen = args.ids.iter().map(find).collect::<Result<_, _>>()?;
    Ok((chosen, Vec::new()))
}

/// A named cloud needs no list.
async fn alone<'a>(
    context: &Context,
    home: &Home,
    cloud: &'a Cloud,
    id: &str,
    args: &TerminateArgs,
) -> Result<Chosen<'a>, CliError> {
    let id = InstanceId(id.to_owned());
    match cloud.call(cloud.broker.get(&id)).await {
        Ok(None) => Err(missing(&id.0)),
        Ok(Some(instance)) => {
            permitted(home, args, &instance)?;
            Ok(Chosen { cloud, id, shown: Some(instance) })
        }
        // An explicit id and broker suffice.
        Err(error) => {
            context.reporter.warn(&format!("what {id} is cannot be learned: {error}"));
            Ok(Chosen { cloud, id, shown: None })
        }
    }
}

fn unseen(id: &str, silent: &[CliError]) -> CliError {
    let Some(first) = silent.first() else { return missing(id) };
    let message = format!("`{id}` is in no list that can be read: {}", first.message);
    CliError::new(first.status, message, "no list is needed where the cloud is named: add --broker NAME")
}

/// The owner whose instances are meant.
fn whose(home: &Home, args: &TerminateArgs) -> Result<String, CliError> {
    args.owner.clone().or_else(|| home.owner.clone()).ok_or_else(|| {
        let hint = "name the owner, the second part of its name, with --owner; or say --force";
        CliError::refused("whose instances are meant is not known: there is no ledger here", hint)
    })
}

fn permitted(home: &Home, args: &TerminateArgs, instance: &Instance) -> Result<(), CliError> {
    if args.force {
        return Ok(());
    }
    let owner = instance.tag().map(|tag| tag.owner);
    if owner == Some(whose(home, args)?) {
        return Ok(());
    }
    let id = &instance.id;
    Err(match owner {
        Some(owner) => CliError::refused(
            format!("instance {id} was rented by another ledger, {owner}"),
            format!("end it where it was rented, or add --owner {owner}"),
        ),
        None => CliError::refused(
            format!("instance {id} was not rented by this program, as far as its name tells"),
            "if it is yours nevertheless: --force",
        ),
    })
}

/// Shows the instances and asks for confirmation. Ending all of them needs a whole word. Free
/// instances end without a question, others never without an answer.
fn consent(
    context: &Context,
    home: &Home,
    chosen: &[Chosen<'_>],
    args: &TerminateArgs,
    terminal: bool,
    answers: &mut dyn BufRead,
) -> Result<(), CliError> {
    if args.yes || chosen.iter().all(|chosen| chosen.cloud.is_local) {
        return Ok(());
    }
    let count = counted(chosen.len(), "instance");
    context.reporter.say(&format!("{}\nWould end, with all that is on them: {count}.", in_words(home, chosen)));
    if !terminal {
        return Err(CliError::refused("nothing was ended: there is no terminal to ask on", "add --yes"));
    }
    let word = if args.all { chosen.len().to_string() } else { "y".to_owned() };
    // On a separate line, so that Ctrl-C leaves no incomplete one.
    let _ = writeln!(std::io::stderr(), "Type {word} to go on:");
    let mut answer = String::new();
    match answers.read_line(&mut answer) {
        Ok(_) if answer.trim() == word => Ok(()),
        _ => Err(CliError::refused("nothing was ended", format!("type {word}, or add --yes"))),
    }
}

/// Description and price of each.
fn in_words(home: &Home, chosen: &[Chosen<'_>]) -> String {
    let mut table = tables::table(&["instance", "broker", "model", "hardware", "price"]);
    for Chosen { cloud, id, shown } in chosen {
        let shown = shown.as_ref();
        let run = shown.and_then(Instance::tag).and_then(|tag| home.ledger.as_ref()?.run(&tag.run).ok());
        let called = || shown.map(|instance| format!("not known ({})", instance.name));
        let model = run.map(|run| short(&run.spec.model)).or_else(called);
        let unknown = || "not known".to_owned();
        table.add_row([
            tables::id(&id.0),
            tables::name(cloud.name()),
            tables::name(&model.unwrap_or_else(unknown)),
            tables::name(&shown.map_or_else(unknown, |instance| instance.hardware.clone())),
            tables::number(shown.and_then(|instance| instance.price).map_or_else(unknown, |price| price.to_string())),
        ]);
    }
    table.to_string()
}

/// Through its run where it has one, so that the ledger knows; else, and where the ledger cannot
/// be written, at the cloud.
async fn end(context: &Context, home: &Home, chosen: &Chosen<'_>) -> Result<(), CliError> {
    match through_run(context, home, chosen).await {
        Ok(true) => return Ok(()),
        Ok(false) => {}
        Err(Refused::Driven(cli_error)) => return Err(cli_error),
        Err(Refused::Stuck(DriveError::Ledger(error))) => context.reporter.sentence(&CliError::from(error)),
        Err(Refused::Stuck(stuck)) => return Err(stuck.into()),
    }
    let target = chosen.shown.as_ref().map_or_else(|| Target::of(&chosen.id), Target::from);
    Ok(crate::run::deploy::end(chosen.cloud, &|event| context.reporter.event(event), &[target]).await?)
}

/// Why an instance cannot be ended through its run.
enum Refused {
    Driven(CliError),
    Stuck(DriveError),
}

impl From<LedgerError> for Refused {
    fn from(error: LedgerError) -> Self {
        Self::Stuck(error.into())
    }
}

/// Whether it had an open run, which is over now.
async fn through_run(context: &Context, home: &Home, chosen: &Chosen<'_>) -> Result<bool, Refused> {
    let Some((ledger, tag)) = home.ledger.as_ref().zip(chosen.shown.as_ref().and_then(Instance::tag)) else {
        return Ok(false);
    };
    let run = ledger.run(&tag.run).ok().filter(|run| !run.state.is_closed() && run.state.tag() == Some(&tag));
    // One whose cluster does not answer by the name in its record ends where it is seen.
    let run = run.filter(|run| run.state.offer().is_some_and(|offer| chosen.cloud.broker.made(offer)));
    let Some(run) = run else { return Ok(false) };
    let Some(taken) = ledger.take(&run.id)? else {
        let hint = format!("`outliers runs cancel {}` ends it", run.id);
        return Err(Refused::Driven(CliError::refused(format!("a process drives run {} on it", run.id), hint)));
    };
    let (hosts, bad_hosts) = (context.hosts(&context.exe), BadHosts::default());
    let clouds = Clouds::from(vec![chosen.cloud.clone()]);
    let ended = runs::end(context, ports(&clouds, &bad_hosts, &hosts, &[]), taken, Stop::SkipSync).await;
    ended.map(|_| true).map_err(Refused::Stuck)
}
