//! Routing on a GPU: kernels with the same results as the CPU code in [`crate::blocks::ffn`], over
//! the tensor library's tensors.

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView};
use candle_core::cuda_backend::{CudaDType, CudaDevice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp2, Layout, Result, Storage, Tensor, bail};
use half::{bf16, f16};
use outliers_cuda::fused::Real;
use outliers_cuda::routing::{self as kernels, CountsReadback, Kind, Rule};

use super::fused::in_dtype;
use super::{Load, Positions};
use crate::model::decoder::RouterSpec;

/// Chooses experts for each row of `logits` `[rows, experts]` in f32. Returns experts and weights
/// `[rows, top_k]`.
pub fn choose_experts(
    spec: RouterSpec,
    top_k: usize,
    logits: &Tensor,
    per_expert: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let (rows, experts) = logits.dims2()?;
    let device = logits.device().as_cuda_device()?;
    let (storage, layout) = logits.storage_and_layout();
    let numbers = per_expert.map(Tensor::storage_and_layout);
    let numbers = numbers.as_ref().map(|(storage, layout)| shown::<f32>(storage, layout)).transpose()?;
    let logits = shown::<f32>(&storage, layout)?;
    let sizes = [experts, top_k];
    let (chosen, weights) = kernels::choose(&device.cuda_stream(), &logits, numbers.as_ref(), sizes, rule(spec)).w()?;
    Ok((tensor(chosen, device, &[rows, top_k]), tensor(weights, device, &[rows, top_k])))
}

fn rule(spec: RouterSpec) -> Rule {
    let plain = |kind, normalise| Rule { kind, groups: 1, top_groups: 1, normalise, factor: 1.0 };
    match spec {
        RouterSpec::SoftmaxTopK { normalise } => plain(Kind::SoftmaxTopK, normalise),
        RouterSpec::TopKSoftmax => plain(Kind::TopKSoftmax, true),
        RouterSpec::SigmoidGroups { groups, top_groups, normalise, scale } => {
            Rule { kind: Kind::SigmoidGroups, groups, top_groups, normalise, factor: scale as f32 }
        }
        RouterSpec::SigmoidOfInput => plain(Kind::SigmoidOfInput, false),
        RouterSpec::SoftmaxGroups { groups, top_groups, scale } => {
            Rule { kind: Kind::SoftmaxGroups, groups, top_groups, normalise: false, factor: scale as f32 }
        }
        RouterSpec::NormedSoftmax { .. } => plain(Kind::NormedSoftmax, true),
    }
}

/// Pairs of token and expert on a GPU, sorted by expert.
pub struct SortedPairs {
    /// `[pairs]`: token indices, ascending within an expert.
    tokens: Tensor,
    /// `[pairs]`: gate weights in f32, in the same order.
    weights: Tensor,
    /// Counts being copied, until [`wait`](Self::wait).
    arriving: Option<CountsReadback>,
    /// Set by `wait`: the index of each expert's first pair, then the number of pairs.
    firsts: Vec<usize>,
    /// Tokens and weights, copied on first use.
    on_host: OnceLock<(Vec<u32>, Vec<f32>)>,
}

/// Sorts the choices `[rows, top_k]` among `experts` by expert. With `positions` it also sums the
/// gate weights per expert. The counts are still being copied to the host when this returns.
pub fn sort_pairs(
    chosen: &Tensor,
    weights: &Tensor,
    experts: usize,
    positions: Option<Positions>,
) -> Result<SortedPairs> {
    let (top_k, pairs) = (chosen.dim(1)?, chosen.elem_count());
    let device = chosen.device().as_cuda_device()?;
    let positions = positions.map(|Positions { first_token, tokens }| kernels::Positions { first_token, tokens });
    let ((chosen, of_chosen), (weights, of_weights)) = (chosen.storage_and_layout(), weights.storage_and_layout());
    let (chosen, weights) = (shown::<u32>(&chosen, of_chosen)?, shown::<f32>(&weights, of_weights)?);
    let sorted = kernels::sort(&device.cuda_stream(), &chosen, &weights, [experts, top_k], positions).w()?;
    Ok(SortedPairs {
        tokens: tensor(sorted.tokens, device, &[pairs]),
        weights: tensor(sorted.weights, device, &[pairs]),
        arriving: Some(sorted.counts),
        firsts: Vec::new(),
        on_host: OnceLock::new(),
    })
}

/// Memory `[rows, width]` for [`SortedPairs::gather`], of the dtype and on the device of `x`
/// `[.., width]`. Values are unspecified until all rows are gathered.
///
/// # Errors
/// Errors of the driver.
pub fn gathered_like(x: &Tensor, rows: usize) -> Result<Tensor> {
    let (width, device) = (x.dim(1)?, x.device().as_cuda_device()?);
    let (stream, values, shape) = (device.cuda_stream(), rows * width, [rows, width]);
    Ok(match x.dtype() {
        DType::F32 => tensor(kernels::gathered::<f32>(&stream, values).w()?, device, &shape),
        DType::BF16 => tensor(kernels::gathered::<bf16>(&stream, values).w()?, device, &shape),
        DType::F16 => tensor(kernels::gathered::<f16>(&stream, values).w()?, device, &shape),
        dtype => bail!("rows-of-pairs: there is no kernel for {dtype:?}"),
    })
}

