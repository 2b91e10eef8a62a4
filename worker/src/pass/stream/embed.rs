//! Embeds token ids as hidden states.

use std::ops::Range;

use candle_core::Tensor;
use rayon::prelude::*;

use super::{KeptBlocks, MicroBatch, Pass, VOCAB_BLOCK, pipeline, vocab_blocks};
use crate::checkpoint::dtype;
use crate::checkpoint::safetensors::StoredDtype;
use crate::error::{Result, WorkerError};
use crate::model::decoder::Role;
use crate::pass::loader::{self, TensorPool, rows_of};
use crate::pass::meter::{Thread, Work};

impl Pass<'_> {
    /// Token ids to hidden states. The table is read once in blocks of rows; those that the text
    /// uses go to the device, each once, where tokens' rows are gathered.
    pub(super) fn embed(&self) -> Result<(Vec<MicroBatch>, KeptBlocks)> {
        let width = self.spec().embedding.width;
        let stored = self.model.stored(0, &self.spec().embedding_need());
        let entry = stored.values.entry;
        let mut order: Vec<usize> = (0..self.tokens.ids.len()).collect();
        order.par_sort_unstable_by_key(|&t| self.tokens.ids[t]);
        let is_same = |a: &usize, b: &usize| self.tokens.ids[*a] == self.tokens.ids[*b];
        // The rows in use as they are stored, one after another, and which of them is each token's.
        let table_rows = order.chunk_by(is_same).count();
        let row_bytes = (entry.len / entry.shape[0]) as usize;
        let mut used: Vec<u8> = Vec::with_capacity(table_rows * row_bytes);
        let mut places = vec![0_u32; order.len()];
        let mut kept = (self.spec().head.tied && self.with_head).then(Vec::new);
        let (clock, reading) = (self.meter.clock(Thread::Device(0)), self.meter.clock(Thread::Loader(0)));
        let load = move |block: &Range<usize>| {
            let mut bytes = Vec::new();
            reading.time(Work::Reading, || loader::read(self.model.source, &rows_of(&stored, block), &mut bytes))?;
            Ok(bytes)
        };
        let blocks = vocab_blocks(self.spec().vocab, VOCAB_BLOCK);
        pipeline(&clock, Work::Embedding, blocks, load, |block, bytes| {
            let from = order.partition_point(|&t| self.tokens.ids[t] < block.start as i64);
            let to = order.partition_point(|&t| self.tokens.ids[t] < block.end as i64);
            let first = (used.len() / row_bytes) as u32;
            for (place, run) in (first..).zip(order[from..to].chunk_by(is_same)) {
                let at = (self.tokens.ids[run[0]] as usize - block.start) * row_bytes;
                used.extend_from_slice(&bytes[at..at + row_bytes]);
                run.iter().for_each(|&token| places[token] = place);
            }
            if let Some(kept) = &mut kept {
                kept.push((block, bytes));
            }
            Ok(())
        })?;
        let device = &self.devices[0].device;
        let pool = TensorPool::default();
        let mut loader = self.loader(0, &pool)?;
        let mut input = loader.unit(0, &self.spec().input_needs())?.wait()?.tensors;
        let lead_in = input.linear_if_there(Role::ProjectIn);
        let positions = input.linear_if_there(Role::Positions).map(|p| self.position_rows(&p.weight)).transpose()?;
        let name = format!("{} (the rows that the text uses)", entry.name);
        let shape = [table_rows, width];
        let table = match self.spec().embedding.scale.map(|scale| scale.in_dtype(self.compute)) {
            None => loader.decode_floats(&entry.dtype, &used, &shape, &name)?,
            // Scaled in f32, so that a value is rounded once.
            Some(scale) => {
                let mut scaled = dtype::to_f32(&used, &entry.dtype, &name)?;
                scaled.par_iter_mut().for_each(|value| *value *= scale);
                loader.decode_floats(&StoredDtype::F32, bytemuck::cast_slice(&scaled), &shape, &name)?
            }
        };
        let table = table.wait()?;
        drop(used);
        let rows = self.batch_rows();
        let embed = || {
            let batch = |(i, places): (usize, &[u32])| {
                let tokens = places.len();
                let mut hidden = table.index_select(&Tensor::from_slice(places, tokens, device)?, 0)?;
                if let Some(lead_in) = &lead_in {
                    hidden = lead_in.apply(&hidden)?;
                }
                if let Some(positions) = &positions {
                    hidden = (hidden + positions.repeat((tokens / self.tokens.tokens, 1))?)?;
                }
                Ok(MicroBatch::new(0, i * rows, hidden))
            };
            places.chunks(rows).enumerate().map(batch).collect::<Result<_>>()
        };
        Ok((clock.time(Work::Embedding, embed)?, kept))
    }

    /// Learned position embeddings of a sequence, `[tokens, hidden]`.
    fn position_rows(&self, table: &Tensor) -> Result<Tensor> {
        let learned = self.spec().embedding.positions.expect("read because the spec has them");
        let (n, most) = (self.tokens.tokens, learned.rows.saturating_sub(learned.offset));
        if n > most {
            return Err(WorkerError::job(format!(
                "sequences of {n} tokens, but the model has learned {most} positions"
            )));
        }
        Ok(table.narrow(0, learned.offset, n)?.to_dtype(self.compute)?)
    }
}
