//! What is behind a cloud's API: stock, instances, keys, a clock, a bill.

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
    /// The name in offers, whatever the cloud calls it.
    pub fn canonical(self) -> &'static str {
        match self {
            Self::A100 => "A100-80GB",
            Self::H100 => "H100",
            Self::Rtx4090 => "RTX 4090",
        }
    }

    /// Memory it is sold with, in GiB.
    pub fn sold_gib(self) -> u64 {
        match self {
            Self::A100 | Self::H100 => 80,
            Self::Rtx4090 => 24,
        }
    }

    /// Memory its driver reports, in MiB: less than it is sold with.
    pub fn reported_mib(self) -> u64 {
        match self {
            Self::A100 => 81_251,
            Self::H100 => 81_559,
            Self::Rtx4090 => 24_564,
        }
    }
}

/// Something a cloud rents out. A dialect leaves out what its cloud cannot offer.
#[derive(Clone, Debug, PartialEq)]
pub struct Stock {
    /// Names it in this world; digits only, as some clouds count their offers.
    pub id: String,
    /// GPU model.
    pub gpu: Gpu,
    /// Number of GPUs.
    pub gpus: u32,
    /// Memory of the host in GiB; `None`: the cloud does not know.
    pub ram_gib: Option<u64>,
    /// CPU cores.
    pub cores: u32,
    /// Disk that can be had, in GiB.
    pub disk_gib: u64,
    /// Whole instance without disk that is charged apart.
    pub price: UsdPerHour,
    /// Where: `us-kansas-2`.
    pub region: &'static str,
    /// ISO code: `US`.
    pub country: &'static str,
    /// In a data centre, not at somebody's home.
    pub secure: bool,
    /// May be taken back at any time.
    pub spot: bool,
    /// What the price is in: `USD`.
    pub currency: &'static str,
    /// Hours that are paid in advance.
    pub prepaid_hours: Option<u32>,
    /// Newest CUDA version of the host's driver: major, minor.
    pub cuda: (u32, u32),
    /// How many can still be rented.
    pub left: u32,
}

impl Stock {
    /// Secure, on demand, priced in dollars, enough for every test.
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

    /// One of everything that brokers must tell apart.
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

    /// Whether it can be had now, on demand, for dollars, without paying in advance.
    pub fn is_plain(&self) -> bool {
        self.left > 0 && !self.spot && self.currency == "USD" && self.prepaid_hours.is_none()
    }
}

/// What a create request asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Order {
    /// Of this stock.
    pub stock: String,
    /// Name or label.
    pub name: String,
    /// Disk in GiB.
    pub disk_gib: u64,
    /// OpenSSH public key that may log in.
    pub public_key: Option<String>,
    /// With everything.
    pub price: UsdPerHour,
}

/// A field of an instance that the API shows otherwise than it should, in lists and alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Odd {
    /// Of this instance.
    pub id: String,
    /// This field.
    pub field: String,
    /// Is this; `None`: is missing.
    pub value: Option<Value>,
}

impl Odd {
    /// The answer with the oddity in it.
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

/// Everything in an answer that has an id.
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

/// Where an instance is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Not reachable yet.
    Booting,
    /// It has an address.
    Running,
    /// It will not come up, and bills.
    Failed,
    /// Stopped, and bills.
    Stopped,
    /// Gone; clouds may show it for a while ([`World::lingers`]).
    Ended,
}

/// An instance that is or was.
#[derive(Clone, Debug, PartialEq)]
pub struct FakeInstance {
    /// The cloud's id; digits only, as some clouds count theirs.
    pub id: String,
    /// What was rented.
    pub stock: Stock,
    /// Name or label.
    pub name: String,
    /// Disk in GiB.
    pub disk_gib: u64,
    /// OpenSSH public key that may log in.
    pub public_key: Option<String>,
    /// What it bills.
    pub price: UsdPerHour,
    /// Where it is in its life.
    pub life: Life,
    /// A word to show as its status instead of the cloud's own, as if the cloud had invented a new
    /// one.
    pub odd_status: Option<String>,
    /// Where its SSH server listens once it runs.
    pub ssh: SshEndpoint,
    /// Unix seconds.
    pub created_at: u64,
    /// Unix seconds.
    pub ended_at: Option<u64>,
    /// How often the list was read since it was made, and since it ended.
    listings: u32,
    looks: u32,
}

