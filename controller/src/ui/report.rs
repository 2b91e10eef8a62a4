//! All output: events for people on standard error, results for people or programs on standard
//! output.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressStyle};
use outliers_protocol::{Phase, Progress};
use serde::Serialize;

use crate::calendar::rfc3339;
use crate::cli::settings::{Environment, SettingsError, Span};
use crate::cli::{Color, Global};
use crate::cloud::broker::BrokerError;
use crate::cloud::clouds::Offered;
use crate::cloud::market::{self, NothingLeft};
use crate::host::{HostEvent, HostFacts};
use crate::run::deploy::{DeployEvent, DriveError, StillBilling, Stop, UnsavedResults};
use crate::run::ledger::{CostMeter, LedgerError, RunRecord, Unreadable, now_ms};
use crate::run::local_worker::LocalWorkerError;
use crate::run::reconcile::{Action, Finish, Leave, Stray};
use crate::run::{RunFailureKind, RunOutcome, RunState};
use crate::text::{clean, counted};
use crate::units::{Bytes, grouped};
use crate::waiting::{Failed, told};

pub(crate) mod diagnostics;
pub(crate) mod table;
pub(crate) mod tables;

/// Maximum characters of an untrusted line.
const LINE: usize = 2000;

/// Maximum characters of a file name.
const NAME: usize = 80;

/// Maximum difference of a host's clock in seconds without a warning.
const MAX_SKEW: i64 = 60;

/// First pause between plain progress lines of a phase. It doubles each time.
const PLAIN_PAUSE: Duration = Duration::from_secs(2);

/// Maximum of this pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// First pause if several runs report concurrently.
const PLAIN_PAUSE_OF_MANY: Duration = Duration::from_secs(30);

/// Pause between redraws of a screen, and between pictures that are printed below each other.
const REDRAW_PAUSE: Duration = Duration::from_secs(1);
const PICTURE_PAUSE: Duration = Duration::from_secs(5);

/// How the program ends. The numbers are documented in the help and stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum ExitStatus {
    /// Done, and nothing is left.
    Done = 0,
    Failed = 1,
    /// Wrong arguments, or refused before anything was rented.
    Refused = 2,
    NoOffer = 3,
    /// Time or money is up.
    TimeUp = 4,
    /// A cloud, its key or an instance failed.
    Cloud = 5,
    /// An instance may still be running.
    InstanceLeft = 6,
    /// Ctrl-C or `runs cancel`.
    Interrupted = 130,
}

impl ExitStatus {
    /// The documented number.
    pub(crate) fn number(self) -> u8 {
        self as u8
    }

    /// The most urgent of several statuses. An instance that may still bill comes first.
    pub(crate) fn worst(all: impl IntoIterator<Item = Self>) -> Self {
        use ExitStatus::{Cloud, Done, Failed, InstanceLeft, Interrupted, NoOffer, Refused, TimeUp};
        const ORDER: [ExitStatus; 8] = [InstanceLeft, Interrupted, Cloud, TimeUp, NoOffer, Failed, Refused, Done];
        let rank = |status: &Self| ORDER.iter().position(|other| other == status);
        all.into_iter().min_by_key(rank).unwrap_or(Done)
    }

    pub(crate) fn of_run(state: &RunState) -> Self {
        match state.ending() {
            Some(RunOutcome::Completed) => Self::Done,
            Some(RunOutcome::WorkerFailed { .. } | RunOutcome::WorkerVanished { .. }) => Self::Failed,
            Some(RunOutcome::Failed { trouble }) => match trouble.kind {
                RunFailureKind::NoOffer => Self::NoOffer,
                RunFailureKind::Budget => Self::TimeUp,
                RunFailureKind::Broker | RunFailureKind::Host => Self::Cloud,
                RunFailureKind::Unfit | RunFailureKind::Local => Self::Failed,
            },
            Some(RunOutcome::Interrupted | RunOutcome::Cancelled) => Self::Interrupted,
            Some(RunOutcome::Deadline) => Self::TimeUp,
            Some(RunOutcome::InstanceLost) => Self::Cloud,
            None => Self::InstanceLeft,
        }
    }
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status.number())
    }
}

#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct CliError {
    pub(crate) status: ExitStatus,
    /// What went wrong, and where.
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

impl CliError {
    pub(crate) fn new(status: ExitStatus, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { status, message: message.into(), hint: Some(hint.into()) }
    }

    /// A refusal before anything was done.
    pub(crate) fn refused(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(ExitStatus::Refused, message, hint)
    }

    /// A failure on this machine.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self { status: ExitStatus::Failed, message: message.into(), hint: None }
    }
}

impl From<SettingsError> for CliError {
    fn from(error: SettingsError) -> Self {
        Self::refused(error.to_string(), error.hint())
    }
}

