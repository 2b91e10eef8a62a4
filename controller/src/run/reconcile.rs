//! Compares the ledger with a broker's list, to find instances that are abandoned, stray or gone.
//!
//! [`compare`] is a pure function of complete listings: a failed or partial one never leads to an
//! action.
//!
//! For an instance whose run is not in this ledger only the deadline counts. Its heartbeat (the
//! lease that a controller renews) cannot be read from here, since the login key is in the run's
//! folder and the host's key in its row. It need not be read: the guard on the instance checks it,
//! and ends the instance when no controller connects for the run's timeout
//! ([`GuardTimeouts`](crate::run::GuardTimeouts)). If the cloud gives an instance no means to end
//! itself, its guard stops the worker, and the deadline decides. A detached run has no heartbeat.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Serialize;

use crate::cloud::broker::{Instance, InstanceId, InstanceState, LeaseTag, Offer};
use crate::run::RunState;
use crate::run::ledger::{Ledger, LedgerError, Records, Unreadable};

/// An action for one instance or one run.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub(crate) enum Action {
    /// The instance of an abandoned run with time left: the same command picks the run up, or
    /// `runs cancel` ends it.
    Adopt { run: String, instance: InstanceId },
    /// An abandoned run without open decisions, to be driven to its end.
    Finish { run: String, why: Finish },
    /// An instance of this program without a run.
    Terminate { instance: InstanceId, why: Stray },
    /// An abandoned run whose instance was missing from enough complete listings.
    MarkGone { run: String, instance: InstanceId },
    /// The instance is foreign or is being driven.
    LeaveAlone { instance: InstanceId, why: Leave },
}

/// Why an abandoned run must be driven to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Finish {
    /// Its instance was being terminated.
    Ending,
    /// Its time is up.
    Expired,
}

/// Why an instance of this program must be terminated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Stray {
    /// Its time is up, and the ledger has no such run.
    UnknownRun,
    /// The run is over.
    RunClosed,
    /// The run has another instance or none: it results from an unanswered create call.
    Superseded,
    /// Its time is up, and its run's record cannot be read.
    Expired,
}

/// Why an instance is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Leave {
    /// It carries no tag of this program.
    NotOurs,
    /// It carries the tag of another ledger.
    OtherOwner,
    /// A process drives the run.
    Driven,
    /// The user keeps it.
    Held,
    /// Its run's record cannot be read, and it has time left.
    RecordUnreadable,
    /// The run in its tag is not in this ledger, and it has time left: a copied or new ledger
    /// lacks runs that another machine began.
    RunUnknown,
    /// By this ledger its run has another instance or none and never asked for this one, and it has
    /// time left: another machine has a copy of the ledger.
    Superseded,
    /// The cloud's entry of it cannot be read.
    Unreadable,
}

/// Whether an offer is of the cloud whose list is compared.
pub(crate) type IsHere<'a> = dyn Fn(&Offer) -> bool + 'a;

/// A run as far as this comparison goes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RunLease {
    pub(crate) run: String,
    /// Its state; `None`: its record cannot be read.
    pub(crate) state: Option<RunState>,
    /// Tags of all its create calls, as far as they are known.
    pub(crate) tags: Vec<LeaseTag>,
    /// A process drives it.
    pub(crate) driven: bool,
}

impl RunLease {
    /// Whether its instance is, or may be, on this cloud.
    pub(crate) fn is_on(&self, is_here: &IsHere<'_>) -> bool {
        self.state.as_ref().and_then(RunState::offer).is_some_and(is_here)
    }

    /// The same as far as anybody knows: of an unreadable record nothing is known.
    pub(crate) fn may_be_on(&self, is_here: &IsHere<'_>) -> bool {
        self.state.is_none() || self.is_on(is_here)
    }
}

/// Every run of the ledger, for the comparison.
///
/// # Errors
/// Errors of the ledger.
pub(crate) fn leases(ledger: &Ledger) -> Result<Vec<RunLease>, LedgerError> {
    let Records { runs, unreadable } = ledger.records()?;
    let readable = runs.into_iter().map(|run| {
        let tags = run.tags().cloned().collect();
        RunLease { run: run.id, state: Some(run.state), tags, driven: false }
    });
    let lost = |lost: Unreadable| RunLease { run: lost.run, state: None, tags: Vec::new(), driven: false };
    let all = readable.chain(unreadable.into_iter().map(lost));
    let of = |lease: RunLease| {
        let is_closed = lease.state.as_ref().is_some_and(RunState::is_closed);
        let driven = !is_closed && ledger.is_driven(&lease.run)?;
        Ok(RunLease { driven, ..lease })
    };
    all.map(of).collect()
}

