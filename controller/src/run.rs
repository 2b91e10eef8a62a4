//! The state machine of a run: its states, its events, and the transitions.
//!
//! [`next`] is the only transition function. It is used while a run is driven, and again when the
//! ledger is replayed after a crash, so that both always agree. This module has no clock, no I/O
//! and no randomness.
//!
//! ```text
//! Planned -> Creating -> Rented -> Reachable -> Launched -> Ended -> Synced -> Terminating -> Closed
//!    ^___________|          |          |           ^__________|         |          ^
//!    |  not created         |          |           | restarted|         |          |
//!    |______________________|__________|___________|__________|         |-> Held --|
//!    |    does not serve, or went away: Discarding |          |                    |
//!                           |__________|___________|__________|                    |
//!                              stopped: straight on, or by Salvaging ______________|
//! ```

use std::fmt;
use std::time::Duration;

use outliers_protocol::{Failure, FileBytes, JobSpec};
use serde::{Deserialize, Serialize};

use crate::cloud::broker::{InstanceId, LeaseTag, RunTime, Stage};
use crate::cloud::clouds::BETWEEN_BROKERS;
use crate::cloud::estimate::Work;
use crate::cloud::market::{self, NothingLeft, Quote};
use crate::cloud::offer::request::recorded;
use crate::cloud::offer::{GpuRequest, Offer};
use crate::units::{Bytes, GpuTime, Usd, UsdPerHour};

pub use crate::host::GuardTimeouts;

pub mod deploy;
pub mod ledger;
pub mod local_worker;
pub mod output;
pub(crate) mod reconcile;

/// How much more than its offer an instance of a cloud may bill where nobody was asked and no cap
/// was given.
const PRICE_SLACK: f64 = 1.1;
/// An offer that pays for less than the time limit is taken only if it pays for this multiple of
/// the estimated time.
const ROOM: f64 = 2.0;

/// The plan of a run, fixed when it is created. It contains everything that a later process needs
/// to continue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunSpec {
    /// The model as given: hub id or folder.
    pub model: String,
    /// Names of the brokers to rent from, separated by [`BETWEEN_BROKERS`].
    #[serde(alias = "broker")]
    pub brokers: String,
    /// The job, with local paths.
    pub job: JobSpec,
    /// SHA-256 over job, corpus files and brokers. Runs with the same key do the same work.
    pub job_key: String,
    /// Filters for offers.
    #[serde(deserialize_with = "recorded")]
    pub request: GpuRequest,
    /// The work. It decides which offer costs least in total.
    #[serde(default)]
    pub work: Work,
    /// Disk to reserve, on clouds that need it.
    pub disk: Bytes,
    /// Whether the model's folder is uploaded instead of expected on the instance.
    pub push_model: bool,
    /// Whether the instance is kept after the worker has ended.
    pub keep_running: bool,
    /// Whether the run is detached once the worker runs: the guard then does not treat the missing
    /// controller as abandonment.
    #[serde(default)]
    pub detach: bool,
    /// Maximum seconds from the create call to the instance's end.
    pub max_duration_s: u64,
    /// Timeouts of the guard on the instance.
    #[serde(default)]
    pub watch: GuardTimeouts,
    /// Budget for the maximum cost of all rentals until their time limits. Shared by all runs of a
    /// survey.
    #[serde(default)]
    pub budget: Option<Usd>,
    /// Budget of GPU time for all rentals until their time limits. Shared by all runs of a survey.
    #[serde(default)]
    pub max_gpu_time: Option<GpuTime>,
    /// The offers that were shown, and the agreed amount.
    #[serde(flatten)]
    pub quote: Quote,
    /// Whether only offers are used on which the run is estimated to end within its time limit.
    #[serde(default)]
    pub only_in_time: bool,
    /// The model that a staging job fetches before the instance starts.
    #[serde(default)]
    pub stage: Option<Stage>,
    /// Local folder in which the results' folder is created.
    pub results: String,
    /// The result files, each with its maximum size. Empty: planned by an earlier version.
    #[serde(default)]
    pub output: Vec<FileBytes>,
    /// The survey of the run.
    #[serde(default)]
    pub survey: Option<Membership>,
}

/// Membership of a run in a survey.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Membership {
    /// The survey's name.
    pub survey: String,
    /// The model's name in the survey, also the name of its results' folder.
    pub model: String,
}

