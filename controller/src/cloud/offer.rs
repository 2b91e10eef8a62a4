//! The request for an instance, and the offers of brokers.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::cloud::gpu::{self, Form};
use crate::units::{Bytes, CudaVersion, UsdPerHour};

pub use self::request::GpuRequest;

pub mod request;

/// Who owns a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// A data centre.
    Secure,
    /// A private host of a marketplace.
    Community,
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Secure => "secure",
            Self::Community => "community",
        })
    }
}

/// An offer: an instance that can be rented, with its price.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// Name of the broker.
    pub broker: String,
    /// The offer is of this machine: it costs nothing and needs no boot.
    #[serde(default)]
    pub is_local: bool,
    /// Its instance may wait in a queue first, and again later. There it bills nothing, and none of
    /// its time passes.
    #[serde(default)]
    pub queued: bool,
    /// Seconds until it starts, as the queue estimates it; `None`: unknown, or there is no queue.
    #[serde(default)]
    pub starts_in_s: Option<u64>,
    /// What `create` needs to rent this offer. Only the broker interprets it.
    pub key: String,
    /// Canonical GPU name, `None` for a CPU-only machine.
    pub gpu: Option<String>,
    /// The name the cloud gave.
    pub gpu_raw: Option<String>,
    /// Form factor of the GPUs, if that name states it.
    pub form: Option<Form>,
    /// Number of GPUs.
    pub gpu_count: u32,
    /// Memory of each GPU, as it is sold: 80 GiB for a card that reports 79.2.
    pub vram: Option<Bytes>,
    /// Memory of each GPU, as the cloud reports it.
    pub vram_reported: Option<Bytes>,
    /// Compute capability of the GPUs times ten (80 for 8.0): the cloud's figure where it has one,
    /// else the model's.
    pub capability: Option<u32>,
    /// The host's processor is ARM's, on which no program for x86-64 runs.
    #[serde(default)]
    pub arm: bool,
    /// Memory of the host. `None`: unknown.
    pub cpu_ram: Option<Bytes>,
    /// CPU cores.
    pub cpu_cores: Option<u32>,
    /// Maximum disk.
    pub disk: Option<Bytes>,
    /// Price of the whole instance, including the requested disk ([`GpuRequest::min_disk`]).
    pub price: UsdPerHour,
    /// Region or data centre.
    pub region: Option<String>,
    /// Who owns the host.
    pub tier: Option<Tier>,
    /// The cloud may end the instance at any time (spot).
    #[serde(default)]
    pub spot: bool,
    /// Newest CUDA version that the host's driver supports.
    pub max_cuda: Option<CudaVersion>,
    /// Download rate, if the cloud measures it.
    pub download: Option<Bytes>,
    /// The cloud's id of the physical host, if offers state one. A bad host is not rented twice.
    pub machine: Option<String>,
}

impl Offer {
    /// An offer with only these facts. All others are unknown.
    pub fn new(broker: &str, key: String, gpu_count: u32, price: UsdPerHour) -> Self {
        Self { broker: broker.to_owned(), key, gpu_count, price, ..Self::default() }
    }

    /// Sets the raw GPU name and, if the cloud states it, the memory of each GPU.
    #[must_use]
    pub fn with_gpu(self, raw: &str, reported: Option<Bytes>) -> Self {
        Self {
            gpu: Some(gpu::canonical_name(raw, reported)),
            gpu_raw: Some(raw.to_owned()),
            form: gpu::form(raw),
            vram: gpu::nominal_vram(raw, reported),
            vram_reported: reported,
            capability: gpu::capability(raw),
            arm: gpu::is_with_arm(raw),
            ..self
        }
    }
}
