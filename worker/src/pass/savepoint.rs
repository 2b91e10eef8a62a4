//! Save points: the state of a pass after a layer (hidden states and observations) in one file,
//! from which a new process continues.
//!
//! The file is a line of JSON (run, layer, lengths, SHA-256 of the rest) followed by the bytes. It
//! is written to a temporary name, synced and renamed, so that a complete one always exists. A
//! damaged one, or that of another run, is not used.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{IoContext, Result, WorkerError};
use crate::files::{open_regular, part_path, put_in_place};

/// Version of the file format. Other versions are not read.
const SCHEMA: u32 = 8;
/// Maximum bytes of the first line.
const MAX_HEADER: u64 = 1 << 20;

/// The save point of a run.
pub struct SavePoints {
    path: PathBuf,
    run: String,
    every: Duration,
    last: Instant,
}

/// A loaded save point.
#[derive(Debug, PartialEq, Eq)]
pub struct SavePoint {
    /// The next layer to compute.
    pub next_layer: usize,
    /// Hidden states `[tokens, hidden]` per micro-batch, little-endian in the dtype of the pass.
    pub hidden: Vec<Vec<u8>>,
    /// State of the observer.
    pub observed: Vec<u8>,
    /// Names of the weight files verified so far.
    pub verified: Vec<String>,
}

/// Serialises a part of the state. Called twice, for the hash and for the bytes, so that one part
/// at a time is in memory.
pub type SerializePart<'a> = Box<dyn Fn() -> Result<Vec<u8>> + 'a>;

#[derive(Serialize, Deserialize)]
struct Header {
    schema: u32,
    run: String,
    next_layer: usize,
    /// Bytes of the hidden states per micro-batch.
    hidden: Vec<u64>,
    /// Bytes of the observer's state, which comes last.
    observed: u64,
    /// Names of the weight files verified so far.
    verified: Vec<String>,
    sha256: String,
}

impl SavePoints {
    /// A save point in the file `path`. `run` identifies everything that the numbers depend on: a
    /// save point of another run is not used.
    pub fn new(path: PathBuf, run: String, every: Duration) -> Self {
        Self { path, run, every, last: Instant::now() }
    }

    /// Whether `every` has passed since the last save.
    pub fn is_due(&self) -> bool {
        self.last.elapsed() >= self.every
    }

    /// Replaces the save point. `verified` are the names of the weight files verified so far.
    ///
    /// # Errors
    /// Storage; errors of a part.
    pub fn save(
        &mut self,
        next_layer: usize,
        hidden: Vec<SerializePart<'_>>,
        observed: SerializePart<'_>,
        verified: Vec<String>,
    ) -> Result<()> {
        let mut hash = Hash::new(next_layer, &verified);
        let mut length = |give: &SerializePart<'_>| -> Result<u64> { Ok(hash.add(&give()?)) };
        let header = Header {
            schema: SCHEMA,
            run: self.run.clone(),
            next_layer,
            hidden: hidden.iter().map(&mut length).collect::<Result<_>>()?,
            observed: length(&observed)?,
            verified,
            sha256: hash.hex(),
        };
        let line = serde_json::to_string(&header).map_err(|e| WorkerError::internal(format!("save point: {e}")))?;
        let part = part_path(&self.path);
        let mut file = File::create(&part).at("create", &part)?;
        writeln!(file, "{line}").at("write", &part)?;
        for give in hidden.iter().chain([&observed]) {
            file.write_all(&give()?).at("write", &part)?;
        }
        put_in_place(&file, &part, &self.path)?;
        self.last = Instant::now();
        Ok(())
    }

    /// Loads the save point of this run; `None` if there is none.
    ///
    /// # Errors
    /// The reason, as text, why the file cannot be used.
    pub fn load(&self) -> std::result::Result<Option<SavePoint>, String> {
        let mut file = match open_regular(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => BufReader::new(other.map_err(|e| e.to_string())?),
        };
        let mut line = Vec::new();
        (&mut file).take(MAX_HEADER).read_until(b'\n', &mut line).map_err(|e| e.to_string())?;
        let header: Header = serde_json::from_slice(&line).map_err(|e| e.to_string())?;
        if header.schema != SCHEMA || header.run != self.run {
            return Err("it belongs to another run".to_owned());
        }
        // Lengths are untrusted: no more is read than the file contains.
        let mut hash = Hash::new(header.next_layer, &header.verified);
        let mut part = |length: &u64| -> std::result::Result<Vec<u8>, String> {
            let mut bytes = Vec::new();
            (&mut file).take(*length).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
            let whole = hash.add(&bytes) == *length;
            if whole { Ok(bytes) } else { Err("it is damaged".to_owned()) }
        };
        let hidden = header.hidden.iter().map(&mut part).collect::<std::result::Result<_, _>>()?;
        let observed = part(&header.observed)?;
        if hash.hex() != header.sha256 {
            return Err("it is damaged".to_owned());
        }
        let Header { next_layer, verified, .. } = header;
        Ok(Some(SavePoint { next_layer, hidden, observed, verified }))
    }
}

