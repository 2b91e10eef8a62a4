//! Vast.ai, API v0 and v1 (instances). Every path ends in a slash; a failure may have status 200.

use outliers::cloud::broker::{CloudKind, vast};
use outliers::units::UsdPerHour;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::dialect::Document;
use crate::{ApiResponse, CloudState, Dialect, FakeInstance, Gpu, InstanceStatus, Op, Order, Refusal, Request, Stock};

/// Vast.ai's API.
#[derive(Clone, Copy, Debug)]
pub struct Vast;

/// Dollars for a GB of disk in a month of 30 days.
const STORAGE: f64 = 0.2;
/// Most instances on a page.
const LARGEST_PAGE: usize = 25;

impl Dialect for Vast {
    fn cloud(&self) -> &'static CloudKind {
        &vast::CLOUD
    }

    fn document(&self) -> Option<Document> {
        // The documentation lists some filter operators and describes others. Its client sends its
        // own name.
        Some(Document { file: "vast.json", elsewhere: &[], wrong: &["/num_gpus/eq", "/client_id"] })
    }

    fn operation(&self, request: &Request) -> Option<Op> {
        let (method, path) = request.route();
        match (method, &path[..]) {
            ("GET", ["v0", "users", "current", ""]) => Some(Op::Check),
            ("POST", ["v0", "bundles", ""]) => Some(Op::Offers),
            ("PUT", ["v0", "asks", _, ""]) => Some(Op::Create),
            ("GET", ["v1", "instances", ""]) => Some(Op::List),
            ("GET", ["v0", "instances", _, ""]) => Some(Op::Get),
            ("DELETE", ["v0", "instances", _, ""]) => Some(Op::Terminate),
            _ => None,
        }
    }

    fn answer(&self, state: &mut CloudState, request: &Request) -> Result<ApiResponse, Refusal> {
        let (method, path) = request.route();
        let body = match (method, &path[..]) {
            ("GET", ["v0", "users", "current", ""]) => user(state),
            ("POST", ["v0", "bundles", ""]) => search(self, state, &request.read()?)?,
            ("PUT", ["v0", "asks", ask, ""]) => return create(state, &number(ask)?, request.read()?),
            ("GET", ["v1", "instances", ""]) => list(state, request)?,
            ("GET", ["v0", "instances", "pending-price-increases", ""]) => {
                json!({"success": true, "count": 0, "truncated": false, "pending_price_increases": []})
            }
            ("GET", ["v0", "instances", id, ""]) => {
                let found = state.look_at(&number(id)?).filter(FakeInstance::is_live);
                json!({"instances": found.as_ref().map(instance)})
            }
            ("DELETE", ["v0", "instances", id, ""]) => {
                if request.json()? != json!({}) {
                    return Err(Refusal::Invalid("the body is not {}".to_owned()));
                }
                if !state.end(&number(id)?) {
                    return Err(Refusal::NotFound);
                }
                json!({"success": true, "msg": "Instance destroyed successfully"})
            }
            _ => return Err(Refusal::NotFound),
        };
        Ok(ApiResponse::json(200, &body))
    }

    fn refuse(&self, refusal: &Refusal, on: Op) -> ApiResponse {
        let (status, error, msg) = match refusal {
            Refusal::NoCapacity => {
                (410, "no_such_ask", "error 410/3907: no_such_ask Instance type 1234567 is no longer available.")
            }
            // A wrong key in an offers query is answered with status 404.
            Refusal::Unauthorized if on == Op::Offers => (404, "not_found", "Invalid user key"),
            Refusal::Unauthorized => (401, "auth_error", "Invalid user key"),
            Refusal::Funds => (400, "insufficient_credit", "Your account lacks credit; see the billing page."),
            Refusal::Invalid(message) => (400, "invalid_args", message.as_str()),
            Refusal::RateLimited(after) => {
                let body = json!({"detail": "API requests too frequent endpoint threshold=4.5"});
                return ApiResponse::json(429, &body).retry_after(*after);
            }
            Refusal::NotFound => (404, "not_found", "Instance not found"),
            Refusal::Broken(status) => return ApiResponse::text(*status, "Internal Server Error"),
        };
        ApiResponse::json(status, &json!({"success": false, "error": error, "msg": msg}))
    }

    fn shows(&self, stock: &Stock) -> Option<Stock> {
        // Paid by the second, in dollars.
        (stock.currency == "USD" && stock.prepaid_hours.is_none()).then(|| stock.clone())
    }

    fn price(&self, stock: &Stock, disk_gib: u64) -> UsdPerHour {
        with_disk(stock, gb(disk_gib).ceil())
    }

    fn tells_totals(&self) -> bool {
        true
    }
}

