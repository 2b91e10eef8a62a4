//! One large file on the hub: its address is asked for once, then its bytes come in ranges from
//! wherever the hub keeps them.

use std::io::{self, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ureq::Body;
use ureq::http::header::CONTENT_LENGTH;
use ureq::http::{Response, StatusCode};

use super::answer::{RequestFailure, content_range, header};
use super::http::{Asked, Client, HubResponse};
use super::listing::{Digest, RepoFile, RepoListing};
use crate::error::{Result, WorkerError};

/// Most bytes that are read and thrown away because a server begins at 0 whatever is asked for.
const MOST_SKIPPED: u64 = 4 << 20;

/// A file at one commit.
pub(super) struct RemoteFile {
    client: Arc<Client>,
    listing: Arc<RepoListing>,
    name: String,
    size: u64,
    digest: Option<Digest>,
    place: Mutex<FileAddress>,
}

/// What is known of where the bytes are.
#[derive(Clone, Default)]
struct FileAddress {
    /// Signed, for a limited time; the hub's own where it sends files itself.
    address: Option<String>,
    /// The version of the file that its server named first.
    tag: Option<String>,
}

impl RemoteFile {
    /// A file of a size that is known, bytes.
    pub(super) fn new(client: &Arc<Client>, listing: &Arc<RepoListing>, file: &RepoFile, size: u64) -> Self {
        let (client, listing) = (Arc::clone(client), Arc::clone(listing));
        let RepoFile { name, digest, .. } = file.clone();
        Self { client, listing, name, size, digest, place: Mutex::default() }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The hash that the hub lists, if it lists one.
    pub(super) fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Compares the hash of all its bytes, in hexadecimal, with the listed one.
    ///
    /// # Errors
    /// Kind `Checkpoint` where they differ.
    pub(super) fn check_hash(&self, found: &str) -> Result<()> {
        let Some(listed) = self.digest.as_ref().map(Digest::hex).filter(|listed| *listed != found) else {
            return Ok(());
        };
        let message = format!("{} is not what the hub lists: its hash is {found}, not {listed}", self.asked());
        Err(WorkerError::checkpoint(message)
            .hint("a proxy, a mirror or the network changed it on its way: run it again"))
    }

    /// What it is called in messages.
    pub(super) fn asked(&self) -> Asked<'_> {
        self.listing.asked(&self.name)
    }

    /// The bytes of a range inside the file; the whole range or an error.
    pub(super) fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let mut filled = 0;
        self.client.persist(&self.asked(), || {
            while filled < bytes.len() {
                self.read_on(range.start, &mut bytes, &mut filled, &|| true)?;
            }
            Ok(())
        })?;
        Ok(bytes)
    }

    /// Waits before the next try, or says that it was the last.
    pub(super) fn wait(&self, failed: u32, refusal: RequestFailure) -> Result<()> {
        self.client.pause(failed, refusal).map_err(|error| error.context(format!("cannot fetch {}", self.asked())))
    }

    /// One request for what is missing of the bytes from `start` on; those that came count,
    /// however it ends. Stops when `go_on` says so.
    pub(super) fn read_on(
        &self,
        start: u64,
        into: &mut [u8],
        filled: &mut usize,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(), RequestFailure> {
        let range = start + *filled as u64..start + into.len() as u64;
        let mut body = self.open(range)?;
        while *filled < into.len() && go_on() {
            match body.read(&mut into[*filled..]) {
                Ok(0) => {
                    return Err(RequestFailure::again(format!(
                        "the answer ended after {filled} of {} bytes",
                        into.len()
                    )));
                }
                Ok(read) => *filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let why = format!("the answer broke off after {filled} of {} bytes: {error}", into.len());
                    return Err(RequestFailure::again(why));
                }
            }
        }
        Ok(())
    }

    /// The body of an answer that begins with the range's first byte. It may end before the range
    /// does.
    fn open(&self, range: Range<u64>) -> Result<Box<dyn Read>, RequestFailure> {
        let answer = self.ask(&range)?;
        let skip = self.check(&answer, &range).inspect_err(|_| self.forget(&answer.url))?;
        let mut body = answer.response.into_body().into_reader();
        let skipped = io::copy(&mut body.by_ref().take(skip), &mut io::sink());
        skipped.map_err(|error| RequestFailure::again(format!("the answer broke off: {error}")))?;
        Ok(Box::new(body))
    }

    /// Asks where the bytes were last; else the hub, which tells. One thread asks, the others wait
    /// for its answer.
    fn ask(&self, range: &Range<u64>) -> Result<HubResponse, RequestFailure> {
        let asked = self.asked();
        // The lock must not be held while the answer is waited for.
        let known = self.place().address.clone();
        if let Some(address) = known {
            return self.client.get_at(&address, range, &asked).inspect_err(|refusal| {
                if matches!(refusal, RequestFailure::Expired(_)) {
                    self.forget(&address);
                }
            });
        }
        let mut place = self.place();
        if place.address.is_some() {
            drop(place);
            return self.ask(range);
        }
        let answer = self.client.get(&self.client.file_url(&self.listing, &self.name), Some(range), &asked)?;
        place.address = Some(answer.url.clone());
        Ok(answer)
    }

    fn place(&self) -> MutexGuard<'_, FileAddress> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An address that is of no more use, unless another thread has found a new one already.
    fn forget(&self, address: &str) {
        let mut place = self.place();
        if place.address.as_deref() == Some(address) {
            place.address = None;
        }
    }

    /// Whether an answer holds these bytes of this file; if so, how many others come before them.
    fn check(&self, answer: &HubResponse, range: &Range<u64>) -> Result<u64, RequestFailure> {
        let response = &answer.response;
        let skip = if response.status() == StatusCode::PARTIAL_CONTENT {
            self.check_part(response, range)?
        } else {
            self.check_whole(response, range)?
        };
        self.check_tag(response)?;
        Ok(skip)
    }

    fn check_part(&self, response: &Response<Body>, range: &Range<u64>) -> Result<u64, RequestFailure> {
        let other = |what: String| Err(RequestFailure::Expired(what));
        match content_range(response) {
            Some((_, Some(total))) if total != self.size => {
                other(format!("the file server has {total} bytes of it, not {}: it is another version", self.size))
            }
            Some((start, _)) if start == range.start => Ok(0),
            _ => other("the answer holds other bytes than were asked for (its Content-Range)".to_owned()),
        }
    }

    /// A server that ignores ranges sends the file from its beginning. Error pages come that way
    /// too.
    fn check_whole(&self, response: &Response<Body>, range: &Range<u64>) -> Result<u64, RequestFailure> {
        let length: Option<u64> = header(response, CONTENT_LENGTH.as_str()).and_then(|text| text.parse().ok());
        if length != Some(self.size) {
            let length = length.map_or_else(|| "an unknown number of".to_owned(), |length| length.to_string());
            let why = format!("{length} bytes came instead of a range of {}: an error page, perhaps", self.size);
            return Err(RequestFailure::Expired(why));
        }
        if range.start > MOST_SKIPPED {
            let message = format!("{}: the hub's file server sends whole files only", self.asked());
            let hint = "use `--weights cache`, which fetches whole files before the run";
            return Err(RequestFailure::Final(WorkerError::network(message).hint(hint)));
        }
        Ok(range.start)
    }

    /// All ranges must be of one version of the file.
    fn check_tag(&self, response: &Response<Body>) -> Result<(), RequestFailure> {
        let Some(tag) = header(response, "etag") else { return Ok(()) };
        let mut place = self.place();
        match &place.tag {
            None => place.tag = Some(tag.to_owned()),
            Some(first) if first != tag => {
                return Err(RequestFailure::Expired("the file changed while it was read (its entity tag)".to_owned()));
            }
            Some(_) => {}
        }
        Ok(())
    }
}
