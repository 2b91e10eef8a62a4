//! Prime Intellect, API v1. Unknown fields of a pod are refused, its names are camelCase, those of
//! pages snake_case.

use outliers::cloud::broker::{CloudKind, prime};
use outliers::units::UsdPerHour;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::dialect::Document;
use crate::{
    ApiResponse, CloudState, Dialect, FakeInstance, Gpu, InstanceStatus, Op, Order, Refusal, Request, SshKey, Stock,
};

/// Prime Intellect's API.
#[derive(Clone, Copy, Debug)]
pub struct Prime;

/// GB of disk that the price of an offer contains.
const DISK_INCLUDED: u64 = 20;
/// Dollars per hour for each GB beyond.
const DISK_PRICE: f64 = 0.00014;
/// Most items on a page of offers.
const LARGEST_PAGE: usize = 100;
const IMAGES: [&str; 3] = ["vllm_llama_8b", "cuda_12_4_pytorch_2_4", "ubuntu_22_cuda_12"];

impl Dialect for Prime {
    fn cloud(&self) -> &'static CloudKind {
        &prime::CLOUD
    }

    fn document(&self) -> Option<Document> {
        Some(Document { file: "prime.json", elsewhere: &[], wrong: &[] })
    }

    fn operation(&self, request: &Request) -> Option<Op> {
        let (method, path) = request.route();
        match (method, &path[..]) {
            ("GET", ["availability", "gpus"]) => Some(Op::Offers),
            ("POST", ["pods", ""]) => Some(Op::Create),
            // Checks the key: the API has no other call for this.
            ("GET", ["pods", ""]) if request.parameter("limit") == Some("1") => Some(Op::Check),
            ("GET", ["pods", ""]) => Some(Op::List),
            ("GET", ["pods", id]) if !id.is_empty() => Some(Op::Get),
            ("DELETE", ["pods", id]) if !id.is_empty() => Some(Op::Terminate),
            ("GET" | "POST", ["ssh_keys", ""]) => Some(Op::Keys),
            ("DELETE", ["ssh_keys", id]) if !id.is_empty() => Some(Op::Keys),
            _ => None,
        }
    }

    fn answer(&self, state: &mut CloudState, request: &Request) -> Result<ApiResponse, Refusal> {
        let (method, path) = request.route();
        let body = match (method, &path[..]) {
            ("GET", ["availability", "gpus"]) => offers(self, state, request)?,
            ("POST", ["pods", ""]) => create(state, request.read()?)?,
            ("GET", ["pods", ""]) => {
                if request.parameter("offset").is_none_or(|offset| offset == "0") {
                    state.pass_listing();
                }
                let pods = state.listed().iter().map(pod).collect();
                page(state, request, pods)?
            }
            ("GET", ["pods", id]) => pod(&state.look_at(id).ok_or(Refusal::NotFound)?),
            ("DELETE", ["pods", id]) => {
                if !state.end(id) {
                    return Err(Refusal::NotFound);
                }
                json!({"status": "DELETING"})
            }
            ("GET", ["ssh_keys", ""]) => {
                let keys = state.keys.iter().map(ssh_key).collect();
                page(state, request, keys)?
            }
            ("POST", ["ssh_keys", ""]) => add_key(state, request.read()?)?,
            ("DELETE", ["ssh_keys", id]) => {
                let at = state.keys.iter().position(|key| key.id == *id).ok_or(Refusal::NotFound)?;
                ssh_key(&state.keys.remove(at))
            }
            _ => return Err(Refusal::NotFound),
        };
        Ok(ApiResponse::json(200, &body))
    }

    fn refuse(&self, refusal: &Refusal, on: Op) -> ApiResponse {
        let (status, detail) = match refusal {
            Refusal::NoCapacity => (400, "No capacity available for the requested configuration"),
            Refusal::Unauthorized => (401, "Invalid API key"),
            Refusal::Funds => (402, "Insufficient funds"),
            Refusal::Invalid(message) => {
                let errors = json!({"errors": [{"param": "body", "details": message}]});
                return ApiResponse::json(422, &errors);
            }
            Refusal::RateLimited(after) => {
                return ApiResponse::json(429, &json!({"detail": "Too Many Requests"})).retry_after(*after);
            }
            Refusal::NotFound if on == Op::Keys => (404, "SSH key not found"),
            Refusal::NotFound => (404, "Pod not found"),
            Refusal::Broken(status) => return ApiResponse::text(*status, "Internal Server Error"),
        };
        ApiResponse::json(status, &json!({"detail": detail}))
    }

    fn price(&self, stock: &Stock, disk_gib: u64) -> UsdPerHour {
        with_disk(stock, gb(disk_gib))
    }

    fn tells_totals(&self) -> bool {
        true
    }
}

