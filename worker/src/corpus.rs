//! Turns text into the model's input token ids, and records their origin.
//!
//! A text is tokenised once, as a whole, and cut into windows. Nothing is decoded and encoded
//! again, so the hashed ids are the ones that are run. Cutting a text before tokenising would be
//! faster for huge files, but no cut is safe for every tokenizer (some merge across spaces), so
//! the size is limited instead.

mod array;
mod compressed;
mod cutter;
mod documents;
mod file;
mod ids;
mod lines;
mod non_text;
mod parquet;
mod rows;
mod table;
mod text;
mod tokenizer;

use std::path::Path;

use outliers_protocol::{
    BUILTIN_CORPUS, CorpusContent, CorpusFormat, CorpusProvenance, CorpusSource, CorpusSpec, Dataset, Packing,
    TokenizerProvenance,
};
use sha2::{Digest, Sha256};

use crate::checkpoint::hub::Hub;
use crate::checkpoint::safetensors::shown;
use crate::error::{Result, WorkerError};
use crate::model::decoder::MaxSequenceLength;
use cutter::Cutter;
use documents::{Document, Documents};
use file::{LocalFile, MAX_TEXT_BYTES, RangedFile, read_whole};
use tokenizer::TextTokenizer;

/// The English text included in the worker, see `assets/README.md`.
pub const SHAKESPEARE: &str = include_str!("../assets/shakespeare.txt");

/// Default number of sequences.
pub const DEFAULT_SEQUENCES: usize = 16;
/// Default tokens per sequence, if the model allows it.
pub const DEFAULT_TOKENS: usize = 2048;
/// Minimum tokens per sequence: the second token is the first that can be predicted.
const FEWEST_TOKENS: usize = 2;
/// Files of a dataset that describe it, written by the hub and its programs.
const DESCRIPTIONS: [&str; 5] =
    ["config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"];

/// The token ids of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Tokens {
    /// Shape `[sequences, tokens]`, row by row; every id is below the vocabulary's size.
    pub ids: Vec<i64>,
    /// Number of sequences.
    pub sequences: usize,
    /// Tokens per row, prefix included.
    pub tokens: usize,
    /// Origin of the ids.
    pub provenance: CorpusProvenance,
    /// The tokenizer; `None` for ready token ids.
    pub tokenizer: Option<TokenizerProvenance>,
}

impl Tokens {
    /// The ids of one sequence.
    pub fn sequence(&self, index: usize) -> &[i64] {
        &self.ids[index * self.tokens..][..self.tokens]
    }
}

/// Limits of the model's input.
#[derive(Clone, Copy)]
struct TokenLimits {
    vocab: usize,
    longest: Option<MaxSequenceLength>,
}

/// The token ids that `spec` describes, for a model with `vocab` embedding rows and sequences of
/// at most `longest` tokens. `model_folder` contains the tokenizer; ready token ids do not need
/// it. `hub` is used for datasets.
///
/// # Errors
/// Kind `Corpus` for a text or token-id file that is missing, empty, too short, not UTF-8, not
/// tokenisable or does not fit the model; `Job` for options that cannot be met; `Checkpoint` for a
/// damaged tokenizer; `Storage` for unreadable files; the hub's errors for datasets.
pub fn load(
    spec: &CorpusSpec,
    model_folder: Option<&Path>,
    vocab: usize,
    longest: Option<MaxSequenceLength>,
    hub: &Hub,
) -> Result<Tokens> {
    let limits = TokenLimits { vocab, longest };
    match &spec.source {
        CorpusSource::TokenIds(path) => ready_ids(spec, Path::new(path), limits),
        CorpusSource::Builtin(name) if name == BUILTIN_CORPUS => {
            let document = Document { name: name.clone(), text: SHAKESPEARE.into() };
            let text = Text { source: name.clone(), documents: Documents::one(document, spec), lasts: false };
            from_text(spec, text, model_folder, limits)
        }
        CorpusSource::Builtin(name) => {
            let message = format!("there is no built-in corpus {name:?}");
            Err(WorkerError::job(message).hint(format!("the built-in corpus is called {BUILTIN_CORPUS:?}")))
        }
        CorpusSource::Files(paths) => from_text(spec, local_text(spec, paths)?, model_folder, limits),
        CorpusSource::Dataset(dataset) => from_text(spec, hub_text(spec, dataset, hub)?, model_folder, limits),
    }
}

