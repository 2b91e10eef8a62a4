//! RunPod: containers ("pods") in its own data centres and on private hosts, billed by the second.
//!
//! REST v2 lists, shows and ends pods and reports stock. GraphQL is needed for a deadline that
//! RunPod enforces (`terminateAfter`), for the memory of hosts, and for preemptible pods. Pods are
//! therefore created through GraphQL, everything else uses REST, with one account and one address.
//! If GraphQL is retired, pods are created by REST; then only the guard on the host enforces the
//! deadline, the memory of hosts is unknown, and there are no bids.

use async_trait::async_trait;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Account, ApiAccess, Broker, BrokerError, BrokerErrorKind, Capabilities, CloudKind, GpuRequest, Instance,
    InstanceId, InstanceState, Lease, Offer, Offers, Tier, wire,
};
use crate::calendar::rfc3339;
use crate::cloud::http::{Call, Http, Idempotency, Method, Response};
use crate::units::Usd;

mod graphql;
mod offers;
mod pod;
mod sku;

use graphql::Operation;
use sku::Sku;

/// The broker's name.
pub const NAME: &str = "runpod";

/// RunPod's entry in the list of clouds.
pub const CLOUD: CloudKind = CloudKind {
    name: NAME,
    key_variable: "RUNPOD_API_KEY",
    base_url: "https://api.runpod.io",
    // RunPod's own images start an SSH server that authorises `PUBLIC_KEY`.
    image: "runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404",
    key_page: "https://console.runpod.io/user/settings",
    connect: |access| Box::new(RunPod::new(access)),
};

/// Maximum pages of a listing.
const MAX_PAGES: usize = 1000;

const MYSELF: Operation = Operation {
    field: "myself",
    query: "query Myself { myself { id email clientBalance } }",
    effect: Idempotency::Read,
};
const DEPLOY: Operation = Operation {
    field: "podFindAndDeployOnDemand",
    query: "mutation Deploy($input: PodFindAndDeployOnDemandInput!) \
            { podFindAndDeployOnDemand(input: $input) { id costPerHr } }",
    effect: Idempotency::Once,
};
/// Rents by bid. RunPod intends to remove this mutation; a refusal will then say so.
const RENT: Operation = Operation {
    field: "podRentInterruptable",
    query: "mutation Rent($input: PodRentInterruptableInput!) { podRentInterruptable(input: $input) { id costPerHr } }",
    effect: Idempotency::Once,
};

/// One account at RunPod.
#[derive(Clone, Debug)]
pub struct RunPod {
    http: Http,
    image: String,
}

impl RunPod {
    /// Creates a broker with `access`.
    pub fn new(access: ApiAccess) -> Self {
        Self { http: access.http, image: access.image }
    }

    /// Input of the mutation that creates a pod (GraphQL, `PodFindAndDeployOnDemandInput`).
    fn order(&self, sku: &Sku, lease: &Lease) -> Value {
        let mut order = json!({
            "name": lease.tag.to_string(),
            "imageName": self.image,
            "cloudType": tier_word(sku.tier),
            "gpuTypeId": sku.gpu,
            "gpuCount": sku.count,
            "containerDiskInGb": sku::disk_gb(Some(lease.disk)),
            "volumeInGb": 0,
            "ports": "22/tcp",
            // Without it some hosts forward no port, and RunPod's SSH gateway transfers no files.
            "supportPublicIp": true,
            // With a key given, it does not add those of the account.
            "startSsh": true,
            "env": [{"key": "PUBLIC_KEY", "value": lease.ssh_public_key.trim()}],
            "terminateAfter": rfc3339(lease.tag.deadline),
        });
        if let Some(place) = &sku.place {
            order["dataCenterId"] = json!(place);
        }
        if let Some(ram) = sku.ram_gib {
            order["minMemoryInGb"] = json!(ram);
        }
        if let Some(cuda) = sku.min_cuda {
            order["minCudaVersion"] = json!(cuda.to_string());
        }
        if let Some(bid) = sku.bid_per_gpu {
            order["bidPerGpu"] = json!(bid.dollars());
        }
        order
    }

