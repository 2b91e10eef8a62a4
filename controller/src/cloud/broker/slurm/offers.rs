//! Offers of the partitions, and the queue's estimates of start times.

use super::queue::field;
use super::{NAME, Site, Sku};
use crate::cloud::broker::{GpuRequest, Offer, Offers};
use crate::host::probe::free_kib;
use crate::host::transport::quote::quote;
use crate::text::clean;
use crate::units::Bytes;

/// Maximum number of offers with a start estimate, since each is a query to Slurm's scheduler.
pub(super) const MAX_ASKED: usize = 8;
/// CPUs of a job without GPUs.
const CPUS: u32 = 8;

/// A script that prints the node groups of all partitions, or of one, and the free space for
/// leases.
pub(super) fn script(root: &str, partition: Option<&str>) -> String {
    let only = partition.map(|name| quote(&format!("--partition={name}"))).unwrap_or_default();
    let above = root.rsplit_once('/').map_or("/", |(above, _)| above);
    format!(
        "sinfo --noheader --exact {only} --format='@nodes %P|%a|%l|%F|%c|%m|%G' || exit 1\n\
         echo \"@disk $(df -Pk {} | tail -n 1)\"\necho \"@now $(date +%s)\"",
        quote(above)
    )
}

/// A script that queries when each job would start. Nothing is submitted.
pub(super) fn when(questions: &[(usize, String)]) -> String {
    let ask = |(i, options): &(usize, String)| {
        format!("echo \"@start-{i} $(printf '#!/bin/sh\\n' | sbatch --test-only {options} 2>&1 | tr '\\n' ' ')\"\n")
    };
    questions.iter().map(ask).collect::<String>() + "echo \"@now $(date +%s)\""
}

/// Nodes of one partition with the same resources.
#[derive(Debug, PartialEq)]
struct Group {
    partition: String,
    is_up: bool,
    limit_s: Option<u64>,
    idle: u32,
    nodes: u32,
    cpus: u32,
    mem_mib: u64,
    gpus: Vec<(Option<String>, u32)>,
}

impl Group {
    fn read(line: &str) -> Option<Self> {
        let parts: Vec<&str> = line.splitn(7, '|').map(str::trim).collect();
        let [partition, up, limit, nodes, cpus, mem, gres] = parts[..] else { return None };
        // Allocated, idle, other, total.
        let counts: Vec<u32> = nodes.split('/').map(|n| n.parse().ok()).collect::<Option<_>>()?;
        let [_, idle, _, nodes] = counts[..] else { return None };
        let partition = partition.trim_end_matches('*');
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if partition.is_empty() || partition.starts_with('-') || !partition.chars().all(plain) {
            return None;
        }
        Some(Self {
            partition: partition.to_owned(),
            is_up: up == "up",
            limit_s: seconds(limit)?,
            idle,
            nodes,
            cpus: cpus.trim_end_matches('+').parse().ok().filter(|cpus| *cpus > 0)?,
            mem_mib: mem.trim_end_matches('+').parse().ok().filter(|mem| *mem > 0)?,
            gpus: gpus(gres),
        })
    }
}

/// `1-00:00:00`, `12:30:00`, `30:00`, `30`; `Some(None)`: no limit.
fn seconds(limit: &str) -> Option<Option<u64>> {
    if matches!(limit, "infinite" | "UNLIMITED" | "n/a") {
        return Some(None);
    }
    let (days, rest) = limit.split_once('-').unwrap_or(("0", limit));
    let days: u64 = days.parse().ok()?;
    let parts: Vec<u64> = rest.split(':').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let seconds = match (parts[..].len(), limit.contains('-')) {
        (3, _) => parts[0].checked_mul(3600)?.checked_add(parts[1].checked_mul(60)?)?.checked_add(parts[2])?,
        (2, false) => parts[0].checked_mul(60)?.checked_add(parts[1])?,
        (2, true) => parts[0].checked_mul(3600)?.checked_add(parts[1].checked_mul(60)?)?,
        (1, false) => parts[0].checked_mul(60)?,
        (1, true) => parts[0].checked_mul(3600)?,
        _ => return None,
    };
    Some(Some(days.checked_mul(86_400)?.checked_add(seconds)?))
}

/// `gpu:a100:4(S:0-1),gpu:2,shard:8`: types and counts of GPUs.
fn gpus(gres: &str) -> Vec<(Option<String>, u32)> {
    let mut depth = 0_u32;
    let outside: String = gres
        .chars()
        .filter(|c| {
            match c {
                '(' => depth += 1,
                ')' => depth = depth.saturating_sub(1),
                _ => return depth == 0,
            }
            false
        })
        .collect();
    let one = |entry: &str| {
        let parts: Vec<&str> = entry.split(':').collect();
        let plain = |name: &&str| {
            let fits = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
            !name.is_empty() && name.len() <= 60 && name.chars().all(fits)
        };
        match parts[..] {
            ["gpu", count] => Some((None, count.parse().ok()?)),
            ["gpu", kind, count] if plain(&kind) => Some((Some(kind.to_owned()), count.parse().ok()?)),
            _ => None,
        }
    };
    outside.split(',').filter_map(one).filter(|(_, count)| (1..=64).contains(count)).collect()
}

