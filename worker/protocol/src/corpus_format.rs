//! The format of a corpus file, from the extension of its name.
//! This is the one place that knows the endings.

use std::fmt;

/// How a corpus file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CorpusFormat {
    /// How it holds documents, unpacked.
    pub content: CorpusContent,
    /// How it is packed, if it is.
    pub compression: Option<CorpusCompression>,
}

/// How a file holds documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CorpusContent {
    /// It is one.
    Text,
    /// One JSON object per line.
    JsonLines,
    /// An array of JSON objects or strings, or JSON Lines.
    Json,
    /// A row of columns each, under a header row; columns are separated by commas.
    Csv,
    /// The same, separated by tabs.
    Tsv,
    /// A row each.
    Parquet,
}

/// How a whole file is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CorpusCompression {
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
}

/// The first ending of a content is the one it is written with.
const CONTENTS: [(&str, CorpusContent); 7] = [
    ("txt", CorpusContent::Text),
    ("parquet", CorpusContent::Parquet),
    ("jsonl", CorpusContent::JsonLines),
    ("ndjson", CorpusContent::JsonLines),
    ("json", CorpusContent::Json),
    ("csv", CorpusContent::Csv),
    ("tsv", CorpusContent::Tsv),
];
const COMPRESSIONS: [(&str, CorpusCompression); 2] =
    [("gz", CorpusCompression::Gzip), ("zst", CorpusCompression::Zstd)];

impl CorpusFormat {
    /// By a file's name, in any letter case; a name without a known ending is a text's.
    pub fn of(name: &str) -> Self {
        let name = name.to_ascii_lowercase();
        let (name, compression) = match split(&name, &COMPRESSIONS) {
            Some((rest, compression)) => (rest, Some(compression)),
            None => (&*name, None),
        };
        let content = split(name, &CONTENTS).map_or(CorpusContent::Text, |(_, content)| content);
        Self { content, compression }
    }
}

/// What comes before a known ending, and what that ending means.
fn split<'a, T: Copy>(name: &'a str, endings: &[(&str, T)]) -> Option<(&'a str, T)> {
    let (rest, ending) = name.rsplit_once('.')?;
    endings.iter().find(|(known, _)| *known == ending).map(|(_, meaning)| (rest, *meaning))
}

/// The ending of a name that is read in this way, without the point before it.
impl fmt::Display for CorpusFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(ending(self.content, &CONTENTS))?;
        self.compression.map_or(Ok(()), |compression| write!(f, ".{}", ending(compression, &COMPRESSIONS)))
    }
}

fn ending<T: PartialEq>(meaning: T, endings: &[(&'static str, T)]) -> &'static str {
    endings.iter().find(|(_, known)| *known == meaning).map_or("", |(ending, _)| ending)
}
