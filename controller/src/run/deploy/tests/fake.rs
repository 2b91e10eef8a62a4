//! A cloud and its hosts in memory, with state, and with a fault at a given effect.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use outliers_protocol::{FileBytes, FileEntry, JobSpec, Manifest, ModelSource, Outcome, SCHEMA, files};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::cloud::broker::{
    Account, Broker, BrokerError, BrokerErrorKind, Capabilities, GpuRequest, Instance, InstanceId, InstanceState,
    InstanceTransport, Lease, Offer, Offers, RunTime, SshEndpoint,
};
use crate::cloud::clouds::{BadHosts, Cloud, Clouds, Timeouts};
use crate::cloud::estimate::Work;
use crate::cloud::market::Quote;
use crate::files::digest;
use crate::host::transport::TransportErrorKind;
use crate::host::{GuardConfig, HostError, HostErrorKind, HostEvent, HostFacts, JobStatus, OnEvent};
use crate::run::deploy::{Host, Hosts, Ports, Stop};
use crate::run::ledger::{self, Ledger};
use crate::run::{GuardTimeouts, Pin, RunSpec};
use crate::secret::Secret;
use crate::units::{Bytes, Usd, UsdPerHour};

/// Default timeouts.
const WATCH: GuardTimeouts = GuardTimeouts { lease_s: 7200, unclaimed_s: 3600 };
/// Time for which a cloud refuses terminations.
const REFUSES: Duration = Duration::from_secs(300);
/// Time for which a disk is full: longer than the termination of an instance.
const FULL: Duration = Duration::from_secs(900);
/// Seconds by which this machine's clock may jump ahead.
const JUMP: i64 = 7 * 3600;

/// Short timeouts.
pub(crate) const QUICK: Timeouts = Timeouts {
    call: Duration::from_secs(5),
    boot: Duration::from_millis(200),
    queue: Duration::ZERO,
    ssh: Duration::from_millis(200),
    ready: Duration::from_millis(200),
    settle: Duration::from_millis(200),
    sync: Duration::from_millis(200),
    terminate: Duration::from_millis(200),
    listing_interval: Duration::from_micros(200),
    absences: 3,
    backoff: Duration::from_micros(200),
};

pub(crate) fn spec(results: &Path) -> RunSpec {
    RunSpec {
        model: "owner/model".into(),
        brokers: "fake".into(),
        job: JobSpec::new(ModelSource::Hub { id: "owner/model".into(), revision: "main".into() }),
        job_key: "key".into(),
        request: GpuRequest { gpu_count: Some(0), ..GpuRequest::default() },
        work: Work {
            read: Bytes::from_gib(1),
            operations: 1e12,
            read_rate: Bytes::from_gib(1),
            efficiency: 1.0,
            ..Work::default()
        },
        disk: Bytes::from_gib(1),
        push_model: false,
        keep_running: false,
        detach: false,
        max_duration_s: 3600,
        watch: WATCH,
        budget: None,
        max_gpu_time: None,
        quote: Quote::default(),
        only_in_time: false,
        stage: None,
        results: results.to_string_lossy().into_owned(),
        output: Vec::new(),
        survey: None,
    }
}

/// Consent up to this amount.
pub(crate) fn up_to(ceiling: Usd) -> Quote {
    Quote { ceiling: Some(ceiling), ..Quote::default() }
}

pub(crate) fn offer(key: &str, dollars: f64) -> Offer {
    let price = UsdPerHour::from_dollars(dollars);
    Offer { cpu_cores: Some(4), machine: Some(format!("machine of {key}")), ..Offer::new("fake", key.into(), 0, price) }
}

/// Kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The controller dies before the effect.
    CrashBefore,
    /// The controller dies after the effect, before it receives the answer.
    CrashAfter,
    /// The effect does not happen, and the call returns an error.
    Fails,
    /// The effect happens, and the answer is lost.
    AnswerLost,
    /// From here on every call fails.
    Outage,
    /// Ctrl-C, once.
    Stop,
    /// Ctrl-C, twice.
    StopTwice,
    /// The instance is preempted.
    Preempted,
    /// Every offer's price rises.
    PriceRises,
    /// From here on the cloud refuses terminations for some minutes.
    Refuses,
    /// One listing shows this program's instances as unreadable entries.
    Odd,
    /// The process gets SIGHUP.
    Hangup,
    /// From here on the ledger cannot be written, for some minutes or until the next process.
    StateFull,
    /// From here on the results' folder cannot be written.
    ResultsFull,
    /// From here to the next controller the run's row in the ledger cannot be read.
    Unreadable,
    /// This machine's clock jumps ahead by hours.
    ClockJumps,
}

