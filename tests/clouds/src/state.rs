//! State behind a cloud's API: stock, instances, keys, a clock, a bill.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use outliers::cloud::broker::SshEndpoint;
use outliers::units::{Usd, UsdPerHour};
use serde_json::{Map, Value};

use crate::{Fault, How, Op, Refusal, Request};

/// A GPU model; each dialect has its own name for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gpu {
    /// A100 of 80 GB on an SXM board.
    A100,
    /// H100 of 80 GB on an SXM board.
    H100,
    /// GeForce RTX 4090.
    Rtx4090,
}

impl Gpu {
    /// Its common name.
    pub fn canonical(self) -> &'static str {
        match self {
            Self::A100 => "A100-80GB",
            Self::H100 => "H100",
            Self::Rtx4090 => "RTX 4090",
        }
    }

    /// Nominal memory in GiB.
    pub fn sold_gib(self) -> u64 {
        match self {
            Self::A100 | Self::H100 => 80,
            Self::Rtx4090 => 24,
        }
    }

    /// Memory that its driver reports, in MiB: less than nominal.
    pub fn reported_mib(self) -> u64 {
        match self {
            Self::A100 => 81_251,
            Self::H100 => 81_559,
            Self::Rtx4090 => 24_564,
        }
    }
}

/// Stock of a cloud. A dialect leaves out what its cloud cannot offer.
#[derive(Clone, Debug, PartialEq)]
pub struct Stock {
    /// Id in this cloud; digits only, since some clouds number their offers.
    pub id: String,
    /// GPU model.
    pub gpu: Gpu,
    /// Number of GPUs.
    pub gpus: u32,
    /// Memory of the host in GiB; `None`: not reported.
    pub ram_gib: Option<u64>,
    /// CPU cores.
    pub cores: u32,
    /// Largest disk in GiB.
    pub disk_gib: u64,
    /// Price of the whole instance without disk, where disk is priced apart.
    pub price: UsdPerHour,
    /// Region: `us-kansas-2`.
    pub region: &'static str,
    /// ISO country code: `US`.
    pub country: &'static str,
    /// Whether it is in a data centre and not in a private home.
    pub secure: bool,
    /// Whether it is interruptible.
    pub spot: bool,
    /// Currency: `USD`.
    pub currency: &'static str,
    /// Hours of prepayment.
    pub prepaid_hours: Option<u32>,
    /// Newest CUDA version of the host's driver: major, minor.
    pub cuda: (u32, u32),
    /// Number available.
    pub left: u32,
}

impl Stock {
    /// Secure, on demand, priced in dollars, large enough for every test.
    pub fn plain(id: &str, gpu: Gpu, gpus: u32, dollars: f64) -> Self {
        Self {
            id: id.to_owned(),
            gpu,
            gpus,
            ram_gib: Some(117 * u64::from(gpus)),
            cores: 16 * gpus,
            disk_gib: 1000,
            price: UsdPerHour::from_dollars(dollars),
            region: "us-kansas-2",
            country: "US",
            secure: true,
            spot: false,
            currency: "USD",
            prepaid_hours: None,
            cuda: (12, 8),
            left: 9,
        }
    }

    /// One stock per property that brokers must distinguish.
    pub fn mixed() -> Vec<Self> {
        let plain = Self::plain;
        vec![
            plain("1001", Gpu::A100, 1, 1.89),
            Self { region: "us-texas-1", ..plain("1002", Gpu::H100, 8, 23.92) },
            Self {
                region: "no-oslo-1",
                country: "NO",
                ram_gib: None,
                secure: false,
                ..plain("1003", Gpu::Rtx4090, 1, 0.34)
            },
            Self { left: 0, region: "us-texas-1", ..plain("1004", Gpu::H100, 1, 2.49) },
            Self { spot: true, ..plain("1005", Gpu::A100, 2, 1.2) },
            Self { currency: "EUR", region: "fi-helsinki-1", country: "FI", ..plain("1006", Gpu::A100, 4, 6.0) },
            Self { prepaid_hours: Some(24), ..plain("1007", Gpu::H100, 2, 4.2) },
        ]
    }

