//! Rotary position embedding: frequencies and their scalings.

use candle_core::{Device, Result, Tensor};

/// A rotation of a part of a head.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// Leading dimensions of a head that rotate; even.
    pub dims: usize,
    /// Which dimensions form a pair.
    pub pairing: Pairing,
    /// Scaling for longer contexts.
    pub scaling: RopeScaling,
}

/// Which dimensions form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// `(i, i + dims / 2)` (Llama, GPT-NeoX).
    Halves,
    /// `(2 i, 2 i + 1)` (GPT-J, Llama 4, DeepSeek).
    Interleaved,
}

/// Scaling of frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// The first `part` of the pairs rotate as in a whole head, the others do not (Gemma 4).
    Proportional {
        /// Share of the pairs.
        part: f64,
    },
    /// All divided by `factor`.
    Linear {
        /// Divisor of positions.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths are divided by `factor`, short ones kept, with a ramp between.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f64,
        /// Wavelengths above `original_positions / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Wavelengths below `original_positions / high_freq_factor` are short.
        high_freq_factor: f64,
        /// Context length of the pre-training.
        original_positions: f64,
    },
    /// YaRN (Peng et al. 2023): pairs that turn often within the original context are kept, pairs
    /// that turn rarely are divided, with a ramp over the pair's index between.
    Yarn {
        /// Divisor of the slow pairs.
        factor: f64,
        /// Context length of the pre-training.
        original_positions: f64,
        /// Minimum number of turns within the context for a pair to be kept.
        beta_fast: f64,
        /// Maximum number of turns for a pair to be divided.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded outwards to whole pairs.
        truncate: bool,
        /// Factor of cos and sin.
        attention_factor: f64,
    },
}

/// cos and sin for positions `0..positions`, on one device.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// `[2, positions, dims / 2]` in f32: the cosine of each position and pair, then the sine.
    pub angles: Tensor,
    /// Number of pairs, `dims / 2`.
    pub pairs: usize,
    /// Which dimensions form a pair.
    pub pairing: Pairing,
}

impl RopeSpec {
    /// Rotation per position of each pair, in radians. Every step is rounded to f32, as in the
    /// reference.
    fn frequencies(&self) -> Vec<f32> {
        let period = |pair: usize| {
            let exponent = (2 * pair) as f32 / self.dims as f32;
            f64::from(self.theta as f32).powf(f64::from(exponent)) as f32
        };
        let periods = (0..self.dims / 2).map(period);
        match self.scaling {
            RopeScaling::None => periods.map(f32::recip).collect(),
            RopeScaling::Proportional { part } => {
                let turning = (part * self.dims as f64) as usize / 2;
                periods.enumerate().map(|(pair, period)| if pair < turning { period.recip() } else { 0.0 }).collect()
            }
            RopeScaling::Linear { factor } => periods.map(|period| period.recip() / factor as f32).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let [factor, low, high] = [factor, low_freq_factor, high_freq_factor].map(|v| v as f32);
                periods.map(|period| llama3(period.recip(), factor, low, high, original_positions as f32)).collect()
            }
            RopeScaling::Yarn { factor, original_positions, beta_fast, beta_slow, truncate, .. } => {
                let ramp = Ramp::new(self, original_positions, beta_fast, beta_slow, truncate);
                let mixed = |(pair, period): (usize, f32)| {
                    let kept = 1.0 - ramp.at(pair);
                    (factor as f32 * period).recip() * (1.0 - kept) + period.recip() * kept
                };
                periods.enumerate().map(mixed).collect()
            }
        }
    }

    /// Computes the table for positions `0..positions`.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn table(&self, positions: usize, device: &Device) -> Result<RopeTable> {
        let pairs = self.dims / 2;
        let (cos, sin) = self.turns(positions);
        let angles = Tensor::from_vec([cos, sin].concat(), (2, positions, pairs), device)?;
        Ok(RopeTable { angles, pairs, pairing: self.pairing })
    }

    /// cos and sin of positions `0..positions`, each `[positions, dims / 2]`, row-major.
    fn turns(&self, positions: usize) -> (Vec<f32>, Vec<f32>) {
        // The reference rounds frequency and angle to f32. At position 100,000 this changes the
        // fourth digit.
        let frequencies = self.frequencies();
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| f64::from(p as f32 * f)));
        let factor = match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            RopeScaling::None
            | RopeScaling::Proportional { .. }
            | RopeScaling::Linear { .. }
            | RopeScaling::Llama3 { .. } => 1.0,
        };
        angles.map(|a| (a.cos() as f32 * factor, a.sin() as f32 * factor)).unzip()
    }
}

