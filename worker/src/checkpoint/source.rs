//! Sources of weights: a checkpoint's files, its tensors by name, and byte ranges of them.
//!
//! All other modules use [`WeightSource`]. It reads byte ranges of tensors, so that one expert of
//! a stacked tensor, or one block of rows, is read alone.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use outliers_protocol::{FileBytes, WeightVerification};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde_json::Value;
use sha2::{Digest, Sha256};

mod layout;
mod strided;
mod synthetic;

pub(crate) use layout::{ADDED_TOKENS_FILE, Location, SPECIAL_TOKENS_FILE, TOKENIZER_SETTINGS, WeightFiles};
pub use layout::{
    CONFIG_FILE, Container, INDEX_FILE, SINGLE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, TokenizerFiles, WeightMap,
};
pub use synthetic::SyntheticSource;

use crate::checkpoint::placeholder;
use crate::checkpoint::safetensors::{HeaderTensor, StoredDtype, shown};
use crate::error::{IoContext, Result, WorkerError, listed, printable};
use crate::files::{self, open_regular};

/// Maximum bytes of a configuration or index file. The largest published index (Kimi-K2) has 10
/// MB.
pub(crate) const MAX_JSON_BYTES: u64 = 256 << 20;
/// Maximum characters of a note in the log.
const LONGEST_NOTE: usize = 2000;
/// Bytes that a thread reads at a time.
const READ_AT_ONCE: usize = 512 << 10;
/// Maximum threads that read at the same time. One copies from the page cache at less than a fifth
/// of the rate at which a GPU takes weights.
const READERS: usize = 8;

/// One stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Name in the file.
    pub name: String,
    /// Stored type.
    pub dtype: StoredDtype,
    /// Dimensions, outermost first; empty for a scalar.
    pub shape: Vec<u64>,
    /// Index into [`WeightSource::files`].
    pub file: usize,
    /// Number of values between indices, per dimension, if they are not contiguous in row-major
    /// order.
    pub strides: Option<Vec<u64>>,
    /// First byte, counted from the start of the file.
    pub offset: u64,
    /// Bytes of its values in row-major order, contiguous in the file or not.
    pub len: u64,
}

impl TensorEntry {
    /// Whether both are the same bytes of the same file.
    pub fn shares_bytes(&self, other: &Self) -> bool {
        (self.file, self.offset, self.len) == (other.file, other.offset, other.len)
    }
}

/// All tensors of a checkpoint by name, with their files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TensorIndex {
    entries: BTreeMap<String, TensorEntry>,
    files: Vec<FileBytes>,
    notes: Vec<String>,
}

/// A tensor in two files.
struct DuplicateTensor {
    name: String,
    /// Both file indices.
    files: [usize; 2],
}

impl TensorIndex {
    /// Combines the checked headers of all weight files, and checks them against the index if
    /// there is one. If a tensor is in several files, the last counts, as in transformers.
    ///
    /// # Errors
    /// Kind `Checkpoint`: a tensor of the index that no file contains, or one in two files without
    /// an index entry.
    pub fn assemble(shards: Vec<(FileBytes, Vec<HeaderTensor>)>, weight_map: Option<&WeightMap>) -> Result<Self> {
        let mut index = Self::default();
        let mut twice = Vec::new();
        for (file, tensors) in shards {
            index.add(file, tensors, &mut twice);
        }
        twice.retain(|DuplicateTensor { name, .. }| weight_map.is_none_or(|map| map.file_of(name).is_none()));
        index.refuse_twice(&twice)?;
        if let Some(map) = weight_map {
            index.check_against(map)?;
        }
        Ok(index)
    }

    /// As [`assemble`](Self::assemble) for the chosen files, with notes on the choice.
    pub(crate) fn of(weights: &WeightFiles, shards: Vec<(FileBytes, Vec<HeaderTensor>)>) -> Result<Self> {
        let mut index = Self::assemble(shards, weights.map.as_ref())?;
        index.notes.extend_from_slice(&weights.notes);
        Ok(index)
    }

