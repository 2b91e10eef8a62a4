//! Chooses the files of a checkpoint. Repositories contain copies in several formats (`original/`,
//! TensorFlow, Flax, pickles beside safetensors). Exactly one set of weights and one tokenizer is
//! used and fetched. The weights are those that transformers reads, since results are compared
//! with its own.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::{bad_json, is_plain_name};
use crate::checkpoint::safetensors::{HeaderTensor, read_header, shown};
use crate::checkpoint::torch;
use crate::error::{Result, WorkerError, listed};

/// The configuration of a checkpoint.
pub const CONFIG_FILE: &str = "config.json";
/// A complete tokenizer in the format of the `tokenizers` library.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// Settings of the tokenizer's Python class.
pub const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
/// Special tokens in older repositories.
pub(crate) const SPECIAL_TOKENS_FILE: &str = "special_tokens_map.json";
/// Tokens outside the vocabulary in older repositories, with their ids.
pub(crate) const ADDED_TOKENS_FILE: &str = "added_tokens.json";
/// Optional files with tokenizer settings.
pub(crate) const TOKENIZER_SETTINGS: [&str; 3] = [TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE];
/// The index of safetensors shards.
pub const INDEX_FILE: &str = Container::Safetensors.index_file();
/// The weight file of a safetensors checkpoint without an index.
pub const SINGLE_FILE: &str = Container::Safetensors.single_file();

/// The configuration's key for the weight file or index.
const WEIGHTS_KEY: &str = "transformers_weights";

/// Container of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// `model.safetensors`, whole or in shards.
    Safetensors,
    /// `pytorch_model.bin`, whole or in shards.
    Torch,
}

impl Container {
    /// In order of preference.
    const ALL: [Self; 2] = [Self::Safetensors, Self::Torch];

    /// Name of the index of shards.
    pub const fn index_file(self) -> &'static str {
        match self {
            Self::Safetensors => "model.safetensors.index.json",
            Self::Torch => "pytorch_model.bin.index.json",
        }
    }

    /// Name of the weight file of a checkpoint without an index.
    pub const fn single_file(self) -> &'static str {
        match self {
            Self::Safetensors => "model.safetensors",
            Self::Torch => "pytorch_model.bin",
        }
    }

    /// The container of a file by its name.
    pub(crate) fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|container| name.ends_with(container.extension()))
    }

    /// Extension of its file names.
    const fn extension(self) -> &'static str {
        match self {
            Self::Safetensors => ".safetensors",
            Self::Torch => ".bin",
        }
    }

    /// Reads the checked tensors of a file on disk, without weights.
    pub(super) fn read_tensors(self, path: &Path) -> Result<Vec<HeaderTensor>> {
        match self {
            Self::Safetensors => Ok(read_header(path)?.tensors),
            Self::Torch => torch::read_tensors(path),
        }
    }
}

/// A folder or a repository.
pub(crate) struct Location<'a> {
    /// Its name in messages.
    pub(crate) name: &'a dyn fmt::Display,
    /// Whether it has a file of this name.
    pub(crate) has: &'a dyn Fn(&str) -> bool,
    /// Reads a small file.
    pub(crate) read: &'a dyn Fn(&str) -> Result<Vec<u8>>,
}

/// The file that determines a set of weights: an index of shards, or a single file.
struct Chosen {
    container: Container,
    file: String,
}

impl Chosen {
    /// The file that transformers would read: the one named in the configuration, else the first
    /// existing default.
    fn find(place: &Location<'_>) -> Result<Self> {
        match Self::named(place)? {
            Some(named) => Ok(named),
            None => Self::in_order().find(|chosen| (place.has)(&chosen.file)).ok_or_else(|| no_weights(place)),
        }
    }

    /// Safetensors before pickles, and for each the single file before the index, whatever its
    /// content.
    fn in_order() -> impl Iterator<Item = Self> {
        let files = |container: Container| [container.single_file(), container.index_file()].map(|f| (container, f));
        let all = Container::ALL.into_iter().flat_map(files);
        all.map(|(container, file)| Self { container, file: file.to_owned() })
    }

