//! Reads `statistics.safetensors`: counts per norm output and feature, and per sequence and
//! feature.

use std::collections::BTreeMap;

use safetensors::{Dtype, SafeTensors};

/// A table of numbers, row by row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Grid<T> {
    columns: usize,
    values: Vec<T>,
}

impl<T> Grid<T> {
    pub(crate) fn rows(&self) -> impl ExactSizeIterator<Item = &[T]> {
        self.values.chunks_exact(self.columns)
    }
}

impl<T: Copy> Grid<T> {
    /// The value in a row and a column.
    pub(crate) fn at(&self, row: usize, column: usize) -> T {
        self.values[row * self.columns + column]
    }
}

/// The tensors for comparisons. [`Statistics::read`] checks their shapes against the results.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Statistics {
    /// Occurrences, `[norm outputs, features]`.
    pub(crate) count: Grid<u64>,
    /// Largest value, `[norm outputs, features]`, outlier or not.
    pub(crate) max: Grid<f32>,
    /// Smallest value, `[norm outputs, features]`, outlier or not.
    pub(crate) min: Grid<f32>,
    /// Positions with an occurrence at any norm output, `[sequences, features]`.
    pub(crate) sequence_positions: Grid<u64>,
    /// Norm outputs with an occurrence, `[sequences, features]`.
    pub(crate) sequence_sites: Grid<u64>,
    /// Layers with an occurrence, `[sequences, features]`.
    pub(crate) sequence_layers: Grid<u64>,
    /// Tokens sent to each expert, by layer.
    pub(crate) router_tokens: BTreeMap<usize, Vec<u64>>,
    /// Largest magnitude at each expert's output, by layer; empty unless studied.
    pub(crate) expert_peaks: BTreeMap<usize, Vec<f32>>,
}

/// Sizes by the results.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StudyShape {
    /// Norm outputs.
    pub(crate) sites: usize,
    pub(crate) sequences: usize,
    /// Features.
    pub(crate) hidden: usize,
}

impl Statistics {
    /// Reads the file's bytes.
    ///
    /// # Errors
    /// A tensor is missing, or its shape or type differs from the results.
    pub(crate) fn read(bytes: &[u8], shape: StudyShape) -> Result<Self, String> {
        let file = SafeTensors::deserialize(bytes).map_err(|error| format!("it is no safetensors file: {error}"))?;
        let per_site = [shape.sites, shape.hidden];
        let per_sequence = [shape.sequences, shape.hidden];
        Ok(Self {
            count: grid(&file, "count", per_site)?,
            max: grid(&file, "max", per_site)?,
            min: grid(&file, "min", per_site)?,
            sequence_positions: grid(&file, "sequence_positions", per_sequence)?,
            sequence_sites: grid(&file, "sequence_sites", per_sequence)?,
            sequence_layers: grid(&file, "sequence_layers", per_sequence)?,
            router_tokens: by_layer(&file, "router", "tokens")?,
            expert_peaks: by_layer(&file, "expert", "peak")?,
        })
    }

    /// Largest magnitude of a feature at a norm output.
    pub(crate) fn max_abs(&self, site: usize, feature: usize) -> f32 {
        self.peak(site, feature).abs()
    }

    /// The value of largest magnitude of a feature at a norm output, signed.
    pub(crate) fn peak(&self, site: usize, feature: usize) -> f32 {
        let (max, min) = (self.max.at(site, feature), self.min.at(site, feature));
        if max.abs() >= min.abs() { max } else { min }
    }
}

/// A number as it is stored.
trait Stored: Sized {
    const DTYPE: Dtype;
    const BYTES: usize;
    /// `None`: an invalid value.
    fn from_bytes(bytes: &[u8]) -> Option<Self>;
}

impl Stored for u64 {
    const DTYPE: Dtype = Dtype::I64;
    const BYTES: usize = 8;
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        i64::from_le_bytes(bytes.try_into().ok()?).try_into().ok()
    }
}

impl Stored for f32 {
    const DTYPE: Dtype = Dtype::F32;
    const BYTES: usize = 4;
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let value = Self::from_le_bytes(bytes.try_into().ok()?);
        (!value.is_nan()).then_some(value)
    }
}

fn grid<T: Stored>(file: &SafeTensors<'_>, name: &str, [rows, columns]: [usize; 2]) -> Result<Grid<T>, String> {
    let values = tensor(file, name, |shape| shape == [rows, columns])?;
    // At least 1, since chunks of size 0 are invalid.
    Ok(Grid { columns: columns.max(1), values })
}

