//! Filters the offers of all brokers in a fixed order, ranks them by the cost of the whole run,
//! and explains an empty result.
//!
//! Requirements on offers are defined only here, one rule per filter in `RULES`. A broker may
//! leave out only what [`may_match`] refuses.
//!
//! Every filter counts what it removes. If one removes the last offers, the error names it,
//! describes the nearest of them, and states which single changed option would let an offer pass.
//!
//! Without `--gpu-count`, a cloud's offers must have one GPU. The local broker offers what is
//! there, also the CPU alone, unless `--gpu-filter` or `--min-vram` requires a GPU.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cloud::estimate::Work;
use crate::cloud::gpu;
use crate::cloud::offer::{GpuRequest, Offer};
use crate::text::counted;
use crate::units::{Bytes, CudaVersion, Span, Usd, UsdPerHour};

/// Filters, in the order in which they are applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// Maker of the GPU: the worker supports NVIDIA's.
    Maker,
    /// The host's processor: the worker is a program for x86-64.
    Processor,
    /// Compute capability: the worker needs a minimum.
    Capability,
    /// Whether the instance is preemptible.
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
    /// CUDA version of the driver that the worker needs.
    WorkerCuda,
    /// Memory of the host, as the worker needs it.
    WorkerRam,
    /// Region or data centre.
    Region,
    /// Data centre or not.
    Tier,
    /// Price of the whole instance.
    MaxPrice,
}

/// Definition of a filter.
struct Rule {
    filter: Filter,
    /// Its command-line option, or the worker's requirement.
    option: &'static str,
    /// The option with its value; `None`: the request does not restrict by it.
    typed: fn(&str, &GpuRequest) -> Option<String>,
    /// Whether an offer passes it.
    fit: fn(&Offer, &GpuRequest) -> Fit,
    /// The option with which an offer would pass. `None`: it is a requirement of the worker.
    instead: Option<fn(&str, &Offer) -> Option<String>>,
    /// Why it removed the last offers.
    reason: fn(&Removed<'_>) -> String,
}

/// Whether an offer passes a filter. Variants nearer to passing come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    Passes,
    /// Distance from passing.
    Fails(u64),
    /// The offer does not state the value. Unknown values do not pass.
    Unknown,
}

/// The offers removed by the last filter.
struct Removed<'a> {
    offers: &'a [Offer],
    nearest: &'a Offer,
    /// Number of offers that do not state the value.
    unknown: usize,
}