/// Compares what the ledger knows with one complete listing of one cloud.
///
/// `missing` counts, for each run, the consecutive complete listings that did not show its
/// instance, this one included; after `enough` of them it is gone. `now`: Unix seconds.
pub(crate) fn compare(
    owner: &str,
    is_here: &IsHere<'_>,
    now: u64,
    leases: &[RunLease],
    listed: &[Instance],
    missing: &BTreeMap<String, u32>,
    enough: u32,
) -> Vec<Action> {
    // Maps, since there may be tens of thousands of both.
    let by_run: HashMap<&str, &RunLease> = leases.iter().map(|lease| (lease.run.as_str(), lease)).collect();
    let shown = ListedInstances::of(listed);
    // Runs of all clouds are known, but only the list of an instance's own cloud shows whether it
    // exists.
    let of_instances = listed.iter().map(|instance| judge(owner, now, &by_run, instance));
    let of_runs = leases
        .iter()
        .filter(|lease| lease.is_on(is_here))
        .filter_map(|lease| judge_run(lease, now, &shown, missing, enough));
    let mut actions: Vec<Action> = of_instances.chain(of_runs).collect();
    // A run that is finished as a whole needs no action for its instance.
    let finished: HashSet<String> = actions
        .iter()
        .filter_map(|action| if let Action::Finish { run, .. } = action { Some(run.clone()) } else { None })
        .collect();
    actions.retain(|action| !matches!(action, Action::Adopt { run, .. } if finished.contains(run)));
    actions
}

struct ListedInstances<'a> {
    names: HashSet<&'a str>,
    ids: HashSet<&'a InstanceId>,
}

impl<'a> ListedInstances<'a> {
    fn of(listed: &'a [Instance]) -> Self {
        let names = listed.iter().map(|instance| instance.name.as_str()).collect();
        Self { names, ids: listed.iter().map(|instance| &instance.id).collect() }
    }
}

/// Actions by tags alone, if no ledger can be read.
pub(crate) fn by_tag(listed: &[Instance]) -> Vec<Action> {
    let judge = |instance: &Instance| {
        let why = match instance.tag() {
            _ if instance.is_nameless() || instance.id.0.is_empty() => Leave::Unreadable,
            Some(_) => Leave::RunUnknown,
            None => Leave::NotOurs,
        };
        Action::LeaveAlone { instance: instance.id.clone(), why }
    };
    listed.iter().map(judge).collect()
}

/// The lease of an instance whose time is up, if its owner is `owner`, or with `None` any ledger.
/// `now`: Unix seconds.
pub(crate) fn overdue(owner: Option<&str>, now: u64, instance: &Instance) -> Option<LeaseTag> {
    let tag = instance.tag()?;
    let meant = owner.is_none_or(|owner| owner == tag.owner);
    (meant && tag.deadline <= now && instance.state != InstanceState::Terminating).then_some(tag)
}

fn judge(owner: &str, now: u64, leases: &HashMap<&str, &RunLease>, instance: &Instance) -> Action {
    let id = instance.id.clone();
    let leave = |why| Action::LeaveAlone { instance: id.clone(), why };
    let terminate = |why| Action::Terminate { instance: id.clone(), why };
    if instance.is_nameless() || id.0.is_empty() {
        return leave(Leave::Unreadable);
    }
    let Some(tag) = instance.tag() else { return leave(Leave::NotOurs) };
    if tag.owner != owner {
        return leave(Leave::OtherOwner);
    }
    let is_over = tag.deadline <= now;
    let Some(lease) = leases.get(tag.run.as_str()) else {
        return if is_over { terminate(Stray::UnknownRun) } else { leave(Leave::RunUnknown) };
    };
    if lease.driven {
        return leave(Leave::Driven);
    }
    match &lease.state {
        None if is_over => terminate(Stray::Expired),
        None => leave(Leave::RecordUnreadable),
        Some(state) if state.tag() != Some(&tag) => match state {
            _ if !is_over && !lease.tags.contains(&tag) => leave(Leave::Superseded),
            RunState::Closed { .. } => terminate(Stray::RunClosed),
            _ => terminate(Stray::Superseded),
        },
        Some(RunState::Held { .. }) => leave(Leave::Held),
        Some(_) => Action::Adopt { run: lease.run.clone(), instance: id.clone() },
    }
}