impl RunSpec {
    /// The offers that the run may rent, best first.
    ///
    /// # Errors
    /// No offer passes.
    pub fn select(&self, offers: Vec<Offer>) -> Result<Quote, NothingLeft> {
        let quote = market::select(offers, &self.request, &self.work)?;
        if self.only_in_time { quote.in_time(&self.work, self.limit()) } else { Ok(quote) }
    }

    /// Time limit from the create call to the instance's end.
    pub fn limit(&self) -> Duration {
        Duration::from_secs(self.max_duration_s)
    }

    /// Maximum price of an instance of this offer. A more expensive instance is terminated.
    pub fn highest_price(&self, offer: &Offer) -> UsdPerHour {
        let slack = || UsdPerHour::from_dollars(offer.price.0.dollars() * PRICE_SLACK);
        // This machine bills what its offer says.
        let is_exact = self.quote.ceiling.is_some() || offer.is_local;
        if is_exact { offer.price } else { self.request.max_price.unwrap_or_else(slack) }
    }

    /// Maximum lifetime of an instance of this offer: the time limit, or the time that the agreed
    /// amount minus `spent` pays for.
    pub fn time_on(&self, offer: &Offer, spent: Usd) -> Duration {
        let lasts = self.quote.ceiling.and_then(|agreed| offer.price.time(agreed - spent));
        lasts.map_or(self.limit(), |lasts| lasts.min(self.limit()))
    }

    /// What an instance of this offer may cost until its time limit if `spent` of what was agreed
    /// is gone.
    pub fn worst(&self, offer: &Offer, spent: Usd) -> Usd {
        self.highest_price(offer).cost(self.time_on(offer, spent))
    }

    /// GPU time that an instance of this offer takes until its time limit.
    pub fn gpu_time(&self, offer: &Offer) -> GpuTime {
        GpuTime::of(offer.gpu_count, self.limit())
    }

    /// Whether the rest of the agreed amount after `spent` pays for this offer until the time
    /// limit, or for the work with a margin.
    pub fn pays_for(&self, offer: &Offer, spent: Usd) -> bool {
        let needed = (self.work.on(offer).seconds * ROOM).min(self.max_duration_s as f64);
        self.time_on(offer, spent).as_secs_f64() >= needed
    }

    /// Files to fetch beside log and progress, each with its maximum size.
    pub fn expected(&self) -> Vec<FileBytes> {
        if self.output.is_empty() { output::unplanned(&self.job) } else { self.output.clone() }
    }

    /// Names of the brokers to rent from.
    pub fn broker_names(&self) -> Vec<String> {
        self.brokers.split(BETWEEN_BROKERS).map(str::to_owned).collect()
    }
}

/// State of a run. Each variant contains the data that is known in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum RunState {
    /// Nothing is rented and no call is pending.
    Planned {
        /// Offers that failed, oldest first.
        refused: Vec<RefusedOffer>,
    },
    /// A create call was made or is about to be made. An instance with this tag may exist.
    Creating {
        /// The instance to create.
        intent: Intent,
        /// Offers that failed before.
        refused: Vec<RefusedOffer>,
    },
    /// An instance exists and bills. It has not answered yet.
    Rented {
        /// The instance.
        rental: Rental,
    },
    /// The host answered over SSH. Its host key is known.
    Reachable {
        /// The instance.
        rental: Rental,
        /// The host key that every later connection must present.
        pin: Pin,
    },
    /// The worker was started.
    Launched {
        /// The instance.
        rental: Rental,
        /// The host key.
        pin: Pin,
        /// Number of restarts on this instance.
        #[serde(default)]
        restarts: u32,
    },
    /// The worker has ended. Its files are on the instance.
    Ended {
        /// The instance.
        rental: Rental,
        /// The host key.
        pin: Pin,
        /// Exit status; `None`: ended by a signal, or unknown.
        exit: Option<i32>,
        /// Number of restarts on this instance.
        #[serde(default)]
        restarts: u32,
    },
    /// The run was stopped early. Partial results are fetched before the instance is terminated.
    Salvaging {
        /// The instance.
        rental: Rental,
        /// The host key.
        pin: Pin,
        /// How the run ends.
        ending: RunOutcome,
    },
    /// The files are saved here and verified.
    Synced {
        /// The instance.
        rental: Rental,
        /// How the run ends.
        ending: RunOutcome,
        /// Where they are.
        results: SavedResults,
    },
    /// The user asked to keep the instance. Only its deadline ends it.
    Held {
        /// The instance.
        rental: Rental,
        /// How the run ended.
        ending: RunOutcome,
        /// Where the files are.
        results: SavedResults,
    },
    /// The instance is unfit or vanished. It is terminated if it exists. Another one is rented.
    Discarding {
        /// The instance.
        rental: Rental,
        /// The reason, in words.
        reason: String,
        /// The instance worked until it vanished. The work of its worker is lost.
        #[serde(default)]
        lost: bool,
    },
    /// The instance is being terminated. The state ends when complete lists no longer show it.
    Terminating {
        /// The instance.
        rental: Rental,
        /// How the run ends.
        ending: RunOutcome,
        /// The results that were saved.
        results: Option<SavedResults>,
        /// Why no results were saved although some were expected.
        loss: Option<String>,
    },
    /// The run is over and has no instance. This state is final.
    Closed {
        /// How it ended.
        ending: RunOutcome,
        /// The results that were saved.
        results: Option<SavedResults>,
        /// Why no results were saved although some were expected.
        loss: Option<String>,
    },
}

