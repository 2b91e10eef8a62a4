//! Products of hidden states and weights.

use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, bail};
use half::bf16;
use outliers_matmul::{Order, Real, Unit};

use crate::device::{Placement, gpu};
use crate::kernels::fused;
use crate::kernels::input_collector::InputCollector;

/// Whether products on this device take bf16 weights for any dtype of the pass: the product is
/// exact and the fastest.
pub fn takes_bf16(device: &Device) -> bool {
    unit(device).is_some()
}

/// How devices compute, as far as memory plans depend on it. The default is a GPU's.
#[derive(Clone, Copy, Debug, Default)]
pub struct Arithmetic {
    /// Products [take bf16 weights](takes_bf16).
    pub takes_bf16: bool,
    /// Products convert both operands to f32, each time.
    pub widens: bool,
    /// The device is a CPU: experts' rows are gathered and added in place by CPU loops, and
    /// attention processes one sequence at a time.
    pub in_place: bool,
}

impl Arithmetic {
    /// The arithmetic of `devices` in a pass of dtype `compute`.
    pub fn of(devices: &[Placement], compute: DType) -> Self {
        let all =
            |is: fn(&Device) -> bool| !devices.is_empty() && devices.iter().all(|placement| is(&placement.device));
        let takes_bf16 = all(takes_bf16);
        let widens = compute == DType::BF16 && all(Device::is_cpu) && !takes_bf16;
        Self { takes_bf16, widens, in_place: all(fused::has_loops_on) }
    }
}

/// A linear layer: a matrix `[out, in]` and an optional bias `[out]`.
pub struct Linear {
    /// Shape `[out, in]`, in the dtype of the pass or in bf16; a transposed view if the checkpoint
    /// stores `[in, out]`.
    pub weight: Tensor,
    /// Shape `[out]`.
    pub bias: Option<Tensor>,
    /// Observer of the input, if there is one.
    pub collector: Option<InputCollector>,
}

impl Linear {
    /// A layer without an observer.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias, collector: None }
    }

    /// Passes an input `[rows, in]` to the observer where the product is computed elsewhere.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn observe_input(&self, x: &Tensor) -> Result<()> {
        self.collector.as_ref().map_or(Ok(()), |collector| collector.add(x))
    }

    /// Computes `x W^T + b` for `x` `[rows, in]`.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        self.observe_input(x)?;
        let product = product(x, &self.weight)?;
        match &self.bias {
            Some(bias) => fused::sum(product, bias),
            None => Ok(product),
        }
    }
}

/// Has the library for a GPU compute its first product, for which it loads kernels and takes
/// memory; for a model with `experts` also two by one call, as [`each`] does. Gives its reason if
/// it refuses the latter. This waits for none of that; the CPU needs none.
pub fn get_ready(device: &Device, dtype: DType, experts: bool) -> Result<Option<String>> {
    /// Of a small matrix.
    const SIDE: usize = 64;
    if !device.is_cuda() {
        return Ok(None);
    }
    let x = Tensor::zeros((SIDE, SIDE), dtype, device)?;
    product(&x, &x)?;
    Ok(experts.then(|| gpu::try_in_group(&x)).flatten())
}

/// Whether [`each`] multiplies rows of this dtype with all of these matrices by one call.
pub fn goes_together<'a>(mut matrices: impl Iterator<Item = &'a Linear>, dtype: DType) -> bool {
    matrices.all(|linear| linear.weight.dtype() == dtype && gpu::takes_in_group(&linear.weight))
}

/// `x W^T + b` over rows of `x` `[rows, in]`: each matrix takes so many of them, behind those of
/// the one before. Several matrices are of one shape, and have to [go together](goes_together).
pub fn each(matrices: &[&Linear], x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    if let [one] = matrices {
        return one.apply(x);
    }
    let weights: Vec<&Tensor> = matrices.iter().map(|linear| &linear.weight).collect();
    let product = gpu::grouped_product(x, &weights, rows)?;
    let mut first = 0;
    for (linear, rows) in matrices.iter().zip(rows).filter(|(_, rows)| **rows > 0) {
        if linear.collector.is_some() {
            linear.observe_input(&x.narrow(0, first, *rows)?)?;
        }
        if let Some(bias) = &linear.bias {
            // In its place.
            fused::sum(product.narrow(0, first, *rows)?, bias)?;
        }
        first += rows;
    }
    Ok(product)
}

fn unit(device: &Device) -> Option<Unit> {
    fused::has_loops_on(device).then(Unit::find).flatten()
}

/// Computes `x W^T` for `x` `[.., rows, in]` and `weight` `[.., out, in]`, of the same dtype or in
/// bf16; a matrix may be a transposed view. `weight` has one matrix, or the same number as `x`.
pub fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if weight.dtype() == DType::BF16
        && matches!(x.dtype(), DType::F32 | DType::BF16)
        && let Some(unit) = unit(x.device())
    {
        return x.contiguous()?.apply_op2_no_bwd(weight, &ByUnit(unit));
    }
    x.matmul(&weight.to_dtype(x.dtype())?.t()?)
}

struct ByUnit(Unit);

