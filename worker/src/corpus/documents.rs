//! Documents in the order in which they are asked for, from files of which no more is read than that takes.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use outliers_protocol::CorpusSpec;

use super::lines::Lines;
use super::parquet::TextColumn;
use super::{MAX_CORPUS_BYTES, look_at};
use crate::error::{IoContext, Result, WorkerError};
use crate::hub::DatasetFile;
use crate::noise::{mix, name_hash};

/// A text under its name.
pub(super) struct Document {
    pub(super) name: String,
    pub(super) text: Cow<'static, str>,
}

impl Document {
    /// From bytes that should be UTF-8.
    pub(super) fn of(name: String, bytes: Vec<u8>) -> Result<Self> {
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            let message = format!("{name} is not UTF-8: the bytes from {at} on are not text");
            WorkerError::corpus(message).hint("convert it, for example with `iconv -t utf-8`")
        })?;
        Ok(Self { name, text: text.into() })
    }
}

/// A file that is read by ranges.
pub(super) trait RangedFile {
    /// For messages.
    fn name(&self) -> &str;
    /// Bytes.
    fn size(&self) -> u64;
    /// The bytes of a range inside it.
    fn read(&self, range: Range<u64>) -> Result<Vec<u8>>;
}

impl RangedFile for DatasetFile {
    fn name(&self) -> &str {
        self.name()
    }

    fn size(&self) -> u64 {
        self.size()
    }

    fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        self.read(range)
    }
}

/// A file of this machine.
pub(super) struct LocalFile {
    name: String,
    file: File,
    size: u64,
}

impl LocalFile {
    pub(super) fn open(path: &str) -> Result<Self> {
        let size = look_at(Path::new(path))?.len();
        Ok(Self { name: path.to_owned(), file: File::open(path).at("open", path)?, size })
    }
}

impl RangedFile for LocalFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.file.read_exact_at(&mut bytes, range.start).at("read", &self.name)?;
        Ok(bytes)
    }
}

/// How a file holds documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// It is one.
    Text,
    /// One per line, as JSON objects.
    Lines,
    /// One per row.
    Parquet,
}

impl Format {
    /// By its name's ending.
    pub(super) fn of(name: &str) -> Self {
        match Path::new(name).extension().and_then(|extension| extension.to_str()) {
            Some("jsonl") => Self::Lines,
            Some("parquet") => Self::Parquet,
            _ => Self::Text,
        }
    }
}

/// The documents of some files, one after another.
pub(super) struct Documents {
    files: VecDeque<Box<dyn RangedFile>>,
    field: String,
    shuffle: Option<u64>,
    /// To be passed over.
    skip: usize,
    open: Option<Blocks>,
    ready: VecDeque<Document>,
}

/// An open file, and those of its blocks that were not read.
struct Blocks {
    file: Box<dyn RangedFile>,
    content: Content,
    left: VecDeque<usize>,
}

enum Content {
    Text,
    Lines(Lines),
    Parquet(Box<TextColumn>),
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

    /// One document that is at hand.
    pub(super) fn one(document: Document, spec: &CorpusSpec) -> Self {
        Self { ready: VecDeque::from([document]), ..Self::new(Vec::new(), spec) }
    }

    /// Reads the next block; false at the end of the last file.
    fn read_on(&mut self) -> Result<bool> {
        loop {
            if let Some(open) = &mut self.open
                && let Some(block) = open.left.pop_front()
            {
                let mut documents = open.read(block)?;
                if let Some(seed) = self.shuffle {
                    shuffle(&mut documents, mix(seed ^ name_hash(&format!("{block} {}", open.file.name()))));
                }
                self.ready.extend(documents);
                return Ok(true);
            }
            let Some(file) = self.files.pop_front() else { return Ok(false) };
            self.open = Some(Blocks::open(file, &self.field, self.shuffle)?);
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

impl Blocks {
    fn open(file: Box<dyn RangedFile>, field: &str, seed: Option<u64>) -> Result<Self> {
        let content = match Format::of(file.name()) {
            Format::Text => Content::Text,
            Format::Lines => Content::Lines(Lines::new(&*file, field)),
            Format::Parquet => Content::Parquet(Box::new(TextColumn::open(&*file, field)?)),
        };
        let blocks = match &content {
            Content::Text => 1,
            Content::Lines(lines) => lines.blocks(),
            Content::Parquet(column) => column.blocks(),
        };
        let mut left: Vec<usize> = (0..blocks).collect();
        if let Some(seed) = seed {
            shuffle(&mut left, mix(seed ^ name_hash(file.name())));
        }
        Ok(Self { file, content, left: left.into() })
    }

    fn read(&self, block: usize) -> Result<Vec<Document>> {
        let file = &*self.file;
        match &self.content {
            Content::Text => Ok(vec![Document::of(file.name().to_owned(), read_whole(file)?)?]),
            Content::Lines(lines) => lines.read(file, block),
            Content::Parquet(column) => column.read(file, block),
        }
    }
}

/// The bytes of a file of bounded size.
pub(super) fn read_whole(file: &dyn RangedFile) -> Result<Vec<u8>> {
    let (name, bytes) = (file.name(), file.size());
    if bytes > MAX_CORPUS_BYTES {
        let message = format!("{name} has {bytes} bytes, over the limit of {MAX_CORPUS_BYTES}");
        return Err(WorkerError::corpus(message).hint("cut the text into several files, or tokenise it beforehand"));
    }
    file.read(0..bytes)
}

/// The same order for the same seed, everywhere (Fisher and Yates).
fn shuffle<T>(items: &mut [T], seed: u64) {
    for last in (1..items.len()).rev() {
        items.swap(last, (mix(seed.wrapping_add(last as u64)) % (last as u64 + 1)) as usize);
    }
}
