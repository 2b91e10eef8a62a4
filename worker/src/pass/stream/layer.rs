//! Applies the units of a layer to the hidden states.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Tensor};
use outliers_protocol::Point;

use super::{MicroBatch, Mixture, Wave};
use crate::blocks::attention::{AttentionRecorder, MaybeRecorder, TopShares, attention};
use crate::blocks::delta_net::delta_net;
use crate::blocks::ffn::{
    self, ExpertBatch, Inputs, MlpWeights, ParallelMlp, Routed, Router, SharedWeights, SortedChoices,
};
use crate::blocks::mamba::mamba;
use crate::blocks::mla::latent_attention;
use crate::blocks::norm::Norm;
use crate::blocks::weights::{MixerWeights, UnitTensors, zeros_like};
use crate::device::gpu::Positions;
use crate::error::{Result, WorkerError};
use crate::kernels::fused;
use crate::kernels::product::Linear;
use crate::model::decoder::{FfnSpec, LayerSpec, MixerSpec, MoeSpec, NormOrder, NormSpec, Part, Role, StreamingUnit};
use crate::model::rope::{RopeSpec, RopeTable};
use crate::pass::meter::{Clock, Subject, Work};
use crate::stats::{LayerObserver, Site};

/// A unit's weights, usable for any number of micro-batches.
pub(super) enum Block {
    /// Weights of [`Part::Mixer`].
    Mixer { norm: Norm, weights: MixerWeights, table: Option<Arc<RopeTable>>, after: Option<Norm> },
    /// Weights of [`Part::Dense`].
    Dense { norm: Option<Norm>, weights: MlpWeights, closing: LayerEpilogue },
    /// Weights of [`Part::Router`].
    Router {
        norm: Option<Norm>,
        router: Router,
        shared: Option<SharedWeights>,
        beside: Option<ParallelMlp>,
        latent: Option<Linear>,
    },
    /// Weights of [`Part::Experts`].
    Experts { group: Range<usize>, weights: Vec<MlpWeights>, closing: LayerEpilogue },
}

/// Operations that end a layer, after its feed-forward.
pub(super) struct LayerEpilogue {
    /// Norm of the experts' sum, before the MLP beside them is added.
    experts: Option<Norm>,
    /// Projection out of the experts' latent space, before the output beside them is added.
    latent: Option<Linear>,
    /// Norm of the feed-forward's output.
    output: Option<Norm>,
    /// Multiplies the residual stream, `[1]`.
    scalar: Option<Tensor>,
}

impl LayerEpilogue {
    fn take(tensors: &mut UnitTensors, norm: NormSpec) -> Result<Self> {
        Ok(Self {
            experts: tensors.norm_if_there(norm, Role::ExpertsPostNorm)?,
            latent: tensors.linear_if_there(Role::LatentUp),
            output: tensors.norm_if_there(norm, Role::FfnPostNorm)?,
            scalar: tensors.take_if_there(Role::LayerScalar),
        })
    }
}

/// The norm's output; `x` itself without a norm.
fn normed(norm: Option<&Norm>, x: Tensor) -> Result<Tensor> {
    match norm {
        Some(norm) => Ok(norm.apply(&x)?),
        None => Ok(x),
    }
}

/// A layer on its device, with its observer.
pub(super) struct LayerContext<'a, L> {
    pub(super) layer: usize,
    pub(super) spec: &'a LayerSpec,
    pub(super) device: &'a Device,
    /// Tokens per sequence.
    pub(super) tokens: usize,
    /// Rows of a full micro-batch.
    pub(super) batch_rows: usize,
    /// Factors of the norm outputs for each arm but the first.
    pub(super) masks: &'a [Tensor],
    pub(super) seen: &'a mut L,
    pub(super) clock: &'a Clock<'a>,
}

