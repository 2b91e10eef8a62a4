//! Prime Intellect: a market of some two dozen clouds.
//!
//! Source: docs.primeintellect.ai, API reference (availability/gpus, pods, ssh_keys). Paths of
//! collections end in a slash, those of members do not. The server redirects other paths, and a
//! redirected creation is not executed.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::wire::{self, GB, GIB, lenient};
use super::{
    Account, ApiAccess, Broker, BrokerError, BrokerErrorKind, Capabilities, CloudKind, Dropped, GpuRequest, Instance,
    InstanceId, InstanceState, Lease, LeaseTag, Offer, Offers, SshEndpoint, Tier,
};
use crate::calendar::from_rfc3339;
use crate::cloud::http::{Call, Http, Idempotency, Method, Response};
use crate::text::clean;
use crate::units::{Bytes, UsdPerHour};

/// Prime Intellect's entry in the list of clouds.
pub const CLOUD: CloudKind = CloudKind {
    name: NAME,
    key_variable: "PRIME_API_KEY",
    base_url: "https://api.primeintellect.ai/api/v1",
    // The name of an environment in an offer, not of a registry image.
    image: "ubuntu_22_cuda_12",
    key_page: "https://app.primeintellect.ai/dashboard/tokens",
    connect,
};

const NAME: &str = "prime";

/// Minimum time between calls. Undocumented; other clients poll at about this rate.
const PACE: Duration = Duration::from_secs(1);
/// Items per page, the maximum for offers.
const PAGE: usize = 100;
/// Maximum pages of a listing.
const MAX_PAGES: usize = 200;
/// How often a listing that changes while it is read is restarted.
const MAX_READINGS: usize = 4;
/// Maximum GPUs of a machine. Offers with more are for several machines.
const GPUS_OF_A_MACHINE: u32 = 8;

fn connect(access: ApiAccess) -> Box<dyn Broker> {
    Box::new(Prime { http: access.http.paced(None, PACE), image: access.image })
}

struct Prime {
    http: Http,
    image: String,
}

impl Prime {
    /// All items of a collection.
    async fn all<T: DeserializeOwned>(&self, path: &str) -> Result<Vec<T>, BrokerError> {
        for _ in 0..MAX_READINGS {
            if let Some(items) = self.read_once(path).await? {
                return Ok(items);
            }
        }
        Err(self.http.error(BrokerErrorKind::Unavailable, format!("{path} changes faster than it can be read")))
    }

    /// All items; `None` if the collection changed meanwhile. Pages are counted from its
    /// beginning, so a removed item shifts the next page.
    async fn read_once<T: DeserializeOwned>(&self, path: &str) -> Result<Option<Vec<T>>, BrokerError> {
        let mut items: Vec<T> = Vec::new();
        let mut announced = None;
        for _ in 0..MAX_PAGES {
            let call = Call::get(path).query("offset", items.len()).query("limit", PAGE);
            let page: Page<T> = self.http.call(call).await?.granted(kind_of)?.json("a page of a list")?;
            let total = *announced.get_or_insert(page.total_count);
            if total != page.total_count {
                return Ok(None);
            }
            let is_last = page.data.is_empty();
            items.extend(page.data);
            if items.len() >= total {
                return Ok(Some(items));
            }
            if is_last {
                let message = format!("{path} lists {} of {total}", items.len());
                return Err(self.http.error(BrokerErrorKind::Unavailable, message));
            }
        }
        Err(self.http.error(BrokerErrorKind::Unavailable, format!("{path} does not end")))
    }

    /// Authorises the lease's key under the lease's name.
    async fn register(&self, lease: &Lease) -> Result<String, BrokerError> {
        let name = lease.tag.to_string();
        let body = json!({"name": name, "publicKey": lease.ssh_public_key.trim()});
        // A repeated registration under a unique name is harmless: both are removed with the
        // instance.
        let reply = self.http.call(Call::new(Method::POST, "/ssh_keys/", Idempotency::Idempotent).body(body)).await?;
        if reply.is_success() {
            return Ok(reply.json::<SshKey>("an SSH key")?.id);
        }
        // Refused because an earlier attempt, whose answer was lost, registered it.
        let known = self.all::<SshKey>("/ssh_keys/").await.unwrap_or_default();
        match known.into_iter().find(|key| key.name == name) {
            Some(key) => Ok(key.id),
            None => Err(reply.refusal(kind_of(&reply))),
        }
    }

