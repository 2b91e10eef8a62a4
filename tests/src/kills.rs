//! Points at which a controller is killed, and how many of them were struck.

use std::sync::atomic::{AtomicUsize, Ordering};

/// `OUTLIERS_KILLS` points, else so many as is `usual`: half of them `named` ones, or all of those,
/// and the others at these parts of the time that a run takes.
pub fn points<P: Copy>(usual: usize, named: &[P], time: fn(f64) -> P) -> Vec<P> {
    let count: usize = std::env::var("OUTLIERS_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(usual);
    let kept = named.len().min(count.div_ceil(2));
    let times = count - kept;
    let of_named = (0..kept).map(|i| named[i * named.len() / kept]);
    of_named.chain((0..times).map(|i| time((i as f64 + 0.5) / times as f64))).collect()
}

/// Strikes at all points, some at the same time, since most of the time is waiting; returns how
/// many controllers died of it, as `strike` tells.
pub fn strike_all<P: Copy + Sync>(points: &[P], strike: impl Fn(P) -> bool + Sync) -> usize {
    let (next, died) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let each = || {
        while let Some(point) = points.get(next.fetch_add(1, Ordering::SeqCst)) {
            died.fetch_add(usize::from(strike(*point)), Ordering::SeqCst);
        }
    };
    std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(each))));
    died.into_inner()
}
