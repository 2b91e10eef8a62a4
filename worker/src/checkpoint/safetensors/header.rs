//! Parses the header. Every number in it is checked.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};

use super::{StoredDtype, element_count, shown};
use crate::checkpoint::placeholder;
use crate::error::{IoContext, Result, WorkerError};
use crate::files::open_regular;

/// Maximum bytes of a header, the reference library's limit.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes of the header length.
const PREFIX: u64 = 8;

/// Maximum characters of a dtype's name. Existing ones have at most 12.
const MAX_DTYPE_NAME: usize = 32;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderTensor {
    /// The tensor's name.
    pub name: String,
    /// Stored type.
    pub dtype: StoredDtype,
    /// Dimensions, outermost first; empty for a scalar.
    pub shape: Vec<u64>,
    /// Number of values between indices, per dimension, if they are not contiguous in row-major
    /// order; always `None` in safetensors.
    pub strides: Option<Vec<u64>>,
    /// First byte, counted from the start of the file.
    pub offset: u64,
    /// Bytes of its values, contiguous or not.
    pub len: u64,
}

/// A checked header: the tensors cover the file from the end of the header to its last byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Tensors in the order of their bytes.
    pub tensors: Vec<HeaderTensor>,
    /// The free-form `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

impl Header {
    /// Number of bytes from the start of a file that contain its whole header: 8 plus the stated
    /// length.
    ///
    /// # Errors
    /// Kind `Checkpoint`: a file refused by [`placeholder::refuse`]; fewer than 8 bytes; a length
    /// over [`MAX_HEADER_BYTES`] or beyond the end of the file.
    pub fn bytes_needed(start: &[u8], file_len: u64) -> Result<u64> {
        placeholder::refuse(start)?;
        let Some(prefix) = start.first_chunk::<8>() else {
            return Err(damaged(format!("{} bytes are too short for a safetensors file", start.len())));
        };
        let len = u64::from_le_bytes(*prefix);
        if len > MAX_HEADER_BYTES {
            return Err(damaged(format!("it states a header of {len} bytes, over the limit of {MAX_HEADER_BYTES}")));
        }
        if PREFIX + len > file_len {
            return Err(damaged(format!("it states a header of {len} bytes, but the file has only {file_len}")));
        }
        Ok(PREFIX + len)
    }

