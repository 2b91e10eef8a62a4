//! Reports progress: `progress.jsonl` for programs, a bar or plain lines for people.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use indicatif::{ProgressBar, ProgressStyle};
use outliers_protocol::{Phase, Progress, SCHEMA};

use crate::error::{IoContext, Result};
use crate::model::decoder::StreamingUnit;

/// Maximum pause between lines of `progress.jsonl`: a follower takes a longer one for a hang.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Minimum time between two lines of the same phase, so that thousands of small units do not write
/// thousands of lines.
const QUIET: Duration = Duration::from_millis(200);

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// The destination of progress. Shared by reference. Every method may be called from any thread.
pub struct ProgressSink {
    shared: Arc<Shared>,
    heart: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    stop: Condvar,
}

struct State {
    file: Option<File>,
    last: Progress,
    written: Instant,
    layers_began: Instant,
    /// The layer at which this process began.
    first_layer: usize,
    tokens: usize,
    phase_began: Instant,
    seconds: Vec<(Phase, f64)>,
    /// Whether progress is shown to people, as a bar or as lines.
    talk: bool,
    bar: Option<ProgressBar>,
    stopping: bool,
}

impl ProgressSink {
    /// Appends to `file` if one is given; writes to standard error if `talk`.
    ///
    /// # Errors
    /// Storage: the file cannot be created.
    pub fn new(file: Option<&Path>, talk: bool) -> Result<Self> {
        let open = |path: &Path| File::options().create(true).append(true).open(path).at("create", path);
        let bar = (talk && std::io::stderr().is_terminal()).then(|| ProgressBar::new(0).with_style(style()));
        let now = Instant::now();
        let state = State {
            file: file.map(open).transpose()?,
            last: Progress {
                schema: SCHEMA,
                at_ms: now_ms(),
                phase: Phase::Starting,
                layer: 0,
                layers: 0,
                bytes_read: 0,
                bytes_total: 0,
                tokens_per_second: 0.0,
                eta_seconds: None,
                message: None,
            },
            written: now,
            layers_began: now,
            first_layer: 0,
            tokens: 0,
            phase_began: now,
            seconds: Vec::new(),
            talk,
            bar,
            stopping: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), stop: Condvar::new() });
        shared.lock().write();
        let heart = file.is_some().then(|| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.beat())
        });
        Ok(Self { shared, heart })
    }

    /// A sink without output.
    pub fn silent() -> Self {
        Self::new(None, false).expect("without a file nothing can fail")
    }

    /// Sets the size of the work, once it is known.
    pub fn work(&self, layers: usize, bytes_total: u64, tokens: usize) {
        let mut state = self.shared.lock();
        state.last.layers = layers;
        state.last.bytes_total = bytes_total;
        state.tokens = tokens;
    }

    /// Sets the first layer of a pass; an earlier process finished those before it. Rates are of
    /// this process alone.
    pub fn first_layer(&self, first: usize) {
        let mut state = self.shared.lock();
        (state.first_layer, state.last.layer) = (first, first);
    }

    /// Starts a phase.
    pub fn phase(&self, phase: Phase) {
        let mut state = self.shared.lock();
        let (ended, seconds) = (state.last.phase, state.phase_began.elapsed().as_secs_f64());
        state.seconds.push((ended, seconds));
        state.phase_began = Instant::now();
        if phase == Phase::Layers {
            state.layers_began = Instant::now();
        }
        state.last.phase = phase;
        (state.last.message, state.last.eta_seconds) = (None, None);
        state.write();
    }

    /// Reports an important message to people and followers.
    pub fn warn(&self, message: impl Into<String>) {
        self.tell(message.into(), true);
    }

    /// Reports a message to people and followers.
    pub fn say(&self, message: impl Into<String>) {
        self.tell(message.into(), false);
    }

    fn tell(&self, message: String, warning: bool) {
        let mut state = self.shared.lock();
        match &state.bar {
            Some(bar) if warning => bar.println(format!("warning: {message}")),
            Some(bar) => bar.println(&message),
            None if state.talk && warning => tracing::warn!("{message}"),
            None if state.talk => tracing::info!("{message}"),
            None => {}
        }
        state.last.message = Some(message);
        state.write();
    }

    /// Sets the number of weight bytes read.
    pub fn bytes(&self, read: u64) {
        let mut state = self.shared.lock();
        state.last.bytes_read = read;
        state.write_unless_just_written();
    }

    /// Reports that all tokens have passed a streaming unit.
    pub fn unit_done(&self, unit: &StreamingUnit, ends_layer: bool, bytes_read: u64) {
        let mut state = self.shared.lock();
        state.last.bytes_read = bytes_read;
        if !ends_layer {
            return state.write_unless_just_written();
        }
        state.last.layer = unit.layer + 1;
        let seconds = state.layers_began.elapsed().as_secs_f64();
        let [done, left] = [unit.layer + 1 - state.first_layer, state.last.layers.saturating_sub(unit.layer + 1)];
        let share = done as f64 / state.last.layers.max(1) as f64;
        state.last.tokens_per_second = state.tokens as f64 * share / seconds.max(1e-9);
        state.last.eta_seconds = Some(seconds / done as f64 * left as f64);
        if state.talk && state.bar.is_none() {
            tracing::info!("layer {}/{} done", state.last.layer, state.last.layers);
        }
        state.write_unless_just_written();
    }

    /// Reports parts of a phase without layers: `3 of 38 parts of the vocabulary`.
    pub fn part_done(&self, done: usize, all: usize, what: &str, bytes_read: u64) {
        let mut state = self.shared.lock();
        state.last.bytes_read = bytes_read;
        state.last.message = Some(format!("{done} of {all} {what}"));
        let (seconds, share) = (state.phase_began.elapsed().as_secs_f64(), done.max(1) as f64 / all.max(1) as f64);
        state.last.eta_seconds = Some((seconds / share - seconds).max(0.0));
        if done == all { state.write() } else { state.write_unless_just_written() }
    }

    /// Seconds in each phase so far.
    pub fn seconds(&self) -> Vec<(Phase, f64)> {
        let state = self.shared.lock();
        let mut seconds = state.seconds.clone();
        seconds.push((state.last.phase, state.phase_began.elapsed().as_secs_f64()));
        seconds
    }
}

