//! Offers of all brokers: filtered in a fixed order, ranked by what the whole run costs there, and explained when nothing is left.
//!
//! Every filter counts what it removed. When one removes the last offers, the error names it, says what the nearest of those
//! offers had, and which single option would have let an offer through, since a query that finds nothing says nothing about why.
//!
//! What `--gpu-count` means when it is not given: one GPU on a cloud. On the local broker: whatever is there, the CPU alone if need
//! be, unless `--gpu-filter` or `--min-vram` asks for a GPU.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Serialize, Serializer};

use crate::broker::{GpuRequest, Offer, local};
use crate::estimate::Work;
use crate::gpu;
use crate::units::{Bytes, Usd, UsdPerHour};

/// What removes offers, in the order in which it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// Who made the GPU: the worker computes on NVIDIA's.
    Maker,
    /// The host's processor: the worker is a program for x86-64.
    Processor,
    /// Whether the GPU is new enough for the worker.
    Capability,
    /// What the cloud may take back.
    Spot,
    /// Name of the GPU.
    GpuFilter,
    /// Number of GPUs.
    GpuCount,
    /// Memory of each GPU.
    MinVram,
    /// Memory of the host.
    MinCpuRam,
    /// Free disk.
    MinDisk,
    /// CUDA version of the host's driver.
    MinCuda,
    /// The same, as the worker needs it.
    WorkerCuda,
    /// Region or data centre.
    Region,
    /// Data centre or not.
    Tier,
    /// Price of the whole instance.
    MaxPrice,
}

impl Filter {
    /// All, in the order in which they are applied.
    pub const ALL: [Self; 14] = [
        Self::Maker,
        Self::Processor,
        Self::Capability,
        Self::Spot,
        Self::GpuFilter,
        Self::GpuCount,
        Self::MinVram,
        Self::MinCpuRam,
        Self::MinDisk,
        Self::MinCuda,
        Self::WorkerCuda,
        Self::Region,
        Self::Tier,
        Self::MaxPrice,
    ];

