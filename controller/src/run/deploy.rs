//! Drives one run, a step at a time, from wherever it stands to its end.
//!
//! There is one loop: it looks at the state, makes one step, writes what happened. A fresh run and
//! one that was found after a crash take the same path; what only this process knows
//! ([`ProcessState`]) merely saves work.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use outliers_protocol::{JobSpec, MICRO_BATCH_TOKENS};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::cloud::broker::{InstanceId, Offer, RunTime};
use crate::cloud::clouds::{Cloud, Timeouts};
use crate::files;
use crate::host::HostEvent;
use crate::run::ledger::{LedgerError, Meter, RUN_FILE, RunRecord, RunWriter};
use crate::run::local_worker::corpus_files;
use crate::run::{FailureDetail, Intent, RunEvent, RunFailureKind, RunOutcome, RunState};
use crate::units::{GpuTime, Span, Usd, UsdPerHour};
use crate::waiting::{Failed, told};

mod collect;
#[cfg(test)]
pub(crate) mod fake;
mod grace;
mod ports;
mod recover;
#[cfg(test)]
mod schedules;
mod ssh;
mod start_throttle;
mod steps;
mod terminate;
#[cfg(test)]
mod tests;

pub use collect::{holds, slug};
pub use ports::{Host, Hosts, Ports};
pub use recover::{Looked, Target, carry_out, end, look, recover, release};
pub use ssh::{SshHosts, read_cursor, read_progress};
pub use start_throttle::StartThrottle;

use grace::Grace;

/// With less time a worker is not started again, or a tenth of the run's time limit.
const LEAST_WORK: Duration = Duration::from_secs(60);

/// Name of the private key in a run's folder.
pub const KEY_FILE: &str = "id_ed25519";

/// How urgently a person wants it to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// Not at all.
    #[default]
    Go,
    /// Whoever listened is gone: a run that another process can pick up is let go of, any other
    /// stops.
    LetGo,
    /// Stop the worker, fetch partial results, terminate the instance.
    Now,
    /// Bring nothing home either. The instance is terminated all the same.
    SkipSync,
}

/// Events of a driven run, for the user interface.
#[derive(Clone, Debug, PartialEq)]
pub enum DeployEvent {
    /// The run has a new state.
    State(Box<RunState>),
    /// What it costs, as far as that is known: when it is taken up, and after each change.
    Meter(Meter),
    /// This offer is being rented.
    Renting(Box<Offer>),
    /// The offer could not be had; the next one is tried.
    Refused {
        /// The broker's words.
        reason: String,
    },
    /// A step failed and is tried again.
    Retrying {
        /// Which, and why.
        reason: String,
        /// Time until then.
        pause: Duration,
    },
    /// It is not known whether the instance exists: the broker is asked.
    Settling,
    /// The instance is not ready yet.
    Booting,
    /// Something on the host.
    Host(HostEvent),
    /// Something about the run.
    Note(RunNote),
    /// An instance is told to go.
    Terminating(InstanceId),
    /// Its cloud does not let it go.
    NotEnding(Box<NotEnding>),
    /// Results cannot be saved here, and lie on their instance.
    Kept(Box<UnsavedResults>),
    /// Something takes long.
    Waiting {
        /// What is waited for.
        what: String,
        /// The last attempt that failed.
        failed: Option<Failed>,
    },
    /// A person asked to stop.
    Stopping(Stop),
}

/// What people should know of a run, and nothing else depends on.
#[derive(Clone, Debug, PartialEq)]
pub enum RunNote {
    /// A cloud's offers are left out, since it does not answer.
    LeftOut {
        /// Which, and what is wrong.
        why: String,
    },
    /// Runs under way have reserved the rest of the budget: it waits until so much is free.
    BudgetReserved(Usd),
    /// Runs under way have reserved the rest of --max-gpu-hours: it waits until so much is free.
    GpuTimeReserved(GpuTime),
    /// Its worker waits for its turn beside others that read from the hub.
    TurnAwaited {
        /// How long.
        wait: Duration,
        /// Time between the starts of two workers.
        apart: Duration,
    },
    /// The cloud has the instance in a queue.
    Queued {
        /// In the cloud's words.
        why: String,
    },
    /// The instance's host wants a higher price, to which nothing agrees.
    PriceRise {
        /// The instance.
        instance: InstanceId,
        /// The price it asks for, in words.
        asked: String,
    },
    /// The guard's lease on the instance was not renewed.
    GuardUnreachable {
        /// What is wrong.
        why: String,
    },
    /// The worker died, and is started again.
    WorkerRestarted {
        /// Its exit status; `None`: it was killed.
        exit: Option<i32>,
    },
    /// It was not started again.
    NotRestarted {
        /// What is wrong.
        why: String,
    },
    /// The results cannot be saved, and the instance ends with them.
    FilesLost {
        /// The run.
        run: String,
        /// Where they lie.
        instance: InstanceId,
    },
}

