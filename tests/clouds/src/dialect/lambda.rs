//! Lambda, Cloud API 1.10.0. Errors have codes; the body of 429 is plain text, which is
//! undocumented.

use outliers::cloud::broker::{CloudKind, lambda};
use outliers::units::UsdPerHour;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::dialect::Document;
use crate::{
    ApiResponse, CloudState, Dialect, FakeInstance, Gpu, InstanceStatus, Op, Order, Refusal, Request, SshKey, Stock,
};

/// Lambda's API.
#[derive(Clone, Copy, Debug)]
pub struct Lambda;

impl Dialect for Lambda {
    fn cloud(&self) -> &'static CloudKind {
        &lambda::CLOUD
    }

    fn document(&self) -> Option<Document> {
        Some(Document { file: "lambda.json", elsewhere: &[], wrong: &[] })
    }

    fn operation(&self, request: &Request) -> Option<Op> {
        let (method, path) = request.route();
        match (method, &path[..]) {
            ("GET", ["instance-types"]) => Some(Op::Offers),
            ("POST", ["instance-operations", "launch"]) => Some(Op::Create),
            ("POST", ["instance-operations", "terminate"]) => Some(Op::Terminate),
            ("GET", ["instances"]) => Some(Op::List),
            ("GET", ["instances", _]) => Some(Op::Get),
            ("GET" | "POST", ["ssh-keys"]) | ("DELETE", ["ssh-keys", _]) => Some(Op::Keys),
            _ => None,
        }
    }

    fn answer(&self, state: &mut CloudState, request: &Request) -> Result<ApiResponse, Refusal> {
        let (method, path) = request.route();
        let data = match (method, &path[..]) {
            ("GET", ["instance-types"]) => instance_types(self, state),
            ("POST", ["instance-operations", "launch"]) => launch(state, request.read()?)?,
            ("POST", ["instance-operations", "terminate"]) => match terminate(state, &request.read::<Terminate>()?)? {
                Some(ended) => ended,
                None => return Ok(failure(400, "global/unknown", "API encountered an unknown error.")),
            },
            ("GET", ["instances"]) => {
                state.pass_listing();
                state.listed().iter().map(instance).collect()
            }
            ("GET", ["instances", id]) => instance(&state.look_at(id).ok_or(Refusal::NotFound)?),
            ("GET", ["ssh-keys"]) => state.keys.iter().map(ssh_key).collect(),
            ("POST", ["ssh-keys"]) => add_key(state, request.read()?)?,
            ("DELETE", ["ssh-keys", id]) => remove_key(state, id)?,
            _ => return Err(Refusal::NotFound),
        };
        Ok(ApiResponse::json(200, &json!({"data": data})))
    }

    fn refuse(&self, refusal: &Refusal, _on: Op) -> ApiResponse {
        let (status, code, message) = match refusal {
            Refusal::NoCapacity => (
                400,
                "instance-operations/launch/insufficient-capacity",
                "Not enough capacity to fulfill launch request.",
            ),
            Refusal::Unauthorized => (401, "global/invalid-api-key", "API key was invalid, expired, or deleted."),
            Refusal::Funds => (400, "global/quota-exceeded", "Quota exceeded."),
            Refusal::Invalid(message) => (400, "global/invalid-parameters", message.as_str()),
            Refusal::RateLimited(after) => return ApiResponse::text(429, "Too Many Requests").retry_after(*after),
            Refusal::NotFound => (404, "global/object-does-not-exist", "Specified instance does not exist."),
            Refusal::Broken(status) => (*status, "provider/internal-unavailable", "Provider unavailable"),
        };
        failure(status, code, message)
    }

    fn shows(&self, stock: &Stock) -> Option<Stock> {
        // Lambda's own machines and data centres, by the hour, in dollars.
        let sold = stock.secure && !stock.spot && stock.currency == "USD" && stock.prepaid_hours.is_none();
        sold.then(|| stock.clone())
    }

    fn price(&self, stock: &Stock, _disk_gib: u64) -> UsdPerHour {
        UsdPerHour::from_dollars(cents(stock.price) as f64 / 100.0)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Launch {
    region_name: String,
    instance_type_name: String,
    ssh_key_names: Vec<String>,
    #[serde(default)]
    name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Terminate {
    instance_ids: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewKey {
    name: String,
    public_key: String,
}

fn launch(state: &mut CloudState, launch: Launch) -> Result<Value, Refusal> {
    let [key] = &launch.ssh_key_names[..] else {
        return Err(invalid("Exactly one SSH key must be specified."));
    };
    let public_key = state.keys.iter().find(|known| known.name == *key).map(|known| known.public_key.clone());
    let public_key = public_key.ok_or(Refusal::NotFound)?;
    if launch.name.len() > 64 {
        return Err(invalid("The name has more than 64 characters."));
    }
    let here = |stock: &&Stock| type_name(stock) == launch.instance_type_name && stock.region == launch.region_name;
    let stock = state.stock.iter().find(here).ok_or(Refusal::NotFound)?;
    let order = Order {
        stock: stock.id.clone(),
        name: launch.name,
        disk_gib: stock.disk_gib,
        public_key: Some(public_key),
        price: stock.price,
    };
    Ok(json!({"instance_ids": [state.rent(order)?.id]}))
}

/// `None`: an ended instance, for which this cloud has no status.
fn terminate(state: &mut CloudState, terminate: &Terminate) -> Result<Option<Value>, Refusal> {
    let mut ended = Vec::new();
    for id in &terminate.instance_ids {
        let known = state.instances.iter().find(|instance| instance.id == *id).ok_or(Refusal::NotFound)?;
        let name = known.name.clone();
        if !state.end(id) {
            return Ok(None);
        }
        ended.push(json!({"id": id, "name": name, "status": "terminating"}));
    }
    Ok(Some(json!({"terminated_instances": ended})))
}

fn add_key(state: &mut CloudState, key: NewKey) -> Result<Value, Refusal> {
    if key.name.is_empty() || key.name.len() > 64 {
        return Err(invalid("The name must have 1 to 64 characters."));
    }
    if state.keys.iter().any(|known| known.name == key.name) {
        return Err(invalid("There is already a key of this name."));
    }
    if !key.public_key.starts_with("ssh-") {
        return Err(invalid("The public key is invalid."));
    }
    let key = SshKey { id: state.new_id(), name: key.name, public_key: key.public_key };
    state.keys.push(key.clone());
    Ok(ssh_key(&key))
}

fn remove_key(state: &mut CloudState, id: &str) -> Result<Value, Refusal> {
    let at = state.keys.iter().position(|key| key.id == id).ok_or(Refusal::NotFound)?;
    state.keys.remove(at);
    Ok(json!({}))
}

fn failure(status: u16, code: &str, message: &str) -> ApiResponse {
    ApiResponse::json(status, &json!({"error": {"code": code, "message": message}}))
}

fn invalid(message: &str) -> Refusal {
    Refusal::Invalid(message.to_owned())
}

fn ssh_key(key: &SshKey) -> Value {
    json!({"id": key.id, "name": key.name, "public_key": key.public_key})
}

fn instance_types(dialect: &Lambda, state: &CloudState) -> Value {
    let mut types = Map::new();
    for stock in state.stock.iter().filter_map(|stock| dialect.shows(stock)) {
        let region = json!({"name": stock.region, "description": format!("Somewhere, {}", stock.country)});
        let entry = types
            .entry(type_name(&stock))
            .or_insert_with(|| json!({"instance_type": instance_type(&stock), "regions_with_capacity_available": []}));
        if let Some(regions) = entry["regions_with_capacity_available"].as_array_mut().filter(|_| stock.left > 0) {
            regions.push(region);
        }
    }
    Value::Object(types)
}

fn instance_type(stock: &Stock) -> Value {
    json!({
        "name": type_name(stock),
        "description": format!("{}x {}", stock.gpus, gpu_words(stock.gpu)),
        "gpu_description": gpu_words(stock.gpu),
        "price_cents_per_hour": cents(stock.price),
        "specs": {
            "vcpus": stock.cores,
            "memory_gib": stock.ram_gib.unwrap_or_default(),
            "storage_gib": stock.disk_gib,
            "gpus": stock.gpus,
        },
    })
}

fn type_name(stock: &Stock) -> String {
    let model = match stock.gpu {
        Gpu::A100 => "a100_80gb_sxm4",
        Gpu::H100 => "h100_sxm5",
        Gpu::Rtx4090 => "rtx4090",
    };
    format!("gpu_{}x_{model}", stock.gpus)
}

fn gpu_words(gpu: Gpu) -> &'static str {
    match gpu {
        Gpu::A100 => "A100 (80 GB SXM4)",
        Gpu::H100 => "H100 (80 GB SXM5)",
        Gpu::Rtx4090 => "RTX 4090 (24 GB)",
    }
}

fn cents(price: UsdPerHour) -> i64 {
    price.0.micros() / 10_000
}

fn instance(instance: &FakeInstance) -> Value {
    let status = match instance.life {
        InstanceStatus::Booting => "booting",
        InstanceStatus::Running => "active",
        InstanceStatus::Failed | InstanceStatus::Stopped => "unhealthy",
        InstanceStatus::Ended => "terminating",
    };
    let available = |available: bool| match available {
        true => json!({"available": true}),
        false => json!({
            "available": false,
            "reason_code": "vm-has-not-launched",
            "reason_description": "VM has not launched yet",
        }),
    };
    let up = available(instance.life == InstanceStatus::Running);
    let mut shown = json!({
        "id": instance.id,
        "name": instance.name,
        "status": instance.odd_status.as_deref().unwrap_or(status),
        "ssh_key_names": [instance.name],
        "file_system_names": [],
        "region": {"name": instance.stock.region, "description": "Somewhere"},
        "instance_type": instance_type(&instance.stock),
        "actions": {"migrate": up, "rebuild": up, "restart": up, "cold_reboot": up, "terminate": available(true)},
        "tags": [],
        "firewall_rulesets": [],
    });
    if instance.life == InstanceStatus::Running {
        shown["ip"] = json!(instance.ssh.host);
        shown["jupyter_token"] = json!("03b7d30d9d3e4d8fa41657bc0d478c1b");
    }
    shown
}
