//! The steps of a run, one per state. Each can be repeated after a crash at any point.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use outliers_protocol::{CorpusFormat, CorpusSource, JobSpec, Manifest, ModelSource};

use tokio::time::Instant;

use super::collect::{self, Folders};
use super::grace::Grace;
use super::terminate::{Bill, InstanceTerminator};
use super::{DeployEvent, DriveError, Driver, Host, StepError, Stop, Target, UnsavedResults};
use crate::cloud::broker::{
    BrokerError, BrokerErrorKind, Instance, InstanceId, InstanceState, Lease, LeaseTag, Offer, SshEndpoint,
};
use crate::cloud::market::{self, NothingLeft};
use crate::host::{GuardConfig, HostError, HostEvent, JobStatus, OnEvent};
use crate::run::ledger::{BudgetStatus, LedgerError, RunRecord, RunWriter, random_word};
use crate::run::{
    FailureDetail, Intent, Pin, RefusedOffer, Rental, RunEvent, RunFailureKind, RunOutcome, RunState, SavedResults,
};
use crate::units::{GpuTime, Span, Usd, UsdPerHour};

type Step = Result<(), StepError>;

/// Offers that the budget allows.
enum Affordable {
    /// These offers now; empty if there were none.
    Now(Vec<Offer>),
    /// The maximum cost of the cheapest, if it may become affordable when other runs end for less
    /// than they reserved.
    Later(Usd),
}

