//! Vast.ai: a market of private machines, rented in slices as Docker containers.
//!
//! Source: docs.vast.ai, API reference (search offers, create instance, show instances v1, show
//! instance, destroy instance, show user). Every path ends in a slash, as in the cloud's own
//! clients.

use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::wire::{self, GB, MIB, lenient};
use super::{
    Account, ApiAccess, Broker, BrokerError, BrokerErrorKind, Capabilities, CloudKind, GpuRequest, Instance,
    InstanceId, InstanceState, Lease, Offer, Offers, SshEndpoint, Tier,
};
use crate::cloud::http::{Call, Http, Idempotency, Method, Response};
use crate::host::transport::quote::quote;
use crate::text::clean;
use crate::units::{Bytes, CudaVersion, Usd, UsdPerHour};

/// Vast.ai's entry in the list of clouds.
pub const CLOUD: CloudKind = CloudKind {
    name: NAME,
    key_variable: "VAST_API_KEY",
    base_url: "https://console.vast.ai/api",
    image: "pytorch/pytorch:2.8.0-cuda12.8-cudnn9-devel",
    key_page: "https://cloud.vast.ai/manage-keys/",
    connect,
};

const NAME: &str = "vast";

/// Kinds of calls, and the minimum time between them. Refusals state intervals of 1 to 4.5 s, and
/// since late 2026 a time to wait (`Retry-After`).
const PACES: &[(&str, Duration)] = &[
    (SEARCH, Duration::from_secs(5)),
    (CREATE, Duration::from_secs(5)),
    (LIST, Duration::from_secs(2)),
    (GET, Duration::from_secs(3)),
    (DESTROY, Duration::from_secs(4)),
];
const SEARCH: &str = "search offers";
const CREATE: &str = "create instance";
const LIST: &str = "show instances";
const GET: &str = "show instance";
const DESTROY: &str = "destroy instance";

/// Code of a rate limit that waiting does not end: the account's quota of searches is used up.
const QUOTA_IS_USED_UP: &str = "search_quota_exceeded";

/// Maximum offers in a reply, which has no pages; an unrestricted search finds fewer.
const MAX_OFFERS: u32 = 3000;
/// Maximum instances per page.
const PAGE: usize = 25;
/// Maximum pages of a listing.
const MAX_PAGES: usize = 1000;
/// Minimum remaining time of a host's contract in seconds. A shorter one is not worth a start.
const SHORTEST_CONTRACT: u64 = 6 * 3600;
/// Minimum share of a GPU's nominal memory that drivers report
/// ([`crate::cloud::gpu::nominal_vram`]).
const REPORTED_OF_NOMINAL: f64 = 0.9;
/// How far a cloud's figure may lie below its rounded value here: CUDA versions and dollars.
const ROUNDING: (f64, f64) = (0.06, 1e-6);
/// Default disk of an instance in GB. The cloud's own default is 8.
const SMALLEST_DISK: u64 = 10;
/// Allowed bids, in dollars per hour.
const BIDS: std::ops::RangeInclusive<f64> = 0.001..=128.0;

fn connect(access: ApiAccess) -> Box<dyn Broker> {
    let http = access.http.final_when(&[QUOTA_IS_USED_UP]);
    let http = PACES.iter().fold(http, |http, (name, every)| http.paced(Some(name), *every));
    Box::new(Vast { http, image: access.image })
}

struct Vast {
    http: Http,
    image: String,
}

impl Vast {
    async fn search(&self, want: &GpuRequest, rental: RentalKind) -> Result<Vec<Value>, BrokerError> {
        let call = Call::new(Method::POST, "/v0/bundles/", Idempotency::Read).body(query(want, rental)).at_pace(SEARCH);
        let reply = granted(self.http.call(call).await?)?;
        Ok(reply.json::<Bundles>("a list of offers")?.offers)
    }