fn llama3(frequency: f32, factor: f32, low: f32, high: f32, original_positions: f32) -> f32 {
    let wavelength = frequency.recip() * std::f32::consts::TAU;
    // Selected, not blended: if low == high, as in some published configs, the ramp divides by
    // zero.
    if wavelength > original_positions / low {
        frequency / factor
    } else if wavelength < original_positions / high || low == high {
        frequency
    } else {
        let ramp = (original_positions * wavelength.recip() - low) / (high - low);
        (1.0 - ramp) * frequency / factor + ramp * frequency
    }
}

/// YaRN's ramp over the pair's index, from kept pairs (0) to divided ones (1).
struct Ramp {
    low: f32,
    width: f32,
}

impl Ramp {
    fn new(spec: &RopeSpec, original_positions: f64, beta_fast: f64, beta_slow: f64, truncate: bool) -> Self {
        let dims = spec.dims as f64;
        let pair_that_turns =
            |times: f64| dims * (original_positions / (times * std::f64::consts::TAU)).ln() / (2.0 * spec.theta.ln());
        let (mut low, mut high) = (pair_that_turns(beta_fast), pair_that_turns(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dims - 1.0));
        // As in the reference: prevents division by zero.
        let width = if low == high { 0.001 } else { high - low };
        Self { low: low as f32, width: width as f32 }
    }

    fn at(&self, pair: usize) -> f32 {
        ((pair as f32 - self.low) / self.width).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(theta: f64, dims: usize, scaling: RopeScaling) -> RopeSpec {
        RopeSpec { theta, dims, pairing: Pairing::Halves, scaling }
    }

    fn llama3_scaling(factor: f64, low_freq_factor: f64, high_freq_factor: f64) -> RopeScaling {
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions: 8192.0 }
    }

    fn yarn(factor: f64, betas: [f64; 2], truncate: bool, attention_factor: f64) -> RopeScaling {
        let [beta_fast, beta_slow] = betas;
        RopeScaling::Yarn { factor, original_positions: 4096.0, beta_fast, beta_slow, truncate, attention_factor }
    }

    /// Compares with values of transformers' functions, as (pair, radians per position).
    fn assert_frequencies(spec: &RopeSpec, expected: &[(usize, f64)]) {
        let frequencies = spec.frequencies();
        assert_eq!(frequencies.len(), spec.dims / 2);
        for &(pair, want) in expected {
            // Powers may differ in the last place, and derived values slightly more.
            let got = f64::from(frequencies[pair]);
            assert!(
                (got / want - 1.0).abs() <= 4.0 * f64::from(f32::EPSILON),
                "pair {pair}: {got:e}, expected {want:e}"
            );
        }
    }

    /// Compares cos and sin of pair `pair` at position 4095 with those of transformers.
    fn assert_rotation(spec: &RopeSpec, pair: usize, cos: f64, sin: f64) {
        let (of_cos, of_sin) = spec.turns(4096);
        let at = 4095 * spec.dims / 2 + pair;
        // The rotation error after 4095 positions of a frequency that is off by one unit in the
        // last place.
        let slack = f64::from(4095.0 * spec.frequencies()[pair] * 4.0 * f32::EPSILON) + 1e-6;
        assert!((f64::from(of_cos[at]) - cos).abs() < slack, "cos of pair {pair}: {}, expected {cos}", of_cos[at]);
        assert!((f64::from(of_sin[at]) - sin).abs() < slack, "sin of pair {pair}: {}, expected {sin}", of_sin[at]);
    }

    #[test]
    fn llama3_keeps_fast_pairs_and_slows_slow_ones() {
        let of = |frequency| llama3(frequency, 8.0, 1.0, 4.0, 8192.0);
        assert_eq!(of(1.0), 1.0);
        assert_eq!(of(1e-6), 1e-6 / 8.0);
        let middle = std::f32::consts::TAU * 2.5 / 8192.0;
        assert!((of(middle) / middle - (0.5 / 8.0 + 0.5)).abs() < 1e-6);
    }

    #[test]
    fn llama3_scaling_matches_llama_4_scout() {
        let scout = spec(500_000.0, 128, llama3_scaling(8.0, 1.0, 4.0));
        let expected = [
            (0, 1.0),
            (20, 1.656_044_1e-2),
            (29, 2.166_570_6e-3),
            (31, 8.567_514_6e-4),
            (34, 1.785_077_9e-4),
            (35, 9.556_212e-5),
            (63, 3.068_925_9e-7),
        ];
        assert_frequencies(&scout, &expected);
        assert_rotation(&scout, 34, 7.445_142_3e-1, 6.676_066e-1);
    }

