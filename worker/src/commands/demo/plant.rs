//! The features that the demo plants.

use serde::{Deserialize, Serialize};

use super::LAYERS;

/// The planted features of a demo checkpoint, `planted.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Planted {
    /// Document version.
    pub schema: u32,
    /// Systematic features: in at least a quarter of the layers, at far more than 6 % of the
    /// positions.
    pub systematic: Vec<PlantedFeature>,
    /// Features with outliers that are not systematic.
    pub decoys: Vec<Decoy>,
}

/// One planted feature.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlantedFeature {
    /// Index into the hidden dimension.
    pub dim: usize,
    /// Factor of the gain, a power of two.
    pub factor: f32,
    /// `[layer, site]`; site 0 is the norm before attention, 1 the norm before the experts.
    pub sites: Vec<[usize; 2]>,
}

/// A planted feature that is not systematic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decoy {
    /// The feature.
    #[serde(flatten)]
    pub feature: PlantedFeature,
    /// The reason, for people.
    pub why: String,
}

/// The decoy whose embedding is small but for some rare tokens, see [`super::weights`].
pub(super) const RARE_DIM: usize = 120;

impl Planted {
    /// The demo's features: one at all sites, one that only attention reads, one that only the
    /// experts read, and one in exactly a quarter of the layers; decoys: one in too few layers,
    /// one at too few positions.
    pub(super) fn plan() -> Self {
        let everywhere = (0..LAYERS).flat_map(|layer| [[layer, 0], [layer, 1]]).collect();
        let plant = |dim, factor, sites| PlantedFeature { dim, factor, sites };
        let decoy = |feature, why: &str| Decoy { feature, why: why.to_owned() };
        Self {
            schema: 1,
            systematic: vec![
                plant(17, 16.0, everywhere),
                plant(42, 16.0, vec![[1, 0], [4, 0], [6, 0]]),
                plant(83, 8.0, vec![[0, 1], [2, 1], [4, 1], [6, 1]]),
                plant(101, 16.0, vec![[2, 0], [5, 1]]),
            ],
            decoys: vec![
                decoy(plant(60, 16.0, vec![[3, 0], [3, 1]]), "in one of eight layers only"),
                decoy(
                    plant(RARE_DIM, 4.0, vec![[1, 0], [2, 0], [3, 1], [4, 0], [5, 1], [6, 0]]),
                    "at few positions: rare tokens carry it",
                ),
            ],
        }
    }

    /// `(dim, factor)` of every feature planted at a site.
    pub(super) fn at(&self, site: [usize; 2]) -> impl Iterator<Item = (usize, f32)> + '_ {
        let decoys = self.decoys.iter().map(|decoy| &decoy.feature);
        let planted = self.systematic.iter().chain(decoys);
        planted.filter(move |feature| feature.sites.contains(&site)).map(|feature| (feature.dim, feature.factor))
    }
}
