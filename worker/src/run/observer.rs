//! Observers of a pass: statistics, exports, and the file of saved activations.

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::blocks::attention::{FirstKey, TopShares};
use crate::blocks::ffn::{Choices, ExpertRows};
use crate::error::{Result, WorkerError};
use crate::kernels::input_collectors::InputCollectors;
use crate::pass::ablation::Sharpness;
use crate::run::export::{Exports, Layer};
use crate::run::output::ActivationDump;
use crate::stats::{LayerObserver, Observer, Site, Study};

/// The observers of the whole pass or of one layer.
pub struct RunObserver {
    /// The statistics.
    pub study: Study,
    /// The file of activations, if the job saves them. A pass that writes it cannot be resumed.
    pub dump: Option<ActivationDump>,
    /// Sharpness of attention in each arm of an ablation.
    pub sharpness: Sharpness,
    /// Sums for exports, if the job has any.
    pub exports: Option<Exports>,
}

impl LayerObserver for RunObserver {
    fn wants(&self, site: Site) -> bool {
        self.study.wants(site) || self.dump.as_ref().is_some_and(|dump| dump.wants(site))
    }

    fn observe(&mut self, site: Site, first_token: usize, x: &Tensor) -> Result<()> {
        if self.study.wants(site) {
            self.study.observe(site, first_token, x)?;
        }
        match &mut self.dump {
            Some(dump) if dump.wants(site) => dump.observe(site, first_token, x),
            _ => Ok(()),
        }
    }

    fn gain(&mut self, site: Site, gain: &Tensor) -> Result<()> {
        self.study.gain(site, gain)
    }

    fn expert(&mut self, layer: usize, expert: usize, first_token: usize, rows: &ExpertRows) -> Result<()> {
        self.exports.as_mut().map_or(Ok(()), |exports| exports.expert(expert, rows))?;
        self.study.expert(layer, expert, first_token, rows)
    }

    fn collectors(&self) -> Option<InputCollectors> {
        self.exports.as_ref()?.collectors()
    }

    fn attention(&mut self, layer: usize, arms: &[TopShares]) -> Result<()> {
        let sums = self.sharpness.entry(layer).or_insert_with(|| vec![TopShares::default(); arms.len()]);
        sums.iter_mut().zip(arms).for_each(|(sum, more)| *sum = sum.and(*more));
        Ok(())
    }

    fn wants_first_key(&self) -> bool {
        self.study.wants_first_key()
    }

    fn first_key(&mut self, layer: usize, first_token: usize, sequences: &[Vec<FirstKey>]) -> Result<()> {
        self.study.first_key(layer, first_token, sequences)
    }

    fn routing(&mut self, layer: usize, first_token: usize, choices: &Choices) -> Result<()> {
        self.study.routing(layer, first_token, choices)?;
        self.exports.iter_mut().for_each(|exports| exports.routing(choices));
        self.dump.as_mut().map_or(Ok(()), |dump| dump.routing(layer, first_token, choices))
    }

    fn synchronize(&mut self) -> Result<()> {
        self.study.synchronize()
    }
}

impl Observer for RunObserver {
    type Layer = Self;

    fn layer(&self, layer: usize) -> Self {
        let dump = self.dump.as_ref().map(|dump| dump.layer(layer));
        let exports = self.exports.as_ref().map(|exports| exports.layer(layer));
        Self { study: self.study.layer(layer), dump, sharpness: Sharpness::new(), exports }
    }

    fn join(&mut self, seen: Self) {
        self.study.join(seen.study);
        self.sharpness.extend(seen.sharpness);
        if let (Some(exports), Some(seen)) = (&mut self.exports, seen.exports) {
            exports.join(seen);
        }
    }

    fn state(&self) -> Result<Vec<u8>> {
        let state = (self.study.state()?, &self.sharpness, self.exports.as_ref().map(Exports::layers));
        postcard::to_stdvec(&state)
            .map_err(|error| WorkerError::internal(format!("a state that cannot be saved: {error}")))
    }

    fn restore(&mut self, state: &[u8]) -> Result<()> {
        let read = postcard::from_bytes(state);
        let (study, sharpness, layers): (Vec<u8>, Sharpness, Option<BTreeMap<usize, Layer>>) =
            read.map_err(|error| WorkerError::internal(format!("a saved state that cannot be read: {error}")))?;
        self.sharpness = sharpness;
        if let (Some(exports), Some(layers)) = (&mut self.exports, layers) {
            exports.restore(layers);
        }
        self.study.restore(&study)
    }

    fn final_norm(&mut self, first_token: usize, x: &Tensor) -> Result<()> {
        self.dump.as_mut().map_or(Ok(()), |dump| dump.final_norm(first_token, x))
    }

    fn logits(&mut self, first_token: usize, first_id: usize, x: &Tensor) -> Result<()> {
        self.dump.as_mut().map_or(Ok(()), |dump| dump.logits(first_token, first_id, x))
    }
}