impl FakeInstance {
    /// Whether it bills.
    pub fn is_live(&self) -> bool {
        self.life != Life::Ended
    }

    /// What it cost until now.
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
    /// Where its SSH server listens.
    pub ssh: SshEndpoint,
    /// Lives as long as the instance.
    pub machine: Box<dyn Any + Send>,
}

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// It is here, and nothing has happened.
    Arrived,
    /// What it asks for has happened, and nothing was said.
    Applied,
    /// The answer is on its way.
    Answered,
}

/// Hears of requests.
pub type Watch = Arc<dyn Fn(usize, Moment) + Send + Sync>;

/// Makes the machine behind an instance.
pub type Host = Arc<dyn Fn(&FakeInstance) -> Rented + Send + Sync>;

/// Everything a fake cloud knows. Tests read and change it freely.
pub struct World {
    /// Unix seconds; the bill follows it. Stands still unless a test moves it, or gives it a pace.
    pub now: u64,
    /// Seconds that pass with each request.
    pub pace: u64,
    /// What is rented out.
    pub stock: Vec<Stock>,
    /// All instances that ever were.
    pub instances: Vec<FakeInstance>,
    /// SSH keys of the account.
    pub keys: Vec<SshKey>,
    /// What is odd about an instance.
    pub odd: Option<Odd>,
    /// Every field that an instance was shown with.
    pub fields: BTreeMap<String, Value>,
    /// What will go wrong, first come first.
    pub faults: Vec<Fault>,
    /// All requests so far.
    pub requests: Vec<Request>,
    /// Most instances in one page of a listing, where a cloud has pages.
    pub page_size: usize,
    /// Listings end before the last page although more are announced, where a cloud announces
    /// ([`crate::Dialect::tells_totals`]).
    pub truncates: bool,
    /// Listings in which a new instance is not shown yet.
    pub shown_after: u32,
    /// Looks at an instance, listings included, before it runs.
    pub boots_after: u32,
    /// Listings and looks at which an ended instance is still shown.
    pub lingers: u32,
    /// Seconds by which its clock is ahead of this machine's, as the date of its answers tells.
    pub clock_ahead: i64,
    /// Whether the account can pay.
    pub funds: bool,
    /// Real machines instead of addresses of which nobody answers.
    pub host: Option<Host>,
    /// Is told of every request, by its number from 1 on, as it goes through the cloud.
    pub watch: Option<Watch>,
    machines: BTreeMap<String, Box<dyn Any + Send>>,
    made: u64,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").field("instances", &self.instances).field("keys", &self.keys).finish_non_exhaustive()
    }
}

impl Default for World {
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

impl World {
    /// Lets the next request of this kind go wrong before anything happens.
    pub fn fail(&mut self, on: Op, how: How) {
        self.faults.push(Fault { on, applied: false, how, times: 1 });
    }

    /// Lets the next request of this kind happen and only its answer go wrong.
    pub fn fail_after(&mut self, on: Op, how: How) {
        self.faults.push(Fault { on, applied: true, how, times: 1 });
    }

    /// Lets every request of this kind go wrong before anything happens.
    pub fn fail_always(&mut self, on: Op, how: How) {
        self.faults.push(Fault { on, applied: false, how, times: u32::MAX });
    }

    /// What is shown of instances: remembered, and with what is odd about them.
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

    /// How many requests of this kind there were.
    pub fn count(&self, op: Op) -> usize {
        self.requests.iter().filter(|request| request.op == Some(op)).count()
    }

    /// A number that no other instance or key of this world has.
    pub fn new_id(&mut self) -> String {
        self.made += 1;
        (70_000 + self.made).to_string()
    }

    /// The stock of this id.
    pub fn stock_of(&self, id: &str) -> Option<&Stock> {
        self.stock.iter().find(|stock| stock.id == id)
    }

    /// Rents, if some are left.
    ///
    /// # Errors
    /// [`Refusal::NotFound`] for an unknown stock, [`Refusal::NoCapacity`] for one that is sold out.
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
            life: Life::Booting,
            odd_status: None,
            // An address that is nobody's, RFC 5737.
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

    /// Puts an instance into the account as if somebody had rented it by other means.
    pub fn plant(&mut self, name: &str) -> String {
        let stock = self.stock.iter().find(|stock| stock.is_plain()).expect("there is something to rent").clone();
        let (price, stock) = (stock.price, stock.id);
        let order = Order { stock, name: name.to_owned(), disk_gib: 20, public_key: None, price };
        let id = self.rent(order).expect("it is left").id;
        // It has been there for long.
        self.change(&id, |instance| instance.listings = u32::MAX / 2);
        id
    }

