//! Compares the fused pass with an implementation by the definitions.

use std::collections::BTreeSet;

use outliers_protocol::{Axis, IndexSet, Point, Reading, Sided, Thresholds};
use outliers_scan::Rows;
use proptest::prelude::*;

use super::*;

fn sites(layers: usize) -> Vec<Site> {
    let points = [Point::BeforeAttention, Point::BeforeMlp];
    (0..layers).flat_map(|layer| points.map(|point| Site { layer, point })).collect()
}

fn host(x: &[f32], width: usize, tokens: usize) -> Values<'_> {
    Values::Host(Rows { x, width, tokens })
}

/// Whether `dim` exceeds at `(sequence, position)` at any site.
fn exceeds_at(stats: &OutlierStats, dim: usize, sequence: usize, position: usize) -> bool {
    let word = sequence * stats.words() + position / 64;
    let bits = stats.positions[dim].as_deref();
    bits.is_some_and(|b| b[word] >> (position % 64) & 1 == 1)
}

/// A small corpus of activations: `[site][token][dim]`.
#[derive(Clone, Debug)]
struct Case {
    layers: usize,
    hidden: usize,
    sequences: usize,
    tokens: usize,
    values: Vec<Vec<f32>>,
}

impl Case {
    fn stats(&self, sequences_at_once: usize) -> OutlierStats {
        let mut stats = OutlierStats::new(sites(self.layers), self.hidden, self.sequences, self.tokens, 6.0);
        for (site, x) in sites(self.layers).into_iter().zip(&self.values) {
            let step = sequences_at_once * self.tokens;
            for first in (0..self.sequences * self.tokens).step_by(step) {
                let end = (first + step).min(self.sequences * self.tokens);
                let x = &x[first * self.hidden..end * self.hidden];
                stats.count(site, first, &host(x, self.hidden, self.tokens)).unwrap();
            }
        }
        stats
    }

    fn triples(&self, dim: usize, sequences: std::ops::Range<usize>) -> Vec<(usize, usize, f32)> {
        let tokens = sequences.start * self.tokens..sequences.end * self.tokens;
        let at = |s: usize, t: usize| self.values[s][t * self.hidden + dim];
        (0..self.values.len())
            .flat_map(|s| tokens.clone().map(move |t| (s, t)))
            .map(|(s, t)| (s, t, at(s, t)))
            .filter(|(_, _, v)| v.abs() >= 6.0)
            .collect()
    }

    /// By the definition, with sets.
    fn systematic(&self, dim: usize, sequences: std::ops::Range<usize>, axis: Axis) -> bool {
        let n = sequences.len() * self.tokens;
        let triples = self.triples(dim, sequences);
        let positions: BTreeSet<usize> = triples.iter().map(|t| t.1).collect();
        let (part, whole) = match axis {
            Axis::Layers => (triples.iter().map(|t| t.0 / 2).collect::<BTreeSet<_>>().len(), self.layers),
            Axis::Sites => (triples.iter().map(|t| t.0).collect::<BTreeSet<_>>().len(), 2 * self.layers),
        };
        !triples.is_empty() && part as f64 / whole as f64 >= 0.25 && positions.len() as f64 / n as f64 >= 0.06
    }
}

