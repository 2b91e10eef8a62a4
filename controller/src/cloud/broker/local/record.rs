//! The folder of an instance: its files, their writers, and the instance's state.
//!
//! | name | written by | says |
//! |---|---|---|
//! | `instance.json` | `create`, before anything is spawned | lease, price, hardware |
//! | `lock` | held by the instance's process for its life | alive, exactly as long as it is held |
//! | `gate` | held by all who start something; by one alone who ends the instance | who may start |
//! | `ready.json` | the instance's process | which process it is |
//! | `ending` | `terminate`, first of all | nothing may start here any more |
//! | `log` | the instance's process | why it failed |
//! | `home/` | the user | what the rental is for |
//!
//! The folder is created by a rename, so that a crash leaves either no instance or one that can be
//! listed and ended.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::cloud::broker::LeaseTag;
use crate::files::{absent, create_private_folder, is_taken, read_json, sync_parent};
use crate::units::UsdPerHour;

/// Bytes at the end of a log that are searched for its last line.
const LOG_TAIL: u64 = 4 << 10;
/// Letters of an instance id after `i-`.
const ID_LETTERS: usize = 12;
/// Time limit for taking a lock. Listings hold it for microseconds.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// Content of `instance.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The instance's id, also the folder's name.
    pub(super) id: String,
    /// The lease tag.
    pub(super) name: String,
    pub(super) price: UsdPerHour,
    pub(super) hardware: String,
    /// Indices of its GPUs, in PCI order.
    pub(super) gpus: Vec<u32>,
    /// Creation time, Unix seconds.
    pub(super) created_at: u64,
}

impl Record {
    /// End of the lease in Unix seconds; `None` if the name is not a lease tag.
    pub(super) fn deadline(&self) -> Option<u64> {
        self.name.parse::<LeaseTag>().ok().map(|tag| tag.deadline)
    }
}

/// Content of `ready.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ready {
    /// Process id of the instance. Invalid once the lock is free.
    pub(super) pid: u32,
}

/// The folder of one instance.
#[derive(Clone, Debug)]
pub(super) struct Folder(PathBuf);

impl Folder {
    /// The folder at `path`, which need not exist.
    pub(super) fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Writes a complete instance beside `instances` and renames it into place.
    pub(super) fn create(instances: &Path, record: &Record) -> io::Result<Self> {
        let draft = Self(instances.join(format!(".new-{}", record.id)));
        create_private_folder(&draft.0)?;
        let written = draft.fill(record);
        let place = instances.join(&record.id);
        let placed = written.and_then(|()| fs::rename(&draft.0, &place)).and_then(|()| sync_parent(&place));
        match placed {
            Ok(()) => Ok(Self(place)),
            Err(error) => {
                // The draft is unlisted and has no processes.
                let _ = fs::remove_dir_all(&draft.0);
                Err(error)
            }
        }
    }

    fn fill(&self, record: &Record) -> io::Result<()> {
        create_private_folder(&self.home())?;
        write_durably(&self.0.join("lock"), b"")?;
        write_durably(&self.0.join("gate"), b"")?;
        write_json(&self.0.join("instance.json"), record)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Home folder of the instance's commands.
    pub(super) fn home(&self) -> PathBuf {
        self.0.join("home")
    }

    /// The log of the instance's process.
    pub(super) fn log(&self) -> PathBuf {
        self.0.join("log")
    }

    /// Reads `instance.json`.
    pub(super) fn record(&self) -> io::Result<Record> {
        read_json(&self.0.join("instance.json"))
    }

    /// Reads `ready.json`; `None` before the process has started.
    pub(super) fn ready(&self) -> io::Result<Option<Ready>> {
        absent(read_json(&self.0.join("ready.json")))
    }

    /// Writes `ready.json`.
    pub(super) fn set_ready(&self, ready: &Ready) -> io::Result<()> {
        write_json(&self.0.join("ready.json"), ready)
    }

    /// Marks the instance as ending: nothing may start.
    pub(super) fn mark_ending(&self) -> io::Result<()> {
        write_durably(&self.0.join("ending"), b"")
    }

    /// Whether a termination was started.
    pub(super) fn is_ending(&self) -> bool {
        self.0.join("ending").exists()
    }

    /// Whether a process holds the lock: the instance's, or a terminator.
    pub(super) fn is_locked(&self) -> io::Result<bool> {
        // Shared: two listers must not take each other for the instance.
        is_taken(File::open(self.0.join("lock"))?.try_lock_shared())
    }

    /// The lock to hold while starting a process here; `None` if nothing may start: the instance's
    /// process has ended, or is being ended.
    pub(super) fn admit(&self) -> io::Result<Option<File>> {
        let gate = File::open(self.0.join("gate"))?;
        let is_shut = is_taken(gate.try_lock_shared())?;
        Ok((!is_shut && !self.is_ending() && self.is_locked()?).then_some(gate))
    }

    /// Prevents processes from starting here until the file is dropped. `None`: another process
    /// does so, or is slow to start something.
    pub(super) fn shut(&self) -> io::Result<Option<File>> {
        self.take("gate")
    }

    /// Takes the lock until the file is dropped. `None`: another process holds it for longer than
    /// a listing.
    pub(super) fn lock(&self) -> io::Result<Option<File>> {
        self.take("lock")
    }

    fn take(&self, name: &str) -> io::Result<Option<File>> {
        let file = File::open(self.0.join(name))?;
        let begun = Instant::now();
        while is_taken(file.try_lock())? {
            if begun.elapsed() >= LOCK_TIMEOUT {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Some(file))
    }

    /// The last line of the log, sanitised; `None` if there is none.
    pub(super) fn last_words(&self) -> Option<String> {
        let mut file = File::open(self.log()).ok()?;
        let end = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(end.saturating_sub(LOG_TAIL))).ok()?;
        let mut tail = Vec::new();
        file.take(LOG_TAIL).read_to_end(&mut tail).ok()?;
        let text = String::from_utf8_lossy(&tail);
        let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty())?;
        Some(line.chars().filter(|c| !c.is_control()).take(300).collect())
    }

