//! Sums per column over the inputs of a matrix.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{D, DType, Device, Result, Storage, Tensor, bail};
use rayon::prelude::*;

use outliers_scan::vectorize;

/// Columns that are summed together.
const STRIPE: usize = 256;
/// Parallel sums over a row.
const LANES: usize = 16;
/// Maximum values that a GPU converts to f32 at once, since memory plans do not include a copy of
/// a micro-batch.
const PART: usize = 16 << 20;

/// Sums over rows, each of shape `[width]`; empty before the first row.
///
/// Rows are added in order, one at a time, so that the result does not depend on micro-batches.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InputSums {
    /// Number of rows.
    pub rows: u64,
    /// Sum of x^2.
    pub squares: Vec<f64>,
    /// Sum of x.
    pub values: Vec<f64>,
    /// Largest |x|.
    pub largest: Vec<f32>,
}

impl InputSums {
    fn of_width(width: usize) -> Self {
        Self { rows: 0, squares: vec![0.0; width], values: vec![0.0; width], largest: vec![0.0; width] }
    }

    /// Adds `x` `[rows, width]`, row-major.
    fn add(&mut self, x: &[f32]) {
        let width = self.largest.len();
        let sums = self.squares.par_chunks_mut(STRIPE).zip(self.values.par_chunks_mut(STRIPE));
        let stripes = sums.zip(self.largest.par_chunks_mut(STRIPE)).enumerate();
        stripes.for_each(|(stripe, ((squares, values), largest))| {
            vectorize!({
                for row in x.chunks_exact(width) {
                    let sums = squares.iter_mut().zip(&mut *values).zip(&mut *largest);
                    for (x, ((squares, values), largest)) in row[stripe * STRIPE..].iter().zip(sums) {
                        let wide = f64::from(*x);
                        *squares += wide * wide;
                        *values += wide;
                        *largest = f32::max(*largest, x.abs());
                    }
                }
            });
        });
    }

    /// Adds `x` `[rows, width]` from sums made in f32 on its device, over parts of at most
    /// `max_values` values.
    fn add_from(&mut self, x: &Tensor, max_values: usize) -> Result<()> {
        let (mut sums, width) = (Vec::new(), self.largest.len());
        for part in parts(x, max_values)? {
            let part = part.to_dtype(DType::F32)?;
            sums.push(part.sqr()?.sum(0)?);
            sums.push(part.sum(0)?);
            sums.push(part.abs()?.max(0)?);
        }
        // All sums are copied together, so that the host waits for the GPU once.
        on_host(&Tensor::stack(&sums, 0)?, |sums| {
            for sums in sums.chunks_exact(3 * width) {
                let (squares, sums) = sums.split_at(width);
                let (values, largest) = sums.split_at(width);
                self.squares.iter_mut().zip(squares).for_each(|(sum, more)| *sum += f64::from(*more));
                self.values.iter_mut().zip(values).for_each(|(sum, more)| *sum += f64::from(*more));
                self.largest.iter_mut().zip(largest).for_each(|(most, more)| *most = f32::max(*most, *more));
            }
        })
    }
}

/// An observer of a matrix's input. Clones add to the same sums.
#[derive(Clone, Debug, Default)]
pub struct InputCollector(Arc<Mutex<InputSums>>);

impl InputCollector {
    /// Adds `x` `[.., width]`, whose rows follow the earlier ones.
    ///
    /// # Errors
    /// The width differs from that of earlier inputs. Errors of the device.
    pub fn add(&self, x: &Tensor) -> Result<()> {
        let width = x.dim(D::Minus1)?;
        let x = x.reshape(((), width))?;
        let mut sums = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if sums.largest.is_empty() {
            *sums = InputSums::of_width(width);
        }
        if sums.largest.len() != width {
            bail!("an input of width {width} after others of width {}", sums.largest.len());
        }
        sums.rows += x.dim(0)? as u64;
        if x.device().is_cpu() { on_host(&x, |x| sums.add(x)) } else { sums.add_from(&x, PART) }
    }

