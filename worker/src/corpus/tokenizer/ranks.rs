//! Tokenizers in `tiktoken.model`, published by Kimi instead of a tokenizer.json: tokens as base64
//! with their ranks, without merges.
//!
//! A rank is the token's id and its merge priority: of all adjacent parts that form a token, the
//! pair with the lowest rank is joined first, the leftmost among equals. Merges of a
//! tokenizer.json would need one rank per way to split a token, and ties could differ, so this
//! module implements the encoder.
//!
//! Kimi's Python code cuts a text every 400,000 characters, and runs of 25,000 without a space,
//! because its library fails on longer ones. Here a text stays whole. The results differ by at
//! most one or two tokens per cut.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use fancy_regex::Regex;

use super::python::PythonConfig;
use crate::checkpoint::safetensors::shown;
use crate::error::{Result, WorkerError};

/// Classes with a known pattern.
const CLASSES: [&str; 1] = ["TikTokenTokenizer"];

/// Number of special tokens after the ranks, named or not.
const RESERVED: u32 = 256;

/// Kimi's split into words: runs of Han characters; words of other letters, with one character
/// before and an English ending after; up to three digits; punctuation with line ends; line ends;
/// white space but for the last; white space.
const WORDS: &str = concat!(
    r"[\p{Han}]+|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// Byte-level BPE by ranks.
pub(super) struct RankTokenizer {
    ranks: HashMap<Vec<u8>, u32>,
    /// Rank of each single byte.
    bytes: [u32; 256],
    specials: HashMap<String, u32>,
    words: Regex,
    /// Matches special tokens, the longest first.
    any_special: Regex,
}

impl RankTokenizer {
    pub(super) fn parse(model: &[u8], python: &PythonConfig) -> Result<Self> {
        if !python.is_any_of(&CLASSES) {
            let class = shown(python.class.as_deref().unwrap_or_default());
            let message = format!("tiktoken.model is for a tokenizer of class {class}, which is not known");
            return Err(WorkerError::unsupported(message)
                .hint("put a converted tokenizer.json beside config.json, or use ready token ids (`--token-ids`)"));
        }
        let ranks = parse_ranks(model)?;
        let mut bytes = [0; 256];
        for (byte, rank) in (0..=u8::MAX).zip(&mut bytes) {
            *rank = *ranks.get([byte].as_slice()).ok_or_else(|| damaged(format!("it has no token for byte {byte}")))?;
        }
        let specials = specials(ranks.len() as u32, python);
        let mut names: Vec<_> = specials.keys().map(|name| fancy_regex::escape(name)).collect();
        names.sort_by_key(|name| Reverse(name.len()));
        let regex = |pattern: &str| Regex::new(pattern).map_err(|error| WorkerError::internal(error.to_string()));
        Ok(Self { words: regex(WORDS)?, any_special: regex(&names.join("|"))?, ranks, bytes, specials })
    }

    /// Id of a special token.
    pub(super) fn special(&self, token: &str) -> Option<u32> {
        self.specials.get(token).copied()
    }

    /// Number of entries, special tokens included.
    pub(super) fn vocab(&self) -> usize {
        self.ranks.len() + self.specials.len()
    }

    /// Token ids of a text. Special tokens in it are recognised, the default of the Python class.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>, fancy_regex::Error> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut plain = 0;
        for found in self.any_special.find_iter(text) {
            let found = found?;
            self.encode_plain(&text[plain..found.start()], &mut ids)?;
            ids.extend(self.special(found.as_str()));
            plain = found.end();
        }
        self.encode_plain(&text[plain..], &mut ids)?;
        Ok(ids)
    }

    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), fancy_regex::Error> {
        // Every character is a letter, number, space or other character, so the words leave no
        // gaps.
        for word in self.words.find_iter(text) {
            self.encode_word(word?.as_str().as_bytes(), ids);
        }
        Ok(())
    }

    fn encode_word(&self, word: &[u8], ids: &mut Vec<u32>) {
        match self.ranks.get(word) {
            Some(rank) => ids.push(*rank),
            None => Merging::new(self, word).finish(ids),
        }
    }
}

