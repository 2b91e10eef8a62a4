//! Estimates the time and cost of a run. Every assumption is stated.

use std::time::Duration;

use outliers_protocol::GpuWork;
use serde::{Deserialize, Serialize};

use crate::cloud::gpu;
use crate::cloud::offer::Offer;
use crate::units::{Bytes, Usd, UsdPerHour};

/// Time from the create call to the first weight byte on a cloud: booting, SSH, upload of the
/// worker.
const START: Duration = Duration::from_secs(5 * 60);
/// Operations per second of a run on a CPU core, in f32. Measured at published widths: 72 to 88 x
/// 10^9 on a core with AVX-512 (docs/benchmarks.md, "Published widths on a CPU": the products'
/// rate times the share that a run reaches). Lower here, since other cores have narrower vectors.
const CORE: f64 = 60e9;
/// Bytes per second between a host and a GPU in each direction. Measured on an H200 with PCIe 5.0
/// x16 from pinned memory; PCIe 4.0 reaches half of it.
pub const CROSSING: f64 = 55.4e9;
/// Memory bandwidth of a GPU in bytes per second. Measured on an H200; smaller GPUs have less.
const OWN_MEMORY: f64 = 4.3e12;
/// Seconds per kernel launch. Assumed: torch takes 12 x 10^-6 including its own work.
const LAUNCH: f64 = 6e-6;
/// Maximum estimate in seconds.
const LONGEST: f64 = 1e9;

/// Data and operations of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// Weight bytes, each read once.
    pub read: Bytes,
    /// Floating-point operations.
    pub operations: f64,
    /// Assumed bytes of weights read per second, if an offer does not state a rate.
    pub read_rate: Bytes,
    /// Assumed share of a GPU's peak rate.
    pub efficiency: f64,
    /// GPU work besides arithmetic; zero if unknown.
    #[serde(default)]
    pub on_gpus: GpuWork,
}

/// Estimated time and cost, with the assumptions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Assumed seconds until the instance computes.
    pub start_seconds: f64,
    /// Assumed weight bytes read per second.
    pub read_bytes_per_second: u64,
    /// Assumed operations per second; `None`: arithmetic is not counted.
    pub operations_per_second: Option<f64>,
    /// Seconds to read the weights.
    pub read_seconds: f64,
    /// Seconds to compute.
    pub compute_seconds: Option<f64>,
    /// Seconds of copies between the host and its GPUs, and between GPUs; `None` without GPU.
    pub crossing_seconds: Option<f64>,
    /// Seconds of statistics on GPUs.
    pub statistics_seconds: Option<f64>,
    /// Seconds of kernel launches.
    pub launch_seconds: Option<f64>,
    /// The start, plus the longest of reading, copying and computing, which overlap. Statistics
    /// and launches are part of computing.
    pub seconds: f64,
    /// Assumed price.
    pub price: Option<UsdPerHour>,
    /// Price times seconds.
    pub cost: Option<Usd>,
}

impl Work {
    /// Estimate at the given rates. Arithmetic is not counted if `operations` per second is
    /// `None`.
    pub fn at(&self, start: Duration, read: Bytes, operations: Option<f64>, price: Option<UsdPerHour>) -> Estimate {
        let seconds_of = |amount: f64, rate: f64| (amount / rate).min(LONGEST);
        let read_seconds = seconds_of(self.read.0 as f64, read.0.max(1) as f64);
        let operations_per_second = operations.filter(|rate| *rate > 0.0);
        let compute_seconds = operations_per_second.map(|rate| seconds_of(self.operations, rate));
        let seconds = start.as_secs_f64() + compute_seconds.map_or(read_seconds, |compute| compute.max(read_seconds));
        Estimate {
            start_seconds: start.as_secs_f64(),
            read_bytes_per_second: read.0,
            operations_per_second,
            read_seconds,
            compute_seconds,
            crossing_seconds: None,
            statistics_seconds: None,
            launch_seconds: None,
            seconds,
            price,
            cost: price.map(|price| price.cost(Duration::from_secs_f64(seconds))),
        }
    }

    /// Adds the GPU work besides arithmetic, for this number of GPUs.
    pub fn with_gpus(&self, estimate: Estimate, gpus: u32) -> Estimate {
        if gpus == 0 {
            return estimate;
        }
        let each = |amount: u64, rate: f64| (amount as f64 / rate / f64::from(gpus)).min(LONGEST);
        let GpuWork { host_to_device_bytes, device_to_host_bytes, passed_on_bytes, statistics_bytes, launches } =
            self.on_gpus;
        let passed_on = if gpus > 1 { passed_on_bytes } else { 0 };
        // Both directions overlap.
        let crossing = each(host_to_device_bytes.max(device_to_host_bytes).saturating_add(passed_on), CROSSING);
        let statistics = each(statistics_bytes, OWN_MEMORY);
        let launch = each(launches, LAUNCH.recip());
        let computing = estimate.compute_seconds.unwrap_or(0.0) + statistics + launch;
        let seconds = estimate.start_seconds + estimate.read_seconds.max(crossing).max(computing).min(LONGEST);
        Estimate {
            crossing_seconds: Some(crossing),
            statistics_seconds: Some(statistics),
            launch_seconds: Some(launch),
            seconds,
            cost: estimate.price.map(|price| price.cost(Duration::from_secs_f64(seconds))),
            ..estimate
        }
    }