    /// One page of instances, after `token`.
    async fn page(&self, token: Option<&str>) -> Result<Page, BrokerError> {
        let call = Call::get("/v1/instances/").query("limit", PAGE).query("order_by", r#"[{"col":"id","dir":"asc"}]"#);
        let call = match token {
            Some(token) => call.query("after_token", token),
            None => call,
        };
        let reply = granted(self.http.call(call.at_pace(LIST)).await?)?;
        let page: Page = reply.json("a page of instances")?;
        if page.instances_found.is_some_and(|found| found != page.instances.len()) {
            return Err(reply.error(reply.unclear(), "a page of instances does not hold as many as it says"));
        }
        Ok(page)
    }

    fn number(&self, id: &InstanceId) -> Result<u64, BrokerError> {
        id.0.parse().map_err(|_| wire::no_id(&self.http, id))
    }

    /// Ends an instance that a failed creation left behind, since it bills its disk. The caller
    /// checks whether it is gone.
    async fn abandon(&self, reply: &Response, contract: u64) -> BrokerError {
        let became = match self.terminate(&InstanceId(contract.to_string())).await {
            Ok(()) => "was terminated".to_owned(),
            Err(error) => format!("could not be terminated: {}", error.message),
        };
        let message = format!("{}; instance {contract} was created nevertheless and {became}", reply.in_words());
        reply.error(BrokerErrorKind::Maybe, message)
    }
}

#[async_trait]
impl Broker for Vast {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { server_deadline: false, self_destruct: true, spot: true }
    }

    fn clock_skew(&self) -> Option<i64> {
        self.http.clock_skew()
    }

    async fn check(&self) -> Result<Account, BrokerError> {
        let reply = granted(self.http.call(Call::get("/v0/users/current/")).await?)?;
        let user: User = reply.json("an account")?;
        let who = user.email.or(user.username).map(|who| clean(who.as_bytes(), 100));
        // `credit` is the prepaid amount; `balance` is the debt beyond it.
        let balance = user.credit.or(user.balance).filter(|dollars| dollars.abs() < 1e9);
        Ok(Account { who, balance: balance.map(Usd::from_dollars) })
    }

    async fn offers(&self, want: &GpuRequest) -> Result<Offers, BrokerError> {
        let mut found: Vec<_> =
            self.search(want, RentalKind::OnDemand).await?.into_iter().map(|ask| (ask, false)).collect();
        if want.spot {
            found.extend(self.search(want, RentalKind::Bid).await?.into_iter().map(|ask| (ask, true)));
        }
        Ok(Offers::collect(found.into_iter().map(|(ask, spot)| offer(ask, spot))))
    }

    async fn create(&self, offer: &Offer, lease: &Lease) -> Result<Instance, BrokerError> {
        let key: OfferKey = wire::sku(&self.http, offer)?;
        let order = order(&key, lease, &self.image).map_err(|why| self.http.error(BrokerErrorKind::Rejected, why))?;
        let path = format!("/v0/asks/{}/", key.ask);
        let reply = self.http.call(Call::new(Method::PUT, path, Idempotency::Once).body(order).at_pace(CREATE)).await?;
        let value = reply.value();
        let says = |field: &str| value.as_ref().and_then(|value| value.get(field));
        let contract = says("new_contract").and_then(Value::as_u64);
        let refused = !reply.is_success() || says("success") == Some(&Value::Bool(false));
        match (refused, contract) {
            (false, Some(contract)) => Ok(wire::booting(contract.to_string(), offer, lease)),
            (true, Some(contract)) => Err(self.abandon(&reply, contract).await),
            (true, None) => Err(reply.refusal(kind_of(&reply))),
            (false, None) => {
                let message = format!("its answer names no instance: {}", clean(reply.body.as_bytes(), 120));
                Err(reply.error(BrokerErrorKind::Maybe, message))
            }
        }
    }

    async fn list(&self) -> Result<Vec<Instance>, BrokerError> {
        let mut contracts = Vec::new();
        let mut token: Option<String> = None;
        for _ in 0..MAX_PAGES {
            let page = self.page(token.as_deref()).await?;
            contracts.extend(page.instances);
            // Instances that start or end between two pages change the total. Missing entries do
            // not.
            match page.next_token.filter(|next| !next.is_empty()) {
                Some(next) if token.as_ref() != Some(&next) => token = Some(next),
                Some(_) => break,
                None if contracts.len() >= page.total_instances => {
                    return Ok(wire::entries(NAME, &contracts, |contract: Contract| Some(contract.into_instance())));
                }
                None => {
                    let message = format!("it lists {} of {} instances", contracts.len(), page.total_instances);
                    return Err(self.http.error(BrokerErrorKind::Unavailable, message));
                }
            }
        }
        Err(self.http.error(BrokerErrorKind::Unavailable, "its list of instances does not end"))
    }

