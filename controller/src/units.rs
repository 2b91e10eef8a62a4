//! Money, memory and time with their units in the type.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// US dollars, in millionths: sums of many small bills stay exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Usd(i64);

impl Usd {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// From millionths of a dollar.
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// From dollars, rounded to a millionth.
    pub fn from_dollars(dollars: f64) -> Self {
        Self((dollars * 1e6).round() as i64)
    }

    /// Dollars.
    pub fn dollars(self) -> f64 {
        self.0 as f64 / 1e6
    }

    /// Millionths of a dollar.
    pub const fn micros(self) -> i64 {
        self.0
    }
}

impl std::ops::Add for Usd {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl std::iter::Sum for Usd {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, |a, b| a + b)
    }
}

impl fmt::Display for Usd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Small bills are the common case on the local broker: two digits would print them all as nothing.
        let digits = if self.0 != 0 && self.0.abs() < 10_000 { 6 } else { 2 };
        write!(f, "${:.digits$}", self.dollars())
    }
}

/// Price of a whole instance (all its GPUs, the disk asked for) per hour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UsdPerHour(pub Usd);

impl UsdPerHour {
    /// From dollars per hour.
    pub fn from_dollars(dollars: f64) -> Self {
        Self(Usd::from_dollars(dollars))
    }

    /// What so much time costs.
    pub fn cost(self, time: std::time::Duration) -> Usd {
        Usd::from_dollars(self.0.dollars() * time.as_secs_f64() / 3600.0)
    }
}

impl fmt::Display for UsdPerHour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/h", self.0)
    }
}

/// Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// From gibibytes.
    pub const fn from_gib(gib: u64) -> Self {
        Self(gib << 30)
    }

    /// From mebibytes.
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// Gibibytes.
    pub fn gib(self) -> f64 {
        self.0 as f64 / (1u64 << 30) as f64
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.0 as f64;
        match self.0 {
            0..1024 => write!(f, "{} B", self.0),
            1024..1_048_576 => write!(f, "{:.1} KiB", value / 1024.0),
            1_048_576..1_073_741_824 => write!(f, "{:.1} MiB", value / 1_048_576.0),
            1_073_741_824..1_099_511_627_776 => write!(f, "{:.1} GiB", value / 1_073_741_824.0),
            _ => write!(f, "{:.2} TiB", value / 1_099_511_627_776.0),
        }
    }
}

/// A CUDA version as drivers and images name it: `12.4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CudaVersion {
    /// Before the dot.
    pub major: u32,
    /// After it.
    pub minor: u32,
}

impl FromStr for CudaVersion {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a CUDA version: write 12.4");
        let number = |part: &str| part.parse().map_err(|_| wrong());
        let (major, minor) = text.trim().split_once('.').unwrap_or((text.trim(), "0"));
        // Some name a third part, which does not decide what runs.
        let minor = minor.split('.').next().unwrap_or(minor);
        Ok(Self { major: number(major)?, minor: number(minor)? })
    }
}

impl TryFrom<String> for CudaVersion {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<CudaVersion> for String {
    fn from(version: CudaVersion) -> Self {
        version.to_string()
    }
}

impl fmt::Display for CudaVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}