fn gb(gib: u64) -> f64 {
    (gib << 30) as f64 / 1e9
}

fn with_disk(stock: &Stock, gb: f64) -> UsdPerHour {
    UsdPerHour::from_dollars(stock.price.0.dollars() + gb * STORAGE / (30.0 * 24.0))
}

/// Ids are numbers.
fn number(text: &str) -> Result<String, Refusal> {
    text.parse::<u64>().map(|id| id.to_string()).map_err(|_| invalid("'id' must be an integer"))
}

fn invalid(message: &str) -> Refusal {
    Refusal::Invalid(format!("error 400/3467: Invalid args: {message}"))
}

fn user(state: &CloudState) -> Value {
    let credit = if state.funds { 25.5 } else { 0.0 };
    json!({"id": 1, "key_id": 2, "email": "somebody@example.com", "credit": credit, "balance": 0, "ssh_key": "", "sid": "x"})
}

/// Offers that pass every filter of `query`.
fn search(dialect: &Vast, state: &CloudState, query: &Map<String, Value>) -> Result<Value, Refusal> {
    let kind = query.get("type").map_or(Some("ondemand"), Value::as_str);
    let bids = match kind {
        Some("ondemand" | "on-demand") => false,
        Some("bid") => true,
        _ => return Err(invalid("'type'")),
    };
    let storage = query.get("allocated_storage").map_or(Some(8.0), Value::as_f64);
    let storage = storage.ok_or_else(|| invalid("'allocated_storage'"))?;
    let limit = query.get("limit").map_or(Some(64), Value::as_u64).ok_or_else(|| invalid("'limit'"))?;
    let filters: Vec<Filter> =
        query.iter().filter_map(|(name, value)| Filter::read(name, value).transpose()).collect::<Result<_, _>>()?;
    let shown = state.stock.iter().filter_map(|stock| dialect.shows(stock)).filter(|stock| stock.spot == bids);
    let mut asks: Vec<Value> =
        shown.map(|stock| ask(&stock, storage)).filter(|ask| filters.iter().all(|f| f.passes(ask))).collect();
    for order in query.get("order").and_then(Value::as_array).into_iter().flatten().rev() {
        let [Value::String(field), Value::String(direction)] = order.as_array().map_or(&[][..], Vec::as_slice) else {
            return Err(invalid("'order'"));
        };
        asks.sort_by(|a, b| a[field].as_f64().unwrap_or(0.0).total_cmp(&b[field].as_f64().unwrap_or(0.0)));
        if direction == "desc" {
            asks.reverse();
        }
    }
    asks.truncate(limit as usize);
    Ok(json!({"offers": asks}))
}

/// `{"gte": 80000}` on a field of an offer.
struct Filter {
    /// In the offer.
    field: &'static str,
    conditions: Vec<(String, Value)>,
}

