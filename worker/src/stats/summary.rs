//! Derives the systematic features from stored counts, in several labelled readings.

use outliers_protocol::{Axis, Feature, Point, Reading, SequenceSummary, Sided, SiteSummary, Thresholds, Verdict};
use rayon::prelude::*;

use super::OutlierStats;
use super::exact::ExactSum;

/// The parts of [`outliers_protocol::Results`] that follow from counts and thresholds.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The count of each reading.
    pub verdicts: Vec<Verdict>,
    /// Features with an occurrence, ascending.
    pub features: Vec<Feature>,
    /// Per sequence, without perplexity.
    pub per_sequence: Vec<SequenceSummary>,
    /// Per studied norm output.
    pub sites: Vec<SiteSummary>,
    /// All occurrences.
    pub total_occurrences: u64,
    /// Largest |x|.
    pub max_abs: f32,
}

/// Where a feature exceeds within some sequences.
#[derive(Clone, Copy, Default)]
struct Extent {
    layers: usize,
    sites: usize,
    positions: u64,
}

/// Shares of layers and positions of a systematic feature.
#[derive(Clone, Copy)]
struct SystematicShares {
    share: f64,
    positions: f64,
}

/// Counts of one feature over the corpus and per sequence.
struct FeatureCounts {
    feature: Option<Feature>,
    corpus: [Option<SystematicShares>; 2],
    sequences: Vec<PerSequence>,
}

/// Counts of one feature in one sequence.
#[derive(Clone, Copy)]
struct PerSequence {
    /// Whether it exceeds anywhere.
    any: bool,
    /// Shares by each axis, if systematic.
    by: [Option<SystematicShares>; 2],
}

const AXES: [Axis; 2] = [Axis::Layers, Axis::Sites];

impl OutlierStats {
    /// Layers that have a studied site, ascending.
    fn layers(&self) -> Vec<usize> {
        let mut layers: Vec<usize> = self.sites.iter().map(|site| site.layer).collect();
        layers.dedup();
        layers
    }

    /// Number of layers and sites at which `dim` exceeds within one sequence.
    pub fn spread_in(&self, sequence: usize, dim: usize) -> (usize, usize) {
        let spread = self.spread(dim, sequence..sequence + 1);
        (spread.layers, spread.sites)
    }

    /// Applies the shares of layers and positions to the stored counts. Other shares need no new
    /// run.
    pub fn judge(&self, thresholds: &Thresholds) -> Summary {
        let layers = self.layers();
        let rows: Vec<FeatureCounts> =
            (0..self.hidden).into_par_iter().map(|dim| self.row(dim, &layers, thresholds)).collect();
        let per_sequence = (0..self.sequences).map(|s| summarise(s, &rows)).collect();
        let sites = (0..self.sites.len()).map(|i| self.site_summary(i)).collect();
        let verdicts = verdicts(&rows, self.sequences);
        let features: Vec<Feature> = rows.into_iter().filter_map(|row| row.feature).collect();
        let columns = || (0..self.sites.len()).flat_map(|s| (0..self.hidden).map(move |d| self.column(s, d)));
        Summary {
            verdicts,
            total_occurrences: features.iter().map(|f| f.occurrences).sum(),
            max_abs: columns().map(super::Column::max_abs).fold(0.0, f32::max),
            features,
            per_sequence,
            sites,
        }
    }

    fn row(&self, dim: usize, layers: &[usize], thresholds: &Thresholds) -> FeatureCounts {
        // As in the definition: a share equal to its threshold counts.
        let judge = |spread: Extent, tokens: usize| {
            let positions = spread.positions as f64 / tokens as f64;
            let by = |part: usize, whole: usize| {
                let share = part as f64 / whole as f64;
                let systematic = share >= thresholds.layer_fraction && positions >= thresholds.position_fraction;
                (systematic && part > 0).then_some(SystematicShares { share, positions })
            };
            [by(spread.layers, layers.len()), by(spread.sites, self.sites.len())]
        };
        let sequences: Vec<PerSequence> = (0..self.sequences)
            .map(|s| {
                let spread = self.spread(dim, s..s + 1);
                PerSequence { any: spread.sites > 0, by: judge(spread, self.tokens) }
            })
            .collect();
        let spread = self.spread(dim, 0..self.sequences);
        let corpus = judge(spread, self.sequences * self.tokens);
        let feature = (spread.sites > 0).then(|| {
            let within = |axis: usize| sequences.iter().filter(|within| within.by[axis].is_some()).count();
            let mut feature = self.feature(dim, spread, layers, corpus, [within(0), within(1)]);
            self.detail(&mut feature, thresholds);
            feature
        });
        FeatureCounts { feature, corpus, sequences }
    }

    /// Layers, sites and positions at which `dim` exceeds within a range of sequences.
    fn spread(&self, dim: usize, sequences: std::ops::Range<usize>) -> Extent {
        let mut spread = Extent::default();
        let mut last_layer = None;
        for (i, site) in self.sites.iter().enumerate() {
            if sequences.clone().any(|s| self.hit(i, s, dim)) {
                spread.sites += 1;
                spread.layers += usize::from(last_layer != Some(site.layer));
                last_layer = Some(site.layer);
            }
        }
        spread.positions = sequences.map(|s| self.positions_in(s, dim)).sum();
        spread
    }

