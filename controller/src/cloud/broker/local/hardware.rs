//! Hardware of this machine, as offers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::NAME;
use crate::cloud::broker::Offer;
use crate::files::free_disk;
use crate::units::{Bytes, Usd, UsdPerHour};

/// Fictitious price of a CPU core in millionths of a dollar per hour, close to that of clouds.
const CORE_PRICE: i64 = 10_000;
/// Fictitious price of a GPU in addition to all cores.
const GPU_PRICE: i64 = 100_000;
/// Time limit of `nvidia-smi`. It can hang on a faulty driver; then no GPU is offered.
const NVIDIA_SMI_LIMIT: Duration = Duration::from_secs(20);

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Hardware {
    /// Cores available to this process.
    pub(super) cores: u32,
    /// Memory available to this process; `None` if the system does not report it.
    pub(super) ram: Option<Bytes>,
    /// Free disk for instances.
    pub(super) disk: Option<Bytes>,
    /// NVIDIA GPUs in PCI order.
    pub(super) gpus: Vec<Gpu>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Gpu {
    /// Name by the driver.
    pub(super) raw: String,
    /// Memory by the driver; `None` for some GPUs that share the host's memory.
    pub(super) vram: Option<Bytes>,
}

/// Meaning of an offer's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Sku {
    /// CPU only.
    Cpu,
    /// A number of GPUs of one kind.
    Gpus(u32, String),
}

impl Sku {
    pub(super) fn key(&self) -> String {
        match self {
            Self::Cpu => "cpu".to_owned(),
            Self::Gpus(count, raw) => format!("gpu/{count}/{raw}"),
        }
    }

    /// Parses [`Sku::key`].
    pub(super) fn parse(key: &str) -> Option<Self> {
        if key == "cpu" {
            return Some(Self::Cpu);
        }
        let (count, raw) = key.strip_prefix("gpu/")?.split_once('/')?;
        let count = count.parse().ok().filter(|count| *count > 0)?;
        Some(Self::Gpus(count, raw.to_owned()))
    }
}

impl Hardware {
    /// Detects the hardware. `root` is the folder of instances. `nvidia_smi` is the program that
    /// lists GPUs; if it is absent, there are none.
    pub(super) async fn detect(root: &Path, nvidia_smi: &Path) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            cores: u32::try_from(cores).unwrap_or(u32::MAX),
            ram: memory(),
            disk: free_disk(root),
            gpus: list_gpus(nvidia_smi).await,
        }
    }

    /// One CPU offer, and one per number and kind of GPUs.
    pub(super) fn offers(&self) -> Vec<Offer> {
        let mut kinds: BTreeMap<&str, Vec<&Gpu>> = BTreeMap::new();
        for gpu in &self.gpus {
            kinds.entry(&gpu.raw).or_default().push(gpu);
        }
        let cpu = std::iter::once(self.offer(&Sku::Cpu, None));
        let gpus = kinds.into_iter().flat_map(|(raw, gpus)| {
            let vram = gpus.iter().filter_map(|gpu| gpu.vram).min();
            let counts = (1u32..).take(gpus.len());
            counts.map(move |count| self.offer(&Sku::Gpus(count, raw.to_owned()), vram))
        });
        cpu.chain(gpus).collect()
    }

    fn offer(&self, sku: &Sku, vram: Option<Bytes>) -> Offer {
        let (gpu_count, raw) = match sku {
            Sku::Cpu => (0, None),
            Sku::Gpus(count, raw) => (*count, Some(raw.as_str())),
        };
        let price = CORE_PRICE * i64::from(self.cores) + GPU_PRICE * i64::from(gpu_count);
        let offer = Offer {
            is_local: true,
            cpu_ram: self.ram,
            cpu_cores: Some(self.cores),
            disk: self.disk,
            ..Offer::new(NAME, sku.key(), gpu_count, UsdPerHour(Usd::from_micros(price)))
        };
        match raw {
            Some(raw) => offer.with_gpu(raw, vram),
            None => offer,
        }
    }
}

/// Memory available to this program.
pub(crate) fn memory() -> Option<Bytes> {
    let mut system = sysinfo::System::new().ok()?;
    system.refresh_memory();
    let limit = system.cgroup_limits().map(|limits| limits.total_memory).filter(|limit| *limit > 0);
    let total = system.total_memory();
    (total > 0).then(|| Bytes(limit.map_or(total, |limit| limit.min(total))))
}

