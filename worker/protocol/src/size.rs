//! Amounts of memory and their text form.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

/// A number of bytes, written with its unit: `512 MiB`, `1.5GiB`, `4 GB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct ByteSize(pub u64);

const UNITS: [(&str, u64); 9] = [
    ("B", 1),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not an amount of memory: write 512 MiB, 1.5 GiB or 4 GB");
        let trimmed = text.trim();
        if trimmed.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) {
            return Err(format!("{text:?}: it must be positive; write 512 MiB, 1.5 GiB or 4 GB"));
        }
        let end = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = (trimmed[..end].parse::<f64>(), trimmed[end..].trim());
        let (_, unit) = UNITS.into_iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
        let bytes = number.map_err(|_| wrong())? * unit as f64;
        if bytes < 1e18 { Ok(Self(bytes as u64)) } else { Err(wrong()) }
    }
}

impl TryFrom<String> for ByteSize {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Writes the exact number of bytes in a form that can be read again.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_parsed_with_unit_suffixes() {
        for (text, bytes) in [
            ("1.5 GiB", 3 << 29),
            ("512MiB", 512 << 20),
            (" 4 GB ", 4_000_000_000),
            ("1024 B", 1024),
            ("0.5 kB", 500),
            ("0 B", 0),
            ("2TiB", 2 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
            assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
        }
        for text in ["", "1024", "MiB", "-1 GiB", "1e3 MiB", "1..5 GB", "9999999999 TiB", "12 parsecs"] {
            let error = text.parse::<ByteSize>().unwrap_err();
            assert!(error.contains(text) && error.contains("MiB"), "{error}");
        }
    }
}