fn judge_run(
    lease: &RunLease,
    now: u64,
    shown: &ListedInstances<'_>,
    missing: &BTreeMap<String, u32>,
    enough: u32,
) -> Option<Action> {
    let state = lease.state.as_ref()?;
    let tag = state.tag()?;
    if lease.driven {
        return None;
    }
    let run = lease.run.clone();
    if matches!(state, RunState::Terminating { .. } | RunState::Discarding { .. }) {
        return Some(Action::Finish { run, why: Finish::Ending });
    }
    let name = tag.to_string();
    let known = state.rental().map(|rental| &rental.instance);
    let is_shown = shown.names.contains(name.as_str()) || known.is_some_and(|id| shown.ids.contains(id));
    // An unanswered create call may still create its instance. Only driving the run resolves that.
    let is_gone = !is_shown && missing.get(&lease.run).is_some_and(|times| *times >= enough);
    if let Some(instance) = known.filter(|_| is_gone) {
        return Some(Action::MarkGone { run, instance: instance.clone() });
    }
    (tag.deadline <= now).then_some(Action::Finish { run, why: Finish::Expired })
}

/// The names of instances that the ledger knows to be on other clouds. One cluster may be reached
/// by several names: its list is read once for each, and shows each instance once.
pub(crate) fn elsewhere(leases: &[RunLease], is_here: &IsHere<'_>) -> HashSet<String> {
    let others = leases.iter().filter(|lease| !lease.is_on(is_here));
    others.filter_map(|lease| Some(lease.state.as_ref()?.tag()?.to_string())).collect()
}

/// The instances of abandoned runs on this cloud.
pub(crate) fn abandoned_on<'a>(
    leases: &'a [RunLease],
    is_here: &'a IsHere<'_>,
) -> impl Iterator<Item = &'a InstanceId> {
    let abandoned = leases.iter().filter(move |lease| lease.is_on(is_here) && !lease.driven);
    abandoned.filter_map(|lease| Some(&lease.state.as_ref()?.rental()?.instance))
}