impl Drop for ProgressSink {
    fn drop(&mut self) {
        {
            let mut state = self.shared.lock();
            state.stopping = true;
            if let Some(bar) = &state.bar {
                bar.finish_and_clear();
            }
        }
        self.shared.stop.notify_all();
        if let Some(heart) = self.heart.take() {
            // The heartbeat thread only sleeps and writes. A panic in it is ignored.
            let _ = heart.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn beat(&self) {
        let mut state = self.lock();
        while !state.stopping {
            state = self.stop.wait_timeout(state, HEARTBEAT).unwrap_or_else(PoisonError::into_inner).0;
            if !state.stopping && state.written.elapsed() >= HEARTBEAT {
                state.write();
            }
        }
    }
}

impl State {
    fn write_unless_just_written(&mut self) {
        if self.written.elapsed() >= QUIET {
            self.write();
        } else {
            self.draw();
        }
    }

    fn write(&mut self) {
        self.last.at_ms = now_ms();
        self.written = Instant::now();
        self.draw();
        let Some(file) = &mut self.file else { return };
        let mut line = serde_json::to_vec(&self.last).expect("progress is plain data");
        line.push(b'\n');
        // One write per line, so that a reader never sees a part of it. A full disk must not end a
        // run because of its progress file.
        if let Err(error) = file.write_all(&line) {
            tracing::warn!("progress cannot be written: {error}");
            self.file = None;
        }
    }

    fn draw(&self) {
        let Some(bar) = &self.bar else { return };
        bar.set_length(self.last.layers as u64);
        bar.set_position(self.last.layer as u64);
        let phase = format!("{:?}", self.last.phase).to_lowercase();
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        let (read, total) = (gib(self.last.bytes_read), gib(self.last.bytes_total));
        bar.set_message(format!("{phase}  {read:.2} of {total:.2} GiB  {:.0} tokens/s", self.last.tokens_per_second));
    }
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{bar:30} {pos}/{len} layers  {msg}  {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::decoder::Part;

    #[test]
    fn rate_and_time_left_of_a_resumed_pass_are_of_its_own_layers() {
        for (first, tokens_per_second, seconds_left) in [(0, 75.0, 10.0 / 3.0), (2, 25.0, 10.0)] {
            let sink = ProgressSink::silent();
            sink.work(4, 100, 1000);
            sink.first_layer(first);
            sink.phase(Phase::Layers);
            assert_eq!(sink.shared.lock().last.layer, first);
            sink.shared.lock().layers_began = Instant::now().checked_sub(Duration::from_secs(10)).unwrap();
            sink.unit_done(&StreamingUnit { layer: 2, part: Part::Mixer, needs: Vec::new() }, true, 50);
            let last = sink.shared.lock().last.clone();
            let (rate, left) = (last.tokens_per_second, last.eta_seconds.unwrap());
            assert_eq!(last.layer, 3);
            assert!((0.9 * tokens_per_second..=tokens_per_second).contains(&rate), "{rate}");
            assert!((seconds_left..1.1 * seconds_left).contains(&left), "{left}");
        }
    }
}
