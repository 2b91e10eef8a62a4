//! Layers on several devices: results are bit-identical for any number of devices, delay of a
//! thread, or prefetch.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use candle_core::{DType, Tensor};
use outliers_protocol::{
    Ablation, CorpusSource, CorpusSpec, Export, JobSpec, Measurement, ModelSource, Point, SiteKind,
};
use outliers_worker::blocks::ffn::{Choices, ExpertRows};
use outliers_worker::checkpoint::Model;
use outliers_worker::checkpoint::hub::{Hub, HubOptions};
use outliers_worker::checkpoint::source::{Checkpoint, TensorEntry, TensorIndex, WeightSource};
use outliers_worker::corpus::{self, Tokens};
use outliers_worker::device;
use outliers_worker::error::{Result, WorkerError};
use outliers_worker::pass::ablation::{Arms, Sharpness};
use outliers_worker::pass::meter::{Meter, Span, Thread, Work};
use outliers_worker::pass::progress::ProgressSink;
use outliers_worker::pass::savepoint::SavePoints;
use outliers_worker::pass::stream::{Pass, Predicted};
use outliers_worker::run::export::{self, Exports};
use outliers_worker::run::observer::RunObserver;
use outliers_worker::stats::{LayerObserver, Observer, Scope, Site, Study};

/// Dense models in all three orders of norms, MoE of every kind, every stored format.
const FIXTURES: [&str; 12] = [
    "deepseek-v3-fp8",
    "glm4-moe-grouped",
    "gpt-oss-mxfp4",
    "gptj-bin",
    "kimi-linear",
    "llama-f32",
    "llama4-scout",
    "nemotron-h",
    "nemotron-h-latent",
    "olmoe-bf16",
    "opt-350m",
    "qwen3-next",
];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

/// A checkpoint, with its reference's token ids in five orders, so that there are more
/// micro-batches than devices.
struct Fixture {
    job: JobSpec,
    checkpoint: Checkpoint,
    tokens: Tokens,
    arms: Arms,
}

impl Fixture {
    fn open(name: &str) -> Self {
        let model = golden(name).join("model");
        let path = model.to_str().unwrap().to_owned();
        let (sites, measure, export) = (SiteKind::ALL.into(), Measurement::ALL.into(), Export::ALL.into());
        let job = JobSpec { sites, measure, export, ..JobSpec::new(ModelSource::Folder { path }) };
        let ids = golden(name).join("golden.safetensors");
        let source = CorpusSource::TokenIds(ids.to_str().unwrap().to_owned());
        let hub = Hub::new(HubOptions::new("/nowhere")).unwrap();
        let spec = CorpusSpec { source, ..CorpusSpec::default() };
        let mut tokens = corpus::load(&spec, None, usize::MAX, None, &hub).unwrap();
        let rows: Vec<Vec<i64>> = tokens.ids.chunks(tokens.tokens).map(<[i64]>::to_vec).collect();
        tokens.ids = (0..5).flat_map(|turn| rows.iter().flat_map(move |row| turned(row, turn))).collect();
        tokens.sequences = 5 * rows.len();
        Self { job, checkpoint: Checkpoint::open_folder(&model).unwrap(), tokens, arms: Arms::whole() }
    }

    /// With two ablated arms.
    fn ablated(mut self) -> Self {
        let model = Model::open(&self.checkpoint.config, &*self.checkpoint.weights, None).unwrap();
        self.arms =
            Arms::of(Some(&Ablation { features: vec![1, 5], seed: 0 }), model.spec.hidden, self.tokens.tokens).unwrap();
        self
    }

    fn study(&self, model: &Model<'_>) -> Study {
        Study::new(Scope::new(&self.job, &model.spec, &self.tokens), self.job.thresholds.magnitude)
    }

