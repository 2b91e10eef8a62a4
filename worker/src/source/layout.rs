//! Which files of a repository make the checkpoint. Repositories carry copies in other formats beside each other
//! (`original/`, TensorFlow, Flax, pickles beside safetensors): exactly one set of weights and one tokenizer is used, and
//! only they are fetched.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;

use super::{bad_json, is_plain_name};
use crate::error::{Result, WorkerError};
use crate::safetensors::{HeaderTensor, read_header, shown};
use crate::torch;

/// The configuration of a checkpoint.
pub const CONFIG_FILE: &str = "config.json";
/// A whole tokenizer, in the form of the `tokenizers` library.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// What the tokenizer's Python class adds to it.
pub const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
/// Older repositories name their special tokens here.
pub(crate) const SPECIAL_TOKENS_FILE: &str = "special_tokens_map.json";
/// Older repositories number here the tokens that are not in their vocabulary.
pub(crate) const ADDED_TOKENS_FILE: &str = "added_tokens.json";
/// Files that say how a tokenizer is used; none of them need exist.
pub(crate) const TOKENIZER_SETTINGS: [&str; 3] = [TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE];
/// The list of safetensors shards.
pub const INDEX_FILE: &str = Container::Safetensors.index_file();
/// The only weight file of a safetensors checkpoint without an index.
pub const SINGLE_FILE: &str = Container::Safetensors.single_file();

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// `model.safetensors`, whole or in shards.
    Safetensors,
    /// `pytorch_model.bin`, whole or in shards.
    Torch,
}

/// The file that decides for a set of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub(crate) container: Container,
    /// The index, else the only file.
    pub(crate) file: &'static str,
}

impl Chosen {
    /// Whether the file is an index of shards.
    pub(crate) fn is_index(self) -> bool {
        self.file == self.container.index_file()
    }
}

impl Container {
    /// In the order of preference.
    const ALL: [Self; 2] = [Self::Safetensors, Self::Torch];

    /// The list of shards.
    pub const fn index_file(self) -> &'static str {
        match self {
            Self::Safetensors => "model.safetensors.index.json",
            Self::Torch => "pytorch_model.bin.index.json",
        }
    }

    /// The only weight file of a checkpoint without an index.
    pub const fn single_file(self) -> &'static str {
        match self {
            Self::Safetensors => "model.safetensors",
            Self::Torch => "pytorch_model.bin",
        }
    }

    /// How a file of this name stores weights.
    pub(crate) fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|container| name.ends_with(container.extension()))
    }

    /// Ending of its file names.
    const fn extension(self) -> &'static str {
        match self {
            Self::Safetensors => ".safetensors",
            Self::Torch => ".bin",
        }
    }

    /// The best of the sets that are there: safetensors before pickles, shards before a single file.
    pub(crate) fn choose(exists: impl Fn(&str) -> bool) -> Option<Chosen> {
        let files =
            |container: Self| [container.index_file(), container.single_file()].map(|file| Chosen { container, file });
        Self::ALL.into_iter().flat_map(files).find(|chosen| exists(chosen.file))
    }

    /// The checked tensors of one file on disk; no weights are read.
    pub(super) fn read_tensors(self, path: &Path) -> Result<Vec<HeaderTensor>> {
        match self {
            Self::Safetensors => Ok(read_header(path)?.tensors),
            Self::Torch => torch::read_tensors(path),
        }
    }
}

/// Nothing to choose from in `place`.
pub(crate) fn no_weights(place: impl fmt::Display) -> WorkerError {
    let files = Container::ALL.map(|c| format!("{} nor {}", c.index_file(), c.single_file()));
    WorkerError::checkpoint(format!("{place} has no weights: neither {}", files.join(" nor ")))
        .hint("choose a revision with safetensors or pytorch_model.bin weights: other formats are not read")
}

/// The files of one set of weights.
pub(crate) struct WeightFiles {
    pub(crate) container: Container,
    /// Plain names, ascending.
    pub(crate) names: Vec<String>,
    /// The index, where there is one.
    pub(crate) map: Option<WeightMap>,
}

impl WeightFiles {
    /// `read` gives the bytes of a small file that exists.
    pub(crate) fn read(chosen: Chosen, read: impl Fn(&str) -> Result<Option<Vec<u8>>>) -> Result<Self> {
        let Chosen { container, file } = chosen;
        if !chosen.is_index() {
            return Ok(Self { container, names: vec![file.to_owned()], map: None });
        }
        let map = WeightMap::parse(&read(file)?.unwrap_or_default(), container)?;
        Ok(Self { container, names: map.files(), map: Some(map) })
    }
}

/// An index: which tensor is in which file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightMap {
    container: Container,
    files: BTreeMap<String, String>,
}

/// The part of the index that matters.
#[derive(Deserialize)]
struct Wire {
    weight_map: BTreeMap<String, String>,
}

impl WeightMap {
    /// Parses an index. Every file it names must be a plain name with the container's ending; nothing else is read from
    /// the names, since publishers number their shards as they please.
    ///
    /// # Errors
    /// Kind `Checkpoint`: not JSON of that form, empty, or a name that is a path.
    pub fn parse(bytes: &[u8], container: Container) -> Result<Self> {
        let (index, extension) = (container.index_file(), container.extension());
        let Wire { weight_map: files } = serde_json::from_slice(bytes).map_err(|e| bad_json(index, &e))?;
        if files.is_empty() {
            return Err(WorkerError::checkpoint(format!("{index} names no tensor")));
        }
        match files.values().find(|file| !is_plain_name(file) || !file.ends_with(extension)) {
            None => Ok(Self { container, files }),
            Some(file) => {
                let message = format!("{index} names {}, which is not a plain *{extension} file name", shown(file));
                Err(WorkerError::checkpoint(message).hint("do not use this checkpoint: such a name can point anywhere"))
            }
        }
    }

    /// Name of the index itself.
    pub fn index_file(&self) -> &'static str {
        self.container.index_file()
    }

    /// Tensors with their files, ascending.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.iter().map(|(tensor, file)| (tensor.as_str(), file.as_str()))
    }

    /// The files it names, ascending, each once.
    pub fn files(&self) -> Vec<String> {
        let mut files: Vec<String> = self.files.values().cloned().collect();
        files.sort();
        files.dedup();
        files
    }
}

/// The forms in which tokenizers are published, in the order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenizerFiles {
    /// `tokenizer.json`.
    Json,
    /// `vocab.json` and `merges.txt`: byte-level BPE as GPT-2's (OPT).
    VocabAndMerges,
    /// `tiktoken.model` (Kimi).
    Tiktoken,
}

impl TokenizerFiles {
    const ALL: [Self; 3] = [Self::Json, Self::VocabAndMerges, Self::Tiktoken];

    /// The best form of which all files are there.
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
