//! The Hugging Face hub: what a repository holds, and its files, checked.
//!
//! Files go into the cache that the other tools of the hub use (`models--owner--name/{blobs,refs,snapshots}`, laid out by
//! hf-hub), but not by hf-hub's client: that one was seen to store error pages as files, ignores `Retry-After`, compares
//! no hash and waits for ever on a silent connection. Here every file is compared with the size and hash that the
//! repository lists before it gets its name.

mod answer;
mod cache;
mod http;
mod listing;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use outliers_protocol::FileBytes;

pub use http::{Patience, Token};
pub use listing::{Digest, RepoFile, RepoListing};

use crate::error::{Result, WorkerError};
use crate::safetensors::Header;
use crate::source::{
    CONFIG_FILE, Checkpoint, INDEX_FILE, MAX_JSON_BYTES, SINGLE_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE,
    TensorEntry, TensorIndex, WeightMap, WeightSource, read_config, read_small,
};
use cache::Cache;
use http::Client;

/// The public hub.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Files fetched, and headers read, at the same time.
const PARALLEL: usize = 4;
/// Bytes of a weight file asked for in the hope that they hold the whole header: true of every surveyed model but the
/// one-file-per-model ones.
const LIKELY_HEADER: u64 = 1 << 20;

/// Where the hub is and what to bring along. Nothing in here is read from the environment.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// `https://huggingface.co` or a mirror of it.
    pub endpoint: String,
    /// For gated and private repositories.
    pub token: Option<Token>,
    /// The hub's cache folder (`$HF_HOME/hub`).
    pub cache: PathBuf,
    /// How long to try.
    pub patience: Patience,
}

impl HubOptions {
    /// The public hub without a token.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        let endpoint = DEFAULT_ENDPOINT.to_owned();
        Self { endpoint, token: None, cache: cache.into(), patience: Patience::default() }
    }
}

/// How far a download is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchProgress {
    /// Bytes of all files that are in the cache or on their way into it.
    pub bytes_done: u64,
    /// Bytes of all files.
    pub bytes_total: u64,
    /// Files that are whole.
    pub files_done: usize,
    /// All files.
    pub files_total: usize,
}

/// A client of one hub.
pub struct Hub {
    client: Client,
    cache: Cache,
}

impl Hub {
    /// Opens no connection.
    ///
    /// # Errors
    /// Kind `Job`: the endpoint is not an http(s) address, or the token would travel unencrypted.
    pub fn new(options: HubOptions) -> Result<Self> {
        let client = Client::new(&options.endpoint, options.token, options.patience)?;
        Ok(Self { client, cache: Cache::new(options.cache) })
    }

    /// Commit and files of `id` (`owner/name`) at `revision` (branch, tag or commit).
    ///
    /// # Errors
    /// Kind `Job` for an impossible id or revision; `ModelNotFound`, `ModelGated` or `Network` as the hub answers.
    pub fn resolve(&self, id: &str, revision: &str) -> Result<RepoListing> {
        listing::check_id(id)?;
        listing::check_revision(revision)?;
        let listing = listing::fetch(&self.client, id, revision)?;
        self.cache.remember(id, revision, &listing.commit)?;
        Ok(listing)
    }

    /// Configuration, tokenizer, index and the headers of the weight files: all that is needed to plan, no weights.
    ///
    /// # Errors
    /// As [`resolve`](Hub::resolve) and [`Checkpoint::open_folder`].
    pub fn fetch_metadata(&self, id: &str, revision: &str) -> Result<Checkpoint> {
        let listing = self.resolve(id, revision)?;
        let shards = self.fetch_small(&listing)?;
        let found = in_parallel(&shards.files, |file| self.header(&listing, file))?;
        let index = TensorIndex::assemble(found, shards.map.as_ref()).map_err(|e| e.context(id))?;
        let folder = self.cache.snapshot(&listing);
        let (config, config_sha256) = read_config(&folder)?;
        let weights = Arc::new(HeadersOnly { index });
        Ok(Checkpoint { folder, revision: Some(listing.commit), config, config_sha256, weights })
    }

    /// Everything a run needs: as [`fetch_metadata`](Hub::fetch_metadata), and the weight files into the cache.
    /// `progress` is called from several threads, at most once per MiB.
    ///
    /// # Errors
    /// As [`resolve`](Hub::resolve) and [`Checkpoint::open_folder`]; `Storage` when the disk is full. What is whole stays
    /// in the cache, what is not is resumed by the next call.
    pub fn fetch_all(&self, id: &str, revision: &str, progress: &(dyn Fn(FetchProgress) + Sync)) -> Result<Checkpoint> {
        let listing = self.resolve(id, revision)?;
        let shards = self.fetch_small(&listing)?;
        let counter = Counter::new(&shards.files, progress);
        in_parallel(&shards.files, |file| {
            self.cache.fetch(&self.client, &listing, file, &|bytes| counter.add(bytes))?;
            counter.file_done();
            Ok(())
        })?;
        let mut checkpoint = Checkpoint::open_folder(&self.cache.snapshot(&listing))?;
        checkpoint.revision = Some(listing.commit);
        Ok(checkpoint)
    }