impl<'a, L: LayerObserver> LayerContext<'a, L> {
    /// Takes a unit's weights out of its tensors, and passes their gains to the observer.
    pub(super) fn block(&mut self, unit: &StreamingUnit, tensors: UnitTensors, tables: &RopeTables) -> Result<Block> {
        let tensors = &mut tensors.with_collectors(self.seen.collectors());
        Ok(match (&unit.part, &self.spec.ffn) {
            (Part::Mixer, _) => {
                let norm = tensors.norm(self.spec.norm, Role::MixerNorm, Role::MixerNormBias)?;
                self.gain(0, &norm)?;
                let table = self.spec.mixer.rope().map(|rope| tables.get(rope, self.device)).transpose()?;
                let after = tensors.norm_if_there(self.spec.norm, Role::MixerPostNorm)?;
                Block::Mixer { norm, weights: tensors.mixer(&self.spec.mixer)?, table, after }
            }
            (Part::Dense, FfnSpec::Dense(mlp)) => {
                let (norm, weights) = (self.ffn_norm(tensors)?, tensors.dense(*mlp)?);
                Block::Dense { norm, weights, closing: LayerEpilogue::take(tensors, self.spec.norm)? }
            }
            (Part::Router, FfnSpec::Moe(moe)) => {
                let norm = self.ffn_norm(tensors)?;
                let (router, shared) = tensors.router(moe)?;
                let latent = tensors.linear_if_there(Role::LatentDown);
                Block::Router { norm, router, shared, beside: tensors.beside(moe, self.spec.norm)?, latent }
            }
            (Part::Experts(group), FfnSpec::Moe(moe)) => {
                let weights = group.clone().map(|expert| tensors.expert(moe.expert, expert));
                let weights = weights.collect::<candle_core::Result<_>>()?;
                Block::Experts { group: group.clone(), weights, closing: LayerEpilogue::take(tensors, self.spec.norm)? }
            }
            (part, ffn) => return Err(WorkerError::internal(format!("unit {part:?} in a layer with {ffn:?}"))),
        })
    }

    /// Applies a unit to a wave.
    pub(super) fn pass(&mut self, block: &Block, wave: &mut Wave) -> Result<()> {
        match block {
            Block::Mixer { norm, weights, table, after } => self.each(Work::Mixer, wave, |at, batch| {
                batch.arrive_on(at.device)?;
                at.mix(batch, norm, after.as_ref(), weights, table.as_deref())
            }),
            Block::Dense { norm, weights, closing } => self.each(Work::FeedForward, wave, |at, batch| {
                batch.arrive_on(at.device)?;
                let x = at.before_ffn(batch, norm.as_ref())?;
                let out = weights.apply(&x)?;
                at.after_ffn(batch, norm.as_ref(), closing, out)
            }),
            Block::Router { norm, router, shared, beside, latent } => {
                let moe = self.moe()?;
                self.each(Work::FeedForward, wave, |at, batch| {
                    batch.arrive_on(at.device)?;
                    let mut x = at.before_ffn(batch, norm.as_ref())?;
                    let routed = if beside.is_some() { &batch.hidden } else { &x };
                    let choices = ffn::route(moe.router, moe.top_k, router, routed)?;
                    let positions = Positions { first_token: batch.first_token, tokens: at.tokens };
                    // Only the first arm is observed.
                    let positions = (batch.arm == 0).then_some(positions);
                    // First, so that a GPU computes the rest while the counts come to the host.
                    let sorted = SortedChoices::new(choices, moe.experts, positions)?;
                    let mut out = shared.as_ref().map_or_else(|| zeros_like(&x), |shared| shared.apply(&x))?;
                    let mut of_beside = None;
                    if let Some(beside) = beside {
                        of_beside = Some(beside.norm.apply(&beside.mlp.apply(&x)?)?);
                        x = beside.experts.apply(&batch.hidden)?;
                    }
                    if let Some(latent) = latent {
                        x = latent.apply(&x)?;
                        of_beside = Some(std::mem::replace(&mut out, zeros_like(&x)?));
                    }
                    let routed = Routed::new(x, sorted, out);
                    batch.mixture = Some(Mixture { routed, beside: of_beside });
                    Ok(())
                })
            }
            Block::Experts { group, weights, closing } => {
                let moe = self.moe()?;
                let subject = Subject { layer: Some(self.layer), micro_batches: Some(wave.micro_batches()) };
                let clock = self.clock;
                let batches = &mut wave.batches;
                clock.time_about(Work::FeedForward, subject, || self.experts(moe, group, weights, closing, batches))
            }
        }
    }

    /// Applies a function to each micro-batch of a wave.
    fn each(
        &mut self,
        work: Work,
        wave: &mut Wave,
        mut what: impl FnMut(&mut Self, &mut MicroBatch) -> Result<()>,
    ) -> Result<()> {
        let (layer, clock) = (self.layer, self.clock);
        for (number, batch) in wave.micro_batches().zip(&mut wave.batches) {
            let subject = Subject { layer: Some(layer), micro_batches: Some(number..number + 1) };
            clock.time_about(work, subject, || what(self, batch))?;
        }
        Ok(())
    }

