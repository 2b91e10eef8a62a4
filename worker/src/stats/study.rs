//! All measurements of a run in one observer, so that values leave their device once.
//!
//! On a GPU, statistics are requested when values are observed. A thread of the layer adds them in
//! the same order when they arrive, so that GPU and computing thread go on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use candle_core::{DeviceLocation, Tensor};
use outliers_protocol::{
    AttentionSinks, FeaturePeak, GainSummary, JobSpec, MassiveActivations, Measurement, OtherSite, Point,
    QuantizationErrors, RESIDUAL_SINKS, ResidualSinks, RouterSummary, SpikeLife, SuperExperts, TOP_RECORDS, Thresholds,
    TopRecords,
};
use outliers_scan::Scan;

use serde::{Deserialize, Serialize};

use super::attention_sinks::FirstKeys;
use super::massive::Massive;
use super::mixture::{ExpertPeaks, RouterStats, super_experts};
use super::quantization::Quantization;
use super::residual_sinks::ResidualSinkCounts;
use super::rows::RowStats;
use super::spike_life::Spikes;
use super::top::{Top, TopValue};
use super::values::{HostValues, Values, on_the_host};
use super::{Column, LayerObserver, Observer, OutlierStats, Site, Summary, with_f32};
use crate::blocks::attention::FirstKey;
use crate::blocks::ffn::{Choices, ExpertRows};
use crate::corpus::Tokens;
use crate::device::gpu::{PendingCopy, PendingScan};
use crate::error::{Result, WorkerError};
use crate::model::decoder::{DecoderSpec, FfnSpec, LayerSpec};

/// What is measured of a model over a corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scope {
    /// Norm outputs, in order of computation.
    pub norms: Vec<Site>,
    /// Other sites, in order of layers.
    pub others: Vec<Site>,
    /// Number of routed experts per layer, 0 in dense ones.
    pub experts: Vec<usize>,
    /// Optional measurements.
    pub measure: BTreeSet<Measurement>,
    /// Number of features.
    pub hidden: usize,
    /// Row width of an expert's output: `hidden`, or less if experts work in a latent space.
    pub expert_width: usize,
    /// Number of sequences.
    pub sequences: usize,
    /// Tokens per sequence.
    pub tokens: usize,
}

impl Scope {
    /// The scope of a job.
    pub fn new(job: &JobSpec, spec: &DecoderSpec, tokens: &Tokens) -> Self {
        let experts = spec.layers.iter().map(|layer| layer.experts()).collect();
        let latent = |layer: &LayerSpec| if let FfnSpec::Moe(moe) = &layer.ffn { moe.latent } else { None };
        let of = |(layer, spec): (usize, &LayerSpec)| {
            let there = [
                (Point::AttentionOut, spec.has_mixer()),
                (Point::ExpertOut, spec.experts() > 0),
                (Point::MlpOut, spec.has_ffn()),
                (Point::Residual, true),
            ];
            let studied = there.into_iter().filter(|(point, is_there)| *is_there && job.studies(*point));
            studied.map(|(point, _)| Site { layer, point }).collect::<Vec<_>>()
        };
        Self {
            norms: spec.sites(),
            others: spec.layers.iter().enumerate().flat_map(of).collect(),
            experts,
            measure: job.measure.clone(),
            hidden: spec.hidden,
            expert_width: spec.layers.iter().find_map(latent).unwrap_or(spec.hidden),
            sequences: tokens.sequences,
            tokens: tokens.tokens,
        }
    }

    /// Width of a row at a site.
    fn width(&self, point: Point) -> usize {
        if point == Point::ExpertOut { self.expert_width } else { self.hidden }
    }

    /// The part of the scope in one layer.
    fn of_layer(&self, layer: usize) -> Self {
        let sites = |all: &[Site]| all.iter().filter(|site| site.layer == layer).copied().collect();
        let experts = self.experts.iter().enumerate().map(|(at, experts)| if at == layer { *experts } else { 0 });
        Self {
            norms: sites(&self.norms),
            others: sites(&self.others),
            experts: experts.collect(),
            measure: self.measure.clone(),
            ..*self
        }
    }
}

/// All statistics of a run.
///
/// Memory: that of [`OutlierStats`], plus about 50 KiB per site, 100 records per kind of site, 100
/// bytes per expert, and one gain vector per norm (see [`bytes`]).
#[derive(Serialize, Deserialize)]
pub struct Study {
    scope: Scope,
    outliers: OutlierStats,
    rows: BTreeMap<Site, RowStats>,
    gains: BTreeMap<Site, Vec<f32>>,
    records: BTreeMap<Point, Top<TopValue>>,
    massive: Massive,
    routers: BTreeMap<usize, RouterStats>,
    experts: BTreeMap<usize, ExpertPeaks>,
    quantization: Option<Quantization>,
    residual_sinks: Option<ResidualSinkCounts>,
    spikes: Option<Spikes>,
    first_keys: Option<FirstKeys>,
    /// The thread that adds what a GPU was asked for. `None` for a settled layer.
    #[serde(skip)]
    adding: Option<Adding>,
    /// Shared by all layers.
    #[serde(skip)]
    held: Arc<Held>,
}

