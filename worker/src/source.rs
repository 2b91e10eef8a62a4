//! Where weights come from: a checkpoint's files, its tensors by name, and byte ranges of them on request.
//!
//! Everything downstream sees [`WeightSource`]: the unit of reading is a byte range of one tensor, so that one expert
//! of a stacked tensor, or one block of rows, can be asked for without its neighbours.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use outliers_protocol::FileBytes;
use serde_json::Value;
use sha2::{Digest, Sha256};

mod layout;
mod synthetic;

pub(crate) use layout::{ADDED_TOKENS_FILE, SPECIAL_TOKENS_FILE, TOKENIZER_SETTINGS, WeightFiles, no_weights};
pub use layout::{
    CONFIG_FILE, Container, INDEX_FILE, SINGLE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, TokenizerFiles, WeightMap,
};
pub use synthetic::SyntheticSource;

use crate::error::{IoContext, Result, WorkerError};
use crate::safetensors::{HeaderTensor, StoredDtype, shown};

/// Longest configuration or index file accepted, bytes; the largest published index (Kimi-K2) has 10 MB.
pub(crate) const MAX_JSON_BYTES: u64 = 256 << 20;

/// One stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Name.
    pub name: String,
    /// Stored type.
    pub dtype: StoredDtype,
    /// Dimensions, outermost first; empty for a scalar.
    pub shape: Vec<u64>,
    /// Index into [`WeightSource::files`].
    pub file: usize,
    /// First byte, counted from the start of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// All tensors of a checkpoint by name, and the files they are in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TensorIndex {
    entries: BTreeMap<String, TensorEntry>,
    files: Vec<FileBytes>,
}

impl TensorIndex {
    /// Puts the checked headers of all weight files together, and against the index where there is one.
    ///
    /// # Errors
    /// Kind `Checkpoint`: a tensor in two files, or one that the index puts where it is not.
    pub fn assemble(shards: Vec<(FileBytes, Vec<HeaderTensor>)>, weight_map: Option<&WeightMap>) -> Result<Self> {
        let mut index = Self::default();
        for (file, tensors) in shards {
            index.add(file, tensors)?;
        }
        if let Some(map) = weight_map {
            index.check_against(map)?;
        }
        Ok(index)
    }

    fn add(&mut self, file: FileBytes, tensors: Vec<HeaderTensor>) -> Result<()> {
        let number = self.files.len();
        for tensor in tensors {
            let entry = TensorEntry {
                name: tensor.name.clone(),
                dtype: tensor.dtype,
                shape: tensor.shape,
                file: number,
                offset: tensor.offset,
                len: tensor.len,
            };
            if let Some(other) = self.entries.insert(tensor.name, entry) {
                let (name, first) = (shown(&other.name), &self.files[other.file].name);
                let message = format!("tensor {name} is in two files: {first} and {}", file.name);
                return Err(WorkerError::checkpoint(message).hint("remove the file that does not belong there"));
            }
        }
        self.files.push(file);
        Ok(())
    }

    /// Every tensor the index names must be where it says. Tensors it does not name are no harm: they stay usable by name.
    fn check_against(&self, map: &WeightMap) -> Result<()> {
        let index = map.index_file();
        for (name, file) in map.tensors() {
            let found = self.entries.get(name).map(|entry| self.files[entry.file].name.as_str());
            if found == Some(file) {
                continue;
            }
            let name = shown(name);
            let message = match found {
                None => format!("{index} says that tensor {name} is in {file}, but it is not in that file"),
                Some(other) => format!("{index} says that tensor {name} is in {file}, but it is in {other}"),
            };
            return Err(
                WorkerError::checkpoint(message).hint("index and files are of different versions: fetch both again")
            );
        }
        Ok(())
    }
}

/// Bytes of a file that a pass will read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Index into [`WeightSource::files`].
    pub file: usize,
    /// Counted from the start of the file.
    pub bytes: Range<u64>,
    /// Number of the layer: what is small may be fetched together with the rest of its layer.
    pub layer: usize,
    /// Number of the streaming unit: what is large may be fetched together with the rest of its unit.
    pub unit: usize,
}

/// Gives out the bytes of tensors. Implementations count what they read: each weight byte is to be read once per run.
pub trait WeightSource: Send + Sync {
    /// All tensors and files.
    fn index(&self) -> &TensorIndex;

    /// Fills `into` with the bytes `range` of the tensor, counted from its first byte; little-endian as stored.
    ///
    /// # Errors
    /// Kind `Internal` when the range is not inside the tensor or has another length than `into`; else the source's own.
    fn read(&self, entry: &TensorEntry, range: Range<u64>, into: &mut [u8]) -> Result<()>;

    /// Says what will be read, in that order, so that a source that is far away can begin to bring it. Other reads stay possible.
    fn announce(&self, _order: &[Wanted]) {}

    /// Weight bytes read so far, each counted as often as it was read.
    fn bytes_read(&self) -> u64;

    /// The tensor called `name`.
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
}

/// The contract of [`WeightSource::read`], shared by its implementations.
pub(crate) fn check_range(entry: &TensorEntry, range: &Range<u64>, into: &[u8]) -> Result<()> {
    let fits = range.start <= range.end && range.end <= entry.len && range.end - range.start == into.len() as u64;
    let (name, len, room) = (&entry.name, entry.len, into.len());
    let wrong = || WorkerError::internal(format!("bytes {range:?} of {} ({len} bytes) into {room} bytes", shown(name)));
    if fits { Ok(()) } else { Err(wrong()) }
}

