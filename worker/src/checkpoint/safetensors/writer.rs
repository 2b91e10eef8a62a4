//! Writes a safetensors file with known shapes and values that arrive in any order.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Map, Value, json};

use super::{StoredDtype, element_count, shown};
use crate::error::{IoContext, Result, WorkerError};
use crate::files::{part_path, put_in_place};

/// A tensor to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name, unique in the file.
    pub name: String,
    /// A type of known size.
    pub dtype: StoredDtype,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
}

impl TensorSpec {
    /// A tensor with this name.
    pub fn new(name: impl Into<String>, dtype: StoredDtype, shape: &[u64]) -> Self {
        Self { name: name.into(), dtype, shape: shape.to_vec() }
    }

    fn bytes(&self) -> Option<u64> {
        element_count(&self.shape)?.checked_mul(self.dtype.size()?)
    }
}

/// Location of a tensor's bytes in the file.
struct TensorSlot {
    offset: u64,
    len: u64,
    row_bytes: u64,
}

/// A safetensors file under construction. Values are written at their offsets from any thread;
/// memory does not grow with the file. [`finish`](Writer::finish) renames the file when all bytes
/// are written.
pub struct Writer {
    file: File,
    part: PathBuf,
    target: PathBuf,
    places: BTreeMap<String, TensorSlot>,
    missing: AtomicU64,
}

impl Writer {
    /// Creates a temporary file for `target` with all `tensors`, ordered by alignment and name as
    /// in the reference library.
    ///
    /// # Errors
    /// Kind `Internal` for a duplicate name, a type of unknown size or an overflowing shape;
    /// `Storage` for file errors.
    pub fn create(target: &Path, tensors: &[TensorSpec], metadata: &BTreeMap<String, String>) -> Result<Self> {
        let (header, places, end) = layout(tensors, metadata)?;
        let part = part_path(target);
        let file =
            File::options().read(true).write(true).create(true).truncate(true).open(&part).at("create", &part)?;
        let missing = AtomicU64::new(end - header.len() as u64);
        let writer = Self { file, part, target: target.to_owned(), places, missing };
        writer.file.write_all_at(&header, 0).at("write", &writer.part)?;
        writer.file.set_len(end).at("extend", &writer.part)?;
        Ok(writer)
    }

    /// Writes `bytes` (little-endian values) at byte `offset` of the tensor. Every byte must be
    /// written exactly once.
    ///
    /// # Errors
    /// Kind `Internal` for an unknown tensor or bytes beyond its end; `Storage` for file errors.
    pub fn write(&self, tensor: &str, offset: u64, bytes: &[u8]) -> Result<()> {
        let place = self.place(tensor)?;
        let len = bytes.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > place.len) {
            let room = place.len;
            return Err(WorkerError::internal(format!(
                "{len} bytes at {offset} do not fit tensor {} of {room} bytes",
                shown(tensor)
            )));
        }
        self.file.write_all_at(bytes, place.offset + offset).at("write", &self.part)?;
        let before = self.missing.fetch_sub(len, Ordering::Relaxed);
        if before < len {
            return Err(WorkerError::internal(format!("tensor {} was written twice", shown(tensor))));
        }
        Ok(())
    }

    /// Writes whole rows (slices along the first dimension) starting at row `first`.
    ///
    /// # Errors
    /// As [`write`](Writer::write).
    pub fn write_rows(&self, tensor: &str, first: u64, bytes: &[u8]) -> Result<()> {
        let row_bytes = self.place(tensor)?.row_bytes;
        self.write(tensor, first.saturating_mul(row_bytes), bytes)
    }

    /// Syncs the file and renames it to its target.
    ///
    /// # Errors
    /// Kind `Internal` if bytes are missing; `Storage` for file errors.
    pub fn finish(self) -> Result<()> {
        let missing = self.missing.load(Ordering::Relaxed);
        if missing != 0 {
            let target = self.target.display();
            return Err(WorkerError::internal(format!("{missing} bytes of {target} were never written")));
        }
        put_in_place(&self.file, &self.part, &self.target)
    }

    fn place(&self, tensor: &str) -> Result<&TensorSlot> {
        let unknown = || WorkerError::internal(format!("tensor {} is not part of the file", shown(tensor)));
        self.places.get(tensor).ok_or_else(unknown)
    }
}

/// Removes the temporary file of an abandoned writer. After the rename it no longer exists.
impl Drop for Writer {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.part);
    }
}

/// Header bytes (with length prefix), slots by name, and the length of the file.
type Layout = (Vec<u8>, BTreeMap<String, TensorSlot>, u64);

fn layout(tensors: &[TensorSpec], metadata: &BTreeMap<String, String>) -> Result<Layout> {
    let mut order: Vec<&TensorSpec> = tensors.iter().collect();
    // Wide types come first, which aligns all tensors.
    order.sort_by(|a, b| (b.dtype.size(), &a.name).cmp(&(a.dtype.size(), &b.name)));
    let mut object = Map::new();
    if !metadata.is_empty() {
        object.insert("__metadata__".to_owned(), json!(metadata));
    }
    let mut spans = Vec::with_capacity(order.len());
    let mut end = 0_u64;
    for tensor in order {
        let (begin, len) = (end, span(tensor)?);
        end = begin.checked_add(len).ok_or_else(|| WorkerError::internal("a safetensors file over 2^64 bytes"))?;
        let entry = json!({"dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [begin, end]});
        if object.insert(tensor.name.clone(), entry).is_some() {
            return Err(WorkerError::internal(format!("tensor {} is written twice", shown(&tensor.name))));
        }
        spans.push((tensor, begin, len));
    }
    let header = header_bytes(object);
    let start = header.len() as u64;
    let place = |(tensor, begin, len): (&TensorSpec, u64, u64)| {
        let rows = tensor.shape.first().copied().unwrap_or(1).max(1);
        (tensor.name.clone(), TensorSlot { offset: start + begin, len, row_bytes: len / rows })
    };
    Ok((header, spans.into_iter().map(place).collect(), start + end))
}

fn span(tensor: &TensorSpec) -> Result<u64> {
    let impossible = || {
        let (name, shape, dtype) = (shown(&tensor.name), &tensor.shape, &tensor.dtype);
        WorkerError::internal(format!("tensor {name} cannot be written: shape {shape:?} of {dtype}"))
    };
    tensor.bytes().ok_or_else(impossible)
}

/// Length prefix and JSON, padded with spaces so that data starts at a multiple of 8.
fn header_bytes(object: Map<String, Value>) -> Vec<u8> {
    let mut json = Value::Object(object).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    bytes
}
