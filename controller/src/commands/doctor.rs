//! `doctor`: checks the requirements of a run, and looks for instances left behind.

use std::collections::BTreeSet;
use std::path::Path;

use futures::future::join_all;
use serde::Serialize;

use super::{Context, SCHEMA};
use crate::cli::DoctorArgs;
use crate::cli::settings::CloudSettings;
use crate::cloud::broker::{Account, Instance};
use crate::cloud::clouds::{Cloud, Clouds};
use crate::cloud::http::{address, clock_skew};
use crate::host::keys::RunKey;
use crate::run::deploy::reconcile_cloud;
use crate::run::ledger::{Ledger, Records, Repaired, random_word};
use crate::run::reconcile::{Action, Leave};
use crate::text::{clean, counted};
use crate::ui::report::{CliError, ExitStatus, tables};

/// Maximum difference in seconds between this machine's clock and a cloud's, since deadlines are
/// times of day.
const MAX_SKEW: i64 = 60;

#[derive(Serialize)]
struct DoctorReport {
    schema: u32,
    checks: Vec<Finding>,
}

/// Result of one check.
#[derive(Debug, Serialize)]
struct Finding {
    what: String,
    is: Health,
    found: String,
    hint: Option<String>,
}

/// State of a checked item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Health {
    Good,
    Unused,
    /// It works, but needs attention.
    Odd,
    /// It does not work.
    Bad,
}

impl Finding {
    fn new(what: &str, is: Health, found: impl Into<String>) -> Self {
        Self { what: what.to_owned(), is, found: found.into(), hint: None }
    }

    fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

pub(super) async fn command(context: &Context, args: &DoctorArgs) -> Result<ExitStatus, CliError> {
    let mut checks = vec![keys(&context.settings.state), worker(context).await];
    if args.repair {
        let clouds = context.clouds_to_list(None, &args.only.broker)?;
        checks.extend(repair(context, &clouds).await);
    }
    let ledger = context.ledger();
    checks.push(match &ledger {
        Ok(ledger) => records(ledger),
        Err(cli_error) => {
            let finding = Finding::new("ledger", Health::Bad, cli_error.message.clone());
            Finding { hint: cli_error.hint.clone(), ..finding }
        }
    });
    // One that cannot be read knows no clusters.
    let ledger = ledger.as_ref().ok().filter(|ledger| ledger.records().is_ok());
    let clouds = context.clouds_to_list(ledger, &args.only.broker)?;
    let lookups = clouds.iter().map(|cloud| async { [account(cloud).await, strays(ledger, cloud).await] });
    let findings = context.reporter.waiting("the clouds' answers", join_all(lookups)).await;
    let mut of_clouds: Vec<Finding> = findings.into_iter().flatten().collect();
    let is_named = |cloud: &&CloudSettings| {
        args.only.broker.is_empty() || args.only.broker.iter().any(|name| name == cloud.kind.name)
    };
    let reached = join_all(context.settings.clouds.iter().filter(is_named).map(reach)).await;
    of_clouds.extend(reached.into_iter().flatten());
    let is_bad = |found: &[Finding]| found.iter().any(|check| check.is == Health::Bad);
    let status = match (is_bad(&of_clouds), is_bad(&checks)) {
        (true, _) => ExitStatus::Cloud,
        (false, true) => ExitStatus::Failed,
        (false, false) => ExitStatus::Done,
    };
    checks.extend(of_clouds);
    let document = DoctorReport { schema: SCHEMA, checks };
    context.reporter.result(&document, || in_words(&document.checks));
    Ok(status)
}

fn in_words(checks: &[Finding]) -> String {
    let mut table = tables::table(&["", "what", "found, and what to do"]);
    for check in checks {
        let mark = match check.is {
            Health::Good => "ok",
            Health::Unused => "-",
            Health::Odd => "look",
            Health::Bad => "BAD",
        };
        // Below the finding, since an address in a separate column would be wrapped.
        let found = [Some(check.found.as_str()), check.hint.as_deref()].into_iter().flatten();
        let found: Vec<String> = found.map(|text| clean(text.as_bytes(), 600)).collect();
        table.add_row([tables::text(mark), tables::text(&check.what), tables::Cell::new(found.join("\n"))]);
    }
    format!("{table}\n")
}

/// Checks that a run's SSH key can be created in its folder.
fn keys(state: &Path) -> Finding {
    let folder = state.join(format!("doctor-{}", random_word(6)));
    let made = std::fs::create_dir_all(&folder)
        .map_err(|error| error.to_string())
        .and_then(|()| RunKey::create(&folder, "key", "doctor").map_err(|error| error.to_string()));
    // An empty folder that remains does no harm.
    let _ = std::fs::remove_dir_all(&folder);
    match made {
        Ok(_) => Finding::new("SSH keys", Health::Good, format!("can be made below {}", state.display())),
        Err(why) => {
            Finding::new("SSH keys", Health::Bad, why).hint("the state folder must be writable (OUTLIERS_STATE)")
        }
    }
}

async fn worker(context: &Context) -> Finding {
    match context.worker().await {
        Ok(worker) => {
            let cuda = worker.pushed().cuda;
            let what = cuda.map_or_else(|| "without CUDA".to_owned(), |oldest| format!("with CUDA, from {oldest} on"));
            let (here, pushed) = (worker.path(), &worker.pushed().path);
            let found = if here == pushed.as_path() {
                format!("{}, {what}; instances get the same", here.display())
            } else {
                format!("{}; instances get {}, {what}", here.display(), pushed.display())
            };
            let finding = Finding::new("worker", Health::Good, found);
            // Clouds rent out GPUs, which are refused with a worker that cannot use them.
            let rents = context.settings.clouds.iter().any(|cloud| cloud.key.is_some());
            match rents && worker.pushed().cuda.is_none() {
                true => Finding { is: Health::Odd, ..finding }.hint("for GPUs: outliers worker build --cuda"),
                false => finding,
            }
        }
        Err(cli_error) => Finding { hint: cli_error.hint, ..Finding::new("worker", Health::Bad, cli_error.message) },
    }
}

fn records(ledger: &Ledger) -> Finding {
    match ledger.records() {
        Ok(Records { unreadable, .. }) if !unreadable.is_empty() => {
            let lost: Vec<String> = unreadable.iter().map(|lost| format!("run {}: {}", lost.run, lost.why)).collect();
            Finding::new("ledger", Health::Bad, format!("unreadable records: {}", lost.join("; ")))
        }
        Ok(Records { runs, .. }) => {
            let open = runs.iter().filter(|run| !run.state.is_at_rest()).count();
            let open = if open == 0 { "none".to_owned() } else { open.to_string() };
            Finding::new("ledger", Health::Good, format!("{}, {open} under way", counted(runs.len(), "run")))
        }
        Err(error) => Finding::new("ledger", Health::Bad, error.to_string()),
    }
}

async fn account(cloud: &Cloud) -> Finding {
    let what = format!("{} account", cloud.name());
    match cloud.call(cloud.broker.check()).await {
        Ok(Account { who, balance }) => {
            let words = [who, balance.map(|usd| format!("{usd} left"))].into_iter().flatten().collect::<Vec<_>>();
            let found = if words.is_empty() { "the key is good".to_owned() } else { words.join(", ") };
            let found = if cloud.is_local { "needs no key".to_owned() } else { found };
            let empty = balance.is_some_and(|usd| usd.micros() <= 0);
            Finding::new(&what, if empty { Health::Bad } else { Health::Good }, found)
        }
        Err(error) => Finding { hint: error.hint(), ..Finding::new(&what, Health::Bad, error.message) },
    }
}

/// Rebuilds a damaged ledger, and reports what is lost.
async fn repair(context: &Context, clouds: &Clouds) -> Vec<Finding> {
    let lists = join_all(clouds.iter().map(async |cloud| cloud.call(cloud.broker.list()).await)).await;
    let listed: Vec<Instance> = lists.into_iter().flatten().flatten().collect();
    let owners: BTreeSet<String> = listed.iter().filter_map(Instance::tag).map(|tag| tag.owner).collect();
    let owner = owners.first().filter(|_| owners.len() == 1).cloned();
    let repaired = match Ledger::repair(&context.settings.state, &context.settings.results, owner) {
        Ok(repaired) => repaired,
        Err(error) => {
            return vec![Finding { hint: error.hint(), ..Finding::new("repair", Health::Bad, error.to_string()) }];
        }
    };
    let Repaired { aside, kept, from_results, lost } = repaired;
    let made_of = format!("{} read from it, {from_results} from results", counted(kept, "run"));
    let first = match aside {
        None if from_results == 0 && lost.is_empty() => "the ledger needs none".to_owned(),
        None => format!("there was no ledger; {made_of}"),
        Some(aside) => format!("the damaged file is {}; {made_of}", aside.display()),
    };
    let instance = |run: &str| {
        let of_run = |instance: &&Instance| instance.tag().is_some_and(|tag| tag.run == run);
        let found = listed.iter().find(of_run);
        found.map(|found| format!(", its instance {} on {}", found.id, found.broker)).unwrap_or_default()
    };
    let lost = lost.iter().map(|lost| {
        let found = format!("run {} is lost{}: {}", lost.run, instance(&lost.run), lost.why);
        Finding::new("repair", Health::Odd, found).hint("outliers instances list")
    });
    std::iter::once(Finding::new("repair", Health::Good, first)).chain(lost).collect()
}

/// Checks a cloud for stray instances.
async fn strays(ledger: Option<&Ledger>, cloud: &Cloud) -> Finding {
    let what = format!("{} instances", cloud.name());
    let reconciliation = match reconcile_cloud(ledger, cloud).await {
        Ok(reconciliation) => reconciliation,
        Err(stuck) => return Finding::new(&what, Health::Bad, stuck.to_string()),
    };
    let owner = ledger.map(Ledger::owner);
    let is_ours = |instance: &&Instance| instance.tag().is_some_and(|tag| owner.is_none_or(|owner| tag.owner == owner));
    let ours = reconciliation.listed.iter().filter(is_ours);
    let is_settled = |action: &&Action| {
        let settled = [Leave::NotOurs, Leave::OtherOwner, Leave::Driven, Leave::Held];
        matches!(action, Action::LeaveAlone { why, .. } if settled.contains(why))
    };
    let left = reconciliation.actions.iter().filter(|action| !is_settled(action)).count();
    let found = match reconciliation.listed.len() {
        0 => "none".to_owned(),
        all => format!("{all} in all, {} of this {}", ours.count(), if owner.is_some() { "ledger" } else { "program" }),
    };
    match left {
        0 => Finding::new(&what, Health::Good, found),
        n => Finding::new(&what, Health::Odd, format!("{found}, {n} left behind or unclear"))
            .hint("outliers instances list"),
    }
}

/// Checks that a cloud is reachable and its clock agrees.
async fn reach(cloud: &CloudSettings) -> Option<Finding> {
    let what = format!("{} API", cloud.kind.name);
    if cloud.key.is_none() {
        let found = format!("{} is not set", cloud.variable());
        return Some(Finding::new(&what, Health::Unused, found).hint(format!("keys: {}", cloud.kind.key_page)));
    }
    Some(match clock_skew(&cloud.base_url).await {
        Ok(Some(skew)) if skew.abs() > MAX_SKEW => {
            let found = format!("its clock is {} s {}", skew.abs(), if skew > 0 { "ahead" } else { "behind" });
            Finding::new(&what, Health::Bad, found).hint("set this machine's clock: deadlines are times of day")
        }
        Ok(_) => Finding::new(&what, Health::Good, format!("{} answers, clocks agree", address(&cloud.base_url))),
        Err(why) => Finding::new(&what, Health::Bad, why).hint("check the network and any proxy"),
    })
}