impl CustomOp2 for ByUnit {
    fn name(&self) -> &'static str {
        "product-by-unit"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, weight: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let weights = Weights::new(weight, lw)?;
        let (batch, [rows, k]) = matrices(lx.dims())?;
        if (batch, k) != (weights.batch, weights.k) {
            bail!("product-by-unit: {:?} times {:?}", lx.shape(), lw.shape());
        }
        let Some((first, end)) = lx.contiguous_offsets() else {
            bail!("product-by-unit: what is multiplied is not contiguous");
        };
        let out = match x {
            CpuStorage::F32(x) => CpuStorage::F32(weights.multiply(self.0, &x[first..end], rows)),
            CpuStorage::BF16(x) => CpuStorage::BF16(weights.multiply(self.0, &x[first..end], rows)),
            _ => bail!("product-by-unit: neither f32 nor bf16"),
        };
        let dims = [&lx.dims()[..lx.dims().len() - 1], &[weights.n]].concat();
        Ok((out, Shape::from(dims)))
    }
}

/// Number of matrices, and their rows and columns.
fn matrices(dims: &[usize]) -> Result<(usize, [usize; 2])> {
    match *dims {
        [rows, columns] => Ok((1, [rows, columns])),
        [batch, rows, columns] => Ok((batch, [rows, columns])),
        _ => bail!("product-by-unit: {dims:?} are no matrices"),
    }
}

/// Matrices `[n, k]` at equal distances in memory.
struct Weights<'a> {
    values: &'a [bf16],
    order: Order,
    batch: usize,
    distance: usize,
    n: usize,
    k: usize,
}

impl<'a> Weights<'a> {
    fn new(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let CpuStorage::BF16(values) = storage else { bail!("product-by-unit: weights are not of bf16") };
        let (batch, [n, k]) = matrices(layout.dims())?;
        let (of_batch, of_matrix) = layout.stride().split_at(layout.dims().len() - 2);
        let order = match *of_matrix {
            // The stride of a dimension of size 1 is arbitrary.
            [row, column] if (column == 1 || k == 1) && (row == k || n == 1) => Order::Rows,
            [row, column] if (row == 1 || n == 1) && (column == n || k == 1) => Order::Columns,
            _ => bail!("product-by-unit: weights {:?} with strides {:?}", layout.shape(), layout.stride()),
        };
        let distance = of_batch.first().copied().unwrap_or_default();
        Ok(Self { values: &values[layout.start_offset()..], order, batch, distance, n, k })
    }

    /// The products with this many matrices of `rows` rows each.
    fn multiply<A: Real>(&self, unit: Unit, x: &[A], rows: usize) -> Vec<A> {
        let mut out = Vec::with_capacity(self.batch * rows * self.n);
        for index in 0..self.batch {
            let x = &x[index * rows * self.k..][..rows * self.k];
            let weight = &self.values[index * self.distance..][..self.n * self.k];
            unit.append_product(&mut out, x, weight, self.order, self.n, self.k);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(shape: impl Into<Shape>, dtype: DType) -> Tensor {
        Tensor::randn(0f32, 1f32, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    }

    fn check(x: &Tensor, weight: &Tensor) {
        let wide = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
        let (got, expected) = (product(x, weight).unwrap(), wide(x).matmul(&wide(weight).t().unwrap()).unwrap());
        assert_eq!((got.dims(), got.dtype()), (expected.dims(), x.dtype()));
        let off = (wide(&got) - expected).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        let tolerance = if x.dtype() == DType::F32 { 2e-5 } else { 0.2 };
        assert!(off.to_scalar::<f32>().unwrap() < tolerance, "{x:?} {weight:?}: {off}");
    }

    #[test]
    fn bf16_weights_multiply_in_any_layout_and_slice() {
        for dtype in [DType::F32, DType::BF16] {
            let x = values((21, 70), dtype);
            check(&x, &values((45, 70), DType::BF16));
            check(&x, &values((70, 45), DType::BF16).t().unwrap());
            check(&x, &values((60, 70), DType::BF16).narrow(0, 11, 33).unwrap());
            check(&values((30, 70), dtype).narrow(0, 3, 5).unwrap(), &values((1, 70), DType::BF16));
            check(&values((70, 8), dtype).t().unwrap(), &values((17, 70), DType::BF16));
            let several = values((3, 9, 70), dtype);
            check(&several, &values((3, 11, 70), DType::BF16));
            check(&several, &values((3, 20, 70), DType::BF16).narrow(1, 6, 11).unwrap());
            check(
                &several,
                &values((5, 90, 4), DType::BF16).narrow(0, 1, 3).unwrap().narrow(1, 20, 70).unwrap().t().unwrap(),
            );
            check(&values((4, 2, 1), dtype), &values((4, 3, 1), DType::BF16));
        }
        check(&values((21, 70), DType::F32), &values((45, 70), DType::F32));
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        assert!(product(&values((3, 4), DType::F32), &values((5, 6), DType::BF16)).is_err());
        assert!(product(&values((2, 3, 4), DType::F32), &values((5, 4), DType::BF16)).is_err());
        let columns = values((6, 8), DType::BF16).narrow(1, 2, 4).unwrap();
        check(&values((3, 4), DType::F32), &columns.contiguous().unwrap());
    }
}