/// A word while its bytes are merged to tokens.
struct Merging<'a> {
    ranks: &'a HashMap<Vec<u8>, u32>,
    word: &'a [u8],
    /// Parts by their first byte.
    parts: Vec<Part>,
    /// Adjacent pairs that form a token, the next to be joined on top.
    pairs: BinaryHeap<Reverse<Pair>>,
}

#[derive(Clone, Copy)]
struct Part {
    /// End of the part; equal to its start once it is joined to the previous part.
    end: usize,
    /// Start of the previous part; its own for the first part.
    before: usize,
    rank: u32,
}

/// Ordered by rank, then position.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    rank: u32,
    start: usize,
    middle: usize,
    end: usize,
}

impl<'a> Merging<'a> {
    fn new(tokenizer: &'a RankTokenizer, word: &'a [u8]) -> Self {
        let part = |(at, byte): (usize, &u8)| {
            let rank = tokenizer.bytes[usize::from(*byte)];
            Part { end: at + 1, before: at.saturating_sub(1), rank }
        };
        let parts = word.iter().enumerate().map(part).collect();
        let mut merging = Self { ranks: &tokenizer.ranks, word, parts, pairs: BinaryHeap::new() };
        (0..word.len()).for_each(|start| merging.consider(start));
        merging
    }

    /// Adds the pair that begins with the part at `start`, if it forms a token.
    fn consider(&mut self, start: usize) {
        let middle = self.parts[start].end;
        let Some(next) = self.parts.get(middle) else { return };
        if let Some(rank) = self.ranks.get(&self.word[start..next.end]) {
            self.pairs.push(Reverse(Pair { rank: *rank, start, middle, end: next.end }));
        }
    }

    fn finish(mut self, ids: &mut Vec<u32>) {
        while let Some(Reverse(Pair { rank, start, middle, end })) = self.pairs.pop() {
            // Either part may have been joined to another meanwhile.
            if self.parts[start].end == middle && self.parts[middle].end == end {
                self.join(rank, start, middle, end);
            }
        }
        let mut at = 0;
        while let Some(part) = self.parts.get(at) {
            ids.push(part.rank);
            at = part.end;
        }
    }

    fn join(&mut self, rank: u32, start: usize, middle: usize, end: usize) {
        self.parts[middle].end = middle;
        let joined = &mut self.parts[start];
        (joined.end, joined.rank) = (end, rank);
        let before = joined.before;
        if let Some(next) = self.parts.get_mut(end) {
            next.before = start;
        }
        if before != start {
            self.consider(before);
        }
        self.consider(start);
    }
}

/// Parses one token per line: base64, a space, its rank. Ranks must be consecutive from 0.
fn parse_ranks(model: &[u8]) -> Result<HashMap<Vec<u8>, u32>> {
    let text = std::str::from_utf8(model).map_err(|_| damaged("it is not text".to_owned()))?;
    let mut ranks = HashMap::new();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.is_empty()) {
        let wrong = || damaged(format!("line {number} is not a token and its rank"));
        let (token, rank) = line.split_once(' ').ok_or_else(wrong)?;
        let (token, rank) = (STANDARD.decode(token).map_err(|_| wrong())?, rank.trim().parse().map_err(|_| wrong())?);
        if ranks.insert(token, rank).is_some() {
            return Err(damaged(format!("the token of line {number} appears twice")));
        }
    }
    let mut given: Vec<u32> = ranks.values().copied().collect();
    given.sort_unstable();
    if given.into_iter().eq(0..ranks.len() as u32) { Ok(ranks) } else { Err(damaged("its ranks have gaps".to_owned())) }
}

