//! Stock (`GET /v2/catalog/gpus`), and details of hosts from GraphQL.

use std::collections::BTreeMap;

use futures::future::try_join_all;
use futures::{StreamExt, TryStreamExt, stream};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::graphql::Operation;
use super::sku::{self, Sku};
use super::{NAME, accepted, tier_word};
use crate::cloud::broker::wire::lenient;
use crate::cloud::broker::{BrokerError, GpuRequest, Offer, Offers, Tier};
use crate::cloud::http::{Call, Http, Idempotency};
use crate::cloud::market;
use crate::units::{Bytes, CudaVersion, Usd, UsdPerHour};

/// Concurrent queries about hosts.
const AT_ONCE: usize = 4;

const HOSTS: Operation = Operation {
    field: "gpuTypes",
    query: "query Hosts($place: GpuLowestPriceInput) \
            { gpuTypes { id lowestPrice(input: $place) { minimumBidPrice minVcpu minMemory stockStatus } } }",
    effect: Idempotency::Read,
};

#[derive(Deserialize)]
struct Catalog {
    gpus: Vec<Value>,
}

/// A type of GPU. Figures are per GPU.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct GpuType {
    id: String,
    /// Nominal GB, which are GiB.
    memory: f64,
    secure: bool,
    community: bool,
    price: Prices,
    availability: String,
    #[serde(default)]
    data_centers: Vec<DataCenter>,
    #[serde(default)]
    cuda_versions: Vec<Cuda>,
}

#[derive(Deserialize)]
struct Prices {
    secure: f64,
    community: f64,
}

#[derive(Deserialize)]
struct DataCenter {
    id: String,
    availability: String,
}

#[derive(Deserialize)]
struct Cuda {
    version: CudaVersion,
    available: bool,
}

/// One type of GPU at one location, as a future offer.
#[derive(Clone)]
struct Candidate {
    sku: Sku,
    /// Available on demand. A host that is fully booked may still accept a bid.
    in_stock: bool,
    vram: Option<Bytes>,
    /// Dollars per hour for all GPUs.
    gpus: f64,
    cpu_cores: Option<u32>,
    max_cuda: Option<CudaVersion>,
}

/// Everything in stock with the wanted number of GPUs. The market applies the other filters and
/// reports what it leaves out.
pub(super) async fn offers(http: &Http, want: &GpuRequest) -> Result<Offers, BrokerError> {
    let tiers = want.tier.map_or(vec![Tier::Secure, Tier::Community], |tier| vec![tier]);
    let candidates = try_join_all(tiers.into_iter().map(|tier| catalog(http, want, tier))).await?;
    let candidates: Vec<_> = candidates.into_iter().flatten().collect();
    let hosts = hosts(http, want, candidates.iter().flatten()).await?;
    let found = candidates.into_iter().flat_map(|candidate| match candidate {
        Ok(candidate) => candidate.with_hosts(&hosts, want),
        Err(why) => vec![Err(why)],
    });
    Ok(Offers::collect(found.map(|candidate| candidate?.offer(want))))
}

async fn catalog(http: &Http, want: &GpuRequest, tier: Tier) -> Result<Vec<Result<Candidate, String>>, BrokerError> {
    let mut call = Call::get("/v2/catalog/gpus")
        .query("include", "AVAILABILITY")
        .query("product", "POD")
        .query("count", count(want))
        .query("cloud", tier_word(tier));
    if let Some(cuda) = want.min_cuda {
        call = call.query("minCudaVersion", cuda);
    }
    let reply = http.call(call).await?;
    let catalog: Catalog = accepted(&reply)?.json("a list of GPUs")?;
    Ok(catalog.gpus.into_iter().flat_map(|item| candidates(item, want, tier)).collect())
}

fn count(want: &GpuRequest) -> u32 {
    want.gpu_count.unwrap_or(1).max(1)
}

