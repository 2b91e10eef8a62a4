//! RunPod: REST v2 and GraphQL over the same pods. Errors of the one are
//! `application/problem+json`, of the other successes.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use outliers::calendar::rfc3339;
use outliers::cloud::broker::{CloudKind, runpod};
use outliers::units::UsdPerHour;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::conformance::DISK_GIB;
use crate::dialect::Document;
use crate::{ApiResponse, CloudState, Dialect, FakeInstance, Gpu, InstanceStatus, Op, Order, Refusal, Request, Stock};

mod graphql;

/// RunPod's API.
#[derive(Debug, Default)]
pub struct RunPod {
    /// Deadline of each pod, Unix seconds.
    deadlines: Mutex<BTreeMap<String, u64>>,
    /// Its GraphQL API is gone.
    rest_alone: bool,
}

impl Dialect for RunPod {
    fn cloud(&self) -> &'static CloudKind {
        &runpod::CLOUD
    }

    fn document(&self) -> Option<Document> {
        Some(Document { file: "runpod.json", elsewhere: &["/graphql"], wrong: &[] })
    }

    fn operation(&self, request: &Request) -> Option<Op> {
        let (method, path) = request.route();
        match (method, &path[..]) {
            ("GET", ["v2", "catalog", "gpus"]) => Some(Op::Offers),
            ("GET", ["v2", "pods"]) => Some(Op::List),
            ("GET", ["v2", "pods", id]) if !id.is_empty() => Some(Op::Get),
            ("DELETE", ["v2", "pods", id]) if !id.is_empty() => Some(Op::Terminate),
            ("POST", ["v2", "pods"]) => Some(Op::Create),
            // Faults do not apply to calls that do not exist.
            ("POST", ["graphql"]) if self.rest_alone => Some(Op::Keys),
            ("POST", ["graphql"]) => graphql::operation(request),
            _ => None,
        }
    }

    fn answer(&self, state: &mut CloudState, request: &Request) -> Result<ApiResponse, Refusal> {
        self.keep_deadlines(state);
        let (method, path) = request.route();
        match (method, &path[..]) {
            ("GET", ["v2", "catalog", "gpus"]) => catalog(state, request),
            ("GET", ["v2", "pods"]) => pods(state, request),
            ("GET", ["v2", "pods", id]) => {
                Ok(ApiResponse::json(200, &pod(&state.look_at(id).ok_or(Refusal::NotFound)?)))
            }
            ("DELETE", ["v2", "pods", id]) if state.end(id) => Ok(ApiResponse::empty(204)),
            ("POST", ["v2", "pods"]) => create(self, state, &request.read()?),
            ("POST", ["graphql"]) if self.rest_alone => {
                let gone =
                    json!({"errors": [{"message": "The GraphQL API was retired.", "extensions": {"code": "GONE"}}]});
                Ok(ApiResponse::json(410, &gone))
            }
            ("POST", ["graphql"]) => self.graphql(state, request),
            _ => Err(Refusal::NotFound),
        }
    }

    fn refuse(&self, refusal: &Refusal, on: Op) -> ApiResponse {
        match on {
            Op::Create | Op::Check if !self.rest_alone => graphql::refuse(refusal),
            _ => problem(refusal),
        }
    }

    fn shows(&self, stock: &Stock) -> Option<Stock> {
        // Billed by the second, in dollars. Host memory is reported on request, and disks have the
        // requested size.
        let sold = stock.currency == "USD" && stock.prepaid_hours.is_none();
        sold.then(|| Stock { ram_gib: None, disk_gib: DISK_GIB, ..stock.clone() })
    }

    fn price(&self, stock: &Stock, disk_gib: u64) -> UsdPerHour {
        // $0.10 per GB and month; no pod is asked for with less than 20 GB.
        let gb = (disk_gib << 30).div_ceil(1_000_000_000).max(20);
        UsdPerHour::from_dollars(stock.price.0.dollars() + gb as f64 * 0.10 / 730.0)
    }

    fn tells_totals(&self) -> bool {
        true
    }
}

