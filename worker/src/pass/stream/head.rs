//! Computes the likelihood of every following token from the hidden states.

use std::ops::Range;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::{KeptBlocks, MicroBatch, Pass, Predicted, VOCAB_BLOCK, pipeline, vocab_blocks};
use crate::corpus::Tokens;
use crate::device::gpu::PendingCopy;
use crate::error::Result;
use crate::kernels::fused;
use crate::kernels::product::product;
use crate::model::decoder::Role;
use crate::pass::loader::TensorPool;
use crate::pass::meter::{Thread, Work};
use crate::stats::{Observer, with_f32};

impl Pass<'_> {
    /// Applies the final norm, and the projection to the head's width if the model has one.
    fn before_head(&self, batches: &mut [MicroBatch], device: &Device, observer: &mut impl Observer) -> Result<()> {
        let mut output = self.loader(0, &TensorPool::default())?.unit(0, &self.spec().output_needs())?.wait()?.tensors;
        let spec = self.spec().final_norm;
        let norm = spec.map(|spec| output.norm(spec, Role::FinalNorm, Role::FinalNormBias)).transpose()?;
        let lead_out = output.linear_if_there(Role::ProjectOut);
        for batch in batches {
            batch.arrive_on(device)?;
            if let Some(norm) = &norm {
                batch.hidden = norm.apply(&batch.hidden)?;
                if batch.arm == 0 {
                    observer.final_norm(batch.first_token, &batch.hidden)?;
                }
            }
            if let Some(lead_out) = &lead_out {
                batch.hidden = lead_out.apply(&batch.hidden)?;
            }
        }
        Ok(())
    }

    /// Applies the final norm, then the head in blocks of the vocabulary. Each block is read once
    /// and used for all tokens.
    pub(super) fn head(
        &self,
        mut batches: Vec<MicroBatch>,
        kept: KeptBlocks,
        observer: &mut impl Observer,
    ) -> Result<Vec<Predicted>> {
        let device = &self.devices[0].device;
        let clock = self.meter.clock(Thread::Device(0));
        clock.time(Work::Head, || self.before_head(&mut batches, device, observer))?;
        let mut likelihoods = vec![Likelihoods::new(self.tokens); self.arms.count()];
        let need = self.spec().head_need();
        let stored = self.model.stored(0, &need);
        let pool = TensorPool::new(2 * (VOCAB_BLOCK * need.shape[1] * self.compute.size_in_bytes()) as u64);
        let mut loader = self.loader(0, &pool)?;
        let bias = self.spec().head_bias_need().map(|need| loader.tensor(0, &need)?.wait()).transpose()?;
        let load = |block: &(Range<usize>, Option<Vec<u8>>)| match &block.1 {
            Some(bytes) => loader.decode_rows(&stored, &block.0, bytes),
            None => loader.rows(&stored, &block.0),
        };
        let blocks: Vec<(Range<usize>, Option<Vec<u8>>)> = match kept {
            Some(kept) => kept.into_iter().map(|(range, bytes)| (range, Some(bytes))).collect(),
            None => vocab_blocks(self.spec().vocab, VOCAB_BLOCK).into_iter().map(|range| (range, None)).collect(),
        };
        let following = following(self.tokens);
        let rows = batches.iter().map(|batch| batch.hidden.dim(0)).collect::<candle_core::Result<Vec<usize>>>()?;
        let ids_of = |(batch, rows): (&MicroBatch, &usize)| {
            Tensor::from_slice(&following[batch.first_token..][..*rows], *rows, device)
        };
        let targets = batches.iter().zip(&rows).map(ids_of).collect::<candle_core::Result<Vec<Tensor>>>()?;
        let mut add = |block: &Range<usize>, values: &[f32]| {
            let mut parts = values.as_chunks::<3>().0;
            for (batch, rows) in batches.iter().zip(&rows) {
                let (of_batch, rest) = parts.split_at(*rows);
                let ids = &following[batch.first_token..][..*rows];
                likelihoods[batch.arm].add(batch.first_token, ids, block, of_batch);
                parts = rest;
            }
        };
        // The block before, on its way from a GPU.
        let mut before: Option<(Range<usize>, PendingCopy)> = None;
        let (mut done, all) = (0, blocks.len());
        pipeline(&clock, Work::Head, blocks, load, |(block, _), matrix| {
            let matrix = matrix.wait()?;
            let bias = bias.as_ref().map(|bias| bias.narrow(0, block.start, block.len())).transpose()?;
            let mut parts = Vec::with_capacity(batches.len());
            for (batch, targets) in batches.iter().zip(&targets) {
                let mut logits = product(&batch.hidden, &matrix)?;
                if let Some(bias) = &bias {
                    logits = fused::sum(logits, bias)?;
                }
                if let Some(cap) = self.spec().head.softcap {
                    // Separate statements: at most two copies are alive.
                    logits = (logits / cap)?;
                    logits = logits.tanh()?;
                    logits = (logits * cap)?;
                }
                if batch.arm == 0 {
                    observer.logits(batch.first_token, block.start, &logits)?;
                }
                parts.push(fused::logit_parts(&logits, targets, block.start as u32)?);
            }
            // All micro-batches are copied together. While a GPU computes this block, the host adds
            // the one before.
            let parts = Tensor::cat(&parts, 0)?;
            match PendingCopy::start(&parts)? {
                Some(copy) => {
                    if let Some((block, copy)) = before.replace((block, copy)) {
                        add(&block, &copy.wait()?);
                    }
                }
                None => with_f32(&parts, |values| {
                    add(&block, values);
                    Ok(())
                })?,
            }
            done += 1;
            self.progress.part_done(done, all, "parts of the vocabulary", self.model.source.bytes_read());
            pool.give_back([matrix]);
            Ok(())
        })?;
        if let Some((block, copy)) = before {
            add(&block, &copy.wait()?);
        }
        Ok(likelihoods.iter().map(Likelihoods::predicted).collect())
    }
}