    /// Deletes all files in the home folder.
    pub(super) fn empty_home(&self) -> io::Result<()> {
        absent(remove_stubborn(&self.home())).map(drop)
    }

    /// Renames the folder out of the list and deletes it. Files that cannot be deleted are
    /// reported; the instance is gone.
    pub(super) fn remove(&self) -> io::Result<()> {
        let (Some(parent), Some(name)) = (self.0.parent(), self.0.file_name()) else { return Ok(()) };
        let gone = parent.join(format!(".gone-{}", name.to_string_lossy()));
        absent(fs::rename(&self.0, &gone))?;
        sync_parent(&gone)?;
        absent(remove_stubborn(&gone))?;
        Ok(())
    }
}

/// A new instance id: `i-` and twelve lower-case letters and digits.
pub(super) fn new_id() -> String {
    use rand::Rng;
    const ALPHABET: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut rng = rand::rng();
    let letters = (0..ID_LETTERS).map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())]));
    "i-".chars().chain(letters).collect()
}

/// Whether `id` has the form of [`new_id`]. Other text never becomes part of a path.
pub(super) fn is_id(id: &str) -> bool {
    id.strip_prefix("i-").is_some_and(|rest| {
        rest.len() == ID_LETTERS && rest.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    })
}

/// Current time in Unix seconds.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Temporary name, fsync, rename: a reader sees the old content or the new, after a crash too.
/// Mode 0600.
fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let draft = path.with_file_name(format!(".{name}.{}.part", std::process::id()));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&draft, path)?;
    sync_parent(path)
}

fn write_json(path: &Path, document: &impl Serialize) -> io::Result<()> {
    write_durably(path, &serde_json::to_vec_pretty(document)?)
}

/// Deletes a folder tree that may contain read-only folders.
fn remove_stubborn(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            unlock_dirs(path)?;
            fs::remove_dir_all(path)
        }
        other => other,
    }
}

fn unlock_dirs(path: &Path) -> io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            unlock_dirs(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str) -> Record {
        Record {
            id: id.to_owned(),
            name: "outliers-o-r-n-99".to_owned(),
            price: UsdPerHour::from_dollars(0.5),
            hardware: "2 CPU cores".to_owned(),
            gpus: vec![],
            created_at: 7,
        }
    }

    #[test]
    fn only_instance_ids_are_recognised() {
        for _ in 0..100 {
            assert!(is_id(&new_id()));
        }
        for bad in
            ["", "i-", "..", "i-../../../etc", "i-abcdefghijk/", "i-ABCDEFGHIJKL", "i-abcdefghijklm", "j-abcdefghijkl"]
        {
            assert!(!is_id(bad), "{bad}");
        }
    }

    #[test]
    fn instance_folder_is_created_atomically_and_private() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::create(root.path(), &record("i-abcdefghijkl")).unwrap();
        assert_eq!(folder.record().unwrap(), record("i-abcdefghijkl"));
        assert_eq!(folder.record().unwrap().deadline(), Some(99));
        assert_eq!(fs::metadata(folder.path()).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(folder.ready().unwrap(), None);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "no draft is left");
    }

    #[test]
    fn checking_the_lock_does_not_take_it() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::create(root.path(), &record("i-abcdefghijkl")).unwrap();
        assert!(!folder.is_locked().unwrap());
        let held = folder.lock().unwrap().unwrap();
        assert!(folder.is_locked().unwrap());
        drop(held);
        assert!(!folder.is_locked().unwrap());
    }

    #[test]
    fn commands_start_only_while_the_instance_is_alive() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::create(root.path(), &record("i-abcdefghijkl")).unwrap();
        assert!(folder.admit().unwrap().is_none(), "nobody is the instance");
        let life = folder.lock().unwrap().unwrap();
        let (one, two) = (folder.admit().unwrap().unwrap(), folder.admit().unwrap().unwrap());
        drop((one, two));
        let shut = folder.shut().unwrap().unwrap();
        assert!(folder.admit().unwrap().is_none(), "somebody ends it");
        drop(shut);
        assert!(folder.admit().unwrap().is_some());
        folder.mark_ending().unwrap();
        assert!(folder.admit().unwrap().is_none(), "somebody has begun to end it");
        drop(life);
    }

    #[test]
    fn final_message_is_short_and_sanitised() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::new(root.path());
        assert_eq!(folder.last_words(), None);
        fs::write(folder.log(), format!("first\n\x1b[31m{}\n\n  \n", "x".repeat(9000))).unwrap();
        let words = folder.last_words().unwrap();
        assert!(words.len() <= 300 && words.chars().all(|c| c == 'x'), "{words}");
        fs::write(folder.log(), "a\n\x1b]0;title\x07no port left\n").unwrap();
        assert_eq!(folder.last_words().unwrap(), "]0;titleno port left");
    }

    #[test]
    fn read_only_folder_tree_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::create(root.path(), &record("i-abcdefghijkl")).unwrap();
        let deep = folder.home().join("a/b");
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("f"), "x").unwrap();
        fs::set_permissions(&deep, fs::Permissions::from_mode(0o500)).unwrap();
        fs::set_permissions(folder.home().join("a"), fs::Permissions::from_mode(0o000)).unwrap();
        folder.remove().unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        folder.remove().unwrap();
    }
}