/// Whole GB that hold this many GiB.
fn gb(gib: u64) -> u64 {
    (gib << 30).div_ceil(1_000_000_000)
}

fn with_disk(stock: &Stock, gb: u64) -> UsdPerHour {
    let beyond = gb.saturating_sub(DISK_INCLUDED) as f64;
    UsdPerHour::from_dollars(stock.price.0.dollars() + beyond * DISK_PRICE)
}

fn invalid(message: &str) -> Refusal {
    Refusal::Invalid(message.to_owned())
}

/// A parameter that is a number.
fn count(request: &Request, name: &str, default: usize) -> Result<usize, Refusal> {
    request.parameter(name).map_or(Ok(default), str::parse).map_err(|_| invalid(&format!("{name}: not an integer")))
}

fn only(request: &Request, known: &[&str]) -> Result<(), Refusal> {
    // The real API ignores unknown parameters; the fake refuses them.
    match request.query.iter().find(|(name, _)| !known.contains(&name.as_str())) {
        Some((name, _)) => Err(invalid(&format!("{name}: unknown parameter"))),
        None => Ok(()),
    }
}

/// The requested page of `items`.
fn page(state: &CloudState, request: &Request, items: Vec<Value>) -> Result<Value, Refusal> {
    only(request, &["offset", "limit"])?;
    let (offset, limit) = (count(request, "offset", 0)?, count(request, "limit", 100)?);
    let total = items.len();
    let most = limit.min(state.page_size.max(1));
    // A truncated list has a first page and none after it.
    let most = if state.truncates && offset > 0 { 0 } else { most };
    let data: Vec<Value> = items.into_iter().skip(offset).take(most).collect();
    Ok(json!({"total_count": total, "offset": offset, "limit": limit, "data": data}))
}

fn offers(dialect: &Prime, state: &CloudState, request: &Request) -> Result<Value, Refusal> {
    only(request, &["page", "page_size", "gpu_count", "gpu_type", "socket", "security", "regions"])?;
    let (page, size) = (count(request, "page", 1)?, count(request, "page_size", LARGEST_PAGE)?);
    if page == 0 || !(1..=LARGEST_PAGE).contains(&size) {
        return Err(invalid("page_size: Input should be less than or equal to 100"));
    }
    let number = count(request, "gpu_count", 0)?;
    let security = request.parameter("security");
    if !matches!(security, None | Some("secure_cloud" | "community_cloud")) {
        return Err(invalid("security: Input should be 'secure_cloud' or 'community_cloud'"));
    }
    let shown = state.stock.iter().filter_map(|stock| dialect.shows(stock));
    let shown = shown.filter(|stock| number == 0 || stock.gpus as usize == number);
    let shown: Vec<Stock> =
        shown.filter(|stock| security.is_none_or(|security| security == security_of(stock))).collect();
    let items: Vec<Value> = shown.iter().skip((page - 1) * size).take(size).map(item).collect();
    Ok(json!({"items": items, "totalCount": shown.len()}))
}

