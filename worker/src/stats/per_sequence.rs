//! Details per sequence of systematic features, for bootstraps over sequences.

use outliers_protocol::{Feature, Thresholds, WithinSequence};

use super::OutlierStats;

impl OutlierStats {
    /// Adds to a feature where it exceeds in each sequence and by how much at each norm output, if
    /// it may be systematic in some sample of the sequences with replacement. No sample reaches
    /// more layers or norm outputs than all sequences together, nor a larger share of positions
    /// than the largest within one sequence.
    pub(super) fn detail(&self, feature: &mut Feature, thresholds: &Thresholds) {
        let positions = (0..self.sequences).map(|s| self.positions_in(s, feature.dim)).max().unwrap_or(0);
        let possible = feature.layer_fraction.max(feature.site_fraction) >= thresholds.layer_fraction
            && positions as f64 / self.tokens as f64 >= thresholds.position_fraction;
        if possible {
            feature.within = (0..self.sequences).filter_map(|s| self.within(s, feature.dim)).collect();
            let columns = (0..self.sites.len()).map(|site| self.column(site, feature.dim));
            feature.peaks = columns.filter(|column| column.count > 0).map(super::Column::peak).collect();
        }
    }

    /// Where `dim` exceeds in a sequence; `None` if it does not.
    fn within(&self, sequence: usize, dim: usize) -> Option<WithinSequence> {
        let positions = self.positions_in(sequence, dim);
        let sites = (0..self.sites.len()).filter(|site| self.hit(*site, sequence, dim));
        (positions > 0).then(|| WithinSequence { sequence, positions, sites: sites.collect() })
    }
}