/// How an instance is identified.
#[derive(Clone, Copy)]
enum InstanceKey<'a> {
    Id(&'a InstanceId),
    /// By name, after a create call without an answer.
    Name(&'a str),
}

/// Unanswered create calls after which the offer counts as refused.
const UNANSWERED: u32 = 3;
/// Maximum offers tried for one run, over all clouds.
const MAX_TRIED: usize = 25;
/// Maximum instances of one run that are unfit or vanish. After that the cause is probably not the
/// instances.
const MAX_RENTED: usize = 3;
/// Maximum restarts of a worker on one instance.
const MAX_RESTARTS: u32 = 2;

/// Interval of reports about results that cannot be saved.
const BETWEEN_WORDS: Duration = Duration::from_secs(30);

/// Interval of price checks while the worker runs.
const BETWEEN_BILLS: Duration = Duration::from_secs(10 * 60);

/// For a running worker: only the run's time limit ends the attempts to reach it.
const UNTIL_TIME_IS_UP: Duration = Duration::from_secs(365 * 24 * 3600);

impl Driver<'_> {
    /// State `Planned`: records what will be rented next.
    pub(super) async fn choose_offer(&mut self, refused: &[RefusedOffer]) -> Step {
        if let Some(ending) = self.memory.hopeless.take() {
            return Err(StepError::End(ending));
        }
        let request = self.run.record().spec.request.clone();
        self.ports.hosts.serve(&request).map_err(|error| StepError::End(host_failed(error)))?;
        let offered = match self.ports.clouds.offers(&request).await {
            Ok(offered) => offered,
            Err(error) => return self.try_again_broker(error, self.timeouts().settle).await,
        };
        if let Some(wrong) = self.ports.clouds.wrong_clock() {
            let hint = "set the clock, then run it again".to_owned();
            return Err(StepError::End(failed(RunFailureKind::Local, wrong, Some(hint))));
        }
        for error in &offered.silent {
            self.note(format!("Left out, it does not answer: {error}"));
        }
        let selected = self.run.record().spec.select(offered.offers).map_err(|none| no_offer(&none))?.offers;
        let selected = match self.within_gpu_time(selected)? {
            Ok(offers) => offers,
            Err(least) => return self.wait_for("--max-gpu-hours", least, RunWriter::gpu_budget_status).await,
        };
        let affordable = match self.affordable(&selected)? {
            Affordable::Now(offers) => offers,
            Affordable::Later(least) => return self.wait_for("the budget", least, RunWriter::budget_status).await,
        };
        let Some(offer) = self.next_offer(&affordable, refused) else {
            let was_lost = refused.last().is_some_and(|refusal| refusal.lost);
            let dearer = selected.len() - affordable.len();
            let answered = self.run.record().an_instance_did_not_serve();
            let ending = match was_lost {
                true => RunOutcome::InstanceLost,
                false => none_left(refused, affordable.len(), dearer, answered),
            };
            return Err(StepError::End(ending));
        };
        let (tag, worst) = (self.tag(&offer), self.worst(&offer));
        let renting = DeployEvent::Renting(Box::new(offer.clone()));
        // Another run may have reserved the money meanwhile. Then this step is repeated.
        if self.reserve(Intent { offer, tag }, worst)? {
            (self.on)(renting);
            self.memory.fresh_intent = true;
        }
        Ok(())
    }

    fn tag(&self, offer: &Offer) -> LeaseTag {
        LeaseTag {
            owner: self.run.owner().to_owned(),
            run: self.run.record().id.clone(),
            nonce: random_word(6),
            deadline: self.deadline(offer),
        }
    }

    /// Unix seconds by the cloud's clock, which the instance uses as well.
    fn deadline(&self, offer: &Offer) -> u64 {
        let record = self.run.record();
        let time = record.spec.time_on(offer, record.spent_before()).as_secs();
        let from = self.run.now_ms() / 1000;
        let cloud = self.ports.clouds.of(offer);
        // Its time begins when it has waited for its turn.
        let queue = cloud.map_or(0, |cloud| cloud.timeouts.queue.as_secs());
        cloud.map_or(from, |cloud| cloud.time(from)) + queue + time
    }

    /// Maximum cost of an instance of this offer until its time limit.
    fn worst(&self, offer: &Offer) -> Usd {
        let record = self.run.record();
        record.spec.worst(offer, record.spent_before())
    }

    /// The offers that the agreed amount and the rest of the budget pay for.
    fn affordable(&self, selected: &[Offer]) -> Result<Affordable, StepError> {
        let (record, spent) = (self.run.record(), self.run.record().spent_before());
        let within: Vec<Offer> = selected.iter().filter(|offer| record.spec.pays_for(offer, spent)).cloned().collect();
        if let (Some(agreed), true, Some(first)) = (record.spec.quote.ceiling, within.is_empty(), selected.first()) {
            let message = format!(
                "{spent} of {agreed} that were agreed are spent, and the rest does not pay for the first offer, at {}, \
                 with enough time",
                first.price
            );
            let hint = "run it again to agree to the prices of now; --budget agrees to more".to_owned();
            return Err(StepError::End(failed(RunFailureKind::Budget, message, Some(hint))));
        }
        let selected = &within;
        let Some(BudgetStatus { budget, left, at_best }) = self.run.budget_status()? else {
            return Ok(Affordable::Now(selected.to_vec()));
        };
        let affordable: Vec<Offer> = selected.iter().filter(|offer| self.worst(offer) <= left).cloned().collect();
        match selected.iter().map(|offer| self.worst(offer)).min() {
            Some(least) if affordable.is_empty() && least <= at_best => Ok(Affordable::Later(least)),
            Some(least) if affordable.is_empty() => {
                let left = left.max(Usd::ZERO);
                let message = format!(
                    "the cheapest offer may cost {least} until its time limit, and {left} of {budget} are left"
                );
                let hint = "a shorter --max-duration reserves less; or raise --budget".to_owned();
                Err(StepError::End(failed(RunFailureKind::Budget, message, Some(hint))))
            }
            _ => Ok(Affordable::Now(affordable)),
        }
    }

    /// The offers within the GPU-time budget, or the minimum GPU time of an offer if it may become
    /// free when other runs end with less than they reserved.
    fn within_gpu_time(&self, mut selected: Vec<Offer>) -> Result<Result<Vec<Offer>, GpuTime>, StepError> {
        let Some(status) = self.run.gpu_budget_status()? else { return Ok(Ok(selected)) };
        let BudgetStatus { budget, left, at_best } = status;
        let spec = &self.run.record().spec;
        let least = selected.iter().map(|offer| spec.gpu_time(offer)).min();
        if let Some(least) = least.filter(|least| *least > at_best) {
            let left = GpuTime::from_seconds(left.seconds().max(0));
            let message = format!("the run may take {least} until its time limit, and {left} of {budget} are left");
            let hint = "a shorter --max-duration reserves less; or raise --max-gpu-hours".to_owned();
            return Err(StepError::End(failed(RunFailureKind::Budget, message, Some(hint))));
        }
        if let Some(least) = least.filter(|least| *least > left) {
            return Ok(Err(least));
        }
        selected.retain(|offer| spec.gpu_time(offer) <= left);
        Ok(Ok(selected))
    }

    /// Waits until runs that share `what` have freed `least` of it, or no longer can.
    async fn wait_for<T: PartialOrd + std::fmt::Display>(
        &self,
        what: &str,
        least: T,
        budget: fn(&RunWriter) -> Result<Option<BudgetStatus<T>>, LedgerError>,
    ) -> Step {
        self.note(format!("The rest of {what} is reserved by runs under way; waiting until {least} are free"));
        let unchanged = |status: BudgetStatus<T>| status.left < least && least <= status.at_best;
        while budget(&self.run)?.is_some_and(unchanged) {
            tokio::time::sleep(self.timeouts().listing_interval).await;
        }
        Ok(())
    }

    /// The best offer that has not been tried, within the limit of attempts.
    fn next_offer(&self, selected: &[Offer], refused: &[RefusedOffer]) -> Option<Offer> {
        let rented = refused.iter().filter(|refusal| refusal.rented).count();
        if refused.len() >= MAX_TRIED || rented >= MAX_RENTED {
            return None;
        }
        let is = |offer: &Offer, tried: &Offer| (&offer.broker, &offer.key) == (&tried.broker, &tried.key);
        let tried = |offer: &Offer| refused.iter().any(|refusal| !refusal.lost && is(offer, &refusal.offer));
        selected.iter().find(|offer| !tried(offer) && !self.ports.bad_hosts.has(offer)).cloned()
    }

    /// State `Creating`: makes the recorded call, or finds out the outcome of a call that an
    /// earlier process recorded.
    pub(super) async fn create(&mut self, intent: &Intent) -> Step {
        if !std::mem::take(&mut self.memory.fresh_intent) {
            return self.settle(intent).await;
        }
        let key = self.ports.hosts.key(&self.run.folder());
        let ssh_public_key = match key {
            Ok(line) => line,
            Err(error) => {
                self.memory.hopeless = Some(failed(RunFailureKind::Local, error.message, error.hint));
                let reason = "no SSH key could be made".to_owned();
                return Ok(self.append(RunEvent::NotCreated { reason, refused: false, unseen: false })?);
            }
        };
        let spec = &self.run.record().spec;
        let lease = Lease { tag: intent.tag.clone(), ssh_public_key, disk: spec.disk, stage: spec.stage.clone() };
        let cloud = self.cloud()?;
        match cloud.call(cloud.broker.create(&intent.offer, &lease)).await {
            Ok(instance) => self.created(&instance),
            Err(error) => self.not_created(error).await,
        }
    }

    fn created(&mut self, instance: &Instance) -> Step {
        self.memory.created = Some(instance.id.clone());
        self.append(RunEvent::Created { instance: instance.id.clone(), price: instance.price })?;
        self.memory.created = None;
        Ok(())
    }

    async fn not_created(&mut self, error: BrokerError) -> Step {
        use BrokerErrorKind as Kind;
        match error.kind {
            Kind::Maybe => {
                self.memory.unanswered += 1;
                return Ok(()); // The next step asks the broker.
            }
            Kind::RateLimited | Kind::Unavailable => {
                if self.pause(&error.to_string(), self.cloud()?.timeouts.settle).await {
                    self.memory.fresh_intent = true;
                    return Ok(());
                }
                self.memory.hopeless = Some(broker_failed(&error));
            }
            Kind::Auth | Kind::Budget => self.memory.hopeless = Some(broker_failed(&error)),
            Kind::NoCapacity | Kind::NotFound | Kind::Rejected => {}
        }
        (self.on)(DeployEvent::Refused { reason: error.to_string() });
        let reason = error.to_string();
        Ok(self.append(RunEvent::NotCreated { reason, refused: true, unseen: false })?)
    }

    /// Finds out whether a recorded instance exists. One listing without it proves nothing, since
    /// a new instance may not appear yet.
    async fn settle(&mut self, intent: &Intent) -> Step {
        (self.on)(DeployEvent::Settling);
        let name = intent.tag.to_string();
        let found = self.look_for(InstanceKey::Name(&name), self.cloud()?.timeouts.settle).await?;
        match found {
            Some(instance) => self.created(&instance),
            None => {
                let reason = "the call was not answered and made no instance".to_owned();
                let refused = self.memory.unanswered >= UNANSWERED;
                Ok(self.append(RunEvent::NotCreated { reason, refused, unseen: true })?)
            }
        }
    }

    /// State `Rented`: connects to the host for the first time.
    pub(super) async fn reach(&mut self, rental: &Rental) -> Step {
        if let Some(reason) = self.too_dear(&rental.offer, rental.price)? {
            return Err(StepError::Unfit(reason));
        }
        let pin = self.connect(rental, None, Duration::ZERO).await?;
        let price = self.memory.price.take();
        // Other runs may have taken the rest of the budget meanwhile.
        if let Some(reason) = price.map_or(Ok(None), |price| self.too_dear(&rental.offer, price))? {
            return Err(StepError::Unfit(reason));
        }
        Ok(self.append(RunEvent::Reached { pin, price })?)
    }

    /// Why an instance of this price is not kept.
    fn too_dear(&self, offer: &Offer, price: UsdPerHour) -> Result<Option<String>, StepError> {
        let (record, spec) = (self.run.record(), &self.run.record().spec);
        let cap = spec.request.max_price;
        if price <= spec.highest_price(offer) {
            return Ok(None);
        }
        // A price above the offer's may be within the agreed budget, or below that of earlier
        // offers.
        let in_all = record.at_price(price);
        let extra = in_all - record.at_price(offer.price);
        let covered = spec.quote.ceiling.is_some_and(|agreed| in_all <= agreed) && cap.is_none_or(|cap| price <= cap);
        if covered && self.run.budget_status()?.is_none_or(|budget_status| extra <= budget_status.left) {
            return Ok(None);
        }
        let said = if cap.is_some() { "that was allowed" } else { "its offer said" };
        Ok(Some(format!("the instance bills {price}, more than the {} {said}", cap.unwrap_or(offer.price))))
    }

    /// State `Reachable`: prepares the host and starts the worker within one time limit. A host
    /// that fails is replaced, unless the cause is this machine.
    pub(super) async fn launch(&mut self, rental: &Rental, pin: &Pin) -> Step {
        let timeouts = self.cloud()?.timeouts.ready;
        let grace = Arc::clone(self.memory.grace.get_or_insert_with(|| Arc::new(Grace::new(timeouts))));
        if grace.is_over() {
            return Err(StepError::Unfit(grace.verdict().message));
        }
        self.connect(rental, Some(pin), Duration::ZERO).await?;
        match self.prepare_and_launch(rental, &grace).await {
            Ok(()) => Ok(self.append(RunEvent::Launched)?),
            Err(error) if error.is_transient() || error.is_here() => {
                grace.failed(&error.message);
                self.try_again_host(error, UNTIL_TIME_IS_UP).await
            }
            Err(error) => Err(StepError::Unfit(error.message)),
        }
    }

    async fn prepare_and_launch(&self, rental: &Rental, grace: &Grace) -> Result<(), HostError> {
        let Some(job) = grace.within(self.prepare(rental, grace)).await? else { return Ok(()) };
        let begun = Instant::now();
        self.wait_for_turn().await;
        grace.put_off(begun.elapsed());
        grace.begin("starting the worker");
        grace.within(self.host().launch(&self.run.record().id, &job, self.ports.secrets)).await
    }

    /// Prepares the host. Returns the job to start; `None` if an earlier process started it.
    async fn prepare(&self, rental: &Rental, grace: &Grace) -> Result<Option<JobSpec>, HostError> {
        let (host, run) = (self.host(), &self.run.record().id);
        grace.begin("looking at it");
        let spec = &self.run.record().spec;
        let facts = host.probe(&rental.offer, &spec.request, spec.job.asks_the_hub()).await?;
        (self.on)(DeployEvent::Host(HostEvent::Probed(facts)));
        grace.begin("starting its guard");
        self.guard(rental).await?;
        if host.status(run).await? != JobStatus::NotStarted {
            return Ok(None);
        }
        let on = |event: HostEvent| {
            grace.record_upload(&event);
            (self.on)(DeployEvent::Host(event));
        };
        grace.begin("sending the worker");
        self.ports.hosts.serve(&self.run.record().spec.request)?;
        host.push_worker(&on).await?;
        grace.begin("sending what the worker reads");
        let mut job = self.push_inputs(host, run, &on).await?;
        if self.run.record().spec.request.worker_cuda.is_some() && job.devices.is_empty() {
            // Named GPUs make the worker fail instead of using the CPU if it can use none of them.
            job.devices = (0..rental.offer.gpu_count).map(|index| format!("cuda:{index}")).collect();
        }
        Ok(Some(job))
    }

    /// Waits until the worker may start beside others of its batch, and reports the time to wait.
    async fn wait_for_turn(&self) {
        let Some(start_throttle) = self.ports.start_throttle else { return };
        let say = |wait: Duration| {
            let (wait, apart) = (Span(wait), Span(start_throttle.pause()));
            self.note(format!("Waiting {wait} for its turn: workers that read from the hub start {apart} apart"));
        };
        start_throttle.wait(say).await;
    }

    /// The job with the host's paths.
    async fn push_inputs(&self, host: &dyn Host, run: &str, on: OnEvent<'_>) -> Result<JobSpec, HostError> {
        let spec = &self.run.record().spec;
        let mut job = spec.job.clone();
        if let (ModelSource::Folder { path }, true) = (&mut job.model, spec.push_model) {
            *path = host.push(run, Path::new(path), "model", on).await?;
            job.label = Some(spec.model.clone());
        }
        match &mut job.corpus.source {
            CorpusSource::Builtin(_) | CorpusSource::Dataset(_) => {}
            CorpusSource::Files(paths) => {
                for (i, path) in paths.iter_mut().enumerate() {
                    // The extension determines the format of documents.
                    let ending = CorpusFormat::of(path);
                    *path = host.push(run, Path::new(path), &format!("corpus-{i}.{ending}"), on).await?;
                }
            }
            CorpusSource::TokenIds(path) => {
                let json = Path::new(path).extension().is_some_and(|extension| extension == "json");
                let name = if json { "token-ids.json" } else { "token-ids.safetensors" };
                *path = host.push(run, Path::new(path), name, on).await?;
            }
        }
        Ok(job)
    }

    /// State `Launched`: follows the worker until it has ended. A lost connection does not end the
    /// job.
    pub(super) async fn follow(&mut self, rental: &Rental, pin: &Pin) -> Step {
        self.connect(rental, Some(pin), UNTIL_TIME_IS_UP).await?;
        if self.run.record().is_in_queue() {
            // It was put back, and tells why it waits until it runs again.
            self.endpoint(rental, UNTIL_TIME_IS_UP).await?;
        }
        let run = self.run.record().id.clone();
        let lost = AtomicBool::new(false);
        let listen = |event: HostEvent| {
            match &event {
                HostEvent::ConnectionLost { .. } => lost.store(true, Ordering::Relaxed),
                HostEvent::Reconnected => lost.store(false, Ordering::Relaxed),
                _ => {}
            }
            (self.on)(DeployEvent::Host(event));
        };
        let status = tokio::select! {
            status = self.host().follow(&run, &listen) => status,
            gone = self.instance_lost(rental, &lost) => return Err(gone),
            () = self.metered_anew() => return Ok(()),
            risen = self.bills_more(rental) => {
                self.run.append(RunEvent::Repriced { price: risen? })?;
                (self.on)(DeployEvent::Meter(self.run.record().meter()));
                return Ok(());
            }
        };
        match status {
            Ok(JobStatus::Running) => {
                self.memory.failing = None;
                Ok(())
            }
            Ok(JobStatus::Ended { exit }) => Ok(self.append(RunEvent::WorkerEnded { exit })?),
            Ok(JobStatus::NotStarted) => Ok(self.append(RunEvent::WorkerEnded { exit: None })?),
            Err(error) => self.try_again_host(error, UNTIL_TIME_IS_UP).await,
        }
    }

    /// State `Launched`, before leaving the run: checks first that the worker has not ended.
    pub(super) async fn leave(&mut self, rental: &Rental, pin: &Pin) -> Step {
        self.connect(rental, Some(pin), UNTIL_TIME_IS_UP).await?;
        match self.host().status(&self.run.record().id).await {
            Ok(JobStatus::Running) => Err(StepError::LetGo),
            Ok(JobStatus::Ended { exit }) => Ok(self.append(RunEvent::WorkerEnded { exit })?),
            Ok(JobStatus::NotStarted) => Ok(self.append(RunEvent::WorkerEnded { exit: None })?),
            Err(error) => self.try_again_host(error, UNTIL_TIME_IS_UP).await,
        }
    }

    /// Reports a higher price that the host demands, which is not accepted. Resolves when the
    /// instance bills more than is recorded: with the price, or with an error if it is more than
    /// the limit.
    async fn bills_more(&self, rental: &Rental) -> Result<UsdPerHour, StepError> {
        let cloud = self.cloud()?;
        let mut told = None;
        loop {
            tokio::time::sleep(BETWEEN_BILLS).await;
            // A query without an answer is repeated.
            let asked = cloud.call(cloud.broker.price_rise(&rental.instance)).await.ok().flatten();
            if let Some(asked) = asked.filter(|asked| told.as_ref() != Some(asked)) {
                self.note(format!("The host of {} asks for {asked}; it is not agreed to", rental.instance));
                told = Some(asked);
            }
            let Ok(listed) = cloud.call(cloud.broker.list()).await else { continue };
            let listed = listed.into_iter().find(|instance| instance.id == rental.instance);
            let price = listed.and_then(|instance| instance.price).filter(|price| *price > rental.price);
            let Some(price) = price else { continue };
            return match self.too_dear(&rental.offer, price)? {
                None => Ok(price),
                Some(reason) => Err(StepError::End(failed(RunFailureKind::Budget, reason, None))),
            };
        }
    }

    /// Resolves when the cloud's own record of how long the instance has run is another one: the
    /// job began, ended, or went back into its queue.
    async fn metered_anew(&self) {
        while self.new_run_time().is_none() {
            tokio::time::sleep(self.timeouts().listing_interval.max(Duration::from_secs(1))).await;
        }
    }

    /// Resolves when the instance is no longer one that could answer. The broker is asked only
    /// while the connection is lost: without it, a host that is gone would be waited for as long
    /// as one that is merely out of reach.
    async fn instance_lost(&self, rental: &Rental, connection_lost: &AtomicBool) -> StepError {
        let cloud = match self.cloud() {
            Ok(cloud) => cloud,
            Err(unknown) => return unknown,
        };
        let mut absences = 0;
        loop {
            tokio::time::sleep(cloud.timeouts.listing_interval.max(Duration::from_secs(1))).await;
            if !connection_lost.load(Ordering::Relaxed) {
                absences = 0;
                continue;
            }
            // A failed listing is ignored.
            let Ok(listed) = cloud.list(&[&rental.instance]).await else { continue };
            match listed.into_iter().find(|instance| instance.id == rental.instance).map(|instance| instance.state) {
                None => absences += 1,
                Some(InstanceState::Failed(_) | InstanceState::Stopped | InstanceState::Terminating) => {
                    return StepError::Down;
                }
                Some(_) => absences = 0,
            }
            if absences >= cloud.timeouts.absences {
                return StepError::Vanished;
            }
        }
    }

    /// State `Ended`: fetches the files, or restarts a worker that died.
    pub(super) async fn sync(&mut self, rental: &Rental, pin: &Pin, exit: Option<i32>, restarts: u32) -> Step {
        let run = self.run.record().id.clone();
        if let Some((results, ending)) = self.places().iter().find_map(|place| collect::already_home(place, &run)) {
            return Ok(self.append(RunEvent::Fetched { results, ending })?);
        }
        self.connect(rental, Some(pin), Duration::ZERO).await?;
        // A worker that fails reports it in a manifest.
        let may_restart = restarts < MAX_RESTARTS && self.has_time_for_work() && self.is_replaceable();
        let cut_off = !self.has_time_for_work() && self.ends_at().is_some();
        match self.bring_home(exit, may_restart || cut_off).await {
            Ok(Some((results, ending))) => Ok(self.append(RunEvent::Fetched { results, ending })?),
            Ok(None) if may_restart => self.restart(exit).await,
            // A worker that the cloud ended at its time limit did not fail.
            Ok(None) => Err(StepError::End(RunOutcome::Deadline)),
            Err(error) if error.is_here() => self.keep(rental, error).await,
            Err(error) => {
                if !error.is_transient() {
                    let place = format!("~/outliers/{run} on instance {}", rental.instance);
                    self.note(format!("The files lie as they are in {place}, which ends now"));
                }
                let why = error.message.clone();
                let ended = self.try_again_host(error, self.cloud()?.timeouts.sync).await;
                self.memory.unfetchable = ended.is_err().then_some(why);
                ended
            }
        }
    }

    /// Keeps the instance while no local folder can store the results, within its time limit and
    /// the agreed amount, and retries every folder.
    async fn keep(&mut self, rental: &Rental, error: HostError) -> Step {
        let until = self.memory.kept_until.or_else(|| self.time_is_up_at()).unwrap_or_else(Instant::now);
        self.memory.kept_until = Some(until);
        let stopped = match *self.stop.borrow() {
            _ if self.run.cancel_asked() => Some(RunOutcome::Cancelled),
            Stop::Go => None,
            _ => Some(self.stopping_as.clone()),
        };
        if stopped.is_some() || Instant::now() >= until {
            self.memory.unfetchable = Some(error.message.clone());
            let given_up = failed(RunFailureKind::Local, error.message, error.hint);
            return Err(StepError::End(stopped.unwrap_or(given_up)));
        }
        let next = until.min(Instant::now() + self.timeouts().listing_interval * 3);
        self.tell_kept(rental, error.message, until, next);
        let mut stop = self.stop.clone();
        tokio::select! {
            Ok(_) = stop.wait_for(|level| *level != Stop::Go) => {}
            () = tokio::time::sleep_until(next) => {}
        }
        Ok(())
    }

    fn tell_kept(&mut self, rental: &Rental, why: String, until: Instant, next: Instant) {
        let now = Instant::now();
        if self.memory.kept_told.is_some_and(|at| now < at + BETWEEN_WORDS) {
            return;
        }
        self.memory.kept_told = Some(now);
        let record = self.run.record();
        let kept = UnsavedResults {
            run: record.id.clone(),
            instance: rental.instance.clone(),
            why,
            price: rental.price,
            cost: record.cost(self.run.now_ms()),
            until: self.run.now_ms() / 1000 + (until - now).as_secs(),
            pause: next - now,
        };
        (self.on)(DeployEvent::Kept(Box::new(kept)));
    }

    async fn restart(&mut self, exit: Option<i32>) -> Step {
        let died = exit.map_or_else(|| "was killed".to_owned(), |exit| format!("died with status {exit}"));
        self.note(format!("The worker {died}; it is started again"));
        match self.host().restart(&self.run.record().id, self.ports.secrets).await {
            Ok(()) => Ok(self.append(RunEvent::Restarted)?),
            // After such an error the files on the instance are no longer usable.
            Err(error) if !error.is_transient() => {
                self.note(format!("The worker could not be started again: {}", error.message));
                Err(StepError::Down)
            }
            Err(error) => self.try_again_host(error, self.cloud()?.timeouts.sync).await,
        }
    }

    /// State `Salvaging`: stops the worker and fetches partial results.
    pub(super) async fn salvage(&mut self, rental: &Rental, pin: &Pin) -> Step {
        if let Some(reason) = self.memory.unfetchable.take() {
            return Ok(self.append(RunEvent::NotFetched { reason })?);
        }
        self.connect(rental, Some(pin), Duration::ZERO).await?;
        let run = self.run.record().id.clone();
        let brought = match self.host().stop_worker(&run).await {
            Ok(()) => self.bring_home(None, false).await,
            Err(error) => Err(error),
        };
        match brought {
            Ok(brought) => {
                let (results, ending) = brought.expect("what there is will do");
                Ok(self.append(RunEvent::Fetched { results, ending })?)
            }
            Err(error) => self.try_again_host(error, self.cloud()?.timeouts.sync).await,
        }
    }

    /// Folders for the results: in the requested folder, or beside the ledger if that is not
    /// writable.
    pub(super) fn places(&self) -> [Folders; 2] {
        let record = self.run.record();
        [self.run.results(), self.run.folder()].map(|below| Folders::of(&below, &record.spec, &record.id))
    }

    /// Fetches the files into the first usable folder; `None` if `whole` results are required and
    /// there is no manifest.
    async fn bring_home(
        &self,
        exit: Option<i32>,
        whole: bool,
    ) -> Result<Option<(SavedResults, RunOutcome)>, HostError> {
        let mut trouble = None;
        for place in &self.places() {
            let brought = match self.fetch(place).await {
                Ok(None) if whole => return Ok(None),
                Ok(manifest) => self.put_in_place(place, manifest.as_ref(), exit),
                Err(error) => Err(error),
            };
            match brought {
                Err(error) if error.is_here() => {
                    collect::clear(place);
                    trouble.get_or_insert(error);
                }
                brought => return brought.map(Some),
            }
        }
        Err(trouble.expect("there is a place"))
    }

    async fn fetch(&self, place: &Folders) -> Result<Option<Manifest>, HostError> {
        collect::empty_folder(&place.arriving).map_err(|e| local_failure(&place.arriving, &e))?;
        let RunRecord { id, spec, .. } = self.run.record();
        let on = |event| (self.on)(DeployEvent::Host(event));
        self.host().fetch(id, &place.arriving, &spec.expected(), &on).await
    }

    fn put_in_place(
        &self,
        place: &Folders,
        manifest: Option<&Manifest>,
        exit: Option<i32>,
    ) -> Result<(SavedResults, RunOutcome), HostError> {
        let written = self.write_record(&place.arriving);
        let settled = written.and_then(|()| collect::settle(place, manifest, exit));
        settled.map_err(|error| local_failure(&place.arriving, &error))
    }

    /// State `Synced`: terminates the instance, unless the user wants to keep it.
    pub(super) fn after_sync(&mut self) -> Step {
        let wanted = *self.stop.borrow() == Stop::Go && !self.run.cancel_asked();
        let event = if self.run.record().spec.keep_running && wanted { RunEvent::Held } else { RunEvent::Terminate };
        Ok(self.append(event)?)
    }

    /// States `Discarding` and `Terminating`: until complete listings show no instance of this
    /// run, from any create call.
    pub(super) async fn terminate(&mut self, rental: &Rental) -> Step {
        self.memory.host = None;
        self.terminate_until_gone(&rental.tag, Some(&rental.instance)).await?;
        // What was last seen of it tells when it ended.
        self.meter()?;
        Ok(self.append(RunEvent::Gone)?)
    }

    /// Terminates every instance of this run, until complete listings show none. Those of a copy of
    /// the ledger on another machine are not this run's.
    pub(super) async fn terminate_until_gone(&self, tag: &LeaseTag, known: Option<&InstanceId>) -> Step {
        let cloud = self.cloud()?;
        let of_this_run = |other: LeaseTag| self.run.record().tags().any(|tag| *tag == other);
        let is_ours = |i: &Instance| Some(&i.id) == known || i.tag().is_some_and(of_this_run);
        let bill = |_: &Target| Bill {
            price: self.run.state().rental().map(|rental| rental.price),
            cost: Some(self.run.record().cost(self.run.now_ms())),
        };
        let ours = || async {
            let listed = cloud.list(known.as_slice()).await;
            listed.map(|listed| listed.into_iter().filter(is_ours).collect::<Vec<_>>())
        };
        let ender = InstanceTerminator::new(cloud, self.on);
        let gone = ender.until_gone(known.into_iter().map(Target::of).collect(), bill, ours).await;
        gone.map_err(|why| {
            let name = known.map_or_else(|| tag.to_string(), ToString::to_string);
            let message = format!("instance {name} could not be seen gone: {why}");
            StepError::Drive(DriveError::Instance { run: self.run.record().id.clone(), message })
        })
    }

    fn note(&self, note: String) {
        (self.on)(DeployEvent::Note(note));
    }

    fn host(&self) -> &dyn Host {
        self.memory.host.as_deref().expect("every step that speaks to the host connects first")
    }

    /// Connects unless connected. Returns the host's key. Each attempt has the SSH timeout;
    /// attempts are repeated for `limit`.
    async fn connect(&mut self, rental: &Rental, pin: Option<&Pin>, limit: Duration) -> Result<Pin, StepError> {
        if let (Some(_), Some(pin)) = (&self.memory.host, pin) {
            return Ok(pin.clone());
        }
        loop {
            let endpoint = self.endpoint(rental, limit).await?;
            if let Some(access) = self.cloud()?.broker.instance_transport(&rental.instance) {
                self.memory.host = Some(self.ports.hosts.over(access, &self.run.folder()));
                self.renew_guard(rental).await;
                return Ok(pin.cloned().unwrap_or_else(|| Pin(endpoint.to_string())));
            }
            let deadline = Instant::now() + self.cloud()?.timeouts.ssh;
            let deadline = self.memory.grace.as_ref().map_or(deadline, |grace| deadline.min(grace.end()));
            let on = |event: HostEvent| (self.on)(DeployEvent::Host(event));
            match self.ports.hosts.reach(&endpoint, &self.run.folder(), pin, deadline, &on).await {
                Ok((host, pin)) => {
                    self.memory.host = Some(host);
                    self.renew_guard(rental).await;
                    return Ok(pin);
                }
                Err(error) if error.is_transient() && self.pause(&error.message, limit).await => {}
                Err(error) if !error.is_here() && self.is_unused() => return Err(StepError::Unfit(error.message)),
                Err(error) => return Err(StepError::End(host_failed(error))),
            }
        }
    }

    /// Renews the guard's lease for a worker that runs or has run. A host without a guard remains
    /// in use.
    async fn renew_guard(&self, rental: &Rental) {
        if self.is_unused() {
            return;
        }
        if let Err(error) = self.guard(rental).await {
            self.note(format!("The guard on the instance could not be reached: {}", error.message));
        }
    }

    /// Whether nothing has run on the instance, as far as is known.
    fn is_unused(&self) -> bool {
        matches!(self.run.state(), RunState::Rented { .. } | RunState::Reachable { .. })
    }

    /// Installs the guard. There must be time left.
    async fn guard(&self, rental: &Rental) -> Result<(), HostError> {
        let now = self.run.now_ms() / 1000;
        let now = self.ports.clouds.of(&rental.offer).map_or(now, |cloud| cloud.time(now));
        let left = Duration::from_secs(rental.tag.deadline.saturating_sub(now));
        if left.is_zero() {
            return Ok(());
        }
        let end_itself = self.ports.clouds.of(&rental.offer).and_then(|cloud| cloud.broker.self_destruct());
        let config = GuardConfig { watch: self.run.record().spec.watch, left, end_itself };
        self.host().guard(&self.run.record().id, &config).await
    }

    /// Waits for the instance's address.
    async fn endpoint(&mut self, rental: &Rental, limit: Duration) -> Result<SshEndpoint, StepError> {
        let timeouts = &self.cloud()?.timeouts;
        let limit = limit.max(timeouts.boot);
        let mut deadline = Instant::now() + limit;
        let mut told = String::new();
        loop {
            let found = self.look_for(InstanceKey::Id(&rental.instance), limit).await?;
            let found = found.ok_or(StepError::Vanished)?;
            // The answer to a create call may lack the price, or state an earlier one.
            let is_new = matches!(self.run.state(), RunState::Rented { .. });
            if let Some(price) = found.price.filter(|_| is_new)
                && let Some(reason) = self.too_dear(&rental.offer, price)?
            {
                return Err(StepError::Unfit(reason));
            }
            self.memory.price = found.price;
            let why = match found.state {
                InstanceState::Ready(endpoint) => return Ok(endpoint),
                InstanceState::Failed(why) => return Err(did_not_come_up(rental, &why)),
                InstanceState::Stopped | InstanceState::Terminating => return Err(StepError::Down),
                // Waiting in a queue is not a fault: another instance would be queued behind it.
                InstanceState::Queued(why) => {
                    if why != told {
                        self.note(format!("Waiting: {why}"));
                        told = why;
                    }
                    deadline = Instant::now() + limit;
                    tokio::time::sleep(timeouts.listing_interval).await;
                    continue;
                }
                InstanceState::Booting => "it is still booting".to_owned(),
                InstanceState::Unknown(word) => format!("its state is `{word}`"),
                InstanceState::Unreadable(why) => format!("what the cloud shows of it cannot be read: {why}"),
            };
            if Instant::now() >= deadline {
                return Err(did_not_come_up(rental, &why));
            }
            (self.on)(DeployEvent::Booting);
            tokio::time::sleep(timeouts.listing_interval).await;
        }
    }

    /// The instance; `None` only after enough complete listings without it.
    async fn look_for(&mut self, sought: InstanceKey<'_>, limit: Duration) -> Result<Option<Instance>, StepError> {
        let cloud = self.cloud()?;
        let deadline = Instant::now() + limit;
        let mut absences = 0;
        loop {
            let found = match sought {
                InstanceKey::Id(id) => {
                    let listed = cloud.list(&[id]).await;
                    listed.map(|listed| listed.into_iter().find(|instance| instance.id == *id))
                }
                InstanceKey::Name(name) => cloud.named(name).await,
            };
            match found {
                Ok(Some(instance)) => return Ok(Some(instance)),
                Ok(None) => {
                    absences += 1;
                    if absences >= cloud.timeouts.absences {
                        return Ok(None);
                    }
                }
                Err(error) if Instant::now() >= deadline => {
                    let message = format!("it is not known whether its instance exists: {error}");
                    // What cannot be listed can be ended, and nothing else would end it.
                    if self.is_unused() && !cloud.broker.capabilities().server_deadline {
                        return Err(StepError::Unfit(message));
                    }
                    return Err(StepError::Drive(DriveError::Instance { run: self.run.record().id.clone(), message }));
                }
                Err(error) => {
                    let pause = cloud.timeouts.listing_interval;
                    (self.on)(DeployEvent::Retrying { reason: error.to_string(), pause });
                }
            }
            tokio::time::sleep(cloud.timeouts.listing_interval).await;
        }
    }

    async fn try_again_broker(&mut self, error: BrokerError, limit: Duration) -> Step {
        use BrokerErrorKind as Kind;
        let transient = matches!(error.kind, Kind::RateLimited | Kind::Unavailable | Kind::Maybe);
        if transient && self.pause(&error.to_string(), limit).await {
            return Ok(());
        }
        Err(StepError::End(broker_failed(&error)))
    }

    /// Repeats the step on a new connection after a failure on the host, if that can help.
    async fn try_again_host(&mut self, error: HostError, limit: Duration) -> Step {
        self.memory.host = None;
        if error.is_transient() && self.pause(&error.message, limit).await {
            return Ok(());
        }
        Err(StepError::End(host_failed(error)))
    }

    /// Waits, longer after every failure; `false` if the current state has failed for longer than
    /// `limit`.
    async fn pause(&mut self, reason: &str, limit: Duration) -> bool {
        let (since, times) = self.memory.failing.unwrap_or((Instant::now(), 0));
        if since.elapsed() >= limit {
            return false;
        }
        self.memory.failing = Some((since, times + 1));
        let pause = self.timeouts().backoff * (1 << times.min(5)).min(30);
        (self.on)(DeployEvent::Retrying { reason: reason.to_owned(), pause });
        tokio::time::sleep(pause).await;
        true
    }
}

