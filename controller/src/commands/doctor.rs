//! `doctor`: whether everything that a run needs is there, and whether something was left behind.

use std::path::Path;

use futures::future::join_all;
use serde::Serialize;

use super::{Context, SCHEMA};
use crate::broker::Account;
use crate::clouds::Cloud;
use crate::deploy::look;
use crate::http::clock_skew;
use crate::keys::RunKey;
use crate::ledger::{Ledger, random_word};
use crate::reconcile::Action;
use crate::report::{Complaint, ExitStatus, tables};
use crate::settings::CloudSettings;

/// Seconds by which this machine's clock may differ from a cloud's: deadlines are times of day.
const MOST_SKEW: i64 = 60;

#[derive(Serialize)]
struct Document {
    schema: u32,
    checks: Vec<Finding>,
}

/// What one look found.
#[derive(Debug, Serialize)]
struct Finding {
    what: String,
    is: Health,
    found: String,
    /// What to do.
    hint: Option<String>,
}

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Health {
    /// As it should be.
    Good,
    /// Not in use.
    Unused,
    /// It works, and somebody should look.
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

/// Does it.
pub(super) async fn command(context: &Context) -> Result<ExitStatus, Complaint> {
    let mut checks = vec![keys(&context.settings.state), worker(context).await];
    let ledger = context.ledger();
    checks.push(match &ledger {
        Ok(ledger) => records(ledger),
        Err(complaint) => {
            let finding = Finding::new("ledger", Health::Bad, complaint.message.clone());
            Finding { hint: complaint.hint.clone(), ..finding }
        }
    });
    if let Ok(ledger) = &ledger {
        let clouds = context.all_clouds()?;
        let looks = clouds.iter().map(|cloud| async { [account(cloud).await, strays(ledger, cloud).await] });
        for found in join_all(looks).await {
            checks.extend(found);
        }
    }
    checks.extend(join_all(context.settings.clouds.iter().map(reach)).await.into_iter().flatten());
    let status = if checks.iter().any(|check| check.is == Health::Bad) { ExitStatus::Failed } else { ExitStatus::Done };
    let document = Document { schema: SCHEMA, checks };
    context.reporter.result(&document, || in_words(&document.checks));
    Ok(status)
}

fn in_words(checks: &[Finding]) -> String {
    let mut table = tables::table(&["", "what", "found", "what to do"]);
    for check in checks {
        let mark = match check.is {
            Health::Good => "ok",
            Health::Unused => "-",
            Health::Odd => "look",
            Health::Bad => "BAD",
        };
        let hint = check.hint.as_deref().unwrap_or_default();
        table.add_row([mark, &check.what, &check.found, hint].map(tables::text));
    }
    format!("{table}\n")
}

/// Whether a run's SSH key can be made where it will be made.
fn keys(state: &Path) -> Finding {
    let folder = state.join(format!("doctor-{}", random_word(6)));
    let made = std::fs::create_dir_all(&folder)
        .map_err(|error| error.to_string())
        .and_then(|()| RunKey::create(&folder, "key", "doctor").map_err(|error| error.to_string()));
    // Best effort: an empty folder does no harm.
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
            let (here, pushed) = (worker.path().display(), worker.pushed().path.display());
            Finding::new("worker", Health::Good, format!("{here}; instances get {pushed}, {what}"))
        }
        Err(complaint) => Finding { hint: complaint.hint, ..Finding::new("worker", Health::Bad, complaint.message) },
    }
}

fn records(ledger: &Ledger) -> Finding {
    match ledger.runs() {
        Ok(runs) => {
            let open = runs.iter().filter(|run| !run.state.is_at_rest()).count();
            Finding::new("ledger", Health::Good, format!("{} runs, {open} of them not over", runs.len()))
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
        Err(error) => Finding::new(&what, Health::Bad, error.message).hint("check the key and its rights"),
    }
}

/// Instances that nobody accounts for.
async fn strays(ledger: &Ledger, cloud: &Cloud) -> Finding {
    let what = format!("{} instances", cloud.name());
    let looked = match look(ledger, cloud).await {
        Ok(looked) => looked,
        Err(stuck) => return Finding::new(&what, Health::Bad, stuck.to_string()),
    };
    let ours = looked.listed.iter().filter(|instance| instance.tag().is_some_and(|tag| tag.owner == ledger.owner()));
    let left = looked.actions.iter().filter(|action| !matches!(action, Action::LeaveAlone { .. })).count();
    let found = format!("{} in all, {} of this ledger", looked.listed.len(), ours.count());
    match left {
        0 => Finding::new(&what, Health::Good, found),
        n => Finding::new(&what, Health::Odd, format!("{found}, {n} left behind")).hint("outliers instances list"),
    }
}

/// Whether a cloud can be reached at all, and agrees about the time.
async fn reach(cloud: &CloudSettings) -> Option<Finding> {
    let what = format!("{} API", cloud.kind.name);
    if cloud.key.is_none() {
        let found = format!("{} is not set", cloud.key_variable);
        return Some(Finding::new(&what, Health::Unused, found).hint(format!("keys: {}", cloud.kind.key_page)));
    }
    Some(match clock_skew(&cloud.base_url).await {
        Ok(Some(skew)) if skew.abs() > MOST_SKEW => {
            let found = format!("its clock is {} s {}", skew.abs(), if skew > 0 { "ahead" } else { "behind" });
            Finding::new(&what, Health::Bad, found).hint("set this machine's clock: deadlines are times of day")
        }
        Ok(_) => Finding::new(&what, Health::Good, format!("{} answers, clocks agree", cloud.base_url)),
        Err(why) => Finding::new(&what, Health::Bad, why).hint("check the network and any proxy"),
    })
}
