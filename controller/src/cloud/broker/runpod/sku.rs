//! What an offer stands for: all that renting it takes, and what it costs.

use serde::{Deserialize, Serialize};

use crate::cloud::broker::Tier;
use crate::units::{Bytes, CudaVersion, Usd, UsdPerHour};

/// Containers with less disk often find no host.
const LEAST_DISK: u64 = 20;
/// Container disk while it runs (RunPod, Pod pricing): $0.10 per GB and month.
const DISK_GB_HOUR: f64 = 0.10 / 730.0;
/// Nothing costs more per hour, in dollars.
const MOST: f64 = 10_000.0;

/// An offer's key: what is rented, in RunPod's names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Sku {
    /// `id` of the GPU type.
    pub(super) gpu: String,
    pub(super) count: u32,
    pub(super) tier: Tier,
    /// Data centre. `None`: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) place: Option<String>,
    /// Memory of the host that the offer promises.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) ram_gib: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) min_cuda: Option<CudaVersion>,
    /// Per hour; a pod with a bid may be taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) bid_per_gpu: Option<Usd>,
}

impl Sku {
    pub(super) fn key(&self) -> String {
        serde_json::to_string(self).expect("plain fields can be written")
    }
}

/// The container disk that holds `disk`, in RunPod's GB; they are at least the decimal ones.
pub(super) fn disk_gb(disk: Option<Bytes>) -> u64 {
    disk.map_or(0, |disk| disk.0.div_ceil(1_000_000_000)).max(LEAST_DISK)
}

/// Price of the whole pod: `gpus` dollars per hour for its GPUs, and its container disk.
///
/// # Errors
/// What is wrong with it, when it is no price.
pub(super) fn price(gpus: f64, disk_gb: u64) -> Result<UsdPerHour, String> {
    // NaN is in no range.
    if !(0.0..=MOST).contains(&gpus) {
        return Err("its price makes no sense".to_owned());
    }
    Ok(UsdPerHour::from_dollars(gpus + disk_gb as f64 * DISK_GB_HOUR))
}
