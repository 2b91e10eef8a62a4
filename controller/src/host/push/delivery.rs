//! Uploads files: looks for them on the host, sends what is missing, compares hashes, renames.
//!
//! A file is uploaded to a part file beside its destination, named after its content. After an
//! interruption the next attempt, of any process, reads the hashes of the part's blocks and sends
//! the blocks that differ. The length and name of a part are not trusted.

use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::try_join_all;
use sha2::{Digest, Sha256};

use super::hash_file;
use crate::files::{blocking, hex, open_regular};
use crate::host::probe::free_kib;
use crate::host::retry::Retry;
use crate::host::transport::SendRequest;
use crate::host::transport::quote::quote;
use crate::host::{HostError, HostErrorKind, HostEvent, OnEvent, RemoteHost, SHORT, ScriptOutput};
use crate::units::Bytes;

/// Time limit for hashing a large file on a slow disk.
const HASH_LIMIT: Duration = Duration::from_secs(900);
/// Time without progress after which an upload is given up.
const TIMEOUT: Duration = Duration::from_secs(300);
/// Bytes kept free beside an upload, for the run's own files.
const SPARE: u64 = 16 << 20;
/// Minimum size of a part file's blocks, and their maximum number.
const MIN_BLOCK: u64 = 4 << 20;
const MAX_BLOCKS: u64 = 256;
/// Smaller files are sent several at once, since round trips dominate.
const SMALL: u64 = 1 << 20;
const AT_ONCE: usize = 6;

/// `hash FILE` prints its SHA-256 as 64 hexadecimal digits, or nothing. It reads standard input,
/// so that the answer does not contain the file's name.
///
/// `look` prints the hash of a file and, if it differs from the wanted one, the hashes of a part's
/// blocks. `rename_part` renames a complete part. Another process may do the same at the same time
/// where hosts share a folder. A program is copied instead: that process or a dead connection may
/// still have the part open for writing, and then it could not be started.
const FUNCTIONS: &str = r#"
sum() {
  if command -v sha256sum >/dev/null 2>&1; then sha256sum
  elif command -v shasum >/dev/null 2>&1; then shasum -a 256
  else openssl dgst -sha256 -r; fi | cut -c 1-64
}
hash() { [ -f "$1" ] && [ ! -h "$1" ] || return 0; sum < "$1"; }
look() {
  i=$1; file=$2; part=$3; want=$4; bytes=$5; unit=$6; units=$7; block=$((unit * units))
  have=$(hash "$file"); echo "@have $have"
  [ "$have" != "$want" ] || return 0
  if [ -h "$part" ] || [ ! -f "$part" ]; then rm -f "$part"; return 0; fi
  size=$(($(wc -c < "$part")))
  if [ $size -gt $bytes ]; then rm -f "$part"; return 0; fi
  n=0
  while [ $((n * block)) -lt $size ]; do
    echo "@block $i $n $(dd if="$part" bs=$unit skip=$((n * units)) count=$units 2>/dev/null | sum)"
    n=$((n + 1))
  done
}
place() {
  if [ "$copy" = yes ]; then whole=$(mktemp "$part.XXXXXX") && cp "$part" "$whole" || return 1; fi
  chmod "$mode" "$whole" && mv -f "$whole" "$file" && rm -f "$part"
}
rename_part() {
  file=$1; part=$2; want=$3; mode=$4; copy=$5; whole=$part
  if [ -d "$file" ]; then echo "$file is a folder" >&2; return 1; fi
  have=$(hash "$part")
  if [ "$have" != "$want" ]; then have=$(hash "$file")
  elif ! place; then have=$(hash "$file"); [ "$have" = "$want" ] || return 1; fi
  echo "@sealed $have"
}
"#;

/// A local file and its destination.
pub(super) struct Item {
    pub(super) local: PathBuf,
    pub(super) remote: String,
    pub(super) bytes: u64,
    pub(super) sha256: String,
    pub(super) mode: u32,
}

