//! Lambda: virtual machines with Ubuntu, fixed disks and public addresses.
//!
//! Source: docs.lambda.ai, Cloud API 1.10.0 (list instance types, launch instances, list running
//! instances, terminate instances, add, list and delete SSH keys). The cloud has no deadlines and
//! gives instances no credential. An instance that powers itself off continues to bill.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::wire::{self, GIB, lenient};
use super::{
    Account, ApiAccess, Broker, BrokerError, BrokerErrorKind, Capabilities, CloudKind, GpuRequest, Instance,
    InstanceId, InstanceState, Lease, LeaseTag, Offer, Offers, Tier,
};
use crate::cloud::gpu;
use crate::cloud::http::{Call, Http, Idempotency, Method, Response};
use crate::text::clean;
use crate::units::UsdPerHour;

/// Lambda's entry in the list of clouds.
pub const CLOUD: CloudKind = CloudKind {
    name: NAME,
    key_variable: "LAMBDA_API_KEY",
    base_url: "https://cloud.lambda.ai/api/v1",
    image: "",
    key_page: "https://cloud.lambda.ai/api-keys/cloud-api",
    connect,
};

const NAME: &str = "lambda";
/// User of Lambda's machine images.
const USER: &str = "ubuntu";
const SSH_PORT: u16 = 22;

/// Minimum time between two calls.
const BETWEEN_CALLS: Duration = Duration::from_secs(1);
/// Minimum time between two launches.
const BETWEEN_LAUNCHES: Duration = Duration::from_secs(12);
const LAUNCH: &str = "launch";

fn connect(access: ApiAccess) -> Box<dyn Broker> {
    let http = access.http.paced(None, BETWEEN_CALLS).paced(Some(LAUNCH), BETWEEN_LAUNCHES);
    let login =
        SshLogin { user: access.ssh_user.unwrap_or(USER.to_owned()), port: access.ssh_port.unwrap_or(SSH_PORT) };
    Box::new(Lambda { http, login })
}

struct Lambda {
    http: Http,
    login: SshLogin,
}

/// The SSH user and port. The cloud states only the address.
struct SshLogin {
    user: String,
    port: u16,
}

/// Parameters of an offer for [`Broker::create`].
#[derive(Serialize, Deserialize)]
struct Sku {
    instance_type: String,
    region: String,
}

#[async_trait]
impl Broker for Lambda {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn clock_skew(&self) -> Option<i64> {
        self.http.clock_skew()
    }

    async fn check(&self) -> Result<Account, BrokerError> {
        // The API has no call for the owner of a key.
        self.list().await.map(|_| Account::default())
    }

    async fn offers(&self, _want: &GpuRequest) -> Result<Offers, BrokerError> {
        let types: BTreeMap<String, Value> =
            self.ask(Call::get("/instance-types"), "a table of instance types").await?;
        Ok(Offers::collect(types.into_values().flat_map(offers_of)))
    }

    async fn create(&self, offer: &Offer, lease: &Lease) -> Result<Instance, BrokerError> {
        let sku: Sku = wire::sku(&self.http, offer)?;
        let key = self.register(lease).await?;
        match self.launch(&sku, lease, &key.name).await {
            Ok(id) => Ok(wire::booting(id, offer, lease)),
            Err(error) => {
                // An instance that may exist needs its key.
                if error.kind != BrokerErrorKind::Maybe && key.name == lease.tag.to_string() {
                    self.remove_key(&key.id).await;
                }
                Err(error)
            }
        }
    }

    async fn list(&self) -> Result<Vec<Instance>, BrokerError> {
        let machines: Vec<Value> = self.ask(Call::get("/instances"), "a list of instances").await?;
        Ok(wire::entries(NAME, &machines, |machine: InstanceEntry| machine.live(&self.login)))
    }

