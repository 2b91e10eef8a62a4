//! The SFTP subsystem of an instance: version 3 with the OpenSSH extensions a client of ours may ask for.
//!
//! Whoever logs in may do what the user may do: paths are not confined to the home folder, relative ones start there.

use std::collections::HashMap;
use std::fs::{self, File, FileTimes, Metadata, OpenOptions, Permissions, ReadDir};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use russh::Channel;
use russh::server::Msg;
use russh_sftp::protocol::{
    Attrs, Data, ExtendedReply, File as Entry, FileAttributes, Handle, Name, OpenFlags, Packet, Status, StatusCode,
    Version,
};
use russh_sftp::server::StatusReply;
use tokio::sync::watch;

use super::command::{carry, pump};

/// Largest read or write of one request, as OpenSSH has it.
const MAX_IO: u32 = 255 << 10;
/// Largest packet, with room for the header of a largest write.
const MAX_PACKET: u32 = 256 << 10;
/// Open files and folders of one channel.
const MAX_HANDLES: usize = 256;
/// Entries of one answer to `readdir`.
const BATCH: usize = 100;
/// Bytes under way between the channel and the server.
const BUFFER: usize = 1 << 20;

/// Serves SFTP over `channel` until either side is done with it.
pub(super) async fn serve(home: PathBuf, channel: Channel<Msg>, closed: watch::Receiver<()>) {
    // Between the two lies a pipe of our own: the library's server would wait for ever for a window that a client which
    // went away will not open again.
    let (ours, theirs) = tokio::io::duplex(BUFFER);
    let config = russh_sftp::server::Config { max_client_packet_len: MAX_PACKET };
    russh_sftp::server::run_with_config(theirs, Server::new(home), config).await;
    let (answers, requests) = tokio::io::split(ours);
    let (input, output) = channel.split();
    carry(input, requests, pump(answers, &output, None), closed, |_| {}).await;
    // Refused only when the connection is gone, and then there is nobody to tell.
    let _ = output.exit_status(0).await;
    let _ = output.eof().await;
    let _ = output.close().await;
}

/// Something a client opened.
#[derive(Clone, Debug)]
enum Opened {
    File(Arc<File>),
    /// Opened to append: the offsets of writes do not count.
    Log(Arc<File>),
    Folder(Arc<Mutex<Listing>>),
}

#[derive(Debug)]
struct Listing {
    /// `.` and `..`, which the system's listing leaves out.
    dots: Vec<(String, PathBuf)>,
    rest: ReadDir,
}

/// One SFTP channel.
struct Server {
    home: PathBuf,
    opened: HashMap<String, Opened>,
    next: u64,
}

type Reply<T> = Result<T, StatusReply>;

impl Server {
    fn new(home: PathBuf) -> Self {
        Self { home, opened: HashMap::new(), next: 0 }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.join(name)
    }

    fn keep(&mut self, id: u32, opened: Opened) -> Reply<Handle> {
        if self.opened.len() >= MAX_HANDLES {
            return Err(StatusCode::Failure.with_message("too many open files"));
        }
        self.next += 1;
        let handle = self.next.to_string();
        self.opened.insert(handle.clone(), opened);
        Ok(Handle { id, handle })
    }

    fn file(&self, handle: &str) -> Reply<Arc<File>> {
        match self.opened.get(handle) {
            Some(Opened::File(file) | Opened::Log(file)) => Ok(Arc::clone(file)),
            _ => Err(StatusCode::Failure.with_message("no such open file")),
        }
    }
}

/// Runs file system work where it may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Reply<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(|error| refusal(&error)),
        Err(error) => Err(StatusCode::Failure.with_message(error.to_string())),
    }
}

fn refusal(error: &io::Error) -> StatusReply {
    let code = match error.kind() {
        io::ErrorKind::NotFound => StatusCode::NoSuchFile,
        io::ErrorKind::PermissionDenied => StatusCode::PermissionDenied,
        io::ErrorKind::UnexpectedEof => StatusCode::Eof,
        io::ErrorKind::Unsupported => StatusCode::OpUnsupported,
        _ => StatusCode::Failure,
    };
    code.with_message(error.to_string())
}

