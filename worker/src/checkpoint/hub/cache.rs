//! The cache folder: blobs named by their hash, and snapshots of links to them.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::http::Client;
use super::listing::{Digest, RepoFile, RepoListing};
use super::response::RequestFailure;
use super::verify::Hasher;
use crate::checkpoint::source::is_plain_name;
use crate::error::{IoContext, Result, WorkerError};
use crate::files::{open_regular, part_path, put_in_place, remove_if_there, write_atomic};
use hf_hub::CacheRepo;

/// Bytes between two calls of the progress callback; also the buffer per download.
const CHUNK: usize = 1 << 20;
/// Blobs up to this size are hashed before use, since other tools may store error pages as blobs.
const REHASH_BYTES: u64 = 64 << 20;

/// Called with the number of bytes received, or, negative, discarded.
pub(super) type OnBytes<'a> = &'a dyn Fn(i64);

pub(super) struct Cache {
    layout: hf_hub::Cache,
}

/// A file to fetch, with size and hash.
struct CacheFile<'a> {
    listing: &'a RepoListing,
    name: &'a str,
    size: u64,
    digest: &'a Digest,
}

impl CacheFile<'_> {
    fn hasher(&self) -> Hasher {
        Hasher::new(self.digest, self.size)
    }
}

impl Cache {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { layout: hf_hub::Cache::new(folder) }
    }

    fn repo(&self, id: &str) -> CacheRepo {
        self.layout.model(id.to_owned())
    }

    /// Folder with the files of one commit.
    pub(super) fn snapshot(&self, listing: &RepoListing) -> PathBuf {
        self.repo(&listing.id).pointer_path(&listing.commit)
    }

    /// Stores the commit of a branch or tag, for tools that read the cache.
    pub(super) fn remember(&self, id: &str, revision: &str, commit: &str) -> Result<()> {
        if revision == commit {
            return Ok(());
        }
        let refs = self.layout.path().join(folder_name(id)).join("refs").join(revision);
        make_parent(&refs)?;
        let _lock = self.lock(id, "refs")?;
        write_atomic(&refs, commit.as_bytes())
    }

    /// Ensures that a file is complete in the cache and linked into the snapshot. Returns whether
    /// its hash was compared.
    pub(super) fn fetch(
        &self,
        client: &Client,
        listing: &RepoListing,
        file: &RepoFile,
        on_bytes: OnBytes<'_>,
    ) -> Result<bool> {
        if !is_plain_name(&file.name) {
            return Err(WorkerError::internal(format!("{:?} is not a plain file name", file.name)));
        }
        let (Some(size), Some(digest)) = (file.size, &file.digest) else {
            let message = format!("the hub lists neither size nor hash of {} of {}", file.name, listing.id);
            return Err(WorkerError::network(message).hint("fetch the model by other means and name its folder"));
        };
        let wanted = CacheFile { listing, name: &file.name, size, digest };
        let blob = self.repo(&listing.id).blob_path(digest.hex());
        let _lock = self.lock(&listing.id, digest.hex())?;
        let there = is_whole(&blob, &wanted)?;
        if there {
            on_bytes(signed(size));
        } else {
            make_parent(&blob)?;
            Download::start(&blob, &wanted)?.run(client, &wanted, on_bytes)?;
        }
        link(&self.snapshot(listing).join(&file.name), &blob)?;
        Ok(!there || size <= REHASH_BYTES)
    }

    /// Locks a blob, or the refs, against other processes until the returned file is dropped.
    fn lock(&self, id: &str, what: &str) -> Result<File> {
        let path = self.layout.path().join(".locks").join(folder_name(id)).join(format!("{what}.lock"));
        make_parent(&path)?;
        let file = File::create(&path).at("create", &path)?;
        file.lock().at("lock", &path)?;
        Ok(file)
    }
}

fn folder_name(id: &str) -> String {
    hf_hub::Repo::model(id.to_owned()).folder_name()
}

