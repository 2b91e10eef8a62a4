//! From the host's memory to a GPU while that computes: stored bytes go through pinned buffers that
//! are filled in turn, and are decoded there, by a stream of their own.
//!
//! A copy from memory that is not pinned goes through the driver's own buffer, and one on the
//! stream that computes waits for all that was asked of it before. Here what was brought belongs
//! to the stream that computes as soon as it is on its way: the tensor library waits for nothing
//! else that it is given. So that stream is told of an [`UploadFence`] before it uses any of it.

use std::sync::Arc;

use cudarc::driver::sys::{CUdeviceptr, CUevent_flags};
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtrMut, DriverError, PinnedHostSlice};

use crate::decode::{Places, StoredTensor, Value};

/// Bytes of a buffer, where a piece that cannot be divided does not take more.
const BUFFER: usize = 16 << 20;
/// How many there are: one that is filled, one that is copied, and as many again, since small
/// tensors come between large ones.
const BUFFERS: usize = 4;
/// Bytes that are pinned for one way, unless a piece that cannot be divided takes more.
pub const PINNED: usize = BUFFERS * BUFFER;
/// Notes that are allocated together.
const NOTES: usize = 512;
/// Values that share a note at most: their places have 32 bits.
const NOTED_TOGETHER: usize = 1 << 31;

/// A way to one GPU.
pub struct Staging {
    /// The stream that computes with what is brought.
    compute: Arc<CudaStream>,
    stream: Arc<CudaStream>,
    /// For what is read back, which waits for neither of the others.
    aside: Arc<CudaStream>,
    buffers: [Buffer; BUFFERS],
    /// Filled next: the one that was for the longest time not.
    next: usize,
    /// A piece of stored bytes on the GPU, where its values do not take their place.
    stored: Option<CudaSlice<u8>>,
    /// Of what was brought since the last fence.
    notes: Vec<Notes>,
}

#[derive(Default)]
struct Buffer {
    memory: Option<PinnedHostSlice<u8>>,
    /// When the last copy from it is done.
    copied: Option<CudaEvent>,
}

/// What kernels note about values that do not fit, on the GPU.
struct Notes {
    /// A word each, as `decode.cu` has it.
    words: CudaSlice<u64>,
    about: Vec<Noted>,
}

/// What a note is about.
struct Noted {
    tensor: String,
    /// The first of its values that the note is about.
    first: usize,
    dtype: &'static str,
}

/// The first value of a tensor that its dtype does not hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Misfit {
    /// The tensor's name.
    pub tensor: String,
    /// Which of its values it is.
    pub at: usize,
    /// The value before it was rounded.
    pub value: f32,
    /// What it was to become: `f32`, `bf16` or `f16`.
    pub dtype: &'static str,
}