impl RunPod {
    /// A possible future API: REST v2 without GraphQL.
    pub fn rest_alone() -> Self {
        Self { rest_alone: true, ..Self::default() }
    }

    fn keep_deadlines(&self, state: &mut CloudState) {
        let mut deadlines = self.deadlines.lock().unwrap_or_else(PoisonError::into_inner);
        deadlines.retain(|id, deadline| {
            let passed = *deadline <= state.now;
            if passed {
                state.end(id);
            }
            !passed
        });
    }

    fn set_deadline(&self, id: String, deadline: u64) {
        self.deadlines.lock().unwrap_or_else(PoisonError::into_inner).insert(id, deadline);
    }
}

/// A refusal of REST v2.
fn problem(refusal: &Refusal) -> ApiResponse {
    let (status, title, detail) = match refusal {
        Refusal::NoCapacity => (400, "Bad Request", graphql::SOLD_OUT),
        Refusal::Unauthorized => (401, "Unauthorized", "missing bearer token"),
        Refusal::Funds => (402, "Payment Required", "insufficient balance"),
        Refusal::Invalid(_) => (422, "Unprocessable Entity", "Request validation failed."),
        Refusal::RateLimited(_) => (429, "Too Many Requests", "rate limit exceeded for the minute window"),
        Refusal::NotFound => (404, "Not Found", "pod not found"),
        Refusal::Broken(status) => (*status, "Internal Server Error", "an upstream service failed"),
    };
    let mut document = json!({"title": title, "status": status, "detail": detail});
    if let Refusal::Invalid(message) = refusal {
        document["errors"] = json!([message]);
    }
    let after = if let Refusal::RateLimited(after) = refusal { *after } else { None };
    let answer = ApiResponse::text(status, &document.to_string());
    ApiResponse { headers: vec![("content-type", "application/problem+json".to_owned())], ..answer }.retry_after(after)
}

fn invalid(message: impl Into<String>) -> Refusal {
    Refusal::Invalid(message.into())
}

/// The id of a type of GPU.
fn gpu_id(gpu: Gpu) -> &'static str {
    match gpu {
        Gpu::A100 => "NVIDIA A100-SXM4-80GB",
        Gpu::H100 => "NVIDIA H100 80GB HBM3",
        Gpu::Rtx4090 => "NVIDIA GeForce RTX 4090",
    }
}

const GPUS: [Gpu; 3] = [Gpu::A100, Gpu::H100, Gpu::Rtx4090];

/// Whether it offers stock of this kind at all.
fn sold(state: &CloudState, gpu: Gpu, secure: bool, spot: bool) -> impl Iterator<Item = &Stock> {
    let for_dollars = |stock: &&Stock| stock.currency == "USD" && stock.prepaid_hours.is_none();
    let of_kind = move |stock: &&Stock| stock.gpu == gpu && stock.secure == secure && stock.spot == spot;
    state.stock.iter().filter(for_dollars).filter(of_kind)
}

/// Query of the catalogue.
struct Question {
    count: u32,
    secure: bool,
    min_cuda: (u32, u32),
}

impl Question {
    fn read(request: &Request) -> Result<Self, Refusal> {
        let known = ["include", "product", "count", "cloud", "countryCodes", "minCudaVersion", "cudaVersions"];
        if let Some((name, _)) = request.query.iter().find(|(name, _)| !known.contains(&name.as_str())) {
            return Err(invalid(format!("query parameter '{name}' not allowed")));
        }
        if request.parameter("include") != Some("AVAILABILITY") || request.parameter("product") != Some("POD") {
            return Err(invalid("this fake tells of pods' availability only"));
        }
        let count = request.parameter("count").unwrap_or("1").parse().ok().filter(|count| *count > 0);
        let secure = match request.parameter("cloud").unwrap_or("SECURE") {
            "SECURE" => true,
            "COMMUNITY" => false,
            other => return Err(invalid(format!("cloud '{other}' is none"))),
        };
        let min_cuda = request.parameter("minCudaVersion").map_or(Some((0, 0)), cuda);
        Ok(Self {
            count: count.ok_or_else(|| invalid("count: minimum 1"))?,
            secure,
            min_cuda: min_cuda.ok_or_else(|| invalid("minCudaVersion: does not match the pattern"))?,
        })
    }
}

