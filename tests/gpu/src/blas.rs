//! Matrix products as cuBLAS defines them.
//!
//! <https://docs.nvidia.com/cuda/cublas/#cublasgemmstridedbatchedex>

use half::{bf16, f16};

use crate::memory::{Memory, Reader};

/// `cudaDataType_t`, the types of matrices only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    F32,
    F64,
    F16,
    Bf16,
}

impl Kind {
    pub(crate) fn new(number: i32) -> Option<Self> {
        match number {
            0 => Some(Self::F32),
            1 => Some(Self::F64),
            2 => Some(Self::F16),
            14 => Some(Self::Bf16),
            _ => None,
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    fn wide(self, bytes: &[u8]) -> f64 {
        match (self, bytes) {
            (Self::F64, bytes) => bytes.try_into().map_or(f64::NAN, f64::from_le_bytes),
            (Self::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]).into(),
            (Self::F16, &[a, b]) => f16::from_le_bytes([a, b]).into(),
            (Self::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).into(),
            _ => f64::NAN,
        }
    }

    fn narrow(self, value: f64) -> Vec<u8> {
        match self {
            Self::F64 => value.to_le_bytes().to_vec(),
            Self::F32 => (value as f32).to_le_bytes().to_vec(),
            Self::F16 => f16::from_f64(value).to_le_bytes().to_vec(),
            Self::Bf16 => bf16::from_f64(value).to_le_bytes().to_vec(),
        }
    }

    /// Dot product, summed in f32, or in f64 for f64.
    fn sum(self, a: &[f64], b: &[f64]) -> f64 {
        let products = a.iter().zip(b).map(|(a, b)| a * b);
        match self {
            Self::F64 => products.sum(),
            _ => products.map(|product| product as f32).sum::<f32>().into(),
        }
    }
}

/// One matrix per item of a batch, column-major.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub(crate) address: u64,
    pub(crate) kind: Kind,
    /// Whether it is transposed before use.
    pub(crate) transposed: bool,
    /// Stride between columns, in values.
    pub(crate) leading: usize,
    /// Stride between items, in values.
    pub(crate) stride: i64,
}

impl Matrix {
    fn address_of(&self, item: usize, row: usize, column: usize) -> u64 {
        let (row, column) = if self.transposed { (column, row) } else { (row, column) };
        let value = item as i64 * self.stride + (column * self.leading + row) as i64;
        self.address.wrapping_add_signed(value * self.kind.bytes() as i64)
    }

    fn value(&self, item: usize, row: usize, column: usize, memory: &mut Reader<'_>) -> Result<f64, String> {
        let mut bytes = [0; 8];
        let bytes = &mut bytes[..self.kind.bytes()];
        memory.read(self.address_of(item, row, column), bytes)?;
        Ok(self.kind.wide(bytes))
    }
}

/// `c = alpha a b + beta c` for each item of a batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) depth: usize,
    pub(crate) batch: usize,
    pub(crate) alpha: f64,
    pub(crate) beta: f64,
    pub(crate) a: Matrix,
    pub(crate) b: Matrix,
    pub(crate) c: Matrix,
}

impl Product {
    /// # Errors
    /// An address is outside of allocated memory.
    pub(crate) fn run(&self, memory: &Memory) -> Result<(), String> {
        let memory = &mut memory.reader();
        for item in 0..self.batch {
            let mut a = Vec::with_capacity(self.rows * self.depth);
            for row in 0..self.rows {
                for at in 0..self.depth {
                    a.push(self.a.value(item, row, at, memory)?);
                }
            }
            let mut column_of_b = Vec::with_capacity(self.depth);
            for column in 0..self.columns {
                column_of_b.clear();
                for at in 0..self.depth {
                    column_of_b.push(self.b.value(item, at, column, memory)?);
                }
                for row in 0..self.rows {
                    let row_of_a = &a[row * self.depth..][..self.depth];
                    let sum = self.c.kind.sum(row_of_a, &column_of_b);
                    // With beta = 0 the old values may be NaN.
                    let old =
                        if self.beta == 0.0 { 0.0 } else { self.beta * self.c.value(item, row, column, memory)? };
                    memory.write(self.c.address_of(item, row, column), &self.c.kind.narrow(self.alpha * sum + old))?;
                }
            }
        }
        Ok(())
    }
}

