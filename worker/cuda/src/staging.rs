//! Uploads stored weights to a GPU while it computes: bytes are copied through a ring of pinned
//! buffers and decoded on a separate stream.
//!
//! A copy from pageable memory goes through the driver's own buffer, and a copy on the compute
//! stream waits for earlier work there. The tensor library does not wait for other streams, so the
//! compute stream must wait on an [`UploadFence`] before it uses uploaded values.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{CUdeviceptr, CUevent_flags};
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtrMut, DriverError, PinnedHostSlice};

use crate::decode::{DecodeAddresses, EncodedChunk, Form, Number, StoredTensor, Value};

/// Bytes of a buffer, unless an indivisible piece is larger.
const BUFFER: usize = 16 << 20;
/// Number of buffers: one being filled, one being copied, and two more because small tensors come
/// between large ones.
const BUFFERS: usize = 4;
/// Bytes that are pinned for one way, unless a piece that cannot be divided takes more.
pub const PINNED: usize = BUFFERS * BUFFER;
/// Buffers of ways that have ended, kept for the next one because pinning memory is slow: a pass
/// has one way after another to the same GPU, for the embedding, the layers and the head.
static SPARE: Mutex<Vec<PinnedHostSlice<u8>>> = Mutex::new(Vec::new());
/// Notes that are allocated together.
const NOTES: usize = 512;
/// Most values per note: offsets have 32 bits.
const NOTED_TOGETHER: usize = 1 << 31;

/// Uploads to one GPU.
pub struct Staging {
    /// The compute stream, which uses the uploaded values.
    compute: Arc<CudaStream>,
    stream: Arc<CudaStream>,
    /// Stream for downloads; it does not wait for the other two.
    aside: Arc<CudaStream>,
    buffers: [Buffer; BUFFERS],
    /// Ring of buffers; the least recently filled is next.
    next: usize,
    /// GPU buffer for stored bytes that are not decoded in place.
    stored: Option<CudaSlice<u8>>,
    /// Notes about uploads since the last fence.
    notes: Vec<Notes>,
}

#[derive(Default)]
struct Buffer {
    memory: Option<PinnedHostSlice<u8>>,
    /// Event of the last copy from the buffer.
    copied: Option<CudaEvent>,
}

/// Notes on the GPU about values that do not fit their dtype.
struct Notes {
    /// One word per note, as in `decode.cu`.
    words: CudaSlice<u64>,
    about: Vec<Noted>,
}

/// The tensor and range of a note.
struct Noted {
    tensor: String,
    /// First value that the note covers.
    first: usize,
    dtype: &'static str,
}

/// The first value of a tensor that is out of range for its dtype.
#[derive(Clone, Debug, PartialEq)]
pub struct OutOfRangeValue {
    /// The tensor's name.
    pub tensor: String,
    /// Index of the value.
    pub at: usize,
    /// The value before rounding.
    pub value: f32,
    /// The target dtype: `f32`, `bf16` or `f16`.
    pub dtype: &'static str,
}