    /// Parses and checks the header at the `start` of a file of `file_len` bytes. Bytes after the
    /// header are ignored.
    ///
    /// # Errors
    /// Kind `Checkpoint`, with the failed check. The caller adds the file's name.
    pub fn parse(start: &[u8], file_len: u64) -> Result<Self> {
        let data_start = Self::bytes_needed(start, file_len)?;
        let json = usize::try_from(data_start).ok().and_then(|end| start.get(PREFIX as usize..end));
        let json = json.ok_or_else(|| damaged("its header is incomplete".to_owned()))?;
        let text = std::str::from_utf8(json).map_err(|e| damaged(format!("its header is not UTF-8: {e}")))?;
        let raw = RawHeader::from_json(text)?;
        let mut tensors =
            raw.tensors.into_iter().map(|t| t.checked(data_start, file_len)).collect::<Result<Vec<_>>>()?;
        tensors.sort_by_key(|tensor| (tensor.offset, tensor.len));
        check_tiling(&tensors, data_start, file_len)?;
        Ok(Self { tensors, metadata: raw.metadata })
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&HeaderTensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

/// Reads the header of the file at `path`.
///
/// # Errors
/// Kind `Storage` if the file cannot be read, `Checkpoint` if it is not a complete safetensors
/// file; both name the file.
pub fn read_header(path: &Path) -> Result<Header> {
    let mut file = open_regular(path).at("open", path)?;
    let file_len = file.metadata().at("read the size of", path)?.len();
    let mut start = Vec::new();
    read_up_to(&mut file, placeholder::ENOUGH as u64, &mut start).at("read", path)?;
    let named = |error: WorkerError| error.context(path.display());
    let needed = Header::bytes_needed(&start, file_len).map_err(named)?;
    read_up_to(&mut file, needed.saturating_sub(start.len() as u64), &mut start).at("read", path)?;
    Header::parse(&start, file_len).map_err(named)
}

/// Appends at most `count` bytes. Memory grows with the bytes read, not with `count`.
fn read_up_to(file: &mut File, count: u64, into: &mut Vec<u8>) -> std::io::Result<usize> {
    file.take(count).read_to_end(into)
}

fn damaged(message: String) -> WorkerError {
    WorkerError::checkpoint(message).hint("the file is damaged or incomplete: fetch it again")
}

/// Checks that there are no gaps, no overlaps and no remaining bytes.
fn check_tiling(tensors: &[HeaderTensor], data_start: u64, file_len: u64) -> Result<()> {
    let mut end = data_start;
    for tensor in tensors {
        let name = shown(&tensor.name);
        if tensor.offset < end {
            return Err(damaged(format!("tensor {name} overlaps the one before it")));
        }
        if tensor.offset > end {
            return Err(damaged(format!("{} unclaimed bytes lie before tensor {name}", tensor.offset - end)));
        }
        end += tensor.len;
    }
    if end < file_len {
        return Err(damaged(format!("{} unclaimed bytes follow the last tensor", file_len - end)));
    }
    Ok(())
}

/// A tensor as the file describes it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

struct RawTensor {
    name: String,
    entry: RawEntry,
}

impl RawTensor {
    fn checked(self, data_start: u64, file_len: u64) -> Result<HeaderTensor> {
        let wrong = |what: String| damaged(format!("tensor {}: {what}", shown(&self.name)));
        let [begin, end] = self.entry.data_offsets;
        let Some(len) = end.checked_sub(begin) else {
            return Err(wrong(format!("its bytes end ({end}) before they begin ({begin})")));
        };
        if end > file_len - data_start {
            let have = file_len - data_start;
            return Err(wrong(format!("its bytes reach to {end}, but the file holds only {have}: it is truncated")));
        }
        if self.entry.dtype.len() > MAX_DTYPE_NAME {
            return Err(wrong("the name of its dtype is too long".to_owned()));
        }
        let dtype = StoredDtype::from_name(&self.entry.dtype);
        let shape = self.entry.shape;
        let Some(count) = element_count(&shape) else {
            return Err(wrong(format!("its shape {shape:?} overflows")));
        };
        // The length of an unsupported type cannot be checked, and nothing reads it.
        if let Some(size) = dtype.size()
            && count.checked_mul(size) != Some(len)
        {
            return Err(wrong(format!("shape {shape:?} of {dtype} does not fill its {len} bytes")));
        }
        Ok(HeaderTensor { name: self.name, dtype, shape, strides: None, offset: data_start + begin, len })
    }
}

/// The JSON object. Duplicate keys are refused, since a map would silently keep the last.
#[derive(Default)]
struct RawHeader {
    tensors: Vec<RawTensor>,
    metadata: BTreeMap<String, String>,
}

impl RawHeader {
    fn from_json(text: &str) -> Result<Self> {
        let wrong =
            |e: serde_json::Error| damaged(format!("its header is not what the format asks for: {}", plain(&e)));
        serde_json::from_str(text).map_err(wrong)
    }
}

/// serde quotes unexpected strings verbatim, so they are sanitised for terminals.
fn plain(error: &serde_json::Error) -> String {
    error.to_string().chars().filter(|c| !c.is_control()).take(300).collect()
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut raw = RawHeader::default();
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format!("{} appears twice", shown(&name))));
            }
            if name == "__metadata__" {
                raw.metadata = map.next_value()?;
            } else {
                let entry = map.next_value()?;
                raw.tensors.push(RawTensor { name, entry });
            }
        }
        Ok(raw)
    }
}

#[cfg(test)]
mod tests;
