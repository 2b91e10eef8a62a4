//! Rotary position embedding: frequencies and their scalings.

/// Which rotation, over which part of a head.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// Leading dimensions of a head that rotate; even.
    pub dims: usize,
    /// Which two of them rotate together.
    pub pairing: Pairing,
    /// Stretching for longer contexts.
    pub scaling: RopeScaling,
}

/// Which dimensions rotate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// `(i, i + dims / 2)` (Llama, GPT-NeoX).
    Halves,
    /// `(2 i, 2 i + 1)` (GPT-J, Llama 4, DeepSeek).
    Interleaved,
}

/// How frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As they are.
    None,
    /// All divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f64,
        /// Wavelengths above `original_positions / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Wavelengths below `original_positions / high_freq_factor` are short.
        high_freq_factor: f64,
        /// Context of the pre-training.
        original_positions: f64,
    },
    /// YaRN (Peng et al. 2023): pairs that turn often within the original context are kept, those that turn rarely divided, a
    /// ramp over the pair's index between.
    Yarn {
        /// Divisor of the slow pairs.
        factor: f64,
        /// Context of the pre-training.
        original_positions: f64,
        /// Turns within it from which on a pair is kept.
        beta_fast: f64,
        /// Turns up to which it is divided.
        beta_slow: f64,
        /// The ramp's ends are rounded outwards to whole pairs.
        truncate: bool,
        /// What multiplies cos and sin.
        attention_factor: f64,
    },
}

/// cos and sin for positions `0..positions`, each `[positions, dims / 2]`, row-major f32.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
    /// `dims / 2`.
    pub pairs: usize,
}

impl RopeSpec {
    /// Rotation per position of each pair, radians.
    fn frequencies(&self) -> Vec<f64> {
        let dims = self.dims as f64;
        (0..self.dims / 2).map(|pair| self.scaling.apply(self.theta.powf(-2.0 * pair as f64 / dims))).collect()
    }

    /// Tables for positions `0..positions`.
    pub fn table(&self, positions: usize) -> RopeTable {
        // The reference rounds frequency and angle to f32; at position 100,000 that is visible in the fourth digit.
        let frequencies: Vec<f32> = self.frequencies().iter().map(|&f| f as f32).collect();
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| f64::from(p as f32 * f)));
        let (cos, sin) = angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
        RopeTable { cos, sin, pairs: self.dims / 2 }
    }
}

impl RopeScaling {
    fn apply(&self, frequency: f64) -> f64 {
        match *self {
            Self::None | Self::Yarn { .. } => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let turns = original_positions * frequency / std::f64::consts::TAU;
                // Selected, not blended: some published configs have low == high, where the ramp divides by zero.
                if turns < low_freq_factor {
                    frequency / factor
                } else if turns > high_freq_factor {
                    frequency
                } else {
                    let ramp = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    frequency * ((1.0 - ramp) / factor + ramp)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_fast_pairs_and_slows_slow_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_positions: 8192.0,
        };
        assert_eq!(scaling.apply(1.0), 1.0);
        assert_eq!(scaling.apply(1e-6), 1e-6 / 8.0);
        let middle = std::f64::consts::TAU * 2.5 / 8192.0;
        assert!((scaling.apply(middle) / middle - (0.5 / 8.0 + 0.5)).abs() < 1e-12);
    }

    #[test]
    fn table_starts_at_position_zero() {
        let table =
            RopeSpec { theta: 10_000.0, dims: 4, pairing: Pairing::Halves, scaling: RopeScaling::None }.table(3);
        assert_eq!(table.cos[..2], [1.0, 1.0]);
        assert_eq!(table.sin[..2], [0.0, 0.0]);
        assert!((table.cos[2] - 1f32.cos()).abs() < 1e-7);
        assert!((table.sin[5] - 0.02f32.sin()).abs() < 1e-7);
    }
}
