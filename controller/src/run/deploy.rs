//! Drives one run step by step, from any state to its end.
//!
//! The driver's loop reads the state, performs one step, and writes the resulting event. A new run
//! and one resumed after a crash take the same path. The state of this process ([`ProcessState`])
//! only saves repeated work.

use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use outliers_protocol::{JobSpec, MICRO_BATCH_TOKENS};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::cloud::broker::{InstanceId, Offer, RunTime};
use crate::cloud::clouds::{Cloud, Timeouts};
use crate::files;
use crate::host::HostEvent;
use crate::run::ledger::{CostMeter, LedgerError, RUN_FILE, RunRecord, RunWriter};
use crate::run::local_worker::corpus_files;
use crate::run::{FailureDetail, Intent, RunEvent, RunFailureKind, RunOutcome, RunState};
use crate::units::{Span, Usd, UsdPerHour};
use crate::waiting::{Failed, told};

mod collect;
mod grace;
mod ports;
mod recover;
mod ssh;
mod start_throttle;
mod steps;
mod terminate;
#[cfg(test)]
pub(crate) mod tests;

pub use collect::{holds, slug};
pub use ports::{Host, Hosts, Ports};
pub(crate) use recover::{Reconciliation, Target, apply_actions, end, reconcile_cloud, recover, release};
pub use ssh::{SshHosts, read_cursor, read_progress};
pub use start_throttle::StartThrottle;

use grace::Grace;

/// With less time a worker is not started again, or a tenth of the run's time limit.
const MIN_WORK: Duration = Duration::from_secs(60);

/// Name of the private key in a run's folder.
pub const KEY_FILE: &str = "id_ed25519";

/// Requests to stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// None.
    #[default]
    Go,
    /// The terminal is gone (SIGHUP): a run that another process can resume is left running, any
    /// other is stopped.
    LetGo,
    /// Stop the worker, fetch partial results, terminate the instance.
    Now,
    /// Fetch nothing. The instance is terminated in any case.
    SkipSync,
}

/// Events of a driven run, for the user interface.
#[derive(Clone, Debug, PartialEq)]
pub enum DeployEvent {
    /// The run has a new state.
    State(Box<RunState>),
    /// The cost as far as it is known, at the start and after each change.
    Meter(CostMeter),
    /// An offer is being rented.
    Renting(Box<Offer>),
    /// An offer was refused. The next one is tried.
    Refused {
        /// The broker's message.
        reason: String,
    },
    /// A step failed and will be repeated.
    Retrying {
        /// The step, and the error.
        reason: String,
        /// Time until the next attempt.
        pause: Duration,
    },
    /// It is unknown whether the instance exists: the broker is queried.
    Settling,
    /// The instance is not ready yet.
    Booting,
    /// An event on the host.
    Host(HostEvent),
    /// A sentence about the run, for people. It may hold what a host or a cloud said.
    Note(String),
    /// An instance is being terminated.
    Terminating(InstanceId),
    /// The cloud does not terminate an instance.
    StillBilling(Box<StillBilling>),
    /// Results cannot be saved here, and remain on their instance.
    Kept(Box<UnsavedResults>),
    /// A step takes long.
    Waiting {
        /// Description of the step.
        what: String,
        /// The last attempt that failed.
        failed: Option<Failed>,
    },
    /// The user requested a stop.
    Stopping(Stop),
}

/// An instance that still bills after it was terminated.
#[derive(Clone, Debug, PartialEq)]
pub struct StillBilling {
    /// Name of the cloud.
    pub broker: String,
    /// Its id at the cloud.
    pub instance: InstanceId,
    /// The cloud's answer.
    pub why: String,
    /// Time until the next attempt.
    pub pause: Duration,
    /// Its price, if known.
    pub price: Option<UsdPerHour>,
    /// The cost of it, or of its run, so far.
    pub cost: Option<Usd>,
}