thread_local! {
    static WOUND: Cell<Option<(Instant, u64)>> = const { Cell::new(None) };
}

/// Sets this thread's wall clock to `at_ms`. It advances with the runtime's clock, which tests
/// pause and advance.
pub(crate) fn set_clock(at_ms: u64) {
    WOUND.set(Some((Instant::now(), at_ms)));
}

/// Time of a clock set by tests.
fn wound_ms() -> Option<u64> {
    WOUND.get().map(|(since, at_ms)| at_ms + since.elapsed().as_millis() as u64)
}

/// This thread's clock; the system's if it is not set.
pub(crate) fn now_ms() -> u64 {
    wound_ms().unwrap_or_else(ledger::now_ms)
}

/// The ledger in `folder`, with this thread's clock.
pub(crate) fn open_ledger(folder: &Path) -> Ledger {
    Ledger::open(folder).unwrap().with_clock(now_ms)
}

/// One rented instance.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) name: String,
    /// It belongs to another program and must not be touched.
    pub(crate) foreign: bool,
    /// Some answer or list has shown it. The cost of others is unknown.
    known: bool,
    /// Listed and billing, but not running.
    pub(crate) stopped: bool,
    created_ms: u64,
    deadline_ms: u64,
    /// Number of listings before it appears.
    hidden: u32,
    worker: JobStatus,
    guarded: bool,
    /// The worker has written its manifest.
    whole: bool,
    /// Job of the worker.
    job: Option<JobSpec>,
    price: UsdPerHour,
    /// Price of its offer.
    offered: UsdPerHour,
}

/// State of the cloud and its hosts.
#[derive(Default)]
pub(crate) struct Simulation {
    pub(crate) machines: BTreeMap<String, Machine>,
    pub(crate) effects: Vec<&'static str>,
    /// Names of the pushed files.
    pub(crate) pushed: Vec<String>,
    pub(crate) armed: Vec<(usize, Fault)>,
    pub(crate) fired: usize,
    pub(crate) struck: Vec<(Fault, &'static str)>,
    /// Names of all instances so far.
    names: BTreeSet<String>,
    /// Cost of ended instances, without time after a deadline that no process on the instance
    /// could enforce.
    pub(crate) billed: Usd,
    /// As `billed`, without the excess over the offer's price of instances on which nothing ran:
    /// these are terminated as soon as the price is known.
    pub(crate) kept: Usd,
    /// Whether instances can end themselves, by their guards.
    pub(crate) self_destruct: bool,
    pub(crate) creates: usize,
    pub(crate) most_alive: usize,
    pub(crate) offers: Vec<Offer>,
    /// Number of listings before a new instance appears.
    pub(crate) visibility: u32,
    /// Offers that are refused.
    pub(crate) sold_out: Vec<String>,
    /// Offers with unfit hosts.
    pub(crate) unfit: Vec<String>,
    /// Offers whose hosts do not answer after the login: a probe takes this long, and fails.
    pub(crate) drags: Vec<(String, Duration)>,
    /// The local worker is a CPU build.
    pub(crate) without_cuda: bool,
    /// Number of hosts that do not run programs.
    pub(crate) barred: u32,
    pub(crate) create_error: Option<BrokerErrorKind>,
    /// Number of times that a worker dies.
    pub(crate) deaths: u32,
    /// The worker runs until it is stopped.
    pub(crate) endless: bool,
    /// The worker ends with this outcome instead of results.
    pub(crate) outcome: Option<Outcome>,
    /// Whether a byte of the fetched files is changed.
    pub(crate) damage: bool,
    /// The manifest is invalid.
    pub(crate) damaged_manifest: bool,
    /// The worker runs a job with this number of layers.
    pub(crate) other_layers: Option<usize>,
    /// Downloads never end.
    pub(crate) stalls: bool,
    pub(crate) price_on_arrival: Option<UsdPerHour>,
    /// The answer to a create call names no price.
    pub(crate) priceless: bool,
    pub(crate) outage: bool,
    /// Every listing fails.
    pub(crate) mute: bool,
    /// Terminations are refused until then.
    pub(crate) refuses_until: Option<Instant>,
    /// The current listing shows this program's instances as unreadable entries.
    odd: bool,
    pub(crate) max_duration_s: u64,
    pub(crate) budget: Option<Usd>,
    /// Number of listings in which instances are queued.
    pub(crate) queued: u32,
    /// No instance ever comes up.
    pub(crate) never_up: bool,
    /// The cloud's own record of how long instances have run.
    pub(crate) run_time: Option<RunTime>,
    /// The cloud ends an instance by itself, and the worker with it.
    pub(crate) limited: bool,
    /// Higher price that all hosts demand.
    pub(crate) rise: Option<String>,
    /// The agreed amount.
    pub(crate) agreed: Option<Usd>,
    /// Seconds by which the cloud's clock, also used by instances, is ahead of this machine's.
    pub(crate) clock_ahead: i64,
    /// The ledger's file, for faults that affect it.
    pub(crate) ledger: PathBuf,
    /// Whether the run's row cannot be read.
    pub(crate) unreadable: bool,
    state_full_until: Option<Instant>,
    results_full_until: Option<Instant>,
    next_id: usize,
}

/// The fake broker, and transport to its hosts.
#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) simulation: Arc<Mutex<Simulation>>,
    pub(crate) crashed: Arc<Notify>,
    pub(crate) stop: Arc<watch::Sender<Stop>>,
    pub(crate) bad_hosts: BadHosts,
    pub(crate) timeouts: Timeouts,
}