    /// A pass in micro-batches of one sequence, with experts in groups of two or three.
    fn pass<O: Observer>(
        &self,
        how: PassOptions,
        source: &dyn WeightSource,
        meter: &Meter,
        observer: impl FnOnce(&Model<'_>, Study) -> O,
        save: Option<&mut SavePoints>,
    ) -> Result<(O, Vec<Predicted>)> {
        let model = Model::open(&self.checkpoint.config, source, None)?;
        let mut observer = observer(&model, self.study(&model));
        let pass = Pass {
            model: &model,
            tokens: &self.tokens,
            arms: &self.arms,
            compute: DType::F32,
            devices: &device::open(&[format!("cpu:{}", how.devices)])?,
            micro_batch_tokens: how.micro_batch_tokens,
            with_head: true,
            group_elements: how.group_elements,
            hash_memory: 0,
            read_ahead: how.read_ahead,
            progress: &ProgressSink::silent(),
            meter,
        };
        let predicted = pass.run(&mut observer, save)?.predicted.expect("a pass with the head");
        Ok((observer, predicted))
    }

    /// All measurements, bit by bit.
    fn measured(&self, how: PassOptions, source: &dyn WeightSource, save: Option<&mut SavePoints>) -> Result<Measured> {
        let observer = |_: &Model<'_>, study| {
            let exports = Exports::new(&self.job);
            RunObserver { study, dump: None, sharpness: Sharpness::new(), exports }
        };
        let (observer, predicted) = self.pass(how, source, &Meter::default(), observer, save)?;
        let RunObserver { study, sharpness, exports, .. } = observer;
        let bits =
            |arm: &Predicted| (arm.nll.iter().map(|value| value.to_bits()).collect(), arm.top_probability.to_bits());
        let exported = exports.expect("asked for").layers().clone();
        Ok(Measured { study: study.state()?, sharpness, exported, predicted: predicted.iter().map(bits).collect() })
    }
}

#[derive(Debug, PartialEq)]
struct Measured {
    study: Vec<u8>,
    sharpness: Sharpness,
    exported: BTreeMap<usize, export::Layer>,
    /// Measurements of each arm.
    predicted: Vec<(Vec<u32>, u64)>,
}

fn turned(row: &[i64], turn: usize) -> Vec<i64> {
    let at = turn * row.len() / 7;
    [&row[at..], &row[..at]].concat()
}

#[derive(Clone, Copy, Debug)]
struct PassOptions {
    devices: usize,
    read_ahead: bool,
    group_elements: u64,
    micro_batch_tokens: usize,
}

impl PassOptions {
    fn on(devices: usize) -> Self {
        Self { devices, read_ahead: true, group_elements: 10_000, micro_batch_tokens: 1 }
    }
}

/// A source of weights that delays each read by another time, and fails on tensors of one name.
struct FaultySource<'a> {
    of: &'a dyn WeightSource,
    /// 0: no delay.
    most_milliseconds: u64,
    reads: AtomicU64,
    fails_on: Option<String>,
}

impl<'a> FaultySource<'a> {
    fn new(of: &'a dyn WeightSource, most_milliseconds: u64, seed: u64, fails_on: Option<String>) -> Self {
        Self { of, most_milliseconds, reads: AtomicU64::new(seed << 32), fails_on }
    }
}

impl WeightSource for FaultySource<'_> {
    fn index(&self) -> &TensorIndex {
        self.of.index()
    }

    fn read(&self, entry: &TensorEntry, range: Range<u64>, into: &mut [u8]) -> Result<()> {
        if self.fails_on.as_ref().is_some_and(|name| entry.name.contains(name)) {
            return Err(WorkerError::network("the wire is cut"));
        }
        let mixed = self.reads.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        // Most reads are fast; some are slow.
        if mixed.is_multiple_of(8) {
            std::thread::sleep(Duration::from_millis(mixed / 8 % (self.most_milliseconds + 1)));
        }
        self.of.read(entry, range, into)
    }

    fn bytes_read(&self) -> u64 {
        self.of.bytes_read()
    }
}

#[test]
fn ablation_arms_change_no_bit_of_the_main_arm() {
    for name in FIXTURES {
        let fixture = Fixture::open(name);
        let alone = fixture.measured(PassOptions::on(1), &*fixture.checkpoint.weights, None).unwrap();
        let fixture = fixture.ablated();
        let beside = fixture.measured(PassOptions::on(1), &*fixture.checkpoint.weights, None).unwrap();
        assert!(beside.study == alone.study && beside.predicted[0] == alone.predicted[0], "{name}");
        assert!(alone.sharpness.is_empty() && !beside.sharpness.is_empty(), "{name}");
        let [whole, without, others] = &beside.predicted[..] else { panic!("{name}: not three arms") };
        assert!(whole != without && whole != others && without != others, "{name}");
    }
}

#[test]
fn devices_delays_and_prefetch_change_no_bit() {
    let fixtures: &[&str] = &FIXTURES;
    let (some, others) = fixtures.split_at(fixtures.len() / 2);
    // Two at a time: the small passes of one leave processors idle.
    std::thread::scope(|scope| {
        scope.spawn(|| some.iter().for_each(|name| delays_change_no_bit(name)));
        others.iter().for_each(|name| delays_change_no_bit(name));
    });
}