/// An event of a run: what happened, or what the driver is about to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum RunEvent {
    /// A create call follows. The event is written before the call is made.
    Creating {
        /// What will be created.
        intent: Box<Intent>,
    },
    /// It is certain that the intended instance does not exist.
    NotCreated {
        /// The broker's message.
        reason: String,
        /// The offer is not tried again.
        refused: bool,
        /// Inferred from lists, without a reply. The instance may have existed and billed.
        #[serde(default)]
        unseen: bool,
    },
    /// The intended instance exists.
    Created {
        /// The broker's id.
        instance: InstanceId,
        /// Price that the broker states for the instance, if it states one.
        price: Option<UsdPerHour>,
    },
    /// The host answered over SSH.
    Reached {
        /// Its key.
        pin: Pin,
        /// Price that the cloud stated when the instance was up.
        price: Option<UsdPerHour>,
    },
    /// The cloud has its own record of how long the instance has run. It counts instead of the
    /// times of events.
    Metered {
        /// That record, whole.
        time: RunTime,
    },
    /// The instance bills more than before, which the agreed amount covers.
    Repriced {
        /// Price that the cloud states now.
        price: UsdPerHour,
    },
    /// The instance is unfit or vanished. Another one is rented.
    Discarded {
        /// The reason, in words.
        reason: String,
        /// The instance worked until it vanished.
        #[serde(default)]
        lost: bool,
    },
    /// The worker runs, or has run.
    Launched,
    /// The worker's process is gone.
    WorkerEnded {
        /// Exit status, if known.
        exit: Option<i32>,
    },
    /// The worker died and was started again. It continues from its last save point.
    Restarted,
    /// Files are saved here.
    Fetched {
        /// Where the files are, and whether they are complete.
        results: SavedResults,
        /// Outcome according to these files.
        ending: RunOutcome,
    },
    /// No results could be saved.
    NotFetched {
        /// The reason, in words.
        reason: String,
    },
    /// The run was stopped early.
    Stopped {
        /// How the run ends.
        ending: RunOutcome,
    },
    /// The instance stays at the user's request.
    Held,
    /// The instance is to end now.
    Terminate,
    /// Complete listings no longer show the instance.
    Gone,
    /// The instance vanished without a call to terminate it.
    Vanished,
}

/// A create call that is about to be made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Intent {
    /// What is rented.
    pub offer: Offer,
    /// Tag that the instance will carry.
    #[serde(with = "tag_text")]
    pub tag: LeaseTag,
}

/// A rented instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rental {
    /// The broker's id.
    pub instance: InstanceId,
    /// What was rented.
    pub offer: Offer,
    /// Tag that the instance carries.
    #[serde(with = "tag_text")]
    pub tag: LeaseTag,
    /// Price: what the broker states for the instance, else the offer's price.
    pub price: UsdPerHour,
    /// Offers that failed before: refused, or of unfit instances. Oldest first.
    #[serde(default)]
    pub refused: Vec<RefusedOffer>,
}

/// A host key as it was first seen. This module does not interpret it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pin(pub String);

/// An offer that failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RefusedOffer {
    /// The offer.
    pub offer: Offer,
    /// The broker's message, or why the instance was unfit.
    pub reason: String,
    /// An instance was rented, was unfit, and was terminated.
    #[serde(default)]
    pub rented: bool,
    /// The instance worked until it vanished, so another one like it may be rented.
    #[serde(default)]
    pub lost: bool,
}

/// Results saved on this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedResults {
    /// Absolute path of the folder on this machine.
    pub folder: String,
    /// Every file of the manifest exists and has its hash.
    pub complete: bool,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "ending", rename_all = "snake_case")]
