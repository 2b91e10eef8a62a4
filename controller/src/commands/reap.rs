//! `reap`: ends instances whose time is up, by the clouds' lists.
//!
//! It needs no ledger: an instance's tag contains owner and deadline. It is meant for a timer, or
//! for a machine without the ledger.

use std::io::{BufRead, IsTerminal, Write};
use std::time::Duration;

use futures::future::join_all;
use serde::Serialize;

use super::instances::LISTS;
use super::survey::refresh_indices;
use super::{Context, Home, SCHEMA, ports};
use crate::cli::ReapArgs;
use crate::cli::settings::Span;
use crate::cloud::broker::{Instance, InstanceId, LeaseTag};
use crate::cloud::clouds::{BadHosts, Cloud, Clouds};
use crate::run::deploy::{DriveError, Reconciliation, Target, apply_actions, end, reconcile_cloud};
use crate::run::ledger::now_ms;
use crate::run::reconcile::{Action, Leave, overdue};
use crate::text::counted;
use crate::ui::report::{CliError, ExitStatus, finish, stray, tables};

#[derive(Serialize)]
struct ReapReport {
    schema: u32,
    dry_run: bool,
    /// Runs of this machine's ledger to be ended.
    runs: Vec<OfRun>,
    /// Instances of this ledger whose run is over, or has another one.
    strays: Vec<ExpiredInstance>,
    /// Instances whose time is up.
    overdue: Vec<ExpiredInstance>,
    /// Errors: unknown lists, and runs or instances that do not end.
    troubles: Vec<String>,
}

#[derive(Debug, PartialEq, Serialize)]
struct OfRun {
    run: String,
    broker: &'static str,
    /// The instance, if the list contains one.
    instance: Option<InstanceId>,
    why: &'static str,
    /// Whether its end is recorded.
    over: bool,
}

#[derive(Debug, PartialEq, Serialize)]
struct ExpiredInstance {
    #[serde(flatten)]
    instance: Instance,
    owner: String,
    run: String,
    why: &'static str,
    /// Seconds since its deadline.
    seconds: u64,
    /// Whether a complete list no longer shows it.
    gone: bool,
}

/// What must end on one cloud.
struct CloudFindings<'a> {
    cloud: &'a Cloud,
    reconciliation: Reconciliation,
    runs: Vec<OfRun>,
    strays: Vec<ExpiredInstance>,
    overdue: Vec<ExpiredInstance>,
}

/// An error, with its exit status.
struct ReapFailure {
    status: ExitStatus,
    words: String,
}

pub(super) async fn command(context: &Context, args: &ReapArgs) -> Result<ExitStatus, CliError> {
    let home = context.home();
    let owner = args.owner.as_deref().or(home.owner.as_deref());
    if owner.is_none() && !args.all_owners {
        let hint = "name the owner, the second part of the instances' names, with --owner";
        return Err(CliError::refused("whose instances are meant is not known: there is no ledger here", hint));
    }
    let owner = owner.filter(|_| !args.all_owners);
    let clouds = super::instances::clouds(context, &home, &args.only)?;
    let reconciliations = clouds.iter().map(async |cloud| (cloud, reconcile_cloud(home.ledger.as_ref(), cloud).await));
    let (mut all, mut troubles) = (Vec::new(), Vec::new());
    for (cloud, reconciliation) in context.reporter.waiting(LISTS, join_all(reconciliations)).await {
        match reconciliation {
            Ok(reconciliation) => all.push(CloudFindings::of(cloud, reconciliation, owner, &mut troubles)),
            Err(stuck) => troubles.push(unseen(&stuck, args)),
        }
    }
    if !args.dry_run {
        let terminal = std::io::stdin().is_terminal();
        consent(context, &all, args, terminal, &mut std::io::stdin().lock())?;
        troubles.extend(end_all(context, &home, &clouds, &mut all).await);
        if let Some(ledger) = &home.ledger {
            refresh_indices(context, ledger);
        }
    }
    let mut document = ReapReport {
        schema: SCHEMA,
        dry_run: args.dry_run,
        runs: Vec::new(),
        strays: Vec::new(),
        overdue: Vec::new(),
        troubles: troubles.iter().map(|trouble| trouble.words.clone()).collect(),
    };
    let listed: Vec<&str> = all.iter().map(|found| found.cloud.name()).collect();
    for found in all {
        document.runs.extend(found.runs);
        document.strays.extend(found.strays);
        document.overdue.extend(found.overdue);
    }
    context.reporter.result(&document, || in_words(&document, &listed));
    conclude(&troubles)
}

