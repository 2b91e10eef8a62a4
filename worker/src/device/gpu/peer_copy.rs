//! Copies hidden states from one GPU to another.

use candle_core::cuda_backend::{CudaDType, CudaDevice};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Device, Storage, Tensor};
use half::{bf16, f16};

use super::activation::stored;
use crate::error::{Result, WorkerError};

/// A tensor that is being copied to another GPU. Its source must live until this has arrived or
/// was dropped.
pub struct PeerCopy {
    peer_copy: outliers_cuda::PeerCopy,
    shape: Vec<usize>,
    dtype: DType,
}

impl PeerCopy {
    /// Starts the copy of a contiguous tensor to another GPU while both compute. `None` if the
    /// devices are not two GPUs, or for a dtype that no pass uses.
    pub fn start(x: &Tensor, to: &Device) -> Result<Option<Self>> {
        if x.device().same_device(to) {
            return Ok(None);
        }
        let (storage, layout) = x.storage_and_layout();
        let (Storage::Cuda(storage), Device::Cuda(to)) = (&*storage, to) else { return Ok(None) };
        let from = storage.device.cuda_stream();
        let Some((start, end)) = layout.contiguous_offsets() else { return Ok(None) };
        let Some(stored) = stored(&storage.slice, start..end) else { return Ok(None) };
        let peer_copy = outliers_cuda::PeerCopy::start(&stored, &from, &to.cuda_stream())?;
        Ok(Some(Self { peer_copy, shape: x.dims().to_vec(), dtype: x.dtype() }))
    }

    /// The tensor on the GPU to which it was copied.
    pub fn wait(self, device: &Device) -> Result<Tensor> {
        let Device::Cuda(device) = device else {
            return Err(WorkerError::internal("a tensor arrives elsewhere than on the GPU it was sent to"));
        };
        match self.dtype {
            DType::F32 => self.arrive_as::<f32>(device),
            DType::BF16 => self.arrive_as::<bf16>(device),
            DType::F16 => self.arrive_as::<f16>(device),
            other => Err(WorkerError::internal(format!("no forward pass in {other:?}"))),
        }
    }

    fn arrive_as<T: CudaDType>(self, device: &CudaDevice) -> Result<Tensor> {
        let slice = self.peer_copy.wait::<T>(&device.cuda_stream())?;
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
        Ok(Tensor::from_storage(storage, self.shape, BackpropOp::none(), false))
    }
}
