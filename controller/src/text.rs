//! Sanitises text from hosts and clouds for terminals.

use std::collections::BTreeSet;

/// At most `limit` characters of `bytes`, without terminal escapes, control characters and
/// text-direction characters.
///
/// Tabs and line ends become spaces; invalid UTF-8 becomes U+FFFD.
pub(crate) fn clean(bytes: &[u8], limit: usize) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::new();
    let mut chars = text.chars();
    let mut left = limit;
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => skip_escape(&mut chars),
            _ if is_unsafe(c) => {}
            _ if left == 0 => {
                out.push('…');
                break;
            }
            _ => {
                out.push(if c.is_whitespace() { ' ' } else { c });
                left -= 1;
            }
        }
    }
    out.truncate(out.trim_end().len());
    out
}

/// Maximum terminal columns of a text.
pub(crate) fn columns(text: &str) -> usize {
    text.chars().map(columns_of).sum()
}

/// Characters beyond ASCII count as two.
fn columns_of(c: char) -> usize {
    if c.is_ascii() { 1 } else { 2 }
}

/// Shortens a text to this number of terminal columns. Its beginning and its end are kept.
pub(crate) fn shorten(text: &str, columns: usize) -> String {
    if self::columns(text) <= columns {
        return text.to_owned();
    }
    let kept = columns.saturating_sub(1);
    let part = |chars: &mut dyn Iterator<Item = char>, mut room: usize| -> Vec<char> {
        let fits = |c: &char| {
            let fits = columns_of(*c) <= room;
            room = room.saturating_sub(columns_of(*c));
            fits
        };
        chars.take_while(fits).collect()
    };
    let begin = part(&mut text.chars(), kept.div_ceil(2));
    let end = part(&mut text.chars().rev(), kept / 2);
    begin.into_iter().chain(['…']).chain(end.into_iter().rev()).collect()
}

/// Shortens a comma-separated list to this number of columns by leaving out middle items. Text in
/// brackets belongs to one item.
pub(crate) fn shorten_facts(facts: &str, columns: usize) -> String {
    let mut open = 0_usize;
    let parts = |c: char| {
        match c {
            '(' => open += 1,
            ')' => open = open.saturating_sub(1),
            _ => {}
        }
        c == ',' && open == 0
    };
    let parts: Vec<&str> = facts.split(parts).map(str::trim).collect();
    let without = |(first, last): (usize, usize)| {
        let (head, tail) = (&parts[..first], &parts[parts.len() - last..]);
        head.iter().chain(&["…"]).chain(tail).copied().collect::<Vec<_>>().join(", ")
    };
    let fits = |text: &String| self::columns(text) <= columns;
    // As many facts as fit, as many of the last ones as of the first if that is possible.
    let kept = |number: usize| (0..=number / 2).rev().map(move |last| (number - last, last));
    let shorter = || (1..parts.len()).rev().flat_map(kept).map(without).find(fits);
    let whole = Some(facts.to_owned()).filter(fits);
    whole.or_else(shorter).unwrap_or_else(|| shorten(parts.first().unwrap_or(&facts), columns))
}

/// A count with its noun, as in `1 offer` and `1,024 offers`.
pub(crate) fn counted(count: usize, one: &str) -> String {
    let ending = if count == 1 { "" } else { "s" };
    format!("{} {one}{ending}", crate::units::grouped(count as u64))
}

/// As [`clean`], for a text of several lines, which are kept.
pub(crate) fn clean_lines(text: &str) -> String {
    text.lines().map(|line| clean(line.as_bytes(), 2000)).collect::<Vec<_>>().join("\n")
}

/// At most `limit` characters of a text, escaped for Markdown: without links, images and cell
/// separators.
pub(crate) fn markdown(text: &str, limit: usize) -> String {
    let mut out = String::new();
    for c in clean(text.as_bytes(), limit).chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '@' => out += "&#64;",
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '#' | '~' | '!' => out.extend(['\\', c]),
            _ => out.push(c),
        }
    }
    // Some renderers make links of bare addresses.
    out.replace("://", ":&#47;/").replace("www.", "www&#46;")
}

