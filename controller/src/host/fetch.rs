//! Fetches a run's files. Everything that the host claims about them is verified.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use outliers_protocol::{FileBytes, FileEntry, Manifest, SCHEMA, files};

use super::bundle::BundleFile;
use super::push::hash_file;
use super::retry::again;
use super::{HostError, HostErrorKind, HostEvent, OnEvent, RemoteHost};
use crate::files::{RESERVE, absent, beside, free_disk, read_small, sync_parent};
use crate::host::transport::TransportErrorKind;
use crate::text::clean;
use crate::units::Bytes;

/// Maximum bytes of a manifest.
const MAX_MANIFEST: u64 = 1 << 20;
/// Maximum bytes of a file without a manifest entry.
const MAX_LOOSE: u64 = 8 << 20;
/// Maximum bytes of the log, counted from its end.
const MAX_LOG: u64 = 16 << 20;
/// Files up to this size are fetched together, at most this many bytes per answer.
const SMALL: u64 = 8 << 20;
const MAX_BATCH: u64 = 32 << 20;
/// How long a fetch tries to restore a lost connection.
const TIMEOUT: Duration = Duration::from_secs(300);
const NOTHING_KEPT: &str = "no file was kept; retry on another instance";
/// Files to fetch from a worker that did not finish, besides its log.
const LOOSE: [&str; 3] = [files::JOB, files::PROGRESS, files::METADATA];

/// The fetched files.
#[derive(Clone, Debug, PartialEq)]
pub struct Fetched {
    /// The worker's statement of its outcome; `None` if it wrote none.
    pub manifest: Option<Manifest>,
    /// Whether the worker died or still runs: files are incomplete and unverified.
    pub partial: bool,
    /// Sorted names of the files in the folder.
    pub files: Vec<String>,
}

impl RemoteHost {
    /// Fetches a run's files into the folder `into`: all files of the manifest, verified by size
    /// and hash, or none. The manifest may list only files of `expected`, up to their sizes there.
    ///
    /// Files first go to [`unfinished`]. A fetch that lost its connection resumes there with the
    /// verified files; other failures empty it. An earlier partial folder is replaced. A complete
    /// one is kept and its manifest compared. If the host has no manifest, log, job, progress and
    /// metadata are fetched and marked partial.
    pub async fn fetch(
        &self,
        run: &str,
        into: &Path,
        expected: &[FileBytes],
        on: OnEvent<'_>,
    ) -> Result<Fetched, HostError> {
        let fetched: Result<Fetched, HostError> =
            async { Ok(again!(TIMEOUT, on, self.fetch_once(run, into, expected, on))) }.await;
        if fetched.as_ref().is_err_and(|error| !error.is_transient()) {
            // The folder may not exist.
            let _ = remove_folder(&unfinished(into));
        }
        fetched
    }

    async fn fetch_once(
        &self,
        run: &str,
        into: &Path,
        expected: &[FileBytes],
        on: OnEvent<'_>,
    ) -> Result<Fetched, HostError> {
        let folder = self.run_folder(run).await?;
        let mut found = self.look_for_files(&folder).await?;
        let text = found.remove(files::MANIFEST);
        let manifest = text.as_deref().map(|text| self.read_manifest(text, expected)).transpose()?;
        if let (Some(manifest), Some(known)) = (&manifest, kept(into)?) {
            return self.compare_with_kept(manifest, &known, into);
        }
        check_replaceable(into)?;
        let part = unfinished(into);
        let here = |e: io::Error| HostError::local(&part, &e);
        fs::create_dir_all(&part).map_err(here)?;
        let entries = manifest.as_ref().map_or(&[][..], |manifest| &manifest.files);
        let lacking = keep_verified(&part, entries).await?;
        self.check_room(&part, &lacking)?;
        self.fetch_entries(&folder, lacking, &mut found, &part, on).await?;
        for (name, bytes) in found.iter().filter(|(name, _)| entries.iter().all(|entry| entry.name != **name)) {
            self.keep(&part.join(name), bytes, on)?;
        }
        if let Some(text) = &text {
            write_synced(&part.join(files::MANIFEST), text).map_err(here)?;
        }
        let files = list(&part).map_err(here)?;
        settle(&part, into).map_err(|e| HostError::local(into, &e))?;
        Ok(Fetched { partial: manifest.is_none(), manifest, files })
    }

