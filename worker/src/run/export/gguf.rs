//! Writes GGUF, version 3: key-value pairs, then f32 tensors, all little-endian.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::error::{IoContext, Result, WorkerError};
use crate::files::{part_path, put_in_place};

/// Alignment of tensor data in bytes, counted from the end of the header.
const ALIGNMENT: usize = 32;
/// Type codes of the format.
const U32: u32 = 4;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;
const F32: u32 = 0;

/// Value of a key.
pub(super) enum Value {
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// A number.
    Number(u32),
}

/// A tensor of f32.
pub(super) struct Tensor {
    /// Unique name in the file.
    pub(super) name: String,
    /// Dimensions, the contiguous one first.
    pub(super) shape: [usize; 2],
}

impl Tensor {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * size_of::<f32>()
    }
}

/// Writes a file: to a temporary name, synced, then renamed. `values` returns one tensor's values
/// by its index, so that one tensor at a time is in memory.
///
/// # Errors
/// Storage. Internal: the number of values differs from the shape.
pub(super) fn write(
    path: &Path,
    metadata: &[(&str, Value)],
    tensors: &[Tensor],
    mut values: impl FnMut(usize) -> Vec<f32>,
) -> Result<()> {
    let part = part_path(path);
    let mut file = BufWriter::new(File::create(&part).at("create", &part)?);
    file.write_all(&header(metadata, tensors)).at("write", &part)?;
    for (index, tensor) in tensors.iter().enumerate() {
        let values = values(index);
        let mut bytes: Vec<u8> = bytemuck::cast_slice(&values).to_vec();
        if bytes.len() != tensor.bytes() {
            return Err(WorkerError::internal(format!("{} values for {}", values.len(), tensor.name)));
        }
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        file.write_all(&bytes).at("write", &part)?;
    }
    let file = file.into_inner().map_err(std::io::IntoInnerError::into_error).at("write", &part)?;
    put_in_place(&file, &part, path)
}

fn header(metadata: &[(&str, Value)], tensors: &[Tensor]) -> Vec<u8> {
    let mut header = Header(b"GGUF".to_vec());
    header.number(3);
    header.long(tensors.len());
    header.long(metadata.len());
    for (key, value) in metadata {
        header.text(key);
        match value {
            Value::Text(text) => {
                header.number(TEXT);
                header.text(text);
            }
            Value::Texts(texts) => {
                header.number(ARRAY);
                header.number(TEXT);
                header.long(texts.len());
                texts.iter().for_each(|text| header.text(text));
            }
            Value::Number(number) => {
                header.number(U32);
                header.number(*number);
            }
        }
    }
    let mut offset = 0;
    for tensor in tensors {
        header.text(&tensor.name);
        header.number(tensor.shape.len() as u32);
        tensor.shape.iter().for_each(|dimension| header.long(*dimension));
        header.number(F32);
        header.long(offset);
        offset += tensor.bytes().next_multiple_of(ALIGNMENT);
    }
    let mut header = header.0;
    header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
    header
}

struct Header(Vec<u8>);

impl Header {
    fn number(&mut self, number: u32) {
        self.0.extend(number.to_le_bytes());
    }

    fn long(&mut self, number: usize) {
        self.0.extend((number as u64).to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.long(text.len());
        self.0.extend(text.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    #[test]
    fn gguf_bytes_follow_the_format() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.gguf");
        let metadata = [
            ("number", Value::Number(7)),
            ("text", Value::Text("\u{e4}".into())),
            ("texts", Value::Texts(vec!["one".into(), String::new()])),
        ];
        let tensors = [Tensor { name: "odd".into(), shape: [3, 3] }, Tensor { name: "one".into(), shape: [1, 1] }];
        let values = |index: usize| if index == 0 { (0..9).map(|at| at as f32).collect() } else { vec![-1.5] };
        write(&path, &metadata, &tensors, values).unwrap();

        let number = |number: u32| number.to_le_bytes().to_vec();
        let long = |number: u64| number.to_le_bytes().to_vec();
        let mut want = [b"GGUF".to_vec(), number(3), long(2), long(3)].concat();
        want.extend([text("number"), number(4), number(7)].concat());
        want.extend([text("text"), number(8), text("\u{e4}")].concat());
        want.extend([text("texts"), number(9), number(8), long(2), text("one"), text("")].concat());
        want.extend([text("odd"), number(2), long(3), long(3), number(0), long(0)].concat());
        want.extend([text("one"), number(2), long(1), long(1), number(0), long(64)].concat());
        want.resize(want.len().next_multiple_of(32), 0);
        want.extend((0..9).flat_map(|at| (at as f32).to_le_bytes()));
        want.extend([0; 28]);
        want.extend((-1.5f32).to_le_bytes());
        want.extend([0; 28]);
        assert_eq!(std::fs::read(&path).unwrap(), want);

        let error = write(&path, &metadata, &tensors, |_| vec![0.0; 9]).unwrap_err();
        assert!(error.message().contains("9 values for one"), "{error}");
    }
}
