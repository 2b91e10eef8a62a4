use std::cell::Cell;

use outliers_protocol::FailureKind;
use proptest::prelude::*;

use super::*;
use crate::checkpoint::safetensors::StoredDtype;

const OFFSET: u64 = 6;

fn entry(shape: &[u64], strides: &[u64]) -> TensorEntry {
    let len = shape.iter().product::<u64>() * 2;
    let (name, dtype, shape) = ("t".to_owned(), StoredDtype::I16, shape.to_vec());
    TensorEntry { name, dtype, shape, strides: Some(strides.to_vec()), file: 0, offset: OFFSET, len }
}

/// Gathers from a file in which every value is its index.
fn gathered(entry: &TensorEntry, range: Range<u64>, reads: &Cell<usize>) -> Vec<u16> {
    let strides = entry.strides.as_ref().unwrap();
    let values = 1 + entry.shape.iter().zip(strides).map(|(dim, stride)| dim.saturating_sub(1) * stride).sum::<u64>();
    let mut file = vec![0xee; OFFSET as usize];
    file.extend((0..values as u16).flat_map(u16::to_le_bytes));
    let read = |at: u64, into: &mut [u8]| {
        reads.set(reads.get() + 1);
        into.copy_from_slice(&file[at as usize..][..into.len()]);
        Ok(())
    };
    let mut into = vec![0; (range.end - range.start) as usize];
    gather(entry, strides, range, &mut into, &read).unwrap();
    into.as_chunks().0.iter().map(|value| u16::from_le_bytes(*value)).collect()
}

/// Positions of all values in row-major order.
fn places(entry: &TensorEntry) -> Vec<u16> {
    let dims = entry.shape.iter().zip(entry.strides.as_ref().unwrap());
    dims.fold(vec![0], |places, (dim, stride)| {
        places.iter().flat_map(|place| (0..*dim).map(move |i| place + (i * stride) as u16)).collect()
    })
}

#[test]
fn rows_of_a_transposed_matrix_take_one_read_per_column() {
    let transposed = entry(&[100, 7], &[1, 100]);
    let reads = Cell::new(0);
    let rows = gathered(&transposed, 10 * 14..30 * 14, &reads);
    assert_eq!(rows, places(&transposed)[70..210]);
    assert_eq!(reads.get(), 7);
}

#[test]
fn values_are_not_split() {
    let transposed = entry(&[2, 2], &[1, 2]);
    let read = |_: u64, _: &mut [u8]| -> Result<()> { panic!("nothing is to be read") };
    let error = gather(&transposed, &[1, 2], 1..3, &mut [0; 2], &read).unwrap_err();
    assert_eq!(error.kind(), FailureKind::Internal);
}

#[test]
fn distant_values_are_read_separately() {
    let size = Cell::new(0);
    let read = |_: u64, into: &mut [u8]| {
        size.set(size.get().max(into.len()));
        Ok(())
    };
    let stride = 1 << 40;
    let apart = entry(&[3], &[stride]);
    gather(&apart, &[stride], 0..6, &mut [0; 6], &read).unwrap();
    assert_eq!(size.get(), 2);
}

proptest! {
    #[test]
    fn any_slice_of_any_view_is_in_row_major_order(
        dims in prop::collection::vec((1_u64..6, 0_u64..9), 1..5), cut in (0.0..1.0, 0.0..1.0)) {
        let (shape, strides): (Vec<_>, Vec<_>) = dims.into_iter().unzip();
        let entry = entry(&shape, &strides);
        let at = |share: f64| (share * (entry.len / 2) as f64) as u64;
        let (start, end) = (at(cut.0).min(at(cut.1)), at(cut.0).max(at(cut.1)) + 1);
        let all = places(&entry);
        let found = gathered(&entry, start * 2..end * 2, &Cell::default());
        prop_assert_eq!(&found[..], &all[start as usize..end as usize]);
        prop_assert_eq!(gathered(&entry, 0..entry.len, &Cell::default()), all);
    }
}
