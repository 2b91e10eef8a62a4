//! Reads and decodes tensors into reused memory. A new buffer costs more than decoding into it,
//! since the system clears and maps its pages, and the allocator keeps part of the old ones.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};

use crate::blocks::weights::UnitTensors;
use crate::checkpoint::dtype::{self, Encoded};
use crate::checkpoint::safetensors::StoredDtype;
use crate::checkpoint::source::WeightSource;
use crate::checkpoint::{Format, Model, StoredTensor, TensorRange};
use crate::device::gpu::{HostToDevice, UploadFence};
use crate::error::{Result, WorkerError};
use crate::kernels::product;
use crate::model::decoder::Need;
use crate::pass::meter::{Clock, Subject, Work};

/// Reads and decodes tensors of one model, one at a time.
pub struct Loader<'a> {
    model: &'a Model<'a>,
    compute: DType,
    target: DecodeTarget<'a>,
    clock: Clock<'a>,
    subject: Subject,
    values: Vec<u8>,
    scales: Vec<u8>,
    beside: Vec<u8>,
}

/// A unit's tensors, and the memory to return once nothing uses them.
pub struct LoadedUnit {
    /// Tensors by role and expert.
    pub tensors: UnitTensors,
    /// Memory for [`TensorPool::give_back`].
    pub memory: Vec<Tensor>,
}

/// A value whose tensors may still be being uploaded to a GPU.
#[must_use]
pub struct PendingUpload<T> {
    // Dropped first: memory must not be released before the upload into it is complete.
    upload_fence: Option<UploadFence>,
    value: T,
}

impl<T> PendingUpload<T> {
    /// Waits for the upload. GPU work submitted afterwards sees the values.
    ///
    /// # Errors
    /// Checkpoint: a value decoded on a GPU does not fit its dtype; the message names the tensor.
    /// Errors of the driver.
    pub fn wait(self) -> Result<T> {
        let Self { upload_fence, value } = self;
        upload_fence.map(UploadFence::wait).transpose()?;
        Ok(value)
    }
}

impl<'a> Loader<'a> {
    /// Decodes for a pass in `compute` on `device`, into memory from `pool` if it has some.
    /// `clock` measures the times.
    ///
    /// # Errors
    /// Device: the GPU is unusable.
    pub fn new(
        model: &'a Model<'a>,
        compute: DType,
        device: &'a Device,
        pool: &'a TensorPool,
        clock: Clock<'a>,
    ) -> Result<Self> {
        let target = DecodeTarget { host_to_device: HostToDevice::to(device)?, pool, device };
        let (subject, values, scales, beside) = Default::default();
        Ok(Self { model, compute, target, clock, subject, values, scales, beside })
    }

    /// Sets the subject of the times that are measured from now on.
    pub fn about(&mut self, subject: Subject) {
        self.subject = subject;
    }

