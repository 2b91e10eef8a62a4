//! Weights on their way to a GPU: decoded into pinned memory, and copied from there while it computes.

use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, DriverError};
use candle_core::cuda_backend::{CudaDType, CudaDevice};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Device, Storage, Tensor};
use half::{bf16, f16};
use outliers_cuda::Staging;
pub use outliers_cuda::{ReleaseFence, UploadFence};

use crate::dtype::{self, Compute, Encoded};
use crate::error::{Result, WorkerError};

/// A way to one GPU.
pub struct HostToDevice {
    staging: Staging,
    device: CudaDevice,
}

impl HostToDevice {
    /// To a GPU; the CPU needs none.
    ///
    /// # Errors
    /// Device: the driver's.
    pub fn to(device: &Device) -> Result<Option<Self>> {
        let Device::Cuda(device) = device else { return Ok(None) };
        let staging = Staging::new(device.cuda_stream())?;
        Ok(Some(Self { staging, device: device.clone() }))
    }

    /// Of all that was decoded so far.
    ///
    /// # Errors
    /// Device: the driver's.
    pub fn upload_fence(&self) -> Result<UploadFence> {
        Ok(self.staging.upload_fence()?)
    }

    /// As [`dtype::decode`], to this GPU. The values are on their way when this returns: the tensor must neither be used nor dropped before
    /// their [fence](Self::upload_fence).
    ///
    /// # Errors
    /// As [`dtype::decode`]. Device: the driver's.
    pub fn decode(&mut self, stored: &Encoded<'_>, shape: &[usize], compute: DType, tensor: &str) -> Result<Tensor> {
        let decode = match compute {
            DType::F32 => Self::decode_as::<f32>,
            DType::BF16 => Self::decode_as::<bf16>,
            DType::F16 => Self::decode_as::<f16>,
            _ => return dtype::decode(stored, shape, compute, &Device::Cuda(self.device.clone()), tensor),
        };
        decode(self, stored, shape, tensor)
    }

    fn decode_as<T: Compute + CudaDType + DeviceRepr + bytemuck::Pod>(
        &mut self,
        stored: &Encoded<'_>,
        shape: &[usize],
        tensor: &str,
    ) -> Result<Tensor> {
        let values = shape.iter().product();
        let slice = dtype::decode_in_parts::<T, _>(stored, shape, tensor, |granule, decode| {
            self.staging.upload(values, granule, decode)
        })?;
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, self.device.clone()));
        Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
    }
}

/// When the memory is free again of all that was dropped so far; the CPU's is at once.
///
/// # Errors
/// Device: the driver's.
pub fn release_fence(device: &Device) -> Result<Option<ReleaseFence>> {
    let Device::Cuda(device) = device else { return Ok(None) };
    Ok(Some(ReleaseFence::from(&device.cuda_stream())?))
}

impl From<DriverError> for WorkerError {
    fn from(error: DriverError) -> Self {
        Self::device(format!("the GPU's driver: {error}"))
    }
}
