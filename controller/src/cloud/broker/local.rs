//! This machine as a cloud.
//!
//! An instance is a folder and a process that enforces the deadline. It outlives its creator, is
//! found by its folder, and is alive as long as it holds the folder's lock. Commands are child
//! processes of their callers and carry the instance's mark (`access.rs`). Prices are fictitious,
//! but bills are kept, so that a forgotten rental shows as on a cloud.
//!
//! Instances share the machine: any number can be rented, but each GPU only once at a time. The
//! visible GPUs are limited with `CUDA_VISIBLE_DEVICES`; `nvidia-smi` still lists all.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant as Clock};

use async_trait::async_trait;
use rustix::process::Signal;

use super::{
    Account, Broker, BrokerError, BrokerErrorKind, Capabilities, GpuRequest, Instance, InstanceId, InstanceState,
    InstanceTransport, Lease, Offer, Offers, SshEndpoint,
};
use crate::files::{absent, create_private_folder};
use crate::text::counted;

mod access;
mod bill;
mod hardware;
mod instance;
mod processes;
mod record;

pub use bill::{Bill, BillEntry};
pub(crate) use hardware::memory;
pub use instance::serve;
pub use processes::MARKER;

use hardware::{Hardware, Sku};
use processes::ProcessMarks;
use record::{Folder, Record, is_id, new_id, now};

/// The broker's name.
pub const NAME: &str = "local";
/// The hidden subcommand, with a folder as its argument, that must call [`serve`] in the program
/// given to [`LocalBroker::new`].
pub const SERVE_COMMAND: &str = "instance-serve";

/// Time limit of an instance's start. It takes a tenth of a second, longer on a busy machine.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// Time for an instance to end its processes before it is killed.
const ENDING_GRACE: Duration = Duration::from_secs(4);
const PAUSE: Duration = Duration::from_millis(10);

/// The broker of this machine.
#[derive(Clone, Debug)]
pub struct LocalBroker {
    root: PathBuf,
    exe: PathBuf,
    nvidia_smi: PathBuf,
}

impl LocalBroker {
    /// A broker with its state in `root` (created on first use). An instance is the process `exe
    /// instance-serve FOLDER`.
    pub fn new(root: PathBuf, exe: PathBuf) -> Self {
        // An instance has another working folder.
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        Self { root: absolute(root), exe: absolute(exe), nvidia_smi: hardware::default_nvidia_smi() }
    }

    /// Replaces the `nvidia-smi` of the search path.
    pub fn with_nvidia_smi(self, program: PathBuf) -> Self {
        Self { nvidia_smi: program, ..self }
    }

    /// Cost of ended instances, and the instances that still bill.
    ///
    /// # Errors
    /// The bill or the list cannot be read.
    pub fn bill(&self) -> Result<Bill, BrokerError> {
        let entries = bill::read(&self.root).map_err(|error| self.unreadable("bill.jsonl", &error))?;
        Ok(Bill { entries, running: self.list_now()? })
    }

    fn instances(&self) -> PathBuf {
        self.root.join("instances")
    }

    fn unreadable(&self, name: &str, error: &io::Error) -> BrokerError {
        unavailable(format!("cannot read {}: {error}", self.root.join(name).display()))
    }

