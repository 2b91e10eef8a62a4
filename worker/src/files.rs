//! Files that appear whole or not at all.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{IoContext, Result};

/// `x.json` -> `x.json.part`, in the same folder so that the rename is atomic.
pub(crate) fn part_path(target: &Path) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(".part");
    PathBuf::from(name)
}

/// Writes `bytes` as `target`: to a temporary name, synced to disk, renamed.
///
/// # Errors
/// Kind `Storage`, naming the file.
pub fn write_atomic(target: &Path, bytes: &[u8]) -> Result<()> {
    let part = part_path(target);
    let mut file = File::create(&part).at("create", &part)?;
    file.write_all(bytes).at("write", &part)?;
    put_in_place(&file, &part, target)
}

/// Syncs a finished temporary file and gives it its name.
pub(crate) fn put_in_place(file: &File, part: &Path, target: &Path) -> Result<()> {
    file.sync_all().at("sync", part)?;
    fs::rename(part, target).at("rename to", target)?;
    sync_folder(target)
}

/// Makes the name itself durable.
fn sync_folder(target: &Path) -> Result<()> {
    let folder = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(folder).and_then(|f| f.sync_all()).at("sync", folder)
}