/// A text while it is read.
struct Text {
    source: String,
    documents: Documents,
    /// Whether the text may continue: only the needed part is read.
    lasts: bool,
}

fn local_text(spec: &CorpusSpec, paths: &[String]) -> Result<Text> {
    let open = |path: &String| Ok(Box::new(LocalFile::open(path)?) as Box<dyn RangedFile>);
    let files = paths.iter().map(open).collect::<Result<Vec<_>>>()?;
    let lasts = paths.iter().any(|path| content(path) != CorpusContent::Text);
    Ok(Text { source: paths.join(", "), documents: Documents::new(files, spec), lasts })
}

fn hub_text(spec: &CorpusSpec, dataset: &Dataset, hub: &Hub) -> Result<Text> {
    let mut found = hub.dataset(&dataset.id, &dataset.revision, |name| holds_documents(dataset, name))?;
    if found.files.is_empty() {
        let message = format!("dataset {dataset} has no .parquet, .jsonl, .ndjson, .json, .csv or .tsv files there");
        return Err(WorkerError::corpus(message).hint("name a folder of it, as in owner/name@main:folder"));
    }
    // Besides files that are read by ranges, a repository's other files are packed copies or
    // descriptions.
    if found.files.iter().any(|file| by_ranges(file.name())) {
        found.files.retain(|file| by_ranges(file.name()));
    }
    let at = Dataset { revision: found.commit, ..dataset.clone() };
    let files = found.files.into_iter().map(|file| Box::new(file) as Box<dyn RangedFile>).collect();
    Ok(Text { source: at.to_string(), documents: Documents::new(files, spec), lasts: true })
}

/// Whether a file of a dataset's repository is one of the requested ones.
fn holds_documents(dataset: &Dataset, name: &str) -> bool {
    let below = dataset.path.is_empty() || name.strip_prefix(&dataset.path).is_some_and(|rest| rest.starts_with('/'));
    let describes = name.rsplit('/').next().is_some_and(|file| DESCRIPTIONS.contains(&file));
    content(name) != CorpusContent::Text && (name == dataset.path || below && !describes)
}

/// Whether only the needed part of a file is read.
fn by_ranges(name: &str) -> bool {
    let CorpusFormat { content, compression } = CorpusFormat::of(name);
    compression.is_none() && matches!(content, CorpusContent::Parquet | CorpusContent::JsonLines)
}

fn content(name: &str) -> CorpusContent {
    CorpusFormat::of(name).content
}

fn from_text(spec: &CorpusSpec, text: Text, folder: Option<&Path>, limits: TokenLimits) -> Result<Tokens> {
    let length = text_length(spec, limits)?;
    let tokenizer = TextTokenizer::open(folder, spec.bos)?;
    let mut cutter = Cutter::new(&tokenizer, length, spec.packing)?;
    let enough = spec.num_sequences.unwrap_or(DEFAULT_SEQUENCES);
    let (mut hash, mut read, mut blank) = (Sha256::new(), 0, true);
    for document in text.documents {
        let document = document?;
        cutter.add(&document)?;
        hash.update(document.text.as_bytes());
        (read, blank) = (read + 1, blank && document.text.trim().is_empty());
        if text.lasts && cutter.has(enough) {
            break;
        }
    }
    if read == 0 && spec.skip_documents > 0 {
        let message = format!("nothing is left of the corpus after {} skipped documents", spec.skip_documents);
        return Err(WorkerError::corpus(message).hint("skip fewer documents"));
    }
    if blank {
        let rows = format!("rows without text in their field {} are left out", shown(&spec.text_field));
        let hint = if text.lasts { rows } else { "name text files that hold text".to_owned() };
        return Err(WorkerError::corpus("the corpus is empty").hint(hint));
    }
    let (windows, available) = cutter.finish()?;
    let sequences = choose(spec, windows.len(), available, length)?;
    let ids: Vec<i64> = windows.into_iter().take(sequences).flatten().map(i64::from).collect();
    check_vocab(&ids, length, limits.vocab, |id| tokenizer.token(id))?;
    let source = if text.lasts { text.source + &which(spec, read) } else { text.source };
    let provenance = provenance(source, format!("{:x}", hash.finalize()), &ids, sequences, available);
    Ok(Tokens { ids, sequences, tokens: length, provenance, tokenizer: Some(tokenizer.provenance) })
}

