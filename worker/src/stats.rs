//! Counting outlier features while activations pass by, and judging them afterwards.
//!
//! Definitions are LLM.int8()'s (Dettmers et al. 2022, section 4.1), read as [`outliers_protocol::Results`] says. Counting needs
//! only the magnitude threshold; the shares of layers and positions are applied last, to the stored counts.
//!
//! [`study`] measures more in the same pass: every row's moments and median ([`rows`]), the largest values ([`top`]), massive activations
//! ([`massive`]), routers and experts ([`mixture`]); their definitions stand with the fields of [`outliers_protocol`] that carry them.
//! Nothing here depends on the number of threads or on how the tokens are cut into micro-batches.
//!
//! This module never knows which architecture ran.

use candle_core::Tensor;
use outliers_protocol::Point;
use rayon::prelude::*;

use serde::{Deserialize, Serialize};

use crate::attention::{FirstKey, TopShares};
use crate::error::{Result, WorkerError};
use crate::ffn::{ExpertRows, Routing};
use crate::tap::on_host;
use crate::taps::Taps;

pub mod attention_sinks;
pub mod exact;
mod fixed_point;
pub mod histogram;
pub mod massive;
pub mod mixture;
pub mod quantization;
pub mod residual_sinks;
pub mod rows;
pub mod spike_life;
pub mod study;
pub mod top;
mod verdict;
mod within;

pub use study::{Report, Scope, Study};
pub use verdict::Judged;

/// A place in the model whose values are studied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Site {
    /// Layer, from 0.
    pub layer: usize,
    /// Where in the layer.
    pub point: Point,
}

impl Site {
    /// Whose input a norm output is: the layer, and [`Point::BeforeAttention`] or [`Point::BeforeMlp`]. In a post-norm layer the norm
    /// after attention feeds the MLP, and the norm after the MLP the next layer's attention (or, after the last layer, the head).
    pub fn feeds(self) -> Option<(usize, Point)> {
        match self.point {
            Point::BeforeAttention | Point::BeforeMlp => Some((self.layer, self.point)),
            Point::AfterAttention => Some((self.layer, Point::BeforeMlp)),
            Point::AfterMlp => Some((self.layer + 1, Point::BeforeAttention)),
            Point::Residual | Point::AttentionOut | Point::MlpOut | Point::ExpertOut => None,
        }
    }
}

/// Sees one layer, on the thread that computes it. Asked first, so that nothing is copied off a device for nobody.
pub trait LayerObserver: Send {
    /// Whether this site is of interest.
    fn wants(&self, site: Site) -> bool;

    /// Values at a site: `x` `[rows, hidden]`, row `r` being token `first_token + r` (sequence-major); whole sequences, in their order.
    fn observe(&mut self, site: Site, first_token: usize, x: &Tensor) -> Result<()>;

    /// The gain of the norm whose output is `site`, `[hidden]`.
    fn gain(&mut self, _site: Site, _gain: &Tensor) -> Result<()> {
        Ok(())
    }

    /// What a routed expert's down projection made of its rows, if [`Point::ExpertOut`] is wanted of that layer. Row `r` belongs to
    /// token `first_token + rows.rows[r]`.
    fn expert(&mut self, _layer: usize, _expert: usize, _first_token: usize, _rows: &ExpertRows) -> Result<()> {
        Ok(())
    }

    /// How sharp a layer's softmax is in each arm of an ablation, over some of the tokens; only with one.
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
    fn routing(&mut self, _layer: usize, _first_token: usize, _routing: &Routing) -> Result<()> {
        Ok(())
    }
}

/// Something that wants to see a pass. Several layers are computed at the same time, each seen by an observer of its own; what they saw
/// is joined in the order of the layers, so that no number depends on which thread was first.
pub trait Observer: Send {
    /// What sees a single layer.
    type Layer: LayerObserver;

    /// Begins to see a layer.
    fn layer(&self, layer: usize) -> Self::Layer;

    /// Takes what was seen of a layer, once all tokens have passed it. Layers come in their order.
    fn join(&mut self, seen: Self::Layer);

