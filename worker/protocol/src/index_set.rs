//! Sets of indices and their text form.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A set of indices, written as ascending ranges: `0-3, 7`. It stores ranges, so its size does not
/// depend on how large the indices are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IndexSet(Vec<RangeInclusive<usize>>);

impl IndexSet {
    /// The ranges, ascending, with gaps between them.
    pub fn ranges(&self) -> impl Iterator<Item = RangeInclusive<usize>> {
        self.0.iter().cloned()
    }

    /// The largest index.
    pub fn last(&self) -> Option<usize> {
        self.0.last().map(|range| *range.end())
    }
}

impl FromIterator<usize> for IndexSet {
    fn from_iter<I: IntoIterator<Item = usize>>(indices: I) -> Self {
        let mut ranges: Vec<RangeInclusive<usize>> = Vec::new();
        for index in indices.into_iter().collect::<BTreeSet<usize>>() {
            match ranges.last_mut() {
                Some(last) if last.end().checked_add(1) == Some(index) => *last = *last.start()..=index,
                _ => ranges.push(index..=index),
            }
        }
        Self(ranges)
    }
}

impl fmt::Display for IndexSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, range) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            match (range.start(), range.end()) {
                (start, end) if start == end => write!(f, "{comma}{start}")?,
                (start, end) => write!(f, "{comma}{start}-{end}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for IndexSet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a set of indices: write ascending ranges such as 0-3, 7");
        let mut ranges: Vec<RangeInclusive<usize>> = Vec::new();
        for part in text.split(',').map(str::trim).filter(|_| !text.trim().is_empty()) {
            let (start, end) = part.split_once('-').unwrap_or((part, part));
            let (Ok(start), Ok(end)) = (start.parse(), end.parse()) else { return Err(wrong()) };
            if start > end || ranges.last().is_some_and(|last| *last.end() >= start) {
                return Err(wrong());
            }
            ranges.push(start..=end);
        }
        Ok(Self(ranges))
    }
}

impl TryFrom<String> for IndexSet {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<IndexSet> for String {
    fn from(set: IndexSet) -> Self {
        set.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_sets_round_trip_as_ranges() {
        for (indices, text) in [
            (vec![], ""),
            (vec![7], "7"),
            (vec![0, 1, 2, 5, 7, 8], "0-2, 5, 7-8"),
            (vec![3, 1, 2, 1], "1-3"),
            (vec![usize::MAX, usize::MAX - 1, 0], "0, 18446744073709551614-18446744073709551615"),
        ] {
            let set: IndexSet = indices.iter().copied().collect();
            assert_eq!(set.to_string(), text);
            assert_eq!(text.parse(), Ok(set.clone()));
            assert_eq!(set.last(), indices.iter().copied().max());
        }
        for text in [",", "3-1", "1, 1", "0-3, 3", "2, 1", "-1", "1-", "a", "1 2", "99999999999999999999"] {
            assert!(text.parse::<IndexSet>().unwrap_err().contains(text), "{text}");
        }
    }
}