    /// Whether the observer wants values of a site.
    fn shows(&self, point: Point, batch: &MicroBatch) -> bool {
        batch.arm == 0 && self.seen.wants(Site { layer: self.layer, point })
    }

    /// Passes values of a site to the observer if it wants them.
    fn show(&mut self, point: Point, batch: &MicroBatch, x: &Tensor) -> Result<()> {
        if !self.shows(point, batch) {
            return Ok(());
        }
        let site = Site { layer: self.layer, point };
        self.clock.time(Work::Statistics, || self.seen.observe(site, batch.first_token, x))
    }

    /// Adds a block's output to the residual stream, after its outer norm. The norm is fused with
    /// the sum unless the observer wants its output.
    fn added(&mut self, point: Point, batch: &MicroBatch, after: Option<&Norm>, out: Tensor) -> Result<Tensor> {
        if let (Some(norm), false) = (after, self.shows(point, batch)) {
            return Ok(norm.apply_onto(&batch.hidden, &out)?);
        }
        let out = normed(after, out)?;
        self.show(point, batch, &out)?;
        Ok(fused::sum(out, &batch.hidden)?)
    }

    /// A norm output with the ablation of its arm.
    fn in_arm(&self, arm: usize, x: Tensor) -> Result<Tensor> {
        match arm.checked_sub(1) {
            None => Ok(x),
            Some(mask) => Ok(x.broadcast_mul(&self.masks[mask])?),
        }
    }

    /// A norm of the layer: 0 the mixer's, 1 the feed-forward's.
    fn point(&self, norm: usize) -> Point {
        self.spec.order.points()[norm]
    }

    fn gain(&mut self, norm: usize, of: &Norm) -> Result<()> {
        self.seen.gain(Site { layer: self.layer, point: self.point(norm) }, of.gain())
    }

    // --------------------------------------------------------------------------------------- mixer

    /// Adds the mixer's output for a micro-batch to its residual stream.
    fn mix(
        &mut self,
        batch: &mut MicroBatch,
        norm: &Norm,
        after: Option<&Norm>,
        weights: &MixerWeights,
        table: Option<&RopeTable>,
    ) -> Result<()> {
        if self.spec.order == NormOrder::After {
            let out = self.mixed(batch, weights, table, &batch.hidden)?;
            self.show(Point::AttentionOut, batch, &out)?;
            let x = norm.apply(&fused::sum(out, &batch.hidden)?)?;
            self.show(self.point(0), batch, &x)?;
            batch.hidden = self.in_arm(batch.arm, x)?;
            return Ok(());
        }
        let x = norm.apply(&batch.hidden)?;
        self.show(self.point(0), batch, &x)?;
        let x = self.in_arm(batch.arm, x)?;
        let out = self.mixed(batch, weights, table, &x)?;
        batch.hidden = self.added(Point::AttentionOut, batch, after, out)?;
        batch.shared_norm = (self.spec.order == NormOrder::Shared).then_some(x);
        if self.spec.has_ffn() { Ok(()) } else { self.show(Point::Residual, batch, &batch.hidden) }
    }

    /// The mixer's output for an arm's input. For the whole model it also measures attention to
    /// the first key, and the sharpness of attention, here and with the ablation of each arm.
    fn mixed(
        &mut self,
        batch: &MicroBatch,
        weights: &MixerWeights,
        table: Option<&RopeTable>,
        x: &Tensor,
    ) -> Result<Tensor> {
        let attends = !matches!(self.spec.mixer, MixerSpec::DeltaNet(_) | MixerSpec::Mamba(_));
        let (top, first_key) = (!self.masks.is_empty(), self.seen.wants_first_key());
        if batch.arm > 0 || !attends || !(top || first_key) {
            return self.mixer(weights, table, x, None);
        }
        let whole = AttentionRecorder::new(top, first_key);
        let out = self.mixer(weights, table, x, Some(&whole))?;
        if first_key {
            self.seen.first_key(self.layer, batch.first_token, &whole.first_key())?;
        }
        if !top {
            return Ok(out);
        }
        let mut shares = vec![whole.top()];
        for arm in 1..=self.masks.len() {
            shares.push(self.shares_without(arm, weights, table, x)?);
        }
        self.seen.attention(self.layer, &shares)?;
        Ok(out)
    }

    fn shares_without(
        &self,
        arm: usize,
        weights: &MixerWeights,
        table: Option<&RopeTable>,
        x: &Tensor,
    ) -> Result<TopShares> {
        // The embedding is not a norm output.
        let is_norm_output = self.spec.order != NormOrder::After || self.layer > 0;
        let x = if is_norm_output { self.in_arm(arm, x.clone())? } else { x.clone() };
        let shares = AttentionRecorder::new(true, false);
        self.mixer(weights, table, &x, Some(&shares))?;
        Ok(shares.top())
    }

