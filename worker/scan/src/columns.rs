//! Statistics of a sequence's columns in one pass: counts and positions of exceeding values,
//! extremes, moments.

use rayon::prelude::*;

use serde::{Deserialize, Serialize};

/// Rows summed in f32 before they are added to the f64 sums.
pub const STRIP: usize = 32;
/// Columns per stripe; one thread scans a stripe.
const STRIPE: usize = 64;

/// Statistics of a column.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Column {
    /// Values with |x| >= T.
    pub count: u64,
    /// Exceeding values with x > 0.
    pub positive: u64,
    /// Largest value.
    pub max: f32,
    /// Smallest value.
    pub min: f32,
    /// Sum of x.
    pub sum: f64,
    /// Sum of x^2.
    pub sum2: f64,
    /// Sum of x^3.
    pub sum3: f64,
    /// Sum of x^4.
    pub sum4: f64,
}

impl Column {
    /// Statistics of no values.
    pub const EMPTY: Self = Self {
        count: 0,
        positive: 0,
        max: f32::NEG_INFINITY,
        min: f32::INFINITY,
        sum: 0.0,
        sum2: 0.0,
        sum3: 0.0,
        sum4: 0.0,
    };

    /// Adds the statistics of another column.
    pub fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.positive += other.positive;
        self.max = if other.max > self.max { other.max } else { self.max };
        self.min = if other.min < self.min { other.min } else { self.min };
        self.sum += other.sum;
        self.sum2 += other.sum2;
        self.sum3 += other.sum3;
        self.sum4 += other.sum4;
    }

    /// The value of largest magnitude, signed.
    pub fn peak(&self) -> f32 {
        if self.max >= -self.min { self.max } else { self.min }
    }

    /// Largest |x|.
    pub fn max_abs(&self) -> f32 {
        self.max.max(-self.min)
    }
}

/// Positions at which a column exceeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExceedingPositions {
    /// The column.
    pub dim: usize,
    /// One bit per position of the sequence, lowest bit first.
    pub positions: Vec<u64>,
}

/// Statistics of a sequence's columns.
#[derive(Clone, Debug, PartialEq)]
pub struct Columns {
    /// One entry per column, in order.
    pub columns: Vec<Column>,
    /// Columns that exceed at some position, in order.
    pub marks: Vec<ExceedingPositions>,
}

impl Columns {
    /// Scans the sequence `x` `[tokens, width]`, in parallel over columns.
    pub(crate) fn of(x: &[f32], width: usize, threshold: f32) -> Self {
        let stripes = (0..width.div_ceil(STRIPE)).into_par_iter();
        let stripes: Vec<Self> = stripes.map(|i| stripe(x, width, i * STRIPE, threshold)).collect();
        let mut whole = Self { columns: Vec::with_capacity(width), marks: Vec::new() };
        for stripe in stripes {
            whole.columns.extend(stripe.columns);
            whole.marks.extend(stripe.marks);
        }
        whole
    }

    /// Whether all sums of squares are finite. With a non-finite value, no sum is valid.
    pub fn are_finite(&self) -> bool {
        self.columns.iter().all(|column| column.sum2.is_finite())
    }
}

/// Scans one stripe of columns, from `first` on.
fn stripe(x: &[f32], width: usize, first: usize, threshold: f32) -> Columns {
    let count = STRIPE.min(width - first);
    let words = (x.len() / width).div_ceil(64);
    let mut columns = vec![Column::EMPTY; count];
    let mut marks = [const { Vec::new() }; STRIPE];
    // A partial last stripe is filled with zeros. They are not counted, because T > 0.
    let mut row_buffer = [0f32; STRIPE];
    let mut position = 0;
    for rows in x.chunks(width * STRIP) {
        let mut block = Block::EMPTY;
        for row in rows.chunks_exact(width) {
            row_buffer[..count].copy_from_slice(&row[first..first + count]);
            if block.add(&row_buffer, threshold) {
                mark(&mut marks, &row_buffer, threshold, position, words);
            }
            position += 1;
        }
        columns.iter_mut().enumerate().for_each(|(j, column)| column.merge(&block.column(j)));
    }
    let marks = marks.into_iter().enumerate().filter(|(_, positions): &(usize, Vec<u64>)| !positions.is_empty());
    Columns { columns, marks: marks.map(|(j, positions)| ExceedingPositions { dim: first + j, positions }).collect() }
}

/// Records which columns exceed in a row. Words are allocated on demand.
fn mark(marks: &mut [Vec<u64>; STRIPE], row: &[f32; STRIPE], threshold: f32, position: usize, words: usize) {
    for (positions, v) in marks.iter_mut().zip(row) {
        if v.abs() >= threshold {
            positions.resize(words, 0);
            positions[position / 64] |= 1 << (position % 64);
        }
    }
}

