//! From the host's memory to a GPU while that computes: pinned buffers that are filled in turn, and a stream of their own.
//!
//! A copy from memory that is not pinned goes through the driver's own buffer, and one on the
//! stream that computes waits for all that was asked of it before. Here what was brought belongs
//! to the stream that computes as soon as it is on its way: the tensor library waits for nothing
//! else that it is given. So that stream is told of an [`UploadFence`] before it uses any of it.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DeviceRepr, DriverError, PinnedHostSlice};

/// Bytes of a buffer, where a piece that cannot be divided does not take more.
const BUFFER: usize = 16 << 20;
/// How many there are: one that is filled, one that is copied, and as many again, since small tensors come between large ones.
const BUFFERS: usize = 4;

/// A way to one GPU.
pub struct Staging {
    /// The stream that computes with what is brought.
    compute: Arc<CudaStream>,
    stream: Arc<CudaStream>,
    buffers: [Buffer; BUFFERS],
    /// Filled next: the one that was for the longest time not.
    next: usize,
}

#[derive(Default)]
struct Buffer {
    memory: Option<PinnedHostSlice<u8>>,
    /// When the last copy from it is done.
    copied: Option<CudaEvent>,
}

impl Staging {
    /// A way to the GPU on which that stream computes. Memory is pinned when it is needed.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(compute: Arc<CudaStream>) -> Result<Self, DriverError> {
        let stream = compute.context().new_stream()?;
        Ok(Self { compute, stream, buffers: Default::default(), next: 0 })
    }

    /// `count` values that `write` writes, in pieces of a multiple of `granule` of them but for
    /// the last. They are on their way when this returns, and must neither be used nor dropped
    /// before an [`upload_fence`](Self::upload_fence) that comes later.
    ///
    /// # Errors
    /// The driver's, and those of `write`.
    pub fn upload<T: DeviceRepr + Pod, E: From<DriverError>>(
        &mut self,
        count: usize,
        granule: usize,
        mut write: impl FnMut(Range<usize>, &mut [T]) -> Result<(), E>,
    ) -> Result<CudaSlice<T>, E> {
        // On this stream, which gives it out when it comes to it: on the other one that would be after all that is computed until then.
        // SAFETY: nobody sees it before all of it is asked to be written.
        let mut slice = unsafe { self.stream.alloc::<T>(count) }?;
        let granule = granule.max(1);
        let at_once = (BUFFER / size_of::<T>() / granule).max(1) * granule;
        for start in (0..count).step_by(at_once) {
            let range = start..count.min(start + at_once);
            let buffer = &mut self.buffers[self.next];
            self.next = (self.next + 1) % BUFFERS;
            let values = bytemuck::cast_slice_mut(buffer.free(self.stream.context(), range.len() * size_of::<T>())?);
            write(range.clone(), values)?;
            self.stream.memcpy_htod(&*values, &mut slice.slice_mut(range))?;
            // Whoever waits for it sleeps.
            buffer.copied = Some(self.stream.record_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC))?);
        }
        // SAFETY: an allocation of as many values, all of which have been asked to be written.
        Ok(unsafe { self.compute.upgrade_device_ptr(slice.leak(), count) })
    }

    /// Of all that was brought so far.
    ///
    /// # Errors
    /// The driver's.
    pub fn upload_fence(&self) -> Result<UploadFence, DriverError> {
        let copied = self.stream.record_event(None)?;
        Ok(UploadFence { copied: Some(copied), compute: Arc::clone(&self.compute) })
    }
}

/// When what was brought is there.
#[must_use]
pub struct UploadFence {
    copied: Option<CudaEvent>,
    compute: Arc<CudaStream>,
}

impl UploadFence {
    /// What the computing stream is asked for from now on is done after the fence.
    ///
    /// # Errors
    /// The driver's.
    pub fn wait(mut self) -> Result<(), DriverError> {
        self.copied.take().map_or(Ok(()), |copied| self.compute.wait(&copied))
    }
}

impl Drop for UploadFence {
    /// Nobody uses what arrives. But it is given back on the computing stream, which must not be before its copies are done.
    fn drop(&mut self) {
        if let Some(copied) = self.copied.take() {
            // After an error of the GPU nothing is copied any more.
            let _ = self.compute.wait(&copied);
        }
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
            // Not write-combined, as is the library's default: what is written in no order would be slow.
            // SAFETY: bytes may be anything.
            self.memory = Some(unsafe { context.alloc_pinned_with_flags(len.max(BUFFER), 0) }?);
        }
        let memory = self.memory.as_mut().expect("it was just put there");
        Ok(&mut memory.as_mut_slice()?[..len])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::said_by;

    /// The values of a tensor of the test.
    fn value(tensor: usize, at: usize) -> u32 {
        (tensor * 1_000_003 + at) as u32
    }

    #[test]
    #[ignore = "the process that the other starts"]
    fn bring_and_take_back() {
        crate::find().unwrap();
        let context = CudaContext::new(0).unwrap();
        let compute = context.new_stream().unwrap();
        let mut staging = Staging::new(Arc::clone(&compute)).unwrap();
        // Of many sizes, a few larger than a buffer; of what was brought, some is given back while the rest is on its way.
        let sizes = (0..115).map(|i| if i % 20 == 0 { BUFFER / 4 + 1000 * i + i } else { 1 + 97 * i * (i % 5) });
        let (mut kept, mut brought, mut taken) = (Vec::new(), 0, 0);
        for (tensor, count) in sizes.enumerate() {
            brought += 4 * count as u64;
            let write = |range: Range<usize>, values: &mut [u32]| {
                assert!(range.start.is_multiple_of(96) && (range.len().is_multiple_of(96) || range.end == count));
                values.iter_mut().zip(range).for_each(|(to, at)| *to = value(tensor, at));
                Ok::<_, DriverError>(())
            };
            let slice = staging.upload(count, 96, write).unwrap();
            let upload_fence = staging.upload_fence().unwrap();
            if tensor % 3 == 1 {
                // Dropped unused, in this order.
                drop((upload_fence, slice));
                continue;
            }
            upload_fence.wait().unwrap();
            // What the computing stream makes of it.
            kept.push((tensor, compute.clone_dtod(&slice).unwrap()));
            if tensor % 30 == 29 {
                let (tensor, copy) = kept.swap_remove(0);
                let back = compute.clone_dtoh(&copy).unwrap();
                taken += 4 * back.len() as u64;
                assert!(back.iter().enumerate().all(|(at, got)| *got == value(tensor, at)), "tensor {tensor}");
            }
        }
        drop(staging);
        for (tensor, copy) in kept {
            let back = compute.clone_dtoh(&copy).unwrap();
            taken += 4 * back.len() as u64;
            assert!(back.iter().enumerate().all(|(at, got)| *got == value(tensor, at)), "tensor {tensor}");
        }
        assert_eq!(crate::traffic(), crate::Traffic { to_gpus: brought, from_gpus: taken });
        println!("said: all there");
    }

    #[test]
    fn what_is_brought_is_there_when_it_is_used_however_late_streams_are() {
        let gpu = std::env::var("OUTLIERS_GPU")
            .expect("OUTLIERS_GPU names a folder that tests/gpu/install_fake_driver.sh made");
        for delay in ["0", "300", "5000"] {
            let environment = [("LD_LIBRARY_PATH", gpu.as_str()), ("OUTLIERS_GPU_DELAY_US", delay)];
            assert_eq!(said_by("staging::tests::bring_and_take_back", &environment), "all there", "{delay} us");
        }
    }
}
