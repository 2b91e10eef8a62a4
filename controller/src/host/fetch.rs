//! Bringing a run's files home, trusting nothing that the host says of them.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use outliers_protocol::{FileEntry, Manifest, SCHEMA, files};

use super::push::hash_file;
use super::retry::again;
use super::{HostError, HostErrorKind, HostEvent, OnEvent, RemoteHost, SHORT, names};
use crate::transport::TransportErrorKind;
use crate::transport::quote::quote;
use crate::units::Bytes;

/// A manifest is a list of a dozen files.
const MAX_MANIFEST: u64 = 1 << 20;
const MAX_FILES: usize = 200;
/// Of one file: saved activations are the largest.
const MAX_FILE: u64 = 256 << 30;
/// Of a file that no manifest vouches for; of a log, its end.
const MAX_LOOSE: u64 = 16 << 20;
/// A lost connection is made again for so long.
const PATIENCE: Duration = Duration::from_secs(300);
/// Files worth having from a worker that did not finish, besides its log.
const LOOSE: [&str; 3] = [files::JOB, files::PROGRESS, files::METADATA];

/// What was brought home.
#[derive(Clone, Debug, PartialEq)]
pub struct Fetched {
    /// The worker's own word on how it ended; `None` if it did not come so far.
    pub manifest: Option<Manifest>,
    /// The worker died or is still at work: what there is, unverified.
    pub partial: bool,
    /// Names of the files now in the folder, sorted.
    pub files: Vec<String>,
}

impl RemoteHost {
    /// Brings a run's files into the folder `into`: all of them, each with the size and hash its manifest names, or none.
    ///
    /// They come into `<into>.part` first. A folder left by an earlier, partial fetch is replaced; a whole one is kept and its
    /// manifest compared. Without a manifest on the host, log, job, progress and metadata are brought and marked partial.
    pub async fn fetch(&self, run: &str, into: &Path, on: OnEvent<'_>) -> Result<Fetched, HostError> {
        Ok(again!(PATIENCE, on, self.fetch_once(run, into, on)))
    }

    async fn fetch_once(&self, run: &str, into: &Path, on: OnEvent<'_>) -> Result<Fetched, HostError> {
        let folder = self.run_folder(run).await?;
        let remote = |name: &str| format!("{folder}/{name}");
        let text = self.transport.read_from(&remote(files::MANIFEST), 0, MAX_MANIFEST).await?;
        let manifest = text.as_deref().map(|text| self.read_manifest(text)).transpose()?;
        if let (Some(manifest), Some(known)) = (&manifest, kept(into)?) {
            return self.compare_with_kept(manifest, &known, into);
        }
        check_replaceable(into)?;
        let part = beside(into, ".part");
        let here = |e: io::Error| local_error(&part, &e);
        remove_folder(&part).map_err(here)?;
        fs::create_dir_all(&part).map_err(here)?;
        for entry in manifest.iter().flat_map(|manifest| &manifest.files) {
            self.fetch_verified(&remote(&entry.name), entry, &part, on).await?;
        }
        for name in LOOSE {
            self.fetch_loose(&remote(name), &part.join(name), on).await?;
        }
        self.fetch_log(&remote(files::LOG), &part.join(files::LOG), on).await?;
        if let Some(text) = &text {
            write_synced(&part.join(files::MANIFEST), text).map_err(here)?;
        }
        let files = list(&part).map_err(here)?;
        settle(&part, into).map_err(|e| local_error(into, &e))?;
        Ok(Fetched { partial: manifest.is_none(), manifest, files })
    }

    fn read_manifest(&self, text: &[u8]) -> Result<Manifest, HostError> {
        let manifest: Manifest =
            serde_json::from_slice(text).map_err(|e| self.damaged(&format!("its manifest cannot be read: {e}")))?;
        if manifest.schema != SCHEMA {
            return Err(self.damaged(&format!("its manifest has schema {}, we read {SCHEMA}", manifest.schema)));
        }
        let mut names = HashSet::new();
        for entry in &manifest.files {
            let name = &entry.name;
            let ours = name == files::MANIFEST || name.ends_with(".part");
            // Compared without case: some file systems at home know none.
            if !names::is_plain(name) || ours || !names.insert(name.to_lowercase()) {
                return Err(self.damaged(&format!("its manifest names the file {name:?}")));
            }
            if entry.bytes > MAX_FILE {
                return Err(self.too_large(name, entry.bytes));
            }
        }
        match manifest.files.len() > MAX_FILES {
            true => Err(self.damaged(&format!("its manifest names {} files", manifest.files.len()))),
            false => Ok(manifest),
        }
    }

