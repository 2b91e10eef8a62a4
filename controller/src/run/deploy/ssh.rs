//! The real implementation of [`Hosts`]: over SSH, or by a broker's own transport.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use outliers_protocol::{FileBytes, JobSpec, Manifest, Progress, files};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::KEY_FILE;
use super::ports::{Host, Hosts};
use crate::cloud::broker::{GpuRequest, InstanceTransport, Offer, SshEndpoint};
use crate::files::{absent, read_json};
use crate::host::keys::{KeyError, RunKey};
use crate::host::transport::TransportErrorKind;
use crate::host::transport::ssh::HostKeyPin;
use crate::host::{
    self, Cursor, GuardConfig, HostError, HostErrorKind, HostEvent, HostFacts, JobStatus, Launched, OnEvent,
    RemoteHost, RemoteWorker, Stamp,
};
use crate::run::Pin;
use crate::secret::Secret;
use crate::units::Bytes;

/// Minimum share of nominal memory that a driver or system reports.
const MEMORY_SHARE: f64 = 0.85;
/// File in the run's folder with the position in the worker's files.
const CURSOR_FILE: &str = "cursor.json";
/// File in the run's folder with the worker's latest progress.
const PROGRESS_FILE: &str = "progress.json";
/// Temporary name of that file.
const PROGRESS_PART: &str = "progress.part";
/// Time limit of one call to follow the worker; then the loop checks its state and repeats it.
const FOLLOW: Duration = Duration::from_secs(3600);

/// Rented hosts. The local worker program is pushed to them.
#[derive(Clone, Debug)]
pub struct SshHosts {
    worker: PathBuf,
    uses_gpus: bool,
    push_limit: Bytes,
    save_point_limit: Bytes,
}

impl SshHosts {
    /// `worker` is the program to push, a CPU build. Models and corpora of at most `push_limit`
    /// are pushed with it, and save points of at most `save_point_limit` are fetched while it
    /// runs.
    pub fn new(worker: PathBuf, push_limit: Bytes, save_point_limit: Bytes) -> Self {
        Self { worker, uses_gpus: false, push_limit, save_point_limit }
    }

    /// Sets whether the worker program uses GPUs.
    #[must_use]
    pub fn using_gpus(self, uses_gpus: bool) -> Self {
        Self { uses_gpus, ..self }
    }
}

#[async_trait]
impl Hosts for SshHosts {
    fn key(&self, folder: &Path) -> Result<String, HostError> {
        let path = folder.join(KEY_FILE);
        let key = if path.exists() { RunKey::open(&path) } else { RunKey::create(folder, KEY_FILE, "outliers") };
        key.map(|key| key.public_line().to_owned()).map_err(|error| key_error(&error))
    }

    fn serve(&self, want: &GpuRequest) -> Result<(), HostError> {
        if self.uses_gpus || want.worker_cuda.is_none() {
            return Ok(());
        }
        let message = format!("{} was built without CUDA, and the run is one for GPUs", self.worker.display());
        Err(HostError::new(HostErrorKind::Local, message)
            .hint("`outliers worker build --cuda` builds one that uses them; then run it again"))
    }

    fn forget(&self, folder: &Path) -> Result<(), HostError> {
        for name in [KEY_FILE, CURSOR_FILE, PROGRESS_FILE, PROGRESS_PART, files::SAVE_POINT] {
            let path = folder.join(name);
            absent(std::fs::remove_file(&path)).map_err(|error| {
                let message = format!("{}: {error}", path.display());
                HostError::new(HostErrorKind::Local, message).hint("remove the file by hand")
            })?;
        }
        Ok(())
    }

    async fn reach(
        &self,
        endpoint: &SshEndpoint,
        folder: &Path,
        pin: Option<&Pin>,
        deadline: Instant,
        on: OnEvent<'_>,
    ) -> Result<(Box<dyn Host>, Pin), HostError> {
        let pin = pin.map(|pin| HostKeyPin::new(&pin.0)).transpose()?;
        let (host, pin) = host::reach(endpoint, &folder.join(KEY_FILE), pin, deadline, on).await?;
        Ok((Box::new(self.host(host, folder, true)), Pin(pin.as_str().to_owned())))
    }

    fn over(&self, access: InstanceTransport, folder: &Path) -> Box<dyn Host> {
        Box::new(self.host(RemoteHost::new(access.transport, access.name), folder, access.needs_guard))
    }
}

impl SshHosts {
    fn host(&self, host: RemoteHost, folder: &Path, has_guard: bool) -> SshHost {
        SshHost {
            host: Arc::new(host),
            hosts: self.clone(),
            has_guard,
            cursor: Mutex::new(read_cursor(folder)),
            folder: folder.to_owned(),
            worker: Mutex::default(),
            beside: Mutex::default(),
        }
    }
}