    async fn get(&self, id: &InstanceId) -> Result<Option<Instance>, BrokerError> {
        let Some((reply, machine)) = self.machine(id).await? else { return Ok(None) };
        wire::alone(&reply, NAME, id, &machine, |machine: InstanceEntry| machine.live(&self.login))
    }

    async fn terminate(&self, id: &InstanceId) -> Result<(), BrokerError> {
        let call = Call::new(Method::POST, "/instance-operations/terminate", Idempotency::Idempotent);
        let reply = self.http.call(call.body(json!({"instance_ids": [id]}))).await?;
        let name = match reply.granted(kind_of) {
            Ok(reply) => {
                let ended: Data<Ended> = reply.json("a list of terminated instances")?;
                let named = |machine: &&Value| wire::id_of(machine).as_ref() == Some(&id.0);
                match ended.data.terminated_instances.iter().find(named) {
                    Some(machine) => machine.get("name").and_then(Value::as_str).map(str::to_owned),
                    None => {
                        let unnamed = reply.error(reply.unclear(), "its answer does not name the instance");
                        self.ended_nevertheless(id, unnamed).await?
                    }
                }
            }
            Err(refused) => self.ended_nevertheless(id, refused).await?,
        };
        self.sweep_keys(name.as_deref()).await;
        Ok(())
    }
}

impl Lambda {
    /// The `data` of the cloud's answer.
    async fn ask<T: for<'de> Deserialize<'de>>(&self, call: Call, what: &str) -> Result<T, BrokerError> {
        Ok(self.http.call(call).await?.granted(kind_of)?.json::<Data<T>>(what)?.data)
    }

    async fn launch(&self, sku: &Sku, lease: &Lease, key: &str) -> Result<String, BrokerError> {
        let call =
            Call::new(Method::POST, "/instance-operations/launch", Idempotency::Once).at_pace(LAUNCH).body(json!({
                "region_name": sku.region,
                "instance_type_name": sku.instance_type,
                "ssh_key_names": [key],
                "name": lease.tag.to_string(),
            }));
        let reply = self.http.call(call).await?.granted(kind_of)?;
        let launched: Data<Launched> = reply.json("a list of launched instances")?;
        match &launched.data.instance_ids[..] {
            [id] => Ok(id.clone()),
            ids => {
                let message = format!("one instance was asked for, it names {}", ids.len());
                Err(reply.error(BrokerErrorKind::Maybe, message))
            }
        }
    }