impl Simulation {
    /// The instances that this ledger rented.
    pub(crate) fn ours(&self) -> impl Iterator<Item = &Machine> {
        self.machines.values().filter(|machine| !machine.foreign)
    }

    /// Time by the cloud's clock.
    fn now_ms(&self) -> u64 {
        now_ms().saturating_add_signed(self.clock_ahead * 1000)
    }

    /// Moves this machine's clock ahead by hours, if it is set by tests.
    pub(crate) fn jump(&mut self) {
        if let Some(now) = wound_ms() {
            set_clock(now.saturating_add_signed(JUMP * 1000));
            self.clock_ahead -= JUMP;
        }
    }

    fn in_ledger(&self, sql: &str) {
        let ledger = rusqlite::Connection::open(&self.ledger).unwrap();
        ledger.execute_batch(sql).unwrap();
    }

    fn fill_state(&mut self) {
        self.state_full_until = Some(Instant::now() + FULL);
        self.in_ledger(
            "CREATE TRIGGER IF NOT EXISTS full BEFORE INSERT ON events \
             BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END",
        );
    }

    /// Ends full disks that are due at `now`; with `None` all.
    pub(crate) fn make_room(&mut self, now: Option<Instant>) {
        let over = |until: Option<Instant>| until.is_some_and(|until| now.is_none_or(|now| until <= now));
        if over(self.state_full_until) {
            self.state_full_until = None;
            self.in_ledger("DROP TRIGGER IF EXISTS full");
        }
        if over(self.results_full_until) {
            self.results_full_until = None;
        }
    }

    fn damage(&mut self) {
        if !std::mem::replace(&mut self.unreadable, true) {
            self.in_ledger("UPDATE runs SET spec = 'x' || spec");
        }
    }

    /// Makes the run's row readable.
    pub(crate) fn repair_row(&mut self) {
        if std::mem::take(&mut self.unreadable) {
            self.in_ledger("UPDATE runs SET spec = substr(spec, 2)");
        }
    }

    /// Runs the guards: they end instances whose time is up, and those without a controller for
    /// `alone`.
    pub(crate) fn pass(&mut self, alone: Duration) {
        let now = self.now_ms();
        let watched = |machine: &Machine| machine.guarded && self.self_destruct && !machine.foreign;
        let over = |machine: &Machine| now >= machine.deadline_ms || alone >= Duration::from_secs(WATCH.lease_s);
        let ended: Vec<String> =
            self.machines.iter().filter(|(_, m)| watched(m) && over(m)).map(|(id, _)| id.clone()).collect();
        ended.iter().for_each(|id| self.end(id));
    }