/// Weight files in a folder, read with positioned reads on files kept open.
pub struct LocalSource {
    index: TensorIndex,
    folder: PathBuf,
    files: Vec<File>,
    read: AtomicU64,
}

impl LocalSource {
    /// Opens the weight files of `folder` and checks their headers and the index: one set of files is used ([`Container`] says which),
    /// others that lie beside it are not looked at.
    ///
    /// # Errors
    /// Kind `Checkpoint` or `Storage` for what is in it.
    pub fn open(folder: &Path) -> Result<Self> {
        let weights = weight_files(folder)?;
        let mut shards = Vec::with_capacity(weights.names.len());
        let mut files = Vec::with_capacity(weights.names.len());
        for name in &weights.names {
            let path = folder.join(name);
            let file = open_shard(folder, name, weights.map.as_ref())?;
            let bytes = file.metadata().at("read the size of", &path)?.len();
            shards.push((FileBytes { name: name.clone(), bytes }, weights.container.read_tensors(&path)?));
            files.push(file);
        }
        let index = TensorIndex::assemble(shards, weights.map.as_ref()).map_err(|e| e.context(folder.display()))?;
        Ok(Self { index, folder: folder.to_owned(), files, read: AtomicU64::new(0) })
    }
}

impl WeightSource for LocalSource {
    fn index(&self) -> &TensorIndex {
        &self.index
    }

    fn read(&self, entry: &TensorEntry, range: Range<u64>, into: &mut [u8]) -> Result<()> {
        check_range(entry, &range, into)?;
        let path = || self.folder.join(&self.index.files[entry.file].name);
        self.files[entry.file].read_exact_at(into, entry.offset + range.start).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                let message = format!("{} became shorter while it was read", path().display());
                WorkerError::checkpoint(message).hint("something else is writing to that folder")
            }
            _ => WorkerError::io("read", path(), &error),
        })?;
        self.read.fetch_add(into.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }
}

fn open_shard(folder: &Path, name: &str, map: Option<&WeightMap>) -> Result<File> {
    let path = folder.join(name);
    File::open(&path).map_err(|error| match (error.kind(), map) {
        (io::ErrorKind::NotFound, Some(map)) => {
            let message = format!("{} names {name}, but {} has no such file", map.index_file(), folder.display());
            WorkerError::checkpoint(message).hint("copy the missing shard there, or fetch the model again")
        }
        _ => WorkerError::io("open", &path, &error),
    })
}

/// Whether `name` can only be a file directly inside a folder: no separators, no `.` or `..`, nothing invisible.
pub fn is_plain_name(name: &str) -> bool {
    let visible = !name.chars().any(|c| c.is_control() || matches!(c, '/' | '\\'));
    visible && !matches!(name, "" | "." | "..") && name.len() <= 255
}

pub(crate) fn bad_json(file: &str, error: &serde_json::Error) -> WorkerError {
    let detail: String = error.to_string().chars().filter(|c| !c.is_control()).take(300).collect();
    WorkerError::checkpoint(format!("{file} is not what it should be: {detail}"))
        .hint("the file is damaged: fetch it again")
}

/// A model's files but for its weights.
pub struct Described {
    folder: PathBuf,
    revision: Option<String>,
    config: Value,
    config_sha256: String,
}

impl Described {
    /// The configuration in `folder`, which is `revision` of a hub model.
    ///
    /// # Errors
    /// Kind `Job` when there is no such folder; `Checkpoint` or `Storage` for its config.json.
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

    /// config.json.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The model with these weights.
    pub fn with(self, weights: impl WeightSource + 'static) -> Checkpoint {
        let Self { folder, revision, config, config_sha256 } = self;
        Checkpoint { folder, revision, config, config_sha256, weights: Arc::new(weights) }
    }
}

/// A model's files, before any weight is read.
#[derive(Clone)]
pub struct Checkpoint {
    /// Where configuration and tokenizer lie.
    pub folder: PathBuf,
    /// Commit on the hub; `None` for a folder.
    pub revision: Option<String>,
    /// config.json.
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
    /// As [`Described::read`] and [`LocalSource::open`].
    pub fn open_folder(folder: &Path) -> Result<Self> {
        Ok(Described::read(folder, None)?.with(LocalSource::open(folder)?))
    }

    /// The tokenizer's files that are used, if the checkpoint has any that this program can read.
    pub fn tokenizer(&self) -> Option<TokenizerFiles> {
        TokenizerFiles::choose(|name| self.folder.join(name).is_file())
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
    let read = |name: &str| read_small(&folder.join(name));
    match Container::choose(|name| folder.join(name).is_file()) {
        Some(chosen) => WeightFiles::read(chosen, read).map_err(|error| error.context(folder.display())),
        None => Err(no_weights(folder.display())),
    }
}

/// The bytes of a JSON file of bounded size; `None` when it does not exist.
pub(crate) fn read_small(path: &Path) -> Result<Option<Vec<u8>>> {
    let bytes = match path.metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(WorkerError::io("read", path, &error)),
        Ok(metadata) => metadata.len(),
    };
    if bytes > MAX_JSON_BYTES {
        let message = format!("{} has {bytes} bytes, over the limit of {MAX_JSON_BYTES}", path.display());
        return Err(WorkerError::checkpoint(message));
    }
    std::fs::read(path).at("read", path).map(Some)
}

#[cfg(test)]
mod tests;