    /// Removes keys from the account: that of `tag`, and expired ones of this program. Failures
    /// are logged and retried on the next call.
    async fn sweep_keys(&self, tag: Option<&LeaseTag>) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let is_over =
            |key: &SshKey| key.name.parse().is_ok_and(|of_key: LeaseTag| Some(&of_key) == tag || of_key.deadline < now);
        let keys: Vec<SshKey> = match self.all("/ssh_keys/").await {
            Ok(keys) => keys,
            Err(error) => return tracing::warn!("{error}: keys of former instances stay in the account"),
        };
        for key in keys.iter().filter(|key| is_over(key)) {
            let Some(id) = wire::segment(&key.id) else { continue };
            let call = Call::new(Method::DELETE, format!("/ssh_keys/{id}"), Idempotency::Idempotent);
            let removed = self.http.call(call).await;
            if let Err(error) =
                removed.and_then(|reply| if is_gone(&reply) { Ok(reply) } else { reply.granted(kind_of) })
            {
                tracing::warn!("{error}: the key {} stays in the account", key.name);
            }
        }
    }

    fn path_of(&self, id: &InstanceId) -> Result<String, BrokerError> {
        Ok(format!("/pods/{}", wire::id_segment(&self.http, id)?))
    }
}

#[async_trait]
impl Broker for Prime {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { server_deadline: false, self_destruct: false, spot: true }
    }

    fn clock_skew(&self) -> Option<i64> {
        self.http.clock_skew()
    }

    async fn check(&self) -> Result<Account, BrokerError> {
        let reply = self.http.call(Call::get("/pods/").query("offset", 0).query("limit", 1)).await?.granted(kind_of)?;
        reply.json::<Page<Value>>("a page of a list")?;
        // The answer does not state the account's name or balance.
        Ok(Account::default())
    }

    async fn offers(&self, want: &GpuRequest) -> Result<Offers, BrokerError> {
        let mut items = Vec::new();
        let mut announced = 0;
        for page in 1..=MAX_PAGES {
            let reply = self.http.call(search(want, page)).await?.granted(kind_of)?;
            let found: Availability = reply.json("a page of offers")?;
            let is_last = found.items.is_empty();
            announced = found.total_count;
            items.extend(found.items);
            if is_last || items.len() >= announced {
                break;
            }
        }
        let missing = announced.saturating_sub(items.len());
        let mut offers = Offers::collect(items.into_iter().map(|item| offer(item, want, &self.image)));
        if missing > 0 {
            offers.dropped.push(Dropped { reason: "announced, but on no page".to_owned(), count: missing });
        }
        Ok(offers)
    }

    async fn create(&self, offer: &Offer, lease: &Lease) -> Result<Instance, BrokerError> {
        let sku: Sku = wire::sku(&self.http, offer)?;
        let key = self.register(lease).await?;
        let order = order(&sku, offer.price, lease, &key);
        let call = Call::new(Method::POST, "/pods/", Idempotency::Once).body(order);
        let created = match self.http.call(call).await.and_then(|reply| reply.granted(kind_of)) {
            Ok(reply) => reply.json::<Pod>("an instance").map(Pod::into_instance),
            Err(error) => Err(error),
        };
        if created.as_ref().is_err_and(|error| error.kind != BrokerErrorKind::Maybe) {
            self.sweep_keys(Some(&lease.tag)).await;
        }
        created
    }

    async fn list(&self) -> Result<Vec<Instance>, BrokerError> {
        let pods: Vec<Value> = self.all("/pods/").await?;
        Ok(wire::entries(NAME, &pods, Pod::live))
    }

    async fn get(&self, id: &InstanceId) -> Result<Option<Instance>, BrokerError> {
        let reply = self.http.call(Call::get(self.path_of(id)?)).await?;
        if is_gone(&reply) {
            return Ok(None);
        }
        let reply = reply.granted(kind_of)?;
        let pod: Value = reply.json("an instance")?;
        wire::alone(&reply, NAME, id, &pod, Pod::live)
    }

    async fn terminate(&self, id: &InstanceId) -> Result<(), BrokerError> {
        let path = self.path_of(id)?;
        // The instance has its key's name. Answers about deleted instances have no name. Failing
        // to find the name must not keep the instance running.
        let tag = self.get(id).await.ok().flatten().and_then(|instance| instance.tag());
        let reply = self.http.call(Call::new(Method::DELETE, path, Idempotency::Idempotent)).await?;
        if !is_gone(&reply) {
            reply.granted(kind_of)?.json::<Deleted>("a confirmation")?;
        }
        self.sweep_keys(tag.as_ref()).await;
        Ok(())
    }
}