/// The filters in the order in which they are applied.
static RULES: [Rule; 15] = [
    Rule {
        filter: Filter::Maker,
        option: "NVIDIA only",
        typed: |option, _| Some(option.to_owned()),
        fit: |offer, _| Fit::lacks(offer.gpu_raw.as_deref().is_some_and(|raw| !gpu::is_nvidia(raw))),
        instead: None,
        reason: |removed| format!("the GPUs are {}", removed.names()),
    },
    Rule {
        filter: Filter::Processor,
        option: "x86-64 only",
        typed: |option, _| Some(option.to_owned()),
        fit: |offer, _| Fit::lacks(offer.arm),
        instead: None,
        reason: |removed| format!("beside {} is an ARM processor", removed.names()),
    },
    Rule {
        filter: Filter::Capability,
        option: "compute capability 8.0",
        typed: |option, want| (want.gpu_count != Some(0)).then(|| option.to_owned()),
        // For this machine's GPUs the worker decides. A new model may be in no table.
        fit: |offer, want| match offer.capability {
            Some(has) if want.gpu_count != Some(0) && !offer.is_local => {
                Fit::lacks(gpu::MIN_CAPABILITY.saturating_sub(has))
            }
            _ => Fit::Passes,
        },
        instead: None,
        reason: |removed| format!("the worker needs bf16, from Ampere on; the GPUs are {}", removed.names()),
    },
    Rule {
        filter: Filter::Spot,
        option: "--spot",
        typed: |option, want| (!want.spot).then(|| format!("no {option} (the default)")),
        fit: |offer, want| Fit::lacks(offer.spot && !want.spot),
        instead: Some(|option, _| Some(option.to_owned())),
        reason: |_| "the cloud may take them back at any time".to_owned(),
    },
    Rule {
        filter: Filter::GpuFilter,
        option: "--gpu-filter",
        typed: |option, want| Some(format!("{option} {}", wanted_text(&want.gpu_filter)?)),
        fit: |offer, want| match wanted_text(&want.gpu_filter) {
            Some(filter) if !is_named(offer, filter) => Fit::lacks(1 + u32::from(offer.gpu_count == 0)),
            _ => Fit::Passes,
        },
        instead: Some(|option, offer| Some(format!("{option} {}", offer.gpu.as_ref()?))),
        reason: |removed| removed.no_gpu().unwrap_or_else(|| format!("the GPUs are {}", removed.names())),
    },
    Rule {
        filter: Filter::GpuCount,
        option: "--gpu-count",
        typed: |option, want| match want.gpu_count {
            Some(0) => None,
            Some(count) => Some(format!("{option} {count}")),
            None => Some(format!("{option} 1 (the default)")),
        },
        fit: |offer, want| match want.gpu_count {
            Some(0) => Fit::Passes,
            None if offer.is_local => Fit::Passes,
            count => Fit::lacks(offer.gpu_count.abs_diff(count.unwrap_or(1))),
        },
        instead: Some(|option, offer| Some(format!("{option} {}", offer.gpu_count))),
        reason: |removed| removed.no_gpu().unwrap_or_else(|| format!("the nearest has {}", removed.nearest.gpu_count)),
    },
    Rule {
        filter: Filter::MinVram,
        option: "--min-vram",
        typed: |option, want| at_least(option, want.min_vram),
        fit: |offer, want| match Fit::memory(offer.vram, want.min_vram) {
            Fit::Unknown if offer.gpu_count == 0 => Fit::Fails(u64::MAX),
            fit => fit,
        },
        instead: Some(|option, offer| Some(format!("{option} {}", rounded_down(offer.vram?)))),
        reason: |removed| removed.no_gpu().unwrap_or_else(|| removed.most("memory per GPU", removed.nearest.vram)),
    },
    Rule {
        filter: Filter::MinCpuRam,
        option: "--min-cpu-ram",
        typed: |option, want| at_least(option, want.min_cpu_ram),
        fit: |offer, want| Fit::memory(offer.cpu_ram, want.min_cpu_ram),
        instead: Some(|option, offer| Some(format!("{option} {}", rounded_down(offer.cpu_ram?)))),
        reason: |removed| removed.most("memory", removed.nearest.cpu_ram),
    },
    Rule {
        filter: Filter::MinDisk,
        option: "--min-disk",
        typed: |option, want| at_least(option, want.min_disk),
        fit: |offer, want| Fit::memory(offer.disk, want.min_disk),
        instead: Some(|option, offer| Some(format!("{option} {}", rounded_down(offer.disk?)))),
        reason: |removed| removed.most("free disk", removed.nearest.disk),
    },
    Rule {
        filter: Filter::MinCuda,
        option: "--min-cuda",
        typed: |option, want| Some(format!("{option} {}", want.min_cuda?)),
        fit: |offer, want| Fit::cuda(offer.max_cuda, want.min_cuda),
        instead: Some(|option, offer| Some(format!("{option} {}", offer.max_cuda?))),
        reason: |removed| removed.newest_cuda(),
    },
    Rule {
        filter: Filter::WorkerCuda,
        option: "a driver for the worker",
        typed: |option, want| Some(format!("{option} (CUDA {})", want.worker_cuda?)),
        // An unknown version is checked on the host before the worker is pushed.
        fit: |offer, want| match Fit::cuda(offer.max_cuda, want.worker_cuda) {
            Fit::Unknown => Fit::Passes,
            fit => fit,
        },
        instead: None,
        reason: |removed| removed.newest_cuda(),
    },
    Rule {
        filter: Filter::WorkerRam,
        option: "host memory for the worker",
        typed: |option, want| Some(format!("{option} ({})", want.worker_ram?)),
        fit: |offer, want| match Fit::memory(offer.cpu_ram, want.worker_ram) {
            Fit::Unknown => Fit::Passes,
            fit => fit,
        },
        instead: None,
        reason: |removed| removed.most("memory", removed.nearest.cpu_ram),
    },
    Rule {
        filter: Filter::Region,
        option: "--region",
        typed: |option, want| Some(format!("{option} {}", wanted_text(&want.region)?)),
        fit: |offer, want| {
            Fit::told(offer.region.as_deref(), wanted_text(&want.region), |has, wanted| !is_in(has, wanted))
        },
        instead: Some(|option, offer| Some(format!("{option} {}", offer.region.as_ref()?))),
        reason: |removed| {
            let regions = removed.offers.iter().map(|offer| offer.region.as_deref().unwrap_or("not told"));
            format!("the regions are {}", some_of(regions))
        },
    },
    Rule {
        filter: Filter::Tier,
        option: "--secure or --community",
        typed: |_, want| Some(format!("--{}", want.tier?)),
        fit: |offer, want| Fit::told(offer.tier, want.tier, |has, wanted| has != wanted),
        instead: Some(|_, offer| Some(format!("--{}", offer.tier?))),
        reason: |_| "the others are of the other kind, or do not say".to_owned(),
    },
    Rule {
        filter: Filter::MaxPrice,
        option: "--max-price",
        typed: |option, want| Some(format!("{option} {}", want.max_price?.0.dollars())),
        fit: |offer, want| {
            let above = |max: UsdPerHour| offer.price.0.micros().saturating_sub(max.0.micros()).max(0);
            Fit::lacks(want.max_price.map_or(0, above).unsigned_abs())
        },
        instead: Some(|option, offer| Some(format!("{option} {}", rounded_up(offer.price)))),
        reason: |removed| format!("the cheapest is {}", removed.nearest.price),
    },
];

impl Rule {
    fn typed(&self, want: &GpuRequest) -> Option<String> {
        (self.typed)(self.option, want)
    }

    fn passes(&self, offer: &Offer, want: &GpuRequest) -> bool {
        (self.fit)(offer, want) == Fit::Passes
    }

