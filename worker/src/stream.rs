//! The forward pass, layer-major: every token passes a streaming unit before the next one's weights are used, and each
//! weight byte is read once, whatever the number of tokens.
//!
//! While one unit computes, the next is read and decoded by a second thread; never more than two are alive, so that peak
//! memory does not grow with depth.

use std::ops::Range;
use std::sync::mpsc::sync_channel;

use candle_core::{DType, Device, Tensor};
use outliers_protocol::{Phase, Point};
use rayon::prelude::*;

use crate::attention::attention;
use crate::corpus::Tokens;
use crate::decoder::{DecoderSpec, FfnSpec, LayerSpec, MixerSpec, MoeSpec, Need, NormOrder, Part, Role, Unit};
use crate::delta_net::delta_net;
use crate::device::Placement;
use crate::dtype;
use crate::error::{Result, WorkerError};
use crate::ffn::{self, ExpertRows, Gathered, MlpWeights, Routing};
use crate::fused;
use crate::loader::{self, LoadedUnit, Loader, Spare, rows_of};
use crate::meter::{Meter, Work};
use crate::mla::latent_attention;
use crate::model::{Model, Piece};
use crate::norm::Norm;
use crate::progress::ProgressSink;
use crate::rope::{RopeSpec, RopeTable};
use crate::savepoint::{self, Give, SavePoint, SavePoints};
use crate::source::Wanted;
use crate::stats::{Observer, Site, with_f32};
use crate::weights::{MixerWeights, UnitTensors, on, zeros_like};

/// Vocabulary rows per block of embedding and head.
pub const VOCAB_BLOCK: usize = 4096;

/// One pass of a model over tokens.
pub struct Pass<'a> {
    /// The checked checkpoint.
    pub model: &'a Model<'a>,
    /// Token ids.
    pub tokens: &'a Tokens,
    /// Dtype of the forward pass.
    pub compute: DType,
    /// Layer `i` runs on device `i % devices`.
    pub devices: &'a [Placement],
    /// Tokens computed together, rounded down to whole sequences, one at least.
    pub micro_batch_tokens: usize,
    /// Whether to go on to final norm, head and negative log-likelihoods.
    pub with_head: bool,
    /// Values decoded per group of experts: bounds memory, changes no number.
    pub group_elements: u64,
    /// Told of every step.
    pub progress: &'a ProgressSink,
    /// Told how long each kind of work takes.
    pub meter: &'a Meter,
}

/// What a pass gives beside what its observers saw.
pub struct Passed {
    /// Negative log-likelihood of every predicted token `[sequences, tokens - 1]`, nats, if asked to go on to the head.
    pub nll: Option<Vec<f32>>,
    /// The layer at which it took an earlier pass up.
    pub resumed_at_layer: Option<usize>,
}

/// Whole sequences that are computed together, and what is kept of them between units.
struct MicroBatch {
    first_token: usize,
    /// Residual stream `[rows, hidden]`.
    hidden: Tensor,
    /// The norm's output that the feed-forward shares with the mixer, between the two.
    shared_norm: Option<Tensor>,
    /// Between a mixture's router and its last group of experts.
    mixture: Option<Mixture>,
}

impl MicroBatch {
    fn new(first_token: usize, hidden: Tensor) -> Self {
        Self { first_token, hidden, shared_norm: None, mixture: None }
    }
}

struct Mixture {
    x: Tensor,
    routing: Routing,
    out: Tensor,
}

/// Bytes of the embedding, kept from the embedding pass if the head is the same matrix.
type KeptBlocks = Option<Vec<(Range<usize>, Vec<u8>)>>;