    /// Returns the sums and resets them.
    pub fn take(&self) -> InputSums {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Euclidean norms of the rows of `x` `[rows, width]`.
///
/// # Errors
/// Errors of the device.
pub fn row_norms(x: &Tensor) -> Result<Vec<f64>> {
    if !x.device().is_cpu() {
        let norms = |part: &Tensor| part.to_dtype(DType::F32)?.sqr()?.sum(1)?.sqrt();
        let norms = parts(x, PART)?.iter().map(norms).collect::<Result<Vec<_>>>()?;
        return on_host(&Tensor::cat(&norms, 0)?, |norms| norms.iter().map(|norm| f64::from(*norm)).collect());
    }
    let width = x.dim(1)?;
    on_host(x, |x| x.par_chunks_exact(width).map(norm).collect())
}

fn norm(row: &[f32]) -> f64 {
    let mut lanes = [0.0; LANES];
    for values in row.chunks(LANES) {
        lanes.iter_mut().zip(values).for_each(|(sum, x)| *sum += f64::from(*x) * f64::from(*x));
    }
    lanes.iter().sum::<f64>().sqrt()
}

/// Passes a tensor's values to `see` as f32, without a copy if it is f32 on the CPU.
///
/// # Errors
/// Errors of the device.
pub fn on_host<T>(x: &Tensor, see: impl FnOnce(&[f32]) -> T) -> Result<T> {
    if x.device().is_cpu() || x.dtype() == DType::F32 {
        return moved(x, see);
    }
    let mut values = Vec::with_capacity(x.elem_count());
    for part in parts(x, PART)? {
        moved(&part, |part| values.extend_from_slice(part))?;
    }
    Ok(see(&values))
}

/// Views of `x` with whole rows, each of at most `max_values` values or of one row.
fn parts(x: &Tensor, max_values: usize) -> Result<Vec<Tensor>> {
    let rows = x.dims().first().copied().unwrap_or(1);
    let each = (max_values * rows / x.elem_count().max(1)).max(1);
    if each >= rows {
        return Ok(vec![x.clone()]);
    }
    (0..rows).step_by(each).map(|first| x.narrow(0, first, each.min(rows - first))).collect()
}

/// Copies all of a tensor to the host as f32, which takes as much memory on its device.
fn moved<T>(x: &Tensor, see: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let x = x.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(cpu), Some((start, end))) => Ok(see(&cpu.as_slice::<f32>()?[start..end])),
        _ => bail!("a tensor moved to the CPU is not there"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tensor(values: &[f32], width: usize) -> Tensor {
        Tensor::from_slice(values, (values.len() / width, width), &Device::Cpu).unwrap()
    }

    fn seen(parts: &[&[f32]], width: usize) -> InputSums {
        let collector = InputCollector::default();
        parts.iter().for_each(|part| collector.add(&tensor(part, width)).unwrap());
        collector.take()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn column_sums_do_not_depend_on_batching(
            width in prop_oneof![1..9usize, 250..520usize],
            rows in 1..9usize,
            cut in 0..9usize,
            seed in any::<u32>(),
        ) {
            let mixed = |at: usize| (at as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8;
            let value = |at: usize| mixed(at) as f32 / 1e6 - 8.0;
            let x: Vec<f32> = (0..width * rows).map(value).collect();
            let whole = seen(&[&x], width);
            let (before, after) = x.split_at(cut.min(rows) * width);
            let parts: Vec<&[f32]> = [before, after].into_iter().filter(|part| !part.is_empty()).collect();
            prop_assert_eq!(&seen(&parts, width), &whole);
            prop_assert_eq!(whole.rows, rows as u64);
            for column in 0..width {
                let all = || x.iter().skip(column).step_by(width);
                let squares: f64 = all().map(|x| f64::from(*x).powi(2)).sum();
                prop_assert!((whole.squares[column] - squares).abs() <= 1e-12 * squares);
                prop_assert!((whole.values[column] - all().map(|x| f64::from(*x)).sum::<f64>()).abs() < 1e-9);
                prop_assert_eq!(whole.largest[column], all().fold(0f32, |most, x| most.max(x.abs())));
            }
            // As on a GPU: sums in f32, over all rows and over two at a time.
            for max_values in [PART, 2 * width] {
                let mut made_there = InputSums::of_width(width);
                made_there.add_from(&tensor(&x, width), max_values).unwrap();
                for (there, here) in made_there.squares.iter().zip(&whole.squares) {
                    prop_assert!((there - here).abs() <= 1e-5 * here, "{} {}", there, here);
                }
                prop_assert_eq!(&made_there.largest, &whole.largest);
            }
        }

        #[test]
        fn row_norms_are_euclidean(row in prop::collection::vec(-9f32..9.0, 1..70)) {
            let squares: f64 = row.iter().map(|x| f64::from(*x).powi(2)).sum();
            let norms = row_norms(&tensor(&[row.clone(), row.clone()].concat(), row.len())).unwrap();
            prop_assert_eq!(norms.len(), 2);
            prop_assert!(norms.iter().all(|norm| (norm - squares.sqrt()).abs() <= 1e-12 * squares.sqrt()));
        }
    }

    #[test]
    fn parts_of_a_tensor_are_its_rows_in_their_order() {
        let x = Tensor::arange(0f32, 70.0, &Device::Cpu).unwrap().reshape((7, 10)).unwrap();
        let rows = |max_values: usize| -> Vec<usize> {
            let parts = parts(&x, max_values).unwrap();
            let values = Tensor::cat(&parts, 0).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(values, x.to_vec2::<f32>().unwrap());
            parts.iter().map(|part| part.dim(0).unwrap()).collect()
        };
        assert_eq!((rows(70), rows(39), rows(5)), (vec![7], vec![3, 3, 1], vec![1; 7]));
        let number = Tensor::new(1f32, &Device::Cpu).unwrap();
        let none = Tensor::zeros((0, 4), DType::F32, &Device::Cpu).unwrap();
        assert_eq!((parts(&number, 5).unwrap().len(), parts(&none, 5).unwrap().len()), (1, 1));
    }

    #[test]
    fn tap_restarts_after_its_sums_are_taken() {
        let collector = InputCollector::default();
        collector.clone().add(&tensor(&[3.0, -4.0], 2)).unwrap();
        assert!(collector.add(&tensor(&[1.0], 1)).unwrap_err().to_string().contains("width 1 after others of width 2"));
        let sums = collector.take();
        assert_eq!((sums.rows, sums.squares, sums.largest), (1, vec![9.0, 16.0], vec![3.0, 4.0]));
        assert_eq!(collector.take(), InputSums::default());
    }
}
