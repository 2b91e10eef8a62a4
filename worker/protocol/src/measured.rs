//! Measurements that a job can ask for (`--measure`), each with its paper and its exact rule.
//!
//! A *row* is the vector of one token at one site, as in [`crate::RowStatistics`].

use serde::{Deserialize, Serialize};

use crate::named::named;
use crate::{Point, Record, SiteKind};

/// Dimensions listed per layer in [`ResidualSinkLayer::dims`].
pub const RESIDUAL_SINKS: usize = 20;
/// Number of dimensions with the largest shares in [`ResidualMap::dims`], and the most other
/// dimensions there.
pub const MAPPED_DIMS: usize = 8;
/// Positions in [`MappedDim::values`] at most.
pub const MAPPED_POSITIONS: usize = 64;
/// Approximate number of sampled rows of a site. All rows if there are fewer.
pub const QUANTIZED_ROWS: usize = 512;

/// A measurement that a job can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measurement {
    /// [`QuantizationErrors`].
    QuantizationError,
    /// [`ResidualSinks`].
    ResidualSinks,
    /// [`SpikeLife`].
    SpikeLife,
    /// [`AttentionSinks`].
    AttentionSinks,
}

named! {
    Measurement:
    QuantizationError = "quantization-error",
    ResidualSinks = "residual-sinks",
    SpikeLife = "spike-life",
    AttentionSinks = "attention-sinks"
}

impl Measurement {
    /// Kinds of sites that it needs; they are studied even if the job does not name them.
    pub fn needs(self) -> &'static [SiteKind] {
        match self {
            Self::QuantizationError => &[],
            Self::ResidualSinks | Self::AttentionSinks => &[SiteKind::Residual],
            Self::SpikeLife => &[SiteKind::Residual, SiteKind::AttentionOut, SiteKind::MlpOut],
        }
    }
}

// ---------------------------------------------------------------------------- quantization error

/// A number format with its scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum NumberFormat {
    /// Integers -127 to 127; scale of a row: its largest |x| / 127.
    #[serde(rename = "int8_per_token")]
    Int8PerToken,
    /// E4M3; scale of 128 values: their largest |x| / 448.
    #[serde(rename = "fp8_per_128")]
    Fp8Per128,
    /// E2M1; scale of 32 values: 2^(floor(log2 of their largest |x|) - 2), as the OCP
    /// specification has it.
    #[serde(rename = "mxfp4")]
    Mxfp4,
    /// E2M1; scale of 16 values: their largest |x| / 6 as E4M3 times g, where g = the row's
    /// largest |x| / (448 x 6).
    #[serde(rename = "nvfp4")]
    Nvfp4,
}

impl NumberFormat {
    /// All formats.
    pub const ALL: [Self; 4] = [Self::Int8PerToken, Self::Fp8Per128, Self::Mxfp4, Self::Nvfp4];

    /// The label in tables.
    pub fn label(self) -> &'static str {
        match self {
            Self::Int8PerToken => "INT8 per token",
            Self::Fp8Per128 => "FP8 per 128",
            Self::Mxfp4 => "MXFP4",
            Self::Nvfp4 => "NVFP4",
        }
    }

    /// Values that share a scale; 128 if a whole row shares one.
    pub fn block(self) -> usize {
        match self {
            Self::Int8PerToken | Self::Fp8Per128 => 128,
            Self::Mxfp4 => 32,
            Self::Nvfp4 => 16,
        }
    }
}

/// Error of activations rounded to few bits (arXiv 2509.23202, 2603.08713, 2604.17789), on sampled
/// rows.
///
/// The error of a row is `|Q(x) - x|^2 / |x|^2`; means are over rows. Rows of zeros are left out.
/// A rotation multiplies each block of 16, 32 or 128 consecutive dimensions by an orthonormal
/// Hadamard matrix (Sylvester's); what does not fill a block at the end is not rotated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantizationErrors {
    /// The rule in words.
    pub rule: String,
    /// Errors over all norm outputs, one entry per rotation and format.
    pub norm_outputs: Vec<PooledQuantization>,
    /// One entry per studied site.
    pub sites: Vec<SiteQuantization>,
}

