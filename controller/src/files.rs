//! Files that somebody may read, or wrote: hashed, and written so that a reader sees all or nothing.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

/// Size in bytes and SHA-256, lower-case hexadecimal, of a file.
///
/// # Errors
/// It cannot be read.
pub fn digest(path: &Path) -> io::Result<(u64, String)> {
    let mut hash = Sha256::new();
    let bytes = io::copy(&mut File::open(path)?, &mut hash)?;
    Ok((bytes, hex(&hash.finalize())))
}

/// SHA-256 of bytes, lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a name stays in the folder it is joined to.
pub fn is_plain_name(name: &str) -> bool {
    Path::new(name).file_name() == Some(name.as_ref())
}

/// Writes a file beside its name, synced, then renames it.
///
/// # Errors
/// Disk full, no such folder, not allowed.
pub fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let mut file = File::create(&part)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&part, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_whole_and_hashes_as_published() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        write_whole(&path, b"abc").unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(digest(&path).unwrap(), (3, expected.to_owned()));
        assert_eq!(sha256(b"abc"), expected);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn names_do_not_leave_their_folder() {
        assert!(is_plain_name("results.json"));
        for name in ["", ".", "..", "a/b", "/etc/passwd", "../a", "a/"] {
            assert!(!is_plain_name(name), "{name}");
        }
    }
}