/// Maximum activations held on a GPU until their statistics are added.
pub const HELD: usize = 4;

/// Counts the activations that are held on each GPU.
#[derive(Default)]
struct Held {
    of_gpus: Mutex<Vec<(DeviceLocation, usize)>>,
    released: Condvar,
}

/// One of [`HELD`] places on a GPU.
struct Place {
    held: Arc<Held>,
    gpu: DeviceLocation,
}

impl Place {
    /// Waits until fewer than [`HELD`] activations are held on this GPU.
    fn take(held: &Arc<Held>, gpu: DeviceLocation) -> Self {
        let of_gpus = held.of_gpus.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = |of_gpus: &mut Vec<(DeviceLocation, usize)>| of_gpus.contains(&(gpu, HELD));
        let mut of_gpus = held.released.wait_while(of_gpus, is_full).unwrap_or_else(PoisonError::into_inner);
        match of_gpus.iter_mut().find(|(of, _)| *of == gpu) {
            Some((_, count)) => *count += 1,
            None => of_gpus.push((gpu, 1)),
        }
        Self { held: Arc::clone(held), gpu }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut of_gpus = self.held.of_gpus.lock().unwrap_or_else(PoisonError::into_inner);
        of_gpus.iter_mut().filter(|(of, _)| *of == self.gpu).for_each(|(_, count)| *count -= 1);
        self.held.released.notify_all();
    }
}

/// What a GPU was asked for.
enum Requested {
    /// Statistics. Fields are dropped in this order: a place is free after its values.
    Scan(Box<(Observed, PendingScan, Place)>),
    /// Gains of the norm with this output.
    Gain(Site, PendingCopy),
}

/// A thread that adds what a GPU was asked for to a study of its own, in the order of requests.
/// Both fields are `None` once it is finished.
struct Adding {
    requests: Option<Sender<Requested>>,
    thread: Option<JoinHandle<Result<Study>>>,
}

impl Adding {
    /// Adds to an empty study.
    fn start(mut study: Study) -> Self {
        let (requests, coming) = channel();
        let add = move || -> Result<Study> {
            for requested in coming {
                study.receive(requested)?;
            }
            Ok(study)
        };
        Self { requests: Some(requests), thread: Some(thread::spawn(add)) }
    }

    /// The study, after all requests are added.
    ///
    /// # Errors
    /// The first error of a request; later ones were not added.
    fn finish(mut self) -> Result<Study> {
        self.requests = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(study)) => study,
            _ => Err(WorkerError::internal("a thread that adds statistics panicked")),
        }
    }
}

impl Drop for Adding {
    /// Waits for the thread after an error of the pass, too: it uses the GPU.
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Observed values and their site.
struct Observed {
    site: Site,
    whose: RowTokens,
}

/// The tokens of rows.
enum RowTokens {
    /// Whole sequences, beginning at this token.
    Sequences { first_token: usize },
    /// Rows of an expert, with their token indices in the corpus.
    Expert { expert: usize, tokens: Vec<usize> },
}

impl Observed {
    /// The token index of a row.
    fn token(&self, row: usize) -> usize {
        match &self.whose {
            RowTokens::Sequences { first_token } => first_token + row,
            RowTokens::Expert { tokens, .. } => tokens[row],
        }
    }

