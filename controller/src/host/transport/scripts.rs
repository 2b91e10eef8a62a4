//! Files by shell scripts, for hosts without SFTP, whatever carries the commands there.

use super::quote::quote;
use super::{ExecOutput, TransportError, TransportErrorKind as Kind};
use crate::text::clean;

/// What `dd` counts offsets in.
pub(super) const UNIT: u64 = 64 << 10;
/// Exit status of [`if_plain`] for "no such file" and for "not a plain file".
const MISSING: i32 = 44;
const NOT_PLAIN: i32 = 45;

/// `script` for a POSIX shell, under any login shell.
pub(super) fn in_sh(script: &str) -> String {
    format!("sh -c {}", quote(&format!("LC_ALL=C; export LC_ALL; {script}")))
}

/// Makes a file, private to its owner, unless it is there.
pub(super) fn make(path: &str) -> String {
    in_sh(&format!("umask 077; : >> {}", quote(path)))
}

/// Writes standard input into a file at `offset`, a multiple of [`UNIT`].
pub(super) fn write_at(path: &str, offset: u64) -> String {
    in_sh(&format!("dd of={} bs={UNIT} seek={} conv=notrunc", quote(path), offset / UNIT))
}

/// Prints a plain file; its output is read by [`content`].
pub(super) fn cat(path: &str) -> String {
    in_sh(&format!("{} cat {}", if_plain(path), quote(path)))
}

/// Prints at most `limit` bytes of a plain file from `offset`; its output is read by [`content`].
pub(super) fn read(path: &str, offset: u64, limit: u64) -> String {
    let from = offset.saturating_add(1);
    in_sh(&format!("{} tail -c +{from} {} | head -c {limit}", if_plain(path), quote(path)))
}

/// Continues only with a regular file. Links are not followed.
fn if_plain(path: &str) -> String {
    let file = quote(path);
    format!(
        "if [ -h {file} ]; then exit {NOT_PLAIN}; fi; [ -e {file} ] || exit {MISSING}; \
         [ -f {file} ] || exit {NOT_PLAIN};"
    )
}

/// What a script printed of a file; `None` if there is no such file.
pub(super) fn content(path: &str, out: ExecOutput) -> Result<Option<Vec<u8>>, TransportError> {
    match out.status {
        Some(MISSING) => Ok(None),
        Some(NOT_PLAIN) => Err(TransportError::new(Kind::Remote, format!("{path}: not a plain file"))),
        _ => demand(path, out).map(Some),
    }
}

/// The output of a script that succeeded, or its own words as an error.
pub(super) fn demand(path: &str, out: ExecOutput) -> Result<Vec<u8>, TransportError> {
    if out.status == Some(0) {
        return Ok(out.stdout);
    }
    let words = clean(&out.stderr, 300);
    let full = ["No space left on device", "Disk quota exceeded"].iter().find(|told| words.contains(*told));
    match full {
        Some(told) => Err(TransportError::new(Kind::NoSpace, format!("{path}: {}", told.to_lowercase()))),
        None => {
            let status = out.status.map_or_else(|| "a signal".to_owned(), |s| format!("status {s}"));
            Err(TransportError::new(Kind::Remote, format!("{path}: the host's shell ended with {status}: {words}")))
        }
    }
}
