//! Where a pass can go on after its process died: hidden states and everything observed, after some layer, in one file.
//!
//! The file is a line of JSON (which run, which layer, lengths, SHA-256 of the rest) and then the bytes. It is written to a temporary
//! name, synced and renamed, so that there is always a whole one; one that is damaged or of another run is not used.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{IoContext, Result, WorkerError};
use crate::files::{part_path, put_in_place};

/// Version of the file; another is not read.
const SCHEMA: u32 = 1;
/// Longest first line of a file of ours, bytes.
const MAX_HEADER: usize = 4096;

/// A run's save point.
pub struct SavePoints {
    path: PathBuf,
    run: String,
    every: Duration,
    last: Instant,
}

/// What is saved.
#[derive(Debug, PartialEq, Eq)]
pub struct SavePoint {
    /// The first layer that is still to be computed.
    pub next_layer: usize,
    /// Hidden states of all tokens, `[tokens, hidden]`, little-endian in the dtype of the forward pass.
    pub hidden: Vec<u8>,
    /// What each observer has seen.
    pub observed: Vec<Vec<u8>>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    schema: u32,
    run: String,
    next_layer: usize,
    /// Bytes of the hidden states, then of what each observer has seen.
    lengths: Vec<usize>,
    sha256: String,
}

impl SavePoints {
    /// In the file `path`. `run` names everything that the numbers depend on: a save point of another run is not used.
    pub fn new(path: PathBuf, run: String, every: Duration) -> Self {
        Self { path, run, every, last: Instant::now() }
    }

    /// Whether enough time has passed since the last one to pay for another.
    pub fn is_due(&self) -> bool {
        self.last.elapsed() >= self.every
    }

    /// Writes one in place of the last.
    ///
    /// # Errors
    /// Storage.
    pub fn save(&mut self, point: &SavePoint) -> Result<()> {
        let parts = || std::iter::once(&point.hidden).chain(&point.observed);
        let header = Header {
            schema: SCHEMA,
            run: self.run.clone(),
            next_layer: point.next_layer,
            lengths: parts().map(Vec::len).collect(),
            sha256: hash(point.next_layer, parts()),
        };
        let line = serde_json::to_string(&header).map_err(|e| WorkerError::internal(format!("save point: {e}")))?;
        let part = part_path(&self.path);
        let mut file = File::create(&part).at("create", &part)?;
        writeln!(file, "{line}").at("write", &part)?;
        for bytes in parts() {
            file.write_all(bytes).at("write", &part)?;
        }
        put_in_place(&file, &part, &self.path)?;
        self.last = Instant::now();
        Ok(())
    }

    /// The save point of this run; `None` if there is none.
    ///
    /// # Errors
    /// Why the one that is there cannot be used, in words.
    pub fn load(&self) -> std::result::Result<Option<SavePoint>, String> {
        let bytes = match fs::read(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|e| e.to_string())?,
        };
        let end = bytes.iter().take(MAX_HEADER).position(|b| *b == b'\n').ok_or("it has no first line")?;
        let (line, payload) = (&bytes[..end], &bytes[end + 1..]);
        let header: Header = serde_json::from_slice(line).map_err(|e| e.to_string())?;
        if header.schema != SCHEMA || header.run != self.run {
            return Err("it belongs to another run".to_owned());
        }
        let whole = header.lengths.iter().try_fold(0usize, |sum, n| sum.checked_add(*n));
        if whole != Some(payload.len()) || hash(header.next_layer, std::iter::once(payload)) != header.sha256 {
            return Err("it is damaged".to_owned());
        }
        let mut rest = payload;
        let mut parts = header.lengths.iter().map(|n| rest.split_off(..*n).expect("the lengths add up").to_vec());
        let hidden = parts.next().ok_or("it holds no hidden states")?;
        Ok(Some(SavePoint { next_layer: header.next_layer, hidden, observed: parts.collect() }))
    }

    /// Takes it away: the run is complete.
    ///
    /// # Errors
    /// Storage.
    pub fn remove(path: &Path) -> Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(WorkerError::io("remove", path, &error)),
            _ => Ok(()),
        }
    }
}

