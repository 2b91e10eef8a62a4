//! Text to token ids: what the model is fed, exactly, and where it came from.
//!
//! A text is tokenised once, as a whole, and cut into windows that never overlap; nothing is decoded and encoded again,
//! so the ids that are hashed are the ids that are run. Cutting a text before tokenising it would be faster for huge
//! files, but no cut is safe for every tokenizer (some merge across spaces), so there is a limit on size instead.

mod ids;
mod text;
mod tokenizer;

use std::path::Path;

use outliers_protocol::{BUILTIN_CORPUS, CorpusProvenance, CorpusSource, CorpusSpec, Packing, TokenizerProvenance};
use sha2::{Digest, Sha256};

use crate::error::{IoContext, Result, WorkerError};
use text::Document;
use tokenizer::TextTokenizer;

/// The English text that ships with the worker, see `assets/README.md`.
pub const SHAKESPEARE: &str = include_str!("../assets/shakespeare.txt");

/// Sequences taken from a text when nothing else is asked for.
pub const DEFAULT_SEQUENCES: usize = 16;
/// Tokens per sequence taken from a text when nothing else is asked for and the model allows it.
pub const DEFAULT_TOKENS: usize = 2048;
/// Fewest tokens per sequence: the second is the first that can be predicted.
const FEWEST_TOKENS: usize = 2;
/// Longest corpus file, bytes: tokenising needs some 50 times that in memory.
const MAX_CORPUS_BYTES: u64 = 256 << 20;

/// The token ids of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Tokens {
    /// `[sequences, tokens]`, row by row; every id is below the vocabulary's size.
    pub ids: Vec<i64>,
    /// Rows.
    pub sequences: usize,
    /// Tokens per row, prefix included.
    pub tokens: usize,
    /// Where they came from.
    pub provenance: CorpusProvenance,
    /// What made them; `None` for ready token ids.
    pub tokenizer: Option<TokenizerProvenance>,
}

impl Tokens {
    /// The ids of one sequence.
    pub fn sequence(&self, index: usize) -> &[i64] {
        &self.ids[index * self.tokens..][..self.tokens]
    }
}

/// What the model can be fed.
#[derive(Clone, Copy)]
struct Limits {
    vocab: usize,
    max_positions: Option<usize>,
}

/// The token ids that `spec` describes, for a model with `vocab` embedding rows and at most `max_positions` tokens per
/// sequence. `model_folder` is where the tokenizer lies; ready token ids do without.
///
/// # Errors
/// Kind `Corpus` for a text or token-id file that is missing, empty, too short, not UTF-8, not tokenisable or does not fit
/// the model; `Job` for options that cannot be met; `Checkpoint` for a damaged tokenizer; `Storage` for unreadable files.
pub fn load(
    spec: &CorpusSpec,
    model_folder: Option<&Path>,
    vocab: usize,
    max_positions: Option<usize>,
) -> Result<Tokens> {
    let limits = Limits { vocab, max_positions };
    match &spec.source {
        CorpusSource::TokenIds(path) => ready_ids(spec, Path::new(path), limits),
        CorpusSource::Builtin(name) if name == BUILTIN_CORPUS => {
            let document = Document { name: name.clone(), text: SHAKESPEARE.into() };
            from_text(spec, &[document], model_folder, limits)
        }
        CorpusSource::Builtin(name) => {
            let message = format!("there is no built-in corpus {name:?}");
            Err(WorkerError::job(message).hint(format!("the built-in corpus is called {BUILTIN_CORPUS:?}")))
        }
        CorpusSource::Files(paths) => {
            let documents = paths.iter().map(|p| Document::read(Path::new(p))).collect::<Result<Vec<_>>>()?;
            from_text(spec, &documents, model_folder, limits)
        }
    }
}

fn from_text(spec: &CorpusSpec, documents: &[Document], folder: Option<&Path>, limits: Limits) -> Result<Tokens> {
    let length = text_length(spec, limits)?;
    if documents.iter().all(|document| document.text.trim().is_empty()) {
        return Err(WorkerError::corpus("the corpus is empty").hint("name text files that hold text"));
    }
    let tokenizer = TextTokenizer::open(folder, spec.bos)?;
    let encoded = documents.iter().map(|d| tokenizer.encode(d)).collect::<Result<Vec<_>>>()?;
    let available = encoded.iter().map(Vec::len).sum();
    let windows = windows(encoded, &tokenizer.prefix, length, spec.packing)?;
    let sequences = choose(spec, windows.len(), available, length)?;
    let ids: Vec<i64> = windows.into_iter().take(sequences).flatten().map(i64::from).collect();
    check_vocab(&ids, length, limits.vocab)?;
    let hash = documents.iter().fold(Sha256::new(), |hash, document| hash.chain_update(document.text.as_bytes()));
    let names: Vec<&str> = documents.iter().map(|document| document.name.as_str()).collect();
    let provenance = provenance(names.join(", "), format!("{:x}", hash.finalize()), &ids, sequences, available);
    Ok(Tokens { ids, sequences, tokens: length, provenance, tokenizer: Some(tokenizer.provenance) })
}

