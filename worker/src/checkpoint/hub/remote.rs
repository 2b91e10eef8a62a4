//! A large file on the hub. Its address is requested once, and its bytes are read in ranges from
//! there.

use std::io::{self, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ureq::Body;
use ureq::http::header::CONTENT_LENGTH;
use ureq::http::{Response, StatusCode};

use super::http::{Asked, Client, HubResponse};
use super::listing::{Digest, RepoFile, RepoListing};
use super::response::{RequestFailure, content_range, header};
use crate::error::{Result, WorkerError};

/// Maximum bytes skipped from a server that ignores ranges and begins at 0.
const MAX_SKIPPED: u64 = 4 << 20;

/// A file at one commit.
pub struct RemoteFile {
    client: Arc<Client>,
    listing: Arc<RepoListing>,
    name: String,
    size: u64,
    digest: Option<Digest>,
    place: Mutex<FileAddress>,
}

/// The known address of the bytes.
#[derive(Clone, Default)]
struct FileAddress {
    /// A signed, temporary address, or the hub's own if it sends files itself.
    address: Option<String>,
    /// Entity tag of the file in the first answer.
    tag: Option<String>,
}

impl RemoteFile {
    /// A file of a listing, which must have its size.
    pub(super) fn open(client: &Arc<Client>, listing: &Arc<RepoListing>, file: &RepoFile) -> Result<Self> {
        let (client, listing) = (Arc::clone(client), Arc::clone(listing));
        let RepoFile { name, size, digest } = file.clone();
        let Some(size) = size else {
            let message = format!("the hub does not tell the size of {name} of {}", listing.id);
            return Err(WorkerError::network(message));
        };
        Ok(Self { client, listing, name, size, digest, place: Mutex::default() })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Path inside the repository.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The listed hash; `None` if there is none.
    pub(super) fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Compares a hexadecimal hash of the whole file with the listed one.
    ///
    /// # Errors
    /// Kind `Checkpoint` if they differ.
    pub(super) fn check_hash(&self, found: &str) -> Result<()> {
        let Some(listed) = self.digest.as_ref().map(Digest::hex).filter(|listed| *listed != found) else {
            return Ok(());
        };
        let message = format!("{} is not what the hub lists: its hash is {found}, not {listed}", self.asked());
        Err(WorkerError::checkpoint(message)
            .hint("a proxy, a mirror or the network changed it on its way: run it again"))
    }

    /// Name of the file in messages.
    pub(super) fn asked(&self) -> Asked<'_> {
        self.listing.asked(&self.name)
    }

    /// Reads a range of the file completely.
    ///
    /// # Errors
    /// Kind `Network` after the last retry.
    pub fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
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

    /// Waits before the next attempt, or returns the error after the last.
    pub(super) fn wait(&self, failed: u32, refusal: RequestFailure) -> Result<()> {
        self.client.pause(failed, refusal).map_err(|error| error.context(format!("cannot fetch {}", self.asked())))
    }

    /// Requests the missing bytes of `into` from `start` on, once. Bytes received before a failure
    /// are kept. Stops if `go_on` returns false.
    pub(super) fn read_on(
        &self,
        start: u64,
        into: &mut [u8],
        filled: &mut usize,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(), RequestFailure> {
        let range = start + *filled as u64..start + into.len() as u64;
        let mut body = self.body(range)?;
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

    /// A body that begins with the range's first byte. It may end before the range does.
    fn body(&self, range: Range<u64>) -> Result<Box<dyn Read>, RequestFailure> {
        let answer = self.ask(&range)?;
        let skip = self.check(&answer, &range).inspect_err(|_| self.forget(&answer.url))?;
        let mut body = answer.response.into_body().into_reader();
        let skipped = io::copy(&mut body.by_ref().take(skip), &mut io::sink());
        skipped.map_err(|error| RequestFailure::again(format!("the answer broke off: {error}")))?;
        Ok(Box::new(body))
    }

    /// Requests the last known address, or a new one from the hub. One thread requests it while
    /// the others wait.
    fn ask(&self, range: &Range<u64>) -> Result<HubResponse, RequestFailure> {
        let asked = self.asked();
        // The lock must not be held during the request.
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

    /// Forgets an unusable address, unless another thread has replaced it.
    fn forget(&self, address: &str) {
        let mut place = self.place();
        if place.address.as_deref() == Some(address) {
            place.address = None;
        }
    }

    /// Checks that an answer contains these bytes. Returns the number of bytes before them.
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

    /// Checks the answer of a server that ignores ranges and sends the file from its beginning.
    /// Error pages look like this, too.
    fn check_whole(&self, response: &Response<Body>, range: &Range<u64>) -> Result<u64, RequestFailure> {
        let length: Option<u64> = header(response, CONTENT_LENGTH.as_str()).and_then(|text| text.parse().ok());
        if length != Some(self.size) {
            let length = length.map_or_else(|| "an unknown number of".to_owned(), |length| length.to_string());
            let why = format!("{length} bytes came instead of a range of {}: an error page, perhaps", self.size);
            return Err(RequestFailure::Expired(why));
        }
        if range.start > MAX_SKIPPED {
            let message = format!("{}: the hub's file server sends whole files only", self.asked());
            let hint = "use `--weights cache`, which fetches whole files before the run";
            return Err(RequestFailure::Final(WorkerError::network(message).hint(hint)));
        }
        Ok(range.start)
    }

    /// Checks that all ranges are of one version of the file.
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