    fn list_now(&self) -> Result<Vec<Instance>, BrokerError> {
        let instances = self.instances();
        let unreadable = |error| self.unreadable("instances", &error);
        let Some(entries) = absent(fs::read_dir(&instances)).map_err(unreadable)? else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(unreadable)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // Drafts, leftovers and other files are not instances.
            if is_id(&name) && entry.file_type().map_err(unreadable)?.is_dir() {
                found.extend(look_at(&name, &Folder::new(entry.path())));
            }
        }
        found.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        Ok(found)
    }

    async fn allocate(&self, offer: &Offer, lease: &Lease) -> Result<(Folder, Record), BrokerError> {
        let sku = Sku::parse(&offer.key).filter(|_| offer.broker == NAME);
        let sku = sku.ok_or_else(|| rejected(format!("{:?} is no offer of this broker", offer.key)))?;
        if lease.tag.deadline <= now() {
            return Err(rejected("the lease's deadline has passed already".to_owned()));
        }
        let hardware = Hardware::detect(&self.root, &self.nvidia_smi).await;
        if let Some(free) = hardware.disk.filter(|free| *free < lease.disk) {
            let message = format!("{} of disk are wanted, {free} are free at {}", lease.disk, self.root.display());
            return Err(error(BrokerErrorKind::NoCapacity, message));
        }
        let (broker, offer, name) = (self.clone(), offer.clone(), lease.tag.to_string());
        blocking(move || broker.write_down(&offer, &sku, &hardware, name)).await
    }

    fn write_down(
        &self,
        offer: &Offer,
        sku: &Sku,
        hardware: &Hardware,
        name: String,
    ) -> Result<(Folder, Record), BrokerError> {
        let unwritable = |error: io::Error| unavailable(format!("cannot write to {}: {error}", self.root.display()));
        create_private_folder(&self.instances()).map_err(unwritable)?;
        // Two controllers must not be given the same GPU.
        let _turn = self.take_turn().map_err(unwritable)?;
        let record = Record {
            id: new_id(),
            name,
            price: offer.price,
            hardware: describe(sku, hardware),
            gpus: self.choose_gpus(sku, hardware)?,
            created_at: now(),
        };
        let folder = Folder::create(&self.instances(), &record).map_err(unwritable)?;
        Ok((folder, record))
    }

    fn take_turn(&self) -> io::Result<File> {
        let path = self.root.join("create.lock");
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
        file.lock()?;
        Ok(file)
    }

    fn choose_gpus(&self, sku: &Sku, hardware: &Hardware) -> Result<Vec<u32>, BrokerError> {
        let Sku::Gpus(count, raw) = sku else { return Ok(Vec::new()) };
        let rented: Vec<u32> = self.list_now()?.iter().flat_map(|instance| self.gpus_of(&instance.id)).collect();
        let all = (0u32..).zip(&hardware.gpus).filter(|(_, gpu)| gpu.raw == *raw).map(|(index, _)| index);
        let free: Vec<u32> = all.filter(|index| !rented.contains(index)).collect();
        let chosen = free.get(..*count as usize).map(<[u32]>::to_vec);
        chosen.ok_or_else(|| {
            let message = format!("{count} x {raw} are wanted, {} are free ({} rented)", free.len(), rented.len());
            error(BrokerErrorKind::NoCapacity, message)
        })
    }

    fn gpus_of(&self, id: &InstanceId) -> Vec<u32> {
        Folder::new(self.instances().join(&id.0)).record().map(|record| record.gpus).unwrap_or_default()
    }

    fn spawn(&self, folder: &Folder, record: &Record) -> io::Result<tokio::process::Child> {
        let log = || OpenOptions::new().create(true).append(true).mode(0o600).open(folder.log());
        let mut command = tokio::process::Command::new(&self.exe);
        command.arg(SERVE_COMMAND).arg(folder.path()).current_dir("/");
        // The process creates its own session first. It has neither the terminal nor the
        // environment of this process.
        command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env(MARKER, &record.id);
        command.stdin(Stdio::null()).stdout(log()?).stderr(log()?);
        command.spawn()
    }

    async fn boot(&self, folder: &Folder, record: &Record) -> Result<Instance, String> {
        let mut child =
            self.spawn(folder, record).map_err(|error| format!("cannot run {}: {error}", self.exe.display()))?;
        let begun = Clock::now();
        while begun.elapsed() < BOOT_LIMIT {
            if let Some(instance) = look_at(&record.id, folder).filter(|i| matches!(i.state, InstanceState::Ready(_))) {
                return Ok(instance);
            }
            if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
                return Err(format!("the instance ended at once, {status}: {}", last_words(folder)));
            }
            tokio::time::sleep(PAUSE).await;
        }
        Err(format!("the instance is not up after {} s: {}", BOOT_LIMIT.as_secs(), last_words(folder)))
    }
}

