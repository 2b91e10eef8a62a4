//! From a source's bytes to tensors, in memory that is used again: a fresh buffer costs more than
//! decoding into it, since the system clears and maps its pages, and what the allocator keeps of
//! the old ones comes on top.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};

use crate::blocks::weights::UnitTensors;
use crate::checkpoint::dtype::{self, Encoded};
use crate::checkpoint::source::WeightSource;
use crate::checkpoint::{Format, Model, StoredTensor, TensorRange};
use crate::device::gpu::{HostToDevice, UploadFence};
use crate::error::{Result, WorkerError};
use crate::kernels::product;
use crate::model::decoder::Need;
use crate::pass::meter::{Clock, Subject, Work};

/// Reads and decodes tensors of one model, one after the other.
pub struct Loader<'a> {
    model: &'a Model<'a>,
    compute: DType,
    device: &'a Device,
    pool: &'a TensorPool,
    /// To a GPU.
    host_to_device: Option<HostToDevice>,
    clock: Clock<'a>,
    subject: Subject,
    values: Vec<u8>,
    scales: Vec<u8>,
    beside: Vec<u8>,
}

/// A unit's tensors, and the memory that is free once nothing uses them any more.
pub struct LoadedUnit {
    /// By role and expert.
    pub tensors: UnitTensors,
    /// For [`TensorPool::give_back`].
    pub memory: Vec<Tensor>,
}

/// Something whose values may still be on their way to a GPU.
#[must_use]
pub struct OnItsWay<T> {
    // Dropped first: what arrives must not be given back before it has.
    upload_fence: Option<UploadFence>,
    value: T,
}

impl<T> OnItsWay<T> {
    /// What its device is asked for from now on is done after the fence, for which this waits.
    ///
    /// # Errors
    /// Checkpoint: a value that was decoded on a GPU does not fit its dtype, by name. Device: the
    /// driver's.
    pub fn arrived(self) -> Result<T> {
        let Self { upload_fence, value } = self;
        upload_fence.map(UploadFence::wait).transpose()?;
        Ok(value)
    }
}

impl<'a> Loader<'a> {
    /// Decodes for a pass in `compute` on `device`, into memory from `pool` where there is some;
    /// `clock` is told how long everything takes.
    ///
    /// # Errors
    /// Device: a GPU that cannot be used.
    pub fn new(
        model: &'a Model<'a>,
        compute: DType,
        device: &'a Device,
        pool: &'a TensorPool,
        clock: Clock<'a>,
    ) -> Result<Self> {
        let (host_to_device, subject) = (HostToDevice::to(device)?, Subject::default());
        let (values, scales, beside) = Default::default();
        Ok(Self { model, compute, device, pool, host_to_device, clock, subject, values, scales, beside })
    }

    /// What the clock is told that all loading from now on is about.
    pub fn about(&mut self, subject: Subject) {
        self.subject = subject;
    }