async fn list_gpus(nvidia_smi: &Path) -> Vec<Gpu> {
    let mut command = Command::new(nvidia_smi);
    command.args(["--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]);
    command.stdin(Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(NVIDIA_SMI_LIMIT, command.output()).await {
        Ok(Ok(output)) if output.status.success() => parse_gpus(&String::from_utf8_lossy(&output.stdout)),
        Ok(Ok(output)) => {
            tracing::warn!(status = %output.status, "nvidia-smi failed: no GPU is offered");
            Vec::new()
        }
        // Without a driver there is no GPU, and no warning.
        Ok(Err(_)) => Vec::new(),
        Err(_) => {
            tracing::warn!("nvidia-smi did not answer: no GPU is offered");
            Vec::new()
        }
    }
}

fn parse_gpus(text: &str) -> Vec<Gpu> {
    let line = |line: &str| {
        let (raw, mib) = line.rsplit_once(',')?;
        let raw: String = raw.trim().chars().filter(|c| !c.is_control()).take(100).collect();
        let vram = mib.trim().parse().ok().filter(|mib| (1..1 << 30).contains(mib)).map(Bytes::from_mib);
        (!raw.is_empty()).then_some(Gpu { raw, vram })
    };
    text.lines().filter_map(line).collect()
}

/// The program that lists NVIDIA GPUs, from the search path.
pub(super) fn default_nvidia_smi() -> PathBuf {
    PathBuf::from("nvidia-smi")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn machine(gpus: &str) -> Hardware {
        let gpus = parse_gpus(gpus);
        Hardware { cores: 8, ram: Some(Bytes::from_gib(31)), disk: Some(Bytes::from_gib(100)), gpus }
    }

    #[test]
    fn machine_without_gpus_offers_its_cpu() {
        let offers = machine("").offers();
        let [offer] = &offers[..] else { panic!("{offers:?}") };
        assert_eq!((offer.gpu_count, offer.gpu.as_deref(), offer.cpu_cores), (0, None, Some(8)));
        assert!(offer.is_local);
        assert_eq!(offer.price, UsdPerHour::from_dollars(0.08));
    }

    #[test]
    fn machine_with_gpus_offers_each_gpu_count() {
        let offers = machine("NVIDIA H100 80GB HBM3, 81559\nNVIDIA H100 80GB HBM3, 81559\nNVIDIA L4, 23034\n").offers();
        let brief: Vec<_> = offers.iter().map(|o| (o.gpu_count, o.gpu.as_deref().unwrap_or("-"), o.vram)).collect();
        let gib = |n| Some(Bytes::from_gib(n));
        assert_eq!(brief, [(0, "-", None), (1, "H100", gib(80)), (2, "H100", gib(80)), (1, "L4", gib(24))]);
        assert!(offers.iter().all(|o| o.price.0 > Usd::ZERO));
        assert_eq!(offers[2].gpu_raw.as_deref(), Some("NVIDIA H100 80GB HBM3"));
    }

    #[test]
    fn nvidia_smi_output_is_parsed() {
        assert!(
            parse_gpus("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n").is_empty()
        );
        assert_eq!(parse_gpus("NVIDIA GB10, [N/A]\n"), [Gpu { raw: "NVIDIA GB10".to_owned(), vram: None }]);
        assert_eq!(
            parse_gpus("Odd, name, 1024\n\n"),
            [Gpu { raw: "Odd, name".to_owned(), vram: Some(Bytes::from_gib(1)) }]
        );
    }

    #[tokio::test]
    async fn detected_hardware_has_cores_and_memory() {
        let root = tempfile::tempdir().unwrap();
        let hardware = Hardware::detect(root.path(), Path::new("/no/such/nvidia-smi")).await;
        assert!(hardware.cores > 0 && hardware.ram.unwrap() > Bytes::from_mib(64) && hardware.gpus.is_empty());
    }

    proptest! {
        #[test]
        fn offer_keys_round_trip(count in 1u32..64, raw in "\\PC{1,40}") {
            let sku = Sku::Gpus(count, raw);
            prop_assert_eq!(Sku::parse(&sku.key()), Some(sku));
        }

        #[test]
        fn any_nvidia_smi_output_parses_without_panic(text in "(\\PC|\n|,){0,200}") {
            for gpu in parse_gpus(&text) {
                prop_assert!(!gpu.raw.is_empty());
            }
        }
    }
}
