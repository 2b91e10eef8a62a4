//! The forward pass, layer-major: every token passes a streaming unit before the next one's weights are used, and each
//! weight byte is read once, whatever the number of tokens.
//!
//! While one unit computes, the next is read and decoded by a second thread; never more than two are alive, so that peak
//! memory does not grow with depth.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::mpsc::sync_channel;

use candle_core::{DType, Tensor};
use outliers_protocol::{Phase, Point};
use rayon::prelude::*;

use crate::attention;
use crate::corpus::Tokens;
use crate::decoder::{DecoderSpec, FfnSpec, LayerSpec, MoeSpec, Need, Part, Role, Unit};
use crate::device::Placement;
use crate::dtype;
use crate::error::{Result, WorkerError};
use crate::ffn::{self, Routing};
use crate::fused;
use crate::model::Model;
use crate::progress::ProgressSink;
use crate::rope::RopeTable;
use crate::source::TensorEntry;
use crate::stats::{Observer, Site, with_f32};
use crate::weights::{UnitTensors, on, zeros_like};

/// Values decoded per expert group: 256 MiB in f32. With two groups alive this bounds the memory of any mixture.
pub const GROUP_ELEMENTS: u64 = 64 << 20;
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
    /// Told of every step.
    pub progress: &'a ProgressSink,
}

/// Whole sequences that are computed together, and what is kept of them between units.
struct MicroBatch {
    first_token: usize,
    /// Residual stream `[rows, hidden]`.
    hidden: Tensor,
    /// Between a mixture's router and its last group of experts.
    mixture: Option<Mixture>,
}

struct Mixture {
    x: Tensor,
    routing: Routing,
    out: Tensor,
}

/// Bytes of the embedding, kept from the embedding pass because the head is the same matrix.
type KeptBlocks = Vec<(Range<usize>, Vec<u8>)>;

