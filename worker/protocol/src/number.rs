//! Numbers on the command line and in files.

use std::str::FromStr;

use serde::Deserialize;

/// A count or a seed.
///
/// # Errors
/// `text` is negative, not a whole number, or too large.
pub fn whole<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| match text.strip_prefix('-').map(str::parse::<f64>) {
        Some(Ok(_)) => "it must be positive".to_owned(),
        _ if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) => {
            "it must be a smaller whole number".to_owned()
        }
        _ => "it must be a whole number".to_owned(),
    })
}

/// Declares a number type with bounds. A number out of bounds is refused on the command line and
/// in files.
macro_rules! bounded {
    ($(#[$doc:meta])* $name:ident, $most:literal, $rule:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Deserialize)]
        #[serde(try_from = "f64")]
        pub struct $name(f64);

        impl $name {
            /// The number.
            pub fn get(self) -> f64 {
                self.0
            }
        }

        impl TryFrom<f64> for $name {
            type Error = String;

            fn try_from(number: f64) -> Result<Self, String> {
                // NaN is in no range.
                let fits = (MIN_NUMBER..=$most).contains(&number);
                if fits {
                    return Ok(Self(number));
                }
                Err(format!(concat!("it must be ", $rule, ", not {}"), short(number)))
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

/// A number that a message repeats; one with hundreds of digits as a power of ten.
fn short(number: f64) -> String {
    if number == 0.0 || (MIN_NUMBER..1e9).contains(&number.abs()) { number.to_string() } else { format!("{number:e}") }
}

/// Less than any amount, rate or share that somebody can mean; what is divided by it stays finite.
const MIN_NUMBER: f64 = 1e-9;

bounded! {
    /// An amount or a rate.
    Positive, 1e6, "a positive number up to 1000000"
}

bounded! {
    /// A share.
    Fraction, 1.0, "a positive number up to 1"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_numbers_are_repeated_in_short() {
        for (text, said) in [("1e300", "not 1e300"), ("1e-300", "not 1e-300"), ("inf", "not inf"), ("-2", "not -2")] {
            let error = text.parse::<Positive>().unwrap_err();
            assert!(error.ends_with(said), "{error}");
        }
    }

    #[test]
    fn invalid_count_error_states_the_expected_form() {
        assert_eq!((whole("0"), whole("4096")), (Ok(0_usize), Ok(4096_usize)));
        for negative in ["-1", "-0.5"] {
            assert!(whole::<usize>(negative).unwrap_err().contains("positive"), "{negative}");
        }
        for odd in ["", "-", "many", "1.5", "99999999999999999999999"] {
            assert!(whole::<u64>(odd).unwrap_err().contains("whole number"), "{odd}");
        }
        assert!(whole::<u8>("256").unwrap_err().contains("smaller"));
    }
}
