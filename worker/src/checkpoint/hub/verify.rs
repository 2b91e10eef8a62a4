//! Decides which streamed files are verified by the hub's hashes, and in which order they are
//! hashed.
//!
//! A hash reads a file from start to end, and a pass reads it layer by layer. Bytes that arrive
//! before the hash reaches them are held in memory. The maximum is known in advance. A file is not
//! verified if memory is insufficient, or if too many bytes would be fetched only for its hash;
//! the reason is part of the results.
//!
//! Hashes of ranges (the hub's Xet chunks) would need no memory. They come from another service
//! with its own credentials and client, which would add many dependencies.

use std::ops::Range;

use sha1::Digest as _;
use sha2::Digest as _;

use super::listing::Digest;
use super::plan::Part;
use crate::files::hex;

/// Bytes fetched only for hashes are at most one in this many of the bytes read.
const EXTRA_SHARE: u64 = 33;
/// Bytes that may be fetched for hashes in any case.
const EXTRA_LEAST: u64 = 16 << 20;

/// A fetch plan that includes the bytes needed for hashes.
pub(super) struct Schedule {
    /// Parts in fetching order. Those with `wanted == 0` are fetched for a hash only.
    pub(super) parts: Vec<Part>,
    /// Verified files, each with its parts in file order.
    pub(super) verified: Vec<(usize, Vec<usize>)>,
    /// Files that are read but not verified, with reasons.
    pub(super) unverified: Vec<(usize, Unverifiable)>,
    /// Maximum bytes held for hashes at a time.
    pub(super) held: u64,
}

/// Reason why a file is not verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unverifiable {
    /// The hub lists no hash of it.
    NoHash,
    /// The run does not read this number of its bytes.
    Unread(u64),
    /// This number of bytes would have to be held.
    Memory(u64),
}

impl Unverifiable {
    /// One reason for two files, if both have the same kind.
    pub(super) fn and(&self, other: &Self) -> Option<Self> {
        match (self, other) {
            (Self::NoHash, Self::NoHash) => Some(Self::NoHash),
            (Self::Unread(a), Self::Unread(b)) => Some(Self::Unread(a + b)),
            (Self::Memory(a), Self::Memory(b)) => Some(Self::Memory(*a.max(b))),
            _ => None,
        }
    }
}

impl std::fmt::Display for Unverifiable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let megabytes = |bytes: &u64| bytes.div_ceil(1_000_000);
        match self {
            Self::NoHash => f.write_str("the hub lists no hash"),
            Self::Unread(bytes) => {
                write!(f, "the run does not read {} MB of them, which their hashes need", megabytes(bytes))
            }
            Self::Memory(bytes) => {
                write!(
                    f,
                    "{} MB of memory would be needed to hold bytes until their hash reaches them",
                    megabytes(bytes)
                )
            }
        }
    }
}

impl Schedule {
    /// Verifies files within the limits of extra bytes and of `memory` (bytes). `sizes` are those
    /// of the files with a listed hash. No part is larger than `largest` bytes.
    pub(super) fn new(parts: Vec<Part>, sizes: &[Option<u64>], largest: u64, memory: u64) -> Self {
        let (mut chosen, mut unverified) = choose(&parts, sizes);
        loop {
            let schedule = Self::of(&parts, &chosen, largest);
            let Some((file, held)) = schedule.largest_holder(memory) else {
                return Self { unverified, ..schedule };
            };
            chosen.retain(|gaps| gaps.file != file);
            unverified.push((file, Unverifiable::Memory(held)));
        }
    }

    /// Inserts the parts of these files' gaps into the plan, after what precedes them in the file.
    fn of(parts: &[Part], chosen: &[Gaps], largest: u64) -> Self {
        let mut extra: Vec<(usize, Part)> = Vec::new();
        for Gaps { file, gaps } in chosen {
            for (after, gap) in gaps {
                let steps = (gap.start..gap.end).step_by(largest.max(1) as usize);
                extra.extend(steps.map(|start| {
                    let range = start..start.saturating_add(largest).min(gap.end);
                    (*after, Part { file: *file, range, wanted: 0, layer: parts[*after].layer })
                }));
            }
        }
        extra.sort_by_key(|(after, part)| (*after, part.file, part.range.start));
        let mut extra = extra.into_iter().peekable();
        let mut all = Vec::with_capacity(parts.len() + extra.len());
        for (at, part) in parts.iter().enumerate() {
            all.push(part.clone());
            while let Some((_, part)) = extra.next_if(|(after, _)| *after == at) {
                all.push(part);
            }
        }
        let verified = chosen.iter().map(|Gaps { file, .. }| (*file, in_file(&all, *file))).collect();
        let mut schedule = Self { parts: all, verified, unverified: Vec::new(), held: 0 };
        schedule.held = schedule.peak().0;
        schedule
    }