    async fn get(&self, id: &InstanceId) -> Result<Option<Instance>, BrokerError> {
        let path = format!("/v0/instances/{}/", self.number(id)?);
        let reply = self.http.call(Call::get(path).at_pace(GET)).await?;
        if is_gone(&reply) {
            return Ok(None);
        }
        let reply = granted(reply)?;
        match reply.json::<Single>("an instance")?.instances {
            Some(contract) => {
                wire::alone(&reply, NAME, id, &contract, |contract: Contract| Some(contract.into_instance()))
            }
            None => Ok(None),
        }
    }

    async fn terminate(&self, id: &InstanceId) -> Result<(), BrokerError> {
        let path = format!("/v0/instances/{}/", self.number(id)?);
        let call = Call::new(Method::DELETE, path, Idempotency::Idempotent).body(json!({})).at_pace(DESTROY);
        let reply = self.http.call(call).await?;
        if is_gone(&reply) {
            return Ok(());
        }
        let reply = granted(reply)?;
        reply.json::<Destroyed>("a confirmation").map(drop)
    }

    async fn price_rise(&self, id: &InstanceId) -> Result<Option<String>, BrokerError> {
        let contract = self.number(id)?;
        let reply = granted(self.http.call(Call::get("/v0/instances/pending-price-increases/").at_pace(GET)).await?)?;
        let pending: PendingRises = reply.json("a list of prices that hosts ask for")?;
        let ours = |rise: &PriceRise| rise.contract_id == Some(contract);
        Ok(pending.pending_price_increases.iter().find(|rise| ours(rise)).map(PriceRise::in_words))
    }

    fn self_destruct(&self) -> Option<&'static str> {
        Some(SELF_DESTRUCT)
    }
}

/// Ends the instance that it runs in with the container's key, which allows only to start, stop
/// and destroy this instance. A session without the container's environment reads it from the
/// first process. The key is passed to programs on standard input or in the environment, since
/// command lines are visible.
const SELF_DESTRUCT: &str = r#"
of_container() { { tr '\0' '\n' </proc/1/environ | sed -n "s/^$1=//p" | head -n 1; } 2>/dev/null; }
id=${CONTAINER_ID:-$(of_container CONTAINER_ID)}
key=${CONTAINER_API_KEY:-$(of_container CONTAINER_API_KEY)}
case $id in ''|*[!0-9]*) echo 'this is no instance of vast.ai' >&2; exit 1 ;; esac
[ -n "$key" ] || { echo 'the instance has no key of its own' >&2; exit 1; }
url=https://console.vast.ai/api/v0/instances/$id/
if command -v curl >/dev/null 2>&1; then
  printf 'header = "Authorization: Bearer %s"\n' "$key" |
    curl --config - -fsS -o /dev/null -X DELETE --retry 5 --max-time 60 -H 'Content-Type: application/json' -d '{}' "$url"
else
  KEY=$key URL=$url python3 -c 'import os, urllib.request as r
h = {"Authorization": "Bearer " + os.environ["KEY"], "Content-Type": "application/json"}
r.urlopen(r.Request(os.environ["URL"], b"{}", h, method="DELETE"), timeout=60)'
fi
"#;

/// Kind of rental.
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase")]
enum RentalKind {
    OnDemand,
    Bid,
}

