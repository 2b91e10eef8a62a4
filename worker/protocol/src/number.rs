//! Numbers as people write them.

use std::str::FromStr;

use serde::Deserialize;

/// A count or a seed.
///
/// # Errors
/// In words: it is negative, or no whole number, or too large.
pub fn whole<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| match text.strip_prefix('-').map(str::parse::<f64>) {
        Some(Ok(_)) => "it must be positive".to_owned(),
        _ => "it must be a whole number".to_owned(),
    })
}

/// Declares a number that people give, with its bounds: everything out of them is refused where it
/// is read, on the command line and in files alike.
macro_rules! bounded {
    ($(#[$doc:meta])* $name:ident, $most:literal, $rule:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Deserialize)]
        #[serde(try_from = "f64")]
        pub struct $name(f64);

        impl $name {
            /// The number itself.
            pub fn get(self) -> f64 {
                self.0
            }
        }

        impl TryFrom<f64> for $name {
            type Error = String;

            fn try_from(number: f64) -> Result<Self, String> {
                // NaN is in no range.
                let fits = (LEAST..=$most).contains(&number);
                if fits { Ok(Self(number)) } else { Err(format!(concat!("it must be ", $rule, ", not {}"), number)) }
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                text.parse::<f64>().map_err(|_| concat!("it must be ", $rule).to_owned())?.try_into()
            }
        }
    };
}

/// Less than any amount, rate or share that somebody can mean; what is divided by it stays finite.
const LEAST: f64 = 1e-9;

bounded! {
    /// An amount or a rate.
    Positive, 1e6, "a positive number up to 1000000"
}

bounded! {
    /// A share of something.
    Fraction, 1.0, "a positive number up to 1"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_count_error_states_the_expected_form() {
        assert_eq!((whole("0"), whole("4096")), (Ok(0_usize), Ok(4096_usize)));
        for negative in ["-1", "-0.5"] {
            assert!(whole::<usize>(negative).unwrap_err().contains("positive"), "{negative}");
        }
        for odd in ["", "-", "many", "1.5", "99999999999999999999999"] {
            assert!(whole::<u64>(odd).unwrap_err().contains("whole number"), "{odd}");
        }
    }
}