    #[test]
    fn llama3_scaling_with_equal_bounds_is_a_step() {
        let scout_instruct = spec(500_000.0, 128, llama3_scaling(16.0, 1.0, 1.0));
        let expected = [(0, 1.0), (34, 9.384_738_5e-4), (35, 4.778_106e-5), (36, 3.892_327_7e-5), (63, 1.534_463e-7)];
        assert_frequencies(&scout_instruct, &expected);
    }

    #[test]
    fn yarn_matches_gpt_oss() {
        let gpt_oss = spec(150_000.0, 64, yarn(32.0, [32.0, 1.0], false, 0.1 * 32f64.ln() + 1.0));
        let expected = [
            (0, 1.0),
            (7, 7.374_456_5e-2),
            (8, 5.081_327e-2),
            (9, 3.170_569_6e-2),
            (12, 6.794_959e-3),
            (16, 4.564_839e-4),
            (17, 1.293_187e-4),
            (18, 3.830_881e-5),
            (31, 3.023_511_4e-7),
        ];
        assert_frequencies(&gpt_oss, &expected);
        assert_rotation(&gpt_oss, 0, -8.884_153e-2, -1.343_639_7);
        assert_rotation(&gpt_oss, 16, -3.960_165e-1, 1.287_024_3);
        assert_rotation(&gpt_oss, 31, 1.346_572_5, 1.667_229_9e-3);
    }

    #[test]
    fn yarn_matches_deepseek_v3() {
        let deepseek = spec(10_000.0, 64, yarn(40.0, [32.0, 1.0], true, 1.0));
        let expected = [
            (10, 5.623_412_9e-2),
            (11, 3.900_692_6e-2),
            (16, 5.500_000_4e-3),
            (22, 1.778_279_4e-4),
            (23, 3.333_803_4e-5),
            (31, 3.333_803_5e-6),
        ];
        assert_frequencies(&deepseek, &expected);
        assert_rotation(&deepseek, 22, 7.463_7e-1, 6.655_312_8e-1);
    }

    #[test]
    fn yarn_with_one_bound_is_a_step() {
        let kimi = spec(50_000.0, 64, yarn(32.0, [1.0, 1.0], true, 1.0));
        let expected =
            [(18, 2.274_203_8e-3), (19, 1.621_76e-3), (20, 3.614_046_7e-5), (21, 2.577_216_8e-5), (31, 8.764_412_8e-7)];
        assert_frequencies(&kimi, &expected);
        let untruncated = spec(
            10_000.0,
            8,
            RopeScaling::Yarn {
                factor: 4.0,
                original_positions: 64.0,
                beta_fast: 2.0,
                beta_slow: 2.0,
                truncate: false,
                attention_factor: 1.0,
            },
        );
        assert_frequencies(&untruncated, &[(0, 1.0), (1, 2.5e-2), (2, 2.5e-3), (3, 2.5e-4)]);
    }

    #[test]
    fn linear_scaling_divides_all_pairs() {
        let plain = spec(10_000.0, 8, RopeScaling::None).frequencies();
        let scaled = spec(10_000.0, 8, RopeScaling::Linear { factor: 4.0 }).frequencies();
        assert!(plain.iter().zip(&scaled).all(|(p, s)| p / 4.0 == *s));
    }

    #[test]
    fn partial_rotary_pairs_turn_as_in_a_full_head() {
        let whole = spec(1e6, 16, RopeScaling::None).frequencies();
        let part = spec(1e6, 16, RopeScaling::Proportional { part: 0.25 }).frequencies();
        assert_eq!((&part[..2], &part[2..]), (&whole[..2], &[0.0; 6][..]));
    }

    #[test]
    fn table_starts_at_position_zero() {
        let table = spec(10_000.0, 4, RopeScaling::None).table(3, &Device::Cpu).unwrap();
        let angles = table.angles.to_vec3::<f32>().unwrap();
        assert_eq!((&angles[0][0][..], &angles[1][0][..]), (&[1.0, 1.0][..], &[0.0, 0.0][..]));
        assert!((angles[0][1][0] - 1f32.cos()).abs() < 1e-7);
        assert!((angles[1][2][1] - 0.02f32.sin()).abs() < 1e-7);
    }
}
