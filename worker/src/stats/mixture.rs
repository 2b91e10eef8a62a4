//! Routers and experts: load, gate mass, largest outputs of down projections, super-expert
//! candidates.

use std::collections::BTreeMap;

use outliers_protocol::{ExpertPeak, RouterSummary, SuperExperts};
use outliers_scan::Scan;

use serde::{Deserialize, Serialize};

use super::exact::ExactSum;
use super::top::{Top, TopValue};
use super::values::Values;
use crate::blocks::ffn::{GpuRouting, Routing};
use crate::device::gpu::Load;
use crate::error::{Result, WorkerError};

/// Tokens routed to one expert.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ExpertLoad {
    /// Number of tokens.
    pub tokens: u64,
    /// Number of tokens at position 0.
    pub tokens_at_position_0: u64,
    mass: ExactSum,
    mass_at_position_0: ExactSum,
}

impl ExpertLoad {
    /// Sum of the gate weights of its tokens.
    pub fn gate_mass(&self) -> f64 {
        self.mass.value()
    }

    /// Sum of the gate weights of its tokens at position 0.
    pub fn gate_mass_at_position_0(&self) -> f64 {
        self.mass_at_position_0.value()
    }

    fn add(&mut self, load: &Load) {
        self.tokens += load.tokens;
        self.tokens_at_position_0 += load.tokens_at_position_0;
        self.mass.add_windows(&load.mass);
        self.mass_at_position_0.add_windows(&load.mass_at_position_0);
    }

    fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.tokens_at_position_0 += other.tokens_at_position_0;
        self.mass.merge(&other.mass);
        self.mass_at_position_0.merge(&other.mass_at_position_0);
    }
}

/// Statistics of a router.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouterStats {
    /// One per expert.
    pub loads: Vec<ExpertLoad>,
    experts_per_token: usize,
    tokens: u64,
    tokens_at_position_0: u64,
}

impl RouterStats {
    /// Empty statistics.
    pub fn new(experts: usize) -> Self {
        Self { loads: vec![ExpertLoad::default(); experts], experts_per_token: 0, tokens: 0, tokens_at_position_0: 0 }
    }

    /// Adds choices. The first row is token `first_token`, in sequences of `tokens` tokens.
    pub fn add(&mut self, first_token: usize, tokens: usize, routing: &Routing) {
        self.experts_per_token = routing.top_k;
        let rows = routing.experts.chunks_exact(routing.top_k).zip(routing.weights.chunks_exact(routing.top_k));
        for (r, (experts, weights)) in rows.enumerate() {
            let first = (first_token + r).is_multiple_of(tokens);
            self.tokens += 1;
            self.tokens_at_position_0 += u64::from(first);
            for (expert, weight) in experts.iter().zip(weights) {
                let load = &mut self.loads[*expert as usize];
                load.tokens += 1;
                load.mass.add(f64::from(*weight));
                if first {
                    load.tokens_at_position_0 += 1;
                    load.mass_at_position_0.add(f64::from(*weight));
                }
            }
        }
    }

    /// As [`add`](Self::add), for choices on a GPU with their sums per expert.
    ///
    /// # Errors
    /// Internal: the GPU did not sum them.
    pub fn add_loads(&mut self, first_token: usize, tokens: usize, routing: &GpuRouting) -> Result<()> {
        let (rows, top_k) = routing.experts.dims2()?;
        if routing.loads.len() != self.loads.len() {
            return Err(WorkerError::internal("choices are counted that a GPU did not sum up"));
        }
        self.experts_per_token = top_k;
        self.tokens += rows as u64;
        let sequences = |end: usize| end.div_ceil(tokens) as u64;
        self.tokens_at_position_0 += sequences(first_token + rows) - sequences(first_token);
        self.loads.iter_mut().zip(&routing.loads).for_each(|(of, load)| of.add(load));
        Ok(())
    }

    /// Adds statistics of other tokens.
    pub fn merge(&mut self, other: &Self) {
        self.experts_per_token = self.experts_per_token.max(other.experts_per_token);
        self.tokens += other.tokens;
        self.tokens_at_position_0 += other.tokens_at_position_0;
        self.loads.iter_mut().zip(&other.loads).for_each(|(a, b)| a.merge(b));
    }