async fn done(id: u32, work: impl FnOnce() -> io::Result<()> + Send + 'static) -> Reply<Status> {
    blocking(work).await?;
    Ok(Status { id, status_code: StatusCode::Ok, error_message: "Ok".to_owned(), language_tag: "en-US".to_owned() })
}

fn attributes(metadata: &Metadata) -> FileAttributes {
    // Version 3 has 32 bits for a time.
    let seconds = |time: i64| u32::try_from(time).unwrap_or_default();
    FileAttributes {
        size: Some(metadata.len()),
        uid: Some(metadata.uid()),
        gid: Some(metadata.gid()),
        permissions: Some(metadata.mode()),
        atime: Some(seconds(metadata.atime())),
        mtime: Some(seconds(metadata.mtime())),
        ..FileAttributes::default()
    }
}

fn apply(file: &File, attrs: &FileAttributes) -> io::Result<()> {
    if let Some(size) = attrs.size {
        file.set_len(size)?;
    }
    if let (Some(atime), Some(mtime)) = (attrs.atime, attrs.mtime) {
        let time = |seconds: u32| UNIX_EPOCH + Duration::from_secs(seconds.into());
        file.set_times(FileTimes::new().set_accessed(time(atime)).set_modified(time(mtime)))?;
    }
    if let Some(mode) = attrs.permissions {
        file.set_permissions(Permissions::from_mode(mode & 0o7777))?;
    }
    if attrs.uid.is_some() || attrs.gid.is_some() {
        std::os::unix::fs::fchown(file, attrs.uid, attrs.gid)?;
    }
    Ok(())
}

fn apply_to_path(path: &Path, attrs: &FileAttributes) -> io::Result<()> {
    // Only a size needs write permission on the content, and some files may not be opened at all.
    if attrs.size.is_none() && attrs.atime.is_none() {
        if let Some(mode) = attrs.permissions {
            fs::set_permissions(path, Permissions::from_mode(mode & 0o7777))?;
        }
        if attrs.uid.is_some() || attrs.gid.is_some() {
            std::os::unix::fs::chown(path, attrs.uid, attrs.gid)?;
        }
        return Ok(());
    }
    apply(&OpenOptions::new().read(attrs.size.is_none()).write(attrs.size.is_some()).open(path)?, attrs)
}

fn read_at(file: &File, offset: u64, len: u32) -> io::Result<Vec<u8>> {
    let mut data = vec![0; len.min(MAX_IO) as usize];
    let mut filled = 0;
    while filled < data.len() {
        match file.read_at(&mut data[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    if filled == 0 && len > 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "end of file"));
    }
    data.truncate(filled);
    Ok(data)
}

fn list(path: &Path) -> io::Result<Listing> {
    let dots = vec![("..".to_owned(), path.join("..")), (".".to_owned(), path.to_owned())];
    Ok(Listing { dots, rest: fs::read_dir(path)? })
}

fn next_batch(listing: &Mutex<Listing>) -> io::Result<Vec<Entry>> {
    let mut listing = listing.lock().unwrap_or_else(PoisonError::into_inner);
    let mut entries = Vec::new();
    while let Some((name, path)) = listing.dots.pop() {
        entries.push(Entry::new(name, attributes(&fs::symlink_metadata(path)?)));
    }
    while entries.len() < BATCH {
        let Some(entry) = listing.rest.next() else { break };
        let entry = entry?;
        // One that vanished meanwhile is not in the folder any more.
        if let Ok(metadata) = entry.metadata() {
            entries.push(Entry::new(entry.file_name().to_string_lossy(), attributes(&metadata)));
        }
    }
    if entries.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "end of folder"));
    }
    Ok(entries)
}

/// The absolute path without links; its last parts need not exist.
fn real_path(path: &Path) -> io::Result<PathBuf> {
    match path.canonicalize() {
        Ok(real) => Ok(real),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let missing = path.components().next_back();
            match (path.parent(), missing) {
                (Some(parent), Some(Component::Normal(name))) => Ok(real_path(parent)?.join(name)),
                (Some(parent), Some(Component::ParentDir)) => {
                    let mut real = real_path(parent)?;
                    real.pop();
                    Ok(real)
                }
                _ => Err(error),
            }
        }
        Err(error) => Err(error),
    }
}

fn name_only(id: u32, path: &Path) -> Name {
    Name { id, files: vec![Entry::dummy(path.to_string_lossy())] }
}