fn delays_change_no_bit(name: &str) {
    let fixture = Fixture::open(name).ablated();
    let source = &*fixture.checkpoint.weights;
    let one = fixture.measured(PassOptions::on(1), source, None).unwrap();
    for (seed, devices, read_ahead) in [(0, 1, false), (1, 2, true), (2, 4, false), (3, 3, true)] {
        let how = PassOptions { read_ahead, ..PassOptions::on(devices) };
        let slow = FaultySource::new(source, 5, seed, None);
        let other = fixture.measured(how, &slow, None).unwrap();
        assert!(one == other, "{name}: {how:?}, delays {seed}");
    }
}

/// Prefix of a layer's tensors in every fixture used here.
fn of_layer(model: &Model<'_>, layer: usize) -> String {
    let needs = model.spec.units(u64::MAX).into_iter().find(|unit| unit.layer == layer).expect("a layer").needs;
    let name = model.name_of(layer, &needs[0]);
    let at = name.find(&format!(".{layer}.")).expect("layers are numbered");
    name[..at + format!(".{layer}.").len()].to_owned()
}

#[test]
fn interrupted_pass_resumes_on_other_devices_to_the_same_bits() {
    for name in ["llama-f32", "olmoe-bf16", "opt-350m", "qwen3-next"] {
        let fixture = Fixture::open(name).ablated();
        let source = &*fixture.checkpoint.weights;
        let whole = fixture.measured(PassOptions::on(1), source, None).unwrap();
        let (last, prefix) = {
            let model = Model::open(&fixture.checkpoint.config, source, None).unwrap();
            let last = model.spec.layers.len() - 1;
            (last, of_layer(&model, last))
        };
        let mut saved = Vec::new();
        for (devices, then) in [(1, 4), (2, 1), (4, 2)] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("save");
            let mut points = SavePoints::new(path.clone(), "run".to_owned(), Duration::ZERO);
            let cut = FaultySource::new(source, 3, devices as u64, Some(prefix.clone()));
            let error = fixture.measured(PassOptions::on(devices), &cut, Some(&mut points)).unwrap_err();
            assert!(error.message().contains("the wire is cut"), "{name}: {error}");
            assert_eq!(points.load().unwrap().map(|point| point.next_layer), Some(last), "{name} on {devices}");
            saved.push(std::fs::read(&path).unwrap());
            let resumed = fixture.measured(PassOptions::on(then), source, Some(&mut points)).unwrap();
            assert!(resumed == whole, "{name}: from {devices} devices to {then}");
        }
        assert!(saved[0] == saved[1] && saved[0] == saved[2], "{name}: save points differ");
    }
}

#[test]
fn a_pass_that_died_goes_on_in_other_micro_batches() {
    let fixture = Fixture::open("olmoe-bf16").ablated();
    let source = &*fixture.checkpoint.weights;
    let whole = fixture.measured(PassOptions::on(1), source, None).unwrap();
    let model = Model::open(&fixture.checkpoint.config, source, None).unwrap();
    let prefix = of_layer(&model, model.spec.layers.len() - 1);
    // The last of three sequences each is smaller.
    let (one, three) =
        (PassOptions::on(1), PassOptions { micro_batch_tokens: 3 * fixture.tokens.tokens, ..PassOptions::on(2) });
    assert_ne!(fixture.tokens.sequences % 3, 0);
    for (how, then) in [(one, three), (three, one)] {
        let folder = tempfile::tempdir().unwrap();
        let mut points = SavePoints::new(folder.path().join("save"), "run".to_owned(), Duration::ZERO);
        let cut = FaultySource::new(source, 0, 0, Some(prefix.clone()));
        let error = fixture.measured(how, &cut, Some(&mut points)).unwrap_err();
        assert!(error.message().contains("the wire is cut"), "{error}");
        let resumed = fixture.measured(then, source, Some(&mut points)).unwrap();
        assert_eq!(resumed.predicted.len(), whole.predicted.len());
        for ((got, _), (want, _)) in resumed.predicted.iter().zip(&whole.predicted) {
            assert_eq!(got.len(), want.len());
            let near = |(a, b): (&u32, &u32)| (f32::from_bits(*a) - f32::from_bits(*b)).abs() <= 1e-3;
            assert!(got.iter().zip(want).all(near), "{how:?} then {then:?}");
        }
    }
}

