//! From stored bytes to a unit's tensors on a device.

use std::collections::HashMap;

use candle_core::{Device, Result, Tensor};

use crate::attention::AttentionWeights;
use crate::decoder::Role;
use crate::ffn::GatedWeights;

/// A matrix `[out, in]` and perhaps a bias `[out]`.
pub struct Linear {
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
}

impl Linear {
    /// `x W^T + b` for `x` `[rows, in]`.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let product = x.matmul(&self.weight.t()?)?;
        self.bias.as_ref().map_or(Ok(product.clone()), |bias| product.broadcast_add(bias))
    }
}

/// The decoded tensors of one streaming unit, by role and expert. Taking one out twice is a bug, so it is an error.
pub struct UnitTensors {
    tensors: HashMap<(Role, Option<usize>), Tensor>,
}

impl UnitTensors {
    /// Wraps decoded tensors.
    pub fn new(tensors: HashMap<(Role, Option<usize>), Tensor>) -> Self {
        Self { tensors }
    }

    /// Removes one tensor.
    ///
    /// # Errors
    /// If it is not there: a spec's needs and the block that uses them disagree.
    pub fn take(&mut self, role: Role) -> Result<Tensor> {
        self.take_expert(role, None)
    }

    fn take_expert(&mut self, role: Role, expert: Option<usize>) -> Result<Tensor> {
        let missing = || candle_core::Error::Msg(format!("no tensor {role:?} (expert {expert:?}) in this unit"));
        self.tensors.remove(&(role, expert)).ok_or_else(missing)
    }

    fn linear(&mut self, weight: Role, bias: Role) -> Result<Linear> {
        Ok(Linear { weight: self.take(weight)?, bias: self.tensors.remove(&(bias, None)) })
    }

    /// The attention tensors.
    pub fn attention(&mut self) -> Result<AttentionWeights> {
        let query_norm = self.tensors.remove(&(Role::QueryNorm, None));
        let key_norm = self.tensors.remove(&(Role::KeyNorm, None));
        Ok(AttentionWeights {
            query: self.linear(Role::Query, Role::QueryBias)?,
            key: self.linear(Role::Key, Role::KeyBias)?,
            value: self.linear(Role::Value, Role::ValueBias)?,
            output: self.linear(Role::Output, Role::OutputBias)?,
            qk_norm: query_norm.zip(key_norm),
        })
    }

    /// The dense MLP's tensors.
    pub fn gated(&mut self) -> Result<GatedWeights> {
        Ok(GatedWeights {
            gate: self.linear(Role::Gate, Role::GateBias)?,
            up: self.linear(Role::Up, Role::UpBias)?,
            down: self.linear(Role::Down, Role::DownBias)?,
        })
    }

    /// The router's matrix.
    pub fn router(&mut self) -> Result<Linear> {
        Ok(Linear { weight: self.take(Role::Router)?, bias: None })
    }

    /// One expert's tensors.
    pub fn expert(&mut self, expert: usize) -> Result<GatedWeights> {
        let mut linear =
            |role| Ok::<_, candle_core::Error>(Linear { weight: self.take_expert(role, Some(expert))?, bias: None });
        Ok(GatedWeights {
            gate: linear(Role::ExpertGate)?,
            up: linear(Role::ExpertUp)?,
            down: linear(Role::ExpertDown)?,
        })
    }
}

/// An empty accumulator like `x`, on its device.
pub fn zeros_like(x: &Tensor) -> Result<Tensor> {
    Tensor::zeros(x.shape(), x.dtype(), x.device())
}

/// Moves a tensor unless it is there already.
pub fn on(x: &Tensor, device: &Device) -> Result<Tensor> {
    if x.device().same_device(device) { Ok(x.clone()) } else { x.contiguous()?.to_device(device) }
}
