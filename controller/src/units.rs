//! Units of money, memory and time as types.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

pub use outliers_protocol::{Fraction, Positive};
use serde::{Deserialize, Serialize};

/// US dollars in millionths, so that sums are exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Usd(i64);

impl Usd {
    /// No money.
    pub const ZERO: Self = Self(0);

    /// From millionths of a dollar.
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// From dollars, rounded to a millionth.
    pub fn from_dollars(dollars: f64) -> Self {
        Self((dollars * 1e6).round() as i64)
    }

    /// The amount in dollars.
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

impl std::ops::Sub for Usd {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0 - other.0)
    }
}

impl std::iter::Sum for Usd {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, |a, b| a + b)
    }
}

impl fmt::Display for Usd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Small bills are common on the local broker; with two digits they would print as zero.
        let digits = if self.0 != 0 && self.0.abs() < 10_000 { 6 } else { 2 };
        let sign = if self.0 < 0 { "-" } else { "" };
        write!(f, "{sign}${:.digits$}", self.dollars().abs())
    }
}

/// Price per hour of a whole instance: all its GPUs and the requested disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UsdPerHour(pub Usd);

impl UsdPerHour {
    /// From dollars per hour.
    pub fn from_dollars(dollars: f64) -> Self {
        Self(Usd::from_dollars(dollars))
    }

    /// The cost of `time` at this price.
    pub fn cost(self, time: Duration) -> Usd {
        Usd::from_dollars(self.0.dollars() * time.as_secs_f64() / 3600.0)
    }

    /// What this time costs, rounded up to the cent: the amount that is shown pays for all of the
    /// time.
    pub fn cost_up_to_cents(self, time: Duration) -> Usd {
        // Price times time that makes a cent, in millionths of a dollar per hour times
        // milliseconds.
        const CENT: u128 = 10_000 * 3_600_000;
        let micros = u128::try_from(self.0.micros()).unwrap_or(0);
        let cents = micros.saturating_mul(time.as_millis()).div_ceil(CENT);
        Usd::from_micros(i64::try_from(cents.saturating_mul(10_000)).unwrap_or(i64::MAX))
    }

    /// How long this money lasts, in whole seconds; `None`: for ever.
    pub fn time(self, money: Usd) -> Option<Duration> {
        let seconds = money.micros().max(0) as f64 * 3600.0 / self.0.micros() as f64;
        (seconds < 1e12).then(|| Duration::from_secs(seconds as u64))
    }
}

impl fmt::Display for UsdPerHour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/h", self.0)
    }
}

/// GPU time in GPU-seconds: the number of GPUs times the time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GpuTime(i64);

impl GpuTime {
    /// The GPU time of this number of GPUs for this time, rounded up to the second.
    pub fn of(gpus: u32, time: Duration) -> Self {
        let seconds = time.as_millis().div_ceil(1000).saturating_mul(gpus.into());
        Self(i64::try_from(seconds).unwrap_or(i64::MAX))
    }

    /// From GPU-hours, rounded to a GPU-second.
    pub fn from_hours(hours: f64) -> Self {
        Self((hours * 3600.0).round() as i64)
    }

    /// GPU-seconds.
    pub const fn seconds(self) -> i64 {
        self.0
    }

    /// From GPU-seconds.
    pub const fn from_seconds(seconds: i64) -> Self {
        Self(seconds)
    }
}

impl fmt::Display for GpuTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} GPU-hours", self.0 as f64 / 3600.0)
    }
}

/// Width of a plot on paper, in millimetres; from 10 to 1000.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlotWidth(f64);

impl PlotWidth {
    /// The length in inches.
    pub fn inches(self) -> f64 {
        self.0 / 25.4
    }
}

/// Parses `84mm`, `8.4cm`, `3.3in`.
impl FromStr for PlotWidth {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with('-') {
            return Err("it must be positive, as in 84mm, 8.4cm or 3.3in".to_owned());
        }
        let wrong = || "it must be a width from 10mm to 1000mm, as in 84mm, 8.4cm or 3.3in".to_owned();
        let units = [("mm", 1.0), ("cm", 10.0), ("in", 25.4)];
        let read = |(unit, length): (&str, f64)| Some(text.strip_suffix(unit)?.parse::<f64>().ok()? * length);
        let width = units.into_iter().find_map(read).ok_or_else(wrong)?;
        if (10.0..=1000.0).contains(&width) { Ok(Self(width)) } else { Err(wrong()) }
    }
}