/// The search for `want`, never narrower than the market's filters. Filters that the cloud applies
/// differently, such as names and locations, are left to the market, which reports what it leaves
/// out.
fn query(want: &GpuRequest, rental: RentalKind) -> Value {
    let mut query = json!({
        "type": rental,
        "limit": MAX_OFFERS,
        "order": [["dph_total", "asc"], ["id", "asc"]],
        "allocated_storage": disk_of(want.min_disk.unwrap_or_default()),
        "rentable": {"eq": true},
        "rented": {"eq": false},
        "verified": {"eq": true},
        "external": {"eq": false},
        "direct_port_count": {"gte": 1},
        "duration": {"gte": SHORTEST_CONTRACT},
    });
    let mut only = |field: &str, operator: &str, value: Value| query[field] = json!({ operator: value });
    let mib = |bytes: Bytes| (bytes.0 as f64 / MIB as f64 * REPORTED_OF_NOMINAL).floor();
    if let Some(count) = Some(want.gpu_count.unwrap_or(1)).filter(|count| *count > 0) {
        only("num_gpus", "eq", count.into());
    }
    if let Some(vram) = want.min_vram {
        only("gpu_ram", "gte", mib(vram).into());
    }
    if let Some(ram) = want.min_cpu_ram {
        // The figure is for the whole machine, of which a slice has a part: a necessary condition
        // only.
        only("cpu_ram", "gte", mib(ram).into());
    }
    if let Some(disk) = want.min_disk {
        only("disk_space", "gte", disk_of(disk).into());
    }
    // A bid may be below the price.
    if let (Some(price), RentalKind::OnDemand) = (want.max_price, rental) {
        only("dph_total", "lte", (price.0.dollars() + ROUNDING.1).into());
    }
    if let Some(cuda) = want.min_cuda {
        only("cuda_max_good", "gte", (f64::from(cuda.major) + f64::from(cuda.minor) / 10.0 - ROUNDING.0).into());
    }
    if want.tier == Some(Tier::Secure) {
        only("datacenter", "eq", true.into());
    }
    query
}

/// Disk in GB, as searched and ordered. It cannot be changed later.
fn disk_of(wanted: Bytes) -> u64 {
    wanted.0.div_ceil(GB).max(SMALLEST_DISK)
}

#[derive(Deserialize)]
struct Bundles {
    /// Entries are parsed one by one, so that an unreadable one does not affect others.
    offers: Vec<Value>,
}

/// Parameters of an offer for `create`.
#[derive(Serialize, Deserialize)]
struct OfferKey {
    ask: u64,
    /// Bid in dollars per hour; `None`: on demand, at the machine's price.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bid: Option<f64>,
}

/// An offer in the cloud's format.
#[derive(Deserialize)]
struct Ask {
    id: u64,
    gpu_name: String,
    num_gpus: u32,
    dph_total: f64,
    #[serde(default, deserialize_with = "lenient")]
    dph_base: Option<f64>,
    #[serde(default, deserialize_with = "lenient")]
    min_bid: Option<f64>,
    /// MiB per GPU.
    #[serde(default, deserialize_with = "lenient")]
    gpu_ram: Option<f64>,
    /// MiB of the whole machine, as its cores.
    #[serde(default, deserialize_with = "lenient")]
    cpu_ram: Option<f64>,
    #[serde(default, deserialize_with = "lenient")]
    cpu_cores: Option<f64>,
    /// Cores of the rented slice.
    #[serde(default, deserialize_with = "lenient")]
    cpu_cores_effective: Option<f64>,
    /// In GB.
    #[serde(default, deserialize_with = "lenient")]
    disk_space: Option<f64>,
    /// Megabits per second.
    #[serde(default, deserialize_with = "lenient")]
    inet_down: Option<f64>,
    #[serde(default, deserialize_with = "lenient")]
    cuda_max_good: Option<f64>,
    /// Seconds until the host's contract ends.
    #[serde(default, deserialize_with = "lenient")]
    duration: Option<f64>,
    /// Compute capability times 100.
    #[serde(default, deserialize_with = "lenient")]
    compute_cap: Option<u32>,
    /// `amd64` or `arm64`.
    #[serde(default, deserialize_with = "lenient")]
    cpu_arch: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    machine_id: Option<u64>,
    /// 0: private machine; above 0: data centre.
    #[serde(default, deserialize_with = "lenient")]
    hosting_type: Option<u32>,
    #[serde(default, deserialize_with = "lenient")]
    geolocation: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    rentable: Option<bool>,
    #[serde(default, deserialize_with = "lenient")]
    rented: Option<bool>,
}