    /// A value with its location.
    fn found(&self, row: usize, dim: usize, value: f32) -> TopValue {
        let expert = match self.whose {
            RowTokens::Sequences { .. } => None,
            RowTokens::Expert { expert, .. } => Some(expert),
        };
        TopValue { layer: self.site.layer, token: self.token(row), expert, dim, value }
    }
}

/// Memory of a study of `norms` norm outputs at the end of the pass in bytes, without the bitmaps
/// of features over the threshold.
pub fn bytes(norms: usize, hidden: usize) -> u64 {
    const ROWS: usize = 50 << 10;
    (norms * (hidden * (size_of::<Column>() + size_of::<f32>()) + ROWS)) as u64
}

/// Memory of a job's `--measure` at the end of the pass over `sequences` sequences, in bytes.
pub fn measured_bytes(job: &JobSpec, spec: &DecoderSpec, sequences: usize) -> u64 {
    // Per site or sequence, and per head of a layer.
    const COSTS: usize = 5 << 10;
    // Per sequence.
    const SUMS: usize = 256;
    // Per layer.
    const MAP: usize = 5 << 10;
    let (layers, norms, hidden) = (spec.layers.len(), spec.sites().len(), spec.hidden);
    let of = |measurement: &Measurement| match measurement {
        Measurement::QuantizationError => (norms + 4 * layers + sequences) * COSTS,
        Measurement::ResidualSinks => layers * (16 * hidden + sequences * RESIDUAL_SINKS * 16 + MAP),
        Measurement::SpikeLife => layers * (8 * hidden + sequences * 16),
        Measurement::AttentionSinks => layers * COSTS + sequences * SUMS,
    };
    job.measure.iter().map(of).sum::<usize>() as u64
}

/// The parts of [`outliers_protocol::Results`] from a study.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Outlier features.
    pub judged: Summary,
    /// Sites that are not norm outputs.
    pub other_sites: Vec<OtherSite>,
    /// `None` unless the residual stream was studied.
    pub massive_activations: Option<MassiveActivations>,
    /// Largest values per kind of site.
    pub top_records: Vec<TopRecords>,
    /// Per mixture layer.
    pub routers: Vec<RouterSummary>,
    /// `None` unless experts' outputs were studied and there are any.
    pub super_experts: Option<SuperExperts>,
    /// As the following fields, `None` unless requested.
    pub quantization_error: Option<QuantizationErrors>,
    /// Dimensions that are large at most tokens.
    pub residual_sinks: Option<ResidualSinks>,
    /// First tokens by layer.
    pub spike_life: Option<SpikeLife>,
    /// Attention on the first key.
    pub attention_sinks: Option<AttentionSinks>,
}

/// Merges two measurements if both exist.
fn merge<T>(mine: &mut Option<T>, theirs: Option<&T>, add: impl Fn(&mut T, &T)) {
    if let (Some(mine), Some(theirs)) = (mine, theirs) {
        add(mine, theirs);
    }
}

impl Study {
    /// An empty study. A feature exceeds if |x| >= `threshold`.
    pub fn new(scope: Scope, threshold: f32) -> Self {
        let (sequences, tokens) = (scope.sequences, scope.tokens);
        let outliers = OutlierStats::new(scope.norms.clone(), scope.hidden, sequences, tokens, threshold);
        let rows = scope.norms.iter().chain(&scope.others).map(|site| (*site, RowStats::default())).collect();
        let mixtures = scope.experts.iter().copied().enumerate().filter(|(_, experts)| *experts > 0);
        let outputs = scope.others.iter().filter(|site| site.point == Point::ExpertOut);
        let is_asked = |measurement: Measurement| scope.measure.contains(&measurement);
        Self {
            outliers,
            rows,
            gains: BTreeMap::new(),
            records: BTreeMap::new(),
            massive: Massive::new(sequences, tokens),
            routers: mixtures.map(|(layer, experts)| (layer, RouterStats::new(experts))).collect(),
            experts: outputs.map(|site| (site.layer, ExpertPeaks::new(scope.experts[site.layer]))).collect(),
            quantization: is_asked(Measurement::QuantizationError)
                .then(|| Quantization::new(sequences, tokens, threshold)),
            residual_sinks: is_asked(Measurement::ResidualSinks).then(|| ResidualSinkCounts::new(threshold)),
            spikes: is_asked(Measurement::SpikeLife).then(Spikes::default),
            first_keys: is_asked(Measurement::AttentionSinks).then(FirstKeys::default),
            adding: None,
            held: Arc::default(),
            scope,
        }
    }

    /// Counts of outlier features.
    pub fn outliers(&self) -> &OutlierStats {
        &self.outliers
    }

    /// Gains of the norm with output `site`, `[hidden]`, once received.
    pub fn gain_of(&self, site: Site) -> Option<&[f32]> {
        self.gains.get(&site).map(Vec::as_slice)
    }

    /// Routers by layer.
    pub fn routers(&self) -> &BTreeMap<usize, RouterStats> {
        &self.routers
    }

    /// Experts' largest outputs by layer; empty unless studied.
    pub fn expert_peaks(&self) -> &BTreeMap<usize, ExpertPeaks> {
        &self.experts
    }

    /// Adds values: immediately on the host, on a GPU after its statistics arrive. Waits while
    /// [`HELD`] activations are held on the GPU.
    fn show(&mut self, shown: Observed, x: &Tensor) -> Result<()> {
        let tokens = match shown.whose {
            RowTokens::Sequences { .. } => self.scope.tokens,
            RowTokens::Expert { .. } => x.dim(0)?,
        };
        if !x.device().is_cuda() {
            return on_the_host(x, tokens, |values| self.record(&shown, &HostValues { tensor: x, values }));
        }
        let point = shown.site.point;
        let threshold = point.is_norm_output().then(|| self.outliers.threshold());
        // The sum overwrites its input. An expert's output is only read, and is often a slice of a
        // tensor, whose copy would be of the whole.
        let is_added = matches!(point, Point::AttentionOut | Point::MlpOut);
        let copied;
        let x = if is_added {
            copied = x.copy()?;
            &copied
        } else {
            x
        };
        let place = Place::take(&self.held, x.device().location());
        let pending = PendingScan::at(x, tokens, threshold, point == Point::Residual)?;
        self.request(Requested::Scan(Box::new((shown, pending, place))));
        Ok(())
    }

