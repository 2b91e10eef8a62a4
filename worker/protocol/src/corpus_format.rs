//! The format of a corpus file, from the extension of its name.
//! No other code has a list of the extensions.

use std::fmt;

/// How a corpus file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CorpusFormat {
    /// Format of the content after decompression.
    pub content: CorpusContent,
    /// Compression of the whole file; `None`: none.
    pub compression: Option<CorpusCompression>,
}

/// Format of a file's documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CorpusContent {
    /// The whole file is one document.
    Text,
    /// One JSON object per line.
    JsonLines,
    /// An array of JSON objects or strings, or JSON Lines.
    Json,
    /// Comma-separated columns under a header row; each row is a document.
    Csv,
    /// Tab-separated columns under a header row; each row is a document.
    Tsv,
    /// Parquet; each row is a document.
    Parquet,
}

/// Compression of a whole file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CorpusCompression {
    /// gzip (RFC 1952).
    Gzip,
    /// Zstandard (RFC 8878).
    Zstd,
}

/// Extensions by content. A format is displayed with the first extension of its content.
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
    /// The format of a file by its name, in any letter case. A name without a known extension is a
    /// text file's.
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

/// The part of `name` before a known extension, and the value of that extension.
fn split<'a, T: Copy>(name: &'a str, endings: &[(&str, T)]) -> Option<(&'a str, T)> {
    let (rest, ending) = name.rsplit_once('.')?;
    endings.iter().find(|(known, _)| *known == ending).map(|(_, meaning)| (rest, *meaning))
}

/// The extension of the format, without the first dot.
impl fmt::Display for CorpusFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(ending(self.content, &CONTENTS))?;
        self.compression.map_or(Ok(()), |compression| write!(f, ".{}", ending(compression, &COMPRESSIONS)))
    }
}

fn ending<T: PartialEq>(meaning: T, endings: &[(&'static str, T)]) -> &'static str {
    endings.iter().find(|(_, known)| *known == meaning).map_or("", |(ending, _)| ending)
}