/// SHA-256 over the next layer's index, and the names of verified files and all parts with their
/// lengths.
struct Hash(Sha256);

impl Hash {
    fn new(next_layer: usize, verified: &[String]) -> Self {
        let mut hash = Self(Sha256::new().chain_update((next_layer as u64).to_le_bytes()));
        for name in verified {
            hash.add(name.as_bytes());
        }
        hash
    }

    /// Adds a part. Returns its length.
    fn add(&mut self, part: &[u8]) -> u64 {
        let length = part.len() as u64;
        self.0.update(length.to_le_bytes());
        self.0.update(part);
        length
    }

    fn hex(self) -> String {
        format!("{:x}", self.0.finalize())
    }
}

/// The values of a tensor, little-endian in its dtype.
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
/// Internal: the number of bytes does not match the shape. Device.
pub fn from_bytes(bytes: &[u8], dtype: DType, shape: &[usize], device: &Device) -> Result<Tensor> {
    if bytes.len() != shape.iter().product::<usize>() * dtype.size_in_bytes() {
        return Err(WorkerError::internal(format!("{} bytes are no {dtype:?} {shape:?}", bytes.len())));
    }
    Ok(Tensor::from_raw_buffer(bytes, dtype, shape, device)?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::files::remove_if_there;

    fn points(folder: &Path, run: &str) -> SavePoints {
        SavePoints::new(folder.join("savepoint"), run.to_owned(), Duration::ZERO)
    }

    fn point(next_layer: usize) -> SavePoint {
        SavePoint {
            next_layer,
            hidden: vec![vec![1, 2, 3, 10, 13], vec![4]],
            observed: vec![9; 300],
            verified: vec!["a.safetensors".to_owned()],
        }
    }

    fn save(points: &mut SavePoints, point: &SavePoint) {
        let give = |part: &Vec<u8>| -> SerializePart<'static> {
            let part = part.clone();
            Box::new(move || Ok(part.clone()))
        };
        let hidden = point.hidden.iter().map(give).collect();
        points.save(point.next_layer, hidden, give(&point.observed), point.verified.clone()).unwrap();
    }

    #[test]
    fn save_points_round_trip() {
        let folder = tempfile::tempdir().unwrap();
        let mut points = points(folder.path(), "a");
        assert_eq!(points.load(), Ok(None));
        save(&mut points, &point(7));
        save(&mut points, &point(8));
        assert_eq!(points.load(), Ok(Some(point(8))));
        remove_if_there(&folder.path().join("savepoint")).unwrap();
        remove_if_there(&folder.path().join("savepoint")).unwrap();
        assert_eq!(points.load(), Ok(None));
    }

    #[test]
    fn failed_save_leaves_the_previous_save_point() {
        let folder = tempfile::tempdir().unwrap();
        let mut points = points(folder.path(), "a");
        save(&mut points, &point(7));
        let refuse: SerializePart<'_> = Box::new(|| Err(WorkerError::internal("no")));
        assert!(points.save(9, Vec::new(), refuse, Vec::new()).is_err());
        assert_eq!(points.load(), Ok(Some(point(7))));
    }

    #[test]
    fn foreign_or_damaged_save_point_is_ignored() {
        let folder = tempfile::tempdir().unwrap();
        save(&mut points(folder.path(), "a"), &point(7));
        assert!(points(folder.path(), "b").load().unwrap_err().contains("another run"));
        let path = folder.path().join("savepoint");
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x20;
            fs::write(&path, &bytes).unwrap();
            // A change of white space in the header may have no effect. Other changes must not
            // yield other numbers.
            if let Ok(loaded) = points(folder.path(), "a").load() {
                assert_eq!(loaded, Some(point(7)), "byte {at}");
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
