//! Bounds how much a tokenizer.json may lengthen a text before words are looked up. Each of its
//! steps multiplies the length, so a few dozen can fill any memory.

use std::iter;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Precompiled, Replace};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::processors::template::Piece;
use tokenizers::{
    NormalizedString, Normalizer, NormalizerWrapper, OffsetReferential, OffsetType, PostProcessor,
    PostProcessorWrapper, PreTokenizedString, PreTokenizer, PreTokenizerWrapper, Result, Tokenizer,
};

/// Maximum bytes per byte of text by the tokenizer's definition. The largest published factor is
/// T5's: 33 by its table of characters, 4 by a replacement, 6 by space marks.
const MAX_GROWTH: f64 = 1000.0;
/// Maximum special tokens that a template may add.
const MAX_SPECIAL: usize = 1000;
/// Bytes measured at a time.
const PIECE: usize = 4 << 10;

/// The parts of a tokenizer.json that change a text.
#[derive(Deserialize)]
struct Pipeline {
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    post_processor: Option<PostProcessorWrapper>,
}

/// Maximum bytes per byte of text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Growth(f64);

impl Growth {
    /// Computes the bound from the steps of a tokenizer.json without running them.
    ///
    /// # Errors
    /// The file cannot be parsed, searches for an empty pattern, or exceeds the bound.
    pub(super) fn of(json: &[u8]) -> Result<Self> {
        let Pipeline { normalizer, pre_tokenizer, post_processor } = serde_json::from_slice(json)?;
        post_processor.iter().try_for_each(check_template)?;
        let before = normalizer.as_ref().map_or(Ok(1.0), of_normalizer)?;
        let growth = before * pre_tokenizer.as_ref().map_or(Ok(1.0), of_pre_tokenizer)?;
        if growth > MAX_GROWTH {
            let message =
                format!("its steps may make {growth:.0} bytes of each byte of a text, {MAX_GROWTH} are the limit");
            return Err(message.into());
        }
        Ok(Self(growth))
    }

    /// Refuses a text that becomes longer than `limit` bytes. It is measured if the bound does not
    /// decide.
    ///
    /// # Errors
    /// The text is too long, or a step fails.
    pub(super) fn check(self, tokenizer: &Tokenizer, text: &str, limit: usize) -> Result<()> {
        if text.len() as f64 * self.0 <= limit as f64 {
            return Ok(());
        }
        let mut grown = 0;
        for piece in pieces(text) {
            grown += length(tokenizer, piece)?;
            if grown > limit {
                let bytes = text.len();
                return Err(format!("of its {bytes} bytes the tokenizer makes more than {limit}, the limit").into());
            }
        }
        Ok(())
    }
}