prop_compose! {
    fn cases()(layers in 1usize..5, hidden in 1usize..150, sequences in 1usize..4, tokens in 1usize..70, seed in any::<u64>()) -> Case {
        let mut state = seed;
        let mut next = move || { state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1); (state >> 33) as f32 / 2f32.powi(31) };
        // Some features are large everywhere, some nowhere, some at few sites. Exact thresholds
        // occur.
        let wild: Vec<f32> = (0..hidden).map(|_| next()).collect();
        let values = (0..2 * layers).map(|_| {
            let quiet: Vec<bool> = (0..hidden).map(|_| next() < 0.5).collect();
            (0..sequences * tokens).flat_map(|_| (0..hidden).map(|d| {
                let v = (next() - 0.5) * if wild[d] < 0.3 && !quiet[d] { 14.0 } else { 5.0 };
                if v > 6.9 { 6.0 } else { v }
            }).collect::<Vec<_>>()).collect()
        }).collect();
        Case { layers, hidden, sequences, tokens, values }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn counts_and_verdicts_follow_the_definitions(case in cases()) {
        let stats = case.stats(1);
        let judged = stats.judge(&Thresholds::default());
        for dim in 0..case.hidden {
            let triples = case.triples(dim, 0..case.sequences);
            let feature = judged.features.iter().find(|f| f.dim == dim);
            prop_assert_eq!(feature.is_some(), !triples.is_empty());
            let Some(f) = feature else { continue };
            prop_assert_eq!(f.occurrences as usize, triples.len());
            prop_assert_eq!(f.positive as usize, triples.iter().filter(|t| t.2 > 0.0).count());
            prop_assert_eq!(f.n_positions as usize, triples.iter().map(|t| t.1).collect::<BTreeSet<_>>().len());
            prop_assert_eq!(f.n_sites, triples.iter().map(|t| t.0).collect::<BTreeSet<_>>().len());
            prop_assert_eq!(f.n_sites, f.layers_before_attention.len() + f.layers_before_mlp.len());
            let column = |t: fn(f32, f32) -> f32| case.values.iter().flat_map(|x| x.iter().skip(dim).step_by(case.hidden)).copied().reduce(t).unwrap();
            prop_assert_eq!((f.max, f.min), (column(f32::max), column(f32::min)));
            let positive = triples.iter().all(|t| t.2 > 0.0);
            let negative = triples.iter().all(|t| t.2 < 0.0);
            prop_assert_eq!(f.sided, if positive { Sided::Pos } else if negative { Sided::Neg } else { Sided::Both });
            for (sequence, position) in (0..case.sequences).flat_map(|s| (0..case.tokens).map(move |p| (s, p))) {
                let there = triples.iter().any(|t| t.1 == sequence * case.tokens + position);
                prop_assert_eq!(exceeds_at(&stats, dim, sequence, position), there);
            }
        }
        for verdict in &judged.verdicts {
            let whole = (0..case.hidden).filter(|d| case.systematic(*d, 0..case.sequences, verdict.axis)).count();
            let sum = (0..case.hidden).flat_map(|d| (0..case.sequences).map(move |s| (d, s)))
                .filter(|(d, s)| case.systematic(*d, *s..*s + 1, verdict.axis)).count();
            let want = match verdict.reading {
                Reading::Unique => whole as f64,
                Reading::MeanPerSequence => sum as f64 / case.sequences as f64,
                Reading::SumOverSequences => sum as f64,
            };
            prop_assert_eq!(verdict.count, want, "{}", &verdict.label);
        }
    }

    #[test]
    fn candidate_features_are_counted_per_sequence(case in cases()) {
        let judged = case.stats(1).judge(&Thresholds::default());
        for feature in &judged.features {
            let dim = feature.dim;
            let all = std::iter::once(0..case.sequences).chain((0..case.sequences).map(|s| s..s + 1));
            let systematic = all.clone().any(|sequences| [Axis::Layers, Axis::Sites].iter().any(|axis| case.systematic(dim, sequences.clone(), *axis)));
            prop_assert!(!systematic || !feature.within.is_empty());
            if feature.within.is_empty() {
                prop_assert!(feature.peaks.is_empty());
                continue;
            }
            let told: Vec<(usize, u64, String)> =
                feature.within.iter().map(|w| (w.sequence, w.positions, w.sites.to_string())).collect();
            let expected: Vec<_> = (0..case.sequences).filter_map(|s| {
                let triples = case.triples(dim, s..s + 1);
                let positions = triples.iter().map(|t| t.1).collect::<BTreeSet<_>>().len() as u64;
                let sites: IndexSet = triples.iter().map(|t| t.0).collect();
                (positions > 0).then(|| (s, positions, sites.to_string()))
            }).collect();
            prop_assert_eq!(told, expected);
            let triples = case.triples(dim, 0..case.sequences);
            let largest = |site: usize| triples.iter().filter(|t| t.0 == site).map(|t| t.2).max_by(|a, b| a.abs().total_cmp(&b.abs()));
            let peaks: Vec<f32> = (0..case.values.len()).filter_map(largest).map(f32::abs).collect();
            prop_assert_eq!(feature.peaks.iter().map(|peak| peak.abs()).collect::<Vec<_>>(), peaks);
        }
    }

    #[test]
    fn merging_and_batching_change_nothing(case in cases()) {
        let whole = case.stats(1);
        let batched = case.stats(2);
        let mut merged = OutlierStats::new(sites(case.layers), case.hidden, case.sequences, case.tokens, 6.0);
        for s in (0..case.sequences).rev() {
            let mut one = OutlierStats::new(sites(case.layers), case.hidden, case.sequences, case.tokens, 6.0);
            for (site, x) in sites(case.layers).into_iter().zip(&case.values) {
                let rows = s * case.tokens * case.hidden..(s + 1) * case.tokens * case.hidden;
                one.count(site, s * case.tokens, &host(&x[rows], case.hidden, case.tokens)).unwrap();
            }
            merged.merge(&one);
        }
        for other in [&batched, &merged] {
            let (a, b) = (whole.judge(&Thresholds::default()), other.judge(&Thresholds::default()));
            prop_assert_eq!(&a.features, &b.features);
            prop_assert_eq!(&a.verdicts, &b.verdicts);
            for (s, dim) in (0..2 * case.layers).flat_map(|s| (0..case.hidden).map(move |d| (s, d))) {
                let (x, y) = (whole.column(s, dim), other.column(s, dim));
                prop_assert!((x.sum4 - y.sum4).abs() <= 1e-5 * x.sum4.abs() + 1e-9);
            }
        }
    }
}

#[test]
fn sums_equal_those_of_the_values() {
    let x: Vec<f32> = (0..200 * 70).map(|i| ((i * 37 % 101) as f32 - 50.0) / 20.0).collect();
    let site = sites(1)[0];
    let mut stats = OutlierStats::new(vec![site], 70, 2, 100, 6.0);
    stats.count(site, 0, &host(&x, 70, 100)).unwrap();
    for dim in [0, 63, 64, 69] {
        let of = |power: i32| (0..200).map(|r| f64::from(x[r * 70 + dim]).powi(power)).sum::<f64>();
        let c = stats.column(0, dim);
        for (got, power) in [(c.sum, 1), (c.sum2, 2), (c.sum3, 3), (c.sum4, 4)] {
            assert!((got - of(power)).abs() <= 1e-5 * of(4), "power {power}: {got} against {}", of(power));
        }
    }
}

#[test]
fn non_finite_values_are_an_error_with_the_position() {
    let site = Site { layer: 3, point: Point::BeforeMlp };
    let mut stats = OutlierStats::new(vec![site], 5, 1, 4, 6.0);
    let mut x = vec![0.0; 20];
    x[13] = f32::NAN;
    let message = stats.count(site, 0, &host(&x, 5, 4)).unwrap_err().to_string();
    assert!(message.contains("layer 3") && message.contains("token 2") && message.contains("feature 3"), "{message}");
}