    /// Fetches the manifest, the files wanted without one, and the end of the log, in one command.
    async fn look_for_files(&self, folder: &str) -> Result<HashMap<&'static str, Vec<u8>>, HostError> {
        let wanted = |name| match name {
            files::MANIFEST => BundleFile { name, limit: MAX_MANIFEST, from_end: false },
            files::LOG => BundleFile { name, limit: MAX_LOG, from_end: true },
            _ => BundleFile { name, limit: MAX_LOOSE, from_end: false },
        };
        let names = [&[files::MANIFEST, files::LOG][..], &LOOSE].concat();
        let wanted: Vec<_> = names.iter().map(|name| wanted(name)).collect();
        let found = self.bundle(folder, &wanted).await?;
        Ok(found.into_iter().map(|(i, bytes)| (names[i], bytes)).collect())
    }

    /// Fetches the files of a manifest: small files together, large ones one by one.
    async fn fetch_entries(
        &self,
        folder: &str,
        entries: Vec<&FileEntry>,
        found: &mut HashMap<&'static str, Vec<u8>>,
        part: &Path,
        on: OnEvent<'_>,
    ) -> Result<(), HostError> {
        let (mut small, mut large) = (Vec::new(), Vec::new());
        for entry in entries {
            match found.remove(entry.name.as_str()) {
                // The answer may hold only a part of the file.
                Some(bytes) if bytes.len() as u64 == entry.bytes => self.keep_verified(entry, &bytes, part, on).await?,
                _ if entry.bytes <= SMALL => small.push(entry),
                _ => large.push(entry),
            }
        }
        for few in batches(&small) {
            // One byte more than the manifest's size reveals a longer file.
            let wanted = few.iter().map(|e| BundleFile { name: &e.name, limit: e.bytes + 1, from_end: false });
            let came = self.bundle(folder, &wanted.collect::<Vec<_>>()).await?;
            for (i, entry) in few.iter().enumerate() {
                let bytes =
                    came.get(&i).ok_or_else(|| self.damaged(&format!("{} is no plain file there", entry.name)))?;
                self.keep_verified(entry, bytes, part, on).await?;
            }
        }
        for entry in large {
            self.fetch_verified(&format!("{folder}/{}", entry.name), entry, part, on).await?;
        }
        Ok(())
    }

    async fn keep_verified(
        &self,
        entry: &FileEntry,
        bytes: &[u8],
        part: &Path,
        on: OnEvent<'_>,
    ) -> Result<(), HostError> {
        let local = part.join(&entry.name);
        self.keep(&local, bytes, on)?;
        self.verify(&local, entry).await
    }

    /// Fails before fetching if the disk lacks room, with a reserve for other programs.
    fn check_room(&self, part: &Path, entries: &[&FileEntry]) -> Result<(), HostError> {
        let bytes = entries.iter().fold(RESERVE.0, |sum, entry| sum.saturating_add(entry.bytes));
        let Some(free) = free_disk(part).filter(|free| free.0 < bytes) else { return Ok(()) };
        let (needed, place) = (Bytes(bytes), part.display());
        let message = format!("{}: the results need {needed} in {place}, and {free} are free there", self.name);
        Err(HostError::new(HostErrorKind::Local, message).hint("make room, or name a folder on a larger disk"))
    }

    fn read_manifest(&self, text: &[u8], expected: &[FileBytes]) -> Result<Manifest, HostError> {
        let manifest: Manifest =
            serde_json::from_slice(text).map_err(|e| self.damaged(&format!("its manifest cannot be read: {e}")))?;
        if manifest.schema != SCHEMA {
            return Err(self.damaged(&format!("its manifest has schema {}, we read {SCHEMA}", manifest.schema)));
        }
        let mut names = HashSet::new();
        for entry in &manifest.files {
            let name = &entry.name;
            let most = expected.iter().find(|file| file.name == *name && name != files::MANIFEST);
            // Compared without case, since some local file systems ignore it.
            let Some(most) = most.filter(|_| names.insert(name.to_lowercase())) else {
                let name = clean(name.as_bytes(), 200);
                return Err(self.damaged(&format!("its manifest names the file {name:?}, which the job does not make")));
            };
            if entry.bytes > most.bytes {
                return Err(self.too_large(entry, most));
            }
        }
        Ok(manifest)
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
            // The file is missing, longer than in the manifest, or a link.
            TransportErrorKind::Remote => self.damaged(&e.message),
            _ => e.into(),
        })?;
        if bytes != entry.bytes {
            return Err(self.damaged(&format!("{} has {bytes} bytes, its manifest says {}", entry.name, entry.bytes)));
        }
        self.verify(&local, entry).await
    }

    /// Verifies a file on the local disk against the manifest.
    async fn verify(&self, local: &Path, entry: &FileEntry) -> Result<(), HostError> {
        match is_verified(local, entry).await? {
            true => Ok(()),
            false => Err(self.damaged(&format!("{} has another length or SHA-256 than its manifest says", entry.name))),
        }
    }

    fn keep(&self, local: &Path, bytes: &[u8], on: OnEvent<'_>) -> Result<(), HostError> {
        let name = local.file_name().unwrap_or_default().to_string_lossy().into_owned();
        on(HostEvent::Fetching { name, bytes: bytes.len() as u64 });
        write_synced(local, bytes).map_err(|e| HostError::local(local, &e))
    }

    fn compare_with_kept(&self, manifest: &Manifest, known: &[u8], into: &Path) -> Result<Fetched, HostError> {
        if serde_json::from_slice::<Manifest>(known).is_ok_and(|known| known == *manifest) {
            let files = list(into).map_err(|e| HostError::local(into, &e))?;
            return Ok(Fetched { manifest: Some(manifest.clone()), partial: false, files });
        }
        let message = format!("{} holds the results of another run", into.display());
        Err(HostError::new(HostErrorKind::Local, message).hint("move it away or name another folder"))
    }

    fn damaged(&self, what: &str) -> HostError {
        HostError::new(HostErrorKind::Damaged, format!("{}: {what}", self.name)).hint(NOTHING_KEPT)
    }

    fn too_large(&self, entry: &FileEntry, most: &FileBytes) -> HostError {
        let (bytes, most) = (Bytes(entry.bytes), Bytes(most.bytes));
        let name = &entry.name;
        let message = format!("{}: {name} has {bytes} by its manifest; the job makes {most} at most", self.name);
        HostError::new(HostErrorKind::TooLarge, message).hint(NOTHING_KEPT)
    }
}

