//! Detects files that are not what their name says: a Git LFS pointer, a web page, an empty file.

use crate::error::{Result, WorkerError};

/// Start of a Git LFS pointer.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";
/// Starts of web pages, in lower case.
const PAGES: [&[u8]; 2] = [b"<!doctype html", b"<html"];
/// Bytes from the start of a file that suffice. A page may begin with white space.
pub const ENOUGH: usize = 64;

/// Refuses a file that cannot be a model's by its start.
///
/// # Errors
/// Kind `Checkpoint`: an empty file, a Git LFS pointer or an HTML page. The caller adds the file's
/// name.
pub fn refuse(start: &[u8]) -> Result<()> {
    let text = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start).trim_ascii_start();
    let begins = |page: &&[u8]| text.get(..page.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(page));
    let (what, hint) = if start.is_empty() {
        ("it is empty (0 bytes)", "fetch the file again: an earlier download or copy came to nothing")
    } else if start.starts_with(LFS_POINTER) {
        ("it is a Git LFS pointer, not the file itself", "run `git lfs pull` in the repository that the file is from")
    } else if PAGES.iter().any(begins) {
        (
            "it is an HTML page, not the file itself",
            "fetch the file again: a login or error page was saved under its name",
        )
    } else {
        return Ok(());
    };
    Err(WorkerError::checkpoint(what).hint(hint))
}

#[cfg(test)]
mod tests;
