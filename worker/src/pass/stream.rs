//! The forward pass, layer-major: all tokens pass a streaming unit while its weights are loaded.
//! Each weight byte is read once for any number of tokens.
//!
//! Layers are assigned to the devices in turn ([`wavefront`]). While a unit computes, a second
//! thread reads and decodes the next ones. At most the bytes of the two largest units are held, so
//! that peak memory does not grow with depth.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::mpsc::sync_channel;

use candle_core::{DType, Device, Tensor};
use outliers_protocol::{Perplexity, Phase};

mod embed;
mod head;
mod layer;
mod wavefront;

use crate::blocks::ffn::Routed;
use crate::blocks::weights::{leave, on};
use crate::checkpoint::source::PlannedRead;
use crate::checkpoint::{Model, TensorRange};
use crate::corpus::Tokens;
use crate::device::Placement;
use crate::device::gpu::PeerCopy;
use crate::error::Result;
use crate::model::decoder::{DecoderSpec, Need, StreamingUnit};
use crate::pass::ablation::Arms;
use crate::pass::loader::{Loader, TensorPool, rows_of};
use crate::pass::meter::{Clock, Meter, Thread, Work};
use crate::pass::progress::ProgressSink;
use crate::pass::savepoint::{self, SavePoint, SavePoints, SerializePart};
use crate::stats::Observer;

/// Rows of the vocabulary per block of embedding and head.
pub const VOCAB_BLOCK: usize = 4096;

/// One pass of a model over tokens.
pub struct Pass<'a> {
    /// The checked checkpoint.
    pub model: &'a Model<'a>,
    /// Token ids.
    pub tokens: &'a Tokens,
    /// Copies of the tokens, by ablated features. Only the whole model is observed.
    pub arms: &'a Arms,
    /// Dtype of the forward pass.
    pub compute: DType,
    /// Layer `i` runs on device `i % devices`, embedding and head on the first.
    pub devices: &'a [Placement],
    /// Tokens computed together, rounded down to whole sequences, at least one.
    pub micro_batch_tokens: usize,
    /// Whether to compute final norm, head and negative log-likelihoods.
    pub with_head: bool,
    /// Values decoded per group of experts: bounds memory, changes no result.
    pub group_elements: u64,
    /// Bytes of weights that may be held until their file is hashed up to them.
    pub hash_memory: u64,
    /// Whether units are loaded while others compute. If false, a device holds one unit at a time;
    /// results are the same.
    pub read_ahead: bool,
    /// Receives every step.
    pub progress: &'a ProgressSink,
    /// Receives the time of each kind of work.
    pub meter: &'a Meter,
}

/// Results of a pass besides the observations.
pub struct PassResult {
    /// Predictions of each arm, the whole model first, if `with_head`.
    pub predicted: Option<Vec<Predicted>>,
    /// The layer at which an earlier pass was resumed.
    pub resumed_at_layer: Option<usize>,
    /// Names of the weight files that the earlier pass read completely without verifying them.
    pub unverified_before: Vec<String>,
}

impl PassResult {
    /// Predictions of the whole model.
    pub fn whole(&self) -> Option<&Predicted> {
        self.predicted.as_ref()?.first()
    }
}

/// Likelihoods of the following tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Predicted {
    /// Negative log-likelihood of every predicted token in nats, `[sequences, tokens - 1]`.
    pub nll: Vec<f32>,
    /// Mean of the largest probability per predicted token.
    pub top_probability: f64,
}

impl Predicted {
    /// Perplexity; `None` without predictions (sequences of one token).
    pub fn perplexity(&self) -> Option<Perplexity> {
        let mean_nll = mean(&self.nll)?;
        Some(Perplexity { perplexity: mean_nll.exp(), mean_nll, predicted_tokens: self.nll.len() as u64 })
    }

    /// Mean negative log-likelihood of each sequence; `None` without predictions.
    pub fn of_sequences(&self, sequences: usize) -> Vec<Option<f64>> {
        let each = self.nll.len() / sequences.max(1);
        (0..sequences).map(|sequence| mean(&self.nll[sequence * each..][..each])).collect()
    }
}

/// Mean, summed in f64; `None` for no values.
fn mean(values: &[f32]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64)
}