    fn add(&mut self, file: FileBytes, tensors: Vec<HeaderTensor>, twice: &mut Vec<DuplicateTensor>) {
        let number = self.files.len();
        for HeaderTensor { name, dtype, shape, strides, offset, len } in tensors {
            let entry = TensorEntry { name: name.clone(), dtype, shape, strides, file: number, offset, len };
            if let Some(other) = self.entries.insert(name, entry) {
                twice.push(DuplicateTensor { name: other.name, files: [other.file, number] });
            }
        }
        self.files.push(file);
    }

    fn refuse_twice(&self, twice: &[DuplicateTensor]) -> Result<()> {
        if twice.is_empty() {
            return Ok(());
        }
        let named = |DuplicateTensor { name, files: [a, b] }: &DuplicateTensor| {
            format!("{} ({} and {})", shown(name), self.files[*a].name, self.files[*b].name)
        };
        let message = format!("two files hold tensors of the same name: {}", listed(twice.iter().map(named)));
        Err(WorkerError::checkpoint(message).hint("remove the file that does not belong there"))
    }

    /// Checks that every tensor of the index exists. Additional tensors are allowed and usable by
    /// name.
    fn check_against(&mut self, map: &WeightMap) -> Result<()> {
        let (index, mut missing, mut elsewhere) = (map.index_file(), Vec::new(), Vec::new());
        for (name, file) in map.tensors() {
            match self.entries.get(name).map(|entry| self.files[entry.file].name.as_str()) {
                None => missing.push(format!("{} ({file})", shown(name))),
                Some(found) if found != file => elsewhere.push(format!("{} ({found}, not {file})", shown(name))),
                Some(_) => {}
            }
        }
        if !missing.is_empty() {
            let message = format!("{index} names tensors that its files do not hold: {}", listed(missing));
            return Err(
                WorkerError::checkpoint(message).hint("index and files are of different versions: fetch both again")
            );
        }
        if !elsewhere.is_empty() {
            let elsewhere = listed(elsewhere);
            self.notes.push(format!(
                "tensors are read from other files than {index} says, as transformers does: {elsewhere}"
            ));
        }
        Ok(())
    }
}

/// Bytes of a file that a pass will read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedRead {
    /// Index into [`WeightSource::files`].
    pub file: usize,
    /// Byte range from the start of the file.
    pub bytes: Range<u64>,
    /// Layer index: small tensors may be fetched together with others of their layer.
    pub layer: usize,
    /// Index of the streaming unit: large tensors may be fetched together with others of their
    /// unit.
    pub unit: usize,
}

/// Reads bytes of tensors. Implementations count the bytes, since each weight byte should be read
/// once per run.
pub trait WeightSource: Send + Sync {
    /// All tensors and files.
    fn index(&self) -> &TensorIndex;

    /// Fills `into` with the bytes `range` of the tensor, relative to its first byte,
    /// little-endian as stored.
    ///
    /// # Errors
    /// Kind `Internal` if the range is outside the tensor, differs in length from `into`, or
    /// splits a value of a tensor with strides; else errors of the source.
    fn read(&self, entry: &TensorEntry, range: Range<u64>, into: &mut [u8]) -> Result<()>;

    /// Whether parts of a tensor may be read as quickly as all of it. If not, those ranges have to
    /// be read that were announced.
    fn reads_parts(&self, _entry: &TensorEntry) -> bool {
        false
    }

    /// Announces what will be read, in order, so that a remote source can prefetch it. Other reads
    /// remain possible. Up to `hash_memory` bytes may be held until their file is hashed up to
    /// them.
    fn announce(&self, _order: &[PlannedRead], _hash_memory: u64) {}

    /// Names of the files whose bytes were completely read and match the hub's hash.
    fn verified(&self) -> Vec<String> {
        Vec::new()
    }

    /// Whether a file's hash differs from the hub's.
    fn is_damaged(&self) -> bool {
        false
    }