    /// Passes a request to the thread that adds.
    fn request(&mut self, requested: Requested) {
        let Self { adding, scope, outliers, .. } = self;
        let adding = adding.get_or_insert_with(|| Adding::start(Self::new(scope.clone(), outliers.threshold())));
        // The thread has ended after an error, which is reported when the layer has passed.
        let _ = adding.requests.as_ref().map(|requests| requests.send(requested));
    }

    /// Waits for what a GPU was asked for, and adds it.
    fn receive(&mut self, requested: Requested) -> Result<()> {
        match requested {
            Requested::Scan(scan) => {
                let (shown, pending, _) = &*scan;
                pending.show(|seen| {
                    self.record(shown, &HostValues { tensor: pending.tensor(), values: &Values::Gpu(seen) })
                })
            }
            Requested::Gain(site, pending) => {
                self.gains.insert(site, pending.wait()?);
                Ok(())
            }
        }
    }

    fn record(&mut self, shown: &Observed, x: &HostValues<'_>) -> Result<()> {
        let (site, values) = (shown.site, x.values);
        match shown.whose {
            RowTokens::Sequences { first_token } => {
                if site.point.is_norm_output() {
                    self.outliers.count(site, first_token, values)?;
                }
                let scans = values.scan()?;
                self.add(shown, values, &scans)?;
                if site.point == Point::Residual {
                    self.massive.add(site.layer, first_token, values, &scans)?;
                }
                self.measure(site, first_token, &scans, x)
            }
            RowTokens::Expert { expert, .. } => {
                let scans = values.scan()?;
                self.add(shown, values, &scans)?;
                let peaks = self.experts.get_mut(&site.layer).expect("studied experts were announced");
                peaks.add(expert, values, &scans, |row, dim, value| shown.found(row, dim, value))?;
                let Some(quantization) = &mut self.quantization else { return Ok(()) };
                let width = self.scope.expert_width;
                x.see(|x| {
                    quantization.add(site, x, width, |row| shown.token(row));
                    Ok(())
                })
            }
        }
    }

    /// Optional measurements over whole sequences, on the host.
    fn measure(&mut self, site: Site, first_token: usize, scans: &[Scan], x: &HostValues<'_>) -> Result<()> {
        let (tokens, hidden) = (self.scope.tokens, self.scope.hidden);
        let is_residual = site.point == Point::Residual;
        let sequences = (first_token / tokens..).zip(scans);
        if let Some(keys) = self.first_keys.as_mut().filter(|_| is_residual) {
            sequences.clone().for_each(|(sequence, scan)| keys.add_residual(site.layer, sequence, scan));
        }
        let mut sinks = self.residual_sinks.as_mut().filter(|_| is_residual);
        let mut spikes = self.spikes.as_mut().filter(|_| Spikes::is_seen(site.point));
        if sinks.is_none() && spikes.is_none() && self.quantization.is_none() {
            return Ok(());
        }
        x.see(|x| {
            if let Some(quantization) = &mut self.quantization {
                quantization.add(site, x, hidden, |row| first_token + row);
            }
            for ((sequence, scan), x) in sequences.zip(x.chunks(tokens * hidden)) {
                sinks.iter_mut().for_each(|sinks| sinks.add(site.layer, sequence, x, scan));
                spikes.iter_mut().for_each(|spikes| spikes.add(site, sequence * tokens, x, scan));
            }
            Ok(())
        })
    }

    /// Measurements over the rows of any site.
    fn add(&mut self, shown: &Observed, x: &Values<'_>, scans: &[Scan]) -> Result<()> {
        let mut first = 0;
        for scan in scans {
            if let Some(row) = scan.first_not_finite() {
                return Err(not_finite(shown.site, shown.token(first + row)));
            }
            first += scan.rows.len();
        }
        let rows = self.rows.get_mut(&shown.site).expect("studied sites were announced");
        rows.add_all(scans);
        let top = self.records.entry(shown.site.point).or_insert_with(|| Top::new(TOP_RECORDS));
        top.offer_values(x, scans, |row, dim, value| shown.found(row, dim, value))
    }

