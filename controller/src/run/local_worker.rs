//! The worker program on this machine: finds it, queries its version, and runs it.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use clap::ValueEnum;
use clap::builder::PossibleValue;
use outliers_protocol::{
    Ablation, ByteSize, CorpusSource, Failure, FailureKind, Inspection, JobSpec, Manifest, ModelSource, Outcome,
    Packing, Progress, SCHEMA, VersionInfo, Weights, files,
};
use rustix::process::Signal;
use serde::de::DeserializeOwned;
use tokio::process::Command;

use crate::cloud::broker::local;
use crate::files::{MAX_FILE_BYTES, read_json, read_small};
use crate::text::clean;
use crate::units::{Bytes, CudaVersion, Span};

/// Name of the program.
const NAME: &str = "outliers-worker";
/// Name of a worker built for other machines.
pub const PORTABLE: &str = "outliers-worker-portable";

/// Whether this machine can run the instances' worker.
const RUNS_PORTABLE: bool = cfg!(all(target_os = "linux", target_arch = "x86_64"));

/// Interval of reads of the progress file.
const PAUSE: Duration = Duration::from_millis(200);

/// A worker program of the same version that runs on this machine.
#[derive(Clone, Debug)]
pub struct LocalWorker {
    path: PathBuf,
    pushed: Pushed,
    limits: InspectLimits,
}

/// Resource limits of an inspection, since the inspected files are untrusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InspectLimits {
    /// Memory; at most three quarters of the machine's.
    pub memory: Bytes,
    /// Wall time.
    pub time: Duration,
}

impl InspectLimits {
    /// No limits other than the machine's.
    pub const NONE: Self = Self { memory: Bytes::from_gib(1 << 20), time: Duration::MAX };

    fn memory_here(self) -> Bytes {
        local::memory().map_or(self.memory, |there| self.memory.min(Bytes(there.0 / 4 * 3)))
    }
}

/// The worker for instances.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// Path of the program.
    pub path: PathBuf,
    /// Minimum CUDA version of an instance's driver; `None`: it uses no GPU.
    pub cuda: Option<CudaVersion>,
}

/// What `inspect` checks besides the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InspectScope {
    /// Only the checkpoint.
    Model,
    /// Also that the text can be cut into sequences.
    Text,
    /// As `Text`, and that the job's devices are in this machine.
    TextAndDevices,
}

/// Errors of the worker on this machine.
#[derive(Debug, thiserror::Error)]
pub enum LocalWorkerError {
    /// The program does not exist.
    #[error("the worker program is not there: {}", path.display())]
    Missing {
        /// The path that was tried.
        path: PathBuf,
    },
    /// The program cannot be run.
    #[error("{}: {source}", path.display())]
    Unrunnable {
        /// The file's path.
        path: PathBuf,
        /// Error of the system.
        source: std::io::Error,
    },
    /// The program has another version.
    #[error("{} is version {theirs}; this program is {ours}", path.display())]
    Version {
        /// The file's path.
        path: PathBuf,
        /// Its version.
        theirs: String,
        /// This program's version.
        ours: String,
    },
    /// The worker reported a failure.
    #[error("{}", .0.message)]
    Failed(Failure),
    /// The worker ended without a report.
    #[error("the worker ended with {status}: {said}")]
    Odd {
        /// The worker's exit status.
        status: ExitStatus,
        /// End of its output.
        said: String,
    },
    /// The inspection exceeded its memory limit.
    #[error("looking at the model and its text takes more than {memory} of memory")]
    TooMuch {
        /// The limit.
        memory: Bytes,
    },
    /// The inspection exceeded its time limit.
    #[error("looking at the model and its text takes longer than {}", Span(*time))]
    TooLong {
        /// The limit.
        time: Duration,
    },
    /// A file of the worker cannot be read or written.
    #[error("{}: {why}", path.display())]
    File {
        /// The file's path.
        path: PathBuf,
        /// The error.
        why: String,
    },
}