/// Follows the last token of a sequence. It is in no vocabulary.
const NO_TOKEN: u32 = u32::MAX;

/// Id of the token that follows each token in its sequence.
fn following(tokens: &Tokens) -> Vec<u32> {
    let (n, ids) = (tokens.tokens, &tokens.ids);
    let id = |token: usize| if token % n + 1 < n { ids[token + 1] as u32 } else { NO_TOKEN };
    (0..ids.len()).map(id).collect()
}

/// Negative log-likelihoods, summed over blocks of the vocabulary.
#[derive(Clone)]
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

    /// Adds the [parts](fused::logit_parts) of a block's logits for the tokens from `first_token`
    /// on, which are followed by tokens of these ids.
    fn add(&mut self, first_token: usize, following: &[u32], block: &Range<usize>, parts: &[[f32; 3]]) {
        let rows = self.rows[first_token..].par_iter_mut().zip(following).zip(parts);
        rows.for_each(|((row, id), [top, sum, at_target])| {
            let joint = row.top.max(*top);
            let rescaled = |t: f32, s: f64| if s == 0.0 { 0.0 } else { s * f64::from(t - joint).exp() };
            (row.sum, row.top) = (rescaled(row.top, row.sum) + rescaled(*top, f64::from(*sum)), joint);
            if block.contains(&(*id as usize)) {
                row.target = *at_target;
            }
        });
    }

    fn predicted(&self) -> Predicted {
        let rows = || self.rows.chunks(self.tokens.tokens).flat_map(|rows| &rows[..rows.len() - 1]);
        let nll: Vec<f32> =
            rows().map(|row| (row.sum.ln() + f64::from(row.top) - f64::from(row.target)) as f32).collect();
        // The largest probability is exp(top - top) divided by the sum.
        let top_probability = rows().map(|row| 1.0 / row.sum).sum::<f64>() / nll.len().max(1) as f64;
        Predicted { nll, top_probability }
    }
}
