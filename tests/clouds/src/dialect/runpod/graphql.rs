//! The GraphQL API: four operations, distinguished by their field, with input types checked as by
//! a server.

use outliers::calendar::from_rfc3339;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{GPUS, RunPod, cuda, gpu_id, invalid, sold};
use crate::{ApiResponse, CloudState, Dialect, Op, Order, Refusal, Request, Stock};

pub(super) const SOLD_OUT: &str =
    "There are no longer any instances available with the requested specifications. Please refresh and try again.";

/// Fields, the types of their inputs, and the selectable fields of their values.
const FIELDS: [(&str, Option<&str>, &[&str], Op); 5] = [
    ("myself", None, &["id", "email", "clientBalance", "currentSpendPerHr"], Op::Check),
    ("gpuTypes", Some("GpuLowestPriceInput"), OF_TYPES, Op::Offers),
    ("podFindAndDeployOnDemand", Some("PodFindAndDeployOnDemandInput!"), OF_POD, Op::Create),
    ("podRentInterruptable", Some("PodRentInterruptableInput!"), OF_POD, Op::Create),
    ("podTerminate", Some("PodTerminateInput!"), &[], Op::Terminate),
];
const OF_POD: &[&str] = &["id", "name", "imageName", "costPerHr", "desiredStatus", "machineId", "env"];
const OF_TYPES: &[&str] = &[
    "id",
    "displayName",
    "memoryInGb",
    "lowestPrice",
    "minimumBidPrice",
    "uninterruptablePrice",
    "minVcpu",
    "minMemory",
    "stockStatus",
];

/// A GB of RunPod's in GiB.
pub(super) fn gb(disk_gib: u64) -> u64 {
    (disk_gib << 30).div_ceil(1_000_000_000)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    query: String,
    #[serde(default)]
    variables: Map<String, Value>,
}

impl Document {
    /// The field of the query.
    fn field(&self) -> Option<&'static str> {
        let words: Vec<&str> = names(&self.query).collect();
        FIELDS.iter().map(|(field, ..)| *field).find(|field| words.contains(field))
    }

    /// The value of its variable, if the document is valid.
    fn variable<T: for<'de> Deserialize<'de>>(&self, field: &str) -> Result<Option<T>, Refusal> {
        let known = FIELDS.iter().find(|(name, ..)| *name == field).ok_or_else(|| unknown(field))?;
        let (_, input, selectable, _) = known;
        let (head, body) = self.query.split_once('{').ok_or_else(|| invalid("Syntax Error: Expected \"{\""))?;
        if self.query.matches('{').count() != self.query.matches('}').count() {
            return Err(invalid("Syntax Error: Expected \"}\""));
        }
        let selected = body.split_once('{').map_or("", |(_, selected)| selected);
        let arguments = |name: &&str| !["input", "place"].contains(name);
        if let Some(other) = names(selected).filter(arguments).find(|name| !selectable.contains(name)) {
            return Err(unknown(other));
        }
        let Some(input) = input else { return Ok(None) };
        let declared = head.split_once('(').and_then(|(_, variables)| variables.split_once(')'));
        let declared = declared.and_then(|(variables, _)| variables.split_once(": "));
        let Some((name, _)) = declared.filter(|(_, kind)| kind == input) else {
            return Err(invalid(format!("Expected a variable of type \"{input}\".")));
        };
        let used = body.contains(&format!("(input: {name})"));
        let value = self.variables.get(name.trim_start_matches('$')).filter(|_| used);
        let value = value.ok_or_else(|| invalid(format!("Variable \"{name}\" is not used, or has no value.")))?;
        let read = serde_json::from_value(value.clone());
        read.map(Some).map_err(|error| invalid(format!("Variable \"{name}\" got invalid value: {error}")))
    }
}

fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|name| !name.is_empty())
}

fn unknown(name: &str) -> Refusal {
    invalid(format!("Cannot query field \"{name}\"."))
}

pub(super) fn operation(request: &Request) -> Option<Op> {
    let field = request.read::<Document>().ok()?.field()?;
    FIELDS.iter().find(|(name, ..)| *name == field).map(|(.., op)| *op)
}