    /// Creates a pod by `POST /v2/pods`, which supports neither deadlines nor bids.
    async fn create_by_rest(&self, sku: &Sku, lease: &Lease) -> Result<Instance, BrokerError> {
        if sku.bid_per_gpu.is_some() {
            let message = "it takes no bids any more: its GraphQL API is gone, and REST has none";
            return Err(self.http.error(BrokerErrorKind::Rejected, message));
        }
        let call = Call::new(Method::POST, "/v2/pods", Idempotency::Once).body(self.rest_order(sku, lease));
        let reply = self.http.call(call).await?;
        if !reply.is_success() {
            // Missing capacity is a plain 400 with a message.
            let sold_out = graphql::says_no_capacity(&reply.in_words());
            return Err(reply.refusal(if sold_out { BrokerErrorKind::NoCapacity } else { refused(reply.status) }));
        }
        let made = reply.json::<pod::Pod>("a pod")?.instance();
        made.ok_or_else(|| reply.error(BrokerErrorKind::Maybe, "the new pod is said to have ended"))
    }

    /// Input of REST v2 (`CreatePodRequest`).
    fn rest_order(&self, sku: &Sku, lease: &Lease) -> Value {
        let mut order = json!({
            "name": lease.tag.to_string(),
            "image": self.image,
            "cloud": tier_word(sku.tier),
            "gpu": {"id": sku.gpu, "count": sku.count},
            "disk": sku::disk_gb(Some(lease.disk)),
            "ports": ["22/tcp"],
            // With a key given, it does not add those of the account.
            "env": {"PUBLIC_KEY": lease.ssh_public_key.trim()},
            "startSsh": true,
        });
        if let Some(place) = &sku.place {
            order["dataCenterIds"] = json!([place]);
        }
        if let Some(cuda) = sku.min_cuda {
            order["gpu"]["minCudaVersion"] = json!(cuda.to_string());
        }
        order
    }

    /// One page of `GET /v2/pods`. Pages are undocumented, but the server returns them.
    async fn page(&self, cursor: Option<&str>) -> Result<pod::Page, BrokerError> {
        let call = Call::get("/v2/pods");
        let call = match cursor {
            Some(cursor) => call.query("cursor", cursor),
            None => call,
        };
        accepted(&self.http.call(call).await?)?.json("a list of pods")
    }

    /// The path of a pod. Ids are letters and digits; nothing else gets into a URL, where it could
    /// name something else.
    fn path(&self, id: &InstanceId) -> Result<String, BrokerError> {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if id.0.is_empty() || !id.0.bytes().all(known) {
            return Err(wire::no_id(&self.http, id));
        }
        Ok(format!("/v2/pods/{id}"))
    }
}

/// Requested fields of `myself`.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Myself {
    id: Option<String>,
    email: Option<String>,
    client_balance: Option<f64>,
}

/// Requested fields of a new pod.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Created {
    id: String,
    #[serde(default, deserialize_with = "wire::lenient")]
    cost_per_hr: Option<f64>,
}