    /// The file named in the configuration.
    fn named(place: &Location<'_>) -> Result<Option<Self>> {
        if !(place.has)(CONFIG_FILE) {
            return Ok(None);
        }
        let config: Value =
            serde_json::from_slice(&(place.read)(CONFIG_FILE)?).map_err(|e| bad_json(CONFIG_FILE, &e))?;
        let Some(value) = config.get(WEIGHTS_KEY).filter(|value| !value.is_null()) else { return Ok(None) };
        let safetensors = |name: &str| name.strip_suffix(".index.json").unwrap_or(name).ends_with(".safetensors");
        let known = |name: &&str| is_plain_name(name) && safetensors(name);
        let wrong = |what: String| {
            let message = format!("{CONFIG_FILE} of {} names its weights ({WEIGHTS_KEY}): {what}", place.name);
            WorkerError::checkpoint(message).hint(format!("correct {WEIGHTS_KEY} in {CONFIG_FILE}, or take it out"))
        };
        let Some(file) = value.as_str().filter(known) else {
            return Err(wrong(format!("{} is no safetensors file or index beside it", shown(&value.to_string()))));
        };
        if !(place.has)(file) {
            return Err(wrong(format!("there is no file {file}")));
        }
        Ok(Some(Self { container: Container::Safetensors, file: file.to_owned() }))
    }

    /// The parsed index, if the file is one.
    fn index(&self, place: &Location<'_>) -> Result<Option<WeightMap>> {
        if !self.file.ends_with(".index.json") {
            return Ok(None);
        }
        let map = WeightMap::named(&self.file, &(place.read)(&self.file)?, self.container);
        map.map(Some).map_err(|error| error.context(place.name))
    }

    /// Whether all its files exist.
    fn is_whole(&self, place: &Location<'_>) -> bool {
        let whole = |map: Option<WeightMap>| map.is_none_or(|map| map.files().iter().all(|file| (place.has)(file)));
        (place.has)(&self.file) && self.index(place).is_ok_and(whole)
    }

    /// A note about an index that lies beside the single file and names other files.
    fn unread_index(&self, place: &Location<'_>) -> Option<String> {
        let (file, index) = (&self.file, self.container.index_file());
        if file != self.container.single_file() || !(place.has)(index) {
            return None;
        }
        let beside = Self { container: self.container, file: index.to_owned() };
        let others = match beside.index(place) {
            Ok(map) => map?.files().into_iter().filter(|named| named != file).collect::<Vec<_>>(),
            Err(error) => return Some(format!("{file} is read; {index} beside it is not, and is no index: {error}")),
        };
        let there = others.iter().any(|named| (place.has)(named));
        let others = (!others.is_empty()).then(|| listed(others))?;
        Some(if there {
            format!(
                "two sets of weights lie here: {file}, which is read, as transformers does, and the files that {index} names ({others}), \
                 which are not"
            )
        } else {
            format!("{file} is read, as transformers does; {index} beside it names files that are not there ({others})")
        })
    }
}

/// Whether transformers takes a file of this name for one process's slice:
/// `shard-00000-model-00001-of-00002.safetensors`.
pub(super) fn is_distributed(name: &str) -> bool {
    let pattern = |byte: u8| if byte.is_ascii_digit() { b'0' } else { byte };
    name.bytes().map(pattern).eq(*b"shard-00000-model-00000-of-00000.safetensors")
}

/// The error if there are no weights.
fn no_weights(place: &Location<'_>) -> WorkerError {
    let files = Container::ALL.map(|c| format!("{} nor {}", c.single_file(), c.index_file()));
    WorkerError::checkpoint(format!("{} has no weights: neither {}", place.name, files.join(" nor ")))
        .hint("choose a revision with safetensors or pytorch_model.bin weights: other formats are not read")
}

/// The error if shards of the index are missing.
fn missing_shards(place: &Location<'_>, chosen: &Chosen, missing: Vec<&String>) -> WorkerError {
    let index = &chosen.file;
    let message = format!("{index} names files that {} does not have: {}", place.name, listed(missing));
    let other = Chosen::in_order().find(|other| other.file != *index && other.is_whole(place));
    WorkerError::checkpoint(message).hint(match other {
        Some(Chosen { file, .. }) => {
            format!("fetch the missing files, or take {index} away: {file} beside it is whole, and is read then")
        }
        None => "fetch the missing files, or choose another revision: this one is incomplete".to_owned(),
    })
}