/// Fields for filters, and their values.
const SEARCHABLE: &[(&str, &str)] = &[
    ("gpu_name", "gpu_name"),
    ("num_gpus", "num_gpus"),
    ("gpu_ram", "gpu_ram"),
    ("cpu_ram", "cpu_ram"),
    ("cpu_cores_effective", "cpu_cores_effective"),
    ("disk_space", "disk_space"),
    ("dph_total", "dph_total"),
    ("reliability", "reliability2"),
    ("verified", "verified"),
    ("external", "external"),
    ("rentable", "rentable"),
    ("rented", "rented"),
    ("datacenter", "datacenter"),
    ("direct_port_count", "direct_port_count"),
    ("cuda_max_good", "cuda_max_good"),
    ("geolocation", "country"),
    ("duration", "duration"),
    ("machine_id", "machine_id"),
];

impl Filter {
    fn read(name: &str, value: &Value) -> Result<Option<Self>, Refusal> {
        if ["type", "limit", "order", "allocated_storage"].contains(&name) {
            return Ok(None);
        }
        let known = SEARCHABLE.iter().find(|(known, _)| *known == name);
        let field = known.ok_or_else(|| invalid(&format!("{name} is not a valid search key")))?.1;
        let conditions = value.as_object().ok_or_else(|| invalid(&format!("'{name}' is not an object")))?;
        let known = ["eq", "neq", "gt", "gte", "lt", "lte", "in", "notin"];
        if conditions.keys().any(|operator| !known.contains(&operator.as_str())) {
            return Err(invalid(&format!("operator of '{name}'")));
        }
        Ok(Some(Self { field, conditions: conditions.clone().into_iter().collect() }))
    }

    fn passes(&self, ask: &Value) -> bool {
        let has = &ask[self.field];
        self.conditions.iter().all(|(operator, wanted)| match (operator.as_str(), has.as_f64(), wanted.as_f64()) {
            ("gt", Some(has), Some(wanted)) => has > wanted,
            ("gte", Some(has), Some(wanted)) => has >= wanted,
            ("lt", Some(has), Some(wanted)) => has < wanted,
            ("lte", Some(has), Some(wanted)) => has <= wanted,
            ("eq", Some(has), Some(wanted)) => has == wanted,
            ("neq", Some(has), Some(wanted)) => has != wanted,
            ("eq", ..) => has == wanted,
            ("neq", ..) => has != wanted,
            ("in", ..) => wanted.as_array().is_some_and(|any| any.contains(has)),
            ("notin", ..) => wanted.as_array().is_some_and(|none| !none.contains(has)),
            _ => false,
        })
    }
}

/// An offer as shown, and its fields that only filters use. Real answers have more fields.
fn ask(stock: &Stock, storage: f64) -> Value {
    let id: u64 = stock.id.parse().unwrap_or_default();
    let base = stock.price.0.dollars();
    json!({
        "id": id,
        "ask_contract_id": id,
        "machine_id": 80_000 + id,
        "host_id": 55555,
        "gpu_name": gpu_name(stock.gpu),
        "num_gpus": stock.gpus,
        "gpu_ram": stock.gpu.reported_mib(),
        "gpu_frac": 0.5,
        // The machine has twice the offered share.
        "cpu_cores": stock.ram_gib.map(|_| 2 * stock.cores),
        "cpu_cores_effective": f64::from(stock.cores),
        "cpu_ram": stock.ram_gib.map(|gib| 2 * gib * 1024),
        "disk_space": gb(stock.disk_gib),
        "dph_base": base,
        "dph_total": with_disk(stock, storage).0.dollars(),
        "min_bid": if stock.spot { base } else { base / 2.0 },
        "storage_cost": STORAGE,
        "inet_down": 2034.9,
        "reliability2": 0.9981,
        "verification": "verified",
        "verified": true,
        "hosting_type": i32::from(stock.secure),
        "datacenter": stock.secure,
        "geolocation": format!("{}, {}", stock.region, stock.country),
        "country": stock.country,
        "direct_port_count": 249,
        "cuda_max_good": f64::from(stock.cuda.0) + f64::from(stock.cuda.1) / 10.0,
        "duration": 2_534_567.1,
        "rentable": stock.left > 0,
        "rented": false,
        "is_bid": stock.spot,
        "external": false,
    })
}