/// The error in a TOML text: the line, and the reason with the key. Values and lines are not
/// shown, since users write keys into such files.
pub(crate) fn toml_error(text: &str, error: &toml::de::Error) -> (Option<usize>, String) {
    let said = clean(error.message().as_bytes(), 1000);
    let value = said.split_once("string \"").and_then(|(before, rest)| {
        let (_, after) = rest.rsplit_once("\", expected")?;
        Some(format!("{before}a string, expected{after}"))
    });
    let said = value.or_else(|| unknown_name(&said)).or_else(|| negative(&said)).unwrap_or(said);
    let said = other_kind(&said).map(str::to_owned).unwrap_or(said);
    let Some(span) = error.span() else { return (None, said) };
    let at = text.floor_char_boundary(span.start);
    let line = &text[text[..at].rfind('\n').map_or(0, |end| end + 1)..];
    let name = line.lines().next().and_then(|line| line.split_once('=')).map_or("", |(name, _)| name.trim());
    // The place of a missing field is the table that lacks it, not the key on that line.
    let is_of_table = name.is_empty() || said.starts_with("missing field ");
    let said = if is_of_table { said } else { format!("`{}`: {said}", clean(name.as_bytes(), 80)) };
    (Some(1 + text[..at].matches('\n').count()), said)
}

fn unknown_name(said: &str) -> Option<String> {
    let (unknown, known) = said.split_once(", expected ")?;
    let name = unknown.strip_prefix("unknown field `")?.strip_suffix('`')?;
    Some(unknown_key(name, known.split('`').skip(1).step_by(2)))
}

/// A message for an unknown key, with a suggestion in the spelling of options.
pub(crate) fn unknown_key<'a>(key: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let name = key.replace('_', "-");
    let known: BTreeSet<String> = known.into_iter().map(|known| known.replace('_', "-")).collect();
    let close = |known: &&String| strsim::osa_distance(known, &name) <= (name.len() / 3).max(1);
    let meant = known.iter().filter(close).min_by_key(|known| strsim::osa_distance(known, &name));
    let hint = match meant {
        Some(meant) => format!("did you mean `{meant}`?"),
        None => format!("known are {}", known.into_iter().collect::<Vec<_>>().join(", ")),
    };
    format!("unknown field `{}`; {hint}", clean(key.as_bytes(), 80))
}

/// Of a value of another kind than the expected one: how that is written.
fn other_kind(said: &str) -> Option<&'static str> {
    let (_, expected) = said.strip_prefix("invalid type: ")?.split_once(", expected ")?;
    Some(match expected.strip_prefix("a nonzero ").unwrap_or(expected) {
        "a string" | "path string" => "it must be text in quotation marks",
        "a sequence" => "it must be a list in brackets",
        "a boolean" => "it must be true or false, without quotation marks",
        "f64" => "it must be a number, without quotation marks",
        "u8" | "u16" | "u32" | "u64" | "usize" => "it must be a whole number, without quotation marks",
        other if other.starts_with("struct ") => "it must be a table, with its name in brackets before its keys",
        _ => return None,
    })
}

/// Of a number that no count can be.
fn negative(said: &str) -> Option<String> {
    let number = said.strip_prefix("invalid value: integer `")?;
    let is_low = number.starts_with('-') || (number.starts_with("0`") && said.contains("nonzero"));
    is_low.then(|| "it must be positive".to_owned())
}

fn is_unsafe(c: char) -> bool {
    let direction = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    direction || (c.is_control() && !matches!(c, '\t' | '\n' | '\r'))
}

