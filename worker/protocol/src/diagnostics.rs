//! Measurements of the same pass in addition to outlier features. Their size depends on layers,
//! sites, experts and fixed list lengths, not on the number of occurrences.
//!
//! A *row* is the vector of one token at one site: `hidden` values `x_1 .. x_d`. At
//! [`crate::Point::ExpertOut`] a row is one token at one of its experts, so that a token has
//! several.

use serde::{Deserialize, Serialize};

use crate::Point;

/// Records kept per kind of site in [`crate::Results::top_records`].
pub const TOP_RECORDS: usize = 100;
/// Records kept per layer in [`MassiveLayer::records`].
pub const MASSIVE_RECORDS: usize = 5;
/// Dimensions listed in [`MassiveActivations::dims`].
pub const MASSIVE_DIMS: usize = 100;

/// Statistics over the rows of one site.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RowStatistics {
    /// Rows seen: sequences x tokens, times experts per token at [`Point::ExpertOut`].
    pub rows: u64,
    /// Quantiles of |x| over all values of all rows.
    pub magnitude: MagnitudeQuantiles,
    /// Kurtosis over the coordinates of each row: `mean((x - m)^4) / mean((x - m)^2)^2` with `m =
    /// mean(x)`; 3 for any rotation of a Gaussian (Elhage et al. 2023, "Privileged bases in the
    /// transformer residual stream"). `None` if in every row all coordinates are equal.
    pub kurtosis: Option<RowSpread>,
    /// Largest |x| of each row over the median |x| of the same row. `None` if every row's median
    /// is 0.
    pub max_over_median: Option<RowSpread>,
}

/// Quantiles of |x|, each within 1.6 % (bins of a 32nd of an octave between 2^-32 and 2^32; less
/// counts as 0).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MagnitudeQuantiles {
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p99_9: f64,
}

/// Distribution of a number over rows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RowSpread {
    /// Rows that have the number.
    pub rows: u64,
    /// Mean over these rows.
    pub mean: f64,
    /// Median over these rows, within 1.6 %.
    pub p50: f64,
    /// 99th percentile, within 1.6 %.
    pub p99: f64,
    /// Largest, exact.
    pub max: f64,
}

/// Gain vector of a studied norm, which multiplies the normalised values (1 + the stored weight if
/// the weight is centred at zero).
///
/// An RMSNorm's output is bounded by `|y_i| <= sqrt(hidden) * |gain_i|`, so a threshold at norm
/// outputs is in part a threshold on gains.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GainSummary {
    /// Largest |gain|.
    pub max_abs: f32,
    /// Feature with the largest |gain|.
    pub dim: usize,
    /// Root mean square.
    pub rms: f64,
}

/// Value of largest magnitude of a feature over all studied norm outputs (the first such site),
/// and the norm's gain there.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct FeaturePeak {
    /// Layer of the site.
    pub layer: usize,
    /// Where in the layer.
    pub point: Point,
    /// The value, signed.
    pub value: f32,
    /// The norm's gain at this feature.
    pub gain: Option<f32>,
    /// `value / gain`: the normalised value before the gain (plus bias / gain where the norm has a
    /// bias). `None` if the gain is 0.
    pub value_over_gain: Option<f32>,
}

/// One studied site that is not a norm output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OtherSite {
    /// Layer, from 0.
    pub layer: usize,
    /// Where in the layer.
    pub point: Point,
    /// Largest |x|.
    pub max_abs: f32,
    /// Root mean square of all values.
    pub rms: f64,
    /// Statistics by row.
    pub rows: RowStatistics,
}

/// The values of largest magnitude at one kind of site, over all layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TopRecords {
    /// Which kind.
    pub point: Point,
    /// At most [`TOP_RECORDS`], largest first; equal magnitudes by layer, sequence, position,
    /// expert, dimension.
    pub records: Vec<Record>,
}

/// One value and its position.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Layer, from 0.
    pub layer: usize,
    /// The expert it comes from, at [`Point::ExpertOut`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert: Option<usize>,
    /// Sequence, from 0.
    pub sequence: usize,
    /// Position in the sequence, from 0.
    pub position: usize,
    /// Token id at that position.
    pub token_id: i64,
    /// Hidden dimension.
    pub dim: usize,
    /// The value, signed.
    pub value: f32,
}

// ----------------------------------------------------------------------------- massive activations

/// Massive activations of the residual stream after each layer, by the rule of Sun et al. 2024
/// (arXiv 2402.17762, section 2): |x| > 100, and |x| at least 1,000 times the median magnitude of
/// its hidden state.
///
/// The paper's hidden state is the layer's output for one sequence, `[tokens, hidden]`, and so is
/// its code's median: all of the sequence's values at that layer together. Others take the median
/// over the `hidden` values of the same token; both are counted here, each under its name. Medians
/// are those of |x|, the lower of the two middle values where the number of values is even.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MassiveActivations {
    /// The rule in words.
    pub rule: String,
    /// First layer after which the residual stream holds one; `None`: there are none.
    pub onset_layer: Option<usize>,
    /// Last layer after which it holds one.
    pub last_layer: Option<usize>,
    /// (layer, sequence, position, dimension) with a massive activation, counted exactly.
    pub values: u64,
    /// Distinct (sequence, position) with one after any layer.
    pub tokens: u64,
    /// Tokens at position 0 with one after any layer.
    pub tokens_at_position_0: u64,
    /// Sequences with one.
    pub sequences: u64,
    /// Dimensions with one.
    pub n_dims: usize,
    /// Dimensions with the most massive activations, at most [`MASSIVE_DIMS`].
    pub dims: Vec<MassiveDim>,
    /// `values` with the median of the token's own values in the rule.
    pub values_by_token_median: u64,
    /// One entry per layer.
    pub layers: Vec<MassiveLayer>,
}

