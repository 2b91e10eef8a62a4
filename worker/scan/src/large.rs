//! Large values with their positions.

/// A value and its position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Large {
    /// Row, counted over all scanned rows.
    pub row: usize,
    /// Column.
    pub dim: usize,
    /// The value, signed.
    pub value: f32,
}

/// As [`crate::Rows::large`].
pub(crate) fn large(x: &[f32], width: usize, asked: &[(usize, u32)]) -> Vec<Large> {
    let mut found = Vec::new();
    for &(row, floor) in asked {
        for (dim, &value) in x[row * width..][..width].iter().enumerate() {
            if value.abs().to_bits() >= floor {
                found.push(Large { row, dim, value });
            }
        }
    }
    found.sort_by_key(|large| (large.row, large.dim));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_at_or_above_the_floor_are_found() {
        let x = [1.0, -3.0, 2.0, /* */ f32::NAN, 3.0, -2.0];
        let of = |asked: &[(usize, f32)]| {
            let asked: Vec<_> = asked.iter().map(|(row, floor)| (*row, floor.to_bits())).collect();
            large(&x, 3, &asked).iter().map(|large| (large.row, large.dim)).collect::<Vec<_>>()
        };
        assert_eq!(of(&[(1, 3.0), (0, 2.0)]), [(0, 1), (0, 2), (1, 0), (1, 1)], "NaN is above all");
        assert_eq!(of(&[(0, 3.5)]), []);
    }
}