/// Results that cannot be saved here, on an instance that bills.
#[derive(Clone, Debug, PartialEq)]
pub struct UnsavedResults {
    /// The run.
    pub run: String,
    /// The instance with the results.
    pub instance: InstanceId,
    /// Why they cannot be saved.
    pub why: String,
    /// Price of the instance.
    pub price: UsdPerHour,
    /// Cost of the run so far.
    pub cost: Usd,
    /// They are kept until then, in Unix seconds.
    pub until: u64,
    /// Time until the next attempt.
    pub pause: Duration,
}

/// A callback for [`DeployEvent`]s.
pub type OnEvent<'a> = dyn Fn(DeployEvent) + Send + Sync + 'a;

/// The run could not be driven to its end. Its instance may exist and bill.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// It is unknown whether the instance exists, or it cannot be terminated.
    #[error("run {run}: {message}")]
    Instance {
        /// The run.
        run: String,
        /// The error.
        message: String,
    },
    /// The broker does not answer. No open run of this ledger can have an instance there.
    #[error("{message}")]
    Silent {
        /// The error.
        message: String,
        /// The remedy.
        hint: Option<String>,
    },
    /// The broker does not answer, or a stray instance cannot be terminated.
    #[error("{message}")]
    Broker {
        /// The error.
        message: String,
    },
    /// The ledger cannot be read or written. No instance remains because of it.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// Drives one run.
pub struct Driver<'a> {
    run: RunWriter,
    ports: Ports<'a>,
    stop: watch::Receiver<Stop>,
    on: &'a OnEvent<'a>,
    stopping_as: RunOutcome,
    detach: bool,
    memory: ProcessState,
}

/// State of this process. Losing it costs repeated work only.
#[derive(Default)]
struct ProcessState {
    /// The recorded intent is this process's, and its create call has not been made.
    fresh_intent: bool,
    /// Number of this process's unanswered create calls.
    unanswered: u32,
    /// The created instance, until the ledger has it.
    created: Option<InstanceId>,
    /// Outcome of the run if no further offer is worth trying.
    hopeless: Option<RunOutcome>,
    host: Option<Box<dyn Host>>,
    /// Price of the instance in the latest listing.
    price: Option<UsdPerHour>,
    /// Start and number of consecutive failures of the current step.
    failing: Option<(Instant, u32)>,
    /// Remaining time for the host to start its worker.
    grace: Option<Arc<Grace>>,
    /// Error of fetching the files.
    unfetchable: Option<String>,
    /// No local folder can store the files. The instance is kept until then. Reported at that time.
    kept_until: Option<Instant>,
    kept_told: Option<Instant>,
    /// When this process found the worker ended.
    ended_at: Option<Instant>,
    /// When the run was stopped; from then on only existing results are saved.
    stopped_at: Arc<OnceLock<Instant>>,
    /// Whether the run continues without this process.
    let_go: bool,
}

/// Reasons why a step did not complete.
enum StepError {
    /// The run ends with this outcome.
    End(RunOutcome),
    /// The instance is gone.
    Vanished,
    /// The instance is listed but not running.
    Down,
    /// The instance is unfit, for this reason.
    Unfit(String),
    /// The run continues without this process.
    LetGo,
    /// Driving ends with this error.
    Drive(DriveError),
}

impl From<LedgerError> for StepError {
    fn from(error: LedgerError) -> Self {
        Self::Drive(error.into())
    }
}

impl<'a> Driver<'a> {
    /// Creates the driver of a run.
    pub fn new(run: RunWriter, ports: Ports<'a>, stop: watch::Receiver<Stop>, on: &'a OnEvent<'a>) -> Self {
        Self {
            run,
            ports,
            stop,
            on,
            stopping_as: RunOutcome::Interrupted,
            detach: false,
            memory: ProcessState::default(),
        }
    }

    /// Whether to leave the run once its worker runs.
    pub fn detaching(self, detach: bool) -> Self {
        Self { detach, ..self }
    }

    /// Outcome for a stop through the channel; default: interrupted.
    pub fn stopping_as(self, ending: RunOutcome) -> Self {
        Self { stopping_as: ending, ..self }
    }

