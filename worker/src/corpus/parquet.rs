//! Reads a column of text in a Parquet file (<https://parquet.apache.org/docs/file-format/>) by
//! ranges: the footer, then the chunks of that column only.

use std::io::Read;
use std::sync::Arc;

use bytes::{Buf, Bytes};
use parquet::basic::{Compression, Type};
use parquet::column::page::PageReader;
use parquet::column::reader::{get_column_reader, get_typed_column_reader};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use parquet::file::reader::{ChunkReader, Length, SerializedPageReader};

use super::documents::Document;
use super::file::RangedFile;
use super::non_text;
use crate::catch_panic::catch_panic;
use crate::checkpoint::safetensors::shown;
use crate::error::{Result, WorkerError};

/// Bytes at the end of a file that are read first, which mostly contain the whole footer.
const LIKELY_FOOTER: u64 = 64 << 10;
/// Bytes at the end of a file: the footer's length and the format's signature.
const TAIL: usize = 8;
const MAGIC: &[u8] = b"PAR1";
/// Maximum bytes of a footer or chunk. Limits what a damaged or malicious file can allocate.
const MAX_FOOTER: u64 = 256 << 20;
const MAX_CHUNK: i64 = 1 << 30;
/// Rows decoded at a time.
const BATCH: usize = 1024;

/// Location of the texts of a file.
pub(super) struct TextColumn {
    metadata: ParquetMetaData,
    column: usize,
}

impl TextColumn {
    /// Reads the footer and finds the column `field`.
    pub(super) fn open(file: &dyn RangedFile, field: &str) -> Result<Self> {
        let footer = footer(file)?;
        let metadata = guarded(file, || ParquetMetaDataReader::decode_metadata(&footer))?;
        let columns = metadata.file_metadata().schema_descr().columns();
        let names = || columns.iter().take(20).map(|c| shown(&c.path().string())).collect::<Vec<_>>().join(", ");
        let Some(column) = columns.iter().position(|column| column.path().string() == field) else {
            let message = format!("{} has no column {}: it has {}", file.name(), shown(field), names());
            return Err(WorkerError::corpus(message).hint("name the column that holds the text with --text-field"));
        };
        if columns[column].physical_type() != Type::BYTE_ARRAY || columns[column].max_rep_level() > 0 {
            let message = format!("column {} of {} holds no texts", shown(field), file.name());
            return Err(WorkerError::corpus(message).hint(format!("it has the columns {}", names())));
        }
        Ok(Self { metadata, column })
    }

    /// Number of row groups, each of which is read as a whole.
    pub(super) fn blocks(&self) -> usize {
        self.metadata.num_row_groups()
    }

    /// The texts of a row group. Rows without text are left out.
    pub(super) fn read(&self, file: &dyn RangedFile, block: usize) -> Result<Vec<Document>> {
        let rows_before: i64 = self.metadata.row_groups()[..block].iter().map(|group| group.num_rows()).sum();
        let piece = self.fetch(file, block)?;
        let texts = guarded(file, || self.decode(piece, block))?;
        let named = |(row, text): (usize, Option<ByteArray>)| {
            let name = format!("row {} of {}", rows_before + row as i64 + 1, file.name());
            text.map(|text| Document::of(name, text.data().to_vec()))
        };
        texts.into_iter().enumerate().filter_map(named).collect()
    }

    fn fetch(&self, file: &dyn RangedFile, block: usize) -> Result<FileBytes> {
        let chunk = self.metadata.row_group(block).column(self.column);
        let first = chunk.dictionary_page_offset().filter(|at| *at > 0).unwrap_or(chunk.data_page_offset());
        if chunk.compression() == Compression::LZO {
            let message =
                format!("column {} of {} is packed with LZO", shown(&chunk.column_path().string()), file.name());
            return Err(
                WorkerError::corpus(message).hint("write it again with another codec, for example zstd or snappy")
            );
        }
        let (bytes, unpacked) = (chunk.compressed_size(), chunk.uncompressed_size());
        let possible = (0..=MAX_CHUNK).contains(&bytes) && (0..=MAX_CHUNK).contains(&unpacked);
        let range = (first as u64)..(first.saturating_add(bytes) as u64);
        if first < 0 || !possible || range.end > file.size() {
            let message = format!("{}: a block of {bytes} bytes at {first}, {unpacked} unpacked", file.name());
            return Err(WorkerError::corpus(message).hint("the file is damaged, or its blocks are too large to read"));
        }
        Ok(FileBytes { start: range.start, bytes: file.read(range)?.into() })
    }

