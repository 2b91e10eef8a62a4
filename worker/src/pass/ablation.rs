//! Ablation of features (LLM.int8(), section 4.2): additional copies of the tokens in which every
//! norm output is 0 at the ablated features.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use outliers_protocol::{Ablation, AblationArm, Removed};

use crate::blocks::attention::TopShares;
use crate::error::{Result, WorkerError};
use crate::noise;
use crate::pass::stream::Predicted;

/// The copies of the tokens (arms), by ablated features. The first is the whole model, and the
/// only one without an ablation.
#[derive(Clone, Debug)]
pub struct Arms {
    hidden: usize,
    removed: Vec<(Removed, Vec<usize>)>,
}

/// [`TopShares`] of each arm, by layer. Layers without softmax attention have no entry.
pub type Sharpness = BTreeMap<usize, Vec<TopShares>>;

impl Arms {
    /// Only the whole model.
    pub fn whole() -> Self {
        Self { hidden: 0, removed: vec![(Removed::Nothing, Vec::new())] }
    }

    /// The arms of a job, for a model of width `hidden` and sequences of `tokens`.
    ///
    /// # Errors
    /// Job: a feature outside the model, no features, more than half of the features, or sequences
    /// of one token.
    pub fn of(ablation: Option<&Ablation>, hidden: usize, tokens: usize) -> Result<Self> {
        let Some(Ablation { features, seed }) = ablation else { return Ok(Self::whole()) };
        let wrong = |why: String, hint: &str| Err(WorkerError::job(why).hint(hint));
        if features.is_empty() || !features.is_sorted_by(|a, b| a < b) {
            return wrong(format!("an ablation of {features:?}"), "features are ascending, each once");
        }
        if let Some(feature) = features.iter().find(|feature| **feature >= hidden) {
            let why = format!("there is no feature {feature} in a model of {hidden}");
            return wrong(why, "features are counted from 0; use the results of the same model");
        }
        if 2 * features.len() > hidden {
            let why = format!("{} ablated features of {hidden} leave too few for the random arm", features.len());
            return wrong(why, "ablate at most half of the features");
        }
        if tokens < 2 {
            return wrong("an ablation of sequences of one token, which predict nothing".to_owned(), "use longer ones");
        }
        let mut others: Vec<usize> = (0..hidden).filter(|feature| features.binary_search(feature).is_err()).collect();
        others.sort_by_cached_key(|feature| noise::mix(noise::mix(*seed) ^ *feature as u64));
        others.truncate(features.len());
        others.sort_unstable();
        let removed =
            vec![(Removed::Nothing, Vec::new()), (Removed::Named, features.clone()), (Removed::Random, others)];
        Ok(Self { hidden, removed })
    }

    /// Number of arms.
    pub fn count(&self) -> usize {
        self.removed.len()
    }

    /// Factors of the norm outputs for each arm but the first, `[hidden]`.
    pub(crate) fn masks(&self, compute: DType, device: &Device) -> Result<Vec<Tensor>> {
        let mask = |(_, features): &(Removed, Vec<usize>)| {
            let mut kept = vec![1f32; self.hidden];
            features.iter().for_each(|feature| kept[*feature] = 0.0);
            Ok(Tensor::from_vec(kept, self.hidden, device)?.to_dtype(compute)?)
        };
        self.removed[1..].iter().map(mask).collect()
    }

    /// Results per arm; empty without an ablation.
    pub fn report(&self, layers: usize, predicted: &[Predicted], sharpness: &Sharpness) -> Vec<AblationArm> {
        if self.count() == 1 {
            return Vec::new();
        }
        let arm = |(arm, ((removed, features), predicted)): (usize, (&(Removed, Vec<usize>), &Predicted))| {
            let of_layer = |layer| sharpness.get(&layer).and_then(|arms| arms[arm].mean());
            let by_layer: Vec<Option<f64>> = (0..layers).map(of_layer).collect();
            let shares: Vec<f64> = by_layer.iter().flatten().copied().collect();
            Some(AblationArm {
                removed: *removed,
                features: features.clone(),
                perplexity: predicted.perplexity()?,
                top_probability: predicted.top_probability,
                attention: (!shares.is_empty()).then(|| shares.iter().sum::<f64>() / shares.len() as f64),
                attention_by_layer: by_layer,
            })
        };
        self.removed.iter().zip(predicted).enumerate().filter_map(arm).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(features: &[usize], seed: u64, hidden: usize) -> Vec<usize> {
        let arms = Arms::of(Some(&Ablation { features: features.to_vec(), seed }), hidden, 8).unwrap();
        arms.removed[2].1.clone()
    }

    #[test]
    fn random_controls_are_as_many_and_disjoint() {
        for seed in 0..50 {
            let others = random(&[3, 17, 40], seed, 64);
            assert_eq!(others.len(), 3);
            assert!(others.is_sorted_by(|a, b| a < b) && others.iter().all(|f| *f < 64 && ![3, 17, 40].contains(f)));
            assert_eq!(others, random(&[3, 17, 40], seed, 64));
        }
        assert_ne!(random(&[3], 0, 64), random(&[3], 1, 64));
        assert_eq!(random(&[0, 2], 9, 4), [1, 3]);
    }

    #[test]
    fn impossible_ablations_are_refused() {
        for features in [vec![], vec![4], vec![1, 1], vec![2, 1], vec![0, 1, 2]] {
            let error = Arms::of(Some(&Ablation { features: features.clone(), seed: 0 }), 4, 8).unwrap_err();
            assert!(error.hint_text().is_some(), "{features:?}: {}", error.message());
        }
        let error = Arms::of(Some(&Ablation { features: vec![1], seed: 0 }), 4, 1).unwrap_err();
        assert!(error.message().contains("one token"), "{}", error.message());
    }

    #[test]
    fn mask_is_zero_at_ablated_features() {
        let arms = Arms::of(Some(&Ablation { features: vec![1, 2], seed: 0 }), 4, 8).unwrap();
        let masks = arms.masks(DType::F32, &Device::Cpu).unwrap();
        let values: Vec<Vec<f32>> = masks.iter().map(|mask| mask.to_vec1().unwrap()).collect();
        assert_eq!(values, [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]);
        assert!(Arms::whole().masks(DType::F32, &Device::Cpu).unwrap().is_empty());
    }
}
