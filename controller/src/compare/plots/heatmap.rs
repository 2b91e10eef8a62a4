//! Steps of a heat map.

use crate::compare::plot::Colour;
use crate::compare::table::short;

/// Steps from the threshold to the largest magnitude by a constant factor; step 0 is below the
/// threshold.
pub(super) struct ColourSteps {
    pub(super) threshold: f64,
    pub(super) largest: f64,
}

impl ColourSteps {
    const ABOVE: u8 = Colour::STEPS - 1;

    fn factor(&self) -> f64 {
        (self.largest / self.threshold).powf(1.0 / f64::from(Self::ABOVE))
    }

    pub(super) fn step(&self, magnitude: f64) -> u8 {
        if magnitude < self.threshold {
            return 0;
        }
        let steps = (magnitude / self.threshold).ln() / self.factor().ln();
        1 + (steps.floor() as u8).min(Self::ABOVE - 1)
    }

    /// Lower bound of each step.
    pub(super) fn words(&self) -> Vec<String> {
        let from = |step: i32| self.threshold * self.factor().powi(step);
        let above = (0..i32::from(Self::ABOVE)).map(|step| format!(">= {}", short(from(step))));
        std::iter::once(format!("|x| < {}", short(self.threshold))).chain(above).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heat_steps_are_geometric_from_threshold_to_maximum() {
        let heat = ColourSteps { threshold: 6.0, largest: 768.0 };
        assert_eq!([5.99, 6.0, 11.9, 12.1, 768.0, 1e9].map(|x| heat.step(x)), [0, 1, 1, 2, 7, 7]);
        assert_eq!(heat.words().len(), usize::from(Colour::STEPS));
        assert_eq!(&heat.words()[..3], ["|x| < 6", ">= 6", ">= 12"]);
    }
}
