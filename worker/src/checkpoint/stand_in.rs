//! What lies under the name of a file without being it: a pointer that Git LFS left, a page of a
//! website, nothing at all.

use crate::error::{Result, WorkerError};

/// How every Git LFS pointer begins.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";
/// How pages begin, in lower case.
const PAGES: [&[u8]; 2] = [b"<!doctype html", b"<html"];
/// Bytes from the start of a file that are enough to tell; a page may begin with white space.
pub const ENOUGH: usize = 64;

/// Refuses the start of a file that is none of a model's.
///
/// # Errors
/// Kind `Checkpoint`: nothing, a Git LFS pointer or an HTML page. The file's name is the caller's to add.
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