fn offer(ask: Value, spot: bool) -> Result<Offer, String> {
    let ask: Ask = serde_json::from_value(ask).map_err(|_| "not readable")?;
    if ask.rentable == Some(false) || ask.rented == Some(true) {
        return Err("rented already".to_owned());
    }
    if ask.duration.is_some_and(|seconds| seconds < SHORTEST_CONTRACT as f64) {
        return Err(format!("the host's contract ends within {} hours", SHORTEST_CONTRACT / 3600));
    }
    if ask.num_gpus == 0 {
        return Err("no GPU".to_owned());
    }
    // Disk is reserved in whole gigabytes.
    let disk = ask.disk_space.map(f64::floor);
    if disk.is_some_and(|gb| gb < SMALLEST_DISK as f64) {
        return Err(format!("less than {SMALLEST_DISK} GB of disk"));
    }
    let bid = if spot { Some(ask.bid().ok_or("no bid is possible")?) } else { None };
    let price = ask.price(bid).ok_or("no price that can be")?;
    let key = serde_json::to_string(&OfferKey { ask: ask.id, bid }).map_err(|error| error.to_string())?;
    let reported = ask.gpu_ram.and_then(|mib| wire::size(mib, MIB));
    let offer = Offer::new(NAME, key, ask.num_gpus, price).with_gpu(&clean(ask.gpu_name.as_bytes(), 60), reported);
    Ok(Offer {
        capability: ask.capability().or(offer.capability),
        arm: ask.cpu_arch.as_deref().is_some_and(|arch| arch.starts_with("arm") || arch == "aarch64") || offer.arm,
        cpu_ram: ask.slice_of_ram(),
        cpu_cores: ask.cpu_cores_effective.filter(|cores| (1.0..1e5).contains(cores)).map(|cores| cores as u32),
        disk: disk.and_then(|gb| wire::size(gb, GB)),
        region: ask.geolocation.map(|place| clean(place.as_bytes(), 60)).filter(|place| !place.is_empty()),
        tier: ask.hosting_type.map(|kind| if kind == 0 { Tier::Community } else { Tier::Secure }),
        spot,
        max_cuda: ask.cuda_max_good.filter(|version| (1.0..100.0).contains(version)).and_then(cuda),
        download: ask.inet_down.and_then(|megabits| wire::size(megabits, 125_000)),
        machine: ask.machine_id.map(|id| id.to_string()),
        ..offer
    })
}

impl Ask {
    /// The minimum bid for the whole machine, rounded up to the cloud's billing unit.
    fn bid(&self) -> Option<f64> {
        self.min_bid.map(|least| (least * 1e4).ceil() / 1e4).filter(|bid| BIDS.contains(bid))
    }

    /// Price of all GPUs and the requested disk. A bid covers the GPUs only.
    fn price(&self, bid: Option<f64>) -> Option<UsdPerHour> {
        let Some(bid) = bid else { return wire::price(self.dph_total) };
        let disk = self.dph_base.map_or(0.0, |base| (self.dph_total - base).max(0.0));
        wire::price(bid + disk)
    }

    fn capability(&self) -> Option<u32> {
        self.compute_cap.filter(|cap| (100..10_000).contains(cap)).map(|cap| cap / 10)
    }

    fn slice_of_ram(&self) -> Option<Bytes> {
        let (all, cores) = (self.cpu_ram?, self.cpu_cores?);
        let part = self.cpu_cores_effective? / cores;
        wire::size(all * part.min(1.0), MIB)
    }
}

fn cuda(version: f64) -> Option<CudaVersion> {
    format!("{version:.1}").parse().ok()
}

/// The order for an instance. A `price` in it would make it interruptible by higher bids.
fn order(key: &OfferKey, lease: &Lease, image: &str) -> Result<Value, String> {
    let authorized = lease.ssh_public_key.trim();
    if authorized.is_empty() || authorized.chars().any(char::is_control) {
        return Err("the SSH public key is not one line".to_owned());
    }
    let mut order = json!({
        "client_id": "me",
        "image": image,
        "disk": disk_of(lease.disk),
        "label": lease.tag.to_string(),
        "runtype": "ssh_direct",
        "onstart": on_start(authorized),
        "target_state": "running",
        // Fails instead of creating a stopped instance that waits for its GPUs.
        "cancel_unavail": true,
    });
    if let Some(bid) = key.bid {
        order["price"] = bid.into();
    }
    Ok(order)
}