#[async_trait]
impl Broker for RunPod {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { server_deadline: true, self_destruct: true, spot: true }
    }

    fn clock_skew(&self) -> Option<i64> {
        self.http.clock_skew()
    }

    async fn check(&self) -> Result<Account, BrokerError> {
        // REST v2 has no account, and a key without access to GraphQL cannot rent.
        let Some(myself) = MYSELF.ask::<Myself>(&self.http, json!({})).await? else {
            self.page(None).await?;
            return Ok(Account::default());
        };
        let balance = myself.client_balance.filter(|balance| balance.abs() < 1e9).map(Usd::from_dollars);
        Ok(Account { who: myself.email.or(myself.id), balance })
    }

    async fn offers(&self, want: &GpuRequest) -> Result<Offers, BrokerError> {
        offers::offers(&self.http, want).await
    }

    async fn create(&self, offer: &Offer, lease: &Lease) -> Result<Instance, BrokerError> {
        let sku: Sku = wire::sku(&self.http, offer)?;
        let operation = if sku.bid_per_gpu.is_some() { RENT } else { DEPLOY };
        let created = operation.ask::<Created>(&self.http, json!({"input": self.order(&sku, lease)})).await?;
        let Some(created) = created else { return self.create_by_rest(&sku, lease).await };
        let disk = sku::disk_gb(Some(lease.disk));
        Ok(Instance {
            price: created.cost_per_hr.filter(|gpus| *gpus > 0.0).and_then(|gpus| sku::price(gpus, disk).ok()),
            hardware: wire::hardware(sku.count, &sku.gpu, None),
            ..Instance::new(NAME, created.id, lease.tag.to_string(), InstanceState::Booting)
        })
    }

    async fn list(&self) -> Result<Vec<Instance>, BrokerError> {
        let mut found = Vec::new();
        let mut cursor = None;
        for _ in 0..MAX_PAGES {
            let page = self.page(cursor.as_deref()).await?;
            let next = page.next().map_err(|why| self.http.error(BrokerErrorKind::Unavailable, why))?;
            if next.is_some() && next == cursor {
                return Err(self.http.error(BrokerErrorKind::Unavailable, "its list of pods repeats a page"));
            }
            found.extend(wire::entries(NAME, &page.pods, |pod: pod::Pod| pod.instance()));
            if next.is_none() {
                return Ok(found);
            }
            cursor = next;
        }
        let message = format!("its list of pods does not end after {MAX_PAGES} pages");
        Err(self.http.error(BrokerErrorKind::Unavailable, message))
    }

    async fn get(&self, id: &InstanceId) -> Result<Option<Instance>, BrokerError> {
        let reply = self.http.call(Call::get(self.path(id)?)).await?;
        if is_gone(&reply) {
            return Ok(None);
        }
        let pod: Value = accepted(&reply)?.json("a pod")?;
        wire::alone(&reply, NAME, id, &pod, |pod: pod::Pod| pod.instance())
    }

    async fn terminate(&self, id: &InstanceId) -> Result<(), BrokerError> {
        let reply = self.http.call(Call::new(Method::DELETE, self.path(id)?, Idempotency::Idempotent)).await?;
        match accepted(&reply) {
            _ if is_gone(&reply) => Ok(()),
            // Any other success comes from a proxy.
            Ok(_) if reply.status != 204 => {
                Err(reply.error(reply.unclear(), format!("it did not end: {}", reply.in_words())))
            }
            accepted => accepted.map(drop),
        }
    }

    fn self_destruct(&self) -> Option<&'static str> {
        Some(include_str!("runpod/self_destruct.sh"))
    }
}

/// The reply, unless RunPod refused (REST v2, `application/problem+json`).
fn accepted(reply: &Response) -> Result<&Response, BrokerError> {
    if reply.is_success() { Ok(reply) } else { Err(reply.refusal(refused(reply.status))) }
}

/// Whether the API reports that the pod does not exist. An error page of a proxy does not count.
fn is_gone(reply: &Response) -> bool {
    reply.status == 404 && reply.value().is_some_and(|value| value.get("detail").is_some())
}

/// Kind of a refusal by its status.
fn refused(status: u16) -> BrokerErrorKind {
    match status {
        401 | 403 => BrokerErrorKind::Auth,
        402 => BrokerErrorKind::Budget,
        404 => BrokerErrorKind::NotFound,
        400..500 => BrokerErrorKind::Rejected,
        _ => BrokerErrorKind::Unavailable,
    }
}

/// RunPod's name for the kind of host.
fn tier_word(tier: Tier) -> &'static str {
    match tier {
        Tier::Secure => "SECURE",
        Tier::Community => "COMMUNITY",
    }
}

#[cfg(test)]
mod tests;