/// A refusal: status 200 with `errors`, except for errors before GraphQL is parsed.
pub(super) fn refuse(refusal: &Refusal) -> ApiResponse {
    let error = |message: &str, code: &str| json!([{"message": message, "extensions": {"code": code}}]);
    let done =
        |message: &str| ApiResponse::json(200, &json!({"errors": error(message, "RUNPOD"), "data": {"pod": null}}));
    match refusal {
        Refusal::NoCapacity => done(SOLD_OUT),
        Refusal::Funds => done("Your account balance is too low to deploy a pod. Please add funds."),
        Refusal::NotFound => done("pod not found to terminate"),
        Refusal::Unauthorized => ApiResponse::json(401, &json!({"errors": error("Unauthorized", "UNAUTHENTICATED")})),
        Refusal::Invalid(message) => {
            ApiResponse::json(400, &json!({"errors": error(message, "GRAPHQL_VALIDATION_FAILED")}))
        }
        Refusal::RateLimited(after) => ApiResponse::text(429, "Too Many Requests").retry_after(*after),
        Refusal::Broken(status) => {
            let message = "Something went wrong. Please try again later or contact support.";
            ApiResponse::json(*status, &json!({"errors": error(message, "INTERNAL_SERVER_ERROR")}))
        }
    }
}

impl RunPod {
    pub(super) fn graphql(&self, state: &mut CloudState, request: &Request) -> Result<ApiResponse, Refusal> {
        let document: Document = request.read()?;
        let field = document.field().ok_or_else(|| unknown(&document.query))?;
        let needed = || invalid("an input is needed");
        let value = match field {
            "myself" => {
                document.variable::<Value>(field)?;
                json!({"id": "user_2abc", "email": "someone@example.com", "clientBalance": 42.5})
            }
            "gpuTypes" => types(state, &document.variable(field)?.ok_or_else(needed)?)?,
            "podTerminate" => {
                let input: Terminate = document.variable(field)?.ok_or_else(needed)?;
                state.end(&input.pod_id).then_some(Value::Null).ok_or(Refusal::NotFound)?
            }
            _ => self.rent(state, document.variable(field)?.ok_or_else(needed)?, field == "podRentInterruptable")?,
        };
        Ok(ApiResponse::json(200, &json!({"data": {field: value}})))
    }

