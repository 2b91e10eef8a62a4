//! Products of several matrices, each with its own rows, by one call of cuBLAS.
//!
//! Values are row-major, and belong to the stream that is given. What cuBLAS calls a group is one
//! product here. <https://docs.nvidia.com/cuda/cublas/#cublasgemmgroupedbatchedex>

use std::ffi::{c_int, c_void};
use std::fmt;
use std::sync::Arc;

use cudarc::cublas::CudaBlas;
use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaSlice, CudaStream, CudaView, DevicePtr, DevicePtrMut, DeviceRepr, DriverError, SyncOnDrop};
use half::{bf16, f16};

/// Alignment that cuBLAS asks for where rows are multiples of it, bytes.
pub const ALIGNMENT: usize = 16;

/// A dtype of matrices. Products are added in f32.
pub trait Real: DeviceRepr {
    /// Its `cudaDataType_t`.
    const TYPE: c_int;
}

impl Real for f32 {
    const TYPE: c_int = 0;
}

impl Real for f16 {
    const TYPE: c_int = 2;
}

impl Real for bf16 {
    const TYPE: c_int = 14;
}

/// Why products were not started.
#[derive(Debug)]
pub enum GroupedError {
    /// The driver's reason.
    Driver(DriverError),
    /// cuBLAS's status.
    Blas(i32),
}

impl From<DriverError> for GroupedError {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

impl fmt::Display for GroupedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Driver(error) => error.fmt(f),
            Self::Blas(status) => write!(f, "cuBLAS does not multiply several matrices: its status {status}"),
        }
    }
}

impl std::error::Error for GroupedError {}

/// A matrix, and how many rows it is multiplied with.
pub struct Factor<'a, T> {
    /// `[out, in]`, or `[in, out]` if it is stored so.
    pub matrix: CudaView<'a, T>,
    /// It is stored `[in, out]`.
    pub input_major: bool,
    /// Rows.
    pub rows: usize,
}

/// Rows of `x` `[rows, in]` times the transposes of matrices: each matrix takes the rows behind
/// those of the one before. Gives `[rows, out]`. All addresses are multiples of [`ALIGNMENT`], and
/// `blas` computes on `stream`.
///
/// # Errors
/// The driver's, cuBLAS's.
pub fn products<T: Real>(
    blas: &CudaBlas,
    stream: &Arc<CudaStream>,
    x: &CudaView<'_, T>,
    factors: &[Factor<'_, T>],
    [out, input]: [usize; 2],
) -> Result<CudaSlice<T>, GroupedError> {
    let rows: usize = factors.iter().map(|factor| factor.rows).sum();
    assert_eq!(x.len(), rows * input, "{rows} rows of {input}");
    assert!(factors.iter().all(|factor| factor.matrix.len() == out * input), "matrices [{out}, {input}]");
    // SAFETY: the products write all of it.
    let mut made = unsafe { stream.alloc::<T>(rows * out) }?;
    // Nothing is computed with no rows.
    let factors: Vec<&Factor<'_, T>> = factors.iter().filter(|factor| factor.rows > 0).collect();
    if !factors.is_empty() {
        let addresses = Addresses::new(stream, x, &factors, &mut made, [out, input])?;
        stream.context().bind_to_thread()?;
        addresses.multiply::<T>(blas, &factors, [out, input])?;
    }
    Ok(made)
}

/// Addresses of matrices, of rows and of products in the memory of a GPU, where cuBLAS reads them.
/// What they name is borrowed until this is dropped. Then all of it, the addresses too, is used up
/// to where the stream is: nobody is given the memory before the products are there.
struct Addresses<'a> {
    /// One kind after the other.
    table: CudaSlice<u64>,
    stream: &'a CudaStream,
    _named: Vec<SyncOnDrop<'a>>,
}