    /// Drives the run until it is closed, held, or left: then its worker runs, and something other
    /// than a controller ends its instance.
    ///
    /// # Errors
    /// [`DriveError`]: the instance may still exist; the same run can be driven again later.
    pub async fn drive(mut self) -> Result<RunRecord, DriveError> {
        (self.on)(DeployEvent::Meter(self.run.record().meter()));
        while !self.run.state().is_at_rest() && !self.memory.let_go {
            match self.advance().await {
                Err(DriveError::Ledger(error)) => self.unrecorded(error).await?,
                advanced => advanced?,
            }
        }
        self.tidy();
        Ok(self.run.record().clone())
    }

    /// Performs one step and handles its result.
    async fn advance(&mut self) -> Result<(), DriveError> {
        match self.meter() {
            // The results of a worker that has ended come home first.
            Err(error) if error.is_of_the_file() && self.has_ended() => {}
            metered => metered?,
        }
        if matches!(self.run.state(), RunState::Salvaging { .. }) || *self.stop.borrow() != Stop::Go {
            self.memory.stopped_at.get_or_init(Instant::now);
        }
        if matches!(self.run.state(), RunState::Ended { .. }) {
            self.memory.ended_at.get_or_insert_with(Instant::now);
        }
        let (interrupt, let_go) = (self.interrupt(), self.let_go());
        let step = tokio::select! {
            biased;
            ending = interrupt => Err(StepError::End(ending)),
            () = let_go => Err(StepError::LetGo),
            step = self.told_step() => step,
        };
        match step {
            Ok(()) => {}
            // A job that was put back into its queue has got new time since.
            Err(StepError::End(RunOutcome::Deadline)) if self.ends_at().is_some() && self.has_time_for_work() => {}
            Err(StepError::End(ending)) => self.end(ending)?,
            Err(StepError::Vanished) if self.is_replaceable() => self.lost()?,
            Err(StepError::Vanished) => self.append(RunEvent::Vanished)?,
            Err(StepError::Down) if self.is_replaceable() => self.lost()?,
            Err(StepError::Down) => self.end(RunOutcome::InstanceLost)?,
            Err(StepError::Unfit(reason)) => self.unfit(reason)?,
            Err(StepError::LetGo) => self.memory.let_go = true,
            Err(StepError::Drive(stuck)) => return Err(stuck),
        }
        Ok(())
    }

    /// Handles a ledger that cannot be written, or that lacks what other runs have taken of a
    /// shared budget. A run with an instance and time left waits, since the worker does not need
    /// the ledger. A run that must end, or cannot continue, terminates its instance.
    async fn unrecorded(&mut self, error: LedgerError) -> Result<(), DriveError> {
        let Some(tag) = self.run.state().tag().cloned() else { return Err(error.into()) };
        let has_work = matches!(self.run.state(), RunState::Launched { .. } | RunState::Ended { .. });
        if self.is_replaceable() && (error.is_of_the_file() || has_work) {
            let pause = self.timeouts().listing_interval;
            (self.on)(DeployEvent::Retrying { reason: error.to_string(), pause });
            let mut stop = self.stop.clone();
            tokio::select! {
                Ok(_) = stop.wait_for(|level| *level != Stop::Go) => {}
                () = tokio::time::sleep(pause) => {}
            }
            return Ok(());
        }
        let known = self.run.state().rental().map(|rental| rental.instance.clone());
        // No list may show it yet.
        let known = known.or_else(|| self.memory.created.take());
        match self.terminate_until_gone(&tag, known.as_ref()).await {
            Err(StepError::Drive(stuck)) => Err(stuck),
            _ => Err(error.into()),
        }
    }

    /// Performs a step, and reports what it waits for. In a queue, which may take days, only what
    /// is new.
    async fn told_step(&mut self) -> Result<(), StepError> {
        let (on, what) = (self.on, self.awaited());
        let is_queued = matches!(self.run.state(), RunState::Rented { rental } if rental.offer.queued);
        let told_before = Mutex::new(None);
        let say = |failed: Option<&Failed>| {
            let now = failed.map(|failed| failed.words.clone());
            let before = told_before.lock().expect("nothing panics while it is held").replace(now.clone());
            if let Some(what) = &what
                && !(is_queued && before == Some(now))
            {
                on(DeployEvent::Waiting { what: what.clone(), failed: failed.cloned() });
            }
        };
        told(say, self.step()).await
    }