/// A text in pieces of a few KiB.
fn pieces(mut text: &str) -> impl Iterator<Item = &str> {
    iter::from_fn(move || {
        let (piece, rest) = text.split_at(text.floor_char_boundary(PIECE));
        text = rest;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Length of a text in bytes before words are looked up.
fn length(tokenizer: &Tokenizer, text: &str) -> Result<usize> {
    let mut normalized = NormalizedString::from(text);
    if let Some(step) = tokenizer.get_normalizer() {
        step.normalize(&mut normalized)?;
    }
    let mut words = PreTokenizedString::from(normalized);
    if let Some(step) = tokenizer.get_pre_tokenizer() {
        step.pre_tokenize(&mut words)?;
    }
    let words = words.get_splits(OffsetReferential::Normalized, OffsetType::None);
    Ok(words.iter().map(|(word, ..)| word.len()).sum())
}

fn product<T>(steps: &[T], of: fn(&T) -> Result<f64>) -> Result<f64> {
    steps.iter().try_fold(1.0, |growth, step| Ok(growth * of(step)?))
}

fn of_normalizer(step: &NormalizerWrapper) -> Result<f64> {
    use NormalizerWrapper as N;
    Ok(match step {
        N::Sequence(steps) => product::<NormalizerWrapper>(steps.as_ref(), of_normalizer)?,
        N::Replace(replace) => of_replacement(replace)?,
        N::Prepend(prepend) => 1.0 + prepend.prepend.len() as f64,
        N::Precompiled(table) => longest_replacement(table)?,
        N::ByteLevel(_) => 2.0,
        // Bounds by Unicode for normal forms and lower case.
        N::NFC(_) | N::NFD(_) => 3.0,
        N::NFKC(_) | N::NFKD(_) => 11.0,
        N::Lowercase(_) => 1.5,
        // Spaces around a Han character of three bytes, then a normal form and lower case.
        N::BertNormalizer(_) => 5.0 / 3.0 * 3.0 * 1.5,
        N::StripNormalizer(_) | N::StripAccents(_) | N::Nmt(_) => 1.0,
    })
}

fn of_pre_tokenizer(step: &PreTokenizerWrapper) -> Result<f64> {
    use PreTokenizerWrapper as P;
    Ok(match step {
        P::Sequence(steps) => product::<PreTokenizerWrapper>(steps.as_ref(), of_pre_tokenizer)?,
        // A space before each word of at least one byte, then up to two bytes per byte.
        P::ByteLevel(level) if level.add_prefix_space => 4.0,
        P::ByteLevel(_) => 2.0,
        P::Metaspace(space) => of_marks(space),
        P::Split(split) => match &split.pattern {
            SplitPattern::String(text) | SplitPattern::Regex(text) => not_empty(text).map(|_| 1.0)?,
        },
        P::BertPreTokenizer(_)
        | P::Delimiter(_)
        | P::Digits(_)
        | P::FixedLength(_)
        | P::Punctuation(_)
        | P::UnicodeScripts(_)
        | P::Whitespace(_)
        | P::WhitespaceSplit(_) => 1.0,
    })
}

/// Marks that replace spaces, and marks before words.
fn of_marks(space: &Metaspace) -> f64 {
    let mark = space.get_replacement().len_utf8() as f64;
    if space.get_prepend_scheme() == PrependScheme::Never { mark } else { 2.0 * mark }
}

fn of_replacement(replace: &Replace) -> Result<f64> {
    let mut document = serde_json::to_value(replace)?;
    let pattern: ReplacePattern = serde_json::from_value(document["pattern"].take())?;
    let content = replace.content.len() as f64;
    Ok(match pattern {
        ReplacePattern::String(text) => (content / not_empty(&text)?).max(1.0),
        // The pattern may match the empty string before each byte.
        ReplacePattern::Regex(text) => not_empty(&text).map(|_| 1.0 + content)?,
    })
}

/// Length of a pattern in bytes. The library fails on empty matches.
fn not_empty(pattern: &str) -> Result<f64> {
    match pattern.len() {
        0 => Err("one of its steps looks for an empty pattern".into()),
        length => Ok(length as f64),
    }
}

/// The table is a trie with its size before it, followed by all replacements, each terminated by a
/// zero.
fn longest_replacement(table: &Precompiled) -> Result<f64> {
    let document = serde_json::to_value(table)?;
    let table = STANDARD.decode(document["precompiled_charsmap"].as_str().unwrap_or_default())?;
    let trie = table.first_chunk::<4>().map_or(0, |size| u32::from_le_bytes(*size) as usize / 4 * 4);
    let replacements = table.get(4 + trie..).unwrap_or_default();
    let longest = replacements.split(|byte| *byte == 0).map(<[u8]>::len).max();
    Ok(longest.unwrap_or(0).max(1) as f64)
}

/// Checks that a template is bounded, and contains the text once.
fn check_template(step: &PostProcessorWrapper) -> Result<()> {
    let special = step.added_tokens(false);
    if special > MAX_SPECIAL {
        return Err(format!("it puts {special} special tokens around a text, {MAX_SPECIAL} are the limit").into());
    }
    match step {
        PostProcessorWrapper::Sequence(steps) => {
            let steps: &[PostProcessorWrapper] = steps.as_ref();
            steps.iter().try_for_each(check_template)
        }
        PostProcessorWrapper::Template(template) => {
            let single: Vec<Piece> = serde_json::from_value(serde_json::to_value(&template.single)?)?;
            let texts = single.iter().filter(|piece| matches!(piece, Piece::Sequence { .. })).count();
            if texts > 1 { Err("its template repeats the text".into()) } else { Ok(()) }
        }
        PostProcessorWrapper::Bert(_) | PostProcessorWrapper::ByteLevel(_) | PostProcessorWrapper::Roberta(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn growth(normalizer: Value, pre_tokenizer: Value) -> Result<f64> {
        let tokenizer = json!({"version": "1.0", "normalizer": normalizer, "pre_tokenizer": pre_tokenizer});
        Growth::of(tokenizer.to_string().as_bytes()).map(|growth| growth.0)
    }

    fn sequence(steps: impl IntoIterator<Item = Value>) -> Value {
        json!({"type": "Sequence", "normalizers": steps.into_iter().collect::<Vec<_>>()})
    }

    fn replace(kind: &str, pattern: &str, content: &str) -> Value {
        json!({"type": "Replace", "pattern": {kind: pattern}, "content": content})
    }

    #[test]
    fn published_tokenizers_are_far_below_the_limit() {
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        let table = STANDARD.encode([&[0_u8; 4][..], "ﷺ".repeat(11).as_bytes(), &[0]].concat());
        let table = json!({"type": "Precompiled", "precompiled_charsmap": table});
        for (normalizer, pre_tokenizer, expected) in [
            (Value::Null, Value::Null, 1.0),
            (json!({"type": "NFC"}), byte_level, 6.0),
            (sequence([json!({"type": "Prepend", "prepend": "▁"}), replace("String", " ", "▁")]), Value::Null, 12.0),
            (sequence([table, replace("Regex", " {2,}", "▁")]), metaspace, 792.0),
        ] {
            assert_eq!(growth(normalizer.clone(), pre_tokenizer).unwrap(), expected, "{normalizer}");
        }
    }

    #[test]
    fn replacement_growth_is_relative_to_the_replaced_text() {
        assert_eq!(growth(replace("String", "ab", "a"), Value::Null).unwrap(), 1.0);
        assert_eq!(growth(replace("String", "ab", "abcdef"), Value::Null).unwrap(), 3.0);
        assert_eq!(growth(replace("Regex", "x*", "abc"), Value::Null).unwrap(), 4.0);
    }

    #[test]
    fn text_over_the_growth_bound_is_measured_exactly() {
        let tokenizer = json!({"version": "1.0", "normalizer": replace("String", "e", "eeee"),
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}});
        let json = tokenizer.to_string();
        let growth = Growth::of(json.as_bytes()).unwrap();
        let tokenizer = Tokenizer::from_bytes(json.as_bytes()).unwrap();
        let check = |text: &str, limit: usize| growth.check(&tokenizer, text, limit);
        let plain = "é ".repeat(10_000);
        assert!(check(&plain, 20_000).is_ok(), "nothing in it grows");
        assert!(check(&plain, 19_999).is_err());
        let hostile = "e".repeat(10_000);
        assert!(check(&hostile, 40_000).is_ok());
        let error = check(&hostile, 39_999).unwrap_err().to_string();
        assert!(error.contains("10000 bytes") && error.contains("more than 39999"), "{error}");
    }
}