fn item(stock: &Stock) -> Value {
    let range = |default: Option<u64>| json!({"minCount": null, "defaultCount": default, "maxCount": null, "pricePerUnit": null, "step": null});
    let price = stock.price.0.dollars();
    json!({
        "cloudId": cloud_id(stock),
        "gpuType": gpu_type(stock.gpu),
        "socket": socket(stock.gpu),
        "provider": "runpod",
        "region": "united_states",
        "dataCenter": stock.region,
        "country": stock.country,
        "gpuCount": stock.gpus,
        "gpuMemory": stock.gpu.sold_gib(),
        "disk": {
            "minCount": 10,
            "defaultCount": DISK_INCLUDED,
            "maxCount": gb(stock.disk_gib),
            "pricePerUnit": DISK_PRICE,
            "step": 1,
            "defaultIncludedInPrice": false,
            "additionalInfo": null,
        },
        "sharedDisk": range(None),
        "vcpu": range(Some(stock.cores.into())),
        "memory": range(stock.ram_gib),
        "internetSpeed": null,
        "interconnect": null,
        "interconnectType": null,
        "provisioningTime": null,
        "stockStatus": if stock.left > 0 { "Low" } else { "Unavailable" },
        "security": security_of(stock),
        "prices": {
            "onDemand": stock.secure.then_some(price),
            "communityPrice": (!stock.secure).then_some(price),
            "isVariable": null,
            "currency": stock.currency,
        },
        "images": IMAGES,
        "isSpot": stock.spot.then_some(true),
        "prepaidTime": stock.prepaid_hours,
    })
}

fn security_of(stock: &Stock) -> &'static str {
    if stock.secure { "secure_cloud" } else { "community_cloud" }
}

/// Opaque, with spaces, and the same for many offers.
fn cloud_id(stock: &Stock) -> &'static str {
    match stock.gpu {
        Gpu::A100 => "NVIDIA A100-SXM4-80GB",
        Gpu::H100 => "NVIDIA H100 80GB HBM3",
        Gpu::Rtx4090 => "NVIDIA GeForce RTX 4090",
    }
}

fn gpu_type(gpu: Gpu) -> &'static str {
    match gpu {
        Gpu::A100 => "A100_80GB",
        Gpu::H100 => "H100_80GB",
        Gpu::Rtx4090 => "RTX4090_24GB",
    }
}

