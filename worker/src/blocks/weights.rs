//! Builds the weights of blocks from a unit's decoded tensors.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};

use crate::blocks::attention::{AttentionWeights, Projections};
use crate::blocks::delta_net::{DeltaNetWeights, DeltaProjections};
use crate::blocks::ffn::{GateUpProj, MlpWeights, ParallelMlp, Router, SharedWeights};
use crate::blocks::mamba::MambaWeights;
use crate::blocks::mla::{LatentQuery, LatentWeights};
use crate::blocks::norm::Norm;
use crate::kernels::input_collector::InputCollector;
use crate::kernels::input_collectors::InputCollectors;
use crate::kernels::product::Linear;
use crate::model::decoder::{
    AttentionSpec, DeltaNetSpec, DeltaStored, GateUp, LatentSpec, MambaSpec, MixerSpec, MlpRoles, MlpSpec, MoeSpec,
    NormSpec, OutputGate, QkNorm, Role, RouterSpec, SharedSpec,
};

/// A mixer's tensors on one device.
pub enum MixerWeights {
    /// Weights of [`MixerSpec::Attention`].
    Attention(AttentionWeights),
    /// Weights of [`MixerSpec::Latent`].
    Latent(LatentWeights),
    /// Weights of [`MixerSpec::DeltaNet`].
    DeltaNet(DeltaNetWeights),
    /// Weights of [`MixerSpec::Mamba`].
    Mamba(MambaWeights),
}

/// The decoded tensors of one streaming unit, by role and expert. Each is taken out once. To take
/// a missing one is an error, unless the method gives an `Option`: a spec and the block that uses
/// it disagree. It is no panic, since a run costs money.
pub struct UnitTensors {
    tensors: HashMap<(Role, Option<usize>), Tensor>,
    collectors: Option<InputCollectors>,
}

impl UnitTensors {
    /// Wraps decoded tensors.
    pub fn new(tensors: HashMap<(Role, Option<usize>), Tensor>) -> Self {
        Self { tensors, collectors: None }
    }

    /// Attaches the layer's collectors to the matrices that are taken from now on.
    #[must_use]
    pub fn with_collectors(self, collectors: Option<InputCollectors>) -> Self {
        Self { collectors, ..self }
    }

    /// Removes one tensor.
    pub fn take(&mut self, role: Role) -> Result<Tensor> {
        self.take_for(role, None)
    }

    fn take_for(&mut self, role: Role, expert: Option<usize>) -> Result<Tensor> {
        let missing = || candle_core::Error::Msg(format!("no tensor {role:?} (expert {expert:?}) in this unit"));
        self.tensors.remove(&(role, expert)).ok_or_else(missing)
    }

    fn linear(&mut self, weight: Role, bias: Role, expert: Option<usize>) -> Result<Linear> {
        let collector = self.collector(weight, expert);
        Ok(Linear { weight: self.take_for(weight, expert)?, bias: self.tensors.remove(&(bias, expert)), collector })
    }

    fn plain(&mut self, weight: Role) -> Result<Linear> {
        Ok(Linear { weight: self.take(weight)?, bias: None, collector: self.collector(weight, None) })
    }

    fn collector(&self, weight: Role, expert: Option<usize>) -> Option<InputCollector> {
        self.collectors.as_ref()?.of(weight, expert)
    }

    /// Takes a matrix without bias; `None` if there is none.
    pub fn linear_if_there(&mut self, role: Role) -> Option<Linear> {
        let weight = self.tensors.remove(&(role, None))?;
        Some(Linear { weight, bias: None, collector: self.collector(role, None) })
    }

    /// Takes a norm's tensors.
    pub fn norm(&mut self, spec: NormSpec, gain: Role, bias: Role) -> Result<Norm> {
        let bias = self.tensors.remove(&(bias, None));
        Norm::new(spec, self.take(gain)?, bias)
    }

    /// Takes a mixer's tensors.
    pub fn mixer(&mut self, spec: &MixerSpec) -> Result<MixerWeights> {
        Ok(match spec {
            MixerSpec::Attention(spec) => MixerWeights::Attention(self.attention(spec)?),
            MixerSpec::Latent(spec) => MixerWeights::Latent(self.latent(spec)?),
            MixerSpec::DeltaNet(spec) => MixerWeights::DeltaNet(self.delta_net(spec)?),
            MixerSpec::Mamba(spec) => MixerWeights::Mamba(self.mamba(spec)?),
            MixerSpec::None => return Err(candle_core::Error::Msg("a mixer's unit in a layer without one".to_owned())),
        })
    }