    /// Loads tensors of a layer.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    pub fn unit(&mut self, layer: usize, needs: &[Need]) -> Result<PendingUpload<LoadedUnit>> {
        let mut tensors = HashMap::with_capacity(needs.len());
        let mut memory = Vec::new();
        let loaded = needs.iter().try_for_each(|need| {
            let decoded = self.decoded(layer, need)?;
            memory.extend(TensorPool::takes(&decoded.tensor).then(|| decoded.tensor.clone()));
            tensors.insert((need.role, need.expert), decoded.out_by_in()?);
            Ok(())
        });
        // The fence also covers tensors decoded before an error.
        let unit = self.on_its_way(LoadedUnit { tensors: UnitTensors::new(tensors), memory })?;
        loaded.map(|()| unit)
    }

    /// Loads one tensor. A tensor stored as `[in, out]` is returned as a transposed view, since
    /// products accept either order.
    ///
    /// # Errors
    /// Errors of the source; a value is not finite; the message names the tensor.
    pub fn tensor(&mut self, layer: usize, need: &Need) -> Result<PendingUpload<Tensor>> {
        let tensor = self.decoded(layer, need)?.out_by_in()?;
        self.on_its_way(tensor)
    }

    fn on_its_way<T>(&mut self, value: T) -> Result<PendingUpload<T>> {
        let upload_fence = self.target.host_to_device.as_mut().map(HostToDevice::upload_fence).transpose()?;
        Ok(PendingUpload { upload_fence, value })
    }

    fn decoded(&mut self, layer: usize, need: &Need) -> Result<Decoded> {
        let stored = self.model.stored(layer, need);
        let (source, input_major) = (self.model.source, stored.input_major);
        let mut shape = need.shape.clone();
        if input_major {
            shape.reverse();
        }
        let dtype = stored.kept_as(self.compute, need.is_matrix() && product::takes_bf16(self.target.device));
        if stored.format == Format::Plain
            && let Some(read) = self.read_to_gpu(&stored.values, &shape, dtype)
        {
            return Ok(Decoded { tensor: read?, input_major });
        }
        self.clock.time_about(Work::Reading, self.subject.clone(), || -> Result<()> {
            read(source, &stored.values, &mut self.values)?;
            for (piece, into) in [(&stored.scales, &mut self.scales), (&stored.beside, &mut self.beside)] {
                into.clear();
                piece.as_ref().map_or(Ok(()), |piece| read(source, piece, into))?;
            }
            Ok(())
        })?;
        let encoded = encoded(&stored, [&self.values, &self.scales, &self.beside], &shape)?;
        let name = &stored.values.entry.name;
        let target = &mut self.target;
        let decode = || target.decode(&encoded, &shape, dtype, name);
        let tensor = self.clock.time_about(Work::Decoding, self.subject.clone(), decode)?;
        Ok(Decoded { tensor, input_major })
    }

    /// Reads plain floats into the pinned memory through which they go to a GPU; `None` for the
    /// CPU, and if the source does not read parts of this tensor.
    fn read_to_gpu(&mut self, values: &TensorRange<'_>, shape: &[usize], dtype: DType) -> Option<Result<Tensor>> {
        let (source, TensorRange { entry, range }) = (self.model.source, values);
        let host_to_device = self.target.host_to_device.as_mut().filter(|_| source.reads_parts(entry))?;
        let read = |part: Range<usize>, into: &mut [u8]| {
            let part = range.start + part.start as u64..range.start + part.end as u64;
            self.clock.time(Work::Reading, || source.read(entry, part, into))
        };
        let stored = (&entry.dtype, (range.end - range.start) as usize);
        let decode = || host_to_device.decode_read(stored, shape, dtype, &entry.name, read);
        Some(self.clock.time_about(Work::Decoding, self.subject.clone(), decode))
    }

    /// Loads some rows of a stored matrix of plain floats.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    pub fn rows(&mut self, stored: &StoredTensor<'_>, rows: &Range<usize>) -> Result<PendingUpload<Tensor>> {
        let values = rows_of(stored, rows);
        let shape = [rows.len(), values.entry.shape[1] as usize];
        let dtype = stored.kept_as(self.compute, product::takes_bf16(self.target.device));
        if let Some(tensor) = self.read_to_gpu(&values, &shape, dtype) {
            return self.on_its_way(tensor?);
        }
        let mut bytes = std::mem::take(&mut self.values);
        self.clock.time(Work::Reading, || read(self.model.source, &values, &mut bytes))?;
        let decoded = self.decode_rows(stored, rows, &bytes);
        self.values = bytes;
        decoded
    }

    /// As [`rows`](Self::rows), from bytes that were read before.
    ///
    /// # Errors
    /// A value is not finite; the message names the tensor.
    pub fn decode_rows(
        &mut self,
        stored: &StoredTensor<'_>,
        rows: &Range<usize>,
        bytes: &[u8],
    ) -> Result<PendingUpload<Tensor>> {
        let entry = stored.values.entry;
        let encoded = Encoded::Plain { dtype: &entry.dtype, bytes };
        let shape = [rows.len(), entry.shape[1] as usize];
        let dtype = stored.kept_as(self.compute, product::takes_bf16(self.target.device));
        self.upload(&encoded, &shape, dtype, &entry.name)
    }

    /// Plain floats that were read before, as a tensor of `shape` in the dtype of the pass. `name`
    /// is the tensor's in errors.
    ///
    /// # Errors
    /// A value is not finite, or too large for the dtype of the pass; the message names the tensor.
    pub fn decode_floats(
        &mut self,
        stored: &StoredDtype,
        bytes: &[u8],
        shape: &[usize],
        name: &str,
    ) -> Result<PendingUpload<Tensor>> {
        self.upload(&Encoded::Plain { dtype: stored, bytes }, shape, self.compute, name)
    }

    fn upload(
        &mut self,
        encoded: &Encoded<'_>,
        shape: &[usize],
        dtype: DType,
        name: &str,
    ) -> Result<PendingUpload<Tensor>> {
        let target = &mut self.target;
        let tensor = self.clock.time(Work::Decoding, || target.decode(encoded, shape, dtype, name))?;
        self.on_its_way(tensor)
    }
}