/// The cost of one format at all norm outputs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PooledQuantization {
    /// Over all rows.
    #[serde(flatten)]
    pub all: QuantizationError,
    /// Mean error of each sequence's rows; `None` for a sequence without sampled rows.
    pub per_sequence: Vec<Option<f64>>,
}

/// The cost of every format at one site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SiteQuantization {
    /// Layer, from 0.
    pub layer: usize,
    /// Where in the layer.
    pub point: Point,
    /// One entry per rotation and format.
    pub errors: Vec<QuantizationError>,
}

/// The cost of one format.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantizationError {
    /// The format.
    pub format: NumberFormat,
    /// Dimensions that are rotated together; 0 without a rotation.
    pub rotation: usize,
    /// Rows that were quantised.
    pub rows: u64,
    /// Mean relative squared error of a row, without unit.
    pub error: f64,
    /// Share of the error that is in outlier blocks, 0 to 1. A block has [`NumberFormat::block`]
    /// dimensions, or `rotation` if that is more; it is an outlier block of a row if it holds a
    /// value of the threshold's magnitude before the rotation.
    pub share_in_outlier_blocks: f64,
    /// Share of the blocks that are outlier blocks, 0 to 1.
    pub outlier_blocks: f64,
}

// ---------------------------------------------------------------------------- residual sinks

/// Residual sinks: dimensions of the residual stream that are large at most tokens (arXiv
/// 2601.22966). Massive activations, in contrast, are large at few tokens.
///
/// The paper's accessible parts give no threshold. Here a dimension is a sink after a layer if
/// `|x| >= T x RMS` of the token's row at half of the tokens or more, where T is the magnitude
/// threshold. An RMSNorm with gains of 1 would make it an outlier.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResidualSinks {
    /// The rule in words.
    pub rule: String,
    /// One entry per layer.
    pub layers: Vec<ResidualSinkLayer>,
    /// Share of x^2 in the residual sinks of one layer, mean over tokens, per sequence. The layer
    /// is the one with the largest [`ResidualSinkLayer::share_of_squares`] (the last of equals);
    /// its sinks are those that are among the [`RESIDUAL_SINKS`] largest within the sequence.
    /// Empty without sinks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub per_sequence: Vec<f64>,
    /// Values of the first sequence after that layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<ResidualMap>,
}

/// Dimension x token: the residual stream of the first sequence after one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResidualMap {
    /// Layer, from 0.
    pub layer: usize,
    /// The [`MAPPED_DIMS`] dimensions with the largest shares of x^2 within the sequence, the
    /// largest first; then at most the same number of other dimensions, evenly spaced.
    pub dims: Vec<MappedDim>,
}

/// A row of the map.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MappedDim {
    /// Hidden dimension.
    pub dim: usize,
    /// Whether it is a sink after that layer.
    pub is_sink: bool,
    /// Its values over the RMS of the token's row, signed, at the first [`MAPPED_POSITIONS`]
    /// positions; 0 in rows of zeros.
    pub values: Vec<f32>,
}

/// The sinks after one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResidualSinkLayer {
    /// Layer, from 0.
    pub layer: usize,
    /// Number of sinks.
    pub n_dims: usize,
    /// Share s of a token's sum of x^2 in the sinks, mean over tokens, 0 to 1. The next norm
    /// scales all other dimensions by sqrt(1 - s) compared with a stream without sinks.
    pub share_of_squares: f64,
    /// Sinks with the largest shares, at most [`RESIDUAL_SINKS`].
    pub dims: Vec<ResidualSink>,
}

/// One sink.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResidualSink {
    /// Hidden dimension.
    pub dim: usize,
    /// Share of the tokens at which the dimension is large, 0 to 1.
    pub share_of_tokens: f64,
    /// Share of a token's sum of x^2 in this dimension, mean over tokens, 0 to 1.
    pub share_of_squares: f64,
    /// Gain at this dimension of the norm before the next layer's attention; `None` without such a
    /// norm.
    pub gain: Option<f32>,
}