impl Item {
    /// The file at `local` with its current size and hash.
    pub(super) async fn new(local: PathBuf, remote: String, mode: u32) -> Result<Self, HostError> {
        let (bytes, sha256) = hash_file(&local).await?;
        Ok(Self { local, remote, bytes, sha256, mode })
    }

    fn part(&self) -> String {
        format!("{}.part.{}", self.remote, &self.sha256[..16])
    }

    fn block(&self) -> u64 {
        self.bytes.div_ceil(MAX_BLOCKS).next_power_of_two().max(MIN_BLOCK)
    }
}

/// The blocks of one item that the host lacks.
struct Gap<'a> {
    item: &'a Item,
    parts: Vec<Range<u64>>,
}

impl Gap<'_> {
    fn bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.end - part.start).sum()
    }

    /// Whether the item is a program.
    fn must_be_copied(&self) -> bool {
        self.item.mode & 0o111 != 0
    }
}

/// Bytes missing on the host: at the first look, and the minimum since.
#[derive(Default)]
struct Missing {
    first: Option<u64>,
    least: Option<u64>,
}

impl Missing {
    /// Records a look. Returns the bytes missing at the first one.
    fn note(&mut self, now: u64) -> u64 {
        self.least = Some(self.least.map_or(now, |least| least.min(now)));
        *self.first.get_or_insert(now)
    }
}

/// Sums the progress of several concurrent uploads.
struct UploadCounter<'a> {
    name: &'a str,
    sent: AtomicU64,
    total: u64,
    on: OnEvent<'a>,
}

impl UploadCounter<'_> {
    fn add(&self, bytes: u64) {
        let sent = self.sent.fetch_add(bytes, Ordering::Relaxed) + bytes;
        (self.on)(HostEvent::Uploading { name: self.name.to_owned(), sent, total: self.total });
    }
}

impl RemoteHost {
    /// Sends missing files into one folder. Returns the bytes that were missing. Events use
    /// `name`.
    pub(super) async fn deliver(
        &self,
        name: &str,
        folder: &str,
        items: &[Item],
        on: OnEvent<'_>,
    ) -> Result<u64, HostError> {
        let mut retry = Retry::new(TIMEOUT, None);
        let mut missing = Missing::default();
        loop {
            let before = missing.least;
            match self.deliver_once(name, folder, items, &mut missing, on).await {
                Ok(()) => {
                    retry.recovered(on);
                    return Ok(missing.first.unwrap_or(0));
                }
                Err(error) if error.is_transient() => {
                    // The last attempt made progress, so the timeout restarts. Files are finite,
                    // so this ends.
                    if before.is_some() && missing.least < before {
                        retry.recovered(on);
                    }
                    retry.wait(error, on).await?;
                }
                Err(error) => {
                    self.remove_parts(items).await;
                    return Err(error);
                }
            }
        }
    }

    async fn deliver_once(
        &self,
        name: &str,
        folder: &str,
        items: &[Item],
        missing: &mut Missing,
        on: OnEvent<'_>,
    ) -> Result<(), HostError> {
        let gaps = self.survey(folder, items).await?;
        let now = gaps.iter().map(Gap::bytes).sum();
        let total = missing.note(now);
        if gaps.is_empty() {
            if total == 0 {
                on(HostEvent::AlreadyThere { name: name.to_owned() });
            }
            return Ok(());
        }
        let tally = UploadCounter { name, sent: AtomicU64::new(total.saturating_sub(now)), total, on };
        let (small, large): (Vec<_>, Vec<_>) = gaps.iter().partition(|gap| gap.item.bytes < SMALL);
        for few in small.chunks(AT_ONCE) {
            try_join_all(few.iter().map(|gap| self.send(gap, &tally))).await?;
        }
        for gap in large {
            self.send(gap, &tally).await?;
        }
        self.rename_parts(&gaps).await
    }

    async fn send(&self, gap: &Gap<'_>, tally: &UploadCounter<'_>) -> Result<(), HostError> {
        let told = AtomicU64::new(0);
        // A restarted upload reports bytes again that were already counted.
        let progress = |sent: u64| tally.add(sent.saturating_sub(told.fetch_max(sent, Ordering::Relaxed)));
        let part = gap.item.part();
        let what = SendRequest { local: &gap.item.local, remote: &part, parts: &gap.parts, progress: &progress };
        Ok(self.transport.send(&what).await?)
    }

