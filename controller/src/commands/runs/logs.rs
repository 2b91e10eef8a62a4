//! `runs logs`: prints the log of a run's worker.
//!
//! The process that drives a run stores the log, which other processes read. Without a driver the
//! rest is read from the instance. Nothing is changed there, and the guard does not count it as a
//! controller.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use outliers_protocol::files;
use tokio::time::Instant;

use crate::cloud::broker::InstanceState;
use crate::commands::{Context, SCHEMA};
use crate::files::{MAX_FILE_BYTES, absent, read_small};
use crate::host::transport::ssh::HostKeyPin;
use crate::host::{self, Cursor, HostError, HostEvent, RemoteHost};
use crate::run::deploy::{KEY_FILE, read_cursor};
use crate::run::ledger::{Ledger, RunRecord};
use crate::run::{Pin, RunState};
use crate::text::clean;
use crate::ui::report::{CliError, ExitStatus};

/// Maximum characters of a line that are shown.
const LINE: usize = 2000;
/// Interval of reads of the stored log.
const PAUSE: Duration = Duration::from_millis(300);
/// A worker is followed without time limit.
const WITHOUT_END: Duration = Duration::from_secs(365 * 24 * 3600);

/// Receives lines.
type Say<'a> = dyn Fn(String) + Send + Sync + 'a;

/// Prints the log of a run; with `follow`, also new lines.
pub(super) async fn command(
    context: &Context,
    ledger: &Ledger,
    name: &str,
    follow: bool,
) -> Result<ExitStatus, CliError> {
    let run = ledger.find(name)?;
    if follow {
        return follow_log(context, ledger, &run.id).await;
    }
    let lines = so_far(context, ledger, &run).await?;
    let document = serde_json::json!({ "schema": SCHEMA, "run": run.id, "lines": lines });
    context.reporter.result(&document, || lines.join("\n"));
    Ok(ExitStatus::Done)
}

/// The worker's log as far as it can be read now.
async fn so_far(context: &Context, ledger: &Ledger, run: &RunRecord) -> Result<Vec<String>, CliError> {
    if let Some(path) = at_home(run) {
        return at_once(&path);
    }
    let mut lines = Tail::of(ledger, run).lines()?;
    let Some(pin) = key_of(run) else {
        return if lines.is_empty() { Err(has_none(run)) } else { Ok(lines) };
    };
    if ledger.is_driven(&run.id)? {
        return Ok(lines);
    }
    let rest = Mutex::new(Vec::new());
    let say = |line: String| rest.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(line);
    let read = read_on(context, ledger, run, pin, false, &say).await;
    lines.extend(rest.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner));
    match read {
        Err(cli_error) if lines.is_empty() => return Err(cli_error),
        Err(cli_error) => context.reporter.warn(&format!("only what was fetched before: {cli_error}")),
        Ok(()) => {}
    }
    Ok(lines)
}