// ---------------------------------------------------------------------------- spike life

/// Layers in which the first token's spike starts and ends (arXiv 2603.05498).
///
/// A token's magnitude is its largest |x| in the residual stream. A layer has a spike if the mean
/// magnitude of first tokens, over sequences, is at least ten times that of all other tokens. The
/// factor ten is this project's choice, not the paper's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpikeLife {
    /// The rule in words.
    pub rule: String,
    /// First layer after which there is a spike; `None` without a spike.
    pub onset_layer: Option<usize>,
    /// First layer after which the spike has ended; `None` without a spike, or if it lasts to the
    /// end.
    pub fall_layer: Option<usize>,
    /// One entry per layer.
    pub layers: Vec<SpikeLayer>,
}

/// Magnitudes of first tokens and of other tokens at one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpikeLayer {
    /// Layer, from 0.
    pub layer: usize,
    /// Mean magnitude of first tokens.
    pub first: f64,
    /// Mean magnitude of the others; `None` in sequences of one token.
    pub others: Option<f64>,
    /// The largest value of first tokens in the residual stream, signed.
    pub residual: Option<Record>,
    /// The largest value that attention adds to first tokens, signed.
    pub attention_out: Option<Record>,
    /// Largest |x| that attention adds to other tokens.
    pub attention_out_others: f32,
    /// The largest value that the MLP or the experts add to first tokens, signed.
    pub mlp_out: Option<Record>,
    /// Largest |x| that the MLP or the experts add to other tokens.
    pub mlp_out_others: f32,
    /// Length of the mean of the first tokens' rows, each scaled to unit length, 0 to 1. 1: they
    /// have the same direction in every sequence.
    pub agreement: f64,
    /// Cosine of that mean with the previous layer's; `None` at the first layer.
    pub cosine_with_previous: Option<f64>,
    /// Per sequence: magnitude of the first token minus ten times the mean of the other tokens. A
    /// layer has a spike if the mean of these is not negative. Empty in sequences of one token.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub margins: Vec<f32>,
}

// ---------------------------------------------------------------------------- attention sinks

/// Attention on the first key, and the size of hidden states (F-Attn and M-Act of arXiv
/// 2505.06708). Each can occur without the other (arXiv 2603.17771), so neither is inferred from
/// the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionSinks {
    /// The rule in words.
    pub rule: String,
    /// Mean over layers of [`AttentionSinkLayer::first_key`], 0 to 1; `None` if no layer has one.
    pub first_key: Option<f64>,
    /// Mean over layers of [`AttentionSinkLayer::largest_hidden`].
    pub largest_hidden: f64,
    /// [`Self::first_key`] of each sequence; empty if no layer has one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub first_key_per_sequence: Vec<f64>,
    /// [`Self::largest_hidden`] of each sequence.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub largest_hidden_per_sequence: Vec<f64>,
    /// One entry per layer.
    pub layers: Vec<AttentionSinkLayer>,
}

/// Attention on the first key at one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionSinkLayer {
    /// Layer, from 0.
    pub layer: usize,
    /// Mean over heads; `None` if the layer has no softmax or no query counts.
    pub first_key: Option<f64>,
    /// Share that a query gives to the first key of its sequence, 0 to 1, mean over queries, per
    /// head. The first query is left out, because it sees only that key; so are queries that do
    /// not see it. Learned sinks take part in the softmax but are not keys.
    pub heads: Vec<f64>,
    /// Largest |x| of a row of the residual stream after the layer, mean over tokens.
    pub largest_hidden: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_measurement_name_is_parsed() {
        for measurement in Measurement::ALL {
            let name = serde_json::to_string(&measurement).unwrap();
            let read = name.trim_matches('"').replace('_', "-").parse::<Measurement>();
            assert_eq!(read, Ok(measurement));
        }
        let said = "sinks".parse::<Measurement>().unwrap_err();
        assert!(said.contains("residual-sinks, spike-life"), "{said}");
    }
}