struct SshHost {
    host: Arc<RemoteHost>,
    hosts: SshHosts,
    /// Whether the guard is needed: no other program watches the instance.
    has_guard: bool,
    cursor: Mutex<Cursor>,
    /// The run's local folder.
    folder: PathBuf,
    worker: Mutex<Option<RemoteWorker>>,
    /// Tasks that renew the guard's lease and fetch the latest save point.
    beside: Mutex<JoinSet<()>>,
}

#[async_trait]
impl Host for SshHost {
    async fn probe(&self, offer: &Offer, want: &GpuRequest, asks_the_hub: bool) -> Result<HostFacts, HostError> {
        let facts = self.host.probe().await?;
        match unfit(&facts, offer, want) {
            None if asks_the_hub && facts.hub == Some(false) => Err(no_hub()),
            None => Ok(facts),
            Some(why) => {
                let message = format!("the host is not what was rented: {why}");
                Err(HostError::new(HostErrorKind::NotAsRented, message)
                    .hint("nothing was run on it; try again, another host may be given"))
            }
        }
    }

    async fn guard(&self, run: &str, config: &GuardConfig) -> Result<(), HostError> {
        if self.has_guard {
            self.host.guard(run, config).await?;
        }
        let (host, run, pause) = (Arc::clone(&self.host), run.to_owned(), config.renewal());
        let (save_point, limit) = (self.folder.join(files::SAVE_POINT), self.hosts.save_point_limit);
        let mut beside = JoinSet::new();
        // A slow save point must not delay the renewal of the lease.
        if self.has_guard {
            beside.spawn(renew(Arc::clone(&host), run.clone(), pause));
        }
        beside.spawn(keep_save_point(host, run, save_point, limit, pause));
        *self.beside.lock().await = beside;
        Ok(())
    }

    async fn push_worker(&self, on: OnEvent<'_>) -> Result<(), HostError> {
        let worker = self.host.push_worker(&self.hosts.worker, on).await?;
        *self.worker.lock().await = Some(worker);
        Ok(())
    }

    async fn push(&self, run: &str, local: &Path, name: &str, on: OnEvent<'_>) -> Result<String, HostError> {
        let (remote, limit) = (format!("outliers/{run}-input/{name}"), self.hosts.push_limit.0);
        let pushed = match local.is_dir() {
            true => self.host.push_folder(local, &remote, limit, on).await.map(|folder| folder.path),
            false => self.host.push_file(local, &remote, limit, on).await,
        };
        pushed.map_err(|error| match error.kind {
            // Another host would receive the same files.
            HostErrorKind::TooLarge => HostError { kind: HostErrorKind::Local, ..error },
            _ => error,
        })
    }