/// Skips an escape sequence after ESC: a control sequence to its final byte, an operating-system
/// command to its terminator, else one character.
fn skip_escape(chars: &mut std::str::Chars<'_>) {
    match chars.next() {
        Some('[') => {
            chars.find(|c| ('\u{40}'..='\u{7e}').contains(c));
        }
        Some(']' | 'P' | '_' | '^' | 'X') => {
            let end = chars.find(|c| matches!(c, '\u{7}' | '\u{1b}' | '\n'));
            // Terminated by BEL, or by ESC and a backslash.
            end.filter(|c| *c == '\u{1b}').and_then(|_| chars.next());
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn escape_sequences_are_removed_whole() {
        assert_eq!(clean(b"a\x1b[31mred\x1b[0m b", 99), "ared b");
        assert_eq!(clean(b"\x1b]0;title\x07x\x1b]8;;http://e\x1b\\y", 99), "xy");
        assert_eq!(clean("left\u{202e}right\u{9b}31m".as_bytes(), 99), "leftright31m");
        assert_eq!(clean(b"a\tb\r\n", 99), "a b");
        assert_eq!(clean(b"abcdef", 3), "abc…");
        assert_eq!(clean(b"\xff", 3), "\u{fffd}");
    }

    #[test]
    fn file_errors_suggest_the_intended_key() {
        #[derive(Debug, Default, serde::Deserialize)]
        #[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
        struct File {
            #[serde(alias = "max_price")]
            max_price: f64,
            count: u32,
            some: Option<std::num::NonZero<u32>>,
        }
        let said = |text: &str| toml_error(text, &toml::from_str::<File>(text).unwrap_err()).1;
        assert_eq!(said("max-prise = 1"), "`max-prise`: unknown field `max-prise`; did you mean `max-price`?");
        assert!(said("MaxPrice = 1").ends_with("known are count, max-price, some"), "{}", said("MaxPrice = 1"));
        assert!(said("cuont = 1").ends_with("did you mean `count`?"));
        assert_eq!(said("count = -1"), "`count`: it must be positive");
        assert_eq!(said("some = 0"), "`some`: it must be positive");
        let File { max_price, count, some } = toml::from_str("max_price = 2.0\ncount = 1").unwrap();
        assert_eq!((max_price, count, some), (2.0, 1, None));
    }

    #[test]
    fn file_errors_say_how_a_value_is_written() {
        #[derive(Debug, Default, serde::Deserialize)]
        struct Table {}
        #[derive(Debug, Default, serde::Deserialize)]
        #[serde(default)]
        struct File {
            text: String,
            path: std::path::PathBuf,
            list: Vec<String>,
            yes: bool,
            number: f64,
            count: Option<std::num::NonZero<usize>>,
            table: Table,
        }
        for (line, word) in [
            ("text = 6", "text in quotation marks"),
            ("path = 6", "text in quotation marks"),
            ("list = 'a'", "a list in brackets"),
            ("yes = 'yes'", "true or false"),
            ("number = '6'", "a number, without quotation marks"),
            ("count = '6'", "a whole number"),
            ("table = 6", "a table"),
        ] {
            let (at, said) = toml_error(line, &toml::from_str::<File>(line).unwrap_err());
            let name = line.split(' ').next().unwrap();
            assert!(at == Some(1) && said.starts_with(&format!("`{name}`: it must be ")), "{line}: {said}");
            assert!(said.contains(word), "{line}: {said}");
        }
        let File { text, path, list, yes, number, count, table: Table {} } = toml::from_str("yes = true").unwrap();
        assert_eq!((text.len(), path.as_os_str().len(), list.len(), yes, number, count), (0, 0, 0, true, 0.0, None));
    }

    #[test]
    fn missing_field_is_not_attributed_to_another_key() {
        #[derive(Debug, serde::Deserialize)]
        struct File {
            name: String,
        }
        let lacking = "budget = 5";
        let (at, said) = toml_error(lacking, &toml::from_str::<File>(lacking).unwrap_err());
        assert_eq!((at, said.as_str()), (Some(1), "missing field `name`"));
        assert_eq!(toml::from_str::<File>("name = 'a'").unwrap().name, "a");
    }

    #[test]
    fn long_text_keeps_both_ends() {
        assert_eq!(shorten("abcdefgh", 8), "abcdefgh");
        assert_eq!(shorten("abcdefgh", 7), "abc…fgh");
        assert_eq!(shorten("abcdefgh", 4), "ab…h");
        assert_eq!(shorten("漢字漢字漢字", 9), "漢字…漢字");
        assert_eq!((shorten("ab", 0), shorten("", 0)), ("…".to_owned(), String::new()));
        let offer = "1 x A100 (40 GiB), 30 CPU cores, 200 GiB RAM, us-east-1 (Virginia, USA), secure";
        assert_eq!(shorten_facts(offer, 80), offer);
        assert_eq!(shorten_facts(offer, 50), "1 x A100 (40 GiB), 30 CPU cores, …, secure");
        assert_eq!(shorten_facts(offer, 25), "1 x A100 (40 GiB), …");
        let cpus = "2 CPU cores, 23.5 GiB RAM, 32.1 GiB free disk";
        assert_eq!(shorten_facts(cpus, 32), "2 CPU cores, 23.5 GiB RAM, …");
        assert_eq!(shorten_facts(offer, 11), "1 x A… GiB)");
        let counts = [0, 1, 2, 1024].map(|count| counted(count, "offer"));
        assert_eq!(counts, ["0 offers", "1 offer", "2 offers", "1,024 offers"]);
    }

    #[test]
    fn markdown_escaping_shows_text_and_makes_no_links() {
        assert_eq!(markdown("owner/model-1 (run r2): 3 GiB", 99), "owner/model-1 (run r2): 3 GiB");
        assert_eq!(markdown("![x](http://e) <b>|", 99), r"\!\[x\](http:&#47;/e) &lt;b&gt;\|");
        assert_eq!(markdown("www.e.example a@e.example\n# `x`", 99), r"www&#46;e.example a&#64;e.example \# \`x\`");
        assert_eq!(markdown("abcdef", 3), "abc…");
    }

    proptest! {
        #[test]
        fn control_characters_are_removed(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), limit in 0usize..50,
        ) {
            let text = clean(&bytes, limit);
            prop_assert!(text.chars().all(|c| !c.is_control()));
            prop_assert!(text.chars().count() <= limit + 1);
        }
    }
}