#[test]
fn one_error_stops_all_devices_and_names_its_place() {
    let fixture = Fixture::open("llama-f32");
    let source = &*fixture.checkpoint.weights;
    for devices in [1, 2, 4] {
        let cut = FaultySource::new(source, 0, 0, Some("layers.1.".to_owned()));
        let error = fixture.measured(PassOptions::on(devices), &cut, None).unwrap_err();
        let place = if devices == 1 { "layer 1 mixer: " } else { "layer 1 mixer on cpu#1: " };
        assert_eq!(error.message(), format!("{place}the wire is cut"));
    }
}

/// A study that does something at certain sites.
struct HookedStudy<F> {
    study: Study,
    hook: Arc<F>,
}

impl<F: Fn(Site, usize) -> Result<()> + Send + Sync> LayerObserver for HookedStudy<F> {
    fn wants(&self, site: Site) -> bool {
        self.study.wants(site)
    }

    fn observe(&mut self, site: Site, first_token: usize, x: &Tensor) -> Result<()> {
        (self.hook)(site, first_token)?;
        self.study.observe(site, first_token, x)
    }

    fn expert(&mut self, layer: usize, expert: usize, first_token: usize, rows: &ExpertRows) -> Result<()> {
        self.study.expert(layer, expert, first_token, rows)
    }

    fn routing(&mut self, layer: usize, first_token: usize, choices: &Choices) -> Result<()> {
        self.study.routing(layer, first_token, choices)
    }
}

impl<F: Fn(Site, usize) -> Result<()> + Send + Sync> Observer for HookedStudy<F> {
    type Layer = Self;

    fn layer(&self, layer: usize) -> Self {
        Self { study: self.study.layer(layer), hook: Arc::clone(&self.hook) }
    }

    fn join(&mut self, seen: Self) {
        self.study.join(seen.study);
    }
}

impl Fixture {
    /// A pass with an action at every site, keyed by the first token of the micro-batch.
    fn hooked(
        &self,
        how: PassOptions,
        meter: &Meter,
        hook: impl Fn(Site, usize) -> Result<()> + Send + Sync,
    ) -> Result<()> {
        let hook = Arc::new(hook);
        let observer = |_: &Model<'_>, study| HookedStudy { study, hook };
        self.pass(how, &*self.checkpoint.weights, meter, observer, None).map(|_| ())
    }
}

#[test]
fn error_or_panic_while_computing_leaves_no_thread_waiting() {
    let fixture = Fixture::open("olmoe-bf16");
    let fails = |site: Site, _| match site.layer {
        1 => Err(WorkerError::internal("seen enough")),
        _ => Ok(()),
    };
    let error = fixture.hooked(PassOptions::on(4), &Meter::default(), fails).unwrap_err();
    assert_eq!(error.message(), "layer 1 mixer on cpu#1: seen enough");
    let panics = |site: Site, _| if site.layer == 1 { panic!("on purpose") } else { Ok(()) };
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        fixture.hooked(PassOptions::on(2), &Meter::default(), panics)
    }));
    assert!(caught.is_err());
}

/// An event that others wait for.
#[derive(Default)]
struct Signal {
    happened: Mutex<bool>,
    changed: Condvar,
}

impl Signal {
    fn now(&self) {
        *self.happened.lock().unwrap() = true;
        self.changed.notify_all();
    }

    /// `false` after a timeout.
    fn wait(&self) -> bool {
        let happened = self.happened.lock().unwrap();
        let long = Duration::from_secs(30);
        !self.changed.wait_timeout_while(happened, long, |happened| !*happened).unwrap().1.timed_out()
    }
}

/// Start and end of a layer's work on a micro-batch, by the meter.
fn worked(spans: &[Span], layer: usize, micro_batch: usize) -> Range<Duration> {
    let about = |span: &&Span| {
        let batches = span.subject.micro_batches.as_ref();
        span.subject.layer == Some(layer) && batches.is_some_and(|batches| batches.contains(&micro_batch))
    };
    let spans: Vec<&Span> = spans.iter().filter(about).collect();
    let (start, end) = (spans.iter().map(|span| span.start).min(), spans.iter().map(|span| span.end).max());
    start.expect("a layer works on every micro-batch")..end.expect("the same")
}