    /// The command line's option.
    pub const fn option(self) -> &'static str {
        match self {
            Self::Maker => "NVIDIA only",
            Self::Processor => "x86-64 only",
            Self::Capability => "compute capability 8.0",
            Self::Spot => "--spot",
            Self::MinCuda => "--min-cuda",
            Self::WorkerCuda => "a driver for the worker",
            Self::Region => "--region",
            Self::Tier => "--secure or --community",
            Self::GpuFilter => "--gpu-filter",
            Self::GpuCount => "--gpu-count",
            Self::MinVram => "--min-vram",
            Self::MinCpuRam => "--min-cpu-ram",
            Self::MinDisk => "--min-disk",
            Self::MaxPrice => "--max-price",
        }
    }

    /// The option as it would be typed, `None` if `want` does not restrict by it.
    fn typed(self, want: &GpuRequest) -> Option<String> {
        let value = match self {
            Self::Capability if want.gpu_count == Some(0) => return None,
            Self::Maker | Self::Processor | Self::Capability => return Some(self.option().to_owned()),
            Self::Spot if want.spot => return None,
            Self::Spot => return Some("no --spot (the default)".to_owned()),
            Self::Tier => return want.tier.map(|tier| format!("--{tier}")),
            Self::MinCuda => want.min_cuda?.to_string(),
            Self::WorkerCuda => return Some(format!("{} (CUDA {})", self.option(), want.worker_cuda?)),
            Self::Region => want.region.as_ref().filter(|r| !r.trim().is_empty())?.trim().to_owned(),
            Self::GpuFilter => want.gpu_filter.as_ref().filter(|f| !f.trim().is_empty())?.trim().to_owned(),
            Self::GpuCount => match want.gpu_count {
                Some(0) => return None,
                Some(count) => count.to_string(),
                None => "1 (the default)".to_owned(),
            },
            Self::MinVram => gib(want.min_vram.filter(|b| b.0 > 0)?),
            Self::MinCpuRam => gib(want.min_cpu_ram.filter(|b| b.0 > 0)?),
            Self::MinDisk => gib(want.min_disk.filter(|b| b.0 > 0)?),
            Self::MaxPrice => dollars(want.max_price?),
        };
        Some(format!("{} {value}", self.option()))
    }

    /// Whether it restricts without having been asked for.
    fn is_default(self, want: &GpuRequest) -> bool {
        match self {
            Self::Maker | Self::Processor | Self::Capability | Self::Spot | Self::WorkerCuda => true,
            Self::GpuCount => want.gpu_count.is_none(),
            _ => false,
        }
    }

    /// Whether `offer` passes.
    fn passes(self, offer: &Offer, want: &GpuRequest) -> bool {
        let at_least = |has: Option<Bytes>, min: Option<Bytes>| match min {
            // What is not known is not enough.
            Some(min) if min.0 > 0 => has.is_some_and(|has| has >= min),
            _ => true,
        };
        match self {
            Self::Maker => offer.gpu_raw.as_deref().is_none_or(gpu::is_nvidia),
            Self::Processor => !offer.arm,
            // Of this machine's GPUs the worker itself says whether it can use them. A new model may be in no table.
            Self::Capability => {
                let of_no_use = |has| has < gpu::LEAST_CAPABILITY;
                want.gpu_count == Some(0) || offer.broker == local::NAME || !offer.capability.is_some_and(of_no_use)
            }
            Self::Spot => want.spot || !offer.spot,
            Self::Tier => want.tier.is_none_or(|tier| offer.tier == Some(tier)),
            Self::MinCuda => want.min_cuda.is_none_or(|min| offer.max_cuda.is_some_and(|max| max >= min)),
            // What is not known is seen on the host before the worker is pushed.
            Self::WorkerCuda => want.worker_cuda.is_none_or(|need| offer.max_cuda.is_none_or(|max| max >= need)),
            Self::Region => want.region.as_deref().is_none_or(|region| is_in(offer, region)),
            Self::GpuFilter => want.gpu_filter.as_deref().is_none_or(|filter| is_named(offer, filter)),
            Self::GpuCount => match want.gpu_count {
                Some(0) => true,
                Some(count) => offer.gpu_count == count,
                None => offer.broker == local::NAME || offer.gpu_count == 1,
            },
            Self::MinVram => at_least(offer.vram, want.min_vram),
            Self::MinCpuRam => at_least(offer.cpu_ram, want.min_cpu_ram),
            Self::MinDisk => at_least(offer.disk, want.min_disk),
            Self::MaxPrice => want.max_price.is_none_or(|max| offer.price <= max),
        }
    }

    /// Whether `offer` fails only for want of a figure.
    fn is_unknown(self, offer: &Offer) -> bool {
        match self {
            Self::MinVram => offer.gpu_count > 0 && offer.vram.is_none(),
            Self::MinCpuRam => offer.cpu_ram.is_none(),
            Self::MinDisk => offer.disk.is_none(),
            Self::MinCuda => offer.max_cuda.is_none(),
            Self::Region => offer.region.is_none(),
            Self::Tier => offer.tier.is_none(),
            Self::Maker | Self::Processor | Self::Capability | Self::Spot | Self::WorkerCuda => false,
            Self::GpuFilter | Self::GpuCount | Self::MaxPrice => false,
        }
    }

    /// How far `offer` is from passing; less is nearer.
    fn distance(self, offer: &Offer, want: &GpuRequest) -> u64 {
        let short = |has: Option<Bytes>| has.map_or(u64::MAX, |has| u64::MAX - 1 - has.0);
        match self {
            Self::GpuFilter => u64::from(offer.gpu_count == 0),
            Self::Maker | Self::Processor | Self::Spot | Self::Region | Self::Tier => 0,
            Self::Capability => offer.capability.map_or(u64::MAX, |has| u64::from(u32::MAX - has)),
            Self::MinCuda | Self::WorkerCuda => offer
                .max_cuda
                .map_or(u64::MAX, |max| u64::from(u32::MAX - max.major) << 32 | u64::from(u32::MAX - max.minor)),
            Self::GpuCount => u64::from(offer.gpu_count.abs_diff(want.gpu_count.unwrap_or(1))),
            Self::MinVram => short(offer.vram),
            Self::MinCpuRam => short(offer.cpu_ram),
            Self::MinDisk => short(offer.disk),
            Self::MaxPrice => offer.price.0.micros().unsigned_abs(),
        }
    }

    /// Whether it is what the worker needs, and nothing that was typed.
    const fn is_fixed(self) -> bool {
        matches!(self, Self::Maker | Self::Processor | Self::Capability | Self::WorkerCuda)
    }

    /// What the option would have to say for `offer` to pass; `None`: it cannot be said.
    fn relaxed(self, offer: &Offer) -> Option<String> {
        if self.is_unknown(offer) {
            return Some(format!("no {}", self.option()));
        }
        // Rounded to what lets the offer pass, not to the nearest.
        let down = |bytes: Bytes| format!("{}", (bytes.gib() * 10.0).floor() / 10.0);
        let value = match self {
            Self::Maker | Self::Processor | Self::Capability | Self::WorkerCuda => return None,
            Self::Spot => return Some(self.option().to_owned()),
            Self::Tier => return Some(format!("--{}", offer.tier?)),
            Self::MinCuda => offer.max_cuda?.to_string(),
            Self::Region => offer.region.clone()?,
            Self::GpuFilter => match &offer.gpu {
                Some(name) => name.clone(),
                None => return Some(format!("no {}", self.option())),
            },
            Self::GpuCount => offer.gpu_count.to_string(),
            Self::MinVram if offer.gpu_count == 0 => return Some(format!("no {}", self.option())),
            Self::MinVram => down(offer.vram?),
            Self::MinCpuRam => down(offer.cpu_ram?),
            Self::MinDisk => down(offer.disk?),
            Self::MaxPrice => format!("{}", (offer.price.0.dollars() * 100.0 - 1e-6).ceil() / 100.0),
        };
        Some(format!("{} {value}", self.option()))
    }
}

/// What one filter did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// The filter.
    pub filter: Filter,
    /// As it would be typed.
    pub option: String,
    /// Offers it removed.
    pub removed: usize,
    /// Those among them that may have enough, but do not say how much.
    pub removed_unknown: usize,
    /// Offers it left.
    pub left: usize,
}

/// Offers that pass, best first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Selection {
    /// At least one, ascending by what the whole run costs there.
    pub offers: Vec<Offer>,
    /// Offers there were.
    pub considered: usize,
    /// The filters that were asked for, in order.
    pub steps: Vec<Step>,
}

/// No offer is left.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum NothingLeft {
    /// There was none to begin with.
    #[error("no broker has an offer")]
    NoOffers,
    /// One filter removed the last.
    #[error("{0}")]
    Filtered(Box<Filtered>),
}

/// Which filter left nothing, and what would have left something.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Filtered {
    /// The filters up to the one that left nothing, which is the last.
    pub steps: Vec<Step>,
    /// Offers there were.
    pub considered: usize,
    /// Why the last filter removed what it removed.
    pub reason: String,
    /// Of the offers it removed, the one nearest to passing.
    pub nearest: Offer,
    /// The smallest change of a single option after which an offer passes all filters; `None`: more than one has to change, or none
    /// can.
    pub relaxation: Option<Relaxation>,
    /// What the worker needs is what none of the offers has, whatever is typed.
    pub is_fixed: bool,
}

