//! What a run watches while its model passes: the statistics, and every activation if they are to be saved.

use candle_core::Tensor;

use crate::ablation::Sharpness;
use crate::attention::{FirstKey, TopShares};
use crate::error::{Result, WorkerError};
use crate::ffn::{ExpertRows, Routing};
use crate::output::ActivationDump;
use crate::stats::{LayerObserver, Observer, Site, Study};

/// Both, of the whole pass or of one layer.
pub struct Watch {
    /// The statistics.
    pub study: Study,
    /// The file of activations, if there is to be one. It keeps no state: a pass that writes it cannot be taken up again.
    pub dump: Option<ActivationDump>,
    /// How sharp attention is in each arm of an ablation.
    pub sharpness: Sharpness,
}

impl LayerObserver for Watch {
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
        self.study.expert(layer, expert, first_token, rows)
    }

    fn attention(&mut self, layer: usize, arms: &[TopShares]) -> Result<()> {
        let sums = self.sharpness.entry(layer).or_insert_with(|| vec![TopShares::default(); arms.len()]);
        sums.iter_mut().zip(arms).for_each(|(sum, more)| *sum = sum.and(*more));
        Ok(())
    }

    fn wants_first_key(&self) -> bool {
        self.study.wants_first_key()
    }

    fn first_key(&mut self, layer: usize, heads: &[FirstKey]) -> Result<()> {
        self.study.first_key(layer, heads)
    }

    fn routing(&mut self, layer: usize, first_token: usize, routing: &Routing) -> Result<()> {
        self.study.routing(layer, first_token, routing)?;
        self.dump.as_mut().map_or(Ok(()), |dump| dump.routing(layer, first_token, routing))
    }
}

impl Observer for Watch {
    type Layer = Self;

    fn layer(&self, layer: usize) -> Self {
        let dump = self.dump.as_ref().map(|dump| dump.layer(layer));
        Self { study: self.study.layer(layer), dump, sharpness: Sharpness::new() }
    }

    fn join(&mut self, seen: Self) {
        self.study.join(seen.study);
        self.sharpness.extend(seen.sharpness);
    }

    fn state(&self) -> Result<Vec<u8>> {
        let state = (self.study.state()?, &self.sharpness);
        postcard::to_stdvec(&state)
            .map_err(|error| WorkerError::internal(format!("a state that cannot be saved: {error}")))
    }

    fn restore(&mut self, state: &[u8]) -> Result<()> {
        let read = postcard::from_bytes(state);
        let (study, sharpness): (Vec<u8>, Sharpness) =
            read.map_err(|error| WorkerError::internal(format!("a saved state that cannot be read: {error}")))?;
        self.sharpness = sharpness;
        self.study.restore(&study)
    }

    fn final_norm(&mut self, first_token: usize, x: &Tensor) -> Result<()> {
        self.dump.as_mut().map_or(Ok(()), |dump| dump.final_norm(first_token, x))
    }

    fn logits(&mut self, first_token: usize, first_id: usize, x: &Tensor) -> Result<()> {
        self.dump.as_mut().map_or(Ok(()), |dump| dump.logits(first_token, first_id, x))
    }
}