    /// The result for reports.
    pub fn summary(&self, layer: usize) -> RouterSummary {
        let pairs: u64 = self.loads.iter().map(|load| load.tokens).sum();
        let experts = self.loads.len();
        let busiest = first_largest(self.loads.iter().map(|load| load.tokens as f64));
        let (mut first, mut all) = (ExactSum::default(), ExactSum::default());
        self.loads.iter().for_each(|load| {
            first.merge(&load.mass_at_position_0);
            all.merge(&load.mass);
        });
        let (first, all) = (first.value(), all.value());
        let favourite = first_largest(self.loads.iter().map(ExpertLoad::gate_mass_at_position_0));
        let of_favourite = self.loads[favourite].gate_mass_at_position_0();
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        RouterSummary {
            layer,
            experts,
            experts_per_token: self.experts_per_token,
            never_hit: self.loads.iter().filter(|load| load.tokens == 0).count(),
            max_over_mean: share((self.loads[busiest].tokens * experts as u64) as f64, pairs as f64),
            busiest,
            normalised_entropy: self.normalised_entropy(pairs as f64),
            gate_mass_per_token: share(all, self.tokens as f64),
            gate_mass_per_token_at_position_0: share(first, self.tokens_at_position_0 as f64),
            favourite_at_position_0: favourite,
            favourite_share_at_position_0: share(of_favourite, first),
            favourite_share_elsewhere: share(self.loads[favourite].gate_mass() - of_favourite, all - first),
        }
    }

    /// 1 for a single expert.
    fn normalised_entropy(&self, pairs: f64) -> f64 {
        let shares = self.loads.iter().map(|load| load.tokens as f64 / pairs).filter(|share| *share > 0.0);
        let entropy: f64 = shares.map(|share| -share * share.ln()).sum();
        if self.loads.len() > 1 { entropy / (self.loads.len() as f64).ln() } else { 1.0 }
    }
}

/// Index of the largest value, the first if several are equal.
fn first_largest(values: impl Iterator<Item = f64>) -> usize {
    values.enumerate().fold((0, f64::NEG_INFINITY), |best, (i, v)| if v > best.1 { (i, v) } else { best }).0
}

/// The value of largest magnitude in the output of each expert of a layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExpertPeaks {
    /// One per expert; `None` before its first token.
    pub peaks: Vec<Option<TopValue>>,
}

impl ExpertPeaks {
    /// Empty.
    pub fn new(experts: usize) -> Self {
        Self { peaks: vec![None; experts] }
    }

    /// Adds the values `x` of one expert, with their `scans`. `found` gives the location of a
    /// value by row and dimension.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn add(
        &mut self,
        expert: usize,
        x: &Values<'_>,
        scans: &[Scan],
        found: impl Fn(usize, usize, f32) -> TopValue,
    ) -> Result<()> {
        let mut top = Top::new(1);
        top.offer_values(x, scans, found)?;
        self.offer(expert, top.descending().first().copied());
        Ok(())
    }

    fn offer(&mut self, expert: usize, found: Option<TopValue>) {
        self.peaks[expert] = self.peaks[expert].max(found);
    }

    /// Adds the peaks of other tokens.
    pub fn merge(&mut self, other: &Self) {
        other.peaks.iter().enumerate().for_each(|(expert, found)| self.offer(expert, *found));
    }
}

/// Share of the layers, from the first on, whose experts are candidates.
const LAYERS_CONSIDERED: f64 = 0.75;
/// Percentile of the peaks that a candidate exceeds.
const PERCENTILE: f64 = 99.5;
/// Fraction of the largest peak that a candidate exceeds.
const PART_OF_MAX: f64 = 0.1;
/// The rule, for reports.
const RULE: &str = "max |down_proj output| over the 99.5th percentile and over 0.1 x the maximum of all routed experts with a token in the first 75 % of \
                    the layers (Su et al. 2025, as their code has it; shared experts are left out)";