    async fn fetch_verified(
        &self,
        remote: &str,
        entry: &FileEntry,
        part: &Path,
        on: OnEvent<'_>,
    ) -> Result<(), HostError> {
        on(HostEvent::Fetching { name: entry.name.clone(), bytes: entry.bytes });
        let local = part.join(&entry.name);
        let bytes = self.transport.get(remote, &local, entry.bytes).await.map_err(|e| match e.kind {
            // Missing, longer than its manifest says, a link: the manifest lies.
            TransportErrorKind::Remote => self.damaged(&e.message),
            _ => e.into(),
        })?;
        // Hashed as it lies on our disk, not as it came over the line.
        let (on_disk, sha256) = hash_file(&local).await?;
        if bytes != entry.bytes || on_disk != entry.bytes {
            return Err(self.damaged(&format!("{} has {bytes} bytes, its manifest says {}", entry.name, entry.bytes)));
        }
        match sha256 == entry.sha256 {
            true => Ok(()),
            false => Err(self.damaged(&format!("{} has another SHA-256 than its manifest says", entry.name))),
        }
    }

    /// A file that need not be there; one that is too large or no plain file is left.
    async fn fetch_loose(&self, remote: &str, local: &Path, on: OnEvent<'_>) -> Result<(), HostError> {
        if local.exists() {
            return Ok(());
        }
        match self.transport.read_from(remote, 0, MAX_LOOSE).await.map_err(HostError::from) {
            Ok(Some(bytes)) => self.keep(local, &bytes, on),
            Ok(None) => Ok(()),
            Err(error) if error.kind == HostErrorKind::Host => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The whole log, or its last part where it is huge.
    async fn fetch_log(&self, remote: &str, local: &Path, on: OnEvent<'_>) -> Result<(), HostError> {
        if local.exists() {
            return Ok(());
        }
        let file = quote(remote);
        let script = format!("if [ -f {file} ] && [ ! -h {file} ]; then echo \"@size $(($(wc -c < {file})))\"; fi; :");
        let Some(size) = self.sh(&script, SHORT).await?.number("size") else { return Ok(()) };
        let from = size.saturating_sub(MAX_LOOSE);
        match self.transport.read_from(remote, from, MAX_LOOSE).await? {
            Some(bytes) => self.keep(local, &bytes, on),
            None => Ok(()),
        }
    }

    fn keep(&self, local: &Path, bytes: &[u8], on: OnEvent<'_>) -> Result<(), HostError> {
        let name = local.file_name().unwrap_or_default().to_string_lossy().into_owned();
        on(HostEvent::Fetching { name, bytes: bytes.len() as u64 });
        write_synced(local, bytes).map_err(|e| local_error(local, &e))
    }

    fn compare_with_kept(&self, manifest: &Manifest, known: &[u8], into: &Path) -> Result<Fetched, HostError> {
        if serde_json::from_slice::<Manifest>(known).is_ok_and(|known| known == *manifest) {
            let files = list(into).map_err(|e| local_error(into, &e))?;
            return Ok(Fetched { manifest: Some(manifest.clone()), partial: false, files });
        }
        let message = format!("{} holds the results of another run", into.display());
        Err(HostError::new(HostErrorKind::Local, message).hint("move it away or name another folder"))
    }

    fn damaged(&self, what: &str) -> HostError {
        HostError::new(HostErrorKind::Damaged, format!("{}: {what}", self.name))
            .hint("nothing of it was kept; look at the run's folder on the host before the instance ends")
    }

    fn too_large(&self, name: &str, bytes: u64) -> HostError {
        let message = format!("{}: {name} has {}, we take {}", self.name, Bytes(bytes), Bytes(MAX_FILE));
        HostError::new(HostErrorKind::TooLarge, message)
    }
}

/// The manifest of a folder brought home whole before.
fn kept(folder: &Path) -> Result<Option<Vec<u8>>, HostError> {
    match fs::read(folder.join(files::MANIFEST)) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(local_error(folder, &e)),
    }
}

/// Only what an earlier fetch may have left is ever replaced.
fn check_replaceable(into: &Path) -> Result<(), HostError> {
    let there = match list(into) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        there => there.map_err(|e| local_error(into, &e))?,
    };
    match there.iter().find(|name| !LOOSE.contains(&name.as_str()) && *name != files::LOG) {
        None => Ok(()),
        Some(other) => {
            let message = format!("{} is no unfinished fetch: it holds {other:?}", into.display());
            Err(HostError::new(HostErrorKind::Local, message).hint("move it away or name another folder"))
        }
    }
}

fn list(folder: &Path) -> io::Result<Vec<String>> {
    let names: io::Result<Vec<String>> =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect();
    let mut names = names?;
    names.sort();
    Ok(names)
}

/// Puts the finished folder in the place of a partial one or of nothing.
fn settle(part: &Path, into: &Path) -> io::Result<()> {
    File::open(part)?.sync_all()?;
    let old = beside(into, ".old.part");
    remove_folder(&old)?;
    match fs::rename(into, &old) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => fs::rename(part, into)?,
    }
    if let Some(parent) = into.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        File::open(parent)?.sync_all()?;
    }
    remove_folder(&old)
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn remove_folder(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    fs::write(path, bytes)?;
    File::open(path)?.sync_all()
}

fn local_error(path: &Path, error: &io::Error) -> HostError {
    HostError::new(HostErrorKind::Local, format!("{}: {error}", path.display()))
}