fn gpu_name(gpu: Gpu) -> &'static str {
    match gpu {
        Gpu::A100 => "A100 SXM4",
        Gpu::H100 => "H100 SXM",
        Gpu::Rtx4090 => "RTX 4090",
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    client_id: Option<String>,
    image: String,
    disk: f64,
    label: Option<String>,
    runtype: Option<String>,
    onstart: Option<String>,
    target_state: Option<String>,
    cancel_unavail: Option<bool>,
    /// Makes it an interruptible bid.
    price: Option<f64>,
    /// An object, contrary to the specification.
    env: Option<Map<String, Value>>,
}

impl Create {
    fn check(&self) -> Result<(), Refusal> {
        let one_of = |word: &Option<String>, known: &[&str]| word.as_deref().is_none_or(|word| known.contains(&word));
        let runtypes = ["ssh", "jupyter", "args", "ssh_proxy", "ssh_direct", "jupyter_proxy", "jupyter_direct"];
        let wrong = [
            ("client_id", !one_of(&self.client_id, &["me"])),
            ("image", self.image.is_empty()),
            ("disk", !(1.0..=100_000.0).contains(&self.disk)),
            ("label", self.label.as_ref().is_some_and(|label| label.len() > 1024)),
            ("runtype", !one_of(&self.runtype, &runtypes)),
            ("onstart", self.onstart.as_ref().is_some_and(|script| script.len() > 4048)),
            ("target_state", !one_of(&self.target_state, &["running", "stopped"])),
            // Without this, the instance might wait for its GPUs, stopped and billed.
            ("cancel_unavail", self.cancel_unavail == Some(false)),
            ("price", self.price.is_some_and(|price| !(0.001..=128.0).contains(&price))),
            ("env", self.env.as_ref().is_some_and(|env| env.values().any(|value| !value.is_string()))),
        ];
        match wrong.iter().find(|(_, is_wrong)| *is_wrong) {
            Some((field, _)) => Err(invalid(&format!("'{field}'"))),
            None => Ok(()),
        }
    }
}

fn create(state: &mut CloudState, ask: &str, create: Create) -> Result<ApiResponse, Refusal> {
    create.check()?;
    let stock = state.stock.iter().find(|stock| stock.id == ask).cloned();
    let Some(stock) = stock else {
        let msg = format!("error 404/3603: no_such_ask Instance type by id {ask} is not available.");
        let ask: u64 = ask.parse().unwrap_or_default();
        return Ok(ApiResponse::json(
            404,
            &json!({"success": false, "error": "invalid_args", "msg": msg, "ask_id": ask}),
        ));
    };
    let paid = Stock { price: create.price.map_or(stock.price, UsdPerHour::from_dollars), ..stock.clone() };
    let order = Order {
        stock: stock.id.clone(),
        name: create.label.unwrap_or_default(),
        disk_gib: (create.disk * 1e9 / f64::from(1 << 30)) as u64,
        public_key: create.onstart.as_deref().and_then(key_in),
        price: with_disk(&paid, create.disk),
    };
    let id = state.rent(order)?.id;
    let contract: u64 = id.parse().unwrap_or_default();
    let least = if stock.spot { stock.price.0.dollars() } else { stock.price.0.dollars() / 2.0 };
    if create.price.is_some_and(|bid| bid < least) {
        // The instance exists, stopped and billed, and the answer is an error.
        state.change(&id, |instance| instance.life = InstanceStatus::Stopped);
        let msg = "error 400/3620: bid price too low; instance created in stopped state";
        return Ok(ApiResponse::json(
            400,
            &json!({"success": false, "error": "invalid_price", "msg": msg, "new_contract": contract}),
        ));
    }
    Ok(ApiResponse::json(
        200,
        &json!({"success": true, "new_contract": contract, "instance_api_key": "an-instance's-own-key"}),
    ))
}