    /// Description of the current step, if it may take long without output.
    fn awaited(&self) -> Option<String> {
        match self.run.state() {
            RunState::Planned { .. } => Some("the clouds' offers".to_owned()),
            RunState::Creating { intent, .. } => Some(format!("{} to rent", intent.offer.broker)),
            RunState::Rented { rental } => {
                Some(format!("instance {} on {} to come up and answer", rental.instance, rental.offer.broker))
            }
            RunState::Reachable { rental, .. } => Some(format!("instance {} to be made ready", rental.instance)),
            RunState::Ended { rental, .. } | RunState::Salvaging { rental, .. } if self.memory.kept_until.is_none() => {
                Some(format!("the files on instance {}", rental.instance))
            }
            // The worker reports its progress, and endings are reported in more detail.
            _ => None,
        }
    }

    async fn step(&mut self) -> Result<(), StepError> {
        match self.run.state().clone() {
            RunState::Planned { refused } => self.choose_offer(&refused).await,
            RunState::Creating { intent, .. } => self.create(&intent).await,
            RunState::Rented { rental } => self.reach(&rental).await,
            RunState::Reachable { rental, pin } => self.launch(&rental, &pin).await,
            RunState::Launched { rental, pin, .. } if self.detach => self.leave(&rental, &pin).await,
            RunState::Launched { rental, pin, .. } => self.follow(&rental, &pin).await,
            RunState::Ended { rental, pin, exit, restarts } => self.sync(&rental, &pin, exit, restarts).await,
            RunState::Salvaging { rental, pin, .. } => self.salvage(&rental, &pin).await,
            RunState::Synced { .. } => self.after_sync(),
            RunState::Discarding { rental, .. } | RunState::Terminating { rental, .. } => self.terminate(&rental).await,
            RunState::Held { .. } | RunState::Closed { .. } => Ok(()),
        }
    }