    /// What has been joined so far, for [`Self::restore`]. Nothing, for an observer that keeps nothing.
    fn state(&self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    /// Goes on from what [`Self::state`] gave, in a process that starts in the middle of the pass.
    fn restore(&mut self, _state: &[u8]) -> Result<()> {
        Ok(())
    }

    /// Output of the last norm, `[rows, hidden]`.
    fn final_norm(&mut self, _first_token: usize, _x: &Tensor) -> Result<()> {
        Ok(())
    }

    /// Logits of a block of the vocabulary, `[rows, block]`, the first of which is token id `first_id`.
    fn logits(&mut self, _first_token: usize, _first_id: usize, _x: &Tensor) -> Result<()> {
        Ok(())
    }
}

/// Features in one stripe: as many as fit one word of a bit set.
const STRIPE: usize = 64;
/// Rows summed in f32 before they are added to the f64 sums.
const ROWS: usize = 32;

/// What is kept per (site, feature).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Column {
    /// Values with |x| >= T.
    pub count: u64,
    /// Those with x > 0.
    pub positive: u64,
    /// Largest value.
    pub max: f32,
    /// Smallest value.
    pub min: f32,
    /// Sum of x.
    pub sum: f64,
    /// Sum of x^2.
    pub sum2: f64,
    /// Sum of x^3.
    pub sum3: f64,
    /// Sum of x^4.
    pub sum4: f64,
}

impl Column {
    const EMPTY: Self = Self {
        count: 0,
        positive: 0,
        max: f32::NEG_INFINITY,
        min: f32::INFINITY,
        sum: 0.0,
        sum2: 0.0,
        sum3: 0.0,
        sum4: 0.0,
    };

    fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.positive += other.positive;
        self.max = self.max.max(other.max);
        self.min = self.min.min(other.min);
        self.sum += other.sum;
        self.sum2 += other.sum2;
        self.sum3 += other.sum3;
        self.sum4 += other.sum4;
    }

    /// The value of largest magnitude, signed.
    pub fn peak(&self) -> f32 {
        if self.max >= -self.min { self.max } else { self.min }
    }

    /// Largest |x|.
    pub fn max_abs(&self) -> f32 {
        self.max.max(-self.min)
    }
}

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

/// Positions of sixty-four features, all sites together: per feature one bit per (sequence, position), allocated at the first occurrence.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Positions {
    bits: Vec<Option<Box<[u64]>>>,
}

/// Counts of a run over a fixed set of sites and sequences.
///
/// Size: sites x hidden x 56 bytes, plus sites x sequences x hidden bits, plus tokens bits per feature that ever exceeds.
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

    /// Whether `dim` exceeds at `(sequence, position)` at any site.
    pub fn exceeds_at(&self, dim: usize, sequence: usize, position: usize) -> bool {
        let word = sequence * self.words() + position / 64;
        let bits = self.positions[dim / STRIPE].bits[dim % STRIPE].as_deref();
        bits.is_some_and(|b| b[word] >> (position % 64) & 1 == 1)
    }

    fn index_of(&self, site: Site) -> usize {
        self.sites.iter().position(|s| *s == site).expect("observed sites were announced")
    }

    /// Words per sequence of a position bitmap.
    fn words(&self) -> usize {
        self.tokens.div_ceil(64)
    }

    /// Counts `x` `[rows, hidden]` row-major at a site, `first_token` being the first row's token.
    ///
    /// # Errors
    /// Internal: a value is NaN or infinite, so that no comparison means anything any more; the message names the site.
    pub fn count(&mut self, site: Site, first_token: usize, x: &[f32]) -> Result<()> {
        let index = self.index_of(site);
        let geometry = Geometry {
            hidden: self.hidden,
            tokens: self.tokens,
            words: self.tokens.div_ceil(64),
            bitmap: self.words() * self.sequences,
            threshold: self.threshold,
            first_token,
        };
        let finite = self.stripes[index]
            .par_iter_mut()
            .zip(&mut self.positions)
            .enumerate()
            .map(|(i, (stripe, positions))| geometry.count(x, i * STRIPE, stripe, positions))
            .reduce(|| true, |a, b| a & b);
        if finite {
            return Ok(());
        }
        let at = x.iter().position(|v| !v.is_finite());
        let (row, dim) = at.map_or((0, 0), |at| (at / self.hidden, at % self.hidden));
        Err(WorkerError::internal(format!(
            "activations are no longer finite: layer {} {:?}, token {}, feature {dim}",
            site.layer,
            site.point,
            first_token + row
        ))
        .hint("try --precision f32; if it stays, the checkpoint or this program is wrong"))
    }

    /// Adds another run over the same sequences and the same sites or some of them: counts of disjoint parts of the corpus, in any order
    /// and grouping.
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

