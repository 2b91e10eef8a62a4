//! Writes a pass's time line in Chrome's Trace Event Format, for `chrome://tracing` and
//! <https://ui.perfetto.dev>: one row per device and per loader, complete events (`ph: X`) with
//! layer and micro-batches as arguments, and times in microseconds since the start of the pass.

use std::path::Path;

use serde::Serialize;

use crate::device::Placement;
use crate::error::{Result, WorkerError};
use crate::files::write_atomic;
use crate::pass::meter::{Span, Subject, Thread};

#[derive(Serialize)]
struct TraceFile<'a> {
    #[serde(rename = "displayTimeUnit")]
    display_time_unit: &'static str,
    #[serde(rename = "traceEvents")]
    events: Vec<Event<'a>>,
}

#[derive(Serialize)]
#[serde(tag = "ph")]
enum Event<'a> {
    /// Name of a row.
    M { name: &'static str, pid: u32, tid: usize, args: Name },
    /// A piece of work.
    X { name: &'static str, pid: u32, tid: usize, ts: f64, dur: f64, args: About<'a> },
}

#[derive(Serialize)]
struct Name {
    name: String,
}

struct About<'a>(&'a Subject);

impl Serialize for About<'_> {
    fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        let batches = self.0.micro_batches.as_ref();
        let numbers = [
            ("layer", self.0.layer),
            ("micro_batch", batches.map(|range| range.start)),
            ("micro_batches", batches.map(|range| range.len())),
        ];
        to.collect_map(numbers.into_iter().filter_map(|(name, number)| Some((name, number?))))
    }
}

/// Process id of all rows.
const PROCESS: u32 = 1;

/// Writes the time line of a pass over `devices`.
///
/// # Errors
/// Storage.
pub fn write(path: &Path, spans: &[Span], devices: &[Placement]) -> Result<()> {
    let rows = (0..devices.len()).flat_map(|device| [Thread::Device(device), Thread::Loader(device)]);
    let named = rows.map(|thread| {
        let args = Name { name: row_name(thread, devices) };
        Event::M { name: "thread_name", pid: PROCESS, tid: row(thread), args }
    });
    let worked = spans.iter().map(|span| {
        let microseconds = |nanoseconds: u128| nanoseconds as f64 / 1e3;
        let (ts, end) = (span.start.as_nanos(), span.end.as_nanos());
        Event::X {
            name: span.work.word(),
            pid: PROCESS,
            tid: row(span.thread),
            ts: microseconds(ts),
            dur: microseconds(end - ts),
            args: About(&span.subject),
        }
    });
    let document = TraceFile { display_time_unit: "ms", events: named.chain(worked).collect() };
    let text = serde_json::to_vec(&document);
    write_atomic(path, &text.map_err(|e| WorkerError::internal(format!("the time line cannot be written: {e}")))?)
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