impl Staging {
    /// A way to the GPU on which that stream computes. Memory is taken when it is needed.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(compute: Arc<CudaStream>) -> Result<Self, DriverError> {
        let (stream, aside) = (compute.context().new_stream()?, compute.context().new_stream()?);
        Ok(Self { compute, stream, aside, buffers: Default::default(), next: 0, stored: None, notes: Vec::new() })
    }

    /// Brings a stored tensor of `count` values and decodes it on the GPU, piece by piece. The
    /// values are on their way when this returns, and must neither be used nor dropped before an
    /// [`upload_fence`](Self::upload_fence) that follows it. The fence reports values that do not
    /// fit `T`. `tensor` is its name.
    ///
    /// # Errors
    /// The driver's.
    pub fn decode<T: Value>(
        &mut self,
        stored: StoredTensor<'_>,
        count: usize,
        tensor: &str,
    ) -> Result<CudaSlice<T>, DriverError> {
        // On this stream, which gives it out when it comes to it: on the other one that would be
        // after all that is computed until then. SAFETY: nobody sees it before all of it is asked
        // to be written.
        let mut bytes = unsafe { self.stream.alloc::<u8>(count * size_of::<T>()) }?;
        // Values of the same size take the place of what they were stored as.
        let in_place = stored.is_stored_as::<T>();
        let (mut note, mut noted_from) = (0, 0);
        for piece in stored.pieces(count, BUFFER - BUFFER / 64) {
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
            piece.copy_to(pinned);
            let mut decoded = bytes.slice_mut(values.start * size_of::<T>()..values.end * size_of::<T>());
            let at = decoded.device_ptr_mut(&self.stream).0;
            let places = match &mut self.stored {
                Some(room) if !in_place => {
                    self.stream.memcpy_htod(&*pinned, &mut room.slice_mut(..len))?;
                    Places { stored: room.device_ptr_mut(&self.stream).0, values: at, note }
                }
                _ => {
                    self.stream.memcpy_htod(&*pinned, &mut decoded)?;
                    Places { stored: at, values: at, note }
                }
            };
            // Whoever waits for it sleeps.
            buffer.copied = Some(self.stream.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC))?);
            // SAFETY: room for the piece's bytes and values, and a note, all of this stream, which
            // copies the next piece after this one is decoded.
            unsafe { stored.launch::<T>(&self.stream, &piece, places, values.start - noted_from) }?;
        }
        // SAFETY: an allocation of as many values, all of which have been asked to be written.
        Ok(unsafe { self.compute.upgrade_device_ptr(bytes.leak(), count) })
    }

    /// The address of a new note.
    fn note(&mut self, about: Noted) -> Result<CUdeviceptr, DriverError> {
        if self.notes.last().is_none_or(|notes| notes.about.len() == NOTES) {
            self.notes.push(Notes { words: self.stream.alloc_zeros::<u64>(NOTES)?, about: Vec::new() });
        }
        let notes = self.notes.last_mut().expect("one with room is there");
        let at = notes.about.len() * size_of::<u64>();
        notes.about.push(about);
        Ok(notes.words.device_ptr_mut(&self.stream).0 + at as CUdeviceptr)
    }

    /// Buffer on the GPU for a piece of this size in bytes.
    fn make_room(&mut self, len: usize) -> Result<(), DriverError> {
        if self.stored.as_ref().is_none_or(|room| room.len() < len) {
            // There are never both: a plan counts one.
            self.stored = None;
            self.stream.synchronize()?;
            // SAFETY: nothing of it is read before it was written.
            self.stored = Some(unsafe { self.stream.alloc::<u8>(len) }?);
        }
        Ok(())
    }

    /// Of all that was brought so far.
    ///
    /// # Errors
    /// The driver's.
    pub fn upload_fence(&mut self) -> Result<UploadFence, DriverError> {
        // Whoever waits for it sleeps.
        let decoded = self.stream.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC))?;
        let (compute, aside) = (Arc::clone(&self.compute), Arc::clone(&self.aside));
        Ok(UploadFence { decoded: Some(decoded), compute, aside, notes: std::mem::take(&mut self.notes) })
    }
}

/// When what was brought is there.
#[must_use]
pub struct UploadFence {
    decoded: Option<CudaEvent>,
    compute: Arc<CudaStream>,
    aside: Arc<CudaStream>,
    notes: Vec<Notes>,
}

