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

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a name is a plain, visible file name that means the same on every system, and so stays in the folder it is joined to.
pub fn is_plain_name(name: &str) -> bool {
    let odd =
        |c: char| c.is_control() || matches!(c, '/' | '\\' | ':' | '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}');
    !name.is_empty() && name.len() <= 200 && !name.starts_with(['.', '-']) && !name.contains(odd)
}

/// Writes a file beside its name, synced, then renames it, durably.
///
/// # Errors
/// Disk full, no such folder, not allowed.
pub fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let mut file = File::create(&part)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&part, path)?;
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => File::open(folder)?.sync_all(),
        _ => Ok(()),
    }
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
    fn only_plain_names_pass() {
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