    /// Whether it is available now, on demand, for dollars, without prepayment.
    pub fn is_plain(&self) -> bool {
        self.left > 0 && !self.spot && self.currency == "USD" && self.prepaid_hours.is_none()
    }
}

/// Content of a creation request.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    /// Id of the stock.
    pub stock: String,
    /// Name or label.
    pub name: String,
    /// Disk in GiB.
    pub disk_gib: u64,
    /// OpenSSH public key that may log in.
    pub public_key: Option<String>,
    /// All GPUs of the stock.
    pub price: UsdPerHour,
}

/// An altered field of an instance, in lists and single queries.
#[derive(Clone, Debug, PartialEq)]
pub struct Odd {
    /// Id of the instance.
    pub id: String,
    /// Name of the field.
    pub field: String,
    /// Its value; `None`: missing.
    pub value: Option<Value>,
}

impl Odd {
    /// The answer with the altered field.
    pub(crate) fn put_into(&self, answer: &mut Value) {
        each_entry(answer, &mut |entry| {
            if id_of(entry).as_ref() != Some(&self.id) {
                return;
            }
            match &self.value {
                Some(value) => drop(entry.insert(self.field.clone(), value.clone())),
                None => drop(entry.shift_remove(&self.field)),
            }
        });
    }
}

fn id_of(entry: &Map<String, Value>) -> Option<String> {
    match entry.get("id")? {
        Value::String(id) => Some(id.clone()),
        Value::Number(id) => Some(id.to_string()),
        _ => None,
    }
}

/// Every object of an answer that has an id.
fn each_entry(answer: &mut Value, act: &mut impl FnMut(&mut Map<String, Value>)) {
    match answer {
        Value::Array(entries) => entries.iter_mut().for_each(|entry| each_entry(entry, act)),
        Value::Object(entry) => {
            if entry.contains_key("id") {
                act(entry);
            } else {
                entry.values_mut().for_each(|part| each_entry(part, act));
            }
        }
        _ => {}
    }
}

/// State of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstanceStatus {
    /// Not reachable yet.
    Booting,
    /// It has an address.
    Running,
    /// Failed, and billed.
    Failed,
    /// Stopped, and billed.
    Stopped,
    /// Ended. Clouds may list it for a while ([`CloudState::lingers`]).
    Ended,
}

/// A current or former instance.
#[derive(Clone, Debug, PartialEq)]
pub struct FakeInstance {
    /// The cloud's id; digits only, since some clouds number theirs.
    pub id: String,
    /// Its stock.
    pub stock: Stock,
    /// Name or label.
    pub name: String,
    /// Disk in GiB.
    pub disk_gib: u64,
    /// OpenSSH public key that may log in.
    pub public_key: Option<String>,
    /// Price per hour.
    pub price: UsdPerHour,
    /// State.
    pub life: InstanceStatus,
    /// A status to show instead of the cloud's, to imitate a new one.
    pub odd_status: Option<String>,
    /// Address of its SSH server once it runs.
    pub ssh: SshEndpoint,
    /// Start, Unix seconds.
    pub created_at: u64,
    /// End, Unix seconds.
    pub ended_at: Option<u64>,
    /// Number of list reads since its creation, and since its end.
    listings: u32,
    looks: u32,
}

impl FakeInstance {
    /// Whether it bills.
    pub fn is_live(&self) -> bool {
        self.life != InstanceStatus::Ended
    }

    /// Cost until now.
    pub fn cost(&self, now: u64) -> Usd {
        let end = self.ended_at.unwrap_or(now);
        self.price.cost(Duration::from_secs(end.saturating_sub(self.created_at)))
    }
}