fn conclude(troubles: &[ReapFailure]) -> Result<ExitStatus, CliError> {
    let status = ExitStatus::worst(troubles.iter().map(|trouble| trouble.status));
    let Some(first) = troubles.iter().find(|trouble| trouble.status == status) else { return Ok(ExitStatus::Done) };
    let hint = match status {
        ExitStatus::InstanceLeft => "an instance may still be running and billing; the same command tries again",
        _ => "no run of this ledger is open there; `outliers doctor` looks at keys and clouds",
    };
    Err(CliError::new(status, &first.words, hint))
}

/// The error of a cloud that cannot be listed. Whether it has instances of other owners is
/// unknown.
fn unseen(stuck: &DriveError, args: &ReapArgs) -> ReapFailure {
    let others = args.all_owners || args.owner.is_some();
    let status = if others { ExitStatus::InstanceLeft } else { CliError::of_drive_error(stuck).status };
    ReapFailure { status, words: stuck.to_string() }
}

impl<'a> CloudFindings<'a> {
    /// Selects what must end, whether it is then ended or only shown. `None`: of all owners.
    fn of(
        cloud: &'a Cloud,
        reconciliation: Reconciliation,
        owner: Option<&str>,
        troubles: &mut Vec<ReapFailure>,
    ) -> Self {
        let now = cloud.time(now_ms() / 1000);
        let runs = runs_of(&reconciliation, cloud.name());
        let is_stray = |instance: &Instance| {
            reconciliation.actions.iter().find_map(|action| match action {
                Action::Terminate { instance: id, why } if *id == instance.id => Some(stray(*why)),
                _ => None,
            })
        };
        let (mut strays, mut late) = (Vec::new(), Vec::new());
        for instance in &reconciliation.listed {
            let doomed = |LeaseTag { owner, run, deadline, .. }: LeaseTag, why| {
                let seconds = now.saturating_sub(deadline);
                ExpiredInstance { instance: instance.clone(), owner, run, why, seconds, gone: false }
            };
            let of_run = |tag: &LeaseTag| runs.iter().any(|of| of.run == tag.run && of.instance.is_some());
            // Its driver may be saving its results, and then ends it.
            let driven = Action::LeaveAlone { instance: instance.id.clone(), why: Leave::Driven };
            let is_driven = || reconciliation.actions.contains(&driven);
            let is_ending = |tag: &LeaseTag| now.saturating_sub(tag.deadline) < cloud.timeouts.sync.as_secs();
            if let (Some(why), Some(tag)) = (is_stray(instance), instance.tag()) {
                strays.push(doomed(tag, why));
            } else if let Some(tag) = overdue(owner, now, instance).filter(|tag| !of_run(tag))
                && !(is_ending(&tag) && is_driven())
            {
                late.push(doomed(tag, "its time is up"));
            }
        }
        let (late, unnamed): (Vec<_>, Vec<_>) = late.into_iter().partition(|doomed| !doomed.instance.id.0.is_empty());
        troubles.extend(unnamed.iter().map(|doomed| ReapFailure {
            status: ExitStatus::InstanceLeft,
            words: format!("{} lists an instance of run {} without a readable id", cloud.name(), doomed.run),
        }));
        Self { cloud, reconciliation, runs, strays, overdue: late }
    }

    fn count(&self) -> usize {
        self.runs.len() + self.strays.len() + self.overdue.len()
    }
}

/// Runs of the ledger that must end.
fn runs_of(reconciliation: &Reconciliation, broker: &'static str) -> Vec<OfRun> {
    let instance = |run: &str| {
        let of_run = |instance: &&Instance| instance.tag().is_some_and(|tag| tag.run == run);
        reconciliation.listed.iter().find(of_run).map(|instance| instance.id.clone())
    };
    let judge = |action: &Action| match action {
        Action::Finish { run, why } => {
            Some(OfRun { run: run.clone(), broker, instance: instance(run), why: finish(*why), over: false })
        }
        Action::MarkGone { run, .. } => {
            Some(OfRun { run: run.clone(), broker, instance: None, why: "its instance is gone", over: false })
        }
        _ => None,
    };
    reconciliation.actions.iter().filter_map(judge).collect()
}