    /// Whether the default restricts although the option was not given.
    fn is_default(&self, typed: &str) -> bool {
        self.instead.is_none() || self.typed(&GpuRequest::default()).as_deref() == Some(typed)
    }
}

impl Fit {
    /// Passes if the distance is 0.
    fn lacks(distance: impl Into<u64>) -> Self {
        match distance.into() {
            0 => Self::Passes,
            distance => Self::Fails(distance),
        }
    }

    /// Compares the offer's value with the requested one, if any.
    fn told<H, W, D: Into<u64>>(has: Option<H>, wanted: Option<W>, distance: impl Fn(H, W) -> D) -> Self {
        match (has, wanted) {
            (_, None) => Self::Passes,
            (None, Some(_)) => Self::Unknown,
            (Some(has), Some(wanted)) => Self::lacks(distance(has, wanted)),
        }
    }

    fn memory(has: Option<Bytes>, min: Option<Bytes>) -> Self {
        Self::told(has, min.filter(|min| min.0 > 0), |has, min| min.0.saturating_sub(has.0))
    }

    fn cuda(max: Option<CudaVersion>, min: Option<CudaVersion>) -> Self {
        let figure = |version: CudaVersion| u64::from(version.major) << 32 | u64::from(version.minor);
        Self::told(max, min, |max, min| figure(min).saturating_sub(figure(max)))
    }
}

impl Removed<'_> {
    fn names(&self) -> String {
        some_of(self.offers.iter().filter_map(|offer| offer.gpu.as_deref()))
    }

    /// The reason, if none of them has a GPU.
    fn no_gpu(&self) -> Option<String> {
        let here = self.offers.iter().all(|offer| offer.is_local);
        let reason = if here { "this machine has no NVIDIA GPU" } else { "none has a GPU" };
        self.offers.iter().all(|offer| offer.gpu_count == 0).then(|| reason.to_owned())
    }

    fn most(&self, what: &str, has: Option<Bytes>) -> String {
        match (has, self.unknown) {
            (Some(has), 0) => format!("the most is {} of {what}", gib_text(has)),
            (Some(has), unknown) => {
                format!("the most is {} of {what}, and {unknown} do not say how much", gib_text(has))
            }
            (None, _) => format!("no offer states its {what}, and unknown values do not pass"),
        }
    }

    fn newest_cuda(&self) -> String {
        match self.nearest.max_cuda {
            Some(max) => format!("the newest is CUDA {max}"),
            None => "no offer states its driver's CUDA version, and unknown values do not pass".to_owned(),
        }
    }
}

/// Result of one filter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FilterStep {
    /// The filter.
    pub filter: Filter,
    /// The option with its value.
    pub option: String,
    /// Number of offers removed.
    pub removed: usize,
    /// Number of removed offers that do not state the value.
    pub removed_unknown: usize,
    /// Number of offers left.
    pub left: usize,
}

/// The ranked offers, and the agreed maximum cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Quote {
    /// The agreed amount: the maximum total cost of the run's instances. `None`: no consent is
    /// needed.
    #[serde(rename = "agreed")]
    pub ceiling: Option<Usd>,
    /// Passing offers, ascending by the estimated cost of the run.
    pub offers: Vec<Offer>,
    /// Number of offers before filtering.
    pub considered: usize,
    /// The requested filters, in order.
    pub steps: Vec<FilterStep>,
}

/// No offer passes.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum NothingLeft {
    /// No broker has an offer.
    #[error("no broker has an offer")]
    NoOffers,
    /// A filter removed the last ones.
    #[error("{0}")]
    Filtered(Box<Filtered>),
    /// On no passing offer the run is estimated to end within its time limit.
    #[error("{message}")]
    Late {
        /// Describes the fastest offer.
        message: String,
        /// The options to use instead.
        hint: String,
    },
}

/// The filter that removed the last offers, and a change that would help.
#[derive(Clone, Debug, PartialEq)]
pub struct Filtered {
    /// The filters up to the one that removed the last offers.
    pub steps: Vec<FilterStep>,
    /// Number of offers before filtering.
    pub considered: usize,
    /// Why the last filter removed offers.
    pub reason: String,
    /// The removed offer nearest to passing.
    pub nearest: Offer,
    /// The smallest change of a single option with which an offer passes all filters; `None`:
    /// several must change, or none helps.
    pub relaxation: Option<Relaxation>,
    /// Whether no offer meets the worker's requirements, which no option changes.
    pub is_fixed: bool,
}

/// A change of one option, with the offer it finds.
#[derive(Clone, Debug, PartialEq)]
pub struct Relaxation {
    /// The filter.
    pub filter: Filter,
    /// The option to use instead.
    pub option: String,
    /// The cheapest offer that passes then.
    pub offer: Offer,
}