/// `12.8`.
fn cuda(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// `GET /v2/catalog/gpus`
fn catalog(state: &CloudState, request: &Request) -> Result<ApiResponse, Refusal> {
    let question = Question::read(request)?;
    let gpus: Vec<Value> = GPUS.iter().filter_map(|gpu| gpu_type(state, *gpu, &question)).collect();
    Ok(ApiResponse::json(200, &json!({"gpus": gpus})))
}

/// A type of GPU, if it is in the catalogue at all.
fn gpu_type(state: &CloudState, gpu: Gpu, question: &Question) -> Option<Value> {
    let of_tier = |secure| sold(state, gpu, secure, false).chain(sold(state, gpu, secure, true));
    let fits = |stock: &&Stock| stock.gpus == question.count && stock.cuda >= question.min_cuda;
    let in_stock: Vec<&Stock> =
        sold(state, gpu, question.secure, false).filter(fits).filter(|stock| stock.left > 0).collect();
    // One price per type and tier: the cheapest that matches, or else the cheapest.
    let price = |secure: bool| {
        let each = |stock: &Stock| stock.price.0.dollars() / f64::from(stock.gpus);
        let asked = in_stock.iter().filter(|stock| stock.secure == secure).map(|stock| each(stock)).reduce(f64::min);
        asked.or_else(|| of_tier(secure).map(each).reduce(f64::min)).unwrap_or_default()
    };
    let most = |secure: bool| of_tier(secure).map(|stock| stock.gpus).max().unwrap_or_default();
    if most(true) + most(false) == 0 {
        return None;
    }
    let mut shown = json!({
        "id": gpu_id(gpu),
        "name": gpu.canonical(),
        "pool": null,
        "manufacturer": "NVIDIA",
        "memory": gpu.sold_gib(),
        "secure": most(true) > 0,
        "community": most(false) > 0,
        "price": {"secure": price(true), "community": price(false)},
        "maxCount": {"secure": most(true), "community": most(false)},
        "availability": if in_stock.is_empty() { "NONE" } else { "HIGH" },
    });
    if !in_stock.is_empty() {
        let place = |stock: &&Stock| json!({"id": stock.region, "name": stock.region, "availability": "LOW"});
        let version =
            |stock: &&Stock| json!({"version": format!("{}.{}", stock.cuda.0, stock.cuda.1), "available": true});
        shown["dataCenters"] = in_stock.iter().map(place).collect();
        shown["cudaVersions"] = in_stock.iter().map(version).collect();
    }
    Some(shown)
}

/// `POST /v2/pods`: strict, one type of GPU in one place.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Create {
    name: String,
    image: String,
    gpu: CreateGpu,
    cloud: Option<String>,
    #[serde(default)]
    data_center_ids: Vec<String>,
    disk: u64,
    ports: Vec<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    start_ssh: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct CreateGpu {
    id: String,
    count: u32,
    min_cuda_version: Option<String>,
}

fn create(cloud: &RunPod, state: &mut CloudState, create: &Create) -> Result<ApiResponse, Refusal> {
    if create.name.is_empty() || create.image.is_empty() || create.ports != ["22/tcp"] || !create.start_ssh {
        return Err(invalid("this fake makes pods that can be logged in to"));
    }
    let secure = create.cloud.as_deref().unwrap_or("SECURE") == "SECURE";
    let min_cuda = create.gpu.min_cuda_version.as_deref().map_or(Some((0, 0)), cuda);
    let min_cuda = min_cuda.ok_or_else(|| invalid("gpu.minCudaVersion: does not match the pattern"))?;
    let gpu = GPUS.iter().find(|gpu| gpu_id(**gpu) == create.gpu.id).ok_or_else(|| invalid("gpu.id: unknown"))?;
    let is_there = |stock: &&Stock| {
        let here = create.data_center_ids.is_empty() || create.data_center_ids.iter().any(|id| id == stock.region);
        here && stock.gpus == create.gpu.count && stock.left > 0 && stock.cuda >= min_cuda
    };
    let stock = sold(state, *gpu, secure, false).find(is_there).cloned().ok_or(Refusal::NoCapacity)?;
    let disk_gib = (create.disk * 1_000_000_000) >> 30;
    let order = Order {
        price: cloud.price(&stock, disk_gib),
        stock: stock.id,
        name: create.name.clone(),
        disk_gib,
        public_key: create.env.get("PUBLIC_KEY").cloned(),
    };
    Ok(ApiResponse::json(201, &pod(&state.rent(order)?)))
}

/// `GET /v2/pods`, in pages, as the real API was observed to do.
fn pods(state: &mut CloudState, request: &Request) -> Result<ApiResponse, Refusal> {
    if let Some((name, _)) = request.query.iter().find(|(name, _)| name != "cursor") {
        return Err(invalid(format!("query parameter '{name}' not allowed")));
    }
    let begin: usize = match request.parameter("cursor") {
        None => {
            state.pass_listing();
            0
        }
        Some(cursor) => {
            cursor.strip_prefix("after-").and_then(|at| at.parse().ok()).ok_or_else(|| invalid("cursor"))?
        }
    };
    let listed = state.listed();
    let page: Vec<Value> = listed.iter().skip(begin).take(state.page_size).map(pod).collect();
    let end = begin + page.len();
    let more = end < listed.len() || state.truncates;
    let cursor = (more && !state.truncates).then(|| format!("after-{end}"));
    Ok(ApiResponse::json(200, &json!({"pods": page, "pagination": {"hasNextPage": more, "nextCursor": cursor}})))
}

/// A pod as REST v2 shows it.
fn pod(instance: &FakeInstance) -> Value {
    let (status, runs) = match instance.life {
        InstanceStatus::Booting => ("STARTING", false),
        InstanceStatus::Running => ("RUNNING", true),
        InstanceStatus::Failed => ("ERROR", false),
        InstanceStatus::Stopped => ("EXITED", false),
        InstanceStatus::Ended => ("TERMINATED", false),
    };
    let ssh = &instance.ssh;
    let bills = matches!(instance.life, InstanceStatus::Booting | InstanceStatus::Running | InstanceStatus::Failed);
    let direct = json!({
        "host": ssh.host, "port": ssh.port, "username": ssh.user,
        "command": format!("ssh {}@{} -p {}", ssh.user, ssh.host, ssh.port),
    });
    let port = json!({"private": 22, "public": ssh.port, "type": "tcp", "ip": ssh.host});
    json!({
        "id": instance.id,
        "name": instance.name,
        "image": "runpod/pytorch",
        "args": "",
        "disk": graphql::gb(instance.disk_gib),
        "ports": ["22/tcp"],
        "env": {"PUBLIC_KEY": instance.public_key},
        "registry": null,
        "status": instance.odd_status.as_deref().unwrap_or(status),
        "actions": ["terminate"],
        "mounts": {},
        "gpu": {"id": gpu_id(instance.stock.gpu), "count": instance.stock.gpus},
        "cloud": if instance.stock.secure { "SECURE" } else { "COMMUNITY" },
        "dataCenterId": instance.stock.region,
        "cudaVersion": "12.8",
        "ssh": {
            "proxy": {
                "host": "ssh.runpod.io", "port": 22, "username": format!("{}-64411eb2", instance.id),
                "command": format!("ssh {}-64411eb2@ssh.runpod.io", instance.id),
            },
            "direct": runs.then_some(direct),
        },
        "template": null,
        "cost": if bills { instance.stock.price.0.dollars() } else { 0.0 },
        "locked": false,
        "globalNetworking": {"enabled": false},
        "runtime": runs.then(|| json!({"uptime": 60, "ports": [port]})),
        "createdAt": rfc3339(instance.created_at),
        "startedAt": runs.then(|| rfc3339(instance.created_at)),
    })
}
