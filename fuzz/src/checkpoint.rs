//! Files of a published checkpoint.

use std::ops::Range;

use outliers_worker::checkpoint::safetensors::{Header, element_count};
use outliers_worker::checkpoint::source::{Container, WeightMap};
use outliers_worker::checkpoint::torch::Contents;
use outliers_worker::error::WorkerError;
use outliers_worker::model::arch;
use outliers_worker::model::decoder::{DecoderSpec, FfnSpec};
use serde_json::Value;

use crate::assert_harmless;

/// Most tensors that are listed here; the largest published checkpoints have a hundred thousand.
const MAX_TENSORS: usize = 1 << 17;

/// A safetensors file. If its header is accepted, the tensors tile the file, and only the header
/// was needed to know it.
pub fn header(file: &[u8]) {
    let len = file.len() as u64;
    let Some(header) = good(Header::parse(file, len)) else { return };
    let needed = Header::bytes_needed(file, len).expect("it was enough");
    let mut end = needed;
    for tensor in &header.tensors {
        assert_eq!(tensor.offset, end, "{tensor:?}");
        end += tensor.len;
        let values = element_count(&tensor.shape).expect("it was counted");
        assert!(tensor.dtype.size().is_none_or(|size| values * size == tensor.len), "{tensor:?}");
        assert!(header.tensor(&tensor.name).is_some());
    }
    assert_eq!(end, len);
    let alone = good(Header::parse(&file[..needed as usize], len));
    assert_eq!(alone, Some(header), "something behind the header counts");
}

/// A `pytorch_model.bin` with a pickle of any protocol. If it is accepted, the tensors can be
/// counted, and those without gaps are inside the file.
pub fn pickle(file: &[u8]) {
    let len = file.len() as u64;
    let read = |range: Range<u64>| {
        let bytes = file.get(range.start as usize..range.end as usize).map(<[u8]>::to_vec);
        bytes.ok_or_else(|| WorkerError::checkpoint("bytes outside the file"))
    };
    let Some(contents) = good(Contents::read(len, &read)) else { return };
    for tensor in good(contents.located(&read)).into_iter().flatten() {
        assert!(element_count(&tensor.shape).is_some(), "{tensor:?}");
        assert!(tensor.strides.is_some() || tensor.offset + tensor.len <= len, "{tensor:?}");
    }
}

/// A `config.json`. If it is accepted, the names and shapes of all its tensors can be computed.
pub fn config(text: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(text) else { return };
    let Some(architecture) = good(arch::read(&value)) else { return };
    let (names, spec) = (architecture.names, architecture.spec);
    if tensors(&spec) > MAX_TENSORS {
        return;
    }
    for (layer, need) in spec.needs() {
        let name = names.of(names.bases[0], layer, need.role, need.expert);
        assert!(!name.contains(['{', '}']), "{name}");
    }
}

/// Approximate number.
fn tensors(spec: &DecoderSpec) -> usize {
    let of = |ffn: &FfnSpec| match ffn {
        FfnSpec::Dense(_) | FfnSpec::None => 16,
        FfnSpec::Moe(moe) => 16 + 6 * moe.experts,
    };
    spec.layers.iter().map(|layer| of(&layer.ffn)).sum()
}

/// A list of shards.
pub fn index(text: &[u8]) {
    for container in [Container::Safetensors, Container::Torch] {
        let Some(map) = good(WeightMap::parse(text, container)) else { continue };
        let files = map.files();
        let plain = |file: &String| !file.contains(['/', '\\', '\0']) && !matches!(file.as_str(), "" | "." | "..");
        assert!(!files.is_empty() && files.iter().all(plain), "{files:?}");
        assert!(map.tensors().all(|(_, file)| files.iter().any(|known| known == file)));
    }
}

/// The accepted value; `None` after an error that is safe for a terminal.
pub(crate) fn good<T>(result: Result<T, WorkerError>) -> Option<T> {
    let error = match result {
        Ok(value) => return Some(value),
        Err(error) => error,
    };
    assert_harmless(error.message());
    assert!(error.message().len() < 8192, "a message of {} bytes", error.message().len());
    None
}