    /// Waits for the hashes of all announced bytes. `None`: there are no files.
    ///
    /// # Errors
    /// Kind `Checkpoint`: a file's hash differs from the hub's.
    fn verify(&self) -> Result<Option<WeightVerification>> {
        Ok(None)
    }

    /// Weight bytes read so far, repeated reads included.
    fn bytes_read(&self) -> u64;

    /// The tensor with this name.
    fn entry(&self, name: &str) -> Option<&TensorEntry> {
        self.index().entries.get(name)
    }

    /// Names of all tensors, ascending.
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.index().entries.keys().map(String::as_str))
    }

    /// The weight files with their sizes.
    fn files(&self) -> &[FileBytes] {
        &self.index().files
    }

    /// Notes on the choice of these weights, for readers of the results.
    fn notes(&self) -> &[String] {
        &self.index().notes
    }
}

/// Checks the contract of [`WeightSource::read`] for its implementations.
pub(crate) fn check_range(entry: &TensorEntry, range: &Range<u64>, into: &[u8]) -> Result<()> {
    let fits = range.start <= range.end && range.end <= entry.len && range.end - range.start == into.len() as u64;
    let (name, len, room) = (&entry.name, entry.len, into.len());
    let wrong = || WorkerError::internal(format!("bytes {range:?} of {} ({len} bytes) into {room} bytes", shown(name)));
    if fits { Ok(()) } else { Err(wrong()) }
}

/// Weight files in a folder, read with positioned reads from open files.
pub struct LocalSource {
    index: TensorIndex,
    folder: PathBuf,
    files: Vec<File>,
    verification: WeightVerification,
    read: AtomicU64,
    /// Threads that only read: those that compute must not wait for a slow disk. `None` if the
    /// system gives none.
    readers: OnceLock<Option<ThreadPool>>,
}

impl LocalSource {
    /// Opens the weight files of `folder` and checks their headers and the index. The set of files
    /// is the one that transformers reads; other files are ignored.
    ///
    /// # Errors
    /// Kind `Checkpoint` or `Storage` for the content of the folder.
    pub fn open(folder: &Path) -> Result<Self> {
        let weights = weight_files(folder)?;
        let mut verification = WeightVerification::default();
        verification.leave_out("a folder lists no hashes", weights.names.clone());
        Self::open_files(folder, &weights, verification)
    }

    /// As [`open`](Self::open) for chosen files that have been verified.
    pub(crate) fn open_files(folder: &Path, weights: &WeightFiles, verification: WeightVerification) -> Result<Self> {
        let mut shards = Vec::with_capacity(weights.names.len());
        let mut files = Vec::with_capacity(weights.names.len());
        for name in &weights.names {
            let path = folder.join(name);
            let file = open_regular(&path).at("open", &path)?;
            let bytes = file.metadata().at("read the size of", &path)?.len();
            shards.push((FileBytes { name: name.clone(), bytes }, weights.container.read_tensors(&path)?));
            files.push(file);
        }
        let index = TensorIndex::of(weights, shards).map_err(|e| e.context(folder.display()))?;
        let (folder, read, readers) = (folder.to_owned(), AtomicU64::new(0), OnceLock::new());
        Ok(Self { index, folder, files, verification, read, readers })
    }

    fn readers(&self) -> Option<&ThreadPool> {
        let threads = || std::thread::available_parallelism().map_or(1, usize::from).min(READERS);
        let make = || ThreadPoolBuilder::new().num_threads(threads()).build().ok();
        self.readers.get_or_init(make).as_ref()
    }

