//! Names on the hub, and repository listings.

use std::fmt;

use serde::Deserialize;

use super::http::{Asked, Client};
use super::response::encode;
use crate::checkpoint::safetensors::shown;
use crate::error::{Result, WorkerError};

/// Maximum bytes of a listing. DeepSeek-V3's has about 60 kB.
const MAX_LISTING_BYTES: u64 = 64 << 20;

/// A file's hash on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Digest {
    /// SHA-256 of the content (large files), lower-case hexadecimal.
    Sha256(String),
    /// SHA-1 of the git blob (small files), lower-case hexadecimal.
    GitSha1(String),
}

impl Digest {
    /// Hexadecimal digits, which are also the blob's name in the cache.
    pub fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitSha1(hex) => hex,
        }
    }

    /// Distinguishes the kinds by length; `None` for anything but lower-case hexadecimal.
    pub(super) fn from_hex(hex: &str) -> Option<Self> {
        let plain = hex.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        match (plain, hex.len()) {
            (true, 64) => Some(Self::Sha256(hex.to_owned())),
            (true, 40) => Some(Self::GitSha1(hex.to_owned())),
            _ => None,
        }
    }
}

/// One file of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoFile {
    /// Path inside the repository.
    pub name: String,
    /// Size in bytes, if the hub lists it.
    pub size: Option<u64>,
    /// Hash, if the hub lists it.
    pub digest: Option<Digest>,
}

/// Kind of a repository. The hub has separate names for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepoKind {
    /// A model.
    Model,
    /// A dataset.
    Dataset,
}

impl RepoKind {
    /// Path of its API.
    fn interface(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }

    /// Prefix of ids in the addresses of pages and files.
    pub(super) fn prefix(self) -> &'static str {
        match self {
            Self::Model => "",
            Self::Dataset => "datasets/",
        }
    }
}

impl fmt::Display for RepoKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Model => "model",
            Self::Dataset => "dataset",
        })
    }
}

/// A repository at one commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoListing {
    /// Kind of the repository.
    pub kind: RepoKind,
    /// `owner/name`.
    pub id: String,
    /// The requested revision.
    pub revision: String,
    /// Commit hash, which is fetched even if the branch changes.
    pub commit: String,
    /// Its files.
    pub files: Vec<RepoFile>,
}

impl RepoListing {
    /// The file with this name.
    pub fn file(&self, name: &str) -> Option<&RepoFile> {
        self.files.iter().find(|file| file.name == name)
    }
}

/// The used part of the hub's answer.
#[derive(Deserialize)]
struct Wire {
    sha: String,
    #[serde(default)]
    siblings: Vec<WireFile>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireFile {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<WireLfs>,
}

#[derive(Deserialize)]
struct WireLfs {
    sha256: Option<String>,
    size: Option<u64>,
}

impl From<WireFile> for RepoFile {
    fn from(file: WireFile) -> Self {
        // For large files the git blob is a pointer, and its hash does not identify the content.
        let (size, hex) = match file.lfs {
            Some(lfs) => (lfs.size.or(file.size), lfs.sha256),
            None => (file.size, file.blob_id),
        };
        Self { name: file.rfilename, size, digest: hex.as_deref().and_then(Digest::from_hex) }
    }
}

pub(super) fn fetch(client: &Client, kind: RepoKind, id: &str, revision: &str) -> Result<RepoListing> {
    check_id(kind, id)?;
    check_revision(revision)?;
    let path = format!("/api/{}/{id}/revision/{}?blobs=true", kind.interface(), encode(revision));
    let bytes = client.read_small(&path, &Asked { kind, id, revision, file: None }, MAX_LISTING_BYTES)?;
    let unreadable = |what: String| {
        let message = format!("the hub's description of {id} cannot be read: {what}");
        WorkerError::network(message).hint("check that the endpoint is a Hugging Face hub")
    };
    let wire: Wire = serde_json::from_slice(&bytes).map_err(|e| unreadable(format!("line {}", e.line())))?;
    if !matches!(Digest::from_hex(&wire.sha), Some(Digest::GitSha1(_))) {
        return Err(unreadable(format!("{} is not a commit", shown(&wire.sha))));
    }
    let files = wire.siblings.into_iter().map(RepoFile::from).collect();
    Ok(RepoListing { kind, id: id.to_owned(), revision: revision.to_owned(), commit: wire.sha, files })
}

/// Checks an id: `owner/name`, or the bare name of a few old models, by the hub's rules, so that
/// it is safe in paths and addresses.
fn check_id(kind: RepoKind, id: &str) -> Result<()> {
    let fine = |part: &str| {
        let allowed = part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        let edges = part.starts_with(['-', '.']) || part.ends_with(['-', '.']);
        (1..=96).contains(&part.len()) && allowed && !edges && !part.contains("--") && !part.contains("..")
    };
    if id.split('/').count() <= 2 && id.split('/').all(fine) {
        return Ok(());
    }
    let message = format!("{} is not a {kind} id", shown(id));
    Err(WorkerError::job(message).hint("an id looks like `allenai/OLMoE-1B-7B-0125`; a folder must exist"))
}

/// Checks a branch, tag or commit. The cache creates a file of that name, which must stay in its
/// folder.
fn check_revision(revision: &str) -> Result<()> {
    let fine = |part: &str| !matches!(part, "" | "." | "..") && !part.contains("..");
    let visible = !revision.chars().any(|c| c.is_control() || c.is_whitespace() || c == '\\');
    if revision.len() <= 255 && visible && revision.split('/').all(fine) {
        return Ok(());
    }
    let message = format!("{} is not a revision", shown(revision));
    Err(WorkerError::job(message).hint("use a branch, a tag, or a commit hash"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_revisions_are_safe_in_paths() {
        for id in ["allenai/OLMoE-1B-7B-0125", "gpt2", "Qwen/Qwen3-0.6B", "a/b_c.d"] {
            check_id(RepoKind::Model, id).unwrap();
        }
        for id in
            ["", "/", "a/", "/b", "a/b/c", "../x", "a/..", "a/.b", "a b/c", "a/b?x", "a/b#c", "a/b--c", "a/b\n", "é/a"]
        {
            assert!(check_id(RepoKind::Dataset, id).is_err(), "{id}");
        }
        for revision in ["main", "v1.0", "refs/pr/3", "9b0c1aa87e34a20052389dce1f0cf01da783f654"] {
            check_revision(revision).unwrap();
        }
        for revision in ["", "..", "a/../b", "/etc", "a//b", "a\nb", "a b", "a\\b"] {
            assert!(check_revision(revision).is_err(), "{revision}");
        }
    }

    #[test]
    fn only_hexadecimal_digests_become_file_names() {
        assert!(matches!(Digest::from_hex(&"a".repeat(64)), Some(Digest::Sha256(_))));
        assert!(matches!(Digest::from_hex(&"0".repeat(40)), Some(Digest::GitSha1(_))));
        for bad in ["", "../../../etc/passwd", &"g".repeat(40), &"A".repeat(40), &"a".repeat(41)] {
            assert_eq!(Digest::from_hex(bad), None);
        }
    }
}