/// Offers, with the options that request each.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) sku: Vec<Sku>,
    pub(super) offers: Offers,
}

/// Parses the output of [`script`] into offers for `want`.
pub(super) fn read(answer: &str, want: &GpuRequest, site: &Site) -> Found {
    let disk = field(answer, "disk").and_then(free_kib).map(|kib| Bytes(kib.saturating_mul(1024)));
    let mut found = Found::default();
    for line in answer.lines().filter_map(|line| line.strip_prefix("@nodes ")) {
        match Group::read(line) {
            Some(group) if group.is_up => found.add(&group, want, site, disk),
            Some(group) => found.offers.drop_one(format!("partition {} is not up", group.partition)),
            None => found.offers.drop_one("described in a way that is not understood".to_owned()),
        }
    }
    found
}

impl Found {
    fn add(&mut self, group: &Group, want: &GpuRequest, site: &Site, disk: Option<Bytes>) {
        let least_mib = want.min_cpu_ram.max(want.worker_ram).map_or(0, |ram| ram.0.div_ceil(1 << 20));
        if want.gpu_count == Some(0) {
            let cpus = group.cpus.min(CPUS);
            let mem = share(group.mem_mib, cpus, group.cpus).max(least_mib).min(group.mem_mib);
            self.push(group, (None, 0), cpus, mem, site, disk);
            return;
        }
        if group.gpus.is_empty() {
            self.offers.drop_one("without GPUs".to_owned());
        }
        for (kind, all) in &group.gpus {
            let count = want.gpu_count.unwrap_or(1);
            if count > *all {
                self.offers.drop_one("with fewer GPUs in a node".to_owned());
                continue;
            }
            let cpus = share(group.cpus.into(), count, *all).max(1) as u32;
            let mem = share(group.mem_mib, count, *all).max(least_mib).min(group.mem_mib);
            self.push(group, (kind.clone(), count), cpus, mem, site, disk);
        }
    }

    fn push(
        &mut self,
        group: &Group,
        (gpu_type, gpus): (Option<String>, u32),
        cpus: u32,
        mem_mib: u64,
        site: &Site,
        disk: Option<Bytes>,
    ) {
        let partition = group.partition.clone();
        let (host, scratch) = (site.host.clone(), Some(site.recorded_scratch()));
        let sku = Sku { host, scratch, partition, gpus, gpu_type, cpus, mem_mib, limit_s: group.limit_s };
        let Ok(key) = serde_json::to_string(&sku) else { return };
        let offer = Offer { queued: true, ..Offer::new(NAME, key, gpus, site.price(gpus)) };
        let offer = match &sku.gpu_type {
            Some(kind) => offer.with_gpu(kind, site.gpu_memory),
            None => Offer { vram: site.gpu_memory.filter(|_| gpus > 0), ..offer },
        };
        // An A100 or V100 is assumed to be the smaller variant.
        let vram = offer.vram.or_else(|| sku.gpu_type.as_deref().and_then(least_memory));
        self.offers.offers.push(Offer {
            vram,
            cpu_ram: Some(Bytes::from_mib(mem_mib)),
            cpu_cores: Some(cpus),
            disk,
            region: Some(format!("{}: {} of {} nodes idle", group.partition, group.idle, group.nodes)),
            ..offer
        });
        self.sku.push(sku);
    }

    /// Adds the output of [`when`].
    pub(super) fn note_starts(&mut self, answer: &str) {
        let Some(now) = field(answer, "now").and_then(|now| now.trim().parse::<u64>().ok()) else { return };
        for (i, offer) in self.offers.offers.iter_mut().enumerate().take(MAX_ASKED) {
            let Some(words) = field(answer, &format!("start-{i}")) else { continue };
            let at = words.split(" to start at ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok());
            offer.starts_in_s = at.map(|at| at.saturating_sub(now));
            let when = match offer.starts_in_s.map(|seconds| seconds / 60) {
                Some(0) => "starts at once".to_owned(),
                Some(minutes) if minutes < 120 => format!("starts in some {minutes} min"),
                Some(minutes) => format!("starts in some {} h", minutes / 60),
                None => format!("no start: {}", clean(words.trim_start_matches("sbatch: error: ").as_bytes(), 80)),
            };
            offer.region = offer.region.take().map(|region| format!("{region}, {when}"));
        }
    }
}

/// The part of `whole` for `part` of `all`.
fn share(whole: u64, part: u32, all: u32) -> u64 {
    whole.saturating_mul(part.into()) / u64::from(all.max(1))
}

/// Memory of the smallest variant of this GPU type, if the name does not determine it.
fn least_memory(kind: &str) -> Option<Bytes> {
    let kind = kind.to_lowercase();
    let words = || kind.split(|c: char| !c.is_ascii_alphanumeric());
    let gib = [("a100", 40), ("v100", 16)].into_iter().find(|(name, _)| words().any(|word| word == *name));
    gib.map(|(_, gib)| Bytes::from_gib(gib))
}
