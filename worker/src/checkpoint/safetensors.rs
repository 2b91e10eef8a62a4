//! Reads safetensors as untrusted input, and writes it in any order.
//!
//! A file is an 8-byte little-endian header length, a JSON object, and the bytes of the tensors.
//! As in the reference library, the tensors must cover the rest of the file without gaps or
//! overlaps. Other files are damaged or malicious.

mod header;
mod writer;

pub use header::{Header, HeaderTensor, MAX_HEADER_BYTES, read_header};
pub use writer::{TensorSpec, Writer};

/// Dtype of stored values. Types that are computed with or published have a variant; others keep
/// their name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StoredDtype {
    /// 64-bit floats.
    F64,
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// bfloat16.
    BF16,
    /// 8-bit floats, 4 exponent bits.
    F8E4M3,
    /// 8-bit floats, 5 exponent bits.
    F8E5M2,
    /// 8-bit powers of two.
    F8E8M0,
    /// 64-bit signed integers.
    I64,
    /// 32-bit signed integers.
    I32,
    /// 16-bit signed integers.
    I16,
    /// 8-bit signed integers.
    I8,
    /// 64-bit unsigned integers.
    U64,
    /// 32-bit unsigned integers.
    U32,
    /// 16-bit unsigned integers.
    U16,
    /// Unsigned 8-bit integers.
    U8,
    /// One byte per truth value.
    Bool,
    /// A type with the file's name for it that this program does not support, or values that are
    /// not contiguous. Its size is unknown: such tensors are listed and can be ignored by name,
    /// but not decoded.
    Other(String),
}

impl StoredDtype {
    /// All supported types with their names in the format and their size in bytes.
    const KNOWN: [(Self, &'static str, u64); 16] = [
        (Self::F64, "F64", 8),
        (Self::F32, "F32", 4),
        (Self::F16, "F16", 2),
        (Self::BF16, "BF16", 2),
        (Self::F8E4M3, "F8_E4M3", 1),
        (Self::F8E5M2, "F8_E5M2", 1),
        (Self::F8E8M0, "F8_E8M0", 1),
        (Self::I64, "I64", 8),
        (Self::I32, "I32", 4),
        (Self::I16, "I16", 2),
        (Self::I8, "I8", 1),
        (Self::U64, "U64", 8),
        (Self::U32, "U32", 4),
        (Self::U16, "U16", 2),
        (Self::U8, "U8", 1),
        (Self::Bool, "BOOL", 1),
    ];

    /// The type with the format's name `name`.
    pub fn from_name(name: &str) -> Self {
        let known = Self::KNOWN.into_iter().find(|(_, known, _)| *known == name);
        known.map_or_else(|| Self::Other(name.to_owned()), |(dtype, _, _)| dtype)
    }

    /// Values of type `dtype` with strides, as of views and broadcast buffers. `strides` are
    /// numbers of values between indices, per dimension.
    pub fn strided(dtype: &Self, strides: &[u64]) -> Self {
        Self::Other(format!("{dtype} with strides {strides:?}"))
    }

    /// The format's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Other(name) => name,
            known => known.row().map_or("", |(_, name, _)| name),
        }
    }

    /// Bytes per value; `None` for unsupported types.
    pub fn size(&self) -> Option<u64> {
        self.row().map(|(_, _, size)| *size)
    }

    fn row(&self) -> Option<&'static (Self, &'static str, u64)> {
        const { &Self::KNOWN }.iter().find(|(dtype, _, _)| dtype == self)
    }
}

impl std::fmt::Display for StoredDtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// Number of values of a shape; `None` if it exceeds 64 bits.
pub fn element_count(shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(1_u64, |product, dim| product.checked_mul(*dim))
}

/// A name from a file, sanitised for a message: quoted, control characters escaped, shortened.
pub fn shown(name: &str) -> String {
    const LONGEST: usize = 160;
    match name.char_indices().nth(LONGEST) {
        Some((cut, _)) => format!("{:?}...", &name[..cut]),
        None => format!("{name:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtype_names_round_trip() {
        for (dtype, name, size) in StoredDtype::KNOWN {
            assert_eq!(StoredDtype::from_name(name), dtype);
            assert_eq!((dtype.name(), dtype.size()), (name, Some(size)));
        }
        let odd = StoredDtype::from_name("F4");
        assert_eq!((odd.name(), odd.size()), ("F4", None));
    }

    #[test]
    fn shown_tensor_names_are_sanitised() {
        assert_eq!(shown("a\u{1b}[31m"), "\"a\\u{1b}[31m\"");
        assert!(shown(&"é".repeat(5000)).chars().count() < 200);
    }
}
