//! Compares every unit of this processor with sums in f64. On a processor without units, the tests
//! print that nothing is tested.

use std::cell::Cell;
use std::io::Write;

use half::bf16;
use proptest::prelude::*;

use crate::{Order, Real, Unit};

/// A number type of the tests, with conversions to and from f64.
pub(crate) trait Number: Real {
    /// Half a unit in the last place, relative.
    const ROUNDING: f64;
    fn of(value: f32) -> Self;
    fn wide(self) -> f64;
}

impl Number for f32 {
    const ROUNDING: f64 = 6e-8;
    fn of(value: f32) -> Self {
        value
    }
    fn wide(self) -> f64 {
        self.into()
    }
}

impl Number for bf16 {
    const ROUNDING: f64 = 3.92e-3;
    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn wide(self) -> f64 {
        self.to_f64()
    }
}

/// Numbers of many magnitudes.
fn numbers<T: Number>(count: usize, seed: u64) -> Vec<T> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..count).map(|_| T::of((next() - 0.5) * 2f32.powf(12.0 * next() - 6.0))).collect()
}

/// Prints that nothing is tested here.
pub(crate) fn not_checked() {
    thread_local! {
        static SAID: Cell<bool> = const { Cell::new(false) };
    }
    if !SAID.replace(true) {
        let thread = std::thread::current();
        let test = thread.name().unwrap_or("a test");
        let _ = writeln!(std::io::stdout(), "NOT checked: {test}: this processor has no AVX-512");
    }
}

fn units() -> Vec<Unit> {
    let units: Vec<Unit> = Unit::all().collect();
    if units.is_empty() {
        not_checked();
    }
    units
}

fn product<A: Number>(unit: Unit, a: &[A], b: &[bf16], order: Order, n: usize, k: usize) -> Vec<A> {
    let mut out = Vec::new();
    unit.append_product(&mut out, a, b, order, n, k);
    out
}

fn check<A: Number>(m: usize, n: usize, k: usize, order: Order) {
    for unit in units() {
        check_by(&format!("{unit:?}"), [m, n, k], order, |out: &mut Vec<A>, a, b| {
            unit.append_product(out, a, b, order, n, k)
        });
    }
}

/// Whether a unit adds products of `[m, k]` and `[n, k]` to the result.
pub(crate) fn check_by<A: Number>(
    by: &str,
    [m, n, k]: [usize; 3],
    order: Order,
    append: impl Fn(&mut Vec<A>, &[A], &[bf16]),
) {
    let (a, b): (Vec<A>, Vec<bf16>) = (numbers(m * k, 1), numbers(n * k, 2));
    let of_b = |row: usize, at: usize| if order == Order::Rows { b[row * k + at] } else { b[at * n + row] }.wide();
    let mut got = vec![A::of(7.0)];
    append(&mut got, &a, &b);
    assert_eq!((got.len(), got.remove(0).wide()), (m * n + 1, 7.0), "what there was stays");
    // The error bound is relative to the sum of the terms' magnitudes. Each of three products per
    // value is rounded once to f32.
    let tolerance = A::ROUNDING + f32::ROUNDING * (3.0 * k as f64).sqrt();
    for (i, got) in got.iter().enumerate() {
        let terms = || (0..k).map(|at| a[i / n * k + at].wide() * of_b(i % n, at));
        let (sum, magnitude) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
        let off = (got.wide() - sum).abs() / magnitude.max(1e-30);
        assert!(off <= tolerance, "{by}, row {}, column {}: {}, not {sum}: off by {off:e}", i / n, i % n, got.wide());
    }
}

fn check_all(m: usize, n: usize, k: usize) {
    for order in [Order::Rows, Order::Columns] {
        check::<f32>(m, n, k, order);
        check::<bf16>(m, n, k, order);
    }
}

#[test]
fn products_of_whole_blocks_equal_the_reference() {
    check_all(32, 32, 32);
    check_all(96, 128, 256);
    // More rows and columns than one block has.
    check::<f32>(1100, 40, 8192, Order::Rows);
    check::<bf16>(33, 200, 8192, Order::Columns);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn products_of_any_shape_equal_the_reference(m in 1..80usize, n in 1..80usize, k in 1..150usize) {
        check_all(m, n, k);
    }

    #[test]
    fn rows_do_not_depend_on_other_rows(
        m in 1..70usize, n in 1..70usize, k in 1..100usize, row in any::<prop::sample::Index>(),
    ) {
        let (a, b): (Vec<f32>, Vec<bf16>) = (numbers(m * k, 3), numbers(n * k, 4));
        let row = row.index(m);
        for unit in units() {
            let of = |a: &[f32]| product(unit, a, &b, Order::Rows, n, k);
            prop_assert_eq!(&of(&a)[row * n..][..n], &of(&a[row * k..][..k])[..]);
        }
    }
}

const NOT_FINITE: [f32; 3] = [f32::NAN, f32::INFINITY, f32::from_bits(0x7f80_0001)];

#[test]
fn nan_is_preserved_in_its_row_only() {
    for (unit, bad) in units().into_iter().flat_map(|unit| NOT_FINITE.map(|bad| (unit, bad))) {
        let mut a = vec![1f32; 3 * 40];
        a[45] = bad;
        let of_f32 = product(unit, &a, &[bf16::ONE; 2 * 40], Order::Rows, 2, 40);
        assert!(of_f32[2..4].iter().all(|v| !v.is_finite()), "{of_f32:?}");
        assert_eq!([of_f32[0], of_f32[1], of_f32[4], of_f32[5]], [40.0; 4]);
        let a: Vec<bf16> = a.into_iter().map(bf16::from_f32).collect();
        let of_bf16 = product(unit, &a, &[bf16::ONE; 2 * 40], Order::Rows, 2, 40);
        assert!(of_bf16[2..4].iter().all(|v| !v.is_finite()), "{of_bf16:?}");
        assert_eq!([of_bf16[0], of_bf16[5]], [bf16::from_f32(40.0); 2]);
    }
}

#[test]
fn empty_operands_give_an_empty_product() {
    for unit in units() {
        assert_eq!(product::<f32>(unit, &[], &[bf16::ONE; 6], Order::Rows, 2, 3), []);
        assert_eq!(product::<f32>(unit, &[1.0; 6], &[], Order::Rows, 0, 3), []);
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let why = |unit, a: usize, b: usize| {
        let product = || product(unit, &vec![1f32; a], &vec![bf16::ONE; b], Order::Rows, 2, 3);
        *std::panic::catch_unwind(product).unwrap_err().downcast::<String>().unwrap()
    };
    for unit in units() {
        assert_eq!(why(unit, 7, 6), "7 values in rows of 3");
        assert_eq!(why(unit, 6, 7), "7 values in 2 rows of 3");
    }
}