    fn rent(&self, state: &mut CloudState, input: Rent, spot: bool) -> Result<Value, Refusal> {
        let deadline = input.check(spot)?;
        let stock = input.choose(state, spot)?.clone();
        // RunPod's GB may be a GiB; this is the smaller reading.
        let disk_gib = (input.container_disk_in_gb * 1_000_000_000) >> 30;
        let public_key = input.env.iter().find(|variable| variable.key == "PUBLIC_KEY");
        let order = Order {
            stock: stock.id.clone(),
            name: input.name,
            disk_gib,
            public_key: public_key.map(|variable| variable.value.clone()),
            price: self.price(&stock, disk_gib),
        };
        let id = state.rent(order)?.id;
        if let Some(deadline) = deadline {
            self.set_deadline(id.clone(), deadline);
        }
        Ok(json!({"id": id, "costPerHr": stock.price.0.dollars()}))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Terminate {
    pod_id: String,
}

/// `PodFindAndDeployOnDemandInput`, and with a bid `PodRentInterruptableInput`, without fields
/// that this fake cannot honour.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rent {
    name: String,
    image_name: String,
    cloud_type: Cloud,
    gpu_type_id: String,
    gpu_count: u32,
    container_disk_in_gb: u64,
    volume_in_gb: u64,
    ports: String,
    env: Vec<Variable>,
    start_ssh: bool,
    support_public_ip: bool,
    terminate_after: Option<String>,
    data_center_id: Option<String>,
    min_memory_in_gb: Option<u64>,
    min_cuda_version: Option<String>,
    bid_per_gpu: Option<f64>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Cloud {
    All,
    Secure,
    Community,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Variable {
    key: String,
    value: String,
}

impl Rent {
    /// The deadline, if valid.
    fn check(&self, spot: bool) -> Result<Option<u64>, Refusal> {
        let wrong = if self.bid_per_gpu.is_some() != spot {
            Some("bidPerGpu belongs to a bid, and to nothing else")
        } else if self.name.is_empty() || self.image_name.is_empty() || self.gpu_count == 0 {
            Some("name, imageName and gpuCount are required")
        } else if self.volume_in_gb > 0 {
            Some("volumeMountPath is required with a volume")
        } else if self.ports != "22/tcp" || !self.support_public_ip || !self.start_ssh {
            Some("nobody could get in")
        } else if !GPUS.iter().any(|gpu| gpu_id(*gpu) == self.gpu_type_id) {
            Some("there is no such GPU")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            return Err(invalid(wrong));
        }
        let deadline = self.terminate_after.as_deref().map(from_rfc3339);
        deadline.map(|deadline| deadline.ok_or_else(|| invalid("DateTime cannot represent it"))).transpose()
    }

    fn choose<'a>(&self, state: &'a CloudState, spot: bool) -> Result<&'a Stock, Refusal> {
        let gpu = GPUS.into_iter().find(|gpu| gpu_id(*gpu) == self.gpu_type_id).ok_or(Refusal::NoCapacity)?;
        let tiers: &[bool] = match self.cloud_type {
            Cloud::All => &[true, false],
            Cloud::Secure => &[true],
            Cloud::Community => &[false],
        };
        let min_cuda = match &self.min_cuda_version {
            Some(text) => cuda(text).ok_or_else(|| invalid("minCudaVersion"))?,
            None => (0, 0),
        };
        let fits = |stock: &&Stock| {
            let bid = self.bid_per_gpu.is_none_or(|bid| bid * f64::from(stock.gpus) >= stock.price.0.dollars() - 1e-9);
            let here = self.data_center_id.as_deref().is_none_or(|id| id == stock.region);
            let memory = self.min_memory_in_gb.is_none_or(|min| stock.ram_gib.is_some_and(|ram| ram >= min));
            stock.gpus == self.gpu_count && stock.left > 0 && stock.cuda >= min_cuda && bid && here && memory
        };
        let mut sold = tiers.iter().flat_map(|secure| sold(state, gpu, *secure, spot)).filter(fits);
        sold.next().ok_or(Refusal::NoCapacity)
    }
}

/// `GpuLowestPriceInput`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LowestPriceInput {
    gpu_count: u32,
    secure_cloud: bool,
    data_center_id: Option<String>,
    min_disk: Option<u64>,
    min_memory_in_gb: Option<u64>,
    min_cuda_version: Option<String>,
}

/// `gpuTypes`: all of them, each with the cheapest host at a place.
fn types(state: &CloudState, place: &LowestPriceInput) -> Result<Value, Refusal> {
    let min_cuda = match &place.min_cuda_version {
        Some(text) => cuda(text).ok_or_else(|| invalid("minCudaVersion"))?,
        None => (0, 0),
    };
    let fits = |stock: &&Stock| {
        let here = place.data_center_id.as_deref().is_none_or(|id| id == stock.region);
        let memory = place.min_memory_in_gb.is_none_or(|min| stock.ram_gib.is_some_and(|ram| ram >= min));
        let disk = place.min_disk.is_none_or(|disk| gb(stock.disk_gib) >= disk);
        stock.gpus == place.gpu_count && stock.left > 0 && stock.cuda >= min_cuda && here && memory && disk
    };
    let types = GPUS.into_iter().map(|gpu| {
        let hosts = |spot| sold(state, gpu, place.secure_cloud, spot).filter(fits);
        let cheapest = |spot| hosts(spot).map(|stock| stock.price.0.dollars()).reduce(f64::min);
        let all = || hosts(false).chain(hosts(true));
        let in_stock = all().next().is_some();
        json!({
            "id": gpu_id(gpu),
            "lowestPrice": {
                "minimumBidPrice": cheapest(true),
                "uninterruptablePrice": cheapest(false),
                "minVcpu": all().map(|stock| stock.cores).min(),
                "minMemory": all().map(|stock| stock.ram_gib).min().flatten(),
                "stockStatus": in_stock.then_some("Low"),
            }
        })
    });
    Ok(types.collect())
}