pub enum RunOutcome {
    /// Complete results are saved here.
    Completed,
    /// The worker reported a failure.
    WorkerFailed {
        /// The worker's report.
        failure: Failure,
    },
    /// The worker ended without a report.
    WorkerVanished {
        /// Exit status, if known.
        exit: Option<i32>,
    },
    /// A step of the controller failed.
    Failed {
        /// The step that failed, and why.
        trouble: FailureDetail,
    },
    /// Ctrl-C.
    Interrupted,
    /// `runs cancel`.
    Cancelled,
    /// The run reached its time limit.
    Deadline,
    /// The instance vanished: it was preempted, crashed, or was terminated by another program.
    InstanceLost,
}

impl RunOutcome {
    /// The remedy that the failed part suggests.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::WorkerFailed { failure } => failure.hint.as_deref(),
            Self::Failed { trouble } => trouble.hint.as_deref(),
            _ => None,
        }
    }
}

/// A step that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureDetail {
    /// For programs, and for the exit status.
    pub kind: RunFailureKind,
    /// What went wrong, and where.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// Kinds of failures that callers distinguish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunFailureKind {
    /// No offer passes the filters, all were refused, or no instance came up.
    NoOffer,
    /// The rest of the budget, or of the agreed amount, pays for no offer.
    Budget,
    /// The cloud refused the account or the request: key, funds, or parameters.
    Broker,
    /// The instance is unreachable or misbehaved.
    Host,
    /// Instances came up and none served.
    Unfit,
    /// Something on this machine.
    Local,
}

impl RunState {
    /// The state of a run without events.
    pub fn initial() -> Self {
        Self::Planned { refused: Vec::new() }
    }

    /// One word, for tables.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Planned { .. } => "planned",
            Self::Creating { .. } => "creating",
            Self::Rented { .. } => "rented",
            Self::Reachable { .. } => "reachable",
            Self::Launched { .. } => "launched",
            Self::Ended { .. } => "ended",
            Self::Salvaging { .. } => "salvaging",
            Self::Synced { .. } => "synced",
            Self::Held { .. } => "held",
            Self::Discarding { .. } => "discarding",
            Self::Terminating { .. } => "terminating",
            Self::Closed { .. } => "closed",
        }
    }

    /// Whether the state is final.
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::Closed { .. })
    }

    /// Whether no process needs to drive the run: it is closed or held.
    pub fn is_at_rest(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::Held { .. })
    }

    /// The rented instance, if one is known.
    pub fn rental(&self) -> Option<&Rental> {
        match self {
            Self::Planned { .. } | Self::Creating { .. } | Self::Closed { .. } => None,
            Self::Rented { rental }
            | Self::Reachable { rental, .. }
            | Self::Launched { rental, .. }
            | Self::Ended { rental, .. }
            | Self::Salvaging { rental, .. }
            | Self::Synced { rental, .. }
            | Self::Held { rental, .. }
            | Self::Discarding { rental, .. }
            | Self::Terminating { rental, .. } => Some(rental),
        }
    }

    /// The tag under which an instance may exist now.
    pub fn tag(&self) -> Option<&LeaseTag> {
        match self {
            Self::Creating { intent, .. } => Some(&intent.tag),
            other => other.rental().map(|rental| &rental.tag),
        }
    }

    /// The offer that is or may be rented.
    pub fn offer(&self) -> Option<&Offer> {
        match self {
            Self::Creating { intent, .. } => Some(&intent.offer),
            other => other.rental().map(|rental| &rental.offer),
        }
    }

    /// The outcome, once it is decided.
    pub fn ending(&self) -> Option<&RunOutcome> {
        match self {
            Self::Salvaging { ending, .. }
            | Self::Synced { ending, .. }
            | Self::Held { ending, .. }
            | Self::Terminating { ending, .. }
            | Self::Closed { ending, .. } => Some(ending),
            _ => None,
        }
    }

    /// The results that were saved.
    pub fn results(&self) -> Option<&SavedResults> {
        match self {
            Self::Synced { results, .. } | Self::Held { results, .. } => Some(results),
            Self::Terminating { results, .. } | Self::Closed { results, .. } => results.as_ref(),
            _ => None,
        }
    }
}

