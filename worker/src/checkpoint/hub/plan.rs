//! Plans the range requests for the bytes that a pass reads: ordered by file and offset, with
//! small gaps included.

use std::ops::Range;

use crate::checkpoint::source::PlannedRead;

/// Pieces up to this size are fetched together with others of their layer, whatever their unit:
/// scales of all experts, norms. Larger ones would hold memory from the first unit that needs one
/// of them to the last.
const SMALL: u64 = 256 << 10;
/// Included gaps are at most one in this many of all bytes.
const GAP_SHARE: u64 = 200;

/// A range that is requested at once, and held until its last wanted byte is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// File index.
    pub(super) file: usize,
    /// Byte range in the file.
    pub(super) range: Range<u64>,
    /// Number of bytes that will be read.
    pub(super) wanted: u64,
    /// Index of the layer that needs them.
    pub(super) layer: usize,
}

impl Part {
    pub(super) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// A piece with its index in the reading order.
#[derive(Clone)]
struct OrderedRange {
    order: usize,
    wanted: PlannedRead,
}

/// The parts, none larger than `largest`, in the order in which they are needed, without overlap.
pub(super) fn plan(wanted: &[PlannedRead], largest: u64) -> Vec<Part> {
    let pieces = by_place(wanted);
    let gap = bearable_gap(&pieces);
    let mut parts: Vec<(usize, Part)> = Vec::new();
    let mut rest = &pieces[..];
    while !rest.is_empty() {
        let (together, others) = rest.split_at(run(rest, gap, largest));
        cut(together, largest, &mut parts);
        rest = others;
    }
    parts.sort_by_key(|(order, part)| (*order, part.file, part.range.start));
    parts.into_iter().map(|(_, part)| part).collect()
}

/// Pieces sorted by position. A piece that is wanted twice counts at its first use.
fn by_place(wanted: &[PlannedRead]) -> Vec<OrderedRange> {
    let mut pieces: Vec<OrderedRange> =
        wanted.iter().enumerate().map(|(order, wanted)| OrderedRange { order, wanted: wanted.clone() }).collect();
    pieces.sort_by_key(|piece| (piece.wanted.file, piece.wanted.bytes.start, piece.order));
    let mut apart: Vec<OrderedRange> = Vec::with_capacity(pieces.len());
    for mut piece in pieces {
        if let Some(last) = apart.last().filter(|last| last.wanted.file == piece.wanted.file) {
            piece.wanted.bytes.start = piece.wanted.bytes.start.max(last.wanted.bytes.end);
        }
        if piece.wanted.bytes.start < piece.wanted.bytes.end {
            apart.push(piece);
        }
    }
    apart
}

/// Unread bytes between two neighbours, if they may be fetched together.
fn gap_between(first: &OrderedRange, second: &OrderedRange) -> Option<u64> {
    let (a, b) = (&first.wanted, &second.wanted);
    let small = |wanted: &PlannedRead| wanted.bytes.end - wanted.bytes.start <= SMALL;
    let close = a.file == b.file && a.layer == b.layer && (a.unit == b.unit || (small(a) && small(b)));
    close.then(|| b.bytes.start - a.bytes.end)
}

/// The largest gap such that all gaps up to it are a small share of the wanted bytes.
fn bearable_gap(pieces: &[OrderedRange]) -> u64 {
    let total: u64 = pieces.iter().map(|piece| piece.wanted.bytes.end - piece.wanted.bytes.start).sum();
    let mut gaps: Vec<u64> = pieces.array_windows().filter_map(|[a, b]| gap_between(a, b)).filter(|&g| g > 0).collect();
    gaps.sort_unstable();
    let mut left = total / GAP_SHARE;
    let fits = |same: &&[u64]| left.checked_sub(same.iter().sum()).inspect(|rest| left = *rest).is_some();
    gaps.chunk_by(u64::eq).take_while(fits).last().map_or(0, |same| same[0])
}

/// Number of pieces from the first on that form one range.
fn run(pieces: &[OrderedRange], gap: u64, largest: u64) -> usize {
    let start = pieces[0].wanted.bytes.start;
    let joins = |[a, b]: &[OrderedRange; 2]| {
        gap_between(a, b).is_some_and(|between| between <= gap) && b.wanted.bytes.end - start <= largest
    };
    1 + pieces.array_windows().take_while(|pair| joins(pair)).count()
}

/// One part, or several of about equal size if a piece is larger than a part may be.
fn cut(together: &[OrderedRange], largest: u64, parts: &mut Vec<(usize, Part)>) {
    let first = &together[0].wanted;
    let last = &together[together.len() - 1].wanted;
    let (file, layer, range) = (first.file, first.layer, first.bytes.start..last.bytes.end);
    let order = together.iter().map(|piece| piece.order).min().unwrap_or_default();
    let len = range.end - range.start;
    let count = len.div_ceil(largest);
    if count == 1 {
        let wanted = together.iter().map(|piece| piece.wanted.bytes.end - piece.wanted.bytes.start).sum();
        parts.push((order, Part { file, range, wanted, layer }));
        return;
    }
    let size = len.div_ceil(count);
    for start in (range.start..range.end).step_by(size as usize) {
        let range = start..(start + size).min(range.end);
        parts.push((order, Part { file, wanted: range.end - range.start, range, layer }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn wanted(file: usize, layer: usize, unit: usize, bytes: Range<u64>) -> PlannedRead {
        PlannedRead { file, bytes, layer, unit }
    }

    fn ranges(parts: &[Part]) -> Vec<(usize, Range<u64>)> {
        parts.iter().map(|part| (part.file, part.range.clone())).collect()
    }

    #[test]
    fn adjacent_tensors_of_a_unit_share_one_request() {
        let (one, two) = (wanted(0, 0, 0, MIB..2 * MIB), wanted(0, 0, 0, 2 * MIB..3 * MIB));
        let before = wanted(1, 0, 0, 0..MIB);
        let parts = plan(&[before, two, one], 8 * MIB);
        assert_eq!(ranges(&parts), [(1, 0..MIB), (0, MIB..3 * MIB)]);
        assert_eq!(parts[1].wanted, 2 * MIB);
    }

    #[test]
    fn large_ranges_of_other_units_are_not_buffered() {
        let parts = plan(&[wanted(0, 0, 0, 0..MIB), wanted(0, 0, 1, MIB..2 * MIB)], 8 * MIB);
        assert_eq!(parts.len(), 2);
        // Small pieces are, within their layer: FP8 scales of experts are adjacent, far from their
        // values.
        let scales: Vec<PlannedRead> =
            (0..256).map(|e| wanted(0, 3, e as usize, e * 10_752..(e + 1) * 10_752)).collect();
        let parts = plan(&scales, 8 * MIB);
        assert_eq!(ranges(&parts), [(0, 0..256 * 10_752)]);
        assert_eq!(plan(&[wanted(0, 0, 0, 0..10), wanted(0, 1, 1, 10..20)], MIB).len(), 2);
    }

    #[test]
    fn few_small_gaps_are_read_along() {
        let (a, b) = (wanted(0, 0, 0, 0..MIB), wanted(0, 0, 0, MIB + 4096..2 * MIB));
        let parts = plan(&[a, b], 8 * MIB);
        assert_eq!(ranges(&parts), [(0, 0..2 * MIB)]);
        assert_eq!(parts[0].wanted, 2 * MIB - 4096);
        let (a, b) = (wanted(0, 0, 0, 0..MIB), wanted(0, 0, 0, MIB + MIB / 2..2 * MIB));
        assert_eq!(plan(&[a, b], 8 * MIB).len(), 2);
        let many: Vec<PlannedRead> = (0..1000).map(|i| wanted(0, 0, 0, i * 1000..i * 1000 + 900)).collect();
        let parts = plan(&many, 8 * MIB);
        let (fetched, used): (u64, u64) = parts.iter().fold((0, 0), |(f, w), p| (f + p.len(), w + p.wanted));
        assert_eq!(used, 900 * 1000);
        assert!(fetched * 100 <= used * 101, "{fetched} for {used}");
    }

    #[test]
    fn gap_covered_by_another_part_is_read_once() {
        let parts = plan(&[wanted(0, 0, 0, 0..10), wanted(0, 0, 0, 20..30), wanted(0, 7, 9, 10..20)], MIB);
        assert_eq!(ranges(&parts), [(0, 0..10), (0, 20..30), (0, 10..20)]);
    }

    #[test]
    fn large_tensors_are_split_into_equal_parts() {
        let parts = plan(&[wanted(0, 0, 0, 5..5 + 21 * MIB)], 8 * MIB);
        assert_eq!(
            ranges(&parts),
            [(0, 5..5 + 7 * MIB), (0, 5 + 7 * MIB..5 + 14 * MIB), (0, 5 + 14 * MIB..5 + 21 * MIB)]
        );
        assert_eq!(parts.iter().map(|part| part.wanted).sum::<u64>(), 21 * MIB);
    }

    #[test]
    fn shared_range_is_fetched_once() {
        let parts =
            plan(&[wanted(0, 9, 9, 0..MIB), wanted(0, 0, 0, 0..MIB), wanted(0, 0, 0, MIB / 2..2 * MIB)], 8 * MIB);
        assert_eq!(parts.iter().map(Part::len).sum::<u64>(), 2 * MIB);
    }
}
