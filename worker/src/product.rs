//! Hidden states times weights.

use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, bail};
use outliers_matmul::{Order, Unit};

use crate::device::Placement;
use crate::fused;

/// Whether products on this device take weights of bf16 whatever the dtype of the pass: exactly, and faster than any others.
pub fn takes_bf16(device: &Device) -> bool {
    unit(device).is_some()
}

/// Whether products on all of these do.
pub fn all_take_bf16(devices: &[Placement]) -> bool {
    devices.iter().all(|placement| takes_bf16(&placement.device))
}

/// Whether products in `compute` on these make f32 of all that they multiply, each time.
pub fn widens(devices: &[Placement], compute: DType) -> bool {
    let on_cpus = !devices.is_empty() && devices.iter().all(|placement| placement.device.is_cpu());
    compute == DType::BF16 && on_cpus && !all_take_bf16(devices)
}

fn unit(device: &Device) -> Option<Unit> {
    fused::has_loops_on(device).then(Unit::find).flatten()
}

/// `x W^T`. `x` `[rows, in]`; `weight` `[out, in]`, of the same dtype or of bf16, perhaps a transposed view.
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
        let ((rows, k), (n, depth)) = (lx.shape().dims2()?, lw.shape().dims2()?);
        let order = match *lw.stride() {
            [_, 1] if lw.is_contiguous() => Order::Rows,
            [1, _] if lw.is_fortran_contiguous() => Order::Columns,
            ref other => bail!("product-by-unit: weights {:?} with strides {other:?}", lw.shape()),
        };
        let (Some((first, end)), CpuStorage::BF16(weight)) = (lx.contiguous_offsets(), weight) else {
            bail!("product-by-unit: weights are not of bf16, or what they multiply is not contiguous");
        };
        if k != depth {
            bail!("product-by-unit: rows of {k} values times rows of {depth}");
        }
        let weight = &weight[lw.start_offset()..][..n * k];
        let out = match x {
            CpuStorage::F32(x) => CpuStorage::F32(self.0.product(&x[first..end], weight, order, n, k)),
            CpuStorage::BF16(x) => CpuStorage::BF16(self.0.product(&x[first..end], weight, order, n, k)),
            _ => bail!("product-by-unit: neither f32 nor bf16"),
        };
        Ok((out, Shape::from((rows, n))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(rows: usize, columns: usize, dtype: DType) -> Tensor {
        Tensor::randn(0f32, 1f32, (rows, columns), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
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
    fn weights_of_bf16_in_any_order_and_any_part() {
        for dtype in [DType::F32, DType::BF16] {
            let x = values(21, 70, dtype);
            check(&x, &values(45, 70, DType::BF16));
            check(&x, &values(70, 45, DType::BF16).t().unwrap());
            check(&x, &values(60, 70, DType::BF16).narrow(0, 11, 33).unwrap());
            check(&values(30, 70, dtype).narrow(0, 3, 5).unwrap(), &values(1, 70, DType::BF16));
            check(&values(70, 8, dtype).t().unwrap(), &values(17, 70, DType::BF16));
        }
        check(&values(21, 70, DType::F32), &values(45, 70, DType::F32));
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        assert!(product(&values(3, 4, DType::F32), &values(5, 6, DType::BF16)).is_err());
        let columns = values(6, 8, DType::BF16).narrow(1, 2, 4).unwrap();
        check(&values(3, 4, DType::F32), &columns.contiguous().unwrap());
    }
}
