//! Fetches several small files in one answer, which saves round trips.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{HostError, RemoteHost};
use crate::host::transport::quote::quote;

/// Time limit of a bundle: 64 MiB at 0.5 MB/s.
const LIMIT: Duration = Duration::from_secs(120);

/// `piece NUMBER FILE head` or `tail` and `LIMIT` prints `@file NUMBER LENGTH`, a line end, LENGTH
/// bytes and a line end. It prints nothing if the file is not regular.
const PIECE: &str = r#"
piece() {
  if [ -h "$2" ] || [ ! -f "$2" ]; then return 0; fi
  n=$(($(wc -c < "$2"))); [ $n -gt $4 ] && n=$4
  echo "@file $1 $n"; $3 -c $n "$2" | head -c $n; echo
}
"#;

/// A file to fetch, or a part of it.
pub(super) struct BundleFile<'a> {
    pub(super) name: &'a str,
    /// Maximum bytes to fetch.
    pub(super) limit: u64,
    /// Whether the last bytes of a longer file are fetched instead of the first.
    pub(super) from_end: bool,
}

impl RemoteHost {
    /// Fetches plain files of one folder in one command. Keys are indices into `wanted`; missing
    /// files are left out.
    pub(super) async fn bundle(
        &self,
        folder: &str,
        wanted: &[BundleFile<'_>],
    ) -> Result<BTreeMap<usize, Vec<u8>>, HostError> {
        let mut script = format!("{PIECE}\ncd {} 2>/dev/null || exit 0\n", quote(folder));
        for (i, file) in wanted.iter().enumerate() {
            let side = if file.from_end { "tail" } else { "head" };
            script.push_str(&format!("piece {i} {} {side} {}\n", quote(&format!("./{}", file.name)), file.limit));
        }
        script.push(':');
        let answer = self.sh(&script, LIMIT).await?;
        let files = read(&answer.stdout).ok_or_else(|| self.odd("its answer is not the files that were asked for"))?;
        match files.iter().all(|(i, bytes)| wanted.get(*i).is_some_and(|file| bytes.len() as u64 <= file.limit)) {
            true => Ok(files),
            false => Err(self.odd("it sent more than it was asked for")),
        }
    }
}

/// Parses the output of `piece`: each number once and in order, each length exact. `None` for
/// anything else.
fn read(mut rest: &[u8]) -> Option<BTreeMap<usize, Vec<u8>>> {
    let mut files: BTreeMap<usize, Vec<u8>> = BTreeMap::new();
    while !rest.is_empty() {
        let line = rest.iter().position(|b| *b == b'\n')?;
        let head = std::str::from_utf8(&rest[..line]).ok()?.strip_prefix("@file ")?;
        let (number, length) = head.split_once(' ')?;
        let (number, length): (usize, usize) = (number.parse().ok()?, length.parse().ok()?);
        let (bytes, after) = rest[line + 1..].split_at_checked(length)?;
        if files.last_key_value().is_some_and(|(last, _)| *last >= number) {
            return None;
        }
        files.insert(number, bytes.to_vec());
        rest = after.strip_prefix(b"\n")?;
    }
    Some(files)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn file_contents_are_not_parsed_as_frames() {
        let answer = b"@file 0 14\n@file 1 3\nabc\n\n@file 2 0\n\n";
        let files = read(answer).unwrap();
        assert_eq!(files[&0], b"@file 1 3\nabc\n");
        assert_eq!((files[&2].as_slice(), files.len()), (&b""[..], 2));
        assert_eq!(read(b"").unwrap().len(), 0);
    }

    #[test]
    fn unrequested_files_are_refused() {
        let bad: [&[u8]; 8] = [
            b"@file 0 5\nabc\n",
            b"@file 0 3\nabcd",
            b"@file 0 1\na\n@file 0 1\nb\n",
            b"@file 1 1\na\n@file 0 1\nb\n",
            b"@file 0 -1\n\n",
            b"@file 0 99999999999999999999\n\n",
            b"@file 0 18446744073709551615\n\n",
            b"hello\n",
        ];
        for answer in bad {
            assert!(read(answer).is_none(), "{:?}", String::from_utf8_lossy(answer));
        }
    }

    proptest! {
        #[test]
        fn any_answer_parses_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), n in any::<u64>()) {
            let _ = read(&bytes);
            let mut framed = format!("@file 0 {n}\n").into_bytes();
            framed.extend(&bytes);
            let _ = read(&framed);
        }

        #[test]
        fn frames_round_trip(files in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 0..5)) {
            let mut answer = Vec::new();
            for (i, file) in files.iter().enumerate() {
                answer.extend(format!("@file {i} {}\n", file.len()).into_bytes());
                answer.extend(file);
                answer.push(b'\n');
            }
            prop_assert_eq!(read(&answer).unwrap().into_values().collect::<Vec<_>>(), files);
        }
    }
}