/// A change of one option, and what it finds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Relaxation {
    /// Which filter.
    pub filter: Filter,
    /// What to type instead.
    pub option: String,
    /// The cheapest offer that then passes.
    pub offer: Offer,
}

impl Serialize for NothingLeft {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::NoOffers => Filtering { message: self.to_string(), details: None },
            Self::Filtered(filtered) => Filtering { message: self.to_string(), details: Some(filtered) },
        }
        .serialize(serializer)
    }
}

#[derive(Serialize)]
struct Filtering<'a> {
    message: String,
    #[serde(flatten)]
    details: Option<&'a Filtered>,
}

/// The offers that satisfy `want`, best for `work` first.
///
/// # Errors
/// None does; the error says why.
pub fn select(offers: Vec<Offer>, want: &GpuRequest, work: &Work) -> Result<Selection, NothingLeft> {
    if offers.is_empty() {
        return Err(NothingLeft::NoOffers);
    }
    let considered = offers.len();
    let mut left = rank(offers.clone(), work);
    let mut steps = Vec::new();
    for filter in Filter::ALL {
        let Some(option) = filter.typed(want) else { continue };
        let (passed, removed): (Vec<_>, Vec<_>) = left.into_iter().partition(|offer| filter.passes(offer, want));
        // A default that changes nothing was not asked for.
        if removed.is_empty() && filter.is_default(want) {
            left = passed;
            continue;
        }
        let removed_unknown = removed.iter().filter(|offer| filter.is_unknown(offer)).count();
        steps.push(Step { filter, option, removed: removed.len(), removed_unknown, left: passed.len() });
        if passed.is_empty() {
            return Err(explain(filter, steps, &offers, &removed, want));
        }
        left = passed;
    }
    Ok(Selection { offers: left, considered, steps })
}

/// The request for what a worker with CUDA can use, where none is at hand to be asked.
pub fn for_the_worker(want: GpuRequest) -> GpuRequest {
    let cuda = (want.gpu_count != Some(0)).then_some(gpu::OLDEST_CUDA);
    GpuRequest { worker_cuda: want.worker_cuda.or(cuda), ..want }
}

/// Whether an offer may come to satisfy `want` once more of it is known: with the figures that it has, everything that is kept
/// passes. For brokers that leave out what nobody would take before they ask further.
pub fn may_match(offer: &Offer, want: &GpuRequest) -> bool {
    Filter::ALL.into_iter().all(|filter| filter.passes(offer, want) || filter.is_unknown(offer))
}

fn rank(offers: Vec<Offer>, work: &Work) -> Vec<Offer> {
    let mut ranked: Vec<(Usd, Offer)> = offers.into_iter().map(|offer| (work.on(&offer).rank(), offer)).collect();
    // The rest of the key only makes the order the same every time.
    ranked.sort_by(|(cost, a), (other, b)| {
        let key = |offer: &Offer| (offer.price, offer.gpu_count);
        (cost, key(a), &a.broker, &a.key).cmp(&(other, key(b), &b.broker, &b.key))
    });
    ranked.into_iter().map(|(_, offer)| offer).collect()
}

/// Two letters are the code of a country, a state or a continent (`EUR-IS-1`), and as such a word: `us` is no part of `Russia`.
fn is_in(offer: &Offer, region: &str) -> bool {
    let (has, wanted) = (offer.region.as_deref().unwrap_or_default().to_lowercase(), region.trim().to_lowercase());
    if wanted.chars().count() == 2 {
        let mut words = has.split(|c: char| !c.is_alphanumeric());
        return words.any(|word| word.starts_with(&wanted) && word.chars().count() <= 3);
    }
    has.contains(&wanted)
}

fn is_named(offer: &Offer, filter: &str) -> bool {
    let filter = filter.trim();
    let names = [gpu_name(offer), offer.gpu_raw.clone()];
    filter.is_empty() || names.iter().flatten().any(|name| gpu::matches(filter, name))
}

/// The canonical name with the form, where that is known.
fn gpu_name(offer: &Offer) -> Option<String> {
    let name = offer.gpu.as_ref()?;
    Some(offer.form.map_or_else(|| name.clone(), |form| format!("{name} {form}")))
}

fn explain(filter: Filter, steps: Vec<Step>, offers: &[Offer], removed: &[Offer], want: &GpuRequest) -> NothingLeft {
    let nearest = removed.iter().min_by_key(|offer| (filter.distance(offer, want), offer.price));
    let Some(nearest) = nearest.cloned() else { return NothingLeft::NoOffers };
    let reason = reason(filter, &steps, removed, &nearest);
    let relaxation = relax(filter, offers, want);
    let usable = |offer: &Offer| Filter::ALL.into_iter().filter(|f| f.is_fixed()).all(|f| f.passes(offer, want));
    let is_fixed = !offers.iter().any(usable);
    let considered = offers.len();
    NothingLeft::Filtered(Box::new(Filtered { steps, considered, reason, nearest, relaxation, is_fixed }))
}