    /// Changes the instance of this id, if there is one.
    pub fn change(&mut self, id: &str, change: impl FnOnce(&mut FakeInstance)) {
        if let Some(instance) = self.instances.iter_mut().find(|instance| instance.id == id) {
            change(instance);
        }
    }

    /// Ends an instance; whether there was a live one.
    pub fn end(&mut self, id: &str) -> bool {
        let now = self.now;
        let Some(instance) = self.instances.iter_mut().find(|instance| instance.id == id && instance.is_live()) else {
            return false;
        };
        instance.life = Life::Ended;
        instance.ended_at = Some(now);
        (instance.listings, instance.looks) = (0, 0);
        self.machines.remove(id);
        true
    }

    /// Instances that bill.
    pub fn live(&self) -> impl Iterator<Item = &FakeInstance> {
        self.instances.iter().filter(|instance| instance.is_live())
    }

    /// Counts a reading of the whole list; call it once per listing, with the first page.
    pub fn pass_listing(&mut self) {
        let boots_after = self.boots_after;
        for instance in &mut self.instances {
            instance.listings = instance.listings.saturating_add(1);
            look(instance, boots_after);
        }
    }

    /// What a listing shows now, oldest first.
    pub fn listed(&self) -> Vec<FakeInstance> {
        let shown = |instance: &&FakeInstance| match instance.life {
            Life::Ended => instance.looks <= self.lingers,
            _ => instance.listings > self.shown_after,
        };
        self.instances.iter().filter(shown).cloned().collect()
    }

    /// Looks at one instance; `None` when the cloud knows none.
    pub fn look_at(&mut self, id: &str) -> Option<FakeInstance> {
        let (boots_after, lingers) = (self.boots_after, self.lingers);
        let instance = self.instances.iter_mut().find(|instance| instance.id == id)?;
        look(instance, boots_after);
        Some(instance.clone()).filter(|instance| instance.is_live() || instance.looks <= lingers)
    }

    /// What everything cost until now.
    pub fn bill(&self) -> Usd {
        self.instances.iter().map(|instance| instance.cost(self.now)).sum()
    }
}

fn look(instance: &mut FakeInstance, boots_after: u32) {
    instance.looks = instance.looks.saturating_add(1);
    if instance.life == Life::Booting && instance.looks > boots_after {
        instance.life = Life::Running;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(world: &World, at: usize) -> Order {
        let stock = &world.stock[at];
        let (price, stock) = (stock.price, stock.id.clone());
        Order { stock, name: "x".to_owned(), disk_gib: 20, public_key: None, price }
    }

    #[test]
    fn bill_follows_the_clock_until_termination() {
        let mut world = World { now: 1000, ..World::default() };
        let id = world.rent(order(&world, 0)).unwrap().id;
        world.now += 3600;
        assert_eq!(world.bill(), Usd::from_dollars(1.89));
        assert!(world.end(&id));
        assert!(!world.end(&id));
        world.now += 3600;
        assert_eq!(world.bill(), Usd::from_dollars(1.89));
        assert_eq!(world.live().count(), 0);
    }

    #[test]
    fn sold_out_stock_is_not_rented() {
        let mut world = World::default();
        assert_eq!(world.rent(order(&world, 3)), Err(Refusal::NoCapacity));
        world.stock[0].left = 1;
        world.rent(order(&world, 0)).unwrap();
        assert_eq!(world.rent(order(&world, 0)), Err(Refusal::NoCapacity));
        assert_eq!(world.instances.len(), 1);
    }

    #[test]
    fn new_instance_is_listed_late_and_an_ended_one_longer() {
        let mut world = World { shown_after: 1, boots_after: 2, lingers: 1, ..World::default() };
        let id = world.rent(order(&world, 0)).unwrap().id;
        let shown = |world: &mut World| {
            world.pass_listing();
            world.listed().first().map(|instance| instance.life)
        };
        assert_eq!(shown(&mut world), None);
        assert_eq!(shown(&mut world), Some(Life::Booting));
        assert_eq!(world.look_at(&id).unwrap().life, Life::Running);
        world.end(&id);
        assert_eq!(shown(&mut world), Some(Life::Ended));
        assert_eq!(shown(&mut world), None);
        assert_eq!(world.look_at(&id), None);
    }
}