    /// Fetches what is not weights, and returns which files are.
    fn fetch_small(&self, listing: &RepoListing) -> Result<Shards> {
        for name in [CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, INDEX_FILE] {
            let Some(file) = listing.file(name) else { continue };
            let file = self.sized(listing, file)?;
            if file.size.is_none_or(|size| size > MAX_JSON_BYTES) {
                let message = format!("{name} of {} is over the limit of {MAX_JSON_BYTES} bytes", listing.id);
                return Err(WorkerError::checkpoint(message));
            }
            self.cache.fetch(&self.client, listing, &file, &|_| ())?;
        }
        if listing.file(CONFIG_FILE).is_none() {
            let message = format!("model {} has no {CONFIG_FILE}", listing.id);
            return Err(WorkerError::checkpoint(message).hint("choose a repository in the transformers format"));
        }
        self.shards(listing)
    }

    fn shards(&self, listing: &RepoListing) -> Result<Shards> {
        let map = match listing.file(INDEX_FILE) {
            None => None,
            Some(_) => read_small(&self.cache.snapshot(listing).join(INDEX_FILE))?,
        };
        let map = map.map(|bytes| WeightMap::parse(&bytes).map_err(|e| e.context(&listing.id))).transpose()?;
        let names = map.as_ref().map_or_else(|| vec![SINGLE_FILE.to_owned()], WeightMap::files);
        let find = |name: &String| match listing.file(name) {
            Some(file) => self.sized(listing, file),
            None => Err(missing_weights(listing, name, map.is_some())),
        };
        let files = names.iter().map(find).collect::<Result<_>>()?;
        Ok(Shards { files, map })
    }

    /// Some mirrors list names only: size and hash are then in the answer to a request for the file.
    fn sized(&self, listing: &RepoListing, file: &RepoFile) -> Result<RepoFile> {
        if file.size.is_some() && file.digest.is_some() {
            return Ok(file.clone());
        }
        let found = self.client.describe(listing, &file.name)?;
        Ok(RepoFile {
            name: file.name.clone(),
            size: file.size.or(found.size),
            digest: file.digest.clone().or(found.digest),
        })
    }

    /// The checked header of a weight file, by ranged requests.
    fn header(&self, listing: &RepoListing, file: &RepoFile) -> Result<(FileBytes, Header)> {
        let named = |error: WorkerError| error.context(format!("{} of {}", file.name, listing.id));
        let bytes = file.size.ok_or_else(|| named(WorkerError::network("the hub does not tell its size")))?;
        let mut start = self.client.read_range(listing, &file.name, 0..LIKELY_HEADER.min(bytes))?;
        let needed = Header::bytes_needed(&start, bytes).map_err(named)?;
        let have = start.len() as u64;
        if needed > have {
            start.extend(self.client.read_range(listing, &file.name, have..needed)?);
        }
        let header = Header::parse(&start, bytes).map_err(named)?;
        Ok((FileBytes { name: file.name.clone(), bytes }, header))
    }
}

/// The weight files of a repository.
struct Shards {
    files: Vec<RepoFile>,
    map: Option<WeightMap>,
}

fn missing_weights(listing: &RepoListing, name: &str, indexed: bool) -> WorkerError {
    let id = &listing.id;
    if indexed {
        let message = format!("{INDEX_FILE} of {id} names {name}, which the repository does not have");
        return WorkerError::checkpoint(message).hint("choose another revision: this one is incomplete");
    }
    let message = format!("model {id} has neither {INDEX_FILE} nor {SINGLE_FILE}");
    WorkerError::checkpoint(message).hint("only safetensors weights are read: choose a revision that has them")
}

/// Tensors whose bytes were never fetched.
struct HeadersOnly {
    index: TensorIndex,
}

impl WeightSource for HeadersOnly {
    fn index(&self) -> &TensorIndex {
        &self.index
    }

    fn read(&self, entry: &TensorEntry, _range: std::ops::Range<u64>, _into: &mut [u8]) -> Result<()> {
        Err(WorkerError::internal(format!("tensor {} was read, but only headers were fetched", entry.name)))
    }

    fn bytes_read(&self) -> u64 {
        0
    }
}

/// Adds up what several threads fetch.
struct Counter<'a> {
    done: AtomicU64,
    files_done: AtomicUsize,
    total: u64,
    files_total: usize,
    report: &'a (dyn Fn(FetchProgress) + Sync),
}

impl<'a> Counter<'a> {
    fn new(files: &[RepoFile], report: &'a (dyn Fn(FetchProgress) + Sync)) -> Self {
        let total = files.iter().filter_map(|file| file.size).sum();
        let counter =
            Self { done: AtomicU64::new(0), files_done: AtomicUsize::new(0), total, files_total: files.len(), report };
        counter.tell();
        counter
    }

    /// Negative when a damaged file is started again.
    fn add(&self, bytes: i64) {
        self.done.fetch_add(bytes as u64, Ordering::Relaxed);
        self.tell();
    }

    fn file_done(&self) {
        self.files_done.fetch_add(1, Ordering::Relaxed);
        self.tell();
    }

    fn tell(&self) {
        (self.report)(FetchProgress {
            bytes_done: self.done.load(Ordering::Relaxed),
            bytes_total: self.total,
            files_done: self.files_done.load(Ordering::Relaxed),
            files_total: self.files_total,
        });
    }
}

/// Applies `work` to all `items`, a few at a time, results in order. After an error no further item is begun.
fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(at) else { return Ok(done) };
            let result = work(item).inspect_err(|_| next.store(items.len(), Ordering::Relaxed))?;
            done.push((at, result));
        }
    };
    let parts: Vec<Result<Vec<(usize, R)>>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..PARALLEL.min(items.len())).map(|_| scope.spawn(worker)).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let mut all: Vec<(usize, R)> = parts.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
    all.sort_by_key(|(at, _)| *at);
    Ok(all.into_iter().map(|(_, result)| result).collect())
}