    fn attention(&mut self, spec: &AttentionSpec) -> Result<AttentionWeights> {
        let projections = if spec.fused_qkv {
            Projections::Fused(self.linear(Role::QkvProj, Role::QkvProjBias, None)?)
        } else if spec.key_is_value {
            Projections::KeyIsValue {
                query: self.linear(Role::QProj, Role::QProjBias, None)?,
                key: self.linear(Role::KProj, Role::KProjBias, None)?,
            }
        } else {
            Projections::Separate {
                query: self.linear(Role::QProj, Role::QProjBias, None)?,
                key: self.linear(Role::KProj, Role::KProjBias, None)?,
                value: self.linear(Role::VProj, Role::VProjBias, None)?,
            }
        };
        let qk_norm = match spec.qk_norm {
            QkNorm::None | QkNorm::AfterRope { .. } => None,
            QkNorm::WholeProjection(norm) | QkNorm::PerHead(norm) => {
                Some((Norm::new(norm, self.take(Role::QNorm)?, None)?, Norm::new(norm, self.take(Role::KNorm)?, None)?))
            }
        };
        let sinks = if spec.sinks { Some(self.take(Role::Sinks)?) } else { None };
        let separate = spec.output_gate == OutputGate::Separate;
        let gate = if separate { Some(self.plain(Role::OutputGate)?) } else { None };
        let output = self.linear(Role::OProj, Role::OProjBias, None)?;
        Ok(AttentionWeights { projections, output, qk_norm, sinks, gate })
    }

    fn latent(&mut self, spec: &LatentSpec) -> Result<LatentWeights> {
        let query = match spec.query_rank {
            None => LatentQuery::Direct(self.plain(Role::QProj)?),
            Some(_) => LatentQuery::LowRank {
                down: self.plain(Role::QAProj)?,
                norm: Norm::new(spec.norm, self.take(Role::QANorm)?, None)?,
                up: self.plain(Role::QBProj)?,
            },
        };
        Ok(LatentWeights {
            query,
            kv_down: self.plain(Role::KvAProj)?,
            kv_norm: Norm::new(spec.norm, self.take(Role::KvANorm)?, None)?,
            kv_up: self.plain(Role::KvBProj)?,
            output: self.plain(Role::OProj)?,
            queries: self.collectors.as_ref().map(InputCollectors::queries),
        })
    }

    fn delta_net(&mut self, spec: &DeltaNetSpec) -> Result<DeltaNetWeights> {
        let projections = match spec.stored {
            DeltaStored::ByKeyHead => {
                DeltaProjections::ByKeyHead { qkvz: self.plain(Role::DeltaQkvz)?, ba: self.plain(Role::DeltaBa)? }
            }
            DeltaStored::ByKind => DeltaProjections::ByKind {
                qkv: self.plain(Role::DeltaQkv)?,
                gates: self.plain(Role::DeltaGate)?,
                strengths: self.plain(Role::DeltaStrength)?,
                steps: self.plain(Role::DeltaStep)?,
            },
            DeltaStored::Apart => DeltaProjections::Apart {
                query: self.plain(Role::QProj)?,
                key: self.plain(Role::KProj)?,
                value: self.plain(Role::VProj)?,
                gates: [self.plain(Role::DeltaGateDown)?, self.plain(Role::DeltaGateUp)?],
                strengths: self.plain(Role::DeltaStrength)?,
                steps: [self.plain(Role::DeltaStepDown)?, self.plain(Role::DeltaStepUp)?],
            },
        };
        let convolution = if spec.stored == DeltaStored::Apart {
            let parts = [Role::DeltaQueryConvolution, Role::DeltaKeyConvolution, Role::DeltaValueConvolution];
            Tensor::cat(&parts.map(|role| self.take(role)).into_iter().collect::<Result<Vec<_>>>()?, 0)?
        } else {
            self.take(Role::DeltaConvolution)?
        };
        Ok(DeltaNetWeights {
            projections,
            convolution,
            decay: self.take(Role::DeltaDecay)?.flatten_all()?,
            step_bias: self.take(Role::DeltaStepBias)?,
            norm: Norm::new(spec.norm, self.take(Role::DeltaNorm)?, None)?,
            output: self.plain(Role::DeltaOutput)?,
        })
    }

    fn mamba(&mut self, spec: &MambaSpec) -> Result<MambaWeights> {
        Ok(MambaWeights {
            input: self.plain(Role::MambaInput)?,
            convolution: self.take(Role::MambaConvolution)?,
            bias: if spec.convolution_bias { Some(self.take(Role::MambaConvolutionBias)?) } else { None },
            decay: self.take(Role::MambaDecay)?,
            step_bias: self.take(Role::MambaStepBias)?,
            skip: self.take(Role::MambaSkip)?,
            gain: self.take(Role::MambaNorm)?,
            output: self.plain(Role::MambaOutput)?,
        })
    }