/// Ends the selection: runs of this ledger with their results first.
async fn end_all(context: &Context, home: &Home, clouds: &Clouds, all: &mut [CloudFindings<'_>]) -> Vec<ReapFailure> {
    let (hosts, bad_hosts) = (context.hosts(&context.exe), BadHosts::default());
    let ports = ports(clouds, &bad_hosts, &hosts, &[]);
    let on = |event| context.reporter.event(event);
    let each = all.iter_mut().map(async |found| {
        let mut troubles = Vec::new();
        if let Some(ledger) = &home.ledger {
            match apply_actions(ledger, ports, found.cloud, &found.reconciliation, &on).await {
                Ok(()) => {
                    context.reporter.recovered(found.reconciliation.actions.iter());
                    found.runs.iter_mut().for_each(|run| run.over = true);
                    found.strays.iter_mut().for_each(|stray| stray.gone = true);
                }
                Err(stuck) => troubles.push(ReapFailure::of(&stuck)),
            }
        }
        let targets: Vec<Target> = found.overdue.iter().map(|overdue| Target::from(&overdue.instance)).collect();
        if !targets.is_empty() {
            match end(found.cloud, &on, &targets).await {
                Ok(()) => found.overdue.iter_mut().for_each(|overdue| overdue.gone = true),
                Err(stuck) => troubles.push(ReapFailure::of(&stuck)),
            }
        }
        troubles
    });
    join_all(each).await.into_iter().flatten().collect()
}

impl ReapFailure {
    fn of(stuck: &DriveError) -> Self {
        Self { status: CliError::of_drive_error(stuck).status, words: stuck.to_string() }
    }
}

/// Asks on a terminal before anything ends. Instances of other owners are confirmed twice, the
/// second time by their number, and only on a terminal.
fn consent(
    context: &Context,
    all: &[CloudFindings<'_>],
    args: &ReapArgs,
    terminal: bool,
    answers: &mut dyn BufRead,
) -> Result<(), CliError> {
    let count: usize = all.iter().map(CloudFindings::count).sum();
    let enough = if args.all_owners { 2 } else { 1 };
    if count == 0 || args.yes >= enough || (!terminal && !args.all_owners) {
        return Ok(());
    }
    if !terminal {
        return Err(CliError::refused(
            format!("{} may be other people's, and there is no terminal to ask on", counted(count, "instance")),
            "say --yes twice, or leave --all-owners out",
        ));
    }
    let rows = all.iter().flat_map(|found| {
        let runs = found.runs.iter().map(|of| format!("run {} on {}: {}", of.run, of.broker, of.why));
        let instances = found.strays.iter().chain(&found.overdue);
        runs.chain(instances.map(|d| format!("instance {} on {}: {}", d.instance.id, d.instance.broker, d.why)))
    });
    rows.for_each(|row| context.reporter.say(&row));
    let mut questions = vec![(format!("End these {count}? [y/N]"), "y".to_owned())];
    if args.all_owners {
        let number = ("They may be other people's. How many are they?".to_owned(), count.to_string());
        questions.push(number);
    }
    for (question, answer) in questions {
        context.reporter.say(&question);
        let _ = std::io::stderr().flush();
        let mut typed = String::new();
        if answers.read_line(&mut typed).is_err() || typed.trim() != answer {
            return Err(CliError::refused("nothing was ended", "see them with --dry-run"));
        }
    }
    Ok(())
}

/// The report, by the lists of the clouds of these names.
fn in_words(document: &ReapReport, listed: &[&str]) -> String {
    if document.overdue.is_empty() && document.strays.is_empty() && document.runs.is_empty() {
        // Without any list nothing is known.
        return match listed {
            [] => String::new(),
            _ => format!("no instance is overdue on {}", listed.join(", ")),
        };
    }
    let mut table = tables::table(&["broker", "instance", "owner", "run", "overdue for", "price", "why", "now"]);
    let became = |done: bool| match (document.dry_run, done) {
        (true, _) => "would be ended",
        (false, true) => "ended, and seen gone",
        (false, false) => "STILL THERE",
    };
    for OfRun { run, broker, instance, why, over } in &document.runs {
        let id = instance.as_ref().map_or("-", |id| id.0.as_str());
        let ids = [tables::name(broker), tables::id(id), tables::id(""), tables::id(run)];
        table.add_row(ids.into_iter().chain(["", "", *why, became(*over)].map(tables::text)));
    }
    for doomed in document.strays.iter().chain(&document.overdue) {
        let ExpiredInstance { instance: Instance { broker, id, price, .. }, owner, run, why, seconds, gone } = doomed;
        let price = price.map(|price| price.to_string()).unwrap_or_default();
        let since = if *seconds == 0 { String::new() } else { Span(Duration::from_secs(*seconds)).to_string() };
        let ids = [tables::name(broker), tables::id(&id.0), tables::id(owner), tables::id(run)];
        table.add_row(ids.into_iter().chain([since.as_str(), &price, *why, became(*gone)].map(tables::text)));
    }
    format!("{table}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::settings::{Environment, Settings};
    use crate::cli::{Color, Global};
    use crate::ui::report::Reporter;

    fn context() -> Context {
        let environment = Environment::of(&[("HOME", "/nowhere")]);
        let global = Global { quiet: true, color: Color::Never, ..Global::default() };
        Context {
            settings: Settings::resolve(None, &environment, std::path::Path::new("/")).unwrap(),
            reporter: Reporter::new(&global, &environment),
            here: "/".into(),
            exe: "/".into(),
            explain: false,
        }
    }

    /// Whether the answers allow ending one overdue instance.
    fn agreed(args: &ReapArgs, terminal: bool, mut answers: &[u8]) -> bool {
        let context = context();
        let cloud = context.cloud("local").unwrap();
        let mut instance = crate::run::reconcile::tests::instance("i", "outliers-o-r-n-1");
        instance.broker = "local".to_owned();
        let reconciliation = Reconciliation { listed: vec![instance], actions: Vec::new() };
        let found = CloudFindings::of(&cloud, reconciliation, Some("o"), &mut Vec::new());
        assert_eq!(found.count(), 1);
        let asked = consent(&context, &[found], args, terminal, &mut answers);
        asked.inspect_err(|cli_error| assert_eq!(cli_error.status, ExitStatus::Refused)).is_ok()
    }

    #[test]
    fn driven_instance_has_time_to_save_its_results() {
        let context = context();
        let cloud = context.cloud("local").unwrap();
        let sync = cloud.timeouts.sync.as_secs();
        for (late, driven, ended) in [(60, true, 0), (60, false, 1), (sync + 60, true, 1)] {
            let name = format!("outliers-o-r-n-{}", now_ms() / 1000 - late);
            let listed = vec![crate::run::reconcile::tests::instance("i", name)];
            let leave = Action::LeaveAlone { instance: listed[0].id.clone(), why: Leave::Driven };
            let actions = driven.then_some(leave).into_iter().collect();
            let reconciliation = Reconciliation { listed, actions };
            let found = CloudFindings::of(&cloud, reconciliation, Some("o"), &mut Vec::new());
            assert_eq!(found.count(), ended, "{late} s, driven: {driven}");
        }
    }

    #[test]
    fn reap_asks_on_a_terminal_and_not_under_a_timer() {
        let (plain, yes) = (ReapArgs::default(), ReapArgs { yes: 1, ..ReapArgs::default() });
        assert!(agreed(&plain, true, b"y\n") && !agreed(&plain, true, b"n\n") && !agreed(&plain, true, b""));
        assert!(agreed(&yes, true, b"") && agreed(&plain, false, b""));
        let everybody = ReapArgs { all_owners: true, ..ReapArgs::default() };
        assert!(agreed(&everybody, true, b"y\n1\n") && !agreed(&everybody, true, b"y\n2\n"));
        assert!(!agreed(&everybody, false, b"y\n1\n") && !agreed(&ReapArgs { yes: 1, ..everybody }, false, b""));
    }
}