impl From<LedgerError> for CliError {
    fn from(error: LedgerError) -> Self {
        let status = match error {
            LedgerError::NoSuchRun { .. } | LedgerError::Ambiguous { .. } | LedgerError::Newer { .. } => {
                ExitStatus::Refused
            }
            _ => ExitStatus::Failed,
        };
        Self { status, message: error.to_string(), hint: error.hint() }
    }
}

impl From<LocalWorkerError> for CliError {
    fn from(error: LocalWorkerError) -> Self {
        Self { status: ExitStatus::Refused, message: error.to_string(), hint: error.hint() }
    }
}

impl From<NothingLeft> for CliError {
    fn from(error: NothingLeft) -> Self {
        // The time limit is too short for the offers.
        let status = if matches!(error, NothingLeft::Late { .. }) { ExitStatus::Refused } else { ExitStatus::NoOffer };
        Self { status, message: error.to_string(), hint: error.hint().map(str::to_owned) }
    }
}

impl From<BrokerError> for CliError {
    fn from(error: BrokerError) -> Self {
        Self { status: ExitStatus::Cloud, message: error.to_string(), hint: error.hint() }
    }
}

impl From<DriveError> for CliError {
    fn from(stuck: DriveError) -> Self {
        Self::of_drive_error(&stuck)
    }
}

impl CliError {
    /// The error of a run, or of a listing, that could not be completed.
    pub(crate) fn of_drive_error(stuck: &DriveError) -> Self {
        let hint = match stuck {
            DriveError::Instance { run, .. } => {
                format!("an instance may still be running and billing. To end it: outliers runs cancel {run}")
            }
            // An illegal event does not concern instances.
            DriveError::Broker { .. } | DriveError::Ledger(LedgerError::Illegal(_)) => {
                "an instance may still be running and billing. To see: outliers instances list".to_owned()
            }
            DriveError::Silent { hint, .. } => {
                return Self { status: ExitStatus::Cloud, message: stuck.to_string(), hint: hint.clone() };
            }
            DriveError::Ledger(error) => {
                return Self { status: ExitStatus::Failed, message: stuck.to_string(), hint: error.hint() };
            }
        };
        Self { status: ExitStatus::InstanceLeft, message: stuck.to_string(), hint: Some(hint) }
    }
}

/// Prints messages to standard error, and results to standard output.
pub(crate) struct Reporter {
    json: bool,
    quiet: bool,
    verbose: bool,
    color: bool,
    bars: bool,
    /// Whether standard error is a terminal, which echoes keys.
    echoes: bool,
    /// Whether standard output is a terminal that can be redrawn.
    redraws: bool,
    /// Name of the run, if several report concurrently.
    label: String,
    /// First pause between plain progress lines.
    pause: Duration,
    board: MultiProgress,
    now: Mutex<DisplayState>,
    /// Why something is missing from standard output.
    unprinted: Mutex<Option<io::Error>>,
}

/// What is currently shown.
#[derive(Default)]
struct DisplayState {
    bar: Option<ProgressBar>,
    /// The last plain progress line.
    plain: Option<PlainLine>,
    booting: bool,
    /// Start of the work in progress, as far as observed.
    began: Option<Instant>,
    /// Cost of the run.
    meter: Option<CostMeter>,
    /// The last reported reason for a retry, with its time.
    retried: Option<(Instant, String)>,
}

impl DisplayState {
    /// Whether to report a reason for a retry: it differs, or was not reported for some time.
    fn is_new(&mut self, reason: &str) -> bool {
        let said = self.retried.as_ref();
        let is_new = said.is_none_or(|(at, last)| last != reason || at.elapsed() >= LONGEST_PAUSE);
        if is_new {
            self.retried = Some((Instant::now(), reason.to_owned()));
        }
        is_new
    }
}

struct PlainLine {
    at: Instant,
    label: String,
    position: u64,
    /// Pause before the next similar line.
    pause: Duration,
}

impl PlainLine {
    /// Whether more than the time has changed.
    fn is_news(&self, label: &str, position: u64, length: u64) -> bool {
        self.label != label || (position == length && self.position != position)
    }

    /// Pause after the next line.
    fn next_pause(&self, label: &str) -> Option<Duration> {
        (self.label == label).then(|| (self.pause * 2).min(LONGEST_PAUSE))
    }
}