/// A count with separators, as in `3,969,152`.
pub fn grouped(count: u64) -> String {
    indicatif::HumanCount(count).to_string()
}

/// A number with this many decimals; a large one as in `1.2346e71`.
pub fn figure(value: f64, digits: usize) -> String {
    if value.is_finite() && value.abs() >= 1e9 { format!("{value:.digits$e}") } else { format!("{value:.digits$}") }
}

/// A share in percent, as in `0.5` for 0.005, without the noise of binary fractions.
pub fn in_percent(share: f64) -> f64 {
    (share * 1e8).round() / 1e6
}

/// Operations as text, as in `24.0 x 10^9 operations`.
pub fn operations(count: f64) -> String {
    let power = if count >= 1e11 { 12 } else { 9 };
    let scaled = count / 10_f64.powi(power);
    // Small numbers get two significant digits.
    let digits = if scaled > 0.0 && scaled < 1.0 { (1.0 - scaled.log10().floor()).min(9.0) as usize } else { 1 };
    format!("{scaled:.digits$} x 10^{power} operations")
}

/// A number of bytes.
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

    /// The number in GiB.
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

/// A CUDA version, as in `12.4`.
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
        // A third part, if there is one, does not matter.
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

/// A time as people write it: `90s`, `5m`, `1h30m`, `2d`. `{:#}` shows no seconds from a minute on,
/// and no minutes from two days on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a time: write 90s, 5m, 1h30m or 2d");
        let too_long = || "it must be at most 36500d, which are 100 years".to_owned();
        let mut seconds: u64 = 0;
        let mut rest = text.trim();
        if rest.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) {
            return Err("it must be positive: write 90s, 5m, 1h30m or 2d".to_owned());
        }
        if rest.is_empty() {
            return Err(wrong());
        }
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
            let number: u64 = rest[..digits].parse().map_err(|_| if digits > 0 { too_long() } else { wrong() })?;
            let unit = match rest.as_bytes()[digits] {
                b's' => 1,
                b'm' => 60,
                b'h' => 3600,
                b'd' => 86_400,
                _ => return Err(wrong()),
            };
            seconds = number.checked_mul(unit).and_then(|n| seconds.checked_add(n)).ok_or_else(too_long)?;
            rest = &rest[digits + 1..];
        }
        // Deadlines are added to clocks: a century is enough for everybody.
        match seconds {
            0 => Err("it must be positive: write 90s, 5m, 1h30m or 2d".to_owned()),
            1..=3_153_600_000 => Ok(Self(Duration::from_secs(seconds))),
            _ => Err(too_long()),
        }
    }
}