/// The offers that pass `want`, ranked for `work`. No cost is agreed yet.
///
/// # Errors
/// No offer passes. The error states why.
pub fn select(offers: Vec<Offer>, want: &GpuRequest, work: &Work) -> Result<Quote, NothingLeft> {
    if offers.is_empty() {
        return Err(NothingLeft::NoOffers);
    }
    let considered = offers.len();
    let mut left = rank(offers.clone(), work);
    let mut steps = Vec::new();
    for rule in &RULES {
        let Some(option) = rule.typed(want) else { continue };
        let (passed, removed): (Vec<_>, Vec<_>) = left.into_iter().partition(|offer| rule.passes(offer, want));
        left = passed;
        // A default without effect is not listed.
        if removed.is_empty() && rule.is_default(&option) {
            continue;
        }
        let removed_unknown = removed.iter().filter(|offer| (rule.fit)(offer, want) == Fit::Unknown).count();
        steps.push(FilterStep {
            filter: rule.filter,
            option,
            removed: removed.len(),
            removed_unknown,
            left: left.len(),
        });
        if left.is_empty() {
            return Err(explain(rule, steps, &offers, &removed, want));
        }
    }
    Ok(Quote { ceiling: None, offers: left, considered, steps })
}

impl Quote {
    /// Keeps only offers on which `work` is estimated to end within `limit`.
    ///
    /// # Errors
    /// None remains.
    pub fn in_time(mut self, work: &Work, limit: Duration) -> Result<Self, NothingLeft> {
        let seconds = |offer: &Offer| work.on(offer).seconds;
        let quickest = self.offers.iter().min_by(|a, b| seconds(a).total_cmp(&seconds(b))).cloned();
        self.offers.retain(|offer| !work.on(offer).is_over(limit));
        match quickest {
            Some(quickest) if self.offers.is_empty() => Err(late(&quickest, seconds(&quickest), limit)),
            _ => Ok(self),
        }
    }
}

fn late(quickest: &Offer, seconds: f64, limit: Duration) -> NothingLeft {
    let takes = Duration::from_secs_f64(seconds);
    let message = format!(
        "the run is estimated to take {} on the quickest offer ({}), {} longer than its time limit of {}",
        Span(takes),
        title(quickest),
        Span(takes.saturating_sub(limit)),
        Span(limit),
    );
    let minutes = (seconds / 60.0).ceil();
    let hint =
        format!("--max-duration {minutes}m or more; --allow-cut-short rents it anyway, and saves partial results");
    NothingLeft::Late { message, hint }
}

impl NothingLeft {
    /// The option to use instead, if the message does not contain it.
    pub fn hint(&self) -> Option<&str> {
        if let Self::Late { hint, .. } = self { Some(hint) } else { None }
    }
}

/// The request for GPUs that a CUDA worker supports, if no worker can be queried.
pub fn for_the_worker(want: GpuRequest) -> GpuRequest {
    let cuda = (want.gpu_count != Some(0)).then_some(gpu::OLDEST_CUDA);
    GpuRequest { worker_cuda: want.worker_cuda.or(cuda), ..want }
}

/// Whether an offer with missing figures may pass `want`. Brokers use it to skip unfit offers
/// before further queries.
pub fn may_match(offer: &Offer, want: &GpuRequest) -> bool {
    RULES.iter().all(|rule| !matches!((rule.fit)(offer, want), Fit::Fails(_)))
}

fn rank(offers: Vec<Offer>, work: &Work) -> Vec<Offer> {
    let mut ranked: Vec<(Usd, Offer)> = offers.into_iter().map(|offer| (work.on(&offer).rank(), offer)).collect();
    // Of equal cost, the run that is over first, with its time in a queue. The rest of the key
    // makes the order reproducible.
    let over_in_s =
        |offer: &Offer| offer.starts_in_s.map_or(u64::MAX, |wait| wait.saturating_add(work.on(offer).seconds as u64));
    ranked.sort_by(|(cost, a), (other, b)| {
        let key = |offer: &Offer| (offer.price, offer.gpu_count, over_in_s(offer));
        (cost, key(a), &a.broker, &a.key).cmp(&(other, key(b), &b.broker, &b.key))
    });
    ranked.into_iter().map(|(_, offer)| offer).collect()
}

/// Two letters are the code of a country, state or continent (`EUR-IS-1`), and match as a word:
/// `us` does not match `Russia`.
fn is_in(has: &str, region: &str) -> bool {
    let (has, wanted) = (has.to_lowercase(), region.to_lowercase());
    if wanted.chars().count() == 2 {
        let mut words = has.split(|c: char| !c.is_alphanumeric());
        return words.any(|word| word.starts_with(&wanted) && word.chars().count() <= 3);
    }
    has.contains(&wanted)
}

fn is_named(offer: &Offer, filter: &str) -> bool {
    let names = [gpu_name(offer), offer.gpu_raw.clone()];
    names.iter().flatten().any(|name| gpu::matches(filter, name))
}

/// The canonical name with the form, if known.
fn gpu_name(offer: &Offer) -> Option<String> {
    let name = offer.gpu.as_ref()?;
    Some(offer.form.map_or_else(|| name.clone(), |form| format!("{name} {form}")))
}