fn socket(gpu: Gpu) -> &'static str {
    match gpu {
        Gpu::A100 => "SXM4",
        Gpu::H100 => "SXM5",
        Gpu::Rtx4090 => "PCIe",
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    pod: NewPod,
    provider: Provider,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Provider {
    r#type: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NewPod {
    name: String,
    cloud_id: String,
    gpu_type: String,
    socket: String,
    gpu_count: u32,
    disk_size: Option<u64>,
    memory: Option<u64>,
    max_price: Option<f64>,
    image: String,
    data_center_id: Option<String>,
    country: Option<String>,
    security: Option<String>,
    ssh_key_id: Option<String>,
    auto_restart: Option<bool>,
}

impl NewPod {
    /// Whether it identifies `stock` among all stocks of the same machine type.
    fn names(&self, stock: &Stock) -> bool {
        self.cloud_id == cloud_id(stock)
            && self.gpu_type == gpu_type(stock.gpu)
            && self.socket == socket(stock.gpu)
            && self.gpu_count == stock.gpus
            && self.data_center_id.as_deref() == Some(stock.region)
            && self.country.as_deref().is_none_or(|country| country == stock.country)
            && self.security.as_deref().is_none_or(|security| security == security_of(stock))
    }

    fn check(&self, stock: &Stock) -> Result<(), Refusal> {
        let dashes = |c: char| c.is_ascii_alphanumeric() || c == '-';
        let disk = 10..=gb(stock.disk_gib);
        let wrong = [
            ("pod.name", self.name.is_empty() || !self.name.chars().all(dashes)),
            ("pod.image", !IMAGES.contains(&self.image.as_str())),
            ("pod.diskSize", self.disk_size.is_some_and(|size| !disk.contains(&size))),
            ("pod.memory", self.memory.is_some()),
            ("pod.autoRestart", self.auto_restart == Some(true)),
        ];
        match wrong.iter().find(|(_, is_wrong)| *is_wrong) {
            Some((field, _)) => Err(invalid(&format!("{field}: Value error"))),
            None => Ok(()),
        }
    }
}

fn create(state: &mut CloudState, create: Create) -> Result<Value, Refusal> {
    let pod_wanted = create.pod;
    if create.provider.r#type != "runpod" {
        return Err(invalid("provider.type: Value error"));
    }
    let Some(stock) = state.stock.iter().find(|stock| pod_wanted.names(stock)).cloned() else {
        return Err(invalid("pod.cloudId: no such configuration"));
    };
    pod_wanted.check(&stock)?;
    let key = match &pod_wanted.ssh_key_id {
        Some(id) => {
            Some(state.keys.iter().find(|key| key.id == *id).ok_or_else(|| invalid("pod.sshKeyId: Value error"))?)
        }
        None => None,
    };
    let disk = pod_wanted.disk_size.unwrap_or(DISK_INCLUDED);
    let price = with_disk(&stock, disk);
    if pod_wanted.max_price.is_some_and(|most| price.0.dollars() > most) {
        return Err(Refusal::NoCapacity);
    }
    let order = Order {
        stock: stock.id,
        name: pod_wanted.name,
        disk_gib: (disk * 1_000_000_000) >> 30,
        public_key: key.map(|key| key.public_key.clone()),
        price,
    };
    Ok(pod(&state.rent(order)?))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NewKey {
    name: String,
    public_key: String,
}

fn add_key(state: &mut CloudState, key: NewKey) -> Result<Value, Refusal> {
    if key.name.is_empty() || !key.public_key.starts_with("ssh-") {
        return Err(invalid("publicKey: Value error"));
    }
    let key = SshKey { id: state.new_id(), name: key.name, public_key: key.public_key };
    state.keys.push(key.clone());
    Ok(ssh_key(&key))
}

fn ssh_key(key: &SshKey) -> Value {
    json!({
        "id": key.id,
        "userId": "user_123",
        "name": key.name,
        "publicKey": key.public_key,
        "isPrimary": false,
        "isUserKey": true,
    })
}

fn pod(instance: &FakeInstance) -> Value {
    let stock = &instance.stock;
    let (status, installation) = match instance.life {
        InstanceStatus::Booting => ("PROVISIONING", "PENDING"),
        InstanceStatus::Running => ("ACTIVE", "FINISHED"),
        InstanceStatus::Failed => ("ERROR", "PENDING"),
        InstanceStatus::Stopped => ("STOPPED", "FINISHED"),
        InstanceStatus::Ended => ("DELETING", "TERMINATED"),
    };
    let running = instance.life == InstanceStatus::Running;
    let ssh = &instance.ssh;
    json!({
        "id": instance.id,
        "userId": "user_123",
        "teamId": null,
        "walletId": "wallet_123",
        "name": instance.name,
        "type": "HOSTED",
        "providerType": "runpod",
        "status": instance.odd_status.as_deref().unwrap_or(status),
        "installationStatus": installation,
        "installationFailure": null,
        "installationProgress": if running { 100 } else { 0 },
        "createdAt": "2026-11-21T04:00:00Z",
        "updatedAt": "2026-11-21T04:00:00Z",
        "terminatedAt": null,
        "gpuName": gpu_type(stock.gpu),
        "gpuCount": stock.gpus,
        "socket": socket(stock.gpu),
        "priceHr": instance.price.0.dollars(),
        "stoppedPriceHr": null,
        "provisioningPriceHr": 0.0,
        "environmentType": "ubuntu_22_cuda_12",
        "customTemplateId": null,
        "clusterId": null,
        "primePortMapping": [],
        "sshConnection": if running { json!(format!("{}@{} -p {}", ssh.user, ssh.host, ssh.port)) } else { json!([null]) },
        "ip": running.then_some(&ssh.host),
        "resources": {"memory": stock.ram_gib, "disk": gb(instance.disk_gib), "shared_disk": null, "vcpus": stock.cores},
        "attachedResources": [],
        "isSpot": stock.spot,
        "autoRestart": false,
    })
}