/// The state of a run after an event.
///
/// # Errors
/// [`IllegalEvent`] if the event cannot happen in that state: a defect of this program, or a
/// damaged ledger.
pub fn next(state: &RunState, event: &RunEvent) -> Result<RunState, IllegalEvent> {
    use {RunEvent as E, RunState as S};
    let new = match (state.clone(), event.clone()) {
        (S::Planned { refused }, E::Creating { intent }) => S::Creating { intent: *intent, refused },
        (S::Planned { refused }, E::Stopped { ending }) => {
            S::Closed { ending, results: None, loss: loss(&refused, false) }
        }

        (S::Creating { refused, .. }, E::NotCreated { refused: false, .. }) => S::Planned { refused },
        (S::Creating { intent, mut refused }, E::NotCreated { reason, refused: true, .. }) => {
            refused.push(RefusedOffer { offer: intent.offer, reason, rented: false, lost: false });
            S::Planned { refused }
        }
        (S::Creating { intent: Intent { offer, tag }, refused }, E::Created { instance, price }) => {
            let price = price.unwrap_or(offer.price);
            S::Rented { rental: Rental { instance, offer, tag, price, refused } }
        }

        (S::Rented { rental }, E::Reached { pin, price }) => {
            let price = price.unwrap_or(rental.price);
            S::Reachable { rental: Rental { price, ..rental }, pin }
        }
        (
            S::Rented { rental } | S::Reachable { rental, .. } | S::Launched { rental, .. } | S::Ended { rental, .. },
            E::Discarded { reason, lost },
        ) => S::Discarding { rental, reason, lost },
        (S::Discarding { rental, reason, lost }, E::Gone | E::Vanished) => {
            let Rental { offer, mut refused, .. } = rental;
            refused.push(RefusedOffer { offer, reason, rented: true, lost });
            S::Planned { refused }
        }
        (S::Reachable { rental, pin }, E::Launched) => S::Launched { rental, pin, restarts: 0 },
        (S::Launched { rental, pin, restarts }, E::Repriced { price }) => {
            S::Launched { rental: Rental { price, ..rental }, pin, restarts }
        }
        (S::Launched { rental, pin, restarts }, E::WorkerEnded { exit }) => S::Ended { rental, pin, exit, restarts },
        (S::Ended { rental, pin, restarts, .. }, E::Restarted) => S::Launched { rental, pin, restarts: restarts + 1 },
        (S::Ended { rental, .. }, E::Fetched { results, ending }) => S::Synced { rental, ending, results },

        // Before the launch there are no results to save.
        (S::Rented { rental } | S::Reachable { rental, .. }, E::Stopped { ending }) => {
            let loss = loss(&rental.refused, false);
            S::Terminating { rental, ending, results: None, loss }
        }
        (S::Discarding { rental, lost, .. }, E::Stopped { ending }) => {
            let loss = loss(&rental.refused, lost);
            S::Terminating { rental, ending, results: None, loss }
        }
        (S::Launched { rental, pin, .. } | S::Ended { rental, pin, .. }, E::Stopped { ending }) => {
            S::Salvaging { rental, pin, ending }
        }
        // The decided outcome has priority over files, but a worker that was done in time did not
        // reach its limit, however late its files are fetched.
        (S::Salvaging { rental, ending, .. }, E::Fetched { results, ending: by_files }) => {
            let was_in_time = (&ending, &by_files) == (&RunOutcome::Deadline, &RunOutcome::Completed);
            let ending = if was_in_time { by_files } else { ending };
            S::Terminating { rental, ending, results: Some(results), loss: None }
        }
        (S::Salvaging { rental, ending, .. }, E::NotFetched { reason }) => {
            S::Terminating { rental, ending, results: None, loss: Some(reason) }
        }

        (state, E::Metered { .. }) if state.rental().is_some() => state,

        (S::Synced { rental, ending, results }, E::Held) => S::Held { rental, ending, results },
        (S::Synced { rental, ending, results } | S::Held { rental, ending, results }, E::Terminate) => {
            S::Terminating { rental, ending, results: Some(results), loss: None }
        }
        (S::Terminating { ending, results, loss, .. }, E::Gone) => S::Closed { ending, results, loss },

        (
            S::Rented { .. }
            | S::Reachable { .. }
            | S::Launched { .. }
            | S::Ended { .. }
            | S::Salvaging { .. }
            | S::Synced { .. }
            | S::Held { .. },
            E::Vanished,
        ) => vanished(state),

        _ => return Err(IllegalEvent { state: state.word(), event: event.word() }),
    };
    Ok(new)
}

const WENT_AWAY: &str = "the instance went away before its files were saved";

/// The loss that no later instance makes up for. It is of the instance that vanished now, or of an
/// earlier one.
fn loss(refused: &[RefusedOffer], now: bool) -> Option<String> {
    (now || refused.iter().any(|refusal| refusal.lost)).then(|| WENT_AWAY.to_owned())
}

