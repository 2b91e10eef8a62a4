//! The Hugging Face hub: repository listings, and verified downloads.
//!
//! Files are stored in the cache that other tools of the hub use
//! (`models--owner--name/{blobs,refs,snapshots}`, the layout of hf-hub), but not with hf-hub's
//! client: it can store error pages as files, ignores `Retry-After`, verifies no hash and waits
//! forever on a silent connection. Here every file is compared with the repository's size and hash
//! before it is renamed into place.

mod cache;
mod dataset;
mod http;
mod listing;
mod pieces;
mod plan;
mod prefetch;
mod rate_limit;
mod remote;
mod response;
mod streamed;
mod verify;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use outliers_protocol::{FileBytes, WeightVerification};
use rayon::prelude::*;

pub use dataset::Dataset;
pub use http::{Timeouts, Token};
pub use listing::{Digest, RepoFile, RepoKind, RepoListing};
pub use remote::RemoteFile;

use crate::checkpoint::safetensors::{Header, HeaderTensor};
use crate::checkpoint::source::{
    CONFIG_FILE, Checkpoint, Container, LocalSource, Location, MAX_JSON_BYTES, ModelFiles, TOKENIZER_SETTINGS,
    TensorEntry, TensorIndex, TokenizerFiles, WeightFiles, WeightSource, read_small,
};
use crate::checkpoint::torch;
use crate::error::{Result, WorkerError};
use cache::Cache;
use http::Client;
use pieces::Pieces;
use streamed::HubSource;
pub(crate) use streamed::held_for_hashes;

/// The public hub.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Default request limit: what the hub allows a free account on its API in five minutes. Requests
/// for file addresses have five times this limit.
pub const DEFAULT_REQUESTS: usize = 1000;

/// Concurrent downloads into the cache.
const PARALLEL_FILES: usize = 4;
/// Concurrent reads of headers. Each is one short answer, and models have up to 163.
const PARALLEL_HEADERS: usize = 16;
/// Bytes of a weight file requested first, which mostly contain the whole header (or pickle).
/// Models in a single file may need more.
const LIKELY_HEADER: u64 = 1 << 20;

/// Options of a hub client. None is read from the environment.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// `https://huggingface.co` or a mirror of it.
    pub endpoint: String,
    /// Token for gated and private repositories.
    pub token: Option<Token>,
    /// The hub's cache folder (`$HF_HOME/hub`).
    pub cache: PathBuf,
    /// Timeouts and retries.
    pub timeouts: Timeouts,
    /// Maximum requests in five minutes. Range requests to known file addresses do not count.
    pub requests: usize,
}

impl HubOptions {
    /// Options for the public hub without a token.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        let endpoint = DEFAULT_ENDPOINT.to_owned();
        let (timeouts, requests) = (Timeouts::default(), DEFAULT_REQUESTS);
        Self { endpoint, token: None, cache: cache.into(), timeouts, requests }
    }
}

/// Progress of a download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchProgress {
    /// Bytes of all files that are in the cache or being downloaded.
    pub bytes_done: u64,
    /// Bytes of all files.
    pub bytes_total: u64,
}

/// A client of one hub.
pub struct Hub {
    client: Arc<Client>,
    cache: Cache,
}

impl Hub {
    /// Creates a client without opening a connection.
    ///
    /// # Errors
    /// Kind `Job`: the endpoint is not an http(s) address, or the token would be sent unencrypted.
    pub fn new(options: HubOptions) -> Result<Self> {
        let client = Client::new(&options)?;
        Ok(Self { client: Arc::new(client), cache: Cache::new(options.cache) })
    }

    /// Lists commit and files of `id` (`owner/name`) at `revision` (branch, tag or commit).
    ///
    /// # Errors
    /// Kind `Job` for an invalid id or revision; `ModelNotFound`, `ModelGated` or `Network` by the
    /// hub's answer.
    pub fn resolve(&self, id: &str, revision: &str) -> Result<RepoListing> {
        let listing = listing::fetch(&self.client, RepoKind::Model, id, revision)?;
        self.cache.remember(id, revision, &listing.commit)?;
        Ok(listing)
    }

    /// Fetches configuration, tokenizer, index and the headers of the weight files: enough to
    /// plan, no weights.
    ///
    /// # Errors
    /// As [`resolve`](Hub::resolve) and [`Checkpoint::open_folder`].
    pub fn fetch_metadata(&self, id: &str, revision: &str) -> Result<Checkpoint> {
        let listing = Arc::new(self.resolve(id, revision)?);
        let shards = self.fetch_small(&listing)?;
        let (index, _) = self.index(&listing, &shards)?;
        Ok(self.described(&listing)?.with(HeadersOnly { index }))
    }

