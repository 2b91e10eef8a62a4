//! Reads `pytorch_model.bin`, the published format of OPT and GPT-J: a zip archive with a pickle
//! of names, shapes and strides (`data.pkl`), and one uncompressed record of raw values per
//! storage (`data/0`, `data/1`, ...).
//!
//! Such files are programs in general; here they are read as data. The pickle reader is part of
//! this program because files are untrusted: candle's panics on short argument lists and copies
//! memoised values, so that a few bytes become gigabytes. Only byte ranges of a file are read,
//! from a disk or a hub alike, and few of them: its end, its directory, the pickle.

mod bytes;
mod pickle;
mod zip;

use std::collections::HashSet;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::checkpoint::placeholder;
use crate::checkpoint::safetensors::{HeaderTensor, StoredDtype, element_count, shown};
use crate::error::{IoContext, Result, WorkerError};
use crate::files::open_regular;
use pickle::View;
use zip::{Archive, ArchiveEntry};

/// Reads a range of a file completely, or fails.
pub type ReadRange<'a> = &'a dyn Fn(Range<u64>) -> Result<Vec<u8>>;

/// Maximum bytes of a pickle: dozens of times a published shard's, and at most half a gigabyte
/// when unpickled.
const MAX_PICKLE_BYTES: u64 = 8 << 20;
/// Maximum bytes of a tensor that repeats values of a smaller record.
const MAX_REPEATED_BYTES: u64 = 1 << 30;
/// Maximum number of tensors in one file.
const MAX_TENSORS: usize = 1 << 20;
/// Start of the older format without archives: a pickled magic number.
const LEGACY_MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

/// The tensors of a file, checked against the archive's directory.
pub struct Contents {
    archive: Archive,
    tensors: Vec<Placed>,
}

/// A tensor, its record, and its offset there.
struct Placed {
    tensor: HeaderTensor,
    record: usize,
}

impl Contents {
    /// Reads the tensors of a file of `file_len` bytes, without weights.
    ///
    /// # Errors
    /// Kind `Checkpoint`: not such an archive, damaged, or a pickle that needs more than tensors;
    /// `Unsupported` for the format of PyTorch before 1.6. The caller adds the file's name.
    pub fn read(file_len: u64, read: ReadRange<'_>) -> Result<Self> {
        let archive = Archive::read(file_len, read).map_err(|error| explained(file_len, read).unwrap_or(error))?;
        let (folder, pickle) = the_pickle(&archive)?;
        let program = archive.contents(pickle, MAX_PICKLE_BYTES, read)?;
        // The record follows the pickle, where read-ahead has fetched it.
        refuse_big_endian(&archive, folder, read)?;
        let views = pickle::state_dict(&program)?;
        let tensors = views.iter().map(|view| place(view, folder, &archive)).collect::<Result<Vec<_>>>()?;
        refuse_duplicates(&tensors)?;
        Ok(Self { archive, tensors })
    }

    /// The tensors with the offsets of their first bytes in the file. Tensors may share bytes, as
    /// tied weights do.
    ///
    /// # Errors
    /// Kind `Checkpoint` if a record is not where the directory says.
    pub fn located(self, read: ReadRange<'_>) -> Result<Vec<HeaderTensor>> {
        let mut starts: Vec<Option<u64>> = vec![None; self.archive.records().len()];
        let locate = |Placed { mut tensor, record }| {
            let start = match starts[record] {
                Some(start) => start,
                None => *starts[record].insert(self.archive.data_start(&self.archive.records()[record], read)?),
            };
            tensor.offset += start;
            Ok(tensor)
        };
        self.tensors.into_iter().map(locate).collect()
    }

    /// The tensors without file offsets: `offset` is relative to the beginning of the record's
    /// header. Requesting the header lengths of hundreds of records from a hub would take too
    /// long.
    pub fn outlined(self) -> Vec<HeaderTensor> {
        let outline = |Placed { mut tensor, record }| {
            tensor.offset += self.archive.records()[record].header;
            tensor
        };
        self.tensors.into_iter().map(outline).collect()
    }
}

/// The tensors of a file on disk. Only the directory and the pickle are read.
///
/// # Errors
/// Kind `Storage` if the file cannot be read, else as [`Contents::read`]; both name the file.
pub fn read_tensors(path: &Path) -> Result<Vec<HeaderTensor>> {
    let file = open_regular(path).at("open", path)?;
    let file_len = file.metadata().at("read the size of", path)?.len();
    let read = |range: Range<u64>| {
        // Callers have checked the range against the file's size, and its length against a limit.
        let mut bytes = vec![0; (range.end - range.start) as usize];
        file.read_exact_at(&mut bytes, range.start).at("read", path)?;
        Ok(bytes)
    };
    let tensors = Contents::read(file_len, &read).and_then(|contents| contents.located(&read));
    tensors.map_err(|error| error.context(path.display()))
}

