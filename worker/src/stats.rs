//! Counts outlier features in passing activations, and derives the results.
//!
//! Definitions are those of LLM.int8() (Dettmers et al. 2022, section 4.1), read as in
//! [`outliers_protocol::Results`]. Counting needs only the magnitude threshold. The shares of
//! layers and positions are applied last, to the stored counts.
//!
//! [`study`] also measures, in the same pass, every row's moments and median ([`rows`]), the
//! largest values ([`top`]), massive activations ([`massive`]), routers and experts ([`mixture`]).
//! Their definitions are documented at the fields of [`outliers_protocol`]. No result depends on
//! the number of threads or on the micro-batches. Activations are scanned on their device
//! ([`Values`]): by `outliers_scan` on the CPU, by kernels with the same results on a GPU.
//!
//! This module is independent of architectures.

use candle_core::Tensor;
pub use outliers_scan::Column;
use outliers_scan::{Columns, ExceedingPositions};

use serde::{Deserialize, Serialize};

use crate::blocks::attention::{FirstKey, TopShares};
use crate::blocks::ffn::{Choices, ExpertRows};
use crate::error::{Result, WorkerError};
use crate::kernels::input_collector::on_host;
use crate::kernels::input_collectors::InputCollectors;

pub use crate::model::decoder::Site;

pub mod attention_sinks;
pub mod exact;
mod fixed_point;
pub mod massive;
pub mod mixture;
mod per_sequence;
pub mod quantization;
pub mod residual_sinks;
pub mod rows;
pub mod spike_life;
pub mod study;
mod summary;
pub mod top;
mod values;

pub use study::{Report, Scope, Study};
pub use summary::Summary;
pub use values::Values;

/// Observes one layer, on the thread that computes it. [`Self::wants`] is called first, so that
/// unneeded values are not copied from the device.
pub trait LayerObserver: Send {
    /// Whether values of this site are wanted.
    fn wants(&self, site: Site) -> bool;

    /// Receives the values of a site: `x` `[rows, hidden]`, row `r` is token `first_token + r`
    /// (sequence-major). Calls contain whole sequences, in order.
    fn observe(&mut self, site: Site, first_token: usize, x: &Tensor) -> Result<()>;

    /// Receives the gain of the norm with output `site`, `[hidden]`.
    fn gain(&mut self, _site: Site, _gain: &Tensor) -> Result<()> {
        Ok(())
    }

    /// Receives a routed expert's down projection of its rows, if
    /// [`Point::ExpertOut`](outliers_protocol::Point::ExpertOut) of the layer is wanted. Row `r`
    /// belongs to token `first_token + rows.rows[r]`.
    fn expert(&mut self, _layer: usize, _expert: usize, _first_token: usize, _rows: &ExpertRows) -> Result<()> {
        Ok(())
    }

    /// Receives the sharpness of a layer's softmax in each arm over some tokens; called only in an
    /// ablation.
    fn attention(&mut self, _layer: usize, _arms: &[TopShares]) -> Result<()> {
        Ok(())
    }

    /// Whether attention to the first key is wanted.
    fn wants_first_key(&self) -> bool {
        false
    }

    /// Receives each head's attention to the first key, by sequence and head; the first sequence
    /// begins at `first_token`. Called only if it is wanted.
    fn first_key(&mut self, _layer: usize, _first_token: usize, _sequences: &[Vec<FirstKey>]) -> Result<()> {
        Ok(())
    }

    /// Observers of the inputs of the layer's matrices, if their sums are wanted.
    fn collectors(&self) -> Option<InputCollectors> {
        None
    }

    /// Receives a mixture's choices at a layer.
    fn routing(&mut self, _layer: usize, _first_token: usize, _choices: &Choices) -> Result<()> {
        Ok(())
    }

    /// Waits for all pending results of a GPU. Called when all tokens have passed the layer,
    /// before [`Observer::join`], on the thread that joins layers.
    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Observes a pass. Several layers are computed at the same time, each with its own observer. They
/// are joined in the order of the layers, so that no result depends on the speed of threads.
pub trait Observer: Send {
    /// Observer of a single layer.
    type Layer: LayerObserver;

    /// Creates the observer of a layer.
    fn layer(&self, layer: usize) -> Self::Layer;

    /// Adds the observations of a layer that all tokens have passed. Layers come in order.
    fn join(&mut self, seen: Self::Layer);

    /// The state of everything joined so far, for [`Self::restore`]. Empty for an observer without
    /// state.
    fn state(&self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    /// Continues from a [`Self::state`] in a process that resumes the pass.
    fn restore(&mut self, _state: &[u8]) -> Result<()> {
        Ok(())
    }

    /// Receives the output of the final norm, `[rows, hidden]`.
    fn final_norm(&mut self, _first_token: usize, _x: &Tensor) -> Result<()> {
        Ok(())
    }

    /// Receives logits of a block of the vocabulary, `[rows, block]`; the first column is token id
    /// `first_id`.
    fn logits(&mut self, _first_token: usize, _first_id: usize, _x: &Tensor) -> Result<()> {
        Ok(())
    }
}

/// Features per stripe: the bits of one word.
const STRIPE: usize = 64;

/// Counts of 64 features at one site.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Stripe {
    /// Shape `[STRIPE]`.
    columns: Vec<Column>,
    /// Per sequence: the features with an occurrence.
    hits: Vec<u64>,
}

/// Counts of a run over a fixed set of sites and sequences.
///
/// Memory: sites x hidden x 56 bytes, plus sites x sequences x hidden bits, plus one bit per token
/// for each feature that ever exceeds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OutlierStats {
    threshold: f32,
    sites: Vec<Site>,
    hidden: usize,
    sequences: usize,
    tokens: usize,
    /// Shape `[sites][stripes]`.
    stripes: Vec<Vec<Stripe>>,
    /// Per feature, over all sites: one bit per (sequence, position), allocated at the first
    /// occurrence.
    positions: Vec<Option<Box<[u64]>>>,
}