impl<'a> Addresses<'a> {
    fn new<T>(
        stream: &'a Arc<CudaStream>,
        x: &'a CudaView<'_, T>,
        factors: &[&'a Factor<'_, T>],
        made: &'a mut CudaSlice<T>,
        [out, input]: [usize; 2],
    ) -> Result<Self, DriverError> {
        let (x, read) = x.device_ptr(stream);
        let (made, written) = made.device_ptr_mut(stream);
        let mut named = vec![read, written];
        let mut addresses: [Vec<CUdeviceptr>; 3] = Default::default();
        let mut first = 0;
        for factor in factors {
            let (matrix, read) = factor.matrix.device_ptr(stream);
            named.push(read);
            let row = |width: usize| (first * width * size_of::<T>()) as CUdeviceptr;
            let all = [matrix, x + row(input), made + row(out)];
            addresses.iter_mut().zip(all).for_each(|(addresses, address)| addresses.push(address));
            first += factor.rows;
        }
        let table = stream.clone_htod(&addresses.concat())?;
        Ok(Self { table, stream, _named: named })
    }

    fn multiply<T: Real>(
        &self,
        blas: &CudaBlas,
        factors: &[&Factor<'_, T>],
        [out, input]: [usize; 2],
    ) -> Result<(), GroupedError> {
        /// `CUBLAS_COMPUTE_32F`.
        const IN_F32: c_int = 68;
        let count = factors.len();
        assert_eq!(self.table.len(), 3 * count, "three addresses of each product");
        let each = |number: usize| vec![size(number); count];
        // Of each column after column: what is row-major is transposed.
        let (not, once) = (each(0), each(1));
        let transposed: Vec<c_int> = factors.iter().map(|factor| c_int::from(!factor.input_major)).collect();
        let of = |factor: &&Factor<'_, T>| size(if factor.input_major { out } else { input });
        let leading: Vec<c_int> = factors.iter().map(of).collect();
        let rows: Vec<c_int> = factors.iter().map(|factor| size(factor.rows)).collect();
        let (outs, inputs) = (each(out), each(input));
        let (whole, nothing) = (vec![1f32; count], vec![0f32; count]);
        let (table, _table) = self.table.device_ptr(self.stream);
        let kind = |kind: usize| table + (kind * count * size_of::<u64>()) as CUdeviceptr;
        // SAFETY: arrays of `count` numbers on the host, which are read before this returns, and of
        // as many addresses on the GPU. Those are of matrices of the sizes that are told, which are
        // borrowed and belong to the handle's stream.
        let status = unsafe {
            cublasGemmGroupedBatchedEx(
                blas.handle().cast(),
                transposed.as_ptr(),
                not.as_ptr(),
                outs.as_ptr(),
                rows.as_ptr(),
                inputs.as_ptr(),
                whole.as_ptr(),
                kind(0),
                T::TYPE,
                leading.as_ptr(),
                kind(1),
                T::TYPE,
                inputs.as_ptr(),
                nothing.as_ptr(),
                kind(2),
                T::TYPE,
                outs.as_ptr(),
                size(count),
                once.as_ptr(),
                IN_F32,
            )
        };
        if status == 0 { Ok(()) } else { Err(GroupedError::Blas(status)) }
    }
}

/// A number for cuBLAS.
fn size(number: usize) -> c_int {
    c_int::try_from(number).expect("fewer than 2^31 rows, columns or products")
}

unsafe extern "C" {
    /// Numbers are of each product, on the host; the three arrays of addresses are on the GPU.
    fn cublasGemmGroupedBatchedEx(
        handle: *mut c_void,
        transposed_a: *const c_int,
        transposed_b: *const c_int,
        rows: *const c_int,
        columns: *const c_int,
        depths: *const c_int,
        alphas: *const f32,
        a: CUdeviceptr,
        type_a: c_int,
        leading_a: *const c_int,
        b: CUdeviceptr,
        type_b: c_int,
        leading_b: *const c_int,
        betas: *const f32,
        c: CUdeviceptr,
        type_c: c_int,
        leading_c: *const c_int,
        groups: c_int,
        sizes: *const c_int,
        compute: c_int,
    ) -> c_int;
}