impl LocalWorkerError {
    /// The remedy, if there is one.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Missing { .. } => Some(
                "`cargo build --release` makes both programs, `cargo install --locked --path worker` puts it beside an \
                 installed controller; or name it in the settings: worker.binary"
                    .to_owned(),
            ),
            Self::Unrunnable { .. } => {
                Some("it must be a program for this machine; see worker.binary in the settings".to_owned())
            }
            Self::Version { .. } => {
                Some("build both programs together; `outliers worker build` makes the portable one".to_owned())
            }
            Self::Failed(failure) => failure.hint.clone(),
            Self::TooMuch { .. } => Some(
                "cut the text into smaller files; a tokenizer.json that is damaged or hostile takes any amount; \
                 worker.inspect-memory in the settings is the limit"
                    .to_owned(),
            ),
            Self::TooLong { .. } => Some(
                "a tokenizer.json that is damaged or hostile takes for ever, a slow hub long; \
                 worker.inspect-time in the settings is the limit"
                    .to_owned(),
            ),
            Self::Odd { .. } | Self::File { .. } => None,
        }
    }
}

impl LocalWorker {
    /// Finds the worker in the settings, else beside `exe`, and the one for instances. Queries
    /// their versions.
    ///
    /// # Errors
    /// It is missing, cannot be run, or has another version.
    pub async fn find(named: Option<&Path>, exe: &Path) -> Result<Self, LocalWorkerError> {
        let path = named.map_or_else(|| exe.with_file_name(NAME), Path::to_owned);
        let pushed = Pushed::look_at(path.clone()).await?;
        let portable = exe.with_file_name(PORTABLE);
        let pushed = if named.is_none() && portable.is_file() { Pushed::portable(portable).await? } else { pushed };
        Ok(Self { path, pushed, limits: InspectLimits::NONE })
    }

    /// Sets limits for inspections.
    #[must_use]
    pub fn limited(self, limits: InspectLimits) -> Self {
        Self { limits, ..self }
    }

    /// Path of the program.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the worker for instances is older than this one: the same version, but possibly
    /// from other source.
    pub fn pushes_an_older_one(&self) -> bool {
        let made = |path: &Path| path.metadata().and_then(|meta| meta.modified());
        matches!((made(&self.pushed.path), made(&self.path)), (Ok(pushed), Ok(here)) if pushed < here)
    }

    /// The worker for instances: the one beside it built for other machines, if there is one, else
    /// itself.
    pub fn pushed(&self) -> &Pushed {
        &self.pushed
    }

    /// Describes the job's checkpoint, and what the job needs.
    ///
    /// # Errors
    /// The worker's report: a model that is missing, gated, damaged or of an unknown architecture,
    /// and failed checks of `check`; exceeded memory or time limits.
    pub async fn inspect(&self, job: &JobSpec, check: InspectScope) -> Result<Inspection, LocalWorkerError> {
        let (memory, time) = (self.limits.memory_here(), self.limits.time);
        let mut arguments = inspect_arguments(job, check);
        arguments.push(format!("--memory-limit={}", ByteSize(memory.0)));
        match tokio::time::timeout(time, ask(&self.path, &arguments)).await {
            Err(_) => Err(LocalWorkerError::TooLong { time }),
            Ok(Err(LocalWorkerError::Odd { status, said })) if ran_out_of_memory(status, &said) => {
                Err(LocalWorkerError::TooMuch { memory })
            }
            Ok(answer) => answer,
        }
    }

    /// Writes the demo's checkpoint to `folder`. Returns the planted features.
    ///
    /// # Errors
    /// The worker's report.
    pub async fn demo_model<T: DeserializeOwned>(&self, folder: &Path) -> Result<T, LocalWorkerError> {
        let arguments = ["demo-model".to_owned(), "--output".to_owned(), folder.to_string_lossy().into_owned()];
        ask(&self.path, &arguments).await
    }

    /// Runs a job into `folder`, and reports its progress.
    ///
    /// # Errors
    /// The worker's report, or its end without one.
    pub async fn run(
        &self,
        job: &JobSpec,
        folder: &Path,
        on: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<(), LocalWorkerError> {
        std::fs::create_dir_all(folder).map_err(trouble(folder))?;
        let job_file = folder.join(files::JOB);
        let text = serde_json::to_vec_pretty(job).map_err(|error| trouble(&job_file)(error.into()))?;
        std::fs::write(&job_file, text).map_err(trouble(&job_file))?;
        // Files of an earlier run would be mistaken for this one's.
        for name in [files::PROGRESS, files::MANIFEST] {
            let _ = std::fs::remove_file(folder.join(name));
        }
        let log_file = folder.join(files::LOG);
        let log = std::fs::File::create(&log_file).map_err(trouble(&log_file))?;
        let mut command = Command::new(&self.path);
        command.arg("run").arg(&job_file).arg("--output").arg(folder);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).kill_on_drop(true);
        let mut child = command.spawn().map_err(unrunnable(&self.path))?;
        let mut read = 0;
        loop {
            let ended = tokio::time::timeout(PAUSE, child.wait()).await;
            read = pass_on(&folder.join(files::PROGRESS), read, on);
            let Ok(status) = ended else { continue };
            let status = status.map_err(unrunnable(&self.path))?;
            return if status.success() { Ok(()) } else { Err(last_words(folder, status)) };
        }
    }
}