fn explain(last: &Rule, steps: Vec<FilterStep>, offers: &[Offer], removed: &[Offer], want: &GpuRequest) -> NothingLeft {
    let nearest = removed.iter().min_by_key(|offer| ((last.fit)(offer, want), offer.price));
    let Some(nearest) = nearest else { return NothingLeft::NoOffers };
    let unknown = steps.last().map_or(0, |step| step.removed_unknown);
    let reason = (last.reason)(&Removed { offers: removed, nearest, unknown });
    let relaxation = relax(last, offers, want);
    let usable = |offer: &Offer| RULES.iter().all(|rule| rule.instead.is_some() || rule.passes(offer, want));
    let is_fixed = !offers.iter().any(usable);
    let (considered, nearest) = (offers.len(), nearest.clone());
    NothingLeft::Filtered(Box::new(Filtered { steps, considered, reason, nearest, relaxation, is_fixed }))
}

/// Each name once, at most twenty.
fn some_of<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: BTreeSet<&str> = names.collect();
    let more = if names.len() > 20 { ", ..." } else { "" };
    names.into_iter().take(20).collect::<Vec<_>>().join(", ") + more
}

/// Single filters whose removal lets an offer pass, starting with the one that removed the last
/// offers.
fn relax(last: &Rule, offers: &[Offer], want: &GpuRequest) -> Option<Relaxation> {
    let others = RULES.iter().filter(|rule| rule.filter != last.filter);
    std::iter::once(last).chain(others).find_map(|rule| {
        let instead = rule.instead?;
        rule.typed(want)?;
        let rest = || RULES.iter().filter(|other| other.filter != rule.filter);
        let through = offers.iter().filter(|offer| rest().all(|other| other.passes(offer, want)));
        let offer = through.min_by_key(|offer| ((rule.fit)(offer, want), offer.price))?;
        let option = instead(rule.option, offer).unwrap_or_else(|| format!("no {}", rule.option));
        Some(Relaxation { filter: rule.filter, option, offer: offer.clone() })
    })
}

impl fmt::Display for Filtered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(step) = self.steps.last() {
            let offers = if step.removed == 1 { "offer".to_owned() } else { format!("{} offers", step.removed) };
            write!(f, "{} removed the last {offers}", step.option)?;
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
            Some(found) if found.offer == self.nearest => write!(f, "; {} would find it", found.option),
            Some(found) => write!(f, "; {} would find {}", found.option, describe(&found.offer)),
            None if self.is_fixed => write!(f, "; no option changes that"),
            None => write!(f, "; no single option is in the way alone: more than one has to be relaxed"),
        }
    }
}