/// The special tokens after `first`, with the names in the settings, else numbered names.
fn specials(first: u32, python: &PythonConfig) -> HashMap<String, u32> {
    let named: HashMap<u32, &String> = python.ids.iter().map(|(token, id)| (*id, token)).collect();
    let name = |id: u32| named.get(&id).map_or_else(|| format!("<|reserved_token_{id}|>"), |name| (*name).clone());
    (first..first.saturating_add(RESERVED)).map(|id| (name(id), id)).collect()
}

fn damaged(what: String) -> WorkerError {
    WorkerError::checkpoint(format!("tiktoken.model cannot be read: {what}"))
        .hint("fetch the tokenizer again, or use ready token ids (`--token-ids`)")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Encoding by the definition.
    fn naive(ranks: &HashMap<Vec<u8>, u32>, word: &[u8]) -> Vec<u32> {
        if let Some(rank) = ranks.get(word) {
            return vec![*rank];
        }
        let mut parts: Vec<Vec<u8>> = word.iter().map(|byte| vec![*byte]).collect();
        loop {
            let pair = |at: usize| ranks.get(&parts[at..at + 2].concat()).map(|rank| (*rank, at));
            let Some((_, at)) = (0..parts.len().saturating_sub(1)).filter_map(pair).min() else { break };
            let joined = parts[at..at + 2].concat();
            parts.splice(at..at + 2, [joined]);
        }
        parts.iter().map(|part| ranks[part]).collect()
    }

    /// All bytes, then tokens of few different letters, so that adjacent pairs overlap in every
    /// way.
    fn model() -> impl Strategy<Value = HashMap<Vec<u8>, u32>> {
        let tokens = prop::collection::vec(prop::collection::vec(prop::sample::select(b"abc".to_vec()), 2..6), 0..40);
        tokens.prop_map(|tokens| {
            let mut ranks: HashMap<Vec<u8>, u32> = (0_u8..=255).map(|byte| (vec![byte], byte.into())).collect();
            for token in tokens {
                let next = ranks.len() as u32;
                ranks.entry(token).or_insert(next);
            }
            ranks
        })
    }

    fn file(ranks: &HashMap<Vec<u8>, u32>) -> String {
        ranks.iter().map(|(token, rank)| format!("{} {rank}\n", STANDARD.encode(token))).collect()
    }

    proptest! {
        #[test]
        fn words_merge_by_rank(ranks in model(), word in "[abcd]{0,30}") {
            let tokenizer = RankTokenizer::parse(file(&ranks).as_bytes(), &PythonConfig::default()).unwrap();
            let mut ids = Vec::new();
            tokenizer.encode_word(word.as_bytes(), &mut ids);
            prop_assert_eq!(ids, if word.is_empty() { Vec::new() } else { naive(&ranks, word.as_bytes()) });
        }

        /// Words cover all characters.
        #[test]
        fn tokens_cover_every_text(text in "\\PC*|[ \t\r\n\u{a0}a1漢é\u{301}!']*") {
            let ranks = (0_u8..=255).map(|byte| (vec![byte], u32::from(byte))).collect();
            let tokenizer = RankTokenizer::parse(file(&ranks).as_bytes(), &PythonConfig::default()).unwrap();
            let bytes: Vec<u32> = text.bytes().map(u32::from).collect();
            prop_assert_eq!(tokenizer.encode(&text).unwrap(), bytes);
        }
    }

    #[test]
    fn long_words_take_near_linear_time() {
        let mut ranks: HashMap<Vec<u8>, u32> = (0_u8..=255).map(|byte| (vec![byte], byte.into())).collect();
        ranks.insert(b"aa".to_vec(), 256);
        let tokenizer = RankTokenizer::parse(file(&ranks).as_bytes(), &PythonConfig::default()).unwrap();
        let ids = tokenizer.encode(&"a".repeat(1_000_001)).unwrap();
        assert_eq!((ids.len(), ids[0], ids[500_000]), (500_001, 256, 97));
    }
}