fn ready_ids(spec: &CorpusSpec, path: &Path, limits: Limits) -> Result<Tokens> {
    let bytes = read_corpus(path)?;
    let named = |error: WorkerError| error.context(path.display());
    let rows = ids::parse(&bytes).map_err(named)?;
    let length = rows.tokens;
    if let Some(asked) = spec.sequence_length.filter(|asked| *asked != length) {
        let message = format!("its rows have {length} tokens, but a sequence length of {asked} was asked for");
        return Err(named(
            WorkerError::job(message).hint("leave the sequence length out: ready token ids bring their own"),
        ));
    }
    check_length(length, limits).map_err(named)?;
    let available = rows.ids.len();
    let sequences = spec.num_sequences.map_or(rows.sequences, |asked| asked.min(rows.sequences));
    if sequences == 0 {
        return Err(WorkerError::job("0 sequences were asked for").hint("ask for at least one"));
    }
    let mut ids = rows.ids;
    ids.truncate(sequences * length);
    check_vocab(&ids, length, limits.vocab).map_err(named)?;
    let hash = format!("{:x}", Sha256::digest(&bytes));
    let provenance = provenance(path.display().to_string(), hash, &ids, sequences, available);
    Ok(Tokens { ids, sequences, tokens: length, provenance, tokenizer: None })
}

fn provenance(source: String, sha256: String, ids: &[i64], sequences: usize, available: usize) -> CorpusProvenance {
    CorpusProvenance {
        source,
        sha256,
        token_ids_sha256: token_ids_sha256(ids),
        sequences,
        tokens_per_sequence: ids.len() / sequences,
        tokens_available: available,
    }
}

/// SHA-256 of the ids as i64 little-endian, row by row; lower-case hexadecimal.
pub fn token_ids_sha256(ids: &[i64]) -> String {
    let hash = ids.iter().fold(Sha256::new(), |hash, id| hash.chain_update(id.to_le_bytes()));
    format!("{:x}", hash.finalize())
}

/// Tokens per sequence: as asked, else the default within the model's limit.
fn text_length(spec: &CorpusSpec, limits: Limits) -> Result<usize> {
    let default = limits.max_positions.map_or(DEFAULT_TOKENS, |most| most.min(DEFAULT_TOKENS));
    let length = spec.sequence_length.unwrap_or(default);
    check_length(length, limits)?;
    Ok(length)
}

fn check_length(length: usize, limits: Limits) -> Result<()> {
    if length < FEWEST_TOKENS {
        let message = format!("sequences of {length} tokens leave nothing to predict");
        return Err(WorkerError::job(message).hint(format!("use at least {FEWEST_TOKENS} tokens per sequence")));
    }
    match limits.max_positions {
        Some(most) if length > most => {
            let message = format!("sequences of {length} tokens exceed the model's limit of {most} positions");
            Err(WorkerError::job(message).hint(format!("use a sequence length of at most {most}")))
        }
        _ => Ok(()),
    }
}

/// Windows of `length` ids, each `prefix` and then fresh text; what does not fill a window is dropped.
fn windows(documents: Vec<Vec<u32>>, prefix: &[u32], length: usize, packing: Packing) -> Result<Vec<Vec<u32>>> {
    let body = length.checked_sub(prefix.len()).filter(|body| *body > 0);
    let Some(body) = body else {
        let message = format!("sequences of {length} tokens leave no room after {} special ones", prefix.len());
        return Err(WorkerError::job(message).hint("use a larger sequence length"));
    };
    let runs = match packing {
        Packing::Packed => vec![documents.concat()],
        Packing::Separate => documents,
    };
    let window = |text: &[u32]| [prefix, text].concat();
    Ok(runs.iter().flat_map(|run| run.chunks_exact(body)).map(window).collect())
}

/// How many windows to run: what was asked for must be there; a default takes what there is.
fn choose(spec: &CorpusSpec, windows: usize, available: usize, length: usize) -> Result<usize> {
    let hint = "use more text, a shorter sequence length, or fewer sequences";
    if windows == 0 {
        let whole = if spec.packing == Packing::Separate {
            "no document of the corpus fills"
        } else {
            "the corpus does not fill"
        };
        let message = format!("{whole} one sequence: it has {available} tokens in all, one sequence needs {length}");
        return Err(WorkerError::corpus(message).hint(hint));
    }
    match spec.num_sequences {
        None => Ok(windows.min(DEFAULT_SEQUENCES)),
        Some(0) => Err(WorkerError::job("0 sequences were asked for").hint("ask for at least one")),
        Some(asked) if asked <= windows => Ok(asked),
        Some(asked) => {
            let message = format!(
                "the corpus gives {windows} sequences of {length} tokens, {asked} were asked for \
                 (it has {available} tokens, {asked} sequences need {})",
                asked.saturating_mul(length)
            );
            Err(WorkerError::corpus(message).hint(hint))
        }
    }
}

fn check_vocab(ids: &[i64], length: usize, vocab: usize) -> Result<()> {
    let outside = |id: &i64| usize::try_from(*id).map_or(true, |id| id >= vocab);
    match ids.iter().position(outside) {
        None => Ok(()),
        Some(at) => {
            let (row, column, id) = (at / length, at % length, ids[at]);
            let message =
                format!("token id {id} (sequence {row}, position {column}) is outside the model's {vocab} embeddings");
            Err(WorkerError::corpus(message).hint("the token ids were made with another model's tokenizer"))
        }
    }
}

/// The bytes of a corpus file of bounded size.
fn read_corpus(path: &Path) -> Result<Vec<u8>> {
    let metadata = path.metadata().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            let message = format!("there is no corpus file {}", path.display());
            WorkerError::corpus(message).hint("corpus files are read on the machine that runs the worker")
        }
        _ => WorkerError::io("read", path, &error),
    })?;
    if !metadata.is_file() {
        return Err(
            WorkerError::corpus(format!("{} is not a file", path.display())).hint("name the text files one by one")
        );
    }
    if metadata.len() > MAX_CORPUS_BYTES {
        let (bytes, name) = (metadata.len(), path.display());
        let message = format!("{name} has {bytes} bytes, over the limit of {MAX_CORPUS_BYTES}");
        return Err(WorkerError::corpus(message).hint("cut the text into several files, or tokenise it beforehand"));
    }
    std::fs::read(path).at("read", path)
}

#[cfg(test)]
mod tests;