/// Whole sequences computed together, and their state between units.
struct MicroBatch {
    arm: usize,
    first_token: usize,
    /// The residual stream being copied to another GPU. Dropped before its source.
    peer_copy: Option<PeerCopy>,
    /// Residual stream `[rows, hidden]`.
    hidden: Tensor,
    /// The norm output that the feed-forward shares with the mixer, between the two.
    shared_norm: Option<Tensor>,
    /// State between a mixture's router and its last group of experts.
    mixture: Option<Mixture>,
}

impl MicroBatch {
    fn new(arm: usize, first_token: usize, hidden: Tensor) -> Self {
        Self { arm, first_token, peer_copy: None, hidden, shared_norm: None, mixture: None }
    }

    /// Called on the thread of the current device. Between GPUs it only starts the copy.
    fn leave_for(&mut self, device: &Device) -> Result<()> {
        self.hidden = self.hidden.contiguous()?;
        self.peer_copy = PeerCopy::start(&self.hidden, device)?;
        if self.peer_copy.is_none() {
            self.hidden = leave(&self.hidden, device)?;
        }
        Ok(())
    }

    /// Called on the thread of the new device.
    fn arrive_on(&mut self, device: &Device) -> Result<()> {
        self.hidden = match self.peer_copy.take() {
            Some(peer_copy) => peer_copy.wait(device)?,
            None => on(&self.hidden, device)?,
        };
        Ok(())
    }
}

/// Micro-batches per wave, for an arm with `batches`.
pub(crate) fn batches_per_wave(batches: usize) -> usize {
    batches.div_ceil(WAVES).max(1)
}

/// Micro-batches of an arm that move together. An expert's rows are gathered across them, and the
/// rows of a product affect its rounding, so the job sets the micro-batches; the default is what
/// fits a GPU's memory.
struct Wave {
    /// Index from 0, in the order of the sequences.
    number: usize,
    first_batch: usize,
    batches: Vec<MicroBatch>,
}

/// Maximum waves per arm; fewer if the arm has fewer micro-batches. This many devices can work at
/// the same time. More waves would gather an expert's rows from fewer micro-batches.
pub(crate) const WAVES: usize = 4;

impl Wave {
    /// Divides micro-batches into waves arm by arm, so that an arm is rounded as if it ran alone.
    fn all(batches: Vec<MicroBatch>) -> Vec<Self> {
        let mut waves: Vec<Self> = Vec::new();
        let of_arm = batches.iter().filter(|batch| batch.arm == 0).count();
        let size = batches_per_wave(of_arm);
        for (number, batch) in batches.into_iter().enumerate() {
            match waves.last_mut() {
                Some(wave) if wave.batches.len() < size && wave.batches[0].arm == batch.arm => wave.batches.push(batch),
                _ => waves.push(Self { number: waves.len(), first_batch: number, batches: vec![batch] }),
            }
        }
        waves
    }

    /// Indices of its micro-batches.
    fn micro_batches(&self) -> Range<usize> {
        self.first_batch..self.first_batch + self.batches.len()
    }

    /// Called on the thread of the current device, which alone may touch its memory.
    fn leave_for(&mut self, device: &Device) -> Result<()> {
        self.batches.iter_mut().try_for_each(|batch| batch.leave_for(device))
    }
}

struct Mixture {
    routed: Routed,
    /// Output of a dense MLP beside the experts.
    beside: Option<Tensor>,
}

/// Bytes of the embedding, kept for a tied head.
type KeptBlocks = Option<Vec<(Range<usize>, Vec<u8>)>>;