    fn mixer(
        &self,
        weights: &MixerWeights,
        table: Option<&RopeTable>,
        x: &Tensor,
        recorder: MaybeRecorder<'_>,
    ) -> Result<Tensor> {
        let n = self.tokens;
        Ok(match (&self.spec.mixer, weights, table) {
            (MixerSpec::Attention(spec), MixerWeights::Attention(weights), table) => {
                attention(spec, weights, table, x, n, recorder)?
            }
            (MixerSpec::Latent(spec), MixerWeights::Latent(weights), table) => {
                latent_attention(spec, weights, table, x, n, recorder)?
            }
            (MixerSpec::DeltaNet(spec), MixerWeights::DeltaNet(weights), _) => delta_net(spec, weights, x, n)?,
            (MixerSpec::Mamba(spec), MixerWeights::Mamba(weights), _) => mamba(spec, weights, x, n)?,
            (spec, ..) => return Err(WorkerError::internal(format!("other weights than those of {spec:?}"))),
        })
    }

    // -------------------------------------------------------------------------------- feed-forward

    /// The feed-forward's norm, unless it shares the mixer's.
    fn ffn_norm(&mut self, tensors: &mut UnitTensors) -> Result<Option<Norm>> {
        if self.spec.order == NormOrder::Shared {
            return Ok(None);
        }
        let norm = tensors.norm(self.spec.norm, Role::FfnNorm, Role::FfnNormBias)?;
        self.gain(1, &norm)?;
        Ok(Some(norm))
    }

    /// The feed-forward's input.
    fn before_ffn(&mut self, batch: &mut MicroBatch, norm: Option<&Norm>) -> Result<Tensor> {
        match (self.spec.order, norm) {
            (NormOrder::Before | NormOrder::Sandwich, Some(norm)) => {
                let x = norm.apply(&batch.hidden)?;
                self.show(self.point(1), batch, &x)?;
                self.in_arm(batch.arm, x)
            }
            (NormOrder::Shared, _) => {
                let shared = batch.shared_norm.take();
                shared.ok_or_else(|| WorkerError::internal("a feed-forward before the mixer whose norm it shares"))
            }
            _ => Ok(batch.hidden.clone()),
        }
    }

    /// Adds the feed-forward's output and ends the layer.
    fn after_ffn(
        &mut self,
        batch: &mut MicroBatch,
        norm: Option<&Norm>,
        closing: &LayerEpilogue,
        out: Tensor,
    ) -> Result<()> {
        batch.hidden = self.added(Point::MlpOut, batch, closing.output.as_ref(), out)?;
        if let (NormOrder::After, Some(norm)) = (self.spec.order, norm) {
            let x = norm.apply(&batch.hidden)?;
            self.show(self.point(1), batch, &x)?;
            batch.hidden = self.in_arm(batch.arm, x)?;
        }
        if let Some(scalar) = &closing.scalar {
            batch.hidden = batch.hidden.broadcast_mul(scalar)?;
        }
        self.show(Point::Residual, batch, &batch.hidden)
    }

    // ------------------------------------------------------------------------------------- mixture