    /// Fills `into` from a file, with several threads if it is long.
    fn read_at(&self, file: usize, offset: u64, into: &mut [u8]) -> Result<()> {
        let path = || self.folder.join(&self.index.files[file].name);
        let open = &self.files[file];
        let readers = if into.len() > READ_AT_ONCE { self.readers() } else { None };
        let read = match readers {
            None => open.read_exact_at(into, offset),
            Some(readers) => readers.install(|| {
                let parts = into.par_chunks_mut(READ_AT_ONCE).enumerate();
                parts.try_for_each(|(part, into)| open.read_exact_at(into, offset + (part * READ_AT_ONCE) as u64))
            }),
        };
        read.map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                let message = format!("{} became shorter while it was read", path().display());
                WorkerError::checkpoint(message).hint("something else is writing to that folder")
            }
            _ => WorkerError::io("read", path(), &error),
        })
    }
}

impl WeightSource for LocalSource {
    fn index(&self) -> &TensorIndex {
        &self.index
    }

    fn verify(&self) -> Result<Option<WeightVerification>> {
        Ok(Some(self.verification.clone()))
    }

    fn read(&self, entry: &TensorEntry, range: Range<u64>, into: &mut [u8]) -> Result<()> {
        check_range(entry, &range, into)?;
        match &entry.strides {
            None => self.read_at(entry.file, entry.offset + range.start, into)?,
            Some(strides) => {
                let read = |offset, into: &mut [u8]| self.read_at(entry.file, offset, into);
                strided::gather(entry, strides, range, into, &read)?;
            }
        }
        self.read.fetch_add(into.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn reads_parts(&self, entry: &TensorEntry) -> bool {
        entry.strides.is_none()
    }

    fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }
}

/// Whether `name` denotes a file directly in a folder: no separators, no `.` or `..`, no invisible
/// characters.
pub fn is_plain_name(name: &str) -> bool {
    let visible = !name.chars().any(|c| c.is_control() || matches!(c, '/' | '\\'));
    visible && !matches!(name, "" | "." | "..") && name.len() <= 255
}

pub(crate) fn bad_json(file: &str, error: &serde_json::Error) -> WorkerError {
    let detail: String = error.to_string().chars().filter(|c| !c.is_control()).take(300).collect();
    WorkerError::checkpoint(format!("{file} is not what it should be: {detail}"))
        .hint("the file is damaged: fetch it again")
}

/// The files of a model except its weights.
pub struct ModelFiles {
    folder: PathBuf,
    revision: Option<String>,
    config: Value,
    config_sha256: String,
}

impl ModelFiles {
    /// Reads the configuration in `folder`, which is `revision` of a hub model.
    ///
    /// # Errors
    /// Kind `Job` if the folder does not exist; `Checkpoint` or `Storage` for its config.json.
    pub fn read(folder: &Path, revision: Option<String>) -> Result<Self> {
        if !folder.is_dir() {
            let message = format!("there is no folder {}", folder.display());
            return Err(
                WorkerError::job(message).hint("`--model` takes a Hugging Face id (owner/name) or an existing folder")
            );
        }
        let (config, config_sha256) = read_config(folder)?;
        Ok(Self { folder: folder.to_owned(), revision, config, config_sha256 })
    }

    /// The content of config.json.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The model with these weights. Notes on their choice are logged as warnings.
    pub fn with(self, weights: impl WeightSource + 'static) -> Checkpoint {
        for note in weights.notes() {
            tracing::warn!("{}", printable(note, LONGEST_NOTE));
        }
        let Self { folder, revision, config, config_sha256 } = self;
        Checkpoint { folder, revision, config, config_sha256, weights: Arc::new(weights) }
    }
}

/// A model's files, without its weights in memory.
#[derive(Clone)]
pub struct Checkpoint {
    /// Folder of configuration and tokenizer.
    pub folder: PathBuf,
    /// Commit on the hub; `None` for a folder.
    pub revision: Option<String>,
    /// The content of config.json.
    pub config: Value,
    /// SHA-256 of config.json, lower-case hexadecimal.
    pub config_sha256: String,
    /// The tensors.
    pub weights: Arc<dyn WeightSource>,
}

impl Checkpoint {
    /// Opens a folder with config.json and weights.
    ///
    /// # Errors
    /// As [`ModelFiles::read`] and [`LocalSource::open`].
    pub fn open_folder(folder: &Path) -> Result<Self> {
        Ok(ModelFiles::read(folder, None)?.with(LocalSource::open(folder)?))
    }