#[async_trait]
impl Broker for LocalBroker {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        // The instance's process enforces the deadline, and lives as long as the instance.
        Capabilities { server_deadline: true, self_destruct: false, spot: false }
    }

    async fn check(&self) -> Result<Account, BrokerError> {
        Ok(Account::default())
    }

    async fn offers(&self, _want: &GpuRequest) -> Result<Offers, BrokerError> {
        Ok(Offers { offers: Hardware::detect(&self.root, &self.nvidia_smi).await.offers(), dropped: Vec::new() })
    }

    async fn create(&self, offer: &Offer, lease: &Lease) -> Result<Instance, BrokerError> {
        let (folder, record) = self.allocate(offer, lease).await?;
        match self.boot(&folder, &record).await {
            Ok(instance) => Ok(instance),
            Err(message) => {
                // It never started, so it costs nothing.
                let ended = blocking(move || end(&folder, &record.id, false)).await;
                Err(match ended {
                    Ok(()) => unavailable(message),
                    Err(left) => error(BrokerErrorKind::Maybe, format!("{message}; and {}", left.message)),
                })
            }
        }
    }

    async fn list(&self) -> Result<Vec<Instance>, BrokerError> {
        let broker = self.clone();
        blocking(move || broker.list_now()).await
    }

    fn instance_transport(&self, id: &InstanceId) -> Option<InstanceTransport> {
        is_id(&id.0).then(|| access::transport(&id.0, Folder::new(self.instances().join(&id.0))))
    }

    async fn terminate(&self, id: &InstanceId) -> Result<(), BrokerError> {
        if !is_id(&id.0) {
            return Err(rejected(format!("{:?} is no id of this broker's", id.0)));
        }
        let (folder, id) = (Folder::new(self.instances().join(&id.0)), id.0.clone());
        blocking(move || end(&folder, &id, true)).await
    }
}

/// The instance in `folder`; `None` if it ended meanwhile.
fn look_at(id: &str, folder: &Folder) -> Option<Instance> {
    let record = match absent(folder.record()) {
        Ok(Some(record)) => record,
        Ok(None) if !folder.path().exists() => return None,
        damaged => return Some(unreadable_instance(id, &damaged.err())),
    };
    let state = state_of(folder, &record).unwrap_or_else(|error| InstanceState::Unknown(error.to_string()));
    Some(Instance {
        price: Some(record.price),
        hardware: record.hardware,
        created_at: Some(record.created_at),
        ..Instance::new(NAME, id, record.name, state)
    })
}

fn unreadable_instance(id: &str, error: &Option<io::Error>) -> Instance {
    let reason = error.as_ref().map_or("it is missing".to_owned(), ToString::to_string);
    Instance::new(NAME, id, "", InstanceState::Failed(format!("instance.json cannot be read: {reason}")))
}

fn state_of(folder: &Folder, record: &Record) -> io::Result<InstanceState> {
    let alive = folder.is_locked()?;
    if folder.is_ending() {
        let unfinished = "its termination was begun and not finished: terminate it again";
        return Ok(if alive { InstanceState::Terminating } else { InstanceState::Failed(unfinished.to_owned()) });
    }
    let young = now().saturating_sub(record.created_at) < BOOT_LIMIT.as_secs();
    Ok(match (alive, folder.ready()?) {
        (true, Some(_)) => {
            let (host, user) = ("localhost".to_owned(), access::USER.to_owned());
            InstanceState::Ready(SshEndpoint { host, port: 0, user })
        }
        (true, None) => InstanceState::Booting,
        (false, None) if young => InstanceState::Booting,
        // Its creator stopped before starting it. Another one can still be started.
        (false, None) => InstanceState::Stopped,
        (false, Some(_)) => {
            InstanceState::Failed(format!("its process ended; the last of its log: {}", last_words(folder)))
        }
    })
}

fn last_words(folder: &Folder) -> String {
    folder.last_words().unwrap_or_else(|| "its log is empty".to_owned())
}

/// Ends the instance in `folder` in any state with all its processes, then calls [`conclude`].
fn end(folder: &Folder, id: &str, billed: bool) -> Result<(), BrokerError> {
    let stays = |why: String| unavailable(format!("{id} is not terminated: {why}"));
    let there = fs::symlink_metadata(folder.path());
    if absent(there).map_err(|error| stays(error.to_string()))?.is_none() {
        // A termination was interrupted before its last step.
        return folder.remove().map_err(|error| stays(error.to_string()));
    }
    if let Err(error) = folder.mark_ending() {
        // A full disk must not prevent a termination.
        tracing::warn!(id, %error, "the termination could not be noted first");
    }
    // Without it, a process that starts meanwhile may remain.
    let _shut = folder.shut();
    let record = folder.record();
    stop_process(folder, id);
    marks(folder, id).end_all().map_err(stays)?;
    // The lock prevents others from starting or ending something here.
    let lock = match absent(folder.lock()) {
        Ok(Some(None)) => return Err(stays("its lock is held by a process that is not its own".to_owned())),
        // The previous holder of the lock has concluded it, bill included.
        Ok(_) if !folder.path().exists() => return Ok(()),
        Ok(lock) => lock,
        Err(error) => return Err(stays(error.to_string())),
    };
    marks(folder, id).end_all().map_err(stays)?;
    let concluded = match record {
        Ok(record) => conclude(folder, &record, billed),
        // Its cost is unknown.
        Err(_) => folder.remove(),
    };
    drop(lock);
    concluded.map_err(|error| unavailable(format!("{id} is ended, but its folder stays: {error}")))
}