    fn mlp(&mut self, spec: MlpSpec, roles: &MlpRoles, expert: Option<usize>) -> Result<MlpWeights> {
        let mut linear = |[weight, bias]: [Role; 2]| self.linear(weight, bias, expert);
        let gate_up = match spec.gate_up() {
            None => GateUpProj::Up(linear(roles.up)?),
            Some(GateUp::Separate) => GateUpProj::Separate { gate: linear(roles.gate)?, up: linear(roles.up)? },
            Some(GateUp::Halves | GateUp::Interleaved) => GateUpProj::Joined(linear(roles.gate_up)?),
        };
        Ok(MlpWeights { kind: spec.kind, gate_up, down: linear(roles.down)? })
    }

    /// Takes a dense feed-forward's tensors.
    pub fn dense(&mut self, spec: MlpSpec) -> Result<MlpWeights> {
        self.mlp(spec, &MlpRoles::DENSE, None)
    }

    /// Takes one expert's tensors.
    pub fn expert(&mut self, spec: MlpSpec, expert: usize) -> Result<MlpWeights> {
        self.mlp(spec, &MlpRoles::EXPERT, Some(expert))
    }

    /// Takes the tensors of the router and the shared expert.
    pub fn router(&mut self, spec: &MoeSpec) -> Result<(Router, Option<SharedWeights>)> {
        let mut numbers = |role| self.take(role)?.to_dtype(DType::F32);
        let per_expert = match spec.router {
            router if router.correction() => Some(numbers(Role::CorrectionBias)?),
            router if router.scales() => Some(numbers(Role::ExpertScale)?),
            _ => None,
        };
        let input = match spec.router {
            RouterSpec::NormedSoftmax { eps } => {
                let scale = self.take(Role::RouterScale)?.to_dtype(DType::F32)?;
                let root = (scale.elem_count() as f64).sqrt();
                Some(Norm::new(NormSpec::rms(eps), (scale / root)?, None)?)
            }
            _ => None,
        };
        let router = Router { logits: self.linear(Role::Router, Role::RouterBias, None)?, input, per_expert };
        let shared = spec.shared.map(|shared| self.shared(shared)).transpose()?;
        Ok((router, shared))
    }

    /// Takes the tensors of the dense MLP beside a mixture; `None` if there is none. `norm` is the
    /// layer's kind of norm.
    pub fn beside(&mut self, spec: &MoeSpec, norm: NormSpec) -> Result<Option<ParallelMlp>> {
        let Some(mlp) = spec.beside else { return Ok(None) };
        Ok(Some(ParallelMlp {
            mlp: self.dense(mlp)?,
            norm: Norm::new(norm, self.take(Role::BesidePostNorm)?, None)?,
            experts: Norm::new(norm, self.take(Role::ExpertsNorm)?, None)?,
        }))
    }

    /// Takes a norm without bias; `None` if there is none. Fails as [`Norm::new`].
    pub fn norm_if_there(&mut self, spec: NormSpec, gain: Role) -> Result<Option<Norm>> {
        self.tensors.remove(&(gain, None)).map(|gain| Norm::new(spec, gain, None)).transpose()
    }

    /// Takes one tensor; `None` if there is none.
    pub fn take_if_there(&mut self, role: Role) -> Option<Tensor> {
        self.tensors.remove(&(role, None))
    }

    fn shared(&mut self, spec: SharedSpec) -> Result<SharedWeights> {
        let gate = if spec.gate { Some(self.plain(Role::SharedExpertGate)?) } else { None };
        Ok(SharedWeights { mlp: self.mlp(spec.mlp, &MlpRoles::SHARED, None)?, gate })
    }
}

/// An empty accumulator like `x`, on its device.
pub fn zeros_like(x: &Tensor) -> Result<Tensor> {
    Tensor::zeros(x.shape(), x.dtype(), x.device())
}

/// Prepares a tensor for [`on`] on another thread's device: copies it to host memory if the device
/// changes. Between two GPUs [`PeerCopy`](crate::device::gpu::PeerCopy) copies without waiting;
/// the library's copy fails if the GPUs cannot access each other (huggingface/candle#3524).
pub fn leave(x: &Tensor, device: &Device) -> Result<Tensor> {
    if x.device().same_device(device) { Ok(x.clone()) } else { x.contiguous()?.to_device(&Device::Cpu) }
}

/// Copies a tensor to `device` unless it is there.
pub fn on(x: &Tensor, device: &Device) -> Result<Tensor> {
    if x.device().same_device(device) { Ok(x.clone()) } else { x.contiguous()?.to_device(device) }
}
