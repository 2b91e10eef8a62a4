//! Counting outlier features while activations pass by, and judging them afterwards.
//!
//! Definitions are LLM.int8()'s (Dettmers et al. 2022, section 4.1), read as
//! [`outliers_protocol::Results`] says. Counting needs only the magnitude threshold; the shares of
//! layers and positions are applied last, to the stored counts.
//!
//! [`study`] measures more in the same pass: every row's moments and median ([`rows`]), the
//! largest values ([`top`]), massive activations ([`massive`]), routers and experts ([`mixture`]);
//! their definitions stand with the fields of [`outliers_protocol`] that carry them. Nothing here
//! depends on the number of threads or on how the tokens are cut into micro-batches. What one pass
//! over activations finds is found where they lie ([`Values`]): by `outliers_scan` on the CPU, by
//! kernels of the same results on a GPU.
//!
//! This module never knows which architecture ran.

use candle_core::Tensor;
pub use outliers_scan::Column;
use outliers_scan::{Columns, Marks};

use serde::{Deserialize, Serialize};

use crate::blocks::attention::{FirstKey, TopShares};
use crate::blocks::ffn::{Choices, ExpertRows};
use crate::error::{Result, WorkerError};
use crate::kernels::tap::on_host;
use crate::kernels::taps::Taps;

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

/// Sees one layer, on the thread that computes it. Asked first, so that nothing is copied off a
/// device for nobody.
pub trait LayerObserver: Send {
    /// Whether this site is of interest.
    fn wants(&self, site: Site) -> bool;

    /// Values at a site: `x` `[rows, hidden]`, row `r` being token `first_token + r`
    /// (sequence-major); whole sequences, in their order.
    fn observe(&mut self, site: Site, first_token: usize, x: &Tensor) -> Result<()>;

    /// The gain of the norm whose output is `site`, `[hidden]`.
    fn gain(&mut self, _site: Site, _gain: &Tensor) -> Result<()> {
        Ok(())
    }

    /// What a routed expert's down projection made of its rows, if
    /// [`Point::ExpertOut`](outliers_protocol::Point::ExpertOut) is wanted of that layer. Row `r`
    /// belongs to token `first_token + rows.rows[r]`.
    fn expert(&mut self, _layer: usize, _expert: usize, _first_token: usize, _rows: &ExpertRows) -> Result<()> {
        Ok(())
    }

    /// How sharp a layer's softmax is in each arm of an ablation, over some of the tokens; only
    /// with one.
    fn attention(&mut self, _layer: usize, _arms: &[TopShares]) -> Result<()> {
        Ok(())
    }

    /// Whether it is of interest what attention gives to the first key.
    fn wants_first_key(&self) -> bool {
        false
    }

    /// What the heads of a layer gave to the first key, by sequence and head, from the sequence on
    /// that begins at `first_token`; only if it is wanted.
    fn first_key(&mut self, _layer: usize, _first_token: usize, _sequences: &[Vec<FirstKey>]) -> Result<()> {
        Ok(())
    }

    /// What sees the inputs of the layer's matrices, if their sums are wanted.
    fn taps(&self) -> Option<Taps> {
        None
    }

    /// A mixture's choices at a layer.
    fn routing(&mut self, _layer: usize, _first_token: usize, _choices: &Choices) -> Result<()> {
        Ok(())
    }

    /// Waits for what a GPU still owes of all that was seen. Called when all tokens have passed the
    /// layer, before [`Observer::join`].
    fn settle(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Something that wants to see a pass. Several layers are computed at the same time, each seen by
/// an observer of its own; what they saw is joined in the order of the layers, so that no number
/// depends on which thread was first.
pub trait Observer: Send {
    /// What sees a single layer.
    type Layer: LayerObserver;

    /// Begins to see a layer.
    fn layer(&self, layer: usize) -> Self::Layer;

    /// Takes what was seen of a layer, once all tokens have passed it. Layers come in their order.
    fn join(&mut self, seen: Self::Layer);

    /// What has been joined so far, for [`Self::restore`]. Nothing, for an observer that keeps
    /// nothing.
    fn state(&self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    /// Continues from a [`Self::state`], in a process that starts in the middle of the pass.
    fn restore(&mut self, _state: &[u8]) -> Result<()> {
        Ok(())
    }

    /// Output of the last norm, `[rows, hidden]`.
    fn final_norm(&mut self, _first_token: usize, _x: &Tensor) -> Result<()> {
        Ok(())
    }

    /// Logits of a block of the vocabulary, `[rows, block]`, the first of which is token id
    /// `first_id`.
    fn logits(&mut self, _first_token: usize, _first_id: usize, _x: &Tensor) -> Result<()> {
        Ok(())
    }
}

/// Features in one stripe: as many as fit one word of a bit set.
const STRIPE: usize = 64;

/// Sixty-four features at one site.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Stripe {
    #[serde(with = "array")]
    columns: [Column; STRIPE],
    /// Per sequence: the features with an occurrence in it.
    hits: Vec<u64>,
}

/// Arrays longer than serde's own limit of 32.
mod array {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer, T: Serialize, const N: usize>(
        array: &[T; N],
        to: S,
    ) -> Result<S::Ok, S::Error> {
        array.as_slice().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>, T: Deserialize<'de>, const N: usize>(
        from: D,
    ) -> Result<[T; N], D::Error> {
        let wrong = |list: Vec<T>| D::Error::custom(format!("{} instead of {N} entries", list.len()));
        Vec::deserialize(from)?.try_into().map_err(wrong)
    }
}

/// Positions of sixty-four features, all sites together: per feature one bit per (sequence,
/// position), allocated at the first occurrence.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Positions {
    bits: Vec<Option<Box<[u64]>>>,
}

/// Counts of a run over a fixed set of sites and sequences.
///
/// Size: sites x hidden x 56 bytes, plus sites x sequences x hidden bits, plus tokens bits per
/// feature that ever exceeds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OutlierStats {
    threshold: f32,
    sites: Vec<Site>,
    hidden: usize,
    sequences: usize,
    tokens: usize,
    /// `[sites][stripes]`.
    stripes: Vec<Vec<Stripe>>,
    /// `[stripes]`.
    positions: Vec<Positions>,
}