fn search(want: &GpuRequest, page: usize) -> Call {
    let mut call = Call::get("/availability/gpus").query("page", page).query("page_size", PAGE);
    if let Some(count) = Some(want.gpu_count.unwrap_or(1)).filter(|count| *count > 0) {
        call = call.query("gpu_count", count);
    }
    match want.tier {
        Some(Tier::Secure) => call.query("security", SECURE),
        Some(Tier::Community) => call.query("security", COMMUNITY),
        None => call,
    }
}

const SECURE: &str = "secure_cloud";
const COMMUNITY: &str = "community_cloud";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Availability {
    /// Items are parsed one by one, so that an unreadable one does not affect others.
    items: Vec<Value>,
    total_count: usize,
}

/// An offer in the cloud's format.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Item {
    #[serde(flatten)]
    place: OfferKey,
    /// GB of each GPU.
    gpu_memory: Option<f64>,
    region: Option<String>,
    vcpu: Option<Range>,
    disk: Option<Range>,
    memory: Option<Range>,
    stock_status: Option<String>,
    prices: Prices,
    #[serde(default)]
    images: Vec<String>,
    is_spot: Option<bool>,
    prepaid_time: Option<f64>,
}

/// Identifies an offer. The id of a machine type is shared by many offers, so the order contains
/// the other fields, too.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OfferKey {
    /// Opaque; may contain spaces.
    cloud_id: String,
    gpu_type: String,
    socket: String,
    gpu_count: u32,
    provider: String,
    data_center: Option<String>,
    country: Option<String>,
    security: Option<String>,
}

/// Parameters of an offer for `create`.
#[derive(Serialize, Deserialize)]
struct Sku {
    #[serde(flatten)]
    place: OfferKey,
    image: String,
    disk: Range,
    memory: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Prices {
    on_demand: Option<f64>,
    community_price: Option<f64>,
    currency: String,
}

/// Available amounts of a resource, and their price.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Range {
    /// Amount included in the offer's price.
    default_count: Option<u64>,
    max_count: Option<u64>,
    /// Dollars per hour for each additional unit.
    price_per_unit: Option<f64>,
    step: Option<u64>,
}

/// Amount taken of a [`Range`].
#[derive(Debug, PartialEq)]
struct Taken {
    /// Amount stated in the order; `None`: it is fixed.
    ordered: Option<u64>,
    /// Dollars per hour in addition to the offer's price.
    extra: f64,
}

impl Range {
    /// The wanted amount, or as much as is available.
    fn take(self, wanted: u64) -> Taken {
        let default = self.default_count.unwrap_or(0);
        let (Some(most), Some(each)) = (self.max_count, self.price_per_unit) else {
            return Taken { ordered: None, extra: 0.0 };
        };
        let beyond = wanted.saturating_sub(default).next_multiple_of(self.step.unwrap_or(1).max(1));
        let ordered = default.saturating_add(beyond).min(most.max(default));
        // Prices contain the default amount, whatever the flag says.
        Taken { ordered: Some(ordered), extra: (ordered - default) as f64 * each }
    }

    /// The maximum available amount.
    fn most(self) -> Option<u64> {
        self.max_count.filter(|_| self.price_per_unit.is_some()).max(self.default_count)
    }
}

fn offer(item: Value, want: &GpuRequest, image: &str) -> Result<Offer, String> {
    let gpu_type = item.get("gpuType").and_then(Value::as_str);
    if gpu_type == Some("CPU_NODE") {
        return Err("no GPU".to_owned());
    }
    let item: Item = serde_json::from_value(item).map_err(|_| "not readable")?;
    item.refuse(want)?;
    let image = item.image(image).ok_or("no image with CUDA")?.to_owned();
    let (disk, memory) = (item.disk.unwrap_or_default(), item.memory.unwrap_or_default());
    // Machines report less memory than is installed: 125 and 251 GiB mean 128 and 256.
    let ram = memory.take(want.min_cpu_ram.map_or(0, |wanted| wanted.0.div_ceil(GIB)));
    let extra = disk.take(disk_of(want.min_disk.unwrap_or_default())).extra + ram.extra;
    let base = item.prices.on_demand.or(item.prices.community_price).filter(|_| extra >= 0.0);
    let price = base.and_then(|base| wire::price(base).and(wire::price(base + extra))).ok_or("no price that can be")?;
    let reported = item.gpu_memory.and_then(|gb| wire::size(gb, GIB));
    let (raw, count) =
        (clean(format!("{} {}", item.place.gpu_type, item.place.socket).as_bytes(), 60), item.place.gpu_count);
    let tier = item.tier();
    let region = item.region_in_words();
    let sku = Sku { place: item.place, image, disk, memory: ram.ordered };
    let key = serde_json::to_string(&sku).map_err(|error| error.to_string())?;
    let offer = Offer::new(NAME, key, count, price).with_gpu(&raw, reported);
    Ok(Offer {
        cpu_ram: ram.ordered.or(memory.default_count).and_then(|gib| wire::size(gib as f64, GIB)),
        cpu_cores: item.vcpu.and_then(|cores| cores.default_count).and_then(|cores| u32::try_from(cores).ok()),
        disk: disk.most().and_then(|gb| wire::size(gb as f64, GB)),
        region,
        tier,
        spot: item.is_spot == Some(true),
        ..offer
    })
}