fn damaged(message: impl Into<String>) -> WorkerError {
    WorkerError::checkpoint(message).hint("the file is damaged or incomplete: fetch it again")
}

/// The specific error of a file that is not an archive: another kind of file, or the older format.
fn explained(file_len: u64, read: ReadRange<'_>) -> Option<WorkerError> {
    let start = read(0..file_len.min(placeholder::ENOUGH as u64)).ok()?;
    if let Err(error) = placeholder::refuse(&start) {
        return Some(error);
    }
    let message = "it is in the format of PyTorch before 1.6, which has no directory of its tensors";
    let hint = "convert it to safetensors, or choose a revision of the model that has them";
    start.starts_with(LEGACY_MAGIC).then(|| WorkerError::unsupported(message).hint(hint))
}

/// Known checkpoints are little-endian. A file that declares big-endian values is refused.
fn refuse_big_endian(archive: &Archive, folder: &str, read: ReadRange<'_>) -> Result<()> {
    let Some((_, record)) = archive.find(&format!("{folder}/byteorder")) else { return Ok(()) };
    if archive.contents(record, 16, read)? == b"little" {
        return Ok(());
    }
    Err(WorkerError::unsupported("its values are stored most significant byte first")
        .hint("save it again on a common machine, as safetensors"))
}

/// The archive's single folder, and the pickle in it.
fn the_pickle(archive: &Archive) -> Result<(&str, &ArchiveEntry)> {
    let folder = |record: &'_ ArchiveEntry| record.name.strip_suffix("/data.pkl").is_some_and(|f| !f.contains('/'));
    let mut found = archive.records().iter().filter(|record| folder(record));
    match (found.next(), found.next()) {
        (Some(record), None) => Ok((record.name.trim_end_matches("/data.pkl"), record)),
        (None, _) => Err(WorkerError::checkpoint("it is a zip archive without a data.pkl")
            .hint("this is not a PyTorch checkpoint: choose another file or revision")),
        (Some(_), Some(_)) => Err(damaged("it holds two files called data.pkl")),
    }
}

/// Checks a tensor against the record of its storage.
fn place(view: &View<'_>, folder: &str, archive: &Archive) -> Result<Placed> {
    let wrong = |what: String| damaged(format!("tensor {}: {what}", shown(view.name)));
    let pickle::Storage { element, key, values } = view.storage;
    let name = format!("{folder}/data/{key}");
    let Some((number, record)) = archive.find(&name) else {
        return Err(wrong(format!("the archive has no record {}", shown(&name))));
    };
    record.check_stored()?;
    if values.checked_mul(element.size) != Some(record.len) {
        let (dtype, len) = (element.dtype(), record.len);
        return Err(wrong(format!(
            "{values} values of {dtype} do not fill the {len} bytes of record {}",
            shown(&name)
        )));
    }
    let Some(count) = element_count(&view.shape) else {
        return Err(wrong(format!("its shape {:?} overflows", view.shape)));
    };
    let Some(span) = view.span().filter(|span| view.offset.checked_add(*span).is_some_and(|end| end <= values)) else {
        let View { shape, strides, offset, .. } = view;
        let what = format!("shape {shape:?} with strides {strides:?} from {offset} leaves its {values} values");
        return Err(wrong(what));
    };
    let spread = !view.is_contiguous();
    // A tensor that overlaps itself may exceed its record, up to a limit.
    let most = values.max(MAX_REPEATED_BYTES / element.size);
    let dtype = match element.dtype() {
        dtype if view.altered => StoredDtype::Other(format!("{dtype}, negated or conjugated")),
        dtype if spread && (dtype.size().is_none() || count > most) => StoredDtype::strided(&dtype, &view.strides),
        dtype => dtype,
    };
    let strides = (spread && dtype.size().is_some()).then(|| view.strides.clone());
    let len = if strides.is_some() { count } else { span } * element.size;
    let offset = view.offset * element.size;
    let tensor = HeaderTensor { name: view.name.to_owned(), dtype, shape: view.shape.clone(), strides, offset, len };
    Ok(Placed { tensor, record: number })
}

fn refuse_duplicates(tensors: &[Placed]) -> Result<()> {
    if tensors.len() > MAX_TENSORS {
        return Err(damaged(format!("it holds {} tensors, over the limit of {MAX_TENSORS}", tensors.len())));
    }
    let mut seen = HashSet::with_capacity(tensors.len());
    match tensors.iter().find(|placed| !seen.insert(placed.tensor.name.as_str())) {
        None => Ok(()),
        Some(twice) => Err(damaged(format!("tensor {} appears twice", shown(&twice.tensor.name)))),
    }
}

#[cfg(test)]
pub(crate) mod tests;
