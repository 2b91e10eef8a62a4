//! Layers in which the first token's spike starts and ends (arXiv 2603.05498), as defined by
//! [`SpikeLife`].

use std::collections::BTreeMap;

use outliers_protocol::{Point, Record, SpikeLayer, SpikeLife};
use serde::{Deserialize, Serialize};

use super::Site;
use super::exact::Mean;
use super::fixed_point;
use super::top::TopValue;
use outliers_scan::{Row, Scan};

/// Minimum ratio of a spike to the mean magnitude of other tokens.
const TIMES: f64 = 10.0;

/// Magnitudes of first tokens and of other tokens at one site.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Magnitudes {
    first: Mean,
    others: Mean,
    /// Largest value of first tokens.
    peak: Option<TopValue>,
    /// Largest |x| of other tokens.
    others_max: f32,
}

impl Magnitudes {
    fn merge(&mut self, other: &Self) {
        self.first.merge(&other.first);
        self.others.merge(&other.others);
        self.peak = self.peak.max(other.peak);
        self.others_max = self.others_max.max(other.others_max);
    }

    fn mean_others(&self) -> Option<f64> {
        (self.others.count > 0).then(|| self.others.value())
    }
}

/// Statistics of first tokens per site and layer. Memory: 8 bytes per layer and dimension, and 16
/// per layer and sequence.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Spikes {
    sites: BTreeMap<Site, Magnitudes>,
    /// Per layer: sum over sequences of the first token's row, scaled to a unit vector, in fixed
    /// point.
    directions: BTreeMap<usize, Vec<i64>>,
    /// Per layer and first token: [`SpikeLayer::margins`].
    margins: BTreeMap<usize, BTreeMap<usize, f32>>,
}

impl Spikes {
    /// Whether values of a site are used: the residual stream and what is added to it.
    pub fn is_seen(point: Point) -> bool {
        matches!(point, Point::Residual | Point::AttentionOut | Point::MlpOut)
    }

    /// Adds the values `x` `[tokens, hidden]` of the sequence that begins at `first_token`, at a
    /// site accepted by [`Spikes::is_seen`].
    pub fn add(&mut self, site: Site, first_token: usize, x: &[f32], scan: &Scan) {
        let Some((first, others)) = scan.rows.split_first() else { return };
        let row = &x[..x.len() / scan.rows.len()];
        let mut seen = Magnitudes::default();
        seen.first.add(f64::from(first.max_abs()));
        others.iter().for_each(|row| seen.others.add(f64::from(row.max_abs())));
        seen.others_max = others.iter().map(Row::max_abs).fold(0.0, f32::max);
        let (layer, token) = (site.layer, first_token);
        let found = |(dim, value): (usize, &f32)| TopValue { layer, token, expert: None, dim, value: *value };
        seen.peak = row.iter().enumerate().map(found).max();
        if let (Point::Residual, Some(others)) = (site.point, seen.mean_others()) {
            let margin = seen.first.value() - TIMES * others;
            self.margins.entry(site.layer).or_default().insert(first_token, margin as f32);
        }
        self.sites.entry(site).or_default().merge(&seen);
        if site.point == Point::Residual && first.squares > 0.0 {
            let direction = self.directions.entry(site.layer).or_insert_with(|| vec![0; row.len()]);
            let length = first.squares.sqrt();
            direction.iter_mut().zip(row).for_each(|(sum, v)| *sum += fixed_point::from_f64(f64::from(*v) / length));
        }
    }

