//! Iterates over documents in the requested order, reading only the needed parts of files.

use std::borrow::Cow;
use std::collections::VecDeque;

use outliers_protocol::{CorpusContent, CorpusFormat, CorpusSpec};

use super::compressed::Decompressed;
use super::file::{CONVERT, MAX_HELD_BYTES, MAX_TEXT_BYTES, RangedFile};
use super::lines::Lines;
use super::parquet::TextColumn;
use super::{array, table, text};
use crate::error::{Result, WorkerError};
use crate::noise::{mix, name_hash};

/// A text with its name.
pub(super) struct Document {
    pub(super) name: String,
    pub(super) text: Cow<'static, str>,
}

impl Document {
    /// Decodes UTF-8 bytes.
    pub(super) fn of(name: String, bytes: Vec<u8>) -> Result<Self> {
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            let message = format!("{name} is not UTF-8: the bytes from {at} on are not text");
            WorkerError::corpus(message).hint(CONVERT)
        })?;
        Ok(Self { name, text: text.into() })
    }
}

/// The documents of some files, in order.
pub(super) struct Documents {
    files: VecDeque<Box<dyn RangedFile>>,
    field: String,
    shuffle: Option<u64>,
    /// Number of documents still to skip.
    skip: usize,
    open: Option<OpenFile>,
    ready: VecDeque<Document>,
}

/// An open file, with its blocks that are not read yet.
struct OpenFile {
    file: Box<dyn RangedFile>,
    content: Content,
    left: VecDeque<usize>,
}

/// How a file's documents are read; the formats with `field` are read as a whole.
enum Content {
    Text,
    Array { field: String },
    Table { delimiter: u8, field: String },
    Lines(Lines),
    Parquet(Box<TextColumn>),
}

impl Content {
    fn open(file: &dyn RangedFile, content: CorpusContent, field: &str) -> Result<Self> {
        let owned = || field.to_owned();
        Ok(match content {
            CorpusContent::Text => Self::Text,
            CorpusContent::Json if array::is_array(file)? => Self::Array { field: owned() },
            CorpusContent::Json | CorpusContent::JsonLines => Self::Lines(Lines::new(file, field)),
            CorpusContent::Csv => Self::Table { delimiter: b',', field: owned() },
            CorpusContent::Tsv => Self::Table { delimiter: b'\t', field: owned() },
            CorpusContent::Parquet => Self::Parquet(Box::new(TextColumn::open(file, field)?)),
        })
    }

    fn blocks(&self) -> usize {
        match self {
            Self::Text | Self::Array { .. } | Self::Table { .. } => 1,
            Self::Lines(lines) => lines.blocks(),
            Self::Parquet(column) => column.blocks(),
        }
    }

    fn read(&mut self, file: &dyn RangedFile, block: usize) -> Result<Vec<Document>> {
        match self {
            Self::Text => Ok(vec![text::read(file)?]),
            Self::Array { field } => array::read(file, field),
            Self::Table { delimiter, field } => table::read(file, *delimiter, field),
            Self::Lines(lines) => lines.read(file, block),
            Self::Parquet(column) => column.read(file, block),
        }
    }
}

impl Documents {
    pub(super) fn new(mut files: Vec<Box<dyn RangedFile>>, spec: &CorpusSpec) -> Self {
        if let Some(seed) = spec.shuffle_seed {
            shuffle(&mut files, mix(seed));
        }
        Self {
            files: files.into(),
            field: spec.text_field.clone(),
            shuffle: spec.shuffle_seed,
            skip: spec.skip_documents,
            open: None,
            ready: VecDeque::new(),
        }
    }

    /// A single document in memory.
    pub(super) fn one(document: Document, spec: &CorpusSpec) -> Self {
        Self { ready: VecDeque::from([document]), ..Self::new(Vec::new(), spec) }
    }

    /// Reads the next block; `false` at the end of the last file.
    fn read_on(&mut self) -> Result<bool> {
        loop {
            if let Some(open) = &mut self.open
                && let Some(block) = open.left.pop_front()
            {
                let mut documents = open.content.read(&*open.file, block)?;
                if let Some(seed) = self.shuffle {
                    shuffle(&mut documents, mix(seed ^ name_hash(&format!("{block} {}", open.file.name()))));
                }
                self.ready.extend(documents);
                return Ok(true);
            }
            let Some(file) = self.files.pop_front() else { return Ok(false) };
            self.open = Some(OpenFile::open(file, &self.field, self.shuffle)?);
        }
    }

    fn advance(&mut self) -> Result<Option<Document>> {
        loop {
            match self.ready.pop_front() {
                Some(_) if self.skip > 0 => self.skip -= 1,
                Some(document) => return Ok(Some(document)),
                None if self.read_on()? => {}
                None => return Ok(None),
            }
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        self.advance().transpose()
    }
}

impl OpenFile {
    fn open(file: Box<dyn RangedFile>, field: &str, seed: Option<u64>) -> Result<Self> {
        let format = CorpusFormat::of(file.name());
        let most = if format.content == CorpusContent::Text { MAX_TEXT_BYTES } else { MAX_HELD_BYTES };
        let file: Box<dyn RangedFile> = match format.compression {
            Some(compression) => Box::new(Decompressed::of(&*file, compression, most)?),
            None => file,
        };
        let content = Content::open(&*file, format.content, field)?;
        let mut left: Vec<usize> = (0..content.blocks()).collect();
        if let Some(seed) = seed {
            shuffle(&mut left, mix(seed ^ name_hash(file.name())));
        }
        Ok(Self { file, content, left: left.into() })
    }
}

/// Shuffles reproducibly by the seed (Fisher and Yates).
fn shuffle<T>(items: &mut [T], seed: u64) {
    for last in (1..items.len()).rev() {
        items.swap(last, (mix(seed.wrapping_add(last as u64)) % (last as u64 + 1)) as usize);
    }
}