/// A public key in the account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshKey {
    /// The cloud's id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// One line of `authorized_keys`.
    pub public_key: String,
}

/// A machine behind an instance; dropped when the instance ends.
pub struct Rented {
    /// Address of its SSH server.
    pub ssh: SshEndpoint,
    /// Dropped with the instance.
    pub machine: Box<dyn Any + Send>,
}

/// Stage of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Received; no effect yet.
    Arrived,
    /// It has taken effect; no answer yet.
    Applied,
    /// The answer is being sent.
    Answered,
}

/// Listener for requests.
pub type Watch = Arc<dyn Fn(usize, Moment) + Send + Sync>;

/// Makes the machine of an instance.
pub type Host = Arc<dyn Fn(&FakeInstance) -> Rented + Send + Sync>;

/// State of a fake cloud. Tests may read and change it.
pub struct CloudState {
    /// Unix seconds, by which the bill is computed. Stands still unless a test advances it or sets
    /// a pace.
    pub now: u64,
    /// Seconds that pass with each request.
    pub pace: u64,
    /// Stock.
    pub stock: Vec<Stock>,
    /// All current and former instances.
    pub instances: Vec<FakeInstance>,
    /// SSH keys of the account.
    pub keys: Vec<SshKey>,
    /// Altered fields of instances.
    pub odd: Option<Odd>,
    /// Every field that an instance was shown with.
    pub fields: BTreeMap<String, Value>,
    /// Faults to inject, in order.
    pub faults: Vec<Fault>,
    /// All requests so far.
    pub requests: Vec<Request>,
    /// Items per page, for clouds with pages.
    pub page_size: usize,
    /// Lists end before the last page, though they announce more, for clouds that announce it
    /// ([`crate::Dialect::tells_totals`]).
    pub truncates: bool,
    /// Number of lists in which a new instance is not shown yet.
    pub shown_after: u32,
    /// Number of polls, lists included, before an instance runs.
    pub boots_after: u32,
    /// Number of polls in which an ended instance is still shown.
    pub lingers: u32,
    /// Seconds by which the clock in its answers is ahead of this machine's.
    pub clock_ahead: i64,
    /// Whether the account has funds.
    pub funds: bool,
    /// Real machines, instead of addresses where nothing listens.
    pub host: Option<Host>,
    /// Called at each stage of each request, with the request's number from 1 on.
    pub watch: Option<Watch>,
    machines: BTreeMap<String, Box<dyn Any + Send>>,
    made: u64,
}

impl fmt::Debug for CloudState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CloudState")
            .field("instances", &self.instances)
            .field("keys", &self.keys)
            .finish_non_exhaustive()
    }
}

impl Default for CloudState {
    fn default() -> Self {
        Self {
            now: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            pace: 0,
            stock: Stock::mixed(),
            instances: Vec::new(),
            keys: Vec::new(),
            odd: None,
            fields: BTreeMap::new(),
            faults: Vec::new(),
            requests: Vec::new(),
            page_size: 25,
            truncates: false,
            shown_after: 0,
            boots_after: 1,
            lingers: 0,
            clock_ahead: 0,
            funds: true,
            host: None,
            watch: None,
            machines: BTreeMap::new(),
            made: 0,
        }
    }
}

impl CloudState {
    /// Injects a fault into the next request of this kind, which has no effect.
    pub fn fail(&mut self, on: Op, how: How) {
        self.faults.push(Fault { on, applied: false, how, times: 1 });
    }

    /// Injects a fault into the answer of the next request of this kind, which takes effect.
    pub fn fail_after(&mut self, on: Op, how: How) {
        self.faults.push(Fault { on, applied: true, how, times: 1 });
    }

    /// Injects a fault into every request of this kind, none of which has an effect.
    pub fn fail_always(&mut self, on: Op, how: How) {
        self.faults.push(Fault { on, applied: false, how, times: u32::MAX });
    }