impl TryFrom<String> for Span {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        if seconds < 10 {
            return write!(f, "{:.1} s", self.0.as_secs_f64());
        }
        let is_rounded = f.alternate() && seconds >= 60;
        let seconds = if is_rounded { (seconds + 30) / 60 * 60 } else { seconds };
        match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
            (0, 0, s) => write!(f, "{s} s"),
            (0, m, _) if is_rounded => write!(f, "{m} min"),
            (0, m, s) => write!(f, "{m} min {s:02} s"),
            (h @ 48.., _, _) if is_rounded => write!(f, "{} d {:02} h", h / 24, h % 24),
            (h, m, _) => write!(f, "{h} h {m:02} min"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn implausible_numbers_are_refused_in_every_input() {
        #[derive(Debug, Deserialize)]
        struct File {
            amount: Option<Positive>,
            share: Option<Fraction>,
        }
        for text in ["nan", "-nan", "inf", "-inf", "0", "0.0", "-1", "-0.5", "1e99", "1e-300"] {
            assert!(text.parse::<Positive>().is_err() && text.parse::<Fraction>().is_err(), "{text}");
            for key in ["amount", "share"] {
                let error = toml::from_str::<File>(&format!("{key} = {text}")).unwrap_err().to_string();
                assert!(error.contains(key) && error.contains("positive number"), "{error}");
            }
        }
        assert!("1.5".parse::<Fraction>().is_err() && "much".parse::<Positive>().is_err());
        assert_eq!("1.5".parse::<Positive>().map(Positive::get), Ok(1.5));
        let file: File = toml::from_str("amount = 3\nshare = 1").unwrap();
        assert_eq!((file.amount.map(Positive::get), file.share.map(Fraction::get)), (Some(3.0), Some(1.0)));
    }

    #[test]
    fn shares_are_shown_in_percent_as_they_were_given() {
        let shown = [0.25, 0.06, 0.29, 0.005, 0.125, 0.0001, 1.0].map(|share| in_percent(share).to_string());
        assert_eq!(shown, ["25", "6", "29", "0.5", "12.5", "0.01", "100"]);
    }

    #[test]
    fn signs_of_amounts_stand_before_the_currency() {
        let shown = [-3_200_000, -13, 0, 13, 10_000].map(|micros| Usd::from_micros(micros).to_string());
        assert_eq!(shown, ["-$3.20", "-$0.000013", "$0.00", "$0.000013", "$0.01"]);
    }

    #[test]
    fn gpu_hours_are_count_times_hours() {
        assert_eq!(GpuTime::of(4, Duration::from_millis(1500)).seconds(), 8);
        assert_eq!(GpuTime::of(2, Duration::from_secs(5400)), GpuTime::from_hours(3.0));
        assert_eq!(GpuTime::of(u32::MAX, Duration::MAX).seconds(), i64::MAX);
        assert_eq!(GpuTime::from_hours(1.5).to_string(), "1.50 GPU-hours");
    }

    #[test]
    fn times_out_of_bounds_are_told_their_bounds() {
        let why = |text: &str| text.parse::<Span>().unwrap_err();
        assert_eq!("36500d".parse::<Span>(), Ok(Span(Duration::from_secs(36_500 * 86_400))));
        for long in ["36501d", "99999999999999999999h", "18446744073709551615d"] {
            assert!(why(long).contains("at most 36500d"), "{long}: {}", why(long));
        }
        assert!(why("0s").contains("positive") && why("-1h").contains("positive"));
        for odd in ["", "h", "6", "6 h", "1.5h", "6y"] {
            assert!(why(odd).contains("is not a time"), "{odd}: {}", why(odd));
        }
    }

    #[test]
    fn long_numbers_are_grouped() {
        let counts = [0, 7, 999, 1_000, 3_969_152, u64::MAX].map(grouped);
        assert_eq!(counts, ["0", "7", "999", "1,000", "3,969,152", "18,446,744,073,709,551,615"]);
        assert_eq!([1289.29377, 0.5, 1.23456e71].map(|value| figure(value, 4)), ["1289.2938", "0.5000", "1.2346e71"]);
        assert_eq!([f64::INFINITY, f64::NAN].map(|value| figure(value, 4)), ["inf", "NaN"]);
        for (count, words) in [
            (3.12e14, "312.0 x 10^12 operations"),
            (2.34e11, "0.23 x 10^12 operations"),
            (2.4e10, "24.0 x 10^9 operations"),
            (5.0e6, "0.0050 x 10^9 operations"),
            (0.0, "0.0 x 10^9 operations"),
        ] {
            assert_eq!(operations(count), words);
        }
    }

    #[test]
    fn paper_widths_are_parsed_in_three_units() {
        for (text, inches) in [("25.4mm", 1.0), ("2.54cm", 1.0), ("3.3in", 3.3)] {
            assert!((text.parse::<PlotWidth>().unwrap().inches() - inches).abs() < 1e-9, "{text}");
        }
        for wrong in ["84", "mm", "-84mm", "nanmm", "9mm", "2000mm", "84px"] {
            assert!(wrong.parse::<PlotWidth>().unwrap_err().contains("84mm"), "{wrong}");
        }
    }
}
