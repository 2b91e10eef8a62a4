//! The largest values of many.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use outliers_protocol::Record;
use outliers_scan::{Histogram, Large, Scan};

use serde::{Deserialize, Serialize, Serializer};

use super::values::Values;
use crate::error::Result;

/// One value with its location. Ordered by magnitude; of equal ones the earlier location is
/// greater, so that the greatest values of a set do not depend on their order.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TopValue {
    /// Layer.
    pub layer: usize,
    /// Token index in the corpus.
    pub token: usize,
    /// Expert, for an expert's output.
    pub expert: Option<usize>,
    /// Feature.
    pub dim: usize,
    /// The signed, finite value.
    pub value: f32,
}

impl TopValue {
    /// Bits of |value|, ordered as magnitudes.
    fn bits(&self) -> u32 {
        self.value.abs().to_bits()
    }

    /// The record for reports. `ids` are the token ids `[sequences, tokens]`.
    pub fn record(&self, ids: &[i64], tokens: usize) -> Record {
        Record {
            layer: self.layer,
            expert: self.expert,
            sequence: self.token / tokens,
            position: self.token % tokens,
            token_id: ids[self.token],
            dim: self.dim,
            value: self.value,
        }
    }
}

impl Eq for TopValue {}

impl Ord for TopValue {
    fn cmp(&self, other: &Self) -> Ordering {
        let key = |f: &Self| (f.bits(), Reverse((f.layer, f.token, f.expert, f.dim)));
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for TopValue {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The `limit` greatest of all offered items.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(bound(deserialize = "T: Ord + Deserialize<'de>"))]
#[serde(bound(serialize = "T: Ord + Clone + Serialize"))]
pub struct Top<T> {
    limit: usize,
    #[serde(serialize_with = "sorted")]
    least_first: BinaryHeap<Reverse<T>>,
}

/// Serialises in sorted order, since a heap's order depends on that of the items.
fn sorted<T, S>(heap: &BinaryHeap<Reverse<T>>, serializer: S) -> std::result::Result<S::Ok, S::Error>
where
    T: Ord + Clone + Serialize,
    S: Serializer,
{
    heap.clone().into_sorted_vec().serialize(serializer)
}

impl<T: Ord + Clone> Top<T> {
    /// Empty. `limit` > 0.
    pub fn new(limit: usize) -> Self {
        Self { limit, least_first: BinaryHeap::with_capacity(limit) }
    }

    /// Keeps the item if it is among the `limit` greatest.
    pub fn offer(&mut self, item: T) {
        if self.least_first.len() < self.limit {
            self.least_first.push(Reverse(item));
        } else if self.floor().is_some_and(|least| *least < item) {
            self.least_first.pop();
            self.least_first.push(Reverse(item));
        }
    }

    /// The smallest kept item, once `limit` items are kept.
    fn floor(&self) -> Option<&T> {
        self.least_first.peek().filter(|_| self.least_first.len() == self.limit).map(|least| &least.0)
    }

    /// Offers the items of another.
    pub fn merge(&mut self, other: &Self) {
        other.least_first.iter().for_each(|item| self.offer(item.0.clone()));
    }

    /// The kept items, greatest first.
    pub fn descending(&self) -> Vec<T> {
        let mut items: Vec<T> = self.least_first.iter().map(|item| item.0.clone()).collect();
        items.sort_unstable_by(|a, b| b.cmp(a));
        items
    }
}

impl Top<TopValue> {
    /// Offers all values `x`, with their `scans`. `found` makes a candidate of a row, a dimension
    /// and a value. Values that are too small are skipped.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn offer_values(
        &mut self,
        x: &Values<'_>,
        scans: &[Scan],
        found: impl Fn(usize, usize, f32) -> TopValue,
    ) -> Result<()> {
        let mut magnitudes = Histogram::default();
        scans.iter().for_each(|scan| magnitudes.merge(&scan.magnitudes));
        let floor = magnitudes.floor_of_largest(self.limit as u64).max(self.floor().map_or(0, TopValue::bits));
        let rows = scans.iter().flat_map(|scan| &scan.rows).enumerate();
        let asked = rows.filter(|(_, row)| row.max_bits >= floor).map(|(row, _)| (row, floor));
        for Large { row, dim, value } in x.large(&asked.collect::<Vec<_>>())? {
            self.offer(found(row, dim, value));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use outliers_scan::Rows;

    use super::*;

    fn at(value: f32, token: usize, dim: usize) -> TopValue {
        TopValue { layer: 0, token, expert: None, dim, value }
    }

    proptest! {
        #[test]
        fn largest_values_are_kept_in_any_order(
            values in prop::collection::vec(-9i8..9, 1..80), limit in 1usize..12, cut in 0usize..80,
        ) {
            let all: Vec<TopValue> = values.iter().enumerate().map(|(i, v)| at(f32::from(*v), i, 0)).collect();
            let mut sorted = all.clone();
            sorted.sort_by(|a, b| b.cmp(a));
            sorted.truncate(limit);
            let keep = |items: &[TopValue]| {
                let mut top = Top::new(limit);
                items.iter().for_each(|item| top.offer(*item));
                top
            };
            let (left, right) = all.split_at(cut.min(all.len()));
            let mut merged = keep(right);
            merged.merge(&keep(left));
            prop_assert_eq!(keep(&all).descending(), sorted.clone());
            prop_assert_eq!(merged.descending(), sorted);
            let bytes = |top: &Top<TopValue>| postcard::to_stdvec(top).unwrap();
            prop_assert_eq!(bytes(&keep(&all)), bytes(&merged));
            let read: Top<TopValue> = postcard::from_bytes(&bytes(&merged)).unwrap();
            prop_assert_eq!(read.descending(), merged.descending());
        }

        #[test]
        fn whole_rows_equal_single_values(values in prop::collection::vec(-9i8..9, 24), limit in 1usize..30) {
            let x: Vec<f32> = values.iter().map(|v| f32::from(*v)).collect();
            let (mut rows, mut singly) = (Top::new(limit), Top::new(limit));
            let host = Rows { x: &x, width: 6, tokens: 2 };
            rows.offer_values(&Values::Host(host), &host.scan(), |row, dim, value| at(value, row, dim)).unwrap();
            x.iter().enumerate().for_each(|(i, v)| singly.offer(at(*v, i / 6, i % 6)));
            prop_assert_eq!(rows.descending(), singly.descending());
        }
    }

    #[test]
    fn equal_magnitudes_are_ordered_by_position() {
        let mut top = Top::new(2);
        for (token, value) in [(5, 2.0), (3, -2.0), (4, 2.0), (1, 1.0)] {
            top.offer(at(value, token, 0));
        }
        assert_eq!(top.descending(), [at(-2.0, 3, 0), at(2.0, 4, 0)]);
    }
}