impl OutlierStats {
    /// Empty counts. `tokens` is per sequence; `threshold` T > 0.
    pub fn new(sites: Vec<Site>, hidden: usize, sequences: usize, tokens: usize, threshold: f32) -> Self {
        let n = hidden.div_ceil(STRIPE);
        let stripe = Stripe { columns: vec![Column::EMPTY; STRIPE], hits: vec![0; sequences] };
        Self {
            threshold,
            hidden,
            sequences,
            tokens,
            stripes: vec![vec![stripe; n]; sites.len()],
            sites,
            positions: vec![None; hidden],
        }
    }

    /// Studied sites, in order of computation.
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// T: a value is an occurrence if |x| >= T.
    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// Number of features.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.sequences
    }

    /// Tokens per sequence.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Counts of feature `dim` at the site with index `site`.
    pub fn column(&self, site: usize, dim: usize) -> &Column {
        &self.stripes[site][dim / STRIPE].columns[dim % STRIPE]
    }

    /// Whether `dim` exceeds anywhere in `sequence` at the site with index `site`.
    pub fn hit(&self, site: usize, sequence: usize, dim: usize) -> bool {
        self.stripes[site][dim / STRIPE].hits[sequence] >> (dim % STRIPE) & 1 == 1
    }

    /// Number of distinct positions of `sequence` at which `dim` exceeds at any site.
    pub fn positions_in(&self, sequence: usize, dim: usize) -> u64 {
        let words = self.words();
        let bits = self.positions[dim].as_deref();
        bits.map_or(0, |b| b[sequence * words..(sequence + 1) * words].iter().map(|w| u64::from(w.count_ones())).sum())
    }

    fn index_of(&self, site: Site) -> usize {
        self.sites.iter().position(|s| *s == site).expect("observed sites were announced")
    }

    /// Words per sequence of a position bitmap.
    fn words(&self) -> usize {
        self.tokens.div_ceil(64)
    }

    /// Counts `x` `[rows, hidden]` at a site. The first of the whole sequences begins at
    /// `first_token`.
    ///
    /// # Errors
    /// Internal: a value is NaN or infinite, so that comparisons are meaningless; the message
    /// names the site. Errors of the driver.
    pub fn count(&mut self, site: Site, first_token: usize, x: &Values<'_>) -> Result<()> {
        let index = self.index_of(site);
        for (s, found) in x.columns(self.threshold)?.iter().enumerate() {
            if !found.are_finite() {
                return Err(not_finite(site, first_token, x)?);
            }
            self.add(index, first_token / self.tokens + s, found);
        }
        Ok(())
    }

    /// Adds the columns of a sequence.
    fn add(&mut self, site: usize, sequence: usize, found: &Columns) {
        for (dim, column) in found.columns.iter().enumerate() {
            self.stripes[site][dim / STRIPE].columns[dim % STRIPE].merge(column);
        }
        let words = self.words();
        let bitmap = words * self.sequences;
        for ExceedingPositions { dim, positions } in &found.marks {
            self.stripes[site][dim / STRIPE].hits[sequence] |= 1 << (dim % STRIPE);
            let bits = self.positions[*dim].get_or_insert_with(|| vec![0; bitmap].into_boxed_slice());
            bits[sequence * words..][..words].iter_mut().zip(positions).for_each(|(a, b)| *a |= b);
        }
    }

    /// Adds a run over other tokens with the same sites or some of them. Order and grouping do not
    /// matter.
    pub fn merge(&mut self, other: &Self) {
        debug_assert_eq!((self.hidden, self.sequences, self.tokens), (other.hidden, other.sequences, other.tokens));
        for (site, theirs) in other.sites.iter().zip(&other.stripes) {
            let mine = self.index_of(*site);
            for (mine, theirs) in self.stripes[mine].iter_mut().zip(theirs) {
                mine.columns.iter_mut().zip(&theirs.columns).for_each(|(a, b)| a.merge(b));
                mine.hits.iter_mut().zip(&theirs.hits).for_each(|(a, b)| *a |= b);
            }
        }
        for (mine, theirs) in self.positions.iter_mut().zip(&other.positions) {
            match (mine.as_mut(), theirs) {
                (_, None) => {}
                (None, Some(theirs)) => *mine = Some(theirs.clone()),
                (Some(mine), Some(theirs)) => mine.iter_mut().zip(theirs).for_each(|(a, b)| *a |= b),
            }
        }
    }
}

/// Passes a tensor's values to `see` as f32, without a copy if it is f32 on the CPU.
pub fn with_f32<T>(x: &Tensor, see: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    on_host(x, see)?
}

/// The error for the first value of `x` that is NaN or infinite.
fn not_finite(site: Site, first_token: usize, x: &Values<'_>) -> Result<WorkerError> {
    let asked: Vec<(usize, u32)> = (0..x.rows()).map(|row| (row, f32::INFINITY.to_bits())).collect();
    let (row, dim) = x.large(&asked)?.first().map_or((0, 0), |at| (at.row, at.dim));
    Ok(WorkerError::internal(format!(
        "activations are no longer finite: layer {} {:?}, token {}, feature {dim}",
        site.layer,
        site.point,
        first_token + row
    ))
    .hint("try --precision f32; if it stays, the checkpoint or this program is wrong"))
}

#[cfg(test)]
mod tests;