    /// A checkpoint with weights streamed over the network as they are read, with up to
    /// `read_ahead` bytes in advance. They are not written to disk, except pickled ones: finding
    /// their records requires reading all of them. `progress` reports those downloads.
    ///
    /// # Errors
    /// As [`fetch_metadata`](Hub::fetch_metadata) and [`fetch_all`](Hub::fetch_all).
    pub fn stream(
        &self,
        id: &str,
        revision: &str,
        read_ahead: u64,
        progress: &(dyn Fn(FetchProgress) + Sync),
    ) -> Result<Checkpoint> {
        let listing = Arc::new(self.resolve(id, revision)?);
        let shards = self.fetch_small(&listing)?;
        if shards.weights.container == Container::Torch {
            return self.fetch_shards(&listing, &shards, progress);
        }
        let (index, files) = self.index(&listing, &shards)?;
        Ok(self.described(&listing)?.with(HubSource::new(index, files, self.client.timeouts, read_ahead)))
    }

    /// The checked tensors of all weight files, and the files.
    fn index(&self, listing: &Arc<RepoListing>, shards: &Shards) -> Result<(TensorIndex, Vec<RemoteFile>)> {
        let open = |file| RemoteFile::open(&self.client, listing, file);
        let files = shards.files.iter().map(open).collect::<Result<Vec<_>>>()?;
        let found = in_parallel(PARALLEL_HEADERS, &files, |file| tensors(file, shards.weights.container))?;
        Ok((TensorIndex::of(&shards.weights, found).map_err(|e| e.context(&listing.id))?, files))
    }

    /// Fetches configuration and tokenizer only.
    ///
    /// # Errors
    /// As [`resolve`](Hub::resolve); kind `Checkpoint` for a repository without config.json.
    pub fn describe(&self, id: &str, revision: &str) -> Result<ModelFiles> {
        let listing = self.resolve(id, revision)?;
        self.fetch_description(&listing)?;
        self.described(&listing)
    }

    fn described(&self, listing: &RepoListing) -> Result<ModelFiles> {
        ModelFiles::read(&self.cache.snapshot(listing), Some(listing.commit.clone()))
    }

    /// Fetches everything that a run needs: as [`fetch_metadata`](Hub::fetch_metadata), and the
    /// weight files into the cache. `progress` is called from several threads, at most once per
    /// MiB.
    ///
    /// # Errors
    /// As [`resolve`](Hub::resolve) and [`Checkpoint::open_folder`]; `Storage` if the disk is
    /// full. Complete files stay in the cache, and the next call resumes incomplete ones.
    pub fn fetch_all(&self, id: &str, revision: &str, progress: &(dyn Fn(FetchProgress) + Sync)) -> Result<Checkpoint> {
        let listing = self.resolve(id, revision)?;
        let shards = self.fetch_small(&listing)?;
        self.fetch_shards(&listing, &shards, progress)
    }

    fn fetch_shards(
        &self,
        listing: &RepoListing,
        shards: &Shards,
        progress: &(dyn Fn(FetchProgress) + Sync),
    ) -> Result<Checkpoint> {
        let counter = Counter::new(&shards.files, progress);
        let hashed = in_parallel(PARALLEL_FILES, &shards.files, |file| {
            self.cache.fetch(&self.client, listing, file, &|bytes| counter.add(bytes))
        })?;
        let (verified, believed): (Vec<_>, Vec<_>) = shards.files.iter().zip(hashed).partition(|(_, hashed)| *hashed);
        let mut verification = WeightVerification { verified_files: verified.len(), ..Default::default() };
        let believed = believed.into_iter().map(|(file, _)| file.name.clone()).collect();
        verification.leave_out("they were in the cache before, which is compared by size alone", believed);
        let weights = LocalSource::open_files(&self.cache.snapshot(listing), &shards.weights, verification)?;
        Ok(self.described(listing)?.with(weights))
    }