/// Products whose matrices are at the addresses that three arrays on the GPU hold, one for each.
///
/// # Errors
/// Values outside of what is allocated; matrices that cuBLAS does not take.
pub(crate) fn run_grouped(products: &[Product], arrays: [u64; 3], memory: &Memory) -> Result<(), String> {
    for (number, product) in products.iter().enumerate() {
        let address = |array: u64| {
            let mut bytes = [0; size_of::<u64>()];
            memory.reader().read(array + (number * bytes.len()) as u64, &mut bytes)?;
            let address = u64::from_le_bytes(bytes);
            // As cuBLAS asks where rows of 16 bits are multiples of it.
            if product.depth * product.a.kind.bytes() % 16 == 0 && address % 16 != 0 {
                return Err(format!("grouped product {number}: a matrix at {address:#x}, which is no multiple of 16"));
            }
            Ok(address)
        };
        let [a, b, c] = arrays.map(address);
        let with = |matrix: Matrix, address: u64| Matrix { address, ..matrix };
        let product = Product { a: with(product.a, a?), b: with(product.b, b?), c: with(product.c, c?), ..*product };
        product.run(memory)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Owner;

    #[test]
    fn product_equals_the_reference_in_every_layout() {
        let memory = Memory::new();
        // a [2, 3] = 1 2 3 / 4 5 6, b [3, 2] = 1 2 / 3 4 / 5 6; by columns, and by rows as
        // transposed.
        let a = [[1f32, 4.0, 2.0, 5.0, 3.0, 6.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]];
        let b = [[1f32, 3.0, 5.0, 2.0, 4.0, 6.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]];
        let place = |values: &[f32]| {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let address = memory.allocate(bytes.len(), Owner::Gpu(0));
            memory.reader().write(address, &bytes).unwrap();
            address
        };
        for (a_by_rows, b_by_rows) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let matrix =
                |address, transposed, leading| Matrix { address, kind: Kind::F32, transposed, leading, stride: 0 };
            let c = memory.allocate(16, Owner::Gpu(0));
            let product = Product {
                rows: 2,
                columns: 2,
                depth: 3,
                batch: 1,
                alpha: 1.0,
                beta: 0.0,
                a: matrix(place(&a[a_by_rows]), a_by_rows == 1, [2, 3][a_by_rows]),
                b: matrix(place(&b[b_by_rows]), b_by_rows == 1, [3, 2][b_by_rows]),
                c: matrix(c, false, 2),
            };
            product.run(&memory).unwrap();
            let mut bytes = [0; 16];
            memory.reader().read(c, &mut bytes).unwrap();
            let values: Vec<f64> = bytes.chunks(4).map(|b| Kind::F32.wide(b)).collect();
            assert_eq!(values, [22.0, 49.0, 28.0, 64.0]);
            assert!(Product { rows: 3, ..product }.run(&memory).is_err(), "beyond what is allocated");
        }
    }

    #[test]
    fn grouped_products_are_read_and_written_where_arrays_say() {
        let memory = Memory::new();
        let place = |bytes: &[u8]| {
            let address = memory.allocate(bytes.len(), Owner::Gpu(0));
            memory.reader().write(address, bytes).unwrap();
            address
        };
        let values = |values: &[f32]| place(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
        let addresses = |of: &[u64]| place(&of.iter().flat_map(|address| address.to_le_bytes()).collect::<Vec<_>>());
        let matrix = |leading| Matrix { address: 0, kind: Kind::F32, transposed: false, leading, stride: 0 };
        let (alpha, beta) = (1.0, 0.0);
        let product = |rows, columns, depth| {
            let (a, b, c) = (matrix(rows), matrix(depth), matrix(rows));
            Product { rows, columns, depth, batch: 1, alpha, beta, a, b, c }
        };
        // 1 2 times 3 / 4, and 2 / 3 times 5.
        let products = [product(1, 1, 2), product(2, 1, 1)];
        let a = addresses(&[values(&[1.0, 2.0]), values(&[2.0, 3.0])]);
        let b = addresses(&[values(&[3.0, 4.0]), values(&[5.0])]);
        let made = [values(&[0.0]), values(&[0.0, 0.0])];
        let c = addresses(&made);
        run_grouped(&products, [a, b, c], &memory).unwrap();
        let read = |address: u64| {
            let mut bytes = [0; 4];
            memory.reader().read(address, &mut bytes).unwrap();
            f32::from_le_bytes(bytes)
        };
        assert_eq!([read(made[0]), read(made[1]), read(made[1] + 4)], [11.0, 10.0, 15.0]);
        assert!(run_grouped(&products, [a, b, addresses(&made[..1])], &memory).is_err(), "an array that is too short");
    }
}
