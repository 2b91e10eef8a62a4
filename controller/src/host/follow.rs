//! Follows a worker's progress file and log across lost connections.

use std::time::Duration;

use outliers_protocol::{Progress, SCHEMA, files};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep_until};

use super::launch::{PROCESS, read_state};
use super::retry::{Retry, again};
use super::{HostError, HostErrorKind, HostEvent, JobStatus, OnEvent, RemoteHost, TIMEOUT};
use crate::host::transport::quote::quote;
use crate::text::clean;

/// How long SSH may be lost. The job continues meanwhile.
const RECONNECT_BUDGET: Duration = Duration::from_secs(600);
/// Time limit of one look. After it the connection counts as lost.
const LOOK_LIMIT: Duration = Duration::from_secs(45);
/// Pauses between looks: short after new lines, longer without.
const MIN_PAUSE: Duration = Duration::from_millis(300);
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// Maximum bytes per file and look.
const TAKE: u64 = 256 << 10;
/// Maximum length of a progress line.
const MAX_LINE: usize = 64 << 10;
/// A file that lies further behind is skipped up to its last `TAKE` bytes.
const MAX_LAG: u64 = 4 << 20;
/// Maximum characters of a line that are shown.
const SHOWN: usize = 2000;

/// How far a run's files have been read, in whole lines. The caller stores it, so that another
/// process can continue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Bytes of `progress.jsonl` read.
    pub progress: u64,
    /// Bytes of `worker.log` read.
    pub log: u64,
    /// Whether the position lies within an overlong progress line, whose rest is skipped.
    #[serde(default)]
    overlong: bool,
}

/// New bytes of one file.
#[derive(Debug, Default, PartialEq)]
struct NewBytes {
    /// Length of the file at the time of the look.
    size: u64,
    bytes: Vec<u8>,
}

/// Result of one look.
struct Poll {
    status: JobStatus,
    pid: Option<u32>,
    progress: NewBytes,
    log: NewBytes,
}

impl RemoteHost {
    /// Reports progress and log until the worker has ended and all of it is read, or until it
    /// turns out that the worker was never started.
    ///
    /// A lost connection is restored within ten minutes; the worker is unaffected. After
    /// `deadline` the worker keeps running and the error's kind is [`HostErrorKind::Deadline`].
    pub async fn follow(
        &self,
        run: &str,
        cursor: &mut Cursor,
        deadline: Instant,
        on: OnEvent<'_>,
    ) -> Result<JobStatus, HostError> {
        let mut retry = Retry::new(RECONNECT_BUDGET, Some(deadline));
        let mut pause = MIN_PAUSE;
        let mut seen_running = false;
        loop {
            match self.poll(run, cursor).await {
                Ok(poll) => {
                    retry.recovered(on);
                    if let Some(pid) = poll.pid.filter(|_| !seen_running) {
                        on(HostEvent::Launched { pid });
                        seen_running = true;
                    }
                    let news = cursor.take_progress(&poll.progress, on) | cursor.take_log(&poll.log, on);
                    if news {
                        on(HostEvent::Read(*cursor));
                    }
                    if poll.status != JobStatus::Running && !news {
                        cursor.take_rest(&poll, on);
                        return Ok(poll.status);
                    }
                    pause = if news { MIN_PAUSE } else { pause.mul_f64(1.3).min(MAX_PAUSE) };
                }
                Err(error) => retry.wait(error, on).await?,
            }
            sleep_until(deadline.min(Instant::now() + pause)).await;
            if Instant::now() >= deadline {
                let message = format!("{}: the time for run {run} was over before its worker ended", self.name);
                return Err(HostError::new(HostErrorKind::Deadline, message));
            }
        }
    }

    /// Reports what progress and log hold beyond the cursor now, then returns.
    pub async fn catch_up(&self, run: &str, cursor: &mut Cursor, on: OnEvent<'_>) -> Result<JobStatus, HostError> {
        let mut until = None;
        loop {
            let poll = again!(TIMEOUT, on, self.poll(run, cursor));
            let until = *until.get_or_insert(poll.log.size);
            let news = cursor.take_progress(&poll.progress, on) | cursor.take_log(&poll.log, on);
            if !news && poll.status != JobStatus::Running {
                cursor.take_rest(&poll, on);
            }
            if !news || cursor.log >= until {
                return Ok(poll.status);
            }
        }
    }