    /// Fetches all files except weights. Returns the names of the weight files.
    fn fetch_small(&self, listing: &RepoListing) -> Result<Shards> {
        self.fetch_description(listing)?;
        let snapshot = self.cache.snapshot(listing);
        let has = |name: &str| listing.file(name).is_some();
        let read = |name: &str| {
            // The configuration has already been fetched.
            if name != CONFIG_FILE {
                self.fetch_file(listing, name)?;
            }
            Ok(read_small(&snapshot.join(name))?.unwrap_or_default())
        };
        let name = format!("model {}", listing.id);
        let weights = WeightFiles::find(&Location { name: &name, has: &has, read: &read })?;
        let files = weights.names.iter().filter_map(|name| listing.file(name));
        let files = files.map(|file| self.sized(listing, file)).collect::<Result<_>>()?;
        Ok(Shards { weights, files })
    }

    /// Fetches configuration and tokenizer.
    fn fetch_description(&self, listing: &RepoListing) -> Result<()> {
        let there = |name: &str| listing.file(name).is_some();
        if !there(CONFIG_FILE) {
            let message = format!("model {} has no {CONFIG_FILE}", listing.id);
            return Err(WorkerError::checkpoint(message).hint("choose a repository in the transformers format"));
        }
        let tokenizer = TokenizerFiles::choose(there).map_or(&[][..], TokenizerFiles::names);
        for name in [CONFIG_FILE].iter().chain(tokenizer).chain(&TOKENIZER_SETTINGS) {
            self.fetch_file(listing, name)?;
        }
        Ok(())
    }

    /// Fetches a file of limited size into the cache, if the repository has it.
    fn fetch_file(&self, listing: &RepoListing, name: &str) -> Result<()> {
        let Some(file) = listing.file(name) else { return Ok(()) };
        let file = self.sized(listing, file)?;
        if file.size.is_none_or(|size| size > MAX_JSON_BYTES) {
            let message = format!("{name} of {} is over the limit of {MAX_JSON_BYTES} bytes", listing.id);
            return Err(WorkerError::checkpoint(message));
        }
        self.cache.fetch(&self.client, listing, &file, &|_| ()).map(drop)
    }

    /// Completes a listing without sizes and hashes, as of some mirrors, from the headers of a
    /// request for the file.
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
}

/// Reads the checked tensors of a weight file by range requests.
fn tensors(file: &RemoteFile, container: Container) -> Result<(FileBytes, Vec<HeaderTensor>)> {
    let bytes = file.size();
    let read = || match container {
        Container::Safetensors => Ok(header(file)?.tensors),
        Container::Torch => {
            let pieces = Pieces::new(file);
            Ok(torch::Contents::read(bytes, &|range| pieces.read(range))?.outlined())
        }
    };
    let tensors = read().map_err(|error: WorkerError| error.context(file.asked()))?;
    Ok((FileBytes { name: file.name().to_owned(), bytes }, tensors))
}

fn header(file: &RemoteFile) -> Result<Header> {
    let bytes = file.size();
    let mut start = file.read(0..LIKELY_HEADER.min(bytes))?;
    let needed = Header::bytes_needed(&start, bytes)?;
    let have = start.len() as u64;
    if needed > have {
        start.extend(file.read(have..needed)?);
    }
    Header::parse(&start, bytes)
}

/// The weight files of a repository.
struct Shards {
    weights: WeightFiles,
    files: Vec<RepoFile>,
}

/// Tensors whose bytes are not available.
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

/// Sums the progress of several threads.
struct Counter<'a> {
    done: Mutex<u64>,
    total: u64,
    report: &'a (dyn Fn(FetchProgress) + Sync),
}

impl<'a> Counter<'a> {
    fn new(files: &[RepoFile], report: &'a (dyn Fn(FetchProgress) + Sync)) -> Self {
        let total = files.iter().filter_map(|file| file.size).sum();
        let counter = Self { done: Mutex::new(0), total, report };
        counter.add(0);
        counter
    }

    /// Adds bytes; negative if a damaged file is restarted.
    fn add(&self, bytes: i64) {
        // Locked while it reports, so that reports are in order.
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        *done = done.wrapping_add_signed(bytes);
        (self.report)(FetchProgress { bytes_done: *done, bytes_total: self.total });
    }
}

/// Applies `work` to all `items`, `parallel` at a time. Results are in order. After an error no
/// further item is started.
fn in_parallel<T: Sync, R: Send>(
    parallel: usize,
    items: &[T],
    work: impl Fn(&T) -> Result<R> + Send + Sync,
) -> Result<Vec<R>> {
    let threads = rayon::ThreadPoolBuilder::new().num_threads(parallel.min(items.len()).max(1)).build();
    let threads = threads.map_err(|error| WorkerError::internal(format!("no threads for the hub: {error}")))?;
    threads.install(|| items.par_iter().with_max_len(1).map(work).collect())
}
