//! NVIDIA GPUs, if this program was built with CUDA. Every function that returns a `Result` passes
//! on the errors of the driver; its docstring lists the others.

#[cfg(not(feature = "cuda"))]
mod absent;
#[cfg(feature = "cuda")]
mod activation;
#[cfg(feature = "cuda")]
mod attention;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "cuda")]
pub(crate) mod fused;
#[cfg(feature = "cuda")]
mod grouped;
#[cfg(feature = "cuda")]
mod host_to_device;
#[cfg(feature = "cuda")]
mod peer_copy;
#[cfg(feature = "cuda")]
mod routing;

use candle_core::{Device, Tensor};
use outliers_protocol::DeviceInfo;
use rayon::prelude::*;

#[cfg(feature = "cuda")]
pub use self::{
    activation::{PendingCopy, PendingScan, ScanSummary},
    attention::{attend, attends},
    driver::{copy_rates, find, free_memory, is_idle, oldest_driver, traffic},
    grouped::{grouped_product, takes_in_group, try_in_group},
    host_to_device::{HostToDevice, ReleaseFence, UploadFence, release_fence},
    peer_copy::PeerCopy,
    routing::{SortedPairs, choose_experts, gathered_like, sort_pairs},
};
#[cfg(not(feature = "cuda"))]
pub use absent::*;

use crate::error::{Result, WorkerError};
use crate::model::decoder::Window;

/// Values of a tensor on a GPU at most: kernels count values, and our own rows and columns, in 32
/// bits.
pub const MAX_VALUES: usize = i32::MAX as usize;
/// Bytes of the host's memory through which weights go to one GPU.
pub const PINNED: u64 = 64 << 20;

/// A GPU as its driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its name, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// All of its memory, in bytes.
    pub memory_bytes: u64,
    /// Why it is unusable; `None` if it is usable.
    pub unfit: Option<String>,
}

/// Result of GPU detection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpus {
    /// GPUs by the driver's index.
    pub gpus: Vec<Gpu>,
    /// Why none is usable; `None` if one is.
    pub why_none: Option<String>,
    /// Whether there are GPUs although none is usable: their rent is wasted.
    pub wasted: bool,
}

impl Gpus {
    /// Opens a GPU with a separate stream. On the per-thread default stream, loader and compute
    /// thread would be unordered.
    ///
    /// # Errors
    /// Device: it is missing or unusable.
    pub fn open(&self, index: usize) -> Result<Device> {
        let unusable =
            |why: &str| WorkerError::device(format!("cuda:{index} cannot be used: {why}")).hint("use --devices cpu");
        if let Some(why) = &self.why_none {
            return Err(unusable(why));
        }
        let Some(gpu) = self.gpus.get(index) else {
            return Err(unusable(&format!("there are {} GPUs", self.gpus.len())));
        };
        if let Some(why) = &gpu.unfit {
            return Err(unusable(why));
        }
        let device = Device::new_cuda_with_stream(index).map_err(|error| unusable(&error.to_string()))?;
        #[cfg(feature = "cuda")]
        {
            outliers_cuda::keep_memory(index as u32).map_err(|code| unusable(&format!("its driver's error {code}")))?;
            let opened = device.as_cuda_device().map_err(|error| unusable(&error.to_string()))?;
            outliers_cuda::order_by_own_events(&opened.cuda_stream());
        }
        Ok(device)
    }

    /// Opens all usable GPUs.
    ///
    /// # Errors
    /// Device: there are GPUs and none is usable, or a usable one does not open.
    pub fn open_all(&self) -> Result<Vec<(usize, Device)>> {
        let fit = self.gpus.iter().enumerate().filter(|(_, gpu)| gpu.unfit.is_none()).map(|(index, _)| index);
        let mut asked: Vec<usize> = fit.collect();
        if asked.is_empty() && (self.wasted || !self.gpus.is_empty()) {
            // Opening the first GPU returns the reason.
            asked.push(0);
        }
        let open = |index: usize| -> Result<(usize, Device)> { Ok((index, self.open(index)?)) };
        // At the same time: one takes up to a second.
        let opened: Vec<Result<_>> = asked.into_par_iter().map(open).collect();
        opened.into_iter().collect()
    }

    /// Descriptions for `metadata.json`, with names as in `--devices`.
    pub fn describe(&self) -> Vec<DeviceInfo> {
        let one = |(index, gpu): (usize, &Gpu)| DeviceInfo {
            name: format!("cuda:{index}"),
            description: gpu.name.clone(),
            memory_bytes: Some(gpu.memory_bytes),
        };
        self.gpus.iter().enumerate().map(one).collect()
    }
}

/// Softmax attention of whole sequences, which a GPU's kernel computes in one pass.
#[derive(Clone, Copy, Debug)]
pub struct FusedAttention<'a> {
    /// What multiplies scores.
    pub scale: f64,
    /// Which of the keys up to its own position a query sees.
    pub window: Window,
    /// `[heads]` in f32: logits that take part unscaled and have no value.
    pub sinks: Option<&'a Tensor>,
    /// Whether shares are wanted.
    pub recorded: bool,
}

/// Which rows are at position 0: rows of sequences of `tokens` each, from `first_token` on.
#[derive(Clone, Copy, Debug)]
pub struct Positions {
    /// Index of the first row's token.
    pub first_token: usize,
    /// Tokens of a sequence.
    pub tokens: usize,
}

/// Tokens routed to one expert, as summed on a GPU. Sums are exact: each is a list of windows of
/// 32 exponents `w` with a multiple of 2^(32 w - 1075).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Number of tokens.
    pub tokens: u64,
    /// Number of tokens at position 0.
    pub tokens_at_position_0: u64,
    /// Sum of the gate weights.
    pub mass: Vec<(u16, i128)>,
    /// Sum of the gate weights at position 0.
    pub mass_at_position_0: Vec<(u16, i128)>,
}

/// Bytes copied between the host and all GPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// From the host to GPUs.
    pub to_gpus: u64,
    /// From GPUs to the host.
    pub from_gpus: u64,
}

impl Traffic {
    /// Bytes copied since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self { to_gpus: self.to_gpus - earlier.to_gpus, from_gpus: self.from_gpus - earlier.from_gpus }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(unfit: Option<&str>) -> Gpu {
        Gpu { name: "X".into(), memory_bytes: 1, unfit: unfit.map(str::to_owned) }
    }

    #[test]
    fn unusable_gpus_are_reported() {
        let none = Gpus { gpus: Vec::new(), why_none: Some("no NVIDIA driver".into()), wasted: false };
        assert!(none.open_all().unwrap().is_empty(), "the CPU serves");
        assert!(none.open(0).unwrap_err().message().contains("no NVIDIA driver"));
        let wasted = Gpus { why_none: Some("cuBLAS is not there".into()), wasted: true, ..none };
        assert!(wasted.open_all().unwrap_err().message().contains("cuBLAS"));
        let old = Gpus { gpus: vec![gpu(Some("its compute capability is 7.0"))], why_none: None, wasted: false };
        assert!(old.open_all().unwrap_err().message().contains("7.0"));
        assert!(old.open(1).unwrap_err().message().contains("there are 1"), "only those that are there");
        assert_eq!(old.describe()[0].name, "cuda:0");
    }

    #[test]
    fn hardware_of_this_machine_is_described() {
        let found = find();
        assert_eq!(found.why_none.is_none(), !found.gpus.is_empty(), "{found:?}");
    }
}
