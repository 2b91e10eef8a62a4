//! Memory budget of streamed weights.

use candle_core::DType;
use sysinfo::System;

/// Default number of values decoded per group of experts: 256 MiB in f32.
pub const GROUP_ELEMENTS: u64 = 64 << 20;
/// Limits of a budget derived from free memory.
const MIN_BYTES: u64 = 256 << 20;
const MAX_BYTES: u64 = 4 << 30;
/// Budget where the system does not report free memory.
const USUAL: u64 = 1 << 30;

/// Bytes for weights in one memory: a quarter for the groups of experts in use, a quarter for
/// those being decoded, half for stored bytes in transit. Devices that share the memory share the
/// quarters evenly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamBudget {
    bytes: u64,
    /// Whether the user set the budget.
    asked: bool,
}

impl StreamBudget {
    /// The requested budget, or a quarter of the memory that is free now.
    pub fn new(asked: Option<u64>) -> Self {
        let free = || free_memory().map_or(USUAL, |free| (free / 4).clamp(MIN_BYTES, MAX_BYTES));
        Self { bytes: asked.unwrap_or_else(free), asked: asked.is_some() }
    }

    /// The requested budget, or the default on a machine with enough memory. For plans, which are
    /// for another machine.
    pub fn planned(asked: Option<u64>) -> Self {
        Self { bytes: asked.unwrap_or(MAX_BYTES), asked: asked.is_some() }
    }

    /// As asked for; else what a machine with little memory takes. For the memory that a run needs
    /// at least.
    pub fn least(asked: Option<u64>) -> Self {
        Self { bytes: asked.unwrap_or(MIN_BYTES), asked: asked.is_some() }
    }

    /// Values of a group of experts in a pass of this dtype, on each of `devices` that share the
    /// memory. More than [`GROUP_ELEMENTS`] only if asked for: larger ones save nothing.
    pub fn group_elements(self, compute: DType, devices: usize) -> u64 {
        let elements = self.bytes / 4 / (devices.max(1) * compute.size_in_bytes()) as u64;
        if self.asked { elements } else { elements.min(GROUP_ELEMENTS) }
    }

    /// Bytes of a file that may be held until it is hashed up to them, if a run needs `needed`
    /// bytes of the same memory besides: up to a quarter of a requested budget, or half of the
    /// memory that is free beyond `needed`.
    pub fn hash_memory(self, needed: u64) -> u64 {
        if self.asked { self.bytes / 4 } else { free_memory().unwrap_or(USUAL).saturating_sub(needed) / 2 }
    }

    /// Bytes that may be in transit from the hub or wait to be decoded.
    pub fn read_ahead(self) -> u64 {
        self.bytes / 2
    }
}

/// Bytes that this process may still allocate, by the machine and by its control group; `None` if
/// the system does not report them.
pub fn free_memory() -> Option<u64> {
    let system = System::new_all().ok()?;
    let group = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
    Some(system.available_memory().min(group))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requested_budget_is_kept_and_split() {
        let budget = StreamBudget::new(Some(1 << 30));
        assert_eq!(budget.read_ahead(), 512 << 20);
        for devices in [1, 4] {
            let elements = budget.group_elements(DType::F32, devices);
            assert_eq!(elements * 4 * 2 * devices as u64 + budget.read_ahead(), 1 << 30);
            assert_eq!(budget.group_elements(DType::BF16, devices), 2 * elements);
            assert_eq!(budget.hash_memory(64 << 30), 256 << 20);
        }
        assert!(StreamBudget::new(Some(16 << 30)).group_elements(DType::F32, 1) > GROUP_ELEMENTS);
    }

    #[test]
    fn automatic_budget_is_bounded() {
        let found = StreamBudget::new(None);
        assert!((MIN_BYTES..=MAX_BYTES).contains(&found.bytes), "{found:?}");
        assert!(found.group_elements(DType::F32, 1) <= GROUP_ELEMENTS);
        assert_eq!(StreamBudget::planned(None).group_elements(DType::BF16, 1), GROUP_ELEMENTS);
        assert_eq!(StreamBudget::least(None).read_ahead(), 128 << 20);
        assert_eq!(StreamBudget::least(Some(1 << 30)).read_ahead(), 512 << 20);
    }
}
