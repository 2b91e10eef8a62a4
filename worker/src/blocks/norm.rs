//! Norms over the last dimension.

use candle_core::{Result, Tensor};

use crate::kernels::fused;
use crate::model::decoder::{NormKind, NormSpec};

/// A norm with its tensors on one device.
pub struct Norm {
    spec: NormSpec,
    gain: Tensor,
    bias: Option<Tensor>,
}

impl Norm {
    /// `weight` `[width]` as stored; `bias` `[width]` for kinds that have one.
    pub fn new(spec: NormSpec, weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let gain = match spec.kind {
            NormKind::RmsZeroCentred => (weight + 1.0)?,
            NormKind::Rms | NormKind::Layer => weight,
        };
        Ok(Self { spec, gain, bias })
    }

    /// Factors of the normalised values, `[width]`.
    pub fn gain(&self) -> &Tensor {
        &self.gain
    }

    /// Normalises `x` `[.., width]`, contiguous.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        match &self.bias {
            None => fused::rms_norm(x, &self.gain, self.spec.eps),
            Some(bias) => fused::layer_norm(x, &self.gain, bias, self.spec.eps),
        }
    }

    /// Computes `residual + apply(x)`, both of the same shape.
    pub fn apply_onto(&self, residual: &Tensor, x: &Tensor) -> Result<Tensor> {
        match &self.bias {
            None => fused::rms_norm_onto(residual, x, &self.gain, self.spec.eps),
            Some(_) => fused::sum(self.apply(x)?, residual),
        }
    }
}