    /// Preempts this program's instances.
    pub(crate) fn preempt(&mut self) {
        let ours: Vec<String> = self.machines.iter().filter(|(_, m)| !m.foreign).map(|(id, _)| id.clone()).collect();
        ours.iter().for_each(|id| self.end(id));
    }

    /// Sets the price of instances from their creation on.
    pub(crate) fn bill(&mut self, price: UsdPerHour) {
        self.machines.values_mut().filter(|machine| !machine.foreign).for_each(|machine| machine.price = price);
    }

    fn raise_prices(&mut self) {
        for offer in &mut self.offers {
            offer.price = UsdPerHour::from_dollars(offer.price.0.dollars() * 1.3);
        }
    }

    /// The current price of this offer.
    fn price_of(&self, offer: &Offer) -> UsdPerHour {
        let now = self.offers.iter().find(|now| now.key == offer.key).map_or(offer.price, |now| now.price);
        self.price_on_arrival.unwrap_or(now)
    }

    /// Adds an instance of another program, first in every list.
    pub(crate) fn add_foreign(&mut self, number: usize) {
        let name = ["my-web-server", "outliers-somebody-else-n-1", "notes"][number % 3].to_owned();
        let machine = Machine {
            name,
            foreign: true,
            known: true,
            stopped: false,
            created_ms: 0,
            deadline_ms: 0,
            hidden: 0,
            worker: JobStatus::NotStarted,
            guarded: false,
            whole: false,
            job: None,
            price: UsdPerHour::from_dollars(9.0),
            offered: UsdPerHour::from_dollars(9.0),
        };
        self.machines.insert(format!("a{number}"), machine);
    }

    fn end(&mut self, id: &str) {
        let Some(machine) = self.machines.remove(id) else { return };
        assert!(!machine.foreign, "an instance that is not ours was ended");
        let until = self.now_ms().min(machine.deadline_ms);
        let lived = Duration::from_millis(until.saturating_sub(machine.created_ms));
        // The cost of an instance that could not be recorded is unknown.
        if machine.known && self.state_full_until.is_none() {
            self.billed = self.billed + machine.price.cost(lived);
            let used = machine.worker != JobStatus::NotStarted;
            let kept = if used { machine.price } else { machine.price.min(machine.offered) };
            self.kept = self.kept + kept.cost(lived);
        }
    }
}

impl Fake {
    pub(crate) fn new() -> Self {
        let offers = vec![offer("a", 1.0), offer("b", 2.0)];
        let simulation = Simulation { offers, visibility: 1, max_duration_s: 3600, ..Simulation::default() };
        Self {
            simulation: Arc::new(Mutex::new(simulation)),
            crashed: Arc::new(Notify::new()),
            stop: Arc::new(watch::Sender::new(Stop::Go)),
            bad_hosts: BadHosts::default(),
            timeouts: QUICK,
        }
    }

    pub(crate) fn set(&self, change: impl FnOnce(&mut Simulation)) {
        change(&mut self.simulation.lock().unwrap());
    }

    /// The fake cloud.
    pub(crate) fn clouds(&self) -> Clouds {
        vec![Cloud { broker: Arc::new(self.clone()), timeouts: self.timeouts.clone(), is_local: false }].into()
    }

    pub(crate) fn ports<'a>(&'a self, clouds: &'a Clouds) -> Ports<'a> {
        Ports { clouds, bad_hosts: &self.bad_hosts, hosts: self, secrets: &[], start_throttle: None }
    }