/// The path of decoded values to their device.
struct DecodeTarget<'a> {
    /// Set for a GPU.
    host_to_device: Option<HostToDevice>,
    pool: &'a TensorPool,
    device: &'a Device,
}

impl DecodeTarget<'_> {
    fn decode(&mut self, encoded: &Encoded<'_>, shape: &[usize], dtype: DType, name: &str) -> Result<Tensor> {
        match &mut self.host_to_device {
            Some(host_to_device) => host_to_device.decode(encoded, shape, dtype, name),
            None => self.pool.decode(encoded, shape, dtype, self.device, name),
        }
    }
}

/// A tensor in its stored shape.
struct Decoded {
    tensor: Tensor,
    input_major: bool,
}

impl Decoded {
    fn out_by_in(self) -> Result<Tensor> {
        Ok(if self.input_major { self.tensor.t()? } else { self.tensor })
    }
}

/// Byte ranges of some rows of a stored matrix.
pub fn rows_of<'a>(stored: &StoredTensor<'a>, rows: &Range<usize>) -> TensorRange<'a> {
    let entry = stored.values.entry;
    let row_bytes = entry.len / entry.shape[0];
    TensorRange { entry, range: rows.start as u64 * row_bytes..rows.end as u64 * row_bytes }
}

/// Fills `into` with the bytes of a piece.
///
/// # Errors
/// Errors of the source.
pub fn read(source: &dyn WeightSource, piece: &TensorRange<'_>, into: &mut Vec<u8>) -> Result<()> {
    into.resize((piece.range.end - piece.range.start) as usize, 0);
    source.read(piece.entry, piece.range.clone(), into)
}

/// The bytes of a tensor's pieces in their stored format.
fn encoded<'b>(
    stored: &'b StoredTensor<'_>,
    [values, scales, beside]: [&'b [u8]; 3],
    shape: &[usize],
) -> Result<Encoded<'b>> {
    let dtype = &stored.values.entry.dtype;
    let scale_dtype = stored.scales.as_ref().map_or(dtype, |piece| &piece.entry.dtype);
    Ok(match stored.format {
        Format::Plain => Encoded::Plain { dtype, bytes: values },
        Format::Fp8Blocks { block } => {
            Encoded::Fp8Blocks { bytes: values, scales, scale_dtype, shape: [shape[0], shape[1]], block }
        }
        Format::Mxfp4 => Encoded::Mxfp4 { blocks: values, scales },
        Format::Int4 { group } => {
            check_shape(stored, beside, shape)?;
            Encoded::Int4 { codes: values, scales, scale_dtype, group }
        }
        Format::Nvfp4 { divided } => {
            let number = beside.first_chunk().map_or(f32::NAN, |bytes| f32::from_le_bytes(*bytes));
            let whole = if divided { number.recip() } else { number };
            Encoded::Nvfp4 { blocks: values, scales, whole }
        }
    })
}

/// Checks the stored shape of packed integers, two whole numbers, against the expected one.
fn check_shape(stored: &StoredTensor<'_>, bytes: &[u8], shape: &[usize]) -> Result<()> {
    // The shape is stored as I32 or I64.
    let found: Vec<u64> = if bytes.len() == 2 * size_of::<u64>() {
        bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
    } else {
        bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word).into()).collect()
    };
    if found.iter().copied().eq(shape.iter().map(|&n| n as u64)) {
        return Ok(());
    }
    let name = &stored.values.entry.name;
    Err(WorkerError::checkpoint(format!("tensor {name} is packed from shape {found:?}, expected {shape:?}"))
        .hint("the checkpoint is damaged: fetch it again, or report it to its authors"))
}