    /// An instance as shown, with its altered fields; its fields are recorded.
    pub(crate) fn show(&mut self, body: &mut String) {
        let Ok(mut answer) = serde_json::from_str::<Value>(body) else { return };
        each_entry(&mut answer, &mut |entry| {
            self.fields.extend(entry.iter().map(|(field, value)| (field.clone(), value.clone())));
        });
        if let Some(odd) = &self.odd {
            odd.put_into(&mut answer);
            *body = answer.to_string();
        }
    }

    pub(crate) fn take_fault(&mut self, on: Op) -> Option<Fault> {
        let at = self.faults.iter().position(|fault| fault.on == on && fault.times > 0)?;
        let fault = &mut self.faults[at];
        fault.times -= 1;
        let fault = fault.clone();
        self.faults.retain(|fault| fault.times > 0);
        Some(fault)
    }

    /// Number of requests of this kind.
    pub fn count(&self, op: Op) -> usize {
        self.requests.iter().filter(|request| request.op == Some(op)).count()
    }

    /// A number that is unique in this cloud.
    pub fn new_id(&mut self) -> String {
        self.made += 1;
        (70_000 + self.made).to_string()
    }

    /// The stock of this id.
    pub fn stock_of(&self, id: &str) -> Option<&Stock> {
        self.stock.iter().find(|stock| stock.id == id)
    }

    /// Rents an instance, if the stock is available.
    ///
    /// # Errors
    /// [`Refusal::NotFound`] for an unknown stock, [`Refusal::NoCapacity`] for one that is sold
    /// out.
    pub fn rent(&mut self, order: Order) -> Result<FakeInstance, Refusal> {
        let stock = self.stock.iter_mut().find(|stock| stock.id == order.stock).ok_or(Refusal::NotFound)?;
        stock.left = stock.left.checked_sub(1).ok_or(Refusal::NoCapacity)?;
        let stock = stock.clone();
        let instance = FakeInstance {
            id: self.new_id(),
            stock,
            name: order.name,
            disk_gib: order.disk_gib,
            public_key: order.public_key,
            price: order.price,
            life: InstanceStatus::Booting,
            odd_status: None,
            // An address for documentation, RFC 5737.
            ssh: SshEndpoint { host: "198.51.100.7".to_owned(), port: 22, user: "root".to_owned() },
            created_at: self.now,
            ended_at: None,
            listings: 0,
            looks: 0,
        };
        let instance = self.settle(instance);
        self.instances.push(instance.clone());
        Ok(instance)
    }

    fn settle(&mut self, mut instance: FakeInstance) -> FakeInstance {
        if let Some(host) = &self.host {
            let rented = host(&instance);
            instance.ssh = rented.ssh;
            self.machines.insert(instance.id.clone(), rented.machine);
        }
        instance
    }

    /// Adds an instance as if it was rented by other means.
    pub fn plant(&mut self, name: &str) -> String {
        let stock = self.stock.iter().find(|stock| stock.is_plain()).expect("there is something to rent").clone();
        let (price, stock) = (stock.price, stock.id);
        let order = Order { stock, name: name.to_owned(), disk_gib: 20, public_key: None, price };
        let id = self.rent(order).expect("it is left").id;
        // It is an old instance.
        self.change(&id, |instance| instance.listings = u32::MAX / 2);
        id
    }

    /// Changes the instance of this id, if there is one.
    pub fn change(&mut self, id: &str, change: impl FnOnce(&mut FakeInstance)) {
        if let Some(instance) = self.instances.iter_mut().find(|instance| instance.id == id) {
            change(instance);
        }
    }

    /// Ends an instance. Returns whether it was live.
    pub fn end(&mut self, id: &str) -> bool {
        let now = self.now;
        let Some(instance) = self.instances.iter_mut().find(|instance| instance.id == id && instance.is_live()) else {
            return false;
        };
        instance.life = InstanceStatus::Ended;
        instance.ended_at = Some(now);
        (instance.listings, instance.looks) = (0, 0);
        self.machines.remove(id);
        true
    }