    /// Adds a study of the same scope, or of single layers of it, over other sequences, in any
    /// order and grouping.
    pub fn merge(&mut self, other: &Self) {
        debug_assert!(other.adding.is_none(), "a layer that has not settled");
        self.outliers.merge(&other.outliers);
        for (site, theirs) in &other.rows {
            self.rows.get_mut(site).expect("in scope").merge(theirs);
        }
        self.gains.extend(other.gains.iter().map(|(site, gain)| (*site, gain.clone())));
        for (point, theirs) in &other.records {
            self.records.entry(*point).or_insert_with(|| Top::new(TOP_RECORDS)).merge(theirs);
        }
        self.massive.merge(&other.massive);
        for (layer, theirs) in &other.routers {
            self.routers.get_mut(layer).expect("in scope").merge(theirs);
        }
        for (layer, theirs) in &other.experts {
            self.experts.get_mut(layer).expect("in scope").merge(theirs);
        }
        merge(&mut self.quantization, other.quantization.as_ref(), Quantization::merge);
        merge(&mut self.residual_sinks, other.residual_sinks.as_ref(), ResidualSinkCounts::merge);
        merge(&mut self.spikes, other.spikes.as_ref(), Spikes::merge);
        merge(&mut self.first_keys, other.first_keys.as_ref(), FirstKeys::merge);
    }

    // -------------------------------------------------------------------------------------- report

    /// Applies thresholds and summarises. `ids` are the token ids `[sequences, tokens]`.
    pub fn report(&self, thresholds: &Thresholds, ids: &[i64]) -> Report {
        let mut judged = self.outliers.judge(thresholds);
        for feature in &mut judged.features {
            feature.peak = self.peak(feature.dim, feature.max_abs);
        }
        for summary in &mut judged.sites {
            let site = Site { layer: summary.layer, point: summary.point };
            summary.rows = self.rows.get(&site).map(RowStats::summary);
            summary.gain = self.gain_of(site).map(gain_summary);
        }
        let record = |found: &TopValue| found.record(ids, self.scope.tokens);
        let studied = |point: Point| self.scope.others.iter().any(|site| site.point == point);
        let top = |(point, top): (&Point, &Top<TopValue>)| TopRecords {
            point: *point,
            records: top.descending().iter().map(record).collect(),
        };
        Report {
            judged,
            other_sites: self.scope.others.iter().map(|site| self.other_site(*site)).collect(),
            massive_activations: studied(Point::Residual).then(|| self.massive.summary(ids)),
            top_records: self.records.iter().map(top).collect(),
            routers: self.routers.iter().map(|(layer, stats)| stats.summary(*layer)).collect(),
            super_experts: super_experts(self.scope.experts.len(), &self.experts, &self.routers, record),
            quantization_error: self.quantization.as_ref().map(Quantization::summary),
            residual_sinks: self.residual_sinks.as_ref().map(|sinks| sinks.summary(|layer| self.gain_after(layer))),
            spike_life: self.spikes.as_ref().map(|spikes| spikes.summary(record)),
            attention_sinks: self.first_keys.as_ref().map(FirstKeys::summary),
        }
    }

    /// Gains of the norm before attention that reads the residual stream after a layer.
    fn gain_after(&self, layer: usize) -> Option<&[f32]> {
        self.gain_of(Site { layer: layer + 1, point: Point::BeforeAttention })
    }

    fn other_site(&self, site: Site) -> OtherSite {
        let rows = &self.rows[&site];
        OtherSite {
            layer: site.layer,
            point: site.point,
            max_abs: rows.max_abs(),
            rms: rows.rms(self.scope.width(site.point)),
            rows: rows.summary(),
        }
    }

    /// The first norm output at which feature `dim` has its largest magnitude.
    fn peak(&self, dim: usize, max_abs: f32) -> Option<FeaturePeak> {
        let index = (0..self.scope.norms.len()).find(|s| self.outliers.column(*s, dim).max_abs() == max_abs)?;
        let (site, value) = (self.scope.norms[index], self.outliers.column(index, dim).peak());
        let gain = self.gain_of(site).map(|gain| gain[dim]);
        let value_over_gain = gain.filter(|gain| *gain != 0.0).map(|gain| value / gain).filter(|z| z.is_finite());
        Some(FeaturePeak { layer: site.layer, point: site.point, value, gain, value_over_gain })
    }
}

fn not_finite(site: Site, token: usize) -> WorkerError {
    let Site { layer, point } = site;
    WorkerError::internal(format!("activations are no longer finite: layer {layer} {point:?}, token {token}"))
        .hint("try --precision f32; if it stays, the checkpoint or this program is wrong")
}

fn gain_summary(gain: &[f32]) -> GainSummary {
    let largest =
        gain.iter().enumerate().fold((0, 0f32), |best, (i, g)| if g.abs() > best.1 { (i, g.abs()) } else { best });
    let squares: f64 = gain.iter().map(|g| f64::from(*g).powi(2)).sum();
    GainSummary { max_abs: largest.1, dim: largest.0, rms: (squares / gain.len() as f64).sqrt() }
}