/// Saved results outlast the instance. Others are lost with it.
fn vanished(state: &RunState) -> RunState {
    let ran = matches!(state, RunState::Launched { .. } | RunState::Ended { .. } | RunState::Salvaging { .. });
    let before = state.rental().map_or(&[][..], |rental| &rental.refused);
    let results = state.results().cloned();
    RunState::Closed {
        ending: state.ending().cloned().unwrap_or(RunOutcome::InstanceLost),
        loss: loss(before, ran).filter(|_| results.is_none()),
        results,
    }
}

impl RunEvent {
    /// One word, for errors.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Creating { .. } => "creating",
            Self::NotCreated { .. } => "not created",
            Self::Created { .. } => "created",
            Self::Reached { .. } => "reached",
            Self::Metered { .. } => "metered",
            Self::Repriced { .. } => "repriced",
            Self::Discarded { .. } => "discarded",
            Self::Launched => "launched",
            Self::WorkerEnded { .. } => "worker ended",
            Self::Restarted => "restarted",
            Self::Fetched { .. } => "fetched",
            Self::NotFetched { .. } => "not fetched",
            Self::Stopped { .. } => "stopped",
            Self::Held => "held",
            Self::Terminate => "terminate",
            Self::Gone => "gone",
            Self::Vanished => "vanished",
        }
    }
}

impl fmt::Display for RunOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Completed => f.write_str("completed"),
            Self::WorkerFailed { failure } => write!(f, "the worker failed: {}", failure.message),
            Self::WorkerVanished { exit: Some(exit) } => {
                write!(f, "the worker ended with status {exit} and left no manifest")
            }
            Self::WorkerVanished { exit: None } => f.write_str("the worker was killed and left no manifest"),
            Self::Failed { trouble } => f.write_str(&trouble.message),
            Self::Interrupted => f.write_str("interrupted"),
            Self::Cancelled => f.write_str("cancelled"),
            Self::Deadline => f.write_str("the time limit of the run was reached"),
            Self::InstanceLost => f.write_str("the instance went away by itself"),
        }
    }
}

/// An event that cannot happen in a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a run that is {state} cannot become {event}")]
pub struct IllegalEvent {
    /// The state's word.
    pub state: &'static str,
    /// The event's word.
    pub event: &'static str,
}

