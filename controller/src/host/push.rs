//! Pushes files to the host: the worker and a job's inputs.

use std::path::{Path, PathBuf};

use outliers_protocol::{SCHEMA, VersionInfo};

use super::retry::again;
use super::{HostError, HostErrorKind, OnEvent, RemoteHost, SHORT, TIMEOUT, names};
use crate::files::{blocking, digest, is_plain_name};
use crate::host::transport::quote::quote;
use crate::text::clean;
use crate::units::Bytes;

mod delivery;
mod place;

use delivery::Item;

/// Maximum files of a pushed folder.
const MAX_FILES: usize = 1000;

/// The worker program on a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteWorker {
    /// Absolute path on the host.
    pub path: String,
    /// SHA-256 of the program, lower-case hexadecimal.
    pub sha256: String,
    /// The version that it reports on the host.
    pub version: VersionInfo,
}

/// A folder's files on a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushedFolder {
    /// Absolute path on the host.
    pub path: String,
    /// Number of files that are now the same as in the local folder.
    pub files: usize,
    /// Total bytes of these files.
    pub bytes: u64,
    /// Bytes sent.
    pub sent: u64,
}

impl RemoteHost {
    /// Puts the worker program `local` at a content-addressed path, unless it is there, and runs
    /// it to get its version.
    ///
    /// The path is below `~/.cache/outliers`. Where that cannot be written or executed, it is a
    /// private folder in the first usable one of `/var/tmp`, `/tmp` and `/dev/shm`.
    pub async fn push_worker(&self, local: &Path, on: OnEvent<'_>) -> Result<RemoteWorker, HostError> {
        let mut item = Item::new(local.to_owned(), String::new(), 0o755).await?;
        let folder = format!("{}/bin/{}", again!(TIMEOUT, on, self.program_folder()), item.sha256);
        item.remote = format!("{folder}/outliers-worker");
        let item = [item];
        self.deliver("worker", &folder, &item, on).await?;
        let [Item { remote: path, sha256, .. }] = item;
        let version = again!(TIMEOUT, on, self.worker_version(&path));
        Ok(RemoteWorker { path, sha256, version })
    }

    /// Puts one plain file of at most `limit` bytes at `remote_rel` below the home folder, unless
    /// the same file is there. Returns the absolute path.
    pub async fn push_file(
        &self,
        local: &Path,
        remote_rel: &str,
        limit: u64,
        on: OnEvent<'_>,
    ) -> Result<String, HostError> {
        names::check_relative(remote_rel)?;
        let remote = format!("{}/{remote_rel}", again!(TIMEOUT, on, self.home()));
        let (folder, name) = remote.rsplit_once('/').unwrap_or(("/", &remote));
        let item = Item::new(local.to_owned(), remote.clone(), 0o644).await?;
        check_size(local, item.bytes, limit)?;
        self.deliver(name, folder, &[item], on).await?;
        Ok(remote)
    }

    /// Puts the plain files of the folder `local` (at most `limit` bytes together; no subfolders,
    /// no hidden files) into `remote_rel` below the home folder. Identical files are not sent;
    /// other files of the remote folder stay.
    pub async fn push_folder(
        &self,
        local: &Path,
        remote_rel: &str,
        limit: u64,
        on: OnEvent<'_>,
    ) -> Result<PushedFolder, HostError> {
        names::check_relative(remote_rel)?;
        let path = format!("{}/{remote_rel}", again!(TIMEOUT, on, self.home()));
        let files = list_folder(local, limit)?;
        let mut items = Vec::new();
        for (name, file) in files {
            items.push(Item::new(file, format!("{path}/{name}"), 0o644).await?);
        }
        let bytes = items.iter().map(|item| item.bytes).sum();
        check_size(local, bytes, limit)?;
        let name = remote_rel.rsplit_once('/').map_or(remote_rel, |(_, name)| name);
        let sent = self.deliver(name, &path, &items, on).await?;
        Ok(PushedFolder { path, files: items.len(), bytes, sent })
    }

    /// Runs the worker's `version --json` and refuses another version.
    async fn worker_version(&self, path: &str) -> Result<VersionInfo, HostError> {
        let answer = self.try_sh(&format!("{} version --json", quote(path)), SHORT).await?;
        if answer.status != Some(0) {
            let status = answer.status.map_or("a signal".to_owned(), |s| format!("status {s}"));
            let message = format!("{}: the worker does not run: {status}: {}", self.name, answer.stderr);
            return Err(HostError::new(HostErrorKind::WorkerUnfit, message).hint(unfit_hint(&answer.stderr)));
        }
        let version: VersionInfo = serde_json::from_slice(&answer.stdout).map_err(|e| {
            let said = clean(&answer.stdout, 120);
            let message = format!("{}: `version --json` of the worker is not valid ({e}): {said}", self.name);
            HostError::new(HostErrorKind::WorkerVersion, message)
        })?;
        let ours = env!("CARGO_PKG_VERSION");
        if version.schema == SCHEMA && version.version == ours {
            return Ok(version);
        }
        let message = format!(
            "{}: the worker is version {} (documents {}), this program is {ours} (documents {SCHEMA})",
            self.name,
            clean(version.version.as_bytes(), 40),
            version.schema
        );
        Err(HostError::new(HostErrorKind::WorkerVersion, message)
            .hint("build worker and controller from the same source"))
    }
}

fn unfit_hint(stderr: &str) -> &'static str {
    if stderr.contains("GLIBC") {
        "the host's C library is older than the one the worker was built with: build the worker on an older system or for musl"
    } else if stderr.contains("shared librar") {
        "the worker was built with CUDA and the host lacks its libraries: take an image with CUDA"
    } else {
        "the worker must be built for the host's system and processor"
    }
}

fn check_size(local: &Path, bytes: u64, limit: u64) -> Result<(), HostError> {
    if bytes <= limit {
        return Ok(());
    }
    let message = format!("{}: {} is more than the {} we push", local.display(), Bytes(bytes), Bytes(limit));
    Err(HostError::new(HostErrorKind::TooLarge, message)
        .hint("put large models on the instance itself, or name them by their hub id"))
}

/// Plain files of a folder with their names, sorted. Links are followed, since hub caches consist
/// of them.
fn list_folder(folder: &Path, limit: u64) -> Result<Vec<(String, PathBuf)>, HostError> {
    let wrong = |what: String| HostError::new(HostErrorKind::Local, format!("{}: {what}", folder.display()));
    let mut files = Vec::new();
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder).map_err(|e| wrong(e.to_string()))? {
        let path = entry.map_err(|e| wrong(e.to_string()))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let facts = std::fs::metadata(&path).map_err(|e| wrong(format!("{name}: {e}")))?;
        if !facts.is_file() || name.starts_with('.') {
            continue;
        }
        if !is_plain_name(&name) {
            return Err(wrong(format!("{:?} is not a plain file name", path.file_name())));
        }
        bytes += facts.len();
        files.push((name, path));
    }
    // Checked before hashing, which would take long for a terabyte.
    check_size(folder, bytes, limit)?;
    if files.is_empty() || files.len() > MAX_FILES {
        return Err(wrong(format!("{} files; between 1 and {MAX_FILES} can be pushed", files.len())));
    }
    files.sort();
    Ok(files)
}

/// Size and SHA-256 of a local file.
pub(super) async fn hash_file(path: &Path) -> Result<(u64, String), HostError> {
    let owned = path.to_owned();
    blocking(move || digest(&owned)).await.map_err(|error| HostError::local(path, &error))
}