/// Sums of up to [`STRIP`] rows, in f32 so that the loop is vectorised.
#[derive(Clone, Copy)]
struct Block {
    count: [u32; STRIPE],
    positive: [u32; STRIPE],
    max: [f32; STRIPE],
    min: [f32; STRIPE],
    sums: [[f32; STRIPE]; 4],
}

impl Block {
    const EMPTY: Self = Self {
        count: [0; STRIPE],
        positive: [0; STRIPE],
        max: [f32::NEG_INFINITY; STRIPE],
        min: [f32::INFINITY; STRIPE],
        sums: [[0.0; STRIPE]; 4],
    };

    /// Adds one row. Returns whether any value exceeds.
    #[inline(always)]
    #[expect(clippy::needless_range_loop, reason = "nine arrays in lock step, which vectorise as written")]
    fn add(&mut self, row: &[f32; STRIPE], threshold: f32) -> bool {
        let mut any = 0u32;
        for j in 0..STRIPE {
            let v = row[j];
            let v2 = v * v;
            let hit = u32::from(v.abs() >= threshold);
            any |= hit;
            self.count[j] += hit;
            self.positive[j] += hit & u32::from(v > 0.0);
            self.max[j] = if v > self.max[j] { v } else { self.max[j] };
            self.min[j] = if v < self.min[j] { v } else { self.min[j] };
            self.sums[0][j] += v;
            self.sums[1][j] += v2;
            self.sums[2][j] += v2 * v;
            self.sums[3][j] += v2 * v2;
        }
        any != 0
    }

    fn column(&self, j: usize) -> Column {
        Column {
            count: u64::from(self.count[j]),
            positive: u64::from(self.positive[j]),
            max: self.max[j],
            min: self.min[j],
            sum: f64::from(self.sums[0][j]),
            sum2: f64::from(self.sums[1][j]),
            sum3: f64::from(self.sums[2][j]),
            sum4: f64::from(self.sums[3][j]),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Rows;

    proptest! {
        #[test]
        fn column_statistics_follow_the_definitions(
            width in 1usize..150, tokens in 1usize..140, sequences in 1usize..3, seed in any::<u32>(),
        ) {
            let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 1e6 - 8.0;
            let x: Vec<f32> = (0..sequences * tokens * width).map(value).collect();
            let found = Rows { x: &x, width, tokens }.columns(6.0);
            prop_assert_eq!(found.len(), sequences);
            for (x, found) in x.chunks(tokens * width).zip(&found) {
                prop_assert!(found.are_finite());
                let mut marks = found.marks.iter();
                for (dim, column) in found.columns.iter().enumerate() {
                    let values: Vec<f32> = x.iter().skip(dim).step_by(width).copied().collect();
                    let exceeds = |v: &f32| v.abs() >= 6.0;
                    let count = values.iter().filter(|v| exceeds(v)).count();
                    prop_assert_eq!(column.count as usize, count);
                    prop_assert_eq!(column.positive as usize, values.iter().filter(|v| **v >= 6.0).count());
                    let extreme = |of: fn(f32, f32) -> f32| values.iter().copied().reduce(of).unwrap();
                    prop_assert_eq!((column.max, column.min), (extreme(f32::max), extreme(f32::min)));
                    for (got, power) in [(column.sum, 1), (column.sum2, 2), (column.sum3, 3), (column.sum4, 4)] {
                        let of = |power: i32| values.iter().map(|v| f64::from(v.abs()).powi(power)).sum::<f64>();
                        let want: f64 = values.iter().map(|v| f64::from(*v).powi(power)).sum();
                        prop_assert!((got - want).abs() <= 1e-5 * of(power), "{} against {}", got, want);
                    }
                    if count > 0 {
                        let ExceedingPositions { dim: marked, positions } = marks.next().unwrap();
                        prop_assert_eq!(*marked, dim);
                        let at = |position: usize| positions[position / 64] >> (position % 64) & 1 == 1;
                        prop_assert!(values.iter().enumerate().all(|(position, v)| at(position) == exceeds(v)));
                    }
                }
                prop_assert!(marks.next().is_none());
            }
        }
    }

    #[test]
    fn non_finite_values_are_detected() {
        let mut x = vec![1.0; 12];
        let finite = |x: &[f32]| Columns::of(x, 3, 6.0).are_finite();
        assert!(finite(&x));
        x[7] = f32::NAN;
        assert!(!finite(&x));
    }
}
