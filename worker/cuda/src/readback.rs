//! Copies summaries from a GPU to pinned host memory without blocking. An event is recorded after
//! the copy; neither side waits until the summary is read.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result;
use cudarc::driver::sys::{CUdeviceptr, CUevent_flags};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, CudaView, DevicePtr, DriverError, PinnedHostSlice, SyncOnDrop,
};

/// Bytes of the smallest buffer.
const MIN_BUFFER_BYTES: usize = 1 << 18;
/// Buffers of a context that copies to GPUs may read while the host goes on: as many as there are
/// waves. They bound pinned memory.
const MAX_READ: usize = 4;
/// Alignment of the parts of a buffer.
const ALIGNMENT: usize = 8;

/// Buffers without an owner, kept for reuse because pinning memory is slow.
static SPARE: Mutex<Vec<Spare>> = Mutex::new(Vec::new());

/// A buffer without an owner.
struct Spare {
    buffer: PinnedHostSlice<u8>,
    /// The end of a copy to a GPU, if the buffer was given back before that.
    read: Option<Arc<CudaEvent>>,
}

impl Spare {
    /// Whether no copy reads the buffer. After an error of the GPU that is not known.
    fn is_free(&self) -> bool {
        let is_complete = |read: &Arc<CudaEvent>| {
            let asked = read.context().bind_to_thread().and_then(|()| read.try_is_complete());
            asked.unwrap_or(false)
        };
        self.read.as_ref().is_none_or(is_complete)
    }
}

/// Waits for the end of a copy to a GPU if as many as [`MAX_READ`] read buffers of this context.
fn wait_for_room(context: &CudaContext) -> Result<(), DriverError> {
    let read: Vec<Arc<CudaEvent>> = {
        let spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        let here = spare.iter().filter(|spare| spare.buffer.context().cu_ctx() == context.cu_ctx());
        here.filter(|spare| !spare.is_free()).filter_map(|spare| spare.read.clone()).collect()
    };
    match read.first() {
        Some(first) if read.len() >= MAX_READ => first.synchronize(),
        _ => Ok(()),
    }
}

fn give_back(spare: Spare) {
    SPARE.lock().unwrap_or_else(PoisonError::into_inner).push(spare);
}

/// A buffer of at least `bytes` bytes, pinned in this context.
fn take(context: &Arc<CudaContext>, bytes: usize) -> Result<PinnedHostSlice<u8>, DriverError> {
    let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
    let is_here = |spare: &Spare| spare.buffer.context().cu_ctx() == context.cu_ctx();
    let here: Vec<usize> = (0..spare.len()).filter(|at| is_here(&spare[*at]) && spare[*at].is_free()).collect();
    let len = |at: usize| spare[at].buffer.len();
    let fits = here.iter().filter(|at| len(**at) >= bytes).min_by_key(|at| len(**at));
    // A buffer that is too small is freed before a larger one is allocated.
    let chosen = fits.or_else(|| here.iter().max_by_key(|at| len(**at))).copied();
    let taken = chosen.map(|at| spare.swap_remove(at).buffer);
    // An event of another GPU makes that one's context current.
    context.bind_to_thread()?;
    match taken {
        Some(buffer) if buffer.len() >= bytes => Ok(buffer),
        small => {
            drop(small);
            // Not write-combined (the library's default), because the host reads the buffer.
            // SAFETY: bytes may be anything.
            unsafe { context.alloc_pinned_with_flags(bytes.next_power_of_two().max(MIN_BUFFER_BYTES), 0) }
        }
    }
}

/// A stream of each context beside those that compute.
pub(crate) struct StreamPerContext(Mutex<Vec<Arc<CudaStream>>>);

impl StreamPerContext {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// The stream of this context, made when it is first asked for.
    pub(crate) fn of(&self, context: &Arc<CudaContext>) -> Result<Arc<CudaStream>, DriverError> {
        let mut streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = streams.iter().find(|stream| stream.context().cu_ctx() == context.cu_ctx()) {
            return Ok(Arc::clone(stream));
        }
        let stream = context.new_stream()?;
        streams.push(Arc::clone(&stream));
        Ok(stream)
    }
}

/// A summary on the GPU.
pub(crate) struct Part<'a> {
    address: CUdeviceptr,
    bytes: usize,
    _read: SyncOnDrop<'a>,
}