impl Pass<'_> {
    /// Runs it; observers see every studied site.
    ///
    /// With `save`, what has been computed is saved now and then, and a pass that finds its save point goes on from there.
    ///
    /// # Errors
    /// Reading or decoding weights, the device, an observer.
    pub fn run(&self, observers: &mut [&mut dyn Observer], save: Option<&mut SavePoints>) -> Result<Passed> {
        let found = save.as_ref().and_then(|points| {
            points.load().unwrap_or_else(|why| {
                self.progress.say(format!("a save point is not used, since {why}"));
                None
            })
        });
        let resumed_at_layer = found.as_ref().map(|point| point.next_layer);
        self.model.source.announce(&self.reading_order(resumed_at_layer));
        let (mut batches, kept) = match found {
            Some(point) => {
                self.progress.say(format!("going on at layer {}", point.next_layer));
                (self.restore(point, observers)?, None)
            }
            None => {
                self.progress.phase(Phase::Embedding);
                self.embed()?
            }
        };
        self.progress.phase(Phase::Layers);
        self.layers(resumed_at_layer.unwrap_or(0), &mut batches, observers, save)?;
        if !self.with_head {
            return Ok(Passed { nll: None, resumed_at_layer });
        }
        self.progress.phase(Phase::Head);
        let nll = self.head(batches, kept, observers)?;
        Ok(Passed { nll: Some(nll), resumed_at_layer })
    }

    /// Micro-batches and observers as they were.
    fn restore(&self, point: SavePoint, observers: &mut [&mut dyn Observer]) -> Result<Vec<MicroBatch>> {
        if observers.len() != point.observed.len() {
            return Err(WorkerError::internal("a save point of other observers"));
        }
        for (observer, state) in observers.iter_mut().zip(&point.observed) {
            observer.restore(state)?;
        }
        let (width, rows) = (self.spec().hidden, self.batch_rows());
        let batch = |(i, bytes): (usize, Vec<u8>)| {
            let tokens = bytes.len() / (width * self.compute.size_in_bytes());
            let hidden = savepoint::from_bytes(&bytes, self.compute, &[tokens, width], &self.devices[0].device)?;
            Ok(MicroBatch::new(i * rows, hidden))
        };
        point.hidden.into_iter().enumerate().map(batch).collect()
    }

    /// Saves what there is after a layer. A disk that refuses costs the save point, not the run.
    fn save(
        &self,
        points: &mut SavePoints,
        next_layer: usize,
        batches: &[MicroBatch],
        observers: &[&mut dyn Observer],
    ) {
        let hidden = batches.iter().map(|batch| Box::new(|| savepoint::to_bytes(&batch.hidden)) as Give<'_>).collect();
        let observed = observers.iter().map(|observer| Box::new(|| observer.state()) as Give<'_>).collect();
        if let Err(error) = points.save(next_layer, hidden, observed) {
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

    /// Every byte that the pass will read, in the order in which it will.
    fn reading_order(&self, resumed_at_layer: Option<usize>) -> Vec<Wanted> {
        let spec = self.spec();
        let mut order = ReadingOrder::new(self.model);
        if resumed_at_layer.is_none() {
            order.blocks(&spec.embedding_need());
            order.unit(0, 0, &spec.input_needs());
        }
        for unit in self.units(resumed_at_layer.unwrap_or(0)) {
            order.unit(unit.layer, unit.layer, &unit.needs);
        }
        if self.with_head {
            let after = spec.layers.len();
            order.unit(0, after, &spec.output_needs());
            order.unit(0, after, spec.head_bias_need().as_slice());
            if !spec.head.tied || resumed_at_layer.is_some() {
                order.blocks(&spec.head_need());
            }
        }
        order.wanted
    }

    // ------------------------------------------------------------------------------------------------- embedding

    /// Token ids to hidden states, the table read once in blocks of rows.
    fn embed(&self) -> Result<(Vec<MicroBatch>, KeptBlocks)> {
        let width = self.spec().embedding.width;
        let stored = self.model.stored(0, &self.spec().embedding_need());
        let mut order: Vec<usize> = (0..self.tokens.ids.len()).collect();
        order.par_sort_unstable_by_key(|&t| self.tokens.ids[t]);
        let rows = self.batch_rows();
        let mut values: Vec<Vec<f32>> =
            self.tokens.ids.chunks(rows).map(|batch| vec![0f32; batch.len() * width]).collect();
        let mut kept = (self.spec().head.tied && self.with_head).then(Vec::new);
        let load = |block: &Range<usize>| {
            let mut bytes = Vec::new();
            self.meter.time(Work::Reading, || loader::read(self.model.source, &rows_of(&stored, block), &mut bytes))?;
            Ok(bytes)
        };
        pipeline(self.meter, vocab_blocks(self.spec().vocab, VOCAB_BLOCK), load, |block, bytes| {
            let from = order.partition_point(|&t| self.tokens.ids[t] < block.start as i64);
            let to = order.partition_point(|&t| self.tokens.ids[t] < block.end as i64);
            let row_bytes = bytes.len() / block.len();
            for run in order[from..to].chunk_by(|a, b| self.tokens.ids[*a] == self.tokens.ids[*b]) {
                let at = (self.tokens.ids[run[0]] as usize - block.start) * row_bytes;
                let entry = stored.values.entry;
                let row = dtype::to_f32(&bytes[at..at + row_bytes], &entry.dtype, &entry.name)?;
                for &token in run {
                    values[token / rows][token % rows * width..][..width].copy_from_slice(&row);
                }
            }
            if let Some(kept) = &mut kept {
                kept.push((block, bytes));
            }
            Ok(())
        })?;
        let device = &self.devices[0].device;
        let mut input = self.loader(&Spare::default()).unit(0, &self.spec().input_needs(), device)?.tensors;
        let lead_in = input.linear_if_there(Role::ProjectIn);
        let positions = input.linear_if_there(Role::Positions).map(|p| self.position_rows(&p.weight)).transpose()?;
        let batch = |(i, values): (usize, Vec<f32>)| {
            let tokens = values.len() / width;
            let mut hidden = dtype::from_f32(values, &[tokens, width], self.compute, device)?;
            if let Some(lead_in) = &lead_in {
                hidden = lead_in.apply(&hidden)?;
            }
            if let Some(positions) = &positions {
                hidden = (hidden + positions.repeat((tokens / self.tokens.tokens, 1))?)?;
            }
            Ok(MicroBatch::new(i * rows, hidden))
        };
        Ok((values.into_iter().enumerate().map(batch).collect::<Result<_>>()?, kept))
    }

    /// The learned vectors of a sequence's positions, `[tokens, hidden]`.
    fn position_rows(&self, table: &Tensor) -> Result<Tensor> {
        let learned = self.spec().embedding.positions.expect("read because the spec has them");
        let (n, most) = (self.tokens.tokens, learned.rows.saturating_sub(learned.offset));
        if n > most {
            return Err(WorkerError::job(format!(
                "sequences of {n} tokens, but the model has learned {most} positions"
            )));
        }
        Ok(table.narrow(0, learned.offset, n)?)
    }

    // ---------------------------------------------------------------------------------------------------- layers

    fn layers(
        &self,
        first: usize,
        batches: &mut [MicroBatch],
        observers: &mut [&mut dyn Observer],
        mut save: Option<&mut SavePoints>,
    ) -> Result<()> {
        let units = self.units(first);
        let mut tables = RopeTables { positions: self.tokens.tokens, made: Vec::new() };
        let spare = Spare::new(self.two_largest(&units));
        let mut loader = self.loader(&spare);
        let load = |unit: &Unit| loader.unit(unit.layer, &unit.needs, &self.placement(unit.layer).device);
        pipeline(self.meter, units, load, |unit, LoadedUnit { tensors, memory }| {
            let layer = &self.spec().layers[unit.layer];
            let table = layer.mixer.rope().map(|rope| tables.get(rope));
            self.compute(&unit, layer, tensors, table, batches, observers).map_err(|e| e.context(&unit))?;
            spare.give_back(memory);
            let ends_layer = self.ends_layer(&unit);
            self.progress.unit_done(&unit, ends_layer, self.model.source.bytes_read());
            if let Some(points) = save.as_deref_mut().filter(|points| ends_layer && points.is_due()) {
                self.save(points, unit.layer + 1, batches, observers);
            }
            Ok(())
        })
    }

    fn ends_layer(&self, unit: &Unit) -> bool {
        match (&unit.part, &self.spec().layers[unit.layer].ffn) {
            (Part::Dense, _) => true,
            (Part::Experts(group), FfnSpec::Moe(moe)) => group.end == moe.experts,
            _ => false,
        }
    }

    fn placement(&self, layer: usize) -> &Placement {
        &self.devices[layer % self.devices.len()]
    }

    /// The units of the layers from `first` on.
    fn units(&self, first: usize) -> Vec<Unit> {
        self.spec().units(self.group_elements).into_iter().filter(|unit| unit.layer >= first).collect()
    }

    fn loader<'l>(&'l self, spare: &'l Spare) -> Loader<'l> {
        Loader::new(self.model, self.compute, spare, self.meter)
    }

    /// Bytes of the two largest units, decoded: one in use, one on its way.
    fn two_largest(&self, units: &[Unit]) -> u64 {
        let decoded = |unit: &Unit| unit.needs.iter().map(Need::elements).sum::<u64>();
        let mut sizes: Vec<u64> = units.iter().map(decoded).collect();
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        sizes.iter().take(2).sum::<u64>() * self.compute.size_in_bytes() as u64
    }

    /// All micro-batches through one unit.
    fn compute(
        &self,
        unit: &Unit,
        layer: &LayerSpec,
        mut tensors: UnitTensors,
        table: Option<&RopeTable>,
        batches: &mut [MicroBatch],
        observers: &mut [&mut dyn Observer],
    ) -> Result<()> {
        let mut at = At { layer: unit.layer, spec: layer, observers };
        match (&unit.part, &layer.ffn) {
            (Part::Mixer, _) => {
                let norm = tensors.norm(layer.norm, Role::MixerNorm, Role::MixerNormBias)?;
                at.gain(0, &norm)?;
                let weights = tensors.mixer(&layer.mixer)?;
                for batch in batches {
                    batch.hidden = on(&batch.hidden, &self.placement(unit.layer).device)?;
                    at.mix(batch, &norm, |x| self.mix(&layer.mixer, &weights, table, x))?;
                }
            }
            (Part::Dense, FfnSpec::Dense(mlp)) => {
                let norm = at.ffn_norm(&mut tensors)?;
                let weights = tensors.dense(*mlp)?;
                for batch in batches {
                    let x = at.before_ffn(batch, norm.as_ref())?;
                    let out = weights.apply(&x)?;
                    at.after_ffn(batch, norm.as_ref(), out)?;
                }
            }
            (Part::Router, FfnSpec::Moe(moe)) => {
                let norm = at.ffn_norm(&mut tensors)?;
                let (router, shared) = tensors.router(moe)?;
                for batch in batches {
                    let x = at.before_ffn(batch, norm.as_ref())?;
                    let routing = ffn::route(moe.router, moe.top_k, &router, &x)?;
                    at.routed(batch.first_token, &routing)?;
                    let out = shared.as_ref().map_or_else(|| zeros_like(&x), |shared| shared.apply(&x))?;
                    batch.mixture = Some(Mixture { out, x, routing });
                }
            }
            (Part::Experts(group), FfnSpec::Moe(moe)) => {
                at.experts(moe, group, &mut tensors, batches, self.batch_rows())?;
            }
            (part, ffn) => return Err(WorkerError::internal(format!("unit {part:?} in a layer with {ffn:?}"))),
        }
        Ok(())
    }

    fn mix(&self, spec: &MixerSpec, weights: &MixerWeights, table: Option<&RopeTable>, x: &Tensor) -> Result<Tensor> {
        let n = self.tokens.tokens;
        Ok(match (spec, weights, table) {
            (MixerSpec::Attention(spec), MixerWeights::Attention(weights), table) => {
                attention(spec, weights, table, x, n)?
            }
            (MixerSpec::Latent(spec), MixerWeights::Latent(weights), Some(table)) => {
                latent_attention(spec, weights, table, x, n)?
            }
            (MixerSpec::DeltaNet(spec), MixerWeights::DeltaNet(weights), _) => delta_net(spec, weights, x, n)?,
            (spec, ..) => return Err(WorkerError::internal(format!("other weights than those of {spec:?}"))),
        })
    }

    // ------------------------------------------------------------------------------------------------------ head

    /// Final norm, and the matrix that leads out to the head's width.
    fn before_head(
        &self,
        batches: &mut [MicroBatch],
        device: &Device,
        observers: &mut [&mut dyn Observer],
    ) -> Result<()> {
        let mut output = self.loader(&Spare::default()).unit(0, &self.spec().output_needs(), device)?.tensors;
        let spec = self.spec().final_norm;
        let norm = spec.map(|spec| output.norm(spec, Role::FinalNorm, Role::FinalNormBias)).transpose()?;
        let lead_out = output.linear_if_there(Role::ProjectOut);
        for batch in batches {
            batch.hidden = on(&batch.hidden, device)?;
            if let Some(norm) = &norm {
                batch.hidden = norm.apply(&batch.hidden)?;
                for observer in &mut *observers {
                    observer.final_norm(batch.first_token, &batch.hidden)?;
                }
            }
            if let Some(lead_out) = &lead_out {
                batch.hidden = lead_out.apply(&batch.hidden)?;
            }
        }
        Ok(())
    }

    /// Final norm, then the head in blocks of the vocabulary, each read once and met by all tokens.
    fn head(
        &self,
        mut batches: Vec<MicroBatch>,
        kept: KeptBlocks,
        observers: &mut [&mut dyn Observer],
    ) -> Result<Vec<f32>> {
        let device = &self.devices[0].device;
        self.before_head(&mut batches, device, observers)?;
        let mut likelihoods = Likelihoods::new(self.tokens);
        let need = self.spec().head_need();
        let stored = self.model.stored(0, &need);
        let spare = Spare::new(2 * (VOCAB_BLOCK * need.shape[1] * self.compute.size_in_bytes()) as u64);
        let mut loader = self.loader(&spare);
        let bias = self.spec().head_bias_need().map(|need| loader.tensor(0, &need, device)).transpose()?;
        let load = |block: &(Range<usize>, Option<Vec<u8>>)| match &block.1 {
            Some(bytes) => loader.decode_rows(&stored, &block.0, bytes, device),
            None => loader.rows(&stored, &block.0, device),
        };
        let blocks = match kept {
            Some(kept) => kept.into_iter().map(|(range, bytes)| (range, Some(bytes))).collect(),
            None => vocab_blocks(self.spec().vocab, VOCAB_BLOCK).into_iter().map(|range| (range, None)).collect(),
        };
        pipeline(self.meter, blocks, load, |(block, _), matrix| {
            let bias = bias.as_ref().map(|bias| bias.narrow(0, block.start, block.len())).transpose()?;
            for batch in &batches {
                let mut logits = batch.hidden.matmul(&matrix.t()?)?;
                if let Some(bias) = &bias {
                    logits = logits.broadcast_add(bias)?;
                }
                for observer in &mut *observers {
                    observer.logits(batch.first_token, block.start, &logits)?;
                }
                with_f32(&logits, |values| {
                    likelihoods.add(batch.first_token, &block, values);
                    Ok(())
                })?;
            }
            self.progress.bytes(self.model.source.bytes_read());
            spare.give_back([matrix]);
            Ok(())
        })?;
        Ok(likelihoods.nll())
    }
}

/// Rotation tables, one per kind of rotation in the model.
struct RopeTables {
    positions: usize,
    made: Vec<(RopeSpec, RopeTable)>,
}

impl RopeTables {
    fn get(&mut self, spec: &RopeSpec) -> &RopeTable {
        let at = self.made.iter().position(|(made, _)| made == spec).unwrap_or_else(|| {
            self.made.push((spec.clone(), spec.table(self.positions)));
            self.made.len() - 1
        });
        &self.made[at].1
    }
}

/// A layer, and who looks on.
struct At<'a, 'o> {
    layer: usize,
    spec: &'a LayerSpec,
    observers: &'a mut [&'o mut dyn Observer],
}

impl At<'_, '_> {
    fn show(&mut self, point: Point, first_token: usize, x: &Tensor) -> Result<()> {
        let site = Site { layer: self.layer, point };
        for observer in &mut *self.observers {
            if observer.wants(site) {
                observer.observe(site, first_token, x)?;
            }
        }
        Ok(())
    }

    /// A norm of the layer: 0 the mixer's, 1 the feed-forward's.
    fn point(&self, norm: usize) -> Point {
        self.spec.order.points()[norm]
    }

    fn gain(&mut self, norm: usize, of: &Norm) -> Result<()> {
        let site = Site { layer: self.layer, point: self.point(norm) };
        for observer in &mut *self.observers {
            observer.gain(site, of.gain())?;
        }
        Ok(())
    }

    /// The feed-forward's norm, where it has one of its own.
    fn ffn_norm(&mut self, tensors: &mut UnitTensors) -> Result<Option<Norm>> {
        if self.spec.order == NormOrder::Shared {
            return Ok(None);
        }
        let norm = tensors.norm(self.spec.norm, Role::FfnNorm, Role::FfnNormBias)?;
        self.gain(1, &norm)?;
        Ok(Some(norm))
    }

    /// Adds what `mixer` makes of a micro-batch to its residual stream.
    fn mix(&mut self, batch: &mut MicroBatch, norm: &Norm, mixer: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        let first = batch.first_token;
        if self.spec.order == NormOrder::After {
            let out = mixer(&batch.hidden)?;
            self.show(Point::AttentionOut, first, &out)?;
            batch.hidden = norm.apply(&(&batch.hidden + out)?)?;
            return self.show(self.point(0), first, &batch.hidden);
        }
        let x = norm.apply(&batch.hidden)?;
        self.show(self.point(0), first, &x)?;
        let out = mixer(&x)?;
        self.show(Point::AttentionOut, first, &out)?;
        batch.hidden = (&batch.hidden + out)?;
        batch.shared_norm = (self.spec.order == NormOrder::Shared).then_some(x);
        Ok(())
    }

    /// The feed-forward's input.
    fn before_ffn(&mut self, batch: &mut MicroBatch, norm: Option<&Norm>) -> Result<Tensor> {
        match (self.spec.order, norm) {
            (NormOrder::Before, Some(norm)) => {
                let x = norm.apply(&batch.hidden)?;
                self.show(self.point(1), batch.first_token, &x)?;
                Ok(x)
            }
            (NormOrder::Shared, _) => {
                let shared = batch.shared_norm.take();
                shared.ok_or_else(|| WorkerError::internal("a feed-forward before the mixer whose norm it shares"))
            }
            _ => Ok(batch.hidden.clone()),
        }
    }

    /// Adds the feed-forward's output, which ends the layer.
    fn after_ffn(&mut self, batch: &mut MicroBatch, norm: Option<&Norm>, out: Tensor) -> Result<()> {
        let first = batch.first_token;
        self.show(Point::MlpOut, first, &out)?;
        batch.hidden = (&batch.hidden + out)?;
        if let (NormOrder::After, Some(norm)) = (self.spec.order, norm) {
            batch.hidden = norm.apply(&batch.hidden)?;
            self.show(self.point(1), first, &batch.hidden)?;
        }
        self.show(Point::Residual, first, &batch.hidden)
    }

    fn routed(&mut self, first_token: usize, routing: &Routing) -> Result<()> {
        for observer in &mut *self.observers {
            observer.routing(self.layer, first_token, routing)?;
        }
        Ok(())
    }

    /// All experts of a group over all micro-batches; the last group closes the layer. An expert's rows are gathered across
    /// micro-batches, `rows_at_once` or a little more at a time, so that its products are large however few of a micro-batch go to it.
    fn experts(
        &mut self,
        moe: &MoeSpec,
        group: &Range<usize>,
        tensors: &mut UnitTensors,
        batches: &mut [MicroBatch],
        rows_at_once: usize,
    ) -> Result<()> {
        for expert in group.clone() {
            let weights = tensors.expert(moe.expert, expert)?;
            let (mut gathered, mut rows) = (Vec::new(), 0);
            for at in 0..batches.len() {
                let mixture = batches[at].mixture.as_ref().ok_or_else(early)?;
                if let Some(part) = ffn::gather(&mixture.x, &mixture.routing, expert)? {
                    rows += part.rows.len();
                    gathered.push((at, part));
                }
                if rows >= rows_at_once || (at + 1 == batches.len() && rows > 0) {
                    self.expert_on(expert, &weights, std::mem::take(&mut gathered), batches)?;
                    rows = 0;
                }
            }
        }
        if group.end == moe.experts {
            for batch in batches {
                let mixture = batch.mixture.take().ok_or_else(early)?;
                self.after_ffn(batch, None, mixture.out)?;
            }
        }
        Ok(())
    }

    /// One expert over rows of several micro-batches, each given by its index.
    fn expert_on(
        &mut self,
        expert: usize,
        weights: &MlpWeights,
        gathered: Vec<(usize, Gathered)>,
        batches: &mut [MicroBatch],
    ) -> Result<()> {
        let (indices, parts): (Vec<usize>, Vec<Gathered>) = gathered.into_iter().unzip();
        for (at, rows) in indices.into_iter().zip(ffn::apply_expert(weights, parts)?) {
            let batch = &mut batches[at];
            self.expert(expert, batch.first_token, &rows)?;
            let mixture = batch.mixture.take().ok_or_else(early)?;
            let out = ffn::add_expert(mixture.out, &mixture.routing, &rows)?;
            batch.mixture = Some(Mixture { out, ..mixture });
        }
        Ok(())
    }

    fn expert(&mut self, expert: usize, first_token: usize, rows: &ExpertRows) -> Result<()> {
        let site = Site { layer: self.layer, point: Point::ExpertOut };
        for observer in &mut *self.observers {
            if observer.wants(site) {
                observer.expert(self.layer, expert, first_token, rows)?;
            }
        }
        Ok(())
    }
}

fn early() -> WorkerError {
    WorkerError::internal("experts before their router")
}

/// What a pass will read, as it is put together.
struct ReadingOrder<'a> {
    model: &'a Model<'a>,
    wanted: Vec<Wanted>,
    units: usize,
}

impl<'a> ReadingOrder<'a> {
    fn new(model: &'a Model<'a>) -> Self {
        Self { model, wanted: Vec::new(), units: 0 }
    }

    /// Tensors that are loaded together. `beside` is the layer whose small tensors they may be fetched with.
    fn unit(&mut self, layer: usize, beside: usize, needs: &[Need]) {
        for need in needs {
            self.model.stored(layer, need).pieces().for_each(|piece| self.piece(piece, beside));
        }
        self.units += 1;
    }

    /// A table in blocks of rows.
    fn blocks(&mut self, table: &Need) {
        let stored = self.model.stored(0, table);
        for rows in vocab_blocks(table.shape[0], VOCAB_BLOCK) {
            self.piece(&rows_of(&stored, &rows), 0);
            self.units += 1;
        }
    }

    fn piece(&mut self, piece: &Piece<'_>, layer: usize) {
        let Piece { entry, range } = piece;
        let bytes = entry.offset + range.start..entry.offset + range.end;
        self.wanted.push(Wanted { file: entry.file, bytes, layer, unit: self.units });
    }
}

fn vocab_blocks(vocab: usize, size: usize) -> Vec<Range<usize>> {
    (0..vocab).step_by(size).map(|first| first..(first + size).min(vocab)).collect()
}

/// Loads items in order on a second thread while earlier ones are consumed here. At most one is waiting and one in use.
fn pipeline<I: Send, T: Send>(
    meter: &Meter,
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
                // The receiver is gone when the consumer failed: nothing more is wanted.
                if send.send(loaded).is_err() || failed {
                    return;
                }
            }
        });
        while let Ok(loaded) = meter.time(Work::Waiting, || receive.recv()) {
            let (item, value) = loaded?;
            meter.time(Work::Computing, || consume(item, value))?;
        }
        Ok(())
    })
}