impl Item {
    /// Why the offer cannot be compared; an error with the reason.
    fn refuse(&self, want: &GpuRequest) -> Result<(), String> {
        let reason = match &self.prices.currency {
            currency if currency != "USD" => format!("priced in {}", clean(currency.as_bytes(), 10)),
            _ if self.prepaid_time.is_some_and(|hours| hours > 0.0) => "paid in advance".to_owned(),
            _ if self.stock_status.as_deref() == Some("Unavailable") => "not in stock".to_owned(),
            _ if self.is_spot == Some(true) && !want.spot => "can be taken back at any time".to_owned(),
            _ if self.place.gpu_count == 0 => "no GPU".to_owned(),
            _ if self.place.gpu_count > GPUS_OF_A_MACHINE => "several machines".to_owned(),
            _ => return Ok(()),
        };
        Err(reason)
    }

    /// The preferred image, else any with a CUDA of the same generation, else any with CUDA.
    fn image(&self, preferred: &str) -> Option<&str> {
        let first = |fits: &dyn Fn(&str) -> bool| self.images.iter().map(String::as_str).find(|image| fits(image));
        first(&|image| image == preferred)
            .or_else(|| first(&|image| image.starts_with("cuda_12_")))
            .or_else(|| first(&|image| image.starts_with("cuda_")))
    }

    fn tier(&self) -> Option<Tier> {
        match self.place.security.as_deref() {
            Some(SECURE) => Some(Tier::Secure),
            Some(COMMUNITY) => Some(Tier::Community),
            _ => None,
        }
    }

    /// `united_states, US, US-KS-2 (runpod)`, as far as stated.
    fn region_in_words(&self) -> Option<String> {
        let parts = [&self.region, &self.place.country, &self.place.data_center];
        let parts: Vec<&str> = parts.into_iter().filter_map(Option::as_deref).filter(|part| !part.is_empty()).collect();
        let words = format!("{} ({})", parts.join(", "), self.place.provider);
        Some(clean(words.trim_start().as_bytes(), 80))
    }
}

/// Disk to reserve in GB.
fn disk_of(wanted: Bytes) -> u64 {
    wanted.0.div_ceil(GB)
}

fn order(sku: &Sku, price: UsdPerHour, lease: &Lease, key: &str) -> Value {
    let place = &sku.place;
    let mut pod = json!({
        "name": lease.tag.to_string(),
        "cloudId": place.cloud_id,
        "gpuType": place.gpu_type,
        "socket": place.socket,
        "gpuCount": place.gpu_count,
        "image": sku.image,
        // Rounded up to the cent: the current price and no more.
        "maxPrice": (price.0.dollars() * 100.0 - 1e-6).ceil() / 100.0,
        "sshKeyId": key,
        "autoRestart": false,
    });
    let mut name = |field: &str, value: Option<Value>| {
        if let Some(value) = value {
            pod[field] = value;
        }
    };
    name("dataCenterId", place.data_center.as_deref().map(Value::from));
    name("country", place.country.as_deref().map(Value::from));
    name("security", place.security.as_deref().map(Value::from));
    name("diskSize", sku.disk.take(disk_of(lease.disk)).ordered.map(Value::from));
    name("memory", sku.memory.map(Value::from));
    json!({"pod": pod, "provider": {"type": place.provider}})
}

#[derive(Deserialize)]
struct Page<T> {
    data: Vec<T>,
    total_count: usize,
}

#[derive(Deserialize)]
struct Deleted {
    #[expect(dead_code, reason = "that it is there makes the answer a confirmation")]
    status: String,
}

#[derive(Deserialize)]
struct SshKey {
    id: String,
    #[serde(default)]
    name: String,
}

/// An instance in the cloud's format.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Pod {
    #[serde(deserialize_with = "wire::id")]
    id: String,
    name: String,
    #[serde(default, deserialize_with = "wire::word")]
    status: Option<String>,
    #[serde(default, deserialize_with = "wire::word")]
    installation_status: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    installation_failure: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    created_at: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    gpu_name: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    gpu_count: Option<u32>,
    #[serde(default, deserialize_with = "lenient")]
    price_hr: Option<f64>,
    #[serde(default, deserialize_with = "lenient")]
    stopped_price_hr: Option<f64>,
    /// A string, a list of strings and nulls, or null.
    ssh_connection: Option<Value>,
}

