//! Files through commands alone, for servers without SFTP, and checks that SFTP cannot express.

use std::time::Duration;

use russh::client::Handle;
use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::clock::Clock;
use super::connect::Client;
use super::exec::{exec, feed};
use crate::host::transport::quote::quote;
use crate::host::transport::scripts::{self, demand, in_sh};
use crate::host::transport::{TransportError, TransportErrorKind as Kind};

/// Bytes per command that reads. Each block has its own limit, so that the whole has none: a slow
/// line is not a dead one.
const BLOCK: u64 = 4 << 20;
/// Time limit of one block: 14 kB/s.
const BLOCK_LIMIT: Duration = Duration::from_secs(300);
/// Time limit of a short command.
const SHORT: Duration = Duration::from_secs(60);

/// Creates a file with mode 0600 unless it exists.
pub(super) async fn make(handle: &Handle<Client>, path: &str) -> Result<(), TransportError> {
    demand(path, exec(handle, &scripts::make(path), &[], SHORT).await?).map(drop)
}

/// Writes bytes into a file at `offset`, a multiple of [`scripts::UNIT`].
pub(super) async fn write_at(
    handle: &Handle<Client>,
    path: &str,
    offset: u64,
    bytes: &[u8],
    clock: &Clock<'_>,
) -> Result<(), TransportError> {
    demand(path, feed(handle, &scripts::write_at(path, offset), bytes, clock).await?).map(drop)
}

/// Writes a few bytes into the new file `part`, then sets `mode`.
pub(super) async fn write_new(
    handle: &Handle<Client>,
    part: &str,
    mode: u32,
    bytes: &[u8],
) -> Result<(), TransportError> {
    let file = quote(part);
    // A shell that is killed mid-stream may still report success, so the script checks the length.
    let script = format!(
        "umask 077; set -C; cat > {file} && [ $(wc -c < {file}) -eq {} ] && chmod {mode:o} {file}",
        bytes.len()
    );
    demand(part, exec(handle, &in_sh(&script), bytes, BLOCK_LIMIT).await?).map(drop)
}

/// Renames over an existing file, but not into a folder of that name.
pub(super) async fn rename(handle: &Handle<Client>, from: &str, to: &str) -> Result<(), TransportError> {
    let (from, target) = (quote(from), quote(to));
    let script = format!("if [ -d {target} ]; then echo 'is a folder' >&2; exit 1; fi; mv -f {from} {target}");
    demand(to, exec(handle, &in_sh(&script), &[], SHORT).await?).map(drop)
}

/// Removes a file. Errors are ignored, as is a missing file.
pub(super) async fn remove(handle: &Handle<Client>, path: &str) {
    let _ = exec(handle, &in_sh(&format!("rm -f {}", quote(path))), &[], SHORT).await;
}

/// Reads at most `limit` bytes from `offset`; `None` if the file does not exist. Links are not
/// followed.
pub(super) async fn read(
    handle: &Handle<Client>,
    path: &str,
    offset: u64,
    limit: u64,
) -> Result<Option<Vec<u8>>, TransportError> {
    let out = exec(handle, &scripts::read(path, offset, limit), &[], BLOCK_LIMIT).await?;
    let Some(mut bytes) = scripts::content(path, out)? else { return Ok(None) };
    bytes.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    Ok(Some(bytes))
}

/// Copies a file of at most `limit` bytes to `out`; `None` if it does not exist.
pub(super) async fn download(
    handle: &Handle<Client>,
    path: &str,
    limit: u64,
    out: &mut (dyn AsyncWrite + Send + Unpin),
) -> Result<Option<u64>, TransportError> {
    let mut copied = 0;
    loop {
        let Some(block) = read(handle, path, copied, BLOCK).await? else { return Ok(None) };
        copied += block.len() as u64;
        if copied > limit {
            return Err(TransportError::new(Kind::Remote, format!("{path}: more than the {limit} bytes we take")));
        }
        let write = out.write_all(&block).await;
        write.map_err(|e| TransportError::new(Kind::Local, format!("writing what comes from {path}: {e}")))?;
        if (block.len() as u64) < BLOCK {
            return Ok(Some(copied));
        }
    }
}

/// Finds why a file could not be written: SFTP has no status for a full disk, a shell's error
/// names it.
pub(super) async fn explain(handle: &Handle<Client>, part: &str, error: TransportError) -> TransportError {
    if error.kind == Kind::NoSpace {
        return error;
    }
    let file = quote(&format!("{part}.probe"));
    let probe = format!("dd if=/dev/zero of={file} bs=65536 count=16; told=$?; rm -f {file}; exit $told");
    match exec(handle, &in_sh(&probe), &[], SHORT).await {
        Ok(out) => match demand(part, out) {
            Err(told) if told.kind == Kind::NoSpace => told,
            _ => error,
        },
        Err(_) => error,
    }
}