    /// Adds statistics of other layers or other sequences.
    pub fn merge(&mut self, other: &Self) {
        for (site, theirs) in &other.sites {
            self.sites.entry(*site).or_default().merge(theirs);
        }
        for (layer, theirs) in &other.directions {
            let mine = self.directions.entry(*layer).or_insert_with(|| vec![0; theirs.len()]);
            mine.iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine += theirs);
        }
        for (layer, theirs) in &other.margins {
            self.margins.entry(*layer).or_default().extend(theirs);
        }
    }

    /// The result for reports. `record` converts a value with its location.
    pub fn summary(&self, record: impl Fn(&TopValue) -> Record) -> SpikeLife {
        let residual = self.sites.iter().filter(|(site, _)| site.point == Point::Residual);
        let residual: Vec<(usize, &Magnitudes)> = residual.map(|(site, seen)| (site.layer, seen)).collect();
        let is_spike = |(_, seen): &&(usize, &Magnitudes)| {
            seen.mean_others().is_some_and(|others| seen.first.value() > 0.0 && seen.first.value() >= TIMES * others)
        };
        let spikes: Vec<usize> = residual.iter().filter(is_spike).map(|(layer, _)| *layer).collect();
        let after = |last: &usize| residual.iter().map(|(layer, _)| *layer).find(|layer| layer > last);
        let mut previous: Option<Vec<f64>> = None;
        let mut layers = Vec::with_capacity(residual.len());
        for &(layer, seen) in &residual {
            let at = |point| self.sites.get(&Site { layer, point });
            let (attention, mlp) = (at(Point::AttentionOut), at(Point::MlpOut));
            let peak = |seen: Option<&Magnitudes>| seen.and_then(|seen| seen.peak.as_ref()).map(&record);
            let others = |seen: Option<&Magnitudes>| seen.map_or(0.0, |seen| seen.others_max);
            let sum = self.directions.get(&layer).map_or(&[][..], Vec::as_slice);
            let mean: Vec<f64> =
                sum.iter().map(|sum| fixed_point::to_f64(*sum) / seen.first.count.max(1) as f64).collect();
            layers.push(SpikeLayer {
                layer,
                first: seen.first.value(),
                others: seen.mean_others(),
                residual: peak(Some(seen)),
                attention_out: peak(attention),
                attention_out_others: others(attention),
                mlp_out: peak(mlp),
                mlp_out_others: others(mlp),
                agreement: product(&mean, &mean).sqrt(),
                cosine_with_previous: previous.as_deref().and_then(|previous| cosine(previous, &mean)),
                margins: self.margins.get(&layer).map(|of| of.values().copied().collect()).unwrap_or_default(),
            });
            previous = Some(mean);
        }
        SpikeLife {
            rule: format!(
                "mean over sequences of the first token's largest |x| >= {TIMES} x the mean over other tokens"
            ),
            onset_layer: spikes.first().copied(),
            fall_layer: spikes.last().and_then(after),
            layers,
        }
    }
}

fn product(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Cosine of the angle; `None` if either vector is zero.
fn cosine(a: &[f64], b: &[f64]) -> Option<f64> {
    let lengths = (product(a, a) * product(b, b)).sqrt();
    (lengths > 0.0).then(|| product(a, b) / lengths)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HIDDEN: usize = 4;

    /// Two sequences of three tokens. Dimension 2 of the first tokens is `value` after each layer;
    /// all other values are 1.
    fn spikes(values: &[f32]) -> SpikeLife {
        let mut all = Spikes::default();
        for (layer, value) in values.iter().enumerate() {
            for sequence in [1, 0] {
                let mut x = vec![1.0; 3 * HIDDEN];
                x[2] = *value;
                let mut one = Spikes::default();
                one.add(Site { layer, point: Point::Residual }, 3 * sequence, &x, &Scan::of(&x, HIDDEN));
                x.iter_mut().for_each(|v| *v *= -2.0);
                one.add(Site { layer, point: Point::MlpOut }, 3 * sequence, &x, &Scan::of(&x, HIDDEN));
                all.merge(&one);
            }
        }
        all.summary(|found| found.record(&[9; 6], 3))
    }

    #[test]
    fn spike_start_and_end_layers_are_found() {
        let life = spikes(&[1.0, 9.0, 10.0, -80.0, 2.0]);
        assert_eq!((life.onset_layer, life.fall_layer), (Some(2), Some(4)));
        let layer = &life.layers[3];
        assert_eq!((layer.first, layer.others), (80.0, Some(1.0)));
        assert_eq!((&layer.margins[..], &life.layers[4].margins[..]), (&[70.0; 2][..], &[-8.0; 2][..]));
        let (residual, added) = (layer.residual.unwrap(), layer.mlp_out.unwrap());
        assert_eq!((residual.value, residual.dim, residual.sequence, residual.position), (-80.0, 2, 0, 0));
        assert_eq!((added.value, layer.mlp_out_others, layer.attention_out), (160.0, 2.0, None));
        assert!((layer.agreement - 1.0).abs() < 1e-9 && layer.cosine_with_previous.unwrap() < -0.9);
        assert_eq!(life.layers[0].cosine_with_previous, None);
        assert_eq!(spikes(&[1.0, 20.0]).fall_layer, None, "it stays");
        assert_eq!(spikes(&[1.0, 2.0]).onset_layer, None);
    }
}