impl Pass<'_> {
    /// Runs the pass. `observer` receives every site it wants.
    ///
    /// With `save`, the state is saved from time to time. A pass that finds its save point resumes
    /// there, on any devices.
    ///
    /// # Errors
    /// Errors from reading or decoding weights, the device, or the observer.
    pub fn run<O: Observer>(&self, observer: &mut O, mut save: Option<&mut SavePoints>) -> Result<PassResult> {
        let found = save.as_ref().and_then(|points| {
            points.load().unwrap_or_else(|why| {
                self.progress.say(format!("a save point is not used, since {why}"));
                None
            })
        });
        let resumed_at_layer = found.as_ref().map(|point| point.next_layer);
        let order = self.reading_order(resumed_at_layer);
        let unverified_before = found.as_ref().map_or_else(Vec::new, |point| self.unverified_before(point, &order));
        self.model.source.announce(&order, self.hash_memory);
        let (batches, kept) = match found {
            Some(point) => {
                self.progress.say(format!("resuming at layer {}", point.next_layer));
                (self.restore(point, observer)?, None)
            }
            None => {
                self.progress.phase(Phase::Embedding);
                let (batches, kept) = self.embed()?;
                (self.in_arms(batches), kept)
            }
        };
        let first = resumed_at_layer.unwrap_or(0);
        self.progress.first_layer(first);
        self.progress.phase(Phase::Layers);
        let waves = wavefront::run(self, first, Wave::all(batches), observer, save.as_deref_mut())?;
        if !self.with_head {
            return Ok(PassResult { predicted: None, resumed_at_layer, unverified_before });
        }
        let layers = self.spec().layers.len();
        if let Some(points) = save.filter(|points| first < layers && points.is_due()) {
            self.save(points, layers, &waves, observer);
        }
        self.progress.phase(Phase::Head);
        let batches = waves.into_iter().flat_map(|wave| wave.batches).collect();
        let predicted = self.head(batches, kept, observer)?;
        Ok(PassResult { predicted: Some(predicted), resumed_at_layer, unverified_before })
    }

    /// Files that were read only before the save point, unless they were verified then.
    fn unverified_before(&self, point: &SavePoint, after: &[PlannedRead]) -> Vec<String> {
        let files = |order: &[PlannedRead]| order.iter().map(|wanted| wanted.file).collect::<BTreeSet<_>>();
        let (before, after) = (files(&self.reading_order(None)), files(after));
        let names = before.difference(&after).map(|file| self.model.source.files()[*file].name.clone());
        names.filter(|name| !point.verified.contains(name)).collect()
    }

    /// The same hidden states for every arm.
    fn in_arms(&self, batches: Vec<MicroBatch>) -> Vec<MicroBatch> {
        let of_arm = |arm| batches.iter().map(move |b| MicroBatch::new(arm, b.first_token, b.hidden.clone()));
        (0..self.arms.count()).flat_map(of_arm).collect()
    }

    /// Restores hidden states and observer, in micro-batches of this pass: another GPU may have
    /// another micro-batch size.
    fn restore(&self, point: SavePoint, observer: &mut impl Observer) -> Result<Vec<MicroBatch>> {
        observer.restore(&point.observed)?;
        let (width, rows) = (self.spec().hidden, self.batch_rows());
        let device = &self.placement(point.next_layer).device;
        let of_arm = (point.hidden.len() / self.arms.count()).max(1);
        let of_token = width * self.compute.size_in_bytes();
        let (mut batches, mut first_token) = (Vec::new(), 0);
        let mut open: Vec<u8> = Vec::new();
        for (i, bytes) in point.hidden.into_iter().enumerate() {
            open.extend(bytes);
            let ends_arm = (i + 1) % of_arm == 0;
            while open.len() >= rows * of_token || ends_arm && !open.is_empty() {
                let rest = open.split_off(open.len().min(rows * of_token));
                let shape = [open.len() / of_token, width];
                let hidden = savepoint::from_bytes(&open, self.compute, &shape, device)?;
                batches.push(MicroBatch::new(i / of_arm, first_token, hidden));
                first_token += shape[0];
                open = rest;
            }
            if ends_arm {
                first_token = 0;
            }
        }
        Ok(batches)
    }

    /// Saves the state before a layer. A failed write is reported and does not end the run.
    fn save(&self, points: &mut SavePoints, next_layer: usize, waves: &[Wave], observer: &impl Observer) {
        let batches = waves.iter().flat_map(|wave| &wave.batches);
        let hidden =
            batches.map(|batch| Box::new(|| savepoint::to_bytes(&batch.hidden)) as SerializePart<'_>).collect();
        let verified = self.model.source.verified();
        if let Err(error) = points.save(next_layer, hidden, Box::new(|| observer.state()), verified) {
            self.progress.say(format!("no save point after layer {}: {error}", next_layer - 1));
        }
    }

    fn spec(&self) -> &DecoderSpec {
        &self.model.spec
    }

    /// Rows per micro-batch.
    fn batch_rows(&self) -> usize {
        (self.micro_batch_tokens / self.tokens.tokens).max(1) * self.tokens.tokens
    }

    fn reading_order(&self, resumed_at_layer: Option<usize>) -> Vec<PlannedRead> {
        reading_order(self.model, self.group_elements, self.with_head, resumed_at_layer)
    }

    /// The device of a layer; after the last layer, the device of the head.
    fn placement(&self, layer: usize) -> &Placement {
        let device = if layer < self.spec().layers.len() { layer % self.devices.len() } else { 0 };
        &self.devices[device]
    }

    /// Units of the layers from `first` on.
    fn units(&self, first: usize) -> Vec<StreamingUnit> {
        units(self.spec(), self.group_elements, first)
    }

    /// The loader of a device's weights.
    fn loader<'l>(&'l self, device: usize, pool: &'l TensorPool) -> Result<Loader<'l>> {
        let clock = self.meter.clock(Thread::Loader(device));
        Loader::new(self.model, self.compute, &self.devices[device].device, pool, clock)
    }
}

