//! How long a run takes and what it costs, with every assumption said.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cloud::gpu;
use crate::cloud::offer::Offer;
use crate::units::{Bytes, Usd, UsdPerHour};

/// From the create call to the first weight byte on a cloud: booting, SSH, the worker's upload.
const START: Duration = Duration::from_secs(5 * 60);
/// Operations per second that a run reaches on a CPU core, in f32. Measured at published widths:
/// 72 to 88 x 10^9 on a core with AVX-512 (docs/benchmarks.md, "Published widths on a CPU":
/// products alone, times the share of them that a run reaches). Lower here, since others have
/// narrower vectors.
const CORE: f64 = 60e9;
/// Nothing is timed longer: what a clock can hold, and nobody rents for.
const LONGEST: f64 = 1e9;

/// What a run has to move and to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// Weights, each byte once.
    pub read: Bytes,
    /// Floating-point operations.
    pub operations: f64,
    /// Assumed where an offer does not tell: bytes of weights an instance reads per second.
    pub read_rate: Bytes,
    /// Assumed: share of a GPU's peak arithmetic that is reached.
    pub efficiency: f64,
}

/// What it takes, under its assumptions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Assumed: seconds until the instance works.
    pub start_seconds: f64,
    /// Assumed: weight bytes read per second.
    pub read_bytes_per_second: u64,
    /// Assumed: operations per second that are reached; `None`: arithmetic was left out.
    pub operations_per_second: Option<f64>,
    /// Seconds to read the weights.
    pub read_seconds: f64,
    /// Seconds to compute.
    pub compute_seconds: Option<f64>,
    /// The start, and the longer of the two: they overlap.
    pub seconds: f64,
    /// Assumed price.
    pub price: Option<UsdPerHour>,
    /// Price times time.
    pub cost: Option<Usd>,
}

impl Work {
    /// What it takes at these rates; arithmetic is left out where `operations`, those per second
    /// that are reached, is `None`.
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
            seconds,
            price,
            cost: price.map(|price| price.cost(Duration::from_secs_f64(seconds))),
        }
    }

    /// What it takes on an offer. A GPU that is not in the table counts as the slowest that is.
    pub fn on(&self, offer: &Offer) -> Estimate {
        let start = if offer.is_local { Duration::ZERO } else { START };
        let reached = match &offer.gpu {
            Some(name) => {
                let peak = gpu::peak(name, offer.form).unwrap_or_else(gpu::slowest_peak);
                self.reached(peak * f64::from(offer.gpu_count))
            }
            None => CORE * f64::from(offer.cpu_cores.unwrap_or(1)),
        };
        self.at(start, offer.download.unwrap_or(self.read_rate), Some(reached), Some(offer.price))
    }

    /// Of a device's peak, what is assumed to be reached.
    pub fn reached(&self, peak: f64) -> f64 {
        peak * self.efficiency
    }
}

impl Estimate {
    /// What the whole run costs, for an order; what has no price is no bargain.
    pub fn rank(&self) -> Usd {
        self.cost.unwrap_or(Usd::from_micros(i64::MAX))
    }

    /// Whether it takes longer than an instance may exist.
    pub fn is_over(&self, limit: Duration) -> bool {
        self.seconds > limit.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work() -> Work {
        Work { read: Bytes::from_gib(100), operations: 3e14, read_rate: Bytes::from_gib(1), efficiency: 0.5 }
    }

    fn cpu(cores: u32) -> Offer {
        Offer { cpu_cores: Some(cores), ..Offer::new("anywhere", "cpu".into(), 0, UsdPerHour::default()) }
    }

    #[test]
    fn reading_and_computing_overlap() {
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
    fn a_dearer_instance_that_is_quicker_costs_less_in_the_end() {
        let price = UsdPerHour::from_dollars;
        let slow = Offer { download: Some(Bytes::from_mib(20)), ..Offer::new("vast", "a".into(), 1, price(1.0)) };
        let fast = Offer { download: Some(Bytes::from_gib(1)), ..Offer::new("vast", "b".into(), 1, price(3.0)) };
        let cost = |offer: Offer| work().on(&offer.with_gpu("H100 SXM", None)).rank();
        assert!(cost(fast) < cost(slow));
    }

    #[test]
    fn this_machine_needs_no_start() {
        let here = Offer { is_local: true, ..cpu(8) };
        let there = Offer { is_local: false, ..here.clone() };
        assert_eq!(work().on(&here).start_seconds, 0.0);
        assert!(work().on(&there).start_seconds > 0.0);
        assert_eq!(work().on(&here).operations_per_second, Some(8.0 * CORE));
    }

    #[test]
    fn a_cpu_is_as_fast_as_it_was_measured_within_a_factor_of_two() {
        let here = cpu(2);
        let reached = work().on(&here).operations_per_second.unwrap();
        // docs/benchmarks.md: f32 products on two threads, and the share of them that runs
        // reached.
        for (products, share) in [(183e9, 0.78), (183e9, 0.79), (211e9, 0.81), (218e9, 0.81), (218e9, 0.72)] {
            let ratio = reached / (products * share);
            assert!((0.5..2.0).contains(&ratio), "{ratio}");
        }
    }
}
