//! Hashes, atomic writes, and reads of untrusted files with a size limit.

use std::fs::{self, File, Metadata, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use crate::units::Bytes;

/// Left free on every disk, since the ledger grows as well.
pub(crate) const RESERVE: Bytes = Bytes::from_mib(64);

/// Free disk at `path`, or in the folder where it would be created; `None` if the system does not
/// report it.
pub(crate) fn free_disk(path: &Path) -> Option<Bytes> {
    let there = path.ancestors().find(|path| path.exists())?;
    let figures = rustix::fs::statvfs(there).ok()?;
    Some(Bytes(figures.f_bavail.saturating_mul(figures.f_frsize)))
}

/// Maximum bytes of a document: more than users, workers or this program write.
pub(crate) const MAX_FILE_BYTES: u64 = 256 << 20;

/// Opens a regular file. A pipe or a device is refused: reading it may never end, and opening a
/// pipe may block.
///
/// # Errors
/// It is not a regular file, or cannot be opened.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    // Checked before opening as well, since opening some devices has an effect.
    regular(&fs::metadata(path)?)?;
    // `O_NONBLOCK` prevents blocking if a pipe has replaced the file.
    let file = File::options().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)?;
    regular(&file.metadata()?)?;
    Ok(file)
}

fn regular(metadata: &Metadata) -> io::Result<()> {
    if metadata.is_file() { Ok(()) } else { Err(io::Error::other("it is not a regular file")) }
}

/// Reads a regular file of at most `limit` bytes.
///
/// # Errors
/// It is not a regular file, is too long, or cannot be read.
pub(crate) fn read_small(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let too_long = |has: String| Err(io::Error::other(format!("it has {has}, over the limit of {limit} bytes")));
    let file = open_regular(path)?;
    let bytes = file.metadata()?.len();
    if bytes > limit {
        return too_long(format!("{bytes} bytes"));
    }
    let mut content = Vec::with_capacity(bytes as usize);
    // Some files report no size, and some grow during the read.
    file.take(limit + 1).read_to_end(&mut content)?;
    if content.len() as u64 > limit { too_long("more bytes".to_owned()) } else { Ok(content) }
}

/// Reads a regular UTF-8 file of at most `limit` bytes.
///
/// # Errors
/// As [`read_small`], or it is not UTF-8.
pub(crate) fn read_text(path: &Path, limit: u64) -> io::Result<String> {
    let text = String::from_utf8(read_small(path, limit)?);
    text.map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
}

/// Reads a JSON document of at most [`MAX_FILE_BYTES`].
///
/// # Errors
/// As [`read_small`], or it is not such a document.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    Ok(serde_json::from_slice(&read_small(path, MAX_FILE_BYTES)?)?)
}