impl Staging {
    /// Uploads to the GPU of this stream. Memory is allocated on demand.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub fn new(compute: Arc<CudaStream>) -> Result<Self, DriverError> {
        let (stream, aside) = (compute.context().new_stream()?, compute.context().new_stream()?);
        Ok(Self { compute, stream, aside, buffers: Default::default(), next: 0, stored: None, notes: Vec::new() })
    }

    /// Uploads a stored tensor of `count` values and decodes it on the GPU, piece by piece.
    /// Returns before the copies are complete: the values must not be used or dropped before a
    /// later [`upload_fence`](Self::upload_fence), which reports values that do not fit `T`.
    /// `tensor` is its name, for errors.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub fn decode<T: Value>(
        &mut self,
        stored: StoredTensor<'_>,
        count: usize,
        tensor: &str,
    ) -> Result<CudaSlice<T>, DriverError> {
        self.decode_filled(stored.form, count, tensor, |piece, pinned| {
            piece.copy(&stored, pinned);
            Ok(())
        })
    }

    /// As [`decode`](Self::decode), for plain floats that are read into pinned memory: `read` gets
    /// a byte range of the tensor, and as many bytes to fill.
    ///
    /// # Errors
    /// Errors of the CUDA driver and of `read`.
    pub fn decode_read<T: Value, E: From<DriverError>>(
        &mut self,
        stored: Number,
        count: usize,
        tensor: &str,
        mut read: impl FnMut(Range<usize>, &mut [u8]) -> Result<(), E>,
    ) -> Result<CudaSlice<T>, E> {
        self.decode_filled(Form::Plain(stored), count, tensor, |piece, pinned| read(piece.codes(), pinned))
    }

    /// Has each piece filled into pinned memory.
    fn decode_filled<T: Value, E: From<DriverError>>(
        &mut self,
        form: Form,
        count: usize,
        tensor: &str,
        mut fill: impl FnMut(&EncodedChunk, &mut [u8]) -> Result<(), E>,
    ) -> Result<CudaSlice<T>, E> {
        // On this stream, which gives it out when it comes to it: on the other one that would be
        // after all that is computed until then. SAFETY: nobody sees it before all of it is asked
        // to be written.
        let mut bytes = unsafe { self.stream.alloc::<u8>(count * size_of::<T>()) }?;
        // Values of the size of their stored form are decoded in place.
        let in_place = form.is_stored_as::<T>();
        let (mut note, mut noted_from) = (0, 0);
        for piece in form.pieces(count, BUFFER - BUFFER / 64) {
            let values = piece.values();
            if values.start == 0 || values.end - noted_from > NOTED_TOGETHER {
                noted_from = values.start;
                note = self.note(Noted { tensor: tensor.to_owned(), first: noted_from, dtype: T::NAME })?;
            }
            let len = piece.bytes();
            if !in_place {
                self.make_room(len)?;
            }
            let buffer = &mut self.buffers[self.next];
            self.next = (self.next + 1) % BUFFERS;
            let pinned = buffer.free(self.stream.context(), len)?;
            fill(&piece, pinned)?;
            let mut decoded = bytes.slice_mut(values.start * size_of::<T>()..values.end * size_of::<T>());
            let at = decoded.device_ptr_mut(&self.stream).0;
            let places = match &mut self.stored {
                Some(room) if !in_place => {
                    self.stream.memcpy_htod(&*pinned, &mut room.slice_mut(..len))?;
                    DecodeAddresses { stored: room.device_ptr_mut(&self.stream).0, values: at, note }
                }
                _ => {
                    self.stream.memcpy_htod(&*pinned, &mut decoded)?;
                    DecodeAddresses { stored: at, values: at, note }
                }
            };
            // The event blocks: a waiting thread sleeps.
            buffer.copied = Some(self.stream.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC))?);
            // SAFETY: room for the piece's bytes and values, and a note, all of this stream, which
            // copies the next piece after this one is decoded.
            unsafe { form.launch::<T>(&self.stream, &piece, places, values.start - noted_from) }?;
        }
        // SAFETY: an allocation of as many values, all of which have been asked to be written.
        Ok(unsafe { self.compute.upgrade_device_ptr(bytes.leak(), count) })
    }

    /// GPU address of a new note.
    fn note(&mut self, about: Noted) -> Result<CUdeviceptr, DriverError> {
        if self.notes.last().is_none_or(|notes| notes.about.len() == NOTES) {
            self.notes.push(Notes { words: self.stream.alloc_zeros::<u64>(NOTES)?, about: Vec::new() });
        }
        let notes = self.notes.last_mut().expect("one with room is there");
        let at = notes.about.len() * size_of::<u64>();
        notes.about.push(about);
        Ok(notes.words.device_ptr_mut(&self.stream).0 + at as CUdeviceptr)
    }

    /// GPU buffer for a piece of this size in bytes.
    fn make_room(&mut self, len: usize) -> Result<(), DriverError> {
        if self.stored.as_ref().is_none_or(|room| room.len() < len) {
            // The old buffer is freed first: a plan counts one.
            self.stored = None;
            self.stream.synchronize()?;
            // SAFETY: nothing of it is read before it was written.
            self.stored = Some(unsafe { self.stream.alloc::<u8>(len) }?);
        }
        Ok(())
    }

    /// A fence after all uploads so far.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub fn upload_fence(&mut self) -> Result<UploadFence, DriverError> {
        // The event blocks: a waiting thread sleeps.
        let decoded = self.stream.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC))?;
        let (compute, aside) = (Arc::clone(&self.compute), Arc::clone(&self.aside));
        Ok(UploadFence { decoded: Some(decoded), compute, aside, notes: std::mem::take(&mut self.notes) })
    }
}

