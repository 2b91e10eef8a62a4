//! A rented host with given answers.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use outliers::host::transport::{ExecOutput, SendRequest, Transport, TransportError, TransportErrorKind};
use outliers::host::{Cursor, HostError, HostEvent, RemoteHost};
use outliers_protocol::{FileBytes, files};
use tokio::time::Instant;

use crate::assert_harmless;

/// Mark after a login shell's greeting.
const MARK: &[u8] = b"\n@outliers@\n";
/// Separator of a script's answers.
const NEXT: &[u8] = b"===\n";
/// The only run on the host.
const RUN: &str = "r1";

/// Makes every request to a host. Each is answered by `script` from its start: output of commands
/// or content of files, separated by lines `===`. An answer with `!` before it is a failure; with
/// `-`, there is no file.
pub fn run_script(script: &[u8]) {
    let answered = || RemoteHost::new(Arc::new(Scripted::new(script)), "host");
    crate::run(async {
        if let Some(facts) = good(answered().probe().await) {
            [&facts.os, &facts.arch, &facts.user, &facts.home].into_iter().for_each(|text| assert_harmless(text));
            facts.gpus.iter().for_each(|gpu| assert_harmless(&gpu.name));
        }
        good(answered().status(RUN).await);
        let deadline = Instant::now() + Duration::from_secs(60);
        good(answered().follow(RUN, &mut Cursor::default(), deadline, &check_event).await);
        let here = tempfile::tempdir().expect("a folder");
        let program = here.path().join("worker");
        std::fs::write(&program, "a program").expect("it is empty");
        if let Some(worker) = good(answered().push_worker(&program, &check_event).await) {
            assert_harmless(&worker.path);
        }
        let home = tempfile::tempdir().expect("a folder");
        let into = home.path().join(RUN);
        let expected = [files::JOB, files::RESULTS, files::METADATA, files::STATISTICS]
            .map(|name| FileBytes { name: name.to_owned(), bytes: 1 << 20 });
        if let Some(fetched) = good(answered().fetch(RUN, &into, &expected, &check_event).await) {
            assert_eq!(names(&into), fetched.files);
        }
        assert!(names(home.path()).iter().all(|name| name == RUN || name == "r1.part"), "{:?}", names(home.path()));
    });
}

/// Follows a run whose progress file and log are `text`, received in one piece and in several. The
/// events must be equal.
pub fn follow(text: &[u8]) {
    let whole = crate::run(followed(text, text.len()));
    let pieces = crate::run(followed(text, text.len() / 8 + 1));
    assert_eq!(whole, pieces, "other events in pieces");
}

async fn followed(text: &[u8], step: usize) -> Vec<String> {
    let told = Mutex::new(Vec::new());
    let on = |event: HostEvent| {
        check_event(event.clone());
        if matches!(event, HostEvent::Progress(_) | HostEvent::BadProgress(_) | HostEvent::Log(_)) {
            told.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{event:?}"));
        }
    };
    let host = RemoteHost::new(Arc::new(Growing { text: text.to_vec(), step, shown: Mutex::new(0) }), "host");
    let deadline = Instant::now() + Duration::from_secs(3600);
    good(host.follow(RUN, &mut Cursor::default(), deadline, &on).await).expect("this host is a good one");
    let mut told = told.into_inner().unwrap_or_else(PoisonError::into_inner);
    // Progress and log are two files, so the order of their lines depends on the pieces.
    told.sort_by_key(|event| event.starts_with("Log"));
    told
}

fn good<T>(result: Result<T, HostError>) -> Option<T> {
    result.inspect_err(|error| assert_harmless(&error.to_string())).ok()
}