    /// The cloud of this run's instance.
    fn cloud(&self) -> Result<&'a Cloud, StepError> {
        let offer = self.run.state().offer();
        offer.and_then(|offer| self.ports.clouds.of(offer)).ok_or_else(|| {
            let broker = offer.map(|offer| offer.broker.as_str()).unwrap_or_default();
            let message = format!("its instance is on {broker}, which is not among the clouds that can be asked");
            StepError::Drive(DriveError::Instance { run: self.run.record().id.clone(), message })
        })
    }

    /// Timeouts of the run's cloud; before it has one, those of the first possible cloud.
    fn timeouts(&self) -> &'a Timeouts {
        let cloud = self.cloud().ok().or_else(|| self.ports.clouds.iter().next());
        cloud.map_or(&Timeouts::CLOUD, |cloud| &cloud.timeouts)
    }

    /// Records an event and reports it. Resets the failures of the previous state.
    fn append(&mut self, event: RunEvent) -> Result<(), LedgerError> {
        self.run.append(event)?;
        self.changed();
        Ok(())
    }

    /// Records the intent to rent, if the budget allows it now.
    fn reserve(&mut self, intent: Intent, worst: Usd) -> Result<bool, LedgerError> {
        let reserved = self.run.reserve(intent, worst)?;
        if reserved {
            self.changed();
        }
        Ok(reserved)
    }

    /// Writes down the cloud's own record of how long the instance has run, where that is news.
    fn meter(&mut self) -> Result<(), LedgerError> {
        let Some(time) = self.new_run_time() else { return Ok(()) };
        self.run.append(RunEvent::Metered { time })?;
        (self.on)(DeployEvent::Meter(self.run.record().meter()));
        Ok(())
    }

    fn new_run_time(&self) -> Option<RunTime> {
        let instance = &self.run.state().rental()?.instance;
        self.run.record().news(self.cloud().ok()?.broker.run_time(instance)?)
    }

    fn changed(&mut self) {
        self.memory.failing = None;
        self.memory.grace = None;
        self.memory.kept_until = None;
        self.memory.ended_at = None;
        (self.on)(DeployEvent::Meter(self.run.record().meter()));
        (self.on)(DeployEvent::State(Box::new(self.run.state().clone())));
    }

    /// Replaces an instance on which nothing has run. Otherwise the run ends.
    fn unfit(&mut self, reason: String) -> Result<(), LedgerError> {
        match self.run.state() {
            RunState::Rented { rental } | RunState::Reachable { rental, .. } => {
                self.ports.bad_hosts.remember(&rental.offer);
                (self.on)(DeployEvent::Refused { reason: reason.clone() });
                self.append(RunEvent::Discarded { reason, lost: false })
            }
            _ => self.end(RunOutcome::Failed {
                trouble: FailureDetail { kind: RunFailureKind::Host, message: reason, hint: None },
            }),
        }
    }

    /// Whether the instance can be replaced, within the time limit and without a request to stop.
    fn is_replaceable(&self) -> bool {
        let still_to_do = matches!(
            self.run.state(),
            RunState::Rented { .. } | RunState::Reachable { .. } | RunState::Launched { .. } | RunState::Ended { .. }
        );
        still_to_do && self.has_time() && self.stop() < Stop::Now && !self.run.cancel_asked()
    }

    /// Whether its worker has ended, and what it left is to be saved.
    fn has_ended(&self) -> bool {
        matches!(self.run.state(), RunState::Ended { .. } | RunState::Salvaging { .. } | RunState::Synced { .. })
    }

    /// How urgently the run is to end: what another process cannot pick up is not let go of.
    fn stop(&self) -> Stop {
        match *self.stop.borrow() {
            Stop::LetGo if !self.can_be_left() => Stop::Now,
            level => level,
        }
    }

    /// Whether the worker runs with a guard, on an instance that ends without a controller.
    fn can_be_left(&self) -> bool {
        matches!(self.run.state(), RunState::Launched { .. })
            && self.cloud().is_ok_and(|cloud| cloud.broker.capabilities().ends_by_itself())
    }

    /// Resolves when the run should and can be left.
    fn let_go(&self) -> impl Future<Output = ()> + use<> {
        let (can_be_left, mut stop) = (self.can_be_left(), self.stop.clone());
        async move {
            if !can_be_left || stop.wait_for(|level| *level == Stop::LetGo).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn lost(&mut self) -> Result<(), LedgerError> {
        self.memory.host = None;
        let reason = RunOutcome::InstanceLost.to_string();
        (self.on)(DeployEvent::Refused { reason: reason.clone() });
        self.append(RunEvent::Discarded { reason, lost: true })
    }

    /// Ends the run early, depending on its state.
    fn end(&mut self, ending: RunOutcome) -> Result<(), LedgerError> {
        match self.run.state() {
            RunState::Salvaging { .. } => {
                let limit = self.timeouts().sync;
                let is_late = self.memory.stopped_at.get().is_some_and(|at| at.elapsed() >= limit);
                let reason = match &ending {
                    RunOutcome::Failed { trouble } => trouble.message.clone(),
                    _ if is_late => format!("the results so far were not fetched within {}", Span(limit)),
                    other => other.to_string(),
                };
                self.append(RunEvent::NotFetched { reason })
            }
            _ => self.append(RunEvent::Stopped { ending }),
        }
    }

    /// Resolves when the current state must be left early; never in states that must complete.
    fn interrupt(&self) -> impl Future<Output = RunOutcome> + use<> {
        let threshold = match self.run.state() {
            RunState::Launched { .. } if self.can_be_left() => Some(Stop::Now),
            RunState::Planned { .. }
            | RunState::Rented { .. }
            | RunState::Reachable { .. }
            | RunState::Discarding { .. }
            | RunState::Launched { .. } => Some(Stop::LetGo),
            // The files are already being fetched, which is what the first Ctrl-C requests.
            RunState::Ended { .. } | RunState::Salvaging { .. } => Some(Stop::SkipSync),
            _ => None,
        };
        let is_coming_home = matches!(self.run.state(), RunState::Ended { .. } | RunState::Salvaging { .. });
        let (stopped_at, limit) = (Arc::clone(&self.memory.stopped_at), self.timeouts().sync);
        let deadline = match self.run.state() {
            // All results are there: saving them may take longer than the time limit, but not
            // without end.
            RunState::Ended { .. } => {
                self.time_is_up_at().zip(self.memory.ended_at).map(|(at, ended_at)| at.max(ended_at) + limit)
            }
            RunState::Salvaging { .. } => self.salvaged_by(),
            _ => self.time_is_up_at(),
        };
        let is_stopped = stopped_at.get().is_some();
        let (mut stop, mut first) = (self.stop.clone(), self.stop.clone());
        let cancel = self.run.cancel_probe();
        let stopped = self.stopping_as.clone();
        async move {
            let Some(threshold) = threshold else { return std::future::pending().await };
            let early = threshold < Stop::SkipSync;
            let asked = async {
                if stop.wait_for(|level| *level >= threshold).await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            let cancelled = async {
                while !(early && cancel()) {
                    tokio::time::sleep(Duration::from_millis(250)).await;
                }
            };
            let late = async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            // After a stop, files are fetched within a short time or not at all.
            let endless = async {
                if !is_coming_home || first.wait_for(|level| is_stopped || *level != Stop::Go).await.is_err() {
                    std::future::pending::<()>().await;
                }
                tokio::time::sleep_until(*stopped_at.get_or_init(Instant::now) + limit).await;
            };
            tokio::select! {
                biased;
                () = asked => stopped,
                () = cancelled => RunOutcome::Cancelled,
                () = late => RunOutcome::Deadline,
                () = endless => stopped,
            }
        }
    }

    /// When the worker must stop, so that its files can be fetched before the instance ends.
    fn time_is_up_at(&self) -> Option<Instant> {
        let (left, reserve) = self.time_left()?;
        Some(Instant::now() + left.saturating_sub(reserve))
    }

    /// When the files of a worker that was stopped must be here, so that the instance is gone at
    /// its time limit; `None`: it is too late for that, or they cost nothing where they are.
    fn salvaged_by(&self) -> Option<Instant> {
        let is_free = self.run.state().offer().is_some_and(|offer| offer.queued || offer.is_local);
        let (left, reserve) = self.time_left().filter(|_| !is_free)?;
        let left = left.checked_sub(reserve / 5).filter(|left| !left.is_zero())?;
        Some(Instant::now() + left)
    }

    /// Time until the instance must end, and how much of it is for fetching its files.
    fn time_left(&self) -> Option<(Duration, Duration)> {
        let lease = self.run.state().rental()?.tag.deadline;
        let deadline = [self.ends_at(), self.is_used_up_at()].into_iter().flatten().fold(lease, u64::min);
        let deadline = Duration::from_secs(deadline);
        let whole = deadline.saturating_sub(Duration::from_millis(self.run.record().asked_at_ms()?));
        // Time in a queue does not count.
        let whole = whole.min(self.run.record().spec.limit());
        let reserve = (whole / 10).min(Duration::from_secs(300));
        let by_the_cloud = |now: u64| self.cloud().map_or(now, |cloud| cloud.time(now));
        let now_ms = self.run.now_ms();
        let now = Duration::from_secs(by_the_cloud(now_ms / 1000)) + Duration::from_millis(now_ms % 1000);
        Some((deadline.saturating_sub(now), reserve))
    }

    /// When a job has used up what was agreed, its --max-gpu-hours, or its share of what a survey
    /// may take, in Unix seconds by its cloud's clock: one that was put back into its queue has got
    /// all of its time again.
    fn is_used_up_at(&self) -> Option<u64> {
        let record = self.run.record();
        let time = record.run_time()?;
        let since = time.since?;
        let (rental, since_ms) = (record.state.rental()?, since.saturating_mul(1000));
        let by_price = || rental.price.time(record.spec.quote.ceiling? - record.cost(since_ms));
        let by_gpus = || {
            let left = record.spec.max_gpu_time?.seconds().saturating_sub(record.gpu_time(since_ms).seconds());
            let seconds = left.max(0).checked_div(rental.offer.gpu_count.into())?;
            Some(Duration::from_secs(seconds.unsigned_abs()))
        };
        // The rest of what a survey may take is reserved for its other runs.
        let spec = &record.spec;
        let is_shared = spec.survey.is_some() && (spec.budget.is_some() || spec.max_gpu_time.is_some());
        let by_share = || is_shared.then(|| spec.limit().saturating_sub(Duration::from_secs(time.ended_s)));
        let left = [by_price(), by_gpus(), by_share()].into_iter().flatten().min()?;
        Some(since.saturating_add(left.as_secs()))
    }

    /// When the cloud itself ends the instance, where that is not at its lease's deadline.
    fn ends_at(&self) -> Option<u64> {
        self.cloud().ok()?.broker.ends_at(&self.run.state().rental()?.instance)
    }

    fn has_time(&self) -> bool {
        self.time_is_up_at().is_some_and(|at| at > Instant::now())
    }

    /// Whether a worker that starts now gets to work before its time is up: it reads weights first,
    /// and a cluster asks it to stop a little before its job ends.
    fn has_time_for_work(&self) -> bool {
        let least = (self.run.record().spec.limit() / 10).min(MIN_WORK);
        self.time_is_up_at().is_some_and(|at| at > Instant::now() + least)
    }

    /// Leaves things in order: the record beside the results, no key. Nothing of it matters enough
    /// to fail a finished run.
    fn tidy(&self) {
        let record = self.run.record();
        if let Some(results) = record.state.results()
            && let Err(error) = self.write_record(Path::new(&results.folder))
        {
            tracing::warn!("{RUN_FILE} could not be written: {error}");
        }
        if record.state.is_closed() {
            self.places().iter().for_each(collect::clear);
        }
        if record.state.is_closed()
            && let Err(error) = self.ports.hosts.forget(&self.run.folder())
        {
            tracing::warn!("the run's key could not be removed: {error}");
        }
    }

    /// Writes the run's record, which identifies the results in a folder.
    fn write_record(&self, folder: &Path) -> std::io::Result<()> {
        let text = serde_json::to_vec_pretty(self.run.record())?;
        files::write_whole(&folder.join(RUN_FILE), &text)
    }
}

/// Identifies the work of a run, independently of where it runs: the job, and hashes of its local
/// files.
#[derive(Clone, Debug)]
pub struct JobIdentity {
    /// The job.
    pub job: JobSpec,
    /// SHA-256 of each file, in the job's order.
    files: Vec<String>,
}

impl JobIdentity {
    /// Hashes the job's files.
    ///
    /// # Errors
    /// A corpus file cannot be read.
    pub fn of(job: &JobSpec) -> std::io::Result<Self> {
        let digest = |path: &str| {
            let named = |error: std::io::Error| std::io::Error::new(error.kind(), format!("{path}: {error}"));
            files::digest(Path::new(path)).map(|(_, sha256)| sha256).map_err(named)
        };
        Ok(Self { job: job.clone(), files: corpus_files(job).into_iter().map(digest).collect::<Result<_, _>>()? })
    }

    /// The key of a run with this job and these brokers.
    pub fn key(&self, brokers: &str) -> String {
        // An earlier version recorded the default as this number. Runs of that version keep their
        // key.
        let micro_batch_tokens = self.job.micro_batch_tokens.or(Some(MICRO_BATCH_TOKENS));
        let job = JobSpec { micro_batch_tokens, ..self.job.clone() };
        let document = serde_json::json!({ "job": job, "broker": brokers });
        files::sha256((document.to_string() + &self.files.concat()).as_bytes())
    }
}