    /// The other files that are used, with their sizes: configuration, tokenizer and index, as far
    /// as they exist.
    pub fn description(&self) -> Vec<FileBytes> {
        let tokenizer = self.tokenizer().map_or(&[][..], TokenizerFiles::names);
        let is_read = |name: &String| {
            let name = name.as_str();
            let known = tokenizer.contains(&name) || TOKENIZER_SETTINGS.contains(&name);
            known || name == CONFIG_FILE || name.ends_with(".index.json")
        };
        let sized = |entry: io::Result<std::fs::DirEntry>| {
            let entry = entry.ok()?;
            let name = entry.file_name().into_string().ok().filter(is_read)?;
            // In a cache the entry is a link to the file.
            let file = std::fs::metadata(entry.path()).ok().filter(std::fs::Metadata::is_file)?;
            Some(FileBytes { name, bytes: file.len() })
        };
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten();
        let mut files: Vec<FileBytes> = entries.filter_map(sized).collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        files
    }

    /// The tokenizer files to use, if the checkpoint has supported ones.
    pub fn tokenizer(&self) -> Option<TokenizerFiles> {
        TokenizerFiles::choose(|name| self.folder.join(name).exists())
    }
}

/// config.json and its SHA-256.
fn read_config(folder: &Path) -> Result<(Value, String)> {
    let Some(bytes) = read_small(&folder.join(CONFIG_FILE))? else {
        let message = format!("{} has no {CONFIG_FILE}", folder.display());
        return Err(WorkerError::checkpoint(message).hint("name the folder that holds config.json and the weights"));
    };
    let config: Value = serde_json::from_slice(&bytes).map_err(|e| bad_json(CONFIG_FILE, &e))?;
    if !config.is_object() {
        return Err(WorkerError::checkpoint(format!("{CONFIG_FILE} is not a JSON object")));
    }
    Ok((config, format!("{:x}", Sha256::digest(&bytes))))
}

/// The weight files of a folder.
fn weight_files(folder: &Path) -> Result<WeightFiles> {
    refuse_distributed(folder)?;
    let has = |name: &str| folder.join(name).exists();
    let read = |name: &str| Ok(read_small(&folder.join(name))?.unwrap_or_default());
    WeightFiles::find(&Location { name: &folder.display(), has: &has, read: &read })
}

/// Refuses files with the slices of several processes, which transformers would read before all
/// others.
fn refuse_distributed(folder: &Path) -> Result<()> {
    let entries = std::fs::read_dir(folder).at("list", folder)?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let Some(name) = names.filter(|name| layout::is_distributed(name)).min() else { return Ok(()) };
    let message =
        format!("{} holds a distributed checkpoint ({name}), of which the tensors are in slices", folder.display());
    let hint = "save it whole (save_pretrained), or take those files away if the weights beside them are the ones that are meant";
    Err(WorkerError::unsupported(message).hint(hint))
}

/// Reads a JSON or tokenizer file of limited size; `None` if it does not exist.
pub(crate) fn read_small(path: &Path) -> Result<Option<Vec<u8>>> {
    let metadata = match path.metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        metadata => metadata.at("read", path)?,
    };
    if !metadata.is_file() {
        return Err(WorkerError::checkpoint(format!("{} is not a regular file", path.display())));
    }
    let bytes = metadata.len();
    if bytes > MAX_JSON_BYTES {
        let message = format!("{} has {bytes} bytes, over the limit of {MAX_JSON_BYTES}", path.display());
        return Err(WorkerError::checkpoint(message));
    }
    let bytes = files::read_small(path, MAX_JSON_BYTES).at("read", path)?;
    placeholder::refuse(&bytes).map_err(|error| error.context(path.display()))?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests;