/// Counts, for each abandoned run with an instance, in how many listings in a row it was missing.
pub(crate) fn count_missing(
    leases: &[RunLease],
    is_here: &IsHere<'_>,
    listed: &[Instance],
    missing: &mut BTreeMap<String, u32>,
) {
    let shown = ListedInstances::of(listed);
    for lease in leases.iter().filter(|lease| lease.is_on(is_here) && !lease.driven) {
        let Some(rental) = lease.state.as_ref().and_then(RunState::rental) else { continue };
        if shown.ids.contains(&rental.instance) {
            missing.remove(&lease.run);
        } else {
            *missing.entry(lease.run.clone()).or_default() += 1;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::run::deploy::tests::fake::offer;
    use crate::run::{Intent, Pin, Rental, RunOutcome};

    const NOW: u64 = 1000;

    fn tag(run: &str, nonce: &str, deadline: u64) -> LeaseTag {
        LeaseTag { owner: "me".into(), run: run.into(), nonce: nonce.into(), deadline }
    }

    fn rental(tag: LeaseTag) -> Rental {
        let offer = offer("a", 1.0);
        let instance = InstanceId(format!("i-{}", tag.run));
        Rental { instance, price: offer.price, offer, tag, refused: Vec::new() }
    }

    fn lease(run: &str, state: RunState) -> RunLease {
        RunLease { run: run.into(), state: Some(state), tags: Vec::new(), driven: false }
    }

    fn launched(run: &str, deadline: u64) -> RunState {
        RunState::Launched { rental: rental(tag(run, "n", deadline)), pin: Pin("p".into()), restarts: 0 }
    }

    pub(crate) fn instance(id: &str, name: impl ToString) -> Instance {
        Instance::new("fake", id, name.to_string(), InstanceState::Booting)
    }

    fn is_fake(offer: &Offer) -> bool {
        offer.broker == "fake"
    }

    fn actions(leases: &[RunLease], listed: &[Instance]) -> Vec<Action> {
        compare("me", &is_fake, NOW, leases, listed, &BTreeMap::new(), 3)
    }

    #[test]
    fn foreign_instances_are_left_alone() {
        let other = LeaseTag { owner: "you".into(), ..tag("r", "n", 1) };
        let got = actions(&[], &[instance("a", "my-web-server"), instance("b", other), instance("c", "outliers-me-r")]);
        let why: Vec<_> =
            got.iter().map(|a| if let Action::LeaveAlone { why, .. } = a { *why } else { panic!("{a:?}") }).collect();
        assert_eq!(why, [Leave::NotOurs, Leave::OtherOwner, Leave::NotOurs]);
    }

    #[test]
    fn abandoned_run_keeps_its_instance_until_its_deadline() {
        let adopt = Action::Adopt { run: "r".into(), instance: InstanceId("i-r".into()) };
        let shown = [instance("i-r", tag("r", "n", NOW + 1))];
        assert_eq!(actions(&[lease("r", launched("r", NOW + 1))], &shown), [adopt]);
        let late = [instance("i-r", tag("r", "n", NOW))];
        let finish = Action::Finish { run: "r".into(), why: Finish::Expired };
        assert_eq!(actions(&[lease("r", launched("r", NOW))], &late), [finish]);
    }

    #[test]
    fn instances_of_a_driven_run_are_left_alone() {
        let driven = RunLease { driven: true, ..lease("r", launched("r", 1)) };
        let shown = [instance("i-r", tag("r", "n", 1)), instance("i-x", tag("r", "other", 1))];
        for action in actions(&[driven], &shown) {
            assert!(matches!(action, Action::LeaveAlone { why: Leave::Driven, .. }), "{action:?}");
        }
    }

    #[test]
    fn unexpected_instance_ends_with_its_run_or_deadline() {
        let closed = RunState::Closed { ending: RunOutcome::Completed, results: None, loss: None };
        let leases = [lease("done", closed), lease("r", launched("r", NOW + 9)), lease("p", RunState::initial())];
        let why = |leases: &[RunLease], deadline| -> Vec<_> {
            let shown = [
                instance("1", tag("done", "n", deadline)),
                instance("2", tag("never", "n", deadline)),
                instance("3", tag("r", "earlier", deadline)),
                instance("4", tag("p", "n", deadline)),
            ];
            let ended = |a: &Action| if let Action::Terminate { why, .. } = a { Some(*why) } else { None };
            actions(leases, &shown).iter().filter_map(ended).collect()
        };
        assert_eq!(why(&leases, NOW), [Stray::RunClosed, Stray::UnknownRun, Stray::Superseded, Stray::Superseded]);
        assert!(why(&leases, NOW + 1).is_empty(), "a copied ledger may lack what its machine began since");
        let asked = [tag("done", "n", NOW + 1), tag("r", "earlier", NOW + 1), tag("p", "n", NOW + 1)].to_vec();
        let ours = leases.map(|lease| RunLease { tags: asked.clone(), ..lease });
        assert_eq!(why(&ours, NOW + 1), [Stray::RunClosed, Stray::Superseded, Stray::Superseded]);
    }

    #[test]
    fn instance_of_an_unreadable_run_ends_at_its_deadline() {
        let lost = RunLease { state: None, ..lease("r", RunState::initial()) };
        let left = |why| Action::LeaveAlone { instance: InstanceId("1".into()), why };
        let ended = Action::Terminate { instance: InstanceId("1".into()), why: Stray::Expired };
        let judged =
            |lost: &RunLease, deadline| actions(std::slice::from_ref(lost), &[instance("1", tag("r", "n", deadline))]);
        assert_eq!(judged(&lost, NOW + 1), [left(Leave::RecordUnreadable)]);
        assert_eq!(judged(&lost, NOW), [ended]);
        assert_eq!(judged(&RunLease { driven: true, ..lost }, NOW), [left(Leave::Driven)]);
    }

    #[test]
    fn unanswered_create_call_is_adopted_by_tag() {
        let creating = RunState::Creating {
            intent: Intent { offer: offer("a", 1.0), tag: tag("r", "n", NOW + 9) },
            refused: Vec::new(),
        };
        let leases = [lease("r", creating)];
        let adopt = Action::Adopt { run: "r".into(), instance: InstanceId("new".into()) };
        assert_eq!(actions(&leases, &[instance("new", tag("r", "n", NOW + 9))]), [adopt]);
        let missing = BTreeMap::from([("r".to_owned(), 99)]);
        assert!(compare("me", &is_fake, NOW, &leases, &[], &missing, 3).is_empty(), "absence settles nothing here");
    }

    #[test]
    fn instance_is_gone_only_after_several_listings() {
        let leases = [lease("r", launched("r", NOW + 9))];
        let mut missing = BTreeMap::new();
        for expected in [0, 0, 1] {
            count_missing(&leases, &is_fake, &[], &mut missing);
            assert_eq!(compare("me", &is_fake, NOW, &leases, &[], &missing, 3).len(), expected);
        }
        count_missing(&leases, &is_fake, &[instance("i-r", tag("r", "n", NOW + 9))], &mut missing);
        assert!(missing.is_empty(), "one sight starts the count again");
        let is_other = |offer: &Offer| offer.broker == "other";
        assert!(compare("me", &is_other, NOW, &leases, &[], &BTreeMap::from([("r".into(), 9)]), 3).is_empty());
    }

    #[test]
    fn reap_ends_only_overdue_instances_of_the_owner() {
        let mine = |deadline| instance("x", tag("r", "n", deadline));
        let theirs = instance("y", LeaseTag { owner: "you".into(), ..tag("r", "n", NOW) });
        assert!(overdue(Some("me"), NOW, &mine(NOW)).is_some());
        assert_eq!(overdue(Some("me"), NOW, &mine(NOW + 1)), None);
        assert_eq!(overdue(Some("me"), NOW, &theirs), None);
        assert!(overdue(None, NOW, &theirs).is_some());
        for name in ["my-web-server", "outliers-me-r", "outliers-me-r-n-soon", ""] {
            assert_eq!(overdue(None, u64::MAX, &instance("z", name)), None, "{name}");
        }
        let going = Instance { state: InstanceState::Terminating, ..mine(1) };
        assert_eq!(overdue(Some("me"), NOW, &going), None);
    }

    #[test]
    fn run_that_was_ending_is_ended() {
        let state = RunState::Terminating {
            rental: rental(tag("r", "n", NOW + 9)),
            ending: RunOutcome::Interrupted,
            results: None,
            loss: None,
        };
        let got = actions(&[lease("r", state)], &[instance("i-r", tag("r", "n", NOW + 9))]);
        assert_eq!(got, [Action::Finish { run: "r".into(), why: Finish::Ending }]);
    }

    proptest! {
        /// For any list and ledger: a foreign, driven or held instance is never terminated, and
        /// every listed instance gets at most one action.
        #[test]
        fn foreign_driven_and_held_instances_are_never_terminated(
            names in prop::collection::vec(("me|you", "a|b|c", "n|m", 900u64..1100), 0..8),
            states in prop::collection::vec((0usize..4, any::<bool>()), 3),
        ) {
            let leases: Vec<RunLease> = ["a", "b", "c"].iter().zip(&states).map(|(run, (kind, driven))| {
                let held = |rental| RunState::Held {
                    rental,
                    ending: RunOutcome::Completed,
                    results: crate::run::SavedResults { folder: String::new(), complete: true },
                };
                let state = match kind {
                    0 => RunState::initial(),
                    1 => launched(run, NOW + 5),
                    2 => held(rental(tag(run, "n", NOW + 5))),
                    _ => RunState::Closed { ending: RunOutcome::Completed, results: None, loss: None },
                };
                RunLease { driven: *driven, ..lease(run, state) }
            }).collect();
            let listed: Vec<Instance> = names.iter().enumerate().map(|(i, (owner, run, nonce, deadline))| {
                instance(&format!("x{i}"), LeaseTag { owner: owner.clone(), ..tag(run, nonce, *deadline) })
            }).collect();
            let got = actions(&leases, &listed);
            for instance in &listed {
                let tag = instance.tag().unwrap();
                let run = leases.iter().find(|lease| lease.run == tag.run).unwrap();
                let verdicts = got.iter().filter(|action| match action {
                    Action::Adopt { instance: id, .. } | Action::Terminate { instance: id, .. }
                    | Action::LeaveAlone { instance: id, .. } => *id == instance.id,
                    _ => false,
                }).count();
                prop_assert!(verdicts <= 1);
                let killed = got.iter().any(|a| matches!(a, Action::Terminate { instance: id, .. } if *id == instance.id));
                if killed {
                    prop_assert_eq!(&tag.owner, "me");
                    prop_assert!(!run.driven);
                    prop_assert!(run.state.as_ref().and_then(RunState::tag) != Some(&tag));
                }
            }
        }
    }
}