impl Observer for Study {
    type Layer = Self;

    fn layer(&self, layer: usize) -> Self {
        let held = Arc::clone(&self.held);
        Self { held, ..Self::new(self.scope.of_layer(layer), self.outliers.threshold()) }
    }

    fn join(&mut self, seen: Self) {
        self.merge(&seen);
    }

    fn state(&self) -> Result<Vec<u8>> {
        postcard::to_stdvec(self).map_err(|e| WorkerError::internal(format!("statistics cannot be saved: {e}")))
    }

    fn restore(&mut self, state: &[u8]) -> Result<()> {
        let saved: Self = postcard::from_bytes(state)
            .map_err(|e| WorkerError::internal(format!("saved statistics cannot be read: {e}")))?;
        if saved.scope != self.scope {
            return Err(WorkerError::internal("saved statistics are of another scope"));
        }
        *self = saved;
        Ok(())
    }
}

impl LayerObserver for Study {
    fn wants(&self, site: Site) -> bool {
        self.rows.contains_key(&site)
    }

    fn observe(&mut self, site: Site, first_token: usize, x: &Tensor) -> Result<()> {
        self.show(Observed { site, whose: RowTokens::Sequences { first_token } }, x)
    }

    fn gain(&mut self, site: Site, gain: &Tensor) -> Result<()> {
        if let Some(pending) = PendingCopy::start(gain)? {
            // The host would wait for all that the GPU was asked to compute.
            self.request(Requested::Gain(site, pending));
            return Ok(());
        }
        let values = with_f32(gain, |values| Ok(values.to_vec()))?;
        self.gains.insert(site, values);
        Ok(())
    }

    fn expert(&mut self, layer: usize, expert: usize, first_token: usize, rows: &ExpertRows) -> Result<()> {
        let tokens = rows.rows.iter().map(|row| first_token + *row as usize).collect();
        let site = Site { layer, point: Point::ExpertOut };
        self.show(Observed { site, whose: RowTokens::Expert { expert, tokens } }, &rows.out)
    }

    fn wants_first_key(&self) -> bool {
        self.first_keys.is_some()
    }

    fn first_key(&mut self, layer: usize, first_token: usize, sequences: &[Vec<FirstKey>]) -> Result<()> {
        let first = first_token / self.scope.tokens;
        if let Some(keys) = &mut self.first_keys {
            (first..).zip(sequences).for_each(|(sequence, heads)| keys.add(layer, sequence, heads));
        }
        Ok(())
    }

    fn routing(&mut self, layer: usize, first_token: usize, choices: &Choices) -> Result<()> {
        let tokens = self.scope.tokens;
        let router = self.routers.get_mut(&layer).expect("a mixture, by the spec");
        match choices {
            Choices::Host(routing) => router.add(first_token, tokens, routing),
            Choices::Gpu(routing) => router.add_loads(first_token, tokens, routing)?,
        }
        Ok(())
    }