/// One per data centre in stock; one without location if the catalogue names none.
fn candidates(item: Value, want: &GpuRequest, tier: Tier) -> Vec<Result<Candidate, String>> {
    let gpu: GpuType = match serde_json::from_value(item) {
        Ok(gpu) => gpu,
        Err(_) => return vec![Err("an item of the catalogue that cannot be read".to_owned())],
    };
    // Placeholder for a host that has not reported its GPU.
    if gpu.id == "unknown" || !gpu.is_of(tier) {
        return Vec::new();
    }
    let places = gpu.data_centers.iter().filter(|place| place.availability != "NONE");
    let mut places: Vec<Option<String>> = places.map(|place| Some(place.id.clone())).collect();
    if places.is_empty() {
        places.push(None);
    }
    places.into_iter().map(|place| gpu.candidate(place, want, tier)).collect()
}

impl GpuType {
    fn is_of(&self, tier: Tier) -> bool {
        match tier {
            Tier::Secure => self.secure,
            Tier::Community => self.community,
        }
    }

    fn candidate(&self, place: Option<String>, want: &GpuRequest, tier: Tier) -> Result<Candidate, String> {
        let each = match tier {
            Tier::Secure => self.price.secure,
            Tier::Community => self.price.community,
        };
        if each <= 0.0 {
            return Err("its price makes no sense".to_owned());
        }
        let count = count(want);
        let (gpu, min_cuda) = (self.id.clone(), want.min_cuda);
        let served = self.cuda_versions.iter().filter(|cuda| cuda.available).map(|cuda| cuda.version);
        Ok(Candidate {
            sku: Sku { gpu, count, tier, place, ram_gib: None, min_cuda, bid_per_gpu: None },
            in_stock: self.availability != "NONE",
            vram: (1.0..4096.0).contains(&self.memory).then(|| Bytes::from_mib((self.memory * 1024.0) as u64)),
            gpus: each * f64::from(count),
            cpu_cores: None,
            // Any of these hosts may be rented.
            max_cuda: served.min(),
        })
    }
}

/// A location whose hosts are queried.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct HostLocation {
    secure: bool,
    data_center: Option<String>,
}

type Hosts = BTreeMap<(HostLocation, String), Host>;

#[derive(Deserialize)]
struct HostsOfType {
    id: String,
    #[serde(rename = "lowestPrice", default, deserialize_with = "lenient")]
    host: Option<Host>,
}

/// The cheapest host with this number of free GPUs. Figures are for the whole pod.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Host {
    #[serde(default, deserialize_with = "lenient")]
    minimum_bid_price: Option<f64>,
    #[serde(default, deserialize_with = "lenient")]
    min_vcpu: Option<u32>,
    /// Reported GB (125 of 128), which are GiB.
    #[serde(default, deserialize_with = "lenient")]
    min_memory: Option<u64>,
    #[serde(default, deserialize_with = "is_there")]
    stock_status: bool,
}

fn is_there<'de, D: serde::Deserializer<'de>>(from: D) -> Result<bool, D::Error> {
    Ok(!Value::deserialize(from)?.is_null())
}

/// Details of hosts. Queried only if needed, and only for requested GPUs.
async fn hosts<'a>(
    http: &Http,
    want: &GpuRequest,
    candidates: impl Iterator<Item = &'a Candidate>,
) -> Result<Hosts, BrokerError> {
    if !want.spot && want.min_cpu_ram.is_none_or(|ram| ram.0 == 0) {
        return Ok(Hosts::new());
    }
    let mut places: Vec<HostLocation> =
        candidates.filter(|candidate| candidate.is_wanted(want)).map(Candidate::place).collect();
    places.sort();
    places.dedup();
    let answers = stream::iter(places).map(|place| hosts_at(http, want, place)).buffered(AT_ONCE);
    let answers: Vec<_> = answers.try_collect().await?;
    Ok(answers.into_iter().flatten().collect())
}