    /// Reads the worker's state first, then the new bytes of its files, in one command. The files
    /// do not grow after the end.
    async fn poll(&self, run: &str, cursor: &Cursor) -> Result<Poll, HostError> {
        let folder = self.run_folder(run).await?;
        let script = format!(
            "{PROCESS}\ntake() {{\n  if [ -f \"$1\" ] && [ ! -h \"$1\" ]; then s=$(($(wc -c < \"$1\"))); else s=0; fi\n\
               n=$((s - $2)); [ $n -lt 0 ] && n=0; [ $n -gt {TAKE} ] && n={TAKE}\n  echo \"@piece $s $n\"\n\
               [ $n -gt 0 ] && tail -c +$(($2 + 1)) \"$1\" | head -c $n\n  echo\n}}\n\
             if cd {} 2>/dev/null; then state; take {} {}; take {} {}; else echo '@state none'; fi",
            quote(&folder),
            files::PROGRESS,
            cursor.progress,
            files::LOG,
            cursor.log,
        );
        let answer = self.sh(&script, LOOK_LIMIT).await?;
        let (status, pid) = read_state(self, &answer)?;
        let mut rest = &answer.stdout[..];
        let mut piece = || next_piece(&mut rest).unwrap_or_default();
        Ok(Poll { status, pid, progress: piece(), log: piece() })
    }
}

/// Parses `@piece SIZE LENGTH`, a line end and LENGTH bytes; `rest` moves behind them.
fn next_piece(rest: &mut &[u8]) -> Option<NewBytes> {
    let mark = b"@piece ";
    let at = rest.windows(mark.len()).position(|w| w == mark)? + mark.len();
    let end = at + rest[at..].iter().position(|b| *b == b'\n')?;
    let (size, length) = std::str::from_utf8(&rest[at..end]).ok()?.split_once(' ')?;
    let (size, length) = (size.parse().ok()?, length.parse::<usize>().ok()?);
    let from = end + 1;
    let to = from.checked_add(length)?.min(rest.len());
    let bytes = rest[from..to].to_vec();
    *rest = &rest[to..];
    Some(NewBytes { size, bytes })
}

impl Cursor {
    /// Reads whole lines; `true` if there was anything new.
    fn take_progress(&mut self, piece: &NewBytes, on: OnEvent<'_>) -> bool {
        // A file that got shorter has been replaced.
        self.progress = self.progress.min(piece.size);
        let mut taken = 0;
        for line in piece.bytes.split_inclusive(|b| *b == b'\n') {
            let whole = line.ends_with(b"\n");
            if !whole && line.len() < MAX_LINE {
                break;
            }
            taken += line.len();
            if !std::mem::replace(&mut self.overlong, !whole) {
                on(read_progress(line, whole));
            }
        }
        self.progress = self.progress.saturating_add(taken as u64);
        if let Some(behind) = behind(piece, &mut self.progress) {
            on(HostEvent::ProgressSkipped(behind));
            // The position lies within a line.
            self.overlong = true;
        }
        taken > 0
    }

    fn take_log(&mut self, piece: &NewBytes, on: OnEvent<'_>) -> bool {
        self.log = self.log.min(piece.size);
        let mut taken = 0;
        for line in piece.bytes.split_inclusive(|b| *b == b'\n') {
            if !line.ends_with(b"\n") && line.len() < MAX_LINE {
                break;
            }
            taken += line.len();
            on(HostEvent::Log(clean(line, SHOWN)));
        }
        // A host may claim a length close to `u64::MAX`.
        self.log = self.log.saturating_add(taken as u64);
        if let Some(behind) = behind(piece, &mut self.log) {
            on(HostEvent::LogSkipped(behind));
        }
        taken > 0
    }

    /// Reports the log's last line even without a line end.
    fn take_rest(&mut self, poll: &Poll, on: OnEvent<'_>) {
        if !poll.log.bytes.is_empty() {
            on(HostEvent::Log(clean(&poll.log.bytes, SHOWN)));
            self.log = self.log.saturating_add(poll.log.bytes.len() as u64);
        }
        if !poll.progress.bytes.is_empty() {
            on(HostEvent::BadProgress(clean(&poll.progress.bytes, 200)));
            self.progress = self.progress.saturating_add(poll.progress.bytes.len() as u64);
        }
    }
}

/// Moves a cursor that lies too far behind close to the end of its file. Returns the bytes
/// skipped.
fn behind(piece: &NewBytes, at: &mut u64) -> Option<u64> {
    let behind = piece.size.saturating_sub(*at);
    (behind > MAX_LAG).then(|| {
        *at = piece.size - TAKE;
        behind - TAKE
    })
}