    /// The file with the most held bytes at the point where more than `memory` is held, and that
    /// number.
    fn largest_holder(&self, memory: u64) -> Option<(usize, u64)> {
        let (held, of_files) = self.peak();
        let largest = of_files.iter().enumerate().max_by_key(|(_, held)| **held)?;
        (held > memory).then(|| (self.verified[largest.0].0, held))
    }

    /// Maximum bytes held at a time, and the share of each verified file.
    fn peak(&self) -> (u64, Vec<u64>) {
        let mut of_part = vec![None; self.parts.len()];
        for (number, (_, parts)) in self.verified.iter().enumerate() {
            parts.iter().for_each(|part| of_part[*part] = Some(number));
        }
        let (mut reached, mut held) = (vec![0; self.verified.len()], vec![0; self.verified.len()]);
        let mut peak = (0, held.clone());
        for (at, number) in of_part.into_iter().enumerate() {
            let Some(number) = number else { continue };
            held[number] += self.parts[at].len();
            let parts = &self.verified[number].1;
            while let Some(next) = parts.get(reached[number]).filter(|next| **next <= at) {
                held[number] -= self.parts[*next].len();
                reached[number] += 1;
            }
            let total = held.iter().sum();
            if total > peak.0 {
                peak = (total, held.clone());
            }
        }
        peak
    }
}

/// Unread ranges of a file, each with the part after which it is fetched.
struct Gaps {
    file: usize,
    gaps: Vec<(usize, Range<u64>)>,
}

impl Gaps {
    fn of(parts: &[Part], file: usize, size: u64) -> Self {
        let in_file = in_file(parts, file);
        let (mut end, mut after, mut gaps) = (0, *in_file.iter().min().expect("a file that is read"), Vec::new());
        for part in in_file {
            let range = &parts[part].range;
            if range.start > end {
                gaps.push((after, end..range.start));
            }
            after = after.max(part);
            end = range.end;
        }
        if size > end {
            gaps.push((after, end..size));
        }
        Self { file, gaps }
    }

    fn bytes(&self) -> u64 {
        self.gaps.iter().map(|(_, gap)| gap.end - gap.start).sum()
    }
}

/// The read files with few unread bytes.
fn choose(parts: &[Part], sizes: &[Option<u64>]) -> (Vec<Gaps>, Vec<(usize, Unverifiable)>) {
    let mut files: Vec<usize> = parts.iter().map(|part| part.file).collect();
    files.sort_unstable();
    files.dedup();
    let (listed, unlisted): (Vec<usize>, Vec<usize>) = files.into_iter().partition(|file| sizes[*file].is_some());
    let mut unverified: Vec<_> = unlisted.into_iter().map(|file| (file, Unverifiable::NoHash)).collect();
    let mut gaps: Vec<Gaps> = listed.into_iter().filter_map(|file| Some(Gaps::of(parts, file, sizes[file]?))).collect();
    gaps.sort_by_key(Gaps::bytes);
    let read: u64 = parts.iter().map(Part::len).sum();
    let mut left = (read / EXTRA_SHARE).max(EXTRA_LEAST);
    let (chosen, others): (Vec<Gaps>, Vec<Gaps>) =
        gaps.into_iter().partition(|gaps| left.checked_sub(gaps.bytes()).inspect(|rest| left = *rest).is_some());
    unverified.extend(others.iter().map(|gaps| (gaps.file, Unverifiable::Unread(gaps.bytes()))));
    (chosen, unverified)
}

/// The parts of a file, in file order.
fn in_file(parts: &[Part], file: usize) -> Vec<usize> {
    let mut of_file: Vec<usize> = (0..parts.len()).filter(|part| parts[*part].file == file).collect();
    of_file.sort_by_key(|part| parts[*part].range.start);
    of_file
}

/// The hash algorithm of a listed file.
#[derive(Clone)]
pub(super) enum Hasher {
    Sha256(sha2::Sha256),
    Sha1(sha1::Sha1),
}

impl Hasher {
    /// A hasher for a file of `size` bytes with the algorithm of the listed hash.
    pub(super) fn new(listed: &Digest, size: u64) -> Self {
        match listed {
            Digest::Sha256(_) => Self::Sha256(sha2::Sha256::new()),
            // Git hashes an object with a prefix of its kind and size.
            Digest::GitSha1(_) => Self::Sha1(sha1::Sha1::new().chain_update(format!("blob {size}\0"))),
        }
    }