impl Pass<'_> {
    /// Runs it; observers see every studied site. Returns the negative log-likelihood of every predicted token
    /// `[sequences, tokens - 1]`, nats, if asked to go on to the head.
    pub fn run(&self, observers: &mut [&mut dyn Observer]) -> Result<Option<Vec<f32>>> {
        self.progress.phase(Phase::Embedding);
        let (mut batches, kept) = self.embed()?;
        self.progress.phase(Phase::Layers);
        self.layers(&mut batches, observers)?;
        if !self.with_head {
            return Ok(None);
        }
        self.progress.phase(Phase::Head);
        self.head(batches, kept, observers).map(Some)
    }

    fn spec(&self) -> &DecoderSpec {
        &self.model.spec
    }

    /// Rows per micro-batch.
    fn batch_rows(&self) -> usize {
        (self.micro_batch_tokens / self.tokens.tokens).max(1) * self.tokens.tokens
    }

    // ------------------------------------------------------------------------------------------------- embedding

    /// Token ids to hidden states, the table read once in blocks of rows.
    fn embed(&self) -> Result<(Vec<MicroBatch>, KeptBlocks)> {
        let width = self.spec().hidden;
        let need = self.spec().embedding_need();
        let (name, entry) = self.model.entry(0, &need);
        let mut order: Vec<usize> = (0..self.tokens.ids.len()).collect();
        order.par_sort_unstable_by_key(|&t| self.tokens.ids[t]);
        let rows = self.batch_rows();
        let mut values: Vec<Vec<f32>> =
            self.tokens.ids.chunks(rows).map(|batch| vec![0f32; batch.len() * width]).collect();
        let mut kept = Vec::new();
        let load = |block: &Range<usize>| self.read_rows(entry, block);
        pipeline(vocab_blocks(self.spec().vocab, VOCAB_BLOCK), load, |block, bytes| {
            let from = order.partition_point(|&t| self.tokens.ids[t] < block.start as i64);
            let to = order.partition_point(|&t| self.tokens.ids[t] < block.end as i64);
            let row_bytes = bytes.len() / block.len();
            for run in order[from..to].chunk_by(|a, b| self.tokens.ids[*a] == self.tokens.ids[*b]) {
                let at = (self.tokens.ids[run[0]] as usize - block.start) * row_bytes;
                let row = dtype::to_f32(&bytes[at..at + row_bytes], &entry.dtype, &name)?;
                for &token in run {
                    values[token / rows][token % rows * width..][..width].copy_from_slice(&row);
                }
            }
            if self.spec().tied_head && self.with_head {
                kept.push((block, bytes));
            }
            Ok(())
        })?;
        let device = &self.devices[0].device;
        let batch = |(i, values): (usize, Vec<f32>)| {
            let hidden = dtype::from_f32(
                values,
                &[self.tokens.ids.chunks(rows).nth(i).map_or(0, <[i64]>::len), width],
                self.compute,
                device,
            )?;
            Ok(MicroBatch { first_token: i * rows, hidden, mixture: None })
        };
        Ok((values.into_iter().enumerate().map(batch).collect::<Result<_>>()?, kept))
    }

    /// Stored bytes of some rows of a matrix.
    fn read_rows(&self, entry: &TensorEntry, rows: &Range<usize>) -> Result<Vec<u8>> {
        let row_bytes = entry.len / entry.shape[0];
        let mut bytes = vec![0; (rows.len() as u64 * row_bytes) as usize];
        self.model.source.read(entry, rows.start as u64 * row_bytes..rows.end as u64 * row_bytes, &mut bytes)?;
        Ok(bytes)
    }

    // ---------------------------------------------------------------------------------------------------- layers

    fn layers(&self, batches: &mut [MicroBatch], observers: &mut [&mut dyn Observer]) -> Result<()> {
        let units = self.spec().units(GROUP_ELEMENTS);
        let mut tables: Vec<(crate::rope::RopeSpec, RopeTable)> = Vec::new();
        let load = |unit: &Unit| self.load(unit);
        pipeline(units, load, |unit, tensors| {
            let layer = &self.spec().layers[unit.layer];
            let table = match tables.iter().position(|(spec, _)| *spec == layer.attention.rope) {
                Some(at) => &tables[at].1,
                None => {
                    let spec = layer.attention.rope.clone();
                    tables.push((spec.clone(), spec.table(self.tokens.tokens)));
                    &tables[tables.len() - 1].1
                }
            };
            self.compute(&unit, layer, tensors, table, batches, observers).map_err(|e| e.context(&unit))?;
            self.progress.unit_done(&unit, self.ends_layer(&unit), self.model.source.bytes_read());
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

    /// Reads and decodes a unit onto its device.
    fn load(&self, unit: &Unit) -> Result<UnitTensors> {
        let device = &self.placement(unit.layer).device;
        let one = |need: &Need| {
            let (name, entry) = self.model.entry(unit.layer, need);
            let mut bytes = vec![0; entry.len as usize];
            self.model.source.read(entry, 0..entry.len, &mut bytes)?;
            let tensor = dtype::to_tensor(&bytes, &entry.dtype, &need.shape, self.compute, device, &name)?;
            Ok(((need.role, need.expert), tensor))
        };
        Ok(UnitTensors::new(unit.needs.iter().map(one).collect::<Result<HashMap<_, _>>>()?))
    }

    /// All micro-batches through one unit.
    fn compute(
        &self,
        unit: &Unit,
        layer: &LayerSpec,
        mut tensors: UnitTensors,
        table: &RopeTable,
        batches: &mut [MicroBatch],
        observers: &mut [&mut dyn Observer],
    ) -> Result<()> {
        match (&unit.part, &layer.ffn) {
            (Part::Attention, _) => {
                let gain = tensors.take(Role::MixerNorm)?;
                let weights = tensors.attention()?;
                let site = Site { layer: unit.layer, point: Point::BeforeAttention };
                for batch in batches {
                    batch.hidden = on(&batch.hidden, &self.placement(unit.layer).device)?;
                    let x = fused::rms_norm(&batch.hidden, &gain, layer.mixer_norm.eps)?;
                    show(observers, site, batch.first_token, &x)?;
                    let mixed = attention::attention(&layer.attention, &weights, table, &x, self.tokens.tokens)?;
                    batch.hidden = (&batch.hidden + mixed)?;
                }
            }
            (Part::Dense, _) => {
                let gain = tensors.take(Role::FfnNorm)?;
                let weights = tensors.gated()?;
                for batch in batches {
                    let x = self.before_mlp(unit.layer, layer, &gain, batch, observers)?;
                    batch.hidden = (&batch.hidden + weights.apply(&x)?)?;
                }
            }
            (Part::Router, FfnSpec::Moe(moe)) => {
                let gain = tensors.take(Role::FfnNorm)?;
                let router = tensors.router()?;
                for batch in batches {
                    let x = self.before_mlp(unit.layer, layer, &gain, batch, observers)?;
                    let routing = ffn::route(moe.router, moe.top_k, &router, &x)?;
                    for observer in &mut *observers {
                        observer.routing(unit.layer, batch.first_token, &routing)?;
                    }
                    batch.mixture = Some(Mixture { out: zeros_like(&x)?, x, routing });
                }
            }
            (Part::Experts(group), FfnSpec::Moe(moe)) => experts(moe, group, &mut tensors, batches)?,
            (part, ffn) => return Err(WorkerError::internal(format!("unit {part:?} in a layer with {ffn:?}"))),
        }
        Ok(())
    }

    fn before_mlp(
        &self,
        index: usize,
        layer: &LayerSpec,
        gain: &Tensor,
        batch: &MicroBatch,
        observers: &mut [&mut dyn Observer],
    ) -> Result<Tensor> {
        let x = fused::rms_norm(&batch.hidden, gain, layer.ffn_norm.eps)?;
        show(observers, Site { layer: index, point: Point::BeforeMlp }, batch.first_token, &x)?;
        Ok(x)
    }

    // ------------------------------------------------------------------------------------------------------ head

    /// Final norm, then the head in blocks of the vocabulary, each read once and met by all tokens.
    fn head(
        &self,
        mut batches: Vec<MicroBatch>,
        kept: KeptBlocks,
        observers: &mut [&mut dyn Observer],
    ) -> Result<Vec<f32>> {
        let device = &self.devices[0].device;
        let norm_need = &self.spec().head_needs()[0];
        let (norm_name, norm_entry) = self.model.entry(0, norm_need);
        let bytes = self.read_rows(norm_entry, &(0..self.spec().hidden))?;
        let gain = dtype::to_tensor(&bytes, &norm_entry.dtype, &norm_need.shape, self.compute, device, &norm_name)?;
        for batch in &mut batches {
            batch.hidden = fused::rms_norm(&on(&batch.hidden, device)?, &gain, self.spec().final_norm.eps)?;
            for observer in &mut *observers {
                observer.final_norm(batch.first_token, &batch.hidden)?;
            }
        }
        let mut likelihoods = Likelihoods::new(self.tokens);
        let need =
            self.spec().head_needs().pop().filter(|_| !self.spec().tied_head).unwrap_or(self.spec().embedding_need());
        let (name, entry) = self.model.entry(0, &need);
        let load = |block: &(Range<usize>, Option<Vec<u8>>)| {
            let fresh = if block.1.is_none() { Some(self.read_rows(entry, &block.0)?) } else { None };
            let bytes = block.1.as_ref().or(fresh.as_ref()).expect("one of the two");
            dtype::to_tensor(bytes, &entry.dtype, &[block.0.len(), self.spec().hidden], self.compute, device, &name)
        };
        let blocks = if self.spec().tied_head {
            kept.into_iter().map(|(range, bytes)| (range, Some(bytes))).collect()
        } else {
            vocab_blocks(self.spec().vocab, VOCAB_BLOCK).into_iter().map(|range| (range, None)).collect()
        };
        pipeline(blocks, load, |(block, _), matrix| {
            for batch in &batches {
                let logits = batch.hidden.matmul(&matrix.t()?)?;
                for observer in &mut *observers {
                    observer.logits(batch.first_token, block.start, &logits)?;
                }
                with_f32(&logits, |values| {
                    likelihoods.add(batch.first_token, &block, values);
                    Ok(())
                })?;
            }
            self.progress.bytes(self.model.source.bytes_read());
            Ok(())
        })?;
        Ok(likelihoods.nll())
    }
}

/// All experts of a group over all micro-batches; the last group closes the layer.
fn experts(moe: &MoeSpec, group: &Range<usize>, tensors: &mut UnitTensors, batches: &mut [MicroBatch]) -> Result<()> {
    for expert in group.clone() {
        let weights = tensors.expert(expert)?;
        for batch in &mut *batches {
            let mixture = batch.mixture.take().ok_or_else(|| WorkerError::internal("experts before their router"))?;
            let out = ffn::add_expert(mixture.out, &mixture.x, &mixture.routing, expert, &weights)?;
            batch.mixture = Some(Mixture { out, ..mixture });
        }
    }
    if group.end == moe.experts {
        for batch in batches {
            if let Some(mixture) = batch.mixture.take() {
                batch.hidden = (&batch.hidden + mixture.out)?;
            }
        }
    }
    Ok(())
}

fn show(observers: &mut [&mut dyn Observer], site: Site, first_token: usize, x: &Tensor) -> Result<()> {
    for observer in observers {
        if observer.wants(site) {
            observer.observe(site, first_token, x)?;
        }
    }
    Ok(())
}

fn vocab_blocks(vocab: usize, size: usize) -> Vec<Range<usize>> {
    (0..vocab).step_by(size).map(|first| first..(first + size).min(vocab)).collect()
}

/// Loads items in order on a second thread while earlier ones are consumed here. At most one is waiting and one in use.
fn pipeline<I: Send, T: Send>(
    items: Vec<I>,
    load: impl Fn(&I) -> Result<T> + Send,
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
        for loaded in receive {
            let (item, value) = loaded?;
            consume(item, value)?;
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