/// Prints the log until the worker has ended, whether the run is driven or not.
async fn follow_log(context: &Context, ledger: &Ledger, id: &str) -> Result<ExitStatus, CliError> {
    let reporter = &context.reporter;
    let say = |line: String| reporter.line(&serde_json::json!({ "line": line }), || line.clone());
    let mut tail = Tail::of(ledger, &ledger.run(id)?);
    let mut waits = false;
    loop {
        // In this order, since a driver that has ended has stored all its lines.
        let driven = ledger.is_driven(id)?;
        let run = ledger.run(id)?;
        tail.lines()?.into_iter().for_each(say);
        if let Some(path) = at_home(&run) {
            at_once(&path)?.into_iter().skip(tail.count).for_each(say);
            return Ok(ExitStatus::Done);
        }
        match key_of(&run) {
            Some(pin) if !driven => {
                read_on(context, ledger, &run, pin, true, &say).await?;
                reporter.say(&format!("The worker has ended; `outliers attach {id}` fetches its results"));
                return Ok(ExitStatus::Done);
            }
            None if run.state.is_closed() && tail.count > 0 => return Ok(ExitStatus::Done),
            None if !driven => return Err(has_none(&run)),
            None if !waits => {
                waits = true;
                reporter.say(&format!("Waiting for the worker of run {id}, which is {}", run.state.word()));
            }
            _ => {}
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Path of the log in the results.
fn at_home(run: &RunRecord) -> Option<PathBuf> {
    run.state.results().map(|results| Path::new(&results.folder).join(files::LOG))
}

/// Host key of an instance with a log.
fn key_of(run: &RunRecord) -> Option<&Pin> {
    match &run.state {
        RunState::Launched { pin, .. } | RunState::Ended { pin, .. } | RunState::Salvaging { pin, .. } => Some(pin),
        _ => None,
    }
}

fn has_none(run: &RunRecord) -> CliError {
    CliError::refused(
        format!("run {} is {} and has no log", run.id, run.state.word()),
        "a run has a log from the start of its worker on",
    )
}

/// Reads unread lines from the instance: the existing ones, or until the worker has ended.
async fn read_on(
    context: &Context,
    ledger: &Ledger,
    run: &RunRecord,
    pin: &Pin,
    to_the_end: bool,
    say: &Say<'_>,
) -> Result<(), CliError> {
    let rental = run.state.rental().ok_or_else(|| CliError::failed("the run has no instance"))?;
    let cloud = context.cloud_of(&rental.offer)?;
    let found = cloud.call(cloud.broker.get(&rental.instance)).await?;
    let Some(InstanceState::Ready(endpoint)) = found.map(|instance| instance.state) else {
        return Err(CliError::failed(format!("instance {} cannot be spoken to", rental.instance)));
    };
    let failed = |error: HostError| CliError { status: ExitStatus::Cloud, message: error.message, hint: error.hint };
    let folder = ledger.run_folder(&run.id);
    let host = match cloud.broker.instance_transport(&rental.instance) {
        Some(access) => RemoteHost::new(access.transport, access.name),
        None => {
            let pin = HostKeyPin::new(&pin.0).map_err(|error| failed(error.into()))?;
            let (key, deadline) = (folder.join(KEY_FILE), Instant::now() + cloud.timeouts.ssh);
            let (what, unheard) = (format!("instance {} to answer", rental.instance), |_: HostEvent| {});
            let reached = host::reach(&endpoint, &key, Some(pin), deadline, &unheard);
            context.reporter.waiting(&what, reached).await.map_err(failed)?.0
        }
    };
    // Without a stored log the position is meaningless.
    let mut cursor = if folder.join(files::LOG).exists() { read_cursor(&folder) } else { Cursor::default() };
    let heard = |event: HostEvent| match event {
        HostEvent::Log(line) => say(clean(line.as_bytes(), LINE)),
        event @ (HostEvent::LogSkipped(_) | HostEvent::ConnectionLost { .. } | HostEvent::Reconnected) => {
            context.reporter.host(event);
        }
        _ => {}
    };
    let read = match to_the_end {
        true => host.follow(&run.id, &mut cursor, Instant::now() + WITHOUT_END, &heard).await,
        false => host.catch_up(&run.id, &mut cursor, &heard).await,
    };
    read.map(drop).map_err(failed)
}

fn at_once(path: &Path) -> Result<Vec<String>, CliError> {
    read_small(path, MAX_FILE_BYTES).map(|text| lines_of(&text)).map_err(|error| unreadable(path, &error))
}

fn unreadable(path: &Path, error: &io::Error) -> CliError {
    CliError::failed(format!("{}: {error}", path.display()))
}

fn lines_of(text: &[u8]) -> Vec<String> {
    text.split_inclusive(|b| *b == b'\n').map(|line| clean(line, LINE)).collect()
}

/// The copy of the worker's log that the driver stores.
struct Tail {
    path: PathBuf,
    /// Number of bytes read.
    read: u64,
    /// Number of lines read.
    count: usize,
}

impl Tail {
    fn of(ledger: &Ledger, run: &RunRecord) -> Self {
        Self { path: ledger.run_folder(&run.id).join(files::LOG), read: 0, count: 0 }
    }

    /// The complete lines since the last read.
    fn lines(&mut self) -> Result<Vec<String>, CliError> {
        let text = self.bytes().map_err(|error| unreadable(&self.path, &error))?;
        let whole = text.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        let lines = lines_of(&text[..whole]);
        self.read += whole as u64;
        self.count += lines.len();
        Ok(lines)
    }

    fn bytes(&self) -> io::Result<Vec<u8>> {
        let Some(mut file) = absent(File::open(&self.path))? else { return Ok(Vec::new()) };
        file.seek(SeekFrom::Start(self.read))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn log_lines_are_printed_whole_and_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut tail = Tail { path: folder.path().join("log"), read: 0, count: 0 };
        assert_eq!(tail.lines().unwrap(), [""; 0], "nobody has written yet");
        let mut file = File::options().create(true).append(true).open(&tail.path).unwrap();
        let mut write = |text: &str| file.write_all(text.as_bytes()).unwrap();
        write("one\n\ntw");
        assert_eq!(tail.lines().unwrap(), ["one", ""]);
        write("o\u{1b}[2J\n");
        assert_eq!(tail.lines().unwrap(), ["two"]);
        assert_eq!((tail.lines().unwrap(), tail.count), (Vec::new(), 3));
    }
}