/// Event after the last upload.
#[must_use]
pub struct UploadFence {
    decoded: Option<CudaEvent>,
    compute: Arc<CudaStream>,
    aside: Arc<CudaStream>,
    notes: Vec<Notes>,
}

impl UploadFence {
    /// Makes later work on the compute stream wait for the fence. The host waits too, and gets the
    /// first value that does not fit its dtype, if any.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub fn wait(mut self) -> Result<Option<OutOfRangeValue>, DriverError> {
        let Some(decoded) = self.decoded.take() else { return Ok(None) };
        self.compute.wait(&decoded)?;
        decoded.synchronize()?;
        for notes in &self.notes {
            if let Some(misfit) = notes.read(&self.aside)? {
                return Ok(Some(misfit));
            }
        }
        Ok(None)
    }
}

impl Drop for UploadFence {
    /// An unused upload is freed on the compute stream, which must wait for its copies.
    fn drop(&mut self) {
        if let Some(decoded) = self.decoded.take() {
            // After a GPU error no copy is pending.
            let _ = self.compute.wait(&decoded);
        }
    }
}

impl Notes {
    /// The first misfit in the order of tensors, after all notes are written.
    fn read(&self, stream: &Arc<CudaStream>) -> Result<Option<OutOfRangeValue>, DriverError> {
        let words = stream.clone_dtoh(&self.words.slice(..self.about.len()))?;
        let misfit = |(word, about): (&u64, &Noted)| OutOfRangeValue {
            tensor: about.tensor.clone(),
            at: about.first + (!word >> 32) as usize,
            value: f32::from_bits(!word as u32),
            dtype: about.dtype,
        };
        Ok(words.iter().zip(&self.about).find(|(word, _)| **word != 0).map(misfit))
    }
}

/// Waits for all work on a stream.
pub struct ReleaseFence(CudaEvent);

impl ReleaseFence {
    /// Includes the copies of values that were dropped.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub fn from(compute: &CudaStream) -> Result<Self, DriverError> {
        Ok(Self(compute.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC))?))
    }

    /// Waits for the event.
    ///
    /// # Errors
    /// Errors of the CUDA driver, including those of earlier work on the stream.
    pub fn wait(self) -> Result<(), DriverError> {
        self.0.synchronize()
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        for buffer in &mut self.buffers {
            // After a GPU error no copy is pending.
            let _ = buffer.wait();
            // A larger one is more than a plan counts.
            let usual = buffer.memory.take().filter(|memory| memory.len() == BUFFER);
            SPARE.lock().unwrap_or_else(PoisonError::into_inner).extend(usual);
        }
    }
}

impl Buffer {
    /// Waits until no copy reads the buffer.
    fn wait(&mut self) -> Result<(), DriverError> {
        self.copied.take().map_or(Ok(()), |copied| copied.synchronize())
    }

    /// `len` writable bytes, aligned for any number type.
    fn free(&mut self, context: &Arc<CudaContext>, len: usize) -> Result<&mut [u8], DriverError> {
        self.wait()?;
        if self.memory.as_ref().is_none_or(|memory| memory.len() < len) {
            self.memory = None;
            self.memory = Some(pinned(context, len)?);
        }
        let memory = self.memory.as_mut().expect("it was just put there");
        Ok(&mut memory.as_mut_slice()?[..len])
    }
}