fn check_event(event: HostEvent) {
    match event {
        HostEvent::Log(text) | HostEvent::BadProgress(text) => assert_harmless(&text),
        HostEvent::Progress(progress) => progress.message.iter().for_each(|text| assert_harmless(text)),
        _ => {}
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Answers in turn; fails after the last.
struct Scripted(Mutex<VecDeque<Vec<u8>>>);

impl Scripted {
    fn new(script: &[u8]) -> Self {
        let mut answers = VecDeque::from([Vec::new()]);
        for line in script.split_inclusive(|b| *b == b'\n') {
            match answers.back_mut() {
                Some(answer) if line != NEXT => answer.extend_from_slice(line),
                _ => answers.push_back(Vec::new()),
            }
        }
        // The newline before a `===` belongs to the separator.
        answers
            .iter_mut()
            .filter(|answer| answer.ends_with(b"\n"))
            .for_each(|answer| answer.truncate(answer.len() - 1));
        Self(Mutex::new(answers))
    }

    fn next(&self) -> Result<Vec<u8>, TransportError> {
        let next = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        next.ok_or_else(|| TransportError::new(TransportErrorKind::Remote, "it says nothing any more"))
    }
}

#[async_trait]
impl Transport for Scripted {
    async fn exec(&self, _: &str, _: &[u8], _: Duration) -> Result<ExecOutput, TransportError> {
        let answer = self.next()?;
        let (status, said) = match answer.strip_prefix(b"!") {
            Some(said) => (None, said),
            None => (Some(0), &answer[..]),
        };
        Ok(ExecOutput { status, stdout: [MARK, said].concat(), stderr: said.to_vec() })
    }

    async fn send(&self, _: &SendRequest<'_>) -> Result<(), TransportError> {
        self.next().map(drop)
    }

    async fn put_bytes(&self, _: &[u8], _: &str, _: u32) -> Result<(), TransportError> {
        self.next().map(drop)
    }

    async fn get(&self, _: &str, local: &Path, limit: u64) -> Result<u64, TransportError> {
        let content = self.next()?;
        if content.len() as u64 > limit {
            return Err(TransportError::new(TransportErrorKind::Remote, "too much"));
        }
        std::fs::write(local, &content).map_err(|e| TransportError::new(TransportErrorKind::Local, e.to_string()))?;
        Ok(content.len() as u64)
    }

    async fn read_from(&self, _: &str, _: u64, limit: u64) -> Result<Option<Vec<u8>>, TransportError> {
        let mut content = self.next()?;
        content.truncate(limit as usize);
        Ok(Some(content).filter(|content| !content.starts_with(b"-")))
    }
}

/// A worker's files that grow by `step` bytes between two polls.
struct Growing {
    text: Vec<u8>,
    step: usize,
    shown: Mutex<usize>,
}

impl Growing {
    /// Output of the polling script: the name of each file with its new bytes.
    fn look(&self, script: &str) -> Vec<u8> {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        *shown = self.text.len().min(*shown + self.step);
        let state: &[u8] = if *shown < self.text.len() { b"@state running 7\n" } else { b"@state ended 0\n" };
        let mut out = [MARK, state].concat();
        for file in ["take progress.jsonl ", "take worker.log "] {
            let (_, rest) = script.split_once(file).expect("it looks at both");
            let known: usize = rest.split(';').next().and_then(|n| n.trim().parse().ok()).expect("it says from where");
            let new = &self.text[known.min(*shown)..*shown];
            out.extend_from_slice(format!("@piece {} {}\n", *shown, new.len()).as_bytes());
            out.extend_from_slice(new);
            out.push(b'\n');
        }
        out
    }
}

#[async_trait]
impl Transport for Growing {
    async fn exec(&self, _: &str, script: &[u8], _: Duration) -> Result<ExecOutput, TransportError> {
        let script = String::from_utf8_lossy(script);
        let home = || [MARK, b"/root"].concat();
        let stdout = if script.contains("take worker.log") { self.look(&script) } else { home() };
        Ok(ExecOutput { status: Some(0), stdout, stderr: Vec::new() })
    }

    async fn send(&self, _: &SendRequest<'_>) -> Result<(), TransportError> {
        Err(unasked())
    }

    async fn put_bytes(&self, _: &[u8], _: &str, _: u32) -> Result<(), TransportError> {
        Err(unasked())
    }

    async fn get(&self, _: &str, _: &Path, _: u64) -> Result<u64, TransportError> {
        Err(unasked())
    }

    async fn read_from(&self, _: &str, _: u64, _: u64) -> Result<Option<Vec<u8>>, TransportError> {
        Err(unasked())
    }
}

/// Following uses only commands.
fn unasked() -> TransportError {
    TransportError::new(TransportErrorKind::Remote, "nobody asks for that")
}