impl<'a> Part<'a> {
    /// A whole slice, read on its stream.
    pub(crate) fn of<T>(slice: &'a CudaSlice<T>, stream: &'a CudaStream) -> Self {
        Self::at(slice.device_ptr(stream), slice.len() * size_of::<T>())
    }

    /// `bytes` bytes at an address.
    pub(crate) fn at((address, read): (CUdeviceptr, SyncOnDrop<'a>), bytes: usize) -> Self {
        Self { address, bytes, _read: read }
    }
}

/// Summaries copied into one buffer, which cannot be read before the copy is complete.
pub(crate) struct Readback {
    /// `Some` until this is dropped or uploaded.
    buffer: Option<PinnedHostSlice<u8>>,
    /// Range of each part.
    parts: Vec<Range<usize>>,
    copied: CudaEvent,
}

impl Readback {
    /// Enqueues copies of the parts, in order, on the stream.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub(crate) fn start(stream: &Arc<CudaStream>, parts: &[Part<'_>]) -> Result<Self, DriverError> {
        let context = stream.context();
        context.bind_to_thread()?;
        let mut end = 0;
        let mut place = |part: &Part<'_>| {
            let start = end;
            end = (start + part.bytes).next_multiple_of(ALIGNMENT);
            start..start + part.bytes
        };
        let places = parts.iter().map(&mut place).collect();
        // The event blocks: a waiting thread sleeps.
        let copied = context.new_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC))?;
        let mut readback = Self { buffer: Some(take(context, end)?), parts: places, copied };
        let buffer = readback.buffer.as_mut().expect("it was just put there").as_mut_slice()?;
        let asked = parts.iter().zip(&readback.parts).try_for_each(|(part, place)| {
            let place = &mut buffer[place.clone()];
            // SAFETY: as many bytes are at the address and in the buffer, which is neither read nor
            // given to anybody else before the event.
            unsafe { result::memcpy_dtoh_async(place, part.address, stream.cu_stream()) }
        });
        // Also recorded after an error: drop waits for the copies enqueued before it.
        readback.copied.record(stream)?;
        asked?;
        Ok(readback)
    }

    /// Whether the copies are complete.
    ///
    /// # Errors
    /// Errors of the CUDA driver, including those of earlier work on the stream.
    pub(crate) fn is_complete(&self) -> Result<bool, DriverError> {
        self.copied.context().bind_to_thread()?;
        self.copied.try_is_complete()
    }

    /// Waits until the copies are complete.
    ///
    /// # Errors
    /// Errors of the CUDA driver, including those of earlier work on the stream.
    pub(crate) fn wait(&self) -> Result<(), DriverError> {
        self.copied.context().bind_to_thread()?;
        self.copied.synchronize()
    }

    /// Enqueues a copy of the first part to a GPU, on a stream of that GPU, after the first copy.
    /// Returns the event of its end. The buffer is reused after that event. Does not wait for the
    /// copies, unless as many as [`MAX_READ`] earlier ones are pending.
    ///
    /// # Safety
    /// There is room for it at `to` until the event.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub(crate) unsafe fn upload(mut self, to: CUdeviceptr, stream: &CudaStream) -> Result<Arc<CudaEvent>, DriverError> {
        let buffer = self.buffer.as_ref().expect("there until this is dropped");
        wait_for_room(buffer.context())?;
        let bytes = &buffer.as_slice()?[self.parts[0].clone()];
        stream.wait(&self.copied)?;
        stream.context().bind_to_thread()?;
        // SAFETY: the caller's promise; what is read was written when the stream comes to it, and
        // is not overwritten before the event.
        unsafe { result::memcpy_htod_async(to, bytes, stream.cu_stream()) }?;
        // The event blocks: a waiting thread sleeps.
        let read = match stream.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC)) {
            Ok(read) => Arc::new(read),
            Err(error) => {
                // After an error of the GPU no copy reads the buffer.
                let _ = stream.synchronize();
                return Err(error);
            }
        };
        if let Some(buffer) = self.buffer.take() {
            give_back(Spare { buffer, read: Some(Arc::clone(&read)) });
        }
        Ok(read)
    }

    /// The bytes of a part. Waits for the copy.
    fn part(&self, part: usize) -> Result<&[u8], DriverError> {
        self.wait()?;
        let buffer = self.buffer.as_ref().expect("there until this is dropped");
        Ok(&buffer.as_slice()?[self.parts[part].clone()])
    }

    /// The numbers of a part. Waits for the copy.
    ///
    /// # Errors
    /// Errors of the CUDA driver, including those of earlier work on the stream.
    pub(crate) fn u32s(&self, part: usize) -> Result<Vec<u32>, DriverError> {
        Ok(self.part(part)?.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect())
    }

    /// As [`u32s`](Self::u32s).
    pub(crate) fn u64s(&self, part: usize) -> Result<Vec<u64>, DriverError> {
        Ok(self.part(part)?.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect())
    }

    /// As [`u32s`](Self::u32s).
    pub(crate) fn f32s(&self, part: usize) -> Result<Vec<f32>, DriverError> {
        Ok(self.part(part)?.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    /// As [`u32s`](Self::u32s).
    pub(crate) fn f64s(&self, part: usize) -> Result<Vec<f64>, DriverError> {
        Ok(self.part(part)?.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect())
    }
}

impl Drop for Readback {
    /// The buffer is the next summary's when nothing is copied to it any more.
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            // After an error of the GPU nothing is.
            let _ = self.wait();
            give_back(Spare { buffer, read: None });
        }
    }
}