/// Length-prefixed strings, as the data of an extended request holds them.
fn strings(mut data: &[u8]) -> Reply<Vec<String>> {
    let malformed = || StatusCode::BadMessage.with_message("malformed extended request");
    let mut found = Vec::new();
    while !data.is_empty() {
        let (length, rest) = data.split_first_chunk::<4>().ok_or_else(malformed)?;
        let (text, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize).ok_or_else(malformed)?;
        found.push(String::from_utf8(text.to_vec()).map_err(|_| malformed())?);
        data = rest;
    }
    Ok(found)
}

fn numbers(id: u32, numbers: &[u64]) -> Packet {
    Packet::ExtendedReply(ExtendedReply { id, data: numbers.iter().flat_map(|n| n.to_be_bytes()).collect() })
}

fn file_system(path: &Path) -> io::Result<Vec<u64>> {
    let s = rustix::fs::statvfs(path)?;
    Ok(vec![
        s.f_bsize,
        s.f_frsize,
        s.f_blocks,
        s.f_bfree,
        s.f_bavail,
        s.f_files,
        s.f_ffree,
        s.f_favail,
        s.f_fsid,
        0,
        s.f_namemax,
    ])
}

impl russh_sftp::server::Handler for Server {
    type Error = StatusReply;

    fn unimplemented(&self) -> Self::Error {
        StatusReply::new(StatusCode::OpUnsupported)
    }

    async fn init(&mut self, _version: u32, _extensions: HashMap<String, String>) -> Reply<Version> {
        let known = [
            ("posix-rename@openssh.com", "1"),
            ("fsync@openssh.com", "1"),
            ("statvfs@openssh.com", "2"),
            ("limits@openssh.com", "1"),
        ];
        let extensions = known.map(|(name, version)| (name.to_owned(), version.to_owned())).into();
        Ok(Version { extensions, ..Version::new() })
    }

    async fn open(&mut self, id: u32, filename: String, flags: OpenFlags, attrs: FileAttributes) -> Reply<Handle> {
        let path = self.path(&filename);
        let mode = attrs.permissions.unwrap_or(0o666) & 0o7777;
        let file = blocking(move || OpenOptions::from(flags).mode(mode).open(path)).await?;
        let file = Arc::new(file);
        self.keep(id, if flags.contains(OpenFlags::APPEND) { Opened::Log(file) } else { Opened::File(file) })
    }

    async fn close(&mut self, id: u32, handle: String) -> Reply<Status> {
        let opened =
            self.opened.remove(&handle).ok_or_else(|| StatusCode::Failure.with_message("no such open file"))?;
        done(id, move || {
            drop(opened);
            Ok(())
        })
        .await
    }

    async fn read(&mut self, id: u32, handle: String, offset: u64, len: u32) -> Reply<Data> {
        let file = self.file(&handle)?;
        Ok(Data { id, data: blocking(move || read_at(&file, offset, len)).await? })
    }

    async fn write(&mut self, id: u32, handle: String, offset: u64, data: Vec<u8>) -> Reply<Status> {
        let file = self.file(&handle)?;
        let append = matches!(self.opened.get(&handle), Some(Opened::Log(_)));
        done(id, move || if append { (&*file).write_all(&data) } else { file.write_all_at(&data, offset) }).await
    }

    async fn lstat(&mut self, id: u32, path: String) -> Reply<Attrs> {
        let path = self.path(&path);
        Ok(Attrs { id, attrs: attributes(&blocking(move || fs::symlink_metadata(path)).await?) })
    }

    async fn stat(&mut self, id: u32, path: String) -> Reply<Attrs> {
        let path = self.path(&path);
        Ok(Attrs { id, attrs: attributes(&blocking(move || fs::metadata(path)).await?) })
    }

    async fn fstat(&mut self, id: u32, handle: String) -> Reply<Attrs> {
        let file = self.file(&handle)?;
        Ok(Attrs { id, attrs: attributes(&blocking(move || file.metadata()).await?) })
    }

    async fn setstat(&mut self, id: u32, path: String, attrs: FileAttributes) -> Reply<Status> {
        let path = self.path(&path);
        done(id, move || apply_to_path(&path, &attrs)).await
    }