impl Reporter {
    /// Configured by options and environment.
    pub(crate) fn new(global: &Global, environment: &Environment) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let plain = environment.is_plain();
        Self {
            json: global.json,
            quiet: global.quiet,
            verbose: global.verbose,
            color: match global.color {
                Color::Auto => terminal && !plain,
                Color::Always => true,
                Color::Never => false,
            },
            bars: terminal && !plain && !global.quiet,
            echoes: terminal,
            redraws: std::io::stdout().is_terminal() && !plain && !global.json,
            label: String::new(),
            pause: PLAIN_PAUSE,
            board: MultiProgress::new(),
            now: Mutex::default(),
            unprinted: Mutex::default(),
        }
    }

    /// A reporter for one of several concurrent runs: its sentences begin with its name, and it
    /// has a separate bar.
    pub(crate) fn of_one(&self, label: &str) -> Self {
        Self {
            label: clean(label.as_bytes(), 40),
            pause: PLAIN_PAUSE_OF_MANY,
            board: self.board.clone(),
            now: Mutex::default(),
            unprinted: Mutex::default(),
            ..*self
        }
    }

    /// Shows the state of several runs together.
    pub(crate) fn together(&self, done: usize, all: usize, detail: &str) {
        self.measure(&format!("{done} of {all} done"), done as u64, all as u64, detail);
    }

    /// Prints the result of a command: the document for programs, the text for people.
    pub(crate) fn result<T: Serialize>(&self, document: &T, text: impl FnOnce() -> String) {
        self.done();
        let text = if self.json {
            serde_json::to_string_pretty(document).expect("documents hold no maps with keys other than strings")
        } else {
            text()
        };
        if text.is_empty() {
            return;
        }
        self.print(text.trim_end_matches('\n'));
    }

    /// Writes lines to standard output. A closed pipe (`| head`) is no error of ours.
    fn print(&self, lines: &str) {
        let written = writeln!(io::stdout().lock(), "{lines}");
        if let Some(error) = written.err().filter(|error| error.kind() != io::ErrorKind::BrokenPipe)
            && let Ok(mut unprinted) = self.unprinted.lock()
        {
            *unprinted = Some(error);
        }
    }

    /// Why something that was to be printed is missing from standard output, such as a full disk.
    pub(crate) fn unprinted(&self) -> Option<CliError> {
        let error = self.unprinted.lock().ok()?.take()?;
        let message = format!("standard output cannot be written, and is not whole: {error}");
        Some(CliError::new(ExitStatus::Failed, message, "make room where it goes, and run the command again"))
    }

    /// Prints one of many results: a line of text for people, one JSON document per line for
    /// programs.
    pub(crate) fn line<T: Serialize>(&self, document: &T, text: impl FnOnce() -> String) {
        let line = if self.json {
            serde_json::to_string(document).expect("documents hold no maps with keys other than strings")
        } else {
            text()
        };
        self.print(&line);
    }

    /// A screen that is updated.
    pub(crate) fn screen(&self) -> Screen<'_> {
        let bar = self.redraws.then(|| {
            let style = ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout());
            // The last picture stays.
            bar.with_style(style).with_finish(ProgressFinish::Abandon)
        });
        Screen { reporter: self, bar }
    }

    /// Prints the error of a command, for programs also on standard output.
    pub(crate) fn cli_error(&self, cli_error: &CliError) {
        if cli_error.status == ExitStatus::Interrupted {
            self.begin_line();
        }
        self.done();
        if self.json {
            let error = serde_json::json!({
                "schema": 1,
                "error": { "message": cli_error.message, "hint": cli_error.hint },
                "exit_status": cli_error.status.number(),
            });
            let _ = writeln!(std::io::stdout().lock(), "{error:#}");
        }
        self.sentence(cli_error);
    }

    /// Prints an error for people only.
    pub(crate) fn sentence(&self, cli_error: &CliError) {
        self.write(&format!("{}: {}", self.paint("31;1", "error"), clean(cli_error.message.as_bytes(), LINE)));
        if let Some(hint) = &cli_error.hint {
            self.write(&format!("{}: {}", self.paint("36", "hint"), clean(hint.as_bytes(), LINE)));
        }
    }

    pub(crate) fn warn(&self, text: &str) {
        self.write(&format!("{}: {}", self.paint("33;1", "warning"), clean(text.as_bytes(), LINE)));
    }

    /// Reports runs with unreadable records.
    pub(crate) fn unreadable(&self, runs: &[Unreadable]) {
        for Unreadable { run, why } in runs {
            self.warn(&format!(
                "run {run}: its record in the ledger is damaged ({why}); what it rented carries its id: outliers instances list"
            ));
        }
    }

    /// Prints a sentence for people.
    pub(crate) fn say(&self, text: &str) {
        if !self.quiet {
            self.write(text);
        }
    }

    /// Prints a sentence with `-v` only.
    pub(crate) fn verbose(&self, text: &str) {
        if self.verbose {
            self.write(&self.paint("2", text));
        }
    }

    /// Reports that no cloud's key is set.
    pub(crate) fn using_this_machine(&self) {
        self.say("No cloud's key is set: this machine is the cloud (broker `local`; its prices are made up).");
    }

    /// Reports what is missing from the clouds' offers.
    pub(crate) fn offered(&self, offered: &Offered) {
        for error in &offered.silent {
            self.note(&format!("Left out, it does not answer: {error}"));
        }
        for (broker, dropped) in &offered.dropped {
            let offers = counted(dropped.count, "offer");
            self.say(&format!("{broker}: {offers} left out: {}", clean(dropped.reason.as_bytes(), LINE)));
        }
    }

    /// Reports that an abandoned run is resumed.
    pub(crate) fn resumed(&self, run: &RunRecord) {
        let done = run.state.word();
        self.say(&format!("Picking up run {} where it was left ({done}); its own options hold.", run.id));
    }

    /// Reports the actions of a recovery.
    pub(crate) fn recovered<'a>(&self, actions: impl Iterator<Item = &'a Action>) {
        for action in actions {
            match action {
                Action::Adopt { run, instance } => self.say(&format!(
                    "Run {run} was left with instance {instance}: the same command picks it up, `outliers runs cancel {run}` ends it."
                )),
                Action::Terminate { instance, why } => {
                    self.say(&format!("Stray instance {instance} was ended: {}.", stray(*why)));
                }
                Action::Finish { run, why } => self.say(&format!("Run {run} was brought to its end: {}.", finish(*why))),
                Action::MarkGone { run, .. } => self.say(&format!("Run {run}: its instance is gone.")),
                Action::LeaveAlone { instance, why: Leave::Unreadable } => self.warn(&format!(
                    "an entry of a cloud's list cannot be read (its id: `{instance}`); outliers instances list"
                )),
                Action::LeaveAlone { instance, why: Leave::RunUnknown | Leave::Superseded } => self.warn(&format!(
                    "instance {instance} is of this ledger by its tag, and no open run here accounts for it; it has time left. If \
                     nobody uses it: outliers instances terminate {instance}"
                )),
                Action::LeaveAlone { .. } => {}
            }
        }
    }

    /// Reports an event of a driven run.
    pub(crate) fn event(&self, event: DeployEvent) {
        match event {
            DeployEvent::State(state) => self.state(&state),
            DeployEvent::Meter(meter) => self.lock().meter = Some(meter),
            DeployEvent::Renting(offer) => {
                self.say(&format!("Renting {}", clean(market::describe(&offer).as_bytes(), LINE)))
            }
            DeployEvent::Refused { reason } => {
                self.say(&format!("The offer is given up: {}", clean(reason.as_bytes(), LINE)));
            }
            DeployEvent::Retrying { reason, pause } => {
                let reason = clean(reason.as_bytes(), LINE);
                if self.lock().is_new(&reason) {
                    self.say(&format!("Trying again in {:.1} s: {reason}", pause.as_secs_f64()));
                }
            }
            DeployEvent::Settling => self.say("Asking the cloud whether the instance was made"),
            DeployEvent::Booting => self.booting(),
            DeployEvent::Host(event) => self.host(event),
            DeployEvent::Note(note) => self.note(&note),
            DeployEvent::StillBilling(not) => self.not_ending(&not),
            DeployEvent::Kept(kept) => self.kept(&kept),
            DeployEvent::Waiting { what, failed } => {
                let why = failed.map(|failed| format!(" ({}; next try in {})", failed.words, Span(failed.pause)));
                let words = format!("Waiting for {what}{}", why.unwrap_or_default());
                self.say(&clean(words.as_bytes(), LINE));
            }
            DeployEvent::Terminating(id) => self.verbose(&format!("Ending instance {id}")),
            DeployEvent::Stopping(Stop::LetGo) => {
                self.begin_line();
                self.say("SIGHUP: a run at work whose instance ends by itself is let go of, any other is ended");
            }
            DeployEvent::Stopping(Stop::SkipSync) => {
                self.begin_line();
                self.say("Skipping the results; ending the instance");
            }
            DeployEvent::Stopping(_) => {
                self.begin_line();
                self.say("Stopping: fetching the results so far first (Ctrl-C again: without them)");
            }
        }
    }

    /// Runs `work`. If it takes more than some seconds, reports that it waits for `what`.
    pub(crate) async fn waiting<T>(&self, what: &str, work: impl Future<Output = T>) -> T {
        let say = |failed: Option<&Failed>| {
            self.event(DeployEvent::Waiting { what: what.to_owned(), failed: failed.cloned() });
        };
        told(say, work).await
    }

    fn not_ending(&self, not: &StillBilling) {
        let StillBilling { broker, instance, why, pause, price, cost } = not;
        let bills = price.map_or_else(|| "it bills on".to_owned(), |price| format!("it bills {price}"));
        let so_far =
            cost.map_or_else(|| "what it cost so far is not known".to_owned(), |cost| format!("{cost} so far"));
        self.warn(&format!(
            "{broker} does not end instance {instance} ({why}); next try in {}; {bills}, {so_far}. \
             By hand: outliers instances terminate {instance} --broker {broker}, or the cloud's own console",
            Span(*pause)
        ));
    }

    fn kept(&self, kept: &UnsavedResults) {
        let UnsavedResults { run, instance, why, price, cost, until, pause } = kept;
        self.warn(&format!(
            "run {run}: its results cannot be saved ({why}); instance {instance} keeps them until {} \
             and bills {price}, {cost} so far; next try in {}. Make room, or name another folder: \
             outliers attach {run} --results DIR. Ctrl-C gives them up",
            rfc3339(*until),
            Span(*pause)
        ));
    }

    fn state(&self, state: &RunState) {
        let sentence = match state {
            RunState::Rented { rental } => format!("Instance {} is rented at {}", rental.instance, rental.price),
            RunState::Reachable { .. } => "Connected".to_owned(),
            RunState::Launched { .. } => "The worker runs".to_owned(),
            RunState::Ended { .. } => "The worker has ended".to_owned(),
            RunState::Salvaging { ending, .. } => format!("Bringing home what there is: {}", self.ending(ending)),
            RunState::Synced { results, .. } => format!("Results saved to {}", results.folder),
            RunState::Held { rental, .. } => format!("Instance {} is kept and bills on", rental.instance),
            RunState::Discarding { rental, .. } => format!("Ending instance {}, which does not serve", rental.instance),
            RunState::Terminating { rental, .. } => format!("Ending instance {}", rental.instance),
            RunState::Closed { .. } => "No instance of this run is left".to_owned(),
            RunState::Planned { .. } | RunState::Creating { .. } => return,
        };
        self.done();
        self.say(&sentence);
    }

    fn ending(&self, ending: &RunOutcome) -> String {
        clean(ending.to_string().as_bytes(), LINE)
    }

    fn booting(&self) {
        let mut now = self.lock();
        if !std::mem::replace(&mut now.booting, true) {
            drop(now);
            self.say("Waiting for the instance to start");
        }
    }

    pub(crate) fn host(&self, event: HostEvent) {
        match event {
            HostEvent::Uploading { name, sent, total } => {
                let label = format!("Uploading {}", short_name(&name));
                let how_far = format!("{} of {}", Bytes(sent), Bytes(total));
                self.measure(&label, sent, total, &self.stands([how_far, String::new()]));
            }
            HostEvent::Progress(progress) => self.progress(&progress),
            // The read position is for the process that resumes the run.
            HostEvent::Read(_) => {}
            event if is_detail(&event) => self.verbose(&on_host(&event)),
            event => self.say(&on_host(&event)),
        }
    }

    fn note(&self, note: &str) {
        self.say(&clean(note.as_bytes(), LINE));
    }

    pub(crate) fn progress(&self, progress: &Progress) {
        let detail = self.stands(detail(progress));
        self.measure(phase(progress.phase), progress.layer as u64, progress.layers as u64, &detail);
    }

    /// Progress, elapsed time, cost and deadline, then details, which a narrow terminal cuts off.
    fn stands(&self, [how_far, rest]: [String; 2]) -> String {
        let mut now = self.lock();
        let began = *now.began.get_or_insert_with(Instant::now);
        let standing = standing(began.elapsed(), now.meter.as_ref(), now_ms());
        let parts = [how_far, standing, rest];
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
    }

    /// Shows a bar on a terminal; otherwise prints a line from time to time.
    fn measure(&self, label: &str, position: u64, length: u64, detail: &str) {
        if self.quiet {
            return;
        }
        let mut now = self.lock();
        if self.bars {
            let bar = now.bar.get_or_insert_with(|| self.board.add(new_bar()));
            bar.set_length(length);
            bar.set_position(position);
            bar.set_prefix(self.labelled(label));
            bar.set_message(detail.to_owned());
            return;
        }
        let last = now.plain.as_ref();
        if last.is_none_or(|last| last.is_news(label, position, length) || last.at.elapsed() >= last.pause) {
            let pause = last.and_then(|last| last.next_pause(label)).unwrap_or(self.pause);
            now.plain = Some(PlainLine { at: Instant::now(), label: label.to_owned(), position, pause });
            drop(now);
            self.write(&format!("{label}: {detail}"));
        }
    }

    /// Removes the bar.
    pub(crate) fn done(&self) {
        if let Some(bar) = self.lock().bar.take() {
            bar.finish_and_clear();
        }
    }

    /// Starts a new line after the key that a terminal echoes on an interrupt. A bar removes it
    /// itself.
    fn begin_line(&self) {
        if self.echoes && self.lock().bar.is_none() {
            let _ = writeln!(std::io::stderr().lock());
        }
    }

    fn write(&self, text: &str) {
        // A terminal that shows no bars is left alone.
        self.board.suspend(|| drop(writeln!(std::io::stderr().lock(), "{}", self.labelled(text))));
    }

    fn labelled(&self, text: &str) -> String {
        if self.label.is_empty() { text.to_owned() } else { format!("{}: {text}", self.label) }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.color { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, DisplayState> {
        self.now.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Successive pictures: on a terminal each replaces the previous one, otherwise it is printed
/// below.
pub(crate) struct Screen<'a> {
    reporter: &'a Reporter,
    bar: Option<ProgressBar>,
}

impl Screen<'_> {
    /// Shows the next picture: the document for programs on one line, the text for people.
    pub(crate) fn show<T: Serialize>(&self, document: &T, text: impl FnOnce() -> String) {
        match &self.bar {
            // Redrawn in place in one write, without flicker.
            Some(bar) => bar.set_message(text().trim_end_matches('\n').to_owned()),
            None => self.reporter.line(document, text),
        }
    }

    /// Pause before the next picture.
    pub(crate) fn pause(&self) -> Duration {
        if self.bar.is_some() { REDRAW_PAUSE } else { PICTURE_PAUSE }
    }
}

fn new_bar() -> ProgressBar {
    // Long lines are cut, since wrapped lines would be redrawn repeatedly.
    let style = ProgressStyle::with_template("{prefix:.bold} {bar:10.cyan/dim} {wide_msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style)
}

/// Progress and remaining time; rate and weights.
fn detail(progress: &Progress) -> [String; 2] {
    let (mut how_far, mut rest) = (Vec::new(), Vec::new());
    if progress.phase == Phase::Layers {
        how_far.push(format!("{} of {}", progress.layer, counted(progress.layers, "layer")));
    }
    how_far.extend(progress.message.as_ref().map(|message| clean(message.as_bytes(), 200)));
    if let Some(eta) = progress.eta_seconds.filter(|eta| eta.is_finite() && *eta >= 1.0 && *eta < 1e9) {
        how_far.push(format!("{:#} left", Span(Duration::from_secs_f64(eta))));
    }
    if progress.phase == Phase::Layers && progress.tokens_per_second > 0.0 {
        rest.push(format!("{} tokens/s", grouped(progress.tokens_per_second as u64)));
    }
    if progress.bytes_total > 0 {
        rest.push(format!("{} of {} weights", Bytes(progress.bytes_read), Bytes(progress.bytes_total)));
    }
    [how_far, rest].map(|parts| parts.join(", "))
}

/// Remaining time and cost so far.
fn standing(elapsed: Duration, meter: Option<&CostMeter>, now_ms: u64) -> String {
    let Some(meter) = meter else { return format!("{:#} so far", Span(elapsed)) };
    let spent = format!("{} in {:#}", meter.cost(now_ms), Span(elapsed));
    let Some(deadline) = meter.deadline else { return spent };
    let until = rfc3339(deadline);
    let time = until.get(..16).unwrap_or(&until).replace('T', " ");
    // Within a day the time alone says which day is meant, and the line is short.
    let is_near = deadline.abs_diff(now_ms / 1000) < 86_400;
    let time = time.get(11..).filter(|_| is_near).unwrap_or(time.as_str());
    format!("{spent}, deadline {time} UTC")
}

fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Starting => "Starting",
        Phase::Fetching => "Fetching the checkpoint",
        Phase::Checking => "Checking the checkpoint",
        Phase::Tokenizing => "Tokenizing",
        Phase::Embedding => "Embedding",
        Phase::Layers => "Layers",
        Phase::Head => "Perplexity",
        Phase::Writing => "Writing results",
        Phase::Done => "Done",
        Phase::Failed => "Failed",
    }
}