    fn feature(
        &self,
        dim: usize,
        spread: Extent,
        layers: &[usize],
        corpus: [Option<SystematicShares>; 2],
        within: [usize; 2],
    ) -> Feature {
        let mut all = super::Column::EMPTY;
        (0..self.sites.len()).for_each(|s| all.merge(self.column(s, dim)));
        let feeding = |input: Point| {
            let hits = (0..self.sites.len()).filter(|i| self.column(*i, dim).count > 0);
            hits.filter_map(|i| self.sites[i].feeds().filter(|(_, of)| *of == input).map(|(layer, _)| layer)).collect()
        };
        Feature {
            dim,
            n_layers: spread.layers,
            n_sites: spread.sites,
            layer_fraction: spread.layers as f64 / layers.len() as f64,
            site_fraction: spread.sites as f64 / self.sites.len() as f64,
            n_positions: spread.positions,
            position_fraction: spread.positions as f64 / (self.sequences * self.tokens) as f64,
            occurrences: all.count,
            positive: all.positive,
            sided: match all.positive {
                0 => Sided::Neg,
                n if n == all.count => Sided::Pos,
                _ => Sided::Both,
            },
            max: all.max,
            min: all.min,
            max_abs: all.max_abs(),
            // Filled in by the caller, who has the gains.
            peak: None,
            systematic_by_layers: corpus[0].is_some(),
            systematic_by_sites: corpus[1].is_some(),
            sequences_systematic_by_layers: within[0],
            sequences_systematic_by_sites: within[1],
            layers_before_attention: feeding(Point::BeforeAttention),
            layers_before_mlp: feeding(Point::BeforeMlp),
            within: Vec::new(),
            peaks: Vec::new(),
        }
    }

    fn site_summary(&self, index: usize) -> SiteSummary {
        let mut all = super::Column::EMPTY;
        let columns = || (0..self.hidden).map(|dim| self.column(index, dim));
        columns().for_each(|column| all.merge(column));
        let n = (self.sequences * self.tokens * self.hidden) as f64;
        let (m1, m2, m3, m4) = (all.sum / n, all.sum2 / n, all.sum3 / n, all.sum4 / n);
        let variance = m2 - m1 * m1;
        let fourth = m4 - 4.0 * m1 * m3 + 6.0 * m1 * m1 * m2 - 3.0 * m1.powi(4);
        SiteSummary {
            layer: self.sites[index].layer,
            point: self.sites[index].point,
            occurrences: all.count,
            features: columns().filter(|column| column.count > 0).count(),
            max_abs: all.max_abs(),
            rms: m2.sqrt(),
            kurtosis: if variance > 0.0 { fourth / (variance * variance) } else { 0.0 },
            rows: None,
            gain: None,
        }
    }
}

fn summarise(sequence: usize, rows: &[FeatureCounts]) -> SequenceSummary {
    let within = || rows.iter().map(|row| row.sequences[sequence]);
    SequenceSummary {
        sequence,
        features_any: within().filter(|w| w.any).count(),
        systematic_by_layers: within().filter(|w| w.by[0].is_some()).count(),
        systematic_by_sites: within().filter(|w| w.by[1].is_some()).count(),
        mean_nll: None,
    }
}

/// All readings on both axes, the paper's first.
fn verdicts(rows: &[FeatureCounts], sequences: usize) -> Vec<Verdict> {
    let mut verdicts = Vec::with_capacity(6);
    for reading in [Reading::Unique, Reading::MeanPerSequence, Reading::SumOverSequences] {
        for (axis_index, axis) in AXES.into_iter().enumerate() {
            let records: Vec<SystematicShares> = if reading == Reading::Unique {
                rows.iter().filter_map(|row| row.corpus[axis_index]).collect()
            } else {
                rows.iter()
                    .flat_map(|row| row.sequences.iter().filter_map(move |within| within.by[axis_index]))
                    .collect()
            };
            let divisor = if reading == Reading::MeanPerSequence { sequences } else { 1 };
            verdicts.push(verdict(reading, axis, &records, divisor));
        }
    }
    verdicts
}

fn verdict(reading: Reading, axis: Axis, records: &[SystematicShares], divisor: usize) -> Verdict {
    let mean = |of: fn(&SystematicShares) -> f64| {
        let mut sum = ExactSum::default();
        records.iter().for_each(|record| sum.add(of(record)));
        (!records.is_empty()).then(|| 100.0 * sum.value() / records.len() as f64)
    };
    Verdict {
        reading,
        axis,
        label: label(reading, axis).to_owned(),
        count: records.len() as f64 / divisor.max(1) as f64,
        mean_layer_percent: mean(|r| r.share),
        mean_sequence_percent: mean(|r| r.positions),
    }
}

fn label(reading: Reading, axis: Axis) -> &'static str {
    match (reading, axis) {
        (Reading::Unique, Axis::Layers) => "unique features, by layers (the paper)",
        (Reading::Unique, Axis::Sites) => "unique features, by norm outputs",
        (Reading::MeanPerSequence, Axis::Layers) => "mean per sequence, by layers",
        (Reading::MeanPerSequence, Axis::Sites) => "mean per sequence, by norm outputs",
        (Reading::SumOverSequences, Axis::Layers) => "sum over sequences, by layers",
        (Reading::SumOverSequences, Axis::Sites) => "sum over sequences, by norm outputs (the predecessor)",
    }
}