    async fn fsetstat(&mut self, id: u32, handle: String, attrs: FileAttributes) -> Reply<Status> {
        let file = self.file(&handle)?;
        done(id, move || apply(&file, &attrs)).await
    }

    async fn opendir(&mut self, id: u32, path: String) -> Reply<Handle> {
        let path = self.path(&path);
        let listing = blocking(move || list(&path)).await?;
        self.keep(id, Opened::Folder(Arc::new(Mutex::new(listing))))
    }

    async fn readdir(&mut self, id: u32, handle: String) -> Reply<Name> {
        let Some(Opened::Folder(listing)) = self.opened.get(&handle).cloned() else {
            return Err(StatusCode::Failure.with_message("no such open folder"));
        };
        Ok(Name { id, files: blocking(move || next_batch(&listing)).await? })
    }

    async fn remove(&mut self, id: u32, filename: String) -> Reply<Status> {
        let path = self.path(&filename);
        done(id, move || fs::remove_file(path)).await
    }

    async fn mkdir(&mut self, id: u32, path: String, attrs: FileAttributes) -> Reply<Status> {
        let path = self.path(&path);
        let mode = attrs.permissions.unwrap_or(0o777) & 0o7777;
        done(id, move || fs::DirBuilder::new().mode(mode).create(path)).await
    }

    async fn rmdir(&mut self, id: u32, path: String) -> Reply<Status> {
        let path = self.path(&path);
        done(id, move || fs::remove_dir(path)).await
    }

    async fn realpath(&mut self, id: u32, path: String) -> Reply<Name> {
        let path = self.path(&path);
        Ok(name_only(id, &blocking(move || real_path(&path)).await?))
    }

    async fn rename(&mut self, id: u32, oldpath: String, newpath: String) -> Reply<Status> {
        let (old, new) = (self.path(&oldpath), self.path(&newpath));
        done(id, move || fs::rename(old, new)).await
    }

    async fn readlink(&mut self, id: u32, path: String) -> Reply<Name> {
        let path = self.path(&path);
        Ok(name_only(id, &blocking(move || fs::read_link(path)).await?))
    }

    /// OpenSSH sends the two paths the other way round than the draft names them, and everybody follows OpenSSH.
    async fn symlink(&mut self, id: u32, linkpath: String, targetpath: String) -> Reply<Status> {
        let (target, link) = (linkpath, self.path(&targetpath));
        done(id, move || std::os::unix::fs::symlink(target, link)).await
    }

    async fn extended(&mut self, id: u32, request: String, data: Vec<u8>) -> Reply<Packet> {
        let arguments = strings(&data)?;
        match (request.as_str(), &arguments[..]) {
            ("posix-rename@openssh.com", [old, new]) => Ok(self.rename(id, old.clone(), new.clone()).await?.into()),
            ("fsync@openssh.com", [handle]) => {
                let file = self.file(handle)?;
                Ok(done(id, move || file.sync_all()).await?.into())
            }
            ("statvfs@openssh.com", [path]) => {
                let path = self.path(path);
                Ok(numbers(id, &blocking(move || file_system(&path)).await?))
            }
            ("limits@openssh.com", []) => {
                Ok(numbers(id, &[MAX_PACKET.into(), MAX_IO.into(), MAX_IO.into(), MAX_HANDLES as u64]))
            }
            _ => Err(self.unimplemented()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_of_an_extended_request() {
        assert_eq!(strings(b"\0\0\0\x01a\0\0\0\x02bc").unwrap(), ["a", "bc"]);
        assert!(strings(b"").unwrap().is_empty());
        for bad in [&b"\0\0\0"[..], b"\0\0\0\x05a", b"\xff\xff\xff\xffa", b"\0\0\0\x01\xff"] {
            assert!(strings(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn real_paths_of_things_to_come() {
        let root = tempfile::tempdir().unwrap();
        let real = root.path().canonicalize().unwrap();
        fs::create_dir(real.join("a")).unwrap();
        std::os::unix::fs::symlink("a", real.join("link")).unwrap();
        assert_eq!(real_path(&real.join("link/new/file")).unwrap(), real.join("a/new/file"));
        assert_eq!(real_path(&real.join("a/../new/../x")).unwrap(), real.join("x"));
        assert_eq!(real_path(&real.join(".")).unwrap(), real);
    }
}