/// Negative log-likelihoods gathered block by block of the vocabulary.
struct Likelihoods<'a> {
    tokens: &'a Tokens,
    rows: Vec<RowLikelihood>,
}

#[derive(Clone, Copy)]
struct RowLikelihood {
    top: f32,
    /// Sum of exp(logit - top) so far.
    sum: f64,
    target: f32,
}

impl<'a> Likelihoods<'a> {
    fn new(tokens: &'a Tokens) -> Self {
        let empty = RowLikelihood { top: f32::NEG_INFINITY, sum: 0.0, target: f32::NAN };
        Self { tokens, rows: vec![empty; tokens.ids.len()] }
    }

    /// Logits `[rows, block]` of the tokens from `first_token` on.
    fn add(&mut self, first_token: usize, block: &Range<usize>, logits: &[f32]) {
        let (n, ids) = (self.tokens.tokens, &self.tokens.ids);
        let rows = self.rows[first_token..].par_iter_mut().zip(logits.par_chunks_exact(block.len())).enumerate();
        rows.for_each(|(i, (row, logits))| {
            let token = first_token + i;
            let (top, sum) = fused::exp_sum(logits);
            let joint = row.top.max(top);
            let rescaled = |t: f32, s: f64| if s == 0.0 { 0.0 } else { s * f64::from(t - joint).exp() };
            (row.sum, row.top) = (rescaled(row.top, row.sum) + rescaled(top, f64::from(sum)), joint);
            if token % n + 1 < n && block.contains(&(ids[token + 1] as usize)) {
                row.target = logits[ids[token + 1] as usize - block.start];
            }
        });
    }

    /// `[sequences, tokens - 1]`.
    fn nll(&self) -> Vec<f32> {
        let predicted = self.rows.chunks(self.tokens.tokens).flat_map(|rows| &rows[..rows.len() - 1]);
        predicted.map(|row| (row.sum.ln() + f64::from(row.top) - f64::from(row.target)) as f32).collect()
    }
}