fn read_progress(line: &[u8], whole: bool) -> HostEvent {
    match serde_json::from_slice::<Progress>(line) {
        Ok(mut progress) if whole && progress.schema == SCHEMA => {
            progress.message = progress.message.map(|text| clean(text.as_bytes(), SHOWN));
            HostEvent::Progress(progress)
        }
        _ => HostEvent::BadProgress(clean(line, 200)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    const LINE: &str = r#"{"schema":1,"at_ms":1,"phase":"layers","layer":1,"layers":2,"bytes_read":3,"bytes_total":4,"tokens_per_second":0.5}"#;

    /// Reads `file` through a cursor, with `step` bytes appended at a time.
    fn feed(file: &[u8], step: usize) -> Vec<HostEvent> {
        let (events, mut cursor) = (Mutex::new(Vec::new()), Cursor::default());
        let on = |event| events.lock().unwrap().push(event);
        let mut shown = 0;
        while shown < file.len() {
            shown = file.len().min(shown + step);
            let mut news = true;
            while news {
                let from = cursor.progress as usize;
                let bytes = file[from..shown.min(from + TAKE as usize)].to_vec();
                news = cursor.take_progress(&NewBytes { size: shown as u64, bytes }, &on);
            }
        }
        events.into_inner().unwrap()
    }

    #[test]
    fn endless_line_is_reported_once_and_skipped() {
        let file = [LINE.as_bytes(), b"\n", &[b'x'; 1_000_000], b"\n", LINE.as_bytes(), b"\n"].concat();
        for step in [1000, 60_000, 2_000_000] {
            let events = feed(&file, step);
            let kinds: Vec<bool> = events.iter().map(|e| matches!(e, HostEvent::Progress(_))).collect();
            assert_eq!(kinds, [true, false, true], "{step}");
        }
    }

    #[test]
    fn malformed_lines_are_reported_and_sanitised() {
        let escape = LINE.replace("0.5}", r#"0.5,"message":"\u001b[2Jhi"}"#);
        let file = format!("{LINE}\nnot json \u{1b}[31m\n{}\n{escape}\n", LINE.replace("\"schema\":1", "\"schema\":2"));
        let events = feed(file.as_bytes(), 7);
        let HostEvent::BadProgress(bad) = &events[1] else { panic!("{events:?}") };
        assert_eq!(bad, "not json");
        assert!(matches!(events[2], HostEvent::BadProgress(_)), "another schema is not guessed");
        let HostEvent::Progress(last) = &events[3] else { panic!("{events:?}") };
        assert_eq!(last.message.as_deref(), Some("hi"));
    }

    #[test]
    fn runaway_log_is_skipped() {
        let (events, mut cursor) = (Mutex::new(Vec::new()), Cursor { log: 10, ..Cursor::default() });
        let on = |event| events.lock().unwrap().push(event);
        cursor.take_log(&NewBytes { size: 10 << 20, bytes: b"one\ntwo".to_vec() }, &on);
        assert_eq!(cursor.log, (10 << 20) - TAKE);
        let events = events.into_inner().unwrap();
        assert_eq!(events[0], HostEvent::Log("one".to_owned()));
        assert_eq!(events[1], HostEvent::LogSkipped((10 << 20) - 14 - TAKE));
    }

    #[test]
    fn runaway_progress_is_skipped_to_the_next_whole_line() {
        let (events, mut cursor) = (Mutex::new(Vec::new()), Cursor::default());
        let on = |event| events.lock().unwrap().push(event);
        let line = format!("{LINE}\n");
        assert!(cursor.take_progress(&NewBytes { size: 1 << 30, bytes: line.clone().into_bytes() }, &on));
        assert_eq!(cursor.progress, (1 << 30) - TAKE);
        let rest = format!("the end of a line\n{line}");
        assert!(cursor.take_progress(&NewBytes { size: 1 << 30, bytes: rest.into_bytes() }, &on));
        let events = events.into_inner().unwrap();
        assert_eq!(events.len(), 3, "{events:?}");
        assert_eq!(events[1], HostEvent::ProgressSkipped((1 << 30) - line.len() as u64 - TAKE));
        assert!([&events[0], &events[2]].iter().all(|event| matches!(event, HostEvent::Progress(_))), "{events:?}");
    }

    #[test]
    fn log_of_impossible_length_does_not_panic() {
        let mut cursor = Cursor { log: u64::MAX - TAKE, ..Cursor::default() };
        let piece = || NewBytes { size: u64::MAX, bytes: [vec![b'x'; TAKE as usize], b"\n".to_vec()].concat() };
        cursor.take_log(&piece(), &|_| {});
        assert_eq!(cursor.log, u64::MAX);
        let poll = Poll { status: JobStatus::NotStarted, pid: None, progress: NewBytes::default(), log: piece() };
        cursor.take_rest(&poll, &|_| {});
        assert_eq!(cursor.log, u64::MAX);
    }

    proptest! {
        #[test]
        fn lines_do_not_depend_on_chunk_boundaries(
            texts in proptest::collection::vec("[a-z{}\"]{0,30}", 0..20),
            step in 1usize..50,
        ) {
            let file: String = texts.iter().flat_map(|text| [text, "\n", LINE, "\n"]).collect();
            let events = feed(file.as_bytes(), step);
            prop_assert_eq!(events.len(), 2 * texts.len());
            prop_assert_eq!(events, feed(file.as_bytes(), 1 << 20));
        }

        #[test]
        fn any_answer_parses_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100), n in any::<u64>()) {
            let mut text = format!("@piece {n} {n}\n").into_bytes();
            text.extend(&bytes);
            let mut rest = &text[..];
            while next_piece(&mut rest).is_some() {}
            let mut rest = &bytes[..];
            while next_piece(&mut rest).is_some() {}
        }
    }
}