fn reason(filter: Filter, steps: &[Step], removed: &[Offer], nearest: &Offer) -> String {
    let unknown = steps.last().map_or(0, |step| step.removed_unknown);
    let without_gpu = removed.iter().all(|offer| offer.gpu_count == 0);
    let most = |what: &str, has: Option<Bytes>| match has {
        Some(has) if unknown > 0 => {
            format!("the most is {} of {what}, and {unknown} do not say how much", gib_text(has))
        }
        Some(has) => format!("the most is {} of {what}", gib_text(has)),
        None => format!("none says how much {what} it has, and unknown is not enough"),
    };
    match filter {
        Filter::GpuFilter | Filter::GpuCount | Filter::MinVram if without_gpu => no_gpu(removed),
        Filter::Maker => format!("the GPUs are {}", names(removed)),
        Filter::Processor => format!("beside {} is an ARM processor", names(removed)),
        Filter::Capability => format!("the worker needs bf16, from Ampere on; the GPUs are {}", names(removed)),
        Filter::Spot => "the cloud may take them back at any time".to_owned(),
        Filter::Tier => "the others are of the other kind, or do not say".to_owned(),
        Filter::Region => format!("the regions are {}", regions(removed)),
        Filter::MinCuda | Filter::WorkerCuda => match nearest.max_cuda {
            Some(max) => format!("the newest is CUDA {max}"),
            None => "none says which CUDA version its driver serves, and unknown is not enough".to_owned(),
        },
        Filter::GpuFilter => format!("the GPUs are {}", names(removed)),
        Filter::GpuCount => format!("the nearest has {}", nearest.gpu_count),
        Filter::MinVram => most("memory per GPU", nearest.vram),
        Filter::MinCpuRam => most("memory", nearest.cpu_ram),
        Filter::MinDisk => most("free disk", nearest.disk),
        Filter::MaxPrice => format!("the cheapest is {}", nearest.price),
    }
}

fn no_gpu(removed: &[Offer]) -> String {
    let here = removed.iter().all(|offer| offer.broker == local::NAME);
    if here { "this machine has no NVIDIA GPU".to_owned() } else { "none has a GPU".to_owned() }
}

fn names(offers: &[Offer]) -> String {
    some_of(offers.iter().filter_map(|offer| offer.gpu.as_deref()))
}

fn regions(offers: &[Offer]) -> String {
    some_of(offers.iter().map(|offer| offer.region.as_deref().unwrap_or("not told")))
}

/// Each once, the first twenty.
fn some_of<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: BTreeSet<&str> = names.collect();
    let more = if names.len() > 20 { ", ..." } else { "" };
    names.into_iter().take(20).collect::<Vec<_>>().join(", ") + more
}

/// The filter that removed the last offers first, then the others: whatever single one, left out, lets an offer through.
fn relax(last: Filter, offers: &[Offer], want: &GpuRequest) -> Option<Relaxation> {
    let others = Filter::ALL.into_iter().filter(|filter| *filter != last);
    std::iter::once(last).chain(others).find_map(|filter| {
        filter.typed(want)?;
        let rest = || Filter::ALL.into_iter().filter(|other| *other != filter);
        let through = offers.iter().filter(|offer| rest().all(|other| other.passes(offer, want)));
        let offer = through.min_by_key(|offer| (filter.distance(offer, want), offer.price))?;
        Some(Relaxation { filter, option: filter.relaxed(offer)?, offer: offer.clone() })
    })
}

impl fmt::Display for Filtered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(step) = self.steps.last() {
            let offers = if step.removed == 1 { "offer" } else { "offers" };
            write!(f, "{} removed the last {} {offers}", step.option, step.removed)?;
        }
        if self.steps.len() > 1 {
            let before = self.steps[..self.steps.len() - 1].iter().filter(|step| step.removed > 0);
            let before: Vec<_> = before.map(|step| format!("{} {}", step.option, step.removed)).collect();
            if !before.is_empty() {
                write!(f, " of {} (before it: {})", self.considered, before.join(", "))?;
            }
        }
        write!(f, ": {} (nearest: {})", self.reason, describe(&self.nearest))?;
        match &self.relaxation {
            Some(found) => write!(f, "; {} would find {}", found.option, describe(&found.offer)),
            None if self.is_fixed => write!(f, "; no option changes that"),
            None => write!(f, "; no single option is in the way alone: more than one has to be relaxed"),
        }
    }
}