/// Runs in the container at every start: authorises the lease's key, beside the account's, and
/// gives SSH sessions the container's environment, which they need to end it.
fn on_start(authorized: &str) -> String {
    let key = quote(authorized);
    format!(
        "umask 077; mkdir -p /root/.ssh; cd /root/.ssh; touch authorized_keys; \
         grep -qxF -e {key} authorized_keys || printf '\\n%s\\n' {key} >> authorized_keys; env >> /etc/environment"
    )
}

#[derive(Deserialize)]
struct User {
    email: Option<String>,
    username: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    credit: Option<f64>,
    #[serde(default, deserialize_with = "lenient")]
    balance: Option<f64>,
}

#[derive(Deserialize)]
struct Page {
    /// Entries are parsed one by one.
    instances: Vec<Value>,
    /// Number on this page.
    instances_found: Option<usize>,
    /// Number on all pages.
    total_instances: usize,
    next_token: Option<String>,
}

#[derive(Deserialize)]
struct Single {
    /// A single instance despite the name; null if there is none. A missing key makes the answer
    /// invalid.
    #[serde(deserialize_with = "Option::deserialize")]
    instances: Option<Value>,
}

#[derive(Deserialize)]
struct Destroyed {
    #[expect(dead_code, reason = "that it is there makes the answer a confirmation")]
    success: bool,
}

#[derive(Deserialize)]
struct PendingRises {
    pending_price_increases: Vec<PriceRise>,
}

/// The price that a host demands to extend a contract. Until it is accepted, the old price holds
/// and the contract is not extended.
#[derive(Deserialize)]
struct PriceRise {
    #[serde(default, deserialize_with = "lenient")]
    contract_id: Option<u64>,
    /// Dollars per second, as the new price.
    #[serde(default, deserialize_with = "lenient")]
    old_gpu_costpersec: Option<f64>,
    #[serde(default, deserialize_with = "lenient")]
    new_gpu_costpersec: Option<f64>,
}

impl PriceRise {
    fn in_words(&self) -> String {
        let hourly = |second: Option<f64>| second.and_then(|dollars| wire::price(dollars * 3600.0));
        match (hourly(self.old_gpu_costpersec), hourly(self.new_gpu_costpersec)) {
            (Some(old), Some(new)) => format!("{new} for its GPUs instead of {old}"),
            _ => "another price than was agreed".to_owned(),
        }
    }
}

/// An instance in the cloud's format.
#[derive(Deserialize)]
struct Contract {
    #[serde(deserialize_with = "wire::id")]
    id: String,
    label: Option<String>,
    #[serde(default, deserialize_with = "wire::word")]
    actual_status: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    intended_status: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    cur_state: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    next_state: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    status_msg: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    gpu_name: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    num_gpus: Option<u32>,
    #[serde(default, deserialize_with = "lenient")]
    gpu_ram: Option<f64>,
    #[serde(default, deserialize_with = "lenient")]
    dph_total: Option<f64>,
    #[serde(default, deserialize_with = "lenient")]
    start_date: Option<f64>,
    #[serde(default, deserialize_with = "lenient")]
    public_ipaddr: Option<String>,
    /// Docker's port mapping, once the container runs.
    #[serde(default, deserialize_with = "lenient")]
    ports: Option<Value>,
    #[serde(default, deserialize_with = "lenient")]
    ssh_host: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    ssh_port: Option<u16>,
}

impl Contract {
    fn into_instance(self) -> Instance {
        let state = self.state();
        let gpus = clean(self.gpu_name.unwrap_or_default().as_bytes(), 60);
        let vram = self.gpu_ram.and_then(|mib| wire::size(mib, MIB));
        Instance {
            price: self.dph_total.and_then(wire::price),
            hardware: wire::hardware(self.num_gpus.unwrap_or(1), &gpus, vram),
            created_at: self.start_date.filter(|seconds| (0.0..1e11).contains(seconds)).map(|seconds| seconds as u64),
            ..Instance::new(NAME, self.id, self.label.unwrap_or_default(), state)
        }
    }