    /// Tensors of a layer.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    pub fn unit(&mut self, layer: usize, needs: &[Need]) -> Result<OnItsWay<LoadedUnit>> {
        let mut tensors = HashMap::with_capacity(needs.len());
        let mut memory = Vec::new();
        let loaded = needs.iter().try_for_each(|need| {
            let decoded = self.decoded(layer, need)?;
            memory.extend(TensorPool::takes(&decoded.tensor).then(|| decoded.tensor.clone()));
            tensors.insert((need.role, need.expert), decoded.out_by_in()?);
            Ok(())
        });
        // Also of what came before an error.
        let unit = self.on_its_way(LoadedUnit { tensors: UnitTensors::new(tensors), memory })?;
        loaded.map(|()| unit)
    }

    /// One tensor. One that is stored `[in, out]` comes as a transposed view, since products take
    /// either order: nothing is moved.
    ///
    /// # Errors
    /// The source's; a value that is not finite, by name.
    pub fn tensor(&mut self, layer: usize, need: &Need) -> Result<OnItsWay<Tensor>> {
        let tensor = self.decoded(layer, need)?.out_by_in()?;
        self.on_its_way(tensor)
    }

    fn on_its_way<T>(&mut self, value: T) -> Result<OnItsWay<T>> {
        let upload_fence = self.host_to_device.as_mut().map(HostToDevice::upload_fence).transpose()?;
        Ok(OnItsWay { upload_fence, value })
    }

    fn decoded(&mut self, layer: usize, need: &Need) -> Result<Decoded> {
        let stored = self.model.stored(layer, need);
        let source = self.model.source;
        self.clock.time_about(Work::Reading, self.subject.clone(), || -> Result<()> {
            read(source, &stored.values, &mut self.values)?;
            for (piece, into) in [(&stored.scales, &mut self.scales), (&stored.beside, &mut self.beside)] {
                into.clear();
                piece.as_ref().map_or(Ok(()), |piece| read(source, piece, into))?;
            }
            Ok(())
        })?;
        let mut shape = need.shape.clone();
        if stored.input_major {
            shape.reverse();
        }
        let encoded = encoded(&stored, [&self.values, &self.scales, &self.beside], &shape)?;
        let name = &stored.values.entry.name;
        let dtype = stored.kept_as(self.compute, need.is_matrix() && product::takes_bf16(self.device));
        let way = Way { host_to_device: self.host_to_device.as_mut(), pool: self.pool, device: self.device };
        let decode = || way.decode(&encoded, &shape, dtype, name);
        let tensor = self.clock.time_about(Work::Decoding, self.subject.clone(), decode)?;
        Ok(Decoded { tensor, input_major: stored.input_major })
    }

    /// Some rows of a stored matrix of plain floats.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    pub fn rows(&mut self, stored: &StoredTensor<'_>, rows: &Range<usize>) -> Result<OnItsWay<Tensor>> {
        let mut bytes = std::mem::take(&mut self.values);
        self.clock.time(Work::Reading, || read(self.model.source, &rows_of(stored, rows), &mut bytes))?;
        let decoded = self.decode_rows(stored, rows, &bytes);
        self.values = bytes;
        decoded
    }

    /// The same from bytes that were read before.
    ///
    /// # Errors
    /// A value that is not finite, by name.
    pub fn decode_rows(
        &mut self,
        stored: &StoredTensor<'_>,
        rows: &Range<usize>,
        bytes: &[u8],
    ) -> Result<OnItsWay<Tensor>> {
        let entry = stored.values.entry;
        let encoded = Encoded::Plain { dtype: &entry.dtype, bytes };
        let shape = [rows.len(), entry.shape[1] as usize];
        let dtype = stored.kept_as(self.compute, product::takes_bf16(self.device));
        let way = Way { host_to_device: self.host_to_device.as_mut(), pool: self.pool, device: self.device };
        let tensor = self.clock.time(Work::Decoding, || way.decode(&encoded, &shape, dtype, &entry.name))?;
        self.on_its_way(tensor)
    }
}

/// How decoded values come to where they are computed with.
struct Way<'a> {
    host_to_device: Option<&'a mut HostToDevice>,
    pool: &'a TensorPool,
    device: &'a Device,
}

impl Way<'_> {
    fn decode(self, encoded: &Encoded<'_>, shape: &[usize], dtype: DType, name: &str) -> Result<Tensor> {
        match self.host_to_device {
            Some(host_to_device) => host_to_device.decode(encoded, shape, dtype, name),
            None => self.pool.decode(encoded, shape, dtype, self.device, name),
        }
    }
}

/// A tensor as it is stored.
struct Decoded {
    tensor: Tensor,
    input_major: bool,
}

impl Decoded {
    fn out_by_in(self) -> Result<Tensor> {
        Ok(if self.input_major { self.tensor.t()? } else { self.tensor })
    }
}

/// Some rows of a stored matrix, as stored.
pub fn rows_of<'a>(stored: &StoredTensor<'a>, rows: &Range<usize>) -> TensorRange<'a> {
    let entry = stored.values.entry;
    let row_bytes = entry.len / entry.shape[0];
    TensorRange { entry, range: rows.start as u64 * row_bytes..rows.end as u64 * row_bytes }
}

/// Fills `into` with the bytes of a piece.
///
/// # Errors
/// The source's.
pub fn read(source: &dyn WeightSource, piece: &TensorRange<'_>, into: &mut Vec<u8>) -> Result<()> {
    into.resize((piece.range.end - piece.range.start) as usize, 0);
    source.read(piece.entry, piece.range.clone(), into)
}

/// The bytes of a tensor's pieces, as what they are.
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

/// Refuses packed integers whose stored shape, two whole numbers, is another than the one
/// expected.
fn check_shape(stored: &StoredTensor<'_>, bytes: &[u8], shape: &[usize]) -> Result<()> {
    // As I32 or as I64.
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

/// Memory of matrices on the CPU that no computation needs any more.
#[derive(Default)]
pub struct TensorPool {
    /// Most bytes of matrices, in use and free together; when there are more, free ones are
    /// dropped.
    limit: u64,
    matrices: Mutex<Matrices>,
}

#[derive(Default)]
struct Matrices {
    /// The longest unused first.
    free: VecDeque<Tensor>,
    free_bytes: u64,
    used_bytes: u64,
}

impl TensorPool {
    /// Keeps `limit` bytes at most, those in use included.
    pub fn new(limit: u64) -> Self {
        Self { limit, matrices: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Matrices> {
        self.matrices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a tensor's memory is worth keeping. Vectors may live on in blocks that hold them.
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

    /// A free matrix; without one, room is made for a new one.
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

    /// Takes back what [`LoadedUnit::memory`] names. None of it may still be in use, nor any view
    /// of it: it will be overwritten.
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
    use crate::checkpoint::safetensors::StoredDtype;

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