/// What a stripe needs to know of the whole.
struct Geometry {
    hidden: usize,
    tokens: usize,
    words: usize,
    bitmap: usize,
    threshold: f32,
    first_token: usize,
}

/// Sums of up to [`ROWS`] rows, in f32 so that the loop vectorises.
#[derive(Clone, Copy)]
struct Block {
    count: [u32; STRIPE],
    positive: [u32; STRIPE],
    max: [f32; STRIPE],
    min: [f32; STRIPE],
    sums: [[f32; STRIPE]; 4],
}

impl Block {
    const EMPTY: Self = Self {
        count: [0; STRIPE],
        positive: [0; STRIPE],
        max: [f32::NEG_INFINITY; STRIPE],
        min: [f32::INFINITY; STRIPE],
        sums: [[0.0; STRIPE]; 4],
    };

    /// Adds one row; says whether any value exceeds.
    #[inline(always)]
    #[expect(clippy::needless_range_loop, reason = "nine arrays in lock step, which vectorise as written")]
    fn add(&mut self, row: &[f32; STRIPE], threshold: f32) -> bool {
        let mut any = 0u32;
        for j in 0..STRIPE {
            let v = row[j];
            let v2 = v * v;
            let hit = u32::from(v.abs() >= threshold);
            any |= hit;
            self.count[j] += hit;
            self.positive[j] += hit & u32::from(v > 0.0);
            self.max[j] = if v > self.max[j] { v } else { self.max[j] };
            self.min[j] = if v < self.min[j] { v } else { self.min[j] };
            self.sums[0][j] += v;
            self.sums[1][j] += v2;
            self.sums[2][j] += v2 * v;
            self.sums[3][j] += v2 * v2;
        }
        any != 0
    }

    fn column(&self, j: usize) -> Column {
        Column {
            count: u64::from(self.count[j]),
            positive: u64::from(self.positive[j]),
            max: self.max[j],
            min: self.min[j],
            sum: f64::from(self.sums[0][j]),
            sum2: f64::from(self.sums[1][j]),
            sum3: f64::from(self.sums[2][j]),
            sum4: f64::from(self.sums[3][j]),
        }
    }
}

impl Geometry {
    /// One pass over a stripe's columns of all rows. False if a sum is not finite.
    fn count(&self, x: &[f32], first_dim: usize, stripe: &mut Stripe, positions: &mut Positions) -> bool {
        let width = STRIPE.min(self.hidden - first_dim);
        let mut finite = true;
        // Zeros stand in for the features a last, partial stripe does not have; T > 0 keeps them from counting.
        let mut row_buffer = [0f32; STRIPE];
        // Blocks begin with a sequence, so that no sum depends on how sequences were put into micro-batches.
        let blocks = x.chunks(self.hidden * self.tokens).flat_map(|sequence| sequence.chunks(self.hidden * ROWS));
        let mut token = self.first_token;
        for rows in blocks {
            let mut block = Block::EMPTY;
            for row in rows.chunks_exact(self.hidden) {
                row_buffer[..width].copy_from_slice(&row[first_dim..first_dim + width]);
                if block.add(&row_buffer, self.threshold) {
                    self.mark(&row_buffer, token, stripe, positions);
                }
                token += 1;
            }
            for (j, column) in stripe.columns[..width].iter_mut().enumerate() {
                let sums = block.column(j);
                finite &= sums.sum2.is_finite();
                column.merge(&sums);
            }
        }
        finite
    }

    /// Records where a row exceeds.
    fn mark(&self, row: &[f32; STRIPE], token: usize, stripe: &mut Stripe, positions: &mut Positions) {
        let (sequence, position) = (token / self.tokens, token % self.tokens);
        let word = sequence * self.words + position / 64;
        for (j, v) in row.iter().enumerate() {
            if v.abs() >= self.threshold {
                stripe.hits[sequence] |= 1 << j;
                let bits = positions.bits[j].get_or_insert_with(|| vec![0; self.bitmap].into_boxed_slice());
                bits[word] |= 1 << (position % 64);
            }
        }
    }
}

#[cfg(test)]
mod tests;
