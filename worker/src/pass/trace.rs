//! Writes a pass's time line in Chrome's Trace Event Format, for `chrome://tracing` and
//! <https://ui.perfetto.dev>: one row per device and per loader, complete events (`ph: X`) with
//! layer and micro-batches as arguments, and times in microseconds since the start of the pass.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::device::Placement;
use crate::error::Result;
use crate::files::write_atomic;
use crate::pass::meter::{Span, Subject, Thread};

/// Process id of all rows.
const PROCESS: u32 = 1;

/// Writes the time line of a pass over `devices`.
///
/// # Errors
/// Storage.
pub fn write(path: &Path, spans: &[Span], devices: &[Placement]) -> Result<()> {
    let rows = (0..devices.len()).flat_map(|device| [Thread::Device(device), Thread::Loader(device)]);
    let named = rows.map(|thread| {
        let args = json!({"name": row_name(thread, devices)});
        json!({"ph": "M", "name": "thread_name", "pid": PROCESS, "tid": row(thread), "args": args})
    });
    let worked = spans.iter().map(|Span { thread, work, subject, start, end }| {
        let microseconds = |nanoseconds: u128| nanoseconds as f64 / 1e3;
        let (ts, dur) = (microseconds(start.as_nanos()), microseconds(end.as_nanos() - start.as_nanos()));
        let (name, tid, args) = (work.word(), row(*thread), about(subject));
        json!({"ph": "X", "name": name, "pid": PROCESS, "tid": tid, "ts": ts, "dur": dur, "args": args})
    });
    let document = json!({"displayTimeUnit": "ms", "traceEvents": named.chain(worked).collect::<Vec<_>>()});
    write_atomic(path, document.to_string().as_bytes())
}

/// Arguments of an event.
fn about(subject: &Subject) -> Map<String, Value> {
    let batches = subject.micro_batches.as_ref();
    let numbers = [
        ("layer", subject.layer),
        ("micro_batch", batches.map(|range| range.start)),
        ("micro_batches", batches.map(|range| range.len())),
    ];
    numbers.into_iter().filter_map(|(name, number)| Some((name.to_owned(), number?.into()))).collect()
}

/// Index of a thread's row: a device's row is above its loader's.
fn row(thread: Thread) -> usize {
    match thread {
        Thread::Device(device) => 2 * device,
        Thread::Loader(device) => 2 * device + 1,
    }
}

fn row_name(thread: Thread, devices: &[Placement]) -> String {
    match thread {
        Thread::Device(device) => devices[device].name.clone(),
        Thread::Loader(device) => format!("{} loader", devices[device].name),
    }
}