    fn synchronize(&mut self) -> Result<()> {
        if let Some(adding) = self.adding.take() {
            self.merge(&adding.finish()?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;
    use crate::blocks::ffn::Routing;

    const HIDDEN: usize = 5;
    const TOKENS: usize = 3;
    const SEQUENCES: usize = 4;
    const EXPERTS: usize = 3;

    /// Two layers, the second a mixture, with all kinds of sites.
    fn scope() -> Scope {
        let site = |layer, point| Site { layer, point };
        let norms = [Point::BeforeAttention, Point::BeforeMlp];
        let others = [Point::AttentionOut, Point::MlpOut, Point::Residual];
        Scope {
            norms: (0..2).flat_map(|layer| norms.map(|point| site(layer, point))).collect(),
            others: (0..2)
                .flat_map(|layer| others.map(|point| site(layer, point)))
                .chain([site(1, Point::ExpertOut)])
                .collect(),
            experts: vec![0, EXPERTS],
            measure: Measurement::ALL.into(),
            hidden: HIDDEN,
            expert_width: HIDDEN,
            sequences: SEQUENCES,
            tokens: TOKENS,
        }
    }

    /// Values of one sequence: per site, and one expert per token with its output.
    #[derive(Clone, Debug)]
    struct SequenceValues {
        values: Vec<Vec<f32>>,
        experts: Vec<u32>,
        outputs: Vec<f32>,
    }

    prop_compose! {
        fn corpora()(
            sequences in prop::collection::vec((
                prop::collection::vec(prop::collection::vec(prop_oneof![4 => -9f32..9.0, 1 => Just(1e6), 1 => Just(0.0)], TOKENS * HIDDEN), 10),
                prop::collection::vec(0..EXPERTS as u32, TOKENS),
                prop::collection::vec(-90f32..90.0, TOKENS * HIDDEN),
            ), SEQUENCES)
        ) -> Vec<SequenceValues> {
            sequences.into_iter().map(|(values, experts, outputs)| SequenceValues { values, experts, outputs }).collect()
        }
    }

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::from_slice(values, (values.len() / HIDDEN, HIDDEN), &Device::Cpu).unwrap()
    }

    fn gain(site: Site) -> Vec<f32> {
        (0..HIDDEN).map(|dim| (dim as f32 - 1.0) * (1.0 + site.layer as f32)).collect()
    }

    /// Observes sequences `place..place + shown.len()` as one micro-batch.
    fn show(study: &mut Study, place: usize, shown: &[SequenceValues]) {
        let first = place * TOKENS;
        let sites: Vec<Site> = scope().norms.into_iter().chain(scope().others).collect();
        for (i, site) in sites.into_iter().enumerate().filter(|(_, site)| site.point != Point::ExpertOut) {
            let x: Vec<f32> = shown.iter().flat_map(|s| s.values[i].clone()).collect();
            study.observe(site, first, &tensor(&x)).unwrap();
            if site.point.is_norm_output() {
                study.gain(site, &Tensor::new(gain(site), &Device::Cpu).unwrap()).unwrap();
            }
        }
        let experts: Vec<u32> = shown.iter().flat_map(|s| s.experts.clone()).collect();
        let outputs: Vec<&[f32]> = shown.iter().flat_map(|s| s.outputs.chunks(HIDDEN)).collect();
        let weights = experts.iter().map(|e| 0.1 + *e as f32).collect();
        let routing = Routing { top_k: 1, experts, weights, scales_input: false };
        study.routing(1, first, &Choices::Host(routing.clone())).unwrap();
        let pairs = routing.by_expert(EXPERTS);
        for expert in 0..EXPERTS {
            let (rows, weights) = pairs.of(expert);
            if !rows.is_empty() {
                let out: Vec<f32> = rows.iter().flat_map(|r| outputs[*r as usize]).copied().collect();
                let (rows, weights) = (rows.to_vec(), weights.to_vec());
                study.expert(1, expert, first, &ExpertRows { out: tensor(&out), rows, weights }).unwrap();
            }
        }
    }

    fn ids() -> Vec<i64> {
        (0..SEQUENCES * TOKENS).map(|token| 100 + token as i64).collect()
    }

    fn report(study: &Study) -> Report {
        study.report(&Thresholds::default(), &ids())
    }

    fn whole(corpus: &[SequenceValues], at_once: usize) -> Study {
        let mut study = Study::new(scope(), 6.0);
        for (i, shown) in corpus.chunks(at_once).enumerate() {
            show(&mut study, i * at_once, shown);
        }
        study
    }

    /// Removes pooled moments: they are plain f64 sums, equal only up to rounding for another
    /// order of sequences.
    fn without_pooled(mut report: Report) -> Report {
        for site in &mut report.judged.sites {
            (site.rms, site.kurtosis) = (0.0, 0.0);
        }
        report
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn micro_batches_and_threads_change_no_bit(corpus in corpora()) {
            let one = report(&whole(&corpus, 1));
            prop_assert_eq!(&report(&whole(&corpus, SEQUENCES)), &one);
            let single = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
            prop_assert_eq!(&single.install(|| report(&whole(&corpus, 3))), &one);
        }

        #[test]
        fn merging_is_associative_and_commutative(corpus in corpora(), cut in 1usize..SEQUENCES) {
            let part = |range: std::ops::Range<usize>| {
                let mut study = Study::new(scope(), 6.0);
                show(&mut study, range.start, &corpus[range]);
                study
            };
            let mut merged = part(cut..SEQUENCES);
            (0..cut).for_each(|s| merged.merge(&part(s..s + 1)));
            prop_assert_eq!(without_pooled(report(&merged)), without_pooled(report(&whole(&corpus, 2))));
        }

        #[test]
        fn sequence_order_changes_only_sequence_numbers(corpus in corpora()) {
            let backwards: Vec<SequenceValues> = corpus.iter().rev().cloned().collect();
            let of = |corpus: &[SequenceValues]| without_pooled(report(&whole(corpus, 2)));
            let (a, mut b) = (of(&corpus), of(&backwards));
            for feature in &mut b.judged.features {
                feature.within.iter_mut().for_each(|within| within.sequence = SEQUENCES - 1 - within.sequence);
                feature.within.reverse();
            }
            prop_assert_eq!(a.judged.features, b.judged.features);
            prop_assert_eq!(a.judged.verdicts, b.judged.verdicts);
            prop_assert_eq!(a.judged.sites, b.judged.sites);
            prop_assert_eq!(a.other_sites, b.other_sites);
            prop_assert_eq!(a.routers, b.routers);
            let (mut a_sinks, mut b_sinks) = (a.residual_sinks.unwrap(), b.residual_sinks.unwrap());
            b_sinks.per_sequence.reverse();
            // Values of the first sequence.
            (a_sinks.map, b_sinks.map) = (None, None);
            prop_assert_eq!(a_sinks, b_sinks);
            let (a_life, b_life) = (a.spike_life.unwrap(), b.spike_life.unwrap());
            for (a, mut b) in a_life.layers.into_iter().zip(b_life.layers) {
                b.margins.reverse();
                prop_assert_eq!(a.margins, b.margins);
            }
            let (a_keys, mut b_keys) = (a.attention_sinks.unwrap(), b.attention_sinks.unwrap());
            b_keys.first_key_per_sequence.reverse();
            b_keys.largest_hidden_per_sequence.reverse();
            prop_assert_eq!(a_keys, b_keys);
            prop_assert_eq!(a.quantization_error.unwrap().sites, b.quantization_error.unwrap().sites);
            let (a_massive, b_massive) = (a.massive_activations.unwrap(), b.massive_activations.unwrap());
            prop_assert_eq!(a_massive.dims, b_massive.dims);
            prop_assert_eq!(a_massive.tokens, b_massive.tokens);
            let values = |top: &[TopRecords]| -> Vec<f32> {
                top.iter().flat_map(|t| t.records.iter().map(|r| r.value.abs())).collect()
            };
            prop_assert_eq!(values(&a.top_records), values(&b.top_records));
        }

        #[test]
        fn largest_values_are_recorded_with_their_positions(corpus in corpora()) {
            let report = report(&whole(&corpus, 2));
            let kinds: Vec<Point> = report.top_records.iter().map(|top| top.point).collect();
            prop_assert_eq!(kinds.len(), 6, "{:?}", kinds);
            for top in &report.top_records {
                prop_assert_eq!(top.records.len(), TOP_RECORDS.min(if top.point == Point::ExpertOut { 60 } else { 120 }));
                prop_assert!(top.records.windows(2).all(|pair| pair[0].value.abs() >= pair[1].value.abs()));
                for record in &top.records {
                    let (shown, at) = (&corpus[record.sequence], record.position * HIDDEN + record.dim);
                    prop_assert_eq!(record.token_id, ids()[record.sequence * TOKENS + record.position]);
                    let sites: Vec<Site> = scope().norms.into_iter().chain(scope().others).collect();
                    let site = sites.iter().position(|s| *s == Site { layer: record.layer, point: top.point }).unwrap();
                    if top.point == Point::ExpertOut {
                        prop_assert_eq!((record.value, record.expert), (shown.outputs[at], Some(shown.experts[record.position] as usize)));
                    } else {
                        prop_assert_eq!((record.value, record.expert), (shown.values[site][at], None));
                    }
                }
            }
        }

        #[test]
        fn peaks_separate_gain_and_residual_value(corpus in corpora()) {
            for feature in report(&whole(&corpus, 2)).judged.features {
                let peak = feature.peak.unwrap();
                prop_assert_eq!(peak.value.abs(), feature.max_abs);
                let site = Site { layer: peak.layer, point: peak.point };
                prop_assert_eq!(peak.gain, Some(gain(site)[feature.dim]));
                let over = peak.value / gain(site)[feature.dim];
                prop_assert_eq!(peak.value_over_gain, (feature.dim != 1).then_some(over), "the gain of feature 1 is 0");
            }
        }
    }

    #[test]
    fn overflowing_site_is_named() {
        let mut study = Study::new(scope(), 6.0);
        let mut x = vec![1.0; 2 * TOKENS * HIDDEN];
        x[4 * HIDDEN + 2] = f32::INFINITY;
        let site = Site { layer: 1, point: Point::MlpOut };
        let message = study.observe(site, TOKENS, &tensor(&x)).unwrap_err().to_string();
        assert!(message.contains("layer 1 MlpOut, token 7"), "{message}");
    }

    #[test]
    fn only_requested_sites_are_studied() {
        let study = Study::new(Scope { others: Vec::new(), ..scope() }, 6.0);
        assert!(study.wants(Site { layer: 1, point: Point::BeforeMlp }));
        assert!(!study.wants(Site { layer: 1, point: Point::Residual }));
        let report = report(&study);
        assert!(
            report.other_sites.is_empty() && report.massive_activations.is_none() && report.super_experts.is_none()
        );
        assert_eq!(report.routers.len(), 1, "routers are always counted");
    }

    #[test]
    fn gains_are_summarised() {
        let summary = gain_summary(&[1.0, -3.0, 0.0, 3.0]);
        assert_eq!((summary.max_abs, summary.dim, summary.rms), (3.0, 1, (19f64 / 4.0).sqrt()));
    }
}