/// Removes unverified files of an unfinished fetch. Returns the entries still to fetch.
async fn keep_verified<'a>(part: &Path, entries: &'a [FileEntry]) -> Result<Vec<&'a FileEntry>, HostError> {
    let mut lacking: Vec<_> = entries.iter().collect();
    for name in list(part).map_err(|e| HostError::local(part, &e))? {
        let local = part.join(&name);
        let entry = lacking.iter().position(|entry| entry.name == name);
        match entry {
            Some(i) if is_verified(&local, lacking[i]).await? => drop(lacking.remove(i)),
            _ => fs::remove_file(&local).map_err(|e| HostError::local(&local, &e))?,
        }
    }
    Ok(lacking)
}

async fn is_verified(local: &Path, entry: &FileEntry) -> Result<bool, HostError> {
    let (bytes, sha256) = hash_file(local).await?;
    Ok(bytes == entry.bytes && sha256 == entry.sha256)
}

/// Groups files so that each group fits one answer.
fn batches<'a>(entries: &[&'a FileEntry]) -> Vec<Vec<&'a FileEntry>> {
    let mut batches: Vec<Vec<&FileEntry>> = Vec::new();
    let mut room = 0;
    for entry in entries {
        if entry.bytes >= room {
            batches.push(Vec::new());
            room = MAX_BATCH;
        }
        room = room.saturating_sub(entry.bytes + 1);
        batches.last_mut().expect("the first entry finds no room").push(entry);
    }
    batches
}

/// The manifest of a folder that was fetched completely.
fn kept(folder: &Path) -> Result<Option<Vec<u8>>, HostError> {
    absent(read_small(&folder.join(files::MANIFEST), MAX_MANIFEST)).map_err(|e| HostError::local(folder, &e))
}

/// Refuses to replace a folder unless an earlier fetch can have made it.
fn check_replaceable(into: &Path) -> Result<(), HostError> {
    let Some(there) = absent(list(into)).map_err(|e| HostError::local(into, &e))? else { return Ok(()) };
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

/// The folder in which files are collected until all have arrived.
pub fn unfinished(into: &Path) -> PathBuf {
    beside(into, ".part")
}

/// Renames the finished folder to `into`, replacing a partial one.
fn settle(part: &Path, into: &Path) -> io::Result<()> {
    File::open(part)?.sync_all()?;
    let old = beside(into, ".old.part");
    remove_folder(&old)?;
    absent(fs::rename(into, &old))?;
    fs::rename(part, into)?;
    sync_parent(into)?;
    remove_folder(&old)
}

fn remove_folder(folder: &Path) -> io::Result<()> {
    absent(fs::remove_dir_all(folder)).map(drop)
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    fs::write(path, bytes)?;
    File::open(path)?.sync_all()
}