fn hash(next_layer: usize, parts: impl Iterator<Item = impl AsRef<[u8]>>) -> String {
    let start = Sha256::new().chain_update((next_layer as u64).to_le_bytes());
    format!("{:x}", parts.fold(start, |hash, part| hash.chain_update(part)).finalize())
}

/// A tensor's values, little-endian in its own dtype.
///
/// # Errors
/// Device.
pub fn to_bytes(x: &Tensor) -> Result<Vec<u8>> {
    let flat = x.flatten_all()?;
    Ok(match x.dtype() {
        DType::F32 => bytemuck::cast_slice(&flat.to_vec1::<f32>()?).to_vec(),
        DType::BF16 => bytemuck::cast_slice(&flat.to_vec1::<bf16>()?).to_vec(),
        DType::F16 => bytemuck::cast_slice(&flat.to_vec1::<f16>()?).to_vec(),
        other => return Err(WorkerError::internal(format!("no forward pass in {other:?}"))),
    })
}

/// The reverse of [`to_bytes`].
///
/// # Errors
/// Internal: the bytes are of another number than the shape says. Device.
pub fn from_bytes(bytes: &[u8], dtype: DType, shape: &[usize], device: &Device) -> Result<Tensor> {
    if bytes.len() != shape.iter().product::<usize>() * dtype.size_in_bytes() {
        return Err(WorkerError::internal(format!("{} bytes are no {dtype:?} {shape:?}", bytes.len())));
    }
    Ok(Tensor::from_raw_buffer(bytes, dtype, shape, device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(folder: &Path, run: &str) -> SavePoints {
        SavePoints::new(folder.join("savepoint"), run.to_owned(), Duration::ZERO)
    }

    fn point() -> SavePoint {
        SavePoint { next_layer: 7, hidden: vec![1, 2, 3, 10, 13], observed: vec![vec![], vec![9; 300]] }
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let mut points = points(folder.path(), "a");
        assert_eq!(points.load(), Ok(None));
        points.save(&point()).unwrap();
        points.save(&SavePoint { next_layer: 8, ..point() }).unwrap();
        assert_eq!(points.load(), Ok(Some(SavePoint { next_layer: 8, ..point() })));
        SavePoints::remove(&folder.path().join("savepoint")).unwrap();
        SavePoints::remove(&folder.path().join("savepoint")).unwrap();
        assert_eq!(points.load(), Ok(None));
    }

    #[test]
    fn another_runs_or_a_damaged_one_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        points(folder.path(), "a").save(&point()).unwrap();
        assert!(points(folder.path(), "b").load().unwrap_err().contains("another run"));
        let path = folder.path().join("savepoint");
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x20;
            fs::write(&path, &bytes).unwrap();
            // A change in the header may be without consequence (white space); never may it give other numbers.
            if let Ok(loaded) = points(folder.path(), "a").load() {
                assert_eq!(loaded, Some(point()), "byte {at}");
            }
            fs::write(&path, &whole[..at]).unwrap();
            assert!(points(folder.path(), "a").load().is_err(), "cut at {at}");
        }
    }

    #[test]
    fn tensors_survive_bit_for_bit() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let x = Tensor::arange(0f32, 12.0, &Device::Cpu).unwrap().affine(0.37, -1.9).unwrap();
            let x = x.reshape((3, 4)).unwrap().to_dtype(dtype).unwrap();
            let back = from_bytes(&to_bytes(&x).unwrap(), dtype, &[3, 4], &Device::Cpu).unwrap();
            assert_eq!(to_bytes(&back).unwrap(), to_bytes(&x).unwrap());
        }
        assert!(from_bytes(&[0; 7], DType::F32, &[2], &Device::Cpu).is_err());
    }
}