    /// Finds the missing blocks. Creates the folder, removes abandoned uploads and checks free
    /// space.
    async fn survey<'a>(&self, folder: &str, items: &'a [Item]) -> Result<Vec<Gap<'a>>, HostError> {
        let mut script = format!(
            "{FUNCTIONS}\numask 022\nmkdir -p {folder} || exit 1\n\
             find {folder} -name '*.part.*' -type f -mmin +1440 -exec rm -f {{}} \\; 2>/dev/null\n",
            folder = quote(folder)
        );
        for (i, item) in items.iter().enumerate() {
            let (file, part) = (quote(&item.remote), quote(&item.part()));
            let (want, bytes, units) = (&item.sha256, item.bytes, item.block() / MIN_BLOCK);
            script.push_str(&format!("look {i} {file} {part} {want} {bytes} {MIN_BLOCK} {units}\n"));
        }
        script.push_str(&format!("echo \"@disk $(df -Pk {} | tail -n 1)\"", quote(folder)));
        let answer = self.sh(&script, HASH_LIMIT).await?;
        let have = answer.fields("have");
        if have.len() != items.len() {
            return Err(self.odd("it cannot compute SHA-256 sums"));
        }
        let mut gaps = Vec::new();
        for (i, item) in items.iter().enumerate().filter(|(i, item)| item.sha256 != have[*i]) {
            gaps.push(gap(item, &blocks_there(&answer, i)).await?);
        }
        self.check_space(folder, &gaps, &answer)?;
        Ok(gaps)
    }

    fn check_space(&self, folder: &str, gaps: &[Gap<'_>], answer: &ScriptOutput) -> Result<(), HostError> {
        let needs = |gap: &Gap<'_>| gap.bytes() + SPARE + if gap.must_be_copied() { gap.item.bytes } else { 0 };
        let needed = gaps.iter().map(needs).sum();
        match free_kib(&answer.field("disk")).map(|kib| kib.saturating_mul(1024)) {
            Some(free) if free < needed => {
                let message =
                    format!("{}: no space in {folder}: {} needed, {} free", self.name, Bytes(needed), Bytes(free));
                Err(HostError::new(HostErrorKind::NoSpace, message).hint("ask for more disk with the next instance"))
            }
            _ => Ok(()),
        }
    }

    /// Renames parts to their destinations if their hashes match.
    async fn rename_parts(&self, gaps: &[Gap<'_>]) -> Result<(), HostError> {
        let mut script = format!("{FUNCTIONS}\n");
        for gap in gaps {
            let (file, part) = (quote(&gap.item.remote), quote(&gap.item.part()));
            let copy = if gap.must_be_copied() { "yes" } else { "no" };
            let Item { sha256, mode, .. } = gap.item;
            script.push_str(&format!("rename_part {file} {part} {sha256} {mode:o} {copy} || exit 1\n"));
        }
        let sealed = self.sh(&script, HASH_LIMIT).await?.fields("sealed");
        let wrong = gaps.iter().enumerate().find(|(i, gap)| sealed.get(*i) != Some(&gap.item.sha256));
        let Some((_, gap)) = wrong else { return Ok(()) };
        let message = format!("{}: {} is not what was sent (SHA-256 differs)", self.name, gap.item.remote);
        Err(HostError::new(HostErrorKind::Damaged, message)
            .hint("the local file changed meanwhile, or the host is faulty"))
    }

    /// Removes parts that will not be resumed. A failure here is ignored, since an error is
    /// already being returned.
    async fn remove_parts(&self, items: &[Item]) {
        let names: Vec<String> = items.iter().map(|item| quote(&item.part())).collect();
        let _ = self.sh(&format!("rm -f {}", names.join(" ")), SHORT).await;
    }
}

/// Indices and hashes of an item's blocks on the host.
fn blocks_there(answer: &ScriptOutput, item: usize) -> Vec<(u64, String)> {
    let read = |line: &String| {
        let mut words = line.split_whitespace();
        let is_ours = words.next()?.parse() == Ok(item);
        let block = (words.next()?.parse().ok()?, words.next()?.to_owned());
        is_ours.then_some(block)
    };
    answer.fields("block").iter().filter_map(read).collect()
}

/// The part of an item that must still be sent, given the blocks on the host.
async fn gap<'a>(item: &'a Item, there: &[(u64, String)]) -> Result<Gap<'a>, HostError> {
    let ours = match there.is_empty() {
        true => Vec::new(),
        false => hash_blocks(&item.local, item.block()).await?,
    };
    let is_there = |n: u64| there.iter().any(|(number, hash)| *number == n && ours.get(n as usize) == Some(hash));
    let mut parts: Vec<Range<u64>> = Vec::new();
    for n in (0..item.bytes.div_ceil(item.block())).filter(|n| !is_there(*n)) {
        let (start, end) = (n * item.block(), item.bytes.min((n + 1) * item.block()));
        match parts.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => parts.push(start..end),
        }
    }
    Ok(Gap { item, parts })
}

