//! Bookkeeping of the kept memory, by address.

/// A range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) at: usize,
    pub(crate) bytes: usize,
}

impl Span {
    fn end(self) -> usize {
        self.at + self.bytes
    }
}

/// Most kept spans.
const MAX_SPANS: usize = 256;

/// Kept spans, none adjacent to another, in the order in which they were kept. Allocates nothing.
pub(crate) struct FreeList {
    spans: [Span; MAX_SPANS],
    count: usize,
    bytes: usize,
}

impl FreeList {
    pub(crate) const fn new() -> Self {
        Self { spans: [Span { at: 0, bytes: 0 }; MAX_SPANS], count: 0, bytes: 0 }
    }

    /// Bytes of all spans.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes this many bytes from the smallest span that is large enough; returns their address.
    pub(crate) fn take(&mut self, bytes: usize) -> Option<usize> {
        let spans = &mut self.spans[..self.count];
        let (index, best) =
            spans.iter_mut().enumerate().filter(|(_, span)| span.bytes >= bytes).min_by_key(|(_, span)| span.bytes)?;
        let at = best.at;
        (best.at, best.bytes) = (best.at + bytes, best.bytes - bytes);
        self.bytes -= bytes;
        if best.bytes == 0 {
            self.remove(index);
        }
        Some(at)
    }

    /// Keeps a span, merged with adjacent spans. Returns a span that is dropped for it, if the
    /// list is full.
    #[must_use]
    pub(crate) fn keep(&mut self, mut span: Span) -> Option<Span> {
        self.bytes += span.bytes;
        while let Some(index) = self.spans[..self.count].iter().position(|s| s.end() == span.at || s.at == span.end()) {
            let beside = self.remove(index);
            span = Span { at: span.at.min(beside.at), bytes: span.bytes + beside.bytes };
        }
        let oldest = (self.count == MAX_SPANS).then(|| self.remove(0));
        self.bytes -= oldest.map_or(0, |oldest| oldest.bytes);
        self.spans[self.count] = span;
        self.count += 1;
        oldest
    }

    /// Removes at most this many bytes of the oldest span. `None` if there is none.
    pub(crate) fn drop_some(&mut self, max_bytes: usize) -> Option<Span> {
        let oldest = self.spans[..self.count].first_mut()?;
        let bytes = max_bytes.min(oldest.bytes);
        oldest.bytes -= bytes;
        self.bytes -= bytes;
        let dropped = Span { at: oldest.end(), bytes };
        if oldest.bytes == 0 {
            self.remove(0);
        }
        Some(dropped)
    }

    fn remove(&mut self, index: usize) -> Span {
        let span = self.spans[index];
        self.spans.copy_within(index + 1..self.count, index);
        self.count -= 1;
        span
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Result of one step of the test.
    fn without(places: &mut BTreeSet<usize>, span: Span) {
        for place in span.at..span.end() {
            assert!(places.remove(&place), "{place} was not kept");
        }
    }

    proptest! {
        #[test]
        fn no_byte_is_given_twice_or_lost(steps in prop::collection::vec((0..3u8, 0..400usize, 1..9usize), 1..800)) {
            let (mut kept, mut places) = (FreeList::new(), BTreeSet::new());
            for (kind, at, bytes) in steps {
                let span = Span { at, bytes };
                match kind {
                    0 if (at..span.end()).all(|place| !places.contains(&place)) => {
                        places.extend(at..span.end());
                        if let Some(dropped) = kept.keep(span) {
                            without(&mut places, dropped);
                        }
                    }
                    0 => {}
                    1 => match kept.take(bytes) {
                        Some(at) => without(&mut places, Span { at, bytes }),
                        None => prop_assert!(kept.spans[..kept.count].iter().all(|span| span.bytes < bytes)),
                    },
                    _ => match kept.drop_some(bytes) {
                        Some(dropped) => {
                            prop_assert!(dropped.bytes <= bytes && dropped.bytes > 0);
                            without(&mut places, dropped);
                        }
                        None => prop_assert!(places.is_empty()),
                    },
                }
                prop_assert_eq!(kept.bytes(), places.len());
            }
        }
    }

    #[test]
    fn best_fit_is_taken_and_neighbours_are_merged() {
        let mut kept = FreeList::new();
        for (at, bytes) in [(100, 50), (200, 10), (300, 20)] {
            assert_eq!(kept.keep(Span { at, bytes }), None);
        }
        assert_eq!((kept.take(10), kept.take(11), kept.take(50)), (Some(200), Some(300), Some(100)));
        assert_eq!((kept.take(10), kept.take(9)), (None, Some(311)));
        for at in [0, 20, 10] {
            assert_eq!(kept.keep(Span { at, bytes: 10 }), None);
        }
        assert_eq!((kept.count, kept.take(30)), (1, Some(0)));
    }

    #[test]
    fn oldest_block_is_released_when_too_many_are_kept() {
        let mut kept = FreeList::new();
        for place in 0..MAX_SPANS {
            assert_eq!(kept.keep(Span { at: 2 * place, bytes: 1 }), None);
        }
        assert_eq!(kept.keep(Span { at: 2 * MAX_SPANS, bytes: 1 }), Some(Span { at: 0, bytes: 1 }));
        assert_eq!(kept.bytes(), MAX_SPANS);
    }
}
