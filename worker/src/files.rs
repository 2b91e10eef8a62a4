//! Atomic writes, and reads of untrusted files with a size limit.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::error::{IoContext, Result};

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

/// `x.json` -> `x.json.part`, in the same folder, so that the rename is atomic.
pub(crate) fn part_path(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(".part");
    PathBuf::from(name)
}

/// Writes `bytes` to `target` through a temporary file, synced and renamed.
///
/// # Errors
/// Kind `Storage`, with the path.
pub fn write_atomic(target: &Path, bytes: &[u8]) -> Result<()> {
    let part = part_path(target);
    let mut file = File::create(&part).at("create", &part)?;
    file.write_all(bytes).at("write", &part)?;
    put_in_place(&file, &part, target)
}

/// Syncs a finished temporary file and renames it to `target`.
pub(crate) fn put_in_place(file: &File, part: &Path, target: &Path) -> Result<()> {
    file.sync_all().at("sync", part)?;
    fs::rename(part, target).at("rename to", target)?;
    sync_folder(target)
}

/// Removes a file, if there is one.
pub(crate) fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.at("remove", path),
    }
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Syncs the folder, so that the rename is durable.
fn sync_folder(target: &Path) -> Result<()> {
    let folder = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(folder).and_then(|f| f.sync_all()).at("sync", folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_of_bounded_size_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("a"), "abc").unwrap();
        assert_eq!(read_text(&at("a"), 3).unwrap(), "abc");
        assert!(read_small(&at("a"), 2).unwrap_err().to_string().contains("3 bytes, over the limit of 2"));
        File::create(at("sparse")).unwrap().set_len(1 << 40).unwrap();
        assert!(read_small(&at("sparse"), 1 << 28).unwrap_err().to_string().contains("1099511627776 bytes"));
        assert!(std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
        for path in [at("pipe"), "/dev/zero".into(), folder.path().to_owned()] {
            let error = read_small(&path, 1 << 28).unwrap_err();
            assert_eq!(error.to_string(), "it is not a regular file", "{}", path.display());
        }
    }
}