/// One dimension of the residual stream that carries massive activations.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MassiveDim {
    /// Hidden dimension.
    pub dim: usize,
    /// (layer, sequence, position) with one.
    pub values: u64,
    /// Those at position 0.
    pub values_at_position_0: u64,
    /// Layers with one.
    pub n_layers: usize,
    /// First layer with one.
    pub first_layer: usize,
    /// Last layer with one.
    pub last_layer: usize,
    /// Smallest massive value, signed.
    pub min: f32,
    /// Largest massive value, signed.
    pub max: f32,
}

/// The residual stream after one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MassiveLayer {
    /// Layer, from 0.
    pub layer: usize,
    /// (sequence, position, dimension) with a massive activation.
    pub values: u64,
    /// (sequence, position) with one.
    pub tokens: u64,
    /// `values` with the median of the token's own values in the rule.
    pub values_by_token_median: u64,
    /// `tokens` with the median of the token's own values in the rule.
    pub tokens_by_token_median: u64,
    /// The largest, second and third largest |x| of a sequence, mean over sequences; fewer where a
    /// sequence has fewer values.
    pub mean_top_magnitudes: Vec<f64>,
    /// The median |x| of a sequence, mean over sequences.
    pub mean_median: f64,
    /// The massive activations of largest magnitude, at most [`MASSIVE_RECORDS`].
    pub records: Vec<MassiveRecord>,
}

/// One massive activation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MassiveRecord {
    /// Its position and its value.
    #[serde(flatten)]
    pub at: Record,
    /// |value| over the median of the sequence's hidden state at this layer; `None` if that median is 0.
    pub ratio: Option<f64>,
    /// |value| over the median of the token's own values; `None` if that median is 0.
    pub ratio_in_token: Option<f64>,
}

// ----------------------------------------------------------------------------------------- experts

/// What the router of one layer did. Per-expert numbers are in `statistics.safetensors`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouterSummary {
    /// Layer, from 0.
    pub layer: usize,
    /// Routed experts.
    pub experts: usize,
    /// Experts per token.
    pub experts_per_token: usize,
    /// Experts that no token was sent to.
    pub never_hit: usize,
    /// Tokens of the busiest expert over the mean per expert; 1 is even.
    pub max_over_mean: f64,
    /// The expert with the most tokens; the first of equals.
    pub busiest: usize,
    /// Entropy of the experts' shares of all (token, expert) pairs, over the logarithm of their
    /// number; 1 is even, 0 all to one.
    pub normalised_entropy: f64,
    /// Sum of a token's gate weights, mean over tokens. Gate weights are those multiplied into the
    /// experts' outputs (inputs, in Llama 4).
    pub gate_mass_per_token: f64,
    /// Sum of a token's gate weights, mean over tokens at position 0.
    pub gate_mass_per_token_at_position_0: f64,
    /// Expert with the largest share of the gate mass of tokens at position 0; the first of
    /// equals.
    pub favourite_at_position_0: usize,
    /// That expert's share.
    pub favourite_share_at_position_0: f64,
    /// That expert's share of the gate mass of all other tokens.
    pub favourite_share_elsewhere: f64,
}

/// Super-expert candidates, by the rule of Su et al. 2025 (arXiv 2507.23279) as their code has it.
/// `a` of an expert is the largest |x| at the output of its down projection, bias included, before
/// the gate weight (where the router scales the expert's input, after that); A are the `a` of all
/// routed experts with a token in the first `layers_considered` layers. A candidate is over
/// `percentile_99_5` and over 0.1 x `max`.
///
/// The largest value of A is always a candidate, unless another is equal to it. Its distance to
/// `runner_up` shows whether it is exceptional.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SuperExperts {
    /// The rule in words.
    pub rule: String,
    /// 75 % of the layers run, rounded (half to even).
    pub layers_considered: usize,
    /// Size of A.
    pub experts_considered: usize,
    /// 99.5th percentile of A, interpolated linearly.
    pub percentile_99_5: f64,
    /// Largest of A.
    pub max: f32,
    /// Experts over both limits, largest first.
    pub candidates: Vec<ExpertPeak>,
    /// Largest expert of A that is not a candidate, to compare the candidates with.
    pub runner_up: Option<ExpertPeak>,
}

/// The value of largest magnitude at the output of one expert's down projection.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertPeak {
    /// Its position and its value.
    #[serde(flatten)]
    pub at: Record,
    /// Tokens sent to this expert.
    pub tokens: u64,
}
