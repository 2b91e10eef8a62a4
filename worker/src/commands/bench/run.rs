//! Measures a whole run over synthetic weights, and compares each kind of work with the best rate
//! of this machine.

use std::fmt;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use outliers_protocol::{CorpusProvenance, JobSpec};
use serde::Serialize;

use super::decode::{self, DecodeTable};
use super::{fastest, giga};
use crate::blocks::ffn::{Choices, ExpertRows};
use crate::checkpoint::hub::Hub;
use crate::checkpoint::safetensors::StoredDtype;
use crate::checkpoint::{Model, TensorRange};
use crate::corpus::Tokens;
use crate::device::gpu;
use crate::device::{self, Placement};
use crate::error::Result;
use crate::kernels::product;
use crate::model::decoder::Need;
use crate::pass::ablation::Arms;
use crate::pass::budget::StreamBudget;
use crate::pass::meter::{Meter, Work};
use crate::pass::progress::ProgressSink;
use crate::pass::stream::Pass;
use crate::run;
use crate::run::inspect::{self, Flops, PlannedRun};
use crate::stats::{LayerObserver, Observer, Scope, Site, Study};

/// Sizes of the square matrices that measure the maximum rate of products. Larger ones are used if
/// a product is so short that its start counts.
const SQUARES: [usize; 3] = [2048, 4096, 8192];
/// Minimum seconds of a product for its start to be negligible.
const LONG: f64 = 2e-3;
/// Seconds of products before the measurement: threads and GPUs take time to reach full speed.
const PRODUCTS: f64 = 0.5;
/// Values decoded to measure the maximum rate of decoding.
const DECODED: usize = 1 << 24;
/// Bytes read to measure the maximum rate of the source.
const READ: u64 = 256 << 20;
/// Bytes per read.
const READ_AT_ONCE: u64 = 4 << 20;
/// Repetitions of each measurement of a maximum rate.
const ROUNDS: usize = 3;
/// Interval of the queries whether GPUs are idle.
const SAMPLED_EVERY: Duration = Duration::from_millis(1);

/// Result of [`run`](fn@run).
#[derive(Clone, Debug, Serialize)]
pub struct RunTable {
    /// Model as given.
    pub model: String,
    /// Layers run.
    pub layers: usize,
    /// Tokens run.
    pub tokens: usize,
    /// Dtype of the pass.
    pub compute: String,
    /// Devices.
    pub devices: usize,
    /// CPU threads that the devices share.
    pub threads: usize,
    /// Stored bytes read.
    pub weight_bytes: u64,
    /// Number of floating-point operations.
    pub flops: f64,
    /// Wall seconds.
    pub seconds: f64,
    /// Seconds that all devices together waited for weights or for each other.
    pub waiting_seconds: f64,
    /// Idle time of GPUs; `None` on CPUs.
    pub idle: Option<Idle>,
    /// Planned memory of the run in bytes.
    pub planned_memory_bytes: u64,
    /// Peak resident memory of this process so far in bytes.
    pub peak_memory_bytes: Option<u64>,
    /// Bytes copied from the host to GPUs; `None` on CPUs.
    pub host_to_device_bytes: Option<u64>,
    /// Bytes copied from GPUs to the host; `None` on CPUs.
    pub device_to_host_bytes: Option<u64>,
    /// Kinds of work, and their total.
    pub rows: Vec<RunRow>,
}

/// Shares of the time in which GPUs were idle, over all GPUs, sampled every millisecond.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Idle {
    /// Share while the host waited for weights, or for hidden states of another GPU.
    pub for_weights: f64,
    /// Share while the host did other work and had not queued the next kernels.
    pub for_host: f64,
}

/// One kind of work.
#[derive(Clone, Debug, Serialize)]
pub struct RunRow {
    /// Name of the work.
    pub work: &'static str,
    /// Unit of the rates: GB/s or GFLOP/s.
    pub unit: &'static str,
    /// Seconds spent by all devices together. Reading and decoding overlap with computing.
    pub seconds: f64,
    /// Rate in the run.
    pub achieved: f64,
    /// Rate of the same work alone.
    pub ceiling: f64,
    /// `achieved / ceiling`.
    pub share: f64,
}