    /// The rows of a row group, missing ones included.
    fn decode(&self, piece: FileBytes, block: usize) -> ParquetResult<Vec<Option<ByteArray>>> {
        let group = self.metadata.row_group(block);
        let rows = usize::try_from(group.num_rows())?;
        let pages = SerializedPageReader::new(Arc::new(piece), group.column(self.column), rows, None)?;
        let column = self.metadata.file_metadata().schema_descr().column(self.column);
        let whole = column.max_def_level();
        let pages: Box<dyn PageReader> = Box::new(pages);
        let mut reader = get_typed_column_reader::<ByteArrayType>(get_column_reader(column, pages));
        let mut texts = Vec::new();
        loop {
            let (mut levels, mut values) = (Vec::new(), Vec::new());
            let (read, _, _) = reader.read_records(BATCH, Some(&mut levels), None, &mut values)?;
            if read == 0 {
                return Ok(texts);
            }
            let mut values = values.into_iter();
            let there = |row: usize| whole == 0 || levels.get(row) == Some(&whole);
            texts.extend((0..read).map(|row| there(row).then(|| values.next()).flatten()));
        }
    }
}

/// The bytes of the footer, without the tail.
fn footer(file: &dyn RangedFile) -> Result<Vec<u8>> {
    let size = file.size();
    let damaged = |what: &str| {
        let message = format!("{} is no Parquet file: {what}", file.name());
        let error = WorkerError::corpus(message).hint("the file is damaged, or has the wrong name");
        non_text::explain(file, Some(&non_text::PARQUET), error)
    };
    let mut end = file.read(size.saturating_sub(LIKELY_FOOTER)..size)?;
    let body = end.len().checked_sub(TAIL).ok_or_else(|| damaged("it is too short"))?;
    let (length, magic) = end[body..].split_at(TAIL / 2);
    if magic != MAGIC {
        return Err(damaged("it does not end with PAR1"));
    }
    let length = u64::from(u32::from_le_bytes(length.try_into().expect("half of the tail")));
    if length > MAX_FOOTER || length + TAIL as u64 > size {
        return Err(damaged("its footer has an impossible length"));
    }
    end.truncate(body);
    match (end.len() as u64).checked_sub(length) {
        Some(before) => Ok(end.split_off(before as usize)),
        None => file.read(size - TAIL as u64 - length..size - TAIL as u64),
    }
}

/// Runs the library, which fails and sometimes panics on damaged files.
fn guarded<T>(file: &dyn RangedFile, read: impl FnOnce() -> ParquetResult<T>) -> Result<T> {
    let why = match catch_panic(read) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => shown(&error.to_string()),
        Err(_) => "what it holds makes no sense".to_owned(),
    };
    Err(WorkerError::corpus(format!("{} cannot be read: {why}", file.name())).hint("the file is damaged"))
}

/// Some bytes of a file, with their offset.
struct FileBytes {
    start: u64,
    bytes: Bytes,
}

impl Length for FileBytes {
    fn len(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

impl ChunkReader for FileBytes {
    type T = Box<dyn Read + Send>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        let left = self.len().saturating_sub(start) as usize;
        Ok(Box::new(self.get_bytes(start, left)?.reader()))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let from = start.checked_sub(self.start).map(|from| from as usize);
        let range = from.and_then(|from| Some(from..from.checked_add(length)?)).filter(|r| r.end <= self.bytes.len());
        range.map(|range| self.bytes.slice(range)).ok_or_else(|| ParquetError::EOF("outside its block".to_owned()))
    }
}