/// An offer on one line: hardware, price, and broker unless it is this machine.
pub fn describe(offer: &Offer) -> String {
    let hardware = Some(hardware(offer)).filter(|hardware| !hardware.is_empty());
    let broker = (!offer.is_local).then(|| format!("on {}", offer.broker));
    [hardware, Some(offer.price.to_string()), broker].into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// Hardware of an offer: GPUs, cores, memory, disk, location and kind.
pub fn hardware(offer: &Offer) -> String {
    // Some names say it themselves.
    let is_told = |name: &str, vram: Bytes| name.contains(&format!("-{}GB", vram.0 >> 30));
    let gpus = gpu_name(offer).map(|name| match offer.vram.filter(|vram| !is_told(&name, *vram)) {
        Some(vram) if offer.gpu_count == 1 => format!("1 x {name} ({})", gib_text(vram)),
        Some(vram) => format!("{} x {name} ({} each)", offer.gpu_count, gib_text(vram)),
        None => format!("{} x {name}", offer.gpu_count),
    });
    let parts = [
        gpus,
        offer.cpu_cores.map(|cores| counted(cores as usize, "CPU core")),
        offer.cpu_ram.map(|ram| format!("{} RAM", gib_text(ram))),
        offer.disk.map(|disk| format!("{} free disk", gib_text(disk))),
        offer.region.clone(),
        offer.tier.map(|tier| tier.to_string()),
        offer.spot.then(|| "spot".to_owned()),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// Short name of an offer, for lists of attempts.
pub fn title(offer: &Offer) -> String {
    let what = gpu_name(offer).map(|name| format!("{} x {name}", offer.gpu_count));
    let what = what.unwrap_or_else(|| "CPU only".to_owned());
    let place = offer.region.as_ref().map(|region| format!(" in {region}")).unwrap_or_default();
    format!("{what} on {}{place}", offer.broker)
}

fn gib_text(bytes: Bytes) -> String {
    let gib = format!("{:.1}", bytes.gib());
    format!("{} GiB", gib.strip_suffix(".0").unwrap_or(&gib))
}

fn at_least(option: &str, min: Option<Bytes>) -> Option<String> {
    let gib = min.filter(|min| min.0 > 0)?.gib();
    Some(if gib.fract() == 0.0 { format!("{option} {gib}") } else { format!("{option} {gib:.2}") })
}

/// GiB, rounded down to a tenth.
fn rounded_down(bytes: Bytes) -> f64 {
    (bytes.gib() * 10.0).floor() / 10.0
}

/// Dollars, rounded up to the cent.
fn rounded_up(price: UsdPerHour) -> f64 {
    (price.0.dollars() * 100.0 - 1e-6).ceil() / 100.0
}

/// A given text, unless it is blank.
fn wanted_text(typed: &Option<String>) -> Option<&str> {
    typed.as_deref().map(str::trim).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::offer::Tier;
    use proptest::prelude::*;

    fn offer(broker: &str, gpu: Option<(&str, u32, u64)>, dollars: f64) -> Offer {
        let (count, price) = (gpu.map_or(0, |(_, count, _)| count), UsdPerHour::from_dollars(dollars));
        Offer {
            is_local: broker == "local",
            gpu: gpu.map(|(name, ..)| name.to_owned()),
            gpu_raw: gpu.map(|(name, ..)| format!("NVIDIA {name}")),
            vram: gpu.map(|(_, _, gib)| Bytes::from_gib(gib)),
            cpu_ram: Some(Bytes::from_mib(31_949)),
            cpu_cores: Some(8),
            disk: Some(Bytes::from_gib(100)),
            ..Offer::new(broker, format!("{gpu:?}"), count, price)
        }
    }

    /// Work so small that the start of the instance, and so the price, decides.
    fn work() -> Work {
        Work { read: Bytes(1), operations: 1.0, read_rate: Bytes::from_gib(1), efficiency: 1.0, ..Work::default() }
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
    fn gpu_filter_excludes_a_cpu_machine() {
        let want = GpuRequest { gpu_filter: Some("A100".to_owned()), ..want() };
        let error = filtered(laptop(), &want);
        assert_eq!(
            error.to_string(),
            "--gpu-filter A100 removed the last offer: this machine has no NVIDIA GPU \
             (nearest: 8 CPU cores, 31.2 GiB RAM, 100 GiB free disk, $0.08/h); no --gpu-filter would find it"
        );
        assert_eq!(serde_json::to_value(&error.steps).unwrap()[0]["filter"], "gpu_filter");
        assert_eq!(error.relaxation.unwrap().option, "no --gpu-filter");
    }

    #[test]
    fn memory_is_told_once_and_one_core_is_one() {
        let shown = |gpu: Option<(&str, u32, u64)>| hardware(&Offer { cpu_cores: Some(1), ..offer("vast", gpu, 1.0) });
        assert!(shown(Some(("A100-80GB", 2, 80))).starts_with("2 x A100-80GB, 1 CPU core, "));
        assert!(shown(Some(("L40S", 2, 48))).starts_with("2 x L40S (48 GiB each), 1 CPU core, "));
        assert!(shown(None).starts_with("1 CPU core, "));
    }

    #[test]
    fn default_request_accepts_a_cpu_machine_or_one_cloud_gpu() {
        assert_eq!(select(laptop(), &want(), &work()).unwrap().offers, laptop());
        let selection = select(cloud(), &want(), &work()).unwrap();
        let brief: Vec<_> = selection.offers.iter().map(|o| (o.gpu_count, o.price.0.dollars())).collect();
        assert_eq!(brief, [(1, 0.4), (1, 0.9), (1, 1.79), (1, 2.99)]);
        assert_eq!(selection.steps[0].filter, Filter::GpuCount);
        assert_eq!((selection.steps[0].removed, selection.considered), (1, 5));
    }

    #[test]
    fn gpu_count_zero_accepts_every_offer() {
        let want = GpuRequest { gpu_count: Some(0), ..want() };
        assert_eq!(select([laptop(), cloud()].concat(), &want, &work()).unwrap().offers.len(), 6);
        assert_eq!(select(laptop(), &want, &work()).unwrap().steps, []);
    }

    #[test]
    fn error_names_the_deciding_filter_and_a_relaxation() {
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
    fn no_relaxation_is_suggested_when_two_filters_fail() {
        let query = GpuRequest {
            gpu_filter: Some("B200".to_owned()),
            max_price: Some(UsdPerHour::from_dollars(0.01)),
            ..want()
        };
        let error = filtered(cloud(), &query);
        assert_eq!(error.relaxation, None);
        assert!(error.to_string().ends_with("more than one has to be relaxed"), "{error}");
        // An earlier filter than the last one is the cause.
        let offers = vec![offer("vast", Some(("L4", 1, 24)), 9.0), offer("vast", Some(("H100", 1, 80)), 1.0)];
        let query = GpuRequest { gpu_filter: Some("L4".to_owned()), min_vram: Some(Bytes::from_gib(80)), ..want() };
        let error = filtered(offers, &GpuRequest { max_price: Some(UsdPerHour::from_dollars(2.0)), ..query });
        assert_eq!(error.steps.last().unwrap().filter, Filter::MinVram);
        assert_eq!(error.relaxation.unwrap().filter, Filter::GpuFilter);
    }

    #[test]
    fn unknown_value_does_not_satisfy_a_minimum() {
        let mut offers = cloud();
        offers.iter_mut().for_each(|o| o.cpu_ram = None);
        let query = GpuRequest { min_cpu_ram: Some(Bytes::from_gib(1)), ..want() };
        let error = filtered(offers.clone(), &query);
        assert_eq!(error.steps.last().map(|s| (s.removed, s.removed_unknown)), Some((4, 4)));
        assert!(error.reason.contains("unknown values do not pass"), "{error}");
        offers[0].cpu_ram = Some(Bytes::from_mib(512));
        let error = filtered(offers, &query);
        assert_eq!(error.reason, "the most is 0.5 GiB of memory, and 3 do not say how much");
        assert_eq!(error.relaxation.unwrap().option, "--min-cpu-ram 0.5");
    }

    #[test]
    fn old_driver_is_excluded_and_unknown_driver_is_accepted() {
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
    fn host_without_the_planned_memory_is_excluded_and_an_unknown_one_is_accepted() {
        let query = GpuRequest { worker_ram: Some(Bytes::from_gib(2)), ..want() };
        let mut offers = cloud();
        offers.iter_mut().for_each(|offer| offer.cpu_ram = None);
        let without = select(offers.clone(), &want(), &work()).unwrap().offers;
        assert_eq!(select(offers.clone(), &query, &work()).unwrap().offers, without, "none of them tells");
        offers.iter_mut().for_each(|offer| offer.cpu_ram = Some(Bytes::from_gib(1)));
        let error = filtered(offers, &query);
        assert_eq!(error.steps.last().unwrap().filter, Filter::WorkerRam);
        assert!(error.to_string().contains("host memory for the worker (2"), "{error}");
        assert_eq!(error.relaxation, None);
    }

    #[test]
    fn host_memory_does_not_count_as_vram() {
        let query = GpuRequest { min_cpu_ram: Some(Bytes::from_gib(64)), ..want() };
        assert_eq!(filtered(cloud(), &query).steps.last().unwrap().filter, Filter::MinCpuRam);
    }

    #[test]
    fn non_nvidia_gpus_and_spot_are_excluded_by_default() {
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
    fn form_factor_filter_matches_all_spellings() {
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
    fn unsupported_offers_are_excluded_and_counted() {
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
        // The cloud's figure has priority over the name.
        let told = |capability| vec![Offer { capability: Some(capability), ..named("RTX 9999 Future") }];
        assert!(select(told(75), &want(), &work()).is_err() && select(told(130), &want(), &work()).is_ok());
        let cpu = GpuRequest { gpu_count: Some(0), ..want() };
        assert_eq!(select(all, &cpu, &work()).unwrap().offers.len(), good.len() + old.len(), "no GPU is asked for");
    }

    #[test]
    fn single_blocking_option_is_suggested_for_removal() {
        let query = GpuRequest { region: Some("Mars".to_owned()), ..want() };
        // None of these offers states a region.
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
    fn two_letter_region_matches_a_whole_word() {
        let at = |region: &str| Offer { region: Some(region.to_owned()), ..offer("vast", Some(("H100", 1, 80)), 1.0) };
        let offers = ["Texas, US", "Russia, RU", "Austria, AT", "US-KS-2", "EUR-IS-1", "EU-RO-1"].map(at).to_vec();
        for (region, expected) in [("us", 2), ("eu", 2), ("US", 2), ("ru", 1), ("texas", 1), ("at", 1), ("ks", 1)] {
            let query = GpuRequest { region: Some(region.to_owned()), ..want() };
            assert_eq!(select(offers.clone(), &query, &work()).unwrap().offers.len(), expected, "{region}");
        }
    }

    #[test]
    fn cheapest_total_cost_is_first() {
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

    #[test]
    fn of_equal_cost_the_run_that_is_over_first_is_first() {
        let offer = |key: &str, mib: u64, starts_in_s: Option<u64>| Offer {
            download: Some(Bytes::from_mib(mib)),
            key: key.into(),
            starts_in_s,
            ..offer("slurm", Some(("H100", 1, 80)), 0.0)
        };
        let offers = vec![
            offer("a: no start", 2000, None),
            offer("b: slow", 20, Some(0)),
            offer("c: waits", 2000, Some(60)),
            offer("d: at once", 2000, Some(0)),
        ];
        let work = Work { read: Bytes::from_gib(600), ..work() };
        let ranked = select(offers, &want(), &work).unwrap().offers;
        let keys: Vec<&str> = ranked.iter().map(|offer| offer.key.as_str()).collect();
        assert_eq!(keys, ["d: at once", "c: waits", "b: slow", "a: no start"]);
    }

    /// As many offers as the largest clouds together have.
    #[test]
    fn thousand_offers_are_ranked_quickly() {
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
    fn empty_offer_list_is_its_own_error() {
        assert_eq!(select(vec![], &want(), &work()).unwrap_err().to_string(), "no broker has an offer");
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
            worker_ram in any_bytes(),
        ) -> GpuRequest {
            let max_price = cents.map(|cents| UsdPerHour::from_dollars(f64::from(cents) / 100.0));
            GpuRequest {
                gpu_count, gpu_filter, min_vram, min_cpu_ram, min_disk, max_price, region, tier, spot, min_cuda, worker_cuda,
                worker_ram,
            }
        }
    }

    /// The request with the option changed as suggested.
    fn retyped(want: &GpuRequest, found: &Relaxation) -> GpuRequest {
        let value = found.option.strip_prefix("--").and_then(|words| words.split_once(' ')).map(|(_, value)| value);
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
            Filter::Maker | Filter::Processor | Filter::Capability | Filter::WorkerCuda | Filter::WorkerRam => {
                unreachable!("it cannot be relaxed")
            }
        }
        want
    }

    /// The offer as a broker may know it before further queries.
    fn known_in_part(offer: &Offer, known: [bool; 7]) -> Offer {
        let if_known = |is: bool, has: Option<Bytes>| has.filter(|_| is);
        Offer {
            vram: if_known(known[0], offer.vram),
            cpu_ram: if_known(known[1], offer.cpu_ram),
            disk: if_known(known[2], offer.disk),
            region: offer.region.clone().filter(|_| known[3]),
            tier: offer.tier.filter(|_| known[4]),
            max_cuda: offer.max_cuda.filter(|_| known[5]),
            capability: offer.capability.filter(|_| known[6]),
            ..offer.clone()
        }
    }

    #[test]
    fn every_filter_has_one_rule() {
        let filters: std::collections::HashSet<Filter> = RULES.iter().map(|rule| rule.filter).collect();
        assert_eq!(filters.len(), RULES.len());
    }

    #[test]
    fn offers_over_the_time_limit_are_excluded_and_the_fastest_named() {
        let offer = |key: &str, mib: u64| Offer {
            download: Some(Bytes::from_mib(mib)),
            key: key.into(),
            ..offer("vast", Some(("H100", 1, 80)), 1.0)
        };
        let work = Work { read: Bytes::from_gib(600), ..work() };
        // 600 GiB in 10 and in 100 minutes, plus five for the start.
        let quote = select(vec![offer("quick", 1024), offer("slow", 102)], &want(), &work).unwrap();
        let within = |minutes: u64| quote.clone().in_time(&work, Duration::from_secs(60 * minutes));
        let keys = |quote: Quote| quote.offers.into_iter().map(|offer| offer.key).collect::<Vec<_>>();
        assert_eq!(keys(within(200).unwrap()), ["quick", "slow"]);
        assert_eq!(keys(within(16).unwrap()), ["quick"]);
        let late = within(14).unwrap_err();
        let said = "the run is estimated to take 15 min 00 s on the quickest offer (1 x H100 on vast), \
                    1 min 00 s longer than its time limit of 14 min 00 s";
        assert_eq!(late.to_string(), said);
        assert!(late.hint().unwrap().starts_with("--max-duration 15m or more"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn every_offer_is_kept_or_counted_as_removed(
            offers in proptest::collection::vec(any_offer(), 0..12),
            want in any_request(),
        ) {
            let passes = |offer: &Offer| RULES.iter().all(|rule| rule.passes(offer, &want));
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
                Err(late @ NothingLeft::Late { .. }) => return Err(TestCaseError::fail(late.to_string())),
                Err(NothingLeft::Filtered(error)) => {
                    prop_assert_eq!(fit, 0);
                    let removed: usize = error.steps.iter().map(|step| step.removed).sum();
                    prop_assert_eq!(removed, offers.len());
                    let last = error.steps.last().unwrap();
                    prop_assert!(last.left == 0 && last.removed > 0 && last.removed_unknown <= last.removed);
                    let rule = RULES.iter().find(|rule| rule.filter == last.filter).unwrap();
                    prop_assert!(!rule.passes(&error.nearest, &want));
                    prop_assert!(error.to_string().starts_with(&last.option));
                    if let Some(found) = &error.relaxation {
                        // The suggested option works as written.
                        let found_offers = select(offers, &retyped(&want, found), &work()).unwrap().offers;
                        prop_assert!(found_offers.contains(&found.offer));
                    }
                }
            }
        }

        #[test]
        fn kept_offers_may_match_with_partial_information(
            offer in any_offer(), want in any_request(), known in any::<[bool; 7]>(),
        ) {
            let before = known_in_part(&offer, known);
            let kept = RULES.iter().all(|rule| rule.passes(&offer, &want));
            prop_assert!(!kept || may_match(&before, &want));
        }

        /// Each filter alone: a broker that leaves out unfit offers changes nothing for the
        /// market.
        #[test]
        fn early_refusals_hold_with_full_information(
            offer in any_offer(), want in any_request(), known in any::<[bool; 7]>(),
        ) {
            let before = known_in_part(&offer, known);
            for rule in &RULES {
                let refuses = |offer: &Offer| matches!((rule.fit)(offer, &want), Fit::Fails(_));
                prop_assert!(!refuses(&before) || refuses(&offer), "{:?}", rule.filter);
                prop_assert!(!refuses(&before) || !may_match(&before, &want), "{:?}", rule.filter);
                let restricts = rule.typed(&want).is_some();
                prop_assert!(restricts || rule.passes(&before, &want), "{:?} is not asked for", rule.filter);
            }
        }

        #[test]
        fn offer_order_does_not_matter(
            offers in proptest::collection::vec(any_offer(), 1..8),
            want in any_request(),
        ) {
            let prices = |result: Result<Quote, NothingLeft>| result.ok().map(|s| s.offers.iter().map(|o| o.price).collect::<Vec<_>>());
            let reversed = offers.iter().rev().cloned().collect();
            prop_assert_eq!(prices(select(offers, &want, &work())), prices(select(reversed, &want, &work())));
        }
    }
}