async fn hosts_at(
    http: &Http,
    want: &GpuRequest,
    place: HostLocation,
) -> Result<Vec<((HostLocation, String), Host)>, BrokerError> {
    let mut input = Map::new();
    input.insert("gpuCount".to_owned(), json!(count(want)));
    input.insert("secureCloud".to_owned(), json!(place.secure));
    input.insert("minDisk".to_owned(), json!(sku::disk_gb(want.min_disk)));
    if let Some(data_center) = &place.data_center {
        input.insert("dataCenterId".to_owned(), json!(data_center));
    }
    if let Some(ram) = want.min_cpu_ram.filter(|ram| ram.0 > 0) {
        input.insert("minMemoryInGb".to_owned(), json!(ram.0.div_ceil(1 << 30)));
    }
    if let Some(cuda) = want.min_cuda {
        input.insert("minCudaVersion".to_owned(), json!(cuda.to_string()));
    }
    // Missing details are unknown.
    let types: Vec<HostsOfType> = HOSTS.ask(http, json!({"place": input})).await?.unwrap_or_default();
    let in_stock = |of_type: HostsOfType| {
        let host = of_type.host.filter(|host| host.stock_status)?;
        Some(((place.clone(), of_type.id), host))
    };
    Ok(types.into_iter().filter_map(in_stock).collect())
}

impl Candidate {
    fn place(&self) -> HostLocation {
        HostLocation { secure: self.sku.tier == Tier::Secure, data_center: self.sku.place.clone() }
    }

    /// Whether the market could select it with suitable hosts. A bid may be below any price.
    fn is_wanted(&self, want: &GpuRequest) -> bool {
        let may_match = |offer: Offer| {
            let price = if want.spot { UsdPerHour::default() } else { offer.price };
            market::may_match(&Offer { price, ..offer }, want)
        };
        (self.in_stock || want.spot) && self.clone().offer(want).is_ok_and(may_match)
    }

    /// Offers with the details of hosts: on demand, and as preemptible if requested and priced.
    fn with_hosts(mut self, hosts: &Hosts, want: &GpuRequest) -> Vec<Result<Self, String>> {
        let host = hosts.get(&(self.place(), self.sku.gpu.clone()));
        self.cpu_cores = host.and_then(|host| host.min_vcpu).filter(|cores| *cores > 0);
        self.sku.ram_gib = host.and_then(|host| host.min_memory).filter(|gib| (1..1 << 16).contains(gib));
        let bid = host.filter(|_| want.spot).and_then(|host| self.bid(host.minimum_bid_price?));
        let spot = bid.map(|bid| Self {
            sku: Sku { bid_per_gpu: Some(bid), ..self.sku.clone() },
            gpus: bid.dollars() * f64::from(self.sku.count),
            ..self.clone()
        });
        let for_good = if self.in_stock { Ok(self) } else { Err("out of stock".to_owned()) };
        [Some(for_good), spot.map(Ok)].into_iter().flatten().collect()
    }

    /// The lowest bid per GPU that adds up to `whole` dollars.
    fn bid(&self, whole: f64) -> Option<Usd> {
        let micros = (whole * 1e6 / f64::from(self.sku.count)).ceil();
        (1.0..1e10).contains(&micros).then(|| Usd::from_micros(micros as i64))
    }

    fn offer(self, want: &GpuRequest) -> Result<Offer, String> {
        let price = sku::price(self.gpus, sku::disk_gb(want.min_disk))?;
        Ok(Offer {
            cpu_ram: self.sku.ram_gib.map(Bytes::from_gib),
            cpu_cores: self.cpu_cores,
            // The disk is allocated as requested.
            disk: want.min_disk,
            region: self.sku.place.clone(),
            tier: Some(self.sku.tier),
            spot: self.sku.bid_per_gpu.is_some(),
            max_cuda: self.max_cuda,
            ..Offer::new(NAME, self.sku.key(), self.sku.count, price).with_gpu(&self.sku.gpu, self.vram)
        })
    }
}