impl OutlierStats {
    /// Nothing counted yet. `tokens` per sequence; `threshold` T > 0.
    pub fn new(sites: Vec<Site>, hidden: usize, sequences: usize, tokens: usize, threshold: f32) -> Self {
        let n = hidden.div_ceil(STRIPE);
        let stripe = Stripe { columns: [Column::EMPTY; STRIPE], hits: vec![0; sequences] };
        Self {
            threshold,
            hidden,
            sequences,
            tokens,
            stripes: vec![vec![stripe; n]; sites.len()],
            sites,
            positions: vec![Positions { bits: vec![None; STRIPE] }; n],
        }
    }

    /// Studied sites, in order of computation.
    pub fn sites(&self) -> &[Site] {
        &self.sites
    }

    /// T: a value counts where |x| >= T.
    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// Features.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Sequences.
    pub fn sequences(&self) -> usize {
        self.sequences
    }

    /// Tokens per sequence.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// What is kept for feature `dim` at the site of index `site`.
    pub fn column(&self, site: usize, dim: usize) -> &Column {
        &self.stripes[site][dim / STRIPE].columns[dim % STRIPE]
    }

    /// Whether `dim` exceeds anywhere in `sequence` at the site of index `site`.
    pub fn hit(&self, site: usize, sequence: usize, dim: usize) -> bool {
        self.stripes[site][dim / STRIPE].hits[sequence] >> (dim % STRIPE) & 1 == 1
    }

    /// Distinct positions of `sequence` at which `dim` exceeds at any site.
    pub fn positions_in(&self, sequence: usize, dim: usize) -> u64 {
        let words = self.words();
        let bits = self.positions[dim / STRIPE].bits[dim % STRIPE].as_deref();
        bits.map_or(0, |b| b[sequence * words..(sequence + 1) * words].iter().map(|w| u64::from(w.count_ones())).sum())
    }

    fn index_of(&self, site: Site) -> usize {
        self.sites.iter().position(|s| *s == site).expect("observed sites were announced")
    }

    /// Words per sequence of a position bitmap.
    fn words(&self) -> usize {
        self.tokens.div_ceil(64)
    }

    /// Counts `x` `[rows, hidden]` at a site, whole sequences of which the first begins at
    /// `first_token`.
    ///
    /// # Errors
    /// Internal: a value is NaN or infinite, so that no comparison means anything any more; the
    /// message names the site. Device: the driver's.
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
        for Marks { dim, positions } in &found.marks {
            self.stripes[site][dim / STRIPE].hits[sequence] |= 1 << (dim % STRIPE);
            let bits = &mut self.positions[dim / STRIPE].bits[dim % STRIPE];
            let bits = bits.get_or_insert_with(|| vec![0; bitmap].into_boxed_slice());
            bits[sequence * words..][..words].iter_mut().zip(positions).for_each(|(a, b)| *a |= b);
        }
    }

    /// Adds another run over the same sequences and the same sites or some of them: counts of
    /// disjoint parts of the corpus, in any order and grouping.
    pub fn merge(&mut self, other: &Self) {
        debug_assert_eq!((self.hidden, self.sequences, self.tokens), (other.hidden, other.sequences, other.tokens));
        for (site, theirs) in other.sites.iter().zip(&other.stripes) {
            let mine = self.index_of(*site);
            for (mine, theirs) in self.stripes[mine].iter_mut().zip(theirs) {
                mine.columns.iter_mut().zip(&theirs.columns).for_each(|(a, b)| a.merge(b));
                mine.hits.iter_mut().zip(&theirs.hits).for_each(|(a, b)| *a |= b);
            }
        }
        let pairs = self.positions.iter_mut().zip(&other.positions).flat_map(|(a, b)| a.bits.iter_mut().zip(&b.bits));
        for (mine, theirs) in pairs {
            match (mine.as_mut(), theirs) {
                (_, None) => {}
                (None, Some(theirs)) => *mine = Some(theirs.clone()),
                (Some(mine), Some(theirs)) => mine.iter_mut().zip(theirs).for_each(|(a, b)| *a |= b),
            }
        }
    }
}

/// Shows a tensor's values as f32, without a copy where it is f32 on the CPU already.
pub fn with_f32<T>(x: &Tensor, see: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    on_host(x, see)?
}

/// The error that names the first value of `x` that is NaN or infinite.
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