/// Whether a blob matches its name. Large ones are checked by size only.
fn is_whole(blob: &Path, wanted: &CacheFile<'_>) -> Result<bool> {
    match blob.metadata() {
        Ok(metadata) if metadata.len() != wanted.size => Ok(false),
        Ok(_) if wanted.size > REHASH_BYTES => Ok(true),
        Ok(_) => {
            let mut hasher = wanted.hasher();
            let mut file = open_regular(blob).at("open", blob)?;
            io::copy(&mut file, &mut hasher).at("read", blob)?;
            Ok(hasher.hex() == wanted.digest.hex())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(WorkerError::io("read", blob, &error)),
    }
}

/// A download in progress. The bytes so far are in `<blob>.part`, and hashed.
struct Download {
    blob: PathBuf,
    part: PathBuf,
    file: File,
    hasher: Hasher,
    have: u64,
}

impl Download {
    /// Resumes an earlier attempt.
    fn start(blob: &Path, wanted: &CacheFile<'_>) -> Result<Self> {
        let part = part_path(blob);
        let mut file =
            File::options().read(true).write(true).create(true).truncate(false).open(&part).at("create", &part)?;
        let mut hasher = wanted.hasher();
        let have = io::copy(&mut file, &mut hasher).at("read", &part)?;
        let mut download = Self { blob: blob.to_owned(), part, file, hasher, have };
        if have > wanted.size {
            download.restart(wanted)?;
        }
        Ok(download)
    }

    fn restart(&mut self, wanted: &CacheFile<'_>) -> Result<()> {
        self.file.set_len(0).at("truncate", &self.part)?;
        io::Seek::rewind(&mut self.file).at("rewind", &self.part)?;
        self.hasher = wanted.hasher();
        self.have = 0;
        Ok(())
    }

    /// Downloads, verifies and renames. If the file differs from its listing, it is fetched once
    /// more from the start.
    fn run(mut self, client: &Client, wanted: &CacheFile<'_>, on_bytes: OnBytes<'_>) -> Result<()> {
        on_bytes(signed(self.have));
        for last in [false, true] {
            self.fill(client, wanted, on_bytes)?;
            let found = self.hasher.clone().hex();
            if found == wanted.digest.hex() {
                return put_in_place(&self.file, &self.part, &self.blob);
            }
            tracing::warn!(file = wanted.name, "its hash is {found}, not {}; fetching it again", wanted.digest.hex());
            on_bytes(-signed(self.have));
            self.restart(wanted)?;
            if last {
                // No part of it can be resumed.
                fs::remove_file(&self.part).at("remove", &self.part)?;
            }
        }
        let message =
            format!("{} is not what the hub lists, twice: its hash differs", wanted.listing.asked(wanted.name));
        Err(WorkerError::network(message).hint("something between here and the hub changes files: a proxy or a mirror"))
    }

    /// Requests missing bytes until the file is complete. An attempt that received bytes does not
    /// count as failed.
    fn fill(&mut self, client: &Client, wanted: &CacheFile<'_>, on_bytes: OnBytes<'_>) -> Result<()> {
        let mut failed = 0;
        while self.have < wanted.size {
            let before = self.have;
            let refusal = match client.open(wanted.listing, wanted.name, self.have..wanted.size) {
                Err(RequestFailure::Final(error)) => return Err(error),
                Err(refusal) => refusal,
                Ok(opened) => {
                    if opened.start < self.have {
                        // The server does not support ranges, so the download restarts.
                        on_bytes(-signed(self.have));
                        self.restart(wanted)?;
                    }
                    RequestFailure::again(self.append(opened.body, wanted, on_bytes)?)
                }
            };
            if self.have == wanted.size {
                break;
            }
            failed = if self.have > before { 1 } else { failed + 1 };
            let context = || format!("cannot fetch {}", wanted.listing.asked(wanted.name));
            client.pause(failed, refusal).map_err(|error| error.context(context()))?;
        }
        Ok(())
    }

    /// Appends the body, up to the listed size. Returns why it ended; only disk failures are
    /// errors.
    fn append(&mut self, body: Box<dyn Read>, wanted: &CacheFile<'_>, on_bytes: OnBytes<'_>) -> Result<String> {
        let mut body = body.take(wanted.size - self.have);
        let mut chunk = vec![0; CHUNK];
        loop {
            let (filled, ended) = fill_chunk(&mut body, &mut chunk);
            self.file.write_all(&chunk[..filled]).at("write", &self.part)?;
            self.hasher.add(&chunk[..filled]);
            self.have += filled as u64;
            if filled > 0 {
                on_bytes(signed(filled as u64));
            }
            match ended {
                None => {}
                Some(Ok(())) => return Ok(format!("only {} of {} bytes arrived", self.have, wanted.size)),
                Some(Err(error)) => return Ok(format!("the download broke off: {error}")),
            }
        }
    }
}

/// Reads until the chunk is full or the body ends. Bytes read before an error are kept.
fn fill_chunk(body: &mut impl Read, chunk: &mut [u8]) -> (usize, Option<io::Result<()>>) {
    let mut filled = 0;
    while filled < chunk.len() {
        match body.read(&mut chunk[filled..]) {
            Ok(0) => return (filled, Some(Ok(()))),
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (filled, Some(Err(error))),
        }
    }
    (filled, None)
}

/// Links `snapshots/<commit>/<name>` -> `../../blobs/<hash>`, atomically replacing another link.
fn link(name: &Path, blob: &Path) -> Result<()> {
    let target = Path::new("../../blobs").join(blob.file_name().unwrap_or_default());
    if fs::read_link(name).is_ok_and(|old| old == target) {
        return Ok(());
    }
    make_parent(name)?;
    let part = part_path(name);
    remove_if_there(&part)?;
    symlink(&target, &part).at("link", &part)?;
    fs::rename(&part, name).at("rename to", name)
}

fn make_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), |folder| fs::create_dir_all(folder).at("create", folder))
}

/// Signed form of a file size, which is far below 2^63.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}