impl Pod {
    /// Whether the instance is in the history, even if a list still shows it.
    fn is_over(&self) -> bool {
        self.status.as_deref() == Some("TERMINATED")
    }

    /// The instance; `None` if it has ended.
    fn live(self) -> Option<Instance> {
        (!self.is_over()).then(|| self.into_instance())
    }

    fn into_instance(self) -> Instance {
        let state = self.state();
        // A stopped instance without a price costs its usual price.
        let price =
            if state == InstanceState::Stopped { self.stopped_price_hr.or(self.price_hr) } else { self.price_hr };
        let gpus = self.gpu_name.unwrap_or_default();
        Instance {
            hardware: wire::hardware(self.gpu_count.unwrap_or(1), &clean(gpus.as_bytes(), 60), None),
            price: price.and_then(wire::price),
            created_at: self.created_at.as_deref().and_then(from_rfc3339),
            ..Instance::new(NAME, self.id, self.name, state)
        }
    }

    fn state(&self) -> InstanceState {
        let failed = |what: &str| {
            let why = self.installation_failure.as_deref().map(|words| clean(words.as_bytes(), 300));
            InstanceState::Failed(
                why.filter(|words| !words.is_empty()).map_or(what.to_owned(), |why| format!("{what}: {why}")),
            )
        };
        match (self.status.as_deref().unwrap_or_default(), self.installation_status.as_deref()) {
            ("ERROR", _) => failed("it could not be started"),
            ("PROVISIONING" | "PENDING" | "ACTIVE", Some("ERROR" | "TERMINATED")) => failed("its installation failed"),
            // The address may come later than the state.
            ("ACTIVE", Some("FINISHED")) => self.endpoint().map_or(InstanceState::Booting, InstanceState::Ready),
            ("PROVISIONING" | "PENDING" | "ACTIVE", _) => InstanceState::Booting,
            ("STOPPED", _) => InstanceState::Stopped,
            ("DELETING" | "TERMINATED", _) => InstanceState::Terminating,
            (other, _) => InstanceState::Unknown(clean(other.as_bytes(), 60)),
        }
    }

    fn endpoint(&self) -> Option<SshEndpoint> {
        match self.ssh_connection.as_ref()? {
            Value::String(connection) => endpoint(connection),
            Value::Array(connections) => connections.iter().find_map(Value::as_str).and_then(endpoint),
            _ => None,
        }
    }
}

/// Parses `root@1.2.3.4 -p 22`; the port is omitted if it is 22.
fn endpoint(connection: &str) -> Option<SshEndpoint> {
    let words: Vec<&str> = connection.split_whitespace().collect();
    let (target, port) = match words[..] {
        [target] => (target, 22),
        [target, "-p", port] => (target, port.parse().ok()?),
        _ => return None,
    };
    let (user, host) = target.split_once('@')?;
    wire::endpoint(user, host, port)
}

/// Whether the API reports that the object does not exist. An error page of a proxy does not
/// count.
fn is_gone(reply: &Response) -> bool {
    reply.status == 404 && reply.value().is_some_and(|value| value.get("detail").is_some())
}

/// Kind of a refusal. Most are free text of the cloud behind this one.
fn kind_of(reply: &Response) -> BrokerErrorKind {
    let words = reply.in_words().to_lowercase();
    let says = |any: &[&str]| any.iter().any(|phrase| words.contains(phrase));
    match reply.status {
        401 | 403 => BrokerErrorKind::Auth,
        402 => BrokerErrorKind::Budget,
        300..=399 | 408 => reply.unclear(),
        // Checked before "insufficient", which may also mean capacity.
        _ if says(&["funds", "wallet", "credit", "payment", "quota exceeded", "limit exceeded"]) => {
            BrokerErrorKind::Budget
        }
        _ if says(NO_CAPACITY) => BrokerErrorKind::NoCapacity,
        404 => BrokerErrorKind::NotFound,
        _ => BrokerErrorKind::Rejected,
    }
}

/// Messages of the clouds behind this one for missing capacity, or capacity at another price.
const NO_CAPACITY: &[&str] = &[
    "capacity",
    "out of stock",
    "not available",
    "unavailable",
    "no longer available",
    "insufficient",
    "sold out",
    "max price",
    "maxprice",
];

#[cfg(test)]
mod tests;