/// An instance that bills on although it was told to go.
#[derive(Clone, Debug, PartialEq)]
pub struct NotEnding {
    /// Its cloud.
    pub broker: String,
    /// Its id at the cloud.
    pub instance: InstanceId,
    /// What the cloud answers.
    pub why: String,
    /// Time until it is told again.
    pub pause: Duration,
    /// What it bills, where that is known.
    pub price: Option<UsdPerHour>,
    /// What it, or its run, has cost so far.
    pub cost: Option<Usd>,
}

/// Results that nothing here takes, on an instance that bills on.
#[derive(Clone, Debug, PartialEq)]
pub struct UnsavedResults {
    /// The run.
    pub run: String,
    /// Where they are.
    pub instance: InstanceId,
    /// Why they cannot be saved.
    pub why: String,
    /// What the instance bills.
    pub price: UsdPerHour,
    /// What the run has cost so far.
    pub cost: Usd,
    /// They are kept until then, in Unix seconds.
    pub until: u64,
    /// Time until the next try to save them.
    pub pause: Duration,
}

/// A callback for [`DeployEvent`]s.
pub type OnEvent<'a> = dyn Fn(DeployEvent) + Send + Sync + 'a;

/// Why a run could not be driven to its end. Its instance may exist and bill.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// It cannot be learned whether the instance exists, or it does not go.
    #[error("run {run}: {message}")]
    Instance {
        /// The run.
        run: String,
        /// What is wrong.
        message: String,
    },
    /// The broker does not answer, and no open run of this ledger can have an instance there.
    #[error("{message}")]
    Silent {
        /// What is wrong.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// The broker does not answer, or a stray instance does not go.
    #[error("{message}")]
    Broker {
        /// What is wrong.
        message: String,
    },
    /// The ledger cannot be read or written. No instance was left because of it.
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

/// What only this process knows. Losing it costs work, never correctness.
#[derive(Default)]
struct ProcessState {
    /// The intent on disk is ours and its create call was not made yet.
    fresh_intent: bool,
    /// Create calls of ours that were not answered.
    unanswered: u32,
    /// No other offer is worth trying.
    hopeless: Option<RunOutcome>,
    host: Option<Box<dyn Host>>,
    /// What the instance bills, as it was last listed.
    price: Option<UsdPerHour>,
    /// Since when the present state's step fails, and how often it did.
    failing: Option<(Instant, u32)>,
    /// The time that is left to the host to have its worker run.
    grace: Option<Arc<Grace>>,
    /// Why the files cannot be fetched.
    unfetchable: Option<String>,
    /// No local folder can store the files. The instance is kept until then. Reported at that time.
    kept_until: Option<Instant>,
    kept_told: Option<Instant>,
    /// Since then nothing is wanted any more but what there is.
    stopped_at: Arc<OnceLock<Instant>>,
    /// The run goes on without this process.
    let_go: bool,
}

/// Why a step did not get further.
enum StepError {
    /// The run ends so.
    End(RunOutcome),
    /// The instance is gone.
    Vanished,
    /// The instance is listed, and does not run any more.
    Down,
    /// The instance does not serve, for this reason.
    Unfit(String),
    /// It goes on without this process.
    LetGo,
    /// Nothing more can be done now.
    Drive(DriveError),
}

impl From<LedgerError> for StepError {
    fn from(error: LedgerError) -> Self {
        Self::Drive(error.into())
    }
}

impl<'a> Driver<'a> {
    /// Takes charge of a run.
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

    /// Whether the run is let go of as soon as its worker is seen at work.
    pub fn detaching(self, detach: bool) -> Self {
        Self { detach, ..self }
    }

    /// How the run ends when it is stopped through its channel, if not as interrupted.
    pub fn stopping_as(self, ending: RunOutcome) -> Self {
        Self { stopping_as: ending, ..self }
    }

    /// Drives the run until it is closed, held, or let go of: then it is not at rest, its worker
    /// is at work, and something other than a controller ends its instance.
    ///
    /// # Errors
    /// [`DriveError`]: the instance may still exist; the same run can be driven again later.
    pub async fn drive(mut self) -> Result<RunRecord, DriveError> {
        (self.on)(DeployEvent::Meter(self.run.record().meter()));
        while !self.run.state().is_at_rest() && !self.memory.let_go {
            match self.advance().await {
                Err(DriveError::Ledger(error)) if error.is_of_the_file() => self.unrecorded(error).await?,
                advanced => advanced?,
            }
        }
        self.tidy();
        Ok(self.run.record().clone())
    }

    /// One step, and what it means for the run.
    async fn advance(&mut self) -> Result<(), DriveError> {
        self.meter()?;
        if matches!(self.run.state(), RunState::Salvaging { .. }) || *self.stop.borrow() != Stop::Go {
            self.memory.stopped_at.get_or_init(Instant::now);
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

    /// The ledger cannot be written. A run that has an instance and time left waits for that to
    /// pass, since the worker needs no ledger; one that is to end, or cannot go on, ends its
    /// instance all the same.
    async fn unrecorded(&mut self, error: LedgerError) -> Result<(), DriveError> {
        let Some(tag) = self.run.state().tag().cloned() else { return Err(error.into()) };
        if self.is_replaceable() {
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
        match self.see_gone(&tag, known.as_ref()).await {
            Err(StepError::Drive(stuck)) => Err(stuck),
            _ => Err(error.into()),
        }
    }

    /// A step that says what it waits for.
    async fn told_step(&mut self) -> Result<(), StepError> {
        let (on, what) = (self.on, self.awaited());
        let say = |failed: Option<&Failed>| {
            if let Some(what) = &what {
                on(DeployEvent::Waiting { what: what.clone(), failed: failed.cloned() });
            }
        };
        told(say, self.step()).await
    }

    /// What the present state's step may wait for long without a word.
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
            // The worker says what it does, and an ending says more than this.
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

    /// The cloud on which this run's instance is, or may be.
    fn cloud(&self) -> Result<&'a Cloud, StepError> {
        let offer = self.run.state().offer();
        offer.and_then(|offer| self.ports.clouds.of(offer)).ok_or_else(|| {
            let broker = offer.map(|offer| offer.broker.as_str()).unwrap_or_default();
            let message = format!("its instance is on {broker}, which is not among the clouds that can be asked");
            StepError::Drive(DriveError::Instance { run: self.run.record().id.clone(), message })
        })
    }

    /// Of the run's cloud; before it has one, of the first that it may have.
    fn timeouts(&self) -> &'a Timeouts {
        let cloud = self.cloud().ok().or_else(|| self.ports.clouds.iter().next());
        cloud.map_or(&Timeouts::CLOUD, |cloud| &cloud.timeouts)
    }

    /// Writes an event and tells about it. What is remembered of the old state's failures goes
    /// with it.
    fn append(&mut self, event: RunEvent) -> Result<(), LedgerError> {
        self.run.append(event)?;
        self.changed();
        Ok(())
    }

    /// Writes the intent to rent, if the budget pays for it now.
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
        let time = self.cloud().ok()?.broker.run_time(instance)?;
        self.run.record().is_news(time).then_some(time)
    }

    fn changed(&mut self) {
        self.memory.failing = None;
        self.memory.grace = None;
        self.memory.kept_until = None;
        (self.on)(DeployEvent::Meter(self.run.record().meter()));
        (self.on)(DeployEvent::State(Box::new(self.run.state().clone())));
    }

    /// An instance on which nothing was run yet is exchanged for another; later, the run ends.
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

    /// Whether another instance could do what this one cannot any more, and neither time nor
    /// anybody wants the run to end.
    fn is_replaceable(&self) -> bool {
        let still_to_do = matches!(
            self.run.state(),
            RunState::Rented { .. } | RunState::Reachable { .. } | RunState::Launched { .. } | RunState::Ended { .. }
        );
        still_to_do && self.has_time() && self.stop() < Stop::Now && !self.run.cancel_asked()
    }

    /// How urgently the run is to end: what another process cannot pick up is not let go of.
    fn stop(&self) -> Stop {
        match *self.stop.borrow() {
            Stop::LetGo if !self.can_be_left() => Stop::Now,
            level => level,
        }
    }

    /// Whether the worker was started under its guard, on an instance that ends without a
    /// controller.
    fn can_be_left(&self) -> bool {
        matches!(self.run.state(), RunState::Launched { .. })
            && self.cloud().is_ok_and(|cloud| cloud.broker.capabilities().ends_by_itself())
    }

    /// Resolves when the run is to be let go of, and can be.
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

    /// Ends the run early, as its state allows.
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

    /// Resolves when the present state is to be left early; never for states that must run to
    /// their end.
    fn interrupt(&self) -> impl Future<Output = RunOutcome> + use<> {
        let threshold = match self.run.state() {
            RunState::Launched { .. } if self.can_be_left() => Some(Stop::Now),
            RunState::Planned { .. }
            | RunState::Rented { .. }
            | RunState::Reachable { .. }
            | RunState::Discarding { .. }
            | RunState::Launched { .. } => Some(Stop::LetGo),
            // The files are on their way home already: that is what a first Ctrl-C asks for.
            RunState::Ended { .. } | RunState::Salvaging { .. } => Some(Stop::SkipSync),
            _ => None,
        };
        let deadline = self.time_is_up_at();
        let is_coming_home = matches!(self.run.state(), RunState::Ended { .. } | RunState::Salvaging { .. });
        let (stopped_at, limit) = (Arc::clone(&self.memory.stopped_at), self.timeouts().sync);
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
                    Some(at) if early => tokio::time::sleep(at.saturating_duration_since(Instant::now())).await,
                    _ => std::future::pending().await,
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

    /// When the worker must stop, so that the files can be fetched before the instance ends itself.
    fn time_is_up_at(&self) -> Option<Instant> {
        let lease = self.run.state().rental()?.tag.deadline;
        let deadline = [self.ends_at(), self.is_used_up_at()].into_iter().flatten().fold(lease, u64::min);
        let deadline = Duration::from_secs(deadline);
        let whole = deadline.saturating_sub(Duration::from_millis(self.run.record().asked_at_ms()?));
        // Time in a queue is none of the run's.
        let whole = whole.min(self.run.record().spec.limit());
        let reserve = (whole / 10).min(Duration::from_secs(300));
        let by_the_cloud = |now: u64| self.cloud().map_or(now, |cloud| cloud.time(now));
        let now_ms = self.run.now_ms();
        let now = Duration::from_secs(by_the_cloud(now_ms / 1000)) + Duration::from_millis(now_ms % 1000);
        Some(Instant::now() + deadline.saturating_sub(reserve).saturating_sub(now))
    }

    /// When a job has used up what was agreed, or its --max-gpu-hours, in Unix seconds by its
    /// cloud's clock: one that was put back into its queue has got all of its time again.
    fn is_used_up_at(&self) -> Option<u64> {
        let record = self.run.record();
        let since = record.run_time()?.since?;
        let (rental, since_ms) = (record.state.rental()?, since.saturating_mul(1000));
        let by_price = || rental.price.time(record.spec.quote.ceiling? - record.cost(since_ms));
        let by_gpus = || {
            let left = record.spec.max_gpu_time?.seconds().saturating_sub(record.gpu_time(since_ms).seconds());
            let seconds = left.max(0).checked_div(rental.offer.gpu_count.into())?;
            Some(Duration::from_secs(seconds.unsigned_abs()))
        };
        let left = [by_price(), by_gpus()].into_iter().flatten().min()?;
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
        let least = (self.run.record().spec.limit() / 10).min(LEAST_WORK);
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

    /// The run's own record, which says whose results lie in a folder.
    fn write_record(&self, folder: &Path) -> std::io::Result<()> {
        let text = serde_json::to_vec_pretty(self.run.record())?;
        files::write_whole(&folder.join(RUN_FILE), &text)
    }
}

/// What makes two runs the same work, but for where they run: the job, and the content of its
/// local files, which is read once.
#[derive(Clone, Debug)]
pub struct JobIdentity {
    /// The job.
    pub job: JobSpec,
    /// SHA-256 of each file, in the job's order.
    files: Vec<String>,
}

impl JobIdentity {
    /// Reads the job's files.
    ///
    /// # Errors
    /// When a corpus file cannot be read.
    pub fn of(job: &JobSpec) -> std::io::Result<Self> {
        let digest = |path: &str| {
            let named = |error: std::io::Error| std::io::Error::new(error.kind(), format!("{path}: {error}"));
            files::digest(Path::new(path)).map(|(_, sha256)| sha256).map_err(named)
        };
        Ok(Self { job: job.clone(), files: corpus_files(job).into_iter().map(digest).collect::<Result<_, _>>()? })
    }

    /// The key of a run of it that may rent from these brokers.
    pub fn key(&self, brokers: &str) -> String {
        // The default had this number once: work that was done then is not done again.
        let micro_batch_tokens = self.job.micro_batch_tokens.or(Some(MICRO_BATCH_TOKENS));
        let job = JobSpec { micro_batch_tokens, ..self.job.clone() };
        let document = serde_json::json!({ "job": job, "broker": brokers });
        files::sha256((document.to_string() + &self.files.concat()).as_bytes())
    }
}