    /// The cloud's unparsed entry of one instance.
    async fn machine(&self, id: &InstanceId) -> Result<Option<(Response, Value)>, BrokerError> {
        let segment = wire::id_segment(&self.http, id)?;
        match self.http.call(Call::get(format!("/instances/{segment}"))).await?.granted(kind_of) {
            Ok(reply) => {
                let machine = reply.json::<Data<Value>>("an instance")?.data;
                Ok(Some((reply, machine)))
            }
            Err(error) if error.kind == BrokerErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether an instance whose termination was refused is nevertheless terminating: an earlier
    /// attempt may have ended it, which the cloud does not report clearly. Returns its name, if it
    /// still has one.
    async fn ended_nevertheless(&self, id: &InstanceId, refused: BrokerError) -> Result<Option<String>, BrokerError> {
        if refused.kind == BrokerErrorKind::NotFound {
            return Ok(None);
        }
        let Some((_, machine)) = self.machine(id).await? else { return Ok(None) };
        let Ok(machine) = serde_json::from_value::<InstanceEntry>(machine) else { return Err(refused) };
        if machine.is_gone() || machine.status.as_deref() == Some("terminating") {
            return Ok(machine.name);
        }
        // `vm-has-not-launched` is a transient refusal for an instance that is being created.
        match machine.actions.and_then(|actions| actions.terminate).filter(|action| !action.available) {
            Some(ActionAvailability { reason_code: Some(why), .. }) if why == "vm-is-terminating" => Ok(machine.name),
            Some(ActionAvailability { reason_code, .. }) => {
                let why = clean(reason_code.unwrap_or_default().as_bytes(), 80);
                let message = format!("{id} cannot be terminated yet ({why}): {}", refused.message);
                Err(self.http.error(BrokerErrorKind::Unavailable, message))
            }
            None => Err(refused),
        }
    }

    /// Adds the lease's key to the account under the tag's name, since a launch refers to keys by
    /// name. Returns the account's entry.
    async fn register(&self, lease: &Lease) -> Result<Key, BrokerError> {
        let (tag, public_key) = (lease.tag.to_string(), lease.ssh_public_key.trim());
        let body = json!({"name": tag, "public_key": public_key});
        let reply = self.http.call(Call::new(Method::POST, "/ssh-keys", Idempotency::Idempotent).body(body)).await?;
        match reply.granted(kind_of) {
            Ok(reply) => Ok(reply.json::<Data<Key>>("an SSH key")?.data),
            // An earlier attempt arrived without its answer, or an earlier lease of the run added
            // the same key.
            Err(refused) if refused.kind == BrokerErrorKind::Rejected => {
                let known = self.keys().await?.into_iter();
                known.filter(|key| key.is(public_key)).max_by_key(|key| key.name == tag).ok_or(refused)
            }
            Err(refused) => Err(refused),
        }
    }

    async fn keys(&self) -> Result<Vec<Key>, BrokerError> {
        self.ask(Call::get("/ssh-keys"), "a list of SSH keys").await
    }

    /// Removes the key named `ended`, and expired keys of this program. Failures are retried on
    /// the next call.
    async fn sweep_keys(&self, ended: Option<&str>) {
        let keys = match self.keys().await {
            Ok(keys) => keys,
            Err(error) => return tracing::info!("SSH keys stay in the account: {error}"),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        for key in keys {
            let Ok(tag) = key.name.parse::<LeaseTag>() else { continue };
            if Some(key.name.as_str()) == ended || tag.deadline < now {
                self.remove_key(&key.id).await;
            }
        }
    }

    async fn remove_key(&self, id: &str) {
        let Some(segment) = wire::segment(id) else { return };
        let call = Call::new(Method::DELETE, format!("/ssh-keys/{segment}"), Idempotency::Idempotent);
        let removed = match self.http.call(call).await {
            Ok(reply) => reply.granted(kind_of).map(|_| ()),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if error.kind != BrokerErrorKind::NotFound => {
                tracing::info!("an SSH key stays in the account: {error}");
            }
            _ => {}
        }
    }
}

/// Kind of a refusal, by its code and not its status.
fn kind_of(refused: &Response) -> BrokerErrorKind {
    let value = refused.value().unwrap_or_default();
    let code = value.pointer("/error/code").and_then(Value::as_str).unwrap_or_default();
    match (code, refused.status) {
        ("instance-operations/launch/insufficient-capacity", _) => BrokerErrorKind::NoCapacity,
        ("global/quota-exceeded" | "global/account-inactive" | "global/invalid-address", _) => BrokerErrorKind::Budget,
        ("global/invalid-api-key" | "global/forbidden", _) => BrokerErrorKind::Auth,
        ("global/object-does-not-exist" | "global/not-found", _) => BrokerErrorKind::NotFound,
        // Failures of the server, whatever the status.
        ("global/unknown" | "global/internal-error", _) => refused.unclear(),
        (code, _) if code.starts_with("provider/") => refused.unclear(),
        ("", 401 | 403) => BrokerErrorKind::Auth,
        ("", 402) => BrokerErrorKind::Budget,
        // Not an answer of the API: it does not show that something does not exist.
        ("", 300..=399 | 404 | 405) => BrokerErrorKind::Unavailable,
        _ => BrokerErrorKind::Rejected,
    }
}

#[derive(Deserialize)]
struct Data<T> {
    data: T,
}

#[derive(Deserialize)]
struct Launched {
    instance_ids: Vec<String>,
}

#[derive(Deserialize)]
struct Ended {
    /// Entries are parsed one by one.
    terminated_instances: Vec<Value>,
}

#[derive(Deserialize)]
struct Key {
    id: String,
    name: String,
    public_key: Option<String>,
}

impl Key {
    /// Whether it is this key. The comment, its third word, is ignored.
    fn is(&self, public_key: &str) -> bool {
        let words = |line: &str| line.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>();
        self.public_key.as_deref().is_some_and(|known| words(known) == words(public_key))
    }
}

/// An instance type and the regions that have it now.
#[derive(Deserialize)]
struct Stock {
    instance_type: InstanceType,
    regions_with_capacity_available: Vec<Region>,
}

#[derive(Deserialize)]
struct InstanceType {
    name: String,
    /// `H100 (80 GB SXM5)`: the only field with a GPU's memory.
    gpu_description: Option<String>,
    /// Price of the whole instance.
    price_cents_per_hour: f64,
    specs: Specs,
}

#[derive(Deserialize)]
struct Specs {
    vcpus: Option<u32>,
    memory_gib: Option<f64>,
    storage_gib: Option<f64>,
    gpus: u32,
}

#[derive(Deserialize)]
struct Region {
    name: String,
    description: Option<String>,
}

impl InstanceType {
    fn price(&self) -> Option<UsdPerHour> {
        wire::price(self.price_cents_per_hour / 100.0)
    }

    fn gpu(&self) -> String {
        clean(self.gpu_description.as_deref().unwrap_or_default().as_bytes(), 80)
    }

    /// The number before ` GB` in `A100 (40 GB SXM4)`.
    fn vram(&self) -> Option<crate::units::Bytes> {
        let (_, inside) = self.gpu_description.as_deref()?.split_once('(')?;
        let (number, _) = inside.split_once(" GB")?;
        wire::size(number.trim().parse().ok()?, GIB)
    }
}

/// One offer per region that has the type, or the reason for none.
fn offers_of(entry: Value) -> Vec<Result<Offer, String>> {
    let Ok(stock) = serde_json::from_value::<Stock>(entry) else {
        return vec![Err("described in a way that is not understood".to_owned())];
    };
    if stock.regions_with_capacity_available.is_empty() {
        return vec![Err("sold out".to_owned())];
    }
    stock.regions_with_capacity_available.iter().map(|region| offer(&stock.instance_type, region)).collect()
}

fn offer(instance: &InstanceType, region: &Region) -> Result<Offer, String> {
    let price = instance.price().ok_or("without a price that can be one")?;
    let sku = Sku { instance_type: instance.name.clone(), region: region.name.clone() };
    let key = serde_json::to_string(&sku).map_err(|error| error.to_string())?;
    let specs = &instance.specs;
    let offer = Offer::new(NAME, key, specs.gpus, price);
    let offer = if specs.gpus > 0 { offer.with_gpu(&instance.gpu(), instance.vram()) } else { offer };
    // `gpu_1x_gh200`: a description may omit the module.
    let arm = offer.arm || gpu::is_with_arm(&instance.name);
    let place = match &region.description {
        Some(description) => format!("{} ({description})", region.name),
        None => region.name.clone(),
    };
    Ok(Offer {
        cpu_ram: specs.memory_gib.and_then(|gib| wire::size(gib, GIB)),
        cpu_cores: specs.vcpus,
        disk: specs.storage_gib.and_then(|gib| wire::size(gib, GIB)),
        region: Some(clean(place.as_bytes(), 100)),
        tier: Some(Tier::Secure),
        arm,
        ..offer
    })
}

/// An instance in the cloud's format.
#[derive(Deserialize)]
struct InstanceEntry {
    #[serde(deserialize_with = "wire::id")]
    id: String,
    name: Option<String>,
    #[serde(default, deserialize_with = "wire::word")]
    status: Option<String>,
    /// Missing until the instance has an address.
    #[serde(default, deserialize_with = "lenient")]
    ip: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    instance_type: Option<InstanceType>,
    #[serde(default, deserialize_with = "lenient")]
    actions: Option<Actions>,
}

#[derive(Deserialize)]
struct Actions {
    #[serde(default, deserialize_with = "lenient")]
    terminate: Option<ActionAvailability>,
}

#[derive(Deserialize)]
struct ActionAvailability {
    available: bool,
    reason_code: Option<String>,
}

impl InstanceEntry {
    fn is_gone(&self) -> bool {
        self.status.as_deref() == Some("terminated")
    }

    /// `None`: the instance has ended.
    fn live(self, login: &SshLogin) -> Option<Instance> {
        (!self.is_gone()).then(|| self.into_instance(login))
    }

    fn state(&self, login: &SshLogin) -> InstanceState {
        let status = self.status.as_deref().unwrap_or_default();
        match (status, &self.ip) {
            ("booting", _) | ("active", None) => InstanceState::Booting,
            ("active", Some(ip)) => match wire::endpoint(&login.user, ip, login.port) {
                Some(endpoint) => InstanceState::Ready(endpoint),
                None => InstanceState::Unknown(format!("its address is `{}`", clean(ip.as_bytes(), 80))),
            },
            ("unhealthy" | "preempted", _) => InstanceState::Failed(format!("the cloud calls it {status}")),
            ("terminating" | "terminated", _) => InstanceState::Terminating,
            (other, _) => InstanceState::Unknown(clean(other.as_bytes(), 80)),
        }
    }

    fn into_instance(self, login: &SshLogin) -> Instance {
        let state = self.state(login);
        let instance_type = self.instance_type.as_ref();
        let hardware = |it: &InstanceType| match it.specs.gpus {
            0 => format!("{} CPU cores", it.specs.vcpus.unwrap_or_default()),
            gpus => wire::hardware(gpus, &it.gpu(), it.vram()),
        };
        Instance {
            price: instance_type.and_then(InstanceType::price),
            hardware: instance_type.map(hardware).unwrap_or_default(),
            ..Instance::new(NAME, self.id, self.name.unwrap_or_default(), state)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    fn entry(name: &str, gpu: &str, cents: Value, regions: Value) -> Value {
        let specs = json!({"vcpus": 26, "memory_gib": 200, "storage_gib": 1024, "gpus": 1});
        let it = json!({"name": name, "description": gpu, "gpu_description": gpu, "price_cents_per_hour": cents, "specs": specs});
        json!({"instance_type": it, "regions_with_capacity_available": regions})
    }

    #[test]
    fn instance_type_gives_one_offer_per_region() {
        let regions = json!([{"name": "us-west-3", "description": "Utah, USA"}, {"name": "us-east-1"}]);
        let offers = offers_of(entry("gpu_1x_h100_pcie", "H100 (80 GB PCIe)", json!(249), regions));
        let offers: Vec<Offer> = offers.into_iter().map(|offer| offer.expect("good")).collect();
        assert_eq!(offers.len(), 2);
        let first = &offers[0];
        assert_eq!(first.gpu.as_deref(), Some("H100"));
        assert_eq!(first.gpu_raw.as_deref(), Some("H100 (80 GB PCIe)"));
        assert_eq!(first.vram, Some(Bytes::from_gib(80)));
        assert_eq!((first.cpu_ram, first.disk), (Some(Bytes::from_gib(200)), Some(Bytes::from_gib(1024))));
        assert_eq!(first.price, UsdPerHour::from_dollars(2.49));
        assert_eq!(first.region.as_deref(), Some("us-west-3 (Utah, USA)"));
        assert_eq!(offers[1].region.as_deref(), Some("us-east-1"));
        assert_ne!(offers[0].key, offers[1].key);
    }

    #[test]
    fn memory_distinguishes_gpus_of_the_same_name() {
        for (words, name, gib) in [
            ("A100 (40 GB SXM4)", "A100-40GB", Some(40)),
            ("A100 (80 GB SXM4)", "A100-80GB", Some(80)),
            ("Tesla V100 (16 GB)", "V100-16GB", Some(16)),
            ("A10 (24 GB PCIe)", "A10", Some(24)),
            ("RTX 6000 (24 GB)", "RTX 6000 (24 GB)", Some(24)),
            ("Z900", "Z900", None),
            ("Z900 (-80 GB)", "Z900 (-80 GB)", None),
        ] {
            let offers = offers_of(entry("gpu_1x", words, json!(100), json!([{"name": "r"}])));
            let offer = offers[0].clone().expect("good");
            assert_eq!(offer.gpu.as_deref(), Some(name), "{words}");
            assert_eq!(offer.vram, gib.map(Bytes::from_gib), "{words}");
        }
    }

    #[test]
    fn unrentable_types_are_skipped_with_a_reason() {
        let here = || json!([{"name": "r"}]);
        for (entry, why) in [
            (entry("gpu_8x_h100", "H100 (80 GB SXM5)", json!(249), json!([])), "sold out"),
            (entry("gpu_1x", "A10 (24 GB)", json!(-1), here()), "without a price that can be one"),
            (entry("gpu_1x", "A10 (24 GB)", json!(1e12), here()), "without a price that can be one"),
            (entry("gpu_1x", "A10 (24 GB)", json!("75"), here()), "described in a way that is not understood"),
            (json!(17), "described in a way that is not understood"),
        ] {
            assert_eq!(offers_of(entry), [Err(why.to_owned())]);
        }
    }

    #[test]
    fn grace_machine_has_an_arm_processor() {
        for (name, words, arm) in [
            ("gpu_1x_gh200", "GH200 (96 GB)", true),
            ("gpu_1x_gh200", "Hopper", true),
            ("gpu_1x_h100_pcie", "H100 (80 GB PCIe)", false),
        ] {
            let offers = offers_of(entry(name, words, json!(149), json!([{"name": "r"}])));
            assert_eq!(offers[0].as_ref().map(|offer| offer.arm), Ok(arm), "{name}");
        }
    }

    #[test]
    fn cpu_machine_has_no_gpu() {
        let mut entry = entry("cpu_4x_general", "N/A", json!(10), json!([{"name": "r"}]));
        entry["instance_type"]["specs"]["gpus"] = json!(0);
        let offer = offers_of(entry).remove(0).expect("good");
        assert_eq!((offer.gpu_count, offer.gpu), (0, None));
    }

    fn state(status: &str, ip: Option<&str>) -> InstanceState {
        let mut machine = json!({"id": "0920582c", "status": status});
        if let Some(ip) = ip {
            machine["ip"] = json!(ip);
        }
        serde_json::from_value::<InstanceEntry>(machine)
            .expect("the least there is")
            .state(&SshLogin { user: USER.to_owned(), port: SSH_PORT })
    }

    #[test]
    fn instance_states_are_parsed() {
        let ready = wire::endpoint("ubuntu", "198.51.100.2", 22).expect("an address");
        assert_eq!(state("active", Some("198.51.100.2")), InstanceState::Ready(ready));
        assert_eq!(state("active", None), InstanceState::Booting);
        assert_eq!(state("booting", None), InstanceState::Booting);
        assert_eq!(state("terminating", Some("198.51.100.2")), InstanceState::Terminating);
        assert!(matches!(state("unhealthy", None), InstanceState::Failed(_)));
        assert!(matches!(state("preempted", None), InstanceState::Failed(_)));
        assert_eq!(state("hibernating", None), InstanceState::Unknown("hibernating".to_owned()));
        assert!(matches!(state("active", Some("-oProxyCommand=x")), InstanceState::Unknown(_)));
    }
}