impl RunRow {
    /// A row for `amount` in 10^9 of the unit.
    fn new(work: &'static str, unit: &'static str, amount: f64, seconds: f64, ceiling: f64) -> Self {
        let achieved = amount / seconds.max(1e-9);
        Self { work, unit, seconds, achieved, ceiling, share: achieved / ceiling }
    }
}

impl fmt::Display for RunTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counted = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let layers = counted(self.layers, "layer");
        let (devices, threads) = (counted(self.devices, "device"), counted(self.threads, "thread"));
        let (bytes, flops) = (scaled(self.weight_bytes as f64, "B"), scaled(self.flops, "FLOP"));
        writeln!(f, "{}: {layers}, {} tokens, {} on {devices}, {threads}", self.model, self.tokens, self.compute)?;
        writeln!(f, "{bytes} of weights, {flops}")?;
        writeln!(f, "{:<16} {:>9} {:>10} {:>10} {:<8} {:>6}", "work", "seconds", "achieved", "alone", "", "share")?;
        for r in &self.rows {
            let (achieved, ceiling, share) = (significant(r.achieved), significant(r.ceiling), 100.0 * r.share);
            let (work, unit, seconds) = (r.work, r.unit, significant(r.seconds));
            writeln!(f, "{work:<16} {seconds:>9} {achieved:>10} {ceiling:>10} {unit:<8} {share:>5.0}%")?;
        }
        let waited = 100.0 * self.waiting_seconds / (self.devices as f64 * self.seconds).max(1e-9);
        write!(f, "devices waited for weights or each other in {waited:.0} % of the time")?;
        let planned = scaled(self.planned_memory_bytes as f64, "B");
        match self.peak_memory_bytes {
            Some(peak) => writeln!(f, "; peak memory {}, {planned} were planned", scaled(peak as f64, "B")),
            None => writeln!(f, "; {planned} of memory were planned"),
        }?;
        if let Some(Idle { for_weights, for_host }) = self.idle {
            let [all, weights, host] = [for_weights + for_host, for_weights, for_host].map(|share| 100.0 * share);
            write!(f, "GPUs idled in {all:.0} % of the time: ")?;
            writeln!(f, "{weights:.0} % for weights or each other, {host:.0} % for the host")?;
        }
        match (self.host_to_device_bytes, self.device_to_host_bytes) {
            (Some(there), Some(back)) => {
                let (there, back) = (scaled(there as f64, "B"), scaled(back as f64, "B"));
                writeln!(f, "host to device {there}, device to host {back}")
            }
            _ => Ok(()),
        }
    }
}

/// Three significant digits, or all digits before the point.
fn significant(value: f64) -> String {
    let digits = (2 - value.abs().max(1e-3).log10().floor() as i32).max(0) as usize;
    format!("{value:.digits$}")
}

/// Formats with the prefix that leaves one to three digits before the point.
fn scaled(value: f64, unit: &str) -> String {
    const PREFIXES: [(f64, &str); 5] = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let (size, prefix) = PREFIXES.into_iter().find(|(size, _)| value >= *size).unwrap_or((1.0, ""));
    format!("{} {prefix}{unit}", significant(value / size))
}