impl Pushed {
    /// Queries the version of the program at `path`.
    ///
    /// # Errors
    /// It is missing, cannot be run, or has another version.
    pub async fn look_at(path: PathBuf) -> Result<Self, LocalWorkerError> {
        if !path.is_file() {
            return Err(LocalWorkerError::Missing { path });
        }
        let info: VersionInfo = ask(&path, &["version".to_owned()]).await?;
        Self::of(path, &info)
    }

    /// The worker built for other machines. If this machine cannot run it, the document beside it
    /// describes it.
    async fn portable(path: PathBuf) -> Result<Self, LocalWorkerError> {
        let about = path.with_extension("json");
        if RUNS_PORTABLE || !about.is_file() { Self::look_at(path).await } else { Self::told(path, about) }
    }

    /// The description of the program at `path` in a document.
    fn told(path: PathBuf, about: PathBuf) -> Result<Self, LocalWorkerError> {
        let info: VersionInfo = read_json(&about).map_err(trouble(&about))?;
        Self::of(path, &info)
    }

    fn of(path: PathBuf, info: &VersionInfo) -> Result<Self, LocalWorkerError> {
        let ours = format!("{} (documents {SCHEMA})", env!("CARGO_PKG_VERSION"));
        let theirs = format!("{} (documents {})", info.version, info.schema);
        if ours != theirs {
            return Err(LocalWorkerError::Version { path, theirs, ours });
        }
        let oldest = info.oldest_cuda.as_deref().filter(|_| info.cuda);
        let cuda = oldest.and_then(|version| version.parse().ok());
        Ok(Self { path, cuda })
    }
}

async fn ask<T: DeserializeOwned>(program: &Path, arguments: &[String]) -> Result<T, LocalWorkerError> {
    let mut command = Command::new(program);
    command.args(arguments).arg("--json").stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.map_err(unrunnable(program))?;
    if output.status.success()
        && let Ok(document) = serde_json::from_slice(&output.stdout)
    {
        return Ok(document);
    }
    match serde_json::from_slice::<Failure>(&output.stdout) {
        Ok(failure) if !output.status.success() => Err(LocalWorkerError::Failed(failure)),
        _ => Err(LocalWorkerError::Odd { status: output.status, said: clean(tail(&output.stderr), 500) }),
    }
}

fn tail(text: &[u8]) -> &[u8] {
    &text[text.len().saturating_sub(500)..]
}

/// Whether it aborted for lack of memory, by its message.
fn ran_out_of_memory(status: ExitStatus, said: &str) -> bool {
    status.signal() == Some(Signal::ABORT.as_raw()) && said.contains("memory allocation of")
}

fn unrunnable(program: &Path) -> impl Fn(std::io::Error) -> LocalWorkerError {
    |source| LocalWorkerError::Unrunnable { path: program.to_owned(), source }
}

fn trouble(path: &Path) -> impl Fn(std::io::Error) -> LocalWorkerError {
    |error| LocalWorkerError::File { path: path.to_owned(), why: error.to_string() }
}