/// The public key that the start script installs.
fn key_in(script: &str) -> Option<String> {
    let key = &script[script.find("ssh-")?..];
    Some(key[..key.find('\'')?].to_owned())
}

fn list(state: &mut CloudState, request: &Request) -> Result<Value, Refusal> {
    let known = ["limit", "after_token", "order_by", "select_cols", "select_filters"];
    if let Some((name, _)) = request.query.iter().find(|(name, _)| !known.contains(&name.as_str())) {
        return Err(invalid(&format!("'{name}' is not a parameter")));
    }
    let limit = request.parameter("limit").map_or(Ok(LARGEST_PAGE), str::parse).map_err(|_| invalid("'limit'"))?;
    let after = match request.parameter("after_token") {
        Some(token) => {
            token.strip_prefix("after=").and_then(|id| id.parse().ok()).ok_or_else(|| invalid("'after_token'"))?
        }
        None => {
            state.pass_listing();
            0
        }
    };
    let id_of = |instance: &FakeInstance| instance.id.parse::<u64>().unwrap_or_default();
    let mut all = state.listed();
    // There is no status for an ending instance: a destroyed one is not listed.
    all.retain(FakeInstance::is_live);
    all.sort_by_key(id_of);
    let rest: Vec<&FakeInstance> = all.iter().filter(|instance| id_of(instance) > after).collect();
    let shown = &rest[..rest.len().min(limit).min(LARGEST_PAGE).min(state.page_size.max(1))];
    let more = rest.len() > shown.len() && !state.truncates;
    Ok(json!({
        "success": true,
        "instances_found": shown.len(),
        "total_instances": all.len(),
        "label_counts": {},
        "next_token": shown.last().filter(|_| more).map(|last| format!("after={}", last.id)),
        "instances": shown.iter().map(|found| instance(found)).collect::<Vec<_>>(),
    }))
}

fn instance(instance: &FakeInstance) -> Value {
    let stock = &instance.stock;
    let (actual, wanted) = match instance.life {
        InstanceStatus::Booting => (None, "running"),
        InstanceStatus::Running => (Some("running"), "running"),
        InstanceStatus::Failed | InstanceStatus::Ended => (Some("exited"), "running"),
        InstanceStatus::Stopped => (Some("stopped"), "stopped"),
    };
    let id: u64 = instance.id.parse().unwrap_or_default();
    let mut shown = json!({
        "id": id,
        "machine_id": 80_000 + stock.id.parse::<u64>().unwrap_or_default(),
        "host_id": 55555,
        "label": instance.name,
        "actual_status": instance.odd_status.as_deref().or(actual),
        "intended_status": wanted,
        "cur_state": wanted,
        "next_state": wanted,
        "status_msg": null,
        "image_runtype": "ssh",
        "extra_env": [],
        "gpu_name": gpu_name(stock.gpu),
        "num_gpus": stock.gpus,
        "gpu_ram": stock.gpu.reported_mib(),
        "disk_space": gb(instance.disk_gib),
        "dph_base": stock.price.0.dollars(),
        "dph_total": instance.price.0.dollars(),
        "is_bid": stock.spot,
        "geolocation": format!("{}, {}", stock.region, stock.country),
        "public_ipaddr": format!("{}\n", instance.ssh.host),
        // The SSH relay, where nothing listens.
        "ssh_host": "ssh5.vast.invalid",
        "ssh_port": 15610,
        "ssh_idx": "5",
        "direct_port_count": 249,
        "start_date": instance.created_at as f64 + 0.2,
        "end_date": instance.created_at as f64 + 2e6,
    });
    if instance.life == InstanceStatus::Running {
        let port = instance.ssh.port.to_string();
        shown["ports"] =
            json!({"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": port}, {"HostIp": "::", "HostPort": port}]});
    }
    shown
}