/// Whether the event is shown with `-v` only.
fn is_detail(event: &HostEvent) -> bool {
    use HostEvent::{AlreadyThere, Connected, Fetching, Launched, Log};
    matches!(event, AlreadyThere { .. } | Connected | Fetching { .. } | Launched { .. } | Log(_))
}

/// Sentence for a host event; empty for events that are shown otherwise.
fn on_host(event: &HostEvent) -> String {
    let sentence = match event {
        HostEvent::Waiting { what, attempt, .. } => format!("Waiting for SSH (attempt {attempt}): {what}"),
        HostEvent::Connected => "Logged in".to_owned(),
        HostEvent::Probed(facts) => format!("Host: {}", host_facts(facts)),
        HostEvent::AlreadyThere { name } => format!("Not sent, it is there already: {}", short_name(name)),
        HostEvent::Launched { pid } => format!("The worker runs as process {pid}"),
        HostEvent::ConnectionLost { why } => format!("Connection lost, the worker keeps running: {why}"),
        HostEvent::Reconnected => "Connected again".to_owned(),
        HostEvent::BadProgress(line) => format!("A damaged progress line: {line}"),
        HostEvent::Log(line) => format!("worker: {line}"),
        HostEvent::LogSkipped(bytes) => format!("{} of the log were skipped", Bytes(*bytes)),
        HostEvent::ProgressSkipped(bytes) => format!("{} of the progress file were skipped", Bytes(*bytes)),
        HostEvent::Fetching { name, bytes } => format!("Fetching {} ({})", short_name(name), Bytes(*bytes)),
        HostEvent::Uploading { .. } | HostEvent::Progress(_) | HostEvent::Read(_) => String::new(),
    };
    clean(sentence.as_bytes(), LINE)
}

