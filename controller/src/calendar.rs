//! Converts RFC 3339 times, as clouds write them, to and from Unix seconds.

const DAY: u64 = 86_400;
/// Days from the first of March of the year 0, the start of the calculation, to the first of
/// January 1970.
const EPOCH: u64 = 719_468;
/// Days in 400 years, the period of the calendar.
const ERA: u64 = 146_097;

/// Formats as `2026-06-01T12:00:00Z`.
pub fn rfc3339(unix: u64) -> String {
    let (days, seconds) = (unix / DAY + EPOCH, unix % DAY);
    let (era, day) = (days / ERA, days % ERA);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Counted from March, so that a leap day is the last of its year.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, after) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = 400 * era + year + after;
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{seconds:02}Z")
}

/// Parses a time as Unix seconds, without fractions. Without a time zone it is UTC. `None` before
/// 1970.
pub fn from_rfc3339(text: &str) -> Option<u64> {
    let (date, time) = text.trim().split_once(['T', 't', ' '])?;
    let (time, offset) = match time.find(['Z', 'z', '+', '-']) {
        Some(at) => (&time[..at], seconds_east(&time[at..])?),
        None => (time, 0),
    };
    let whole = time.split_once('.').map_or(time, |(whole, _)| whole);
    let [year, month, day] = numbers(date, '-')?;
    let [hour, minute, second] = numbers(whole, ':')?;
    let fits = (1970..=9999).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
    if !fits || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let local = days(year, month, day) * DAY + hour * 3600 + minute * 60 + second;
    local.checked_add_signed(-offset)
}

/// Days since 1970, for later dates.
fn days(year: u64, month: u64, day: u64) -> u64 {
    let year = if month > 2 { year } else { year - 1 };
    let (era, year) = (year / 400, year % 400);
    let month = (month + 9) % 12;
    era * ERA + year * 365 + year / 4 - year / 100 + (153 * month + 2) / 5 + day - 1 - EPOCH
}

/// Parses `Z`, `+02:00` or `-0730`.
fn seconds_east(zone: &str) -> Option<i64> {
    let sign = match zone.as_bytes().first()? {
        b'Z' | b'z' => return (zone.len() == 1).then_some(0),
        b'-' => -1,
        _ => 1,
    };
    let digits = zone[1..].replace(':', "");
    let (hours, minutes) = digits.split_at_checked(2)?;
    let number = |text: &str| text.parse::<u32>().ok().map(i64::from);
    let minutes = if minutes.is_empty() { 0 } else { number(minutes)? };
    Some(sign * (number(hours)? * 3600 + minutes * 60))
}

fn numbers(text: &str, between: char) -> Option<[u64; 3]> {
    let parts: Vec<u64> =
        text.split(between).map(|part| part.parse::<u16>().ok().map(u64::from)).collect::<Option<_>>()?;
    parts.try_into().ok()
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
