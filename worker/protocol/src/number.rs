//! Numbers as people write them.

use std::str::FromStr;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_count_is_told_what_it_must_be() {
        assert_eq!((whole("0"), whole("4096")), (Ok(0_usize), Ok(4096_usize)));
        for negative in ["-1", "-0.5"] {
            assert!(whole::<usize>(negative).unwrap_err().contains("positive"), "{negative}");
        }
        for odd in ["", "-", "many", "1.5", "99999999999999999999999"] {
            assert!(whole::<u64>(odd).unwrap_err().contains("whole number"), "{odd}");
        }
    }
}