fn inspect_arguments(job: &JobSpec, check: InspectScope) -> Vec<String> {
    let mut arguments = vec!["inspect".to_owned()];
    let mut option = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            // In one argument, so that a value with a leading dash stays a value.
            arguments.push(format!("--{name}={value}"));
        }
    };
    option("model", Some(job.model.name().to_owned()));
    if let ModelSource::Hub { revision, .. } = &job.model {
        option("revision", Some(revision.clone()));
    }
    option("weights", job.weights.as_ref().map(Weights::to_string));
    option("stream-budget", job.stream_budget_bytes.map(|bytes| ByteSize(bytes).to_string()));
    option("num-sequences", job.corpus.num_sequences.map(|n| n.to_string()));
    option("sequence-length", job.corpus.sequence_length.map(|n| n.to_string()));
    let word = |value: Option<PossibleValue>| value.map(|value| value.get_name().to_owned());
    option("precision", word(job.precision.to_possible_value()));
    let features = |ablation: &Ablation| ablation.features.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    option("ablate", job.ablation.as_ref().map(features));
    let measured: Vec<&str> = job.measure.iter().map(|measurement| measurement.name()).collect();
    option("measure", Some(measured.join(",")).filter(|list| !list.is_empty()));
    let exports: Vec<&str> = job.export.iter().map(|export| export.name()).collect();
    option("export", Some(exports.join(",")).filter(|list| !list.is_empty()));
    option("layers", job.layers.map(|n| n.to_string()));
    option("micro-batch-tokens", job.micro_batch_tokens.map(|n| n.to_string()));
    if check != InspectScope::Model {
        match &job.corpus.source {
            CorpusSource::Builtin(_) => {}
            CorpusSource::Files(paths) => paths.iter().for_each(|path| option("corpus", Some(path.clone()))),
            CorpusSource::TokenIds(path) => option("token-ids", Some(path.clone())),
            CorpusSource::Dataset(dataset) => option("dataset", Some(dataset.to_string())),
        }
        option("text-field", Some(job.corpus.text_field.clone()));
        option("skip-documents", Some(job.corpus.skip_documents.to_string()));
        option("shuffle", job.corpus.shuffle_seed.map(|seed| seed.to_string()));
        option("bos", word(job.corpus.bos.to_possible_value()));
    }
    option(
        "devices",
        Some(job.devices.join(",")).filter(|list| check == InspectScope::TextAndDevices && !list.is_empty()),
    );
    if check != InspectScope::Model {
        arguments.push("--check-text".to_owned());
        match job.corpus.packing {
            Packing::Packed => {}
            Packing::Separate => arguments.push("--separate-documents".to_owned()),
            Packing::Overlapping => arguments.push("--overlapping-windows".to_owned()),
        }
    }
    arguments
}

/// Reports the whole lines after byte `from`. Returns where the next one begins.
fn pass_on(path: &Path, from: usize, on: &(dyn Fn(Progress) + Send + Sync)) -> usize {
    let Ok(bytes) = read_small(path, MAX_FILE_BYTES) else { return from };
    let Some(new) = bytes.get(from..) else { return from };
    let whole = new.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    for line in new[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        if let Ok(progress) = serde_json::from_slice(line) {
            on(progress);
        }
    }
    from + whole
}

/// The error of a worker that ended without a report.
fn last_words(folder: &Path, status: ExitStatus) -> LocalWorkerError {
    if let Ok(Manifest { outcome: Outcome::Failed(failure), .. }) = read_json(&folder.join(files::MANIFEST)) {
        return LocalWorkerError::Failed(failure);
    }
    let log = read_small(&folder.join(files::LOG), MAX_FILE_BYTES).unwrap_or_default();
    LocalWorkerError::Odd { status, said: clean(tail(&log), 500) }
}

/// Whether the failure is caused by the request rather than the machine.
pub fn is_refusal(error: &LocalWorkerError) -> bool {
    match error {
        LocalWorkerError::Failed(failure) => failure.kind != FailureKind::Internal,
        LocalWorkerError::TooMuch { .. } | LocalWorkerError::TooLong { .. } => true,
        _ => false,
    }
}

