//! Replaces all that needs CUDA in builds without it: there is no GPU, and none of these types has
//! a value.

#![allow(missing_docs, reason = "each item is described where it does something")]

use std::convert::Infallible;
use std::marker::PhantomData;
use std::ops::Range;

use candle_core::{DType, Device, Result as TensorResult, Tensor, bail};
use outliers_scan::{Columns, Large, Scan};

use super::{FusedAttention, Gpus, Load, Positions, Traffic};
use crate::checkpoint::dtype::Encoded;
use crate::checkpoint::safetensors::StoredDtype;
use crate::error::{Result, WorkerError};
use crate::model::decoder::RouterSpec;

pub fn find() -> Gpus {
    let why_none = Some("this worker was built without CUDA".to_owned());
    Gpus { gpus: Vec::new(), why_none, wasted: false }
}

pub fn oldest_driver() -> Option<String> {
    None
}

pub fn free_memory(_: &Device) -> Option<u64> {
    None
}

pub fn is_idle(_: &Device) -> Option<bool> {
    None
}

pub fn copy_rates(_: &Device, _: usize) -> Result<Option<[f64; 2]>> {
    Ok(None)
}

pub fn traffic() -> Traffic {
    Traffic::default()
}

pub struct PendingCopy(Infallible);

impl PendingCopy {
    pub fn start(_: &Tensor) -> Result<Option<Self>> {
        Ok(None)
    }

    pub fn wait(self) -> Result<Vec<f32>> {
        match self.0 {}
    }
}

pub struct PendingScan(Infallible);

impl PendingScan {
    pub fn at(_: &Tensor, _: usize, _: Option<f32>, _: bool) -> Result<Self> {
        Err(WorkerError::internal("a tensor is on a GPU, which this worker was built without"))
    }

    pub fn tensor(&self) -> &Tensor {
        match self.0 {}
    }

    pub fn show<T>(&self, _: impl FnOnce(&ScanSummary<'_>) -> Result<T>) -> Result<T> {
        match self.0 {}
    }
}

pub struct ScanSummary<'a>(Infallible, PhantomData<&'a ()>);

impl ScanSummary<'_> {
    pub fn rows(&self) -> usize {
        match self.0 {}
    }

    pub fn scan(&self) -> TensorResult<Vec<Scan>> {
        match self.0 {}
    }

    pub fn columns(&self, _: f32) -> TensorResult<Vec<Columns>> {
        match self.0 {}
    }

    pub fn medians(&self) -> TensorResult<Vec<f32>> {
        match self.0 {}
    }

    pub fn large(&self, _: &[(usize, u32)]) -> TensorResult<Vec<Large>> {
        match self.0 {}
    }
}

pub fn attends(_: &Tensor, _: &Tensor) -> bool {
    false
}

pub fn attend(_: FusedAttention<'_>, _: &Tensor, _: &Tensor, _: &Tensor) -> TensorResult<(Tensor, Option<Tensor>)> {
    bail!("queries are on a GPU, which this worker was built without")
}

pub fn try_in_group(_: &Tensor) -> Option<String> {
    None
}

pub fn takes_in_group(_: &Tensor) -> bool {
    false
}

pub fn grouped_product(_: &Tensor, _: &[&Tensor], _: &[usize]) -> TensorResult<Tensor> {
    bail!("matrices are on a GPU, which this worker was built without")
}

pub struct HostToDevice(Infallible);

impl HostToDevice {
    pub fn to(_: &Device) -> Result<Option<Self>> {
        Ok(None)
    }

    pub fn upload_fence(&mut self) -> Result<UploadFence> {
        match self.0 {}
    }

    pub fn decode(&mut self, _: &Encoded<'_>, _: &[usize], _: DType, _: &str) -> Result<Tensor> {
        match self.0 {}
    }

    pub fn decode_read(
        &mut self,
        _: (&StoredDtype, usize),
        _: &[usize],
        _: DType,
        _: &str,
        _: impl FnMut(Range<usize>, &mut [u8]) -> Result<()>,
    ) -> Result<Tensor> {
        match self.0 {}
    }
}

pub struct UploadFence(Infallible);

impl UploadFence {
    pub fn wait(self) -> Result<()> {
        match self.0 {}
    }
}

/// Memory of the CPU is free at once.
pub fn release_fence(_: &Device) -> Result<Option<ReleaseFence>> {
    Ok(None)
}

pub struct ReleaseFence(Infallible);

impl ReleaseFence {
    pub fn wait(self) -> Result<()> {
        match self.0 {}
    }
}

pub struct PeerCopy(Infallible);

impl PeerCopy {
    pub fn start(_: &Tensor, _: &Device) -> Result<Option<Self>> {
        Ok(None)
    }

    pub fn wait(self, _: &Device) -> Result<Tensor> {
        match self.0 {}
    }
}

pub fn choose_experts(_: RouterSpec, _: usize, _: &Tensor, _: Option<&Tensor>) -> TensorResult<(Tensor, Tensor)> {
    bail!("logits are on a GPU, which this worker was built without")
}

pub fn sort_pairs(_: &Tensor, _: &Tensor, _: usize, _: Option<Positions>) -> TensorResult<SortedPairs> {
    bail!("choices are on a GPU, which this worker was built without")
}

pub fn gathered_like(_: &Tensor, _: usize) -> TensorResult<Tensor> {
    bail!("rows are on a GPU, which this worker was built without")
}

pub struct SortedPairs(Infallible);

impl SortedPairs {
    pub fn wait(&mut self) -> TensorResult<Vec<Load>> {
        match self.0 {}
    }

    pub fn range(&self, _: &Range<usize>) -> Range<usize> {
        match self.0 {}
    }

    pub fn gather(&self, _: &Tensor, _: &Tensor, _: &Range<usize>, _: Vec<usize>, _: bool) -> TensorResult<()> {
        match self.0 {}
    }

    pub fn add(&self, _: &Tensor, _: &Tensor, _: &Range<usize>, _: bool) -> TensorResult<()> {
        match self.0 {}
    }

    pub fn on_host(&self, _: &Range<usize>) -> TensorResult<(&[u32], &[f32])> {
        match self.0 {}
    }
}