/// Runs `job`'s model over synthetic token ids, then measures each kind of work alone.
///
/// # Errors
/// Errors of the model, the source or the device.
pub fn run(job: &JobSpec, sequences: usize, tokens: usize, hub: &Hub) -> Result<RunTable> {
    let devices = device::open(&job.devices)?;
    let compute = device::compute_dtype(job.precision, &devices);
    let budget = StreamBudget::new(job.stream_budget_bytes);
    let progress = ProgressSink::silent();
    let checkpoint = run::checkpoint(job, budget, hub, &progress)?;
    let source = &*checkpoint.weights;
    let model = Model::open(&checkpoint.config, source, job.layers)?;
    let spec = &model.spec;
    let tokens = made_up(spec.vocab, sequences, tokens);
    let meter = Meter::default();
    let size = [sequences, tokens.tokens];
    let mut planned = PlannedRun { measured: 0, ..PlannedRun::new(job, spec, size, 1, &devices, budget) };
    planned.micro_batch_tokens = inspect::micro_batch_tokens(job.micro_batch_tokens, &model, planned, &devices);
    let pass = Pass {
        model: &model,
        tokens: &tokens,
        arms: &Arms::whole(),
        compute,
        devices: &devices,
        micro_batch_tokens: planned.micro_batch_tokens,
        with_head: planned.with_head,
        group_elements: planned.group_elements,
        hash_memory: budget.hash_memory(0),
        read_ahead: true,
        progress: &progress,
        meter: &meter,
    };
    let study = Study::new(Scope::new(job, spec, &tokens), job.thresholds.magnitude);
    let mut measured = MeasuredStudy { study, bytes: 0 };
    let (start, before) = (Instant::now(), gpu::traffic());
    let (passed, idle) = watching_for_idle_gpus(&devices, &meter, || pass.run(&mut measured, None));
    passed?;
    source.verify()?;
    let seconds = start.elapsed().as_secs_f64();
    let copied = device::has_gpu(&devices).then(|| gpu::traffic().since(before));
    let peak_memory_bytes = run::peak_memory();

    let weight_bytes = source.bytes_read();
    let flops = Flops::of(spec, planned);
    let products = products(&model, compute, &devices[0].device)?;
    let of = |kinds: &[Work]| kinds.iter().map(|work| meter.seconds(*work)).sum::<f64>();
    let computing = |work, flops: f64, kinds: &[Work]| RunRow::new(work, "GFLOP/s", flops / 1e9, of(kinds), products);
    let giga_bytes = weight_bytes as f64 / 1e9;
    let statistics = measured.alone(spec.hidden, &tokens, compute, &devices[0].device)?;
    let decoding = decoding_alone(&model, compute, &devices[0].device)?;
    let mut rows = vec![
        RunRow::new("reading", "GB/s", giga_bytes, of(&[Work::Reading]), reading_alone(&model)?),
        RunRow::new("decoding", "GB/s", giga_bytes, of(&[Work::Decoding]), decoding),
        computing("mixers", flops.mixer, &[Work::Mixer]),
        computing("feed-forward", flops.feed_forward, &[Work::FeedForward]),
        computing("embedding, head", flops.head, &[Work::Embedding, Work::Head]),
        RunRow::new("statistics", "GB/s", measured.bytes as f64 / 1e9, of(&[Work::Statistics]), statistics),
    ];
    if let (Some(copied), Some([there, back])) = (copied, gpu::copy_rates(&devices[0].device, ROUNDS)?) {
        // Copies overlap with all other work, so their time is the run's.
        let row = |work, bytes: u64, alone: f64| RunRow::new(work, "GB/s", bytes as f64 / 1e9, seconds, alone / 1e9);
        rows.extend([row("host to device", copied.to_gpus, there), row("device to host", copied.from_gpus, back)]);
    }
    rows.push(RunRow::new("whole run", "GFLOP/s", flops.total() / 1e9, seconds, products));
    Ok(RunTable {
        model: job.model_name().to_owned(),
        layers: spec.layers.len(),
        tokens: tokens.ids.len(),
        compute: compute.as_str().to_owned(),
        devices: devices.len(),
        threads: rayon::current_num_threads(),
        weight_bytes,
        flops: flops.total(),
        seconds,
        waiting_seconds: meter.seconds(Work::Waiting),
        idle,
        planned_memory_bytes: inspect::streamed_memory(&model, planned),
        peak_memory_bytes,
        host_to_device_bytes: copied.map(|copied| copied.to_gpus),
        device_to_host_bytes: copied.map(|copied| copied.from_gpus),
        rows,
    })
}

/// Runs `work` while sampling whether GPUs are idle and what the host does.
fn watching_for_idle_gpus<R>(devices: &[Placement], meter: &Meter, work: impl FnOnce() -> R) -> (R, Option<Idle>) {
    /// Ends the sampling when dropped, also by an error.
    struct Ends<'a>(&'a AtomicBool);
    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    if !device::has_gpu(devices) {
        return (work(), None);
    }
    let ended = AtomicBool::new(false);
    let watch = || {
        let (mut asked, mut for_weights, mut for_host) = (0u64, 0u64, 0u64);
        while !ended.load(Ordering::Relaxed) {
            for (number, Placement { device, .. }) in devices.iter().enumerate() {
                let Some(is_idle) = gpu::is_idle(device) else { continue };
                asked += 1;
                let waits = meter.is_waiting(number);
                for_weights += u64::from(is_idle && waits);
                for_host += u64::from(is_idle && !waits);
            }
            thread::sleep(SAMPLED_EVERY);
        }
        let share = |times: u64| times as f64 / asked.max(1) as f64;
        Idle { for_weights: share(for_weights), for_host: share(for_host) }
    };
    thread::scope(|scope| {
        let watch = scope.spawn(watch);
        let result = {
            let _ends = Ends(&ended);
            work()
        };
        (result, watch.join().ok())
    })
}