    /// Performs and counts an effect, with the fault for its number.
    async fn effect<T>(&self, name: &'static str, apply: impl FnOnce(&mut Simulation) -> T) -> Result<T, FaultOutcome> {
        let outcome = {
            let mut simulation = self.simulation.lock().unwrap();
            simulation.pass(Duration::ZERO);
            simulation.make_room(Some(Instant::now()));
            simulation.effects.push(name);
            let number = simulation.effects.len();
            let fault = simulation.armed.iter().find(|(at, _)| *at == number).map(|(_, fault)| *fault);
            simulation.fired += usize::from(fault.is_some());
            simulation.struck.extend(fault.map(|fault| (fault, name)));
            match fault {
                Some(Fault::Outage) => simulation.outage = true,
                Some(Fault::Preempted) => simulation.preempt(),
                Some(Fault::PriceRises) => simulation.raise_prices(),
                Some(Fault::Odd) => simulation.odd = true,
                Some(Fault::Refuses) => simulation.refuses_until = Some(Instant::now() + REFUSES),
                Some(Fault::Stop) => drop(self.stop.send(Stop::Now)),
                Some(Fault::StopTwice) => drop(self.stop.send(Stop::SkipSync)),
                Some(Fault::Hangup) => {
                    self.stop.send_if_modified(|level| {
                        let more = *level < Stop::LetGo;
                        *level = Stop::LetGo.max(*level);
                        more
                    });
                }
                Some(Fault::StateFull) => simulation.fill_state(),
                Some(Fault::ResultsFull) => {
                    simulation.results_full_until = Some(Instant::now() + self.timeouts.listing_interval * 10);
                }
                Some(Fault::Unreadable) => simulation.damage(),
                Some(Fault::ClockJumps) => simulation.jump(),
                _ => {}
            }
            let result = match fault {
                _ if simulation.outage => Err(FaultOutcome::NotApplied),
                Some(Fault::CrashBefore) => Err(FaultOutcome::Crash),
                Some(Fault::Fails) => Err(FaultOutcome::NotApplied),
                Some(Fault::CrashAfter) => Ok(Err(FaultOutcome::Crash)),
                Some(Fault::AnswerLost) => Ok(Err(FaultOutcome::Applied)),
                _ => Ok(Ok(())),
            };
            result.and_then(|after| {
                let value = apply(&mut simulation);
                simulation.odd = false;
                let alive = simulation.ours().count();
                simulation.most_alive = simulation.most_alive.max(alive);
                after.map(|()| value)
            })
        };
        if matches!(outcome, Err(FaultOutcome::Crash)) {
            self.crashed.notify_one();
            return std::future::pending().await;
        }
        // Yields, like a real call.
        tokio::task::yield_now().await;
        outcome
    }
}

#[derive(Clone, Copy, Debug)]
enum FaultOutcome {
    Crash,
    NotApplied,
    Applied,
}

impl FaultOutcome {
    fn broker(self) -> BrokerError {
        let kind = if matches!(self, Self::Applied) { BrokerErrorKind::Maybe } else { BrokerErrorKind::Unavailable };
        BrokerError { broker: "fake", kind, message: format!("{self:?}") }
    }

    fn host(self) -> HostError {
        broken(&format!("{self:?}"))
    }
}