    fn moe(&self) -> Result<&'a MoeSpec> {
        match &self.spec.ffn {
            FfnSpec::Moe(moe) => Ok(moe),
            dense => Err(WorkerError::internal(format!("a router in a layer with {dense:?}"))),
        }
    }

    /// Waits for a micro-batch's choices, and passes them to the observer.
    fn routed(&mut self, batch: &mut MicroBatch) -> Result<()> {
        let choices = batch.mixture.as_mut().ok_or_else(early)?.routed.wait()?;
        if batch.arm > 0 {
            return Ok(());
        }
        let (layer, clock) = (self.layer, self.clock);
        clock.time(Work::Statistics, || self.seen.routing(layer, batch.first_token, choices))
    }

    /// All experts of a group over the micro-batches of a wave; the last group closes the layer.
    /// An expert's rows are gathered across micro-batches, as many at a time as a whole one has,
    /// so that its products are large however few of a micro-batch go to it. However many go to
    /// it, memory is what was planned ([`ffn::gathered_rows`]).
    fn experts(
        &mut self,
        moe: &MoeSpec,
        group: &Range<usize>,
        weights: &[MlpWeights],
        closing: &LayerEpilogue,
        batches: &mut [MicroBatch],
    ) -> Result<()> {
        if group.start == 0 {
            batches.iter_mut().try_for_each(|batch| self.routed(batch))?;
        }
        let mut tokens = 0;
        for batch in &*batches {
            tokens += batch.hidden.dim(0)?;
        }
        let (of_group, most) = {
            let wave = batches.iter().map(routed_of).collect::<Result<Vec<_>>>()?;
            let of_group: Vec<usize> =
                group.clone().map(|expert| wave.iter().map(|of| of.sent(expert)).sum()).collect();
            (of_group, ffn::rows_together(&wave, [moe.experts, moe.top_k], weights, self.batch_rows)?)
        };
        for part in ffn::runs(&of_group, ffn::gathered_rows(moe, tokens, group.len())) {
            let part = group.start + part.start..group.start + part.end;
            let (inputs, pieces) = {
                let wave = batches.iter().map(routed_of).collect::<Result<Vec<_>>>()?;
                (Inputs::new(&wave, &part)?, ffn::pieces(&wave, &part, self.batch_rows))
            };
            for pieces in ffn::together(&pieces, most) {
                let weights: Vec<&MlpWeights> =
                    pieces.iter().map(|piece| &weights[piece.expert - group.start]).collect();
                self.experts_on(&weights, &inputs, pieces, batches)?;
            }
        }
        if group.end == moe.experts {
            for batch in batches {
                let Mixture { routed, beside } = batch.mixture.take().ok_or_else(early)?;
                let mut out = normed(closing.experts.as_ref(), routed.finish())?;
                if let Some(latent) = &closing.latent {
                    out = latent.apply(&out)?;
                }
                if let Some(beside) = beside {
                    out = fused::sum(out, &beside)?;
                }
                self.after_ffn(batch, None, closing, out)?;
            }
        }
        Ok(())
    }

    /// The experts of neighbouring pieces, each over its own.
    fn experts_on(
        &mut self,
        weights: &[&MlpWeights],
        inputs: &Inputs,
        pieces: &[ExpertBatch],
        batches: &mut [MicroBatch],
    ) -> Result<()> {
        let wave = batches.iter().map(routed_of).collect::<Result<Vec<_>>>()?;
        let x = inputs.gather(&wave, pieces)?;
        let rows: Vec<usize> = pieces.iter().map(ExpertBatch::rows).collect();
        let made = ffn::apply_each(weights, &x, &rows)?;
        let mut first = 0;
        for ExpertBatch { expert, sent } in pieces {
            for (at, rows) in sent {
                let made = made.narrow(0, first, *rows)?;
                first += rows;
                let batch = &mut batches[*at];
                self.expert(*expert, batch, &made)?;
                batch.mixture.as_mut().ok_or_else(early)?.routed.add(*expert, &made)?;
            }
        }
        Ok(())
    }

    fn expert(&mut self, expert: usize, batch: &MicroBatch, made: &Tensor) -> Result<()> {
        let (layer, clock) = (self.layer, self.clock);
        if batch.arm > 0 || !self.seen.wants(Site { layer, point: Point::ExpertOut }) {
            return Ok(());
        }
        let routed = routed_of(batch)?;
        clock.time(Work::Statistics, || {
            let rows = routed.rows(expert, made)?;
            self.seen.expert(layer, expert, batch.first_token, &rows)
        })
    }
}

fn routed_of(batch: &MicroBatch) -> Result<&Routed> {
    batch.mixture.as_ref().map(|mixture| &mixture.routed).ok_or_else(early)
}

fn early() -> WorkerError {
    WorkerError::internal("experts before their router")
}

/// Rotation tables, one per kind of rotation and device.
pub(super) struct RopeTables {
    positions: usize,
    made: Mutex<Vec<(RopeSpec, Arc<RopeTable>)>>,
}

impl RopeTables {
    /// Tables for sequences of `positions` tokens.
    pub(super) fn new(positions: usize) -> Self {
        Self { positions, made: Mutex::default() }
    }

    fn get(&self, spec: &RopeSpec, device: &Device) -> Result<Arc<RopeTable>> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let is_there = |table: &RopeTable| table.angles.device().same_device(device);
        if let Some((_, table)) = made.iter().find(|(of, table)| of == spec && is_there(table)) {
            return Ok(Arc::clone(table));
        }
        let table = Arc::new(spec.table(self.positions, device)?);
        made.push((spec.clone(), Arc::clone(&table)));
        Ok(table)
    }
}