    /// Instances that bill.
    pub fn live(&self) -> impl Iterator<Item = &FakeInstance> {
        self.instances.iter().filter(|instance| instance.is_live())
    }

    /// Counts a list read; call it once per list, with the first page.
    pub fn pass_listing(&mut self) {
        let boots_after = self.boots_after;
        for instance in &mut self.instances {
            instance.listings = instance.listings.saturating_add(1);
            look(instance, boots_after);
        }
    }

    /// Instances in a list now, oldest first.
    pub fn listed(&self) -> Vec<FakeInstance> {
        let shown = |instance: &&FakeInstance| match instance.life {
            InstanceStatus::Ended => instance.looks <= self.lingers,
            _ => instance.listings > self.shown_after,
        };
        self.instances.iter().filter(shown).cloned().collect()
    }

    /// Reads one instance; `None` if there is none.
    pub fn look_at(&mut self, id: &str) -> Option<FakeInstance> {
        let (boots_after, lingers) = (self.boots_after, self.lingers);
        let instance = self.instances.iter_mut().find(|instance| instance.id == id)?;
        look(instance, boots_after);
        Some(instance.clone()).filter(|instance| instance.is_live() || instance.looks <= lingers)
    }

    /// Cost of all instances until now.
    pub fn bill(&self) -> Usd {
        self.instances.iter().map(|instance| instance.cost(self.now)).sum()
    }
}

fn look(instance: &mut FakeInstance, boots_after: u32) {
    instance.looks = instance.looks.saturating_add(1);
    if instance.life == InstanceStatus::Booting && instance.looks > boots_after {
        instance.life = InstanceStatus::Running;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(state: &CloudState, at: usize) -> Order {
        let stock = &state.stock[at];
        let (price, stock) = (stock.price, stock.id.clone());
        Order { stock, name: "x".to_owned(), disk_gib: 20, public_key: None, price }
    }

    #[test]
    fn bill_follows_the_clock_until_termination() {
        let mut state = CloudState { now: 1000, ..CloudState::default() };
        let id = state.rent(order(&state, 0)).unwrap().id;
        state.now += 3600;
        assert_eq!(state.bill(), Usd::from_dollars(1.89));
        assert!(state.end(&id));
        assert!(!state.end(&id));
        state.now += 3600;
        assert_eq!(state.bill(), Usd::from_dollars(1.89));
        assert_eq!(state.live().count(), 0);
    }

    #[test]
    fn sold_out_stock_is_not_rented() {
        let mut state = CloudState::default();
        assert_eq!(state.rent(order(&state, 3)), Err(Refusal::NoCapacity));
        state.stock[0].left = 1;
        state.rent(order(&state, 0)).unwrap();
        assert_eq!(state.rent(order(&state, 0)), Err(Refusal::NoCapacity));
        assert_eq!(state.instances.len(), 1);
    }

    #[test]
    fn new_instance_is_listed_late_and_an_ended_one_longer() {
        let mut state = CloudState { shown_after: 1, boots_after: 2, lingers: 1, ..CloudState::default() };
        let id = state.rent(order(&state, 0)).unwrap().id;
        let shown = |state: &mut CloudState| {
            state.pass_listing();
            state.listed().first().map(|instance| instance.life)
        };
        assert_eq!(shown(&mut state), None);
        assert_eq!(shown(&mut state), Some(InstanceStatus::Booting));
        assert_eq!(state.look_at(&id).unwrap().life, InstanceStatus::Running);
        state.end(&id);
        assert_eq!(shown(&mut state), Some(InstanceStatus::Ended));
        assert_eq!(shown(&mut state), None);
        assert_eq!(state.look_at(&id), None);
    }
}