    async fn launch(&self, run: &str, job: &JobSpec, secrets: &[(&'static str, Secret)]) -> Result<(), HostError> {
        let worker = self.worker.lock().await;
        let worker = worker.as_ref().ok_or_else(|| {
            let kind = HostErrorKind::Connection(TransportErrorKind::Reset);
            HostError::new(kind, "the worker was not pushed over this connection")
        })?;
        let save_point = self.folder.join(files::SAVE_POINT);
        if save_point.exists() {
            self.host.put_save_point(run, &save_point).await?;
        }
        let secrets: Vec<(&str, &Secret)> = secrets.iter().map(|(name, secret)| (*name, secret)).collect();
        if let Launched::Started { .. } = self.host.launch(worker, run, job, &secrets).await? {
            // The stored position belongs to another instance's files.
            *self.cursor.lock().await = Cursor::default();
            self.keep(Cursor::default());
        }
        Ok(())
    }

    async fn restart(&self, run: &str, secrets: &[(&'static str, Secret)]) -> Result<(), HostError> {
        let secrets: Vec<(&str, &Secret)> = secrets.iter().map(|(name, secret)| (*name, secret)).collect();
        self.host.restart(run, &secrets).await?;
        Ok(())
    }

    async fn status(&self, run: &str) -> Result<JobStatus, HostError> {
        self.host.status(run).await
    }

    async fn follow(&self, run: &str, on: OnEvent<'_>) -> Result<JobStatus, HostError> {
        let mut cursor = self.cursor.lock().await;
        let deadline = Instant::now() + FOLLOW;
        let heard = |event| match event {
            HostEvent::Read(cursor) => self.keep(cursor),
            HostEvent::Log(line) => {
                self.note_down(&line);
                on(HostEvent::Log(line));
            }
            HostEvent::Progress(progress) => {
                self.keep_progress(&progress);
                on(HostEvent::Progress(progress));
            }
            other => on(other),
        };
        match self.host.follow(run, &mut cursor, deadline, &heard).await {
            Err(error) if error.kind == HostErrorKind::Deadline => Ok(JobStatus::Running),
            other => other,
        }
    }

    async fn fetch(
        &self,
        run: &str,
        into: &Path,
        expected: &[FileBytes],
        on: OnEvent<'_>,
    ) -> Result<Option<Manifest>, HostError> {
        Ok(self.host.fetch(run, into, expected, on).await?.manifest)
    }

    async fn stop_worker(&self, run: &str) -> Result<(), HostError> {
        self.host.stop_worker(run).await
    }
}

/// Renews the guard's lease every `pause`, forever. Other calls report failures of the host.
async fn renew(host: Arc<RemoteHost>, run: String, pause: Duration) {
    loop {
        tokio::time::sleep(pause).await;
        if let Err(error) = host.renew_guard(&run).await {
            tracing::debug!("the guard's lease could not be renewed: {}", error.message);
        }
    }
}

/// Fetches the run's latest save point of at most `limit` to `place` every `pause`, forever.
async fn keep_save_point(host: Arc<RemoteHost>, run: String, place: PathBuf, limit: Bytes, pause: Duration) {
    let mut seen = Stamp::default();
    loop {
        tokio::time::sleep(pause).await;
        if let Err(error) = host.fetch_save_point(&run, &place, limit, &mut seen).await {
            tracing::debug!("the save point was not fetched: {}", error.message);
        }
    }
}

impl SshHost {
    /// Stores the position for the next process, which otherwise starts at the first line.
    fn keep(&self, cursor: Cursor) {
        let text = serde_json::to_vec(&cursor).unwrap_or_default();
        if let Err(error) = std::fs::write(self.folder.join(CURSOR_FILE), text) {
            tracing::debug!("{CURSOR_FILE}: {error}");
        }
    }

    /// Stores the progress atomically for other processes.
    fn keep_progress(&self, progress: &Progress) {
        let (path, part) = (self.folder.join(PROGRESS_FILE), self.folder.join(PROGRESS_PART));
        let text = serde_json::to_vec(progress).unwrap_or_default();
        if let Err(error) = std::fs::write(&part, text).and_then(|()| std::fs::rename(&part, path)) {
            tracing::debug!("{PROGRESS_FILE}: {error}");
        }
    }

    /// Appends a line to the copy of the log in the run's folder, for other processes.
    fn note_down(&self, line: &str) {
        let file = File::options().create(true).append(true).open(self.folder.join(files::LOG));
        // In one write, so that readers see whole lines.
        if let Err(error) = file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes())) {
            tracing::debug!("{}: {error}", files::LOG);
        }
    }
}

/// The position in the files of the run with this folder, as stored by its latest driver.
pub fn read_cursor(folder: &Path) -> Cursor {
    read_json(&folder.join(CURSOR_FILE)).unwrap_or_default()
}

/// The latest progress of the run with this folder, as stored by its driver; `None` if it was not
/// followed or its instance is gone.
pub fn read_progress(folder: &Path) -> Option<Progress> {
    read_json(&folder.join(PROGRESS_FILE)).ok()
}

/// All nodes of a cluster have the same network.
fn no_hub() -> HostError {
    let message = "the compute node does not reach the hub, and the run reads from there";
    HostError::new(HostErrorKind::Local, message).hint(
        "name a partition whose nodes reach it with --stage-partition; or download the model on the login node to a \
         folder that all nodes share, and say --weights local:DIR, or set hf-home in [brokers.slurm] to the HF_HOME it \
         was downloaded to; the text must be a file or built in",
    )
}

/// The first difference between the host and what was rented; `None` if it is fit.
fn unfit(facts: &HostFacts, offer: &Offer, want: &GpuRequest) -> Option<String> {
    // The pushed worker has this machine's architecture.
    let built_for = std::env::consts::ARCH;
    if facts.os != "Linux" || facts.arch != built_for {
        return Some(format!("it is {} {}, the worker is for Linux {built_for}", facts.os, facts.arch));
    }
    let gpus = facts.gpus.len();
    if gpus < offer.gpu_count as usize {
        return Some(format!("it has {gpus} GPUs, {} were rented", offer.gpu_count));
    }
    let least = offer.vram.map_or(0, |vram| (vram.0 as f64 * MEMORY_SHARE) as u64);
    if offer.gpu_count > 0
        && let Some(small) = facts.gpus.iter().find(|gpu| gpu.memory.is_some_and(|memory| memory.0 < least))
    {
        return Some(format!("GPU {} has {} of memory", small.index, small.memory.unwrap_or_default()));
    }
    if let (Some(min), Some(cuda)) = (want.min_cuda.max(want.worker_cuda), facts.cuda)
        && cuda < min
    {
        return Some(format!("its driver serves CUDA {cuda}, {min} is needed"));
    }
    let short = |what: &str, has: Option<Bytes>, needed: Option<Bytes>| match (has, needed) {
        (Some(has), Some(needed)) if has < needed => Some(format!("{has} of its {what}, {needed} are needed")),
        _ => None,
    };
    // What the system keeps for itself is not missing.
    let ram = want.min_cpu_ram.max(want.worker_ram).map(|ram| Bytes((ram.0 as f64 * MEMORY_SHARE) as u64));
    short("disk are free", facts.disk_free, want.min_disk).or_else(|| short("memory is all", facts.ram, ram))
}

fn key_error(error: &KeyError) -> HostError {
    HostError::new(HostErrorKind::Local, error.to_string()).hint("the state folder must be writable (OUTLIERS_STATE)")
}

#[cfg(test)]
mod tests {
    use super::super::tests::fake::offer;
    use super::*;
    use crate::host::GpuFacts;

    fn facts(gpus: &[u64], disk: u64) -> HostFacts {
        let gpu = |(index, gib): (usize, &u64)| GpuFacts {
            index: index as u32,
            name: "NVIDIA X".into(),
            memory: Some(Bytes::from_gib(*gib)),
            driver: "1".into(),
            uuid: String::new(),
        };
        HostFacts {
            os: "Linux".into(),
            arch: std::env::consts::ARCH.into(),
            user: "root".into(),
            home: "/root".into(),
            cores: Some(4),
            ram: None,
            disk_free: Some(Bytes::from_gib(disk)),
            clock_skew: None,
            hub: None,
            cuda: Some("12.4".parse().unwrap()),
            gpus: gpus.iter().enumerate().map(gpu).collect(),
        }
    }

    #[test]
    fn cpu_worker_is_refused_for_a_gpu_run() {
        let hosts = SshHosts::new("/bin/outliers-worker".into(), Bytes(0), Bytes(0));
        let gpus = GpuRequest { worker_cuda: Some("11.8".parse().unwrap()), ..GpuRequest::default() };
        assert!(hosts.serve(&GpuRequest::default()).is_ok());
        let refused = hosts.serve(&gpus).unwrap_err();
        assert!(refused.is_here() && !refused.is_transient() && refused.message.contains("without CUDA"), "{refused}");
        assert!(hosts.using_gpus(true).serve(&gpus).is_ok());
    }

    #[test]
    fn instance_must_have_the_rented_hardware() {
        let rented = Offer { gpu_count: 2, vram: Some(Bytes::from_gib(80)), ..offer("a", 1.0) };
        let want = GpuRequest { min_disk: Some(Bytes::from_gib(50)), ..GpuRequest::default() };
        let unfit = |facts: &HostFacts, offer: &Offer| super::unfit(facts, offer, &want);
        assert_eq!(unfit(&facts(&[79, 79], 100), &rented), None);
        assert!(unfit(&facts(&[79], 100), &rented).unwrap().contains("1 GPUs"));
        assert!(unfit(&facts(&[79, 40], 100), &rented).unwrap().contains("GPU 1"));
        assert!(unfit(&facts(&[79, 79], 10), &rented).unwrap().contains("disk"));
        assert_eq!(unfit(&facts(&[4], 100), &offer("cpu", 1.0)), None, "a CPU offer promises no GPU memory");
        let arm = HostFacts { arch: "riscv64".into(), ..facts(&[79, 79], 100) };
        assert!(unfit(&arm, &rented).unwrap().contains("riscv64"));
        let old = GpuRequest { min_cuda: Some("12.8".parse().unwrap()), ..GpuRequest::default() };
        assert!(super::unfit(&facts(&[79, 79], 100), &rented, &old).unwrap().contains("CUDA 12.4"));
        let worker = GpuRequest { worker_cuda: old.min_cuda, ..GpuRequest::default() };
        assert!(super::unfit(&facts(&[79, 79], 100), &rented, &worker).unwrap().contains("12.8 is needed"));
        let much = GpuRequest { min_cpu_ram: Some(Bytes::from_gib(64)), ..GpuRequest::default() };
        let small = HostFacts { ram: Some(Bytes::from_gib(32)), ..facts(&[79, 79], 100) };
        assert!(super::unfit(&small, &rented, &much).unwrap().contains("memory"));
        let planned = GpuRequest { worker_ram: much.min_cpu_ram, ..GpuRequest::default() };
        assert!(super::unfit(&small, &rented, &planned).unwrap().contains("memory"));
    }
}
