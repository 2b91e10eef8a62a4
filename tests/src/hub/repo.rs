//! Repositories of the hub: folders.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use axum::body::Bytes;
use serde_json::{Value, json};
use sha1::Digest as _;

/// A repository to serve.
#[derive(Clone, Debug)]
pub struct Repo {
    pub(super) id: String,
    /// Prefix of its id in URLs.
    prefix: &'static str,
    folder: PathBuf,
    pub(super) token: Option<String>,
    kept: Arc<Mutex<HashMap<PathBuf, Stored>>>,
}

/// Content of a file with its hashes, which are computed once because this is slow.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) bytes: Bytes,
    pub(super) sha256: String,
    git_sha1: String,
    written: SystemTime,
}

impl Repo {
    /// Serves the files of `folder` as `id` (`owner/name`), on the branch `main`.
    pub fn new(id: &str, folder: &Path) -> Self {
        Self { id: id.to_owned(), prefix: "", folder: folder.to_owned(), token: None, kept: Arc::default() }
    }

    /// A dataset, which may have the name of a model.
    #[must_use]
    pub fn dataset(mut self) -> Self {
        self.prefix = "datasets/";
        self
    }

    /// Its path on the hub.
    pub(super) fn address(&self) -> String {
        format!("{}{}", self.prefix, self.id)
    }

    /// Makes it gated: files need this token.
    #[must_use]
    pub fn gated(mut self, token: &str) -> Self {
        self.token = Some(token.to_owned());
        self
    }

    /// The commit that `main` is.
    pub fn commit(&self) -> String {
        hex(&sha1::Sha1::digest(self.id.as_bytes()))
    }

    /// The file as it is now.
    pub(super) fn read(&self, file: &str) -> Option<Stored> {
        let path = self.folder.join(file);
        let written = path.metadata().and_then(|metadata| metadata.modified()).ok()?;
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stored) = kept.get(&path).filter(|stored| stored.written == written) {
            return Some(stored.clone());
        }
        let bytes = Bytes::from(fs::read(&path).ok()?);
        let stored = Stored { sha256: sha256(&bytes), git_sha1: git_sha1(&bytes), bytes, written };
        kept.insert(path, stored.clone());
        Some(stored)
    }

    /// As on the real hub: weights are in LFS, all else is in git.
    pub(super) fn is_large(file: &str) -> bool {
        [".safetensors", ".bin", ".parquet", ".jsonl"].iter().any(|ending| file.ends_with(ending))
    }

    /// The entity tag of a file.
    pub(super) fn tag(file: &str, stored: &Stored) -> String {
        if Self::is_large(file) { stored.sha256.clone() } else { stored.git_sha1.clone() }
    }

    /// Answer of the model API; `bare`: without sizes and hashes, as from some mirrors.
    pub(super) fn listing(&self, bare: bool) -> Value {
        let mut names = Vec::new();
        collect(&self.folder, "", &mut names);
        names.sort();
        let file = |name: String| match self.read(&name).filter(|_| !bare) {
            None => json!({"rfilename": name}),
            Some(stored) if Self::is_large(&name) => json!({
                // The blob is only the pointer file: its hash is not the content's.
                "rfilename": name, "size": stored.bytes.len(), "blobId": git_sha1(b"pointer"),
                "lfs": {"sha256": stored.sha256, "size": stored.bytes.len(), "pointerSize": 135},
            }),
            Some(stored) => json!({"rfilename": name, "size": stored.bytes.len(), "blobId": stored.git_sha1}),
        };
        json!({"id": self.id, "modelId": self.id, "sha": self.commit(), "private": false,
               "siblings": names.into_iter().map(file).collect::<Vec<_>>()})
    }
}

/// Paths of all files below a folder.
fn collect(folder: &Path, below: &str, names: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = format!("{below}{}", entry.file_name().to_string_lossy());
        match entry.path().is_dir() {
            true => collect(&entry.path(), &format!("{name}/"), names),
            false => names.push(name),
        }
    }
}

fn sha256(bytes: &[u8]) -> String {
    hex(&sha2::Digest::finalize(sha2::Digest::chain_update(sha2::Sha256::default(), bytes)))
}

fn git_sha1(bytes: &[u8]) -> String {
    let hasher = sha1::Sha1::new().chain_update(format!("blob {}\0", bytes.len())).chain_update(bytes);
    hex(&hasher.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