/// Token ids from the whole vocabulary.
fn made_up(vocab: usize, sequences: usize, tokens: usize) -> Tokens {
    let ids = (0..sequences * tokens).map(|i| (i.wrapping_mul(7919) % vocab) as i64).collect();
    let provenance = CorpusProvenance {
        source: "synthetic token ids".to_owned(),
        sha256: String::new(),
        token_ids_sha256: String::new(),
        sequences,
        tokens_per_sequence: tokens,
        tokens_available: sequences * tokens,
    };
    Tokens { ids, sequences, tokens, provenance, tokenizer: None }
}

/// A study that counts the bytes it observed.
struct MeasuredStudy {
    study: Study,
    bytes: u64,
}

impl MeasuredStudy {
    /// GB/s of the same statistics alone.
    fn alone(&self, hidden: usize, tokens: &Tokens, compute: DType, device: &Device) -> Result<f64> {
        let x = random([tokens.tokens, hidden], compute, device)?;
        let site = self.study.outliers().sites()[0];
        let mut study = self.study.layer(site.layer);
        let seconds = fastest(ROUNDS, || study.observe(site, 0, &x).and_then(|()| study.synchronize()))?;
        Ok(giga(x.elem_count() * compute.size_in_bytes(), seconds))
    }

    fn count(&mut self, x: &Tensor) {
        self.bytes += (x.elem_count() * x.dtype().size_in_bytes()) as u64;
    }
}

impl LayerObserver for MeasuredStudy {
    fn wants(&self, site: Site) -> bool {
        self.study.wants(site)
    }

    fn observe(&mut self, site: Site, first_token: usize, x: &Tensor) -> Result<()> {
        self.count(x);
        self.study.observe(site, first_token, x)
    }

    fn gain(&mut self, site: Site, gain: &Tensor) -> Result<()> {
        self.study.gain(site, gain)
    }

    fn expert(&mut self, layer: usize, expert: usize, first_token: usize, rows: &ExpertRows) -> Result<()> {
        self.count(&rows.out);
        self.study.expert(layer, expert, first_token, rows)
    }

    fn routing(&mut self, layer: usize, first_token: usize, choices: &Choices) -> Result<()> {
        self.study.routing(layer, first_token, choices)
    }

    fn synchronize(&mut self) -> Result<()> {
        self.study.synchronize()
    }
}

impl Observer for MeasuredStudy {
    type Layer = Self;

    fn layer(&self, layer: usize) -> Self {
        Self { study: self.study.layer(layer), bytes: 0 }
    }

    fn join(&mut self, seen: Self) {
        self.bytes += seen.bytes;
        self.study.join(seen.study);
    }
}

/// Random numbers, made on the host: a machine with GPUs may lack the library that draws them
/// there.
fn random(shape: [usize; 2], dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, 1f32, &shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?)
}

/// GFLOP/s of products of large square matrices in the most common dtypes of the model.
fn products(model: &Model<'_>, compute: DType, device: &Device) -> Result<f64> {
    let takes_bf16 = product::takes_bf16(device);
    let is_kept = |layer, need: &Need| model.stored(layer, need).kept_as(compute, takes_bf16) == compute;
    let (as_computed, as_stored): (Vec<_>, Vec<_>) =
        model.spec.needs().into_iter().partition(|(layer, need)| is_kept(*layer, need));
    let values = |needs: &[(usize, Need)]| needs.iter().map(|(_, need)| need.elements()).sum::<u64>();
    let weights = if values(&as_stored) > values(&as_computed) { DType::BF16 } else { compute };
    let mut best = 0f64;
    for side in SQUARES {
        let matrix = |dtype| random([side, side], dtype, device);
        let (a, b) = (matrix(compute)?, matrix(weights)?);
        let mut multiply = || {
            black_box(product::product(&a, &b)?);
            device.synchronize().map_err(Into::into)
        };
        let once = fastest(1, &mut multiply)?;
        let seconds = fastest(ROUNDS.max((PRODUCTS / once) as usize), multiply)?;
        best = best.max(giga(2 * side * side * side, seconds));
        if once > LONG {
            break;
        }
    }
    Ok(best)
}

