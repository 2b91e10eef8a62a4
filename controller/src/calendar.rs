//! Converts RFC 3339 times, as clouds write them, to and from Unix seconds.

use chrono::{DateTime, NaiveDateTime, SecondsFormat, Utc};

/// Formats as `2026-06-01T12:00:00Z`.
pub fn rfc3339(unix: u64) -> String {
    let time = i64::try_from(unix).ok().and_then(|unix| DateTime::from_timestamp(unix, 0));
    time.unwrap_or(DateTime::<Utc>::MAX_UTC).to_rfc3339_opts(SecondsFormat::Secs, true)
}

/// Parses a time as Unix seconds, without fractions. Without a time zone it is UTC. `None` before
/// 1970.
pub fn from_rfc3339(text: &str) -> Option<u64> {
    let text = text.trim().replacen(['T', 't'], " ", 1);
    let zoned = DateTime::parse_from_str(&text, "%Y-%m-%d %H:%M:%S%.f%#z").map(|time| time.to_utc());
    let zoneless = || NaiveDateTime::parse_from_str(&text, "%Y-%m-%d %H:%M:%S%.f").map(|time| time.and_utc());
    let time = zoned.or_else(|_| zoneless()).ok()?;
    // The library counts a leap second as a longer one before it.
    let leap = i64::from(time.timestamp_subsec_nanos() / 1_000_000_000);
    u64::try_from(time.timestamp() + leap).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_times_are_formatted_and_parsed() {
        for (unix, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_780_315_200, "2026-06-01T12:00:00Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(unix), text);
            assert_eq!(from_rfc3339(text), Some(unix), "{text}");
        }
    }

    #[test]
    fn other_timestamp_forms_are_parsed() {
        for (text, expected) in [
            ("2026-06-01T12:00:00.123456Z", Some(1_780_315_200)),
            ("2026-06-01T14:00:00+02:00", Some(1_780_315_200)),
            ("2026-06-01 04:30:00-0730", Some(1_780_315_200)),
            ("2026-06-01T12:00:00", Some(1_780_315_200)),
            ("2026-06-01T12:00:60Z", Some(1_780_315_260)),
            ("1969-12-31T23:59:59Z", None),
            ("1970-01-01T00:00:00+01:00", None),
            ("2026-13-01T00:00:00Z", None),
            ("2026-06-01T25:00:00Z", None),
            ("2026-06-01T12:00Z", None),
            ("2026-06-01", None),
            ("yesterday", None),
            ("", None),
        ] {
            assert_eq!(from_rfc3339(text), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn timestamps_round_trip(unix in 0u64..253_402_300_800) {
            prop_assert_eq!(from_rfc3339(&rfc3339(unix)), Some(unix));
        }

        #[test]
        fn any_text_parses_without_panic(text in "\\PC{0,40}", digits in "[0-9TZ:+.-]{0,40}") {
            let _ = (from_rfc3339(&text), from_rfc3339(&digits));
        }
    }
}