/// An offer in a line: its hardware, its price, and its broker unless it is this machine.
pub fn describe(offer: &Offer) -> String {
    let hardware = Some(hardware(offer)).filter(|hardware| !hardware.is_empty());
    let broker = (offer.broker != local::NAME).then(|| format!("on {}", offer.broker));
    [hardware, Some(offer.price.to_string()), broker].into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// What an offer is of: GPUs, cores, memory, disk, place and kind.
pub fn hardware(offer: &Offer) -> String {
    let gpus = gpu_name(offer).map(|name| match offer.vram {
        Some(vram) => format!("{} x {name} ({} each)", offer.gpu_count, gib_text(vram)),
        None => format!("{} x {name}", offer.gpu_count),
    });
    let parts = [
        gpus,
        offer.cpu_cores.map(|cores| format!("{cores} CPU cores")),
        offer.cpu_ram.map(|ram| format!("{} RAM", gib_text(ram))),
        offer.disk.map(|disk| format!("{} free disk", gib_text(disk))),
        offer.region.clone(),
        offer.tier.map(|tier| tier.to_string()),
        offer.spot.then(|| "spot".to_owned()),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// An offer in a word or two, for lists of what was tried.
pub fn title(offer: &Offer) -> String {
    let what = gpu_name(offer).map(|name| format!("{} x {name}", offer.gpu_count));
    let what = what.unwrap_or_else(|| "CPU only".to_owned());
    let place = offer.region.as_ref().map(|region| format!(" in {region}")).unwrap_or_default();
    format!("{what} on {}{place}", offer.broker)
}

fn gib_text(bytes: Bytes) -> String {
    format!("{:.1} GiB", bytes.gib())
}

fn gib(bytes: Bytes) -> String {
    let gib = bytes.gib();
    if gib.fract() == 0.0 { format!("{gib}") } else { format!("{gib:.2}") }
}

fn dollars(price: UsdPerHour) -> String {
    format!("{}", price.0.dollars())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::Tier;
    use crate::units::CudaVersion;
    use proptest::prelude::*;

    fn offer(broker: &str, gpu: Option<(&str, u32, u64)>, dollars: f64) -> Offer {
        let (count, price) = (gpu.map_or(0, |(_, count, _)| count), UsdPerHour::from_dollars(dollars));
        Offer {
            gpu: gpu.map(|(name, ..)| name.to_owned()),
            gpu_raw: gpu.map(|(name, ..)| format!("NVIDIA {name}")),
            vram: gpu.map(|(_, _, gib)| Bytes::from_gib(gib)),
            cpu_ram: Some(Bytes::from_mib(31_949)),
            cpu_cores: Some(8),
            disk: Some(Bytes::from_gib(100)),
            ..Offer::new(broker, format!("{gpu:?}"), count, price)
        }
    }

    /// So little to do that the start of the instance decides, and with it the price.
    fn work() -> Work {
        Work { read: Bytes(1), operations: 1.0, read_rate: Bytes::from_gib(1), efficiency: 1.0 }
    }

    fn laptop() -> Vec<Offer> {
        vec![offer("local", None, 0.08)]
    }

    fn cloud() -> Vec<Offer> {
        vec![
            offer("runpod", Some(("H100", 1, 80)), 2.99),
            offer("runpod", Some(("H100", 2, 80)), 5.98),
            offer("vast", Some(("RTX 4090", 1, 24)), 0.4),
            offer("vast", Some(("L40S", 1, 48)), 0.9),
            offer("lambda", Some(("A100-80GB", 1, 80)), 1.79),
        ]
    }

    fn want() -> GpuRequest {
        GpuRequest::default()
    }

    fn filtered(offers: Vec<Offer>, want: &GpuRequest) -> Filtered {
        match select(offers, want, &work()) {
            Err(NothingLeft::Filtered(filtered)) => *filtered,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_laptop_has_no_a100() {
        let want = GpuRequest { gpu_filter: Some("A100".to_owned()), ..want() };
        let error = select(laptop(), &want, &work()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "--gpu-filter A100 removed the last 1 offer: this machine has no NVIDIA GPU \
             (nearest: 8 CPU cores, 31.2 GiB RAM, 100.0 GiB free disk, $0.08/h); \
             no --gpu-filter would find 8 CPU cores, 31.2 GiB RAM, 100.0 GiB free disk, $0.08/h"
        );
        let json = serde_json::to_value(&error).unwrap();
        assert_eq!(json["steps"][0]["filter"], "gpu_filter");
        assert_eq!(json["message"], error.to_string());
        assert_eq!(json["relaxation"]["option"], "no --gpu-filter");
    }

    #[test]
    fn without_a_request_a_laptop_will_do_and_a_cloud_gives_one_gpu() {
        assert_eq!(select(laptop(), &want(), &work()).unwrap().offers, laptop());
        let selection = select(cloud(), &want(), &work()).unwrap();
        let brief: Vec<_> = selection.offers.iter().map(|o| (o.gpu_count, o.price.0.dollars())).collect();
        assert_eq!(brief, [(1, 0.4), (1, 0.9), (1, 1.79), (1, 2.99)]);
        assert_eq!(selection.steps[0].filter, Filter::GpuCount);
        assert_eq!((selection.steps[0].removed, selection.considered), (1, 5));
    }

    #[test]
    fn no_gpu_asked_for_is_anything() {
        let want = GpuRequest { gpu_count: Some(0), ..want() };
        assert_eq!(select([laptop(), cloud()].concat(), &want, &work()).unwrap().offers.len(), 6);
        assert_eq!(select(laptop(), &want, &work()).unwrap().steps, []);
    }

    #[test]
    fn the_filter_that_removed_the_last_is_named_and_the_nearest_way_out() {
        let query = GpuRequest {
            max_price: Some(UsdPerHour::from_dollars(1.0)),
            min_vram: Some(Bytes::from_gib(80)),
            ..want()
        };
        let error = filtered(cloud(), &query);
        assert_eq!(error.steps.last().unwrap().filter, Filter::MaxPrice);
        let found = error.relaxation.clone().unwrap();
        assert_eq!((found.filter, found.option.as_str()), (Filter::MaxPrice, "--max-price 1.79"));
        assert_eq!(error.nearest.gpu.as_deref(), Some("A100-80GB"));
        assert!(error.to_string().starts_with("--max-price 1 removed the last 2 offers of 5 (before it: "), "{error}");

        let query = GpuRequest { gpu_filter: Some("B200".to_owned()), ..want() };
        let error = filtered(cloud(), &query);
        assert_eq!(error.reason, "the GPUs are A100-80GB, H100, L40S, RTX 4090");
        let query = GpuRequest { gpu_count: Some(8), ..want() };
        assert_eq!(filtered(cloud(), &query).relaxation.unwrap().option, "--gpu-count 2");
    }

    #[test]
    fn one_option_is_not_always_enough() {
        let query = GpuRequest {
            gpu_filter: Some("B200".to_owned()),
            max_price: Some(UsdPerHour::from_dollars(0.01)),
            ..want()
        };
        let error = filtered(cloud(), &query);
        assert_eq!(error.relaxation, None);
        assert!(error.to_string().ends_with("more than one has to be relaxed"), "{error}");
        // The culprit is an earlier filter than the one that removed the last.
        let offers = vec![offer("vast", Some(("L4", 1, 24)), 9.0), offer("vast", Some(("H100", 1, 80)), 1.0)];
        let query = GpuRequest { gpu_filter: Some("L4".to_owned()), min_vram: Some(Bytes::from_gib(80)), ..want() };
        let error = filtered(offers, &GpuRequest { max_price: Some(UsdPerHour::from_dollars(2.0)), ..query });
        assert_eq!(error.steps.last().unwrap().filter, Filter::MinVram);
        assert_eq!(error.relaxation.unwrap().filter, Filter::GpuFilter);
    }

    #[test]
    fn unknown_is_not_enough() {
        let mut offers = cloud();
        offers.iter_mut().for_each(|o| o.cpu_ram = None);
        let query = GpuRequest { min_cpu_ram: Some(Bytes::from_gib(1)), ..want() };
        let error = filtered(offers.clone(), &query);
        assert_eq!(error.steps.last().map(|s| (s.removed, s.removed_unknown)), Some((4, 4)));
        assert!(error.reason.contains("unknown is not enough"), "{error}");
        offers[0].cpu_ram = Some(Bytes::from_mib(512));
        let error = filtered(offers, &query);
        assert_eq!(error.reason, "the most is 0.5 GiB of memory, and 3 do not say how much");
        assert_eq!(error.relaxation.unwrap().option, "--min-cpu-ram 0.5");
    }

    #[test]
    fn a_driver_too_old_for_the_worker_is_not_rented_and_one_that_nobody_names_is() {
        let cuda = |text: &str| Some(text.parse::<CudaVersion>().unwrap());
        let query = GpuRequest { worker_cuda: cuda("11.8"), ..want() };
        let mut offers = cloud();
        let without = select(offers.clone(), &want(), &work()).unwrap().offers;
        assert_eq!(select(offers.clone(), &query, &work()).unwrap().offers, without, "none of them tells");
        offers.iter_mut().for_each(|offer| offer.max_cuda = cuda("11.7"));
        let error = filtered(offers, &query);
        assert_eq!(error.reason, "the newest is CUDA 11.7");
        assert!(error.to_string().contains("a driver for the worker (CUDA 11.8)"), "{error}");
        assert_eq!(error.relaxation, None);
        assert!(error.to_string().ends_with("no option changes that"), "{error}");
    }

    #[test]
    fn host_memory_is_not_gpu_memory() {
        let query = GpuRequest { min_cpu_ram: Some(Bytes::from_gib(64)), ..want() };
        assert_eq!(filtered(cloud(), &query).steps.last().unwrap().filter, Filter::MinCpuRam);
    }

    #[test]
    fn only_what_the_worker_computes_on_and_only_what_stays() {
        let mut offers = cloud();
        offers[0].spot = true;
        offers.push(offer("runpod", Some(("MI300X", 1, 192)), 0.1));
        let selection = select(offers.clone(), &want(), &work()).unwrap();
        let removed: Vec<_> = selection.steps.iter().map(|step| (step.filter, step.removed)).collect();
        assert_eq!(removed, [(Filter::Maker, 1), (Filter::Spot, 1), (Filter::GpuCount, 1)]);
        let query = GpuRequest { gpu_filter: Some("H100".into()), ..want() };
        assert_eq!(filtered(offers.clone(), &query).relaxation.unwrap().option, "--gpu-count 2");
        offers.truncate(1);
        assert_eq!(filtered(offers, &query).relaxation.unwrap().option, "--spot");
    }

    #[test]
    fn a_form_can_be_asked_for_whatever_a_cloud_calls_it() {
        let named = |raw: &str| {
            let offer = Offer::new("runpod", raw.to_owned(), 1, UsdPerHour::from_dollars(1.0));
            offer.with_gpu(raw, None)
        };
        let offers = vec![named("NVIDIA H100 80GB HBM3"), named("NVIDIA H100 PCIe"), named("NVIDIA H100 NVL")];
        for (filter, expected) in [("h100 sxm", 1), ("H100-PCIe", 1), ("H100", 3), ("hbm3", 1), ("A100 SXM", 0)] {
            let query = GpuRequest { gpu_filter: Some(filter.into()), ..want() };
            let found = select(offers.clone(), &query, &work()).map_or(0, |selection| selection.offers.len());
            assert_eq!(found, expected, "{filter}");
        }
    }

    #[test]
    fn what_the_worker_cannot_use_is_left_out_and_counted() {
        let named = |raw: &str| {
            let offer = Offer::new("vast", raw.to_owned(), 1, UsdPerHour::from_dollars(1.0));
            offer.with_gpu(raw, None)
        };
        let old = ["Tesla V100", "Q RTX 8000", "Titan V", "Tesla T4", "RTX 2080 Ti"].map(named);
        let arm = ["GH200 SXM", "GB200"].map(named);
        let good = ["A100X", "A800 PCIE", "A30", "RTX A4000", "RTX 3090", "B200", "RTX 9999 Future"].map(named);
        let all = [&old[..], &arm, &good].concat();
        let selection = select(all.clone(), &want(), &work()).unwrap();
        assert_eq!(selection.offers.len(), good.len(), "{selection:?}");
        let removed: Vec<_> = selection.steps.iter().map(|step| (step.filter, step.removed)).collect();
        assert_eq!(removed, [(Filter::Processor, 2), (Filter::Capability, 5)]);
        let reason = filtered(old.to_vec(), &want()).to_string();
        assert!(reason.starts_with("compute capability 8.0 removed the last 5 offers") && reason.contains("Titan V"));
        // A figure of the cloud's own is better than a name.
        let told = |capability| vec![Offer { capability: Some(capability), ..named("RTX 9999 Future") }];
        assert!(select(told(75), &want(), &work()).is_err() && select(told(130), &want(), &work()).is_ok());
        let cpu = GpuRequest { gpu_count: Some(0), ..want() };
        assert_eq!(select(all, &cpu, &work()).unwrap().offers.len(), good.len() + old.len(), "no GPU is asked for");
    }

    #[test]
    fn an_option_that_is_alone_in_the_way_is_named() {
        let query = GpuRequest { region: Some("Mars".to_owned()), ..want() };
        // None of these says where it is.
        let error = filtered(cloud(), &query);
        assert_eq!(error.relaxation.as_ref().map(|found| found.option.as_str()), Some("no --region"), "{error}");
        let mut offers = cloud();
        offers[0].region = Some("US-KS-2".to_owned());
        let found = filtered(offers, &query).relaxation.unwrap();
        assert_eq!(found.filter, Filter::Region);
        for query in [
            GpuRequest { tier: Some(Tier::Secure), ..want() },
            GpuRequest { min_cuda: Some("12.4".parse().unwrap()), ..want() },
        ] {
            let error = filtered(cloud(), &query);
            assert!(error.relaxation.is_some() && !error.to_string().contains("no single option"), "{error}");
        }
        let arm = Offer { arm: true, ..offer("vast", Some(("H100", 1, 80)), 1.0) };
        assert!(filtered(vec![arm], &want()).to_string().ends_with("no option changes that"));
    }

    #[test]
    fn two_letters_of_a_region_are_a_word() {
        let at = |region: &str| Offer { region: Some(region.to_owned()), ..offer("vast", Some(("H100", 1, 80)), 1.0) };
        let offers = ["Texas, US", "Russia, RU", "Austria, AT", "US-KS-2", "EUR-IS-1", "EU-RO-1"].map(at).to_vec();
        for (region, expected) in [("us", 2), ("eu", 2), ("US", 2), ("ru", 1), ("texas", 1), ("at", 1), ("ks", 1)] {
            let query = GpuRequest { region: Some(region.to_owned()), ..want() };
            assert_eq!(select(offers.clone(), &query, &work()).unwrap().offers.len(), expected, "{region}");
        }
    }

    #[test]
    fn what_costs_least_in_the_end_is_first() {
        let offer = |key: &str, mib: u64, dollars: f64| Offer {
            download: Some(Bytes::from_mib(mib)),
            key: key.into(),
            ..offer("vast", Some(("H100", 1, 80)), dollars)
        };
        let offers = vec![offer("cheap by the hour", 50, 1.0), offer("cheap in the end", 2000, 2.0)];
        let work = Work { read: Bytes::from_gib(600), ..work() };
        let first = |work: &Work| select(offers.clone(), &want(), work).unwrap().offers.swap_remove(0).key;
        assert_eq!(first(&work), "cheap in the end");
        assert_eq!(first(&Work { read: Bytes(1), ..work }), "cheap by the hour");
    }

    /// The size of the largest clouds together; nobody should have to wait for the order of a list.
    #[test]
    fn a_thousand_offers() {
        let offers: Vec<Offer> = (0..1000u32)
            .map(|i| {
                let gpu = ["H100", "A100-80GB", "L40S", "RTX 4090"][i as usize % 4];
                Offer { key: i.to_string(), ..offer("vast", Some((gpu, 1 + i % 8, 80)), f64::from(i % 97) / 10.0) }
            })
            .collect();
        let query = GpuRequest { gpu_filter: Some("H100".into()), min_vram: Some(Bytes::from_gib(80)), ..want() };
        let selection = select(offers, &query, &work()).unwrap();
        assert_eq!(
            (selection.considered, selection.offers.len()),
            (1000, 125),
            "a quarter has H100s, half of those one"
        );
    }

    #[test]
    fn no_offers() {
        assert_eq!(select(vec![], &want(), &work()).unwrap_err().to_string(), "no broker has an offer");
        assert_eq!(serde_json::to_value(NothingLeft::NoOffers).unwrap()["message"], "no broker has an offer");
    }

    fn any_bytes() -> impl Strategy<Value = Option<Bytes>> {
        proptest::option::of((0u64..200).prop_map(Bytes::from_gib))
    }

    fn any_tier() -> impl Strategy<Value = Tier> {
        prop_oneof![Just(Tier::Secure), Just(Tier::Community)]
    }

    fn any_cuda() -> impl Strategy<Value = CudaVersion> {
        (11u32..14, 0u32..9).prop_map(|(major, minor)| CudaVersion { major, minor })
    }

    prop_compose! {
        fn any_offer()(
            broker in "local|vast|runpod",
            gpu in proptest::option::of(("H100|A100-80GB|L4|L40S|Odd|MI300X", 1u32..9)),
            vram in any_bytes(), cpu_ram in any_bytes(), disk in any_bytes(),
            cents in 1u32..1000,
            region in proptest::option::of("US-KS|EU-FR"), tier in proptest::option::of(any_tier()), spot in any::<bool>(),
            max_cuda in proptest::option::of(any_cuda()),
            capability in proptest::option::of(70u32..91), arm in any::<bool>(),
        ) -> Offer {
            Offer {
                gpu: gpu.as_ref().map(|(name, _)| name.clone()),
                gpu_raw: gpu.as_ref().map(|(name, _)| name.clone()),
                gpu_count: gpu.as_ref().map_or(0, |(_, count)| *count),
                vram: vram.filter(|_| gpu.is_some()),
                capability: capability.filter(|_| gpu.is_some()),
                cpu_ram, disk, region, tier, spot, max_cuda, arm,
                ..offer(&broker, None, f64::from(cents) / 100.0)
            }
        }
    }

    prop_compose! {
        fn any_request()(
            gpu_count in proptest::option::of(0u32..9),
            gpu_filter in proptest::option::of("H100|100|L4|l40|zzz| "),
            min_vram in any_bytes(), min_cpu_ram in any_bytes(), min_disk in any_bytes(),
            cents in proptest::option::of(0u32..1000),
            region in proptest::option::of("us|eu|mars"), tier in proptest::option::of(any_tier()), spot in any::<bool>(),
            min_cuda in proptest::option::of(any_cuda()), worker_cuda in proptest::option::of(any_cuda()),
        ) -> GpuRequest {
            let max_price = cents.map(|cents| UsdPerHour::from_dollars(f64::from(cents) / 100.0));
            GpuRequest {
                gpu_count, gpu_filter, min_vram, min_cpu_ram, min_disk, max_price, region, tier, spot, min_cuda, worker_cuda,
            }
        }
    }

    /// The request with one option replaced by what the relaxation says to type.
    fn retyped(want: &GpuRequest, found: &Relaxation) -> GpuRequest {
        let value = found.option.strip_prefix(found.filter.option()).map(str::trim);
        let number = || value.map(|text| text.parse::<f64>().unwrap());
        let bytes = || number().map(|gib| Bytes((gib * (1u64 << 30) as f64) as u64));
        let mut want = want.clone();
        match found.filter {
            Filter::Spot => want.spot = true,
            Filter::Tier => want.tier = found.offer.tier,
            Filter::Region => want.region = value.map(str::to_owned),
            Filter::MinCuda => want.min_cuda = value.map(|text| text.parse().unwrap()),
            Filter::GpuFilter => want.gpu_filter = value.map(str::to_owned),
            Filter::GpuCount => want.gpu_count = number().map(|count| count as u32),
            Filter::MinVram => want.min_vram = bytes(),
            Filter::MinCpuRam => want.min_cpu_ram = bytes(),
            Filter::MinDisk => want.min_disk = bytes(),
            Filter::MaxPrice => want.max_price = number().map(UsdPerHour::from_dollars),
            Filter::Maker | Filter::Processor | Filter::Capability | Filter::WorkerCuda => {
                unreachable!("it cannot be relaxed")
            }
        }
        want
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn nothing_is_lost_and_nothing_unfit_is_kept(
            offers in proptest::collection::vec(any_offer(), 0..12),
            want in any_request(),
        ) {
            let passes = |offer: &Offer| Filter::ALL.iter().all(|filter| filter.passes(offer, &want));
            let fit = offers.iter().filter(|offer| passes(offer)).count();
            match select(offers.clone(), &want, &work()) {
                Ok(selection) => {
                    prop_assert_eq!(selection.offers.len(), fit);
                    prop_assert!(selection.offers.iter().all(passes));
                    prop_assert!(selection.offers.is_sorted_by_key(|offer| work().on(offer).rank()));
                    let removed: usize = selection.steps.iter().map(|step| step.removed).sum();
                    prop_assert_eq!(removed + fit, offers.len());
                }
                Err(NothingLeft::NoOffers) => prop_assert!(offers.is_empty()),
                Err(NothingLeft::Filtered(error)) => {
                    prop_assert_eq!(fit, 0);
                    let removed: usize = error.steps.iter().map(|step| step.removed).sum();
                    prop_assert_eq!(removed, offers.len());
                    let last = error.steps.last().unwrap();
                    prop_assert!(last.left == 0 && last.removed > 0 && last.removed_unknown <= last.removed);
                    prop_assert!(!last.filter.passes(&error.nearest, &want));
                    prop_assert!(error.to_string().starts_with(&last.option));
                    if let Some(found) = &error.relaxation {
                        // What is advised works, exactly as it is typed.
                        let found_offers = select(offers, &retyped(&want, found), &work()).unwrap().offers;
                        prop_assert!(found_offers.contains(&found.offer));
                    }
                }
            }
        }

        #[test]
        fn what_is_kept_in_the_end_may_match_before_all_of_it_is_known(
            offer in any_offer(), want in any_request(), known in any::<[bool; 6]>(),
        ) {
            let if_known = |is: bool, has: Option<Bytes>| has.filter(|_| is);
            let before = Offer {
                vram: if_known(known[0], offer.vram),
                cpu_ram: if_known(known[1], offer.cpu_ram),
                disk: if_known(known[2], offer.disk),
                region: offer.region.clone().filter(|_| known[3]),
                tier: offer.tier.filter(|_| known[4]),
                max_cuda: offer.max_cuda.filter(|_| known[5]),
                ..offer.clone()
            };
            let kept = Filter::ALL.iter().all(|filter| filter.passes(&offer, &want));
            prop_assert!(!kept || may_match(&before, &want));
        }

        #[test]
        fn the_order_of_offers_does_not_matter(
            offers in proptest::collection::vec(any_offer(), 1..8),
            want in any_request(),
        ) {
            let prices = |result: Result<Selection, NothingLeft>| result.ok().map(|s| s.offers.iter().map(|o| o.price).collect::<Vec<_>>());
            let reversed = offers.iter().rev().cloned().collect();
            prop_assert_eq!(prices(select(offers, &want, &work())), prices(select(reversed, &want, &work())));
        }
    }
}