/// Lease tags as the text the instance carries.
mod tag_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::cloud::broker::LeaseTag;

    pub(super) fn serialize<S: Serializer>(tag: &LeaseTag, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(tag)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<LeaseTag, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::run::deploy::tests::fake::{spec, up_to};

    fn offer() -> Offer {
        Offer { cpu_cores: Some(2), ..Offer::new("fake", "o1".into(), 0, UsdPerHour::from_dollars(1.0)) }
    }

    fn intent() -> Box<Intent> {
        let tag = LeaseTag { owner: "me".into(), run: "r1".into(), nonce: "n1".into(), deadline: 99 };
        Box::new(Intent { offer: offer(), tag })
    }

    fn brought() -> SavedResults {
        SavedResults { folder: "/somewhere".into(), complete: true }
    }

    fn events() -> Vec<RunEvent> {
        vec![
            RunEvent::Creating { intent: intent() },
            RunEvent::NotCreated { reason: "no capacity".into(), refused: true, unseen: false },
            RunEvent::NotCreated { reason: "no answer".into(), refused: false, unseen: true },
            RunEvent::Created { instance: InstanceId("i1".into()), price: Some(UsdPerHour::from_dollars(2.0)) },
            RunEvent::Created { instance: InstanceId("i1".into()), price: None },
            RunEvent::Reached { pin: Pin("key".into()), price: None },
            RunEvent::Metered { time: RunTime { ended_s: 7, since: Some(8), until: None } },
            RunEvent::Repriced { price: UsdPerHour::from_dollars(3.0) },
            RunEvent::Discarded { reason: "it has no GPU".into(), lost: false },
            RunEvent::Discarded { reason: "it went away".into(), lost: true },
            RunEvent::Restarted,
            RunEvent::Launched,
            RunEvent::WorkerEnded { exit: Some(0) },
            RunEvent::Fetched { results: brought(), ending: RunOutcome::Completed },
            RunEvent::NotFetched { reason: "skipped".into() },
            RunEvent::Stopped { ending: RunOutcome::Interrupted },
            RunEvent::Held,
            RunEvent::Terminate,
            RunEvent::Gone,
            RunEvent::Vanished,
        ]
    }

    fn replay(events: &[RunEvent]) -> RunState {
        events.iter().fold(RunState::initial(), |state, event| next(&state, event).unwrap())
    }

    #[test]
    fn successful_run_ends_closed_and_completed() {
        let path = [
            RunEvent::Creating { intent: intent() },
            RunEvent::Created { instance: InstanceId("i1".into()), price: None },
            RunEvent::Reached { pin: Pin("key".into()), price: None },
            RunEvent::Launched,
            RunEvent::WorkerEnded { exit: Some(0) },
            RunEvent::Fetched { results: brought(), ending: RunOutcome::Completed },
            RunEvent::Terminate,
            RunEvent::Gone,
        ];
        let closed = RunState::Closed { ending: RunOutcome::Completed, results: Some(brought()), loss: None };
        assert_eq!(replay(&path), closed);
    }

    #[test]
    fn stop_before_launch_skips_saving_results() {
        let mut path = vec![
            RunEvent::Creating { intent: intent() },
            RunEvent::Created { instance: InstanceId("i1".into()), price: None },
        ];
        let stop = RunEvent::Stopped { ending: RunOutcome::Interrupted };
        assert_eq!(next(&replay(&path), &stop).unwrap().word(), "terminating");
        path.extend([RunEvent::Reached { pin: Pin("key".into()), price: None }, RunEvent::Launched, stop]);
        assert_eq!(replay(&path).word(), "salvaging");
    }

    #[test]
    fn complete_results_fetched_after_the_time_limit_are_of_a_completed_run() {
        for (stopped, ends) in [
            (RunOutcome::Deadline, RunOutcome::Completed),
            (RunOutcome::Interrupted, RunOutcome::Interrupted),
            (RunOutcome::Cancelled, RunOutcome::Cancelled),
        ] {
            let path = [
                RunEvent::Creating { intent: intent() },
                RunEvent::Created { instance: InstanceId("i1".into()), price: None },
                RunEvent::Reached { pin: Pin("key".into()), price: None },
                RunEvent::Launched,
                RunEvent::Stopped { ending: stopped },
                RunEvent::Fetched { results: brought(), ending: RunOutcome::Completed },
                RunEvent::Gone,
            ];
            assert_eq!(replay(&path), RunState::Closed { ending: ends, results: Some(brought()), loss: None });
        }
    }

    #[test]
    fn price_of_the_created_instance_wins_over_the_offer() {
        let created = |price| {
            replay(&[
                RunEvent::Creating { intent: intent() },
                RunEvent::Created { instance: InstanceId("i1".into()), price },
            ])
        };
        let price = |state: RunState| state.rental().unwrap().price;
        assert_eq!(price(created(None)), UsdPerHour::from_dollars(1.0));
        assert_eq!(price(created(Some(UsdPerHour::from_dollars(2.0)))), UsdPerHour::from_dollars(2.0));
    }

    #[test]
    fn remaining_quote_bounds_the_remaining_time() {
        let hour = spec(std::path::Path::new("/r"));
        let agreed = RunSpec { quote: up_to(Usd::from_dollars(1.0)), ..hour.clone() };
        let time = |spec: &RunSpec, spent: f64| spec.time_on(&offer(), Usd::from_dollars(spent)).as_secs();
        assert_eq!([0.0, 0.5, 1.0, 2.0].map(|spent| time(&agreed, spent)), [3600, 1800, 0, 0]);
        assert_eq!([0.0, 2.0].map(|spent| time(&hour, spent)), [3600, 3600], "nobody was asked");
        // The work is estimated to take somewhat more than five minutes, and twice that time must
        // be paid for.
        let pays = |spent: f64| agreed.pays_for(&offer(), Usd::from_dollars(spent));
        assert_eq!([0.0, 0.8, 0.9].map(pays), [true, true, false]);
        assert_eq!(agreed.highest_price(&offer()), offer().price);
        assert!(hour.highest_price(&offer()) > offer().price);
    }

    #[test]
    fn price_of_the_running_instance_counts() {
        let mut path = vec![
            RunEvent::Creating { intent: intent() },
            RunEvent::Created { instance: InstanceId("i1".into()), price: None },
        ];
        path.push(RunEvent::Reached { pin: Pin("key".into()), price: Some(UsdPerHour::from_dollars(1.05)) });
        assert_eq!(replay(&path).rental().unwrap().price, UsdPerHour::from_dollars(1.05));
    }

    #[test]
    fn unfit_instance_is_gone_before_the_next_create() {
        let mut path = vec![
            RunEvent::Creating { intent: intent() },
            RunEvent::NotCreated { reason: "sold out".into(), refused: true, unseen: false },
            RunEvent::Creating { intent: intent() },
            RunEvent::Created { instance: InstanceId("i1".into()), price: None },
            RunEvent::Discarded { reason: "it has no GPU".into(), lost: false },
        ];
        let discarding = replay(&path);
        assert!(discarding.tag().is_some(), "it bills until it is gone");
        assert!(next(&discarding, &RunEvent::Creating { intent: intent() }).is_err());
        path.push(RunEvent::Gone);
        let RunState::Planned { refused } = replay(&path) else { panic!("it is planned again") };
        assert_eq!(refused.iter().map(|refusal| refusal.rented).collect::<Vec<_>>(), [false, true]);
        let stopped = next(&discarding, &RunEvent::Stopped { ending: RunOutcome::Interrupted }).unwrap();
        assert_eq!(stopped.word(), "terminating");
    }

    #[test]
    fn vanished_work_is_a_loss_unless_redone() {
        let launched = [
            RunEvent::Creating { intent: intent() },
            RunEvent::Created { instance: InstanceId("i1".into()), price: None },
            RunEvent::Reached { pin: Pin("key".into()), price: None },
            RunEvent::Launched,
        ];
        let lost = [RunEvent::Discarded { reason: "preempted".into(), lost: true }, RunEvent::Gone];
        let ended = [
            RunEvent::WorkerEnded { exit: Some(137) },
            RunEvent::Restarted,
            RunEvent::WorkerEnded { exit: Some(0) },
            RunEvent::Fetched { results: brought(), ending: RunOutcome::Completed },
            RunEvent::Terminate,
            RunEvent::Gone,
        ];
        let stop = [RunEvent::Stopped { ending: RunOutcome::Interrupted }];
        let RunState::Closed { loss, .. } = replay(&[&launched[..], &lost, &stop].concat()) else { panic!("closed") };
        assert_eq!(loss.as_deref(), Some(WENT_AWAY));
        let mended = replay(&[&launched[..], &lost, &launched, &ended].concat());
        let whole = RunState::Closed { ending: RunOutcome::Completed, results: Some(brought()), loss: None };
        assert_eq!(mended, whole);
    }

    #[test]
    fn stop_does_not_close_an_unresolved_create_call() {
        let creating = replay(&[RunEvent::Creating { intent: intent() }]);
        assert!(next(&creating, &RunEvent::Stopped { ending: RunOutcome::Interrupted }).is_err());
        assert!(next(&creating, &RunEvent::Gone).is_err());
        assert!(next(&creating, &RunEvent::Vanished).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// For any sequence of events, with illegal ones refused: an instance that may bill is
        /// never forgotten, the closed state is final, and state and events survive serialisation.
        #[test]
        fn any_event_sequence_keeps_the_invariants(picks in prop::collection::vec(0usize..20, 0..60)) {
            let all = events();
            let mut state = RunState::initial();
            for pick in picks {
                let event = &all[pick];
                let text = serde_json::to_string(event).unwrap();
                prop_assert_eq!(&serde_json::from_str::<RunEvent>(&text).unwrap(), event);
                let Ok(new) = next(&state, event) else { continue };
                prop_assert!(!state.is_closed(), "{} left the closed state", event.word());
                if state.rental().is_some() && new.rental().is_none() {
                    prop_assert!(matches!(event, RunEvent::Gone | RunEvent::Vanished));
                    let exchanged = matches!(state, RunState::Discarding { .. });
                    prop_assert!(new.is_closed() || exchanged);
                }
                if matches!(state, RunState::Creating { .. }) && new.tag().is_none() {
                    let certain = matches!(event, RunEvent::NotCreated { .. });
                    prop_assert!(certain);
                }
                if let (Some(before), Some(after)) = (state.rental(), new.rental()) {
                    let is_told = matches!(event, RunEvent::Reached { .. } | RunEvent::Repriced { .. });
                    let price = if is_told { after.price } else { before.price };
                    prop_assert_eq!(&Rental { price, ..before.clone() }, after);
                }
                if let Some(ending) = state.ending() {
                    prop_assert_eq!(Some(ending), new.ending());
                }
                if let Some(results) = state.results() {
                    prop_assert_eq!(Some(results), new.results());
                }
                let text = serde_json::to_string(&new).unwrap();
                prop_assert_eq!(&serde_json::from_str::<RunState>(&text).unwrap(), &new);
                state = new;
            }
        }
    }
}