fn failed(kind: RunFailureKind, message: String, hint: Option<String>) -> RunOutcome {
    RunOutcome::Failed { trouble: FailureDetail { kind, message, hint } }
}

fn host_failed(error: HostError) -> RunOutcome {
    let kind = if error.is_here() { RunFailureKind::Local } else { RunFailureKind::Host };
    failed(kind, error.message, error.hint)
}

fn broker_failed(error: &BrokerError) -> RunOutcome {
    failed(RunFailureKind::Broker, error.to_string(), error.hint())
}

fn no_offer(why: &NothingLeft) -> StepError {
    StepError::End(failed(RunFailureKind::NoOffer, why.to_string(), why.hint().map(str::to_owned)))
}

/// `dearer` are those for which what was agreed does not pay. `answered`: of the instances that
/// were rented, one came up and did not serve.
pub(super) fn none_left(refused: &[RefusedOffer], offered: usize, dearer: usize, answered: bool) -> RunOutcome {
    // A reason that several offers share is given once.
    let mut reasons: Vec<(&str, Vec<String>)> = Vec::new();
    for RefusedOffer { offer, reason, .. } in refused {
        let title = market::title(offer);
        match reasons.iter().position(|(known, _)| *known == reason.as_str()) {
            Some(at) => reasons[at].1.push(title),
            None => reasons.push((reason.as_str(), vec![title])),
        }
    }
    let words: Vec<String> =
        reasons.iter().map(|(reason, titles)| format!("{}: {reason}", titles.join(", "))).collect();
    let (kind, none) = match answered {
        true => (RunFailureKind::Unfit, "none served"),
        false => (RunFailureKind::NoOffer, "none could be had"),
    };
    let message = format!("{} of {offered} offers were tried and {none} ({})", refused.len(), words.join("; "));
    let all_queued = !refused.is_empty() && refused.iter().all(|refusal| refusal.offer.queued);
    let hint = match dearer {
        0 if all_queued => "use another --partition, --account, --qos, --constraint or --max-duration".to_owned(),
        0 => "relax the filters, or try again later".to_owned(),
        n => format!("{n} more would cost more than was agreed: --budget agrees to more; or try again later"),
    };
    failed(kind, message, Some(hint))
}

fn did_not_come_up(rental: &Rental, why: &str) -> StepError {
    StepError::Unfit(format!("instance {} did not come up: {why}", rental.instance))
}

fn local_failure(path: &Path, error: &std::io::Error) -> HostError {
    HostError::local(path, error).hint("the results' folder must be writable and have room")
}