/// Creates a folder and its missing parents with access for the user only, under any umask.
///
/// # Errors
/// Permission denied, or a file has this path.
pub(crate) fn create_private_folder(folder: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// Removes the access of other users to a file or folder.
///
/// # Errors
/// It does not exist, or belongs to another user.
pub(crate) fn make_private(path: &Path) -> io::Result<()> {
    let mode = fs::metadata(path)?.permissions().mode();
    if mode & 0o077 == 0 { Ok(()) } else { fs::set_permissions(path, fs::Permissions::from_mode(mode & 0o700)) }
}

/// Not being there is an answer, not a failure.
pub(crate) fn absent<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether another process has the lock that was just tried for.
pub(crate) fn is_taken(tried: Result<(), TryLockError>) -> io::Result<bool> {
    match tried {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Size in bytes and SHA-256, lower-case hexadecimal, of a regular file.
///
/// # Errors
/// It is not a regular file, or cannot be read.
pub(crate) fn digest(path: &Path) -> io::Result<(u64, String)> {
    let mut hash = Sha256::new();
    let bytes = io::copy(&mut open_regular(path)?, &mut hash)?;
    Ok((bytes, hex(&hash.finalize())))
}

/// SHA-256 of bytes, lower-case hexadecimal.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a name is a plain, visible file name on every system, so that it stays in the folder it
/// is joined to.
pub(crate) fn is_plain_name(name: &str) -> bool {
    let odd =
        |c: char| c.is_control() || matches!(c, '/' | '\\' | ':' | '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}');
    !name.is_empty() && name.len() <= 200 && !name.starts_with(['.', '-']) && !name.contains(odd)
}

/// Renames a finished folder durably. An existing target folder must be empty.
///
/// # Errors
/// Another disk, a target that is not empty, or permission denied.
pub(crate) fn rename_folder(from: &Path, to: &Path) -> io::Result<()> {
    File::open(from)?.sync_all()?;
    fs::rename(from, to)?;
    sync_parent(to)
}

/// Makes the name of a file or folder durable.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => File::open(folder)?.sync_all(),
        _ => Ok(()),
    }
}

/// The path with a suffix, in the same folder.
pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Runs work that blocks outside the runtime's tasks.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// Writes a file through a temporary one, synced and renamed durably.
///
/// # Errors
/// Disk full, missing folder, or permission denied.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let part = beside(path, ".part");
    let mut file = File::create(&part)?;
    let written = file.write_all(content).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&part, path));
    if let Err(error) = written {
        // Best effort: half a file, or one whose name is a folder's, is of no use.
        let _ = fs::remove_file(&part);
        return Err(error);
    }
    sync_parent(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_files_are_complete_and_hashed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        write_whole(&path, b"abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest(&path).unwrap(), (3, expected.to_owned()));
        assert_eq!(sha256(b"abc"), expected);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn file_that_cannot_be_written_leaves_nothing_beside_it() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("a");
        fs::create_dir(&path).unwrap();
        assert!(write_whole(&path, b"abc").is_err());
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1, "the folder alone");
    }

    #[test]
    fn only_regular_files_of_bounded_size_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("a"), "abc").unwrap();
        assert_eq!(read_small(&at("a"), 3).unwrap(), b"abc");
        assert_eq!(read_text(&at("a"), 3).unwrap(), "abc");
        assert!(read_small(&at("a"), 2).unwrap_err().to_string().contains("3 bytes, over the limit of 2"));
        File::create(at("sparse")).unwrap().set_len(1 << 40).unwrap();
        assert!(read_small(&at("sparse"), MAX_FILE_BYTES).unwrap_err().to_string().contains("1099511627776 bytes"));
        assert!(std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
        for path in [at("pipe"), "/dev/zero".into(), folder.path().to_owned()] {
            for error in [read_small(&path, MAX_FILE_BYTES).unwrap_err(), digest(&path).unwrap_err()] {
                assert_eq!(error.to_string(), "it is not a regular file", "{}", path.display());
            }
        }
        // The system reports size 0 for this readable file.
        assert!(read_small(Path::new("/proc/self/status"), 10).unwrap_err().to_string().contains("more bytes"));
        fs::write(at("a"), b"\xff").unwrap();
        assert!(read_text(&at("a"), 3).unwrap_err().to_string().contains("UTF-8"));
        let missing = read_small(&at("none"), 1).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn free_disk_of_a_future_folder_is_that_of_its_parent() {
        let root = tempfile::tempdir().unwrap();
        assert!(free_disk(&root.path().join("not/yet")).unwrap() > Bytes(0));
    }

    #[test]
    fn only_plain_file_names_are_accepted() {
        for good in ["results.json", "a-b_c.safetensors", "x", "naïve.txt", "a b"] {
            assert!(is_plain_name(good), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "/etc/passwd",
            "a/b",
            "a/",
            "a\\b",
            ".ssh",
            "-rf",
            "a\nb",
            "a\0b",
            "c:",
            "\u{202e}x",
        ] {
            assert!(!is_plain_name(bad), "{bad:?}");
        }
        assert!(!is_plain_name(&"x".repeat(201)));
    }
}
