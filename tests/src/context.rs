//! Environment of a test: a working folder, its own state, and the two programs.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use outliers::cloud::broker::local::{Bill, LocalBroker};
use outliers_protocol::Results;
use serde_json::Value;

use crate::programs::controller;

/// Timeout of a test: longer than any step takes on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(180);
/// Least time between two looks at what is waited for.
const PAUSE: Duration = Duration::from_millis(20);

/// See the module. Removed on drop.
pub struct TestContext {
    folder: tempfile::TempDir,
    environment: Vec<(String, String)>,
}

impl Default for TestContext {
    fn default() -> Self {
        Self::new()
    }
}

impl TestContext {
    /// An empty context.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::create_dir(folder.path().join("work")).expect("it is empty");
        Self { folder, environment: Vec::new() }
    }

    /// With an environment variable.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Where commands run.
    pub fn work(&self) -> PathBuf {
        self.folder.path().join("work")
    }

    /// Ledger, keys, and the local cloud.
    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// `outliers ARGUMENTS`, not yet started.
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(controller());
        command.args(arguments).current_dir(self.work()).stdin(Stdio::null());
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command
            .env("HOME", self.folder.path())
            .env("OUTLIERS_STATE", self.state())
            .env("HF_HOME", self.folder.path().join("hf"));
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs `outliers ARGUMENTS` to its end.
    pub fn run<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Said {
        Said::from(self.command(arguments).output().expect("the controller starts"))
    }

    /// Starts `outliers ARGUMENTS`; its output goes to files.
    pub fn start<S: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Child {
        self.begin(&mut self.command(arguments))
    }

    /// The same through a wrapper program, as `nohup`.
    pub fn start_under<S: AsRef<std::ffi::OsStr>>(
        &self,
        other: &[&str],
        arguments: impl IntoIterator<Item = S>,
    ) -> Child {
        let plain = self.command(arguments);
        let mut command = Command::new(other[0]);
        command.args(&other[1..]).arg(plain.get_program()).args(plain.get_args());
        command.current_dir(self.work()).stdin(Stdio::null()).env_clear();
        command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
        self.begin(&mut command)
    }

    fn begin(&self, command: &mut Command) -> Child {
        let file = |name: &str| std::fs::File::create(self.folder.path().join(name)).expect("a writable folder");
        command.stdout(file("stdout")).stderr(file("stderr")).spawn().expect("the controller starts")
    }

    /// Standard error of the last started command so far.
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("stderr")).unwrap_or_default()
    }

    /// Standard output of the last started command so far.
    pub fn stdout(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("stdout")).unwrap_or_default()
    }

    /// The local cloud's bill.
    pub fn bill(&self) -> Bill {
        LocalBroker::new(self.state().join("local"), controller()).bill().expect("the local cloud answers")
    }

    /// The one folder of results.
    pub fn results_folder(&self) -> PathBuf {
        let results = self.work().join("remote_results");
        let entries = std::fs::read_dir(&results).unwrap_or_else(|e| panic!("{}: {e}", results.display()));
        let folders: Vec<PathBuf> = entries.map(|e| e.expect("readable").path()).filter(|p| p.is_dir()).collect();
        assert_eq!(folders.len(), 1, "one folder of results: {folders:?}");
        folders[0].clone()
    }

    /// The fetched results.
    pub fn results(&self) -> Results {
        let path = self.results_folder().join("results.json");
        serde_json::from_slice(&std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
            .expect("results")
    }

    /// A command's `--json` document.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let said = self.run(arguments.iter().copied().chain(["--json"]));
        serde_json::from_str(&said.stdout).unwrap_or_else(|e| panic!("{e}: {said:?}"))
    }

    /// Waits until `ready`.
    pub fn wait_for(&self, what: &str, mut ready: impl FnMut() -> bool) {
        let begun = Instant::now();
        loop {
            let asked = Instant::now();
            if ready() {
                return;
            }
            assert!(begun.elapsed() < TIMEOUT, "waited for {what}; said: {}", self.stderr());
            // What runs a program to find out leaves the processors to what it waits for.
            std::thread::sleep(PAUSE.max(2 * asked.elapsed()));
        }
    }

    /// Final assertion: the cloud bills nothing, and no process of this context runs.
    pub fn assert_nothing_left(&self) {
        let bill = self.bill();
        assert!(bill.running.is_empty(), "still billing: {:?}", bill.running);
        self.wait_for("all processes to end", || processes_naming(self.folder.path()).is_empty());
    }
}

/// Ids of processes whose command line names a path below `folder`.
fn processes_naming(folder: &Path) -> Vec<u32> {
    let folder = folder.to_str().expect("UTF-8");
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let ids = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok());
    ids.filter(|id| *id != std::process::id())
        .filter(|id| {
            let line = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(folder)
        })
        .collect()
}

/// Output and exit code of a command.
#[derive(Debug)]
pub struct Said {
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

impl Said {
    /// Asserts success.
    ///
    /// # Panics
    /// If it failed; with all its output.
    #[must_use]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }
}