/// At least `len` bytes that are pinned in this context.
fn pinned(context: &Arc<CudaContext>, len: usize) -> Result<PinnedHostSlice<u8>, DriverError> {
    if len <= BUFFER {
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = spare.iter().position(|memory| memory.context().cu_ctx() == context.cu_ctx()) {
            return Ok(spare.swap_remove(at));
        }
    }
    // Not write-combined, as is the library's default: what is written in no order would be slow.
    // SAFETY: bytes may be anything.
    unsafe { context.alloc_pinned_with_flags(len.max(BUFFER), 0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::test_output;

    /// Stored values of the test's tensors; every second tensor is bf16.
    fn stored(tensor: usize, count: usize) -> (Number, Vec<u8>) {
        if tensor.is_multiple_of(2) {
            (Number::F32, (0..count).flat_map(|at| value(tensor, at).to_le_bytes()).collect())
        } else {
            (Number::Bf16, (0..count).flat_map(|at| ((value(tensor, at) >> 16) as u16).to_le_bytes()).collect())
        }
    }

    /// Bits of a value as f32; all are finite.
    fn value(tensor: usize, at: usize) -> u32 {
        let bits = (tensor * 1_000_003 + at) as u32;
        if tensor.is_multiple_of(2) { bits } else { (bits % 0x7f80) << 16 }
    }

    #[test]
    #[ignore = "the process that the other starts"]
    fn bring_and_take_back() {
        crate::find().unwrap();
        let context = CudaContext::new(0).unwrap();
        let compute = context.new_stream().unwrap();
        let mut staging = Staging::new(Arc::clone(&compute)).unwrap();
        // Many sizes, some larger than a buffer. Some uploads are freed before the rest is
        // complete.
        let sizes = (0..115).map(|i| if i % 40 == 0 { BUFFER / 4 + 1000 * i + i } else { 1 + 97 * i * (i % 5) });
        let (mut kept, mut brought, mut taken) = (Vec::new(), 0, 0);
        for (tensor, count) in sizes.enumerate() {
            let (number, codes) = stored(tensor, count);
            brought += codes.len() as u64;
            let stored = StoredTensor { form: Form::Plain(number), codes: &codes, scales: &[] };
            let slice = if tensor / 40 % 2 == 0 {
                staging.decode::<f32>(stored, count, "t").unwrap()
            } else {
                let read = |range: Range<usize>, into: &mut [u8]| -> Result<(), DriverError> {
                    into.copy_from_slice(&codes[range]);
                    Ok(())
                };
                staging.decode_read::<f32, _>(number, count, "t", read).unwrap()
            };
            let upload_fence = staging.upload_fence().unwrap();
            if tensor % 3 == 1 {
                // Dropped unused, in this order.
                drop((upload_fence, slice));
                continue;
            }
            assert_eq!(upload_fence.wait().unwrap(), None);
            // A note.
            taken += 8;
            // Work of the compute stream on the values.
            kept.push((tensor, compute.clone_dtod(&slice).unwrap()));
            if tensor % 30 == 29 {
                let (tensor, copy) = kept.swap_remove(0);
                let back = compute.clone_dtoh(&copy).unwrap();
                taken += 4 * back.len() as u64;
                assert!(back.iter().enumerate().all(|(at, got)| got.to_bits() == value(tensor, at)), "tensor {tensor}");
            }
        }
        drop(staging);
        // The next way takes the buffers of the one before.
        let spare = || SPARE.lock().unwrap().len();
        assert_eq!(spare(), BUFFERS);
        let mut staging = Staging::new(Arc::clone(&compute)).unwrap();
        let (number, codes) = stored(1, 1000);
        brought += codes.len() as u64;
        let again = StoredTensor { form: Form::Plain(number), codes: &codes, scales: &[] };
        let slice = staging.decode::<f32>(again, 1000, "t").unwrap();
        assert_eq!(spare(), BUFFERS - 1);
        assert_eq!(staging.upload_fence().unwrap().wait().unwrap(), None);
        taken += 8;
        kept.push((1, slice));
        drop(staging);
        assert_eq!(spare(), BUFFERS);
        for (tensor, copy) in kept {
            let back = compute.clone_dtoh(&copy).unwrap();
            taken += 4 * back.len() as u64;
            assert!(back.iter().enumerate().all(|(at, got)| got.to_bits() == value(tensor, at)), "tensor {tensor}");
        }
        assert_eq!(crate::traffic(), crate::Traffic { to_gpus: brought, from_gpus: taken });
        println!("said: all there");
    }

    #[test]
    fn uploads_are_complete_before_use_under_stream_delays() {
        let gpu = std::env::var("OUTLIERS_GPU")
            .expect("OUTLIERS_GPU names a folder that tests/gpu/install_fake_driver.sh made");
        for delay in ["0", "300", "5000"] {
            let environment = [("LD_LIBRARY_PATH", gpu.as_str()), ("OUTLIERS_GPU_DELAY_US", delay)];
            assert_eq!(test_output("staging::tests::bring_and_take_back", &environment), "all there", "{delay} us");
        }
    }
}
