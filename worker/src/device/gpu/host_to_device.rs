//! Uploads weights to a GPU: stored bytes pass through pinned memory and are decoded on the GPU
//! while it computes.

use std::ops::Range;

use candle_core::cuda_backend::cudarc::driver::DriverError;
use candle_core::cuda_backend::{CudaDType, CudaDevice};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
pub use outliers_cuda::ReleaseFence;
use outliers_cuda::{Codes, Form, Number, Staging, StoredTensor, Value};

use super::routing::tensor;
use crate::checkpoint::dtype::{self, Encoded};
use crate::checkpoint::safetensors::StoredDtype;
use crate::checkpoint::{MXFP4_BLOCK, NVFP4_BLOCK};
use crate::error::{Result, WorkerError};

const _: () = assert!(super::PINNED == outliers_cuda::PINNED as u64);

/// A way to one GPU.
pub struct HostToDevice {
    staging: Staging,
    device: CudaDevice,
}

impl HostToDevice {
    /// A path to `device`; `None` for the CPU.
    pub fn to(device: &Device) -> Result<Option<Self>> {
        let Device::Cuda(device) = device else { return Ok(None) };
        let staging = Staging::new(device.cuda_stream())?;
        Ok(Some(Self { staging, device: device.clone() }))
    }

    /// The fence of all tensors decoded so far.
    pub fn upload_fence(&mut self) -> Result<UploadFence> {
        Ok(UploadFence(self.staging.upload_fence()?))
    }

    /// As [`dtype::decode`], on this GPU. Returns before the values are there: the tensor must
    /// neither be used nor dropped before its [fence](Self::upload_fence). The fence reports
    /// values that do not fit the dtype.
    ///
    /// # Errors
    /// As [`dtype::check`].
    pub fn decode(&mut self, stored: &Encoded<'_>, shape: &[usize], compute: DType, name: &str) -> Result<Tensor> {
        dtype::check(stored, shape, name)?;
        let stored = as_told(stored)?;
        match compute {
            DType::F32 => self.decode_as::<f32>(stored, shape, name),
            DType::BF16 => self.decode_as::<bf16>(stored, shape, name),
            DType::F16 => self.decode_as::<f16>(stored, shape, name),
            other => Err(no_forward_pass(other)),
        }
    }

    /// As [`decode`](Self::decode), for the `bytes` of plain floats, which are read into pinned
    /// memory: `read` gets a range of the bytes, and as many to fill.
    ///
    /// # Errors
    /// As [`dtype::check`], and those of `read`.
    pub fn decode_read(
        &mut self,
        (stored, bytes): (&StoredDtype, usize),
        shape: &[usize],
        compute: DType,
        name: &str,
        read: impl FnMut(Range<usize>, &mut [u8]) -> Result<()>,
    ) -> Result<Tensor> {
        dtype::check_plain(stored, bytes, shape, name)?;
        let (stored, count) = (number(stored)?, shape.iter().product());
        let (staging, device) = (&mut self.staging, &self.device);
        Ok(match compute {
            DType::F32 => tensor(staging.decode_read::<f32, WorkerError>(stored, count, name, read)?, device, shape),
            DType::BF16 => tensor(staging.decode_read::<bf16, WorkerError>(stored, count, name, read)?, device, shape),
            DType::F16 => tensor(staging.decode_read::<f16, WorkerError>(stored, count, name, read)?, device, shape),
            other => return Err(no_forward_pass(other)),
        })
    }

    fn decode_as<T: Value + CudaDType>(
        &mut self,
        stored: StoredTensor<'_>,
        shape: &[usize],
        name: &str,
    ) -> Result<Tensor> {
        Ok(tensor(self.staging.decode::<T>(stored, shape.iter().product(), name)?, &self.device, shape))
    }
}

fn no_forward_pass(dtype: DType) -> WorkerError {
    WorkerError::internal(format!("no forward pass in {dtype:?}"))
}

/// A stored tensor as the kernel's arguments.
fn as_told<'a>(stored: &Encoded<'a>) -> Result<StoredTensor<'a>> {
    let (form, codes, scales): (_, &'a [u8], &'a [u8]) = match *stored {
        Encoded::Plain { dtype, bytes } => (Form::Plain(number(dtype)?), bytes, &[]),
        Encoded::Fp8Blocks { bytes, scales, scale_dtype, shape, block } => {
            // A tile larger than the matrix is clipped to it.
            let tile = [block[0].min(shape[0]).max(1), block[1].min(shape[1]).max(1)];
            (Form::Tiles { scales: number(scale_dtype)?, columns: shape[1], tile }, bytes, scales)
        }
        Encoded::Mxfp4 { blocks, scales } => {
            let form = Form::Pairs { codes: Codes::Floats, scales: Number::E8m0, whole: 1.0, group: MXFP4_BLOCK };
            (form, blocks, scales)
        }
        Encoded::Int4 { codes, scales, scale_dtype, group } => {
            let scale = number(scale_dtype)?;
            (Form::Pairs { codes: Codes::Integers, scales: scale, whole: 1.0, group }, codes, scales)
        }
        Encoded::Nvfp4 { blocks, scales, whole } => {
            let form = Form::Pairs { codes: Codes::Floats, scales: Number::E4m3, whole, group: NVFP4_BLOCK };
            (form, blocks, scales)
        }
    };
    Ok(StoredTensor { form, codes, scales })
}

fn number(dtype: &StoredDtype) -> Result<Number> {
    Ok(match dtype {
        StoredDtype::F32 => Number::F32,
        StoredDtype::F16 => Number::F16,
        StoredDtype::BF16 => Number::Bf16,
        StoredDtype::F8E8M0 => Number::E8m0,
        other => return Err(WorkerError::internal(format!("no kernel decodes {other}"))),
    })
}

/// Signals that decoded tensors are complete.
#[must_use]
pub struct UploadFence(outliers_cuda::UploadFence);

impl UploadFence {
    /// Waits for the fence. GPU work submitted afterwards sees the decoded values.
    ///
    /// # Errors
    /// Checkpoint: a value does not fit its dtype; the message names the tensor.
    pub fn wait(self) -> Result<()> {
        let misfit = self.0.wait()?;
        misfit.map_or(Ok(()), |misfit| Err(dtype::misfit(&misfit.tensor, misfit.at, misfit.value, misfit.dtype)))
    }
}

/// A fence after which all memory dropped so far is free; `None` for the CPU, where it is free at
/// once.
pub fn release_fence(device: &Device) -> Result<Option<ReleaseFence>> {
    let Device::Cuda(device) = device else { return Ok(None) };
    Ok(Some(ReleaseFence::from(&device.cuda_stream())?))
}

impl From<DriverError> for WorkerError {
    fn from(error: DriverError) -> Self {
        Self::device(format!("the GPU's driver: {error}"))
    }
}