/// GB/s of the source, read in the order of the pass into reused memory.
fn reading_alone(model: &Model<'_>) -> Result<f64> {
    let needs = model.spec.needs();
    // Initialised, so that the system allocates it.
    let mut bytes = vec![1; READ_AT_ONCE as usize];
    let (mut read, start) = (0, Instant::now());
    for (layer, need) in &needs {
        for TensorRange { entry, range } in model.stored(*layer, need).pieces() {
            for from in range.clone().step_by(READ_AT_ONCE as usize) {
                let part = from..range.end.min(from + READ_AT_ONCE);
                let len = part.end - part.start;
                model.source.read(entry, part, &mut bytes[..len as usize])?;
                read += len;
            }
        }
        if read >= READ {
            break;
        }
    }
    Ok(giga(read as usize, start.elapsed().as_secs_f64()))
}

/// GB/s of decoding the model's formats, weighted by their bytes; on a GPU including the upload.
fn decoding_alone(model: &Model<'_>, compute: DType, device: &Device) -> Result<f64> {
    let into = if compute == DType::F32 { DType::F32 } else { DType::BF16 };
    let format = |dtype: &str| match StoredDtype::from_name(dtype) {
        StoredDtype::F8E4M3 => "FP8",
        StoredDtype::U8 => "MXFP4",
        StoredDtype::I32 => "INT4",
        StoredDtype::F32 => "F32",
        StoredDtype::F16 => "F16",
        _ => "BF16",
    };
    let dtypes = model.stored_dtypes();
    let is_wanted = |name: &str, dtype| dtype == into && dtypes.keys().any(|stored| name.starts_with(format(stored)));
    let DecodeTable { rows, .. } = decode::decode_some(DECODED, ROUNDS, device, is_wanted)?;
    let (mut bytes, mut seconds) = (0.0, 0.0);
    for (dtype, len) in &dtypes {
        if let Some(row) = rows.iter().find(|row| row.stored.starts_with(format(dtype))) {
            bytes += *len as f64;
            seconds += *len as f64 / row.stored_gb_per_second;
        }
    }
    Ok(bytes / seconds.max(1e-9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_device_copies_are_reported_on_gpus() {
        let mut table = RunTable {
            model: "m".to_owned(),
            layers: 1,
            tokens: 8,
            compute: "bf16".to_owned(),
            devices: 1,
            threads: 2,
            weight_bytes: 1,
            flops: 1.0,
            seconds: 1.0,
            waiting_seconds: 0.0,
            idle: None,
            planned_memory_bytes: 1,
            peak_memory_bytes: None,
            host_to_device_bytes: None,
            device_to_host_bytes: None,
            rows: Vec::new(),
        };
        assert!(!table.to_string().contains("host"));
        (table.host_to_device_bytes, table.device_to_host_bytes) = (Some(13_800_000_000), Some(8_600_000));
        assert!(table.to_string().ends_with("\nhost to device 13.8 GB, device to host 8.60 MB\n"), "{table}");
        table.idle = Some(Idle { for_weights: 0.25, for_host: 0.05 });
        let idled = "\nGPUs idled in 30 % of the time: 25 % for weights or each other, 5 % for the host\n";
        assert!(table.to_string().contains(idled), "{table}");
    }

    #[test]
    fn nobody_looks_for_idle_gpus_on_a_cpu() {
        let devices = device::open(&["cpu".to_owned()]).unwrap();
        let (seven, idle) = watching_for_idle_gpus(&devices, &Meter::default(), || 7);
        assert!(seven == 7 && idle.is_none());
    }

    #[test]
    fn numbers_have_three_significant_digits() {
        assert_eq!(
            [0.0, 0.01234, 0.5, 12.345, 999.9, 12345.6].map(significant),
            ["0.00000", "0.0123", "0.500", "12.3", "1000", "12346"]
        );
        assert_eq!(scaled(2_091_000_000.0, "B"), "2.09 GB");
        assert_eq!(scaled(70_713_344.0, "FLOP"), "70.7 MFLOP");
        assert_eq!(scaled(12.0, "B"), "12.0 B");
    }
}