/// Reusable memory of matrices on the CPU.
#[derive(Default)]
pub struct TensorPool {
    /// Maximum bytes of matrices, in use and free together. Above it free ones are dropped.
    limit: u64,
    matrices: Mutex<Matrices>,
}

#[derive(Default)]
struct Matrices {
    /// Free matrices, the longest unused first.
    free: VecDeque<Tensor>,
    free_bytes: u64,
    used_bytes: u64,
}

impl TensorPool {
    /// A pool of at most `limit` bytes, matrices in use included.
    pub fn new(limit: u64) -> Self {
        Self { limit, matrices: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Matrices> {
        self.matrices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a tensor's memory can be reused. Vectors may be kept by blocks.
    fn takes(tensor: &Tensor) -> bool {
        tensor.device().is_cpu() && tensor.rank() == 2
    }

    fn decode(
        &self,
        encoded: &Encoded<'_>,
        shape: &[usize],
        compute: DType,
        device: &Device,
        name: &str,
    ) -> Result<Tensor> {
        let free = (device.is_cpu() && shape.len() == 2).then(|| self.take(shape, compute)).flatten();
        match free {
            Some(tensor) => dtype::decode_into(encoded, &tensor, name).map(|()| tensor),
            None => dtype::decode(encoded, shape, compute, device, name),
        }
    }

    /// A free matrix of this shape; `None` after making room for a new one.
    fn take(&self, shape: &[usize], compute: DType) -> Option<Tensor> {
        let mut matrices = self.lock();
        let bytes = (shape[0] * shape[1] * compute.size_in_bytes()) as u64;
        matrices.used_bytes += bytes;
        let found = matrices.free.iter().position(|free| free.dims() == shape && free.dtype() == compute);
        if let Some(at) = found {
            matrices.free_bytes -= bytes;
            return matrices.free.remove(at);
        }
        matrices.keep_within(self.limit);
        None
    }

    /// Takes back [`LoadedUnit::memory`]. Neither it nor a view of it may be in use: it will be
    /// overwritten.
    pub fn give_back(&self, memory: impl IntoIterator<Item = Tensor>) {
        let mut matrices = self.lock();
        for tensor in memory.into_iter().filter(Self::takes) {
            let bytes = bytes_of(&tensor);
            matrices.used_bytes = matrices.used_bytes.saturating_sub(bytes);
            matrices.free_bytes += bytes;
            matrices.free.push_back(tensor);
        }
        matrices.keep_within(self.limit);
    }
}

impl Matrices {
    fn keep_within(&mut self, limit: u64) {
        while self.used_bytes + self.free_bytes > limit {
            let Some(oldest) = self.free.pop_front() else { return };
            self.free_bytes -= bytes_of(&oldest);
        }
    }
}

fn bytes_of(tensor: &Tensor) -> u64 {
    (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(pool: &TensorPool, values: &[f32], shape: &[usize]) -> Tensor {
        let encoded = Encoded::Plain { dtype: &StoredDtype::F32, bytes: bytemuck::cast_slice(values) };
        pool.decode(&encoded, shape, DType::F32, &Device::Cpu, "t").unwrap()
    }

    #[test]
    fn memory_is_reused_only_for_the_same_shape() {
        let pool = TensorPool::new(1 << 20);
        let first = decoded(&pool, &[1.0, 2.0, 3.0, 4.0], &[2, 2]);
        let id = first.id();
        pool.give_back([first]);
        assert_ne!(decoded(&pool, &[1.0, 2.0, 3.0, 4.0], &[1, 4]).id(), id);
        let again = decoded(&pool, &[5.0, 6.0, 7.0, 8.0], &[2, 2]);
        assert_eq!(again.id(), id);
        assert_eq!(again.to_vec2::<f32>().unwrap(), [[5.0, 6.0], [7.0, 8.0]]);
    }

    #[test]
    fn kept_memory_is_bounded() {
        let pool = TensorPool::new(40);
        let tensors: Vec<Tensor> = (0..3).map(|_| decoded(&pool, &[1.0; 4], &[2, 2])).collect();
        pool.give_back(tensors);
        let matrices = pool.lock();
        assert_eq!((matrices.free_bytes, matrices.used_bytes, matrices.free.len()), (32, 0, 2));
    }
}