fn short_name(name: &str) -> String {
    clean(name.as_bytes(), NAME)
}

/// Description of a host, with anomalies.
fn host_facts(facts: &HostFacts) -> String {
    let cores = facts.cores.map(|cores| counted(cores as usize, "CPU core"));
    let ram = facts.ram.map(|ram| format!("{ram} memory"));
    let disk = facts.disk_free.map(|disk| format!("{disk} disk free"));
    let gpus = facts.gpus.first().map(|first| format!("{} x {}", facts.gpus.len(), first.name));
    let cuda = facts.gpus.first().and_then(|gpu| Some(format!("driver {} (CUDA {})", gpu.driver, facts.cuda?)));
    let skew = facts.clock_skew.filter(|skew| skew.abs() > MAX_SKEW);
    let clock = skew.map(|skew| format!("its clock is {} s {}", skew.abs(), if skew > 0 { "fast" } else { "slow" }));
    let parts = [gpus, cuda, Some(format!("{} {}", facts.os, facts.arch)), cores, ram, disk, clock];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// Reason, after "it was ended: ".
pub(crate) fn stray(why: Stray) -> &'static str {
    match why {
        Stray::UnknownRun => "its time was up, and no run of the ledger accounts for it",
        Stray::RunClosed => "its run is over",
        Stray::Superseded => "its run has another instance, or none",
        Stray::Expired => "its time was up, and its run's record cannot be read",
    }
}