/// Finds super experts by the peaks in a model of `layers` layers. `None` if no expert of the
/// layers considered has a peak.
pub fn super_experts(
    layers: usize,
    peaks: &BTreeMap<usize, ExpertPeaks>,
    loads: &BTreeMap<usize, RouterStats>,
    record: impl Fn(&TopValue) -> outliers_protocol::Record,
) -> Option<SuperExperts> {
    let layers_considered = (LAYERS_CONSIDERED * layers as f64).round_ties_even() as usize;
    let considered = peaks.range(..layers_considered).flat_map(|(_, layer)| layer.peaks.iter().flatten());
    let mut considered: Vec<TopValue> = considered.copied().collect();
    considered.sort_unstable_by(|a, b| b.cmp(a));
    let max = considered.first()?.value.abs();
    let ascending: Vec<f64> = considered.iter().rev().map(|found| f64::from(found.value.abs())).collect();
    let percentile = percentile(&ascending, PERCENTILE);
    let is_candidate = |found: &TopValue| {
        let a = f64::from(found.value.abs());
        a > percentile && a > PART_OF_MAX * f64::from(max)
    };
    let peak = |found: &TopValue| {
        let tokens = found.expert.and_then(|expert| Some(loads.get(&found.layer)?.loads.get(expert)?.tokens));
        ExpertPeak { at: record(found), tokens: tokens.unwrap_or_default() }
    };
    // Peaks are sorted, so candidates are a prefix.
    let candidates = considered.partition_point(is_candidate);
    Some(SuperExperts {
        rule: RULE.to_owned(),
        layers_considered,
        experts_considered: considered.len(),
        percentile_99_5: percentile,
        max,
        candidates: considered[..candidates].iter().map(peak).collect(),
        runner_up: considered.get(candidates).map(peak),
    })
}

/// Percentile by linear interpolation between the nearest ranks. `ascending` must not be empty.
fn percentile(ascending: &[f64], percent: f64) -> f64 {
    let at = percent / 100.0 * (ascending.len() - 1) as f64;
    let (low, part) = (at.floor() as usize, at.fract());
    let high = (low + 1).min(ascending.len() - 1);
    ascending[low] + part * (ascending[high] - ascending[low])
}

#[cfg(test)]
mod tests {
    use outliers_protocol::Record;
    use proptest::prelude::*;

    use super::*;

    fn routing(top_k: usize, experts: &[u32], weights: &[f32]) -> Routing {
        Routing { top_k, experts: experts.to_vec(), weights: weights.to_vec(), scales_input: false }
    }

    #[test]
    fn router_loads_and_masses_are_counted() {
        // Two sequences of two tokens, two of four experts each.
        let mut stats = RouterStats::new(4);
        stats.add(0, 2, &routing(2, &[0, 2, 0, 1], &[0.5, 0.25, 0.75, 0.125]));
        stats.add(2, 2, &routing(2, &[0, 2, 0, 1], &[0.25, 0.5, 0.5, 0.5]));
        let summary = stats.summary(7);
        assert_eq!((summary.layer, summary.experts, summary.experts_per_token, summary.never_hit), (7, 4, 2, 1));
        assert_eq!((summary.busiest, summary.max_over_mean), (0, 2.0));
        let entropy = -(0.5f64 * 0.5f64.ln() + 2.0 * 0.25 * 0.25f64.ln()) / 4f64.ln();
        assert!((summary.normalised_entropy - entropy).abs() < 1e-12);
        assert_eq!(summary.gate_mass_per_token, 3.375 / 4.0);
        assert_eq!(summary.gate_mass_per_token_at_position_0, 0.75);
        assert_eq!(summary.favourite_at_position_0, 0, "0.75 to each of 0 and 2: the first");
        assert_eq!((summary.favourite_share_at_position_0, summary.favourite_share_elsewhere), (0.5, 1.25 / 1.875));
        assert_eq!((stats.loads[2].tokens_at_position_0, stats.loads[2].gate_mass()), (2, 0.75));
    }

    #[test]
    fn load_balance_covers_even_load_and_single_expert() {
        let mut even = RouterStats::new(3);
        even.add(0, 3, &routing(1, &[0, 1, 2], &[1.0; 3]));
        let mut single = RouterStats::new(1);
        single.add(0, 3, &routing(1, &[0, 0, 0], &[1.0; 3]));
        for summary in [even.summary(0), single.summary(0)] {
            assert!((summary.normalised_entropy - 1.0).abs() < 1e-12);
            assert_eq!((summary.max_over_mean, summary.never_hit), (1.0, 0));
        }
    }