/// The files of one set of weights.
pub(crate) struct WeightFiles {
    pub(crate) container: Container,
    /// Plain file names, ascending.
    pub(crate) names: Vec<String>,
    /// The index, if there is one.
    pub(crate) map: Option<WeightMap>,
    /// Notes on the choice, for readers of the results.
    pub(crate) notes: Vec<String>,
}

impl WeightFiles {
    /// The files that transformers would read, all of which exist.
    pub(crate) fn find(place: &Location<'_>) -> Result<Self> {
        let chosen = Chosen::find(place)?;
        let container = chosen.container;
        let Some(map) = chosen.index(place)? else {
            let notes = chosen.unread_index(place).into_iter().collect();
            return Ok(Self { container, names: vec![chosen.file], map: None, notes });
        };
        let names = map.files();
        let missing: Vec<&String> = names.iter().filter(|name| !(place.has)(name)).collect();
        if missing.is_empty() {
            return Ok(Self { container, names, map: Some(map), notes: Vec::new() });
        }
        Err(missing_shards(place, &chosen, missing))
    }
}

/// An index: the file of each tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightMap {
    /// File name of the index.
    index: String,
    files: BTreeMap<String, String>,
}

/// The used part of the index.
#[derive(Deserialize)]
struct Wire {
    weight_map: BTreeMap<String, String>,
}

impl WeightMap {
    /// Parses an index. Every file must be a plain name with the container's extension. Nothing
    /// else is derived from the names, since publishers number shards differently.
    ///
    /// # Errors
    /// Kind `Checkpoint`: not valid JSON of this format, empty, or a name that is a path.
    pub fn parse(bytes: &[u8], container: Container) -> Result<Self> {
        Self::named(container.index_file(), bytes, container)
    }

    /// As [`parse`](Self::parse) for an index with another name.
    fn named(index: &str, bytes: &[u8], container: Container) -> Result<Self> {
        let extension = container.extension();
        let Wire { weight_map: files } = serde_json::from_slice(bytes).map_err(|e| bad_json(index, &e))?;
        if files.is_empty() {
            return Err(WorkerError::checkpoint(format!("{index} names no tensor")));
        }
        match files.values().find(|file| !is_plain_name(file) || !file.ends_with(extension)) {
            None => Ok(Self { index: index.to_owned(), files }),
            Some(file) => {
                let message = format!("{index} names {}, which is not a plain *{extension} file name", shown(file));
                Err(WorkerError::checkpoint(message).hint("do not use this checkpoint: such a name can point anywhere"))
            }
        }
    }

    /// File name of the index.
    pub fn index_file(&self) -> &str {
        &self.index
    }

    /// The file of a tensor by the index.
    pub(super) fn file_of(&self, tensor: &str) -> Option<&str> {
        self.files.get(tensor).map(String::as_str)
    }

    /// Tensors with their files, ascending.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.iter().map(|(tensor, file)| (tensor.as_str(), file.as_str()))
    }

    /// The files of the index, ascending, each once.
    pub fn files(&self) -> Vec<String> {
        let mut files: Vec<String> = self.files.values().cloned().collect();
        files.sort();
        files.dedup();
        files
    }
}

/// Published tokenizer formats, in order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenizerFiles {
    /// `tokenizer.json`.
    Json,
    /// `vocab.json` and `merges.txt`: byte-level BPE like GPT-2's (OPT).
    VocabAndMerges,
    /// `tiktoken.model` (Kimi).
    Tiktoken,
}

impl TokenizerFiles {
    const ALL: [Self; 3] = [Self::Json, Self::VocabAndMerges, Self::Tiktoken];

    /// The preferred format with all files present.
    pub fn choose(exists: impl Fn(&str) -> bool) -> Option<Self> {
        Self::ALL.into_iter().find(|form| form.names().iter().all(|name| exists(name)))
    }

    /// Names of its files.
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Self::Json => &[TOKENIZER_FILE],
            Self::VocabAndMerges => &["vocab.json", "merges.txt"],
            Self::Tiktoken => &["tiktoken.model"],
        }
    }
}

impl fmt::Display for TokenizerFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names().join(" + "))
    }
}