#[test]
fn next_layer_starts_before_the_previous_one_finishes() {
    for name in ["llama-f32", "olmoe-bf16", "gpt-oss-mxfp4"] {
        let fixture = Fixture::open(name);
        let last = fixture.tokens.sequences - 1;
        let last_token = last * fixture.tokens.tokens;
        let meter = Meter::with_spans();
        let next_began = Signal::default();
        // The end of layer 0 on the last micro-batch waits for the start of layer 1 on the first.
        // Without a wavefront, this would wait forever.
        fixture
            .hooked(PassOptions { group_elements: u64::MAX, ..PassOptions::on(2) }, &meter, |site, first_token| {
                if site.layer == 1 && first_token == 0 {
                    next_began.now();
                }
                let ends = site.layer == 0 && site.point == Point::Residual && first_token == last_token;
                let came = !ends || next_began.wait();
                came.then_some(()).ok_or_else(|| WorkerError::internal("layer 1 waits for all of layer 0"))
            })
            .unwrap();
        let spans = meter.spans();
        assert!(worked(&spans, 1, 0).start < worked(&spans, 0, last).end, "{name}");
        for (before, after) in spans.iter().zip(&spans[1..]) {
            assert!(before.thread != after.thread || before.end <= after.start, "{name}: {before:?} {after:?}");
        }
        for work in [Work::Mixer, Work::FeedForward, Work::Statistics] {
            for (layer, device) in [(0, 0), (1, 1)] {
                let here = |span: &Span| span.work == work && span.subject.layer == Some(layer);
                assert!(spans.iter().any(here), "{name}: no {work:?} of layer {layer}");
                assert!(spans.iter().filter(|span| here(span)).all(|span| span.thread == Thread::Device(device)));
            }
        }
    }
}

/// A row of a trace: start and end in microseconds.
type Row = Vec<(String, f64, f64, serde_json::Value)>;

#[test]
fn trace_has_a_row_per_device_and_loader() {
    let folder = tempfile::tempdir().unwrap();
    let (model, ids) = (golden("olmoe-bf16").join("model"), golden("olmoe-bf16").join("golden.safetensors"));
    let status = Command::new(env!("CARGO_BIN_EXE_outliers-worker"))
        .args(["run", "--devices", "cpu:2", "--micro-batch-tokens", "1", "--trace", "trace.json", "--model"])
        .args([&model, Path::new("--token-ids"), &ids, Path::new("--output"), folder.path()])
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(folder.path().join(name)).unwrap()).unwrap()
    };
    let listed = |file: &serde_json::Value| file["name"] == "trace.json";
    assert!(read("manifest.json")["files"].as_array().unwrap().iter().any(listed), "it is among the results");

    let mut rows: BTreeMap<String, Row> = BTreeMap::new();
    let mut names = BTreeMap::new();
    for event in read("trace.json")["traceEvents"].as_array().unwrap() {
        let number = |key: &str| event[key].as_f64().unwrap();
        let thread = (event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap());
        let name = event["name"].as_str().unwrap().to_owned();
        if event["ph"] == "M" {
            names.insert(thread, event["args"]["name"].as_str().unwrap().to_owned());
            continue;
        }
        assert_eq!(event["ph"], "X");
        let span = (name, number("ts"), number("ts") + number("dur"), event["args"].clone());
        rows.entry(names[&thread].clone()).or_default().push(span);
    }
    assert_eq!(rows.keys().collect::<Vec<_>>(), ["cpu#0", "cpu#0 loader", "cpu#1", "cpu#1 loader"]);
    // Times are written in whole nanoseconds.
    const ROUNDING: f64 = 1e-3;
    for (name, row) in &rows {
        assert!(row.windows(2).all(|pair| pair[0].2 <= pair[1].1 + ROUNDING), "{name} does two things at once");
        let (mine, others): (&[&str], &[&str]) = match name.ends_with("loader") {
            true => (&["read", "decode"], &["mixer", "ffn", "statistics", "wait"]),
            false => (&["mixer", "ffn", "statistics", "wait"], &["read", "decode"]),
        };
        assert!(mine.iter().all(|kind| row.iter().any(|span| span.0 == *kind)), "{name}");
        assert!(!row.iter().any(|span| others.contains(&span.0.as_str())), "{name}");
        let device = if name.starts_with("cpu#0") { 0 } else { 1 };
        let layers = row.iter().filter(|span| ["mixer", "ffn", "decode"].contains(&span.0.as_str()));
        assert!(layers.filter_map(|span| span.3["layer"].as_u64()).all(|layer| layer % 2 == device), "{name}");
        let mixed = row.iter().filter(|span| span.0 == "mixer").map(|span| &span.3);
        assert!(mixed.clone().all(|about| about["micro_batch"].is_u64() && about["micro_batches"] == 1), "{name}");
    }
}
