//! Quotes arguments of remote commands.

/// Quotes a word for a POSIX shell, which reads exactly `word`.
///
/// A NUL byte cannot be part of an argument; callers refuse it first.
pub fn quote(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b'/' | b':' | b',' | b'@' | b'+');
    if !word.is_empty() && word.bytes().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn plain_words_are_not_quoted() {
        assert_eq!(quote("/root/.cache/a-b_c.json"), "/root/.cache/a-b_c.json");
        assert_eq!(quote(""), "''");
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(quote("~"), "'~'");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn quoted_words_round_trip_through_a_real_shell(words in proptest::collection::vec("[^\0]{0,40}", 1..4)) {
            let mut script = "printf '%s\\0'".to_owned();
            for word in &words {
                script.push(' ');
                script.push_str(&quote(word));
            }
            let out = Command::new("sh").arg("-c").arg(&script).output().unwrap();
            prop_assert!(out.status.success());
            let mut expected = words.join("\0");
            expected.push('\0');
            prop_assert_eq!(out.stdout, expected.into_bytes());
        }
    }
}
