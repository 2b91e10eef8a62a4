//! Parameters and price of an offer.

use serde::{Deserialize, Serialize};

use crate::cloud::broker::Tier;
use crate::units::{Bytes, CudaVersion, Usd, UsdPerHour};

/// Minimum container disk in GB. With less, often no host is found.
const MIN_DISK: u64 = 20;
/// Price of container disk while the pod runs (RunPod, Pod pricing): $0.10 per GB and month.
const DISK_GB_HOUR: f64 = 0.10 / 730.0;
/// Maximum plausible price in dollars per hour.
const MAX_GPUS: f64 = 10_000.0;

/// An offer's key: what is rented, in RunPod's names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Sku {
    /// `id` of the GPU type.
    pub(super) gpu: String,
    pub(super) count: u32,
    pub(super) tier: Tier,
    /// Data centre; `None`: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) place: Option<String>,
    /// Minimum memory of the host in the offer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) ram_gib: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) min_cuda: Option<CudaVersion>,
    /// Dollars per hour. A pod with a bid is preemptible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) bid_per_gpu: Option<Usd>,
}

impl Sku {
    pub(super) fn key(&self) -> String {
        serde_json::to_string(self).expect("plain fields can be written")
    }
}

/// Container disk for `disk`, in RunPod's GB, which are at least 10^9 bytes.
pub(super) fn disk_gb(disk: Option<Bytes>) -> u64 {
    disk.map_or(0, |disk| disk.0.div_ceil(1_000_000_000)).max(MIN_DISK)
}

/// Price of the whole pod: `gpus` dollars per hour for its GPUs, plus its container disk.
///
/// # Errors
/// The reason, if it is not a valid price.
pub(super) fn price(gpus: f64, disk_gb: u64) -> Result<UsdPerHour, String> {
    // NaN is in no range.
    if !(0.0..=MAX_GPUS).contains(&gpus) {
        return Err("its price makes no sense".to_owned());
    }
    Ok(UsdPerHour::from_dollars(gpus + disk_gb as f64 * DISK_GB_HOUR))
}