async fn hash_blocks(path: &Path, block: u64) -> Result<Vec<String>, HostError> {
    let owned = path.to_owned();
    blocking(move || hash_blocks_now(&owned, block)).await.map_err(|error| HostError::local(path, &error))
}

fn hash_blocks_now(path: &Path, block: u64) -> io::Result<Vec<String>> {
    let mut file = open_regular(path)?;
    let mut hashes = Vec::new();
    loop {
        let mut hash = Sha256::new();
        match io::copy(&mut (&mut file).take(block), &mut hash)? {
            0 => return Ok(hashes),
            _ => hashes.push(hex(&hash.finalize())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn parts(bytes: &[u8], there: impl Fn(&[String]) -> Vec<(u64, String)>) -> Vec<Range<u64>> {
        let folder = tempfile::tempdir().unwrap();
        let local = folder.path().join("file");
        std::fs::write(&local, bytes).unwrap();
        let item = Item::new(local.clone(), "there".to_owned(), 0o644).await.unwrap();
        let hashes = hash_blocks(&local, item.block()).await.unwrap();
        gap(&item, &there(&hashes)).await.unwrap().parts
    }

    fn whole(size: u64) -> Vec<Range<u64>> {
        std::iter::once(0..size).collect()
    }

    #[tokio::test]
    async fn only_blocks_with_the_right_hash_and_offset_are_skipped() {
        let block = MIN_BLOCK as usize;
        let bytes: Vec<u8> = (0..3 * block + 5).map(|i| (i / block) as u8).collect();
        let (size, block) = (bytes.len() as u64, MIN_BLOCK);
        assert_eq!(parts(&bytes, |_| Vec::new()).await, whole(size));
        let second = |hashes: &[String]| vec![(1, hashes[1].clone())];
        assert_eq!(parts(&bytes, second).await, [0..block, 2 * block..size]);
        let misplaced =
            |hashes: &[String]| vec![(2, hashes[1].clone()), (9, hashes[0].clone()), (u64::MAX, String::new())];
        assert_eq!(parts(&bytes, misplaced).await, whole(size));
        let all = |hashes: &[String]| (0..).zip(hashes.iter().cloned()).collect();
        assert_eq!(parts(&bytes, all).await, []);
        assert_eq!(parts(b"", |_| Vec::new()).await, []);
    }

    #[test]
    fn number_of_blocks_is_bounded() {
        for bytes in [0, 1, MIN_BLOCK, 200_000_000, 5 << 30, (400 << 30) + 1] {
            let item = Item { local: PathBuf::new(), remote: String::new(), bytes, sha256: "0".repeat(64), mode: 0 };
            assert!(bytes.div_ceil(item.block()) <= MAX_BLOCKS && item.block().is_multiple_of(MIN_BLOCK), "{bytes}");
        }
    }
}
