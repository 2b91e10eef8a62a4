//! Files in the format of `torch.save`, with a chosen layout of tensors in their storages.

use std::path::Path;

/// A tensor with its own storage.
pub struct Tensor {
    /// The tensor's name.
    pub name: String,
    /// PyTorch's name for storages of its type: `FloatStorage`.
    pub storage: &'static str,
    /// Bytes per value.
    pub size: usize,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
    /// Strides in values, per dimension.
    pub strides: Vec<u64>,
    /// The storage.
    pub bytes: Vec<u8>,
}

/// Writes a dictionary of tensors.
///
/// # Errors
/// I/O errors.
pub fn save(path: &Path, tensors: &[Tensor]) -> std::io::Result<()> {
    let mut records = vec![("archive/data.pkl".to_owned(), pickle(tensors))];
    let data = tensors.iter().enumerate().map(|(key, tensor)| (format!("archive/data/{key}"), tensor.bytes.clone()));
    records.extend(data);
    std::fs::write(path, zip(&records))
}

fn pickle(tensors: &[Tensor]) -> Vec<u8> {
    let mut program = b"\x80\x02}(".to_vec();
    for (key, tensor) in tensors.iter().enumerate() {
        let values = (tensor.bytes.len() / tensor.size) as u64;
        program.extend(text(&tensor.name));
        program.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        program.extend([text("storage"), format!("ctorch\n{}\n", tensor.storage).into_bytes()].concat());
        program.extend([text(&key.to_string()), text("cpu"), number(values), b"tQ".to_vec(), number(0)].concat());
        program.extend([numbers(&tensor.shape), numbers(&tensor.strides)].concat());
        program.extend(b"\x89}tR");
    }
    program.extend(b"u.");
    program
}

fn text(text: &str) -> Vec<u8> {
    [b"X".as_slice(), &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

fn number(value: u64) -> Vec<u8> {
    [b"\x8a\x08".as_slice(), &value.to_le_bytes()].concat()
}

fn numbers(values: &[u64]) -> Vec<u8> {
    [b"(".to_vec(), values.iter().copied().flat_map(number).collect(), b"t".to_vec()].concat()
}

/// An archive of uncompressed records.
fn zip(records: &[(String, Vec<u8>)]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in records {
        let (start, len) = ((file.len() as u32).to_le_bytes(), (content.len() as u32).to_le_bytes());
        let name_len = (name.len() as u16).to_le_bytes();
        file.extend([b"PK\x03\x04".as_slice(), &[0; 14], &len, &len, &name_len, &[0; 2], name.as_bytes()].concat());
        file.extend(content);
        directory.extend([b"PK\x01\x02".as_slice(), &[0; 16], &len, &len, &name_len, &[0; 12], &start].concat());
        directory.extend(name.as_bytes());
    }
    let (count, start) = ((records.len() as u16).to_le_bytes(), (file.len() as u32).to_le_bytes());
    let len = (directory.len() as u32).to_le_bytes();
    file.extend(
        [directory, [b"PK\x05\x06".as_slice(), &[0; 4], &count, &count, &len, &start, &[0; 2]].concat()].concat(),
    );
    file
}