/// Describes which documents were read.
fn which(spec: &CorpusSpec, read: usize) -> String {
    let order = spec.shuffle_seed.map_or("as stored".to_owned(), |seed| format!("shuffled with seed {seed}"));
    format!(" (field {}, {read} documents after {}, {order})", shown(&spec.text_field), spec.skip_documents)
}

fn ready_ids(spec: &CorpusSpec, path: &Path, limits: TokenLimits) -> Result<Tokens> {
    let named = |error: WorkerError| error.context(path.display());
    if spec.skip_documents > 0 || spec.shuffle_seed.is_some() {
        let error = WorkerError::job("ready token ids are run as they are: nothing is skipped or shuffled");
        return Err(named(error.hint("leave out --skip-documents and --shuffle")));
    }
    let bytes = read_whole(&LocalFile::open(&path.to_string_lossy())?, MAX_TEXT_BYTES)?;
    let rows = ids::parse(&bytes).map_err(named)?;
    let length = rows.tokens;
    if let Some(asked) = spec.sequence_length.filter(|asked| *asked != length) {
        let message = format!("its rows have {length} tokens, but a sequence length of {asked} was asked for");
        return Err(named(
            WorkerError::job(message).hint("omit the sequence length: the rows of the token ids define the length"),
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
    check_vocab(&ids, length, limits.vocab, |_| None).map_err(named)?;
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

/// Tokens per sequence: as requested, else the default within the model's limit.
fn text_length(spec: &CorpusSpec, limits: TokenLimits) -> Result<usize> {
    let default = limits.longest.map_or(DEFAULT_TOKENS, |most| most.tokens().min(DEFAULT_TOKENS));
    let length = spec.sequence_length.unwrap_or(default);
    check_length(length, limits)?;
    Ok(length)
}

fn check_length(length: usize, limits: TokenLimits) -> Result<()> {
    if length < FEWEST_TOKENS {
        let message = format!("sequences of {length} tokens leave nothing to predict");
        return Err(WorkerError::job(message).hint(format!("use at least {FEWEST_TOKENS} tokens per sequence")));
    }
    limits.longest.map_or(Ok(()), |longest| fits(length, longest))
}

/// Refuses sequences beyond the supported length.
///
/// # Errors
/// Kind `Job`: they are too long; the message names the limit.
pub fn fits(length: usize, longest: MaxSequenceLength) -> Result<()> {
    let most = longest.tokens();
    if length <= most {
        return Ok(());
    }
    let message = match longest {
        MaxSequenceLength::Positions(_) => {
            format!("sequences of {length} tokens exceed the model's limit of {most} positions")
        }
        MaxSequenceLength::SelectedKeys(_) => format!(
            "sequences of {length} tokens: beyond {most} (index_topk) this model attends to the keys that its indexer \
             selects, which is not computed"
        ),
    };
    Err(WorkerError::job(message).hint(format!("use a sequence length of at most {most}")))
}

/// Number of windows to run. A requested number must be available. The default is limited to what
/// is available.
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
                 (it has {available} tokens)"
            );
            Err(WorkerError::corpus(message).hint(hint))
        }
    }
}

/// `token` gives the content of a token that a tokenizer made.
fn check_vocab(ids: &[i64], length: usize, vocab: usize, token: impl Fn(u32) -> Option<String>) -> Result<()> {
    let outside = |id: &i64| usize::try_from(*id).map_or(true, |id| id >= vocab);
    let Some(at) = ids.iter().position(outside) else { return Ok(()) };
    let (row, column, id) = (at / length, at % length, ids[at]);
    let (token, hint) = match u32::try_from(id).ok().and_then(token) {
        Some(token) => (format!(" {}", shown(&token)), "the tokenizer adds a token that the model does not know"),
        None => (String::new(), "the token ids were made with another model's tokenizer"),
    };
    let message =
        format!("token id {id}{token} (sequence {row}, position {column}) is outside the model's {vocab} embeddings");
    Err(WorkerError::corpus(message).hint(hint))
}

#[cfg(test)]
mod tests;