#[async_trait]
impl Broker for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { self_destruct: self.simulation.lock().unwrap().self_destruct, ..Capabilities::default() }
    }

    fn clock_skew(&self) -> Option<i64> {
        Some(self.simulation.lock().unwrap().clock_ahead).filter(|ahead| *ahead != 0)
    }

    async fn check(&self) -> Result<Account, BrokerError> {
        Ok(Account::default())
    }

    async fn offers(&self, _: &GpuRequest) -> Result<Offers, BrokerError> {
        let listed =
            self.effect("offers", |simulation| simulation.offers.clone()).await.map_err(FaultOutcome::broker)?;
        Ok(Offers { offers: listed, dropped: Vec::new() })
    }

    async fn create(&self, offer: &Offer, lease: &Lease) -> Result<Instance, BrokerError> {
        assert!(lease.ssh_public_key.starts_with("ssh-fake"));
        let made = self.effect("create", |simulation| {
            simulation.creates += 1;
            if let Some(kind) = simulation.create_error {
                return Err(BrokerError { broker: "fake", kind, message: "said no".into() });
            }
            if simulation.sold_out.contains(&offer.key) {
                return Err(BrokerError { broker: "fake", kind: BrokerErrorKind::NoCapacity, message: "gone".into() });
            }
            simulation.next_id += 1;
            let id = format!("i{}", simulation.next_id);
            let lived_on = lease.tag.deadline.saturating_sub(simulation.now_ms() / 1000);
            assert!(lived_on <= simulation.max_duration_s, "its deadline is {lived_on} s away");
            let reserved = offer.price.cost(Duration::from_secs(lived_on));
            for most in [simulation.budget, simulation.agreed].into_iter().flatten() {
                assert!(
                    simulation.kept + reserved <= most,
                    "{} were spent, {reserved} may come of {most}",
                    simulation.kept
                );
            }
            assert!(simulation.names.insert(lease.tag.to_string()), "two instances with one name");
            let machine = Machine {
                name: lease.tag.to_string(),
                foreign: false,
                known: false,
                stopped: false,
                created_ms: simulation.now_ms(),
                deadline_ms: lease.tag.deadline * 1000,
                hidden: simulation.visibility,
                worker: JobStatus::NotStarted,
                guarded: false,
                whole: false,
                job: None,
                price: simulation.price_of(offer),
                offered: offer.price,
            };
            simulation.machines.insert(id.clone(), machine.clone());
            let made = instance(&id, &machine);
            Ok(Instance { price: made.price.filter(|_| !simulation.priceless), ..made })
        });
        made.await.map_err(FaultOutcome::broker)?
    }

    async fn list(&self) -> Result<Vec<Instance>, BrokerError> {
        if self.simulation.lock().unwrap().mute {
            return Err(FaultOutcome::NotApplied.broker());
        }
        let listed = self.effect("list", |simulation| {
            let mut shown = Vec::new();
            for (id, machine) in &mut simulation.machines {
                if machine.hidden == 0 {
                    machine.known = true;

                    shown.push(if simulation.odd && !machine.foreign {
                        unreadable_entry()
                    } else {
                        instance(id, machine)
                    });
                } else {
                    machine.hidden -= 1;
                }
            }
            let up = shown.iter_mut().filter(|instance| matches!(instance.state, InstanceState::Ready(_)));
            if simulation.queued > 0 {
                simulation.queued -= 1;
                up.for_each(|instance| instance.state = InstanceState::Queued("Priority".into()));
            } else if simulation.never_up {
                up.for_each(|instance| instance.state = InstanceState::Booting);
            }
            shown
        });
        listed.await.map_err(FaultOutcome::broker)
    }

    async fn price_rise(&self, _: &InstanceId) -> Result<Option<String>, BrokerError> {
        Ok(self.simulation.lock().unwrap().rise.clone())
    }

    fn ends_at(&self, id: &InstanceId) -> Option<u64> {
        let simulation = self.simulation.lock().unwrap();
        let died = |machine: &Machine| matches!(machine.worker, JobStatus::Ended { .. }) && !machine.whole;
        (simulation.limited && simulation.machines.get(&id.0).is_some_and(died)).then(|| now_ms() / 1000)
    }

    fn run_time(&self, id: &InstanceId) -> Option<RunTime> {
        let simulation = self.simulation.lock().unwrap();
        simulation.run_time.filter(|_| simulation.machines.contains_key(&id.0))
    }

    async fn terminate(&self, id: &InstanceId) -> Result<(), BrokerError> {
        let ended = self.effect("terminate", |simulation| {
            if simulation.refuses_until.is_some_and(|until| Instant::now() < until) {
                return Err(FaultOutcome::NotApplied);
            }
            simulation.end(&id.0);
            Ok(())
        });
        ended.await.and_then(|refused| refused).map_err(FaultOutcome::broker)
    }
}

fn unreadable_entry() -> Instance {
    Instance::new("fake", "", "", InstanceState::Unreadable("it is no object".into()))
}

fn instance(id: &str, machine: &Machine) -> Instance {
    Instance {
        broker: "fake".into(),
        id: InstanceId(id.into()),
        name: machine.name.clone(),
        state: match machine.stopped {
            true => InstanceState::Stopped,
            false => InstanceState::Ready(SshEndpoint { host: id.into(), port: 22, user: "root".into() }),
        },
        price: Some(machine.price),
        hardware: "4 CPU cores".into(),
        created_at: None,
    }
}

#[async_trait]
impl Hosts for Fake {
    fn key(&self, folder: &Path) -> Result<String, HostError> {
        fs::write(folder.join("key"), "private").unwrap();
        Ok("ssh-fake AAAA".into())
    }