fn units(spec: &DecoderSpec, group_elements: u64, first: usize) -> Vec<StreamingUnit> {
    spec.units(group_elements).into_iter().filter(|unit| unit.layer >= first).collect()
}

/// All bytes that a pass reads, in its order.
pub(crate) fn reading_order(
    model: &Model<'_>,
    group_elements: u64,
    with_head: bool,
    resumed_at_layer: Option<usize>,
) -> Vec<PlannedRead> {
    let spec = &model.spec;
    let mut order = ReadingOrder::new(model);
    if resumed_at_layer.is_none() {
        order.blocks(0, &spec.embedding_need());
        order.unit(0, 0, &spec.input_needs());
    }
    for unit in units(spec, group_elements, resumed_at_layer.unwrap_or(0)) {
        order.unit(unit.layer, unit.layer, &unit.needs);
    }
    if with_head {
        let after = spec.layers.len();
        order.unit(0, after, &spec.output_needs());
        order.unit(0, after, spec.head_bias_need().as_slice());
        if !spec.head.tied || resumed_at_layer.is_some() {
            order.blocks(after, &spec.head_need());
        }
    }
    order.wanted
}

/// The reading order of a pass, under construction.
struct ReadingOrder<'a> {
    model: &'a Model<'a>,
    wanted: Vec<PlannedRead>,
    units: usize,
}

impl<'a> ReadingOrder<'a> {
    fn new(model: &'a Model<'a>) -> Self {
        Self { model, wanted: Vec::new(), units: 0 }
    }

    /// Adds tensors that are loaded together. `beside` is the layer whose small tensors they may
    /// be fetched with.
    fn unit(&mut self, layer: usize, beside: usize, needs: &[Need]) {
        for need in needs {
            self.model.stored(layer, need).pieces().for_each(|piece| self.piece(piece, beside));
        }
        self.units += 1;
    }

    /// Adds a table in blocks of rows.
    fn blocks(&mut self, beside: usize, table: &Need) {
        let stored = self.model.stored(0, table);
        for rows in vocab_blocks(table.shape[0], VOCAB_BLOCK) {
            self.piece(&rows_of(&stored, &rows), beside);
            self.units += 1;
        }
    }

    fn piece(&mut self, piece: &TensorRange<'_>, layer: usize) {
        let TensorRange { entry, range } = piece;
        let bytes = entry.offset + range.start..entry.offset + range.end;
        self.wanted.push(PlannedRead { file: entry.file, bytes, layer, unit: self.units });
    }
}

fn vocab_blocks(vocab: usize, size: usize) -> Vec<Range<usize>> {
    (0..vocab).step_by(size).map(|first| first..(first + size).min(vocab)).collect()
}

/// Loads items in order on a second thread while earlier ones are consumed. At most one waits and
/// one is in use.
fn pipeline<I: Send, T: Send>(
    clock: &Clock<'_>,
    work: Work,
    items: Vec<I>,
    mut load: impl FnMut(&I) -> Result<T> + Send,
    mut consume: impl FnMut(I, T) -> Result<()>,
) -> Result<()> {
    std::thread::scope(|scope| {
        let (send, receive) = sync_channel(0);
        scope.spawn(move || {
            for item in items {
                let loaded = load(&item).map(|value| (item, value));
                let failed = loaded.is_err();
                // The receiver is gone if the consumer failed.
                if send.send(loaded).is_err() || failed {
                    return;
                }
            }
        });
        while let Ok(loaded) = clock.time(Work::Waiting, || receive.recv()) {
            let (item, value) = loaded?;
            clock.time(work, || consume(item, value))?;
        }
        Ok(())
    })
}