impl UploadFence {
    /// What the computing stream is asked for from now on is done after the fence. The host waits
    /// for it, too, and learns of the first value that does not fit its dtype, if there is one.
    ///
    /// # Errors
    /// The driver's.
    pub fn wait(mut self) -> Result<Option<Misfit>, DriverError> {
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
    /// Nobody uses what arrives. But it is given back on the computing stream, which must not be
    /// before its copies are done.
    fn drop(&mut self) {
        if let Some(decoded) = self.decoded.take() {
            // After an error of the GPU nothing is copied any more.
            let _ = self.compute.wait(&decoded);
        }
    }
}

impl Notes {
    /// The first misfit, in the order of tensors. They have been written.
    fn read(&self, stream: &Arc<CudaStream>) -> Result<Option<Misfit>, DriverError> {
        let words = stream.clone_dtoh(&self.words.slice(..self.about.len()))?;
        let misfit = |(word, about): (&u64, &Noted)| Misfit {
            tensor: about.tensor.clone(),
            at: about.first + (!word >> 32) as usize,
            value: f32::from_bits(!word as u32),
            dtype: about.dtype,
        };
        Ok(words.iter().zip(&self.about).find(|(word, _)| **word != 0).map(misfit))
    }
}

/// When all is done that a stream was asked for so far.
pub struct ReleaseFence(CudaEvent);

impl ReleaseFence {
    /// Of what was dropped, among other things.
    ///
    /// # Errors
    /// The driver's.
    pub fn from(compute: &CudaStream) -> Result<Self, DriverError> {
        Ok(Self(compute.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC))?))
    }

    /// Until then.
    ///
    /// # Errors
    /// The driver's, also of what was asked for.
    pub fn wait(self) -> Result<(), DriverError> {
        self.0.synchronize()
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        for buffer in &mut self.buffers {
            // After an error of the GPU nothing is copied any more.
            let _ = buffer.wait();
        }
    }
}

impl Buffer {
    /// Until nothing is copied from it any more.
    fn wait(&mut self) -> Result<(), DriverError> {
        self.copied.take().map_or(Ok(()), |copied| copied.synchronize())
    }

    /// `len` bytes that may be written to, aligned for any number.
    fn free(&mut self, context: &Arc<CudaContext>, len: usize) -> Result<&mut [u8], DriverError> {
        self.wait()?;
        if self.memory.as_ref().is_none_or(|memory| memory.len() < len) {
            self.memory = None;
            // Not write-combined, as is the library's default: what is written in no order would
            // be slow. SAFETY: bytes may be anything.
            self.memory = Some(unsafe { context.alloc_pinned_with_flags(len.max(BUFFER), 0) }?);
        }
        let memory = self.memory.as_mut().expect("it was just put there");
        Ok(&mut memory.as_mut_slice()?[..len])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::{Form, Number};
    use crate::tests::said_by;

    /// The values of a tensor of the test as they are stored, every other in bf16.
    fn stored(tensor: usize, count: usize) -> (Number, Vec<u8>) {
        if tensor.is_multiple_of(2) {
            (Number::F32, (0..count).flat_map(|at| value(tensor, at).to_le_bytes()).collect())
        } else {
            (Number::Bf16, (0..count).flat_map(|at| ((value(tensor, at) >> 16) as u16).to_le_bytes()).collect())
        }
    }

    /// Bits of a value as f32: all are finite.
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
        // Of many sizes, a few larger than a buffer; of what was brought, some is given back while
        // the rest is on its way.
        let sizes = (0..115).map(|i| if i % 40 == 0 { BUFFER / 4 + 1000 * i + i } else { 1 + 97 * i * (i % 5) });
        let (mut kept, mut brought, mut taken) = (Vec::new(), 0, 0);
        for (tensor, count) in sizes.enumerate() {
            let (number, codes) = stored(tensor, count);
            brought += codes.len() as u64;
            let stored = StoredTensor { form: Form::Plain(number), codes: &codes, scales: &[] };
            let slice = staging.decode::<f32>(stored, count, "t").unwrap();
            let upload_fence = staging.upload_fence().unwrap();
            if tensor % 3 == 1 {
                // Dropped unused, in this order.
                drop((upload_fence, slice));
                continue;
            }
            assert_eq!(upload_fence.wait().unwrap(), None);
            // A note.
            taken += 8;
            // What the computing stream makes of it.
            kept.push((tensor, compute.clone_dtod(&slice).unwrap()));
            if tensor % 30 == 29 {
                let (tensor, copy) = kept.swap_remove(0);
                let back = compute.clone_dtoh(&copy).unwrap();
                taken += 4 * back.len() as u64;
                assert!(back.iter().enumerate().all(|(at, got)| got.to_bits() == value(tensor, at)), "tensor {tensor}");
            }
        }
        drop(staging);
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
            assert_eq!(said_by("staging::tests::bring_and_take_back", &environment), "all there", "{delay} us");
        }
    }
}
