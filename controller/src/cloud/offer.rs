//! What is asked for and what can be had: a request, and an offer of a broker.

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
    /// Whoever offers it.
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

/// Something that can be rented.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// Name of the broker.
    pub broker: String,
    /// It is of this machine: it costs no real money, and there is nothing to boot.
    #[serde(default)]
    pub is_local: bool,
    /// What `create` needs to rent this offer; opaque to everyone else.
    pub key: String,
    /// Canonical GPU name, `None` for a CPU-only machine.
    pub gpu: Option<String>,
    /// The name the cloud gave.
    pub gpu_raw: Option<String>,
    /// How the GPUs sit in the host, where that name tells it.
    pub form: Option<Form>,
    /// Number of GPUs.
    pub gpu_count: u32,
    /// Memory of each GPU, as it is sold: 80 GiB for a card that reports 79.2.
    pub vram: Option<Bytes>,
    /// Memory of each GPU, as the cloud reports it.
    pub vram_reported: Option<Bytes>,
    /// Compute capability of the GPUs times ten (80 for 8.0): the cloud's figure where it has one, else the model's.
    pub capability: Option<u32>,
    /// The host's processor is ARM's, on which no program for x86-64 runs.
    #[serde(default)]
    pub arm: bool,
    /// Memory of the host; `None`: unknown, never another quantity.
    pub cpu_ram: Option<Bytes>,
    /// CPU cores.
    pub cpu_cores: Option<u32>,
    /// Disk that can be had.
    pub disk: Option<Bytes>,
    /// Whole instance, the disk asked for ([`GpuRequest::min_disk`]) included.
    pub price: UsdPerHour,
    /// Region or data centre.
    pub region: Option<String>,
    /// Who owns the host.
    pub tier: Option<Tier>,
    /// The cloud may take it back at any time.
    #[serde(default)]
    pub spot: bool,
    /// Newest CUDA version the host's driver serves.
    pub max_cuda: Option<CudaVersion>,
    /// What it downloads per second, where the cloud measures that.
    pub download: Option<Bytes>,
    /// The cloud's name for the very machine, where offers name one: a bad one is not taken twice.
    pub machine: Option<String>,
}

impl Offer {
    /// An offer of which nothing is known but this.
    pub fn new(broker: &str, key: String, gpu_count: u32, price: UsdPerHour) -> Self {
        Self { broker: broker.to_owned(), key, gpu_count, price, ..Self::default() }
    }

    /// Sets the GPUs' raw name and, where the cloud says, the memory of each.
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