    fn state(&self) -> InstanceState {
        match self.actual_status.as_deref() {
            // It never ran, and will not be started.
            None | Some("" | "created" | "loading") if self.is_given_up() => {
                InstanceState::Failed(self.words("it could not be started, or was outbid"))
            }
            Some("created") if self.status_msg.as_deref().is_some_and(|words| words.contains("Error")) => {
                InstanceState::Failed(self.words("it was created and does not start"))
            }
            None | Some("" | "created" | "loading" | "rebooting") => InstanceState::Booting,
            Some("running") => self.endpoint().map_or(InstanceState::Booting, InstanceState::Ready),
            Some("stopped" | "frozen") => InstanceState::Stopped,
            // Instances do not recover from these states.
            Some(lost @ ("exited" | "offline" | "unknown")) => InstanceState::Failed(self.words(lost)),
            Some(other) => InstanceState::Unknown(clean(other.as_bytes(), 60)),
        }
    }

    fn is_given_up(&self) -> bool {
        [&self.cur_state, &self.intended_status, &self.next_state].iter().all(|word| word.as_deref() == Some("stopped"))
    }

    fn words(&self, what: &str) -> String {
        match self.status_msg.as_deref().map(|words| clean(words.as_bytes(), 300)).filter(|words| !words.is_empty()) {
            Some(words) => format!("{what}: {words}"),
            None => what.to_owned(),
        }
    }

    /// The host's port if it has one, else the cloud's relay, the only access to some hosts.
    fn endpoint(&self) -> Option<SshEndpoint> {
        self.direct().or_else(|| wire::endpoint("root", self.ssh_host.as_deref()?.trim(), self.ssh_port?))
    }

    fn direct(&self) -> Option<SshEndpoint> {
        let port = self.ports.as_ref()?.get("22/tcp")?.get(0)?.get("HostPort")?;
        let port = port.as_str().map_or_else(|| port.as_u64()?.try_into().ok(), |text| text.parse().ok())?;
        wire::endpoint("root", self.public_ipaddr.as_deref()?.trim(), port)
    }
}

/// The reply, unless it is a refusal, which may have status 200.
fn granted(reply: Response) -> Result<Response, BrokerError> {
    let failed = reply.value().is_some_and(|value| value.get("success") == Some(&Value::Bool(false)));
    if reply.is_success() && !failed {
        return Ok(reply);
    }
    if reply.body.contains(QUOTA_IS_USED_UP) {
        let message =
            format!("the account's quota of searches is used up, and was not asked again ({})", reply.in_words());
        return Err(reply.error(BrokerErrorKind::Budget, message));
    }
    Err(reply.refusal(kind_of(&reply)))
}

/// Whether the API reports that the instance does not exist. An error page of a proxy does not
/// count.
fn is_gone(reply: &Response) -> bool {
    let code = reply.value().and_then(|value| Some(value.get("error")?.as_str()?.to_owned()));
    matches!(code.as_deref(), Some("not_found" | "no_such_instance")) && kind_of(reply) != BrokerErrorKind::Auth
}

/// Kind of a refusal. The message has priority over the status: searches answer a bad key with
/// 404, and a missing offer is 404, 410 or 200.
fn kind_of(reply: &Response) -> BrokerErrorKind {
    let words = reply.in_words().to_lowercase();
    let says = |any: &[&str]| any.iter().any(|phrase| words.contains(phrase));
    match reply.status {
        _ if says(&["auth_error", "invalid user key"]) => BrokerErrorKind::Auth,
        _ if says(&["insufficient_credit", "insufficient credit", "lacks credit"]) => BrokerErrorKind::Budget,
        _ if says(&["no_such_ask"]) => BrokerErrorKind::NoCapacity,
        401 | 403 => BrokerErrorKind::Auth,
        402 => BrokerErrorKind::Budget,
        404 => BrokerErrorKind::NotFound,
        410 => BrokerErrorKind::NoCapacity,
        300..=399 | 408 => reply.unclear(),
        _ => BrokerErrorKind::Rejected,
    }
}

#[cfg(test)]
mod tests;