/// Tensors `<prefix>.<layer>.<what>` of all layers.
fn by_layer<T: Stored>(file: &SafeTensors<'_>, prefix: &str, what: &str) -> Result<BTreeMap<usize, Vec<T>>, String> {
    let layer_of = |name: &str| {
        let layer = name.strip_prefix(prefix)?.strip_prefix('.')?.strip_suffix(what)?.strip_suffix('.')?;
        layer.parse::<usize>().ok()
    };
    let names = file.names().into_iter().filter_map(|name| Some((layer_of(name)?, name)));
    names.map(|(layer, name)| Ok((layer, tensor(file, name, |shape| shape.len() == 1)?))).collect()
}

fn tensor<T: Stored>(file: &SafeTensors<'_>, name: &str, fits: impl Fn(&[usize]) -> bool) -> Result<Vec<T>, String> {
    let view = file.tensor(name).map_err(|_| format!("there is no tensor `{name}`"))?;
    if view.dtype() != T::DTYPE || !fits(view.shape()) {
        return Err(format!(
            "tensor `{name}` is {:?} {:?}, which is not what the results say",
            view.dtype(),
            view.shape()
        ));
    }
    let values: Option<Vec<T>> = view.data().chunks_exact(T::BYTES).map(T::from_bytes).collect();
    values.ok_or_else(|| format!("tensor `{name}` holds values that cannot be"))
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    const SHAPE: StudyShape = StudyShape { sites: 2, sequences: 1, hidden: 3 };

    fn file(count: &[i64], max: &[f32]) -> Vec<u8> {
        let integers = |values: &[i64]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let per_sequence = integers(&[1, 0, 2]);
        let tensors = [
            ("count", Dtype::I64, vec![count.len() / 3, 3], integers(count)),
            ("max", Dtype::F32, vec![2, 3], floats(max)),
            ("min", Dtype::F32, vec![2, 3], floats(&[-9.0; 6])),
            ("sequence_positions", Dtype::I64, vec![1, 3], per_sequence.clone()),
            ("sequence_sites", Dtype::I64, vec![1, 3], per_sequence.clone()),
            ("sequence_layers", Dtype::I64, vec![1, 3], per_sequence),
            ("router.11.tokens", Dtype::I64, vec![2], integers(&[5, 6])),
            ("router.11.tokens_at_position_0", Dtype::I64, vec![2], integers(&[1, 0])),
            ("expert.11.peak", Dtype::F32, vec![2], floats(&[-7.0, 3.0])),
        ];
        let views = tensors.iter().map(|(name, dtype, shape, data)| {
            (*name, TensorView::new(*dtype, shape.clone(), data).expect("shapes and bytes agree"))
        });
        safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap()
    }

    #[test]
    fn tensors_are_found_by_name_and_layer() {
        let bytes = file(&[0, 1, 2, 3, 4, 5], &[1.0, 2.0, 10.0, 4.0, 5.0, 6.0]);
        let statistics = Statistics::read(&bytes, SHAPE).unwrap();
        assert_eq!(statistics.count.at(1, 0), 3);
        assert_eq!(statistics.count.rows().map(|row| row.iter().sum::<u64>()).collect::<Vec<_>>(), [3, 12]);
        assert_eq!((statistics.peak(0, 2), statistics.peak(0, 1)), (10.0, -9.0));
        assert_eq!(statistics.router_tokens, BTreeMap::from([(11, vec![5, 6])]));
        assert_eq!(statistics.expert_peaks[&11], [-7.0, 3.0]);
    }

    #[test]
    fn mismatched_tensor_is_named() {
        let fine = [1.0; 6];
        let wrong = |bytes: &[u8]| Statistics::read(bytes, SHAPE).unwrap_err();
        assert!(wrong(b"nothing").contains("no safetensors"));
        assert!(wrong(&file(&[0; 3], &fine)).contains("`count`"), "too few rows");
        assert!(wrong(&file(&[0, 0, 0, 0, 0, -1], &fine)).contains("`count`"), "a negative count");
        assert!(wrong(&file(&[0; 6], &[f32::NAN; 6])).contains("`max`"));
        let bytes = file(&[0; 6], &fine);
        assert!(wrong(&bytes[..bytes.len() - 1]).contains("no safetensors"), "cut off");
        let other = StudyShape { hidden: 4, ..SHAPE };
        assert!(Statistics::read(&bytes, other).is_err(), "another width");
    }
}