fn marks(folder: &Folder, id: &str) -> ProcessMarks {
    ProcessMarks::new(id, folder.home())
}

/// Asks the instance's process to end its processes and itself; kills it after a time limit.
fn stop_process(folder: &Folder, id: &str) {
    // An instance that has not started is found by its marks.
    let Ok(Some(ready)) = folder.ready() else { return };
    // The lock may belong to another terminator, and the process id may be reused. The mark is
    // unique.
    let is_it = || marks(folder, id).find().is_ok_and(|pids| pids.contains(&ready.pid));
    let begun = Clock::now();
    let mut asked = false;
    while folder.is_locked().unwrap_or(false) && begun.elapsed() < 2 * ENDING_GRACE {
        if begun.elapsed() > ENDING_GRACE {
            if is_it() {
                processes::signal(ready.pid, Signal::KILL);
            }
        } else if !asked && is_it() {
            processes::signal(ready.pid, Signal::TERM);
            asked = true;
        }
        thread::sleep(PAUSE);
    }
}

/// After everything ended: deletes stored files, writes the bill and removes the folder, in this
/// order. On a full disk the first step makes room for the bill, and a crash before the last step
/// leaves an instance that can be terminated again.
fn conclude(folder: &Folder, record: &Record, billed: bool) -> io::Result<()> {
    folder.empty_home()?;
    let root = folder.path().parent().and_then(Path::parent);
    if let Some(root) = root.filter(|_| billed) {
        bill::append(root, &BillEntry::new(record, now()))?;
    }
    folder.remove()
}

fn describe(sku: &Sku, hardware: &Hardware) -> String {
    match sku {
        Sku::Cpu => counted(hardware.cores as usize, "CPU core"),
        Sku::Gpus(count, raw) => {
            let vram = hardware.gpus.iter().find(|gpu| gpu.raw == *raw).and_then(|gpu| gpu.vram);
            format!("{count} x {}", crate::cloud::gpu::canonical_name(raw, vram))
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BrokerError> + Send + 'static,
) -> Result<T, BrokerError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(failure) => Err(error(BrokerErrorKind::Maybe, failure.to_string())),
    }
}

fn error(kind: BrokerErrorKind, message: String) -> BrokerError {
    BrokerError { broker: NAME, kind, message }
}

fn unavailable(message: String) -> BrokerError {
    error(BrokerErrorKind::Unavailable, message)
}

fn rejected(message: String) -> BrokerError {
    error(BrokerErrorKind::Rejected, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::UsdPerHour;

    #[test]
    fn what_another_has_ended_meanwhile_is_billed_once() {
        let root = tempfile::tempdir().unwrap();
        let instances = root.path().join("instances");
        create_private_folder(&instances).unwrap();
        let record = Record {
            id: new_id(),
            name: "outliers-o-r-n-99".to_owned(),
            price: UsdPerHour::from_dollars(0.5),
            hardware: "2 CPU cores".to_owned(),
            gpus: Vec::new(),
            created_at: 7,
        };
        let folder = Folder::create(&instances, &record).unwrap();
        let lock = folder.lock().unwrap().unwrap();
        let (there, id) = (folder.clone(), record.id.clone());
        let terminates = thread::spawn(move || end(&there, &id, true));
        while !folder.is_ending() {
            thread::sleep(PAUSE);
        }
        // By then it waits for the lock.
        thread::sleep(Duration::from_secs(1));
        conclude(&folder, &record, true).unwrap();
        drop(lock);
        terminates.join().unwrap().unwrap();
        assert_eq!(bill::read(root.path()).unwrap().len(), 1);
    }
}