/// Reason, after "it was brought to its end: ".
pub(crate) fn finish(why: Finish) -> &'static str {
    match why {
        Finish::Ending => "its instance was about to be ended",
        Finish::Expired => "its time was up",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::FailureDetail;

    fn closed(ending: RunOutcome) -> RunState {
        RunState::Closed { ending, results: None, loss: None }
    }

    #[test]
    fn exit_statuses_are_the_documented_ones() {
        let trouble = |kind| RunOutcome::Failed { trouble: FailureDetail { kind, message: String::new(), hint: None } };
        for (ending, number) in [
            (RunOutcome::Completed, 0),
            (RunOutcome::WorkerVanished { exit: None }, 1),
            (trouble(RunFailureKind::Local), 1),
            (trouble(RunFailureKind::Unfit), 1),
            (trouble(RunFailureKind::NoOffer), 3),
            (RunOutcome::Deadline, 4),
            (trouble(RunFailureKind::Broker), 5),
            (trouble(RunFailureKind::Host), 5),
            (RunOutcome::InstanceLost, 5),
            (RunOutcome::Interrupted, 130),
            (RunOutcome::Cancelled, 130),
        ] {
            assert_eq!(ExitStatus::of_run(&closed(ending.clone())).number(), number, "{ending:?}");
        }
        assert_eq!(ExitStatus::of_run(&RunState::initial()).number(), 6, "what has no ending is not over");
    }

    fn at(phase: Phase, message: Option<&str>) -> Progress {
        Progress {
            schema: 1,
            at_ms: 0,
            phase,
            layer: 28,
            layers: 28,
            bytes_read: 1 << 30,
            bytes_total: 2 << 30,
            tokens_per_second: 1234.5,
            eta_seconds: Some(75.0),
            message: message.map(str::to_owned),
        }
    }

    #[test]
    fn progress_shows_share_remaining_time_and_cost() {
        let layers = detail(&Progress { layer: 5, ..at(Phase::Layers, None) });
        assert_eq!(layers, ["5 of 28 layers, 1 min left", "1,234 tokens/s, 1.0 GiB of 2.0 GiB weights"]);
        let head = detail(&at(Phase::Head, Some("3 of 38 parts of the vocabulary")));
        assert_eq!(head, ["3 of 38 parts of the vocabulary, 1 min left", "1.0 GiB of 2.0 GiB weights"]);
        assert_eq!(standing(Duration::from_secs(65), None, 0), "1 min so far");
        let run = crate::run::ledger::tests::rented();
        let words = standing(Duration::from_secs(65), Some(&run.meter()), run.created_at_ms + 3_600_000);
        assert!(words.starts_with("$3") && words.contains(" in 1 min, deadline "), "{words}");
        assert!(words.ends_with(", deadline 1970-01-01 00:00 UTC"), "{words}");
        let on_the_day = standing(Duration::from_secs(65), Some(&run.meter()), 5000);
        assert!(on_the_day.ends_with(" in 1 min, deadline 00:00 UTC"), "{on_the_day}");
        let over_midnight = standing(Duration::from_secs(65), Some(&run.meter()), 86_400_000);
        assert!(over_midnight.ends_with(" in 1 min, deadline 00:00 UTC"), "{over_midnight}");
    }

    #[test]
    fn repeated_log_lines_are_suppressed() {
        let said = PlainLine { at: Instant::now(), label: "Perplexity".into(), position: 28, pause: PLAIN_PAUSE };
        assert!(!said.is_news("Perplexity", 28, 28), "all layers are done as they were before");
        assert!(said.is_news("Writing results", 28, 28) && said.is_news("Perplexity", 30, 30));
        let pauses = (0..9).scan(PLAIN_PAUSE, |pause, _| {
            *pause = PlainLine { at: Instant::now(), label: "x".into(), position: 0, pause: *pause }.next_pause("x")?;
            Some(pause.as_secs())
        });
        assert_eq!(pauses.collect::<Vec<_>>(), [4, 8, 16, 32, 60, 60, 60, 60, 60]);
        assert_eq!(said.next_pause("Layers"), None);
        let mut now = DisplayState::default();
        assert_eq!(["refused", "refused", "silent", "refused"].map(|why| now.is_new(why)), [true, false, true, true]);
    }

    #[test]
    fn every_host_event_has_a_message() {
        let facts = crate::run::deploy::tests::fake::facts();
        let late = HostFacts { clock_skew: Some(-700), cuda: "12.4".parse().ok(), gpus: vec![gpu()], ..facts };
        let name = || "model".to_owned();
        let told = [
            (HostEvent::Connected, true, "Logged in"),
            (HostEvent::AlreadyThere { name: name() }, true, "already: model"),
            (HostEvent::Launched { pid: 7 }, true, "process 7"),
            (HostEvent::Fetching { name: name(), bytes: 1 << 30 }, true, "model (1.0 GiB)"),
            (HostEvent::LogSkipped(1 << 20), false, "1.0 MiB of the log"),
            (HostEvent::ProgressSkipped(1 << 20), false, "1.0 MiB of the progress"),
            (HostEvent::BadProgress("not json".into()), false, "not json"),
            (HostEvent::Probed(late.clone()), false, "1 x NVIDIA X, driver 1 (CUDA 12.4), Linux x86_64, 4 CPU cores"),
            (HostEvent::Probed(late), false, "its clock is 700 s slow"),
        ];
        for (event, is_detail, words) in told {
            let said = on_host(&event);
            assert!(said.contains(words) && super::is_detail(&event) == is_detail, "{event:?}: {said}");
        }
    }

    fn gpu() -> crate::host::GpuFacts {
        let (name, driver) = ("NVIDIA X".into(), "1".into());
        crate::host::GpuFacts { index: 0, name, memory: None, driver, uuid: String::new() }
    }

    #[test]
    fn instance_that_may_be_left_has_the_highest_exit_priority() {
        use ExitStatus::{Done, Failed, InstanceLeft, Interrupted, TimeUp};
        assert_eq!(ExitStatus::worst([]), Done);
        assert_eq!(ExitStatus::worst([Done, Failed, Done]), Failed);
        assert_eq!(ExitStatus::worst([Failed, TimeUp, Interrupted]), Interrupted);
        assert_eq!(ExitStatus::worst([Interrupted, InstanceLeft, Failed]), InstanceLeft);
    }

    #[test]
    fn errors_without_an_instance_do_not_exit_6() {
        let silent = DriveError::Silent { message: "no answer".into(), hint: Some("check the key".into()) };
        assert_eq!(CliError::of_drive_error(&silent).status.number(), 5);
        let full = LedgerError::Io { path: "/s".into(), source: std::io::ErrorKind::StorageFull.into() };
        assert_eq!(CliError::of_drive_error(&DriveError::Ledger(full)).status.number(), 1, "a full disk is no cloud");
        let unknown = DriveError::Broker { message: "no answer".into() };
        assert_eq!(CliError::of_drive_error(&unknown).status.number(), 6);
    }

    #[test]
    fn error_with_a_left_instance_says_how_to_end_it() {
        let cli_error =
            CliError::from(DriveError::Instance { run: "abc".into(), message: "it is still listed".into() });
        assert_eq!(cli_error.status.number(), 6);
        assert!(cli_error.hint.unwrap().contains("outliers runs cancel abc"));
    }
}