    fn serve(&self, want: &GpuRequest) -> Result<(), HostError> {
        if !self.simulation.lock().unwrap().without_cuda || want.worker_cuda.is_none() {
            return Ok(());
        }
        Err(HostError::new(HostErrorKind::Local, "built without CUDA"))
    }

    fn forget(&self, folder: &Path) -> Result<(), HostError> {
        match fs::remove_file(folder.join("key")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{error}"),
            _ => Ok(()),
        }
    }

    async fn reach(
        &self,
        endpoint: &SshEndpoint,
        folder: &Path,
        pin: Option<&Pin>,
        deadline: Instant,
        _: OnEvent<'_>,
    ) -> Result<(Box<dyn Host>, Pin), HostError> {
        assert!(folder.join("key").exists(), "the key outlives a crash");
        let shown = Pin(format!("key of {}", endpoint.host));
        if let Some(pin) = pin {
            assert_eq!(*pin, shown);
        }
        let id = endpoint.host.clone();
        loop {
            let error = match self.effect("reach", |simulation| simulation.machines.contains_key(&id)).await {
                Ok(true) => return Ok((Box::new(FakeHost { fake: self.clone(), id }), shown)),
                Ok(false) => broken("refused"),
                Err(struck) => struck.host(),
            };
            if Instant::now() >= deadline {
                return Err(error);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn over(&self, access: InstanceTransport, _: &Path) -> Box<dyn Host> {
        Box::new(FakeHost { fake: self.clone(), id: access.name })
    }
}

struct FakeHost {
    fake: Fake,
    id: String,
}

impl FakeHost {
    async fn on_machine<T>(&self, name: &'static str, apply: impl FnOnce(&mut Machine) -> T) -> Result<T, HostError> {
        let id = self.id.clone();
        let done = self.fake.effect(name, |simulation| simulation.machines.get_mut(&id).map(apply));
        let gone = || broken("connection reset");
        done.await.map_err(FaultOutcome::host)?.ok_or_else(gone)
    }
}

#[async_trait]
impl Host for FakeHost {
    async fn probe(&self, offer: &Offer, _: &GpuRequest, _: bool) -> Result<HostFacts, HostError> {
        let drags = self.fake.simulation.lock().unwrap().drags.iter().find(|(key, _)| *key == offer.key).cloned();
        if let Some((_, time)) = drags {
            tokio::time::sleep(time).await;
            return Err(broken("no end of it"));
        }
        self.on_machine("probe", |_| ()).await?;
        if self.fake.simulation.lock().unwrap().unfit.contains(&offer.key) {
            return Err(HostError::new(HostErrorKind::NotAsRented, "it has 0 GPUs"));
        }
        Ok(facts())
    }

    async fn guard(&self, _: &str, config: &GuardConfig) -> Result<(), HostError> {
        assert!(!config.left.is_zero(), "a guard would end the instance at once");
        self.on_machine("guard", |machine| machine.guarded = true).await
    }

    async fn push_worker(&self, on: OnEvent<'_>) -> Result<(), HostError> {
        on(HostEvent::Uploading { name: "worker".into(), sent: 1, total: 2 });
        let is_barred = {
            let mut simulation = self.fake.simulation.lock().unwrap();
            let is_barred = simulation.barred > 0;
            simulation.barred = simulation.barred.saturating_sub(1);
            is_barred
        };
        if is_barred {
            return Err(HostError::new(HostErrorKind::WorkerUnfit, "nothing runs here"));
        }
        self.on_machine("push worker", |_| ()).await
    }

    async fn push(&self, _: &str, local: &Path, name: &str, _: OnEvent<'_>) -> Result<String, HostError> {
        assert!(local.exists());
        self.on_machine("push", |_| ()).await?;
        self.fake.set(|simulation| simulation.pushed.push(name.to_owned()));
        Ok(format!("/remote/{name}"))
    }

    async fn launch(&self, _: &str, job: &JobSpec, _: &[(&'static str, Secret)]) -> Result<(), HostError> {
        let layers = self.fake.simulation.lock().unwrap().other_layers;
        let job = JobSpec { layers: layers.or(job.layers), ..job.clone() };
        self.on_machine("launch", |machine| {
            assert!(machine.guarded, "nothing runs without a guard");
            if machine.worker == JobStatus::NotStarted {
                machine.worker = JobStatus::Running;
                machine.job = Some(job);
            }
        })
        .await
    }

    async fn restart(&self, _: &str, _: &[(&'static str, Secret)]) -> Result<(), HostError> {
        self.on_machine("restart", |machine| {
            if !machine.whole {
                machine.worker = JobStatus::Running;
            }
        })
        .await
    }

    async fn status(&self, _: &str) -> Result<JobStatus, HostError> {
        self.on_machine("status", |machine| machine.worker).await
    }

    async fn follow(&self, _: &str, _: OnEvent<'_>) -> Result<JobStatus, HostError> {
        let id = self.id.clone();
        let status = self.fake.effect("follow", |simulation| {
            let machine = simulation.machines.get_mut(&id)?;
            if machine.worker == JobStatus::Running && simulation.deaths > 0 {
                simulation.deaths -= 1;
                machine.worker = JobStatus::Ended { exit: Some(137) };
            } else if machine.worker == JobStatus::Running && !simulation.endless {
                machine.worker = JobStatus::Ended { exit: Some(0) };
                machine.whole = true;
            }
            Some(machine.worker)
        });
        let gone = || broken("connection reset");
        let status = status.await.map_err(FaultOutcome::host)?.ok_or_else(gone)?;
        if status == JobStatus::Running {
            return std::future::pending().await;
        }
        Ok(status)
    }

    async fn fetch(
        &self,
        _: &str,
        into: &Path,
        expected: &[FileBytes],
        _: OnEvent<'_>,
    ) -> Result<Option<Manifest>, HostError> {
        let (done, job) = self.on_machine("fetch", |machine| (machine.whole, machine.job.clone())).await?;
        let (stalls, refused, is_full) = {
            let simulation = self.fake.simulation.lock().unwrap();
            (simulation.stalls, simulation.damaged_manifest, simulation.results_full_until.is_some())
        };
        if stalls {
            return std::future::pending().await;
        }
        if refused {
            let message = "its manifest names a file that the job does not make";
            return Err(HostError::new(HostErrorKind::Damaged, message));
        }
        if is_full {
            return Err(HostError::new(HostErrorKind::Local, "no space left on device"));
        }
        fs::write(into.join(files::LOG), "said something\n").unwrap();
        if !done {
            return Ok(None);
        }
        let (outcome, damage) = {
            let simulation = self.fake.simulation.lock().unwrap();
            (simulation.outcome.clone().unwrap_or(Outcome::Complete), simulation.damage)
        };
        let mut entries = Vec::new();
        let metadata = serde_json::json!({ "job": job }).to_string();
        for (name, text) in [(files::RESULTS, files::RESULTS), (files::METADATA, metadata.as_str())] {
            assert!(expected.iter().any(|file| file.name == name && file.bytes >= text.len() as u64));
            fs::write(into.join(name), text).unwrap();
            let (bytes, sha256) = digest(&into.join(name)).unwrap();
            entries.push(FileEntry { name: name.into(), bytes, sha256 });
        }
        if damage {
            fs::write(into.join(files::RESULTS), "RESULTS.json").unwrap();
        }
        let manifest = Manifest { schema: SCHEMA, outcome, files: entries };
        fs::write(into.join(files::MANIFEST), serde_json::to_vec(&manifest).unwrap()).unwrap();
        Ok(Some(manifest))
    }

    async fn stop_worker(&self, _: &str) -> Result<(), HostError> {
        self.on_machine("stop worker", |machine| {
            if machine.worker == JobStatus::Running {
                machine.worker = JobStatus::Ended { exit: None };
            }
        })
        .await
    }
}

/// A connection error.
fn broken(message: &str) -> HostError {
    HostError::new(HostErrorKind::Connection(TransportErrorKind::Reset), message)
}

/// A host without GPUs.
pub(crate) fn facts() -> HostFacts {
    HostFacts {
        os: "Linux".into(),
        arch: "x86_64".into(),
        user: "root".into(),
        home: "/root".into(),
        cores: Some(4),
        ram: None,
        disk_free: None,
        clock_skew: None,
        hub: None,
        cuda: None,
        gpus: Vec::new(),
    }
}