    proptest! {
        #[test]
        fn batching_and_order_change_nothing(
            picks in prop::collection::vec((0u32..5, 0f32..1.0), 12), cut in 0usize..=4,
        ) {
            let of = |range: std::ops::Range<usize>| {
                let mut stats = RouterStats::new(5);
                let picks = &picks[range.start * 3..range.end * 3];
                let (experts, weights): (Vec<u32>, Vec<f32>) = picks.iter().copied().unzip();
                stats.add(range.start, 2, &routing(3, &experts, &weights));
                stats
            };
            let mut merged = of(cut..4);
            merged.merge(&of(0..cut));
            prop_assert_eq!(merged, of(0..4));
        }
    }

    fn peaks(layers: &[&[Option<f32>]]) -> BTreeMap<usize, ExpertPeaks> {
        let found = |layer, expert, value| TopValue { layer, token: 0, expert: Some(expert), dim: 0, value };
        let layer = |(layer, values): (usize, &&[Option<f32>])| {
            let peaks = values.iter().enumerate().map(|(e, v)| v.map(|v| found(layer, e, v))).collect();
            (layer, ExpertPeaks { peaks })
        };
        layers.iter().enumerate().map(layer).collect()
    }

    fn judged(total_layers: usize, layers: &[&[Option<f32>]]) -> Option<SuperExperts> {
        super_experts(total_layers, &peaks(layers), &BTreeMap::new(), |found| found.record(&[0], 1))
    }

    #[test]
    fn super_experts_stand_out_in_the_first_layers() {
        let calm: Vec<Option<f32>> = (0..400).map(|e| Some(1.0 + e as f32 / 1000.0)).collect();
        let (mut early, mut late) = (calm.clone(), calm.clone());
        early[7] = Some(-740.0);
        early[9] = Some(60.0);
        early[11] = None;
        late[3] = Some(5000.0);
        // Four layers: the first three are considered.
        let judged = judged(4, &[&calm, &early, &calm, &late]).unwrap();
        assert_eq!((judged.layers_considered, judged.experts_considered, judged.max), (3, 1199, 740.0));
        let place = |peak: &ExpertPeak| (peak.at.layer, peak.at.expert, peak.at.value);
        assert_eq!(judged.candidates.iter().map(place).collect::<Vec<_>>(), [(1, Some(7), -740.0)]);
        assert_eq!(judged.runner_up.as_ref().map(place), Some((1, Some(9), 60.0)), "below a tenth of the largest");
    }

    #[test]
    fn at_most_half_a_percent_are_candidates() {
        // With few experts only the largest exceeds the percentile, and only if it is unique.
        let few = judged(1, &[&[Some(3.0), Some(-8.0), Some(2.0)]]).unwrap();
        assert_eq!(few.candidates.iter().map(|c| c.at.value).collect::<Vec<_>>(), [-8.0]);
        assert!((few.percentile_99_5 - 7.95).abs() < 1e-9, "numpy.percentile([3, 8, 2], 99.5) = 7.95");
        assert!(judged(1, &[&[Some(8.0), Some(8.0)]]).unwrap().candidates.is_empty());
        assert_eq!(judged(1, &[&[None, None]]), None);
        assert_eq!(judged(4, &[&[None], &[None], &[None], &[Some(9.0)]]), None, "the last layer is not considered");
    }

    #[test]
    fn expert_peak_is_its_largest_value_anywhere() {
        let x = [1.0, -2.0, 0.5, /* */ 1.5, 2.0, -1.0];
        let host = outliers_scan::Rows { x: &x, width: 3, tokens: 2 };
        let (scans, x) = (host.scan(), Values::Host(host));
        let found = |offset: usize| {
            move |row: usize, dim, value| TopValue { layer: 2, token: offset + row, expert: Some(1), dim, value }
        };
        let (mut whole, mut later) = (ExpertPeaks::new(2), ExpertPeaks::new(2));
        whole.add(1, &x, &scans, found(10)).unwrap();
        later.add(1, &x, &scans, found(20)).unwrap();
        later.merge(&whole);
        assert_eq!(whole.peaks[0], None);
        let Record { position, dim, value, .. } = later.peaks[1].unwrap().record(&[0; 30], 30);
        assert_eq!((position, dim, value), (10, 1, -2.0), "of equals the earlier token's, the first");
    }
}