    /// Adds the next bytes of the file.
    pub(super) fn add(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => sha2::Digest::update(hasher, bytes),
            Self::Sha1(hasher) => sha1::Digest::update(hasher, bytes),
        }
    }

    /// Lower-case hexadecimal digits.
    pub(super) fn hex(self) -> String {
        match self {
            Self::Sha256(hasher) => hex(&hasher.finalize()),
            Self::Sha1(hasher) => hex(&hasher.finalize()),
        }
    }
}

impl std::io::Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.add(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn part(file: usize, range: Range<u64>) -> Part {
        Part { file, wanted: range.end - range.start, range, layer: 0 }
    }

    fn ranges(schedule: &Schedule) -> Vec<(usize, Range<u64>, bool)> {
        schedule.parts.iter().map(|part| (part.file, part.range.clone(), part.wanted > 0)).collect()
    }

    /// Every byte of a verified file is in exactly one part, in the order of the file.
    fn covered(schedule: &Schedule, sizes: &[Option<u64>]) {
        for (file, parts) in &schedule.verified {
            let mut end = 0;
            for part in parts {
                assert_eq!((schedule.parts[*part].file, schedule.parts[*part].range.start), (*file, end));
                end = schedule.parts[*part].range.end;
            }
            assert_eq!(Some(end), sizes[*file]);
        }
    }

    #[test]
    fn unread_gap_is_fetched_after_the_bytes_before_it() {
        let parts = vec![part(0, 30..40), part(0, 10..20), part(1, 0..10)];
        let schedule = Schedule::new(parts, &[Some(50), Some(10)], 6, MIB);
        let expected = [
            (0, 30..40, true),
            (0, 0..6, false),
            (0, 6..10, false),
            (0, 10..20, true),
            (0, 20..26, false),
            (0, 26..30, false),
            (0, 40..46, false),
            (0, 46..50, false),
            (1, 0..10, true),
        ];
        assert_eq!(ranges(&schedule), expected);
        covered(&schedule, &[Some(50), Some(10)]);
        assert!(schedule.unverified.is_empty());
        // The ten bytes from 30 on wait for all bytes before them.
        assert_eq!(schedule.held, 10);
    }

    #[test]
    fn files_read_in_order_buffer_nothing() {
        let parts = (0..8).map(|i| part(0, i * MIB..(i + 1) * MIB)).collect();
        let schedule = Schedule::new(parts, &[Some(8 * MIB)], MIB, 0);
        assert_eq!((schedule.held, schedule.verified.len(), schedule.parts.len()), (0, 1, 8));
    }

    #[test]
    fn verification_over_the_memory_limit_drops_largest_files_first() {
        // File 0, read backwards, holds three parts, file 1 one.
        let mut parts: Vec<Part> = (0..4).rev().map(|i| part(0, i * MIB..(i + 1) * MIB)).collect();
        parts.extend([part(1, MIB..2 * MIB), part(1, 0..MIB)]);
        let sizes = [Some(4 * MIB), Some(2 * MIB)];
        let all = Schedule::new(parts.clone(), &sizes, MIB, 3 * MIB);
        assert_eq!((all.held, all.verified.len()), (3 * MIB, 2));
        let one = Schedule::new(parts.clone(), &sizes, MIB, 2 * MIB);
        assert_eq!((one.held, one.unverified), (MIB, vec![(0, Unverifiable::Memory(3 * MIB))]));
        assert_eq!(one.parts.len(), 6);
        let none = Schedule::new(parts, &sizes, MIB, 0);
        assert_eq!((none.held, none.verified.len(), none.unverified.len()), (0, 0, 2));
    }

    #[test]
    fn mostly_unread_or_unhashed_files_are_not_verified() {
        let parts = vec![part(0, 0..MIB), part(1, 0..MIB), part(2, 0..MIB)];
        let sizes = [Some(MIB + 10), Some(MIB + EXTRA_LEAST), None];
        let schedule = Schedule::new(parts, &sizes, 16 * MIB, MIB);
        assert_eq!(schedule.verified.iter().map(|(file, _)| *file).collect::<Vec<_>>(), [0]);
        let why = [(2, Unverifiable::NoHash), (1, Unverifiable::Unread(EXTRA_LEAST))];
        assert_eq!(schedule.unverified, why);
        covered(&schedule, &sizes);
    }

    #[test]
    fn computed_hash_equals_the_listed_one() {
        // `printf 'abc' | sha256sum`, and `printf 'abc' | git hash-object --stdin`.
        let sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        for listed in
            [Digest::Sha256(sha256.to_owned()), Digest::GitSha1("f2ba8f84ab5c1bce84a7b441cb1959cfc7093b7f".to_owned())]
        {
            let mut hasher = Hasher::new(&listed, 3);
            hasher.add(b"a");
            hasher.add(b"bc");
            assert_eq!(hasher.hex(), listed.hex());
        }
    }
}