/// Values of a GPU in transfer to the host.
#[must_use]
pub struct PendingCopy(Readback);

impl PendingCopy {
    /// Enqueues the copy on the stream and returns.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub fn start(stream: &Arc<CudaStream>, values: &CudaView<'_, f32>) -> Result<Self, DriverError> {
        let part = Part::at(values.device_ptr(stream), values.len() * size_of::<f32>());
        Ok(Self(Readback::start(stream, &[part])?))
    }

    /// Waits for the values.
    ///
    /// # Errors
    /// Errors of the CUDA driver, including those of earlier work on the stream.
    pub fn wait(self) -> Result<Vec<f32>, DriverError> {
        self.0.f32s(0)
    }
}

/// How many buffers are kept for reuse, those that copies to GPUs still read included.
#[cfg(test)]
pub(crate) fn kept() -> usize {
    SPARE.lock().unwrap_or_else(PoisonError::into_inner).len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::test_output;

    #[test]
    #[ignore = "the process that the other starts"]
    fn copy_and_read() {
        crate::find().unwrap();
        let context = CudaContext::new(0).unwrap();
        let (first, second) = (context.new_stream().unwrap(), context.new_stream().unwrap());
        let mut on_their_way = Vec::new();
        for round in 0..200u32 {
            let words: Vec<u32> = (0..1 + 97 * (round % 13)).map(|at| round * 100_000 + at).collect();
            let reals = [f64::from(round), 0.5];
            let stream = if round % 3 == 0 { &second } else { &first };
            let (a, b) = (stream.clone_htod(&words).unwrap(), stream.clone_htod(&reals).unwrap());
            let readback = Readback::start(stream, &[Part::of(&a, stream), Part::of(&b, stream)]).unwrap();
            // What was copied is given back on its stream, and some of it nobody reads.
            drop((a, b));
            if round % 7 == 0 {
                drop(readback);
                continue;
            }
            on_their_way.push((readback, words, reals));
            if on_their_way.len() > 5 {
                let (readback, words, reals) = on_their_way.remove(0);
                assert_eq!((readback.u32s(0).unwrap(), readback.f64s(1).unwrap()), (words, reals.to_vec()));
                assert!(readback.is_complete().unwrap());
            }
        }
        for (readback, words, _) in on_their_way {
            assert_eq!(readback.u32s(0).unwrap(), words);
        }
        let empty = Readback::start(&first, &[]).unwrap();
        while !empty.is_complete().unwrap() {
            std::thread::yield_now();
        }
        drop(empty);
        // As many buffers as were needed at a time, not as many as there were summaries.
        let spare = kept();
        assert!(spare <= 8, "{spare} buffers");
        println!("said: all there");
    }

    #[test]
    fn summaries_are_read_when_they_are_there_however_late_streams_are() {
        let gpu = std::env::var("OUTLIERS_GPU")
            .expect("OUTLIERS_GPU names a folder that tests/gpu/install_fake_driver.sh made");
        for delay in ["0", "300", "5000"] {
            let environment = [("LD_LIBRARY_PATH", gpu.as_str()), ("OUTLIERS_GPU_DELAY_US", delay)];
            assert_eq!(test_output("readback::tests::copy_and_read", &environment), "all there", "{delay} us");
        }
    }
}