    /// Estimate for an offer. A GPU outside the table counts as the slowest in it.
    pub fn on(&self, offer: &Offer) -> Estimate {
        let start = if offer.is_local { Duration::ZERO } else { START };
        let reached = match &offer.gpu {
            Some(name) => {
                let peak = gpu::peak(name, offer.form).unwrap_or_else(gpu::slowest_peak);
                self.reached(peak * f64::from(offer.gpu_count))
            }
            None => CORE * f64::from(offer.cpu_cores.unwrap_or(1)),
        };
        let estimate = self.at(start, offer.download.unwrap_or(self.read_rate), Some(reached), Some(offer.price));
        self.with_gpus(estimate, if offer.gpu.is_some() { offer.gpu_count } else { 0 })
    }

    /// Assumed rate for a device's peak rate.
    pub fn reached(&self, peak: f64) -> f64 {
        peak * self.efficiency
    }
}

impl Estimate {
    /// Total cost for ranking. Without a price it is the maximum.
    pub fn rank(&self) -> Usd {
        self.cost.unwrap_or(Usd::from_micros(i64::MAX))
    }

    /// Whether it takes longer than `limit`.
    pub fn is_over(&self, limit: Duration) -> bool {
        self.seconds > limit.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work() -> Work {
        Work {
            read: Bytes::from_gib(100),
            operations: 3e14,
            read_rate: Bytes::from_gib(1),
            efficiency: 0.5,
            on_gpus: GpuWork::default(),
        }
    }

    #[test]
    fn what_gpus_do_beside_the_arithmetic_takes_time() {
        let on_gpus = GpuWork {
            host_to_device_bytes: 554_000_000_000,
            device_to_host_bytes: 1_000_000,
            passed_on_bytes: 554_000_000_000,
            statistics_bytes: 43_000_000_000_000,
            launches: 1_000_000,
        };
        let work = Work { read: Bytes(1), on_gpus, ..work() };
        let price = UsdPerHour::from_dollars(3.6);
        let plain = work.at(Duration::from_secs(50), Bytes::from_gib(1), Some(1e14), Some(price));
        assert_eq!(work.with_gpus(plain.clone(), 0), plain, "a CPU has nothing of it");
        let near = |got: f64, want: f64| (got - want).abs() < 1e-6 * want;
        let one = work.with_gpus(plain.clone(), 1);
        let (crossing, statistics) = (one.crossing_seconds.unwrap(), one.statistics_seconds.unwrap());
        assert!(near(crossing, 10.0) && near(statistics, 10.0) && near(one.launch_seconds.unwrap(), 6.0), "{one:?}");
        assert!(near(one.seconds, 50.0 + 3.0 + 10.0 + 6.0), "computing, as crossing is beside it: {one:?}");
        let two = work.with_gpus(plain.clone(), 2);
        assert!(near(two.crossing_seconds.unwrap(), 10.0), "half the weights each, and the hidden states: {two:?}");
        assert!(near(two.seconds, 50.0 + 11.0) && two.cost < one.cost, "{two:?}");
        let offer = Offer::new("vast", "a".into(), 1, price);
        assert!(work.on(&offer.clone().with_gpu("H100 SXM", None)).crossing_seconds.is_some());
        assert_eq!(work.on(&Offer { cpu_cores: Some(8), gpu_count: 0, ..offer }).crossing_seconds, None);
    }

    fn cpu(cores: u32) -> Offer {
        Offer { cpu_cores: Some(cores), ..Offer::new("anywhere", "cpu".into(), 0, UsdPerHour::default()) }
    }

    #[test]
    fn estimate_overlaps_reading_and_computing() {
        let (rate, price) = (Bytes::from_gib(1), Some(UsdPerHour::from_dollars(3.6)));
        let reading = work().at(Duration::ZERO, rate, None, price);
        assert_eq!((reading.seconds, reading.cost), (100.0, Some(Usd::from_dollars(0.1))));
        let computing = work().at(Duration::from_secs(50), rate, Some(1e12), None);
        assert_eq!((computing.seconds, computing.cost), (350.0, None));
        assert_eq!(work().at(Duration::ZERO, rate, Some(1e15), None).seconds, 100.0);
        let absurd = work().at(Duration::ZERO, Bytes(0), Some(1e-300), price);
        assert!(absurd.seconds <= LONGEST, "no division ends the program");
    }

    #[test]
    fn faster_dearer_instance_can_cost_less_in_total() {
        let price = UsdPerHour::from_dollars;
        let slow = Offer { download: Some(Bytes::from_mib(20)), ..Offer::new("vast", "a".into(), 1, price(1.0)) };
        let fast = Offer { download: Some(Bytes::from_gib(1)), ..Offer::new("vast", "b".into(), 1, price(3.0)) };
        let cost = |offer: Offer| work().on(&offer.with_gpu("H100 SXM", None)).rank();
        assert!(cost(fast) < cost(slow));
    }

    #[test]
    fn local_machine_has_no_start_time() {
        let here = Offer { is_local: true, ..cpu(8) };
        let there = Offer { is_local: false, ..here.clone() };
        assert_eq!(work().on(&here).start_seconds, 0.0);
        assert!(work().on(&there).start_seconds > 0.0);
        assert_eq!(work().on(&here).operations_per_second, Some(8.0 * CORE));
    }

    #[test]
    fn cpu_estimate_is_within_a_factor_of_two_of_measurements() {
        let here = cpu(2);
        let reached = work().on(&here).operations_per_second.unwrap();
        // docs/benchmarks.md: f32 products on two threads, and the share of it that runs reach.
        for (products, share) in [(183e9, 0.78), (183e9, 0.79), (211e9, 0.81), (218e9, 0.81), (218e9, 0.72)] {
            let ratio = reached / (products * share);
            assert!((0.5..2.0).contains(&ratio), "{ratio}");
        }
    }
}
