//! Reads ready token ids: a safetensors file with `input_ids`, or a JSON list of lists.

use super::file::bom;
use super::non_text;
use crate::checkpoint::safetensors::{Header, StoredDtype};
use crate::error::{Result, WorkerError};

/// Name of the tensor with the ids.
const TENSOR: &str = "input_ids";

/// Rows of equal length.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rows {
    /// The ids, row by row; never empty.
    pub(super) ids: Vec<i64>,
    pub(super) sequences: usize,
    pub(super) tokens: usize,
}

/// Parses either format. After an 8-byte length a safetensors file has a brace, where a JSON list
/// of numbers has none.
pub(super) fn parse(bytes: &[u8]) -> Result<Rows> {
    if bytes.get(8) == Some(&b'{') {
        return from_safetensors(bytes);
    }
    let bytes = &bytes[bom(bytes)..];
    if let Some(format) = non_text::of(bytes) {
        return Err(WorkerError::corpus(format!("it is {}", format.name)).hint(HINT));
    }
    match bytes.iter().find(|byte| !byte.is_ascii_whitespace()) {
        None => Err(empty()),
        Some(b'[') => from_json(bytes),
        Some(_) => Err(WorkerError::corpus("it holds neither safetensors nor a JSON list").hint(HINT)),
    }
}

fn empty() -> WorkerError {
    WorkerError::corpus("it holds no token ids").hint(HINT)
}

const HINT: &str = "token ids are a safetensors file with `input_ids` i64 [sequences, tokens], or a JSON list of lists";

fn from_json(bytes: &[u8]) -> Result<Rows> {
    let rows: Vec<Vec<i64>> = serde_json::from_slice(bytes).map_err(|error| {
        let detail: String = error.to_string().chars().filter(|c| !c.is_control()).take(300).collect();
        WorkerError::corpus(format!("it is not a JSON list of lists of integers: {detail}")).hint(HINT)
    })?;
    let tokens = rows.first().map_or(0, Vec::len);
    if let Some((row, odd)) = rows.iter().enumerate().find(|(_, row)| row.len() != tokens) {
        let message = format!("row {row} has {} token ids, the first has {tokens}", odd.len());
        return Err(WorkerError::corpus(message).hint("cut all rows to the same length: there is no padding"));
    }
    if tokens == 0 {
        return Err(empty());
    }
    Ok(Rows { sequences: rows.len(), tokens, ids: rows.concat() })
}

fn from_safetensors(bytes: &[u8]) -> Result<Rows> {
    let ours = |error: WorkerError| WorkerError::corpus(error.message()).hint(HINT);
    let header = Header::parse(bytes, bytes.len() as u64).map_err(ours)?;
    let Some(tensor) = header.tensor(TENSOR) else {
        return Err(WorkerError::corpus(format!("it has no tensor `{TENSOR}`")).hint(HINT));
    };
    let [sequences, tokens] = tensor.shape[..] else {
        let message = format!("`{TENSOR}` has the shape {:?}, not [sequences, tokens]", tensor.shape);
        return Err(WorkerError::corpus(message).hint(HINT));
    };
    if tensor.dtype != StoredDtype::I64 {
        return Err(WorkerError::corpus(format!("`{TENSOR}` is stored as {}, not as I64", tensor.dtype)).hint(HINT));
    }
    if sequences == 0 || tokens == 0 {
        return Err(empty());
    }
    // The header check ensures that the tensor is inside the file.
    let data = &bytes[tensor.offset as usize..][..tensor.len as usize];
    let ids = data.as_chunks::<8>().0.iter().map(|id| i64::from_le_bytes(*id)).collect();
    Ok(Rows { ids, sequences: sequences as usize, tokens: tokens as usize })
}