impl SortedPairs {
    /// Waits for the counts on the first call. Returns the sums per expert if `positions` was
    /// given.
    pub fn wait(&mut self) -> Result<Vec<Load>> {
        let Some(arriving) = self.arriving.take() else { return Ok(Vec::new()) };
        let (firsts, loads) = arriving.wait().w()?;
        let load = |(load, firsts): (&kernels::Load, &[usize])| Load {
            tokens: (firsts[1] - firsts[0]) as u64,
            tokens_at_position_0: load.tokens_at_position_0,
            mass: load.mass.windows().collect(),
            mass_at_position_0: load.mass_at_position_0.windows().collect(),
        };
        let loads = loads.iter().zip(firsts.windows(2)).map(load).collect();
        self.firsts = firsts;
        Ok(loads)
    }

    /// Indices of the pairs of a group of experts; after [`wait`](Self::wait).
    pub fn range(&self, experts: &Range<usize>) -> Range<usize> {
        self.firsts[experts.start]..self.firsts[experts.end]
    }

    /// Copies the rows of `x` `[tokens, width]` of a group of experts to `all` `[rows, width]`.
    /// Each expert's rows start at its entry of `places`; they are multiplied by their weights if
    /// `scaled`.
    pub fn gather(
        &self,
        all: &Tensor,
        x: &Tensor,
        group: &Range<usize>,
        places: Vec<usize>,
        scaled: bool,
    ) -> Result<()> {
        let weights = scaled.then(|| self.weights.clone());
        let firsts = self.firsts[group.start..=group.end].to_vec();
        let tokens = self.tokens.clone();
        all.inplace_op2(x, &RowsOfPairs { tokens, weights, gathered: Some([firsts, places]) })
    }

    /// Adds `made` `[pairs, width]`, an expert's output for all its tokens, to the tokens' rows of
    /// `out` `[tokens, width]` in place, multiplied by the weights if `scaled`.
    pub fn add(&self, out: &Tensor, made: &Tensor, pairs: &Range<usize>, scaled: bool) -> Result<()> {
        let part = |all: &Tensor| all.narrow(0, pairs.start, pairs.len());
        let weights = if scaled { Some(part(&self.weights)?) } else { None };
        out.inplace_op2(made, &RowsOfPairs { tokens: part(&self.tokens)?, weights, gathered: None })
    }

    /// Tokens and weights of some pairs. The first call copies all of them.
    pub fn on_host(&self, pairs: &Range<usize>) -> Result<(&[u32], &[f32])> {
        let (tokens, weights) = match self.on_host.get() {
            Some(copied) => copied,
            None => {
                let copied = (self.tokens.to_vec1()?, self.weights.to_vec1()?);
                self.on_host.get_or_init(|| copied)
            }
        };
        Ok((&tokens[pairs.clone()], &weights[pairs.clone()]))
    }
}

/// Adds an expert's rows to their tokens' rows, or gathers them.
struct RowsOfPairs {
    tokens: Tensor,
    weights: Option<Tensor>,
    /// For gathering: the first pair of each expert, and the first row of its output.
    gathered: Option<[Vec<usize>; 2]>,
}

impl InplaceOp2 for RowsOfPairs {
    fn name(&self) -> &'static str {
        "rows-of-pairs"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<()> {
        bail!("rows-of-pairs: pairs of a GPU on a CPU")
    }

    fn cuda_fwd(&self, out: &mut CudaStorage, of_out: &Layout, x: &CudaStorage, of_x: &Layout) -> Result<()> {
        in_dtype!(out, T => self.run::<T>(out, of_out, x, of_x))
    }
}

impl RowsOfPairs {
    fn run<T: CudaDType + Real>(
        &self,
        out: &mut CudaStorage,
        of_out: &Layout,
        x: &CudaStorage,
        of_x: &Layout,
    ) -> Result<()> {
        let (_, width) = of_out.shape().dims2()?;
        let stream = out.device.cuda_stream();
        let weights = self.weights.as_ref().map(Tensor::storage_and_layout);
        let weights = weights.as_ref().map(|(storage, layout)| shown::<f32>(storage, layout)).transpose()?;
        let (start, end) = offsets(of_out)?;
        let mut out = out.as_cuda_slice_mut::<T>()?.slice_mut(start..end);
        let (tokens, of_tokens) = self.tokens.storage_and_layout();
        let (x, tokens) = (view::<T>(x, of_x)?, shown::<u32>(&tokens, of_tokens)?);
        match &self.gathered {
            None => kernels::add_rows(&stream, &mut out, &x, &tokens, weights.as_ref(), width).w(),
            Some([firsts, places]) => {
                let places = [&firsts[..], &places[..]];
                kernels::gather_rows(&stream, &mut out, &x, &tokens, weights.as_ref(), places, width).w()
            }
        }
    }
}

pub(super) fn tensor<T: CudaDType>(slice: CudaSlice<T>, device: &CudaDevice, shape: &[usize]) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

fn offsets(layout: &Layout) -> Result<(usize, usize)> {
    match layout.contiguous_offsets() {
        Some(offsets) => Ok(offsets),
        None => bail!("a kernel on a tensor that is not contiguous: {:?}", layout.shape()),
    }
}

fn view<'a, T: CudaDType>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    let (start, end) = offsets(layout)?;
    Ok(storage.as_cuda_slice::<T>()?.slice(start..end))
}

/// The values of a tensor's storage.
pub(super) fn shown<'a, T: CudaDType>(storage: &'a Storage, layout: &Layout) -> Result<CudaView<'a, T>> {
    match storage {
        Storage::Cuda(storage) => view(storage, layout),
        _ => bail!("a tensor of a GPU is not there"),
    }
}