/// The local files of a job's corpus.
pub fn corpus_files(job: &JobSpec) -> Vec<&str> {
    match &job.corpus.source {
        CorpusSource::Builtin(_) | CorpusSource::Dataset(_) => Vec::new(),
        CorpusSource::Files(paths) => paths.iter().map(String::as_str).collect(),
        CorpusSource::TokenIds(path) => vec![path],
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Mutex;

    use outliers_protocol::{Export, Measurement};

    use super::*;

    fn program(folder: &Path, script: &str) -> PathBuf {
        let path = folder.join(NAME);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn version(version: &str) -> String {
        format!(r#"echo '{{"version":"{version}","schema":{SCHEMA},"target":"t","cuda":false,"architectures":[]}}'"#)
    }

    #[tokio::test]
    async fn portable_worker_build_is_pushed() {
        let folder = tempfile::tempdir().unwrap();
        let (exe, ours) = (folder.path().join("outliers"), version(env!("CARGO_PKG_VERSION")));
        let here = program(folder.path(), &ours);
        let alone = LocalWorker::find(None, &exe).await.unwrap();
        assert_eq!(*alone.pushed(), Pushed { path: here.clone(), cuda: None });
        let portable = folder.path().join(PORTABLE);
        std::fs::copy(&here, &portable).unwrap();
        let with_cuda = ours.replace("\"cuda\":false", "\"cuda\":true,\"oldest_cuda\":\"11.8\"");
        std::fs::write(&portable, format!("#!/bin/sh\n{with_cuda}\n")).unwrap();
        let both = LocalWorker::find(None, &exe).await.unwrap();
        let cuda = Some(CudaVersion { major: 11, minor: 8 });
        assert_eq!((both.path(), both.pushed()), (&*here, &Pushed { path: portable.clone(), cuda }));
        assert!(!both.pushes_an_older_one() && !alone.pushes_an_older_one());
        let later = std::time::SystemTime::now() + Duration::from_secs(60);
        std::fs::File::options().write(true).open(&here).unwrap().set_modified(later).unwrap();
        assert!(both.pushes_an_older_one());
        assert_eq!(
            LocalWorker::find(Some(&here), &exe).await.unwrap().pushed(),
            alone.pushed(),
            "the settings name it"
        );
        std::fs::write(&portable, format!("#!/bin/sh\n{}\n", version("0.0.1"))).unwrap();
        let stale = LocalWorker::find(None, &exe).await.unwrap_err();
        assert!(stale.to_string().contains(PORTABLE) && stale.hint().unwrap().contains("worker build"), "{stale}");
    }

    #[test]
    fn version_file_describes_a_worker_that_cannot_run_here() {
        let folder = tempfile::tempdir().unwrap();
        let (program, about) = (folder.path().join(PORTABLE), folder.path().join(format!("{PORTABLE}.json")));
        assert_eq!(program.with_extension("json"), about, "where `worker build` writes it");
        let write = |version: &str| {
            let info = serde_json::json!({
                "version": version, "schema": SCHEMA, "target": "x86_64-linux", "cuda": true, "oldest_cuda": "11.8",
                "architectures": [],
            });
            std::fs::write(&about, info.to_string()).unwrap();
        };
        write(env!("CARGO_PKG_VERSION"));
        let cuda = Some(CudaVersion { major: 11, minor: 8 });
        assert_eq!(Pushed::told(program.clone(), about.clone()).unwrap(), Pushed { path: program.clone(), cuda });
        write("9.9.9");
        let stale = Pushed::told(program.clone(), about.clone()).unwrap_err();
        assert!(matches!(stale, LocalWorkerError::Version { .. }), "{stale}");
        std::fs::write(&about, "{").unwrap();
        let broken = Pushed::told(program, about).unwrap_err();
        assert!(broken.to_string().contains("outliers-worker-portable.json"), "{broken}");
    }

    #[tokio::test]
    async fn worker_of_another_version_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let exe = folder.path().join("outliers");
        let missing = LocalWorker::find(None, &exe).await.unwrap_err();
        assert!(matches!(missing, LocalWorkerError::Missing { .. }) && missing.hint().is_some());
        program(folder.path(), &version(env!("CARGO_PKG_VERSION")));
        LocalWorker::find(None, &exe).await.unwrap();
        program(folder.path(), &version("9.9.9"));
        let other = LocalWorker::find(None, &exe).await.unwrap_err();
        assert!(matches!(other, LocalWorkerError::Version { .. }) && other.to_string().contains("9.9.9"));
        program(folder.path(), "echo hello; echo oops >&2; exit 3");
        let odd = LocalWorker::find(None, &exe).await.unwrap_err();
        assert!(matches!(odd, LocalWorkerError::Odd { .. }) && odd.to_string().contains("oops"));
    }

    #[tokio::test]
    async fn worker_error_message_is_passed_on() {
        let folder = tempfile::tempdir().unwrap();
        let path =
            program(folder.path(), r#"echo '{"kind":"unsupported","message":"unknown","hint":"known: a"}'; exit 1"#);
        let job = JobSpec::new(ModelSource::Folder { path: "/m".into() });
        let pushed = Pushed { path: path.clone(), cuda: None };
        let worker = LocalWorker { path, pushed, limits: InspectLimits::NONE };
        let error = worker.inspect(&job, InspectScope::Model).await.unwrap_err();
        assert_eq!((error.to_string().as_str(), error.hint().as_deref()), ("unknown", Some("known: a")));
        assert!(is_refusal(&error));
    }

    #[tokio::test]
    async fn inspection_is_bounded_in_time_and_memory() {
        let folder = tempfile::tempdir().unwrap();
        let (pid, limit) = (folder.path().join("pid"), folder.path().join("limit"));
        let tell = format!("for word; do case $word in --memory-limit=*) echo \"$word\" > {limit:?};; esac; done");
        let path = program(folder.path(), &format!("{tell}\necho $$ > {pid:?}; exec sleep 600"));
        let pushed = Pushed { path: path.clone(), cuda: None };
        let worker = LocalWorker { path, pushed, limits: InspectLimits::NONE };
        let job = JobSpec::new(ModelSource::Folder { path: "/m".into() });
        let mut time = Duration::from_millis(200);
        // Waits for its start, on a busy machine as well.
        while !pid.exists() {
            time *= 2;
            let limited = worker.clone().limited(InspectLimits { memory: Bytes(1 << 20), time });
            let error = limited.inspect(&job, InspectScope::Model).await.unwrap_err();
            assert!(matches!(error, LocalWorkerError::TooLong { .. }) && is_refusal(&error), "{error}");
            assert!(error.hint().unwrap().contains("worker.inspect-time"));
        }
        assert_eq!(std::fs::read_to_string(limit).unwrap().trim(), "--memory-limit=1048576 B");
        let pid = std::fs::read_to_string(pid).unwrap();
        let runs = || {
            let state = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
            state.contains("(sleep) S")
        };
        while runs() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        program(folder.path(), "echo 'memory allocation of 99 bytes failed' >&2; kill -ABRT $$");
        let limited = worker.limited(InspectLimits { memory: Bytes(1 << 20), ..InspectLimits::NONE });
        let error = limited.inspect(&job, InspectScope::Model).await.unwrap_err();
        assert!(matches!(error, LocalWorkerError::TooMuch { memory: Bytes(1_048_576) }), "{error}");
        assert!(error.hint().unwrap().contains("worker.inspect-memory"));
    }

    #[test]
    fn job_is_converted_to_options() {
        let mut job = JobSpec::new(ModelSource::Hub { id: "a/b".into(), revision: "r".into() });
        job.corpus.num_sequences = Some(3);
        job.corpus.packing = Packing::Separate;
        job.corpus.source = CorpusSource::Files(vec!["/a b".into(), "/c".into()]);
        job.devices = vec!["cpu:2".into()];
        job.layers = Some(1);
        job.export = Export::ALL.into();
        job.measure = Measurement::ALL.into();
        let words = |check| inspect_arguments(&job, check);
        let all = words(InspectScope::TextAndDevices);
        let expected =
            ["--model=a/b", "--revision=r", "--num-sequences=3", "--devices=cpu:2", "--layers=1", "--check-text"];
        let expected = expected.into_iter().chain(["--corpus=/a b", "--corpus=/c", "--separate-documents"]);
        let measured = "--measure=quantization-error,residual-sinks,spike-life,attention-sinks";
        for expected in expected.chain(["--export=imatrix,act-scales,reap", measured]) {
            assert!(all.iter().any(|word| word == expected), "{expected} in {all:?}");
        }
        assert!(!words(InspectScope::Text).join(" ").contains("devices"));
        assert!(!words(InspectScope::Model).join(" ").contains("corpus"));
    }

    #[tokio::test]
    async fn run_reports_progress_and_failure() {
        let folder = tempfile::tempdir().unwrap();
        let line = r#"{"schema":1,"at_ms":1,"phase":"layers","layer":1,"layers":2,"bytes_read":1,"bytes_total":2,"tokens_per_second":1.0}"#;
        let script =
            format!("printf '%s\\n%s' '{line}' 'half' > \"$4/progress.jsonl\"; echo said >&2; exit $(cat \"$4/code\")");
        let path = program(folder.path(), &script);
        let worker =
            LocalWorker { pushed: Pushed { path: path.clone(), cuda: None }, path, limits: InspectLimits::NONE };
        let out = folder.path().join("out");
        std::fs::create_dir(&out).unwrap();
        std::fs::write(out.join("code"), "0").unwrap();
        let job = JobSpec::new(ModelSource::Folder { path: "/m".into() });
        let seen = Mutex::new(Vec::new());
        worker.run(&job, &out, &|progress| seen.lock().unwrap().push(progress.layer)).await.unwrap();
        assert_eq!(*seen.lock().unwrap(), [1]);
        std::fs::write(out.join("code"), "7").unwrap();
        let error = worker.run(&job, &out, &|_| {}).await.unwrap_err();
        assert!(error.to_string().contains("said"), "{error}");
    }
}
